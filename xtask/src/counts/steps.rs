//! Counting host instructions one by one: on x86-64 by the trap flag, with SIGTRAP behind each of them; on AArch64, which
//! has no such flag for programs, by another process that steps this one.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Instructions, by where they were.
#[derive(Clone, Copy, Debug, Default)]
pub struct Steps {
    /// In the code cache.
    pub inside: u64,
    /// Elsewhere.
    pub outside: u64,
}

#[cfg(target_arch = "x86_64")]
static FIRST: AtomicU64 = AtomicU64::new(0);
#[cfg(target_arch = "x86_64")]
static END: AtomicU64 = AtomicU64::new(0);
#[cfg(target_arch = "x86_64")]
static INSIDE: AtomicU64 = AtomicU64::new(0);
#[cfg(target_arch = "x86_64")]
static OUTSIDE: AtomicU64 = AtomicU64::new(0);

/// Counts the instructions that `f` runs on this thread. Only one thread may do so at a time.
#[cfg(target_arch = "x86_64")]
pub fn count(f: impl FnOnce()) -> Steps {
    use std::arch::asm;

    let code = code_cache();
    FIRST.store(code.start, Relaxed);
    END.store(code.end, Relaxed);
    INSIDE.store(0, Relaxed);
    OUTSIDE.store(0, Relaxed);
    // SAFETY: the handler only touches atomics and reads what the kernel gave it.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = step as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        assert_eq!(libc::sigaction(libc::SIGTRAP, &raw const action, std::ptr::null_mut()), 0, "a handler");
    }
    // SAFETY: the trap flag is set and cleared again; each instruction between raises a signal that is handled.
    unsafe { asm!("pushfq", "or qword ptr [rsp], 0x100", "popfq") };
    f();
    // SAFETY: as above.
    unsafe { asm!("pushfq", "and qword ptr [rsp], ~0x100", "popfq") };
    Steps { inside: INSIDE.load(Relaxed), outside: OUTSIDE.load(Relaxed) }
}

/// What both processes see.
#[cfg(target_arch = "aarch64")]
#[derive(Default)]
struct Shared {
    /// 1 from when instructions are stepped, 2 from when they are to be counted, 3 when no more.
    phase: AtomicU64,
    inside: AtomicU64,
    outside: AtomicU64,
}

/// Counts the instructions that `f` runs on this thread. Needs a kernel that lets a child trace its parent, so no qemu-user.
#[cfg(target_arch = "aarch64")]
pub fn count(f: impl FnOnce()) -> Steps {
    let code = code_cache();
    // SAFETY: a mapping of our own, large enough for what it is used as, for which zeroes are a valid value. It stays.
    let shared = unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let memory = libc::mmap(std::ptr::null_mut(), size_of::<Shared>(), protection, flags, -1, 0);
        assert_ne!(memory, libc::MAP_FAILED, "memory");
        &*memory.cast::<Shared>()
    };
    // SAFETY: the set is valid for all zeroes. The child calls the system only, and ends by itself.
    let child = unsafe {
        // On one CPU, so that at each step one only has to take over from the other.
        let mut one: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(0, &mut one);
        libc::sched_setaffinity(0, size_of_val(&one), &raw const one);
        let thread = libc::syscall(libc::SYS_gettid) as libc::pid_t;
        let child = libc::fork();
        if child == 0 {
            libc::_exit(step(thread, &code, shared));
        }
        libc::prctl(libc::PR_SET_PTRACER, child as libc::c_ulong, 0, 0, 0);
        child
    };
    assert!(child > 0, "a process");
    while shared.phase.load(Relaxed) == 0 {
        std::thread::yield_now();
    }
    shared.phase.store(2, Relaxed);
    f();
    shared.phase.store(3, Relaxed);
    let mut status = 0;
    // SAFETY: waits for our child, and writes its status.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!(status, 0, "the process that counts has failed");
    Steps { inside: shared.inside.load(Relaxed), outside: shared.outside.load(Relaxed) }
}

/// Steps a thread until it has had enough; 0, or 1 if that cannot be done.
#[cfg(target_arch = "aarch64")]
fn step(thread: libc::pid_t, code: &Range<u64>, shared: &Shared) -> libc::c_int {
    let none = std::ptr::null_mut::<libc::c_void>();
    let stopped = || {
        let mut status = 0;
        // SAFETY: waits for the thread that is traced.
        unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL) == thread && libc::WIFSTOPPED(status) }
    };
    // SAFETY: none of these calls writes to our memory but the last, to the registers.
    unsafe {
        // The parent may not have allowed it yet.
        while libc::ptrace(libc::PTRACE_SEIZE, thread, none, none) != 0 {
            if *libc::__errno_location() != libc::EPERM {
                shared.phase.store(1, Relaxed);
                return 1;
            }
        }
        if libc::ptrace(libc::PTRACE_INTERRUPT, thread, none, none) != 0 || !stopped() {
            shared.phase.store(1, Relaxed);
            return 1;
        }
        shared.phase.store(1, Relaxed);
        while shared.phase.load(Relaxed) != 3 {
            let mut registers = [0u64; 34];
            let mut vector = libc::iovec { iov_base: registers.as_mut_ptr().cast(), iov_len: size_of_val(&registers) };
            const NT_PRSTATUS: usize = 1;
            let read = libc::ptrace(libc::PTRACE_GETREGSET, thread, NT_PRSTATUS, &raw mut vector);
            // X0 to X30, SP, PC.
            let pc = registers[32];
            if shared.phase.load(Relaxed) == 2 {
                (if code.contains(&pc) { &shared.inside } else { &shared.outside }).fetch_add(1, Relaxed);
            }
            if read != 0 || libc::ptrace(libc::PTRACE_SINGLESTEP, thread, none, none) != 0 || !stopped() {
                return 1;
            }
        }
        libc::ptrace(libc::PTRACE_DETACH, thread, none, none);
    }
    0
}

#[cfg(target_arch = "x86_64")]
extern "C" fn step(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a context of this type to handlers with SA_SIGINFO.
    let context = unsafe { &*context.cast::<libc::ucontext_t>() };
    // It points behind the instruction; those that leave the code cache count as outside, those that enter as inside.
    let rip = context.uc_mcontext.gregs[libc::REG_RIP as usize] as u64;
    let inside = (FIRST.load(Relaxed)..END.load(Relaxed)).contains(&rip);
    (if inside { &INSIDE } else { &OUTSIDE }).fetch_add(1, Relaxed);
}

/// The addresses of the code cache: the executable mapping of a memory file.
fn code_cache() -> Range<u64> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let ranges = maps.lines().filter(|l| l.contains("memfd:")).filter_map(|line| {
        let (addresses, rest) = line.split_once(' ')?;
        let (first, end) = addresses.split_once('-')?;
        let executable = rest.starts_with("r-xs");
        let number = |text| u64::from_str_radix(text, 16).ok();
        executable.then_some(number(first)?..number(end)?)
    });
    ranges.reduce(|all: Range<u64>, r| all.start.min(r.start)..all.end.max(r.end)).unwrap_or_default()
}
