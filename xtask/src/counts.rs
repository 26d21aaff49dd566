//! `cargo xtask counts`: benches/counts.txt, what compiled code costs where no clock is needed to tell.
//!
//! Each loop runs compiled, twice, for different numbers of rounds, while the host counts its instructions (`steps.rs`); the
//! difference belongs to the rounds alone. What the vCPU runs outside the code cache (helpers, the dispatch loop)
//! is counted apart.

mod loops;
mod steps;

use std::fmt::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use diglot_translator::insn::Mode;
use diglot_translator::jit::compile::Compiler;
use diglot_translator::jit::host;
use diglot_translator::jit::region::{Options, Plan};
use diglot_translator::jit::{Jit, JitCounts};
use diglot_translator::testing::bare::{self, CODE};
use diglot_translator::vcpu::Vcpu;

/// The pages, one for each kind of host.
const PAGES: [(&str, &str); 2] = [("x86_64", "counts.txt"), ("aarch64", "counts-aarch64.txt")];
const DIRECTORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../benches");
/// Rounds until everything is compiled, and of the two runs that are counted; fewer where another process has to take each
/// step.
const WARM: u64 = 5_000;
const SHORT: u64 = if cfg!(target_arch = "x86_64") { 100 } else { 20 };
const LONG: u64 = 3 * SHORT;
/// How much worse or better than the page says a figure may be before the check fails.
const TOLERANCE: f64 = 0.03;
/// The same for compile times, which are measured by a clock after all, if against another compile at the same time.
const TIME_TOLERANCE: f64 = 0.35;

/// What one loop costs.
struct Cost {
    name: &'static str,
    /// Guest instructions in a round.
    guest: f64,
    /// Host instructions for each of them in compiled code.
    inside: f64,
    /// And outside it.
    outside: f64,
    /// Host code bytes for each guest byte of the regions.
    bytes: f64,
    /// Helper calls and slow paths in a thousand guest instructions.
    helpers: f64,
    /// Host instructions for each guest instruction in quick code and what it calls.
    quick: f64,
    /// Host code bytes for each guest byte of quick code.
    quick_bytes: f64,
}

/// What runs a loop.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Tier {
    Quick,
    Regions,
}

/// What the rounds of a loop cost, in all.
struct Counted {
    inside: f64,
    outside: f64,
    helpers: f64,
}

/// Writes the page, or compares what is measured with it.
pub fn run(check: bool) -> ExitCode {
    let Some((_, name)) = PAGES.iter().find(|(host, _)| *host == std::env::consts::ARCH) else {
        eprintln!("counts: skipped: nothing counts instructions on such a host");
        return ExitCode::from(2);
    };
    if check && let Err(why) = compare_hosts() {
        return fail(&why);
    }
    let costs: Vec<Cost> = loops::LOOPS.iter().map(|&(name, code)| cost(name, &code())).collect();
    let page = page(&costs, compile_ratio());
    // Inside a virtual machine the page is where one runs this, if anywhere.
    let path = &pages().unwrap_or(Path::new(".")).join(name);
    if !check {
        return match std::fs::write(path, page) {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => fail(&format!("{}: {e}", path.display())),
        };
    }
    let kept = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) => return fail(&format!("{}: {e}; run cargo xtask counts", path.display())),
    };
    compare(&kept, &page, path)
}

fn fail(why: &str) -> ExitCode {
    eprintln!("counts: {why}");
    ExitCode::FAILURE
}

fn cost(name: &'static str, code: &[u8]) -> Cost {
    let mut interpreter = Vcpu::new(bare::cpu(code), None);
    let mut interpreted = |rounds| {
        let before = interpreter.counts.interpreted;
        start(&mut interpreter, rounds);
        interpreter.run();
        interpreter.counts.interpreted - before
    };
    let guest = (interpreted(LONG) - interpreted(SHORT)) as f64 / (LONG - SHORT) as f64;

    let (regions, jit) = counted(code, Tier::Regions);
    let (quick, quick_jit) = counted(code, Tier::Quick);
    Cost {
        name,
        guest,
        inside: regions.inside / guest,
        outside: regions.outside / guest,
        bytes: jit.code_bytes as f64 / jit.guest_bytes as f64,
        helpers: 1000.0 * regions.helpers / guest,
        quick: (quick.inside + quick.outside) / guest,
        quick_bytes: quick_jit.quick_bytes as f64 / code.len() as f64,
    }
}

/// What a round of a loop costs in one of the compiled tiers, and what was compiled.
fn counted(code: &[u8], tier: Tier) -> (Counted, JitCounts) {
    let jit = Jit::new(4 << 20, 1).expect("a host that Cranelift compiles for");
    let mut vcpu = Vcpu::new(bare::cpu(code), Some(jit));
    match tier {
        Tier::Regions => vcpu.set_threshold(50),
        Tier::Quick => {
            vcpu.set_quick(1, u32::MAX);
            vcpu.cpu.jit.until_look = i64::MAX;
        }
    }
    // Waiting for the compiler at once, so that regions are always planned in the same moments.
    for _ in 0..2 {
        start(&mut vcpu, WARM);
        while vcpu.turn().is_none() {
            vcpu.jit.as_ref().expect("a compiler").drain();
        }
    }
    let mut run = |rounds| {
        start(&mut vcpu, rounds);
        let calls = vcpu.cpu.jit.helper_calls + vcpu.cpu.jit.slow_paths;
        let steps = steps::count(|| _ = vcpu.run());
        (steps, vcpu.cpu.jit.helper_calls + vcpu.cpu.jit.slow_paths - calls)
    };
    // The first run of either length takes host page faults and the like, which count nothing but disturb nothing.
    let ((short, short_calls), (long, long_calls)) = (run(SHORT), run(LONG));
    let each = |long: u64, short: u64| (long as f64 - short as f64) / (LONG - SHORT) as f64;
    let counted = Counted {
        inside: each(long.inside, short.inside),
        outside: each(long.outside, short.outside),
        helpers: each(long_calls, short_calls),
    };
    let jit = vcpu.jit.map(|jit| jit.counts.clone());
    (counted, jit.expect("a compiler"))
}

/// Puts the CPU at the start of a loop of so many rounds.
fn start(vcpu: &mut Vcpu, rounds: u64) {
    vcpu.cpu.s.rip = CODE;
    vcpu.cpu.s.gpr[1] = rounds;
    vcpu.cpu.s.gpr[4] = bare::STACK;
}

/// The time to compile a block of a fixed region, to that of a fixed small function in the same moment.
fn compile_ratio() -> f64 {
    let mut vcpu = Vcpu::new(bare::cpu(&loops::branches()), None);
    start(&mut vcpu, WARM);
    vcpu.run();
    let mode = Mode(vcpu.cpu.mode.0);
    let seeds = (CODE..CODE + 64).filter(|&gpa| vcpu.blocks.find(gpa, mode).is_some());
    let plans = seeds.filter_map(|gpa| Plan::grow(&vcpu.blocks, &vcpu.cpu, gpa, mode, |b| b.heat, Options::default()));
    let plan = plans.max_by_key(|p| p.blocks.len()).expect("a region");
    let mut compiler = Compiler::new().expect("a host that Cranelift compiles for");
    let time = |f: &mut dyn FnMut()| {
        let start = Instant::now();
        f();
        start.elapsed()
    };
    // The least of many is what the host does undisturbed.
    let (mut region, mut small) = (Duration::MAX, Duration::MAX);
    for _ in 0..300 {
        region = region.min(time(&mut || _ = compiler.compile(&plan)));
        small = small.min(time(&mut || _ = compiler.lookup()));
    }
    region.as_secs_f64() / plan.blocks.len() as f64 / small.as_secs_f64()
}

/// The line that says what the figures depend on.
fn host_line() -> String {
    format!("host: {} with {}", std::env::consts::ARCH, host::features().join(" "))
}

/// The head of the table.
const COLUMNS: &str = "loop           guest    code     else   bytes    calls    quick  its bytes";
/// The line of the compile time begins so.
const COMPILING: &str = "compiling a block, to compiling a small function:";

fn page(costs: &[Cost], compile_ratio: f64) -> String {
    let mut text = String::from(
        "What compiled code costs: written and checked by `cargo xtask counts`.\n\
         \n\
         guest: guest instructions in a round of the loop. code, else: host instructions for each of them, in compiled\n\
         code and outside it. bytes: host code bytes for a guest byte. calls: calls of helpers in 1000 guest instructions.\n\
         quick, its bytes: host instructions for a guest instruction, and host code bytes for a guest byte, in quick code.\n\n",
    );
    let _ = writeln!(text, "{}\n", host_line());
    let _ = writeln!(text, "{COLUMNS}");
    for c in costs {
        let _ = writeln!(
            text,
            "{:<12} {:>7.1} {:>7.2} {:>8.2} {:>7.1} {:>8.1} {:>8.2} {:>10.1}",
            c.name, c.guest, c.inside, c.outside, c.bytes, c.helpers, c.quick, c.quick_bytes
        );
    }
    let _ = writeln!(text, "\n{COMPILING} {compile_ratio:.2}");
    text
}

/// The figures of a page: each line's first word or words, and its numbers.
fn figures(page: &str) -> Vec<(&str, Vec<f64>)> {
    let rows = page.lines().filter_map(|line| {
        let at = line.find(|c: char| c.is_ascii_whitespace())?;
        let (name, rest) = match line.strip_prefix(COMPILING) {
            Some(rest) => (COMPILING, rest),
            None => line.split_at(at),
        };
        let numbers: Result<Vec<f64>, _> = rest.split_whitespace().map(str::parse).collect();
        numbers.ok().filter(|n| !n.is_empty()).map(|n| (name, n))
    });
    rows.collect()
}

/// The directory of the pages, where this is run beside the project.
fn pages() -> Option<&'static Path> {
    Some(Path::new(DIRECTORY)).filter(|d| d.is_dir())
}

/// How many times more host instructions than on x86-64 hosts compiled code may cost on others.
const HOSTS_RATIO: f64 = 1.3;
/// Loops that cost more, because floating point needs guards there, and x87 instructions are evaluated by helper.
const COSTLIER: [&str; 4] = ["scalar", "packed", "avx2", "x87"];

/// Compares the kept pages of different hosts.
fn compare_hosts() -> Result<(), String> {
    let Some(directory) = pages() else { return Ok(()) };
    let read = |name: &str| std::fs::read_to_string(directory.join(name)).map_err(|e| format!("{name}: {e}"));
    let [(_, first), others @ ..] = PAGES;
    let first = read(first)?;
    for (host, name) in others {
        let other = read(name)?;
        for ((name, base), (_, numbers)) in figures(&first).iter().zip(figures(&other)) {
            // Guest instructions, host instructions inside compiled code, and outside it.
            let (&[_, inside, outside, ..], &[_, more_inside, more_outside, ..]) = (&base[..], &numbers[..]) else {
                continue;
            };
            let ratio = (more_inside + more_outside) / (inside + outside);
            if ratio > HOSTS_RATIO && !COSTLIER.contains(name) {
                return Err(format!("{name}: {ratio:.2} times as many host instructions on {host} as on x86_64"));
            }
        }
    }
    Ok(())
}

fn compare(kept: &str, now: &str, path: &Path) -> ExitCode {
    print!("{now}");
    if !kept.contains(&host_line()) {
        eprintln!("counts: skipped: {} is of a host with other instructions", path.display());
        return ExitCode::from(2);
    }
    let (kept, now) = (figures(kept), figures(now));
    let mut wrong = kept.len().abs_diff(now.len());
    if wrong != 0 {
        eprintln!("counts: the page has {} rows, there should be {}", kept.len(), now.len());
    }
    for ((name, old), (_, new)) in kept.iter().zip(&now) {
        for (old, new) in old.iter().zip(new) {
            let tolerance = if *name == COMPILING { TIME_TOLERANCE } else { TOLERANCE };
            // Small figures are rounded on the page.
            if (new - old).abs() > tolerance * old + 0.06 {
                eprintln!("counts: {name}: {new} instead of {old}");
                wrong += 1;
            }
        }
    }
    if wrong != 0 {
        return fail("if that is meant, run cargo xtask counts and keep the page");
    }
    ExitCode::SUCCESS
}
