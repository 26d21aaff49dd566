//! From guest bytes to predecoded instructions, by iced-x86.

use iced_x86::{
    Code, Decoder, DecoderError, DecoderOptions, EncodingKind, FlowControl, Instruction, Mnemonic, OpKind, Register,
};

use crate::block::MAX_INSNS;
use crate::cpuid::CpuModel;
use crate::insn::{Insn, Mode, NO_REG, Opnd, Rep};
use crate::semantics::{self, Form};
use crate::state::seg;

/// The longest instruction (SDM vol. 2 §2.3.11).
pub const MAX_LEN: usize = 15;
/// The most bytes of a block.
pub const MAX_BYTES: usize = MAX_INSNS * MAX_LEN;

/// Why no instruction could be decoded from the bytes at hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeedMoreBytes;

/// Decodes the instruction at the start of `bytes`. Invalid encodings and instructions that the CPU model does not
/// have decode to one that raises the right exception.
pub fn decode(bytes: &[u8], mode: Mode, model: &CpuModel) -> Result<Insn, NeedMoreBytes> {
    let bytes = &bytes[..bytes.len().min(MAX_LEN)];
    let mut decoder = Decoder::with_ip(mode.bits(), bytes, 0, options(model));
    let instr = decoder.decode();
    if instr.is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes && bytes.len() < MAX_LEN {
        return Err(NeedMoreBytes);
    }
    Ok(predecode(&instr, bytes, mode, model, decoder.last_error() == DecoderError::NoMoreBytes))
}

/// Decodes the instructions at the start of `bytes` up to the end of their block into `insns`; returns how many bytes they
/// are. There are none where the first one does not lie inside.
pub fn straight(bytes: &[u8], mode: Mode, model: &CpuModel, insns: &mut Vec<Insn>) -> usize {
    insns.clear();
    let mut off = 0;
    while insns.len() < MAX_INSNS && off < bytes.len() {
        match decode(&bytes[off..], mode, model) {
            Ok(mut insn) if off + usize::from(insn.len) <= bytes.len() => {
                insn.off = off as u16;
                off += usize::from(insn.len);
                insns.push(insn);
                if insn.ends_block {
                    break;
                }
            }
            _ => break,
        }
    }
    off
}

/// What the bytes of newer instructions mean to a processor without them: hints are no operations (SDM vol. 2, NOP),
/// and a prefix that an older instruction ignored does not make it another one.
fn options(model: &CpuModel) -> u32 {
    let mut options = DecoderOptions::FORCE_RESERVED_NOP | DecoderOptions::NO_WBNOINVD;
    if !model.executes(Code::Tzcnt_r32_rm32) {
        options |= DecoderOptions::NO_MPFX_0FBC;
    }
    if !model.executes(Code::Lzcnt_r32_rm32) {
        options |= DecoderOptions::NO_MPFX_0FBD;
    }
    options
}

fn predecode(instr: &Instruction, bytes: &[u8], mode: Mode, model: &CpuModel, too_long: bool) -> Insn {
    let fop = x87_opcode(bytes, mode);
    let form = Form { instr, bytes: operand_bytes(instr), mode, fop };
    let sem = if too_long {
        semantics::too_long()
    } else if instr.is_invalid() || !model.executes(instr.code()) {
        semantics::undefined()
    } else {
        semantics::lookup(&form)
    };
    let len = (instr.len() as u8).clamp(1, MAX_LEN as u8);
    // 16-bit code may be that of real or virtual-8086 mode, which have no VEX prefix (SDM vol. 2 §2.3.3).
    let vex16 = mode.bits() == 16 && instr.encoding() == EncodingKind::VEX;
    let mut insn = Insn {
        run: if vex16 { semantics::protected_only } else { sem.run },
        sem,
        imm: 0,
        imm2: 0,
        code: instr.code() as u16,
        disp: 0,
        op: [Opnd::None; 4],
        base: NO_REG,
        index: NO_REG,
        scale: 0,
        seg: seg::DS,
        addr_bytes: mode.stack_bytes().max((mode.bits() / 8) as u8),
        rip_relative: false,
        flat: mode.has(Mode::FLAT),
        aux: fop.unwrap_or_else(|| (sem.aux)(instr)),
        osize: form.bytes,
        mem_bytes: instr.memory_size().size().min(255) as u8,
        stack_bytes: mode.stack_bytes(),
        // XCHG with memory is locked without the prefix, too (SDM vol. 3 §9.1.2.2).
        lock: instr.has_lock_prefix()
            || (instr.mnemonic() == Mnemonic::Xchg && instr.memory_size() != iced_x86::MemorySize::Unknown),
        rep: if instr.has_repne_prefix() {
            Rep::Repne
        } else if instr.has_rep_prefix() {
            Rep::Rep
        } else {
            Rep::None
        },
        len,
        off: 0,
        ends_block: sem.ends || instr.flow_control() != FlowControl::Next,
    };
    insn.addr_bytes = (address_bits(instr, bytes, mode) / 8) as u8;
    for n in 0..instr.op_count().min(4) {
        insn.op[n as usize] = operand(instr, n, len, &mut insn);
    }
    let s = segment_number(segment(instr, mode));
    insn.seg = s.unwrap_or(seg::DS);
    // FS and GS have bases in every mode; the flat bit says nothing about them. Outside 64-bit mode CS is never writable.
    let plain = insn.seg < seg::FS && (insn.seg != seg::CS || mode.has(Mode::CODE64));
    insn.flat = mode.has(Mode::FLAT) && (s.is_none() || plain);
    insn
}

/// The segment of the memory operand. 64-bit mode ignores overrides other than FS and GS (SDM vol. 2 §2.2.1.1), so that
/// without one it is still the base register that tells whether a fault is one of the stack.
fn segment(instr: &Instruction, mode: Mode) -> Register {
    let ignored = matches!(instr.segment_prefix(), Register::ES | Register::CS | Register::SS | Register::DS);
    if !(mode.has(Mode::CODE64) && ignored) {
        return instr.memory_segment();
    }
    let mut plain = *instr;
    plain.set_segment_prefix(Register::None);
    plain.memory_segment()
}

/// Address size: the mode's, or the other one after a 67h prefix.
fn address_bits(instr: &Instruction, bytes: &[u8], mode: Mode) -> u32 {
    let size = |r: Register| r.size() as u32 * 8;
    if instr.is_vsib() {
        return if size(instr.memory_base()) != 0 { size(instr.memory_base()) } else { mode.bits() };
    }
    for n in 0..instr.op_count() {
        match instr.op_kind(n) {
            OpKind::Memory => {
                let base = instr.memory_base();
                let r = if base != Register::None { base } else { instr.memory_index() };
                return match r {
                    Register::None => match instr.memory_displ_size() {
                        2 => 16,
                        4 => 32,
                        8 => 64,
                        _ => mode.bits(),
                    },
                    r => size(r),
                };
            }
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => return 16,
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => return 32,
            OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => return 64,
            _ => {}
        }
    }
    // Instructions with implicit addresses or counters (LOOP, JCXZ, MASKMOVQ): look for the prefix itself.
    let prefix = bytes.iter().take(instr.len()).take_while(|&&b| is_prefix(b, mode)).any(|&b| b == 0x67);
    match (mode.bits(), prefix) {
        (64, true) | (16, true) => 32,
        (32, true) => 16,
        (bits, _) => bits,
    }
}

/// The 11-bit opcode of an x87 instruction: the low bits of its first byte, and its second.
fn x87_opcode(bytes: &[u8], mode: Mode) -> Option<u16> {
    let at = bytes.iter().position(|&b| !is_prefix(b, mode))?;
    let (first, second) = (*bytes.get(at)?, *bytes.get(at + 1)?);
    (first & 0xf8 == 0xd8).then(|| u16::from(first & 7) << 8 | u16::from(second))
}

fn is_prefix(b: u8, mode: Mode) -> bool {
    matches!(b, 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3)
        || (mode.bits() == 64 && (0x40..0x50).contains(&b))
}

fn operand(instr: &Instruction, n: u32, len: u8, insn: &mut Insn) -> Opnd {
    match instr.op_kind(n) {
        OpKind::Register => register(instr.op_register(n)),
        OpKind::Memory => {
            memory(instr, len, insn);
            Opnd::Mem
        }
        OpKind::NearBranch16 => relative(insn, u64::from(instr.near_branch16()), len, 16),
        OpKind::NearBranch32 => relative(insn, u64::from(instr.near_branch32()), len, 32),
        OpKind::NearBranch64 => relative(insn, instr.near_branch64(), len, 64),
        OpKind::FarBranch16 => {
            insn.imm = u64::from(instr.far_branch16());
            insn.imm2 = instr.far_branch_selector();
            Opnd::Imm
        }
        OpKind::FarBranch32 => {
            insn.imm = u64::from(instr.far_branch32());
            insn.imm2 = instr.far_branch_selector();
            Opnd::Imm
        }
        OpKind::Immediate8_2nd => {
            insn.imm2 = u16::from(instr.immediate8_2nd());
            Opnd::None
        }
        OpKind::Immediate8
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate64
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => {
            insn.imm = instr.immediate(n);
            Opnd::Imm
        }
        // String operands: address size and segment say all.
        _ => Opnd::None,
    }
}

/// Decoding at address 0 makes a relative target `len + displacement`.
fn relative(insn: &mut Insn, target: u64, len: u8, bits: u32) -> Opnd {
    let displacement = target.wrapping_sub(u64::from(len));
    let unused = 64 - bits;
    insn.imm = (((displacement << unused) as i64) >> unused) as u64;
    Opnd::Imm
}

fn memory(instr: &Instruction, len: u8, insn: &mut Insn) {
    let base = instr.memory_base();
    insn.rip_relative = matches!(base, Register::RIP | Register::EIP);
    insn.disp = instr.memory_displacement64() as i64;
    if insn.rip_relative {
        insn.disp = insn.disp.wrapping_sub(i64::from(len));
    } else {
        // iced zero-extends 16- and 32-bit displacements; the effective address is cut to the same size again.
        insn.base = gpr_number(base);
        let index = instr.memory_index();
        // XLAT's index is AL; its semantics add it.
        insn.index = match index {
            Register::None | Register::AL => NO_REG,
            r if r.is_vector_register() => r.number() as u8,
            r => gpr_number(r),
        };
        insn.scale = instr.memory_index_scale().trailing_zeros() as u8;
    }
}

fn gpr_number(r: Register) -> u8 {
    if r.is_gpr() { r.number() as u8 } else { NO_REG }
}

fn segment_number(r: Register) -> Option<u8> {
    r.is_segment_register().then(|| r.number() as u8)
}

fn register(r: Register) -> Opnd {
    let n = r.number() as u8;
    match r {
        Register::AH | Register::CH | Register::DH | Register::BH => Opnd::GprHigh(r.full_register().number() as u8),
        // SPL to DIL are numbered apart from AH to BH; the full register says which it is.
        r if r.is_gpr() => Opnd::Gpr(r.full_register().number() as u8),
        r if r.is_xmm() => Opnd::Xmm(n),
        r if r.is_ymm() => Opnd::Ymm(n),
        r if r.is_mm() => Opnd::Mmx(n),
        r if r.is_segment_register() => Opnd::Seg(n),
        r if r.is_cr() => Opnd::Cr(n),
        r if r.is_dr() => Opnd::Dr(n),
        r if r.is_st() => Opnd::St(n),
        _ => Opnd::None,
    }
}

/// The operand size of an instruction in bytes; 0 where it has none.
fn operand_bytes(instr: &Instruction) -> u8 {
    use Code::*;
    let stack = instr.stack_pointer_increment().unsigned_abs() as u8;
    match instr.code() {
        Retnw | Retnw_imm16 | Retfw | Retfw_imm16 | Iretw | Call_ptr1616 | Jmp_ptr1616 | Call_m1616 | Jmp_m1616
        | Enterw_imm16_imm8 | Leavew | Pushaw | Popaw => 2,
        Retnd | Retnd_imm16 | Retfd | Retfd_imm16 | Iretd | Call_ptr1632 | Jmp_ptr1632 | Call_m1632 | Jmp_m1632
        | Enterd_imm16_imm8 | Leaved | Pushad | Popad | Sysretd | Sysexitd => 4,
        Retnq | Retnq_imm16 | Retfq | Retfq_imm16 | Iretq | Call_m1664 | Jmp_m1664 | Enterq_imm16_imm8 | Leaveq
        | Sysretq | Sysexitq => 8,
        _ => match instr.mnemonic() {
            Mnemonic::Push
            | Mnemonic::Pop
            | Mnemonic::Pushf
            | Mnemonic::Pushfd
            | Mnemonic::Pushfq
            | Mnemonic::Popf
            | Mnemonic::Popfd
            | Mnemonic::Popfq => stack,
            _ => match instr.op0_kind() {
                OpKind::NearBranch16 => 2,
                OpKind::NearBranch32 => 4,
                OpKind::NearBranch64 => 8,
                // OUT and other forms whose first operand does not have the size of the operation.
                OpKind::Register
                    if !matches!(
                        instr.mnemonic(),
                        Mnemonic::Out | Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd
                    ) =>
                {
                    instr.op0_register().size() as u8
                }
                _ if instr.mnemonic() == Mnemonic::Out => instr.op1_register().size() as u8,
                _ if instr.memory_size().size() != 0 => instr.memory_size().size().min(64) as u8,
                _ => 0,
            },
        },
    }
}
