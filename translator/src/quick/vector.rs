//! Lane operations that are one SSE2 instruction; the others are for regions.

use super::asm::{Asm, Xmm};
use crate::emit::LaneOp;
use crate::simd::{VecImmOp, VecOp};

/// The form of an instruction (SDM vol. 2), its opcode behind 0Fh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// Of two operands, with prefix 66h: opcode.
    Two(u8),
    /// Of one, with an immediate: prefix, opcode, immediate.
    Shuffle(u8, u8, u8),
    /// A shift in place, with prefix 66h: opcode, extension in ModRM, count.
    Shift(u8, u8, u8),
}

/// Emits a lane operation of one or two operands, if it has such a form. `to` is neither of them.
pub fn lane(a: &mut Asm, op: LaneOp, to: Xmm, x: Xmm, y: Xmm) -> Option<()> {
    let form = form(op)?;
    if !matches!(form, Form::Shuffle(..)) {
        a.mov_x(to, x);
    }
    match form {
        Form::Two(opcode) => a.sse(opcode, to, y),
        Form::Shuffle(prefix, opcode, k) => a.sse_imm(prefix, opcode, to, x, k),
        Form::Shift(opcode, group, k) => a.sse_shift(opcode, group, to, k),
    }
    Some(())
}

/// The instruction that is a lane operation.
fn form(op: LaneOp) -> Option<Form> {
    match op {
        LaneOp::Two(op) => two(op).map(Form::Two),
        LaneOp::Immediate(op, k) => {
            use VecImmOp::*;
            Some(match op {
                Pshufd => Form::Shuffle(0x66, 0x70, k),
                Pshufhw => Form::Shuffle(0xf3, 0x70, k),
                Pshuflw => Form::Shuffle(0xf2, 0x70, k),
                PsrlwImm => Form::Shift(0x71, 2, k),
                PsrawImm => Form::Shift(0x71, 4, k),
                PsllwImm => Form::Shift(0x71, 6, k),
                PsrldImm => Form::Shift(0x72, 2, k),
                PsradImm => Form::Shift(0x72, 4, k),
                PslldImm => Form::Shift(0x72, 6, k),
                PsrlqImm => Form::Shift(0x73, 2, k),
                Psrldq => Form::Shift(0x73, 3, k),
                PsllqImm => Form::Shift(0x73, 6, k),
                Pslldq => Form::Shift(0x73, 7, k),
                _ => return None,
            })
        }
        _ => None,
    }
}

fn two(op: VecOp) -> Option<u8> {
    use VecOp::*;
    Some(match op {
        Punpcklbw => 0x60,
        Punpcklwd => 0x61,
        Punpckldq => 0x62,
        Packsswb => 0x63,
        Pcmpgtb => 0x64,
        Pcmpgtw => 0x65,
        Pcmpgtd => 0x66,
        Packuswb => 0x67,
        Punpckhbw => 0x68,
        Punpckhwd => 0x69,
        Punpckhdq => 0x6a,
        Packssdw => 0x6b,
        Punpcklqdq => 0x6c,
        Punpckhqdq => 0x6d,
        Pcmpeqb => 0x74,
        Pcmpeqw => 0x75,
        Pcmpeqd => 0x76,
        Psrlw => 0xd1,
        Psrld => 0xd2,
        Psrlq => 0xd3,
        Paddq => 0xd4,
        Pmullw => 0xd5,
        Psubusb => 0xd8,
        Psubusw => 0xd9,
        Pminub => 0xda,
        Pand => 0xdb,
        Paddusb => 0xdc,
        Paddusw => 0xdd,
        Pmaxub => 0xde,
        Pandn => 0xdf,
        Pavgb => 0xe0,
        Psraw => 0xe1,
        Psrad => 0xe2,
        Pavgw => 0xe3,
        Pmulhuw => 0xe4,
        Pmulhw => 0xe5,
        Psubsb => 0xe8,
        Psubsw => 0xe9,
        Pminsw => 0xea,
        Por => 0xeb,
        Paddsb => 0xec,
        Paddsw => 0xed,
        Pmaxsw => 0xee,
        Pxor => 0xef,
        Psllw => 0xf1,
        Pslld => 0xf2,
        Psllq => 0xf3,
        Pmuludq => 0xf4,
        Pmaddwd => 0xf5,
        Psadbw => 0xf6,
        Psubb => 0xf8,
        Psubw => 0xf9,
        Psubd => 0xfa,
        Psubq => 0xfb,
        Paddb => 0xfc,
        Paddw => 0xfd,
        Paddd => 0xfe,
        _ => return None,
    })
}
