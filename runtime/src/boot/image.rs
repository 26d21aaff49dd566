//! A file to load, and what kind of kernel it is.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{BootError, multiboot};

/// The most that is read from something that is no regular file, and so has no length: a pipe, say.
const STREAM_LIMIT: u64 = 1 << 30;

enum Data {
    File(File),
    Bytes(Vec<u8>),
}

/// A kernel or an initial RAM disk: named for messages, of known length, never empty.
pub(super) struct Image {
    role: &'static str,
    name: String,
    data: Data,
    len: u64,
}

/// The kernels that can be booted.
pub(super) enum Kind {
    BzImage,
    Multiboot(multiboot::Header),
    Elf,
}

/// Leading bytes of compressed files and the commands that undo them.
const COMPRESSED: [(&[u8], &str, &str); 6] = [
    (&[0x1f, 0x8b], "gzip", "gunzip"),
    (&[0xfd, b'7', b'z', b'X', b'Z', 0], "xz", "unxz"),
    (&[0x28, 0xb5, 0x2f, 0xfd], "zstd", "unzstd"),
    (b"BZh", "bzip2", "bunzip2"),
    (&[0x04, 0x22, 0x4d, 0x18], "lz4", "unlz4"),
    (&[0x02, 0x21, 0x4c, 0x18], "lz4", "unlz4"),
];

/// Marks of kernel images of other machines: offset, bytes, machine.
const OTHER_MACHINES: [(usize, &[u8], &str); 4] = [
    (0x38, b"ARM\x64", "64-bit ARM"),
    (0x38, b"RSC\x05", "RISC-V"),
    (0x24, &[0x18, 0x28, 0x6f, 0x01], "32-bit ARM"),
    (0x04, b"zimg", "an EFI machine without the x86 boot protocol"),
];

/// Marks of files that are often given by mistake: offset, bytes, what they are.
const NO_KERNELS: [(usize, &[u8], &str); 7] = [
    (0, b"070701", "a cpio archive, which would do as an initrd"),
    (0, b"MZ", "an EFI or Windows program without a Linux boot header"),
    (0, b"QFI\xfb", "a qcow2 disk image"),
    (0, b"!<arch>\n", "a package or library archive"),
    (0, b"hsqs", "a squashfs file system"),
    (0, b"#!", "a script"),
    (0x1fe, &[0x55, 0xaa], "a disk image or boot sector"),
];

fn marked((offset, mark): (usize, &[u8]), head: &[u8]) -> bool {
    head.get(offset..).is_some_and(|rest| rest.starts_with(mark))
}

impl Image {
    pub(super) fn open(role: &'static str, path: &Path) -> Result<Image, BootError> {
        let name = path.display().to_string();
        let opened = File::open(path).and_then(|file| Ok((file.metadata()?, file)));
        let (metadata, file) = opened.map_err(|source| BootError::Open { role, name: name.clone(), source })?;
        if metadata.is_file() {
            let len = metadata.len();
            return Image { role, name, data: Data::File(file), len }.not_empty();
        }
        // A directory fails at the first read, in the host's words.
        let mut bytes = Vec::new();
        let read = file.take(STREAM_LIMIT + 1).read_to_end(&mut bytes).and_then(|_| {
            let too_long = bytes.len() as u64 > STREAM_LIMIT;
            if too_long { Err(io::Error::other("it is no regular file and has no end")) } else { Ok(()) }
        });
        match read {
            Ok(()) => Image::from_bytes(role, &name, bytes),
            Err(source) => Err(BootError::Read { role, name, source }),
        }
    }

    pub(super) fn from_bytes(role: &'static str, name: &str, bytes: Vec<u8>) -> Result<Image, BootError> {
        let len = bytes.len() as u64;
        Image { role, name: name.into(), data: Data::Bytes(bytes), len }.not_empty()
    }

    fn not_empty(self) -> Result<Image, BootError> {
        if self.len == 0 { Err(BootError::Empty { role: self.role, name: self.name }) } else { Ok(self) }
    }

    pub(super) fn name(&self) -> String {
        self.name.clone()
    }

    /// Length in bytes, not 0.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Checks that `len` bytes at `offset` exist, naming them `part` if not.
    pub(super) fn require(&self, part: &'static str, offset: u64, len: u64) -> Result<(), BootError> {
        let need = offset.saturating_add(len);
        if need <= self.len {
            return Ok(());
        }
        Err(BootError::Truncated { role: self.role, name: self.name(), part, need, have: self.len })
    }

    /// Reads `len` bytes at `offset`. The caller bounds `len`.
    pub(super) fn read(&self, part: &'static str, offset: u64, len: usize) -> Result<Vec<u8>, BootError> {
        self.require(part, offset, len as u64)?;
        let mut buffer = vec![0; len];
        let read = match &self.data {
            Data::File(file) => file.read_exact_at(&mut buffer, offset),
            Data::Bytes(bytes) => {
                // `require` put the range inside the vector.
                let start = offset as usize;
                bytes
                    .get(start..start + len)
                    .map(|b| buffer.copy_from_slice(b))
                    .ok_or(io::ErrorKind::UnexpectedEof.into())
            }
        };
        read.map_err(|source| self.read_error(source))?;
        Ok(buffer)
    }

    /// Copies `len` bytes at `offset` to guest physical address `gpa`. The caller has checked that RAM is there.
    pub(super) fn copy_to(
        &self,
        ram: &GuestMemoryMmap,
        gpa: u64,
        part: &'static str,
        offset: u64,
        len: u64,
    ) -> Result<(), BootError> {
        self.require(part, offset, len)?;
        // Guest RAM is mapped, so a length inside it is a `usize`.
        let count = len as usize;
        match &self.data {
            Data::File(file) => {
                let mut file = file;
                file.seek(SeekFrom::Start(offset)).map_err(|source| self.read_error(source))?;
                ram.read_exact_volatile_from(GuestAddress(gpa), &mut file, count)?;
            }
            Data::Bytes(bytes) => {
                let start = offset as usize;
                ram.write_slice(bytes.get(start..start + count).unwrap_or_default(), GuestAddress(gpa))?;
            }
        }
        Ok(())
    }

    /// Fills guest memory at `(start, len)`: with `file_len` bytes at `offset`, no more than `len`, then with zeros. The
    /// caller has checked that RAM is there.
    pub(super) fn fill(
        &self,
        ram: &GuestMemoryMmap,
        (start, len): (u64, u64),
        part: &'static str,
        offset: u64,
        file_len: u64,
    ) -> Result<(), BootError> {
        self.copy_to(ram, start, part, offset, file_len)?;
        let zeros = [0; 4096];
        let (mut at, end) = (start + file_len, start + len);
        while at < end {
            let step = (end - at).min(zeros.len() as u64);
            ram.write_slice(zeros.get(..step as usize).unwrap_or_default(), GuestAddress(at))?;
            at += step;
        }
        Ok(())
    }

    fn read_error(&self, source: io::Error) -> BootError {
        BootError::Read { role: self.role, name: self.name(), source }
    }

    /// Tells a kernel by its content.
    pub(super) fn kind(&self) -> Result<Kind, BootError> {
        let head = self.read("the start of the file", 0, self.len.min(0x210) as usize)?;
        let name = || self.name();
        if marked((0x1fe, &[0x55, 0xaa]), &head) && marked((0x202, b"HdrS"), &head) {
            return Ok(Kind::BzImage);
        }
        // Before ELF files are told by their start: many a Multiboot kernel is one.
        let header = match multiboot::find(self)? {
            multiboot::Found::Header(header) => return Ok(Kind::Multiboot(header)),
            found => found,
        };
        if head.starts_with(b"\x7fELF") {
            return Ok(Kind::Elf);
        }
        if let Some((_, format, tool)) = COMPRESSED.iter().find(|(mark, ..)| head.starts_with(mark)) {
            return Err(BootError::Compressed { name: name(), format, tool });
        }
        if let Some((.., machine)) = OTHER_MACHINES.iter().find(|(at, mark, _)| marked((*at, mark), &head)) {
            return Err(BootError::WrongMachine { name: name(), machine: (*machine).into() });
        }
        if let Some((.., found)) = NO_KERNELS.iter().find(|(at, mark, _)| marked((*at, mark), &head)) {
            return Err(BootError::NotAKernel { name: name(), found });
        }
        header.refuse_damaged(self)?;
        // Every bzImage and every ELF kernel is longer than its own headers.
        let found = if head.len() < 0x210 { "too short to be a kernel" } else { "of no known kernel format" };
        Err(BootError::NotAKernel { name: name(), found })
    }
}
