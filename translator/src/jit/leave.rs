//! The ways from a region to code in other pages, where the mapping says what RIP leads to.

use std::mem::offset_of;

use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::types::I64;
use cranelift_codegen::ir::{InstBuilder, SigRef, SourceLoc, Value};
use cranelift_frontend::FunctionBuilder;

use crate::code::HostIsa;
use crate::cpu::ANCHOR;
use crate::jit::bridge::{Bridge, PATIENCE};
use crate::jit::emit::{JitEmit, aligned, at, name};
use crate::jump::{ENTRY_SHIFT, JumpEntry, OFFSETS};

/// Marks computed tail jumps, for [`elide_frame`](crate::code::elide_frame) to find them.
pub const TAIL_JUMP: u32 = 1;

impl JitEmit<'_> {
    /// Ends the current Cranelift block by going on at `rip`, which the CPU state has, in another page: by a bridge, or
    /// where that does not lead there, by the jump cache.
    pub(super) fn cross(&mut self, rip: Value) {
        if HostIsa::native() == Some(HostIsa::X86_64) {
            self.emitted.bridges += 1;
            return self.tail_call(name::CROSS, self.emitted.bridges - 1);
        }
        let bridge = self.address(name::BRIDGE, self.emitted.bridges);
        self.emitted.bridges += 1;
        let key = key(&mut self.b, self.cpu, rip);
        let found = self.b.ins().load(I64, aligned(), bridge, offset_of!(Bridge, key) as i32);
        let hit = self.b.ins().icmp(IntCC::Equal, found, key);
        let (go, miss) = (self.b.create_block(), self.b.create_block());
        self.b.set_cold_block(miss);
        self.b.ins().brif(hit, go, &[], miss, &[]);
        self.b.switch_to_block(go);
        let code = self.b.ins().load(I64, aligned(), bridge, offset_of!(Bridge, code) as i32);
        self.b.ins().return_call_indirect(self.tail_sig, code, &[self.cpu]);
        self.b.switch_to_block(miss);
        self.b.ins().store(aligned(), bridge, self.cpu, at!(jit.missed));
        self.tail_call(name::LOOKUP, 0);
    }
}

/// Emits the way to where RIP says by the jump cache. A bridge that missed, where these are data, asks the dispatch loop for
/// the way instead, once in a while.
pub fn lookup(b: &mut FunctionBuilder<'_>, cpu: Value, tail_sig: SigRef) {
    if HostIsa::native() != Some(HostIsa::X86_64) {
        ask(b, cpu);
    }
    let rip = b.ins().load(I64, aligned(), cpu, at!(s.rip));
    jump_by_cache(b, cpu, rip, tail_sig);
}

/// Emits a return to the dispatch loop for a bridge to ask it, if there is one and it is time.
fn ask(b: &mut FunctionBuilder<'_>, cpu: Value) {
    let [missed, ask, on] = [(); 3].map(|()| b.create_block());
    let bridge = b.ins().load(I64, aligned(), cpu, at!(jit.missed));
    b.ins().brif(bridge, missed, &[], on, &[]);

    b.switch_to_block(missed);
    let none = b.ins().iconst(I64, 0);
    b.ins().store(aligned(), none, cpu, at!(jit.missed));
    let left = b.ins().load(I64, aligned(), cpu, at!(jit.until_ask));
    let less = b.ins().iadd_imm_s(left, -1);
    b.ins().store(aligned(), less, cpu, at!(jit.until_ask));
    b.ins().brif(left, on, &[], ask, &[]);

    b.switch_to_block(ask);
    let patience = b.ins().iconst(I64, PATIENCE as i64 - 1);
    b.ins().store(aligned(), patience, cpu, at!(jit.until_ask));
    let name = b.ins().load(I64, aligned(), bridge, offset_of!(Bridge, name) as i32);
    b.ins().store(aligned(), name, cpu, at!(jit.asking));
    b.ins().return_(&[]);

    b.switch_to_block(on);
}

/// Emits the way from `rip`, which the CPU state has, to the code that the jump cache knows for it; to [`way`] if it knows
/// none.
pub fn jump_by_cache(b: &mut FunctionBuilder<'_>, cpu: Value, rip: Value, tail_sig: SigRef) {
    let key = key(b, cpu, rip);
    let page = b.ins().ushr_imm_u(rip, 12);
    let index = b.ins().bxor(rip, page);
    let index = b.ins().ishl_imm_u(index, i64::from(ENTRY_SHIFT));
    let index = b.ins().band_imm_u(index, OFFSETS as i64);
    let jump = b.ins().load(I64, aligned(), cpu, at!(jit.jump));
    let entry = b.ins().iadd(jump, index);
    let found = b.ins().load(I64, aligned(), entry, offset_of!(JumpEntry, key) as i32);
    let hit = b.ins().icmp(IntCC::Equal, found, key);
    let (go, out) = (b.create_block(), b.create_block());
    b.set_cold_block(out);
    b.ins().brif(hit, go, &[], out, &[]);
    b.switch_to_block(go);
    let code = b.ins().load(I64, aligned(), entry, offset_of!(JumpEntry, code) as i32);
    jump_to(b, cpu, code, tail_sig);
    b.switch_to_block(out);
    let way = b.ins().load(I64, aligned(), cpu, at!(jit.way));
    jump_to(b, cpu, way, tail_sig);
}

fn jump_to(b: &mut FunctionBuilder<'_>, cpu: Value, code: Value, tail_sig: SigRef) {
    b.set_srcloc(SourceLoc::new(TAIL_JUMP));
    b.ins().return_call_indirect(tail_sig, code, &[cpu]);
    b.set_srcloc(SourceLoc::default());
}

/// Emits the way to where RIP says, which the jump cache does not know, by what is known of physical addresses; to the
/// dispatch loop if there is no code. `find` is the signature of the function that knows.
pub fn way(b: &mut FunctionBuilder<'_>, cpu: Value, find: SigRef, tail_sig: SigRef) {
    let f = b.ins().load(I64, aligned(), cpu, at!(jit.find_way));
    let whole = b.ins().iadd_imm_s(cpu, -i64::from(ANCHOR));
    let found = b.ins().call_indirect(find, f, &[whole]);
    let code = b.inst_results(found)[0];
    jump_to(b, cpu, code, tail_sig);
}

/// The key of `rip` ([`Cpu::code_key`](crate::cpu::Cpu::code_key)).
fn key(b: &mut FunctionBuilder<'_>, cpu: Value, rip: Value) -> Value {
    let half = b.ins().ushr_imm_u(rip, 63);
    let half = b.ins().ishl_imm_u(half, 3);
    let half = b.ins().iadd(cpu, half);
    let salt = b.ins().load(I64, aligned(), half, at!(jit.salts));
    b.ins().bxor(rip, salt)
}
