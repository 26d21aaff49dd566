//! Random programs of many instructions, branches and bounded loops, on both engines against the host's processor:
//! what single instructions cannot show, such as flags that outlive the instruction that made them, registers that
//! are written back late, and faults in the middle of compiled code.

use std::collections::BTreeMap;

use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, Encoder, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    Register, RflagsBits,
};

use super::integer::{self, undefined};
use super::native::host_has;
use super::outcome::is_image;
use super::program::{BRANCHES, Part, Program, Rsi, Step};
use super::{ABSENT, DATA, INSN, Machine, Random, bundles, every};
use crate::state::flag;

/// Registers that programs must not write: those of addresses, the stack pointer and the loop counter.
fn kept(bits: u32) -> [Register; 5] {
    let counter = if bits == 64 { Register::R15 } else { Register::RBP };
    [Register::RBX, Register::RSP, Register::RSI, Register::R9, counter]
}
/// The numbers of those that lead into the data.
pub(crate) const POINTERS: [usize; 4] = [3, 4, 6, 9];
/// The most parts of a program.
const LONGEST: u64 = 64;
/// The most parts that move the stack pointer, so that even four rounds of them do not lead out of the data.
const STACK: usize = 6;

fn flags(bits: u32) -> u64 {
    [
        (RflagsBits::OF, flag::OF),
        (RflagsBits::SF, flag::SF),
        (RflagsBits::ZF, flag::ZF),
        (RflagsBits::AF, flag::AF),
        (RflagsBits::CF, flag::CF),
        (RflagsBits::PF, flag::PF),
    ]
    .iter()
    .filter(|(bit, _)| bits & bit != 0)
    .fold(0, |all, (_, f)| all | f)
}

/// The flags that `i` reads, leaves undefined, and gives a value; `None` if its result may be undefined, too.
pub(super) fn flags_of(i: &Instruction) -> Option<(u64, u64, u64)> {
    use Mnemonic::*;
    // Shifts may leave everything as it is, or not.
    let shift = matches!(i.mnemonic(), Shl | Shr | Sar | Sal | Rol | Ror | Rcl | Rcr | Shld | Shrd);
    let (undefines, defines) = if shift {
        let bits = i.rflags_written() | i.rflags_undefined();
        if matches!(i.mnemonic(), Shld | Shrd) && i.op0_register().size() == 2 {
            return None;
        }
        let count = i.op_count() - 1;
        let known = i.op_register(count) == Register::None;
        let mask = undefined(i, 0x1f)?;
        let mask = if known { undefined(i, 0)? } else { mask };
        let all = flags(bits) & !mask;
        let zero = known && i.immediate(count) & 31 == 0;
        (mask, if known && !zero { all } else { 0 })
    } else {
        let given = i.rflags_written() | i.rflags_cleared() | i.rflags_set();
        (flags(i.rflags_undefined()), flags(given))
    };
    Some((flags(i.rflags_read()), undefines, defines))
}

/// `i` as a part; `None` if it may not stand in a program.
pub(crate) fn part(code: &[u8], i: &Instruction, info: &mut InstructionInfoFactory, bits: u32) -> Option<Part> {
    use Mnemonic::*;
    if i.code().op_code().fwait() || i.len() != code.len() {
        // Two instructions, each of which is a part by itself.
        return None;
    }
    if i.flow_control() != iced_x86::FlowControl::Next || i.is_string_instruction() || i.is_privileged() {
        return None;
    }
    // What needs other registers (bundles.rs has most of it), leads somewhere else, or moves the stack pointer too far.
    // MONITOR and MWAIT have nothing to do in user mode. LSL may find the segment whose limit is the number of the host's processor.
    if matches!(
        i.mnemonic(),
        Monitor
            | Mwait
            | Lsl
            | Ldmxcsr
            | Vldmxcsr
            | Maskmovq
            | Maskmovdqu
            | Vmaskmovdqu
            | Leave
            | Enter
            | Popf
            | Popfd
            | Popfq
            | Pusha
            | Pushad
    ) || is_image(i)
        || i.memory_base().full_register() == Register::RBP
    {
        return None;
    }
    // Segment registers and their bases are bundles.rs's to change; reading them is harmless.
    let to_segment = i.op0_register().is_segment_register() && i.mnemonic() != Push;
    if to_segment || matches!(i.mnemonic(), Wrfsbase | Wrgsbase | Lds | Les | Lfs | Lgs | Lss) {
        return None;
    }
    // AMD's processors read 32 bits of memory.
    if i.code() == Code::Movsxd_r16_rm16 {
        return None;
    }
    let bit_string = matches!(i.mnemonic(), Bt | Bts | Btr | Btc) && i.op1_register() != Register::None;
    if bit_string && i.memory_size().size() != 0 {
        return None;
    }
    let kept = kept(bits);
    let writes_kept = info.info(i).used_registers().iter().any(|u| {
        let writes =
            !matches!(u.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess);
        writes && kept.contains(&u.register().full_register())
    });
    if writes_kept && !matches!(i.mnemonic(), Push | Pop) || i.op0_register().full_register() == Register::RSP {
        return None;
    }
    if kept.contains(&i.op0_register().full_register()) && i.mnemonic() == Pop {
        return None;
    }
    let (reads, undefines, defines) = flags_of(i)?;
    let stack = i.is_stack_instruction();
    let is_rsi = |r: Register| r.full_register() == Register::RSI;
    let rsi = match i.memory_base() {
        base if is_rsi(base) => Some(Rsi::Base),
        _ if is_rsi(i.memory_index()) => Some(Rsi::Index),
        _ => None,
    };
    let rip = i.is_ip_rel_memory_operand().then(|| {
        let mut decoder = Decoder::with_ip(bits, code, INSN, DecoderOptions::NONE);
        let i = decoder.decode();
        decoder.get_constant_offsets(&i).displacement_offset()
    });
    Some(Part { bits, code: code.to_vec(), reads, undefines, defines, stack, rsi, rip })
}

/// All parts of programs of 32 or of 64 bits, by kind: integer instructions, vector instructions, those of x87 and MMX,
/// bundles.rs's, and those of x87 alone.
pub(crate) struct Parts {
    bits: u32,
    pools: [Pool; 5],
}

/// Which of the pools are the x87's.
const X87: usize = 4;

/// Parts of one kind.
#[derive(Default)]
struct Pool {
    parts: Vec<Part>,
    /// Which of them begin with the same code.
    codes: Vec<Vec<usize>>,
}

impl Pool {
    fn new(parts: Vec<Part>) -> Pool {
        let mut codes = BTreeMap::<Code, Vec<usize>>::new();
        for (n, p) in parts.iter().enumerate() {
            let code = Decoder::new(p.bits, &p.code, DecoderOptions::NONE).decode().code();
            codes.entry(code).or_default().push(n);
        }
        Pool { parts, codes: codes.into_values().collect() }
    }

    /// Any part, or, as many codes have few forms, one of any code.
    fn pick(&self, r: &mut Random) -> &Part {
        if r.below(2) == 0 {
            return &self.parts[r.below(self.parts.len() as u64) as usize];
        }
        let forms = &self.codes[r.below(self.codes.len() as u64) as usize];
        &self.parts[forms[r.below(forms.len() as u64) as usize]]
    }
}

pub(crate) fn parts(r: &mut Random, bits: u32) -> Parts {
    let mut info = InstructionInfoFactory::new();
    let mut pools = [const { Vec::new() }; 5];
    let here = |i: &Instruction| i.cpuid_features().iter().all(|&f| host_has(f));
    if bits == 64 {
        integer::each(r, |r, _, _, code, i| {
            if here(i) && !(is_division(i) && r.below(8) != 0) {
                pools[0].extend(part(code, i, &mut info, bits));
            }
        });
    }
    let bundles = bundles::all(r, bits);
    every::each(r, bits, |r, code, i| {
        // every.rs says why not: MMX state, alignment.
        let sha = i.cpuid_features().contains(&CpuidFeature::SHA);
        let narrow = i.mnemonic() == Mnemonic::Cvtpi2ps || sha;
        // FS and GS are null in 32-bit code.
        let useless = bits == 32 && matches!(i.segment_prefix(), Register::FS | Register::GS)
            || is_division(i) && r.below(8) != 0;
        if !here(i) || useless || narrow && i.memory_size().size() != 0 {
            return;
        }
        let of = |f: fn(Register) -> bool| (0..i.op_count()).any(|n| f(i.op_register(n)));
        let features = i.cpuid_features();
        let unit =
            features.iter().any(|f| matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387));
        if i.is_vsib() {
            let index = if format!("{:?}", i.code()).contains("vm32") { 4 } else { 8 };
            // With a 32-bit address the base is the same.
            if matches!(i.memory_base(), Register::RSI | Register::ESI) {
                pools[3].push(bundles::gather(r, bits, code, index));
            }
        } else if unit || of(Register::is_mm) || i.mnemonic() == Mnemonic::Emms {
            pools[2].extend(part(code, i, &mut info, bits));
            if unit {
                pools[X87].extend(part(code, i, &mut info, bits));
            }
        } else if of(Register::is_xmm) || of(Register::is_ymm) {
            pools[1].extend(part(code, i, &mut info, bits));
        } else {
            pools[0].extend(part(code, i, &mut info, bits));
            if bits == 32 {
                for base in [Register::EBX, Register::ESP] {
                    pools[0].extend(elsewhere(i, base).and_then(|(code, i)| part(&code, &i, &mut info, bits)));
                }
            }
        }
    });
    pools[3].extend(bundles);
    Parts { bits, pools: pools.map(Pool::new) }
}

/// Divisions mostly fail, and bundles.rs has some that do not.
fn is_division(i: &Instruction) -> bool {
    matches!(i.mnemonic(), Mnemonic::Div | Mnemonic::Idiv)
}

/// `i` of 32-bit code with its memory operand at another register.
fn elsewhere(i: &Instruction, base: Register) -> Option<(Vec<u8>, Instruction)> {
    if i.memory_base() != Register::ESI || i.has_lock_prefix() {
        return None;
    }
    let mut i = *i;
    i.set_memory_base(base);
    i.set_memory_displacement64(0x10);
    i.set_memory_displ_size(1);
    let mut encoder = Encoder::new(32);
    encoder.encode(&i, INSN).ok()?;
    let code = encoder.take_buffer();
    let i = Decoder::with_ip(32, &code, INSN, DecoderOptions::NONE).decode();
    Some((code, i))
}

fn pick(r: &mut Random, parts: &Parts, rsi: Rsi, stack: &mut usize) -> Part {
    let pool = [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3][r.below(12) as usize];
    pick_from(r, parts, pool, rsi, stack)
}

fn pick_from(r: &mut Random, parts: &Parts, pool: usize, rsi: Rsi, stack: &mut usize) -> Part {
    loop {
        let pool = &parts.pools[pool];
        let part = pool.pick(r);
        if part.stack && *stack == STACK || part.rsi.is_some_and(|r| r != rsi) {
            continue;
        }
        *stack += usize::from(part.stack);
        return part.clone();
    }
}

/// A program of 2 to [`LONGEST`] parts with branches over some of them, perhaps in a loop.
pub(crate) fn program(r: &mut Random, parts: &Parts) -> Program {
    let mut left = 2 + r.below(LONGEST - 1);
    let rounds = (r.below(2) == 0).then(|| 1 + r.below(4) as u8);
    let rsi = if parts.bits == 32 || r.below(2) == 0 { Rsi::Base } else { Rsi::Index };
    let mut stack = 0;
    let mut steps = Vec::new();
    while left > 0 {
        let some = left.min(1 + r.below(3));
        let kind = r.below(16);
        // The return finds its address where the call has put it.
        let mut none = STACK;
        let left_to_move = if kind < 5 { &mut stack } else { &mut none };
        let mut several = |r: &mut Random| (0..some).map(|_| pick(r, parts, rsi, left_to_move)).collect();
        match kind {
            0..4 => steps.push(Step::Branch(r.below(16) as u8, several(r))),
            4 => steps.push(Step::Branch(16 + r.below(BRANCHES.len() as u64) as u8, several(r))),
            5 => steps.push(Step::Call(r.below(2) == 0, several(r))),
            6 => {
                let of_unit = |_| Step::Part(pick_from(r, parts, X87, rsi, &mut stack));
                steps.extend((0..some).map(of_unit));
            }
            _ => {
                steps.push(Step::Part(pick(r, parts, rsi, &mut stack)));
                left -= 1;
                continue;
            }
        }
        left -= some;
    }
    Program { bits: parts.bits, rounds, rsi, steps }
}

/// A program of x87 instructions, perhaps in a loop.
#[cfg(test)]
pub(crate) fn x87_program(r: &mut Random, parts: &Parts) -> Program {
    let rounds = (r.below(2) == 0).then(|| 1 + r.below(4) as u8);
    let length = 2 + r.below(20);
    let steps = (0..length).map(|_| Step::Part(pick_from(r, parts, X87, Rsi::Base, &mut 0))).collect();
    Program { bits: parts.bits, rounds, rsi: Rsi::Base, steps }
}

/// A state that a program can run from.
pub(crate) fn state(r: &mut Random, program: &Program) -> Machine {
    let mut m = every::state(r, &Instruction::default(), program.bits);
    m.segments.fs_base = 64 * r.below(2);
    let middle = DATA + 0xf8 + r.below(16);
    // Where no other operand is, as returns have to find their address.
    m.gpr[4] = DATA + 0x340 + 8 * r.below(8);
    m.gpr[3] = middle - 0x10;
    if program.rsi == Rsi::Index {
        m.gpr[6] = r.below(8);
        m.gpr[9] = middle + 0x20 - 4 * m.gpr[6];
    } else {
        // Some operands are not aligned.
        m.gpr[6] = DATA + 0x80 + if r.below(4) == 0 { r.below(64) } else { 0 };
    }
    if r.below(4) != 0 {
        // Mostly nothing is in the way of programs.
        m.mxcsr |= 0x1f80;
        m.fpu.control |= 0x3f;
        m.flags &= !flag::AC;
    }
    if r.below(2) == 0 {
        // Room in the x87 stack, and numbers.
        let top = u32::from(m.fpu.status >> 11 & 7);
        m.fpu.tags = (0xffu8 >> r.below(8)).rotate_left(top);
    }
    // Some accesses fault.
    match r.below(20) {
        0 => m.gpr[3] = ABSENT - r.below(24),
        1 => m.gpr[6] = ABSENT - r.below(40),
        _ => {}
    }
    m
}

#[test]
fn there_are_many_parts() {
    for (bits, least) in [(64, [5000, 1500, 700, 600, 300]), (32, [1500, 1500, 600, 600, 300])] {
        let parts = parts(&mut Random::new(7), bits);
        let counts = parts.pools.each_ref().map(|p| p.parts.len());
        assert!(counts.iter().zip(least).all(|(n, least)| *n > least), "{bits}: {counts:?}");
    }
}
