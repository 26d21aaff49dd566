//! What [`crate::alarm`] synchronises with, apart so that the model checker can give it other primitives.

pub use std::sync::atomic::{AtomicU64, Ordering};

pub use parking_lot::{Condvar, Mutex};
