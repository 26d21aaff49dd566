//! The vector instructions in software: the lanes of [`super::float`]'s operations.

use super::float::{self, DOUBLE, Format, HALF, Mode, SINGLE, relation};
use super::{Comi, CvtOp, FmaKind, FpEnv, FpFmt, FpOp};

impl FpFmt {
    fn element(self) -> Format {
        match self {
            Self::Ps | Self::Ss => SINGLE,
            Self::Pd | Self::Sd => DOUBLE,
        }
    }
    /// Bits of an element.
    fn bits(self) -> u32 {
        match self {
            Self::Ps | Self::Ss => 32,
            Self::Pd | Self::Sd => 64,
        }
    }
    /// How many elements are operated on.
    fn count(self) -> u32 {
        match self {
            Self::Ps => 4,
            Self::Pd => 2,
            Self::Ss | Self::Sd => 1,
        }
    }
}

/// Element `i` of `bits` bits.
fn get(x: u128, bits: u32, i: u32) -> u64 {
    (x >> (bits * i)) as u64 & (u64::MAX >> (64 - bits))
}

/// `x` with element `i` replaced.
fn put(x: u128, bits: u32, i: u32, value: u64) -> u128 {
    let mask = u128::from(u64::MAX >> (64 - bits)) << (bits * i);
    (x & !mask) | ((u128::from(value) << (bits * i)) & mask)
}

/// `upper` with the elements that `fmt` operates on replaced by `f` of their number.
fn each(fmt: FpFmt, upper: u128, mut f: impl FnMut(u32) -> u64) -> u128 {
    (0..fmt.count()).fold(upper, |r, i| put(r, fmt.bits(), i, f(i)))
}

pub(super) fn arith(env: &mut FpEnv, op: FpOp, fmt: FpFmt, a: u128, b: u128) -> u128 {
    let f = fmt.element();
    let at = |x: u128, i: u32| get(x, fmt.bits(), i);
    if let FpOp::HAdd | FpOp::HSub = op {
        let half = fmt.count() / 2;
        return each(fmt, a, |i| {
            let (x, pair) = if i < half { (a, 2 * i) } else { (b, 2 * (i - half)) };
            float::add(env, f, at(x, pair), at(x, pair + 1), op == FpOp::HSub)
        });
    }
    each(fmt, a, |i| {
        let (x, y) = (at(a, i), at(b, i));
        match op {
            FpOp::Sub => float::add(env, f, x, y, true),
            FpOp::Mul => float::mul(env, f, x, y),
            FpOp::Div => float::div(env, f, x, y),
            FpOp::Min => float::select(env, f, x, y, relation::LESS),
            FpOp::Max => float::select(env, f, x, y, relation::GREATER),
            FpOp::Sqrt => float::sqrt(env, f, y),
            FpOp::AddSub => float::add(env, f, x, y, i % 2 == 0),
            FpOp::Rcp => float::reciprocal(y),
            FpOp::Rsqrt => float::reciprocal_sqrt(y),
            FpOp::Add | FpOp::HAdd | FpOp::HSub => float::add(env, f, x, y, false),
        }
    })
}

/// The relations under which each of the first sixteen predicates holds; the others are the same with the opposite
/// treatment of quiet NaNs (SDM vol. 2, CMPPD, table 3-1).
const PREDICATES: [u8; 16] = {
    use relation::{EQUAL, GREATER, LESS, UNORDERED};
    [
        EQUAL,
        LESS,
        LESS | EQUAL,
        UNORDERED,
        LESS | GREATER | UNORDERED,
        EQUAL | GREATER | UNORDERED,
        GREATER | UNORDERED,
        LESS | EQUAL | GREATER,
        EQUAL | UNORDERED,
        LESS | UNORDERED,
        LESS | EQUAL | UNORDERED,
        0,
        LESS | GREATER,
        EQUAL | GREATER,
        GREATER,
        LESS | EQUAL | GREATER | UNORDERED,
    ]
};

pub(super) fn compare(env: &mut FpEnv, fmt: FpFmt, a: u128, b: u128, predicate: u8) -> u128 {
    let holds = PREDICATES[usize::from(predicate & 15)];
    let signal = matches!(predicate & 3, 1 | 2) != (predicate & 16 != 0);
    each(fmt, a, |i| {
        let (x, y) = (get(a, fmt.bits(), i), get(b, fmt.bits(), i));
        if float::compare(env, fmt.element(), x, y, signal) & holds != 0 { u64::MAX } else { 0 }
    })
}

pub(super) fn comi(env: &mut FpEnv, fmt: FpFmt, quiet: bool, a: u128, b: u128) -> Comi {
    let r = float::compare(env, fmt.element(), get(a, fmt.bits(), 0), get(b, fmt.bits(), 0), !quiet);
    let is = |relations| r & relations != 0;
    Comi {
        zf: is(relation::EQUAL | relation::UNORDERED),
        pf: is(relation::UNORDERED),
        cf: is(relation::LESS | relation::UNORDERED),
    }
}

pub(super) fn round(env: &mut FpEnv, fmt: FpFmt, a: u128, b: u128, imm: u8) -> u128 {
    let mode = mode_of(env, imm);
    each(fmt, a, |i| float::round_integral(env, fmt.element(), get(b, fmt.bits(), i), mode, imm & 8 == 0))
}

/// The rounding mode of an immediate: bits 1:0, or MXCSR's if bit 2 is set.
fn mode_of(env: &FpEnv, imm: u8) -> Mode {
    if imm & 4 != 0 { env.mode() } else { Mode::from_bits(imm.into()) }
}

pub(super) fn dot<const N: usize>(env: &mut FpEnv, fmt: FpFmt, a: [u128; N], b: [u128; N], imm: u8) -> [u128; N] {
    let (f, n) = (fmt.element(), fmt.count());
    let mut products = [[0; 4]; N];
    for (lane, products) in products.iter_mut().enumerate() {
        for (i, product) in (0..n).zip(products).filter(|&(i, _)| imm & (16 << i) != 0) {
            *product = float::mul(env, f, get(a[lane], fmt.bits(), i), get(b[lane], fmt.bits(), i));
        }
    }
    // Each step is complete, in all elements, before the next begins: an unmasked exception keeps that from happening.
    if env.step_trapped() {
        return [0; N];
    }
    let mut sums = products.map(|p| float::add(env, f, p[0], p[1], false));
    if n == 4 {
        let upper = products.map(|p| float::add(env, f, p[2], p[3], false));
        if env.step_trapped() {
            return [0; N];
        }
        for (sum, upper) in sums.iter_mut().zip(upper) {
            *sum = float::add(env, f, *sum, upper, false);
        }
    }
    sums.map(|sum| each(fmt, 0, |i| if imm & (1 << i) != 0 { sum } else { 0 }))
}

pub(super) fn fma(env: &mut FpEnv, kind: FmaKind, fmt: FpFmt, dst: u128, a: u128, b: u128, c: u128) -> u128 {
    each(fmt, dst, |i| {
        let (neg_product, neg_c) = match kind {
            FmaKind::Add => (false, false),
            FmaKind::Sub => (false, true),
            FmaKind::NegAdd => (true, false),
            FmaKind::NegSub => (true, true),
            FmaKind::AddSub => (false, i % 2 == 0),
            FmaKind::SubAdd => (false, i % 2 != 0),
        };
        float::fma(env, fmt.element(), [a, b, c].map(|x| get(x, fmt.bits(), i)), neg_product, neg_c)
    })
}

pub(super) fn convert(env: &mut FpEnv, op: CvtOp, a: u128, b: u128) -> u128 {
    let mode = env.mode();
    // Elements of `from` bits of `b` to elements of `to` bits.
    let map = |n: u32, from: u32, to: u32, f: &mut dyn FnMut(u64) -> u64| {
        (0..n).fold(0, |r, i| put(r, to, i, f(get(b, from, i))))
    };
    match op {
        CvtOp::Cvtdq2ps => map(4, 32, 32, &mut |x| float::from_int(env, SINGLE, (x as i32).into())),
        CvtOp::Cvtdq2pd => map(2, 32, 64, &mut |x| float::from_int(env, DOUBLE, (x as i32).into())),
        CvtOp::Cvtps2dq => map(4, 32, 32, &mut |x| float::to_int(env, SINGLE, x, 32, mode)),
        CvtOp::Cvttps2dq => map(4, 32, 32, &mut |x| float::to_int(env, SINGLE, x, 32, Mode::Zero)),
        CvtOp::Cvtpd2dq => map(2, 64, 32, &mut |x| float::to_int(env, DOUBLE, x, 32, mode)),
        CvtOp::Cvttpd2dq => map(2, 64, 32, &mut |x| float::to_int(env, DOUBLE, x, 32, Mode::Zero)),
        CvtOp::Cvtps2pd => map(2, 32, 64, &mut |x| float::convert(env, SINGLE, DOUBLE, x, mode)),
        CvtOp::Cvtpd2ps => map(2, 64, 32, &mut |x| float::convert(env, DOUBLE, SINGLE, x, mode)),
        CvtOp::Cvtss2sd => put(a, 64, 0, float::convert(env, SINGLE, DOUBLE, get(b, 32, 0), mode)),
        CvtOp::Cvtsd2ss => put(a, 32, 0, float::convert(env, DOUBLE, SINGLE, get(b, 64, 0), mode)),
        CvtOp::Cvtph2ps => map(4, 16, 32, &mut |x| float::convert(env, HALF, SINGLE, x, mode)),
    }
}

pub(super) fn from_int(env: &mut FpEnv, fmt: FpFmt, wide: bool, a: u128, value: u64) -> u128 {
    let value = if wide { value as i64 } else { (value as i32).into() };
    put(a, fmt.bits(), 0, float::from_int(env, fmt.element(), value))
}

pub(super) fn to_int(env: &mut FpEnv, fmt: FpFmt, wide: bool, truncate: bool, b: u128) -> u64 {
    let mode = if truncate { Mode::Zero } else { env.mode() };
    float::to_int(env, fmt.element(), get(b, fmt.bits(), 0), if wide { 64 } else { 32 }, mode)
}

pub(super) fn to_half(env: &mut FpEnv, b: u128, imm: u8) -> u128 {
    let mode = mode_of(env, imm);
    (0..4).fold(0, |r, i| put(r, 16, i, float::convert(env, SINGLE, HALF, get(b, 32, i), mode)))
}
