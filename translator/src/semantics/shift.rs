//! Shifts and rotates (SDM vol. 1 §5.1.5): SHL, SHR, SAR, ROL, ROR, RCL, RCR, SHLD, SHRD and the flagless SHLX,
//! SHRX, SARX, RORX.
//!
//! Counts are taken modulo 32 (64 for 64-bit operands) and a count of 0 leaves the flags alone. Where the manual
//! leaves OF undefined (counts above 1) it is computed by the rule for a count of 1, as processors do.

use iced_x86::Mnemonic;

use crate::cpu::Cpu;
use crate::emit::{Bin, Emit, Flags};
use crate::exception::Trap;
use crate::flags;
use crate::insn::{Insn, Opnd};
use crate::semantics::{Form, Sem, interp, sized};
use crate::state::flag;
use crate::width::{W8, W16, W32, W64, Width};

/// The group's semantics.
pub fn lookup(form: &Form<'_>) -> Option<&'static Sem> {
    Some(match form.instr.mnemonic() {
        Mnemonic::Shl | Mnemonic::Sal => sized!(form.bytes, shl),
        Mnemonic::Shr => sized!(form.bytes, shr),
        Mnemonic::Sar => sized!(form.bytes, sar),
        Mnemonic::Rol => sized!(form.bytes, rol),
        Mnemonic::Ror => sized!(form.bytes, ror),
        Mnemonic::Rcl => interp!(rcl),
        Mnemonic::Rcr => interp!(rcr),
        Mnemonic::Shld => sized!(form.bytes, shld),
        Mnemonic::Shrd => sized!(form.bytes, shrd),
        Mnemonic::Shlx => sized!(form.bytes, shlx),
        Mnemonic::Shrx => sized!(form.bytes, shrx),
        Mnemonic::Sarx => sized!(form.bytes, sarx),
        Mnemonic::Rorx => sized!(form.bytes, rorx),
        _ => return None,
    })
}

/// A shift count.
enum Count<V> {
    /// An immediate, masked.
    Fixed(u64),
    /// CL, masked, as a 64-bit value.
    Variable(V),
}

/// The mask that counts of width `W` are taken by.
fn count_mask<W: Width>() -> u64 {
    if W::BITS == 64 { 63 } else { 31 }
}

#[inline(always)]
fn count<E: Emit, W: Width>(e: &mut E, i: &Insn, n: usize) -> Count<E::V> {
    match i.op[n] {
        Opnd::Imm => Count::Fixed(i.imm & count_mask::<W>()),
        Opnd::None => Count::Fixed(1),
        _ => {
            let cl = e.gpr::<W64>(crate::state::gpr::RCX);
            Count::Variable(e.bin_imm::<W64>(Bin::And, cl, count_mask::<W>()))
        }
    }
}

/// Result, CF and OF (booleans) of a shift by a 64-bit count `n` from 1 to the count mask.
type Shifted<V> = (V, V, V);

/// Shifts operand 0: the flags of a zero count are the old ones.
#[inline(always)]
fn shift<E: Emit, W: Width>(
    e: &mut E,
    i: &Insn,
    n: usize,
    keeps_zsp: bool,
    f: impl Fn(&mut E, E::V, E::V) -> Shifted<E::V>,
) -> Result<(), E::Trap> {
    let record = |r, cf, of| if keeps_zsp { Flags::CfOf { cf, of } } else { Flags::Result { r, cf, of } };
    match count::<E, W>(e, i, n) {
        Count::Fixed(0) => e.modify::<W>(i, 0, |_, a| (a, None)),
        Count::Fixed(k) => {
            let k = e.imm::<W64>(k);
            e.modify::<W>(i, 0, |e, a| {
                let (r, cf, of) = f(e, a, k);
                (r, Some(record(r, cf, of)))
            })
        }
        Count::Variable(k) => {
            let old = e.flags_raw();
            e.modify::<W>(i, 0, |e, a| {
                let (shifted, cf, of) = f(e, a, k);
                let zero = e.is_zero::<W64>(k);
                let r = e.select::<W>(zero, a, shifted);
                let new = flags::materialise::<E, W>(e, record(shifted, cf, of));
                let z = e.select::<W64>(zero, old.0, new.0);
                let sp = e.select::<W64>(zero, old.1, new.1);
                let co = e.select::<W64>(zero, old.2, new.2);
                (r, Some(Flags::Raw { z, sp, co }))
            })
        }
    }
}

/// Bit 63 of a 64-bit value.
#[inline(always)]
fn top<E: Emit>(e: &mut E, v: E::V) -> E::V {
    e.bit::<W64>(v, 63)
}

/// A shift by a constant that leaves something of the operand, if this is one, or one that the evaluator has itself.
#[inline(always)]
fn directly<E: Emit, W: Width>(e: &mut E, i: &Insn, op: Bin) -> Option<Result<(), E::Trap>> {
    let n = match count::<E, W>(e, i, 1) {
        Count::Fixed(n) if (1..u64::from(W::BITS)).contains(&n) => n,
        Count::Variable(n) if E::SHIFTS && W::BITS >= 32 => {
            return Some(e.modify::<W>(i, 0, |e, a| (e.shift_by::<W>(op, a, n).unwrap_or(a), None)));
        }
        _ => return None,
    };
    Some(e.modify::<W>(i, 0, |e, a| {
        let r = e.bin_imm::<W>(op, a, n);
        (r, Some(Flags::Shift { op, a, n: n as u32, r }))
    }))
}

#[inline(always)]
fn shl<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    if let Some(done) = directly::<E, W>(e, i, Bin::Shl) {
        return done;
    }
    shift::<E, W>(e, i, 1, false, |e, a, k| {
        // In a 64-bit word whose top holds the operand, the last bit shifted out is the top one before the last step.
        let wide = e.zext::<W, W64>(a);
        let up = e.bin_imm::<W64>(Bin::Shl, wide, u64::from(64 - W::BITS));
        let before = e.bin_imm::<W64>(Bin::Sub, k, 1);
        let nearly = e.bin::<W64>(Bin::Shl, up, before);
        let cf = top(e, nearly);
        let all = e.bin_imm::<W64>(Bin::Shl, nearly, 1);
        let sign = top(e, all);
        let of = e.xor::<W8>(cf, sign);
        let r = e.bin_imm::<W64>(Bin::Shr, all, u64::from(64 - W::BITS));
        (e.zext::<W64, W>(r), cf, of)
    })
}

/// The common half of SHR and SAR: `wide` shifted right, and the last bit that fell out.
#[inline(always)]
fn right<E: Emit, W: Width>(e: &mut E, op: Bin, wide: E::V, k: E::V) -> (E::V, E::V) {
    let before = e.bin_imm::<W64>(Bin::Sub, k, 1);
    let nearly = e.bin::<W64>(op, wide, before);
    let cf = e.bit::<W64>(nearly, 0);
    let r = e.bin_imm::<W64>(op, nearly, 1);
    (e.zext::<W64, W>(r), cf)
}

#[inline(always)]
fn shr<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    if let Some(done) = directly::<E, W>(e, i, Bin::Shr) {
        return done;
    }
    shift::<E, W>(e, i, 1, false, |e, a, k| {
        let wide = e.zext::<W, W64>(a);
        let (r, cf) = right::<E, W>(e, Bin::Shr, wide, k);
        let of = e.bit::<W>(a, W::BITS - 1);
        (r, cf, of)
    })
}

#[inline(always)]
fn sar<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    if let Some(done) = directly::<E, W>(e, i, Bin::Sar) {
        return done;
    }
    shift::<E, W>(e, i, 1, false, |e, a, k| {
        let wide = e.sext::<W, W64>(a);
        let (r, cf) = right::<E, W>(e, Bin::Sar, wide, k);
        let of = e.imm::<W8>(0);
        (r, cf, of)
    })
}

fn rol<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    shift::<E, W>(e, i, 1, true, |e, a, k| {
        let k = e.zext::<W64, W>(k);
        let r = e.bin::<W>(Bin::Rotl, a, k);
        let cf = e.bit::<W>(r, 0);
        let sign = e.bit::<W>(r, W::BITS - 1);
        let of = e.xor::<W8>(cf, sign);
        (r, cf, of)
    })
}

fn ror<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    shift::<E, W>(e, i, 1, true, |e, a, k| {
        let k = e.zext::<W64, W>(k);
        let r = e.bin::<W>(Bin::Rotr, a, k);
        let cf = e.bit::<W>(r, W::BITS - 1);
        let below = e.bit::<W>(r, W::BITS - 2);
        let of = e.xor::<W8>(cf, below);
        (r, cf, of)
    })
}

/// RCL and RCR: a rotate of width+1 bits through CF, a bit at a time.
fn rotate_carry(cpu: &mut Cpu, i: &Insn, left: bool) -> Result<(), Trap> {
    match i.osize {
        1 => rotate_carry_of::<W8>(cpu, i, left),
        2 => rotate_carry_of::<W16>(cpu, i, left),
        4 => rotate_carry_of::<W32>(cpu, i, left),
        _ => rotate_carry_of::<W64>(cpu, i, left),
    }
}

fn rotate_carry_of<W: Width>(cpu: &mut Cpu, i: &Insn, left: bool) -> Result<(), Trap> {
    let (Count::Fixed(k) | Count::Variable(k)) = count::<Cpu, W>(cpu, i, 1);
    let status = cpu.s.flags();
    cpu.modify::<W>(i, 0, |_, a| {
        let mut cf = status & flag::CF;
        let mut r = a;
        for _ in 0..k % u64::from(W::BITS + 1) {
            if left {
                let out = r >> (W::BITS - 1) & 1;
                r = W::zext(r << 1 | cf);
                cf = out;
            } else {
                let out = r & 1;
                r = r >> 1 | cf << (W::BITS - 1);
                cf = out;
            }
        }
        if k == 0 {
            return (a, None);
        }
        let sign = r >> (W::BITS - 1) & 1;
        let of = if left { sign ^ cf } else { sign ^ (r >> (W::BITS - 2) & 1) };
        (r, Some(Flags::CfOf { cf, of }))
    })
}

fn rcl(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    rotate_carry(cpu, i, true)
}

fn rcr(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    rotate_carry(cpu, i, false)
}

/// SHLD and SHRD. A 16-bit operand with a count above 16 is undefined; it is done on the doubled operand, as AMD and
/// Intel processors do.
#[inline(always)]
fn double<E: Emit, W: Width>(e: &mut E, i: &Insn, left: bool) -> Result<(), E::Trap> {
    let b = e.read::<W>(i, 1)?;
    shift::<E, W>(e, i, 2, false, |e, a, k| {
        let bits = u64::from(W::BITS);
        let before = e.bin_imm::<W64>(Bin::Sub, k, 1);
        let r;
        let cf;
        if W::BITS == 64 {
            let size = e.imm::<W64>(bits);
            let rest = e.sub::<W64>(size, k);
            let (op, back) = if left { (Bin::Shl, Bin::Shr) } else { (Bin::Shr, Bin::Shl) };
            let kept = e.bin::<W64>(op, a, k);
            let filled = e.bin::<W64>(back, b, rest);
            r = e.or::<W64>(kept, filled);
            let nearly = e.bin::<W64>(op, a, before);
            cf = e.bit::<W64>(nearly, if left { 63 } else { 0 });
        } else {
            // The two operands (a 16-bit one: a:b:a) in one 64-bit word.
            let (wa, wb) = (e.zext::<W, W64>(a), e.zext::<W, W64>(b));
            let (high, low) = if left { (wa, wb) } else { (wb, wa) };
            let high = e.bin_imm::<W64>(Bin::Shl, high, bits);
            let mut word = e.or::<W64>(high, low);
            if left {
                word = e.bin_imm::<W64>(Bin::Shl, word, 64 - 2 * bits);
                if W::BITS == 16 {
                    let again = e.bin_imm::<W64>(Bin::Shl, wa, 16);
                    word = e.or::<W64>(word, again);
                }
                let nearly = e.bin::<W64>(Bin::Shl, word, before);
                cf = e.bit::<W64>(nearly, 63);
                let all = e.bin_imm::<W64>(Bin::Shl, nearly, 1);
                let cut = e.bin_imm::<W64>(Bin::Shr, all, 64 - bits);
                r = e.zext::<W64, W>(cut);
            } else {
                if W::BITS == 16 {
                    let again = e.bin_imm::<W64>(Bin::Shl, wa, 32);
                    word = e.or::<W64>(word, again);
                }
                let nearly = e.bin::<W64>(Bin::Shr, word, before);
                cf = e.bit::<W64>(nearly, 0);
                let all = e.bin_imm::<W64>(Bin::Shr, nearly, 1);
                r = e.zext::<W64, W>(all);
            }
        }
        let changed = e.xor::<W>(r, a);
        let of = e.bit::<W>(changed, W::BITS - 1);
        (r, cf, of)
    })
}

fn shld<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    double::<E, W>(e, i, true)
}

fn shrd<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    double::<E, W>(e, i, false)
}

#[inline(always)]
fn flagless<E: Emit, W: Width>(e: &mut E, i: &Insn, op: Bin) -> Result<(), E::Trap> {
    let a = e.read::<W>(i, 1)?;
    let k = e.read::<W>(i, 2)?;
    // RORX's immediate and the register counts are masked by the operation itself.
    let r = e.bin::<W>(op, a, k);
    e.write::<W>(i, 0, r)
}

fn shlx<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    flagless::<E, W>(e, i, Bin::Shl)
}

fn shrx<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    flagless::<E, W>(e, i, Bin::Shr)
}

fn sarx<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    flagless::<E, W>(e, i, Bin::Sar)
}

fn rorx<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    flagless::<E, W>(e, i, Bin::Rotr)
}
