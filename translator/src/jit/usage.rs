//! A third evaluator of the semantics, whose values are nothing: it finds what an instruction reads, writes and may
//! fault on, which is what the compiler's liveness needs.

use crate::emit::{Bin, Cmp, Cond, Emit, Flags, Un};
use crate::insn::Insn;
use crate::jit::Unsupported;
use crate::width::Width;

/// What a run of instructions does to registers and flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// General-purpose registers read or partly written.
    pub gpr_read: u16,
    /// General-purpose registers written.
    pub gpr_written: u16,
    /// XMM registers (low 128 bits) read.
    pub x_read: u16,
    /// XMM registers written.
    pub x_written: u16,
    /// Upper YMM halves read.
    pub y_read: u16,
    /// Upper YMM halves written.
    pub y_written: u16,
    /// Registers written since the last point where state is written through.
    pub gpr_dirty: u16,
    /// XMM registers written since then.
    pub x_dirty: u16,
    /// Upper YMM halves written since then.
    pub y_dirty: u16,
    /// Whether state is written through anywhere.
    pub flushes: bool,
    /// Whether the flags on entry matter: read, or visible at a possible fault, before all are overwritten.
    pub flags_needed: bool,
    /// Whether all arithmetic flags are overwritten.
    pub flags_killed: bool,
}

impl Usage {
    fn need_flags(&mut self) {
        self.flags_needed |= !self.flags_killed;
    }

    /// State is written through here: a possible fault, or a helper that reads everything.
    pub fn flush(&mut self) {
        self.flushes = true;
        self.need_flags();
        (self.gpr_dirty, self.x_dirty, self.y_dirty) = (0, 0, 0);
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
        self.gpr_read |= 1 << (r & 15);
    }
    fn set_gpr<W: Width>(&mut self, r: u8, _: ()) {
        let bit = 1 << (r & 15);
        if W::BITS < 32 {
            self.gpr_read |= bit;
        }
        self.gpr_written |= bit;
        self.gpr_dirty |= bit;
    }
    fn gpr_high(&mut self, r: u8) {
        self.gpr_read |= 1 << (r & 3);
    }
    fn set_gpr_high(&mut self, r: u8, _: ()) {
        let bit = 1 << (r & 3);
        self.gpr_read |= bit;
        self.gpr_written |= bit;
        self.gpr_dirty |= bit;
    }
    fn seg_base(&mut self, _: u8) {}
    fn xmm(&mut self, r: u8) {
        self.x_read |= 1 << (r & 15);
    }
    fn set_xmm(&mut self, r: u8, _: ()) {
        self.x_written |= 1 << (r & 15);
        self.x_dirty |= 1 << (r & 15);
    }
    fn ymm_high(&mut self, r: u8) {
        self.y_read |= 1 << (r & 15);
    }
    fn set_ymm_high(&mut self, r: u8, _: ()) {
        self.y_written |= 1 << (r & 15);
        self.y_dirty |= 1 << (r & 15);
    }
    fn x_imm(&mut self, _: u128) {}
    fn x_low(&mut self, _: ()) {}
    fn x_high(&mut self, _: ()) {}
    fn x_make(&mut self, _: (), _: ()) {}
    fn set_flags<W: Width>(&mut self, f: Flags<()>) {
        match f {
            Flags::Inc { .. } | Flags::Dec { .. } | Flags::CfOf { .. } | Flags::Cf { .. } | Flags::Zf { .. } => {
                self.need_flags();
            }
            _ => self.flags_killed = true,
        }
    }
    fn cond(&mut self, _: Cond) {
        self.need_flags();
    }
    fn flags_raw(&mut self) -> ((), (), ()) {
        self.need_flags();
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
    fn check_relative(&mut self, _: &Insn) -> Result<(), Unsupported> {
        Ok(())
    }
    fn set_ip(&mut self, _: &Insn, _: ()) {}
    fn jump_rel(&mut self, _: &Insn) -> Result<(), Unsupported> {
        Ok(())
    }
    fn branch_rel(&mut self, _: &Insn, _: ()) -> Result<(), Unsupported> {
        Ok(())
    }
    fn trap_if(&mut self, _: (), _: u8) -> Result<(), Unsupported> {
        self.need_flags();
        Ok(())
    }
    fn unsupported(&mut self) -> Unsupported {
        Unsupported
    }
}
