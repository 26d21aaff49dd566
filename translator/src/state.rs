//! The architectural state of one vCPU, laid out for compiled code: `#[repr(C)]`, addressed by `offset_of!`.

use crate::x87::X87;

/// General-purpose register numbers, in encoding order.
#[allow(missing_docs)]
pub mod gpr {
    pub const RAX: u8 = 0;
    pub const RCX: u8 = 1;
    pub const RDX: u8 = 2;
    pub const RBX: u8 = 3;
    pub const RSP: u8 = 4;
    pub const RBP: u8 = 5;
    pub const RSI: u8 = 6;
    pub const RDI: u8 = 7;
    pub const R11: u8 = 11;
}

/// Segment register numbers, in encoding order.
#[allow(missing_docs)]
pub mod seg {
    pub const ES: u8 = 0;
    pub const CS: u8 = 1;
    pub const SS: u8 = 2;
    pub const DS: u8 = 3;
    pub const FS: u8 = 4;
    pub const GS: u8 = 5;
}

/// RFLAGS bits (SDM vol. 1 §3.4.3).
#[allow(missing_docs)]
pub mod flag {
    pub const CF: u64 = 1 << 0;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// The six arithmetic flags, which live in the `cc_*` fields.
    pub const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
    /// Every flag that is not reserved.
    pub const DEFINED: u64 = STATUS | TF | IF | DF | IOPL | NT | RF | VM | AC | VIF | VIP | ID;
}

/// Control-register bits (SDM vol. 3 §2.5).
#[allow(missing_docs)]
pub mod cr {
    pub const CR0_PE: u64 = 1 << 0;
    pub const CR0_MP: u64 = 1 << 1;
    pub const CR0_EM: u64 = 1 << 2;
    pub const CR0_TS: u64 = 1 << 3;
    pub const CR0_ET: u64 = 1 << 4;
    pub const CR0_NE: u64 = 1 << 5;
    pub const CR0_WP: u64 = 1 << 16;
    pub const CR0_AM: u64 = 1 << 18;
    pub const CR0_NW: u64 = 1 << 29;
    pub const CR0_CD: u64 = 1 << 30;
    pub const CR0_PG: u64 = 1 << 31;
    pub const CR4_TSD: u64 = 1 << 2;
    pub const CR4_DE: u64 = 1 << 3;
    pub const CR4_PSE: u64 = 1 << 4;
    pub const CR4_PAE: u64 = 1 << 5;
    pub const CR4_MCE: u64 = 1 << 6;
    pub const CR4_PGE: u64 = 1 << 7;
    pub const CR4_PCE: u64 = 1 << 8;
    pub const CR4_OSFXSR: u64 = 1 << 9;
    pub const CR4_OSXMMEXCPT: u64 = 1 << 10;
    pub const CR4_UMIP: u64 = 1 << 11;
    pub const CR4_FSGSBASE: u64 = 1 << 16;
    pub const CR4_PCIDE: u64 = 1 << 17;
    pub const CR4_OSXSAVE: u64 = 1 << 18;
    pub const CR4_SMEP: u64 = 1 << 20;
    pub const CR4_SMAP: u64 = 1 << 21;
    pub const CR4_PKE: u64 = 1 << 22;
    pub const CR4_PKS: u64 = 1 << 24;
    pub const EFER_SCE: u64 = 1 << 0;
    pub const EFER_LME: u64 = 1 << 8;
    pub const EFER_LMA: u64 = 1 << 10;
    pub const EFER_NXE: u64 = 1 << 11;
}

/// A segment register with its hidden part (SDM vol. 3 §3.4.3). TR, LDTR use the same form.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Segment {
    /// Base linear address.
    pub base: u64,
    /// Limit in bytes, granularity applied.
    pub limit: u32,
    /// Descriptor bits 8–23 of the high doubleword shifted down by 8: type 3:0, S 4, DPL 6:5, P 7, AVL 12, L 13,
    /// D/B 14, G 15. Zero for a null selector (not present).
    pub attr: u32,
    /// Visible selector.
    pub selector: u16,
}

#[allow(missing_docs)]
impl Segment {
    pub const ACCESSED: u32 = 1;
    /// Writable (data) or readable (code).
    pub const RW: u32 = 1 << 1;
    /// Expand-down (data) or conforming (code).
    pub const EXPAND_DOWN: u32 = 1 << 2;
    pub const CODE: u32 = 1 << 3;
    pub const S: u32 = 1 << 4;
    pub const PRESENT: u32 = 1 << 7;
    pub const L: u32 = 1 << 13;
    pub const DB: u32 = 1 << 14;
    pub const G: u32 = 1 << 15;

    pub fn dpl(&self) -> u8 {
        (self.attr >> 5 & 3) as u8
    }
    pub fn present(&self) -> bool {
        self.attr & Self::PRESENT != 0
    }
    /// The four type bits.
    pub fn kind(&self) -> u32 {
        self.attr & 15
    }
}

/// A descriptor-table register: GDTR or IDTR.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Table {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// Everything architectural that a snapshot of a vCPU holds, and that compiled code reads and writes in place.
///
/// The arithmetic flags are kept in a fixed lazy form that any consumer can read without knowing the producer:
/// ZF = `cc_z == 0`; SF = bit 63 of `cc_sp`; PF = even parity of the low byte of `cc_sp`; CF = bit 63 of `cc_co`;
/// OF = bit 63 ^ bit 62 of `cc_co`; AF = bit 3 of `cc_co`. Ordinary arithmetic stores the sign-extended result in the
/// first two and the carry-out vector, aligned so that the carry out of the top bit stands in bit 63, in the third.
#[repr(C)]
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct CpuState {
    /// Instruction pointer; exact at block boundaries and whenever a fault is delivered.
    pub rip: u64,
    /// Lazy ZF.
    pub cc_z: u64,
    /// Lazy SF and PF.
    pub cc_sp: u64,
    /// Lazy CF, OF and AF.
    pub cc_co: u64,
    /// RFLAGS without the arithmetic flags; bit 1 is always set.
    pub rflags: u64,
    /// General-purpose registers in encoding order.
    pub gpr: [u64; 16],
    /// YMM registers: four 64-bit words each; the low two are XMM.
    pub ymm: [[u64; 4]; 16],
    /// ES, CS, SS, DS, FS, GS.
    pub seg: [Segment; 6],
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table register.
    pub gdtr: Table,
    /// Interrupt descriptor table register.
    pub idtr: Table,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3 with the PCID, without bit 63.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// XCR0.
    pub xcr0: u64,
    /// PKRU.
    pub pkru: u32,
    /// IA32_EFER.
    pub efer: u64,
    /// DR0–DR3, then unused DR4–DR5, DR6, DR7.
    pub dr: [u64; 8],
    /// MXCSR. While guest code runs, the sticky flags accumulate in the host and are folded in when read.
    pub mxcsr: u32,
    /// Current privilege level, equal to SS.DPL (SDM vol. 3 §5.5).
    pub cpl: u8,
    /// Interrupt shadow of STI (bit 0) and of MOV SS/POP SS (bit 1).
    pub shadow: u8,
    /// Whether NMIs are blocked until IRET.
    pub nmi_blocked: bool,
    /// Whether the CPU is halted and waits for an interrupt.
    pub halted: bool,
    /// The x87 unit; MMX registers alias its significands.
    pub x87: X87,
    /// Model-specific registers that are plain storage.
    pub msr: Msrs,
    /// Guest TSC minus the platform's (IA32_TSC writes, IA32_TSC_ADJUST).
    pub tsc_offset: u64,
    /// What is to be delivered before the next instruction.
    pub due: Option<Due>,
}

/// An event on its way to the guest: taken from where it came from, not delivered yet. CR2 and DR6 have what belongs to
/// it already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Due {
    /// Its vector.
    pub vector: u8,
    /// What it is.
    pub kind: DueKind,
}

/// Kinds of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum DueKind {
    /// An acknowledged interrupt.
    Interrupt,
    /// The non-maskable interrupt.
    Nmi,
    /// An exception, with its error code if it has one.
    Exception(Option<u32>),
}

/// Model-specific registers that only hold what was written (SDM vol. 4).
#[allow(missing_docs)]
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub fmask: u64,
    pub kernel_gs_base: u64,
    pub tsc_aux: u64,
    pub tsc_adjust: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub spec_ctrl: u64,
    pub pkrs: u32,
    pub debugctl: u64,
    pub mtrr_def_type: u64,
    pub mtrr_fixed: [u64; 11],
    pub mtrr_variable: [[u64; 2]; 8],
    pub mcg_status: u64,
    pub mc_banks: [[u64; 4]; 4],
}

impl CpuState {
    /// The state after RESET (SDM vol. 3 table 9-1).
    pub fn reset() -> CpuState {
        let data = Segment { base: 0, limit: 0xffff, attr: 0x93, selector: 0 };
        let mut seg = [data; 6];
        seg[usize::from(seg::CS)] = Segment { base: 0xffff_0000, limit: 0xffff, attr: 0x9b, selector: 0xf000 };
        let mut dr = [0; 8];
        dr[6] = 0xffff_0ff0;
        dr[7] = 0x400;
        let mut gpr = [0; 16];
        gpr[usize::from(gpr::RDX)] = 0x600;
        CpuState {
            rip: 0xfff0,
            cc_z: 1,
            cc_sp: 1,
            cc_co: 0,
            rflags: 2,
            gpr,
            ymm: [[0; 4]; 16],
            seg,
            ldtr: Segment { limit: 0xffff, attr: 0x82, ..Segment::default() },
            tr: Segment { limit: 0xffff, attr: 0x8b, ..Segment::default() },
            gdtr: Table { base: 0, limit: 0xffff },
            idtr: Table { base: 0, limit: 0xffff },
            cr0: cr::CR0_ET | cr::CR0_NW | cr::CR0_CD,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            xcr0: 1,
            pkru: 0,
            efer: 0,
            dr,
            mxcsr: 0x1f80,
            cpl: 0,
            shadow: 0,
            nmi_blocked: false,
            halted: false,
            x87: X87::reset(),
            msr: Msrs { pat: 0x0007_0406_0007_0406, misc_enable: 1, ..Msrs::default() },
            tsc_offset: 0,
            due: None,
        }
    }

    /// What INIT makes of this state (SDM vol. 3 table 10-1): what belongs to the floating-point and vector units, the MSRs
    /// and the cache controls stay as they are.
    pub fn after_init(&self) -> CpuState {
        const KEPT: u64 = cr::CR0_CD | cr::CR0_NW;
        let reset = CpuState::reset();
        CpuState {
            cr0: reset.cr0 & !KEPT | self.cr0 & KEPT,
            ymm: self.ymm,
            x87: self.x87,
            mxcsr: self.mxcsr,
            xcr0: self.xcr0,
            pkru: self.pkru,
            msr: self.msr.clone(),
            tsc_offset: self.tsc_offset,
            ..reset
        }
    }

    /// Where the CPU is, on one line for the user.
    pub fn place(&self) -> String {
        let rsp = self.gpr[usize::from(gpr::RSP)];
        format!(
            "at RIP {:#x}, RSP {rsp:#x}, CR0 {:#x}, CR2 {:#x}, CR3 {:#x}, CR4 {:#x}",
            self.rip, self.cr0, self.cr2, self.cr3, self.cr4
        )
    }

    /// RFLAGS as PUSHF sees it, arithmetic flags folded in.
    pub fn flags(&self) -> u64 {
        let bit = |on: bool, f: u64| if on { f } else { 0 };
        self.rflags
            | bit(self.cc_co >> 63 != 0, flag::CF)
            | bit((self.cc_sp as u8).count_ones() & 1 == 0, flag::PF)
            | bit(self.cc_co >> 3 & 1 != 0, flag::AF)
            | bit(self.cc_z == 0, flag::ZF)
            | bit(self.cc_sp >> 63 != 0, flag::SF)
            | bit((self.cc_co ^ self.cc_co << 1) >> 63 != 0, flag::OF)
    }

    /// Sets all of RFLAGS: the arithmetic flags in their lazy form, the others with reserved bits forced.
    pub fn set_flags(&mut self, flags: u64) {
        self.set_status(flags);
        self.rflags = flags & (flag::DEFINED & !flag::STATUS) | 2;
    }

    /// Sets the six arithmetic flags from their RFLAGS bits.
    pub fn set_status(&mut self, flags: u64) {
        let has = |f: u64| u64::from(flags & f != 0);
        self.cc_z = 1 - has(flag::ZF);
        self.cc_sp = has(flag::SF) << 63 | (1 - has(flag::PF));
        self.cc_co = has(flag::CF) << 63 | (has(flag::CF) ^ has(flag::OF)) << 62 | has(flag::AF) << 3;
    }

    /// The low 128 bits of vector register `r`.
    #[inline(always)]
    pub fn xmm(&self, r: u8) -> u128 {
        let y = &self.ymm[usize::from(r & 15)];
        u128::from(y[0]) | u128::from(y[1]) << 64
    }

    /// Bits 255:128 of vector register `r`.
    #[inline(always)]
    pub fn ymm_high(&self, r: u8) -> u128 {
        let y = &self.ymm[usize::from(r & 15)];
        u128::from(y[2]) | u128::from(y[3]) << 64
    }

    /// Writes the low 128 bits of vector register `r`, keeping the upper part.
    #[inline(always)]
    pub fn set_xmm(&mut self, r: u8, v: u128) {
        let y = &mut self.ymm[usize::from(r & 15)];
        y[0] = v as u64;
        y[1] = (v >> 64) as u64;
    }

    /// Writes bits 255:128 of vector register `r`.
    #[inline(always)]
    pub fn set_ymm_high(&mut self, r: u8, v: u128) {
        let y = &mut self.ymm[usize::from(r & 15)];
        y[2] = v as u64;
        y[3] = (v >> 64) as u64;
    }

    /// Whether CR0.PE is set.
    #[inline(always)]
    pub fn protected(&self) -> bool {
        self.cr0 & cr::CR0_PE != 0
    }

    /// Whether EFER.LMA is set (64-bit or compatibility mode).
    #[inline(always)]
    pub fn long_mode(&self) -> bool {
        self.efer & cr::EFER_LMA != 0
    }

    /// Whether the CPU runs 64-bit code.
    #[inline(always)]
    pub fn code64(&self) -> bool {
        self.long_mode() && self.seg[usize::from(seg::CS)].attr & Segment::L != 0
    }

    /// Whether AVX instructions exist here and now, CR0.TS aside: neither CR0.EM nor CR4.OSFXSR matters to them, but
    /// real-address and virtual-8086 mode have no VEX prefix (SDM vol. 2 §2.4, §2.3.5).
    #[inline(always)]
    pub fn avx_enabled(&self) -> bool {
        self.protected() && !self.vm86() && self.cr4 & cr::CR4_OSXSAVE != 0 && self.xcr0 & 6 == 6
    }

    /// Whether the CPU is in virtual-8086 mode.
    #[inline(always)]
    pub fn vm86(&self) -> bool {
        self.rflags & flag::VM != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a running 64-bit system has set is as after RESET, but for what INIT leaves alone (SDM vol. 3 table 10-1).
    #[test]
    fn init_resets_all_but_the_vector_state_and_msrs() {
        let mut s = CpuState::reset();
        s.rip = 0xffff_8000_0000_1234;
        s.gpr = [7; 16];
        s.set_flags(0x246);
        s.seg = [Segment { base: 1, limit: u32::MAX, attr: 0xc0f3, selector: 0x33 }; 6];
        s.tr = Segment { base: 0x5000, limit: 0x67, attr: 0x8b, selector: 0x40 };
        s.idtr = Table { base: 0x6000, limit: 0xfff };
        s.gdtr = Table { base: 0x7000, limit: 0x7f };
        (s.cr0, s.cr2, s.cr3, s.cr4, s.efer) = (0x8005_0033, 0x1234, 0x5000, 0x6f0, 0xd01);
        s.dr = [1; 8];
        (s.cpl, s.shadow, s.nmi_blocked, s.halted) = (3, 1, true, true);
        s.due = Some(Due { vector: 13, kind: DueKind::Exception(Some(0)) });
        (s.ymm[3], s.mxcsr, s.xcr0, s.pkru, s.tsc_offset) = ([1, 2, 3, 4], 0x1fa0, 7, 0x5555, 99);
        (s.msr.lstar, s.msr.pat, s.msr.tsc_aux) = (0xffff_8000_0000_0000, 0x0407_0506_0007_0106, 5);

        let reset = CpuState::reset();
        let expected = CpuState {
            cr0: cr::CR0_ET,
            ymm: s.ymm,
            mxcsr: 0x1fa0,
            xcr0: 7,
            pkru: 0x5555,
            tsc_offset: 99,
            msr: s.msr.clone(),
            ..reset.clone()
        };
        assert_eq!(s.after_init(), expected);
        // The cache controls are left as they are, and after RESET they are set.
        assert_eq!(reset.after_init(), reset);
    }
}
