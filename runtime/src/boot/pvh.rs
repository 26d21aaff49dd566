//! ELF kernels entered by the PVH boot protocol (Xen docs/misc/pvh.pandoc and xen/include/public/arch-x86/hvm/
//! start_info.h).
//!
//! Segments are loaded at their physical addresses; a note of the owner `Xen` gives the 32-bit entry point.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::elf::{self, Classes, PT_LOAD, PT_NOTE, Segment, u32_at, u64_at};
use super::entry::{self, Entry, START_INFO};
use super::image::Image;
use super::{BootError, Request, cmdline, e820, initrd};
use crate::memory::{HIGH_RAM_BASE, low_ram_end};

/// The notes of a kernel are a few hundred bytes; more is not read.
const NOTES_LIMIT: u64 = 1 << 20;
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

const START_INFO_MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const START_INFO_VERSION: u32 = 1;
const START_INFO_LEN: u64 = 56;
const MODULE_LEN: u64 = 32;

/// Below this lie the tables the entry needs, the VGA window and the BIOS area.
const LOWEST: u64 = 0x10_0000;

/// Loads `kernel` with what `request` asks for.
pub(super) fn load(kernel: &Image, request: &Request) -> Result<Entry, BootError> {
    let segments = elf::read(kernel, Classes::Only64)?.segments;
    let entry_point = entry_point(kernel, &segments)?;
    let mut end = LOWEST;
    let mut holds_entry = false;
    for segment in segments.iter().filter(|s| s.kind == PT_LOAD && s.len != 0) {
        let segment_end = load_segment(kernel, request.ram, segment)?;
        end = end.max(segment_end);
        holds_entry |= (segment.start..segment_end).contains(&entry_point.into());
    }
    if !holds_entry {
        let why = format!("its PVH entry point {entry_point:#x} is in none of its segments");
        return Err(BootError::Malformed { name: kernel.name(), why });
    }
    cmdline::write(request.ram, request.cmdline, cmdline::AREA)?;
    let initrd = initrd::load(request, end, HIGH_RAM_BASE)?;
    write_start_info(request, initrd)?;
    Ok(entry::protected32(request.ram, entry_point)?)
}

/// Copies one segment to its physical address and clears what the file doesn't hold. Gives the address behind it.
fn load_segment(kernel: &Image, ram: &GuestMemoryMmap, segment: &Segment) -> Result<u64, BootError> {
    let malformed = |why| BootError::Malformed { name: kernel.name(), why };
    let Segment { start, len, file_len, .. } = *segment;
    if file_len > len {
        return Err(malformed(format!("its segment at {start:#x} is longer in the file than in memory")));
    }
    let end = start.checked_add(len).filter(|_| start >= LOWEST);
    let Some(end) = end else {
        return Err(malformed(format!("its segment at {start:#x} is outside the memory a kernel may use")));
    };
    let have = low_ram_end(ram);
    if end > have {
        return Err(BootError::KernelDoesNotFit { name: kernel.name(), need: end, have });
    }
    kernel.fill(ram, (start, len), "a program segment", segment.offset, file_len)?;
    Ok(end)
}

/// The address in the note of type `XEN_ELFNOTE_PHYS32_ENTRY`.
fn entry_point(kernel: &Image, segments: &[Segment]) -> Result<u32, BootError> {
    for segment in segments.iter().filter(|s| s.kind == PT_NOTE) {
        kernel.require("a note segment", segment.offset, segment.file_len)?;
        // Bounded above, so it is a `usize`.
        let notes = kernel.read("a note segment", segment.offset, segment.file_len.min(NOTES_LIMIT) as usize)?;
        if let Some(entry) = find_note(&notes, if segment.align == 8 { 8 } else { 4 }) {
            return Ok(entry);
        }
    }
    Err(BootError::NoPvhEntry { name: kernel.name() })
}

/// Walks a note segment: a header of three words, the owner's name and the content, each padded to `align`.
fn find_note(mut notes: &[u8], align: usize) -> Option<u32> {
    while notes.len() >= 12 {
        let name_len = usize::try_from(u32_at(notes, 0)).ok()?;
        let content_len = usize::try_from(u32_at(notes, 4)).ok()?;
        let kind = u32_at(notes, 8);
        let content_at = 12usize.checked_add(name_len)?.checked_next_multiple_of(align)?;
        let content_end = content_at.checked_add(content_len)?;
        let name = notes.get(12..)?.get(..name_len)?;
        let content = notes.get(content_at..content_end)?;
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && name == b"Xen\0" {
            // The content is one word, of 4 or 8 bytes as the builder pleased.
            return match content_len {
                4 => Some(u32_at(content, 0)),
                8 => u32::try_from(u64_at(content, 0)).ok(),
                _ => None,
            };
        }
        notes = notes.get(content_end.checked_next_multiple_of(align)?..).unwrap_or_default();
    }
    None
}

/// Writes the start info, the list of modules (the initial RAM disk) and the memory map, one behind the other.
fn write_start_info(request: &Request, initrd: initrd::Initrd) -> Result<(), BootError> {
    let modules = START_INFO + START_INFO_LEN;
    let map_at = modules + MODULE_LEN;
    let map = e820::map(request.ram);
    let module_count = u32::from(request.initrd.is_some());
    let flags = 0u32;

    let mut bytes = Vec::new();
    for word in [START_INFO_MAGIC, START_INFO_VERSION, flags, module_count] {
        bytes.extend(word.to_le_bytes());
    }
    for address in [if module_count == 0 { 0 } else { modules }, cmdline::ADDRESS, request.rsdp, map_at] {
        bytes.extend(address.to_le_bytes());
    }
    // The number of ranges, and a reserved word.
    bytes.extend((map.len() as u64).to_le_bytes());
    // A module: address, length, no command line, reserved.
    for word in [initrd.start, initrd.len, 0, 0] {
        bytes.extend(word.to_le_bytes());
    }
    for range in map {
        for word in [range.start, range.len, range.kind as u64] {
            bytes.extend(word.to_le_bytes());
        }
    }
    Ok(request.ram.write_slice(&bytes, GuestAddress(START_INFO))?)
}
