//! What the CPU sees of the machine around it: the only door between the translator and the devices.

/// The machine as one vCPU sees it. All calls come from that vCPU's thread. What an implementation leaves out is as in
/// a machine with nothing in it.
pub trait Platform: Send {
    /// Reads `size` (1, 2 or 4) bytes from an I/O port.
    fn port_in(&mut self, _port: u16, _size: u8) -> u32 {
        u32::MAX
    }
    /// Writes `size` (1, 2 or 4) bytes to an I/O port.
    fn port_out(&mut self, _port: u16, _size: u8, _value: u32) {}
    /// Reads `size` (1, 2, 4 or 8) bytes from a guest physical address that is not RAM.
    fn mmio_read(&mut self, _gpa: u64, _size: u8) -> u64 {
        u64::MAX
    }
    /// Writes `size` (1, 2, 4 or 8) bytes to a guest physical address that is not RAM.
    fn mmio_write(&mut self, _gpa: u64, _size: u8, _value: u64) {}
    /// The time-stamp counter without the guest's offset: as many ticks a second as the CPU model says since power-on,
    /// never backwards.
    fn tsc(&mut self) -> u64 {
        0
    }
    /// Reads an MSR that belongs to the local APIC (IA32_APIC_BASE, IA32_TSC_DEADLINE, x2APIC 800h–8FFh).
    /// `tsc` is the guest's TSC now. `None` raises #GP.
    fn apic_msr_read(&mut self, _msr: u32, _tsc: u64) -> Option<u64> {
        None
    }
    /// Writes an MSR that belongs to the local APIC. `None` raises #GP.
    fn apic_msr_write(&mut self, _msr: u32, _value: u64, _tsc: u64) -> Option<()> {
        None
    }
    /// Whether IA32_APIC_BASE enables the local APIC.
    fn apic_enabled(&mut self) -> bool {
        true
    }
    /// The task priority as CR8 shows it (TPR bits 7:4).
    fn cr8(&mut self) -> u64 {
        0
    }
    /// Writes CR8; `value` is at most 15.
    fn set_cr8(&mut self, _value: u64) {}
    /// Brings timers up to date and says whether a maskable interrupt waits to be taken.
    fn interrupt_pending(&mut self) -> bool {
        false
    }
    /// Takes the waiting interrupt: the interrupt-acknowledge cycle. `None` when it has gone.
    fn acknowledge(&mut self) -> Option<u8> {
        None
    }
    /// Takes a waiting non-maskable interrupt.
    fn take_nmi(&mut self) -> bool {
        false
    }
    /// The end of a level-triggered interrupt, from an engine with local APICs of its own.
    fn end_of_interrupt(&mut self, _vector: u8) {}
    /// 64 random bits for RDRAND and RDSEED; `None` when the host has none to give (CF=0).
    fn random(&mut self) -> Option<u64> {
        None
    }
}

/// Frequency of the guest's time-stamp counter, unless an engine can only have the host's.
pub const TSC_HZ: u64 = 1_000_000_000;
/// Frequency of the APIC timer's crystal.
pub const APIC_HZ: u64 = 1_000_000_000;
