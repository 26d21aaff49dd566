//! Multiboot kernels (Multiboot Specification, version 0.6.96).
//!
//! A header in the first 8 KiB tells such a kernel. Where it goes the header's own address fields say, if it has them,
//! else the program headers of an ELF file of either class. All that the loader leaves for the kernel is one block of
//! conventional memory, at the highest place that the kernel itself leaves free:
//!
//! | content | |
//! |---|---|
//! | stack | one page; the specification promises none |
//! | global descriptor table | not promised either |
//! | information | what EBX points to |
//! | module | the one entry of the list of modules, if there is an initial RAM disk |
//! | memory map | |
//! | strings | boot loader name, command line, name of the module |

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::elf::{self, Classes, PT_LOAD, Segment, u32_at};
use super::entry::{self, Entry, GDT_LEN};
use super::image::Image;
use super::initrd::{self, Initrd};
use super::{BootError, Request, bios, cmdline, e820};
use crate::memory::low_ram_end;

const MAGIC: u32 = 0x1bad_b002;
/// The header lies in so many bytes of the file's start, on a multiple of 4.
const SEARCHED: usize = 8192;
/// Magic, flags and checksum.
const HEADER_LEN: usize = 12;
/// The same with the address fields.
const ADDRESSED_LEN: usize = 32;

/// Flags of the header (§3.1.2). Modules on page boundaries and the memory fields are what every kernel gets here.
const PAGE_ALIGNED: u32 = 1 << 0;
const MEMORY: u32 = 1 << 1;
const VIDEO: u32 = 1 << 2;
/// A flag below bit 16 must be understood, or the kernel not be started.
const REQUIRED: u32 = 0xffff;
const ADDRESSES: u32 = 1 << 16;

/// Flags of the information: which of its fields are valid (§3.3).
const HAS_MEMORY: u32 = 1 << 0;
const HAS_CMDLINE: u32 = 1 << 2;
const HAS_MODULES: u32 = 1 << 3;
const HAS_MAP: u32 = 1 << 6;
const HAS_LOADER: u32 = 1 << 9;
/// Length of the information, framebuffer fields included.
const INFO_LEN: usize = 116;

const LOADER: &str = "Diglot";
const STACK_LEN: usize = 0x1000;
/// The first address behind interrupt vectors and BIOS data area.
const CONVENTIONAL: u64 = 0x500;
const HIGH_MEMORY: u64 = 0x10_0000;

/// A Multiboot header whose checksum is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Where in the file it is.
    at: u64,
    flags: u32,
}

/// What the search for a header gives.
pub(super) enum Found {
    Header(Header),
    /// The magic number alone, at this byte, with a wrong checksum.
    Damaged(u64),
    Nothing,
}

impl Found {
    /// For files that are nothing else either: a spoilt header is the best explanation.
    pub(super) fn refuse_damaged(&self, kernel: &Image) -> Result<(), BootError> {
        match self {
            Found::Damaged(at) => {
                let why = format!("the checksum of its Multiboot header at byte {at:#x} is wrong");
                Err(BootError::Malformed { name: kernel.name(), why })
            }
            _ => Ok(()),
        }
    }
}

/// Looks for a header. The magic number may occur by chance, so the first with a right checksum counts.
pub(super) fn find(kernel: &Image) -> Result<Found, BootError> {
    let len = usize::try_from(kernel.len()).map_or(SEARCHED, |len| len.min(SEARCHED));
    let head = kernel.read("the start of the file", 0, len)?;
    let mut damaged = Found::Nothing;
    for at in (0..len.saturating_sub(HEADER_LEN - 1)).step_by(4) {
        if u32_at(&head, at) != MAGIC {
            continue;
        }
        let (flags, checksum) = (u32_at(&head, at + 4), u32_at(&head, at + 8));
        if MAGIC.wrapping_add(flags).wrapping_add(checksum) == 0 {
            return Ok(Found::Header(Header { at: at as u64, flags }));
        }
        if matches!(damaged, Found::Nothing) {
            damaged = Found::Damaged(at as u64);
        }
    }
    Ok(damaged)
}

/// A part of the file and the memory that it fills; the rest of that memory is cleared.
#[derive(Clone, Copy, Debug)]
struct Part {
    offset: u64,
    file_len: u64,
    start: u64,
    end: u64,
}

/// Loads `kernel`, whose header is `header`, with what `request` asks for.
pub(super) fn load(kernel: &Image, header: &Header, request: &Request) -> Result<Entry, BootError> {
    check_flags(kernel, header.flags)?;
    let (mut parts, entry) = if header.flags & ADDRESSES != 0 {
        let (part, entry) = flat(kernel, header)?;
        (vec![part], entry)
    } else if kernel.read("the start of the file", 0, 4)? == b"\x7fELF" {
        segments(kernel)?
    } else {
        return Err(BootError::NoMultibootAddresses { name: kernel.name() });
    };
    parts.sort_by_key(|part| part.start);
    check_parts(kernel, request.ram, &parts)?;

    let end = parts.last().map_or(HIGH_MEMORY, |part| part.end.max(HIGH_MEMORY));
    bios::write(request.ram)?;
    for part in &parts {
        let memory = (part.start, part.end - part.start);
        kernel.fill(request.ram, memory, "a program segment", part.offset, part.file_len)?;
    }
    let initrd = initrd::load_low(request, end)?;
    let block = block(kernel, request, initrd)?;
    let Some(at) = place(block.bytes.len() as u64, &parts) else {
        let why = "it leaves no room for the boot information below 640 KiB".into();
        return Err(BootError::Malformed { name: kernel.name(), why });
    };
    block.write(request.ram, at, entry)
}

/// Refuses what can't be done, as the specification asks.
fn check_flags(kernel: &Image, flags: u32) -> Result<(), BootError> {
    let refused = flags & REQUIRED & !(PAGE_ALIGNED | MEMORY);
    let what = match refused {
        0 => return Ok(()),
        VIDEO => "a video mode (flag bit 2), and this machine has no display".into(),
        _ => format!("features that Diglot does not know (flag bits {refused:#x})"),
    };
    Err(BootError::MultibootFeature { name: kernel.name(), what })
}

/// The one part and the entry point of a kernel that tells its addresses in the header (§3.1.3).
fn flat(kernel: &Image, header: &Header) -> Result<(Part, u32), BootError> {
    let malformed = |why| BootError::Malformed { name: kernel.name(), why };
    let bytes = kernel.read("the Multiboot header", header.at, ADDRESSED_LEN)?;
    let [header_addr, start, load_end, bss_end] = [12, 16, 20, 24].map(|at| u64::from(u32_at(&bytes, at)));
    let entry = u32_at(&bytes, 28);
    let offset = header_addr.checked_sub(start).and_then(|before| header.at.checked_sub(before));
    let Some(offset) = offset else {
        let at = header.at;
        let why = format!(
            "its Multiboot header is at byte {at:#x} of the file, which does not go with header address \
             {header_addr:#x} and load address {start:#x}"
        );
        return Err(malformed(why));
    };
    // 0 stands for the whole file, and for no memory behind what is loaded.
    let load_end = if load_end == 0 { start + kernel.len().saturating_sub(offset) } else { load_end };
    let Some(file_len) = load_end.checked_sub(start).filter(|len| *len != 0) else {
        return Err(malformed(format!("its load address {start:#x} is not below its load end {load_end:#x}")));
    };
    let end = if bss_end == 0 { load_end } else { bss_end };
    if end < load_end {
        return Err(malformed(format!("its bss end {end:#x} is below its load end {load_end:#x}")));
    }
    kernel.require("the image that its Multiboot header tells of", offset, file_len)?;
    check_entry(kernel, entry.into(), (start..end).contains(&entry.into()))?;
    Ok((Part { offset, file_len, start, end }, entry))
}

/// The parts and the entry point of an ELF file.
fn segments(kernel: &Image) -> Result<(Vec<Part>, u32), BootError> {
    let elf = elf::read(kernel, Classes::Both)?;
    let loaded = || elf.segments.iter().filter(|s| s.kind == PT_LOAD && s.len != 0);
    let parts = loaded().map(|segment| part(kernel, segment)).collect::<Result<Vec<_>, _>>()?;
    // The entry point is a virtual address. Paging is off, though, and so many kernels of the upper half give the
    // physical one; the first that fits counts.
    let offset_in = |start: u64, len: u64| elf.entry.checked_sub(start).filter(|offset| *offset < len);
    let by_address = loaded().find_map(|s| Some(s.start.saturating_add(offset_in(s.virtual_start, s.len)?)));
    let entry = by_address.or_else(|| loaded().any(|s| offset_in(s.start, s.len).is_some()).then_some(elf.entry));
    check_entry(kernel, elf.entry, entry.is_some())?;
    match entry.and_then(|entry| u32::try_from(entry).ok()) {
        Some(entry) => Ok((parts, entry)),
        None => {
            let why = format!("its entry point {:#x} is above 4 GiB, where 32-bit code can't be", elf.entry);
            Err(BootError::Malformed { name: kernel.name(), why })
        }
    }
}

fn check_entry(kernel: &Image, entry: u64, inside: bool) -> Result<(), BootError> {
    if inside {
        return Ok(());
    }
    let why = format!("its entry point {entry:#x} is in no memory that it fills");
    Err(BootError::Malformed { name: kernel.name(), why })
}

fn part(kernel: &Image, segment: &Segment) -> Result<Part, BootError> {
    let Segment { offset, file_len, start, len, .. } = *segment;
    if file_len > len {
        let why = format!("its segment at {start:#x} is longer in the file than in memory");
        return Err(BootError::Malformed { name: kernel.name(), why });
    }
    kernel.require("a program segment", offset, file_len)?;
    match start.checked_add(len) {
        Some(end) => Ok(Part { offset, file_len, start, end }),
        None => Err(outside(kernel, start)),
    }
}

fn outside(kernel: &Image, start: u64) -> BootError {
    let why = format!("its segment at {start:#x} is outside the memory a kernel may use");
    BootError::Malformed { name: kernel.name(), why }
}

/// Sorted parts lie in conventional memory or in that from 1 MiB on, and apart from one another.
fn check_parts(kernel: &Image, ram: &GuestMemoryMmap, parts: &[Part]) -> Result<(), BootError> {
    let have = low_ram_end(ram);
    for part in parts {
        let low = part.start >= CONVENTIONAL && part.end <= e820::EBDA;
        if !low && part.start < HIGH_MEMORY {
            return Err(outside(kernel, part.start));
        }
        if part.end > have {
            return Err(BootError::KernelDoesNotFit { name: kernel.name(), need: part.end, have });
        }
    }
    for pair in parts.windows(2) {
        if let [first, second] = pair
            && first.end > second.start
        {
            let why = format!("its segments at {:#x} and {:#x} overlap", first.start, second.start);
            return Err(BootError::Malformed { name: kernel.name(), why });
        }
    }
    Ok(())
}

/// The highest multiple of 16 in conventional memory with `len` bytes that none of the sorted parts fills.
fn place(len: u64, parts: &[Part]) -> Option<u64> {
    let mut top = e820::EBDA;
    for part in parts.iter().rev().filter(|part| part.start < e820::EBDA) {
        match top.checked_sub(len).map(|at| at & !15) {
            Some(at) if at >= part.end => return Some(at),
            _ => top = part.start,
        }
    }
    top.checked_sub(len).map(|at| at & !15).filter(|at| *at >= CONVENTIONAL)
}

/// What the kernel is given: bytes that do not know their address yet, and where in them things are.
struct Block {
    bytes: Vec<u8>,
    /// Words of these bytes that are to become addresses, and are offsets so far.
    pointers: Vec<usize>,
    gdt: usize,
    info: usize,
}

impl Block {
    /// Adds bytes, and says where they are.
    fn push(&mut self, bytes: &[u8]) -> u32 {
        let at = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        // The parts are bounded, all together far below 4 GiB.
        at as u32
    }

    fn push_string(&mut self, text: &str) -> u32 {
        let at = self.push(text.as_bytes());
        self.push(&[0]);
        at
    }

    fn set(&mut self, at: usize, word: u32) {
        if let Some(place) = self.bytes.get_mut(at..at + 4) {
            place.copy_from_slice(&word.to_le_bytes());
        }
    }

    fn set_pointer(&mut self, at: usize, offset: u32) {
        self.set(at, offset);
        self.pointers.push(at);
    }

    /// Writes the block to guest physical address `base`, in conventional memory.
    fn write(mut self, ram: &GuestMemoryMmap, base: u64, entry: u32) -> Result<Entry, BootError> {
        let address = |offset: u32| (base as u32).wrapping_add(offset);
        for at in std::mem::take(&mut self.pointers) {
            let offset = u32_at(&self.bytes, at);
            self.set(at, address(offset));
        }
        ram.write_slice(&self.bytes, GuestAddress(base))?;
        let (info, stack_top) = (address(self.info as u32), address(STACK_LEN as u32));
        Ok(entry::multiboot(ram, base + self.gdt as u64, entry, info, stack_top)?)
    }
}

/// Builds the stack, the descriptor table's place, and the information with all that it points to (§3.3).
fn block(kernel: &Image, request: &Request, initrd: Initrd) -> Result<Block, BootError> {
    let (gdt, info) = (STACK_LEN, STACK_LEN + GDT_LEN);
    let mut block = Block { bytes: vec![0; info + INFO_LEN], pointers: Vec::new(), gdt, info };
    block.set(info, HAS_MEMORY | HAS_CMDLINE | HAS_MODULES | HAS_MAP | HAS_LOADER);
    // KiB of conventional memory, and of that from 1 MiB to the first hole; RAM below the PCI hole is below 4 GiB.
    block.set(info + 4, (e820::EBDA >> 10) as u32);
    block.set(info + 8, (low_ram_end(request.ram).saturating_sub(HIGH_MEMORY) >> 10) as u32);

    // First and last address, string, reserved; below 4 GiB as well.
    let module = request.initrd.map(|image| (image, block.push(&[0; 16])));
    let map: Vec<u8> = e820::map(request.ram)
        .iter()
        .flat_map(|e| {
            // The length of an entry does not count the word that holds it.
            let (len, kind) = (20u32.to_le_bytes(), (e.kind as u32).to_le_bytes());
            [&len[..], &e.start.to_le_bytes(), &e.len.to_le_bytes(), &kind].concat()
        })
        .collect();
    block.set(info + 44, map.len() as u32);
    let map = block.push(&map);
    block.set_pointer(info + 48, map);

    if let Some((image, module)) = module {
        let at = module as usize;
        block.set(at, initrd.start as u32);
        block.set(at + 4, (initrd.start + initrd.len) as u32);
        let name = block.push_string(&checked(image.name())?);
        block.set_pointer(at + 8, name);
        block.set(info + 20, 1);
        block.set_pointer(info + 24, module);
    }
    let loader = block.push_string(LOADER);
    block.set_pointer(info + 64, loader);
    // The kernel's name is its first word, as GRUB's first version and QEMU have it, and C programs expect.
    let line = format!("{} {}", kernel.name(), request.cmdline.trim());
    let line = block.push_string(&checked(line.trim_end().into())?);
    block.set_pointer(info + 16, line);
    Ok(block)
}

/// Strings end with a NUL, and have the room that other kernels' command lines have.
fn checked(text: String) -> Result<String, BootError> {
    let limit = cmdline::AREA - 1;
    if text.contains('\0') {
        return Err(BootError::CmdlineInvalid("it contains a NUL byte"));
    }
    if text.len() > limit {
        return Err(BootError::CmdlineTooLong { len: text.len(), limit });
    }
    Ok(text)
}
