//! Floating point on hosts whose results are the guest's for zeros and normal numbers only.
//!
//! AArch64 rounds as x86-64 does, and notes an inexact result as it does. It differs in which NaN comes out, in the sign
//! of the one that it makes, in what it notes of denormal operands, and in whether a result is tiny before or after it is
//! rounded (Arm ARM §A1.5; SDM vol. 1 §4.8, §11.5). So an operation is the host's own, and code around it makes sure that
//! nothing of the kind was there; if it was, the interpreter does the instruction, whose flags are the guest's. That the
//! host has done it before has only noted that the result was inexact if it is.

use cranelift_codegen::ir::condcodes::{FloatCC, IntCC};
use cranelift_codegen::ir::types::{I32, I32X4, I64, I64X2};
use cranelift_codegen::ir::{InstBuilder, MemFlagsData, Type, Value};

use crate::emit::FpCall;
use crate::jit::emit::JitEmit;
use crate::jit::host::{Host, Unit};
use crate::simd::fp::{CvtOp, FpFmt, FpOp};

/// A format's elements as integers.
#[derive(Clone, Copy)]
struct Shape {
    /// The type of an element, or of all of them.
    t: Type,
    element: Type,
    /// Bits of the significand that are stored.
    mantissa: u32,
    /// The exponent of infinities and NaNs.
    most: u64,
}

impl Shape {
    fn of(fmt: FpFmt) -> Shape {
        let (element, vector, mantissa, most) =
            if fmt.is_double() { (I64, I64X2, 52, 0x7ff) } else { (I32, I32X4, 23, 0xff) };
        Shape { t: if JitEmit::is_scalar(fmt) { element } else { vector }, element, mantissa, most }
    }

    fn infinity(self) -> u64 {
        self.most << self.mantissa
    }

    fn smallest_normal(self) -> u64 {
        1 << self.mantissa
    }
}

/// Which zeros and smallest numbers an operation makes exactly.
#[derive(Clone, Copy)]
enum Exact {
    /// All: sums.
    Always,
    /// Zeros from a first operand, or a second, that is one.
    Either,
    /// Zeros from a first operand that is one.
    First,
    /// Zeros from either factor, or where something is added.
    Fused,
}

impl JitEmit<'_> {
    /// Whether operations need their guards on this host.
    pub(super) fn guarded() -> bool {
        Host::this().unit == Unit::Regular
    }

    /// Makes sure of operands and result of an operation; `args` are vectors, the others what it works on.
    pub(super) fn guard(&mut self, op: FpCall, args: &[Value], operands: &[Value], r: Value) {
        if !Self::guarded() {
            return;
        }
        match op {
            FpCall::Arith(FpOp::Sqrt, fmt) => self.guard_root(fmt, operands[1]),
            FpCall::Arith(FpOp::Min | FpOp::Max, fmt) | FpCall::Compare(fmt, _) => self.guard_numbers(fmt, operands),
            FpCall::Arith(op, fmt) => {
                let exact = match op {
                    FpOp::Add | FpOp::Sub => Exact::Always,
                    FpOp::Mul => Exact::Either,
                    _ => Exact::First,
                };
                self.guard_result(fmt, args, operands, r, exact);
            }
            FpCall::Fused(_, fmt) => self.guard_result(fmt, args, operands, r, Exact::Fused),
            FpCall::Convert(op) => self.guard_conversion(op, operands[0], r),
            FpCall::Round(..) | FpCall::Dot(..) | FpCall::ToHalf(_) => {}
        }
    }

    /// Compares vectors of which it is known that they are numbers: then half of the predicates are the others' opposites.
    /// (Cranelift has no form of some of them on AArch64.)
    pub(super) fn compare_numbers(&mut self, x: Value, y: Value, predicate: u8) -> Value {
        let cc = match predicate & 3 {
            0 => FloatCC::Equal,
            1 => FloatCC::LessThan,
            2 => FloatCC::LessThanOrEqual,
            // Unordered: never, which equal and less are not at once.
            _ => FloatCC::Equal,
        };
        let mut mask = self.b.ins().fcmp(cc, x, y);
        if predicate & 3 == 3 {
            let less = self.b.ins().fcmp(FloatCC::LessThan, x, y);
            mask = self.b.ins().band(mask, less);
        }
        if predicate & 4 != 0 { self.b.ins().bnot(mask) } else { mask }
    }

    /// Numbers, not NaNs, and none of them denormal.
    pub(super) fn guard_numbers(&mut self, fmt: FpFmt, operands: &[Value]) {
        if !Self::guarded() {
            return;
        }
        let shape = Shape::of(fmt);
        let mut outside = |&x: &Value| {
            let e = self.exponent(shape, x);
            (x, self.outside(shape, e, 1, shape.most - 1))
        };
        let each: Vec<(Value, Value)> = operands.iter().map(&mut outside).collect();
        let Some(odd) = each.iter().map(|(_, odd)| *odd).reduce(|a, b| self.b.ins().bor(a, b)) else { return };
        self.unless(shape, odd, |e| {
            let good = |(x, odd): (Value, Value)| {
                let (special, inside) = (e.is_zero_or_infinite(shape, x), e.not(shape, odd));
                e.b.ins().bor(special, inside)
            };
            let good: Vec<Value> = each.into_iter().map(good).collect();
            // There is one at least, as something is odd.
            good.into_iter().reduce(|a, b| e.b.ins().band(a, b)).unwrap_or(odd)
        });
    }

    /// A positive number, or a zero; a denormal one is noted.
    fn guard_root(&mut self, fmt: FpFmt, x: Value) {
        let shape = Shape::of(fmt);
        let bits = self.integers(shape, x);
        // With the sign, so that what is negative is beyond all.
        let e = self.shifted(shape, bits, 0, shape.mantissa);
        let odd = self.outside(shape, e, 1, shape.most - 1);
        // An infinity below zero is odd, too, and no number's root.
        self.unless(shape, odd, |e| {
            let infinity = e.number(shape, shape.infinity());
            let infinite = e.b.ins().icmp(IntCC::Equal, bits, infinity);
            let zero = e.is_zero(shape, x);
            e.b.ins().bor(zero, infinite)
        });
    }

    /// Operands that are not denormal, and a result that is normal, or zero where that is exact.
    fn guard_result(&mut self, fmt: FpFmt, args: &[Value], operands: &[Value], r: Value, exact: Exact) {
        let shape = Shape::of(fmt);
        // The lowest numbers may have been rounded up from what is tiny.
        let e = self.exponent(shape, r);
        let mut odd = self.outside(shape, e, 2, shape.most - 2);
        let mut unknown = Vec::new();
        for (&arg, &x) in args.iter().zip(operands) {
            if self.is_regular(arg, fmt) || unknown.contains(&x) {
                continue;
            }
            unknown.push(x);
            let e = self.exponent(shape, x);
            let outside = self.outside(shape, e, 1, shape.most - 1);
            odd = self.b.ins().bor(odd, outside);
        }
        self.seen_regular.extend(args.iter().map(|&arg| (arg, fmt)));
        self.unless(shape, odd, |e| {
            let zero = e.is_zero(shape, r);
            let zero = match exact {
                Exact::Always => zero,
                Exact::First => {
                    let first = e.is_zero(shape, operands[0]);
                    e.b.ins().band(zero, first)
                }
                Exact::Either | Exact::Fused => {
                    let (a, b) = (e.is_zero(shape, operands[0]), e.is_zero(shape, operands[1]));
                    let mut from = e.b.ins().bor(a, b);
                    if let Exact::Fused = exact {
                        let none = e.is_zero(shape, operands[2]);
                        let added = e.not(shape, none);
                        from = e.b.ins().bor(from, added);
                    }
                    e.b.ins().band(zero, from)
                }
            };
            // Above the smallest normal number, and finite.
            let size = e.magnitude(shape, r);
            let low = e.number(shape, shape.smallest_normal());
            let above = e.b.ins().icmp(IntCC::SignedGreaterThan, size, low);
            let infinity = e.number(shape, shape.infinity());
            let finite = e.b.ins().icmp(IntCC::SignedLessThan, size, infinity);
            let normal = e.b.ins().band(above, finite);
            let mut fine = e.b.ins().bor(zero, normal);
            for x in unknown {
                let size = e.magnitude(shape, x);
                let least = e.number(shape, shape.smallest_normal());
                let normal = e.b.ins().icmp(IntCC::SignedGreaterThanOrEqual, size, least);
                let zero = e.is_zero(shape, x);
                let not_denormal = e.b.ins().bor(normal, zero);
                fine = e.b.ins().band(fine, not_denormal);
            }
            fine
        });
    }

    /// Between the formats, whatever the other has no normal number for is left alone; what integers become is exact or
    /// noted as inexact.
    fn guard_conversion(&mut self, op: CvtOp, x: Value, r: Value) {
        // Single precision's normal numbers are these in double precision: all of them, and those of which none becomes
        // tiny or infinite.
        const WIDENED: (u64, u64) = (1023 - 126, 254);
        const NARROWED: (u64, u64) = (1023 - 125, 252);
        let (fmt, of, (low, count)) = match op {
            CvtOp::Cvtss2sd => (FpFmt::Sd, r, WIDENED),
            CvtOp::Cvtps2pd => (FpFmt::Pd, r, WIDENED),
            CvtOp::Cvtsd2ss => (FpFmt::Sd, x, NARROWED),
            CvtOp::Cvtpd2ps => (FpFmt::Pd, x, NARROWED),
            _ => return,
        };
        let shape = Shape::of(fmt);
        let e = self.exponent(shape, of);
        let odd = self.outside(shape, e, low, count);
        self.unless(shape, odd, |e| e.is_zero_or_infinite(shape, of));
    }

    /// Leaves the region where a lane is odd that is not among those that `fine` finds nothing wrong with.
    fn unless(&mut self, shape: Shape, odd: Value, fine: impl FnOnce(&mut Self) -> Value) {
        let any = self.any(shape, odd);
        let (look, go_on) = (self.b.create_block(), self.b.create_block());
        self.b.set_cold_block(look);
        self.b.ins().brif(any, look, &[], go_on, &[]);
        self.b.switch_to_block(look);
        let fine = fine(self);
        let not_fine = self.not(shape, fine);
        let wrong = self.b.ins().band(odd, not_fine);
        let wrong = self.any(shape, wrong);
        self.side_exit_if(wrong);
        self.b.ins().jump(go_on, &[]);
        self.b.switch_to_block(go_on);
    }

    // ---- lanes as integers ----

    fn integers(&mut self, shape: Shape, x: Value) -> Value {
        if shape.t == shape.element {
            self.b.ins().bitcast(shape.t, MemFlagsData::new(), x)
        } else {
            self.lanes(x, shape.t)
        }
    }

    fn number(&mut self, shape: Shape, n: u64) -> Value {
        let n = self.b.ins().iconst(shape.element, n as i64);
        if shape.t == shape.element { n } else { self.b.ins().splat(shape.t, n) }
    }

    /// Shifted to the left, and then to the right with zeros.
    fn shifted(&mut self, shape: Shape, x: Value, left: u32, right: u32) -> Value {
        let mut x = x;
        if left != 0 {
            let n = self.b.ins().iconst(I32, i64::from(left));
            x = self.b.ins().ishl(x, n);
        }
        let n = self.b.ins().iconst(I32, i64::from(right));
        debug_assert!(right < shape.element.bits());
        self.b.ins().ushr(x, n)
    }

    fn exponent(&mut self, shape: Shape, x: Value) -> Value {
        let x = self.integers(shape, x);
        self.shifted(shape, x, 1, shape.mantissa + 1)
    }

    /// Without the sign.
    fn magnitude(&mut self, shape: Shape, x: Value) -> Value {
        let x = self.integers(shape, x);
        self.shifted(shape, x, 1, 1)
    }

    /// Which lanes are not among the `count` numbers from `low` on.
    fn outside(&mut self, shape: Shape, x: Value, low: u64, count: u64) -> Value {
        let low = self.number(shape, low);
        let above = self.b.ins().isub(x, low);
        let count = self.number(shape, count);
        self.b.ins().icmp(IntCC::UnsignedGreaterThanOrEqual, above, count)
    }

    fn is_zero(&mut self, shape: Shape, x: Value) -> Value {
        let size = self.magnitude(shape, x);
        let zero = self.number(shape, 0);
        self.b.ins().icmp(IntCC::Equal, size, zero)
    }

    fn is_zero_or_infinite(&mut self, shape: Shape, x: Value) -> Value {
        let zero = self.is_zero(shape, x);
        let size = self.magnitude(shape, x);
        let infinity = self.number(shape, shape.infinity());
        let infinite = self.b.ins().icmp(IntCC::Equal, size, infinity);
        self.b.ins().bor(zero, infinite)
    }

    fn not(&mut self, shape: Shape, mask: Value) -> Value {
        if shape.t == shape.element { self.b.ins().icmp_imm_u(IntCC::Equal, mask, 0) } else { self.b.ins().bnot(mask) }
    }

    fn any(&mut self, shape: Shape, mask: Value) -> Value {
        if shape.t == shape.element { mask } else { self.b.ins().vany_true(mask) }
    }

    // ---- what is known of values ----

    /// Notes that the elements of a vector that a format names are no denormals.
    pub(super) fn note_regular(&mut self, x: Value, fmt: FpFmt) {
        if Self::guarded() {
            self.regular.insert((x, fmt));
        }
    }

    fn is_regular(&self, x: Value, fmt: FpFmt) -> bool {
        let whole = match fmt {
            FpFmt::Ss => FpFmt::Ps,
            FpFmt::Sd => FpFmt::Pd,
            packed => packed,
        };
        [fmt, whole].iter().any(|&f| self.regular.contains(&(x, f)) || self.seen_regular.contains(&(x, f)))
    }
}
