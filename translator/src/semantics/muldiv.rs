//! Multiplication, division and decimal arithmetic (SDM vol. 1 §5.1.2–5.1.3).

use iced_x86::{Mnemonic, OpKind};

use crate::cpu::Cpu;
use crate::emit::{Bin, Cmp, Emit, Flags};
use crate::exception::{Exception, Trap, vector};
use crate::insn::Insn;
use crate::semantics::{Form, Sem, both, interp, sized};
use crate::state::flag;
use crate::state::gpr::{RAX, RDX};
use crate::width::{W8, W16, Width};

/// The group's semantics.
pub fn lookup(form: &Form<'_>) -> Option<&'static Sem> {
    let i = form.instr;
    Some(match i.mnemonic() {
        Mnemonic::Mul if form.bytes == 1 => both!(mul8),
        Mnemonic::Mul => sized!(form.bytes, mul),
        Mnemonic::Imul => match (i.op_count(), form.bytes) {
            (1, 1) => both!(imul8),
            (1, n) => sized!(n, imul1),
            (2, n) => sized!(n, imul2),
            (_, n) => sized!(n, imul3),
        },
        Mnemonic::Div if form.bytes == 1 => both!(div8),
        Mnemonic::Div => sized!(form.bytes, div),
        Mnemonic::Idiv if form.bytes == 1 => both!(idiv8),
        Mnemonic::Idiv => sized!(form.bytes, idiv),
        Mnemonic::Mulx => sized!(form.bytes, mulx),
        Mnemonic::Aaa => interp!(aaa),
        Mnemonic::Aas => interp!(aas),
        Mnemonic::Aad if i.op0_kind() == OpKind::Immediate8 => interp!(aad),
        Mnemonic::Aam if i.op0_kind() == OpKind::Immediate8 => interp!(aam),
        Mnemonic::Daa => interp!(daa),
        Mnemonic::Das => interp!(das),
        _ => return None,
    })
}

/// CF and OF say whether the high half holds anything; SF, ZF and PF are undefined and follow the low half.
fn product_flags<E: Emit, W: Width>(e: &mut E, signed: bool, low: E::V, high: E::V) {
    let rest = if signed { e.bin_imm::<W>(Bin::Sar, low, u64::from(W::BITS - 1)) } else { e.imm::<W>(0) };
    let over = e.cmp::<W>(Cmp::Ne, high, rest);
    e.set_flags::<W>(Flags::Result { r: low, cf: over, of: over });
}

#[inline(always)]
fn multiply<E: Emit, W: Width>(e: &mut E, i: &Insn, signed: bool) -> Result<(), E::Trap> {
    let b = e.read::<W>(i, 0)?;
    let a = e.gpr::<W>(RAX);
    let (low, high) = e.mul_wide::<W>(signed, a, b);
    e.set_gpr::<W>(RAX, low);
    e.set_gpr::<W>(RDX, high);
    product_flags::<E, W>(e, signed, low, high);
    Ok(())
}

fn mul<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    multiply::<E, W>(e, i, false)
}

fn imul1<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    multiply::<E, W>(e, i, true)
}

/// The byte forms put the product into AX.
fn multiply8<E: Emit>(e: &mut E, i: &Insn, signed: bool) -> Result<(), E::Trap> {
    let b = e.read::<W8>(i, 0)?;
    let a = e.gpr::<W8>(RAX);
    let (low, high) = e.mul_wide::<W8>(signed, a, b);
    let wide = e.zext::<W8, W16>(high);
    let wide = e.bin_imm::<W16>(Bin::Shl, wide, 8);
    let l = e.zext::<W8, W16>(low);
    let ax = e.or::<W16>(wide, l);
    e.set_gpr::<W16>(RAX, ax);
    product_flags::<E, W8>(e, signed, low, high);
    Ok(())
}

fn mul8<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    multiply8(e, i, false)
}

fn imul8<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    multiply8(e, i, true)
}

#[inline(always)]
fn imul_into<E: Emit, W: Width>(e: &mut E, i: &Insn, first: usize) -> Result<(), E::Trap> {
    let b = e.read::<W>(i, first + 1)?;
    let a = e.read::<W>(i, first)?;
    let (low, high) = e.mul_wide::<W>(true, a, b);
    e.write::<W>(i, 0, low)?;
    product_flags::<E, W>(e, true, low, high);
    Ok(())
}

fn imul2<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    imul_into::<E, W>(e, i, 0)
}

fn imul3<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    imul_into::<E, W>(e, i, 1)
}

/// Division leaves the flags undefined; they stay as they were.
#[inline(always)]
fn divide<E: Emit, W: Width>(e: &mut E, i: &Insn, signed: bool) -> Result<(), E::Trap> {
    let d = e.read::<W>(i, 0)?;
    let (hi, lo) = (e.gpr::<W>(RDX), e.gpr::<W>(RAX));
    let (q, r) = e.div_wide::<W>(signed, hi, lo, d)?;
    e.set_gpr::<W>(RAX, q);
    e.set_gpr::<W>(RDX, r);
    Ok(())
}

fn div<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    divide::<E, W>(e, i, false)
}

fn idiv<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    divide::<E, W>(e, i, true)
}

fn divide8<E: Emit>(e: &mut E, i: &Insn, signed: bool) -> Result<(), E::Trap> {
    let d = e.read::<W8>(i, 0)?;
    let (hi, lo) = (e.gpr_high(RAX), e.gpr::<W8>(RAX));
    let (q, r) = e.div_wide::<W8>(signed, hi, lo, d)?;
    e.set_gpr::<W8>(RAX, q);
    e.set_gpr_high(RAX, r);
    Ok(())
}

fn div8<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    divide8(e, i, false)
}

fn idiv8<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    divide8(e, i, true)
}

fn mulx<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let b = e.read::<W>(i, 2)?;
    let a = e.gpr::<W>(RDX);
    let (low, high) = e.mul_wide::<W>(false, a, b);
    // With both destinations the same register, the high half stays.
    e.write::<W>(i, 1, low)?;
    e.write::<W>(i, 0, high)
}

/// AL, AH and the flags that the decimal instructions read.
fn decimal(cpu: &mut Cpu) -> (u8, u8, bool, bool) {
    let flags = cpu.s.flags();
    (cpu.gpr::<W8>(RAX) as u8, cpu.gpr_high(RAX) as u8, flags & flag::AF != 0, flags & flag::CF != 0)
}

/// Sets SF, ZF and PF from `al`, and AF and CF as given; OF is undefined and cleared.
fn decimal_flags(cpu: &mut Cpu, al: u8, af: bool, cf: bool) {
    let bit = |on: bool, f: u64| if on { f } else { 0 };
    cpu.s.set_status(
        bit(al == 0, flag::ZF)
            | bit(al & 0x80 != 0, flag::SF)
            | bit(al.count_ones() & 1 == 0, flag::PF)
            | bit(af, flag::AF)
            | bit(cf, flag::CF),
    );
}

fn aaa(cpu: &mut Cpu, _: &Insn) -> Result<(), Trap> {
    adjust_ascii(cpu, 0x106)
}

fn aas(cpu: &mut Cpu, _: &Insn) -> Result<(), Trap> {
    adjust_ascii(cpu, 0x106u16.wrapping_neg())
}

fn adjust_ascii(cpu: &mut Cpu, step: u16) -> Result<(), Trap> {
    let (al, ah, af, _) = decimal(cpu);
    let adjust = al & 15 > 9 || af;
    let ax = u16::from_le_bytes([al, ah]).wrapping_add(if adjust { step } else { 0 });
    cpu.set_gpr::<W16>(RAX, u64::from(ax & 0xff0f));
    decimal_flags(cpu, ax as u8 & 15, adjust, adjust);
    Ok(())
}

fn aad(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let (al, ah, ..) = decimal(cpu);
    let r = al.wrapping_add(ah.wrapping_mul(i.imm as u8));
    cpu.set_gpr::<W16>(RAX, u64::from(r));
    decimal_flags(cpu, r, false, false);
    Ok(())
}

fn aam(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let (al, ..) = decimal(cpu);
    let base = i.imm as u8;
    let (Some(q), Some(r)) = (al.checked_div(base), al.checked_rem(base)) else {
        return Err(cpu.raise(Exception::plain(vector::DE)));
    };
    cpu.set_gpr::<W16>(RAX, u64::from(q) << 8 | u64::from(r));
    decimal_flags(cpu, r, false, false);
    Ok(())
}

fn daa(cpu: &mut Cpu, _: &Insn) -> Result<(), Trap> {
    adjust_decimal(cpu, u8::wrapping_add)
}

fn das(cpu: &mut Cpu, _: &Insn) -> Result<(), Trap> {
    adjust_decimal(cpu, u8::wrapping_sub)
}

fn adjust_decimal(cpu: &mut Cpu, step: fn(u8, u8) -> u8) -> Result<(), Trap> {
    let (old, _, af, cf) = decimal(cpu);
    let low = old & 15 > 9 || af;
    let high = old > 0x99 || cf;
    let mut al = old;
    let mut carry = cf;
    if low {
        let next = step(al, 6);
        // A borrow out of the low step counts for DAS; for DAA it implies the high step anyway.
        carry |= (next > al) != (step(0, 1) == 1);
        al = next;
    }
    if high {
        al = step(al, 0x60);
    }
    let carry = if high { true } else { carry && low };
    cpu.set_gpr::<W8>(RAX, u64::from(al));
    decimal_flags(cpu, al, low, carry);
    Ok(())
}
