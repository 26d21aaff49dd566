//! Regions: the control-flow graph of hot blocks in one page that is compiled as a unit.

use crate::addr::PAGE_MASK;
use crate::block::{Block, BlockCache};
use crate::code::HostIsa;
use crate::cpu::Cpu;
use crate::insn::{Insn, Mode};
use crate::jit::usage::Usage;
use crate::mem::granule_mask;

/// The most blocks in a region: compile time per block grows beyond this.
pub const MAX_BLOCKS: usize = 40;
const _: () = assert!(MAX_BLOCKS <= u64::BITS as usize, "sets of blocks are words");
/// Instructions in a region after which no block is added.
pub const MAX_INSNS: usize = 400;

/// The most places that a return is compared with before it takes the jump cache.
const MAX_GUARDS: usize = 3;

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
    /// Page offset that a call at the end returns to.
    pub returns_to: Option<u64>,
    /// Page offsets that an indirect branch at the end is expected to lead to: what was seen while the block was
    /// interpreted, and of a return the calls in the region.
    pub guards: Vec<u64>,
    /// Whether the region may be entered here.
    pub entry: bool,
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
        a.into_iter().chain(b).chain(self.guards.iter().map(|&off| off as i64))
    }
}

/// A region ready to be compiled: everything the compiler needs, copied out of the vCPU's caches.
pub struct Plan {
    /// Guest physical address of the entry.
    pub gpa: u64,
    /// RIP at the entry when the region was planned, for its name; other address spaces may map it elsewhere.
    pub rip: u64,
    /// Decode mode.
    pub mode: Mode,
    /// Blocks; the first is the entry.
    pub blocks: Vec<RegionBlock>,
    /// The pages that the region's bytes lie in, and which granules of each. There is a second one only for the region
    /// of a single instruction that crosses into it.
    pub extents: Vec<(u64, u64)>,
    /// What its code shall do besides.
    pub options: Options,
    /// Page offsets of instructions that have been found to stray, and how often ([`super::strays`]).
    pub strays: Vec<(u16, u8)>,
}

/// What code does besides what the guest's does.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Count the guest instructions that it completes, for statistics and lock-step; it costs a few percent.
    pub counted: bool,
    /// Be right beside other vCPUs, that have the same memory: locked instructions are atomic, and fences are some.
    pub shared: bool,
    /// Take every access to have strayed so often: for tests.
    pub strayed: u8,
}

impl Options {
    /// Whether the order of accesses takes fences ([`super::ordering`]).
    pub fn fenced(self) -> bool {
        self.shared && HostIsa::native().is_none_or(HostIsa::reorders)
    }
}

impl Plan {
    /// Index of the block at a page offset.
    pub fn find(&self, off: i64) -> Option<usize> {
        self.blocks.iter().position(|b| b.off as i64 == off)
    }

    /// What profilers call it: the guest's address, and where that was in guest memory.
    pub fn name(&self) -> String {
        format!("guest {:#x} (physical {:#x}, {} bit)", self.rip, self.gpa, self.mode.bits())
    }

    /// Bytes of guest code.
    pub fn guest_bytes(&self) -> u64 {
        self.blocks.iter().map(|b| b.end_off() - b.off).sum()
    }

    /// How often the instruction at a page offset has strayed.
    pub fn strayed(&self, off: u64) -> u8 {
        let known = self.strays.iter().find(|&&(at, _)| u64::from(at) == off);
        known.map_or(0, |&(_, times)| times).max(self.options.strayed)
    }

    /// Page offsets that calls of functions in the region return to, if the region has them.
    fn expected_returns(&self) -> Vec<u64> {
        let inside = |off: u64| self.find(off as i64).is_some();
        let calls = self.blocks.iter().filter(|b| b.successors().any(|s| self.find(s).is_some()));
        calls.filter_map(|b| b.returns_to).filter(|&off| inside(off)).take(MAX_GUARDS).collect()
    }

    /// The block from which alone, by one edge, control comes to block `k`.
    pub fn only_from(&self, k: usize) -> Option<usize> {
        let target = self.blocks.get(k).filter(|b| !b.entry)?.off as i64;
        let mut from = None;
        for (p, block) in self.blocks.iter().enumerate() {
            for _ in block.successors().filter(|&s| s == target) {
                if from.replace(p).is_some() {
                    return None;
                }
            }
        }
        from
    }

    /// Page offsets of blocks that loops come back to: where code that the region lacks is likely to join it again.
    fn loop_heads(&self) -> Vec<u64> {
        let back = |(k, b): (usize, &RegionBlock)| b.successors().filter_map(move |s| self.find(s)).find(|&s| s <= k);
        self.blocks.iter().enumerate().filter_map(back).map(|k| self.blocks[k].off).collect()
    }

    /// Which blocks control may come back to by the region's own edges.
    pub fn in_loops(&self) -> Vec<bool> {
        let direct = |b: &RegionBlock| b.successors().filter_map(|s| self.find(s)).fold(0u64, |set, k| set | 1 << k);
        let mut reached: Vec<u64> = self.blocks.iter().map(direct).collect();
        // Warshall's closure.
        for via in 0..reached.len() {
            for from in 0..reached.len() {
                if reached[from] >> via & 1 != 0 {
                    reached[from] |= reached[via];
                }
            }
        }
        reached.iter().enumerate().map(|(k, set)| set >> k & 1 != 0).collect()
    }

    /// The page into which its one instruction crosses.
    pub fn second_page(&self) -> Option<u64> {
        self.extents.get(1).map(|e| e.0)
    }

    /// Where its blocks are.
    pub fn keys(&self) -> impl Iterator<Item = (u64, u8)> {
        self.blocks.iter().map(|b| (self.gpa & !PAGE_MASK | b.off, self.mode.0))
    }

    /// Page offsets of the blocks that the region may be entered at.
    pub fn entries(&self) -> impl Iterator<Item = u64> {
        self.blocks.iter().filter(|b| b.entry).map(|b| b.off)
    }

    /// Grows a region from the block at `gpa` along direct edges to blocks of the same page that have run too, up to
    /// where other regions begin; `heat` says how often blocks have run, `cpu` has their bytes. Behind a call the region
    /// goes on, with an entry for the return.
    pub fn grow(
        cache: &BlockCache,
        cpu: &Cpu,
        gpa: u64,
        mode: Mode,
        heat: impl Fn(&Block) -> u32,
        options: Options,
    ) -> Option<Plan> {
        let page = gpa & !PAGE_MASK;
        let seed = cache.get(cache.find(gpa, mode)?);
        let warm = heat(seed) / 16;
        let mut plan = Plan { gpa, rip: 0, mode, blocks: Vec::new(), extents: Vec::new(), options, strays: Vec::new() };
        if seed.next_page.is_some() {
            plan.extents = seed.extent().collect();
            plan.blocks.push(RegionBlock { entry: true, ..region_block(seed, cpu) });
            return Some(plan);
        }
        let mut granules = 0;
        let mut insns = 0;
        let mut returns = Vec::new();
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
            let first = plan.blocks.is_empty();
            if block.next_page.is_some() || (!first && (heat(block) < warm || block.runs.in_region())) {
                continue;
            }
            let (len, block) = (block.len, region_block(block, cpu));
            // Other bytes than were decoded: another vCPU is about to say that it has overwritten them.
            if block.end_off() - block.off != u64::from(len) {
                continue;
            }
            granules |= granule_mask(block.off, block.end_off() - block.off);
            insns += block.insns.len();
            queue.extend(block.successors());
            if let Some(next) = block.returns_to {
                queue.push_back(next as i64);
                returns.push(next);
            }
            plan.blocks.push(block);
        }
        plan.extents.push((page, granules));
        let guards = plan.expected_returns();
        let loops = plan.loop_heads();
        for (k, block) in plan.blocks.iter_mut().enumerate() {
            block.entry = k == 0 || returns.contains(&block.off) || loops.contains(&block.off);
            if block.insns.last().is_some_and(is_return) {
                block.guards.extend(&guards);
                block.guards.sort_unstable();
                block.guards.dedup();
            }
        }
        (!plan.blocks.is_empty()).then_some(plan)
    }
}

fn region_block(block: &Block, cpu: &Cpu) -> RegionBlock {
    let start = block.gpa & PAGE_MASK;
    let insns: Vec<Insn> = block.insns(cpu).iter().map(|i| Insn { off: i.off + start as u16, ..*i }).collect();
    let mut usage = Usage::default();
    for i in &insns {
        use_of(i, &mut usage);
    }
    let end = insns.last().map_or(End::Exit, |last| end_of(last, block.mode));
    // Far branches, which have no compiled form, are none that the region can follow.
    let follows = block.indirect && insns.last().is_some_and(|i| i.sem.jit.is_some());
    let mut guards: Vec<u64> = block.targets().filter(|_| follows).collect();
    if insns.last().is_some_and(is_return) && guards.len() > MAX_GUARDS {
        // A function that many call; the region of each caller is another.
        guards.clear();
    }
    let returns_to = insns.last().filter(|last| is_call(last)).map(Insn::next_off);
    RegionBlock { off: start, insns, end, usage, returns_to, guards, entry: false }
}

/// Adds what one instruction does; one that only helpers can evaluate reads and writes everything.
pub fn use_of(i: &Insn, usage: &mut Usage) {
    let before = *usage;
    if i.sem.usage.is_some_and(|f| f(usage, i).is_ok()) {
        return;
    }
    *usage = before;
    usage.by_helper();
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

fn is_call(i: &Insn) -> bool {
    use iced_x86::FlowControl;
    matches!(i.iced_code().flow_control(), FlowControl::Call | FlowControl::IndirectCall)
}

fn is_return(i: &Insn) -> bool {
    i.iced_code().mnemonic() == iced_x86::Mnemonic::Ret && i.sem.jit.is_some()
}

fn is_near(k: iced_x86::OpCodeOperandKind) -> bool {
    use iced_x86::OpCodeOperandKind::*;
    matches!(k, br16_1 | br32_1 | br64_1 | br16_2 | br32_4 | br64_4)
}
