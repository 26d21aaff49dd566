//! The state in which a kernel is entered, and the tables in low memory that this state points to.
//!
//! Everything lies in conventional memory, free for the kernel once it has its own. A Multiboot kernel may be loaded
//! there itself, and what it is given goes to where it left room (`multiboot.rs`); the others find
//!
//! | address | content |
//! |---|---|
//! | 0x0400 | BIOS data area |
//! | 0x5000 | PVH start info, modules and memory map |
//! | 0x6000 | global descriptor table |
//! | 0x7000 | Linux boot parameters (the zero page) |
//! | 0x8000 | stack, one page |
//! | 0x9000 | page tables, six pages |
//! | 0x2_0000 | command line |

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::e820::EBDA;

pub(super) const START_INFO: u64 = 0x5000;
const GDT: u64 = 0x6000;
pub(super) const ZERO_PAGE: u64 = 0x7000;
const STACK_TOP: u64 = 0x9000;
const PAGE_TABLES: u64 = 0x9000;

/// Selectors that the Linux/x86 boot protocol fixes (`__BOOT_CS`, `__BOOT_DS`), and the task register's.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

/// Segment descriptors (SDM vol. 3 §3.4.5): flat, present, ring 0, already accessed.
const CODE64: u64 = 0x00af_9b00_0000_ffff;
const CODE32: u64 = 0x00cf_9b00_0000_ffff;
const DATA32: u64 = 0x00cf_9300_0000_ffff;
/// A busy TSS at 0 with the limit PVH asks for (0x67). In long mode a null doubleword follows it, the high base.
const BUSY_TSS: u64 = 0x0000_8b00_0000_0067;

/// Two unused slots, code, data, and the TSS with its upper half.
const GDT_SLOTS: usize = 6;
pub(super) const GDT_LEN: usize = GDT_SLOTS * 8;
const GDT_LIMIT: u16 = (GDT_LEN - 1) as u16;

/// By this value in EAX a kernel knows that a Multiboot loader started it.
const MULTIBOOT_LOADER: u32 = 0x2bad_b002;

/// Gigabytes mapped one to one at a 64-bit entry.
const MAPPED_GIB: u64 = 4;
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;

/// How the boot processor starts. Addresses are guest physical, which is what the guest sees: paging is off or one to
/// one. Interrupts are disabled; registers not named are 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// In 64-bit mode, as the Linux/x86 64-bit boot protocol asks: the low 4 GiB mapped one to one.
    Long64 {
        /// Entry point.
        rip: u64,
        /// Address of the boot parameters.
        rsi: u64,
        /// Top of a page of stack.
        rsp: u64,
        /// Level-4 page table.
        cr3: u64,
        /// Address of the global descriptor table.
        gdt_base: u64,
        /// Its limit.
        gdt_limit: u16,
    },
    /// In 32-bit protected mode without paging, as the PVH and Multiboot protocols ask.
    Protected32 {
        /// Entry point.
        eip: u32,
        /// The mark of a Multiboot loader; 0 under PVH.
        eax: u32,
        /// Address of the start info, or of the Multiboot information.
        ebx: u32,
        /// Top of a page of stack.
        esp: u32,
        /// Address of the global descriptor table.
        gdt_base: u64,
        /// Its limit.
        gdt_limit: u16,
    },
}

/// A segment register: the visible selector and the hidden descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Base linear address.
    pub base: u64,
    /// Limit in bytes, granularity applied.
    pub limit: u32,
    /// Descriptor bits 8–23 of the high doubleword shifted down by 8: type 3:0, S 4, DPL 6:5, P 7, AVL 12, L 13,
    /// D/B 14, G 15.
    pub attr: u16,
}

impl Segment {
    fn new(selector: u16, descriptor: u64) -> Segment {
        let attr = (descriptor >> 40) as u16 & 0xf0ff;
        // The descriptors above are flat with a granularity of pages, or the TSS, whose limit is below 64 KiB.
        let limit = if attr & 0x8000 != 0 { u32::MAX } else { descriptor as u32 & 0xffff };
        Segment { selector, base: 0, limit, attr }
    }
}

/// Every register that an entry sets. Those of the general registers that are not here are 0, as are CR2 and the base
/// and limit of the IDT; the LDT register is null.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registers {
    /// Entry point.
    pub rip: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Boot parameters of Linux, else 0.
    pub rsi: u64,
    /// Mark of a Multiboot loader, else 0.
    pub rax: u64,
    /// Start info of PVH, information of Multiboot, else 0.
    pub rbx: u64,
    /// Flags: only the bit that is always set, so interrupts are off.
    pub rflags: u64,
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// Address of the global descriptor table.
    pub gdt_base: u64,
    /// Its limit.
    pub gdt_limit: u16,
    /// CS.
    pub code: Segment,
    /// DS, ES, FS, GS and SS.
    pub data: Segment,
    /// TR.
    pub task: Segment,
}

const RFLAGS_FIXED: u64 = 1 << 1;
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

impl Entry {
    /// The boot processor's registers at this entry.
    pub fn registers(&self) -> Registers {
        let data = Segment::new(DATA, DATA32);
        let task = Segment::new(TASK, BUSY_TSS);
        match *self {
            Entry::Long64 { rip, rsi, rsp, cr3, gdt_base, gdt_limit } => Registers {
                rip,
                rsp,
                rsi,
                rax: 0,
                rbx: 0,
                rflags: RFLAGS_FIXED,
                cr0: CR0_PE | CR0_ET | CR0_PG,
                cr3,
                cr4: CR4_PAE,
                efer: EFER_LME | EFER_LMA,
                gdt_base,
                gdt_limit,
                code: Segment::new(CODE, CODE64),
                data,
                task,
            },
            Entry::Protected32 { eip, eax, ebx, esp, gdt_base, gdt_limit } => Registers {
                rip: eip.into(),
                rsp: esp.into(),
                rsi: 0,
                rax: eax.into(),
                rbx: ebx.into(),
                rflags: RFLAGS_FIXED,
                cr0: CR0_PE | CR0_ET,
                cr3: 0,
                cr4: 0,
                efer: 0,
                gdt_base,
                gdt_limit,
                code: Segment::new(CODE, CODE32),
                data,
                task,
            },
        }
    }
}

/// Writes descriptor and page tables for a 64-bit entry at `rip`.
pub(super) fn long64(ram: &GuestMemoryMmap, rip: u64) -> Result<Entry, GuestMemoryError> {
    write_gdt(ram, GDT, CODE64)?;
    write_page_tables(ram)?;
    Ok(Entry::Long64 { rip, rsi: ZERO_PAGE, rsp: STACK_TOP, cr3: PAGE_TABLES, gdt_base: GDT, gdt_limit: GDT_LIMIT })
}

/// Writes the descriptor table for a 32-bit entry at `eip`.
pub(super) fn protected32(ram: &GuestMemoryMmap, eip: u32) -> Result<Entry, GuestMemoryError> {
    let (ebx, esp) = (START_INFO as u32, STACK_TOP as u32);
    write_gdt(ram, GDT, CODE32)?;
    Ok(Entry::Protected32 { eip, eax: 0, ebx, esp, gdt_base: GDT, gdt_limit: GDT_LIMIT })
}

/// Writes the descriptor table of a Multiboot kernel, entered at `eip`, to `gdt_base`, where [`GDT_LEN`] bytes are kept
/// for it. `ebx` is the address of the Multiboot information, `esp` the top of a page of stack.
pub(super) fn multiboot(
    ram: &GuestMemoryMmap,
    gdt_base: u64,
    eip: u32,
    ebx: u32,
    esp: u32,
) -> Result<Entry, GuestMemoryError> {
    write_gdt(ram, gdt_base, CODE32)?;
    Ok(Entry::Protected32 { eip, eax: MULTIBOOT_LOADER, ebx, esp, gdt_base, gdt_limit: GDT_LIMIT })
}

fn write_gdt(ram: &GuestMemoryMmap, at: u64, code: u64) -> Result<(), GuestMemoryError> {
    let slots: [u64; GDT_SLOTS] = [0, 0, code, DATA32, BUSY_TSS, 0];
    ram.write_slice(&bytes_of(slots), GuestAddress(at))
}

/// Maps the low 4 GiB one to one in pages of 2 MiB: a level-4 table, a level-3 table and four level-2 tables, in
/// consecutive pages (SDM vol. 3 §4.5).
fn write_page_tables(ram: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    let table = |n: u64| (PAGE_TABLES + n * 0x1000) | PRESENT_WRITABLE;
    let level4 = (0..512).map(|i| if i == 0 { table(1) } else { 0 });
    let level3 = (0..512).map(|i| if i < MAPPED_GIB { table(2 + i) } else { 0 });
    let level2 = (0..MAPPED_GIB * 512).map(|i| (i << 21) | LARGE_PAGE | PRESENT_WRITABLE);
    ram.write_slice(&bytes_of(level4.chain(level3).chain(level2)), GuestAddress(PAGE_TABLES))
}

fn bytes_of(words: impl IntoIterator<Item = u64>) -> Vec<u8> {
    words.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// Leaves what a BIOS leaves for those who look for the end of conventional memory: the segment of the extended BIOS
/// data area at 0x40e, the KiB below it at 0x413, and the area's own length in KiB at its start.
pub(super) fn write_bios_data(ram: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    ram.write_obj((EBDA >> 4) as u16, GuestAddress(0x40e))?;
    ram.write_obj((EBDA >> 10) as u16, GuestAddress(0x413))?;
    ram.write_obj(1u8, GuestAddress(EBDA))
}
