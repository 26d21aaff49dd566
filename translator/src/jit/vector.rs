//! Vector and floating-point operations as Cranelift values.
//!
//! Lane operations are portable Cranelift. Floating point is the host's own: on an x86-64, whose results, NaNs and flags
//! are the guest's, as it is, and on an AArch64 with guards around it ([`super::guard`]). Its flags accumulate in the host's MXCSR,
//! which has the guest's controls from the first floating-point instruction of a run of compiled code until its end,
//! or until a helper evaluates an instruction ([`crate::jit::frame`]).

use cranelift_codegen::ir::condcodes::{FloatCC, IntCC};
use cranelift_codegen::ir::types::{F32, F32X4, F64, F64X2, I8, I8X16, I16X8, I32, I32X4, I64, I64X2};
use cranelift_codegen::ir::{InstBuilder, MemFlagsData, Type, Value};

use crate::code::HostIsa;
use crate::emit::{Emit, Flags, FpArgs, FpCall, LaneOp};
use crate::jit::Unsupported;
use crate::jit::emit::at;
use crate::jit::emit::{FlagVal, Helper, JitEmit};
use crate::jit::host::{Host, Unit};
use crate::simd::fp::{CvtOp, FmaKind, FpFmt, FpOp};
use crate::simd::{VecImmOp, VecOp, VecTerOp, VecUnOp};
use crate::width::W8;

/// Whether a lane operation has a compiled form on a host.
pub fn has_lane(op: LaneOp) -> bool {
    match op {
        LaneOp::One(op) => !matches!(op, VecUnOp::Phminposuw | VecUnOp::Aesimc),
        LaneOp::Two(VecOp::Pshufb) => true,
        LaneOp::Two(op) => simple(op).is_some() || shift(op).is_some() || interleaving(op).is_some() || packing(op),
        LaneOp::Immediate(op, _) => {
            use VecImmOp::*;
            !matches!(op, Mpsadbw | Insertps | Pclmulqdq | Aeskeygenassist | Sha1rnds4)
        }
        LaneOp::Three(op) => op != VecTerOp::Sha256rnds2,
    }
}

/// Whether a floating-point operation has a compiled form on a host.
pub fn has_fp(op: FpCall, host: Host) -> bool {
    use FpOp::*;
    has_scalar(host)
        && match op {
            FpCall::Arith(op, _) => matches!(op, Add | Sub | Mul | Div | Min | Max | Sqrt),
            FpCall::Compare(_, predicate) => predicate < 8,
            FpCall::Fused(kind, _) => host.fma && !matches!(kind, FmaKind::AddSub | FmaKind::SubAdd),
            FpCall::Convert(CvtOp::Cvttps2dq) => host.unit == Unit::Exact,
            FpCall::Convert(op) => {
                use CvtOp::*;
                matches!(op, Cvtdq2ps | Cvtdq2pd | Cvtps2pd | Cvtpd2ps | Cvtss2sd | Cvtsd2ss)
            }
            FpCall::Round(..) | FpCall::Dot(..) | FpCall::ToHalf(_) => false,
        }
}

/// Whether comparisons that set flags, and conversions from integers, have a compiled form on a host.
pub fn has_scalar(host: Host) -> bool {
    host.unit != Unit::Other
}

/// Whether a conversion to an integer has a compiled form on a host.
pub fn has_to_int(truncate: bool, host: Host) -> bool {
    has_scalar(host) && truncate
}

/// Operations on corresponding elements that are one Cranelift instruction.
#[derive(Clone, Copy)]
enum Simple {
    Add,
    Sub,
    Mul,
    AddSigned,
    AddUnsigned,
    SubSigned,
    SubUnsigned,
    Average,
    MinSigned,
    MinUnsigned,
    MaxSigned,
    MaxUnsigned,
    Compare(IntCC),
    And,
    /// Of the second operand and the complement of the first.
    AndNot,
    Or,
    Xor,
    /// Products of the even doublewords, zero-extended.
    MulEven,
    /// Sums of the products of pairs of words.
    MulAdd,
}

fn simple(op: VecOp) -> Option<(Simple, Type)> {
    use Simple::*;
    use VecOp::*;
    Some(match op {
        Paddb => (Add, I8X16),
        Paddw => (Add, I16X8),
        Paddd => (Add, I32X4),
        Paddq => (Add, I64X2),
        Psubb => (Sub, I8X16),
        Psubw => (Sub, I16X8),
        Psubd => (Sub, I32X4),
        Psubq => (Sub, I64X2),
        Paddsb => (AddSigned, I8X16),
        Paddsw => (AddSigned, I16X8),
        Paddusb => (AddUnsigned, I8X16),
        Paddusw => (AddUnsigned, I16X8),
        Psubsb => (SubSigned, I8X16),
        Psubsw => (SubSigned, I16X8),
        Psubusb => (SubUnsigned, I8X16),
        Psubusw => (SubUnsigned, I16X8),
        Pavgb => (Average, I8X16),
        Pavgw => (Average, I16X8),
        Pminsb => (MinSigned, I8X16),
        Pminsw => (MinSigned, I16X8),
        Pminsd => (MinSigned, I32X4),
        Pminub => (MinUnsigned, I8X16),
        Pminuw => (MinUnsigned, I16X8),
        Pminud => (MinUnsigned, I32X4),
        Pmaxsb => (MaxSigned, I8X16),
        Pmaxsw => (MaxSigned, I16X8),
        Pmaxsd => (MaxSigned, I32X4),
        Pmaxub => (MaxUnsigned, I8X16),
        Pmaxuw => (MaxUnsigned, I16X8),
        Pmaxud => (MaxUnsigned, I32X4),
        Pmullw => (Mul, I16X8),
        Pmulld => (Mul, I32X4),
        Pmuludq => (MulEven, I64X2),
        Pmaddwd => (MulAdd, I16X8),
        Pcmpeqb => (Compare(IntCC::Equal), I8X16),
        Pcmpeqw => (Compare(IntCC::Equal), I16X8),
        Pcmpeqd => (Compare(IntCC::Equal), I32X4),
        Pcmpeqq => (Compare(IntCC::Equal), I64X2),
        Pcmpgtb => (Compare(IntCC::SignedGreaterThan), I8X16),
        Pcmpgtw => (Compare(IntCC::SignedGreaterThan), I16X8),
        Pcmpgtd => (Compare(IntCC::SignedGreaterThan), I32X4),
        Pcmpgtq => (Compare(IntCC::SignedGreaterThan), I64X2),
        Pand => (And, I8X16),
        Pandn => (AndNot, I8X16),
        Por => (Or, I8X16),
        Pxor => (Xor, I8X16),
        _ => return None,
    })
}

#[derive(Clone, Copy)]
enum Shift {
    Left,
    Right,
    /// Copies of the sign come in.
    RightSigned,
}

/// Shifts of all elements by one count.
fn shift(op: VecOp) -> Option<(Shift, Type)> {
    use VecOp::*;
    Some(match op {
        Psllw => (Shift::Left, I16X8),
        Pslld => (Shift::Left, I32X4),
        Psllq => (Shift::Left, I64X2),
        Psrlw => (Shift::Right, I16X8),
        Psrld => (Shift::Right, I32X4),
        Psrlq => (Shift::Right, I64X2),
        Psraw => (Shift::RightSigned, I16X8),
        Psrad => (Shift::RightSigned, I32X4),
        _ => return None,
    })
}

/// Bytes of an element, and whether it is the upper halves that are interleaved.
fn interleaving(op: VecOp) -> Option<(u8, bool)> {
    use VecOp::*;
    Some(match op {
        Punpcklbw => (1, false),
        Punpcklwd => (2, false),
        Punpckldq => (4, false),
        Punpcklqdq => (8, false),
        Punpckhbw => (1, true),
        Punpckhwd => (2, true),
        Punpckhdq => (4, true),
        Punpckhqdq => (8, true),
        _ => return None,
    })
}

fn packing(op: VecOp) -> bool {
    use VecOp::*;
    matches!(op, Packsswb | Packssdw | Packuswb | Packusdw)
}

/// Which bytes of two operands (the second's from 16 on) elements of `bytes` bytes at `sources` are.
fn bytes_of<const N: usize>(bytes: u8, sources: [u8; N]) -> [u8; 16] {
    std::array::from_fn(|k| {
        let k = k as u8;
        sources[usize::from(k / bytes)] * bytes + k % bytes
    })
}

fn select4(imm: u8) -> [u8; 4] {
    std::array::from_fn(|n| imm >> (2 * n) & 3)
}

impl JitEmit<'_> {
    /// Bytes picked from two vectors; numbers from 16 on are the second's.
    fn pick(&mut self, a: Value, b: Value, bytes: [u8; 16]) -> Value {
        let mask = self.b.func.dfg.immediates.push(bytes.as_slice().into());
        let (a, b) = (self.lanes(a, I8X16), self.lanes(b, I8X16));
        self.b.ins().shuffle(a, b, mask)
    }

    pub(super) fn emit_lane(&mut self, op: LaneOp, a: Value, b: Value, c: Value) -> Result<Value, Unsupported> {
        if !has_lane(op) {
            return Err(Unsupported);
        }
        let r = match op {
            LaneOp::One(op) => self.lane_one(op, a)?,
            LaneOp::Two(op) => self.lane_two(op, a, b)?,
            LaneOp::Immediate(op, imm) => self.lane_immediate(op, a, b, imm)?,
            LaneOp::Three(op) => {
                let t = match op {
                    VecTerOp::Pblendvb => I8X16,
                    VecTerOp::Blendvps => I32X4,
                    VecTerOp::Blendvpd => I64X2,
                    VecTerOp::Sha256rnds2 => return Err(Unsupported),
                };
                let c = self.lanes(c, t);
                let mask = self.b.ins().sshr_imm_u(c, i64::from(t.lane_bits()) - 1);
                let (a, b) = (self.lanes(a, t), self.lanes(b, t));
                self.b.ins().bitselect(mask, b, a)
            }
        };
        Ok(self.lanes(r, I8X16))
    }

    fn lane_one(&mut self, op: VecUnOp, a: Value) -> Result<Value, Unsupported> {
        use VecUnOp::*;
        let signed = matches!(op, Pmovsxbw | Pmovsxbd | Pmovsxbq | Pmovsxwd | Pmovsxwq | Pmovsxdq);
        let (from, steps) = match op {
            Pmovsxbw | Pmovzxbw => (I8X16, 1),
            Pmovsxbd | Pmovzxbd => (I8X16, 2),
            Pmovsxbq | Pmovzxbq => (I8X16, 3),
            Pmovsxwd | Pmovzxwd => (I16X8, 1),
            Pmovsxwq | Pmovzxwq => (I16X8, 2),
            Pmovsxdq | Pmovzxdq => (I32X4, 1),
            Pabsb | Pabsw | Pabsd => {
                let a = self.lanes(a, [I8X16, I16X8, I32X4][op as usize - Pabsb as usize]);
                return Ok(self.b.ins().iabs(a));
            }
            Movddup | Broadcastq => return Ok(self.pick(a, a, bytes_of(8, [0, 0]))),
            Movsldup => return Ok(self.pick(a, a, bytes_of(4, [0, 0, 2, 2]))),
            Movshdup => return Ok(self.pick(a, a, bytes_of(4, [1, 1, 3, 3]))),
            Broadcastb => return Ok(self.pick(a, a, [0; 16])),
            Broadcastw => return Ok(self.pick(a, a, bytes_of(2, [0; 8]))),
            Broadcastd => return Ok(self.pick(a, a, bytes_of(4, [0; 4]))),
            Phminposuw | Aesimc => return Err(Unsupported),
        };
        let mut v = self.lanes(a, from);
        for _ in 0..steps {
            v = if signed { self.b.ins().swiden_low(v) } else { self.b.ins().uwiden_low(v) };
        }
        Ok(v)
    }

    fn lane_two(&mut self, op: VecOp, a: Value, b: Value) -> Result<Value, Unsupported> {
        if let Some((kind, t)) = simple(op) {
            let (a, b) = (self.lanes(a, t), self.lanes(b, t));
            return Ok(self.lane_simple(kind, t, a, b));
        }
        if let Some((kind, t)) = shift(op) {
            let count = self.x_low(b);
            let a = self.lanes(a, t);
            return Ok(self.lane_shift(kind, t, a, count));
        }
        if let Some((bytes, upper)) = interleaving(op) {
            let half = if upper { 8 } else { 0 };
            let from = std::array::from_fn(|k| {
                let k = k as u8;
                let (element, within) = (k / bytes, k % bytes);
                half + element / 2 * bytes + within + if element % 2 == 0 { 0 } else { 16 }
            });
            return Ok(self.pick(a, b, from));
        }
        let t = if matches!(op, VecOp::Packsswb | VecOp::Packuswb) { I16X8 } else { I32X4 };
        Ok(match op {
            VecOp::Packsswb | VecOp::Packssdw => {
                let (a, b) = (self.lanes(a, t), self.lanes(b, t));
                self.b.ins().snarrow(a, b)
            }
            VecOp::Packuswb | VecOp::Packusdw => {
                let (a, b) = (self.lanes(a, t), self.lanes(b, t));
                self.b.ins().unarrow(a, b)
            }
            VecOp::Pshufb if HostIsa::native() == Some(HostIsa::X86_64) => self.b.ins().x86_pshufb(a, b),
            VecOp::Pshufb => {
                // Numbers from 16 on pick zeros here, and those from 128 on there.
                let sixteen = self.b.ins().iconst(I8, 0x8f);
                let mask = self.b.ins().splat(I8X16, sixteen);
                let b = self.b.ins().band(b, mask);
                self.b.ins().swizzle(a, b)
            }
            _ => return Err(Unsupported),
        })
    }

    fn lane_simple(&mut self, kind: Simple, t: Type, x: Value, y: Value) -> Value {
        let b = self.b.ins();
        match kind {
            Simple::Add => b.iadd(x, y),
            Simple::Sub => b.isub(x, y),
            Simple::Mul => b.imul(x, y),
            Simple::AddSigned => b.sadd_sat(x, y),
            Simple::AddUnsigned => b.uadd_sat(x, y),
            Simple::SubSigned => b.ssub_sat(x, y),
            Simple::SubUnsigned => b.usub_sat(x, y),
            Simple::Average => b.avg_round(x, y),
            Simple::MinSigned => b.smin(x, y),
            Simple::MinUnsigned => b.umin(x, y),
            Simple::MaxSigned => b.smax(x, y),
            Simple::MaxUnsigned => b.umax(x, y),
            Simple::Compare(cc) => b.icmp(cc, x, y),
            Simple::And => b.band(x, y),
            Simple::AndNot => b.band_not(y, x),
            Simple::Or => b.bor(x, y),
            Simple::Xor => b.bxor(x, y),
            Simple::MulEven => {
                let low = b.iconst(I64, 0xffff_ffff);
                let mask = self.b.ins().splat(t, low);
                let (x, y) = (self.b.ins().band(x, mask), self.b.ins().band(y, mask));
                self.b.ins().imul(x, y)
            }
            Simple::MulAdd => {
                let (xl, yl) = (b.swiden_low(x), self.b.ins().swiden_low(y));
                let (xh, yh) = (self.b.ins().swiden_high(x), self.b.ins().swiden_high(y));
                let (low, high) = (self.b.ins().imul(xl, yl), self.b.ins().imul(xh, yh));
                self.b.ins().iadd_pairwise(low, high)
            }
        }
    }

    /// Shifts by a 64-bit count: counts beyond the element shift everything out.
    fn lane_shift(&mut self, kind: Shift, t: Type, a: Value, count: Value) -> Value {
        let bits = i64::from(t.lane_bits());
        let inside = self.b.ins().icmp_imm_u(IntCC::UnsignedLessThan, count, bits);
        let most = self.b.ins().iconst(I64, bits - 1);
        let bounded = self.b.ins().select(inside, count, most);
        let n = self.b.ins().ireduce(I32, bounded);
        let shifted = match kind {
            Shift::Left => self.b.ins().ishl(a, n),
            Shift::Right => self.b.ins().ushr(a, n),
            Shift::RightSigned => return self.b.ins().sshr(a, n),
        };
        // All ones where the count is inside, so that no vector hangs on a branch.
        let keep = self.b.ins().uextend(I64, inside);
        let keep = self.b.ins().ineg(keep);
        let keep = self.b.ins().splat(I64X2, keep);
        let keep = self.lanes(keep, t);
        self.b.ins().band(shifted, keep)
    }

    fn lane_immediate(&mut self, op: VecImmOp, a: Value, b: Value, imm: u8) -> Result<Value, Unsupported> {
        use VecImmOp::*;
        let s = select4(imm);
        let blend =
            |bytes: u8| std::array::from_fn(|k| k as u8 + if imm >> (k as u8 / bytes) & 1 != 0 { 16 } else { 0 });
        let (kind, t) = match op {
            Pshufd | Permilps => return Ok(self.pick(a, a, bytes_of(4, s))),
            Pshufhw => return Ok(self.pick(a, a, bytes_of(2, [0, 1, 2, 3, 4 + s[0], 4 + s[1], 4 + s[2], 4 + s[3]]))),
            Pshuflw => return Ok(self.pick(a, a, bytes_of(2, [s[0], s[1], s[2], s[3], 4, 5, 6, 7]))),
            Shufps => return Ok(self.pick(a, b, bytes_of(4, [s[0], s[1], 4 + s[2], 4 + s[3]]))),
            Shufpd => return Ok(self.pick(a, b, bytes_of(8, [imm & 1, 2 + (imm >> 1 & 1)]))),
            Permilpd => return Ok(self.pick(a, a, bytes_of(8, [imm & 1, imm >> 1 & 1]))),
            Pblendw => return Ok(self.pick(a, b, blend(2))),
            Blendps => return Ok(self.pick(a, b, blend(4))),
            Blendpd => return Ok(self.pick(a, b, blend(8))),
            Palignr => {
                // The 32 bytes of `a` above `b`, shifted right; what comes in from above is zeros.
                return Ok(match imm {
                    0..=16 => self.pick(b, a, std::array::from_fn(|k| k as u8 + imm)),
                    17..=31 => {
                        let zero = self.x_imm(0);
                        self.pick(a, zero, std::array::from_fn(|k| (k as u8 + imm - 16).min(16)))
                    }
                    _ => self.x_imm(0),
                });
            }
            Pslldq | Psrldq => {
                let zero = self.x_imm(0);
                let n = imm.min(16);
                let left = op == Pslldq;
                return Ok(self.pick(
                    a,
                    zero,
                    std::array::from_fn(|k| {
                        let k = k as u8;
                        if left { k.checked_sub(n).unwrap_or(16) } else { (k + n).min(16) }
                    }),
                ));
            }
            PsllwImm => (Shift::Left, I16X8),
            PslldImm => (Shift::Left, I32X4),
            PsllqImm => (Shift::Left, I64X2),
            PsrlwImm => (Shift::Right, I16X8),
            PsrldImm => (Shift::Right, I32X4),
            PsrlqImm => (Shift::Right, I64X2),
            PsrawImm => (Shift::RightSigned, I16X8),
            PsradImm => (Shift::RightSigned, I32X4),
            Mpsadbw | Insertps | Pclmulqdq | Aeskeygenassist | Sha1rnds4 => return Err(Unsupported),
        };
        let a = self.lanes(a, t);
        let most = t.lane_bits() - 1;
        Ok(match kind {
            Shift::RightSigned => self.b.ins().sshr_imm_u(a, i64::from(u32::from(imm).min(most))),
            _ if u32::from(imm) > most => self.x_imm(0),
            Shift::Left => self.b.ins().ishl_imm_u(a, i64::from(imm)),
            Shift::Right => self.b.ins().ushr_imm_u(a, i64::from(imm)),
        })
    }

    pub(super) fn emit_signs(&mut self, x: Value, bytes: u8) -> Value {
        let t = match bytes {
            1 => I8X16,
            4 => I32X4,
            _ => I64X2,
        };
        let x = self.lanes(x, t);
        let bits = self.b.ins().vhigh_bits(I32, x);
        self.b.ins().uextend(I64, bits)
    }

    // ---- floating point ----

    /// Makes the guest's MXCSR the host's, unless it is already; leaves to the interpreter if the guest has unmasked
    /// an exception.
    fn begin_fp(&mut self) {
        // What the operands were is part of the result; a shuffle would perhaps drop them.
        self.fp_unused = (self.fp_unused.0 & !self.fp_read.0, self.fp_unused.1 & !self.fp_read.1);
        self.fp_result = true;
        if self.fp_ready {
            return;
        }
        self.fp_ready = true;
        let loaded = self.load_frame(at!(jit.fp_loaded));
        let (load, go_on) = (self.b.create_block(), self.b.create_block());
        self.b.set_cold_block(load);
        self.b.ins().brif(loaded, go_on, &[], load, &[]);
        self.b.switch_to_block(load);
        self.call(Helper::LoadFp, loaded, loaded, None);
        let done = self.load_frame(at!(jit.slow_result));
        let none = self.b.ins().icmp_imm_u(IntCC::Equal, done, 0);
        self.side_exit_if(none);
        self.b.ins().jump(go_on, &[]);
        self.b.switch_to_block(go_on);
    }

    fn format(fmt: FpFmt) -> (Type, Type) {
        if fmt.is_double() { (F64X2, F64) } else { (F32X4, F32) }
    }

    /// The low element.
    fn element(&mut self, x: Value, fmt: FpFmt) -> Value {
        let x = self.lanes(x, Self::format(fmt).0);
        self.b.ins().extractlane(x, 0)
    }

    /// `x` with another low element.
    fn with_element(&mut self, x: Value, v: Value, fmt: FpFmt) -> Value {
        let x = self.lanes(x, Self::format(fmt).0);
        let x = self.b.ins().insertlane(x, v, 0);
        self.lanes(x, I8X16)
    }

    pub(super) fn is_scalar(fmt: FpFmt) -> bool {
        matches!(fmt, FpFmt::Ss | FpFmt::Sd)
    }

    pub(super) fn emit_fp(
        &mut self,
        op: FpCall,
        low: FpArgs<Value>,
        high: Option<FpArgs<Value>>,
    ) -> Result<(Value, Option<Value>), Unsupported> {
        if !has_fp(op, Host::this()) {
            return Err(Unsupported);
        }
        if matches!(op, FpCall::Convert(_) | FpCall::Arith(FpOp::Sqrt, _)) {
            // Their first operand is read for the lanes that they keep, which may be none.
            self.fp_read = (0, 0);
        }
        self.begin_fp();
        let low = self.fp_lane(op, low)?;
        let high = match high {
            Some(args) => Some(self.fp_lane(op, args)?),
            None => None,
        };
        Ok((low, high))
    }

    fn fp_lane(&mut self, op: FpCall, args: FpArgs<Value>) -> Result<Value, Unsupported> {
        match op {
            FpCall::Arith(arith, fmt) => {
                let (a, b) = self.operands(fmt, args.a, args.b);
                let r = self.arithmetic(arith, fmt, a, b)?;
                self.guard(op, &[args.a, args.b], &[a, b], r);
                let r = self.result(fmt, args.a, r);
                self.note_regular(r, fmt);
                Ok(r)
            }
            FpCall::Compare(fmt, predicate) => {
                let (a, b) = self.operands(fmt, args.a, args.b);
                self.guard_numbers(fmt, &[a, b]);
                Ok(self.compare(fmt, args.a, args.b, predicate))
            }
            FpCall::Fused(kind, fmt) => {
                let (a, b) = self.operands(fmt, args.a, args.b);
                let (c, _) = self.operands(fmt, args.c, args.c);
                let negated = matches!(kind, FmaKind::NegAdd | FmaKind::NegSub);
                let a = if negated { self.b.ins().fneg(a) } else { a };
                let c = if matches!(kind, FmaKind::Sub | FmaKind::NegSub) { self.b.ins().fneg(c) } else { c };
                // The host instruction is the 213 form, whose operand 1, the first here, comes second when NaNs are
                // chosen from.
                let r = self.b.ins().fma(b, a, c);
                self.guard(op, &[args.a, args.b, args.c], &[a, b, c], r);
                let r = self.result(fmt, args.dst, r);
                self.note_regular(r, fmt);
                Ok(r)
            }
            FpCall::Convert(op) => self.convert(op, args.a, args.b),
            FpCall::Round(..) | FpCall::Dot(..) | FpCall::ToHalf(_) => Err(Unsupported),
        }
    }

    /// Both operands as the host's operation takes them: elements or vectors.
    fn operands(&mut self, fmt: FpFmt, a: Value, b: Value) -> (Value, Value) {
        if Self::is_scalar(fmt) {
            return (self.element(a, fmt), self.element(b, fmt));
        }
        let t = Self::format(fmt).0;
        (self.lanes(a, t), self.lanes(b, t))
    }

    /// The result of an operation on [`Self::operands`], with the rest of `rest` above an element.
    fn result(&mut self, fmt: FpFmt, rest: Value, r: Value) -> Value {
        if Self::is_scalar(fmt) { self.with_element(rest, r, fmt) } else { self.lanes(r, I8X16) }
    }

    fn arithmetic(&mut self, op: FpOp, fmt: FpFmt, x: Value, y: Value) -> Result<Value, Unsupported> {
        let b = self.b.ins();
        Ok(match op {
            FpOp::Add => b.fadd(x, y),
            FpOp::Sub => b.fsub(x, y),
            FpOp::Mul => b.fmul(x, y),
            FpOp::Div => b.fdiv(x, y),
            FpOp::Sqrt => b.sqrt(y),
            // These shapes are MINSS and its kin: the second operand if either is a NaN or both are zeros.
            FpOp::Min | FpOp::Max => {
                let (l, r) = if op == FpOp::Min { (x, y) } else { (y, x) };
                let less = b.fcmp(FloatCC::LessThan, l, r);
                if Self::is_scalar(fmt) {
                    self.b.ins().select(less, x, y)
                } else {
                    let t = Self::format(fmt).0;
                    let mask = self.lanes(less, t);
                    self.b.ins().bitselect(mask, x, y)
                }
            }
            _ => return Err(Unsupported),
        })
    }

    fn compare(&mut self, fmt: FpFmt, a: Value, b: Value, predicate: u8) -> Value {
        let cc = [
            FloatCC::Equal,
            FloatCC::LessThan,
            FloatCC::LessThanOrEqual,
            FloatCC::Unordered,
            FloatCC::NotEqual,
            FloatCC::UnorderedOrGreaterThanOrEqual,
            FloatCC::UnorderedOrGreaterThan,
            FloatCC::Ordered,
        ][usize::from(predicate & 7)];
        let t = Self::format(fmt).0;
        let scalar = Self::is_scalar(fmt);
        let (mut x, mut y) = self.operands(fmt, a, b);
        if scalar {
            // Zeros above raise no flags.
            (x, y) = (self.b.ins().scalar_to_vector(t, x), self.b.ins().scalar_to_vector(t, y));
        }
        let mask = if Self::guarded() { self.compare_numbers(x, y, predicate) } else { self.b.ins().fcmp(cc, x, y) };
        if !scalar {
            return self.lanes(mask, I8X16);
        }
        let mask = self.lanes(mask, t);
        let low = self.b.ins().extractlane(mask, 0);
        self.with_element(a, low, fmt)
    }

    fn convert(&mut self, op: CvtOp, a: Value, b: Value) -> Result<Value, Unsupported> {
        let r = match op {
            CvtOp::Cvtss2sd => {
                let x = self.element(b, FpFmt::Ss);
                let v = self.b.ins().fpromote(F64, x);
                self.guard(FpCall::Convert(op), &[], &[x], v);
                return Ok(self.with_element(a, v, FpFmt::Sd));
            }
            CvtOp::Cvtsd2ss => {
                let x = self.element(b, FpFmt::Sd);
                let v = self.b.ins().fdemote(F32, x);
                self.guard(FpCall::Convert(op), &[], &[x], v);
                return Ok(self.with_element(a, v, FpFmt::Ss));
            }
            CvtOp::Cvtps2pd => {
                let b = self.lanes(b, F32X4);
                let r = self.b.ins().fvpromote_low(b);
                self.guard(FpCall::Convert(op), &[], &[b], r);
                r
            }
            CvtOp::Cvtpd2ps => {
                let b = self.lanes(b, F64X2);
                let r = self.b.ins().fvdemote(b);
                self.guard(FpCall::Convert(op), &[], &[b], r);
                r
            }
            CvtOp::Cvtdq2ps => {
                let b = self.lanes(b, I32X4);
                self.b.ins().fcvt_from_sint(F32X4, b)
            }
            CvtOp::Cvtdq2pd => {
                let b = self.lanes(b, I32X4);
                let b = self.b.ins().swiden_low(b);
                self.b.ins().fcvt_from_sint(F64X2, b)
            }
            CvtOp::Cvttps2dq => {
                let b = self.lanes(b, F32X4);
                self.b.ins().x86_cvtt2dq(I32X4, b)
            }
            _ => return Err(Unsupported),
        };
        Ok(self.lanes(r, I8X16))
    }

    /// Ordered operands set the flags here; NaNs are left to the interpreter.
    pub(super) fn emit_comi(&mut self, fmt: FpFmt, a: Value, b: Value) -> Result<(), Unsupported> {
        if !has_scalar(Host::this()) {
            return Err(Unsupported);
        }
        self.begin_fp();
        let (a, b) = (self.element(a, fmt), self.element(b, fmt));
        self.guard_numbers(if fmt.is_double() { FpFmt::Sd } else { FpFmt::Ss }, &[a, b]);
        let unordered = self.b.ins().fcmp(FloatCC::Unordered, a, b);
        self.side_exit_if(unordered);
        let less = self.b.ins().fcmp(FloatCC::LessThan, a, b);
        let equal = self.b.ins().fcmp(FloatCC::Equal, a, b);
        self.set_flags::<W8>(Flags::Ordered { less, equal });
        Ok(())
    }

    /// Makes words of flags that are the host's comparison of numbers: that happens where its outcome is used, and
    /// behind a helper the host's MXCSR is not the guest's.
    pub(super) fn settle_comparison(&mut self) {
        fn compares(flags: &FlagVal) -> bool {
            match flags {
                FlagVal::Op(f, _) => matches!(f, Flags::Ordered { .. }),
                FlagVal::Partial(f, _, before) => matches!(f, Flags::Ordered { .. }) || compares(before),
                FlagVal::Memory | FlagVal::Raw(..) => false,
            }
        }
        if compares(&self.flags) {
            self.flags_raw();
        }
    }

    pub(super) fn emit_from_int(&mut self, fmt: FpFmt, wide: bool, a: Value, v: Value) -> Result<Value, Unsupported> {
        if !has_scalar(Host::this()) {
            return Err(Unsupported);
        }
        self.begin_fp();
        let v = if wide { v } else { self.b.ins().ireduce(I32, v) };
        let v = self.b.ins().fcvt_from_sint(Self::format(fmt).1, v);
        let r = self.with_element(a, v, fmt);
        self.note_regular(r, fmt);
        Ok(r)
    }

    /// Values inside the range are converted here; others are left to the interpreter.
    pub(super) fn emit_to_int(
        &mut self,
        fmt: FpFmt,
        wide: bool,
        truncate: bool,
        b: Value,
    ) -> Result<Value, Unsupported> {
        if !has_to_int(truncate, Host::this()) {
            return Err(Unsupported);
        }
        self.begin_fp();
        let v = self.element(b, fmt);
        let limit = if wide { 63 } else { 31 };
        // The sizes are compared as integers, as a comparison of denormals raises what the conversion does not.
        let (t, bound) =
            if fmt.is_double() { (I64, 2f64.powi(limit).to_bits()) } else { (I32, 2f32.powi(limit).to_bits().into()) };
        let bits = self.b.ins().bitcast(t, MemFlagsData::new(), v);
        let sign = if fmt.is_double() { i64::MIN } else { 1 << 31 };
        let size = self.b.ins().band_imm_u(bits, !sign & if fmt.is_double() { -1 } else { 0xffff_ffff });
        let outside = self.b.ins().icmp_imm_u(IntCC::UnsignedGreaterThanOrEqual, size, bound as i64);
        self.side_exit_if(outside);
        let r = self.b.ins().fcvt_to_sint_sat(if wide { I64 } else { I32 }, v);
        self.keep(r);
        Ok(if wide { r } else { self.b.ins().uextend(I64, r) })
    }

    /// The low `W`-sized element of memory at a host address, in a vector with zeros above.
    pub(super) fn low_element(&mut self, v: Value, bytes: u64) -> Value {
        let x = match bytes {
            1 | 2 => {
                let v = self.b.ins().uextend(I32, v);
                self.b.ins().scalar_to_vector(I32X4, v)
            }
            4 => self.b.ins().scalar_to_vector(F32X4, v),
            _ => self.b.ins().scalar_to_vector(F64X2, v),
        };
        self.lanes(x, I8X16)
    }

    /// The type that [`Self::low_element`] takes.
    pub(super) fn element_type(bytes: u64) -> Type {
        match bytes {
            1 => I8,
            2 => cranelift_codegen::ir::types::I16,
            4 => F32,
            _ => F64,
        }
    }

    /// A zero for the upper half makes a vector of its low element.
    pub(super) fn emit_make(&mut self, low: Value, high: Value) -> Value {
        let x = self.b.ins().scalar_to_vector(I64X2, low);
        let x = if self.constant(high) == Some(0) { x } else { self.b.ins().insertlane(x, high, 1) };
        self.lanes(x, I8X16)
    }
}
