//! Every VEX instruction of the features that the group covers has semantics, and takes the right faults.

use std::sync::Arc;

use iced_x86::{Code, CpuidFeature, Encoder, EncodingKind, Instruction, OpCodeOperandKind, OpKind, Register};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::cpu::Cpu;
use crate::cpuid::{CpuModel, Level};
use crate::decode;
use crate::exception::vector;
use crate::insn::{Insn, Mode};
use crate::mem::GuestRam;
use crate::platform::Platform;
use crate::semantics::{self, Form};
use crate::state::cr;

/// Where the memory operand of the tests lies.
pub(super) const DATA: u64 = 0x1000;
/// Room around it.
pub(super) const DATA_BYTES: usize = 0x400;
const MODE: Mode = Mode(Mode::CODE64 | Mode::FLAT | Mode::SSE | Mode::AVX);

struct Nothing;

impl Platform for Nothing {
    fn port_in(&mut self, _: u16, _: u8) -> u32 {
        0
    }
    fn port_out(&mut self, _: u16, _: u8, _: u32) {}
    fn mmio_read(&mut self, _: u64, _: u8) -> u64 {
        0
    }
    fn mmio_write(&mut self, _: u64, _: u8, _: u64) {}
    fn tsc(&mut self) -> u64 {
        0
    }
    fn apic_msr_read(&mut self, _: u32, _: u64) -> Option<u64> {
        None
    }
    fn apic_msr_write(&mut self, _: u32, _: u64, _: u64) -> Option<()> {
        None
    }
    fn cr8(&mut self) -> u64 {
        0
    }
    fn set_cr8(&mut self, _: u64) {}
    fn interrupt_pending(&mut self) -> bool {
        false
    }
    fn acknowledge(&mut self) -> Option<u8> {
        None
    }
    fn take_nmi(&mut self) -> bool {
        false
    }
    fn random(&mut self) -> Option<u64> {
        None
    }
}

/// A CPU with 64 KiB of RAM, in real mode.
pub(super) fn cpu() -> Cpu {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let ram = Arc::new(GuestRam::new(Arc::new(memory)));
    Cpu::new(ram, Box::new(Nothing), CpuModel::new(Level::Max, 1, 0))
}

/// The codes of the features that exist, in 64-bit mode.
pub(super) fn codes() -> impl Iterator<Item = Code> {
    use CpuidFeature::*;
    let known = [AVX, AVX2, FMA, F16C, AES, PCLMULQDQ];
    Code::values().filter(move |c| {
        c.op_code().encoding() == EncodingKind::VEX
            && c.op_code().mode64()
            && c.cpuid_features().iter().all(|f| known.contains(f))
    })
}

/// An instruction of `code`; with `memory` only if it has a form with memory, and that form.
pub(super) fn build(code: Code, memory: bool, imm: u8) -> Option<Instruction> {
    use OpCodeOperandKind::*;
    let mut i = Instruction::default();
    i.set_code(code);
    let mut has_memory = false;
    for (n, &kind) in code.op_code().op_kinds().iter().enumerate() {
        let n = n as u32;
        let register = match kind {
            xmm_reg => Register::XMM1,
            xmm_vvvv => Register::XMM2,
            xmm_rm => Register::XMM3,
            xmm_is4 => Register::XMM4,
            xmm_or_mem if !memory => Register::XMM3,
            ymm_reg => Register::YMM1,
            ymm_vvvv => Register::YMM2,
            ymm_rm => Register::YMM3,
            ymm_is4 => Register::YMM4,
            ymm_or_mem if !memory => Register::YMM3,
            r32_reg => Register::EAX,
            r64_reg => Register::RAX,
            r32_or_mem if !memory => Register::ECX,
            r64_or_mem if !memory => Register::RCX,
            r32_rm => Register::ECX,
            r64_rm => Register::RCX,
            imm8 => {
                i.set_op_kind(n, OpKind::Immediate8);
                i.set_immediate8(imm);
                continue;
            }
            seg_rDI => {
                i.set_op_kind(n, OpKind::MemorySegRDI);
                continue;
            }
            _ => {
                i.set_op_kind(n, OpKind::Memory);
                i.set_memory_base(Register::RSI);
                i.set_memory_index(match kind {
                    mem_vsib32x | mem_vsib64x => Register::XMM5,
                    mem_vsib32y | mem_vsib64y => Register::YMM5,
                    _ => Register::None,
                });
                i.set_memory_index_scale(if i.memory_index() == Register::None { 1 } else { 4 });
                has_memory = true;
                continue;
            }
        };
        i.set_op_register(n, register);
    }
    (has_memory || !memory).then_some(i)
}

/// Encodes, decodes and predecodes, whatever the model advertises.
pub(super) fn predecode(i: &Instruction) -> (Vec<u8>, Insn) {
    let mut encoder = Encoder::new(64);
    encoder.encode(i, 0).unwrap();
    let bytes = encoder.take_buffer();
    (bytes.clone(), insn(&bytes))
}

fn insn(bytes: &[u8]) -> Insn {
    let mut insn = decode::decode(bytes, MODE, &CpuModel::new(Level::Max, 1, 0)).unwrap();
    let instr = iced_x86::Decoder::new(64, bytes, 0).decode();
    let sem = semantics::lookup(&Form { instr: &instr, bytes: insn.osize, mode: MODE, fop: None });
    (insn.run, insn.sem, insn.aux) = (sem.run, sem, (sem.aux)(&instr));
    insn
}

#[test]
fn all_are_there() {
    let undefined = semantics::undefined().run;
    let (mut count, mut missing) = (0, Vec::new());
    for code in codes() {
        for memory in [false, true] {
            let Some(i) = build(code, memory, 0) else { continue };
            let (bytes, insn) = predecode(&i);
            assert_eq!(insn.iced_code(), code, "{bytes:02x?}");
            if std::ptr::fn_addr_eq(insn.run, undefined) {
                missing.push(code);
            }
            count += 1;
        }
    }
    assert_eq!(missing, []);
    assert!(count > 900, "{count}");
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
    (cpu.s.cr0, cpu.s.cr4, cpu.s.xcr0) = (cpu.s.cr0 | cr::CR0_TS, cpu.s.cr4 | cr::CR4_OSXSAVE, 7);
    assert!((sem.run)(&mut cpu, &i).is_err());
    assert_eq!(cpu.raised.vector, vector::NM);
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
