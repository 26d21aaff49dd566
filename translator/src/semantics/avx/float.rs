//! VEX floating point: arithmetic, comparisons, conversions, FMA and F16C.

use std::collections::HashMap;
use std::sync::OnceLock;

use iced_x86::{Instruction, Mnemonic};

use super::{is_wide, read, write};
use crate::cpu::Cpu;
use crate::emit::Emit;
use crate::exception::Trap;
use crate::insn::{Insn, Opnd};
use crate::semantics::sse::{self, fmt_of, format, with_fp};
use crate::semantics::{Sem, interp};
use crate::simd::fp::{self, CvtOp, FmaKind, FpEnv, FpOp};
use crate::simd::wide::Ymm;
use crate::width::{W32, W64};

/// The semantics of a floating-point instruction.
pub(super) fn find(i: &Instruction) -> Option<&'static Sem> {
    use Mnemonic::*;
    let m = i.mnemonic();
    Some(match m {
        Vcmpps | Vcmppd | Vcmpss | Vcmpsd => interp!(compare; aux = format),
        Vroundps | Vroundpd | Vroundss | Vroundsd => interp!(round; aux = format),
        Vdpps | Vdppd => interp!(dot; aux = format),
        Vcomiss | Vcomisd | Vucomiss | Vucomisd => interp!(sse::comi; aux = sse::comi_kind),
        Vcvtsi2ss | Vcvtsi2sd => interp!(from_int; aux = format),
        Vcvtss2si | Vcvtsd2si | Vcvttss2si | Vcvttsd2si => interp!(sse::to_int; aux = sse::to_int_kind),
        Vcvtps2ph => interp!(to_half),
        _ if fused(m).is_some() => interp!(fma; aux = fused_number),
        _ if conversion(m).is_some() => interp!(convert; aux = conversion_number),
        _ if legacy(m).and_then(sse::arithmetic).is_some() => interp!(arith; aux = arithmetic_number),
        _ => return None,
    })
}

/// The legacy SSE instruction that a VEX one extends.
fn legacy(m: Mnemonic) -> Option<Mnemonic> {
    static LEGACY: OnceLock<HashMap<String, Mnemonic>> = OnceLock::new();
    let legacy = LEGACY.get_or_init(|| Mnemonic::values().map(|m| (format!("{m:?}").to_lowercase(), m)).collect());
    legacy.get(format!("{m:?}").strip_prefix('V')?).copied()
}

/// Evaluates lane by lane: both of a packed 256-bit operation, else the low one.
fn each(cpu: &mut Cpu, wide: bool, mut f: impl FnMut(&mut FpEnv, usize) -> u128) -> Result<Ymm, Trap> {
    with_fp(cpu, |env| [f(env, 0), if wide { f(env, 1) } else { 0 }])
}

/// The first and second source: operands 1 and 2, or only operand 1 of what has one source.
fn sources(cpu: &mut Cpu, i: &Insn) -> Result<(Ymm, Ymm), Trap> {
    if matches!(i.op[2], Opnd::None | Opnd::Imm) {
        return Ok(([0; 2], read(cpu, i, 1)?));
    }
    let b = read(cpu, i, 2)?;
    Ok((read(cpu, i, 1)?, b))
}

fn arithmetic_number(i: &Instruction) -> u16 {
    legacy(i.mnemonic()).and_then(sse::arithmetic).map_or(0, |op| op as u16) << 2 | format(i)
}

fn arith(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let (a, b) = sources(cpu, i)?;
    let Some(op) = FpOp::from_number(i.aux >> 2) else { return Err(cpu.ud()) };
    let r = each(cpu, is_wide(i, 0), |env, n| fp::fp(env, op, fmt_of(i.aux), a[n], b[n]))?;
    write(cpu, i, r)
}

fn compare(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let (a, b) = sources(cpu, i)?;
    let r = each(cpu, is_wide(i, 0), |env, n| fp::compare(env, fmt_of(i.aux), a[n], b[n], i.imm as u8))?;
    write(cpu, i, r)
}

fn round(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let (a, b) = sources(cpu, i)?;
    let r = each(cpu, is_wide(i, 0), |env, n| fp::round(env, fmt_of(i.aux), a[n], b[n], i.imm as u8))?;
    write(cpu, i, r)
}

fn dot(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let (a, b) = sources(cpu, i)?;
    let (f, imm, wide) = (fmt_of(i.aux), i.imm as u8, is_wide(i, 0));
    let r = with_fp(cpu, |env| {
        if wide {
            return fp::dot(env, f, a, b, imm);
        }
        let [r] = fp::dot(env, f, [a[0]], [b[0]], imm);
        [r, 0]
    })?;
    write(cpu, i, r)
}

fn from_int(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    use iced_x86::Code::*;
    let wide = matches!(i.iced_code(), VEX_Vcvtsi2ss_xmm_xmm_rm64 | VEX_Vcvtsi2sd_xmm_xmm_rm64);
    let v = if wide { cpu.read::<W64>(i, 2)? } else { cpu.read::<W32>(i, 2)? };
    let a = read(cpu, i, 1)?;
    let r = with_fp(cpu, |env| fp::from_int(env, fmt_of(i.aux), wide, a[0], v))?;
    write(cpu, i, [r, 0])
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

fn convert(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    use CvtOp::*;
    let (a, b) = sources(cpu, i)?;
    let Some(op) = CvtOp::from_number(i.aux) else { return Err(cpu.ud()) };
    let r = match op {
        Cvtdq2pd | Cvtps2pd | Cvtph2ps => {
            let b = [b[0], b[0] >> 64];
            each(cpu, is_wide(i, 0), |env, n| fp::convert(env, op, 0, b[n]))?
        }
        Cvtpd2dq | Cvttpd2dq | Cvtpd2ps => {
            let wide = is_wide(i, 1) || i.mem_bytes == 32;
            let [low, high] = each(cpu, wide, |env, n| fp::convert(env, op, 0, b[n]))?;
            [low | high << 64, 0]
        }
        _ => each(cpu, is_wide(i, 0), |env, n| fp::convert(env, op, a[n], b[n]))?,
    };
    write(cpu, i, r)
}

fn to_half(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let b = read(cpu, i, 1)?;
    // The flags must not change if the store faults, so it is found out first.
    let linear = if i.op[0] == Opnd::Mem {
        let ea = cpu.ea(i);
        let bytes = u64::from(i.mem_bytes);
        let linear = cpu.linearize(i.seg, ea, bytes, true)?;
        cpu.check_alignment(linear, bytes)?;
        cpu.probe_write(linear, bytes)?;
        Some(linear)
    } else {
        None
    };
    let [low, high] = each(cpu, is_wide(i, 1), |env, n| fp::to_half(env, b[n], i.imm as u8))?;
    let r = low | high << 64;
    match linear {
        Some(linear) if i.mem_bytes == 8 => cpu.store_linear::<W64>(linear, r as u64),
        Some(linear) => cpu.store_linear_x(linear, r),
        None => write(cpu, i, [r, 0]),
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

fn fma(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let third = read(cpu, i, 2)?;
    let (first, second) = (read(cpu, i, 0)?, read(cpu, i, 1)?);
    let Some(&(_, kind)) = KINDS.get(usize::from(i.aux >> 10)) else { return Err(cpu.ud()) };
    let f = fmt_of(i.aux);
    let (a, b, c) = match i.aux >> 2 & 0xff {
        132 => (first, third, second),
        213 => (second, first, third),
        _ => (second, third, first),
    };
    let r = each(cpu, is_wide(i, 0), |env, n| fp::fma(env, kind, f, first[n], a[n], b[n], c[n]))?;
    write(cpu, i, r)
}
