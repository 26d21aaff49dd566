//! Each instruction on MMX registers against the host's processor; checks and the conversions into XMM by value.

use crate::exception::vector;
use crate::state::cr;
use crate::testing::{DATA, Guest, INSN};
use crate::x87::status;

/// MOVQ from `[rbx]` and back, which the tests put around an instruction.
const LOAD_MM0: &[u8] = &[0x0f, 0x6f, 0x03];
#[cfg(target_arch = "x86_64")]
const LOAD_MM1: &[u8] = &[0x0f, 0x6f, 0x4b, 0x08];
#[cfg(target_arch = "x86_64")]
const STORE_MM0: &[u8] = &[0x0f, 0x7f, 0x03];

fn fault(g: &mut Guest, code: &[u8]) -> Option<u8> {
    g.step(code, INSN).err().map(|e| e.vector)
}

#[cfg(target_arch = "x86_64")]
mod silicon {
    use iced_x86::{
        Code, CpuidFeature, Decoder, DecoderOptions, Encoder, EncodingKind, Instruction, OpCodeOperandKind, OpKind,
        Register,
    };

    use super::*;
    use crate::testing::{Machine, Random, native::Native};

    /// The codes with MMX operands of the features that exist, but those that write XMM registers.
    fn codes() -> impl Iterator<Item = Code> {
        use CpuidFeature::*;
        use OpCodeOperandKind::*;
        Code::values().filter(|c| {
            let kinds = c.op_code().op_kinds();
            c.op_code().encoding() == EncodingKind::Legacy
                && c.op_code().mode64()
                && c.cpuid_features().iter().all(|f| [MMX, SSE, SSE2, SSSE3].contains(f))
                && kinds.iter().any(|k| [mm_reg, mm_rm, mm_or_mem].contains(k))
                && kinds.first() != Some(&xmm_reg)
        })
    }

    /// `code` on MM0, MM1, EAX and ECX, or with its memory form on the quadword behind `[rbx]`.
    fn build(code: Code, memory: bool, imm: u8) -> Option<Vec<u8>> {
        use OpCodeOperandKind::*;
        let mut i = Instruction::default();
        i.set_code(code);
        let mut has_memory = false;
        for (n, &kind) in (0..).zip(code.op_code().op_kinds()) {
            let register = match kind {
                mm_reg => Register::MM0,
                mm_rm => Register::MM1,
                mm_or_mem if !memory => Register::MM1,
                r32_reg => Register::EAX,
                r64_reg => Register::RAX,
                r32_or_mem if !memory => Register::ECX,
                r64_or_mem if !memory => Register::RCX,
                imm8 => {
                    i.set_op_kind(n, OpKind::Immediate8);
                    i.set_immediate8(imm);
                    continue;
                }
                seg_rDI => {
                    i.set_op_kind(n, OpKind::MemorySegRDI);
                    continue;
                }
                // XMM sources come from memory, as the stub does not load XMM registers.
                xmm_rm => return Option::None,
                xmm_or_mem if !memory => return Option::None,
                _ => {
                    i.set_op_kind(n, OpKind::Memory);
                    i.set_memory_base(Register::RBX);
                    i.set_memory_displacement64(16);
                    i.set_memory_displ_size(1);
                    has_memory = true;
                    continue;
                }
            };
            i.set_op_register(n, register);
        }
        let mut encoder = Encoder::new(64);
        encoder.encode(&i, 0).unwrap();
        (has_memory || !memory).then(|| encoder.take_buffer())
    }

    fn state(r: &mut Random, small: bool) -> Machine {
        let mut gpr = [0; 16];
        gpr.fill_with(|| r.nasty());
        (gpr[3], gpr[7]) = (DATA, DATA + 40);
        let mut data: Vec<u8> = (0..8).flat_map(|_| r.nasty().to_le_bytes()).collect();
        if small {
            // A count that shifts by less than everything; for PSHUFB and its like one byte to choose.
            data[8..16].copy_from_slice(&r.below(70).to_le_bytes());
            data[16..24].copy_from_slice(&r.below(70).to_le_bytes());
        }
        Machine { gpr, flags: 2, rip: INSN, data }
    }

    #[test]
    fn as_the_host() {
        let Some(mut native) = Native::take() else { return };
        let mut guest = Guest::code64();
        let mut r = Random::new(64);
        let mut forms = 0;
        for code in codes() {
            for memory in [false, true] {
                for round in 0..24 {
                    let Some(bytes) = build(code, memory, r.u64() as u8 & 0x3f) else { break };
                    forms += usize::from(round == 0);
                    let second = if memory { &[] } else { LOAD_MM1 };
                    let all = [LOAD_MM0, second, &bytes, STORE_MM0].concat();
                    let before = state(&mut r, round % 2 == 0);
                    native.load(&all);
                    let expected = native.run(all.len(), &before);
                    // SAFETY: gives the x87 unit back to the host's code, which holds nothing in it.
                    unsafe { std::arch::asm!("emms", options(nomem, nostack)) };
                    guest.cpu.s.gpr = before.gpr;
                    guest.write(DATA, &before.data);
                    let mut decoder = Decoder::with_ip(64, &all, 0, DecoderOptions::NONE);
                    let mut at = 0;
                    while decoder.can_decode() {
                        let len = decoder.decode().len();
                        let step = guest.step(&all[at..at + len], INSN + at as u64);
                        assert!(step.is_ok(), "{code:?} {step:?}");
                        at += len;
                    }
                    let mut data = vec![0; before.data.len()];
                    guest.read(DATA, &mut data);
                    assert_eq!(
                        (guest.cpu.s.gpr, data),
                        (expected.gpr, expected.data),
                        "{code:?} {bytes:02x?} {before:x?}"
                    );
                    assert_eq!((guest.cpu.s.x87.ftw, guest.cpu.s.x87.top()), (0xff, 0), "{code:?}");
                }
            }
        }
        assert!(forms > 150, "{forms}");
    }
}

#[test]
fn conversions_into_xmm() {
    let mut g = Guest::code64();
    g.cpu.s.gpr[3] = DATA;
    let numbers = u64::from(-3i32 as u32) << 32 | 7;
    g.write(DATA, &numbers.to_le_bytes());
    g.cpu.s.set_xmm(0, u128::MAX);
    // CVTPI2PD from memory leaves the x87 unit alone, even with an exception pending.
    g.cpu.s.x87.fsw = status::ES | 3 << 11;
    let x87 = g.cpu.s.x87;
    assert_eq!(fault(&mut g, &[0x66, 0x0f, 0x2a, 0x03]), None);
    assert_eq!(g.cpu.s.xmm(0), u128::from((-3f64).to_bits()) << 64 | u128::from(7f64.to_bits()));
    assert_eq!(g.cpu.s.x87, x87);
    assert_eq!(fault(&mut g, &[0x66, 0x0f, 0x2a, 0xc0]), Some(vector::MF));
    assert_eq!(fault(&mut g, &[0x0f, 0x2a, 0x03]), Some(vector::MF));
    g.cpu.s.x87.fsw = 3 << 11;
    // CVTPI2PS keeps the upper half.
    let high = g.cpu.s.xmm(0) >> 64 << 64;
    assert_eq!(fault(&mut g, &[0x0f, 0x2a, 0x03]), None);
    assert_eq!(g.cpu.s.xmm(0), high | u128::from((-3f32).to_bits()) << 32 | u128::from(7f32.to_bits()));
    assert_eq!((g.cpu.s.x87.ftw, g.cpu.s.x87.top()), (0xff, 0));
    // MOVQ2DQ and MOVDQ2Q.
    assert_eq!(fault(&mut g, LOAD_MM0), None);
    assert_eq!(fault(&mut g, &[0xf3, 0x0f, 0xd6, 0xc8]), None);
    assert_eq!(g.cpu.s.xmm(1), numbers.into());
    assert_eq!(fault(&mut g, &[0xf2, 0x0f, 0xd6, 0xf9]), None);
    assert_eq!((g.cpu.s.x87.mmx(7), g.cpu.s.x87.st[7].sign_exp), (numbers, 0xffff));
    assert_eq!(fault(&mut g, &[0x0f, 0x77]), None);
    assert_eq!(g.cpu.s.x87.ftw, 0);
}

#[test]
fn checks() {
    let paddb: &[u8] = &[0x0f, 0xfc, 0xc1];
    let movq2dq: &[u8] = &[0xf3, 0x0f, 0xd6, 0xc8];
    for (cr0, cr4, fsw, plain, xmm) in [
        (cr::CR0_EM | cr::CR0_TS, cr::CR4_OSFXSR, 0, Some(vector::UD), Some(vector::UD)),
        (cr::CR0_TS, cr::CR4_OSFXSR, status::ES, Some(vector::NM), Some(vector::NM)),
        (0, cr::CR4_OSFXSR, status::ES, Some(vector::MF), Some(vector::MF)),
        (0, 0, 0, None, Some(vector::UD)),
        (0, cr::CR4_OSFXSR, 0, None, None),
    ] {
        let mut g = Guest::code64();
        g.cpu.s.cr0 |= cr0;
        g.cpu.s.cr4 = g.cpu.s.cr4 & !cr::CR4_OSFXSR | cr4;
        g.cpu.s.x87.fsw = fsw;
        assert_eq!(fault(&mut g, paddb), plain, "{cr0:#x}");
        g.cpu.s.x87.fsw = fsw;
        assert_eq!(fault(&mut g, movq2dq), xmm, "{cr0:#x}");
    }
}
