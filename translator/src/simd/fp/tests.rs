//! The software unit against the host's, in result and in flags, under every control of MXCSR.

use super::super::testing::{Digest, Random};
use super::*;

const FMTS: [FpFmt; 4] = [FpFmt::Ps, FpFmt::Pd, FpFmt::Ss, FpFmt::Sd];

/// A number of a format with `frac` and `exp` bits that is likely to be a hard case.
fn nasty(r: &mut Random, frac: u32, exp: u32) -> u64 {
    let top = (1u64 << exp) - 1;
    let ones = (1u64 << frac) - 1;
    let bias = top >> 1;
    let fraction = match r.below(6) {
        0 => 0,
        1 => 1 << r.below(frac as usize),
        2 => ones,
        3 => ones ^ (1 << r.below(frac as usize)),
        4 => ones << r.below(frac as usize) & ones,
        _ => r.u64() & ones,
    };
    let near = |r: &mut Random, e: u64| (e + r.below(5) as u64).saturating_sub(2).min(top);
    let exponent = match r.below(11) {
        0 => 0,
        1 => near(r, 1),
        2 => near(r, top - 2),
        3 => top,
        4 => near(r, bias),
        5 => near(r, bias + u64::from(frac)),
        6 => near(r, (bias + 31).min(top)),
        7 => near(r, (bias + 63).min(top)),
        8 => near(r, bias / 2),
        9 => near(r, bias - u64::from(frac)),
        _ => r.u64() & top,
    };
    let sign = r.u64() & 1;
    (sign << (frac + exp)) | (exponent << frac) | fraction
}

fn nasty_vec(r: &mut Random, fmt: FpFmt) -> u128 {
    if fmt.is_double() {
        (u128::from(nasty(r, 52, 11)) << 64) | u128::from(nasty(r, 52, 11))
    } else {
        (0..4).fold(0, |x, _| (x << 32) | u128::from(nasty(r, 23, 8)))
    }
}

/// Runs both units under every rounding mode, FTZ and DAZ; `None` from the host skips the case.
#[cfg(target_arch = "x86_64")]
fn both<T: PartialEq + std::fmt::Debug>(
    what: impl Fn() -> String,
    host: impl Fn() -> Option<T>,
    soft: impl Fn(&mut FpEnv) -> T,
) {
    for control in 0..16 {
        let mxcsr = MASKS
            | ((control & 3) << 13)
            | if control & 4 != 0 { FTZ } else { 0 }
            | if control & 8 != 0 { DAZ } else { 0 };
        Host::load(mxcsr);
        let result = host();
        let flags = Host::flags();
        Host::load(MXCSR_RESET);
        let Some(result) = result else { continue };
        let mut env = FpEnv::new(mxcsr);
        let ours = soft(&mut env);
        assert!(
            ours == result && env.mxcsr & FLAGS == flags,
            "{} mxcsr {mxcsr:#x}: soft {ours:#x?} flags {:#x}, host {result:#x?} flags {flags:#x}",
            what(),
            env.mxcsr & FLAGS
        );
    }
}

#[cfg(target_arch = "x86_64")]
mod host {
    use super::*;
    use crate::testing::is_of_the_model_s_maker;

    const ROUNDS: usize = 1500;

    #[test]
    fn arithmetic() {
        let mut r = Random::new(21);
        for &op in FpOp::ALL {
            if matches!(op, FpOp::Rcp | FpOp::Rsqrt) {
                continue;
            }
            for fmt in FMTS {
                for _ in 0..ROUNDS {
                    let (a, b) = (nasty_vec(&mut r, fmt), nasty_vec(&mut r, fmt));
                    both(
                        || format!("{op:?} {fmt:?} {a:#034x} {b:#034x}"),
                        || Host::arith(op, fmt, a, b),
                        |env| soft::arith(env, op, fmt, a, b),
                    );
                }
            }
        }
    }

    #[test]
    fn comparisons() {
        let mut r = Random::new(22);
        for fmt in FMTS {
            for predicate in 0..32 {
                for k in 0..200 {
                    let a = nasty_vec(&mut r, fmt);
                    let b = if k % 4 == 0 { a } else { nasty_vec(&mut r, fmt) };
                    both(
                        || format!("{predicate} {fmt:?} {a:#x} {b:#x}"),
                        || Host::compare(fmt, a, b, predicate),
                        |env| soft::compare(env, fmt, a, b, predicate),
                    );
                    let quiet = predicate & 1 != 0;
                    both(
                        || format!("comi {quiet} {fmt:?} {a:#x} {b:#x}"),
                        || Host::comi(fmt, quiet, a, b).map(Shown),
                        |env| Shown(soft::comi(env, fmt, quiet, a, b)),
                    );
                }
            }
        }
    }

    /// [`Comi`] with the formatting that [`both`] asks for.
    #[derive(PartialEq, Debug)]
    struct Shown(Comi);

    #[test]
    fn rounding() {
        let mut r = Random::new(23);
        for fmt in FMTS {
            for imm in 0..16 {
                for _ in 0..300 {
                    let (a, b) = (nasty_vec(&mut r, fmt), nasty_vec(&mut r, fmt));
                    both(
                        || format!("round {imm} {fmt:?} {a:#x} {b:#x}"),
                        || Host::round(fmt, a, b, imm),
                        |env| soft::round(env, fmt, a, b, imm),
                    );
                }
            }
        }
    }

    #[test]
    fn dot_products() {
        if !is_of_the_model_s_maker() {
            return;
        }
        let mut r = Random::new(24);
        for fmt in [FpFmt::Ps, FpFmt::Pd] {
            for _ in 0..6000 {
                let (a, b, imm) = (nasty_vec(&mut r, fmt), nasty_vec(&mut r, fmt), r.u64() as u8);
                both(
                    || format!("dot {imm:#x} {fmt:?} {a:#x} {b:#x}"),
                    || Host::dot(fmt, a, b, imm),
                    |env| soft::dot(env, fmt, [a], [b], imm)[0],
                );
            }
        }
    }

    #[test]
    fn fused() {
        use FmaKind::*;
        let mut r = Random::new(25);
        for fmt in FMTS {
            for kind in [Add, Sub, NegAdd, NegSub, AddSub, SubAdd] {
                for k in 0..ROUNDS {
                    let (a, b) = (nasty_vec(&mut r, fmt), nasty_vec(&mut r, fmt));
                    let c = match k % 3 {
                        // Near the product, so that the sum cancels.
                        0 => soft::arith(&mut FpEnv::new(MXCSR_RESET), FpOp::Mul, fmt, a, b) ^ (r.u64() & 1) as u128,
                        _ => nasty_vec(&mut r, fmt),
                    };
                    let dst = r.u128();
                    both(
                        || format!("fma {kind:?} {fmt:?} {a:#034x} {b:#034x} {c:#034x}"),
                        || Host::fma(kind, fmt, dst, a, b, c),
                        |env| soft::fma(env, kind, fmt, dst, a, b, c),
                    );
                }
            }
        }
    }

    #[test]
    fn conversions() {
        let mut r = Random::new(26);
        for k in 0..6000 {
            let fmt = FMTS[k % 4];
            let a = r.u128();
            let b = nasty_vec(&mut r, fmt);
            for &op in CvtOp::ALL {
                both(
                    || format!("{op:?} {a:#x} {b:#x}"),
                    || Host::convert(op, a, b),
                    |env| soft::convert(env, op, a, b),
                );
            }
            let value = (b >> 32) as u64;
            let (wide, truncate) = (k & 4 != 0, k & 8 != 0);
            both(
                || format!("from_int {fmt:?} {wide} {value:#x}"),
                || Host::from_int(fmt, wide, a, value),
                |env| soft::from_int(env, fmt, wide, a, value),
            );
            both(
                || format!("to_int {fmt:?} {wide} {truncate} {b:#x}"),
                || Host::to_int(fmt, wide, truncate, b),
                |env| soft::to_int(env, fmt, wide, truncate, b),
            );
        }
    }

    #[test]
    fn halves() {
        let mut r = Random::new(27);
        // Every half, and singles around the range of halves.
        for x in (0..=0xffffu128).step_by(4) {
            let b = x | ((x + 1) << 16) | ((x + 2) << 32) | ((x + 3) << 48);
            both(
                || format!("ph2ps {b:#x}"),
                || Host::convert(CvtOp::Cvtph2ps, 0, b),
                |env| soft::convert(env, CvtOp::Cvtph2ps, 0, b),
            );
        }
        for k in 0..20000 {
            let single = |r: &mut Random| {
                let x = nasty(r, 23, 8) as u32;
                if k % 3 == 0 { x } else { (x & 0x807f_ffff) | ((127 - 27 + r.below(45) as u32) << 23) }
            };
            let b = (0..4).fold(0u128, |x, _| (x << 32) | u128::from(single(&mut r)));
            let imm = (k % 8) as u8;
            both(|| format!("ps2ph {b:#x} {imm}"), || Host::to_half(b, imm), |env| soft::to_half(env, b, imm));
        }
    }

    /// Which NaN the three forms of FMA keep, by the order that [`fma`] documents.
    #[test]
    fn fused_forms() {
        if !is_x86_feature_detected!("fma") {
            eprintln!("skipped: this processor has no fma");
            return;
        }
        macro_rules! form {
            ($name:literal, $o:expr) => {{
                let mut r: f64;
                // SAFETY: the instruction touches only its registers.
                unsafe {
                    r = f64::from_bits($o[0]);
                    std::arch::asm!(concat!($name, " {0}, {1}, {2}"), inout(xmm_reg) r,
                        in(xmm_reg) f64::from_bits($o[1]), in(xmm_reg) f64::from_bits($o[2]));
                }
                r.to_bits()
            }};
        }
        const VALUES: [u64; 5] =
            [0, 0x7ff0_0000_0000_0000, 0x7ff8_0000_0000_0000, 0x7ff0_0000_0000_0000, 0x3ff0_0000_0000_0000];
        for pick in 0..125 {
            let k = [pick % 5, pick / 5 % 5, pick / 25];
            // The payload tells the operand.
            let o: [u64; 3] =
                std::array::from_fn(|i| VALUES[k[i]] | if matches!(k[i], 2 | 3) { i as u64 + 1 } else { 0 });
            let expect = |a: u64, b: u64, c: u64| {
                soft::fma(&mut FpEnv::new(MXCSR_RESET), FmaKind::Add, FpFmt::Sd, 0, a.into(), b.into(), c.into()) as u64
            };
            assert_eq!(form!("vfmadd132sd", o), expect(o[0], o[2], o[1]), "132 {o:x?}");
            assert_eq!(form!("vfmadd213sd", o), expect(o[1], o[0], o[2]), "213 {o:x?}");
            assert_eq!(form!("vfmadd231sd", o), expect(o[1], o[2], o[0]), "231 {o:x?}");
        }
    }
}

#[test]
fn approximations_keep_their_bound() {
    let mut r = Random::new(28);
    let env = &mut FpEnv::new(MXCSR_RESET);
    let bound = 1.5 / 4096.0;
    for _ in 0..20000 {
        let x = f32::from_bits(nasty(&mut r, 23, 8) as u32);
        let of = |env: &mut FpEnv, op| f32::from_bits(soft::arith(env, op, FpFmt::Ss, 0, x.to_bits().into()) as u32);
        let (rcp, rsqrt) = (of(env, FpOp::Rcp), of(env, FpOp::Rsqrt));
        if !x.is_normal() {
            // What SDM fixes exactly.
            let zero = f32::INFINITY.copysign(x);
            match x.classify() {
                std::num::FpCategory::Nan => assert!(rcp.is_nan() && rsqrt.is_nan()),
                std::num::FpCategory::Infinite => assert!(rcp == 0.0 && (rsqrt == 0.0 || x < 0.0)),
                _ => assert!(rcp == zero && rsqrt == zero),
            }
            continue;
        }
        let exact = 1.0 / f64::from(x);
        if exact.abs() > f64::from(f32::MIN_POSITIVE) {
            assert!((f64::from(rcp) / exact - 1.0).abs() <= bound, "rcp {x:e} {rcp:e}");
        }
        if x > 0.0 {
            assert!((f64::from(rsqrt) * f64::from(x).sqrt() - 1.0).abs() <= bound, "rsqrt {x:e} {rsqrt:e}");
        } else {
            assert!(rsqrt.is_nan());
        }
    }
    assert_eq!(env.mxcsr, MXCSR_RESET, "approximations raise nothing");
}

/// The software unit gives on this host what it gave where the processor agreed.
#[test]
fn the_same_on_every_host() {
    let mut r = Random::new(29);
    let mut d = Digest::new();
    for k in 0..4000u32 {
        let mut env = FpEnv::new(MASKS | ((k & 3) << 13) | ((k & 4) << 13) | ((k & 8) << 3));
        let env = &mut env;
        let fmt = FMTS[k as usize / 16 % 4];
        let (a, b, c) = (nasty_vec(&mut r, fmt), nasty_vec(&mut r, fmt), nasty_vec(&mut r, fmt));
        let imm = (k % 255) as u8;
        for op in [FpOp::Add, FpOp::Sub, FpOp::Mul, FpOp::Div, FpOp::Min, FpOp::Max, FpOp::Sqrt] {
            d.add(soft::arith(env, op, fmt, a, b));
        }
        CvtOp::ALL.iter().for_each(|&op| d.add(soft::convert(env, op, a, b)));
        d.add(soft::fma(env, FmaKind::Add, fmt, a, a, b, c));
        d.add(soft::round(env, fmt, a, b, imm));
        d.add(soft::dot(env, if fmt.is_double() { FpFmt::Pd } else { FpFmt::Ps }, [a], [b], imm)[0]);
        d.add(soft::compare(env, fmt, a, b, imm & 31));
        d.add(soft::to_half(env, b, imm));
        d.add(soft::to_int(env, fmt, true, false, a).into());
        d.add(soft::from_int(env, fmt, true, 0, a as u64));
        d.add(env.mxcsr.into());
    }
    assert_eq!(d.value(), 0xdb14_7e1c_783e_6410, "{:#x}", d.value());
}

#[test]
fn unmasked_exceptions() {
    let one = u128::from(1f64.to_bits());
    // Division by zero, unmasked.
    let mut env = FpEnv::new(MASKS & !(ZE << 7) | PE);
    assert_eq!(env.trapping(|env| fp(env, FpOp::Div, FpFmt::Sd, one, 0)), None);
    assert_eq!(env.mxcsr & FLAGS, ZE | PE);
    assert_eq!(env.trapping(|env| fp(env, FpOp::Add, FpFmt::Sd, one, one)), Some(u128::from(2f64.to_bits())));
    // An exact denormal result underflows only if that is unmasked.
    let tiny = u128::from(f64::MIN_POSITIVE.to_bits());
    let half = u128::from(0.5f64.to_bits());
    let mut env = FpEnv::new(MASKS & !(UE << 7));
    assert_eq!(env.trapping(|env| fp(env, FpOp::Mul, FpFmt::Sd, tiny, half)), None);
    assert_eq!(env.mxcsr & FLAGS, UE);
    let mut env = FpEnv::new(MASKS);
    assert_eq!(
        soft::arith(&mut env, FpOp::Mul, FpFmt::Sd, tiny, half),
        u128::from((f64::MIN_POSITIVE / 2.0).to_bits())
    );
    assert_eq!(env.mxcsr & FLAGS, 0);
}

#[test]
fn ambient_environment() {
    let (one, three) = (u128::from(1f32.to_bits()), u128::from(3f32.to_bits()));
    let third = |mxcsr: u32| {
        let mut env = FpEnv::new(mxcsr);
        env.load();
        let r = fp(&mut env, FpOp::Div, FpFmt::Ss, one, three) as u32;
        env.unload();
        (r, env.mxcsr)
    };
    assert_eq!(third(MXCSR_RESET), (0x3eaa_aaab, MXCSR_RESET | PE));
    assert_eq!(third(MXCSR_RESET | 0x6000 | IE), (0x3eaa_aaaa, MXCSR_RESET | 0x6000 | IE | PE));
}
