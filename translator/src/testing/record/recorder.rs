//! What has the host's processor record outcomes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use iced_x86::{MemorySize, Mnemonic, OpKind};

use super::super::engine::{Engine, Kind};
use super::super::native::{Native, host_has};
use super::super::outcome::{Case, compare};
use super::{By, Form, Machine, Outcomes, Recorded, Table, each, parse, print};
use crate::exception::vector;
use crate::state::flag;

/// As in a [`Table`], but not all of it yet.
type Groups = [[(Option<By>, Outcomes); 2]; 2];

/// What the processor has recorded, and what it had to leave to the interpreter.
#[derive(Debug, Default)]
pub struct Recording {
    groups: BTreeMap<String, Groups>,
    forms: usize,
    cases: usize,
    /// Codes that the processor lacks, and their cases.
    lacking: (BTreeSet<String>, usize),
    /// For each of [`MAKERS`], the codes that it explains, and the number of cases.
    differing: [(BTreeSet<String>, usize); MAKERS.len()],
    unexplained: Vec<String>,
}

/// Whether a difference between the processor's outcome and the interpreter's, in this order, is of a kind.
type Is = fn(&Form, &Case, &Machine, &Machine) -> bool;

/// In what makers differ, the interpreter being as AMD's processors are, and which cases these are.
const MAKERS: &[(&str, Is)] = &[
    (
        "IRET off alignment that may load AC: Intel's processors check the stack by the AC that it loads and raise #AC with \
         the one before, which Linux takes for a split lock and tries again for ever; not asked",
        never_ends,
    ),
    (
        "#AC: whether it is raised for operands of 16 and 32 bytes that need not be aligned, and whether before or after the \
         other faults that there may be",
        |_, case, theirs, ours| {
            case.before.flags & flag::AC != 0 && [theirs, ours].iter().any(|m| vector_of(m) == vector::AC)
        },
    ),
    (
        "a gather that faults: which elements it has done before, and what of the mask remains",
        |form, _, theirs, ours| form.instruction.is_vsib() && ours.fault.is_some() && theirs.fault == ours.fault,
    ),
    ("a masked move that faults: which byte or element the fault is of", |form, _, theirs, ours| {
        let name = format!("{:?}", form.instruction.mnemonic()).to_lowercase();
        name.contains("maskmov") && ours.fault.is_some() && theirs.fault.is_some()
    }),
    (
        "VCVTPS2PH to memory that faults: whether its own exceptions come before the operand's fault",
        |form, _, _, ours| form.instruction.mnemonic() == Mnemonic::Vcvtps2ph && ours.fault.is_some(),
    ),
    ("a store of an MMX register that faults: whether MMX state has been entered", |form, _, theirs, ours| {
        let store = form.instruction.op0_kind() == OpKind::Memory && form.instruction.op1_register().is_mm();
        store && ours.fault.is_some() && theirs.fault == ours.fault
    }),
    (
        "an x87 store that has an unmasked exception: whether the operand is looked at all the same",
        |form, _, theirs, ours| is_x87_store(form) && ours.fault.is_some() && theirs.fault.is_none(),
    ),
    ("an x87 store of 80 bits that faults in the middle: what of it has been written", |form, _, theirs, ours| {
        let wide = matches!(form.instruction.memory_size(), MemorySize::Float80 | MemorySize::Bcd);
        wide && is_x87_store(form) && ours.fault.is_some() && theirs.fault == ours.fault
    }),
    (
        "a near call to where no address is canonical: whether the return address has been written",
        |form, _, theirs, ours| {
            form.instruction.mnemonic() == Mnemonic::Call && vector_of(ours) == vector::GP && theirs.fault == ours.fault
        },
    ),
    ("XRSTOR that faults: whether registers have been loaded before", |form, _, theirs, ours| {
        let loads = matches!(form.instruction.mnemonic(), Mnemonic::Xrstor | Mnemonic::Xrstor64);
        loads && vector_of(ours) == vector::GP && theirs.fault == ours.fault
    }),
    (
        "BOUND of an index below the lower bound: whether the upper one is read, which faults",
        |form, _, theirs, ours| {
            form.instruction.mnemonic() == Mnemonic::Bound && vector_of(theirs) == vector::BR && ours.fault.is_some()
        },
    ),
    ("PUSH of a segment register: Intel's processors write 16 bits", |form, _, _, _| {
        form.instruction.mnemonic() == Mnemonic::Push && form.instruction.op0_register().is_segment_register()
    }),
];

/// The exception, or none that there is.
fn vector_of(m: &Machine) -> u8 {
    m.fault.map_or(u8::MAX, |f| f.vector)
}

fn is_x87_store(form: &Form) -> bool {
    use Mnemonic::*;
    matches!(form.instruction.mnemonic(), Fst | Fstp | Fist | Fistp | Fisttp | Fbstp)
}

/// Whether the case could not be got out of.
fn never_ends(form: &Form, case: &Case, _: &Machine, _: &Machine) -> bool {
    let returns = matches!(form.instruction.mnemonic(), Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq);
    returns && case.before.gpr[4] & 7 != 0
}

/// Runs everything on the host's processor and on the interpreter; `None`, with the reason printed, where the processor
/// cannot serve. Fails on the first form that an engine cannot run.
pub fn record() -> Result<Option<Recording>, String> {
    let Some(mut host) = Native::of_any_maker() else { return Ok(None) };
    let mut recording = Recording::default();
    for bits in [64, 32] {
        let mut engine = Engine::new(Kind::Interpreter, bits);
        let mut failed = None;
        each(bits, |form| {
            if failed.is_none() {
                failed = recording.add(form, &mut host, &mut engine).err();
            }
        });
        if let Some(why) = failed {
            return Err(why);
        }
    }
    Ok(Some(recording))
}

/// Whether the host's processor has what `form` needs.
fn has(form: &Form) -> bool {
    form.instruction.cpuid_features().iter().all(|&f| host_has(f))
}

impl Recording {
    fn add(&mut self, form: &Form, host: &mut Native, engine: &mut Engine) -> Result<(), String> {
        let cases = form.cases();
        let outcomes = form.run(engine, &cases)?;
        let mut by = By::Processor;
        if has(form) {
            host.load(form.bits, &form.code);
            let mut differing = 0;
            for ((seed, case), interpreted) in cases.iter().zip(&outcomes) {
                let difference = if never_ends(form, case, interpreted, interpreted) {
                    Some((0, String::new()))
                } else {
                    let theirs = form.settled(case, host.run(&case.before));
                    let why = compare(&case.before, "processor", "interpreted", &theirs, interpreted).err();
                    let known = || MAKERS.iter().position(|(_, is)| is(form, case, &theirs, interpreted));
                    why.map(|why| (known().unwrap_or(MAKERS.len()), why))
                };
                let Some((reason, why)) = difference else { continue };
                differing += 1;
                match self.differing.get_mut(reason) {
                    Some((codes, cases)) => {
                        codes.insert(form.name.clone());
                        *cases += 1;
                    }
                    None => self.unexplained.push(format!(
                        "{}, {}-bit, {} ({:02x?}), case {seed:#x}:\n{why}",
                        form.name, form.bits, form.instruction, form.code
                    )),
                }
            }
            if differing != 0 {
                by = By::Maker;
            }
        } else {
            by = By::Lacking;
            self.lacking.0.insert(form.name.clone());
            self.lacking.1 += cases.len();
        }
        self.forms += 1;
        self.cases += cases.len();
        let (mode, memory) = form.group();
        let (of, all) = &mut self.groups.entry(form.name.clone()).or_default()[mode][memory];
        let by = of.map_or(by, |of: By| if by == By::Processor { of } else { by });
        *of = Some(by);
        all.add(&outcomes);
        Ok(())
    }

    fn table(&self) -> Table {
        let recorded = |(by, all): &(Option<By>, Outcomes)| by.map(|by| Recorded { hash: all.hash(), by });
        let of = |groups: &Groups| groups.each_ref().map(|g| g.each_ref().map(recorded));
        self.groups.iter().map(|(name, groups)| (name.clone(), of(groups))).collect()
    }

    /// Cases in which processor and interpreter differ although nothing explains it: bugs, here or there. One text each.
    pub fn unexplained(&self) -> &[String] {
        &self.unexplained
    }

    /// The file's text.
    pub fn text(&self) -> String {
        let (lacking, differing) = (self.lacking.1, self.differing.iter().map(|(_, n)| n).sum::<usize>());
        let mut head = format!(
            "What an x86-64 processor does, for hosts that are none. Written by `cargo xtask record`, on one; `cargo xtask \
             record --check` says whether this is what would be written. translator/src/testing/record.rs says what it \
             means and replays it on every host.\n\
             Recorded by: {}\n\
             {} codes in {} forms, run from {} states: in {} of them processor and interpreter agree. Of approximations (RCPPS, \
             RSQRTPS and their kin, x87 transcendentals) and of the NaNs of DPPS and DPPD only the class counts. What does \
             not run at all, and why, is in translator/src/testing/every.rs.\n",
            processor(),
            self.groups.len(),
            self.forms,
            self.cases,
            self.cases - lacking - differing,
        );
        if lacking != 0 {
            let names: Vec<&str> = self.lacking.0.iter().map(String::as_str).collect();
            let names = names.join(", ");
            let _ = writeln!(head, "?: {lacking} are the interpreter's alone, as this processor lacks {names}.");
        }
        if differing != 0 {
            let _ = writeln!(
                head,
                "*: among them are some of {differing} that are the interpreter's, as this processor does otherwise in what \
                 makers differ:"
            );
            for ((why, _), (codes, cases)) in MAKERS.iter().zip(&self.differing) {
                if *cases != 0 {
                    let _ = writeln!(head, "- {why}: {cases} states, of {} codes.", codes.len());
                }
            }
        }
        let head: String = head.lines().flat_map(wrap).collect();
        head + &print(&self.table())
    }
}

impl Recording {
    /// How this recording and the one that `text` holds differ, a line each: in outcomes if another processor made it, in
    /// anything otherwise.
    pub fn compare(&self, text: &str) -> Result<Vec<String>, String> {
        let recorded = parse(text)?;
        let table = self.table();
        let names: BTreeSet<&String> = table.keys().chain(recorded.keys()).collect();
        let hashes = |t: &Table, name: &String| t.get(name).map(|t| t.map(|forms| forms.map(|r| r.map(|r| r.hash))));
        let differing = names.into_iter().filter(|name| hashes(&table, name) != hashes(&recorded, name));
        let mut lines: Vec<String> = differing.cloned().collect();
        let own = text.lines().any(|l| l.ends_with(&format!("Recorded by: {}", processor())));
        if lines.is_empty() && own && text != self.text() {
            lines.push("who decided an outcome, or what the file's head says".into());
        }
        Ok(lines)
    }
}

/// A line of the head, as comments of no more than 120 columns.
fn wrap(line: &str) -> Vec<String> {
    let mut lines = vec![String::from("#")];
    for word in line.split(' ') {
        let last = lines.len() - 1;
        if lines[last].len() + 1 + word.len() > 120 {
            lines.push(format!("#   {word}"));
        } else {
            lines[last] += &format!(" {word}");
        }
    }
    lines.into_iter().map(|l| l + "\n").collect()
}

/// The host's processor, as CPUID has it.
fn processor() -> String {
    use std::arch::x86_64::__cpuid;
    let (zero, one) = (__cpuid(0), __cpuid(1));
    let vendor = [zero.ebx, zero.edx, zero.ecx].map(u32::to_le_bytes).concat();
    let base = one.eax >> 8 & 15;
    let family = if base == 15 { base + (one.eax >> 20 & 0xff) } else { base };
    let model = one.eax >> 4 & 15 | (one.eax >> 16 & 15) << 4;
    let names = if __cpuid(0x8000_0000).eax >= 0x8000_0004 { 0x8000_0002..0x8000_0005 } else { 0..0 };
    let name: Vec<u8> = names
        .flat_map(|leaf| {
            let r = __cpuid(leaf);
            [r.eax, r.ebx, r.ecx, r.edx].map(u32::to_le_bytes).concat()
        })
        .take_while(|&b| b != 0)
        .collect();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    format!("{}, {} family {family:x}h model {model:x}h stepping {:x}h", text(&name), text(&vendor), one.eax & 15)
}

/// How the host's processor differs from an interpreted outcome, if it can run the case and does.
pub(super) fn differs(form: &Form, case: &Case, interpreted: &Machine) -> Option<String> {
    let can = has(form) && !never_ends(form, case, interpreted, interpreted);
    let mut host = Native::of_any_maker().filter(|_| can)?;
    host.load(form.bits, &form.code);
    let theirs = form.settled(case, host.run(&case.before));
    compare(&case.before, "processor", "interpreted", &theirs, interpreted).err()
}
