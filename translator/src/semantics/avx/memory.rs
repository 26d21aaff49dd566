//! VEX instructions that touch memory element by element: gathers and masked moves; and MXCSR.

use iced_x86::{Instruction, Mnemonic};

use super::{is_wide, read, write};
use crate::cpu::Cpu;
use crate::emit::Emit;
use crate::exception::Trap;
use crate::insn::{Insn, NO_REG, Opnd};
use crate::semantics::{Sem, interp, sse};
use crate::simd::wide::Ymm;
use crate::state::seg;
use crate::width::{W32, W64};

/// The semantics of a gather, masked move or MXCSR access.
pub(super) fn find(i: &Instruction) -> Option<&'static Sem> {
    use Mnemonic::*;
    Some(match i.mnemonic() {
        Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq => interp!(masked_move; aux = element_bytes),
        Vmaskmovdqu => interp!(sse::maskmovdqu),
        Vldmxcsr => interp!(sse::ldmxcsr),
        Vstmxcsr => interp!(sse::stmxcsr),
        Vgatherdps | Vgatherdpd | Vgatherqps | Vgatherqpd | Vpgatherdd | Vpgatherdq | Vpgatherqd | Vpgatherqq => {
            interp!(gather; aux = gather_shape)
        }
        _ => return None,
    })
}

fn element_bytes(i: &Instruction) -> u16 {
    use Mnemonic::*;
    match i.mnemonic() {
        Vmaskmovps | Vpmaskmovd | Vgatherdps | Vgatherqps | Vpgatherdd | Vpgatherqd => 4,
        _ => 8,
    }
}

/// Element `n` of `bytes` bytes (4 or 8).
fn element(v: Ymm, bytes: usize, n: usize) -> u64 {
    let at = bytes * n;
    let x = v[at / 16 & 1] >> (8 * (at % 16));
    if bytes == 4 { u64::from(x as u32) } else { x as u64 }
}

fn set_element(v: &mut Ymm, bytes: usize, n: usize, value: u64) {
    let at = bytes * n;
    let shift = 8 * (at % 16) as u32;
    let mask = u128::from(u64::MAX >> (64 - 8 * bytes as u32)) << shift;
    let lane = &mut v[at / 16 & 1];
    *lane = *lane & !mask | u128::from(value) << shift & mask;
}

fn is_set(mask: Ymm, bytes: usize, n: usize) -> bool {
    element(mask, bytes, n) >> (8 * bytes - 1) & 1 != 0
}

fn load_element(cpu: &mut Cpu, i: &Insn, bytes: usize, ea: u64) -> Result<u64, Trap> {
    let linear = cpu.linearize(i.seg, ea, bytes as u64, false)?;
    cpu.through_ss = i.seg == seg::SS;
    if bytes == 4 { cpu.load_element::<W32>(linear) } else { cpu.load_element::<W64>(linear) }
}

/// VMASKMOVPS and its kin: elements whose mask is clear are neither accessed nor able to fault.
fn masked_move(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let bytes = usize::from(i.aux);
    let mask = read(cpu, i, 1)?;
    let ea = cpu.ea(i);
    let chosen = (0..usize::from(i.mem_bytes) / bytes).filter(|&n| is_set(mask, bytes, n));
    if i.op[0] != Opnd::Mem {
        let mut v = [0; 2];
        for n in chosen {
            let at = cpu.further(i, ea, (n * bytes) as u64);
            let x = load_element(cpu, i, bytes, at)?;
            set_element(&mut v, bytes, n, x);
        }
        return write(cpu, i, v);
    }
    let v = read(cpu, i, 2)?;
    let address = |cpu: &mut Cpu, n: usize| {
        let at = cpu.further(i, ea, (n * bytes) as u64);
        cpu.linearize(i.seg, at, bytes as u64, true)
    };
    for n in chosen.clone() {
        let linear = address(cpu, n)?;
        cpu.probe_write(linear, bytes as u64)?;
    }
    for n in chosen {
        let linear = address(cpu, n)?;
        let x = element(v, bytes, n);
        if bytes == 4 { cpu.store_element::<W32>(linear, x)? } else { cpu.store_element::<W64>(linear, x)? }
    }
    Ok(())
}

/// Bits 3:0 bytes of an element, bits 7:4 bytes of an index, bits 15:8 elements.
fn gather_shape(i: &Instruction) -> u16 {
    use Mnemonic::*;
    let index = match i.mnemonic() {
        Vgatherdps | Vgatherdpd | Vpgatherdd | Vpgatherdq => 4,
        _ => 8,
    };
    let data = element_bytes(i);
    let count = (i.op0_register().size() as u16 / data).min(i.memory_index().size() as u16 / index);
    data | index << 4 | count << 8
}

/// Gathers from the lowest element up. A fault leaves the elements before it loaded and their masks cleared, so that
/// the instruction goes on where it stopped (SDM vol. 2, VGATHERDPS).
fn gather(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let (data, index, count) = (usize::from(i.aux & 15), usize::from(i.aux >> 4 & 15), usize::from(i.aux >> 8));
    let (Opnd::Xmm(d) | Opnd::Ymm(d), Opnd::Xmm(m) | Opnd::Ymm(m)) = (i.op[0], i.op[2]) else {
        return Err(cpu.ud());
    };
    if d == m || d == i.index || m == i.index {
        return Err(cpu.ud());
    }
    let (mut v, mut mask) = (read(cpu, i, 0)?, read(cpu, i, 2)?);
    let indices = [cpu.s.xmm(i.index), cpu.s.ymm_high(i.index)];
    let base = if i.base == NO_REG { 0 } else { cpu.gpr::<W64>(i.base) }.wrapping_add(i.disp as u64);
    for n in 0..count {
        if is_set(mask, data, n) {
            let k = element(indices, index, n);
            let k = if index == 4 { k as i32 as u64 } else { k };
            let at = cpu.cut_address(i, base.wrapping_add(k << i.scale));
            match load_element(cpu, i, data, at) {
                Ok(x) => set_element(&mut v, data, n, x),
                Err(trap) => {
                    // The upper halves of a 128-bit form are cleared once it completes.
                    set_register(cpu, d, [v[0], if is_wide(i, 0) { v[1] } else { cpu.s.ymm_high(d) }]);
                    set_register(cpu, m, [mask[0], if is_wide(i, 2) { mask[1] } else { cpu.s.ymm_high(m) }]);
                    return Err(trap);
                }
            }
        }
        set_element(&mut mask, data, n, 0);
    }
    for n in count..16 / data * 2 {
        set_element(&mut v, data, n, 0);
    }
    write(cpu, i, v)?;
    set_register(cpu, m, [0; 2]);
    Ok(())
}

fn set_register(cpu: &mut Cpu, r: u8, v: Ymm) {
    cpu.s.set_xmm(r, v[0]);
    cpu.s.set_ymm_high(r, v[1]);
}
