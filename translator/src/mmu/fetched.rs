//! Which linear pages instructions were fetched from: INVLPG of any other page leaves the jump cache alone.

use std::collections::HashSet;
use std::hash::BuildHasherDefault;

use crate::address_map::AddressHasher;

/// Address bits in the large pages that kernels use, 2 MiB.
const LARGE_BITS: u32 = 21;
/// Pages remembered before the set says that every page was fetched from.
const MOST: usize = 1 << 16;

type Numbers = HashSet<u64, BuildHasherDefault<AddressHasher>>;

/// The pages fetched from since the set was last emptied.
#[derive(Default)]
pub struct Fetched {
    /// Numbers of 4 KiB pages.
    pages: Numbers,
    /// Numbers of 2 MiB ranges in which a large page was fetched from: INVLPG of any address in one removes all of it.
    large: Numbers,
    /// Whether the set stands for every page: a page larger than 2 MiB was fetched from, or too many were.
    every: bool,
}

impl Fetched {
    /// Notes a fetch through a translation of a page of 2^`page_bits` bytes.
    pub fn note(&mut self, linear: u64, page_bits: u32) {
        self.every |= page_bits > LARGE_BITS || self.pages.len() >= MOST;
        if self.every {
            return;
        }
        self.pages.insert(linear >> 12);
        if page_bits == LARGE_BITS {
            self.large.insert(linear >> LARGE_BITS);
        }
    }

    /// Whether an instruction may have been fetched from the page, of whatever size, that holds `linear`.
    pub fn covers(&self, linear: u64) -> bool {
        self.every || self.pages.contains(&(linear >> 12)) || self.large.contains(&(linear >> LARGE_BITS))
    }

    /// Empties the set.
    pub fn clear(&mut self) {
        self.pages.clear();
        self.large.clear();
        self.every = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_covers_its_own_size() {
        let mut fetched = Fetched::default();
        fetched.note(0x7_1234, 12);
        fetched.note(0x4020_1000, 21);
        for (linear, covered) in [(0x7_1000, true), (0x7_2000, false), (0x4030_0000, true), (0x4040_0000, false)] {
            assert_eq!(fetched.covers(linear), covered, "{linear:#x}");
        }
        fetched.note(0x8000_0000, 30);
        assert!(fetched.covers(0));
        fetched.clear();
        assert!(!fetched.covers(0x7_1000) && !fetched.covers(0x4020_1000));
    }

    #[test]
    fn it_is_bounded() {
        let mut fetched = Fetched::default();
        for n in 0..2 * MOST as u64 {
            fetched.note(n << 21, 21);
        }
        assert!(fetched.pages.len() <= MOST && fetched.large.len() <= MOST && fetched.covers(u64::MAX));
    }
}
