//! The same programs under Diglot's engines, under QEMU and on the host itself, in turns.
//!
//! ```text
//! cargo bench --bench versus                          # all programs, 3 rounds
//! cargo bench --bench versus -- crc32 fork            # two of them
//! cargo bench --bench versus -- --rounds 7 --out DIR  # results to DIR instead of target/versus
//! ```
//!
//! The programs are `benches/guest`, one static executable that is init of an initial RAM disk (beside which the host's
//! C compiler proper stands for the one that compiles), under Debian's cloud
//! kernel with one CPU and 512 MiB. Times are what the guest's own clock says, power-on to init what the host's does.
//! A round runs every contender once, so that what else the host does falls on all of them. A time is the median over
//! all repetitions; a ratio is the median over rounds of the ratio of both contenders' medians in that round.
//!
//! A wrong result is an error, not a time. Results go to the terminal, to `versus.json` and to `versus.svg`.

mod chart;
mod contender;
#[path = "../support/guest.rs"]
mod guest;
#[path = "../support/initrd.rs"]
mod initrd;
mod report;
#[path = "../support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use contender::{CONTENDERS, Files, Outcome, Run};
use indicatif::{ProgressBar, ProgressStyle};

const ROUNDS: usize = 3;

/// What the command line asks for.
struct Options {
    programs: Vec<String>,
    rounds: usize,
    out: PathBuf,
}

impl Options {
    /// `None` when Cargo runs benches as tests, and nothing is to be measured.
    fn parse() -> Result<Option<Options>, String> {
        let out = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).with_file_name("versus");
        let mut options = Options { programs: Vec::new(), rounds: ROUNDS, out };
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
            match argument.as_str() {
                "--test" => return Ok(None),
                "--bench" => {}
                "--rounds" => {
                    options.rounds =
                        value()?.parse().ok().filter(|&n| n > 0).ok_or("--rounds needs a number from 1 on")?;
                }
                "--out" => options.out = value()?.into(),
                name if name.starts_with('-') => {
                    return Err(format!("{name}: no such option; there are --rounds and --out"));
                }
                name => options.programs.push(name.to_owned()),
            }
        }
        Ok(Some(options))
    }
}

fn main() -> ExitCode {
    match Options::parse().and_then(|options| options.map_or(Ok(ExitCode::SUCCESS), compare)) {
        Ok(code) => code,
        Err(why) => {
            eprintln!("versus: {why}");
            ExitCode::FAILURE
        }
    }
}

/// Everything that was measured, by contender and round.
pub type Results = BTreeMap<&'static str, Result<Vec<Run>, String>>;

fn compare(options: Options) -> Result<ExitCode, String> {
    let directory = tempfile::Builder::new()
        .prefix("diglot-versus-")
        .tempdir()
        .map_err(|e| format!("a directory for temporary files: {e}"))?;
    contender::end_on_signals(directory.path().to_owned());
    let program = guest::build(Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap_or(Path::new("target")))?;
    let programs = choose(&program, options.programs)?;
    let files = Files::prepare(directory.path(), program)?;

    let bar = ProgressBar::new((options.rounds * CONTENDERS.len()) as u64);
    let style = "{elapsed_precise} {bar:24} {pos}/{len} {msg}";
    bar.set_style(ProgressStyle::with_template(style).map_err(|e| e.to_string())?);
    let mut results: Results = CONTENDERS.iter().map(|c| (c.name, Ok(Vec::new()))).collect();
    let mut known: BTreeMap<String, String> = BTreeMap::new();
    for round in 1..=options.rounds {
        for contender in &CONTENDERS {
            bar.set_message(format!("round {round}: {}", contender.name));
            if let Some(Ok(runs)) = results.get_mut(contender.name) {
                match contender.run(&files, &programs) {
                    Outcome::Measured(run) => {
                        for (program, result) in &run.results {
                            let first = known.entry(program.clone()).or_insert_with(|| result.clone());
                            if first != result {
                                bar.abandon();
                                return Err(format!("{}: {program} comes to {result}, not to {first}", contender.name));
                            }
                        }
                        runs.push(run);
                    }
                    Outcome::Unavailable(why) => _ = results.insert(contender.name, Err(why)),
                    Outcome::Wrong(what) => {
                        bar.abandon();
                        return Err(format!("{}: {what}", contender.name));
                    }
                }
            }
            bar.inc(1);
        }
    }
    bar.finish_and_clear();

    let report = report::Report::new(&programs, &results);
    print!("{}", report.table());
    let write = |name: &str, content: &str| {
        let path = options.out.join(name);
        std::fs::create_dir_all(&options.out)
            .and_then(|()| std::fs::write(&path, content))
            .map_err(|e| format!("{}: {e}", path.display()))
    };
    write("versus.json", &report.json())?;
    write("versus.svg", &chart::draw(&report)?)?;
    println!("\nwritten: versus.json and versus.svg in {}", options.out.display());
    Ok(ExitCode::SUCCESS)
}

/// The programs to run, in the guest's order.
fn choose(guest: &PathBuf, wanted: Vec<String>) -> Result<Vec<String>, String> {
    let list = Command::new(guest).arg("list").output().map_err(|e| format!("{}: {e}", guest.display()))?;
    let all: Vec<String> = String::from_utf8_lossy(&list.stdout).lines().map(str::to_owned).collect();
    if let Some(name) = wanted.iter().find(|name| !all.contains(name)) {
        return Err(format!("{name}: no such program; there are {}", all.join(", ")));
    }
    Ok(if wanted.is_empty() { all } else { all.into_iter().filter(|name| wanted.contains(name)).collect() })
}
