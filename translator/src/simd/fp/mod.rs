//! SSE/AVX floating point (SDM vol. 1 chapters 10–14 and appendix E), bit-exact in results and in MXCSR flags.
//!
//! There are two implementations. `host` executes the very instruction, on a processor that has it; its rounding,
//! flush-to-zero and denormals-are-zero modes are the *ambient* ones of the host's own MXCSR, where the sticky flags
//! accumulate as well. `soft` computes with integers, controlled by [`FpEnv::mxcsr`] and raising flags there. It
//! serves hosts of other architectures, instructions that the processor lacks, and guests that unmask an exception.
//!
//! **Contract**: code that calls the functions of this module runs between [`FpEnv::load`] and [`FpEnv::unload`]. In
//! between, compiled guest code may execute host floating point directly, and no host code may rely on the default
//! floating-point environment.

mod float;
mod host;
mod soft;
#[cfg(test)]
mod tests;

use super::lanes::op_enum;
use host::{FpUnit, Host};

/// MXCSR: invalid operation.
pub const IE: u32 = 1 << 0;
/// MXCSR: denormal operand.
pub const DE: u32 = 1 << 1;
/// MXCSR: division by zero.
pub const ZE: u32 = 1 << 2;
/// MXCSR: overflow.
pub const OE: u32 = 1 << 3;
/// MXCSR: underflow.
pub const UE: u32 = 1 << 4;
/// MXCSR: precision.
pub const PE: u32 = 1 << 5;
/// MXCSR: all the sticky flags.
pub const FLAGS: u32 = 0x3f;
/// MXCSR: denormals are zeros.
pub const DAZ: u32 = 1 << 6;
/// MXCSR: all the exception masks, each 7 above its flag.
pub const MASKS: u32 = 0x3f << 7;
/// MXCSR: rounding control.
pub const RC: u32 = 3 << 13;
/// MXCSR: flush to zero.
pub const FTZ: u32 = 1 << 15;
/// MXCSR after reset: all exceptions masked, rounding to nearest.
pub const MXCSR_RESET: u32 = MASKS;

/// Operand formats: packed or scalar, single or double. Scalar operations keep the upper part of `a`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FpFmt {
    /// Four singles.
    Ps,
    /// Two doubles.
    Pd,
    /// The single in bits 31:0.
    Ss,
    /// The double in bits 63:0.
    Sd,
}

impl FpFmt {
    /// Whether the elements are doubles.
    pub fn is_double(self) -> bool {
        matches!(self, Self::Pd | Self::Sd)
    }
}

op_enum! {
    /// Arithmetic. Operations of one operand read `b`.
    FpOp {
        Add, Sub, Mul, Div, Min, Max,
        /// One operand.
        Sqrt,
        /// Packed only.
        AddSub,
        /// Packed only.
        HAdd,
        /// Packed only.
        HSub,
        /// One operand, singles only; approximate.
        Rcp,
        /// One operand, singles only; approximate.
        Rsqrt,
    }
}

op_enum! {
    /// Conversions between vector formats, named as the instruction. They read `b`; results narrower than 128 bits
    /// have zeros above, but the scalar ones keep the upper part of `a`.
    CvtOp {
        Cvtdq2ps, Cvtps2dq, Cvttps2dq,
        /// From the low half of `b`, as all that widen; a 256-bit form makes its upper lane from `b >> 64`.
        Cvtdq2pd,
        Cvtpd2dq, Cvttpd2dq, Cvtps2pd, Cvtpd2ps, Cvtss2sd, Cvtsd2ss,
        /// VCVTPH2PS.
        Cvtph2ps,
    }
}

/// The fused operations on `a * b` and `c`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FmaKind {
    /// FMADD: `a * b + c`.
    Add,
    /// FMSUB: `a * b - c`.
    Sub,
    /// FNMADD: `-(a * b) + c`.
    NegAdd,
    /// FNMSUB: `-(a * b) - c`.
    NegSub,
    /// FMADDSUB: odd lanes add, even lanes subtract.
    AddSub,
    /// FMSUBADD: odd lanes subtract, even lanes add.
    SubAdd,
}

/// What (U)COMISS and (U)COMISD give; OF, SF and AF become 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Comi {
    /// Equal or unordered.
    pub zf: bool,
    /// Unordered.
    pub pf: bool,
    /// Less or unordered.
    pub cf: bool,
}

/// The guest's MXCSR while floating-point instructions are evaluated.
///
/// On an x86-64 host flags are raised here only by the software implementation; [`FpEnv::sync`] adds those that the
/// processor has collected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FpEnv {
    /// Control and flags, in the layout of MXCSR.
    pub mxcsr: u32,
    /// Flags of completed steps of an instruction that has several.
    settled: u32,
}

impl FpEnv {
    /// An environment for a guest's MXCSR.
    pub fn new(mxcsr: u32) -> Self {
        Self { mxcsr, settled: 0 }
    }

    /// Makes the guest's controls and flags those of this host thread, with every exception masked.
    pub fn load(&self) {
        Host::load(self.mxcsr | MASKS);
    }

    /// Whether [`FpEnv::load`] makes the host's unit do what the guest has asked for.
    pub fn loadable(&self) -> bool {
        self.all_masked() && Host::takes(self.mxcsr)
    }

    /// Adds the flags that the host has collected. After it `mxcsr` is what STMXCSR stores.
    pub fn sync(&mut self) {
        self.mxcsr |= Host::flags();
    }

    /// [`FpEnv::sync`], then gives the thread the default environment that Rust code expects.
    pub fn unload(&mut self) {
        self.sync();
        Host::load(MXCSR_RESET);
    }

    /// Whether the guest masks every exception, as nearly all do: then nothing can raise #XM.
    pub fn all_masked(&self) -> bool {
        self.mxcsr & MASKS == MASKS
    }

    /// Evaluates an instruction under unmasked exceptions: `None` says that it raises #XM (or #UD if
    /// CR4.OSXMMEXCPT = 0) and has no result. Flags are recorded either way (SDM vol. 1 §11.5.3: an unmasked
    /// exception found before the computation keeps those of the computation from being detected).
    pub fn trapping<T>(&mut self, f: impl FnOnce(&mut Self) -> T) -> Option<T> {
        let mut env = Self::new(self.mxcsr & !FLAGS);
        let result = f(&mut env);
        let mut raised = env.mxcsr & FLAGS;
        let unmasked = FLAGS & !(self.mxcsr >> 7);
        if raised & unmasked & (IE | DE | ZE) != 0 {
            raised &= IE | DE | ZE | env.settled;
        }
        self.mxcsr |= raised;
        (raised & unmasked == 0).then_some(result)
    }

    /// Ends one of several steps: whether an unmasked exception was raised in it, inside [`FpEnv::trapping`].
    fn step_trapped(&mut self) -> bool {
        let raised = self.mxcsr & FLAGS;
        if raised & !(self.mxcsr >> 7) != 0 {
            return true;
        }
        self.settled = raised;
        false
    }

    /// The host's own instruction where it does the same, else software: the host cannot be asked for the exact
    /// behaviour of unmasked exceptions.
    #[inline(always)]
    fn either<T>(&mut self, host: impl FnOnce() -> Option<T>, soft: impl FnOnce(&mut Self) -> T) -> T {
        match if self.all_masked() { host() } else { None } {
            Some(result) => result,
            None => soft(self),
        }
    }
}

/// ADDPS and its kin.
pub fn fp(env: &mut FpEnv, op: FpOp, fmt: FpFmt, a: u128, b: u128) -> u128 {
    // The approximations raise nothing, and shall not depend on what is masked.
    if let (FpOp::Rcp | FpOp::Rsqrt, Some(r)) = (op, Host::arith(op, fmt, a, b)) {
        return r;
    }
    env.either(|| Host::arith(op, fmt, a, b), |env| soft::arith(env, op, fmt, a, b))
}

/// CMPPS and its kin: all ones in the lanes where predicate `predicate & 31` holds (SDM vol. 2, CMPPD, table 3-1). The
/// legacy forms have three bits of predicate.
pub fn compare(env: &mut FpEnv, fmt: FpFmt, a: u128, b: u128, predicate: u8) -> u128 {
    env.either(|| Host::compare(fmt, a, b, predicate & 31), |env| soft::compare(env, fmt, a, b, predicate & 31))
}

/// COMISS and COMISD, or UCOMISS and UCOMISD if `quiet`: of the low element.
pub fn comi(env: &mut FpEnv, fmt: FpFmt, quiet: bool, a: u128, b: u128) -> Comi {
    env.either(|| Host::comi(fmt, quiet, a, b), |env| soft::comi(env, fmt, quiet, a, b))
}

/// ROUNDPS and its kin: `b` to integral values as `imm` says; scalar forms keep the upper part of `a`.
pub fn round(env: &mut FpEnv, fmt: FpFmt, a: u128, b: u128, imm: u8) -> u128 {
    env.either(|| Host::round(fmt, a, b, imm), |env| soft::round(env, fmt, a, b, imm))
}

/// DPPS and DPPD of each lane.
pub fn dot<const N: usize>(env: &mut FpEnv, fmt: FpFmt, a: [u128; N], b: [u128; N], imm: u8) -> [u128; N] {
    let host = || {
        let mut r = [0; N];
        for ((r, a), b) in r.iter_mut().zip(a).zip(b) {
            *r = Host::dot(fmt, a, b, imm)?;
        }
        Some(r)
    };
    env.either(host, |env| soft::dot(env, fmt, a, b, imm))
}

/// The fused multiply-add family. `dst` gives the upper part of a scalar result.
///
/// `a`, `b`, `c` are the operands in the order that decides which NaN is kept. In SDM's numbering, where operand 1 is the
/// destination: form 132 is (1, 3, 2), form 213 is (2, 1, 3), form 231 is (2, 3, 1).
pub fn fma(env: &mut FpEnv, kind: FmaKind, fmt: FpFmt, dst: u128, a: u128, b: u128, c: u128) -> u128 {
    env.either(|| Host::fma(kind, fmt, dst, a, b, c), |env| soft::fma(env, kind, fmt, dst, a, b, c))
}

/// The conversions between vector formats.
pub fn convert(env: &mut FpEnv, op: CvtOp, a: u128, b: u128) -> u128 {
    env.either(|| Host::convert(op, a, b), |env| soft::convert(env, op, a, b))
}

/// CVTSI2SS and CVTSI2SD from 32 bits, or 64 if `wide`; the upper part is that of `a`.
pub fn from_int(env: &mut FpEnv, fmt: FpFmt, wide: bool, a: u128, value: u64) -> u128 {
    env.either(|| Host::from_int(fmt, wide, a, value), |env| soft::from_int(env, fmt, wide, a, value))
}

/// CVTSS2SI and CVTSD2SI (with `truncate` the CVTT forms) to 32 bits zero-extended, or 64 if `wide`.
pub fn to_int(env: &mut FpEnv, fmt: FpFmt, wide: bool, truncate: bool, b: u128) -> u64 {
    env.either(|| Host::to_int(fmt, wide, truncate, b), |env| soft::to_int(env, fmt, wide, truncate, b))
}

/// VCVTPS2PH of one lane: four halves in the low 64 bits, zeros above.
pub fn to_half(env: &mut FpEnv, b: u128, imm: u8) -> u128 {
    env.either(|| Host::to_half(b, imm), |env| soft::to_half(env, b, imm))
}
