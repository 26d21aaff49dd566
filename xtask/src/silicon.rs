//! `cargo xtask silicon`: the oracle of the translator's tests, for as long as wanted.

use std::process::ExitCode;

/// What to run.
#[derive(clap::Args)]
pub struct Options {
    /// Runs of a program from one state, each on the processor, interpreted and compiled.
    #[arg(long, default_value_t = 100_000)]
    cases: u64,
    /// Chooses the programs; another one each time if not given.
    #[arg(long)]
    seed: Option<u32>,
    /// The number of the first program, to repeat one.
    #[arg(long, default_value_t = 0)]
    first: u64,
}

/// Exits with 0 if all agree, 1 if not, 2 where there is nothing to compare with.
#[cfg(target_arch = "x86_64")]
pub fn run(options: &Options) -> ExitCode {
    use std::time::{Duration, Instant, SystemTime};

    use diglot_translator::testing::silicon::{self, Progress, STATES};

    let clock = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |d| d.as_millis() as u32);
    let seed = options.seed.unwrap_or_else(clock);
    let programs = options.cases.div_ceil(STATES);
    println!("seed {seed}: {programs} programs from number {}, {STATES} states each", options.first);
    let started = Instant::now();
    let say = |p: &Progress| {
        let seconds = started.elapsed().as_secs_f64();
        let rate = p.cases as f64 / seconds.max(0.001);
        println!(
            "{seconds:.0} s: {} programs, {} cases, {} of them without a fault, {rate:.0} cases a second",
            p.programs, p.cases, p.completed
        );
    };
    let mut next = Duration::from_secs(10);
    let options = silicon::Options { seed: seed.into(), first: options.first, programs };
    let result = silicon::run(options, |p| {
        if started.elapsed() >= next {
            next += Duration::from_secs(10);
            say(&p);
        }
    });
    match result {
        None => ExitCode::from(2),
        Some(Ok(done)) => {
            say(&done);
            println!("seed {seed}: no difference");
            ExitCode::SUCCESS
        }
        Some(Err(mismatch)) => {
            println!("{mismatch}");
            println!("again: cargo xtask silicon --seed {seed} --first {} --cases {STATES}", mismatch.program);
            ExitCode::FAILURE
        }
    }
}

/// Exits with 2: there is nothing to compare with.
#[cfg(not(target_arch = "x86_64"))]
pub fn run(options: &Options) -> ExitCode {
    let Options { cases, seed: _, first: _ } = options;
    eprintln!("this host is no x86-64 processor to compare {cases} cases with");
    ExitCode::from(2)
}
