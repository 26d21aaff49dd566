//! String instructions (SDM vol. 1 §5.1.8, vol. 2 REP): MOVS, CMPS, SCAS, LODS, STOS.
//!
//! Registers are updated element by element, so that a fault or an interrupt leaves them where the instruction can be
//! restarted. Forward MOVS and STOS move by as much as both pages hold at once.

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::Cpu;
use crate::emit::{Emit, Flags};
use crate::exception::Trap;
use crate::insn::{Insn, Rep};
use crate::semantics::{Form, Sem, interp};
use crate::state::{flag, gpr, seg};
use crate::width::{W8, W16, W32, W64, Width};

/// The group's semantics.
pub fn lookup(form: &Form<'_>) -> Option<&'static Sem> {
    use Mnemonic::*;
    let i = form.instr;
    macro_rules! sized_string {
        ($f:ident) => {
            match form.bytes {
                1 => interp!($f::<W8>),
                2 => interp!($f::<W16>),
                4 => interp!($f::<W32>),
                _ => interp!($f::<W64>),
            }
        };
    }
    Some(match i.mnemonic() {
        Movsb | Movsw | Movsq => sized_string!(movs),
        Movsd if is_string(i) => sized_string!(movs),
        Stosb | Stosw | Stosd | Stosq => sized_string!(stos),
        Lodsb | Lodsw | Lodsd | Lodsq => sized_string!(lods),
        Scasb | Scasw | Scasd | Scasq => sized_string!(scas),
        Cmpsb | Cmpsw | Cmpsq => sized_string!(cmps),
        Cmpsd if is_string(i) => sized_string!(cmps),
        _ => return None,
    })
}

/// MOVSD and CMPSD are also the names of SSE2 instructions.
fn is_string(i: &Instruction) -> bool {
    i.is_string_instruction()
}

/// Elements done before interrupts are looked at.
const BATCH: u64 = 4096;

/// The value of an index or count register at the address size.
pub(super) fn index(cpu: &mut Cpu, i: &Insn, r: u8) -> u64 {
    let v = cpu.gpr::<W64>(r);
    cpu.cut_address(i, v)
}

/// Writes an index or count register at the address size.
pub(super) fn set_index(cpu: &mut Cpu, i: &Insn, r: u8, v: u64) {
    match i.addr_bytes {
        8 => cpu.set_gpr::<W64>(r, v),
        4 => cpu.set_gpr::<W32>(r, v),
        _ => cpu.set_gpr::<W16>(r, v),
    }
}

/// Moves an index register by `bytes` in the direction that DF says.
pub(super) fn advance(cpu: &mut Cpu, i: &Insn, r: u8, bytes: u64) {
    let at = index(cpu, i, r);
    let next = if cpu.s.rflags & flag::DF == 0 { at.wrapping_add(bytes) } else { at.wrapping_sub(bytes) };
    set_index(cpu, i, r, next);
}

/// Runs a string instruction: `elements(cpu, most)` does at least one and at most `most` elements and says how many,
/// and whether the repetition goes on.
fn repeat(
    cpu: &mut Cpu,
    i: &Insn,
    mut elements: impl FnMut(&mut Cpu, u64) -> Result<(u64, bool), Trap>,
) -> Result<(), Trap> {
    if i.rep == Rep::None {
        return elements(cpu, 1).map(|_| ());
    }
    let mut budget = BATCH;
    // A single step is one iteration (SDM vol. 3 §17.3.1.4).
    let single_step = cpu.s.rflags & flag::TF != 0;
    loop {
        let count = index(cpu, i, gpr::RCX);
        if count == 0 {
            return Ok(());
        }
        let (done, more) = elements(cpu, if single_step { 1 } else { count })?;
        let left = count - done;
        set_index(cpu, i, gpr::RCX, left);
        if left == 0 || !more {
            return Ok(());
        }
        budget = budget.saturating_sub(done.min(64));
        if cpu.stop_block || cpu.kick.pending() != 0 || single_step || budget == 0 {
            // The instruction goes on when it is reached again. Until it has ended, events push RF=1 and instruction
            // breakpoints do not stop it anew (SDM vol. 3 §17.3.1.1).
            cpu.s.rflags |= flag::RF;
            cpu.stop_block = true;
            cpu.again = true;
            cpu.s.rip = cpu.cut_ip(cpu.ip_base.wrapping_add(u64::from(i.off)));
            return Ok(());
        }
    }
}

/// Elements that may be done at once at `at`: inside the page, the segment's limit, and the address size.
fn run_length<W: Width>(cpu: &Cpu, i: &Insn, at: u64, room: u64, most: u64) -> u64 {
    let wrap = match i.addr_bytes {
        8 => u64::MAX,
        4 => (1 << 32) - at,
        _ => (1 << 16) - at,
    };
    // Backwards one by one, and that only if it is inside, too.
    let most = if cpu.s.rflags & flag::DF != 0 { 1 } else { most };
    (room.min(wrap) / W::BYTES).min(most)
}

fn movs<W: Width>(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    repeat(cpu, i, |cpu, most| {
        let (si, di) = (index(cpu, i, gpr::RSI), index(cpu, i, gpr::RDI));
        let from = cpu.linearize(i.seg, si, W::BYTES, false)?;
        let to = cpu.linearize(seg::ES, di, W::BYTES, true)?;
        if most > 1 && flat(cpu, i) {
            let n = bulk_move::<W>(cpu, i, (si, from), (di, to), most)?;
            if n > 0 {
                advance(cpu, i, gpr::RSI, n.wrapping_mul(W::BYTES));
                advance(cpu, i, gpr::RDI, n.wrapping_mul(W::BYTES));
                return Ok((n, true));
            }
        }
        let v = cpu.load_linear::<W>(from)?;
        cpu.store_linear::<W>(to, v)?;
        advance(cpu, i, gpr::RSI, W::BYTES);
        advance(cpu, i, gpr::RDI, W::BYTES);
        Ok((1, true))
    })
}

/// Whether runs of elements need no limit checks: 64-bit mode, or flat segments.
fn flat(cpu: &Cpu, i: &Insn) -> bool {
    cpu.mode.has(crate::insn::Mode::CODE64) || i.flat
}

/// Moves as many elements as both pages allow; 0 if they must be done one by one.
fn bulk_move<W: Width>(
    cpu: &mut Cpu,
    i: &Insn,
    (si, from): (u64, u64),
    (di, to): (u64, u64),
    most: u64,
) -> Result<u64, Trap> {
    let Some((source, source_room)) = cpu.direct(from, W::BYTES, most.saturating_mul(W::BYTES), false)? else {
        return Ok(0);
    };
    if source_room < W::BYTES {
        // The source's second page is looked at before the target.
        return Ok(0);
    }
    let Some((target, target_room)) = cpu.direct(to, W::BYTES, source_room, true)? else { return Ok(0) };
    let n = run_length::<W>(cpu, i, si, source_room.min(target_room), most);
    let n = run_length::<W>(cpu, i, di, n * W::BYTES, n);
    let bytes = (n * W::BYTES) as usize;
    // A destination that starts inside the source repeats what was just written, element by element.
    let lag = (target as usize).wrapping_sub(source as usize);
    if bytes == 0 || (lag > 0 && lag < bytes) {
        return Ok(0);
    }
    cpu.storing();
    // SAFETY: `direct` gave host addresses of guest RAM with that much room in their pages, and `bytes` is inside
    // both; `copy` allows the overlap that is left (destination below or equal to source), which forward elements
    // make no different.
    unsafe { std::ptr::copy(source, target, bytes) };
    cpu.loaded();
    Ok(n)
}

fn stos<W: Width>(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    repeat(cpu, i, |cpu, most| {
        let di = index(cpu, i, gpr::RDI);
        let to = cpu.linearize(seg::ES, di, W::BYTES, true)?;
        let v = cpu.gpr::<W>(gpr::RAX);
        let mut n = 0;
        if most > 1
            && flat(cpu, i)
            && let Some((target, room)) = cpu.direct(to, W::BYTES, most.saturating_mul(W::BYTES), true)?
        {
            n = run_length::<W>(cpu, i, di, room, most);
            cpu.storing();
            // SAFETY: `direct` gave `room` writable bytes of guest RAM and `n` elements fit them.
            unsafe { fill::<W>(target, v, n as usize) };
        }
        if n == 0 {
            cpu.store_linear::<W>(to, v)?;
            n = 1;
        }
        advance(cpu, i, gpr::RDI, n.wrapping_mul(W::BYTES));
        Ok((n, true))
    })
}

/// # Safety
/// `target` must be valid for writes of `n` elements of `W`.
unsafe fn fill<W: Width>(target: *mut u8, v: u64, n: usize) {
    // SAFETY: given by the caller; every store is unaligned and inside the range.
    unsafe {
        match W::BYTES {
            1 => target.write_bytes(v as u8, n),
            2 => (0..n).for_each(|k| target.cast::<u16>().add(k).write_unaligned(v as u16)),
            4 => (0..n).for_each(|k| target.cast::<u32>().add(k).write_unaligned(v as u32)),
            _ => (0..n).for_each(|k| target.cast::<u64>().add(k).write_unaligned(v)),
        }
    }
}

fn lods<W: Width>(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    repeat(cpu, i, |cpu, _| {
        let si = index(cpu, i, gpr::RSI);
        let from = cpu.linearize(i.seg, si, W::BYTES, false)?;
        let v = cpu.load_linear::<W>(from)?;
        cpu.set_gpr::<W>(gpr::RAX, v);
        advance(cpu, i, gpr::RSI, W::BYTES);
        Ok((1, true))
    })
}

/// Whether REPE or REPNE goes on after a comparison.
fn goes_on(i: &Insn, equal: bool) -> bool {
    match i.rep {
        Rep::Rep => equal,
        Rep::Repne => !equal,
        Rep::None => false,
    }
}

fn scas<W: Width>(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    repeat(cpu, i, |cpu, _| {
        let di = index(cpu, i, gpr::RDI);
        let at = cpu.linearize(seg::ES, di, W::BYTES, false)?;
        let b = cpu.load_linear::<W>(at)?;
        let a = cpu.gpr::<W>(gpr::RAX);
        advance(cpu, i, gpr::RDI, W::BYTES);
        cpu.set_flags::<W>(Flags::Cmp { a, b, r: W::zext(a.wrapping_sub(b)) });
        Ok((1, goes_on(i, a == b)))
    })
}

fn cmps<W: Width>(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    repeat(cpu, i, |cpu, _| {
        let (si, di) = (index(cpu, i, gpr::RSI), index(cpu, i, gpr::RDI));
        let left = cpu.linearize(i.seg, si, W::BYTES, false)?;
        let a = cpu.load_linear::<W>(left)?;
        let right = cpu.linearize(seg::ES, di, W::BYTES, false)?;
        let b = cpu.load_linear::<W>(right)?;
        advance(cpu, i, gpr::RSI, W::BYTES);
        advance(cpu, i, gpr::RDI, W::BYTES);
        cpu.set_flags::<W>(Flags::Cmp { a, b, r: W::zext(a.wrapping_sub(b)) });
        Ok((1, goes_on(i, a == b)))
    })
}
