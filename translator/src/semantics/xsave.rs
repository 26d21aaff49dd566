//! FXSAVE, FXRSTOR and the XSAVE family (SDM vol. 1 §10.5, chapter 13): x87, SSE and AVX state as memory blocks.

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::Cpu;
use crate::emit::Emit;
use crate::exception::{Exception, Trap, vector};
use crate::insn::{Insn, Mode};
use crate::semantics::{Form, Sem, interp};
use crate::state::{cr, gpr, seg};
use crate::width::W32;
use crate::x87::X87;
use crate::xsave_area::{self, FIXED, HEADER, component};

/// Size of an area without PKRU, the only component that may be far behind it.
const AREA: usize = 832;
const AVX: usize = FIXED;
/// XCOMP_BV bit of the compacted format.
const COMPACT: u64 = 1 << 63;
/// MXCSR bits that may be set.
pub const MXCSR_MASK: u32 = 0xffff;
const MXCSR_INIT: u32 = 0x1f80;

/// The group's semantics; `aux` bit 0 tells the 64-bit forms.
pub fn lookup(form: &Form<'_>) -> Option<&'static Sem> {
    use Mnemonic::*;
    Some(match form.instr.mnemonic() {
        Fxsave | Fxsave64 => interp!(fxsave; aux = wide),
        Fxrstor | Fxrstor64 => interp!(fxrstor; aux = wide),
        Xsave | Xsave64 => interp!(xsave; aux = wide),
        Xsaveopt | Xsaveopt64 => interp!(xsaveopt; aux = wide),
        Xsavec | Xsavec64 => interp!(xsavec; aux = wide),
        Xrstor | Xrstor64 => interp!(xrstor; aux = wide),
        _ => return None,
    })
}

fn wide(i: &Instruction) -> u16 {
    use Mnemonic::*;
    u16::from(matches!(i.mnemonic(), Fxsave64 | Fxrstor64 | Xsave64 | Xsaveopt64 | Xsavec64 | Xrstor64))
}

fn task_switched(cpu: &mut Cpu) -> Result<(), Trap> {
    if cpu.s.cr0 & cr::CR0_TS != 0 { Err(cpu.raise(Exception::plain(vector::NM))) } else { Ok(()) }
}

/// The linear address of the area, aligned to `align` or #GP.
fn area(cpu: &mut Cpu, i: &Insn, bytes: u64, align: u64, write: bool) -> Result<u64, Trap> {
    let ea = cpu.ea(i);
    let linear = cpu.linearize(i.seg, ea, bytes, write)?;
    cpu.through_ss = i.seg == seg::SS;
    cpu.check_canonical(linear, 1)?;
    if linear & (align - 1) != 0 {
        return Err(cpu.gp(0));
    }
    Ok(linear)
}

/// XMM registers that the mode has.
fn xmm_count(cpu: &Cpu) -> u8 {
    if cpu.mode.has(Mode::CODE64) { 16 } else { 8 }
}

fn put_xmm(cpu: &Cpu, block: &mut [u8]) {
    for r in 0..xmm_count(cpu) {
        let at = 160 + 16 * usize::from(r);
        block[at..at + 16].copy_from_slice(&cpu.s.xmm(r).to_le_bytes());
    }
}

fn take_u128(block: &[u8], at: usize) -> u128 {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&block[at..at + 16]);
    u128::from_le_bytes(bytes)
}

fn take_u64(block: &[u8], at: usize) -> u64 {
    take_u128(block, at) as u64
}

fn put_mxcsr(cpu: &Cpu, block: &mut [u8]) {
    block[24..28].copy_from_slice(&cpu.s.mxcsr.to_le_bytes());
    block[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
}

fn fxsave(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    if cpu.s.cr0 & (cr::CR0_EM | cr::CR0_TS) != 0 {
        return Err(cpu.raise(Exception::plain(vector::NM)));
    }
    let linear = area(cpu, i, 512, 16, true)?;
    cpu.probe_write(linear, 512)?;
    // Bytes 464–511 are the software's and stay as they are.
    let mut block = [0; 512];
    cpu.load_bytes(linear, &mut block)?;
    cpu.s.x87.fxsave(&mut block, i.aux != 0);
    if cpu.s.cr4 & cr::CR4_OSFXSR != 0 {
        put_mxcsr(cpu, &mut block);
        put_xmm(cpu, &mut block);
    }
    cpu.store_bytes(linear, &block[..464])
}

fn fxrstor(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    if cpu.s.cr0 & (cr::CR0_EM | cr::CR0_TS) != 0 {
        return Err(cpu.raise(Exception::plain(vector::NM)));
    }
    let linear = area(cpu, i, 512, 16, false)?;
    let mut block = [0; 512];
    cpu.load_bytes(linear, &mut block)?;
    let sse = cpu.s.cr4 & cr::CR4_OSFXSR != 0;
    let mxcsr = take_u64(&block, 24) as u32;
    if sse && mxcsr & !MXCSR_MASK != 0 {
        return Err(cpu.gp(0));
    }
    cpu.s.x87.fxrstor(&block, i.aux != 0);
    if sse {
        cpu.s.mxcsr = mxcsr;
        for r in 0..xmm_count(cpu) {
            cpu.s.set_xmm(r, take_u128(&block, 160 + 16 * usize::from(r)));
        }
    }
    Ok(())
}

/// The checks that all of the XSAVE family share; gives the requested-feature bitmap.
fn requested(cpu: &mut Cpu) -> Result<u64, Trap> {
    if cpu.s.cr4 & cr::CR4_OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    task_switched(cpu)?;
    Ok((cpu.gpr::<W32>(gpr::RAX) | cpu.gpr::<W32>(gpr::RDX) << 32) & cpu.s.xcr0)
}

/// The components that are not in their initial state.
fn in_use(cpu: &Cpu) -> u64 {
    let mut mask = 0;
    if !cpu.s.x87.is_initial() {
        mask |= component::X87;
    }
    let n = usize::from(xmm_count(cpu));
    if cpu.s.ymm[..n].iter().any(|y| y[0] | y[1] != 0) {
        mask |= component::SSE;
    }
    if cpu.s.ymm[..n].iter().any(|y| y[2] | y[3] != 0) {
        mask |= component::AVX;
    }
    if cpu.s.pkru != 0 {
        mask |= component::PKRU;
    }
    mask
}

/// The saving instructions: they treat components in their initial state, and lay the area out, differently.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Variant {
    Plain,
    Optimised,
    Compact,
}

fn xsave(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    save(cpu, i, Variant::Plain)
}

fn xsaveopt(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    save(cpu, i, Variant::Optimised)
}

fn xsavec(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    save(cpu, i, Variant::Compact)
}

fn save(cpu: &mut Cpu, i: &Insn, variant: Variant) -> Result<(), Trap> {
    let rfbm = requested(cpu)?;
    let size = if rfbm & component::AVX != 0 { AREA } else { AVX };
    let linear = area(cpu, i, size as u64, 64, true)?;
    cpu.probe_write(linear, size as u64)?;
    let pkru = linear.wrapping_add(pkru_offset((variant == Variant::Compact).then_some(rfbm)));
    if rfbm & component::PKRU != 0 {
        cpu.probe_write(pkru, 8)?;
    }
    let mut block = [0; AREA];
    cpu.load_bytes(linear, &mut block[..size])?;
    let mut used = in_use(cpu);
    // XSAVEC has no other place to say that MXCSR is not initial (SDM vol. 1 §13.10).
    if variant == Variant::Compact && cpu.s.mxcsr != MXCSR_INIT {
        used |= component::SSE;
    }
    let write = if variant == Variant::Plain { rfbm } else { rfbm & used };
    if write & component::X87 != 0 {
        let mut legacy = [0; 512];
        legacy.copy_from_slice(&block[..512]);
        cpu.s.x87.fxsave(&mut legacy, i.aux != 0);
        block[..24].copy_from_slice(&legacy[..24]);
        block[32..160].copy_from_slice(&legacy[32..160]);
    }
    // MXCSR belongs to the SSE and AVX components alike (SDM vol. 1 §13.7–13.10).
    let with_mxcsr = if variant == Variant::Compact {
        write & component::SSE != 0
    } else {
        rfbm & (component::SSE | component::AVX) != 0
    };
    if with_mxcsr {
        put_mxcsr(cpu, &mut block);
    }
    if write & component::SSE != 0 {
        put_xmm(cpu, &mut block);
    }
    if write & component::AVX != 0 {
        for r in 0..xmm_count(cpu) {
            let at = AVX + 16 * usize::from(r);
            block[at..at + 16].copy_from_slice(&cpu.s.ymm_high(r).to_le_bytes());
        }
    }
    let old = take_u64(&block, HEADER);
    let (bv, comp) = if variant == Variant::Compact {
        (rfbm & used, rfbm | COMPACT)
    } else {
        (old & !rfbm | rfbm & used, take_u64(&block, HEADER + 8))
    };
    // XSAVE and XSAVEOPT write only XSTATE_BV of the header.
    block[HEADER..HEADER + 8].copy_from_slice(&bv.to_le_bytes());
    block[HEADER + 8..HEADER + 16].copy_from_slice(&comp.to_le_bytes());
    cpu.store_bytes(linear, &block[..464])?;
    cpu.store_bytes(linear.wrapping_add(HEADER as u64), &block[HEADER..size])?;
    if write & component::PKRU != 0 {
        cpu.store_bytes(pkru, &u64::from(cpu.s.pkru).to_le_bytes())?;
    }
    Ok(())
}

fn pkru_offset(compact: Option<u64>) -> u64 {
    xsave_area::offset(component::PKRU, compact) as u64
}

fn xrstor(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let rfbm = requested(cpu)?;
    let linear = area(cpu, i, AVX as u64, 64, false)?;
    let mut block = [0; AREA];
    cpu.load_bytes(linear, &mut block[..AVX])?;
    let (bv, comp) = (take_u64(&block, HEADER), take_u64(&block, HEADER + 8));
    let compact = comp & COMPACT != 0;
    let reserved_clear = block[HEADER + 16..HEADER + 24].iter().all(|&b| b == 0)
        && (!compact || block[HEADER + 24..AVX].iter().all(|&b| b == 0));
    let valid = if compact {
        bv & !comp == 0 && comp & !COMPACT & !cpu.s.xcr0 == 0
    } else {
        comp == 0 && bv & !cpu.s.xcr0 == 0
    };
    if !valid || !reserved_clear {
        return Err(cpu.gp(0));
    }
    let load = rfbm & bv;
    if load & component::AVX != 0 {
        let at = linear.wrapping_add(AVX as u64);
        let mut high = [0; AREA - AVX];
        cpu.load_bytes(at, &mut high)?;
        block[AVX..].copy_from_slice(&high);
    }
    let mut pkru = [0; 8];
    if load & component::PKRU != 0 {
        cpu.load_bytes(linear.wrapping_add(pkru_offset(compact.then_some(comp))), &mut pkru)?;
    }
    let mxcsr = take_u64(&block, 24) as u32;
    let with_mxcsr = if compact { load & component::SSE != 0 } else { rfbm & (component::SSE | component::AVX) != 0 };
    if with_mxcsr && mxcsr & !MXCSR_MASK != 0 {
        return Err(cpu.gp(0));
    }
    // Nothing faults from here on.
    if load & component::X87 != 0 {
        let mut legacy = [0; 512];
        legacy.copy_from_slice(&block[..512]);
        cpu.s.x87.fxrstor(&legacy, i.aux != 0);
    } else if rfbm & component::X87 != 0 {
        cpu.s.x87 = X87::initialized();
    }
    if with_mxcsr {
        cpu.s.mxcsr = mxcsr;
    } else if compact && rfbm & component::SSE != 0 {
        cpu.s.mxcsr = MXCSR_INIT;
    }
    for r in 0..xmm_count(cpu) {
        if rfbm & component::SSE != 0 {
            let v = if load & component::SSE != 0 { take_u128(&block, 160 + 16 * usize::from(r)) } else { 0 };
            cpu.s.set_xmm(r, v);
        }
        if rfbm & component::AVX != 0 {
            let v = if load & component::AVX != 0 { take_u128(&block, AVX + 16 * usize::from(r)) } else { 0 };
            cpu.s.set_ymm_high(r, v);
        }
    }
    if rfbm & component::PKRU != 0 {
        cpu.set_pkru(u64::from_le_bytes(pkru) as u32);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
