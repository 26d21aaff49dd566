//! The interpreter's evaluator: semantics run on numbers.

use crate::addr::is_canonical;
use crate::cpu::Cpu;
use crate::emit::{Bin, Cmp, Cond, Emit, Flags, FpArgs, FpCall, LaneOp, Un, Word};
use crate::exception::{Exception, Trap, vector};
use crate::flags;
use crate::insn::{Insn, Mode};
use crate::simd;
use crate::simd::fp::{self, FpEnv, FpFmt};
use crate::state::{cr, flag, seg};
use crate::vcpu::SHADOW_STI;
use crate::width::{W16, W32, W64, Width};

/// A two-operand operation on numbers.
#[inline(always)]
pub fn bin<W: Width>(op: Bin, a: u64, b: u64) -> u64 {
    let n = b as u32 & (W::BITS - 1);
    W::zext(match op {
        Bin::Add => a.wrapping_add(b),
        Bin::Sub => a.wrapping_sub(b),
        Bin::And => a & b,
        Bin::Or => a | b,
        Bin::Xor => a ^ b,
        Bin::Mul => a.wrapping_mul(b),
        Bin::Shl => a << n,
        Bin::Shr => a >> n,
        Bin::Sar => ((W::sext(a) as i64) >> n) as u64,
        Bin::Rotl => rotate::<W>(a, n),
        Bin::Rotr => rotate::<W>(a, (W::BITS - n) & (W::BITS - 1)),
    })
}

/// A comparison of numbers.
#[inline(always)]
pub fn cmp<W: Width>(op: Cmp, a: u64, b: u64) -> bool {
    match op {
        Cmp::Eq => a == b,
        Cmp::Ne => a != b,
        Cmp::Ltu => a < b,
        Cmp::Geu => a >= b,
        Cmp::Lts => (W::sext(a) as i64) < W::sext(b) as i64,
        Cmp::Ges => (W::sext(a) as i64) >= W::sext(b) as i64,
    }
}

/// A floating-point operation on one lane of numbers.
fn fp_lane(env: &mut FpEnv, op: FpCall, FpArgs { a, b, c, dst }: FpArgs<u128>) -> u128 {
    match op {
        FpCall::Arith(op, fmt) => fp::fp(env, op, fmt, a, b),
        FpCall::Compare(fmt, predicate) => fp::compare(env, fmt, a, b, predicate),
        FpCall::Round(fmt, imm) => fp::round(env, fmt, a, b, imm),
        FpCall::Dot(fmt, imm) => {
            let [r] = fp::dot(env, fmt, [a], [b], imm);
            r
        }
        FpCall::Fused(kind, fmt) => fp::fma(env, kind, fmt, dst, a, b, c),
        FpCall::Convert(op) => fp::convert(env, op, a, b),
        FpCall::ToHalf(imm) => fp::to_half(env, b, imm),
    }
}

impl Cpu {
    /// Evaluates under the guest's MXCSR, recording exception flags; an unmasked exception raises #XM.
    pub(crate) fn with_fp<T>(&mut self, f: impl FnOnce(&mut FpEnv) -> T) -> Result<T, Trap> {
        let mut env = FpEnv::new(self.s.mxcsr);
        if env.all_masked() {
            env.load();
            let v = f(&mut env);
            env.unload();
            self.s.mxcsr = env.mxcsr;
            return Ok(v);
        }
        let v = env.trapping(f);
        self.s.mxcsr = env.mxcsr;
        match v {
            Some(v) => Ok(v),
            None if self.s.cr4 & cr::CR4_OSXMMEXCPT != 0 => Err(self.raise(Exception::plain(vector::XM))),
            None => Err(self.ud()),
        }
    }
}

impl Emit for Cpu {
    type V = u64;
    type X = u128;
    type Trap = Trap;

    #[inline(always)]
    fn imm<W: Width>(&mut self, k: u64) -> u64 {
        W::zext(k)
    }

    #[inline(always)]
    fn bin<W: Width>(&mut self, op: Bin, a: u64, b: u64) -> u64 {
        bin::<W>(op, a, b)
    }

    #[inline(always)]
    fn un<W: Width>(&mut self, op: Un, a: u64) -> u64 {
        match op {
            Un::Not => W::zext(!a),
            Un::Neg => W::zext(a.wrapping_neg()),
            Un::Clz => u64::from(a.leading_zeros() - (64 - W::BITS)),
            Un::Ctz => u64::from(a.trailing_zeros().min(W::BITS)),
            Un::Popcnt => u64::from(a.count_ones()),
            Un::Bswap => a.swap_bytes() >> (64 - W::BITS),
        }
    }

    #[inline(always)]
    fn cmp<W: Width>(&mut self, op: Cmp, a: u64, b: u64) -> u64 {
        u64::from(cmp::<W>(op, a, b))
    }

    #[inline(always)]
    fn select<W: Width>(&mut self, c: u64, a: u64, b: u64) -> u64 {
        if c != 0 { a } else { b }
    }

    #[inline(always)]
    fn zext<F: Width, T: Width>(&mut self, a: u64) -> u64 {
        T::zext(a)
    }

    #[inline(always)]
    fn sext<F: Width, T: Width>(&mut self, a: u64) -> u64 {
        T::zext(F::sext(a))
    }

    #[inline(always)]
    fn mul_wide<W: Width>(&mut self, signed: bool, a: u64, b: u64) -> (u64, u64) {
        let p = if signed {
            (i128::from(W::sext(a) as i64) * i128::from(W::sext(b) as i64)) as u128
        } else {
            u128::from(a) * u128::from(b)
        };
        (W::zext(p as u64), W::zext((p >> W::BITS) as u64))
    }

    fn div_wide<W: Width>(&mut self, signed: bool, hi: u64, lo: u64, d: u64) -> Result<(u64, u64), Trap> {
        let result = if signed {
            // The dividend of 2·W bits, sign-extended to 128.
            let n =
                ((u128::from(hi) << W::BITS | u128::from(lo)) << (128 - 2 * W::BITS)) as i128 >> (128 - 2 * W::BITS);
            let d = i128::from(W::sext(d) as i64);
            n.checked_div(d).filter(|&q| q == i128::from(W::sext(q as u64) as i64)).map(|q| (q as u64, (n % d) as u64))
        } else {
            let n = u128::from(hi) << W::BITS | u128::from(lo);
            let d = u128::from(d);
            n.checked_div(d).filter(|&q| q <= u128::from(W::MASK)).map(|q| (q as u64, (n % d) as u64))
        };
        match result {
            Some((q, r)) => Ok((W::zext(q), W::zext(r))),
            None => Err(self.raise(Exception::plain(vector::DE))),
        }
    }

    #[inline(always)]
    fn gpr<W: Width>(&mut self, r: u8) -> u64 {
        W::zext(self.s.gpr[usize::from(r & 15)])
    }

    #[inline(always)]
    fn set_gpr<W: Width>(&mut self, r: u8, v: u64) {
        let g = &mut self.s.gpr[usize::from(r & 15)];
        *g = if W::BITS >= 32 { W::zext(v) } else { *g & !W::MASK | W::zext(v) };
    }

    #[inline(always)]
    fn gpr_high(&mut self, r: u8) -> u64 {
        self.s.gpr[usize::from(r & 3)] >> 8 & 0xff
    }

    #[inline(always)]
    fn set_gpr_high(&mut self, r: u8, v: u64) {
        let g = &mut self.s.gpr[usize::from(r & 3)];
        *g = *g & !0xff00 | (v & 0xff) << 8;
    }

    #[inline(always)]
    fn word(&mut self, w: Word) -> u64 {
        let s = &self.s;
        match w {
            Word::Flags => s.rflags,
            Word::Cpl => s.cpl.into(),
            Word::Cr0 => s.cr0,
            Word::Cr2 => s.cr2,
            Word::Cr3 => s.cr3,
            Word::Cr4 => s.cr4,
            Word::Pkru => s.pkru.into(),
            Word::Selector(r) => s.seg[usize::from(r)].selector.into(),
            Word::Base(r) => s.seg[usize::from(r)].base,
            Word::KernelGsBase => s.msr.kernel_gs_base,
        }
    }

    #[inline(always)]
    fn set_word(&mut self, w: Word, v: u64) {
        match w {
            Word::Flags => self.s.rflags = v,
            Word::Base(r) => self.s.seg[usize::from(r)].base = v,
            Word::KernelGsBase => self.s.msr.kernel_gs_base = v,
            _ => {}
        }
    }

    fn enable_interrupts(&mut self) -> Result<(), Trap> {
        if self.s.rflags & flag::IF == 0 {
            self.s.rflags |= flag::IF;
            // The shadow of one instruction holds back only what waits already.
            if self.interrupt_possible() {
                self.s.shadow = SHADOW_STI;
                self.stop_block = true;
            }
        }
        Ok(())
    }

    fn fence(&mut self) {
        self.serialize();
    }

    fn set_ac(&mut self, on: bool) {
        self.s.rflags = self.s.rflags & !flag::AC | if on { flag::AC } else { 0 };
        self.access_class_changed();
    }

    #[inline(always)]
    fn xmm(&mut self, r: u8) -> u128 {
        self.s.xmm(r)
    }

    #[inline(always)]
    fn set_xmm(&mut self, r: u8, v: u128) {
        self.s.set_xmm(r, v)
    }

    #[inline(always)]
    fn ymm_high(&mut self, r: u8) -> u128 {
        self.s.ymm_high(r)
    }

    #[inline(always)]
    fn set_ymm_high(&mut self, r: u8, v: u128) {
        self.s.set_ymm_high(r, v)
    }

    #[inline(always)]
    fn x_imm(&mut self, k: u128) -> u128 {
        k
    }

    #[inline(always)]
    fn x_low(&mut self, x: u128) -> u64 {
        x as u64
    }

    #[inline(always)]
    fn x_high(&mut self, x: u128) -> u64 {
        (x >> 64) as u64
    }

    #[inline(always)]
    fn x_make(&mut self, low: u64, high: u64) -> u128 {
        u128::from(low) | u128::from(high) << 64
    }

    fn lane(&mut self, op: LaneOp, a: u128, b: u128, c: u128) -> Result<u128, Trap> {
        Ok(match op {
            LaneOp::One(op) => simd::eval_unary(op, a),
            LaneOp::Two(op) => simd::eval(op, a, b),
            LaneOp::Immediate(op, imm) => simd::eval_imm(op, a, b, imm),
            LaneOp::Three(op) => simd::eval_ternary(op, a, b, c),
        })
    }

    fn signs(&mut self, x: u128, bytes: u8) -> u64 {
        u64::from(match bytes {
            1 => simd::flags::pmovmskb(x),
            4 => simd::flags::movmskps(x),
            _ => simd::flags::movmskpd(x),
        })
    }

    fn fp(&mut self, op: FpCall, low: FpArgs<u128>, high: Option<FpArgs<u128>>) -> Result<(u128, Option<u128>), Trap> {
        self.with_fp(|env| match (op, high) {
            // Its steps end in both lanes before the next begin.
            (FpCall::Dot(fmt, imm), Some(high)) => {
                let [low, high] = fp::dot(env, fmt, [low.a, high.a], [low.b, high.b], imm);
                (low, Some(high))
            }
            _ => (fp_lane(env, op, low), high.map(|args| fp_lane(env, op, args))),
        })
    }

    fn fp_comi(&mut self, fmt: FpFmt, quiet: bool, a: u128, b: u128) -> Result<(), Trap> {
        let r = self.with_fp(|env| fp::comi(env, fmt, quiet, a, b))?;
        let bit = |on: bool, f: u64| if on { f } else { 0 };
        self.s.set_status(bit(r.zf, flag::ZF) | bit(r.pf, flag::PF) | bit(r.cf, flag::CF));
        Ok(())
    }

    fn fp_from_int(&mut self, fmt: FpFmt, wide: bool, a: u128, v: u64) -> Result<u128, Trap> {
        self.with_fp(|env| fp::from_int(env, fmt, wide, a, v))
    }

    fn fp_to_int(&mut self, fmt: FpFmt, wide: bool, truncate: bool, b: u128) -> Result<u64, Trap> {
        self.with_fp(|env| fp::to_int(env, fmt, wide, truncate, b))
    }

    #[inline(always)]
    fn set_flags<W: Width>(&mut self, f: Flags<u64>) {
        let (z, sp, co) = flags::materialise::<Self, W>(self, f);
        self.s.cc_z = z;
        self.s.cc_sp = sp;
        self.s.cc_co = co;
    }

    #[inline(always)]
    fn cond(&mut self, c: Cond) -> u64 {
        flags::condition(self, c)
    }

    #[inline(always)]
    fn flags_raw(&mut self) -> (u64, u64, u64) {
        (self.s.cc_z, self.s.cc_sp, self.s.cc_co)
    }

    #[inline(always)]
    fn load<W: Width>(&mut self, i: &Insn, s: u8, ea: u64) -> Result<u64, Trap> {
        let linear = if i.flat { ea } else { self.linearize(s, ea, W::BYTES, false)? };
        self.through_ss = s == seg::SS;
        self.load_linear::<W>(linear)
    }

    #[inline(always)]
    fn store<W: Width>(&mut self, i: &Insn, s: u8, ea: u64, v: u64) -> Result<(), Trap> {
        let linear = if i.flat { ea } else { self.linearize(s, ea, W::BYTES, true)? };
        self.through_ss = s == seg::SS;
        if i.lock && self.peers.is_some() {
            return self.store_locked::<W>(linear, v);
        }
        self.store_linear::<W>(linear, v)
    }

    #[inline(always)]
    fn load_rmw<W: Width>(&mut self, i: &Insn, s: u8, ea: u64) -> Result<u64, Trap> {
        let linear = if i.flat { ea } else { self.linearize(s, ea, W::BYTES, true)? };
        self.through_ss = s == seg::SS;
        if i.lock && self.peers.is_some() {
            return self.load_locked::<W>(linear);
        }
        self.load_linear_rmw::<W>(linear)
    }

    fn check_store<W: Width>(&mut self, i: &Insn, ea: u64) -> Result<(), Trap> {
        let linear = self.linearize(i.seg, ea, W::BYTES, true)?;
        Cpu::probe_write(self, linear, W::BYTES)
    }

    fn probe_write(&mut self, i: &Insn, ea: u64, bytes: u64) -> Result<(), Trap> {
        let linear = self.linearize(i.seg, ea, bytes, true)?;
        self.through_ss = i.seg == seg::SS;
        self.check_canonical(linear, bytes)?;
        self.check_alignment(linear, bytes.min(16))?;
        Cpu::probe_write(self, linear, bytes)
    }

    #[inline(always)]
    fn check_extent(&mut self, i: &Insn, ea: u64, bytes: u64) -> Result<(), Trap> {
        let linear = if i.flat { ea } else { self.linearize(i.seg, ea, bytes, false)? };
        self.through_ss = i.seg == seg::SS;
        self.check_canonical(linear, bytes)
    }

    #[inline(always)]
    fn load_x_low<W: Width>(&mut self, i: &Insn, ea: u64) -> Result<u128, Trap> {
        Ok(self.load::<W>(i, i.seg, ea)?.into())
    }

    #[inline(always)]
    fn load_x(&mut self, i: &Insn, ea: u64, aligned: bool) -> Result<u128, Trap> {
        let linear = if i.flat { ea } else { self.linearize(i.seg, ea, 16, false)? };
        self.through_ss = i.seg == seg::SS;
        if aligned && linear & 15 != 0 {
            return Err(self.gp(0));
        }
        self.load_linear_x(linear)
    }

    #[inline(always)]
    fn store_x(&mut self, i: &Insn, ea: u64, v: u128, aligned: bool) -> Result<(), Trap> {
        let linear = if i.flat { ea } else { self.linearize(i.seg, ea, 16, true)? };
        self.through_ss = i.seg == seg::SS;
        if aligned && linear & 15 != 0 {
            return Err(self.gp(0));
        }
        self.store_linear_x(linear, v)
    }

    #[inline(always)]
    fn next_ip(&mut self, i: &Insn) -> u64 {
        self.next_ip_value(i)
    }

    #[inline(always)]
    fn check_target(&mut self, _i: &Insn, target: u64) -> Result<(), Trap> {
        let ok = if self.mode.has(Mode::CODE64) {
            is_canonical(target)
        } else {
            target <= u64::from(self.s.seg[usize::from(seg::CS)].limit)
        };
        if ok { Ok(()) } else { Err(self.gp(0)) }
    }

    #[inline(always)]
    fn check_relative(&mut self, i: &Insn) -> Result<(), Trap> {
        let target = self.relative_target(i);
        self.check_target(i, target)
    }

    #[inline(always)]
    fn set_ip(&mut self, _i: &Insn, target: u64) {
        self.s.rip = target;
    }

    #[inline(always)]
    fn jump_rel(&mut self, i: &Insn) -> Result<(), Trap> {
        let target = self.relative_target(i);
        self.check_target(i, target)?;
        self.s.rip = target;
        Ok(())
    }

    #[inline(always)]
    fn branch_rel(&mut self, i: &Insn, c: u64) -> Result<(), Trap> {
        if c != 0 {
            return self.jump_rel(i);
        }
        self.s.rip = self.next_ip_value(i);
        Ok(())
    }

    #[inline(always)]
    fn fault_if(&mut self, c: u64, e: Exception) -> Result<(), Trap> {
        if c != 0 { Err(self.raise(e)) } else { Ok(()) }
    }

    #[cold]
    fn unsupported(&mut self) -> Trap {
        self.ud()
    }
}

impl Cpu {
    /// Where a relative branch goes: the next instruction plus the displacement, cut to the operand size.
    #[inline(always)]
    pub fn relative_target(&self, i: &Insn) -> u64 {
        let target = self.next_ip_value(i).wrapping_add(i.imm);
        match i.osize {
            2 => W16::zext(target),
            4 => W32::zext(target),
            _ => W64::zext(target),
        }
    }
}

#[inline(always)]
fn rotate<W: Width>(a: u64, left: u32) -> u64 {
    match W::BITS {
        8 => u64::from((a as u8).rotate_left(left)),
        16 => u64::from((a as u16).rotate_left(left)),
        32 => u64::from((a as u32).rotate_left(left)),
        _ => a.rotate_left(left),
    }
}
