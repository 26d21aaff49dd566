//! Making stored bytes fetchable: cache maintenance and core synchronisation, the part that differs by host.
//!
//! **x86-64.** Instruction caches are coherent with stores, by physical address (SDM vol. 3 "Self-Modifying Code",
//! AMD APM vol. 2 §7.6.1), so a store through the writable view reaches fetch through the executable one. What
//! remains is order: the bytes must be stored before the pointer or branch that leads to them, which a release fence
//! gives. The manual asks for a serialising instruction on a core that executes bytes another core has just stored;
//! it matters for code that is *changed under a running thread*, and that is confined to
//! [`CodeArena::patch_branch`](super::CodeArena::patch_branch), whose single aligned store is safe without, and to
//! the reuse of a slot, which needs [`CodeArena::sync_cores`](super::CodeArena::sync_cores) or a rendezvous anyway.
//!
//! **AArch64.** Data and instruction caches are not coherent (Arm ARM B2.4.4, "Concurrent modification and
//! execution"; D7.5 "cache maintenance"): each line is cleaned to the point of unification (`dc cvau`), then
//! invalidated in every core's instruction cache (`ic ivau`), each followed by `dsb ish`. `CTR_EL0.IDC` and `.DIC` say
//! that a core needs neither, and give the line sizes. A core may still hold instructions it fetched earlier, until a
//! context synchronisation event: `isb` for this one, `membarrier(PRIVATE_EXPEDITED_SYNC_CORE)` for those that
//! run our other threads.

use super::HostIsa;
use crate::sync::{Ordering, fence};

impl HostIsa {
    /// The instruction set this program was compiled for, when code can be emitted for it.
    pub const fn native() -> Option<Self> {
        if cfg!(target_arch = "x86_64") {
            Some(Self::X86_64)
        } else if cfg!(all(target_arch = "aarch64", target_endian = "little")) {
            Some(Self::Aarch64)
        } else {
            None
        }
    }
}

/// Makes `len` bytes at the executable address `start` what this core, and every core's caches, will fetch.
#[cfg(not(target_arch = "aarch64"))]
pub(super) fn clean_to_fetch(_start: *const u8, _len: usize) {
    fence(Ordering::SeqCst);
}

/// Makes `len` bytes at the executable address `start` what this core, and every core's caches, will fetch.
#[cfg(target_arch = "aarch64")]
pub(super) fn clean_to_fetch(start: *const u8, len: usize) {
    use std::arch::asm;

    let cache_type: u64;
    // SAFETY: reads an identification register that Linux lets user code read (or emulates).
    unsafe { asm!("mrs {}, ctr_el0", out(reg) cache_type, options(nomem, nostack, preserves_flags)) };
    let line = |field: u64| 4_usize << (field & 0xf);
    let (data_line, instruction_line) = (line(cache_type >> 16), line(cache_type));
    let (data_coherent, instruction_coherent) = (cache_type & 1 << 28 != 0, cache_type & 1 << 29 != 0);
    let start = start as usize;
    let end = start.saturating_add(len);

    if !data_coherent {
        for address in (start - start % data_line..end).step_by(data_line) {
            // SAFETY: cleaning a line of a readable mapping changes no memory.
            unsafe { asm!("dc cvau, {}", in(reg) address, options(nostack, preserves_flags)) };
        }
    }
    // SAFETY: a barrier.
    unsafe { asm!("dsb ish", options(nostack, preserves_flags)) };
    if !instruction_coherent {
        for address in (start - start % instruction_line..end).step_by(instruction_line) {
            // SAFETY: discarding a line of the instruction cache changes no memory.
            unsafe { asm!("ic ivau, {}", in(reg) address, options(nostack, preserves_flags)) };
        }
        // SAFETY: a barrier.
        unsafe { asm!("dsb ish", options(nostack, preserves_flags)) };
    }
    // SAFETY: a barrier.
    unsafe { asm!("isb", options(nostack, preserves_flags)) };
    fence(Ordering::SeqCst);
}

/// The kernel's promise to synchronise the cores that run this process (`membarrier(2)`).
pub(super) struct CoreSync {
    registered: bool,
}

impl CoreSync {
    /// Registers the process; it may be done more than once.
    pub(super) fn register() -> Self {
        let register = libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE;
        let supported = membarrier(libc::MEMBARRIER_CMD_QUERY);
        Self { registered: supported > 0 && supported & i64::from(register) != 0 && membarrier(register) == 0 }
    }

    /// What publication needs beyond caches: nothing where fetch is coherent, see the module's text.
    pub(super) fn after_publication(&self) {
        if cfg!(target_arch = "aarch64") {
            self.sync();
        }
    }

    /// Interrupts every core that runs a thread of this process, and returns once each has passed a context
    /// synchronisation event; `false` when the kernel can't.
    pub(super) fn sync(&self) -> bool {
        self.registered && membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE) == 0
    }
}

fn membarrier(command: libc::c_int) -> i64 {
    // SAFETY: the call takes integers only and changes no memory.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) };
    result as i64
}
