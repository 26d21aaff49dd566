//! Address spaces that threads share: what one maps, unmaps and protects, the others' TLBs must forget.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::{Part, Share};
use crate::Numbers;

pub const PARTS: &[Part] =
    &[("pages", pages), ("replaced", replaced), ("protected", protected), ("snapshots", snapshots)];

const PAGE: usize = 4096;
const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// A new private mapping.
fn map(share: &Share, size: usize) -> *mut u64 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping.
    let p = unsafe { libc::mmap(std::ptr::null_mut(), size, READ_WRITE, flags, -1, 0) };
    share.check(p != libc::MAP_FAILED, || format!("no mapping of {size} bytes"));
    p.cast()
}

/// Four threads that map, fill, protect, empty and unmap, each its own pages of the one address space.
fn pages(share: &Share) {
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || {
                let mut numbers = Numbers(thread);
                while !share.over() {
                    map_and_unmap(share, &mut numbers);
                    share.did();
                }
            });
        }
    });
}

fn map_and_unmap(share: &Share, numbers: &mut Numbers) {
    let pages = numbers.next() as usize % 63 + 2;
    let seed = numbers.next();
    let p = map(share, pages * PAGE);
    let word = |page: usize| (page * PAGE + page * 8 % PAGE) / 8;
    let all = |of: &dyn Fn(usize) -> u64, what: &str| {
        for page in 0..pages {
            // SAFETY: inside the mapping, which only this thread knows, and readable.
            let have = unsafe { p.add(word(page)).read_volatile() };
            share.check(have == of(page), || format!("{what}: page {page} of {pages} has {have:#x}"));
        }
    };
    let own = |page: usize| seed ^ page as u64;
    // SAFETY: all of it is inside the mapping, which only this thread knows, and is written only while it may be.
    unsafe {
        if seed & 1 != 0 {
            all(&|_| 0, "new");
        }
        (0..pages).for_each(|page| p.add(word(page)).write_volatile(own(page)));
        all(&own, "written");
        libc::mprotect(p.cast(), pages * PAGE, libc::PROT_READ);
        all(&own, "read-only");
        libc::mprotect(p.cast(), pages * PAGE, READ_WRITE);
        let emptied = seed as usize >> 8 & 1;
        libc::madvise(p.byte_add(emptied * PAGE).cast(), PAGE, libc::MADV_DONTNEED);
        all(&|page| if page == emptied { 0 } else { own(page) }, "emptied");
        (0..pages).for_each(|page| p.add(word(page)).write_volatile(!own(page)));
        all(&|page| !own(page), "written again");
        // In two parts, so that what is around stays.
        let first = pages / 2;
        libc::munmap(p.cast(), first * PAGE);
        for page in first..pages {
            let have = p.add(word(page)).read_volatile();
            share.check(have == !own(page), || format!("half unmapped: page {page} has {have:#x}"));
        }
        libc::munmap(p.byte_add(first * PAGE).cast(), (pages - first) * PAGE);
    }
}

/// One thread maps other pages of a file at the same address; to the others no page may come back that was there before.
fn replaced(share: &Share) {
    const PAGES: u64 = 256;
    // SAFETY: the name is a string; no other memory is involved.
    let fd = unsafe { libc::memfd_create(c"pages".as_ptr(), 0) };
    for n in 0..PAGES {
        let mut page = [0u8; PAGE];
        page[..8].copy_from_slice(&n.to_le_bytes());
        // SAFETY: the buffer is as long as is written.
        let wrote = unsafe { libc::write(fd, page.as_ptr().cast(), PAGE) };
        share.check(wrote == PAGE as isize, || format!("memfd: wrote {wrote}"));
    }
    let show = |at: *mut libc::c_void, n: u64| {
        let fixed = if at.is_null() { 0 } else { libc::MAP_FIXED };
        let offset = (n % PAGES) as i64 * PAGE as i64;
        // SAFETY: a new mapping, or one in the place of another of this function's, which is only read as atomics.
        unsafe { libc::mmap(at, PAGE, libc::PROT_READ, libc::MAP_SHARED | fixed, fd, offset) }
    };
    let at = show(std::ptr::null_mut(), 0);
    share.check(at != libc::MAP_FAILED, || "no mapping of the file".into());
    // SAFETY: a mapping that stays, whatever page of the file it shows.
    let word: &AtomicU64 = unsafe { AtomicU64::from_ptr(at.cast()) };
    let version = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !share.over() {
                    for _ in 0..1000 {
                        let before = version.load(Ordering::SeqCst);
                        let seen = word.load(Ordering::SeqCst);
                        let after = version.load(Ordering::SeqCst) + 1;
                        let right = after - before >= PAGES || (before..=after).any(|v| v % PAGES == seen);
                        share.check(right, || format!("page {seen} is seen between versions {before} and {after}"));
                    }
                }
            });
        }
        let mut n = 0;
        while !share.over() {
            n += 1;
            let shown = show(at, n);
            share.check(shown == at, || format!("mapped at {shown:?}, not {at:?}"));
            version.store(n, Ordering::SeqCst);
            share.did();
        }
    });
}

/// Whether [`protected`]'s page may be written.
static WRITABLE: AtomicBool = AtomicBool::new(true);

/// Waits for the page to become writable, and has the store done again.
extern "C" fn wait_until_writable(_: libc::c_int) {
    while !WRITABLE.load(Ordering::SeqCst) {
        // SAFETY: no memory is involved.
        unsafe { libc::sched_yield() };
    }
}

/// Two threads count in a page that a third makes read-only and writable again: meanwhile it must stand still, and no
/// count may be lost.
fn protected(share: &Share) {
    // SAFETY: a valid action, whose handler only uses an atomic and a system call.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = wait_until_writable as extern "C" fn(libc::c_int) as usize;
        libc::sigaction(libc::SIGSEGV, &raw const action, std::ptr::null_mut());
    }
    let page = map(share, PAGE);
    // SAFETY: a mapping that stays; all that is in it is used as atomics.
    let words: &[AtomicU64] = unsafe { std::slice::from_raw_parts(page.cast(), 2) };
    std::thread::scope(|scope| {
        for (thread, word) in words.iter().enumerate() {
            scope.spawn(move || {
                let mut count = 0;
                while !share.over() {
                    for _ in 0..500 {
                        count += 1;
                        if thread == 0 {
                            word.store(count, Ordering::Release);
                        } else {
                            word.fetch_add(1, Ordering::SeqCst);
                        }
                        let have = word.load(Ordering::SeqCst);
                        share.check(have == count, || format!("count {count} of thread {thread} reads {have}"));
                    }
                }
            });
        }
        let read = || [words[0].load(Ordering::SeqCst), words[1].load(Ordering::SeqCst)];
        let mut numbers = Numbers(0);
        while !share.over() {
            WRITABLE.store(false, Ordering::SeqCst);
            // SAFETY: the page stays mapped and readable; writers wait in their handler.
            unsafe { libc::mprotect(page.cast(), PAGE, libc::PROT_READ) };
            let before = read();
            for _ in 0..numbers.next() % 2000 {
                std::hint::spin_loop();
            }
            let after = read();
            share.check(before == after, || format!("{before:?} became {after:?} while nobody could write"));
            // SAFETY: as above.
            unsafe { libc::mprotect(page.cast(), PAGE, READ_WRITE) };
            WRITABLE.store(true, Ordering::SeqCst);
            std::thread::sleep(Duration::from_micros(numbers.next() % 300));
            share.did();
        }
        // A writer that is late waits for nothing.
        WRITABLE.store(true, Ordering::SeqCst);
    });
}

/// Forks of a process of which another thread goes on writing: a child's memory must stand still.
fn snapshots(share: &Share) {
    const PAGES: usize = 4;
    let memory = map(share, PAGES * PAGE);
    // SAFETY: a mapping that stays; all that is in it is used as atomics.
    let words: &[AtomicU64] = unsafe { std::slice::from_raw_parts(memory.cast(), PAGES * PAGE / 8) };
    let step = PAGE / 8;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut count = 0;
            while !share.over() {
                for _ in 0..1000 {
                    count += 1;
                    // One after the other, so that each is as large as the one before or one less.
                    words.iter().step_by(step).for_each(|word| word.store(count, Ordering::Release));
                }
            }
        });
        while !share.over() {
            // SAFETY: the child only loads from memory and makes system calls until it ends.
            let child = unsafe { libc::fork() };
            if child == 0 {
                let read = || -> [u64; PAGES] { std::array::from_fn(|n| words[n * step].load(Ordering::SeqCst)) };
                let first = read();
                let mut code = i32::from(first[0] - first[PAGES - 1] > 1 || !first.is_sorted_by(|a, b| a >= b));
                for _ in 0..5 {
                    // SAFETY: no memory is involved.
                    unsafe { libc::sched_yield() };
                    code |= i32::from(read() != first) << 1;
                }
                // SAFETY: ends this process.
                unsafe { libc::_exit(code) }
            }
            let mut status = 0;
            // SAFETY: `status` is where the kernel puts the child's.
            let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
            share.check(waited == child && status == 0, || match libc::WEXITSTATUS(status) {
                1 => "a child begins with stores out of order".into(),
                2 | 3 => "a child's memory changes by what its parent writes".into(),
                _ => format!("wait {waited}, status {status:#x}"),
            });
            share.did();
        }
    });
}
