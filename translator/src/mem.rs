//! Guest RAM as the CPU reaches it: guest physical pages to host pointers, and which of them hold translated code.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

use crate::addr::{PAGE_MASK, PAGE_SIZE};

/// Bytes in one granule of self-modifying-code tracking: 64 granules make a page, one bit each.
pub const GRANULE: u64 = 64;

/// One contiguous range of guest RAM.
struct Range {
    start: u64,
    len: u64,
    host: usize,
    /// Index of the range's first page in the code map.
    first_page: usize,
}

/// Guest RAM, kept alive for as long as any CPU refers to it.
pub struct GuestRam {
    ranges: Vec<Range>,
    /// One bit per granule that holds translated code, one word per page.
    code: Box<[AtomicU64]>,
    _memory: Arc<GuestMemoryMmap>,
}

impl GuestRam {
    /// Takes the RAM of a machine. Ranges must be page aligned; what is left of a partial page is not used.
    pub fn new(memory: Arc<GuestMemoryMmap>) -> GuestRam {
        let mut ranges = Vec::new();
        let mut pages = 0;
        for region in memory.iter() {
            let Ok(host) = region.get_host_address(MemoryRegionAddress(0)) else { continue };
            let len = region.len() & !PAGE_MASK;
            ranges.push(Range { start: region.start_addr().0, len, host: host as usize, first_page: pages });
            pages += (len / PAGE_SIZE) as usize;
        }
        // SAFETY: zero is a value of atomic integers. The host gives memory to what is written first.
        let code = unsafe { Box::<[AtomicU64]>::new_zeroed_slice(pages).assume_init() };
        GuestRam { ranges, code, _memory: memory }
    }

    fn range(&self, gpa: u64) -> Option<&Range> {
        self.ranges.iter().find(|r| gpa.wrapping_sub(r.start) < r.len)
    }

    /// The host address of the page that holds `gpa`, if it is RAM.
    #[inline]
    pub fn host_page(&self, gpa: u64) -> Option<*mut u8> {
        let r = self.range(gpa)?;
        Some((r.host + ((gpa & !PAGE_MASK) - r.start) as usize) as *mut u8)
    }

    /// The number of the page that holds `gpa`, if it is RAM: below [`Self::pages`].
    #[inline]
    pub fn page_number(&self, gpa: u64) -> Option<usize> {
        let r = self.range(gpa)?;
        Some(r.first_page + ((gpa - r.start) / PAGE_SIZE) as usize)
    }

    /// Pages of RAM.
    pub fn pages(&self) -> usize {
        self.code.len()
    }

    fn code_word(&self, gpa: u64) -> Option<&AtomicU64> {
        self.code.get(self.page_number(gpa)?)
    }

    /// The granules of `gpa`'s page that hold translated code, one bit each; 0 outside RAM.
    #[inline]
    pub fn code_granules(&self, gpa: u64) -> u64 {
        self.code_word(gpa).map_or(0, |w| w.load(Ordering::Acquire))
    }

    /// Marks the granules of `mask` in `gpa`'s page as holding code; says whether the page had none before.
    pub fn mark_code(&self, gpa: u64, mask: u64) -> bool {
        self.code_word(gpa).is_some_and(|w| w.fetch_or(mask, Ordering::AcqRel) == 0)
    }

    /// Replaces the code granules of `gpa`'s page.
    pub fn set_code(&self, gpa: u64, mask: u64) {
        if let Some(w) = self.code_word(gpa) {
            w.store(mask, Ordering::Release);
        }
    }

    /// Reads an aligned `u64` of RAM, as a page walk does.
    pub fn read_u64(&self, gpa: u64) -> Option<u64> {
        Some(self.atomic(gpa)?.load(Ordering::Acquire))
    }

    /// The aligned `u64` of RAM at `gpa` as an atomic.
    pub fn atomic(&self, gpa: u64) -> Option<&AtomicU64> {
        let page = self.host_page(gpa)?;
        let p = page.wrapping_add((gpa & PAGE_MASK & !7) as usize).cast::<u64>();
        // SAFETY: the pointer is 8-byte aligned, lies inside one page of the mapping that `_memory` keeps alive, and
        // guest RAM is only ever accessed as plain or atomic memory shared with the guest.
        Some(unsafe { AtomicU64::from_ptr(p) })
    }

    /// Copies `out.len()` bytes from one page of RAM, for instruction fetch; false outside RAM or across its edge.
    pub fn read_in_page(&self, gpa: u64, out: &mut [u8]) -> bool {
        let Some(page) = self.host_page(gpa) else { return false };
        let offset = (gpa & PAGE_MASK) as usize;
        if offset + out.len() > PAGE_SIZE as usize {
            return false;
        }
        // SAFETY: source is inside one page of guest RAM (checked above), destination is a distinct Rust slice. The
        // guest may change the bytes meanwhile; any byte value is valid.
        unsafe { std::ptr::copy_nonoverlapping(page.add(offset), out.as_mut_ptr(), out.len()) };
        true
    }
}

/// The granules that `len` bytes at page offset `offset` touch, as a mask; bytes beyond the page are left out.
pub fn granule_mask(offset: u64, len: u64) -> u64 {
    let first = offset / GRANULE;
    let last = ((offset + len.max(1) - 1) / GRANULE).min(63);
    (u64::MAX >> (63 - (last - first))) << first
}

#[cfg(test)]
mod tests {
    use super::granule_mask;

    #[test]
    fn granules_of_ranges() {
        for (offset, len, mask) in [
            (0, 1, 1),
            (63, 1, 1),
            (63, 2, 3),
            (64, 64, 2),
            (0, 4096, u64::MAX),
            (4095, 15, 1 << 63),
            (4032, 64, 1 << 63),
        ] {
            assert_eq!(granule_mask(offset, len), mask, "{offset} {len}");
        }
    }
}
