//! Faults of the AVX group; `testing/every.rs` has each instruction.

use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::cpu::Cpu;
use crate::cpuid::{CpuModel, Level};
use crate::decode;
use crate::exception::vector;
use crate::insn::{Insn, Mode};
use crate::mem::GuestRam;
use crate::semantics::{self, Form};
use crate::state::cr;
use crate::testing::Empty;

/// Where the memory operand of the tests lies.
const DATA: u64 = 0x1000;
const MODE: Mode = Mode(Mode::CODE64 | Mode::FLAT | Mode::SSE | Mode::AVX);

/// A CPU with 64 KiB of RAM, in real mode.
fn cpu() -> Cpu {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let ram = Arc::new(GuestRam::new(Arc::new(memory)));
    Cpu::new(ram, Box::new(Empty), CpuModel::new(Level::Max, 1, 0))
}

fn insn(bytes: &[u8]) -> Insn {
    decode::decode(bytes, MODE, &CpuModel::new(Level::Max, 1, 0)).unwrap()
}

fn fault(cpu: &mut Cpu, bytes: &[u8]) -> Option<u8> {
    let i = insn(bytes);
    (i.run)(cpu, &i).is_err().then_some(cpu.raised.vector)
}

#[test]
fn faults() {
    let mut cpu = cpu();
    let vmovdqa = [0xc5, 0xfd, 0x6f, 0x0e]; // ymm1, [rsi]
    let vmovdqa_store = [0xc5, 0xfd, 0x7f, 0x0e];
    let vmovdqu_store = [0xc5, 0xfe, 0x7f, 0x0e];
    for (at, aligned) in [(DATA, None), (DATA + 16, Some(vector::GP)), (DATA + 1, Some(vector::GP))] {
        cpu.s.gpr[6] = at;
        assert_eq!(fault(&mut cpu, &vmovdqa), aligned, "{at:#x}");
        assert_eq!(fault(&mut cpu, &vmovdqa_store), aligned, "{at:#x}");
        assert_eq!(fault(&mut cpu, &vmovdqu_store), None, "{at:#x}");
    }
    // A gather whose destination is its index.
    assert_eq!(fault(&mut cpu, &[0xc4, 0xe2, 0x69, 0x90, 0x0c, 0x0e]), Some(vector::UD));
    // Not enabled, and enabled with CR0.TS.
    let off = Mode(Mode::CODE64 | Mode::FLAT);
    let instr = iced_x86::Decoder::new(64, &vmovdqa, 0).decode();
    let sem = semantics::lookup(&Form { instr: &instr, bytes: 32, mode: off, fop: None });
    let i = insn(&vmovdqa);
    assert!((sem.run)(&mut cpu, &i).is_err());
    assert_eq!(cpu.raised.vector, vector::UD);
    (cpu.s.cr0, cpu.s.cr4, cpu.s.xcr0) = (cpu.s.cr0 | cr::CR0_TS | cr::CR0_PE, cpu.s.cr4 | cr::CR4_OSXSAVE, 7);
    assert!((sem.run)(&mut cpu, &i).is_err());
    assert_eq!(cpu.raised.vector, vector::NM);
}

#[test]
fn what_enables_it() {
    let (pe, ts, em) = (cr::CR0_PE, cr::CR0_TS, cr::CR0_EM);
    let xsave = cr::CR4_OSXSAVE;
    for (cr0, cr4, xcr0, enabled) in [
        (pe, xsave, 7, true),
        (pe | em, xsave, 7, true),
        (pe | ts, xsave, 7, false),
        (pe, xsave, 3, false),
        (pe, xsave, 5, false),
        (pe, cr::CR4_OSFXSR, 7, false),
        (0, xsave | cr::CR4_OSFXSR, 7, false),
    ] {
        let mut cpu = cpu();
        (cpu.s.cr0, cpu.s.cr4, cpu.s.xcr0) = (cr0, cr4, xcr0);
        cpu.mode_changed();
        assert_eq!(cpu.mode.has(Mode::AVX), enabled, "{cr0:#x} {cr4:#x} {xcr0}");
    }
}

#[test]
fn a_faulting_gather_keeps_what_it_has() {
    let mut cpu = cpu();
    // Through the segment, so that the second index is beyond its limit.
    cpu.s.gpr[6] = DATA;
    cpu.store_linear::<crate::width::W32>(DATA, 0x1234_5678).unwrap_or_else(|_| panic!("store"));
    let mut i = insn(&[0xc4, 0xe2, 0x69, 0x90, 0x0c, 0xae]); // vpgatherdd xmm1, [rsi + xmm5 * 4], xmm2
    i.flat = false;
    cpu.s.set_xmm(5, 0x0100_0000 << 32);
    cpu.s.set_xmm(2, u128::MAX);
    cpu.s.set_xmm(1, u128::MAX);
    assert!((i.run)(&mut cpu, &i).is_err());
    assert_eq!(cpu.s.xmm(1), u128::MAX << 32 | 0x1234_5678);
    assert_eq!(cpu.s.xmm(2), u128::MAX << 32);
    cpu.s.set_xmm(5, 0);
    assert!((i.run)(&mut cpu, &i).is_ok());
    assert_eq!((cpu.s.xmm(1), cpu.s.xmm(2)), (0x1234_5678_1234_5678_1234_5678_1234_5678, 0));
}
