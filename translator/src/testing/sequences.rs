//! Random programs of many instructions, branches and bounded loops, on both engines against the host's processor:
//! what single instructions cannot show, such as flags that outlive the instruction that made them, registers that
//! are written back late, and faults in the middle of compiled code.

use iced_x86::{Code, CpuidFeature, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, Register, RflagsBits};

use super::bench::host_has;
use super::integer::{self, undefined};
use super::program::{Part, Program, Rsi, Step};
use super::{ABSENT, DATA, Machine, Random, every};
use crate::state::flag;

/// Registers that programs must not write: those of addresses, the stack pointer and the loop counter.
const KEPT: [Register; 5] = [Register::RBX, Register::RSP, Register::RSI, Register::R9, COUNTER];
const COUNTER: Register = Register::R15;
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

/// What `i` does with the flags; `None` if it may not stand in a program.
pub(crate) fn part(code: &[u8], i: &Instruction, info: &mut InstructionInfoFactory) -> Option<Part> {
    use Mnemonic::*;
    if i.flow_control() != iced_x86::FlowControl::Next || i.is_string_instruction() || i.is_privileged() {
        return None;
    }
    // RIP-relative operands and others that lead astray somewhere else; a stack pointer that others need; state that
    // processors treat in their own ways.
    if i.is_ip_rel_memory_operand()
        || matches!(i.mnemonic(), Xlatb | Maskmovdqu | Vmaskmovdqu | Leave | Enter | Pushf | Pushfq | Lahf | Cpuid)
    {
        return None;
    }
    // AMD's processors read 32 bits of memory.
    if i.code() == Code::Movsxd_r16_rm16 {
        return None;
    }
    if i.memory_displ_size() == 8 || matches!(i.mnemonic(), Bt | Bts | Btr | Btc) && i.memory_size().size() != 0 {
        return None;
    }
    let writes_kept = info.info(i).used_registers().iter().any(|u| {
        let writes =
            !matches!(u.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess);
        writes && KEPT.contains(&u.register().full_register())
    });
    if writes_kept && !matches!(i.mnemonic(), Push | Pop) || i.op0_register().full_register() == Register::RSP {
        return None;
    }
    if KEPT.contains(&i.op0_register().full_register()) && i.mnemonic() == Pop {
        return None;
    }
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
    let reads = flags(i.rflags_read());
    let stack = i.is_stack_instruction();
    let rsi = match Register::RSI {
        r if i.memory_base() == r => Some(Rsi::Base),
        r if i.memory_index() == r => Some(Rsi::Index),
        _ => None,
    };
    Some(Part { code: code.to_vec(), reads, undefines, defines, stack, rsi })
}

/// All parts: the integer instructions of the table, and the vector instructions.
pub(crate) fn parts(r: &mut Random) -> [Vec<Part>; 2] {
    let mut info = InstructionInfoFactory::new();
    let (mut integers, mut vectors) = (Vec::new(), Vec::new());
    integer::each(r, |_, _, _, code, i| {
        if i.cpuid_features().iter().all(|&f| host_has(f)) {
            integers.extend(part(code, i, &mut info));
        }
    });
    every::each(r, 64, |_, code, i| {
        // every.rs says why not: MMX state at faults, SHA's alignment.
        let vector = (0..i.op_count()).any(|n| i.op_register(n).is_xmm() || i.op_register(n).is_ymm());
        let mmx = i.mnemonic() == Mnemonic::Cvtpi2ps || (0..i.op_count()).any(|n| i.op_register(n).is_mm());
        let sha = i.cpuid_features().contains(&CpuidFeature::SHA) && i.memory_size().size() != 0;
        if vector && !mmx && !sha && !i.is_vsib() && i.cpuid_features().iter().all(|&f| host_has(f)) {
            vectors.extend(part(code, i, &mut info));
        }
    });
    [integers, vectors]
}

fn pick(r: &mut Random, parts: &[Vec<Part>; 2], rsi: Rsi, stack: &mut usize) -> Part {
    loop {
        let pool = &parts[usize::from(r.below(3) == 0)];
        let part = &pool[r.below(pool.len() as u64) as usize];
        if part.stack && *stack == STACK || part.rsi.is_some_and(|r| r != rsi) {
            continue;
        }
        *stack += usize::from(part.stack);
        return part.clone();
    }
}

/// A program of 2 to [`LONGEST`] parts with branches over some of them, perhaps in a loop.
pub(crate) fn program(r: &mut Random, parts: &[Vec<Part>; 2]) -> Program {
    let mut left = 2 + r.below(LONGEST - 1);
    let rounds = (r.below(2) == 0).then(|| 1 + r.below(4) as u8);
    let rsi = if r.below(2) == 0 { Rsi::Base } else { Rsi::Index };
    let mut stack = 0;
    let mut steps = Vec::new();
    while left > 0 {
        if r.below(4) == 0 {
            let condition = r.below(16) as u8;
            let over: Vec<_> = (0..left.min(1 + r.below(3))).map(|_| pick(r, parts, rsi, &mut stack)).collect();
            left -= over.len() as u64;
            steps.push(Step::Branch(condition, over));
        } else {
            steps.push(Step::Part(pick(r, parts, rsi, &mut stack)));
            left -= 1;
        }
    }
    Program { rounds, rsi, steps }
}

/// A state that programs can run from in which RSI is what it says.
pub(crate) fn state(r: &mut Random, rsi: Rsi) -> Machine {
    let mut m = every::state(r, &Instruction::default());
    let middle = DATA + 0xf8 + r.below(16);
    m.gpr[4] = middle & !7;
    m.gpr[3] = middle - 0x10;
    if rsi == Rsi::Index {
        m.gpr[6] = r.below(8);
        m.gpr[9] = middle + 0x20 - 4 * m.gpr[6];
    } else {
        // Some operands are not aligned.
        m.gpr[6] = DATA + 0x80 + if r.below(4) == 0 { r.below(64) } else { 0 };
    }
    // Some accesses fault.
    match r.below(16) {
        0 => m.gpr[3] = ABSENT - r.below(24),
        1 => m.gpr[6] = ABSENT - r.below(40),
        _ => {}
    }
    m
}

#[test]
fn there_are_many_parts() {
    let parts = parts(&mut Random::new(7));
    assert!(parts[0].len() > 2000 && parts[1].len() > 1500, "{} {}", parts[0].len(), parts[1].len());
}
