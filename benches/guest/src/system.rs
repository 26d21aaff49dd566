//! What the kernel does for a program: calls, processes, pages.

use std::process::Command;

use crate::{NOTHING, Program, WRONG};

/// The group's programs.
pub const PROGRAMS: &[Program] = &[
    Program { name: "syscall", run: syscall, result: Some(100_000) },
    Program { name: "pipe", run: pipe, result: Some(5_000) },
    Program { name: "fork", run: fork, result: Some(100) },
    Program { name: "fork-exec", run: fork_exec, result: Some(40) },
    Program { name: "page-faults", run: page_faults, result: Some(8 * 2048) },
];

/// The shortest system call.
fn syscall() -> Option<u64> {
    // SAFETY: getppid has no arguments and touches no memory.
    Some((0..100_000).filter(|_| unsafe { libc::syscall(libc::SYS_getppid) } >= 0).count() as u64)
}

/// Waits for a child; whether it ended with 0.
fn ended_well(child: libc::pid_t) -> bool {
    let mut status = 0;
    // SAFETY: `status` is where the kernel puts the child's.
    child > 0 && unsafe { libc::waitpid(child, &raw mut status, 0) } == child && status == 0
}

/// A byte to and fro between two processes.
fn pipe() -> Option<u64> {
    const ROUNDS: u64 = 5_000;
    let (mut there, mut back) = ([0; 2], [0; 2]);
    // SAFETY: each array has room for two descriptors, `byte` for the one byte that is read or written; the child only
    // makes system calls until it ends.
    unsafe {
        if libc::pipe(there.as_mut_ptr()) != 0 || libc::pipe(back.as_mut_ptr()) != 0 {
            return Some(0);
        }
        let mut byte = 0u8;
        let at = (&raw mut byte).cast();
        let child = libc::fork();
        if child == 0 {
            let done = (0..ROUNDS).all(|_| libc::read(there[0], at, 1) == 1 && libc::write(back[1], at, 1) == 1);
            libc::_exit(i32::from(!done));
        }
        let count = (0..ROUNDS).take_while(|_| libc::write(there[1], at, 1) == 1 && libc::read(back[0], at, 1) == 1);
        let count = count.count() as u64;
        there.into_iter().chain(back).for_each(|fd| _ = libc::close(fd));
        ended_well(child).then_some(count).or(WRONG)
    }
}

/// Processes that end at once.
fn fork() -> Option<u64> {
    let child = || {
        // SAFETY: the child only ends.
        unsafe {
            let child = libc::fork();
            if child == 0 {
                libc::_exit(0);
            }
            child
        }
    };
    Some((0..100).filter(|_| ended_well(child())).count() as u64)
}

/// Processes that execute a small program: this one, which ends at once then.
fn fork_exec() -> Option<u64> {
    let program = std::env::args_os().next()?;
    let run = |_: &u64| Command::new(&program).arg(NOTHING).status().is_ok_and(|s| s.success());
    Some((0..40u64).filter(run).count() as u64)
}

/// Pages mapped, touched and unmapped.
fn page_faults() -> Option<u64> {
    const PAGES: usize = 2048;
    const SIZE: usize = PAGES * 4096;
    let mut touched = 0;
    for _ in 0..8 {
        // SAFETY: the mapping is new, of SIZE bytes, touched inside and unmapped by its own address.
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let p = libc::mmap(std::ptr::null_mut(), SIZE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            if p == libc::MAP_FAILED {
                return Some(0);
            }
            libc::madvise(p, SIZE, libc::MADV_NOHUGEPAGE);
            for at in (0..SIZE).step_by(4096) {
                p.cast::<u8>().add(at).write_volatile(1);
                touched += 1;
            }
            libc::munmap(p, SIZE);
        }
    }
    Some(touched)
}
