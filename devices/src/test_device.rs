//! What hypervisor tests drive besides the machine's devices, QEMU's `pc-testdev`: interrupt lines, a port and a piece
//! of memory whose every access leaves guest code.

use serde::{Deserialize, Serialize};

use crate::bus::StateError;

/// A doubleword that keeps what is written to it.
const LATCH: u16 = 0xe0;
/// Interrupt line n is at this port plus n: any value but 0 asserts it.
const LINES: u16 = 0x2000;
const LINE_COUNT: u16 = 24;
/// Where the memory answers.
const MEMORY: u64 = 0xff00_0000;
const MEMORY_SIZE: usize = 0x1_0000;

/// The device's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TestDevice {
    latch: [u8; 4],
    memory: Vec<u8>,
}

impl Default for TestDevice {
    fn default() -> TestDevice {
        TestDevice { latch: [0; 4], memory: vec![0; MEMORY_SIZE] }
    }
}

impl TestDevice {
    /// The interrupt line that a write to `port` drives.
    pub fn line(port: u16) -> Option<u8> {
        Some(port.wrapping_sub(LINES)).filter(|&n| n < LINE_COUNT).map(|n| n as u8)
    }

    /// The byte behind a port of the latch.
    pub fn port(&mut self, port: u16) -> Option<&mut u8> {
        self.latch.get_mut(usize::from(port.wrapping_sub(LATCH)))
    }

    /// The memory from a guest physical address on, as far as the device has it.
    pub fn memory(&mut self, gpa: u64) -> Option<&mut [u8]> {
        let offset = usize::try_from(gpa.wrapping_sub(MEMORY)).ok()?;
        self.memory.get_mut(offset..).filter(|rest| !rest.is_empty())
    }

    /// Whether a saved state is one.
    pub fn validate(&self) -> Result<(), StateError> {
        if self.memory.len() == MEMORY_SIZE { Ok(()) } else { Err(StateError::Invalid("test device memory")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        let mut d = TestDevice::default();
        assert_eq!([0x1fff, 0x2000, 0x2017, 0x2018].map(TestDevice::line), [None, Some(0), Some(23), None]);
        assert_eq!([0xdf, 0xe0, 0xe3, 0xe4].map(|p| d.port(p).is_some()), [false, true, true, false]);
        let rest = [MEMORY - 1, MEMORY, MEMORY + 0xffff, MEMORY + 0x1_0000].map(|a| d.memory(a).map(|m| m.len()));
        assert_eq!(rest, [None, Some(0x1_0000), Some(1), None]);
    }
}
