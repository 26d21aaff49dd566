//! The arithmetic flags in their lazy form ([`crate::state::CpuState`]), written once for both evaluators.

use crate::emit::{Bin, Cmp, Cond, Emit, Flags, Un};
use crate::state::flag;
use crate::width::{W8, W16, W32, W64, Width};

/// The lazy words (`cc_z`, `cc_sp`, `cc_co`) after an operation of width `W`.
#[inline(always)]
pub fn materialise<E: Emit, W: Width>(e: &mut E, f: Flags<E::V>) -> (E::V, E::V, E::V) {
    match f {
        Flags::Add { a, b, r } => {
            // Carry out of each bit: both addends set, or one of them and no sum bit.
            let both = e.and::<W>(a, b);
            let either = e.or::<W>(a, b);
            let not_r = e.un::<W>(Un::Not, r);
            let through = e.and::<W>(either, not_r);
            let carries = e.or::<W>(both, through);
            with_carries::<E, W>(e, r, carries)
        }
        Flags::Sub { a, b, r } | Flags::Cmp { a, b, r } => {
            let borrows = borrows::<E, W>(e, a, b, r);
            with_carries::<E, W>(e, r, borrows)
        }
        Flags::Logic { r } => {
            let r = e.sext::<W, W64>(r);
            let co = e.imm::<W64>(0);
            (r, r, co)
        }
        Flags::Inc { a, r } => {
            // Adding 1 carries through the low ones: carry out of bit i is `a & ~r`.
            let not_r = e.un::<W>(Un::Not, r);
            let carries = e.and::<W>(a, not_r);
            keep_carry::<E, W>(e, r, carries)
        }
        Flags::Dec { a, r } => {
            let not_a = e.un::<W>(Un::Not, a);
            let borrows = e.and::<W>(not_a, r);
            keep_carry::<E, W>(e, r, borrows)
        }
        Flags::Shift { op, a, n, r } => {
            let cf = shifted_out::<E, W>(e, op, a, n);
            // The rule for a count of 1, which processors follow for all.
            let of = match op {
                Bin::Shl => {
                    let sign = e.bit::<W>(r, W::BITS - 1);
                    e.xor::<W8>(cf, sign)
                }
                Bin::Shr => e.bit::<W>(a, W::BITS - 1),
                _ => e.imm::<W8>(0),
            };
            let r = e.sext::<W, W64>(r);
            let co = carry_overflow(e, cf, of);
            (r, r, co)
        }
        Flags::Result { r, cf, of } => {
            let r = e.sext::<W, W64>(r);
            let co = carry_overflow(e, cf, of);
            (r, r, co)
        }
        Flags::CfOf { cf, of } => {
            let (z, sp, old) = e.flags_raw();
            let af = e.bin_imm::<W64>(Bin::And, old, 8);
            let co = carry_overflow(e, cf, of);
            (z, sp, e.or::<W64>(co, af))
        }
        Flags::Cf { cf } => {
            let (z, sp, old) = e.flags_raw();
            let of = overflow_of(e, old);
            let af = e.bin_imm::<W64>(Bin::And, old, 8);
            let co = carry_overflow(e, cf, of);
            (z, sp, e.or::<W64>(co, af))
        }
        Flags::Zf { zf } => {
            let (_, sp, co) = e.flags_raw();
            let z = e.bin_imm::<W8>(Bin::Xor, zf, 1);
            (e.zext::<W8, W64>(z), sp, co)
        }
        Flags::Ordered { less, equal } => {
            let z = e.bin_imm::<W8>(Bin::Xor, equal, 1);
            let z = e.zext::<W8, W64>(z);
            let odd = e.imm::<W64>(1);
            let zero = e.imm::<W8>(0);
            let co = carry_overflow(e, less, zero);
            (z, odd, co)
        }
        Flags::Raw { z, sp, co } => (z, sp, co),
    }
}

/// As [`materialise`], of operands of so many bytes.
pub fn materialise_sized<E: Emit>(e: &mut E, f: Flags<E::V>, bytes: u64) -> (E::V, E::V, E::V) {
    match bytes {
        1 => materialise::<E, W8>(e, f),
        2 => materialise::<E, W16>(e, f),
        4 => materialise::<E, W32>(e, f),
        _ => materialise::<E, W64>(e, f),
    }
}

/// The borrow out of each bit of `r = a - b (- borrow)`.
#[inline(always)]
fn borrows<E: Emit, W: Width>(e: &mut E, a: E::V, b: E::V, r: E::V) -> E::V {
    let not_a = e.un::<W>(Un::Not, a);
    let fresh = e.and::<W>(not_a, b);
    let either = e.or::<W>(not_a, b);
    let through = e.and::<W>(either, r);
    e.or::<W>(fresh, through)
}

/// Result and carry vector of width `W` in the lazy form.
#[inline(always)]
fn with_carries<E: Emit, W: Width>(e: &mut E, r: E::V, carries: E::V) -> (E::V, E::V, E::V) {
    let r = e.sext::<W, W64>(r);
    let carries = e.zext::<W, W64>(carries);
    if W::BITS == 64 {
        return (r, r, carries);
    }
    let top = e.bin_imm::<W64>(Bin::Shl, carries, u64::from(64 - W::BITS));
    let af = e.bin_imm::<W64>(Bin::And, carries, 8);
    (r, r, e.or::<W64>(top, af))
}

/// As [`with_carries`], but CF stays what it was while OF is that of the operation.
#[inline(always)]
fn keep_carry<E: Emit, W: Width>(e: &mut E, r: E::V, carries: E::V) -> (E::V, E::V, E::V) {
    let (z, sp, fresh) = with_carries::<E, W>(e, r, carries);
    let (_, _, old) = e.flags_raw();
    // Bits 63 and 62 of the new word are CF' and CF' ^ OF'. With bit 63 replaced by the old CF, bit 62 must be
    // CF ^ OF': flip it together with bit 63 where the two carries differ.
    let differ = e.xor::<W64>(old, fresh);
    let differ = e.bin_imm::<W64>(Bin::Sar, differ, 63);
    let flip = e.bin_imm::<W64>(Bin::And, differ, 3 << 62);
    (z, sp, e.xor::<W64>(fresh, flip))
}

/// The `cc_co` word with the given CF and OF (0/1 bytes) and AF clear.
#[inline(always)]
fn carry_overflow<E: Emit>(e: &mut E, cf: E::V, of: E::V) -> E::V {
    let mixed = e.xor::<W8>(cf, of);
    let cf = e.zext::<W8, W64>(cf);
    let cf = e.bin_imm::<W64>(Bin::Shl, cf, 63);
    let mixed = e.zext::<W8, W64>(mixed);
    let mixed = e.bin_imm::<W64>(Bin::Shl, mixed, 62);
    e.or::<W64>(cf, mixed)
}

#[inline(always)]
fn overflow_of<E: Emit>(e: &mut E, co: E::V) -> E::V {
    let shifted = e.bin_imm::<W64>(Bin::Shl, co, 1);
    let of = e.xor::<W64>(co, shifted);
    e.bit::<W64>(of, 63)
}

/// CF as a boolean.
#[inline(always)]
pub fn carry<E: Emit>(e: &mut E) -> E::V {
    e.cond(Cond::B)
}

/// The six arithmetic flags where RFLAGS has them, as a 64-bit value.
pub fn status<E: Emit>(e: &mut E) -> E::V {
    let (z, sp, co) = e.flags_raw();
    let cf = e.bin_imm::<W64>(Bin::Shr, co, 63);
    let low = e.zext::<W64, W8>(sp);
    let ones = e.un::<W8>(Un::Popcnt, low);
    let even = e.bin_imm::<W8>(Bin::Xor, ones, 1);
    let even = e.bin_imm::<W8>(Bin::And, even, 1);
    let zero = e.is_zero::<W64>(z);
    let overflow = overflow_of(e, co);
    let mut all = cf;
    for (flag, n) in [(even, 2), (zero, 6), (overflow, 11)] {
        let flag = e.zext::<W8, W64>(flag);
        let flag = e.bin_imm::<W64>(Bin::Shl, flag, n);
        all = e.or::<W64>(all, flag);
    }
    let af = e.bin_imm::<W64>(Bin::Shl, co, 1);
    let af = e.bin_imm::<W64>(Bin::And, af, flag::AF);
    let sf = e.bin_imm::<W64>(Bin::Shr, sp, 56);
    let sf = e.bin_imm::<W64>(Bin::And, sf, flag::SF);
    let all = e.or::<W64>(all, af);
    e.or::<W64>(all, sf)
}

/// A condition code from the lazy words.
#[inline(always)]
pub fn condition<E: Emit>(e: &mut E, c: Cond) -> E::V {
    let (z, sp, co) = e.flags_raw();
    let positive = match c {
        Cond::O | Cond::No => overflow_of(e, co),
        Cond::B | Cond::Ae => e.bit::<W64>(co, 63),
        Cond::E | Cond::Ne => e.is_zero::<W64>(z),
        Cond::Be | Cond::A => {
            let cf = e.bit::<W64>(co, 63);
            let zf = e.is_zero::<W64>(z);
            e.or::<W8>(cf, zf)
        }
        Cond::S | Cond::Ns => e.bit::<W64>(sp, 63),
        Cond::P | Cond::Np => {
            let low = e.zext::<W64, W8>(sp);
            let ones = e.un::<W8>(Un::Popcnt, low);
            let odd = e.bin_imm::<W8>(Bin::And, ones, 1);
            e.bin_imm::<W8>(Bin::Xor, odd, 1)
        }
        Cond::L | Cond::Ge => less(e, sp, co),
        Cond::Le | Cond::G => {
            let less = less(e, sp, co);
            let zf = e.is_zero::<W64>(z);
            e.or::<W8>(less, zf)
        }
    };
    if c as u8 & 1 == 0 { positive } else { e.bin_imm::<W8>(Bin::Xor, positive, 1) }
}

/// SF ≠ OF.
#[inline(always)]
fn less<E: Emit>(e: &mut E, sp: E::V, co: E::V) -> E::V {
    let shifted = e.bin_imm::<W64>(Bin::Shl, co, 1);
    let of = e.xor::<W64>(co, shifted);
    let mixed = e.xor::<W64>(of, sp);
    e.bit::<W64>(mixed, 63)
}

/// CF of a shift by a constant: the bit that fell out last.
#[inline(always)]
fn shifted_out<E: Emit, W: Width>(e: &mut E, op: Bin, a: E::V, n: u32) -> E::V {
    e.bit::<W>(a, if op == Bin::Shl { W::BITS - n } else { n - 1 })
}

/// Whether `a == b` or, if `not`, differs.
#[inline(always)]
fn equal<E: Emit, W: Width>(e: &mut E, a: E::V, b: E::V, not: bool) -> E::V {
    e.cmp::<W>(if not { Cmp::Ne } else { Cmp::Eq }, a, b)
}

/// The condition straight from the operands of a comparison, where that is possible: what lets a compiler fuse
/// CMP/TEST with the branch behind it.
#[inline(always)]
pub fn fused<E: Emit, W: Width>(e: &mut E, f: &Flags<E::V>, c: Cond) -> Option<E::V> {
    let not = c as u8 & 1 != 0;
    let base = Cond::from_bits(c as u8 & !1);
    let either = |positive, negative| if not { negative } else { positive };
    // Comparisons, which have their opposites.
    let compared = match (*f, base) {
        (Flags::Cmp { a, b, .. }, Cond::E) => Some(equal::<E, W>(e, a, b, not)),
        (Flags::Cmp { a, b, .. }, Cond::B) => Some(e.cmp::<W>(either(Cmp::Ltu, Cmp::Geu), a, b)),
        (Flags::Cmp { a, b, .. }, Cond::L) => Some(e.cmp::<W>(either(Cmp::Lts, Cmp::Ges), a, b)),
        // a ≤ b is b ≥ a.
        (Flags::Cmp { a, b, .. }, Cond::Be) => Some(e.cmp::<W>(either(Cmp::Geu, Cmp::Ltu), b, a)),
        (Flags::Cmp { a, b, .. }, Cond::Le) => Some(e.cmp::<W>(either(Cmp::Ges, Cmp::Lts), b, a)),
        (
            Flags::Logic { r }
            | Flags::Add { r, .. }
            | Flags::Sub { r, .. }
            | Flags::Inc { r, .. }
            | Flags::Dec { r, .. }
            | Flags::Shift { r, .. }
            | Flags::Result { r, .. },
            Cond::E,
        )
        | (Flags::Logic { r }, Cond::Be) => {
            let zero = e.imm::<W>(0);
            Some(equal::<E, W>(e, r, zero, not))
        }
        (
            Flags::Logic { r }
            | Flags::Add { r, .. }
            | Flags::Sub { r, .. }
            | Flags::Cmp { r, .. }
            | Flags::Inc { r, .. }
            | Flags::Dec { r, .. }
            | Flags::Shift { r, .. }
            | Flags::Result { r, .. },
            Cond::S,
        )
        | (Flags::Logic { r }, Cond::L) => {
            let zero = e.imm::<W>(0);
            Some(e.cmp::<W>(either(Cmp::Lts, Cmp::Ges), r, zero))
        }
        (Flags::Logic { r }, Cond::Le) => {
            let one = e.imm::<W>(1);
            Some(e.cmp::<W>(either(Cmp::Lts, Cmp::Ges), r, one))
        }
        _ => None,
    };
    if compared.is_some() {
        return compared;
    }
    // Booleans.
    let positive = match (*f, base) {
        (Flags::Logic { .. }, Cond::B | Cond::O) => e.imm::<W8>(0),
        (Flags::Ordered { less, .. }, Cond::B) => less,
        (Flags::Ordered { equal, .. }, Cond::E) => equal,
        (Flags::Ordered { less, equal }, Cond::Be) => e.or::<W8>(less, equal),
        (Flags::Ordered { .. }, Cond::P) => e.imm::<W8>(0),
        (Flags::Shift { op, a, n, .. }, Cond::B) => shifted_out::<E, W>(e, op, a, n),
        (Flags::Result { cf, .. } | Flags::CfOf { cf, .. } | Flags::Cf { cf }, Cond::B) => cf,
        (Flags::Result { of, .. } | Flags::CfOf { of, .. }, Cond::O) => of,
        _ => return None,
    };
    Some(if not { e.bin_imm::<W8>(Bin::Xor, positive, 1) } else { positive })
}

/// As [`fused`], of operands of so many bytes.
pub fn fused_sized<E: Emit>(e: &mut E, f: &Flags<E::V>, c: Cond, bytes: u64) -> Option<E::V> {
    match bytes {
        1 => fused::<E, W8>(e, f, c),
        2 => fused::<E, W16>(e, f, c),
        4 => fused::<E, W32>(e, f, c),
        _ => fused::<E, W64>(e, f, c),
    }
}

impl Cond {
    /// The condition with encoding `bits` (low four).
    pub fn from_bits(bits: u8) -> Cond {
        use Cond::*;
        const ALL: [Cond; 16] = [O, No, B, Ae, E, Ne, Be, A, S, Ns, P, Np, L, Ge, Le, G];
        ALL[usize::from(bits & 15)]
    }
}
