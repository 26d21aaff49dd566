//! A run as x86-64 host code: the guest's own instructions on the host's unit.
//!
//! A piece is called with the CPU in RDI, the offset of ST(0) in its array of registers in RSI, and its arguments in
//! RDX, RCX, R8 and R9. It preserves every register but flags, and begins and ends with the unit's stack empty. First it
//! loads the guest registers that the run touches, in their order. What a guest register held when it was popped stays in it
//! on a processor, and can be seen; so a pop that leaves a new value there stores it.

use super::run::{Argument, Places, Run, Step, computes, register, sets_c1, without_pop};
use crate::jit::emit::at;
use crate::x87::{F80, Memory, Op};

/// Host registers by their numbers.
const RAX: u8 = 0;
const RSI: u8 = 6;
const RDI: u8 = 7;
/// Those of the arguments.
const ARGUMENTS: [u8; 4] = [2, 1, 8, 9];

/// Opcodes without a memory operand, in the form of [`Op::decode`].
const FLDZ: u16 = 0x1ee;
const FLD_ST0: u16 = 0x1c0;
const FSTP_ST0: u16 = 0x5d8;
const FCMOVNE: u16 = 0x3c8;
/// Opcodes with one.
const FLD_M80: u16 = 0x328;
const FSTP_M80: u16 = 0x338;
const FNSTSW: u16 = 0x538;

const _: () = assert!(size_of::<F80>() == 16, "offsets of registers are multiples of 16");

/// Which comparison's outcome goes where ([`crate::jit::frame::JitFrame::x87_flags`]): the low byte of SETcc's opcode.
const SET_FLAGS: [u8; 3] = [0x92, 0x94, 0x9a];

/// Host code of a run; nothing if it needs none.
pub fn assemble(run: &Run) -> Option<Vec<u8>> {
    let mut piece = Piece { run, code: Vec::new(), stack: Vec::new(), changed: 0, scratch: false };
    piece.load();
    let captures = Captures::of(run);
    for (n, step) in run.steps.iter().enumerate() {
        piece.step(n, step, &captures)?;
    }
    piece.store();
    if piece.code.is_empty() {
        return None;
    }
    Some(if piece.scratch {
        [&[0x50], &piece.code[..], &[0x58, 0xc3]].concat()
    } else {
        [&piece.code[..], &[0xc3]].concat()
    })
}

/// Whether a run leaves a later status word whose C1 is not the guest's ([`crate::jit::frame::JitFrame::x87_late`]).
pub fn has_late_status(run: &Run) -> bool {
    Captures::of(run).late.is_some()
}

/// Behind which instructions the status word is taken: what follows may change it though the guest's does not.
struct Captures {
    /// The last that gives C1 a value.
    c1: Option<usize>,
    /// A later one that may set flags.
    late: Option<usize>,
}

impl Captures {
    fn of(run: &Run) -> Captures {
        let c1 = run.steps.iter().rposition(|s| sets_c1(s.op));
        let late = run.steps.iter().rposition(|s| matches!(s.op, Op::CompareFlags { .. }));
        Captures { c1, late: late.filter(|&n| c1.is_none_or(|c1| n > c1)) }
    }
}

struct Piece<'a> {
    run: &'a Run,
    code: Vec<u8>,
    /// The places that the host's stack holds, ST(0) last.
    stack: Vec<u8>,
    /// The places whose value the CPU state does not have.
    changed: Places,
    /// Whether RAX is used.
    scratch: bool,
}

impl Piece<'_> {
    /// Appends an instruction without a memory operand.
    fn plain(&mut self, opcode: u16) {
        self.code.extend([0xd8 | (opcode >> 8) as u8, opcode as u8]);
    }

    /// Appends an instruction on the memory that an argument leads to.
    fn at_argument(&mut self, opcode: u16, argument: usize) {
        let base = ARGUMENTS[argument];
        if base >= 8 {
            self.code.push(0x41);
        }
        self.plain(opcode & 0x738 | u16::from(base & 7));
    }

    /// Appends an instruction on a field of the CPU.
    fn at_field(&mut self, opcode: u16, offset: i32) {
        self.plain(opcode & 0x738 | 0x80 | u16::from(RDI));
        self.code.extend(offset.to_le_bytes());
    }

    /// Appends an instruction on the guest register at a place.
    fn at_place(&mut self, opcode: u16, place: u8) {
        let index = if place == 0 {
            RSI
        } else {
            self.scratch = true;
            // lea eax, [rsi + 16 * place]; and eax, 0x70
            self.code.extend([0x8d, 0x46, 16 * place, 0x83, 0xe0, 0x70]);
            RAX
        };
        self.plain(opcode & 0x738 | 0x84);
        self.code.push(index << 3 | RDI);
        self.code.extend(at!(s.x87.st).to_le_bytes());
    }

    /// Loads the places that the run touches, ST(0) last.
    fn load(&mut self) {
        for place in (0..8).rev() {
            if self.run.full >> place & 1 != 0 {
                self.at_place(FLD_M80, place);
                self.stack.push(place);
            } else if self.run.replaced >> place & 1 != 0 {
                self.plain(FLDZ);
                self.stack.push(place);
            }
        }
    }

    /// Stores what has changed, and leaves the host's stack empty.
    fn store(&mut self) {
        while !self.stack.is_empty() {
            self.drop_top();
        }
    }

    /// Pops the host's stack; the CPU state has the value then.
    fn drop_top(&mut self) {
        let Some(place) = self.stack.pop() else { return };
        if self.changed >> place & 1 != 0 {
            self.at_place(FSTP_M80, place);
            self.changed &= !(1 << place);
        } else {
            self.plain(FSTP_ST0);
        }
    }

    /// Whether nobody sees what `place` holds now once it is popped: it is pushed to behind step `n`.
    fn is_replaced(&self, n: usize, place: u8) -> bool {
        self.run.steps[n + 1..].iter().any(|s| self.run.pushes(s) == Some(place))
    }

    /// Which host register a place is in.
    fn find(&self, place: u8) -> Option<u8> {
        self.stack.iter().rev().position(|&p| p == place & 7).map(|i| i as u8)
    }

    /// An instruction; the host's opcode for its register.
    fn step(&mut self, n: usize, step: &Step, captures: &Captures) -> Option<()> {
        let (writes, pops) = self.run.writes(step);
        let mut natively = 0;
        if pops == 1 && (self.changed >> step.top & 1 == 0 || self.is_replaced(n, step.top)) {
            natively = 1;
        }
        let shorter = if pops > natively { without_pop(step.op, step.opcode) } else { Some(step.opcode) };
        let opcode = match shorter {
            Some(opcode) => opcode,
            None => {
                // It pops, so what it leaves behind goes first.
                if self.stack.len() == 8 {
                    return None;
                }
                self.plain(FLD_ST0);
                self.at_place(FSTP_M80, step.top);
                natively = pops;
                step.opcode
            }
        };
        self.instruction(step, opcode)?;
        for r in (0..8).filter(|r| writes >> r & 1 != 0) {
            self.changed |= 1 << (step.top + r & 7);
        }
        if captures.c1 == Some(n) {
            self.at_field(FNSTSW, at!(jit.x87_status));
        }
        if captures.late == Some(n) {
            self.at_field(FNSTSW, at!(jit.x87_late));
        }
        for k in 0..pops {
            if k < natively {
                let place = self.stack.pop()?;
                self.changed &= !(1 << place);
            } else if self.is_replaced(n, step.top + k & 7) {
                let place = self.stack.pop()?;
                self.changed &= !(1 << place);
                self.plain(FSTP_ST0);
            } else {
                self.drop_top();
            }
        }
        if let Some(place) = self.run.pushes(step) {
            self.stack.push(place);
            self.changed |= 1 << place;
        }
        Some(())
    }

    fn instruction(&mut self, step: &Step, opcode: u16) -> Option<()> {
        match (step.op, step.argument) {
            (Op::Move { i, .. }, Some(argument)) => {
                let Argument::Condition(_) = self.run.arguments[argument] else { return None };
                // test r64, r64
                let r = ARGUMENTS[argument];
                self.code.extend([if r >= 8 { 0x4d } else { 0x48 }, 0x85, 0xc0 | (r & 7) << 3 | r & 7]);
                let host = self.find(step.top + i)?;
                self.plain(FCMOVNE | u16::from(host));
            }
            (Op::StoreStatus, _) => {}
            (op, Some(argument)) if op.memory() != Memory::None => self.at_argument(opcode, argument),
            (op, _) => match register(op) {
                Some(i) => {
                    let host = self.find(step.top + i)?;
                    self.plain(opcode & !7 | u16::from(host));
                }
                None if computes(op) => self.plain(opcode),
                None => {}
            },
        }
        if let Op::CompareFlags { .. } = step.op {
            for (flag, set) in (0..).zip(SET_FLAGS) {
                // setcc [rdi + offset]
                self.code.extend([0x0f, set, 0x80 | RDI]);
                self.code.extend((at!(jit.x87_flags) + flag).to_le_bytes());
            }
        }
        Some(())
    }
}
