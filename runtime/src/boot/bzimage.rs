//! Linux bzImage, entered by the 64-bit boot protocol (Linux Documentation/arch/x86/boot.rst).
//!
//! The file is a real-mode part, of which only the header at 0x1f1 is used, and the protected-mode part that is loaded
//! and entered 0x200 bytes behind its start.

use vm_memory::{Bytes, GuestAddress};

use super::entry::{self, Entry, ZERO_PAGE};
use super::image::Image;
use super::initrd::Initrd;
use super::{BootError, Request, cmdline, e820, initrd};
use crate::memory::low_ram_end;

/// Fields of the setup header, at the same offset in the file and in the boot parameters.
mod field {
    pub(super) const SETUP_SECTS: usize = 0x1f1;
    pub(super) const SYSSIZE: usize = 0x1f4;
    pub(super) const VID_MODE: usize = 0x1fa;
    pub(super) const HEADER_LEN: usize = 0x201;
    pub(super) const VERSION: usize = 0x206;
    pub(super) const TYPE_OF_LOADER: usize = 0x210;
    pub(super) const LOADFLAGS: usize = 0x211;
    pub(super) const CODE32_START: usize = 0x214;
    pub(super) const RAMDISK_IMAGE: usize = 0x218;
    pub(super) const RAMDISK_SIZE: usize = 0x21c;
    pub(super) const CMD_LINE_PTR: usize = 0x228;
    pub(super) const INITRD_ADDR_MAX: usize = 0x22c;
    pub(super) const KERNEL_ALIGNMENT: usize = 0x230;
    pub(super) const RELOCATABLE_KERNEL: usize = 0x234;
    pub(super) const XLOADFLAGS: usize = 0x236;
    pub(super) const CMDLINE_SIZE: usize = 0x238;
    pub(super) const PREF_ADDRESS: usize = 0x258;
    pub(super) const INIT_SIZE: usize = 0x260;
    /// Behind the last field of protocol 2.12.
    pub(super) const END: usize = 0x268;
}

/// Fields of the boot parameters outside the setup header.
mod param {
    pub(super) const ACPI_RSDP_ADDR: usize = 0x070;
    pub(super) const E820_ENTRIES: usize = 0x1e8;
    /// The end of the room for the setup header.
    pub(super) const HEADER_END: usize = 0x290;
    pub(super) const E820_TABLE: usize = 0x2d0;
    pub(super) const SIZE: usize = 0x1000;
}

/// The first protocol version whose `xloadflags` tell of a 64-bit entry.
const VERSION_2_12: u16 = 0x020c;
const LOADED_HIGH: u8 = 1 << 0;
const XLF_KERNEL_64: u16 = 1 << 0;
const ENTRY64: u64 = 0x200;
const LOADER_UNDEFINED: u8 = 0xff;
const VIDEO_NORMAL: u16 = 0xffff;
const SECTOR: u64 = 512;

/// Bytes at fixed offsets, little endian. Offsets are constants inside the buffer's fixed length.
struct Block(Vec<u8>);

impl Block {
    fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0.get(at..).and_then(|b| b.first_chunk()).copied().unwrap_or([0; N])
    }

    fn u8(&self, at: usize) -> u8 {
        u8::from_le_bytes(self.get(at))
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.get(at))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.get(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.get(at))
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (to, from) in self.0.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    }
}

/// Where the protected-mode part is in the file, and where it goes.
struct Layout {
    offset: u64,
    len: u64,
    start: u64,
    /// First address behind the memory the kernel needs until it has read the memory map.
    end: u64,
}

/// Loads `kernel` with what `request` asks for.
pub(super) fn load(kernel: &Image, request: &Request) -> Result<Entry, BootError> {
    let head = Block(kernel.read("the setup header", 0, field::END)?);
    let version = head.u16(field::VERSION);
    if version < VERSION_2_12 || head.u16(field::XLOADFLAGS) & XLF_KERNEL_64 == 0 {
        return Err(BootError::No64BitEntry { name: kernel.name(), version });
    }
    let layout = layout(kernel, &head)?;
    let have = low_ram_end(request.ram);
    if layout.end > have {
        return Err(BootError::KernelDoesNotFit { name: kernel.name(), need: layout.end, have });
    }

    let limit = usize::try_from(head.u32(field::CMDLINE_SIZE)).unwrap_or(usize::MAX);
    cmdline::write(request.ram, request.cmdline, limit)?;
    kernel.copy_to(request.ram, layout.start, "the protected-mode code", layout.offset, layout.len)?;
    let initrd_limit = u64::from(head.u32(field::INITRD_ADDR_MAX)) + 1;
    let initrd = initrd::load(request, layout.end, initrd_limit)?;

    let params = boot_params(kernel, &head, request, layout.start, initrd)?;
    request.ram.write_slice(&params.0, GuestAddress(ZERO_PAGE))?;
    Ok(entry::long64(request.ram, layout.start + ENTRY64)?)
}

/// Takes sizes and addresses from the header, none of them trusted.
fn layout(kernel: &Image, head: &Block) -> Result<Layout, BootError> {
    let malformed = |why: String| BootError::Malformed { name: kernel.name(), why };
    if head.u8(field::LOADFLAGS) & LOADED_HIGH == 0 {
        return Err(malformed("its loadflags are those of a zImage, not of a bzImage".into()));
    }
    // 0 stands for 4, a rule from the time of diskettes.
    let sectors = match head.u8(field::SETUP_SECTS) {
        0 => 4,
        n => u64::from(n),
    };
    let offset = (sectors + 1) * SECTOR;
    let len = u64::from(head.u32(field::SYSSIZE)) * 16;
    if len <= ENTRY64 {
        return Err(malformed(format!("its protected-mode code is only {len} bytes long")));
    }
    // A build may leave off the padding of the last 16 bytes.
    kernel.require("the protected-mode code", offset, len.saturating_sub(15))?;
    let len = len.min(kernel.len().saturating_sub(offset));

    let preferred = head.u64(field::PREF_ADDRESS);
    let alignment = u64::from(head.u32(field::KERNEL_ALIGNMENT));
    let start = if head.u8(field::RELOCATABLE_KERNEL) == 0 {
        Some(preferred)
    } else if alignment.is_power_of_two() {
        preferred.checked_next_multiple_of(alignment)
    } else {
        return Err(malformed(format!("its alignment {alignment:#x} is not a power of two")));
    };
    let span = len.max(u64::from(head.u32(field::INIT_SIZE)));
    match start.and_then(|start| Some((start, start.checked_add(span)?))) {
        Some((start, end)) if start >= 0x10_0000 => Ok(Layout { offset, len, start, end }),
        _ => Err(malformed(format!("its preferred address {preferred:#x} is outside the memory of a PC"))),
    }
}

/// The zero page: the file's setup header, completed by what a boot loader has to say.
fn boot_params(
    kernel: &Image,
    head: &Block,
    request: &Request,
    start: u64,
    initrd: Initrd,
) -> Result<Block, BootError> {
    // The byte at 0x201 is the offset of a jump over the header, relative to the byte behind it.
    let header_end = (0x202 + usize::from(head.u8(field::HEADER_LEN))).clamp(field::END, param::HEADER_END);
    let header_len = header_end - field::SETUP_SECTS;
    let header = kernel.read("the setup header", field::SETUP_SECTS as u64, header_len)?;

    // Addresses in here are below 4 GiB: RAM below the PCI hole is.
    let mut params = Block(vec![0; param::SIZE]);
    params.put(field::SETUP_SECTS, &header);
    params.put(field::VID_MODE, &VIDEO_NORMAL.to_le_bytes());
    params.put(field::TYPE_OF_LOADER, &[LOADER_UNDEFINED]);
    params.put(field::CODE32_START, &(start as u32).to_le_bytes());
    params.put(field::RAMDISK_IMAGE, &(initrd.start as u32).to_le_bytes());
    params.put(field::RAMDISK_SIZE, &(initrd.len as u32).to_le_bytes());
    params.put(field::CMD_LINE_PTR, &(cmdline::ADDRESS as u32).to_le_bytes());
    params.put(param::ACPI_RSDP_ADDR, &request.rsdp.to_le_bytes());

    let map = e820::map(request.ram);
    params.put(param::E820_ENTRIES, &[map.len() as u8]);
    let table: Vec<u8> = map
        .iter()
        .flat_map(|e| [&e.start.to_le_bytes()[..], &e.len.to_le_bytes(), &(e.kind as u32).to_le_bytes()].concat())
        .collect();
    params.put(param::E820_TABLE, &table);
    Ok(params)
}
