//! Any instruction that iced names, encoded: for tests and tables that must not forget one.

use iced_x86::{Code, Encoder, EncodingKind, Instruction, OpCodeOperandKind, OpKind, Register};

/// Which registers and addresses an encoded instruction uses.
#[derive(Clone, Copy)]
pub struct Choice {
    /// Whether an operand that may be either is memory.
    pub memory: bool,
    /// Added to every register number but the base's: 0 or 8.
    pub high: u32,
    /// The immediate, cut to its size.
    pub imm: u64,
    /// Base register of memory operands.
    pub base: Register,
    /// Displacement from it.
    pub displacement: i32,
}

impl Choice {
    /// Low registers, `[rsi]` or its kin in the mode.
    pub fn plain(bits: u32, memory: bool) -> Choice {
        let base = match bits {
            64 => Register::RSI,
            32 => Register::ESI,
            _ => Register::SI,
        };
        Choice { memory, high: 0, imm: 1, base, displacement: 0 }
    }
}

/// The first of a row of registers that an operand may be: numbers are added to it.
fn register(kind: OpCodeOperandKind, c: &Choice) -> Option<Register> {
    use OpCodeOperandKind::*;
    let (first, number) = match kind {
        // AL to BH are numbered otherwise than the rest.
        r8_or_mem if c.memory => return Option::None,
        r8_reg => (Register::AL, 0),
        r8_opcode => (Register::AL, 3),
        r8_or_mem => (Register::AL, 1),
        r16_or_mem | r32_or_mem | r64_or_mem | mm_or_mem | xmm_or_mem | ymm_or_mem if c.memory => return Option::None,
        r16_reg | r16_reg_mem => (Register::AX, 0),
        r16_rm | r16_or_mem => (Register::AX, 1),
        r16_opcode => (Register::AX, 3),
        r32_reg | r32_reg_mem => (Register::EAX, 0),
        r32_rm | r32_or_mem => (Register::EAX, 1),
        r32_opcode => (Register::EAX, 3),
        r32_vvvv => (Register::EAX, 2),
        r64_reg | r64_reg_mem => (Register::RAX, 0),
        r64_rm | r64_or_mem => (Register::RAX, 1),
        r64_opcode => (Register::RAX, 3),
        r64_vvvv => (Register::RAX, 2),
        mm_reg => return Some(Register::MM1),
        mm_rm | mm_or_mem => return Some(Register::MM3),
        xmm_reg => (Register::XMM0, 1),
        xmm_vvvv => (Register::XMM0, 2),
        xmm_rm | xmm_or_mem => (Register::XMM0, 3),
        xmm_is4 => (Register::XMM0, 4),
        ymm_reg => (Register::YMM0, 1),
        ymm_vvvv => (Register::YMM0, 2),
        ymm_rm | ymm_or_mem => (Register::YMM0, 3),
        ymm_is4 => (Register::YMM0, 4),
        seg_reg => return Some(Register::FS),
        es => return Some(Register::ES),
        cs => return Some(Register::CS),
        ss => return Some(Register::SS),
        ds => return Some(Register::DS),
        fs => return Some(Register::FS),
        gs => return Some(Register::GS),
        cr_reg => return Some(Register::CR3),
        dr_reg => return Some(Register::DR0),
        al => return Some(Register::AL),
        cl => return Some(Register::CL),
        ax => return Some(Register::AX),
        dx => return Some(Register::DX),
        eax => return Some(Register::EAX),
        rax => return Some(Register::RAX),
        st0 => return Some(Register::ST0),
        sti_opcode => return Some(Register::ST2),
        _ => return Option::None,
    };
    let number = if first == Register::AL && c.high != 0 { number + 4 } else { number };
    Some(first + number + c.high)
}

/// An immediate operand's kind and how many bits of it count.
fn immediate(kind: OpCodeOperandKind) -> Option<(OpKind, u32)> {
    use OpCodeOperandKind::*;
    Some(match kind {
        imm8 => (OpKind::Immediate8, 8),
        imm8sex16 => (OpKind::Immediate8to16, 8),
        imm8sex32 => (OpKind::Immediate8to32, 8),
        imm8sex64 => (OpKind::Immediate8to64, 8),
        imm16 => (OpKind::Immediate16, 16),
        imm32 => (OpKind::Immediate32, 32),
        imm32sex64 => (OpKind::Immediate32to64, 32),
        imm64 => (OpKind::Immediate64, 64),
        _ => return Option::None,
    })
}

/// A string instruction's implied operand in code of `bits`.
fn implied(kind: OpCodeOperandKind, bits: u32) -> Option<OpKind> {
    use OpCodeOperandKind::*;
    let of = |k: [OpKind; 3]| {
        Some(match bits {
            64 => k[2],
            32 => k[1],
            _ => k[0],
        })
    };
    match kind {
        seg_rSI => of([OpKind::MemorySegSI, OpKind::MemorySegESI, OpKind::MemorySegRSI]),
        es_rDI => of([OpKind::MemoryESDI, OpKind::MemoryESEDI, OpKind::MemoryESRDI]),
        seg_rDI => of([OpKind::MemorySegDI, OpKind::MemorySegEDI, OpKind::MemorySegRDI]),
        _ => Option::None,
    }
}

fn branch(kind: OpCodeOperandKind) -> Option<OpKind> {
    use OpCodeOperandKind::*;
    match kind {
        br16_1 | br16_2 => Some(OpKind::NearBranch16),
        br32_1 | br32_4 => Some(OpKind::NearBranch32),
        br64_1 | br64_4 => Some(OpKind::NearBranch64),
        farbr2_2 => Some(OpKind::FarBranch16),
        farbr4_2 => Some(OpKind::FarBranch32),
        _ => Option::None,
    }
}

fn is_memory(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind::*;
    let vsib = matches!(kind, mem_vsib32x | mem_vsib64x | mem_vsib32y | mem_vsib64y);
    let either = matches!(kind, r8_or_mem | r16_or_mem | r32_or_mem | r64_or_mem | mm_or_mem | xmm_or_mem | ymm_or_mem);
    vsib || either || matches!(kind, mem | mem_offs | seg_rBX_al)
}

/// An instruction of `code` for a mode of `bits`; with [`Choice::memory`] only if it has a form with memory.
pub fn build(code: Code, bits: u32, c: &Choice) -> Option<Instruction> {
    use OpCodeOperandKind::*;
    let mut i = Instruction::default();
    i.set_code(code);
    let mut has_memory = false;
    let mut immediates = 0;
    for (n, &kind) in (0..).zip(code.op_code().op_kinds()) {
        if let Some(r) = register(kind, c) {
            i.set_op_register(n, r);
        } else if kind == imm8_const_1 {
            i.set_op_kind(n, OpKind::Immediate8);
            i.set_immediate8(1);
        } else if kind == imm8 && immediates > 0 {
            i.set_op_kind(n, OpKind::Immediate8_2nd);
            i.set_immediate8_2nd(c.imm as u8 & 31);
        } else if let Some((kind, width)) = immediate(kind) {
            immediates += 1;
            i.set_op_kind(n, kind);
            let unused = 64 - width;
            let value = match kind {
                OpKind::Immediate8 | OpKind::Immediate16 | OpKind::Immediate32 => c.imm << unused >> unused,
                _ => ((c.imm << unused) as i64 >> unused) as u64,
            };
            i.set_immediate_u64(n, value);
        } else if let Some(kind) = implied(kind, bits) {
            i.set_op_kind(n, kind);
        } else if let Some(kind) = branch(kind) {
            i.set_op_kind(n, kind);
            if matches!(kind, OpKind::FarBranch16 | OpKind::FarBranch32) {
                i.set_far_branch_selector(8);
            }
        } else if !is_memory(kind) {
            return Option::None;
        } else {
            i.set_op_kind(n, OpKind::Memory);
            has_memory = true;
            if kind == mem_offs {
                i.set_memory_displ_size(bits / 8);
                continue;
            }
            i.set_memory_base(if kind == seg_rBX_al { Register::RBX } else { c.base });
            if kind == seg_rBX_al {
                i.set_memory_base(match bits {
                    64 => Register::RBX,
                    32 => Register::EBX,
                    _ => Register::BX,
                });
                i.set_memory_index(Register::AL);
                continue;
            }
            i.set_memory_index(match kind {
                mem_vsib32x | mem_vsib64x => Register::XMM5,
                mem_vsib32y | mem_vsib64y => Register::YMM5,
                _ => Register::None,
            });
            if i.memory_index() != Register::None {
                i.set_memory_index_scale(4);
                // No vector index goes with a 16-bit base.
                if bits == 16 {
                    i.set_memory_base(Register::ESI);
                }
            }
            if c.displacement != 0 {
                i.set_memory_displacement64(i64::from(c.displacement) as u64);
                i.set_memory_displ_size(1);
            }
        }
    }
    (has_memory || !c.memory).then_some(i)
}

/// The bytes of an instruction of [`build`].
pub fn encode(i: &Instruction, bits: u32) -> Result<Vec<u8>, String> {
    let mut encoder = Encoder::new(bits);
    encoder.encode(i, 0).map_err(|e| e.to_string())?;
    Ok(encoder.take_buffer())
}

/// The codes that an Intel processor decodes in a mode of `bits`, apart from EVEX and other encodings that no model has.
pub fn codes(bits: u32) -> impl Iterator<Item = Code> {
    Code::values().filter(move |&c| {
        let o = c.op_code();
        let mode = match bits {
            64 => o.mode64() && o.intel_decoder64(),
            32 => o.mode32() && o.intel_decoder32(),
            _ => o.mode16() && o.intel_decoder16(),
        };
        mode && o.is_instruction() && matches!(o.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpuid::{CpuModel, Level};
    use crate::decode::decode;
    use crate::insn::Mode;
    use crate::semantics::is_undefined;

    /// Advertised instructions that raise #UD all the same, and why.
    const EXCEPTIONS: &[(&str, &str)] = &[
        ("Ud0", "undefined is what it is for"),
        ("Ud1", "undefined is what it is for"),
        ("Ud2", "undefined is what it is for"),
        ("Popw_CS", "of the 8086 only; 0FH is the two-byte escape since"),
    ];

    #[test]
    fn what_is_advertised_has_semantics() {
        let modes = [(64, Mode::CODE64 | Mode::FLAT), (32, Mode::CODE32 | Mode::STACK32 | Mode::FLAT), (16, 0)];
        let mut missing = Vec::new();
        for level in [Level::V2, Level::V3, Level::Max] {
            let model = CpuModel::new(level, 1, 0);
            for (bits, mode) in modes {
                let mode = Mode(mode | Mode::SSE | Mode::AVX);
                let mut seen = 0;
                for code in codes(bits).filter(|&c| model.executes(c)) {
                    let name = format!("{code:?}");
                    if EXCEPTIONS.iter().any(|(n, _)| name.starts_with(n)) {
                        continue;
                    }
                    for memory in [false, true] {
                        let Some(i) = build(code, bits, &Choice::plain(bits, memory)) else { continue };
                        let bytes = match encode(&i, bits) {
                            Ok(bytes) => bytes,
                            Err(e) => {
                                missing.push(format!("{bits} {code:?} cannot be encoded: {e}"));
                                continue;
                            }
                        };
                        // Some encodings have several names, and those with FWAIT are two instructions.
                        let Ok(insn) = decode(&bytes, mode, &model) else { panic!("{code:?} {bytes:02x?}") };
                        seen += 1;
                        if is_undefined(&insn) {
                            missing.push(format!("{bits} {code:?} {:?} ({bytes:02x?})", code.cpuid_features()));
                        }
                    }
                }
                assert!(seen > 1200, "{level:?} {bits}: {seen}");
            }
        }
        assert!(missing.is_empty(), "{} lack semantics:\n{}", missing.len(), missing.join("\n"));
    }

    #[test]
    fn what_is_not_advertised_is_undefined() {
        let mode = Mode(Mode::CODE64 | Mode::FLAT | Mode::SSE | Mode::AVX);
        for level in [Level::V2, Level::V3, Level::Max] {
            let model = CpuModel::new(level, 1, 0);
            let mut seen = 0;
            for code in codes(64).filter(|&c| !model.executes(c)) {
                for memory in [false, true] {
                    let Some(i) = build(code, 64, &Choice::plain(64, memory)) else { continue };
                    let Ok(bytes) = encode(&i, 64) else { continue };
                    let Ok(insn) = decode(&bytes, mode, &model) else { continue };
                    // Some encodings mean an older instruction where the newer one is not there: TZCNT is BSF.
                    if insn.iced_code() == code {
                        assert!(is_undefined(&insn), "{level:?} {code:?} {bytes:02x?}");
                        seen += 1;
                    }
                }
            }
            assert!(seen > 100, "{level:?}: {seen}");
        }
    }
}
