//! Lane operations controlled by an immediate byte (SDM vol. 2, the instruction of the same name).

use std::array::from_fn;

use super::crypto;
use super::lanes::{join, op_enum, split};
use super::op::{VecOp, shift};

op_enum! {
    /// A lane operation with an immediate, named as the instruction without its VEX `V`.
    ///
    /// `a` is the first source. Operations with one source read `a` and ignore `b`.
    VecImmOp {
        /// One source.
        Pshufd,
        /// One source.
        Pshufhw,
        /// One source.
        Pshuflw,
        Shufps, Shufpd, Palignr, Pblendw,
        /// Also VPBLENDD.
        Blendps,
        Blendpd,
        /// One source; as all shifts by an immediate.
        Pslldq,
        Psrldq,
        PsllwImm, PslldImm, PsllqImm, PsrlwImm, PsrldImm, PsrlqImm, PsrawImm, PsradImm,
        Mpsadbw,
        /// With a register source; a memory source is given in lane 0 of `b`, with bits 7:6 of the immediate cleared.
        Insertps,
        /// One source.
        Permilps,
        /// One source.
        Permilpd,
        Pclmulqdq,
        /// One source.
        Aeskeygenassist,
        Sha1rnds4,
    }
}

impl VecImmOp {
    /// The immediate that the upper lane of the 256-bit form is evaluated with.
    pub fn upper_lane_imm(self, imm: u8) -> u8 {
        match self {
            Self::Shufpd | Self::Blendpd | Self::Permilpd => imm >> 2,
            Self::Blendps => imm >> 4,
            Self::Mpsadbw => imm >> 3,
            _ => imm,
        }
    }
}

/// Evaluates `op`.
pub fn eval_imm(op: VecImmOp, a: u128, b: u128, imm: u8) -> u128 {
    use VecImmOp::*;
    match op {
        Pshufd | Permilps => {
            let a = split::<u32, 4>(a);
            join(select4(imm).map(|i| a[i]))
        }
        Pshufhw => {
            let a = split::<u16, 8>(a);
            let s = select4(imm);
            join::<u16, 8>(from_fn(|i| if i < 4 { a[i] } else { a[4 + s[i - 4]] }))
        }
        Pshuflw => {
            let a = split::<u16, 8>(a);
            let s = select4(imm);
            join::<u16, 8>(from_fn(|i| if i < 4 { a[s[i]] } else { a[i] }))
        }
        Shufps => {
            let (a, b) = (split::<u32, 4>(a), split::<u32, 4>(b));
            let s = select4(imm);
            join([a[s[0]], a[s[1]], b[s[2]], b[s[3]]])
        }
        Shufpd => {
            let (a, b) = (split::<u64, 2>(a), split::<u64, 2>(b));
            join([a[usize::from(imm & 1)], b[usize::from((imm >> 1) & 1)]])
        }
        Permilpd => {
            let a = split::<u64, 2>(a);
            join([a[usize::from(imm & 1)], a[usize::from((imm >> 1) & 1)]])
        }
        Palignr => match u32::from(imm) * 8 {
            0 => b,
            n @ 1..128 => (b >> n) | (a << (128 - n)),
            n @ 128..256 => a >> (n - 128),
            _ => 0,
        },
        Pblendw => blend::<u16, 8>(a, b, imm),
        Blendps => blend::<u32, 4>(a, b, imm),
        Blendpd => blend::<u64, 2>(a, b, imm),
        Pslldq => a.checked_shl(u32::from(imm) * 8).unwrap_or(0),
        Psrldq => a.checked_shr(u32::from(imm) * 8).unwrap_or(0),
        PsllwImm => shift(VecOp::Psllw, a, imm.into()),
        PslldImm => shift(VecOp::Pslld, a, imm.into()),
        PsllqImm => shift(VecOp::Psllq, a, imm.into()),
        PsrlwImm => shift(VecOp::Psrlw, a, imm.into()),
        PsrldImm => shift(VecOp::Psrld, a, imm.into()),
        PsrlqImm => shift(VecOp::Psrlq, a, imm.into()),
        PsrawImm => shift(VecOp::Psraw, a, imm.into()),
        PsradImm => shift(VecOp::Psrad, a, imm.into()),
        Mpsadbw => {
            let (a, b) = (split::<u8, 16>(a), split::<u8, 16>(b));
            let (ao, bo) = (usize::from(imm & 4), usize::from(imm & 3) * 4);
            join::<u16, 8>(from_fn(|i| (0..4).map(|j| u16::from(a[ao + i + j].abs_diff(b[bo + j]))).sum()))
        }
        Insertps => {
            let (mut r, b) = (split::<u32, 4>(a), split::<u32, 4>(b));
            r[usize::from((imm >> 4) & 3)] = b[usize::from(imm >> 6)];
            join::<u32, 4>(from_fn(|i| if imm & (1 << i) != 0 { 0 } else { r[i] }))
        }
        Pclmulqdq => crypto::pclmulqdq(a, b, imm),
        Aeskeygenassist => crypto::aeskeygenassist(a, imm),
        Sha1rnds4 => crypto::sha1rnds4(a, b, imm),
    }
}

/// PINSRB/W/D/Q: replaces the lane of `bytes` bytes (1, 2, 4 or 8) that `imm` names.
pub fn insert(a: u128, value: u64, bytes: u32, imm: u8) -> u128 {
    let (shift, mask) = lane(bytes, imm);
    (a & !(mask << shift)) | ((u128::from(value) & mask) << shift)
}

/// PEXTRB/W/D/Q: the lane of `bytes` bytes (1, 2, 4 or 8) that `imm` names.
pub fn extract(a: u128, bytes: u32, imm: u8) -> u64 {
    let (shift, mask) = lane(bytes, imm);
    ((a >> shift) & mask) as u64
}

/// Position and mask of a lane; an immediate beyond the last lane wraps.
fn lane(bytes: u32, imm: u8) -> (u32, u128) {
    let shift = u32::from(imm).wrapping_mul(bytes * 8) & 127;
    (shift, u128::from(u64::MAX >> (64 - 8 * bytes.clamp(1, 8))))
}

/// The four two-bit fields of an immediate.
fn select4(imm: u8) -> [usize; 4] {
    from_fn(|i| usize::from((imm >> (2 * i)) & 3))
}

/// Lane `i` of `b` where bit `i` of `imm` is set, else of `a`.
#[inline(always)]
fn blend<T: super::lanes::Lane, const N: usize>(a: u128, b: u128, imm: u8) -> u128 {
    let (a, b) = (split::<T, N>(a), split::<T, N>(b));
    join::<T, N>(from_fn(|i| if imm & (1 << i) != 0 { b[i] } else { a[i] }))
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::super::testing::{Random, host_has, host_vec, nasty};
    use super::*;

    macro_rules! host {
        ($op:expr, $a:expr, $b:expr, $imm:ident; one $($one:ident $on:literal)*; two $($two:ident $tn:literal)*) => {
            match $op {
                $(VecImmOp::$one => host_vec!(concat!($on, " {0}, {0}, {imm}"), $a, $b, imm = const $imm),)*
                $(VecImmOp::$two => host_vec!(concat!($tn, " {0}, {1}, {imm}"), $a, $b, imm = const $imm),)*
                VecImmOp::Permilps => host_vec!("vpermilps {0}, {0}, {imm}", $a, $b, imm = const $imm),
                VecImmOp::Permilpd => host_vec!("vpermilpd {0}, {0}, {imm}", $a, $b, imm = const $imm),
                VecImmOp::Pslldq => host_vec!("pslldq {0}, {imm}", $a, $b, imm = const $imm),
                VecImmOp::Psrldq => host_vec!("psrldq {0}, {imm}", $a, $b, imm = const $imm),
                VecImmOp::PsllwImm => host_vec!("psllw {0}, {imm}", $a, $b, imm = const $imm),
                VecImmOp::PslldImm => host_vec!("pslld {0}, {imm}", $a, $b, imm = const $imm),
                VecImmOp::PsllqImm => host_vec!("psllq {0}, {imm}", $a, $b, imm = const $imm),
                VecImmOp::PsrlwImm => host_vec!("psrlw {0}, {imm}", $a, $b, imm = const $imm),
                VecImmOp::PsrldImm => host_vec!("psrld {0}, {imm}", $a, $b, imm = const $imm),
                VecImmOp::PsrlqImm => host_vec!("psrlq {0}, {imm}", $a, $b, imm = const $imm),
                VecImmOp::PsrawImm => host_vec!("psraw {0}, {imm}", $a, $b, imm = const $imm),
                VecImmOp::PsradImm => host_vec!("psrad {0}, {imm}", $a, $b, imm = const $imm),
            }
        };
    }

    fn host<const I: u8>(op: VecImmOp, a: u128, b: u128) -> u128 {
        host!(op, a, b, I;
            one Pshufd "pshufd" Pshufhw "pshufhw" Pshuflw "pshuflw" Aeskeygenassist "aeskeygenassist";
            two Shufps "shufps" Shufpd "shufpd" Palignr "palignr" Pblendw "pblendw" Blendps "blendps" Blendpd "blendpd"
                Mpsadbw "mpsadbw" Insertps "insertps" Pclmulqdq "pclmulqdq" Sha1rnds4 "sha1rnds4")
    }

    fn check<const I: u8>(r: &mut Random) {
        for &op in VecImmOp::ALL {
            let feature = match op {
                VecImmOp::Permilpd | VecImmOp::Permilps => "avx",
                VecImmOp::Aeskeygenassist => "aes",
                VecImmOp::Pclmulqdq => "pclmulqdq",
                VecImmOp::Sha1rnds4 => "sha",
                _ => "sse4.2",
            };
            if !host_has(feature) {
                continue;
            }
            for _ in 0..100 {
                let (a, b) = (nasty(r), nasty(r));
                assert_eq!(eval_imm(op, a, b, I), host::<I>(op, a, b), "{op:?} {a:#x} {b:#x} {I}");
            }
        }
    }

    #[test]
    fn as_the_host() {
        let mut r = Random::new(3);
        macro_rules! each {
            ($($i:literal)*) => { $(check::<$i>(&mut r);)* };
        }
        each!(0 1 2 3 4 5 7 8 9 10 11 12 13 14 15 16 17 19 23 24 27 28 31 32 33 39 45 54 63 64 65 78 99 100 114 127 128 141
            156 170 177 190 201 216 228 240 251 254 255);
    }

    #[test]
    fn lanes_by_immediate() {
        let x = 0x0f0e_0d0c_0b0a_0908_0706_0504_0302_0100;
        assert_eq!(extract(x, 1, 0x1f), 0x0f);
        assert_eq!(extract(x, 2, 3), 0x0706);
        assert_eq!(extract(x, 8, 1), 0x0f0e_0d0c_0b0a_0908);
        assert_eq!(insert(x, 0xffff_1234, 2, 0x0a), 0x0f0e_0d0c_0b0a_0908_0706_1234_0302_0100);
        assert_eq!(insert(0, u64::MAX, 4, 3), 0xffff_ffff << 96);
    }
}
