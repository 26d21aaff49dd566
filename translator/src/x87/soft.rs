//! The portable arithmetic engine: exact integer arithmetic on significands, rounded once.
//!
//! Operations of IEEE kind agree with silicon in every bit, flags and C1 included; the transcendentals of
//! [`super::transcendental`] may differ from a given chip in the last bit.

use std::cmp::Ordering;

use super::engine::{Engine, Operation, Outcome};
use super::f80::{Class, F80, truncating};
use super::round::{EXTENDED, Format, Rounded, round};
use super::{control, status, transcendental};

/// Portable arithmetic.
pub struct Soft;

impl Engine for Soft {
    #[inline]
    fn run(operation: Operation, a: F80, b: F80, cw: u16) -> Outcome {
        match operation {
            Operation::Add => add(a, b, cw),
            Operation::Mul => mul(a, b, cw),
            Operation::Sub => sub(a, b, cw),
            Operation::SubR => sub(b, a, cw),
            Operation::Div => div(a, b, cw),
            Operation::DivR => div(b, a, cw),
            Operation::Sqrt => sqrt(a, cw),
            Operation::RoundInt => round_int(a, cw),
            Operation::Scale => scale(a, b, cw),
            Operation::Prem => remainder(a, b, cw, false),
            Operation::Prem1 => remainder(a, b, cw, true),
            Operation::Xtract => extract(a),
            Operation::F2xm1 => transcendental::f2xm1(a, cw),
            Operation::Yl2x => transcendental::fyl2x(a, b, cw),
            Operation::Yl2xp1 => transcendental::fyl2xp1(a, b, cw),
            Operation::Patan => transcendental::fpatan(a, b, cw),
            Operation::Ptan => transcendental::fptan(a, cw),
            Operation::Sin => transcendental::fsin(a, cw),
            Operation::Cos => transcendental::fcos(a, cw),
            Operation::SinCos => transcendental::fsincos(a, cw),
        }
    }
}

/// The masked response to an invalid operation.
pub(super) fn invalid() -> Outcome {
    Outcome::new(F80::INDEFINITE, status::IE)
}

/// The outcome if an operand is a NaN or unsupported (SDM vol. 1 §4.8.3.5, table 4-7).
#[inline]
pub(super) fn screen(a: F80, b: F80) -> Option<Outcome> {
    if a.is_normal() && b.is_normal() {
        return None;
    }
    let plain = |c| matches!(c, Class::Zero | Class::Normal | Class::Denormal | Class::Infinity);
    let (ca, cb) = (a.class(), b.class());
    if plain(ca) && plain(cb) { None } else { Some(propagate(a, ca, b, cb)) }
}

#[cold]
fn propagate(a: F80, ca: Class, b: F80, cb: Class) -> Outcome {
    if ca == Class::Unsupported || cb == Class::Unsupported {
        return invalid();
    }
    let flag = if ca == Class::Signalling || cb == Class::Signalling { status::IE } else { 0 };
    let value = match (ca, cb) {
        (Class::Quiet, Class::Signalling) => a,
        (Class::Signalling, Class::Quiet) => b,
        (Class::Quiet | Class::Signalling, Class::Quiet | Class::Signalling) => match a.mantissa.cmp(&b.mantissa) {
            Ordering::Greater => a,
            Ordering::Less => b,
            Ordering::Equal => a.with_sign(a.is_negative() && b.is_negative()),
        },
        (Class::Quiet | Class::Signalling, _) => a,
        _ => b,
    };
    Outcome::new(value.quieted(), flag)
}

/// The outcome if the one operand is a NaN or unsupported.
pub(super) fn screen_one(a: F80) -> Option<Outcome> {
    screen(a, a)
}

/// DE if one of the operands is denormal.
#[inline]
pub(super) fn denormal(a: F80, b: F80) -> u16 {
    if a.class() == Class::Denormal || b.class() == Class::Denormal { status::DE } else { 0 }
}

/// Rounds to the control word's precision and packs.
fn finish(neg: bool, exp: i32, sig: u128, de: u16, cw: u16) -> Outcome {
    finish_as(neg, exp, sig, de, Format::of(cw), cw)
}

/// Rounds to `format` and packs; `sig` must have bit 127 set.
pub(super) fn finish_as(neg: bool, exp: i32, sig: u128, de: u16, format: Format, cw: u16) -> Outcome {
    if de & !cw != 0 {
        return Outcome::new(F80::ZERO, de);
    }
    let r: Rounded = round(neg, exp, sig, format, cw);
    Outcome::new(r.pack(neg), r.status | de)
}

#[inline]
fn add(a: F80, b: F80, cw: u16) -> Outcome {
    if let Some(outcome) = screen(a, b) {
        return outcome;
    }
    let de = denormal(a, b);
    let exact_zero_negative = cw & control::RC == control::RC_DOWN;
    match (a.class(), b.class()) {
        (Class::Infinity, Class::Infinity) if a.is_negative() != b.is_negative() => return invalid(),
        (Class::Infinity, _) => return Outcome::new(a, de),
        (_, Class::Infinity) => return Outcome::new(b, de),
        (Class::Zero, Class::Zero) => {
            let neg = if a.is_negative() == b.is_negative() { a.is_negative() } else { exact_zero_negative };
            return Outcome::new(F80::ZERO.with_sign(neg), 0);
        }
        (Class::Zero, _) => return repack(b, de, cw),
        (_, Class::Zero) => return repack(a, de, cw),
        _ => {}
    }
    let (ua, ub) = (a.unpack(), b.unpack());
    let a_larger = (ua.exp, ua.sig) >= (ub.exp, ub.sig);
    let (large, small) = if a_larger { (ua, ub) } else { (ub, ua) };
    // One bit of headroom for the carry; 63 bits and a sticky one below.
    let sl = u128::from(large.sig) << 63;
    let ss = super::round::shr_sticky(u128::from(small.sig) << 63, (large.exp - small.exp) as u32);
    let sum = if large.neg == small.neg { sl + ss } else { sl - ss };
    if sum == 0 {
        return if de & !cw != 0 {
            Outcome::new(F80::ZERO, de)
        } else {
            Outcome::new(F80::ZERO.with_sign(exact_zero_negative), de)
        };
    }
    let shift = sum.leading_zeros();
    finish(large.neg, large.exp + 1 - shift as i32, sum << shift, de, cw)
}

/// A number passed through an operation unchanged but for rounding to the control word's precision.
fn repack(a: F80, de: u16, cw: u16) -> Outcome {
    let u = a.unpack();
    finish(u.neg, u.exp, u128::from(u.sig) << 64, de, cw)
}

fn sub(a: F80, b: F80, cw: u16) -> Outcome {
    // A NaN keeps its sign.
    match screen(a, b) {
        Some(outcome) => outcome,
        None => add(a, b.with_sign(!b.is_negative()), cw),
    }
}

#[inline]
fn mul(a: F80, b: F80, cw: u16) -> Outcome {
    if let Some(outcome) = screen(a, b) {
        return outcome;
    }
    let de = denormal(a, b);
    let neg = a.is_negative() != b.is_negative();
    match (a.class(), b.class()) {
        (Class::Infinity, Class::Zero) | (Class::Zero, Class::Infinity) => return invalid(),
        (Class::Infinity, _) | (_, Class::Infinity) => return Outcome::new(F80::INFINITY.with_sign(neg), de),
        (Class::Zero, _) | (_, Class::Zero) => return Outcome::new(F80::ZERO.with_sign(neg), de),
        _ => {}
    }
    let (ua, ub) = (a.unpack(), b.unpack());
    let product = u128::from(ua.sig) * u128::from(ub.sig);
    let shift = product.leading_zeros();
    finish(neg, ua.exp + ub.exp - 16382 - shift as i32, product << shift, de, cw)
}

#[inline]
fn div(a: F80, b: F80, cw: u16) -> Outcome {
    if let Some(outcome) = screen(a, b) {
        return outcome;
    }
    let de = denormal(a, b);
    let neg = a.is_negative() != b.is_negative();
    match (a.class(), b.class()) {
        (Class::Infinity, Class::Infinity) | (Class::Zero, Class::Zero) => return invalid(),
        (Class::Infinity, _) => return Outcome::new(F80::INFINITY.with_sign(neg), de),
        (_, Class::Zero) => return Outcome::new(F80::INFINITY.with_sign(neg), status::ZE),
        (Class::Zero, _) | (_, Class::Infinity) => return Outcome::new(F80::ZERO.with_sign(neg), de),
        _ => {}
    }
    let (ua, ub) = (a.unpack(), b.unpack());
    let below = ua.sig < ub.sig;
    let numerator = u128::from(ua.sig) << if below { 64 } else { 63 };
    let divisor = u128::from(ub.sig);
    let (quotient, rest) = (numerator / divisor, numerator % divisor);
    let sig = quotient << 64 | u128::from(fraction(rest, divisor));
    finish(neg, ua.exp - ub.exp + 16383 - i32::from(below), sig, de, cw)
}

/// 64 bits that compare with zero and one half as `rest` / `whole` does.
fn fraction(rest: u128, whole: u128) -> u64 {
    match (rest, (rest << 1).cmp(&whole)) {
        (0, _) => 0,
        (_, Ordering::Less) => 1 << 62,
        (_, Ordering::Equal) => 1 << 63,
        (_, Ordering::Greater) => 3 << 62,
    }
}

fn sqrt(a: F80, cw: u16) -> Outcome {
    if let Some(outcome) = screen_one(a) {
        return outcome;
    }
    match (a.class(), a.is_negative()) {
        (Class::Zero, _) | (Class::Infinity, false) => return Outcome::new(a, 0),
        (_, true) => return invalid(),
        _ => {}
    }
    let u = a.unpack();
    // The exponent's unbiased value is made even, the significand taken as 127 or 128 bits.
    let odd = (u.exp - 16383) & 1;
    let radicand = u128::from(u.sig) << (63 + odd);
    let root = radicand.isqrt();
    let rest = radicand - root * root;
    // The root's fraction exceeds one half when the remainder exceeds the root, and never equals it.
    let sig = root << 64 | u128::from(fraction(rest, 2 * root + 1));
    finish(false, (u.exp - 16383 - odd) / 2 + 16383, sig, denormal(a, a), cw)
}

fn round_int(a: F80, cw: u16) -> Outcome {
    if let Some(outcome) = screen_one(a) {
        return outcome;
    }
    match a.class() {
        Class::Zero | Class::Infinity => Outcome::new(a, 0),
        _ => {
            let de = denormal(a, a);
            let (value, flags) = a.rounded_to_int(cw);
            if de & !cw != 0 { Outcome::new(a, de) } else { Outcome::new(value, flags | de) }
        }
    }
}

fn scale(a: F80, b: F80, cw: u16) -> Outcome {
    if let Some(outcome) = screen(a, b) {
        return outcome;
    }
    let de = denormal(a, b);
    match (a.class(), b.class(), b.is_negative()) {
        (Class::Infinity, Class::Infinity, true) | (Class::Zero, Class::Infinity, false) => return invalid(),
        (_, Class::Infinity, true) => return Outcome::new(F80::ZERO.with_sign(a.is_negative()), de),
        (_, Class::Infinity, false) => return Outcome::new(F80::INFINITY.with_sign(a.is_negative()), de),
        (Class::Infinity | Class::Zero, ..) => return Outcome::new(a, de),
        _ => {}
    }
    // Beyond 17 bits every scale overflows or underflows alike.
    let (n, flags) = b.to_int(32, truncating(cw));
    let limit = 0x1_0000;
    let n = match (flags & status::IE != 0, b.is_negative()) {
        (true, false) => limit,
        (true, true) => -limit,
        _ => (n as i32).clamp(-limit, limit),
    };
    let u = a.unpack();
    finish_as(u.neg, u.exp + n, u128::from(u.sig) << 64, de, EXTENDED, cw)
}

/// FPREM and FPREM1 (SDM vol. 2): exact; C2 says that the reduction is partial, C0, C3 and C1 hold the quotient's low
/// bits when it is not.
fn remainder(a: F80, b: F80, cw: u16, nearest: bool) -> Outcome {
    if let Some(outcome) = screen(a, b) {
        return outcome;
    }
    let de = denormal(a, b);
    match (a.class(), b.class()) {
        (Class::Infinity, _) | (_, Class::Zero) => return invalid(),
        (Class::Zero, _) => return Outcome::new(a, de),
        (_, Class::Infinity) => return pass(a, de, cw),
        _ if de & !cw != 0 => return Outcome::new(a, de),
        _ => {}
    }
    let (ua, ub) = (a.unpack(), b.unpack());
    let distance = ua.exp - ub.exp;
    if distance < -1 || distance < 0 && !nearest {
        return pass(a, de, cw);
    }
    let divisor = u128::from(ub.sig);
    if distance >= 64 {
        let step = distance & 31 | 32;
        let rest = (u128::from(ua.sig) << step) % divisor;
        let mut outcome = normalize(ua.neg, ub.exp + distance - step, rest, de, cw);
        outcome.status |= status::C2;
        return outcome;
    }
    // One place further down, so that a distance of −1 needs no case of its own.
    let numerator = u128::from(ua.sig) << (distance + 1);
    let (mut quotient, mut rest) = (numerator / (divisor << 1), numerator % (divisor << 1));
    let mut neg = ua.neg;
    if nearest && (rest > divisor || rest == divisor && quotient & 1 != 0) {
        rest = (divisor << 1) - rest;
        quotient += 1;
        neg = !neg;
    }
    let mut outcome = if rest == 0 {
        Outcome::new(F80::ZERO.with_sign(ua.neg), de)
    } else {
        normalize(neg, ub.exp - 1, rest, de, cw)
    };
    for (bit, code) in [(1, status::C1), (2, status::C3), (4, status::C0)] {
        if quotient & bit != 0 {
            outcome.status |= code;
        }
    }
    outcome
}

/// An operand returned as it is, but for an unmasked denormal or underflow.
fn pass(a: F80, de: u16, cw: u16) -> Outcome {
    let u = a.unpack();
    finish_as(u.neg, u.exp, u128::from(u.sig) << 64, de, EXTENDED, cw)
}

/// Packs the integer `rest` × 2^(`exp` − 16383 − 63).
fn normalize(neg: bool, exp: i32, rest: u128, de: u16, cw: u16) -> Outcome {
    if rest == 0 {
        return Outcome::new(F80::ZERO.with_sign(neg), de);
    }
    let shift = rest.leading_zeros();
    finish_as(neg, exp + 64 - shift as i32, rest << shift, de, EXTENDED, cw)
}

fn extract(a: F80) -> Outcome {
    if let Some(outcome) = screen_one(a) {
        return outcome;
    }
    let (value, flags) = match a.class() {
        Class::Zero => (F80::INFINITY.with_sign(true), status::ZE),
        Class::Infinity => (F80::INFINITY, 0),
        _ => (F80::from_i64(i64::from(a.unpack().exp - 16383)), denormal(a, a)),
    };
    let second = match a.class() {
        Class::Zero | Class::Infinity => a,
        _ => F80 { mantissa: a.unpack().sig, sign_exp: 0x3fff }.with_sign(a.is_negative()),
    };
    Outcome { value, second, status: flags }
}

/// Compares: C3, C2 and C0 as FCOM sets them, with IE or DE (SDM vol. 1 table 8-6). `quiet` is for the unordered
/// comparisons, which take a quiet NaN without complaint.
pub(super) fn compare(a: F80, b: F80, quiet: bool) -> u16 {
    let unordered = status::C0 | status::C2 | status::C3;
    let (ca, cb) = (a.class(), b.class());
    let any = |class| ca == class || cb == class;
    if any(Class::Unsupported) || any(Class::Signalling) {
        return unordered | status::IE;
    }
    if any(Class::Quiet) {
        return if quiet { unordered } else { unordered | status::IE };
    }
    let key = |x: F80, class| {
        let magnitude = match class {
            Class::Zero => (i32::MIN, 0),
            Class::Infinity => (i32::MAX, 0),
            _ => (x.unpack().exp, x.unpack().sig),
        };
        (x.is_negative() && class != Class::Zero, magnitude)
    };
    let (ka, kb) = (key(a, ca), key(b, cb));
    let order = match (ka.0, kb.0) {
        (false, false) => ka.1.cmp(&kb.1),
        (true, true) => kb.1.cmp(&ka.1),
        (true, false) => Ordering::Less,
        (false, true) => Ordering::Greater,
    };
    denormal(a, b)
        | match order {
            Ordering::Greater => 0,
            Ordering::Less => status::C0,
            Ordering::Equal => status::C3,
        }
}
