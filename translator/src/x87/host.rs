//! The arithmetic engine of an x86-64 host: its own x87 unit, transcendentals and all.

use std::arch::asm;

use super::F80;
use super::engine::{Engine, Operation, Outcome};

/// The host's x87 unit.
pub struct Host;

/// Loads the operands into an initialized unit, runs the instruction under the guest's control word, and reads status
/// and the two top registers back. FNSTSW and FNCLEX do not wait, so an exception the guest has unmasked never becomes
/// a signal here.
macro_rules! on_host {
    ($insn:literal, $a:expr, $b:expr, $cw:expr) => {{
        let mut top = F80::ZERO;
        let mut next = F80::ZERO;
        let mut saved = 0u16;
        let status: u16;
        // SAFETY: the pointers are to live locals of ten bytes or more (the operands and results) or two (the control
        // words). Whatever the instruction does to the stack, FNINIT leaves it empty and the host's control word is
        // put back; all x87 registers are declared clobbered.
        unsafe {
            asm!(
                "fnstcw word ptr [{saved}]",
                "fninit",
                "fld tbyte ptr [{b}]",
                "fld tbyte ptr [{a}]",
                "fldcw word ptr [{cw}]",
                $insn,
                "fnstsw ax",
                "fnclex",
                "fldcw word ptr [{masked}]",
                "fstp tbyte ptr [{top}]",
                "fstp tbyte ptr [{next}]",
                "fninit",
                "fldcw word ptr [{saved}]",
                saved = in(reg) &mut saved,
                a = in(reg) &$a,
                b = in(reg) &$b,
                cw = in(reg) &$cw,
                masked = in(reg) &0x37fu16,
                top = in(reg) &mut top,
                next = in(reg) &mut next,
                out("ax") status,
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                options(nostack),
            );
        }
        (top, next, status)
    }};
}

impl Engine for Host {
    fn run(operation: Operation, a: F80, b: F80, cw: u16) -> Outcome {
        let (top, next, status) = match operation {
            Operation::Add => on_host!("fadd st(0), st(1)", a, b, cw),
            Operation::Mul => on_host!("fmul st(0), st(1)", a, b, cw),
            Operation::Sub => on_host!("fsub st(0), st(1)", a, b, cw),
            Operation::SubR => on_host!("fsubr st(0), st(1)", a, b, cw),
            Operation::Div => on_host!("fdiv st(0), st(1)", a, b, cw),
            Operation::DivR => on_host!("fdivr st(0), st(1)", a, b, cw),
            Operation::Sqrt => on_host!("fsqrt", a, b, cw),
            Operation::RoundInt => on_host!("frndint", a, b, cw),
            Operation::Scale => on_host!("fscale", a, b, cw),
            Operation::Prem => on_host!("fprem", a, b, cw),
            Operation::Prem1 => on_host!("fprem1", a, b, cw),
            Operation::Xtract => on_host!("fxtract", a, b, cw),
            Operation::F2xm1 => on_host!("f2xm1", a, b, cw),
            Operation::Yl2x => on_host!("fyl2x", a, b, cw),
            Operation::Yl2xp1 => on_host!("fyl2xp1", a, b, cw),
            Operation::Ptan => on_host!("fptan", a, b, cw),
            Operation::Patan => on_host!("fpatan", a, b, cw),
            Operation::Sin => on_host!("fsin", a, b, cw),
            Operation::Cos => on_host!("fcos", a, b, cw),
            Operation::SinCos => on_host!("fsincos", a, b, cw),
        };
        // The three that push leave the pushed result on top; that they did shows in TOP.
        let pushed = status >> 11 & 7 == 5;
        let (value, second) = if pushed { (next, top) } else { (top, top) };
        Outcome { value, second, status: status & super::status::RESULT }
    }
}
