//! Random programs as data: instructions that may follow one another, branches over some of them, and a bounded loop
//! around them all. What the assembler adds by itself is derived from the rest, so that any of it can be taken away.

use iced_x86::{Decoder, DecoderOptions, Instruction};

use super::INSN;

/// An instruction that may stand anywhere in a program.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub code: Vec<u8>,
    /// Flags that it reads, leaves undefined, and gives a value.
    pub reads: u64,
    pub undefines: u64,
    pub defines: u64,
    /// Whether it moves the stack pointer.
    pub stack: bool,
    /// What RSI is to its memory operand.
    pub rsi: Option<Rsi>,
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
    /// A forward branch under a condition (0–15) over some parts.
    Branch(u8, Vec<Part>),
}

impl Step {
    /// Its parts.
    pub(crate) fn parts(&self) -> &[Part] {
        match self {
            Step::Part(p) => std::slice::from_ref(p),
            Step::Branch(_, over) => over,
        }
    }
}

/// A program of 64-bit code.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    /// How often the steps run, if there is a loop around them.
    pub rounds: Option<u8>,
    /// What RSI is in all addresses that have it.
    pub rsi: Rsi,
    pub steps: Vec<Step>,
}

/// A program's bytes.
#[derive(Default)]
pub(crate) struct Assembled {
    pub code: Vec<u8>,
    /// Flags that have no value at the end, and those that have none at some point before.
    pub undefined: u64,
    pub ever_undefined: u64,
}

impl Program {
    pub(crate) fn assemble(&self) -> Assembled {
        let mut a = Assembled::default();
        if let Some(rounds) = self.rounds {
            a.code.extend([0x41, 0xbf, rounds, 0, 0, 0]); // mov r15d, rounds
        }
        let head = a.code.len();
        for step in &self.steps {
            match step {
                Step::Part(p) => a.part(p),
                Step::Branch(condition, over) => {
                    // The parts see defined flags and leave such, as nobody knows which way was taken.
                    a.define();
                    a.code.extend([0x70 | condition, 0]);
                    let start = a.code.len();
                    over.iter().for_each(|p| a.part(p));
                    a.define();
                    a.code[start - 1] = (a.code.len() - start) as u8;
                }
            }
        }
        if self.rounds.is_some() {
            // What follows the loop sees the flags of DEC, and of whatever came before it.
            a.define();
            a.code.extend([0x41, 0xff, 0xcf]); // dec r15d
            let back = head as i64 - (a.code.len() as i64 + 6);
            a.code.extend([0x0f, 0x85]); // jnz head
            a.code.extend((back as i32).to_le_bytes());
        }
        a
    }
}

impl Assembled {
    /// Gives every flag a value, if one has none.
    fn define(&mut self) {
        if self.undefined != 0 {
            self.code.extend([0x48, 0x39, 0xca]); // cmp rdx, rcx
            self.undefined = 0;
        }
    }

    fn part(&mut self, p: &Part) {
        if p.reads & self.undefined != 0 {
            self.define();
        }
        self.code.extend(&p.code);
        self.undefined = self.undefined & !p.defines | p.undefines;
        self.ever_undefined |= self.undefined;
    }

    /// Every instruction, with its bytes.
    pub(crate) fn instructions(&self) -> impl Iterator<Item = (Instruction, &[u8])> {
        let mut decoder = Decoder::with_ip(64, &self.code, INSN, DecoderOptions::NONE);
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
