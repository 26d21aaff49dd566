//! The project's own chores, `cargo xtask`.

mod benchmarks;
mod check;
mod counts;
mod coverage;
mod fuzz;
#[path = "../../benches/support/guest.rs"]
mod guest;
#[path = "../../benches/support/initrd.rs"]
mod initrd;
mod record;
mod silicon;
mod stress;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The project's own chores.
#[derive(Parser)]
#[command(name = "cargo xtask", disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs tests under a tool that sees what a plain run does not.
    Check {
        /// The tool.
        tool: check::Tool,
    },
    /// Compares speed with QEMU's and writes BENCHMARKS.md; takes minutes, and the machine should have nothing else to do.
    Benchmarks {
        /// Measure for so many rounds; without it the page is written from the last measurement.
        #[arg(long)]
        rounds: Option<u32>,
    },
    /// Writes docs/isa-coverage.md: which instructions are compiled, done by helper, and undefined.
    Coverage {
        /// Write nothing; exit with 1 if the page is not what would be written.
        #[arg(long)]
        check: bool,
    },
    /// Writes benches/counts.txt: what compiled code costs in host instructions, bytes and helper calls, free of noise.
    Counts {
        /// Write nothing; exit with 1 if something costs more than the page says, or much less.
        #[arg(long)]
        check: bool,
    },
    /// Compares random programs on both engines with this host's processor, until one differs.
    Silicon(silicon::Options),
    /// Writes translator/src/testing/record/recorded.txt: what this host's x86-64 processor does, for the tests of hosts
    /// that are none.
    Record(record::Options),
    /// Looks for inputs that make a part of Diglot panic, hang or differ from itself (docs/fuzzing.md).
    Fuzz(fuzz::Options),
    /// Boots a guest with several CPUs whose programs check everything that CPUs share (docs/debugging.md).
    Stress(stress::Options),
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Check { tool } => check::run(tool),
        Command::Benchmarks { rounds } => benchmarks::run(rounds),
        Command::Coverage { check } => coverage::run(check),
        Command::Counts { check } => counts::run(check),
        Command::Silicon(options) => silicon::run(&options),
        Command::Record(options) => record::run(&options),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Stress(options) => stress::run(&options),
    }
}
