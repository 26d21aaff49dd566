//! `cargo xtask stress`: the stress program of `benches/guest` as init of a guest with several CPUs.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use crate::{guest, initrd};

/// What to run, and for how long.
#[derive(clap::Args)]
pub struct Options {
    /// CPUs of the guest.
    #[arg(long, default_value_t = 4)]
    cpus: u8,
    /// How long the guest's programs go on.
    #[arg(long, default_value_t = 1800)]
    seconds: u64,
    /// What executes guest code, as `diglot run` takes it.
    #[arg(long, default_value = "jit")]
    backend: String,
    /// Parts to run, by the names that the guest's lines have; all of them if none is given.
    parts: Vec<String>,
    /// Further options of `diglot run`.
    #[arg(last = true)]
    options: Vec<String>,
}

/// The guest's time to boot and to end what it has begun; the interpreter needs most of it.
const GRACE: u64 = 300;

/// Exits with 0 if all went well, 1 if something was wrong, 2 if the guest could not be started.
pub fn run(options: &Options) -> ExitCode {
    match start(options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("cannot run the stress program: {why}");
            ExitCode::from(2)
        }
    }
}

/// Builds all that is needed, runs the guest, and says whether all went well.
fn start(options: &Options) -> Result<bool, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("");
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let mut build = Command::new(env!("CARGO"));
    build.current_dir(&root).args(["build", "--release", "--locked", "--bin", "diglot"]);
    if !build.status().is_ok_and(|status| status.success()) {
        return Err("Diglot does not build".into());
    }
    let init = guest::build(&target)?;
    let (diglot, directory) = (target.join("release/diglot"), target.join("stress"));
    let mut export = Command::new(&diglot);
    export.args(["run", "debian", "--export"]).arg(&directory).stdin(Stdio::null()).stdout(Stdio::null());
    if !export.status().is_ok_and(|status| status.success()) {
        return Err("there is no kernel for the guest, for the reason above".into());
    }
    let image = directory.join("stress.cpio");
    let init = std::fs::read(&init).map_err(|e| format!("{}: {e}", init.display()))?;
    std::fs::write(&image, initrd::archive(&init, &[])).map_err(|e| format!("{}: {e}", image.display()))?;

    let mut command = Command::new(&diglot);
    command.args(["run", "--memory", "1G", "--no-reboot", "--backend", &options.backend]);
    command.args(["--cpus", &options.cpus.to_string(), "--timeout", &(options.seconds + GRACE).to_string()]);
    command.arg("--kernel").arg(directory.join("vmlinuz")).arg("--initrd").arg(&image);
    // What is behind the dashes goes to init.
    let work = format!("console=ttyS0 quiet panic=-1 -- stress {} {}", options.seconds, options.parts.join(" "));
    command.arg("--append").arg(work).args(&options.options);
    follow(&mut command)
}

/// Shows what the guest says. It switches itself off only after `stress ok`; without that it has stopped for another
/// reason.
fn follow(command: &mut Command) -> Result<bool, String> {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().map_err(|e| format!("cannot start Diglot: {e}"))?;
    let mut well = false;
    for line in child.stdout.take().into_iter().flat_map(|out| BufReader::new(out).split(b'\n').map_while(Result::ok)) {
        let line = String::from_utf8_lossy(&line);
        well |= line.trim_end() == "stress ok";
        println!("{}", line.trim_end());
    }
    let status = child.wait().map_err(|e| e.to_string())?;
    if !well || !status.success() {
        println!("the guest did not end well: Diglot's {status}");
    }
    Ok(well && status.success())
}
