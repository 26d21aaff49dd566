//! VEX floating point: arithmetic, comparisons, conversions, FMA and F16C.

use std::collections::HashMap;
use std::sync::OnceLock;

use iced_x86::{Instruction, Mnemonic};

use super::{Lanes, get, is_wide, put};
use crate::emit::{Emit, FpArgs, FpCall};
use crate::insn::{Insn, Opnd};
use crate::semantics::sse::{self, fmt_of, format};
use crate::semantics::{Sem, both};
use crate::simd::fp::{CvtOp, FmaKind, FpOp};
use crate::width::{W8, W64};

/// The semantics of a floating-point instruction.
pub(super) fn find(i: &Instruction) -> Option<&'static Sem> {
    use Mnemonic::*;
    let m = i.mnemonic();
    Some(match m {
        Vcmpps | Vcmppd | Vcmpss | Vcmpsd => both!(compare; aux = format),
        Vroundps | Vroundpd | Vroundss | Vroundsd => both!(round; aux = format),
        Vdpps | Vdppd => both!(dot; aux = format),
        Vcomiss | Vcomisd | Vucomiss | Vucomisd => both!(sse::comi; aux = sse::comi_kind),
        Vcvtsi2ss | Vcvtsi2sd => both!(from_int; aux = format),
        Vcvtss2si | Vcvtsd2si | Vcvttss2si | Vcvttsd2si => both!(sse::to_int; aux = sse::to_int_kind),
        Vcvtps2ph => both!(to_half),
        _ if fused(m).is_some() => both!(fma; aux = fused_number),
        _ if conversion(m).is_some() => both!(convert; aux = conversion_number),
        _ if legacy(m).and_then(sse::arithmetic).is_some() => both!(arith; aux = arithmetic_number),
        _ => return None,
    })
}

/// The legacy SSE instruction that a VEX one extends.
fn legacy(m: Mnemonic) -> Option<Mnemonic> {
    static LEGACY: OnceLock<HashMap<String, Mnemonic>> = OnceLock::new();
    let legacy = LEGACY.get_or_init(|| Mnemonic::values().map(|m| (format!("{m:?}").to_lowercase(), m)).collect());
    legacy.get(format!("{m:?}").strip_prefix('V')?).copied()
}

/// The first and second source: operands 1 and 2, or only operand 1 of what has one source.
#[inline(always)]
fn sources<E: Emit>(e: &mut E, i: &Insn) -> Result<(Lanes<E>, Lanes<E>), E::Trap> {
    if matches!(i.op[2], Opnd::None | Opnd::Imm) {
        let b = get(e, i, 1)?;
        return Ok((b, b));
    }
    let b = get(e, i, 2)?;
    Ok((get(e, i, 1)?, b))
}

/// Evaluates an operation of two sources lane by lane: both of a packed 256-bit operation, else the low one.
#[inline(always)]
fn evaluate<E: Emit>(e: &mut E, i: &Insn, op: FpCall) -> Result<(), E::Trap> {
    let ((a, a_high), (b, b_high)) = sources(e, i)?;
    let high = a_high.zip(b_high).filter(|_| is_wide(i, 0)).map(|(a, b)| FpArgs::two(a, b));
    let r = e.fp(op, FpArgs::two(a, b), high)?;
    put(e, i, r)
}

fn arithmetic_number(i: &Instruction) -> u16 {
    legacy(i.mnemonic()).and_then(sse::arithmetic).map_or(0, |op| op as u16) << 2 | format(i)
}

fn arith<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let Some(op) = FpOp::from_number(i.aux >> 2) else { return Err(e.unsupported()) };
    evaluate(e, i, FpCall::Arith(op, fmt_of(i.aux)))
}

fn compare<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    evaluate(e, i, FpCall::Compare(fmt_of(i.aux), i.imm as u8))
}

fn round<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    evaluate(e, i, FpCall::Round(fmt_of(i.aux), i.imm as u8))
}

fn dot<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    evaluate(e, i, FpCall::Dot(fmt_of(i.aux), i.imm as u8))
}

fn from_int<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    use iced_x86::Code::*;
    let wide = matches!(i.iced_code(), VEX_Vcvtsi2ss_xmm_xmm_rm64 | VEX_Vcvtsi2sd_xmm_xmm_rm64);
    let v = sse::low_int(e, i, 2, wide)?;
    let (a, _) = get(e, i, 1)?;
    let r = e.fp_from_int(fmt_of(i.aux), wide, a, v)?;
    put(e, i, (r, None))
}

/// The conversion between vector formats of a mnemonic.
fn conversion(m: Mnemonic) -> Option<CvtOp> {
    match m {
        Mnemonic::Vcvtph2ps => Some(CvtOp::Cvtph2ps),
        _ => sse::conversion(legacy(m)?).map(|(op, _)| op),
    }
}

fn conversion_number(i: &Instruction) -> u16 {
    conversion(i.mnemonic()).map_or(0, |op| op as u16)
}

fn convert<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    use CvtOp::*;
    let Some(op) = CvtOp::from_number(i.aux) else { return Err(e.unsupported()) };
    match op {
        Cvtdq2pd | Cvtps2pd | Cvtph2ps => {
            let (b, _) = get(e, i, 1)?;
            let high = if is_wide(i, 0) {
                let up = e.x_high(b);
                let zero = e.imm::<W64>(0);
                let up = e.x_make(up, zero);
                Some(FpArgs::two(up, up))
            } else {
                None
            };
            let r = e.fp(FpCall::Convert(op), FpArgs::two(b, b), high)?;
            put(e, i, r)
        }
        Cvtpd2dq | Cvttpd2dq | Cvtpd2ps => {
            let (b, b_high) = get(e, i, 1)?;
            let r = e.fp(FpCall::Convert(op), FpArgs::two(b, b), b_high.map(|b| FpArgs::two(b, b)))?;
            let r = join_halves(e, r);
            put(e, i, (r, None))
        }
        _ => evaluate(e, i, FpCall::Convert(op)),
    }
}

/// The low halves of both lanes of a narrowing conversion, side by side.
#[inline(always)]
fn join_halves<E: Emit>(e: &mut E, (low, high): Lanes<E>) -> E::X {
    match high {
        None => low,
        Some(high) => {
            let (low, high) = (e.x_low(low), e.x_low(high));
            e.x_make(low, high)
        }
    }
}

fn to_half<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let (b, b_high) = get(e, i, 1)?;
    // MXCSR must not change if the store faults, so that is found out first.
    let ea = if i.op[0] == Opnd::Mem { Some(e.ea(i)) } else { None };
    if let Some(ea) = ea {
        e.probe_write(i, ea, u64::from(i.mem_bytes))?;
        e.check_store::<W8>(i, ea)?;
    }
    let r = e.fp(FpCall::ToHalf(i.imm as u8), FpArgs::two(b, b), b_high.map(|b| FpArgs::two(b, b)))?;
    let r = join_halves(e, r);
    match ea {
        Some(ea) if i.mem_bytes == 8 => {
            let v = e.x_low(r);
            e.store::<W64>(i, i.seg, ea, v)
        }
        Some(ea) => e.store_x(i, ea, r, false),
        None => put(e, i, (r, None)),
    }
}

const KINDS: [(&str, FmaKind); 6] = [
    ("maddsub", FmaKind::AddSub),
    ("msubadd", FmaKind::SubAdd),
    ("madd", FmaKind::Add),
    ("msub", FmaKind::Sub),
    ("nmadd", FmaKind::NegAdd),
    ("nmsub", FmaKind::NegSub),
];

/// The index in [`KINDS`] and the operand order of a fused multiply-add: VF, the kind, the order, the format.
fn fused(m: Mnemonic) -> Option<(usize, u16)> {
    let name = format!("{m:?}");
    let rest = name.strip_prefix("Vf")?;
    let kind = KINDS.iter().position(|(kind, _)| rest.starts_with(kind))?;
    let order = rest.get(KINDS[kind].0.len()..)?.get(..3)?.parse().ok()?;
    matches!(order, 132 | 213 | 231).then_some((kind, order))
}

/// Bits 1:0 the format, bits 9:2 the operand order, bits 15:10 the kind.
fn fused_number(i: &Instruction) -> u16 {
    fused(i.mnemonic()).map_or(0, |(kind, order)| (kind as u16) << 10 | order << 2 | format(i))
}

fn fma<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let third = get(e, i, 2)?;
    let (first, second) = (get(e, i, 0)?, get(e, i, 1)?);
    let Some(&(_, kind)) = KINDS.get(usize::from(i.aux >> 10)) else { return Err(e.unsupported()) };
    let (a, b, c) = match i.aux >> 2 & 0xff {
        132 => (first, third, second),
        213 => (second, first, third),
        _ => (second, third, first),
    };
    let high = match (a.1, b.1, c.1, first.1) {
        (Some(a), Some(b), Some(c), Some(dst)) => Some(FpArgs { a, b, c, dst }),
        _ => None,
    };
    let low = FpArgs { a: a.0, b: b.0, c: c.0, dst: first.0 };
    let r = e.fp(FpCall::Fused(kind, fmt_of(i.aux)), low, high)?;
    put(e, i, r)
}
