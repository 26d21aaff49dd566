//! Code that one thread writes and others run, as compilers at run time do.

use std::arch::x86_64::__cpuid;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::{Part, Share};
use crate::Numbers;
use crate::code::Writable;

pub const PARTS: &[Part] = &[("generations", generations), ("patches", patches), ("own-code", own_code)];

const CALLERS: usize = 3;
/// Bytes of a function.
const ROOM: usize = 32;

/// A function, and what it returns.
fn function(n: u64) -> (Vec<u8>, u32) {
    let value = (n >> 8) as u32;
    let [a, b, c, d] = value.to_le_bytes();
    match n % 4 {
        // A loop: MOV ECX, rounds; XOR EAX, EAX; ADD EAX, value; DEC ECX; JNZ to the ADD; RET.
        0 => {
            let rounds = (n >> 40) as u8 | 1;
            let code = vec![0xb9, rounds, 0, 0, 0, 0x31, 0xc0, 0x05, a, b, c, d, 0xff, 0xc9, 0x75, 0xf7, 0xc3];
            (code, value.wrapping_mul(rounds.into()))
        }
        // XOR EAX, EAX; JMP over INT3; LEA EAX, [RAX + value]; RET.
        1 => (vec![0x31, 0xc0, 0xeb, 1, 0xcc, 0x8d, 0x80, a, b, c, d, 0xc3], value),
        // MOV EAX, value; NOT EAX; RET.
        2 => (vec![0xb8, a, b, c, d, 0xf7, 0xd0, 0xc3], !value),
        // MOV EAX, value; RET.
        _ => (vec![0xb8, a, b, c, d, 0xc3], value),
    }
}

/// Has all threads of this process serialize before they go on in user mode; whether the kernel can.
fn membarrier(command: libc::c_int) -> bool {
    // SAFETY: no memory is involved.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
}

const REGISTER: libc::c_int = 1 << 6;
const SYNC_CORE: libc::c_int = 1 << 5;

/// One thread writes functions in the place of others; then all call them: behind a barrier, and a serializing instruction
/// of the callers' or a call of the writer's that has them serialize.
fn generations(share: &Share) {
    const FUNCTIONS: usize = 400;
    let Some(memory) = Writable::new(FUNCTIONS * ROOM) else { return share.check(false, || "no memory".into()) };
    let can = membarrier(REGISTER);
    let barrier = Barrier::new(CALLERS + 1);
    // What each returns, and whether the callers serialize; nothing if the time is over.
    let expected: Vec<AtomicU32> = (0..FUNCTIONS).map(|_| AtomicU32::new(0)).collect();
    let how = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for caller in 0..CALLERS {
            let (memory, barrier, expected, how) = (&memory, &barrier, &expected, &how);
            scope.spawn(move || {
                let mut numbers = Numbers(caller as u64);
                loop {
                    barrier.wait();
                    match how.load(Ordering::Acquire) {
                        0 => return,
                        1 => _ = __cpuid(0),
                        _ => {}
                    }
                    let calls = numbers.next() % 30_000;
                    // Few functions often, or many seldom.
                    let of = if calls & 1 == 0 { FUNCTIONS } else { 7 };
                    for _ in 0..calls {
                        let n = numbers.next() as usize % of;
                        let (want, have) = (expected[n].load(Ordering::Relaxed), memory.call(n * ROOM, 0) as u32);
                        share.check(want == have, || format!("function {n} returns {have:#x}, not {want:#x}"));
                    }
                    barrier.wait();
                }
            });
        }
        let mut numbers = Numbers(77);
        let mut generation = 0;
        while !share.over() {
            generation += 1;
            // All of them, at first, or some.
            let every = [50, 1, 3][generation % 3];
            for n in (generation % every..FUNCTIONS).step_by(every) {
                let (code, value) = function(numbers.next());
                memory.put(n * ROOM, &code);
                expected[n].store(value, Ordering::Relaxed);
            }
            let serialize = generation & 1 == 0 || !can;
            if !serialize {
                share.check(membarrier(SYNC_CORE), || "no membarrier".into());
            }
            how.store(if serialize { 1 } else { 2 }, Ordering::Release);
            barrier.wait();
            barrier.wait();
            share.did();
        }
        how.store(0, Ordering::Release);
        barrier.wait();
    });
}

/// One thread changes the constants of functions that others are running: these return the old or the new, and behind a
/// call that has them serialize, no older one.
fn patches(share: &Share) {
    const FUNCTIONS: usize = 16;
    const SPACE: usize = 1024;
    let Some(memory) = Writable::new(FUNCTIONS * SPACE) else { return share.check(false, || "no memory".into()) };
    let can = membarrier(REGISTER);
    // NOP 3; MOV EAX, constant; RET: the constant is aligned to its size.
    (0..FUNCTIONS).for_each(|n| memory.put(n * SPACE, &[0x0f, 0x1f, 0, 0xb8, 0, 0, 0, 0, 0xc3]));
    // The highest constant that is on its way, and that which is there for sure.
    let newest: Vec<AtomicU32> = (0..FUNCTIONS).map(|_| AtomicU32::new(0)).collect();
    let sure: Vec<AtomicU32> = (0..FUNCTIONS).map(|_| AtomicU32::new(0)).collect();
    std::thread::scope(|scope| {
        for caller in 0..CALLERS {
            let (memory, newest, sure) = (&memory, &newest, &sure);
            scope.spawn(move || {
                let mut numbers = Numbers(caller as u64);
                while !share.over() {
                    let n = numbers.next() as usize % FUNCTIONS;
                    for _ in 0..200 {
                        let least = if can { sure[n].load(Ordering::SeqCst) } else { 0 };
                        let have = memory.call(n * SPACE, 0) as u32;
                        let most = newest[n].load(Ordering::SeqCst);
                        let right = (least..=most).contains(&have);
                        share.check(right, || format!("function {n} returns {have}, not {least} to {most}"));
                    }
                }
            });
        }
        let mut numbers = Numbers(3);
        while !share.over() {
            let n = numbers.next() as usize % FUNCTIONS;
            let value = newest[n].load(Ordering::SeqCst) + 1;
            newest[n].store(value, Ordering::SeqCst);
            memory.constant(n * SPACE + 4).store(value, Ordering::SeqCst);
            if can {
                share.check(membarrier(SYNC_CORE), || "no membarrier".into());
                sure[n].store(value, Ordering::SeqCst);
            }
            share.did();
        }
    });
}

/// Threads that write and call functions of their own, which lie side by side in the same pages.
fn own_code(share: &Share) {
    const FUNCTIONS: usize = 256;
    let Some(memory) = Writable::new(FUNCTIONS * ROOM) else { return share.check(false, || "no memory".into()) };
    std::thread::scope(|scope| {
        for thread in 0..=CALLERS {
            let memory = &memory;
            scope.spawn(move || {
                let mut numbers = Numbers(thread as u64);
                while !share.over() {
                    let n = numbers.next() as usize % (FUNCTIONS / 4) * 4 + thread;
                    let (code, want) = function(numbers.next());
                    memory.put(n * ROOM, &code);
                    for _ in 0..numbers.next() % 1000 + 1 {
                        let have = memory.call(n * ROOM, 0) as u32;
                        share.check(want == have, || format!("function {n} returns {have:#x}, not {want:#x}"));
                    }
                    share.did();
                }
            });
        }
    });
}
