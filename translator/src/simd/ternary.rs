//! Three-operand lane operations: the variable blends and SHA256RNDS2.

use super::crypto;
use super::lanes::{join, op_enum, split};

op_enum! {
    /// A three-operand lane operation; the third operand is XMM0 in the legacy forms.
    VecTerOp { Pblendvb, Blendvps, Blendvpd, Sha256rnds2 }
}

/// Evaluates `op`. The blends give the lane of `b` where the most significant bit of that lane of `c` is set, else the
/// lane of `a`.
pub fn eval_ternary(op: VecTerOp, a: u128, b: u128, c: u128) -> u128 {
    let mask = match op {
        VecTerOp::Pblendvb => join(split::<i8, 16>(c).map(|m| m >> 7)),
        VecTerOp::Blendvps => join(split::<i32, 4>(c).map(|m| m >> 31)),
        VecTerOp::Blendvpd => join(split::<i64, 2>(c).map(|m| m >> 63)),
        VecTerOp::Sha256rnds2 => return crypto::sha256rnds2(a, b, c),
    };
    (a & !mask) | (b & mask)
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use std::arch::asm;
    use std::arch::x86_64::__m128i;
    use std::mem::transmute;

    use super::super::testing::{each_pair, host_has};
    use super::*;

    #[test]
    fn as_the_host() {
        macro_rules! host {
            ($name:literal, $a:expr, $b:expr, $c:expr) => {{
                // SAFETY: both types are 16 bytes without invalid values; the instruction touches only its registers.
                unsafe {
                    let mut a = transmute::<u128, __m128i>($a);
                    let (b, c) = (transmute::<u128, __m128i>($b), transmute::<u128, __m128i>($c));
                    asm!(concat!($name, " {0}, {1}"), inout(xmm_reg) a, in(xmm_reg) b, in("xmm0") c);
                    transmute::<__m128i, u128>(a)
                }
            }};
        }
        if !host_has("sse4.2") || !host_has("sha") {
            return;
        }
        each_pair(|a, b| {
            let c = a.rotate_left(37) ^ b;
            for &op in VecTerOp::ALL {
                let host = match op {
                    VecTerOp::Pblendvb => host!("pblendvb", a, b, c),
                    VecTerOp::Blendvps => host!("blendvps", a, b, c),
                    VecTerOp::Blendvpd => host!("blendvpd", a, b, c),
                    VecTerOp::Sha256rnds2 => host!("sha256rnds2", a, b, c),
                };
                assert_eq!(eval_ternary(op, a, b, c), host, "{op:?} {a:#x} {b:#x} {c:#x}");
            }
        });
    }
}
