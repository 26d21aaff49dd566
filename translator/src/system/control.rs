//! Control registers, descriptor-table registers, segment registers and flags: the instructions that change how the
//! CPU reads memory and takes interrupts.

use crate::addr::is_canonical;
use crate::cpu::Cpu;
use crate::cpuid;
use crate::emit::Emit;
use crate::exception::{Exception, Trap, vector};
use crate::insn::{Insn, Mode, Opnd};
use crate::mmu::walk::{PHYSICAL_BITS, load_pdptes};
use crate::state::{Segment, cr, flag, gpr, seg};
use crate::system::descriptor::{is_null, kind};
use crate::vcpu::SHADOW_MOV_SS;
use crate::width::{W8, W16, W32, W64, Width};

/// CR4 bits of features that CPUID reports on some model. VME and PVI it never does.
const CR4_SUPPORTED: u64 = cr::CR4_TSD
    | cr::CR4_DE
    | cr::CR4_PSE
    | cr::CR4_PAE
    | cr::CR4_MCE
    | cr::CR4_PGE
    | cr::CR4_PCE
    | cr::CR4_OSFXSR
    | cr::CR4_OSXMMEXCPT
    | cr::CR4_UMIP
    | cr::CR4_FSGSBASE
    | cr::CR4_PCIDE
    | cr::CR4_OSXSAVE
    | cr::CR4_SMEP
    | cr::CR4_SMAP
    | cr::CR4_PKE
    | cr::CR4_PKS;

/// The register operand of a MOV to or from a control or debug register: 64 bits in 64-bit mode, else 32.
pub(crate) fn wide_gpr(cpu: &mut Cpu, r: u8) -> u64 {
    if cpu.mode.has(Mode::CODE64) { cpu.gpr::<W64>(r) } else { cpu.gpr::<W32>(r) }
}

pub(crate) fn set_wide_gpr(cpu: &mut Cpu, r: u8, v: u64) {
    if cpu.mode.has(Mode::CODE64) { cpu.set_gpr::<W64>(r, v) } else { cpu.set_gpr::<W32>(r, v) }
}

/// MOV from CR8, and from those that do not exist.
pub fn mov_from_cr(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    cpu.require_cpl0()?;
    let (Opnd::Gpr(r), Opnd::Cr(n)) = (i.op[0], i.op[1]) else { return Err(cpu.ud()) };
    let v = match n {
        8 => cpu.platform.cr8(),
        _ => return Err(cpu.ud()),
    };
    set_wide_gpr(cpu, r, v);
    Ok(())
}

/// MOV to CRn.
pub fn mov_to_cr(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    cpu.require_cpl0()?;
    let (Opnd::Cr(n), Opnd::Gpr(r)) = (i.op[0], i.op[1]) else { return Err(cpu.ud()) };
    let v = wide_gpr(cpu, r);
    match n {
        0 => write_cr0(cpu, v),
        2 => {
            cpu.s.cr2 = v;
            Ok(())
        }
        3 => write_cr3(cpu, v),
        4 => write_cr4(cpu, v),
        8 => {
            if v > 15 {
                return Err(cpu.gp(0));
            }
            cpu.platform.set_cr8(v);
            cpu.device_accessed();
            Ok(())
        }
        _ => Err(cpu.ud()),
    }
}

/// Writes CR0 with the checks and side effects of SDM vol. 3 §2.5 and §9.8.5.
pub fn write_cr0(cpu: &mut Cpu, v: u64) -> Result<(), Trap> {
    let known = cr::CR0_PE
        | cr::CR0_MP
        | cr::CR0_EM
        | cr::CR0_TS
        | cr::CR0_ET
        | cr::CR0_NE
        | cr::CR0_WP
        | cr::CR0_AM
        | cr::CR0_NW
        | cr::CR0_CD
        | cr::CR0_PG;
    let pg = v & cr::CR0_PG != 0;
    if v >> 32 != 0 || (pg && v & cr::CR0_PE == 0) || v & (cr::CR0_NW | cr::CR0_CD) == cr::CR0_NW {
        return Err(cpu.gp(0));
    }
    let v = v & known | cr::CR0_ET;
    let was_pg = cpu.s.cr0 & cr::CR0_PG != 0;
    let cs_long = cpu.s.seg[usize::from(seg::CS)].attr & Segment::L != 0;
    let lme = cpu.s.efer & cr::EFER_LME != 0;
    if pg && !was_pg {
        let tss16 = cpu.s.tr.kind() & 8 == 0;
        if lme && (cpu.s.cr4 & cr::CR4_PAE == 0 || cs_long || tss16) {
            return Err(cpu.gp(0));
        }
    }
    let cached = cr::CR0_PG | cr::CR0_CD | cr::CR0_NW;
    if pg && (v ^ cpu.s.cr0) & cached != 0 {
        // SDM vol. 3 §4.4.1.
        if !lme && cpu.s.cr4 & cr::CR4_PAE != 0 {
            let Some(p) = load_pdptes(&cpu.ram, cpu.s.cr3) else { return Err(cpu.gp(0)) };
            cpu.mmu.pdpte = p;
        }
    }
    if !pg && was_pg && (cpu.s.cr4 & cr::CR4_PCIDE != 0 || (cpu.s.long_mode() && cpu.mode.has(Mode::CODE64))) {
        return Err(cpu.gp(0));
    }
    let changed = cpu.s.cr0 ^ v;
    cpu.s.cr0 = v;
    if lme && pg != was_pg {
        cpu.s.efer = if pg { cpu.s.efer | cr::EFER_LMA } else { cpu.s.efer & !cr::EFER_LMA };
    }
    if changed & (cr::CR0_PG | cr::CR0_WP | cr::CR0_PE) != 0 {
        cpu.flush_tlb_all();
    }
    cpu.mode_changed();
    Ok(())
}

fn write_cr3(cpu: &mut Cpu, v: u64) -> Result<(), Trap> {
    let pcide = cpu.s.cr4 & cr::CR4_PCIDE != 0;
    let keep = pcide && v >> 63 != 0;
    let v = if pcide { v & !(1 << 63) } else { v };
    if cpu.s.long_mode() && v >> PHYSICAL_BITS != 0 {
        return Err(cpu.gp(0));
    }
    if !cpu.s.long_mode() && cpu.s.cr0 & cr::CR0_PG != 0 && cpu.s.cr4 & cr::CR4_PAE != 0 {
        let Some(p) = load_pdptes(&cpu.ram, v) else { return Err(cpu.gp(0)) };
        cpu.mmu.pdpte = p;
    }
    cpu.s.cr3 = v;
    cpu.switch_address_space(keep);
    Ok(())
}

fn write_cr4(cpu: &mut Cpu, v: u64) -> Result<(), Trap> {
    let long = cpu.s.long_mode();
    if v & !CR4_SUPPORTED != 0 || !cpu.model.allows_cr4(v) || (long && v & cr::CR4_PAE == 0) {
        return Err(cpu.gp(0));
    }
    let pcid_on = v & cr::CR4_PCIDE != 0 && cpu.s.cr4 & cr::CR4_PCIDE == 0;
    if pcid_on && (!long || cpu.s.cr3 & 0xfff != 0) {
        return Err(cpu.gp(0));
    }
    let changed = cpu.s.cr4 ^ v;
    let paging = cr::CR4_PSE
        | cr::CR4_PAE
        | cr::CR4_PGE
        | cr::CR4_PCIDE
        | cr::CR4_SMEP
        | cr::CR4_SMAP
        | cr::CR4_PKE
        | cr::CR4_PKS;
    if changed & (cr::CR4_PAE | cr::CR4_PGE | cr::CR4_PSE | cr::CR4_SMEP) != 0
        && !long
        && cpu.s.cr0 & cr::CR0_PG != 0
        && v & cr::CR4_PAE != 0
    {
        let Some(p) = load_pdptes(&cpu.ram, cpu.s.cr3) else { return Err(cpu.gp(0)) };
        cpu.mmu.pdpte = p;
    }
    cpu.s.cr4 = v;
    if changed & paging != 0 {
        cpu.flush_tlb_all();
        cpu.switch_address_space(true);
    }
    cpu.mode_changed();
    Ok(())
}

/// CLTS.
pub fn clts(cpu: &mut Cpu, _: &Insn) -> Result<(), Trap> {
    cpu.require_cpl0()?;
    cpu.s.cr0 &= !cr::CR0_TS;
    cpu.mode_changed();
    Ok(())
}

/// LMSW: the low four bits of CR0; PE can be set but not cleared.
pub fn lmsw(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    cpu.require_cpl0()?;
    let v = cpu.read::<W16>(i, 0)? & 15 | cpu.s.cr0 & cr::CR0_PE;
    write_cr0(cpu, cpu.s.cr0 & !15 | v)
}

/// SMSW.
pub fn smsw(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    umip(cpu)?;
    let v = cpu.s.cr0;
    store_system_word(cpu, i, v)
}

/// UMIP: SGDT, SIDT, SLDT, STR and SMSW fault outside CPL 0.
fn umip(cpu: &mut Cpu) -> Result<(), Trap> {
    if cpu.s.cr4 & cr::CR4_UMIP != 0 && cpu.s.cpl != 0 { Err(cpu.gp(0)) } else { Ok(()) }
}

/// Register destinations take the operand size, memory always 16 bits.
fn store_system_word(cpu: &mut Cpu, i: &Insn, v: u64) -> Result<(), Trap> {
    match (i.op[0], i.osize) {
        (Opnd::Mem, _) => cpu.write::<W16>(i, 0, v & 0xffff),
        (Opnd::Gpr(r), 2) => {
            cpu.set_gpr::<W16>(r, v);
            Ok(())
        }
        (Opnd::Gpr(r), 4) => {
            cpu.set_gpr::<W32>(r, v);
            Ok(())
        }
        (Opnd::Gpr(r), _) => {
            cpu.set_gpr::<W64>(r, v);
            Ok(())
        }
        _ => Err(cpu.ud()),
    }
}

/// SLDT.
pub fn sldt(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    protected_only(cpu)?;
    umip(cpu)?;
    let v = u64::from(cpu.s.ldtr.selector);
    store_system_word(cpu, i, v)
}

/// STR.
pub fn str_(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    protected_only(cpu)?;
    umip(cpu)?;
    let v = u64::from(cpu.s.tr.selector);
    store_system_word(cpu, i, v)
}

fn protected_only(cpu: &mut Cpu) -> Result<(), Trap> {
    if cpu.s.protected() && !cpu.s.vm86() { Ok(()) } else { Err(cpu.ud()) }
}

fn load_table(cpu: &mut Cpu, i: &Insn) -> Result<crate::state::Table, Trap> {
    cpu.require_cpl0()?;
    let ea = cpu.ea(i);
    let limit = cpu.load::<W16>(i, i.seg, ea)? as u16;
    let at = cpu.further(i, ea, 2);
    let base = if cpu.mode.has(Mode::CODE64) {
        let base = cpu.load::<W64>(i, i.seg, at)?;
        if !is_canonical(base) {
            return Err(cpu.gp(0));
        }
        base
    } else {
        let base = cpu.load::<W32>(i, i.seg, at)?;
        // With 16-bit operands only 24 bits of the base are loaded.
        if is_word_table(i) { base & 0xff_ffff } else { base }
    };
    Ok(crate::state::Table { base, limit })
}

fn is_word_table(i: &Insn) -> bool {
    use iced_x86::Code::*;
    matches!(i.iced_code(), Lgdt_m1632_16 | Lidt_m1632_16)
}

/// LGDT.
pub fn lgdt(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    cpu.s.gdtr = load_table(cpu, i)?;
    Ok(())
}

/// LIDT.
pub fn lidt(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    cpu.s.idtr = load_table(cpu, i)?;
    Ok(())
}

fn store_table(cpu: &mut Cpu, i: &Insn, t: crate::state::Table) -> Result<(), Trap> {
    umip(cpu)?;
    let ea = cpu.ea(i);
    let n = if cpu.mode.has(Mode::CODE64) { 10 } else { 6 };
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&t.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&t.base.to_le_bytes());
    let linear = cpu.linearize(i.seg, ea, n as u64, true)?;
    cpu.store_bytes(linear, &bytes[..n])
}

/// SGDT.
pub fn sgdt(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    store_table(cpu, i, cpu.s.gdtr)
}

/// SIDT.
pub fn sidt(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    store_table(cpu, i, cpu.s.idtr)
}

/// LLDT.
pub fn lldt(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    protected_only(cpu)?;
    cpu.require_cpl0()?;
    let selector = cpu.read::<W16>(i, 0)? as u16;
    if is_null(selector) {
        cpu.s.ldtr = Segment { selector, ..Segment::default() };
        return Ok(());
    }
    let d = global_system(cpu, selector)?;
    if d.kind() != kind::LDT {
        return Err(cpu.selector_fault(vector::GP, selector, false));
    }
    if !d.present() {
        return Err(cpu.selector_fault(vector::NP, selector, false));
    }
    cpu.s.ldtr = d.segment();
    Ok(())
}

/// LTR.
pub fn ltr(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    protected_only(cpu)?;
    cpu.require_cpl0()?;
    let selector = cpu.read::<W16>(i, 0)? as u16;
    let d = global_system(cpu, selector)?;
    let available = d.kind() == kind::TSS || (d.kind() == kind::TSS16 && !cpu.s.long_mode());
    if !available {
        return Err(cpu.selector_fault(vector::GP, selector, false));
    }
    if !d.present() {
        return Err(cpu.selector_fault(vector::NP, selector, false));
    }
    cpu.set_busy(&d, true)?;
    let mut tr = d.segment();
    tr.attr |= 2;
    cpu.s.tr = tr;
    Ok(())
}

fn global_system(cpu: &mut Cpu, selector: u16) -> Result<crate::system::descriptor::Descriptor, Trap> {
    if selector & 4 != 0 {
        return Err(cpu.selector_fault(vector::GP, selector, false));
    }
    let d = cpu.descriptor(selector, vector::GP, false)?;
    // The type field of the upper half of a 16-byte descriptor must be zero, its base canonical (SDM vol. 3 §7.2.3).
    let bad_high = d.high >> 40 & 0x1f != 0 || (cpu.s.long_mode() && !is_canonical(d.base()));
    if d.is_segment() || bad_high { Err(cpu.selector_fault(vector::GP, selector, false)) } else { Ok(d) }
}

/// MOV to a segment register.
pub fn mov_to_seg(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let Opnd::Seg(s) = i.op[0] else { return Err(cpu.ud()) };
    if s == seg::CS {
        return Err(cpu.ud());
    }
    let selector = cpu.read::<W16>(i, 1)? as u16;
    cpu.load_data_segment(s, selector)?;
    if s == seg::SS {
        cpu.s.shadow = SHADOW_MOV_SS;
    }
    Ok(())
}

/// POP to a segment register.
pub fn pop_seg(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let Opnd::Seg(s) = i.op[0] else { return Err(cpu.ud()) };
    let (v, sp) = match i.osize {
        2 => cpu.peek::<W16>(i)?,
        4 => cpu.peek::<W32>(i)?,
        _ => cpu.peek::<W64>(i)?,
    };
    cpu.load_data_segment(s, v as u16)?;
    cpu.set_stack_pointer(i, sp);
    if s == seg::SS {
        cpu.s.shadow = SHADOW_MOV_SS;
    }
    Ok(())
}

/// LDS, LES, LFS, LGS, LSS; `aux` is the segment register.
pub fn load_far(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let Opnd::Gpr(r) = i.op[0] else { return Err(cpu.ud()) };
    let ea = cpu.ea(i);
    let offset = match i.osize {
        2 => cpu.load::<W16>(i, i.seg, ea)?,
        4 => cpu.load::<W32>(i, i.seg, ea)?,
        _ => cpu.load::<W64>(i, i.seg, ea)?,
    };
    let at = cpu.further(i, ea, u64::from(i.osize));
    let selector = cpu.load::<W16>(i, i.seg, at)? as u16;
    cpu.load_data_segment(i.aux as u8, selector)?;
    match i.osize {
        2 => cpu.set_gpr::<W16>(r, offset),
        4 => cpu.set_gpr::<W32>(r, offset),
        _ => cpu.set_gpr::<W64>(r, offset),
    }
    Ok(())
}

/// INVLPG.
pub fn invlpg(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    cpu.require_cpl0()?;
    let ea = cpu.ea(i);
    let base = if i.flat { 0 } else { cpu.s.seg[usize::from(i.seg)].base };
    let linear = cpu.wrap_linear(base.wrapping_add(ea));
    if is_canonical(linear) {
        cpu.flush_tlb_page(linear);
    }
    Ok(())
}

/// INVPCID.
pub fn invpcid(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    cpu.require_cpl0()?;
    let Opnd::Gpr(r) = i.op[0] else { return Err(cpu.ud()) };
    let how = wide_gpr(cpu, r);
    let ea = cpu.ea(i);
    let d = cpu.load_x(i, ea, false)?;
    let (pcid, linear) = (d as u64, (d >> 64) as u64);
    let pcid_off = cpu.s.cr4 & cr::CR4_PCIDE == 0;
    let bad = how > 3 || pcid >> 12 != 0 || (how < 2 && pcid_off && pcid != 0) || (how == 0 && !is_canonical(linear));
    if bad {
        return Err(cpu.gp(0));
    }
    match how {
        0 => cpu.flush_tlb_page(linear),
        1 => cpu.flush_tlb_pcid(pcid as u16),
        2 => cpu.flush_tlb_all(),
        _ => cpu.flush_tlb_non_global(),
    }
    Ok(())
}

/// INVD, WBINVD: there is no cache to write back.
pub fn wbinvd(cpu: &mut Cpu, _: &Insn) -> Result<(), Trap> {
    cpu.require_cpl0()
}

/// HLT.
pub fn hlt(cpu: &mut Cpu, _: &Insn) -> Result<(), Trap> {
    cpu.require_cpl0()?;
    cpu.s.halted = true;
    cpu.stop_block = true;
    Ok(())
}

fn iopl(cpu: &Cpu) -> u8 {
    (cpu.s.rflags >> 12 & 3) as u8
}

/// POPF, POPFD, POPFQ.
pub fn popf(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    if cpu.s.vm86() && iopl(cpu) < 3 {
        return Err(cpu.gp(0));
    }
    let (v, sp) = match i.osize {
        2 => cpu.peek::<W16>(i)?,
        4 => cpu.peek::<W32>(i)?,
        _ => cpu.peek::<W64>(i)?,
    };
    let mut mask = flag::STATUS | flag::TF | flag::DF | flag::NT;
    if i.osize != 2 {
        mask |= flag::AC | flag::ID;
    }
    if cpu.s.cpl <= iopl(cpu) {
        mask |= flag::IF;
    }
    if cpu.s.cpl == 0 {
        mask |= flag::IOPL;
    }
    // POPF clears RF, and at CPL 0 VIP and VIF (SDM vol. 2, POPF).
    let mut cleared = flag::RF;
    if cpu.s.cpl == 0 && i.osize != 2 {
        cleared |= flag::VIP | flag::VIF;
    }
    let old = cpu.s.flags();
    let merged = old & !mask & !cleared | v & mask;
    cpu.s.set_flags(merged);
    cpu.set_stack_pointer(i, sp);
    if (old ^ merged) & flag::AC != 0 {
        cpu.mode_changed();
    }
    let enabled = merged & !old & flag::IF != 0 && cpu.interrupt_possible();
    if enabled || merged & flag::TF != 0 {
        cpu.stop_block = true;
    }
    Ok(())
}

/// VERR (`aux` 0), VERW (`aux` 1).
pub fn verify(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    protected_only(cpu)?;
    let selector = cpu.read::<W16>(i, 0)? as u16;
    let cpl = cpu.s.cpl;
    let ok = cpu.try_descriptor(selector)?.is_some_and(|d| {
        let level = (d.is_code() && d.is_conforming()) || d.dpl() >= cpl.max((selector & 3) as u8);
        let access = if i.aux != 0 { !d.is_code() && d.rw() } else { !d.is_code() || d.rw() };
        d.is_segment() && level && access
    });
    set_zf(cpu, ok);
    Ok(())
}

fn set_zf(cpu: &mut Cpu, on: bool) {
    cpu.set_flags::<W8>(crate::emit::Flags::Zf { zf: u64::from(on) });
}

/// LAR (`aux` 0), LSL (`aux` 1).
pub fn lar_lsl(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    protected_only(cpu)?;
    let selector = cpu.read::<W16>(i, 1)? as u16;
    let (cpl, long) = (cpu.s.cpl, cpu.s.long_mode());
    let found = cpu.try_descriptor(selector)?.filter(|d| {
        if d.is_segment() {
            return (d.is_code() && d.is_conforming()) || d.dpl() >= cpl.max((selector & 3) as u8);
        }
        let known = match d.kind() {
            kind::LDT | kind::TSS | kind::TSS_BUSY => true,
            kind::TSS16 | kind::TSS16_BUSY => !long,
            kind::CALL_GATE => i.aux == 0,
            kind::CALL_GATE16 | kind::TASK_GATE => i.aux == 0 && !long,
            _ => false,
        };
        known && d.dpl() >= cpl.max((selector & 3) as u8)
    });
    if let Some(d) = found {
        let v = if i.aux == 0 { d.raw >> 32 & 0x00ff_ff00 } else { u64::from(d.limit()) };
        match (i.op[0], i.osize) {
            (Opnd::Gpr(r), 2) => cpu.set_gpr::<W16>(r, v),
            (Opnd::Gpr(r), _) => cpu.set_gpr::<W32>(r, v),
            _ => return Err(cpu.ud()),
        }
    }
    set_zf(cpu, found.is_some());
    Ok(())
}

/// ARPL.
pub fn arpl(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    protected_only(cpu)?;
    let b = cpu.read::<W16>(i, 1)?;
    let a = cpu.read::<W16>(i, 0)?;
    let lower = a & 3 < b & 3;
    if lower {
        cpu.write::<W16>(i, 0, a & !3 | b & 3)?;
    }
    set_zf(cpu, lower);
    Ok(())
}

/// INT n. In virtual-8086 mode it alone is sensitive to IOPL (SDM vol. 3 §20.3.3).
pub fn int_n(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    if cpu.s.vm86() && iopl(cpu) < 3 {
        return Err(cpu.gp(0));
    }
    cpu.deliver_software(i.imm as u8, false)
}

/// INT3.
pub fn int3(cpu: &mut Cpu, _: &Insn) -> Result<(), Trap> {
    cpu.deliver_software(vector::BP, false)
}

/// INTO.
pub fn into(cpu: &mut Cpu, _: &Insn) -> Result<(), Trap> {
    if cpu.s.flags() & flag::OF != 0 { cpu.deliver_software(vector::OF, false) } else { Ok(()) }
}

/// INT1. Conditions that MOV SS has held back are not reported by a #DB of their own behind it but by this one.
pub fn int1(cpu: &mut Cpu, _: &Insn) -> Result<(), Trap> {
    let held_back = std::mem::take(&mut cpu.pending_debug);
    cpu.deliver_software(vector::DB, true)?;
    if held_back != 0 {
        cpu.report_debug_conditions(held_back);
    }
    Ok(())
}

/// BOUND.
pub fn bound(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let ea = cpu.ea(i);
    let second = cpu.further(i, ea, u64::from(i.osize));
    let (v, low, high) = if i.osize == 2 {
        let low = cpu.load::<W16>(i, i.seg, ea)?;
        (cpu.read::<W16>(i, 0)? as i16 as i64, low as i16 as i64, cpu.load::<W16>(i, i.seg, second)? as i16 as i64)
    } else {
        let low = cpu.load::<W32>(i, i.seg, ea)?;
        (cpu.read::<W32>(i, 0)? as i32 as i64, low as i32 as i64, cpu.load::<W32>(i, i.seg, second)? as i32 as i64)
    };
    if v < low || v > high { Err(cpu.raise(Exception::plain(vector::BR))) } else { Ok(()) }
}

/// RDTSC.
pub fn rdtsc(cpu: &mut Cpu, _: &Insn) -> Result<(), Trap> {
    if cpu.s.cr4 & cr::CR4_TSD != 0 && cpu.s.cpl != 0 {
        return Err(cpu.gp(0));
    }
    let tsc = cpu.tsc();
    cpu.set_gpr::<W64>(gpr::RAX, W32::zext(tsc));
    cpu.set_gpr::<W64>(gpr::RDX, tsc >> 32);
    Ok(())
}

/// WRPKRU.
pub fn wrpkru(cpu: &mut Cpu, _: &Insn) -> Result<(), Trap> {
    protection_keys(cpu)?;
    if cpu.gpr::<W32>(gpr::RDX) != 0 {
        return Err(cpu.gp(0));
    }
    let v = cpu.gpr::<W32>(gpr::RAX) as u32;
    cpu.set_pkru(v);
    Ok(())
}

fn protection_keys(cpu: &mut Cpu) -> Result<(), Trap> {
    if cpu.s.cr4 & cr::CR4_PKE == 0 {
        return Err(cpu.ud());
    }
    if cpu.gpr::<W32>(gpr::RCX) != 0 { Err(cpu.gp(0)) } else { Ok(()) }
}

/// RDTSCP.
pub fn rdtscp(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    rdtsc(cpu, i)?;
    let aux = cpu.s.msr.tsc_aux;
    cpu.set_gpr::<W64>(gpr::RCX, W32::zext(aux));
    Ok(())
}

/// RDPID.
pub fn rdpid(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let Opnd::Gpr(r) = i.op[0] else { return Err(cpu.ud()) };
    let aux = cpu.s.msr.tsc_aux;
    cpu.set_gpr::<W64>(r, aux);
    Ok(())
}

/// RDPMC: there are no performance counters.
pub fn rdpmc(cpu: &mut Cpu, _: &Insn) -> Result<(), Trap> {
    Err(cpu.gp(0))
}

/// RDRAND, RDSEED.
pub fn rdrand(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let Opnd::Gpr(r) = i.op[0] else { return Err(cpu.ud()) };
    let v = cpu.platform.random();
    let n = v.unwrap_or(0);
    match i.osize {
        2 => cpu.set_gpr::<W16>(r, n),
        4 => cpu.set_gpr::<W32>(r, n),
        _ => cpu.set_gpr::<W64>(r, n),
    }
    cpu.s.set_status(if v.is_some() { flag::CF } else { 0 });
    Ok(())
}

/// XGETBV.
pub fn xgetbv(cpu: &mut Cpu, _: &Insn) -> Result<(), Trap> {
    if cpu.s.cr4 & cr::CR4_OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    let v = match cpu.gpr::<W32>(gpr::RCX) {
        0 => cpu.s.xcr0,
        // XINUSE: everything is reported in use.
        1 => cpu.s.xcr0,
        _ => return Err(cpu.gp(0)),
    };
    cpu.set_gpr::<W64>(gpr::RAX, W32::zext(v));
    cpu.set_gpr::<W64>(gpr::RDX, v >> 32);
    Ok(())
}

/// XSETBV.
pub fn xsetbv(cpu: &mut Cpu, _: &Insn) -> Result<(), Trap> {
    if cpu.s.cr4 & cr::CR4_OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    cpu.require_cpl0()?;
    let v = cpu.gpr::<W32>(gpr::RAX) | cpu.gpr::<W32>(gpr::RDX) << 32;
    let ok =
        cpu.gpr::<W32>(gpr::RCX) == 0 && v & 1 != 0 && v & !cpu.model.xcr0_mask() == 0 && !(v & 4 != 0 && v & 2 == 0);
    if !ok {
        return Err(cpu.gp(0));
    }
    cpu.s.xcr0 = v;
    cpu.mode_changed();
    Ok(())
}

/// CPUID.
pub fn cpuid(cpu: &mut Cpu, _: &Insn) -> Result<(), Trap> {
    let leaf = cpu.gpr::<W32>(gpr::RAX) as u32;
    let subleaf = cpu.gpr::<W32>(gpr::RCX) as u32;
    let [a, b, c, mut d] = cpu.model.cpuid(leaf, subleaf, &cpu.s);
    // The APIC bit goes away with the APIC (SDM vol. 3 §11.4.3).
    if leaf == 1 && !cpu.platform.apic_enabled() {
        d &= !cpuid::LEAF_1_EDX_APIC;
    }
    for (r, v) in [(gpr::RAX, a), (gpr::RBX, b), (gpr::RCX, c), (gpr::RDX, d)] {
        cpu.set_gpr::<W64>(r, u64::from(v));
    }
    Ok(())
}

/// MONITOR (`aux` 0) and MWAIT (`aux` 1): hints that are not taken, but for offering the host's processor to other vCPUs.
/// MWAIT has the one extension that CPUID leaf 5 reports, interrupts as break events whatever IF is.
pub fn monitor(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    if cpu.s.cpl != 0 {
        return Err(cpu.ud());
    }
    let extensions = u64::from(i.aux);
    if cpu.gpr::<W32>(gpr::RCX) & !extensions != 0 {
        return Err(cpu.gp(0));
    }
    if i.aux != 0 && cpu.peers.is_some() {
        std::thread::yield_now();
    }
    Ok(())
}
