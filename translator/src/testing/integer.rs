//! Every integer instruction that user mode runs, against the host's processor: a table of opcodes in the notation of
//! the Intel manual, each with all operand sizes and kinds of operands, on boundary and random values.

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, Register, RflagsBits};

use super::{DATA, INSN, Random, TAKEN};
use crate::state::flag;

#[cfg(test)]
mod tests;

/// Opcodes (SDM vol. 2 notation: `/r`, `/digit`, `+r`, immediates) and operand sizes: b, w (66h), d, q (REX.W), and
/// p for 64-bit forms without prefix. `vex` stands for a VEX prefix: pp, map, and W by the size.
const TABLE: &[(&str, &str)] = &[
    // Arithmetic.
    ("fe /0", "b"),
    ("ff /0", "wdq"),
    ("fe /1", "b"),
    ("ff /1", "wdq"),
    ("f6 /3", "b"),
    ("f7 /3", "wdq"),
    // Logic.
    ("f6 /2", "b"),
    ("f7 /2", "wdq"),
    ("84 /r", "b"),
    ("85 /r", "wdq"),
    ("a8 ib", "b"),
    ("a9 iz", "wdq"),
    ("f6 /0 ib", "b"),
    ("f7 /0 iz", "wdq"),
    ("vex 0 2 f2 /r", "dq"),
    // Data transfer.
    ("88 /r", "b"),
    ("89 /r", "wdq"),
    ("8a /r", "b"),
    ("8b /r", "wdq"),
    ("c6 /0 ib", "b"),
    ("c7 /0 iz", "wdq"),
    ("b0+r ib", "b"),
    ("b8+r iv", "wdq"),
    ("a0 moffs", "b"),
    ("a1 moffs", "wdq"),
    ("a2 moffs", "b"),
    ("a3 moffs", "wdq"),
    ("0f b6 /r", "wdq"),
    ("0f b7 /r", "wdq"),
    ("0f be /r", "wdq"),
    ("0f bf /r", "wdq"),
    ("63 /r", "wdq"),
    ("8d /m", "wdq"),
    ("86 /r", "b"),
    ("87 /r", "wdq"),
    ("90+r", "wdq"),
    ("0f c8+r", "dq"),
    ("0f 38 f0 /m", "wdq"),
    ("0f 38 f1 /m", "wdq"),
    ("0f c0 /r", "b"),
    ("0f c1 /r", "wdq"),
    ("0f b0 /r", "b"),
    ("0f b1 /r", "wdq"),
    ("f0 0f b1 /m", "wdq"),
    ("f0 0f c1 /m", "wdq"),
    ("0f c7 /m1", "d"),
    ("0f c7 /m1", "q"),
    ("0f c3 /m", "dq"),
    ("98", "wdq"),
    ("99", "wdq"),
    ("d7", "d"),
    ("67 d7", "d"),
    ("9e", "d"),
    ("9f", "d"),
    // Instructions that do nothing.
    ("90", "wdq"),
    ("f3 90", "d"),
    ("f3 0f 1e fa", "d"),
    ("f3 0f 1e fb", "d"),
    ("f3 0f 1e c8", "dq"),
    ("0f 1f /0", "wdq"),
    ("0f 18 /m0", "d"),
    ("0f 18 /m3", "d"),
    ("0f 0d /m1", "d"),
    ("0f ae /m7", "d"),
    ("66 0f ae /m7", "d"),
    ("66 0f ae /m6", "d"),
    ("0f ae e8", "d"),
    ("0f ae f0", "d"),
    ("0f ae f8", "d"),
    // Bits.
    ("0f a3 /r", "wdq"),
    ("0f ab /r", "wdq"),
    ("0f b3 /r", "wdq"),
    ("0f bb /r", "wdq"),
    ("0f ba /4 ib", "wdq"),
    ("0f ba /5 ib", "wdq"),
    ("0f ba /6 ib", "wdq"),
    ("0f ba /7 ib", "wdq"),
    ("0f bc /r", "wdq"),
    ("0f bd /r", "wdq"),
    ("f3 0f bc /r", "wdq"),
    ("f3 0f bd /r", "wdq"),
    ("f3 0f b8 /r", "wdq"),
    ("vex 0 2 f3 /1", "dq"),
    ("vex 0 2 f3 /2", "dq"),
    ("vex 0 2 f3 /3", "dq"),
    ("vex 0 2 f5 /r", "dq"),
    ("vex 0 2 f7 /r", "dq"),
    ("vex 2 2 f5 /r", "dq"),
    ("vex 3 2 f5 /r", "dq"),
    ("f2 0f 38 f0 /r", "dq"),
    ("f2 0f 38 f1 /r", "wdq"),
    ("66 0f 38 f6 /r", "dq"),
    ("f3 0f 38 f6 /r", "dq"),
    // Shifts.
    ("0f a4 /r ib", "wdq"),
    ("0f a5 /r", "wdq"),
    ("0f ac /r ib", "wdq"),
    ("0f ad /r", "wdq"),
    ("vex 1 2 f7 /r", "dq"),
    ("vex 2 2 f7 /r", "dq"),
    ("vex 3 2 f7 /r", "dq"),
    ("vex 3 3 f0 /r ib", "dq"),
    // Multiplication and division.
    ("f6 /4", "b"),
    ("f7 /4", "wdq"),
    ("f6 /5", "b"),
    ("f7 /5", "wdq"),
    ("0f af /r", "wdq"),
    ("6b /r ib", "wdq"),
    ("69 /r iz", "wdq"),
    ("vex 3 2 f6 /r", "dq"),
    ("f6 /6", "b"),
    ("f7 /6", "wdq"),
    ("f6 /7", "b"),
    ("f7 /7", "wdq"),
    // Flags.
    ("f8", "d"),
    ("f9", "d"),
    ("f5", "d"),
    ("fc", "d"),
    ("fd", "d"),
    // Stack.
    ("50+r", "wp"),
    ("58+r", "wp"),
    ("ff /6", "wp"),
    ("8f /0", "wp"),
    ("6a ib", "wp"),
    ("68 iz", "wp"),
    ("9c", "wp"),
    ("c9", "wp"),
    ("c8 20 00 00", "wp"),
    ("c8 10 00 01", "wp"),
    ("c8 08 00 05", "wp"),
    // Near branches to TAKEN; `jmp` and `rel` are displacements to it.
    ("eb rel8", "p"),
    ("e9 rel32", "p"),
    ("e8 rel32", "p"),
    ("ff /2", "p"),
    ("ff /4", "p"),
    ("c3", "p"),
    ("c2 18 00", "p"),
    ("e0 rel8", "p"),
    ("e1 rel8", "p"),
    ("e2 rel8", "p"),
    ("e3 rel8", "p"),
    ("67 e0 rel8", "p"),
    ("67 e1 rel8", "p"),
    ("67 e2 rel8", "p"),
    ("67 e3 rel8", "p"),
    // Strings.
    ("a4", "b"),
    ("a5", "wdq"),
    ("a6", "b"),
    ("a7", "wdq"),
    ("aa", "b"),
    ("ab", "wdq"),
    ("ac", "b"),
    ("ad", "wdq"),
    ("ae", "b"),
    ("af", "wdq"),
];

/// The rows that follow a rule.
fn generated() -> Vec<(String, &'static str)> {
    let mut rows = Vec::new();
    for k in 0..8 {
        // ADD, OR, ADC, SBB, AND, SUB, XOR, CMP.
        let first = 8 * k;
        rows.push((format!("{first:02x} /r"), "b"));
        rows.push((format!("{:02x} /r", first + 1), "wdq"));
        rows.push((format!("{:02x} /r", first + 2), "b"));
        rows.push((format!("{:02x} /r", first + 3), "wdq"));
        rows.push((format!("{:02x} ib", first + 4), "b"));
        rows.push((format!("{:02x} iz", first + 5), "wdq"));
        rows.push((format!("80 /{k} ib"), "b"));
        rows.push((format!("81 /{k} iz"), "wdq"));
        rows.push((format!("83 /{k} ib"), "wdq"));
        // ROL, ROR, RCL, RCR, SHL, SHR, SAL, SAR.
        rows.push((format!("c0 /{k} ib"), "b"));
        rows.push((format!("c1 /{k} ib"), "wdq"));
        rows.push((format!("d0 /{k}"), "b"));
        rows.push((format!("d1 /{k}"), "wdq"));
        rows.push((format!("d2 /{k}"), "b"));
        rows.push((format!("d3 /{k}"), "wdq"));
    }
    for c in 0..16 {
        rows.push((format!("0f 4{c:x} /r"), "wdq"));
        rows.push((format!("0f 9{c:x} /0"), "b"));
        rows.push((format!("7{c:x} rel8"), "p"));
        rows.push((format!("0f 8{c:x} rel32"), "p"));
    }
    for prefix in ["f2", "f3", "67 f3"] {
        rows.extend(["a4", "a6", "aa", "ac", "ae"].map(|op| (format!("{prefix} {op}"), "b")));
        rows.extend(["a5", "a7", "ab", "ad", "af"].map(|op| (format!("{prefix} {op}"), "wdq")));
    }
    rows
}

/// Where the memory operand is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// `[rbx+10h]`
    Base,
    /// `[r9+rsi*4-20h]`
    Index,
    /// `[rip+…]`
    Rip,
    /// `[ebx]`
    Short,
    /// `[rsp+10h]`
    Stack,
}

/// A form of operands: register numbers, the second one or a memory operand.
#[derive(Clone, Copy)]
pub(super) struct Operands {
    reg: u8,
    rm: u8,
    place: Option<Place>,
    /// Whether byte registers 4–7 are meant as SPL to DIL.
    rex: bool,
}

const fn registers(reg: u8, rm: u8, rex: bool) -> Operands {
    Operands { reg, rm, place: None, rex }
}

const fn memory(reg: u8, place: Place) -> Operands {
    Operands { reg, rm: 0, place: Some(place), rex: false }
}

const FORMS: &[Operands] = &[
    registers(1, 0, false),
    registers(0, 2, false),
    registers(3, 3, false),
    registers(9, 1, false),
    registers(2, 12, false),
    registers(6, 7, true),
    registers(5, 0, false),
    registers(1, 6, false),
    memory(0, Place::Base),
    memory(1, Place::Index),
    memory(10, Place::Base),
    memory(2, Place::Rip),
    memory(6, Place::Short),
    memory(7, Place::Base),
    memory(0, Place::Stack),
];
/// Byte operations reach AH to BH too.
const HIGH_FORMS: &[Operands] = &[registers(4, 0, false), registers(0, 4, false), registers(7, 6, false)];
/// VEX.vvvv.
const THIRD: u8 = 13;

/// Encodes one row for one size and form; `None` where the row has no such form.
fn encode(row: &str, size: char, form: Operands, value: u64) -> Option<Vec<u8>> {
    let (mut prefixes, mut rex, mut code) = (Vec::new(), 0u8, Vec::new());
    let mut tokens = row.split(' ').peekable();
    if size == 'w' {
        prefixes.push(0x66);
    }
    if size == 'q' {
        rex |= 8;
    }
    let vex = tokens.next_if_eq(&"vex").map(|_| {
        let mut number = || tokens.next().and_then(|t| t.parse::<u8>().ok()).unwrap();
        (number(), number())
    });
    while let Some(t) = tokens.next_if(|t| vex.is_none() && matches!(*t, "66" | "67" | "f0" | "f2" | "f3")) {
        prefixes.push(u8::from_str_radix(t, 16).unwrap());
    }
    let (mut modrm, mut rip_at) = (false, None);
    let imm_bytes = |size| match size {
        'b' => 1,
        'w' => 2,
        _ => 4,
    };
    for t in tokens {
        let bytes = value.to_le_bytes();
        match t {
            "ib" => code.push(bytes[0]),
            "iz" => code.extend(&bytes[..imm_bytes(size)]),
            "iv" => code.extend(&bytes[..if size == 'q' { 8 } else { imm_bytes(size) }]),
            "moffs" => code.extend((DATA + 0x40).to_le_bytes()),
            "rel8" => code.push(0),
            "rel32" => code.extend([0; 4]),
            _ if t.starts_with('/') => {
                modrm = true;
                let digit = t.bytes().last().filter(u8::is_ascii_digit).map(|d| d - b'0');
                if t.starts_with("/m") && form.place.is_none() {
                    return None;
                }
                let reg = digit.unwrap_or(form.reg);
                rex |= if reg > 7 { 4 } else { 0 } | if form.place.is_none() && form.rm > 7 { 1 } else { 0 };
                let middle = (reg & 7) << 3;
                match form.place {
                    None => code.push(0xc0 | middle | form.rm & 7),
                    Some(Place::Base) => code.extend([0x43 | middle, 0x10]),
                    Some(Place::Stack) => code.extend([0x44 | middle, 0x24, 0x10]),
                    Some(Place::Short) => {
                        prefixes.push(0x67);
                        code.push(0x03 | middle);
                    }
                    Some(Place::Index) => {
                        rex |= 1;
                        code.extend([0x84 | middle, 0xb1]);
                        code.extend((-0x20i32).to_le_bytes());
                    }
                    Some(Place::Rip) => {
                        code.push(0x05 | middle);
                        rip_at = Some(code.len());
                        code.extend([0; 4]);
                    }
                }
            }
            _ => {
                let (byte, plus) = t.split_once("+r").map_or((t, 0), |(b, _)| (b, form.rm));
                rex |= if plus > 7 { 1 } else { 0 };
                code.push(u8::from_str_radix(byte, 16).unwrap() + (plus & 7));
            }
        }
    }
    if !modrm && !row.contains("+r") && (form.place.is_some() || form.rm != 0) {
        // Nothing of the form is encoded: once is enough.
        return None;
    }
    if row.contains("+r") && (form.place.is_some() || form.rm == 4 && !form.rex && size != 'b') {
        return None;
    }
    let mut out = prefixes;
    if let Some((pp, map)) = vex {
        // R, X, B and vvvv are inverted.
        let (r, b) = (rex >> 2 & 1, rex & 1);
        // RORX has no third register.
        let vvvv = if map == 3 { 15 } else { !THIRD & 15 };
        out.extend([0xc4, (1 - r) << 7 | 1 << 6 | (1 - b) << 5 | map, (rex & 8) << 4 | vvvv << 3 | pp]);
    } else if rex != 0 || form.rex {
        out.push(0x40 | rex);
    }
    let start = out.len();
    out.extend(code);
    let next = INSN + out.len() as u64;
    if let Some(at) = rip_at {
        out[start + at..start + at + 4].copy_from_slice(&((DATA + 0x60).wrapping_sub(next) as u32).to_le_bytes());
    }
    let n = if row.contains("rel8") { 1 } else { 4 };
    if row.contains("rel") {
        let at = out.len() - n;
        out[at..].copy_from_slice(&TAKEN.wrapping_sub(next).to_le_bytes()[..n]);
    }
    Some(out)
}

/// The flags that the manual leaves undefined after `i`, with `cl` in CL; `None` if the result is undefined as well.
pub(super) fn undefined(i: &Instruction, cl: u64) -> Option<u64> {
    const MAP: [(u32, u64); 6] = [
        (RflagsBits::OF, flag::OF),
        (RflagsBits::SF, flag::SF),
        (RflagsBits::ZF, flag::ZF),
        (RflagsBits::AF, flag::AF),
        (RflagsBits::CF, flag::CF),
        (RflagsBits::PF, flag::PF),
    ];
    use Mnemonic::*;
    let all = i.rflags_undefined();
    let listed = MAP.iter().filter(|(bit, _)| all & bit != 0).fold(0, |m, (_, f)| m | f);
    if !matches!(i.mnemonic(), Shl | Shr | Sar | Sal | Rol | Ror | Rcl | Rcr | Shld | Shrd) {
        return Some(listed);
    }
    let last = i.op_count() - 1;
    let count = if i.op_register(last) == Register::CL { cl } else { i.immediate(last) };
    let bytes = if i.op0_register() == Register::None { i.memory_size().size() } else { i.op0_register().size() };
    let count = count & if bytes == 8 { 63 } else { 31 };
    let rotate = matches!(i.mnemonic(), Rol | Ror | Rcl | Rcr);
    let mut mask = if rotate { 0 } else { flag::AF };
    if count > 1 {
        mask |= flag::OF;
    }
    if matches!(i.mnemonic(), Shl | Sal | Shr) && count >= 8 * bytes as u64 {
        mask |= flag::CF;
    }
    if matches!(i.mnemonic(), Shld | Shrd) && count > 8 * bytes as u64 {
        return None;
    }
    Some(if count == 0 { 0 } else { mask })
}

/// Calls `f` with every form of every row.
pub(super) fn each(r: &mut Random, mut f: impl FnMut(&mut Random, &str, Operands, &[u8], &Instruction)) {
    let rows = generated();
    let rows = TABLE.iter().copied().chain(rows.iter().map(|(row, sizes)| (row.as_str(), *sizes)));
    for (row, sizes) in rows {
        for size in sizes.chars() {
            let high: &[Operands] = if size == 'b' || row.starts_with("0f b") { HIGH_FORMS } else { &[] };
            for &form in FORMS.iter().chain(high) {
                let value = r.nasty();
                let Some(code) = encode(row, size, form, value) else { continue };
                let i = Decoder::with_ip(64, &code, INSN, DecoderOptions::NONE).decode();
                assert!(!i.is_invalid() && i.len() == code.len(), "{row} {size}: {code:02x?}");
                // The stack pointer as an operand of anything but PUSH and POP breaks the frame.
                let sp = (0..i.op_count()).any(|n| i.op_register(n).full_register() == Register::RSP);
                if !sp || matches!(i.mnemonic(), Mnemonic::Push | Mnemonic::Pop) {
                    f(r, row, form, &code, &i);
                }
            }
        }
    }
}
