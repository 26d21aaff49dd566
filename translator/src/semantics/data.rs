//! Data transfer (SDM vol. 1 §5.1.1): MOV and its extending forms, LEA, XCHG, CMOVcc, the exchange-and-compare
//! family, sign extension, flag transfer, and the instructions that do nothing.

use iced_x86::{ConditionCode, Mnemonic, OpKind};

use crate::cpu::Cpu;
use crate::emit::{Cmp, Cond, Emit, Flags, Un};
use crate::exception::Trap;
use crate::flags;
use crate::insn::{Insn, Opnd};
use crate::semantics::{Form, Sem, both, interp, sized};
use crate::state::gpr::{RAX, RBX, RCX, RDX};
use crate::width::{W8, W16, W32, W64, Width};

/// The group's semantics.
pub fn lookup(form: &Form<'_>) -> Option<&'static Sem> {
    let i = form.instr;
    let from = if i.op1_kind() == OpKind::Memory { i.memory_size().size() } else { i.op1_register().size() };
    Some(match i.mnemonic() {
        Mnemonic::Mov => sized!(form.bytes, mov),
        Mnemonic::Movzx => match (form.bytes, from) {
            (2, 1) => both!(movzx, W8, W16),
            (2, _) => both!(movzx, W16, W16),
            (4, 1) => both!(movzx, W8, W32),
            (4, _) => both!(movzx, W16, W32),
            (_, 1) => both!(movzx, W8, W64),
            _ => both!(movzx, W16, W64),
        },
        Mnemonic::Movsx | Mnemonic::Movsxd => match (form.bytes, from) {
            (2, 1) => both!(movsx, W8, W16),
            (2, _) => both!(movsx, W16, W16),
            (4, 1) => both!(movsx, W8, W32),
            (4, 2) => both!(movsx, W16, W32),
            (4, _) => both!(movsx, W32, W32),
            (_, 1) => both!(movsx, W8, W64),
            (_, 2) => both!(movsx, W16, W64),
            _ => both!(movsx, W32, W64),
        },
        Mnemonic::Lea => sized!(form.bytes, lea),
        Mnemonic::Xchg => sized!(form.bytes, xchg),
        Mnemonic::Bswap => sized!(form.bytes, bswap),
        Mnemonic::Movbe => sized!(form.bytes, movbe),
        Mnemonic::Xadd => sized!(form.bytes, xadd),
        Mnemonic::Cmpxchg => sized!(form.bytes, cmpxchg),
        Mnemonic::Cmpxchg8b => interp!(cmpxchg8b),
        Mnemonic::Cmpxchg16b => interp!(cmpxchg16b),
        Mnemonic::Movnti => sized!(form.bytes, mov),
        Mnemonic::Cbw => both!(convert, W8, W16),
        Mnemonic::Cwde => both!(convert, W16, W32),
        Mnemonic::Cdqe => both!(convert, W32, W64),
        Mnemonic::Cwd => both!(convert_double, W16),
        Mnemonic::Cdq => both!(convert_double, W32),
        Mnemonic::Cqo => both!(convert_double, W64),
        Mnemonic::Xlatb => both!(xlat),
        Mnemonic::Lahf => both!(lahf),
        Mnemonic::Salc => both!(salc),
        Mnemonic::Sahf => both!(sahf),
        Mnemonic::Cmova
        | Mnemonic::Cmovae
        | Mnemonic::Cmovb
        | Mnemonic::Cmovbe
        | Mnemonic::Cmove
        | Mnemonic::Cmovg
        | Mnemonic::Cmovge
        | Mnemonic::Cmovl
        | Mnemonic::Cmovle
        | Mnemonic::Cmovne
        | Mnemonic::Cmovno
        | Mnemonic::Cmovnp
        | Mnemonic::Cmovns
        | Mnemonic::Cmovo
        | Mnemonic::Cmovp
        | Mnemonic::Cmovs => match form.bytes {
            2 => both!(cmov, W16; aux = condition),
            4 => both!(cmov, W32; aux = condition),
            _ => both!(cmov, W64; aux = condition),
        },
        Mnemonic::Pause => interp!(pause),
        Mnemonic::Mfence => both!(fence),
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb => both!(touch),
        Mnemonic::Nop
        | Mnemonic::Endbr32
        | Mnemonic::Endbr64
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetchw
        | Mnemonic::Prefetch
        | Mnemonic::Prefetchwt1
        | Mnemonic::Prefetchit0
        | Mnemonic::Prefetchit1
        | Mnemonic::Reservednop
        | Mnemonic::Lfence
        | Mnemonic::Sfence
        | Mnemonic::Rdsspd
        | Mnemonic::Rdsspq => both!(nop),
        _ => return None,
    })
}

/// The condition code of a conditional instruction, for [`Insn::aux`].
pub fn condition(i: &iced_x86::Instruction) -> u16 {
    // iced numbers conditions from 1, in encoding order.
    (i.condition_code() as u16).saturating_sub(ConditionCode::o as u16)
}

#[inline(always)]
fn mov<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let v = e.read::<W>(i, 1)?;
    e.write::<W>(i, 0, v)
}

#[inline(always)]
fn movzx<E: Emit, F: Width, T: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let v = e.read::<F>(i, 1)?;
    let v = e.zext::<F, T>(v);
    e.write::<T>(i, 0, v)
}

#[inline(always)]
fn movsx<E: Emit, F: Width, T: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let v = e.read::<F>(i, 1)?;
    let v = e.sext::<F, T>(v);
    e.write::<T>(i, 0, v)
}

#[inline(always)]
fn lea<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let ea = e.ea(i);
    let v = e.zext::<W64, W>(ea);
    e.write::<W>(i, 0, v)
}

fn xchg<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    // At most one operand is memory; iced puts it first.
    let b = e.read::<W>(i, 1)?;
    if i.op[0] == Opnd::Mem {
        let ea = e.ea(i);
        let a = e.load_rmw::<W>(i, i.seg, ea)?;
        e.store::<W>(i, i.seg, ea, b)?;
        return e.write::<W>(i, 1, a);
    }
    let a = e.read::<W>(i, 0)?;
    e.write::<W>(i, 0, b)?;
    e.write::<W>(i, 1, a)
}

fn bswap<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let v = e.read::<W>(i, 0)?;
    // With a 16-bit operand the result is undefined; processors clear the register's low half.
    let v = if W::BITS == 16 { e.imm::<W>(0) } else { e.un::<W>(Un::Bswap, v) };
    e.write::<W>(i, 0, v)
}

fn movbe<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let v = e.read::<W>(i, 1)?;
    let v = e.un::<W>(Un::Bswap, v);
    e.write::<W>(i, 0, v)
}

fn xadd<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let b = e.read::<W>(i, 1)?;
    if i.op[0] == Opnd::Mem {
        let ea = e.ea(i);
        let a = e.load_rmw::<W>(i, i.seg, ea)?;
        let r = e.add::<W>(a, b);
        e.store::<W>(i, i.seg, ea, r)?;
        e.write::<W>(i, 1, a)?;
        e.set_flags::<W>(Flags::Add { a, b, r });
        return Ok(());
    }
    let a = e.read::<W>(i, 0)?;
    let r = e.add::<W>(a, b);
    e.write::<W>(i, 1, a)?;
    e.write::<W>(i, 0, r)?;
    e.set_flags::<W>(Flags::Add { a, b, r });
    Ok(())
}

fn cmpxchg<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let new = e.read::<W>(i, 1)?;
    let expected = e.gpr::<W>(RAX);
    let (old, equal) = match i.op[0] {
        // Memory is written in either case (SDM vol. 2).
        Opnd::Mem => {
            let ea = e.ea(i);
            let old = e.load_rmw::<W>(i, i.seg, ea)?;
            let equal = e.cmp::<W>(Cmp::Eq, expected, old);
            let v = e.select::<W>(equal, new, old);
            e.store::<W>(i, i.seg, ea, v)?;
            (old, equal)
        }
        // A register is not: its upper half is cleared only if the exchange happens.
        Opnd::Gpr(r) if W::BITS == 32 => {
            let whole = e.gpr::<W64>(r);
            let old = e.zext::<W64, W>(whole);
            let equal = e.cmp::<W>(Cmp::Eq, expected, old);
            let new = e.zext::<W, W64>(new);
            let v = e.select::<W64>(equal, new, whole);
            e.set_gpr::<W64>(r, v);
            (old, equal)
        }
        _ => {
            let old = e.read::<W>(i, 0)?;
            let equal = e.cmp::<W>(Cmp::Eq, expected, old);
            let v = e.select::<W>(equal, new, old);
            e.write::<W>(i, 0, v)?;
            (old, equal)
        }
    };
    // The accumulator is written, all of RAX for a 32-bit operand, only if the comparison failed; never if it is the
    // destination itself, which equals itself.
    if i.op[0] != Opnd::Gpr(RAX) {
        let rax = e.gpr::<W64>(RAX);
        let mut failed = e.zext::<W, W64>(old);
        if W::BITS < 32 {
            let kept = e.bin_imm::<W64>(crate::emit::Bin::And, rax, !W::MASK);
            failed = e.or::<W64>(kept, failed);
        }
        let v = e.select::<W64>(equal, rax, failed);
        e.set_gpr::<W64>(RAX, v);
    }
    let r = e.sub::<W>(expected, old);
    e.set_flags::<W>(Flags::Cmp { a: expected, b: old, r });
    Ok(())
}

fn cmpxchg8b(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let ea = cpu.ea(i);
    let old = cpu.load_rmw::<W64>(i, i.seg, ea)?;
    let expected = cpu.gpr::<W32>(RAX) | cpu.gpr::<W32>(RDX) << 32;
    let equal = old == expected;
    let new = cpu.gpr::<W32>(RBX) | cpu.gpr::<W32>(RCX) << 32;
    cpu.store::<W64>(i, i.seg, ea, if equal { new } else { old })?;
    if !equal {
        cpu.set_gpr::<W32>(RAX, old);
        cpu.set_gpr::<W32>(RDX, old >> 32);
    }
    cpu.set_flags::<W8>(Flags::Zf { zf: u64::from(equal) });
    Ok(())
}

fn cmpxchg16b(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let ea = cpu.ea(i);
    let linear = cpu.linearize(i.seg, ea, 16, true)?;
    if linear & 15 != 0 {
        return Err(cpu.gp(0));
    }
    let pair = |cpu: &mut Cpu, low, high| u128::from(cpu.gpr::<W64>(low)) | u128::from(cpu.gpr::<W64>(high)) << 64;
    let (expected, new) = (pair(cpu, RAX, RDX), pair(cpu, RBX, RCX));
    let old = if i.lock && cpu.peers.is_some() && !cpu.alone {
        cpu.exchange_locked_x(linear, expected, new)?
    } else {
        cpu.probe_write(linear, 16)?;
        let old = cpu.load_linear_x(linear)?;
        cpu.store_linear_x(linear, if old == expected { new } else { old })?;
        old
    };
    let equal = old == expected;
    if !equal {
        cpu.set_gpr::<W64>(RAX, old as u64);
        cpu.set_gpr::<W64>(RDX, (old >> 64) as u64);
    }
    cpu.set_flags::<W8>(Flags::Zf { zf: u64::from(equal) });
    Ok(())
}

fn convert<E: Emit, F: Width, T: Width>(e: &mut E, _: &Insn) -> Result<(), E::Trap> {
    let v = e.gpr::<F>(RAX);
    let v = e.sext::<F, T>(v);
    e.set_gpr::<T>(RAX, v);
    Ok(())
}

fn convert_double<E: Emit, W: Width>(e: &mut E, _: &Insn) -> Result<(), E::Trap> {
    let v = e.gpr::<W>(RAX);
    let sign = e.bin_imm::<W>(crate::emit::Bin::Sar, v, u64::from(W::BITS - 1));
    e.set_gpr::<W>(RDX, sign);
    Ok(())
}

fn xlat<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let base = e.gpr::<W64>(RBX);
    let index = e.gpr::<W8>(RAX);
    let index = e.zext::<W8, W64>(index);
    let at = e.add::<W64>(base, index);
    let at = e.cut_address(i, at);
    let v = e.load::<W8>(i, i.seg, at)?;
    e.set_gpr::<W8>(RAX, v);
    Ok(())
}

/// SF, ZF, AF, PF, CF into AH, with bit 1 set.
fn lahf<E: Emit>(e: &mut E, _: &Insn) -> Result<(), E::Trap> {
    let status = flags::status(e);
    let v = e.zext::<W64, W8>(status);
    let v = e.bin_imm::<W8>(crate::emit::Bin::Or, v, 2);
    e.set_gpr_high(RAX, v);
    Ok(())
}

/// Undocumented, outside 64-bit mode: AL becomes a byte of carry flags.
fn salc<E: Emit>(e: &mut E, _: &Insn) -> Result<(), E::Trap> {
    let cf = e.cond(Cond::B);
    let v = e.un::<W8>(Un::Neg, cf);
    e.set_gpr::<W8>(RAX, v);
    Ok(())
}

fn sahf<E: Emit>(e: &mut E, _: &Insn) -> Result<(), E::Trap> {
    use crate::emit::Bin;
    let ah = e.gpr_high(RAX);
    let of = e.cond(Cond::O);
    let cf = e.bit::<W8>(ah, 0);
    let pf = e.bit::<W8>(ah, 2);
    let af = e.bit::<W8>(ah, 4);
    let zf = e.bit::<W8>(ah, 6);
    let sf = e.bit::<W8>(ah, 7);
    let z = e.bin_imm::<W8>(Bin::Xor, zf, 1);
    let z = e.zext::<W8, W64>(z);
    let odd = e.bin_imm::<W8>(Bin::Xor, pf, 1);
    let odd = e.zext::<W8, W64>(odd);
    let sp = shifted(e, sf, 63);
    let sp = e.or::<W64>(sp, odd);
    let mixed = e.xor::<W8>(cf, of);
    let (cf, mixed, af) = (shifted(e, cf, 63), shifted(e, mixed, 62), shifted(e, af, 3));
    let co = e.or::<W64>(cf, mixed);
    let co = e.or::<W64>(co, af);
    e.set_flags::<W64>(Flags::Raw { z, sp, co });
    Ok(())
}

/// A boolean as a 64-bit value at bit `n`.
fn shifted<E: Emit>(e: &mut E, bit: E::V, n: u64) -> E::V {
    let v = e.zext::<W8, W64>(bit);
    e.bin_imm::<W64>(crate::emit::Bin::Shl, v, n)
}

#[inline(always)]
fn cmov<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    // The source is read, and a 32-bit destination's upper half cleared, whether or not the condition holds.
    let v = e.read::<W>(i, 1)?;
    let old = e.read::<W>(i, 0)?;
    let c = e.cond(Cond::from_bits(i.aux as u8));
    let v = e.select::<W>(c, v, old);
    e.write::<W>(i, 0, v)
}

/// Cache-line instructions fault as a byte load does, and do nothing else.
fn touch<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let ea = e.ea(i);
    e.load::<W8>(i, i.seg, ea)?;
    Ok(())
}

fn fence<E: Emit>(e: &mut E, _: &Insn) -> Result<(), E::Trap> {
    e.fence();
    Ok(())
}

/// A loop that waits for another vCPU: there may be no host processor for that one yet.
fn pause(cpu: &mut Cpu, _: &Insn) -> Result<(), Trap> {
    const OFFERS: u32 = 16;
    if cpu.peers.is_some() {
        cpu.pauses += 1;
        if cpu.pauses.is_multiple_of(OFFERS) {
            std::thread::yield_now();
        }
    }
    Ok(())
}

fn nop<E: Emit>(_: &mut E, _: &Insn) -> Result<(), E::Trap> {
    Ok(())
}
