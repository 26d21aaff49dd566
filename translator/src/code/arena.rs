//! The arena: one anonymous file mapped twice, a writable view for us and an executable view for the processor.

use super::free_list::{FreeList, GRANULE};
use super::publish::{CoreSync, clean_to_fetch};
use super::{HostIsa, patch};
use parking_lot::Mutex;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

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
    /// The kernel gave no memory file.
    #[error("cannot create the memory file of the code cache: {0}")]
    File(#[source] io::Error),
    /// The kernel did not map the file; a policy that forbids executable memory shows here.
    #[error("cannot map the code cache ({view} view): {source}")]
    Map {
        /// `writable` or `executable`.
        view: &'static str,
        /// The reason.
        source: io::Error,
    },
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
    /// Where it begins, in bytes from the start of the arena; a multiple of [`GRANULE`].
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Bytes it holds: what was asked for, rounded up to [`GRANULE`].
    #[expect(clippy::len_without_is_empty, reason = "a slot is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }
}

/// One mapping of the arena's file.
struct View {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a `View` is an address range it alone unmaps; the accesses through it are synchronised by `CodeArena`.
unsafe impl Send for View {}
// SAFETY: as above; `&View` only gives the address.
unsafe impl Sync for View {}

impl View {
    fn map(file: &OwnedFd, len: usize, protection: i32, view: &'static str) -> Result<Self, ArenaError> {
        // SAFETY: a fresh shared mapping of a file we own, at an address the kernel chooses, disturbs nothing.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        match NonNull::new(base.cast::<u8>()) {
            Some(base) if base.as_ptr().cast::<libc::c_void>() != libc::MAP_FAILED => Ok(Self { base, len }),
            _ => Err(ArenaError::Map { view, source: io::Error::last_os_error() }),
        }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: exactly the range `map` made; no pointer into it outlives the arena by the contract of `exec_ptr`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Memory for compiled code, bounded and shared by all threads.
pub struct CodeArena {
    writable: View,
    executable: View,
    isa: HostIsa,
    cores: CoreSync,
    free: Mutex<FreeList>,
    /// Held while bytes are stored through `writable`: a patch reads its neighbours before it stores.
    storing: Mutex<()>,
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
        let capacity = bytes.max(1).next_multiple_of(page_size());
        let file = memory_file(capacity).map_err(ArenaError::File)?;
        let writable = View::map(&file, capacity, libc::PROT_READ | libc::PROT_WRITE, "writable")?;
        let executable = View::map(&file, capacity, libc::PROT_READ | libc::PROT_EXEC, "executable")?;
        Ok(Self {
            writable,
            executable,
            isa,
            cores: CoreSync::register(),
            free: Mutex::new(FreeList::new(capacity)),
            storing: Mutex::new(()),
        })
    }

    /// The instruction set of the code it holds.
    pub fn isa(&self) -> HostIsa {
        self.isa
    }

    /// Its size in bytes.
    pub fn capacity(&self) -> usize {
        self.executable.len
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
        if bytes.len() > capacity {
            return Err(ArenaError::SlotOverflow { len: bytes.len(), capacity });
        }
        let _storing = self.storing.lock();
        // SAFETY: `offset + capacity` lies inside the mapping by the line above; the slot is borrowed mutably and
        // every store into the view holds `storing`, so nobody else accesses these bytes through it meanwhile.
        unsafe {
            let start = self.writable.base.as_ptr().add(slot.offset);
            start.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            start.add(bytes.len()).write_bytes(self.isa.filler(), capacity - bytes.len());
        }
        Ok(())
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
        if target >= self.capacity() || site.checked_add(4).is_none_or(|end| end > self.capacity()) {
            return false;
        }
        let Some(word) = patch::branch_word(self.isa, site, target) else { return false };
        if !patch::is_patchable(self.isa, site) {
            return false;
        }
        let _storing = self.storing.lock();
        // SAFETY: `site..site + 4` is inside the mapping, checked above.
        let at = unsafe { self.writable.base.as_ptr().add(site) };
        let is_branch = match self.isa {
            // SAFETY: `site` is not zero and `site - 1` is inside the mapping; `storing` excludes writers.
            HostIsa::X86_64 => site != 0 && unsafe { at.sub(1).read() } == patch::X86_JMP_REL32,
            // SAFETY: four bytes inside the mapping, aligned as `is_patchable` checked; `storing` excludes writers.
            HostIsa::Aarch64 => patch::is_aarch64_b(unsafe { at.cast::<u32>().read() }),
        };
        if !is_branch {
            return false;
        }
        if site.is_multiple_of(4) {
            // SAFETY: inside the mapping and aligned to 4 (the view begins at a page).
            unsafe { AtomicU32::from_ptr(at.cast()) }.store(word, Ordering::Release);
        } else {
            let within = site % 8;
            // SAFETY: the aligned 8 bytes around the site are inside the mapping, whose size is a multiple of 8, and
            // the mapping begins at a page.
            let around = unsafe { AtomicU64::from_ptr(at.sub(within).cast()) };
            // `storing` makes this load and store one step; the store is single, so fetch sees no mixture.
            let mut bytes = around.load(Ordering::Relaxed).to_ne_bytes();
            bytes[within..within + 4].copy_from_slice(&word.to_le_bytes());
            around.store(u64::from_ne_bytes(bytes), Ordering::Release);
        }
        clean_to_fetch(self.exec_ptr(site), 4);
        true
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
        debug_assert!(offset < self.capacity());
        self.executable.base.as_ptr().wrapping_add(offset)
    }

    /// The offset of an executable address, when it is one of this arena's: what a fault handler asks of a program
    /// counter.
    pub fn offset_of(&self, address: usize) -> Option<usize> {
        let offset = address.wrapping_sub(self.executable.base.as_ptr() as usize);
        (offset < self.capacity()).then_some(offset)
    }
}

// The patch of an unaligned site accesses the aligned 8 bytes around it.
const _: () = assert!(GRANULE.is_multiple_of(8));

fn page_size() -> usize {
    // SAFETY: `sysconf` reads a constant of the system.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).ok().filter(|size| size.is_power_of_two()).unwrap_or(1 << 16)
}

/// An anonymous file of `len` bytes whose size can never change, so that no access to a view can raise `SIGBUS`.
fn memory_file(len: usize) -> io::Result<OwnedFd> {
    // SAFETY: the name is a terminated string; the call makes a new descriptor or fails.
    let fd = unsafe { libc::memfd_create(c"diglot-code".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just made and has no other owner.
    let file = unsafe { OwnedFd::from_raw_fd(fd) };
    let size = libc::off_t::try_from(len).map_err(io::Error::other)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: both calls act on our own file.
    let done = unsafe {
        libc::ftruncate(file.as_raw_fd(), size) == 0 && libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) == 0
    };
    if done { Ok(file) } else { Err(io::Error::last_os_error()) }
}
