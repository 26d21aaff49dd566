//! What a region's blocks need of registers and flags: dataflow over the usage of their instructions.

use crate::jit::groups::Group;
use crate::jit::region::{End, Plan, RegionBlock};
use crate::jit::usage::{Regs, flag_part};

/// The registers that may be dirty on entry to each block: written on some path since the last write-through. In loops
/// accesses write nothing through.
pub(super) fn dirty_on_entry(plan: &Plan, in_loops: &[bool]) -> Vec<Regs> {
    let mut entry = vec![Regs::default(); plan.blocks.len()];
    loop {
        let mut changed = false;
        for (k, block) in plan.blocks.iter().enumerate() {
            let u = &block.usage;
            let (flushes, dirty) = if in_loops[k] { (u.has_helper, u.dirty_in_loop) } else { (u.flushes, u.dirty) };
            let out = if flushes { dirty } else { dirty.or(entry[k]) };
            for s in block.successors().filter_map(|s| plan.find(s)) {
                let new = entry[s].or(out);
                changed |= new != entry[s];
                entry[s] = new;
            }
        }
        if !changed {
            return entry;
        }
    }
}

/// The registers whose values are needed on entry to each block. What may be dirty is stored somewhere behind, so it
/// is needed too, on paths that did not write it as well.
pub(super) fn live_on_entry(plan: &Plan, dirty: &[Regs]) -> Vec<Regs> {
    let mut live = dirty.to_vec();
    loop {
        let mut changed = false;
        for (k, block) in plan.blocks.iter().enumerate().rev() {
            let behind = block.successors().filter_map(|s| plan.find(s)).fold(Regs::default(), |l, s| l.or(live[s]));
            let new = live[k].or(block.usage.read).or(behind.without(block.usage.written));
            changed |= new != live[k];
            live[k] = new;
        }
        if !changed {
            return live;
        }
    }
}

/// The flags that matter behind block `k`, given which do on entry. A back edge polls for interrupts, which push the
/// flags; an indirect branch may lead anywhere, and so does what is behind the slow version of a block.
fn flags_live_behind(plan: &Plan, live: &[u8], k: usize, block: &RegionBlock, has_slow: bool) -> u8 {
    if block.end == End::Exit || has_slow {
        return flag_part::ALL;
    }
    let behind = |s| plan.find(s).filter(|&s| s > k).map_or(flag_part::ALL, |s| live[s]);
    block.successors().map(behind).fold(0, |all, parts| all | parts)
}

/// The flags whose value on entry to each block matters ([`flag_part`]).
pub(super) fn flags_live_on_entry(plan: &Plan, groups: &[Vec<Group>]) -> Vec<u8> {
    let mut live = vec![0; plan.blocks.len()];
    loop {
        let mut changed = false;
        for (k, block) in plan.blocks.iter().enumerate().rev() {
            let out = flags_live_behind(plan, &live, k, block, !groups[k].is_empty());
            let now = block.usage.flags_needed | out & !block.usage.flags_killed;
            changed |= now != live[k];
            live[k] = now;
        }
        if !changed {
            return live;
        }
    }
}

/// The flags of those that some instruction of the region may read.
pub(super) fn flags_read_on_entry(plan: &Plan) -> Vec<u8> {
    let mut read: Vec<u8> = plan.blocks.iter().map(|b| b.usage.flags_read).collect();
    loop {
        let mut changed = false;
        for (k, block) in plan.blocks.iter().enumerate().rev() {
            let behind = block.successors().filter_map(|s| plan.find(s)).fold(0, |all, s| all | read[s]);
            let now = read[k] | behind & !block.usage.flags_killed;
            changed |= now != read[k];
            read[k] = now;
        }
        if !changed {
            return read;
        }
    }
}
