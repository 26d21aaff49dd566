//! 256-bit operations that move data between 128-bit lanes. Operands are `[low, high]`.

use std::array::from_fn;

use super::lanes::{join, split};

/// A 256-bit value, low lane first.
pub type Ymm = [u128; 2];

/// VPERM2F128 and VPERM2I128.
pub fn perm2x128(a: Ymm, b: Ymm, imm: u8) -> Ymm {
    let lanes = [a[0], a[1], b[0], b[1]];
    let pick = |control: u8| if control & 8 != 0 { 0 } else { lanes[usize::from(control & 3)] };
    [pick(imm), pick(imm >> 4)]
}

/// VPERMQ and VPERMPD.
pub fn permq(a: Ymm, imm: u8) -> Ymm {
    let q: [u64; 4] = from_fn(|i| split::<u64, 2>(a[i / 2])[i % 2]);
    let pick = |i: u8| q[usize::from((imm >> (2 * i)) & 3)];
    [join([pick(0), pick(1)]), join([pick(2), pick(3)])]
}

/// VPERMD and VPERMPS: doublewords of `b` chosen by the low three bits of each doubleword of `index` (the first source).
pub fn permd(index: Ymm, b: Ymm) -> Ymm {
    let d: [u32; 8] = from_fn(|i| split::<u32, 4>(b[i / 4])[i % 4]);
    index.map(|lane| join(split::<u32, 4>(lane).map(|i| d[(i & 7) as usize])))
}

/// VINSERTF128 and VINSERTI128.
pub fn insert128(a: Ymm, b: u128, imm: u8) -> Ymm {
    if imm & 1 == 0 { [b, a[1]] } else { [a[0], b] }
}

/// VEXTRACTF128 and VEXTRACTI128.
pub fn extract128(a: Ymm, imm: u8) -> u128 {
    a[usize::from(imm & 1)]
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use std::arch::x86_64::*;
    use std::mem::transmute;

    use super::super::testing::{each_pair, host_has};
    use super::*;

    #[target_feature(enable = "avx2")]
    fn host<const I: i32>(a: Ymm, b: Ymm) -> [Ymm; 3] {
        // SAFETY: both types are 32 bytes without invalid values.
        let (x, y) = unsafe { (transmute::<Ymm, __m256i>(a), transmute::<Ymm, __m256i>(b)) };
        [_mm256_permute2x128_si256::<I>(x, y), _mm256_permute4x64_epi64::<I>(x), _mm256_permutevar8x32_epi32(y, x)]
            // SAFETY: as above.
            .map(|r| unsafe { transmute::<__m256i, Ymm>(r) })
    }

    #[test]
    fn as_the_host() {
        if !host_has("avx2") {
            return;
        }
        macro_rules! each {
            ($a:expr, $b:expr; $($i:literal)*) => {$(
                let ours = [perm2x128($a, $b, $i as u8), permq($a, $i as u8), permd($a, $b)];
                // SAFETY: AVX2 is there.
                assert_eq!(ours, unsafe { host::<$i>($a, $b) }, "{:x?} {:x?} {}", $a, $b, $i);
            )*};
        }
        each_pair(|a, b| {
            let (a, b) = ([a, b.rotate_left(5)], [b, a.rotate_right(9)]);
            each!(a, b; 0 1 2 3 0x13 0x20 0x21 0x31 0x4e 0x83 0x38 0xb1 0xff);
        });
        assert_eq!(insert128([1, 2], 3, 1), [1, 3]);
        assert_eq!(insert128([1, 2], 3, 0xfe), [3, 2]);
        assert_eq!(extract128([1, 2], 1), 2);
    }
}
