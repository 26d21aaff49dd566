//! What several CPUs are for. Programs that come in pairs do the same work by two threads and by one.

use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::stress::COMPUTE;
use crate::{Numbers, Program, WRONG, fold, integer};

/// The group's programs.
pub const PROGRAMS: &[Program] = &[
    Program { name: "one-compute", run: || computes(1), result: Some(0xc3a6_d12f_f611_407d) },
    Program { name: "two-computes", run: || computes(2), result: Some(0xc3a6_d12f_f611_407d) },
    Program { name: "one-sort", run: || sort(1), result: Some(0x7e2f_0915_70d4_36e1) },
    Program { name: "parallel-sort", run: || sort(2), result: Some(0x7e2f_0915_70d4_36e1) },
    Program { name: "one-make", run: || make(1), result: Some(0x2b10_8ece_4957_171f) },
    Program { name: "parallel-make", run: || make(2), result: Some(0x2b10_8ece_4957_171f) },
    Program { name: "contended", run: contended, result: Some(2 * ADDITIONS + 2 * TURNS) },
    Program { name: "ping-pong-cpus", run: ping_pong, result: Some(2 * ROUNDS) },
    Program { name: "shootdown", run: shootdown, result: Some(MAPPINGS * PAGES as u64) },
];

/// A load that shares nothing with others, in so many threads at once; as all do the same, they come to the same.
fn computes(threads: usize) -> Option<u64> {
    let compute = || {
        let kernels = [integer::sha256, integer::lz, integer::calls];
        kernels.into_iter().try_fold(0, |sum, kernel| Some(fold(sum, std::hint::black_box(kernel)()?)))
    };
    std::thread::scope(|scope| {
        // Also a single one is a new thread: where in its page a stack begins is random only for the first thread, and
        // makes a difference.
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(compute)).collect();
        let sums: Option<Vec<u64>> = threads.into_iter().map(|thread| thread.join().ok()?).collect();
        let sums = sums?;
        let first = *sums.first()?;
        sums.iter().all(|&sum| sum == first).then_some(first).or(WRONG)
    })
}

/// Merge sort of 2 million numbers by one thread or two, each of which sorts a half and merges one, from either end.
fn sort(threads: usize) -> Option<u64> {
    const N: usize = 2 << 20;
    let mut numbers = Numbers(19);
    let mut v: Vec<u32> = (0..N).map(|_| numbers.next() as u32).collect();
    let mut sorted = vec![0; N];
    let (left, right) = v.split_at_mut(N / 2);
    let (low, high) = sorted.split_at_mut(N / 2);
    both(threads, || merge_sort(left, low), || merge_sort(right, high));
    both(threads, || merge_up(left, right, low), || merge_down(left, right, high));
    sorted.is_sorted().then(|| sorted.iter().step_by(1000).fold(0, |sum, &n| fold(sum, n.into()))).or(WRONG)
}

/// Does two things, at once or one after the other.
fn both(threads: usize, one: impl FnOnce(), other: impl FnOnce() + Send) {
    if threads == 1 {
        one();
        other();
    } else {
        std::thread::scope(|scope| {
            scope.spawn(other);
            one();
        });
    }
}

/// Sorts, with room for as many.
fn merge_sort(v: &mut [u32], room: &mut [u32]) {
    if v.len() <= 8 {
        for end in 1..v.len() {
            let mut at = end;
            while at > 0 && v[at - 1] > v[at] {
                v.swap(at - 1, at);
                at -= 1;
            }
        }
        return;
    }
    let middle = v.len() / 2;
    let (left, right) = v.split_at_mut(middle);
    let (low, high) = room.split_at_mut(middle);
    merge_sort(left, low);
    merge_sort(right, high);
    merge_up(left, right, room);
    v.copy_from_slice(room);
}

/// The lowest of two sorted slices, as many as there is room for.
fn merge_up(a: &[u32], b: &[u32], out: &mut [u32]) {
    let (mut i, mut j) = (0, 0);
    for slot in out {
        if j == b.len() || i < a.len() && a[i] <= b[j] {
            *slot = a[i];
            i += 1;
        } else {
            *slot = b[j];
            j += 1;
        }
    }
}

/// The highest of two sorted slices, as many as there is room for.
fn merge_down(a: &[u32], b: &[u32], out: &mut [u32]) {
    let (mut i, mut j) = (a.len(), b.len());
    for slot in out.iter_mut().rev() {
        if i == 0 || j > 0 && b[j - 1] >= a[i - 1] {
            j -= 1;
            *slot = b[j];
        } else {
            i -= 1;
            *slot = a[i];
        }
    }
}

/// Processes that `make` executes, and how long each computes.
const JOBS: u64 = 48;
const JOB: u64 = 1_000_000;

/// Workers that execute short programs, one after the other each; what all of these print is summed up.
fn make(workers: u64) -> Option<u64> {
    let program = std::env::args_os().next()?;
    let (next, sum) = (AtomicU64::new(0), AtomicU64::new(0));
    let work = || {
        while let seed @ ..JOBS = next.fetch_add(1, Ordering::Relaxed) {
            let mut command = Command::new(&program);
            let output = command.args([COMPUTE, &seed.to_string(), &JOB.to_string()]).stderr(Stdio::null()).output();
            let said = output.ok().and_then(|output| String::from_utf8_lossy(&output.stdout).trim().parse().ok());
            sum.fetch_add(said.unwrap_or(0), Ordering::Relaxed);
        }
    };
    std::thread::scope(|scope| {
        (1..workers).for_each(|_| _ = scope.spawn(work));
        work();
    });
    Some(sum.into_inner())
}

const ADDITIONS: u64 = 400_000;
const TURNS: u64 = 100_000;

/// Two threads that add to one word, by themselves and under a lock.
fn contended() -> Option<u64> {
    let (word, guarded) = (AtomicU64::new(0), Mutex::new(0));
    let work = || {
        for n in 0..ADDITIONS {
            word.fetch_add(1, Ordering::SeqCst);
            if n % (ADDITIONS / TURNS) == 0
                && let Ok(mut guarded) = guarded.lock()
            {
                *guarded += 1;
            }
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(work);
        work();
    });
    Some(word.into_inner() + guarded.into_inner().ok()?)
}

/// The first two CPUs that this process may use.
fn two_cpus() -> Option<[usize; 2]> {
    // SAFETY: the set is valid for the call.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::sched_getaffinity(0, size_of_val(&set), &raw mut set);
        set
    };
    // SAFETY: the set has room for as many.
    let mut cpus = (0..libc::CPU_SETSIZE as usize).filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) });
    Some([cpus.next()?, cpus.next()?])
}

/// Has the calling thread run on one CPU.
fn pin(cpu: usize) {
    // SAFETY: the set is valid for the call, and has room for a CPU that `two_cpus` found in one.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &raw const set);
    }
}

const ROUNDS: u64 = 3_000;

/// Threads on two CPUs that wake each other in turns: by a futex, then by pipes.
fn ping_pong() -> Option<u64> {
    let cpus = two_cpus()?;
    let (mut there, mut back) = ([0; 2], [0; 2]);
    // SAFETY: each array has room for two descriptors.
    if unsafe { libc::pipe(there.as_mut_ptr()) != 0 || libc::pipe(back.as_mut_ptr()) != 0 } {
        return Some(0);
    }
    let turn = AtomicU32::new(0);
    let side = |cpu: usize, parity: u32, from: libc::c_int, to: libc::c_int| {
        pin(cpu);
        let mut count = 0;
        for n in 0..ROUNDS as u32 {
            let mine = 2 * n + parity;
            loop {
                let now = turn.load(Ordering::SeqCst);
                if now == mine {
                    break;
                }
                futex(&turn, libc::FUTEX_WAIT, now);
            }
            turn.store(mine + 1, Ordering::SeqCst);
            futex(&turn, libc::FUTEX_WAKE, 1);
            count += 1;
        }
        let mut byte = parity as u8;
        let at: *mut libc::c_void = (&raw mut byte).cast();
        for n in 0..ROUNDS {
            // SAFETY: `byte` is the one that is read or written.
            let passed = unsafe {
                (parity == 0 && n == 0 || libc::read(from, at, 1) == 1)
                    && (parity == 1 && n + 1 == ROUNDS || libc::write(to, at, 1) == 1)
            };
            count += u64::from(passed);
        }
        count
    };
    let counts = std::thread::scope(|scope| {
        // Both are threads of their own, as the calling one stays free to run anywhere.
        let sides =
            [scope.spawn(|| side(cpus[0], 0, back[0], there[1])), scope.spawn(|| side(cpus[1], 1, there[0], back[1]))];
        sides.map(|side| side.join().unwrap_or(0))
    });
    // SAFETY: these are open, and nobody uses them any more.
    there.into_iter().chain(back).for_each(|fd| _ = unsafe { libc::close(fd) });
    (counts[0] == counts[1]).then_some(counts[0]).or(WRONG)
}

/// Waits on a word for as long as it has a value, or wakes so many.
fn futex(word: &AtomicU32, operation: libc::c_int, value: u32) {
    let operation = operation | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the word outlives the call, and there is no time limit.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, value, std::ptr::null::<libc::timespec>()) };
}

const MAPPINGS: u64 = 1_500;
const PAGES: usize = 16;

/// Pages mapped, touched, and unmapped again, while another CPU runs in the same address space.
fn shootdown() -> Option<u64> {
    const SIZE: usize = PAGES * 4096;
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        let mut touched = 0;
        for _ in 0..MAPPINGS {
            // SAFETY: the mapping is new, of SIZE bytes, touched inside and unmapped by its own address.
            unsafe {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                let p = libc::mmap(std::ptr::null_mut(), SIZE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
                if p == libc::MAP_FAILED {
                    break;
                }
                for at in (0..SIZE).step_by(4096) {
                    let byte = p.cast::<u8>().add(at);
                    // A page that was there before would not be empty.
                    touched += u64::from(byte.read_volatile() == 0);
                    byte.write_volatile(1);
                }
                libc::munmap(p, SIZE);
            }
        }
        over.store(true, Ordering::Relaxed);
        Some(touched)
    })
}
