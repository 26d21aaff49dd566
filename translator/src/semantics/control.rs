//! Near control transfer (SDM vol. 1 §5.1.7) and the instructions on single flags: JMP, Jcc, CALL, RET, LOOP, JCXZ,
//! SETcc, CLC, STC, CMC, CLD, STD.

use iced_x86::Mnemonic;

use crate::emit::{Bin, Cond, Emit, Flags, Word};
use crate::insn::{Insn, Opnd};
use crate::semantics::data::condition;
use crate::semantics::{Form, Sem, both};
use crate::state::{flag, gpr};
use crate::width::{W8, W16, W32, W64, Width};

/// The group's semantics.
pub fn lookup(form: &Form<'_>) -> Option<&'static Sem> {
    let i = form.instr;
    macro_rules! by_size {
        ($f:ident) => {
            match form.bytes {
                2 => both!($f, W16),
                4 => both!($f, W32),
                _ => both!($f, W64),
            }
        };
    }
    if i.is_jcc_short_or_near() {
        return Some(both!(jcc; aux = condition));
    }
    Some(match i.mnemonic() {
        Mnemonic::Jmp if i.is_jmp_short_or_near() => both!(jmp),
        Mnemonic::Jmp if i.is_jmp_near_indirect() => by_size!(jmp_indirect),
        Mnemonic::Call if i.is_call_near() => by_size!(call),
        Mnemonic::Call if i.is_call_near_indirect() => by_size!(call_indirect),
        Mnemonic::Ret => by_size!(ret),
        Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne => both!(count_loop; aux = loop_kind),
        Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => both!(jcxz),
        Mnemonic::Seta
        | Mnemonic::Setae
        | Mnemonic::Setb
        | Mnemonic::Setbe
        | Mnemonic::Sete
        | Mnemonic::Setg
        | Mnemonic::Setge
        | Mnemonic::Setl
        | Mnemonic::Setle
        | Mnemonic::Setne
        | Mnemonic::Setno
        | Mnemonic::Setnp
        | Mnemonic::Setns
        | Mnemonic::Seto
        | Mnemonic::Setp
        | Mnemonic::Sets => both!(setcc; aux = condition),
        Mnemonic::Clc => both!(clc),
        Mnemonic::Stc => both!(stc),
        Mnemonic::Cmc => both!(cmc),
        Mnemonic::Cld => both!(cld),
        Mnemonic::Std => both!(std),
        _ => return None,
    })
}

#[inline(always)]
fn jcc<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let c = e.cond(Cond::from_bits(i.aux as u8));
    e.branch_rel(i, c)
}

#[inline(always)]
fn jmp<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    e.jump_rel(i)
}

#[inline(always)]
fn jmp_indirect<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let target = e.read::<W>(i, 0)?;
    let target = e.zext::<W, W64>(target);
    e.check_target(i, target)?;
    e.set_ip(i, target);
    Ok(())
}

#[inline(always)]
fn call<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let ret = e.next_ip(i);
    let ret = e.zext::<W64, W>(ret);
    e.check_relative(i)?;
    e.push::<W>(i, ret)?;
    e.jump_rel(i)
}

#[inline(always)]
fn call_indirect<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let target = e.read::<W>(i, 0)?;
    let target = e.zext::<W, W64>(target);
    e.check_target(i, target)?;
    let ret = e.next_ip(i);
    let ret = e.zext::<W64, W>(ret);
    e.push::<W>(i, ret)?;
    e.set_ip(i, target);
    Ok(())
}

#[inline(always)]
fn ret<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let (target, mut sp) = e.peek::<W>(i)?;
    let target = e.zext::<W, W64>(target);
    e.check_target(i, target)?;
    if i.op[0] == Opnd::Imm {
        sp = e.bin_imm::<W64>(Bin::Add, sp, i.imm & 0xffff);
        sp = e.cut_stack(i, sp);
    }
    e.set_stack_pointer(i, sp);
    e.set_ip(i, target);
    Ok(())
}

/// What a LOOP asks of ZF: 0 nothing, 1 set, 2 clear.
fn loop_kind(i: &iced_x86::Instruction) -> u16 {
    match i.mnemonic() {
        Mnemonic::Loope => 1,
        Mnemonic::Loopne => 2,
        _ => 0,
    }
}

/// RCX, ECX or CX by the address size, as a 64-bit value.
fn counter<E: Emit>(e: &mut E, i: &Insn) -> E::V {
    let v = e.gpr::<W64>(gpr::RCX);
    e.cut_address(i, v)
}

fn count_loop<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let count = counter(e, i);
    let count = e.bin_imm::<W64>(Bin::Sub, count, 1);
    let count = e.cut_address(i, count);
    let zero = e.is_zero::<W64>(count);
    let mut c = e.bin_imm::<W8>(Bin::Xor, zero, 1);
    if i.aux != 0 {
        let zf = e.cond(if i.aux == 1 { Cond::E } else { Cond::Ne });
        c = e.and::<W8>(c, zf);
    }
    e.check_relative(i)?;
    match i.addr_bytes {
        8 => e.set_gpr::<W64>(gpr::RCX, count),
        4 => {
            let v = e.zext::<W64, W32>(count);
            e.set_gpr::<W32>(gpr::RCX, v)
        }
        _ => {
            let v = e.zext::<W64, W16>(count);
            e.set_gpr::<W16>(gpr::RCX, v)
        }
    }
    e.branch_rel(i, c)
}

fn jcxz<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let count = counter(e, i);
    let c = e.is_zero::<W64>(count);
    e.branch_rel(i, c)
}

#[inline(always)]
fn setcc<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let c = e.cond(Cond::from_bits(i.aux as u8));
    e.write::<W8>(i, 0, c)
}

fn clc<E: Emit>(e: &mut E, _: &Insn) -> Result<(), E::Trap> {
    let cf = e.imm::<W8>(0);
    e.set_flags::<W8>(Flags::Cf { cf });
    Ok(())
}

fn stc<E: Emit>(e: &mut E, _: &Insn) -> Result<(), E::Trap> {
    let cf = e.imm::<W8>(1);
    e.set_flags::<W8>(Flags::Cf { cf });
    Ok(())
}

fn cmc<E: Emit>(e: &mut E, _: &Insn) -> Result<(), E::Trap> {
    let cf = e.cond(Cond::Ae);
    e.set_flags::<W8>(Flags::Cf { cf });
    Ok(())
}

fn cld<E: Emit>(e: &mut E, _: &Insn) -> Result<(), E::Trap> {
    let flags = e.word(Word::Flags);
    let flags = e.bin_imm::<W64>(Bin::And, flags, !flag::DF);
    e.set_word(Word::Flags, flags);
    Ok(())
}

fn std<E: Emit>(e: &mut E, _: &Insn) -> Result<(), E::Trap> {
    let flags = e.word(Word::Flags);
    let flags = e.bin_imm::<W64>(Bin::Or, flags, flag::DF);
    e.set_word(Word::Flags, flags);
    Ok(())
}
