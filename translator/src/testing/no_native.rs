//! Hosts whose processor runs other code than the guest's: none of them is a judge.

use iced_x86::CpuidFeature;

use super::Machine;

/// Of no value.
pub(crate) enum Native {}

impl Native {
    /// There is none.
    pub(crate) fn take() -> Option<Native> {
        eprintln!("skipped: this host is no x86-64 processor to compare with");
        None
    }

    pub(crate) fn load(&mut self, _bits: u32, _code: &[u8]) {
        match *self {}
    }

    pub(crate) fn run(&mut self, _before: &Machine) -> Machine {
        match *self {}
    }
}

/// Nothing is in the way of the engines.
pub(crate) fn host_has(_: CpuidFeature) -> bool {
    true
}
