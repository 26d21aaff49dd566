//! The same program interpreted and compiled: all that either can see or change must be the same.
//!
//! Programs are raw bytes, or instructions that the input picks from the table of all forms. Both engines run one
//! several times from its start, on memory that is left as it was, so that the compiler's runs what the first time has
//! made hot.

use std::cell::RefCell;
use std::sync::LazyLock;

use diglot_translator::jit::Jit;
use diglot_translator::state::CpuState;
use diglot_translator::testing::forms::{self, Choice};
use diglot_translator::vcpu::{Exit, Vcpu};
use iced_x86::{Code, OpKind, Register};

use crate::guest::{Board, Kind, MOST_CODE, Random, Start};
use crate::input::Input;
use crate::ram::{RANGES, Ram};

/// Blocks and deliveries of one run; programs that take more do not end.
const TURNS: u32 = 500;
/// Turns in which the compiler's guest does nothing but take regions into use.
const INSTALLATIONS: u32 = 500;
/// Regions of one program, as most of the time goes into compiling them.
const REGIONS: u64 = 40;
const CODE_CACHE: usize = 1 << 20;
const MOST_PARTS: usize = 64;

thread_local! {
    static RAMS: [Ram; 2] = [Ram::new(), Ram::new()];
    static JIT: RefCell<Option<Jit>> = const { RefCell::new(None) };
}

/// Any program.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let [how, rounds] = input.array();
    let threshold = 1 + u32::from(how & 3);
    let counted = how & 4 != 0;
    let start = Start::take(&mut input, &Kind::COMPILED);
    let code = if how & 8 != 0 { input.rest().to_vec() } else { program(&mut input, start.kind.bits()) };
    RAMS.with(|rams| {
        for ram in rams {
            start.fill(ram, &code);
        }
        let mut jit = JIT.take().unwrap_or_else(|| Jit::new(CODE_CACHE, 1).expect("this host compiles"));
        jit.options.counted = counted;
        let boards = [Board::default(), Board::default()];
        let mut interpreter = Vcpu::new(start.cpu(&rams[0], boards[0].clone()), None);
        let mut compiler = Vcpu::new(start.cpu(&rams[1], boards[1].clone()), Some(jit));
        match how & 16 {
            0 => compiler.set_threshold(threshold),
            _ => compiler.set_quick(1, 8 * threshold),
        }
        for round in 0..2 + rounds % 3 {
            let state = if round == 0 { start.state.clone() } else { varied(&start.state, round) };
            interpreter.cpu.set_state(state.clone());
            compiler.cpu.set_state(state);
            let Some(expected) = drive(&mut interpreter, TURNS) else { break };
            let found = drive(&mut compiler, TURNS + INSTALLATIONS);
            let place = format!("round {round} of {:?}, code {code:02x?}", start.kind);
            assert_eq!(found, Some(expected), "{place}");
            compare(&interpreter.cpu.s, &compiler.cpu.s, &place);
            let [a, b] = [0, 1].map(|n: usize| boards[n].state(|s| (s.count, std::mem::take(&mut s.events))));
            assert_eq!(a, b, "interpreted and compiled, what came to the board: {place}");
            compare_ram(&rams[0].content(), &rams[1].content(), &place);
            if compiler.jit.as_ref().is_some_and(|jit| jit.counts.regions > REGIONS) {
                break;
            }
        }
        if let Some(mut jit) = compiler.jit.take() {
            jit.clear();
            JIT.set(Some(jit));
        }
    });
}

/// Runs until the guest halts or shuts down; `None` if it does neither.
fn drive(vcpu: &mut Vcpu, turns: u32) -> Option<Exit> {
    for _ in 0..turns {
        let exit = vcpu.turn();
        if let Some(jit) = &vcpu.jit {
            jit.drain();
        }
        if exit.is_some() {
            return exit;
        }
    }
    None
}

/// The same start with some registers changed, so that branches go other ways.
fn varied(state: &CpuState, round: u8) -> CpuState {
    let mut s = state.clone();
    let mut random = Random(u64::from(round) * 0x1234_5677);
    for r in [0, 1, 2, 7, 8, 10, 11, 12] {
        if random.u64() & 1 != 0 {
            s.gpr[r] = s.gpr[r].wrapping_add(random.u64() % 0x101).wrapping_sub(0x80);
        }
    }
    let flags = s.flags() ^ random.u64() & diglot_translator::state::flag::STATUS;
    s.set_flags(flags);
    s.ymm.rotate_left(1);
    s
}

fn compare(interpreted: &CpuState, compiled: &CpuState, place: &str) {
    // Equal flags in equal words.
    let normal = |s: &CpuState| {
        let mut s = s.clone();
        s.set_flags(s.flags());
        s
    };
    let (a, b) = (normal(interpreted), normal(compiled));
    if a != b {
        let (a, b) = (format!("{a:#x?}"), format!("{b:#x?}"));
        let differ: Vec<_> = a.lines().zip(b.lines()).enumerate().filter(|(_, (a, b))| a != b).collect();
        panic!("interpreted and compiled, lines of the state that differ: {differ:#?}\n{place}\n{a}");
    }
}

fn compare_ram(interpreted: &[u8], compiled: &[u8], place: &str) {
    // Whole first: byte by byte, every comparison is one for libFuzzer to note.
    if interpreted != compiled
        && let Some(at) = (0..interpreted.len()).find(|&at| interpreted[at] != compiled[at])
    {
        let address = if at < RANGES[0].1 { at } else { at - RANGES[0].1 + RANGES[1].0 as usize };
        let end = interpreted.len().min(at + 16);
        panic!(
            "memory at {address:#x}: interpreted {:02x?}, compiled {:02x?}\n{place}",
            &interpreted[at..end],
            &compiled[at..end]
        );
    }
}

/// Every instruction, in code of 64 and of 32 bits.
static CODES: LazyLock<[Vec<Code>; 2]> = LazyLock::new(|| [64, 32].map(|bits| forms::codes(bits).collect()));

/// Immediates that matter.
const IMMEDIATES: [u64; 16] =
    [0, 1, 2, 7, 8, 31, 32, 63, 0x7f, 0x80, 0xff, 0x7fff, 0x8000_0000, 0x7fff_ffff, u64::MAX, 0x1234_5678_9abc_def0];

/// Instructions with their operands, six bytes of the input each, and a HLT or what raises #GP in its place.
fn program(input: &mut Input, bits: u32) -> Vec<u8> {
    let codes = &CODES[usize::from(bits == 32)];
    let mut program = Vec::new();
    for _ in 0..MOST_PARTS {
        if input.is_empty() {
            break;
        }
        let code = codes[usize::from(input.u16()) % codes.len()];
        let [choice, place, value, displacement] = input.array();
        let choice = Choice {
            memory: choice & 1 != 0,
            high: if choice & 2 != 0 && bits == 64 { 8 } else { 0 },
            imm: if value & 0x80 == 0 { IMMEDIATES[usize::from(value & 15)] } else { value.into() },
            base: base(place, bits),
            displacement: i32::from(displacement as i8),
        };
        let Some(mut i) = forms::build(code, bits, &choice) else { continue };
        // A branch goes near, mostly on.
        let to = i64::from(displacement as i8) >> (place & 1);
        match i.op0_kind() {
            OpKind::NearBranch64 => i.set_near_branch64(to as u64),
            OpKind::NearBranch32 => i.set_near_branch32(to as u32),
            OpKind::NearBranch16 => i.set_near_branch16(to as u16),
            _ => {}
        }
        if let Ok(bytes) = forms::encode(&i, bits)
            && program.len() + bytes.len() < MOST_CODE
        {
            program.extend(bytes);
        }
    }
    program.push(0xf4);
    program
}

/// A base register.
fn base(place: u8, bits: u32) -> Register {
    const REGISTERS: [Register; 8] = [
        Register::RSI,
        Register::RBX,
        Register::RDI,
        Register::RBP,
        Register::RSP,
        Register::RAX,
        Register::R9,
        Register::R13,
    ];
    let r = REGISTERS[usize::from(place >> 1 & 7) % if bits == 64 { 8 } else { 6 }];
    if bits == 64 { r } else { r.full_register32() }
}
