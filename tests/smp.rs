//! Machines with several CPUs: small guests that check themselves, on every engine that runs several.

mod support;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use support::smp::*;

type Done = Result<(), IcedError>;

/// The operations that count: by how much the operand is more, or less, when each of `cpus` CPUs has done it once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Count {
    Add,
    Inc,
    Dec,
    Xadd,
    Cmpxchg,
    /// A lock that is a bit, around a plain increment.
    Bts,
    /// A lock that is taken by XCHG.
    Xchg,
    Cmpxchg8b,
    Cmpxchg16b,
}

const COUNTS: [Count; 9] = [
    Count::Add,
    Count::Inc,
    Count::Dec,
    Count::Xadd,
    Count::Cmpxchg,
    Count::Bts,
    Count::Xchg,
    Count::Cmpxchg8b,
    Count::Cmpxchg16b,
];

/// Where an operand of `width` bytes is, in relation to what hosts access at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Aligned,
    InLine,
    AcrossLines,
    AcrossPages,
}

const PLACES: [Place; 4] = [Place::Aligned, Place::InLine, Place::AcrossLines, Place::AcrossPages];

impl Place {
    /// The offset from the start of a page.
    fn offset(self, width: u32) -> u32 {
        match self {
            Place::Aligned => 0x40,
            Place::InLine => 0x41,
            Place::AcrossLines => 0x80 - width / 2,
            Place::AcrossPages => 0x1000 - width / 2,
        }
    }

    /// A host has no atomic access to those that are not aligned, and stops all CPUs for each.
    fn rounds(self) -> u32 {
        if self == Place::Aligned { 50_000 } else { 500 }
    }
}

/// The counters, one a page, or two where they cross pages.
const COUNTERS: u32 = FREE;
/// Behind a counter: the lock that some are guarded by, at the same place of a page.
const LOCK: i32 = 0x2000;

/// Emits one operation on the operand at EBX. Changes EAX, ECX, EDX and ESI.
fn count(g: &mut Smp, how: Count, width: u32) -> Done {
    let at = g.bx();
    let lock = g.bx() + LOCK;
    /// One instruction by the operand's width.
    macro_rules! by_width {
        ($g:expr, |$ptr:ident, $a:ident, $d:ident| $code:expr) => {
            match width {
                1 => {
                    let ($ptr, $a, $d) = (byte_ptr, al, dl);
                    _ = ($a, $d);
                    $code
                }
                2 => {
                    let ($ptr, $a, $d) = (word_ptr, ax, dx);
                    _ = ($a, $d);
                    $code
                }
                4 => {
                    let ($ptr, $a, $d) = (dword_ptr, eax, edx);
                    _ = ($a, $d);
                    $code
                }
                _ => {
                    let ($ptr, $a, $d) = (qword_ptr, rax, rdx);
                    _ = ($a, $d);
                    $code
                }
            }
        };
    }
    match how {
        Count::Add => by_width!(g, |ptr, a, d| g.lock().add(ptr(at), 1)),
        Count::Inc => by_width!(g, |ptr, a, d| g.lock().inc(ptr(at))),
        Count::Dec => by_width!(g, |ptr, a, d| g.lock().dec(ptr(at))),
        Count::Xadd => {
            g.mov(eax, 1)?;
            by_width!(g, |ptr, a, d| g.lock().xadd(ptr(at), a))
        }
        Count::Cmpxchg => {
            by_width!(g, |ptr, a, d| g.mov(a, ptr(at)))?;
            let again = g.here()?;
            by_width!(g, |ptr, a, d| {
                g.mov(d, a)?;
                g.inc(d)?;
                g.lock().cmpxchg(ptr(at), d)
            })?;
            g.jne(again)
        }
        Count::Bts | Count::Xchg => {
            let again = g.here()?;
            g.pause()?;
            if how == Count::Bts {
                // Bit strings have no bytes.
                match width {
                    1 | 2 => g.lock().bts(word_ptr(lock), 3)?,
                    4 => g.lock().bts(dword_ptr(lock), 3)?,
                    _ => g.lock().bts(qword_ptr(lock), 3)?,
                }
                g.jc(again)?;
            } else {
                g.mov(edx, 1)?;
                by_width!(g, |ptr, a, d| g.xchg(ptr(lock), d))?;
                g.test(edx, edx)?;
                g.jne(again)?;
            }
            by_width!(g, |ptr, a, d| g.inc(ptr(at)))?;
            by_width!(g, |ptr, a, d| g.mov(ptr(lock), 0))
        }
        Count::Cmpxchg8b => {
            g.mov(eax, dword_ptr(at))?;
            g.mov(edx, dword_ptr(at + 4))?;
            let again = g.here()?;
            g.push_bx()?;
            if g.bits == Bits::B64 {
                g.mov(rsi, rbx)?
            } else {
                g.mov(esi, ebx)?
            }
            g.mov(ebx, eax)?;
            g.mov(ecx, edx)?;
            g.add(ebx, 1)?;
            g.adc(ecx, 0)?;
            let operand = g.si();
            g.lock().cmpxchg8b(qword_ptr(operand))?;
            g.pop_bx()?;
            g.jne(again)
        }
        Count::Cmpxchg16b => {
            g.mov(rax, qword_ptr(at))?;
            g.mov(rdx, qword_ptr(at + 8))?;
            let again = g.here()?;
            g.push(rbx)?;
            g.mov(rsi, rbx)?;
            g.mov(rbx, rax)?;
            g.mov(rcx, rdx)?;
            g.add(rbx, 1)?;
            g.adc(rcx, 1)?;
            g.lock().cmpxchg16b(xmmword_ptr(rsi))?;
            g.pop(rbx)?;
            g.jne(again)
        }
    }
}

/// Every operation at every width and place that it has: the totals are exact.
fn counters(g: &mut Smp) -> Done {
    g.start_others()?;
    let mut cases = Vec::new();
    for how in COUNTS {
        let widths: &[u32] = match how {
            Count::Cmpxchg8b => &[8],
            Count::Cmpxchg16b if g.bits == Bits::B64 => &[16],
            Count::Cmpxchg16b => &[],
            _ if g.bits == Bits::B64 => &[1, 2, 4, 8],
            _ => &[1, 2, 4],
        };
        for &width in widths {
            // One that is not aligned raises #GP.
            let places = if how == Count::Cmpxchg16b || width == 1 { &PLACES[..1] } else { &PLACES };
            cases.extend(places.iter().map(|&place| (how, width, place)));
        }
    }
    for (k, &(how, width, place)) in (0..).zip(&cases) {
        let at = COUNTERS + k * 0x4000 + place.offset(width);
        g.mov(ebx, at)?;
        g.barrier()?;
        g.mov(edi, place.rounds())?;
        let again = g.here()?;
        count(g, how, width)?;
        g.dec(edi)?;
        g.jne(again)?;
        g.barrier()?;
        let total = place.rounds() * g.cpus;
        let total = if how == Count::Dec { total.wrapping_neg() } else { total };
        let mask = if width < 4 { (1 << (8 * width)) - 1 } else { u32::MAX };
        g.on(0, |g| {
            let what = format!("{how:?} of {width} bytes, {place:?}");
            g.mov(eax, dword_ptr(at))?;
            g.and(eax, mask as i32)?;
            g.check(&what, total & mask)?;
            if how == Count::Cmpxchg16b {
                g.check_at(&what, at + 8, total)?;
            }
            // What is around it is as it was.
            g.mov(al, byte_ptr(at - 1))?;
            g.mov(ah, byte_ptr(at + width))?;
            g.movzx(eax, ax)?;
            g.check(&format!("beside {what}"), 0)
        })?;
    }
    g.finish()
}

#[test]
fn locked_counters_are_exact() {
    let directory = tempfile::tempdir().expect("directory");
    for (bits, cpus) in [(Bits::B64, 2), (Bits::B32, 3), (Bits::B64, 4)] {
        let kernel = guest(directory.path(), "kernel", bits, cpus, counters);
        passes(&format!("{bits:?}"), &kernel, cpus);
    }
}

/// One CPU counts in a doubleword that is not aligned, others store to what lies directly before and behind it: a
/// locked access that were made wider would put old values there.
fn neighbours(g: &mut Smp) -> Done {
    const ERRORS: u32 = FREE;
    const ROUNDS: u32 = 2_000;
    g.start_others()?;
    for (k, offset) in (1..).zip([0x42u32, 0x45, 0x7e, 0x7f, 0xffe, 0xfff]) {
        let at = FREE + k * 0x4000 + offset;
        g.barrier()?;
        g.on(0, |g| g.times(ecx, ROUNDS, |g| g.lock().inc(dword_ptr(at))))?;
        for (cpu, neighbour) in [(1, at + 4), (2, at - 4)] {
            g.on(cpu, |g| {
                g.times(ecx, 20 * ROUNDS, |g| {
                    let mut good = g.create_label();
                    g.mov(dword_ptr(neighbour), ecx)?;
                    g.mov(eax, ecx)?;
                    g.imul_2(eax, eax)?;
                    g.cmp(dword_ptr(neighbour), ecx)?;
                    g.je(good)?;
                    g.lock().inc(dword_ptr(ERRORS))?;
                    g.place(&mut good)
                })
            })?;
        }
        g.barrier()?;
        g.on(0, |g| {
            g.check_at(&format!("the counter at {offset:x}"), at, ROUNDS)?;
            g.check_at(&format!("behind {offset:x}"), at + 4, 1)?;
            g.check_at(&format!("before {offset:x}"), at - 4, 1)
        })?;
    }
    g.on(0, |g| g.check_at("stores that were lost", ERRORS, 0))?;
    g.finish()
}

#[test]
fn locked_operands_leave_their_neighbours_alone() {
    let directory = tempfile::tempdir().expect("directory");
    for bits in [Bits::B32, Bits::B64] {
        let kernel = guest(directory.path(), "kernel", bits, 3, neighbours);
        passes(&format!("{bits:?}"), &kernel, 3);
    }
}

/// One step of a thread of a litmus test, on a variable by number.
#[derive(Clone, Copy, Debug)]
enum Step {
    Store(usize, u8),
    /// Into the thread's first or second result.
    Load(usize, usize),
    /// A store by XCHG.
    Exchange(usize, u8),
    Mfence,
    /// A locked instruction on the stack.
    Locked,
}

/// What is looked for when all threads are through.
#[derive(Clone, Copy, Debug)]
enum Seen {
    /// A result of a thread: thread, which, value.
    Result(usize, usize, u8),
    /// What is left in a variable.
    Left(usize, u8),
}

/// A litmus test of x86-TSO (Sewell et al., "x86-TSO", CACM 53(7), 2010; SDM vol. 3 §9.2.3).
struct Litmus {
    name: &'static str,
    threads: &'static [&'static [Step]],
    seen: &'static [Seen],
    /// Whether the outcome may be seen.
    allowed: bool,
}

const X: usize = 0;
const Y: usize = 1;

const LITMUS: [Litmus; 13] = {
    use Seen::*;
    use Step::*;
    const BOTH_OLD: &[Seen] = &[Result(0, 0, 0), Result(1, 0, 0)];
    [
        Litmus {
            name: "SB",
            threads: &[&[Store(X, 1), Load(Y, 0)], &[Store(Y, 1), Load(X, 0)]],
            seen: BOTH_OLD,
            allowed: true,
        },
        Litmus {
            name: "SB+mfences",
            threads: &[&[Store(X, 1), Mfence, Load(Y, 0)], &[Store(Y, 1), Mfence, Load(X, 0)]],
            seen: BOTH_OLD,
            allowed: false,
        },
        Litmus {
            name: "SB+locked",
            threads: &[&[Store(X, 1), Locked, Load(Y, 0)], &[Store(Y, 1), Locked, Load(X, 0)]],
            seen: BOTH_OLD,
            allowed: false,
        },
        Litmus {
            name: "SB+xchg",
            threads: &[&[Exchange(X, 1), Load(Y, 0)], &[Exchange(Y, 1), Load(X, 0)]],
            seen: BOTH_OLD,
            allowed: false,
        },
        Litmus {
            name: "SB+mfence+xchg",
            threads: &[&[Store(X, 1), Mfence, Load(Y, 0)], &[Exchange(Y, 1), Load(X, 0)]],
            seen: BOTH_OLD,
            allowed: false,
        },
        Litmus {
            name: "MP",
            threads: &[&[Store(X, 1), Store(Y, 1)], &[Load(Y, 0), Load(X, 1)]],
            seen: &[Result(1, 0, 1), Result(1, 1, 0)],
            allowed: false,
        },
        Litmus {
            name: "LB",
            threads: &[&[Load(X, 0), Store(Y, 1)], &[Load(Y, 0), Store(X, 1)]],
            seen: &[Result(0, 0, 1), Result(1, 0, 1)],
            allowed: false,
        },
        Litmus {
            name: "2+2W",
            threads: &[&[Store(X, 1), Store(Y, 2)], &[Store(Y, 1), Store(X, 2)]],
            seen: &[Left(X, 1), Left(Y, 1)],
            allowed: false,
        },
        Litmus {
            name: "S",
            threads: &[&[Store(X, 2), Store(Y, 1)], &[Load(Y, 0), Store(X, 1)]],
            seen: &[Result(1, 0, 1), Left(X, 2)],
            allowed: false,
        },
        Litmus {
            name: "R",
            threads: &[&[Store(X, 1), Store(Y, 1)], &[Store(Y, 2), Load(X, 0)]],
            seen: &[Result(1, 0, 0), Left(Y, 2)],
            allowed: true,
        },
        Litmus {
            name: "CoRR",
            threads: &[&[Store(X, 1)], &[Load(X, 0), Load(X, 1)]],
            seen: &[Result(1, 0, 1), Result(1, 1, 0)],
            allowed: false,
        },
        Litmus {
            name: "WRC",
            threads: &[&[Store(X, 1)], &[Load(X, 0), Store(Y, 1)], &[Load(Y, 0), Load(X, 1)]],
            seen: &[Result(1, 0, 1), Result(2, 0, 1), Result(2, 1, 0)],
            allowed: false,
        },
        Litmus {
            name: "IRIW",
            threads: &[&[Store(X, 1)], &[Store(Y, 1)], &[Load(X, 0), Load(Y, 1)], &[Load(Y, 0), Load(X, 1)]],
            seen: &[Result(2, 0, 1), Result(2, 1, 0), Result(3, 0, 1), Result(3, 1, 0)],
            allowed: false,
        },
    ]
};

/// Where the two variables are in their 256 bytes, and how wide they are: in one 64-byte line side by side and at its
/// ends, in two, misaligned beside each other, and misaligned in two.
const LAYOUTS: [([i32; 2], u32); 6] =
    [([0, 4], 4), ([0, 56], 8), ([0, 128], 4), ([128, 64], 1), ([1, 5], 4), ([0x23, 0x72], 2)];

/// One round runs a test so many times, each on variables of its own.
const CELLS: u32 = 1024;
const CELL: u32 = 256;
const ARENA: u32 = 0x80_0000;
/// Two results of 8 bytes for each time and thread.
const RESULTS: u32 = 0xa0_0000;
/// Where each thread is, 64 bytes apart.
const PROGRESS: u32 = 0xb0_0000;
/// Seen so often.
const WITNESSES: u32 = 0xc0_0000;
/// How often threads look whether the others are where they are, before they go on without.
const PATIENCE: u32 = 64;

fn results(thread: usize) -> u32 {
    RESULTS + thread as u32 * CELLS * 16
}

fn progress(thread: usize) -> u32 {
    PROGRESS + thread as u32 * 64
}

/// Emits a step, at the variables in RBX, with the results in R8 and R9.
fn step(g: &mut Smp, step: Step, offsets: [i32; 2], width: u32) -> Done {
    match step {
        Step::Mfence => g.mfence(),
        Step::Locked => g.lock().add(dword_ptr(rsp - 64), 1),
        Step::Store(variable, value) => {
            let (at, value) = (rbx + offsets[variable], i32::from(value));
            match width {
                1 => g.mov(byte_ptr(at), value),
                2 => g.mov(word_ptr(at), value),
                4 => g.mov(dword_ptr(at), value),
                _ => g.mov(qword_ptr(at), value),
            }
        }
        Step::Exchange(variable, value) => {
            let at = rbx + offsets[variable];
            g.mov(eax, u32::from(value))?;
            match width {
                1 => g.xchg(byte_ptr(at), al),
                2 => g.xchg(word_ptr(at), ax),
                4 => g.xchg(dword_ptr(at), eax),
                _ => g.xchg(qword_ptr(at), rax),
            }
        }
        Step::Load(variable, result) => {
            let at = rbx + offsets[variable];
            match (width, result) {
                (1, 0) => g.movzx(r8d, byte_ptr(at)),
                (1, _) => g.movzx(r9d, byte_ptr(at)),
                (2, 0) => g.movzx(r8d, word_ptr(at)),
                (2, _) => g.movzx(r9d, word_ptr(at)),
                (4, 0) => g.mov(r8d, dword_ptr(at)),
                (4, _) => g.mov(r9d, dword_ptr(at)),
                (_, 0) => g.mov(r8, qword_ptr(at)),
                (_, _) => g.mov(r9, qword_ptr(at)),
            }
        }
    }
}

/// Emits what one thread does in a round. R14D is how often it has run steps so far, R13D random.
fn thread(g: &mut Smp, test: &Litmus, of: usize, offsets: [i32; 2], width: u32) -> Done {
    g.mov(ebx, ARENA)?;
    g.mov(esi, results(of))?;
    g.times(ecx, CELLS, |g| {
        let mut go = g.create_label();
        g.inc(r14d)?;
        g.mov(dword_ptr(progress(of)), r14d)?;
        g.mov(edx, PATIENCE)?;
        let again = g.here()?;
        let mut not_there = g.create_label();
        for other in (0..test.threads.len()).filter(|&other| other != of) {
            g.mov(eax, dword_ptr(progress(other)))?;
            g.sub(eax, r14d)?;
            g.js(not_there)?;
        }
        g.jmp(go)?;
        g.place(&mut not_there)?;
        g.dec(edx)?;
        g.jne(again)?;
        g.place(&mut go)?;
        // Up to 255 turns more.
        g.imul_3(r13d, r13d, 1_664_525)?;
        g.add(r13d, 1_013_904_223)?;
        g.mov(eax, r13d)?;
        g.shr(eax, 24)?;
        let wait = g.here()?;
        g.dec(eax)?;
        g.jns(wait)?;
        for &s in test.threads[of] {
            step(g, s, offsets, width)?;
        }
        g.mov(qword_ptr(rsi), r8)?;
        g.mov(qword_ptr(rsi + 8), r9)?;
        g.add(rsi, 16)?;
        g.add(rbx, CELL as i32)
    })
}

/// Emits rounds of one test, and how often its outcome was seen is printed.
fn litmus(g: &mut Smp, test: &Litmus, offsets: [i32; 2], width: u32, rounds: u32) -> Done {
    g.on(0, |g| g.mov(dword_ptr(WITNESSES), 0))?;
    g.mov(r12d, rounds)?;
    let round = g.here()?;
    g.on(0, |g| {
        g.mov(edi, ARENA)?;
        g.mov(ecx, CELLS * CELL / 4)?;
        g.xor(eax, eax)?;
        g.rep().stosd()
    })?;
    g.barrier()?;
    for of in 0..test.threads.len() {
        g.on(of as u32, |g| thread(g, test, of, offsets, width))?;
    }
    g.barrier()?;
    g.on(0, |g| {
        g.mov(ebx, ARENA)?;
        g.xor(esi, esi)?;
        g.times(ecx, CELLS, |g| {
            let mut not = g.create_label();
            for &seen in test.seen {
                match seen {
                    Seen::Result(thread, which, value) => {
                        g.cmp(qword_ptr(rsi + (results(thread) as i32 + 8 * which as i32)), i32::from(value))?;
                    }
                    Seen::Left(variable, value) => {
                        g.cmp(byte_ptr(rbx + offsets[variable]), i32::from(value))?;
                    }
                }
                g.jne(not)?;
            }
            g.inc(dword_ptr(WITNESSES))?;
            g.place(&mut not)?;
            g.add(rsi, 16)?;
            g.add(rbx, CELL as i32)
        })
    })?;
    g.dec(r12d)?;
    g.jne(round)?;
    g.on(0, |g| {
        g.say(&format!("{} {} ", test.name, if test.allowed { "may" } else { "never" }))?;
        g.mov(eax, dword_ptr(WITNESSES))?;
        g.say_eax()?;
        g.say("\n")
    })
}

/// Outcomes that the architecture forbids are never seen, however often one looks. How often those are seen that it
/// allows is printed: the more, the closer were threads to each other.
#[test]
fn memory_is_ordered() {
    let iterations = std::env::var("DIGLOT_LITMUS_ITERATIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(0x800);
    let rounds = u32::div_ceil(iterations, CELLS).max(1);
    let directory = tempfile::tempdir().expect("directory");
    for cpus in 2..=4 {
        let tests = || LITMUS.iter().filter(|test| test.threads.len() == cpus as usize);
        let kernel = guest(directory.path(), "kernel", Bits::B64, cpus, |g| {
            g.start_others()?;
            g.imul_3(r13d, ebp, 0x1234_5671)?;
            g.xor(r14d, r14d)?;
            for (offsets, width) in LAYOUTS {
                tests().try_for_each(|test| litmus(g, test, offsets, width, rounds))?;
            }
            g.finish()
        });
        // A round takes a few milliseconds where CPUs wait for the host's.
        let limit = (100 + 2 * rounds).to_string();
        on_engines(&kernel, cpus, &["--timeout", &limit], |engine, code, stdout, stderr| {
            assert_eq!(code, Some(0), "{engine}: {stdout} {stderr}");
            let lines: Vec<&str> = stdout.lines().collect();
            assert_eq!(lines.len(), LAYOUTS.len() * tests().count() + 1, "{engine}: {stdout}");
            let mut seen = std::collections::BTreeMap::new();
            for line in &lines[..lines.len() - 1] {
                let words: Vec<&str> = line.split(' ').collect();
                let count = u32::from_str_radix(words[2], 16).expect("a number");
                *seen.entry((words[0], words[1] == "may")).or_insert(0) += count;
            }
            for ((name, may), count) in seen {
                println!("{engine}: {name}: {count} of {}", LAYOUTS.len() as u32 * rounds * CELLS);
                assert!(may || count == 0, "{engine}: {name} was seen {count} times: {stdout}");
            }
        });
    }
}

/// Which of `cpus` CPUs a mask has.
fn of_mask(cpus: u32, mask: u32) -> impl Iterator<Item = (u32, u32)> {
    (0..cpus).map(move |cpu| (cpu, mask >> cpu & 1))
}

/// How CPUs are started and stopped, and whom interrupts between them are for.
fn startup(g: &mut Smp) -> Done {
    const STARTS: u32 = FREE;
    const IDS: u32 = FREE + 0x100;
    const TOPOLOGY_IDS: u32 = FREE + 0x200;
    const BOOTS: u32 = FREE + 0x300;
    const INTERRUPTS: u32 = FREE + 0x400;
    const NMIS: u32 = FREE + 0x500;
    const READY: u32 = FREE + 0x600;
    const SPINS: u32 = FREE + 0x700;
    const LOWEST: u32 = FREE + 0x900;
    const ALL_LOWEST: u32 = FREE + 0xa00;
    // Higher than the one that is never ended.
    const VECTOR: u32 = 0x50;
    const LOWEST_VECTOR: u32 = 0x41;
    const SPIN_VECTOR: u32 = 0x42;
    const ELSEWHERE: u32 = 0x9000;
    let cpus = g.cpus;
    let everybody = (1 << cpus) - 1;

    let mut main = g.create_label();
    g.jmp(main)?;
    let count_at = |g: &mut Smp, vector: u32, table: u32| -> Done {
        g.handler(vector as u8)?;
        g.push_ax()?;
        let counter = g.own(table);
        g.lock().inc(counter)?;
        if table == LOWEST {
            g.lock().inc(dword_ptr(ALL_LOWEST))?;
        }
        if vector != 2 {
            g.eoi()?;
        }
        g.pop_ax()?;
        g.iret_here()
    };
    count_at(g, 2, NMIS)?;
    count_at(g, VECTOR, INTERRUPTS)?;
    count_at(g, LOWEST_VECTOR, LOWEST)?;
    // Who gets this one never comes back.
    g.handler(SPIN_VECTOR as u8)?;
    let spins = g.here()?;
    g.inc(dword_ptr(SPINS))?;
    g.jmp(spins)?;

    g.place(&mut main)?;
    let (starts, ids, topology_ids, boots, ready) =
        (g.own(STARTS), g.own(IDS), g.own(TOPOLOGY_IDS), g.own(BOOTS), g.own(READY));
    g.lock().inc(starts)?;
    g.mov(eax, 1)?;
    g.cpuid()?;
    g.shr(ebx, 24)?;
    g.mov(ids, ebx)?;
    g.mov(eax, 11)?;
    g.xor(ecx, ecx)?;
    g.cpuid()?;
    g.mov(topology_ids, edx)?;
    g.mov(ecx, 0x1b)?;
    g.rdmsr()?;
    g.and(eax, 1 << 8)?;
    g.mov(boots, eax)?;
    // One bit each of the flat logical destination.
    g.mov(ecx, ebp)?;
    g.mov(eax, 1 << 24)?;
    g.shl(eax, cl)?;
    g.mov(edi, LAPIC + LAPIC_LDR)?;
    let registers = g.di();
    g.mov(dword_ptr(registers), eax)?;
    g.lock().inc(ready)?;
    g.sti()?;
    g.not_on(0, Smp::halt)?;

    for cpu in 1..cpus {
        g.delay(1000)?;
        g.check_at(&format!("CPU {cpu} before it is started"), STARTS + 4 * cpu, 0)?;
    }
    g.ipi(0, OTHERS | INIT)?;
    g.ipi(0, OTHERS | STARTUP)?;
    for cpu in 0..cpus {
        g.expect(READY + 4 * cpu, 1)?;
    }
    g.ipi(0, OTHERS | STARTUP)?;
    g.delay(10_000)?;
    for cpu in 0..cpus {
        g.check_at(&format!("starts of CPU {cpu}"), STARTS + 4 * cpu, 1)?;
        g.check_at(&format!("APIC ID of CPU {cpu}"), IDS + 4 * cpu, cpu)?;
        g.check_at(&format!("x2APIC ID of CPU {cpu}"), TOPOLOGY_IDS + 4 * cpu, cpu)?;
        g.check_at(&format!("BSP flag of CPU {cpu}"), BOOTS + 4 * cpu, u32::from(cpu == 0) << 8)?;
    }
    g.movzx(eax, word_ptr(TRAMPOLINE + STARTED_HERE))?;
    g.check("starts at the vector", cpus - 1)?;

    // Name, destination, command, and by CPU who gets it.
    let logical = |mask: u32| (mask << 24, ASSERT | 1 << 11);
    let physical = |cpu: u32| (cpu << 24, ASSERT);
    let sends = [
        ("fixed, to one", physical(cpus - 1), 1 << (cpus - 1)),
        ("fixed, to the sender", physical(0), 1),
        ("fixed, physical broadcast", physical(0xff), everybody),
        ("fixed, to nobody", physical(cpus), 0),
        ("shorthand self", (0, ASSERT | SELF), 1),
        ("shorthand all", (0, ASSERT | ALL), everybody),
        ("shorthand others", (0, ASSERT | OTHERS), everybody & !1),
        ("logical, to some", logical(0b1010), 0b1010 & everybody),
        ("logical, to all", logical(0xff), everybody),
        ("logical, to nobody", logical(0x80), 0),
    ];
    let mut expected = vec![0; cpus as usize];
    for (name, (destination, command), who) in sends {
        g.ipi(destination, command | VECTOR)?;
        for (cpu, more) in of_mask(cpus, who) {
            expected[cpu as usize] += more;
            g.expect(INTERRUPTS + 4 * cpu, expected[cpu as usize])?;
        }
        g.delay(1000)?;
        for cpu in 0..cpus {
            g.check_at(&format!("{name}: CPU {cpu}"), INTERRUPTS + 4 * cpu, expected[cpu as usize])?;
        }
    }

    // One of those that it is for gets it.
    g.ipi(0b1110 << 24, ASSERT | 1 << 11 | 1 << 8 | LOWEST_VECTOR)?;
    g.expect(ALL_LOWEST, 1)?;
    g.delay(1000)?;
    g.check_at("lowest priority", ALL_LOWEST, 1)?;
    g.check_at("lowest priority at another", LOWEST, 0)?;

    for (destination, command, who) in [(1 << 24, NMI, 0b10), (0, OTHERS | NMI, everybody & !1)] {
        g.ipi(destination, command)?;
        g.expect(NMIS + 4, if command == NMI { 1 } else { 2 })?;
        g.delay(1000)?;
        for (cpu, one) in of_mask(cpus, who | 1 << 1) {
            let before = u32::from(command != NMI && cpu == 1);
            g.expect(NMIS + 4 * cpu, one + before)?;
            g.check_at(&format!("NMIs of CPU {cpu}"), NMIS + 4 * cpu, one + before)?;
        }
    }

    // Who holds back an interrupt takes an NMI.
    g.ipi(1 << 24, ASSERT | SPIN_VECTOR)?;
    let wait = g.here()?;
    g.pause()?;
    g.cmp(dword_ptr(SPINS), 30_000)?;
    g.jb(wait)?;
    g.ipi(1 << 24, ASSERT | VECTOR)?;
    g.delay(10_000)?;
    g.ipi(1 << 24, NMI)?;
    g.expect(NMIS + 4, 3)?;
    g.check_at("NMIs beside an interrupt", NMIS + 4, 3)?;
    g.check_at("interrupts of one that holds them back", INTERRUPTS + 4, expected[1])?;

    // One that runs for ever is stopped, takes no interrupts, and starts again where it is told to.
    g.ipi(1 << 24, INIT)?;
    // The host may not have had it look yet.
    let mut stopped = g.create_label();
    g.times(esi, 10_000, |g| {
        g.mov(ebx, dword_ptr(SPINS))?;
        g.delay(10_000)?;
        g.cmp(dword_ptr(SPINS), ebx)?;
        g.je(stopped)
    })?;
    g.mov(eax, esi)?;
    g.check("spins after INIT", 1)?;
    g.place(&mut stopped)?;
    g.ipi(1 << 24, ASSERT | VECTOR)?;
    g.delay(1000)?;
    g.check_at("interrupts of one that waits", INTERRUPTS + 4, expected[1])?;
    g.mov(esi, TRAMPOLINE)?;
    g.mov(edi, ELSEWHERE)?;
    g.mov(ecx, TRAMPOLINE_LEN)?;
    g.rep().movsb()?;
    g.mov(word_ptr(ELSEWHERE + STARTED_HERE), 0)?;
    g.ipi(1 << 24, STARTUP + (ELSEWHERE >> 12) - TRAMPOLINE_VECTOR)?;
    g.expect(READY + 4, 2)?;
    g.delay(1000)?;
    g.check_at("starts", STARTS + 4, 2)?;
    g.movzx(eax, word_ptr(ELSEWHERE + STARTED_HERE))?;
    g.check("starts elsewhere", 1)?;
    g.movzx(eax, word_ptr(TRAMPOLINE + STARTED_HERE))?;
    g.check("starts at the first vector", cpus - 1)?;

    // Over and over, whether it halts, spins, or is on its way.
    g.times(ebx, 300, |g| {
        let (mut there, mut not) = (g.create_label(), g.create_label());
        g.mov(esi, dword_ptr(READY + 4))?;
        g.test(ebx, 1)?;
        g.je(not)?;
        g.ipi(1 << 24, ASSERT | SPIN_VECTOR)?;
        g.place(&mut not)?;
        g.ipi(1 << 24, INIT)?;
        g.ipi(1 << 24, STARTUP)?;
        // Three of four are not waited for.
        g.test(ebx, 3)?;
        g.jne(there)?;
        g.times(ecx, 30_000_000, |g| {
            g.pause()?;
            g.cmp(dword_ptr(READY + 4), esi)?;
            g.jne(there)
        })?;
        g.say("FAIL it does not start\n")?;
        g.place(&mut there)
    })?;
    g.ipi(1 << 24, INIT)?;
    g.ipi(1 << 24, STARTUP)?;
    // Until it has its local APIC enabled it takes none.
    let mut takes = g.create_label();
    g.times(ebx, 100_000, |g| {
        g.ipi(1 << 24, ASSERT | VECTOR)?;
        g.delay(100)?;
        g.cmp(dword_ptr(INTERRUPTS + 4), expected[1] as i32)?;
        g.jne(takes)
    })?;
    g.say("FAIL it takes no interrupts after many starts\n")?;
    g.place(&mut takes)?;
    g.say("done\n")?;
    support::power_off(g)
}

#[test]
fn cpus_start_and_stop_and_send_interrupts() {
    let directory = tempfile::tempdir().expect("directory");
    for (bits, cpus) in [(Bits::B32, 4), (Bits::B64, 2)] {
        let kernel = guest(directory.path(), "kernel", bits, cpus, startup);
        passes(&format!("{bits:?}"), &kernel, cpus);
    }
}

/// How one CPU rewrites a function that another calls.
#[derive(Clone, Copy, Debug)]
struct Rewriting {
    rounds: u32,
    /// So many calls each time: from a few on there is quick code of it, from many a region.
    calls: u32,
    /// Where the page has data that the first CPU stores to all the time, if it has.
    data: Option<u32>,
    /// Whether each page is used twice only, and stored to, executed, and stored to again.
    fresh: bool,
    /// Whether it is IRET, instead of CPUID, that serialises.
    iret: bool,
}

const FUNCTION: u32 = 0x100_0000;

/// Emits that the page in EDI has a function which returns the number in EBX. The bytes are stored one by one, the first
/// of them first.
fn write_function(g: &mut Smp) -> Done {
    let at = g.di();
    g.mov(byte_ptr(at), 0xb8)?;
    g.mov(dword_ptr(at + 1), ebx)?;
    g.mov(byte_ptr(at + 5), 0xc3)
}

/// One CPU stores a function and then a flag. The other sees the flag, executes a serialising instruction and calls the
/// function (SDM vol. 3 §9.1.3). A third stores beside it.
fn rewritten(g: &mut Smp, k: u32, how: Rewriting) -> Done {
    const WRONG: u32 = FREE;
    const STOP: u32 = FREE + 0x40;
    let (flag, ack) = (FREE + 0x1000 + 256 * k, FREE + 0x1080 + 256 * k);
    g.on(0, |g| g.mov(dword_ptr(STOP), 0))?;
    g.barrier()?;
    let page = |g: &mut Smp, round: AsmRegister32| -> Done {
        g.mov(edi, round)?;
        g.and(edi, if how.fresh { !1 } else { 0 })?;
        g.shl(edi, 11)?;
        g.add(edi, FUNCTION as i32)
    };
    g.on(0, |g| {
        g.mov(ebx, 1)?;
        let again = g.here()?;
        page(g, ebx)?;
        write_function(g)?;
        g.mov(dword_ptr(flag), ebx)?;
        let wait = g.here()?;
        g.pause()?;
        if let Some(data) = how.data {
            let at = g.di();
            g.mov(dword_ptr(at + data as i32), ebx)?;
        }
        g.cmp(dword_ptr(ack), ebx)?;
        g.jne(wait)?;
        g.inc(ebx)?;
        g.cmp(ebx, how.rounds as i32)?;
        g.jbe(again)?;
        g.mov(dword_ptr(STOP), 1)
    })?;
    g.on(1, |g| {
        g.mov(esi, 1)?;
        let again = g.here()?;
        g.wait_for(flag, esi)?;
        if how.iret {
            g.iret_to_next()?;
        } else {
            g.xor(eax, eax)?;
            g.cpuid()?;
        }
        page(g, esi)?;
        g.times(ecx, how.calls, |g| {
            let mut good = g.create_label();
            if g.bits == Bits::B64 {
                g.call(rdi)?
            } else {
                g.call(edi)?
            }
            g.cmp(eax, esi)?;
            g.je(good)?;
            g.lock().inc(dword_ptr(WRONG))?;
            g.place(&mut good)
        })?;
        g.mov(dword_ptr(ack), esi)?;
        g.inc(esi)?;
        g.cmp(esi, how.rounds as i32)?;
        g.jbe(again)
    })?;
    g.on(2, |g| {
        let again = g.here()?;
        let mut good = g.create_label();
        for at in [FUNCTION + 0x18, FUNCTION + 0x820] {
            g.mov(dword_ptr(at), ecx)?;
        }
        g.cmp(dword_ptr(FUNCTION + 0x18), ecx)?;
        g.je(good)?;
        g.lock().inc(dword_ptr(WRONG))?;
        g.place(&mut good)?;
        g.inc(ecx)?;
        g.cmp(dword_ptr(STOP), 0)?;
        g.je(again)
    })?;
    g.barrier()?;
    g.on(0, |g| {
        g.check_at(&format!("old code, {how:?}"), WRONG, 0)?;
        g.mov(dword_ptr(WRONG), 0)
    })
}

#[test]
fn rewritten_code_is_seen_by_other_cpus() {
    let base = Rewriting { rounds: 2_000, calls: 1, data: None, fresh: false, iret: false };
    let cases = [
        base,
        Rewriting { calls: 30, iret: true, ..base },
        Rewriting { calls: 5_000, rounds: 300, ..base },
        Rewriting { calls: 30_000, rounds: 60, ..base },
        Rewriting { data: Some(0x10), ..base },
        Rewriting { data: Some(0x800), iret: true, ..base },
        Rewriting { data: Some(0x10), calls: 2_000, rounds: 300, ..base },
        Rewriting { data: Some(0x800), calls: 2_000, rounds: 300, ..base },
        Rewriting { fresh: true, data: Some(0x10), ..base },
        Rewriting { fresh: true, data: Some(0x800), calls: 30, ..base },
    ];
    let directory = tempfile::tempdir().expect("directory");
    for (bits, cpus) in [(Bits::B64, 2), (Bits::B32, 2), (Bits::B64, 3)] {
        let kernel = guest(directory.path(), "kernel", bits, cpus, |g| {
            g.start_others()?;
            (0..).zip(cases).try_for_each(|(k, how)| rewritten(g, k, how))?;
            g.finish()
        });
        passes(&format!("{bits:?}"), &kernel, cpus);
    }
}

/// An instruction is replaced while others run it, as Linux does (`text_poke_bp`): INT3 over its first byte, then what is
/// behind that, then the first byte, and after each every CPU takes an interrupt. Who meets the INT3 does what the new
/// instruction does.
fn poked(g: &mut Smp) -> Done {
    const ROUNDS: u32 = 200;
    const SYNC: u32 = 0x40;
    const WRONG: u32 = FREE;
    /// The number that the function returned before, and may return now.
    const LOW: u32 = FREE + 0x40;
    const HIGH: u32 = FREE + 0x80;
    const ACKNOWLEDGED: u32 = FREE + 0xc0;
    const STOP: u32 = FREE + 0x100;
    /// By CPU.
    const CALLS: u32 = FREE + 0x140;
    let mut main = g.create_label();
    g.jmp(main)?;
    g.handler(3)?;
    g.mov(eax, dword_ptr(HIGH))?;
    let frame = g.sp();
    if g.bits == Bits::B64 {
        g.add(qword_ptr(frame), 4)?
    } else {
        g.add(dword_ptr(frame), 4)?
    }
    g.iret_here()?;
    g.handler(SYNC as u8)?;
    g.push_ax()?;
    g.lock().inc(dword_ptr(ACKNOWLEDGED))?;
    g.eoi()?;
    g.pop_ax()?;
    g.iret_here()?;

    g.place(&mut main)?;
    g.on(0, |g| {
        g.mov(edi, FUNCTION)?;
        g.xor(ebx, ebx)?;
        write_function(g)
    })?;
    g.start_others()?;
    g.not_on(0, |g| {
        g.sti()?;
        let again = g.here()?;
        let (mut good, mut bad) = (g.create_label(), g.create_label());
        g.mov(esi, dword_ptr(LOW))?;
        g.mov(edi, FUNCTION)?;
        if g.bits == Bits::B64 {
            g.call(rdi)?
        } else {
            g.call(edi)?
        }
        g.cmp(eax, esi)?;
        g.jb(bad)?;
        g.cmp(eax, dword_ptr(HIGH))?;
        g.jbe(good)?;
        g.place(&mut bad)?;
        g.lock().inc(dword_ptr(WRONG))?;
        g.place(&mut good)?;
        let calls = g.own(CALLS);
        g.inc(calls)?;
        g.cmp(dword_ptr(STOP), 0)?;
        g.je(again)?;
        g.cli()
    })?;
    g.on(0, |g| {
        let others = g.cpus as i32 - 1;
        let sync = |g: &mut Smp| {
            g.add(esi, others)?;
            g.ipi(0, ASSERT | OTHERS | SYNC)?;
            g.wait_for(ACKNOWLEDGED, esi)
        };
        g.xor(esi, esi)?;
        g.mov(ebx, 1)?;
        let again = g.here()?;
        g.mov(dword_ptr(HIGH), ebx)?;
        g.mov(byte_ptr(FUNCTION), 0xcc)?;
        sync(g)?;
        g.mov(dword_ptr(FUNCTION + 1), ebx)?;
        sync(g)?;
        g.mov(byte_ptr(FUNCTION), 0xb8)?;
        sync(g)?;
        g.mov(dword_ptr(LOW), ebx)?;
        // Now and then it is called for long enough to be compiled.
        let mut soon = g.create_label();
        g.test(ebx, 63)?;
        g.jne(soon)?;
        g.mov(eax, dword_ptr(CALLS + 4))?;
        g.add(eax, 30_000)?;
        let wait = g.here()?;
        g.pause()?;
        g.cmp(dword_ptr(CALLS + 4), eax)?;
        g.js(wait)?;
        g.place(&mut soon)?;
        g.inc(ebx)?;
        g.cmp(ebx, ROUNDS as i32)?;
        g.jbe(again)?;
        g.mov(dword_ptr(STOP), 1)?;
        g.check_at("wrong code", WRONG, 0)
    })?;
    g.finish()
}

#[test]
fn code_is_poked_under_other_cpus() {
    let directory = tempfile::tempdir().expect("directory");
    for bits in [Bits::B64, Bits::B32] {
        let kernel = guest(directory.path(), "kernel", bits, 2, poked);
        passes(&format!("{bits:?}"), &kernel, 2);
    }
}

/// What CPUs other than the first do in the tests of page tables: an interrupt has them drop a translation.
const SHOOTDOWN: u32 = 0x40;
const ACKNOWLEDGED: u32 = FREE;
const STOP: u32 = FREE + 0x40;

/// Emits the handler, which drops what is known of the page at `linear`.
fn shootdown_handler(g: &mut Smp, linear: u32) -> Done {
    g.handler(SHOOTDOWN as u8)?;
    g.push(rax)?;
    g.invlpg(byte_ptr(linear))?;
    g.lock().inc(dword_ptr(ACKNOWLEDGED))?;
    g.eoi()?;
    g.pop(rax)?;
    g.iretq()
}

/// Emits a shootdown, acknowledged by all. ESI counts acknowledgements.
fn shoot_down(g: &mut Smp, linear: u32) -> Done {
    g.invlpg(byte_ptr(linear))?;
    let others = g.cpus as i32 - 1;
    g.add(esi, others)?;
    g.ipi(0, ASSERT | OTHERS | SHOOTDOWN)?;
    g.wait_for(ACKNOWLEDGED, esi)
}

/// A page is mapped elsewhere, and behind the shootdown nobody reads, writes or executes through the old mapping.
fn shootdowns(g: &mut Smp) -> Done {
    const ROUNDS: u32 = 300;
    const LINEAR: u32 = SMALL_PAGES;
    /// Four pages that it is mapped to by turns.
    const PAGES: u32 = SMALL_PAGES + 0x1_0000;
    const WRONG: u32 = FREE + 0x80;
    const LATE: u32 = FREE + 0xc0;
    const GOOD: u32 = 1;
    const BAD: u32 = 0xdead;
    /// In each page: the value that is read, counters by CPU, and a function.
    const COUNTERS: i32 = 0x40;
    const CODE: i32 = 0x800;
    let mut main = g.create_label();
    g.jmp(main)?;
    shootdown_handler(g, LINEAR)?;

    g.place(&mut main)?;
    g.on(0, |g| {
        for page in 0..4 {
            let at = PAGES + 0x1000 * page;
            g.mov(dword_ptr(at), GOOD)?;
            g.mov(edi, at + CODE as u32)?;
            g.mov(ebx, GOOD)?;
            write_function(g)?;
        }
        g.mov(qword_ptr(PAGE_TABLE), (PAGES | 0x67) as i32)
    })?;
    g.start_others()?;
    g.not_on(0, |g| {
        g.sti()?;
        let again = g.here()?;
        for look in 0..2 {
            let mut good = g.create_label();
            if look == 0 {
                g.mov(eax, dword_ptr(LINEAR))?;
            } else {
                g.mov(edi, LINEAR + CODE as u32)?;
                g.call(rdi)?;
            }
            g.cmp(eax, GOOD as i32)?;
            g.je(good)?;
            g.lock().inc(dword_ptr(WRONG))?;
            g.place(&mut good)?;
        }
        g.inc(dword_ptr(rbp * 8 + (LINEAR as i32 + COUNTERS)))?;
        g.cmp(dword_ptr(STOP), 0)?;
        g.je(again)?;
        g.cli()
    })?;
    g.on(0, |g| {
        g.xor(esi, esi)?;
        g.mov(r12d, PAGES)?;
        g.mov(ebx, 1)?;
        let again = g.here()?;
        g.mov(eax, ebx)?;
        g.and(eax, 3)?;
        g.shl(eax, 12)?;
        g.add(eax, (PAGES | 0x67) as i32)?;
        g.mov(qword_ptr(PAGE_TABLE), rax)?;
        shoot_down(g, LINEAR)?;
        g.mov(dword_ptr(r12), BAD)?;
        g.mov(dword_ptr(r12 + CODE + 1), BAD)?;
        for cpu in 1..g.cpus as i32 {
            g.mov(dword_ptr(r12 + COUNTERS + 8 * cpu), 0)?;
        }
        g.mov(ecx, ebx)?;
        g.and(ecx, 0xff)?;
        g.inc(ecx)?;
        let wait = g.here()?;
        g.dec(ecx)?;
        g.jne(wait)?;
        for cpu in 1..g.cpus as i32 {
            let mut good = g.create_label();
            g.cmp(dword_ptr(r12 + COUNTERS + 8 * cpu), 0)?;
            g.je(good)?;
            g.inc(dword_ptr(LATE))?;
            g.place(&mut good)?;
        }
        g.mov(dword_ptr(r12), GOOD)?;
        g.mov(dword_ptr(r12 + CODE + 1), GOOD)?;
        g.mov(r12d, eax)?;
        g.and(r12d, !0xfff)?;
        g.inc(ebx)?;
        g.cmp(ebx, ROUNDS as i32)?;
        g.jbe(again)?;
        g.mov(dword_ptr(STOP), 1)?;
        g.check_at("reads and fetches by an old mapping", WRONG, 0)?;
        g.check_at("writes by an old mapping", LATE, 0)
    })?;
    g.finish()
}

/// A page that another CPU writes to all the time is taken away by XCHG, as Linux does for swapping: the entry that was
/// put there stays as it is, and the one that was there says whether the page was written.
fn accessed_and_dirty(g: &mut Smp) -> Done {
    const ROUNDS: u32 = 400;
    const LINEAR: u32 = SMALL_PAGES + 0x1000;
    const ENTRY: u32 = PAGE_TABLE + 8;
    const PAGE: u32 = SMALL_PAGES + 0x2_0000;
    const FAULTS: u32 = FREE + 0x80;
    const TOUCHED: u32 = FREE + 0xc0;
    const LOST: u32 = FREE + 0x100;
    const WRITTEN: u32 = FREE + 0x140;
    /// Present, writable, for users; neither accessed nor dirty.
    const PRESENT: u32 = 7;
    const DIRTY: i32 = 1 << 6;
    let mut main = g.create_label();
    g.jmp(main)?;
    shootdown_handler(g, LINEAR)?;
    g.handler(14)?;
    g.lock().inc(dword_ptr(FAULTS))?;
    g.add(rsp, 8)?;
    g.iretq()?;

    g.place(&mut main)?;
    g.on(0, |g| g.mov(qword_ptr(ENTRY), 0))?;
    g.start_others()?;
    g.not_on(0, |g| {
        g.sti()?;
        g.mov(ecx, 1)?;
        let again = g.here()?;
        g.mov(dword_ptr(LINEAR), ecx)?;
        g.mov(eax, dword_ptr(LINEAR + 0x40))?;
        g.lock().inc(dword_ptr(LINEAR + 0x80))?;
        g.inc(ecx)?;
        g.cmp(dword_ptr(STOP), 0)?;
        g.je(again)?;
        g.cli()
    })?;
    let untouched = |g: &mut Smp| -> Done {
        let mut good = g.create_label();
        g.cmp(qword_ptr(ENTRY), r14)?;
        g.je(good)?;
        g.inc(dword_ptr(TOUCHED))?;
        g.place(&mut good)
    };
    g.on(0, |g| {
        g.xor(esi, esi)?;
        g.mov(ebx, 1)?;
        let again = g.here()?;
        g.mov(r12d, dword_ptr(PAGE))?;
        g.mov(r13d, dword_ptr(PAGE + 0x80))?;
        g.mov(qword_ptr(ENTRY), (PAGE | PRESENT) as i32)?;
        // Now and then nobody has written yet.
        g.mov(ecx, ebx)?;
        g.and(ecx, 63)?;
        let wait = g.here()?;
        g.dec(ecx)?;
        g.jns(wait)?;
        // An entry of a page that is swapped out: anything but present.
        g.mov(r14d, ebx)?;
        g.shl(r14, 32)?;
        g.mov(rdx, r14)?;
        g.xchg(qword_ptr(ENTRY), rdx)?;
        g.delay(20)?;
        untouched(g)?;
        shoot_down(g, LINEAR)?;
        g.delay(20)?;
        untouched(g)?;
        let (mut same, mut changed) = (g.create_label(), g.create_label());
        g.cmp(dword_ptr(PAGE), r12d)?;
        g.jne(changed)?;
        g.cmp(dword_ptr(PAGE + 0x80), r13d)?;
        g.je(same)?;
        g.place(&mut changed)?;
        g.inc(dword_ptr(WRITTEN))?;
        g.test(edx, DIRTY)?;
        g.jne(same)?;
        g.inc(dword_ptr(LOST))?;
        g.place(&mut same)?;
        g.inc(ebx)?;
        g.cmp(ebx, ROUNDS as i32)?;
        g.jbe(again)?;
        g.mov(qword_ptr(ENTRY), (PAGE | PRESENT) as i32)?;
        g.mov(dword_ptr(STOP), 1)?;
        g.check_at("entries that were taken away and changed", TOUCHED, 0)?;
        g.check_at("writes without a dirty bit", LOST, 0)?;
        // The test is of something.
        g.cmp(dword_ptr(WRITTEN), 0)?;
        g.setne(al)?;
        g.cmp(dword_ptr(FAULTS), 0)?;
        g.setne(ah)?;
        g.movzx(eax, ax)?;
        g.check("writes and faults", 0x101)
    })?;
    g.finish()
}

#[test]
fn page_tables_change_under_other_cpus() {
    let directory = tempfile::tempdir().expect("directory");
    type Test = fn(&mut Smp) -> Done;
    for (name, test) in [("shootdown", shootdowns as Test), ("dirty", accessed_and_dirty)] {
        let kernel = guest(directory.path(), "kernel", Bits::B64, 2, test);
        passes(name, &kernel, 2);
    }
}

/// Ends of the machine that are not the first CPU's doing, or find the others at something else.
#[test]
fn ends_of_a_guest_of_several_cpus_have_their_codes() {
    type Code = fn(&mut Smp) -> Done;
    /// Name, code, options, exit code, serial output, and what Diglot tells of the end.
    type Guest<'a> = (&'a str, Code, &'a [&'a str], i32, &'a str, &'a str);
    fn reset(g: &mut Smp) -> Done {
        g.mov(eax, 0xfe)?;
        g.out(0x64, al)?;
        support::spin(g)
    }
    let guests: [Guest; 13] = [
        ("the others are never started", |g| support::power_off(g), &[], 0, "", ""),
        ("halts, the others never started", Smp::halt, &["--timeout", "0.4"], 124, "", "--timeout"),
        ("crashes, the others never started", |g| g.ud2(), &[], 255, "", "triple fault"),
        (
            "another powers off",
            |g| {
                g.start_others()?;
                g.on(1, |g| g.say("bye\n").and_then(|()| support::power_off(g)))?;
                support::spin(g)
            },
            &[],
            0,
            "bye\n",
            "",
        ),
        (
            "another powers off while all halt",
            |g| {
                g.start_others()?;
                g.on(1, |g| g.delay(10_000).and_then(|()| support::power_off(g)))?;
                g.halt()
            },
            &[],
            0,
            "",
            "",
        ),
        (
            "another crashes",
            |g| {
                g.start_others()?;
                g.on(1, |g| g.ud2())?;
                g.halt()
            },
            &[],
            255,
            "",
            "triple fault",
        ),
        (
            "another crashes while all spin",
            |g| {
                g.start_others()?;
                g.on(2, |g| g.ud2())?;
                support::spin(g)
            },
            &["--no-reboot"],
            255,
            "",
            "triple fault",
        ),
        (
            "another resets",
            |g| {
                g.start_others()?;
                g.on(1, reset)?;
                support::spin(g)
            },
            &["--no-reboot"],
            255,
            "",
            "asked for a reset",
        ),
        (
            "another reboots until it has said so often enough",
            |g| {
                g.start_others()?;
                g.on(2, |g| g.say("up").and_then(|()| reset(g)))?;
                g.on(0, Smp::halt)?;
                support::spin(g)
            },
            &["--until", "upupupup"],
            0,
            "upupupup",
            "",
        ),
        ("all spin", |g| g.start_others().and_then(|()| support::spin(g)), &["--timeout", "0.4"], 124, "", "--timeout"),
        ("all halt", |g| g.start_others().and_then(|()| g.halt()), &["--timeout", "0.4"], 124, "", "--timeout"),
        (
            "all do locked accesses that are not aligned",
            |g| {
                g.start_others()?;
                let again = g.here()?;
                g.lock().inc(dword_ptr(FREE + 1))?;
                g.jmp(again)
            },
            &["--timeout", "0.4"],
            124,
            "",
            "--timeout",
        ),
        (
            "another ends with a code",
            |g| {
                g.start_others()?;
                g.not_on(1, |g| support::spin(g))?;
                g.mov(eax, 0x10)?;
                g.out(0xf4, al)?;
                support::spin(g)
            },
            &["--debug-exit", "0xf4"],
            33,
            "",
            "",
        ),
    ];
    let directory = tempfile::tempdir().expect("directory");
    for (name, code, options, exit, printed, told) in guests {
        for bits in [Bits::B32, Bits::B64] {
            let kernel = guest(directory.path(), "kernel", bits, 3, code);
            on_engines(&kernel, 3, options, |engine, code, stdout, stderr| {
                assert_eq!((code, stdout), (Some(exit), printed), "{name}, {engine}: {stderr}");
                // The first line is about the engine.
                let line = stderr.lines().nth(1).unwrap_or_default();
                assert!(line.contains(told) && line.is_empty() == told.is_empty(), "{name}, {engine}: {stderr}");
                assert!(stderr.lines().count() <= 2, "{name}, {engine}: {stderr}");
            });
        }
    }
}
