//! KVM as an engine: guest code runs on the host's own CPU.
//!
//! It is not built yet, and nothing pretends otherwise: [`open`] says so. What it will implement is the trait of
//! [`diglot_translator::engine`], the only thing that this crate sees of another.

use std::sync::Arc;

use diglot_translator::engine::Vm;
use vm_memory::GuestMemoryMmap;

/// Why KVM cannot run a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KvmError {
    /// This version has no KVM engine.
    #[error("the KVM engine is not built yet; use --backend jit or --backend interp")]
    NotBuilt,
}

/// Gives a guest's memory to KVM.
pub fn open(_ram: Arc<GuestMemoryMmap>) -> Result<Box<dyn Vm>, KvmError> {
    probe()?;
    Err(KvmError::NotBuilt)
}

/// Whether KVM can run guests here.
pub fn probe() -> Result<(), KvmError> {
    Err(KvmError::NotBuilt)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_that_it_is_not_built() {
        let ram = Arc::new(GuestMemoryMmap::from_ranges(&[]).unwrap_or_default());
        for refusal in [probe().err(), open(ram).err()] {
            assert!(refusal.is_some_and(|e| e.to_string().contains("--backend jit")));
        }
    }
}
