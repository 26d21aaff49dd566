//! What the concurrent modules ([`crate::code`], [`crate::jit::handover`], [`crate::jit::cache`], [`crate::jit::bridge`]) synchronise with.
//!
//! They take their locks and atomics from here so that the model checker can give them others: the crate
//! `model` is made of the same source files, beside a `sync` whose primitives are loom's and a
//! [`crate::mapping`] whose memory loom watches.

pub use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

pub use parking_lot::{Condvar, Mutex};
