//! `cargo xtask record`: translator/src/testing/record/recorded.txt, what this host's processor does, for the tests of
//! hosts that have none to ask.

use std::process::ExitCode;

use diglot_translator::testing::record;

/// What to do.
#[derive(clap::Args)]
pub struct Options {
    /// Write nothing; exit with 1 if something is not as recorded.
    #[arg(long)]
    check: bool,
    /// Print the outcomes of a code, interpreted on this host, to be compared with another host's.
    #[arg(long, value_name = "CODE", conflicts_with = "check")]
    show: Option<String>,
}

/// Exits with 0 if all is well, 1 if not, 2 where there is no processor to ask.
pub fn run(options: &Options) -> ExitCode {
    if let Some(name) = &options.show {
        return match record::show(name) {
            Ok(text) => {
                print!("{text}");
                ExitCode::SUCCESS
            }
            Err(why) => fail(&why),
        };
    }
    write(options.check)
}

fn fail(why: &str) -> ExitCode {
    eprintln!("{why}");
    ExitCode::FAILURE
}

#[cfg(target_arch = "x86_64")]
fn write(check: bool) -> ExitCode {
    const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../translator/src/testing/record/recorded.txt");
    let recording = match record::record() {
        Ok(Some(recording)) => recording,
        Ok(None) => return ExitCode::from(2),
        Err(why) => return fail(&why),
    };
    let unexplained = recording.unexplained();
    if !unexplained.is_empty() {
        let n = unexplained.len();
        return fail(&format!(
            "{}\n{n} cases differ, and nothing explains it: nothing is recorded",
            unexplained.join("\n")
        ));
    }
    let text = recording.text();
    if check {
        let differing = recording.compare(record::TEXT);
        return match differing {
            Ok(lines) if lines.is_empty() => ExitCode::SUCCESS,
            Ok(lines) => fail(&format!("not as recorded:\n{}", lines.join("\n"))),
            Err(why) => fail(&why),
        };
    }
    match std::fs::write(FILE, text) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => fail(&format!("{FILE}: {e}")),
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn write(_: bool) -> ExitCode {
    eprintln!("skipped: this host is no x86-64 processor to record");
    ExitCode::from(2)
}
