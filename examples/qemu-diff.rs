//! Compares what a guest did under QEMU with what it did under Diglot, and names the first difference.
//!
//! ```text
//! qemu-system-x86_64 -accel tcg -d in_asm,cpu,nochain -D qemu.log ...
//! diglot run --trace --trace-registers --trace-file diglot.trace ...
//! cargo run --release --example qemu-diff -- qemu.log diglot.trace [--from 0xRIP] [--ignore rsi,rfl]
//! ```
//!
//! QEMU logs the registers at the start of each of its blocks, Diglot before each instruction. From `--from` on (by
//! default from the first traced instruction), every state of QEMU's must be met within a block's length, with the same
//! registers. Exit code: 0 no difference, 1 a difference, 2 logs that cannot be compared.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::iter::Peekable;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

/// The most instructions in one of QEMU's blocks (`CF_COUNT_MASK`, accel/tcg).
const LONGEST_BLOCK: usize = 512;

/// Register values by name: `rax` to `r15`, `rip`, `rfl`.
type Registers = BTreeMap<String, u64>;

/// One traced instruction.
#[derive(Clone, Debug)]
struct Step {
    registers: Registers,
    text: String,
}

impl Step {
    fn rip(&self) -> u64 {
        rip(&self.registers)
    }

    /// A repeated string instruction is one step of Diglot's and a block an element of QEMU's.
    fn repeats(&self) -> bool {
        self.text.split_whitespace().any(|word| word.starts_with("rep"))
    }
}

fn rip(registers: &Registers) -> u64 {
    registers.get("rip").copied().unwrap_or(0)
}

/// Reads `NAME=HEX` and `R8 =HEX`; 32-bit names become 64-bit ones. What is no register is passed over.
fn registers(line: &str, into: &mut Registers) {
    for token in line.replace(" =", "=").split_whitespace() {
        let Some((name, value)) = token.split_once('=') else { continue };
        let name = name.to_ascii_lowercase();
        let name = if name.len() == 3 && name.starts_with('e') { format!("r{}", &name[1..]) } else { name };
        let known = matches!(name.as_str(), "rip" | "rfl" | "r8" | "r9")
            || name.len() == 3 && name.starts_with('r') && !matches!(&name[1..], "el" | "ef");
        if let (true, Ok(value)) = (known, u64::from_str_radix(value, 16)) {
            into.insert(name, value);
        }
    }
}

/// The states in a QEMU log, in order. A state is complete with the line of its instruction pointer.
fn qemu_states(lines: impl Iterator<Item = io::Result<String>>) -> impl Iterator<Item = io::Result<Registers>> {
    let mut state = Registers::new();
    lines.filter_map(move |line| {
        let line = match line {
            Ok(line) => line,
            Err(e) => return Some(Err(e)),
        };
        let wanted = ["RAX", "EAX", "RSI", "ESI", "R8 ", "R12", "RIP", "EIP"];
        if !wanted.iter().any(|name| line.starts_with(name)) {
            return None;
        }
        registers(&line, &mut state);
        let complete = line.starts_with("RIP") || line.starts_with("EIP");
        complete.then(|| Ok(std::mem::take(&mut state)))
    })
}

/// The instructions in a trace of Diglot's.
fn steps(lines: impl Iterator<Item = io::Result<String>>) -> impl Iterator<Item = io::Result<Step>> {
    let mut state = Registers::new();
    lines.filter_map(move |line| {
        let line = match line {
            Ok(line) => line,
            Err(e) => return Some(Err(e)),
        };
        if line.starts_with(' ') {
            registers(&line, &mut state);
            return None;
        }
        Some(Ok(Step { registers: std::mem::take(&mut state), text: line }))
    })
}

/// What a comparison found.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// This many of QEMU's blocks are the same; one log has ended.
    Same(u64),
    /// The first difference, for the user.
    Different(String),
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("{0}")]
    Read(#[from] io::Error),
    #[error("the trace has no registers; take it with --trace-registers")]
    NoRegisters,
    #[error("no {0} executes {1:#x}, where the comparison is to begin; choose another address with --from")]
    NoStart(&'static str, u64),
}

/// The blocks of QEMU's that were looked at last, and the steps since, for the report.
#[derive(Default)]
struct Recent {
    steps: VecDeque<String>,
}

impl Recent {
    fn add(&mut self, step: &Step) {
        self.steps.push_back(step.text.clone());
        if self.steps.len() > 24 {
            self.steps.pop_front();
        }
    }

    fn report(&self, text: &str) -> String {
        let mut report = text.to_owned();
        report.push_str("\nthe last instructions of Diglot's before:\n");
        for step in &self.steps {
            let _ = writeln!(report, "  {step}");
        }
        report
    }
}

fn compare(
    qemu: impl Iterator<Item = io::Result<Registers>>,
    diglot: impl Iterator<Item = io::Result<Step>>,
    from: Option<u64>,
    ignored: &[String],
) -> Result<Verdict, Error> {
    let (mut qemu, mut diglot) = (qemu.peekable(), diglot.peekable());
    let from = match (from, diglot.peek()) {
        (Some(from), _) => from,
        (None, Some(Ok(step))) if step.registers.is_empty() => return Err(Error::NoRegisters),
        (None, Some(Ok(step))) => step.rip(),
        (None, _) => return Ok(Verdict::Same(0)),
    };
    skip_to(&mut diglot, |step| step.rip() == from)?.ok_or(Error::NoStart("traced instruction", from))?;
    skip_to(&mut qemu, |state| rip(state) == from)?.ok_or(Error::NoStart("block in QEMU's log", from))?;

    let mut recent = Recent::default();
    let mut blocks = 0;
    let mut previous: Option<Step> = None;
    while let Some(state) = qemu.next().transpose()? {
        let wanted = rip(&state);
        // Further rounds of a string instruction that Diglot has done as a whole.
        if previous.as_ref().is_some_and(|step| step.repeats() && step.rip() == wanted) {
            continue;
        }
        let mut passed = 0;
        let step = loop {
            let Some(step) = diglot.next().transpose()? else { return Ok(Verdict::Same(blocks)) };
            if step.registers.is_empty() {
                return Err(Error::NoRegisters);
            }
            if step.rip() == wanted {
                break step;
            }
            recent.add(&step);
            passed += 1;
            if passed > LONGEST_BLOCK {
                let last = previous.map_or(from, |s: Step| s.rip());
                let text = format!("after block {blocks}, at {last:#x}, QEMU goes to {wanted:#x} and Diglot does not");
                return Ok(Verdict::Different(recent.report(&text)));
            }
        };
        let different: Vec<String> = state
            .iter()
            .filter(|(name, value)| !ignored.contains(name) && step.registers.get(*name) != Some(value))
            .map(|(name, value)| {
                let ours = step.registers.get(name).map_or("nothing".into(), |v| format!("{v:#x}"));
                format!("  {name}: QEMU {value:#x}, Diglot {ours}")
            })
            .collect();
        if !different.is_empty() {
            let text = format!("at {wanted:#x}, after {blocks} blocks that are the same:\n{}", different.join("\n"));
            return Ok(Verdict::Different(recent.report(&text)));
        }
        recent.add(&step);
        previous = Some(step);
        blocks += 1;
    }
    Ok(Verdict::Same(blocks))
}

/// Goes on to the first item that `is_it`, which stays the next one.
fn skip_to<T>(
    items: &mut Peekable<impl Iterator<Item = io::Result<T>>>,
    is_it: impl Fn(&T) -> bool,
) -> io::Result<Option<()>> {
    loop {
        match items.peek() {
            None => return Ok(None),
            Some(Ok(item)) if is_it(item) => return Ok(Some(())),
            Some(_) => drop(items.next().transpose()?),
        }
    }
}

/// Names the first difference between a QEMU log and a Diglot trace of the same guest.
#[derive(Parser)]
struct Args {
    /// QEMU's log, of -d in_asm,cpu,nochain
    qemu: PathBuf,
    /// Diglot's, of --trace --trace-registers
    diglot: PathBuf,
    /// RIP at which to begin, in hexadecimal
    #[arg(long, value_parser = address)]
    from: Option<u64>,
    /// Registers not to compare, such as rsi,rfl
    #[arg(long, value_delimiter = ',')]
    ignore: Vec<String>,
}

fn address(text: &str) -> Result<u64, std::num::ParseIntError> {
    u64::from_str_radix(text.trim_start_matches("0x"), 16)
}

fn main() -> ExitCode {
    let args = Args::parse();
    let lines = |path: &PathBuf| {
        let file = File::open(path).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
        Ok::<_, io::Error>(BufReader::new(file).lines())
    };
    let result = lines(&args.qemu)
        .map_err(Error::from)
        .and_then(|qemu| compare(qemu_states(qemu), steps(lines(&args.diglot)?), args.from, &args.ignore));
    match result {
        Ok(Verdict::Same(blocks)) => {
            println!("no difference in {blocks} blocks");
            ExitCode::SUCCESS
        }
        Ok(Verdict::Different(report)) => {
            println!("{report}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("qemu-diff: {error}");
            ExitCode::from(2)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A block of a QEMU log, as QEMU 10 writes it, with the registers that change.
    fn block(rip: u64, rax: u64, rcx: u64) -> String {
        format!(
            "----------------\nIN: \n{rip:#018x}:  90    nop\n\n\
             RAX={rax:016x} RBX=0000000000000000 RCX={rcx:016x} RDX=0000000000000663\n\
             RSI=0000000000000000 RDI=0000000000000000 RBP=0000000000000000 RSP=0000000000000000\n\
             R8 =0000000000000008 R9 =0000000000000000 R10=0000000000000000 R11=0000000000000000\n\
             R12=0000000000000000 R13=0000000000000000 R14=0000000000000000 R15=0000000000000000\n\
             RIP={rip:016x} RFL=00000046 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=0\n\
             ES =0000 0000000000000000 0000ffff 00009300\nCR0=60000010 CR2=0000000000000000\n\
             CCS=0000000000000000 CCD=0000000000000000 CCO=EFLAGS\nEFER=0000000000000000\n"
        )
    }

    /// A step of a trace.
    fn step(rip: u64, rax: u64, rcx: u64, text: &str) -> String {
        format!(
            " rax={rax:016x} rbx=0000000000000000 rcx={rcx:016x} rdx=0000000000000663 rsi=0000000000000000 \
             rdi=0000000000000000 rbp=0000000000000000 rsp=0000000000000000 r8=0000000000000008 r9=0000000000000000 \
             r10=0000000000000000 r11=0000000000000000 r12=0000000000000000 r13=0000000000000000 \
             r14=0000000000000000 r15=0000000000000000 rip={rip:016x} rfl=00000046\n\
             0 {rip:#018x} 90                             {text}\n"
        )
    }

    fn verdict(qemu: &[String], diglot: &[String], from: Option<u64>, ignored: &[&str]) -> Result<Verdict, Error> {
        let lines = |texts: &[String]| {
            let lines: Vec<io::Result<String>> = texts.concat().lines().map(|line| Ok(line.to_owned())).collect();
            lines.into_iter()
        };
        let ignored: Vec<String> = ignored.iter().map(|&name| name.into()).collect();
        compare(qemu_states(lines(qemu)), steps(lines(diglot)), from, &ignored)
    }

    #[test]
    fn equal_runs_are_the_same_though_one_is_by_blocks() {
        // QEMU has run firmware before.
        let qemu = [block(0xfff0, 9, 9), block(0x1000, 1, 5), block(0x1008, 3, 5), block(0x1000, 4, 5)];
        let diglot = [
            step(0x1000, 1, 5, "nop"),
            step(0x1001, 2, 5, "nop"),
            step(0x1008, 3, 5, "nop"),
            step(0x1000, 4, 5, "nop"),
        ];
        assert_eq!(verdict(&qemu, &diglot, None, &[]).expect("logs"), Verdict::Same(3));
        assert_eq!(verdict(&qemu, &diglot, Some(0x1008), &[]).expect("logs"), Verdict::Same(2));
    }

    #[test]
    fn a_string_instruction_is_one_step_and_many_blocks() {
        let qemu = [block(0x1000, 0, 3), block(0x1000, 0, 2), block(0x1000, 0, 1), block(0x1002, 0, 0)];
        let diglot = [step(0x1000, 0, 3, "rep stosb"), step(0x1002, 0, 0, "nop")];
        assert_eq!(verdict(&qemu, &diglot, None, &[]).expect("logs"), Verdict::Same(2));
    }

    #[test]
    fn the_first_register_that_differs_is_named_with_the_way_there() {
        let qemu = [block(0x1000, 1, 5), block(0x1008, 3, 5), block(0x1010, 4, 5)];
        let diglot = [
            step(0x1000, 1, 5, "mov eax,2"),
            step(0x1005, 2, 5, "add eax,2"),
            step(0x1008, 4, 5, "nop"),
            step(0x1010, 4, 5, "nop"),
        ];
        let Ok(Verdict::Different(text)) = verdict(&qemu, &diglot, None, &[]) else { panic!("there is a difference") };
        for part in ["at 0x1008, after 1 blocks", "rax: QEMU 0x3, Diglot 0x4", "add eax,2"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("rcx"), "{text}");
        assert_eq!(verdict(&qemu, &diglot, None, &["rax"]).expect("logs"), Verdict::Same(3));
    }

    #[test]
    fn another_way_is_a_difference_too() {
        let qemu = [block(0x1000, 1, 5), block(0x2000, 1, 5)];
        let diglot: Vec<String> = (0..600).map(|n| step(0x1000 + n, 1, 5, "nop")).collect();
        let Ok(Verdict::Different(text)) = verdict(&qemu, &diglot, None, &[]) else { panic!("there is a difference") };
        assert!(text.contains("QEMU goes to 0x2000 and Diglot does not"), "{text}");
    }

    #[test]
    fn logs_that_do_not_fit_are_told() {
        let qemu = [block(0x1000, 1, 5)];
        let diglot = [step(0x2000, 1, 5, "nop")];
        assert!(matches!(verdict(&qemu, &diglot, None, &[]), Err(Error::NoStart(_, 0x2000))));
        assert!(matches!(verdict(&qemu, &diglot, Some(0x1000), &[]), Err(Error::NoStart(_, 0x1000))));
        let bare = ["0 0x0000000000001000 90     nop\n".to_owned()];
        assert!(matches!(verdict(&qemu, &bare, None, &[]), Err(Error::NoRegisters)));
    }
}
