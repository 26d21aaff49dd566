//! ELF files as kernels: the header and the program headers, of either class (System V ABI, chapters 4 and 5).

use super::BootError;
use super::image::Image;

pub(super) const PT_LOAD: u32 = 1;
pub(super) const PT_NOTE: u32 = 4;

const CLASS32: u8 = 1;
const CLASS64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
/// Where the machine is told, the same in both classes, and the first byte behind it.
const MACHINE: usize = 18;
const MACHINE_END: u64 = 20;
const ENTRY: usize = 24;

/// Machines a kernel might be for by mistake (`e_machine`).
const MACHINES: [(u16, &str); 9] = [
    (2, "SPARC"),
    (EM_386, "32-bit x86"),
    (8, "MIPS"),
    (20, "PowerPC"),
    (21, "64-bit PowerPC"),
    (22, "IBM Z"),
    (40, "32-bit ARM"),
    (183, "64-bit ARM"),
    (243, "RISC-V"),
];

/// Where the fields of a class are, and how long its words.
struct Form {
    wide: bool,
    header_len: usize,
    table: usize,
    entry_len: usize,
    count: usize,
    /// Length of a program header.
    program_len: usize,
    /// In it: offset, virtual and physical address, length in the file and in memory, alignment.
    program: [usize; 6],
}

const FORM32: Form = Form {
    wide: false,
    header_len: 52,
    table: 28,
    entry_len: 42,
    count: 44,
    program_len: 32,
    program: [4, 8, 12, 16, 20, 28],
};

const FORM64: Form = Form {
    wide: true,
    header_len: 64,
    table: 32,
    entry_len: 54,
    count: 56,
    program_len: 56,
    program: [8, 16, 24, 32, 40, 48],
};

impl Form {
    fn word(&self, bytes: &[u8], at: usize) -> u64 {
        if self.wide { u64_at(bytes, at) } else { u32_at(bytes, at).into() }
    }
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u16::from_le_bytes(*b))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b))
}

/// The files that a boot protocol takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Classes {
    /// 64-bit files for x86-64.
    Only64,
    /// Those, and 32-bit files for either x86.
    Both,
}

/// What a loader needs of an ELF file.
pub(super) struct Elf {
    /// The entry point, a virtual address.
    pub(super) entry: u64,
    pub(super) segments: Vec<Segment>,
}

/// A program header. Nothing of it is checked.
pub(super) struct Segment {
    pub(super) kind: u32,
    pub(super) offset: u64,
    pub(super) virtual_start: u64,
    /// The physical address.
    pub(super) start: u64,
    pub(super) file_len: u64,
    pub(super) len: u64,
    pub(super) align: u64,
}

/// Reads and checks the ELF header, and reads the program headers.
pub(super) fn read(kernel: &Image, classes: Classes) -> Result<Elf, BootError> {
    let malformed = |why: &str| BootError::Malformed { name: kernel.name(), why: why.into() };
    let longest = FORM64.header_len;
    let header =
        kernel.read("the ELF header", 0, usize::try_from(kernel.len()).map_or(longest, |len| len.min(longest)))?;
    // The machine is told first: it is what the user can do something about. The class and byte order of a file for
    // another machine may be anything.
    kernel.require("the ELF header", 0, MACHINE_END)?;
    let class = header.get(4).copied().unwrap_or(0);
    check_machine(kernel, &header, class, classes)?;
    let form = match class {
        CLASS32 => FORM32,
        CLASS64 => FORM64,
        _ => return Err(malformed("its ELF class is neither 32 nor 64 bits")),
    };
    kernel.require("the ELF header", 0, form.header_len as u64)?;
    let (table, entry_len) = (form.word(&header, form.table), u16_at(&header, form.entry_len));
    let count = u16_at(&header, form.count);
    if count == 0 {
        return Err(malformed("it has no program headers, like an object file or a module"));
    }
    if usize::from(entry_len) != form.program_len {
        let why = if form.wide { "not of the 64-bit size" } else { "not of the 32-bit size" };
        return Err(malformed(&format!("its program headers are {why}")));
    }
    let headers = kernel.read("the program header table", table, usize::from(count) * form.program_len)?;
    let segment = |h: &[u8]| {
        let [offset, virtual_start, start, file_len, len, align] = form.program.map(|at| form.word(h, at));
        Segment { kind: u32_at(h, 0), offset, virtual_start, start, file_len, len, align }
    };
    let segments = headers.chunks_exact(form.program_len).map(segment).collect();
    Ok(Elf { entry: form.word(&header, ENTRY), segments })
}

fn check_machine(kernel: &Image, header: &[u8], class: u8, classes: Classes) -> Result<(), BootError> {
    let little = header.get(5) == Some(&LITTLE_ENDIAN);
    let machine = if little { u16_at(header, MACHINE) } else { u16_at(header, MACHINE).swap_bytes() };
    let ours = match class {
        CLASS32 => classes == Classes::Both && matches!(machine, EM_386 | EM_X86_64),
        _ => machine == EM_X86_64,
    };
    if ours && little {
        return Ok(());
    }
    let known = MACHINES.iter().find(|(number, _)| *number == machine);
    let machine = match known {
        Some((_, known)) => (*known).into(),
        None if machine == EM_X86_64 && !little => "a big-endian machine".into(),
        None if machine == EM_X86_64 => "the x32 ABI (a 32-bit ELF file)".into(),
        None => format!("ELF machine {machine}"),
    };
    Err(BootError::WrongMachine { name: kernel.name(), machine })
}
