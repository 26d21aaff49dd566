//! `cargo xtask coverage`: docs/isa-coverage.md, from what the translator says of every encoding that iced names.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::process::ExitCode;

use diglot_translator::cpuid::{CpuModel, Level};
use diglot_translator::decode::decode;
use diglot_translator::insn::Mode;
use diglot_translator::jit::host::Host;
use diglot_translator::semantics::{Treatment, treatment};
use diglot_translator::testing::forms::{Choice, build, codes, encode};
use iced_x86::{Code, CpuidFeature as F};

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/isa-coverage.md");
const WIDTH: usize = 120;

/// The order of SDM vol. 1 chapter 5; what is not here comes after it, in iced's.
const ORDER: &[F] = &[
    F::INTEL8086,
    F::INTEL8086_ONLY,
    F::INTEL186,
    F::INTEL286,
    F::INTEL386,
    F::INTEL486,
    F::X64,
    F::CMOV,
    F::CX8,
    F::CMPXCHG16B,
    F::CPUID,
    F::MULTIBYTENOP,
    F::PAUSE,
    F::MOVBE,
    F::CLFSH,
    F::CLFLUSHOPT,
    F::CLWB,
    F::PREFETCHW,
    F::RDRAND,
    F::RDSEED,
    F::BMI1,
    F::BMI2,
    F::LZCNT,
    F::POPCNT,
    F::ADX,
    F::FPU,
    F::FPU287,
    F::FPU387,
    F::FXSR,
    F::MMX,
    F::SSE,
    F::SSE2,
    F::SSE3,
    F::SSSE3,
    F::SSE4_1,
    F::SSE4_2,
    F::AES,
    F::PCLMULQDQ,
    F::AVX,
    F::F16C,
    F::FMA,
    F::AVX2,
    F::SHA,
    F::XSAVE,
    F::XSAVEOPT,
    F::XSAVEC,
    F::MONITOR,
    F::MSR,
    F::TSC,
    F::RDTSCP,
    F::RDPMC,
    F::RDPID,
    F::SEP,
    F::SYSCALL,
    F::FSGSBASE,
    F::SMAP,
    F::INVPCID,
];

const INTRODUCTION: &str = "\
# Instruction set coverage

Written by `cargo xtask coverage`; `.ci/run` fails when it is stale.

Codes are [iced-x86](https://github.com/icedland/iced)'s names of encodings, such as `Add_rm32_r32`: all that its decoder
for Intel's processors knows, obsolete ones included. Extensions are in the order of SDM vol. 1 chapter 5. EVEX and other
encodings that no CPU model has (MVEX, XOP, 3DNow!) are not counted.

- *Inline*: compiled code does the instruction itself, though it may leave single cases to the interpreter, such as an
  access that faults or meets a device.
- *Partly*: some operand forms are compiled, others are done by helper; the lists below say which.
- *Helper*: compiled code calls the interpreter's evaluation, or is left for it.
- *#UD*: the instruction raises #UD.

Each code is tried with register and with memory operands, and with several immediates. The CPU is `--cpu max`, and the
host an x86-64 with FMA. Without FMA the fused multiply-adds, and on hosts of another instruction set all floating point
and PSHUFB, are done by helper. Code outside 64-bit mode is compiled only if it is 32-bit with flat segments, which the
second table takes for granted; the rest is interpreted.
";

/// What became of the forms of a code.
#[derive(Clone, PartialEq, Eq)]
enum Outcome {
    Inline,
    /// With what is not inline.
    Partly(&'static str),
    Helper,
    Undefined,
}

/// The codes of one extension, or of several together.
#[derive(Default)]
struct Group {
    codes: Vec<(String, Outcome)>,
}

impl Group {
    fn count(&self, f: impl Fn(&Outcome) -> bool) -> usize {
        self.codes.iter().filter(|(_, o)| f(o)).count()
    }

    /// Number of codes; of those inline, partly inline, by helper, undefined.
    fn counts(&self) -> [usize; 5] {
        [
            self.codes.len(),
            self.count(|o| *o == Outcome::Inline),
            self.count(|o| matches!(o, Outcome::Partly(_))),
            self.count(|o| *o == Outcome::Helper),
            self.count(|o| *o == Outcome::Undefined),
        ]
    }
}

/// Extensions by their place in the order, with their name.
type Groups = BTreeMap<(Vec<usize>, String), Group>;

/// Writes the page, or says whether it is what would be written.
pub fn run(check: bool) -> ExitCode {
    let page = page();
    let path = Path::new(PAGE);
    if check {
        if std::fs::read_to_string(path).is_ok_and(|old| old == page) {
            return ExitCode::SUCCESS;
        }
        eprintln!("docs/isa-coverage.md is stale: write it anew with `cargo xtask coverage`");
        return ExitCode::FAILURE;
    }
    match std::fs::write(path, page) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{}: {e}", path.display());
            ExitCode::FAILURE
        }
    }
}

fn page() -> String {
    let model = CpuModel::new(Level::Max, 1, 0);
    let long: Vec<Code> = codes(64).collect();
    let mut legacy: Vec<Code> = codes(32).chain(codes(16)).filter(|c| !long.contains(c)).collect();
    legacy.sort();
    legacy.dedup();
    let narrow: Vec<Code> = codes(32).collect();
    let (here, absent) = groups(&long, &model, |_| 64);
    let (outside, absent_outside) = groups(&legacy, &model, |c| if narrow.contains(&c) { 32 } else { 16 });
    let mut page = INTRODUCTION.to_string();
    page += "\n## 64-bit mode\n\n";
    table(&mut page, &here);
    page += "\n## Only outside 64-bit mode\n\n";
    table(&mut page, &outside);
    page += "\n## By helper\n\nOf 64-bit mode:\n\n";
    let helper = |o: &Outcome| matches!(o, Outcome::Helper | Outcome::Partly(_));
    list(&mut page, &here, helper);
    page += "\nOutside it:\n\n";
    list(&mut page, &outside, helper);
    page += "\n## #UD though advertised\n\nOf 64-bit mode:\n\n";
    list(&mut page, &here, |o| *o == Outcome::Undefined);
    page += "\nOutside it:\n\n";
    list(&mut page, &outside, |o| *o == Outcome::Undefined);
    page += "\n## Not advertised\n\nThese raise #UD, or are what their encoding was before it got its meaning, such as a no \
             operation.\n\n";
    let mut names = absent;
    for (name, n) in absent_outside {
        *names.entry(name).or_default() += n;
    }
    let names: Vec<String> = names.into_iter().map(|((_, name), n)| format!("{name} ({n})")).collect();
    wrap(&mut page, "", &names);
    page
}

/// The extensions that the model has, and the others' numbers of codes.
fn groups(
    codes: &[Code],
    model: &CpuModel,
    bits: impl Fn(Code) -> u32,
) -> (Groups, BTreeMap<(Vec<usize>, String), usize>) {
    let (mut groups, mut absent) = (Groups::new(), BTreeMap::new());
    for &code in codes {
        let mut features: Vec<(usize, F)> = code.cpuid_features().iter().map(|&f| (place(f), f)).collect();
        features.sort();
        let name = features.iter().map(|(_, f)| name(*f)).collect::<Vec<_>>().join(" + ");
        // What came last decides the place.
        let key = (features.iter().rev().map(|f| f.0).collect(), name);
        if model.executes(code) {
            let outcome = outcome(code, bits(code), model);
            groups.entry(key).or_default().codes.push((format!("{code:?}"), outcome));
        } else {
            *absent.entry(key).or_default() += 1;
        }
    }
    (groups, absent)
}

fn place(f: F) -> usize {
    ORDER.iter().position(|&o| o == f).unwrap_or(ORDER.len() + f as usize)
}

/// The manual's spelling, as far as it differs from iced's.
fn name(f: F) -> String {
    match f {
        F::INTEL8086 => "8086".into(),
        F::INTEL8086_ONLY => "8086 only".into(),
        F::INTEL186 => "80186".into(),
        F::INTEL286 => "80286".into(),
        F::INTEL386 => "80386".into(),
        F::INTEL486 => "80486".into(),
        F::X64 => "64-bit".into(),
        F::CX8 => "CMPXCHG8B".into(),
        F::CLFSH => "CLFLUSH".into(),
        F::MULTIBYTENOP => "multi-byte NOP".into(),
        F::FPU => "x87".into(),
        F::FPU287 => "x87 (80287)".into(),
        F::FPU387 => "x87 (80387)".into(),
        F::SSE4_1 => "SSE4.1".into(),
        F::SSE4_2 => "SSE4.2".into(),
        F::SEP => "SYSENTER".into(),
        _ => format!("{f:?}"),
    }
}

fn outcome(code: Code, bits: u32, model: &CpuModel) -> Outcome {
    let mode = match bits {
        64 => Mode::CODE64 | Mode::FLAT,
        32 => Mode::CODE32 | Mode::STACK32 | Mode::FLAT,
        _ => Mode::FLAT,
    };
    let mode = Mode(mode | Mode::SSE | Mode::AVX);
    let mut forms = Vec::new();
    for memory in [false, true] {
        for imm in [1, 0x1b] {
            let Some(i) = build(code, bits, &Choice { imm, ..Choice::plain(bits, memory) }) else { continue };
            let Ok(bytes) = encode(&i, bits) else { continue };
            // FINIT and its kin are a WAIT and another instruction, which is the one to look at.
            let fwait = bytes[0] == 0x9b && bytes.len() > 1;
            let Ok(insn) = decode(&bytes[usize::from(fwait)..], mode, model) else { continue };
            forms.push((memory, imm, treatment(&insn, Host::COMPLETE)));
        }
    }
    let all = |t| forms.iter().all(|f| f.2 == t);
    let where_compiled =
        |f: &dyn Fn(bool, u64) -> bool| forms.iter().all(|x| (x.2 == Treatment::Compiled) == f(x.0, x.1));
    if all(Treatment::Undefined) {
        Outcome::Undefined
    } else if all(Treatment::Compiled) {
        Outcome::Inline
    } else if all(Treatment::Helper) {
        Outcome::Helper
    } else if where_compiled(&|memory, _| !memory) {
        Outcome::Partly("memory")
    } else if where_compiled(&|memory, _| memory) {
        Outcome::Partly("registers")
    } else if where_compiled(&|_, imm| imm == 1) {
        Outcome::Partly("some immediates")
    } else {
        Outcome::Partly("some forms")
    }
}

fn table(page: &mut String, groups: &Groups) {
    *page += "| extension | advertised | inline | partly | helper | #UD |\n|---|--:|--:|--:|--:|--:|\n";
    let mut total = [0; 5];
    let mut row = |name: &str, n: [usize; 5]| {
        let _ = writeln!(page, "| {name} | {} | {} | {} | {} | {} |", n[0], n[1], n[2], n[3], n[4]);
    };
    for ((_, name), group) in groups {
        let counts = group.counts();
        row(name, counts);
        total = std::array::from_fn(|k| total[k] + counts[k]);
    }
    row("all", total);
}

fn list(page: &mut String, groups: &Groups, which: impl Fn(&Outcome) -> bool) {
    for ((_, name), group) in groups {
        let names: Vec<String> = group
            .codes
            .iter()
            .filter(|(_, o)| which(o))
            .map(|(code, o)| match o {
                Outcome::Partly(what) => format!("`{code}` ({what})"),
                _ => format!("`{code}`"),
            })
            .collect();
        if !names.is_empty() {
            wrap(page, &format!("- {name}: "), &names);
        }
    }
}

/// Words with commas between them, in lines of the page's width.
fn wrap(page: &mut String, start: &str, words: &[String]) {
    let indent = if start.is_empty() { "" } else { "  " };
    let mut line = start.to_string();
    for (n, word) in words.iter().enumerate() {
        let end = if n + 1 < words.len() { "," } else { "" };
        if line.len() + word.len() + end.len() > WIDTH {
            let _ = writeln!(page, "{}", line.trim_end());
            line = indent.to_string();
        }
        let _ = write!(line, "{word}{end} ");
    }
    let _ = writeln!(page, "{}", line.trim_end());
}
