//! Time: the local APIC and its timer, and how fast the clocks run.

use iced_x86::code_asm::*;

use super::builder::{Builder, Emit};

const TIMER_VECTOR: u8 = 0x40;
const SPURIOUS_VECTOR: u8 = 0xff;
const HZ: u32 = 100;
/// Interrupts that the check waits for.
const WAIT_FOR: u32 = 10;

const APIC_BASE: u32 = 0x1b;
const APIC_MMIO: u64 = 0xfee0_0000;
const X2APIC_BASE: u32 = 0x800;

/// Local APIC registers, as x2APIC numbers less 800h (SDM vol. 3 table 11-6).
mod register {
    pub const TASK_PRIORITY: u32 = 0x08;
    pub const END_OF_INTERRUPT: u32 = 0x0b;
    pub const SPURIOUS: u32 = 0x0f;
    pub const TIMER: u32 = 0x32;
    pub const INITIAL_COUNT: u32 = 0x38;
    pub const CURRENT_COUNT: u32 = 0x39;
    pub const DIVIDE: u32 = 0x3e;
}
const MASKED: u32 = 1 << 16;
const PERIODIC: u32 = 1 << 17;
const DIVIDE_BY_1: u32 = 0b1011;

/// The 8254 runs at 1.193182 MHz: this is a twentieth of a second.
const CALIBRATION_COUNT: u32 = 1_193_182 / CALIBRATIONS_PER_SECOND;
const CALIBRATIONS_PER_SECOND: u32 = 20;

/// Masks the 8259s and enables the local APIC, in x2APIC mode where there is one.
pub(super) fn init(b: &mut Builder) -> Emit {
    let (mut old, mut enabled) = (b.a.create_label(), b.a.create_label());
    b.a.mov(al, 0xff)?;
    b.a.out(0x21, al)?;
    b.a.out(0xa1, al)?;
    b.a.mov(eax, 1)?;
    b.a.cpuid()?;
    b.a.bt(ecx, 21)?;
    b.a.jae(old)?;
    b.a.mov(ecx, APIC_BASE)?;
    b.a.rdmsr()?;
    b.a.or(eax, 0b11 << 10)?;
    b.a.wrmsr()?;
    b.a.mov(qword_ptr(b.var.x2apic), 1)?;
    b.say("       interrupts: local APIC in x2APIC mode, 8259s masked\r\n")?;
    b.a.jmp(enabled)?;
    b.a.set_label(&mut old)?;
    b.say("       interrupts: local APIC, 8259s masked\r\n")?;
    b.a.set_label(&mut enabled)?;
    b.write_apic(register::TASK_PRIORITY, 0)?;
    b.write_apic(register::SPURIOUS, 1 << 8 | u32::from(SPURIOUS_VECTOR))?;
    b.write_apic(register::DIVIDE, DIVIDE_BY_1)?;
    clocks(b)
}

/// Frequencies from CPUID leaf 15h (crystal in ECX, TSC = crystal × EBX / EAX), else measured against the 8254.
fn clocks(b: &mut Builder) -> Emit {
    let (mut measure, mut known) = (b.a.create_label(), b.a.create_label());
    let a = &mut b.a;
    a.xor(eax, eax)?;
    a.cpuid()?;
    a.cmp(eax, 0x15)?;
    a.jb(measure)?;
    a.mov(eax, 0x15)?;
    a.xor(ecx, ecx)?;
    a.cpuid()?;
    for r in [eax, ebx, ecx] {
        a.test(r, r)?;
        a.je(measure)?;
    }
    a.mov(qword_ptr(b.var.apic_hz), rcx)?;
    a.mov(esi, eax)?;
    a.mov(rax, rcx)?;
    a.mul(rbx)?;
    a.div(rsi)?;
    a.mov(qword_ptr(b.var.tsc_hz), rax)?;
    b.say("       clock: frequency from CPUID")?;
    b.a.jmp(known)?;
    b.a.set_label(&mut measure)?;
    calibrate(b)?;
    b.say("       clock: measured against the 8254")?;
    b.a.set_label(&mut known)?;
    b.say(", time-stamp counter at ")?;
    b.a.mov(rax, qword_ptr(b.var.tsc_hz))?;
    b.a.xor(edx, edx)?;
    b.a.mov(ecx, 1_000_000)?;
    b.a.div(rcx)?;
    b.a.call(b.call.decimal)?;
    b.say(" MHz\r\n")
}

/// Counts both clocks while channel 2 of the 8254 counts down once (mode 0); its output is bit 5 of port 61h.
fn calibrate(b: &mut Builder) -> Emit {
    let mut wait = b.a.create_label();
    b.a.in_(al, 0x61)?;
    b.a.and(al, 0xfc)?; // gate low, speaker off
    b.a.out(0x61, al)?;
    b.a.mov(al, 0xb0)?; // channel 2, low then high byte, mode 0
    b.a.out(0x43, al)?;
    for byte in [CALIBRATION_COUNT & 0xff, CALIBRATION_COUNT >> 8] {
        b.a.mov(eax, byte)?;
        b.a.out(0x42, al)?;
    }
    b.write_apic(register::TIMER, MASKED)?;
    b.write_apic(register::INITIAL_COUNT, u32::MAX)?;
    b.time()?;
    b.a.mov(rbx, rax)?;
    b.a.in_(al, 0x61)?;
    b.a.or(al, 1)?;
    b.a.out(0x61, al)?;
    b.a.set_label(&mut wait)?;
    b.a.in_(al, 0x61)?;
    b.a.test(al, 1 << 5)?;
    b.a.je(wait)?;
    b.time()?;
    b.a.sub(rax, rbx)?;
    b.a.imul_3(rax, rax, CALIBRATIONS_PER_SECOND as i32)?;
    b.a.mov(qword_ptr(b.var.tsc_hz), rax)?;
    b.a.mov(ecx, register::CURRENT_COUNT)?;
    b.a.call(b.call.apic_read)?;
    b.a.not(eax)?; // what has gone from all ones
    b.a.imul_3(rax, rax, CALIBRATIONS_PER_SECOND as i32)?;
    b.a.mov(qword_ptr(b.var.apic_hz), rax)?;
    b.write_apic(register::INITIAL_COUNT, 0)
}

/// Starts the periodic timer, which then runs until the end, and sleeps through ten of its interrupts.
pub(super) fn interrupts(b: &mut Builder) -> Emit {
    b.check(&format!("{WAIT_FOR} timer interrupts taken at {HZ} Hz"), |b| {
        b.time()?;
        b.a.mov(r12, rax)?;
        b.write_apic(register::TIMER, PERIODIC | u32::from(TIMER_VECTOR))?;
        b.a.mov(rax, qword_ptr(b.var.apic_hz))?;
        b.a.xor(edx, edx)?;
        b.a.mov(ecx, HZ)?;
        b.a.div(rcx)?;
        b.a.mov(ecx, register::INITIAL_COUNT)?;
        b.a.call(b.call.apic_write)?;
        let mut wait = b.a.create_label();
        // STI takes effect after the next instruction, so no interrupt slips in between the test and HLT.
        b.a.set_label(&mut wait)?;
        b.a.sti()?;
        b.a.hlt()?;
        b.a.cli()?;
        b.a.cmp(qword_ptr(b.var.ticks), WAIT_FOR as i32)?;
        b.a.jb(wait)?;
        b.a.sti()?;
        // Interrupts may come late, never early: half of the time is a generous bound.
        b.time()?;
        b.a.sub(rax, r12)?;
        b.a.imul_3(rax, rax, (2 * HZ / WAIT_FOR) as i32)?;
        b.a.mov(rcx, qword_ptr(b.var.tsc_hz))?;
        b.a.cmp(rax, rcx)?;
        b.a.jb(b.call.fail)
    })
}

/// Handlers of the timer's and of spurious interrupts (which want no end-of-interrupt, SDM vol. 3 §11.9).
pub(super) fn handlers(b: &mut Builder) -> Emit<[(u8, CodeLabel); 2]> {
    let (mut tick, mut spurious) = (b.a.create_label(), b.a.create_label());
    b.a.set_label(&mut tick)?;
    b.a.push(rax)?;
    b.a.push(rcx)?;
    b.a.push(rdx)?;
    b.a.inc(qword_ptr(b.var.ticks))?;
    b.write_apic(register::END_OF_INTERRUPT, 0)?;
    b.a.pop(rdx)?;
    b.a.pop(rcx)?;
    b.a.pop(rax)?;
    b.a.set_label(&mut spurious)?;
    b.a.iretq()?;
    Ok([(TIMER_VECTOR, tick), (SPURIOUS_VECTOR, spurious)])
}

/// Access to the local APIC's registers: MSRs in x2APIC mode, else memory.
pub(super) fn routines(b: &mut Builder) -> Emit {
    for (mut entry, writes) in [(b.call.apic_write, true), (b.call.apic_read, false)] {
        let mut memory = b.a.create_label();
        let a = &mut b.a;
        a.set_label(&mut entry)?;
        a.cmp(qword_ptr(b.var.x2apic), 0)?;
        a.je(memory)?;
        a.add(ecx, X2APIC_BASE)?;
        if writes {
            a.xor(edx, edx)?;
            a.wrmsr()?;
        } else {
            a.rdmsr()?;
        }
        a.ret()?;
        a.set_label(&mut memory)?;
        a.shl(ecx, 4)?;
        a.mov(rdx, APIC_MMIO)?;
        if writes {
            a.mov(dword_ptr(rdx + rcx), eax)?;
        } else {
            a.mov(eax, dword_ptr(rdx + rcx))?;
        }
        a.ret()?;
    }
    Ok(())
}
