//! [`Emit`] on registers and constants of quick code.

use crate::emit::{Bin, Cmp, Cond, Emit, Flags, FpArgs, FpCall, LaneOp, LowHigh, Un, Word};
use crate::exception::Exception;
use crate::insn::Insn;
use crate::jit::Unsupported;
use crate::jit::emit::at;
use crate::jit::values::word_at;
use crate::mmu::tlb::Class;
use crate::quick::asm::{ARG, Alu, Asm, CPU, Cc, Gpr, Mem, Shift, T0, T1, T2, Unary, Xmm};
use crate::quick::emit::{FlagVal, QuickEmit, Right, Val, counts, cpu, gpr_at, none};
use crate::quick::vector;
use crate::simd::fp::FpFmt;
use crate::state::{cr, flag, seg};
use crate::width::{W16, W32, W64, Width};
use crate::{eval, flags};

/// The operand size that computes values of `W`: narrow ones are computed as words of 32 bits.
fn size<W: Width>() -> u64 {
    W::BYTES.max(4)
}

fn bits<W: Width>() -> u8 {
    W::BITS.max(32) as u8
}

impl QuickEmit<'_> {
    /// A value with nothing above its width.
    fn exact<W: Width>(&mut self, v: Val) -> Val {
        match v {
            Val::Imm(k) => Val::Imm(W::zext(k)),
            v => {
                let r = self.reg(v);
                if u32::from(self.bits(r)) <= W::BITS {
                    return Val::Reg(r);
                }
                let to = self.take(W::BITS as u8);
                self.a.movzx(W::BYTES, to, r);
                Val::Reg(to)
            }
        }
    }

    /// A value to be changed: a copy of it.
    fn copy<W: Width>(&mut self, v: Val) -> Gpr {
        match v {
            Val::Reg(r) => {
                let to = self.take(bits::<W>());
                self.a.mov(size::<W>(), to, r);
                to
            }
            Val::Imm(k) => {
                let to = self.take(bits::<W>());
                self.a.mov_imm(to, k);
                to
            }
            // These are made anew each time.
            v => self.reg(v),
        }
    }

    /// `v + k`, 64 bits.
    fn sum(&mut self, v: Val, k: i64) -> Option<Val> {
        let sum = match v {
            Val::Reg(r) => Mem::at(r, 0),
            Val::Sum(sum) => sum,
            _ => return None,
        };
        let disp = i32::try_from(i64::from(sum.disp).checked_add(k)?).ok()?;
        Some(Val::Sum(Mem { disp, ..sum }))
    }

    /// `a + b`, 64 bits.
    fn sum_of(&mut self, a: Val, b: Val) -> Val {
        let (a, b) = match (a, b) {
            (Val::Sum(_), _) => (a, self.reg(b)),
            _ => (b, self.reg(a)),
        };
        match a {
            Val::Sum(Mem { base: Some(base), index: None, disp }) => {
                Val::Sum(Mem { base: Some(base), index: Some((b, 0)), disp })
            }
            Val::Sum(Mem { base: None, index, disp }) => Val::Sum(Mem { base: Some(b), index, disp }),
            a => {
                let a = self.reg(a);
                Val::Sum(Mem::indexed(a, b, 0))
            }
        }
    }

    fn alu<W: Width>(&mut self, op: Alu, x: Val, y: Val) -> Val {
        let to = self.copy::<W>(x);
        match y {
            Val::Imm(k) if i32::try_from(W::sext(k) as i64).is_ok() => {
                self.a.alu_imm(size::<W>(), op, to, W::sext(k) as i32);
            }
            y => {
                let y = self.reg(y);
                self.a.alu(size::<W>(), op, to, y);
            }
        }
        Val::Reg(to)
    }

    fn shift<W: Width>(&mut self, op: Shift, x: Val, n: Val) -> Val {
        let rotates = matches!(op, Shift::Rol | Shift::Ror);
        let (to, bytes) = match op {
            // What is shifted in must be the value's own.
            Shift::Shr if W::BYTES < 4 => {
                let exact = self.exact::<W>(x);
                (self.copy::<W32>(exact), 4)
            }
            Shift::Sar if W::BYTES < 4 => {
                let x = self.reg(x);
                let to = self.take(64);
                self.a.movsx(W::BYTES, to, x);
                (to, 8)
            }
            _ => (self.copy::<W>(x), if rotates { W::BYTES } else { size::<W>() }),
        };
        match n {
            Val::Imm(n) => self.a.shift_imm(bytes, op, to, n as u8 & (W::BITS - 1) as u8),
            n => {
                self.reg_into(T1, n);
                if W::BYTES < 4 {
                    self.a.alu_imm(4, Alu::And, T1, W::BITS as i32 - 1);
                }
                self.a.shift(bytes, op, to);
            }
        }
        Val::Reg(to)
    }

    fn linear(&mut self, i: &Insn, s: u8, ea: Val) -> Result<Val, Unsupported> {
        if s >= seg::FS {
            if !self.long() {
                return none();
            }
            let base = self.word(Word::Base(s));
            return Ok(self.sum_of(ea, base));
        }
        // Outside 64-bit mode CS may not be written, and perhaps not read: `i.flat` says so.
        if i.flat || (s != seg::CS && self.flat()) { Ok(ea) } else { none() }
    }

    /// Finds 16 or 32 bytes, which must be aligned to 16 or not.
    fn find_x(&mut self, i: &Insn, ea: Val, bytes: u64, aligned: bool, write: bool) -> Result<(), Unsupported> {
        let linear = self.linear(i, i.seg, ea)?;
        self.reg_into(ARG, linear);
        if aligned {
            self.a.mov(4, T0, ARG);
            self.a.alu_imm(4, Alu::And, T0, 15);
            self.side_exit_if(Cc::NE);
        }
        self.find(bytes, write);
        Ok(())
    }

    /// Behind a load: what comes next may not be seen before it.
    fn loaded(&mut self) {
        if self.options.shared {
            self.a.loaded();
        }
    }

    /// Before a store: it may not be seen before what came before.
    fn storing(&mut self) {
        if self.options.shared {
            self.a.storing();
        }
    }

    fn load_half(&mut self, at: i32) -> Xmm {
        let x = self.take_x();
        self.a.load_x(x, Mem::at(T0, at));
        x
    }
}

/// Where bits 127:0 of a vector register are, and 255:128.
fn halves(r: u8) -> [Mem; 2] {
    let at = at!(s.ymm) + 32 * i32::from(r & 15);
    [cpu(at), cpu(at + 16)]
}

impl Emit for QuickEmit<'_> {
    type V = Val;
    type X = Xmm;
    type Trap = Unsupported;

    fn imm<W: Width>(&mut self, k: u64) -> Val {
        Val::Imm(W::zext(k))
    }

    fn bin<W: Width>(&mut self, op: Bin, x: Val, y: Val) -> Val {
        let (x, y) = match (x, y) {
            (Val::Imm(a), Val::Imm(b)) => return Val::Imm(eval::bin::<W>(op, W::zext(a), W::zext(b))),
            (Val::Imm(_), y) if matches!(op, Bin::Add | Bin::And | Bin::Or | Bin::Xor | Bin::Mul) => (y, x),
            both => both,
        };
        match (op, y) {
            (Bin::And | Bin::Mul, Val::Imm(0)) => return Val::Imm(0),
            (Bin::Xor, Val::Imm(1)) if W::BITS == 8 => {
                if let Val::Holds { cc, bytes, a, b } = x {
                    return Val::Holds { cc: cc.opposite(), bytes, a, b };
                }
            }
            (Bin::And, Val::Imm(0xffff_ffff)) if W::BITS == 64 => return self.exact::<W32>(x),
            (Bin::And, Val::Imm(k)) if W::zext(k) == W::MASK => return x,
            (Bin::And | Bin::Or, Val::Reg(y)) if matches!(x, Val::Reg(x) if x == y) => return x,
            (Bin::Xor | Bin::Sub, Val::Reg(y)) if matches!(x, Val::Reg(x) if x == y) => return Val::Imm(0),
            (Bin::Mul, _) | (Bin::And, _) => {}
            (_, Val::Imm(0)) => return x,
            _ => {}
        }
        match op {
            Bin::Add | Bin::Sub => {
                if let Val::Imm(k) = y {
                    let k = W::sext(k) as i64;
                    let k = if op == Bin::Add { k } else { k.wrapping_neg() };
                    if W::BITS == 64 {
                        if let Some(sum) = self.sum(x, k) {
                            return sum;
                        }
                    } else if let Ok(k) = i32::try_from(k) {
                        let x = self.reg(x);
                        let to = self.take(32);
                        self.a.lea(4, to, Mem::at(x, k));
                        return Val::Reg(to);
                    }
                } else if op == Bin::Add {
                    if W::BITS == 64 {
                        let sum = self.sum_of(x, y);
                        return Val::Reg(self.reg(sum));
                    }
                    let (x, y) = (self.reg(x), self.reg(y));
                    let to = self.take(32);
                    self.a.lea(4, to, Mem::indexed(x, y, 0));
                    return Val::Reg(to);
                }
                self.alu::<W>(if op == Bin::Add { Alu::Add } else { Alu::Sub }, x, y)
            }
            Bin::And => self.alu::<W>(Alu::And, x, y),
            Bin::Or => self.alu::<W>(Alu::Or, x, y),
            Bin::Xor => self.alu::<W>(Alu::Xor, x, y),
            Bin::Mul => {
                let to = self.copy::<W>(x);
                let y = self.reg(y);
                self.a.imul(size::<W>(), to, y);
                Val::Reg(to)
            }
            Bin::Shl => self.shift::<W>(Shift::Shl, x, y),
            Bin::Shr => self.shift::<W>(Shift::Shr, x, y),
            Bin::Sar => self.shift::<W>(Shift::Sar, x, y),
            Bin::Rotl => self.shift::<W>(Shift::Rol, x, y),
            Bin::Rotr => self.shift::<W>(Shift::Ror, x, y),
        }
    }

    fn un<W: Width>(&mut self, op: Un, x: Val) -> Val {
        match op {
            Un::Not | Un::Neg => {
                let to = self.copy::<W>(x);
                self.a.unary(size::<W>(), if op == Un::Not { Unary::Not } else { Unary::Neg }, to);
                Val::Reg(to)
            }
            Un::Bswap if W::BITS == 8 => x,
            Un::Bswap if W::BITS == 16 => self.shift::<W16>(Shift::Rol, x, Val::Imm(8)),
            Un::Bswap => {
                let to = self.copy::<W>(x);
                self.a.bswap(size::<W>(), to);
                Val::Reg(to)
            }
            Un::Clz | Un::Ctz | Un::Popcnt => {
                self.failed |= !self.counts_bits();
                let x = self.exact::<W>(x);
                let mut x = self.reg(x);
                if op == Un::Ctz && W::BYTES < 4 {
                    let bounded = self.copy::<W32>(Val::Reg(x));
                    self.a.alu_imm(4, Alu::Or, bounded, 1 << W::BITS);
                    x = bounded;
                }
                let to = self.take(32);
                match op {
                    Un::Clz => self.a.lzcnt(size::<W>(), to, x),
                    Un::Ctz => self.a.tzcnt(size::<W>(), to, x),
                    _ => self.a.popcnt(size::<W>(), to, x),
                }
                if op == Un::Clz && W::BYTES < 4 {
                    self.a.alu_imm(4, Alu::Sub, to, 32 - W::BITS as i32);
                }
                Val::Reg(to)
            }
        }
    }

    fn cmp<W: Width>(&mut self, op: Cmp, x: Val, y: Val) -> Val {
        let cc = match op {
            Cmp::Eq => Cc::E,
            Cmp::Ne => Cc::NE,
            Cmp::Ltu => Cc::B,
            Cmp::Geu => Cc::AE,
            Cmp::Lts => Cc::L,
            Cmp::Ges => Cc::GE,
        };
        let (x, y, cc) = match (x, y) {
            (Val::Imm(x), Val::Imm(y)) => return Val::Imm(eval::cmp::<W>(op, W::zext(x), W::zext(y)).into()),
            (Val::Imm(_), y) => (y, x, cc.swapped()),
            (x, y) => (x, y, cc),
        };
        let a = self.reg(x);
        let b = match y {
            Val::Imm(k) if i32::try_from(W::sext(k) as i64).is_ok() => Right::Imm(W::sext(k) as i32),
            y => Right::Reg(self.reg(y)),
        };
        Val::Holds { cc, bytes: W::BYTES, a, b }
    }

    fn select<W: Width>(&mut self, c: Val, x: Val, y: Val) -> Val {
        if let Val::Imm(c) = c {
            return if c & 1 != 0 { x } else { y };
        }
        let x = self.reg(x);
        let y = self.reg(y);
        let to = self.copy::<W64>(Val::Reg(y));
        let cc = self.test(c);
        self.a.cmov(cc, to, x);
        Val::Reg(to)
    }

    fn zext<F: Width, T: Width>(&mut self, x: Val) -> Val {
        match x {
            Val::Imm(k) => Val::Imm(T::zext(k)),
            x if F::BITS < T::BITS => self.exact::<F>(x),
            x => x,
        }
    }

    fn sext<F: Width, T: Width>(&mut self, x: Val) -> Val {
        match x {
            Val::Imm(k) => Val::Imm(T::zext(F::sext(k))),
            x if F::BITS < T::BITS => {
                let x = self.reg(x);
                let to = self.take(64);
                self.a.movsx(F::BYTES, to, x);
                Val::Reg(to)
            }
            x => x,
        }
    }

    fn mul_wide<W: Width>(&mut self, signed: bool, x: Val, y: Val) -> (Val, Val) {
        if W::BITS == 64 {
            let y = self.reg(y);
            self.reg_into(T0, x);
            let (low, high) = (self.take(64), self.take(64));
            self.a.multiply(signed, low, high, y);
            return (Val::Reg(low), Val::Reg(high));
        }
        let wide = |e: &mut Self, v| if signed { e.sext::<W, W64>(v) } else { e.zext::<W, W64>(v) };
        let (x, y) = (wide(self, x), wide(self, y));
        let product = self.bin::<W64>(Bin::Mul, x, y);
        let high = self.bin_imm::<W64>(Bin::Shr, product, u64::from(W::BITS));
        (product, high)
    }

    fn div_wide<W: Width>(&mut self, signed: bool, hi: Val, lo: Val, d: Val) -> Result<(Val, Val), Unsupported> {
        if W::BITS < 32 || (W::BITS == 32 && (signed || !Asm::DIVIDES_DOUBLE)) {
            return self.div_narrow::<W>(signed, hi, lo, d);
        }
        let (hi, lo, d) = (self.reg(hi), self.reg(lo), self.reg(d));
        if signed {
            // Only dividends that fit one register, and not the one quotient of those that does not.
            self.a.mov(8, T0, lo);
            self.a.extend_sign(8);
            self.a.alu(8, Alu::Cmp, T2, hi);
            self.side_exit_if(Cc::NE);
            self.a.lea(8, T1, Mem::at(d, 1));
            self.a.alu_imm(8, Alu::Cmp, T1, 1);
            self.side_exit_if(Cc::BE);
            self.a.divide(8, true, d);
        } else {
            if !Asm::DIVIDES_DOUBLE {
                self.a.alu_imm(8, Alu::Cmp, hi, 0);
                self.side_exit_if(Cc::NE);
            }
            // A quotient that does not fit, or no divisor.
            self.a.alu(W::BYTES, Alu::Cmp, hi, d);
            self.side_exit_if(Cc::AE);
            self.a.mov(W::BYTES, T0, lo);
            self.a.mov(W::BYTES, T2, hi);
            self.a.divide(W::BYTES, false, d);
        }
        Ok(self.quotient())
    }

    fn gpr<W: Width>(&mut self, r: u8) -> Val {
        Val::Reg(self.guest(r))
    }

    fn set_gpr<W: Width>(&mut self, r: u8, v: Val) {
        if W::BITS < 32 {
            let old = self.guest(r);
            let v = self.reg(v);
            let to = self.copy::<W64>(Val::Reg(old));
            self.a.mov_low(W::BYTES, to, v);
            return self.put(r, to);
        }
        match v {
            Val::Imm(k) if W::zext(k) <= i32::MAX as u64 || (W::BITS == 64 && i32::try_from(k as i64).is_ok()) => {
                self.a.store_imm(8, gpr_at(r), k as i32);
                self.assign(r, None);
            }
            v => {
                let v = self.exact::<W>(v);
                let v = self.reg(v);
                self.put(r, v);
            }
        }
    }

    fn gpr_high(&mut self, r: u8) -> Val {
        let v = self.guest(r & 3);
        self.shift::<W64>(Shift::Shr, Val::Reg(v), Val::Imm(8))
    }

    fn set_gpr_high(&mut self, r: u8, v: Val) {
        let old = self.guest(r & 3);
        let v = self.reg(v);
        let to = self.copy::<W64>(Val::Reg(old));
        self.a.shift_imm(8, Shift::Ror, to, 8);
        self.a.mov_low(1, to, v);
        self.a.shift_imm(8, Shift::Rol, to, 8);
        self.put(r & 3, to);
    }

    fn word(&mut self, w: Word) -> Val {
        let (at, bytes) = word_at(w);
        let to = self.take(8 * bytes as u8);
        match bytes {
            8 => self.a.load(8, to, cpu(at)),
            n => self.a.movzx(n.into(), to, cpu(at)),
        }
        Val::Reg(to)
    }

    fn set_word(&mut self, w: Word, v: Val) {
        let v = self.reg(v);
        self.a.store(8, cpu(word_at(w).0), v);
    }

    fn enable_interrupts(&mut self) -> Result<(), Unsupported> {
        // What else may have to be done is the interpreter's.
        let any = T0;
        self.a.movzx(1, any, cpu(at!(irq_maybe)));
        self.a.alu(1, Alu::Or, any, cpu(at!(nmi_maybe)));
        self.a.alu(1, Alu::Or, any, cpu(at!(jit.repeated)));
        self.a.load(8, T1, cpu(at!(jit.kick)));
        self.a.alu(4, Alu::Or, any, Mem::at(T1, 0));
        self.side_exit_if(Cc::NE);
        self.a.alu_imm(8, Alu::Or, cpu(word_at(Word::Flags).0), flag::IF as i32);
        Ok(())
    }

    fn fence(&mut self) {
        if self.options.shared {
            self.a.fence();
        }
    }

    fn set_ac(&mut self, on: bool) {
        let flags = self.word(Word::Flags);
        let class = T0;
        let flags = if on {
            self.a.mov_imm(class, Class::Supervisor as u64);
            self.bin_imm::<W64>(Bin::Or, flags, flag::AC)
        } else {
            self.a.load(8, class, cpu(word_at(Word::Cr4).0));
            self.a.shift_imm(8, Shift::Shr, class, cr::CR4_SMAP.trailing_zeros() as u8);
            self.a.alu_imm(4, Alu::And, class, 1);
            // Supervisor and SupervisorSmap are neighbours.
            self.a.alu_imm(4, Alu::Add, class, Class::Supervisor as i32);
            self.bin_imm::<W64>(Bin::And, flags, !flag::AC)
        };
        self.set_word(Word::Flags, flags);
        self.a.store(1, cpu(at!(class)), class);
        self.a.load(8, class, Mem { base: Some(CPU), index: Some((class, 3)), disp: at!(jit.tables) });
        self.a.store(8, cpu(at!(jit.tlb)), class);
    }

    fn xmm(&mut self, r: u8) -> Xmm {
        let x = self.take_x();
        self.a.load_x(x, halves(r)[0]);
        x
    }

    fn set_xmm(&mut self, r: u8, v: Xmm) {
        self.a.store_x(halves(r)[0], v);
    }

    fn ymm_high(&mut self, r: u8) -> Xmm {
        let x = self.take_x();
        self.a.load_x(x, halves(r)[1]);
        x
    }

    fn set_ymm_high(&mut self, r: u8, v: Xmm) {
        self.a.store_x(halves(r)[1], v);
    }

    fn x_imm(&mut self, k: u128) -> Xmm {
        self.x_make(Val::Imm(k as u64), Val::Imm((k >> 64) as u64))
    }

    fn x_low(&mut self, x: Xmm) -> Val {
        let to = self.take(64);
        self.a.from_x(to, x);
        Val::Reg(to)
    }

    fn x_high(&mut self, x: Xmm) -> Val {
        let spare = self.take_x();
        let to = self.take(64);
        self.a.from_high(to, x, spare);
        Val::Reg(to)
    }

    fn x_make(&mut self, low: Val, high: Val) -> Xmm {
        let x = self.take_x();
        match low {
            Val::Imm(0) => self.a.zero_x(x),
            low => {
                let low = self.reg(low);
                self.a.to_x(x, low);
            }
        }
        if !matches!(high, Val::Imm(0)) {
            let high = self.reg(high);
            let spare = self.take_x();
            self.a.set_high(x, high, spare);
        }
        x
    }

    fn lane(&mut self, op: LaneOp, a: Xmm, b: Xmm, _: Xmm) -> Result<Xmm, Unsupported> {
        let to = self.take_x();
        vector::lane(&mut self.a, op, to, a, b).ok_or(Unsupported)?;
        Ok(to)
    }

    fn signs(&mut self, x: Xmm, bytes: u8) -> Val {
        let to = self.take(32);
        self.a.signs(bytes, to, x);
        Val::Reg(to)
    }

    // Floating point is for regions: code that computes much of it becomes hot.

    fn fp(&mut self, _: FpCall, _: FpArgs<Xmm>, _: Option<FpArgs<Xmm>>) -> Result<LowHigh<Xmm>, Unsupported> {
        none()
    }

    fn fp_comi(&mut self, _: FpFmt, _: bool, _: Xmm, _: Xmm) -> Result<(), Unsupported> {
        none()
    }

    fn fp_from_int(&mut self, _: FpFmt, _: bool, _: Xmm, _: Val) -> Result<Xmm, Unsupported> {
        none()
    }

    fn fp_to_int(&mut self, _: FpFmt, _: bool, _: bool, _: Xmm) -> Result<Val, Unsupported> {
        none()
    }

    const SHIFTS: bool = true;

    fn shift_by<W: Width>(&mut self, op: Bin, a: Val, count: Val) -> Option<Val> {
        let op = match op {
            Bin::Shl => Shift::Shl,
            Bin::Shr => Shift::Shr,
            _ => Shift::Sar,
        };
        let a = self.reg(a);
        Some(Val::Reg(QuickEmit::shift_by(self, W::BYTES, op, a, count)))
    }

    fn set_flags<W: Width>(&mut self, f: Flags<Val>) {
        self.note_flags(f, W::BYTES);
    }

    fn cond(&mut self, c: Cond) -> Val {
        let FlagVal::Op(f, n) = self.flags else {
            return self.holds_in_memory(c).unwrap_or_else(|| flags::condition(self, c));
        };
        let base = Cond::from_bits(c as u8 & !1);
        if counts(&f) && !matches!(base, Cond::E | Cond::S) {
            return flags::condition(self, c);
        }
        let f = if base == Cond::S { self.whole(f) } else { f };
        let fused = flags::fused_sized(self, &f, c, n);
        fused.unwrap_or_else(|| flags::condition(self, c))
    }

    fn flags_raw(&mut self) -> (Val, Val, Val) {
        self.words()
    }

    fn load<W: Width>(&mut self, i: &Insn, s: u8, ea: Val) -> Result<Val, Unsupported> {
        let linear = self.linear(i, s, ea)?;
        self.access(linear, W::BYTES, false);
        let v = self.load_at::<W>(T0);
        self.loaded();
        Ok(v)
    }

    fn store<W: Width>(&mut self, i: &Insn, s: u8, ea: Val, v: Val) -> Result<(), Unsupported> {
        let v = match v {
            Val::Imm(k) if i32::try_from(W::sext(k) as i64).is_ok() => v,
            v => Val::Reg(self.reg(v)),
        };
        let at = match self.rmw.take() {
            Some(host) => host,
            None => {
                let linear = self.linear(i, s, ea)?;
                self.access(linear, W::BYTES, true);
                T0
            }
        };
        self.storing();
        match v {
            Val::Imm(k) => self.a.store_imm(W::BYTES, Mem::at(at, 0), k as i32),
            v => {
                let v = self.reg(v);
                self.a.store(W::BYTES, Mem::at(at, 0), v);
            }
        }
        Ok(())
    }

    fn load_rmw<W: Width>(&mut self, i: &Insn, s: u8, ea: Val) -> Result<Val, Unsupported> {
        if i.lock && self.options.shared {
            return Err(Unsupported);
        }
        let linear = self.linear(i, s, ea)?;
        self.access(linear, W::BYTES, true);
        let host = self.take(64);
        self.a.mov(8, host, T0);
        self.rmw = Some(host);
        let v = self.load_at::<W>(host);
        self.loaded();
        Ok(v)
    }

    fn check_store<W: Width>(&mut self, i: &Insn, ea: Val) -> Result<(), Unsupported> {
        let linear = self.linear(i, i.seg, ea)?;
        self.access(linear, W::BYTES, true);
        Ok(())
    }

    fn load_x_low<W: Width>(&mut self, i: &Insn, ea: Val) -> Result<Xmm, Unsupported> {
        let linear = self.linear(i, i.seg, ea)?;
        self.access(linear, W::BYTES, false);
        let x = self.take_x();
        if W::BYTES < 4 {
            self.a.movzx(W::BYTES, T0, Mem::at(T0, 0));
            self.a.to_x(x, T0);
        } else {
            self.a.load_x_low(W::BYTES, x, Mem::at(T0, 0));
        }
        self.loaded();
        Ok(x)
    }

    fn load_x(&mut self, i: &Insn, ea: Val, aligned: bool) -> Result<Xmm, Unsupported> {
        self.find_x(i, ea, 16, aligned, false)?;
        let x = self.load_half(0);
        self.loaded();
        Ok(x)
    }

    fn store_x(&mut self, i: &Insn, ea: Val, v: Xmm, aligned: bool) -> Result<(), Unsupported> {
        self.find_x(i, ea, 16, aligned, true)?;
        self.storing();
        self.a.store_x(Mem::at(T0, 0), v);
        Ok(())
    }

    fn load_pair(&mut self, i: &Insn, ea: Val, aligned: bool) -> Result<(Xmm, Xmm), Unsupported> {
        self.find_x(i, ea, 32, aligned, false)?;
        let halves = (self.load_half(0), self.load_half(16));
        self.loaded();
        Ok(halves)
    }

    fn store_pair(&mut self, i: &Insn, ea: Val, v: (Xmm, Xmm), aligned: bool) -> Result<(), Unsupported> {
        self.find_x(i, ea, 32, aligned, true)?;
        self.storing();
        self.a.store_x(Mem::at(T0, 0), v.0);
        self.a.store_x(Mem::at(T0, 16), v.1);
        Ok(())
    }

    fn next_ip(&mut self, i: &Insn) -> Val {
        self.ip(i.next_off() as i64)
    }

    fn check_target(&mut self, _: &Insn, target: Val) -> Result<(), Unsupported> {
        // Outside 64-bit mode CS is flat, so every 32-bit target is inside it.
        if self.long() {
            let target = self.reg(target);
            self.a.mov(8, T0, target);
            self.a.shift_imm(8, Shift::Shl, T0, 16);
            self.a.shift_imm(8, Shift::Sar, T0, 16);
            self.a.alu(8, Alu::Cmp, T0, target);
            self.side_exit_if(Cc::NE);
        }
        Ok(())
    }

    fn check_relative(&mut self, _: &Insn) -> Result<(), Unsupported> {
        // As in regions: the dispatch loop raises the fetch fault at the target.
        Ok(())
    }

    fn set_ip(&mut self, _: &Insn, target: Val) {
        self.exit_to(target);
    }

    fn jump_rel(&mut self, i: &Insn) -> Result<(), Unsupported> {
        self.jump(i.next_off() as i64 + i.imm as i64);
        Ok(())
    }

    fn branch_rel(&mut self, i: &Insn, c: Val) -> Result<(), Unsupported> {
        let next = i.next_off() as i64;
        self.branch(c, next + i.imm as i64, next);
        Ok(())
    }

    fn fault_if(&mut self, c: Val, _: Exception) -> Result<(), Unsupported> {
        match c {
            Val::Imm(0) => {}
            Val::Imm(_) => return none(),
            c => {
                let cc = self.test(c);
                self.side_exit_if(cc);
            }
        }
        Ok(())
    }

    fn unsupported(&mut self) -> Unsupported {
        Unsupported
    }

    fn ea(&mut self, i: &Insn) -> Val {
        use crate::insn::NO_REG;
        if i.rip_relative || i.addr_bytes < 4 {
            let next = if i.rip_relative { self.next_ip(i) } else { return self.ea_by_parts(i) };
            let address = self.bin_imm::<W64>(Bin::Add, next, i.disp as u64);
            return self.cut_address(i, address);
        }
        let Ok(disp) = i32::try_from(i.disp) else { return self.ea_by_parts(i) };
        let base = (i.base != NO_REG).then(|| self.guest(i.base));
        let index = (i.index != NO_REG).then(|| (self.guest(i.index), i.scale));
        if base.is_none() && index.is_none() {
            return self.cut_address(i, Val::Imm(i.disp as u64));
        }
        let sum = Mem { base, index, disp };
        if i.addr_bytes == 8 {
            return Val::Sum(sum);
        }
        let to = self.take(32);
        self.a.lea(4, to, sum);
        Val::Reg(to)
    }
}

impl QuickEmit<'_> {
    /// An effective address of unusual size.
    fn ea_by_parts(&mut self, i: &Insn) -> Val {
        use crate::insn::NO_REG;
        let mut address = Val::Imm(i.disp as u64);
        if i.base != NO_REG {
            let base = self.gpr::<W64>(i.base);
            address = self.bin::<W64>(Bin::Add, base, address);
        }
        if i.index != NO_REG {
            let index = self.gpr::<W64>(i.index);
            let index = self.bin_imm::<W64>(Bin::Shl, index, u64::from(i.scale));
            address = self.bin::<W64>(Bin::Add, address, index);
        }
        self.cut_address(i, address)
    }

    /// Makes a register's value that of guest register `r`.
    fn put(&mut self, r: u8, v: Gpr) {
        self.a.store(8, gpr_at(r), v);
        self.assign(r, Some(v));
    }

    fn load_at<W: Width>(&mut self, host: Gpr) -> Val {
        let to = self.take(W::BITS as u8);
        let from = Mem::at(host, 0);
        match W::BYTES {
            8 => self.a.load(8, to, from),
            n => self.a.movzx(n, to, from),
        }
        Val::Reg(to)
    }

    /// The quotient in T0 and the remainder in T2.
    fn quotient(&mut self) -> (Val, Val) {
        let (q, r) = (self.take(64), self.take(64));
        self.a.mov(8, q, T0);
        self.a.mov(8, r, T2);
        (Val::Reg(q), Val::Reg(r))
    }

    /// A division of what fits one register.
    fn div_narrow<W: Width>(&mut self, signed: bool, hi: Val, lo: Val, d: Val) -> Result<(Val, Val), Unsupported> {
        let hi = self.exact::<W>(hi);
        let lo = self.exact::<W>(lo);
        let high = self.shift::<W64>(Shift::Shl, hi, Val::Imm(u64::from(W::BITS)));
        let mut n = self.bin::<W64>(Bin::Or, high, lo);
        if signed && W::BITS < 32 {
            let spare = Val::Imm(u64::from(64 - 2 * W::BITS));
            let up = self.shift::<W64>(Shift::Shl, n, spare);
            n = self.shift::<W64>(Shift::Sar, up, spare);
        }
        let d = if signed { self.sext::<W, W64>(d) } else { self.exact::<W>(d) };
        let d = self.reg(d);
        // No divisor, or the one quotient that does not fit 64 bits.
        self.a.lea(8, T1, Mem::at(d, i32::from(signed)));
        self.a.alu_imm(8, Alu::Cmp, T1, i32::from(signed));
        self.side_exit_if(Cc::BE);
        self.reg_into(T0, n);
        if signed {
            self.a.extend_sign(8);
            self.a.divide(8, true, d);
            self.a.movsx(W::BYTES, T1, T0);
        } else {
            self.a.alu(4, Alu::Xor, T2, T2);
            self.a.divide(8, false, d);
            self.a.movzx(W::BYTES, T1, T0);
        }
        self.a.alu(8, Alu::Cmp, T1, T0);
        self.side_exit_if(Cc::NE);
        Ok(self.quotient())
    }
}
