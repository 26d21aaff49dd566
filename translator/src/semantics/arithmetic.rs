//! Binary arithmetic (SDM vol. 1 §5.1.2): ADD, ADC, SUB, SBB, CMP, INC, DEC, NEG.

use iced_x86::Mnemonic;

use crate::emit::{Emit, Flags, Un};
use crate::flags;
use crate::insn::Insn;
use crate::semantics::{Form, Sem, sized};
use crate::width::{W8, Width};

/// The group's semantics.
pub fn lookup(form: &Form<'_>) -> Option<&'static Sem> {
    Some(match form.instr.mnemonic() {
        Mnemonic::Add => sized!(form.bytes, add),
        Mnemonic::Adc => sized!(form.bytes, adc),
        Mnemonic::Sub => sized!(form.bytes, sub),
        Mnemonic::Sbb => sized!(form.bytes, sbb),
        Mnemonic::Cmp => sized!(form.bytes, cmp),
        Mnemonic::Inc => sized!(form.bytes, inc),
        Mnemonic::Dec => sized!(form.bytes, dec),
        Mnemonic::Neg => sized!(form.bytes, neg),
        _ => return None,
    })
}

#[inline(always)]
fn add<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let b = e.read::<W>(i, 1)?;
    e.modify::<W>(i, 0, |e, a| {
        let r = e.add::<W>(a, b);
        (r, Some(Flags::Add { a, b, r }))
    })
}

fn adc<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let b = e.read::<W>(i, 1)?;
    let carry = flags::carry(e);
    e.modify::<W>(i, 0, |e, a| {
        let sum = e.add::<W>(a, b);
        let carry = e.zext::<W8, W>(carry);
        let r = e.add::<W>(sum, carry);
        (r, Some(Flags::Add { a, b, r }))
    })
}

#[inline(always)]
fn sub<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let b = e.read::<W>(i, 1)?;
    e.modify::<W>(i, 0, |e, a| {
        let r = e.sub::<W>(a, b);
        (r, Some(Flags::Cmp { a, b, r }))
    })
}

fn sbb<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let b = e.read::<W>(i, 1)?;
    let carry = flags::carry(e);
    e.modify::<W>(i, 0, |e, a| {
        let difference = e.sub::<W>(a, b);
        let borrow = e.zext::<W8, W>(carry);
        let r = e.sub::<W>(difference, borrow);
        (r, Some(Flags::Sub { a, b, r }))
    })
}

#[inline(always)]
fn cmp<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let a = e.read::<W>(i, 0)?;
    let b = e.read::<W>(i, 1)?;
    let r = e.sub::<W>(a, b);
    e.set_flags::<W>(Flags::Cmp { a, b, r });
    Ok(())
}

fn inc<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let one = e.imm::<W>(1);
    e.modify::<W>(i, 0, |e, a| {
        let r = e.add::<W>(a, one);
        (r, Some(Flags::Inc { a, r }))
    })
}

fn dec<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let one = e.imm::<W>(1);
    e.modify::<W>(i, 0, |e, a| {
        let r = e.sub::<W>(a, one);
        (r, Some(Flags::Dec { a, r }))
    })
}

fn neg<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let zero = e.imm::<W>(0);
    e.modify::<W>(i, 0, |e, b| {
        let r = e.un::<W>(Un::Neg, b);
        (r, Some(Flags::Cmp { a: zero, b, r }))
    })
}
