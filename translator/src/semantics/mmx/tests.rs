//! Checks of the MMX group, and the conversions into XMM by value; `testing/every.rs` has each instruction.

use crate::exception::vector;
use crate::state::cr;
use crate::testing::{DATA, Guest, INSN};
use crate::x87::status;

/// MOVQ from `[rbx]`.
const LOAD_MM0: &[u8] = &[0x0f, 0x6f, 0x03];

fn fault(g: &mut Guest, code: &[u8]) -> Option<u8> {
    g.step(code, INSN).err().map(|e| e.vector)
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
