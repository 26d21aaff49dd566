//! `cargo xtask fuzz`: builds a target of `fuzz/` with coverage and runs it, on stable Rust and without cargo-fuzz.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// The targets, in the order in which they run.
const TARGETS: [&str; 4] = ["translate", "engines", "kernels", "devices"];
/// What to run.
#[derive(clap::Args)]
pub struct Options {
    /// translate, engines, kernels or devices; all of them, one after the other, if not given.
    target: Option<String>,
    /// Inputs to run once each, such as a finding, instead of looking for new ones.
    inputs: Vec<PathBuf>,
    /// Ends the search for new inputs.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Further options, as libFuzzer takes them.
    #[arg(last = true)]
    libfuzzer: Vec<String>,
}

/// Exits with 0 if nothing was found, 1 if something was, 2 if a target could not be run.
pub fn run(options: &Options) -> ExitCode {
    let targets = match &options.target {
        None => TARGETS.to_vec(),
        Some(name) => TARGETS.into_iter().filter(|t| t == name).collect(),
    };
    if targets.is_empty() {
        eprintln!("there is no such target; there are {}", TARGETS.join(", "));
        return ExitCode::from(2);
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("");
    let programs = match build(&root) {
        Ok(programs) => programs,
        Err(why) => {
            eprintln!("{why}");
            return ExitCode::from(2);
        }
    };
    for target in targets {
        println!("\n{target}:");
        let found = start(&root.join("fuzz"), &programs.join(target), target, options);
        match found {
            Ok(false) => {}
            Ok(true) => return ExitCode::FAILURE,
            Err(why) => {
                eprintln!("cannot run {target}: {why}");
                return ExitCode::from(2);
            }
        }
    }
    ExitCode::SUCCESS
}

/// Builds all targets, and says where they are. What is not Diglot's own is shared with the release build.
fn build(root: &Path) -> Result<PathBuf, String> {
    let cargo = std::env::var_os("CARGO").unwrap_or("cargo".into());
    let status = Command::new(cargo)
        .current_dir(root)
        .args(["build", "--release", "--locked", "-p", "diglot-fuzz", "--features", "libfuzzer", "--bins"])
        .env("RUSTC_WORKSPACE_WRAPPER", root.join("fuzz/rustc.sh"))
        .status()
        .map_err(|e| format!("cannot run cargo: {e}"))?;
    if !status.success() {
        return Err("the targets were not built; they need a C++ compiler beside Rust".into());
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    Ok(target.join("release"))
}

/// Runs one target, and says whether it found anything.
fn start(fuzz: &Path, program: &Path, target: &str, options: &Options) -> std::io::Result<bool> {
    let (corpus, artifacts) = (fuzz.join("corpus").join(target), fuzz.join("artifacts").join(target));
    std::fs::create_dir_all(&corpus)?;
    std::fs::create_dir_all(&artifacts)?;
    let mut command = Command::new(program);
    command.arg(format!("-artifact_prefix={}/", artifacts.display()));
    command.args(["-timeout=25", "-rss_limit_mb=1024", "-print_final_stats=1"]);
    if options.inputs.is_empty() {
        command.arg(format!("-max_total_time={}", options.seconds)).args(["-max_len=4096", "-reload=0"]);
        let dictionary = fuzz.join("dictionaries").join(format!("{target}.dict"));
        if dictionary.exists() {
            command.arg(format!("-dict={}", dictionary.display()));
        }
        // New inputs go to the first directory.
        command.args(&options.libfuzzer).arg(corpus).arg(fuzz.join("seeds").join(target));
    } else {
        command.args(&options.libfuzzer).args(&options.inputs);
    }
    Ok(!command.status()?.success())
}
