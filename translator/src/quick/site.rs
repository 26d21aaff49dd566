//! The thunks of loads and resolved stores in loops ([`crate::jit::access::site_thunk`]) as x86-64 code that saves no more
//! registers than it changes: a loop that walks down the columns of a matrix calls one each time.

use std::mem::offset_of;

use super::Lookup;
use super::asm::{ARG, Alu, Asm, CPU, Cc, Gpr, Mem, Shift, T0, T2, Unary};
use super::emit::{cpu, thunk};
use crate::addr::PAGE_SIZE;
use crate::jit::access::{BEFORE, LAST, USED_AT, site_at};
use crate::jit::emit::{Helper, at};
use crate::mmu::tlb::{Place, SITE_GROUP};

/// The thunk for a helper that gives an address.
pub fn thunk_for(helper: Helper) -> Vec<u8> {
    let (linear, which) = (ARG, T2);
    let (found, page, group, table, word) = (T0, Gpr(10), Gpr(11), Gpr(8), Gpr(9));
    let saved = [found, which, table, word, page, group];
    let place = |places: usize, field: usize| Mem::at(table, site_at(places, field, 0));
    let fields @ [base, limit, addend] = [offset_of!(Place, base), offset_of!(Place, limit), offset_of!(Place, addend)];
    let mut a = Asm::default();
    a.alu_imm(8, Alu::Sub, cpu(at!(jit.until_stray)), 1);
    let stray = a.jcc(Cc::S);
    saved.iter().for_each(|&r| a.push(r));
    a.movzx(1, word, which);
    let lookup = Lookup { table, linear, found, page };
    let write = !matches!(helper, Helper::Load | Helper::Find);
    let miss = lookup.emit(&mut a, Mem::indexed(linear, word, -1), write);
    a.shift_imm(8, Shift::Shr, which, 8);
    a.mov(8, group, which);
    a.shift_imm(8, Shift::Shr, group, SITE_GROUP.trailing_zeros() as u8);
    a.store_imm(1, Mem::indexed(table, group, USED_AT), 1);
    a.shift_imm(8, Shift::Shl, which, size_of::<Place>().trailing_zeros() as u8);
    a.alu(8, Alu::Add, table, which);
    for field in fields {
        a.load(8, which, place(LAST, field));
        a.store(8, place(BEFORE, field), which);
    }
    a.unary(8, Unary::Neg, word);
    a.alu_imm(8, Alu::Add, word, PAGE_SIZE as i32 + 1);
    a.store(8, place(LAST, base), page);
    a.store(8, place(LAST, limit), word);
    a.store(8, place(LAST, addend), found);
    a.alu(8, Alu::Add, found, linear);
    a.store(8, cpu(at!(jit.slow_result)), found);
    saved.iter().rev().for_each(|&r| a.pop(r));
    a.ret();

    a.here(miss);
    saved.iter().rev().for_each(|&r| a.pop(r));
    // For the stack's alignment, too.
    a.push(which);
    a.movzx(1, which, which);
    a.call(Mem::at(CPU, thunk(helper)));
    a.pop(which);
    a.ret();

    a.here(stray);
    a.store_imm(8, cpu(at!(jit.slow_result)), 0);
    a.ret();
    a.code
}
