//! Round trips of the state images, and what they must refuse.

use super::*;
use crate::testing::{DATA, Guest, INSN};
use crate::width::W64;
use crate::x87::F80;

const FXSAVE: &[u8] = &[0x0f, 0xae, 0x03];
const FXSAVE64: &[u8] = &[0x48, 0x0f, 0xae, 0x03];
const FXRSTOR: &[u8] = &[0x0f, 0xae, 0x0b];
const FXRSTOR64: &[u8] = &[0x48, 0x0f, 0xae, 0x0b];
const XSAVE64: &[u8] = &[0x48, 0x0f, 0xae, 0x23];
const XSAVEOPT64: &[u8] = &[0x48, 0x0f, 0xae, 0x33];
const XSAVEC64: &[u8] = &[0x48, 0x0f, 0xc7, 0x23];
const XRSTOR64: &[u8] = &[0x48, 0x0f, 0xae, 0x2b];
/// The area straddles a page boundary.
const AT: u64 = DATA + 0x40;

fn fault(g: &mut Guest, code: &[u8]) -> Option<u8> {
    g.step(code, INSN).err().map(|e| e.vector)
}

/// A guest with all components enabled and requested, in their initial state.
fn guest() -> Guest {
    let mut g = Guest::code64();
    (g.cpu.s.gpr[0], g.cpu.s.gpr[2], g.cpu.s.gpr[3]) = (7, 0, AT);
    g.cpu.s.cr4 |= cr::CR4_OSXSAVE;
    g.cpu.s.xcr0 = 7;
    g.cpu.s.x87 = X87::initialized();
    g
}

fn fill(g: &mut Guest) {
    let s = &mut g.cpu.s;
    for (n, r) in (1..).zip(&mut s.x87.st) {
        *r = F80::from_i64(n * 1001);
    }
    (s.x87.ftw, s.x87.fsw, s.x87.fcw) = (0xa5, 3 << 11, 0x27f);
    s.x87.set_last(0x123, 0x1234_5678_9abc, 0);
    s.x87.set_last_operand(0x9876_5432_1000, 0);
    for (n, y) in (1..).zip(&mut s.ymm) {
        *y = [n, n << 40, n * 3, n << 50];
    }
    s.mxcsr = 0x1fa0;
}

fn clear(g: &mut Guest) {
    g.cpu.s.x87 = X87::initialized();
    g.cpu.s.ymm = [[0; 4]; 16];
    g.cpu.s.mxcsr = MXCSR_INIT;
}

fn word(g: &Guest, at: usize) -> u64 {
    let mut bytes = [0; 8];
    g.read(AT + at as u64, &mut bytes);
    u64::from_le_bytes(bytes)
}

#[test]
fn fxsave_round_trip() {
    for (save, restore, wide) in [(FXSAVE64, FXRSTOR64, true), (FXSAVE, FXRSTOR, false)] {
        let mut g = guest();
        fill(&mut g);
        g.write(AT, &[0xaa; 0x210]);
        let mut expected = g.cpu.s.clone();
        assert_eq!(fault(&mut g, save), None);
        assert!((464..0x210).step_by(8).all(|at| word(&g, at) == 0xaaaa_aaaa_aaaa_aaaa));
        clear(&mut g);
        assert_eq!(fault(&mut g, restore), None);
        if !wide {
            expected.x87.fip &= 0xffff_ffff;
            expected.x87.fdp &= 0xffff_ffff;
        }
        assert_eq!(g.cpu.s.x87, expected.x87);
        assert_eq!(g.cpu.s.mxcsr, expected.mxcsr);
        assert!(g.cpu.s.ymm.iter().zip(&expected.ymm).all(|(a, b)| a[..2] == b[..2] && a[2..] == [0, 0]));
    }
}

#[test]
fn xsave_round_trips() {
    for save in [XSAVE64, XSAVEOPT64, XSAVEC64] {
        let mut g = guest();
        fill(&mut g);
        g.write(AT, &[0; 0x400]);
        let expected = g.cpu.s.clone();
        assert_eq!(fault(&mut g, save), None);
        let comp = if save == XSAVEC64 { COMPACT | 7 } else { 0 };
        assert_eq!((word(&g, HEADER), word(&g, HEADER + 8)), (7, comp));
        clear(&mut g);
        assert_eq!(fault(&mut g, XRSTOR64), None);
        assert_eq!((g.cpu.s.x87, g.cpu.s.ymm, g.cpu.s.mxcsr), (expected.x87, expected.ymm, expected.mxcsr));
        // What the image has not, becomes initial: MXCSR too in the compacted format only.
        g.write(AT + HEADER as u64, &[0]);
        assert_eq!(fault(&mut g, XRSTOR64), None);
        let mxcsr = if comp != 0 { MXCSR_INIT } else { 0x1fa0 };
        assert_eq!((g.cpu.s.x87, g.cpu.s.ymm, g.cpu.s.mxcsr), (X87::initialized(), [[0; 4]; 16], mxcsr));
    }
}

/// PKRU is far behind the rest in the standard format and next to what there is in the compacted one.
#[test]
fn protection_keys() {
    for (save, requested, at) in
        [(XSAVE64, 0x207u64, 2688), (XSAVEOPT64, 0x200, 2688), (XSAVEC64, 0x207, AVX + 256), (XSAVEC64, 0x203, AVX)]
    {
        let mut g = guest();
        g.write(AT, &[0; 2696]);
        (g.cpu.s.xcr0, g.cpu.s.pkru, g.cpu.s.gpr[0]) = (0x207, 0x5555_5554, requested);
        assert_eq!(fault(&mut g, save), None);
        assert_eq!((word(&g, at), word(&g, HEADER) & component::PKRU), (0x5555_5554, component::PKRU));
        g.cpu.s.pkru = 3;
        assert_eq!(fault(&mut g, XRSTOR64), None);
        assert_eq!(g.cpu.s.pkru, 0x5555_5554);
        // Not in the image, or not requested.
        g.write(AT + HEADER as u64, &[0; 8]);
        assert_eq!(fault(&mut g, XRSTOR64), None);
        assert_eq!(g.cpu.s.pkru, 0);
        (g.cpu.s.pkru, g.cpu.s.gpr[0]) = (3, 3);
        assert_eq!(fault(&mut g, XRSTOR64), None);
        assert_eq!(g.cpu.s.pkru, 3);
    }
}

#[test]
fn only_what_is_requested() {
    let mut g = guest();
    fill(&mut g);
    g.write(AT, &[0xaa; 0x400]);
    g.write(AT + HEADER as u64, &[0; 64]);
    g.cpu.s.gpr[0] = component::SSE;
    assert_eq!(fault(&mut g, XSAVE64), None);
    assert_eq!(
        (word(&g, 0), word(&g, AVX), word(&g, HEADER)),
        (0xaaaa_aaaa_aaaa_aaaa, 0xaaaa_aaaa_aaaa_aaaa, component::SSE)
    );
    assert_eq!((word(&g, 160), word(&g, 168)), (1, 1 << 40));
    let unit = g.cpu.s.x87;
    g.cpu.s.ymm = [[9; 4]; 16];
    assert_eq!(fault(&mut g, XRSTOR64), None);
    assert_eq!((g.cpu.s.ymm[0], g.cpu.s.x87), ([1, 1 << 40, 9, 9], unit));
}

#[test]
fn components_in_use() {
    for (mxcsr, xmm, avx, unit) in
        [(MXCSR_INIT, 0, 0, 0), (0x1f81, 0, 0, 0), (MXCSR_INIT, 1, 0, 1), (MXCSR_INIT, 0, 5, 0)]
    {
        for save in [XSAVE64, XSAVEOPT64, XSAVEC64] {
            let mut g = guest();
            g.write(AT, &[0; 0x400]);
            (g.cpu.s.mxcsr, g.cpu.s.ymm[7], g.cpu.s.x87.ftw) = (mxcsr, [0, xmm, avx, 0], unit);
            assert_eq!(fault(&mut g, save), None);
            // Only XSAVEC counts MXCSR.
            let sse = xmm != 0 || save == XSAVEC64 && mxcsr != MXCSR_INIT;
            let expected = u64::from(unit) | u64::from(sse) << 1 | u64::from(avx != 0) << 2;
            assert_eq!(word(&g, HEADER), expected, "{save:02x?} {mxcsr:#x} {xmm} {avx} {unit}");
            // What is initial, only XSAVE writes.
            let fcw = save == XSAVE64 || unit != 0;
            assert_eq!(word(&g, 0) as u16, if fcw { 0x37f } else { 0 });
        }
    }
}

#[test]
fn refusals() {
    let gp = Some(vector::GP);
    for (at, value, expected) in [
        (HEADER, 8, gp),        // not in XCR0
        (HEADER + 8, 1, gp),    // XCOMP_BV in the standard format
        (HEADER + 16, 1, gp),   // reserved
        (HEADER + 24, 1, None), // not checked in the standard format
        (HEADER + 8, COMPACT | 8, gp),
        (24, 0x1_0000, gp), // MXCSR
        (HEADER, 7, None),
    ] {
        let mut g = guest();
        g.write(AT, &[0; 0x400]);
        g.write(AT + at as u64, &u64::to_le_bytes(value));
        assert_eq!(fault(&mut g, XRSTOR64), expected, "{at} {value:#x}");
    }
    let mut g = guest();
    for (code, align) in [(FXSAVE, 16), (FXRSTOR, 16), (XSAVE64, 64), (XSAVEC64, 64), (XRSTOR64, 64)] {
        g.cpu.set_gpr::<W64>(gpr::RBX, AT + align / 2);
        assert_eq!(fault(&mut g, code), gp, "{code:02x?}");
    }
    g.cpu.set_gpr::<W64>(gpr::RBX, AT);
    g.cpu.s.cr0 |= cr::CR0_TS;
    for code in [FXSAVE, FXRSTOR, XSAVE64, XSAVEC64, XRSTOR64] {
        assert_eq!(fault(&mut g, code), Some(vector::NM), "{code:02x?}");
    }
    g.cpu.s.cr4 &= !cr::CR4_OSXSAVE;
    for code in [XSAVE64, XSAVEOPT64, XSAVEC64, XRSTOR64] {
        assert_eq!(fault(&mut g, code), Some(vector::UD), "{code:02x?}");
    }
}

#[test]
fn a_save_faults_as_a_write() {
    let mut g = guest();
    g.cpu.s.gpr[3] = 0x1000;
    for code in [FXSAVE, XSAVE64] {
        let e = g.step(code, INSN).unwrap_err();
        assert_eq!((e.vector, e.error), (vector::PF, Some(2)), "{code:02x?}");
    }
}
