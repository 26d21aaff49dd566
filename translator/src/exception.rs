//! Exceptions and how semantics report them.

/// A fault was raised; what it is stands in [`crate::cpu::Cpu::raised`]. Zero-sized, so that a
/// `Result<u64, Trap>` travels in two registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trap;

/// Exception vectors (SDM vol. 3 table 6-1).
#[allow(missing_docs)]
pub mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const XM: u8 = 19;
}

/// An exception on its way to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Vector, 0–31.
    pub vector: u8,
    /// Error code pushed, for the vectors that have one.
    pub error: Option<u32>,
    /// Linear address for CR2, for page faults; bits to set in DR6, for debug exceptions.
    pub payload: u64,
}

impl Exception {
    /// An exception without an error code.
    pub const fn plain(vector: u8) -> Exception {
        Exception { vector, error: None, payload: 0 }
    }

    /// An exception with an error code.
    pub const fn with_error(vector: u8, error: u32) -> Exception {
        Exception { vector, error: Some(error), payload: 0 }
    }

    /// A page fault at linear address `cr2` (error code bits: SDM vol. 3 §4.7).
    pub fn page_fault(error: u32, cr2: u64) -> Exception {
        Exception { vector: vector::PF, error: Some(error), payload: cr2 }
    }
}
