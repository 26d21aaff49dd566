//! What an x86-64 processor does, as hashes that it has recorded for hosts which are none: every instruction that every.rs
//! walks, in its forms, from states that follow from its name alone.
//!
//! [`TEXT`] has a line for each code: its name, two hashes for 64-bit code, and two for 32-bit code. A hash is of the
//! outcomes of all cases of the code's forms without a memory operand, or with one: registers, defined flags, memory, MXCSR,
//! x87 state, and the fault with its error code and address. A dash stands for no forms. A hash has 32 bits: an outcome that
//! is wrong goes unseen once in four thousand million times.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::engine::{Engine, Kind};
use super::outcome::Case;
use super::{Machine, Random, every};

#[cfg(target_arch = "x86_64")]
mod recorder;
#[cfg(test)]
mod tests;

#[cfg(target_arch = "x86_64")]
pub use recorder::{Recording, record};

/// What has been recorded.
pub const TEXT: &str = include_str!("record/recorded.txt");

/// Who says what the outcomes of a group of forms are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    /// The processor that recorded them; the interpreter agrees.
    Processor,
    /// The interpreter there, as the processor has no such instruction.
    Lacking,
    /// The processor in most of the cases, and the interpreter there in those in which makers differ (recorder.rs).
    Maker,
}

impl By {
    const ALL: [By; 3] = [By::Processor, By::Lacking, By::Maker];

    /// What stands behind the hash.
    fn mark(self) -> &'static str {
        match self {
            By::Processor => "",
            By::Lacking => "?",
            By::Maker => "*",
        }
    }
}

/// The outcomes of a group of forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Recorded {
    hash: u32,
    by: By,
}

/// By the code's name, the forms in 64-bit code and in 32-bit code, those without memory operands and those with them.
type Table = BTreeMap<String, [[Option<Recorded>; 2]; 2]>;

/// Reads [`TEXT`] or its like.
fn parse(text: &str) -> Result<Table, String> {
    let mut table = Table::new();
    for line in text.lines().filter(|l| !l.starts_with('#')) {
        let wrong = || format!("not a line of recorded outcomes: {line}");
        let words: Vec<&str> = line.split(' ').collect();
        let [name, hashes @ ..] = &words[..] else { return Err(wrong()) };
        let hashes = hashes.iter().map(|w| read(w)).collect::<Option<Vec<_>>>().ok_or_else(wrong)?;
        let &[a, b, c, d] = &hashes[..] else { return Err(wrong()) };
        table.insert((*name).into(), [[a, b], [c, d]]);
    }
    Ok(table)
}

/// A hash with its mark, or that there is none; `None` if it is neither.
fn read(word: &str) -> Option<Option<Recorded>> {
    if word == "-" {
        return Some(None);
    }
    let by = By::ALL.into_iter().rev().find(|by| word.ends_with(by.mark()))?;
    let hash = u32::from_str_radix(word.strip_suffix(by.mark())?, 16).ok()?;
    Some(Some(Recorded { hash, by }))
}

/// What [`parse`] reads.
fn print(table: &Table) -> String {
    let word = |r: &Option<Recorded>| r.map_or("-".into(), |r| format!("{:08x}{}", r.hash, r.by.mark()));
    let line = |(name, groups): (&String, &[[Option<Recorded>; 2]; 2])| {
        let words: Vec<String> = groups.as_flattened().iter().map(word).collect();
        format!("{name} {}\n", words.join(" "))
    };
    table.iter().map(line).collect()
}

/// One form of an instruction.
struct Form {
    bits: u32,
    /// Of its code.
    name: String,
    /// Among the code's forms.
    number: usize,
    code: Vec<u8>,
    instruction: Instruction,
}

impl Form {
    /// Where a [`Table`] has it.
    fn group(&self) -> (usize, usize) {
        let memory = (0..self.instruction.op_count()).any(|n| {
            let kind = self.instruction.op_kind(n);
            kind == OpKind::Memory || kind >= OpKind::MemorySegSI && kind <= OpKind::MemoryESRDI
        });
        (usize::from(self.bits == 32), usize::from(memory))
    }

    /// Of the case with a number.
    fn seed(&self, case: u64) -> u64 {
        let mut d = Digest::default();
        d.bytes(self.name.as_bytes());
        [self.bits.into(), self.number as u64, case].into_iter().for_each(|w| d.word(w));
        d.0
    }

    /// Everything that it is run from, each with its seed.
    fn cases(&self) -> Vec<(u64, Case)> {
        let seeds = (0..every::worth(&self.instruction, self.bits)).map(|n| self.seed(n));
        let case = |seed| every::case(&mut Random::new(seed), &self.instruction, self.bits);
        let defined = |case: &Case| !is_outside_domain(&self.instruction, &case.before);
        seeds.filter_map(|seed| Some((seed, case(seed).filter(defined)?))).collect()
    }

    /// What of an outcome is recorded.
    fn settled(&self, case: &Case, after: Machine) -> Machine {
        let mut after = case.settled(self.bits, &self.code, after);
        if after.fault.is_none() {
            blur(&self.instruction, &mut after);
        }
        after
    }

    /// The settled outcomes of an engine.
    fn run(&self, engine: &mut Engine, cases: &[(u64, Case)]) -> Result<Vec<Machine>, String> {
        if cases.is_empty() {
            return Ok(Vec::new());
        }
        let warm: Vec<Machine> = cases.iter().take(3).map(|(_, c)| c.before.clone()).collect();
        engine.load(&self.code, &warm)?;
        cases.iter().map(|(_, c)| Ok(self.settled(c, engine.run(&c.before)?))).collect()
    }
}

/// Of forms with a prefix that only changes where the operand is, or nothing, one in so many is run, and one that is a code's first.
const PREFIXED: u64 = 8;

/// Calls `f` with every form that can run in 32- or 64-bit code, once, but of those with prefixes with some.
fn each(bits: u32, mut f: impl FnMut(&Form)) {
    let mut seen = BTreeMap::<String, Vec<Vec<u8>>>::new();
    every::each(&mut Random::new(0), bits, |_, code, &instruction| {
        let name = format!("{:?}", instruction.code());
        let forms = seen.entry(name.clone()).or_default();
        if forms.iter().any(|known| known == code) {
            return;
        }
        forms.push(code.to_vec());
        let form = Form { bits, name, number: forms.len() - 1, code: code.to_vec(), instruction };
        let prefixed = matches!(code[0], 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0x67);
        if !prefixed || form.number == 0 || form.seed(0).is_multiple_of(PREFIXED) {
            f(&form);
        }
    });
}

/// Whether the operand is outside the domain of F2XM1 or FYL2XP1, where there is no right result (SDM vol. 2).
fn is_outside_domain(i: &Instruction, before: &Machine) -> bool {
    let [.., low, high] = before.fpu.st[0];
    let exponent = u16::from_le_bytes([low, high]) & 0x7fff;
    match i.mnemonic() {
        Mnemonic::F2xm1 => (0x3fff..0x7fff).contains(&exponent),
        Mnemonic::Fyl2xp1 => (0x3ffd..0x7fff).contains(&exponent),
        _ => false,
    }
}

/// Takes away the bits of a result that are an approximation, which is the processor's own (SDM vol. 1 §5.5.3 and §8.3.10,
/// vol. 2 RCPPS): what class of number it is remains.
fn blur(i: &Instruction, after: &mut Machine) {
    use Mnemonic::*;
    match i.mnemonic() {
        Rcpps | Vrcpps | Rsqrtps | Vrsqrtps | Rcpss | Vrcpss | Rsqrtss | Vrsqrtss => {
            let scalar = matches!(i.mnemonic(), Rcpss | Vrcpss | Rsqrtss | Vrsqrtss);
            let single = |x: u64| match x & 0x7fff_ffff {
                1..0x7f80_0000 => x & 0x8000_0000 | 1,
                _ => x,
            };
            let result = &mut after.ymm[i.op0_register().number() & 15];
            for (n, word) in result.iter_mut().enumerate() {
                *word = match n {
                    0 if scalar => single(*word & 0xffff_ffff) | *word >> 32 << 32,
                    _ if scalar => *word,
                    _ => single(*word & 0xffff_ffff) | single(*word >> 32) << 32,
                };
            }
        }
        // Which of several NaNs a sum of products is depends on the order of the additions.
        Dpps | Vdpps | Dppd | Vdppd => {
            let double = matches!(i.mnemonic(), Dppd | Vdppd);
            for word in &mut after.ymm[i.op0_register().number() & 15] {
                let single = |x: u64| if x & 0x7fff_ffff > 0x7f80_0000 { 0x7fc0_0000 } else { x };
                *word = match *word & (u64::MAX >> 1) {
                    _ if !double => single(*word & 0xffff_ffff) | single(*word >> 32) << 32,
                    0x7ff0_0000_0000_0001.. => 0x7ff8_0000_0000_0000,
                    _ => *word,
                };
            }
        }
        F2xm1 | Fyl2x | Fyl2xp1 | Fptan | Fpatan | Fsin | Fcos | Fsincos => {
            // C1 says which way the result was rounded.
            after.fpu.status &= !0x200;
            let results = if matches!(i.mnemonic(), Fptan | Fsincos) { 2 } else { 1 };
            for st in &mut after.fpu.st[..results] {
                let special = st[8] == 0xff && st[9] & 0x7f == 0x7f || st[..8] == [0; 8];
                if !special {
                    st[..9].fill(1);
                    st[9] &= 0x80;
                }
            }
        }
        _ => {}
    }
}

/// A hash, a word at a time.
#[derive(Clone, Copy, Debug)]
struct Digest(u64);

impl Default for Digest {
    fn default() -> Digest {
        Digest(0x9ae1_6a3b_2f90_404f)
    }
}

impl Digest {
    fn word(&mut self, word: u64) {
        let x = (self.0 ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = x ^ x >> 29;
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.word(bytes.len() as u64);
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.word(u64::from_le_bytes(word));
        }
    }

    fn machine(&mut self, m: &Machine) {
        let Machine { gpr, flags, rip, fault, ymm, mxcsr, fpu, segments, data } = m;
        let fault = fault.map_or([u64::MAX; 3], |f| [f.vector.into(), f.error.into(), f.address]);
        let unit = [fpu.control, fpu.status, fpu.tags.into()].map(u64::from);
        let bases = [segments.fs_base, segments.gs_base];
        let words = gpr.iter().chain(ymm.as_flattened()).copied().chain([*flags, *rip, u64::from(*mxcsr)]);
        words.chain(fault).chain(unit).chain(bases).for_each(|w| self.word(w));
        segments.selectors.iter().for_each(|&s| self.word(s.into()));
        self.bytes(fpu.st.as_flattened());
        self.bytes(data);
    }
}

/// The hash of a group of forms.
#[derive(Clone, Copy, Debug, Default)]
struct Outcomes(Digest);

impl Outcomes {
    fn add(&mut self, outcomes: &[Machine]) {
        outcomes.iter().for_each(|m| self.0.machine(m));
    }

    fn hash(&self) -> u32 {
        (self.0.0 ^ self.0.0 >> 32) as u32
    }
}

/// What a replay has found.
#[derive(Debug, Default)]
pub struct Replay {
    /// Codes, and their forms.
    pub codes: usize,
    /// How they are encoded.
    pub forms: usize,
    /// Runs of a form from a state, each on every engine that this host has.
    pub cases: usize,
    /// One line each.
    pub mismatches: Vec<String>,
}

/// A group of forms as it is replayed.
#[derive(Default)]
struct Group {
    /// On each engine.
    outcomes: [Outcomes; 3],
    /// Its first form and case, and the first of an engine that is otherwise interpreted.
    first: String,
    odd: [Option<String>; 3],
}

/// Runs what has been recorded of 32- or 64-bit code on the engines of this host.
pub fn replay(bits: u32) -> Result<Replay, String> {
    let mut table = parse(TEXT)?;
    let mut engines = Kind::ALL.map(|kind| Engine::new(kind, bits));
    let mut replay = Replay::default();
    let mut groups = BTreeMap::<(String, (usize, usize)), Group>::new();
    each(bits, |form| {
        let cases = form.cases();
        replay.forms += 1;
        replay.cases += cases.len();
        let group = groups.entry((form.name.clone(), form.group())).or_default();
        let which = |n: usize| {
            let seed = cases.get(n).map_or(0, |(seed, _)| *seed);
            format!("{} ({:02x?}), case {seed:#x}", form.instruction, form.code)
        };
        if group.first.is_empty() {
            group.first = which(0);
        }
        let mut interpreted = Vec::new();
        for (n, engine) in engines.iter_mut().enumerate() {
            match form.run(engine, &cases) {
                Ok(all) => {
                    group.outcomes[n].add(&all);
                    if n == 0 {
                        interpreted = all;
                    } else if let Some(k) = all.iter().zip(&interpreted).position(|(a, b)| a != b) {
                        group.odd[n].get_or_insert_with(|| which(k));
                    }
                }
                Err(why) => replay.mismatches.push(format!("{}, {bits}-bit, {}: {why}", form.name, which(0))),
            }
        }
    });
    for ((name, place), group) in &groups {
        let recorded = table.get_mut(name).and_then(|t| t[place.0][place.1].take());
        let what = ["registers", "memory"][place.1];
        let Some(r) = recorded else {
            replay.mismatches.push(format!("{name}, {bits}-bit, {what}: nothing is recorded"));
            continue;
        };
        for (n, kind) in Kind::ALL.into_iter().enumerate() {
            if group.outcomes[n].hash() != r.hash {
                let odd = group.odd[n].as_ref().map(|odd| format!("; first otherwise than interpreted: {odd}"));
                replay.mismatches.push(format!(
                    "{name}, {bits}-bit, {what}, {kind:?}: not as {} has recorded; first case: {}{}",
                    r.by.name(),
                    group.first,
                    odd.unwrap_or_default()
                ));
            }
        }
    }
    let left = table.iter().filter(|(_, t)| t[usize::from(bits == 32)].iter().any(Option::is_some));
    replay.mismatches.extend(left.map(|(name, _)| format!("{name}, {bits}-bit: recorded, but not run")));
    replay.codes = groups.keys().map(|(name, _)| name).collect::<BTreeSet<_>>().len();
    Ok(replay)
}

impl By {
    fn name(self) -> &'static str {
        match self {
            By::Processor => "the processor",
            By::Lacking => "the interpreter",
            By::Maker => "the processor or, where makers differ, the interpreter",
        }
    }
}

/// The outcomes of all cases of a code as text, interpreted on this host: to be compared with another host's. Where this
/// host's processor can run it and does otherwise, that is said, too.
pub fn show(name: &str) -> Result<String, String> {
    let mut text = String::new();
    for bits in [64, 32] {
        let mut engine = Engine::new(Kind::Interpreter, bits);
        let mut failed = None;
        each(bits, |form| {
            if form.name == name && failed.is_none() {
                failed = show_form(form, &mut engine, &mut text).err();
            }
        });
        if let Some(why) = failed {
            return Err(why);
        }
    }
    if text.is_empty() { Err(format!("there is no code {name}")) } else { Ok(text) }
}

fn show_form(form: &Form, engine: &mut Engine, text: &mut String) -> Result<(), String> {
    let cases = form.cases();
    let outcomes = form.run(engine, &cases)?;
    let Form { bits, number, code, instruction, .. } = form;
    let _ = writeln!(text, "{bits}-bit, form {number}: {instruction} {code:02x?}");
    for ((seed, case), after) in cases.iter().zip(&outcomes) {
        let before = &case.before;
        let _ = writeln!(text, "case {seed:#x}: flags {:x}, mxcsr {:x}", before.flags, before.mxcsr);
        let mut line = |what: String, a: &dyn std::fmt::Debug, b: &dyn std::fmt::Debug, used: bool| {
            let (a, b) = (format!("{a:x?}"), format!("{b:x?}"));
            if a != b {
                let _ = writeln!(text, "  {what}: {a} -> {b}");
            } else if used {
                let _ = writeln!(text, "  {what}: {a}");
            }
        };
        let uses = |r: Register| (0..instruction.op_count()).any(|n| instruction.op_register(n).full_register() == r);
        for n in 0..16 {
            line(format!("gpr {n}"), &before.gpr[n], &after.gpr[n], uses(Register::RAX + n as u32));
            line(format!("ymm {n}"), &before.ymm[n], &after.ymm[n], uses(Register::ZMM0 + n as u32));
        }
        line("flags".into(), &before.flags, &after.flags, true);
        line("rip".into(), &before.rip, &after.rip, false);
        line("fault".into(), &before.fault, &after.fault, false);
        line("mxcsr".into(), &before.mxcsr, &after.mxcsr, true);
        line("segments".into(), &before.segments, &after.segments, false);
        let unit = |m: &Machine| (m.fpu.control, m.fpu.status, m.fpu.tags);
        line("x87 control, status, tags".into(), &unit(before), &unit(after), true);
        for n in 0..8 {
            line(format!("st {n}"), &before.fpu.st[n], &after.fpu.st[n], true);
        }
        for at in (0..before.data.len()).step_by(16) {
            let of = |m: &Machine| m.data[at..at + 16].to_vec();
            let used = (0x80..0xa0).contains(&at);
            line(format!("data {at:#x}"), &of(before), &of(after), used);
        }
        #[cfg(target_arch = "x86_64")]
        if let Some(why) = recorder::differs(form, case, after) {
            let _ = writeln!(text, "  the processor does otherwise:\n{why}");
        }
    }
    Ok(())
}
