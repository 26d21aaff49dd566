//! The interpreter, the compiler and the host's processor side by side.

use std::fmt::Write;
use std::ops::Range;

use iced_x86::{CpuidFeature, Decoder, DecoderOptions, Instruction, Mnemonic};

use super::engine::{Engine, Kind};
use super::every::put;
use super::native::Native;
use super::{Fpu, INSN, Machine};
use crate::state::flag;

/// A state to run code from, and the flags that are undefined behind it, or where it faults.
pub(crate) struct Case {
    pub before: Machine,
    pub undefined: u64,
    pub undefined_at_fault: u64,
    /// Addresses of what is the processor's own.
    pub ignored: Range<u64>,
}

#[cfg(test)]
impl Case {
    /// Of a single instruction: one that faults changes no flags.
    pub(crate) fn single(before: Machine, undefined: u64) -> Case {
        Case { before, undefined, undefined_at_fault: 0, ignored: 0..0 }
    }
}

/// All of them, the engines for code of 32 and for code of 64 bits.
pub(crate) struct Bench {
    /// Where this one can serve; without it the engines are compared with one another.
    host: Option<Native>,
    engines: [[Engine; 3]; 2],
}

impl Bench {
    /// Says so where the processor cannot serve.
    pub(crate) fn new() -> Bench {
        Bench { host: Native::take(), engines: [32, 64].map(|bits| Kind::ALL.map(|kind| Engine::new(kind, bits))) }
    }

    /// Runs code of 32 or 64 bits from each state. The processor says what is right, but the engines must agree in what
    /// is undefined, too. Says for each case where it faulted, if it did, or describes the
    /// first difference.
    pub(crate) fn check(&mut self, bits: u32, code: &[u8], cases: &[Case]) -> Result<Vec<Option<u64>>, String> {
        if cases.is_empty() {
            return Ok(Vec::new());
        }
        let [interpreter, compilers @ ..] = &mut self.engines[usize::from(bits == 64)];
        let mut faults = Vec::new();
        let warm: Vec<Machine> = cases.iter().take(3).map(|c| c.before.clone()).collect();
        if let Some(host) = &mut self.host {
            host.load(bits, code);
        }
        interpreter.load(code, &[])?;
        for compiler in &mut *compilers {
            compiler.load(code, &warm)?;
        }
        for Case { before, undefined, undefined_at_fault, ignored } in cases {
            let interpreted = interpreter.run(before)?;
            let expected = match &mut self.host {
                Some(host) => host.run(before),
                None => interpreted.clone(),
            };
            faults.push(expected.fault.map(|_| expected.rip));
            let undefined = if expected.fault.is_some() { *undefined_at_fault } else { *undefined };
            let units = !faults_into_mmx_state(bits, code, &expected);
            for (compiler, name) in compilers.iter_mut().zip(["quick", "compiled"]) {
                let compiled = compiler.run(before)?;
                let same = [&interpreted, &compiled].map(|m| normal(m.clone(), 0, true, bits));
                compare(before, "interpreted", name, &same[0], &same[1])?;
            }
            let image = faulting(bits, code, &expected).is_some_and(|i| is_image(&i));
            let [expected, interpreted] = [expected, interpreted].map(|mut m| {
                if let Some(f) = m.fault.as_mut().filter(|_| image) {
                    // Which byte of an image is tried first is up to the processor.
                    f.address &= !0xfff;
                }
                ignored.clone().for_each(|at| put(&mut m, at, &[0]));
                normal(m, undefined, units, bits)
            });
            compare(before, "processor", "interpreted", &expected, &interpreted)?;
        }
        Ok(faults)
    }
}

#[cfg(test)]
impl Bench {
    /// Runs code of 32 or 64 bits from each state on the engines alone, of which processors that differ in what they do
    /// there are no judges.
    pub(crate) fn agree(&mut self, bits: u32, code: &[u8], states: &[Machine]) -> Result<(), String> {
        let [interpreter, compilers @ ..] = &mut self.engines[usize::from(bits == 64)];
        interpreter.load(code, &[])?;
        for compiler in &mut *compilers {
            compiler.load(code, &states[..states.len().min(3)])?;
        }
        for before in states {
            let interpreted = normal(interpreter.run(before)?, 0, true, bits);
            for (compiler, name) in compilers.iter_mut().zip(["quick", "compiled"]) {
                let compiled = normal(compiler.run(before)?, 0, true, bits);
                compare(before, "interpreted", name, &interpreted, &compiled)?;
            }
        }
        Ok(())
    }
}

/// Whether an instruction loads or stores an image of the state of a unit.
pub(super) fn is_image(i: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(
        i.mnemonic(),
        Fldenv | Fnstenv | Fstenv | Frstor | Fnsave | Fsave | Fxsave | Fxsave64 | Fxrstor | Fxrstor64
    ) || matches!(i.mnemonic(), Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xsavec | Xsavec64 | Xrstor | Xrstor64)
}

/// The instruction that faulted.
fn faulting(bits: u32, code: &[u8], after: &Machine) -> Option<Instruction> {
    after.fault?;
    let code = code.get(after.rip.checked_sub(INSN)? as usize..)?;
    Some(Decoder::with_ip(bits, code, after.rip, DecoderOptions::NONE).decode())
}

/// Whether an instruction of SSE on MMX registers faulted: some processors have entered MMX state by then.
fn faults_into_mmx_state(bits: u32, code: &[u8], after: &Machine) -> bool {
    let Some(i) = faulting(bits, code, after) else { return false };
    let mmx = i.mnemonic() == Mnemonic::Cvtpi2ps || (0..i.op_count()).any(|n| i.op_register(n).is_mm());
    mmx && i.cpuid_features().iter().any(|&f| f != CpuidFeature::MMX)
}

/// Without what is the operating system's business, or undefined, such as x87 state if not `units`.
fn normal(mut m: Machine, undefined: u64, units: bool, bits: u32) -> Machine {
    if !units {
        m.fpu = Fpu { control: m.fpu.control, status: 0, tags: 0, st: [[0; 10]; 8] };
    }
    // A return from an interrupt meanwhile makes null selectors 0 (SDM vol. 2, IRET).
    m.segments.selectors = m.segments.selectors.map(|s| if s < 4 { 0 } else { s });
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
    line("segments".into(), &x.segments, &y.segments);
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
        // CPUID leaf 7, ECX bit 4: the operating system has them enabled.
        CpuidFeature::PKU => std::arch::x86_64::__cpuid_count(7, 0).ecx & 1 << 4 != 0,
        _ => true,
    }
}
