//! A port by which a guest ends the run with a code, QEMU's `isa-debug-exit`.
//!
//! It has no state: where it is, is the machine's configuration.

/// The device, at the port it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DebugExit {
    port: u16,
}

impl DebugExit {
    /// The device at `port`. It hides any other device that answers there.
    pub fn new(port: u16) -> DebugExit {
        DebugExit { port }
    }

    /// Whether an access that begins at `port` is the device's.
    pub fn claims(self, port: u16) -> bool {
        self.port == port
    }

    /// The exit code that a write asks for: the value doubled plus 1, of which the low 8 bits reach the host. It is never
    /// 0, and the same for every size of access, as only the value's low 7 bits count.
    pub fn exit_code(value: u32) -> u8 {
        (value << 1 | 1) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_odd_and_of_8_bits() {
        for (value, code) in [(0, 1), (1, 3), (0x10, 33), (0x80, 1), (0x7f, 255), (u32::MAX, 255), (0xff01, 3)] {
            assert_eq!(DebugExit::exit_code(value), code, "{value:#x}");
        }
    }
}
