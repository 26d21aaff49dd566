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
    let enabled = cpu.s.cr4 & cr::CR4_OSXSAVE != 0 && cpu.s.xcr0 & 6 == 6;
    if enabled && cpu.s.cr0 & cr::CR0_TS != 0 {
        return Err(cpu.raise(Exception::plain(vector::NM)));
    }
    Err(cpu.ud())
}

/// Operand `n`, a vector register or memory; what it does not have reads as zeros.
fn read(cpu: &mut Cpu, i: &Insn, n: usize) -> Result<Ymm, Trap> {
    match i.op[n] {
        Opnd::Xmm(r) => Ok([cpu.s.xmm(r), 0]),
        Opnd::Ymm(r) => Ok([cpu.s.xmm(r), cpu.s.ymm_high(r)]),
        Opnd::Mem => {
            let ea = cpu.ea(i);
            Ok(match i.mem_bytes {
                1 => [cpu.load::<W8>(i, i.seg, ea)?.into(), 0],
                2 => [cpu.load::<W16>(i, i.seg, ea)?.into(), 0],
                4 => [cpu.load::<W32>(i, i.seg, ea)?.into(), 0],
                8 => [cpu.load::<W64>(i, i.seg, ea)?.into(), 0],
                16 => [cpu.load_x(i, ea, false)?, 0],
                _ => {
                    let low = cpu.load_x(i, ea, false)?;
                    let above = cpu.cut_address(i, ea.wrapping_add(16));
                    [low, cpu.load_x(i, above, false)?]
                }
            })
        }
        _ => Err(cpu.ud()),
    }
}

/// Writes vector register operand 0; for an XMM register bits 255:128 become 0.
fn write(cpu: &mut Cpu, i: &Insn, v: Ymm) -> Result<(), Trap> {
    match i.op[0] {
        Opnd::Xmm(r) => {
            cpu.s.set_xmm(r, v[0]);
            cpu.s.set_ymm_high(r, 0);
        }
        Opnd::Ymm(r) => {
            cpu.s.set_xmm(r, v[0]);
            cpu.s.set_ymm_high(r, v[1]);
        }
        _ => return Err(cpu.ud()),
    }
    Ok(())
}

/// Whether operand `n` is a YMM register.
fn is_wide(i: &Insn, n: usize) -> bool {
    matches!(i.op[n], Opnd::Ymm(_))
}

/// A lane operation on the one or two lanes of the result.
fn lanes(i: &Insn, mut f: impl FnMut(usize) -> u128) -> Ymm {
    [f(0), if is_wide(i, 0) { f(1) } else { 0 }]
}
