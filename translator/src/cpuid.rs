//! CPU models: what CPUID reports and which instructions exist, from one table of features.

use std::sync::{Arc, OnceLock};

use iced_x86::{Code, CpuidFeature};

use crate::engine::CpuidEntry;
use crate::mmu::walk::PHYSICAL_BITS;
use crate::platform::{APIC_HZ, TSC_HZ};
use crate::state::{CpuState, Segment, cr, seg};
use crate::xsave_area::{self, component};

/// How much of the instruction set a model has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub enum Level {
    /// The x86-64 psABI's level 2: up to SSE4.2 and POPCNT.
    V2,
    /// Level 3: AVX2, BMI, FMA, F16C, LZCNT, MOVBE, XSAVE.
    V3,
    /// Everything that is implemented.
    Max,
}

/// A CPUID output register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reg {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A feature: where CPUID shows it, from which level on a model has it, and the instructions it stands for.
struct Feature {
    leaf: u32,
    subleaf: u32,
    reg: Reg,
    bit: u32,
    level: Level,
    iced: &'static [CpuidFeature],
}

const fn feature(leaf: u32, subleaf: u32, reg: Reg, bit: u32, level: Level, iced: &'static [CpuidFeature]) -> Feature {
    Feature { leaf, subleaf, reg, bit, level, iced }
}

use CpuidFeature as F;
use Level::{Max, V2, V3};
use Reg::{Eax, Ebx, Ecx, Edx};

/// CPUID.01H:EDX.APIC: the local APIC exists and is enabled.
pub const LEAF_1_EDX_APIC: u32 = 1 << 9;

/// Every feature that any model reports (SDM vol. 2, CPUID).
const FEATURES: &[Feature] = &[
    // Leaf 1, EDX.
    feature(1, 0, Edx, 0, V2, &[F::FPU, F::FPU287, F::FPU387]),
    feature(1, 0, Edx, 2, V2, &[]), // DE
    feature(1, 0, Edx, 3, V2, &[]), // PSE
    feature(1, 0, Edx, 4, V2, &[F::TSC]),
    feature(1, 0, Edx, 5, V2, &[F::MSR]),
    feature(1, 0, Edx, 6, V2, &[]), // PAE
    feature(1, 0, Edx, 7, V2, &[]), // MCE
    feature(1, 0, Edx, 8, V2, &[F::CX8]),
    feature(1, 0, Edx, LEAF_1_EDX_APIC.trailing_zeros(), V2, &[]),
    feature(1, 0, Edx, 11, V2, &[F::SEP]),
    feature(1, 0, Edx, 12, V2, &[]), // MTRR
    feature(1, 0, Edx, 13, V2, &[]), // PGE
    feature(1, 0, Edx, 14, V2, &[]), // MCA
    feature(1, 0, Edx, 15, V2, &[F::CMOV]),
    feature(1, 0, Edx, 16, V2, &[]), // PAT
    feature(1, 0, Edx, 17, V2, &[]), // PSE-36
    feature(1, 0, Edx, 19, V2, &[F::CLFSH]),
    feature(1, 0, Edx, 23, V2, &[F::MMX]),
    feature(1, 0, Edx, 24, V2, &[F::FXSR]),
    feature(1, 0, Edx, 25, V2, &[F::SSE]),
    feature(1, 0, Edx, 26, V2, &[F::SSE2]),
    // Leaf 1, ECX.
    feature(1, 0, Ecx, 0, V2, &[F::SSE3]),
    feature(1, 0, Ecx, 1, V2, &[F::PCLMULQDQ]),
    feature(1, 0, Ecx, 3, V2, &[F::MONITOR]),
    feature(1, 0, Ecx, 9, V2, &[F::SSSE3]),
    feature(1, 0, Ecx, 12, V3, &[F::FMA]),
    feature(1, 0, Ecx, 13, V2, &[F::CMPXCHG16B]),
    feature(1, 0, Ecx, 17, V2, &[]), // PCID
    feature(1, 0, Ecx, 19, V2, &[F::SSE4_1]),
    feature(1, 0, Ecx, 20, V2, &[F::SSE4_2]),
    feature(1, 0, Ecx, 21, V2, &[]), // x2APIC
    feature(1, 0, Ecx, 22, V3, &[F::MOVBE]),
    feature(1, 0, Ecx, 23, V2, &[F::POPCNT]),
    feature(1, 0, Ecx, 24, V2, &[]), // TSC deadline
    feature(1, 0, Ecx, 25, V2, &[F::AES]),
    feature(1, 0, Ecx, 26, V3, &[F::XSAVE]),
    feature(1, 0, Ecx, 28, V3, &[F::AVX]),
    feature(1, 0, Ecx, 29, V3, &[F::F16C]),
    feature(1, 0, Ecx, 30, Max, &[F::RDRAND]),
    feature(1, 0, Ecx, 31, V2, &[]), // hypervisor
    // Leaf 7.
    feature(7, 0, Ebx, 0, V2, &[F::FSGSBASE]),
    feature(7, 0, Ebx, 1, V2, &[]), // TSC_ADJUST
    feature(7, 0, Ebx, 3, V3, &[F::BMI1]),
    feature(7, 0, Ebx, 5, V3, &[F::AVX2]),
    feature(7, 0, Ebx, 7, V2, &[]), // SMEP
    feature(7, 0, Ebx, 8, V3, &[F::BMI2]),
    feature(7, 0, Ebx, 9, V2, &[]), // ERMS
    feature(7, 0, Ebx, 10, V2, &[F::INVPCID]),
    feature(7, 0, Ebx, 18, Max, &[F::RDSEED]),
    feature(7, 0, Ebx, 19, Max, &[F::ADX]),
    feature(7, 0, Ebx, 20, V2, &[F::SMAP]),
    feature(7, 0, Ebx, 23, V2, &[F::CLFLUSHOPT]),
    feature(7, 0, Ebx, 24, V2, &[F::CLWB]),
    feature(7, 0, Ebx, 29, Max, &[F::SHA]),
    feature(7, 0, Ecx, 2, V2, &[]), // UMIP
    feature(7, 0, Ecx, 3, Max, &[F::PKU]),
    feature(7, 0, Ecx, 22, Max, &[F::RDPID]),
    feature(7, 0, Ecx, 31, Max, &[]), // PKS
    feature(7, 0, Edx, 4, V2, &[]),   // FSRM
    feature(7, 0, Edx, 26, V2, &[]),  // IBRS, IBPB
    feature(7, 0, Edx, 27, V2, &[]),  // STIBP
    feature(7, 0, Edx, 28, V2, &[]),  // L1D_FLUSH
    feature(7, 0, Edx, 29, V2, &[]),  // ARCH_CAPABILITIES
    feature(7, 0, Edx, 31, V2, &[]),  // SSBD
    feature(7, 2, Edx, 4, V2, &[]),   // BHI_CTRL: kernels then clear no branch history by software on each entry
    // XSAVE extensions.
    feature(0xd, 1, Eax, 0, V3, &[F::XSAVEOPT]),
    feature(0xd, 1, Eax, 1, V3, &[F::XSAVEC]),
    feature(0xd, 1, Eax, 2, V3, &[]), // XGETBV with ECX=1
    // Extended leaves.
    feature(0x8000_0001, 0, Ecx, 0, V2, &[]), // LAHF/SAHF in 64-bit mode
    feature(0x8000_0001, 0, Ecx, 5, V3, &[F::LZCNT]),
    feature(0x8000_0001, 0, Ecx, 8, V2, &[F::PREFETCHW]),
    feature(0x8000_0001, 0, Edx, 11, V2, &[F::SYSCALL]),
    feature(0x8000_0001, 0, Edx, 20, V2, &[]), // NX
    feature(0x8000_0001, 0, Edx, 26, V2, &[]), // 1 GiB pages
    feature(0x8000_0001, 0, Edx, 27, V2, &[F::RDTSCP]),
    feature(0x8000_0001, 0, Edx, 29, V2, &[F::X64]),
    feature(0x8000_0007, 0, Edx, 8, V2, &[]), // invariant TSC
    feature(6, 0, Eax, 2, V2, &[]),           // ARAT
];

/// Instruction classes that every x86-64 CPU has, or that decode as NOPs where they are not implemented.
const ALWAYS: &[CpuidFeature] = &[
    F::INTEL8086,
    F::INTEL8086_ONLY,
    F::INTEL186,
    F::INTEL286,
    F::INTEL386,
    F::INTEL486,
    F::CPUID,
    F::MULTIBYTENOP,
    F::PAUSE,
    F::RDPMC,
    F::FPU,
    F::SYSCALL,
];

/// What needs no feature of the host's processor, as an engine that runs guest code on it has it all the same: TSC
/// deadline and x2APIC, with the local APIC, and that there is a hypervisor. KVM reports the first of them elsewhere.
const OWN: [(u32, Reg, u32); 3] = [(1, Ecx, 24), (1, Ecx, 21), (1, Ecx, 31)];

/// By [`Code`], whether an instruction exists: found out when it is first asked.
type Executed = Arc<OnceLock<Box<[bool]>>>;

/// A set of features, by their places in [`FEATURES`].
type Features = u128;
const _: () = assert!(FEATURES.len() <= Features::BITS as usize);

/// A CPU model.
#[derive(Clone, Debug)]
pub struct CpuModel {
    level: Level,
    features: Features,
    /// Models of one level share theirs.
    executed: Executed,
    cpus: u32,
    apic_id: u32,
    tsc_hz: u64,
    physical_bits: u32,
}

impl CpuModel {
    /// CPU number `apic_id` of `cpus`, with the instruction set of `level` and a time-stamp counter of [`TSC_HZ`].
    pub fn new(level: Level, cpus: u32, apic_id: u32) -> CpuModel {
        static EXECUTED: OnceLock<[Executed; 3]> = OnceLock::new();
        let features =
            FEATURES.iter().enumerate().filter(|(_, x)| x.level <= level).fold(0, |all, (k, _)| all | 1 << k);
        let executed = EXECUTED.get_or_init(Default::default)[level as usize].clone();
        let cpus = cpus.max(1);
        CpuModel { level, features, executed, cpus, apic_id, tsc_hz: TSC_HZ, physical_bits: PHYSICAL_BITS }
    }

    /// The same model as CPU number `apic_id` of `cpus`.
    pub fn numbered(&self, cpus: u32, apic_id: u32) -> CpuModel {
        CpuModel { cpus: cpus.max(1), apic_id, ..self.clone() }
    }

    /// The same model with a time-stamp counter of `hz`.
    pub fn with_tsc(&self, hz: u64) -> CpuModel {
        CpuModel { tsc_hz: hz, ..self.clone() }
    }

    /// What is left of the model where guest code runs on a processor that has only what `host` reports.
    pub fn limited_to(&self, host: &[CpuidEntry]) -> CpuModel {
        let of = |leaf, subleaf| host.iter().find(|e| e.leaf == leaf && e.subleaf == subleaf).map(|e| e.registers);
        let has = |x: &Feature| {
            let bit = of(x.leaf, x.subleaf).is_some_and(|r| r[x.reg as usize] >> x.bit & 1 != 0);
            // XSAVE puts a component where the processor has its place, be that another than ours.
            let placed = !x.iced.contains(&F::PKU)
                || xsave_area::EXTENDED
                    .iter()
                    .filter(|c| c.bit == component::PKRU)
                    .all(|c| of(0xd, c.bit.trailing_zeros()).is_some_and(|r| r[1] as usize == c.offset));
            (bit || OWN.contains(&(x.leaf, x.reg, x.bit))) && placed
        };
        let kept = FEATURES.iter().enumerate().filter(|(_, x)| has(x)).fold(0, |all, (k, _)| all | 1 << k);
        let bits = of(0x8000_0008, 0).map_or(PHYSICAL_BITS, |r| r[0] & 0xff);
        CpuModel {
            features: self.features & kept,
            executed: Arc::default(),
            physical_bits: self.physical_bits.min(bits),
            ..self.clone()
        }
    }

    /// The instruction classes that its level has and it has not.
    pub fn lacks(&self) -> Vec<String> {
        let whole = CpuModel::new(self.level, 1, 0);
        whole.features().flat_map(|x| x.iced).filter(|&&f| !self.supports(f)).map(|f| format!("{f:?}")).collect()
    }

    /// Whether an instruction exists.
    #[inline]
    pub fn executes(&self, code: Code) -> bool {
        let all = self.executed.get_or_init(|| {
            let classes = |code: Code| code.cpuid_features().iter().all(|&f| self.supports(f));
            Code::values().map(classes).collect()
        });
        all[code as usize]
    }

    /// The features that the model has.
    fn features(&self) -> impl Iterator<Item = &'static Feature> {
        let own = self.features;
        FEATURES.iter().enumerate().filter(move |(k, _)| own >> k & 1 != 0).map(|(_, x)| x)
    }

    /// Whether instructions of an iced feature class exist.
    pub fn supports(&self, f: CpuidFeature) -> bool {
        ALWAYS.contains(&f) || self.features().any(|x| x.iced.contains(&f))
    }

    fn has(&self, leaf: u32, reg: Reg, bit: u32) -> bool {
        self.features().any(|x| x.leaf == leaf && x.reg == reg && x.bit == bit)
    }

    /// What CPUID reports, leaf by leaf, for an engine in whose hands CPUID is. What depends on the state is as after
    /// RESET, but for SYSCALL, which is reported as in 64-bit mode.
    pub fn table(&self) -> Vec<CpuidEntry> {
        let mut s = CpuState::reset();
        s.efer |= cr::EFER_LMA;
        s.seg[usize::from(seg::CS)].attr |= Segment::L;
        let leaves = (0..=self.max_leaf()).chain([0x4000_0000, 0x4000_0010]).chain(0x8000_0000..=0x8000_0008);
        let subleaves = |leaf| match leaf {
            4 => Some(5),
            7 | 0xb => Some(3),
            0xd => Some(64),
            _ => None,
        };
        let entry =
            |leaf, subleaf, indexed| CpuidEntry { leaf, subleaf, indexed, registers: self.cpuid(leaf, subleaf, &s) };
        leaves
            .flat_map(|leaf| (0..subleaves(leaf).unwrap_or(1)).map(move |n| (leaf, n)))
            .map(|(leaf, n)| entry(leaf, n, subleaves(leaf).is_some()))
            .filter(|e| e.subleaf == 0 || e.registers != [0; 4])
            .collect()
    }

    /// What `host` reports, as this CPU: its number, the topology, the clocks and the hypervisor are the model's.
    pub fn of_host(&self, host: &[CpuidEntry]) -> Vec<CpuidEntry> {
        let own = self.table();
        let replaced = |leaf: u32| matches!(leaf, 4 | 0xb | 0x15 | 0x16 | 0x1f) || leaf >> 28 == 4;
        let max = host.iter().find(|e| e.leaf == 0).map_or(0, |e| e.registers[0]);
        let mut all: Vec<CpuidEntry> = host.iter().filter(|e| !replaced(e.leaf)).copied().collect();
        // Deterministic caches, topology and frequencies are leaves of Intel's; where there are none of these, none are
        // made up.
        all.extend(own.iter().filter(|e| replaced(e.leaf) && (e.leaf >> 28 == 4 || e.leaf <= max)).copied());
        for e in all.iter_mut().filter(|e| e.leaf == 1) {
            let [_, ebx, ecx, edx] = self.leaf_1(&CpuState::reset());
            e.registers[1] = ebx;
            e.registers[2] |= ecx & OWN.iter().fold(0, |bits, (.., bit)| bits | 1 << bit);
            e.registers[3] = e.registers[3] & !(1 << 28) | edx & (1 << 28);
        }
        all
    }

    /// State components that XCR0 may enable.
    pub fn xcr0_mask(&self) -> u64 {
        if !self.has(1, Ecx, 26) {
            return component::X87;
        }
        let avx = if self.has(1, Ecx, 28) { component::AVX } else { 0 };
        let pkru = if self.has(7, Ecx, 3) { component::PKRU } else { 0 };
        component::X87 | component::SSE | avx | pkru
    }

    /// Whether every CR4 bit of `v` belongs to a feature that the model has.
    pub fn allows_cr4(&self, v: u64) -> bool {
        [
            (cr::CR4_OSXSAVE, 1, Ecx, 26),
            (cr::CR4_PCIDE, 1, Ecx, 17),
            (cr::CR4_SMEP, 7, Ebx, 7),
            (cr::CR4_SMAP, 7, Ebx, 20),
            (cr::CR4_PKE, 7, Ecx, 3),
            (cr::CR4_PKS, 7, Ecx, 31),
        ]
        .iter()
        .all(|&(bit, leaf, reg, n)| v & bit == 0 || self.has(leaf, reg, n))
    }

    /// The bits of one output register that the feature table sets.
    fn bits(&self, leaf: u32, subleaf: u32, reg: Reg) -> u32 {
        self.features()
            .filter(|x| x.leaf == leaf && x.subleaf == subleaf && x.reg == reg)
            .fold(0, |bits, x| bits | 1 << x.bit)
    }

    fn registers(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        [Eax, Ebx, Ecx, Edx].map(|r| self.bits(leaf, subleaf, r))
    }

    fn max_leaf(&self) -> u32 {
        0x16
    }

    /// MSR_PLATFORM_INFO: the base ratio, of 100 MHz.
    pub fn platform_info(&self) -> u64 {
        (self.tsc_hz / 100_000_000) << 8
    }

    /// CPUID: EAX, EBX, ECX, EDX of a leaf.
    pub fn cpuid(&self, leaf: u32, subleaf: u32, s: &CpuState) -> [u32; 4] {
        let leaf = match leaf {
            0x4000_0000..=0x4000_0010 | 0x8000_0000..=0x8000_0008 => leaf,
            n if n <= self.max_leaf() => n,
            // An Intel CPU answers an unknown leaf with its highest basic one.
            _ => self.max_leaf(),
        };
        match leaf {
            0 => signature(self.max_leaf(), b"GenuineIntel", [0, 8, 4]),
            1 => self.leaf_1(s),
            // Cache and TLB descriptors: "see leaf 4".
            2 => [0x00ff_ff01, 0, 0, 0],
            4 => self.caches(subleaf),
            5 => [64, 64, 3, 0],
            6 => self.registers(6, 0),
            7 => match subleaf {
                0 => {
                    let ospke = if s.cr4 & cr::CR4_PKE != 0 { 1 << 4 } else { 0 };
                    [2, self.bits(7, 0, Ebx), self.bits(7, 0, Ecx) | ospke, self.bits(7, 0, Edx)]
                }
                1 | 2 => self.registers(7, subleaf),
                _ => [0; 4],
            },
            0xb => self.topology(subleaf),
            0xd => self.xsave(subleaf, s),
            0x15 => {
                // Linux multiplies the crystal's frequency in kHz by the numerator, in 32 bits.
                let (numerator, denominator) = ratio(self.tsc_hz, APIC_HZ, u64::from(u32::MAX) / (APIC_HZ / 1000));
                [denominator as u32, numerator as u32, APIC_HZ as u32, 0]
            }
            0x16 => [(self.tsc_hz / 1_000_000) as u32, (self.tsc_hz / 1_000_000) as u32, 100, 0],
            0x4000_0000 => signature(0x4000_0010, b"DiglotDiglot", [0, 4, 8]),
            // TSC and APIC-timer frequency in kHz, the form that Linux reads from several hypervisors.
            0x4000_0010 => [(self.tsc_hz / 1000) as u32, (APIC_HZ / 1000) as u32, 0, 0],
            0x8000_0000 => [0x8000_0008, 0, 0, 0],
            0x8000_0001 => {
                let mut r = self.registers(leaf, 0);
                // SYSCALL is reported in 64-bit mode only.
                if !s.code64() {
                    r[3] &= !(1 << 11);
                }
                r
            }
            0x8000_0002..=0x8000_0004 => self.brand(leaf - 0x8000_0002),
            0x8000_0006 => [0, 0, 2048 << 16 | 8 << 12 | 64, 0],
            0x8000_0007 => self.registers(leaf, 0),
            0x8000_0008 => [48 << 8 | self.physical_bits, 0, 0, 0],
            _ => [0; 4],
        }
    }

    fn leaf_1(&self, s: &CpuState) -> [u32; 4] {
        let [_, _, mut ecx, edx] = self.registers(1, 0);
        if s.cr4 & cr::CR4_OSXSAVE != 0 {
            ecx |= 1 << 27;
        }
        let htt = if self.cpus > 1 { 1 << 28 } else { 0 };
        // Family 6, model 8Fh, stepping 8; CLFLUSH line of 64 bytes.
        let ebx = self.apic_id << 24 | self.cpus.next_power_of_two().min(255) << 16 | 8 << 8;
        [0x000806f8, ebx, ecx, edx | htt]
    }

    fn caches(&self, subleaf: u32) -> [u32; 4] {
        // (type, level, KiB, ways); every CPU has its own caches but shares the last.
        let (kind, level, kib, ways): (u32, u32, u32, u32) = match subleaf {
            0 => (1, 1, 32, 8),
            1 => (2, 1, 32, 8),
            2 => (3, 2, 2048, 16),
            3 => (3, 3, 16384, 16),
            _ => return [0; 4],
        };
        let sets = kib * 1024 / 64 / ways;
        let sharing = if level == 3 { self.cpus.next_power_of_two() - 1 } else { 0 };
        let cores = self.cpus.next_power_of_two() - 1;
        [cores.min(63) << 26 | sharing << 14 | 1 << 8 | level << 5 | kind, (ways - 1) << 22 | 63, sets - 1, 0]
    }

    fn topology(&self, subleaf: u32) -> [u32; 4] {
        let shift = self.cpus.next_power_of_two().trailing_zeros();
        match subleaf {
            0 => [0, 1, 1 << 8, self.apic_id],
            1 => [shift, self.cpus, 2 << 8 | 1, self.apic_id],
            n => [0, 0, n & 0xff, self.apic_id],
        }
    }

    fn xsave(&self, subleaf: u32, s: &CpuState) -> [u32; 4] {
        let mask = self.xcr0_mask();
        if mask == component::X87 {
            return [0; 4];
        }
        match subleaf {
            0 => {
                let [now, most] = [s.xcr0, mask].map(|components| xsave_area::standard_size(components) as u32);
                [mask as u32, now, most, 0]
            }
            1 => {
                let [eax, ..] = self.registers(0xd, 1);
                [eax, xsave_area::compacted_size(s.xcr0) as u32, 0, 0]
            }
            n => match xsave_area::EXTENDED.iter().find(|c| 1u64.checked_shl(n) == Some(c.bit) && mask & c.bit != 0) {
                Some(c) => [c.size as u32, c.offset as u32, 0, 0],
                None => [0; 4],
            },
        }
    }

    fn brand(&self, part: u32) -> [u32; 4] {
        let level = match self.level {
            V2 => "x86-64-v2",
            V3 => "x86-64-v3",
            Max => "max",
        };
        let mut text = [0u8; 48];
        let name = format!("Diglot virtual CPU ({level})");
        text[..name.len()].copy_from_slice(name.as_bytes());
        let at = part as usize * 16;
        [0, 4, 8, 12].map(|k| word(&text, at + k))
    }
}

/// The fraction nearest to `a / b`, of those that continue it, whose numerator is at most `most`; numerator and
/// denominator.
fn ratio(mut a: u64, mut b: u64, most: u64) -> (u64, u64) {
    let (mut before, mut last) = ((0, 1), (1, 0));
    while b != 0 {
        let whole = a / b;
        let next = (whole.saturating_mul(last.0) + before.0, whole.saturating_mul(last.1) + before.1);
        if next.0 > most {
            break;
        }
        (before, last) = (last, next);
        (a, b) = (b, a % b);
    }
    last
}

fn word(text: &[u8], at: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&text[at..at + 4]);
    u32::from_le_bytes(bytes)
}

/// EAX and a 12-byte signature whose parts at `order` go to EBX, ECX, EDX.
fn signature(eax: u32, text: &[u8; 12], order: [usize; 3]) -> [u32; 4] {
    let [b, c, d] = order.map(|at| word(text, at));
    [eax, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Leaf 15H tells the time-stamp counter's frequency to a few millionths, in numbers that 32 bits multiply.
    #[test]
    fn the_clock_is_told_exactly_and_in_small_numbers() {
        let s = CpuState::reset();
        for hz in [TSC_HZ, 2_599_998_000, 2_899_999_999, 3_600_000_000, 4_999_987_000, 800_000_000] {
            let [denominator, numerator, crystal, _] = CpuModel::new(Max, 1, 0).with_tsc(hz).cpuid(0x15, 0, &s);
            let khz = u64::from(crystal / 1000) * u64::from(numerator);
            assert!(u32::try_from(khz).is_ok(), "{hz}");
            let told = khz * 1000 / u64::from(denominator);
            assert!(told.abs_diff(hz) <= hz / 200_000, "{hz} is told as {told}");
        }
        assert_eq!(CpuModel::new(Max, 1, 0).cpuid(0x15, 0, &s), [1, 1, 1_000_000_000, 0]);
    }

    /// What a host lacks is neither reported nor executed, and what KVM reports elsewhere stays.
    #[test]
    fn a_model_is_limited_to_its_host() {
        let s = CpuState::reset();
        let max = CpuModel::new(Max, 1, 0);
        let mut host = max.table();
        assert_eq!((max.limited_to(&host).features, max.limited_to(&host).lacks()), (max.features, vec![]));
        for e in &mut host {
            match (e.leaf, e.subleaf) {
                (1, _) => e.registers[2] &= !(1 << 25 | 1 << 24 | 1 << 21),
                // AMD's place of PKRU.
                (0xd, 9) => e.registers[1] = 2432,
                (0x8000_0008, _) => e.registers[0] = 48 << 8 | 39,
                _ => {}
            }
        }
        let limited = max.limited_to(&host);
        assert_eq!(limited.lacks(), ["AES", "PKU"]);
        assert!(!limited.executes(Code::Aesenc_xmm_xmmm128) && max.executes(Code::Aesenc_xmm_xmmm128));
        assert_eq!(limited.xcr0_mask(), 7);
        let [_, _, ecx, _] = limited.cpuid(1, 0, &s);
        assert_eq!((ecx >> 25 & 1, ecx >> 24 & 1, ecx >> 21 & 1), (0, 1, 1));
        assert_eq!(limited.cpuid(0x8000_0008, 0, &s)[0], 48 << 8 | 39);
    }

    /// A guest on the host's processor has its number and topology of the machine, and what the host has for the rest.
    #[test]
    fn the_hosts_own_processor_is_numbered() {
        let host = [
            CpuidEntry { leaf: 0, subleaf: 0, indexed: false, registers: [0x10, 1, 2, 3] },
            CpuidEntry { leaf: 1, subleaf: 0, indexed: false, registers: [0xa20f12, 0x1234_5678, 1 << 13, 1 << 28] },
            CpuidEntry { leaf: 0xb, subleaf: 0, indexed: true, registers: [9; 4] },
        ];
        let seen = CpuModel::new(Max, 4, 2).of_host(&host);
        let of = |leaf| seen.iter().find(|e| e.leaf == leaf).map(|e| e.registers);
        assert_eq!(of(0), Some([0x10, 1, 2, 3]));
        let [eax, ebx, ecx, edx] = of(1).expect("leaf 1");
        assert_eq!((eax, ebx >> 24, ecx >> 13 & 1, ecx >> 31, edx), (0xa20f12, 2, 1, 1, 1 << 28));
        assert_eq!(of(0xb).map(|r| r[3]), Some(2));
        assert_eq!(
            (of(0x15), of(0x4000_0000).is_some()),
            (None, true),
            "leaves beyond the host's last are not made up"
        );
    }

    #[test]
    fn levels_are_monotonic() {
        let s = CpuState::reset();
        let [v2, v3, max] = [V2, V3, Max].map(|l| CpuModel::new(l, 1, 0));
        for leaf in [1, 6, 7, 0xd, 0x8000_0001, 0x8000_0007] {
            for reg in [Eax, Ebx, Ecx, Edx] {
                let [a, b, c] = [&v2, &v3, &max].map(|m| m.bits(leaf, u32::from(leaf == 0xd), reg));
                assert_eq!((a & !b, b & !c), (0, 0), "leaf {leaf:#x}");
            }
        }
        assert_eq!(v2.cpuid(0xd, 0, &s), [0; 4]);
        assert_eq!(v3.cpuid(0xd, 0, &s), [7, 576, 832, 0]);
        assert_eq!(max.cpuid(0xd, 0, &s), [0x207, 576, 2696, 0]);
        assert_eq!(max.cpuid(0xd, 2, &s), [256, 576, 0, 0]);
        assert_eq!(max.cpuid(0xd, 9, &s), [8, 2688, 0, 0]);
        assert_eq!([max.cpuid(0xd, 3, &s), v3.cpuid(0xd, 9, &s), max.cpuid(0xd, 99, &s)], [[0; 4]; 3]);
    }

    /// The levels of the x86-64 psABI (chapter 3.1.1), as sets of instruction classes.
    #[test]
    fn levels_are_the_abis() {
        let v2 = [F::CMOV, F::CX8, F::FPU, F::FXSR, F::MMX, F::SYSCALL, F::SSE, F::SSE2, F::CMPXCHG16B, F::POPCNT];
        let v2 = v2.into_iter().chain([F::SSE3, F::SSE4_1, F::SSE4_2, F::SSSE3]);
        let v3 = [F::AVX, F::AVX2, F::BMI1, F::BMI2, F::F16C, F::FMA, F::LZCNT, F::MOVBE, F::XSAVE];
        for f in v2 {
            assert!(CpuModel::new(V2, 1, 0).supports(f), "{f:?}");
        }
        for f in v3 {
            assert!(!CpuModel::new(V2, 1, 0).supports(f) && CpuModel::new(V3, 1, 0).supports(f), "{f:?}");
        }
        let [_, _, ecx, _] = CpuModel::new(V2, 1, 0).cpuid(0x8000_0001, 0, &CpuState::reset());
        assert_eq!(ecx & 1, 1, "LAHF and SAHF in 64-bit mode");
    }

    #[test]
    fn instructions_follow_the_bits() {
        let [v2, v3, max] = [V2, V3, Max].map(|l| CpuModel::new(l, 1, 0));
        for (f, levels) in [
            (F::SSE4_2, [true, true, true]),
            (F::BMI2, [false, true, true]),
            (F::AVX2, [false, true, true]),
            (F::SHA, [false, false, true]),
            (F::AVX512F, [false, false, false]),
        ] {
            assert_eq!([&v2, &v3, &max].map(|m| m.supports(f)), levels, "{f:?}");
        }
    }
}
