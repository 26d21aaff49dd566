//! Guest RAM as the CPU reaches it: guest physical pages to host pointers, and which of them hold translated code.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

use crate::addr::{PAGE_MASK, PAGE_SIZE};
use crate::marks::{self, Marks};

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

/// Guest RAM as one vCPU has it, kept alive for as long as any refers to it.
pub struct GuestRam {
    ranges: Arc<[Range]>,
    /// What is known of each page for each vCPU.
    marks: Arc<[Marks]>,
    /// Which of them are this vCPU's.
    vcpu: usize,
    _memory: Arc<GuestMemoryMmap>,
}

impl GuestRam {
    /// Takes the RAM of a machine with one vCPU.
    pub fn new(memory: Arc<GuestMemoryMmap>) -> GuestRam {
        GuestRam::of_vcpus(memory, 1).swap_remove(0)
    }

    /// Takes the RAM of a machine, for each of `vcpus` vCPUs. Ranges must be page aligned; what is left of a partial page is
    /// not used.
    pub fn of_vcpus(memory: Arc<GuestMemoryMmap>, vcpus: usize) -> Vec<GuestRam> {
        let mut ranges = Vec::new();
        let mut pages = 0;
        for region in memory.iter() {
            let Ok(host) = region.get_host_address(MemoryRegionAddress(0)) else { continue };
            let len = region.len() & !PAGE_MASK;
            ranges.push(Range { start: region.start_addr().0, len, host: host as usize, first_page: pages });
            pages += (len / PAGE_SIZE) as usize;
        }
        let ranges: Arc<[Range]> = ranges.into();
        let marks: Arc<[Marks]> = (0..vcpus.max(1)).map(|_| Marks::new(pages)).collect();
        let ram = |vcpu| GuestRam { ranges: ranges.clone(), marks: marks.clone(), vcpu, _memory: memory.clone() };
        (0..vcpus.max(1)).map(ram).collect()
    }

    /// Whether other vCPUs have this memory too.
    #[inline]
    pub fn is_shared(&self) -> bool {
        self.marks.len() > 1
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

    /// The granules of `gpa`'s page that hold code which any vCPU has translated, one bit each; 0 outside RAM.
    #[inline]
    pub fn code_granules(&self, gpa: u64) -> u64 {
        self.page_number(gpa).map_or(0, |page| marks::code(&self.marks, page))
    }

    /// Those that this vCPU has translated.
    #[inline]
    pub fn own_granules(&self, gpa: u64) -> u64 {
        self.page_number(gpa).map_or(0, |page| self.marks[self.vcpu].code(page))
    }

    /// The other vCPUs that have translated any of `granules` in `gpa`'s page, each with which.
    pub fn others_with_code(&self, gpa: u64, granules: u64) -> impl Iterator<Item = (usize, u64)> {
        let page = self.page_number(gpa);
        page.into_iter().flat_map(move |page| marks::others_with_code(&self.marks, self.vcpu, page, granules))
    }

    /// Marks the granules of `mask` in `gpa`'s page as holding code of this vCPU's; says whether it had none there before.
    pub fn mark_code(&self, gpa: u64, mask: u64) -> bool {
        self.page_number(gpa).is_some_and(|page| self.marks[self.vcpu].mark_code(page, mask))
    }

    /// Replaces the code granules of `gpa`'s page, of which none may be added.
    pub fn set_code(&self, gpa: u64, mask: u64) {
        if let Some(page) = self.page_number(gpa) {
            self.marks[self.vcpu].set_code(page, mask);
        }
    }

    /// Notes that this vCPU's stores to a page may take the fast path from now on, unless the page holds code: then they may
    /// not, and false is given back.
    pub fn allow_fast(&self, gpa: u64) -> bool {
        self.page_number(gpa).is_some_and(|page| marks::allow_fast(&self.marks, self.vcpu, page))
    }

    /// Whether this vCPU's stores to a page may take the fast path.
    pub fn is_fast(&self, gpa: u64) -> bool {
        self.page_number(gpa).is_some_and(|page| self.marks[self.vcpu].is_fast(page))
    }

    /// Notes that this vCPU's stores to a page take the fast path no more.
    pub fn forbid_fast(&self, gpa: u64) {
        if let Some(page) = self.page_number(gpa) {
            self.marks[self.vcpu].forbid_fast(page);
        }
    }

    /// The other vCPUs whose stores to a page may take the fast path.
    pub fn others_fast(&self, gpa: u64) -> impl Iterator<Item = usize> {
        let page = self.page_number(gpa);
        page.into_iter().flat_map(move |page| marks::others_fast(&self.marks, self.vcpu, page))
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

    /// Whether RAM has `bytes`, at most a page of them, from `gpa` on, and behind the end of its page from `next_page` on.
    pub fn holds(&self, gpa: u64, next_page: Option<u64>, bytes: &[u8]) -> bool {
        let room = (PAGE_SIZE - (gpa & PAGE_MASK)) as usize;
        let (first, second) = bytes.split_at(room.min(bytes.len()));
        let mut page = [0; PAGE_SIZE as usize];
        let mut are = |at, bytes: &[u8]| {
            let there = &mut page[..bytes.len()];
            self.read_in_page(at, there) && there == bytes
        };
        are(gpa, first) && (second.is_empty() || next_page.is_some_and(|next| are(next, second)))
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
    use std::sync::Barrier;

    use vm_memory::GuestAddress;

    use super::*;

    /// Two ranges of RAM with a hole between, as so many vCPUs have them.
    fn ram(vcpus: usize) -> Vec<GuestRam> {
        let ranges = [(GuestAddress(0), 0x20_0000), (GuestAddress(0x40_0000), 0x10_0000)];
        GuestRam::of_vcpus(Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap()), vcpus)
    }

    const PAGES: [u64; 3] = [0, 0x1f_f000, 0x40_1000];
    const HOLE: u64 = 0x30_0000;

    #[test]
    fn each_vcpu_has_its_own_code() {
        let ram = ram(3);
        for page in PAGES {
            let others = |vcpu: usize, granules| ram[vcpu].others_with_code(page, granules).collect::<Vec<_>>();
            assert!(ram[0].mark_code(page, 0b001));
            assert!(!ram[0].mark_code(page + 0x800, 0b010), "not the first code of the page");
            assert!(ram[2].mark_code(page, 0b110), "but that vCPU's first");
            assert_eq!([0, 1, 2].map(|vcpu| ram[vcpu].own_granules(page)), [0b011, 0, 0b110]);
            assert_eq!(ram[1].code_granules(page), 0b111);
            assert_eq!(others(1, 0b010), [(0, 0b010), (2, 0b010)]);
            assert_eq!((others(1, 0b100), others(0, 0b001)), (vec![(2, 0b100)], vec![]));
            ram[0].set_code(page, 0);
            assert_eq!((ram[1].code_granules(page), others(1, u64::MAX)), (0b110, vec![(2, 0b110)]));
        }
        assert!(!ram[0].mark_code(HOLE, 1));
        assert_eq!((ram[1].code_granules(HOLE), ram[1].others_with_code(HOLE, 1).count()), (0, 0));
    }

    #[test]
    fn stores_are_fast_where_nobody_has_code() {
        let ram = ram(3);
        for page in PAGES {
            let fast = |vcpu: usize| ram[vcpu].others_fast(page).collect::<Vec<_>>();
            assert!(ram[1].allow_fast(page + 8) && ram[2].allow_fast(page));
            assert_eq!((fast(0), fast(1)), (vec![1, 2], vec![2]));
            // The page gets code: nothing more is allowed, and what was is to be taken back by whom it was allowed.
            ram[0].mark_code(page, 1);
            assert!(!ram[1].allow_fast(page) && ram[1].is_fast(page));
            ram[1].forbid_fast(page);
            assert!(!ram[1].allow_fast(page) && !ram[1].is_fast(page));
            assert!(!ram[0].allow_fast(page), "nor to whose code it is");
            assert_eq!(fast(0), [2]);
            ram[0].set_code(page, 0);
            assert!(ram[1].allow_fast(page) && ram[1].is_fast(page));
        }
        assert!(!ram[0].allow_fast(HOLE) && !ram[0].is_fast(HOLE));
        assert_eq!(ram[0].others_fast(HOLE).count(), 0);
    }

    /// Of one that begins to have code in a page and one that begins to store fast, one sees the other.
    #[test]
    fn code_and_fast_stores_see_each_other() {
        let mut ram = ram(2);
        let (storing, translating) = (ram.pop().unwrap(), ram.pop().unwrap());
        let together = Barrier::new(2);
        let fast = |page| {
            together.wait();
            storing.allow_fast(page)
        };
        let code = |page| {
            together.wait();
            translating.mark_code(page, 1);
            translating.others_fast(page).count() != 0
        };
        let pages = || (0..512).map(|page| page * PAGE_SIZE);
        std::thread::scope(|scope| {
            let stores = scope.spawn(|| pages().map(fast).collect::<Vec<bool>>());
            let seen: Vec<bool> = pages().map(code).collect();
            for (page, (allowed, seen)) in stores.join().unwrap().into_iter().zip(seen).enumerate() {
                assert!(!allowed || seen, "page {page}");
            }
        });
    }

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
