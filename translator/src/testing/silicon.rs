//! Random programs on both engines against the host's processor, as many as wanted. Every program follows from the
//! seed and its number.

use std::collections::BTreeMap;
use std::fmt;

use iced_x86::Code;

use super::bench::Bench;
use super::outcome::Case;
use super::program::Program;
#[cfg(test)]
use super::sequences::x87_program;
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

/// How often programs have reached an instruction, and how often it then faulted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reached {
    /// Cases that came to it, or behind it in a step of its own.
    pub cases: u64,
    /// Those that ended there.
    pub faults: u64,
}

/// By code size and code, how often cases reach it.
pub type Census = BTreeMap<(u32, Code), Reached>;

/// Runs programs until one makes a difference.
pub fn run(options: Options, report: impl FnMut(Progress)) -> Result<Progress, Mismatch> {
    each(options, report, |_, _| ())
}

/// As [`run`], and counts into a census what the programs execute. What a branch may have passed over is not counted.
pub fn census(options: Options, census: &mut Census) -> Result<Progress, Mismatch> {
    each(options, |_| (), |program, faults| count(program, faults, census))
}

fn count(program: &Program, faults: &[Option<u64>], census: &mut Census) {
    let a = program.assemble();
    for (i, _) in a.instructions().filter(|(i, _)| a.sure.iter().any(|range| range.contains(&i.ip()))) {
        let entry = census.entry((program.bits, i.code())).or_default();
        for fault in faults {
            entry.cases += u64::from(fault.is_none_or(|at| at >= i.ip()));
            entry.faults += u64::from(*fault == Some(i.ip()));
        }
    }
}

fn each(
    options: Options,
    mut report: impl FnMut(Progress),
    mut visit: impl FnMut(&Program, &[Option<u64>]),
) -> Result<Progress, Mismatch> {
    let mut bench = Bench::new();
    let mut r = Random::new(options.seed);
    let parts = [64, 64, 32].map(|bits| parts(&mut r, bits));
    let mut progress = Progress::default();
    for n in options.first..options.first.saturating_add(options.programs) {
        let mut r = Random::new(options.seed << 32 ^ n);
        let of_bits = &parts[r.below(3) as usize];
        let program = program(&mut r, of_bits);
        let states: Vec<_> = (0..STATES).map(|_| state(&mut r, &program)).collect();
        let failure = Failure { program, states };
        match check(&mut bench, &failure) {
            Ok(faults) => {
                progress.completed += faults.iter().filter(|at| at.is_none()).count() as u64;
                visit(&failure.program, &faults);
            }
            Err(why) => {
                let found = failure.program.assemble().listing() + &why;
                let shrunk = shrink(failure, |f| check(&mut bench, f).is_err());
                let why = check(&mut bench, &shrunk).err().unwrap_or_else(|| "  not the next time\n".into());
                let shrunk = shrunk.program.assemble().listing() + &why;
                return Err(Mismatch { seed: options.seed, program: n, found, shrunk });
            }
        }
        progress.programs += 1;
        progress.cases += STATES;
        report(progress);
    }
    Ok(progress)
}

fn check(bench: &mut Bench, f: &Failure) -> Result<Vec<Option<u64>>, String> {
    let a = f.program.assemble();
    let case = |before: &Machine| Case {
        before: before.clone(),
        undefined: a.undefined,
        undefined_at_fault: a.ever_undefined,
        ignored: 0..0,
    };
    bench.check(f.program.bits, &a.code, &f.states.iter().map(case).collect::<Vec<_>>())
}

#[test]
fn as_the_processor_does() {
    let options = Options { seed: 7, first: 0, programs: 1000 };
    match run(options, |_| ()) {
        Ok(done) => assert!(done.completed > done.cases / 4, "{done:?}"),
        Err(mismatch) => panic!("{mismatch}"),
    }
}

#[test]
fn runs_of_x87_instructions_are_what_the_interpreter_does() {
    let mut bench = Bench::new();
    let mut r = Random::new(11);
    let parts = [64, 32].map(|bits| parts(&mut r, bits));
    let mut agree = |f: &Failure| bench.agree(f.program.bits, &f.program.assemble().code, &f.states);
    for n in 0..2000 {
        let program = x87_program(&mut r, &parts[n % 2]);
        let states = (0..STATES).map(|_| state(&mut r, &program)).collect();
        let failure = Failure { program, states };
        if let Err(found) = agree(&failure) {
            let shrunk = shrink(failure, |f| agree(f).is_err());
            let why = agree(&shrunk).err().unwrap_or_else(|| "  not the next time\n".into());
            panic!("program {n}:\n{found}{}{why}", shrunk.program.assemble().listing());
        }
    }
}
