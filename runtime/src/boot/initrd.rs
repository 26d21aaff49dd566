//! Where the initial RAM disk goes.

use super::{BootError, Request};
use crate::memory::low_ram_end;

const PAGE: u64 = 4096;

/// A loaded initial RAM disk. Both are 0 when there is none, as the boot protocols say it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Initrd {
    pub(super) start: u64,
    pub(super) len: u64,
}

/// Copies the initial RAM disk to the highest page below `limit` and the end of low RAM, above `floor`, the first
/// address behind the kernel. High, because a kernel that moves or unpacks itself uses the memory behind it.
pub(super) fn load(request: &Request, floor: u64, limit: u64) -> Result<Initrd, BootError> {
    let Some(image) = request.initrd else { return Ok(Initrd::default()) };
    let ceiling = limit.min(low_ram_end(request.ram));
    let len = image.len();
    let Some(start) = place(len, floor, ceiling) else {
        return Err(BootError::InitrdDoesNotFit { name: image.name(), len, floor, ceiling });
    };
    image.copy_to(request.ram, start, "the initrd", 0, len)?;
    Ok(Initrd { start, len })
}

/// Copies the initial RAM disk to the first page boundary from `floor`, the first address behind the kernel, on. Low,
/// because Multiboot kernels expect their modules where their first page tables reach.
pub(super) fn load_low(request: &Request, floor: u64) -> Result<Initrd, BootError> {
    let Some(image) = request.initrd else { return Ok(Initrd::default()) };
    let (len, ceiling) = (image.len(), low_ram_end(request.ram));
    let start = floor.checked_next_multiple_of(PAGE).filter(|start| len <= ceiling.saturating_sub(*start));
    let Some(start) = start else {
        return Err(BootError::InitrdDoesNotFit { name: image.name(), len, floor, ceiling });
    };
    image.copy_to(request.ram, start, "the initrd", 0, len)?;
    Ok(Initrd { start, len })
}

/// The highest page boundary from which `len` bytes end at or below `ceiling`, if not below `floor`.
pub(super) fn place(len: u64, floor: u64, ceiling: u64) -> Option<u64> {
    let start = ceiling.checked_sub(len)? & !(PAGE - 1);
    (start >= floor).then_some(start)
}
