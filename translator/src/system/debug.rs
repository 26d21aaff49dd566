//! Debug registers and breakpoints (SDM vol. 3 chapter 17).

use crate::addr::PAGE_MASK;
use crate::cpu::Cpu;
use crate::exception::{Exception, Trap, vector};
use crate::insn::{Insn, Mode, Opnd};
use crate::state::{cr, seg};
use crate::system::control::{set_wide_gpr, wide_gpr};

/// DR7.GD: accesses to debug registers raise #DB.
const DR7_GD: u64 = 1 << 13;
/// DR6.BD: the exception came from DR7.GD.
const DR6_BD: u64 = 1 << 13;

/// What a breakpoint watches: the R/W field of DR7.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Watch {
    Execute,
    Write,
    Io,
    ReadWrite,
}

/// The enabled breakpoints as (number, address, length, condition).
fn enabled(dr: &[u64; 8]) -> impl Iterator<Item = (u32, u64, u64, Watch)> + '_ {
    (0..4u32).filter(move |n| dr[7] >> (2 * n) & 3 != 0).map(move |n| {
        let field = dr[7] >> (16 + 4 * n);
        let watch = [Watch::Execute, Watch::Write, Watch::Io, Watch::ReadWrite][(field & 3) as usize];
        let len = [1, 2, 8, 4][(field >> 2 & 3) as usize];
        (n, dr[n as usize] & !(len - 1), len, watch)
    })
}

fn register(cpu: &mut Cpu, n: u8) -> Result<usize, Trap> {
    let n = match n {
        // DR4 and DR5 alias DR6 and DR7 unless debug extensions are on.
        4 | 5 if cpu.s.cr4 & cr::CR4_DE != 0 => return Err(cpu.ud()),
        4 | 5 => n + 2,
        0..=7 => n,
        _ => return Err(cpu.ud()),
    };
    cpu.require_cpl0()?;
    if cpu.s.dr[7] & DR7_GD != 0 {
        return Err(cpu.raise(Exception { vector: vector::DB, error: None, payload: DR6_BD }));
    }
    Ok(usize::from(n))
}

/// MOV from DRn.
pub fn mov_from_dr(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let (Opnd::Gpr(r), Opnd::Dr(n)) = (i.op[0], i.op[1]) else { return Err(cpu.ud()) };
    let n = register(cpu, n)?;
    let v = cpu.s.dr[n];
    set_wide_gpr(cpu, r, v);
    Ok(())
}

/// MOV to DRn.
pub fn mov_to_dr(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let (Opnd::Dr(n), Opnd::Gpr(r)) = (i.op[0], i.op[1]) else { return Err(cpu.ud()) };
    let n = register(cpu, n)?;
    let v = wide_gpr(cpu, r);
    if n >= 6 && v >> 32 != 0 {
        return Err(cpu.gp(0));
    }
    cpu.s.dr[n] = match n {
        6 => v & 0xe00f | 0xffff_0ff0,
        7 => v & 0xffff_23ff | 0x400,
        _ => v,
    };
    cpu.watch_changed();
    // Pages with watchpoints take the slow path; entries made before must not.
    cpu.flush_tlb_all();
    cpu.mode_changed();
    Ok(())
}

impl Cpu {
    /// To be called after DR0–DR3 or DR7 have changed. (TLB flushes are the caller's.)
    pub fn watch_changed(&mut self) {
        self.watch = enabled(&self.s.dr).any(|(_, _, _, w)| matches!(w, Watch::Write | Watch::ReadWrite));
    }

    /// The DR6 bits of the instruction breakpoints at CS:RIP.
    pub fn execute_breakpoint(&self) -> Option<u64> {
        let base = if self.mode.has(Mode::CODE64) { 0 } else { self.s.seg[usize::from(seg::CS)].base };
        let linear = self.wrap_linear(base.wrapping_add(self.s.rip));
        self.hits(linear, 1, |w| w == Watch::Execute)
    }

    /// Notes the data breakpoints that an access meets; they are reported as a trap after the instruction.
    #[cold]
    pub fn check_watch(&mut self, linear: u64, len: u64, write: bool) {
        let wanted = |w| w == Watch::ReadWrite || (w == Watch::Write && write);
        self.note_hits(linear, len, wanted);
    }

    /// Notes the I/O breakpoints that a port access meets (with CR4.DE).
    pub fn check_io_watch(&mut self, port: u16, len: u8) {
        if self.s.cr4 & cr::CR4_DE != 0 {
            self.note_hits(u64::from(port), u64::from(len), |w| w == Watch::Io);
        }
    }

    fn note_hits(&mut self, at: u64, len: u64, wanted: impl Fn(Watch) -> bool) {
        if let Some(bits) = self.hits(at, len, wanted) {
            self.pending_debug |= bits;
            self.stop_block = true;
        }
    }

    fn hits(&self, at: u64, len: u64, wanted: impl Fn(Watch) -> bool) -> Option<u64> {
        let end = at.wrapping_add(len - 1);
        let bits = enabled(&self.s.dr)
            .filter(|&(_, address, size, w)| wanted(w) && at <= address.wrapping_add(size - 1) && address <= end)
            .fold(0, |bits, (n, ..)| bits | 1 << n);
        (bits != 0).then_some(bits)
    }

    /// Whether a page holds a data breakpoint.
    pub fn is_watched_page(&self, linear: u64) -> bool {
        let page = linear & !PAGE_MASK;
        self.watch
            && enabled(&self.s.dr)
                .any(|(_, address, _, w)| matches!(w, Watch::Write | Watch::ReadWrite) && address & !PAGE_MASK == page)
    }
}
