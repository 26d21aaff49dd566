//! A third evaluator of the semantics, whose values are nothing: it finds what an instruction reads, writes and may
//! fault on, which is what the compiler's liveness needs.

use crate::emit::{Bin, Cmp, Cond, Emit, Flags, FpArgs, FpCall, LaneOp, Un, Word};
use crate::exception::Exception;
use crate::insn::Insn;
use crate::jit::host::Host;
use crate::jit::{Unsupported, vector};
use crate::simd::fp::FpFmt;
use crate::width::Width;

/// A set of registers, one bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Regs {
    /// General-purpose registers.
    pub gpr: u16,
    /// XMM registers: the low 128 bits of vector registers.
    pub x: u16,
    /// Bits 255:128 of vector registers.
    pub y: u16,
}

impl Regs {
    /// Every register.
    pub const ALL: Regs = Regs { gpr: u16::MAX, x: u16::MAX, y: u16::MAX };

    /// The registers in either set.
    pub fn or(self, other: Regs) -> Regs {
        Regs { gpr: self.gpr | other.gpr, x: self.x | other.x, y: self.y | other.y }
    }

    /// The registers of this set that the other does not have.
    pub fn without(self, other: Regs) -> Regs {
        Regs { gpr: self.gpr & !other.gpr, x: self.x & !other.x, y: self.y & !other.y }
    }

    fn gpr(r: u8) -> Regs {
        Regs { gpr: 1 << (r & 15), ..Regs::default() }
    }

    fn x(r: u8) -> Regs {
        Regs { x: 1 << (r & 15), ..Regs::default() }
    }

    fn y(r: u8) -> Regs {
        Regs { y: 1 << (r & 15), ..Regs::default() }
    }
}

/// Parts of the arithmetic flags, as instructions read and write them.
#[allow(missing_docs)]
pub mod flag_part {
    pub const CF: u8 = 1;
    pub const OF: u8 = 2;
    /// ZF, SF, PF and AF.
    pub const RESULT: u8 = 4;
    pub const ALL: u8 = CF | OF | RESULT;
}

/// What a run of instructions does to registers and flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Registers read or partly written before they are written in full.
    pub read: Regs,
    /// Registers that get a new value.
    pub written: Regs,
    /// Registers that compiled code needs a variable for.
    pub used: Regs,
    /// Registers written since the last point where state is written through.
    pub dirty: Regs,
    /// Whether state is written through anywhere.
    pub flushes: bool,
    /// Registers written since the last instruction that only a helper can evaluate: what is dirty where accesses write
    /// nothing through.
    pub dirty_in_loop: Regs,
    /// Whether there is such an instruction.
    pub has_helper: bool,
    /// The flags whose value on entry matters ([`flag_part`]): read, or visible at a possible fault, before they are
    /// overwritten.
    pub flags_needed: u8,
    /// The flags whose value on entry an instruction reads: they matter even if nothing faults.
    pub flags_read: u8,
    /// The flags that are overwritten.
    pub flags_killed: u8,
    /// The host that the instructions are compiled for.
    pub host: Host,
}

impl Usage {
    fn need_flags(&mut self) {
        self.flags_needed |= flag_part::ALL & !self.flags_killed;
    }

    fn read_flags(&mut self, parts: u8) {
        self.flags_needed |= parts & !self.flags_killed;
        self.flags_read |= parts & !self.flags_killed;
    }

    /// State is written through here: a possible fault, or a helper that reads everything.
    pub fn flush(&mut self) {
        self.flushes = true;
        self.need_flags();
        self.dirty = Regs::default();
    }

    /// An instruction that only a helper can evaluate: it works on the CPU state, so that every register is fresh
    /// behind it and none is needed in a variable before.
    pub fn by_helper(&mut self) {
        self.flush();
        self.has_helper = true;
        self.dirty_in_loop = Regs::default();
        self.written = Regs::ALL;
        self.flags_killed = flag_part::ALL;
    }

    /// A point at which compiled code may leave the instruction to the interpreter, if it has a form of it at all.
    fn may_leave(&mut self, compiled: bool) -> Result<(), Unsupported> {
        self.need_flags();
        if compiled { Ok(()) } else { Err(Unsupported) }
    }

    fn note_read(&mut self, r: Regs) {
        self.used = self.used.or(r);
        self.read = self.read.or(r.without(self.written));
    }

    fn note_write(&mut self, r: Regs) {
        self.used = self.used.or(r);
        self.written = self.written.or(r);
        self.dirty = self.dirty.or(r);
        self.dirty_in_loop = self.dirty_in_loop.or(r);
    }
}

impl Emit for Usage {
    type V = ();
    type X = ();
    type Trap = Unsupported;

    fn imm<W: Width>(&mut self, _: u64) {}
    fn bin<W: Width>(&mut self, _: Bin, _: (), _: ()) {}
    fn un<W: Width>(&mut self, _: Un, _: ()) {}
    fn cmp<W: Width>(&mut self, _: Cmp, _: (), _: ()) {}
    fn select<W: Width>(&mut self, _: (), _: (), _: ()) {}
    fn zext<F: Width, T: Width>(&mut self, _: ()) {}
    fn sext<F: Width, T: Width>(&mut self, _: ()) {}
    fn mul_wide<W: Width>(&mut self, _: bool, _: (), _: ()) -> ((), ()) {
        ((), ())
    }
    fn div_wide<W: Width>(&mut self, _: bool, _: (), _: (), _: ()) -> Result<((), ()), Unsupported> {
        self.need_flags();
        Ok(((), ()))
    }
    fn gpr<W: Width>(&mut self, r: u8) {
        self.note_read(Regs::gpr(r));
    }
    fn set_gpr<W: Width>(&mut self, r: u8, _: ()) {
        if W::BITS < 32 {
            self.note_read(Regs::gpr(r));
        }
        self.note_write(Regs::gpr(r));
    }
    fn gpr_high(&mut self, r: u8) {
        self.note_read(Regs::gpr(r & 3));
    }
    fn set_gpr_high(&mut self, r: u8, _: ()) {
        self.note_read(Regs::gpr(r & 3));
        self.note_write(Regs::gpr(r & 3));
    }
    fn word(&mut self, _: Word) {}
    fn set_word(&mut self, _: Word, _: ()) {}
    fn enable_interrupts(&mut self) -> Result<(), Unsupported> {
        self.need_flags();
        Ok(())
    }
    fn fence(&mut self) {}
    fn set_ac(&mut self, _: bool) {}
    fn xmm(&mut self, r: u8) {
        self.note_read(Regs::x(r));
    }
    fn set_xmm(&mut self, r: u8, _: ()) {
        self.note_write(Regs::x(r));
    }
    fn ymm_high(&mut self, r: u8) {
        self.note_read(Regs::y(r));
    }
    fn set_ymm_high(&mut self, r: u8, _: ()) {
        self.note_write(Regs::y(r));
    }
    fn x_imm(&mut self, _: u128) {}
    fn x_low(&mut self, _: ()) {}
    fn x_high(&mut self, _: ()) {}
    fn x_make(&mut self, _: (), _: ()) {}
    fn lane(&mut self, op: LaneOp, _: (), _: (), _: ()) -> Result<(), Unsupported> {
        if vector::has_lane(op) { Ok(()) } else { Err(Unsupported) }
    }
    fn signs(&mut self, _: (), _: u8) {}
    fn fp(&mut self, op: FpCall, _: FpArgs<()>, high: Option<FpArgs<()>>) -> Result<((), Option<()>), Unsupported> {
        self.may_leave(vector::has_fp(op, self.host))?;
        Ok(((), high.map(|_| ())))
    }
    fn fp_comi(&mut self, _: FpFmt, _: bool, _: (), _: ()) -> Result<(), Unsupported> {
        self.may_leave(vector::has_scalar(self.host))?;
        self.flags_killed = flag_part::ALL;
        Ok(())
    }
    fn fp_from_int(&mut self, _: FpFmt, _: bool, _: (), _: ()) -> Result<(), Unsupported> {
        self.may_leave(vector::has_scalar(self.host))
    }
    fn fp_to_int(&mut self, _: FpFmt, _: bool, truncate: bool, _: ()) -> Result<(), Unsupported> {
        self.may_leave(vector::has_to_int(truncate, self.host))
    }
    fn set_flags<W: Width>(&mut self, f: Flags<()>) {
        self.flags_killed |= match f {
            Flags::Inc { .. } | Flags::Dec { .. } => flag_part::OF | flag_part::RESULT,
            Flags::CfOf { .. } => flag_part::CF | flag_part::OF,
            Flags::Cf { .. } => flag_part::CF,
            // Of its part only one flag.
            Flags::Zf { .. } => 0,
            _ => flag_part::ALL,
        };
    }
    fn cond(&mut self, c: Cond) {
        self.read_flags(match c {
            Cond::O | Cond::No => flag_part::OF,
            Cond::B | Cond::Ae => flag_part::CF,
            Cond::E | Cond::Ne | Cond::S | Cond::Ns | Cond::P | Cond::Np => flag_part::RESULT,
            Cond::Be | Cond::A => flag_part::CF | flag_part::RESULT,
            Cond::L | Cond::Ge | Cond::Le | Cond::G => flag_part::OF | flag_part::RESULT,
        });
    }
    fn flags_raw(&mut self) -> ((), (), ()) {
        self.read_flags(flag_part::ALL);
        ((), (), ())
    }
    fn load<W: Width>(&mut self, _: &Insn, _: u8, _: ()) -> Result<(), Unsupported> {
        self.flush();
        Ok(())
    }
    fn store<W: Width>(&mut self, _: &Insn, _: u8, _: (), _: ()) -> Result<(), Unsupported> {
        self.flush();
        Ok(())
    }
    fn load_rmw<W: Width>(&mut self, _: &Insn, _: u8, _: ()) -> Result<(), Unsupported> {
        self.flush();
        Ok(())
    }
    fn check_store<W: Width>(&mut self, _: &Insn, _: ()) -> Result<(), Unsupported> {
        self.flush();
        Ok(())
    }
    fn load_x_low<W: Width>(&mut self, _: &Insn, _: ()) -> Result<(), Unsupported> {
        self.flush();
        Ok(())
    }
    fn load_x(&mut self, _: &Insn, _: (), _: bool) -> Result<(), Unsupported> {
        self.flush();
        Ok(())
    }
    fn store_x(&mut self, _: &Insn, _: (), _: (), _: bool) -> Result<(), Unsupported> {
        self.flush();
        Ok(())
    }
    fn next_ip(&mut self, _: &Insn) {}
    fn check_target(&mut self, _: &Insn, _: ()) -> Result<(), Unsupported> {
        self.need_flags();
        Ok(())
    }
    fn check_relative(&mut self, i: &Insn) -> Result<(), Unsupported> {
        uncut(i)
    }
    fn set_ip(&mut self, _: &Insn, _: ()) {}
    fn jump_rel(&mut self, i: &Insn) -> Result<(), Unsupported> {
        uncut(i)
    }
    fn branch_rel(&mut self, i: &Insn, _: ()) -> Result<(), Unsupported> {
        uncut(i)
    }
    fn fault_if(&mut self, _: (), _: Exception) -> Result<(), Unsupported> {
        self.need_flags();
        Ok(())
    }
    fn unsupported(&mut self) -> Unsupported {
        Unsupported
    }
}

/// A relative branch of 16-bit operand size cuts EIP, which compiled branches, made for offsets in a page, do not.
fn uncut(i: &Insn) -> Result<(), Unsupported> {
    if i.osize == 2 { Err(Unsupported) } else { Ok(()) }
}
