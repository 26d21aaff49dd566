//! The compiler's evaluator: semantics run on Cranelift values.
//!
//! Guest registers are SSA variables, loaded at the region's entry. A register that was written is *dirty* until it
//! is stored to the CPU state: before every access that may fault (so that state is precise there), before helpers,
//! and at exits. Flags are kept as the operation that made them and turned into words only where something reads
//! them; at a possible fault that happens on the cold path.

use std::collections::{HashMap, HashSet};

use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::types::{I8, I8X16, I16, I32, I64};
use cranelift_codegen::ir::{
    Block, BlockArg, ExtFuncData, ExternalName, GlobalValueData, InstBuilder, MemFlagsData, SigRef, Type,
    UserExternalName, Value,
};
use cranelift_frontend::{FunctionBuilder, Variable};

use crate::addr::PAGE_MASK;
use crate::cpu::ANCHOR;
use crate::emit::{Cond, Emit, Flags};
use crate::flags;
use crate::insn::{Insn, Mode};
use crate::jit::frame::{lazy, reason};
use crate::jit::groups::{self, Group};
use crate::jit::leave::jump_by_cache;
use crate::jit::liveness::{dirty_on_entry, flags_live_on_entry, flags_read_on_entry, live_on_entry};
use crate::jit::pages::{Inherited, Pages, bases};
use crate::jit::region::Plan;
use crate::jit::scattered;
use crate::jit::usage::{Regs, Usage};
use crate::mmu::tlb::SITES;
use crate::simd::fp::FpFmt;
use crate::width::Width;

/// Index of a helper's address in [`crate::jit::frame::JitFrame::helpers`].
#[derive(Clone, Copy)]
pub enum Helper {
    /// Resolve a load: (linear, bytes).
    Load,
    /// Do a store: (linear, bytes, value).
    Store,
    /// Resolve a read-modify-write: (linear, bytes).
    Modify,
    /// Resolve a load that must be of one page: (linear, bytes).
    Find,
    /// Evaluate an instruction: (instruction, page instruction pointer).
    Evaluate,
    /// Fold deferred flags into their words.
    Fold,
    /// Make the guest's MXCSR the host's.
    LoadFp,
    /// Evaluate instructions: (the first of them, page instruction pointer, how many).
    EvaluateRun,
    /// Make the guest's x87 control and status words the host's.
    LoadX87,
}

/// What relocations of a region refer to: namespaces of its external names.
pub mod name {
    /// A direct branch out of the region to its page offset number `index` ([`super::Emitted::links`]).
    pub const LINK: u32 = 0;
    /// Code that finds the way from RIP by the jump cache.
    pub const LOOKUP: u32 = 1;
    /// The address of instruction number `index` of [`super::Emitted::insns`].
    pub const INSN: u32 = 2;
    /// The address of the region's bridge number `index` ([`crate::jit::bridge`]).
    pub const BRIDGE: u32 = 3;
    /// Piece number `index` of host code ([`super::Emitted::pieces`]).
    pub const PIECE: u32 = 4;
    /// The region's way number `index` into another page that is code itself ([`crate::quick::cross`]).
    pub const CROSS: u32 = 5;
    /// Slow version number `index` of [`super::Emitted::slow`].
    pub const SLOW: u32 = 6;
    /// Those that tail calls refer to.
    pub const TAIL_CALLS: [u32; 4] = [LINK, LOOKUP, CROSS, SLOW];
}

/// What the code of a region refers to outside itself.
#[derive(Default)]
pub struct Emitted {
    /// Page offsets that direct branches lead to.
    pub links: Vec<u64>,
    /// Instructions that helpers evaluate.
    pub insns: Vec<Insn>,
    /// How many bridges there are.
    pub bridges: usize,
    /// Slow versions ([`super::groups`]), each from an instruction on: the block and the instruction's index in it.
    pub slow: Vec<(usize, usize)>,
    /// Pieces of host code that Cranelift has no form of, called from the region's.
    pub pieces: Vec<Vec<u8>>,
}

/// What is known of the flags at a point of the emission.
#[derive(Clone)]
pub(super) enum FlagVal {
    /// They stand in the CPU state, perhaps in deferred form.
    Memory,
    /// The words as values.
    Raw(Value, Value, Value),
    /// All were set by an operation on operands of this many bytes.
    Op(Flags<Value>, u64),
    /// Some were set by an operation, the others as before.
    Partial(Flags<Value>, u64, Box<FlagVal>),
}

/// Signatures of what a region calls and jumps to.
pub struct Signatures {
    /// Code that preserves every register.
    pub helper: SigRef,
    /// A helper itself, called where no guest register is in a host register.
    pub evaluate: SigRef,
    /// Another region.
    pub tail: SigRef,
}

/// Emits one region.
pub struct JitEmit<'a> {
    /// The function being built.
    pub b: FunctionBuilder<'a>,
    pub(super) plan: &'a Plan,
    /// What the function has for an argument: the CPU's [`ANCHOR`].
    pub(super) cpu: Value,
    /// The current soft-TLB table; a helper's instruction may change which it is.
    pub(super) tlb: Variable,
    pub(super) gpr: [Option<Variable>; 16],
    pub(super) x: [Option<Variable>; 16],
    pub(super) y: [Option<Variable>; 16],
    /// Instruction pointer of the page's first byte.
    pub(super) page_ip: Value,
    /// Instructions completed since the region was entered, up to the current block, if they are counted.
    pub(super) count: Option<Variable>,
    /// Cranelift blocks of the plan's blocks.
    pub(super) blocks: Vec<Block>,
    /// Exit for "interpret the instruction at this offset": (offset, count).
    pub(super) side_exit: Block,
    pub(super) helper_sig: SigRef,
    pub(super) evaluate_sig: SigRef,
    pub(super) tail_sig: SigRef,
    /// Registers that the CPU state does not have yet.
    pub(super) dirty: Regs,
    pub(super) flags: FlagVal,
    pub(super) flags_dirty: bool,
    /// 64-bit values that integers of the current block are zero-extended to already.
    pub(super) wide: HashMap<Value, Value>,
    /// What the low bytes, so many, of the current block's register values are, where they were put together of parts.
    pub(super) low: HashMap<(Value, u64), Value>,
    /// Page offset of the instruction being emitted, and how many of the block precede it.
    pub(super) off: u64,
    pub(super) done: i64,
    /// Index of the block being emitted.
    pub(super) current: usize,
    /// Whether control may come back to each block.
    pub(super) in_loops: Vec<bool>,
    /// Where accesses of the current block have been found.
    pub(super) pages: Pages,
    /// Whether the access being emitted, where it is not where it is looked for, is looked up by a thunk.
    pub(super) by_thunk: bool,
    /// Which pages are known on entry to blocks that have one way in, which was emitted before them.
    pub(super) inherited: Vec<Inherited>,
    /// The registers that each block addresses memory by.
    pub(super) bases: Vec<u16>,
    /// The next access of a loop's number ([`crate::mmu::tlb::Sites`]).
    pub(super) next_site: usize,
    /// Which instructions of each block make [scattered](super::scattered) accesses, and whether the current one does.
    scattered: Vec<Vec<bool>>,
    pub(super) is_scattered: bool,
    /// The groups of accesses of each block.
    pub(super) groups: Vec<Vec<Group>>,
    /// Registers that the CPU state may lack on entry to each block.
    pub(super) dirty_in: Vec<Regs>,
    /// What is known of the flags on entry to blocks that have one way in, which was emitted before them, and whether
    /// the CPU state lacks them.
    pub(super) handed_down: Vec<Option<(FlagVal, bool)>>,
    /// The flags that are needed on entry to each block ([`crate::jit::usage::flag_part`]).
    pub(super) flags_live_in: Vec<u8>,
    /// Those of them that the region reads behind that entry, faults aside.
    pub(super) flags_read_in: Vec<u8>,
    /// Host address that the last `load_rmw` of this instruction resolved.
    pub(super) rmw_host: Option<Value>,
    /// What it loaded, for a locked instruction beside other vCPUs.
    pub(super) locked: Option<Value>,
    /// Whether the block has its terminator.
    pub(super) ended: bool,
    /// Whether the host's MXCSR is the guest's at this point.
    pub(super) fp_ready: bool,
    /// Vector registers whose value may be a floating-point result that nothing has used yet: bits of low and high
    /// halves. What sets flags in MXCSR must be computed even if its result is overwritten.
    pub(super) fp_unused: (u16, u16),
    /// The same of registers that the instruction being emitted has read.
    pub(super) fp_read: (u16, u16),
    /// Whether the instruction being emitted computes such results.
    pub(super) fp_result: bool,
    /// Vectors whose elements, those that the format names, are known to be no denormals: by how they were computed,
    /// and, in the current block, by having been looked at.
    pub(super) regular: HashSet<(Value, FpFmt)>,
    pub(super) seen_regular: HashSet<(Value, FpFmt)>,
    pub(super) emitted: Emitted,
}

pub(super) fn ty<W: Width>() -> Type {
    int_type(W::BYTES)
}

pub(super) fn int_type(bytes: u64) -> Type {
    match bytes {
        1 => I8,
        2 => I16,
        4 => I32,
        _ => I64,
    }
}

/// Accesses to the CPU state and to guest RAM behind a checked TLB entry cannot trap.
pub(super) fn plain() -> MemFlagsData {
    MemFlagsData::new().with_notrap()
}

pub(super) fn aligned() -> MemFlagsData {
    MemFlagsData::trusted()
}

/// Offset of a field of the CPU from what compiled code holds ([`ANCHOR`](crate::cpu::ANCHOR)).
macro_rules! at {
    ($($field:tt)+) => { std::mem::offset_of!($crate::cpu::Cpu, $($field)+) as i32 - $crate::cpu::ANCHOR };
}
pub(crate) use at;

const fn gpr_at(r: usize) -> i32 {
    at!(s.gpr) + 8 * r as i32
}

const fn x_at(r: usize) -> i32 {
    at!(s.ymm) + 32 * r as i32
}

impl<'a> JitEmit<'a> {
    /// Starts the function: declares variables for the registers that the region uses, and its blocks.
    pub fn new(mut b: FunctionBuilder<'a>, plan: &'a Plan, signatures: Signatures) -> JitEmit<'a> {
        let Signatures { helper: helper_sig, evaluate: evaluate_sig, tail: tail_sig } = signatures;
        let start = b.create_block();
        b.append_block_params_for_function_params(start);
        b.switch_to_block(start);
        let cpu = b.block_params(start)[0];
        let rip = b.ins().load(I64, aligned(), cpu, at!(s.rip));
        let page_ip = b.ins().band_imm_s(rip, !(PAGE_MASK as i64));
        let tlb = b.declare_var(I64);
        let table = b.ins().load(I64, aligned(), cpu, at!(jit.tlb));
        b.def_var(tlb, table);
        let count = plan.options.counted.then(|| b.declare_var(I64));
        let used = plan.blocks.iter().fold(Regs::default(), |u, block| u.or(block.usage.used));
        let mut variables =
            |mask: u16, t: Type| std::array::from_fn(|r| (mask >> r & 1 != 0).then(|| b.declare_var(t)));
        let (gpr, x, y) = (variables(used.gpr, I64), variables(used.x, I8X16), variables(used.y, I8X16));
        let blocks: Vec<Block> = plan.blocks.iter().map(|_| b.create_block()).collect();
        let side_exit = b.create_block();
        b.set_cold_block(side_exit);
        b.append_block_param(side_exit, I64);
        if plan.options.counted {
            b.append_block_param(side_exit, I64);
        }
        let in_loops = plan.in_loops();
        let groups = groups::of_all(plan);
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
            evaluate_sig,
            tail_sig,
            dirty: Regs::default(),
            flags: FlagVal::Memory,
            flags_dirty: false,
            wide: HashMap::new(),
            low: HashMap::new(),
            off: plan.blocks[0].off,
            done: 0,
            current: 0,
            pages: Pages::default(),
            by_thunk: false,
            inherited: vec![Inherited::new(); plan.blocks.len()],
            bases: plan.blocks.iter().map(|b| b.insns.iter().fold(0, |set, i| set | bases(i))).collect(),
            next_site: first_site(plan),
            scattered: scattered::of_all(plan, &in_loops),
            is_scattered: false,
            dirty_in: dirty_on_entry(plan, &in_loops),
            in_loops,
            handed_down: vec![None; plan.blocks.len()],
            flags_live_in: flags_live_on_entry(plan, &groups),
            groups,
            flags_read_in: flags_read_on_entry(plan),
            rmw_host: None,
            locked: None,
            ended: false,
            fp_ready: false,
            fp_unused: (0, 0),
            fp_read: (0, 0),
            fp_result: false,
            regular: HashSet::new(),
            seen_regular: HashSet::new(),
            emitted: Emitted::default(),
        };
        let off = e.b.ins().band_imm_u(rip, PAGE_MASK as i64);
        e.enter(off);
        e
    }

    /// Leads to the entry that RIP's page offset names, and emits the entries.
    pub(super) fn enter(&mut self, off: Value) {
        let live_in = live_on_entry(self.plan, &self.dirty_in);
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
    pub(super) fn choose(&mut self, off: Value, entries: &[(u64, usize, Block)]) {
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
        for (k, block) in plan.blocks.iter().enumerate() {
            let target = self.blocks[k];
            self.b.switch_to_block(target);
            self.current = k;
            self.dirty = self.dirty_in[k];
            (self.flags, self.flags_dirty) = self.handed_down[k].take().unwrap_or((FlagVal::Memory, false));
            self.ended = false;
            self.wide.clear();
            self.low.clear();
            self.seen_regular.clear();
            self.pages.begin(std::mem::take(&mut self.inherited[k]));
            let below = self.bases_below(k);
            self.fp_ready = false;
            self.fp_unused = (self.dirty.x, self.dirty.y);
            let mut rest = &block.insns[..];
            while let Some((i, behind)) = rest.split_first() {
                self.off = u64::from(i.off);
                let n = block.insns.len() - rest.len();
                self.done = n as i64;
                self.rmw_host = None;
                self.locked = None;
                self.is_scattered = self.scattered[k].get(n) == Some(&true);
                self.look_up_groups(n);
                self.pages.ahead(behind, below);
                (self.fp_result, self.fp_read) = (false, (0, 0));
                rest = match self.x87_run(rest) {
                    Some(behind) => behind,
                    None => {
                        self.instruction(i);
                        behind
                    }
                };
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

    /// Whether what is known at the end of block `from` is known at the beginning of `to`.
    fn hands_down(&self, from: usize, to: usize) -> bool {
        to > from && self.plan.only_from(to) == Some(from)
    }

    /// The registers that blocks which are entered from block `k` alone address memory by.
    fn bases_below(&self, k: usize) -> u16 {
        let below = self.plan.blocks[k].successors().filter_map(|off| self.plan.find(off));
        let below = below.filter(|&to| !self.in_loops[to] && self.hands_down(k, to));
        below.fold(0, |set, to| set | self.bases[to])
    }

    pub(super) fn instruction(&mut self, i: &Insn) {
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
    pub(super) fn helper_instruction(&mut self, i: &Insn) {
        self.write_through();
        self.store_flags();
        let insn = self.keep_insns(std::slice::from_ref(i));
        let page_ip = self.page_ip;
        let cpu = self.b.ins().iadd_imm_s(self.cpu, -i64::from(ANCHOR));
        // Registers are in the CPU state here, and come from there afterwards: nothing needs to be preserved.
        let evaluate = self.load_frame(at!(jit.helpers) + 8 * Helper::Evaluate as i32);
        self.b.ins().call_indirect(self.evaluate_sig, evaluate, &[cpu, insn, page_ip, page_ip]);
        let status = self.b.ins().load(I64, aligned(), self.cpu, at!(jit.exit_reason));
        if i.ends_block {
            self.leave_behind_helper(status);
            self.ended = true;
            return;
        }
        let (stop, go_on) = (self.b.create_block(), self.b.create_block());
        self.b.set_cold_block(stop);
        self.b.ins().brif(status, stop, &[], go_on, &[]);
        self.b.switch_to_block(stop);
        self.leave_behind_helper(status);
        self.b.switch_to_block(go_on);
        let table = self.b.ins().load(I64, aligned(), self.cpu, at!(jit.tlb));
        self.b.def_var(self.tlb, table);
        self.pages.forget();
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

    /// Keeps instructions for a helper; the address of the first.
    pub(super) fn keep_insns(&mut self, insns: &[Insn]) -> Value {
        let first = self.address(name::INSN, self.emitted.insns.len());
        self.emitted.insns.extend(insns);
        first
    }

    pub(super) fn external(&mut self, namespace: u32, index: usize) -> ExternalName {
        let name = UserExternalName::new(namespace, index as u32);
        ExternalName::user(self.b.func.declare_imported_user_function(name))
    }

    /// The address that a name stands for.
    pub(super) fn address(&mut self, namespace: u32, index: usize) -> Value {
        let name = self.external(namespace, index);
        let symbol = GlobalValueData::Symbol { name, offset: 0.into(), colocated: false, tls: false };
        let symbol = self.b.create_global_value(symbol);
        self.b.ins().symbol_value(I64, symbol)
    }

    /// Gives the variables of the registers in `set` the values that the CPU state has.
    pub(super) fn load_registers(&mut self, set: Regs) {
        let cpu = self.cpu;
        let mut load = |v: Option<Variable>, mask: u16, r: usize, t: Type, offset: i32| {
            if let Some(v) = v.filter(|_| mask >> r & 1 != 0) {
                let value = self.b.ins().load(t, plain(), cpu, offset);
                self.b.def_var(v, value);
            }
        };
        for r in 0..16 {
            if set.gpr >> r & 1 != 0 {
                self.pages.changed(r as u8);
            }
            load(self.gpr[r], set.gpr, r, I64, gpr_at(r));
            load(self.x[r], set.x, r, I8X16, x_at(r));
            load(self.y[r], set.y, r, I8X16, x_at(r) + 16);
        }
    }

    /// Leaves the region after a helper has evaluated an instruction: for where RIP leads now if `status` says that
    /// nothing else has to be done first.
    pub(super) fn leave_behind_helper(&mut self, status: Value) {
        // The helper counts its own instruction.
        self.add_count(self.done);
        let onward = self.b.ins().icmp_imm_u(IntCC::Equal, status, reason::ONWARD as i64);
        let (go, out) = (self.b.create_block(), self.b.create_block());
        self.b.set_cold_block(out);
        self.b.ins().brif(onward, go, &[], out, &[]);
        self.b.switch_to_block(go);
        self.tail_call(name::LOOKUP, 0);
        self.b.switch_to_block(out);
        self.b.ins().return_(&[]);
    }

    /// Ends the current Cranelift block by a direct branch to a name.
    pub(super) fn tail_call(&mut self, namespace: u32, index: usize) {
        let name = self.external(namespace, index);
        let target = ExtFuncData { name, signature: self.tail_sig, colocated: true, patchable: false };
        let target = self.b.import_function(target);
        let cpu = self.cpu;
        self.b.ins().return_call(target, &[cpu]);
    }

    /// A word of the CPU at an offset.
    pub(super) fn load_frame(&mut self, offset: i32) -> Value {
        self.b.ins().load(I64, aligned(), self.cpu, offset)
    }

    pub(super) fn call(&mut self, helper: Helper, a: Value, b: Value, c: Option<Value>) {
        self.call_thunk(helper as usize, a, b, c);
    }

    /// Calls thunk number `thunk` of [`crate::jit::frame::JitFrame::thunks`].
    pub(super) fn call_thunk(&mut self, thunk: usize, a: Value, b: Value, c: Option<Value>) {
        let at = at!(jit.thunks) + 8 * thunk as i32;
        let f = self.b.ins().load(I64, aligned(), self.cpu, at);
        let c = c.unwrap_or(b);
        let cpu = self.cpu;
        self.b.ins().call_indirect(self.helper_sig, f, &[cpu, a, b, c]);
    }

    /// Adds the instructions completed so far, and `extra`, to the CPU's count.
    pub(super) fn add_count(&mut self, extra: i64) {
        if let Some(var) = self.count {
            let count = self.b.use_var(var);
            let count = self.b.ins().iadd_imm_s(count, extra);
            self.store_count(count);
        }
    }

    pub(super) fn store_count(&mut self, count: Value) {
        let total = self.b.ins().load(I64, aligned(), self.cpu, at!(jit.count));
        let total = self.b.ins().iadd(total, count);
        self.b.ins().store(aligned(), total, self.cpu, at!(jit.count));
    }

    // ---- state ----

    /// Stores every dirty register; they stay dirty, for code on a cold path.
    pub(super) fn store_dirty(&mut self) {
        self.fp_unused = (0, 0);
        for r in 0..16 {
            let (cpu, d) = (self.cpu, self.dirty);
            let mut put = |v: Option<Variable>, mask: u16, offset: i32| {
                if let Some(v) = v.filter(|_| mask >> r & 1 != 0) {
                    let value = self.b.use_var(v);
                    self.b.ins().store(plain(), value, cpu, offset);
                }
            };
            put(self.gpr[r], d.gpr, gpr_at(r));
            put(self.x[r], d.x, x_at(r));
            put(self.y[r], d.y, x_at(r) + 16);
        }
    }

    /// Before an access that may leave the region: stores every dirty register on the hot path, so that the many cold
    /// ones need not; in a loop the cold ones do.
    pub(super) fn before_access(&mut self) {
        if !self.in_loops[self.current] {
            self.write_through();
        }
    }

    /// Stores every dirty register on the hot path.
    pub(super) fn write_through(&mut self) {
        self.store_dirty();
        self.dirty = Regs::default();
    }

    /// Stores the flags if the CPU state does not have them.
    pub(super) fn store_flags(&mut self) {
        if self.flags_dirty {
            self.store_flags_copy();
            self.flags_dirty = false;
        }
    }

    /// The stores of [`Self::store_flags`], without noting that they are done.
    pub(super) fn store_flags_copy(&mut self) {
        let (f, n, before) = match self.flags.clone() {
            FlagVal::Memory => return,
            FlagVal::Op(f, n) => (f, n, None),
            FlagVal::Partial(f @ (Flags::Inc { .. } | Flags::Dec { .. }), n, before) => (f, n, Some(*before)),
            _ => return self.store_words(),
        };
        let count = |n: u32| self.b.ins().iconst(I64, i64::from(n));
        let Some((mut op, mut operands)) = lazy::deferred(f, count) else { return self.store_words() };
        match before {
            None => {}
            Some(FlagVal::Memory) => self.settle_carry(),
            Some(before) => {
                let now = std::mem::replace(&mut self.flags, before);
                let carry = self.cond(Cond::B);
                self.flags = now;
                op = if op == lazy::DEC_ONLY { lazy::DEC } else { lazy::INC };
                operands[1] = Some(self.b.ins().uextend(I64, carry));
            }
        }
        let kind = self.b.ins().iconst(I64, lazy::kind(op, n) as i64);
        self.b.ins().store(aligned(), kind, self.cpu, at!(jit.lazy_kind));
        for (v, offset) in operands.into_iter().zip([at!(jit.lazy_a), at!(jit.lazy_b), at!(jit.lazy_r)]) {
            if let Some(v) = v {
                // Upper bytes are cut off when the flags are folded.
                self.b.ins().store(plain(), v, self.cpu, offset);
            }
        }
    }

    /// Makes the words in the CPU state have the carry, if its flags are deferred in a form in which they have not.
    fn settle_carry(&mut self) {
        let kind = self.b.ins().load(I64, aligned(), self.cpu, at!(jit.lazy_kind));
        let below = self.b.ins().iadd_imm_s(kind, -1);
        let elsewhere = self.b.ins().icmp_imm_u(IntCC::UnsignedLessThan, below, lazy::CARRY_IN_WORDS as i64 - 1);
        let (fold, go_on) = (self.b.create_block(), self.b.create_block());
        self.b.set_cold_block(fold);
        self.b.ins().brif(elsewhere, fold, &[], go_on, &[]);
        self.b.switch_to_block(fold);
        self.call(Helper::Fold, kind, kind, None);
        self.b.ins().jump(go_on, &[]);
        self.b.switch_to_block(go_on);
    }

    /// Stores the flags as their words.
    fn store_words(&mut self) {
        let (z, sp, co) = self.words();
        let none = self.b.ins().iconst(I64, 0);
        let words = [(z, at!(s.cc_z)), (sp, at!(s.cc_sp)), (co, at!(s.cc_co)), (none, at!(jit.lazy_kind))];
        for (v, offset) in words {
            self.b.ins().store(aligned(), v, self.cpu, offset);
        }
    }

    /// The lazy flag words as values at this point, without changing what is tracked.
    pub(super) fn words(&mut self) -> (Value, Value, Value) {
        match self.flags.clone() {
            FlagVal::Raw(z, sp, co) => (z, sp, co),
            FlagVal::Memory => self.words_from_memory(),
            FlagVal::Op(f, n) => flags::materialise_sized(self, f, n),
            FlagVal::Partial(f, n, before) => {
                let now = std::mem::replace(&mut self.flags, *before);
                let (z, sp, co) = self.words();
                self.flags = FlagVal::Raw(z, sp, co);
                let words = flags::materialise_sized(self, f, n);
                self.flags = now;
                words
            }
        }
    }

    /// The words out of the CPU state, whose deferred form is folded first. This may be asked for when the instruction
    /// has already stored, so it must not leave to the interpreter.
    pub(super) fn words_from_memory(&mut self) -> (Value, Value, Value) {
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
    pub(super) fn leave_to_interpreter(&mut self) {
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

    pub(super) fn finish_side_exit(&mut self) {
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
    pub(super) fn ip_value(&mut self, off: Value) -> Value {
        let ip = self.b.ins().iadd(self.page_ip, off);
        if self.plan.mode.has(Mode::CODE64) { ip } else { self.b.ins().band_imm_u(ip, 0xffff_ffff) }
    }

    pub(super) fn ip_at(&mut self, off: i64) -> Value {
        let off = self.b.ins().iconst(I64, off);
        self.ip_value(off)
    }

    /// What other threads request now.
    pub(super) fn kick(&mut self) -> Value {
        let word = self.b.ins().load(I64, aligned(), self.cpu, at!(jit.kick));
        self.b.ins().atomic_load(I32, MemFlagsData::trusted(), word)
    }

    /// Returns to the dispatch loop at page offset `off` if a kick is pending. State must be written through.
    pub(super) fn poll(&mut self, off: i64) {
        let kick = self.kick();
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

    /// Before the ways out of a block: stores what its accesses would have, had they not been known to do well, and counts
    /// its instructions.
    pub(super) fn end_block(&mut self) {
        if self.pages.covers_any() && !self.in_loops[self.current] {
            self.write_through();
        }
        if let Some(var) = self.count {
            let count = self.b.use_var(var);
            let count = self.b.ins().iadd_imm_s(count, self.done);
            self.b.def_var(var, count);
        }
    }

    /// Ends the current Cranelift block by going on at page offset `off`: in the region if it has a block there,
    /// else by a direct branch. Flags are stored; `count` is up to date.
    pub(super) fn edge(&mut self, off: i64) {
        if let Some(k) = self.plan.find(off) {
            return self.go_to_block(k);
        }
        self.store_pending_flags();
        let rip = self.ip_at(off);
        self.leave_to(rip, 0);
        if (0..=PAGE_MASK as i64).contains(&off) {
            let links = &mut self.emitted.links;
            let index = links.iter().position(|&l| l == off as u64).unwrap_or_else(|| {
                links.push(off as u64);
                links.len() - 1
            });
            self.tail_call(name::LINK, index);
        } else {
            self.cross(rip);
        }
    }

    pub(super) fn go_to_block(&mut self, k: usize) {
        let dirty = self.flags_dirty;
        if self.hands_down(self.current, k) {
            self.handed_down[k] = Some((self.flags.clone(), dirty));
            self.inherited[k] = self.pages.hand_down();
        } else if self.flags_read_in[k] != 0 {
            self.store_flag_words();
            self.flags_dirty = false;
        } else if self.flags_live_in[k] != 0 {
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

    /// As [`Self::store_pending_flags`], in the form that a reader needs no helper to understand.
    fn store_flag_words(&mut self) {
        if self.flags_dirty {
            self.store_words();
        }
    }

    /// The stores of [`Self::store_flags`] on one of several ways out of a block.
    pub(super) fn store_pending_flags(&mut self) {
        if self.flags_dirty {
            self.store_flags_copy();
        }
    }

    /// Stores what leaving the region for `rip` needs in the CPU state, when as many instructions of the current block are
    /// completed and not counted yet.
    pub(super) fn leave_to(&mut self, rip: Value, done: i64) {
        self.store_dirty();
        self.b.ins().store(aligned(), rip, self.cpu, at!(s.rip));
        self.add_count(done);
    }

    /// Goes on at a page offset unconditionally.
    pub(super) fn go(&mut self, off: i64) {
        self.end_block();
        self.edge(off);
        self.ended = true;
    }

    /// Goes on at that of the blocks `targets`, which are sorted, whose offset is `off`, if there is one.
    fn compare_targets(&mut self, off: Value, targets: &[usize], elsewhere: Block) {
        let (low, high) = targets.split_at(targets.len() / 2);
        let [first, ..] = *high else { return };
        let at = self.plan.blocks[first].off as i64;
        if low.is_empty() {
            let here = self.b.create_block();
            let hit = self.b.ins().icmp_imm_s(IntCC::Equal, off, at);
            self.b.ins().brif(hit, here, &[], elsewhere, &[]);
            self.b.switch_to_block(here);
            return self.go_to_block(first);
        }
        let (below, from) = (self.b.create_block(), self.b.create_block());
        let is_below = self.b.ins().icmp_imm_u(IntCC::UnsignedLessThan, off, at);
        self.b.ins().brif(is_below, below, &[], from, &[]);
        self.b.switch_to_block(below);
        self.compare_targets(off, low, elsewhere);
        self.b.switch_to_block(from);
        self.compare_targets(off, high, elsewhere);
    }

    /// Leaves the region for a computed `rip` by the jump cache, unless a call in the region returns there.
    pub(super) fn exit_to(&mut self, rip: Value) {
        let plan = self.plan;
        let guards = plan.blocks[self.current].guards.iter().filter_map(|&off| plan.find(off as i64));
        let mut guards: Vec<usize> = guards.collect();
        guards.sort_by_key(|&k| plan.blocks[k].off);
        if !guards.is_empty() {
            let elsewhere = self.b.create_block();
            let off = self.b.ins().isub(rip, self.page_ip);
            self.compare_targets(off, &guards, elsewhere);
            self.b.switch_to_block(elsewhere);
        }
        self.store_pending_flags();
        self.leave_to(rip, 0);
        jump_by_cache(&mut self.b, self.cpu, rip, self.tail_sig);
    }
}

/// Where a region's sites begin: regions that run in turns should not have the same.
fn first_site(plan: &Plan) -> usize {
    ((plan.gpa >> 4).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize % SITES
}
