//! The assembler of x86-64 hosts (SDM vol. 2).
//!
//! Quick code is entered with a return address on the stack, and pushes RBP, which is [`PAGE`] then.

use super::{Alu, Cc, Gpr, Jump, Mem, Rm, Shift, Unary, Xmm};
use crate::code::PUSH_LEN;
use crate::cpu::ANCHOR;

impl Gpr {
    const RAX: Gpr = Gpr(0);
    const RCX: Gpr = Gpr(1);
    const RDX: Gpr = Gpr(2);
    const RBX: Gpr = Gpr(3);
    const RSP: Gpr = Gpr(4);
    const RBP: Gpr = Gpr(5);
    const RSI: Gpr = Gpr(6);
    const RDI: Gpr = Gpr(7);
}

/// Holds the CPU's [`ANCHOR`], as in all compiled code.
pub const CPU: Gpr = Gpr::RDI;
/// Holds the linear address of the page that runs.
pub const PAGE: Gpr = Gpr::RBP;
/// The accesses' result, a carry, a dividend.
pub const T0: Gpr = Gpr::RAX;
/// Counts of shifts.
pub const T1: Gpr = Gpr::RCX;
/// The upper half of a dividend, and a remainder.
pub const T2: Gpr = Gpr::RDX;
/// The linear address of an access.
pub const ARG: Gpr = Gpr::RSI;
/// Registers that hold values, a bit each.
pub const POOL: u32 = 1 << Gpr::RBX.0 | 0xff00;
/// How far past its start code is entered by who has its frame.
pub const ENTERED: usize = PUSH_LEN;
/// Where thunks have their first and third parameter, and others for their use, which they save.
pub const THUNK_CPU: Gpr = Gpr::RDI;
#[allow(missing_docs)]
pub const THUNK_WHICH: Gpr = Gpr::RDX;
#[allow(missing_docs)]
pub const THUNK_SPARE: [Gpr; 5] = [Gpr::RAX, Gpr(10), Gpr(11), Gpr(8), Gpr(9)];

/// Code so far.
#[derive(Default)]
pub struct Asm {
    /// Its bytes.
    pub code: Vec<u8>,
}

impl From<Vec<u8>> for Asm {
    fn from(code: Vec<u8>) -> Asm {
        Asm { code }
    }
}

impl Asm {
    fn imm32(&mut self, k: i32) {
        self.code.extend(k.to_le_bytes());
    }

    /// An instruction: prefix, REX, opcode, ModRM, SIB, displacement. `bytes` is the operand size, 0 for none to be
    /// said; with 1 registers from 4 on are SPL to DIL.
    fn op(&mut self, prefix: Option<u8>, bytes: u64, opcode: &[u8], reg: u8, rm: Rm) {
        if bytes == 2 {
            self.code.push(0x66);
        }
        self.code.extend(prefix);
        let (index, base) = match rm {
            Rm::Reg(r) => (0, r),
            Rm::Mem(m) => (m.index.map_or(0, |i| i.0.0), m.base.map_or(0, |b| b.0)),
        };
        let rex = u8::from(bytes == 8) << 3 | (reg >> 3 & 1) << 2 | (index >> 3 & 1) << 1 | base >> 3 & 1;
        if rex != 0 || bytes == 1 {
            self.code.push(0x40 | rex);
        }
        self.code.extend(opcode);
        let reg = (reg & 7) << 3;
        let m = match rm {
            Rm::Reg(r) => return self.code.push(0xc0 | reg | r & 7),
            Rm::Mem(m) => m,
        };
        let Some(base) = m.base else {
            let sib = m.index.map_or(4 << 3, |(r, scale)| scale << 6 | (r.0 & 7) << 3) | 5;
            self.code.extend([reg | 4, sib]);
            return self.imm32(m.disp);
        };
        // RBP and R13 have no form without displacement.
        let mode = match i8::try_from(m.disp) {
            Ok(0) if base.0 & 7 != 5 => 0,
            Ok(_) => 1,
            Err(_) => 2,
        };
        match m.index {
            None if base.0 & 7 != 4 => self.code.push(mode << 6 | reg | base.0 & 7),
            index => {
                let sib = index.map_or(4 << 3, |(r, scale)| scale << 6 | (r.0 & 7) << 3) | base.0 & 7;
                self.code.extend([mode << 6 | reg | 4, sib]);
            }
        }
        match mode {
            0 => {}
            1 => self.code.push(m.disp as u8),
            _ => self.imm32(m.disp),
        }
    }

    /// `register = register`, 32 or 64 bits.
    pub fn mov(&mut self, bytes: u64, to: Gpr, from: Gpr) {
        self.op(None, bytes, &[0x8b], to.0, from.into());
    }

    /// Replaces the low 8 or 16 bits of a register by those of another.
    pub fn mov_low(&mut self, bytes: u64, to: Gpr, from: Gpr) {
        self.op(None, bytes, &[if bytes == 1 { 0x8a } else { 0x8b }], to.0, from.into());
    }

    /// A constant.
    pub fn mov_imm(&mut self, to: Gpr, k: u64) {
        if let Ok(k) = u32::try_from(k) {
            if to.0 >= 8 {
                self.code.push(0x41);
            }
            self.code.push(0xb8 | to.0 & 7);
            self.code.extend(k.to_le_bytes());
        } else if let Ok(k) = i32::try_from(k as i64) {
            self.op(None, 8, &[0xc7], 0, to.into());
            self.imm32(k);
        } else {
            self.mov_imm64(to, k);
        }
    }

    /// A constant of 8 bytes; where they are.
    pub fn mov_imm64(&mut self, to: Gpr, k: u64) -> usize {
        self.code.extend([0x48 | to.0 >> 3, 0xb8 | to.0 & 7]);
        self.code.extend(k.to_le_bytes());
        self.code.len() - 8
    }

    /// Loads 4 or 8 bytes; 4 are zero-extended.
    pub fn load(&mut self, bytes: u64, to: Gpr, from: Mem) {
        self.op(None, bytes, &[0x8b], to.0, from.into());
    }

    /// Stores 1, 2, 4 or 8 bytes.
    pub fn store(&mut self, bytes: u64, to: Mem, from: Gpr) {
        self.op(None, bytes, &[if bytes == 1 { 0x88 } else { 0x89 }], from.0, to.into());
    }

    /// Stores a constant of 1, 2, 4 or 8 bytes, the last sign-extended from 4.
    pub fn store_imm(&mut self, bytes: u64, to: Mem, k: i32) {
        self.op(None, bytes, &[if bytes == 1 { 0xc6 } else { 0xc7 }], 0, to.into());
        self.code.extend(&k.to_le_bytes()[..bytes.min(4) as usize]);
    }

    /// Zero-extends 1, 2 or 4 bytes to 8.
    pub fn movzx(&mut self, from_bytes: u64, to: Gpr, from: impl Into<Rm>) {
        match from_bytes {
            // Of the source it is that SPL to DIL need a prefix.
            1 => self.op(None, 1, &[0x0f, 0xb6], to.0, from.into()),
            2 => self.op(None, 4, &[0x0f, 0xb7], to.0, from.into()),
            _ => self.op(None, 4, &[0x8b], to.0, from.into()),
        }
    }

    /// Sign-extends 1, 2 or 4 bytes to 8.
    pub fn movsx(&mut self, from_bytes: u64, to: Gpr, from: impl Into<Rm>) {
        let opcode: &[u8] = match from_bytes {
            1 => &[0x0f, 0xbe],
            2 => &[0x0f, 0xbf],
            _ => &[0x63],
        };
        self.op(None, 8, opcode, to.0, from.into());
    }

    /// The address of an operand, cut to 4 bytes or not.
    pub fn lea(&mut self, bytes: u64, to: Gpr, of: Mem) {
        self.op(None, bytes, &[0x8d], to.0, of.into());
    }

    /// `to op= from`.
    pub fn alu(&mut self, bytes: u64, op: Alu, to: Gpr, from: impl Into<Rm>) {
        let opcode = (op as u8) << 3 | if bytes == 1 { 2 } else { 3 };
        self.op(None, bytes, &[opcode], to.0, from.into());
    }

    /// `to op= k`, the constant sign-extended from 4 bytes.
    pub fn alu_imm(&mut self, bytes: u64, op: Alu, to: impl Into<Rm>, k: i32) {
        let short = i8::try_from(k).is_ok();
        let opcode = match bytes {
            1 => 0x80,
            _ if short => 0x83,
            _ => 0x81,
        };
        self.op(None, bytes, &[opcode], op as u8, to.into());
        let len = if short || bytes == 1 { 1 } else { bytes.min(4) as usize };
        self.code.extend(&k.to_le_bytes()[..len]);
    }

    /// Sets the flags by `a & b`.
    pub fn test(&mut self, bytes: u64, a: Gpr, b: Gpr) {
        self.op(None, bytes, &[if bytes == 1 { 0x84 } else { 0x85 }], a.0, b.into());
    }

    /// Shifts by a constant.
    pub fn shift_imm(&mut self, bytes: u64, op: Shift, to: Gpr, n: u8) {
        self.op(None, bytes, &[if bytes == 1 { 0xc0 } else { 0xc1 }], op as u8, to.into());
        self.code.push(n);
    }

    /// Shifts by T1.
    pub fn shift(&mut self, bytes: u64, op: Shift, to: Gpr) {
        self.op(None, bytes, &[if bytes == 1 { 0xd2 } else { 0xd3 }], op as u8, to.into());
    }

    /// An operation on one operand.
    pub fn unary(&mut self, bytes: u64, op: Unary, r: Gpr) {
        self.group_3(bytes, op as u8, r);
    }

    fn group_3(&mut self, bytes: u64, op: u8, r: Gpr) {
        self.op(None, bytes, &[if bytes == 1 { 0xf6 } else { 0xf7 }], op, r.into());
    }

    /// `high:low = T0 * by`, 64 bits each.
    pub fn multiply(&mut self, signed: bool, low: Gpr, high: Gpr, by: Gpr) {
        self.group_3(8, if signed { 5 } else { 4 }, by);
        self.mov(8, low, Gpr::RAX);
        self.mov(8, high, Gpr::RDX);
    }

    /// Whether [`Asm::divide`] takes dividends of twice the size.
    pub const DIVIDES_DOUBLE: bool = true;

    /// Divides T2:T0: the quotient in T0, the remainder in T2.
    pub fn divide(&mut self, bytes: u64, signed: bool, by: Gpr) {
        self.group_3(bytes, if signed { 7 } else { 6 }, by);
    }

    /// `to = from` shifted by the count in T1, 4 or 8 bytes; a carry that is meant only if the count is not 0 in T0's low byte.
    pub fn shift_out(&mut self, bytes: u64, op: Shift, to: Gpr, from: Gpr) {
        self.mov(bytes, to, from);
        self.shift(bytes, op, to);
        self.setcc(Cc::B, Gpr::RAX);
    }

    /// Sign-extends T0 into T2.
    pub fn extend_sign(&mut self, bytes: u64) {
        if bytes == 8 {
            self.code.push(0x48);
        }
        self.code.push(0x99);
    }

    /// `to *= from`, the low half.
    pub fn imul(&mut self, bytes: u64, to: Gpr, from: Gpr) {
        self.op(None, bytes, &[0x0f, 0xaf], to.0, from.into());
    }

    /// Swaps the bytes of 4 or 8.
    pub fn bswap(&mut self, bytes: u64, r: Gpr) {
        let rex = u8::from(bytes == 8) << 3 | r.0 >> 3;
        if rex != 0 {
            self.code.push(0x40 | rex);
        }
        self.code.extend([0x0f, 0xc8 | r.0 & 7]);
    }

    /// LZCNT.
    pub fn lzcnt(&mut self, bytes: u64, to: Gpr, from: Gpr) {
        self.op(Some(0xf3), bytes, &[0x0f, 0xbd], to.0, from.into());
    }

    /// TZCNT.
    pub fn tzcnt(&mut self, bytes: u64, to: Gpr, from: Gpr) {
        self.op(Some(0xf3), bytes, &[0x0f, 0xbc], to.0, from.into());
    }

    /// POPCNT.
    pub fn popcnt(&mut self, bytes: u64, to: Gpr, from: Gpr) {
        self.op(Some(0xf3), bytes, &[0x0f, 0xb8], to.0, from.into());
    }

    /// The low byte of a register as 0 or 1.
    pub fn setcc(&mut self, cc: Cc, to: Gpr) {
        self.op(None, 1, &[0x0f, 0x90 | cc.0], 0, to.into());
    }

    /// `to = from` if a condition holds.
    pub fn cmov(&mut self, cc: Cc, to: Gpr, from: Gpr) {
        self.op(None, 8, &[0x0f, 0x40 | cc.0], to.0, from.into());
    }

    /// Pushes 8 bytes.
    pub fn push(&mut self, r: Gpr) {
        self.short(0x50, r);
    }

    /// Pops 8 bytes.
    pub fn pop(&mut self, r: Gpr) {
        self.short(0x58, r);
    }

    /// Pushes registers.
    pub fn save(&mut self, registers: &[Gpr]) {
        registers.iter().for_each(|&r| self.push(r));
    }

    /// Pops what [`Self::save`] pushed.
    pub fn restore(&mut self, registers: &[Gpr]) {
        registers.iter().rev().for_each(|&r| self.pop(r));
    }

    /// An instruction whose opcode has the register.
    fn short(&mut self, opcode: u8, r: Gpr) {
        if r.0 >= 8 {
            self.code.push(0x41);
        }
        self.code.push(opcode | r.0 & 7);
    }

    /// Calls what an address in memory says.
    pub fn call(&mut self, target: Mem) {
        self.op(None, 0, &[0xff], 2, target.into());
    }

    /// Calls the address in a register.
    fn call_reg(&mut self, target: Gpr) {
        self.op(None, 0, &[0xff], 2, target.into());
    }

    /// Jumps to where an address in memory says; who is there has this code's frame.
    pub fn jump_by(&mut self, target: Mem) {
        self.op(None, 0, &[0xff], 4, target.into());
    }

    /// Does nothing.
    pub fn nop(&mut self) {
        self.code.push(0x90);
    }

    /// Returns.
    pub fn ret(&mut self) {
        self.code.push(0xc3);
    }

    /// A fence between all loads and stores before it and those behind.
    pub fn fence(&mut self) {
        self.code.extend([0x0f, 0xae, 0xf0]);
    }

    /// What keeps a load in order with what is behind it: nothing.
    pub fn loaded(&mut self) {}

    /// What keeps a store in order with what is before it: nothing.
    pub fn storing(&mut self) {}

    /// Begins code that is entered from anywhere; who has its frame comes in behind, [`ENTERED`].
    pub fn enter(&mut self) {
        self.push(PAGE);
        debug_assert_eq!(self.code.len(), ENTERED);
    }

    /// Returns to whoever called compiled code.
    pub fn go_back(&mut self) {
        self.pop(PAGE);
        self.ret();
    }

    /// Goes to code by an address in memory, as from anywhere.
    pub fn go_by(&mut self, address: Mem) {
        self.pop(PAGE);
        self.jump_by(address);
    }

    /// Goes into a region, where those enter it that have its frame.
    pub fn enter_region(&mut self) -> Jump {
        self.mov(8, Gpr::RBP, Gpr::RSP);
        self.jmp()
    }

    /// Goes, patchably, to the code that goes on by the jump cache, where those enter it that have its frame.
    pub fn link_to_lookup(&mut self) -> Jump {
        self.link(None)
    }

    /// Calls the C function whose address the CPU state has at an offset, with the CPU, ARG and T2. Of registers, CPU and
    /// PAGE are preserved.
    pub fn call_function(&mut self, at: i32) {
        self.push(CPU);
        self.alu_imm(8, Alu::Sub, CPU, ANCHOR);
        self.call(Mem::at(CPU, ANCHOR + at));
        self.pop(CPU);
    }

    /// Calls the thunk whose address the CPU state has at an offset, with ARG and T2. Registers that hold values are
    /// preserved, and so is ARG.
    pub fn call_thunk(&mut self, at: i32) {
        // For the stack's alignment.
        self.push(CPU);
        self.call(Mem::at(CPU, at));
        self.pop(CPU);
    }

    /// `extern "C" fn(cpu, code)`: calls compiled code, which preserves none of the registers that C functions do.
    pub fn trampoline(&mut self) {
        let saved = [Gpr::RBX, Gpr(12), Gpr(13), Gpr(14), Gpr(15)];
        self.save(&saved);
        self.alu_imm(8, Alu::Add, CPU, ANCHOR);
        self.call_reg(Gpr::RSI);
        self.restore(&saved);
        self.ret();
    }

    /// Calls what a displacement says that stands where is given back.
    pub fn call_rel(&mut self) -> usize {
        self.code.push(0xe8);
        let Jump(at) = self.displacement();
        at
    }

    /// Jumps to where whoever patches the jump says, if a condition is given and holds or none is; its displacement lies
    /// inside an aligned quadword, so that it can be patched while others run it.
    pub fn link(&mut self, cc: Option<Cc>) -> Jump {
        while (self.code.len() + 1 + usize::from(cc.is_some())) % 8 > 4 {
            self.nop();
        }
        match cc {
            Some(cc) => self.jcc(cc),
            None => self.jmp(),
        }
    }

    /// Whether [the way into another page](crate::quick::cross) has the key and the branch in code, both patched.
    pub const KNOWS_WAYS: bool = true;

    /// Makes the next constant of 8 bytes one at a multiple of 8.
    pub fn align_constant(&mut self) {
        while !(self.code.len() + 2).is_multiple_of(8) {
            self.nop();
        }
    }

    /// Jumps, if a condition holds, to other code of the arena: where its displacement stands.
    pub fn jcc_out(&mut self, cc: Cc) -> usize {
        let Jump(at) = self.jcc(cc);
        at
    }

    /// Jumps, if a condition holds, to where [`Self::here`] says.
    pub fn jcc(&mut self, cc: Cc) -> Jump {
        self.code.extend([0x0f, 0x80 | cc.0]);
        self.displacement()
    }

    /// Jumps to where [`Self::here`] says, or whoever patches the jump.
    pub fn jmp(&mut self) -> Jump {
        self.code.push(0xe9);
        self.displacement()
    }

    fn displacement(&mut self) -> Jump {
        self.imm32(0);
        Jump(self.code.len() - 4)
    }

    /// Makes the end of the code the target of a jump.
    pub fn here(&mut self, jump: Jump) {
        self.lead(jump, self.code.len());
    }

    /// Makes an offset in the code the target of a jump.
    pub fn lead(&mut self, Jump(at): Jump, to: usize) {
        let distance = to as i64 - (at as i64 + 4);
        self.code[at..at + 4].copy_from_slice(&(distance as i32).to_le_bytes());
    }

    /// Loads 16 bytes.
    pub fn load_x(&mut self, to: Xmm, from: Mem) {
        self.op(None, 0, &[0x0f, 0x10], to.0, from.into());
    }

    /// Loads 4 or 8 bytes, zeros above.
    pub fn load_x_low(&mut self, bytes: u64, to: Xmm, from: Mem) {
        self.op(Some(if bytes == 4 { 0xf3 } else { 0xf2 }), 0, &[0x0f, 0x10], to.0, from.into());
    }

    /// Stores 16 bytes.
    pub fn store_x(&mut self, to: Mem, from: Xmm) {
        self.op(None, 0, &[0x0f, 0x11], from.0, to.into());
    }

    /// `to = from`.
    pub fn mov_x(&mut self, to: Xmm, from: Xmm) {
        self.op(None, 0, &[0x0f, 0x28], to.0, from.into());
    }

    /// The low 8 bytes from a register, zeros above.
    pub fn to_x(&mut self, to: Xmm, from: Gpr) {
        self.op(Some(0x66), 8, &[0x0f, 0x6e], to.0, from.into());
    }

    /// The low 8 bytes to a register.
    pub fn from_x(&mut self, to: Gpr, from: Xmm) {
        self.op(Some(0x66), 8, &[0x0f, 0x7e], from.0, to.into());
    }

    /// The high 8 bytes to a register, by way of `spare`.
    pub fn from_high(&mut self, to: Gpr, from: Xmm, spare: Xmm) {
        self.mov_x(spare, from);
        self.sse(0x6d, spare, spare);
        self.from_x(to, spare);
    }

    /// The high 8 bytes from a register, by way of `spare`.
    pub fn set_high(&mut self, to: Xmm, from: Gpr, spare: Xmm) {
        self.to_x(spare, from);
        self.sse(0x6c, to, spare);
    }

    /// `x = 0`.
    pub fn zero_x(&mut self, x: Xmm) {
        self.sse(0xef, x, x);
    }

    /// An SSE2 instruction with prefix 66h and opcode 0Fh `opcode`: `to op= from`.
    pub fn sse(&mut self, opcode: u8, to: Xmm, from: Xmm) {
        self.op(Some(0x66), 0, &[0x0f, opcode], to.0, from.into());
    }

    /// An SSE2 instruction with a prefix and an immediate.
    pub fn sse_imm(&mut self, prefix: u8, opcode: u8, to: Xmm, from: Xmm, k: u8) {
        self.op(Some(prefix), 0, &[0x0f, opcode], to.0, from.into());
        self.code.push(k);
    }

    /// An SSE2 shift by an immediate: `group` is opcode extension in the ModRM byte.
    pub fn sse_shift(&mut self, opcode: u8, group: u8, x: Xmm, k: u8) {
        self.op(Some(0x66), 0, &[0x0f, opcode], group, x.into());
        self.code.push(k);
    }

    /// The sign bits of an XMM register's bytes (D7h), or of its 4- or 8-byte elements (50h, without and with prefix).
    pub fn signs(&mut self, element: u8, to: Gpr, from: Xmm) {
        let (prefix, opcode) = match element {
            1 => (Some(0x66), 0xd7),
            4 => (None, 0x50),
            _ => (Some(0x66), 0x50),
        };
        self.op(prefix, 0, &[0x0f, opcode], to.0, from.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

    /// The code as text, an instruction each.
    fn text(asm: &Asm) -> Vec<String> {
        let mut formatter = IntelFormatter::new();
        let decoder = Decoder::with_ip(64, &asm.code, 0, DecoderOptions::NONE);
        let format = |i| {
            let mut out = String::new();
            formatter.format(&i, &mut out);
            out
        };
        decoder.into_iter().map(format).collect()
    }

    #[test]
    fn operands_of_every_kind() {
        let mut a = Asm::default();
        let (r8, r13) = (Gpr(8), Gpr(13));
        a.load(8, r13, Mem::at(Gpr::RDI, 8));
        a.load(4, Gpr::RAX, Mem::at(r13, 0));
        a.load(8, Gpr::RAX, Mem::at(Gpr(12), 0x1234));
        a.load(8, Gpr::RAX, Mem::indexed(Gpr::RCX, r8, -8));
        a.lea(8, Gpr::RSI, Mem { base: None, index: Some((r8, 3)), disp: 5 });
        a.store(1, Mem::at(Gpr::RAX, 0), Gpr::RSI);
        a.store(2, Mem::at(Gpr::RAX, 0), r8);
        a.store_imm(8, Mem::at(Gpr::RDI, 300), -1);
        a.store_imm(2, Mem::at(Gpr::RAX, 0), 0x1234);
        a.store_imm(1, Mem::at(Gpr::RAX, 0), 0x12);
        let expected = [
            "mov r13,[rdi+8]",
            "mov eax,[r13]",
            "mov rax,[r12+1234h]",
            "mov rax,[rcx+r8-8]",
            "lea rsi,[r8*8+5]",
            "mov [rax],sil",
            "mov [rax],r8w",
            "mov qword ptr [rdi+12Ch],0FFFFFFFFFFFFFFFFh",
            "mov word ptr [rax],1234h",
            "mov byte ptr [rax],12h",
        ];
        assert_eq!(text(&a), expected);
    }

    #[test]
    fn operations_of_every_kind() {
        let mut a = Asm::default();
        let (r8, r9) = (Gpr(8), Gpr(9));
        a.mov(4, r8, Gpr::RBX);
        a.mov_low(1, Gpr::RSI, r8);
        a.mov_low(2, r8, r9);
        a.mov_imm(r8, 5);
        a.mov_imm(Gpr::RBX, u64::MAX);
        a.mov_imm(r8, 1 << 40);
        a.movzx(1, r8, Gpr::RSI);
        a.movzx(2, r8, r9);
        a.movsx(1, r8, Gpr::RSI);
        a.movsx(4, r8, r9);
        a.alu(1, Alu::Cmp, Gpr::RSI, r8);
        a.alu(8, Alu::Xor, r8, Mem::at(Gpr::RDI, 0));
        a.alu_imm(4, Alu::Sub, Mem::at(Gpr::RAX, 4), 1);
        a.alu_imm(8, Alu::And, r8, -4096);
        a.alu_imm(2, Alu::Cmp, r8, 0x1234);
        a.alu_imm(1, Alu::Cmp, Gpr::RDI, 0x7f);
        a.shift_imm(2, Shift::Ror, r8, 3);
        a.shift(8, Shift::Sar, r9);
        a.divide(8, true, r8);
        a.imul(4, r8, r9);
        a.bswap(8, r9);
        a.lzcnt(8, r8, r9);
        a.popcnt(4, Gpr::RBX, r9);
        a.setcc(Cc::LE, Gpr::RSI);
        a.cmov(Cc::AE, r8, r9);
        a.push(r8);
        a.pop(Gpr::RBP);
        a.call(Mem::at(Gpr::RDI, 0x200));
        a.test(1, Gpr::RSI, Gpr::RSI);
        let expected = [
            "mov r8d,ebx",
            "mov sil,r8b",
            "mov r8w,r9w",
            "mov r8d,5",
            "mov rbx,0FFFFFFFFFFFFFFFFh",
            "mov r8,10000000000h",
            "movzx r8d,sil",
            "movzx r8d,r9w",
            "movsx r8,sil",
            "movsxd r8,r9d",
            "cmp sil,r8b",
            "xor r8,[rdi]",
            "sub dword ptr [rax+4],1",
            "and r8,0FFFFFFFFFFFFF000h",
            "cmp r8w,1234h",
            "cmp dil,7Fh",
            "ror r8w,3",
            "sar r9,cl",
            "idiv r8",
            "imul r8d,r9d",
            "bswap r9",
            "lzcnt r8,r9",
            "popcnt ebx,r9d",
            "setle sil",
            "cmovae r8,r9",
            "push r8",
            "pop rbp",
            "call qword ptr [rdi+200h]",
            "test sil,sil",
        ];
        assert_eq!(text(&a), expected);
    }

    #[test]
    fn vectors_and_jumps() {
        let mut a = Asm::default();
        let (x1, x9) = (Xmm(1), Xmm(9));
        let back = a.code.len();
        a.load_x(x9, Mem::at(Gpr::RDI, 0x100));
        a.load_x_low(8, x1, Mem::at(Gpr::RAX, 0));
        a.store_x(Mem::at(Gpr::RAX, 0), x9);
        a.to_x(x9, Gpr(8));
        a.from_x(Gpr(8), x1);
        a.sse(0xef, x9, x1);
        a.sse_imm(0x66, 0x70, x1, x9, 0x1b);
        a.sse_shift(0x73, 3, x9, 8);
        a.signs(1, Gpr(8), x9);
        a.signs(4, Gpr::RBX, x1);
        let forth = a.jcc(Cc::NE);
        let again = a.jmp();
        a.lead(again, back);
        a.here(forth);
        a.ret();
        let expected = [
            "movups xmm9,[rdi+100h]",
            "movsd xmm1,[rax]",
            "movups [rax],xmm9",
            "movq xmm9,r8",
            "movq r8,xmm1",
            "pxor xmm9,xmm1",
            "pshufd xmm1,xmm9,1Bh",
            "psrldq xmm9,8",
            "pmovmskb r8d,xmm9",
            "movmskps ebx,xmm1",
            "jne 000000000000003Eh",
            "jmp 0",
            "ret",
        ];
        assert_eq!(text(&a), expected);
    }
}
