//! SSE to SSE4.2, AES, PCLMULQDQ and SHA (SDM vol. 1 §5.5–5.12), legacy encodings, over [`crate::simd`].
//!
//! Moves and logic are generic, so that they compile; the rest is evaluated on numbers.

use std::collections::HashMap;
use std::sync::OnceLock;

use iced_x86::{CpuidFeature, EncodingKind, Instruction, Mnemonic, Register};

use crate::cpu::Cpu;
use crate::emit::{Bin, Emit, FpArgs, FpCall, LaneOp};
use crate::exception::{Exception, Trap, vector};
use crate::insn::{Insn, Mode, Opnd};
use crate::semantics::{Form, Sem, both, interp};
use crate::simd::fp::{CvtOp, FpFmt, FpOp};
use crate::simd::{self, VecImmOp, VecOp, VecTerOp, VecUnOp};
use crate::state::{cr, flag, gpr};
use crate::width::{W8, W16, W32, W64, Width};

/// The group's semantics.
pub fn lookup(form: &Form<'_>) -> Option<&'static Sem> {
    let i = form.instr;
    if i.encoding() != EncodingKind::Legacy || !is_sse(i) {
        return None;
    }
    let sem = find(i)?;
    Some(if form.mode.has(Mode::SSE) { sem } else { interp!(unavailable) })
}

fn is_sse(i: &Instruction) -> bool {
    use CpuidFeature::*;
    let sse = [SSE, SSE2, SSE3, SSSE3, SSE4_1, SSE4_2, AES, PCLMULQDQ, SHA];
    let mmx = (0..i.op_count()).any(|n| i.op_register(n).is_mm());
    !mmx && i.cpuid_features().iter().any(|f| sse.contains(f))
}

/// #UD or #NM: the mode does not allow SSE.
fn unavailable(cpu: &mut Cpu, _: &Insn) -> Result<(), Trap> {
    if cpu.s.cr0 & cr::CR0_EM != 0 || cpu.s.cr4 & cr::CR4_OSFXSR == 0 {
        return Err(cpu.ud());
    }
    Err(cpu.raise(Exception::plain(vector::NM)))
}

/// Packed operations by the name of their mnemonic.
struct Names {
    binary: HashMap<Mnemonic, u16>,
    immediate: HashMap<Mnemonic, u16>,
    unary: HashMap<Mnemonic, u16>,
}

/// The numbers of the packed operations, whose enums carry the mnemonics' names.
fn names() -> &'static Names {
    static NAMES: OnceLock<Names> = OnceLock::new();
    NAMES.get_or_init(|| {
        let mut binary = numbers(VecOp::ALL, "");
        use Mnemonic::*;
        for (m, op) in [
            (Unpcklps, VecOp::Punpckldq),
            (Unpckhps, VecOp::Punpckhdq),
            (Unpcklpd, VecOp::Punpcklqdq),
            (Unpckhpd, VecOp::Punpckhqdq),
        ] {
            binary.insert(m, op as u16);
        }
        let mut immediate = numbers(VecImmOp::ALL, "");
        for m in [Insertps, Pcmpestri, Pcmpestrm, Pcmpistri, Pcmpistrm] {
            immediate.remove(&m);
        }
        Names { binary, immediate, unary: numbers(VecUnOp::ALL, "") }
    })
}

/// The numbers of operations by the mnemonics that are called like them, behind `prefix`.
pub(super) fn numbers<T: std::fmt::Debug>(all: &[T], prefix: &str) -> HashMap<Mnemonic, u16> {
    let by_name: HashMap<String, Mnemonic> = Mnemonic::values().map(|m| (format!("{m:?}").to_lowercase(), m)).collect();
    let named = |op: &T| by_name.get(&format!("{prefix}{op:?}").to_lowercase()).copied();
    all.iter().enumerate().filter_map(|(n, op)| Some((named(op)?, n as u16))).collect()
}

fn binary_number(i: &Instruction) -> u16 {
    names().binary.get(&i.mnemonic()).copied().unwrap_or(0)
}

fn immediate_number(i: &Instruction) -> u16 {
    names().immediate.get(&i.mnemonic()).copied().unwrap_or(0)
}

fn unary_number(i: &Instruction) -> u16 {
    names().unary.get(&i.mnemonic()).copied().unwrap_or(0)
}

/// Shifts by an immediate are operations of their own.
pub(super) fn shift_number(i: &Instruction) -> u16 {
    use Mnemonic::*;
    (match i.mnemonic() {
        Psllw | Vpsllw => VecImmOp::PsllwImm,
        Pslld | Vpslld => VecImmOp::PslldImm,
        Psllq | Vpsllq => VecImmOp::PsllqImm,
        Psrlw | Vpsrlw => VecImmOp::PsrlwImm,
        Psrld | Vpsrld => VecImmOp::PsrldImm,
        Psrlq | Vpsrlq => VecImmOp::PsrlqImm,
        Psraw | Vpsraw => VecImmOp::PsrawImm,
        _ => VecImmOp::PsradImm,
    }) as u16
}

fn find(i: &Instruction) -> Option<&'static Sem> {
    use Mnemonic::*;
    let string = i.is_string_instruction();
    let to_memory = i.op0_register() == Register::None;
    Some(match i.mnemonic() {
        Movaps | Movapd | Movdqa | Movntps | Movntpd | Movntdq | Movntdqa => both!(move_aligned),
        Movups | Movupd | Movdqu | Lddqu => both!(move_unaligned),
        Movd => both!(movd),
        Movq => both!(movq),
        Movss => both!(move_scalar, W32),
        Movsd if !string => both!(move_scalar, W64),
        Movlps | Movlpd if to_memory => both!(store_low),
        Movlps | Movlpd => both!(load_low),
        Movhps | Movhpd if to_memory => both!(store_high),
        Movhps | Movhpd => both!(load_high),
        Movhlps => both!(movhlps),
        Movlhps => both!(load_high),
        Movddup => both!(movddup),
        Movshdup => interp!(duplicate; aux = is_high),
        Movsldup => interp!(duplicate; aux = is_high),
        Pand | Andps | Andpd => both!(logic; aux = logic_kind),
        Por | Orps | Orpd => both!(logic; aux = logic_kind),
        Pxor | Xorps | Xorpd => both!(logic; aux = logic_kind),
        Pandn | Andnps | Andnpd => both!(logic; aux = logic_kind),
        Psllw | Pslld | Psllq | Psrlw | Psrld | Psrlq | Psraw | Psrad
            if i.op1_kind() == iced_x86::OpKind::Immediate8 =>
        {
            both!(immediate_one; aux = shift_number)
        }
        Pslldq | Psrldq => both!(immediate_one; aux = immediate_number),
        Sha1rnds4 => both!(immediate_two; aux = immediate_number),
        m if names().binary.contains_key(&m) => both!(binary; aux = binary_number),
        Dpps | Dppd => both!(dot; aux = format),
        Blendvps | Blendvpd | Pblendvb | Sha256rnds2 => both!(ternary; aux = ternary_number),
        Insertps => interp!(insertps),
        Pinsrb | Pinsrw | Pinsrd | Pinsrq => interp!(pinsr; aux = element_bytes),
        Pextrb | Pextrw | Pextrd | Pextrq | Extractps => interp!(pextr; aux = element_bytes),
        m if names().immediate.contains_key(&m) => both!(immediate_two; aux = immediate_number),
        m if names().unary.contains_key(&m) => both!(unary; aux = unary_number),
        Pmovmskb | Movmskps | Movmskpd => both!(move_mask; aux = mask_bytes),
        Ptest => interp!(ptest),
        Pcmpestri | Pcmpestri64 | Pcmpestrm | Pcmpestrm64 | Pcmpistri | Pcmpistrm => {
            interp!(string_compare; aux = string_kind)
        }
        Maskmovdqu => interp!(maskmovdqu),
        Ldmxcsr => interp!(ldmxcsr),
        Stmxcsr => interp!(stmxcsr),
        Comiss | Comisd | Ucomiss | Ucomisd => both!(comi; aux = comi_kind),
        Cmpps | Cmppd | Cmpss => both!(compare; aux = format),
        Cmpsd if !string => both!(compare; aux = format),
        Roundps | Roundpd | Roundss | Roundsd => both!(round; aux = format),
        Cvtsi2ss | Cvtsi2sd => both!(from_int; aux = format),
        Cvtss2si | Cvtsd2si | Cvttss2si | Cvttsd2si => both!(to_int; aux = to_int_kind),
        m if conversion(m).is_some() => both!(convert; aux = conversion_number),
        m if arithmetic(m).is_some() => both!(arith; aux = arithmetic_number),
        _ => return None,
    })
}

// ---- moves and logic ----

#[inline(always)]
fn read_x<E: Emit>(e: &mut E, i: &Insn, n: usize, aligned: bool) -> Result<E::X, E::Trap> {
    match i.op[n] {
        Opnd::Xmm(r) => Ok(e.xmm(r)),
        Opnd::Mem => {
            let ea = e.ea(i);
            e.load_x(i, ea, aligned)
        }
        _ => Err(e.unsupported()),
    }
}

#[inline(always)]
fn write_x<E: Emit>(e: &mut E, i: &Insn, n: usize, v: E::X, aligned: bool) -> Result<(), E::Trap> {
    match i.op[n] {
        Opnd::Xmm(r) => {
            e.set_xmm(r, v);
            Ok(())
        }
        Opnd::Mem => {
            let ea = e.ea(i);
            e.store_x(i, ea, v, aligned)
        }
        _ => Err(e.unsupported()),
    }
}

fn move_aligned<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let v = read_x(e, i, 1, true)?;
    write_x(e, i, 0, v, true)
}

fn move_unaligned<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let v = read_x(e, i, 1, false)?;
    write_x(e, i, 0, v, false)
}

/// The low `W` of operand `n`, which is a vector register, a general one, or memory, as 64 bits.
#[inline(always)]
pub(super) fn low<E: Emit, W: Width>(e: &mut E, i: &Insn, n: usize) -> Result<E::V, E::Trap> {
    let v = match i.op[n] {
        Opnd::Xmm(r) => {
            let x = e.xmm(r);
            let v = e.x_low(x);
            e.zext::<W64, W>(v)
        }
        _ => e.read::<W>(i, n)?,
    };
    Ok(e.zext::<W, W64>(v))
}

/// Writes 64 bits, zero-extended, to a vector register, or their low `W` to a general one or memory.
#[inline(always)]
fn put_low<E: Emit, W: Width>(e: &mut E, i: &Insn, n: usize, v: E::V) -> Result<(), E::Trap> {
    if let Opnd::Xmm(r) = i.op[n] {
        let zero = e.imm::<W64>(0);
        let x = e.x_make(v, zero);
        e.set_xmm(r, x);
        return Ok(());
    }
    let v = e.zext::<W64, W>(v);
    e.write::<W>(i, n, v)
}

fn movd<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    move_low::<E, W32>(e, i)
}

fn movq<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    move_low::<E, W64>(e, i)
}

/// Moves the low `W`: zero-extended into a vector register, or to a general one or memory.
#[inline(always)]
fn move_low<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    if let (Opnd::Xmm(d), Opnd::Mem) = (i.op[0], i.op[1]) {
        let ea = e.ea(i);
        let x = e.load_x_low::<W>(i, ea)?;
        e.set_xmm(d, x);
        return Ok(());
    }
    let v = low::<E, W>(e, i, 1)?;
    put_low::<E, W>(e, i, 0, v)
}

/// MOVSS and MOVSD: a load clears the rest of the register, a register move keeps it.
fn move_scalar<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let (Opnd::Xmm(d), Opnd::Xmm(_)) = (i.op[0], i.op[1]) else { return move_low::<E, W>(e, i) };
    let v = low::<E, W>(e, i, 1)?;
    let old = e.xmm(d);
    let (old_low, high) = (e.x_low(old), e.x_high(old));
    let v = if W::BITS == 64 {
        v
    } else {
        let kept = e.bin_imm::<W64>(Bin::And, old_low, !W::MASK);
        e.or::<W64>(kept, v)
    };
    let x = e.x_make(v, high);
    e.set_xmm(d, x);
    Ok(())
}

fn store_low<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let v = low::<E, W64>(e, i, 1)?;
    e.write::<W64>(i, 0, v)
}

fn store_high<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let x = read_x(e, i, 1, false)?;
    let v = e.x_high(x);
    e.write::<W64>(i, 0, v)
}

fn load_low<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let v = low::<E, W64>(e, i, 1)?;
    let old = read_x(e, i, 0, false)?;
    let high = e.x_high(old);
    let x = e.x_make(v, high);
    write_x(e, i, 0, x, false)
}

fn load_high<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let v = low::<E, W64>(e, i, 1)?;
    let old = read_x(e, i, 0, false)?;
    let low = e.x_low(old);
    let x = e.x_make(low, v);
    write_x(e, i, 0, x, false)
}

fn movhlps<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let source = read_x(e, i, 1, false)?;
    let old = read_x(e, i, 0, false)?;
    let (v, high) = (e.x_high(source), e.x_high(old));
    let x = e.x_make(v, high);
    write_x(e, i, 0, x, false)
}

fn movddup<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let v = low::<E, W64>(e, i, 1)?;
    let x = e.x_make(v, v);
    write_x(e, i, 0, x, false)
}

fn is_high(i: &Instruction) -> u16 {
    u16::from(i.mnemonic() == Mnemonic::Movshdup)
}

fn duplicate(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let v = read_x(cpu, i, 1, true)?;
    let shift = if i.aux != 0 { 32 } else { 0 };
    let pick = |half: u64| (half >> shift & 0xffff_ffff) * 0x1_0000_0001;
    let v = u128::from(pick(v as u64)) | u128::from(pick((v >> 64) as u64)) << 64;
    write_x(cpu, i, 0, v, false)
}

/// 0 AND, 1 OR, 2 XOR, 3 AND NOT.
pub(super) fn logic_kind(i: &Instruction) -> u16 {
    use Mnemonic::*;
    match i.mnemonic() {
        Pand | Andps | Andpd | Vpand | Vandps | Vandpd => 0,
        Por | Orps | Orpd | Vpor | Vorps | Vorpd => 1,
        Pxor | Xorps | Xorpd | Vpxor | Vxorps | Vxorpd => 2,
        _ => 3,
    }
}

fn logic<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let b = read_x(e, i, 1, true)?;
    let a = read_x(e, i, 0, true)?;
    let x = combine(e, i.aux, a, b)?;
    write_x(e, i, 0, x, false)
}

/// The operation that [`logic_kind`] numbers.
#[inline(always)]
pub(super) fn combine<E: Emit>(e: &mut E, kind: u16, a: E::X, b: E::X) -> Result<E::X, E::Trap> {
    let op = match kind {
        0 => VecOp::Pand,
        1 => VecOp::Por,
        2 => VecOp::Pxor,
        _ => VecOp::Pandn,
    };
    e.lane(LaneOp::Two(op), a, b, a)
}

// ---- packed integers ----

fn binary<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let b = read_x(e, i, 1, true)?;
    let a = read_x(e, i, 0, true)?;
    let Some(op) = VecOp::from_number(i.aux) else { return Err(e.unsupported()) };
    let r = e.lane(LaneOp::Two(op), a, b, a)?;
    write_x(e, i, 0, r, false)
}

fn immediate_one<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let a = read_x(e, i, 0, true)?;
    let Some(op) = VecImmOp::from_number(i.aux) else { return Err(e.unsupported()) };
    let r = e.lane(LaneOp::Immediate(op, i.imm as u8), a, a, a)?;
    write_x(e, i, 0, r, false)
}

fn immediate_two<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let b = read_x(e, i, 1, true)?;
    let Some(op) = VecImmOp::from_number(i.aux) else { return Err(e.unsupported()) };
    // Operations of one source read their first operand.
    let one_source = matches!(op, VecImmOp::Pshufd | VecImmOp::Pshufhw | VecImmOp::Pshuflw | VecImmOp::Aeskeygenassist);
    let a = if one_source { b } else { read_x(e, i, 0, true)? };
    let r = e.lane(LaneOp::Immediate(op, i.imm as u8), a, b, a)?;
    write_x(e, i, 0, r, false)
}

/// Loads `bytes` bytes of operand 1, zero-extended, or the whole register.
#[inline(always)]
pub(super) fn partial<E: Emit>(e: &mut E, i: &Insn, n: usize, bytes: u32) -> Result<E::X, E::Trap> {
    if i.op[n] != Opnd::Mem || bytes >= 16 {
        return read_x(e, i, n, true);
    }
    let ea = e.ea(i);
    match bytes {
        1 => e.load_x_low::<W8>(i, ea),
        2 => e.load_x_low::<W16>(i, ea),
        4 => e.load_x_low::<W32>(i, ea),
        _ => e.load_x_low::<W64>(i, ea),
    }
}

fn unary<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let Some(op) = VecUnOp::from_number(i.aux) else { return Err(e.unsupported()) };
    let a = partial(e, i, 1, op.source_bytes())?;
    let r = e.lane(LaneOp::One(op), a, a, a)?;
    write_x(e, i, 0, r, false)
}

pub(super) fn ternary_number(i: &Instruction) -> u16 {
    (match i.mnemonic() {
        Mnemonic::Blendvps | Mnemonic::Vblendvps => VecTerOp::Blendvps,
        Mnemonic::Blendvpd | Mnemonic::Vblendvpd => VecTerOp::Blendvpd,
        Mnemonic::Pblendvb | Mnemonic::Vpblendvb => VecTerOp::Pblendvb,
        _ => VecTerOp::Sha256rnds2,
    }) as u16
}

fn ternary<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let b = read_x(e, i, 1, true)?;
    let a = read_x(e, i, 0, true)?;
    let Some(op) = VecTerOp::from_number(i.aux) else { return Err(e.unsupported()) };
    let mask = e.xmm(0);
    let r = e.lane(LaneOp::Three(op), a, b, mask)?;
    write_x(e, i, 0, r, false)
}

fn insertps(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let b = partial(cpu, i, 1, 4)?;
    let a = read_x(cpu, i, 0, true)?;
    // A memory operand is one element, so its selector does not count.
    let imm = if i.op[1] == Opnd::Mem { i.imm as u8 & 0x3f } else { i.imm as u8 };
    write_x(cpu, i, 0, simd::eval_imm(VecImmOp::Insertps, a, b, imm), false)
}

pub(super) fn element_bytes(i: &Instruction) -> u16 {
    use Mnemonic::*;
    match i.mnemonic() {
        Pinsrb | Pextrb | Vpinsrb | Vpextrb => 1,
        Pinsrw | Pextrw | Vpinsrw | Vpextrw => 2,
        Pinsrq | Pextrq | Vpinsrq | Vpextrq => 8,
        _ => 4,
    }
}

fn pinsr(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let v = match (i.op[1], i.aux) {
        (Opnd::Gpr(r), _) => cpu.gpr::<W64>(r),
        (_, 1) => cpu.read::<W8>(i, 1)?,
        (_, 2) => cpu.read::<W16>(i, 1)?,
        (_, 4) => cpu.read::<W32>(i, 1)?,
        _ => cpu.read::<W64>(i, 1)?,
    };
    let a = read_x(cpu, i, 0, false)?;
    write_x(cpu, i, 0, simd::imm::insert(a, v, u32::from(i.aux), i.imm as u8), false)
}

pub(super) fn pextr(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let a = read_x(cpu, i, 1, false)?;
    let v = simd::imm::extract(a, u32::from(i.aux), i.imm as u8);
    match (i.op[0], i.aux) {
        (Opnd::Gpr(r), _) => {
            // Zero-extended into the whole register.
            cpu.set_gpr::<W64>(r, v);
            Ok(())
        }
        (_, 1) => cpu.write::<W8>(i, 0, v),
        (_, 2) => cpu.write::<W16>(i, 0, v),
        (_, 4) => cpu.write::<W32>(i, 0, v),
        _ => cpu.write::<W64>(i, 0, v),
    }
}

/// Bytes of an element whose sign a move of masks takes.
pub(super) fn mask_bytes(i: &Instruction) -> u16 {
    use Mnemonic::*;
    match i.mnemonic() {
        Pmovmskb | Vpmovmskb => 1,
        Movmskps | Vmovmskps => 4,
        _ => 8,
    }
}

fn move_mask<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let a = read_x(e, i, 1, false)?;
    let Opnd::Gpr(r) = i.op[0] else { return Err(e.unsupported()) };
    let v = e.signs(a, i.aux as u8);
    e.set_gpr::<W64>(r, v);
    Ok(())
}

fn ptest(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let b = read_x(cpu, i, 1, true)?;
    let a = read_x(cpu, i, 0, false)?;
    let t = simd::flags::ptest(a, b);
    cpu.s.set_status(bit(t.zf, flag::ZF) | bit(t.cf, flag::CF));
    Ok(())
}

pub(super) fn bit(on: bool, f: u64) -> u64 {
    if on { f } else { 0 }
}

/// Bit 0: explicit lengths; bit 1: the result is a mask; bit 2: the lengths are quadwords.
pub(super) fn string_kind(i: &Instruction) -> u16 {
    use Mnemonic::*;
    match i.mnemonic() {
        Pcmpistri | Vpcmpistri => 0,
        Pcmpestri | Vpcmpestri => 1,
        Pcmpestri64 | Vpcmpestri64 => 5,
        Pcmpistrm | Vpcmpistrm => 2,
        Pcmpestrm | Vpcmpestrm => 3,
        _ => 7,
    }
}

pub(super) fn string_compare(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let b = read_x(cpu, i, 1, false)?;
    let a = read_x(cpu, i, 0, false)?;
    let imm = i.imm as u8;
    let wide = i.aux & 4 != 0;
    let len = |cpu: &mut Cpu, r| {
        let v = cpu.gpr::<W64>(r);
        if wide { v as i64 } else { i64::from(v as i32) }
    };
    let r = if i.aux & 1 != 0 {
        let (la, lb) = (len(cpu, gpr::RAX), len(cpu, gpr::RDX));
        simd::strings::pcmpestr(a, la, b, lb, imm)
    } else {
        simd::strings::pcmpistr(a, b, imm)
    };
    if i.aux & 2 != 0 {
        cpu.s.set_xmm(0, r.mask);
    } else {
        cpu.set_gpr::<W64>(gpr::RCX, u64::from(r.index));
    }
    cpu.s.set_status(bit(r.cf, flag::CF) | bit(r.zf, flag::ZF) | bit(r.sf, flag::SF) | bit(r.of, flag::OF));
    Ok(())
}

pub(super) fn maskmovdqu(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let (Opnd::Xmm(a), Opnd::Xmm(m)) = (i.op[1], i.op[2]) else { return Err(cpu.ud()) };
    let at = cpu.gpr::<W64>(gpr::RDI);
    let at = cpu.cut_address(i, at);
    let linear = cpu.linearize(i.seg, at, 16, true)?;
    // Processors store two halves.
    cpu.check_alignment(linear, 8)?;
    cpu.probe_write(linear, 16)?;
    let (data, mask) = (cpu.s.xmm(a).to_le_bytes(), cpu.s.xmm(m).to_le_bytes());
    for k in (0..16).filter(|&k| mask[k] & 0x80 != 0) {
        cpu.store_linear::<W8>(cpu.wrap_linear(linear.wrapping_add(k as u64)), u64::from(data[k]))?;
    }
    Ok(())
}

// ---- floating point ----

pub(super) fn ldmxcsr(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let v = cpu.read::<W32>(i, 0)? as u32;
    if v & !super::xsave::MXCSR_MASK != 0 {
        return Err(cpu.gp(0));
    }
    cpu.s.mxcsr = v;
    Ok(())
}

pub(super) fn stmxcsr(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let v = u64::from(cpu.s.mxcsr);
    cpu.write::<W32>(i, 0, v)
}

/// The format by the mnemonic's last letters: 0 PS, 1 PD, 2 SS, 3 SD.
pub(super) fn format(i: &Instruction) -> u16 {
    let name = format!("{:?}", i.mnemonic());
    match &name[name.len() - 2..] {
        "ps" => 0,
        "pd" => 1,
        "ss" => 2,
        _ => 3,
    }
}

pub(super) fn fmt_of(n: u16) -> FpFmt {
    [FpFmt::Ps, FpFmt::Pd, FpFmt::Ss, FpFmt::Sd][usize::from(n & 3)]
}

fn fmt_bytes(f: FpFmt) -> u32 {
    match f {
        FpFmt::Ps | FpFmt::Pd => 16,
        FpFmt::Ss => 4,
        FpFmt::Sd => 8,
    }
}

/// The arithmetic operation of a mnemonic.
pub(super) fn arithmetic(m: Mnemonic) -> Option<FpOp> {
    use Mnemonic::*;
    Some(match m {
        Addps | Addpd | Addss | Addsd => FpOp::Add,
        Subps | Subpd | Subss | Subsd => FpOp::Sub,
        Mulps | Mulpd | Mulss | Mulsd => FpOp::Mul,
        Divps | Divpd | Divss | Divsd => FpOp::Div,
        Minps | Minpd | Minss | Minsd => FpOp::Min,
        Maxps | Maxpd | Maxss | Maxsd => FpOp::Max,
        Sqrtps | Sqrtpd | Sqrtss | Sqrtsd => FpOp::Sqrt,
        Addsubps | Addsubpd => FpOp::AddSub,
        Haddps | Haddpd => FpOp::HAdd,
        Hsubps | Hsubpd => FpOp::HSub,
        Rcpps | Rcpss => FpOp::Rcp,
        Rsqrtps | Rsqrtss => FpOp::Rsqrt,
        _ => return None,
    })
}

fn arithmetic_number(i: &Instruction) -> u16 {
    arithmetic(i.mnemonic()).map_or(0, |op| op as u16) << 2 | format(i)
}

/// Evaluates a floating-point operation on operands 0 and 1 of the format's size.
#[inline(always)]
fn evaluate<E: Emit>(e: &mut E, i: &Insn, op: FpCall, bytes: u32) -> Result<(), E::Trap> {
    let b = partial(e, i, 1, bytes)?;
    let a = read_x(e, i, 0, true)?;
    let (r, _) = e.fp(op, FpArgs::two(a, b), None)?;
    write_x(e, i, 0, r, false)
}

fn arith<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let f = fmt_of(i.aux);
    let Some(op) = FpOp::from_number(i.aux >> 2) else { return Err(e.unsupported()) };
    evaluate(e, i, FpCall::Arith(op, f), fmt_bytes(f))
}

fn dot<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    evaluate(e, i, FpCall::Dot(fmt_of(i.aux), i.imm as u8), 16)
}

fn compare<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let f = fmt_of(i.aux);
    evaluate(e, i, FpCall::Compare(f, i.imm as u8 & 7), fmt_bytes(f))
}

fn round<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let f = fmt_of(i.aux);
    evaluate(e, i, FpCall::Round(f, i.imm as u8), fmt_bytes(f))
}

/// Bit 0: double; bit 1: quiet.
pub(super) fn comi_kind(i: &Instruction) -> u16 {
    use Mnemonic::*;
    let (double, quiet) = match i.mnemonic() {
        Comisd | Vcomisd => (1, 0),
        Ucomiss | Vucomiss => (0, 1),
        Ucomisd | Vucomisd => (1, 1),
        _ => (0, 0),
    };
    double | quiet << 1
}

pub(super) fn comi<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let f = if i.aux & 1 != 0 { FpFmt::Sd } else { FpFmt::Ss };
    let b = partial(e, i, 1, fmt_bytes(f))?;
    let a = read_x(e, i, 0, true)?;
    e.fp_comi(f, i.aux & 2 != 0, a, b)
}

fn from_int<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    use iced_x86::Code::*;
    let wide = matches!(i.iced_code(), Cvtsi2ss_xmm_rm64 | Cvtsi2sd_xmm_rm64);
    let v = low_int(e, i, 1, wide)?;
    let a = read_x(e, i, 0, false)?;
    let r = e.fp_from_int(fmt_of(i.aux), wide, a, v)?;
    write_x(e, i, 0, r, false)
}

/// An integer operand of 64 bits if `wide`, else of 32, zero-extended.
#[inline(always)]
pub(super) fn low_int<E: Emit>(e: &mut E, i: &Insn, n: usize, wide: bool) -> Result<E::V, E::Trap> {
    if wide {
        return e.read::<W64>(i, n);
    }
    let v = e.read::<W32>(i, n)?;
    Ok(e.zext::<W32, W64>(v))
}

/// Bit 0: double; bit 1: truncate.
pub(super) fn to_int_kind(i: &Instruction) -> u16 {
    use Mnemonic::*;
    let (double, truncate) = match i.mnemonic() {
        Cvtsd2si | Vcvtsd2si => (1, 0),
        Cvttss2si | Vcvttss2si => (0, 1),
        Cvttsd2si | Vcvttsd2si => (1, 1),
        _ => (0, 0),
    };
    double | truncate << 1
}

pub(super) fn to_int<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let f = if i.aux & 1 != 0 { FpFmt::Sd } else { FpFmt::Ss };
    let b = partial(e, i, 1, fmt_bytes(f))?;
    let Opnd::Gpr(r) = i.op[0] else { return Err(e.unsupported()) };
    let v = e.fp_to_int(f, i.osize == 8, i.aux & 2 != 0, b)?;
    e.set_gpr::<W64>(r, v);
    Ok(())
}

/// The conversion between vector formats of a mnemonic, and the bytes of its source in memory.
pub(super) fn conversion(m: Mnemonic) -> Option<(CvtOp, u32)> {
    use Mnemonic::*;
    Some(match m {
        Cvtdq2ps => (CvtOp::Cvtdq2ps, 16),
        Cvtps2dq => (CvtOp::Cvtps2dq, 16),
        Cvttps2dq => (CvtOp::Cvttps2dq, 16),
        Cvtdq2pd => (CvtOp::Cvtdq2pd, 8),
        Cvtpd2dq => (CvtOp::Cvtpd2dq, 16),
        Cvttpd2dq => (CvtOp::Cvttpd2dq, 16),
        Cvtps2pd => (CvtOp::Cvtps2pd, 8),
        Cvtpd2ps => (CvtOp::Cvtpd2ps, 16),
        Cvtss2sd => (CvtOp::Cvtss2sd, 4),
        Cvtsd2ss => (CvtOp::Cvtsd2ss, 8),
        _ => return None,
    })
}

fn conversion_number(i: &Instruction) -> u16 {
    conversion(i.mnemonic()).map_or(0, |(op, bytes)| (op as u16) << 8 | bytes as u16)
}

fn convert<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let Some(op) = CvtOp::from_number(i.aux >> 8) else { return Err(e.unsupported()) };
    evaluate(e, i, FpCall::Convert(op), u32::from(i.aux & 0xff))
}
