//! Parts of programs that are several instructions: what needs registers of its own to stay in the data, and gives them
//! back or leaves them harmless. The instructions of strings, gathers, bit strings, masked stores, stack frames,
//! divisions, and those that write flags, MXCSR, segments and their bases.

use iced_x86::{Decoder, DecoderOptions, Instruction};

use super::program::{Part, Rsi};
use super::sequences::flags_of;
use super::{DATA, INSN, Random};
use crate::state::flag;

/// The registers by number in ModRM.
const RSI: u8 = 6;
const RDI: u8 = 7;
/// The opcode of CMPSB.
const CMPS: u8 = 0xa6;

/// Code in the making.
struct Bundle {
    bits: u32,
    code: Vec<u8>,
}

impl Bundle {
    fn new(bits: u32) -> Bundle {
        Bundle { bits, code: Vec::new() }
    }

    fn bytes(&mut self, bytes: &[u8]) -> &mut Bundle {
        self.code.extend(bytes);
        self
    }

    /// REX.W, where there is one.
    fn wide(&mut self) -> &mut Bundle {
        let rex: &[u8] = if self.bits == 64 { &[0x48] } else { &[] };
        self.bytes(rex)
    }

    /// `mov eax, value` and its kin.
    fn load(&mut self, register: u8, value: u32) -> &mut Bundle {
        self.bytes(&[0xb8 + register]).bytes(&value.to_le_bytes())
    }

    /// `lea register, [rbx+at]`
    fn point(&mut self, register: u8, at: i8) -> &mut Bundle {
        self.wide().bytes(&[0x8d, 0x43 | register << 3, at as u8])
    }

    /// What is to be known of the whole. `certain` is whether its last instruction always gives its flags a value.
    fn part(self, rsi: Option<Rsi>, certain: bool) -> Part {
        let mut part =
            Part { code: self.code, reads: 0, undefines: 0, defines: 0, stack: false, rsi, rip: None, bits: self.bits };
        let instructions: Vec<Instruction> =
            Decoder::with_ip(self.bits, &part.code, INSN, DecoderOptions::NONE).into_iter().collect();
        for i in &instructions {
            let (reads, undefines, defines) = flags_of(i).unwrap_or_default();
            part.reads |= reads & !part.defines;
            part.undefines = part.undefines & !defines | undefines;
            part.defines = (part.defines | defines) & !undefines;
        }
        if !certain {
            part.defines = 0;
        }
        part
    }
}

fn one_of(r: &mut Random, bytes: &[u8]) -> u8 {
    bytes[r.below(bytes.len() as u64) as usize]
}

/// A string instruction, forwards or backwards, repeated or not. RSI is kept in RDX, as others have
/// addresses with it.
fn string(r: &mut Random, bits: u32) -> Part {
    let mut b = Bundle::new(bits);
    match r.below(3) {
        0 => b.bytes(&[0xfc]),
        1 => b.bytes(&[0xfd]),
        // As it was.
        _ => &mut b,
    };
    let count = r.below(10) as u32;
    let (from, to) = (r.below(48) as i8 - 24, r.below(48) as i8 - 24);
    // Comparisons of equal strings go on.
    let from = if r.below(3) == 0 { to } else { from };
    let opcode = one_of(r, &[0xa4, CMPS, 0xaa, 0xac, 0xae]);
    let prefix = [0x67, 0x64, 0x65, 0, 0, 0, 0, 0][r.below(8) as usize];
    // mov rdx, rsi
    b.wide().bytes(&[0x89, 0xf2]).load(1, count).point(RSI, from);
    if opcode == CMPS && (from != to || prefix != 0) {
        // Which of two operands that fault does is up to the processor. This one does not: RSP need not be aligned.
        b.load(RDI, DATA.wrapping_add_signed(i64::from(to & !7)) as u32 + 0x80);
    } else {
        b.point(RDI, to);
    }
    if bits == 64 && prefix != 0 {
        b.bytes(&[prefix]);
    }
    let repeat: &[u8] = match r.below(4) {
        0 => &[],
        1 => &[0xf2],
        _ => &[0xf3],
    };
    b.bytes(repeat);
    match r.below(4) {
        0 => b.bytes(&[opcode]),
        1 => b.bytes(&[0x66, opcode + 1]),
        2 => b.bytes(&[opcode + 1]),
        _ => b.wide().bytes(&[opcode + 1]),
    };
    // mov rsi, rdx
    b.wide().bytes(&[0x89, 0xd6]);
    b.part(None, repeat.is_empty() || count > 0)
}

/// BT, BTS, BTR or BTC of a bit that RAX, RCX or RDX selects in memory.
fn bit_string(r: &mut Random, bits: u32) -> Part {
    let mut b = Bundle::new(bits);
    let register = r.below(3) as u8;
    // movsx rax, al
    b.wide().bytes(&[0x0f, 0xbe, 0xc0 | register << 3 | register]);
    let opcode = one_of(r, &[0xa3, 0xab, 0xb3, 0xbb]);
    if opcode != 0xa3 && r.below(3) == 0 {
        b.bytes(&[0xf0]);
    }
    match r.below(3) {
        0 => b.bytes(&[0x66]),
        1 => &mut b,
        _ => b.wide(),
    };
    b.bytes(&[0x0f, opcode, 0x43 | register << 3, 0x10]);
    b.part(None, true)
}

/// A store of some bytes of a vector.
fn masked_store(r: &mut Random, bits: u32) -> Part {
    let mut b = Bundle::new(bits);
    b.point(RDI, r.below(32) as i8);
    let opcode: &[u8] = match r.below(3) {
        0 => &[0x0f, 0xf7],
        1 => &[0x66, 0x0f, 0xf7],
        _ => &[0xc5, 0xf9, 0xf7],
    };
    b.bytes(opcode).bytes(&[0xc0 | r.below(64) as u8]);
    b.part(None, true)
}

/// ENTER and LEAVE, or PUSHA and POPA.
fn frame(r: &mut Random, bits: u32) -> Part {
    let mut b = Bundle::new(bits);
    if bits == 32 && r.below(2) == 0 {
        b.bytes(&[0x60, 0x61]);
    } else {
        b.bytes(&[0xc8, r.below(32) as u8, 0, r.below(2) as u8, 0xc9]);
    }
    b.part(None, true)
}

/// POPF of all that user mode may change, but TF, which would stop the host, and NT.
fn flags(r: &mut Random, bits: u32) -> Part {
    let mut b = Bundle::new(bits);
    let value = r.u64() & (flag::DEFINED & !(flag::TF | flag::NT | flag::VM | flag::RF)) | 2;
    // Alignment is checked now and then only.
    let value = if r.below(4) == 0 { value } else { value & !flag::AC } as u32;
    if r.below(3) == 0 {
        b.bytes(&[0x66, 0x68]).bytes(&(value as u16).to_le_bytes()).bytes(&[0x66, 0x9d]);
    } else {
        b.bytes(&[0x68]).bytes(&value.to_le_bytes()).bytes(&[0x9d]);
    }
    b.part(None, true)
}

/// A division that succeeds.
fn division(r: &mut Random, bits: u32) -> Part {
    let mut b = Bundle::new(bits);
    // xor edx, edx; or ecx, 1; and shr eax, 1 so that IDIV's quotient fits.
    b.bytes(&[0x31, 0xd2]).wide().bytes(&[0x83, 0xc9, 0x01]).wide().bytes(&[0xd1, 0xe8]);
    match r.below(3) {
        0 => b.bytes(&[0xb4, 0, 0xf6]),
        1 => b.bytes(&[0xf7]),
        _ => b.wide().bytes(&[0xf7]),
    };
    b.bytes(&[0xf1 | (r.below(2) as u8) << 3]);
    b.part(None, true)
}

/// A data segment register, or the base of one.
fn segment(r: &mut Random, bits: u32) -> Part {
    let mut b = Bundle::new(bits);
    if bits == 64 && r.below(2) == 0 {
        // wrfsbase rax, or wrgsbase
        b.load(0, 16 * r.below(4) as u32).bytes(&[0xf3, 0x48, 0x0f, 0xae, 0xd0 | (r.below(2) as u8) << 3]);
    } else {
        b.load(0, 0x2b).bytes(&[0x8e, 0xc0 | one_of(r, &[0, 3, 4, 5]) << 3]);
    }
    b.part(None, true)
}

/// LDMXCSR without the bits that some processors have more, mostly with all exceptions masked.
fn mxcsr(r: &mut Random, bits: u32) -> Part {
    let mut b = Bundle::new(bits);
    // and dword [rsi], 0ffffh; or dword [rsi], 1f80h
    b.bytes(&[0x81, 0x26, 0xff, 0xff, 0, 0]);
    if r.below(4) != 0 {
        b.bytes(&[0x81, 0x0e, 0x80, 0x1f, 0, 0]);
    }
    let opcode: &[u8] = if r.below(2) == 0 { &[0x0f] } else { &[0xc5, 0xf8] };
    b.bytes(opcode).bytes(&[0xae, 0x16]);
    b.part(Some(Rsi::Base), true)
}

/// A gather by `code`, with indices of `index` bytes in XMM5 made small enough to stay in the data.
pub(super) fn gather(r: &mut Random, bits: u32, code: &[u8], index: usize) -> Part {
    let mut b = Bundle::new(bits);
    if r.below(2) == 0 {
        // vpcmpeqd ymm2, ymm2, ymm2: all elements.
        b.bytes(&[0xc5, 0xed, 0x76, 0xd2]);
    }
    // vpsrld, vpsrad or vpsrlq of ymm5.
    let shift: &[u8] = match (index, r.below(2)) {
        (4, 0) => &[0x72, 0xd5, 28],
        (4, _) => &[0x72, 0xe5, 28],
        _ => &[0x73, 0xd5, 60],
    };
    b.bytes(&[0xc5, 0xd5]).bytes(shift).bytes(code);
    b.part(Some(Rsi::Base), true)
}

/// Some of each, but the gathers.
pub(super) fn all(r: &mut Random, bits: u32) -> Vec<Part> {
    type Kind = fn(&mut Random, u32) -> Part;
    let kinds: [(Kind, usize); 8] = [
        (mxcsr, 20),
        (string, 400),
        (bit_string, 60),
        (masked_store, 40),
        (frame, 20),
        (flags, 60),
        (division, 20),
        (segment, 20),
    ];
    kinds.iter().flat_map(|(kind, n)| (0..*n).map(|_| kind(r, bits)).collect::<Vec<_>>()).collect()
}
