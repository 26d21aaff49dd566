//! Integer work: sorting, tables, hashes, compression, an interpreter, calls.

use std::hint::black_box;

use crate::{Numbers, Program, WRONG, fold};

/// The group's programs.
pub const PROGRAMS: &[Program] = &[
    Program { name: "sort", run: sort, result: Some(0xbe5e_fb7b_3556_9a40) },
    Program { name: "sieve", run: sieve, result: Some(1_031_130) },
    Program { name: "crc32", run: crc32, result: Some(0x2238_3367) },
    Program { name: "sha256", run: sha256, result: Some(0xd667_ee5f_56bf_af82) },
    Program { name: "lz", run: lz, result: Some(0xd163_f7f9_a2a7_652d) },
    Program { name: "bytecode", run: bytecode, result: Some(0x8613_5557_b6ed_5e4f) },
    Program { name: "calls", run: calls, result: Some(9_227_465) },
    Program { name: "search", run: search, result: Some(0x14_e5e0) },
];

/// Quicksort of 300,000 numbers.
fn sort() -> Option<u64> {
    let mut numbers = Numbers(1);
    let mut v: Vec<u32> = (0..3_000_000).map(|_| numbers.next() as u32).collect();
    v.sort_unstable();
    v.is_sorted().then(|| v.iter().step_by(10_000).fold(0, |s, &n| fold(s, n.into()))).or(WRONG)
}

/// The primes below 16 million.
fn sieve() -> Option<u64> {
    const N: usize = 16_000_000;
    let mut composite = vec![false; N];
    let mut count = 0;
    for i in 2..N {
        if !composite[i] {
            count += 1;
            (i * i..N).step_by(i).for_each(|j| composite[j] = true);
        }
    }
    Some(count)
}

/// CRC-32 of 16 MiB by a table, a byte at a time.
fn crc32() -> Option<u64> {
    let mut table = [0u32; 256];
    for (i, entry) in table.iter_mut().enumerate() {
        *entry = (0..8).fold(i as u32, |c, _| if c & 1 != 0 { 0xedb8_8320 ^ c >> 1 } else { c >> 1 });
    }
    let bytes: Vec<u8> = (0..1u32 << 20).map(|i| (i.wrapping_mul(0x9e37_79b1) >> 24) as u8).collect();
    let mut crc = !0;
    for _ in 0..16 {
        for &b in black_box(&bytes) {
            crc = table[usize::from(crc as u8 ^ b)] ^ crc >> 8;
        }
    }
    Some(u64::from(!crc))
}

/// SHA-256 (FIPS 180-4) of 12 MiB, by the standard's own steps.
pub fn sha256() -> Option<u64> {
    const ROUNDS: usize = 64;
    let primes = (2u32..).filter(|n| (2..*n).take_while(|d| d * d <= *n).all(|d| n % d != 0));
    // The first 32 bits of the fractional parts of roots of primes.
    let fraction = |root: f64| ((root - root.floor()) * 4_294_967_296.0) as u32;
    let k: Vec<u32> = primes.clone().take(ROUNDS).map(|p| fraction(f64::from(p).cbrt())).collect();
    let mut h: Vec<u32> = primes.take(8).map(|p| fraction(f64::from(p).sqrt())).collect();
    let mut block = [0u8; 64];
    for n in 0..(12u32 << 20) / 64 {
        for (i, b) in block.iter_mut().enumerate() {
            *b = (n.wrapping_mul(31).wrapping_add(i as u32 * 7)) as u8;
        }
        let mut w = [0u32; ROUNDS];
        for (word, bytes) in w.iter_mut().zip(block.as_chunks::<4>().0) {
            *word = u32::from_be_bytes(*bytes);
        }
        for i in 16..ROUNDS {
            let s0 = w[i - 15].rotate_right(7) ^ w[i - 15].rotate_right(18) ^ w[i - 15] >> 3;
            let s1 = w[i - 2].rotate_right(17) ^ w[i - 2].rotate_right(19) ^ w[i - 2] >> 10;
            w[i] = w[i - 16].wrapping_add(s0).wrapping_add(w[i - 7]).wrapping_add(s1);
        }
        let mut s = [h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7]];
        for i in 0..ROUNDS {
            let [a, b, c, d, e, f, g, last] = s;
            let s1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
            let t1 = last.wrapping_add(s1).wrapping_add(e & f ^ !e & g).wrapping_add(k[i]).wrapping_add(w[i]);
            let s0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
            let t2 = s0.wrapping_add(a & b ^ a & c ^ b & c);
            s = [t1.wrapping_add(t2), a, b, c, d.wrapping_add(t1), e, f, g];
        }
        h.iter_mut().zip(s).for_each(|(h, s)| *h = h.wrapping_add(s));
    }
    Some(h.iter().fold(0, |sum, &word| fold(sum, word.into())))
}

/// Text with repetitions, compressed by a Lempel-Ziv scheme with a hash of three bytes, and expanded again.
pub fn lz() -> Option<u64> {
    let words: Vec<&[u8]> = vec![b"the ", b"guest ", b"runs ", b"on ", b"a ", b"host ", b"of ", b"another ", b"kind, "];
    let mut numbers = Numbers(7);
    let mut text = Vec::new();
    while text.len() < 4 << 20 {
        let n = numbers.next();
        text.extend_from_slice(words[n as usize % words.len()]);
        if n >> 60 == 0 {
            text.push((n >> 32) as u8);
        }
    }
    let packed = pack(&text);
    (unpack(&packed) == text).then(|| packed.iter().fold(packed.len() as u64, |s, &b| fold(s, b.into()))).or(WRONG)
}

/// A control byte N: N literals follow, or, if it is 0, a match's length and distance.
fn pack(text: &[u8]) -> Vec<u8> {
    const SLOTS: usize = 1 << 14;
    let mut last = vec![usize::MAX; SLOTS];
    let mut out = Vec::with_capacity(text.len() / 2);
    let literals = |out: &mut Vec<u8>, bytes: &[u8]| {
        for run in bytes.chunks(255) {
            out.push(run.len() as u8);
            out.extend_from_slice(run);
        }
    };
    let (mut at, mut written) = (0, 0);
    while at + 4 <= text.len() {
        let word = u32::from_le_bytes([text[at], text[at + 1], text[at + 2], text[at + 3]]);
        let slot = (word.wrapping_mul(0x9e37_79b1) >> 18) as usize;
        let before = std::mem::replace(&mut last[slot], at);
        if before != usize::MAX && at - before <= 0xffff {
            let distance = at - before;
            let len = text[before..].iter().zip(&text[at..]).take(255).take_while(|(a, b)| a == b).count();
            if len >= 5 {
                literals(&mut out, &text[written..at]);
                out.extend([0, len as u8, distance as u8, (distance >> 8) as u8]);
                at += len;
                written = at;
                continue;
            }
        }
        at += 1;
    }
    literals(&mut out, &text[written..]);
    out
}

fn unpack(packed: &[u8]) -> Vec<u8> {
    let mut out: Vec<u8> = Vec::new();
    let mut rest = packed;
    while let [control, tail @ ..] = rest {
        rest = match (control, tail) {
            (0, [len, low, high, tail @ ..]) => {
                let distance = usize::from(*low) | usize::from(*high) << 8;
                for _ in 0..*len {
                    out.push(out[out.len() - distance]);
                }
                tail
            }
            (n, tail) => {
                let (run, tail) = tail.split_at(usize::from(*n).min(tail.len()));
                out.extend_from_slice(run);
                tail
            }
        };
    }
    out
}

/// A register machine whose program finds the longest Collatz chain below 60,000: one indirect branch an instruction.
fn bytecode() -> Option<u64> {
    #[derive(Clone, Copy)]
    enum Op {
        Set(u8, i64),
        Copy(u8, u8),
        Add(u8, i64),
        Half(u8),
        TripleAndOne(u8),
        JumpIfOdd(u8, usize),
        JumpIfAtLeast(u8, u8, usize),
        JumpIfMore(u8, i64, usize),
        Jump(usize),
        Stop,
    }
    use Op::*;
    // r0: start, r1: number, r2: length, r3: longest, r4: its start.
    let program = black_box([
        Set(0, 1),
        Copy(1, 0), // 1: the next start
        Set(2, 0),
        JumpIfMore(1, 1, 10), // 3: the next number
        JumpIfAtLeast(3, 2, 7),
        Copy(3, 2),
        Copy(4, 0),
        Add(0, 1), // 7: not longer
        JumpIfMore(0, 59_999, 16),
        Jump(1),
        Add(2, 1), // 10: the chain goes on
        JumpIfOdd(1, 14),
        Half(1),
        Jump(3),
        TripleAndOne(1), // 14
        Jump(3),
        Stop, // 16
    ]);
    let mut r = [0i64; 5];
    let (mut pc, mut steps) = (0, 0u64);
    loop {
        steps += 1;
        let op = program[pc];
        pc += 1;
        match op {
            Set(a, v) => r[usize::from(a)] = v,
            Copy(a, b) => r[usize::from(a)] = r[usize::from(b)],
            Add(a, v) => r[usize::from(a)] += v,
            Half(a) => r[usize::from(a)] >>= 1,
            TripleAndOne(a) => r[usize::from(a)] = 3 * r[usize::from(a)] + 1,
            JumpIfOdd(a, to) if r[usize::from(a)] & 1 != 0 => pc = to,
            JumpIfAtLeast(a, b, to) if r[usize::from(a)] >= r[usize::from(b)] => pc = to,
            JumpIfMore(a, v, to) if r[usize::from(a)] > v => pc = to,
            Jump(to) => pc = to,
            Stop => return Some(fold(steps, (r[3] as u64) << 32 | r[4] as u64)),
            _ => {}
        }
    }
}

/// Fibonacci's numbers by their definition: nothing but calls and returns.
pub fn calls() -> Option<u64> {
    #[inline(never)]
    fn fibonacci(n: u64) -> u64 {
        if n < 2 { n } else { fibonacci(black_box(n - 1)) + fibonacci(black_box(n - 2)) }
    }
    Some(fibonacci(35))
}

/// A rare word in 64 MiB of text, by the library's search.
fn search() -> Option<u64> {
    let mut text = "the quick brown fox jumps over the lazy dog, and ".repeat((64 << 20) / 49);
    let end = text.len();
    text.push_str("needle");
    (black_box(&text).find("needle") == Some(end)).then(|| text.matches("lazy dog, a").count() as u64).or(WRONG)
}
