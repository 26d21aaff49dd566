//! The instructions: operands from the stack, an operation, flags, the result where it belongs.

use super::f80::{BCD_INDEFINITE, truncating};
use super::soft::compare;
use super::{
    Arith, Class, Constant, Engine, F80, Format, Native, Op, Operation, Outcome, Soft, X87, status, summarized,
};

/// EFLAGS bits that FCOMI sets and FCMOVcc tests.
const CF: u64 = 1 << 0;
const PF: u64 = 1 << 2;
const ZF: u64 = 1 << 6;

/// What [`X87::store`] writes, and the state that follows once it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Store {
    /// The bytes as a little-endian integer.
    pub value: u128,
    /// How many there are; zero if an unmasked exception forbids the store.
    pub size: u8,
    fsw: u16,
    ftw: u8,
}

impl X87 {
    /// Executes an instruction without memory operand. `eflags` is for FCMOVcc. FCOMI and its kin return the new ZF, PF
    /// and CF, all other arithmetic flags being cleared.
    pub fn execute(&mut self, op: Op, eflags: u64) -> Option<u64> {
        match op {
            Op::Arith { arith, i, to_i, pop } => self.arith(arith, i, to_i, pop),
            Op::Compare { i, quiet, pops } => self.compare_register(i, quiet, pops),
            Op::CompareFlags { i, quiet, pop } => return Some(self.compare_flags(i, quiet, pop)),
            Op::LoadRegister(i) => self.load_register(i),
            Op::StoreRegister { i, pop } => self.store_register(i, pop),
            Op::StoreUnchecked(i) => {
                self.fsw &= !status::C1;
                if !self.is_empty(0) {
                    self.set_st(i, self.st(0));
                }
                self.pop();
            }
            Op::Exchange(i) => self.exchange(i),
            Op::Free { i, pop } => {
                self.fsw &= !status::C1;
                self.free(i);
                if pop {
                    self.pop();
                }
            }
            Op::Move { i, condition, not } => {
                let mask = [CF, ZF, CF | ZF, PF][usize::from(condition & 3)];
                self.conditional_move(i, (eflags & mask != 0) != not);
            }
            Op::Constant(constant) => self.load_value(constant.value(self.fcw), 0),
            Op::Replace(operation) => self.replace(operation),
            Op::Fold(operation) => self.fold(operation),
            Op::Split(operation) => self.split(operation),
            Op::ChangeSign => self.map(|v| v.with_sign(!v.is_negative())),
            Op::Abs => self.map(|v| v.with_sign(false)),
            Op::Test => {
                if self.has_operands(0, 0) {
                    self.set_codes(compare(self.st(0), F80::ZERO, false));
                } else {
                    self.compare_underflow();
                }
            }
            Op::Examine => self.examine(),
            Op::IncrementTop => {
                self.set_top(self.top() + 1);
                self.fsw &= !status::C1;
            }
            Op::DecrementTop => {
                self.set_top(self.top().wrapping_sub(1));
                self.fsw &= !status::C1;
            }
            Op::ClearExceptions => self.clear_exceptions(),
            Op::Init => self.init(),
            _ => {}
        }
        None
    }

    /// Executes an instruction that reads memory; `operand` holds the bytes as a little-endian integer.
    pub fn load(&mut self, op: Op, operand: u128) {
        match op {
            Op::LoadControl => self.set_control(operand as u16),
            Op::Load(format) => {
                let (value, denormal) = read(format, operand);
                let float = matches!(format, Format::F32 | Format::F64);
                match value.class() {
                    Class::Signalling if float => self.load_value(value.quieted(), status::IE),
                    _ => self.load_value(value, if denormal { status::DE } else { 0 }),
                }
            }
            Op::ArithMemory(arith, format) => {
                let (value, denormal) = read(format, operand);
                self.arith_memory(arith, value, denormal);
            }
            _ => {}
        }
    }

    /// What an instruction that writes memory writes. The state stays as it is until [`X87::commit`], so that a page
    /// fault leaves no trace.
    pub fn store(&self, op: Op) -> Store {
        let plain = |value: u16| Store { value: u128::from(value), size: 2, fsw: self.fsw, ftw: self.ftw };
        match op {
            Op::StoreControl => plain(self.fcw),
            Op::StoreStatus => plain(self.fsw),
            Op::Store { format, pop, truncate } => self.store_value(format, pop, truncate),
            _ => Store { size: 0, ..plain(0) },
        }
    }

    /// Completes an instruction whose store has reached memory (or had nothing to write).
    pub fn commit(&mut self, store: &Store) {
        self.fsw = store.fsw;
        self.ftw = store.ftw;
    }

    /// Accumulates exceptions, sets C1, and says whether none of them keeps the operation from being done.
    #[inline]
    fn settle(&mut self, flags: u16) -> bool {
        let flagged = self.fsw & !status::C1 | flags & (status::EXCEPTIONS | status::SF | status::C1);
        self.fsw = summarized(flagged, self.fcw);
        flags & !self.fcw & status::BEFORE == 0
    }

    fn underflow(&mut self) -> bool {
        self.settle(status::IE | status::SF)
    }

    fn overflow(&mut self) -> bool {
        self.settle(status::IE | status::SF | status::C1)
    }

    fn has_operands(&self, i: u8, j: u8) -> bool {
        !self.is_empty(i) && !self.is_empty(j)
    }

    fn arith(&mut self, arith: Arith, i: u8, to_i: bool, pop: bool) {
        let Some(operation) = arith.operation() else { return };
        let target = if to_i { i } else { 0 };
        if self.has_operands(0, i) {
            let outcome = Soft::run(operation, self.st(0), self.st(i), self.fcw);
            if !self.settle(outcome.status) {
                return;
            }
            self.set_st(target, outcome.value);
        } else if self.underflow() {
            self.set_st(target, F80::INDEFINITE);
        } else {
            return;
        }
        if pop {
            self.pop();
        }
    }

    fn arith_memory(&mut self, arith: Arith, b: F80, denormal: bool) {
        let empty = self.is_empty(0);
        let Some(operation) = arith.operation() else {
            let pops = u8::from(arith == Arith::Comp);
            if empty {
                return self.compare_underflow_popping(pops);
            }
            let codes = widened(compare(self.st(0), b, false), self.st(0), denormal);
            if self.set_codes(codes) && pops != 0 {
                self.pop();
            }
            return;
        };
        if empty {
            if self.underflow() {
                self.set_st(0, F80::INDEFINITE);
            }
            return;
        }
        let outcome = Soft::run(operation, self.st(0), b, self.fcw);
        let flags = widened(outcome.status, self.st(0), denormal);
        // Unmasked, the denormal operand is found before anything the operation would raise.
        let flags = if flags & !self.fcw & status::DE != 0 { status::DE } else { flags };
        if self.settle(flags) {
            self.set_st(0, outcome.value);
        }
    }

    /// Sets C3, C2 and C0, even if an unmasked exception keeps the stack from being popped, and settles the
    /// exceptions; whether to pop.
    fn set_codes(&mut self, codes: u16) -> bool {
        self.fsw = self.fsw & !status::CODES | codes & status::CODES;
        self.settle(codes & status::EXCEPTIONS)
    }

    fn compare_underflow(&mut self) -> bool {
        self.fsw |= status::C0 | status::C2 | status::C3;
        self.underflow()
    }

    fn compare_underflow_popping(&mut self, pops: u8) {
        if self.compare_underflow() {
            (0..pops).for_each(|_| self.pop());
        }
    }

    fn compare_register(&mut self, i: u8, quiet: bool, pops: u8) {
        if !self.has_operands(0, i) {
            return self.compare_underflow_popping(pops);
        }
        if self.set_codes(compare(self.st(0), self.st(i), quiet)) {
            (0..pops).for_each(|_| self.pop());
        }
    }

    /// Sets EFLAGS even if an unmasked exception keeps the stack from being popped; C1 is a stack fault's only.
    fn compare_flags(&mut self, i: u8, quiet: bool, pop: bool) -> u64 {
        let (codes, done) = if self.has_operands(0, i) {
            let codes = compare(self.st(0), self.st(i), quiet);
            (codes, self.settle(codes & status::EXCEPTIONS | self.fsw & status::C1))
        } else {
            (status::C0 | status::C2 | status::C3, self.underflow())
        };
        if pop && done {
            self.pop();
        }
        let bit = |code, flag| if codes & code != 0 { flag } else { 0 };
        bit(status::C0, CF) | bit(status::C2, PF) | bit(status::C3, ZF)
    }

    /// Pushes a value whose loading raised `flags`; a denormal is pushed though it be unmasked.
    fn load_value(&mut self, value: F80, flags: u16) {
        if !self.is_empty(7) {
            if self.overflow() {
                self.push(F80::INDEFINITE);
            }
        } else if self.settle(flags) || flags & status::IE == 0 {
            self.push(value);
        }
    }

    fn load_register(&mut self, i: u8) {
        if self.is_empty(i) {
            if self.underflow() {
                self.push(F80::INDEFINITE);
            }
        } else {
            self.load_value(self.st(i), 0);
        }
    }

    fn store_register(&mut self, i: u8, pop: bool) {
        let value = if !self.is_empty(0) {
            self.fsw &= !status::C1;
            self.st(0)
        } else if self.underflow() {
            F80::INDEFINITE
        } else {
            return;
        };
        self.set_st(i, value);
        if pop {
            self.pop();
        }
    }

    fn store_value(&self, format: Format, pop: bool, truncate: bool) -> Store {
        let cw = if truncate { truncating(self.fcw) } else { self.fcw };
        let empty = self.is_empty(0);
        let value = self.st(0);
        let int = |width| {
            let (n, flags) = value.to_int(width, cw);
            (n as u64 as u128, flags)
        };
        let (bits, mut flags) = match format {
            Format::F32 => {
                let (bits, flags) = value.to_f32(cw);
                (u128::from(bits), flags)
            }
            Format::F64 => {
                let (bits, flags) = value.to_f64(cw);
                (u128::from(bits), flags)
            }
            Format::F80 => (value.to_bits(), 0),
            Format::I16 => int(16),
            Format::I32 => int(32),
            Format::I64 => int(64),
            Format::Bcd => value.to_bcd(cw),
        };
        let bits = if empty { indefinite(format) } else { bits };
        if empty {
            flags = status::IE | status::SF;
        }
        let mut after = *self;
        let blocked = flags & !self.fcw & (status::IE | status::OE | status::UE) != 0;
        if blocked {
            // Nothing is rounded, so nothing is inexact.
            flags &= !(status::PE | status::C1);
        }
        after.settle(flags);
        if pop && !blocked {
            after.pop();
        }
        Store { value: bits, size: if blocked { 0 } else { format.size() }, fsw: after.fsw, ftw: after.ftw }
    }

    fn exchange(&mut self, i: u8) {
        if self.has_operands(0, i) {
            self.fsw &= !status::C1;
        } else if !self.underflow() {
            return;
        }
        let or_indefinite = |x: &X87, i| if x.is_empty(i) { F80::INDEFINITE } else { x.st(i) };
        let (a, b) = (or_indefinite(self, 0), or_indefinite(self, i));
        self.set_st(0, b);
        self.set_st(i, a);
    }

    fn conditional_move(&mut self, i: u8, taken: bool) {
        if !self.has_operands(0, i) {
            if self.underflow() {
                self.set_st(0, F80::INDEFINITE);
            }
        } else if taken {
            self.set_st(0, self.st(i));
        }
    }

    /// FCHS and FABS: no exceptions but the stack's.
    fn map(&mut self, f: impl Fn(F80) -> F80) {
        if !self.is_empty(0) {
            self.fsw &= !status::C1;
            self.set_st(0, f(self.st(0)));
        } else if self.underflow() {
            self.set_st(0, F80::INDEFINITE);
        }
    }

    fn replace(&mut self, operation: Operation) {
        self.fsw &= !codes_cleared(operation);
        let binary = matches!(operation, Operation::Scale | Operation::Prem | Operation::Prem1);
        let second = u8::from(binary);
        if !self.has_operands(0, second) {
            if self.underflow() {
                self.set_st(0, F80::INDEFINITE);
            }
            return;
        }
        let outcome = run(operation, self.st(0), self.st(second), self.fcw);
        if self.settle(outcome.status) {
            // A remainder of something that is no number has no quotient to report.
            let codes = if outcome.value.is_nan() { 0 } else { codes_of(operation) };
            self.fsw = self.fsw & !codes | outcome.status & codes;
            self.set_st(0, outcome.value);
        }
    }

    fn fold(&mut self, operation: Operation) {
        let value = if self.has_operands(0, 1) {
            let outcome = run(operation, self.st(0), self.st(1), self.fcw);
            if !self.settle(outcome.status) {
                return;
            }
            outcome.value
        } else if self.underflow() {
            F80::INDEFINITE
        } else {
            return;
        };
        self.set_st(1, value);
        self.pop();
    }

    fn split(&mut self, operation: Operation) {
        self.fsw &= !codes_cleared(operation);
        let fault = if self.is_empty(0) {
            Some(self.underflow())
        } else if !self.is_empty(7) {
            Some(self.overflow())
        } else {
            None
        };
        if let Some(masked) = fault {
            if masked {
                self.set_st(0, F80::INDEFINITE);
                self.push(F80::INDEFINITE);
            }
            return;
        }
        let outcome = run(operation, self.st(0), F80::ZERO, self.fcw);
        if !self.settle(outcome.status) {
            return;
        }
        self.fsw = self.fsw & !codes_of(operation) | outcome.status & codes_of(operation);
        if outcome.status & codes_of(operation) & status::C2 == 0 {
            self.set_st(0, outcome.value);
            self.push(outcome.second);
        }
    }

    fn examine(&mut self) {
        let class = if self.is_empty(0) {
            status::C3 | status::C0
        } else {
            match self.st(0).class() {
                Class::Unsupported => 0,
                Class::Quiet | Class::Signalling => status::C0,
                Class::Normal => status::C2,
                Class::Infinity => status::C2 | status::C0,
                Class::Zero => status::C3,
                Class::Denormal => status::C3 | status::C2,
            }
        };
        let sign = if self.st(0).is_negative() { status::C1 } else { 0 };
        self.fsw = self.fsw & !status::CODES | class | sign;
    }
}

/// Runs an operation on the engine that does it best: the portable one is exact and quicker for all but the
/// transcendentals.
fn run(operation: Operation, a: F80, b: F80, cw: u16) -> Outcome {
    use Operation::*;
    match operation {
        F2xm1 | Yl2x | Yl2xp1 | Ptan | Patan | Sin | Cos | SinCos => Native::run(operation, a, b, cw),
        _ => Soft::run(operation, a, b, cw),
    }
}

/// The condition codes an operation defines.
fn codes_of(operation: Operation) -> u16 {
    use Operation::*;
    match operation {
        Prem | Prem1 => status::CODES,
        Ptan | Sin | Cos | SinCos => status::C2 | status::C1,
        _ => status::C1,
    }
}

/// The condition codes an operation clears even when it is not done.
fn codes_cleared(operation: Operation) -> u16 {
    codes_of(operation) & status::C2
}

/// A number read from memory, and whether it was denormal there though it is not in the register format.
fn read(format: Format, bits: u128) -> (F80, bool) {
    match format {
        Format::F32 => F80::from_f32(bits as u32),
        Format::F64 => F80::from_f64(bits as u64),
        Format::F80 => (F80::from_bits(bits), false),
        Format::I16 => (F80::from_i64(i64::from(bits as i16)), false),
        Format::I32 => (F80::from_i64(i64::from(bits as i32)), false),
        Format::I64 => (F80::from_i64(bits as i64), false),
        Format::Bcd => (F80::from_bcd(bits), false),
    }
}

/// Adds the DE of a denormal memory operand, which widening has hidden, to the flags of an operation on it and `a`. A
/// NaN takes precedence over it, and so does a division by zero.
fn widened(flags: u16, a: F80, denormal: bool) -> u16 {
    if denormal && flags & (status::IE | status::ZE) == 0 && !a.is_nan() { flags | status::DE } else { flags }
}

/// What a masked stack underflow stores.
fn indefinite(format: Format) -> u128 {
    match format {
        Format::F32 => 0xffc0_0000,
        Format::F64 => 0xfff8 << 48,
        Format::F80 => F80::INDEFINITE.to_bits(),
        Format::I16 => 1 << 15,
        Format::I32 => 1 << 31,
        Format::I64 => 1 << 63,
        Format::Bcd => BCD_INDEFINITE,
    }
}

impl Constant {
    /// The constant rounded as RC in `cw` says (SDM vol. 1 §8.3.7: from a more precise internal value).
    fn value(self, cw: u16) -> F80 {
        use super::control::{RC, RC_NEAREST, RC_UP};
        // The significand rounded down, and whether the nearest is the one above.
        let (sign_exp, mantissa, nearest_is_up) = match self {
            Constant::One => return F80::ONE,
            Constant::Zero => return F80::ZERO,
            Constant::L2t => (0x4000, 0xd49a_784b_cd1b_8afe, false),
            Constant::L2e => (0x3fff, 0xb8aa_3b29_5c17_f0bb, true),
            Constant::Pi => (0x4000, 0xc90f_daa2_2168_c234, true),
            Constant::Lg2 => (0x3ffd, 0x9a20_9a84_fbcf_f798, true),
            Constant::Ln2 => (0x3ffe, 0xb172_17f7_d1cf_79ab, true),
        };
        let up = match cw & RC {
            RC_NEAREST => nearest_is_up,
            rc => rc == RC_UP,
        };
        F80 { mantissa: mantissa + u64::from(up), sign_exp }
    }
}
