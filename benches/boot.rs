//! Debian's kernel from power-on to the first line of init: Diglot's engines and QEMU's TCG, in turns.
//!
//! ```text
//! cargo bench --bench boot                  # 5 rounds
//! cargo bench --bench boot -- 11            # 11 rounds
//! ```
//!
//! All run the same kernel, initial RAM disk and command line with one CPU and 512 MiB. A round runs each once, so that
//! what else the host does falls on all of them; the ratio is the median over rounds of the time to QEMU's in the same
//! round. Memory is what is resident when the line appears, beyond the guest RAM that is.

mod support;

use std::io::{self, Read};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use support::{DIGLOT, Guard, export_debian, median};

/// What init prints first.
const FIRST_LINE: &[u8] = b"Debian kernel ";
const ROUNDS: usize = 5;
const MIB: f64 = (1 << 20) as f64;

/// One of the monitors that are compared.
struct Contender {
    name: &'static str,
    program: &'static str,
    options: &'static [&'static str],
}

const CONTENDERS: [Contender; 3] = [
    Contender {
        name: "QEMU TCG, one thread",
        program: "qemu-system-x86_64",
        options: &["-accel", "tcg,thread=single", "-cpu", "max", "-smp", "1", "-m", "512", "-nographic", "-no-reboot"],
    },
    Contender {
        name: "diglot --backend jit",
        program: DIGLOT,
        options: &["run", "--memory", "512M", "--backend", "jit"],
    },
    Contender {
        name: "diglot --backend interp",
        program: DIGLOT,
        options: &["run", "--memory", "512M", "--backend", "interp"],
    },
];

/// One run's time in seconds, and its memory in bytes if the host tells.
struct Run {
    seconds: f64,
    beyond: Option<f64>,
}

/// Boots once.
fn run(contender: &Contender, kernel: &Path, initrd: &Path) -> Result<Run, String> {
    // Single- and double-dash options differ.
    let dashes = if contender.program == DIGLOT { "--" } else { "-" };
    let mut command = Command::new(contender.program);
    command.args(contender.options);
    command.arg(format!("{dashes}kernel")).arg(kernel).arg(format!("{dashes}initrd")).arg(initrd);
    command.arg(format!("{dashes}append")).arg("console=ttyS0");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let start = Instant::now();
    let mut child = Guard(command.spawn().map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => format!("{} is not installed", contender.program),
        _ => format!("{}: {e}", contender.program),
    })?);
    let mut output = child.0.stdout.take().ok_or("no output")?;
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    while !seen.windows(FIRST_LINE.len()).any(|window| window == FIRST_LINE) {
        match output.read(&mut buffer).map_err(|e| e.to_string())? {
            0 => return Err(format!("it ended before init's first line; its last words: {}", last_line(&seen))),
            n => {
                // The line may lie across two pieces of output.
                let keep = seen.len().saturating_sub(4096);
                seen.drain(..keep);
                seen.extend(&buffer[..n]);
            }
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    Ok(Run { seconds, beyond: beyond_guest_ram(child.0.id()) })
}

fn last_line(output: &[u8]) -> String {
    String::from_utf8_lossy(output).lines().last().unwrap_or("(none)").to_owned()
}

/// Resident bytes beyond guest RAM, which is the largest mapping. Memory for code that is mapped a second time to be
/// executed counts once.
fn beyond_guest_ram(pid: u32) -> Option<f64> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
    let first_lines = smaps.lines().filter(|line| line.split(' ').nth(1).is_some_and(is_mode));
    let mappings = first_lines.zip(field(&smaps, "Size:").zip(field(&smaps, "Rss:")));
    let mappings: Vec<(u64, u64)> = mappings.filter(|(line, _)| !line.contains(" r-xs ")).map(|(_, m)| m).collect();
    let all: u64 = mappings.iter().map(|(_, resident)| resident).sum();
    let (_, guest) = mappings.iter().max()?;
    Some((all - guest) as f64 * 1024.0)
}

/// Whether a word says what may be done in a mapping, as `r-xs`.
fn is_mode(word: &str) -> bool {
    word.len() == 4 && word.chars().zip(["r", "w", "x", "sp"]).all(|(c, name)| c == '-' || name.contains(c))
}

/// A field of every mapping, in KiB.
fn field<'a>(smaps: &'a str, name: &'a str) -> impl Iterator<Item = u64> + 'a {
    let value = move |line: &str| line.strip_prefix(name)?.trim().strip_suffix("kB")?.trim().parse().ok();
    smaps.lines().filter_map(value)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // Cargo runs benches in test mode too, where nothing is measured.
    if arguments.iter().any(|a| a == "--test") {
        return ExitCode::SUCCESS;
    }
    let rounds = arguments.iter().find_map(|a| a.parse().ok()).filter(|&n| n > 0).unwrap_or(ROUNDS);
    let directory = std::env::temp_dir().join(format!("diglot-bench-{}", std::process::id()));
    if !export_debian(&directory) {
        println!("not available: Debian's kernel, for the reason above");
        return ExitCode::SUCCESS;
    }
    let (kernel, initrd) = (directory.join("vmlinuz"), directory.join("initrd"));
    let mut results: [Result<Vec<Run>, String>; CONTENDERS.len()] = std::array::from_fn(|_| Ok(Vec::new()));
    for round in 1..=rounds {
        for (contender, result) in CONTENDERS.iter().zip(&mut results) {
            if let Ok(runs) = result {
                eprintln!("round {round} of {rounds}: {}", contender.name);
                match run(contender, &kernel, &initrd) {
                    Ok(run) => runs.push(run),
                    Err(why) => *result = Err(why),
                }
            }
        }
    }
    let _ = std::fs::remove_dir_all(&directory);
    print(&results);
    ExitCode::SUCCESS
}

fn print(results: &[Result<Vec<Run>, String>]) {
    println!(
        "{:26} {:>9} {:>17} {:>9} {:>18}",
        "power-on to init", "median s", "least to most", "to QEMU", "MiB beyond guest"
    );
    let qemu = results[0].as_ref().ok();
    for (contender, result) in CONTENDERS.iter().zip(results) {
        let runs = match result {
            Ok(runs) => runs,
            Err(why) => {
                println!("{:26} not available: {why}", contender.name);
                continue;
            }
        };
        let seconds = || runs.iter().map(|run| run.seconds);
        let spread = format!("{:.2}–{:.2}", seconds().fold(f64::MAX, f64::min), seconds().fold(0.0, f64::max));
        let pairs = qemu.into_iter().flatten().zip(runs);
        let ratio = median(pairs.map(|(qemu, run)| run.seconds / qemu.seconds));
        let beyond = median(runs.iter().filter_map(|run| run.beyond));
        let number = |value: Option<f64>, digits| value.map_or("-".into(), |v| format!("{v:.digits$}"));
        println!(
            "{:26} {:>9} {spread:>17} {:>9} {:>18}",
            contender.name,
            number(median(seconds()), 2),
            number(ratio, 2),
            number(beyond.map(|b| b / MIB), 1)
        );
    }
}
