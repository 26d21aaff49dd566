//! What the machine needs of an engine.

/// Why an engine handed control back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The vCPU is halted and no interrupt waits.
    Halt,
    /// A triple fault.
    Shutdown,
    /// It was asked to stop.
    Stopped,
}

/// One virtual CPU on some engine.
pub trait Vcpu {
    /// Runs guest code until something needs the machine's attention.
    fn run(&mut self) -> Exit;
}
