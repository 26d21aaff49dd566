//! Two-operand 128-bit integer, logic and shuffle operations (SDM vol. 2, the instruction of the same name).

use std::array::from_fn;

use super::crypto;
use super::lanes::{join, op_enum, split, zip};

op_enum! {
    /// A two-operand lane operation, named as the instruction without its VEX `V`.
    ///
    /// `a` is the first source (the destination of the legacy form), `b` the second.
    VecOp {
        Paddb, Paddw, Paddd, Paddq, Paddsb, Paddsw, Paddusb, Paddusw,
        Psubb, Psubw, Psubd, Psubq, Psubsb, Psubsw, Psubusb, Psubusw,
        Pavgb, Pavgw,
        Pminsb, Pminsw, Pminsd, Pminub, Pminuw, Pminud,
        Pmaxsb, Pmaxsw, Pmaxsd, Pmaxub, Pmaxuw, Pmaxud,
        Pmullw, Pmulld, Pmulhw, Pmulhuw, Pmulhrsw, Pmuludq, Pmuldq, Pmaddwd, Pmaddubsw, Psadbw,
        Pcmpeqb, Pcmpeqw, Pcmpeqd, Pcmpeqq, Pcmpgtb, Pcmpgtw, Pcmpgtd, Pcmpgtq,
        Pand, Pandn, Por, Pxor,
        Punpcklbw, Punpcklwd,
        /// Also UNPCKLPS.
        Punpckldq,
        /// Also UNPCKLPD.
        Punpcklqdq,
        Punpckhbw, Punpckhwd,
        /// Also UNPCKHPS.
        Punpckhdq,
        /// Also UNPCKHPD.
        Punpckhqdq,
        Packsswb, Packssdw, Packuswb, Packusdw,
        Pshufb,
        /// VPERMILPS with a vector of controls.
        Permilps,
        /// VPERMILPD with a vector of controls.
        Permilpd,
        Phaddw, Phaddd, Phaddsw, Phsubw, Phsubd, Phsubsw,
        Psignb, Psignw, Psignd,
        /// The shifts by a count in the low quadword of `b`; 256-bit forms give both lanes the same count.
        Psllw, Pslld, Psllq, Psrlw, Psrld, Psrlq, Psraw, Psrad,
        /// The AVX2 shifts with a count for each lane.
        Psllvd, Psllvq, Psrlvd, Psrlvq, Psravd,
        Aesenc, Aesenclast, Aesdec, Aesdeclast,
        Sha1nexte, Sha1msg1, Sha1msg2, Sha256msg1, Sha256msg2,
    }
}

/// Evaluates `op`.
pub fn eval(op: VecOp, a: u128, b: u128) -> u128 {
    use VecOp::*;
    match op {
        Paddb => zip::<u8, 16>(a, b, u8::wrapping_add),
        Paddw => zip::<u16, 8>(a, b, u16::wrapping_add),
        Paddd => zip::<u32, 4>(a, b, u32::wrapping_add),
        Paddq => zip::<u64, 2>(a, b, u64::wrapping_add),
        Paddsb => zip::<i8, 16>(a, b, i8::saturating_add),
        Paddsw => zip::<i16, 8>(a, b, i16::saturating_add),
        Paddusb => zip::<u8, 16>(a, b, u8::saturating_add),
        Paddusw => zip::<u16, 8>(a, b, u16::saturating_add),
        Psubb => zip::<u8, 16>(a, b, u8::wrapping_sub),
        Psubw => zip::<u16, 8>(a, b, u16::wrapping_sub),
        Psubd => zip::<u32, 4>(a, b, u32::wrapping_sub),
        Psubq => zip::<u64, 2>(a, b, u64::wrapping_sub),
        Psubsb => zip::<i8, 16>(a, b, i8::saturating_sub),
        Psubsw => zip::<i16, 8>(a, b, i16::saturating_sub),
        Psubusb => zip::<u8, 16>(a, b, u8::saturating_sub),
        Psubusw => zip::<u16, 8>(a, b, u16::saturating_sub),
        Pavgb => zip::<u8, 16>(a, b, |x, y| ((u16::from(x) + u16::from(y) + 1) >> 1) as u8),
        Pavgw => zip::<u16, 8>(a, b, |x, y| ((u32::from(x) + u32::from(y) + 1) >> 1) as u16),
        Pminsb => zip::<i8, 16>(a, b, i8::min),
        Pminsw => zip::<i16, 8>(a, b, i16::min),
        Pminsd => zip::<i32, 4>(a, b, i32::min),
        Pminub => zip::<u8, 16>(a, b, u8::min),
        Pminuw => zip::<u16, 8>(a, b, u16::min),
        Pminud => zip::<u32, 4>(a, b, u32::min),
        Pmaxsb => zip::<i8, 16>(a, b, i8::max),
        Pmaxsw => zip::<i16, 8>(a, b, i16::max),
        Pmaxsd => zip::<i32, 4>(a, b, i32::max),
        Pmaxub => zip::<u8, 16>(a, b, u8::max),
        Pmaxuw => zip::<u16, 8>(a, b, u16::max),
        Pmaxud => zip::<u32, 4>(a, b, u32::max),
        Pmullw => zip::<u16, 8>(a, b, u16::wrapping_mul),
        Pmulld => zip::<u32, 4>(a, b, u32::wrapping_mul),
        Pmulhw => zip::<i16, 8>(a, b, |x, y| ((i32::from(x) * i32::from(y)) >> 16) as i16),
        Pmulhuw => zip::<u16, 8>(a, b, |x, y| ((u32::from(x) * u32::from(y)) >> 16) as u16),
        Pmulhrsw => zip::<i16, 8>(a, b, |x, y| ((((i32::from(x) * i32::from(y)) >> 14) + 1) >> 1) as i16),
        Pmuludq => zip::<u64, 2>(a, b, |x, y| u64::from(x as u32) * u64::from(y as u32)),
        Pmuldq => zip::<i64, 2>(a, b, |x, y| i64::from(x as i32) * i64::from(y as i32)),
        Pmaddwd => {
            let (a, b) = (split::<i16, 8>(a), split::<i16, 8>(b));
            let product = |i: usize| i32::from(a[i]) * i32::from(b[i]);
            join::<i32, 4>(from_fn(|i| product(2 * i).wrapping_add(product(2 * i + 1))))
        }
        Pmaddubsw => {
            let (a, b) = (split::<u8, 16>(a), split::<i8, 16>(b));
            let product = |i: usize| i16::from(a[i]) * i16::from(b[i]);
            join::<i16, 8>(from_fn(|i| product(2 * i).saturating_add(product(2 * i + 1))))
        }
        Psadbw => {
            let (a, b) = (split::<u8, 16>(a), split::<u8, 16>(b));
            join::<u64, 2>(from_fn(|h| (8 * h..8 * h + 8).map(|i| u64::from(a[i].abs_diff(b[i]))).sum()))
        }
        Pcmpeqb => zip::<u8, 16>(a, b, |x, y| if x == y { u8::MAX } else { 0 }),
        Pcmpeqw => zip::<u16, 8>(a, b, |x, y| if x == y { u16::MAX } else { 0 }),
        Pcmpeqd => zip::<u32, 4>(a, b, |x, y| if x == y { u32::MAX } else { 0 }),
        Pcmpeqq => zip::<u64, 2>(a, b, |x, y| if x == y { u64::MAX } else { 0 }),
        Pcmpgtb => zip::<i8, 16>(a, b, |x, y| if x > y { -1 } else { 0 }),
        Pcmpgtw => zip::<i16, 8>(a, b, |x, y| if x > y { -1 } else { 0 }),
        Pcmpgtd => zip::<i32, 4>(a, b, |x, y| if x > y { -1 } else { 0 }),
        Pcmpgtq => zip::<i64, 2>(a, b, |x, y| if x > y { -1 } else { 0 }),
        Pand => a & b,
        Pandn => !a & b,
        Por => a | b,
        Pxor => a ^ b,
        Punpcklbw => interleave::<u8, 16>(a, b, 0),
        Punpcklwd => interleave::<u16, 8>(a, b, 0),
        Punpckldq => interleave::<u32, 4>(a, b, 0),
        Punpcklqdq => interleave::<u64, 2>(a, b, 0),
        Punpckhbw => interleave::<u8, 16>(a, b, 8),
        Punpckhwd => interleave::<u16, 8>(a, b, 4),
        Punpckhdq => interleave::<u32, 4>(a, b, 2),
        Punpckhqdq => interleave::<u64, 2>(a, b, 1),
        Packsswb => pack::<i16, 8, i8, 16>(a, b, |x| x.clamp(-0x80, 0x7f) as i8),
        Packssdw => pack::<i32, 4, i16, 8>(a, b, |x| x.clamp(-0x8000, 0x7fff) as i16),
        Packuswb => pack::<i16, 8, u8, 16>(a, b, |x| x.clamp(0, 0xff) as u8),
        Packusdw => pack::<i32, 4, u16, 8>(a, b, |x| x.clamp(0, 0xffff) as u16),
        Pshufb => {
            let (a, b) = (split::<u8, 16>(a), split::<u8, 16>(b));
            join(b.map(|i| if i & 0x80 != 0 { 0 } else { a[usize::from(i & 15)] }))
        }
        Permilps => {
            let (a, b) = (split::<u32, 4>(a), split::<u32, 4>(b));
            join(b.map(|i| a[(i & 3) as usize]))
        }
        Permilpd => {
            let (a, b) = (split::<u64, 2>(a), split::<u64, 2>(b));
            join(b.map(|i| a[((i >> 1) & 1) as usize]))
        }
        Phaddw => horizontal::<i16, 8>(a, b, i16::wrapping_add),
        Phaddd => horizontal::<i32, 4>(a, b, i32::wrapping_add),
        Phaddsw => horizontal::<i16, 8>(a, b, i16::saturating_add),
        Phsubw => horizontal::<i16, 8>(a, b, i16::wrapping_sub),
        Phsubd => horizontal::<i32, 4>(a, b, i32::wrapping_sub),
        Phsubsw => horizontal::<i16, 8>(a, b, i16::saturating_sub),
        Psignb => zip::<i8, 16>(a, b, |x, y| x.wrapping_mul(y.signum())),
        Psignw => zip::<i16, 8>(a, b, |x, y| x.wrapping_mul(y.signum())),
        Psignd => zip::<i32, 4>(a, b, |x, y| x.wrapping_mul(y.signum())),
        Psllw | Pslld | Psllq | Psrlw | Psrld | Psrlq | Psraw | Psrad => shift(op, a, b as u64),
        Psllvd => zip::<u32, 4>(a, b, |x, n| x.checked_shl(n).unwrap_or(0)),
        Psllvq => zip::<u64, 2>(a, b, |x, n| if n < 64 { x << n } else { 0 }),
        Psrlvd => zip::<u32, 4>(a, b, |x, n| x.checked_shr(n).unwrap_or(0)),
        Psrlvq => zip::<u64, 2>(a, b, |x, n| if n < 64 { x >> n } else { 0 }),
        Psravd => zip::<u32, 4>(a, b, |x, n| ((x as i32) >> n.min(31)) as u32),
        Aesenc => crypto::aesenc(a, b),
        Aesenclast => crypto::aesenclast(a, b),
        Aesdec => crypto::aesdec(a, b),
        Aesdeclast => crypto::aesdeclast(a, b),
        Sha1nexte => crypto::sha1nexte(a, b),
        Sha1msg1 => crypto::sha1msg1(a, b),
        Sha1msg2 => crypto::sha1msg2(a, b),
        Sha256msg1 => crypto::sha256msg1(a, b),
        Sha256msg2 => crypto::sha256msg2(a, b),
    }
}

/// A shift of each lane by the same count; counts beyond the lane give zeros, or copies of the sign.
pub(super) fn shift(op: VecOp, a: u128, count: u64) -> u128 {
    use super::lanes::map;
    let n = count.min(255) as u32;
    match op {
        VecOp::Psllw => map::<u16, 8>(a, |x| if n < 16 { x << n } else { 0 }),
        VecOp::Pslld => map::<u32, 4>(a, |x| if n < 32 { x << n } else { 0 }),
        VecOp::Psllq => map::<u64, 2>(a, |x| if n < 64 { x << n } else { 0 }),
        VecOp::Psrlw => map::<u16, 8>(a, |x| if n < 16 { x >> n } else { 0 }),
        VecOp::Psrld => map::<u32, 4>(a, |x| if n < 32 { x >> n } else { 0 }),
        VecOp::Psrlq => map::<u64, 2>(a, |x| if n < 64 { x >> n } else { 0 }),
        VecOp::Psraw => map::<i16, 8>(a, |x| x >> n.min(15)),
        VecOp::Psrad => map::<i32, 4>(a, |x| x >> n.min(31)),
        _ => a,
    }
}

/// Alternates lanes of `a` and `b`, starting from lane `first` of both.
#[inline(always)]
fn interleave<T: super::lanes::Lane, const N: usize>(a: u128, b: u128, first: usize) -> u128 {
    let (a, b) = (split::<T, N>(a), split::<T, N>(b));
    join::<T, N>(from_fn(|i| if i % 2 == 0 { a[first + i / 2] } else { b[first + i / 2] }))
}

/// Narrows the lanes of `a`, then those of `b`.
#[inline(always)]
fn pack<S: super::lanes::Lane, const N: usize, D: super::lanes::Lane, const M: usize>(
    a: u128,
    b: u128,
    f: impl Fn(S) -> D,
) -> u128 {
    let (a, b) = (split::<S, N>(a), split::<S, N>(b));
    join::<D, M>(from_fn(|i| f(if i < N { a[i] } else { b[i - N] })))
}

/// `f` on adjacent pairs of lanes of `a`, then of `b`.
#[inline(always)]
fn horizontal<T: super::lanes::Lane, const N: usize>(a: u128, b: u128, f: impl Fn(T, T) -> T) -> u128 {
    let (a, b) = (split::<T, N>(a), split::<T, N>(b));
    join::<T, N>(from_fn(|i| if i < N / 2 { f(a[2 * i], a[2 * i + 1]) } else { f(b[2 * i - N], b[2 * i + 1 - N]) }))
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::super::testing::{each_pair, host_has, host_vec};
    use super::*;

    macro_rules! host {
        ($op:expr, $a:expr, $b:expr; legacy $($l:ident)*; vex $($v:ident)*) => {
            match $op {
                $(VecOp::$l => host_vec!(concat!(stringify!($l), " {0}, {1}"), $a, $b),)*
                $(VecOp::$v => host_vec!(concat!("v", stringify!($v), " {0}, {0}, {1}"), $a, $b),)*
            }
        };
    }

    /// What the processor makes of the operation.
    fn host(op: VecOp, a: u128, b: u128) -> u128 {
        host!(op, a, b;
            legacy Paddb Paddw Paddd Paddq Paddsb Paddsw Paddusb Paddusw Psubb Psubw Psubd Psubq Psubsb Psubsw Psubusb
                Psubusw Pavgb Pavgw Pminsb Pminsw Pminsd Pminub Pminuw Pminud Pmaxsb Pmaxsw Pmaxsd Pmaxub Pmaxuw Pmaxud
                Pmullw Pmulld Pmulhw Pmulhuw Pmulhrsw Pmuludq Pmuldq Pmaddwd Pmaddubsw Psadbw Pcmpeqb Pcmpeqw Pcmpeqd
                Pcmpeqq Pcmpgtb Pcmpgtw Pcmpgtd Pcmpgtq Pand Pandn Por Pxor Punpcklbw Punpcklwd Punpckldq Punpcklqdq
                Punpckhbw Punpckhwd Punpckhdq Punpckhqdq Packsswb Packssdw Packuswb Packusdw Pshufb Phaddw Phaddd
                Phaddsw Phsubw Phsubd Phsubsw Psignb Psignw Psignd Psllw Pslld Psllq Psrlw Psrld Psrlq Psraw Psrad
                Aesenc Aesenclast Aesdec Aesdeclast Sha1nexte Sha1msg1 Sha1msg2 Sha256msg1 Sha256msg2;
            vex Permilps Permilpd Psllvd Psllvq Psrlvd Psrlvq Psravd)
    }

    #[test]
    fn as_the_host() {
        use VecOp::*;
        for &op in VecOp::ALL {
            let feature = match op {
                Permilps | Permilpd | Psllvd | Psllvq | Psrlvd | Psrlvq | Psravd => "avx2",
                Aesenc | Aesenclast | Aesdec | Aesdeclast => "aes",
                Sha1nexte | Sha1msg1 | Sha1msg2 | Sha256msg1 | Sha256msg2 => "sha",
                _ => "sse4.2",
            };
            if !host_has(feature) {
                continue;
            }
            each_pair(|a, b| assert_eq!(eval(op, a, b), host(op, a, b), "{op:?} {a:#x} {b:#x}"));
            for n in 0..70 {
                let a = 0x8001_7ffe_dead_beef_0123_4567_89ab_cdef_u128;
                let b = n | (n << 64);
                assert_eq!(eval(op, a, b), host(op, a, b), "{op:?} {a:#x} {b:#x}");
            }
        }
    }

    #[test]
    fn numbered() {
        for &op in VecOp::ALL {
            assert_eq!(VecOp::from_number(op as u16), Some(op));
        }
        assert_eq!(VecOp::from_number(u16::MAX), None);
    }
}
