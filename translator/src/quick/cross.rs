//! The way into another page that x86-64 code keeps itself: the key for which it knows the way as a constant, and the way
//! as a jump ([`crate::jit::bridge`] says what the key is for).

use super::asm::{Alu, Asm, Cc, Gpr, Jump, Mem, Shift};
use super::emit::{CPU, cpu};
use crate::jit::bridge::NO_KEY;
use crate::jit::emit::at;

/// Has the name of the bridge whose way is another.
pub const BRIDGE: Gpr = Gpr::RCX;

/// Where in the code its parts are.
pub struct Crossing {
    /// The key, 8 bytes at a multiple of 8.
    pub key: usize,
    /// The site of the jump for it.
    pub site: usize,
    /// The name of its bridge, 8 bytes.
    pub bridge: usize,
    /// The displacement of a jump to [`Missed`](super::Routine::Missed).
    pub missed: usize,
}

/// Emits one. RIP is in RAX and in the CPU state; `turn` emits what has to be done once the way is known.
pub fn emit(a: &mut Asm, turn: impl FnOnce(&mut Asm)) -> Crossing {
    let (known, found) = (Gpr::RCX, Gpr::RDX);
    emit_key(a, found, Gpr::RAX);
    while !(a.code.len() + 2).is_multiple_of(8) {
        a.nop();
    }
    let key = a.mov_imm64(known, NO_KEY);
    a.alu(8, Alu::Cmp, found, known);
    let miss = a.jcc(Cc::NE);
    turn(a);
    let Jump(site) = a.link(None);
    a.here(miss);
    let name = a.mov_imm64(BRIDGE, 0);
    let Jump(missed) = a.jmp();
    Crossing { key, site, bridge: name, missed }
}

/// Appends the way from a region, whose tail call leads here, to where RIP says.
pub fn append(region: &mut Vec<u8>) -> Crossing {
    let mut a = Asm { code: std::mem::take(region) };
    a.load(8, Gpr::RAX, cpu(at!(s.rip)));
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
