//! Logic (SDM vol. 1 §5.1.4): AND, OR, XOR, NOT, TEST, ANDN.

use iced_x86::Mnemonic;

use crate::emit::{Bin, Emit, Flags, Un};
use crate::insn::Insn;
use crate::semantics::{Form, Sem, sized};
use crate::width::Width;

/// The group's semantics.
pub fn lookup(form: &Form<'_>) -> Option<&'static Sem> {
    Some(match form.instr.mnemonic() {
        Mnemonic::And => sized!(form.bytes, and),
        Mnemonic::Or => sized!(form.bytes, or),
        Mnemonic::Xor => sized!(form.bytes, xor),
        Mnemonic::Not => sized!(form.bytes, not),
        Mnemonic::Test => sized!(form.bytes, test),
        Mnemonic::Andn => sized!(form.bytes, andn),
        _ => return None,
    })
}

#[inline(always)]
fn logic<E: Emit, W: Width>(e: &mut E, i: &Insn, op: Bin) -> Result<(), E::Trap> {
    let b = e.read::<W>(i, 1)?;
    e.modify::<W>(i, 0, |e, a| {
        let r = e.bin::<W>(op, a, b);
        (r, Some(Flags::Logic { r }))
    })
}

#[inline(always)]
fn and<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    logic::<E, W>(e, i, Bin::And)
}

#[inline(always)]
fn or<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    logic::<E, W>(e, i, Bin::Or)
}

#[inline(always)]
fn xor<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    if i.op[0] == i.op[1] {
        // The zeroing idiom does not depend on the register.
        let r = e.imm::<W>(0);
        e.write::<W>(i, 0, r)?;
        e.set_flags::<W>(Flags::Logic { r });
        return Ok(());
    }
    logic::<E, W>(e, i, Bin::Xor)
}

fn not<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    e.modify::<W>(i, 0, |e, a| (e.un::<W>(Un::Not, a), None))
}

#[inline(always)]
fn test<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let a = e.read::<W>(i, 0)?;
    let b = e.read::<W>(i, 1)?;
    let r = e.and::<W>(a, b);
    e.set_flags::<W>(Flags::Logic { r });
    Ok(())
}

fn andn<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let a = e.read::<W>(i, 1)?;
    let b = e.read::<W>(i, 2)?;
    let a = e.un::<W>(Un::Not, a);
    let r = e.and::<W>(a, b);
    e.write::<W>(i, 0, r)?;
    e.set_flags::<W>(Flags::Logic { r });
    Ok(())
}
