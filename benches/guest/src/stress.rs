//! What several CPUs can get wrong, for as long as is asked, checked at every step.
//!
//! ```text
//! diglot-bench-guest stress SECONDS [PART…]
//! ```
//!
//! Each part is a process of its own, with threads or processes of its own; all run at once, so that they fall on one
//! another. A line every ten seconds counts what they have done. At the end stands `stress ok`, or, at the first wrong
//! result, `stress wrong: PART: WHAT`. As process 1 it then switches the machine off, or panics it.

mod code;
mod memory;
mod processes;
mod signals;
mod threads;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

pub use processes::{COMPUTE, computed};

/// How often a line says how far the parts are.
const REPORT: Duration = Duration::from_secs(10);
/// A part that does nothing for so long has lost a wake-up, an interrupt or its way.
const STALLED: Duration = Duration::from_secs(120);

/// A part: its name, and what it does until the time is over.
type Part = (&'static str, fn(&Share));

const PARTS: [&[Part]; 5] = [processes::PARTS, memory::PARTS, signals::PARTS, threads::PARTS, code::PARTS];

/// What a part shares with the one that watches it.
struct Share {
    name: &'static str,
    until: Instant,
    /// In memory of both.
    done: &'static AtomicU64,
}

impl Share {
    /// Whether the time is over.
    fn over(&self) -> bool {
        Instant::now() >= self.until
    }

    /// Counts a round.
    fn did(&self) {
        self.done.fetch_add(1, Ordering::Relaxed);
    }

    /// Ends the part at once if a result is not right.
    fn check(&self, right: bool, what: impl FnOnce() -> String) {
        if !right {
            println!("stress wrong: {}: {}", self.name, what());
            // SAFETY: ends this process with all its threads; no memory is involved.
            unsafe { libc::_exit(1) }
        }
    }
}

/// Runs the parts that are named, or all, and says whether all went well.
pub fn run(seconds: u64, names: &[String]) -> bool {
    let wanted = |part: &&Part| names.is_empty() || names.iter().any(|name| name == part.0);
    let parts: Vec<&Part> = PARTS.into_iter().flatten().filter(wanted).collect();
    let Some(counters) = counters(parts.len()) else {
        println!("stress wrong: no memory for counters");
        return false;
    };
    let start = Instant::now();
    let until = start + Duration::from_secs(seconds);
    println!("stress begins: {} parts", parts.len());
    let children = parts.iter().zip(counters).map(|((name, run), done)| {
        let share = Share { name, until, done };
        // SAFETY: this process has one thread, so the child may do anything; it ends without returning.
        match unsafe { libc::fork() } {
            0 => {
                run(&share);
                // SAFETY: ends this process; no memory is involved.
                unsafe { libc::_exit(0) }
            }
            pid => pid,
        }
    });
    let children: Vec<libc::pid_t> = children.collect();
    watch(&parts, &children, counters, start)
}

/// One counter for each part, which children share.
fn counters(parts: usize) -> Option<&'static [AtomicU64]> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let size = parts * size_of::<AtomicU64>();
    // SAFETY: a new mapping, which is never unmapped, zero at first and large enough for the counters.
    unsafe {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let p = libc::mmap(std::ptr::null_mut(), size.max(1), protection, flags, -1, 0);
        (p != libc::MAP_FAILED).then(|| std::slice::from_raw_parts(p.cast(), parts))
    }
}

/// Waits for all parts, and ends them at the first that fails.
fn watch(parts: &[&Part], children: &[libc::pid_t], counters: &[AtomicU64], start: Instant) -> bool {
    let mut left = children.to_vec();
    let mut moved: Vec<(u64, Instant)> = vec![(0, start); parts.len()];
    let mut next = start + REPORT;
    let mut well = !children.contains(&-1);
    while well && !left.is_empty() {
        std::thread::sleep(Duration::from_millis(100));
        left.retain(|&child| match ended(child) {
            None => true,
            Some(status) => {
                if status != 0 {
                    let name = children.iter().zip(parts).find(|(c, _)| **c == child).map_or("?", |(_, part)| part.0);
                    println!("stress wrong: {name}: ended with status {status:#x}");
                    well = false;
                }
                false
            }
        });
        let now = Instant::now();
        if now < next {
            continue;
        }
        next += REPORT;
        let mut line = format!("stress {} s:", (now - start).as_secs());
        for (((name, _), counter), (before, since)) in parts.iter().zip(counters).zip(&mut moved) {
            let count = counter.load(Ordering::Relaxed);
            line += &format!(" {name} {count}");
            if count != *before {
                (*before, *since) = (count, now);
            } else if now - *since > STALLED {
                line += &format!("\nstress wrong: {name}: nothing done for {} s", STALLED.as_secs());
                well = false;
            }
        }
        println!("{line}");
    }
    for child in left {
        // SAFETY: a child of this process that has not been waited for; no memory is involved.
        unsafe { libc::kill(child, libc::SIGKILL) };
    }
    println!("{}", if well { "stress ok" } else { "stress failed" });
    well
}

/// A child's status if it has ended.
fn ended(child: libc::pid_t) -> Option<libc::c_int> {
    let mut status = 0;
    // SAFETY: `status` is where the kernel puts the child's.
    (unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) } == child).then_some(status)
}
