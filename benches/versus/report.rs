//! What was measured, as a table and as JSON.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::process::Command;

use serde_json::{Value, json};

use crate::Results;
use crate::contender::{BOOT, C_COMPILE, CONTENDERS, JIT, NATIVE, QEMU, Run};
use crate::support::median;

/// Programs that are judged together, by the geometric mean of their ratios to QEMU.
const GROUPS: [(&str, &[&str]); 11] = [
    ("integer", &["sort", "sieve", "crc32", "sha256", "lz"]),
    ("calls and interpreters", &["calls", "bytecode"]),
    ("f64, scalar and SSE2", &["matrix-scalar", "matrix-sse2", "nbody", "mandelbrot"]),
    ("AVX2 and FMA", &["matrix-avx2", "dot-avx2"]),
    ("x87", &["x87"]),
    ("copies", &["memcpy-4k", "memcpy-16m", "rep-movsb", "rep-stosb"]),
    ("pages and processes", &["page-faults", "fork-exec"]),
    ("system calls", &["syscall", "pipe"]),
    ("code that changes", &["jit-patch", "jit-compile"]),
    ("compiling a C file", &[C_COMPILE]),
    ("power-on to init", &[BOOT]),
];

/// The times of a program under one contender, in seconds.
pub struct Times {
    /// Median, least and most over all repetitions.
    pub median: f64,
    least: f64,
    most: f64,
}

/// One program's row.
pub struct Row {
    /// The program.
    pub name: String,
    /// By contender, where it was measured.
    pub times: BTreeMap<&'static str, Times>,
    /// QEMU's time to that of Diglot's compiler.
    pub to_qemu: Option<f64>,
    /// The native time to that of Diglot's compiler.
    pub of_native: Option<f64>,
}

/// The whole comparison.
pub struct Report {
    /// A row for each program.
    pub rows: Vec<Row>,
    unavailable: Vec<(&'static str, String)>,
    rounds: usize,
}

fn times(runs: &[Run], program: &str) -> Option<Times> {
    let all = || runs.iter().filter_map(|run| run.seconds.get(program)).flatten().copied();
    let (least, most) = (all().fold(f64::MAX, f64::min), all().fold(0.0, f64::max));
    Some(Times { median: median(all())?, least, most })
}

/// The median over rounds of the ratio of two contenders' times.
fn ratio(results: &Results, program: &str, over: &str, under: &str) -> Option<f64> {
    let runs = |name| results.get(name)?.as_ref().ok();
    let of = |run: &Run| median(run.seconds.get(program)?.iter().copied());
    let pairs = runs(over)?.iter().zip(runs(under)?);
    median(pairs.filter_map(|(over, under)| Some(of(over)? / of(under)?)))
}

impl Report {
    /// The report of `programs`, and of the time to init.
    pub fn new(programs: &[String], results: &Results) -> Report {
        let row = |name: &str| Row {
            name: name.to_owned(),
            times: results
                .iter()
                .filter_map(|(&contender, runs)| Some((contender, times(runs.as_ref().ok()?, name)?)))
                .collect(),
            to_qemu: ratio(results, name, QEMU, JIT),
            of_native: ratio(results, name, NATIVE, JIT),
        };
        let rows: Vec<Row> = programs.iter().map(String::as_str).chain([BOOT]).map(row).collect();
        let reason = |c: &crate::contender::Contender| Some((c.name, results.get(c.name)?.as_ref().err()?.clone()));
        let rounds = results.values().flatten().map(Vec::len).max().unwrap_or(0);
        Report { rows, unavailable: CONTENDERS.iter().filter_map(reason).collect(), rounds }
    }

    /// The contenders that have times, in the order of the table.
    fn present(&self) -> Vec<&'static str> {
        let names = CONTENDERS.iter().map(|c| c.name);
        names.filter(|name| self.rows.iter().any(|row| row.times.contains_key(name))).collect()
    }

    /// Groups of which a member was measured, with the geometric mean of their ratios to QEMU.
    pub fn groups(&self) -> Vec<(&'static str, f64)> {
        let mean = |members: &[&str]| {
            let measured = self.rows.iter().filter(|row| members.contains(&row.name.as_str()));
            let logarithms: Vec<f64> = measured.filter_map(|row| Some(row.to_qemu?.ln())).collect();
            (!logarithms.is_empty()).then(|| (logarithms.iter().sum::<f64>() / logarithms.len() as f64).exp())
        };
        GROUPS.iter().filter_map(|(name, members)| Some((*name, mean(members)?))).collect()
    }

    /// For the terminal: milliseconds, ratios and spread.
    pub fn table(&self) -> String {
        let present = self.present();
        let mut out = String::new();
        let mut line = |cells: Vec<String>| {
            let first = cells.first().cloned().unwrap_or_default();
            let rest = cells.iter().skip(1).map(|cell| format!(" {cell:>13}")).collect::<String>();
            let _ = writeln!(out, "{first:24}{rest}");
        };
        let head = ["milliseconds"].into_iter().chain(present.iter().copied());
        line(head.chain(["QEMU / jit", "of native", "jit spread"]).map(str::to_owned).collect());
        for row in &self.rows {
            let mut cells = vec![row.name.clone()];
            let time = |name: &&str| row.times.get(*name).map_or("-".into(), |t| format!("{:.1}", t.median * 1e3));
            cells.extend(present.iter().map(time));
            cells.push(row.to_qemu.map_or("-".into(), |r| format!("{r:.2}")));
            cells.push(row.of_native.map_or("-".into(), |r| format!("{:.0} %", r * 100.0)));
            let spread = |t: &Times| format!("{:.1}-{:.1}", t.least * 1e3, t.most * 1e3);
            cells.push(row.times.get(JIT).map_or("-".into(), spread));
            line(cells);
        }
        for (index, (group, ratio)) in self.groups().into_iter().enumerate() {
            if index == 0 {
                let _ = writeln!(out, "\nQEMU's time to the compiler's, geometric means");
            }
            let _ = writeln!(out, "{group:24} {ratio:>13.2}");
        }
        for (contender, why) in &self.unavailable {
            let _ = writeln!(out, "\n{contender}: not available: {why}");
        }
        out
    }

    /// Everything, with what it was measured on.
    pub fn json(&self) -> String {
        let row = |row: &Row| {
            let time = |t: &Times| json!({"median": t.median, "least": t.least, "most": t.most});
            let times: BTreeMap<&str, Value> = row.times.iter().map(|(&name, t)| (name, time(t))).collect();
            json!({"program": row.name, "seconds": times, "qemu_to_jit": row.to_qemu, "native_to_jit": row.of_native})
        };
        let value = json!({
            "machine": machine(),
            "diglot": said("git", &["describe", "--always", "--dirty"]),
            "qemu": said("qemu-system-x86_64", &["--version"]),
            "rounds": self.rounds,
            "programs": self.rows.iter().map(row).collect::<Vec<_>>(),
            "groups": self.groups().into_iter().collect::<BTreeMap<_, _>>(),
            "unavailable": self.unavailable.iter().cloned().collect::<BTreeMap<_, _>>(),
        });
        format!("{value:#}\n")
    }
}

/// The first line that a command prints.
fn said(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    String::from_utf8_lossy(&output.stdout).lines().next().map(str::to_owned)
}

/// Processor, number of CPUs and kernel of this host.
fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": ").map(|(_, name)| name));
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = said("uname", &["-sr"]).unwrap_or_default();
    format!("{}, {cpus} CPUs, {kernel}", model.unwrap_or(std::env::consts::ARCH))
}
