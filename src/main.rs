//! Diglot: the command line.
//!
//! `args.rs` says what may be asked for, `run.rs` builds the machine and turns its end into an exit code. The rest is
//! what surrounds a guest on a host terminal: its console, signals, and where the `debian` guest comes from.

mod args;
mod console;
mod debian;
mod doctor;
mod run;
mod signals;
mod stats;
mod terminal;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use tracing_subscriber::EnvFilter;

use args::Parsed;

fn main() -> ExitCode {
    let args = match args::parse(std::env::args_os()) {
        Parsed::Run(args) => args,
        Parsed::Doctor { json } => return ExitCode::from(doctor::run(json)),
        Parsed::Exit(code) => return ExitCode::from(code),
    };
    // An invalid filter is no reason not to run the guest: what can be read of it counts.
    let filter = std::env::var("DIGLOT_LOG").unwrap_or_else(|_| "warn".into());
    let filter = EnvFilter::builder().parse_lossy(filter);
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| terminal::Stderr).init();

    terminal::restore_on_panic();
    if let Err(error) = signals::install() {
        terminal::say(&format!("cannot watch for signals: {error}"));
        return ExitCode::from(args::exit::FAILED);
    }
    // The panic's own message is on standard error already, behind a restored terminal.
    let code = catch_unwind(AssertUnwindSafe(|| run::run(&args))).unwrap_or(args::exit::FAILED);
    ExitCode::from(code)
}
