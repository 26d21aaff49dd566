//! SSE2 work: packed and scalar doubles, packed integers, and a picture.

use iced_x86::code_asm::*;

use super::builder::{Builder, Emit};
use super::{integer, layout};

/// Rows and columns of the matrices; even, for two numbers in a register.
const N: u32 = 48;
const MATRIX: u64 = (N * N * 8) as u64;
const SAMPLES: u32 = 4096;
const MULTIPLIER: u32 = 1_664_525;
const INCREMENT: u32 = 1_013_904_223;

/// The picture, in characters, and the part of the plane it shows.
pub(super) const WIDTH: u32 = 72;
const HEIGHT: u32 = 24;
const LEFT: f64 = -2.2;
const TOP: f64 = -1.15;
const STEP_X: f64 = 3.0 / WIDTH as f64;
const STEP_Y: f64 = 0.1;
const ITERATIONS: u32 = 200;
const HASH: u64 = 0x0000_0100_0000_01b3;

/// All of it.
pub(super) fn work(b: &mut Builder) -> Emit {
    b.check(&format!("SSE2: product of two {N} x {N} matrices of doubles"), |b| {
        matrices(b)?;
        b.expect(product())
    })?;
    b.check("SSE2: packed integers (PSADBW, PMADDWD)", |b| {
        sums(b)?;
        b.expect(integer::primes(&integer::sieved()))?;
        dot_product(b)?;
        b.expect(u64::from(dot()))
    })?;
    b.say("\r\n")?;
    b.check("SSE2: the Mandelbrot set, as above", |b| {
        picture(b)?;
        b.expect(hash(&drawn()))
    })
}

/// One step of the generator that makes numbers for the checks.
fn random(x: u32) -> u32 {
    x.wrapping_mul(MULTIPLIER).wrapping_add(INCREMENT)
}

/// The same in EAX.
fn next_random(a: &mut CodeAssembler) -> Emit {
    a.imul_3(eax, eax, MULTIPLIER as i32)?;
    a.add(eax, INCREMENT)
}

/// Loads a constant. Clobbers RAX.
fn constant(a: &mut CodeAssembler, register: AsmRegisterXmm, value: f64) -> Emit {
    a.mov(rax, value.to_bits())?;
    a.movq(register, rax)
}

/// RAX = checksum of the product of two matrices of random numbers.
fn matrices(b: &mut Builder) -> Emit {
    let (left, right, product) = (layout::MATRICES, layout::MATRICES + MATRIX, layout::MATRICES + 2 * MATRIX);
    constant(&mut b.a, xmm1, 1.0 / 65536.0)?;
    b.a.mov(rdi, left)?;
    b.a.mov(eax, 1)?;
    // Both operands, one after the other.
    b.repeat(ecx, 2 * N * N, |b| {
        next_random(&mut b.a)?;
        b.a.cvtsi2sd(xmm0, eax)?;
        b.a.mulsd(xmm0, xmm1)?;
        b.a.movsd_2(qword_ptr(rdi), xmm0)?;
        b.a.add(rdi, 8)
    })?;
    b.a.mov(rdi, product)?;
    b.a.mov(ecx, N * N)?;
    b.a.xor(eax, eax)?;
    b.a.rep().stosq()?;

    // Row by row: each number of the left row times a row of the right matrix, added to the row of the product.
    b.a.mov(rsi, left)?;
    b.a.mov(rdi, product)?;
    b.repeat(r8d, N, |b| {
        b.a.mov(rbx, right)?;
        b.repeat(r9d, N, |b| {
            b.a.movsd_2(xmm0, qword_ptr(rsi))?;
            b.a.unpcklpd(xmm0, xmm0)?;
            b.a.xor(edx, edx)?;
            b.repeat(ecx, N / 2, |b| {
                b.a.movapd(xmm1, xmmword_ptr(rbx + rdx))?;
                b.a.mulpd(xmm1, xmm0)?;
                b.a.addpd(xmm1, xmmword_ptr(rdi + rdx))?;
                b.a.movapd(xmmword_ptr(rdi + rdx), xmm1)?;
                b.a.add(rdx, 16)
            })?;
            b.a.add(rsi, 8)?;
            b.a.add(rbx, (N * 8) as i32)
        })?;
        b.a.add(rdi, (N * 8) as i32)
    })?;

    b.a.mov(rsi, product)?;
    b.a.xor(eax, eax)?;
    b.repeat(ecx, N * N, |b| {
        b.a.rol(rax, 1)?;
        b.a.xor(rax, qword_ptr(rsi))?;
        b.a.add(rsi, 8)
    })
}

fn product() -> u64 {
    const LEN: usize = (N * N) as usize;
    let mut x = 1;
    let mut number = || {
        x = random(x);
        f64::from(x as i32) * (1.0 / 65536.0)
    };
    let mut matrix = || -> Vec<f64> { (0..LEN).map(|_| number()).collect() };
    let (left, right) = (matrix(), matrix());
    let n = N as usize;
    let mut product = vec![0.0; LEN];
    for (row, sums) in left.chunks(n).zip(product.chunks_mut(n)) {
        for (x, numbers) in row.iter().zip(right.chunks(n)) {
            sums.iter_mut().zip(numbers).for_each(|(sum, y)| *sum += y * x);
        }
    }
    product.iter().fold(0u64, |sum, x| sum.rotate_left(1) ^ x.to_bits())
}

/// RAX = sum of the bytes of the sieve, sixteen at a time: its primes.
fn sums(b: &mut Builder) -> Emit {
    b.a.mov(rsi, layout::SIEVE)?;
    b.a.pxor(xmm0, xmm0)?;
    b.a.pxor(xmm2, xmm2)?;
    b.repeat(ecx, integer::SIEVE_LIMIT / 16, |b| {
        b.a.movdqa(xmm1, xmmword_ptr(rsi))?;
        b.a.psadbw(xmm1, xmm2)?;
        b.a.paddq(xmm0, xmm1)?;
        b.a.add(rsi, 16)
    })?;
    b.a.pshufd(xmm1, xmm0, 0b1110)?;
    b.a.paddq(xmm0, xmm1)?;
    b.a.movq(rax, xmm0)
}

/// RAX = dot product of random 16-bit numbers with themselves, one vector further.
fn dot_product(b: &mut Builder) -> Emit {
    b.a.mov(rdi, layout::SAMPLES)?;
    b.a.mov(eax, 1)?;
    b.repeat(ecx, SAMPLES + 8, |b| {
        next_random(&mut b.a)?;
        b.a.mov(edx, eax)?;
        b.a.shr(edx, 16)?;
        b.a.mov(word_ptr(rdi), dx)?;
        b.a.add(rdi, 2)
    })?;
    b.a.mov(rsi, layout::SAMPLES)?;
    b.a.pxor(xmm0, xmm0)?;
    b.repeat(ecx, SAMPLES / 8, |b| {
        b.a.movdqu(xmm1, xmmword_ptr(rsi))?;
        b.a.pmaddwd(xmm1, xmmword_ptr(rsi + 16))?;
        b.a.paddd(xmm0, xmm1)?;
        b.a.add(rsi, 16)
    })?;
    for order in [0b1110, 0b01] {
        b.a.pshufd(xmm1, xmm0, order)?;
        b.a.paddd(xmm0, xmm1)?;
    }
    b.a.movd(eax, xmm0)
}

fn dot() -> u32 {
    let mut x = 1;
    let samples: Vec<i32> = (0..SAMPLES + 8)
        .map(|_| {
            x = random(x);
            i32::from((x >> 16) as i16)
        })
        .collect();
    samples.iter().zip(&samples[8..]).fold(0, |sum, (x, y)| sum.wrapping_add((x * y) as u32))
}

/// The character of a point that leaves after `n` iterations, in steps of half a power of two; `@` never leaves.
fn shade(n: u32) -> u8 {
    const SHADES: &[u8; 12] = b"  ..,:-=+*%#";
    let n = n.max(1);
    let half_powers = 2 * n.ilog2() + u32::from(n * n >= 2 << (2 * n.ilog2()));
    if n == ITERATIONS { b'@' } else { SHADES[half_powers.min(11) as usize] }
}

/// RAX = hash of the picture, which it draws. A point is where Z = Z² + C begins with Z = 0.
fn picture(b: &mut Builder) -> Emit {
    let shades: String = (0..=ITERATIONS).map(|n| char::from(shade(n))).collect();
    let shades = b.data.text(&shades);
    let (column, row, hash) = (r12d, r13d, r14);
    let [re, im, c_re, c_im, re2, im2, limit, size] = [xmm0, xmm1, xmm2, xmm3, xmm4, xmm5, xmm6, xmm7];
    let (mut next_row, mut next_column, mut step, mut out) =
        (b.a.create_label(), b.a.create_label(), b.a.create_label(), b.a.create_label());
    let a = &mut b.a;
    constant(a, limit, 4.0)?;
    constant(a, xmm8, STEP_X)?;
    constant(a, xmm9, LEFT)?;
    constant(a, xmm10, STEP_Y)?;
    constant(a, xmm11, TOP)?;
    a.xor(row, row)?;
    a.xor(r14d, r14d)?;

    a.set_label(&mut next_row)?;
    a.cvtsi2sd(c_im, row)?;
    a.mulsd(c_im, xmm10)?;
    a.addsd(c_im, xmm11)?;
    a.xor(column, column)?;

    a.set_label(&mut next_column)?;
    a.cvtsi2sd(c_re, column)?;
    a.mulsd(c_re, xmm8)?;
    a.addsd(c_re, xmm9)?;
    a.xorpd(re, re)?;
    a.xorpd(im, im)?;
    a.xor(ebx, ebx)?;

    a.set_label(&mut step)?;
    a.movapd(re2, re)?;
    a.mulsd(re2, re)?;
    a.movapd(im2, im)?;
    a.mulsd(im2, im)?;
    a.movapd(size, re2)?;
    a.addsd(size, im2)?;
    a.comisd(size, limit)?;
    a.ja(out)?;
    a.mulsd(im, re)?;
    a.addsd(im, im)?;
    a.addsd(im, c_im)?;
    a.movapd(re, re2)?;
    a.subsd(re, im2)?;
    a.addsd(re, c_re)?;
    a.inc(ebx)?;
    a.cmp(ebx, ITERATIONS)?;
    a.jb(step)?;

    a.set_label(&mut out)?;
    a.movzx(ecx, byte_ptr(rbx + shades))?;
    a.xor(hash, rcx)?;
    a.mov(rax, HASH)?;
    a.imul_2(hash, rax)?;
    a.call(b.call.put)?;
    a.inc(column)?;
    a.cmp(column, WIDTH)?;
    a.jb(next_column)?;
    b.say("\r\n")?;
    b.a.inc(row)?;
    b.a.cmp(row, HEIGHT)?;
    b.a.jb(next_row)?;
    b.say("\r\n")?;
    b.a.mov(rax, hash)
}

/// The picture's characters, without line ends.
pub(super) fn drawn() -> Vec<u8> {
    let point = |n: u32| {
        let (c_re, c_im) = (f64::from(n % WIDTH) * STEP_X + LEFT, f64::from(n / WIDTH) * STEP_Y + TOP);
        let (mut re, mut im) = (0.0, 0.0);
        for n in 0..ITERATIONS {
            let (re2, im2): (f64, f64) = (re * re, im * im);
            if re2 + im2 > 4.0 {
                return shade(n);
            }
            im *= re;
            im = im + im + c_im;
            re = re2 - im2 + c_re;
        }
        shade(ITERATIONS)
    };
    (0..WIDTH * HEIGHT).map(point).collect()
}

fn hash(picture: &[u8]) -> u64 {
    picture.iter().fold(0, |x, &byte| (x ^ u64::from(byte)).wrapping_mul(HASH))
}
