//! What a machine needs of whatever runs its guest code: the only door from `runtime` to an engine, and all that
//! engines share. The other door, from an engine to the machine, is [`crate::platform::Platform`].
//!
//! A vCPU's state crosses it as [`CpuState`], whatever the engine keeps it in: a state taken from one engine starts
//! another, on any host.

pub use crate::cpu::Kick;
pub use crate::platform::Platform;
pub use crate::state::{CpuState, Due, DueKind, Msrs, Segment, Table, cr, flag, gpr, seg};
pub use crate::xsave_area;

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

/// What CPUID reports for one leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidEntry {
    /// EAX on the way in.
    pub leaf: u32,
    /// ECX on the way in.
    pub subleaf: u32,
    /// Whether ECX matters.
    pub indexed: bool,
    /// EAX, EBX, ECX and EDX on the way out.
    pub registers: [u32; 4],
}

/// The state of a local APIC (SDM vol. 3 chapter 11), host-independent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LapicState {
    /// IA32_APIC_BASE.
    pub base: u64,
    /// The register page: register n is at offset 16 n. The current count is as of now.
    pub registers: [u32; 64],
    /// IA32_TSC_DEADLINE.
    pub tsc_deadline: u64,
    /// Whether a non-maskable interrupt waits.
    pub nmi: bool,
    /// What its CPU does.
    pub startup: Startup,
}

/// What a CPU does, as far as INIT and start-up IPIs say (SDM vol. 3 §9.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Startup {
    /// It runs.
    Runs,
    /// It has been reset by INIT, and waits.
    Waits,
    /// It is to begin at this page in real mode: address 1000h times as much.
    Begins(u8),
}

/// A message-signalled interrupt (SDM vol. 3 §11.11).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msi {
    /// Message address, which has the destination.
    pub address: u32,
    /// Message data, which has the vector.
    pub data: u32,
}

/// Local APICs that are the engine's own.
pub trait LocalApics: Send {
    /// Hands them a message.
    fn signal(&mut self, message: Msi);
    /// Which messages are level-triggered: of these the engine reports the end of interrupt, by
    /// [`Platform::end_of_interrupt`]. Each is with the number of the I/O APIC's input.
    fn watch_levels(&mut self, messages: &[(u32, Msi)]);
}

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
    /// The way to its local APICs, if those are its own. Else they are the machine's, and `None`.
    fn local_apics(&self) -> Option<Box<dyn LocalApics>> {
        None
    }
}

/// One virtual CPU, which one thread at a time runs.
pub trait Vcpu: Send {
    /// Runs guest code until something needs the machine's attention.
    fn run(&mut self) -> Exit;
    /// Its state between two instructions. Equal states are equal values: nothing of the engine's own representation is
    /// left in it.
    fn state(&mut self) -> Result<CpuState, EngineError>;
    /// Replaces its state.
    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError>;
    /// Its local APIC, if the engine has those; what else the machine has.
    fn lapic(&mut self) -> Result<Option<LapicState>, EngineError> {
        Ok(None)
    }
    /// Replaces its local APIC, where [`Self::lapic`] gives one.
    fn set_lapic(&mut self, _state: &LapicState) -> Result<(), EngineError> {
        Ok(())
    }
    /// What it has counted, by names that the engine chooses and documents.
    fn counters(&self) -> Vec<(&'static str, u64)>;
}
