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
/// The SLP_TYP values of S3 and S5, in bits 10–12 of the PM1a control register.
pub const SLEEP_TYPE_S3: u8 = 1;
#[allow(missing_docs)]
pub const SLEEP_TYPE_S5: u8 = 5;
/// PM timer frequency.
pub const PM_TIMER_HZ: u64 = 3_579_545;

const SCI_EN: u16 = 1;
/// Of the PM1a control register: goes to sleep in the state that SLP_TYP names.
pub const SLP_EN: u16 = 1 << 13;

/// PM1 status and enable bits (ACPI 6.5 §4.8.3.1): the real-time clock's alarm, and that the machine was woken.
const RTC: u16 = 1 << 10;
const WAK_STS: u16 = 1 << 15;

/// The register blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcpiPm {
    status: u16,
    enable: u16,
    control: u16,
    gpe_enable: u16,
    sleep: Option<Sleep>,
}

/// A sleeping state that the guest asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Sleep {
    /// S3: all but memory and the clock loses power.
    Suspend,
    /// S5: off.
    Off,
}

impl AcpiPm {
    /// Whether this device claims a port.
    pub fn claims(port: u16) -> bool {
        (PM1A_EVENT..PM_TIMER + 4).contains(&port) || (GPE0..GPE0 + 4).contains(&port)
    }

    /// The 32-bit word that holds a port's byte.
    fn word(&self, port: u16, now: Nanos) -> u32 {
        match port & !3 {
            PM1A_EVENT => u32::from(self.enable) << 16 | u32::from(self.status),
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
            // A 1 clears its bit.
            0x600 => self.status &= !u16::from(v),
            0x601 => self.status &= !(u16::from(v) << 8),
            0x602 | 0x603 => put(&mut self.enable, port & 1 != 0),
            0x604 | 0x605 => {
                put(&mut self.control, port & 1 != 0);
                if self.control & SLP_EN != 0 {
                    self.sleep = match (self.control >> 10 & 7) as u8 {
                        SLEEP_TYPE_S3 => Some(Sleep::Suspend),
                        SLEEP_TYPE_S5 => Some(Sleep::Off),
                        _ => self.sleep,
                    };
                    self.control &= !SLP_EN;
                }
            }
            0x622 | 0x623 => put(&mut self.gpe_enable, port & 1 != 0),
            // There are no general-purpose events.
            _ => {}
        }
    }

    /// Takes the request to sleep.
    pub fn take_sleep(&mut self) -> Option<Sleep> {
        self.sleep.take()
    }

    /// The real-time clock's alarm went off.
    pub fn alarm(&mut self) {
        self.status |= RTC;
    }

    /// Whether an event that is enabled has occurred: the SCI's level, and what ends S3.
    pub fn event(&self) -> bool {
        self.status & self.enable & RTC != 0
    }

    /// Notes that the machine has been woken.
    pub fn woken(&mut self) {
        self.status |= WAK_STS;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleep_enable_means_the_state_that_the_type_names() {
        let mut p = AcpiPm::default();
        let (suspend, off) = (Some(Sleep::Suspend), Some(Sleep::Off));
        for (v, sleep) in
            [(3u16 << 10 | SLP_EN, None), (5 << 10, None), (5 << 10 | SLP_EN, off), (1 << 10 | SLP_EN, suspend)]
        {
            p.write(0x604, v as u8);
            p.write(0x605, (v >> 8) as u8);
            assert_eq!(p.take_sleep(), sleep, "{v:#x}");
        }
        assert_eq!(p.read(PM1A_CONTROL, 0) & 1, 1);
    }

    #[test]
    fn events_are_enabled_and_cleared() {
        let mut p = AcpiPm::default();
        p.alarm();
        assert!(!p.event());
        p.write(0x603, (RTC >> 8) as u8);
        assert!(p.event());
        p.woken();
        assert_eq!(p.read(PM1A_EVENT, 0), u32::from(RTC) << 16 | u32::from(WAK_STS | RTC));
        p.write(0x601, (RTC >> 8) as u8);
        assert!(!p.event());
        assert_eq!(p.read(PM1A_EVENT, 0) as u16, WAK_STS);
    }

    #[test]
    fn timer_counts() {
        assert_eq!(AcpiPm::default().read(PM_TIMER, 1_000_000_000), 3_579_545);
    }
}
