//! Which instructions make a run, what it takes for granted, and that its host code is what it should be.

use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

use super::run::Run;
use super::{compiled, piece};
use crate::decode::decode;
use crate::jit::Jit;
use crate::jit::host::{Host, Unit};
use crate::state::CpuState;
use crate::testing::Guest;
use crate::testing::bare::{self, CODE, DATA};
use crate::vcpu::Vcpu;
use crate::x87::X87;

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

#[derive(Clone, Copy, PartialEq)]
enum Engine {
    Interpreter,
    Compiler,
    LockStep,
}

/// Runs rounds of a loop around `body` in two parts, each from a state of the unit and with RBX as given; the state
/// behind it, and how many instructions helpers have evaluated in the second part, when everything is compiled.
fn rounds(body: &[u8], x87: &X87, rbx: u64, engine: Engine) -> (CpuState, u64) {
    // body; dec ecx; jnz body; out 80h, al
    let back = -(body.len() as i8) - 4;
    let code = [body, &[0xff, 0xc9, 0x75, back as u8, 0xe6, 0x80]].concat();
    let jit = (engine != Engine::Interpreter).then(|| Jit::new(1 << 20, 1).unwrap());
    let mut vcpu = Vcpu::new(bare::cpu(&code), jit);
    vcpu.set_threshold(20);
    if engine == Engine::LockStep {
        vcpu.enable_lockstep();
    }
    let mut calls = 0;
    for _ in 0..2 {
        vcpu.cpu.s.rip = CODE;
        vcpu.cpu.s.x87 = *x87;
        // A denormal that is zero.
        (vcpu.cpu.s.ymm[0][0], vcpu.cpu.s.mxcsr) = (1, 0x1fc0);
        (vcpu.cpu.s.gpr[1], vcpu.cpu.s.gpr[3]) = (300, rbx);
        calls = vcpu.cpu.jit.helper_calls;
        while vcpu.turn().is_none() {
            vcpu.jit.as_ref().inspect(|j| j.drain());
        }
    }
    assert_eq!(vcpu.difference, None, "{body:x?} {x87:x?} {rbx:x}");
    vcpu.cpu.fold_flags();
    (vcpu.cpu.s.clone(), vcpu.cpu.jit.helper_calls - calls)
}

#[test]
fn the_whole_state_is_the_interpreter_s() {
    let store: &[u8] = &[0xdb, 0x7b, 0x20];
    let bodies = [
        [FLD1, FADDP, FXCH].concat(),
        // fld qword; fadd st, st(1); fstp tbyte [rbx+32]
        [FLD_M64, &[0xd8, 0xc1], store].concat(),
        // fcomi; fcmovb st, st(1); fnstsw ax
        [&[0xdb, 0xf1, 0xda, 0xc1][..], FNSTSW_AX].concat(),
        // fnstcw [rbx]; fldcw [rbx]; fld1; fchs; fistp qword [rbx+8]; fldcw [rbx]; fnstsw [rbx+16]
        [&[0xd9, 0x3b, 0xd9, 0x2b], FLD1, &[0xd9, 0xe0, 0xdf, 0x7b, 0x08, 0xd9, 0x2b, 0xdd, 0x7b, 0x10]].concat(),
        // What is stored is loaded: fld1; fstp qword [rbx]; fild word [rbx+6]; fadd st(1), st; fstp st
        [FLD1, FSTP_M64, &[0xdf, 0x43, 0x06, 0xdc, 0xc1], FSTP_ST0].concat(),
        // A comparison's flags outlive a helper: ucomisd xmm0, [rbx+64]; fiadd dword [rbx]; jne +2; inc edx
        vec![0x66, 0x0f, 0x2e, 0x43, 0x40, 0xda, 0x03, 0x75, 0x02, 0xff, 0xc2],
    ];
    let mut units = Vec::new();
    for fcw in [0x37f, 0x27f, 0x07f, 0xf7f, 0xb7f, 0x77f] {
        let unit = X87 { fcw, ..X87::initialized() };
        units.push(X87 { fsw: 0x3800, ftw: 0b1000_0111, ..unit });
        units.push(X87 { fsw: 0x0a20, ftw: 0b0000_0110, ..unit });
    }
    let masked = units.len();
    units.push(X87::initialized());
    for fcw in [0x35f, 0x37e] {
        units.push(X87 { fcw, ftw: 0b11, ..X87::initialized() });
    }
    for body in &bodies {
        for (n, unit) in units.iter().enumerate() {
            // The second and the third lie across two pages.
            for rbx in [DATA, DATA + 0xffd, DATA + 0xfda] {
                let (interpreted, _) = rounds(body, unit, rbx, Engine::Interpreter);
                let (compiled, calls) = rounds(body, unit, rbx, Engine::Compiler);
                assert_eq!(interpreted, compiled, "{body:x?} {unit:x?} {rbx:x}");
                rounds(body, unit, rbx, Engine::LockStep);
                if n < masked && rbx == DATA {
                    assert!(calls < 100 || Host::this().unit != Unit::Exact, "{calls} calls, {body:x?} {unit:x?}");
                }
            }
        }
    }
}
