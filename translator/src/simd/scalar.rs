//! General-purpose leaf operations that need a loop or a table: CRC32 (SSE4.2) and PEXT, PDEP (BMI2).

/// One byte through the CRC-32C polynomial 11EDC6F41H, bit-reflected.
static CRC32C: [u32; 256] = {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        let mut c = i as u32;
        let mut bit = 0;
        while bit < 8 {
            c = (c >> 1) ^ (0x82f6_3b78 & (c & 1).wrapping_neg());
            bit += 1;
        }
        table[i] = c;
        i += 1;
    }
    table
};

/// CRC32: accumulates the low `bytes` bytes (1, 2, 4 or 8) of `data` into `crc`.
pub fn crc32(crc: u32, data: u64, bytes: u32) -> u32 {
    data.to_le_bytes()
        .into_iter()
        .take(bytes as usize)
        .fold(crc, |crc, byte| CRC32C[usize::from(crc as u8 ^ byte)] ^ (crc >> 8))
}

/// PEXT: the bits of `value` under `mask`, gathered at the low end.
pub fn pext(value: u64, mut mask: u64) -> u64 {
    let (mut result, mut k) = (0, 0);
    while mask != 0 {
        result |= ((value >> mask.trailing_zeros()) & 1) << k;
        mask &= mask - 1;
        k += 1;
    }
    result
}

/// PDEP: the low bits of `value`, spread to the places of `mask`.
pub fn pdep(mut value: u64, mut mask: u64) -> u64 {
    let mut result = 0;
    while mask != 0 {
        result |= (mask & mask.wrapping_neg()) & (value & 1).wrapping_neg();
        mask &= mask - 1;
        value >>= 1;
    }
    result
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use std::arch::x86_64::*;

    use super::super::testing::{each_pair, host_has};
    use super::*;

    #[test]
    fn as_the_host() {
        #[target_feature(enable = "sse4.2,bmi2")]
        fn host(a: u64, b: u64) -> [u64; 6] {
            [
                _mm_crc32_u8(a as u32, b as u8).into(),
                _mm_crc32_u16(a as u32, b as u16).into(),
                _mm_crc32_u32(a as u32, b as u32).into(),
                _mm_crc32_u64(u64::from(a as u32), b),
                _pext_u64(a, b),
                _pdep_u64(a, b),
            ]
        }
        if !host_has("sse4.2") || !host_has("bmi2") {
            return;
        }
        each_pair(|a, b| {
            let (a, b) = (a as u64, b as u64);
            let crc = |n| u64::from(crc32(a as u32, b, n));
            // SAFETY: the features are there.
            let theirs = unsafe { host(a, b) };
            assert_eq!([crc(1), crc(2), crc(4), crc(8), pext(a, b), pdep(a, b)], theirs, "{a:#x} {b:#x}");
        });
    }
}
