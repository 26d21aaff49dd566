//! Every instruction that the largest model advertises, in every form that iced has a name for, against the host's
//! processor: vector, x87 and MMX state, privilege, and the faults of memory operands included.

use std::ops::Range;

use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, Encoder, EncodingKind, FlowControl, Instruction, MandatoryPrefix,
    MemorySize, Mnemonic, OpCodeOperandKind, OpCodeTableKind, OpKind, Register,
};

use super::forms::{self, Choice};
use super::integer::undefined;
use super::outcome::{Case, is_image};
use super::{ABSENT, DATA, DATA_LEN, EDGE, EDGE_LEN, Fpu, INSN, Machine, READ_ONLY, Random, TAKEN};
use crate::cpuid::{CpuModel, Level};
use crate::state::flag;

#[cfg(test)]
mod tests;

/// Instructions that cannot run side by side, by the beginning of their code's name, and why: all of those advertised
/// that [`each`] leaves out.
const EXCEPTIONS: &[(&str, &str)] = &[
    ("Cpuid", "the models differ"),
    ("Rdtsc", "a clock"),
    ("Rdpmc", "a counter; whether user mode may read it is the operating system's choice"),
    ("Rdrand", "random numbers"),
    ("Rdseed", "random numbers"),
    ("Rdpid", "the host's own number"),
    ("Xgetbv", "the host has other state components"),
    ("Reservednop", "processors differ in whether 0F 0D has a form without memory"),
    ("Sgdt", "operating systems emulate what UMIP forbids"),
    ("Sidt", "operating systems emulate what UMIP forbids"),
    ("Sldt", "operating systems emulate what UMIP forbids"),
    ("Smsw", "operating systems emulate what UMIP forbids"),
    ("Str_", "operating systems emulate what UMIP forbids"),
    ("Syscall", "enters the operating system"),
    ("Sysenter", "enters the operating system"),
    ("Sysexit", "undefined in AMD's 64-bit and compatibility modes"),
    ("Jmp_m1664", "AMD's processors have no 64-bit far pointers"),
    ("Call_m1664", "AMD's processors have no 64-bit far pointers"),
    ("Lss_r64", "AMD's processors have no 64-bit far pointers"),
    ("Lfs_r64", "AMD's processors have no 64-bit far pointers"),
    ("Lgs_r64", "AMD's processors have no 64-bit far pointers"),
    ("Int1", "hypervisors differ in what they say where it was"),
    ("Popw_CS", "the two-byte escape"),
];

/// Codes with an operand size of 16 bits that cut the instruction pointer to it, which leads out of the window.
fn leaves_the_window(code: Code) -> bool {
    use Code::*;
    let rel16 =
        code.op_code().op_kinds().iter().any(|k| matches!(k, OpCodeOperandKind::br16_1 | OpCodeOperandKind::br16_2));
    rel16
        || matches!(
            code,
            Jmp_rm16
                | Call_rm16
                | Jmp_m1616
                | Call_m1616
                | Jmp_ptr1616
                | Call_ptr1616
                | Retnw
                | Retnw_imm16
                | Retfw
                | Retfw_imm16
                | Iretw
        )
}

/// Why a code cannot run here in a mode of `bits`, if so.
fn exception(code: Code, bits: u32) -> Option<&'static str> {
    let name = format!("{code:?}");
    if leaves_the_window(code) {
        return Some("the instruction pointer is cut to 16 bits");
    }
    if bits == 32 && code == Code::Sysretd {
        return Some("undefined in Intel's compatibility mode");
    }
    EXCEPTIONS.iter().find(|(start, _)| name.starts_with(start)).map(|(_, why)| *why)
}

/// A quadword of anything: numbers that floating point finds ordinary or special, edges, random bits.
fn word(r: &mut Random) -> u64 {
    // Zeros, ordinary numbers, infinities, quiet and signalling NaNs, the ends of the denormal and normal ranges, and
    // numbers that no integer has.
    const SINGLES: [u32; 16] = [
        0,
        0x8000_0000,
        0x3f80_0000,
        0xc020_0000,
        0x7f80_0000,
        0xff80_0000,
        0x7fc0_0001,
        0xffd2_3456,
        0x7f81_2345,
        0xff80_0001,
        0x0000_0123,
        0x807f_ffff,
        0x0080_0000,
        0x7f7f_ffff,
        0x4f00_0000,
        0xdf00_0001,
    ];
    const DOUBLES: [u64; 16] = [
        0,
        1 << 63,
        0x3ff8_0000_0000_0000,
        0xc002_0000_0000_0000,
        0x7ff0_0000_0000_0000,
        0xfff0_0000_0000_0000,
        0x7ff8_0000_0000_0001,
        0xfff9_2345_6789_abcd,
        0x7ff4_3210_0000_0000,
        0xfff0_0000_0000_0001,
        0x0000_1268_8b70_e62b,
        0x800f_ffff_ffff_ffff,
        0x0010_0000_0000_0000,
        0x7fef_ffff_ffff_ffff,
        0x41e6_5a0b_c000_0000,
        0xc3e0_0000_0000_0001,
    ];
    let pick = r.below(256) as usize;
    match r.below(16) {
        0..4 => u64::from(SINGLES[pick & 15]) | u64::from(SINGLES[pick >> 4]) << 32,
        4..7 => DOUBLES[pick & 15],
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

/// Selectors of all kinds, of the descriptors that engine.rs has from Linux, and beyond them.
const SELECTORS: [u16; 20] =
    [0, 1, 3, 0x08, 0x0b, 0x10, 0x13, 0x18, 0x1b, 0x20, 0x22, 0x23, 0x2b, 0x2b, 0x2b, 0x33, 0x40, 0x83, 0x0f, 0xffff];

fn selector(r: &mut Random) -> u16 {
    SELECTORS[r.below(SELECTORS.len() as u64) as usize]
}

/// A code segment to go on in: mostly the one there is.
fn code_selector(r: &mut Random, bits: u32) -> u16 {
    let own = if bits == 32 { 0x23 } else { 0x33 };
    let other = selector(r);
    // The code of the other size would go on in the middle of this one's.
    let other_size = other & !3 == 0x53 - own & !3;
    match r.below(4) {
        0 if !other_size => other,
        1 => own - r.below(4) as u16,
        _ => own,
    }
}

/// Writes to the part of memory that is compared, as far as it is there.
pub(super) fn put(m: &mut Machine, at: u64, bytes: &[u8]) {
    for (at, &b) in (at..).zip(bytes) {
        let inside = at.checked_sub(DATA).filter(|&n| n < DATA_LEN as u64);
        let edge = at.checked_sub(EDGE).filter(|&n| n < EDGE_LEN as u64).map(|n| n + DATA_LEN as u64);
        if let Some(n) = inside.or(edge) {
            m.data[n as usize] = b;
        }
    }
}

/// What a far or near transfer through memory finds at `at`, and selectors to load.
fn targets(r: &mut Random, m: &mut Machine, i: &Instruction, bits: u32, at: u64) {
    use Mnemonic::*;
    let size = match i.code() {
        Code::Retfd | Code::Retfd_imm16 | Code::Iretd | Code::Call_m1632 | Code::Jmp_m1632 => 4,
        _ => bits as usize / 8,
    };
    let offset = if r.below(8) == 0 { word(r) & 0x7fff_ffff | 1 << 63 } else { TAKEN };
    if offset != TAKEN {
        // Whether the target or the stack is looked at first is up to the processor.
        m.flags &= !flag::AC;
    }
    let mut offset = offset.to_le_bytes()[..size].to_vec();
    if size == 4 {
        offset = (TAKEN as u32).to_le_bytes().to_vec();
    }
    let cs = code_selector(r, bits);
    if matches!(i.mnemonic(), Retf | Iret | Iretd | Iretq) {
        m.flags &= !flag::AC;
    }
    let wide = |v: u64| v.to_le_bytes()[..size].to_vec();
    match i.mnemonic() {
        Jmp | Call if i.op0_kind() == OpKind::Memory => {
            put(m, at, &offset);
            put(m, at + size as u64, &cs.to_le_bytes());
        }
        Jmp | Call if i.op0_kind() == OpKind::Register => m.gpr[i.op0_register().number()] = TAKEN,
        Ret => put(m, m.gpr[4], &wide(TAKEN)),
        Retf => put(m, m.gpr[4], &[wide(TAKEN), wide(cs.into())].concat()),
        Iret | Iretd | Iretq => {
            let flags = r.u64() & (flag::STATUS | flag::DF | flag::AC | flag::ID) | 0x202;
            let sp = DATA + 0x100 + r.below(16);
            let ss = if r.below(8) == 0 { selector(r) } else { 0x2b };
            put(m, m.gpr[4], &[TAKEN, cs.into(), flags, sp, ss.into()].map(wide).concat());
        }
        Popf | Popfd | Popfq => {
            let flags = r.u64() & (flag::DEFINED & !(flag::TF | flag::NT)) | 2;
            put(m, m.gpr[4], &flags.to_le_bytes());
        }
        Loop | Loope | Loopne | Jcxz | Jecxz | Jrcxz if r.below(2) == 0 => m.gpr[1] = r.below(3) | r.below(2) << 32,
        Lar | Lsl | Verr | Verw | Mov | Lds | Les | Lfs | Lgs | Lss | Pop => {
            let loads = i.mnemonic() != Mov && i.mnemonic() != Pop || i.op0_register().is_segment_register();
            if loads {
                let s = selector(r);
                for n in [1, 9] {
                    m.gpr[n] = m.gpr[n] & !0xffff | u64::from(s);
                }
                let before = match i.code() {
                    Code::Lfs_r16_m1616 | Code::Lgs_r16_m1616 | Code::Lss_r16_m1616 => 2,
                    Code::Les_r16_m1616 | Code::Lds_r16_m1616 => 2,
                    Code::Lfs_r64_m1664 | Code::Lgs_r64_m1664 | Code::Lss_r64_m1664 => 8,
                    _ if matches!(i.mnemonic(), Lds | Les | Lfs | Lgs | Lss) => 4,
                    _ => 0,
                };
                let place = if i.mnemonic() == Pop { m.gpr[4] } else { at };
                put(m, place + before, &s.to_le_bytes());
            }
        }
        _ => {}
    }
}

/// What the instructions that load whole images find at `at`: mostly something that they can.
fn image(r: &mut Random, m: &mut Machine, i: &Instruction, at: u64) {
    use Mnemonic::*;
    let name = i.mnemonic();
    let extended = matches!(name, Xsave | Xsave64 | Xsavec | Xsavec64 | Xsaveopt | Xsaveopt64 | Xrstor | Xrstor64);
    if extended {
        (m.gpr[0], m.gpr[2]) = (r.below(8), r.u64() & 0xffff_ffff);
    }
    if extended || matches!(name, Fxsave | Fxsave64 | Fxrstor | Fxrstor64) {
        // Whether #GP or #AC is raised is up to the processor.
        m.flags &= !flag::AC;
    }
    match name {
        Fxrstor | Fxrstor64 | Xrstor | Xrstor64 => {
            let reserved = if r.below(8) == 0 { 1 << (18 + r.below(14)) } else { 0 };
            let mxcsr = r.u64() as u32 & 0xffff | reserved;
            put(m, at, &fpu(r).image(mxcsr)[..160]);
            if !matches!(name, Xrstor | Xrstor64) {
                return;
            }
            let mut header = [0u64; 8];
            header[0] = r.below(8);
            if r.below(3) == 0 {
                header[1] = 1 << 63 | header[0] | r.below(8);
            }
            if r.below(6) == 0 {
                // Components that neither has, or reserved fields.
                let bit = [3, 4, 8, 10, 20, 62][r.below(6) as usize];
                header[r.below(8) as usize] ^= 1 << bit;
            }
            put(m, at + 512, &header.map(u64::to_le_bytes).concat());
        }
        Frstor | Fldenv if r.below(4) != 0 => {
            let unit = fpu(r);
            let step = if i.memory_size().size() == 28 || i.memory_size().size() == 108 { 4 } else { 2 };
            put(m, at, &unit.control.to_le_bytes());
            put(m, at + step, &unit.status.to_le_bytes());
        }
        _ => {}
    }
}

/// Whether the operand is accessed a field at a time, so that only some of it has faulted when it leads out of the
/// canonical addresses. How much, and whether an image's alignment is looked at before, is up to the processor; so is
/// whether elements beyond 4 GiB of a 32-bit address are there or at 0.
fn by_fields(i: &Instruction) -> bool {
    use Mnemonic::*;
    let masked = matches!(i.mnemonic(), Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq);
    is_image(i)
        || masked && i.memory_base().size() == 4
        || matches!(i.mnemonic(), Maskmovq | Maskmovdqu | Vmaskmovdqu)
        || matches!(i.memory_size(), MemorySize::Float80 | MemorySize::Bcd)
}

/// A state that `i` of 32- or 64-bit code can run from.
pub(super) fn state(r: &mut Random, i: &Instruction, bits: u32) -> Machine {
    let mut gpr: [u64; 16] = std::array::from_fn(|_| word(r));
    let data = (0..(DATA_LEN + EDGE_LEN) / 8).flat_map(|_| word(r).to_le_bytes()).collect();
    let at = match r.below(16) {
        // Faults: in the middle of the operand or at once, for lack of a page or of permission, or no address at all.
        0 => ABSENT - 1 - r.below(32),
        1 => ABSENT,
        2 => READ_ONLY,
        3 if bits == 32 || by_fields(i) || r.below(2) == 0 => 1 << 63 | (DATA + 0x80),
        3 => (1 << 47) - r.below(20),
        // Across a page boundary.
        4 => DATA + 0xf8 + r.below(8),
        5 => DATA + 0x80 + r.below(64),
        6 => DATA + 0x80 + 16 * r.below(4),
        7 => ABSENT - 64 * (1 + r.below(3)),
        _ => DATA + 0x80,
    };
    // Intel's SHA instructions want an aligned operand, as the other legacy ones do; AMD's do not.
    let sha = i.cpuid_features().contains(&CpuidFeature::SHA) && i.code().op_code().encoding() == EncodingKind::Legacy;
    let at = if sha { at & !15 } else { at };
    // Intel's processors read 16 bits, AMD's 32: where both can.
    let at = if i.code() == Code::Movsxd_r16_rm16 { DATA + 0x80 } else { at };
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
    gpr[5] = if i.memory_base() == Register::RBP { at } else { DATA + 0x100 };
    if matches!(i.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc) {
        // A bit offset from a register reaches any address.
        let offset = (r.below(1024) as i64 - 512) as u64;
        (gpr[0], gpr[8]) = (offset, offset);
    } else if i.is_string_instruction() {
        gpr[1] = r.below(20);
        gpr[6] = if r.below(8) == 0 { at } else { DATA + 0x100 + r.below(16) };
        gpr[7] = DATA + 0x100 + r.below(16);
    } else if r.below(2) == 0 {
        // Shift counts and lengths that are small enough to matter.
        (gpr[0], gpr[1], gpr[2]) = (r.below(18), r.below(70), r.below(18));
    }
    let mut m = Machine::new(gpr, r.u64() & (flag::STATUS | flag::DF) | 0x202, data);
    // Which of two operands that fault does is up to the processor.
    let compares = i.is_string_instruction()
        && matches!(i.mnemonic(), Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq);
    if r.below(6) == 0 && i.code() != Code::Movsxd_r16_rm16 && !compares {
        m.flags |= flag::AC;
    }
    m.segments.fs_base = if r.below(16) == 0 && !by_fields(i) && !sha {
        (1 << 47) - (DATA + 0x80) - r.below(20)
    } else {
        64 * r.below(2)
    };
    m.segments.gs_base = 16 * r.below(4);
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
    m.fpu = fpu(r);
    if i.mnemonic() == Mnemonic::Cvtpi2ps && i.op1_kind() == OpKind::Memory {
        // Intel's processors enter MMX state, AMD's do not.
        (m.fpu.status, m.fpu.tags) = (m.fpu.status & 0x473f, 0xff);
    }
    if matches!(i.mnemonic(), Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr) && r.below(2) == 0 {
        m.data[0x80..0x84].copy_from_slice(&(r.u64() as u32 & 0xffff).to_le_bytes());
    }
    let at = if i.memory_base().is_gpr32() { at & 0xffff_ffff } else { at };
    let at = if i.is_ip_rel_memory_operand() { i.memory_displacement64() } else { at };
    let based = match i.segment_prefix() {
        Register::FS => at.wrapping_add(m.segments.fs_base),
        Register::GS => at.wrapping_add(m.segments.gs_base),
        _ => at,
    };
    targets(r, &mut m, i, bits, based);
    image(r, &mut m, i, based);
    if bits == 32 {
        m.gpr = m.gpr.map(|v| v & 0xffff_ffff);
    }
    m
}

/// Prefixes before instructions with memory operands: overrides, those that 64-bit mode ignores among them, a shorter
/// address, and repetition where it means nothing.
const PREFIXES: &[&[u8]] =
    &[&[0x64], &[0x65], &[0x26], &[0x2e], &[0x36], &[0x3e], &[0x67], &[0x67, 0x65], &[0xf2], &[0xf3], &[0xf0]];

/// Whether `prefix` may stand before `i` without making it something else, or a case of undefined.rs.
fn takes(i: &Instruction, prefix: &[u8], bits: u32) -> bool {
    let o = i.code().op_code();
    let legacy_one_byte = o.encoding() == EncodingKind::Legacy && o.table() == OpCodeTableKind::Normal;
    match prefix {
        [0xf0] => o.can_use_lock_prefix(),
        // WAIT is an instruction of its own, in front of which a prefix would have no operand.
        _ if o.fwait() => false,
        // AMD's processors take the condition from the prefix.
        [0xf2 | 0xf3] if matches!(i.mnemonic(), Mnemonic::Loope | Mnemonic::Loopne) => false,
        [0xf2 | 0xf3] => legacy_one_byte && o.mandatory_prefix() == MandatoryPrefix::None,
        // 16-bit addresses do not reach the window.
        [0x67, ..] => bits == 64,
        _ => true,
    }
}

/// The forms of a code's operands for one choice of registers: one for each segment register, where there is one.
fn forms_of(code: Code, bits: u32, choice: &Choice) -> Vec<Instruction> {
    let Some(i) = forms::build(code, bits, choice) else { return Vec::new() };
    let kinds = code.op_code().op_kinds();
    if let Some(n) = kinds.iter().position(|&k| k == OpCodeOperandKind::seg_reg) {
        let all = [Register::ES, Register::CS, Register::SS, Register::DS, Register::FS, Register::GS];
        return all
            .map(|s| {
                let mut i = i;
                i.set_op_register(n as u32, s);
                i
            })
            .to_vec();
    }
    vec![i]
}

/// The bytes of `i` at `ip`, branches leading to [`TAKEN`] and absolute addresses into the data.
fn encode(mut i: Instruction, bits: u32, ip: u64) -> Option<Vec<u8>> {
    for n in 0..i.op_count() {
        match i.op_kind(n) {
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => i.set_near_branch64(TAKEN),
            OpKind::FarBranch32 => {
                i.set_far_branch32(TAKEN as u32);
                i.set_far_branch_selector(0x23);
            }
            OpKind::Memory if i.code().op_code().op_kinds()[n as usize] == OpCodeOperandKind::mem_offs => {
                i.set_memory_displacement64(DATA + 0x90);
            }
            _ => {}
        }
    }
    let mut encoder = Encoder::new(bits);
    encoder.encode(&i, ip).ok()?;
    Some(encoder.take_buffer())
}

/// What an image has that is the processor's own: which bits of MXCSR there are (SDM vol. 1 §11.6.6).
fn ignored(i: &Instruction, m: &Machine) -> Range<u64> {
    use Mnemonic::*;
    if !matches!(i.mnemonic(), Fxsave | Fxsave64 | Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xsavec | Xsavec64) {
        return 0..0;
    }
    let at = i.virtual_address(0, 0, |r, _, _| match r {
        Register::FS => Some(m.segments.fs_base),
        Register::GS => Some(m.segments.gs_base),
        r if r.is_segment_register() => Some(0),
        r => Some(m.gpr[r.full_register().number()] & if r.size() == 4 { 0xffff_ffff } else { u64::MAX }),
    });
    at.map_or(0..0, |at| at.wrapping_add(28)..at.wrapping_add(32))
}

/// A state that `i` of 32- or 64-bit code can run from, and what it leaves open; `None` if that may be its result.
pub(super) fn case(r: &mut Random, i: &Instruction, bits: u32) -> Option<Case> {
    let m = state(r, i, bits);
    let undefined = undefined(i, m.gpr[1])?;
    let ignored = ignored(i, &m);
    Some(Case { ignored, ..Case::single(m, undefined) })
}

/// How many cases `i` is worth: prefixes and other address registers do the same with fewer.
pub(super) fn worth(i: &Instruction, bits: u32) -> u64 {
    let base = if bits == 64 { Register::RSI } else { Register::ESI };
    let plain = i.segment_prefix() == Register::None
        && !i.has_lock_prefix()
        && [Register::None, base].contains(&i.memory_base());
    if plain { 32 } else { 8 }
}

/// Calls `f` with every form of every instruction that can run in 32- or 64-bit code.
pub(super) fn each(r: &mut Random, bits: u32, mut f: impl FnMut(&mut Random, &[u8], &Instruction)) {
    let model = CpuModel::new(Level::Max, 1, 0);
    for code in forms::codes(bits).filter(|&c| exception(c, bits).is_none()) {
        if !model.executes(code) {
            continue;
        }
        for memory in [false, true] {
            for (n, imm) in [0x1b, 0x00, 0xe4, 0x7d].into_iter().enumerate() {
                let high = if bits == 64 { 8 * (n as u32 & 1 ^ u32::from(memory)) } else { 0 };
                let plain = Choice { imm, high, ..Choice::plain(bits, memory) };
                for i in forms_of(code, bits, &plain) {
                    let has_imm = (0..i.op_count()).any(|k| i.op_kind(k) == OpKind::Immediate8);
                    if n > 1 && !has_imm {
                        continue;
                    }
                    // Without operands that change with the choice, once is enough.
                    let fixed = (0..i.op_count()).all(|k| i.op_kind(k) != OpKind::Register) && !has_imm;
                    if n > 0 && fixed {
                        continue;
                    }
                    let Some(bytes) = encode(i, bits, INSN) else { continue };
                    let mut form = |bytes: &[u8]| {
                        // The last one, as some have WAIT before them.
                        let decoder = Decoder::with_ip(bits, bytes, INSN, DecoderOptions::NONE);
                        if let Some(i) = decoder.into_iter().last().filter(|i| !i.is_invalid()) {
                            f(r, bytes, &i);
                        }
                    };
                    form(&bytes);
                    if n > 0 {
                        continue;
                    }
                    let implied = i.is_string_instruction() || i.flow_control() != FlowControl::Next;
                    let prefixes = if memory || implied { PREFIXES } else { &[] };
                    let prefixed = prefixes
                        .iter()
                        .filter(|p| takes(&i, p, bits))
                        .filter_map(|p| Some([*p, &encode(i, bits, INSN + p.len() as u64)?].concat()));
                    for bytes in prefixed.chain(other_addresses(code, bits, &plain)) {
                        form(&bytes);
                    }
                }
            }
        }
    }
}

/// The memory forms with other address registers: RBP's default segment is SS, and there are bases that encode
/// specially.
fn other_addresses(code: Code, bits: u32, plain: &Choice) -> Vec<Vec<u8>> {
    let kinds = code.op_code().op_kinds();
    let explicit = !kinds.iter().any(|&k| matches!(k, OpCodeOperandKind::mem_offs | OpCodeOperandKind::seg_rBX_al));
    if !plain.memory || !explicit {
        return Vec::new();
    }
    let build = |base, displacement| forms::build(code, bits, &Choice { base, displacement, ..*plain });
    let frame = if bits == 64 { Register::RBP } else { Register::EBP };
    let frame = build(frame, 0);
    let overridden = frame.map(|mut i| {
        i.set_segment_prefix(Register::DS);
        i
    });
    let mut all: Vec<_> = frame.into_iter().chain(overridden).collect();
    if bits == 64
        && let Some(mut i) = build(Register::RIP, 0)
        && !i.is_vsib()
    {
        i.set_memory_displacement64(DATA + 0x80);
        i.set_memory_displ_size(8);
        all.push(i);
    }
    all.into_iter().filter_map(|i| encode(i, bits, INSN)).collect()
}
