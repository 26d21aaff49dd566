//! Operands for the tests, and a way to run an instruction on the host.

/// A small generator of random numbers (xorshift64*), so that failures repeat.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn u64(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(super) fn u128(&mut self) -> u128 {
        (u128::from(self.u64()) << 64) | u128::from(self.u64())
    }

    /// A value below `n`.
    pub(super) fn below(&mut self, n: usize) -> usize {
        (self.u64() >> 11) as usize % n
    }
}

/// A vector of boundary values mixed with random lanes.
pub(super) fn nasty(r: &mut Random) -> u128 {
    const WORDS: [u16; 10] = [0, 1, 0x7f, 0x80, 0xff, 0x7f80, 0x7fff, 0x8000, 0x8001, 0xffff];
    match r.below(4) {
        0 => r.u128(),
        1 => (0..8).fold(0, |x, _| (x << 16) | u128::from(WORDS[r.below(10)])),
        2 => [0, 1, u128::MAX, 1 << 127, !(1 << 127), 0x8000_0000_0000_0000_8000_0000_0000_0000][r.below(6)],
        _ => (0..16).fold(0, |x, _| (x << 8) | (r.below(5) as u128)),
    }
}

/// Calls `f` with many pairs of operands.
pub(super) fn each_pair(mut f: impl FnMut(u128, u128)) {
    let mut r = Random::new(7);
    for _ in 0..2000 {
        f(nasty(&mut r), nasty(&mut r));
    }
}

/// Whether the processor has a feature; says so when it has not.
#[cfg(target_arch = "x86_64")]
pub(super) fn host_has(feature: &str) -> bool {
    let has = match feature {
        "sse4.2" => is_x86_feature_detected!("sse4.2"),
        "avx" => is_x86_feature_detected!("avx"),
        "avx2" => is_x86_feature_detected!("avx2"),
        "aes" => is_x86_feature_detected!("aes"),
        "sha" => is_x86_feature_detected!("sha"),
        "pclmulqdq" => is_x86_feature_detected!("pclmulqdq"),
        "bmi2" => is_x86_feature_detected!("bmi2"),
        "fma" => is_x86_feature_detected!("fma"),
        "f16c" => is_x86_feature_detected!("f16c"),
        _ => false,
    };
    if !has {
        eprintln!("skipped: this processor has no {feature}");
    }
    has
}

/// Runs one instruction on the host: `{0}` holds `a` and gives the result, `{1}` holds `b`.
#[cfg(target_arch = "x86_64")]
macro_rules! host_vec {
    ($template:expr, $a:expr, $b:expr $(, $name:ident = const $value:expr)*) => {{
        let mut a: std::arch::x86_64::__m128i;
        // SAFETY: both types are 16 bytes without invalid values; the instruction touches only its registers.
        unsafe {
            a = std::mem::transmute::<u128, std::arch::x86_64::__m128i>($a);
            let b = std::mem::transmute::<u128, std::arch::x86_64::__m128i>($b);
            std::arch::asm!($template, "/* {1} */", inout(xmm_reg) a, in(xmm_reg) b, $($name = const $value,)*
                options(nomem, nostack));
            std::mem::transmute::<std::arch::x86_64::__m128i, u128>(a)
        }
    }};
}
#[cfg(target_arch = "x86_64")]
pub(super) use host_vec;

/// A digest of results. Where a test against the processor has found them right, their digest, written into a test,
/// checks every other host.
pub(super) struct Digest(u64);

impl Digest {
    pub(super) fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    pub(super) fn add(&mut self, x: u128) {
        for word in [x as u64, (x >> 64) as u64] {
            self.0 = (self.0 ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
        }
    }

    pub(super) fn value(&self) -> u64 {
        self.0
    }
}

/// The integer operations give on this host what they gave where the processor agreed.
#[test]
fn the_same_on_every_host() {
    use super::*;
    let mut d = Digest::new();
    let mut k = 0u8;
    each_pair(|a, b| {
        k = k.wrapping_add(37);
        VecOp::ALL.iter().for_each(|&op| d.add(eval(op, a, b)));
        VecImmOp::ALL.iter().for_each(|&op| d.add(eval_imm(op, a, b, k)));
        VecUnOp::ALL.iter().for_each(|&op| d.add(eval_unary(op, a)));
        VecTerOp::ALL.iter().for_each(|&op| d.add(eval_ternary(op, a, b, a ^ b.rotate_left(9))));
        let s = strings::pcmpistr(a, b, k);
        d.add(s.mask ^ u128::from(s.index));
        d.add(u128::from(scalar::pext(a as u64, b as u64) ^ scalar::pdep(a as u64, b as u64)));
        d.add(scalar::crc32(k.into(), a as u64, 8).into());
        d.add(u128::from(flags::pmovmskb(a) ^ flags::movmskps(b)));
        d.add(wide::permq([a, b], k)[1] ^ wide::permd([a, b], [b, a])[0]);
    });
    assert_eq!(d.value(), 0x5690_2151_b0a3_a970, "{:#x}", d.value());
}
