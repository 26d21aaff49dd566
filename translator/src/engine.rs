//! What a machine needs of whatever runs its guest code: the only door from `runtime` to an engine, and all that
//! engines share. The other door, from an engine to the machine, is [`crate::platform::Platform`].
//!
//! A vCPU's state crosses it as [`CpuState`], whatever the engine keeps it in: a state taken from one engine starts
//! another, on any host.

pub use crate::cpu::Kick;
pub use crate::platform::Platform;
pub use crate::state::CpuState;

/// Why an engine handed control back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The vCPU is halted and no interrupt waits: run it again after the next event.
    Halt,
    /// A triple fault. Where the guest was, for the user.
    Shutdown(String),
    /// [`Kick::STOP`] was requested.
    Stopped,
    /// The engine found out that it is wrong, and how.
    Failed(String),
}

/// Why an engine cannot run a guest: one line for the user, with what to do instead.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct EngineError(pub String);

/// What a vCPU starts with.
pub struct VcpuSetup {
    /// Its first state.
    pub state: CpuState,
    /// The machine as this vCPU sees it.
    pub platform: Box<dyn Platform>,
    /// How other threads get its attention.
    pub kick: Kick,
    /// Its number, which is its APIC id.
    pub index: u32,
    /// How many there are.
    pub count: u32,
}

/// An engine that has been given a machine's memory.
pub trait Vm {
    /// What it is, for the user.
    fn name(&self) -> &'static str;
    /// Makes a vCPU.
    fn create_vcpu(&mut self, setup: VcpuSetup) -> Result<Box<dyn Vcpu>, EngineError>;
}

/// One virtual CPU.
pub trait Vcpu {
    /// Runs guest code until something needs the machine's attention.
    fn run(&mut self) -> Exit;
    /// Its state. Equal states are equal values: nothing of the engine's own representation is left in it.
    fn state(&self) -> CpuState;
    /// Replaces its state.
    fn set_state(&mut self, state: &CpuState);
    /// What it has counted, by names that the engine chooses and documents.
    fn counters(&self) -> Vec<(&'static str, u64)>;
}
