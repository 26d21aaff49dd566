//! Pages that a block's accesses have been found in, for those behind them that are likely to lie in the same: what a
//! function keeps on its stack, and the fields of one object.
//!
//! An address is known as a sum of the value that a register has had and a constant. Of two whose registers had the same
//! value the second takes the page of the first if it lies there, which it compares; its own lookup is left out. If it lies
//! in memory that has been looked up for a group of accesses ([`super::groups`]), there is nothing to compare.
//!
//! **Invariant:** what has been found holds until the region is left, the current table of the soft TLB becomes another, or
//! a helper evaluates an instruction. Another vCPU that takes a page away from this one waits until it has left the region
//! ([`crate::peers`]); what is evicted from the table may still be used.

use std::collections::HashMap;

use cranelift_codegen::ir::{Function, InstructionData, Opcode, Value, ValueDef};
use iced_x86::Mnemonic;

use crate::addr::PAGE_SIZE;
use crate::insn::{Insn, NO_REG, Opnd};

/// Pages that are kept in values at a time: more would be more values than the host has registers for.
const MOST: usize = 3;
const RSP: u8 = 4;

/// An address: what some register had, by number, and what is added to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Address {
    of: u32,
    plus: i64,
}

/// A page that an access was found in.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    at: Address,
    /// Whether it may be written.
    write: bool,
    /// Its linear address; none that a page has where the access took the slow path.
    pub page: Value,
    /// What the host's address is more than the linear one.
    pub addend: Value,
}

/// What is known at a point of the emission.
#[derive(Default)]
pub struct Pages {
    /// What each guest register has.
    registers: [Address; 16],
    /// What values are.
    values: HashMap<Value, Address>,
    numbers: u32,
    found: Vec<Found>,
    /// Memory that has been looked up for a group ([`super::groups`]): where it begins, in which page, and how many bytes
    /// it is.
    covered: Vec<(Found, i64)>,
    /// Registers that instructions behind the current one address memory by.
    pub later: u16,
}

/// What is handed down to a block that has one way in: the found pages, each by a register whose value lies in it or near.
pub type Inherited = Vec<(u8, Found)>;

impl Pages {
    /// Begins a block.
    pub fn begin(&mut self, inherited: Inherited) {
        self.values.clear();
        self.found.clear();
        self.covered.clear();
        for r in 0..16 {
            self.changed(r);
        }
        for (r, found) in inherited {
            let of = self.registers[usize::from(r)].of;
            self.found.push(Found { at: Address { of, ..found.at }, ..found });
        }
    }

    /// What a block is handed down that is entered from here alone.
    pub fn hand_down(&self) -> Inherited {
        let by_register = |found: &Found| {
            let r = self.registers.iter().position(|has| has.of == found.at.of)?;
            let at = Address { plus: found.at.plus.wrapping_sub(self.registers[r].plus), ..found.at };
            Some((r as u8, Found { at, ..*found }))
        };
        let covered = self.covered.iter().map(|(found, _)| found);
        self.found.iter().chain(covered).filter_map(by_register).collect()
    }

    /// Nothing that was found holds any more.
    pub fn forget(&mut self) {
        self.found.clear();
        self.covered.clear();
    }

    /// Guest register `r` has a new value that nothing is known of.
    pub fn changed(&mut self, r: u8) {
        self.numbers += 1;
        self.registers[usize::from(r & 15)] = Address { of: self.numbers, plus: 0 };
    }

    /// Guest register `r` was read as `v`.
    pub fn is_read(&mut self, r: u8, v: Value) {
        self.values.insert(v, self.registers[usize::from(r & 15)]);
    }

    /// Guest register `r` is `v` from here on.
    pub fn is_set(&mut self, r: u8, v: Value, func: &Function) {
        match self.address(v, func) {
            Some(at) => self.registers[usize::from(r & 15)] = at,
            None => self.changed(r),
        }
    }

    /// The instructions behind the one that is emitted next.
    pub fn ahead(&mut self, insns: &[Insn], later: u16) {
        self.later = insns.iter().fold(later, |set, i| set | bases(i));
    }

    /// A value as an address.
    pub fn address(&self, v: Value, func: &Function) -> Option<Address> {
        let (mut v, mut plus) = (v, 0i64);
        loop {
            if let Some(at) = self.values.get(&v) {
                return Some(Address { plus: at.plus.wrapping_add(plus), ..*at });
            }
            let (part, k) = sum(v, func)?;
            (v, plus) = (part, plus.wrapping_add(k));
        }
    }

    /// The page that an access there has a good chance to lie in.
    pub fn find(&self, at: Address, write: bool) -> Option<Found> {
        let near = |f: &&Found| f.at.of == at.of && f.at.plus.abs_diff(at.plus) < PAGE_SIZE && (f.write || !write);
        self.found.iter().find(near).copied()
    }

    /// Covers `bytes` bytes from `at` on, which lie in a page that is known now.
    pub fn cover(&mut self, at: Address, bytes: i64, write: bool, page: Value, addend: Value) {
        self.covered.push((Found { at, write, page, addend }, bytes));
    }

    /// Whether anything is.
    pub fn covers_any(&self) -> bool {
        !self.covered.is_empty()
    }

    /// What the host's address is more than the linear one of an access that lies in what is covered.
    pub fn covers(&self, at: Address, bytes: u64, write: bool) -> Option<Value> {
        let inside = |&&(f, most): &&(Found, i64)| {
            let from = at.plus.wrapping_sub(f.at.plus);
            f.at.of == at.of && (f.write || !write) && from >= 0 && from.saturating_add(bytes as i64) <= most
        };
        self.covered.iter().find(inside).map(|(f, _)| f.addend)
    }

    /// Whether an instruction behind the current one addresses memory by what `at` is a sum of.
    pub fn is_used_again(&self, at: Address) -> bool {
        self.registers.iter().enumerate().any(|(r, has)| self.later >> r & 1 != 0 && has.of == at.of)
    }

    /// Notes where an access was found.
    pub fn note(&mut self, at: Address, write: bool, page: Value, addend: Value) {
        // One that may only be read is of no more use.
        self.found.retain(|f| f.at.of != at.of || f.write && !write);
        if self.found.len() == MOST {
            self.found.remove(0);
        }
        self.found.push(Found { at, write, page, addend });
    }
}

/// What a 64-bit value is the sum of, if one part is a constant.
pub fn sum(v: Value, func: &Function) -> Option<(Value, i64)> {
    let ValueDef::Result(inst, 0) = func.dfg.value_def(v) else { return None };
    let InstructionData::Binary { opcode, args: [a, b] } = func.dfg.insts[inst] else { return None };
    let k = constant(b, func)?;
    match opcode {
        Opcode::Iadd => Some((a, k)),
        Opcode::Isub => Some((a, k.wrapping_neg())),
        _ => None,
    }
}

fn constant(v: Value, func: &Function) -> Option<i64> {
    let ValueDef::Result(inst, 0) = func.dfg.value_def(v) else { return None };
    match func.dfg.insts[inst] {
        InstructionData::UnaryImm { opcode: Opcode::Iconst, imm } => Some(imm.bits()),
        _ => None,
    }
}

/// The registers that an instruction addresses memory by, a constant aside.
pub fn bases(i: &Insn) -> u16 {
    use Mnemonic::{Call, Lea, Nop, Pop, Popfq, Push, Pushfq, Ret};
    let mnemonic = i.iced_code().mnemonic();
    let operand = i.op.contains(&Opnd::Mem) && i.index == NO_REG && i.base < 16 && !matches!(mnemonic, Lea | Nop);
    let stack = matches!(mnemonic, Push | Pop | Call | Ret | Pushfq | Popfq);
    u16::from(operand) << (i.base & 15) | u16::from(stack) << RSP
}
