//! Predecoded basic blocks, keyed by guest physical address and mode, dropped when their bytes are overwritten.

use std::borrow::Cow;

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
/// Predecoded instructions that are never too many.
const FEW_INSNS: usize = 64 * 1024;
/// Runs of a block that are too few for it to stay.
const SELDOM: u32 = 4;

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
    /// Whether it ends in an indirect jump or call, or a return.
    pub indirect: bool,
    /// Page offsets in this page that the indirect branch has led to; [`NO_TARGET`] where there is none yet.
    targets: Option<Box<[u16; MAX_TARGETS]>>,
    /// Where the jump cache has it, if it does.
    pub cached: Cached,
}

/// Targets of an indirect branch that are noted: an interpreter's dispatch has about so many that matter.
const MAX_TARGETS: usize = 14;
/// An entry of [`Block::targets`] that is free.
const NO_TARGET: u16 = u16::MAX;

/// Where the jump cache has a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cached {
    /// Nowhere.
    #[default]
    Nowhere,
    /// At most at this index.
    At(u32),
    /// Perhaps at several: the page is mapped at several addresses.
    Anywhere,
}

impl Block {
    /// A block that has not run yet; `in_ram` says whether its bytes lie in one page of RAM.
    pub fn new(gpa: u64, mode: Mode, len: u16, next_page: Option<u64>, insns: Vec<Insn>, in_ram: bool) -> Block {
        use iced_x86::FlowControl::{IndirectBranch, IndirectCall, Return};
        let last = insns.last().map(|i| i.iced_code().flow_control());
        Block {
            gpa,
            mode,
            len,
            next_page,
            in_ram,
            insns: insns.into_boxed_slice(),
            heat: 0,
            runs: Runs::default(),
            postponed: 0,
            indirect: last.is_some_and(|flow| matches!(flow, IndirectBranch | IndirectCall | Return)),
            targets: None,
            cached: Cached::Nowhere,
        }
    }

    /// The instructions: what was decoded, or is again.
    pub fn insns<'a>(&'a self, cpu: &Cpu) -> Cow<'a, [Insn]> {
        if !self.insns.is_empty() {
            return Cow::Borrowed(&self.insns);
        }
        let mut page = [0; PAGE_SIZE as usize];
        let bytes = &mut page[..usize::from(self.len)];
        cpu.ram.read_in_page(self.gpa, bytes);
        Cow::Owned(decode::straight(bytes, self.mode, &cpu.model).0)
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
    /// How many instructions there were behind the last sweep ([`Self::sweep`]).
    swept: usize,
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

    /// Drops blocks that have seldom run, when there are many more than after the last time, and returns them: most of what
    /// boots runs once. Their granules stay marked as code, which costs a store there some time and nothing else.
    pub fn sweep(&mut self) -> Vec<BlockId> {
        if self.insns < (2 * self.swept).max(FEW_INSNS) {
            return Vec::new();
        }
        let seldom = |(id, b): (usize, &Block)| (b.heat < SELDOM && !b.insns.is_empty()).then_some(id as BlockId);
        let gone: Vec<BlockId> = self.blocks.iter().enumerate().filter_map(seldom).collect();
        for &id in &gone {
            let Block { gpa, next_page, .. } = self.blocks[id as usize];
            for page in std::iter::once(gpa & !PAGE_MASK).chain(next_page) {
                self.unlist(page, id);
            }
            self.remove(id);
        }
        self.swept = self.insns;
        gone
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

    /// Drops the instructions of a block that runs as code. They are decoded again where they are needed.
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
        (self.insns, self.swept) = (0, 0);
    }

    /// Adds a block and marks its granules. Returns the pages that held no code before, for write protection.
    pub fn insert(&mut self, block: Block, ram: &GuestRam) -> (BlockId, [Option<u64>; 2]) {
        self.decoded += 1;
        self.insns += block.insns.len();
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
        (id, fresh)
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

    /// Blocks of a NOP and a RET in the guest's memory, one behind the other.
    fn blocks(cpu: &Cpu, count: u64, heat: u32) -> BlockCache {
        let mut cache = BlockCache::default();
        for n in 0..count {
            let (insns, len) = decode::straight(&[0x90, 0xc3], cpu.mode, &cpu.model);
            let mut block = Block::new(2 * n, cpu.mode, len as u16, None, insns, true);
            block.heat = heat;
            cache.insert(block, &cpu.ram);
        }
        cache
    }

    #[test]
    fn dropped_instructions_are_decoded_again() {
        let code = [0x90, 0xc3].repeat(8);
        let cpu = cpu(&code);
        let mut cache = BlockCache::default();
        let (insns, len) = decode::straight(&code, cpu.mode, &cpu.model);
        let gpa = crate::testing::bare::CODE;
        let (id, _) = cache.insert(Block::new(gpa, cpu.mode, len as u16, None, insns.clone(), true), &cpu.ram);
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
        let (insns, len) = decode::straight(&[0xc3], cpu.mode, &cpu.model);
        let (id, _) = cache.insert(Block::new(1 << 40, cpu.mode, len as u16, None, insns, false), &cpu.ram);
        cache.drop_insns(id);
        assert_eq!(cache.get(id).insns.len(), 1);
    }

    #[test]
    fn seldom_run_blocks_go_when_there_are_many() {
        let cpu = cpu(&[0xc3]);
        let many = FEW_INSNS as u64;
        assert!(blocks(&cpu, 100, 0).sweep().is_empty(), "few");
        assert!(blocks(&cpu, many, SELDOM).sweep().is_empty(), "all have run often");
        let mut cache = blocks(&cpu, many, SELDOM - 1);
        assert_eq!(cache.sweep().len() as u64, many);
        assert_eq!((cache.insns, cache.find(0, cpu.mode), cache.by_page.len()), (0, None, 0));
    }
}
