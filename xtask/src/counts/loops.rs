//! The loops: each runs ECX rounds of what programs do much of, and ends by a write to a port.

use diglot_translator::testing::bare::{CODE, DATA};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// A loop's name, and its code.
pub type Loop = (&'static str, fn() -> Vec<u8>);

/// All of them.
pub const LOOPS: &[Loop] = &[
    ("sum", sum),
    ("copy", copy),
    ("crc", crc),
    ("branches", branches),
    ("calls", calls),
    ("dispatch", dispatch),
    ("carries", carries),
    ("bytes", bytes),
    ("stack", stack),
    ("rotates", rotates),
    ("divide", divide),
    ("pages", pages),
    ("scalar", scalar),
    ("packed", packed),
    ("avx2", avx2),
    ("x87", x87),
    ("strings", strings),
];

/// A loop around `body`, behind `setup`; the body may use all registers but RCX.
fn around(
    setup: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    body: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Vec<u8> {
    let emit = || {
        let mut a = CodeAssembler::new(64)?;
        let mut again = a.create_label();
        setup(&mut a)?;
        a.set_label(&mut again)?;
        body(&mut a)?;
        a.sub(rcx, 1)?;
        a.jne(again)?;
        a.out(0x80, al)?;
        a.assemble(CODE)
    };
    emit().expect("code that can be encoded")
}

fn at_data(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rsi, DATA)?;
    a.mov(rdi, DATA + 0x1000)?;
    a.xor(eax, eax)
}

fn sum() -> Vec<u8> {
    around(at_data, |a| a.add(rax, qword_ptr(rsi + rcx * 8)))
}

fn copy() -> Vec<u8> {
    around(at_data, |a| {
        a.mov(rax, qword_ptr(rsi + rcx * 8))?;
        a.mov(qword_ptr(rdi + rcx * 8), rax)
    })
}

fn crc() -> Vec<u8> {
    around(at_data, |a| {
        a.movzx(edx, byte_ptr(rsi + rcx))?;
        a.xor(dl, al)?;
        a.movzx(edx, dl)?;
        a.shr(eax, 8)?;
        a.xor(eax, dword_ptr(rdi + rdx * 4))
    })
}

/// Collatz steps.
pub fn branches() -> Vec<u8> {
    around(at_data, |a| {
        let (mut odd, mut go_on) = (a.create_label(), a.create_label());
        a.mov(rax, rcx)?;
        a.test(al, 1)?;
        a.jne(odd)?;
        a.shr(rax, 1)?;
        a.jmp(go_on)?;
        a.set_label(&mut odd)?;
        a.lea(rax, qword_ptr(rax + rax * 2 + 1))?;
        a.set_label(&mut go_on)?;
        a.cmp(rax, rbx)?;
        a.cmova(rbx, rax)
    })
}

/// A function that calls another.
fn calls() -> Vec<u8> {
    around(
        |a| {
            let (mut inner, mut begin) = (a.create_label(), a.create_label());
            a.jmp(begin)?;
            a.set_label(&mut inner)?;
            a.add(rax, 1)?;
            a.ret()?;
            a.push(rbx)?;
            a.call(inner)?;
            a.pop(rbx)?;
            a.ret()?;
            a.set_label(&mut begin)?;
            a.xor(eax, eax)
        },
        |a| {
            // The outer function stands behind a short jump and the inner one, of 7 bytes.
            a.call(CODE + 2 + 7)?;
            a.call(CODE + 2)
        },
    )
}

/// A byte code of four operations.
fn dispatch() -> Vec<u8> {
    around(
        |a| {
            let mut handlers = [(); 4].map(|()| a.create_label());
            let (mut begin, mut next) = (a.create_label(), a.create_label());
            a.jmp(begin)?;
            for (n, handler) in handlers.iter_mut().enumerate() {
                a.set_label(handler)?;
                a.add(rax, n as i32 + 1)?;
                a.jmp(next)?;
            }
            a.set_label(&mut next)?;
            a.ret()?;
            a.set_label(&mut begin)?;
            a.mov(rbx, DATA)?;
            for (n, handler) in handlers.into_iter().enumerate() {
                a.lea(rdx, qword_ptr(handler))?;
                a.mov(qword_ptr(rbx + 8 * n), rdx)?;
            }
            Ok(())
        },
        |a| {
            let mut back = a.create_label();
            a.lea(rdx, qword_ptr(back))?;
            a.push(rdx)?;
            a.mov(edx, ecx)?;
            a.and(edx, 3)?;
            a.jmp(qword_ptr(rbx + rdx * 8))?;
            a.set_label(&mut back)?;
            a.nop()
        },
    )
}

fn carries() -> Vec<u8> {
    around(at_data, |a| {
        a.add(rax, qword_ptr(rsi))?;
        a.adc(rdx, qword_ptr(rsi + 8))?;
        a.setb(bl)?;
        a.inc(r8)?;
        a.adc(r9, r8)?;
        a.sbb(r10, r10)?;
        a.cmp(r9, rax)?;
        a.cmovb(rbx, r9)
    })
}

fn bytes() -> Vec<u8> {
    around(at_data, |a| {
        a.mov(al, byte_ptr(rsi))?;
        a.add(al, cl)?;
        a.mov(ah, al)?;
        a.xor(bl, ah)?;
        a.mov(dx, ax)?;
        a.movsx(edx, dx)?;
        a.mov(byte_ptr(rsi + 1), bl)
    })
}

fn stack() -> Vec<u8> {
    around(at_data, |a| {
        a.push(rax)?;
        a.push(rbx)?;
        a.mov(rax, qword_ptr(rsp + 8))?;
        a.pop(rdx)?;
        a.pop(r8)
    })
}

/// The mixing of a hash.
fn rotates() -> Vec<u8> {
    around(at_data, |a| {
        a.mov(edx, eax)?;
        a.rol(edx, 7)?;
        a.mov(r8d, eax)?;
        a.ror(r8d, 18)?;
        a.xor(edx, r8d)?;
        a.shr(r8d, 3)?;
        a.xor(edx, r8d)?;
        a.add(eax, edx)?;
        a.bswap(eax)
    })
}

fn divide() -> Vec<u8> {
    around(
        |a| {
            at_data(a)?;
            a.mov(ebx, 7)
        },
        |a| {
            a.mov(eax, ecx)?;
            a.xor(edx, edx)?;
            a.div(ebx)?;
            a.imul_3(r8, rdx, 11)
        },
    )
}

/// Each load in another page than the one before.
fn pages() -> Vec<u8> {
    around(at_data, |a| {
        a.mov(edx, ecx)?;
        a.and(edx, 63)?;
        a.shl(edx, 12)?;
        a.add(rax, qword_ptr(rsi + rdx))
    })
}

fn scalar() -> Vec<u8> {
    around(at_data, |a| {
        a.movsd_2(xmm0, qword_ptr(rsi + 8))?;
        a.mulsd(xmm0, xmm1)?;
        a.addsd(xmm2, xmm0)?;
        a.cvtsi2sd(xmm3, rcx)?;
        a.subsd(xmm2, xmm3)?;
        a.movsd_2(qword_ptr(rdi), xmm2)
    })
}

fn packed() -> Vec<u8> {
    around(at_data, |a| {
        a.movdqu(xmm0, xmmword_ptr(rsi))?;
        a.paddd(xmm0, xmm1)?;
        a.pshufd(xmm2, xmm0, 0x1b)?;
        a.pcmpeqb(xmm2, xmm1)?;
        a.pmovmskb(eax, xmm2)?;
        a.mulpd(xmm3, xmm4)?;
        a.movups(xmmword_ptr(rdi), xmm0)
    })
}

fn avx2() -> Vec<u8> {
    around(at_data, |a| {
        a.vmovupd(ymm0, ymmword_ptr(rsi))?;
        a.vfmadd231pd(ymm1, ymm0, ymm2)?;
        a.vpaddd(ymm3, ymm3, ymm0)?;
        a.vmovupd(ymmword_ptr(rdi), ymm1)
    })
}

fn x87() -> Vec<u8> {
    around(
        |a| {
            at_data(a)?;
            a.fninit()
        },
        |a| {
            a.fld1()?;
            a.fild(qword_ptr(rsi))?;
            a.faddp(st1, st0)?;
            a.fmul_2(st0, st0)?;
            a.fstp(qword_ptr(rdi))
        },
    )
}

fn strings() -> Vec<u8> {
    around(at_data, |a| {
        a.mov(rdx, rcx)?;
        a.mov(rsi, DATA)?;
        a.mov(rdi, DATA + 0x1000)?;
        a.mov(ecx, 100)?;
        a.rep().movsb()?;
        a.mov(rcx, rdx)
    })
}
