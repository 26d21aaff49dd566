//! IEEE 754 arithmetic of one element in integers, with the choices that x86 makes: which NaN a result takes, tininess
//! after rounding, flush-to-zero, denormals-are-zero, and when a denormal operand is reported
//! (SDM vol. 1 §4.8.3.5, §4.9, §11.5.2).
//!
//! An operation unpacks its operands, computes a result that is exact but for a sticky last bit, and rounds it once.

use super::{DAZ, DE, FTZ, FpEnv, IE, MASKS, OE, PE, UE, ZE};

/// A binary interchange format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Format {
    /// Bits of the fraction.
    pub frac: u32,
    /// Bits of the exponent.
    pub exp: u32,
}

/// binary16.
pub(super) const HALF: Format = Format { frac: 10, exp: 5 };
/// binary32.
pub(super) const SINGLE: Format = Format { frac: 23, exp: 8 };
/// binary64.
pub(super) const DOUBLE: Format = Format { frac: 52, exp: 11 };

impl Format {
    fn bias(self) -> i32 {
        (1 << (self.exp - 1)) - 1
    }
    fn sign(self) -> u64 {
        1 << (self.frac + self.exp)
    }
    fn fraction(self) -> u64 {
        (1 << self.frac) - 1
    }
    fn infinity(self) -> u64 {
        ((1 << self.exp) - 1) << self.frac
    }
    fn quiet(self) -> u64 {
        1 << (self.frac - 1)
    }
    /// The result of an invalid operation: the QNaN "real indefinite".
    fn indefinite(self) -> u64 {
        self.sign() | self.infinity() | self.quiet()
    }
    fn signed(self, neg: bool, magnitude: u64) -> u64 {
        if neg { self.sign() | magnitude } else { magnitude }
    }
    fn is_denormal(self, bits: u64) -> bool {
        bits & self.infinity() == 0 && bits & self.fraction() != 0
    }
}

/// MXCSR's rounding control.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Nearest,
    Down,
    Up,
    Zero,
}

impl Mode {
    /// From the two bits of a rounding control.
    pub(super) fn from_bits(rc: u32) -> Self {
        match rc & 3 {
            0 => Self::Nearest,
            1 => Self::Down,
            2 => Self::Up,
            _ => Self::Zero,
        }
    }
}

impl FpEnv {
    pub(super) fn mode(&self) -> Mode {
        Mode::from_bits(self.mxcsr >> 13)
    }
    fn raise(&mut self, flags: u32) {
        self.mxcsr |= flags;
    }
    fn invalid(&mut self, f: Format) -> u64 {
        self.raise(IE);
        f.indefinite()
    }
    fn underflow_masked(&self) -> bool {
        self.mxcsr & MASKS & (UE << 7) != 0
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Zero,
    Finite,
    Infinity,
    Quiet,
    Signaling,
}

/// An unpacked operand. A finite one is `sig * 2^(exp - 63)` with bit 63 of `sig` set.
#[derive(Clone, Copy, Debug)]
struct Num {
    class: Class,
    neg: bool,
    exp: i32,
    sig: u64,
    denormal: bool,
}

impl Num {
    fn is_nan(self) -> bool {
        matches!(self.class, Class::Quiet | Class::Signaling)
    }
}

fn unpack(env: &FpEnv, f: Format, bits: u64) -> Num {
    let neg = bits & f.sign() != 0;
    let fraction = bits & f.fraction();
    let biased = ((bits & f.infinity()) >> f.frac) as i32;
    let num = |class, exp, sig| Num { class, neg, exp, sig, denormal: false };
    if bits & f.infinity() == f.infinity() {
        let class = match fraction {
            0 => Class::Infinity,
            _ if fraction & f.quiet() != 0 => Class::Quiet,
            _ => Class::Signaling,
        };
        num(class, 0, 0)
    } else if biased != 0 {
        num(Class::Finite, biased - f.bias(), (fraction | (1 << f.frac)) << (63 - f.frac))
    } else if fraction == 0 || (env.mxcsr & DAZ != 0 && f != HALF) {
        num(Class::Zero, 0, 0)
    } else {
        let shift = fraction.leading_zeros();
        let exp = 1 - f.bias() + (63 - f.frac) as i32 - shift as i32;
        Num { denormal: true, ..num(Class::Finite, exp, fraction << shift) }
    }
}

/// `sig / 2^shift`, rounded, and whether that was inexact. Bit 0 of `sig` may be sticky.
fn shift_round(sig: u128, shift: u32, mode: Mode, neg: bool) -> (u128, bool) {
    if shift == 0 {
        return (sig, false);
    }
    let kept = sig.checked_shr(shift).unwrap_or(0);
    let rest = sig ^ kept.checked_shl(shift).unwrap_or(0);
    let up = match mode {
        Mode::Nearest => {
            let half = 1u128.checked_shl(shift - 1).unwrap_or(u128::MAX);
            rest > half || (rest == half && kept & 1 != 0)
        }
        Mode::Down => neg && rest != 0,
        Mode::Up => !neg && rest != 0,
        Mode::Zero => false,
    };
    (kept + u128::from(up), rest != 0)
}

/// `sig >> shift` with the bits shifted out collected in bit 0.
fn shift_sticky(sig: u128, shift: u32) -> u128 {
    let kept = sig.checked_shr(shift).unwrap_or(0);
    kept | u128::from(kept.checked_shl(shift).unwrap_or(0) != sig)
}

/// Rounds `±sig * 2^exp`, `sig` not zero, to the format (SDM vol. 1 §4.9.1.4–4.9.1.6).
fn round_pack(env: &mut FpEnv, f: Format, mode: Mode, neg: bool, exp: i32, sig: u128) -> u64 {
    let shift = sig.leading_zeros();
    let sig = sig << shift;
    let exp = exp - shift as i32 + 127;
    let drop = 127 - f.frac;
    let least = 1 - f.bias();
    let (mut kept, inexact) = shift_round(sig, drop, mode, neg);
    if exp < least {
        // Tiny, unless rounding as if the exponent were unbounded reaches the least normal number.
        let tiny = exp + 1 < least || kept >> (f.frac + 1) == 0;
        if tiny && !env.underflow_masked() {
            // What a handler is told is whether the exponent alone is at fault.
            env.raise(if inexact { UE | PE } else { UE });
            return f.signed(neg, 0);
        }
        let (kept, inexact) = shift_round(sig, drop + (least - exp).min(200) as u32, mode, neg);
        if tiny && f != HALF && env.mxcsr & FTZ != 0 {
            env.raise(UE | PE);
            return f.signed(neg, 0);
        }
        if inexact {
            env.raise(if tiny { UE | PE } else { PE });
        }
        // A carry into the hidden bit makes the exponent field 1, as it should.
        return f.signed(neg, kept as u64);
    }
    let mut exp = exp;
    if kept >> (f.frac + 1) != 0 {
        kept >>= 1;
        exp += 1;
    }
    if exp > f.bias() {
        let masked = env.mxcsr & MASKS & (OE << 7) != 0;
        env.raise(if inexact || masked { OE | PE } else { OE });
        let to_infinity = match mode {
            Mode::Nearest => true,
            Mode::Down => neg,
            Mode::Up => !neg,
            Mode::Zero => false,
        };
        return f.signed(neg, f.infinity() - u64::from(!to_infinity));
    }
    if inexact {
        env.raise(PE);
    }
    f.signed(neg, (((exp + f.bias()) as u64) << f.frac) | (kept as u64 & f.fraction()))
}

/// The result if an operand is a NaN: the first NaN in order, made quiet.
fn nan_result<const N: usize>(env: &mut FpEnv, f: Format, operands: [(Num, u64); N]) -> Option<u64> {
    if operands.iter().any(|(n, _)| n.class == Class::Signaling) {
        env.raise(IE);
    }
    operands.iter().find(|(n, _)| n.is_nan()).map(|(_, bits)| bits | f.quiet())
}

/// The sign of an exact zero sum of numbers with these signs.
fn zero_sum_sign(mode: Mode, x: bool, y: bool) -> bool {
    if x == y { x } else { mode == Mode::Down }
}

/// `±x * 2^ex + ±y * 2^ey`, none zero and with bit 127 clear and bit 126 or 125 of both set.
fn sum(env: &mut FpEnv, f: Format, (xn, ex, x): (bool, i32, u128), (yn, ey, y): (bool, i32, u128)) -> u64 {
    let mode = env.mode();
    let exp = ex.max(ey);
    let x = shift_sticky(x, (exp - ex) as u32);
    let y = shift_sticky(y, (exp - ey) as u32);
    let (neg, sig) = if xn == yn {
        (xn, x + y)
    } else if x >= y {
        (xn, x - y)
    } else {
        (yn, y - x)
    };
    if sig == 0 { f.signed(mode == Mode::Down, 0) } else { round_pack(env, f, mode, neg, exp, sig) }
}

/// `a + b`, or `a - b` if `subtract`.
pub(super) fn add(env: &mut FpEnv, f: Format, a: u64, b: u64, subtract: bool) -> u64 {
    let (x, y) = (unpack(env, f, a), unpack(env, f, b));
    if let Some(nan) = nan_result(env, f, [(x, a), (y, b)]) {
        return nan;
    }
    let yn = y.neg != subtract;
    if x.class == Class::Infinity && y.class == Class::Infinity && x.neg != yn {
        return env.invalid(f);
    }
    if x.denormal || y.denormal {
        env.raise(DE);
    }
    match (x.class, y.class) {
        (Class::Infinity, _) => f.signed(x.neg, f.infinity()),
        (_, Class::Infinity) => f.signed(yn, f.infinity()),
        (Class::Zero, Class::Zero) => f.signed(zero_sum_sign(env.mode(), x.neg, yn), 0),
        (_, Class::Zero) => pack_exact(env, f, x.neg, x),
        (Class::Zero, _) => pack_exact(env, f, yn, y),
        _ => sum(env, f, (x.neg, x.exp - 126, u128::from(x.sig) << 63), (yn, y.exp - 126, u128::from(y.sig) << 63)),
    }
}

/// A finite operand as a result, which flush-to-zero may still change.
fn pack_exact(env: &mut FpEnv, f: Format, neg: bool, x: Num) -> u64 {
    let mode = env.mode();
    round_pack(env, f, mode, neg, x.exp - 63, x.sig.into())
}

/// `a * b`.
pub(super) fn mul(env: &mut FpEnv, f: Format, a: u64, b: u64) -> u64 {
    let (x, y) = (unpack(env, f, a), unpack(env, f, b));
    if let Some(nan) = nan_result(env, f, [(x, a), (y, b)]) {
        return nan;
    }
    let neg = x.neg != y.neg;
    let has = |class| x.class == class || y.class == class;
    if has(Class::Infinity) && has(Class::Zero) {
        return env.invalid(f);
    }
    if x.denormal || y.denormal {
        env.raise(DE);
    }
    if has(Class::Infinity) {
        return f.signed(neg, f.infinity());
    }
    if has(Class::Zero) {
        return f.signed(neg, 0);
    }
    let mode = env.mode();
    round_pack(env, f, mode, neg, x.exp + y.exp - 126, u128::from(x.sig) * u128::from(y.sig))
}

/// `a / b`.
pub(super) fn div(env: &mut FpEnv, f: Format, a: u64, b: u64) -> u64 {
    let (x, y) = (unpack(env, f, a), unpack(env, f, b));
    if let Some(nan) = nan_result(env, f, [(x, a), (y, b)]) {
        return nan;
    }
    let neg = x.neg != y.neg;
    match (x.class, y.class) {
        (Class::Infinity, Class::Infinity) | (Class::Zero, Class::Zero) => return env.invalid(f),
        (Class::Finite, Class::Zero) => {
            env.raise(ZE);
            return f.signed(neg, f.infinity());
        }
        _ => {}
    }
    if x.denormal || y.denormal {
        env.raise(DE);
    }
    match (x.class, y.class) {
        (Class::Infinity, _) => f.signed(neg, f.infinity()),
        (Class::Zero, _) | (_, Class::Infinity) => f.signed(neg, 0),
        _ => {
            let (n, d) = (u128::from(x.sig) << 63, u128::from(y.sig));
            let quotient = ((n / d) << 1) | u128::from(n % d != 0);
            let mode = env.mode();
            round_pack(env, f, mode, neg, x.exp - y.exp - 64, quotient)
        }
    }
}

/// The square root of `a`.
pub(super) fn sqrt(env: &mut FpEnv, f: Format, a: u64) -> u64 {
    let x = unpack(env, f, a);
    if let Some(nan) = nan_result(env, f, [(x, a)]) {
        return nan;
    }
    if x.class == Class::Zero {
        return f.signed(x.neg, 0);
    }
    if x.neg {
        return env.invalid(f);
    }
    if x.class == Class::Infinity {
        return f.infinity();
    }
    if x.denormal {
        env.raise(DE);
    }
    // An even exponent, so that it can be halved: the operand is n * 2^(exp - 126).
    let odd = x.exp & 1;
    let n = u128::from(x.sig) << (63 + odd);
    let root = n.isqrt();
    let mode = env.mode();
    round_pack(env, f, mode, false, (x.exp - odd) / 2 - 64, (root << 1) | u128::from(root * root != n))
}

/// `±(a * b) ± c` with one rounding; the signs of the product and of `c` are changed if so asked.
pub(super) fn fma(env: &mut FpEnv, f: Format, [a, b, c]: [u64; 3], neg_product: bool, neg_c: bool) -> u64 {
    let (x, y, z) = (unpack(env, f, a), unpack(env, f, b), unpack(env, f, c));
    if let Some(nan) = nan_result(env, f, [(x, a), (y, b), (z, c)]) {
        return nan;
    }
    let pn = x.neg ^ y.neg ^ neg_product;
    let zn = z.neg ^ neg_c;
    let has = |class| x.class == class || y.class == class;
    let infinite = has(Class::Infinity);
    if infinite && (has(Class::Zero) || (z.class == Class::Infinity && pn != zn)) {
        return env.invalid(f);
    }
    if x.denormal || y.denormal || z.denormal {
        env.raise(DE);
    }
    if infinite {
        return f.signed(pn, f.infinity());
    }
    if z.class == Class::Infinity {
        return f.signed(zn, f.infinity());
    }
    match (has(Class::Zero), z.class == Class::Zero) {
        (true, true) => f.signed(zero_sum_sign(env.mode(), pn, zn), 0),
        (true, false) => pack_exact(env, f, zn, z),
        (false, z_is_zero) => {
            // The significands have at most 53 bits, so this loses nothing of the product.
            let product = (u128::from(x.sig) * u128::from(y.sig)) >> 1;
            let exp = x.exp + y.exp - 125;
            if z_is_zero {
                let mode = env.mode();
                round_pack(env, f, mode, pn, exp, product)
            } else {
                sum(env, f, (pn, exp, product), (zn, z.exp - 126, u128::from(z.sig) << 63))
            }
        }
    }
}

/// How two operands compare: exactly one of these bits.
pub(super) mod relation {
    pub const LESS: u8 = 1;
    pub const EQUAL: u8 = 2;
    pub const GREATER: u8 = 4;
    pub const UNORDERED: u8 = 8;
}

/// Compares; a quiet NaN is invalid only if `signal`.
pub(super) fn compare(env: &mut FpEnv, f: Format, a: u64, b: u64, signal: bool) -> u8 {
    let (x, y) = (unpack(env, f, a), unpack(env, f, b));
    if x.is_nan() || y.is_nan() {
        if signal || x.class == Class::Signaling || y.class == Class::Signaling {
            env.raise(IE);
        }
        return relation::UNORDERED;
    }
    if x.denormal || y.denormal {
        env.raise(DE);
    }
    // Sign and magnitude as an ordered integer; both zeros are 0.
    let key = |n: Num, bits: u64| {
        let magnitude = if n.class == Class::Zero { 0 } else { (bits & !f.sign()) as i64 };
        if n.neg { -magnitude } else { magnitude }
    };
    match key(x, a).cmp(&key(y, b)) {
        std::cmp::Ordering::Less => relation::LESS,
        std::cmp::Ordering::Equal => relation::EQUAL,
        std::cmp::Ordering::Greater => relation::GREATER,
    }
}

/// `a` if it compares to `b` as `wanted`, else `b`: MIN and MAX.
pub(super) fn select(env: &mut FpEnv, f: Format, a: u64, b: u64, wanted: u8) -> u64 {
    let r = if compare(env, f, a, b, true) == wanted { a } else { b };
    flush_operand(env, f, r)
}

/// An operand as denormals-are-zeros has it.
fn flush_operand(env: &FpEnv, f: Format, bits: u64) -> u64 {
    if env.mxcsr & DAZ != 0 && f.is_denormal(bits) { bits & f.sign() } else { bits }
}

/// `a` to an integral value.
pub(super) fn round_integral(env: &mut FpEnv, f: Format, a: u64, mode: Mode, report_inexact: bool) -> u64 {
    let x = unpack(env, f, a);
    if let Some(nan) = nan_result(env, f, [(x, a)]) {
        return nan;
    }
    if x.class != Class::Finite {
        return flush_operand(env, f, a);
    }
    if x.exp >= f.frac as i32 {
        return a;
    }
    let (integer, inexact) = shift_round(x.sig.into(), (63 - x.exp).min(200) as u32, mode, x.neg);
    if inexact && report_inexact {
        env.raise(PE);
    }
    if integer == 0 { f.signed(x.neg, 0) } else { round_pack(env, f, mode, x.neg, 0, integer) }
}

/// `a` to a signed integer of `bits` bits; what does not fit gives the "integer indefinite", the least one.
pub(super) fn to_int(env: &mut FpEnv, f: Format, a: u64, bits: u32, mode: Mode) -> u64 {
    let x = unpack(env, f, a);
    let indefinite = 1u64 << (bits - 1);
    match x.class {
        Class::Zero => 0,
        Class::Finite if x.exp < bits as i32 => {
            let (magnitude, inexact) = shift_round(x.sig.into(), (63 - x.exp).min(200) as u32, mode, x.neg);
            if magnitude >= u128::from(indefinite) + u128::from(x.neg) {
                env.raise(IE);
                return indefinite;
            }
            if inexact {
                env.raise(PE);
            }
            let value = magnitude as u64;
            (if x.neg { value.wrapping_neg() } else { value }) & (u64::MAX >> (64 - bits))
        }
        _ => {
            env.raise(IE);
            indefinite
        }
    }
}

/// An integer to the format.
pub(super) fn from_int(env: &mut FpEnv, f: Format, value: i64) -> u64 {
    let mode = env.mode();
    if value == 0 { 0 } else { round_pack(env, f, mode, value < 0, 0, value.unsigned_abs().into()) }
}

/// `a` of format `from` to format `to`. Denormal halves are neither zeroed nor reported (SDM vol. 1 §14.4.1).
pub(super) fn convert(env: &mut FpEnv, from: Format, to: Format, a: u64, mode: Mode) -> u64 {
    let x = unpack(env, from, a);
    match x.class {
        Class::Zero => to.signed(x.neg, 0),
        Class::Infinity => to.signed(x.neg, to.infinity()),
        Class::Quiet | Class::Signaling => {
            if x.class == Class::Signaling {
                env.raise(IE);
            }
            let fraction = a & from.fraction();
            let fraction =
                if to.frac > from.frac { fraction << (to.frac - from.frac) } else { fraction >> (from.frac - to.frac) };
            to.signed(x.neg, to.infinity() | to.quiet() | fraction)
        }
        Class::Finite => {
            if x.denormal && from != HALF {
                env.raise(DE);
            }
            round_pack(env, to, mode, x.neg, x.exp - 63, x.sig.into())
        }
    }
}

/// 1/a truncated to 13 bits, an error below 2⁻¹²: within the bound of 1.5·2⁻¹² that RCPPS promises (SDM vol. 2). Raises no flags, takes
/// denormals for zeros and flushes tiny results.
pub(super) fn reciprocal(a: u64) -> u64 {
    let f = SINGLE;
    let x = unpack(&FpEnv::new(DAZ), f, a);
    match x.class {
        Class::Zero => f.signed(x.neg, f.infinity()),
        Class::Infinity => f.signed(x.neg, 0),
        Class::Quiet | Class::Signaling => a | f.quiet(),
        Class::Finite => approximate(x.neg, -x.exp - 64, (1 << 127) / u128::from(x.sig)),
    }
}

/// 1/√a truncated to 13 bits: within the bound of 1.5·2⁻¹² that RSQRTPS promises; otherwise as [`reciprocal`].
pub(super) fn reciprocal_sqrt(a: u64) -> u64 {
    let f = SINGLE;
    let x = unpack(&FpEnv::new(DAZ), f, a);
    match x.class {
        Class::Zero => f.signed(x.neg, f.infinity()),
        Class::Quiet | Class::Signaling => a | f.quiet(),
        _ if x.neg => f.indefinite(),
        Class::Infinity => 0,
        Class::Finite => {
            let odd = x.exp & 1;
            let root = (u128::from(x.sig) << (63 + odd)).isqrt();
            approximate(false, -(x.exp - odd) / 2 - 64, (1 << 127) / root)
        }
    }
}

/// `±sig * 2^exp` with 13 significant bits, or zero below the normal range. An exact power of two stays exact.
fn approximate(neg: bool, exp: i32, sig: u128) -> u64 {
    let shift = sig.leading_zeros();
    let sig = (sig << shift) & !(u128::MAX >> 13);
    let exp = exp - shift as i32;
    if exp + 127 < 1 - SINGLE.bias() {
        return SINGLE.signed(neg, 0);
    }
    round_pack(&mut FpEnv::new(MASKS), SINGLE, Mode::Zero, neg, exp, sig)
}
