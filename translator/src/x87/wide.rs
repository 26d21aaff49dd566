//! Floating point with a 128-bit significand: the working precision of the portable transcendentals.

/// `sig` × 2^(`exp` − 127), negated if `neg`; `sig` has bit 127 set or is zero. Results are truncated.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wide {
    pub neg: bool,
    pub exp: i32,
    pub sig: u128,
}

impl Wide {
    pub const ZERO: Wide = Wide { neg: false, exp: 0, sig: 0 };
    pub const ONE: Wide = Wide::constant(0, 1 << 127);
    pub const PI: Wide = Wide::constant(1, 0xc90f_daa2_2168_c234_c4c6_628b_80dc_1cd1);
    pub const LN_2: Wide = Wide::constant(-1, 0xb172_17f7_d1cf_79ab_c9e3_b398_03f2_f6af);

    const fn constant(exp: i32, sig: u128) -> Wide {
        Wide { neg: false, exp, sig }
    }

    /// Normalizes `sig` × 2^(`exp` − 127).
    pub fn new(neg: bool, exp: i32, sig: u128) -> Wide {
        if sig == 0 {
            return Wide::ZERO;
        }
        let shift = sig.leading_zeros();
        Wide { neg, exp: exp - shift as i32, sig: sig << shift }
    }

    pub fn from_int(n: i32) -> Wide {
        Wide::new(n < 0, 127, u128::from(n.unsigned_abs()))
    }

    pub fn neg(self) -> Wide {
        Wide { neg: !self.neg, ..self }
    }

    /// `self` × 2^n.
    pub fn scale(self, n: i32) -> Wide {
        Wide { exp: self.exp + n, ..self }
    }

    pub fn add(self, other: Wide) -> Wide {
        if self.sig == 0 {
            return other;
        }
        if other.sig == 0 {
            return self;
        }
        let self_larger = (self.exp, self.sig) >= (other.exp, other.sig);
        let (large, small) = if self_larger { (self, other) } else { (other, self) };
        let shift = (large.exp - small.exp) as u32 + 1;
        let small_sig = if shift > 127 { 0 } else { small.sig >> shift };
        let large_sig = large.sig >> 1;
        let sum = if large.neg == small.neg { large_sig + small_sig } else { large_sig - small_sig };
        Wide::new(large.neg, large.exp + 1, sum)
    }

    pub fn sub(self, other: Wide) -> Wide {
        self.add(other.neg())
    }

    pub fn mul(self, other: Wide) -> Wide {
        let low = |x: u128| x & u128::from(u64::MAX);
        let (a1, a0, b1, b0) = (self.sig >> 64, low(self.sig), other.sig >> 64, low(other.sig));
        let middle = low(a1 * b0) + low(a0 * b1) + ((a0 * b0) >> 64);
        let high = a1 * b1 + ((a1 * b0) >> 64) + ((a0 * b1) >> 64) + (middle >> 64);
        Wide::new(self.neg != other.neg, self.exp + other.exp + 1, high)
    }

    /// `self` ÷ `other`, by long division.
    pub fn div(self, other: Wide) -> Wide {
        if self.sig == 0 || other.sig == 0 {
            return Wide::ZERO;
        }
        let below = self.sig < other.sig;
        let mut rest = if below { self.sig } else { self.sig - other.sig };
        let mut quotient = u128::from(!below);
        for _ in 0..127 + u32::from(below) {
            let carry = rest >> 127 != 0;
            rest <<= 1;
            quotient <<= 1;
            if carry || rest >= other.sig {
                rest = rest.wrapping_sub(other.sig);
                quotient |= 1;
            }
        }
        Wide::new(self.neg != other.neg, self.exp - other.exp - i32::from(below), quotient)
    }

    /// `self` ÷ `n`.
    pub fn div_int(self, n: u32) -> Wide {
        let n = u128::from(n.max(1));
        let (quotient, rest) = (self.sig / n, self.sig % n);
        let shift = quotient.leading_zeros() & 127;
        Wide::new(self.neg, self.exp - shift as i32, (quotient << shift) | ((rest << shift) / n))
    }

    /// `first` plus the addends that `next` makes, until they no longer matter. `next` takes the addend's number, from
    /// 1, and the power before it; it gives the next power and the addend. An addend too small to matter at all still
    /// tells which way to round.
    pub fn series(first: Wide, mut next: impl FnMut(u32, Wide) -> (Wide, Wide)) -> Wide {
        let (mut sum, mut power) = (first, first);
        for i in 1..200 {
            let (p, addend) = next(i, power);
            power = p;
            if addend.sig == 0 || addend.exp < sum.exp - 126 {
                if addend.neg != sum.neg && sum.sig != 0 {
                    sum = Wide::new(sum.neg, sum.exp, sum.sig - 1);
                }
                break;
            }
            sum = sum.add(addend);
        }
        sum
    }
}
