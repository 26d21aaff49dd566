//! Shrinks a failure: takes away what it does not need, then makes what is left simpler.

use iced_x86::{Encoder, InstructionInfoFactory, OpKind, Register};

use super::program::{Assembled, Part, Program, Step};
use super::{Fpu, Machine, Segments, sequences};

/// A program that fails, and the states that it is run from.
#[derive(Clone)]
pub(crate) struct Failure {
    pub program: Program,
    pub states: Vec<Machine>,
}

/// The smallest failure that can be reached from `failure` by single simplifications each of which still `fails`.
pub(crate) fn shrink(mut failure: Failure, mut fails: impl FnMut(&Failure) -> bool) -> Failure {
    loop {
        let mut found = false;
        let mut n = 0;
        while let Some(simpler) = simpler(&failure).into_iter().nth(n) {
            if fails(&simpler) {
                // The next one of what is left has the same number now.
                failure = simpler;
                found = true;
            } else {
                n += 1;
            }
        }
        if !found {
            return failure;
        }
    }
}

/// What is one simplification away. Each has less of something and more of nothing, so that shrinking ends.
fn simpler(f: &Failure) -> Vec<Failure> {
    let mut all = Vec::new();
    if f.states.len() > 1 {
        all.extend((0..f.states.len()).map(|n| Failure { states: vec![f.states[n].clone()], ..f.clone() }));
    }
    let programs = without_loop(&f.program).into_iter().chain(shorter(&f.program)).chain(plainer(&f.program));
    all.extend(programs.map(|program| Failure { program, ..f.clone() }));
    for (n, state) in f.states.iter().enumerate() {
        all.extend(tamer(state).into_iter().map(|tame| {
            let mut f = f.clone();
            f.states[n] = tame;
            f
        }));
    }
    all
}

fn without_loop(p: &Program) -> Vec<Program> {
    let fewer: &[Option<u8>] = match p.rounds {
        None => &[],
        Some(0..=1) => &[None],
        Some(2) => &[None, Some(1)],
        Some(_) => &[None, Some(1), Some(2)],
    };
    fewer.iter().map(|&rounds| Program { rounds, ..p.clone() }).collect()
}

/// Without a run of steps, a branch, or a part that a branch is over.
fn shorter(p: &Program) -> Vec<Program> {
    let with = |range: std::ops::Range<usize>, steps: Vec<Step>| {
        let mut p = p.clone();
        p.steps.splice(range, steps);
        p
    };
    let mut all = Vec::new();
    let len = p.steps.len();
    for size in [len / 2, len / 4, 1] {
        let starts = (0..len).step_by(size.max(1)).filter(|_| size > 0);
        all.extend(starts.map(|at| with(at..len.min(at + size), Vec::new())));
    }
    for (n, step) in p.steps.iter().enumerate() {
        let (Step::Branch(_, over) | Step::Call(_, over)) = step else { continue };
        all.push(with(n..n + 1, over.iter().cloned().map(Step::Part).collect()));
        all.extend((0..over.len()).map(|k| {
            let mut over = over.clone();
            over.remove(k);
            with(n..n + 1, vec![step.with(over)])
        }));
    }
    all
}

/// With one instruction that has a lower register or a smaller immediate.
fn plainer(p: &Program) -> Vec<Program> {
    let mut all = Vec::new();
    for (n, step) in p.steps.iter().enumerate() {
        for (k, part) in step.parts().iter().enumerate() {
            all.extend(plainer_part(part).into_iter().map(|plain| {
                let mut p = p.clone();
                match &mut p.steps[n] {
                    Step::Part(part) => *part = plain,
                    Step::Branch(_, over) | Step::Call(_, over) => over[k] = plain,
                }
                p
            }));
        }
    }
    all
}

fn plainer_part(part: &Part) -> Vec<Part> {
    let whole = Assembled::new(part.bits, part.code.clone());
    let mut instructions = whole.instructions();
    let (Some((i, _)), None) = (instructions.next(), instructions.next()) else { return Vec::new() };
    let mut all = Vec::new();
    for n in 0..i.op_count() {
        if i.op_kind(n) == OpKind::Register {
            let r = i.op_register(n);
            let first = [
                (Register::AX, r.is_gpr16()),
                (Register::EAX, r.is_gpr32()),
                (Register::RAX, r.is_gpr64()),
                (Register::XMM0, r.is_xmm()),
                (Register::YMM0, r.is_ymm()),
            ];
            let Some((first, _)) = first.into_iter().find(|(_, of)| *of) else { continue };
            for number in 0..r.number().min(3) as u32 {
                let mut i = i;
                i.set_op_register(n, first + number);
                all.push(i);
            }
        } else if i.op_kind(n) as u32 >= OpKind::Immediate8 as u32
            && i.op_kind(n) as u32 <= OpKind::Immediate32to64 as u32
        {
            for value in (0..2).filter(|&v| v < i.immediate(n)) {
                let mut i = i;
                i.set_immediate_u64(n, value);
                all.push(i);
            }
        }
    }
    let mut info = InstructionInfoFactory::new();
    all.iter()
        .filter_map(|i| {
            let mut encoder = Encoder::new(part.bits);
            encoder.encode(i, 0).ok()?;
            let code = encoder.take_buffer();
            let plain = Assembled::new(part.bits, code);
            // Its meaning is that of the bytes, which may have another form; it has to be allowed in a program.
            let (i, bytes) = plain.instructions().next()?;
            sequences::part(bytes, &i, &mut info, part.bits)
        })
        .collect()
}

/// With zeros, or what is there after a reset, in one place.
fn tamer(state: &Machine) -> Vec<Machine> {
    let mut all = Vec::new();
    let mut push = |change: &dyn Fn(&mut Machine)| {
        let mut tame = state.clone();
        change(&mut tame);
        if tame != *state {
            all.push(tame);
        }
    };
    push(&|m| m.data.fill(0));
    push(&|m| m.ymm = [[0; 4]; 16]);
    push(&|m| m.fpu = Fpu { control: 0x37f, status: 0, tags: 0, st: [[0; 10]; 8] });
    push(&|m| m.segments = Segments::default());
    push(&|m| m.mxcsr = 0x1f80);
    push(&|m| m.flags = 0x202);
    for n in 0..16 {
        push(&|m| m.ymm[n] = [0; 4]);
        if !sequences::POINTERS.contains(&n) {
            push(&|m| m.gpr[n] = 0);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use iced_x86::Mnemonic;

    use super::*;
    use crate::testing::Random;

    /// A mismatch is made up: it takes an ADD and behind it an ADC of registers, RDX odd, at whatever distance.
    #[test]
    fn what_a_failure_does_not_need_is_taken_away() {
        let parts = sequences::parts(&mut Random::new(1), 64);
        let mut shrunk = 0;
        let fails = |f: &Failure| {
            let a = f.program.assemble();
            let names: Vec<_> = a.instructions().map(|(i, _)| (i.mnemonic(), i.op1_kind())).collect();
            let add = names.iter().position(|n| n.0 == Mnemonic::Add);
            let adc = names.iter().rposition(|n| *n == (Mnemonic::Adc, OpKind::Register));
            add.is_some() && add < adc && f.states.iter().any(|m| m.gpr[2] & 1 != 0)
        };
        for n in 0..4000 {
            let mut r = Random::new(n);
            let program = sequences::program(&mut r, &parts);
            let states = (0..8).map(|_| sequences::state(&mut r, &program)).collect();
            let failure = Failure { program, states };
            if !fails(&failure) {
                continue;
            }
            let small = shrink(failure, fails);
            let listing = small.program.assemble().listing();
            assert_eq!(small.program.rounds, None, "{listing}");
            let [Step::Part(add), Step::Part(adc)] = &small.program.steps[..] else { panic!("{n}:\n{listing}") };
            assert!(plainer_part(adc).is_empty() && add.undefines == 0, "{listing}");
            let [state] = &small.states[..] else { panic!("{n}: {} states", small.states.len()) };
            let used: Vec<_> = (0..16).filter(|k| state.gpr[*k] != 0 && !sequences::POINTERS.contains(k)).collect();
            assert_eq!(used, [2], "{listing}");
            assert_eq!((state.flags, state.ymm), (0x202, [[0; 4]; 16]));
            shrunk += 1;
            if shrunk == 10 {
                return;
            }
        }
        panic!("only {shrunk} of all programs fail");
    }
}
