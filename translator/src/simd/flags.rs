//! Vectors to flags and general-purpose registers: PTEST, VTESTPS/PD and the MOVMSK family.

use super::lanes::split;

/// The sign bits of a 128-bit lane of doublewords.
const SIGNS_PS: u128 = 0x8000_0000_8000_0000_8000_0000_8000_0000;
/// The sign bits of a 128-bit lane of quadwords.
const SIGNS_PD: u128 = 0x8000_0000_0000_0000_8000_0000_0000_0000;

/// What the tests give; all other arithmetic flags become 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TestFlags {
    /// No tested bit of `a & b` is set.
    pub zf: bool,
    /// No tested bit of `!a & b` is set.
    pub cf: bool,
}

impl TestFlags {
    /// The flags of a 256-bit operand from those of its lanes.
    pub fn and(self, upper: Self) -> Self {
        Self { zf: self.zf && upper.zf, cf: self.cf && upper.cf }
    }
}

/// PTEST; the 256-bit form is [`TestFlags::and`] of its lanes. `a` is the first operand.
pub fn ptest(a: u128, b: u128) -> TestFlags {
    TestFlags { zf: a & b == 0, cf: !a & b == 0 }
}

/// VTESTPS.
pub fn testps(a: u128, b: u128) -> TestFlags {
    ptest(a, b & SIGNS_PS)
}

/// VTESTPD.
pub fn testpd(a: u128, b: u128) -> TestFlags {
    ptest(a, b & SIGNS_PD)
}

/// MOVMSKPS: four sign bits.
pub fn movmskps(a: u128) -> u32 {
    (0..4).fold(0, |r, i| r | (((a >> (32 * i + 31)) as u32 & 1) << i))
}

/// MOVMSKPD: two sign bits.
pub fn movmskpd(a: u128) -> u32 {
    ((a >> 63) as u32 & 1) | ((a >> 126) as u32 & 2)
}

/// PMOVMSKB: sixteen sign bits.
pub fn pmovmskb(a: u128) -> u32 {
    // The multiplication gathers the eight sign bits of a half into its top byte.
    let half = |x: u64| (((x & 0x8080_8080_8080_8080) >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56) as u32;
    let [low, high] = split::<u64, 2>(a);
    half(low) | (half(high) << 8)
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use std::arch::x86_64::*;
    use std::mem::transmute;

    use super::super::testing::{each_pair, host_has};
    use super::*;

    #[test]
    fn as_the_host() {
        #[target_feature(enable = "avx")]
        fn host(a: u128, b: u128) -> ([TestFlags; 3], [u32; 3]) {
            // SAFETY: the types are 16 bytes without invalid values.
            let (ai, bi) = unsafe { (transmute::<u128, __m128i>(a), transmute::<u128, __m128i>(b)) };
            let (aps, bps) = (_mm_castsi128_ps(ai), _mm_castsi128_ps(bi));
            let (apd, bpd) = (_mm_castsi128_pd(ai), _mm_castsi128_pd(bi));
            let flags = |zf, cf| TestFlags { zf: zf != 0, cf: cf != 0 };
            (
                [
                    flags(_mm_testz_si128(ai, bi), _mm_testc_si128(ai, bi)),
                    flags(_mm_testz_ps(aps, bps), _mm_testc_ps(aps, bps)),
                    flags(_mm_testz_pd(apd, bpd), _mm_testc_pd(apd, bpd)),
                ],
                [_mm_movemask_ps(aps) as u32, _mm_movemask_pd(apd) as u32, _mm_movemask_epi8(ai) as u32],
            )
        }
        if !host_has("avx") {
            return;
        }
        each_pair(|a, b| {
            let ours = ([ptest(a, b), testps(a, b), testpd(a, b)], [movmskps(a), movmskpd(a), pmovmskb(a)]);
            // SAFETY: AVX is there.
            assert_eq!(ours, unsafe { host(a, b) }, "{a:#x} {b:#x}");
        });
    }
}
