//! The PC's devices: ports, MMIO and interrupts, nothing of CPUs.
//!
//! Each device is plain data with methods; time comes in as a parameter, interrupt lines and power events are asked
//! for. [`chipset::Chipset`] owns them all and is the crate's door.

pub mod acpi_pm;
pub mod bus;
pub mod chipset;
pub mod debug_exit;
pub mod hpet;
pub mod i8042;
pub mod ioapic;
pub mod lapic;
pub mod pci;
pub mod pic;
pub mod pit;
pub mod rtc;
pub mod serial;
pub mod system_control;
pub mod test_device;
