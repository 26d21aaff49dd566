//! Floating-point work: f64 in scalar, SSE2 and AVX2+FMA form, and the x87's 80 bits.

use std::arch::asm;
use std::arch::x86_64::*;
use std::hint::black_box;

use crate::{Program, fold};

/// The group's programs.
pub const PROGRAMS: &[Program] = &[
    Program { name: "matrix-scalar", run: matrix_scalar, result: Some(0xa6c0_a185_93f9_8fd8) },
    Program { name: "matrix-sse2", run: matrix_sse2, result: Some(0xa6c0_a185_93f9_8fd8) },
    Program { name: "matrix-avx2", run: matrix_avx2, result: Some(0x1e8f_6a57_c03a_b3a8) },
    Program { name: "dot-avx2", run: dot_avx2, result: Some(0x366f_9fb4_220c_662d) },
    Program { name: "nbody", run: nbody, result: Some(0xe842_9b2c_3941_b36d) },
    Program { name: "mandelbrot", run: mandelbrot, result: Some(0x4888_02e1_de5a_c789) },
    Program { name: "x87", run: x87, result: Some(0x8d21_b715_1534_f55f) },
];

const N: usize = 448;
type Matrix = Vec<[f64; N]>;

fn matrices() -> (Matrix, Matrix) {
    let make = |f: fn(usize, usize) -> f64| (0..N).map(|i| std::array::from_fn(|j| f(i, j))).collect::<Matrix>();
    black_box((make(|i, j| (i * 3 + j) as f64 / 7.0), make(|i, j| (i as f64 - j as f64) / 3.0)))
}

fn checksum(m: &Matrix) -> Option<u64> {
    Some(m.iter().flatten().fold(0, |s, v| fold(s, v.to_bits())))
}

/// A product of matrices, a multiplication and an addition at a time.
fn matrix_scalar() -> Option<u64> {
    let (a, b) = matrices();
    let mut c: Matrix = vec![[0.0; N]; N];
    for i in 0..N {
        for j in 0..N {
            // Sums in order: no compiler may vectorise them.
            c[i][j] = (0..N).fold(0.0, |s, k| s + a[i][k] * b[k][j]);
        }
    }
    checksum(&c)
}

/// The same two at a time, a row of the result at once.
fn matrix_sse2() -> Option<u64> {
    let (a, b) = matrices();
    let mut c: Matrix = vec![[0.0; N]; N];
    for (row, out) in a.iter().zip(&mut c) {
        for (&factor, other) in row.iter().zip(&b) {
            // SAFETY: SSE2 is in every x86-64 CPU, and the pointers stay inside rows of N, an even number.
            unsafe {
                let factor = _mm_set1_pd(factor);
                for j in (0..N).step_by(2) {
                    let sum = _mm_loadu_pd(out.as_ptr().add(j));
                    let product = _mm_mul_pd(factor, _mm_loadu_pd(other.as_ptr().add(j)));
                    _mm_storeu_pd(out.as_mut_ptr().add(j), _mm_add_pd(sum, product));
                }
            }
        }
    }
    checksum(&c)
}

fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

/// The same four at a time, fused.
fn matrix_avx2() -> Option<u64> {
    #[target_feature(enable = "avx2,fma")]
    fn multiply(a: &Matrix, b: &Matrix, c: &mut Matrix) {
        for (row, out) in a.iter().zip(c) {
            for (&factor, other) in row.iter().zip(b) {
                let factor = _mm256_set1_pd(factor);
                for j in (0..N).step_by(4) {
                    // SAFETY: the pointers stay inside rows of N, a multiple of 4.
                    unsafe {
                        let sum = _mm256_loadu_pd(out.as_ptr().add(j));
                        let sum = _mm256_fmadd_pd(factor, _mm256_loadu_pd(other.as_ptr().add(j)), sum);
                        _mm256_storeu_pd(out.as_mut_ptr().add(j), sum);
                    }
                }
            }
        }
    }
    let (a, b) = matrices();
    let mut c: Matrix = vec![[0.0; N]; N];
    if !has_avx2() {
        return None;
    }
    // SAFETY: the CPU has AVX2 and FMA.
    unsafe { multiply(&a, &b, &mut c) };
    checksum(&c)
}

/// Dot products of 32-bit floats with four sums of eight lanes.
fn dot_avx2() -> Option<u64> {
    #[target_feature(enable = "avx2,fma")]
    fn dot(a: &[f32], b: &[f32]) -> [f32; 8] {
        let mut sums = [_mm256_setzero_ps(); 4];
        for (a, b) in a.chunks_exact(32).zip(b.chunks_exact(32)) {
            for (k, sum) in sums.iter_mut().enumerate() {
                // SAFETY: both chunks have 32 elements.
                let (a, b) = unsafe { (_mm256_loadu_ps(a[8 * k..].as_ptr()), _mm256_loadu_ps(b[8 * k..].as_ptr())) };
                *sum = _mm256_fmadd_ps(a, b, *sum);
            }
        }
        let all = _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
        let mut out = [0.0; 8];
        // SAFETY: `out` has room for eight lanes.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), all) };
        out
    }
    if !has_avx2() {
        return None;
    }
    let a: Vec<f32> = (0..8192u16).map(|i| f32::from(i) / 64.0).collect();
    let b: Vec<f32> = (0..8192u16).map(|i| 1.0 - f32::from(i % 100)).collect();
    let mut sum = 0;
    for _ in 0..80_000 {
        // SAFETY: the CPU has AVX2 and FMA.
        let lanes = unsafe { dot(black_box(&a), black_box(&b)) };
        sum = lanes.iter().fold(sum, |s, v| fold(s, v.to_bits().into()));
    }
    Some(sum)
}

/// Five bodies under gravity: square roots and divisions that depend on one another.
fn nbody() -> Option<u64> {
    let mut bodies: [([f64; 3], [f64; 3], f64); 5] = std::array::from_fn(|i| {
        let i = i as f64;
        ([i * 3.1, i * 1.7 - 2.0, 0.5 * i], [0.1 * i, 0.2 - 0.05 * i, 0.01], 1.0 / (i + 1.0))
    });
    for _ in 0..300_000 {
        for i in 0..5 {
            for j in i + 1..5 {
                let d: [f64; 3] = std::array::from_fn(|k| bodies[i].0[k] - bodies[j].0[k]);
                let square = d[0] * d[0] + d[1] * d[1] + d[2] * d[2] + 0.01;
                let force = 0.001 / (square * square.sqrt());
                let (of_i, of_j) = (bodies[i].2 * force, bodies[j].2 * force);
                bodies[i].1.iter_mut().zip(d).for_each(|(v, d)| *v -= d * of_j);
                bodies[j].1.iter_mut().zip(d).for_each(|(v, d)| *v += d * of_i);
            }
        }
        for (position, velocity, _) in &mut bodies {
            position.iter_mut().zip(velocity).for_each(|(p, v)| *p += 0.001 * *v);
        }
    }
    Some(bodies.iter().flat_map(|b| b.0).fold(0, |s, v| fold(s, v.to_bits())))
}

/// The set's interior: comparisons of floats that steer branches.
fn mandelbrot() -> Option<u64> {
    const SIZE: u32 = 500;
    let mut sum = 0;
    for row in 0..SIZE {
        for column in 0..SIZE {
            let (cr, ci) = (f64::from(column) * 3.0 / 500.0 - 2.0, f64::from(row) * 2.0 / 500.0 - 1.0);
            let (mut r, mut i, mut n) = (0.0, 0.0, 0u64);
            while n < 200 && r * r + i * i < 4.0 {
                (r, i) = (r * r - i * i + cr, 2.0 * r * i + ci);
                n += 1;
            }
            sum = fold(sum, n);
        }
    }
    Some(sum)
}

/// 80-bit arithmetic as compilers emit it for `long double`: the harmonic series and a polynomial.
fn x87() -> Option<u64> {
    let (mut sum, mut value) = (0u64, 0.0f64);
    for n in (1..=3_000_000i64).step_by(50) {
        let mut k = n;
        let mut of_block = 0.0f64;
        // SAFETY: the x87 stack is empty again at the end, and memory is the two variables that are named.
        unsafe {
            asm!(
                "fldz",
                "2:",
                "fld1",
                "fild qword ptr [{k}]",
                "fdivp st(1), st",
                "fld st(0)",
                "fmul st, st(1)",
                "fsubp st(1), st",
                "faddp st(1), st",
                "inc qword ptr [{k}]",
                "dec {left}",
                "jnz 2b",
                "fstp qword ptr [{out}]",
                k = in(reg) &raw mut k,
                out = in(reg) &raw mut of_block,
                left = inout(reg) 50u64 => _,
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
            );
        }
        value += of_block;
        sum = fold(sum, value.to_bits());
    }
    Some(sum)
}
