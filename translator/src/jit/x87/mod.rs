//! x87 instructions in compiled code: on an x86-64 host, runs of them are done by the host's own unit.
//!
//! The unit has the guest's control and status words from the first run on ([`crate::jit::frame`]), and its registers
//! come out of the CPU state and go back there in each run. A run is done as a whole: where the unit cannot be used, the
//! stack is not as it takes it to be, or an operand does not lie in one page of plain RAM, nothing has happened yet, and a
//! helper evaluates its instructions one by one.

mod piece;
mod run;
#[cfg(test)]
mod tests;

use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::types::{I16, I64};
use cranelift_codegen::ir::{AbiParam, Block, BlockArg, ExtFuncData, InstBuilder, Signature, Value};
use cranelift_codegen::isa::CallConv;

use crate::emit::{Emit, Flags, Word};
use crate::exception::{Exception, vector};
use crate::insn::{Insn, Mode};
use crate::jit::Unsupported;
use crate::jit::emit::{FlagVal, Helper, JitEmit, aligned, at, name, plain};
use crate::jit::frame::x87::{LOADED, TAGS, TOP, TOP_AT};
use crate::jit::host::{Host, Unit};
use crate::jit::usage::{Regs, Usage};
use crate::jit::values::word_at;
use crate::semantics::x87::operation;
use crate::state::{gpr, seg};
use crate::width::{W8, W16};
use crate::x87::{F80, Memory, Op, control, status};
use run::{Argument, Operand, Run, condition};

/// log2 of the bytes from a register to the next in the CPU state.
const REGISTER_SHIFT: u32 = size_of::<F80>().trailing_zeros();
/// Where TOP is in the status word.
const STATUS_TOP: i64 = status::TOP.trailing_zeros() as i64;

/// The operation of an instruction that compiled code has a form of on `host`.
fn compiled(i: &Insn, host: Host) -> Option<Op> {
    operation(i).filter(|&op| host.unit == Unit::Exact && run::fits(op))
}

/// What an instruction reads, writes and may fault on.
pub fn usage(u: &mut Usage, i: &Insn) -> Result<(), Unsupported> {
    let op = compiled(i, u.host).ok_or(Unsupported)?;
    if op.memory() == Memory::None {
        u.fault_if((), Exception::plain(vector::NM))?;
    } else {
        u.ea(i);
        u.flush();
    }
    match op {
        Op::Move { condition: c, not, .. } => u.cond(condition(c, not)),
        Op::CompareFlags { .. } => u.set_flags::<W8>(Flags::Raw { z: (), sp: (), co: () }),
        Op::StatusToAx => u.set_gpr::<W16>(gpr::RAX, ()),
        _ => {}
    }
    Ok(())
}

/// Where control goes in the course of a run.
struct Ways {
    /// Where a helper evaluates it.
    helper: Block,
    /// Where it is done; with the flags' words if it sets them.
    done: Block,
}

impl JitEmit<'_> {
    /// Emits the run that `insns` begin with, if they do; the instructions behind it.
    pub(super) fn x87_run<'i>(&mut self, insns: &'i [Insn]) -> Option<&'i [Insn]> {
        let host = Host::this();
        let run = Run::of(insns, |i| compiled(i, host));
        let (insns, behind) = insns.split_at(run.steps.len());
        if insns.is_empty() {
            return None;
        }
        let piece = piece::assemble(&run);
        if piece.is_none() && !is_bare(&run) {
            return None;
        }
        self.settle_comparison();
        let mut words = Vec::new();
        for &argument in &run.arguments {
            words.push(match argument {
                Argument::Operand(Operand { step, .. }) => {
                    let ea = self.ea(&insns[step]);
                    self.linear(&insns[step], insns[step].seg, ea).ok()?
                }
                Argument::Condition(c) => {
                    let c = self.cond(c);
                    self.b.ins().uextend(I64, c)
                }
            });
        }
        let last_operand = run.last().1.map(|n| self.ea(&insns[n]));
        if run.arguments.iter().any(|a| matches!(a, Argument::Operand(_))) {
            self.before_access();
        }
        let ways = Ways { helper: self.b.create_block(), done: self.b.create_block() };
        self.b.set_cold_block(ways.helper);
        let set = run.sets_flags().then(|| [(); 3].map(|()| self.b.append_block_param(ways.done, I64)));
        let before = (self.flags.clone(), self.flags_dirty, self.dirty);

        let state = self.x87_ready(&run, &ways);
        for (word, &argument) in words.iter_mut().zip(&run.arguments) {
            if let Argument::Operand(Operand { bytes, store, .. }) = argument {
                *word = self.host_of(*word, bytes.into(), store, ways.helper);
            }
        }
        self.load_control(&run, &words, &ways);
        if let Some(piece) = piece {
            self.call_piece(piece, state, &words);
        }
        let state = self.x87_after(&run, state);
        self.x87_pointers(&run, insns, last_operand);
        self.x87_status(&run, &words, state);
        let flags: Vec<BlockArg> = self.x87_flags(&run).into_iter().flatten().map(BlockArg::Value).collect();
        self.b.ins().jump(ways.done, &flags);

        let dirty = self.dirty;
        (self.flags, self.flags_dirty, self.dirty) = before;
        self.x87_by_helper(&run, insns, &ways);
        self.dirty = dirty;
        self.b.switch_to_block(ways.done);
        if let Some([z, sp, co]) = set {
            self.flags = FlagVal::Raw(z, sp, co);
            self.flags_dirty = true;
        }
        self.fp_ready = false;
        Some(behind)
    }

    /// Makes sure that the unit is the guest's, with the stack as the run takes it to be; its state
    /// ([`crate::jit::frame::JitFrame::x87_state`]).
    fn x87_ready(&mut self, run: &Run, ways: &Ways) -> Value {
        let (ready, load) = (self.b.create_block(), self.b.create_block());
        self.b.set_cold_block(load);
        let state = self.b.append_block_param(ready, I64);
        for otherwise in [load, ways.helper] {
            let now = self.b.ins().load(I64, aligned(), self.cpu, at!(jit.x87_state));
            let known = self.b.ins().band_imm_u(now, (LOADED | u64::from(run.full | run.empty)) as i64);
            let good = self.b.ins().icmp_imm_u(IntCC::Equal, known, (LOADED | u64::from(run.full)) as i64);
            self.b.ins().brif(good, ready, &[BlockArg::Value(now)], otherwise, &[]);
            if otherwise == load {
                self.b.switch_to_block(load);
                self.call(Helper::LoadX87, now, now, None);
            }
        }
        self.b.switch_to_block(ready);
        state
    }

    /// A control word that the run begins by loading.
    fn load_control(&mut self, run: &Run, words: &[Value], ways: &Ways) {
        let (Some(Op::LoadControl), Some(&from)) = (run.steps.first().map(|s| s.op), words.first()) else { return };
        let new = self.b.ins().uload16(I64, plain(), from, 0);
        let masks = self.b.ins().band_imm_u(new, i64::from(status::EXCEPTIONS));
        let masked = self.b.ins().icmp_imm_u(IntCC::Equal, masks, i64::from(status::EXCEPTIONS));
        let go_on = self.b.create_block();
        self.b.ins().brif(masked, go_on, &[], ways.helper, &[]);
        self.b.switch_to_block(go_on);
        let new = self.b.ins().band_imm_u(new, i64::from(control::WRITABLE));
        let new = self.b.ins().bor_imm_u(new, i64::from(control::ALWAYS_ONE));
        self.b.ins().istore16(plain(), new, self.cpu, at!(s.x87.fcw));
    }

    /// Calls a piece of code.
    fn call_piece(&mut self, piece: Vec<u8>, state: Value, words: &[Value]) {
        let pieces = &mut self.emitted.pieces;
        let index = pieces.iter().position(|p| *p == piece).unwrap_or_else(|| {
            pieces.push(piece);
            pieces.len() - 1
        });
        let first = self.b.ins().ushr_imm_u(state, i64::from(TOP_AT - REGISTER_SHIFT));
        let arguments = [&[self.cpu, first], words].concat();
        let mut signature = Signature::new(CallConv::PreserveAll);
        signature.params.extend(arguments.iter().map(|_| AbiParam::new(I64)));
        let signature = self.b.import_signature(signature);
        let name = self.external(name::PIECE, index);
        let piece = self.b.import_function(ExtFuncData { name, signature, colocated: true, patchable: false });
        self.b.ins().call(piece, &arguments);
    }

    /// Moves TOP and changes the tags as the run does; the state then.
    fn x87_after(&mut self, run: &Run, state: Value) -> Value {
        let set = i64::from(run.left & !run.full);
        let clear = i64::from((run.full | run.replaced) & !run.left);
        if set == 0 && clear == 0 && run.moved == 0 {
            return state;
        }
        let mut tags = self.b.ins().band_imm_u(state, TAGS as i64 & !clear);
        if set != 0 {
            tags = self.b.ins().bor_imm_u(tags, set);
        }
        let mut top = self.b.ins().band_imm_u(state, TOP as i64);
        if run.moved != 0 {
            let moved = i64::from(run.moved);
            let twice = self.b.ins().imul_imm_u(tags, 0x101);
            let tags_moved = self.b.ins().ushr_imm_u(twice, moved);
            tags = self.b.ins().band_imm_u(tags_moved, TAGS as i64);
            top = self.b.ins().iadd_imm_u(top, moved << TOP_AT);
            top = self.b.ins().band_imm_u(top, TOP as i64);
        }
        let state = self.b.ins().bor(tags, top);
        let state = self.b.ins().bor_imm_u(state, LOADED as i64);
        self.b.ins().store(aligned(), state, self.cpu, at!(jit.x87_state));
        state
    }

    /// Records the last instruction and its operand.
    fn x87_pointers(&mut self, run: &Run, insns: &[Insn], ea: Option<Value>) {
        let (last, operand) = run.last();
        if let Some(i) = last.and_then(|n| insns.get(n)) {
            let opcode = self.b.ins().iconst(I16, i64::from(i.aux & 0x7ff));
            let ip = self.ip_at(i64::from(i.off));
            let selector = self.x87_selector(seg::CS);
            self.b.ins().store(plain(), opcode, self.cpu, at!(s.x87.fop));
            self.b.ins().store(plain(), ip, self.cpu, at!(s.x87.fip));
            self.b.ins().store(plain(), selector, self.cpu, at!(s.x87.fcs));
        }
        if let (Some(i), Some(ea)) = (operand.and_then(|n| insns.get(n)), ea) {
            let selector = self.x87_selector(i.seg);
            self.b.ins().store(plain(), ea, self.cpu, at!(s.x87.fdp));
            self.b.ins().store(plain(), selector, self.cpu, at!(s.x87.fds));
        }
    }

    /// The selector that goes with a pointer; 64-bit code has none.
    fn x87_selector(&mut self, s: u8) -> Value {
        if self.plan.mode.has(Mode::CODE64) {
            return self.b.ins().iconst(I16, 0);
        }
        self.b.ins().load(I16, plain(), self.cpu, word_at(Word::Selector(s)).0)
    }

    /// Puts the status word together if it was taken in two parts, and stores it where the run ends by asking for it.
    fn x87_status(&mut self, run: &Run, words: &[Value], state: Value) {
        if piece::has_late_status(run) {
            let early = self.b.ins().uload16(I64, plain(), self.cpu, at!(jit.x87_status));
            let late = self.b.ins().uload16(I64, plain(), self.cpu, at!(jit.x87_late));
            let c1 = self.b.ins().band_imm_u(early, i64::from(status::C1));
            let others = self.b.ins().band_imm_u(late, i64::from(!status::C1));
            let all = self.b.ins().bor(c1, others);
            self.b.ins().istore16(plain(), all, self.cpu, at!(jit.x87_status));
        }
        let Some(step) = run.steps.last().filter(|s| matches!(s.op, Op::StoreStatus | Op::StatusToAx)) else { return };
        let word = self.b.ins().uload16(I64, plain(), self.cpu, at!(jit.x87_status));
        let word = self.b.ins().band_imm_u(word, i64::from(!status::TOP));
        let top = self.b.ins().ushr_imm_u(state, i64::from(TOP_AT) - STATUS_TOP);
        let top = self.b.ins().band_imm_u(top, i64::from(status::TOP));
        let word = self.b.ins().bor(word, top);
        let word = self.b.ins().ireduce(I16, word);
        match step.argument.and_then(|n| words.get(n)) {
            Some(&to) => _ = self.b.ins().store(plain(), word, to, 0),
            None => self.set_gpr::<W16>(gpr::RAX, word),
        }
    }

    /// The words of the flags that the run has set.
    fn x87_flags(&mut self, run: &Run) -> Option<[Value; 3]> {
        if !run.sets_flags() {
            return None;
        }
        let [carry, zero, parity] = [0, 1, 2].map(|n| {
            let offset = at!(jit.x87_flags) + n;
            self.b.ins().uload8(I64, plain(), self.cpu, offset)
        });
        let z = self.b.ins().bxor_imm_u(zero, 1);
        let sp = self.b.ins().bxor_imm_u(parity, 1);
        // CF, and the difference of CF and an OF of zero.
        let carry = self.b.ins().ineg(carry);
        let co = self.b.ins().ishl_imm_u(carry, 62);
        Some([z, sp, co])
    }

    /// Has the run's instructions evaluated by helper. They change no register but RAX, and no mapping.
    fn x87_by_helper(&mut self, run: &Run, insns: &[Insn], ways: &Ways) {
        self.b.switch_to_block(ways.helper);
        self.store_dirty();
        self.store_pending_flags();
        let first = self.keep_insns(insns);
        let page_ip = self.page_ip;
        let count = self.b.ins().iconst(I64, insns.len() as i64);
        self.call(Helper::EvaluateRun, first, page_ip, Some(count));
        let status = self.b.ins().load(I64, aligned(), self.cpu, at!(jit.exit_reason));
        let (stop, go_on) = (self.b.create_block(), self.b.create_block());
        self.b.set_cold_block(stop);
        self.b.set_cold_block(go_on);
        self.b.ins().brif(status, stop, &[], go_on, &[]);
        self.b.switch_to_block(stop);
        self.leave_behind_helper(status);
        self.b.switch_to_block(go_on);
        if run.steps.last().is_some_and(|s| s.op == Op::StatusToAx) {
            self.load_registers(Regs { gpr: 1 << gpr::RAX, ..Regs::default() });
        }
        if let Some(var) = self.count {
            // The helper has counted them already.
            let count = self.b.use_var(var);
            let count = self.b.ins().iadd_imm_s(count, -(insns.len() as i64));
            self.b.def_var(var, count);
        }
        let words = [at!(s.cc_z), at!(s.cc_sp), at!(s.cc_co)];
        let flags: Vec<BlockArg> = words[..if run.sets_flags() { 3 } else { 0 }]
            .iter()
            .map(|&word| BlockArg::Value(self.b.ins().load(I64, aligned(), self.cpu, word)))
            .collect();
        self.b.ins().jump(ways.done, &flags);
    }
}

/// Whether a run needs no host code: all it does is to look at the status word, or nothing.
fn is_bare(run: &Run) -> bool {
    run.steps.iter().all(|s| !run::computes(s.op) && !matches!(s.op, Op::LoadControl | Op::StoreControl))
}
