//! Quick code of one block: where values are, what stands in the CPU state, and the ways out.
//!
//! **Registers.** Every guest register that is written is stored to the CPU state at once, which is therefore exact at
//! each instruction; host registers only cache what stands there, so that none ever needs to be saved. A value never
//! changes in the register that holds it: each operation takes a fresh one, and guest registers, operands of pending
//! flags and the instruction's own temporaries may share them.
//!
//! **Flags** are the operation that made them, as in regions, until something reads them, the block ends, or an access
//! leaves for the interpreter.
//!
//! **RIP** is not kept: a register, [`PAGE`], has the linear address of the page that runs, and where in it is known. The
//! CPU state's RIP is right again where code is left, be it for a region. Only what comes from elsewhere, and so by the CPU
//! state's RIP, loads that anew.

use std::mem::offset_of;

use crate::addr::PAGE_MASK;
use crate::emit::{Bin, Cond, Emit, Flags};
use crate::flags;
use crate::insn::{Insn, Mode};
use crate::jit::Unsupported;
use crate::jit::compile::{Branch, Compiled, Referent};
use crate::jit::emit::{Helper, at};
use crate::jit::frame::lazy;
use crate::jit::region::Options;
use crate::jit::usage::Usage;
use crate::jump::{ENTRY_SHIFT, JumpEntry, OFFSETS};
use crate::quick::asm::{
    ARG, Alu, Asm, CPU, Cc, ENTERED, Gpr, Jump, Mem, PAGE, POOL, REGISTERS, Shift, T0, T1, T2, Xmm,
};
use crate::quick::{Entered, Quick, Routine, cross};
use crate::width::W64;

/// The right side of a comparison.
#[derive(Clone, Copy, Debug)]
pub enum Right {
    Reg(Gpr),
    Imm(i32),
}

/// An integer. What is above its width is anything.
#[derive(Clone, Copy, Debug)]
pub enum Val {
    Imm(u64),
    Reg(Gpr),
    /// A 64-bit sum that is not computed yet.
    Sum(Mem),
    /// Whether a comparison of so many bytes holds, which is not made yet.
    Holds {
        cc: Cc,
        bytes: u64,
        a: Gpr,
        b: Right,
    },
}

/// What is known of the flags.
#[derive(Clone, Copy, Debug)]
pub(super) enum FlagVal {
    /// They stand in the CPU state.
    Memory,
    /// They were set by an operation on operands of this many bytes; increments leave the carry that stands in the CPU
    /// state. Operands are registers, or constants that a store takes.
    Op(Flags<Val>, u64),
}

/// A way out for the interpreter to do an instruction.
struct SideExit {
    jumps: Vec<Jump>,
    /// Offset of the instruction in the block, and how many instructions are to be counted before it.
    off: u16,
    done: i32,
    flags: FlagVal,
    dirty: bool,
}

/// What host registers hold.
#[derive(Clone)]
struct Registers {
    /// Guest registers whose value each has, a bit each.
    guests: [u16; REGISTERS],
    /// Where each guest register's value is.
    at: [Option<Gpr>; 16],
    /// The lowest bits, so many, that may be set.
    bits: [u8; REGISTERS],
    /// Those that hold values of the instruction being emitted.
    busy: u32,
    /// The next to be taken from guest registers.
    next: u8,
}

/// Emits one block.
pub struct QuickEmit<'a> {
    pub(super) a: Asm,
    quick: &'a Quick,
    mode: Mode,
    /// Page offset of the block.
    start: u64,
    pub(super) options: Options,
    registers: Registers,
    /// Vector registers in use by the instruction being emitted.
    vectors: u8,
    pub(super) flags: FlagVal,
    /// Whether the CPU state lacks them.
    dirty: bool,
    /// The instruction's offset in the block, and how many are to be counted before it.
    off: u16,
    done: i32,
    /// Host address that the instruction's first access found.
    pub(super) rmw: Option<Gpr>,
    ended: bool,
    /// The instruction needs more registers than there are, or what this evaluator has not.
    pub(super) failed: bool,
    exits: Vec<SideExit>,
    /// Jumps to where the dispatch loop is returned to at a page offset, or at RIP.
    leaves: Vec<(Jump, Option<u64>)>,
    /// Jumps to where it is told that quick code is at a page offset.
    looks: Vec<(Jump, u64)>,
    /// Jumps behind a helper that ended the block, and how many instructions are to be counted.
    ended_by_helper: Vec<(Jump, i32)>,
    /// Sites of direct branches, and the page offsets that they lead to.
    links: Vec<(usize, u64)>,
    insns: Vec<Insn>,
    bridges: usize,
    addresses: Vec<(usize, Referent)>,
    crossings: Vec<(usize, usize)>,
    calls: Vec<(usize, Routine)>,
}

/// Where everything was before an instruction that may turn out to have no quick form.
struct Mark {
    code: usize,
    registers: Registers,
    flags: FlagVal,
    dirty: bool,
    exits: usize,
    last_exit: usize,
    leaves: usize,
    looks: usize,
    ended_by_helper: usize,
    calls: usize,
    links: usize,
    bridges: usize,
    addresses: usize,
    crossings: usize,
}

pub(super) fn cpu(offset: i32) -> Mem {
    Mem::at(CPU, offset)
}

pub(super) fn gpr_at(r: u8) -> Mem {
    cpu(at!(s.gpr) + 8 * i32::from(r & 15))
}

impl<'a> QuickEmit<'a> {
    pub(super) fn new(quick: &'a Quick, mode: Mode, start: u64, options: Options) -> QuickEmit<'a> {
        QuickEmit {
            a: Asm::default(),
            quick,
            mode,
            start,
            options,
            registers: Registers { guests: [0; REGISTERS], at: [None; 16], bits: [64; REGISTERS], busy: 0, next: 0 },
            vectors: 0,
            flags: FlagVal::Memory,
            dirty: false,
            off: 0,
            done: 0,
            rmw: None,
            ended: false,
            failed: false,
            exits: Vec::new(),
            leaves: Vec::new(),
            looks: Vec::new(),
            ended_by_helper: Vec::new(),
            links: Vec::new(),
            insns: Vec::new(),
            bridges: 0,
            addresses: Vec::new(),
            crossings: Vec::new(),
            calls: Vec::new(),
        }
    }

    /// Emits the whole block.
    pub(super) fn emit(mut self, insns: &[Insn], entered: Entered) -> Compiled {
        self.a.enter();
        if entered == Entered::Often {
            self.count_down(None);
        }
        self.a.load(8, PAGE, cpu(at!(s.rip)));
        self.a.alu_imm(8, Alu::And, PAGE, !(PAGE_MASK as i32));
        let inner = self.a.code.len();
        if let (Entered::Instead { strays: strays @ 1.. }, Some(first)) = (entered, insns.first()) {
            self.stray(strays, first.off.into());
        }
        for i in insns {
            self.off = i.off;
            self.instruction(i);
            self.done += 1;
        }
        if let Some(last) = insns.last().filter(|_| !self.ended) {
            self.begin();
            self.settle_flags();
            self.count(self.done);
            self.edge(last.next_off() as i64);
        }
        let branches = self.cold_ways();
        let QuickEmit { a, insns, bridges, addresses, crossings, calls, .. } = self;
        Compiled {
            code: a.code,
            tail: ENTERED,
            inner,
            branches,
            insns,
            bridges,
            quick_bridges: 0,
            addresses,
            crossings,
            calls,
            nanos: 0,
        }
    }

    /// What the block jumps to and seldom comes by; and its direct branches.
    fn cold_ways(&mut self) -> Vec<Branch> {
        for exit in std::mem::take(&mut self.exits) {
            self.side_exit(exit);
        }
        for (jump, to) in std::mem::take(&mut self.looks) {
            self.a.here(jump);
            self.go_to(to, Routine::LookAt);
        }
        for (jump, done) in std::mem::take(&mut self.ended_by_helper) {
            self.a.here(jump);
            self.count(done);
            self.jump_to(Routine::Behind);
        }
        let mut branches = Vec::with_capacity(self.links.len());
        for (site, to) in std::mem::take(&mut self.links) {
            branches.push(Branch { site, to: Some(to), otherwise: Some(self.a.code.len()), quick: true });
            self.go_to(to, Routine::Onward);
        }
        for (jump, to) in std::mem::take(&mut self.leaves) {
            self.a.here(jump);
            match to {
                Some(to) => self.go_to(to, Routine::Leave),
                None => self.a.go_back(),
            }
        }
        branches
    }

    /// Goes to a routine with a page offset.
    fn go_to(&mut self, off: u64, routine: Routine) {
        self.a.mov_imm(T0, off);
        self.jump_to(routine);
    }

    fn jump_to(&mut self, routine: Routine) {
        let Jump(at) = self.a.jmp();
        self.calls.push((at, routine));
    }

    fn call(&mut self, routine: Routine) {
        let at = self.a.call_rel();
        self.calls.push((at, routine));
    }

    fn instruction(&mut self, i: &Insn) {
        self.begin();
        let mark = self.mark();
        // Of branches usage knows which forms there are.
        let whole = i.sem.usage.is_some_and(|f| f(&mut Usage::default(), i).is_ok());
        if let Some(f) = i.sem.quick.filter(|_| whole)
            && f(self, i).is_ok()
            && !self.failed
        {
            return;
        }
        self.rewind(mark);
        self.begin();
        self.by_helper(i);
    }

    fn begin(&mut self) {
        self.registers.busy = 0;
        self.vectors = 0;
        self.rmw = None;
        self.failed = false;
    }

    fn mark(&self) -> Mark {
        Mark {
            code: self.a.code.len(),
            registers: self.registers.clone(),
            flags: self.flags,
            dirty: self.dirty,
            exits: self.exits.len(),
            last_exit: self.exits.last().map_or(0, |e| e.jumps.len()),
            leaves: self.leaves.len(),
            looks: self.looks.len(),
            ended_by_helper: self.ended_by_helper.len(),
            calls: self.calls.len(),
            links: self.links.len(),
            bridges: self.bridges,
            addresses: self.addresses.len(),
            crossings: self.crossings.len(),
        }
    }

    fn rewind(&mut self, mark: Mark) {
        self.a.code.truncate(mark.code);
        self.registers = mark.registers;
        (self.flags, self.dirty) = (mark.flags, mark.dirty);
        self.exits.truncate(mark.exits);
        if let Some(exit) = self.exits.last_mut() {
            exit.jumps.truncate(mark.last_exit);
        }
        self.leaves.truncate(mark.leaves);
        self.looks.truncate(mark.looks);
        self.ended_by_helper.truncate(mark.ended_by_helper);
        self.calls.truncate(mark.calls);
        self.links.truncate(mark.links);
        self.bridges = mark.bridges;
        self.addresses.truncate(mark.addresses);
        self.crossings.truncate(mark.crossings);
        self.ended = false;
    }

    // ---- registers ----

    /// The registers that flags are in.
    fn pinned(&self) -> u32 {
        let bit = |v: &Val| if let Val::Reg(r) = v { 1 << r.0 } else { 0 };
        match &self.flags {
            FlagVal::Memory => 0,
            FlagVal::Op(f, _) => operands(f).iter().flatten().fold(0, |set, v| set | bit(v)),
        }
    }

    /// A register to hold a value of the instruction, of `bits` bits.
    pub(super) fn take(&mut self, bits: u8) -> Gpr {
        let free = POOL & !self.registers.busy & !self.pinned();
        let unused = (0..REGISTERS as u8).find(|&r| free >> r & 1 != 0 && self.registers.guests[usize::from(r)] == 0);
        let r = unused.or_else(|| {
            let next = self.registers.next;
            let r = (0..REGISTERS as u8).map(|n| (next + n) % REGISTERS as u8).find(|&r| free >> r & 1 != 0)?;
            self.registers.next = r + 1;
            Some(r)
        });
        let Some(r) = r else {
            self.failed = true;
            return Gpr(POOL.trailing_zeros() as u8);
        };
        let guests = std::mem::take(&mut self.registers.guests[usize::from(r)]);
        for g in (0..16).filter(|g| guests >> g & 1 != 0) {
            self.registers.at[g] = None;
        }
        self.registers.busy |= 1 << r;
        self.registers.bits[usize::from(r)] = bits;
        Gpr(r)
    }

    /// The lowest bits of a register that may be set.
    pub(super) fn bits(&self, r: Gpr) -> u8 {
        self.registers.bits[usize::from(r.0)]
    }

    /// The register that has guest register `r`.
    pub(super) fn guest(&mut self, r: u8) -> Gpr {
        let r = r & 15;
        if let Some(at) = self.registers.at[usize::from(r)] {
            self.registers.busy |= 1 << at.0;
            return at;
        }
        let to = self.take(64);
        self.a.load(8, to, gpr_at(r));
        self.assign(r, Some(to));
        to
    }

    /// Notes where guest register `r` is now, if anywhere.
    pub(super) fn assign(&mut self, r: u8, to: Option<Gpr>) {
        let g = usize::from(r & 15);
        if let Some(old) = std::mem::replace(&mut self.registers.at[g], to) {
            self.registers.guests[usize::from(old.0)] &= !(1 << g);
        }
        if let Some(to) = to.filter(|_| !self.failed) {
            self.registers.guests[usize::from(to.0)] |= 1 << g;
        }
    }

    /// Forgets what host registers hold: a helper has changed the CPU state.
    fn forget(&mut self) {
        self.registers.guests = [0; REGISTERS];
        self.registers.at = [None; 16];
    }

    /// A vector register for a value of the instruction.
    pub(super) fn take_x(&mut self) -> Xmm {
        self.failed |= self.vectors >= 16;
        self.vectors += 1;
        Xmm((self.vectors - 1) & 15)
    }

    /// A value in a register.
    pub(super) fn reg(&mut self, v: Val) -> Gpr {
        match v {
            Val::Reg(r) => r,
            Val::Imm(k) => {
                let to = self.take((64 - k.leading_zeros()) as u8);
                self.a.mov_imm(to, k);
                to
            }
            Val::Sum(sum) => {
                let to = self.take(64);
                self.a.lea(8, to, sum);
                to
            }
            Val::Holds { .. } => {
                let cc = self.test(v);
                let to = self.take(8);
                self.a.setcc(cc, to);
                self.a.movzx(1, to, to);
                to
            }
        }
    }

    /// A value in a given register that holds none.
    pub(super) fn reg_into(&mut self, to: Gpr, v: Val) {
        match v {
            Val::Reg(r) => self.a.mov(8, to, r),
            Val::Imm(k) => self.a.mov_imm(to, k),
            Val::Sum(sum) => self.a.lea(8, to, sum),
            Val::Holds { .. } => {
                let r = self.reg(v);
                self.a.mov(8, to, r);
            }
        }
    }

    /// Sets the host's flags so that the condition given back is the boolean `v`.
    pub(super) fn test(&mut self, v: Val) -> Cc {
        match v {
            Val::Holds { cc, bytes, a, b } => {
                match b {
                    Right::Imm(0) => self.a.test(bytes, a, a),
                    Right::Imm(k) => self.a.alu_imm(bytes, Alu::Cmp, a, k),
                    Right::Reg(b) => self.a.alu(bytes, Alu::Cmp, a, b),
                }
                cc
            }
            v => {
                let r = self.reg(v);
                self.a.test(1, r, r);
                Cc::NE
            }
        }
    }

    // ---- flags ----

    /// Notes the operation that made the flags.
    pub(super) fn note_flags(&mut self, f: Flags<Val>, bytes: u64) {
        if counts(&f) && !matches!(&self.flags, FlagVal::Op(before, _) if counts(before)) {
            // The carry stays that of before, which must stand in the CPU state then.
            self.store_flags();
        }
        let mut settle = |v: Val| match v {
            Val::Reg(_) => v,
            // Of a narrow one the store's upper bytes do not matter.
            Val::Imm(k) if bytes < 8 || i32::try_from(k as i64).is_ok() => v,
            v => Val::Reg(self.reg(v)),
        };
        let f = match f {
            Flags::Add { a, b, r } => Flags::Add { a: settle(a), b: settle(b), r: settle(r) },
            Flags::Sub { a, b, r } => Flags::Sub { a: settle(a), b: settle(b), r: settle(r) },
            // Nothing is borrowed.
            Flags::Cmp { a, b: Val::Imm(0), .. } => Flags::Logic { r: settle(a) },
            // Its difference can be made again.
            Flags::Cmp { a, b, .. } => Flags::Cmp { a: settle(a), b: settle(b), r: Val::Imm(0) },
            Flags::Logic { r } => Flags::Logic { r: settle(r) },
            Flags::Inc { a, r } => Flags::Inc { a: settle(a), r: settle(r) },
            Flags::Dec { a, r } => Flags::Dec { a: settle(a), r: settle(r) },
            Flags::Shift { op, a, n, r } => Flags::Shift { op, a: settle(a), n, r: settle(r) },
            other => return self.note_words(other, bytes),
        };
        self.flags = FlagVal::Op(f, bytes);
        self.dirty = true;
    }

    /// Flags that have no deferred form.
    fn note_words(&mut self, f: Flags<Val>, bytes: u64) {
        match f {
            Flags::Result { r, cf, of } => self.store_result(r, bytes, cf, of),
            Flags::Cf { cf } => self.store_carry(cf, None),
            Flags::CfOf { cf, of } => self.store_carry(cf, Some(of)),
            f => {
                let words = self.materialise(f, bytes);
                self.store_words(words);
            }
        }
        self.flags = FlagVal::Memory;
        self.dirty = false;
    }

    /// A carry, and an overflow or the one that there was, in the words that stand in the CPU state.
    fn store_carry(&mut self, cf: Val, of: Option<Val>) {
        let (carry, differ, old) = (T0, T1, T2);
        self.store_flags();
        self.fold();
        self.a.load(8, old, cpu(at!(s.cc_co)));
        match of {
            Some(of) => self.boolean_into(differ, of),
            None => {
                self.a.mov(8, differ, old);
                self.a.shift_imm(8, Shift::Shl, differ, 1);
                self.a.alu(8, Alu::Xor, differ, old);
                self.a.shift_imm(8, Shift::Shr, differ, 63);
            }
        }
        self.boolean_into(carry, cf);
        self.a.alu_imm(8, Alu::And, old, 8);
        self.join_carry();
        self.a.alu(8, Alu::Or, carry, old);
        self.a.store(8, cpu(at!(s.cc_co)), carry);
    }

    /// Makes the word of a carry in T0 and an overflow in T1, in T0.
    fn join_carry(&mut self) {
        let (carry, differ) = (T0, T1);
        self.a.alu(4, Alu::Xor, differ, carry);
        self.a.shift_imm(8, Shift::Shl, carry, 63);
        self.a.shift_imm(8, Shift::Shl, differ, 62);
        self.a.alu(8, Alu::Or, carry, differ);
    }

    /// Shifts a value of 4 or 8 bytes by a count that is masked already, and stores the flags unless it is 0.
    pub(super) fn shift_by(&mut self, bytes: u64, op: Shift, a: Gpr, count: Val) -> Gpr {
        self.store_flags();
        self.fold();
        let to = self.take(8 * bytes as u8);
        self.reg_into(T1, count);
        self.a.shift_out(bytes, op, to, a);
        let carry = T0;
        self.a.test(4, T1, T1);
        let none = self.a.jcc(Cc::E);
        // The rule for a count of 1, which processors follow for all.
        let differ = T1;
        let sign = |e: &mut Self, of: Gpr| {
            e.a.mov(bytes, differ, of);
            e.a.shift_imm(bytes, Shift::Shr, differ, (8 * bytes - 1) as u8);
        };
        self.a.movzx(1, carry, carry);
        match op {
            Shift::Shl => {
                sign(self, to);
                self.a.alu(4, Alu::Xor, differ, carry);
            }
            Shift::Shr => sign(self, a),
            _ => self.a.mov_imm(differ, 0),
        }
        self.join_carry();
        self.store_result_words(to, bytes);
        self.a.here(none);
        (self.flags, self.dirty) = (FlagVal::Memory, false);
        to
    }

    /// The words of a result with a carry and an overflow, for which there would not be enough registers otherwise.
    fn store_result(&mut self, r: Val, bytes: u64, cf: Val, of: Val) {
        let (carry, differ) = (T0, T1);
        let r = self.reg(r);
        self.boolean_into(carry, cf);
        self.boolean_into(differ, of);
        self.join_carry();
        self.store_result_words(r, bytes);
    }

    /// Stores the words of a result, and of carry and overflow in T0.
    fn store_result_words(&mut self, r: Gpr, bytes: u64) {
        let carry = T0;
        self.a.store(8, cpu(at!(s.cc_co)), carry);
        let wide = match bytes {
            8 => r,
            _ => {
                self.a.movsx(bytes, carry, r);
                carry
            }
        };
        self.a.store(8, cpu(at!(s.cc_z)), wide);
        self.a.store(8, cpu(at!(s.cc_sp)), wide);
        self.lazy_kind(0);
    }

    /// A boolean in a given register that holds no value.
    fn boolean_into(&mut self, to: Gpr, v: Val) {
        match v {
            Val::Imm(k) => self.a.mov_imm(to, k & 1),
            Val::Holds { .. } => {
                let cc = self.test(v);
                self.a.setcc(cc, to);
                self.a.movzx(1, to, to);
            }
            v => {
                let r = self.reg(v);
                self.a.movzx(1, to, r);
            }
        }
    }

    /// A condition of flags that stand in the CPU state, if it is one of a single word.
    pub(super) fn holds_in_memory(&mut self, c: Cond) -> Option<Val> {
        let (offset, cc) = match Cond::from_bits(c as u8 & !1) {
            Cond::E => (at!(s.cc_z), Cc::E),
            Cond::S => (at!(s.cc_sp), Cc::L),
            Cond::B => (at!(s.cc_co), Cc::L),
            _ => return None,
        };
        self.fold();
        let a = self.take(64);
        self.a.load(8, a, cpu(offset));
        let cc = if c as u8 & 1 == 0 { cc } else { cc.opposite() };
        Some(Val::Holds { cc, bytes: 8, a, b: Right::Imm(0) })
    }

    /// Flags with the difference that a comparison does not keep.
    pub(super) fn whole(&mut self, f: Flags<Val>) -> Flags<Val> {
        match f {
            Flags::Cmp { a, b, .. } => Flags::Cmp { a, b, r: self.bin::<W64>(Bin::Sub, a, b) },
            f => f,
        }
    }

    fn materialise(&mut self, f: Flags<Val>, bytes: u64) -> (Val, Val, Val) {
        let f = self.whole(f);
        flags::materialise_sized(self, f, bytes)
    }

    fn store_words(&mut self, (z, sp, co): (Val, Val, Val)) {
        for (v, offset) in [(z, at!(s.cc_z)), (sp, at!(s.cc_sp)), (co, at!(s.cc_co))] {
            let r = self.reg(v);
            self.a.store(8, cpu(offset), r);
        }
        self.lazy_kind(0);
    }

    /// The flags' words, as they stand in the CPU state from here on.
    pub(super) fn words(&mut self) -> (Val, Val, Val) {
        if let FlagVal::Op(f, bytes) = self.flags
            && !counts(&f)
        {
            let words = self.materialise(f, bytes);
            if self.dirty {
                self.store_words(words);
                self.dirty = false;
            }
            return words;
        }
        self.store_flags();
        self.fold();
        [at!(s.cc_z), at!(s.cc_sp), at!(s.cc_co)]
            .map(|offset| {
                let r = self.take(64);
                self.a.load(8, r, cpu(offset));
                Val::Reg(r)
            })
            .into()
    }

    /// Turns flags that are deferred in the CPU state into words.
    fn fold(&mut self) {
        self.call(Routine::Fold);
    }

    /// Stores the flags if the CPU state lacks them.
    pub(super) fn store_flags(&mut self) {
        if let FlagVal::Op(f, bytes) = self.flags
            && self.dirty
        {
            self.store_op(f, bytes);
            self.dirty = false;
        }
    }

    /// Stores the flags if the CPU state lacks them, and forgets how they came about.
    fn settle_flags(&mut self) {
        self.store_flags();
        self.flags = FlagVal::Memory;
    }

    /// Says what the deferred flags are of; what is above 32 bits stays 0.
    fn lazy_kind(&mut self, kind: i32) {
        self.a.store_imm(4, cpu(at!(jit.lazy_kind)), kind);
    }

    fn store_op(&mut self, f: Flags<Val>, bytes: u64) {
        // What has no deferred form was stored as words.
        let count = |n: u32| Val::Imm(u64::from(n));
        let Some((op, [a, b, r])) = lazy::deferred(f, count) else { return };
        if counts(&f) {
            self.fold();
        }
        self.lazy_kind(lazy::kind(op, bytes) as i32);
        for (v, offset) in [(a, at!(jit.lazy_a)), (b, at!(jit.lazy_b)), (r, at!(jit.lazy_r))] {
            match v {
                Some(Val::Reg(r)) => self.a.store(8, cpu(offset), r),
                Some(Val::Imm(k)) => self.a.store_imm(8, cpu(offset), k as i32),
                _ => {}
            }
        }
    }

    // ---- ways out ----

    /// Leaves, before the current instruction has changed anything, if `cc` holds: the interpreter does it.
    pub(super) fn side_exit_if(&mut self, cc: Cc) {
        let jump = self.a.jcc(cc);
        let (off, done, dirty) = (self.off, self.done, self.dirty);
        match self.exits.last_mut() {
            // Flags do not change within an instruction before what may leave it.
            Some(exit) if exit.off == off && exit.dirty == dirty => exit.jumps.push(jump),
            _ => self.exits.push(SideExit { jumps: vec![jump], off, done, flags: self.flags, dirty }),
        }
    }

    fn side_exit(&mut self, exit: SideExit) {
        for jump in exit.jumps {
            self.a.here(jump);
        }
        if let (FlagVal::Op(f, bytes), true) = (exit.flags, exit.dirty) {
            self.store_op(f, bytes);
        }
        self.count(exit.done);
        self.go_to(self.start + u64::from(exit.off), Routine::Interpret);
    }

    fn count(&mut self, done: i32) {
        if self.options.counted && done != 0 {
            self.a.alu_imm(8, Alu::Add, cpu(at!(jit.count)), done);
        }
    }

    /// The instruction pointer at an offset from the block.
    pub(super) fn ip(&mut self, off: i64) -> Val {
        let sum = Mem::at(PAGE, self.page_offset(off));
        if self.long() {
            return Val::Sum(sum);
        }
        let to = self.take(32);
        self.a.lea(4, to, sum);
        Val::Reg(to)
    }

    /// The offset from the page that runs of what is at an offset from the block.
    fn page_offset(&self, off: i64) -> i32 {
        (self.start as i64 + off) as i32
    }

    /// Bytes of an instruction pointer.
    fn ip_bytes(&self) -> u64 {
        if self.long() { 8 } else { 4 }
    }

    /// The page offset at an offset from the block, if it is in the block's page.
    fn inside(&self, off: i64) -> Option<u64> {
        u64::try_from(self.start as i64 + off).ok().filter(|&to| to <= PAGE_MASK)
    }

    /// Goes on at an offset from the block; flags are stored, and instructions counted.
    fn edge(&mut self, off: i64) {
        self.ended = true;
        let to = self.inside(off);
        if to.is_none() {
            self.a.lea(self.ip_bytes(), T0, Mem::at(PAGE, self.page_offset(off)));
            self.a.store(8, cpu(at!(s.rip)), T0);
        }
        if to.is_none() || off <= 0 {
            self.count_down(to);
        }
        // There is no way round that never leads back.
        if off <= 0 {
            self.poll(to);
        }
        match to {
            Some(to) => self.link(None, to),
            None => self.cross(off),
        }
    }

    /// Jumps to a page offset, if a condition is given and holds or none is.
    fn link(&mut self, cc: Option<Cc>, to: u64) {
        let Jump(site) = self.a.link(cc);
        self.links.push((site, to));
    }

    /// Goes on at RIP, which is in T0, in another page: by what the code knows of where it leads, or else by the jump
    /// cache.
    fn cross(&mut self, off: i64) {
        let pages = self.page_offset(off) & !(PAGE_MASK as i32);
        let bytes = self.ip_bytes();
        let crossing = cross::emit(&mut self.a, |a| a.lea(bytes, PAGE, Mem::at(PAGE, pages)));
        self.crossings.extend(crossing.way);
        let referent = if crossing.way.is_some() { Referent::Name } else { Referent::Bridge };
        self.addresses.push((crossing.bridge, referent(self.bridges)));
        self.calls.push((crossing.missed, Routine::Missed));
        self.bridges += 1;
    }

    /// Counts what enters from elsewhere, and what may be a round of a loop: it is to go on at a page offset, or at RIP.
    fn count_down(&mut self, to: Option<u64>) {
        self.a.alu_imm(8, Alu::Sub, cpu(at!(jit.until_look)), 1);
        match to {
            Some(to) => {
                let look = self.a.jcc(Cc::S);
                self.looks.push((look, to));
            }
            None => {
                let look = self.a.jcc_out(Cc::S);
                self.calls.push((look, Routine::Look));
            }
        }
    }

    /// Counts accesses that stray; once in a while the dispatch loop is to note that at an offset from the block.
    fn stray(&mut self, count: i32, off: i64) {
        self.a.alu_imm(8, Alu::Sub, cpu(at!(jit.until_stray)), count);
        let on = self.a.jcc(Cc::NS);
        self.go_to(self.page_offset(off) as u64, Routine::Interpret);
        self.a.here(on);
    }

    /// Returns to the dispatch loop if a kick is pending, for it to go on at a page offset or at RIP; the rest of the CPU
    /// state is exact. Changes T1.
    fn poll(&mut self, to: Option<u64>) {
        self.a.load(8, T1, cpu(at!(jit.kick)));
        self.a.alu_imm(4, Alu::Cmp, Mem::at(T1, 0), 0);
        let out = self.a.jcc(Cc::NE);
        self.leaves.push((out, to));
    }

    /// Goes on at a computed instruction pointer, by the jump cache.
    pub(super) fn exit_to(&mut self, target: Val) {
        let target = self.reg(target);
        self.store_flags();
        self.a.store(8, cpu(at!(s.rip)), target);
        self.count(self.done + 1);
        self.poll(None);
        self.jump_by_cache(target);
        self.ended = true;
    }

    fn jump_by_cache(&mut self, target: Gpr) {
        let (entry, key) = (T0, T1);
        cross::emit_key(&mut self.a, key, target);
        self.a.mov(8, entry, target);
        self.a.shift_imm(8, Shift::Shr, entry, 12);
        self.a.alu(4, Alu::Xor, entry, target);
        self.a.shift_imm(4, Shift::Shl, entry, ENTRY_SHIFT as u8);
        self.a.alu_imm(4, Alu::And, entry, OFFSETS as i32);
        self.a.alu(8, Alu::Add, entry, cpu(at!(jit.jump)));
        self.a.alu(8, Alu::Cmp, key, Mem::at(entry, offset_of!(JumpEntry, key) as i32));
        let miss = self.a.jcc_out(Cc::NE);
        self.calls.push((miss, Routine::Way));
        self.a.go_by(Mem::at(entry, offset_of!(JumpEntry, code) as i32));
    }

    /// Takes one of two ways by a condition.
    pub(super) fn branch(&mut self, c: Val, taken: i64, next: i64) {
        self.store_flags();
        self.count(self.done + 1);
        if let Val::Imm(c) = c {
            return self.edge(if c & 1 != 0 { taken } else { next });
        }
        let cc = self.test(c);
        match self.inside(taken).filter(|_| taken > 0) {
            Some(to) => {
                self.link(Some(cc), to);
                self.edge(next);
            }
            None => {
                let other = self.a.jcc(cc);
                self.edge(next);
                self.a.here(other);
                self.edge(taken);
            }
        }
    }

    /// Goes on at an offset from the block.
    pub(super) fn jump(&mut self, off: i64) {
        self.store_flags();
        self.count(self.done + 1);
        self.edge(off);
    }

    // ---- helpers ----

    /// Calls the interpreter's evaluation of an instruction.
    fn by_helper(&mut self, i: &Insn) {
        self.settle_flags();
        let at = self.a.mov_imm64(ARG, 0);
        self.addresses.push((at, Referent::Insn(self.insns.len())));
        self.insns.push(*i);
        self.a.lea(self.ip_bytes(), T2, Mem::at(PAGE, self.page_offset(0)));
        self.call(Routine::Evaluate);
        self.forget();
        // The helper counts its own instruction.
        let done = self.done;
        self.done -= 1;
        if i.ends_block {
            self.count(done);
            self.jump_to(Routine::Behind);
            self.ended = true;
            return;
        }
        let out = self.a.jcc(Cc::NE);
        self.ended_by_helper.push((out, done));
    }

    /// Calls a routine for an access at `linear`; its host address is in T0 then.
    pub(super) fn access(&mut self, linear: Val, bytes: u64, write: bool) {
        self.reg_into(ARG, linear);
        self.find(bytes, write);
    }

    /// Calls a routine for an access at ARG.
    pub(super) fn find(&mut self, bytes: u64, write: bool) {
        self.call(Routine::access(bytes, write));
        self.side_exit_if(Cc::E);
    }

    pub(super) fn counts_bits(&self) -> bool {
        self.quick.counts_bits
    }

    pub(super) fn long(&self) -> bool {
        self.mode.has(Mode::CODE64)
    }

    pub(super) fn flat(&self) -> bool {
        self.mode.has(Mode::FLAT)
    }
}

/// Whether flags leave the carry as it was.
pub(super) fn counts(f: &Flags<Val>) -> bool {
    matches!(f, Flags::Inc { .. } | Flags::Dec { .. })
}

/// The values that deferred flags keep.
fn operands(f: &Flags<Val>) -> [Option<Val>; 3] {
    match *f {
        Flags::Add { a, b, r } | Flags::Sub { a, b, r } => [Some(a), Some(b), Some(r)],
        Flags::Cmp { a, b, .. } => [Some(a), Some(b), None],
        Flags::Inc { a, r } | Flags::Dec { a, r } | Flags::Shift { a, r, .. } => [Some(a), Some(r), None],
        Flags::Logic { r } => [Some(r), None, None],
        _ => [None; 3],
    }
}

/// Where in the CPU state the address of a helper's thunk is, which preserves every register.
pub(super) fn thunk(helper: Helper) -> i32 {
    at!(jit.thunks) + 8 * helper as i32
}

/// What an instruction of no quick form says.
pub(super) fn none<T>() -> Result<T, Unsupported> {
    Err(Unsupported)
}
