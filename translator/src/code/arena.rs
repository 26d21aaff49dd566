//! The arena: memory mapped twice, a writable view for us and an executable view for the processor, shared out in slots.

use super::free_list::FreeList;
use super::publish::{CoreSync, clean_to_fetch};
use super::{HostIsa, patch};
use crate::mapping::{Executable, MappingError, Writable, map_twice};
use crate::sync::Mutex;

/// Why code memory could not be made or filled.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    /// No encoder for this machine.
    #[error("compiled code needs an x86-64 or AArch64 host; use the interpreter on this one")]
    UnsupportedHost,
    /// Direct branches would not reach from one end to the other.
    #[error(
        "a code cache of {bytes} bytes is beyond the reach of a direct branch on {isa:?}; ask for {limit} bytes or less"
    )]
    TooLarge {
        /// What was asked for.
        bytes: usize,
        /// The most this host can have.
        limit: usize,
        /// The host.
        isa: HostIsa,
    },
    /// No memory.
    #[error(transparent)]
    Mapping(#[from] MappingError),
    /// More bytes than the slot holds.
    #[error("{len} bytes of code do not fit a slot of {capacity}")]
    SlotOverflow {
        /// Bytes to write.
        len: usize,
        /// Bytes in the slot.
        capacity: usize,
    },
}

/// A range of an arena, owned: it goes back by [`CodeArena::free`], once. A slot that is dropped stays allocated.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a slot that is dropped is never reused"]
pub struct Slot {
    offset: usize,
    len: usize,
}

impl Slot {
    /// Where it begins, in bytes from the start of the arena; a multiple of [`GRANULE`](super::GRANULE).
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Bytes it holds: what was asked for, rounded up to [`GRANULE`](super::GRANULE).
    #[expect(clippy::len_without_is_empty, reason = "a slot is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }
}

/// Memory for compiled code, bounded and shared by all threads.
pub struct CodeArena {
    /// Locked over each store: a patch reads its neighbours before it stores.
    writable: Mutex<Writable>,
    executable: Executable,
    isa: HostIsa,
    cores: CoreSync,
    free: Mutex<FreeList>,
}

impl CodeArena {
    /// An arena of at least `bytes`, rounded up to the host's page size (4, 16 or 64 KiB).
    ///
    /// # Errors
    /// [`ArenaError::TooLarge`] beyond [`HostIsa::branch_reach`]: 128 MiB on AArch64, 2 GiB on x86-64.
    pub fn new(bytes: usize) -> Result<Self, ArenaError> {
        let isa = HostIsa::native().ok_or(ArenaError::UnsupportedHost)?;
        let limit = isa.branch_reach();
        if bytes > limit {
            return Err(ArenaError::TooLarge { bytes, limit, isa });
        }
        let (writable, executable) = map_twice(bytes)?;
        let free = Mutex::new(FreeList::new(executable.len()));
        Ok(Self { writable: Mutex::new(writable), executable, isa, cores: CoreSync::register(), free })
    }

    /// The instruction set of the code it holds.
    pub fn isa(&self) -> HostIsa {
        self.isa
    }

    /// Its size in bytes.
    pub fn capacity(&self) -> usize {
        self.executable.len()
    }

    /// Bytes in live slots.
    pub fn used(&self) -> usize {
        self.capacity() - self.free.lock().free_bytes()
    }

    /// A slot of at least `len` bytes, or `None` when no hole is as large: evict, then try again.
    pub fn alloc(&self, len: usize) -> Option<Slot> {
        self.free.lock().alloc(len).map(|(offset, len)| Slot { offset, len })
    }

    /// Gives a slot of this arena back; its bytes may be overwritten from now on.
    ///
    /// The caller has made sure that no thread runs in it or can enter it: its incoming branches are patched away,
    /// [`CodeArena::sync_cores`] was called since, and every vCPU has left compiled code once.
    pub fn free(&self, slot: Slot) {
        self.free.lock().release(slot.offset, slot.len);
    }

    /// Step one of publication: copies `bytes` to the start of the slot, and fills its rest with traps.
    ///
    /// # Errors
    /// [`ArenaError::SlotOverflow`] when the slot is shorter; nothing is written.
    pub fn write(&self, slot: &mut Slot, bytes: &[u8]) -> Result<(), ArenaError> {
        let capacity = slot.len.min(self.capacity().saturating_sub(slot.offset));
        let end = slot.offset + capacity;
        let written = self.writable.lock().write(slot.offset, bytes, end, self.isa.filler());
        written.then_some(()).ok_or(ArenaError::SlotOverflow { len: bytes.len(), capacity })
    }

    /// Step two: makes what was written to the slot visible to instruction fetch on every core. The code may be
    /// entered, by any thread, from the moment this returns.
    pub fn publish(&self, slot: &Slot) {
        clean_to_fetch(self.exec_ptr(slot.offset), slot.len.min(self.capacity().saturating_sub(slot.offset)));
        self.cores.after_publication();
    }

    /// Retargets the direct branch at `site` to `target`, both offsets in the arena; threads that run it meanwhile
    /// take either the old target or the new one. It works on written code as well as on published code.
    ///
    /// Returns `false`, and changes nothing, when `site` is no direct branch, cannot be replaced by one atomic store
    /// (see [`is_patchable`](super::is_patchable)), or either offset is outside the arena.
    ///
    /// When it returns, new executions of the branch *will soon* go to `target`; before the old target is freed,
    /// [`CodeArena::sync_cores`] makes that certain.
    pub fn patch_branch(&self, site: usize, target: usize) -> bool {
        if target >= self.capacity() || !patch::is_patchable(self.isa, site) {
            return false;
        }
        let Some(word) = patch::branch_word(self.isa, site, target) else { return false };
        let mut writable = self.writable.lock();
        let is_branch = match self.isa {
            HostIsa::X86_64 => {
                let before = |n| site.checked_sub(n).and_then(|at| writable.byte(at)).unwrap_or(0);
                patch::is_x86_branch([before(2), before(1)])
            }
            HostIsa::Aarch64 => writable.word(site).is_some_and(patch::is_aarch64_b),
        };
        if !is_branch || !writable.replace_word(site, word) {
            return false;
        }
        clean_to_fetch(self.executable.at(site), 4);
        true
    }

    /// Replaces the constant of 8 bytes at `at` in an instruction of x86-64 code; threads that run it meanwhile take
    /// either the old one or the new one. Returns `false`, and changes nothing, when `at` is not a multiple of 8 or
    /// outside the arena.
    pub fn patch_constant(&self, at: usize, constant: u64) -> bool {
        let done = self.writable.lock().replace_quadword(at, constant);
        if done {
            clean_to_fetch(self.executable.at(at), 8);
        }
        done
    }

    /// Returns once every core that runs a thread of this process has discarded instructions it fetched before:
    /// branches patched earlier lead nowhere but to their new targets.
    ///
    /// Returns `false` where the kernel lacks the call (Linux before 4.16, or a filter that denies it): then only a
    /// rendezvous of the threads gives the guarantee.
    pub fn sync_cores(&self) -> bool {
        self.cores.sync()
    }

    /// The address at which the byte at `offset` executes. Calling it is `unsafe` and the caller's to prove: the slot
    /// is published and lives, `offset` is an entry point, and the arena outlives the call.
    pub fn exec_ptr(&self, offset: usize) -> *const u8 {
        self.executable.at(offset)
    }

    /// The executable view of its memory.
    pub fn executable(&self) -> &Executable {
        &self.executable
    }

    /// The offset of an executable address, when it is one of this arena's: what a fault handler asks of a program
    /// counter.
    pub fn offset_of(&self, address: usize) -> Option<usize> {
        let offset = address.wrapping_sub(self.executable.at(0) as usize);
        (offset < self.capacity()).then_some(offset)
    }
}
