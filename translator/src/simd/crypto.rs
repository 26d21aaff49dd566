//! The building blocks of ciphers and hashes: AES-NI, PCLMULQDQ and SHA (SDM vol. 1 §12.13, vol. 2; FIPS 197, 180-4).

use std::array::from_fn;

use super::lanes::{join, split};

/// Multiplication by x in GF(2⁸) modulo x⁸+x⁴+x³+x+1.
const fn xtime(a: u8) -> u8 {
    (a << 1) ^ (if a & 0x80 != 0 { 0x1b } else { 0 })
}

/// The S-box and its inverse. Walking the powers of the generator 3 and of its inverse side by side gives every
/// non-zero element with its reciprocal.
const SBOXES: ([u8; 256], [u8; 256]) = {
    let (mut sbox, mut inverse) = ([0u8; 256], [0u8; 256]);
    let (mut p, mut q) = (1u8, 1u8);
    loop {
        p ^= xtime(p);
        q ^= q << 1;
        q ^= q << 2;
        q ^= q << 4;
        if q & 0x80 != 0 {
            q ^= 0x09;
        }
        let s = q ^ q.rotate_left(1) ^ q.rotate_left(2) ^ q.rotate_left(3) ^ q.rotate_left(4) ^ 0x63;
        sbox[p as usize] = s;
        inverse[s as usize] = p;
        if p == 1 {
            break;
        }
    }
    sbox[0] = 0x63;
    inverse[0x63] = 0;
    (sbox, inverse)
};
static SBOX: [u8; 256] = SBOXES.0;
static INVERSE_SBOX: [u8; 256] = SBOXES.1;

/// ShiftRows then SubBytes. Byte `r + 4c` is row `r`, column `c`.
fn shift_sub(a: u128) -> [u8; 16] {
    let s = a.to_le_bytes();
    from_fn(|i| SBOX[usize::from(s[(i + 4 * (i % 4)) % 16])])
}

/// InvShiftRows then InvSubBytes.
fn inverse_shift_sub(a: u128) -> [u8; 16] {
    let s = a.to_le_bytes();
    from_fn(|i| INVERSE_SBOX[usize::from(s[(i + 16 - 4 * (i % 4)) % 16])])
}

fn mix_columns(s: [u8; 16]) -> u128 {
    u128::from_le_bytes(from_fn(|i| {
        let at = |k: usize| s[i / 4 * 4 + (i + k) % 4];
        xtime(at(0)) ^ xtime(at(1)) ^ at(1) ^ at(2) ^ at(3)
    }))
}

fn inverse_mix_columns(s: [u8; 16]) -> u128 {
    // The inverse matrix is the forward one times [5 0 4 0].
    mix_columns(from_fn(|i| {
        let at = |k: usize| s[i / 4 * 4 + (i + k) % 4];
        at(0) ^ xtime(xtime(at(0) ^ at(2)))
    }))
}

pub(super) fn aesenc(a: u128, key: u128) -> u128 {
    mix_columns(shift_sub(a)) ^ key
}

pub(super) fn aesenclast(a: u128, key: u128) -> u128 {
    u128::from_le_bytes(shift_sub(a)) ^ key
}

pub(super) fn aesdec(a: u128, key: u128) -> u128 {
    inverse_mix_columns(inverse_shift_sub(a)) ^ key
}

pub(super) fn aesdeclast(a: u128, key: u128) -> u128 {
    u128::from_le_bytes(inverse_shift_sub(a)) ^ key
}

pub(super) fn aesimc(a: u128) -> u128 {
    inverse_mix_columns(a.to_le_bytes())
}

pub(super) fn aeskeygenassist(a: u128, rcon: u8) -> u128 {
    let x = split::<u32, 4>(a);
    let sub = |w: u32| u32::from_le_bytes(w.to_le_bytes().map(|b| SBOX[usize::from(b)]));
    let (s1, s3) = (sub(x[1]), sub(x[3]));
    join([s1, s1.rotate_right(8) ^ u32::from(rcon), s3, s3.rotate_right(8) ^ u32::from(rcon)])
}

/// Carry-less product of one quadword of each operand, chosen by bits 0 and 4 of `imm`.
pub(super) fn pclmulqdq(a: u128, b: u128, imm: u8) -> u128 {
    let a = u128::from((a >> (64 * (imm & 1))) as u64);
    let b = (b >> (64 * ((imm >> 4) & 1))) as u64;
    (0..64).fold(0, |r, i| r ^ ((a << i) & u128::from((b >> i) & 1).wrapping_neg()))
}

/// The doublewords of `x`, highest first, as the SHA instructions number them.
fn words(x: u128) -> [u32; 4] {
    let [d, c, b, a] = split::<u32, 4>(x);
    [a, b, c, d]
}

fn from_words([a, b, c, d]: [u32; 4]) -> u128 {
    join([d, c, b, a])
}

pub(super) fn sha1rnds4(state: u128, message: u128, imm: u8) -> u128 {
    const K: [u32; 4] = [0x5a82_7999, 0x6ed9_eba1, 0x8f1b_bcdc, 0xca62_c1d6];
    let [mut a, mut b, mut c, mut d] = words(state);
    // The first word of the message carries E already.
    let mut e = 0;
    for w in words(message) {
        let f = match imm & 3 {
            0 => (b & c) ^ (!b & d),
            2 => (b & c) ^ (b & d) ^ (c & d),
            _ => b ^ c ^ d,
        };
        let next = [f, a.rotate_left(5), w, e, K[usize::from(imm & 3)]].into_iter().fold(0, u32::wrapping_add);
        (a, b, c, d, e) = (next, a, b.rotate_left(30), c, d);
    }
    from_words([a, b, c, d])
}

pub(super) fn sha1nexte(a: u128, b: u128) -> u128 {
    let [w0, w1, w2, w3] = words(b);
    from_words([w0.wrapping_add(words(a)[0].rotate_left(30)), w1, w2, w3])
}

pub(super) fn sha1msg1(a: u128, b: u128) -> u128 {
    let ([w0, w1, w2, w3], [w4, w5, ..]) = (words(a), words(b));
    from_words([w2 ^ w0, w3 ^ w1, w4 ^ w2, w5 ^ w3])
}

pub(super) fn sha1msg2(a: u128, b: u128) -> u128 {
    let ([x0, x1, x2, x3], [_, w13, w14, w15]) = (words(a), words(b));
    let w16 = (x0 ^ w13).rotate_left(1);
    from_words([w16, (x1 ^ w14).rotate_left(1), (x2 ^ w15).rotate_left(1), (x3 ^ w16).rotate_left(1)])
}

pub(super) fn sha256msg1(a: u128, b: u128) -> u128 {
    let ([w3, w2, w1, w0], w4) = (words(a), b as u32);
    let sigma = |w: u32| w.rotate_right(7) ^ w.rotate_right(18) ^ (w >> 3);
    from_words([
        w3.wrapping_add(sigma(w4)),
        w2.wrapping_add(sigma(w3)),
        w1.wrapping_add(sigma(w2)),
        w0.wrapping_add(sigma(w1)),
    ])
}

pub(super) fn sha256msg2(a: u128, b: u128) -> u128 {
    let ([x3, x2, x1, x0], [w15, w14, ..]) = (words(a), words(b));
    let sigma = |w: u32| w.rotate_right(17) ^ w.rotate_right(19) ^ (w >> 10);
    let (w16, w17) = (x0.wrapping_add(sigma(w14)), x1.wrapping_add(sigma(w15)));
    from_words([x3.wrapping_add(sigma(w17)), x2.wrapping_add(sigma(w16)), w17, w16])
}

/// Two rounds: `cdgh` and `abef` are the state, the low two words of `wk` message words with their constants added.
pub(super) fn sha256rnds2(cdgh: u128, abef: u128, wk: u128) -> u128 {
    let ([mut a, mut b, mut e, mut f], [mut c, mut d, mut g, mut h]) = (words(abef), words(cdgh));
    for wk in [wk as u32, (wk >> 32) as u32] {
        let ch = (e & f) ^ (!e & g);
        let maj = (a & b) ^ (a & c) ^ (b & c);
        let s1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
        let s0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
        let t = ch.wrapping_add(s1).wrapping_add(wk).wrapping_add(h);
        (a, b, c, d, e, f, g, h) = (t.wrapping_add(maj).wrapping_add(s0), a, b, c, t.wrapping_add(d), e, f, g);
    }
    from_words([a, b, e, f])
}
