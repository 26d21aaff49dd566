//! Signals: at any instruction, from timers and from other processes, and not one lost or out of order.

use std::arch::asm;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::{Part, Share};
use crate::Numbers;

pub const PARTS: &[Part] = &[("registers", registers), ("queued", queued), ("answers", answers)];

/// How often the handler has run.
static HANDLED: AtomicU64 = AtomicU64::new(0);

fn on_signal(signal: i32, handler: usize, flags: i32) {
    // SAFETY: a valid action; the handlers here use nothing but atomics and registers.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler;
        action.sa_flags = flags | libc::SA_RESTART;
        libc::sigaction(signal, &raw const action, std::ptr::null_mut());
    }
}

/// Leaves nothing of what it may change as it was.
extern "C" fn clobber(_: libc::c_int) {
    HANDLED.fetch_add(1, Ordering::SeqCst);
    // SAFETY: only registers that are named.
    unsafe {
        asm!(
            "pcmpeqb xmm0, xmm0", "movdqa xmm1, xmm0", "movdqa xmm2, xmm0", "movdqa xmm3, xmm0", "movdqa xmm4, xmm0",
            "movdqa xmm5, xmm0", "movdqa xmm6, xmm0", "movdqa xmm7, xmm0", "movdqa xmm8, xmm0", "movdqa xmm9, xmm0",
            "movdqa xmm10, xmm0", "movdqa xmm11, xmm0", "movdqa xmm12, xmm0", "movdqa xmm13, xmm0",
            "movdqa xmm14, xmm0", "movdqa xmm15, xmm0",
            "mov r8, -1", "mov r9, -1", "mov r10, -1", "mov r11, -1",
            "fninit", "fldpi", "fstp st(0)",
            "xor eax, eax",
            out("rax") _, out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
            out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _, options(nostack),
        );
    }
}

/// 16 vector registers of two words, and 8 general ones.
type Registers = [u64; 40];

/// Loads registers, lets time pass with the carry flag set, and stores them; the flags too.
fn hold(from: &Registers, rounds: u64) -> (Registers, u64) {
    let mut to = [0; 40];
    let flags: u64;
    // SAFETY: the buffers are as large as is loaded and stored, and all registers that change are named.
    unsafe {
        asm!(
            "movdqu xmm0, [rdi]", "movdqu xmm1, [rdi+16]", "movdqu xmm2, [rdi+32]", "movdqu xmm3, [rdi+48]",
            "movdqu xmm4, [rdi+64]", "movdqu xmm5, [rdi+80]", "movdqu xmm6, [rdi+96]", "movdqu xmm7, [rdi+112]",
            "movdqu xmm8, [rdi+128]", "movdqu xmm9, [rdi+144]", "movdqu xmm10, [rdi+160]", "movdqu xmm11, [rdi+176]",
            "movdqu xmm12, [rdi+192]", "movdqu xmm13, [rdi+208]", "movdqu xmm14, [rdi+224]", "movdqu xmm15, [rdi+240]",
            "mov r8, [rdi+256]", "mov r9, [rdi+264]", "mov r10, [rdi+272]", "mov r11, [rdi+280]",
            "mov r12, [rdi+288]", "mov r13, [rdi+296]", "mov r14, [rdi+304]", "mov r15, [rdi+312]",
            "stc",
            // Flags stay as they are.
            "2:",
            "lea rcx, [rcx-1]",
            "jrcxz 3f",
            "jmp 2b",
            "3:",
            "pushfq",
            "pop rax",
            "movdqu [rsi], xmm0", "movdqu [rsi+16], xmm1", "movdqu [rsi+32], xmm2", "movdqu [rsi+48], xmm3",
            "movdqu [rsi+64], xmm4", "movdqu [rsi+80], xmm5", "movdqu [rsi+96], xmm6", "movdqu [rsi+112], xmm7",
            "movdqu [rsi+128], xmm8", "movdqu [rsi+144], xmm9", "movdqu [rsi+160], xmm10", "movdqu [rsi+176], xmm11",
            "movdqu [rsi+192], xmm12", "movdqu [rsi+208], xmm13", "movdqu [rsi+224], xmm14", "movdqu [rsi+240], xmm15",
            "mov [rsi+256], r8", "mov [rsi+264], r9", "mov [rsi+272], r10", "mov [rsi+280], r11",
            "mov [rsi+288], r12", "mov [rsi+296], r13", "mov [rsi+304], r14", "mov [rsi+312], r15",
            inout("rdi") from.as_ptr() => _, inout("rsi") to.as_mut_ptr() => _, inout("rcx") rounds => _,
            out("rax") flags, out("r8") _, out("r9") _, out("r10") _, out("r11") _, out("r12") _, out("r13") _,
            out("r14") _, out("r15") _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
            out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
        );
    }
    (to, flags)
}

/// Two threads that hold values in all registers, while a timer and a third thread interrupt them.
fn registers(share: &Share) {
    let timer = libc::itimerval {
        it_interval: libc::timeval { tv_sec: 0, tv_usec: 700 },
        it_value: libc::timeval { tv_sec: 0, tv_usec: 700 },
    };
    let handler = clobber as extern "C" fn(libc::c_int) as usize;
    on_signal(libc::SIGALRM, handler, 0);
    on_signal(libc::SIGUSR1, handler, 0);
    // SAFETY: the timer's values are valid.
    unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) };
    let threads = [const { AtomicU64::new(0) }; 2];
    std::thread::scope(|scope| {
        for (n, thread) in threads.iter().enumerate() {
            scope.spawn(move || {
                // SAFETY: no memory is involved.
                thread.store(unsafe { libc::syscall(libc::SYS_gettid) } as u64, Ordering::SeqCst);
                let mut numbers = Numbers(n as u64);
                while !share.over() {
                    let want: Registers = std::array::from_fn(|_| numbers.next());
                    let (have, flags) = hold(&want, numbers.next() % 20_000 + 1);
                    let differs = have.iter().zip(&want).position(|(have, want)| have != want);
                    share.check(differs.is_none(), || format!("word {differs:?} of the registers has changed"));
                    share.check(flags & 0x8d5 == flags & 0xd4 | 1, || format!("flags are {flags:#x}"));
                    share.did();
                }
                thread.store(0, Ordering::SeqCst);
            });
        }
        while !share.over() {
            for thread in &threads {
                let id = thread.load(Ordering::SeqCst);
                if id != 0 {
                    // SAFETY: a thread of this process; if it has ended, nothing happens.
                    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), id, libc::SIGUSR1) };
                }
            }
            std::thread::sleep(Duration::from_micros(150));
        }
    });
    share.check(HANDLED.load(Ordering::SeqCst) > 0, || "no signal has come".into());
}

/// The last value that came, and how many; shared by two processes.
struct Queue {
    last: AtomicU64,
    wrong: AtomicU64,
}

static QUEUE: std::sync::OnceLock<&'static Queue> = std::sync::OnceLock::new();

/// Notes a queued signal's value, which must be the next.
extern "C" fn next_value(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let Some(queue) = QUEUE.get() else { return };
    // SAFETY: the kernel hands a valid structure to the handler.
    let value = unsafe { (*info).si_value().sival_ptr } as u64;
    if queue.last.swap(value, Ordering::SeqCst) + 1 != value {
        queue.wrong.store(value, Ordering::SeqCst);
    }
}

/// Sends a signal with a value.
fn send(pid: libc::pid_t, signal: i32, value: u64) -> bool {
    // SAFETY: the value is a number that nobody takes for an address.
    unsafe { libc::sigqueue(pid, signal, libc::sigval { sival_ptr: value as *mut libc::c_void }) == 0 }
}

/// Signals with values from one process to another that computes, in order and none lost.
fn queued(share: &Share) {
    const BATCH: u64 = 32;
    // SAFETY: a new mapping, which is never unmapped, zero at first and large enough.
    let queue: &'static Queue = unsafe {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let p = libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        share.check(p != libc::MAP_FAILED, || "no memory".into());
        &*p.cast()
    };
    let _ = QUEUE.set(queue);
    let signal = libc::SIGRTMIN();
    on_signal(
        signal,
        next_value as extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) as usize,
        libc::SA_SIGINFO,
    );
    // SAFETY: this process has one thread; the child ends without returning.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let mut numbers = Numbers(5);
        while !share.over() {
            let want: Registers = std::array::from_fn(|_| numbers.next());
            let (have, _) = hold(&want, 3000);
            share.check(have == want, || "registers have changed".into());
        }
        // SAFETY: ends this process.
        unsafe { libc::_exit(0) }
    }
    let mut sent = 0;
    // The receiver ends with the time: what is on its way then does not arrive.
    let early = share.until - Duration::from_secs(1).min(share.until - Instant::now());
    while Instant::now() < early {
        for _ in 0..BATCH {
            sent += 1;
            share.check(send(child, signal, sent), || format!("signal {sent} is not sent"));
        }
        let since = Instant::now();
        while queue.last.load(Ordering::SeqCst) != sent && Instant::now() < early {
            share.check(since.elapsed() < Duration::from_secs(60), || format!("signal {sent} does not arrive"));
            std::thread::yield_now();
        }
        let wrong = queue.wrong.load(Ordering::SeqCst);
        share.check(wrong == 0, || format!("value {wrong} came out of order"));
        share.did();
    }
    let mut status = 0;
    // SAFETY: `status` is where the kernel puts the child's.
    let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
    share.check(waited == child && status == 0, || format!("wait {waited}, status {status:#x}"));
}

/// Two processes that wait for each other's signals.
fn answers(share: &Share) {
    let (there, back) = (libc::SIGRTMIN() + 1, libc::SIGRTMIN() + 2);
    // SAFETY: the set is initialised before use.
    let set = unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, there);
        libc::sigaddset(&raw mut set, back);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        set
    };
    let wait = |seconds: i64| {
        let limit = libc::timespec { tv_sec: seconds, tv_nsec: 0 };
        // SAFETY: all three are valid for the call.
        unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            let signal = libc::sigtimedwait(&raw const set, &raw mut info, &raw const limit);
            (signal > 0).then(|| (signal, info.si_value().sival_ptr as u64))
        }
    };
    // SAFETY: no memory is involved.
    let parent = unsafe { libc::getpid() };
    // SAFETY: this process has one thread; the child ends without returning.
    let child = unsafe { libc::fork() };
    if child == 0 {
        while let Some((_, value)) = wait(70).filter(|(_, value)| *value != 0) {
            send(parent, back, value * 3);
        }
        // SAFETY: ends this process.
        unsafe { libc::_exit(0) }
    }
    let mut n = 0;
    while !share.over() {
        n += 1;
        send(child, there, n);
        let answer = wait(60);
        share.check(answer == Some((back, n * 3)), || format!("the answer to {n} is {answer:?}"));
        share.did();
    }
    send(child, there, 0);
    let mut status = 0;
    // SAFETY: `status` is where the kernel puts the child's.
    let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
    share.check(waited == child && status == 0, || format!("wait {waited}, status {status:#x}"));
}
