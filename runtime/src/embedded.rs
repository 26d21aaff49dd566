//! The embedded default guest: a small operating system assembled at run time, which needs no file. It enters long
//! mode, takes exceptions and timer interrupts, runs a ring-3 program through SYSCALL, does integer and SSE work with
//! checked results, reports its speed, and powers the machine off.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Where the image is loaded and entered, in 32-bit protected mode with flat segments and paging off.
pub const LOAD: u64 = 0x10_0000;
const CODE: u64 = LOAD + 0x1000;
const DATA: u64 = LOAD + 0x8000;
const GDT: u64 = LOAD + 0xc000;
const TSS: u64 = GDT + 0x100;
const IDT: u64 = LOAD + 0xd000;
const SIZE: usize = 0xe000;
const TABLES: u64 = 0x12_0000;
const KERNEL_STACK: u64 = 0x13_0000;
const USER_STACK: u64 = 0x13_4000;
const SIEVE: u64 = 0x14_0000;

const KERNEL_CS: u16 = 8;
const TIMER_VECTOR: u8 = 0x40;
const TICKS: u32 = 10;
const SIEVE_LIMIT: u32 = 100_000;
const INTEGER_ROUNDS: u64 = 40_000_000;
/// Instructions in one round of the integer loop.
const INTEGER_ROUND: u64 = 6;
const FLOAT_ROUNDS: u64 = 5_000_000;
const FLOAT_ROUND: u64 = 5;
const MULTIPLIER: u64 = 6_364_136_223_846_793_005;
const LOGISTIC: f64 = 3.75;

/// The guest's memory image, to be loaded at [`LOAD`].
pub fn image() -> Result<Vec<u8>, IcedError> {
    let mut data = Data { bytes: Vec::new() };
    let kernel = kernel(&mut data)?;
    let mut image = vec![0; SIZE];
    let mut put = |at: u64, bytes: &[u8]| image[(at - LOAD) as usize..][..bytes.len()].copy_from_slice(bytes);
    put(LOAD, &entry()?);
    put(CODE, &kernel.code);
    put(DATA, &data.bytes);
    for (n, d) in descriptors().into_iter().enumerate() {
        put(GDT + 8 * n as u64, &d.to_le_bytes());
    }
    // RSP0 of the 64-bit TSS.
    put(TSS + 4, &KERNEL_STACK.to_le_bytes());
    for (vector, handler) in (0..=255u64).map(|v| (v, kernel.handler(v as u8))) {
        // Interrupt gates; the breakpoint's may be used from ring 3.
        let dpl = if vector == 3 { 0xee00 } else { 0x8e00 };
        let low = handler & 0xffff | u64::from(KERNEL_CS) << 16 | dpl << 32 | (handler >> 16 & 0xffff) << 48;
        put(IDT + 16 * vector, &low.to_le_bytes());
    }
    Ok(image)
}

/// Null, kernel code and data, user 32-bit code (unused), data and 64-bit code in the order that SYSRET wants, TSS.
fn descriptors() -> [u64; 8] {
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

/// 32-bit code: page tables for the first 4 GiB in 2 MiB pages, then long mode.
fn entry() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(32)?;
    let (mut directory, mut page) = (a.create_label(), a.create_label());
    a.mov(dword_ptr(TABLES), (TABLES + 0x1007) as i32)?;
    a.mov(ecx, 0)?;
    a.set_label(&mut directory)?;
    a.mov(eax, ecx)?;
    a.shl(eax, 12)?;
    a.add(eax, (TABLES + 0x2007) as i32)?;
    a.mov(dword_ptr(TABLES + 0x1000) + ecx * 8, eax)?;
    a.inc(ecx)?;
    a.cmp(ecx, 4)?;
    a.jne(directory)?;
    a.mov(ecx, 0)?;
    a.set_label(&mut page)?;
    a.mov(eax, ecx)?;
    a.shl(eax, 21)?;
    a.or(eax, 0x87)?;
    a.mov(dword_ptr(TABLES + 0x2000) + ecx * 8, eax)?;
    a.inc(ecx)?;
    a.cmp(ecx, 2048)?;
    a.jne(page)?;
    // The table registers' operands are pushed, so that they need no place of their own.
    a.mov(esp, KERNEL_STACK as i32)?;
    a.push(GDT as i32)?;
    a.push(0x003f_0000)?;
    a.lgdt(ptr(esp + 2))?;
    a.mov(eax, 0x620)?; // CR4: PAE, OSFXSR, OSXMMEXCPT
    a.mov(cr4, eax)?;
    a.mov(eax, TABLES as i32)?;
    a.mov(cr3, eax)?;
    a.mov(ecx, 0xc000_0080u32)?;
    a.mov(eax, 0x901)?; // EFER: NXE, LME, SCE
    a.mov(edx, 0)?;
    a.wrmsr()?;
    a.mov(eax, 0x8000_0033u32)?; // CR0: PG, NE, ET, MP, PE
    a.mov(cr0, eax)?;
    a.push(u32::from(KERNEL_CS) as i32)?;
    a.push(CODE as i32)?;
    a.retf()?;
    a.assemble(LOAD)
}

/// Strings and variables.
struct Data {
    bytes: Vec<u8>,
}

impl Data {
    /// Address of a zero-terminated string.
    fn text(&mut self, s: &str) -> u64 {
        let at = DATA + self.bytes.len() as u64;
        self.bytes.extend(s.as_bytes());
        self.bytes.push(0);
        at
    }

    /// Address of a zeroed 64-bit variable.
    fn word(&mut self) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        self.bytes.extend([0; 8]);
        DATA + self.bytes.len() as u64 - 8
    }
}

/// The assembled kernel and its interrupt handlers' addresses.
struct Kernel {
    code: Vec<u8>,
    breakpoint: u64,
    timer: u64,
    fault: u64,
}

impl Kernel {
    fn handler(&self, vector: u8) -> u64 {
        match vector {
            3 => self.breakpoint,
            TIMER_VECTOR => self.timer,
            _ => self.fault,
        }
    }
}

/// What the kernel's parts share while it is assembled.
struct Builder<'a> {
    a: CodeAssembler,
    data: &'a mut Data,
    print: CodeLabel,
    print_number: CodeLabel,
    fail: CodeLabel,
}

impl Builder<'_> {
    fn say(&mut self, text: &str) -> Result<(), IcedError> {
        let at = self.data.text(text);
        self.a.mov(rsi, at)?;
        self.a.call(self.print)
    }

    /// Fails unless `rax` is `expected`.
    fn expect(&mut self, expected: u64) -> Result<(), IcedError> {
        self.a.mov(rcx, expected)?;
        self.a.cmp(rax, rcx)?;
        self.a.jne(self.fail)
    }

    fn write_msr(&mut self, msr: u32, low: u32) -> Result<(), IcedError> {
        self.a.mov(ecx, msr)?;
        self.a.mov(eax, low)?;
        self.a.xor(edx, edx)?;
        self.a.wrmsr()
    }

    /// `rax` = time-stamp counter.
    fn clock(&mut self) -> Result<(), IcedError> {
        self.a.rdtsc()?;
        self.a.shl(rdx, 32)?;
        self.a.or(rax, rdx)
    }

    /// Prints millions of instructions a second for `count` instructions since the time in `r15`.
    fn report(&mut self, what: &str, count: u64) -> Result<(), IcedError> {
        self.clock()?;
        self.a.sub(rax, r15)?;
        self.a.mov(rcx, rax)?;
        // Instructions per nanosecond, times a thousand.
        self.a.mov(rax, count * 1000)?;
        self.a.xor(edx, edx)?;
        self.a.add(rcx, 1)?;
        self.a.div(rcx)?;
        self.a.mov(rbx, rax)?;
        self.say(what)?;
        self.a.mov(rax, rbx)?;
        self.a.call(self.print_number)?;
        self.say(" million instructions a second\n")
    }
}

fn kernel(data: &mut Data) -> Result<Kernel, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let (print, print_number, fail) = (a.create_label(), a.create_label(), a.create_label());
    let (mut breakpoint, mut timer, mut fault) = (a.create_label(), a.create_label(), a.create_label());
    let (mut system_call, mut back) = (a.create_label(), a.create_label());
    let (breakpoints, ticks) = (data.word(), data.word());
    let mut b = Builder { a, data, print, print_number, fail };

    start(&mut b)?;
    b.say("Diglot embedded guest\n[ ok ] long mode, 4 GiB mapped\n")?;
    b.a.int3()?;
    b.a.mov(rax, ptr(breakpoints))?;
    b.expect(1)?;
    b.say("[ ok ] exceptions\n")?;
    take_ticks(&mut b, ticks)?;
    sieve(&mut b)?;
    integers(&mut b)?;
    floats(&mut b)?;
    user_program(&mut b, system_call, &mut back)?;
    b.say("All checks passed.\n")?;
    // PM1a control: SLP_TYP 5, SLP_EN.
    b.a.mov(dx, 0x604)?;
    b.a.mov(ax, 0x3400)?;
    b.a.out(dx, ax)?;
    b.a.cli()?;
    b.a.hlt()?;

    b.a.set_label(&mut breakpoint)?;
    b.a.inc(qword_ptr(breakpoints))?;
    b.a.iretq()?;
    b.a.set_label(&mut timer)?;
    b.a.push(rax)?;
    b.a.push(rcx)?;
    b.a.push(rdx)?;
    b.a.inc(qword_ptr(ticks))?;
    b.write_msr(0x80b, 0)?; // EOI
    b.a.pop(rdx)?;
    b.a.pop(rcx)?;
    b.a.pop(rax)?;
    b.a.iretq()?;
    b.a.set_label(&mut fault)?;
    b.a.jmp(b.fail)?;
    b.a.set_label(&mut system_call)?;
    handle_system_call(&mut b, back)?;
    routines(&mut b)?;

    let options = iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let result = b.a.assemble_options(CODE, options)?;
    Ok(Kernel {
        breakpoint: result.label_ip(&breakpoint)?,
        timer: result.label_ip(&timer)?,
        fault: result.label_ip(&fault)?,
        code: result.inner.code_buffer,
    })
}

/// Segments, stack, task register, interrupt table.
fn start(b: &mut Builder<'_>) -> Result<(), IcedError> {
    let a = &mut b.a;
    a.mov(rsp, KERNEL_STACK)?;
    a.mov(eax, 0x10)?;
    a.mov(ds, eax)?;
    a.mov(es, eax)?;
    a.mov(ss, eax)?;
    a.mov(eax, 0x30)?;
    a.ltr(ax)?;
    a.mov(rax, IDT)?;
    a.push(rax)?;
    a.sub(rsp, 2)?;
    a.mov(word_ptr(rsp), 0xfff)?;
    a.lidt(ptr(rsp))?;
    a.add(rsp, 10)?;
    // The 8259s stay masked: interrupts come from the local APIC.
    a.mov(al, 0xff)?;
    a.out(0x21, al)?;
    a.out(0xa1, al)
}

/// Ten periodic interrupts from the local APIC's timer, in x2APIC mode.
fn take_ticks(b: &mut Builder<'_>, ticks: u64) -> Result<(), IcedError> {
    b.a.mov(ecx, 0x1b)?;
    b.a.rdmsr()?;
    b.a.or(eax, 0x400)?;
    b.a.wrmsr()?;
    b.write_msr(0x80f, 0x1ff)?;
    b.write_msr(0x83e, 0xb)?;
    b.write_msr(0x832, 0x2_0000 | u32::from(TIMER_VECTOR))?;
    // CPUID 15h gives the timer's clock; a hundredth of it is 10 ms.
    b.a.mov(eax, 0x15)?;
    b.a.cpuid()?;
    b.a.mov(eax, ecx)?;
    b.a.xor(edx, edx)?;
    b.a.mov(ecx, 100)?;
    b.a.div(ecx)?;
    b.a.mov(ecx, 0x838)?;
    b.a.xor(edx, edx)?;
    b.a.wrmsr()?;
    let mut wait = b.a.create_label();
    b.a.sti()?;
    b.a.set_label(&mut wait)?;
    b.a.hlt()?;
    b.a.cmp(qword_ptr(ticks), TICKS as i32)?;
    b.a.jb(wait)?;
    b.a.cli()?;
    b.write_msr(0x838, 0)?;
    b.say("[ ok ] timer interrupts\n")
}

/// Counts the primes below [`SIEVE_LIMIT`].
fn sieve(b: &mut Builder<'_>) -> Result<(), IcedError> {
    let (mut outer, mut inner, mut composite, mut done) =
        (b.a.create_label(), b.a.create_label(), b.a.create_label(), b.a.create_label());
    let a = &mut b.a;
    a.mov(rdi, SIEVE)?;
    a.mov(ecx, SIEVE_LIMIT)?;
    a.mov(al, 1)?;
    a.rep().stosb()?;
    a.mov(rdi, SIEVE)?;
    a.xor(ebx, ebx)?;
    a.mov(ecx, 2)?;
    a.set_label(&mut outer)?;
    a.cmp(ecx, SIEVE_LIMIT as i32)?;
    a.jae(done)?;
    a.cmp(byte_ptr(rdi + rcx), 0)?;
    a.je(composite)?;
    a.inc(ebx)?;
    a.lea(edx, ptr(rcx + rcx))?;
    a.set_label(&mut inner)?;
    a.cmp(edx, SIEVE_LIMIT as i32)?;
    a.jae(composite)?;
    a.mov(byte_ptr(rdi + rdx), 0)?;
    a.add(edx, ecx)?;
    a.jmp(inner)?;
    a.set_label(&mut composite)?;
    a.inc(ecx)?;
    a.jmp(outer)?;
    a.set_label(&mut done)?;
    a.mov(eax, ebx)?;
    b.expect(primes())?;
    b.say("[ ok ] sieve of Eratosthenes\n")
}

fn primes() -> u64 {
    let is_prime = |n: u32| (2..).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d));
    (2..SIEVE_LIMIT).filter(|&n| is_prime(n)).count() as u64
}

/// A linear congruential sequence with a rotate and an xor in between.
fn integers(b: &mut Builder<'_>) -> Result<(), IcedError> {
    let mut again = b.a.create_label();
    b.clock()?;
    b.a.mov(r15, rax)?;
    b.a.mov(rax, 1u64)?;
    b.a.mov(rbx, MULTIPLIER)?;
    b.a.mov(rcx, INTEGER_ROUNDS)?;
    b.a.set_label(&mut again)?;
    b.a.imul_2(rax, rbx)?;
    b.a.add(rax, rcx)?;
    b.a.rol(rax, 7)?;
    b.a.xor(rax, rcx)?;
    b.a.dec(rcx)?;
    b.a.jne(again)?;
    b.expect(
        (1..=INTEGER_ROUNDS).rev().fold(1u64, |x, n| x.wrapping_mul(MULTIPLIER).wrapping_add(n).rotate_left(7) ^ n),
    )?;
    b.say("[ ok ] integer arithmetic\n")?;
    b.report("       integer loop: ", INTEGER_ROUNDS * INTEGER_ROUND)
}

/// The logistic map in double precision: chaotic, so that one wrong bit shows.
fn floats(b: &mut Builder<'_>) -> Result<(), IcedError> {
    let mut again = b.a.create_label();
    b.clock()?;
    b.a.mov(r15, rax)?;
    for (r, v) in [(xmm0, 0.5f64), (xmm1, 1.0), (xmm2, LOGISTIC)] {
        b.a.mov(rax, v.to_bits())?;
        b.a.movq(r, rax)?;
    }
    b.a.mov(rcx, FLOAT_ROUNDS)?;
    b.a.set_label(&mut again)?;
    b.a.movapd(xmm3, xmm1)?;
    b.a.subsd(xmm3, xmm0)?;
    b.a.mulsd(xmm0, xmm2)?;
    b.a.mulsd(xmm0, xmm3)?;
    b.a.dec(rcx)?;
    b.a.jne(again)?;
    b.a.movq(rax, xmm0)?;
    b.expect((0..FLOAT_ROUNDS).fold(0.5f64, |x, _| x * LOGISTIC * (1.0 - x)).to_bits())?;
    b.say("[ ok ] SSE2 arithmetic\n")?;
    b.report("       SSE2 loop:    ", FLOAT_ROUNDS * (FLOAT_ROUND + 1))
}

/// A program in ring 3 that prints by a system call and leaves by another.
fn user_program(b: &mut Builder<'_>, system_call: CodeLabel, back: &mut CodeLabel) -> Result<(), IcedError> {
    let mut program = b.a.create_label();
    b.a.lea(rax, ptr(system_call))?;
    b.a.mov(rdx, rax)?;
    b.a.shr(rdx, 32)?;
    b.a.mov(ecx, 0xc000_0082u32)?; // LSTAR
    b.a.wrmsr()?;
    b.a.mov(ecx, 0xc000_0081u32)?; // STAR: kernel selectors from 8, user selectors from 18h
    b.a.xor(eax, eax)?;
    b.a.mov(edx, 0x0018_0008)?;
    b.a.wrmsr()?;
    b.write_msr(0xc000_0084, 0x200)?; // FMASK: interrupts off
    b.a.lea(rcx, ptr(program))?;
    b.a.mov(r11d, 0x202)?;
    b.a.mov(rsp, USER_STACK)?;
    b.a.sysretq()?;
    b.a.set_label(&mut program)?;
    let hello = b.data.text("[ ok ] ring 3 and SYSCALL\n");
    b.a.mov(rsi, hello)?;
    b.a.mov(eax, 1)?;
    b.a.syscall()?;
    b.a.mov(eax, 2)?;
    b.a.syscall()?;
    b.a.set_label(back)?;
    b.a.mov(rsp, KERNEL_STACK)
}

/// System call 1 prints the string at RSI; 2 ends the program.
fn handle_system_call(b: &mut Builder<'_>, back: CodeLabel) -> Result<(), IcedError> {
    b.a.cmp(eax, 2)?;
    b.a.je(back)?;
    b.a.mov(rbx, rsp)?;
    b.a.mov(rsp, KERNEL_STACK)?;
    b.a.push(rcx)?;
    b.a.call(b.print)?;
    b.a.pop(rcx)?;
    b.a.mov(rsp, rbx)?;
    b.a.sysretq()
}

/// Printing, and the end of a guest that found something wrong.
fn routines(b: &mut Builder<'_>) -> Result<(), IcedError> {
    let (mut wait, mut end) = (b.a.create_label(), b.a.create_label());
    let mut print = b.print;
    b.a.set_label(&mut print)?;
    b.a.cmp(byte_ptr(rsi), 0)?;
    b.a.je(end)?;
    b.a.mov(dx, 0x3fd)?;
    b.a.set_label(&mut wait)?;
    b.a.in_(al, dx)?;
    b.a.test(al, 0x20)?;
    b.a.je(wait)?;
    b.a.mov(dx, 0x3f8)?;
    b.a.mov(al, byte_ptr(rsi))?;
    b.a.out(dx, al)?;
    b.a.inc(rsi)?;
    b.a.jmp(print)?;
    b.a.set_label(&mut end)?;
    b.a.ret()?;

    // RAX in decimal, digits pushed as a string on the stack.
    let mut digit = b.a.create_label();
    let mut print_number = b.print_number;
    b.a.set_label(&mut print_number)?;
    b.a.mov(r8, rsp)?;
    b.a.sub(rsp, 32)?;
    b.a.lea(rsi, ptr(r8 - 1))?;
    b.a.mov(byte_ptr(rsi), 0)?;
    b.a.mov(ecx, 10)?;
    b.a.set_label(&mut digit)?;
    b.a.xor(edx, edx)?;
    b.a.div(rcx)?;
    b.a.add(dl, b'0' as i32)?;
    b.a.dec(rsi)?;
    b.a.mov(byte_ptr(rsi), dl)?;
    b.a.test(rax, rax)?;
    b.a.jne(digit)?;
    b.a.call(b.print)?;
    b.a.add(rsp, 32)?;
    b.a.ret()?;

    // A wrong result ends in a triple fault, which the user sees as a crash.
    let mut fail = b.fail;
    b.a.set_label(&mut fail)?;
    b.say("FAIL: a result is wrong\n")?;
    b.a.push(0)?;
    b.a.push(0)?;
    b.a.lidt(ptr(rsp))?;
    b.a.ud2()
}

#[cfg(test)]
mod tests {
    #[test]
    fn assembles_the_same_each_time() {
        let (a, b) = (super::image(), super::image());
        assert!(a.is_ok_and(|a| b.is_ok_and(|b| a == b && a.len() == super::SIZE)));
    }
}
