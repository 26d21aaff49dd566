//! Runs: consecutive x87 instructions that become one piece of host code, and what must hold where one begins.
//!
//! A register is named by its *place*, its distance from TOP at the run's start modulo 8, so that a run means the same
//! for every TOP.

use crate::emit::Cond;
use crate::insn::Insn;
use crate::x87::{Arith, Format, Memory, Op, Operation};

/// The most instructions in a run.
const MAX_STEPS: usize = 32;
/// The most words that a piece is given.
pub const MAX_ARGUMENTS: usize = 4;

/// A set of places, or of registers counted from ST(0), one bit each.
pub type Places = u8;

/// What a piece is given in a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Argument {
    /// The address of a memory operand.
    Operand(Operand),
    /// Whether a condition holds.
    Condition(Cond),
}

/// A memory operand. Two that are the same have the same address.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    /// Index of the run's first instruction that has it.
    pub step: usize,
    /// Its bytes.
    pub bytes: u8,
    /// Whether it is written.
    pub store: bool,
    address: Address,
}

/// What the address of an operand is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Address {
    seg: u8,
    base: u8,
    index: u8,
    scale: u8,
    bytes: u8,
    /// What the displacement counts from, if that is the next instruction.
    next: Option<u64>,
    disp: i64,
}

impl Operand {
    fn new(step: usize, i: &Insn, bytes: u8, store: bool) -> Operand {
        let Insn { seg, base, index, scale, addr_bytes, disp, .. } = *i;
        let next = i.rip_relative.then(|| i.next_off());
        Operand { step, bytes, store, address: Address { seg, base, index, scale, bytes: addr_bytes, next, disp } }
    }
}

impl PartialEq for Operand {
    fn eq(&self, other: &Operand) -> bool {
        (self.bytes, self.store, self.address) == (other.bytes, other.store, other.address)
    }
}

impl Eq for Operand {}

/// One instruction of a run.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// What it does.
    pub op: Op,
    /// Its opcode ([`Op::decode`]).
    pub opcode: u16,
    /// The place of ST(0) before it.
    pub top: u8,
    /// Index of its argument.
    pub argument: Option<usize>,
}

/// A run.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// Its instructions.
    pub steps: Vec<Step>,
    /// What its piece is given.
    pub arguments: Vec<Argument>,
    /// Places that must hold a number at the start: those that are read.
    pub full: Places,
    /// Places that must be empty at the start: those that are pushed to.
    pub empty: Places,
    /// Places that are written and not read before; whether they are empty does not matter.
    pub replaced: Places,
    /// Places that are not empty at the end, of those that the run touches.
    pub left: Places,
    /// How far TOP moves up, modulo 8.
    pub moved: u8,
}

/// What an instruction does to the stack, in registers as it finds them.
#[derive(Clone, Copy, Default)]
struct Effect {
    reads: Places,
    writes: Places,
    pops: u8,
    push: bool,
}

/// The effect of an instruction that runs can have.
fn effect(op: Op) -> Option<Effect> {
    let reads = |reads| Effect { reads, ..Effect::default() };
    let changes = |reads, writes| Effect { reads, writes, ..Effect::default() };
    let both = |i: u8| 1 | 1 << i;
    Some(match op {
        Op::ArithMemory(Arith::Com, _) | Op::Test | Op::Examine => reads(1),
        Op::ArithMemory(Arith::Comp, _) => Effect { pops: 1, ..reads(1) },
        Op::ArithMemory(..) | Op::ChangeSign | Op::Abs => changes(1, 1),
        Op::Load(_) | Op::Constant(_) => Effect { push: true, ..Effect::default() },
        Op::Store { pop, .. } => Effect { pops: pop.into(), ..reads(1) },
        // The result is popped with its register.
        Op::Arith { i: 0, pop: true, .. } => return None,
        Op::Arith { i, to_i, pop, .. } => {
            Effect { pops: pop.into(), ..changes(both(i), if to_i { 1 << i } else { 1 }) }
        }
        Op::Compare { i, pops, .. } => Effect { pops, ..reads(both(i)) },
        Op::CompareFlags { i, pop, .. } => Effect { pops: pop.into(), ..reads(both(i)) },
        Op::LoadRegister(i) => Effect { push: true, ..reads(1 << i) },
        Op::StoreRegister { i, pop } => Effect { pops: pop.into(), ..changes(1, 1 << i) },
        Op::Exchange(i) => changes(both(i), both(i)),
        Op::Move { i, .. } => changes(both(i), 1),
        Op::Replace(Operation::Scale | Operation::Prem | Operation::Prem1) => changes(3, 1),
        Op::Replace(_) => changes(1, 1),
        Op::Fold(_) => Effect { pops: 1, ..changes(3, 2) },
        // The others of its kind may leave the operand and push nothing.
        Op::Split(Operation::Xtract) => Effect { push: true, ..changes(1, 1) },
        Op::LoadControl | Op::StoreControl | Op::StoreStatus | Op::StatusToAx | Op::Nop | Op::LegacyNop => {
            Effect::default()
        }
        _ => return None,
    })
}

/// Whether an instruction can be in a run.
pub fn fits(op: Op) -> bool {
    effect(op).is_some()
}

/// Whether an instruction gives C1 a value though nothing is wrong with the stack.
pub fn sets_c1(op: Op) -> bool {
    !matches!(op, Op::CompareFlags { .. } | Op::Move { .. }) && computes(op)
}

/// Whether an instruction is one of the unit's own, rather than of its control registers.
pub fn computes(op: Op) -> bool {
    !op.is_control() && op != Op::Nop
}

/// The condition under which FCMOVcc moves.
pub fn condition(condition: u8, not: bool) -> Cond {
    use Cond::*;
    let (yes, no) = [(B, Ae), (E, Ne), (Be, A), (P, Np)][usize::from(condition & 3)];
    if not { no } else { yes }
}

impl Run {
    /// The run that instructions begin with: of `op` of each, up to the first that cannot be part of it.
    pub fn of(insns: &[Insn], op: impl Fn(&Insn) -> Option<Op>) -> Run {
        let mut run = Run::default();
        for (n, i) in insns.iter().enumerate().take(MAX_STEPS) {
            let mut longer = run.clone();
            if op(i).and_then(|op| longer.add(n, i, op)).is_none() {
                break;
            }
            run = longer;
            if run.is_over() {
                break;
            }
        }
        run
    }

    /// Whether nothing can follow: the status word is read where the run has left it.
    fn is_over(&self) -> bool {
        self.steps.last().is_some_and(|s| matches!(s.op, Op::StoreStatus | Op::StatusToAx))
    }

    /// Whether flags of the CPU are set.
    pub fn sets_flags(&self) -> bool {
        self.steps.iter().any(|s| matches!(s.op, Op::CompareFlags { .. }))
    }

    /// Adds an instruction; the run is of no use if it cannot be.
    fn add(&mut self, n: usize, i: &Insn, op: Op) -> Option<()> {
        let Effect { reads, writes, pops, push } = effect(op)?;
        if op == Op::LoadControl && n != 0 || matches!(op, Op::Move { .. }) && self.sets_flags() {
            return None;
        }
        let top = self.moved;
        for r in 0..8 {
            if reads >> r & 1 != 0 {
                self.read(top + r)?;
            }
            if writes >> r & 1 != 0 {
                self.write(top + r)?;
            }
        }
        for n in 0..pops {
            self.left &= !(1 << (top + n & 7));
        }
        self.moved = top + pops & 7;
        if push {
            self.moved = top.wrapping_sub(1) & 7;
            self.push(self.moved)?;
        }
        let argument = match (op.memory(), op) {
            (Memory::Read(bytes), _) => Some(Argument::Operand(Operand::new(n, i, bytes, false))),
            (Memory::Write(bytes), _) => Some(Argument::Operand(Operand::new(n, i, bytes, true))),
            (_, Op::Move { condition: c, not, .. }) => Some(Argument::Condition(condition(c, not))),
            _ => None,
        };
        let argument = match argument {
            Some(argument) => Some(self.argument(argument)?),
            None => None,
        };
        self.steps.push(Step { op, opcode: i.aux & 0x7ff, top, argument });
        Some(())
    }

    fn argument(&mut self, argument: Argument) -> Option<usize> {
        let index = self.arguments.iter().position(|&a| a == argument).unwrap_or(self.arguments.len());
        if index == MAX_ARGUMENTS {
            return None;
        }
        if index == self.arguments.len() {
            self.arguments.push(argument);
        }
        Some(index)
    }

    /// The places that the run has touched.
    fn touched(&self) -> Places {
        self.full | self.empty | self.replaced
    }

    fn read(&mut self, place: u8) -> Option<()> {
        let bit = 1 << (place & 7);
        if self.touched() & bit == 0 {
            self.full |= bit;
            self.left |= bit;
        }
        // What is popped already underflows.
        (self.left & bit != 0).then_some(())
    }

    fn write(&mut self, place: u8) -> Option<()> {
        let bit = 1 << (place & 7);
        if self.touched() & bit == 0 {
            self.replaced |= bit;
            self.left |= bit;
        }
        (self.left & bit != 0).then_some(())
    }

    fn push(&mut self, place: u8) -> Option<()> {
        let bit = 1 << (place & 7);
        if self.touched() & bit == 0 {
            self.empty |= bit;
        } else if self.left & bit != 0 {
            // It overflows.
            return None;
        }
        self.left |= bit;
        Some(())
    }

    /// The place that an instruction pushes to.
    pub fn pushes(&self, step: &Step) -> Option<u8> {
        effect(step.op).filter(|e| e.push).map(|_| step.top.wrapping_sub(1) & 7)
    }

    /// The registers that an instruction writes, counted from ST(0) before it, and how many it pops.
    pub fn writes(&self, step: &Step) -> (Places, u8) {
        effect(step.op).map_or((0, 0), |e| (e.writes, e.pops))
    }

    /// The last instruction that the unit's pointers tell of, and the last of those with a memory operand.
    pub fn last(&self) -> (Option<usize>, Option<usize>) {
        let last = |memory: bool| {
            self.steps.iter().rposition(|s| !s.op.is_control() && (!memory || s.op.memory() != Memory::None))
        };
        (last(false), last(true))
    }
}

/// The opcode that does the same without popping, where there is one.
pub fn without_pop(op: Op, opcode: u16) -> Option<u16> {
    Some(match op {
        Op::Arith { pop: true, .. } => opcode & !0x200,
        Op::ArithMemory(Arith::Comp, _) => opcode & !8,
        Op::Store { format: Format::F32 | Format::F64 | Format::I16 | Format::I32, pop: true, truncate: false } => {
            opcode & !8
        }
        Op::Compare { i, quiet: false, .. } => 0x0d0 | u16::from(i),
        Op::Compare { i, quiet: true, .. } => 0x5e0 | u16::from(i),
        Op::CompareFlags { .. } => opcode & !0x400,
        Op::StoreRegister { i, .. } => 0x5d0 | u16::from(i),
        _ => return None,
    })
}

/// The register beside ST(0) that the opcode names.
pub fn register(op: Op) -> Option<u8> {
    match op {
        Op::Arith { i, .. }
        | Op::Compare { i, .. }
        | Op::CompareFlags { i, .. }
        | Op::LoadRegister(i)
        | Op::StoreRegister { i, .. }
        | Op::Exchange(i)
        | Op::Move { i, .. } => Some(i),
        _ => None,
    }
}
