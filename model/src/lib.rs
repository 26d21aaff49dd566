//! The translator's code cache, what vCPUs ask of each other, and the machine's alarm clock, under a model checker.
//!
//! The modules of this crate are source files of the others; only what they stand on is another. [`sync`] has
//! loom's locks and atomics instead of the system's, so that a test runs once for each interleaving of its threads and
//! each value that a weakly ordered load may give. [`mapping`] has memory that loom watches, where a plain store to
//! what another thread may be executing is an error, and [`processor`] executes the few instructions that the tests
//! write there.
//!
//! A test is a script for the vCPU's thread, against others that are as fast or as slow as can be;
//! `tests/interleavings` has them.

#[path = "../../translator/src/addr.rs"]
pub mod addr;
#[path = "../../translator/src/address_map.rs"]
pub mod address_map;
#[path = "../../runtime/src/alarm.rs"]
pub mod alarm;
#[path = "../../translator/src/code/mod.rs"]
pub mod code;
pub mod jit;
#[path = "../../translator/src/kick.rs"]
pub mod kick;
pub mod mapping;
#[path = "../../translator/src/marks.rs"]
pub mod marks;
#[path = "../../translator/src/peers.rs"]
pub mod peers;
pub mod processor;
pub mod sync;
