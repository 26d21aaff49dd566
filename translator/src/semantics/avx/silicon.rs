//! Every VEX instruction, register and memory form, against the processor that runs the test.

use std::mem::{offset_of, transmute};

use iced_x86::code_asm::*;
use iced_x86::{Code, IcedError, Instruction, Mnemonic, OpKind};

use super::tests::{DATA, DATA_BYTES, build, codes, cpu, predecode};
use crate::cpu::Cpu;
use crate::state::{CpuState, flag, gpr};

/// What an instruction may read and change.
#[repr(C)]
#[derive(Clone, Debug, PartialEq)]
struct State {
    ymm: [[u64; 4]; 16],
    rax: u64,
    rcx: u64,
    rdx: u64,
    flags: u64,
    mxcsr: u32,
    host_mxcsr: u32,
    /// Address of the memory operand, for RSI and RDI.
    at: u64,
}

/// A function that loads the state, executes the instruction, and stores the state.
struct Stub(*mut libc::c_void);

const STUB_BYTES: usize = 4096;

impl Stub {
    fn new(instruction: &[u8]) -> Stub {
        let mut a = CodeAssembler::new(64).unwrap();
        let assemble = |a: &mut CodeAssembler| -> Result<(), IcedError> {
            a.push(rbx)?;
            a.mov(rbx, rdi)?;
            a.stmxcsr(dword_ptr(rbx + offset_of!(State, host_mxcsr)))?;
            a.ldmxcsr(dword_ptr(rbx + offset_of!(State, mxcsr)))?;
            let ymm =
                [ymm0, ymm1, ymm2, ymm3, ymm4, ymm5, ymm6, ymm7, ymm8, ymm9, ymm10, ymm11, ymm12, ymm13, ymm14, ymm15];
            for (n, r) in ymm.into_iter().enumerate() {
                a.vmovdqu(r, ymmword_ptr(rbx + 32 * n))?;
            }
            a.mov(rsi, qword_ptr(rbx + offset_of!(State, at)))?;
            a.mov(rdi, rsi)?;
            a.mov(rax, qword_ptr(rbx + offset_of!(State, rax)))?;
            a.mov(rcx, qword_ptr(rbx + offset_of!(State, rcx)))?;
            a.mov(rdx, qword_ptr(rbx + offset_of!(State, rdx)))?;
            a.push(2)?;
            a.popfq()?;
            a.db(instruction)?;
            a.pushfq()?;
            a.pop(qword_ptr(rbx + offset_of!(State, flags)))?;
            a.mov(qword_ptr(rbx + offset_of!(State, rax)), rax)?;
            a.mov(qword_ptr(rbx + offset_of!(State, rcx)), rcx)?;
            a.mov(qword_ptr(rbx + offset_of!(State, rdx)), rdx)?;
            for (n, r) in ymm.into_iter().enumerate() {
                a.vmovdqu(ymmword_ptr(rbx + 32 * n), r)?;
            }
            a.stmxcsr(dword_ptr(rbx + offset_of!(State, mxcsr)))?;
            a.ldmxcsr(dword_ptr(rbx + offset_of!(State, host_mxcsr)))?;
            a.vzeroupper()?;
            a.pop(rbx)?;
            a.ret()
        };
        assemble(&mut a).unwrap();
        let code = a.assemble(0).unwrap();
        assert!(code.len() <= STUB_BYTES);
        // SAFETY: a fresh mapping, written within its size and then made executable.
        unsafe {
            let p = libc::mmap(
                std::ptr::null_mut(),
                STUB_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            assert_ne!(p, libc::MAP_FAILED);
            std::ptr::copy_nonoverlapping(code.as_ptr(), p.cast(), code.len());
            assert_eq!(libc::mprotect(p, STUB_BYTES, libc::PROT_READ | libc::PROT_EXEC), 0);
            Stub(p)
        }
    }

    fn run(&self, s: &mut State) {
        // SAFETY: the mapping holds a function of this type that keeps to the calling convention; the instruction in
        // it touches only the state and the memory around `at`, which the caller owns.
        unsafe { transmute::<*mut libc::c_void, extern "C" fn(*mut State)>(self.0)(s) }
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`.
        unsafe { libc::munmap(self.0, STUB_BYTES) };
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Random bits, or lanes of numbers that floating point finds ordinary or special.
    fn word(&mut self) -> u64 {
        const SINGLES: [u32; 8] =
            [0, 0x8000_0000, 0x3f80_0000, 0xc020_0000, 0x7f80_0000, 0x7fc0_0001, 0x0000_0123, 0x4f00_0000];
        const DOUBLES: [f64; 8] = [0.0, -0.0, 1.5, -2.25, f64::INFINITY, 1e300, 3e9, 1e-310];
        let k = self.next();
        let pick = (self.next() >> 20) as usize;
        match k >> 60 {
            0..6 => self.next(),
            6..10 => u64::from(SINGLES[pick & 7]) | u64::from(SINGLES[pick >> 3 & 7]) << 32,
            10..13 => DOUBLES[pick & 7].to_bits(),
            _ => self.next() & 0x8080_ff01_0080_7f01,
        }
    }
}

#[repr(C, align(64))]
struct Memory([u8; DATA_BYTES]);

fn guest(cpu: &mut Cpu, s: &State, memory: &Memory) {
    cpu.s = CpuState::reset();
    cpu.s.ymm = s.ymm;
    cpu.s.gpr[usize::from(gpr::RAX)] = s.rax;
    cpu.s.gpr[usize::from(gpr::RCX)] = s.rcx;
    cpu.s.gpr[usize::from(gpr::RDX)] = s.rdx;
    cpu.s.gpr[usize::from(gpr::RSI)] = DATA;
    cpu.s.gpr[usize::from(gpr::RDI)] = DATA;
    cpu.s.set_flags(2);
    cpu.s.mxcsr = s.mxcsr;
    assert!(cpu.store_bytes(DATA, &memory.0).is_ok());
}

fn one(code: Code, i: &Instruction, r: &mut Random, cpu: &mut Cpu) {
    let (bytes, insn) = predecode(i);
    let stub = Stub::new(&bytes);
    for round in 0..24 {
        let mut s = State {
            ymm: std::array::from_fn(|_| std::array::from_fn(|_| r.word())),
            rax: r.word(),
            rcx: r.word(),
            rdx: r.next() & 31,
            flags: 0,
            mxcsr: 0x1f80 | (r.next() as u32 & 0xe040),
            host_mxcsr: 0,
            at: 0,
        };
        if i.is_vsib() {
            let narrow = format!("{code:?}").contains("vm32");
            s.ymm[5] = s.ymm[5].map(|w| w & if narrow { 0x1f_0000_001f } else { 0x1f });
        }
        let mut memory = Memory(std::array::from_fn(|_| 0));
        memory.0.chunks_exact_mut(8).for_each(|c| c.copy_from_slice(&r.word().to_le_bytes()));
        if i.mnemonic() == Mnemonic::Vldmxcsr {
            memory.0[..4].copy_from_slice(&0x9fc0_u32.to_le_bytes());
        }
        let before = s.clone();
        guest(cpu, &s, &memory);
        s.at = memory.0.as_mut_ptr() as u64;
        stub.run(&mut s);
        let done = (insn.run)(cpu, &insn).is_ok();
        let context = format!("{code:?} {bytes:02x?} round {round} before {before:x?}");
        assert!(done, "{context}");
        assert_eq!(cpu.s.ymm, s.ymm, "{context}");
        let g = |r: u8| cpu.s.gpr[usize::from(r)];
        assert_eq!([g(gpr::RAX), g(gpr::RCX), g(gpr::RDX)], [s.rax, s.rcx, s.rdx], "{context}");
        assert_eq!(cpu.s.flags() & flag::STATUS, s.flags & flag::STATUS, "{context}");
        assert_eq!(cpu.s.mxcsr, s.mxcsr, "{context}");
        let mut after = [0; DATA_BYTES];
        assert!(cpu.load_bytes(DATA, &mut after).is_ok());
        assert!(after == memory.0, "memory of {context}");
    }
}

#[test]
fn as_the_processor() {
    let features = [
        is_x86_feature_detected!("avx2"),
        is_x86_feature_detected!("fma"),
        is_x86_feature_detected!("f16c"),
        is_x86_feature_detected!("aes"),
        is_x86_feature_detected!("pclmulqdq"),
    ];
    if features.contains(&false) {
        eprintln!("skipped: this processor does not have all the features");
        return;
    }
    let (mut r, mut cpu) = (Random(0x1234_5678_9abc_def1), cpu());
    for code in codes() {
        for memory in [false, true] {
            for imm in [0x00, 0x1b, 0xe4, 0x7d] {
                let Some(i) = build(code, memory, imm) else { continue };
                let has_imm = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Immediate8);
                one(code, &i, &mut r, &mut cpu);
                if !has_imm {
                    break;
                }
            }
        }
    }
}
