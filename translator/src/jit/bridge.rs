//! Bridges: where a direct branch into another page led last, beside the branch's own code.
//!
//! A direct branch inside a page is linked for good, as both ends move together. Into another page the mapping has a
//! say, so the branch asks each time whether it is still the one for which its bridge knows the way, by the key that
//! the jump cache has for RIP ([`Cpu::code_key`](crate::cpu::Cpu::code_key)): the address space, the mode and the
//! generation are in it. The jump that it serves is one branch's own, which processors predict.
//!
//! On x86-64 hosts key, way and name are in the code ([`crate::quick::cross`]), and there is no [`Bridge`]. Elsewhere it is
//! all data, so that leading it elsewhere changes no code.

use crate::sync::{AtomicU64, Ordering};

/// A key that no address has.
pub const NO_KEY: u64 = u64::MAX;
/// Of so many branches that no bridge serves one asks the dispatch loop for the way: a branch whose target keeps
/// changing, as where two address spaces take turns, shall not go through it every time.
pub const PATIENCE: u32 = 4;
/// Bits of a bridge's name that say which of its region's bridges it is.
const INDEX_BITS: u32 = 16;

/// What a direct branch into another page knows of where it leads.
#[repr(C)]
pub struct Bridge {
    /// The key of RIP for which it leads to `code`.
    pub(crate) key: AtomicU64,
    /// Code of the region there.
    pub(crate) code: AtomicU64,
    /// What the dispatch loop knows it by, never 0.
    pub(super) name: u64,
}

impl Bridge {
    /// The bridges of a region, which lead nowhere yet. Regions are numbered from 1.
    pub fn row(region: u64, count: usize) -> Box<[Bridge]> {
        let bridge =
            |index| Bridge { key: AtomicU64::new(NO_KEY), code: AtomicU64::new(0), name: Bridge::name(region, index) };
        (0..count).map(bridge).collect()
    }

    /// The name of a region's bridge.
    pub fn name(region: u64, index: usize) -> u64 {
        region << INDEX_BITS | index as u64
    }

    /// The region and the index of the bridge with a name.
    pub fn place(name: u64) -> (u64, u32) {
        (name >> INDEX_BITS, (name & ((1 << INDEX_BITS) - 1)) as u32)
    }

    /// Leads branches whose RIP has `key` to `code`.
    pub fn lead(&self, key: u64, code: u64) {
        self.key.store(key, Ordering::Relaxed);
        self.code.store(code, Ordering::Relaxed);
    }

    /// Leads nowhere any more.
    pub fn part(&self) {
        self.lead(NO_KEY, 0);
    }

    /// Where it leads, and for which key.
    pub fn leads(&self) -> Option<(u64, u64)> {
        let key = self.key.load(Ordering::Relaxed);
        (key != NO_KEY).then(|| (key, self.code.load(Ordering::Relaxed)))
    }
}
