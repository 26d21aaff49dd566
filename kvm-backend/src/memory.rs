//! Guest memory as KVM's memory slots, one for each range of RAM, and the log of the pages that the guest writes.

use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

use crate::KvmError;

/// The slots of one machine. The memory lives as long as these.
pub struct Slots {
    ram: Arc<GuestMemoryMmap>,
}

/// Pages that were written in one range of RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Guest physical address of the range's first page.
    pub start: u64,
    /// Bit n % 64 of word n / 64 is set if the guest wrote to page n, of 4 KiB, since it was last asked.
    pub pages: Vec<u64>,
}

impl Slots {
    /// Registers all of `ram`.
    pub fn new(vm: &VmFd, ram: Arc<GuestMemoryMmap>) -> Result<Slots, KvmError> {
        let slots = Slots { ram };
        slots.register(vm, 0)?;
        Ok(slots)
    }

    /// The memory.
    pub fn ram(&self) -> &GuestMemoryMmap {
        &self.ram
    }

    /// Begins to log which pages the guest writes, or ends that.
    pub fn log(&self, vm: &VmFd, on: bool) -> Result<(), KvmError> {
        self.register(vm, if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 })
    }

    /// Takes the log: what it says is forgotten.
    pub fn written(&self, vm: &VmFd) -> Result<Vec<Written>, KvmError> {
        let range = |(slot, region): (u32, &_)| {
            let (start, len) = bounds(region);
            let pages = vm.get_dirty_log(slot, len as usize).map_err(|e| KvmError::Call {
                what: "tell which pages were written",
                why: e.to_string(),
                advice: "begin to log before asking",
            })?;
            Ok(Written { start, pages })
        };
        (0..).zip(self.ram.iter()).map(range).collect()
    }

    fn register(&self, vm: &VmFd, flags: u32) -> Result<(), KvmError> {
        for (slot, region) in (0..).zip(self.ram.iter()) {
            let (start, len) = bounds(region);
            let refused = |why: String| KvmError::Call {
                what: "take guest memory",
                why,
                advice: "give the guest less memory with --memory",
            };
            let host = region.get_host_address(MemoryRegionAddress(0)).map_err(|e| refused(e.to_string()))?;
            let slot = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: start,
                memory_size: len,
                userspace_addr: host as u64,
            };
            // SAFETY: the range is a mapping of `ram`, which outlives the machine: `Slots` holds it, and is dropped
            // after the machine's file is (the order of `Machine`'s fields).
            unsafe { vm.set_user_memory_region(slot) }.map_err(|e| refused(e.to_string()))?;
        }
        Ok(())
    }
}

fn bounds(region: &impl GuestMemoryRegion) -> (u64, u64) {
    (region.start_addr().raw_value(), region.len())
}
