//! The part of the compiler that several threads share.

#[path = "../../src/jit/cache.rs"]
pub mod cache;
#[path = "../../src/jit/handover.rs"]
pub mod handover;
