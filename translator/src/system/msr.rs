//! RDMSR and WRMSR (SDM vol. 4): the registers that Linux, FreeBSD and firmware touch. Any other raises #GP, is
//! counted, and can be logged (`diglot_translator::system::msr` at debug level).

use crate::addr::is_canonical;
use crate::cpu::Cpu;
use crate::emit::Emit;
use crate::exception::Trap;
use crate::insn::Insn;
use crate::mmu::walk::PHYSICAL_BITS;
use crate::state::{cr, gpr, seg};
use crate::width::{W32, W64, Width};

/// MSR numbers.
#[allow(missing_docs)]
mod id {
    pub const TSC: u32 = 0x10;
    pub const PLATFORM_ID: u32 = 0x17;
    pub const APIC_BASE: u32 = 0x1b;
    pub const FEATURE_CONTROL: u32 = 0x3a;
    pub const TSC_ADJUST: u32 = 0x3b;
    pub const SPEC_CTRL: u32 = 0x48;
    pub const PRED_CMD: u32 = 0x49;
    pub const BIOS_UPDT_TRIG: u32 = 0x79;
    pub const BIOS_SIGN_ID: u32 = 0x8b;
    pub const PLATFORM_INFO: u32 = 0xce;
    pub const MTRRCAP: u32 = 0xfe;
    pub const ARCH_CAPABILITIES: u32 = 0x10a;
    pub const FLUSH_CMD: u32 = 0x10b;
    pub const MISC_FEATURES: u32 = 0x140;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MCG_CAP: u32 = 0x179;
    pub const MCG_STATUS: u32 = 0x17a;
    pub const MISC_ENABLE: u32 = 0x1a0;
    pub const DEBUGCTL: u32 = 0x1d9;
    pub const MTRR_PHYS_FIRST: u32 = 0x200;
    pub const MTRR_PHYS_LAST: u32 = 0x20f;
    pub const PAT: u32 = 0x277;
    pub const MTRR_DEF_TYPE: u32 = 0x2ff;
    pub const MC_FIRST: u32 = 0x400;
    pub const MC_LAST: u32 = 0x40f;
    pub const TSC_DEADLINE: u32 = 0x6e0;
    pub const PKRS: u32 = 0x6e1;
    pub const X2APIC_FIRST: u32 = 0x800;
    pub const X2APIC_LAST: u32 = 0x8ff;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const FMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
}

/// Fixed-range MTRRs in the order of [`crate::state::Msrs::mtrr_fixed`].
const MTRR_FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];

/// IA32_ARCH_CAPABILITIES: a CPU without speculation has none of its side channels, and says so, which spares the
/// guest every mitigation: RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO, PSCHANGE_MC_NO, TAA_NO,
/// SBDR_SSDP_NO, FBSDP_NO, PSDP_NO, BHI_NO, PBRSB_NO, GDS_NO, RFDS_NO, ITS_NO (SDM vol. 4 table 2-2).
const ARCH_CAPABILITIES: u64 = 1 << 0
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;

/// Four machine-check banks, no extras.
const MCG_CAP: u64 = 4;
/// Eight variable ranges, fixed ranges, write-combining.
const MTRRCAP: u64 = 8 | 1 << 8 | 1 << 10;

/// RDMSR.
pub fn rdmsr(cpu: &mut Cpu, _: &Insn) -> Result<(), Trap> {
    cpu.require_cpl0()?;
    let n = cpu.gpr::<W32>(gpr::RCX) as u32;
    let Some(v) = read(cpu, n) else { return Err(unknown(cpu, n, "read")) };
    cpu.set_gpr::<W64>(gpr::RAX, W32::zext(v));
    cpu.set_gpr::<W64>(gpr::RDX, v >> 32);
    Ok(())
}

/// WRMSR.
pub fn wrmsr(cpu: &mut Cpu, _: &Insn) -> Result<(), Trap> {
    cpu.require_cpl0()?;
    let n = cpu.gpr::<W32>(gpr::RCX) as u32;
    let v = cpu.gpr::<W32>(gpr::RAX) | cpu.gpr::<W32>(gpr::RDX) << 32;
    match write(cpu, n, v) {
        Written::Yes => Ok(()),
        Written::Invalid => Err(cpu.gp(0)),
        Written::Unknown => Err(unknown(cpu, n, "write")),
    }
}

fn unknown(cpu: &mut Cpu, n: u32, what: &str) -> Trap {
    cpu.counts.unknown_msr += 1;
    tracing::debug!("{what} of unknown MSR {n:#x} at {:#x}", cpu.s.rip);
    cpu.gp(0)
}

fn read(cpu: &mut Cpu, n: u32) -> Option<u64> {
    let m = &cpu.s.msr;
    Some(match n {
        id::TSC => cpu.tsc(),
        id::PLATFORM_ID => 0,
        id::APIC_BASE | id::TSC_DEADLINE | id::X2APIC_FIRST..=id::X2APIC_LAST => {
            let tsc = cpu.tsc();
            let v = cpu.platform.apic_msr_read(n, tsc)?;
            cpu.device_accessed();
            v
        }
        // Locked, nothing enabled.
        id::FEATURE_CONTROL => 1,
        id::TSC_ADJUST => m.tsc_adjust,
        id::SPEC_CTRL => m.spec_ctrl,
        id::PKRS if cpu.model.allows_cr4(cr::CR4_PKS) => m.pkrs.into(),
        id::BIOS_SIGN_ID => 1 << 32,
        id::PLATFORM_INFO => cpu.model.platform_info(),
        id::MTRRCAP => MTRRCAP,
        id::ARCH_CAPABILITIES => ARCH_CAPABILITIES,
        id::MISC_FEATURES => 0,
        id::SYSENTER_CS => m.sysenter_cs,
        id::SYSENTER_ESP => m.sysenter_esp,
        id::SYSENTER_EIP => m.sysenter_eip,
        id::MCG_CAP => MCG_CAP,
        id::MCG_STATUS => m.mcg_status,
        id::MISC_ENABLE => m.misc_enable,
        id::DEBUGCTL => m.debugctl,
        id::MTRR_PHYS_FIRST..=id::MTRR_PHYS_LAST => {
            let k = (n - id::MTRR_PHYS_FIRST) as usize;
            m.mtrr_variable[k / 2][k % 2]
        }
        id::PAT => m.pat,
        id::MTRR_DEF_TYPE => m.mtrr_def_type,
        id::MC_FIRST..=id::MC_LAST => {
            let k = (n - id::MC_FIRST) as usize;
            m.mc_banks[k / 4][k % 4]
        }
        id::EFER => cpu.s.efer,
        id::STAR => m.star,
        id::LSTAR => m.lstar,
        id::CSTAR => m.cstar,
        id::FMASK => m.fmask,
        id::FS_BASE => cpu.s.seg[usize::from(seg::FS)].base,
        id::GS_BASE => cpu.s.seg[usize::from(seg::GS)].base,
        id::KERNEL_GS_BASE => m.kernel_gs_base,
        id::TSC_AUX => m.tsc_aux,
        n => return MTRR_FIXED.iter().position(|&f| f == n).map(|k| m.mtrr_fixed[k]),
    })
}

enum Written {
    Yes,
    Invalid,
    Unknown,
}

fn write(cpu: &mut Cpu, n: u32, v: u64) -> Written {
    let check = |ok: bool| if ok { Written::Yes } else { Written::Invalid };
    let m = &mut cpu.s.msr;
    match n {
        id::TSC => {
            let change = v.wrapping_sub(cpu.tsc());
            cpu.s.tsc_offset = cpu.s.tsc_offset.wrapping_add(change);
            cpu.s.msr.tsc_adjust = cpu.s.msr.tsc_adjust.wrapping_add(change);
        }
        id::TSC_ADJUST => {
            cpu.s.tsc_offset = cpu.s.tsc_offset.wrapping_add(v.wrapping_sub(m.tsc_adjust));
            m.tsc_adjust = v;
        }
        id::APIC_BASE | id::TSC_DEADLINE | id::X2APIC_FIRST..=id::X2APIC_LAST => {
            let tsc = cpu.tsc();
            let done = cpu.platform.apic_msr_write(n, v, tsc);
            cpu.device_accessed();
            return check(done.is_some());
        }
        id::SPEC_CTRL => {
            // IBRS, STIBP, SSBD, BHI_DIS_S.
            if v & !(7 | 1 << 10) != 0 {
                return Written::Invalid;
            }
            m.spec_ctrl = v;
        }
        id::PKRS if cpu.model.allows_cr4(cr::CR4_PKS) => {
            let Ok(v) = u32::try_from(v) else { return Written::Invalid };
            cpu.set_pkrs(v);
        }
        // Commands to caches and predictors that are not there, and a microcode update that does nothing.
        id::PRED_CMD | id::FLUSH_CMD => return check(v & !1 == 0),
        id::BIOS_UPDT_TRIG | id::BIOS_SIGN_ID | id::MISC_FEATURES => {}
        id::SYSENTER_CS => m.sysenter_cs = v,
        id::SYSENTER_ESP
        | id::SYSENTER_EIP
        | id::LSTAR
        | id::CSTAR
        | id::KERNEL_GS_BASE
        | id::FS_BASE
        | id::GS_BASE => {
            if !is_canonical(v) {
                return Written::Invalid;
            }
            match n {
                id::SYSENTER_ESP => m.sysenter_esp = v,
                id::SYSENTER_EIP => m.sysenter_eip = v,
                id::LSTAR => m.lstar = v,
                id::CSTAR => m.cstar = v,
                id::KERNEL_GS_BASE => m.kernel_gs_base = v,
                id::FS_BASE => cpu.s.seg[usize::from(seg::FS)].base = v,
                _ => cpu.s.seg[usize::from(seg::GS)].base = v,
            }
        }
        // RIPV, EIPV, MCIP.
        id::MCG_STATUS if v & !7 == 0 => m.mcg_status = v,
        id::MISC_ENABLE => m.misc_enable = v,
        // LBR, BTF.
        id::DEBUGCTL if v & !3 == 0 => m.debugctl = v,
        id::MCG_STATUS | id::DEBUGCTL => return Written::Invalid,
        id::MTRR_PHYS_FIRST..=id::MTRR_PHYS_LAST => {
            let k = (n - id::MTRR_PHYS_FIRST) as usize;
            // A base has its type in the low byte, a mask its valid bit at 11 (SDM vol. 3 §11.11.2.3).
            let frame = (1u64 << PHYSICAL_BITS) - 0x1000;
            let valid = if k.is_multiple_of(2) {
                v & !(frame | 0xff) == 0 && is_mtrr_type(v)
            } else {
                v & !(frame | 0x800) == 0
            };
            if !valid {
                return Written::Invalid;
            }
            m.mtrr_variable[k / 2][k % 2] = v;
        }
        id::PAT => {
            if !v.to_le_bytes().iter().all(|t| matches!(t, 0 | 1 | 4..=7)) {
                return Written::Invalid;
            }
            m.pat = v;
        }
        id::MTRR_DEF_TYPE => {
            // The type, FE and E (SDM vol. 3 §11.11.2.1).
            if v & !0xcff != 0 || !is_mtrr_type(v) {
                return Written::Invalid;
            }
            m.mtrr_def_type = v;
        }
        id::MC_FIRST..=id::MC_LAST => {
            let k = (n - id::MC_FIRST) as usize;
            // Controls take all ones or zeros, status registers can only be cleared (SDM vol. 3 §16.3.2).
            let valid = match k % 4 {
                0 => v == 0 || v == u64::MAX,
                1 => v == 0,
                _ => true,
            };
            if !valid {
                return Written::Invalid;
            }
            m.mc_banks[k / 4][k % 4] = v;
        }
        id::EFER => return write_efer(cpu, v),
        id::STAR => m.star = v,
        id::FMASK => {
            if v >> 32 != 0 {
                return Written::Invalid;
            }
            m.fmask = v;
        }
        id::TSC_AUX => {
            if v >> 32 != 0 {
                return Written::Invalid;
            }
            m.tsc_aux = v;
        }
        n => match MTRR_FIXED.iter().position(|&f| f == n) {
            Some(_) if !v.to_le_bytes().iter().all(|&t| is_mtrr_type(u64::from(t))) => return Written::Invalid,
            Some(k) => m.mtrr_fixed[k] = v,
            None => return Written::Unknown,
        },
    }
    Written::Yes
}

/// Whether the low byte is a memory type that MTRRs may hold: UC, WC, WT, WP, WB (SDM vol. 3 table 11-8).
fn is_mtrr_type(v: u64) -> bool {
    matches!(v as u8, 0 | 1 | 4 | 5 | 6)
}

fn write_efer(cpu: &mut Cpu, v: u64) -> Written {
    let known = cr::EFER_SCE | cr::EFER_LME | cr::EFER_LMA | cr::EFER_NXE;
    let changes_lme = (v ^ cpu.s.efer) & cr::EFER_LME != 0;
    if v & !known != 0 || (changes_lme && cpu.s.cr0 & cr::CR0_PG != 0) {
        return Written::Invalid;
    }
    let nxe = (v ^ cpu.s.efer) & cr::EFER_NXE != 0;
    // LMA is read-only.
    cpu.s.efer = v & !cr::EFER_LMA | cpu.s.efer & cr::EFER_LMA;
    if nxe {
        cpu.flush_tlb_all();
    }
    cpu.mode_changed();
    Written::Yes
}
