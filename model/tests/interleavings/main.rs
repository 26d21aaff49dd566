//! Every interleaving of the threads that share code memory, compile jobs, the code cache and the alarm, and of vCPUs.
//!
//! A test fails at the first interleaving in which an assertion does not hold, a plain store is not ordered against
//! another thread's fetch, or all threads wait. Those that expect a panic leave a rule out, and so show that the model
//! sees what the rule is for.

mod alarm;
mod arena;
mod cache;
mod handover;
mod peers;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How many threads there are beside the test's own.
#[derive(Clone, Copy)]
enum Others {
    /// Every interleaving.
    One,
    /// Every interleaving in which threads are interrupted where they could go on at most twice, or
    /// `LOOM_MAX_PREEMPTIONS` times; there are too many others, as there are with one other that does much.
    Two,
}

/// Runs `threads` once for each interleaving, of which there must be `least`, so that a test that no longer does what
/// it says is noticed.
fn explore(name: &str, others: Others, least: usize, threads: impl Fn() + Send + Sync + 'static) {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    let mut model = loom::model::Builder::new();
    model.max_branches = 10_000;
    model.preemption_bound = match others {
        Others::One => None,
        Others::Two => model.preemption_bound.or(Some(2)),
    };
    model.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        threads();
    });
    let count = count.load(Ordering::Relaxed);
    println!("{name}: {count} interleavings");
    assert!(count >= least, "{name}: only {count} interleavings");
}

impl Others {
    fn count(self) -> usize {
        match self {
            Others::One => 1,
            Others::Two => 2,
        }
    }
}
