//! Guest memory: how much the user asks for, where it lies in the guest physical address space, and the host mapping
//! behind it.
//!
//! The layout is the q35 chipset's: RAM from 0 up to the PCI Express configuration window (ECAM), a hole for devices
//! up to 4 GiB, and what is left of the RAM above 4 GiB.

use std::sync::Arc;

use thiserror::Error;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

pub use diglot_devices::pci::{ECAM_BASE, ECAM_SIZE};

/// First address of the window in which PCI devices get 32-bit memory BARs.
pub const PCI_HOLE_BASE: u64 = ECAM_BASE + ECAM_SIZE;
/// First address behind the 32-bit BAR window: the fixed devices (IOAPIC, HPET, local APIC) lie above.
pub const PCI_HOLE_END: u64 = 0xfec0_0000;
/// RAM that doesn't fit below the ECAM continues here.
pub const HIGH_RAM_BASE: u64 = 1 << 32;
/// The smallest guest: a page table, the BIOS area and one large page.
pub const MIN_RAM: u64 = 2 << 20;

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;

/// What is wrong with a requested amount of memory.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The text is not a number with an optional unit.
    #[error("memory size '{0}' is not understood; write a whole number with B, K, M, G or T, such as 512M")]
    Syntax(String),
    /// The number does not fit 64 bits.
    #[error("memory size '{0}' is beyond any host; write fewer digits or a smaller unit")]
    Overflow(String),
    /// Too little to boot anything.
    #[error("memory must be at least {min} MiB, {0} bytes were asked for", min = MIN_RAM / MIB)]
    TooSmall(u64),
    /// Guest memory comes in whole pages.
    #[error("memory must be a multiple of 4 KiB, {0} bytes were asked for; try {near} bytes", near = .0.next_multiple_of(PAGE))]
    Unaligned(u64),
    /// More than the host could ever back.
    #[error("memory of {} MiB is more than the host's {} MiB; ask for less", .asked / MIB, .host / MIB)]
    BeyondHost {
        /// Bytes asked for.
        asked: u64,
        /// Bytes of RAM in the host.
        host: u64,
    },
    /// The host refused the mapping.
    #[error("the host refused to map {} MiB of guest memory: {why}; ask for less, or raise its limits", .bytes / MIB)]
    Map {
        /// Bytes asked for.
        bytes: u64,
        /// The host's own words.
        why: String,
    },
}

/// Reads an amount of memory as written on a command line: a whole number and a unit (`B`, `K`, `M`, `G`, `T`; powers
/// of 1024, either case). Without a unit it is MiB, as users of other monitors expect of `-m 512`.
pub fn parse_size(text: &str) -> Result<u64, MemoryError> {
    let syntax = || MemoryError::Syntax(text.into());
    let trimmed = text.trim();
    let (digits, shift) = match trimmed.char_indices().last() {
        None => return Err(syntax()),
        Some((_, '0'..='9')) => (trimmed, 20),
        Some((at, unit)) => {
            let shift = match unit.to_ascii_uppercase() {
                'B' => 0,
                'K' => 10,
                'M' => 20,
                'G' => 30,
                'T' => 40,
                _ => return Err(syntax()),
            };
            (trimmed.get(..at).ok_or_else(syntax)?, shift)
        }
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(syntax());
    }
    let overflow = || MemoryError::Overflow(text.into());
    digits.parse::<u64>().map_err(|_| overflow())?.checked_mul(1 << shift).ok_or_else(overflow)
}

/// The RAM of one machine.
///
/// The host pages are anonymous, read as zero and are not reserved: they exist once the guest touches them.
#[derive(Clone, Debug)]
pub struct GuestRam {
    mmap: Arc<GuestMemoryMmap>,
    size: u64,
}

impl GuestRam {
    /// Maps `bytes` of guest RAM: a multiple of 4 KiB, at least [`MIN_RAM`], at most what the host has.
    pub fn new(bytes: u64) -> Result<GuestRam, MemoryError> {
        validate(bytes, host_ram())?;
        let map_error = |why: String| MemoryError::Map { bytes, why };
        let ranges = ranges(bytes)
            .into_iter()
            .map(|(start, len)| Ok((GuestAddress(start), usize::try_from(len)?)))
            .collect::<Result<Vec<_>, std::num::TryFromIntError>>()
            .map_err(|e| map_error(e.to_string()))?;
        let mmap = GuestMemoryMmap::from_ranges(&ranges).map_err(|e| map_error(e.to_string()))?;
        mmap.iter().for_each(prepare);
        Ok(GuestRam { mmap: Arc::new(mmap), size: bytes })
    }

    /// The guest memory itself, to read, write and share with devices.
    pub fn mmap(&self) -> &Arc<GuestMemoryMmap> {
        &self.mmap
    }

    /// Bytes of RAM in all.
    pub fn size(&self) -> u64 {
        self.size
    }
}

/// Keeps a region out of core dumps, where hundreds of megabytes of it would hide what is looked for. That also keeps
/// the kernel from joining its mapping with a neighbour, so that what is resident of it can be told. And has it lie in huge
/// pages where there are some: guests are large beside what a processor's TLB reaches with small ones.
fn prepare(region: &impl GuestMemoryRegion) {
    let Ok(start) = region.get_host_address(MemoryRegionAddress(0)) else { return };
    for advice in [libc::MADV_DONTDUMP, libc::MADV_HUGEPAGE] {
        // SAFETY: the range is a whole mapping of ours, and the advice changes nothing of its content. A kernel that
        // does not know it refuses, which is as good.
        unsafe { libc::madvise(start.cast(), region.len() as usize, advice) };
    }
}

/// First address behind the RAM that starts at 0; 0 when there is none.
pub fn low_ram_end(ram: &GuestMemoryMmap) -> u64 {
    ram.iter().find(|r| r.start_addr().raw_value() == 0).map_or(0, |r| r.len())
}

/// Start and length of each range of RAM, ascending.
fn ranges(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(ECAM_BASE);
    let mut ranges = vec![(0, low)];
    if bytes > low {
        ranges.push((HIGH_RAM_BASE, bytes - low));
    }
    ranges
}

/// Checks an amount of memory against the rules above; `host` is the host's RAM if it is known.
fn validate(bytes: u64, host: Option<u64>) -> Result<(), MemoryError> {
    if bytes < MIN_RAM {
        return Err(MemoryError::TooSmall(bytes));
    }
    if let Some(host) = host.filter(|&host| bytes > host) {
        return Err(MemoryError::BeyondHost { asked: bytes, host });
    }
    if !bytes.is_multiple_of(PAGE) {
        return Err(MemoryError::Unaligned(bytes));
    }
    Ok(())
}

/// Bytes of RAM in the host. `None` on a host that doesn't say, where the mapping itself has the last word.
fn host_ram() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB"))?;
    kib.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn sizes_are_read_in_every_unit() {
        let good = [
            ("512", 512 * MIB),
            ("0", 0),
            ("1b", 1),
            ("4096B", 4096),
            ("64k", 64 << 10),
            ("512M", 512 * MIB),
            ("512m", 512 * MIB),
            ("3G", 3 * GIB),
            (" 1t ", 1 << 40),
        ];
        for (text, bytes) in good {
            assert_eq!(parse_size(text).expect(text), bytes, "{text}");
        }
        for text in ["", " ", "M", "-1", "+1", "1.5G", "0x10", "1 G", "5MB", "1é", "é", "１"] {
            assert!(matches!(parse_size(text), Err(MemoryError::Syntax(_))), "{text}");
        }
        for text in ["99999999999999999999", "18446744073709551615K", "16777216T"] {
            assert!(matches!(parse_size(text), Err(MemoryError::Overflow(_))), "{text}");
        }
    }

    #[test]
    fn amounts_are_validated() {
        let cases = [
            (0, "memory must be at least 2 MiB, 0 bytes were asked for"),
            (MIN_RAM - 1, "memory must be at least 2 MiB, 2097151 bytes were asked for"),
            (MIN_RAM + 1, "memory must be a multiple of 4 KiB, 2097153 bytes were asked for; try 2101248 bytes"),
            (5 * GIB, "memory of 5120 MiB is more than the host's 4096 MiB; ask for less"),
            (u64::MAX, "memory of 17592186044415 MiB is more than the host's 4096 MiB; ask for less"),
        ];
        for (bytes, message) in cases {
            assert_eq!(validate(bytes, Some(4 * GIB)).expect_err(message).to_string(), message);
        }
        assert!(validate(MIN_RAM, Some(4 * GIB)).is_ok());
        assert!(validate(4 * GIB, Some(4 * GIB)).is_ok());
        assert!(validate(64 * GIB, None).is_ok());
    }

    #[test]
    fn ram_is_split_around_the_hole() {
        assert_eq!(ranges(16 * MIB), [(0, 16 * MIB)]);
        assert_eq!(ranges(ECAM_BASE), [(0, ECAM_BASE)]);
        assert_eq!(ranges(ECAM_BASE + PAGE), [(0, ECAM_BASE), (HIGH_RAM_BASE, PAGE)]);
        assert_eq!(ranges(8 * GIB), [(0, ECAM_BASE), (HIGH_RAM_BASE, 8 * GIB - ECAM_BASE)]);
    }

    #[test]
    fn memory_is_mapped_whole() {
        let ram = GuestRam::new(4 * MIB).expect("4 MiB");
        assert_eq!((ram.size(), low_ram_end(ram.mmap())), (4 * MIB, 4 * MIB));
        assert!(GuestRam::new(1 << 60).is_err());
    }
}
