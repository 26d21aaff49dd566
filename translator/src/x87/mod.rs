//! The x87 unit: registers, status and every instruction, independent of the CPU around it (SDM vol. 1 chapter 8).
//!
//! [`Op::decode`] names an instruction from its opcode; [`Op::memory`] says what it moves. The caller then
//!
//! 1. raises #NM or #MF if CR0 says so or if [`Op::waits`] and [`X87::pending_exception`] do;
//! 2. for [`Memory::Read`], reads the operand and calls [`X87::load`]; for [`Memory::Write`], calls [`X87::store`],
//!    writes what it returns, and then calls [`X87::commit`]; for [`Memory::None`], calls [`X87::execute`]; the
//!    environment and state images have methods of their own;
//! 3. unless [`Op::is_control`], records the pointers with [`X87::set_last`] and [`X87::set_last_operand`].
//!
//! Nothing here faults: an unmasked exception is left pending for the next waiting instruction.
//!
//! What computes is an [`Engine`]. [`Soft`] is exact everywhere for operations of IEEE kind; on x86-64 hosts the
//! transcendentals are the host's own, elsewhere they are [`Soft`]'s, which may differ from silicon in the last bit.

pub mod ambient;
mod engine;
mod env;
mod f80;
#[cfg(target_arch = "x86_64")]
mod host;
mod insn;
mod op;
mod round;
#[cfg(all(test, target_arch = "x86_64"))]
mod silicon;
mod soft;
#[cfg(test)]
mod tests;
mod transcendental;
mod wide;

use serde::{Deserialize, Serialize};

pub use engine::{Engine, Operation, Outcome};
pub use env::{Layout, StateImage};
pub use f80::{Class, F80};
#[cfg(target_arch = "x86_64")]
pub use host::Host;
pub use insn::Store;
pub use op::{Arith, Constant, Format, Memory, Op};
pub use soft::Soft;

/// What computes the transcendentals on this host. (Miri is none: it executes no assembly.)
#[cfg(all(target_arch = "x86_64", not(miri)))]
type Native = Host;
/// What computes the transcendentals on this host.
#[cfg(any(not(target_arch = "x86_64"), miri))]
type Native = Soft;

/// Bits of the status word (SDM vol. 1 §8.1.3).
#[allow(missing_docs)]
pub mod status {
    pub const IE: u16 = 1 << 0;
    pub const DE: u16 = 1 << 1;
    pub const ZE: u16 = 1 << 2;
    pub const OE: u16 = 1 << 3;
    pub const UE: u16 = 1 << 4;
    pub const PE: u16 = 1 << 5;
    /// Stack fault.
    pub const SF: u16 = 1 << 6;
    /// Error summary: an unmasked exception is pending.
    pub const ES: u16 = 1 << 7;
    pub const C0: u16 = 1 << 8;
    pub const C1: u16 = 1 << 9;
    pub const C2: u16 = 1 << 10;
    pub const TOP: u16 = 7 << 11;
    pub const C3: u16 = 1 << 14;
    /// Busy: a copy of ES.
    pub const B: u16 = 1 << 15;
    /// The six exceptions, each at the place of its mask in the control word.
    pub const EXCEPTIONS: u16 = IE | DE | ZE | OE | UE | PE;
    /// The condition codes.
    pub const CODES: u16 = C0 | C1 | C2 | C3;
    /// What an operation reports.
    pub const RESULT: u16 = EXCEPTIONS | CODES;
    /// Exceptions found before the operation: unmasked, they keep it from being done.
    pub const BEFORE: u16 = IE | DE | ZE;
}

/// Fields of the control word (SDM vol. 1 §8.1.5); the exception masks stand where [`status`] has the exceptions.
#[allow(missing_docs)]
pub mod control {
    pub const PC: u16 = 3 << 8;
    pub const PC_SINGLE: u16 = 0 << 8;
    pub const PC_DOUBLE: u16 = 2 << 8;
    pub const RC: u16 = 3 << 10;
    pub const RC_NEAREST: u16 = 0 << 10;
    pub const RC_DOWN: u16 = 1 << 10;
    pub const RC_UP: u16 = 2 << 10;
    /// Bits that software can change; bit 6 always reads as one, the rest as zero.
    pub const WRITABLE: u16 = 0x1f3f;
    pub const ALWAYS_ONE: u16 = 0x40;
    /// After FNINIT: everything masked, extended precision, round to nearest.
    pub const INITIAL: u16 = 0x37f;
}

/// The x87 registers. MMX registers alias the significands of the physical registers.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct X87 {
    /// Physical registers R0–R7; ST(i) is R((TOP + i) mod 8).
    pub st: [F80; 8],
    /// Control word.
    pub fcw: u16,
    /// Status word, TOP included.
    pub fsw: u16,
    /// Abridged tags as FXSAVE has them: bit i is set when physical register i is not empty.
    pub ftw: u8,
    /// Opcode of the last non-control instruction: low three bits of the first byte, then ModR/M.
    pub fop: u16,
    /// Selector of the last non-control instruction.
    pub fcs: u16,
    /// Selector of its memory operand.
    pub fds: u16,
    /// Offset of the last non-control instruction.
    pub fip: u64,
    /// Offset of its memory operand.
    pub fdp: u64,
}

impl Default for X87 {
    fn default() -> X87 {
        X87::initialized()
    }
}

impl X87 {
    /// The state after RESET (SDM vol. 3 table 9-1): registers zero and marked valid, everything masked, and the
    /// precision control at single.
    pub fn reset() -> X87 {
        X87 { fcw: control::ALWAYS_ONE, ftw: 0xff, ..X87::initialized() }
    }

    /// The state after FNINIT on zeroed registers, which is also the initial configuration of XSAVE.
    pub fn initialized() -> X87 {
        X87 { st: [F80::ZERO; 8], fcw: control::INITIAL, fsw: 0, ftw: 0, fop: 0, fcs: 0, fds: 0, fip: 0, fdp: 0 }
    }

    /// FNINIT: everything but the contents of the registers.
    pub fn init(&mut self) {
        *self = X87 { st: self.st, ..X87::initialized() };
    }

    /// Whether an unmasked exception is pending: the next waiting instruction raises #MF.
    #[inline]
    pub fn pending_exception(&self) -> bool {
        self.fsw & status::ES != 0
    }

    /// FNCLEX: clears the exceptions, SF, ES and B.
    pub fn clear_exceptions(&mut self) {
        self.fsw &= !(status::EXCEPTIONS | status::SF | status::ES | status::B);
    }

    /// FLDCW. An exception that is flagged and no longer masked becomes pending.
    pub fn set_control(&mut self, fcw: u16) {
        self.fcw = fcw & control::WRITABLE | control::ALWAYS_ONE;
        self.fsw = summarized(self.fsw, self.fcw);
    }

    /// Loads the status word from an image; ES and B follow from exceptions and masks.
    fn set_status(&mut self, fsw: u16) {
        self.fsw = summarized(fsw, self.fcw);
    }

    /// TOP: the physical register that is ST(0).
    #[inline]
    pub fn top(&self) -> u8 {
        (self.fsw >> 11 & 7) as u8
    }

    fn set_top(&mut self, top: u8) {
        self.fsw = self.fsw & !status::TOP | u16::from(top & 7) << 11;
    }

    /// The physical register that is ST(i).
    #[inline]
    fn physical(&self, i: u8) -> usize {
        usize::from(self.top().wrapping_add(i) & 7)
    }

    /// The contents of ST(i), empty or not.
    #[inline]
    pub fn st(&self, i: u8) -> F80 {
        self.st[self.physical(i)]
    }

    /// Whether ST(i) is tagged empty.
    #[inline]
    pub fn is_empty(&self, i: u8) -> bool {
        self.ftw >> self.physical(i) & 1 == 0
    }

    /// Writes ST(i) and tags it valid.
    #[inline]
    fn set_st(&mut self, i: u8, value: F80) {
        let r = self.physical(i);
        self.st[r] = value;
        self.ftw |= 1 << r;
    }

    #[inline]
    fn free(&mut self, i: u8) {
        self.ftw &= !(1 << self.physical(i));
    }

    #[inline]
    fn pop(&mut self) {
        self.free(0);
        self.set_top(self.top() + 1);
    }

    #[inline]
    fn push(&mut self, value: F80) {
        self.set_top(self.top().wrapping_sub(1));
        self.set_st(0, value);
    }

    /// MMX register `i`.
    #[inline]
    pub fn mmx(&self, i: u8) -> u64 {
        self.st[usize::from(i & 7)].mantissa
    }

    /// Writes MMX register `i`: the exponent becomes all ones (SDM vol. 1 §9.5.1). The tags and TOP are
    /// [`X87::enter_mmx`]'s, which this calls.
    #[inline]
    pub fn set_mmx(&mut self, i: u8, value: u64) {
        self.enter_mmx();
        self.st[usize::from(i & 7)] = F80 { mantissa: value, sign_exp: 0xffff };
    }

    /// What every MMX instruction but EMMS does, those that only read included: all tags valid, TOP zero.
    #[inline]
    pub fn enter_mmx(&mut self) {
        self.ftw = 0xff;
        self.set_top(0);
    }

    /// EMMS: all registers empty.
    pub fn emms(&mut self) {
        self.ftw = 0;
        self.set_top(0);
    }

    /// Records the last non-control instruction: opcode as [`Op::decode`] takes it, offset, CS selector.
    #[inline]
    pub fn set_last(&mut self, fop: u16, fip: u64, fcs: u16) {
        (self.fop, self.fip, self.fcs) = (fop & 0x7ff, fip, fcs);
    }

    /// Records its memory operand: offset and selector.
    #[inline]
    pub fn set_last_operand(&mut self, fdp: u64, fds: u16) {
        (self.fdp, self.fds) = (fdp, fds);
    }
}

/// A status word with ES and B as its exceptions and the masks of `fcw` make them.
#[inline]
fn summarized(fsw: u16, fcw: u16) -> u16 {
    let pending = fsw & !fcw & status::EXCEPTIONS != 0;
    fsw & !(status::ES | status::B) | if pending { status::ES | status::B } else { 0 }
}
