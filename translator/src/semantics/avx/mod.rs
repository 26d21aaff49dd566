//! AVX, AVX2, FMA and F16C (SDM vol. 1 chapter 14): the VEX encodings, over [`crate::simd`].
//!
//! They differ from the legacy SSE forms in having a destination of their own, in unaligned memory operands, in 256-bit
//! forms, and in that the 128-bit forms clear bits 255:128 of the destination.

mod float;
mod memory;
mod moves;
mod packed;
#[cfg(test)]
mod tests;

use iced_x86::{CpuidFeature, EncodingKind};

use crate::cpu::Cpu;
use crate::emit::Emit;
use crate::exception::{Exception, Trap, vector};
use crate::insn::{Insn, Mode, Opnd};
use crate::semantics::{Form, Sem, interp};
use crate::simd::wide::Ymm;
use crate::state::cr;
use crate::width::{W8, W16, W32, W64};

/// The group's semantics.
pub fn lookup(form: &Form<'_>) -> Option<&'static Sem> {
    use CpuidFeature::*;
    let i = form.instr;
    let avx = [AVX, AVX2, FMA, F16C];
    if i.encoding() != EncodingKind::VEX || !i.cpuid_features().iter().any(|f| avx.contains(f)) {
        return None;
    }
    let sem = moves::find(i).or_else(|| memory::find(i)).or_else(|| packed::find(i)).or_else(|| float::find(i))?;
    Some(if form.mode.has(Mode::AVX) { sem } else { interp!(unavailable) })
}

/// #UD or #NM: the mode does not allow AVX.
fn unavailable(cpu: &mut Cpu, _: &Insn) -> Result<(), Trap> {
    if cpu.s.avx_enabled() && cpu.s.cr0 & cr::CR0_TS != 0 {
        return Err(cpu.raise(Exception::plain(vector::NM)));
    }
    Err(cpu.ud())
}

/// A 128-bit value, or a 256-bit one with its upper lane.
type Lanes<E> = (<E as Emit>::X, Option<<E as Emit>::X>);

/// Operand `n`, a vector register or memory; of a memory operand shorter than a lane the rest is zeros.
#[inline(always)]
fn get<E: Emit>(e: &mut E, i: &Insn, n: usize) -> Result<Lanes<E>, E::Trap> {
    match i.op[n] {
        Opnd::Xmm(r) => Ok((e.xmm(r), None)),
        Opnd::Ymm(r) => Ok((e.xmm(r), Some(e.ymm_high(r)))),
        Opnd::Mem => {
            let ea = e.ea(i);
            Ok(match i.mem_bytes {
                1 => (e.load_x_low::<W8>(i, ea)?, None),
                2 => (e.load_x_low::<W16>(i, ea)?, None),
                4 => (e.load_x_low::<W32>(i, ea)?, None),
                8 => (e.load_x_low::<W64>(i, ea)?, None),
                16 => (e.load_x(i, ea, false)?, None),
                bytes => {
                    e.check_extent(i, ea, bytes.into())?;
                    let (low, high) = e.load_pair(i, ea, false)?;
                    (low, Some(high))
                }
            })
        }
        _ => Err(e.unsupported()),
    }
}

/// Writes vector register operand 0; without an upper lane bits 255:128 become 0.
#[inline(always)]
fn put<E: Emit>(e: &mut E, i: &Insn, (low, high): Lanes<E>) -> Result<(), E::Trap> {
    let (Opnd::Xmm(r) | Opnd::Ymm(r)) = i.op[0] else { return Err(e.unsupported()) };
    e.set_xmm(r, low);
    let high = match high {
        Some(high) => high,
        None => e.x_imm(0),
    };
    e.set_ymm_high(r, high);
    Ok(())
}

/// [`get`] on numbers; the upper lane of what has none reads as zeros.
fn read(cpu: &mut Cpu, i: &Insn, n: usize) -> Result<Ymm, Trap> {
    let (low, high) = get(cpu, i, n)?;
    Ok([low, high.unwrap_or(0)])
}

/// [`put`] on numbers.
fn write(cpu: &mut Cpu, i: &Insn, v: Ymm) -> Result<(), Trap> {
    put(cpu, i, (v[0], is_wide(i, 0).then_some(v[1])))
}

/// Whether operand `n` is a YMM register.
fn is_wide(i: &Insn, n: usize) -> bool {
    matches!(i.op[n], Opnd::Ymm(_))
}
