//! Test support: a CPU with a little memory, and the host's processor as the judge of user-mode instructions.
//!
//! One window of linear addresses means the same to both: on the host it is mapped where the guest's page tables map
//! it, so that addresses in registers are valid for either. Hosts of another instruction set are no judge: tests that ask one
//! are not built for them (`docs/arm64.md`).

#![cfg_attr(
    not(target_arch = "x86_64"),
    allow(dead_code, reason = "without a judge there is little but the encoder to use")
)]

pub mod bare;
pub(crate) mod bench;
mod bundles;
mod engine;
mod every;
pub mod forms;
mod integer;
#[cfg(target_arch = "x86_64")]
mod native;
#[cfg(not(target_arch = "x86_64"))]
#[path = "testing/no_native.rs"]
mod native;
mod outcome;
mod program;
pub mod record;
#[cfg(test)]
mod rules;
mod sequences;
mod shrink;
pub mod silicon;
#[cfg(all(test, target_arch = "x86_64"))]
mod undefined;

#[cfg(all(test, target_arch = "x86_64"))]
pub(crate) use native::is_of_the_model_s_maker;

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::cpu::Cpu;
use crate::cpuid::{CpuModel, Level};
#[cfg(test)]
use crate::decode::decode;
#[cfg(test)]
use crate::exception::Exception;
#[cfg(test)]
use crate::insn::Rep;
use crate::mem::GuestRam;
use crate::platform::Platform;
use crate::state::{CpuState, Segment, cr};

/// Where the window starts, for guest and host: below 2 GiB, so that absolute displacements reach it.
pub(crate) const WINDOW: u64 = 0x5000_0000;
/// Its bytes.
const WINDOW_LEN: u64 = 0x1_0000;
/// The page of the code under test.
const CODE: u64 = WINDOW + 0x1000;
/// Where the instruction under test stands.
pub(crate) const INSN: u64 = CODE + 0x100;
/// Where a branch under test goes.
pub(crate) const TAKEN: u64 = INSN - 0x40;
/// Where execution goes on behind the code under test.
const FALL: u64 = WINDOW + 0x800;
/// The memory that instructions work on: it straddles a page boundary.
pub(crate) const DATA: u64 = WINDOW + 0x2f00;
/// A page that is not present.
pub(crate) const ABSENT: u64 = WINDOW + 0x6000;
/// A page that may only be read.
pub(crate) const READ_ONLY: u64 = WINDOW + 0x7000;
/// Supervisor's tables and stack of the guest, which the host does not use.
const SYSTEM: u64 = WINDOW + 0x8000;
/// Bytes of it.
pub(crate) const DATA_LEN: usize = 0x480;
/// More of it, up to a page that is not present.
const EDGE: u64 = ABSENT - EDGE_LEN as u64;
const EDGE_LEN: usize = 256;

const RAM: usize = 2 << 20;
const TABLES: u64 = 0x10_0000;

/// A machine with nothing in it.
pub(crate) struct Empty;

impl Platform for Empty {}

/// A small generator of random numbers (xorshift64*), so that failures repeat.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn u64(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A value below `n`.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        (self.u64() >> 11) % n
    }

    /// A boundary value of some width, or random bits of some length.
    pub(crate) fn nasty(&mut self) -> u64 {
        let edge = 1u64 << [0, 3, 7, 8, 15, 16, 31, 32, 63][self.below(9) as usize];
        match self.below(8) {
            0 => 0,
            1 => edge,
            2 => edge - 1,
            3 => edge.wrapping_neg(),
            4 => edge + 1,
            5 => self.u64() >> self.below(64),
            _ => self.u64(),
        }
    }
}

/// An exception as the operating system sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub vector: u8,
    pub error: u32,
    /// Of a page fault.
    pub address: u64,
}

/// The x87 unit, without its pointers, which processors record differently.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fpu {
    pub control: u16,
    pub status: u16,
    /// A bit for each register that is not empty.
    pub tags: u8,
    pub st: [[u8; 10]; 8],
}

impl Fpu {
    /// Out of an FXSAVE image.
    fn from_image(image: &[u8; 512]) -> Fpu {
        let word = |at| u16::from_le_bytes([image[at], image[at + 1]]);
        let st = std::array::from_fn(|n| std::array::from_fn(|k| image[32 + 16 * n + k]));
        Fpu { control: word(0), status: word(2), tags: image[4], st }
    }

    /// An FXSAVE image that has nothing else but MXCSR.
    fn image(&self, mxcsr: u32) -> [u8; 512] {
        let mut image = [0; 512];
        image[..2].copy_from_slice(&self.control.to_le_bytes());
        image[2..4].copy_from_slice(&self.status.to_le_bytes());
        image[4] = self.tags;
        image[24..28].copy_from_slice(&mxcsr.to_le_bytes());
        for (n, r) in self.st.iter().enumerate() {
            image[32 + 16 * n..][..10].copy_from_slice(r);
        }
        image
    }
}

/// What user mode sees of the data segment registers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Segments {
    /// DS, ES, FS and GS. Before the code under test they are what the operating system has them to be.
    pub selectors: [u16; 4],
    pub fs_base: u64,
    pub gs_base: u64,
}

/// What an instruction can change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Machine {
    pub gpr: [u64; 16],
    pub flags: u64,
    /// Where execution goes on, or what faulted.
    pub rip: u64,
    pub fault: Option<Fault>,
    pub ymm: [[u64; 4]; 16],
    pub mxcsr: u32,
    pub fpu: Fpu,
    pub segments: Segments,
    /// The bytes at [`DATA`] and [`EDGE`].
    pub data: Vec<u8>,
}

impl Machine {
    /// A state at [`INSN`] whose vector and x87 registers are as after a reset.
    pub(crate) fn new(gpr: [u64; 16], flags: u64, mut data: Vec<u8>) -> Machine {
        data.resize(DATA_LEN + EDGE_LEN, 0x5a);
        let fpu = Fpu { control: 0x37f, status: 0, tags: 0, st: [[0; 10]; 8] };
        let segments = Segments::default();
        Machine { gpr, flags, rip: INSN, fault: None, ymm: [[0; 4]; 16], mxcsr: 0x1f80, fpu, segments, data }
    }
}

/// A guest in one of the modes, with RAM at 0 that 64-bit mode maps at [`WINDOW`].
pub(crate) struct Guest {
    pub cpu: Cpu,
    memory: Arc<GuestMemoryMmap>,
}

impl Guest {
    fn new(state: CpuState) -> Guest {
        let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), RAM)]).unwrap());
        let pdpte = TABLES + 0x1000 + (WINDOW >> 30) * 8;
        let pde = TABLES + 0x2000 + (WINDOW >> 21 & 511) * 8;
        // The window is one 2 MiB page, user and writable.
        for (at, entry) in [(TABLES, TABLES + 0x1007), (pdpte, TABLES + 0x2007), (pde, 0x87)] {
            memory.write_obj(entry, GuestAddress(at)).unwrap();
        }
        let ram = Arc::new(GuestRam::new(memory.clone()));
        let mut cpu = Cpu::new(ram, Box::new(Empty), CpuModel::new(Level::Max, 1, 0));
        cpu.set_state(state);
        Guest { cpu, memory }
    }

    /// 64-bit mode.
    pub(crate) fn code64() -> Guest {
        let mut s = flat(0xa09b);
        s.cr0 |= cr::CR0_PE | cr::CR0_PG;
        s.cr4 = cr::CR4_PAE | cr::CR4_OSFXSR | cr::CR4_OSXMMEXCPT;
        s.efer = cr::EFER_LME | cr::EFER_LMA | cr::EFER_NXE | cr::EFER_SCE;
        s.cr3 = TABLES;
        Guest::new(s)
    }
}

#[cfg(test)]
impl Guest {
    /// 32-bit protected mode without paging; RAM is at 0.
    pub(crate) fn code32() -> Guest {
        let mut s = flat(0xc09b);
        s.cr0 |= cr::CR0_PE;
        Guest::new(s)
    }

    /// The guest physical address that `at` of the window is.
    fn physical(&self, at: u64) -> GuestAddress {
        GuestAddress(if self.cpu.s.code64() { at.wrapping_sub(WINDOW) } else { at })
    }

    pub(crate) fn read(&self, at: u64, out: &mut [u8]) {
        self.memory.read_slice(out, self.physical(at)).unwrap();
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, self.physical(at)).unwrap();
    }

    /// Interprets one instruction at `rip`, as often as it asks to be gone on with (repeated string instructions).
    pub(crate) fn step(&mut self, code: &[u8], rip: u64) -> Result<(), Exception> {
        let insn = decode(code, self.cpu.mode, &self.cpu.model).expect("whole instructions");
        loop {
            self.cpu.ip_base = rip;
            self.cpu.stop_block = false;
            self.cpu.s.rip = self.cpu.next_ip_value(&insn);
            (insn.run)(&mut self.cpu, &insn).map_err(|_| self.cpu.raised)?;
            if insn.rep == Rep::None || self.cpu.s.rip != rip {
                return Ok(());
            }
        }
    }
}

/// A reset state with flat segments; CS has attributes `code`.
fn flat(code: u32) -> CpuState {
    let mut s = CpuState::reset();
    s.seg = [Segment { base: 0, limit: u32::MAX, attr: 0xc093, selector: 0x10 }; 6];
    s.seg[1] = Segment { attr: code, selector: 8, ..s.seg[0] };
    s
}
