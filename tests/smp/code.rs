//! Code that one CPU writes while others run it.

use iced_x86::code_asm::*;

use crate::support::smp::*;

/// How one CPU rewrites a function that another calls.
#[derive(Clone, Copy, Debug)]
struct Rewriting {
    rounds: u32,
    /// So many calls each time: from a few on there is quick code of it, from many a region.
    calls: u32,
    /// Where the page has data that the first CPU stores to all the time, if it has.
    data: Option<u32>,
    /// Whether each page is used twice only, and stored to, executed, and stored to again.
    fresh: bool,
    /// Whether it is IRET, instead of CPUID, that serialises.
    iret: bool,
}

const FUNCTION: u32 = 0x100_0000;

/// Emits that the page in EDI has a function which returns the number in EBX. The bytes are stored one by one, the first
/// of them first.
pub fn write_function(g: &mut Smp) -> Done {
    let at = g.di();
    g.mov(byte_ptr(at), 0xb8)?;
    g.mov(dword_ptr(at + 1), ebx)?;
    g.mov(byte_ptr(at + 5), 0xc3)
}

/// One CPU stores a function and then a flag. The other sees the flag, executes a serialising instruction and calls the
/// function (SDM vol. 3 §9.1.3). A third stores beside it.
fn rewritten(g: &mut Smp, k: u32, how: Rewriting) -> Done {
    const WRONG: u32 = FREE;
    const STOP: u32 = FREE + 0x40;
    let (flag, ack) = (FREE + 0x1000 + 256 * k, FREE + 0x1080 + 256 * k);
    g.on(0, |g| g.mov(dword_ptr(STOP), 0))?;
    g.barrier()?;
    let page = |g: &mut Smp, round: AsmRegister32| -> Done {
        g.mov(edi, round)?;
        g.and(edi, if how.fresh { !1 } else { 0 })?;
        g.shl(edi, 11)?;
        g.add(edi, FUNCTION as i32)
    };
    g.on(0, |g| {
        g.mov(ebx, 1)?;
        let again = g.here()?;
        page(g, ebx)?;
        write_function(g)?;
        g.mov(dword_ptr(flag), ebx)?;
        let wait = g.here()?;
        g.pause()?;
        if let Some(data) = how.data {
            let at = g.di();
            g.mov(dword_ptr(at + data as i32), ebx)?;
        }
        g.cmp(dword_ptr(ack), ebx)?;
        g.jne(wait)?;
        g.inc(ebx)?;
        g.cmp(ebx, how.rounds as i32)?;
        g.jbe(again)?;
        g.mov(dword_ptr(STOP), 1)
    })?;
    g.on(1, |g| {
        g.mov(esi, 1)?;
        let again = g.here()?;
        g.wait_for(flag, esi)?;
        if how.iret {
            g.iret_to_next()?;
        } else {
            g.xor(eax, eax)?;
            g.cpuid()?;
        }
        page(g, esi)?;
        g.times(ecx, how.calls, |g| {
            let mut good = g.create_label();
            if g.bits == Bits::B64 {
                g.call(rdi)?
            } else {
                g.call(edi)?
            }
            g.cmp(eax, esi)?;
            g.je(good)?;
            g.lock().inc(dword_ptr(WRONG))?;
            g.place(&mut good)
        })?;
        g.mov(dword_ptr(ack), esi)?;
        g.inc(esi)?;
        g.cmp(esi, how.rounds as i32)?;
        g.jbe(again)
    })?;
    g.on(2, |g| {
        let again = g.here()?;
        let mut good = g.create_label();
        for at in [FUNCTION + 0x18, FUNCTION + 0x820] {
            g.mov(dword_ptr(at), ecx)?;
        }
        g.cmp(dword_ptr(FUNCTION + 0x18), ecx)?;
        g.je(good)?;
        g.lock().inc(dword_ptr(WRONG))?;
        g.place(&mut good)?;
        g.inc(ecx)?;
        g.cmp(dword_ptr(STOP), 0)?;
        g.je(again)
    })?;
    g.barrier()?;
    g.on(0, |g| {
        g.check_at(&format!("old code, {how:?}"), WRONG, 0)?;
        g.mov(dword_ptr(WRONG), 0)
    })
}

#[test]
fn rewritten_code_is_seen_by_other_cpus() {
    let base = Rewriting { rounds: 1_500, calls: 1, data: None, fresh: false, iret: false };
    let cases = [
        base,
        Rewriting { calls: 30, iret: true, ..base },
        Rewriting { calls: 5_000, rounds: 300, ..base },
        Rewriting { calls: 30_000, rounds: 60, ..base },
        Rewriting { data: Some(0x10), ..base },
        Rewriting { data: Some(0x800), iret: true, ..base },
        Rewriting { data: Some(0x10), calls: 2_000, rounds: 300, ..base },
        Rewriting { data: Some(0x800), calls: 2_000, rounds: 300, ..base },
        Rewriting { fresh: true, data: Some(0x10), ..base },
        Rewriting { fresh: true, data: Some(0x800), calls: 30, ..base },
    ];
    let directory = tempfile::tempdir().expect("directory");
    for (bits, cpus) in [(Bits::B64, 2), (Bits::B32, 2), (Bits::B64, 3)] {
        let kernel = guest(directory.path(), "kernel", bits, cpus, |g| {
            g.start_others()?;
            // Three CPUs wait for two of the host's.
            let fewer = |how: Rewriting| if cpus > 2 { Rewriting { rounds: how.rounds / 10, ..how } } else { how };
            (0..).zip(cases).try_for_each(|(k, how)| rewritten(g, k, fewer(how)))?;
            g.finish()
        });
        passes(&format!("{bits:?}"), &kernel, cpus);
    }
}

/// An instruction is replaced while others run it, as Linux does (`text_poke_bp`): INT3 over its first byte, then what is
/// behind that, then the first byte, and after each every CPU takes an interrupt. Who meets the INT3 does what the new
/// instruction does.
fn poked(g: &mut Smp) -> Done {
    const ROUNDS: u32 = 200;
    const SYNC: u32 = 0x40;
    const WRONG: u32 = FREE;
    /// The number that the function returned before, and may return now.
    const LOW: u32 = FREE + 0x40;
    const HIGH: u32 = FREE + 0x80;
    const ACKNOWLEDGED: u32 = FREE + 0xc0;
    const STOP: u32 = FREE + 0x100;
    /// By CPU.
    const CALLS: u32 = FREE + 0x140;
    let mut main = g.create_label();
    g.jmp(main)?;
    g.handler(3)?;
    g.mov(eax, dword_ptr(HIGH))?;
    let frame = g.sp();
    if g.bits == Bits::B64 {
        g.add(qword_ptr(frame), 4)?
    } else {
        g.add(dword_ptr(frame), 4)?
    }
    g.iret_here()?;
    g.handler(SYNC as u8)?;
    g.push_ax()?;
    g.lock().inc(dword_ptr(ACKNOWLEDGED))?;
    g.eoi()?;
    g.pop_ax()?;
    g.iret_here()?;

    g.place(&mut main)?;
    g.on(0, |g| {
        g.mov(edi, FUNCTION)?;
        g.xor(ebx, ebx)?;
        write_function(g)
    })?;
    g.start_others()?;
    g.not_on(0, |g| {
        g.sti()?;
        let again = g.here()?;
        let (mut good, mut bad) = (g.create_label(), g.create_label());
        g.mov(esi, dword_ptr(LOW))?;
        g.mov(edi, FUNCTION)?;
        if g.bits == Bits::B64 {
            g.call(rdi)?
        } else {
            g.call(edi)?
        }
        g.cmp(eax, esi)?;
        g.jb(bad)?;
        g.cmp(eax, dword_ptr(HIGH))?;
        g.jbe(good)?;
        g.place(&mut bad)?;
        g.lock().inc(dword_ptr(WRONG))?;
        g.place(&mut good)?;
        let calls = g.own(CALLS);
        g.inc(calls)?;
        g.cmp(dword_ptr(STOP), 0)?;
        g.je(again)?;
        g.cli()
    })?;
    g.on(0, |g| {
        let others = g.cpus as i32 - 1;
        let sync = |g: &mut Smp| {
            g.add(esi, others)?;
            g.ipi(0, ASSERT | OTHERS | SYNC)?;
            g.wait_for(ACKNOWLEDGED, esi)
        };
        g.xor(esi, esi)?;
        g.mov(ebx, 1)?;
        let again = g.here()?;
        g.mov(dword_ptr(HIGH), ebx)?;
        g.mov(byte_ptr(FUNCTION), 0xcc)?;
        sync(g)?;
        g.mov(dword_ptr(FUNCTION + 1), ebx)?;
        sync(g)?;
        g.mov(byte_ptr(FUNCTION), 0xb8)?;
        sync(g)?;
        g.mov(dword_ptr(LOW), ebx)?;
        // Now and then it is called for long enough to be compiled.
        let mut soon = g.create_label();
        g.test(ebx, 63)?;
        g.jne(soon)?;
        g.mov(eax, dword_ptr(CALLS + 4))?;
        g.add(eax, 30_000)?;
        let wait = g.here()?;
        g.pause()?;
        g.cmp(dword_ptr(CALLS + 4), eax)?;
        g.js(wait)?;
        g.place(&mut soon)?;
        g.inc(ebx)?;
        g.cmp(ebx, ROUNDS as i32)?;
        g.jbe(again)?;
        g.mov(dword_ptr(STOP), 1)?;
        g.check_at("wrong code", WRONG, 0)
    })?;
    g.finish()
}

#[test]
fn code_is_poked_under_other_cpus() {
    let directory = tempfile::tempdir().expect("directory");
    for bits in [Bits::B64, Bits::B32] {
        let kernel = guest(directory.path(), "kernel", bits, 2, poked);
        passes(&format!("{bits:?}"), &kernel, 2);
    }
}
