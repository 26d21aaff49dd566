//! Lane operations that are one or two instructions of AArch64's; the others are for regions.

use super::asm::{Asm, Xmm};
use crate::emit::LaneOp;
use crate::simd::{VecImmOp, VecOp};

/// The instructions (Arm ARM C7.2) on all 128 bits.
const ZIP1: u32 = 0x4e00_3800;
const ZIP2: u32 = 0x4e00_7800;
const EXT: u32 = 0x6e00_0000;
const UMULL: u32 = 0x2ea0_c000;
const BIC: u32 = 0x4e60_1c00;
/// SQXTN and SQXTUN to half as wide elements of 1 byte; that behind the lower half is the same with [`UPPER`].
const SQXTN: u32 = 0x0e21_4800;
const SQXTUN: u32 = 0x2e21_2800;
const UPPER: u32 = 1 << 30;

/// The element size field.
const fn elements(bytes: u32) -> u32 {
    bytes.trailing_zeros() << 22
}

/// Emits a lane operation of one or two operands, if it has such a form. `to` is neither of them.
pub fn lane(a: &mut Asm, op: LaneOp, to: Xmm, x: Xmm, y: Xmm) -> Option<()> {
    use VecOp::*;
    match op {
        LaneOp::Two(Pandn) => a.vector(BIC, to, y, Some(x)),
        LaneOp::Two(Pmuludq) => a.vector_of_even(UMULL, to, x, y),
        LaneOp::Two(op @ (Packsswb | Packuswb | Packssdw)) => {
            let narrow = match op {
                Packsswb => SQXTN,
                Packuswb => SQXTUN,
                _ => SQXTN | elements(2),
            };
            a.vector(narrow, to, x, None);
            a.vector(narrow | UPPER, to, y, None);
        }
        LaneOp::Two(op) => a.vector(two(op)?, to, x, Some(y)),
        LaneOp::Immediate(op, k) => immediate(a, op, k.into(), to, x)?,
        _ => return None,
    }
    Some(())
}

fn immediate(a: &mut Asm, op: VecImmOp, k: u32, to: Xmm, x: Xmm) -> Option<()> {
    use VecImmOp::*;
    let (shl, ushr, sshr) = (0x4f00_5400, 0x6f00_0400, 0x4f00_0400);
    let bits = match op {
        PsrlwImm | PsrawImm | PsllwImm => 16,
        PsrldImm | PsradImm | PslldImm => 32,
        _ => 64,
    };
    match op {
        PsllwImm | PslldImm | PsllqImm if k < bits => a.vector(shl | (bits + k) << 16, to, x, None),
        PsrlwImm | PsrldImm | PsrlqImm if (1..bits).contains(&k) => {
            a.vector(ushr | (2 * bits - k) << 16, to, x, None);
        }
        PsrawImm | PsradImm if k != 0 => a.vector(sshr | (2 * bits - k.min(bits)) << 16, to, x, None),
        PsllwImm | PslldImm | PsllqImm | PsrlwImm | PsrldImm | PsrlqImm if k != 0 => a.zero_x(to),
        PsrlwImm | PsrldImm | PsrlqImm | PsrawImm | PsradImm => a.mov_x(to, x),
        Psrldq if k < 16 => a.vector_and_zero(EXT | k << 11, to, x),
        Pslldq if k == 0 => a.mov_x(to, x),
        Pslldq if k < 16 => a.vector_of_zero(EXT | (16 - k) << 11, to, x),
        Psrldq | Pslldq => a.zero_x(to),
        Pshufd => {
            for n in 0..4 {
                let from = k >> (2 * n) & 3;
                // INS of an element of 4 bytes.
                a.vector(0x6e04_0400 | n << 19 | from << 13, to, x, None);
            }
        }
        _ => return None,
    }
    Some(())
}

fn two(op: VecOp) -> Option<u32> {
    use VecOp::*;
    let same = |u: u32, bytes: u32, opcode: u32| 0x4e20_0400 | u << 29 | elements(bytes) | opcode << 11;
    Some(match op {
        Punpcklbw => ZIP1,
        Punpcklwd => ZIP1 | elements(2),
        Punpckldq => ZIP1 | elements(4),
        Punpcklqdq => ZIP1 | elements(8),
        Punpckhbw => ZIP2,
        Punpckhwd => ZIP2 | elements(2),
        Punpckhdq => ZIP2 | elements(4),
        Punpckhqdq => ZIP2 | elements(8),
        Pcmpeqb => same(1, 1, 0x11),
        Pcmpeqw => same(1, 2, 0x11),
        Pcmpeqd => same(1, 4, 0x11),
        Pcmpgtb => same(0, 1, 6),
        Pcmpgtw => same(0, 2, 6),
        Pcmpgtd => same(0, 4, 6),
        Paddb => same(0, 1, 0x10),
        Paddw => same(0, 2, 0x10),
        Paddd => same(0, 4, 0x10),
        Paddq => same(0, 8, 0x10),
        Psubb => same(1, 1, 0x10),
        Psubw => same(1, 2, 0x10),
        Psubd => same(1, 4, 0x10),
        Psubq => same(1, 8, 0x10),
        Paddsb => same(0, 1, 1),
        Paddsw => same(0, 2, 1),
        Paddusb => same(1, 1, 1),
        Paddusw => same(1, 2, 1),
        Psubsb => same(0, 1, 5),
        Psubsw => same(0, 2, 5),
        Psubusb => same(1, 1, 5),
        Psubusw => same(1, 2, 5),
        Pmullw => same(0, 2, 0x13),
        Pminub => same(1, 1, 0xd),
        Pminsw => same(0, 2, 0xd),
        Pmaxub => same(1, 1, 0xc),
        Pmaxsw => same(0, 2, 0xc),
        Pavgb => same(1, 1, 2),
        Pavgw => same(1, 2, 2),
        Pand => same(0, 1, 3),
        Por => same(0, 4, 3),
        Pxor => same(1, 1, 3),
        _ => return None,
    })
}
