//! `cargo xtask silicon`: the oracle of the translator's tests, for as long as wanted.

use std::process::ExitCode;

/// What to run.
#[derive(clap::Args)]
pub struct Options {
    /// Runs of a program from one state, each on the processor, interpreted and compiled.
    #[arg(long, default_value_t = 100_000)]
    cases: u64,
    /// Goes on for so long instead, whatever --cases says.
    #[arg(long)]
    seconds: Option<u64>,
    /// Says in the end how often which instructions were reached, and where cases faulted.
    #[arg(long)]
    census: bool,
    /// Compiles floating point with the guards that AArch64 hosts need.
    #[arg(long)]
    guards: bool,
    /// Chooses the programs; another one each time if not given.
    #[arg(long)]
    seed: Option<u32>,
    /// The number of the first program, to repeat one.
    #[arg(long, default_value_t = 0)]
    first: u64,
}

/// Programs between two looks at the clock.
#[cfg(target_arch = "x86_64")]
const CHUNK: u64 = 1000;

/// Exits with 0 if all agree, 1 if not, 2 where there is nothing to compare with.
#[cfg(target_arch = "x86_64")]
pub fn run(options: &Options) -> ExitCode {
    use std::time::{Duration, Instant, SystemTime};

    use diglot_translator::testing::silicon::{self, Census, Progress, STATES};

    if options.guards {
        diglot_translator::jit::host::force_guards();
    }
    let clock = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |d| d.as_millis() as u32);
    let seed = options.seed.unwrap_or_else(clock);
    let programs = if options.seconds.is_some() { u64::MAX / 2 } else { options.cases.div_ceil(STATES) };
    match options.seconds {
        Some(seconds) => println!("seed {seed}: {seconds} s from program {}, {STATES} states each", options.first),
        None => println!("seed {seed}: {programs} programs from number {}, {STATES} states each", options.first),
    }
    let started = Instant::now();
    let end = options.seconds.map(|s| started + Duration::from_secs(s));
    let say = |p: &Progress| {
        let seconds = started.elapsed().as_secs_f64();
        let rate = p.cases as f64 / seconds.max(0.001);
        println!(
            "{seconds:.0} s: {} programs, {} cases, {} of them without a fault, {rate:.0} cases a second",
            p.programs, p.cases, p.completed
        );
    };
    let (mut done, mut census) = (Progress::default(), Census::new());
    let mut next = Duration::from_secs(10);
    while done.programs < programs && end.is_none_or(|end| Instant::now() < end) {
        let first = options.first.saturating_add(done.programs);
        let chunk = silicon::Options { seed: seed.into(), first, programs: CHUNK.min(programs - done.programs) };
        let result = if options.census { silicon::census(chunk, &mut census) } else { silicon::run(chunk, |_| ()) };
        match result {
            Ok(p) => {
                done.programs += p.programs;
                done.cases += p.cases;
                done.completed += p.completed;
            }
            Err(mismatch) => {
                println!("{mismatch}");
                println!("again: cargo xtask silicon --seed {seed} --first {} --cases {STATES}", mismatch.program);
                return ExitCode::FAILURE;
            }
        }
        if started.elapsed() >= next {
            next += Duration::from_secs(10);
            say(&done);
        }
    }
    say(&done);
    if options.census {
        tell(&census);
    }
    println!("seed {seed}: no difference");
    ExitCode::SUCCESS
}

/// What was reached least, and what ended most cases.
#[cfg(target_arch = "x86_64")]
fn tell(census: &diglot_translator::testing::silicon::Census) {
    const SHOWN: usize = 20;
    for bits in [64, 32] {
        let mut all: Vec<_> = census.iter().filter(|((b, _), _)| *b == bits).map(|((_, c), n)| (c, n)).collect();
        all.sort_by_key(|(_, n)| n.cases - n.faults);
        let least: Vec<_> = all.iter().take(SHOWN).map(|(c, n)| format!("{c:?} {}", n.cases - n.faults)).collect();
        let median = all.get(all.len() / 2).map_or(0, |(_, n)| n.cases - n.faults);
        println!(
            "{bits} bits: {} codes, half of them done {median} times or more; the least: {}",
            all.len(),
            least.join(", ")
        );
        all.sort_by_key(|(_, n)| std::cmp::Reverse(n.faults));
        let most: Vec<_> = all.iter().take(SHOWN).map(|(c, n)| format!("{c:?} {}", n.faults)).collect();
        println!("{bits} bits: most faults: {}", most.join(", "));
    }
}

/// Exits with 2: there is nothing to compare with.
#[cfg(not(target_arch = "x86_64"))]
pub fn run(options: &Options) -> ExitCode {
    let Options { cases, seed: _, first: _, seconds: _, census: _, guards: _ } = options;
    eprintln!("skipped: this host is no x86-64 processor to compare {cases} cases with");
    ExitCode::from(2)
}
