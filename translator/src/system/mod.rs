//! The privileged half of the CPU: descriptors, events, far transfers, tasks, control registers, MSRs.

pub mod control;
pub mod debug;
pub mod descriptor;
pub mod far;
pub mod fast_call;
pub mod interrupt;
pub mod msr;
pub mod task;
