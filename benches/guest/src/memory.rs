//! Memory: copies, string instructions, a walk without locality, atomics.

use std::arch::asm;
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Numbers, Program, fold};

/// The group's programs.
pub const PROGRAMS: &[Program] = &[
    Program { name: "memcpy-4k", run: || copies(4 << 10, 200_000), result: Some(0x932d_956e_05b7_d276) },
    Program { name: "memcpy-16m", run: || copies(16 << 20, 6), result: Some(0x6651_20b5_fcb2_de85) },
    Program { name: "rep-movsb", run: rep_movsb, result: Some(0xd51b_efa8_0489_888c) },
    Program { name: "rep-stosb", run: rep_stosb, result: Some(0x91ff_ece0_d184_78ae) },
    Program { name: "chase", run: chase, result: Some(0x679a_0fc4_1697_7f83) },
    Program { name: "atomics", run: atomics, result: Some(0x73d8_2123_f8a2_35f7) },
];

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_mul(0x9e37_79b1) >> 24) as u8).collect()
}

/// The C library's copy, of `len` bytes.
fn copies(len: usize, times: u64) -> Option<u64> {
    let (from, mut to) = (pattern(len), vec![0u8; len]);
    let mut sum = 0;
    for n in 0..times {
        to.copy_from_slice(black_box(&from));
        sum = fold(sum, black_box(&to)[(n * 977) as usize % len].into());
    }
    Some(sum)
}

/// Copies of 1 MiB by one instruction.
fn rep_movsb() -> Option<u64> {
    let (from, mut to) = (pattern(1 << 20), vec![0u8; 1 << 20]);
    let mut sum = 0;
    for n in 0..1000usize {
        // SAFETY: both buffers are as long as is copied.
        unsafe {
            asm!("rep movsb", inout("rcx") to.len() - n => _, inout("rsi") from.as_ptr() => _, inout("rdi") to.as_mut_ptr() => _, options(nostack));
        }
        sum = fold(sum, to[n * 10_007 % (1 << 20)].into());
    }
    Some(sum)
}

/// Fills of 1 MiB by one instruction.
fn rep_stosb() -> Option<u64> {
    let mut to = vec![0u8; 1 << 20];
    let mut sum = 0;
    for n in 0..1000usize {
        // SAFETY: the buffer is as long as is filled.
        unsafe {
            asm!("rep stosb", inout("rcx") to.len() => _, in("al") n as u8, inout("rdi") to.as_mut_ptr() => _, options(nostack));
        }
        sum = fold(sum, to[n * 10_007 % (1 << 20)].into());
    }
    Some(sum)
}

/// 400,000 loads through 64 MiB, the address of each read by the one before.
fn chase() -> Option<u64> {
    const CELLS: usize = 1 << 20;
    const STRIDE: usize = 8;
    let mut cells = vec![0u64; CELLS * STRIDE];
    // A full cycle through all cells: a linear congruence whose multiplier is 1 modulo 4 and whose increment is odd.
    for i in 0..CELLS {
        cells[i * STRIDE] = ((i * 0x9_4b55 + 0x3_2a8d) % CELLS) as u64;
    }
    let (mut at, mut sum) = (0, 0);
    for _ in 0..400_000 {
        at = black_box(&cells)[at as usize * STRIDE];
        sum = fold(sum, at);
    }
    Some(sum)
}

/// Locked additions, exchanges and comparisons.
fn atomics() -> Option<u64> {
    let cells: [AtomicU64; 4] = Default::default();
    let mut numbers = Numbers(3);
    let mut sum = 0;
    for n in 0..1_600_000u64 {
        let v = numbers.next();
        sum = fold(sum, cells[0].fetch_add(v, Ordering::SeqCst));
        sum ^= cells[1].swap(sum, Ordering::SeqCst);
        let _ = cells[2].compare_exchange(n, n + 1, Ordering::SeqCst, Ordering::SeqCst);
        cells[3].fetch_or(v, Ordering::SeqCst);
    }
    Some(cells.iter().fold(sum, |s, c| fold(s, c.load(Ordering::SeqCst))))
}
