//! The assembler of AArch64 hosts (Arm ARM, part C6: A64 base instructions; C7: vector ones).
//!
//! Quick code is entered with the return address in X30, and keeps it in [`LINK`], so that it may call routines. What enters it
//! from quick code has it there already. It preserves nothing: [`Asm::trampoline`] has saved what C functions preserve.
//!
//! Flags are NZCV. What sets none on this host, OR and XOR, is tested where a condition asks.

use super::{Alu, Cc, Gpr, Jump, Mem, Rm, Shift, Unary, Xmm};
use crate::cpu::ANCHOR;

/// Holds the CPU's [`ANCHOR`], as in all compiled code: the first parameter of Cranelift's tail calls.
pub const CPU: Gpr = Gpr(2);
/// Holds the linear address of the page that runs.
pub const PAGE: Gpr = Gpr(27);
/// Holds the address to return to.
const LINK: Gpr = Gpr(28);
/// The accesses' result, a carry, a dividend.
pub const T0: Gpr = Gpr(9);
/// Counts of shifts.
pub const T1: Gpr = Gpr(10);
/// A remainder.
pub const T2: Gpr = Gpr(11);
/// The linear address of an access, as helpers take it.
pub const ARG: Gpr = Gpr(1);
/// Registers that hold values, a bit each: X3 to X8, X12 to X15, X19 to X26.
pub const POOL: u32 = 0x07f8_f1f8;
/// How far past its start code is entered by who has its frame: there is none.
pub const ENTERED: usize = 0;
/// Where thunks have their first and third parameter, and others for their use, which they save.
pub const THUNK_CPU: Gpr = Gpr(0);
#[allow(missing_docs)]
pub const THUNK_WHICH: Gpr = Gpr(2);
#[allow(missing_docs)]
pub const THUNK_SPARE: [Gpr; 5] = [Gpr(9), Gpr(10), Gpr(11), Gpr(12), Gpr(13)];

/// Two registers of the assembler's own, the second for addresses, and a third that nothing else uses.
const X16: Gpr = Gpr(16);
const X17: Gpr = Gpr(17);
const X0: Gpr = Gpr(0);
/// The return address of calls.
const X30: Gpr = Gpr(30);
/// The stack pointer, or zero.
const SP: Gpr = Gpr(31);
const ZR: Gpr = Gpr(31);
/// Vector registers of the assembler's own.
const V30: u32 = 30;
const V31: u32 = 31;

/// 64-bit operation.
const SF: u32 = 1 << 31;
/// The second operand is complemented, in logical instructions.
const NOT: u32 = 1 << 21;

/// Logical operations, by their place in the encoding.
#[derive(Clone, Copy)]
enum Logical {
    And = 0,
    Or = 1,
    Xor = 2,
    /// Sets flags.
    Ands = 3,
}

/// What the flags are of.
#[derive(Clone, Copy, Default)]
enum Flags {
    /// NZCV.
    #[default]
    Nzcv,
    /// The result in a register, of so many bytes.
    Result(Gpr, u64),
}

/// Code so far.
#[derive(Default)]
pub struct Asm {
    /// Its bytes.
    pub code: Vec<u8>,
    flags: Flags,
}

impl From<Vec<u8>> for Asm {
    fn from(code: Vec<u8>) -> Asm {
        Asm { code, flags: Flags::Nzcv }
    }
}

/// The bit for operands of 8 bytes; all others are computed as words of 32 bits.
fn sf(bytes: u64) -> u32 {
    if bytes == 8 { SF } else { 0 }
}

fn rd(r: Gpr) -> u32 {
    r.0.into()
}

fn rn(r: Gpr) -> u32 {
    u32::from(r.0) << 5
}

fn rm(r: Gpr) -> u32 {
    u32::from(r.0) << 16
}

/// The register of a vector register: V8 to V15 are C functions' to preserve.
fn v(x: Xmm) -> u32 {
    u32::from(if x.0 < 8 { x.0 } else { x.0 + 8 })
}

/// The host's condition (Arm ARM C1.2.4).
fn condition(cc: Cc) -> u32 {
    match cc {
        Cc::E => 0,
        Cc::NE => 1,
        Cc::AE => 2,
        Cc::B => 3,
        Cc::S => 4,
        Cc::NS => 5,
        Cc::A => 8,
        Cc::BE => 9,
        Cc::GE => 10,
        Cc::L => 11,
        Cc::G => 12,
        _ => 13,
    }
}

/// The fields N, immr and imms of a logical immediate that is one run of ones, perhaps rotated.
fn run_of_ones(bytes: u64, k: u64) -> Option<u32> {
    let size = if bytes == 8 { 64 } else { 32 };
    let all = u64::MAX >> (64 - size);
    let k = k & all;
    if k == 0 || k == all {
        return None;
    }
    let ones = k.count_ones();
    let run = (1 << ones) - 1;
    let rotated = |by: u32| match size {
        64 => u64::rotate_right(run, by),
        _ => u32::rotate_right(run as u32, by).into(),
    };
    let by = (0..size).find(|&by| rotated(by) == k)?;
    Some(u32::from(size == 64) << 22 | by << 16 | (ones - 1) << 10)
}

impl Asm {
    fn word(&mut self, word: u32) {
        self.code.extend(word.to_le_bytes());
    }

    // ---- moves ----

    fn logical(&mut self, sf: u32, op: Logical, to: Gpr, a: Gpr, b: Gpr) {
        self.word(0x0a00_0000 | sf | (op as u32) << 29 | rm(b) | rn(a) | rd(to));
    }

    /// `register = register`, 32 or 64 bits.
    pub fn mov(&mut self, bytes: u64, to: Gpr, from: Gpr) {
        self.logical(sf(bytes), Logical::Or, to, ZR, from);
    }

    /// Copies a bit field: of `width` bits, from bit 0 of `from` to bit `lsb` of `to`.
    fn insert(&mut self, to: Gpr, lsb: u32, width: u32, from: Gpr) {
        self.word(0xb340_0000 | (64 - lsb) % 64 << 16 | (width - 1) << 10 | rn(from) | rd(to));
    }

    /// A bit field of 32 or 64 bits, zero-extended.
    fn extract(&mut self, sf: u32, to: Gpr, from: Gpr, lsb: u32, width: u32) {
        self.word(0x5300_0000 | sf | sf >> 9 | lsb << 16 | (lsb + width - 1) << 10 | rn(from) | rd(to));
    }

    /// Replaces the low 8 or 16 bits of a register by those of another.
    pub fn mov_low(&mut self, bytes: u64, to: Gpr, from: Gpr) {
        self.insert(to, 0, 8 * bytes as u32, from);
    }

    /// A constant.
    pub fn mov_imm(&mut self, to: Gpr, k: u64) {
        let part = |k: u64, n: u32| (k >> (16 * n)) as u32 & 0xffff;
        let inverted = (0..4).filter(|&n| part(k, n) == 0xffff).count() > (0..4).filter(|&n| part(k, n) == 0).count();
        let rest = if inverted { 0xffff } else { 0 };
        let first = (0..4).find(|&n| part(k, n) != rest).unwrap_or(0);
        let (movz, movn, movk) = (0xd280_0000, 0x9280_0000, 0xf280_0000);
        match inverted {
            true => self.word(movn | first << 21 | part(!k, first) << 5 | rd(to)),
            false => self.word(movz | first << 21 | part(k, first) << 5 | rd(to)),
        }
        for n in (first + 1..4).filter(|&n| part(k, n) != rest) {
            self.word(movk | n << 21 | part(k, n) << 5 | rd(to));
        }
    }

    /// A constant of 8 bytes; where they are.
    pub fn mov_imm64(&mut self, to: Gpr, k: u64) -> usize {
        // LDR (literal), from behind the branch round it.
        self.word(0x5800_0000 | 2 << 5 | rd(to));
        self.word(0x1400_0000 | 3);
        self.code.extend(k.to_le_bytes());
        self.code.len() - 8
    }

    /// What a register is to hold of a constant of so many bytes.
    fn constant(&mut self, bytes: u64, to: Gpr, k: i32) {
        self.mov_imm(to, if bytes == 8 { i64::from(k) as u64 } else { u64::from(k as u32) });
    }

    // ---- memory ----

    /// The addressing of an access of 1 << `log2` bytes: an encoding but for the opcode's own bits. Others go by X17.
    fn address(&mut self, log2: u32, m: Mem) -> u32 {
        let (unsigned, unscaled, indexed) = (0x3900_0000, 0x3800_0000, 0x3820_6800);
        if let Mem { base: Some(base), index: None, disp } = m {
            let scaled = disp >> log2;
            if disp & ((1 << log2) - 1) == 0 && (0..4096).contains(&scaled) {
                return unsigned | (scaled as u32) << 10 | rn(base);
            }
            if (-256..256).contains(&disp) {
                return unscaled | (disp as u32 & 0x1ff) << 12 | rn(base);
            }
        }
        if let Mem { base: Some(base), index: Some((index, scale)), disp: 0 } = m
            && (scale == 0 || u32::from(scale) == log2)
        {
            return indexed | rm(index) | u32::from(scale != 0) << 12 | rn(base);
        }
        self.lea(8, X17, m);
        unsigned | rn(X17)
    }

    /// A load or store of a general-purpose register: `opc` as in its encoding.
    fn access(&mut self, log2: u32, opc: u32, r: Gpr, m: Mem) {
        let address = self.address(log2, m);
        self.word(log2 << 30 | opc << 22 | address | rd(r));
    }

    /// Loads 4 or 8 bytes; 4 are zero-extended.
    pub fn load(&mut self, bytes: u64, to: Gpr, from: Mem) {
        self.access(bytes.trailing_zeros(), 1, to, from);
    }

    /// Stores 1, 2, 4 or 8 bytes.
    pub fn store(&mut self, bytes: u64, to: Mem, from: Gpr) {
        self.access(bytes.trailing_zeros(), 0, from, to);
    }

    /// Stores a constant of 1, 2, 4 or 8 bytes, the last sign-extended from 4.
    pub fn store_imm(&mut self, bytes: u64, to: Mem, k: i32) {
        let log2 = bytes.trailing_zeros();
        // An address may take X16 to make.
        let address = self.address(log2, to);
        if k != 0 {
            self.constant(bytes, X16, k);
        }
        self.word(log2 << 30 | address | rd(if k == 0 { ZR } else { X16 }));
    }

    /// Zero-extends 1, 2 or 4 bytes to 8.
    pub fn movzx(&mut self, from_bytes: u64, to: Gpr, from: impl Into<Rm>) {
        match (from.into(), from_bytes) {
            (Rm::Mem(m), n) => self.access(n.trailing_zeros(), 1, to, m),
            (Rm::Reg(r), 4) => self.mov(4, to, Gpr(r)),
            (Rm::Reg(r), n) => self.extract(0, to, Gpr(r), 0, 8 * n as u32),
        }
    }

    /// Sign-extends 1, 2 or 4 bytes to 8.
    pub fn movsx(&mut self, from_bytes: u64, to: Gpr, from: impl Into<Rm>) {
        match from.into() {
            Rm::Mem(m) => self.access(from_bytes.trailing_zeros(), 2, to, m),
            Rm::Reg(r) => self.word(0x9340_0000 | (8 * from_bytes as u32 - 1) << 10 | rn(Gpr(r)) | rd(to)),
        }
    }

    /// The address of an operand, cut to 4 bytes or not.
    pub fn lea(&mut self, bytes: u64, to: Gpr, of: Mem) {
        let sf = sf(bytes);
        let base = match (of.base, of.index) {
            (Some(base), None) => base,
            (base, Some((index, scale))) => {
                let shifted = 0x0b00_0000 | sf | rm(index) | u32::from(scale) << 10;
                self.word(shifted | rn(base.unwrap_or(ZR)) | rd(to));
                to
            }
            (None, None) => ZR,
        };
        match of.disp {
            0 if base == to => {}
            0 => self.mov(bytes, to, base),
            k => self.add_imm(sf, to, base, k),
        }
    }

    /// `to = from + k`; changes X16.
    fn add_imm(&mut self, sf: u32, to: Gpr, from: Gpr, k: i32) {
        let op = 0x1100_0000 | sf | u32::from(k < 0) << 30;
        match k.unsigned_abs() {
            // Register 31 is the stack pointer here.
            n @ 0..4096 if from != ZR => self.word(op | n << 10 | rn(from) | rd(to)),
            _ => {
                self.constant(if sf == 0 { 4 } else { 8 }, X16, k);
                self.word(0x0b00_0000 | sf | rm(X16) | rn(from) | rd(to));
            }
        }
    }

    // ---- arithmetic ----

    /// `to op= from`.
    pub fn alu(&mut self, bytes: u64, op: Alu, to: Gpr, from: impl Into<Rm>) {
        let from = match from.into() {
            Rm::Reg(r) => Gpr(r),
            Rm::Mem(m) => {
                self.access(bytes.trailing_zeros(), 1, X16, m);
                X16
            }
        };
        let w = sf(bytes);
        match op {
            Alu::Cmp if bytes < 4 => self.compare_narrow(bytes, to, from),
            Alu::Add => self.word(0x2b00_0000 | w | rm(from) | rn(to) | rd(to)),
            Alu::Sub => self.word(0x6b00_0000 | w | rm(from) | rn(to) | rd(to)),
            Alu::Cmp => self.word(0x6b00_0000 | w | rm(from) | rn(to) | rd(ZR)),
            Alu::And => self.logical(w, Logical::Ands, to, to, from),
            Alu::Or => self.logical(w, Logical::Or, to, to, from),
            Alu::Xor => self.logical(w, Logical::Xor, to, to, from),
        }
        self.note_flags(op, bytes, to);
    }

    fn note_flags(&mut self, op: Alu, bytes: u64, result: Gpr) {
        self.flags = match op {
            Alu::Or | Alu::Xor => Flags::Result(result, bytes),
            _ => Flags::Nzcv,
        };
    }

    /// Compares 1 or 2 bytes, at the top of words; changes X16.
    fn compare_narrow(&mut self, bytes: u64, a: Gpr, b: Gpr) {
        let up = 32 - 8 * bytes as u32;
        let shifted = if b == X16 { X0 } else { X16 };
        self.shift_left(0, shifted, a, up);
        self.word(0x6b00_0000 | rm(b) | up << 10 | rn(shifted) | rd(ZR));
    }

    /// `to op= k`, the constant sign-extended from 4 bytes.
    pub fn alu_imm(&mut self, bytes: u64, op: Alu, to: impl Into<Rm>, k: i32) {
        match to.into() {
            Rm::Reg(r) => self.alu_constant(bytes, op, Gpr(r), k, X16),
            Rm::Mem(m) => {
                let (log2, address) = (bytes.trailing_zeros(), self.address(bytes.trailing_zeros(), m));
                self.word(log2 << 30 | 1 << 22 | address | rd(X16));
                self.alu_constant(bytes, op, X16, k, X0);
                if op != Alu::Cmp {
                    self.word(log2 << 30 | address | rd(X16));
                }
            }
        }
    }

    /// The same for a register; changes `spare`.
    fn alu_constant(&mut self, bytes: u64, op: Alu, to: Gpr, k: i32, spare: Gpr) {
        let w = sf(bytes);
        let logical = match op {
            Alu::And => Some(Logical::Ands),
            Alu::Or => Some(Logical::Or),
            Alu::Xor => Some(Logical::Xor),
            _ => None,
        };
        if let Some(logical) = logical {
            match run_of_ones(bytes, i64::from(k) as u64) {
                Some(fields) => self.word(0x1200_0000 | w | (logical as u32) << 29 | fields | rn(to) | rd(to)),
                None => {
                    self.constant(bytes, spare, k);
                    self.logical(w, logical, to, to, spare);
                }
            }
        } else if op == Alu::Cmp && bytes < 4 {
            let up = 32 - 8 * bytes as u32;
            let shifted = if spare == X16 { X0 } else { X16 };
            self.shift_left(0, shifted, to, up);
            self.constant(4, spare, k << up);
            self.word(0x6b00_0000 | rm(spare) | rn(shifted) | rd(ZR));
        } else {
            let result = if op == Alu::Cmp { ZR } else { to };
            let encoding = |op: u32, subtracts| op | w | 1 << 29 | u32::from(subtracts) << 30 | rn(to) | rd(result);
            let subtracts = op != Alu::Add;
            if k.unsigned_abs() < 4096 {
                // With the opposite constant, if there is one, the opposite operation sets the same flags.
                let word = encoding(0x1100_0000, subtracts != (k < 0));
                self.word(word | k.unsigned_abs() << 10);
            } else {
                self.constant(bytes, spare, k);
                self.word(encoding(0x0b00_0000, subtracts) | rm(spare));
            }
        }
        self.note_flags(op, bytes, to);
    }

    /// Sets the flags by `a & b`; of one register they are those of a comparison with 0.
    pub fn test(&mut self, bytes: u64, a: Gpr, b: Gpr) {
        self.flags = Flags::Nzcv;
        if a == b {
            return self.alu_imm(bytes, Alu::Cmp, a, 0);
        }
        self.logical(sf(bytes), Logical::And, X16, a, b);
        self.alu_imm(bytes, Alu::Cmp, X16, 0);
    }

    fn shift_left(&mut self, sf: u32, to: Gpr, from: Gpr, n: u32) {
        let size = if sf == 0 { 32 } else { 64 };
        self.word(0x5300_0000 | sf | sf >> 9 | (size - n) % size << 16 | (size - 1 - n) << 10 | rn(from) | rd(to));
    }

    /// Fills a word with copies of its lowest 8 or 16 bits, for rotates of these.
    fn repeat(&mut self, bytes: u64, r: Gpr) {
        if bytes == 1 {
            self.insert(r, 8, 8, r);
        }
        self.insert(r, 16, 16, r);
    }

    /// Shifts by a constant.
    pub fn shift_imm(&mut self, bytes: u64, op: Shift, to: Gpr, n: u8) {
        let size = if bytes == 8 { 64 } else { 32 };
        let (w, n) = (sf(bytes), u32::from(n) & (size - 1));
        match op {
            Shift::Shl => self.shift_left(w, to, to, n),
            Shift::Shr => self.extract(w, to, to, n, size - n),
            Shift::Sar => self.word(0x1300_0000 | w | w >> 9 | n << 16 | (size - 1) << 10 | rn(to) | rd(to)),
            Shift::Rol | Shift::Ror => {
                if bytes < 4 {
                    self.repeat(bytes, to);
                }
                let n = if op == Shift::Rol { (size - n) % size } else { n };
                self.word(0x1380_0000 | w | w >> 9 | rm(to) | n << 10 | rn(to) | rd(to));
            }
        }
    }

    /// `to = from` shifted by `count`, modulo the operand size.
    fn shift_variable(&mut self, bytes: u64, op: Shift, to: Gpr, from: Gpr, count: Gpr) {
        let code = match op {
            Shift::Shl => 0x2000,
            Shift::Shr => 0x2400,
            Shift::Sar => 0x2800,
            Shift::Rol | Shift::Ror => 0x2c00,
        };
        self.word(0x1ac0_0000 | code | sf(bytes) | rm(count) | rn(from) | rd(to));
    }

    /// Shifts by T1.
    pub fn shift(&mut self, bytes: u64, op: Shift, to: Gpr) {
        let rotates = matches!(op, Shift::Rol | Shift::Ror);
        if rotates && bytes < 4 {
            self.repeat(bytes, to);
        }
        let mut count = T1;
        if op == Shift::Rol {
            self.negate(X16, T1);
            count = X16;
        }
        self.shift_variable(bytes, op, to, to, count);
    }

    /// `to = -from`, 64 bits.
    fn negate(&mut self, to: Gpr, from: Gpr) {
        self.word(0xcb00_0000 | rm(from) | rn(ZR) | rd(to));
    }

    /// `to = from` shifted by the count in T1, 4 or 8 bytes; a carry that is meant only if the count is not 0 in T0's low byte.
    pub fn shift_out(&mut self, bytes: u64, op: Shift, to: Gpr, from: Gpr) {
        self.shift_variable(bytes, op, to, from, T1);
        // The bit that goes last: from the left `size - count`, which is `-count` modulo the size, from the right `count - 1`.
        match op {
            Shift::Shl => self.negate(X16, T1),
            _ => self.add_imm(SF, X16, T1, -1),
        }
        self.shift_variable(bytes, Shift::Shr, T0, from, X16);
        self.extract(0, T0, T0, 0, 1);
    }

    /// An operation on one operand.
    pub fn unary(&mut self, bytes: u64, op: Unary, r: Gpr) {
        match op {
            Unary::Not => self.word(0x2a00_0000 | NOT | sf(bytes) | rm(r) | rn(ZR) | rd(r)),
            Unary::Neg => self.word(0x4b00_0000 | sf(bytes) | rm(r) | rn(ZR) | rd(r)),
        }
    }

    /// `high:low = T0 * by`, 64 bits each.
    pub fn multiply(&mut self, signed: bool, low: Gpr, high: Gpr, by: Gpr) {
        self.word(0x9b00_0000 | rm(by) | 31 << 10 | rn(T0) | rd(low));
        self.word(if signed { 0x9b40_7c00 } else { 0x9bc0_7c00 } | rm(by) | rn(T0) | rd(high));
    }

    /// Whether [`Asm::divide`] takes dividends of twice the size.
    pub const DIVIDES_DOUBLE: bool = false;

    /// Divides T0: the quotient in T0, the remainder in T2.
    pub fn divide(&mut self, bytes: u64, signed: bool, by: Gpr) {
        let w = sf(bytes);
        self.word(if signed { 0x1ac0_0c00 } else { 0x1ac0_0800 } | w | rm(by) | rn(T0) | rd(X16));
        // MSUB.
        self.word(0x1b00_8000 | w | rm(by) | u32::from(T0.0) << 10 | rn(X16) | rd(T2));
        self.mov(bytes, T0, X16);
    }

    /// Sign-extends T0 into T2.
    pub fn extend_sign(&mut self, bytes: u64) {
        self.mov(bytes, T2, T0);
        self.shift_imm(bytes, Shift::Sar, T2, if bytes == 8 { 63 } else { 31 });
    }

    /// `to *= from`, the low half.
    pub fn imul(&mut self, bytes: u64, to: Gpr, from: Gpr) {
        self.word(0x1b00_0000 | sf(bytes) | rm(from) | 31 << 10 | rn(to) | rd(to));
    }

    /// Swaps the bytes of 4 or 8.
    pub fn bswap(&mut self, bytes: u64, r: Gpr) {
        self.word(if bytes == 8 { 0xdac0_0c00 } else { 0x5ac0_0800 } | rn(r) | rd(r));
    }

    /// LZCNT.
    pub fn lzcnt(&mut self, bytes: u64, to: Gpr, from: Gpr) {
        self.word(0x5ac0_1000 | sf(bytes) | rn(from) | rd(to));
    }

    /// TZCNT.
    pub fn tzcnt(&mut self, bytes: u64, to: Gpr, from: Gpr) {
        self.word(0x5ac0_0000 | sf(bytes) | rn(from) | rd(to));
        self.lzcnt(bytes, to, to);
    }

    /// POPCNT.
    pub fn popcnt(&mut self, bytes: u64, to: Gpr, from: Gpr) {
        self.mov(bytes, X16, from);
        self.word(0x9e67_0000 | rn(X16) | V31);
        // CNT and ADDV, of 8 bytes.
        self.word(0x0e20_5800 | V31 << 5 | V31);
        self.word(0x0e31_b800 | V31 << 5 | V31);
        // FMOV of 32 bits.
        self.word(0x1e26_0000 | V31 << 5 | rd(to));
    }

    /// Has NZCV be what the flags are of.
    fn settle(&mut self) {
        if let Flags::Result(r, bytes) = self.flags {
            self.test(bytes, r, r);
        }
    }

    /// The low byte of a register as 0 or 1.
    pub fn setcc(&mut self, cc: Cc, to: Gpr) {
        self.settle();
        self.word(0x1a80_0400 | rm(ZR) | condition(cc.opposite()) << 12 | rn(ZR) | rd(to));
    }

    /// `to = from` if a condition holds.
    pub fn cmov(&mut self, cc: Cc, to: Gpr, from: Gpr) {
        self.settle();
        self.word(0x9a80_0000 | rm(to) | condition(cc) << 12 | rn(from) | rd(to));
    }

    // ---- control ----

    /// Pushes a register, and the return address.
    pub fn push(&mut self, r: Gpr) {
        self.save(&[r, X30]);
    }

    /// Pops them.
    pub fn pop(&mut self, r: Gpr) {
        self.restore(&[r, X30]);
    }

    /// Calls what an address in memory says.
    pub fn call(&mut self, target: Mem) {
        self.load(8, X16, target);
        self.call_register(X16);
    }

    /// Pushes registers, pairs of them.
    pub fn save(&mut self, registers: &[Gpr]) {
        for pair in registers.as_chunks::<2>().0 {
            self.word(0xa980_0000 | (-2_i32 as u32 & 0x7f) << 15 | u32::from(pair[1].0) << 10 | rn(SP) | rd(pair[0]));
        }
    }

    /// Pops what [`Self::save`] pushed.
    pub fn restore(&mut self, registers: &[Gpr]) {
        for pair in registers.as_chunks::<2>().0.iter().rev() {
            self.word(0xa8c0_0000 | 2 << 15 | u32::from(pair[1].0) << 10 | rn(SP) | rd(pair[0]));
        }
    }

    fn call_register(&mut self, r: Gpr) {
        self.word(0xd63f_0000 | rn(r));
    }

    fn jump_register(&mut self, r: Gpr) {
        self.word(0xd61f_0000 | rn(r));
    }

    /// Does nothing.
    pub fn nop(&mut self) {
        self.word(0xd503_201f);
    }

    /// Returns from a routine.
    pub fn ret(&mut self) {
        self.word(0xd65f_0000 | rn(X30));
    }

    /// A fence between all loads and stores before it and those behind.
    pub fn fence(&mut self) {
        // DMB ISH.
        self.word(0xd503_3bbf);
    }

    /// What keeps a load in order with what is behind it ([`crate::jit::ordering`]).
    pub fn loaded(&mut self) {
        self.fence();
    }

    /// What keeps a store in order with what is before it.
    pub fn storing(&mut self) {
        self.fence();
    }

    /// Begins code that is entered from anywhere.
    pub fn enter(&mut self) {
        self.mov(8, LINK, X30);
    }

    /// Returns to whoever called compiled code.
    pub fn go_back(&mut self) {
        self.word(0xd65f_0000 | rn(LINK));
    }

    /// Goes to code by an address in memory, as from anywhere.
    pub fn go_by(&mut self, address: Mem) {
        self.load(8, X16, address);
        self.mov(8, X30, LINK);
        self.jump_register(X16);
    }

    /// Jumps to where an address in memory says; who is there has this code's frame.
    pub fn jump_by(&mut self, target: Mem) {
        self.load(8, X16, target);
        self.jump_register(X16);
    }

    /// Goes into a region.
    pub fn enter_region(&mut self) -> Jump {
        self.mov(8, X30, LINK);
        self.jmp()
    }

    /// Goes, patchably, to the code that goes on by the jump cache.
    pub fn link_to_lookup(&mut self) -> Jump {
        self.mov(8, X30, LINK);
        self.link(None)
    }

    /// Calls the C function whose address the CPU state has at an offset, with the CPU, ARG and T2. Of registers, CPU and
    /// PAGE are preserved.
    pub fn call_function(&mut self, at: i32) {
        self.push(CPU);
        self.add_imm(SF, X0, CPU, -ANCHOR);
        self.load(8, X16, Mem::at(CPU, at));
        self.mov(8, Gpr(2), T2);
        self.call_register(X16);
        self.pop(CPU);
    }

    /// Calls the thunk whose address the CPU state has at an offset, with ARG and T2. Registers that hold values are
    /// preserved, and so is ARG.
    pub fn call_thunk(&mut self, at: i32) {
        self.push(CPU);
        self.load(8, X16, Mem::at(CPU, at));
        self.mov(8, X0, CPU);
        self.mov(8, Gpr(2), T2);
        self.call_register(X16);
        self.pop(CPU);
    }

    /// `extern "C" fn(cpu, code)`: calls compiled code, which preserves none of the registers that C functions do but V8 to
    /// V15.
    pub fn trampoline(&mut self) {
        let pairs = [(19, 20), (21, 22), (23, 24), (25, 26), (27, 28)];
        let pair = |op: u32, n: usize, (a, b): (u32, u32)| op | (2 * n as u32 + 2) << 15 | b << 10 | rn(SP) | a;
        // X29 and X30 below them: 96 bytes.
        self.word(0xa980_0000 | (-12_i32 as u32 & 0x7f) << 15 | 30 << 10 | rn(SP) | 29);
        for (n, regs) in pairs.into_iter().enumerate() {
            self.word(pair(0xa900_0000, n, regs));
        }
        self.add_imm(SF, CPU, X0, ANCHOR);
        self.call_register(Gpr(1));
        for (n, regs) in pairs.into_iter().enumerate() {
            self.word(pair(0xa940_0000, n, regs));
        }
        self.word(0xa8c0_0000 | 12 << 15 | 30 << 10 | rn(SP) | 29);
        self.ret();
    }

    /// Calls what the instruction says that stands where is given back.
    pub fn call_rel(&mut self) -> usize {
        self.flags = Flags::Nzcv;
        self.word(0x9400_0000);
        self.code.len() - 4
    }

    /// Jumps to where whoever patches the jump says, if a condition is given and holds or none is; it is one instruction, so
    /// that it can be patched while others run it.
    pub fn link(&mut self, cc: Option<Cc>) -> Jump {
        match cc {
            Some(cc) => Jump(self.jcc_out(cc)),
            None => self.jmp(),
        }
    }

    /// Whether [the way into another page](crate::quick::cross) has the key and the branch in code, both patched.
    pub const KNOWS_WAYS: bool = false;

    /// Makes the next constant of 8 bytes one at a multiple of 8.
    pub fn align_constant(&mut self) {
        while !self.code.len().is_multiple_of(8) {
            self.nop();
        }
    }

    /// Jumps, if a condition holds, to other code of the arena: where the jump stands. A conditional branch reaches 1 MiB.
    pub fn jcc_out(&mut self, cc: Cc) -> usize {
        let on = self.jcc(cc.opposite());
        let Jump(at) = self.jmp();
        self.here(on);
        at
    }

    /// Jumps, if a condition holds, to where [`Self::here`] says.
    pub fn jcc(&mut self, cc: Cc) -> Jump {
        self.settle();
        self.word(0x5400_0000 | condition(cc));
        Jump(self.code.len() - 4)
    }

    /// Jumps to where [`Self::here`] says, or whoever patches the jump.
    pub fn jmp(&mut self) -> Jump {
        self.word(0x1400_0000);
        Jump(self.code.len() - 4)
    }

    /// Makes the end of the code the target of a jump.
    pub fn here(&mut self, jump: Jump) {
        self.flags = Flags::Nzcv;
        self.lead(jump, self.code.len());
    }

    /// Makes an offset in the code the target of a jump.
    pub fn lead(&mut self, Jump(at): Jump, to: usize) {
        let words = ((to as i64 - at as i64) / 4) as u32;
        let Some(code) = self.code.get_mut(at..).and_then(|code| code.first_chunk_mut::<4>()) else { return };
        let word = u32::from_le_bytes(*code);
        let word = match word >> 24 {
            0x54 => word | (words & 0x7_ffff) << 5,
            _ => word | words & 0x03ff_ffff,
        };
        *code = word.to_le_bytes();
    }

    // ---- vectors ----

    /// An instruction of three vector registers, or two.
    pub fn vector(&mut self, op: u32, to: Xmm, a: Xmm, b: Option<Xmm>) {
        self.word(op | b.map_or(0, |b| v(b) << 16) | v(a) << 5 | v(to));
    }

    /// The same with zero for the first operand.
    pub fn vector_of_zero(&mut self, op: u32, to: Xmm, b: Xmm) {
        self.word(0x6f00_e400 | V31);
        self.word(op | v(b) << 16 | V31 << 5 | v(to));
    }

    /// The same with zero for the second one.
    pub fn vector_and_zero(&mut self, op: u32, to: Xmm, a: Xmm) {
        self.word(0x6f00_e400 | V31);
        self.word(op | V31 << 16 | v(a) << 5 | v(to));
    }

    /// An operation on the even elements of 4 bytes of two registers.
    pub fn vector_of_even(&mut self, op: u32, to: Xmm, a: Xmm, b: Xmm) {
        let xtn = 0x0ea1_2800;
        self.word(xtn | v(a) << 5 | V30);
        self.word(xtn | v(b) << 5 | V31);
        self.word(op | V31 << 16 | V30 << 5 | v(to));
    }

    /// Loads 16 bytes.
    pub fn load_x(&mut self, to: Xmm, from: Mem) {
        let address = self.address(4, from);
        self.word(0x04c0_0000 | address | v(to));
    }

    /// Loads 4 or 8 bytes, zeros above.
    pub fn load_x_low(&mut self, bytes: u64, to: Xmm, from: Mem) {
        let address = self.address(bytes.trailing_zeros(), from);
        self.word(bytes.trailing_zeros() << 30 | 0x0440_0000 | address | v(to));
    }

    /// Stores 16 bytes.
    pub fn store_x(&mut self, to: Mem, from: Xmm) {
        let address = self.address(4, to);
        self.word(0x0480_0000 | address | v(from));
    }

    /// `to = from`.
    pub fn mov_x(&mut self, to: Xmm, from: Xmm) {
        self.vector(0x4ea0_1c00, to, from, Some(from));
    }

    /// The low 8 bytes from a register, zeros above.
    pub fn to_x(&mut self, to: Xmm, from: Gpr) {
        self.word(0x9e67_0000 | rn(from) | v(to));
    }

    /// The low 8 bytes to a register.
    pub fn from_x(&mut self, to: Gpr, from: Xmm) {
        self.word(0x9e66_0000 | v(from) << 5 | rd(to));
    }

    /// The high 8 bytes to a register.
    pub fn from_high(&mut self, to: Gpr, from: Xmm, _: Xmm) {
        // UMOV of element 1 of 8 bytes.
        self.word(0x4e18_3c00 | v(from) << 5 | rd(to));
    }

    /// The high 8 bytes from a register.
    pub fn set_high(&mut self, to: Xmm, from: Gpr, _: Xmm) {
        // INS of element 1 of 8 bytes.
        self.word(0x4e18_1c00 | rn(from) | v(to));
    }

    /// `x = 0`.
    pub fn zero_x(&mut self, x: Xmm) {
        self.word(0x6f00_e400 | v(x));
    }

    /// The sign bits of a register's elements of 1, 4 or 8 bytes.
    pub fn signs(&mut self, element: u8, to: Gpr, from: Xmm) {
        if element == 1 {
            // CMLT with zero gives all ones where a sign is; what each is worth remains, and is added up by halves.
            self.word(0x4e20_a800 | v(from) << 5 | V31);
            self.mov_imm(X16, 0x8040_2010_0804_0201);
            self.word(0x4e08_0c00 | rn(X16) | V30);
            self.word(0x4e20_1c00 | V30 << 16 | V31 << 5 | V31);
            // EXT by 8 bytes, ZIP1 of bytes, ADDV of 2-byte elements, UMOV of the first.
            self.word(0x6e00_4000 | V31 << 16 | V31 << 5 | V30);
            self.word(0x4e00_3800 | V30 << 16 | V31 << 5 | V31);
            self.word(0x4e71_b800 | V31 << 5 | V31);
            self.word(0x0e02_3c00 | V31 << 5 | rd(to));
            return;
        }
        self.from_x(X16, from);
        self.from_high(X17, from, from);
        self.extract(SF, to, X16, 63, 1);
        self.extract(SF, X0, X17, 63, 1);
        if element == 8 {
            return self.insert(to, 1, 1, X0);
        }
        self.insert(to, 3, 1, X0);
        // The bit that was alone goes to its place.
        self.insert(to, 1, 1, to);
        self.extract(0, X16, X16, 31, 1);
        self.extract(0, X17, X17, 31, 1);
        self.insert(to, 0, 1, X16);
        self.insert(to, 2, 1, X17);
    }
}
