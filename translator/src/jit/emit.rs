//! The compiler's evaluator: semantics run on Cranelift values.
//!
//! Guest registers are SSA variables, loaded at the region's entry. A register that was written is *dirty* until it
//! is stored to the CPU state: before every access that may fault (so that state is precise there), before helpers,
//! and at exits. Flags are kept as the operation that made them and turned into words only where something reads
//! them; at a possible fault that happens on the cold path.

use std::mem::offset_of;

use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::immediates::Offset32;
use cranelift_codegen::ir::types::{I8, I8X16, I16, I32, I64, I64X2};
use cranelift_codegen::ir::{
    Block, BlockArg, ExtFuncData, ExternalName, GlobalValueData, InstBuilder, InstructionData, MemFlagsData, Opcode,
    SigRef, Type, UserExternalName, Value,
};
use cranelift_frontend::{FunctionBuilder, Variable};

use crate::addr::PAGE_MASK;
use crate::cpu::Cpu;
use crate::emit::{Bin, Cmp, Cond, Emit, Flags, FpArgs, FpCall, LaneOp, Un};
use crate::eval;
use crate::flags;
use crate::insn::{Insn, Mode};
use crate::jit::Unsupported;
use crate::jit::frame::{lazy, reason};
use crate::jit::region::{End, Plan, RegionBlock};
use crate::jit::usage::{Regs, Usage};
use crate::mmu::tlb::{TLB_ENTRIES, TlbEntry};
use crate::simd::fp::FpFmt;
use crate::state::seg;
use crate::vcpu::{JUMP_ENTRIES, JumpEntry};
use crate::width::{W8, W16, W32, W64, Width};

/// Index of a helper's address in [`crate::jit::frame::JitFrame::helpers`].
#[derive(Clone, Copy)]
pub enum Helper {
    /// Resolve a load: (linear, bytes).
    Load,
    /// Do a store: (linear, bytes, value).
    Store,
    /// Resolve a read-modify-write: (linear, bytes).
    Modify,
    /// Evaluate an instruction: (instruction, page instruction pointer).
    Evaluate,
    /// Fold deferred flags into their words.
    Fold,
    /// Make the guest's MXCSR the host's.
    LoadFp,
}

/// What relocations of a region refer to: namespaces of its external names.
pub mod name {
    /// A direct branch out of the region to its page offset number `index` ([`super::Emitted::links`]).
    pub const LINK: u32 = 0;
    /// Code that finds the way from RIP by the jump cache.
    pub const LOOKUP: u32 = 1;
    /// The address of instruction number `index` of [`super::Emitted::insns`].
    pub const INSN: u32 = 2;
}

/// What the code of a region refers to outside itself.
#[derive(Default)]
pub struct Emitted {
    /// Page offsets that direct branches lead to.
    pub links: Vec<u64>,
    /// Instructions that helpers evaluate.
    pub insns: Vec<Insn>,
}

/// What is known of the flags at a point of the emission.
#[derive(Clone)]
enum FlagVal {
    /// They stand in the CPU state, perhaps in deferred form.
    Memory,
    /// The words as values.
    Raw(Value, Value, Value),
    /// All were set by an operation on operands of this many bytes.
    Op(Flags<Value>, u64),
    /// Some were set by an operation, the others as before.
    Partial(Flags<Value>, u64, Box<FlagVal>),
}

/// Emits one region.
pub struct JitEmit<'a> {
    /// The function being built.
    pub b: FunctionBuilder<'a>,
    plan: &'a Plan,
    /// The CPU ([`Cpu`]) that the function's argument points to.
    cpu: Value,
    tlb: Value,
    gpr: [Option<Variable>; 16],
    x: [Option<Variable>; 16],
    y: [Option<Variable>; 16],
    /// Instruction pointer of the page's first byte.
    page_ip: Value,
    /// Instructions completed since the region was entered, up to the current block, if they are counted.
    count: Option<Variable>,
    /// Cranelift blocks of the plan's blocks.
    blocks: Vec<Block>,
    /// Exit for "interpret the instruction at this offset": (offset, count).
    side_exit: Block,
    helper_sig: SigRef,
    tail_sig: SigRef,
    /// Registers that the CPU state does not have yet.
    dirty: Regs,
    flags: FlagVal,
    flags_dirty: bool,
    /// Page offset of the instruction being emitted, and how many of the block precede it.
    off: u64,
    done: i64,
    /// Index of the block being emitted.
    current: usize,
    /// Whether the flags are needed on entry to each block.
    flags_live_in: Vec<bool>,
    /// Host address that the last `load_rmw` of this instruction resolved.
    rmw_host: Option<Value>,
    /// Whether the block has its terminator.
    ended: bool,
    /// Whether the host's MXCSR is the guest's at this point.
    pub(super) fp_ready: bool,
    /// Vector registers whose value may be a floating-point result that nothing has used yet: bits of low and high
    /// halves. What sets flags in MXCSR must be computed even if its result is overwritten.
    pub(super) fp_unused: (u16, u16),
    /// The same of registers that the instruction being emitted has read.
    pub(super) fp_read: (u16, u16),
    /// Whether the instruction being emitted computes such results.
    pub(super) fp_result: bool,
    emitted: Emitted,
}

fn ty<W: Width>() -> Type {
    int_type(W::BYTES)
}

fn int_type(bytes: u64) -> Type {
    match bytes {
        1 => I8,
        2 => I16,
        4 => I32,
        _ => I64,
    }
}

/// Accesses to the CPU state and to guest RAM behind a checked TLB entry cannot trap.
fn plain() -> MemFlagsData {
    MemFlagsData::new().with_notrap()
}

fn aligned() -> MemFlagsData {
    MemFlagsData::trusted()
}

const fn gpr_at(r: usize) -> i32 {
    (offset_of!(Cpu, s.gpr) + 8 * r) as i32
}

const fn x_at(r: usize) -> i32 {
    (offset_of!(Cpu, s.ymm) + 32 * r) as i32
}

macro_rules! at {
    ($($field:tt)+) => { offset_of!(Cpu, $($field)+) as i32 };
}

impl<'a> JitEmit<'a> {
    /// Starts the function: declares variables for the registers that the region uses, and its blocks.
    pub fn new(mut b: FunctionBuilder<'a>, plan: &'a Plan, helper_sig: SigRef, tail_sig: SigRef) -> JitEmit<'a> {
        let start = b.create_block();
        b.append_block_params_for_function_params(start);
        b.switch_to_block(start);
        let cpu = b.block_params(start)[0];
        let rip = b.ins().load(I64, aligned(), cpu, at!(s.rip));
        let page_ip = b.ins().band_imm_s(rip, !(PAGE_MASK as i64));
        let tlb = b.ins().load(I64, aligned(), cpu, at!(jit.tlb));
        let count = plan.counted.then(|| b.declare_var(I64));
        let used = plan.blocks.iter().fold(Regs::default(), |u, block| u.or(block.usage.used));
        let mut variables =
            |mask: u16, t: Type| std::array::from_fn(|r| (mask >> r & 1 != 0).then(|| b.declare_var(t)));
        let (gpr, x, y) = (variables(used.gpr, I64), variables(used.x, I8X16), variables(used.y, I8X16));
        let blocks: Vec<Block> = plan.blocks.iter().map(|_| b.create_block()).collect();
        let side_exit = b.create_block();
        b.set_cold_block(side_exit);
        b.append_block_param(side_exit, I64);
        if plan.counted {
            b.append_block_param(side_exit, I64);
        }
        let mut e = JitEmit {
            b,
            plan,
            cpu,
            tlb,
            gpr,
            x,
            y,
            page_ip,
            count,
            blocks,
            side_exit,
            helper_sig,
            tail_sig,
            dirty: Regs::default(),
            flags: FlagVal::Memory,
            flags_dirty: false,
            off: plan.blocks[0].off,
            done: 0,
            current: 0,
            flags_live_in: flags_live_on_entry(plan),
            rmw_host: None,
            ended: false,
            fp_ready: false,
            fp_unused: (0, 0),
            fp_read: (0, 0),
            fp_result: false,
            emitted: Emitted::default(),
        };
        let off = e.b.ins().band_imm_u(rip, PAGE_MASK as i64);
        e.enter(off);
        e
    }

    /// Leads to the entry that RIP's page offset names, and emits the entries.
    fn enter(&mut self, off: Value) {
        let dirty_in = dirty_on_entry(self.plan);
        let live_in = live_on_entry(self.plan, &dirty_in);
        let plan = self.plan;
        let mut entries: Vec<(u64, usize, Block)> =
            (0..).zip(&plan.blocks).filter(|(_, b)| b.entry).map(|(k, b)| (b.off, k, self.b.create_block())).collect();
        entries.sort_by_key(|e| e.0);
        self.choose(off, &entries);
        for (off, k, entry) in entries {
            self.b.switch_to_block(entry);
            if let Some(count) = self.count {
                let zero = self.b.ins().iconst(I64, 0);
                self.b.def_var(count, zero);
            }
            self.load_registers(live_in[k]);
            self.poll(off as i64);
            let target = self.blocks[k];
            self.b.ins().jump(target, &[]);
        }
    }

    /// Branches to one of `entries`, which are sorted, by binary search.
    fn choose(&mut self, off: Value, entries: &[(u64, usize, Block)]) {
        let (low, high) = entries.split_at(entries.len() / 2);
        let [(first, ..), ..] = *high else { return };
        if low.is_empty() {
            self.b.ins().jump(high[0].2, &[]);
            return;
        }
        let (below, from) = (self.b.create_block(), self.b.create_block());
        let is_below = self.b.ins().icmp_imm_u(IntCC::UnsignedLessThan, off, first as i64);
        self.b.ins().brif(is_below, below, &[], from, &[]);
        self.b.switch_to_block(below);
        self.choose(off, low);
        self.b.switch_to_block(from);
        self.choose(off, high);
    }

    /// Emits the whole region.
    pub fn emit(mut self) -> (FunctionBuilder<'a>, Emitted) {
        let plan = self.plan;
        let dirty_in = dirty_on_entry(plan);
        for (k, block) in plan.blocks.iter().enumerate() {
            let target = self.blocks[k];
            self.b.switch_to_block(target);
            self.current = k;
            self.dirty = dirty_in[k];
            self.flags = FlagVal::Memory;
            self.flags_dirty = false;
            self.ended = false;
            self.fp_ready = false;
            self.fp_unused = (self.dirty.x, self.dirty.y);
            for (n, i) in block.insns.iter().enumerate() {
                self.off = u64::from(i.off);
                self.done = n as i64;
                self.rmw_host = None;
                (self.fp_result, self.fp_read) = (false, (0, 0));
                self.instruction(i);
            }
            if !self.ended {
                self.done = block.insns.len() as i64;
                self.go(block.end_off() as i64);
            }
        }
        self.finish_side_exit();
        self.b.seal_all_blocks();
        (self.b, self.emitted)
    }

    fn instruction(&mut self, i: &Insn) {
        // The instruction may turn out to have no compiled form halfway: what it emitted so far has no effect then.
        let saved = (self.dirty, self.flags.clone(), self.flags_dirty, self.fp_ready);
        // Only what usage has seen to the end has all its registers declared.
        let whole = i.sem.usage.is_some_and(|f| f(&mut Usage::default(), i).is_ok());
        if let Some(f) = i.sem.jit.filter(|_| whole) {
            self.done += 1;
            let result = f(self, i);
            self.done -= 1;
            if result.is_ok() {
                return;
            }
        }
        // Flushes emitted meanwhile are harmless to repeat.
        (self.dirty, self.flags, self.flags_dirty, self.fp_ready) = saved;
        self.helper_instruction(i);
    }

    /// Calls the interpreter's evaluation of an instruction.
    fn helper_instruction(&mut self, i: &Insn) {
        self.write_through();
        self.store_flags();
        let name = self.external(name::INSN, self.emitted.insns.len());
        self.emitted.insns.push(*i);
        let symbol = GlobalValueData::Symbol { name, offset: 0.into(), colocated: false, tls: false };
        let symbol = self.b.create_global_value(symbol);
        let insn = self.b.ins().symbol_value(I64, symbol);
        let page_ip = self.page_ip;
        self.call(Helper::Evaluate, insn, page_ip, None);
        let status = self.b.ins().load(I64, aligned(), self.cpu, at!(jit.exit_reason));
        let (stop, go_on) = (self.b.create_block(), self.b.create_block());
        self.b.set_cold_block(stop);
        if i.ends_block {
            self.b.ins().jump(stop, &[]);
        } else {
            self.b.ins().brif(status, stop, &[], go_on, &[]);
        }
        self.b.switch_to_block(stop);
        // The helper counts its own instruction.
        self.add_count(self.done);
        self.b.ins().return_(&[]);
        if i.ends_block {
            self.ended = true;
        }
        self.b.switch_to_block(go_on);
        if i.ends_block {
            // Not reached; every block needs a terminator.
            self.b.ins().return_(&[]);
            return;
        }
        self.load_registers(Regs::ALL);
        self.fp_ready = false;
        self.flags = FlagVal::Memory;
        self.flags_dirty = false;
        if let Some(var) = self.count {
            // The helper has counted the instruction already.
            let count = self.b.use_var(var);
            let count = self.b.ins().iadd_imm_s(count, -1);
            self.b.def_var(var, count);
        }
    }

    fn external(&mut self, namespace: u32, index: usize) -> ExternalName {
        let name = UserExternalName::new(namespace, index as u32);
        ExternalName::user(self.b.func.declare_imported_user_function(name))
    }

    /// Gives the variables of the registers in `set` the values that the CPU state has.
    fn load_registers(&mut self, set: Regs) {
        let cpu = self.cpu;
        let mut load = |v: Option<Variable>, mask: u16, r: usize, t: Type, offset: i32| {
            if let Some(v) = v.filter(|_| mask >> r & 1 != 0) {
                let value = self.b.ins().load(t, plain(), cpu, offset);
                self.b.def_var(v, value);
            }
        };
        for r in 0..16 {
            load(self.gpr[r], set.gpr, r, I64, gpr_at(r));
            load(self.x[r], set.x, r, I8X16, x_at(r));
            load(self.y[r], set.y, r, I8X16, x_at(r) + 16);
        }
    }

    /// A word of the CPU at an offset.
    pub(super) fn load_frame(&mut self, offset: usize) -> Value {
        self.b.ins().load(I64, aligned(), self.cpu, offset as i32)
    }

    pub(super) fn call(&mut self, helper: Helper, a: Value, b: Value, c: Option<Value>) {
        let at = at!(jit.thunks) + 8 * helper as i32;
        let f = self.b.ins().load(I64, aligned(), self.cpu, at);
        let c = c.unwrap_or(b);
        let cpu = self.cpu;
        self.b.ins().call_indirect(self.helper_sig, f, &[cpu, a, b, c]);
    }

    /// Adds the instructions completed so far, and `extra`, to the CPU's count.
    fn add_count(&mut self, extra: i64) {
        if let Some(var) = self.count {
            let count = self.b.use_var(var);
            let count = self.b.ins().iadd_imm_s(count, extra);
            self.store_count(count);
        }
    }

    fn store_count(&mut self, count: Value) {
        let total = self.b.ins().load(I64, aligned(), self.cpu, at!(jit.count));
        let total = self.b.ins().iadd(total, count);
        self.b.ins().store(aligned(), total, self.cpu, at!(jit.count));
    }

    // ---- state ----

    /// Stores every dirty register; they stay dirty, for code on a cold path.
    fn store_dirty(&mut self) {
        for r in 0..16 {
            let (cpu, d) = (self.cpu, self.dirty);
            let mut put = |v: Option<Variable>, mask: u16, offset: i32| {
                if let Some(v) = v.filter(|_| mask >> r & 1 != 0) {
                    let value = self.b.use_var(v);
                    self.b.ins().store(plain(), value, cpu, offset);
                }
            };
            self.fp_unused = (0, 0);
            put(self.gpr[r], d.gpr, gpr_at(r));
            put(self.x[r], d.x, x_at(r));
            put(self.y[r], d.y, x_at(r) + 16);
        }
    }

    /// Stores every dirty register on the hot path.
    fn write_through(&mut self) {
        self.store_dirty();
        self.dirty = Regs::default();
    }

    /// Stores the flags if the CPU state does not have them.
    fn store_flags(&mut self) {
        if self.flags_dirty {
            self.store_flags_copy();
            self.flags_dirty = false;
        }
    }

    /// The stores of [`Self::store_flags`], without noting that they are done.
    fn store_flags_copy(&mut self) {
        let (kind, operands) = match self.flags.clone() {
            FlagVal::Memory => return,
            FlagVal::Op(Flags::Cmp { a, b, .. }, n) => (lazy::kind(lazy::CMP, n), [Some(a), Some(b), None]),
            FlagVal::Op(Flags::Add { a, b, r }, n) => (lazy::kind(lazy::ADD, n), [Some(a), Some(b), Some(r)]),
            FlagVal::Op(Flags::Sub { a, b, r }, n) => (lazy::kind(lazy::SUB, n), [Some(a), Some(b), Some(r)]),
            FlagVal::Op(Flags::Logic { r }, n) => (lazy::kind(lazy::LOGIC, n), [None, None, Some(r)]),
            _ => {
                let (z, sp, co) = self.words();
                for (v, offset) in [(z, at!(s.cc_z)), (sp, at!(s.cc_sp)), (co, at!(s.cc_co))] {
                    self.b.ins().store(aligned(), v, self.cpu, offset);
                }
                (0, [None; 3])
            }
        };
        let kind = self.b.ins().iconst(I64, kind as i64);
        self.b.ins().store(aligned(), kind, self.cpu, at!(jit.lazy_kind));
        for (v, offset) in operands.into_iter().zip([at!(jit.lazy_a), at!(jit.lazy_b), at!(jit.lazy_r)]) {
            if let Some(v) = v {
                // Upper bytes are cut off when the flags are folded.
                self.b.ins().store(plain(), v, self.cpu, offset);
            }
        }
    }

    /// The lazy flag words as values at this point, without changing what is tracked.
    fn words(&mut self) -> (Value, Value, Value) {
        match self.flags.clone() {
            FlagVal::Raw(z, sp, co) => (z, sp, co),
            FlagVal::Memory => self.words_from_memory(),
            FlagVal::Op(f, n) => self.materialise(f, n),
            FlagVal::Partial(f, n, before) => {
                let now = std::mem::replace(&mut self.flags, *before);
                let (z, sp, co) = self.words();
                self.flags = FlagVal::Raw(z, sp, co);
                let words = self.materialise(f, n);
                self.flags = now;
                words
            }
        }
    }

    fn materialise(&mut self, f: Flags<Value>, bytes: u64) -> (Value, Value, Value) {
        match bytes {
            1 => flags::materialise::<Self, W8>(self, f),
            2 => flags::materialise::<Self, W16>(self, f),
            4 => flags::materialise::<Self, W32>(self, f),
            _ => flags::materialise::<Self, W64>(self, f),
        }
    }

    /// The words out of the CPU state, whose deferred form is folded first. This may be asked for when the instruction
    /// has already stored, so it must not leave to the interpreter.
    fn words_from_memory(&mut self) -> (Value, Value, Value) {
        let kind = self.b.ins().load(I64, aligned(), self.cpu, at!(jit.lazy_kind));
        let (fold, go_on) = (self.b.create_block(), self.b.create_block());
        self.b.set_cold_block(fold);
        self.b.ins().brif(kind, fold, &[], go_on, &[]);
        self.b.switch_to_block(fold);
        self.call(Helper::Fold, kind, kind, None);
        self.b.ins().jump(go_on, &[]);
        self.b.switch_to_block(go_on);
        let mut word = |offset| self.b.ins().load(I64, aligned(), self.cpu, offset);
        (word(at!(s.cc_z)), word(at!(s.cc_sp)), word(at!(s.cc_co)))
    }

    // ---- exits ----

    /// Leaves the region, before the current instruction changed anything, if `c` is not zero: the interpreter does
    /// the instruction.
    pub(super) fn side_exit_if(&mut self, c: Value) {
        let (out, go_on) = (self.b.create_block(), self.b.create_block());
        self.b.set_cold_block(out);
        self.b.ins().brif(c, out, &[], go_on, &[]);
        self.b.switch_to_block(out);
        self.leave_to_interpreter();
        self.b.switch_to_block(go_on);
    }

    /// Ends the current (cold) block by a side exit.
    fn leave_to_interpreter(&mut self) {
        self.store_dirty();
        self.store_pending_flags();
        let mut arguments = vec![BlockArg::Value(self.b.ins().iconst(I64, self.off as i64))];
        if let Some(var) = self.count {
            let count = self.b.use_var(var);
            arguments.push(BlockArg::Value(self.b.ins().iadd_imm_s(count, self.done - 1)));
        }
        let side_exit = self.side_exit;
        self.b.ins().jump(side_exit, &arguments);
    }

    fn finish_side_exit(&mut self) {
        let block = self.side_exit;
        self.b.switch_to_block(block);
        let off = self.b.block_params(block)[0];
        let rip = self.ip_value(off);
        self.b.ins().store(aligned(), rip, self.cpu, at!(s.rip));
        if let Some(&count) = self.b.block_params(block).get(1) {
            self.store_count(count);
        }
        let why = self.b.ins().iconst(I64, reason::INTERPRET as i64);
        self.b.ins().store(aligned(), why, self.cpu, at!(jit.exit_reason));
        self.b.ins().return_(&[]);
    }

    /// The instruction pointer at a page offset.
    fn ip_value(&mut self, off: Value) -> Value {
        let ip = self.b.ins().iadd(self.page_ip, off);
        if self.plan.mode.has(Mode::CODE64) { ip } else { self.b.ins().band_imm_u(ip, 0xffff_ffff) }
    }

    fn ip_at(&mut self, off: i64) -> Value {
        let off = self.b.ins().iconst(I64, off);
        self.ip_value(off)
    }

    /// Returns to the dispatch loop at page offset `off` if a kick is pending. State must be written through.
    fn poll(&mut self, off: i64) {
        let word = self.b.ins().load(I64, aligned(), self.cpu, at!(jit.kick));
        let kick = self.b.ins().atomic_load(I32, MemFlagsData::trusted(), word);
        let (out, go_on) = (self.b.create_block(), self.b.create_block());
        self.b.set_cold_block(out);
        self.b.ins().brif(kick, out, &[], go_on, &[]);
        self.b.switch_to_block(out);
        self.store_dirty();
        // An interrupt will push them.
        self.store_pending_flags();
        let rip = self.ip_at(off);
        self.b.ins().store(aligned(), rip, self.cpu, at!(s.rip));
        self.add_count(0);
        self.b.ins().return_(&[]);
        self.b.switch_to_block(go_on);
    }

    /// Counts the current block's instructions, once per way out of it.
    fn count_block(&mut self) {
        if let Some(var) = self.count {
            let count = self.b.use_var(var);
            let count = self.b.ins().iadd_imm_s(count, self.done);
            self.b.def_var(var, count);
        }
    }

    /// Ends the current Cranelift block by going on at page offset `off`: in the region if it has a block there,
    /// else by a direct branch. Flags are stored; `count` is up to date.
    fn edge(&mut self, off: i64) {
        if let Some(k) = self.plan.find(off) {
            return self.go_to_block(k);
        }
        self.store_pending_flags();
        let rip = self.ip_at(off);
        self.leave_to(rip);
        let name = if (0..=PAGE_MASK as i64).contains(&off) {
            let links = &mut self.emitted.links;
            let index = links.iter().position(|&l| l == off as u64).unwrap_or_else(|| {
                links.push(off as u64);
                links.len() - 1
            });
            self.external(name::LINK, index)
        } else {
            self.external(name::LOOKUP, 0)
        };
        let target = ExtFuncData { name, signature: self.tail_sig, colocated: true, patchable: false };
        let target = self.b.import_function(target);
        let cpu = self.cpu;
        self.b.ins().return_call(target, &[cpu]);
    }

    fn go_to_block(&mut self, k: usize) {
        let dirty = self.flags_dirty;
        if self.flags_live_in[k] {
            self.store_pending_flags();
            self.flags_dirty = false;
        }
        if k <= self.current {
            self.poll(self.plan.blocks[k].off as i64);
        }
        self.flags_dirty = dirty;
        let target = self.blocks[k];
        self.b.ins().jump(target, &[]);
    }

    /// The stores of [`Self::store_flags`] on one of several ways out of a block.
    fn store_pending_flags(&mut self) {
        if self.flags_dirty {
            self.store_flags_copy();
        }
    }

    /// Stores what leaving the region for `rip` needs in the CPU state.
    fn leave_to(&mut self, rip: Value) {
        self.store_dirty();
        self.b.ins().store(aligned(), rip, self.cpu, at!(s.rip));
        self.add_count(0);
    }

    /// Goes on at a page offset unconditionally.
    fn go(&mut self, off: i64) {
        self.count_block();
        self.edge(off);
        self.ended = true;
    }

    /// Leaves the region for a computed `rip` by the jump cache, unless a call in the region returns there.
    fn exit_to(&mut self, rip: Value) {
        let plan = self.plan;
        for k in plan.blocks[self.current].guards.iter().filter_map(|&off| plan.find(off as i64)) {
            let here = self.ip_at(plan.blocks[k].off as i64);
            let hit = self.b.ins().icmp(IntCC::Equal, rip, here);
            let (stay, go_on) = (self.b.create_block(), self.b.create_block());
            self.b.ins().brif(hit, stay, &[], go_on, &[]);
            self.b.switch_to_block(stay);
            self.go_to_block(k);
            self.b.switch_to_block(go_on);
        }
        self.leave_to(rip);
        jump_by_cache(&mut self.b, self.cpu, rip, self.tail_sig);
    }

    // ---- memory ----

    fn linear(&mut self, i: &Insn, s: u8, ea: Value) -> Result<Value, Unsupported> {
        if s >= seg::FS {
            if !self.plan.mode.has(Mode::CODE64) {
                return Err(Unsupported);
            }
            let base = self.seg_base(s);
            return Ok(self.b.ins().iadd(base, ea));
        }
        // Outside 64-bit mode CS may not be written, and perhaps not read: `i.flat` says so.
        let plain = i.flat || (s != seg::CS && self.plan.mode.has(Mode::FLAT));
        if plain { Ok(ea) } else { Err(Unsupported) }
    }

    /// The host address of `bytes` bytes at `linear`, by the TLB's `tag`; `slow` gives it on a miss.
    fn host(&mut self, linear: Value, bytes: u64, tag: usize, slow: impl FnOnce(&mut Self) -> Option<Value>) -> Value {
        let shift = size_of::<TlbEntry>().trailing_zeros();
        let index = self.b.ins().ushr_imm_u(linear, i64::from(12 - shift));
        let index = self.b.ins().band_imm_u(index, ((TLB_ENTRIES - 1) << shift) as i64);
        let entry = self.b.ins().iadd(self.tlb, index);
        let last = if bytes == 1 { linear } else { self.b.ins().iadd_imm_u(linear, bytes as i64 - 1) };
        let page = self.b.ins().band_imm_s(last, !(PAGE_MASK as i64));
        let found = self.b.ins().load(I64, aligned(), entry, tag as i32);
        let hit = self.b.ins().icmp(IntCC::Equal, found, page);
        let (fast, miss, go_on) = (self.b.create_block(), self.b.create_block(), self.b.create_block());
        self.b.set_cold_block(miss);
        let host = self.b.append_block_param(go_on, I64);
        self.b.ins().brif(hit, fast, &[], miss, &[]);
        self.b.switch_to_block(miss);
        if let Some(host) = slow(self) {
            self.b.ins().jump(go_on, &[BlockArg::Value(host)]);
        }
        self.b.switch_to_block(fast);
        let addend = self.b.ins().load(I64, aligned(), entry, offset_of!(TlbEntry, addend) as i32);
        let address = self.b.ins().iadd(addend, linear);
        self.b.ins().jump(go_on, &[BlockArg::Value(address)]);
        self.b.switch_to_block(go_on);
        host
    }

    /// Calls a slow path and leaves to the interpreter if it says so; gives the address it found.
    fn slow(&mut self, helper: Helper, linear: Value, bytes: u64, value: Option<Value>) -> Value {
        let bytes = self.b.ins().iconst(I64, bytes as i64);
        self.call(helper, linear, bytes, value);
        let found = self.b.ins().load(I64, aligned(), self.cpu, at!(jit.slow_result));
        let none = self.b.ins().icmp_imm_u(IntCC::Equal, found, 0);
        self.side_exit_if(none);
        found
    }

    fn load_host(&mut self, linear: Value, bytes: u64) -> Value {
        self.write_through();
        self.host(linear, bytes, offset_of!(TlbEntry, read), |e| Some(e.slow(Helper::Load, linear, bytes, None)))
    }

    fn store_value(&mut self, linear: Value, bytes: u64, v: Value) {
        self.write_through();
        let done = self.b.create_block();
        let host = self.host(linear, bytes, offset_of!(TlbEntry, write), |e| {
            let wide = if bytes == 16 {
                e.b.ins().store(plain(), v, e.cpu, at!(jit.bounce));
                e.b.ins().iconst(I64, 0)
            } else {
                e.extend(v, bytes)
            };
            e.slow(Helper::Store, linear, bytes, Some(wide));
            e.b.ins().jump(done, &[]);
            None
        });
        self.b.ins().store(plain(), v, host, 0);
        self.b.ins().jump(done, &[]);
        self.b.switch_to_block(done);
    }

    fn extend(&mut self, v: Value, bytes: u64) -> Value {
        if bytes == 8 { v } else { self.b.ins().uextend(I64, v) }
    }

    fn check_alignment(&mut self, linear: Value) {
        let low = self.b.ins().band_imm_u(linear, 15);
        self.side_exit_if(low);
    }

    fn resize(&mut self, v: Value, from: u64, to: u64) -> Value {
        match from.cmp(&to) {
            std::cmp::Ordering::Equal => v,
            std::cmp::Ordering::Less => self.b.ins().uextend(int_type(to), v),
            std::cmp::Ordering::Greater => self.b.ins().ireduce(int_type(to), v),
        }
    }

    /// The number that a value is known to be.
    pub(super) fn constant(&self, v: Value) -> Option<u64> {
        let dfg = &self.b.func.dfg;
        match dfg.insts[dfg.value_def(v).inst()?] {
            InstructionData::UnaryImm { opcode: Opcode::Iconst, imm } => Some(imm.bits() as u64),
            _ => None,
        }
    }

    /// The boolean whose opposite a value is known to be.
    fn negated(&self, v: Value) -> Option<Value> {
        let dfg = &self.b.func.dfg;
        match dfg.insts[dfg.value_def(v).inst()?] {
            InstructionData::Binary { opcode: Opcode::Bxor, args: [c, one] } if self.constant(one) == Some(1) => {
                Some(c)
            }
            _ => None,
        }
    }

    /// `x + k` as another value plus a constant, where `x` is such a sum itself.
    fn reassociate(&self, x: Value, k: i64) -> (Value, i64) {
        let dfg = &self.b.func.dfg;
        let sum = dfg.value_def(x).inst().map(|i| dfg.insts[i]);
        if let Some(InstructionData::Binary { opcode: Opcode::Iadd, args: [base, more] }) = sum
            && let Some(more) = self.constant(more)
        {
            return (base, k.wrapping_add(more as i64));
        }
        (x, k)
    }

    fn var(&self, vars: &[Option<Variable>; 16], r: u8) -> Variable {
        // Usage has seen every register that the semantics touch.
        vars[usize::from(r & 15)].unwrap_or(Variable::from_u32(0))
    }

    /// Keeps the value of a variable that is about to be overwritten from being dropped as unused.
    fn use_result(&mut self, var: Variable) {
        let v = self.b.use_var(var);
        self.keep(v);
    }

    /// Keeps the computation of a value whose flags in MXCSR matter: the value itself goes where nothing looks for it.
    pub(super) fn keep(&mut self, v: Value) {
        self.b.ins().store(plain(), v, self.cpu, at!(jit.bounce));
    }

    /// Bitcasts a vector to another lane type.
    pub fn lanes(&mut self, v: Value, t: Type) -> Value {
        let flags = MemFlagsData::new().with_endianness(cranelift_codegen::ir::Endianness::Little);
        if self.b.func.dfg.value_type(v) == t { v } else { self.b.ins().bitcast(t, flags, v) }
    }
}

/// Emits the way from `rip`, which the CPU state has, to the code that the jump cache knows for it; back to the
/// dispatch loop if it knows none.
pub fn jump_by_cache(b: &mut FunctionBuilder<'_>, cpu: Value, rip: Value, tail_sig: SigRef) {
    let half = b.ins().ushr_imm_u(rip, 63);
    let half = b.ins().ishl_imm_u(half, 3);
    let half = b.ins().iadd(cpu, half);
    let salt = b.ins().load(I64, aligned(), half, at!(salts));
    let key = b.ins().bxor(rip, salt);
    let page = b.ins().ushr_imm_u(rip, 12);
    let index = b.ins().bxor(rip, page);
    let index = b.ins().band_imm_u(index, JUMP_ENTRIES as i64 - 1);
    let index = b.ins().ishl_imm_u(index, i64::from(size_of::<JumpEntry>().trailing_zeros()));
    let jump = b.ins().load(I64, aligned(), cpu, at!(jit.jump));
    let entry = b.ins().iadd(jump, index);
    let found = b.ins().load(I64, aligned(), entry, offset_of!(JumpEntry, key) as i32);
    let hit = b.ins().icmp(IntCC::Equal, found, key);
    let (go, out) = (b.create_block(), b.create_block());
    b.set_cold_block(out);
    b.ins().brif(hit, go, &[], out, &[]);
    b.switch_to_block(go);
    let code = b.ins().load(I64, aligned(), entry, offset_of!(JumpEntry, code) as i32);
    b.ins().return_call_indirect(tail_sig, code, &[cpu]);
    b.switch_to_block(out);
    b.ins().return_(&[]);
}

/// The registers that may be dirty on entry to each block: written on some path since the last write-through.
fn dirty_on_entry(plan: &Plan) -> Vec<Regs> {
    let mut entry = vec![Regs::default(); plan.blocks.len()];
    loop {
        let mut changed = false;
        for (k, block) in plan.blocks.iter().enumerate() {
            let u = &block.usage;
            let out = if u.flushes { u.dirty } else { u.dirty.or(entry[k]) };
            for s in block.successors().filter_map(|s| plan.find(s)) {
                let new = entry[s].or(out);
                changed |= new != entry[s];
                entry[s] = new;
            }
        }
        if !changed {
            return entry;
        }
    }
}

/// The registers whose values are needed on entry to each block. What may be dirty is stored somewhere behind, so it
/// is needed too, on paths that did not write it as well.
fn live_on_entry(plan: &Plan, dirty: &[Regs]) -> Vec<Regs> {
    let mut live = dirty.to_vec();
    loop {
        let mut changed = false;
        for (k, block) in plan.blocks.iter().enumerate().rev() {
            let behind = block.successors().filter_map(|s| plan.find(s)).fold(Regs::default(), |l, s| l.or(live[s]));
            let new = live[k].or(block.usage.read).or(behind.without(block.usage.written));
            changed |= new != live[k];
            live[k] = new;
        }
        if !changed {
            return live;
        }
    }
}

/// Whether flags matter behind block `k`, given where they do on entry. A back edge polls for interrupts, which push
/// the flags; an indirect branch may lead anywhere.
fn flags_live_behind(plan: &Plan, live: &[bool], k: usize, block: &RegionBlock) -> bool {
    block.end == End::Exit || block.successors().any(|s| plan.find(s).is_none_or(|s| live[s] || s <= k))
}

/// Whether the flags on entry to each block matter.
fn flags_live_on_entry(plan: &Plan) -> Vec<bool> {
    let mut live = vec![false; plan.blocks.len()];
    loop {
        let mut changed = false;
        for (k, block) in plan.blocks.iter().enumerate().rev() {
            let out = flags_live_behind(plan, &live, k, block);
            let now = block.usage.flags_needed || (!block.usage.flags_killed && out);
            changed |= now != live[k];
            live[k] = now;
        }
        if !changed {
            return live;
        }
    }
}

impl Emit for JitEmit<'_> {
    type V = Value;
    type X = Value;
    type Trap = Unsupported;

    fn imm<W: Width>(&mut self, k: u64) -> Value {
        self.b.ins().iconst(ty::<W>(), W::zext(k) as i64)
    }

    fn bin<W: Width>(&mut self, op: Bin, x: Value, y: Value) -> Value {
        if let Some(k) = self.constant(y) {
            return self.bin_imm::<W>(op, x, k);
        }
        let b = self.b.ins();
        match op {
            Bin::Add => b.iadd(x, y),
            Bin::Sub => b.isub(x, y),
            Bin::And => b.band(x, y),
            Bin::Or => b.bor(x, y),
            Bin::Xor => b.bxor(x, y),
            Bin::Mul => b.imul(x, y),
            Bin::Shl => b.ishl(x, y),
            Bin::Shr => b.ushr(x, y),
            Bin::Sar => b.sshr(x, y),
            Bin::Rotl => b.rotl(x, y),
            Bin::Rotr => b.rotr(x, y),
        }
    }

    fn bin_imm<W: Width>(&mut self, op: Bin, x: Value, k: u64) -> Value {
        if let Some(a) = self.constant(x) {
            return self.imm::<W>(eval::bin::<W>(op, a, W::zext(k)));
        }
        let k = W::sext(k) as i64;
        if k == 0 && !matches!(op, Bin::And | Bin::Mul) {
            return x;
        }
        let (x, k) = match op {
            Bin::Add | Bin::Sub => self.reassociate(x, if op == Bin::Add { k } else { k.wrapping_neg() }),
            _ => (x, k),
        };
        let b = self.b.ins();
        match op {
            Bin::Add | Bin::Sub => b.iadd_imm_s(x, k),
            Bin::And => b.band_imm_s(x, k),
            Bin::Or => b.bor_imm_s(x, k),
            Bin::Xor => b.bxor_imm_s(x, k),
            Bin::Shl => b.ishl_imm_u(x, k),
            Bin::Shr => b.ushr_imm_u(x, k),
            Bin::Sar => b.sshr_imm_u(x, k),
            Bin::Mul | Bin::Rotl | Bin::Rotr => {
                let k = self.imm::<W>(k as u64);
                match op {
                    Bin::Mul => self.b.ins().imul(x, k),
                    Bin::Rotl => self.b.ins().rotl(x, k),
                    _ => self.b.ins().rotr(x, k),
                }
            }
        }
    }

    fn un<W: Width>(&mut self, op: Un, x: Value) -> Value {
        let narrow = W::BITS < 32;
        match op {
            Un::Not => self.b.ins().bnot(x),
            Un::Neg => self.b.ins().ineg(x),
            Un::Clz if narrow => {
                let wide = self.b.ins().uextend(I32, x);
                let n = self.b.ins().clz(wide);
                let n = self.b.ins().iadd_imm_s(n, i64::from(W::BITS) - 32);
                self.b.ins().ireduce(ty::<W>(), n)
            }
            Un::Clz => self.b.ins().clz(x),
            Un::Ctz if narrow => {
                let wide = self.b.ins().uextend(I32, x);
                let bounded = self.b.ins().bor_imm_u(wide, 1 << W::BITS);
                let n = self.b.ins().ctz(bounded);
                self.b.ins().ireduce(ty::<W>(), n)
            }
            Un::Ctz => self.b.ins().ctz(x),
            Un::Popcnt if narrow => {
                let wide = self.b.ins().uextend(I32, x);
                let n = self.b.ins().popcnt(wide);
                self.b.ins().ireduce(ty::<W>(), n)
            }
            Un::Popcnt => self.b.ins().popcnt(x),
            Un::Bswap if W::BITS == 16 => {
                let eight = self.b.ins().iconst(I16, 8);
                self.b.ins().rotl(x, eight)
            }
            Un::Bswap if W::BITS == 8 => x,
            Un::Bswap => self.b.ins().bswap(x),
        }
    }

    fn cmp<W: Width>(&mut self, op: Cmp, x: Value, y: Value) -> Value {
        let cc = match op {
            Cmp::Eq => IntCC::Equal,
            Cmp::Ne => IntCC::NotEqual,
            Cmp::Ltu => IntCC::UnsignedLessThan,
            Cmp::Geu => IntCC::UnsignedGreaterThanOrEqual,
            Cmp::Lts => IntCC::SignedLessThan,
            Cmp::Ges => IntCC::SignedGreaterThanOrEqual,
        };
        if let (Some(x), Some(y)) = (self.constant(x), self.constant(y)) {
            return self.imm::<W8>(eval::cmp::<W>(op, x, y).into());
        }
        self.b.ins().icmp(cc, x, y)
    }

    fn select<W: Width>(&mut self, c: Value, x: Value, y: Value) -> Value {
        if let Some(c) = self.constant(c) {
            return if c != 0 { x } else { y };
        }
        self.b.ins().select(c, x, y)
    }

    fn zext<F: Width, T: Width>(&mut self, x: Value) -> Value {
        if let Some(k) = self.constant(x) {
            return self.imm::<T>(k);
        }
        self.resize(x, F::BYTES, T::BYTES)
    }

    fn sext<F: Width, T: Width>(&mut self, x: Value) -> Value {
        if F::BITS == T::BITS { x } else { self.b.ins().sextend(ty::<T>(), x) }
    }

    fn mul_wide<W: Width>(&mut self, signed: bool, x: Value, y: Value) -> (Value, Value) {
        let low = self.b.ins().imul(x, y);
        if W::BITS == 64 {
            let high = if signed { self.b.ins().smulhi(x, y) } else { self.b.ins().umulhi(x, y) };
            return (low, high);
        }
        let t = int_type(2 * W::BYTES);
        let wide = |e: &mut Self, v| if signed { e.b.ins().sextend(t, v) } else { e.b.ins().uextend(t, v) };
        let (x, y) = (wide(self, x), wide(self, y));
        let product = self.b.ins().imul(x, y);
        let high = self.b.ins().ushr_imm_u(product, i64::from(W::BITS));
        (low, self.b.ins().ireduce(ty::<W>(), high))
    }

    fn div_wide<W: Width>(
        &mut self,
        signed: bool,
        hi: Value,
        lo: Value,
        d: Value,
    ) -> Result<(Value, Value), Unsupported> {
        let zero = self.is_zero::<W>(d);
        self.side_exit_if(zero);
        let (n, d) = if W::BITS == 64 {
            // Only dividends that fit one register; the interpreter does the others.
            let fits = if signed { self.b.ins().sshr_imm_u(lo, 63) } else { self.b.ins().iconst(I64, 0) };
            let wide = self.b.ins().icmp(IntCC::NotEqual, hi, fits);
            self.side_exit_if(wide);
            (lo, d)
        } else {
            let (hi, lo) = (self.zext::<W, W64>(hi), self.zext::<W, W64>(lo));
            let hi = self.b.ins().ishl_imm_u(hi, i64::from(W::BITS));
            let n = self.b.ins().bor(hi, lo);
            let n = if signed && W::BITS < 32 {
                let spare = i64::from(64 - 2 * W::BITS);
                let up = self.b.ins().ishl_imm_u(n, spare);
                self.b.ins().sshr_imm_u(up, spare)
            } else {
                n
            };
            (n, if signed { self.sext::<W, W64>(d) } else { self.zext::<W, W64>(d) })
        };
        if !signed {
            let q = self.b.ins().udiv(n, d);
            if W::BITS < 64 {
                let over = self.b.ins().icmp_imm_u(IntCC::UnsignedGreaterThan, q, W::MASK as i64);
                self.side_exit_if(over);
            }
            let back = self.b.ins().imul(q, d);
            let r = self.b.ins().isub(n, back);
            return Ok((self.zext::<W64, W>(q), self.zext::<W64, W>(r)));
        }
        // The one quotient that does not fit 64 bits traps on the host.
        let minimum = self.b.ins().icmp_imm_s(IntCC::Equal, n, i64::MIN);
        let minus_one = self.b.ins().icmp_imm_s(IntCC::Equal, d, -1);
        let over = self.b.ins().band(minimum, minus_one);
        self.side_exit_if(over);
        let q = self.b.ins().sdiv(n, d);
        if W::BITS < 64 {
            let cut = self.zext::<W64, W>(q);
            let again = self.sext::<W, W64>(cut);
            let over = self.b.ins().icmp(IntCC::NotEqual, again, q);
            self.side_exit_if(over);
        }
        let back = self.b.ins().imul(q, d);
        let r = self.b.ins().isub(n, back);
        Ok((self.zext::<W64, W>(q), self.zext::<W64, W>(r)))
    }

    fn gpr<W: Width>(&mut self, r: u8) -> Value {
        let v = self.var(&self.gpr, r);
        let v = self.b.use_var(v);
        self.resize(v, 8, W::BYTES)
    }

    fn set_gpr<W: Width>(&mut self, r: u8, v: Value) {
        let var = self.var(&self.gpr, r);
        let v = match W::BITS {
            64 => v,
            32 => self.b.ins().uextend(I64, v),
            _ => {
                let old = self.b.use_var(var);
                let kept = self.b.ins().band_imm_s(old, !(W::MASK as i64));
                let v = self.b.ins().uextend(I64, v);
                self.b.ins().bor(kept, v)
            }
        };
        self.b.def_var(var, v);
        self.dirty.gpr |= 1 << (r & 15);
    }

    fn gpr_high(&mut self, r: u8) -> Value {
        let v = self.var(&self.gpr, r & 3);
        let v = self.b.use_var(v);
        let v = self.b.ins().ushr_imm_u(v, 8);
        self.b.ins().ireduce(I8, v)
    }

    fn set_gpr_high(&mut self, r: u8, v: Value) {
        let var = self.var(&self.gpr, r & 3);
        let old = self.b.use_var(var);
        let kept = self.b.ins().band_imm_s(old, !0xff00);
        let v = self.b.ins().uextend(I64, v);
        let v = self.b.ins().ishl_imm_u(v, 8);
        let v = self.b.ins().bor(kept, v);
        self.b.def_var(var, v);
        self.dirty.gpr |= 1 << (r & 3);
    }

    fn seg_base(&mut self, s: u8) -> Value {
        let offset = at!(s.seg) + i32::from(s) * size_of::<crate::state::Segment>() as i32;
        let offset = offset + offset_of!(crate::state::Segment, base) as i32;
        self.b.ins().load(I64, aligned(), self.cpu, Offset32::new(offset))
    }

    fn xmm(&mut self, r: u8) -> Value {
        self.fp_read.0 |= 1 << (r & 15);
        let v = self.var(&self.x, r);
        self.b.use_var(v)
    }

    fn set_xmm(&mut self, r: u8, v: Value) {
        let bit = 1 << (r & 15);
        let var = self.var(&self.x, r);
        if self.fp_unused.0 & bit != 0 {
            self.use_result(var);
        }
        self.fp_unused.0 = self.fp_unused.0 & !bit | if self.fp_result { bit } else { 0 };
        let v = self.lanes(v, I8X16);
        self.b.def_var(var, v);
        self.dirty.x |= 1 << (r & 15);
    }

    fn ymm_high(&mut self, r: u8) -> Value {
        self.fp_read.1 |= 1 << (r & 15);
        let v = self.var(&self.y, r);
        self.b.use_var(v)
    }

    fn set_ymm_high(&mut self, r: u8, v: Value) {
        let bit = 1 << (r & 15);
        let var = self.var(&self.y, r);
        if self.fp_unused.1 & bit != 0 {
            self.use_result(var);
        }
        self.fp_unused.1 = self.fp_unused.1 & !bit | if self.fp_result { bit } else { 0 };
        let v = self.lanes(v, I8X16);
        self.b.def_var(var, v);
        self.dirty.y |= 1 << (r & 15);
    }

    fn x_imm(&mut self, k: u128) -> Value {
        let constant = self.b.func.dfg.constants.insert(k.to_le_bytes().to_vec().into());
        self.b.ins().vconst(I8X16, constant)
    }

    fn x_low(&mut self, x: Value) -> Value {
        let x = self.lanes(x, I64X2);
        self.b.ins().extractlane(x, 0)
    }

    fn x_high(&mut self, x: Value) -> Value {
        let x = self.lanes(x, I64X2);
        self.b.ins().extractlane(x, 1)
    }

    fn x_make(&mut self, low: Value, high: Value) -> Value {
        self.emit_make(low, high)
    }

    fn lane(&mut self, op: LaneOp, a: Value, b: Value, c: Value) -> Result<Value, Unsupported> {
        self.emit_lane(op, a, b, c)
    }

    fn signs(&mut self, x: Value, bytes: u8) -> Value {
        self.emit_signs(x, bytes)
    }

    fn fp(
        &mut self,
        op: FpCall,
        low: FpArgs<Value>,
        high: Option<FpArgs<Value>>,
    ) -> Result<(Value, Option<Value>), Unsupported> {
        self.emit_fp(op, low, high)
    }

    fn fp_comi(&mut self, fmt: FpFmt, _: bool, a: Value, b: Value) -> Result<(), Unsupported> {
        self.emit_comi(fmt, a, b)
    }

    fn fp_from_int(&mut self, fmt: FpFmt, wide: bool, a: Value, v: Value) -> Result<Value, Unsupported> {
        self.emit_from_int(fmt, wide, a, v)
    }

    fn fp_to_int(&mut self, fmt: FpFmt, wide: bool, truncate: bool, b: Value) -> Result<Value, Unsupported> {
        self.emit_to_int(fmt, wide, truncate, b)
    }

    fn set_flags<W: Width>(&mut self, f: Flags<Value>) {
        let n = W::BYTES;
        self.flags = match f {
            Flags::Inc { .. } | Flags::Dec { .. } => {
                let before = match std::mem::replace(&mut self.flags, FlagVal::Memory) {
                    // Of an earlier increment only the carry would be kept, which it kept itself.
                    FlagVal::Partial(Flags::Inc { .. } | Flags::Dec { .. }, _, before) => *before,
                    other => other,
                };
                FlagVal::Partial(f, n, Box::new(before))
            }
            Flags::CfOf { .. } | Flags::Cf { .. } | Flags::Zf { .. } => {
                let (z, sp, co) = self.words();
                FlagVal::Partial(f, n, Box::new(FlagVal::Raw(z, sp, co)))
            }
            Flags::Raw { z, sp, co } => FlagVal::Raw(z, sp, co),
            _ => FlagVal::Op(f, n),
        };
        self.flags_dirty = true;
    }

    fn cond(&mut self, c: Cond) -> Value {
        let fused = match self.flags.clone() {
            FlagVal::Partial(Flags::Inc { .. } | Flags::Dec { .. }, _, before) if matches!(c, Cond::B | Cond::Ae) => {
                let now = std::mem::replace(&mut self.flags, *before);
                let carry = self.cond(c);
                self.flags = now;
                Some(carry)
            }
            FlagVal::Op(f, n) | FlagVal::Partial(f, n, _) => match n {
                1 => flags::fused::<Self, W8>(self, &f, c),
                2 => flags::fused::<Self, W16>(self, &f, c),
                4 => flags::fused::<Self, W32>(self, &f, c),
                _ => flags::fused::<Self, W64>(self, &f, c),
            },
            _ => None,
        };
        fused.unwrap_or_else(|| flags::condition(self, c))
    }

    fn flags_raw(&mut self) -> (Value, Value, Value) {
        let (z, sp, co) = self.words();
        self.flags = FlagVal::Raw(z, sp, co);
        (z, sp, co)
    }

    fn load<W: Width>(&mut self, i: &Insn, s: u8, ea: Value) -> Result<Value, Unsupported> {
        let linear = self.linear(i, s, ea)?;
        let host = self.load_host(linear, W::BYTES);
        Ok(self.b.ins().load(ty::<W>(), plain(), host, 0))
    }

    fn store<W: Width>(&mut self, i: &Insn, s: u8, ea: Value, v: Value) -> Result<(), Unsupported> {
        if let Some(host) = self.rmw_host.take() {
            self.b.ins().store(plain(), v, host, 0);
            return Ok(());
        }
        let linear = self.linear(i, s, ea)?;
        self.store_value(linear, W::BYTES, v);
        Ok(())
    }

    fn load_rmw<W: Width>(&mut self, i: &Insn, s: u8, ea: Value) -> Result<Value, Unsupported> {
        let linear = self.linear(i, s, ea)?;
        self.write_through();
        let host = self.host(linear, W::BYTES, offset_of!(TlbEntry, write), |e| {
            Some(e.slow(Helper::Modify, linear, W::BYTES, None))
        });
        self.rmw_host = Some(host);
        Ok(self.b.ins().load(ty::<W>(), plain(), host, 0))
    }

    fn check_store<W: Width>(&mut self, i: &Insn, ea: Value) -> Result<(), Unsupported> {
        let linear = self.linear(i, i.seg, ea)?;
        self.write_through();
        self.host(linear, W::BYTES, offset_of!(TlbEntry, write), |e| {
            Some(e.slow(Helper::Modify, linear, W::BYTES, None))
        });
        Ok(())
    }

    fn load_x_low<W: Width>(&mut self, i: &Insn, ea: Value) -> Result<Value, Unsupported> {
        let linear = self.linear(i, i.seg, ea)?;
        let host = self.load_host(linear, W::BYTES);
        let v = self.b.ins().load(Self::element_type(W::BYTES), plain(), host, 0);
        Ok(self.low_element(v, W::BYTES))
    }

    fn load_x(&mut self, i: &Insn, ea: Value, aligned: bool) -> Result<Value, Unsupported> {
        let linear = self.linear(i, i.seg, ea)?;
        if aligned {
            self.check_alignment(linear);
        }
        let host = self.load_host(linear, 16);
        Ok(self.b.ins().load(I8X16, plain(), host, 0))
    }

    fn store_x(&mut self, i: &Insn, ea: Value, v: Value, aligned: bool) -> Result<(), Unsupported> {
        let linear = self.linear(i, i.seg, ea)?;
        if aligned {
            self.check_alignment(linear);
        }
        let v = self.lanes(v, I8X16);
        self.store_value(linear, 16, v);
        Ok(())
    }

    fn next_ip(&mut self, i: &Insn) -> Value {
        self.ip_at(i.next_off() as i64)
    }

    fn check_target(&mut self, _: &Insn, target: Value) -> Result<(), Unsupported> {
        // Outside 64-bit mode CS is flat, so every 32-bit target is inside it.
        if self.plan.mode.has(Mode::CODE64) {
            let up = self.b.ins().ishl_imm_u(target, 16);
            let back = self.b.ins().sshr_imm_u(up, 16);
            let bad = self.b.ins().icmp(IntCC::NotEqual, back, target);
            self.side_exit_if(bad);
        }
        Ok(())
    }

    fn check_relative(&mut self, _: &Insn) -> Result<(), Unsupported> {
        // A relative branch of a few bytes to 2 GiB leaves the canonical range only from its very edge, where the
        // dispatch loop raises the fetch fault at the target instead.
        Ok(())
    }

    fn set_ip(&mut self, _: &Insn, target: Value) {
        self.store_flags();
        self.count_block();
        self.exit_to(target);
        self.ended = true;
    }

    fn jump_rel(&mut self, i: &Insn) -> Result<(), Unsupported> {
        self.go(i.next_off() as i64 + i.imm as i64);
        Ok(())
    }

    fn branch_rel(&mut self, i: &Insn, c: Value) -> Result<(), Unsupported> {
        self.count_block();
        let (taken, next) = (self.b.create_block(), self.b.create_block());
        match self.negated(c) {
            Some(c) => self.b.ins().brif(c, next, &[], taken, &[]),
            None => self.b.ins().brif(c, taken, &[], next, &[]),
        };
        self.b.switch_to_block(taken);
        self.edge(i.next_off() as i64 + i.imm as i64);
        self.b.switch_to_block(next);
        self.edge(i.next_off() as i64);
        self.ended = true;
        Ok(())
    }

    fn trap_if(&mut self, c: Value, _: u8) -> Result<(), Unsupported> {
        self.side_exit_if(c);
        Ok(())
    }

    fn unsupported(&mut self) -> Unsupported {
        Unsupported
    }
}
