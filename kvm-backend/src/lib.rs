//! The engine interface, and KVM behind it.
//!
//! KVM is not built yet: [`probe`] says so, and nothing pretends otherwise. The interface is what the machine needs of
//! whatever runs guest code, so that an engine can be added without the machine knowing more than this.

pub mod engine;

/// Why KVM cannot run a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KvmError {
    /// This version has no KVM engine.
    #[error("the KVM engine is not built yet; use --backend jit or --backend interp")]
    NotBuilt,
}

/// Whether KVM can run guests here.
pub fn probe() -> Result<(), KvmError> {
    Err(KvmError::NotBuilt)
}

#[cfg(test)]
mod tests {
    #[test]
    fn says_that_it_is_not_built() {
        assert!(super::probe().is_err_and(|e| e.to_string().contains("--backend jit")));
    }
}
