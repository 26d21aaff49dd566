//! The instruction map against the decoder's, then checks, flags, pointers and precise faults.

use iced_x86::Decoder;

use crate::decode::decode;
use crate::exception::vector;
use crate::semantics;
use crate::state::{cr, flag};
use crate::testing::{DATA, Guest, INSN};
use crate::x87::{F80, Op, status};

fn fault(g: &mut Guest, code: &[u8]) -> Option<u8> {
    g.step(code, INSN).err().map(|e| e.vector)
}

fn run(g: &mut Guest, code: &[u8]) {
    assert_eq!(fault(g, code), None, "{code:02x?}");
}

/// An initialized unit, and RBX at the data.
fn guest() -> Guest {
    let mut g = Guest::code64();
    g.cpu.s.gpr[3] = DATA;
    run(&mut g, &[0xdb, 0xe3]);
    g
}

#[test]
fn every_opcode() {
    let g = guest();
    let mut count = 0;
    for fop in 0..0x800u16 {
        let code = [0xd8 | (fop >> 8) as u8, fop as u8, 0, 0, 0, 0, 0];
        let insn = decode(&code, g.cpu.mode, &g.cpu.model).unwrap();
        let known = !std::ptr::fn_addr_eq(insn.run, semantics::undefined().run);
        let valid = !Decoder::new(64, &code, 0).decode().is_invalid();
        assert_eq!(known, valid && Op::decode(fop).is_some(), "{fop:#x}");
        if known {
            assert_eq!(insn.aux, fop);
            count += 1;
        }
    }
    assert!(count > 1800, "{count}");
}

#[test]
fn prefixes_do_not_hide_the_opcode() {
    let g = guest();
    for code in [&[0x64u8, 0xd9, 0x03][..], &[0x67, 0xd9, 0x03], &[0x41, 0xd9, 0x03], &[0x66, 0x41, 0xd9, 0x03]] {
        assert_eq!(decode(code, g.cpu.mode, &g.cpu.model).unwrap().aux, 0x103, "{code:02x?}");
    }
}

#[test]
fn checks() {
    let (fld1, fnstsw, wait): (&[u8], &[u8], &[u8]) = (&[0xd9, 0xe8], &[0xdf, 0xe0], &[0x9b]);
    let (ts, em, mp) = (cr::CR0_TS, cr::CR0_EM, cr::CR0_MP);
    let (nm, mf) = (Some(vector::NM), Some(vector::MF));
    for (cr0, fsw, expected) in [
        (0, 0, [None; 3]),
        (ts, status::ES, [nm, nm, mf]),
        (em, 0, [nm, nm, None]),
        (ts | mp, 0, [nm; 3]),
        (mp, status::ES, [mf, None, mf]),
    ] {
        for (code, expected) in [fld1, fnstsw, wait].into_iter().zip(expected) {
            let mut g = guest();
            g.cpu.s.cr0 = g.cpu.s.cr0 & !(ts | em | mp) | cr0;
            g.cpu.s.x87.fsw = fsw;
            assert_eq!(fault(&mut g, code), expected, "{cr0:#x} {fsw:#x} {code:02x?}");
        }
    }
}

#[test]
fn a_sequence() {
    let mut g = guest();
    // 1 + 1, then its square root to memory as a double, as a truncated integer, and in 80 bits.
    for code in [&[0xd9u8, 0xe8][..], &[0xd8, 0xc0], &[0xd9, 0xfa], &[0xdd, 0x13], &[0xd9, 0xc0]] {
        run(&mut g, code);
    }
    run(&mut g, &[0xdb, 0x4b, 0x08]); // fisttp dword [rbx + 8]
    run(&mut g, &[0xdb, 0x7b, 0x10]); // fstp tbyte [rbx + 16]
    let mut data = [0; 26];
    g.read(DATA, &mut data);
    assert_eq!(data[..8], 2f64.sqrt().to_le_bytes());
    assert_eq!(data[8..12], 1u32.to_le_bytes());
    assert_eq!(data[16..26], [0x84, 0x64, 0xde, 0xf9, 0x33, 0xf3, 0x04, 0xb5, 0xff, 0x3f]);
    assert_eq!((g.cpu.s.x87.ftw, g.cpu.s.x87.top()), (0, 0));
    let unit = &g.cpu.s.x87;
    assert_eq!((unit.fop, unit.fip, unit.fcs, unit.fdp, unit.fds), (0x37b, INSN, 0, DATA + 16, 0));
    // FNSTSW does not change the pointers.
    run(&mut g, &[0xdf, 0xe0]);
    assert_eq!((g.cpu.s.gpr[0] as u16, g.cpu.s.x87.fop), (status::PE, 0x37b));
}

#[test]
fn fcomi_sets_three_flags_and_clears_three() {
    let nan = F80 { mantissa: 0xc000_0000_0000_0000, sign_exp: 0x7fff };
    for (a, b, expected) in [
        (F80::from_i64(1), F80::from_i64(2), flag::CF),
        (F80::from_i64(2), F80::from_i64(1), 0),
        (F80::from_i64(2), F80::from_i64(2), flag::ZF),
        (nan, F80::ONE, flag::ZF | flag::PF | flag::CF),
    ] {
        let mut g = guest();
        (g.cpu.s.x87.st[0], g.cpu.s.x87.st[1], g.cpu.s.x87.ftw) = (a, b, 3);
        g.cpu.s.set_flags(flag::STATUS | flag::DF);
        run(&mut g, &[0xdb, 0xe9]); // fucomi st, st(1)
        assert_eq!(g.cpu.s.flags() & !2, expected | flag::DF);
    }
}

#[test]
fn environments_have_the_operand_size() {
    let mut g = Guest::code32();
    g.cpu.s.gpr[3] = 0x3000;
    for (code, size) in
        [(&[0xd9u8, 0x33][..], 28), (&[0x66, 0xd9, 0x33], 14), (&[0xdd, 0x33], 108), (&[0x66, 0xdd, 0x33], 94)]
    {
        g.write(0x3000, &[0xaa; 128]);
        g.cpu.s.x87.fcw = 0x37f;
        run(&mut g, code);
        let mut data = [0; 128];
        g.read(0x3000, &mut data);
        assert_eq!(data[..2], [0x7f, 3]);
        assert!(data[size - 1] != 0xaa && data[size..].iter().all(|&b| b == 0xaa), "{code:02x?}");
    }
}

#[test]
fn a_faulting_store_pops_nothing() {
    let mut g = guest();
    run(&mut g, &[0xd9, 0xe8]);
    g.cpu.s.gpr[3] = 0;
    let before = g.cpu.s.x87;
    assert_eq!(fault(&mut g, &[0xdd, 0x1b]), Some(vector::PF)); // fstp qword [rbx]
    assert_eq!(g.cpu.s.x87, before);
}
