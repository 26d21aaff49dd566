//! The free ranges of an arena: best fit, coalescing on release.

use std::collections::{BTreeMap, BTreeSet};

/// Size and alignment of the unit of allocation, in bytes: what Cranelift asks for functions and their constants.
pub const GRANULE: usize = 16;

/// Free ranges, in bytes; every offset and length is a multiple of [`GRANULE`], no two ranges touch.
///
/// Best fit is what keeps an arena of units between 0.1 and 50 KiB from fragmenting; both indexes make allocation
/// and release logarithmic in the number of holes.
pub(super) struct FreeList {
    by_offset: BTreeMap<usize, usize>,
    by_length: BTreeSet<(usize, usize)>,
    free: usize,
}

impl FreeList {
    /// All of `0..capacity` is free.
    pub(super) fn new(capacity: usize) -> Self {
        let mut list = Self { by_offset: BTreeMap::new(), by_length: BTreeSet::new(), free: 0 };
        list.insert(0, capacity - capacity % GRANULE);
        list
    }

    /// Bytes that are free, in holes of any size.
    pub(super) fn free_bytes(&self) -> usize {
        self.free
    }

    /// Takes `len` bytes from the smallest hole that has them: the offset and the rounded length.
    pub(super) fn alloc(&mut self, len: usize) -> Option<(usize, usize)> {
        let len = len.max(1).checked_next_multiple_of(GRANULE)?;
        let &(hole, offset) = self.by_length.range((len, 0)..).next()?;
        self.remove(offset, hole);
        self.insert(offset + len, hole - len);
        Some((offset, len))
    }

    /// Returns a range that [`FreeList::alloc`] gave.
    pub(super) fn release(&mut self, mut offset: usize, mut len: usize) {
        let before = self.by_offset.range(..offset).next_back().map(|(&o, &l)| (o, l));
        let after = self.by_offset.range(offset..).next().map(|(&o, &l)| (o, l));
        if let Some((o, l)) = before {
            debug_assert!(o + l <= offset, "released twice");
            if o + l == offset {
                self.remove(o, l);
                (offset, len) = (o, l + len);
            }
        }
        if let Some((o, l)) = after {
            debug_assert!(offset + len <= o, "released twice");
            if offset + len == o {
                self.remove(o, l);
                len += l;
            }
        }
        self.insert(offset, len);
    }

    fn insert(&mut self, offset: usize, len: usize) {
        if len != 0 {
            self.by_offset.insert(offset, len);
            self.by_length.insert((len, offset));
            self.free += len;
        }
    }

    fn remove(&mut self, offset: usize, len: usize) {
        self.by_offset.remove(&offset);
        self.by_length.remove(&(len, offset));
        self.free -= len;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_the_smallest_hole_that_fits() {
        let mut list = FreeList::new(1024);
        let ranges: Vec<_> = [64, 16, 32, 16, 48, 16].iter().map(|&n| list.alloc(n).unwrap()).collect();
        for i in [0, 2, 4] {
            list.release(ranges[i].0, ranges[i].1);
        }
        assert_eq!(list.alloc(20), Some((ranges[2].0, 32)));
        assert_eq!(list.alloc(33), Some((ranges[4].0, 48)));
        assert_eq!(list.alloc(1), Some((ranges[0].0, 16)));
    }

    #[test]
    fn neighbours_coalesce_in_any_order() {
        for order in [[0, 1, 2], [2, 1, 0], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1]] {
            let mut list = FreeList::new(48);
            let ranges: Vec<_> = (0..3).map(|_| list.alloc(16).unwrap()).collect();
            assert_eq!(list.alloc(1), None);
            for i in order {
                list.release(ranges[i].0, ranges[i].1);
            }
            assert_eq!(list.by_offset.len(), 1, "{order:?}");
            assert_eq!(list.alloc(48), Some((0, 48)), "{order:?}");
        }
    }

    #[test]
    fn refuses_what_it_cannot_hold() {
        let mut list = FreeList::new(64);
        assert_eq!(list.alloc(65), None);
        assert_eq!(list.alloc(usize::MAX), None);
        assert_eq!(list.free_bytes(), 64);
        assert_eq!(list.alloc(0), Some((0, GRANULE)));
    }

    /// Random traffic: no two live ranges overlap, the accounts balance, and everything comes back.
    #[test]
    fn random_traffic_never_overlaps_and_recovers() {
        const CAPACITY: usize = 1 << 16;
        let mut list = FreeList::new(CAPACITY);
        let mut live: BTreeMap<usize, usize> = BTreeMap::new();
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed as usize
        };
        let mut refused = 0;
        for _ in 0..50_000 {
            if random() % 5 < 3 {
                let want = random() % 2000;
                if let Some((offset, len)) = list.alloc(want) {
                    assert!(len >= want && offset % GRANULE == 0 && len % GRANULE == 0 && offset + len <= CAPACITY);
                    assert!(live.range(..offset + len).next_back().is_none_or(|(&o, &l)| o + l <= offset));
                    live.insert(offset, len);
                } else {
                    refused += 1;
                }
            } else if let Some((&offset, &len)) = live.range(random() % CAPACITY..).next() {
                live.remove(&offset);
                list.release(offset, len);
            }
            assert_eq!(list.free_bytes() + live.values().sum::<usize>(), CAPACITY);
        }
        assert!(refused > 0, "the arena never filled: the test proves too little");
        for (offset, len) in live {
            list.release(offset, len);
        }
        assert_eq!(list.alloc(CAPACITY), Some((0, CAPACITY)));
    }
}
