//! ACPI fixed hardware (ACPI 6.5 §4.8): PM1a event and control blocks, PM timer, GPE0. Always in ACPI mode.

use serde::{Deserialize, Serialize};

use crate::bus::{Nanos, scale};

/// PM1a event block: status and enable, 2 bytes each.
pub const PM1A_EVENT: u16 = 0x600;
/// PM1a control register, 2 bytes.
pub const PM1A_CONTROL: u16 = 0x604;
/// PM timer, 4 bytes.
pub const PM_TIMER: u16 = 0x608;
/// GPE0 block: 2 bytes of status, 2 of enable.
pub const GPE0: u16 = 0x620;
/// The interrupt of all of these, level-triggered.
pub const SCI: u8 = 9;
/// The SLP_TYP value of S5, in bits 10–12 of the PM1a control register.
pub const SLEEP_TYPE_S5: u8 = 5;
/// PM timer frequency.
pub const PM_TIMER_HZ: u64 = 3_579_545;

const SCI_EN: u16 = 1;
/// Of the PM1a control register: goes to sleep in the state that SLP_TYP names.
pub const SLP_EN: u16 = 1 << 13;

/// The register blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcpiPm {
    enable: u16,
    control: u16,
    gpe_enable: u16,
    power_off: bool,
}

impl AcpiPm {
    /// Whether this device claims a port.
    pub fn claims(port: u16) -> bool {
        (PM1A_EVENT..PM_TIMER + 4).contains(&port) || (GPE0..GPE0 + 4).contains(&port)
    }

    /// The 32-bit word that holds a port's byte.
    fn word(&self, port: u16, now: Nanos) -> u32 {
        match port & !3 {
            PM1A_EVENT => u32::from(self.enable) << 16,
            PM1A_CONTROL => u32::from(self.control | SCI_EN),
            PM_TIMER => scale(now, PM_TIMER_HZ, 1_000_000_000) as u32,
            _ => u32::from(self.gpe_enable) << 16,
        }
    }

    /// Reads up to 4 bytes that stay inside one doubleword.
    pub fn read(&self, port: u16, now: Nanos) -> u32 {
        self.word(port, now) >> (8 * (port & 3))
    }

    /// Writes one byte.
    pub fn write(&mut self, port: u16, v: u8) {
        let put = |word: &mut u16, high: bool| {
            *word = if high { *word & 0xff | u16::from(v) << 8 } else { *word & 0xff00 | u16::from(v) };
        };
        match port {
            0x602 | 0x603 => put(&mut self.enable, port & 1 != 0),
            0x604 | 0x605 => {
                put(&mut self.control, port & 1 != 0);
                if self.control & SLP_EN != 0 {
                    self.power_off |= self.control >> 10 & 7 == u16::from(SLEEP_TYPE_S5);
                    self.control &= !SLP_EN;
                }
            }
            0x622 | 0x623 => put(&mut self.gpe_enable, port & 1 != 0),
            // Status bits are never set: there are no buttons and no wake events.
            _ => {}
        }
    }

    /// Takes the request to power off.
    pub fn take_power_off(&mut self) -> bool {
        std::mem::take(&mut self.power_off)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleep_enable_powers_off_only_in_s5() {
        let mut p = AcpiPm::default();
        for (v, off) in [(3u16 << 10 | SLP_EN, false), (5 << 10, false), (5 << 10 | SLP_EN, true)] {
            p.write(0x604, v as u8);
            p.write(0x605, (v >> 8) as u8);
            assert_eq!(p.take_power_off(), off, "{v:#x}");
        }
        assert_eq!(p.read(PM1A_CONTROL, 0) & 1, 1);
    }

    #[test]
    fn timer_counts() {
        assert_eq!(AcpiPm::default().read(PM_TIMER, 1_000_000_000), 3_579_545);
    }
}
