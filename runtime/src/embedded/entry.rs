//! From 32-bit protected mode to 64-bit code: the page tables and the way into long mode (SDM vol. 3 §10.8.5).

use iced_x86::code_asm::*;

use super::builder::{Builder, Emit};
use super::layout::{self, page};

const CR4_PAE_OSFXSR_OSXMMEXCPT: u32 = 1 << 5 | 1 << 9 | 1 << 10;
const EFER: u32 = 0xc000_0080;
const EFER_SCE_LME_NXE: u32 = 1 << 0 | 1 << 8 | 1 << 11;
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;
/// PG, WP, NE, ET, MP, PE.
const CR0: u32 = 1 << 31 | 1 << 16 | 1 << 5 | 1 << 4 | 1 << 1 | 1 << 0;

/// Entries of four directories, 2 MiB each.
const LARGE_PAGES: u32 = 2048;
/// From here on there are devices: the fourth gigabyte.
const FIRST_DEVICE_PAGE: u32 = 1536;

/// The 32-bit code, which begins at the entry point.
pub(super) fn code() -> Emit<Vec<u8>> {
    let mut a = CodeAssembler::new(32)?;
    a.cld()?;
    a.mov(esp, layout::KERNEL_STACK as u32)?;
    page_tables(&mut a)?;
    // The order matters: PAE, the tables and EFER.LME must be set when paging is turned on.
    a.mov(eax, CR4_PAE_OSFXSR_OSXMMEXCPT)?;
    a.mov(cr4, eax)?;
    a.mov(eax, layout::TABLES as u32)?;
    a.mov(cr3, eax)?;
    a.mov(ecx, EFER)?;
    a.mov(eax, EFER_SCE_LME_NXE)?;
    a.xor(edx, edx)?;
    a.wrmsr()?;
    a.mov(eax, CR0)?;
    a.mov(cr0, eax)?;
    // Still 32-bit code, in compatibility mode, until CS is loaded with a 64-bit segment.
    a.lgdt(ptr(layout::GDT_POINTER))?;
    a.push(i32::from(layout::KERNEL_CODE))?;
    a.push(layout::CODE as i32)?;
    a.retf()?;
    a.assemble(layout::LOAD)
}

/// Maps the first 4 GiB to themselves: the first 2 MiB in pages with rights of their own, the rest in large pages.
fn page_tables(a: &mut CodeAssembler) -> Emit {
    const TABLE: u64 = page::PRESENT | page::WRITE | page::USER;
    a.mov(edi, layout::TABLES as u32)?;
    a.mov(ecx, (layout::TABLES_END - layout::TABLES) as u32 / 4)?;
    a.xor(eax, eax)?;
    a.rep().stosd()?;
    let third = layout::TABLES + 0x1000;
    a.mov(dword_ptr(layout::TABLES), (third | TABLE) as u32)?;
    for n in 0..4 {
        a.mov(dword_ptr(third + 8 * n), ((layout::DIRECTORIES + 0x1000 * n) | TABLE) as u32)?;
    }

    fill(a, layout::DIRECTORIES, 21, 0..FIRST_DEVICE_PAGE, page::DATA | page::LARGE)?;
    let devices = page::DATA | page::LARGE | page::UNCACHED;
    fill(a, layout::DIRECTORIES, 21, FIRST_DEVICE_PAGE..LARGE_PAGES, devices)?;

    a.mov(dword_ptr(layout::DIRECTORIES), (layout::PAGE_TABLE | TABLE) as u32)?;
    a.mov(dword_ptr(layout::DIRECTORIES + 4), 0)?;
    let ends = layout::RIGHTS.iter().skip(1).map(|r| r.0).chain([0x20_0000]);
    for (&(start, rights), end) in layout::RIGHTS.iter().zip(ends) {
        if rights != 0 {
            fill(a, layout::PAGE_TABLE, 12, (start >> 12) as u32..(end >> 12) as u32, rights)?;
        }
    }
    Ok(())
}

/// Writes the entries `range` of a table: pages of 2^`shift` bytes mapped to themselves.
fn fill(a: &mut CodeAssembler, table: u64, shift: u32, range: std::ops::Range<u32>, rights: u64) -> Emit {
    let mut next = a.create_label();
    a.mov(ecx, range.start)?;
    a.set_label(&mut next)?;
    a.mov(eax, ecx)?;
    a.shl(eax, shift)?;
    a.or(eax, rights as u32)?;
    a.mov(dword_ptr(table) + ecx * 8, eax)?;
    a.mov(dword_ptr(table + 4) + ecx * 8, (rights >> 32) as u32)?;
    a.inc(ecx)?;
    a.cmp(ecx, range.end)?;
    a.jne(next)
}

/// The first 64-bit instructions: data segments, the task register, the interrupt table.
pub(super) fn start(b: &mut Builder) -> Emit {
    let a = &mut b.a;
    a.mov(rsp, layout::KERNEL_STACK)?;
    a.mov(eax, u32::from(layout::KERNEL_DATA))?;
    a.mov(ds, eax)?;
    a.mov(es, eax)?;
    a.mov(ss, eax)?;
    a.xor(eax, eax)?;
    a.mov(fs, eax)?;
    a.mov(gs, eax)?;
    a.mov(eax, u32::from(layout::TASK))?;
    a.ltr(ax)?;
    a.lidt(ptr(layout::IDT_POINTER))
}

/// The mode is what the bits say it is.
pub(super) fn long_mode(b: &mut Builder) -> Emit {
    b.check("long mode, 4 GiB mapped, code and data kept apart (NX, WP)", |b| {
        b.a.mov(ecx, EFER)?;
        b.a.rdmsr()?;
        b.a.and(eax, EFER_LME_LMA as u32)?;
        b.expect(EFER_LME_LMA)?;
        b.a.mov(rax, cr0)?;
        b.a.and(eax, CR0)?;
        b.expect(u64::from(CR0))?;
        // A 64-bit register holds what a 32-bit one cannot.
        b.a.mov(rax, 0x1234_5678_9abc_def0u64)?;
        b.a.bswap(rax)?;
        b.expect(0x1234_5678_9abc_def0u64.swap_bytes())
    })
}

/// Prints the processor's name (CPUID leaves 8000_0002h to 8000_0004h).
pub(super) fn processor(b: &mut Builder) -> Emit {
    let name = b.data.words(&[0; 7]);
    b.say("       processor: ")?;
    for leaf in 0..3u64 {
        b.a.mov(eax, 0x8000_0002 + leaf as u32)?;
        b.a.cpuid()?;
        for (n, r) in [eax, ebx, ecx, edx].into_iter().enumerate() {
            b.a.mov(dword_ptr(name + 16 * leaf + 4 * n as u64), r)?;
        }
    }
    b.a.mov(rsi, name)?;
    b.a.call(b.call.print)?;
    b.say("\r\n")
}
