//! Any code in any mode: decoded, traced, interpreted and compiled at once, on a guest whose RAM is small and has
//! nothing around it.
//!
//! Beyond panics, hangs and accesses outside guest RAM, it is checked that what the CPU derives from its state is up to
//! date at the end, and, in some of the runs, that what was compiled is in lock-step with the interpreter.

use std::cell::RefCell;
use std::sync::LazyLock;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use diglot_translator::cpu::{Cpu, Kick};
use diglot_translator::cpuid::CpuModel;
use diglot_translator::decode::decode;
use diglot_translator::insn::Mode;
use diglot_translator::jit::Jit;
use diglot_translator::trace::{Filter, Trace};
use diglot_translator::vcpu::{Exit, Vcpu};

use crate::guest::{Board, Kind, Start};
use crate::input::Input;
use crate::ram::Ram;

/// Blocks, regions and deliveries of one run.
const TURNS: u32 = 500;
/// Regions of one run, as most of the time goes into compiling them.
const REGIONS: u64 = 24;
/// How long the guest may stay in compiled code or in a repeated instruction.
const PATIENCE: Duration = Duration::from_millis(4);
/// How often it may.
const STOPS: u32 = 3;
/// Smallest code memory there is: regions get evicted.
const CODE_CACHE: usize = 1 << 20;

thread_local! {
    static RAM: Ram = Ram::new();
    /// The compiler of one guest after the other.
    static JIT: RefCell<Option<Jit>> = const { RefCell::new(None) };
}

/// How a guest is run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Plain,
    Counted,
    Traced,
    Lockstep,
}

/// Any code.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let how = input.u8();
    let threshold = 1 + u32::from(how & 3);
    let way = [Way::Plain, Way::Lockstep, Way::Counted, Way::Traced][usize::from(how >> 2 & 3)];
    let start = Start::take(&mut input, &Kind::ALL);
    let code = input.rest();
    sweep(code, &CpuModel::new(start.level, 1, 0));
    RAM.with(|ram| {
        start.fill(ram, code);
        let jit = JIT.take().unwrap_or_else(|| Jit::new(CODE_CACHE, 1).expect("this host compiles"));
        let mut vcpu = Vcpu::new(start.cpu(ram, Board::default()), Some(jit));
        match how & 16 {
            0 => vcpu.set_threshold(threshold),
            _ => vcpu.set_quick(1, 8 * threshold),
        }
        drive(&mut vcpu, way);
        assert_eq!(vcpu.difference, None);
        check_derived(&mut vcpu.cpu);
        if let Some(mut jit) = vcpu.jit.take() {
            jit.clear();
            jit.options.counted = false;
            JIT.set(Some(jit));
        }
    });
}

/// Decodes the bytes one instruction after the other, in each code size.
fn sweep(code: &[u8], model: &CpuModel) {
    for mode in [0, Mode::CODE32 | Mode::STACK32 | Mode::FLAT, Mode::CODE64 | Mode::FLAT] {
        let mut rest = code;
        for _ in 0..64 {
            let Ok(insn) = decode(rest, Mode(mode | Mode::SSE | Mode::AVX), model) else { break };
            assert!((1..=15).contains(&insn.len), "an instruction of {} bytes", insn.len);
            rest = rest.get(usize::from(insn.len)..).unwrap_or_default();
        }
    }
}

fn drive(vcpu: &mut Vcpu, way: Way) {
    match way {
        Way::Lockstep => vcpu.enable_lockstep(),
        Way::Counted => vcpu.jit.iter_mut().for_each(|jit| jit.options.counted = true),
        Way::Plain | Way::Traced => {}
    }
    let _watched = Watched::new(vcpu.cpu.kick.clone());
    if way == Way::Traced {
        vcpu.run_traced(&Trace::new(Filter::default(), true, Box::new(std::io::sink())));
        return;
    }
    // In lock-step all that was compiled is repeated, many times slower.
    let mut stops = if way == Way::Lockstep { STOPS } else { 0 };
    for _ in 0..TURNS {
        let exit = vcpu.turn();
        if let Some(jit) = &vcpu.jit {
            jit.drain();
        }
        match exit {
            None if vcpu.jit.as_ref().is_some_and(|jit| jit.counts.regions > REGIONS) => return,
            None => {}
            Some(Exit::Stopped) if vcpu.difference.is_none() && stops < STOPS => stops += 1,
            Some(_) => return,
        }
    }
}

/// What is derived from the state is what the state says.
fn check_derived(cpu: &mut Cpu) {
    let before = (cpu.mode, cpu.class, cpu.jit.salts);
    cpu.mode_changed();
    assert_eq!(before, (cpu.mode, cpu.class, cpu.jit.salts));
    assert_eq!(cpu.s.rflags & 0x2a, 2, "reserved flags: {:#x}", cpu.s.rflags);
    assert!(cpu.s.cpl <= 3 && cpu.smc.is_empty());
}

/// The guest that the watchdog looks at, and whether it has run since the last time.
static WATCH: LazyLock<Mutex<Option<(Kick, bool)>>> = LazyLock::new(|| {
    thread::spawn(|| {
        loop {
            thread::sleep(PATIENCE);
            let mut watch = WATCH.lock().expect("nobody panics with it");
            if let Some((kick, seen)) = &mut *watch
                && std::mem::replace(seen, true)
            {
                kick.request(Kick::STOP);
            }
        }
    });
    Mutex::new(None)
});

/// A guest that is stopped when it takes too long.
struct Watched;

impl Watched {
    fn new(kick: Kick) -> Watched {
        *WATCH.lock().expect("nobody panics with it") = Some((kick, false));
        Watched
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if let Ok(mut watch) = WATCH.lock() {
            *watch = None;
        }
    }
}
