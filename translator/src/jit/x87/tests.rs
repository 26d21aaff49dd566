//! Which instructions make a run, what it takes for granted, and that its host code is what it should be.

use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

use super::run::Run;
use super::{compiled, piece};
use crate::decode::decode;
use crate::jit::host::Host;
use crate::testing::Guest;

/// The run that 64-bit code begins with.
fn run(mut code: &[u8]) -> Run {
    let g = Guest::code64();
    let mut insns = Vec::new();
    let mut off = 0;
    while !code.is_empty() {
        let mut i = decode(code, g.cpu.mode, &g.cpu.model).unwrap();
        i.off = off;
        off += u16::from(i.len);
        code = &code[usize::from(i.len)..];
        insns.push(i);
    }
    Run::of(&insns, |i| compiled(i, Host::COMPLETE))
}

/// Host code, one instruction a line.
fn listing(code: &[u8]) -> Vec<String> {
    let mut formatter = IntelFormatter::new();
    let mut text = Vec::new();
    for i in &mut Decoder::new(64, code, DecoderOptions::NONE) {
        let mut line = String::new();
        assert!(!i.is_invalid(), "{code:x?}");
        formatter.format(&i, &mut line);
        text.push(line);
    }
    text
}

/// The instructions of a run's piece, by their mnemonics.
fn mnemonics(code: &[u8]) -> String {
    let lines = listing(&piece::assemble(&run(code)).unwrap());
    lines.iter().map(|l| l.split(' ').next().unwrap()).collect::<Vec<_>>().join(" ")
}

const FLD1: &[u8] = &[0xd9, 0xe8];
const FADDP: &[u8] = &[0xde, 0xc1];
const FXCH: &[u8] = &[0xd9, 0xc9];
const FCOMIP: &[u8] = &[0xdf, 0xf1];
const FNSTSW_AX: &[u8] = &[0xdf, 0xe0];
const FSTP_ST0: &[u8] = &[0xdd, 0xd8];
const FNCLEX: &[u8] = &[0xdb, 0xe2];
const FLD_M64: &[u8] = &[0xdd, 0x03];
const FSTP_M64: &[u8] = &[0xdd, 0x1b];
const FISTP_M64: &[u8] = &[0xdf, 0x3b];

#[test]
fn what_a_run_needs_and_leaves() {
    // Instructions of the run, places that must be full, that must be empty, that are full behind it, TOP.
    type Found = (usize, u8, u8, u8, u8);
    let cases: [(&[&[u8]], Found); 8] = [
        (&[FLD1, FADDP], (2, 0b1, 0b1000_0000, 0b1, 0)),
        (&[FADDP], (1, 0b11, 0, 0b10, 1)),
        (&[FXCH, FADDP, FADDP], (3, 0b111, 0, 0b100, 2)),
        (&[FLD1, FNCLEX], (1, 0, 0b1000_0000, 0b1000_0000, 7)),
        // What follows would overflow, and underflow, for certain.
        (&[FADDP, FADDP, FADDP, FADDP, FADDP, FADDP, FADDP, FADDP, FADDP], (7, 0xff, 0, 0x80, 7)),
        (&[FXCH, FLD1, FLD1, FLD1, FLD1, FLD1, FLD1, FLD1], (7, 0b11, 0b1111_1100, 0xff, 2)),
        // The status word is of what went before.
        (&[FLD1, FNSTSW_AX, FLD1], (2, 0, 0b1000_0000, 0b1000_0000, 7)),
        (&[FSTP_ST0, FLD1], (2, 0b1, 0, 0b1, 0)),
    ];
    for (code, expected) in cases {
        let run = run(&code.concat());
        let found = (run.steps.len(), run.full, run.empty, run.left, run.moved);
        assert_eq!(found, expected, "{code:x?}");
    }
}

#[test]
fn what_popped_registers_hold_is_stored() {
    // What was only read need not be; what the run has put there must be, even if nothing can compute with it.
    assert_eq!(mnemonics(FADDP), "push lea and fld fld faddp fnstsw lea and fstp pop ret");
    assert_eq!(mnemonics(&[FLD1, FADDP].concat()), "push fld fld1 fadd fnstsw lea and fstp fstp pop ret");
    // There is no FIST of 64 bits.
    assert_eq!(mnemonics(&[FLD1, FISTP_M64].concat()), "push fld1 fld lea and fstp fistp fnstsw pop ret");
    // The second constant is in the first one's place.
    let two = [FLD1, FSTP_M64, FLD1].concat();
    assert_eq!(mnemonics(&two), "push fld1 fstp fld1 fnstsw lea and fstp pop ret");
}

#[test]
fn operands_are_arguments() {
    let run = run(&[FLD_M64, &[0xdc, 0x03], &[0xdc, 0x4b, 0x08], FSTP_M64].concat());
    assert_eq!(run.arguments.len(), 3);
    let text = listing(&piece::assemble(&run).unwrap()).join("\n");
    for line in
        ["fld st,qword ptr [rdx]", "fadd st,qword ptr [rdx]", "fmul st,qword ptr [rcx]", "fst qword ptr [r8],st"]
    {
        assert!(text.contains(line), "{line} in\n{text}");
    }
}

#[test]
fn c1_survives_a_comparison() {
    assert!(piece::has_late_status(&run(FCOMIP)));
    assert!(piece::has_late_status(&run(&[FADDP, FCOMIP].concat())));
    assert!(!piece::has_late_status(&run(&[FCOMIP, FADDP].concat())));
}
