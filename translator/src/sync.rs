//! What the concurrent modules ([`crate::code`], [`crate::jit::handover`], [`crate::jit::cache`], [`crate::jit::bridge`],
//! [`crate::peers`], [`crate::marks`], [`crate::kick`]) synchronise with.
//!
//! They take their locks and atomics from here so that the model checker can give them others: the crate
//! `model` is made of the same source files, beside a `sync` whose primitives are loom's and a
//! [`crate::mapping`] whose memory loom watches.

pub use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};

pub use parking_lot::{Condvar, Mutex};

/// How often a thread that waits for others only offers the host's processor to them, before it sleeps between.
const PATIENCE: u32 = 100;
/// For how long then.
const NAP: std::time::Duration = std::time::Duration::from_micros(50);

/// So many words of zeros. The host gives memory to what is written first.
pub fn zeros(words: usize) -> Box<[AtomicU64]> {
    // SAFETY: zero is a value of atomic integers.
    unsafe { Box::<[AtomicU64]>::new_zeroed_slice(words).assume_init() }
}

/// Lets other threads go on, for the `turn`th time in a row.
pub fn rest(turn: u32) {
    if turn < PATIENCE { std::thread::yield_now() } else { std::thread::sleep(NAP) }
}
