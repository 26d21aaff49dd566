//! The jump cache: where execution goes for a linear address, in the mode and address space that its key tells.

use crate::addr::is_canonical;
use crate::block::{Block, BlockId, Cached};
use crate::jit::bridge::NO_KEY;

/// Entries of the jump cache at first.
const FEWEST: usize = 1 << 14;
/// Entries of one that has been found too small.
const MOST: usize = 1 << 17;
/// log2 of an entry's size.
pub const ENTRY_SHIFT: u32 = size_of::<JumpEntry>().trailing_zeros();

/// What compiled code reads of an entry.
#[repr(C, align(16))]
#[derive(Clone, Copy)]
pub struct JumpEntry {
    /// Linear address combined with the salt ([`crate::cpu::Cpu::code_key`]).
    pub key: u64,
    /// Compiled code, or code that returns to the dispatch loop.
    pub code: u64,
}

const NO_ENTRY: JumpEntry = JumpEntry { key: NO_KEY, code: 0 };

/// The jump cache.
pub struct JumpCache {
    entries: Box<[JumpEntry]>,
    /// The block of each entry that has one.
    blocks: Box<[BlockId]>,
    /// Entries that took the place of another that was still of use, since it has been this large.
    displaced: usize,
}

impl Default for JumpCache {
    fn default() -> JumpCache {
        JumpCache::with(FEWEST)
    }
}

impl JumpCache {
    fn with(entries: usize) -> JumpCache {
        JumpCache { entries: vec![NO_ENTRY; entries].into(), blocks: vec![0; entries].into(), displaced: 0 }
    }

    /// Where compiled code finds it.
    pub fn address(&self) -> u64 {
        self.entries.as_ptr() as u64
    }

    /// The bits of an offset into it that the linear address decides.
    pub fn mask(&self) -> u64 {
        ((self.entries.len() - 1) << ENTRY_SHIFT) as u64
    }

    /// Where the entry of a linear address is. Addresses that differ in nothing but their offset in a page have different
    /// places, as [`crate::cpu::Cpu::next_generation`] asks.
    #[inline(always)]
    fn index(&self, linear: u64) -> usize {
        (linear ^ linear >> 12) as usize & (self.entries.len() - 1)
    }

    /// A place that is known by its index.
    fn place(&self, at: u32) -> usize {
        at as usize & (self.entries.len() - 1)
    }

    /// Makes it larger, and empty, if it has been found too small; whether it is elsewhere now.
    pub fn grow(&mut self) -> bool {
        let wanted = self.displaced > self.entries.len() && self.entries.len() < MOST;
        if wanted {
            *self = JumpCache::with(2 * self.entries.len());
        }
        wanted
    }

    /// The block at a linear address with this key.
    #[inline(always)]
    pub fn find(&self, linear: u64, key: u64) -> Option<BlockId> {
        let at = self.index(linear);
        (self.entries[at].key == key).then(|| self.blocks[at])
    }

    /// Enters a block, whose notes on where it is entered are kept.
    pub fn insert(&mut self, linear: u64, entry: JumpEntry, id: BlockId, block: &mut Block) {
        let at = self.index(linear);
        block.cached = match block.cached {
            Cached::At(other) if other != at as u32 && self.blocks[self.place(other)] == id => Cached::Anywhere,
            Cached::Anywhere => Cached::Anywhere,
            _ => Cached::At(at as u32),
        };
        // By this salt, what was there has a canonical address that belongs there only if its key is of the same address
        // space and generation.
        let salt = entry.key ^ linear;
        let old = self.entries[at].key ^ salt;
        self.displaced += usize::from(old != linear && is_canonical(old) && self.index(old) == at);
        self.entries[at] = entry;
        self.blocks[at] = id;
    }

    /// Has every entry of a block, which is entered there, lead to `code`.
    pub fn set_code(&mut self, id: BlockId, cached: Cached, code: u64) {
        let places = match cached {
            Cached::Nowhere => 0..0,
            Cached::At(at) => self.place(at)..self.place(at) + 1,
            Cached::Anywhere => 0..self.entries.len(),
        };
        let entries = self.entries[places.clone()].iter_mut().zip(&self.blocks[places]);
        for (e, _) in entries.filter(|(e, block)| **block == id && e.key != NO_KEY) {
            e.code = code;
        }
    }

    /// Removes the entry of a block that is entered at most at this index.
    pub fn remove_at(&mut self, at: u32, id: BlockId) {
        let at = self.place(at);
        if self.blocks[at] == id {
            self.entries[at] = NO_ENTRY;
        }
    }

    /// Has the entry of a linear address with this key lead to `code`.
    pub fn lead(&mut self, linear: u64, key: u64, code: u64) {
        let at = self.index(linear);
        if self.entries[at].key == key {
            self.entries[at].code = code;
        }
    }

    /// Removes the entries of blocks.
    pub fn remove_all(&mut self, gone: &[BlockId]) {
        let mut is_gone = vec![false; gone.iter().max().map_or(0, |&most| most as usize + 1)];
        gone.iter().for_each(|&id| is_gone[id as usize] = true);
        for (e, &id) in self.entries.iter_mut().zip(self.blocks.iter()) {
            if is_gone.get(id as usize).is_some_and(|&gone| gone) {
                *e = NO_ENTRY;
            }
        }
    }

    /// Removes every entry.
    pub fn clear(&mut self) {
        self.entries.fill(NO_ENTRY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::insn::Mode;

    /// Enters blocks at distinct addresses, all of use at the same time.
    fn fill(jump: &mut JumpCache, blocks: u64) {
        for n in 0..blocks {
            let mut block = Block::new(n, Mode(0), 1, None, &[], false);
            let linear = 0x40_0000 + 16 * n;
            jump.insert(linear, JumpEntry { key: linear ^ 5, code: n }, n as BlockId, &mut block);
        }
    }

    #[test]
    fn it_grows_when_what_is_of_use_is_displaced() {
        let mut jump = JumpCache::default();
        fill(&mut jump, FEWEST as u64 / 16);
        assert!(!jump.grow(), "there was room");
        fill(&mut jump, 4 * FEWEST as u64);
        let mask = jump.mask();
        assert!(jump.grow());
        assert_eq!(jump.mask(), mask << 1 | 1 << ENTRY_SHIFT);
        assert_eq!(jump.find(0x40_0000, 0x40_0000 ^ 5), None, "it begins anew");
        while jump.grow() {}
        for _ in 0..8 {
            fill(&mut jump, 4 * MOST as u64);
            jump.grow();
        }
        assert_eq!(jump.entries.len(), MOST);
    }

    #[test]
    fn what_another_address_space_left_is_not_missed() {
        let mut jump = JumpCache::default();
        for space in 0..8 {
            for n in 0..FEWEST as u64 {
                let mut block = Block::new(n, Mode(0), 1, None, &[], false);
                jump.insert(n, JumpEntry { key: n ^ space << 48, code: n }, n as BlockId, &mut block);
            }
        }
        assert!(!jump.grow());
    }
}
