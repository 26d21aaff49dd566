//! Processes: storms of fork, exec and wait, and data through pipes from one to the next.

use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::process::{Command, Stdio};

use super::{Part, Share};
use crate::{Numbers, fold};

pub const PARTS: &[Part] = &[("execs", execs), ("forks", forks), ("pipes", pipes)];

/// The mode of this executable in which it prints [`computed`].
pub const COMPUTE: &str = "compute";

/// A number that takes some work.
pub fn computed(seed: u64, rounds: u64) -> u64 {
    let mut numbers = Numbers(seed);
    (0..rounds).fold(seed, |sum, _| fold(sum, numbers.next()))
}

/// Two threads that each execute short programs, one after the other.
fn execs(share: &Share) {
    const ROUNDS: u64 = 2000;
    let Some(program) = std::env::args_os().next() else { return };
    std::thread::scope(|scope| {
        for thread in 0..2u64 {
            let program = &program;
            scope.spawn(move || {
                let mut seed = thread << 32;
                while !share.over() {
                    seed += 1;
                    let mut command = Command::new(program);
                    let output =
                        command.args([COMPUTE, &seed.to_string(), &ROUNDS.to_string()]).stderr(Stdio::null()).output();
                    let said = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
                    let right = said.as_ref().is_ok_and(|said| said.trim() == computed(seed, ROUNDS).to_string());
                    share.check(right, || format!("compute {seed} says {said:?}"));
                    share.did();
                }
            });
        }
    });
}

/// Children in threes, which check that they have what the parent had, and change it for themselves alone.
fn forks(share: &Share) {
    const PAGES: usize = 24;
    const WORDS: usize = PAGES * 512;
    let mut memory = vec![0u64; WORDS];
    let mut round = 0u64;
    while !share.over() {
        round += 1;
        memory.iter_mut().step_by(64).enumerate().for_each(|(n, word)| *word = round << 16 | n as u64);
        let children: [libc::pid_t; 3] = std::array::from_fn(|child| {
            // SAFETY: this process has one thread; the child ends without returning.
            let pid = unsafe { libc::fork() };
            if pid == 0 {
                let same = |memory: &[u64], of: u64| {
                    memory.iter().step_by(64).enumerate().all(|(n, word)| *word == of << 16 | n as u64)
                };
                let mut right = same(&memory, round);
                let mine = round ^ (child as u64 + 1) << 40;
                memory.iter_mut().step_by(64).enumerate().for_each(|(n, word)| *word = mine << 16 | n as u64);
                right &= same(&memory, mine);
                // SAFETY: ends this process.
                unsafe { libc::_exit(if right { 40 + child as i32 } else { 1 }) }
            }
            pid
        });
        // While they run, the parent's pages part from theirs.
        memory.iter_mut().skip(1).step_by(64).for_each(|word| *word = round);
        for (n, child) in children.into_iter().enumerate() {
            let mut status = 0;
            // SAFETY: `status` is where the kernel puts the child's.
            let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
            let right = waited == child && libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 40 + n as i32;
            share.check(right, || format!("child {child} of round {round}: wait {waited}, status {status:#x}"));
        }
        let kept = memory.iter().step_by(64).enumerate().all(|(n, word)| *word == round << 16 | n as u64);
        share.check(kept, || format!("the parent's memory of round {round} has changed"));
        share.did();
    }
}

/// The two ends of a new pipe: to read and to write.
fn pipe(share: &Share) -> (std::fs::File, std::fs::File) {
    let mut ends = [0; 2];
    // SAFETY: the array has room for two descriptors.
    let made = unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) };
    share.check(made == 0, || "there is no pipe".into());
    // SAFETY: both are new, and nothing else has them.
    unsafe { (std::fs::File::from_raw_fd(ends[0]), std::fs::File::from_raw_fd(ends[1])) }
}

/// Blocks of all lengths: one process makes them, the next inverts them, this one checks them.
fn pipes(share: &Share) {
    const BLOCKS: usize = 64;
    let block = |numbers: &mut Numbers| {
        let length = numbers.next() as usize % 12_000 + 1;
        let (start, step) = (numbers.next() as u8, numbers.next() as u8 | 1);
        (0..length).map(|n| start.wrapping_add((n as u8).wrapping_mul(step)) ^ (n >> 8) as u8).collect::<Vec<u8>>()
    };
    let mut seed = 0;
    while !share.over() {
        seed += 1;
        let (made, mut to_invert) = pipe(share);
        let (inverted, mut to_check) = pipe(share);
        let child = |work: &mut dyn FnMut() -> bool| {
            // SAFETY: this process has one thread; the child ends without returning.
            let pid = unsafe { libc::fork() };
            if pid == 0 {
                let right = work();
                // SAFETY: ends this process.
                unsafe { libc::_exit(i32::from(!right)) }
            }
            pid
        };
        let maker = child(&mut || {
            let mut numbers = Numbers(seed);
            (0..BLOCKS).all(|_| to_invert.write_all(&block(&mut numbers)).is_ok())
        });
        drop(to_invert);
        let mut made = made;
        let inverter = child(&mut || {
            let mut bytes = [0; 3001];
            loop {
                let Ok(n) = made.read(&mut bytes) else { return false };
                if n == 0 {
                    return true;
                }
                bytes[..n].iter_mut().for_each(|b| *b = !*b);
                if to_check.write_all(&bytes[..n]).is_err() {
                    return false;
                }
            }
        });
        drop((made, to_check));
        let (mut numbers, mut inverted) = (Numbers(seed), inverted);
        for n in 0..BLOCKS {
            let want = block(&mut numbers);
            let mut have = vec![0; want.len()];
            let read = inverted.read_exact(&mut have);
            share.check(read.is_ok(), || format!("block {n} of {seed}: {read:?}"));
            let differs = have.iter().zip(&want).position(|(have, want)| *have != !want);
            share.check(differs.is_none(), || format!("block {n} of {seed} differs at {differs:?} of {}", want.len()));
        }
        for child in [maker, inverter] {
            let mut status = 0;
            // SAFETY: `status` is where the kernel puts the child's.
            let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
            share.check(waited == child && status == 0, || format!("wait {waited}, status {status:#x}"));
        }
        share.did();
    }
}
