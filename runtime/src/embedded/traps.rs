//! Exceptions: the interrupt table, the handlers, and the checks that raise them on purpose.

use iced_x86::code_asm::*;
use iced_x86::{BlockEncoderOptions, IcedError};

use super::builder::{Builder, Emit};
use super::layout::{self, page};
use super::{console, timer};

const DIVIDE_ERROR: u8 = 0;
const BREAKPOINT: u8 = 3;
const INVALID_OPCODE: u8 = 6;
const DOUBLE_FAULT: u8 = 8;
const GENERAL_PROTECTION: u8 = 13;
pub(super) const PAGE_FAULT: u8 = 14;
/// Exceptions that push an error code (SDM vol. 3 table 6-1).
const WITH_ERROR_CODE: [u8; 10] = [8, 10, 11, 12, 13, 14, 17, 21, 29, 30];

/// Page-fault error code bits (SDM vol. 3 §4.7).
pub(super) mod fault {
    pub const PRESENT: u64 = 1 << 0;
    pub const WRITE: u64 = 1 << 1;
    pub const USER: u64 = 1 << 2;
    pub const FETCH: u64 = 1 << 4;
}

/// Handlers by vector. Vectors that are not here have no gate, so that they end in a general-protection exception.
pub(super) struct Handlers {
    entries: Vec<(u8, CodeLabel)>,
}

impl Handlers {
    /// The kernel's code, and its interrupt table (SDM vol. 3 §6.14.1), built from where the handlers came to lie.
    pub fn assemble(&self, mut a: CodeAssembler) -> Result<(Vec<u8>, Vec<u8>), IcedError> {
        let result = a.assemble_options(layout::CODE, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
        let mut table = vec![0; 16 * 256];
        for (vector, label) in &self.entries {
            let handler = result.label_ip(label)?;
            // Interrupt gates. Ring 3 may use the breakpoint's; the double fault has a stack that is surely good.
            let rights = if *vector == BREAKPOINT { 0xee00 } else { 0x8e00 };
            let stack = u64::from(*vector == DOUBLE_FAULT);
            let (segment, offset) = (u64::from(layout::KERNEL_CODE), handler & 0xffff | (handler >> 16 & 0xffff) << 48);
            let gate = offset | segment << 16 | (rights | stack) << 32;
            table[16 * usize::from(*vector)..][..8].copy_from_slice(&gate.to_le_bytes());
        }
        Ok((result.inner.code_buffer, table))
    }
}

/// One stub for each exception, which makes their stack frames alike, and the timer's handler.
pub(super) fn handlers(b: &mut Builder) -> Emit<Handlers> {
    let mut common = b.a.create_label();
    let mut entries = Vec::new();
    for vector in 0..32 {
        let mut stub = b.a.create_label();
        b.a.set_label(&mut stub)?;
        if !WITH_ERROR_CODE.contains(&vector) {
            b.a.push(0)?;
        }
        b.a.push(i32::from(vector))?;
        b.a.jmp(common)?;
        entries.push((vector, stub));
    }
    exception(b, &mut common)?;
    entries.extend(timer::handlers(b)?);
    Ok(Handlers { entries })
}

/// The page that is mapped on demand, an exception that a check expects, or the end.
fn exception(b: &mut Builder, common: &mut CodeLabel) -> Emit {
    // The frame, above the three registers saved.
    const VECTOR: i32 = 24;
    const ERROR: i32 = 32;
    const RIP: i32 = 40;
    let (mut other, mut unexpected, mut done) = (b.a.create_label(), b.a.create_label(), b.a.create_label());
    let a = &mut b.a;
    a.set_label(common)?;
    a.push(rax)?;
    a.push(rcx)?;
    a.push(rdx)?;

    a.cmp(qword_ptr(rsp + VECTOR), i32::from(PAGE_FAULT))?;
    a.jne(other)?;
    a.mov(rax, cr2)?;
    a.and(rax, -0x1000)?;
    a.cmp(rax, layout::DEMAND as i32)?;
    a.jne(other)?;
    a.mov(rax, layout::FRAME | page::DATA)?;
    a.mov(qword_ptr(layout::PAGE_TABLE + (layout::DEMAND >> 12) * 8), rax)?;
    a.inc(qword_ptr(b.var.demanded))?;
    a.jmp(done)?;

    a.set_label(&mut other)?;
    a.mov(rax, qword_ptr(rsp + VECTOR))?;
    a.inc(rax)?;
    a.cmp(rax, qword_ptr(b.var.expected))?;
    a.jne(unexpected)?;
    a.mov(qword_ptr(b.var.expected), 0)?;
    a.mov(rax, qword_ptr(rsp + ERROR))?;
    a.mov(qword_ptr(b.var.error), rax)?;
    a.mov(rax, cr2)?;
    a.mov(qword_ptr(b.var.address), rax)?;
    a.mov(rax, qword_ptr(b.var.resume))?;
    a.xchg(qword_ptr(rsp + RIP), rax)?;
    a.mov(qword_ptr(b.var.rip), rax)?;

    a.set_label(&mut done)?;
    a.pop(rdx)?;
    a.pop(rcx)?;
    a.pop(rax)?;
    a.add(rsp, 16)?;
    a.iretq()?;

    a.set_label(&mut unexpected)?;
    a.mov(rbx, rsp)?;
    console::failed_check(b)?;
    for (text, offset) in [(": exception ", VECTOR), (", error code ", ERROR), (", RIP ", RIP)] {
        b.say(text)?;
        b.a.mov(rax, qword_ptr(rbx + offset))?;
        b.a.call(b.call.hexadecimal)?;
    }
    b.say(", CR2 ")?;
    b.a.mov(rax, cr2)?;
    b.a.call(b.call.hexadecimal)?;
    b.say("\r\n")?;
    b.a.jmp(b.call.crash)
}

/// What the pushed instruction pointer must be.
enum Pushed {
    /// Of the instruction: a fault.
    This,
    /// Of the one that follows: a trap.
    Next,
    /// Of the target of a jump.
    Target(u64),
}

/// Emits an instruction that must raise `vector` with `error`, then goes on after it. Clobbers RAX and RCX.
fn raise(
    b: &mut Builder,
    vector: u8,
    error: u64,
    pushed: Pushed,
    instruction: impl FnOnce(&mut CodeAssembler) -> Emit,
) -> Emit {
    let (mut this, mut next, mut resume) = (b.a.create_label(), b.a.create_label(), b.a.create_label());
    b.a.lea(rcx, ptr(resume))?;
    b.a.mov(qword_ptr(b.var.resume), rcx)?;
    b.a.mov(qword_ptr(b.var.expected), i32::from(vector) + 1)?;
    b.a.set_label(&mut this)?;
    instruction(&mut b.a)?;
    b.a.set_label(&mut next)?;
    b.a.mov(ecx, u32::from(vector))?;
    b.a.jmp(b.call.fail)?;
    b.a.set_label(&mut resume)?;
    match pushed {
        Pushed::This => b.a.lea(rcx, ptr(this))?,
        Pushed::Next => b.a.lea(rcx, ptr(next))?,
        Pushed::Target(address) => b.a.mov(rcx, address)?,
    }
    b.a.mov(rax, qword_ptr(b.var.rip))?;
    b.a.cmp(rax, rcx)?;
    b.a.jne(b.call.fail)?;
    b.expect_variable(b.var.error, error)
}

/// Exceptions that programs meet: each is raised, and its frame looked at.
pub(super) fn exceptions(b: &mut Builder) -> Emit {
    b.check("exceptions: #BP, #DE, #UD, #GP", |b| {
        raise(b, BREAKPOINT, 0, Pushed::Next, |a| a.int3())?;
        b.a.xor(edx, edx)?;
        b.a.xor(ebx, ebx)?;
        raise(b, DIVIDE_ERROR, 0, Pushed::This, |a| a.div(ebx))?;
        raise(b, INVALID_OPCODE, 0, Pushed::This, |a| a.ud2())?;
        // An address that is not canonical.
        b.a.mov(rbx, 1u64 << 63)?;
        raise(b, GENERAL_PROTECTION, 0, Pushed::This, |a| a.mov(rax, qword_ptr(rbx)))
    })?;
    b.check("page protection: read-only code, data that cannot be executed", |b| {
        b.a.mov(rbx, layout::CODE)?;
        raise(b, PAGE_FAULT, fault::PRESENT | fault::WRITE, Pushed::This, |a| a.mov(byte_ptr(rbx), 0))?;
        b.expect_variable(b.var.address, layout::CODE)?;
        b.a.mov(rbx, layout::DATA)?;
        raise(b, PAGE_FAULT, fault::PRESENT | fault::FETCH, Pushed::Target(layout::DATA), |a| a.jmp(rbx))?;
        b.expect_variable(b.var.address, layout::DATA)
    })?;
    b.check("demand paging: a page that appears when it is touched", |b| {
        const VALUE: u64 = 0x05ee_dcaf_e0dd_ba11;
        b.a.mov(rax, VALUE)?;
        b.a.mov(qword_ptr(layout::FRAME + 0x230), rax)?;
        b.expect_variable(layout::DEMAND + 0x230, VALUE)?;
        b.expect_variable(layout::DEMAND + 0x230, VALUE)?;
        b.expect_variable(b.var.demanded, 1)
    })
}
