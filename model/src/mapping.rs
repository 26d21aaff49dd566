//! Code memory that loom watches: the interface of the translator's module of this name, and [`Executable::fetch`].
//!
//! Memory is made of quadwords. A plain store replaces quadwords and must be ordered, by what the threads synchronise
//! with, against every fetch of them. A replaced word is an atomic store of its quadword, which fetches may meet.

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};

/// There is always memory.
#[derive(Debug, thiserror::Error)]
pub enum MappingError {}

/// The memory behind both views.
#[derive(Clone)]
struct Quadwords(Arc<Vec<UnsafeCell<AtomicU64>>>);

// SAFETY: loom fails the test at an access that is not ordered against another thread's plain store.
unsafe impl Send for Quadwords {}
// SAFETY: as above.
unsafe impl Sync for Quadwords {}

/// Where the executable view begins: an address is not an offset.
const BASE: usize = 0x10_0000;

/// At least `bytes` of memory that reads as zero. A model needs no whole pages.
pub fn map_twice(bytes: usize) -> Result<(Writable, Executable), MappingError> {
    let quadwords: Vec<_> = (0..bytes.div_ceil(8)).map(|_| UnsafeCell::new(AtomicU64::new(0))).collect();
    let quadwords = Quadwords(Arc::new(quadwords));
    Ok((Writable(quadwords.clone()), Executable(quadwords)))
}

/// The view for stores.
pub struct Writable(Quadwords);

impl Writable {
    /// Copies `bytes` to `at`, and follows them by `filler` up to `end`; false, with nothing written, if that is not
    /// a range inside the view that has room for them.
    #[must_use]
    pub fn write(&mut self, at: usize, bytes: &[u8], end: usize, filler: u8) -> bool {
        if end > self.0.0.len() * 8 || end.checked_sub(at).is_none_or(|room| room < bytes.len()) {
            return false;
        }
        assert!(at.is_multiple_of(8) && end.is_multiple_of(8), "slots are whole quadwords");
        let mut rest = bytes.iter().copied();
        for cell in &self.0.0[at / 8..end / 8] {
            let quadword = std::array::from_fn(|_| rest.next().unwrap_or(filler));
            // SAFETY: loom fails the test if another access is not ordered against this one.
            cell.with_mut(|p| unsafe { *p = AtomicU64::new(u64::from_le_bytes(quadword)) });
        }
        true
    }

    fn load(&self, index: usize) -> Option<[u8; 8]> {
        load(self.0.0.get(index)?, Ordering::Relaxed)
    }

    /// The byte at `at`.
    pub fn byte(&self, at: usize) -> Option<u8> {
        Some(self.load(at / 8)?[at % 8])
    }

    /// The little-endian word at `at`.
    pub fn word(&self, at: usize) -> Option<u32> {
        let quadword = self.load(at / 8)?;
        Some(u32::from_le_bytes(*quadword.get(at % 8..)?.first_chunk()?))
    }

    /// Replaces the word at `at` by a single store. False, with nothing written, if it does not lie inside a quadword
    /// of the view.
    #[must_use]
    pub fn replace_word(&mut self, at: usize, word: u32) -> bool {
        let Some(mut quadword) = self.load(at / 8) else { return false };
        let Some(bytes) = quadword.get_mut(at % 8..).and_then(|rest| rest.first_chunk_mut()) else { return false };
        *bytes = word.to_le_bytes();
        // SAFETY: loom fails the test if a plain store is not ordered against this access.
        self.0.0[at / 8].with(|p| unsafe { (*p).store(u64::from_le_bytes(quadword), Ordering::Release) });
        true
    }

    /// Replaces the quadword at `at`, which is aligned, by a single store; false, with nothing written, if there is none.
    #[must_use]
    pub fn replace_quadword(&mut self, at: usize, quadword: u64) -> bool {
        if !at.is_multiple_of(8) || self.load(at / 8).is_none() {
            return false;
        }
        // SAFETY: as above.
        self.0.0[at / 8].with(|p| unsafe { (*p).store(quadword.to_le(), Ordering::Release) });
        true
    }
}

/// The view for instruction fetch.
#[derive(Clone)]
pub struct Executable(Quadwords);

impl Executable {
    /// Its size in bytes.
    #[expect(clippy::len_without_is_empty, reason = "the translator's has none either")]
    pub fn len(&self) -> usize {
        self.0.0.len() * 8
    }

    /// The address at which the byte at `offset` executes.
    pub fn at(&self, offset: usize) -> *const u8 {
        std::ptr::without_provenance(BASE + offset)
    }

    /// The aligned quadword that holds the address, as a processor fetches it: what it finds in memory behind that is
    /// not older. (x86-64 fetches in order; an AArch64 core does once publication has synchronised it.)
    pub fn fetch(&self, address: usize) -> Option<[u8; 8]> {
        load(self.0.0.get(address.checked_sub(BASE)? / 8)?, Ordering::Acquire)
    }
}

fn load(cell: &UnsafeCell<AtomicU64>, order: Ordering) -> Option<[u8; 8]> {
    // SAFETY: loom fails the test if a plain store is not ordered against this access.
    Some(cell.with(|p| unsafe { (*p).load(order) }).to_le_bytes())
}
