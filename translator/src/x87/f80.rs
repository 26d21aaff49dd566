//! The 80-bit register format, and its conversions from and to the memory formats (SDM vol. 1 §4.2, §4.8.3, §8.2).

use serde::{Deserialize, Serialize};

use super::round::{DOUBLE, Format, SINGLE, round, round_off, shr_sticky};
use super::{control, status};

/// A double extended-precision number: 64-bit significand with an explicit integer bit, then sign and biased exponent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct F80 {
    /// Significand; bit 63 is the integer bit J.
    pub mantissa: u64,
    /// Sign in bit 15, exponent biased by 16383 below it.
    pub sign_exp: u16,
}

/// What an encoding stands for (SDM vol. 1 tables 4-3 and 8-3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// ±0.
    Zero,
    /// Exponent field 0 and a significand, pseudo-denormals included.
    Denormal,
    /// A normal finite number.
    Normal,
    /// ±∞.
    Infinity,
    /// Quiet NaN.
    Quiet,
    /// Signalling NaN.
    Signalling,
    /// Unnormal, pseudo-NaN or pseudo-infinity: invalid as an operand.
    Unsupported,
}

/// A finite nonzero number with its significand normalized (bit 63 set).
#[derive(Clone, Copy)]
pub(super) struct Unpacked {
    pub neg: bool,
    /// Biased by 16383; below 1 for denormals.
    pub exp: i32,
    pub sig: u64,
}

const BIAS: i32 = 16383;
const QUIET: u64 = 1 << 62;
/// The largest magnitude FBSTP can store.
const BCD_LIMIT: u64 = 1_000_000_000_000_000_000;

impl F80 {
    /// +0.
    pub const ZERO: F80 = F80 { mantissa: 0, sign_exp: 0 };
    /// +1.
    pub const ONE: F80 = F80 { mantissa: 1 << 63, sign_exp: 0x3fff };
    /// −1.
    pub const MINUS_ONE: F80 = F80 { mantissa: 1 << 63, sign_exp: 0xbfff };
    /// The QNaN floating-point indefinite, the masked response to an invalid operation.
    pub const INDEFINITE: F80 = F80 { mantissa: 3 << 62, sign_exp: 0xffff };
    /// +∞.
    pub const INFINITY: F80 = F80 { mantissa: 1 << 63, sign_exp: 0x7fff };

    /// From the ten bytes in memory, as the low 80 bits of a little-endian integer.
    pub fn from_bits(bits: u128) -> F80 {
        F80 { mantissa: bits as u64, sign_exp: (bits >> 64) as u16 }
    }

    /// The ten bytes in memory, as the low 80 bits of a little-endian integer.
    pub fn to_bits(self) -> u128 {
        u128::from(self.mantissa) | u128::from(self.sign_exp) << 64
    }

    /// Whether the sign bit is set.
    pub fn is_negative(self) -> bool {
        self.sign_exp >> 15 != 0
    }

    /// The same number with the sign given.
    pub fn with_sign(self, neg: bool) -> F80 {
        F80 { sign_exp: self.sign_exp & 0x7fff | u16::from(neg) << 15, ..self }
    }

    /// What the encoding stands for.
    #[inline]
    pub fn class(self) -> Class {
        match (self.sign_exp & 0x7fff, self.mantissa >> 63 != 0) {
            (0, _) if self.mantissa == 0 => Class::Zero,
            (0, _) => Class::Denormal,
            (_, false) => Class::Unsupported,
            (0x7fff, _) if self.mantissa << 1 == 0 => Class::Infinity,
            (0x7fff, _) if self.mantissa & QUIET != 0 => Class::Quiet,
            (0x7fff, _) => Class::Signalling,
            _ => Class::Normal,
        }
    }

    /// Whether the class is [`Class::Normal`], told quickly.
    #[inline]
    pub(super) fn is_normal(self) -> bool {
        (self.sign_exp & 0x7fff).wrapping_sub(1) < 0x7ffe && self.mantissa >> 63 != 0
    }

    /// Whether the encoding is a NaN, quiet or signalling.
    pub fn is_nan(self) -> bool {
        matches!(self.class(), Class::Quiet | Class::Signalling)
    }

    /// A NaN made quiet.
    pub(super) fn quieted(self) -> F80 {
        F80 { mantissa: self.mantissa | QUIET, ..self }
    }

    /// Splits a finite nonzero number; anything else gives a meaningless but harmless answer.
    #[inline]
    pub(super) fn unpack(self) -> Unpacked {
        let shift = self.mantissa.leading_zeros() & 63;
        let exp = i32::from(self.sign_exp & 0x7fff).max(1) - shift as i32;
        Unpacked { neg: self.is_negative(), exp, sig: self.mantissa << shift }
    }

    /// An exact conversion from an integer.
    pub fn from_i64(value: i64) -> F80 {
        let magnitude = value.unsigned_abs();
        if magnitude == 0 {
            return F80::ZERO;
        }
        let shift = magnitude.leading_zeros();
        F80 { mantissa: magnitude << shift, sign_exp: (BIAS + 63) as u16 - shift as u16 }.with_sign(value < 0)
    }

    /// Widens a binary32 number, and says whether it was denormal. A signalling NaN stays signalling.
    pub fn from_f32(bits: u32) -> (F80, bool) {
        widen(u64::from(bits), 8, 23, SINGLE)
    }

    /// Widens a binary64 number, and says whether it was denormal. A signalling NaN stays signalling.
    pub fn from_f64(bits: u64) -> (F80, bool) {
        widen(bits, 11, 52, DOUBLE)
    }

    /// Rounds to binary32 under control word `cw`; the bits, and the exception flags with C1.
    pub fn to_f32(self, cw: u16) -> (u32, u16) {
        let (bits, status) = narrow(self, 8, 23, SINGLE, cw);
        (bits as u32, status)
    }

    /// Rounds to binary64 under control word `cw`; the bits, and the exception flags with C1.
    pub fn to_f64(self, cw: u16) -> (u64, u16) {
        narrow(self, 11, 52, DOUBLE, cw)
    }

    /// Rounds to a signed integer of `width` bits (16, 32 or 64) under control word `cw`; what does not fit gives the
    /// integer indefinite and IE.
    pub fn to_int(self, width: u32, cw: u16) -> (i64, u16) {
        let indefinite = (i64::MIN >> (64 - width), status::IE);
        let Some((magnitude, flags)) = self.magnitude(cw) else { return indefinite };
        let limit = 1u64 << (width - 1);
        match self.is_negative() {
            false if magnitude < limit => (magnitude as i64, flags),
            true if magnitude <= limit => ((magnitude as i64).wrapping_neg(), flags),
            _ => indefinite,
        }
    }

    /// Rounds to an integer's magnitude; nothing if it is not a number or needs more than 64 bits.
    fn magnitude(self, cw: u16) -> Option<(u64, u16)> {
        match self.class() {
            Class::Zero => return Some((0, 0)),
            Class::Denormal | Class::Normal => {}
            _ => return None,
        }
        let u = self.unpack();
        let shift = u32::try_from(BIAS + 63 - u.exp).ok()?;
        let (kept, flags) = round_off(u.neg, shr_sticky(u128::from(u.sig) << 64, shift), 64, cw);
        Some((u64::try_from(kept).ok()?, flags))
    }

    /// From packed BCD: eighteen digits in nine bytes, the sign in bit 79 (SDM vol. 1 §4.7).
    pub fn from_bcd(bits: u128) -> F80 {
        let digits = (0..18).rev().fold(0u64, |n, i| n * 10 + (bits >> (4 * i) & 15) as u64);
        F80::from_i64(digits as i64).with_sign(bits >> 79 & 1 != 0)
    }

    /// Rounds to packed BCD under control word `cw`; what does not fit gives the BCD indefinite and IE.
    pub fn to_bcd(self, cw: u16) -> (u128, u16) {
        match self.magnitude(cw) {
            Some((mut n, flags)) if n < BCD_LIMIT => {
                let mut bits = u128::from(self.is_negative()) << 79;
                for i in 0..18 {
                    bits |= u128::from(n % 10) << (4 * i);
                    n /= 10;
                }
                (bits, flags)
            }
            _ => (BCD_INDEFINITE, status::IE),
        }
    }

    /// Rounds to an integer in the register format, as FRNDINT does.
    pub(super) fn rounded_to_int(self, cw: u16) -> (F80, u16) {
        let u = self.unpack();
        let Ok(drop @ 1..) = u32::try_from(BIAS + 63 - u.exp) else { return (self, 0) };
        let (kept, flags) = round_off(u.neg, shr_sticky(u128::from(u.sig) << 64, drop), 64, cw);
        // At most 2^63, whose magnitude survives being read as negative.
        (F80::from_i64(kept as i64).with_sign(u.neg), flags)
    }
}

/// The packed BCD indefinite.
pub(super) const BCD_INDEFINITE: u128 = 0xffff_c000_0000_0000_0000;

fn widen(bits: u64, exp_bits: u32, frac_bits: u32, format: Format) -> (F80, bool) {
    let neg = bits >> (exp_bits + frac_bits) & 1 != 0;
    let special = (1u64 << exp_bits) - 1;
    let exp = bits >> frac_bits & special;
    let frac = (bits & ((1 << frac_bits) - 1)) << (63 - frac_bits);
    let (value, denormal) = match exp {
        0 if frac == 0 => (F80::ZERO, false),
        0 => {
            let shift = frac.leading_zeros();
            (F80 { mantissa: frac << shift, sign_exp: format.min as u16 - shift as u16 }, true)
        }
        e if e == special => (F80 { mantissa: frac | 1 << 63, sign_exp: 0x7fff }, false),
        e => (F80 { mantissa: frac | 1 << 63, sign_exp: (format.min - 1) as u16 + e as u16 }, false),
    };
    (value.with_sign(neg), denormal)
}

fn narrow(value: F80, exp_bits: u32, frac_bits: u32, format: Format, cw: u16) -> (u64, u16) {
    let neg = value.is_negative();
    let special = (1u64 << exp_bits) - 1;
    let encode = |neg: bool, exp: u64, mantissa: u64| {
        u64::from(neg) << (exp_bits + frac_bits) | exp << frac_bits | mantissa << 1 >> (64 - frac_bits)
    };
    match value.class() {
        Class::Zero => (encode(neg, 0, 0), 0),
        Class::Infinity => (encode(neg, special, 0), 0),
        Class::Quiet => (encode(neg, special, value.mantissa), 0),
        Class::Signalling => (encode(neg, special, value.quieted().mantissa), status::IE),
        Class::Unsupported => (encode(true, special, QUIET), status::IE),
        Class::Denormal | Class::Normal => {
            let u = value.unpack();
            let r = round(neg, u.exp, u128::from(u.sig) << 64, format, cw);
            let exp = if r.sig >> 63 == 0 { 0 } else { (r.exp - format.min + 1) as u64 & special };
            (encode(neg, exp, r.sig), r.status)
        }
    }
}

/// A control word like `cw` but rounding toward zero, as FISTTP does.
pub(super) fn truncating(cw: u16) -> u16 {
    cw | control::RC
}
