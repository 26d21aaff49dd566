//! What was measured, as a table and as JSON.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::process::Command;

use serde_json::{Value, json};

use crate::contender::{BOOT, C_COMPILE, CONTENDERS, JIT, NATIVE, QEMU, Run};
use crate::support::median;
use crate::{Results, Section};

/// Programs that are judged together, by the geometric mean of their ratios to QEMU.
const GROUPS: [(&str, &[&str]); 13] = [
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
    ("two CPUs, work", &["two-computes", "parallel-sort", "parallel-make"]),
    ("two CPUs, with each other", &["contended", "ping-pong-cpus", "shootdown"]),
];

/// Programs of two threads, those that do such work by one, and how much of it the former do.
const PAIRS: [(&str, &str, f64); 3] =
    [("two-computes", "one-compute", 2.0), ("parallel-sort", "one-sort", 1.0), ("parallel-make", "one-make", 1.0)];

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
    /// CPUs of the guests.
    cpus: u8,
    /// How much more work two threads do than one in the same time, by contender.
    scaling: BTreeMap<&'static str, f64>,
}

/// The whole comparison.
pub struct Report {
    /// A row for each program.
    pub rows: Vec<Row>,
    unavailable: BTreeMap<String, String>,
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

impl Row {
    fn new(name: &str, section: &Section) -> Row {
        let results = &section.results;
        let pair = PAIRS.iter().find(|pair| pair.0 == name);
        let scaling = |contender| {
            let (_, one, work) = pair?;
            let runs = results.get(contender)?.as_ref().ok()?.iter();
            let of = |run: &Run, program| median(run.seconds.get(program)?.iter().copied());
            let each = median(runs.filter_map(|run| Some(work * of(run, *one)? / of(run, name)?)))?;
            Some((contender, each))
        };
        Row {
            name: name.to_owned(),
            times: results
                .iter()
                .filter_map(|(&contender, runs)| Some((contender, times(runs.as_ref().ok()?, name)?)))
                .collect(),
            to_qemu: ratio(results, name, QEMU, JIT),
            of_native: ratio(results, name, NATIVE, JIT),
            cpus: section.cpus,
            scaling: CONTENDERS.iter().filter_map(|c| scaling(c.name)).collect(),
        }
    }
}

impl Report {
    /// The report of all sections; with one CPU, of the time to init as well.
    pub fn new(sections: &[Section]) -> Report {
        let rows = sections.iter().flat_map(|section| {
            let boot = (section.cpus == 1).then_some(BOOT);
            section.programs.iter().map(String::as_str).chain(boot).map(|name| Row::new(name, section))
        });
        let reasons = sections.iter().flat_map(|section| {
            let more = if section.cpus > 1 { format!(" with {} CPUs", section.cpus) } else { String::new() };
            let reasons = section.results.iter().filter_map(|(name, runs)| Some((name, runs.as_ref().err()?)));
            reasons.map(move |(name, why)| (format!("{name}{more}"), why.clone()))
        });
        let runs = sections.iter().flat_map(|section| section.results.values().flatten());
        let rounds = runs.map(Vec::len).max().unwrap_or(0);
        Report { rows: rows.collect(), unavailable: reasons.collect(), rounds }
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

    /// For the terminal: milliseconds, ratios and spread; rows for several CPUs also say how they scale.
    pub fn table(&self) -> String {
        let mut out = String::new();
        let (one, several): (Vec<&Row>, Vec<&Row>) = self.rows.iter().partition(|row| row.cpus == 1);
        self.section(&mut out, &one, &[]);
        if !one.is_empty() && !several.is_empty() {
            out.push('\n');
        }
        self.section(&mut out, &several, &[(JIT, "scaling"), (QEMU, "QEMU scales"), (NATIVE, "native scales")]);
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

    /// Rows, and a head above; `scaling` are contenders, and what the columns are called that say how these scale.
    fn section(&self, out: &mut String, rows: &[&Row], scaling: &[(&str, &str)]) {
        let Some(first) = rows.first() else { return };
        let present = self.present();
        let mut line = |cells: Vec<String>| {
            let first = cells.first().cloned().unwrap_or_default();
            let rest = cells.iter().skip(1).map(|cell| format!(" {cell:>13}")).collect::<String>();
            let _ = writeln!(out, "{first:24}{rest}");
        };
        let title = if first.cpus > 1 { format!("milliseconds, {} CPUs", first.cpus) } else { "milliseconds".into() };
        let mut head = vec![title.as_str()];
        head.extend(&present);
        head.extend(["QEMU / jit", "of native"]);
        head.extend(scaling.iter().map(|(_, title)| title));
        head.push("jit spread");
        line(head.into_iter().map(str::to_owned).collect());
        for row in rows {
            let mut cells = vec![row.name.clone()];
            let time = |name: &&str| row.times.get(*name).map_or("-".into(), |t| format!("{:.1}", t.median * 1e3));
            cells.extend(present.iter().map(time));
            cells.push(row.to_qemu.map_or("-".into(), |r| format!("{r:.2}")));
            cells.push(row.of_native.map_or("-".into(), |r| format!("{:.0} %", r * 100.0)));
            let scales = |(name, _): &(&str, &str)| row.scaling.get(name).map_or("-".into(), |s| format!("{s:.2}"));
            cells.extend(scaling.iter().map(scales));
            let spread = |t: &Times| format!("{:.1}-{:.1}", t.least * 1e3, t.most * 1e3);
            cells.push(row.times.get(JIT).map_or("-".into(), spread));
            line(cells);
        }
    }

    /// Everything, with what it was measured on.
    pub fn json(&self) -> String {
        let row = |row: &Row| {
            let time = |t: &Times| json!({"median": t.median, "least": t.least, "most": t.most});
            let times: BTreeMap<&str, Value> = row.times.iter().map(|(&name, t)| (name, time(t))).collect();
            let mut value = json!({
                "program": row.name, "seconds": times, "qemu_to_jit": row.to_qemu, "native_to_jit": row.of_native,
                "cpus": row.cpus,
            });
            if !row.scaling.is_empty() {
                value["scaling"] = json!(row.scaling);
            }
            value
        };
        let value = json!({
            "machine": machine(),
            "diglot": said("git", &["describe", "--always", "--dirty"]),
            "qemu": said("qemu-system-x86_64", &["--version"]),
            "rounds": self.rounds,
            "programs": self.rows.iter().map(row).collect::<Vec<_>>(),
            "groups": self.groups().into_iter().collect::<BTreeMap<_, _>>(),
            "unavailable": self.unavailable,
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
