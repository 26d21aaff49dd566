//! Stack instructions (SDM vol. 1 §5.1.1, §6): PUSH, POP, PUSHA, POPA, PUSHF, ENTER, LEAVE.

use iced_x86::{Mnemonic, OpKind};

use crate::cpu::Cpu;
use crate::emit::{Bin, Emit, Word};
use crate::exception::{Exception, Trap, vector};
use crate::flags;
use crate::insn::{Insn, Opnd};
use crate::semantics::{Form, Sem, both, interp};
use crate::state::{flag, gpr, seg};
use crate::width::{W8, W16, W32, W64, Width};

/// The group's semantics.
pub fn lookup(form: &Form<'_>) -> Option<&'static Sem> {
    macro_rules! by_size {
        ($f:ident) => {
            match form.bytes {
                2 => both!($f, W16),
                4 => both!($f, W32),
                _ => both!($f, W64),
            }
        };
    }
    let segment = form.instr.op0_kind() == OpKind::Register && form.instr.op0_register().is_segment_register();
    Some(match form.instr.mnemonic() {
        Mnemonic::Push if segment => interp!(push_seg),
        Mnemonic::Push => by_size!(push),
        Mnemonic::Pop if !segment => by_size!(pop),
        Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq => by_size!(pushf),
        Mnemonic::Pusha | Mnemonic::Pushad => interp!(pusha),
        Mnemonic::Popa | Mnemonic::Popad => interp!(popa),
        Mnemonic::Enter => interp!(enter),
        Mnemonic::Leave => by_size!(leave),
        _ => return None,
    })
}

#[inline(always)]
fn push<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let v = e.read::<W>(i, 0)?;
    e.push::<W>(i, v)
}

#[inline(always)]
fn pop<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let (v, sp) = e.peek::<W>(i)?;
    if i.op[0] != Opnd::Mem {
        e.set_stack_pointer(i, sp);
        // POP into the stack pointer itself leaves the popped value.
        return e.write::<W>(i, 0, v);
    }
    // An address that uses the stack pointer sees it after the pop (SDM vol. 2, POP).
    let mut ea = e.ea(i);
    for r in [i.base, i.index] {
        if r == gpr::RSP {
            ea = e.bin_imm::<W64>(Bin::Add, ea, W::BYTES);
            ea = e.cut_address(i, ea);
        }
    }
    e.store::<W>(i, i.seg, ea, v)?;
    e.set_stack_pointer(i, sp);
    Ok(())
}

/// Pushes a value at the instruction's operand size.
fn push_value(cpu: &mut Cpu, i: &Insn, v: u64) -> Result<(), Trap> {
    match i.osize {
        2 => cpu.push::<W16>(i, W16::zext(v)),
        4 => cpu.push::<W32>(i, W32::zext(v)),
        _ => cpu.push::<W64>(i, v),
    }
}

fn push_seg(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let Opnd::Seg(s) = i.op[0] else { return Err(cpu.ud()) };
    let v = u64::from(cpu.s.seg[usize::from(s)].selector);
    push_value(cpu, i, v)
}

fn pushf<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let flags = e.word(Word::Flags);
    // In virtual-8086 mode only with IOPL 3 (SDM vol. 3 §20.2.7).
    let low_iopl = e.bin_imm::<W64>(Bin::Xor, flags, flag::IOPL);
    let low_iopl = e.has_bits(low_iopl, flag::IOPL);
    let vm86 = e.has_bits(flags, flag::VM);
    let sensitive = e.and::<W8>(vm86, low_iopl);
    e.fault_if(sensitive, Exception::with_error(vector::GP, 0))?;
    let status = flags::status(e);
    let flags = e.bin_imm::<W64>(Bin::And, flags, !(flag::RF | flag::VM));
    let flags = e.or::<W64>(flags, status);
    let flags = e.zext::<W64, W>(flags);
    e.push::<W>(i, flags)
}

/// The block of eight registers that PUSHA stores: EDI at the lowest address.
fn pusha(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let n = u64::from(i.osize);
    let top = cpu.stack_pointer(i);
    let sp = cpu.cut_stack(i, top.wrapping_sub(8 * n));
    let mut bytes = [0; 32];
    for r in 0..8usize {
        let at = (7 - r) * n as usize;
        bytes[at..at + n as usize].copy_from_slice(&cpu.s.gpr[r].to_le_bytes()[..n as usize]);
    }
    let linear = cpu.linearize(seg::SS, sp, 8 * n, true)?;
    cpu.check_alignment(linear, n)?;
    cpu.store_bytes(linear, &bytes[..8 * n as usize])?;
    cpu.set_stack_pointer(i, sp);
    Ok(())
}

fn popa(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let n = usize::from(i.osize);
    let sp = cpu.stack_pointer(i);
    let linear = cpu.linearize(seg::SS, sp, 8 * n as u64, false)?;
    let mut bytes = [0; 32];
    cpu.check_alignment(linear, n as u64)?;
    cpu.load_bytes(linear, &mut bytes[..8 * n])?;
    for r in (0..8u8).filter(|&r| r != gpr::RSP) {
        let at = (7 - usize::from(r)) * n;
        let mut word = [0; 8];
        word[..n].copy_from_slice(&bytes[at..at + n]);
        let v = u64::from_le_bytes(word);
        if n == 2 { cpu.set_gpr::<W16>(r, v) } else { cpu.set_gpr::<W32>(r, v) }
    }
    let sp = cpu.cut_stack(i, sp.wrapping_add(8 * n as u64));
    cpu.set_stack_pointer(i, sp);
    Ok(())
}

fn enter(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    match i.osize {
        2 => enter_of::<W16>(cpu, i),
        4 => enter_of::<W32>(cpu, i),
        _ => enter_of::<W64>(cpu, i),
    }
}

fn enter_of<W: Width>(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let level = i.imm2 & 31;
    let size = i.imm & 0xffff;
    let old_sp = cpu.stack_pointer(i);
    let mut sp = old_sp;
    let mut put = |cpu: &mut Cpu, v: u64| -> Result<(), Trap> {
        sp = cpu.cut_stack(i, sp.wrapping_sub(W::BYTES));
        cpu.store::<W>(i, seg::SS, sp, v)
    };
    // Everything is stored below the stack pointer before any register changes.
    let bp = cpu.gpr::<W64>(gpr::RBP);
    put(cpu, W::zext(bp))?;
    let frame = cpu.cut_stack(i, old_sp.wrapping_sub(W::BYTES));
    let mut from = cpu.cut_stack(i, bp);
    for _ in 1..level {
        from = cpu.cut_stack(i, from.wrapping_sub(W::BYTES));
        let v = cpu.load::<W>(i, seg::SS, from)?;
        put(cpu, v)?;
    }
    if level != 0 {
        put(cpu, W::zext(frame))?;
    }
    let sp = cpu.cut_stack(i, sp.wrapping_sub(size));
    // The new top must be writable (SDM vol. 2, ENTER).
    let linear = cpu.linearize(seg::SS, sp, W::BYTES, true)?;
    cpu.check_alignment(linear, W::BYTES)?;
    cpu.probe_write(linear, W::BYTES)?;
    cpu.set_gpr::<W>(gpr::RBP, frame);
    cpu.set_stack_pointer(i, sp);
    Ok(())
}

fn leave<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let bp = e.gpr::<W64>(gpr::RBP);
    let sp = e.cut_stack(i, bp);
    let v = e.load::<W>(i, seg::SS, sp)?;
    let sp = e.bin_imm::<W64>(Bin::Add, sp, W::BYTES);
    let sp = e.cut_stack(i, sp);
    e.set_stack_pointer(i, sp);
    e.set_gpr::<W>(gpr::RBP, v);
    Ok(())
}
