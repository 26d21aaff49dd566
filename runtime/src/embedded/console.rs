//! What the guest says and how it ends: the serial port, numbers, failure, and power-off.

use diglot_devices::acpi_pm;
use diglot_devices::serial::COM1;
use iced_x86::code_asm::*;

use super::builder::{Builder, Emit};

const LINE_STATUS: u16 = COM1 + 5;
/// Line status: the transmitter holding register is empty.
const EMPTY: i32 = 1 << 5;
/// PM1a control (ACPI 6.5 §4.8.3.2.1): the sleep type S5 in bits 10–12, and SLP_EN.
const OFF: u32 = (acpi_pm::SLEEP_TYPE_S5 as u32) << 10 | acpi_pm::SLP_EN as u32;

/// Sets the 16550 to 115200 baud, 8 data bits, no parity, FIFOs on, no interrupts.
pub(super) fn init(b: &mut Builder) -> Emit {
    let writes: [(u16, u32); 7] = [(1, 0), (3, 0x80), (0, 1), (1, 0), (3, 3), (2, 7), (4, 3)];
    for (register, value) in writes {
        b.a.mov(edx, u32::from(COM1 + register))?;
        b.a.mov(eax, value)?;
        b.a.out(dx, al)?;
    }
    Ok(())
}

/// The routines behind [`super::builder::Routines`], except those of the local APIC.
pub(super) fn routines(b: &mut Builder) -> Emit {
    print(b)?;
    number(b, b.call.decimal, 10)?;
    number(b, b.call.hexadecimal, 16)?;
    fail(b)?;
    crash(b)?;
    power_off(b)
}

fn print(b: &mut Builder) -> Emit {
    let (mut print, mut put) = (b.call.print, b.call.put);
    let (mut end, mut wait) = (b.a.create_label(), b.a.create_label());
    let a = &mut b.a;
    a.set_label(&mut print)?;
    a.mov(cl, byte_ptr(rsi))?;
    a.test(cl, cl)?;
    a.je(end)?;
    a.call(put)?;
    a.inc(rsi)?;
    a.jmp(print)?;
    a.set_label(&mut end)?;
    a.ret()?;

    a.set_label(&mut put)?;
    a.mov(edx, u32::from(LINE_STATUS))?;
    a.set_label(&mut wait)?;
    a.in_(al, dx)?;
    a.test(al, EMPTY)?;
    a.je(wait)?;
    a.mov(edx, u32::from(COM1))?;
    a.mov(al, cl)?;
    a.out(dx, al)?;
    a.ret()
}

/// Prints RAX in `radix`: the digits are stored downwards from the end of a string on the stack.
fn number(b: &mut Builder, mut entry: CodeLabel, radix: u32) -> Emit {
    const BYTES: i32 = 32;
    let digits = b.data.text("0123456789abcdef");
    let mut digit = b.a.create_label();
    let a = &mut b.a;
    a.set_label(&mut entry)?;
    a.sub(rsp, BYTES)?;
    a.lea(rsi, ptr(rsp + (BYTES - 1)))?;
    a.mov(byte_ptr(rsi), 0)?;
    a.mov(ecx, radix)?;
    a.set_label(&mut digit)?;
    a.xor(edx, edx)?;
    a.div(rcx)?;
    a.mov(dl, byte_ptr(rdx + digits))?;
    a.dec(rsi)?;
    a.mov(byte_ptr(rsi), dl)?;
    a.test(rax, rax)?;
    a.jne(digit)?;
    a.call(b.call.print)?;
    a.add(rsp, BYTES)?;
    a.ret()
}

/// Names the check that failed, what it found and what it wanted.
fn fail(b: &mut Builder) -> Emit {
    let mut fail = b.call.fail;
    b.a.set_label(&mut fail)?;
    b.a.push(rcx)?;
    b.a.push(rax)?;
    failed_check(b)?;
    b.say(": found ")?;
    b.a.pop(rax)?;
    b.a.call(b.call.hexadecimal)?;
    b.say(", not ")?;
    b.a.pop(rax)?;
    b.a.call(b.call.hexadecimal)?;
    b.say("\r\n")?;
    b.a.jmp(b.call.crash)
}

/// A machine on which a check fails must not look as if it had powered off in good order: with an interrupt table of
/// no entries the next exception is a triple fault, which every monitor reports.
fn crash(b: &mut Builder) -> Emit {
    let mut crash = b.call.crash;
    let no_table = b.data.words(&[0, 0]);
    b.a.set_label(&mut crash)?;
    b.a.lidt(ptr(no_table))?;
    b.a.ud2()
}

/// Prints the beginning of a line about a failure.
pub(super) fn failed_check(b: &mut Builder) -> Emit {
    b.say("FAIL ")?;
    b.a.mov(rsi, qword_ptr(b.var.check))?;
    b.a.call(b.call.print)
}

fn power_off(b: &mut Builder) -> Emit {
    let mut power_off = b.call.power_off;
    let mut halt = b.a.create_label();
    b.a.set_label(&mut power_off)?;
    b.a.mov(edx, u32::from(acpi_pm::PM1A_CONTROL))?;
    b.a.mov(eax, OFF)?;
    b.a.out(dx, ax)?;
    // The machine may take a moment.
    b.a.cli()?;
    b.a.set_label(&mut halt)?;
    b.a.hlt()?;
    b.a.jmp(halt)
}

/// The last line.
pub(super) fn finish(b: &mut Builder) -> Emit {
    b.say("       ")?;
    b.say_number(b.var.ticks)?;
    b.say(" timer interrupts taken in all\r\n")?;
    b.expect_variable(b.var.passed, b.checks())?;
    b.say(&format!("All {} checks passed.\r\n", b.checks()))?;
    b.a.jmp(b.call.power_off)
}
