//! Every instruction that the largest model advertises, in every form that iced has a name for, against the host's
//! processor: vector, x87 and MMX state, privilege, and the faults of memory operands included.

use iced_x86::{Code, CpuidFeature, EncodingKind, FlowControl, Instruction, Mnemonic, OpCodeOperandKind, OpKind};

use super::forms::{self, Choice};
use super::{ABSENT, DATA, DATA_LEN, Fpu, Machine, READ_ONLY, Random};
use crate::cpuid::{CpuModel, Level};
use crate::state::flag;

#[cfg(test)]
mod tests;

/// Instructions that cannot run side by side, by the beginning of their mnemonic, and why.
const EXCEPTIONS: &[(&str, &str)] = &[
    ("Cpuid", "the models differ"),
    ("Rd", "clocks, counters, random numbers and the host's own FS and GS"),
    ("Wrfsbase", "the host's own FS"),
    ("Wrgsbase", "the host's own GS"),
    ("Xgetbv", "the host has other state components"),
    ("Xsave", "semantics/xsave/tests.rs: images hold the pointers that processors record differently"),
    ("Xrstor", "as XSAVE"),
    ("Fxsave", "as XSAVE"),
    ("Fxrstor", "as XSAVE"),
    ("Fnsave", "as XSAVE"),
    ("Fsave", "as XSAVE"),
    ("Frstor", "as XSAVE"),
    ("Fnstenv", "as XSAVE"),
    ("Fstenv", "as XSAVE"),
    ("Fldenv", "as XSAVE"),
    ("Reservednop", "processors differ in whether 0F 0D has a form without memory"),
    ("Popf", "TF would stop the host"),
    ("Lar", "the descriptor tables differ"),
    ("Lsl", "the descriptor tables differ"),
    ("Ver", "the descriptor tables differ"),
    ("Lds", "the descriptor tables differ"),
    ("Les", "the descriptor tables differ"),
    ("Lfs", "the descriptor tables differ"),
    ("Lgs", "the descriptor tables differ"),
    ("Lss", "the descriptor tables differ"),
    ("Sgdt", "operating systems emulate what UMIP forbids"),
    ("Sidt", "operating systems emulate what UMIP forbids"),
    ("Sldt", "operating systems emulate what UMIP forbids"),
    ("Smsw", "operating systems emulate what UMIP forbids"),
    ("Str", "operating systems emulate what UMIP forbids"),
];

/// Whether a code can run here.
fn comparable(code: Code) -> bool {
    use OpCodeOperandKind::*;
    let o = code.op_code();
    let name = format!("{:?}", code.mnemonic());
    let excepted = EXCEPTIONS.iter().any(|(start, _)| name.starts_with(start));
    let segment = o.op_kinds().iter().any(|k| matches!(k, seg_reg | es | cs | ss | ds | fs | gs));
    // A bit offset from a register reaches any address; integer.rs bounds it.
    let bit_string = matches!(code.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
        && !o.op_kinds().contains(&imm8);
    // Intel's processors read 16 bits, AMD's 32; integer.rs has it where both can be read.
    let narrow = code == Code::Movsxd_r16_rm16;
    !excepted && !segment && !bit_string && !narrow
}

/// A quadword of anything: numbers that floating point finds ordinary or special, edges, random bits.
fn word(r: &mut Random) -> u64 {
    const SINGLES: [u32; 8] =
        [0, 0x8000_0000, 0x3f80_0000, 0xc020_0000, 0x7f80_0000, 0x7fc0_0001, 0x0000_0123, 0x4f00_0000];
    const DOUBLES: [f64; 8] = [0.0, -0.0, 1.5, -2.25, f64::INFINITY, 1e300, 3e9, 1e-310];
    let pick = r.below(64) as usize;
    match r.below(16) {
        0..4 => u64::from(SINGLES[pick & 7]) | u64::from(SINGLES[pick >> 3]) << 32,
        4..7 => DOUBLES[pick & 7].to_bits(),
        7 => r.u64() & 0x8080_ff01_0080_7f01,
        8..11 => r.nasty(),
        _ => r.u64(),
    }
}

/// An 80-bit number of any class, unsupported ones included.
fn extended(r: &mut Random) -> [u8; 10] {
    let exponent = match r.below(8) {
        0 => 0,
        1 => 0x7fff,
        2 => r.below(0x8000),
        _ => 0x3fff - 40 + r.below(80),
    } as u16;
    let mantissa = match r.below(8) {
        0 => 0,
        1 => 1 << 63,
        2 => r.nasty(),
        _ => r.u64() | 1 << 63,
    };
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&mantissa.to_le_bytes());
    bytes[8..].copy_from_slice(&(exponent | (r.below(2) as u16) << 15).to_le_bytes());
    bytes
}

fn fpu(r: &mut Random) -> Fpu {
    // Mostly all exceptions masked; those that are not have not happened yet.
    let masks = if r.below(4) == 0 { r.below(64) as u16 } else { 0x3f };
    let precision = [0, 2, 3, 3][r.below(4) as usize];
    Fpu {
        control: 0x40 | masks | precision << 8 | (r.below(4) as u16) << 10,
        status: (r.below(8) as u16) << 11 | r.u64() as u16 & 0x4700 | r.u64() as u16 & masks,
        tags: if r.below(4) == 0 { r.u64() as u8 } else { 0xff },
        st: std::array::from_fn(|_| extended(r)),
    }
}

/// A state that `i` can run from.
pub(super) fn state(r: &mut Random, i: &Instruction) -> Machine {
    let mut gpr: [u64; 16] = std::array::from_fn(|_| word(r));
    let data = (0..DATA_LEN / 8).flat_map(|_| word(r).to_le_bytes()).collect();
    let at = match r.below(16) {
        // Faults: in the middle of the operand or at once, for lack of a page or of permission, or no address at all.
        0 => ABSENT - 1 - r.below(32),
        1 => ABSENT,
        2 => READ_ONLY,
        3 => 1 << 63 | DATA,
        // Across a page boundary.
        4 => DATA + 0xf8 + r.below(8),
        5 => DATA + 0x80 + r.below(64),
        6 => DATA + 0x80 + 16 * r.below(4),
        _ => DATA + 0x80,
    };
    // Intel's SHA instructions want an aligned operand, as the other legacy ones do; AMD's do not.
    let sha = i.cpuid_features().contains(&CpuidFeature::SHA) && i.code().op_code().encoding() == EncodingKind::Legacy;
    let at = if sha { at & !15 } else { at };
    // Pointers, and the stack.
    (gpr[6], gpr[7], gpr[4]) = (at, DATA + 0x80 + r.below(64), DATA + 0x100 + r.below(16));
    if i.mnemonic() == Mnemonic::Maskmovdqu
        || i.mnemonic() == Mnemonic::Vmaskmovdqu
        || i.mnemonic() == Mnemonic::Maskmovq
    {
        gpr[7] = at;
    }
    // XLAT's table, ENTER's and LEAVE's frame.
    if i.mnemonic() == Mnemonic::Xlatb {
        gpr[3] = DATA;
    }
    gpr[5] = DATA + 0x100;
    if r.below(2) == 0 {
        // Shift counts and lengths that are small enough to matter.
        (gpr[0], gpr[1], gpr[2]) = (r.below(18), r.below(70), r.below(18));
    }
    let mut m = Machine::new(gpr, r.u64() & flag::STATUS | 0x202, data);
    if r.below(6) == 0 {
        m.flags |= flag::AC;
    }
    m.ymm = std::array::from_fn(|_| std::array::from_fn(|_| word(r)));
    if r.below(2) == 0 {
        m.ymm[3] = [r.below(70), 0, 0, 0];
    }
    if i.is_vsib() {
        // Indices that stay in the data.
        let narrow = format!("{:?}", i.code()).contains("vm32");
        let r = (i.memory_index().number()) & 15;
        m.ymm[r] = m.ymm[r].map(|w| w & if narrow { 0xf_0000_000f } else { 0xf });
    }
    m.mxcsr = 0x1f80 | r.u64() as u32 & 0xe07f;
    if r.below(4) == 0 {
        m.mxcsr &= r.u64() as u32 | 0xe07f;
    }
    let mmx = i.mnemonic() == Mnemonic::Cvtpi2ps || (0..i.op_count()).any(|n| i.op_register(n).is_mm());
    if mmx && i.cpuid_features().iter().any(|&f| f != CpuidFeature::MMX) {
        // Some processors have entered MMX state when such an instruction faults.
        m.mxcsr |= 0x1f80;
        (m.gpr[6], m.gpr[7]) = (DATA + 0x80, DATA + 0x80);
    }
    m.fpu = fpu(r);
    if i.mnemonic() == Mnemonic::Cvtpi2ps && i.op1_kind() == OpKind::Memory {
        // Intel's processors enter MMX state, AMD's do not.
        (m.fpu.status, m.fpu.tags) = (m.fpu.status & 0x473f, 0xff);
    }
    if matches!(i.mnemonic(), Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr) && r.below(2) == 0 {
        m.data[0x80..0x84].copy_from_slice(&(r.u64() as u32 & 0xffff).to_le_bytes());
    }
    m
}

/// Calls `f` with every form of every instruction that can run in 32- or 64-bit code.
pub(super) fn each(r: &mut Random, bits: u32, mut f: impl FnMut(&mut Random, &[u8], &Instruction)) {
    let model = CpuModel::new(Level::Max, 1, 0);
    for code in forms::codes(bits).filter(|&c| comparable(c)) {
        let features = code.cpuid_features();
        if !features.iter().all(|&f| model.supports(f)) {
            continue;
        }
        for memory in [false, true] {
            for (n, imm) in [0x1b, 0x00, 0xe4, 0x7d].into_iter().enumerate() {
                let high = if bits == 64 { 8 * (n as u32 & 1 ^ u32::from(memory)) } else { 0 };
                let choice = Choice { imm, high, ..Choice::plain(bits, memory) };
                let Some(i) = forms::build(code, bits, &choice) else { continue };
                let has_imm = (0..i.op_count()).any(|k| i.op_kind(k) == OpKind::Immediate8);
                if n > 1 && !has_imm {
                    continue;
                }
                // Without operands that change with the choice, once is enough.
                let fixed = (0..i.op_count()).all(|k| i.op_kind(k) != OpKind::Register) && !has_imm;
                if n > 0 && fixed || i.flow_control() != FlowControl::Next {
                    continue;
                }
                let Ok(bytes) = forms::encode(&i, bits) else { continue };
                f(r, &bytes, &i);
            }
        }
    }
}
