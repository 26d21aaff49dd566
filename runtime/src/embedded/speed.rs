//! How fast the guest runs: two loops of a known number of instructions, timed by the time-stamp counter.
//!
//! A loop is run in passes that all begin alike, so that the host has to compute the result of only one of them.

use iced_x86::code_asm::*;

use super::builder::{Builder, Emit};
use super::layout;

const PASSES: u32 = 100;
const ROUNDS: u32 = 100_000;

/// Instructions in a round, with the two that count it.
const INTEGER_ROUND: u32 = 9;
const SSE_ROUND: u32 = 6;

const MULTIPLIER: u64 = 6_364_136_223_846_793_005;
/// Words of the table that the integer loop reads and writes.
const WORDS: usize = 512;
const FACTOR: f64 = 3.75;
const SEEDS: [f64; 2] = [0.5, 0.4];

/// Both.
pub(super) fn report(b: &mut Builder) -> Emit {
    b.check("timed integer loop: arithmetic and memory", |b| {
        timed(b, INTEGER_ROUND, integer_start, integer_round, |b| b.expect(integer_result()))
    })?;
    say_speed(b, "integer loop: ")?;
    b.check("timed SSE2 loop: packed doubles", |b| {
        timed(b, SSE_ROUND, sse_start, sse_round, |b| {
            let [low, high] = sse_result();
            b.a.movq(rax, xmm0)?;
            b.expect(low)?;
            b.a.unpckhpd(xmm0, xmm0)?;
            b.a.movq(rax, xmm0)?;
            b.expect(high)
        })
    })?;
    say_speed(b, "SSE2 loop: ")
}

/// Runs and times the passes: R12 = millions of instructions per second. RCX counts the rounds of a pass.
fn timed(
    b: &mut Builder,
    instructions: u32,
    start: impl FnOnce(&mut Builder) -> Emit,
    round: impl FnOnce(&mut Builder) -> Emit,
    verify: impl FnOnce(&mut Builder) -> Emit,
) -> Emit {
    b.time()?;
    b.a.mov(r12, rax)?;
    b.repeat(r13d, PASSES, |b| {
        start(b)?;
        b.repeat(ecx, ROUNDS, round)?;
        verify(b)
    })?;
    b.time()?;
    b.a.sub(rax, r12)?;
    b.a.lea(rcx, ptr(rax + 1))?;
    // Instructions × ticks a second / ticks, in millions; the product has 128 bits, of which few are used.
    b.a.mov(rax, u64::from(PASSES) * u64::from(ROUNDS) * u64::from(instructions) / 1_000_000)?;
    b.a.mul(qword_ptr(b.var.tsc_hz))?;
    b.a.div(rcx)?;
    b.a.mov(r12, rax)
}

fn say_speed(b: &mut Builder, name: &str) -> Emit {
    b.say(&format!("       {name}"))?;
    b.a.mov(rax, r12)?;
    b.a.call(b.call.decimal)?;
    b.say(" million instructions per second\r\n")
}

fn integer_start(b: &mut Builder) -> Emit {
    b.a.mov(rdi, layout::WORDS)?;
    b.a.mov(rsi, rdi)?;
    b.a.mov(ecx, WORDS as u32)?;
    b.a.mov(rbx, MULTIPLIER)?;
    b.a.mov(rax, rbx)?;
    b.a.rep().stosq()
}

fn integer_round(b: &mut Builder) -> Emit {
    b.a.imul_2(rax, rbx)?;
    b.a.add(rax, rcx)?;
    b.a.rol(rax, 7)?;
    b.a.mov(edx, eax)?;
    b.a.and(edx, WORDS as i32 - 1)?;
    b.a.xor(rax, qword_ptr(rsi + rdx * 8))?;
    b.a.mov(qword_ptr(rsi + rdx * 8), rax)
}

fn integer_result() -> u64 {
    let mut table = [MULTIPLIER; WORDS];
    (1..=u64::from(ROUNDS)).rev().fold(MULTIPLIER, |x, n| {
        let x = x.wrapping_mul(MULTIPLIER).wrapping_add(n).rotate_left(7);
        let word = &mut table[x as usize % WORDS];
        *word ^= x;
        *word
    })
}

/// The logistic map, which is chaotic: one wrong bit anywhere changes the result.
fn sse_start(b: &mut Builder) -> Emit {
    let [seeds, ones, factors] = [SEEDS, [1.0; 2], [FACTOR; 2]].map(|pair| b.data.words(&pair.map(f64::to_bits)));
    b.a.movapd(xmm0, xmmword_ptr(seeds))?;
    b.a.movapd(xmm1, xmmword_ptr(ones))?;
    b.a.movapd(xmm2, xmmword_ptr(factors))
}

fn sse_round(b: &mut Builder) -> Emit {
    b.a.movapd(xmm3, xmm1)?;
    b.a.subpd(xmm3, xmm0)?;
    b.a.mulpd(xmm0, xmm2)?;
    b.a.mulpd(xmm0, xmm3)
}

fn sse_result() -> [u64; 2] {
    SEEDS.map(|seed| (0..ROUNDS).fold(seed, |x, _| x * FACTOR * (1.0 - x)).to_bits())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The instructions counted are those emitted, with the DEC and JNE of `repeat`.
    #[test]
    fn rounds_have_the_instructions_that_are_counted() {
        let count = |round: fn(&mut Builder) -> Emit| {
            let mut b = Builder::new().expect("a 64-bit assembler");
            round(&mut b).expect("a round");
            b.a.instructions().len() as u32 + 2
        };
        assert_eq!((count(integer_round), count(sse_round)), (INTEGER_ROUND, SSE_ROUND));
    }
}
