//! The memory map a kernel is given, in the form of the BIOS call INT 15h AX=E820h (ACPI §15.1).

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::memory::{ECAM_BASE, ECAM_SIZE};

/// First byte of the extended BIOS data area, the last KiB of conventional memory.
pub(super) const EBDA: u64 = 0x9_fc00;
const VGA: u64 = 0xa_0000;
/// The BIOS area, which holds the ACPI tables.
const BIOS: u64 = 0xe_0000;
const HIGH_MEMORY: u64 = 0x10_0000;

/// The type of a range (ACPI §15.1, table 15.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum E820Kind {
    /// Free for the system to use.
    Ram = 1,
    /// Not to be used.
    Reserved = 2,
}

/// One range of the guest physical address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct E820Entry {
    /// First address.
    pub start: u64,
    /// Length in bytes, not 0.
    pub len: u64,
    /// What is there.
    pub kind: E820Kind,
}

/// The memory map of `ram`: ascending, without overlap.
///
/// Below 1 MiB it is the PC's: conventional memory, the extended BIOS data area, the VGA window (not listed, as it is
/// no RAM), and the BIOS area.
pub(super) fn map(ram: &GuestMemoryMmap) -> Vec<E820Entry> {
    let span = |start: u64, end: u64, kind| E820Entry { start, len: end.saturating_sub(start), kind };
    let mut map = vec![
        span(0, EBDA, E820Kind::Ram),
        span(EBDA, VGA, E820Kind::Reserved),
        span(BIOS, HIGH_MEMORY, E820Kind::Reserved),
        span(ECAM_BASE, ECAM_BASE + ECAM_SIZE, E820Kind::Reserved),
    ];
    for region in ram.iter() {
        let start = region.start_addr().raw_value();
        map.push(span(start.max(HIGH_MEMORY), start.saturating_add(region.len()), E820Kind::Ram));
    }
    map.retain(|entry| entry.len != 0);
    map.sort_by_key(|entry| entry.start);
    map
}
