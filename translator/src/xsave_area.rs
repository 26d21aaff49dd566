//! The XSAVE area (SDM vol. 1 §13.4): which state components there are, and where each is in the two formats.

/// State components, as bits of XCR0.
#[allow(missing_docs)]
pub mod component {
    pub const X87: u64 = 1 << 0;
    pub const SSE: u64 = 1 << 1;
    pub const AVX: u64 = 1 << 2;
    pub const PKRU: u64 = 1 << 9;
}

/// Offset of the header.
pub const HEADER: usize = 512;
/// Size of the legacy region and the header, behind which extended components are.
pub const FIXED: usize = 576;

/// A component behind the header.
pub struct Extended {
    /// Its bit of XCR0.
    pub bit: u64,
    /// Its offset in the standard format: that of Intel's processors.
    pub offset: usize,
    /// Its size in bytes.
    pub size: usize,
}

/// The extended components in their order.
pub const EXTENDED: [Extended; 2] = [
    Extended { bit: component::AVX, offset: FIXED, size: 256 },
    Extended { bit: component::PKRU, offset: 2688, size: 8 },
];

/// The offset of extended component `bit` in the standard format or, with `compact` as the components of XCOMP_BV, in
/// the compacted one.
pub fn offset(bit: u64, compact: Option<u64>) -> usize {
    match compact {
        Some(components) => {
            FIXED + EXTENDED.iter().filter(|c| components & c.bit & (bit - 1) != 0).map(|c| c.size).sum::<usize>()
        }
        None => EXTENDED.iter().find(|c| c.bit == bit).map_or(FIXED, |c| c.offset),
    }
}

/// The size of an area in the standard format that holds `components`.
pub fn standard_size(components: u64) -> usize {
    EXTENDED.iter().filter(|c| components & c.bit != 0).map(|c| c.offset + c.size).max().unwrap_or(FIXED)
}

/// The size of an area in the compacted format that holds `components`.
pub fn compacted_size(components: u64) -> usize {
    FIXED + EXTENDED.iter().filter(|c| components & c.bit != 0).map(|c| c.size).sum::<usize>()
}
