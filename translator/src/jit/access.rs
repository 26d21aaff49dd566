//! Guest memory as compiled code reaches it: the soft TLB's fast path inline, everything else by helper.
//!
//! How an access is emitted is decided here and nowhere else.

use std::mem::offset_of;

use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::types::I64;
use cranelift_codegen::ir::{BlockArg, InstBuilder, Value};

use crate::addr::PAGE_MASK;
use crate::emit::Emit;
use crate::insn::{Insn, Mode};
use crate::jit::Unsupported;
use crate::jit::emit::{Helper, JitEmit, aligned, at, plain};
use crate::mmu::tlb::{TLB_ENTRIES, TlbEntry};
use crate::state::seg;

impl JitEmit<'_> {
    pub(super) fn linear(&mut self, i: &Insn, s: u8, ea: Value) -> Result<Value, Unsupported> {
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
    pub(super) fn host(
        &mut self,
        linear: Value,
        bytes: u64,
        tag: usize,
        slow: impl FnOnce(&mut Self) -> Option<Value>,
    ) -> Value {
        let shift = size_of::<TlbEntry>().trailing_zeros();
        let index = self.b.ins().ushr_imm_u(linear, i64::from(12 - shift));
        let index = self.b.ins().band_imm_u(index, ((TLB_ENTRIES - 1) << shift) as i64);
        let table = self.b.use_var(self.tlb);
        let entry = self.b.ins().iadd(table, index);
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
    pub(super) fn slow(&mut self, helper: Helper, linear: Value, bytes: u64, value: Option<Value>) -> Value {
        let bytes = self.b.ins().iconst(I64, bytes as i64);
        self.call(helper, linear, bytes, value);
        let found = self.b.ins().load(I64, aligned(), self.cpu, at!(jit.slow_result));
        let none = self.b.ins().icmp_imm_u(IntCC::Equal, found, 0);
        self.side_exit_if(none);
        found
    }

    pub(super) fn load_host(&mut self, linear: Value, bytes: u64) -> Value {
        self.write_through();
        self.host(linear, bytes, offset_of!(TlbEntry, read), |e| Some(e.slow(Helper::Load, linear, bytes, None)))
    }

    pub(super) fn store_value(&mut self, linear: Value, bytes: u64, v: Value) {
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

    pub(super) fn check_alignment(&mut self, linear: Value) {
        let low = self.b.ins().band_imm_u(linear, 15);
        self.side_exit_if(low);
    }

    pub(super) fn extend(&mut self, v: Value, bytes: u64) -> Value {
        if bytes == 8 { v } else { self.b.ins().uextend(I64, v) }
    }
}
