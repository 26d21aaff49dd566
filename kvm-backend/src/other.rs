//! A host whose KVM cannot run x86-64 code.

use diglot_translator::engine::{CpuidEntry, Vm};

use crate::{KvmError, Offer, VmOptions};

/// KVM on this host; there is none for x86-64 guests.
pub enum Kvm {}

impl Kvm {
    /// Says that there is none.
    pub fn open() -> Result<Kvm, KvmError> {
        Err(KvmError::Architecture(std::env::consts::ARCH))
    }

    /// What it offers.
    pub fn offer(&self) -> &Offer {
        match *self {}
    }

    /// What CPUID reports on the host's processor, as far as KVM lets guests use it.
    pub fn cpuid(&self) -> &[CpuidEntry] {
        match *self {}
    }

    /// The frequency that a guest's time-stamp counter has if `wanted` is asked for.
    pub fn tsc_hz(&self, _wanted: u64) -> u64 {
        match *self {}
    }

    /// Gives a machine's memory to KVM.
    pub fn create_vm(&self, _options: VmOptions) -> Result<Box<dyn Vm>, KvmError> {
        match *self {}
    }
}
