//! Memory that is mapped twice: what one view stores the other executes.
//!
//! The part of code memory that is the host's, apart so that the model checker can put memory of its own in its place
//! ([`crate::sync`]). Offsets are bytes from the start of either view; one outside is refused, not a fault.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// What the kernel calls it where it lists the mappings of a process.
pub const CODE_MEMORY: &CStr = c"diglot-code";

/// Why the memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MappingError {
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
}

/// At least `bytes` of memory that reads as zero, rounded up to the host's page size (4, 16 or 64 KiB).
pub fn map_twice(bytes: usize) -> Result<(Writable, Executable), MappingError> {
    let len = bytes.max(1).next_multiple_of(page_size());
    let file = memory_file(len).map_err(MappingError::File)?;
    let writable = View::map(&file, len, libc::PROT_READ | libc::PROT_WRITE, "writable")?;
    let executable = View::map(&file, len, libc::PROT_READ | libc::PROT_EXEC, "executable")?;
    Ok((Writable { view: writable, gathered: 0 }, Executable(executable)))
}

/// Bytes of a huge page, the usual size of one.
const HUGE_PAGE: usize = 2 << 20;
const RESERVED: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// One mapping of the file.
struct View {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a `View` is an address range it alone unmaps; stores through it need `&mut Writable`, and what else happens
// to the memory is instruction fetch.
unsafe impl Send for View {}
// SAFETY: as above; `&Executable` only gives addresses, `&Writable` nothing.
unsafe impl Sync for View {}

impl View {
    fn map(file: &OwnedFd, len: usize, protection: i32, view: &'static str) -> Result<Self, MappingError> {
        let failed = || MappingError::Map { view, source: io::Error::last_os_error() };
        let map = |at: *mut u8, len, protection, flags, fd| {
            // SAFETY: a fresh mapping, at an address the kernel chooses or over one of ours that nobody has seen yet,
            // disturbs nothing.
            let base = unsafe { libc::mmap(at.cast(), len, protection, flags, fd, 0) };
            NonNull::new(base.cast::<u8>()).filter(|b| b.as_ptr().cast() != libc::MAP_FAILED).ok_or_else(failed)
        };
        // Only an address that is a multiple of a huge page's size can be mapped by one.
        let room = map(std::ptr::null_mut(), len + HUGE_PAGE, libc::PROT_NONE, RESERVED, -1)?;
        let before = room.as_ptr().align_offset(HUGE_PAGE);
        let base = room.as_ptr().wrapping_add(before);
        let mapped = map(base, len, protection, libc::MAP_SHARED | libc::MAP_FIXED, file.as_raw_fd());
        let unused = mapped.is_err().then_some((base, len));
        for (at, len) in
            [(room.as_ptr(), before), (base.wrapping_add(len), HUGE_PAGE - before)].into_iter().chain(unused)
        {
            // SAFETY: what is left of our own reservation, on either side or all of it.
            unsafe { libc::munmap(at.cast(), len) };
        }
        mapped.map(|base| Self { base, len })
    }

    /// Whether `at..at + len` lies inside.
    fn holds(&self, at: usize, len: usize) -> bool {
        at.checked_add(len).is_some_and(|end| end <= self.len)
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: exactly the range `map` made; no pointer into it outlives the arena by the contract of `at`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// The view for stores.
pub struct Writable {
    view: View,
    /// Bytes from the start on that were made huge pages, or could not be.
    gathered: usize,
}

impl Writable {
    /// Copies `bytes` to `at`, and follows them by `filler` up to `end`; false, with nothing written, if that is not
    /// a range inside the view that has room for them. Nobody may execute there.
    #[must_use]
    pub fn write(&mut self, at: usize, bytes: &[u8], end: usize, filler: u8) -> bool {
        let Some(rest) = end.checked_sub(at).and_then(|room| room.checked_sub(bytes.len())) else { return false };
        if end > self.view.len {
            return false;
        }
        // SAFETY: `at..end` lies inside the mapping and holds both parts, by the checks above. Every access through
        // this view needs `self`, so nobody else makes one meanwhile.
        unsafe {
            let start = self.view.base.as_ptr().add(at);
            start.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            start.add(bytes.len()).write_bytes(filler, rest);
        }
        self.gather(at);
        true
    }

    /// Has the kernel put what lies before `end` into huge pages, if it can, as code is often larger than what the
    /// processor's TLB reaches with small ones. Either view keeps its content meanwhile.
    fn gather(&mut self, end: usize) {
        while self.gathered + HUGE_PAGE <= end {
            // SAFETY: the range lies inside the view; the advice moves what is there and changes none of it.
            unsafe { libc::madvise(self.view.base.as_ptr().add(self.gathered).cast(), HUGE_PAGE, libc::MADV_COLLAPSE) };
            self.gathered += HUGE_PAGE;
        }
    }

    /// The byte at `at`.
    pub fn byte(&self, at: usize) -> Option<u8> {
        // SAFETY: inside the mapping, by the check; stores need `&mut self`.
        self.view.holds(at, 1).then(|| unsafe { self.view.base.as_ptr().add(at).read() })
    }

    /// The little-endian word at `at`.
    pub fn word(&self, at: usize) -> Option<u32> {
        // SAFETY: inside the mapping, by the check; stores need `&mut self`.
        let bytes = self.view.holds(at, 4).then(|| unsafe { self.view.base.as_ptr().add(at).cast::<[u8; 4]>().read() });
        bytes.map(u32::from_le_bytes)
    }

    /// Replaces the word at `at` by a single store of an aligned word or quadword, so that threads which execute it
    /// meanwhile fetch the old one or the new one; what was stored before is seen by those that fetch the new one.
    /// False, with nothing written, if it does not lie inside an aligned quadword of the view.
    #[must_use]
    pub fn replace_word(&mut self, at: usize, word: u32) -> bool {
        let within = at % 8;
        if within > 4 || !self.view.holds(at - within, 8) {
            return false;
        }
        if at.is_multiple_of(4) {
            // SAFETY: inside the mapping and aligned to 4 (the view begins at a page); plain accesses need `self`.
            let word_there = unsafe { AtomicU32::from_ptr(self.view.base.as_ptr().add(at).cast()) };
            word_there.store(word.to_le(), Ordering::Release);
        } else {
            // SAFETY: as above, for the aligned quadword around the word.
            let around = unsafe { AtomicU64::from_ptr(self.view.base.as_ptr().add(at - within).cast()) };
            // `&mut self` makes this load and store one step; the store is single, so fetch sees no mixture.
            let mut bytes = around.load(Ordering::Relaxed).to_ne_bytes();
            bytes[within..within + 4].copy_from_slice(&word.to_le_bytes());
            around.store(u64::from_ne_bytes(bytes), Ordering::Release);
        }
        true
    }

    /// Replaces the quadword at `at` likewise. False, with nothing written, if it is not aligned or not of the view.
    #[must_use]
    pub fn replace_quadword(&mut self, at: usize, quadword: u64) -> bool {
        if !at.is_multiple_of(8) || !self.view.holds(at, 8) {
            return false;
        }
        // SAFETY: inside the mapping and aligned to 8; plain accesses need `self`.
        let there = unsafe { AtomicU64::from_ptr(self.view.base.as_ptr().add(at).cast()) };
        there.store(quadword.to_le(), Ordering::Release);
        true
    }
}

/// The view for instruction fetch.
pub struct Executable(View);

impl Executable {
    /// Its size in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a view is never empty")]
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// The address at which the byte at `offset` executes. It is for whoever keeps the view alive to go there.
    pub fn at(&self, offset: usize) -> *const u8 {
        debug_assert!(offset < self.0.len);
        self.0.base.as_ptr().wrapping_add(offset)
    }
}

fn page_size() -> usize {
    // SAFETY: `sysconf` reads a constant of the system.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).ok().filter(|size| size.is_power_of_two()).unwrap_or(1 << 16)
}

/// An anonymous file of `len` bytes whose size can never change, so that no access to a view can raise `SIGBUS`.
fn memory_file(len: usize) -> io::Result<OwnedFd> {
    // SAFETY: the name is a terminated string; the call makes a new descriptor or fails.
    let fd = unsafe { libc::memfd_create(CODE_MEMORY.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
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
