//! What the host's CPU has that Cranelift may use.

#[cfg(any(test, feature = "testing"))]
use std::sync::atomic::{AtomicBool, Ordering};

use crate::code::HostIsa;

/// Whether a host's floating-point instructions are the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// They are.
    Exact,
    /// They are where operands and result are zeros or normal numbers, which code around them sees to
    /// ([`super::guard`]).
    Regular,
    /// They are not.
    Other,
}

/// What decides whether floating point compiles to the host's own instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// Its floating-point unit.
    pub unit: Unit,
    /// Whether the host has fused multiply-add; without it Cranelift would call a library.
    pub fma: bool,
}

impl Host {
    /// An x86-64 host that lacks nothing which the compiler has a use for.
    pub const COMPLETE: Host = Host { unit: Unit::Exact, fma: true };

    /// This host.
    pub fn this() -> Host {
        let unit = match HostIsa::native() {
            #[cfg(any(test, feature = "testing"))]
            Some(HostIsa::X86_64) if GUARDED.load(Ordering::Relaxed) => Unit::Regular,
            Some(HostIsa::X86_64) => Unit::Exact,
            Some(HostIsa::Aarch64) => Unit::Regular,
            None => Unit::Other,
        };
        Host { unit, fma: has_fma() }
    }
}

#[cfg(any(test, feature = "testing"))]
static GUARDED: AtomicBool = AtomicBool::new(false);

/// Has this process compile floating point with guards though the host needs none, for these to be tested where the
/// results can be judged.
#[cfg(any(test, feature = "testing"))]
pub fn force_guards() {
    GUARDED.store(true, Ordering::Relaxed);
}

impl Default for Host {
    fn default() -> Host {
        Host::this()
    }
}

/// Cranelift's names of the instruction-set extensions that this host has.
pub fn features() -> Vec<&'static str> {
    let mut found = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! probe {
            ($($name:tt => $flag:literal),* $(,)?) => {
                $(if std::arch::is_x86_feature_detected!($name) {
                    found.push($flag);
                })*
            };
        }
        probe! {
            "sse3" => "has_sse3",
            "ssse3" => "has_ssse3",
            "sse4.1" => "has_sse41",
            "sse4.2" => "has_sse42",
            "popcnt" => "has_popcnt",
            "avx" => "has_avx",
            "avx2" => "has_avx2",
            "fma" => "has_fma",
            "bmi1" => "has_bmi1",
            "bmi2" => "has_bmi2",
            "lzcnt" => "has_lzcnt",
        }
    }
    #[cfg(target_arch = "aarch64")]
    if std::arch::is_aarch64_feature_detected!("lse") {
        found.push("has_lse");
    }
    found
}

fn has_fma() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    return cfg!(target_arch = "aarch64");
}

/// What this host lacks of what every compiled region may use.
pub fn lacks() -> Option<&'static str> {
    #[cfg(target_arch = "x86_64")]
    if !std::arch::is_x86_feature_detected!("sse4.2") {
        return Some("SSE4.2");
    }
    None
}
