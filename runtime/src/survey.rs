//! What engines this host has, without a machine to run on them.

use std::path::PathBuf;

use diglot_kvm_backend::{KvmError, LEAST_MIPS, Offer};

use crate::engine;

/// What there is.
pub struct Survey {
    /// Where KVM was looked for.
    pub device: PathBuf,
    /// What KVM offers, if it runs guests.
    pub offer: Option<Offer>,
    /// Whether it runs them slower than is worth it.
    pub emulated: bool,
    /// Why KVM is not to be used, with what to do about it.
    pub problem: Option<String>,
    /// Instruction classes that the most capable CPU model has under the translator and not on KVM.
    pub lacks: Vec<String>,
    /// The engine that runs a guest that asks for none, by the name that `--backend` has for it.
    pub auto: &'static str,
    /// Why it.
    pub why: String,
}

/// Looks, and runs a guest of a few instructions where there is KVM.
pub fn survey() -> Survey {
    let (offer, lacks, problem) = match engine::look_at_kvm() {
        Ok((offer, lacks)) => {
            let slow = (offer.mips < LEAST_MIPS).then_some(KvmError::Slow { mips: offer.mips });
            (Some(offer), lacks, slow)
        }
        Err(error) => (None, Vec::new(), Some(error)),
    };
    let (auto, why) = match &problem {
        Some(error) => engine::chosen_instead(error),
        None => engine::chosen_kvm(offer.as_ref().map_or(0.0, |o| o.mips)),
    };
    Survey {
        device: diglot_kvm_backend::device(),
        emulated: offer.is_some() && problem.is_some(),
        offer,
        problem: problem.map(|e| e.to_string()),
        lacks,
        auto: auto.option(),
        why,
    }
}
