//! Random programs of many instructions, branches and bounded loops, on both engines against the host's processor:
//! what single instructions cannot show, such as flags that outlive the instruction that made them, registers that
//! are written back late, and faults in the middle of compiled code.

use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, Register,
    RflagsBits,
};

use super::bench::{Bench, Case, host_has};
use super::integer::{self, undefined};
use super::{ABSENT, DATA, Machine, Random, every};
use crate::state::flag;

/// Registers that programs must not write: those of addresses, the stack pointer and the loop counter.
const KEPT: [Register; 5] = [Register::RBX, Register::RSP, Register::RSI, Register::R9, COUNTER];
const COUNTER: Register = Register::R15;
const SEED: u64 = 7;
const PROGRAMS: u64 = 1500;
const CASES: u64 = 8;
/// The host's jump behind the program must find room in its page, too.
const ROOM: usize = 0x400;

/// An instruction that may stand anywhere in a program.
struct Part {
    code: Vec<u8>,
    /// Flags that it reads, leaves undefined, and gives a value.
    reads: u64,
    undefines: u64,
    defines: u64,
}

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

/// What `i` does with the flags and whether it may stand in a program.
fn part(code: &[u8], i: &Instruction, info: &mut InstructionInfoFactory) -> Option<Part> {
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
    Some(Part { code: code.to_vec(), reads, undefines, defines })
}

/// All parts: the integer instructions of the table, and the vector instructions.
fn parts(r: &mut Random) -> [Vec<Part>; 2] {
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

/// A program under construction.
#[derive(Default)]
struct Program {
    code: Vec<u8>,
    text: Vec<String>,
    /// Flags that have no value at this point, and those that have none at some point before.
    undefined: u64,
    ever_undefined: u64,
}

impl Program {
    fn push(&mut self, code: &[u8]) {
        let i = Decoder::with_ip(64, code, super::INSN + self.code.len() as u64, DecoderOptions::NONE).decode();
        self.text.push(format!("{:#x} {i} {code:02x?}", super::INSN + self.code.len() as u64));
        self.code.extend(code);
    }

    /// Gives every flag a value, if one has none.
    fn define(&mut self) {
        if self.undefined != 0 {
            self.push(&[0x48, 0x39, 0xca]); // cmp rdx, rcx
            self.undefined = 0;
        }
    }

    fn part(&mut self, p: &Part) {
        if p.reads & self.undefined != 0 {
            self.define();
        }
        self.push(&p.code);
        self.undefined = self.undefined & !p.defines | p.undefines;
        self.ever_undefined |= self.undefined;
    }
}

fn pick<'a>(r: &mut Random, parts: &'a [Vec<Part>; 2]) -> &'a Part {
    let pool = &parts[usize::from(r.below(3) == 0)];
    &pool[r.below(pool.len() as u64) as usize]
}

/// A program of `n` parts with branches over some of them, perhaps in a loop.
fn program(r: &mut Random, parts: &[Vec<Part>; 2], n: u64) -> Program {
    let mut p = Program::default();
    let looped = r.below(2) == 0;
    if looped {
        p.push(&[0x41, 0xbf, 1 + r.below(4) as u8, 0, 0, 0]); // mov r15d, n
    }
    let head = p.code.len();
    let mut left = n;
    while left > 0 && p.code.len() < ROOM {
        if r.below(4) == 0 {
            // A conditional branch forward over a few parts, which see defined flags and leave such.
            p.define();
            let mut over = Program::default();
            for _ in 0..1 + r.below(3) {
                over.part(pick(r, parts));
                left = left.saturating_sub(1);
            }
            over.define();
            p.ever_undefined |= over.ever_undefined;
            let condition = r.below(16) as u8;
            p.push(&[0x70 | condition, over.code.len() as u8]);
            let (code, at) = (over.code, p.code.len() as u64);
            let mut decoder = Decoder::with_ip(64, &code, super::INSN + at, DecoderOptions::NONE);
            while decoder.can_decode() {
                let start = decoder.position();
                let i = decoder.decode();
                p.push(&code[start..start + i.len()]);
            }
        } else {
            p.part(pick(r, parts));
            left -= 1;
        }
    }
    if looped {
        // What follows the loop sees the flags of DEC, and of whatever came before it.
        p.define();
        p.push(&[0x41, 0xff, 0xcf]); // dec r15d
        let back = head as i64 - (p.code.len() as i64 + 6);
        let mut code = vec![0x0f, 0x85]; // jnz head
        code.extend((back as i32).to_le_bytes());
        p.push(&code);
    }
    p
}

fn state(r: &mut Random) -> Machine {
    let mut m = every::state(r, &Instruction::default());
    let middle = DATA + 0xf8 + r.below(16);
    m.gpr[4] = middle & !7;
    m.gpr[3] = middle - 0x10;
    m.gpr[6] = r.below(8);
    m.gpr[9] = middle + 0x20 - 4 * m.gpr[6];
    if r.below(2) == 0 {
        m.gpr[6] = DATA + 0x80;
    }
    if r.below(8) == 0 {
        // Some accesses fault.
        m.gpr[3] = ABSENT - r.below(24);
    }
    m
}

#[test]
fn as_the_processor_does() {
    let Some(mut bench) = Bench::new(64) else { return };
    let parts = parts(&mut Random::new(SEED));
    assert!(parts[0].len() > 2000 && parts[1].len() > 1500, "{} {}", parts[0].len(), parts[1].len());
    let mut completed = 0;
    for n in 0..PROGRAMS {
        let mut r = Random::new(SEED << 32 | n);
        let length = 2 + r.below(31);
        let p = program(&mut r, &parts, length);
        let cases: Vec<_> = (0..CASES)
            .map(|_| Case { before: state(&mut r), undefined: p.undefined, undefined_at_fault: p.ever_undefined })
            .collect();
        match bench.check(&p.code, &cases) {
            Ok(n) => completed += n as u64,
            Err(e) => panic!("program {n} of seed {SEED}:\n  {}\n{e}", p.text.join("\n  ")),
        }
    }
    assert!(completed > PROGRAMS * CASES / 4, "{completed} runs had no fault");
}
