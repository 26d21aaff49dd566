//! VEX packed-integer, shuffle and permute instructions.

use std::collections::HashMap;
use std::sync::OnceLock;

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{Lanes, get, is_wide, put, read, write};
use crate::cpu::Cpu;
use crate::emit::{Bin, Emit, LaneOp};
use crate::exception::Trap;
use crate::insn::{Insn, Opnd};
use crate::semantics::{Sem, both, interp, sse};
use crate::simd::{self, VecImmOp, VecOp, VecTerOp, VecUnOp, wide};
use crate::state::flag;
use crate::width::{W8, W16, W32, W64};

/// Lane operations by their mnemonics.
struct Names {
    binary: HashMap<Mnemonic, u16>,
    immediate: HashMap<Mnemonic, u16>,
    unary: HashMap<Mnemonic, u16>,
}

fn names() -> &'static Names {
    static NAMES: OnceLock<Names> = OnceLock::new();
    NAMES.get_or_init(|| {
        use Mnemonic::*;
        let mut binary = sse::numbers(VecOp::ALL, "V");
        binary.extend([
            (Vunpcklps, VecOp::Punpckldq as u16),
            (Vunpckhps, VecOp::Punpckhdq as u16),
            (Vunpcklpd, VecOp::Punpcklqdq as u16),
            (Vunpckhpd, VecOp::Punpckhqdq as u16),
        ]);
        let mut immediate = sse::numbers(VecImmOp::ALL, "V");
        immediate.remove(&Vinsertps);
        immediate.insert(Vpblendd, VecImmOp::Blendps as u16);
        let mut unary = sse::numbers(VecUnOp::ALL, "V");
        unary.extend([
            (Vpbroadcastb, VecUnOp::Broadcastb as u16),
            (Vpbroadcastw, VecUnOp::Broadcastw as u16),
            (Vpbroadcastd, VecUnOp::Broadcastd as u16),
            (Vpbroadcastq, VecUnOp::Broadcastq as u16),
            (Vbroadcastss, VecUnOp::Broadcastd as u16),
            (Vbroadcastsd, VecUnOp::Broadcastq as u16),
        ]);
        Names { binary, immediate, unary }
    })
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

/// The semantics of an integer or shuffle instruction.
pub(super) fn find(i: &Instruction) -> Option<&'static Sem> {
    use Mnemonic::*;
    let immediate = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Immediate8);
    Some(match i.mnemonic() {
        Vpermq | Vpermpd => interp!(permq),
        Vpermd | Vpermps => interp!(permd),
        Vperm2f128 | Vperm2i128 => interp!(perm2x128),
        Vinsertps => interp!(insertps),
        Vpinsrb | Vpinsrw | Vpinsrd | Vpinsrq => interp!(pinsr; aux = sse::element_bytes),
        Vpextrb | Vpextrw | Vpextrd | Vpextrq | Vextractps => interp!(sse::pextr; aux = sse::element_bytes),
        Vpmovmskb | Vmovmskps | Vmovmskpd => both!(move_mask; aux = sse::mask_bytes),
        Vptest | Vtestps | Vtestpd => interp!(test; aux = test_kind),
        Vpcmpestri | Vpcmpestri64 | Vpcmpistri => interp!(sse::string_compare; aux = sse::string_kind),
        Vpcmpestrm | Vpcmpestrm64 | Vpcmpistrm => interp!(string_mask; aux = sse::string_kind),
        Vblendvps | Vblendvpd | Vpblendvb => both!(blend; aux = sse::ternary_number),
        Vpsllw | Vpslld | Vpsllq | Vpsrlw | Vpsrld | Vpsrlq | Vpsraw | Vpsrad if immediate => {
            both!(with_immediate; aux = sse::shift_number)
        }
        m if immediate && names().immediate.contains_key(&m) => both!(with_immediate; aux = immediate_number),
        m if !immediate && names().binary.contains_key(&m) => both!(binary; aux = binary_number),
        m if names().unary.contains_key(&m) => both!(unary; aux = unary_number),
        _ => return None,
    })
}

/// A lane operation on the one or two lanes of the result; `upper` is the operation on the upper one.
#[inline(always)]
fn lanes<E: Emit>(e: &mut E, i: &Insn, (op, upper): (LaneOp, LaneOp), [a, b, c]: [Lanes<E>; 3]) -> Result<(), E::Trap> {
    let low = e.lane(op, a.0, b.0, c.0)?;
    let high = match (a.1, b.1, c.1) {
        (Some(a), Some(b), Some(c)) if is_wide(i, 0) => Some(e.lane(upper, a, b, c)?),
        _ => None,
    };
    put(e, i, (low, high))
}

fn binary<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    use VecOp::*;
    let mut b = get(e, i, 2)?;
    let a = get(e, i, 1)?;
    let Some(op) = VecOp::from_number(i.aux) else { return Err(e.unsupported()) };
    if matches!(op, Psllw | Pslld | Psllq | Psrlw | Psrld | Psrlq | Psraw | Psrad) {
        // Both lanes are shifted by the one count, which is 128 bits in either form.
        b.1 = Some(b.0);
    }
    lanes(e, i, (LaneOp::Two(op), LaneOp::Two(op)), [a, b, a])
}

/// One source or two, and an immediate.
fn with_immediate<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let one = i.op[2] == Opnd::Imm;
    let b = get(e, i, if one { 1 } else { 2 })?;
    let a = if one { b } else { get(e, i, 1)? };
    let Some(op) = VecImmOp::from_number(i.aux) else { return Err(e.unsupported()) };
    let imm = i.imm as u8;
    lanes(e, i, (LaneOp::Immediate(op, imm), LaneOp::Immediate(op, op.upper_lane_imm(imm))), [a, b, a])
}

fn unary<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let (a, mut high) = get(e, i, 1)?;
    let Some(op) = VecUnOp::from_number(i.aux) else { return Err(e.unsupported()) };
    if let Some(shift) = op.upper_lane_shift().filter(|_| is_wide(i, 0)) {
        high = Some(match shift {
            0 => a,
            64 => {
                let (up, zero) = (e.x_high(a), e.imm::<W64>(0));
                e.x_make(up, zero)
            }
            _ => {
                let low = e.x_low(a);
                let (up, zero) = (e.bin_imm::<W64>(Bin::Shr, low, u64::from(shift)), e.imm::<W64>(0));
                e.x_make(up, zero)
            }
        });
    }
    lanes(e, i, (LaneOp::One(op), LaneOp::One(op)), [(a, high); 3])
}

fn blend<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let b = get(e, i, 2)?;
    let (a, mask) = (get(e, i, 1)?, get(e, i, 3)?);
    let Some(op) = VecTerOp::from_number(i.aux) else { return Err(e.unsupported()) };
    lanes(e, i, (LaneOp::Three(op), LaneOp::Three(op)), [a, b, mask])
}

fn permq(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let a = read(cpu, i, 1)?;
    write(cpu, i, wide::permq(a, i.imm as u8))
}

fn permd(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let b = read(cpu, i, 2)?;
    let index = read(cpu, i, 1)?;
    write(cpu, i, wide::permd(index, b))
}

fn perm2x128(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let b = read(cpu, i, 2)?;
    let a = read(cpu, i, 1)?;
    write(cpu, i, wide::perm2x128(a, b, i.imm as u8))
}

fn insertps(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let b = read(cpu, i, 2)?;
    let a = read(cpu, i, 1)?;
    // A memory operand is one element, so its selector does not count.
    let imm = if i.op[2] == Opnd::Mem { i.imm as u8 & 0x3f } else { i.imm as u8 };
    write(cpu, i, [simd::eval_imm(VecImmOp::Insertps, a[0], b[0], imm), 0])
}

fn pinsr(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let v = match (i.op[2], i.aux) {
        (Opnd::Gpr(r), _) => cpu.gpr::<W64>(r),
        (_, 1) => cpu.read::<W8>(i, 2)?,
        (_, 2) => cpu.read::<W16>(i, 2)?,
        (_, 4) => cpu.read::<W32>(i, 2)?,
        _ => cpu.read::<W64>(i, 2)?,
    };
    let a = read(cpu, i, 1)?;
    write(cpu, i, [simd::imm::insert(a[0], v, u32::from(i.aux), i.imm as u8), 0])
}

fn move_mask<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let (a, high) = get(e, i, 1)?;
    let Opnd::Gpr(r) = i.op[0] else { return Err(e.unsupported()) };
    let bytes = i.aux as u8;
    let mut v = e.signs(a, bytes);
    if let Some(high) = high {
        let up = e.signs(high, bytes);
        let up = e.bin_imm::<W64>(Bin::Shl, up, u64::from(16 / bytes.max(1)));
        v = e.or::<W64>(v, up);
    }
    e.set_gpr::<W64>(r, v);
    Ok(())
}

/// 0 every bit, 1 the signs of singles, 2 those of doubles.
fn test_kind(i: &Instruction) -> u16 {
    match i.mnemonic() {
        Mnemonic::Vptest => 0,
        Mnemonic::Vtestps => 1,
        _ => 2,
    }
}

fn test(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let b = read(cpu, i, 1)?;
    let a = read(cpu, i, 0)?;
    let one = match i.aux {
        0 => simd::flags::ptest,
        1 => simd::flags::testps,
        _ => simd::flags::testpd,
    };
    let mut t = one(a[0], b[0]);
    if is_wide(i, 0) {
        t = t.and(one(a[1], b[1]));
    }
    cpu.s.set_status(sse::bit(t.zf, flag::ZF) | sse::bit(t.cf, flag::CF));
    Ok(())
}

fn string_mask(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    sse::string_compare(cpu, i)?;
    cpu.s.set_ymm_high(0, 0);
    Ok(())
}
