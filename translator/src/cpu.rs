//! One vCPU: its architectural state, its MMU and its way to the machine.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use crate::addr::PAGE_MASK;
use crate::code::HostIsa;
use crate::cpuid::CpuModel;
use crate::exception::{Exception, Trap, vector};
use crate::insn::{Insn, Mode};
use crate::jump::{JumpCache, Place};
pub use crate::kick::Kick;
use crate::mem::GuestRam;
use crate::mmu::Mmu;
use crate::mmu::tlb::Class;
use crate::peers::Peers;
use crate::platform::Platform;
use crate::state::{CpuState, Segment, cr, flag, seg};

/// Whether the order of a guest's accesses takes fences.
pub(crate) const HOST_REORDERS: bool = match HostIsa::native() {
    Some(isa) => isa.reorders(),
    None => true,
};

/// How an instruction is done again that has changed nothing yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Again {
    /// As before: another vCPU was faster.
    Now,
    /// While all other vCPUs stand still.
    Alone,
}

/// What a locked instruction has loaded, and from where.
#[derive(Clone, Copy)]
pub(crate) struct Locked {
    pub host: *mut u8,
    pub gpa: u64,
    pub value: u64,
}

// SAFETY: a host address, which threads use by what their own vCPU knows of it.
unsafe impl Send for Locked {}

/// Counters that `--stats` shows.
#[allow(missing_docs)]
#[derive(Clone, Debug, Default)]
pub struct CpuCounts {
    pub exceptions: [u64; 32],
    pub interrupts: u64,
    pub undefined: u64,
    pub unknown_msr: u64,
    pub port_io: u64,
    /// Code that the jump cache did not know, but that was known by the physical address.
    pub ways: u64,
}

/// Offset of what compiled code has the address of: the general-purpose registers. What it uses most is at most 128 bytes
/// before or behind, where x86-64 code says a field's offset in one byte.
pub const ANCHOR: i32 = std::mem::offset_of!(Cpu, s.gpr) as i32;

const _: () = assert!(ANCHOR - std::mem::offset_of!(Cpu, jit.jump) as i32 <= 128);

/// Vector registers lie in one line of the host's cache each.
const _: () = assert!(std::mem::offset_of!(Cpu, s.ymm) % 32 == 0);

/// A vCPU as instruction semantics see it.
#[repr(C, align(64))]
pub struct Cpu {
    /// What compiled code keeps beside the architectural state.
    pub jit: crate::jit::frame::JitFrame,
    /// Architectural state.
    pub s: CpuState,
    /// Linear instruction pointer of the first byte of the block that runs (CS base not included).
    pub ip_base: u64,
    /// Set when the running block must not go on to its next instruction: its code was overwritten, or the mode,
    /// a mapping or the interrupt state changed.
    pub stop_block: bool,
    /// Set, besides, by a repeated string instruction that has more to do when it is reached again.
    pub again: bool,
    /// Whether an interrupt may wait: set by kicks and by every access to a device, cleared once none does.
    pub irq_maybe: bool,
    /// Whether an NMI may wait; set and cleared likewise.
    pub nmi_maybe: bool,
    /// Whether the jump cache must be emptied before its next use.
    pub flush_jump_cache: bool,
    /// Whether the access under way goes through SS, for #SS instead of #GP.
    pub through_ss: bool,
    /// The current access class, from CPL, CR4.SMAP and RFLAGS.AC.
    pub class: Class,
    /// The current decode mode.
    pub mode: Mode,
    /// Which time it is, modulo a page's size, that nothing was known yet of where linear addresses lead.
    generation: u64,
    /// The exception that the last [`Trap`] stands for.
    pub raised: Exception,
    /// Linear memory.
    pub mmu: Mmu,
    /// Where code is.
    pub jump: JumpCache,
    /// Guest RAM.
    pub ram: Arc<GuestRam>,
    /// The machine around the CPU.
    pub platform: Box<dyn Platform>,
    /// What CPUID reports.
    pub model: CpuModel,
    /// Requests from other threads.
    pub kick: Kick,
    /// Code pages overwritten by the current instruction: physical page and granules.
    pub smc: Vec<(u64, u64)>,
    /// Debug-exception conditions met so far (DR6 bits): a trap at the next instruction boundary at which MOV SS does
    /// not hold it back.
    pub pending_debug: u64,
    /// Whether a data breakpoint is enabled in DR7.
    pub watch: bool,
    /// The exception in `raised` is to be delivered after the current instruction, which has completed: a task switch
    /// whose new task could not be entered.
    pub late_fault: bool,
    /// Stores to take back, in lock-step runs.
    pub journal: Option<crate::lockstep::Journal>,
    /// The other vCPUs, if there are any.
    pub peers: Option<Arc<Peers>>,
    /// Its number among them.
    pub index: usize,
    /// Whether they all stand still until the current instruction is done.
    pub alone: bool,
    /// What the current locked instruction has loaded.
    pub(crate) locked: Option<Locked>,
    /// How the last [`Trap`] wants its instruction done again; `None` if it stands for the exception in `raised`.
    pub(crate) again_how: Option<Again>,
    /// PAUSE instructions since the host's processor was last offered to others.
    pub(crate) pauses: u32,
    /// Statistics.
    pub counts: CpuCounts,
}

impl Cpu {
    /// A vCPU after RESET.
    pub fn new(ram: Arc<GuestRam>, platform: Box<dyn Platform>, model: CpuModel) -> Cpu {
        let mut cpu = Cpu {
            s: CpuState::reset(),
            ip_base: 0,
            stop_block: false,
            again: false,
            irq_maybe: false,
            nmi_maybe: false,
            flush_jump_cache: false,
            through_ss: false,
            class: Class::Supervisor,
            mode: Mode(0),
            generation: 0,
            raised: Exception::plain(vector::UD),
            mmu: Mmu::default(),
            jump: JumpCache::new(0),
            ram,
            platform,
            model,
            kick: Kick::default(),
            smc: Vec::new(),
            pending_debug: 0,
            watch: false,
            late_fault: false,
            journal: None,
            peers: None,
            index: 0,
            alone: false,
            locked: None,
            again_how: None,
            pauses: 0,
            jit: crate::jit::frame::JitFrame::default(),
            counts: CpuCounts::default(),
        };
        cpu.jit.tables = cpu.mmu.tlb.addresses();
        cpu.mode_changed();
        cpu
    }

    /// Replaces the whole architectural state (boot, restore) and forgets everything derived from the old one.
    pub fn set_state(&mut self, s: CpuState) {
        self.s = s;
        if self.s.cr0 & cr::CR0_PG != 0 && self.s.cr4 & cr::CR4_PAE != 0 && !self.s.long_mode() {
            self.mmu.pdpte = crate::mmu::walk::load_pdptes(&self.ram, self.s.cr3).unwrap_or_default();
        }
        self.pending_debug = 0;
        self.late_fault = false;
        self.watch_changed();
        self.flush_tlb_all();
        self.switch_address_space(true);
        self.mode_changed();
    }

    /// Recomputes what is derived from the control registers, segments, CPL and RFLAGS.AC. To be called after each
    /// change of any of them. (Not TLB flushes: those are the caller's.)
    pub fn mode_changed(&mut self) {
        let s = &self.s;
        let cs = &s.seg[usize::from(seg::CS)];
        let ss = &s.seg[usize::from(seg::SS)];
        let mut mode = 0;
        if s.code64() {
            mode |= Mode::CODE64 | Mode::FLAT;
        } else {
            if cs.attr & Segment::DB != 0 {
                mode |= Mode::CODE32;
            }
            if ss.attr & Segment::DB != 0 {
                mode |= Mode::STACK32;
            }
            if s.protected()
                && !s.vm86()
                && [seg::ES, seg::SS, seg::DS].iter().all(|&r| is_flat_data(s, r))
                && is_flat_code(s)
            {
                mode |= Mode::FLAT;
            }
        }
        if s.cr0 & (cr::CR0_EM | cr::CR0_TS) == 0 && s.cr4 & cr::CR4_OSFXSR != 0 {
            mode |= Mode::SSE;
        }
        if s.cr0 & cr::CR0_TS == 0 && s.avx_enabled() {
            mode |= Mode::AVX;
        }
        self.mode = Mode(mode);
        self.access_class_changed();
        // The 16 redundant bits of canonical addresses all equal bit 47, which keys keep: keys of distinct addresses
        // or distinct salts stay distinct.
        let here = u64::from(mode) | u64::from(self.s.cpl == 3) << 6;
        let high = [here | u64::from(self.mmu.tlb.tag()) << 7, here | 1 << 15];
        self.jit.salts = high.map(|bits| bits << 48 | self.generation);
        self.stop_block = true;
    }

    /// Begins a new generation of keys, so that what is kept by the old ones is found no more; true when generations
    /// begin anew, so that it must be dropped.
    ///
    /// The generation stands in the bits of the page offset. Where a key is looked up says what they are but for it: the
    /// code TLB keeps pages, whose offset is 0, a place of the jump cache is one offset's in each page, and a bridge
    /// ([`crate::jit::bridge`]) leads to one.
    pub(crate) fn next_generation(&mut self) -> bool {
        self.generation = (self.generation + 1) & PAGE_MASK;
        self.jit.salts = self.jit.salts.map(|salt| salt & !PAGE_MASK | self.generation);
        self.generation == 0
    }

    /// Recomputes what is derived from CPL, CR4.SMAP and RFLAGS.AC for data accesses.
    pub fn access_class_changed(&mut self) {
        self.class = self.access_class();
        self.jit.tlb = self.jit.tables[self.class as usize];
    }

    /// Whether instructions must run one by one: single-stepping, breakpoints, or an interrupt shadow. (RF matters only
    /// beside breakpoints.)
    #[inline(always)]
    pub fn must_step(&self) -> bool {
        let s = &self.s;
        s.rflags & flag::TF != 0 || s.shadow != 0 || s.dr[7] & 0xff != 0 || self.pending_debug != 0
    }

    /// Clears RF, as the start of an instruction does: IRET and task switches load it for the next one, and repeated
    /// string instructions set it until their last iteration (SDM vol. 3 §17.3.1.1).
    #[inline(always)]
    pub fn begin_instruction(&mut self) {
        self.s.rflags &= !flag::RF;
    }

    /// Whether an interrupt may wait that the dispatch loop has not been told to be absent.
    pub fn interrupt_possible(&self) -> bool {
        self.irq_maybe || self.nmi_maybe || self.kick.pending() != 0
    }

    /// The key of a linear address in the jump cache and the code TLB.
    #[inline(always)]
    pub fn code_key(&self, linear: u64) -> u64 {
        linear ^ self.jit.salts[(linear >> 63) as usize]
    }

    /// The place of a linear address in the jump cache, and its key.
    #[inline(always)]
    pub fn code_place(&self, linear: u64) -> Place {
        Place { linear, key: self.code_key(linear) }
    }

    /// Records an exception; the returned token makes the instruction fail with it.
    #[cold]
    pub fn raise(&mut self, e: Exception) -> Trap {
        self.raised = e;
        Trap
    }

    /// Fails the instruction, which has changed nothing, for it to be done again.
    #[cold]
    pub(crate) fn try_again(&mut self, how: Again) -> Trap {
        self.again_how = Some(how);
        Trap
    }

    /// Fails with #UD.
    #[cold]
    pub fn ud(&mut self) -> Trap {
        self.raise(Exception::plain(vector::UD))
    }

    /// Fails with #GP and an error code.
    #[cold]
    pub fn gp(&mut self, error: u32) -> Trap {
        self.raise(Exception::with_error(vector::GP, error))
    }

    /// Fails with #GP(0) unless CPL is 0.
    pub fn require_cpl0(&mut self) -> Result<(), Trap> {
        if self.s.cpl == 0 { Ok(()) } else { Err(self.gp(0)) }
    }

    /// The address of the next instruction as CS:RIP holds it.
    #[inline(always)]
    pub fn next_ip_value(&self, i: &Insn) -> u64 {
        self.cut_ip(self.ip_base.wrapping_add(i.next_off()))
    }

    /// Cuts an instruction pointer to what the mode has of it. In 16-bit code too that is EIP: only branches cut it to
    /// their operand size, and what runs on past FFFFh leaves the segment or, if that is larger, goes on.
    #[inline(always)]
    pub fn cut_ip(&self, ip: u64) -> u64 {
        mode_cut(self.mode, ip)
    }

    /// To be called after an access to a device, which may have raised or lowered an interrupt.
    #[inline]
    pub fn device_accessed(&mut self) {
        self.irq_maybe = true;
        self.nmi_maybe = true;
        self.stop_block = true;
        if let Some(journal) = &mut self.journal {
            journal.device_accessed();
        }
    }

    /// To be called behind a load from guest memory: nothing that comes later is seen before it ([`crate::jit::ordering`]).
    #[inline(always)]
    pub(crate) fn loaded(&self) {
        if HOST_REORDERS && self.peers.is_some() {
            fence(Ordering::Acquire);
        }
    }

    /// To be called before a store to guest memory: nothing that came earlier is seen after it.
    #[inline(always)]
    pub(crate) fn storing(&self) {
        if HOST_REORDERS && self.peers.is_some() {
            fence(Ordering::Release);
        }
    }

    /// Has other vCPUs see what this one has stored, as MFENCE and serializing instructions do.
    #[inline]
    pub(crate) fn serialize(&self) {
        if self.peers.is_some() {
            fence(Ordering::SeqCst);
        }
    }

    /// The guest's time-stamp counter now.
    pub fn tsc(&mut self) -> u64 {
        self.platform.tsc().wrapping_add(self.s.tsc_offset)
    }
}

/// [`Cpu::cut_ip`] for a mode that has been left.
#[inline(always)]
pub(crate) fn mode_cut(mode: Mode, ip: u64) -> u64 {
    if mode.has(Mode::CODE64) { ip } else { ip & 0xffff_ffff }
}

fn is_flat_data(s: &CpuState, r: u8) -> bool {
    let d = &s.seg[usize::from(r)];
    let want = Segment::PRESENT | Segment::S | Segment::RW;
    d.base == 0 && d.limit == u32::MAX && d.attr & (want | Segment::CODE | Segment::EXPAND_DOWN) == want
}

fn is_flat_code(s: &CpuState) -> bool {
    let d = &s.seg[usize::from(seg::CS)];
    d.base == 0 && d.limit == u32::MAX && d.attr & Segment::RW != 0
}
