//! The jump cache: where execution goes for a linear address, in the mode and address space that its key tells; and behind
//! it what code there is by physical address, for when another address space comes there, or two places are at odds.

use crate::block::BlockId;
use crate::insn::Mode;
use crate::jit::bridge::NO_KEY;

/// Entries of the jump cache.
const ENTRIES: usize = 1 << 15;
/// log2 of an entry's size.
pub const ENTRY_SHIFT: u32 = size_of::<JumpEntry>().trailing_zeros();
/// Pairs of places of code that are known at first, and at most.
const FEWEST_KNOWN: usize = 1 << 11;
const MOST_KNOWN: usize = 1 << 17;
/// There are to be more when one in so many has had to make room for another.
const CROWDED: usize = 4;

/// The bits of an offset into it that the linear address decides.
pub const OFFSETS: u64 = ((ENTRIES - 1) << ENTRY_SHIFT) as u64;

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

/// Where the jump cache is asked for.
#[derive(Clone, Copy)]
pub struct Place {
    /// Linear address.
    pub linear: u64,
    /// What its key is ([`crate::cpu::Cpu::code_key`]).
    pub key: u64,
}

/// The block that an entry is of, and its other entries.
#[derive(Clone, Copy)]
struct Link {
    block: BlockId,
    /// The entry before it in the list of the block's, and the one behind.
    before: u32,
    after: u32,
}

/// No block, and no entry.
const NONE: u32 = u32::MAX;

const NO_LINK: Link = Link { block: NONE, before: NONE, after: NONE };

/// Code that begins at a physical address.
#[derive(Clone, Copy, Default)]
struct Known {
    /// [`physical`] of it; 0 for none.
    physical: u64,
    /// Bytes from the stub.
    code: i32,
    block: BlockId,
}

/// Physical address, of 52 bits at most, and mode; never 0.
fn physical(gpa: u64, mode: Mode) -> u64 {
    gpa | u64::from(mode.0) << 52 | 1 << 63
}

/// The jump cache.
pub struct JumpCache {
    entries: Box<[JumpEntry]>,
    /// What each entry is of.
    links: Box<[Link]>,
    /// The first entry of each block.
    first: Vec<u32>,
    /// Blocks with code that lie in one page, the latest first of two that have the same hash of where.
    known: Box<[[Known; 2]]>,
    /// How many others were forgotten for them since there have been so many.
    crowded: usize,
    /// Code that returns to the dispatch loop.
    stub: u64,
}

impl JumpCache {
    /// An empty one; `stub` is code that returns to the dispatch loop.
    pub fn new(stub: u64) -> JumpCache {
        JumpCache {
            entries: vec![NO_ENTRY; ENTRIES].into(),
            links: vec![NO_LINK; ENTRIES].into(),
            first: Vec::new(),
            known: vec![Default::default(); FEWEST_KNOWN].into(),
            crowded: 0,
            stub,
        }
    }

    /// Code that returns to the dispatch loop.
    pub fn stub(&self) -> u64 {
        self.stub
    }

    /// Where compiled code finds it.
    pub fn address(&self) -> u64 {
        self.entries.as_ptr() as u64
    }

    /// Where the entry of a linear address is. Addresses that differ in nothing but their offset in a page have different
    /// places, as [`crate::cpu::Cpu::next_generation`] asks.
    #[inline(always)]
    fn index(linear: u64) -> usize {
        (linear ^ linear >> 12) as usize & (ENTRIES - 1)
    }

    /// The block at a place.
    #[inline(always)]
    pub fn find(&self, place: Place) -> Option<BlockId> {
        let at = Self::index(place.linear);
        (self.entries[at].key == place.key).then(|| self.links[at].block)
    }

    /// Enters a block that has `code`, or 0.
    pub fn insert(&mut self, place: Place, id: BlockId, code: u64) {
        let at = Self::index(place.linear);
        if self.links[at].block != id {
            self.unlink(at);
            self.link(at, id);
        }
        self.entries[at] = JumpEntry { key: place.key, code: self.or_stub(code) };
    }

    /// Takes an entry out of its block's list, if it is in one.
    fn unlink(&mut self, at: usize) {
        let Link { block, before, after } = std::mem::replace(&mut self.links[at], NO_LINK);
        if block == NONE {
            return;
        }
        match before {
            NONE => self.first[block as usize] = after,
            _ => self.links[before as usize].after = after,
        }
        if after != NONE {
            self.links[after as usize].before = before;
        }
    }

    /// Puts an entry into a block's list.
    fn link(&mut self, at: usize, id: BlockId) {
        if self.first.len() <= id as usize {
            self.first.resize(id as usize + 1, NONE);
        }
        let after = std::mem::replace(&mut self.first[id as usize], at as u32);
        self.links[at] = Link { block: id, before: NONE, after };
        if after != NONE {
            self.links[after as usize].before = at as u32;
        }
    }

    /// The first entry of a block, or [`NONE`].
    fn first(&self, id: BlockId) -> u32 {
        self.first.get(id as usize).copied().unwrap_or(NONE)
    }

    fn or_stub(&self, code: u64) -> u64 {
        if code != 0 { code } else { self.stub }
    }

    /// Has every entry of a block lead to its `code`, or 0.
    pub fn set_code(&mut self, id: BlockId, code: u64) {
        let code = self.or_stub(code);
        let mut at = self.first(id);
        while at != NONE {
            self.entries[at as usize].code = code;
            at = self.links[at as usize].after;
        }
    }

    /// Removes the entries of a block.
    pub fn remove(&mut self, id: BlockId) {
        while let at = self.first(id)
            && at != NONE
        {
            self.entries[at as usize] = NO_ENTRY;
            self.unlink(at as usize);
        }
    }

    /// Removes every entry.
    pub fn clear(&mut self) {
        self.entries.fill(NO_ENTRY);
        self.links.fill(NO_LINK);
        self.first.clear();
    }

    /// Removes every entry, and what is known of blocks: their numbers are given anew.
    pub fn forget_blocks(&mut self) {
        self.clear();
        self.known.fill(Default::default());
    }

    fn known_at(&self, physical: u64) -> usize {
        let bits = self.known.len().trailing_zeros();
        (physical.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - bits)) as usize
    }

    /// Notes that a block which lies in one page has `code` now, or 0.
    pub fn know(&mut self, gpa: u64, mode: Mode, id: BlockId, code: u64) {
        let physical = physical(gpa, mode);
        let at = self.known_at(physical);
        let pair = &mut self.known[at];
        let known = Known { physical, code: code.wrapping_sub(self.stub) as i32, block: id };
        match pair.iter_mut().find(|known| known.physical == physical) {
            Some(old) if code == 0 => *old = Known::default(),
            Some(old) => *old = known,
            None if code == 0 => {}
            None => {
                self.crowded += usize::from(pair[1].physical != 0);
                *pair = [known, pair[0]];
                if self.crowded > self.known.len() / CROWDED && self.known.len() < MOST_KNOWN {
                    self.known = vec![Default::default(); 2 * self.known.len()].into();
                    self.crowded = 0;
                }
            }
        }
    }

    /// The block that begins at a physical address and its code, if that is known.
    pub fn known(&self, gpa: u64, mode: Mode) -> Option<(BlockId, u64)> {
        let physical = physical(gpa, mode);
        let known = self.known[self.known_at(physical)].iter().find(|known| known.physical == physical)?;
        Some((known.block, self.stub.wrapping_add_signed(known.code.into())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(linear: u64, salt: u64) -> Place {
        Place { linear, key: linear ^ salt }
    }

    #[test]
    fn code_is_known_by_physical_address() {
        let mut jump = JumpCache::new(1);
        let mode = Mode(3);
        jump.know(0x1000, mode, 7, 0x99);
        assert_eq!(jump.known(0x1000, mode), Some((7, 0x99)));
        assert_eq!(jump.known(0x1000, Mode(2)), None);
        jump.know(0x1000, mode, 7, 0);
        assert_eq!(jump.known(0x1000, mode), None);
        for n in 0..4 * MOST_KNOWN as u64 {
            jump.know(n, mode, n as BlockId, n + 1);
        }
        assert_eq!(jump.known.len(), MOST_KNOWN);
        assert!(
            (0..4 * MOST_KNOWN as u64).all(|n| jump.known(n, mode).is_none_or(|found| found == (n as BlockId, n + 1)))
        );
        jump.forget_blocks();
        assert!((0..4 * MOST_KNOWN as u64).all(|n| jump.known(n, mode).is_none()));
    }

    #[test]
    fn code_that_goes_is_led_to_no_more() {
        let mut jump = JumpCache::new(1);
        jump.insert(at(0x1000, 0), 3, 0x99);
        jump.insert(at(0x2004, 0), 3, 0x99);
        jump.insert(at(0x1008, 0), 4, 0x77);
        jump.insert(at(0x300c, 0), 3, 0x99);
        jump.insert(at(0x2004, 0), 4, 0x77);
        jump.set_code(3, 0);
        let mut codes: Vec<u64> = jump.entries.iter().filter(|e| e.key != NO_KEY).map(|e| e.code).collect();
        codes.sort();
        assert_eq!(codes, [1, 1, 0x77, 0x77], "two lead to the stub");
        jump.remove(3);
        assert_eq!(jump.find(at(0x1000, 0)).or(jump.find(at(0x300c, 0))), None);
        assert_eq!([0x1008, 0x2004].map(|linear| jump.find(at(linear, 0))), [Some(4); 2]);
    }
}
