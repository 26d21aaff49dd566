//! The interpreter, the compiler and the host's processor side by side.

use super::Machine;
use super::engine::{Engine, Kind};
use super::native::Native;
use super::outcome::{Case, compare, normal};

/// All of them, the engines for code of 32 and for code of 64 bits.
pub(crate) struct Bench {
    /// Where this one can serve; without it the engines are compared with one another.
    host: Option<Native>,
    engines: [[Engine; 3]; 2],
}

impl Bench {
    /// Says so where the processor cannot serve.
    pub(crate) fn new() -> Bench {
        Bench { host: Native::take(), engines: [32, 64].map(|bits| Kind::ALL.map(|kind| Engine::new(kind, bits))) }
    }

    /// Runs code of 32 or 64 bits from each state. The processor says what is right, but the engines must agree in what
    /// is undefined, too. Says for each case where it faulted, if it did, or describes the
    /// first difference.
    pub(crate) fn check(&mut self, bits: u32, code: &[u8], cases: &[Case]) -> Result<Vec<Option<u64>>, String> {
        if cases.is_empty() {
            return Ok(Vec::new());
        }
        let [interpreter, compilers @ ..] = &mut self.engines[usize::from(bits == 64)];
        let mut faults = Vec::new();
        let warm: Vec<Machine> = cases.iter().take(3).map(|c| c.before.clone()).collect();
        if let Some(host) = &mut self.host {
            host.load(bits, code);
        }
        interpreter.load(code, &[])?;
        for compiler in &mut *compilers {
            compiler.load(code, &warm)?;
        }
        for case in cases {
            let before = &case.before;
            let interpreted = interpreter.run(before)?;
            let expected = match &mut self.host {
                Some(host) => host.run(before),
                None => interpreted.clone(),
            };
            faults.push(expected.fault.map(|_| expected.rip));
            for (compiler, name) in compilers.iter_mut().zip(["quick", "compiled"]) {
                let compiled = compiler.run(before)?;
                let same = [&interpreted, &compiled].map(|m| normal(m.clone(), 0, true, bits));
                compare(before, "interpreted", name, &same[0], &same[1])?;
            }
            let [expected, interpreted] = [expected, interpreted].map(|m| case.settled(bits, code, m));
            compare(before, "processor", "interpreted", &expected, &interpreted)?;
        }
        Ok(faults)
    }
}

#[cfg(test)]
impl Bench {
    /// Runs code of 32 or 64 bits from each state on the engines alone, of which processors that differ in what they do
    /// there are no judges.
    pub(crate) fn agree(&mut self, bits: u32, code: &[u8], states: &[Machine]) -> Result<(), String> {
        let [interpreter, compilers @ ..] = &mut self.engines[usize::from(bits == 64)];
        interpreter.load(code, &[])?;
        for compiler in &mut *compilers {
            compiler.load(code, &states[..states.len().min(3)])?;
        }
        for before in states {
            let interpreted = normal(interpreter.run(before)?, 0, true, bits);
            for (compiler, name) in compilers.iter_mut().zip(["quick", "compiled"]) {
                let compiled = normal(compiler.run(before)?, 0, true, bits);
                compare(before, "interpreted", name, &interpreted, &compiled)?;
            }
        }
        Ok(())
    }
}
