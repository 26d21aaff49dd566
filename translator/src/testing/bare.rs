//! A CPU in 64-bit mode with code to run and nothing around it: for measurements of the parts.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::cpu::{Cpu, Kick};
use crate::cpuid::{CpuModel, Level};
use crate::mem::GuestRam;
use crate::platform::Platform;
use crate::state::{CpuState, Segment, cr};

/// No devices; a write to any port stops the CPU.
struct Bare(Kick);

impl Platform for Bare {
    fn port_out(&mut self, _: u16, _: u8, _: u32) {
        self.0.request(Kick::STOP);
    }
}

/// Where the code stands, and execution begins.
pub const CODE: u64 = 0x2000;
/// Where there is room for data, to the end of RAM.
pub const DATA: u64 = 0x20_0000;
/// The initial stack pointer.
pub const STACK: u64 = 0x1f_0000;
/// Page tables: one of each level, the last of which maps large pages one to one.
const TABLES: u64 = 0x1_0000;
/// Megabytes of RAM, two to a large page.
const RAM: u64 = 128;

/// A CPU at privilege level 0, with x87, SSE and AVX enabled, that begins with `code`.
///
/// # Panics
///
/// When the host has no memory for it.
pub fn cpu(code: &[u8]) -> Cpu {
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), (RAM as usize) << 20)]).expect("memory");
    let put = |at: u64, value: u64| ram.write_obj(value, GuestAddress(at)).expect("inside");
    put(TABLES, TABLES + 0x1000 | 3);
    put(TABLES + 0x1000, TABLES + 0x2000 | 3);
    (0..RAM / 2).for_each(|n| put(TABLES + 0x2000 + 8 * n, n << 21 | 0x83));
    ram.write_slice(code, GuestAddress(CODE)).expect("inside");
    let kick = Kick::default();
    let platform = Box::new(Bare(kick.clone()));
    let mut cpu = Cpu::new(Arc::new(GuestRam::new(Arc::new(ram))), platform, CpuModel::new(Level::Max, 1, 0));
    cpu.kick = kick;
    let flat = |attr| Segment { base: 0, limit: u32::MAX, attr, selector: 8 };
    let mut state = CpuState::reset();
    state.rip = CODE;
    state.gpr[4] = STACK;
    state.cr0 |= cr::CR0_PE | cr::CR0_PG;
    state.cr4 = cr::CR4_PAE | cr::CR4_OSFXSR | cr::CR4_PGE | cr::CR4_OSXSAVE;
    state.xcr0 = 7;
    state.efer = cr::EFER_LME | cr::EFER_LMA | cr::EFER_NXE;
    state.cr3 = TABLES;
    state.mxcsr = 0x1f80;
    state.x87.init();
    state.seg = [flat(0xc093); 6];
    state.seg[1] = flat(0xa09b);
    cpu.set_state(state);
    cpu
}
