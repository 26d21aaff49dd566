//! The part of the compiler that several threads share.

#[path = "../../translator/src/jit/bridge.rs"]
pub mod bridge;
#[path = "../../translator/src/jit/cache.rs"]
pub mod cache;
#[path = "../../translator/src/jit/handover.rs"]
pub mod handover;
