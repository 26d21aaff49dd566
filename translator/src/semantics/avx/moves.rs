//! VEX moves, logic and whatever else only moves 64- or 128-bit parts about; generic, so that they compile.

use iced_x86::{CodeSize, Instruction, Mnemonic};

use super::{get, is_wide, put};
use crate::emit::{Bin, Emit, Word};
use crate::insn::{Insn, Opnd};
use crate::semantics::sse::{combine, logic_kind, low};
use crate::semantics::{Sem, both};
use crate::width::{W32, W64, Width};

/// The semantics of a move.
pub(super) fn find(i: &Instruction) -> Option<&'static Sem> {
    use Mnemonic::*;
    let three = i.op_count() == 3;
    Some(match i.mnemonic() {
        Vmovaps | Vmovapd | Vmovdqa | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa => both!(move_aligned),
        Vmovups | Vmovupd | Vmovdqu | Vlddqu => both!(move_unaligned),
        Vmovd => both!(move_low, W32),
        Vmovq => both!(move_low, W64),
        Vmovss if three => both!(merge_scalar, W32),
        Vmovss => both!(move_low, W32),
        Vmovsd if three => both!(merge_scalar, W64),
        Vmovsd => both!(move_low, W64),
        Vmovlps | Vmovlpd if three => both!(merge_scalar, W64),
        Vmovlps | Vmovlpd => both!(move_low, W64),
        Vmovhps | Vmovhpd | Vmovlhps if three => both!(merge_high),
        Vmovhps | Vmovhpd => both!(store_high),
        Vmovhlps => both!(movhlps),
        Vpand | Vandps | Vandpd | Vpor | Vorps | Vorpd | Vpxor | Vxorps | Vxorpd | Vpandn | Vandnps | Vandnpd => {
            both!(logic; aux = logic_kind)
        }
        Vinsertf128 | Vinserti128 => both!(insert_lane),
        Vextractf128 | Vextracti128 => both!(extract_lane),
        Vbroadcastf128 | Vbroadcasti128 => both!(broadcast_lane),
        Vzeroupper => both!(zero_upper; aux = registers),
        Vzeroall => both!(zero_all; aux = registers),
        _ => return None,
    })
}

/// `ea`, made odd if it is not 32-byte aligned: then an aligned 16-byte access to it raises #GP.
#[inline(always)]
fn odd_unless_aligned<E: Emit>(e: &mut E, i: &Insn, ea: E::V) -> E::V {
    let linear = if i.flat {
        ea
    } else {
        let base = e.word(Word::Base(i.seg));
        e.add::<W64>(ea, base)
    };
    let bit = e.bin_imm::<W64>(Bin::Shr, linear, 4);
    let bit = e.bin_imm::<W64>(Bin::And, bit, 1);
    e.or::<W64>(ea, bit)
}

/// Moves operand 1 to operand 0; `aligned` raises #GP for a misaligned memory operand.
#[inline(always)]
fn move_whole<E: Emit>(e: &mut E, i: &Insn, aligned: bool) -> Result<(), E::Trap> {
    let wide = is_wide(i, 0) || is_wide(i, 1);
    let memory = i.op[0] == Opnd::Mem || i.op[1] == Opnd::Mem;
    let at = if !memory {
        None
    } else if wide && aligned {
        let ea = e.ea(i);
        Some(odd_unless_aligned(e, i, ea))
    } else {
        Some(e.ea(i))
    };
    let (low, high) = match at {
        Some(ea) if i.op[1] == Opnd::Mem => {
            if wide && !aligned {
                e.check_extent(i, ea, 32)?;
            }
            if wide {
                let (low, high) = e.load_pair(i, ea, aligned)?;
                (low, Some(high))
            } else {
                (e.load_x(i, ea, aligned)?, None)
            }
        }
        _ => get(e, i, 1)?,
    };
    match (at, high) {
        (Some(ea), None) if i.op[0] == Opnd::Mem => e.store_x(i, ea, low, aligned),
        (Some(ea), Some(high)) if i.op[0] == Opnd::Mem => {
            if !aligned {
                // All must be writable before the first half is written; an aligned operand is in one page.
                e.probe_write(i, ea, 32)?;
            }
            e.store_pair(i, ea, (low, high), aligned)
        }
        _ => put(e, i, (low, high)),
    }
}

fn move_aligned<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    move_whole(e, i, true)
}

fn move_unaligned<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    move_whole(e, i, false)
}

/// The low `W` of operand 1, zero-extended into a vector register, or to a general one or memory.
fn move_low<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    if i.op[1] == Opnd::Mem {
        let v = get(e, i, 1)?;
        return put(e, i, v);
    }
    let v = low::<E, W>(e, i, 1)?;
    if let Opnd::Xmm(_) = i.op[0] {
        let zero = e.imm::<W64>(0);
        let x = e.x_make(v, zero);
        return put(e, i, (x, None));
    }
    let v = e.zext::<W64, W>(v);
    e.write::<W>(i, 0, v)
}

/// The low `W` of operand 2, the rest of operand 1.
fn merge_scalar<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let v = low::<E, W>(e, i, 2)?;
    let (rest, _) = get(e, i, 1)?;
    let (rest_low, high) = (e.x_low(rest), e.x_high(rest));
    let v = if W::BITS == 64 {
        v
    } else {
        let kept = e.bin_imm::<W64>(Bin::And, rest_low, !W::MASK);
        e.or::<W64>(kept, v)
    };
    let x = e.x_make(v, high);
    put(e, i, (x, None))
}

fn merge_high<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let v = low::<E, W64>(e, i, 2)?;
    let (rest, _) = get(e, i, 1)?;
    let rest = e.x_low(rest);
    let x = e.x_make(rest, v);
    put(e, i, (x, None))
}

fn store_high<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let (x, _) = get(e, i, 1)?;
    let v = e.x_high(x);
    e.write::<W64>(i, 0, v)
}

fn movhlps<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let (a, _) = get(e, i, 1)?;
    let (b, _) = get(e, i, 2)?;
    let (v, high) = (e.x_high(b), e.x_high(a));
    let x = e.x_make(v, high);
    put(e, i, (x, None))
}

fn logic<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let (b, b_high) = get(e, i, 2)?;
    let (a, a_high) = get(e, i, 1)?;
    let x = combine(e, i.aux, a, b)?;
    let high = match (a_high, b_high) {
        (Some(a), Some(b)) => Some(combine(e, i.aux, a, b)?),
        _ => None,
    };
    put(e, i, (x, high))
}

fn insert_lane<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let (lane, _) = get(e, i, 2)?;
    let (Opnd::Ymm(a), Opnd::Ymm(_)) = (i.op[1], i.op[0]) else { return Err(e.unsupported()) };
    let v = if i.imm & 1 == 0 { (lane, Some(e.ymm_high(a))) } else { (e.xmm(a), Some(lane)) };
    put(e, i, v)
}

fn extract_lane<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let Opnd::Ymm(a) = i.op[1] else { return Err(e.unsupported()) };
    let lane = if i.imm & 1 == 0 { e.xmm(a) } else { e.ymm_high(a) };
    if i.op[0] == Opnd::Mem {
        let ea = e.ea(i);
        return e.store_x(i, ea, lane, false);
    }
    put(e, i, (lane, None))
}

fn broadcast_lane<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let (lane, _) = get(e, i, 1)?;
    put(e, i, (lane, Some(lane)))
}

/// How many vector registers the code's mode has.
fn registers(i: &Instruction) -> u16 {
    if i.code_size() == CodeSize::Code64 { 16 } else { 8 }
}

fn zero_upper<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    for r in 0..i.aux as u8 {
        let zero = e.x_imm(0);
        e.set_ymm_high(r, zero);
    }
    Ok(())
}

fn zero_all<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    for r in 0..i.aux as u8 {
        let zero = e.x_imm(0);
        e.set_xmm(r, zero);
    }
    zero_upper(e, i)
}
