//! `diglot doctor`: what this host offers, and which engine `auto` would choose.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::process::Command;

use diglot_runtime::survey::{self, Survey};
use serde::Serialize;

use crate::args::exit;
use crate::terminal;

/// What the host offers.
#[derive(Serialize)]
struct Report {
    host: Host,
    kvm: Kvm,
    memory: Memory,
    terminal: Terminal,
    /// For benchmarks; nothing else needs it.
    qemu: Option<Qemu>,
    auto: Auto,
}

#[derive(Serialize)]
struct Host {
    architecture: &'static str,
    processor: String,
    cpus: usize,
    kernel: String,
    /// The highest of the x86-64 psABI's levels, on such a host.
    level: Option<&'static str>,
    /// Instruction-set extensions by the kernel's names.
    features: Vec<String>,
}

#[derive(Serialize)]
struct Kvm {
    device: String,
    /// Whether `auto` would take it.
    usable: bool,
    /// Whether `--slow-kvm` would.
    emulated: bool,
    /// Why not, and what to do about it.
    problem: Option<String>,
    /// Million guest instructions a second.
    mips: Option<f64>,
    tsc_hz: Option<u64>,
    tsc_scaling: Option<bool>,
    vcpus: Option<usize>,
    /// Instruction classes of `--cpu max` that guests do not have there.
    lacks: Vec<String>,
}

#[derive(Serialize)]
struct Memory {
    total_bytes: Option<u64>,
    available_bytes: Option<u64>,
    page_bytes: u64,
    transparent_huge_pages: Option<String>,
    huge_pages_free: Option<u64>,
}

#[derive(Serialize)]
struct Terminal {
    input: bool,
    output: bool,
    /// Columns and rows.
    size: Option<(u16, u16)>,
}

#[derive(Serialize)]
struct Qemu {
    program: &'static str,
    version: String,
}

#[derive(Serialize)]
struct Auto {
    engine: &'static str,
    why: String,
}

/// Prints the report and gives the exit code.
pub fn run(json: bool) -> u8 {
    let report = Report::new(survey::survey());
    let text = if json { serde_json::to_string_pretty(&report).unwrap_or_default() } else { report.to_string() };
    match writeln!(io::stdout(), "{}", text.trim_end()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            terminal::say(&format!("cannot write the report: {e}"));
            exit::FAILED
        }
        _ => exit::OK,
    }
}

impl Report {
    fn new(survey: Survey) -> Report {
        let offer = survey.offer;
        Report {
            host: Host::new(),
            kvm: Kvm {
                device: survey.device.display().to_string(),
                usable: survey.problem.is_none(),
                emulated: survey.emulated,
                problem: survey.problem,
                mips: offer.as_ref().map(|o| o.mips),
                tsc_hz: offer.as_ref().map(|o| o.tsc_hz),
                tsc_scaling: offer.as_ref().map(|o| o.tsc_scaling),
                vcpus: offer.as_ref().map(|o| o.vcpus),
                lacks: survey.lacks,
            },
            memory: Memory::new(),
            terminal: Terminal {
                input: io::stdin().is_terminal(),
                output: io::stdout().is_terminal(),
                size: terminal::size().map(|(rows, columns)| (columns, rows)),
            },
            qemu: qemu(),
            auto: Auto { engine: survey.auto, why: survey.why },
        }
    }
}

impl Host {
    fn new() -> Host {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            cpuinfo.lines().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                (key.trim() == name).then(|| value.trim().to_owned())
            })
        };
        let mut features: Vec<String> = field("flags")
            .or_else(|| field("Features"))
            .unwrap_or_default()
            .split_whitespace()
            .map(str::to_owned)
            .collect();
        features.sort_unstable();
        Host {
            architecture: std::env::consts::ARCH,
            processor: field("model name").unwrap_or_else(|| "unknown".into()),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: read("/proc/sys/kernel/osrelease").unwrap_or_else(|| std::env::consts::OS.into()),
            level: (std::env::consts::ARCH == "x86_64").then(|| level(&features)),
            features,
        }
    }
}

/// The levels of the x86-64 psABI (chapter 3.1.1), by the names that Linux has for what they consist of.
const LEVELS: [(&str, &[&str]); 3] = [
    ("x86-64-v2", &["cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"]),
    ("x86-64-v3", &["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"]),
    ("x86-64-v4", &["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"]),
];

fn level(features: &[String]) -> &'static str {
    let has = |needed: &[&str]| needed.iter().all(|n| features.iter().any(|f| f == n));
    LEVELS.iter().take_while(|(_, needed)| has(needed)).last().map_or("x86-64", |(name, _)| name)
}

impl Memory {
    fn new() -> Memory {
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let field = |name: &str| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        // SAFETY: asking for a constant of the system has no conditions.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        Memory {
            total_bytes: field("MemTotal").map(|kib| kib << 10),
            available_bytes: field("MemAvailable").map(|kib| kib << 10),
            page_bytes: u64::try_from(page).unwrap_or(0),
            // Its choices in a row, the one that holds in brackets.
            transparent_huge_pages: read("/sys/kernel/mm/transparent_hugepage/enabled")
                .and_then(|all| Some(all.split_once('[')?.1.split_once(']')?.0.to_owned())),
            huge_pages_free: field("HugePages_Free"),
        }
    }
}

fn read(path: &str) -> Option<String> {
    Some(std::fs::read_to_string(path).ok()?.trim().to_owned())
}

/// The QEMU that benchmarks compare with.
fn qemu() -> Option<Qemu> {
    let program = "qemu-system-x86_64";
    let output = Command::new(program).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.lines().next()?.trim_start_matches("QEMU emulator version").trim().to_owned();
    Some(Qemu { program, version })
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: Option<u64>| bytes.map_or("unknown".into(), |b| format!("{} MiB", b >> 20));
        let h = &self.host;
        writeln!(f, "host")?;
        writeln!(f, "  processor     {}, {}", h.processor, h.architecture)?;
        match h.level {
            Some(level) => writeln!(f, "  instructions  {level}")?,
            None => writeln!(f, "  instructions  {}", h.features.join(" "))?,
        }
        writeln!(f, "  CPUs          {}", h.cpus)?;
        writeln!(f, "  kernel        {}", h.kernel)?;
        writeln!(f, "KVM")?;
        let k = &self.kvm;
        match (&k.problem, k.mips) {
            (None, Some(mips)) => {
                writeln!(f, "  {}      works", k.device)?;
                writeln!(f, "  speed         {mips:.0} million guest instructions a second in a loop")?;
            }
            (problem, _) => writeln!(f, "  not usable    {}", problem.as_deref().unwrap_or("it was not measured"))?,
        }
        if let (Some(hz), Some(scaling)) = (k.tsc_hz, k.tsc_scaling) {
            let scaling = if scaling { "guests may have another" } else { "guests have the same" };
            writeln!(f, "  clock         {:.3} GHz, {scaling}", hz as f64 / 1e9)?;
        }
        if let Some(vcpus) = k.vcpus {
            writeln!(f, "  vCPUs         {vcpus} by its own account")?;
        }
        if !k.lacks.is_empty() {
            writeln!(f, "  guests lack   {}", k.lacks.join(" "))?;
        }
        writeln!(f, "memory")?;
        let m = &self.memory;
        writeln!(f, "  in all        {}, {} available", mib(m.total_bytes), mib(m.available_bytes))?;
        writeln!(f, "  pages         {} KiB", m.page_bytes >> 10)?;
        let huge = m.transparent_huge_pages.as_deref().unwrap_or("none");
        writeln!(f, "  huge pages    transparent: {huge}; reserved and free: {}", m.huge_pages_free.unwrap_or(0))?;
        writeln!(f, "terminal")?;
        let t = &self.terminal;
        let is = |terminal| if terminal { "a terminal" } else { "no terminal" };
        write!(f, "  input is {}, output is {}", is(t.input), is(t.output))?;
        match t.size {
            Some((columns, rows)) => writeln!(f, ", {columns} x {rows}")?,
            None => writeln!(f)?,
        }
        writeln!(f, "QEMU, for benchmarks")?;
        match &self.qemu {
            Some(q) => writeln!(f, "  {} {}", q.program, q.version)?,
            None => writeln!(f, "  not installed: cargo bench compares without it")?,
        }
        writeln!(f, "--backend auto")?;
        writeln!(f, "  {}, as {}", self.auto.engine, self.auto.why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_build_on_one_another() {
        let with = |sets: &[usize]| -> Vec<String> {
            sets.iter().flat_map(|&k| LEVELS[k].1).map(|name| (*name).to_owned()).collect()
        };
        for (sets, expected) in [
            (&[][..], "x86-64"),
            (&[0], "x86-64-v2"),
            (&[1], "x86-64"),
            (&[0, 1], "x86-64-v3"),
            (&[0, 1, 2], "x86-64-v4"),
        ] {
            assert_eq!(level(&with(sets)), expected);
        }
    }
}
