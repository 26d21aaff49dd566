//! Counting host instructions by the trap flag: SIGTRAP behind each of them.

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

static FIRST: AtomicU64 = AtomicU64::new(0);
static END: AtomicU64 = AtomicU64::new(0);
static INSIDE: AtomicU64 = AtomicU64::new(0);
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

/// Nothing is counted on other hosts.
#[cfg(not(target_arch = "x86_64"))]
pub fn count(f: impl FnOnce()) -> Steps {
    f();
    Steps::default()
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
