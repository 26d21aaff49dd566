//! Integer work. The expected results are computed here, by the same algorithms in Rust.

use iced_x86::code_asm::*;

use super::builder::{Builder, Emit};
use super::layout;

pub(super) const SIEVE_LIMIT: u32 = 1_000_000;
const FIBONACCI: u32 = 25;
const DIVISIONS: u32 = 10_000;
const PATCHES: u32 = 200;
/// The reflected polynomial of CRC-32 (ISO 3309).
const POLYNOMIAL: u32 = 0xedb8_8320;
/// Any odd numbers do; the multiplier is below the divisor, so that the quotient fits.
const MULTIPLIER: u64 = 0x5851_f42d_4c95_7f2d;
const DIVISOR: u64 = 0x9e37_79b9_7f4a_7c15;
const SMALL_DIVISOR: i64 = -12_345;

/// All of it.
pub(super) fn work(b: &mut Builder) -> Emit {
    let sieve_expected = sieved();
    b.check(&format!("sieve of Eratosthenes: primes below {SIEVE_LIMIT}"), |b| {
        sieve(b)?;
        b.expect(primes(&sieve_expected))
    })?;
    b.check("CRC-32 of the sieve, by a table", |b| {
        crc(b)?;
        b.expect(u64::from(crc32(&sieve_expected)))
    })?;
    b.check(&format!("Fibonacci number {FIBONACCI}, by recursion"), |b| {
        recursion(b)?;
        b.expect(fibonacci(FIBONACCI))
    })?;
    b.check("64-bit multiplication and division, unsigned and signed", |b| {
        divisions(b)?;
        b.expect(divided())
    })?;
    b.check("string instructions: MOVS, STOS, SCAS, CMPS, forwards and backwards", strings)?;
    b.check(&format!("self-modifying code: {PATCHES} patches of an instruction"), patches)
}

/// RAX = number of primes; a byte for each number stays at [`layout::SIEVE`], 1 if it is prime.
fn sieve(b: &mut Builder) -> Emit {
    let (mut outer, mut inner, mut next, mut done, mut count) =
        (b.a.create_label(), b.a.create_label(), b.a.create_label(), b.a.create_label(), b.a.create_label());
    let a = &mut b.a;
    a.mov(rdi, layout::SIEVE)?;
    a.mov(ecx, SIEVE_LIMIT)?;
    a.mov(al, 1)?;
    a.rep().stosb()?;
    a.mov(rdi, layout::SIEVE)?;
    a.mov(word_ptr(rdi), 0)?;
    a.mov(ecx, 2)?;
    a.set_label(&mut outer)?;
    a.mov(edx, ecx)?;
    a.imul_2(edx, ecx)?;
    a.cmp(edx, SIEVE_LIMIT)?;
    a.jae(done)?;
    a.cmp(byte_ptr(rdi + rcx), 0)?;
    a.je(next)?;
    a.set_label(&mut inner)?;
    a.mov(byte_ptr(rdi + rdx), 0)?;
    a.add(edx, ecx)?;
    a.cmp(edx, SIEVE_LIMIT)?;
    a.jb(inner)?;
    a.set_label(&mut next)?;
    a.inc(ecx)?;
    a.jmp(outer)?;

    a.set_label(&mut done)?;
    a.xor(eax, eax)?;
    a.xor(ecx, ecx)?;
    a.set_label(&mut count)?;
    a.movzx(edx, byte_ptr(rdi + rcx))?;
    a.add(eax, edx)?;
    a.inc(ecx)?;
    a.cmp(ecx, SIEVE_LIMIT)?;
    a.jb(count)
}

pub(super) fn sieved() -> Vec<u8> {
    let mut sieve = vec![1; SIEVE_LIMIT as usize];
    sieve[..2].fill(0);
    for p in (2..).take_while(|p| p * p < SIEVE_LIMIT as usize) {
        if sieve[p] == 1 {
            sieve[p * p..].iter_mut().step_by(p).for_each(|n| *n = 0);
        }
    }
    sieve
}

pub(super) fn primes(sieve: &[u8]) -> u64 {
    sieve.iter().map(|&n| u64::from(n)).sum()
}

/// RAX = CRC-32 of the sieve.
fn crc(b: &mut Builder) -> Emit {
    let (mut entry, mut bit, mut even, mut next) =
        (b.a.create_label(), b.a.create_label(), b.a.create_label(), b.a.create_label());
    let a = &mut b.a;
    a.xor(ebx, ebx)?;
    a.set_label(&mut entry)?;
    a.mov(eax, ebx)?;
    a.mov(ecx, 8)?;
    a.set_label(&mut bit)?;
    a.shr(eax, 1)?;
    a.jae(even)?;
    a.xor(eax, POLYNOMIAL)?;
    a.set_label(&mut even)?;
    a.dec(ecx)?;
    a.jne(bit)?;
    a.mov(dword_ptr(layout::CRC_TABLE) + rbx * 4, eax)?;
    a.inc(ebx)?;
    a.cmp(ebx, 256)?;
    a.jb(entry)?;

    a.mov(eax, u32::MAX)?;
    a.mov(rsi, layout::SIEVE)?;
    a.mov(ecx, SIEVE_LIMIT)?;
    a.set_label(&mut next)?;
    a.movzx(edx, byte_ptr(rsi))?;
    a.xor(dl, al)?;
    a.shr(eax, 8)?;
    a.xor(eax, dword_ptr(layout::CRC_TABLE) + rdx * 4)?;
    a.inc(rsi)?;
    a.dec(ecx)?;
    a.jne(next)?;
    a.not(eax)
}

pub(super) fn crc32(bytes: &[u8]) -> u32 {
    let entry = |n: u32| (0..8).fold(n, |x, _| if x & 1 == 1 { x >> 1 ^ POLYNOMIAL } else { x >> 1 });
    let table: [u32; 256] = std::array::from_fn(|n| entry(n as u32));
    !bytes.iter().fold(u32::MAX, |x, &byte| x >> 8 ^ table[usize::from(x as u8 ^ byte)])
}

/// RAX = a Fibonacci number, by a function that calls itself twice.
fn recursion(b: &mut Builder) -> Emit {
    let (mut fib, mut deeper, mut start) = (b.a.create_label(), b.a.create_label(), b.a.create_label());
    let a = &mut b.a;
    a.jmp(start)?;
    a.set_label(&mut fib)?;
    a.cmp(edi, 2)?;
    a.jae(deeper)?;
    a.mov(eax, edi)?;
    a.ret()?;
    a.set_label(&mut deeper)?;
    a.push(rdi)?;
    a.dec(edi)?;
    a.call(fib)?;
    a.pop(rdi)?;
    a.push(rax)?;
    a.sub(edi, 2)?;
    a.call(fib)?;
    a.pop(rdx)?;
    a.add(rax, rdx)?;
    a.ret()?;
    a.set_label(&mut start)?;
    a.mov(edi, FIBONACCI)?;
    a.call(fib)
}

pub(super) fn fibonacci(n: u32) -> u64 {
    (0..n).fold((0, 1), |(x, y), _| (y, x + y)).0
}

/// RAX = the end of a chain of 128-bit products and quotients.
fn divisions(b: &mut Builder) -> Emit {
    b.a.mov(rax, 1u64)?;
    b.a.mov(rbx, MULTIPLIER)?;
    b.a.mov(rdi, DIVISOR)?;
    b.a.mov(r9, SMALL_DIVISOR as u64)?;
    b.repeat(ecx, DIVISIONS, |b| {
        b.a.mul(rbx)?;
        b.a.div(rdi)?;
        b.a.rol(rdx, 32)?;
        b.a.xor(rax, rdx)?;
        b.a.add(rax, rcx)?;
        b.a.mov(rsi, rax)?;
        b.a.cqo()?;
        b.a.idiv(r9)?;
        b.a.sub(rsi, rax)?;
        b.a.lea(rax, ptr(rsi + rdx * 8))
    })
}

fn divided() -> u64 {
    (1..=u64::from(DIVISIONS)).rev().fold(1, |x: u64, n| {
        let product = u128::from(x) * u128::from(MULTIPLIER);
        let (quotient, rest) = (product / u128::from(DIVISOR), product % u128::from(DIVISOR));
        let x = (quotient as u64 ^ (rest as u64).rotate_left(32)).wrapping_add(n);
        let (quotient, rest) = (x as i64 / SMALL_DIVISOR, x as i64 % SMALL_DIVISOR);
        x.wrapping_sub(quotient as u64).wrapping_add((rest as u64).wrapping_mul(8))
    })
}

/// A text is copied, measured, compared, moved over itself in both directions, and a block filled.
fn strings(b: &mut Builder) -> Emit {
    const TEXT: &str = "the quick brown fox jumps over the lazy dog";
    const LENGTH: u64 = TEXT.len() as u64;
    const SHIFT: u64 = 5;
    const QUADWORDS: u64 = 2048;
    let text = b.data.text(TEXT);
    let (copy, filled) = (layout::STRINGS, layout::STRINGS + 0x1000);
    b.a.mov(rsi, text)?;
    b.a.mov(rdi, copy)?;
    b.a.mov(ecx, LENGTH as u32 + 1)?;
    b.a.rep().movsb()?;

    // Its length, from the count that SCAS leaves.
    b.a.mov(rdi, copy)?;
    b.a.mov(rcx, u64::MAX)?;
    b.a.xor(eax, eax)?;
    b.a.repne().scasb()?;
    b.a.not(rcx)?;
    b.a.lea(rax, ptr(rcx - 1))?;
    b.expect(LENGTH)?;

    // CMPS stops after the first byte that differs.
    let changed = LENGTH / 2;
    b.a.xor(byte_ptr(copy + changed), 1)?;
    b.a.mov(rsi, text)?;
    b.a.mov(rdi, copy)?;
    b.a.mov(ecx, LENGTH as u32)?;
    b.a.repe().cmpsb()?;
    b.a.mov(rax, rsi)?;
    b.expect(text + changed + 1)?;
    b.a.xor(byte_ptr(copy + changed), 1)?;

    // Upwards over itself, which only works backwards.
    b.a.std()?;
    b.a.mov(rsi, copy + LENGTH - 1)?;
    b.a.mov(rdi, copy + LENGTH - 1 + SHIFT)?;
    b.a.mov(ecx, LENGTH as u32)?;
    b.a.rep().movsb()?;
    b.a.cld()?;
    b.a.mov(rsi, text)?;
    b.a.mov(rdi, copy + SHIFT)?;
    b.a.mov(ecx, LENGTH as u32)?;
    b.a.repe().cmpsb()?;
    b.a.mov(rax, rcx)?;
    b.a.jne(b.call.fail)?;
    b.expect(0)?;

    // A block in quadwords, looked at across its last boundary but one.
    b.a.mov(rdi, filled)?;
    b.a.mov(rax, MULTIPLIER)?;
    b.a.mov(ecx, QUADWORDS as u32)?;
    b.a.rep().stosq()?;
    b.a.mov(rax, qword_ptr(filled + 8 * QUADWORDS - 12))?;
    b.expect(MULTIPLIER.rotate_right(32))
}

/// Writes a function, then changes its constant before each call.
fn patches(b: &mut Builder) -> Emit {
    // MOV EAX, imm32; RET.
    b.a.mov(byte_ptr(layout::PATCH), 0xb8)?;
    b.a.mov(byte_ptr(layout::PATCH + 5), 0xc3)?;
    b.a.mov(rdi, layout::PATCH)?;
    b.a.xor(ebx, ebx)?;
    b.repeat(ecx, PATCHES, |b| {
        b.a.mov(dword_ptr(rdi + 1), ecx)?;
        b.a.call(rdi)?;
        b.a.imul_3(ebx, ebx, 3)?;
        b.a.add(ebx, eax)
    })?;
    b.a.mov(eax, ebx)?;
    b.expect(u64::from((1..=PATCHES).rev().fold(0u32, |x, n| x.wrapping_mul(3).wrapping_add(n))))
}
