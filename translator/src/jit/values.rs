//! [`Emit`] on Cranelift values, with what is known of constants folded on the way.

use std::mem::offset_of;

use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::types::{I8, I8X16, I16, I32, I64, I64X2};
use cranelift_codegen::ir::{InstBuilder, InstructionData, MemFlagsData, Opcode, Type, Value};
use cranelift_frontend::Variable;

use crate::emit::{Bin, Cmp, Cond, Emit, Flags, FpArgs, FpCall, LaneOp, Un, Word};
use crate::exception::Exception;
use crate::insn::{Insn, Mode};
use crate::jit::Unsupported;
use crate::jit::emit::{FlagVal, JitEmit, aligned, at, int_type, plain, ty};
use crate::mmu::tlb::Class;
use crate::simd::fp::FpFmt;
use crate::state::{Segment, cr, flag};
use crate::width::{W8, W64, Width};
use crate::{eval, flags};

impl JitEmit<'_> {
    pub(super) fn resize(&mut self, v: Value, from: u64, to: u64) -> Value {
        match from.cmp(&to) {
            std::cmp::Ordering::Equal => v,
            std::cmp::Ordering::Less => self.b.ins().uextend(int_type(to), v),
            std::cmp::Ordering::Greater => self.b.ins().ireduce(int_type(to), v),
        }
    }

    /// The number that a value is known to be.
    pub(super) fn constant(&self, v: Value) -> Option<u64> {
        let dfg = &self.b.func.dfg;
        match dfg.insts[dfg.value_def(v).inst()?] {
            InstructionData::UnaryImm { opcode: Opcode::Iconst, imm } => Some(imm.bits() as u64),
            _ => None,
        }
    }

    /// The boolean whose opposite a value is known to be.
    pub(super) fn negated(&self, v: Value) -> Option<Value> {
        let dfg = &self.b.func.dfg;
        match dfg.insts[dfg.value_def(v).inst()?] {
            InstructionData::Binary { opcode: Opcode::Bxor, args: [c, one] } if self.constant(one) == Some(1) => {
                Some(c)
            }
            _ => None,
        }
    }

    /// `x + k` as another value plus a constant, where `x` is such a sum itself.
    pub(super) fn reassociate(&self, x: Value, k: i64) -> (Value, i64) {
        let dfg = &self.b.func.dfg;
        let sum = dfg.value_def(x).inst().map(|i| dfg.insts[i]);
        if let Some(InstructionData::Binary { opcode: Opcode::Iadd, args: [base, more] }) = sum
            && let Some(more) = self.constant(more)
        {
            return (base, k.wrapping_add(more as i64));
        }
        (x, k)
    }

    pub(super) fn var(&self, vars: &[Option<Variable>; 16], r: u8) -> Variable {
        // Usage has seen every register that the semantics touch; else the region stays interpreted.
        vars[usize::from(r & 15)].unwrap_or_else(|| panic!("register {r} is used without notice"))
    }

    /// What an operation that sets some of the flags has to remember of those before it.
    fn before(&mut self, f: &Flags<Value>, before: FlagVal) -> FlagVal {
        let carry_only = |f: &Flags<Value>| matches!(f, Flags::CfOf { .. } | Flags::Cf { .. });
        match before {
            // Of an earlier increment only the carry would be kept, which it kept itself.
            FlagVal::Partial(Flags::Inc { .. } | Flags::Dec { .. }, _, older)
                if matches!(f, Flags::Inc { .. } | Flags::Dec { .. }) =>
            {
                *older
            }
            FlagVal::Partial(older_f, _, older)
                if matches!(f, Flags::CfOf { .. }) && carry_only(&older_f)
                    || matches!(
                        (f, &older_f),
                        (Flags::Cf { .. }, Flags::Cf { .. }) | (Flags::Zf { .. }, Flags::Zf { .. })
                    ) =>
            {
                *older
            }
            // Longer chains are not worth their length.
            FlagVal::Partial(_, _, ref older) if matches!(**older, FlagVal::Partial(..)) => {
                let now = std::mem::replace(&mut self.flags, before);
                let (z, sp, co) = self.words();
                self.flags = now;
                FlagVal::Raw(z, sp, co)
            }
            other => other,
        }
    }

    /// Keeps the value of a variable that is about to be overwritten from being dropped as unused.
    pub(super) fn use_result(&mut self, var: Variable) {
        let v = self.b.use_var(var);
        self.keep(v);
    }

    /// Keeps the computation of a value whose flags in MXCSR matter: the value itself goes where nothing looks for it.
    pub(super) fn keep(&mut self, v: Value) {
        self.b.ins().store(plain(), v, self.cpu, at!(jit.bounce));
    }

    /// Bitcasts a vector to another lane type.
    pub fn lanes(&mut self, v: Value, t: Type) -> Value {
        let flags = MemFlagsData::new().with_endianness(cranelift_codegen::ir::Endianness::Little);
        if self.b.func.dfg.value_type(v) == t { v } else { self.b.ins().bitcast(t, flags, v) }
    }
}

/// Whether what sets some of the flags leaves those that a condition reads.
fn leaves(f: &Flags<Value>, c: Cond) -> bool {
    let base = c as u8 & !1;
    let reads_carry = base == Cond::B as u8;
    let reads_overflow = base == Cond::O as u8;
    let reads_result = [Cond::E, Cond::S, Cond::P].iter().any(|&c| base == c as u8);
    match f {
        Flags::Inc { .. } | Flags::Dec { .. } => reads_carry,
        Flags::CfOf { .. } => reads_result,
        Flags::Cf { .. } => reads_result || reads_overflow,
        Flags::Zf { .. } => (reads_result && base != Cond::E as u8) || reads_carry || reads_overflow,
        _ => false,
    }
}

impl Emit for JitEmit<'_> {
    type V = Value;
    type X = Value;
    type Trap = Unsupported;

    fn imm<W: Width>(&mut self, k: u64) -> Value {
        self.b.ins().iconst(ty::<W>(), W::zext(k) as i64)
    }

    fn bin<W: Width>(&mut self, op: Bin, x: Value, y: Value) -> Value {
        if let Some(k) = self.constant(y) {
            return self.bin_imm::<W>(op, x, k);
        }
        let b = self.b.ins();
        match op {
            Bin::Add => b.iadd(x, y),
            Bin::Sub => b.isub(x, y),
            Bin::And => b.band(x, y),
            Bin::Or => b.bor(x, y),
            Bin::Xor => b.bxor(x, y),
            Bin::Mul => b.imul(x, y),
            Bin::Shl => b.ishl(x, y),
            Bin::Shr => b.ushr(x, y),
            Bin::Sar => b.sshr(x, y),
            Bin::Rotl => b.rotl(x, y),
            Bin::Rotr => b.rotr(x, y),
        }
    }

    fn bin_imm<W: Width>(&mut self, op: Bin, x: Value, k: u64) -> Value {
        if let Some(a) = self.constant(x) {
            return self.imm::<W>(eval::bin::<W>(op, a, W::zext(k)));
        }
        let k = W::sext(k) as i64;
        if k == 0 && !matches!(op, Bin::And | Bin::Mul) {
            return x;
        }
        let (x, k) = match op {
            Bin::Add | Bin::Sub => self.reassociate(x, if op == Bin::Add { k } else { k.wrapping_neg() }),
            _ => (x, k),
        };
        let b = self.b.ins();
        match op {
            Bin::Add | Bin::Sub => b.iadd_imm_s(x, k),
            Bin::And => b.band_imm_s(x, k),
            Bin::Or => b.bor_imm_s(x, k),
            Bin::Xor => b.bxor_imm_s(x, k),
            Bin::Shl => b.ishl_imm_u(x, k),
            Bin::Shr => b.ushr_imm_u(x, k),
            Bin::Sar => b.sshr_imm_u(x, k),
            Bin::Mul | Bin::Rotl | Bin::Rotr => {
                let k = self.imm::<W>(k as u64);
                match op {
                    Bin::Mul => self.b.ins().imul(x, k),
                    Bin::Rotl => self.b.ins().rotl(x, k),
                    _ => self.b.ins().rotr(x, k),
                }
            }
        }
    }

    fn un<W: Width>(&mut self, op: Un, x: Value) -> Value {
        let narrow = W::BITS < 32;
        match op {
            Un::Not => self.b.ins().bnot(x),
            Un::Neg => self.b.ins().ineg(x),
            Un::Clz if narrow => {
                let wide = self.b.ins().uextend(I32, x);
                let n = self.b.ins().clz(wide);
                let n = self.b.ins().iadd_imm_s(n, i64::from(W::BITS) - 32);
                self.b.ins().ireduce(ty::<W>(), n)
            }
            Un::Clz => self.b.ins().clz(x),
            Un::Ctz if narrow => {
                let wide = self.b.ins().uextend(I32, x);
                let bounded = self.b.ins().bor_imm_u(wide, 1 << W::BITS);
                let n = self.b.ins().ctz(bounded);
                self.b.ins().ireduce(ty::<W>(), n)
            }
            Un::Ctz => self.b.ins().ctz(x),
            Un::Popcnt if narrow => {
                let wide = self.b.ins().uextend(I32, x);
                let n = self.b.ins().popcnt(wide);
                self.b.ins().ireduce(ty::<W>(), n)
            }
            Un::Popcnt => self.b.ins().popcnt(x),
            Un::Bswap if W::BITS == 16 => {
                let eight = self.b.ins().iconst(I16, 8);
                self.b.ins().rotl(x, eight)
            }
            Un::Bswap if W::BITS == 8 => x,
            Un::Bswap => self.b.ins().bswap(x),
        }
    }

    fn cmp<W: Width>(&mut self, op: Cmp, x: Value, y: Value) -> Value {
        let cc = match op {
            Cmp::Eq => IntCC::Equal,
            Cmp::Ne => IntCC::NotEqual,
            Cmp::Ltu => IntCC::UnsignedLessThan,
            Cmp::Geu => IntCC::UnsignedGreaterThanOrEqual,
            Cmp::Lts => IntCC::SignedLessThan,
            Cmp::Ges => IntCC::SignedGreaterThanOrEqual,
        };
        if let (Some(x), Some(y)) = (self.constant(x), self.constant(y)) {
            return self.imm::<W8>(eval::cmp::<W>(op, x, y).into());
        }
        self.b.ins().icmp(cc, x, y)
    }

    fn select<W: Width>(&mut self, c: Value, x: Value, y: Value) -> Value {
        if let Some(c) = self.constant(c) {
            return if c != 0 { x } else { y };
        }
        self.b.ins().select(c, x, y)
    }

    fn zext<F: Width, T: Width>(&mut self, x: Value) -> Value {
        if let Some(k) = self.constant(x) {
            return self.imm::<T>(k);
        }
        match self.wide.get(&x) {
            Some(&wide) if F::BITS < T::BITS => self.resize(wide, 8, T::BYTES),
            _ => self.resize(x, F::BYTES, T::BYTES),
        }
    }

    fn sext<F: Width, T: Width>(&mut self, x: Value) -> Value {
        if F::BITS == T::BITS { x } else { self.b.ins().sextend(ty::<T>(), x) }
    }

    fn mul_wide<W: Width>(&mut self, signed: bool, x: Value, y: Value) -> (Value, Value) {
        let low = self.b.ins().imul(x, y);
        if W::BITS == 64 {
            let high = if signed { self.b.ins().smulhi(x, y) } else { self.b.ins().umulhi(x, y) };
            return (low, high);
        }
        let t = int_type(2 * W::BYTES);
        let wide = |e: &mut Self, v| if signed { e.b.ins().sextend(t, v) } else { e.b.ins().uextend(t, v) };
        let (x, y) = (wide(self, x), wide(self, y));
        let product = self.b.ins().imul(x, y);
        let high = self.b.ins().ushr_imm_u(product, i64::from(W::BITS));
        (low, self.b.ins().ireduce(ty::<W>(), high))
    }

    fn div_wide<W: Width>(
        &mut self,
        signed: bool,
        hi: Value,
        lo: Value,
        d: Value,
    ) -> Result<(Value, Value), Unsupported> {
        let zero = self.is_zero::<W>(d);
        self.side_exit_if(zero);
        let (n, d) = if W::BITS == 64 {
            // Only dividends that fit one register; the interpreter does the others.
            let fits = if signed { self.b.ins().sshr_imm_u(lo, 63) } else { self.b.ins().iconst(I64, 0) };
            let wide = self.b.ins().icmp(IntCC::NotEqual, hi, fits);
            self.side_exit_if(wide);
            (lo, d)
        } else {
            let (hi, lo) = (self.zext::<W, W64>(hi), self.zext::<W, W64>(lo));
            let hi = self.b.ins().ishl_imm_u(hi, i64::from(W::BITS));
            let n = self.b.ins().bor(hi, lo);
            let n = if signed && W::BITS < 32 {
                let spare = i64::from(64 - 2 * W::BITS);
                let up = self.b.ins().ishl_imm_u(n, spare);
                self.b.ins().sshr_imm_u(up, spare)
            } else {
                n
            };
            (n, if signed { self.sext::<W, W64>(d) } else { self.zext::<W, W64>(d) })
        };
        if !signed {
            let q = self.b.ins().udiv(n, d);
            if W::BITS < 64 {
                let over = self.b.ins().icmp_imm_u(IntCC::UnsignedGreaterThan, q, W::MASK as i64);
                self.side_exit_if(over);
            }
            let back = self.b.ins().imul(q, d);
            let r = self.b.ins().isub(n, back);
            return Ok((self.zext::<W64, W>(q), self.zext::<W64, W>(r)));
        }
        // The one quotient that does not fit 64 bits traps on the host.
        let minimum = self.b.ins().icmp_imm_s(IntCC::Equal, n, i64::MIN);
        let minus_one = self.b.ins().icmp_imm_s(IntCC::Equal, d, -1);
        let over = self.b.ins().band(minimum, minus_one);
        self.side_exit_if(over);
        let q = self.b.ins().sdiv(n, d);
        if W::BITS < 64 {
            let cut = self.zext::<W64, W>(q);
            let again = self.sext::<W, W64>(cut);
            let over = self.b.ins().icmp(IntCC::NotEqual, again, q);
            self.side_exit_if(over);
        }
        let back = self.b.ins().imul(q, d);
        let r = self.b.ins().isub(n, back);
        Ok((self.zext::<W64, W>(q), self.zext::<W64, W>(r)))
    }

    fn gpr<W: Width>(&mut self, r: u8) -> Value {
        let v = self.var(&self.gpr, r);
        let v = self.b.use_var(v);
        if W::BITS == 64 {
            self.pages.is_read(r, v);
            return v;
        }
        match self.low.get(&(v, W::BYTES)) {
            Some(&part) => part,
            None => self.resize(v, 8, W::BYTES),
        }
    }

    fn set_gpr<W: Width>(&mut self, r: u8, v: Value) {
        let var = self.var(&self.gpr, r);
        let whole = match W::BITS {
            64 => v,
            32 => match self.wide.get(&v) {
                Some(&wide) => wide,
                None => {
                    let wide = self.b.ins().uextend(I64, v);
                    self.wide.insert(v, wide);
                    wide
                }
            },
            _ => {
                let old = self.b.use_var(var);
                let kept = self.b.ins().band_imm_s(old, !(W::MASK as i64));
                let v = self.zext::<W, W64>(v);
                self.b.ins().bor(kept, v)
            }
        };
        if W::BITS != 64 {
            self.low.insert((whole, W::BYTES), v);
        }
        self.pages.is_set(r, whole, self.b.func);
        self.b.def_var(var, whole);
        self.dirty.gpr |= 1 << (r & 15);
    }

    fn gpr_high(&mut self, r: u8) -> Value {
        let v = self.var(&self.gpr, r & 3);
        let v = self.b.use_var(v);
        let v = self.b.ins().ushr_imm_u(v, 8);
        self.b.ins().ireduce(I8, v)
    }

    fn set_gpr_high(&mut self, r: u8, v: Value) {
        let var = self.var(&self.gpr, r & 3);
        let old = self.b.use_var(var);
        let kept = self.b.ins().band_imm_s(old, !0xff00);
        let v = self.b.ins().uextend(I64, v);
        let v = self.b.ins().ishl_imm_u(v, 8);
        let v = self.b.ins().bor(kept, v);
        self.pages.changed(r & 3);
        self.b.def_var(var, v);
        self.dirty.gpr |= 1 << (r & 3);
    }

    fn word(&mut self, w: Word) -> Value {
        let (at, bytes) = word_at(w);
        match bytes {
            1 => self.b.ins().uload8(I64, aligned(), self.cpu, at),
            2 => self.b.ins().uload16(I64, aligned(), self.cpu, at),
            4 => self.b.ins().uload32(aligned(), self.cpu, at),
            _ => self.b.ins().load(I64, aligned(), self.cpu, at),
        }
    }

    fn set_word(&mut self, w: Word, v: Value) {
        self.b.ins().store(aligned(), v, self.cpu, word_at(w).0);
    }

    fn enable_interrupts(&mut self) -> Result<(), Unsupported> {
        // What else may have to be done is the interpreter's.
        let irq = self.b.ins().uload8(I32, aligned(), self.cpu, at!(irq_maybe));
        let nmi = self.b.ins().uload8(I32, aligned(), self.cpu, at!(nmi_maybe));
        let repeated = self.b.ins().uload8(I32, aligned(), self.cpu, at!(jit.repeated));
        let kick = self.kick();
        let any = [nmi, repeated, kick].into_iter().fold(irq, |any, v| self.b.ins().bor(any, v));
        self.side_exit_if(any);
        let flags = self.word(Word::Flags);
        let flags = self.bin_imm::<W64>(Bin::Or, flags, flag::IF);
        self.set_word(Word::Flags, flags);
        Ok(())
    }

    fn fence(&mut self) {
        if self.plan.options.shared {
            self.b.ins().fence();
        }
    }

    fn set_ac(&mut self, on: bool) {
        let flags = self.word(Word::Flags);
        let (flags, class) = if on {
            let class = self.b.ins().iconst(I64, Class::Supervisor as i64);
            (self.bin_imm::<W64>(Bin::Or, flags, flag::AC), class)
        } else {
            let cr4 = self.word(Word::Cr4);
            let smap = self.b.ins().ushr_imm_u(cr4, i64::from(cr::CR4_SMAP.trailing_zeros()));
            let smap = self.b.ins().band_imm_u(smap, 1);
            // Supervisor and SupervisorSmap are neighbours.
            let class = self.b.ins().iadd_imm_s(smap, Class::Supervisor as i64);
            (self.bin_imm::<W64>(Bin::And, flags, !flag::AC), class)
        };
        self.set_word(Word::Flags, flags);
        self.b.ins().istore8(aligned(), class, self.cpu, at!(class));
        let offset = self.b.ins().ishl_imm_u(class, 3);
        let cpu = self.b.ins().iadd(self.cpu, offset);
        let table = self.b.ins().load(I64, aligned(), cpu, at!(jit.tables));
        self.b.ins().store(aligned(), table, self.cpu, at!(jit.tlb));
        self.b.def_var(self.tlb, table);
        self.pages.forget();
    }

    fn xmm(&mut self, r: u8) -> Value {
        self.fp_read.0 |= 1 << (r & 15);
        let v = self.var(&self.x, r);
        self.b.use_var(v)
    }

    fn set_xmm(&mut self, r: u8, v: Value) {
        let bit = 1 << (r & 15);
        let var = self.var(&self.x, r);
        if self.fp_unused.0 & bit != 0 {
            self.use_result(var);
        }
        self.fp_unused.0 = self.fp_unused.0 & !bit | if self.fp_result { bit } else { 0 };
        let v = self.lanes(v, I8X16);
        self.b.def_var(var, v);
        self.dirty.x |= 1 << (r & 15);
    }

    fn ymm_high(&mut self, r: u8) -> Value {
        self.fp_read.1 |= 1 << (r & 15);
        let v = self.var(&self.y, r);
        self.b.use_var(v)
    }

    fn set_ymm_high(&mut self, r: u8, v: Value) {
        let bit = 1 << (r & 15);
        let var = self.var(&self.y, r);
        if self.fp_unused.1 & bit != 0 {
            self.use_result(var);
        }
        self.fp_unused.1 = self.fp_unused.1 & !bit | if self.fp_result { bit } else { 0 };
        let v = self.lanes(v, I8X16);
        self.b.def_var(var, v);
        self.dirty.y |= 1 << (r & 15);
    }

    fn x_imm(&mut self, k: u128) -> Value {
        let constant = self.b.func.dfg.constants.insert(k.to_le_bytes().to_vec().into());
        self.b.ins().vconst(I8X16, constant)
    }

    fn x_low(&mut self, x: Value) -> Value {
        let x = self.lanes(x, I64X2);
        self.b.ins().extractlane(x, 0)
    }

    fn x_high(&mut self, x: Value) -> Value {
        let x = self.lanes(x, I64X2);
        self.b.ins().extractlane(x, 1)
    }

    fn x_make(&mut self, low: Value, high: Value) -> Value {
        self.emit_make(low, high)
    }

    fn lane(&mut self, op: LaneOp, a: Value, b: Value, c: Value) -> Result<Value, Unsupported> {
        self.emit_lane(op, a, b, c)
    }

    fn signs(&mut self, x: Value, bytes: u8) -> Value {
        self.emit_signs(x, bytes)
    }

    fn fp(
        &mut self,
        op: FpCall,
        low: FpArgs<Value>,
        high: Option<FpArgs<Value>>,
    ) -> Result<(Value, Option<Value>), Unsupported> {
        self.emit_fp(op, low, high)
    }

    fn fp_comi(&mut self, fmt: FpFmt, _: bool, a: Value, b: Value) -> Result<(), Unsupported> {
        self.emit_comi(fmt, a, b)
    }

    fn fp_from_int(&mut self, fmt: FpFmt, wide: bool, a: Value, v: Value) -> Result<Value, Unsupported> {
        self.emit_from_int(fmt, wide, a, v)
    }

    fn fp_to_int(&mut self, fmt: FpFmt, wide: bool, truncate: bool, b: Value) -> Result<Value, Unsupported> {
        self.emit_to_int(fmt, wide, truncate, b)
    }

    fn set_flags<W: Width>(&mut self, f: Flags<Value>) {
        let n = W::BYTES;
        self.flags = match f {
            Flags::Inc { .. } | Flags::Dec { .. } | Flags::CfOf { .. } | Flags::Cf { .. } | Flags::Zf { .. } => {
                let before = std::mem::replace(&mut self.flags, FlagVal::Memory);
                let before = self.before(&f, before);
                FlagVal::Partial(f, n, Box::new(before))
            }
            Flags::Raw { z, sp, co } => FlagVal::Raw(z, sp, co),
            _ => FlagVal::Op(f, n),
        };
        self.flags_dirty = true;
    }

    fn cond(&mut self, c: Cond) -> Value {
        let fused = match self.flags.clone() {
            FlagVal::Partial(f, _, before) if leaves(&f, c) => {
                let now = std::mem::replace(&mut self.flags, *before);
                let answer = self.cond(c);
                self.flags = now;
                Some(answer)
            }
            FlagVal::Op(f, n) | FlagVal::Partial(f, n, _) => flags::fused_sized(self, &f, c, n),
            _ => None,
        };
        fused.unwrap_or_else(|| flags::condition(self, c))
    }

    fn flags_raw(&mut self) -> (Value, Value, Value) {
        let (z, sp, co) = self.words();
        self.flags = FlagVal::Raw(z, sp, co);
        (z, sp, co)
    }

    fn load<W: Width>(&mut self, i: &Insn, s: u8, ea: Value) -> Result<Value, Unsupported> {
        let linear = self.linear(i, s, ea)?;
        Ok(self.load_value(linear, W::BYTES, ty::<W>()))
    }

    fn store<W: Width>(&mut self, i: &Insn, s: u8, ea: Value, v: Value) -> Result<(), Unsupported> {
        if let Some(host) = self.rmw_host.take() {
            self.storing();
            match self.locked.take() {
                None => _ = self.b.ins().store(plain(), v, host, 0),
                Some(old) => {
                    let found = self.b.ins().atomic_cas(MemFlagsData::trusted(), host, old, v);
                    let lost = self.b.ins().icmp(IntCC::NotEqual, found, old);
                    self.side_exit_if(lost);
                    self.loaded();
                }
            }
            return Ok(());
        }
        let linear = self.linear(i, s, ea)?;
        self.store_value(linear, W::BYTES, v);
        Ok(())
    }

    fn load_rmw<W: Width>(&mut self, i: &Insn, s: u8, ea: Value) -> Result<Value, Unsupported> {
        let linear = self.linear(i, s, ea)?;
        self.write_through();
        let locked = i.lock && self.plan.options.shared;
        if locked && W::BYTES > 1 {
            let misaligned = self.b.ins().band_imm_u(linear, W::BYTES as i64 - 1);
            self.side_exit_if(misaligned);
        }
        let host = self.host_to_modify(linear, W::BYTES);
        self.rmw_host = Some(host);
        let old = self.b.ins().load(ty::<W>(), plain(), host, 0);
        self.loaded();
        self.locked = locked.then_some(old);
        Ok(old)
    }

    fn check_store<W: Width>(&mut self, i: &Insn, ea: Value) -> Result<(), Unsupported> {
        let linear = self.linear(i, i.seg, ea)?;
        self.write_through();
        self.host_to_modify(linear, W::BYTES);
        Ok(())
    }

    fn load_x_low<W: Width>(&mut self, i: &Insn, ea: Value) -> Result<Value, Unsupported> {
        let linear = self.linear(i, i.seg, ea)?;
        let v = self.load_value(linear, W::BYTES, Self::element_type(W::BYTES));
        Ok(self.low_element(v, W::BYTES))
    }

    fn load_x(&mut self, i: &Insn, ea: Value, aligned: bool) -> Result<Value, Unsupported> {
        let linear = self.linear(i, i.seg, ea)?;
        if aligned {
            self.check_alignment(linear);
        }
        Ok(self.load_value(linear, 16, I8X16))
    }

    fn store_x(&mut self, i: &Insn, ea: Value, v: Value, aligned: bool) -> Result<(), Unsupported> {
        let linear = self.linear(i, i.seg, ea)?;
        if aligned {
            self.check_alignment(linear);
        }
        let v = self.lanes(v, I8X16);
        self.store_value(linear, 16, v);
        Ok(())
    }

    fn load_pair(&mut self, i: &Insn, ea: Value, aligned: bool) -> Result<(Value, Value), Unsupported> {
        let linear = self.linear(i, i.seg, ea)?;
        if aligned {
            self.check_alignment(linear);
        }
        Ok(self.load_values(linear))
    }

    fn store_pair(
        &mut self,
        i: &Insn,
        ea: Value,
        (low, high): (Value, Value),
        aligned: bool,
    ) -> Result<(), Unsupported> {
        let linear = self.linear(i, i.seg, ea)?;
        if aligned {
            self.check_alignment(linear);
        }
        let halves = (self.lanes(low, I8X16), self.lanes(high, I8X16));
        self.store_values(linear, halves);
        Ok(())
    }

    fn next_ip(&mut self, i: &Insn) -> Value {
        self.ip_at(i.next_off() as i64)
    }

    fn check_target(&mut self, _: &Insn, target: Value) -> Result<(), Unsupported> {
        // Outside 64-bit mode CS is flat, so every 32-bit target is inside it.
        if self.plan.mode.has(Mode::CODE64) {
            let bad = self.is_not_canonical(target);
            self.side_exit_if(bad);
        }
        Ok(())
    }

    fn check_relative(&mut self, _: &Insn) -> Result<(), Unsupported> {
        // A relative branch of a few bytes to 2 GiB leaves the canonical range only from its very edge, where the
        // dispatch loop raises the fetch fault at the target instead.
        Ok(())
    }

    fn set_ip(&mut self, _: &Insn, target: Value) {
        self.end_block();
        self.exit_to(target);
        self.ended = true;
    }

    fn jump_rel(&mut self, i: &Insn) -> Result<(), Unsupported> {
        self.go(i.next_off() as i64 + i.imm as i64);
        Ok(())
    }

    fn branch_rel(&mut self, i: &Insn, c: Value) -> Result<(), Unsupported> {
        self.end_block();
        let (taken, next) = (self.b.create_block(), self.b.create_block());
        match self.negated(c) {
            Some(c) => self.b.ins().brif(c, next, &[], taken, &[]),
            None => self.b.ins().brif(c, taken, &[], next, &[]),
        };
        self.b.switch_to_block(taken);
        self.edge(i.next_off() as i64 + i.imm as i64);
        self.b.switch_to_block(next);
        self.edge(i.next_off() as i64);
        self.ended = true;
        Ok(())
    }

    fn fault_if(&mut self, c: Value, _: Exception) -> Result<(), Unsupported> {
        self.side_exit_if(c);
        Ok(())
    }

    fn unsupported(&mut self) -> Unsupported {
        Unsupported
    }
}

/// Where a word is in the CPU, and its size in bytes.
pub(crate) fn word_at(w: Word) -> (i32, u32) {
    let segment = |r: u8, field| at!(s.seg) + i32::from(r) * size_of::<Segment>() as i32 + field as i32;
    match w {
        Word::Flags => (at!(s.rflags), 8),
        Word::Cpl => (at!(s.cpl), 1),
        Word::Cr0 => (at!(s.cr0), 8),
        Word::Cr2 => (at!(s.cr2), 8),
        Word::Cr3 => (at!(s.cr3), 8),
        Word::Cr4 => (at!(s.cr4), 8),
        Word::Pkru => (at!(s.pkru), 4),
        Word::Selector(r) => (segment(r, offset_of!(Segment, selector)), 2),
        Word::Base(r) => (segment(r, offset_of!(Segment, base)), 8),
        Word::KernelGsBase => (at!(s.msr.kernel_gs_base), 8),
    }
}
