//! How CPUs are started and stopped, and whom the interrupts between them reach.

use iced_x86::code_asm::*;

use crate::support;
use crate::support::smp::*;

/// Which of `cpus` CPUs a mask has.
fn of_mask(cpus: u32, mask: u32) -> impl Iterator<Item = (u32, u32)> {
    (0..cpus).map(move |cpu| (cpu, mask >> cpu & 1))
}

/// How CPUs are started and stopped, and whom interrupts between them are for.
fn startup(g: &mut Smp) -> Done {
    const STARTS: u32 = FREE;
    const IDS: u32 = FREE + 0x100;
    const TOPOLOGY_IDS: u32 = FREE + 0x200;
    const BOOTS: u32 = FREE + 0x300;
    const INTERRUPTS: u32 = FREE + 0x400;
    const NMIS: u32 = FREE + 0x500;
    const READY: u32 = FREE + 0x600;
    const SPINS: u32 = FREE + 0x700;
    const LOWEST: u32 = FREE + 0x900;
    const ALL_LOWEST: u32 = FREE + 0xa00;
    // Higher than the one that is never ended.
    const VECTOR: u32 = 0x50;
    const LOWEST_VECTOR: u32 = 0x41;
    const SPIN_VECTOR: u32 = 0x42;
    const ELSEWHERE: u32 = 0x9000;
    let cpus = g.cpus;
    let everybody = (1 << cpus) - 1;

    let mut main = g.create_label();
    g.jmp(main)?;
    let count_at = |g: &mut Smp, vector: u32, table: u32| -> Done {
        g.handler(vector as u8)?;
        g.push_ax()?;
        let counter = g.own(table);
        g.lock().inc(counter)?;
        if table == LOWEST {
            g.lock().inc(dword_ptr(ALL_LOWEST))?;
        }
        if vector != 2 {
            g.eoi()?;
        }
        g.pop_ax()?;
        g.iret_here()
    };
    count_at(g, 2, NMIS)?;
    count_at(g, VECTOR, INTERRUPTS)?;
    count_at(g, LOWEST_VECTOR, LOWEST)?;
    // Who gets this one never comes back.
    g.handler(SPIN_VECTOR as u8)?;
    let spins = g.here()?;
    g.inc(dword_ptr(SPINS))?;
    g.jmp(spins)?;

    g.place(&mut main)?;
    let (starts, ids, topology_ids, boots, ready) =
        (g.own(STARTS), g.own(IDS), g.own(TOPOLOGY_IDS), g.own(BOOTS), g.own(READY));
    g.lock().inc(starts)?;
    g.mov(eax, 1)?;
    g.cpuid()?;
    g.shr(ebx, 24)?;
    g.mov(ids, ebx)?;
    g.mov(eax, 11)?;
    g.xor(ecx, ecx)?;
    g.cpuid()?;
    g.mov(topology_ids, edx)?;
    g.mov(ecx, 0x1b)?;
    g.rdmsr()?;
    g.and(eax, 1 << 8)?;
    g.mov(boots, eax)?;
    // One bit each of the flat logical destination.
    g.mov(ecx, ebp)?;
    g.mov(eax, 1 << 24)?;
    g.shl(eax, cl)?;
    g.mov(edi, LAPIC + LAPIC_LDR)?;
    let registers = g.di();
    g.mov(dword_ptr(registers), eax)?;
    g.lock().inc(ready)?;
    g.sti()?;
    g.not_on(0, Smp::halt)?;

    for cpu in 1..cpus {
        g.delay(1000)?;
        g.check_at(&format!("CPU {cpu} before it is started"), STARTS + 4 * cpu, 0)?;
    }
    g.ipi(0, OTHERS | INIT)?;
    g.ipi(0, OTHERS | STARTUP)?;
    for cpu in 0..cpus {
        g.expect(READY + 4 * cpu, 1)?;
    }
    g.ipi(0, OTHERS | STARTUP)?;
    g.delay(10_000)?;
    for cpu in 0..cpus {
        g.check_at(&format!("starts of CPU {cpu}"), STARTS + 4 * cpu, 1)?;
        g.check_at(&format!("APIC ID of CPU {cpu}"), IDS + 4 * cpu, cpu)?;
        g.check_at(&format!("x2APIC ID of CPU {cpu}"), TOPOLOGY_IDS + 4 * cpu, cpu)?;
        g.check_at(&format!("BSP flag of CPU {cpu}"), BOOTS + 4 * cpu, u32::from(cpu == 0) << 8)?;
    }
    g.movzx(eax, word_ptr(TRAMPOLINE + STARTED_HERE))?;
    g.check("starts at the vector", cpus - 1)?;

    // Name, destination, command, and by CPU who gets it.
    let logical = |mask: u32| (mask << 24, ASSERT | 1 << 11);
    let physical = |cpu: u32| (cpu << 24, ASSERT);
    let sends = [
        ("fixed, to one", physical(cpus - 1), 1 << (cpus - 1)),
        ("fixed, to the sender", physical(0), 1),
        ("fixed, physical broadcast", physical(0xff), everybody),
        ("fixed, to nobody", physical(cpus), 0),
        ("shorthand self", (0, ASSERT | SELF), 1),
        ("shorthand all", (0, ASSERT | ALL), everybody),
        ("shorthand others", (0, ASSERT | OTHERS), everybody & !1),
        ("logical, to some", logical(0b1010), 0b1010 & everybody),
        ("logical, to all", logical(0xff), everybody),
        ("logical, to nobody", logical(0x80), 0),
    ];
    let mut expected = vec![0; cpus as usize];
    for (name, (destination, command), who) in sends {
        g.ipi(destination, command | VECTOR)?;
        for (cpu, more) in of_mask(cpus, who) {
            expected[cpu as usize] += more;
            g.expect(INTERRUPTS + 4 * cpu, expected[cpu as usize])?;
        }
        g.delay(1000)?;
        for cpu in 0..cpus {
            g.check_at(&format!("{name}: CPU {cpu}"), INTERRUPTS + 4 * cpu, expected[cpu as usize])?;
        }
    }

    // One of those that it is for gets it.
    g.ipi(0b1110 << 24, ASSERT | 1 << 11 | 1 << 8 | LOWEST_VECTOR)?;
    g.expect(ALL_LOWEST, 1)?;
    g.delay(1000)?;
    g.check_at("lowest priority", ALL_LOWEST, 1)?;
    g.check_at("lowest priority at another", LOWEST, 0)?;

    for (destination, command, who) in [(1 << 24, NMI, 0b10), (0, OTHERS | NMI, everybody & !1)] {
        g.ipi(destination, command)?;
        g.expect(NMIS + 4, if command == NMI { 1 } else { 2 })?;
        g.delay(1000)?;
        for (cpu, one) in of_mask(cpus, who | 1 << 1) {
            let before = u32::from(command != NMI && cpu == 1);
            g.expect(NMIS + 4 * cpu, one + before)?;
            g.check_at(&format!("NMIs of CPU {cpu}"), NMIS + 4 * cpu, one + before)?;
        }
    }

    // Who holds back an interrupt takes an NMI.
    g.ipi(1 << 24, ASSERT | SPIN_VECTOR)?;
    let wait = g.here()?;
    g.pause()?;
    g.cmp(dword_ptr(SPINS), 30_000)?;
    g.jb(wait)?;
    g.ipi(1 << 24, ASSERT | VECTOR)?;
    g.delay(10_000)?;
    g.ipi(1 << 24, NMI)?;
    g.expect(NMIS + 4, 3)?;
    g.check_at("NMIs beside an interrupt", NMIS + 4, 3)?;
    g.check_at("interrupts of one that holds them back", INTERRUPTS + 4, expected[1])?;

    // One that runs for ever is stopped, takes no interrupts, and starts again where it is told to.
    g.ipi(1 << 24, INIT)?;
    // The host may not have had it look yet.
    let mut stopped = g.create_label();
    g.times(esi, 10_000, |g| {
        g.mov(ebx, dword_ptr(SPINS))?;
        g.delay(10_000)?;
        g.cmp(dword_ptr(SPINS), ebx)?;
        g.je(stopped)
    })?;
    g.mov(eax, esi)?;
    g.check("spins after INIT", 1)?;
    g.place(&mut stopped)?;
    g.ipi(1 << 24, ASSERT | VECTOR)?;
    g.delay(1000)?;
    g.check_at("interrupts of one that waits", INTERRUPTS + 4, expected[1])?;
    g.mov(esi, TRAMPOLINE)?;
    g.mov(edi, ELSEWHERE)?;
    g.mov(ecx, TRAMPOLINE_LEN)?;
    g.rep().movsb()?;
    g.mov(word_ptr(ELSEWHERE + STARTED_HERE), 0)?;
    g.ipi(1 << 24, STARTUP + (ELSEWHERE >> 12) - TRAMPOLINE_VECTOR)?;
    g.expect(READY + 4, 2)?;
    g.delay(1000)?;
    g.check_at("starts", STARTS + 4, 2)?;
    g.movzx(eax, word_ptr(ELSEWHERE + STARTED_HERE))?;
    g.check("starts elsewhere", 1)?;
    g.movzx(eax, word_ptr(TRAMPOLINE + STARTED_HERE))?;
    g.check("starts at the first vector", cpus - 1)?;

    // Over and over, whether it halts, spins, or is on its way.
    g.times(ebx, 300, |g| {
        let (mut there, mut not) = (g.create_label(), g.create_label());
        g.mov(esi, dword_ptr(READY + 4))?;
        g.test(ebx, 1)?;
        g.je(not)?;
        g.ipi(1 << 24, ASSERT | SPIN_VECTOR)?;
        g.place(&mut not)?;
        g.ipi(1 << 24, INIT)?;
        g.ipi(1 << 24, STARTUP)?;
        // Three of four are not waited for.
        g.test(ebx, 3)?;
        g.jne(there)?;
        g.times(ecx, 30_000_000, |g| {
            g.pause()?;
            g.cmp(dword_ptr(READY + 4), esi)?;
            g.jne(there)
        })?;
        g.say("FAIL it does not start\n")?;
        g.place(&mut there)
    })?;
    g.ipi(1 << 24, INIT)?;
    g.ipi(1 << 24, STARTUP)?;
    // Until it has its local APIC enabled it takes none.
    let mut takes = g.create_label();
    g.times(ebx, 100_000, |g| {
        g.ipi(1 << 24, ASSERT | VECTOR)?;
        g.delay(100)?;
        g.cmp(dword_ptr(INTERRUPTS + 4), expected[1] as i32)?;
        g.jne(takes)
    })?;
    g.say("FAIL it takes no interrupts after many starts\n")?;
    g.place(&mut takes)?;
    g.say("done\n")?;
    support::power_off(g)
}

#[test]
fn cpus_start_and_stop_and_send_interrupts() {
    let directory = tempfile::tempdir().expect("directory");
    for (bits, cpus) in [(Bits::B32, 4), (Bits::B64, 2)] {
        let kernel = guest(directory.path(), "kernel", bits, cpus, startup);
        passes(&format!("{bits:?}"), &kernel, cpus);
    }
}
