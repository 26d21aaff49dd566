//! Quick code: what blocks run as between being interpreted and being part of a region.
//!
//! A block that has run some times is turned into host code in one pass, on the vCPU's own thread. The code is small rather than fast: what it has to do about memory is done by
//! [routines](Routine) that all of it shares, so that a program of which much is run but little often finds room in the
//! host's caches. It counts down how often it is entered from elsewhere and
//! goes back or to other pages; what that leads to gets a region in the end.
//!
//! There is quick code on x86-64 hosts. Elsewhere blocks are interpreted until they get a region.

pub mod asm;
mod emit;
mod values;
mod vector;

use std::mem::offset_of;

use crate::code::HostIsa;
use crate::insn::{Insn, Mode};
use crate::jit::compile::Compiled;
use crate::jit::emit::{Helper, at};
use crate::jit::frame::reason;
use crate::mmu::tlb::{TlbEntry, Translations};
use asm::{Alu, Asm, Cc, Gpr, Mem, Shift};

/// Emits quick code for an instruction.
pub type QuickHandler = fn(&mut Emitter<'_>, &Insn) -> Result<(), crate::jit::Unsupported>;
pub use emit::QuickEmit as Emitter;

/// Code that all quick code shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routine {
    /// Returns to the dispatch loop for it to interpret the instruction at RIP.
    Interpret,
    /// Finds the host address, in RAX, of 1 << `log2` bytes at the linear address in RSI that are to be read or written;
    /// sets ZF if the interpreter has to do it. Changes RCX and RDX.
    Find {
        /// log2 of the number of bytes, from 0 to 5.
        log2: u8,
        /// Whether they will be written.
        write: bool,
    },
}

/// Widths of accesses.
const WIDTHS: usize = 6;
/// How many routines there are.
pub const ROUTINES: usize = 1 + 2 * WIDTHS;

impl Routine {
    /// All of them, by number.
    pub fn all() -> impl Iterator<Item = Routine> {
        let find = |write| (0..WIDTHS as u8).map(move |log2| Routine::Find { log2, write });
        std::iter::once(Routine::Interpret).chain(find(false)).chain(find(true))
    }

    /// The one for an access of so many bytes.
    fn access(bytes: u64, write: bool) -> Routine {
        Routine::Find { log2: bytes.trailing_zeros() as u8, write }
    }

    fn number(self) -> usize {
        match self {
            Routine::Interpret => 0,
            Routine::Find { log2, write } => 1 + usize::from(log2) + if write { WIDTHS } else { 0 },
        }
    }

    /// Its code, which finds helpers by [`crate::jit::frame::JitFrame`].
    pub fn code(self) -> Vec<u8> {
        let mut a = Asm::default();
        match self {
            Routine::Interpret => {
                a.store_imm(8, emit::cpu(at!(jit.exit_reason)), reason::INTERPRET as i32);
                a.pop(Gpr::RBP);
            }
            Routine::Find { log2, write } => find(&mut a, 1 << log2, write),
        }
        a.ret();
        a.code
    }
}

/// By the soft TLB, whose entry is that of the first byte if the last one lies in the same page; else by helper.
fn find(a: &mut Asm, bytes: i32, write: bool) {
    let (table, found, last, linear) = (Gpr::RCX, Gpr::RAX, Gpr::RDX, Gpr::RSI);
    let shift = size_of::<TlbEntry>().trailing_zeros() as u8;
    let tag = if write { offset_of!(TlbEntry, write) } else { offset_of!(TlbEntry, read) };
    let entry = |field: usize| Mem::indexed(table, found, (offset_of!(Translations, entries) + field) as i32);
    a.load(8, table, emit::cpu(at!(jit.tlb)));
    a.mov(8, found, linear);
    a.shift_imm(8, Shift::Shr, found, 12 - shift);
    a.alu(8, Alu::And, found, Mem::at(table, offset_of!(Translations, mask) as i32));
    a.lea(8, last, Mem::at(linear, bytes - 1));
    a.alu_imm(8, Alu::And, last, -4096);
    a.alu(8, Alu::Cmp, last, entry(tag));
    let miss = a.jcc(Cc::NE);
    a.load(8, found, entry(offset_of!(TlbEntry, addend)));
    // No guest memory is at the host's address 0.
    a.alu(8, Alu::Add, found, linear);
    a.ret();
    a.here(miss);
    a.mov_imm(Gpr::RDX, bytes as u64);
    // For the stack's alignment.
    a.push(Gpr::RDI);
    a.call(emit::thunk(if write { Helper::Modify } else { Helper::Load }));
    a.pop(Gpr::RDI);
    a.load(8, found, emit::cpu(at!(jit.slow_result)));
    a.test(8, found, found);
}

/// What makes quick code.
#[derive(Clone, Copy, Debug)]
pub struct Quick {
    /// Whether the host counts bits by LZCNT, TZCNT and POPCNT.
    counts_bits: bool,
}

impl Quick {
    /// For this host, if it is of a kind that there is quick code for.
    pub fn new(isa: HostIsa) -> Option<Quick> {
        let features = crate::jit::host::features();
        let counts_bits = ["has_lzcnt", "has_bmi1", "has_popcnt"].iter().all(|f| features.contains(f));
        (isa == HostIsa::X86_64).then_some(Quick { counts_bits })
    }

    /// The code of a block of instructions that lie in one page, from page offset `start`; `countdown` is the number
    /// of its countdown, `counted` whether it shall count the instructions it completes. Offsets of the instructions that
    /// helpers evaluate are from the start of the block.
    pub fn compile(&self, insns: &[Insn], mode: Mode, start: u64, countdown: u32, counted: bool) -> Compiled {
        Emitter::new(self, mode, start, counted, countdown).emit(insns)
    }

    /// `extern "C" fn(cpu, code)`: calls compiled code. Regions preserve the registers that C functions do; quick code
    /// does not.
    pub fn trampoline(&self) -> Vec<u8> {
        let saved = [Gpr::RBX, Gpr(12), Gpr(13), Gpr(14), Gpr(15)];
        let mut a = Asm::default();
        saved.iter().for_each(|&r| a.push(r));
        a.call_reg(Gpr::RSI);
        saved.iter().rev().for_each(|&r| a.pop(r));
        a.ret();
        a.code
    }

    fn routine(&self, routine: Routine) -> Mem {
        emit::cpu(at!(jit.quick) + 8 * routine.number() as i32)
    }
}
