//! KVM as an engine: guest code runs on the host's own CPU.
//!
//! [`Kvm::open`] finds out whether KVM is there and good for anything, [`Kvm::create_vm`] gives it a machine's memory.
//! What stands behind is the trait of [`diglot_translator::engine`], the only thing that this crate sees of another.
//!
//! `kick.rs` and `memory.rs` are the same on every host; `x86_64/` is what x86-64 hosts have and others have not. A host
//! of another architecture gets a directory beside it, with the same names in it.

#[cfg(target_arch = "x86_64")]
mod kick;
#[cfg(target_arch = "x86_64")]
mod memory;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(not(target_arch = "x86_64"))]
mod other;

#[cfg(not(target_arch = "x86_64"))]
pub use other::Kvm;
#[cfg(target_arch = "x86_64")]
pub use x86_64::{Kvm, KvmVm};

use std::path::PathBuf;
use std::sync::Arc;

use diglot_translator::engine::{CpuidEntry, EngineError};
use vm_memory::GuestMemoryMmap;

/// The least speed, in millions of instructions a second, at which KVM is what it is for. Hardware runs the loop that is
/// measured at a thousand and more, an emulation at a few.
pub const LEAST_MIPS: f64 = 100.0;

/// The one version of the interface (KVM_GET_API_VERSION).
pub const API_VERSION: i32 = 12;

/// Where KVM is, unless the environment's `DIGLOT_KVM` names another place.
pub fn device() -> PathBuf {
    std::env::var_os("DIGLOT_KVM").map_or_else(|| "/dev/kvm".into(), PathBuf::from)
}

/// Why KVM cannot run a guest: one line, with what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The host's processor is none that can run the guest's code.
    #[error("KVM runs guests of the host's own architecture only, and this host is {0}; use --backend jit")]
    Architecture(&'static str),
    /// There is no such device.
    #[error("{} does not exist: {advice}; or use --backend jit", .device.display())]
    Missing {
        /// The device.
        device: PathBuf,
        /// What to do about it on this host.
        advice: &'static str,
    },
    /// The user may not open it.
    #[error(
        "no permission to open {}: become a member of its group (sudo usermod -aG kvm $USER, then log in again), \
         or use --backend jit",
        .device.display()
    )]
    Permission {
        /// The device.
        device: PathBuf,
    },
    /// It could not be opened.
    #[error("cannot open {}: {why}; use --backend jit", .device.display())]
    Open {
        /// The device.
        device: PathBuf,
        /// The host's own words.
        why: String,
    },
    /// What was opened is not KVM, or not one that we know.
    #[error(
        "{} answers with API version {found} where KVM has {API_VERSION}: it is not KVM; use --backend jit",
        .device.display()
    )]
    Version {
        /// The device.
        device: PathBuf,
        /// What it answered; -1 for nothing.
        found: i32,
    },
    /// The host's KVM is too old or too small.
    #[error("this host's KVM lacks {0}; use a newer kernel (5.16 or later has all), or --backend jit")]
    Capability(String),
    /// It did not run the first guest as it should have.
    #[error("KVM does not run guests here: {0}; use --backend jit")]
    Broken(String),
    /// It runs guests slower than the compiler does.
    #[error(
        "KVM is emulated here: it runs {mips:.1} million guest instructions a second where hardware runs a thousand \
         and more; use --backend jit, or add --slow-kvm to have it all the same"
    )]
    Slow {
        /// What was measured.
        mips: f64,
    },
    /// A call failed.
    #[error("KVM refused to {what}: {why}; {advice}")]
    Call {
        /// What was to be done.
        what: &'static str,
        /// The host's own words.
        why: String,
        /// What to do.
        advice: &'static str,
    },
}

impl KvmError {
    /// What is wrong, without what to do about it.
    pub fn brief(&self) -> String {
        match self {
            KvmError::Architecture(host) => format!("an {host} host's KVM does not run x86_64 guests"),
            KvmError::Missing { device, .. } => format!("{} does not exist", device.display()),
            KvmError::Permission { device } => format!("no permission to open {}", device.display()),
            KvmError::Open { device, why } => format!("cannot open {}: {why}", device.display()),
            KvmError::Version { device, .. } => format!("{} is not KVM", device.display()),
            KvmError::Capability(lacks) => format!("KVM lacks {lacks}"),
            KvmError::Broken(why) => format!("KVM does not run guests here: {why}"),
            KvmError::Slow { mips } => format!("KVM is emulated here, at {mips:.1} million instructions a second"),
            KvmError::Call { what, why, .. } => format!("KVM refused to {what}: {why}"),
        }
    }
}

impl From<KvmError> for EngineError {
    fn from(error: KvmError) -> EngineError {
        EngineError(error.to_string())
    }
}

/// What KVM offers here.
#[derive(Clone, Debug)]
pub struct Offer {
    /// Millions of guest instructions a second, in a loop.
    pub mips: f64,
    /// The host's time-stamp counter in Hz.
    pub tsc_hz: u64,
    /// Whether guests can have one of another frequency.
    pub tsc_scaling: bool,
    /// How many vCPUs are reasonable, by its own account.
    pub vcpus: usize,
}

/// How CPUID is to answer on vCPU number `.0` of `.1`.
pub type CpuidTable = Box<dyn Fn(u32, u32) -> Vec<CpuidEntry>>;

/// What a machine is to be like.
pub struct VmOptions {
    /// Guest memory.
    pub ram: Arc<GuestMemoryMmap>,
    /// CPUID.
    pub cpuid: CpuidTable,
    /// Frequency of the guest's time-stamp counter; one that [`Kvm::tsc_hz`] gave.
    pub tsc_hz: u64,
}
