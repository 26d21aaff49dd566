//! SYSCALL, SYSRET, SYSENTER, SYSEXIT (SDM vol. 2; vol. 3 §5.8.7–5.8.8), as Intel processors do them.

use crate::addr::is_canonical;
use crate::cpu::Cpu;
use crate::exception::Trap;
use crate::insn::{Insn, Mode};
use crate::state::{Segment, cr, flag, gpr, seg};
use crate::vcpu::DR6_BS;

/// A flat code segment.
fn code(selector: u16, dpl: u8, long: bool) -> Segment {
    let size = if long { Segment::L } else { Segment::DB };
    Segment { base: 0, limit: u32::MAX, attr: 0x9b | u32::from(dpl) << 5 | Segment::G | size, selector }
}

/// A flat data segment.
fn data(selector: u16, dpl: u8) -> Segment {
    Segment { base: 0, limit: u32::MAX, attr: 0x93 | u32::from(dpl) << 5 | Segment::G | Segment::DB, selector }
}

fn enter(cpu: &mut Cpu, cs: Segment, ss: Segment, cpl: u8) {
    cpu.s.seg[usize::from(seg::SS)] = ss;
    cpu.s.seg[usize::from(seg::CS)] = cs;
    cpu.s.cpl = cpl;
    cpu.mode_changed();
}

/// SYSCALL.
pub fn syscall(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    if !cpu.mode.has(Mode::CODE64) || cpu.s.efer & cr::EFER_SCE == 0 {
        return Err(cpu.ud());
    }
    let flags = cpu.s.flags() & !flag::RF;
    cpu.s.gpr[usize::from(gpr::RCX)] = cpu.next_ip_value(i);
    cpu.s.gpr[usize::from(gpr::R11)] = flags;
    cpu.s.set_flags(flags & !cpu.s.msr.fmask);
    cpu.s.rip = cpu.s.msr.lstar;
    let selector = (cpu.s.msr.star >> 32) as u16 & 0xfffc;
    enter(cpu, code(selector, 0, true), data(selector.wrapping_add(8), 0), 0);
    Ok(())
}

/// SYSRET.
pub fn sysret(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    if !cpu.mode.has(Mode::CODE64) || cpu.s.efer & cr::EFER_SCE == 0 {
        return Err(cpu.ud());
    }
    cpu.require_cpl0()?;
    let rcx = cpu.s.gpr[usize::from(gpr::RCX)];
    let long = i.osize == 8;
    if long && !is_canonical(rcx) {
        return Err(cpu.gp(0));
    }
    let flags = cpu.s.gpr[usize::from(gpr::R11)] & 0x3c_7fd7 & !flag::RF | 2;
    cpu.s.set_flags(flags);
    if flags & flag::TF != 0 {
        // TF is looked at after SYSRET, as if the SYSCALL had just completed.
        cpu.pending_debug |= DR6_BS;
    }
    cpu.s.rip = if long { rcx } else { rcx & 0xffff_ffff };
    let base = (cpu.s.msr.star >> 48) as u16;
    let cs = if long { base.wrapping_add(16) } else { base } | 3;
    enter(cpu, code(cs, 3, long), data(base.wrapping_add(8) | 3, 3), 3);
    Ok(())
}

/// SYSENTER.
pub fn sysenter(cpu: &mut Cpu, _: &Insn) -> Result<(), Trap> {
    let selector = cpu.s.msr.sysenter_cs as u16 & 0xfffc;
    if !cpu.s.protected() || selector == 0 {
        return Err(cpu.gp(0));
    }
    let long = cpu.s.long_mode();
    cpu.s.rflags &= !(flag::VM | flag::IF);
    let (esp, eip) = (cpu.s.msr.sysenter_esp, cpu.s.msr.sysenter_eip);
    cpu.s.gpr[usize::from(gpr::RSP)] = if long { esp } else { esp & 0xffff_ffff };
    cpu.s.rip = if long { eip } else { eip & 0xffff_ffff };
    enter(cpu, code(selector, 0, long), data(selector.wrapping_add(8), 0), 0);
    Ok(())
}

/// SYSEXIT.
pub fn sysexit(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let selector = cpu.s.msr.sysenter_cs as u16;
    if !cpu.s.protected() || selector & 0xfffc == 0 || cpu.s.cpl != 0 {
        return Err(cpu.gp(0));
    }
    let long = i.osize == 8;
    let (rcx, rdx) = (cpu.s.gpr[usize::from(gpr::RCX)], cpu.s.gpr[usize::from(gpr::RDX)]);
    if long && !(is_canonical(rcx) && is_canonical(rdx)) {
        return Err(cpu.gp(0));
    }
    cpu.s.gpr[usize::from(gpr::RSP)] = if long { rcx } else { rcx & 0xffff_ffff };
    cpu.s.rip = if long { rdx } else { rdx & 0xffff_ffff };
    let offset = if long { 32 } else { 16 };
    let cs = selector.wrapping_add(offset) | 3;
    enter(cpu, code(cs, 3, long), data(cs.wrapping_add(8), 3), 3);
    Ok(())
}
