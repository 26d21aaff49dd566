//! What of an outcome is compared: all that an instruction can change, but what is undefined, the processor's own, or the
//! operating system's.

use std::fmt::Write;
use std::ops::Range;

use iced_x86::{CpuidFeature, Decoder, DecoderOptions, Instruction, Mnemonic};

use super::every::put;
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

impl Case {
    /// Of a single instruction: one that faults changes no flags.
    pub(crate) fn single(before: Machine, undefined: u64) -> Case {
        Case { before, undefined, undefined_at_fault: 0, ignored: 0..0 }
    }

    /// What of the outcome of `code` is the same on the processor and here.
    pub(super) fn settled(&self, bits: u32, code: &[u8], mut after: Machine) -> Machine {
        let undefined = if after.fault.is_some() { self.undefined_at_fault } else { self.undefined };
        let units = !faults_into_mmx_state(bits, code, &after);
        let image = faulting(bits, code, &after).is_some_and(|i| is_image(&i));
        if let Some(f) = after.fault.as_mut().filter(|_| image) {
            // Which byte of an image is tried first is up to the processor.
            f.address &= !0xfff;
        }
        self.ignored.clone().for_each(|at| put(&mut after, at, &[0]));
        normal(after, undefined, units, bits)
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
pub(super) fn normal(mut m: Machine, undefined: u64, units: bool, bits: u32) -> Machine {
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

pub(super) fn compare(before: &Machine, a: &str, b: &str, x: &Machine, y: &Machine) -> Result<(), String> {
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
