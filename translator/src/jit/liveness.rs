//! What a region's blocks need of registers and flags: dataflow over the usage of their instructions.

use crate::jit::region::{End, Plan, RegionBlock};
use crate::jit::usage::Regs;

/// The registers that may be dirty on entry to each block: written on some path since the last write-through.
pub(super) fn dirty_on_entry(plan: &Plan) -> Vec<Regs> {
    let mut entry = vec![Regs::default(); plan.blocks.len()];
    loop {
        let mut changed = false;
        for (k, block) in plan.blocks.iter().enumerate() {
            let u = &block.usage;
            let out = if u.flushes { u.dirty } else { u.dirty.or(entry[k]) };
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

/// Whether flags matter behind block `k`, given where they do on entry. A back edge polls for interrupts, which push
/// the flags; an indirect branch may lead anywhere.
pub(super) fn flags_live_behind(plan: &Plan, live: &[bool], k: usize, block: &RegionBlock) -> bool {
    block.end == End::Exit || block.successors().any(|s| plan.find(s).is_none_or(|s| live[s] || s <= k))
}

/// Whether the flags on entry to each block matter.
pub(super) fn flags_live_on_entry(plan: &Plan) -> Vec<bool> {
    let mut live = vec![false; plan.blocks.len()];
    loop {
        let mut changed = false;
        for (k, block) in plan.blocks.iter().enumerate().rev() {
            let out = flags_live_behind(plan, &live, k, block);
            let now = block.usage.flags_needed || (!block.usage.flags_killed && out);
            changed |= now != live[k];
            live[k] = now;
        }
        if !changed {
            return live;
        }
    }
}

/// Whether some instruction of the region may read the flags that it finds on entry to each block.
pub(super) fn flags_read_on_entry(plan: &Plan) -> Vec<bool> {
    let mut read: Vec<bool> = plan.blocks.iter().map(|b| b.usage.flags_read).collect();
    loop {
        let mut changed = false;
        for (k, block) in plan.blocks.iter().enumerate().rev() {
            let behind = block.successors().filter_map(|s| plan.find(s)).any(|s| read[s]);
            let now = read[k] || (!block.usage.flags_killed && behind);
            changed |= now != read[k];
            read[k] = now;
        }
        if !changed {
            return read;
        }
    }
}
