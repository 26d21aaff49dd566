//! Predecoded basic blocks, keyed by guest physical address and mode, dropped when their bytes are overwritten.

use std::borrow::Cow;
use std::collections::VecDeque;

use crate::addr::{PAGE_MASK, PAGE_SIZE};
use crate::address_map::AddressMap;
use crate::cpu::Cpu;
use crate::decode;
use crate::insn::{Insn, Mode};
use crate::jit::cache::Runs;
use crate::mem::{GuestRam, granule_mask};

/// The most instructions in a block.
pub const MAX_INSNS: usize = 64;
/// Predecoded instructions kept before everything is dropped (64 bytes each).
const MAX_CACHED_INSNS: usize = 512 * 1024;

/// Blocks kept before everything is dropped (about 150 bytes each besides their instructions).
const MAX_BLOCKS: usize = 512 * 1024;
/// So many blocks later one that has not run again keeps no instructions: most of what boots runs once, and most of what
/// runs again does so soon.
const SOON: usize = 4096;
/// Blocks that are looked at, whether they have run again, for each that comes.
const LOOKS: usize = 2;

/// Index of a block in its cache; reused after invalidation.
pub type BlockId = u32;

/// A straight run of instructions that starts in one page; only the last may end in the next.
pub struct Block {
    /// Guest physical address of the first byte.
    pub gpa: u64,
    /// Decode mode.
    pub mode: Mode,
    /// Length in bytes.
    pub len: u16,
    /// The physical page that holds the tail of the last instruction, if it crosses.
    pub next_page: Option<u64>,
    /// Whether its bytes lie in one page of RAM, where they can be read again.
    in_ram: bool,
    /// The instructions, unless they were dropped, being in RAM; [`Self::insns`] has them in any case.
    insns: Box<[Insn]>,
    /// How often the interpreter ran it.
    pub heat: u32,
    /// The code that starts here.
    pub runs: Runs,
    /// How often the block has become hot without being compiled, because its page keeps being rewritten.
    pub postponed: u32,
    /// How often code that started here had to go for other code to have room.
    pub evicted: u8,
    /// Whether it ends in an indirect jump or call, or a return.
    pub indirect: bool,
    /// Page offsets in this page that the indirect branch has led to; [`NO_TARGET`] where there is none yet.
    targets: Option<Box<[u16; MAX_TARGETS]>>,
}

/// Targets of an indirect branch that are noted: an interpreter's dispatch has about so many that matter.
const MAX_TARGETS: usize = 14;
/// An entry of [`Block::targets`] that is free.
const NO_TARGET: u16 = u16::MAX;

impl Block {
    /// A block that has not run yet; `in_ram` says whether its bytes lie in one page of RAM.
    pub fn new(gpa: u64, mode: Mode, len: u16, next_page: Option<u64>, insns: &[Insn], in_ram: bool) -> Block {
        use iced_x86::FlowControl::{IndirectBranch, IndirectCall, Return};
        let last = insns.last().map(|i| i.iced_code().flow_control());
        Block {
            gpa,
            mode,
            len,
            next_page,
            in_ram,
            insns: insns.into(),
            heat: 0,
            runs: Runs::default(),
            postponed: 0,
            evicted: 0,
            indirect: last.is_some_and(|flow| matches!(flow, IndirectBranch | IndirectCall | Return)),
            targets: None,
        }
    }

    /// The instructions: what was decoded, or is again.
    pub fn insns<'a>(&'a self, cpu: &Cpu) -> Cow<'a, [Insn]> {
        if !self.insns.is_empty() {
            return Cow::Borrowed(&self.insns);
        }
        let mut bytes = [0; decode::MAX_BYTES];
        let bytes = &mut bytes[..usize::from(self.len)];
        cpu.ram.read_in_page(self.gpa, bytes);
        let mut insns = Vec::new();
        decode::straight(bytes, self.mode, &cpu.model, &mut insns);
        Cow::Owned(insns)
    }

    /// Notes where the indirect branch at the end has led, if that is in the block's page; `ip` is the block's.
    pub fn note_target(&mut self, ip: u64, target: u64) {
        if (ip ^ target) & !PAGE_MASK != 0 {
            return;
        }
        let off = (target & PAGE_MASK) as u16;
        let targets = self.targets.get_or_insert_with(|| Box::new([NO_TARGET; MAX_TARGETS]));
        if let Some(slot) = targets.iter_mut().find(|t| **t == off || **t == NO_TARGET) {
            *slot = off;
        }
    }

    /// Whether the indirect branch at the end has led about in this page.
    pub fn leads_about(&self) -> bool {
        self.targets.is_some()
    }

    /// Page offsets that it has led to.
    pub fn targets(&self) -> impl Iterator<Item = u64> {
        self.targets.iter().flat_map(|t| &t[..]).filter(|&&t| t != NO_TARGET).map(|&t| u64::from(t))
    }

    /// The pages and granules that the block's bytes lie in.
    pub fn extent(&self) -> impl Iterator<Item = (u64, u64)> {
        let offset = self.gpa & PAGE_MASK;
        let in_first = u64::from(self.len).min(PAGE_SIZE - offset);
        let rest = u64::from(self.len) - in_first;
        let first = (self.gpa & !PAGE_MASK, granule_mask(offset, in_first));
        std::iter::once(first).chain(self.next_page.map(|page| (page, granule_mask(0, rest))))
    }
}

/// The blocks of one vCPU.
#[derive(Default)]
pub struct BlockCache {
    blocks: Vec<Block>,
    free: Vec<BlockId>,
    by_key: AddressMap<(u64, u8), BlockId>,
    by_page: AddressMap<u64, Vec<BlockId>>,
    insns: usize,
    /// The latest blocks, and those that had run again when they were looked at, the oldest first; and how often they had run
    /// then.
    latest: VecDeque<(BlockId, u32)>,
    /// Blocks decoded so far.
    pub decoded: u64,
    /// Blocks dropped because their bytes changed.
    pub invalidated: u64,
    /// How often the whole cache was dropped for size.
    pub flushes: u64,
}

impl BlockCache {
    /// Finds the block that starts at `gpa`.
    pub fn find(&self, gpa: u64, mode: Mode) -> Option<BlockId> {
        self.by_key.get(&(gpa, mode.0)).copied()
    }

    /// The block with an id that is in use.
    #[inline(always)]
    pub fn get(&self, id: BlockId) -> &Block {
        &self.blocks[id as usize]
    }

    /// The block with an id that is in use, mutably.
    #[inline(always)]
    pub fn get_mut(&mut self, id: BlockId) -> &mut Block {
        &mut self.blocks[id as usize]
    }

    /// Removes a block from the list of a page.
    fn unlist(&mut self, page: u64, id: BlockId) {
        if let Some(list) = self.by_page.get_mut(&page) {
            list.retain(|&b| b != id);
            if list.is_empty() {
                self.by_page.remove(&page);
            }
        }
    }

    /// Removes a block from everything but the lists of pages.
    fn remove(&mut self, id: BlockId) {
        let block = &mut self.blocks[id as usize];
        self.insns -= std::mem::take(&mut block.insns).len();
        self.by_key.remove(&(block.gpa, block.mode.0));
        self.free.push(id);
    }

    /// Whether another block of `n` instructions would exceed a bound, so that [`Self::clear`] is due.
    pub fn is_full(&self, n: usize) -> bool {
        self.insns + n > MAX_CACHED_INSNS || self.by_key.len() >= MAX_BLOCKS
    }

    /// Drops the instructions of a block. They are decoded again where they are needed.
    pub fn drop_insns(&mut self, id: BlockId) {
        let block = &mut self.blocks[id as usize];
        if block.in_ram {
            self.insns -= std::mem::take(&mut block.insns).len();
        }
    }

    /// A block's instructions, which it keeps again.
    #[inline]
    pub fn insns(&mut self, id: BlockId, cpu: &Cpu) -> &[Insn] {
        let block = &mut self.blocks[id as usize];
        if block.insns.is_empty() {
            block.insns = block.insns(cpu).into();
            self.insns += block.insns.len();
        }
        &block.insns
    }

    /// Drops every block; `others` says which granules of a page hold code besides.
    pub fn clear(&mut self, ram: &GuestRam, others: impl Fn(u64) -> u64) {
        for &page in self.by_page.keys() {
            ram.set_code(page, others(page));
        }
        self.flushes += 1;
        self.blocks.clear();
        self.free.clear();
        self.by_key.clear();
        self.by_page.clear();
        self.latest.clear();
        self.insns = 0;
    }

    /// Adds a block and marks its granules. Returns the pages that held no code before, for write protection.
    pub fn insert(&mut self, block: Block, ram: &GuestRam) -> (BlockId, [Option<u64>; 2]) {
        self.decoded += 1;
        self.insns += block.insns.len();
        for _ in 0..LOOKS.min(self.latest.len().saturating_sub(SOON - 1)) {
            self.look_at_oldest();
        }
        let id = self.free.pop().unwrap_or(self.blocks.len() as BlockId);
        self.by_key.insert((block.gpa, block.mode.0), id);
        let mut fresh = [None; 2];
        for ((page, mask), slot) in block.extent().zip(&mut fresh) {
            self.by_page.entry(page).or_default().push(id);
            if ram.mark_code(page, mask) {
                *slot = Some(page);
            }
        }
        if (id as usize) < self.blocks.len() {
            self.blocks[id as usize] = block;
        } else {
            self.blocks.push(block);
        }
        self.latest.push_back((id, 1));
        (id, fresh)
    }

    /// Drops the instructions of the block that has been looked at least lately, if it has not run again since.
    fn look_at_oldest(&mut self) {
        let Some((id, before)) = self.latest.pop_front() else { return };
        let Block { heat, ref insns, .. } = self.blocks[id as usize];
        if heat <= before {
            self.drop_insns(id);
        } else if !insns.is_empty() {
            self.latest.push_back((id, heat));
        }
    }

    /// Drops the blocks that touch any of `granules` in a page, recomputes which granules hold code, besides `others`, and
    /// returns the blocks that it dropped.
    pub fn invalidate(&mut self, page: u64, granules: u64, others: u64, ram: &GuestRam) -> Vec<BlockId> {
        let Some(ids) = self.by_page.remove(&page) else {
            ram.set_code(page, others);
            return Vec::new();
        };
        let mut kept = Vec::new();
        let mut gone = Vec::new();
        let mut mask = others;
        for id in ids {
            let block = &self.blocks[id as usize];
            let here = block.extent().filter(|&(p, _)| p == page).fold(0, |m, (_, g)| m | g);
            if here & granules == 0 {
                mask |= here;
                kept.push(id);
                continue;
            }
            self.invalidated += 1;
            let other = block.extent().map(|(p, _)| p).find(|&p| p != page);
            other.into_iter().for_each(|page| self.unlist(page, id));
            self.remove(id);
            gone.push(id);
        }
        if !kept.is_empty() {
            self.by_page.insert(page, kept);
        }
        ram.set_code(page, mask);
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::bare::cpu;

    #[test]
    fn dropped_instructions_are_decoded_again() {
        let code = [0x90, 0xc3].repeat(8);
        let cpu = cpu(&code);
        let mut cache = BlockCache::default();
        let mut insns = Vec::new();
        let len = decode::straight(&code, cpu.mode, &cpu.model, &mut insns);
        let gpa = crate::testing::bare::CODE;
        let (id, _) = cache.insert(Block::new(gpa, cpu.mode, len as u16, None, &insns, true), &cpu.ram);
        let text = |insns: &[Insn]| insns.iter().map(|i| (i.code, i.off, i.len)).collect::<Vec<_>>();
        cache.drop_insns(id);
        assert!(cache.get(id).insns.is_empty());
        assert_eq!(text(&cache.get(id).insns(&cpu)), text(&insns));
        assert_eq!(text(cache.insns(id, &cpu)), text(&insns));
        assert!(!cache.get(id).insns.is_empty());
    }

    #[test]
    fn what_cannot_be_read_again_stays() {
        let cpu = cpu(&[0xc3]);
        let mut cache = BlockCache::default();
        let mut insns = Vec::new();
        let len = decode::straight(&[0xc3], cpu.mode, &cpu.model, &mut insns);
        let (id, _) = cache.insert(Block::new(1 << 40, cpu.mode, len as u16, None, &insns, false), &cpu.ram);
        cache.drop_insns(id);
        assert_eq!(cache.get(id).insns.len(), 1);
    }

    #[test]
    fn what_does_not_run_again_soon_keeps_no_instructions() {
        let cpu = cpu(&[0xc3]);
        let mut cache = BlockCache::default();
        let mut insns = Vec::new();
        let len = decode::straight(&[0x90, 0xc3], cpu.mode, &cpu.model, &mut insns) as u16;
        let mut decode = |heat| {
            let mut block = Block::new(2 * cache.decoded, cpu.mode, len, None, &insns, true);
            block.heat = heat;
            cache.insert(block, &cpu.ram).0
        };
        let [once, twice] = [1, 2].map(&mut decode);
        let later: Vec<BlockId> = (0..SOON).map(|_| decode(0)).collect();
        let kept = |id: BlockId| !cache.get(id).insns.is_empty();
        assert!(!kept(once) && kept(twice) && later.into_iter().all(kept));
        assert_eq!(cache.insns, 2 * (1 + SOON));
    }
}
