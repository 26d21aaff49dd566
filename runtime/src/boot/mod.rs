//! Booting a kernel without firmware: the kernel, its initial RAM disk and command line are put into guest memory,
//! with what the firmware would have left there, and the state of the boot processor is told to the caller.
//!
//! Three kinds of kernel are known, by content and not by name, and asked for in this order: a Linux bzImage, entered at
//! its 64-bit entry point (`bzimage.rs`), a file with a Multiboot header (`multiboot.rs`), and an ELF file with a PVH
//! entry note (`pvh.rs`).
//!
//! A kernel file is the user's, not the guest's; still its every field is checked before it is used, so that no file
//! whatever gives more than an error. Nothing here depends on the host's instruction set: for that reason, of the
//! linux-loader crate only the command line is used, as its loaders of x86 kernels are compiled on x86 hosts alone.

mod bios;
mod bzimage;
mod cmdline;
mod e820;
mod elf;
mod entry;
mod image;
mod initrd;
mod multiboot;
mod pvh;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;
use vm_memory::{GuestMemoryError, GuestMemoryMmap};

pub use e820::{E820Entry, E820Kind};
pub use entry::{Entry, Registers, Segment};

use image::Image;

const MIB: u64 = 1 << 20;

/// Where the initial RAM disk comes from.
#[derive(Clone, Debug)]
pub enum InitrdSource {
    /// A file of the host.
    Path(PathBuf),
    /// The content itself.
    Bytes(Vec<u8>),
}

/// A machine's memory is ready; this is how its first processor starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootState {
    /// Mode and entry point of the boot processor.
    pub entry: Entry,
}

/// Why a machine can't be booted. Each message is one line: what, where, and what to do.
#[derive(Debug, Error)]
pub enum BootError {
    /// A file could not be opened.
    #[error("cannot open {role} {name}: {source}; check the path and its permissions")]
    Open {
        /// `kernel` or `initrd`.
        role: &'static str,
        /// The file.
        name: String,
        /// The host's reason.
        source: io::Error,
    },
    /// A file could not be read.
    #[error("cannot read {role} {name}: {source}; check the file and the disk it is on")]
    Read {
        /// `kernel` or `initrd`.
        role: &'static str,
        /// The file.
        name: String,
        /// The host's reason.
        source: io::Error,
    },
    /// A file of length 0.
    #[error("{role} {name} is empty; was it fully written?")]
    Empty {
        /// `kernel` or `initrd`.
        role: &'static str,
        /// The file.
        name: String,
    },
    /// Something that is no kernel.
    #[error(
        "kernel {name} is {found}; give a Linux bzImage (vmlinuz), a PVH ELF kernel (vmlinux) or a Multiboot kernel for x86-64"
    )]
    NotAKernel {
        /// The file.
        name: String,
        /// What it looks like.
        found: &'static str,
    },
    /// A kernel of another machine.
    #[error("kernel {name} is for {machine}, and this machine is x86-64; give a kernel built for x86-64")]
    WrongMachine {
        /// The file.
        name: String,
        /// Whose it is.
        machine: String,
    },
    /// A kernel inside a compressed file.
    #[error("kernel {name} is a {format} file; decompress it first ({tool})")]
    Compressed {
        /// The file.
        name: String,
        /// The compression.
        format: &'static str,
        /// The command that undoes it.
        tool: &'static str,
    },
    /// A file that ends before what its headers promise.
    #[error("{role} {name} is truncated: {part} ends at byte {need}, the file at byte {have}; copy it again")]
    Truncated {
        /// `kernel` or `initrd`.
        role: &'static str,
        /// The file.
        name: String,
        /// The part that is cut.
        part: &'static str,
        /// Where it should end.
        need: u64,
        /// Where the file ends.
        have: u64,
    },
    /// Headers that contradict themselves.
    #[error("kernel {name} is damaged: {why}; copy or build it again")]
    Malformed {
        /// The file.
        name: String,
        /// The contradiction.
        why: String,
    },
    /// A Multiboot kernel that asks for what this machine hasn't got.
    #[error("kernel {name} asks in its Multiboot header for {what}; build it without")]
    MultibootFeature {
        /// The file.
        name: String,
        /// What it asks for.
        what: String,
    },
    /// A Multiboot kernel that is no ELF file and doesn't say where it goes.
    #[error(
        "kernel {name} has a Multiboot header without addresses (flag bit 16) and is no ELF file; link it as one, or set them"
    )]
    NoMultibootAddresses {
        /// The file.
        name: String,
    },
    /// A bzImage that can only be entered in real or 32-bit protected mode.
    #[error("kernel {name} has no 64-bit entry point (boot protocol {}.{:02}); give a 64-bit kernel, Linux 3.8 or later", .version >> 8, .version & 0xff)]
    No64BitEntry {
        /// The file.
        name: String,
        /// Boot protocol version, major in the high byte.
        version: u16,
    },
    /// An ELF kernel that doesn't say where a PVH guest starts.
    #[error(
        "kernel {name} is an ELF file with neither a PVH entry note nor a Multiboot header; build Linux with CONFIG_PVH=y or give its bzImage"
    )]
    NoPvhEntry {
        /// The file.
        name: String,
    },
    /// The kernel doesn't fit.
    #[error("kernel {name} needs RAM up to {} MiB and the guest has {} MiB there; give it more memory", .need.div_ceil(MIB), .have / MIB)]
    KernelDoesNotFit {
        /// The file.
        name: String,
        /// First address behind the kernel.
        need: u64,
        /// First address behind the guest's low RAM.
        have: u64,
    },
    /// The initial RAM disk doesn't fit between the kernel and the limit of both.
    #[error("initrd {name} of {} KiB does not fit between {floor:#x} (end of the kernel) and {ceiling:#x}; give the guest more memory or shrink the initrd", .len.div_ceil(1024))]
    InitrdDoesNotFit {
        /// The file.
        name: String,
        /// Its length in bytes.
        len: u64,
        /// First free address.
        floor: u64,
        /// First address it may not reach.
        ceiling: u64,
    },
    /// The command line is too long.
    #[error("kernel command line of {len} bytes is longer than the {limit} this kernel takes; shorten it")]
    CmdlineTooLong {
        /// Its length in bytes.
        len: usize,
        /// The most the kernel takes.
        limit: usize,
    },
    /// The command line holds something no kernel can be given.
    #[error("kernel command line is not usable: {0}; correct it")]
    CmdlineInvalid(&'static str),
    /// Guest RAM is missing where the boot protocol needs it.
    #[error("guest memory lacks RAM the boot protocol needs: {0}; give the guest more memory")]
    Ram(#[from] GuestMemoryError),
}

/// What a boot protocol needs beside the kernel.
struct Request<'a> {
    ram: &'a GuestMemoryMmap,
    initrd: Option<&'a Image>,
    cmdline: &'a str,
    /// Address of the ACPI root pointer.
    rsdp: u64,
}

/// Puts the file `kernel`, `initrd` and `cmdline` into `ram` and prepares what the kernel's boot protocol asks for.
///
/// `rsdp` is the guest physical address of the ACPI root pointer, as [`crate::acpi::write_tables`] returns it.
/// All of it may be called again for a reset; the memory written the last time is overwritten.
pub fn load(
    ram: &GuestMemoryMmap,
    kernel: &Path,
    initrd: Option<InitrdSource>,
    cmdline: &str,
    rsdp: u64,
) -> Result<BootState, BootError> {
    let kernel = Image::open("kernel", kernel)?;
    let initrd = match initrd {
        None => None,
        Some(InitrdSource::Path(path)) => Some(Image::open("initrd", &path)?),
        Some(InitrdSource::Bytes(bytes)) => Some(Image::from_bytes("initrd", "(built in)", bytes)?),
    };
    load_image(&kernel, &Request { ram, initrd: initrd.as_ref(), cmdline, rsdp })
}

fn load_image(kernel: &Image, request: &Request) -> Result<BootState, BootError> {
    let entry = match kernel.kind()? {
        image::Kind::BzImage => bzimage::load(kernel, request)?,
        image::Kind::Multiboot(header) => multiboot::load(kernel, &header, request)?,
        image::Kind::Elf => match pvh::load(kernel, request) {
            // Without a PVH note it is more likely that a Multiboot header was meant, if there is a spoilt one.
            Err(error @ (BootError::NoPvhEntry { .. } | BootError::WrongMachine { .. })) => {
                multiboot::find(kernel)?.refuse_damaged(kernel)?;
                return Err(error);
            }
            entry => entry?,
        },
    };
    entry::write_bios_data(request.ram)?;
    Ok(BootState { entry })
}
