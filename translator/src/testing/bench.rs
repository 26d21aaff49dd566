//! The interpreter, the compiler and the host's processor side by side.

use std::fmt::Write;

use iced_x86::CpuidFeature;

use super::Machine;
use super::engine::Engine;
use super::native::Native;
use crate::state::flag;

/// A state to run code from, and the flags that are undefined behind it, or where it faults.
pub(crate) struct Case {
    pub before: Machine,
    pub undefined: u64,
    pub undefined_at_fault: u64,
}

#[cfg(test)]
impl Case {
    /// Of a single instruction: one that faults changes no flags.
    pub(crate) fn single(before: Machine, undefined: u64) -> Case {
        Case { before, undefined, undefined_at_fault: 0 }
    }
}

/// The three of them.
pub(crate) struct Bench {
    bits: u32,
    host: Native,
    interpreter: Engine,
    compiler: Engine,
}

impl Bench {
    /// For code of 32 or 64 bits; `None`, with the reason printed, where the host cannot serve.
    pub(crate) fn new(bits: u32) -> Option<Bench> {
        let host = Native::take(bits)?;
        Some(Bench { bits, host, interpreter: Engine::new(false, bits), compiler: Engine::new(true, bits) })
    }

    /// Runs code from each state. The processor says what is right, but the engines must agree in what is undefined,
    /// too. Says how many completed without a fault, or describes the first difference.
    pub(crate) fn check(&mut self, code: &[u8], cases: &[Case]) -> Result<usize, String> {
        if cases.is_empty() {
            return Ok(0);
        }
        let mut completed = 0;
        let warm: Vec<Machine> = cases.iter().take(3).map(|c| c.before.clone()).collect();
        self.host.load(code);
        self.interpreter.load(code, &[])?;
        self.compiler.load(code, &warm)?;
        for Case { before, undefined, undefined_at_fault } in cases {
            let expected = self.host.run(before);
            completed += usize::from(expected.fault.is_none());
            let undefined = if expected.fault.is_some() { *undefined_at_fault } else { *undefined };
            let bits = self.bits;
            let expected = normal(expected, undefined, bits);
            let interpreted = self.interpreter.run(before)?;
            let compiled = self.compiler.run(before)?;
            compare(
                before,
                "interpreted",
                "compiled",
                &normal(interpreted.clone(), 0, bits),
                &normal(compiled, 0, bits),
            )?;
            compare(before, "processor", "interpreted", &expected, &normal(interpreted, undefined, bits))?;
        }
        Ok(completed)
    }
}

/// Without what is the operating system's business, or undefined.
fn normal(mut m: Machine, undefined: u64, bits: u32) -> Machine {
    m.flags &= (flag::STATUS | flag::DF) & !undefined;
    if bits == 32 {
        // What 32-bit code cannot see is undefined.
        m.gpr = std::array::from_fn(|n| if n < 8 { m.gpr[n] & 0xffff_ffff } else { 0 });
    }
    m
}

fn compare(before: &Machine, a: &str, b: &str, x: &Machine, y: &Machine) -> Result<(), String> {
    if x == y {
        return Ok(());
    }
    let mut text = String::new();
    let mut line = |name: String, x: &dyn std::fmt::Debug, y: &dyn std::fmt::Debug| {
        let (x, y) = (format!("{x:x?}"), format!("{y:x?}"));
        if x != y {
            let _ = writeln!(text, "  {name}: {a} {x}, {b} {y}");
        }
    };
    for n in 0..16 {
        line(format!("gpr {n}"), &x.gpr[n], &y.gpr[n]);
        line(format!("ymm {n}"), &x.ymm[n], &y.ymm[n]);
    }
    line("flags".into(), &x.flags, &y.flags);
    line("rip".into(), &x.rip, &y.rip);
    line("fault".into(), &x.fault, &y.fault);
    line("mxcsr".into(), &x.mxcsr, &y.mxcsr);
    line("x87 control".into(), &x.fpu.control, &y.fpu.control);
    line("x87 status".into(), &x.fpu.status, &y.fpu.status);
    line("x87 tags".into(), &x.fpu.tags, &y.fpu.tags);
    for n in 0..8 {
        line(format!("x87 st({n})"), &x.fpu.st[n], &y.fpu.st[n]);
    }
    if let Some(at) = (0..x.data.len()).find(|&k| x.data[k] != y.data[k]) {
        let end = x.data.len().min(at + 16);
        line(format!("data from {at:#x}"), &&x.data[at..end], &&y.data[at..end]);
    }
    let _ = writeln!(text, "  before: gpr {:x?} flags {:x}", before.gpr, before.flags);
    let _ = writeln!(text, "  ymm {:x?} mxcsr {:x} {:x?}", before.ymm, before.mxcsr, before.fpu);
    Err(text)
}

/// Whether the host's processor has an optional instruction class.
pub(crate) fn host_has(f: CpuidFeature) -> bool {
    match f {
        CpuidFeature::BMI1 => is_x86_feature_detected!("bmi1"),
        CpuidFeature::BMI2 => is_x86_feature_detected!("bmi2"),
        CpuidFeature::ADX => is_x86_feature_detected!("adx"),
        CpuidFeature::LZCNT => is_x86_feature_detected!("lzcnt"),
        CpuidFeature::POPCNT => is_x86_feature_detected!("popcnt"),
        CpuidFeature::MOVBE => is_x86_feature_detected!("movbe"),
        CpuidFeature::SSE4_2 => is_x86_feature_detected!("sse4.2"),
        CpuidFeature::CMPXCHG16B => is_x86_feature_detected!("cmpxchg16b"),
        CpuidFeature::FMA => is_x86_feature_detected!("fma"),
        CpuidFeature::F16C => is_x86_feature_detected!("f16c"),
        CpuidFeature::AES => is_x86_feature_detected!("aes"),
        CpuidFeature::PCLMULQDQ => is_x86_feature_detected!("pclmulqdq"),
        CpuidFeature::SHA => is_x86_feature_detected!("sha"),
        // CPUID leaf 7, EBX bits 23 and 24.
        CpuidFeature::CLFLUSHOPT => std::arch::x86_64::__cpuid_count(7, 0).ebx & 1 << 23 != 0,
        CpuidFeature::CLWB => std::arch::x86_64::__cpuid_count(7, 0).ebx & 1 << 24 != 0,
        _ => true,
    }
}
