//! Regions: the control-flow graph of hot blocks in one page that is compiled as a unit.

use crate::addr::PAGE_MASK;
use crate::block::{Block, BlockCache};
use crate::insn::{Insn, Mode};
use crate::jit::usage::Usage;
use crate::mem::granule_mask;

/// The most blocks in a region: compile time per block grows beyond this.
pub const MAX_BLOCKS: usize = 40;
/// The most instructions in a region.
pub const MAX_INSNS: usize = 400;

/// How control leaves a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Into the instruction at this page offset.
    Fall(u64),
    /// A direct jump or call to this offset from the page's start; may lie outside the page.
    Jump(i64),
    /// A conditional branch: taken target and fall-through.
    Branch(i64, u64),
    /// An indirect branch, or an instruction after which the dispatch loop must look again.
    Exit,
}

/// One block of a region.
pub struct RegionBlock {
    /// Page offset of the first byte.
    pub off: u64,
    /// Instructions, with `off` counted from the start of the page.
    pub insns: Vec<Insn>,
    /// How it ends.
    pub end: End,
    /// What its instructions do.
    pub usage: Usage,
}

impl RegionBlock {
    /// Page offset behind the last instruction.
    pub fn end_off(&self) -> u64 {
        self.insns.last().map_or(self.off, Insn::next_off)
    }

    /// Page offsets of the direct successors.
    pub fn successors(&self) -> impl Iterator<Item = i64> {
        let (a, b) = match self.end {
            End::Fall(off) => (Some(off as i64), None),
            End::Jump(off) => (Some(off), None),
            End::Branch(taken, next) => (Some(taken), Some(next as i64)),
            End::Exit => (None, None),
        };
        a.into_iter().chain(b)
    }
}

/// A region ready to be compiled: everything the compiler needs, copied out of the vCPU's caches.
pub struct Plan {
    /// Guest physical address of the entry.
    pub gpa: u64,
    /// Decode mode.
    pub mode: Mode,
    /// Blocks; the first is the entry.
    pub blocks: Vec<RegionBlock>,
    /// Granules of the page that the region's bytes lie in.
    pub granules: u64,
}

impl Plan {
    /// Index of the block at a page offset.
    pub fn find(&self, off: i64) -> Option<usize> {
        self.blocks.iter().position(|b| b.off as i64 == off)
    }

    /// Bytes of guest code.
    pub fn guest_bytes(&self) -> u64 {
        self.blocks.iter().map(|b| b.end_off() - b.off).sum()
    }

    /// Grows a region from the block at `gpa` along direct edges to blocks of the same page that have run too.
    pub fn grow(cache: &BlockCache, gpa: u64, mode: Mode) -> Option<Plan> {
        let page = gpa & !PAGE_MASK;
        let seed = cache.get(cache.find(gpa, mode)?);
        let warm = seed.heat / 16;
        let mut plan = Plan { gpa, mode, blocks: Vec::new(), granules: 0 };
        let mut insns = 0;
        let mut queue = std::collections::VecDeque::from([(gpa & PAGE_MASK) as i64]);
        while let Some(off) = queue.pop_front() {
            if plan.blocks.len() >= MAX_BLOCKS || insns >= MAX_INSNS {
                break;
            }
            if !(0..=PAGE_MASK as i64).contains(&off) || plan.find(off).is_some() {
                continue;
            }
            let Some(id) = cache.find(page | off as u64, mode) else { continue };
            let block = cache.get(id);
            if block.next_page.is_some() || (block.heat < warm && !plan.blocks.is_empty()) {
                continue;
            }
            let block = region_block(block);
            plan.granules |= granule_mask(block.off, block.end_off() - block.off);
            insns += block.insns.len();
            queue.extend(block.successors());
            plan.blocks.push(block);
        }
        (!plan.blocks.is_empty()).then_some(plan)
    }
}

fn region_block(block: &Block) -> RegionBlock {
    let start = block.gpa & PAGE_MASK;
    let insns: Vec<Insn> = block.insns.iter().map(|i| Insn { off: i.off + start as u16, ..*i }).collect();
    let mut usage = Usage::default();
    for i in &insns {
        use_of(i, &mut usage);
    }
    let end = insns.last().map_or(End::Exit, |last| end_of(last, block.mode));
    RegionBlock { off: start, insns, end, usage }
}

/// Adds what one instruction does; one that only helpers can evaluate reads and writes everything.
pub fn use_of(i: &Insn, usage: &mut Usage) {
    let before = *usage;
    if i.sem.usage.is_some_and(|f| f(usage, i).is_ok()) {
        return;
    }
    *usage = before;
    usage.flush();
    usage.gpr_read = u16::MAX;
    usage.flags_killed = true;
}

fn end_of(last: &Insn, mode: Mode) -> End {
    use iced_x86::FlowControl;
    let code = last.iced_code();
    let next = last.next_off();
    let near = is_near(code.op_code().op0_kind());
    let target = next as i64 + last.imm as i64;
    // A 16-bit target wraps at 64 KiB, which an offset from the page cannot say.
    let direct = near && last.osize as u32 * 8 >= mode.bits().min(32) && last.sem.jit.is_some();
    match code.flow_control() {
        FlowControl::UnconditionalBranch | FlowControl::Call if direct => End::Jump(target),
        FlowControl::ConditionalBranch if direct => End::Branch(target, next),
        FlowControl::Next if !last.sem.ends => End::Fall(next),
        _ => End::Exit,
    }
}

fn is_near(k: iced_x86::OpCodeOperandKind) -> bool {
    use iced_x86::OpCodeOperandKind::*;
    matches!(k, br16_1 | br32_1 | br64_1 | br16_2 | br32_4 | br64_4)
}
