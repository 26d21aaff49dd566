//! The same programs under Diglot's engines, under QEMU and on the host itself, in turns.
//!
//! ```text
//! cargo bench --bench versus                          # all programs, 3 rounds
//! cargo bench --bench versus -- crc32 fork            # two of them
//! cargo bench --bench versus -- smp                   # those for two CPUs
//! cargo bench --bench versus -- --rounds 7 --out DIR  # results to DIR instead of target/versus
//! ```
//!
//! The programs are `benches/guest`, one static executable that is init of an initial RAM disk (beside which the host's
//! C compiler proper stands for the one that compiles), under Debian's cloud
//! kernel with one CPU and 512 MiB; those of its `smp.rs` with two CPUs, QEMU's TCG with a thread for each. Times are what the guest's own clock says, power-on to init what the host's does.
//! A round runs every contender once, so that what else the host does falls on all of them. A time is the median over
//! all repetitions; a ratio is the median over rounds of the ratio of both contenders' medians in that round.
//!
//! Where two programs do the same work by one thread and by two, the second's row says how they scale: how much more work
//! is done in the same time.
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

use contender::{CONTENDERS, Contender, Files, Outcome, Run};
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

/// Everything that was measured of a section, by contender and round.
pub type Results = BTreeMap<&'static str, Result<Vec<Run>, String>>;

/// Programs that run in guests of the same kind.
pub struct Section {
    /// CPUs of the guests.
    pub cpus: u8,
    /// The programs, in the guest's order.
    pub programs: Vec<String>,
    /// What came of them.
    pub results: Results,
}

fn compare(options: Options) -> Result<ExitCode, String> {
    let directory = tempfile::Builder::new()
        .prefix("diglot-versus-")
        .tempdir()
        .map_err(|e| format!("a directory for temporary files: {e}"))?;
    contender::end_on_signals(directory.path().to_owned());
    let program = guest::build(Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap_or(Path::new("target")))?;
    let mut sections = choose(&program, &options.programs)?;
    let files = Files::prepare(directory.path(), program)?;

    let bar = ProgressBar::new((options.rounds * CONTENDERS.len() * sections.len()) as u64);
    let style = "{elapsed_precise} {bar:24} {pos}/{len} {msg}";
    bar.set_style(ProgressStyle::with_template(style).map_err(|e| e.to_string())?);
    let mut known = BTreeMap::new();
    for round in 1..=options.rounds {
        for section in &mut sections {
            for contender in &CONTENDERS {
                bar.set_message(format!("round {round}: {}", contender.name));
                if let Err(why) = measure(contender, &files, section, &mut known) {
                    bar.abandon();
                    return Err(format!("{}: {why}", contender.name));
                }
                bar.inc(1);
            }
        }
    }
    bar.finish_and_clear();

    let report = report::Report::new(&sections);
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

/// Runs a section's programs under one contender, unless it has turned out not to be available for these.
fn measure(
    contender: &Contender,
    files: &Files,
    section: &mut Section,
    known: &mut BTreeMap<String, String>,
) -> Result<(), String> {
    let Some(Ok(runs)) = section.results.get_mut(contender.name) else { return Ok(()) };
    match contender.run(files, &section.programs, section.cpus) {
        Outcome::Measured(run) => {
            for (program, result) in &run.results {
                let first = known.entry(program.clone()).or_insert_with(|| result.clone());
                if first != result {
                    return Err(format!("{program} comes to {result}, not to {first}"));
                }
            }
            runs.push(run);
        }
        Outcome::Unavailable(why) => _ = section.results.insert(contender.name, Err(why)),
        Outcome::Wrong(what) => return Err(what),
    }
    Ok(())
}

/// What stands for all programs for several CPUs.
const SMP: &str = "smp";

/// The programs to run, by the CPUs they are for; all if none are named.
fn choose(guest: &PathBuf, wanted: &[String]) -> Result<Vec<Section>, String> {
    let list = |arguments: &[&str]| -> Result<Vec<String>, String> {
        let list = Command::new(guest).args(arguments).output().map_err(|e| format!("{}: {e}", guest.display()))?;
        Ok(String::from_utf8_lossy(&list.stdout).lines().map(str::to_owned).collect())
    };
    let (one, several) = (list(&["list"])?, list(&["list", SMP])?);
    let there_is = |name: &str| name == SMP || one.iter().chain(&several).any(|program| program == name);
    if let Some(name) = wanted.iter().find(|name| !there_is(name)) {
        return Err(format!("{name}: no such program; there are {}, {SMP}: {}", one.join(", "), several.join(", ")));
    }
    let named = |name: &str| wanted.is_empty() || wanted.iter().any(|wanted| wanted == name);
    let sections = [(1, one), (2, several)].into_iter().map(|(cpus, mut programs)| {
        programs.retain(|name| named(name) || cpus > 1 && named(SMP));
        Section { cpus, programs, results: CONTENDERS.iter().map(|c| (c.name, Ok(Vec::new()))).collect() }
    });
    Ok(sections.filter(|section| !section.programs.is_empty()).collect())
}
