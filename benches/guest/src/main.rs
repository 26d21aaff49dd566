//! The programs that `cargo bench --bench versus` compares.
//!
//! ```text
//! diglot-bench-guest REPETITIONS [PROGRAM…]
//! ```
//!
//! Each repetition prints a line `program NAME NANOSECONDS`, or `wrong NAME RESULT` where the result is not the one it
//! must be. As process 1 it is a guest's init, and switches the machine off at the end.
//!
//! `diglot-bench-guest stress SECONDS` is for `cargo xtask stress` ([`stress`]).
//!
//! Every program does the same work everywhere, and computes a result from all of it; those of [`smp`] in several threads,
//! all others in one. `list` prints the names of these, `list smp` of those.

mod code;
mod float;
mod integer;
mod memory;
mod smp;
mod stress;
mod system;

use std::process::ExitCode;
use std::time::Instant;

/// A program.
pub struct Program {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it does. `None` where this CPU cannot.
    pub run: fn() -> Option<u64>,
    /// What must come of it; `None` if all that is known is that it is the same everywhere.
    pub result: Option<u64>,
}

/// Those for one CPU, by what they need most.
const ONE_CPU: [&[Program]; 5] =
    [integer::PROGRAMS, float::PROGRAMS, memory::PROGRAMS, system::PROGRAMS, code::PROGRAMS];

/// All of them.
fn programs() -> impl Iterator<Item = &'static Program> {
    ONE_CPU.into_iter().chain([smp::PROGRAMS]).flatten()
}

/// What comes of a program that has gone wrong: none's result.
const WRONG: Option<u64> = Some(0);

/// What `exec` comes back with when it only starts and ends.
const NOTHING: &str = "nothing";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|a| a == NOTHING) {
        return ExitCode::SUCCESS;
    }
    if arguments.first().is_some_and(|a| a == "list") {
        let smp = arguments.get(1).is_some_and(|a| a == "smp");
        let groups = if smp { vec![smp::PROGRAMS] } else { ONE_CPU.to_vec() };
        groups.into_iter().flatten().for_each(|p| println!("{}", p.name));
        return ExitCode::SUCCESS;
    }
    if let [mode, seed, rounds] = arguments.as_slice()
        && mode == stress::COMPUTE
    {
        println!("{}", stress::computed(seed.parse().unwrap_or(0), rounds.parse().unwrap_or(0)));
        return ExitCode::SUCCESS;
    }
    if let [mode, seconds, parts @ ..] = arguments.as_slice()
        && mode == "stress"
    {
        let right = stress::run(seconds.parse().unwrap_or(60), parts);
        // A panic, for lack of process 1, tells the monitor that something was wrong.
        if right {
            power_off();
        }
        return if right { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let repetitions: u32 = arguments.first().and_then(|a| a.parse().ok()).unwrap_or(1);
    let wanted = |p: &&Program| arguments.len() < 2 || arguments[1..].iter().any(|a| a == p.name);
    println!("begin");
    let mut right = true;
    for program in programs().filter(wanted) {
        for _ in 0..repetitions {
            let start = Instant::now();
            let result = (program.run)();
            let time = start.elapsed().as_nanos();
            match result {
                Some(r) if program.result.is_none_or(|right| r == right) => {
                    println!("program {} {time}", program.name);
                    if program.result.is_none() {
                        println!("result {} {r:#x}", program.name);
                    }
                }
                Some(r) => {
                    println!("wrong {} {r:#x}", program.name);
                    right = false;
                }
                None => println!("cannot {}", program.name),
            }
        }
    }
    println!("end");
    power_off();
    if right { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Ends the machine if this is its process 1.
fn power_off() {
    if std::process::id() == 1 {
        // SAFETY: no memory is involved.
        unsafe {
            libc::sync();
            libc::reboot(libc::RB_POWER_OFF);
        }
    }
}

/// A generator of numbers that are the same everywhere.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
}

/// Folds a number into a checksum that depends on the order.
fn fold(sum: u64, v: u64) -> u64 {
    (sum ^ v).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_right() {
        // Some execute this executable's other modes, which that of the tests has not.
        for p in programs().filter(|p| !p.name.ends_with("-make")) {
            // What the system's own programs take on a busy host is not this test's matter.
            if let (Some(r), Some(right)) = ((p.run)(), p.result) {
                assert_eq!(r, right, "{}: {r:#x}", p.name);
            }
        }
    }
}
