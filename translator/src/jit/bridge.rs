//! Bridges: where a direct branch into another page led last, beside the branch's own code.
//!
//! A direct branch inside a page is linked for good, as both ends move together. Into another page the mapping has a
//! say, so the branch asks each time whether it is still the one for which its bridge knows the way, by the key that
//! the jump cache has for RIP ([`Cpu::code_key`](crate::cpu::Cpu::code_key)): the address space, the mode and the
//! generation are in it. The jump that it serves is one branch's own, which processors predict.
//!
//! On x86-64 hosts key and way are in the code ([`crate::quick::cross`]), and the bridge has the branch's name and counts
//! what went another way. Elsewhere it is all data, so that leading it elsewhere changes no code.

use crate::sync::{AtomicU64, Ordering};

/// A key that no address has.
pub const NO_KEY: u64 = u64::MAX;
/// Of so many branches that a bridge does not serve one asks the dispatch loop for the way, a power of two: a branch
/// whose target keeps changing, as where two address spaces take turns, shall not go through it every time.
pub const PATIENCE: u64 = 16;
/// Bits of a bridge's name that say which of its region's bridges it is.
const INDEX_BITS: u32 = 16;

/// What a direct branch into another page knows of where it leads.
#[repr(C)]
pub struct Bridge {
    /// The key of RIP for which it leads to `code`.
    pub(crate) key: AtomicU64,
    /// Code of the region there.
    pub(crate) code: AtomicU64,
    /// How often the branch had another key.
    pub(super) misses: AtomicU64,
    /// What the dispatch loop knows it by, never 0.
    pub(super) name: u64,
}

impl Bridge {
    /// The bridges of a region, which lead nowhere yet. Regions are numbered from 1.
    pub fn row(region: u64, count: usize) -> Box<[Bridge]> {
        let bridge = |index| Bridge {
            key: AtomicU64::new(NO_KEY),
            code: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            name: region << INDEX_BITS | index,
        };
        (0..count as u64).map(bridge).collect()
    }

    /// The region and the index of the bridge with a name.
    pub fn place(name: u64) -> (u64, usize) {
        (name >> INDEX_BITS, (name & ((1 << INDEX_BITS) - 1)) as usize)
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

    /// Has the next branch ask as this one did.
    pub fn ask_again(&self) {
        self.misses.fetch_sub(1, Ordering::Relaxed);
    }

    /// Where it leads, and for which key.
    pub fn leads(&self) -> Option<(u64, u64)> {
        let key = self.key.load(Ordering::Relaxed);
        (key != NO_KEY).then(|| (key, self.code.load(Ordering::Relaxed)))
    }
}
