//! The transcendental instructions in portable arithmetic: series at 128 bits, rounded once to 64.
//!
//! Special operands follow the tables of SDM vol. 2; arguments of the trigonometric functions are reduced by the 66-bit
//! π of SDM vol. 1 §8.3.8. Chips do not agree with one another in the last bit, and this agrees with none of them
//! always: expect a difference of one unit in the last place and in C1.

use super::engine::Outcome;
use super::f80::{Class, F80, Unpacked};
use super::round::EXTENDED;
use super::soft::{denormal, finish_as, invalid, screen, screen_one};
use super::status;
use super::wide::Wide;

impl From<Unpacked> for Wide {
    fn from(u: Unpacked) -> Wide {
        Wide { neg: u.neg, exp: u.exp - 16383, sig: u128::from(u.sig) << 64 }
    }
}

/// Rounds an approximation of an irrational number: always inexact.
fn inexact(x: Wide, de: u16, cw: u16) -> Outcome {
    if x.sig == 0 {
        return Outcome::new(F80::ZERO, de | status::PE);
    }
    finish_as(x.neg, x.exp + 16383, x.sig | 1, de, EXTENDED, cw)
}

fn zero(neg: bool, de: u16) -> Outcome {
    Outcome::new(F80::ZERO.with_sign(neg), de)
}

fn infinity(neg: bool, de: u16) -> Outcome {
    Outcome::new(F80::INFINITY.with_sign(neg), de)
}

/// e^x − 1 for |x| < 1.
fn exp_m1(x: Wide) -> Wide {
    Wide::series(x, |i, power| {
        let p = power.mul(x).div_int(i + 1);
        (p, p)
    })
}

/// 2·artanh(x) for |x| ≤ 1/5.
fn artanh2(x: Wide) -> Wide {
    let square = x.mul(x);
    Wide::series(x.scale(1), |i, power| {
        let p = power.mul(square);
        (p, p.div_int(2 * i + 1))
    })
}

/// arctan(x) for 0 ≤ x ≤ 1.
fn arctan(x: Wide) -> Wide {
    // tan(π/8), roughly, divides the range.
    let high = x.exp >= -1 && (x.exp >= 0 || x.sig > 0xd413_cccf << 96);
    let (y, base) = if high { (x.sub(Wide::ONE).div(x.add(Wide::ONE)), Wide::PI.scale(-2)) } else { (x, Wide::ZERO) };
    let square = y.mul(y).neg();
    base.add(Wide::series(y, |i, power| {
        let p = power.mul(square);
        (p, p.div_int(2 * i + 1))
    }))
}

/// Sine and cosine for |x| ≤ π/4.
fn sin_cos(x: Wide) -> (Wide, Wide) {
    let square = x.mul(x).neg();
    let from = |first: Wide, k: u32| {
        Wide::series(first, |i, power| {
            let p = power.mul(square).div_int((2 * i + k - 1) * (2 * i + k));
            (p, p)
        })
    };
    (from(x, 1), from(Wide::ONE, 0))
}

/// 2^a − 1.
pub(super) fn f2xm1(a: F80, cw: u16) -> Outcome {
    if let Some(outcome) = screen_one(a) {
        return outcome;
    }
    match (a.class(), a.is_negative()) {
        (Class::Zero, _) | (Class::Infinity, false) => return Outcome::new(a, 0),
        (Class::Infinity, true) => return Outcome::new(F80::MINUS_ONE, 0),
        _ => {}
    }
    let u = a.unpack();
    let x = Wide::from(u);
    if x.exp > 0 || x.exp == 0 && x.sig << 1 != 0 {
        // Outside −1 to 1 the result is undefined; the operand is as good as any.
        return Outcome::new(a, 0);
    }
    if x.exp == 0 {
        let half = F80 { mantissa: 1 << 63, sign_exp: 0xbffe };
        return Outcome::new(if u.neg { half } else { F80::ONE }, 0);
    }
    inexact(exp_m1(x.mul(Wide::LN_2)), denormal(a, a), cw)
}

/// b × log₂ a.
pub(super) fn fyl2x(a: F80, b: F80, cw: u16) -> Outcome {
    if let Some(outcome) = screen(a, b) {
        return outcome;
    }
    let de = denormal(a, b);
    let neg = b.is_negative();
    let is_one = a == F80::ONE;
    let below_one = !is_one && a.unpack().exp < 16383;
    match (a.class(), b.class()) {
        (Class::Zero, Class::Zero) | (Class::Infinity, Class::Zero) => return invalid(),
        (Class::Zero, Class::Infinity) => return infinity(!neg, de),
        (Class::Zero, _) => return infinity(!neg, status::ZE),
        _ if a.is_negative() => return invalid(),
        (_, Class::Infinity) if is_one => return invalid(),
        (Class::Infinity, _) => return infinity(neg, de),
        (_, Class::Infinity) => return infinity(neg != below_one, de),
        (_, Class::Zero) => return zero(neg != below_one, de),
        _ if is_one => return zero(neg, de),
        _ => {}
    }
    let (x, y) = (Wide::from(a.unpack()), Wide::from(b.unpack()));
    if x.sig << 1 == 0 {
        // A power of two: the logarithm is an integer and the product exact, though silicon says that it is not.
        let product = y.mul(Wide::from_int(x.exp));
        let mut outcome = finish_as(product.neg, product.exp + 16383, product.sig, de, EXTENDED, cw);
        if outcome.value.class() == Class::Denormal {
            outcome.status |= status::UE;
        }
        outcome.status |= status::PE;
        return outcome;
    }
    // Mantissas above √2, roughly, count as below one of the next power.
    let lift = i32::from(x.sig > 0xb504_f333 << 96);
    let m = Wide { exp: -lift, ..x };
    let log = artanh2(m.sub(Wide::ONE).div(m.add(Wide::ONE))).div(Wide::LN_2);
    inexact(y.mul(log.add(Wide::from_int(x.exp + lift))), de, cw)
}

/// b × log₂(a + 1).
pub(super) fn fyl2xp1(a: F80, b: F80, cw: u16) -> Outcome {
    if let Some(outcome) = screen(a, b) {
        return outcome;
    }
    let de = denormal(a, b);
    let neg = a.is_negative() != b.is_negative();
    match (a.class(), b.class()) {
        (Class::Zero, Class::Infinity) | (Class::Infinity, Class::Zero) => return invalid(),
        (Class::Infinity, _) if a.is_negative() => return invalid(),
        (Class::Infinity, _) | (_, Class::Infinity) => return infinity(neg, de),
        (Class::Zero, _) | (_, Class::Zero) => return zero(neg, de),
        _ => {}
    }
    let (x, y) = (Wide::from(a.unpack()), Wide::from(b.unpack()));
    if x.exp >= 0 {
        // Outside −1 to 1 the result is undefined.
        return Outcome::new(b, de);
    }
    let log = artanh2(x.div(x.add(Wide::ONE.scale(1)))).div(Wide::LN_2);
    inexact(y.mul(log), de, cw)
}

/// The angle of the point (a, b).
pub(super) fn fpatan(a: F80, b: F80, cw: u16) -> Outcome {
    if let Some(outcome) = screen(a, b) {
        return outcome;
    }
    let de = denormal(a, b);
    let neg = b.is_negative();
    let quarters = |n: i32| {
        let angle = Wide { neg, ..Wide::PI.mul(Wide::from_int(n)).scale(-2) };
        inexact(angle, de, cw)
    };
    match (a.class(), b.class(), a.is_negative()) {
        (Class::Infinity, Class::Infinity, false) => return quarters(1),
        (Class::Infinity, Class::Infinity, true) => return quarters(3),
        (Class::Zero, Class::Zero, false) | (Class::Infinity, _, false) | (_, Class::Zero, false) => {
            return zero(neg, de);
        }
        (Class::Zero, Class::Zero, true) | (Class::Infinity, _, true) | (_, Class::Zero, true) => return quarters(4),
        (_, Class::Infinity, _) | (Class::Zero, ..) => return quarters(2),
        _ => {}
    }
    let mut x = Wide { neg: false, ..Wide::from(a.unpack()) };
    let mut y = Wide { neg: false, ..Wide::from(b.unpack()) };
    let steep = (y.exp, y.sig) > (x.exp, x.sig);
    if steep {
        (x, y) = (y, x);
    }
    let mut angle = arctan(y.div(x));
    if steep {
        angle = Wide::PI.scale(-1).sub(angle);
    }
    if a.is_negative() {
        angle = Wide::PI.sub(angle);
    }
    inexact(Wide { neg, ..angle }, de, cw)
}

/// How a trigonometric function treats its operand.
enum Angle {
    /// The outcome is settled: NaN, infinity or out of range.
    Settled(Outcome),
    /// ±0.
    Zero,
    /// Sine and cosine, and DE.
    Values(Wide, Wide, u16),
}

/// π/2 in 66 bits, as an integer at 2^−65.
const HALF_PI_66: u128 = 0xc_90fd_aa22_168c_234c >> 2;

fn angle(a: F80) -> Angle {
    if let Some(outcome) = screen_one(a) {
        return Angle::Settled(outcome);
    }
    match a.class() {
        Class::Infinity => return Angle::Settled(invalid()),
        Class::Zero => return Angle::Zero,
        _ => {}
    }
    let u = a.unpack();
    if u.exp >= 16383 + 63 {
        return Angle::Settled(Outcome::new(a, status::C2));
    }
    let x = Wide { neg: false, ..Wide::from(u) };
    let (mut quadrant, mut rest) = (0u32, x);
    if x.exp >= -1 {
        // |a| mod π/2, a bit at a time: the significand enters from the top, at the scale of 2^−65.
        let places = (x.exp - 63 + 65) as u32;
        let mut r = 0u128;
        for i in (0..64 + places).rev() {
            let bit = if i >= places { u.sig >> (i - places) & 1 } else { 0 };
            r = r << 1 | u128::from(bit);
            quadrant <<= 1;
            if r >= HALF_PI_66 {
                r -= HALF_PI_66;
                quadrant |= 1;
            }
        }
        if r > HALF_PI_66 / 2 {
            rest = Wide::new(true, 127 - 65, HALF_PI_66 - r);
            quadrant = quadrant.wrapping_add(1);
        } else {
            rest = Wide::new(false, 127 - 65, r);
        }
    }
    let (s, c) = sin_cos(rest);
    let (s, c) = match quadrant & 3 {
        0 => (s, c),
        1 => (c, s.neg()),
        2 => (s.neg(), c.neg()),
        _ => (c.neg(), s),
    };
    let s = if u.neg { s.neg() } else { s };
    Angle::Values(s, c, denormal(a, a))
}

/// The sine of a.
pub(super) fn fsin(a: F80, cw: u16) -> Outcome {
    match angle(a) {
        Angle::Settled(outcome) => outcome,
        Angle::Zero => Outcome::new(a, 0),
        Angle::Values(s, _, de) => inexact(s, de, cw),
    }
}

/// The cosine of a.
pub(super) fn fcos(a: F80, cw: u16) -> Outcome {
    match angle(a) {
        Angle::Settled(outcome) => outcome,
        Angle::Zero => Outcome::new(F80::ONE, 0),
        Angle::Values(_, c, de) => inexact(c, de, cw),
    }
}

/// Sine and cosine of a.
pub(super) fn fsincos(a: F80, cw: u16) -> Outcome {
    match angle(a) {
        Angle::Settled(outcome) => outcome,
        Angle::Zero => Outcome { value: a, second: F80::ONE, status: 0 },
        Angle::Values(s, c, de) => {
            let (sine, cosine) = (inexact(s, de, cw), inexact(c, de, cw));
            Outcome { value: sine.value, second: cosine.value, status: sine.status | cosine.status }
        }
    }
}

/// The tangent of a, and 1.
pub(super) fn fptan(a: F80, cw: u16) -> Outcome {
    match angle(a) {
        Angle::Settled(outcome) => outcome,
        Angle::Zero => Outcome { value: a, second: F80::ONE, status: 0 },
        Angle::Values(s, c, de) => Outcome { second: F80::ONE, ..inexact(s.div(c), de, cw) },
    }
}
