//! A program in ring 3, and the system calls that it makes.

use iced_x86::code_asm::*;

use super::builder::{Builder, Data, Emit};
use super::layout;
use super::traps::{self, fault};

/// System calls, by the number in EAX. The result is in RAX; RCX, RDX, RSI and R11 are not kept.
mod call {
    /// Ends the program with the result in RDI.
    pub const EXIT: u32 = 0;
    /// Prints the string at RSI.
    pub const WRITE: u32 = 1;
    /// Timer interrupts taken so far.
    pub const TICKS: u32 = 2;
}

const FS_BASE: u32 = 0xc000_0100;
const GS_BASE: u32 = 0xc000_0101;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const FMASK: u32 = 0xc000_0084;
const INTERRUPT_FLAG: u64 = 1 << 9;

/// System calls that the program makes in a row.
const CALLS: u32 = 20_000;
/// What lies where FS and GS point to in ring 3.
const AT_FS: u64 = 0x0123_4567_89ab_cdef;
const AT_GS: u64 = 0x0fed_cba9_8765_4321;

/// The program as it is loaded.
pub(super) struct Program {
    pub code: Vec<u8>,
    pub data: Vec<u8>,
    fs_base: u64,
    gs_base: u64,
    /// Where it goes on after its forbidden access.
    resume: u64,
}

/// Assembles the program: it calls the system often, outlives a forbidden access, waits for interrupts, and says so.
pub(super) fn program() -> Emit<Program> {
    let mut a = CodeAssembler::new(64)?;
    let mut data = Data::new(layout::USER_DATA);
    let (fs_base, gs_base) = (data.words(&[AT_FS]), data.words(&[0, AT_GS]));
    let hello = data.text("       hello from ring 3\r\n");
    let (mut again, mut resume, mut wait) = (a.create_label(), a.create_label(), a.create_label());

    a.xor(ebx, ebx)?;
    a.mov(r13d, CALLS)?;
    a.set_label(&mut again)?;
    a.mov(eax, call::TICKS)?;
    a.syscall()?;
    a.rol(rbx, 5)?;
    a.xor(rbx, qword_ptr(0).fs())?;
    a.add(rbx, qword_ptr(8).gs())?;
    a.dec(r13d)?;
    a.jne(again)?;

    // The kernel's memory is not for ring 3.
    a.mov(rax, qword_ptr(layout::DATA))?;
    a.ud2()?;
    a.set_label(&mut resume)?;

    // System calls run with interrupts off, so these two come while ring 3 runs.
    a.mov(eax, call::TICKS)?;
    a.syscall()?;
    a.lea(r14, ptr(rax + 2))?;
    a.set_label(&mut wait)?;
    a.mov(eax, call::TICKS)?;
    a.syscall()?;
    a.cmp(rax, r14)?;
    a.jb(wait)?;

    a.mov(rsi, hello)?;
    a.mov(eax, call::WRITE)?;
    a.syscall()?;
    a.mov(rdi, rbx)?;
    a.mov(eax, call::EXIT)?;
    a.syscall()?;
    a.ud2()?;

    let options = iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let result = a.assemble_options(layout::USER_CODE, options)?;
    let resume = result.label_ip(&resume)?;
    Ok(Program { code: result.inner.code_buffer, data: data.bytes, fs_base, gs_base, resume })
}

/// The program's result.
fn result() -> u64 {
    (0..CALLS).fold(0u64, |x, _| (x.rotate_left(5) ^ AT_FS).wrapping_add(AT_GS))
}

/// Runs the program by SYSRET.
pub(super) fn run(b: &mut Builder, program: &Program) -> Emit {
    b.check(&format!("ring 3: {CALLS} system calls, FS and GS, two interrupts, one forbidden access"), |b| {
        let (mut entry, mut back, mut start) = (b.a.create_label(), b.a.create_label(), b.a.create_label());
        b.a.jmp(start)?;
        system_call(b, &mut entry, back)?;

        b.a.set_label(&mut start)?;
        b.a.lea(rax, ptr(entry))?;
        b.a.mov(rdx, rax)?;
        b.a.shr(rdx, 32)?;
        b.a.mov(ecx, LSTAR)?;
        b.a.wrmsr()?;
        b.write_msr(STAR, u64::from(layout::USER_BASE) << 48 | u64::from(layout::KERNEL_CODE) << 32)?;
        b.write_msr(FMASK, INTERRUPT_FLAG)?;
        b.write_msr(FS_BASE, program.fs_base)?;
        b.a.mov(rax, program.resume)?;
        b.a.mov(qword_ptr(b.var.resume), rax)?;
        b.a.mov(qword_ptr(b.var.expected), i32::from(traps::PAGE_FAULT) + 1)?;

        // From here the stack and GS are the user's; SYSRET turns interrupts on again with the flags in R11.
        b.a.cli()?;
        b.write_msr(GS_BASE, program.gs_base)?;
        b.write_msr(KERNEL_GS_BASE, b.var.per_cpu)?;
        b.a.mov(qword_ptr(b.var.kernel_rsp), rsp)?;
        b.a.mov(rsp, layout::USER_STACK)?;
        b.a.mov(rcx, layout::USER_CODE)?;
        b.a.mov(r11d, INTERRUPT_FLAG as u32 | 2)?;
        b.a.sysretq()?;

        b.a.set_label(&mut back)?;
        b.a.mov(rsp, qword_ptr(b.var.kernel_rsp))?;
        b.a.sti()?;
        b.a.mov(rax, rdi)?;
        b.expect(result())?;
        b.expect_variable(b.var.error, fault::PRESENT | fault::USER)?;
        b.expect_variable(b.var.address, layout::DATA)
    })
}

/// The kernel's side: a stack of its own, found through GS.
fn system_call(b: &mut Builder, entry: &mut CodeLabel, back: CodeLabel) -> Emit {
    let (mut write, mut exit, mut done) = (b.a.create_label(), b.a.create_label(), b.a.create_label());
    let a = &mut b.a;
    a.set_label(entry)?;
    a.swapgs()?;
    a.mov(qword_ptr(8).gs(), rsp)?;
    a.mov(rsp, qword_ptr(0).gs())?;
    a.push(rcx)?;
    a.push(r11)?;
    a.cmp(eax, call::WRITE)?;
    a.je(write)?;
    a.cmp(eax, call::EXIT)?;
    a.je(exit)?;
    a.mov(rax, qword_ptr(b.var.ticks))?;
    a.jmp(done)?;
    a.set_label(&mut write)?;
    a.call(b.call.print)?;
    a.set_label(&mut done)?;
    a.pop(r11)?;
    a.pop(rcx)?;
    a.mov(rsp, qword_ptr(8).gs())?;
    a.swapgs()?;
    a.sysretq()?;
    a.set_label(&mut exit)?;
    a.swapgs()?;
    a.jmp(back)
}
