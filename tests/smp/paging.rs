//! Page tables that one CPU changes while others walk them.

use iced_x86::code_asm::*;

use crate::code::write_function;
use crate::support::smp::*;

/// What CPUs other than the first do in the tests of page tables: an interrupt has them drop a translation.
const SHOOTDOWN: u32 = 0x40;
const ACKNOWLEDGED: u32 = FREE;
const STOP: u32 = FREE + 0x40;

/// Emits the handler, which drops what is known of the page at `linear`.
fn shootdown_handler(g: &mut Smp, linear: u32) -> Done {
    g.handler(SHOOTDOWN as u8)?;
    g.push(rax)?;
    g.invlpg(byte_ptr(linear))?;
    g.lock().inc(dword_ptr(ACKNOWLEDGED))?;
    g.eoi()?;
    g.pop(rax)?;
    g.iretq()
}

/// Emits a shootdown, acknowledged by all. ESI counts acknowledgements.
fn shoot_down(g: &mut Smp, linear: u32) -> Done {
    g.invlpg(byte_ptr(linear))?;
    let others = g.cpus as i32 - 1;
    g.add(esi, others)?;
    g.ipi(0, ASSERT | OTHERS | SHOOTDOWN)?;
    g.wait_for(ACKNOWLEDGED, esi)
}

/// A page is mapped elsewhere, and behind the shootdown nobody reads, writes or executes through the old mapping.
fn shootdowns(g: &mut Smp) -> Done {
    const ROUNDS: u32 = 300;
    const LINEAR: u32 = SMALL_PAGES;
    /// Four pages that it is mapped to by turns.
    const PAGES: u32 = SMALL_PAGES + 0x1_0000;
    const WRONG: u32 = FREE + 0x80;
    const LATE: u32 = FREE + 0xc0;
    const GOOD: u32 = 1;
    const BAD: u32 = 0xdead;
    /// In each page: the value that is read, counters by CPU, and a function.
    const COUNTERS: i32 = 0x40;
    const CODE: i32 = 0x800;
    let mut main = g.create_label();
    g.jmp(main)?;
    shootdown_handler(g, LINEAR)?;

    g.place(&mut main)?;
    g.on(0, |g| {
        for page in 0..4 {
            let at = PAGES + 0x1000 * page;
            g.mov(dword_ptr(at), GOOD)?;
            g.mov(edi, at + CODE as u32)?;
            g.mov(ebx, GOOD)?;
            write_function(g)?;
        }
        g.mov(qword_ptr(PAGE_TABLE), (PAGES | 0x67) as i32)
    })?;
    g.start_others()?;
    g.not_on(0, |g| {
        g.sti()?;
        let again = g.here()?;
        for look in 0..2 {
            let mut good = g.create_label();
            if look == 0 {
                g.mov(eax, dword_ptr(LINEAR))?;
            } else {
                g.mov(edi, LINEAR + CODE as u32)?;
                g.call(rdi)?;
            }
            g.cmp(eax, GOOD as i32)?;
            g.je(good)?;
            g.lock().inc(dword_ptr(WRONG))?;
            g.place(&mut good)?;
        }
        g.inc(dword_ptr(rbp * 8 + (LINEAR as i32 + COUNTERS)))?;
        g.cmp(dword_ptr(STOP), 0)?;
        g.je(again)?;
        g.cli()
    })?;
    g.on(0, |g| {
        g.xor(esi, esi)?;
        g.mov(r12d, PAGES)?;
        g.mov(ebx, 1)?;
        let again = g.here()?;
        g.mov(eax, ebx)?;
        g.and(eax, 3)?;
        g.shl(eax, 12)?;
        g.add(eax, (PAGES | 0x67) as i32)?;
        g.mov(qword_ptr(PAGE_TABLE), rax)?;
        shoot_down(g, LINEAR)?;
        g.mov(dword_ptr(r12), BAD)?;
        g.mov(dword_ptr(r12 + CODE + 1), BAD)?;
        for cpu in 1..g.cpus as i32 {
            g.mov(dword_ptr(r12 + COUNTERS + 8 * cpu), 0)?;
        }
        g.mov(ecx, ebx)?;
        g.and(ecx, 0xff)?;
        g.inc(ecx)?;
        let wait = g.here()?;
        g.dec(ecx)?;
        g.jne(wait)?;
        for cpu in 1..g.cpus as i32 {
            let mut good = g.create_label();
            g.cmp(dword_ptr(r12 + COUNTERS + 8 * cpu), 0)?;
            g.je(good)?;
            g.inc(dword_ptr(LATE))?;
            g.place(&mut good)?;
        }
        g.mov(dword_ptr(r12), GOOD)?;
        g.mov(dword_ptr(r12 + CODE + 1), GOOD)?;
        g.mov(r12d, eax)?;
        g.and(r12d, !0xfff)?;
        g.inc(ebx)?;
        g.cmp(ebx, ROUNDS as i32)?;
        g.jbe(again)?;
        g.mov(dword_ptr(STOP), 1)?;
        g.check_at("reads and fetches by an old mapping", WRONG, 0)?;
        g.check_at("writes by an old mapping", LATE, 0)
    })?;
    g.finish()
}

/// A page that another CPU writes to all the time is taken away by XCHG, as Linux does for swapping: the entry that was
/// put there stays as it is, and the one that was there says whether the page was written.
fn accessed_and_dirty(g: &mut Smp) -> Done {
    const ROUNDS: u32 = 400;
    const LINEAR: u32 = SMALL_PAGES + 0x1000;
    const ENTRY: u32 = PAGE_TABLE + 8;
    const PAGE: u32 = SMALL_PAGES + 0x2_0000;
    const FAULTS: u32 = FREE + 0x80;
    const TOUCHED: u32 = FREE + 0xc0;
    const LOST: u32 = FREE + 0x100;
    const WRITTEN: u32 = FREE + 0x140;
    /// Present, writable, for users; neither accessed nor dirty.
    const PRESENT: u32 = 7;
    const DIRTY: i32 = 1 << 6;
    let mut main = g.create_label();
    g.jmp(main)?;
    shootdown_handler(g, LINEAR)?;
    g.handler(14)?;
    g.lock().inc(dword_ptr(FAULTS))?;
    g.add(rsp, 8)?;
    g.iretq()?;

    g.place(&mut main)?;
    g.on(0, |g| g.mov(qword_ptr(ENTRY), 0))?;
    g.start_others()?;
    g.not_on(0, |g| {
        g.sti()?;
        g.mov(ecx, 1)?;
        let again = g.here()?;
        g.mov(dword_ptr(LINEAR), ecx)?;
        g.mov(eax, dword_ptr(LINEAR + 0x40))?;
        g.lock().inc(dword_ptr(LINEAR + 0x80))?;
        g.inc(ecx)?;
        g.cmp(dword_ptr(STOP), 0)?;
        g.je(again)?;
        g.cli()
    })?;
    let untouched = |g: &mut Smp| -> Done {
        let mut good = g.create_label();
        g.cmp(qword_ptr(ENTRY), r14)?;
        g.je(good)?;
        g.inc(dword_ptr(TOUCHED))?;
        g.place(&mut good)
    };
    g.on(0, |g| {
        g.xor(esi, esi)?;
        g.mov(ebx, 1)?;
        let again = g.here()?;
        g.mov(r12d, dword_ptr(PAGE))?;
        g.mov(r13d, dword_ptr(PAGE + 0x80))?;
        g.mov(qword_ptr(ENTRY), (PAGE | PRESENT) as i32)?;
        // Now and then nobody has written yet.
        g.mov(ecx, ebx)?;
        g.and(ecx, 63)?;
        let wait = g.here()?;
        g.dec(ecx)?;
        g.jns(wait)?;
        // An entry of a page that is swapped out: anything but present.
        g.mov(r14d, ebx)?;
        g.shl(r14, 32)?;
        g.mov(rdx, r14)?;
        g.xchg(qword_ptr(ENTRY), rdx)?;
        g.delay(20)?;
        untouched(g)?;
        shoot_down(g, LINEAR)?;
        g.delay(20)?;
        untouched(g)?;
        let (mut same, mut changed) = (g.create_label(), g.create_label());
        g.cmp(dword_ptr(PAGE), r12d)?;
        g.jne(changed)?;
        g.cmp(dword_ptr(PAGE + 0x80), r13d)?;
        g.je(same)?;
        g.place(&mut changed)?;
        g.inc(dword_ptr(WRITTEN))?;
        g.test(edx, DIRTY)?;
        g.jne(same)?;
        g.inc(dword_ptr(LOST))?;
        g.place(&mut same)?;
        g.inc(ebx)?;
        g.cmp(ebx, ROUNDS as i32)?;
        g.jbe(again)?;
        g.mov(qword_ptr(ENTRY), (PAGE | PRESENT) as i32)?;
        g.mov(dword_ptr(STOP), 1)?;
        g.check_at("entries that were taken away and changed", TOUCHED, 0)?;
        g.check_at("writes without a dirty bit", LOST, 0)?;
        // The test is of something.
        g.cmp(dword_ptr(WRITTEN), 0)?;
        g.setne(al)?;
        g.cmp(dword_ptr(FAULTS), 0)?;
        g.setne(ah)?;
        g.movzx(eax, ax)?;
        g.check("writes and faults", 0x101)
    })?;
    g.finish()
}

#[test]
fn page_tables_change_under_other_cpus() {
    let directory = tempfile::tempdir().expect("directory");
    type Test = fn(&mut Smp) -> Done;
    for (name, test) in [("shootdown", shootdowns as Test), ("dirty", accessed_and_dirty)] {
        let kernel = guest(directory.path(), "kernel", Bits::B64, 2, test);
        passes(name, &kernel, 2);
    }
}
