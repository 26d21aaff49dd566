//! The order in which CPUs see each other's stores: litmus tests.

use iced_x86::code_asm::*;

use crate::support::smp::*;

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

/// Outcomes that the architecture forbids are never seen, however often one looks: each test and layout is run as often
/// as `DIGLOT_LITMUS_ITERATIONS` says, such as 10000000. How often those are seen that it allows is printed: the more, the
/// closer were threads to each other.
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
