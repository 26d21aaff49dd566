//! Guests of random bytes: whatever they do, the host neither panics nor hangs.

use std::sync::Arc;

use diglot_translator::cpu::Cpu;
use diglot_translator::cpuid::{CpuModel, Level};
use diglot_translator::jit::Jit;
use diglot_translator::mem::GuestRam;
use diglot_translator::platform::Platform;
use diglot_translator::state::{CpuState, Segment, cr};
use diglot_translator::vcpu::Vcpu;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// A machine with nothing in it.
struct Empty(u64);

impl Platform for Empty {
    fn tsc(&mut self) -> u64 {
        self.0 += 1;
        self.0
    }
    fn random(&mut self) -> Option<u64> {
        Some(4)
    }
}

/// A small deterministic generator.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

const CODE: u64 = 0x2000;
const IMAGE: usize = 4096;

/// Real mode, 32-bit protected mode with flat segments, or 64-bit mode with the first 2 MiB mapped.
fn state(kind: u64, r: &mut Random) -> CpuState {
    let mut s = CpuState::reset();
    for g in &mut s.gpr {
        // Often an address that exists.
        *g = if r.next() & 1 == 0 { r.next() & 0xffff } else { r.next() };
    }
    s.rip = CODE;
    let segment = |attr| Segment { base: 0, limit: u32::MAX, attr, selector: 8 };
    match kind {
        0 => s.seg[1] = Segment { base: 0, limit: 0xffff, attr: 0x9b, selector: 0 },
        1 => {
            s.cr0 |= cr::CR0_PE;
            s.seg = [segment(0xc093); 6];
            s.seg[1] = segment(0xc09b);
        }
        _ => {
            s.cr0 |= cr::CR0_PE | cr::CR0_PG;
            s.cr4 = cr::CR4_PAE | cr::CR4_OSFXSR | cr::CR4_OSXMMEXCPT | cr::CR4_PGE | cr::CR4_OSXSAVE;
            s.efer = cr::EFER_LME | cr::EFER_LMA | cr::EFER_NXE | cr::EFER_SCE;
            s.cr3 = 0x10000;
            s.seg = [segment(0xc093); 6];
            s.seg[1] = segment(0xa09b);
        }
    }
    s
}

fn run(images: u64, with_jit: bool) {
    let mut r = Random(0x9e37_79b9_7f4a_7c15);
    for n in 0..images {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let mut image = [0u8; IMAGE];
        image.chunks_mut(8).for_each(|c| c.copy_from_slice(&r.next().to_le_bytes()));
        memory.write_slice(&image, GuestAddress(CODE)).unwrap();
        for (at, entry) in [(0x10000u64, 0x11007u64), (0x11000, 0x12007), (0x12000, 0x87)] {
            memory.write_slice(&entry.to_le_bytes(), GuestAddress(at)).unwrap();
        }
        let ram = Arc::new(GuestRam::new(Arc::new(memory)));
        let mut cpu = Cpu::new(ram, Box::new(Empty(n)), CpuModel::new(Level::Max, 1, 0));
        cpu.set_state(state(n % 3, &mut r));
        let jit = with_jit.then(|| Jit::new(1 << 20, 1).unwrap());
        let mut vcpu = Vcpu::new(cpu, jit);
        for _ in 0..500 {
            if vcpu.turn().is_some() {
                break;
            }
        }
    }
}

#[test]
fn interpreted_random_images() {
    run(if cfg!(miri) { 20 } else { 10_000 }, false);
}

#[test]
#[cfg_attr(miri, ignore = "executes no code but Rust's")]
fn random_images_with_the_compiler_at_hand() {
    run(100, true);
}
