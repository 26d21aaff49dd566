//! Random programs as data: instructions that may follow one another, branches over some of them, and a bounded loop
//! around them all. What the assembler adds by itself is derived from the rest, so that any of it can be taken away.

use std::ops::Range;

use iced_x86::{Decoder, DecoderOptions, Instruction};

use super::{DATA, INSN};

/// An instruction that may stand anywhere in a program, or several.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    /// 32 or 64.
    pub bits: u32,
    pub code: Vec<u8>,
    /// Flags that it reads, leaves undefined, and gives a value.
    pub reads: u64,
    pub undefines: u64,
    pub defines: u64,
    /// Whether it moves the stack pointer.
    pub stack: bool,
    /// What RSI is to its memory operand.
    pub rsi: Option<Rsi>,
    /// Where the displacement from the instruction pointer stands in the code, if there is one.
    pub rip: Option<usize>,
}

/// RSI as part of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rsi {
    Base,
    Index,
}

/// One after the other.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Part(Part),
    /// A forward branch under a condition (0–15, or [`BRANCHES`]) over some parts.
    Branch(u8, Vec<Part>),
    /// A call of some parts, and the return from them; whether the call is through a register.
    Call(bool, Vec<Part>),
}

/// Opcodes of the branches by numbers from 16: JRCXZ, JMP, LOOP, LOOPE, LOOPNE.
pub(crate) const BRANCHES: [u8; 5] = [0xe3, 0xeb, 0xe2, 0xe1, 0xe0];
/// Where displacements from the instruction pointer lead.
const RIP_TARGET: u64 = DATA + 0x80;

impl Step {
    /// The same with other parts, unless it is one.
    pub(crate) fn with(&self, parts: Vec<Part>) -> Step {
        match self {
            Step::Part(p) => Step::Part(p.clone()),
            Step::Branch(condition, _) => Step::Branch(*condition, parts),
            Step::Call(indirect, _) => Step::Call(*indirect, parts),
        }
    }

    /// Its parts.
    pub(crate) fn parts(&self) -> &[Part] {
        match self {
            Step::Part(p) => std::slice::from_ref(p),
            Step::Branch(_, over) | Step::Call(_, over) => over,
        }
    }
}

/// A program of 32- or 64-bit code.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    pub bits: u32,
    /// How often the steps run, if there is a loop around them.
    pub rounds: Option<u8>,
    /// What RSI is in all addresses that have it.
    pub rsi: Rsi,
    pub steps: Vec<Step>,
}

/// A program's bytes.
pub(crate) struct Assembled {
    bits: u32,
    /// Addresses of what no branch passes over.
    pub sure: Vec<Range<u64>>,
    pub code: Vec<u8>,
    /// Flags that have no value at the end, and those that have none at some point before.
    pub undefined: u64,
    pub ever_undefined: u64,
}

impl Program {
    pub(crate) fn assemble(&self) -> Assembled {
        let mut a = Assembled::new(self.bits, Vec::new());
        if let Some(rounds) = self.rounds {
            // mov r15d, rounds; or ebp.
            let mov: &[u8] = if self.bits == 64 { &[0x41, 0xbf] } else { &[0xbd] };
            a.code.extend(mov);
            a.code.extend([rounds, 0, 0, 0]);
        }
        let head = a.code.len();
        for step in &self.steps {
            match step {
                Step::Part(p) => {
                    let start = INSN + a.code.len() as u64;
                    a.part(p);
                    a.sure.push(start..INSN + a.code.len() as u64);
                }
                Step::Branch(condition, over) => {
                    // The parts see defined flags and leave such, as nobody knows which way was taken.
                    a.define();
                    let opcode = match condition.checked_sub(16) {
                        Some(n) => BRANCHES[usize::from(n)],
                        None => 0x70 | condition,
                    };
                    a.code.extend([opcode, 0]);
                    let start = a.code.len();
                    over.iter().for_each(|p| a.part(p));
                    a.define();
                    a.code[start - 1] = (a.code.len() - start) as u8;
                }
                Step::Call(indirect, parts) => {
                    if *indirect {
                        // mov eax, the target; call rax.
                        let target = INSN + a.code.len() as u64 + 9;
                        a.code.push(0xb8);
                        a.code.extend((target as u32).to_le_bytes());
                        a.code.extend([0xff, 0xd0]);
                    } else {
                        a.code.extend([0xe8, 2, 0, 0, 0]);
                    }
                    a.code.extend([0xeb, 0]);
                    let start = a.code.len();
                    parts.iter().for_each(|p| a.part(p));
                    a.code.push(0xc3);
                    a.code[start - 1] = (a.code.len() - start) as u8;
                }
            }
        }
        if self.rounds.is_some() {
            // What follows the loop sees the flags of DEC, and of whatever came before it.
            a.define();
            // dec r15d, or ebp.
            let dec: &[u8] = if self.bits == 64 { &[0x41, 0xff, 0xcf] } else { &[0x4d] };
            a.code.extend(dec);
            let back = head as i64 - (a.code.len() as i64 + 6);
            a.code.extend([0x0f, 0x85]); // jnz head
            a.code.extend((back as i32).to_le_bytes());
        }
        a
    }
}

impl Assembled {
    pub(crate) fn new(bits: u32, code: Vec<u8>) -> Assembled {
        Assembled { bits, sure: Vec::new(), code, undefined: 0, ever_undefined: 0 }
    }

    /// Gives every flag a value, if one has none.
    fn define(&mut self) {
        if self.undefined != 0 {
            // cmp rdx, rcx, or edx, ecx.
            let cmp: &[u8] = if self.bits == 64 { &[0x48, 0x39, 0xca] } else { &[0x39, 0xca] };
            self.code.extend(cmp);
            self.undefined = 0;
        }
    }

    fn part(&mut self, p: &Part) {
        if p.reads & self.undefined != 0 {
            self.define();
        }
        let start = self.code.len();
        self.code.extend(&p.code);
        if let Some(at) = p.rip {
            let displacement = RIP_TARGET.wrapping_sub(INSN + self.code.len() as u64) as u32;
            self.code[start + at..start + at + 4].copy_from_slice(&displacement.to_le_bytes());
        }
        self.undefined = self.undefined & !p.defines | p.undefines;
        self.ever_undefined |= self.undefined;
    }

    /// Every instruction, with its bytes.
    pub(crate) fn instructions(&self) -> impl Iterator<Item = (Instruction, &[u8])> {
        let mut decoder = Decoder::with_ip(self.bits, &self.code, INSN, DecoderOptions::NONE);
        std::iter::from_fn(move || {
            let start = decoder.position();
            let i = decoder.can_decode().then(|| decoder.decode())?;
            Some((i, &self.code[start..decoder.position()]))
        })
    }

    /// As assembly, an instruction a line.
    pub(crate) fn listing(&self) -> String {
        self.instructions().map(|(i, bytes)| format!("  {:#x} {i} {bytes:02x?}\n", i.ip())).collect()
    }
}
