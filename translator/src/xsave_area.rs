//! The XSAVE area (SDM vol. 1 §13.4): which state components there are, and where each is in the two formats.

use crate::state::CpuState;
use crate::x87::X87;

/// State components, as bits of XCR0.
#[allow(missing_docs)]
pub mod component {
    pub const X87: u64 = 1 << 0;
    pub const SSE: u64 = 1 << 1;
    pub const AVX: u64 = 1 << 2;
    pub const PKRU: u64 = 1 << 9;
}

/// Offset of MXCSR.
const MXCSR: usize = 24;
/// Offset of XMM0.
const XMM: usize = 160;
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

/// Writes the x87, SSE and AVX state and PKRU to an area in the standard format, in which PKRU is at `pkru` if it is
/// there at all.
pub fn write(s: &CpuState, area: &mut [u8; 4096], pkru: Option<usize>) {
    area.fill(0);
    let mut legacy = [0; HEADER];
    s.x87.fxsave(&mut legacy, true);
    area[..HEADER].copy_from_slice(&legacy);
    area[MXCSR..MXCSR + 4].copy_from_slice(&s.mxcsr.to_le_bytes());
    let mut components = component::X87 | component::SSE | component::AVX;
    for r in 0..16 {
        let (low, high) = (XMM + 16 * usize::from(r), FIXED + 16 * usize::from(r));
        area[low..low + 16].copy_from_slice(&s.xmm(r).to_le_bytes());
        area[high..high + 16].copy_from_slice(&s.ymm_high(r).to_le_bytes());
    }
    if let Some(place) = pkru.and_then(|at| area.get_mut(at..at + 4)) {
        place.copy_from_slice(&s.pkru.to_le_bytes());
        components |= component::PKRU;
    }
    area[HEADER..HEADER + 8].copy_from_slice(&components.to_le_bytes());
}

/// Reads what [`write`] writes. A component that XSTATE_BV says is in its initial state is that, whatever stands in its
/// place; MXCSR is always there.
pub fn read(s: &mut CpuState, area: &[u8; 4096], pkru: Option<usize>) {
    let word = |at: usize| u32::from_le_bytes([area[at], area[at + 1], area[at + 2], area[at + 3]]);
    let vector = |at: usize| {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&area[at..at + 16]);
        u128::from_le_bytes(bytes)
    };
    let has = |component: u64| u64::from(word(HEADER)) & component != 0;
    s.x87 = X87::initialized();
    if has(component::X87) {
        let mut legacy = [0; HEADER];
        legacy.copy_from_slice(&area[..HEADER]);
        s.x87.fxrstor(&legacy, true);
    }
    s.mxcsr = word(MXCSR);
    for r in 0..16 {
        let (low, high) = (XMM + 16 * usize::from(r), FIXED + 16 * usize::from(r));
        s.set_xmm(r, if has(component::SSE) { vector(low) } else { 0 });
        s.set_ymm_high(r, if has(component::AVX) { vector(high) } else { 0 });
    }
    s.pkru = pkru.filter(|at| has(component::PKRU) && at + 4 <= area.len()).map_or(0, word);
}
