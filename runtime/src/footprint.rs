//! How much of the host's memory a machine takes, as Linux tells it in `/proc` (proc(5)).

use std::ops::Range;

use diglot_translator::mapping::CODE_MEMORY;
use serde::Serialize;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

/// Bytes of host memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Footprint {
    /// In host RAM now, of all that the process has mapped. Code memory, which is mapped twice, counts once.
    pub resident_bytes: u64,
    /// The part of it that is guest RAM: what the guest, or its boot, has touched.
    pub guest_resident_bytes: u64,
    /// The other part: program, caches, compiler, threads.
    pub beyond_guest_bytes: u64,
    /// The most that ever was in host RAM at one time.
    pub peak_resident_bytes: u64,
}

impl Footprint {
    /// Measures this process; `None` on a host that does not say.
    pub(crate) fn measure(ram: &GuestMemoryMmap) -> Option<Footprint> {
        let ranges: Vec<Range<u64>> = ram
            .iter()
            .filter_map(|region| {
                let start = region.get_host_address(MemoryRegionAddress(0)).ok()? as u64;
                Some(start..start + region.len())
            })
            .collect();
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let smaps = std::fs::read_to_string("/proc/self/smaps").ok()?;
        // QEMU's user-mode emulation has such a file, in which nothing is resident.
        if resident(&smaps, |_, _| true) == 0 {
            return None;
        }
        let guest = resident(&smaps, |_, m| ranges.iter().any(|r| r.start < m.end && m.start < r.end));
        let again = resident(&smaps, |line, _| is_second_view(line));
        let resident = kib(&status, "VmRSS:")?.saturating_sub(again);
        Some(Footprint {
            resident_bytes: resident,
            guest_resident_bytes: guest,
            beyond_guest_bytes: resident.saturating_sub(guest),
            peak_resident_bytes: kib(&status, "VmHWM:")?.saturating_sub(again),
        })
    }
}

/// A field in KiB, as bytes.
fn kib(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name))?;
    value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Resident bytes of the mappings that are `wanted`, by their first lines and addresses. The kernel may split what was
/// mapped, and joins what lies side by side and is alike, which guest RAM is not to anything (`memory.rs`).
fn resident(smaps: &str, wanted: impl Fn(&str, Range<u64>) -> bool) -> u64 {
    let mut inside = false;
    let mut sum = 0;
    for line in smaps.lines() {
        if let Some(mapping) = mapping(line) {
            inside = wanted(line, mapping);
        } else if inside {
            sum += kib(line, "Rss:").unwrap_or(0);
        }
    }
    sum
}

/// Whether the first line of a mapping is that of the view of code memory that executes, whose pages the other one has.
fn is_second_view(line: &str) -> bool {
    line.contains(" r-xs ") && CODE_MEMORY.to_str().is_ok_and(|name| line.contains(name))
}

/// The addresses in the first line of a mapping: `7f0000000000-7f0000001000 rw-p ...`.
fn mapping(line: &str) -> Option<Range<u64>> {
    let (start, end) = line.split(' ').next()?.split_once('-')?;
    Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestRam;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn mappings_are_summed_where_they_are_guest_ram() {
        let smaps = "1000-3000 rw-p 00000000 00:00 0\nSize: 8 kB\nRss: 4 kB\nPss: 4 kB\n\
                     3000-9000 rw-p 00000000 00:00 0 [heap]\nRss: 16 kB\n\
                     9000-a000 rw-p 00000000 00:00 0\nRss: 8 kB\nVmFlags: rd wr\n";
        let of =
            |ranges: &[Range<u64>]| resident(smaps, |_, m| ranges.iter().any(|r| r.start < m.end && m.start < r.end));
        assert_eq!(of(&[0x1000..0x3000, 0x9000..0xa000]), 12 << 10);
        assert_eq!(of(std::slice::from_ref(&(0x20_0000..0x30_0000))), 0);
    }

    #[test]
    fn code_memory_counts_once() {
        let smaps = "1000-3000 rw-s 00000000 00:01 7 /memfd:diglot-code (deleted)\nRss: 4 kB\n\
                     3000-9000 r-xs 00000000 00:01 7 /memfd:diglot-code (deleted)\nRss: 16 kB\n\
                     a000-b000 r-xp 00000000 00:01 7 /usr/bin/diglot\nRss: 8 kB\n";
        assert_eq!(resident(smaps, |line, _| is_second_view(line)), 16 << 10);
    }

    #[test]
    fn touched_guest_ram_is_seen() {
        const MIB: usize = 1 << 20;
        let ram = GuestRam::new(64 * MIB as u64).expect("64 MiB");
        let ram = ram.mmap();
        let Some(before) = Footprint::measure(ram) else {
            println!("skipped: this host does not say what is resident");
            return;
        };
        ram.write_slice(&vec![1; 8 * MIB], GuestAddress(0)).expect("inside");
        let after = Footprint::measure(ram).expect("as before");
        assert!(after.guest_resident_bytes >= before.guest_resident_bytes + 8 * MIB as u64, "{before:?} {after:?}");
        assert!(after.guest_resident_bytes <= 64 * MIB as u64, "{after:?}");
        assert!(after.peak_resident_bytes >= after.resident_bytes);
    }
}
