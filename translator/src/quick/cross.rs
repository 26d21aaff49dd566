//! The way into another page. On x86-64 hosts the code keeps it itself: the key for which it knows the way as a constant, and
//! the way as a jump; elsewhere both are a [`Bridge`]'s ([`crate::jit::bridge`] says what the key is for).

use std::mem::offset_of;

use super::asm::{Alu, Asm, CPU, Cc, Gpr, Jump, Mem, Shift, T0, T1, T2};
use super::emit::cpu;
use crate::jit::bridge::{Bridge, NO_KEY};
use crate::jit::emit::at;

/// Has the name of the bridge whose way is another, or its address where bridges are data.
pub const BRIDGE: Gpr = T1;

/// Where in the code its parts are.
pub struct Crossing {
    /// Where code knows the way, its key, 8 bytes at a multiple of 8, and the site of the jump for it.
    pub way: Option<(usize, usize)>,
    /// The name of its bridge, or its address, 8 bytes.
    pub bridge: usize,
    /// The displacement of a jump to [`Missed`](super::Routine::Missed).
    pub missed: usize,
}

/// Emits one. RIP is in T0 and in the CPU state; `turn` emits what has to be done once the way is known.
pub fn emit(a: &mut Asm, turn: impl FnOnce(&mut Asm)) -> Crossing {
    let (known, found) = (T1, T2);
    emit_key(a, found, T0);
    if !Asm::KNOWS_WAYS {
        let bridge = a.mov_imm64(BRIDGE, 0);
        a.alu(8, Alu::Cmp, found, Mem::at(BRIDGE, offset_of!(Bridge, key) as i32));
        let miss = a.jcc(Cc::NE);
        turn(a);
        a.jump_by(Mem::at(BRIDGE, offset_of!(Bridge, code) as i32));
        a.here(miss);
        let Jump(missed) = a.jmp();
        return Crossing { way: None, bridge, missed };
    }
    a.align_constant();
    let key = a.mov_imm64(known, NO_KEY);
    a.alu(8, Alu::Cmp, found, known);
    let miss = a.jcc(Cc::NE);
    turn(a);
    let Jump(site) = a.link(None);
    a.here(miss);
    let bridge = a.mov_imm64(BRIDGE, 0);
    let Jump(missed) = a.jmp();
    Crossing { way: Some((key, site)), bridge, missed }
}

/// Appends the way from a region, whose tail call leads here, to where RIP says.
pub fn append(region: &mut Vec<u8>) -> Crossing {
    let mut a = Asm::from(std::mem::take(region));
    a.load(8, T0, cpu(at!(s.rip)));
    let crossing = emit(&mut a, |_| ());
    *region = a.code;
    crossing
}

/// The key of an instruction pointer ([`Cpu::code_key`](crate::cpu::Cpu::code_key)).
pub fn emit_key(a: &mut Asm, to: Gpr, ip: Gpr) {
    a.mov(8, to, ip);
    a.shift_imm(8, Shift::Shr, to, 63);
    a.load(8, to, Mem { base: Some(CPU), index: Some((to, 3)), disp: at!(jit.salts) });
    a.alu(8, Alu::Xor, to, ip);
}
