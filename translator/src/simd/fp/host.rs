//! Floating point on the host's own unit: each function executes the guest's instruction under the ambient MXCSR.
//!
//! This is the one place of the vector code that asks what the host is. Every function gives `None` where this host
//! has no such instruction.

use super::{Comi, CvtOp, FmaKind, FpFmt, FpOp};

/// A floating-point unit that may know an instruction. The default is one that knows none.
pub(super) trait FpUnit {
    /// Sets the thread's control and flags; all exceptions must be masked.
    fn load(_mxcsr: u32) {}
    /// Whether the unit has the controls that MXCSR says.
    fn takes(_mxcsr: u32) -> bool {
        true
    }
    /// The sticky flags collected since [`FpUnit::load`].
    fn flags() -> u32 {
        0
    }
    /// See [`super::fp`].
    fn arith(_op: FpOp, _fmt: FpFmt, _a: u128, _b: u128) -> Option<u128> {
        None
    }
    /// See [`super::compare`].
    fn compare(_fmt: FpFmt, _a: u128, _b: u128, _predicate: u8) -> Option<u128> {
        None
    }
    /// See [`super::comi`].
    fn comi(_fmt: FpFmt, _quiet: bool, _a: u128, _b: u128) -> Option<Comi> {
        None
    }
    /// See [`super::round`].
    fn round(_fmt: FpFmt, _a: u128, _b: u128, _imm: u8) -> Option<u128> {
        None
    }
    /// See [`super::dot`].
    fn dot(_fmt: FpFmt, _a: u128, _b: u128, _imm: u8) -> Option<u128> {
        None
    }
    /// See [`super::fma`].
    fn fma(_kind: FmaKind, _fmt: FpFmt, _dst: u128, _a: u128, _b: u128, _c: u128) -> Option<u128> {
        None
    }
    /// See [`super::convert`].
    fn convert(_op: CvtOp, _a: u128, _b: u128) -> Option<u128> {
        None
    }
    /// See [`super::from_int`].
    fn from_int(_fmt: FpFmt, _wide: bool, _a: u128, _value: u64) -> Option<u128> {
        None
    }
    /// See [`super::to_int`].
    fn to_int(_fmt: FpFmt, _wide: bool, _truncate: bool, _b: u128) -> Option<u64> {
        None
    }
    /// See [`super::to_half`].
    fn to_half(_b: u128, _imm: u8) -> Option<u128> {
        None
    }
}

/// The unit of this host.
pub(super) struct Host;

// Miri is no such host: it executes no assembly.
#[cfg(any(not(any(target_arch = "x86_64", target_arch = "aarch64")), miri))]
impl FpUnit for Host {}

#[cfg(all(target_arch = "aarch64", not(miri)))]
mod aarch64 {
    use std::arch::asm;

    use super::super::{DAZ, FTZ, PE, RC};
    use super::*;

    /// FPSR's cumulative inexact flag.
    const IXC: u64 = 1 << 4;

    /// Only the ambient controls and flags: what executes instructions under them is compiled code
    /// (`jit/guard.rs`), and only where no other flag than that of an inexact result can be raised.
    impl FpUnit for Host {
        fn takes(mxcsr: u32) -> bool {
            // Its one control for both flushes more than either. And rounded to another than the nearest an overflow looks
            // like a number.
            mxcsr & (FTZ | DAZ | RC) == 0
        }

        fn load(_mxcsr: u32) {
            // SAFETY: the default controls are those that the guest asks for; of the flags nobody else takes notice.
            unsafe { asm!("msr fpsr, xzr", options(nomem, nostack)) };
        }

        fn flags() -> u32 {
            let fpsr: u64;
            // SAFETY: reads a register.
            unsafe { asm!("mrs {}, fpsr", out(reg) fpsr, options(nomem, nostack)) };
            if fpsr & IXC != 0 { PE } else { 0 }
        }
    }
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::__m128i;
    use std::mem::transmute;

    use super::super::FLAGS;
    use super::*;

    fn to_x(x: u128) -> __m128i {
        // SAFETY: both types are 16 bytes without invalid values.
        unsafe { transmute(x) }
    }

    fn from_x(x: __m128i) -> u128 {
        // SAFETY: both types are 16 bytes without invalid values.
        unsafe { transmute(x) }
    }

    /// One instruction on two vectors: `{0}` is the destination and first source, `{1}` the second.
    macro_rules! vec2 {
        ([$($template:expr),+], $a:expr, $b:expr) => {
            vec2!([$($template),+], $a, $b, {})
        };
        ([$($template:expr),+], $a:expr, $b:expr, {$($name:ident = $value:expr)?}) => {{
            let mut r = to_x($a);
            // SAFETY: the instruction touches only its registers and MXCSR's flags; the caller has made sure that the
            // processor has it.
            unsafe {
                asm!(concat!($($template),+), inout(xmm_reg) r, in(xmm_reg) to_x($b), $($name = const $value,)?
                    options(nomem, nostack));
            }
            from_x(r)
        }};
    }

    /// The instruction `stem` + format; the formats left out do not exist.
    macro_rules! by_format {
        ($fmt:expr, $stem:literal, [$($variant:ident $suffix:literal)+], $operands:literal, $a:expr, $b:expr, $imm:tt) => {
            match $fmt {
                $(FpFmt::$variant => Some(vec2!([$stem, $suffix, $operands], $a, $b, $imm)),)+
                #[allow(unreachable_patterns)]
                _ => None,
            }
        };
        ($fmt:expr, $stem:literal, $formats:tt, $a:expr, $b:expr) => {
            by_format!($fmt, $stem, $formats, " {0}, {1}", $a, $b, {})
        };
        ($fmt:expr, $stem:literal, $a:expr, $b:expr) => {
            by_format!($fmt, $stem, [Ps "ps" Pd "pd" Ss "ss" Sd "sd"], $a, $b)
        };
        ($fmt:expr, $stem:literal, $operands:literal, $a:expr, $b:expr, $imm:tt) => {
            by_format!($fmt, $stem, [Ps "ps" Pd "pd" Ss "ss" Sd "sd"], $operands, $a, $b, $imm)
        };
    }

    /// Calls `f::<N>` for the value of an immediate among those listed, as instructions need it at compile time.
    macro_rules! by_immediate {
        ($imm:expr, $f:ident $args:tt, $($n:literal)+) => {
            match $imm {
                $($n => $f::<$n>$args,)+
                _ => None,
            }
        };
    }

    fn compare<const P: u8>(fmt: FpFmt, a: u128, b: u128) -> Option<u128> {
        if P < 8 {
            return by_format!(fmt, "cmp", " {0}, {1}, {p}", a, b, { p = P });
        }
        if !is_x86_feature_detected!("avx") {
            return None;
        }
        by_format!(fmt, "vcmp", " {0}, {0}, {1}, {p}", a, b, { p = P })
    }

    fn round<const I: u8>(fmt: FpFmt, a: u128, b: u128) -> Option<u128> {
        by_format!(fmt, "round", " {0}, {1}, {i}", a, b, { i = I })
    }

    fn to_half<const I: u8>(b: u128) -> Option<u128> {
        Some(vec2!(["vcvtps2ph {0}, {1}, {i}"], 0, b, { i = I }))
    }

    macro_rules! compare_flags {
        ($template:literal, $a:expr, $b:expr) => {{
            let (zf, pf, cf): (u8, u8, u8);
            // SAFETY: the instructions touch only registers and flags.
            unsafe {
                asm!($template, "setz {2}", "setp {3}", "setc {4}", in(xmm_reg) to_x($a), in(xmm_reg) to_x($b),
                    out(reg_byte) zf, out(reg_byte) pf, out(reg_byte) cf, options(nomem, nostack));
            }
            Comi { zf: zf != 0, pf: pf != 0, cf: cf != 0 }
        }};
    }

    macro_rules! int_to_float {
        ($template:literal, $a:expr, $value:expr) => {{
            let mut r = to_x($a);
            // SAFETY: the instruction touches only its registers and MXCSR's flags.
            unsafe { asm!($template, inout(xmm_reg) r, in(reg) $value, options(nomem, nostack)) };
            from_x(r)
        }};
    }

    macro_rules! float_to_int {
        ($template:literal, $b:expr) => {{
            let r: u64;
            // SAFETY: the instruction touches only its registers and MXCSR's flags.
            unsafe { asm!($template, out(reg) r, in(xmm_reg) to_x($b), options(nomem, nostack)) };
            r
        }};
    }

    /// `b * a + c` in form 213, whose second operand comes first in the order of NaNs.
    macro_rules! fused {
        ($stem:literal, [$($variant:ident $suffix:literal)+], $fmt:expr, $a:expr, $b:expr, $c:expr) => {
            match $fmt {
                $(FpFmt::$variant => {
                    let mut r = to_x($b);
                    // SAFETY: the instruction touches only its registers and MXCSR's flags; the caller has made sure
                    // that the processor has it.
                    unsafe {
                        asm!(concat!("vf", $stem, "213", $suffix, " {0}, {1}, {2}"), inout(xmm_reg) r,
                            in(xmm_reg) to_x($a), in(xmm_reg) to_x($c), options(nomem, nostack));
                    }
                    Some(from_x(r))
                })+
                #[allow(unreachable_patterns)]
                _ => None,
            }
        };
        ($stem:literal, $fmt:expr, $a:expr, $b:expr, $c:expr) => {
            fused!($stem, [Ps "ps" Pd "pd" Ss "ss" Sd "sd"], $fmt, $a, $b, $c)
        };
    }

    impl FpUnit for Host {
        fn load(mxcsr: u32) {
            // SAFETY: reads the variable. Reserved bits are clear and exceptions masked, so nothing can trap; that
            // the rounding mode may be another than Rust's is the contract of the `fp` module.
            unsafe { asm!("ldmxcsr [{}]", in(reg) &(mxcsr & 0xffff), options(nostack, readonly)) };
        }

        fn flags() -> u32 {
            let mut mxcsr = 0u32;
            // SAFETY: writes the variable.
            unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut mxcsr, options(nostack, preserves_flags)) };
            mxcsr & FLAGS
        }

        fn arith(op: FpOp, fmt: FpFmt, a: u128, b: u128) -> Option<u128> {
            if matches!(op, FpOp::AddSub | FpOp::HAdd | FpOp::HSub) && !is_x86_feature_detected!("sse3") {
                return None;
            }
            match op {
                FpOp::Add => by_format!(fmt, "add", a, b),
                FpOp::Sub => by_format!(fmt, "sub", a, b),
                FpOp::Mul => by_format!(fmt, "mul", a, b),
                FpOp::Div => by_format!(fmt, "div", a, b),
                FpOp::Min => by_format!(fmt, "min", a, b),
                FpOp::Max => by_format!(fmt, "max", a, b),
                FpOp::Sqrt => by_format!(fmt, "sqrt", a, b),
                FpOp::AddSub => by_format!(fmt, "addsub", [Ps "ps" Pd "pd"], a, b),
                FpOp::HAdd => by_format!(fmt, "hadd", [Ps "ps" Pd "pd"], a, b),
                FpOp::HSub => by_format!(fmt, "hsub", [Ps "ps" Pd "pd"], a, b),
                FpOp::Rcp => by_format!(fmt, "rcp", [Ps "ps" Ss "ss"], a, b),
                FpOp::Rsqrt => by_format!(fmt, "rsqrt", [Ps "ps" Ss "ss"], a, b),
            }
        }

        fn compare(fmt: FpFmt, a: u128, b: u128, predicate: u8) -> Option<u128> {
            by_immediate!(predicate, compare(fmt, a, b), 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23
                24 25 26 27 28 29 30 31)
        }

        fn comi(fmt: FpFmt, quiet: bool, a: u128, b: u128) -> Option<Comi> {
            Some(match (fmt.is_double(), quiet) {
                (false, false) => compare_flags!("comiss {0}, {1}", a, b),
                (false, true) => compare_flags!("ucomiss {0}, {1}", a, b),
                (true, false) => compare_flags!("comisd {0}, {1}", a, b),
                (true, true) => compare_flags!("ucomisd {0}, {1}", a, b),
            })
        }

        fn round(fmt: FpFmt, a: u128, b: u128, imm: u8) -> Option<u128> {
            if !is_x86_feature_detected!("sse4.1") {
                return None;
            }
            by_immediate!(imm & 15, round(fmt, a, b), 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
        }

        fn dot(fmt: FpFmt, a: u128, b: u128, imm: u8) -> Option<u128> {
            if !is_x86_feature_detected!("sse4.1") {
                return None;
            }
            // Elements left out count as +0.0 and raise nothing: so do zeroed operands, and one immediate serves all.
            let bits = if fmt.is_double() { 64 } else { 32 };
            let element = u128::MAX >> (128 - bits);
            let mask = |selected: u8| {
                (0..128 / bits).filter(|i| selected & (1 << i) != 0).fold(0, |m, i| m | (element << (bits * i)))
            };
            let (a, b) = (a & mask(imm >> 4), b & mask(imm >> 4));
            let sum = if fmt.is_double() {
                vec2!(["dppd {0}, {1}, 0xff"], a, b)
            } else {
                vec2!(["dpps {0}, {1}, 0xff"], a, b)
            };
            Some(sum & mask(imm))
        }

        fn fma(kind: FmaKind, fmt: FpFmt, dst: u128, a: u128, b: u128, c: u128) -> Option<u128> {
            if !is_x86_feature_detected!("fma") {
                return None;
            }
            let r = match kind {
                FmaKind::Add => fused!("madd", fmt, a, b, c),
                FmaKind::Sub => fused!("msub", fmt, a, b, c),
                FmaKind::NegAdd => fused!("nmadd", fmt, a, b, c),
                FmaKind::NegSub => fused!("nmsub", fmt, a, b, c),
                FmaKind::AddSub => fused!("maddsub", [Ps "ps" Pd "pd"], fmt, a, b, c),
                FmaKind::SubAdd => fused!("msubadd", [Ps "ps" Pd "pd"], fmt, a, b, c),
            }?;
            Some(match fmt {
                FpFmt::Ps | FpFmt::Pd => r,
                FpFmt::Ss => vec2!(["movss {0}, {1}"], dst, r),
                FpFmt::Sd => vec2!(["movsd {0}, {1}"], dst, r),
            })
        }

        fn convert(op: CvtOp, a: u128, b: u128) -> Option<u128> {
            Some(match op {
                CvtOp::Cvtdq2ps => vec2!(["cvtdq2ps {0}, {1}"], a, b),
                CvtOp::Cvtps2dq => vec2!(["cvtps2dq {0}, {1}"], a, b),
                CvtOp::Cvttps2dq => vec2!(["cvttps2dq {0}, {1}"], a, b),
                CvtOp::Cvtdq2pd => vec2!(["cvtdq2pd {0}, {1}"], a, b),
                CvtOp::Cvtpd2dq => vec2!(["cvtpd2dq {0}, {1}"], a, b),
                CvtOp::Cvttpd2dq => vec2!(["cvttpd2dq {0}, {1}"], a, b),
                CvtOp::Cvtps2pd => vec2!(["cvtps2pd {0}, {1}"], a, b),
                CvtOp::Cvtpd2ps => vec2!(["cvtpd2ps {0}, {1}"], a, b),
                CvtOp::Cvtss2sd => vec2!(["cvtss2sd {0}, {1}"], a, b),
                CvtOp::Cvtsd2ss => vec2!(["cvtsd2ss {0}, {1}"], a, b),
                CvtOp::Cvtph2ps if is_x86_feature_detected!("f16c") => vec2!(["vcvtph2ps {0}, {1}"], a, b),
                CvtOp::Cvtph2ps => return None,
            })
        }

        fn from_int(fmt: FpFmt, wide: bool, a: u128, value: u64) -> Option<u128> {
            Some(match (fmt.is_double(), wide) {
                (false, false) => int_to_float!("cvtsi2ss {0}, {1:e}", a, value),
                (false, true) => int_to_float!("cvtsi2ss {0}, {1:r}", a, value),
                (true, false) => int_to_float!("cvtsi2sd {0}, {1:e}", a, value),
                (true, true) => int_to_float!("cvtsi2sd {0}, {1:r}", a, value),
            })
        }

        fn to_int(fmt: FpFmt, wide: bool, truncate: bool, b: u128) -> Option<u64> {
            Some(match (fmt.is_double(), wide, truncate) {
                (false, false, false) => float_to_int!("cvtss2si {0:e}, {1}", b),
                (false, false, true) => float_to_int!("cvttss2si {0:e}, {1}", b),
                (false, true, false) => float_to_int!("cvtss2si {0:r}, {1}", b),
                (false, true, true) => float_to_int!("cvttss2si {0:r}, {1}", b),
                (true, false, false) => float_to_int!("cvtsd2si {0:e}, {1}", b),
                (true, false, true) => float_to_int!("cvttsd2si {0:e}, {1}", b),
                (true, true, false) => float_to_int!("cvtsd2si {0:r}, {1}", b),
                (true, true, true) => float_to_int!("cvttsd2si {0:r}, {1}", b),
            })
        }

        fn to_half(b: u128, imm: u8) -> Option<u128> {
            if !is_x86_feature_detected!("f16c") {
                return None;
            }
            by_immediate!(imm & 7, to_half(b), 0 1 2 3 4 5 6 7)
        }
    }
}
