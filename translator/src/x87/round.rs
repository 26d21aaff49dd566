//! Rounding: from an exact or sticky wide significand to a format's precision and range (SDM vol. 1 §4.8.4, §4.9.1).

use super::{F80, control, status};

/// Precision and exponent range of a destination; exponents carry the 80-bit format's bias of 16383.
#[derive(Clone, Copy)]
pub(super) struct Format {
    /// Significand bits, the leading one included.
    pub precision: u32,
    /// Exponent of the smallest normal number.
    pub min: i32,
    /// Exponent of the largest finite number.
    pub max: i32,
}

/// The register format at full precision, for the instructions that ignore precision control.
pub(super) const EXTENDED: Format = Format { precision: 64, min: 1, max: 0x7ffe };
/// IEEE binary64.
pub(super) const DOUBLE: Format = Format { precision: 53, min: 16383 - 1022, max: 16383 + 1023 };
/// IEEE binary32.
pub(super) const SINGLE: Format = Format { precision: 24, min: 16383 - 126, max: 16383 + 127 };

/// What an unmasked overflow or underflow subtracts from or adds to the exponent (SDM vol. 1 §8.5.4, §8.5.5).
const BIAS_ADJUST: i32 = 0x6000;

impl Format {
    /// The register format at the precision the control word asks for (SDM vol. 1 table 8-2).
    pub fn of(cw: u16) -> Format {
        let precision = match cw & control::PC {
            control::PC_SINGLE => 24,
            control::PC_DOUBLE => 53,
            _ => 64,
        };
        Format { precision, ..EXTENDED }
    }
}

/// A rounded number: `sig` is top-aligned and has its high bit clear only for denormals and zero, whose `exp` is the
/// format's minimum. Infinity is `exp == max + 1` with only the high bit set.
pub(super) struct Rounded {
    pub exp: i32,
    pub sig: u64,
    /// Exception flags and C1 (rounded up).
    pub status: u16,
}

impl Rounded {
    /// The number in the register format.
    pub fn pack(&self, neg: bool) -> F80 {
        let exp = if self.sig >> 63 == 0 { 0 } else { self.exp as u16 & 0x7fff };
        F80 { mantissa: self.sig, sign_exp: exp | u16::from(neg) << 15 }
    }
}

/// Shifts right, keeping in bit 0 whether anything but zeros was shifted out.
#[inline]
pub(super) fn shr_sticky(sig: u128, n: u32) -> u128 {
    match n {
        0 => sig,
        1..=127 => sig >> n | u128::from(sig << (128 - n) != 0),
        _ => u128::from(sig != 0),
    }
}

/// Drops the low `drop` bits (1–127) of `sig`. Returns what remains, shifted down, rounded as RC in `cw` says, and the
/// PE and C1 flags of doing so.
#[inline(always)]
pub(super) fn round_off(neg: bool, sig: u128, drop: u32, cw: u16) -> (u128, u16) {
    let kept = sig >> drop;
    let rest = sig << (128 - drop);
    if rest == 0 {
        return (kept, 0);
    }
    let half = 1 << 127;
    let up = match cw & control::RC {
        control::RC_NEAREST => rest > half || rest == half && kept & 1 != 0,
        control::RC_DOWN => neg,
        control::RC_UP => !neg,
        _ => false,
    };
    if up { (kept + 1, status::PE | status::C1) } else { (kept, status::PE) }
}

/// Rounds `sig` × 2^(`exp` − 16383 − 127), where `sig` has bit 127 set, to `format` under the rounding control and
/// exception masks of `cw`. Tininess is detected after rounding.
#[inline]
pub(super) fn round(neg: bool, exp: i32, sig: u128, format: Format, cw: u16) -> Rounded {
    // A known precision makes the shifts constant, which is most of the time an addition takes.
    match format.precision {
        64 => round_known(neg, exp, sig, Format { precision: 64, ..format }, cw),
        53 => round_known(neg, exp, sig, Format { precision: 53, ..format }, cw),
        _ => round_known(neg, exp, sig, Format { precision: 24, ..format }, cw),
    }
}

#[inline(always)]
fn round_known(neg: bool, exp: i32, sig: u128, format: Format, cw: u16) -> Rounded {
    let drop = 128 - format.precision;
    let (kept, flags) = round_off(neg, sig, drop, cw);
    let carry = kept >> format.precision != 0;
    let top = |kept: u128| (kept << (64 - format.precision)) as u64;
    let (normal, e) = if carry { (1 << 63, exp + 1) } else { (top(kept), exp) };
    if e > format.max {
        let adjusted = e - BIAS_ADJUST;
        let unmasked = cw & status::OE == 0;
        if unmasked && adjusted <= format.max {
            return Rounded { exp: adjusted, sig: normal, status: status::OE | flags };
        }
        let infinite = match cw & control::RC {
            // FSCALE can exceed even the adjusted range.
            _ if unmasked => true,
            control::RC_NEAREST => true,
            control::RC_DOWN => neg,
            control::RC_UP => !neg,
            _ => false,
        };
        return if infinite {
            Rounded { exp: format.max + 1, sig: 1 << 63, status: status::OE | status::PE | status::C1 }
        } else {
            let sig = u64::MAX << (64 - format.precision);
            Rounded { exp: format.max, sig, status: status::OE | status::PE }
        };
    }
    if e >= format.min {
        return Rounded { exp: e, sig: normal, status: flags };
    }
    if cw & status::UE == 0 {
        let adjusted = e + BIAS_ADJUST;
        return if adjusted >= format.min {
            Rounded { exp: adjusted, sig: normal, status: status::UE | flags }
        } else {
            Rounded { exp: format.min, sig: 0, status: status::UE | status::PE }
        };
    }
    let (kept, flags) = round_off(neg, shr_sticky(sig, (format.min - exp) as u32), drop, cw);
    let tiny = if flags & status::PE != 0 { status::UE } else { 0 };
    Rounded { exp: format.min, sig: top(kept), status: flags | tiny }
}
