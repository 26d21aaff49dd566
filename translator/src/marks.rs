//! What vCPUs know of each other's use of pages of guest RAM, by the pages' numbers.
//!
//! Two things are known of a page for each vCPU: which granules it has translated code of, and whether its soft TLB may let
//! stores take the fast path, which looks at no granules. Only the vCPU itself changes what is known of it, and does so before
//! it looks at what is known of the others: of two that begin at a time, one to have code and one to store fast, one sees the
//! other. What then has to be done the vCPUs ask of each other by [`crate::peers`].

use crate::sync::{AtomicU64, Ordering, fence, zeros};

/// What is known of each page for one vCPU.
pub struct Marks {
    /// One bit per granule that holds translated code, one word per page.
    code: Box<[AtomicU64]>,
    /// One bit per page to which stores may take the fast path.
    fast: Box<[AtomicU64]>,
}

impl Marks {
    /// Nothing is known of so many pages.
    pub fn new(pages: usize) -> Marks {
        Marks { code: zeros(pages), fast: zeros(pages.div_ceil(64)) }
    }

    /// The granules that it has translated.
    pub fn code(&self, page: usize) -> u64 {
        self.code[page].load(Ordering::Acquire)
    }

    /// Adds to them; says whether there were none before.
    pub fn mark_code(&self, page: usize, granules: u64) -> bool {
        let before = self.code[page].fetch_or(granules, Ordering::AcqRel);
        fence(Ordering::SeqCst);
        before == 0
    }

    /// Takes from them.
    pub fn set_code(&self, page: usize, granules: u64) {
        self.code[page].store(granules, Ordering::Release);
    }

    /// Whether its stores may take the fast path.
    pub fn is_fast(&self, page: usize) -> bool {
        self.fast[page / 64].load(Ordering::Acquire) >> (page % 64) & 1 != 0
    }

    /// Its stores take the fast path no more.
    pub fn forbid_fast(&self, page: usize) {
        self.fast[page / 64].fetch_and(!(1 << (page % 64)), Ordering::AcqRel);
    }
}

/// The granules that any vCPU has translated.
#[inline]
pub fn code(all: &[Marks], page: usize) -> u64 {
    all.iter().fold(0, |granules, marks| granules | marks.code(page))
}

/// Has stores of `vcpu` take the fast path from now on, unless the page holds code; says which.
pub fn allow_fast(all: &[Marks], vcpu: usize, page: usize) -> bool {
    let own = &all[vcpu];
    if own.is_fast(page) {
        return code(all, page) == 0;
    }
    own.fast[page / 64].fetch_or(1 << (page % 64), Ordering::AcqRel);
    fence(Ordering::SeqCst);
    let allowed = code(all, page) == 0;
    if !allowed {
        own.forbid_fast(page);
    }
    allowed
}

/// The vCPUs other than `vcpu`, by number.
fn others(all: &[Marks], vcpu: usize) -> impl Iterator<Item = (usize, &Marks)> {
    all.iter().enumerate().filter(move |&(other, _)| other != vcpu)
}

/// Those of them whose stores may take the fast path.
pub fn others_fast(all: &[Marks], vcpu: usize, page: usize) -> impl Iterator<Item = usize> {
    others(all, vcpu).filter(move |(_, marks)| marks.is_fast(page)).map(|(other, _)| other)
}

/// Those of them that have translated any of `granules`, each with which.
pub fn others_with_code(all: &[Marks], vcpu: usize, page: usize, granules: u64) -> impl Iterator<Item = (usize, u64)> {
    others(all, vcpu).map(move |(other, marks)| (other, marks.code(page) & granules)).filter(|&(_, hit)| hit != 0)
}
