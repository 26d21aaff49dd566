//! Guest addresses as types of their own, so that a virtual one is never used where a physical one is meant.

use std::fmt;

/// Bytes in the smallest page.
pub const PAGE_SIZE: u64 = 4096;
/// Mask of the offset inside a 4 KiB page.
pub const PAGE_MASK: u64 = PAGE_SIZE - 1;

/// A guest linear (virtual) address, after segmentation and before paging.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Gva(pub u64);

/// A guest physical address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Gpa(pub u64);

impl Gva {
    /// The address of the page that holds this address.
    pub fn page(self) -> Gva {
        Gva(self.0 & !PAGE_MASK)
    }

    /// The offset inside the page.
    pub fn offset(self) -> u64 {
        self.0 & PAGE_MASK
    }

    /// Whether bits 63:47 are all equal (SDM vol. 1 §3.3.7.1; 48-bit linear addresses, no LA57).
    pub fn is_canonical(self) -> bool {
        is_canonical(self.0)
    }
}

impl Gpa {
    /// The address of the page that holds this address.
    pub fn page(self) -> Gpa {
        Gpa(self.0 & !PAGE_MASK)
    }

    /// The offset inside the page.
    pub fn offset(self) -> u64 {
        self.0 & PAGE_MASK
    }
}

/// Whether a 64-bit linear address is canonical for 48-bit linear addresses.
#[inline(always)]
pub fn is_canonical(address: u64) -> bool {
    ((address as i64) << 16 >> 16) as u64 == address
}

impl fmt::Debug for Gva {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gva:{:#x}", self.0)
    }
}

impl fmt::Debug for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gpa:{:#x}", self.0)
    }
}
