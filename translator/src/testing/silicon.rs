//! Random programs on both engines against the host's processor, as many as wanted. Every program follows from the
//! seed and its number.

use std::fmt;

use super::bench::{Bench, Case};
use super::sequences::{parts, program, state};
use super::shrink::{Failure, shrink};
use super::{Machine, Random};

/// States that each program is run from.
pub const STATES: u64 = 32;

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Chooses the programs.
    pub seed: u64,
    /// The number of the first program.
    pub first: u64,
    /// How many programs.
    pub programs: u64,
}

/// What has been run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    /// Programs.
    pub programs: u64,
    /// Runs of a program from a state on the processor, the interpreter and compiled.
    pub cases: u64,
    /// Those that went through to the end, where the others faulted somewhere.
    pub completed: u64,
}

/// A program that does not do the same everywhere, shrunk.
#[derive(Debug)]
pub struct Mismatch {
    /// Its seed.
    pub seed: u64,
    /// Its number.
    pub program: u64,
    /// What it was: assembly, and the difference.
    pub found: String,
    /// What it was shrunk to.
    pub shrunk: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "program {} of seed {}:\n{}", self.program, self.seed, self.found)?;
        write!(f, "shrunk to:\n{}", self.shrunk)
    }
}

/// Runs programs until one makes a difference. `None`, with the reason printed, where the host cannot serve.
pub fn run(options: Options, mut report: impl FnMut(Progress)) -> Option<Result<Progress, Mismatch>> {
    let mut bench = Bench::new(64)?;
    let parts = parts(&mut Random::new(options.seed));
    let mut progress = Progress::default();
    for n in options.first..options.first.saturating_add(options.programs) {
        let mut r = Random::new(options.seed << 32 ^ n);
        let program = program(&mut r, &parts);
        let states: Vec<_> = (0..STATES).map(|_| state(&mut r, program.rsi)).collect();
        let failure = Failure { program, states };
        match check(&mut bench, &failure) {
            Ok(completed) => progress.completed += completed as u64,
            Err(why) => {
                let found = failure.program.assemble().listing() + &why;
                let shrunk = shrink(failure, |f| check(&mut bench, f).is_err());
                let why = check(&mut bench, &shrunk).err().unwrap_or_else(|| "  not the next time\n".into());
                let shrunk = shrunk.program.assemble().listing() + &why;
                return Some(Err(Mismatch { seed: options.seed, program: n, found, shrunk }));
            }
        }
        progress.programs += 1;
        progress.cases += STATES;
        report(progress);
    }
    Some(Ok(progress))
}

fn check(bench: &mut Bench, f: &Failure) -> Result<usize, String> {
    let a = f.program.assemble();
    let case = |before: &Machine| Case {
        before: before.clone(),
        undefined: a.undefined,
        undefined_at_fault: a.ever_undefined,
    };
    bench.check(&a.code, &f.states.iter().map(case).collect::<Vec<_>>())
}

#[test]
fn as_the_processor_does() {
    let options = Options { seed: 7, first: 0, programs: 1000 };
    match run(options, |_| ()) {
        None => {}
        Some(Ok(done)) => assert!(done.completed > done.cases / 4, "{done:?}"),
        Some(Err(mismatch)) => panic!("{mismatch}"),
    }
}
