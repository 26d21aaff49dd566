//! CPU models: what CPUID reports and which instructions exist.

use iced_x86::CpuidFeature;

/// A CPU model.
#[derive(Clone, Debug)]
pub struct CpuModel {}

impl CpuModel {
    /// Whether instructions of an iced feature class exist.
    pub fn supports(&self, _feature: CpuidFeature) -> bool {
        true
    }
}
