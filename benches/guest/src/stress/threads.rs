//! Threads: atomics of all widths, the order of stores, locks, clocks that agree, and moves between CPUs.

use std::arch::asm;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Barrier, Condvar, Mutex};
use std::time::Instant;

use super::{Part, Share};
use crate::Numbers;

pub const PARTS: &[Part] =
    &[("atomics", atomics), ("orders", orders), ("locks", locks), ("neighbours", neighbours), ("clocks", clocks)];

const THREADS: u64 = 4;

/// Cells that all threads count in.
#[derive(Default)]
#[repr(align(64))]
struct Cells {
    byte: AtomicU8,
    word: AtomicU16,
    double: AtomicU32,
    quad: AtomicU64,
    toggled: AtomicU64,
    compared: AtomicU64,
    bits: AtomicU64,
    spin: AtomicU32,
    guarded: AtomicU64,
}

/// Two words that are compared and toggled as one.
#[derive(Default)]
#[repr(C, align(16))]
struct Pair(AtomicU64, AtomicU64);

impl Pair {
    /// Adds 1 to the first and 3 to the second.
    fn add(&self) {
        let (mut low, mut high) = (self.0.load(Ordering::Relaxed), self.1.load(Ordering::Relaxed));
        loop {
            let done: u64;
            // SAFETY: the pair is aligned to 16 and lives as long as `self`; RBX is given back.
            unsafe {
                asm!(
                    "xchg rsi, rbx",
                    "lock cmpxchg16b [rdi]",
                    "mov rbx, rsi",
                    "sete cl",
                    in("rdi") &raw const *self,
                    inout("rsi") low.wrapping_add(1) => _,
                    inout("rcx") high.wrapping_add(3) => done,
                    inout("rax") low,
                    inout("rdx") high,
                );
            }
            if done as u8 != 0 {
                return;
            }
        }
    }
}

/// Exact totals of all widths, also of words that lie across cache lines and pages.
fn atomics(share: &Share) {
    const ROUNDS: u64 = 3000;
    let mut memory = vec![0u64; 2048];
    let base = memory.as_mut_ptr() as usize;
    // Four bytes before the end of a line, and of a page.
    let line = base.next_multiple_of(64) + 60;
    let page = base.next_multiple_of(4096) + 4096 - 4;
    while !share.over() {
        let (cells, pair, barrier) = (Cells::default(), Pair::default(), Barrier::new(THREADS as usize));
        for at in [line, page] {
            // SAFETY: inside `memory`, which nobody else uses now.
            unsafe { (at as *mut u64).write_unaligned(0) };
        }
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (cells, pair, barrier) = (&cells, &pair, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    for n in 0..ROUNDS {
                        count(cells, thread);
                        pair.add();
                        if n % 64 == 0 {
                            for at in [line, page] {
                                // SAFETY: inside `memory`, which the scope borrows; all threads use it in this way.
                                unsafe { asm!("lock add qword ptr [{}], 5", in(reg) at) };
                            }
                        }
                    }
                });
            }
        });
        let all = THREADS * ROUNDS;
        let split = THREADS * ROUNDS.div_ceil(64) * 5;
        let totals = [
            ("8 bits", cells.byte.load(Ordering::SeqCst).into(), u64::from(all as u8)),
            ("16 bits", cells.word.load(Ordering::SeqCst).into(), u64::from(all as u16)),
            ("32 bits", cells.double.load(Ordering::SeqCst).into(), all),
            ("64 bits", cells.quad.load(Ordering::SeqCst), all << 33 | all),
            ("XOR", cells.toggled.load(Ordering::SeqCst), 0),
            ("CMPXCHG", cells.compared.load(Ordering::SeqCst), all),
            ("BTS", cells.bits.load(Ordering::SeqCst), 0),
            ("a spin lock", cells.guarded.load(Ordering::SeqCst), all),
            ("CMPXCHG16B, low", pair.0.load(Ordering::SeqCst), all),
            ("CMPXCHG16B, high", pair.1.load(Ordering::SeqCst), 3 * all),
            // SAFETY: inside `memory`; the threads have ended.
            ("across lines", unsafe { (line as *const u64).read_unaligned() }, split),
            // SAFETY: the same.
            ("across pages", unsafe { (page as *const u64).read_unaligned() }, split),
        ];
        for (what, have, want) in totals {
            share.check(have == want, || format!("{what}: {have} instead of {want}"));
        }
        share.did();
    }
}

/// One of each.
fn count(cells: &Cells, thread: u64) {
    cells.byte.fetch_add(1, Ordering::SeqCst);
    cells.word.fetch_add(1, Ordering::SeqCst);
    cells.double.fetch_add(1, Ordering::SeqCst);
    cells.quad.fetch_add(1 << 33 | 1, Ordering::SeqCst);
    cells.toggled.fetch_xor(1 << thread, Ordering::SeqCst);
    cells.toggled.fetch_xor(1 << thread, Ordering::SeqCst);
    let mut seen = cells.compared.load(Ordering::Relaxed);
    while let Err(other) = cells.compared.compare_exchange_weak(seen, seen + 1, Ordering::SeqCst, Ordering::Relaxed) {
        seen = other;
    }
    let mine = 1 << (thread * 7);
    cells.bits.fetch_or(mine, Ordering::SeqCst);
    cells.bits.fetch_and(!mine, Ordering::SeqCst);
    // A lock by XCHG, freed by a plain store; what it guards is loaded and stored plainly.
    let mut tries = 0;
    while cells.spin.swap(1, Ordering::Acquire) != 0 {
        tries += 1;
        if tries % 64 == 0 {
            std::thread::yield_now();
        }
    }
    cells.guarded.store(cells.guarded.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    cells.spin.store(0, Ordering::Release);
}

/// What x86 promises of the order of loads and stores (SDM vol. 3 §9.2.3).
fn orders(share: &Share) {
    const CELLS: usize = 4096;
    let new = || -> Vec<AtomicU64> { (0..CELLS).map(|_| AtomicU64::new(0)).collect() };
    let (x, y, barrier) = (new(), new(), Barrier::new(2));
    let mut round = 0u64;
    while !share.over() {
        round += 1;
        x.iter().chain(&y).for_each(|cell| cell.store(0, Ordering::Relaxed));
        let side = |mine: &[AtomicU64], other: &[AtomicU64]| -> Vec<u64> {
            barrier.wait();
            // The store must be seen before the load is done: by a locked instruction, or by a fence.
            let each = |(mine, other): (&AtomicU64, &AtomicU64)| {
                if round & 1 == 0 {
                    mine.swap(1, Ordering::SeqCst);
                } else {
                    mine.store(1, Ordering::Release);
                    // SAFETY: no memory is involved.
                    unsafe { asm!("mfence", options(nostack)) };
                }
                other.load(Ordering::Acquire)
            };
            mine.iter().zip(other).map(each).collect()
        };
        let (a, b) = std::thread::scope(|scope| {
            let other = scope.spawn(|| side(&y, &x));
            (side(&x, &y), other.join())
        });
        let Ok(b) = b else { return };
        let both = a.iter().zip(&b).position(|(a, b)| a | b == 0);
        share.check(both.is_none(), || format!("both threads miss the other's store to cell {both:?}"));

        // Stores are seen in their order: what is behind is never newer than what is before.
        x.iter().chain(&y).for_each(|cell| cell.store(0, Ordering::Relaxed));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                barrier.wait();
                for (x, y) in x.iter().zip(&y) {
                    x.store(round, Ordering::Release);
                    y.store(round, Ordering::Release);
                }
            });
            barrier.wait();
            for (n, (x, y)) in x.iter().zip(&y).enumerate() {
                let second = y.load(Ordering::Acquire);
                let first = x.load(Ordering::Acquire);
                share.check(second == 0 || first == round, || format!("cell {n}: the second store before the first"));
            }
        });
        share.did();
    }
}

/// Two producers and two consumers with a queue of little room.
fn locks(share: &Share) {
    const ITEMS: u64 = 2000;
    const ROOM: usize = 7;
    while !share.over() {
        let queue = Mutex::new(VecDeque::new());
        let (filled, emptied) = (Condvar::new(), Condvar::new());
        let (taken, sum) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for producer in 0..2 {
                let (queue, filled, emptied) = (&queue, &filled, &emptied);
                scope.spawn(move || {
                    for n in 0..ITEMS {
                        let Ok(items) = queue.lock() else { return };
                        let Ok(mut items) = emptied.wait_while(items, |items| items.len() >= ROOM) else { return };
                        items.push_back(producer << 32 | n);
                        filled.notify_one();
                    }
                });
            }
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut last = [None; 2];
                    for _ in 0..ITEMS {
                        let Ok(items) = queue.lock() else { return };
                        let Ok(mut items) = filled.wait_while(items, |items| items.is_empty()) else { return };
                        let Some(item) = items.pop_front() else { return };
                        emptied.notify_one();
                        drop(items);
                        let last = &mut last[(item >> 32) as usize];
                        share.check(*last < Some(item), || format!("{item:#x} comes behind {last:x?}"));
                        *last = Some(item);
                        taken.fetch_add(1, Ordering::Relaxed);
                        sum.fetch_add(item & 0xffff_ffff, Ordering::Relaxed);
                    }
                });
            }
        });
        let (taken, sum) = (taken.into_inner(), sum.into_inner());
        let right = taken == 2 * ITEMS && sum == ITEMS * (ITEMS - 1);
        share.check(right, || format!("{taken} items come to {sum}"));
        share.did();
    }
}

/// Bytes of one line, of which each thread has its own: nobody's store may touch another's.
fn neighbours(share: &Share) {
    #[repr(align(64))]
    struct Line([AtomicU8; 64]);
    let line = Line([const { AtomicU8::new(0) }; 64]);
    std::thread::scope(|scope| {
        for thread in 0..THREADS as usize {
            let line = &line.0;
            scope.spawn(move || {
                let mut own = [0u8; 16];
                let mut numbers = Numbers(thread as u64);
                while !share.over() {
                    for _ in 0..2000 {
                        let n = numbers.next();
                        let (which, value) = (n as usize % 16, (n >> 32) as u8);
                        let cell = &line[which * 4 + thread];
                        let before = match n >> 62 {
                            0 => cell.fetch_add(value, Ordering::SeqCst),
                            1 => cell.swap(own[which].wrapping_add(value), Ordering::SeqCst),
                            _ => {
                                let before = cell.load(Ordering::Relaxed);
                                cell.store(before.wrapping_add(value), Ordering::Relaxed);
                                before
                            }
                        };
                        let want = own[which];
                        share.check(before == want, || format!("byte {which} has {before:#x}, not {want:#x}"));
                        own[which] = want.wrapping_add(value);
                    }
                    share.did();
                }
            });
        }
    });
}

/// Threads that move from CPU to CPU and never see time go back, whoever has read it last.
fn clocks(share: &Share) {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let (start, latest) = (Instant::now(), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for thread in 0..2u64 {
            let latest = &latest;
            scope.spawn(move || {
                let mut numbers = Numbers(thread);
                while !share.over() {
                    let cpu = numbers.next() as usize % cpus;
                    // SAFETY: the set is valid for the call.
                    unsafe {
                        let mut set: libc::cpu_set_t = std::mem::zeroed();
                        libc::CPU_SET(cpu, &mut set);
                        libc::sched_setaffinity(0, size_of_val(&set), &raw const set);
                        let on = libc::sched_getcpu();
                        share.check(on == cpu as i32, || format!("runs on CPU {on}, not on {cpu}"));
                    }
                    for _ in 0..100 {
                        let before = latest.load(Ordering::SeqCst);
                        let now = start.elapsed().as_nanos() as u64;
                        share.check(now >= before, || format!("CPU {cpu}: time goes back from {before} to {now} ns"));
                        latest.fetch_max(now, Ordering::SeqCst);
                    }
                    share.did();
                }
            });
        }
    });
}
