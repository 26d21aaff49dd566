//! The odd ports of a PC: 61h (speaker, timer gate), 80h (POST code), 92h (fast A20 and reset), CF9h (reset control).

use serde::{Deserialize, Serialize};

use crate::bus::Nanos;

/// The reset control register (ACPI 6.5 §4.8.3.6).
pub const RESET: u16 = 0xcf9;
/// The value that resets the machine when written to [`RESET`].
pub const RESET_VALUE: u8 = 6;

/// The registers behind these ports.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SystemControl {
    /// Bits 3:0 of port 61h: timer 2 gate, speaker, and two parity enables.
    port61: u8,
    /// The last POST code.
    post: u8,
    port92: u8,
    cf9: u8,
    reset: bool,
}

impl SystemControl {
    /// After power-on, with A20 on.
    pub fn new() -> SystemControl {
        SystemControl { port92: 2, ..SystemControl::default() }
    }

    /// Reads one of the ports; `timer2` is the timer's output.
    pub fn read(&self, port: u16, timer2: bool, now: Nanos) -> u8 {
        match port {
            // Bit 4 toggles with each memory refresh, every 15 µs.
            0x61 => self.port61 | u8::from(now / 15_085 & 1 != 0) << 4 | u8::from(timer2) << 5,
            0x80 => self.post,
            0x92 => self.port92,
            _ => self.cf9,
        }
    }

    /// Writes one of the ports.
    pub fn write(&mut self, port: u16, v: u8) {
        match port {
            0x61 => self.port61 = v & 15,
            0x80 => self.post = v,
            0x92 => {
                self.reset |= v & 1 != 0 && self.port92 & 1 == 0;
                self.port92 = v & 3;
            }
            _ => {
                self.reset |= v & 4 != 0 && self.cf9 & 4 == 0;
                self.cf9 = v & 0xe;
            }
        }
    }

    /// The gate of timer 2.
    pub fn gate2(&self) -> bool {
        self.port61 & 1 != 0
    }

    /// The last POST code written.
    pub fn post_code(&self) -> u8 {
        self.post
    }

    /// Takes the request to reset the machine.
    pub fn take_reset(&mut self) -> bool {
        std::mem::take(&mut self.reset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resets() {
        for (port, v, reset) in
            [(0xcf9, 2, false), (0xcf9, 6, true), (0x92, 2, false), (0x92, 3, true), (0x61, 15, false)]
        {
            let mut s = SystemControl::new();
            s.write(port, v);
            assert_eq!(s.take_reset(), reset, "{port:#x} {v}");
        }
    }
}
