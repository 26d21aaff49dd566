//! What every device has in common: virtual time, and why a saved state may be refused.

/// Nanoseconds of virtual machine time since power-on.
pub type Nanos = u64;

/// A saved state that cannot be restored.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StateError {
    /// The state was written by another version of the format.
    #[error("Saved chipset state has version {found}, this Diglot reads version {expected}; save it again")]
    Version {
        /// Version in the state.
        found: u32,
        /// Version that can be read.
        expected: u32,
    },
    /// A device's part of the state is not one that the device can be in.
    #[error("Saved state of the {0} is damaged; save the machine again")]
    Invalid(&'static str),
}

/// `value` scaled by `numerator / denominator` without overflow.
#[inline]
pub fn scale(value: u64, numerator: u64, denominator: u64) -> u64 {
    // The same without a division of 128 bits, where that does: guests read the clock with each system call.
    let by = denominator.max(1);
    if numerator == by {
        return value;
    }
    if let (Some(whole), Some(rest)) = ((value / by).checked_mul(numerator), (value % by).checked_mul(numerator)) {
        return whole.saturating_add(rest / by);
    }
    (u128::from(value) * u128::from(numerator) / u128::from(by)).min(u128::from(u64::MAX)) as u64
}

/// As [`scale`], rounded up.
pub(crate) fn scale_up(value: u64, numerator: u64, denominator: u64) -> u64 {
    (u128::from(value) * u128::from(numerator)).div_ceil(u128::from(denominator.max(1))).min(u128::from(u64::MAX))
        as u64
}
