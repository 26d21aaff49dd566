//! The machine: an engine, guest memory, the chipset and how a guest is booted.

pub mod acpi;
mod alarm;
pub mod boot;
pub mod embedded;
mod engine;
mod footprint;
pub mod machine;
pub mod memory;
mod platform;
pub mod stats;
pub mod survey;
mod sync;

pub use boot::InitrdSource as Initrd;
pub use diglot_translator::trace::{Filter as TraceFilter, Trace};
pub use machine::{
    Backend, Boot, Console, Controller, CpuModel, Machine, MachineConfig, Outcome, RebootPolicy, RuntimeError,
    StopReason,
};
pub use stats::Stats;

/// Whether a run goes on when the thread of this name panics: a region that can't be compiled stays interpreted.
pub fn survives_panics(thread: Option<&str>) -> bool {
    thread == Some(diglot_translator::jit::WORKER)
}
