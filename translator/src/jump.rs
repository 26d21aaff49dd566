//! The jump cache: where execution goes for a linear address, in the mode and address space that its key tells.

use crate::block::{Block, BlockId, Cached};
use crate::jit::bridge::NO_KEY;

/// Entries of the jump cache.
pub const JUMP_ENTRIES: usize = 32768;

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
    entries: Box<[JumpEntry; JUMP_ENTRIES]>,
    /// The block of each entry that has one.
    blocks: Box<[BlockId; JUMP_ENTRIES]>,
}

impl Default for JumpCache {
    fn default() -> JumpCache {
        JumpCache { entries: Box::new([NO_ENTRY; JUMP_ENTRIES]), blocks: Box::new([0; JUMP_ENTRIES]) }
    }
}

impl JumpCache {
    /// Where compiled code finds it.
    pub fn address(&self) -> u64 {
        self.entries.as_ptr() as u64
    }

    /// The block at a linear address with this key.
    #[inline(always)]
    pub fn find(&self, linear: u64, key: u64) -> Option<BlockId> {
        let at = index(linear);
        (self.entries[at].key == key).then(|| self.blocks[at])
    }

    /// Enters a block, whose notes on where it is entered are kept.
    pub fn insert(&mut self, linear: u64, entry: JumpEntry, id: BlockId, block: &mut Block) {
        let at = index(linear);
        block.cached = match block.cached {
            Cached::At(other) if other != at as u32 && self.blocks[other as usize & (JUMP_ENTRIES - 1)] == id => {
                Cached::Anywhere
            }
            Cached::Anywhere => Cached::Anywhere,
            _ => Cached::At(at as u32),
        };
        self.entries[at] = entry;
        self.blocks[at] = id;
    }

    /// Has every entry of a block, which is entered there, lead to `code`.
    pub fn set_code(&mut self, id: BlockId, cached: Cached, code: u64) {
        let places = match cached {
            Cached::Nowhere => 0..0,
            Cached::At(at) => at as usize & (JUMP_ENTRIES - 1)..(at as usize & (JUMP_ENTRIES - 1)) + 1,
            Cached::Anywhere => 0..JUMP_ENTRIES,
        };
        let entries = self.entries[places.clone()].iter_mut().zip(&self.blocks[places]);
        for (e, _) in entries.filter(|(e, block)| **block == id && e.key != NO_KEY) {
            e.code = code;
        }
    }

    /// Removes the entry of a block that is entered at most at this index.
    pub fn remove_at(&mut self, at: u32, id: BlockId) {
        let at = at as usize & (JUMP_ENTRIES - 1);
        if self.blocks[at] == id {
            self.entries[at] = NO_ENTRY;
        }
    }

    /// Removes the entries of blocks.
    pub fn remove_all(&mut self, gone: &[BlockId]) {
        for (e, _) in self.entries.iter_mut().zip(self.blocks.iter()).filter(|(_, id)| gone.contains(id)) {
            *e = NO_ENTRY;
        }
    }

    /// Removes every entry.
    pub fn clear(&mut self) {
        self.entries.fill(NO_ENTRY);
    }
}

/// Where the entry of a linear address is. Addresses that differ in nothing but their offset in a page have different
/// places, as [`crate::cpu::Cpu::next_generation`] asks.
#[inline(always)]
fn index(linear: u64) -> usize {
    (linear ^ linear >> 12) as usize & (JUMP_ENTRIES - 1)
}
