//! Guest RAM with nothing around it: an access that leaves it is a fault of the host, which the fuzzer reports.

use std::ptr;
use std::sync::Arc;

use diglot_translator::mem::GuestRam;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// Start and length of each range; between them is what no RAM answers in.
pub const RANGES: [(u64, usize); 2] = [(0, 0x2_0000), (0x3_0000, 0x1_0000)];
/// Inaccessible addresses before, between and behind the ranges. A guest address is at most this far astray if it lost
/// its upper half, or got the wrong sign.
const GUARD: usize = 4 << 30;

/// The RAM of one guest after the other.
pub struct Ram {
    memory: Arc<GuestMemoryMmap>,
}

impl Ram {
    /// Maps it.
    pub fn new() -> Ram {
        let reserved = RANGES.iter().map(|r| r.1 + GUARD).sum::<usize>() + GUARD;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh mapping at an address of the host's choice.
        let base = unsafe { libc::mmap(ptr::null_mut(), reserved, libc::PROT_NONE, flags, -1, 0) };
        assert_ne!(base, libc::MAP_FAILED, "no address space for guest RAM");
        let mut at = base.cast::<u8>();
        let regions = RANGES.map(|(start, len)| {
            at = at.wrapping_add(GUARD);
            let access = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: these pages are part of the mapping above, in which nothing lives yet.
            let result = unsafe { libc::mprotect(at.cast(), len, access) };
            assert_eq!(result, 0, "guest RAM cannot be made accessible");
            // SAFETY: they are mapped as said, and never unmapped.
            let region = unsafe { MmapRegion::<()>::build_raw(at, len, access, flags) }.expect("aligned");
            at = at.wrapping_add(len);
            GuestRegionMmap::new(region, GuestAddress(start)).expect("no overflow")
        });
        Ram { memory: Arc::new(GuestMemoryMmap::from_regions(regions.into()).expect("apart and in order")) }
    }

    /// It as a CPU takes it, without a mark of translated code.
    pub fn for_cpu(&self) -> Arc<GuestRam> {
        Arc::new(GuestRam::new(self.memory.clone()))
    }

    /// Writes inside one range.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).expect("RAM is there");
    }

    /// All of it, range by range.
    pub fn content(&self) -> Vec<u8> {
        let mut all = vec![0; RANGES.iter().map(|r| r.1).sum()];
        let mut rest = &mut all[..];
        for (start, len) in RANGES {
            let (range, behind) = rest.split_at_mut(len);
            self.memory.read_slice(range, GuestAddress(start)).expect("RAM is there");
            rest = behind;
        }
        all
    }
}
