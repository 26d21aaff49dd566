//! PCMPESTRI, PCMPESTRM, PCMPISTRI and PCMPISTRM (SDM vol. 2 §4.1).

use std::array::from_fn;

use super::lanes::{join, split};

/// What a string comparison gives. AF and PF become 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StrResult {
    /// For ECX (the *I forms): index of the lowest or highest set bit of the result, or the number of elements.
    pub index: u32,
    /// For XMM0 (the *M forms): the result as bits or as a mask of elements.
    pub mask: u128,
    /// The result is not zero.
    pub cf: bool,
    /// The second string ends within the register.
    pub zf: bool,
    /// The first string ends within the register.
    pub sf: bool,
    /// Bit 0 of the result.
    pub of: bool,
}

/// The explicit-length forms. `len_a` and `len_b` are (R|E)AX and (R|E)DX, sign-extended to 64 bits.
pub fn pcmpestr(a: u128, len_a: i64, b: u128, len_b: i64, imm: u8) -> StrResult {
    let elements = if imm & 1 == 0 { 16 } else { 8 };
    let len = |n: i64| n.unsigned_abs().min(elements) as usize;
    compare(a, len(len_a), b, len(len_b), imm)
}

/// The implicit-length forms: a string ends before its first zero element.
pub fn pcmpistr(a: u128, b: u128, imm: u8) -> StrResult {
    let len = |x: u128| {
        let zero = if imm & 1 == 0 {
            split::<u8, 16>(x).iter().position(|&c| c == 0)
        } else {
            split::<u16, 8>(x).iter().position(|&c| c == 0)
        };
        zero.unwrap_or(16)
    };
    compare(a, len(a), b, len(b), imm)
}

/// The elements of `x`, extended as bits 1:0 of `imm` say.
fn elements(x: u128, imm: u8) -> [i32; 16] {
    let words = split::<u16, 8>(x);
    match imm & 3 {
        0 => split::<u8, 16>(x).map(i32::from),
        2 => split::<i8, 16>(x).map(i32::from),
        1 => from_fn(|i| i32::from(words[i % 8])),
        _ => from_fn(|i| i32::from(words[i % 8] as i16)),
    }
}

fn compare(a: u128, len_a: usize, b: u128, len_b: usize, imm: u8) -> StrResult {
    let wide = imm & 1 != 0;
    let n = if wide { 8 } else { 16 };
    let (len_a, len_b) = (len_a.min(n), len_b.min(n));
    let (x, y) = (elements(a, imm), elements(b, imm));

    // IntRes1: for each aggregation the comparisons with an element past the end of a string are forced as table 4-7
    // has it.
    let matched = |j: usize| match (imm >> 2) & 3 {
        // Equal any.
        0 => j < len_b && x[..len_a].contains(&y[j]),
        // Ranges.
        1 => j < len_b && x[..len_a].chunks_exact(2).any(|r| r[0] <= y[j] && y[j] <= r[1]),
        // Equal each.
        2 => match (j < len_a, j < len_b) {
            (true, true) => x[j] == y[j],
            (past_a, past_b) => past_a == past_b,
        },
        // Equal ordered.
        _ => (0..len_a.min(n - j)).all(|i| j + i < len_b && x[i] == y[j + i]),
    };
    let result1 = (0..n).fold(0u32, |r, j| r | (u32::from(matched(j)) << j));

    let all = (1u32 << n) - 1;
    let result = match (imm >> 4) & 3 {
        1 => result1 ^ all,
        3 => result1 ^ ((1u32 << len_b) - 1),
        _ => result1,
    };
    let high = imm & 0x40 != 0;
    let index = match (result, high) {
        (0, _) => n as u32,
        (_, false) => result.trailing_zeros(),
        (_, true) => 31 - result.leading_zeros(),
    };
    let mask = match (high, wide) {
        (false, _) => u128::from(result),
        (true, false) => join::<u8, 16>(from_fn(|i| if result & (1 << i) != 0 { u8::MAX } else { 0 })),
        (true, true) => join::<u16, 8>(from_fn(|i| if result & (1 << i) != 0 { u16::MAX } else { 0 })),
    };
    StrResult { index, mask, cf: result != 0, zf: len_b < n, sf: len_a < n, of: result & 1 != 0 }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use std::arch::asm;
    use std::arch::x86_64::__m128i;
    use std::mem::transmute;

    use super::super::testing::{Random, host_has, nasty};
    use super::*;

    fn flags(index: u32, mask: u128, f: u64) -> StrResult {
        let bit = |n: u32| f >> n & 1 != 0;
        assert!(!bit(2) && !bit(4), "AF and PF are cleared");
        StrResult { index, mask, cf: bit(0), zf: bit(6), sf: bit(7), of: bit(11) }
    }

    fn host_explicit<const I: u8>(a: u128, la: i64, b: u128, lb: i64) -> StrResult {
        let (index, f): (u64, u64);
        let mask: __m128i;
        // SAFETY: the instructions touch only registers and the stack, which the block says.
        unsafe {
            let (x, y) = (transmute::<u128, __m128i>(a), transmute::<u128, __m128i>(b));
            // REX.W makes the lengths RAX and RDX.
            asm!(".byte 0x66, 0x48, 0x0f, 0x3a, 0x60, 0xd3, {i}", "pushfq", "pop {f}", f = out(reg) f, i = const I,
                in("rax") la, in("rdx") lb, out("xmm0") mask, in("xmm2") x, in("xmm3") y);
            asm!(".byte 0x66, 0x48, 0x0f, 0x3a, 0x61, 0xd3, {i}", i = const I, in("rax") la, in("rdx") lb,
                out("rcx") index, in("xmm2") x, in("xmm3") y);
            flags(index as u32, transmute::<__m128i, u128>(mask), f)
        }
    }

    fn host_implicit<const I: u8>(a: u128, b: u128) -> StrResult {
        let (index, f): (u64, u64);
        let mask: __m128i;
        // SAFETY: the instructions touch only registers and the stack, which the block says.
        unsafe {
            let (x, y) = (transmute::<u128, __m128i>(a), transmute::<u128, __m128i>(b));
            asm!("pcmpistri {0}, {1}, {i}", "pcmpistrm {0}, {1}, {i}", "pushfq", "pop {2}",
                in(xmm_reg) x, in(xmm_reg) y, out(reg) f, i = const I, out("rcx") index, out("xmm0") mask);
            flags(index as u32, transmute::<__m128i, u128>(mask), f)
        }
    }

    fn check<const I: u8>(r: &mut Random) {
        const LENGTHS: [i64; 12] = [0, 1, -1, 3, -5, 7, 8, -8, 15, 16, i64::MIN, i64::MAX];
        for _ in 0..300 {
            let (a, b) = (nasty(r), nasty(r));
            assert_eq!(pcmpistr(a, b, I), host_implicit::<I>(a, b), "{a:#x} {b:#x} {I:#x}");
            let (la, lb) = (LENGTHS[r.below(12)], LENGTHS[r.below(12)]);
            assert_eq!(pcmpestr(a, la, b, lb, I), host_explicit::<I>(a, la, b, lb), "{a:#x} {la} {b:#x} {lb} {I:#x}");
        }
    }

    #[test]
    fn as_the_host() {
        if !host_has("sse4.2") {
            return;
        }
        let mut r = Random::new(11);
        macro_rules! each {
            ($($h:literal)*) => {$(
                check::<{ $h }>(&mut r); check::<{ $h + 1 }>(&mut r); check::<{ $h + 2 }>(&mut r);
                check::<{ $h + 3 }>(&mut r); check::<{ $h + 4 }>(&mut r); check::<{ $h + 5 }>(&mut r);
                check::<{ $h + 6 }>(&mut r); check::<{ $h + 7 }>(&mut r);
            )*};
        }
        each!(0x00 0x08 0x10 0x18 0x20 0x28 0x30 0x38 0x40 0x48 0x50 0x58 0x60 0x68 0x70 0x78);
    }
}
