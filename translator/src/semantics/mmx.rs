//! MMX, and the SSE to SSSE3 instructions on MMX registers (SDM vol. 1 §5.4, chapter 9), over [`crate::simd`]: a 64-bit
//! operand is the low half of a vector, and what moves data across lanes is rearranged for the shorter register.

use std::collections::HashMap;
use std::sync::OnceLock;

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::sse::{numbers, shift_number};
use crate::cpu::Cpu;
use crate::emit::Emit;
use crate::exception::{Exception, Trap, vector};
use crate::insn::{Insn, Opnd};
use crate::semantics::{Form, Sem, interp};
use crate::simd::fp::{self, CvtOp};
use crate::simd::{self, VecImmOp, VecOp, VecUnOp};
use crate::state::{cr, gpr};
use crate::width::{W8, W16, W32, W64, Width};

/// The group's semantics.
pub fn lookup(form: &Form<'_>) -> Option<&'static Sem> {
    use Mnemonic::*;
    let i = form.instr;
    match i.mnemonic() {
        Emms => return Some(interp!(emms)),
        // Their source may be memory, so that no operand tells them.
        Cvtpi2ps => return Some(interp!(cvtpi2ps)),
        Cvtpi2pd => return Some(interp!(cvtpi2pd)),
        _ if !(0..i.op_count()).any(|n| i.op_register(n).is_mm()) => return None,
        _ => {}
    }
    Some(match i.mnemonic() {
        Movd => interp!(transfer::<W32>),
        Movq | Movntq => interp!(transfer::<W64>),
        Movq2dq => interp!(movq2dq),
        Movdq2q => interp!(movdq2q),
        Maskmovq => interp!(maskmovq),
        Pmovmskb => interp!(pmovmskb),
        Pinsrw => interp!(pinsrw),
        Pextrw => interp!(pextrw),
        Pshufw => interp!(pshufw),
        Palignr => interp!(palignr),
        Cvtps2pi | Cvttps2pi => interp!(singles_to_ints; aux = is_truncating),
        Cvtpd2pi | Cvttpd2pi => interp!(doubles_to_ints; aux = is_truncating),
        Psllw | Pslld | Psllq | Psrlw | Psrld | Psrlq | Psraw | Psrad if i.op1_kind() == OpKind::Immediate8 => {
            interp!(shift_immediate; aux = shift_number)
        }
        Pabsb | Pabsw | Pabsd => interp!(absolute; aux = absolute_number),
        m if binaries().contains_key(&m) => interp!(binary; aux = binary_number),
        _ => return None,
    })
}

/// The numbers of the two-operand operations by mnemonic.
fn binaries() -> &'static HashMap<Mnemonic, u16> {
    static NUMBERS: OnceLock<HashMap<Mnemonic, u16>> = OnceLock::new();
    NUMBERS.get_or_init(|| numbers(VecOp::ALL, ""))
}

fn binary_number(i: &Instruction) -> u16 {
    binaries().get(&i.mnemonic()).copied().unwrap_or(0)
}

fn absolute_number(i: &Instruction) -> u16 {
    (match i.mnemonic() {
        Mnemonic::Pabsb => VecUnOp::Pabsb,
        Mnemonic::Pabsw => VecUnOp::Pabsw,
        _ => VecUnOp::Pabsd,
    }) as u16
}

fn is_truncating(i: &Instruction) -> u16 {
    u16::from(matches!(i.mnemonic(), Mnemonic::Cvttps2pi | Mnemonic::Cvttpd2pi))
}

// ---- checks and operands ----

/// #UD and #NM by CR0 (SDM vol. 3 table 12-1).
fn enabled(cpu: &mut Cpu) -> Result<(), Trap> {
    if cpu.s.cr0 & cr::CR0_EM != 0 {
        return Err(cpu.ud());
    }
    if cpu.s.cr0 & cr::CR0_TS != 0 { Err(cpu.raise(Exception::plain(vector::NM))) } else { Ok(()) }
}

/// What each instruction on MMX registers checks first: an x87 exception may be pending, too.
fn check(cpu: &mut Cpu) -> Result<(), Trap> {
    enabled(cpu)?;
    if cpu.s.x87.pending_exception() { Err(cpu.raise(Exception::plain(vector::MF))) } else { Ok(()) }
}

/// #UD for instructions with an XMM operand if the operating system does not save those registers.
fn check_xmm(cpu: &mut Cpu) -> Result<(), Trap> {
    if cpu.s.cr4 & cr::CR4_OSFXSR == 0 { Err(cpu.ud()) } else { Ok(()) }
}

/// Operand `n`, an MMX register or memory. PUNPCKLBW and its like read only 32 bits of memory.
fn source(cpu: &mut Cpu, i: &Insn, n: usize) -> Result<u64, Trap> {
    match i.op[n] {
        Opnd::Mmx(r) => Ok(cpu.s.x87.mmx(r)),
        Opnd::Mem if i.mem_bytes == 4 => cpu.read::<W32>(i, n),
        _ => cpu.read::<W64>(i, n),
    }
}

/// Writes operand 0, an MMX register.
fn result(cpu: &mut Cpu, i: &Insn, v: u64) -> Result<(), Trap> {
    let Opnd::Mmx(r) = i.op[0] else { return Err(cpu.ud()) };
    cpu.s.x87.set_mmx(r, v);
    Ok(())
}

/// Writes operand 0, an MMX register, with the low half of a vector.
fn result_low(cpu: &mut Cpu, i: &Insn, v: u128) -> Result<(), Trap> {
    result(cpu, i, v as u64)
}

// ---- moves ----

fn emms(cpu: &mut Cpu, _: &Insn) -> Result<(), Trap> {
    check(cpu)?;
    cpu.s.x87.emms();
    Ok(())
}

/// MOVD, MOVQ and MOVNTQ, in either direction.
fn transfer<W: Width>(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    check(cpu)?;
    let v = match i.op[1] {
        Opnd::Mmx(r) => cpu.s.x87.mmx(r),
        _ => cpu.read::<W>(i, 1)?,
    };
    if let Opnd::Mmx(r) = i.op[0] {
        cpu.s.x87.set_mmx(r, v);
    } else {
        cpu.write::<W>(i, 0, W::zext(v))?;
        cpu.s.x87.enter_mmx();
    }
    Ok(())
}

fn movq2dq(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    check_xmm(cpu)?;
    check(cpu)?;
    let (Opnd::Xmm(d), Opnd::Mmx(s)) = (i.op[0], i.op[1]) else { return Err(cpu.ud()) };
    cpu.s.set_xmm(d, u128::from(cpu.s.x87.mmx(s)));
    cpu.s.x87.enter_mmx();
    Ok(())
}

fn movdq2q(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    check_xmm(cpu)?;
    check(cpu)?;
    let Opnd::Xmm(s) = i.op[1] else { return Err(cpu.ud()) };
    result_low(cpu, i, cpu.s.xmm(s))
}

fn maskmovq(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    check(cpu)?;
    let (data, mask) = (source(cpu, i, 1)?.to_le_bytes(), source(cpu, i, 2)?.to_le_bytes());
    let at = cpu.gpr::<W64>(gpr::RDI);
    let at = cpu.cut_address(i, at);
    let linear = cpu.linearize(i.seg, at, 8, true)?;
    cpu.check_alignment(linear, 8)?;
    cpu.probe_write(linear, 8)?;
    for (k, (byte, _)) in (0..).zip(data.into_iter().zip(mask)).filter(|(_, (_, m))| m & 0x80 != 0) {
        cpu.store_linear::<W8>(cpu.wrap_linear(linear.wrapping_add(k)), u64::from(byte))?;
    }
    cpu.s.x87.enter_mmx();
    Ok(())
}

fn pmovmskb(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    check(cpu)?;
    let v = source(cpu, i, 1)?;
    let Opnd::Gpr(r) = i.op[0] else { return Err(cpu.ud()) };
    cpu.set_gpr::<W64>(r, u64::from(simd::flags::pmovmskb(v.into())));
    cpu.s.x87.enter_mmx();
    Ok(())
}

fn pinsrw(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    check(cpu)?;
    let v = cpu.read::<W16>(i, 1)?;
    let a = source(cpu, i, 0)?;
    result_low(cpu, i, simd::imm::insert(a.into(), v, 2, i.imm as u8 & 3))
}

fn pextrw(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    check(cpu)?;
    let v = source(cpu, i, 1)?;
    let Opnd::Gpr(r) = i.op[0] else { return Err(cpu.ud()) };
    cpu.set_gpr::<W64>(r, simd::imm::extract(v.into(), 2, i.imm as u8 & 3));
    cpu.s.x87.enter_mmx();
    Ok(())
}

// ---- packed integers ----

fn binary(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    check(cpu)?;
    let b = source(cpu, i, 1)?;
    let a = source(cpu, i, 0)?;
    let Some(op) = VecOp::from_number(i.aux) else { return Err(cpu.ud()) };
    result(cpu, i, eval(op, a, b))
}

/// The 64-bit form of `op`.
fn eval(op: VecOp, a: u64, b: u64) -> u64 {
    use VecOp::*;
    let joined = u128::from(a) | u128::from(b) << 64;
    let (a, b) = (u128::from(a), u128::from(b));
    let v = match op {
        // The first source of the long form gives the low half of its result.
        Packsswb | Packssdw | Packuswb | Phaddw | Phaddd | Phaddsw | Phsubw | Phsubd | Phsubsw => {
            simd::eval(op, joined, 0)
        }
        // The low halves of the long operands interleaved are both results of the short form.
        Punpckhbw => simd::eval(Punpcklbw, a, b) >> 64,
        Punpckhwd => simd::eval(Punpcklwd, a, b) >> 64,
        Punpckhdq => simd::eval(Punpckldq, a, b) >> 64,
        // Eight bytes to choose from.
        Pshufb => simd::eval(op, a, b & 0x8787_8787_8787_8787),
        _ => simd::eval(op, a, b),
    };
    v as u64
}

fn absolute(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    check(cpu)?;
    let a = source(cpu, i, 1)?;
    let Some(op) = VecUnOp::from_number(i.aux) else { return Err(cpu.ud()) };
    result_low(cpu, i, simd::eval_unary(op, a.into()))
}

fn shift_immediate(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    check(cpu)?;
    let a = source(cpu, i, 0)?;
    let Some(op) = VecImmOp::from_number(i.aux) else { return Err(cpu.ud()) };
    result_low(cpu, i, simd::eval_imm(op, a.into(), 0, i.imm as u8))
}

fn pshufw(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    check(cpu)?;
    let a = source(cpu, i, 1)?;
    result_low(cpu, i, simd::eval_imm(VecImmOp::Pshuflw, a.into(), 0, i.imm as u8))
}

fn palignr(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    check(cpu)?;
    let b = source(cpu, i, 1)?;
    let a = source(cpu, i, 0)?;
    let joined = u128::from(b) | u128::from(a) << 64;
    result_low(cpu, i, simd::eval_imm(VecImmOp::Psrldq, joined, 0, i.imm as u8))
}

// ---- conversions ----

fn cvtpi2ps(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    check_xmm(cpu)?;
    check(cpu)?;
    let v = source(cpu, i, 1)?;
    let Opnd::Xmm(d) = i.op[0] else { return Err(cpu.ud()) };
    let r = cpu.with_fp(|env| fp::convert(env, CvtOp::Cvtdq2ps, 0, v.into()))?;
    let kept = cpu.s.xmm(d) >> 64 << 64;
    cpu.s.set_xmm(d, kept | u128::from(r as u64));
    cpu.s.x87.enter_mmx();
    Ok(())
}

/// With a memory source this has nothing to do with MMX (SDM vol. 2, CVTPI2PD).
fn cvtpi2pd(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    check_xmm(cpu)?;
    let register = i.op[1] != Opnd::Mem;
    if register {
        check(cpu)?
    } else {
        enabled(cpu)?
    }
    let v = source(cpu, i, 1)?;
    let Opnd::Xmm(d) = i.op[0] else { return Err(cpu.ud()) };
    let r = cpu.with_fp(|env| fp::convert(env, CvtOp::Cvtdq2pd, 0, v.into()))?;
    cpu.s.set_xmm(d, r);
    if register {
        cpu.s.x87.enter_mmx();
    }
    Ok(())
}

/// CVTPS2PI and CVTTPS2PI. The upper half of the source does not count: zeros convert without an exception.
fn singles_to_ints(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    check_xmm(cpu)?;
    check(cpu)?;
    let v = match i.op[1] {
        Opnd::Xmm(r) => cpu.s.xmm(r) as u64,
        _ => cpu.read::<W64>(i, 1)?,
    };
    let op = if i.aux != 0 { CvtOp::Cvttps2dq } else { CvtOp::Cvtps2dq };
    let r = cpu.with_fp(|env| fp::convert(env, op, 0, v.into()))?;
    result_low(cpu, i, r)
}

/// CVTPD2PI and CVTTPD2PI.
fn doubles_to_ints(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    check_xmm(cpu)?;
    check(cpu)?;
    let v = match i.op[1] {
        Opnd::Xmm(r) => cpu.s.xmm(r),
        _ => {
            let ea = cpu.ea(i);
            cpu.load_x(i, ea, true)?
        }
    };
    let op = if i.aux != 0 { CvtOp::Cvttpd2dq } else { CvtOp::Cvtpd2dq };
    let r = cpu.with_fp(|env| fp::convert(env, op, 0, v))?;
    result_low(cpu, i, r)
}

#[cfg(test)]
mod tests;
