//! One-operand lane operations (SDM vol. 2, the instruction of the same name).

use std::array::from_fn;

use super::crypto;
use super::lanes::{Lane, join, map, op_enum, split};

op_enum! {
    /// A one-operand lane operation, named as the instruction without its VEX `V`.
    VecUnOp {
        Pabsb, Pabsw, Pabsd,
        Pmovsxbw, Pmovsxbd, Pmovsxbq, Pmovsxwd, Pmovsxwq, Pmovsxdq,
        Pmovzxbw, Pmovzxbd, Pmovzxbq, Pmovzxwd, Pmovzxwq, Pmovzxdq,
        Phminposuw, Aesimc, Movddup, Movsldup, Movshdup,
        Broadcastb, Broadcastw,
        /// Also VBROADCASTSS.
        Broadcastd,
        /// Also VBROADCASTSD.
        Broadcastq,
    }
}

impl VecUnOp {
    /// For the operations whose 256-bit form makes its upper lane from the *low* lane of the source: how many bits
    /// the source is shifted right for it. `None`: the upper lane comes from the upper lane.
    pub fn upper_lane_shift(self) -> Option<u32> {
        use VecUnOp::*;
        match self {
            Pmovsxbw | Pmovsxwd | Pmovsxdq | Pmovzxbw | Pmovzxwd | Pmovzxdq => Some(64),
            Pmovsxbd | Pmovsxwq | Pmovzxbd | Pmovzxwq => Some(32),
            Pmovsxbq | Pmovzxbq => Some(16),
            Broadcastb | Broadcastw | Broadcastd | Broadcastq => Some(0),
            _ => None,
        }
    }

    /// Bytes of the source that make one 128-bit lane of the result; a memory operand is that long (twice that for a
    /// 256-bit result), except that broadcasts read one element in either form.
    pub fn source_bytes(self) -> u32 {
        use VecUnOp::*;
        match self {
            Broadcastb => 1,
            Broadcastw | Pmovsxbq | Pmovzxbq => 2,
            Broadcastd | Pmovsxbd | Pmovsxwq | Pmovzxbd | Pmovzxwq => 4,
            Broadcastq | Movddup | Pmovsxbw | Pmovsxwd | Pmovsxdq | Pmovzxbw | Pmovzxwd | Pmovzxdq => 8,
            _ => 16,
        }
    }
}

/// Evaluates `op`.
pub fn eval_unary(op: VecUnOp, a: u128) -> u128 {
    use VecUnOp::*;
    match op {
        Pabsb => map::<i8, 16>(a, i8::wrapping_abs),
        Pabsw => map::<i16, 8>(a, i16::wrapping_abs),
        Pabsd => map::<i32, 4>(a, i32::wrapping_abs),
        Pmovsxbw => widen::<i8, i16, 8>(a),
        Pmovsxbd => widen::<i8, i32, 4>(a),
        Pmovsxbq => widen::<i8, i64, 2>(a),
        Pmovsxwd => widen::<i16, i32, 4>(a),
        Pmovsxwq => widen::<i16, i64, 2>(a),
        Pmovsxdq => widen::<i32, i64, 2>(a),
        Pmovzxbw => widen::<u8, u16, 8>(a),
        Pmovzxbd => widen::<u8, u32, 4>(a),
        Pmovzxbq => widen::<u8, u64, 2>(a),
        Pmovzxwd => widen::<u16, u32, 4>(a),
        Pmovzxwq => widen::<u16, u64, 2>(a),
        Pmovzxdq => widen::<u32, u64, 2>(a),
        Phminposuw => {
            // Packing the index below the value makes the minimum the first one.
            let lanes = split::<u16, 8>(a);
            let least = (0..8u32).map(|i| (u32::from(lanes[i as usize]) << 8) | i).fold(u32::MAX, u32::min);
            u128::from((least >> 8) | ((least & 7) << 16))
        }
        Aesimc => crypto::aesimc(a),
        Movddup | Broadcastq => join([a as u64; 2]),
        Movsldup => duplicate(a, 0),
        Movshdup => duplicate(a, 1),
        Broadcastb => join([a as u8; 16]),
        Broadcastw => join([a as u16; 8]),
        Broadcastd => join([a as u32; 4]),
    }
}

/// The low `N` lanes of `a`, each extended.
#[inline(always)]
fn widen<S: Lane, D: Lane + From<S>, const N: usize>(a: u128) -> u128 {
    join(split::<S, N>(a).map(D::from))
}

/// The even (`odd` = 0) or odd doublewords, each twice.
fn duplicate(a: u128, odd: usize) -> u128 {
    let a = split::<u32, 4>(a);
    join::<u32, 4>(from_fn(|i| a[(i & 2) + odd]))
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::super::testing::{each_pair, host_has, host_vec};
    use super::*;

    #[test]
    fn as_the_host() {
        if !host_has("avx2") || !host_has("aes") {
            return;
        }
        macro_rules! host {
            ($op:expr, $a:expr; $($l:ident)*; vex $($v:ident $n:literal)*) => {
                match $op {
                    $(VecUnOp::$l => host_vec!(concat!(stringify!($l), " {0}, {1}"), 0, $a),)*
                    $(VecUnOp::$v => host_vec!(concat!($n, " {0}, {1}"), 0, $a),)*
                }
            };
        }
        for &op in VecUnOp::ALL {
            each_pair(|a, _| {
                let host = host!(op, a; Pabsb Pabsw Pabsd Pmovsxbw Pmovsxbd Pmovsxbq Pmovsxwd Pmovsxwq Pmovsxdq Pmovzxbw
                    Pmovzxbd Pmovzxbq Pmovzxwd Pmovzxwq Pmovzxdq Phminposuw Aesimc Movddup Movsldup Movshdup;
                    vex Broadcastb "vpbroadcastb" Broadcastw "vpbroadcastw" Broadcastd "vpbroadcastd"
                    Broadcastq "vpbroadcastq");
                assert_eq!(eval_unary(op, a), host, "{op:?} {a:#x}");
            });
        }
    }
}
