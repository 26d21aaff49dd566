//! The thunks of loads and resolved stores in loops ([`crate::jit::access::site_thunk`]) as code that saves no more registers
//! than it changes: a loop that walks down the columns of a matrix calls one each time.

use std::mem::offset_of;

use super::Lookup;
use super::asm::{ARG, Alu, Asm, Cc, Mem, Shift, THUNK_CPU, THUNK_SPARE, THUNK_WHICH, Unary};
use super::emit::thunk;
use crate::addr::PAGE_SIZE;
use crate::jit::access::{BEFORE, LAST, USED_AT, site_at};
use crate::jit::emit::{Helper, at};
use crate::mmu::tlb::{Place, SITE_GROUP};

/// The thunk for a helper that gives an address.
pub fn thunk_for(helper: Helper) -> Vec<u8> {
    let (cpu, linear, which) = (THUNK_CPU, ARG, THUNK_WHICH);
    let [found, page, group, table, word] = THUNK_SPARE;
    let saved = [found, which, table, word, page, group];
    let state = |offset: i32| Mem::at(cpu, offset);
    let fields @ [base, limit, addend] =
        [offset_of!(Place, base), offset_of!(Place, limit), offset_of!(Place, addend)].map(|field| field as i32);
    let mut a = Asm::default();
    a.alu_imm(8, Alu::Sub, state(at!(jit.until_stray)), 1);
    let stray = a.jcc(Cc::S);
    a.save(&saved);
    a.movzx(1, word, which);
    let lookup = Lookup { cpu, table, linear, found, page };
    let write = !matches!(helper, Helper::Load | Helper::Find);
    let miss = lookup.emit(&mut a, Mem::indexed(linear, word, -1), write);
    a.shift_imm(8, Shift::Shr, which, 8);
    a.mov(8, group, which);
    a.shift_imm(8, Shift::Shr, group, SITE_GROUP.trailing_zeros() as u8);
    a.store_imm(1, Mem::indexed(table, group, USED_AT), 1);
    a.shift_imm(8, Shift::Shl, which, size_of::<Place>().trailing_zeros() as u8);
    a.alu(8, Alu::Add, table, which);
    let (last, before) = (group, table);
    a.lea(8, last, Mem::at(table, site_at(LAST, 0, 0)));
    a.lea(8, before, Mem::at(table, site_at(BEFORE, 0, 0)));
    for field in fields {
        a.load(8, which, Mem::at(last, field));
        a.store(8, Mem::at(before, field), which);
    }
    a.unary(8, Unary::Neg, word);
    a.alu_imm(8, Alu::Add, word, PAGE_SIZE as i32 + 1);
    a.store(8, Mem::at(last, base), page);
    a.store(8, Mem::at(last, limit), word);
    a.store(8, Mem::at(last, addend), found);
    a.alu(8, Alu::Add, found, linear);
    a.store(8, state(at!(jit.slow_result)), found);
    a.restore(&saved);
    a.ret();

    a.here(miss);
    a.restore(&saved);
    // For the stack's alignment, too.
    a.push(which);
    a.movzx(1, which, which);
    a.call(state(thunk(helper)));
    a.pop(which);
    a.ret();

    a.here(stray);
    a.store_imm(8, state(at!(jit.slow_result)), 0);
    a.ret();
    a.code
}
