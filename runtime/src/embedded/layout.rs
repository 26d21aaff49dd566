//! The guest's memory map: where each part of the image lies, the memory it uses beyond it, and with which rights.

/// Where the image is loaded, and entered in 32-bit protected mode.
pub(super) const LOAD: u64 = 0x10_0000;
pub(super) const CODE: u64 = LOAD + 0x1000;
pub(super) const USER_CODE: u64 = LOAD + 0x5000;
pub(super) const USER_DATA: u64 = LOAD + 0x6000;
pub(super) const GDT: u64 = LOAD + 0x7000;
pub(super) const TSS: u64 = GDT + 0x100;
/// Operands of LGDT and LIDT.
pub(super) const GDT_POINTER: u64 = GDT + 0x200;
pub(super) const IDT_POINTER: u64 = GDT + 0x210;
pub(super) const IDT: u64 = LOAD + 0x8000;
pub(super) const DATA: u64 = LOAD + 0x9000;
pub(super) const END: u64 = LOAD + 0xb000;

/// Page tables: level 4, level 3, four of level 2, and the level 1 of the first 2 MiB.
pub(super) const TABLES: u64 = 0x11_0000;
pub(super) const DIRECTORIES: u64 = TABLES + 0x2000;
pub(super) const PAGE_TABLE: u64 = TABLES + 0x6000;
pub(super) const TABLES_END: u64 = TABLES + 0x7000;

/// Tops of the stacks: the kernel's, that of interrupts out of ring 3, of system calls, of double faults, the user's.
pub(super) const KERNEL_STACK: u64 = 0x12_2000;
pub(super) const INTERRUPT_STACK: u64 = 0x12_4000;
pub(super) const SYSCALL_STACK: u64 = 0x12_6000;
pub(super) const DOUBLE_FAULT_STACK: u64 = 0x12_8000;
pub(super) const USER_STACK: u64 = 0x12_a000;
/// A page for code that changes.
pub(super) const PATCH: u64 = 0x12_a000;
/// A page that is not mapped until it is touched, and the memory that is then put there.
pub(super) const FRAME: u64 = 0x1f_e000;
pub(super) const DEMAND: u64 = 0x1f_f000;

/// Buffers of the checks, in 2 MiB pages.
pub(super) const SIEVE: u64 = 0x20_0000;
pub(super) const CRC_TABLE: u64 = 0x30_0000;
pub(super) const MATRICES: u64 = 0x31_0000;
pub(super) const STRINGS: u64 = 0x34_0000;
pub(super) const SAMPLES: u64 = 0x35_0000;
pub(super) const WORDS: u64 = 0x36_0000;

/// Selectors, in the order that SYSCALL and SYSRET want (SDM vol. 3 §5.8.8).
pub(super) const KERNEL_CODE: u16 = 0x08;
pub(super) const KERNEL_DATA: u16 = 0x10;
pub(super) const USER_BASE: u16 = 0x18;
pub(super) const TASK: u16 = 0x30;

/// Page-table entry bits (SDM vol. 3 §4.5.4).
pub(super) mod page {
    pub const PRESENT: u64 = 1 << 0;
    pub const WRITE: u64 = 1 << 1;
    pub const USER: u64 = 1 << 2;
    pub const UNCACHED: u64 = 1 << 4;
    pub const LARGE: u64 = 1 << 7;
    pub const NO_EXECUTE: u64 = 1 << 63;
    /// Rights of kernel data.
    pub const DATA: u64 = PRESENT | WRITE | NO_EXECUTE;
    /// Rights of kernel code.
    pub const CODE: u64 = PRESENT;
}

/// Rights in the first 2 MiB: from which address, up to the next.
pub(super) const RIGHTS: [(u64, u64); 9] = [
    (0, page::DATA),
    (LOAD, page::CODE),
    (USER_CODE, page::CODE | page::USER),
    (USER_DATA, page::DATA | page::USER),
    (GDT, page::DATA),
    (DOUBLE_FAULT_STACK, page::DATA | page::USER),
    (PATCH, page::PRESENT | page::WRITE),
    (PATCH + 0x1000, page::DATA),
    (DEMAND, 0),
];

/// Null, kernel code and data, user 32-bit code (unused, but SYSRET counts it), data and 64-bit code, and the TSS.
pub(super) fn descriptors() -> [u64; 8] {
    let tss = 0x67 | (TSS & 0xff_ffff) << 16 | 0x89 << 40 | (TSS >> 24 & 0xff) << 56;
    [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_fb00_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        tss,
        0,
    ]
}

/// The 64-bit task state (SDM vol. 3 §8.7): the stack of ring 0 at 4, interrupt stack 1 at 24h; no I/O bitmap.
pub(super) fn task_state() -> [u8; 0x68] {
    let mut tss = [0; 0x68];
    tss[4..12].copy_from_slice(&INTERRUPT_STACK.to_le_bytes());
    tss[0x24..0x2c].copy_from_slice(&DOUBLE_FAULT_STACK.to_le_bytes());
    tss[0x66..].copy_from_slice(&0x68u16.to_le_bytes());
    tss
}

/// The operand of LGDT or LIDT: limit, base.
pub(super) fn table_pointer(base: u64, bytes: u16) -> [u8; 10] {
    let mut pointer = [0; 10];
    pointer[..2].copy_from_slice(&(bytes - 1).to_le_bytes());
    pointer[2..].copy_from_slice(&base.to_le_bytes());
    pointer
}
