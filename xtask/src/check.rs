//! `cargo xtask check`: tests under tools that see what a plain run does not. docs/sanitizers.md says what each sees.

use std::path::Path;
use std::process::{Command, ExitCode};

/// The tools.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum Tool {
    /// Interleavings of the threads that share the code cache, by loom: more of them than the plain tests look at.
    Model,
    /// Undefined behaviour, by Miri: the devices, and guests that are interpreted. Needs nightly Rust with `miri`.
    Miri,
    /// Memory errors, by AddressSanitizer: the tests, and guests that boot. Needs nightly Rust.
    Asan,
    /// Data races, by ThreadSanitizer: the same. Needs nightly Rust with `rust-src`.
    Tsan,
}

/// A run of cargo: environment, and arguments divided by spaces.
struct Step {
    environment: &'static [(&'static str, &'static str)],
    arguments: &'static [&'static str],
}

const MODEL: &[Step] = &[Step {
    environment: &[("LOOM_MAX_PREEMPTIONS", "3")],
    arguments: &["test --locked --release -p diglot-model -- --nocapture --test-threads 1"],
}];

/// Tree Borrows, as iced-x86's encoder, which writes the tests' guests, breaks the rules of the older model.
const MIRI_FLAGS: &[(&str, &str)] = &[
    ("MIRIFLAGS", "-Zmiri-disable-isolation -Zmiri-tree-borrows -Zmiri-permissive-provenance"),
    ("PROPTEST_CASES", "4"),
];

const MIRI: &[Step] = &[
    Step { environment: MIRI_FLAGS, arguments: &["+nightly miri test --locked -p diglot-devices"] },
    Step {
        environment: MIRI_FLAGS,
        arguments: &["+nightly miri test --locked -p diglot-translator --test system --test random_code"],
    },
];

/// What the sanitizers run.
const TESTS: &str = "-p diglot-translator -p diglot-runtime -p diglot-devices";
const GUEST: &str = "-p diglot -- run --backend jit";
const SMALL_CACHE: &str = "-p diglot -- run --backend jit --code-cache 1M";
const LOCKSTEP: &str = "-p diglot -- run --lockstep";

const ASAN_FLAGS: &[(&str, &str)] = &[("RUSTFLAGS", "-Zsanitizer=address")];
/// A target is named so that build scripts and macros are built without the sanitizer.
const ASAN_BUILD: &str = "--locked --target x86_64-unknown-linux-gnu --target-dir target/asan";

const ASAN: &[Step] = &[
    Step { environment: ASAN_FLAGS, arguments: &["+nightly test", ASAN_BUILD, TESTS] },
    Step { environment: ASAN_FLAGS, arguments: &["+nightly run", ASAN_BUILD, GUEST] },
    Step { environment: ASAN_FLAGS, arguments: &["+nightly run", ASAN_BUILD, SMALL_CACHE] },
    Step { environment: ASAN_FLAGS, arguments: &["+nightly run", ASAN_BUILD, LOCKSTEP] },
];

const TSAN_FLAGS: &[(&str, &str)] = &[("RUSTFLAGS", "-Zsanitizer=thread")];
/// The standard library has to be instrumented too, or its locks order nothing.
const TSAN_BUILD: &str = "-Zbuild-std --locked --target x86_64-unknown-linux-gnu --target-dir target/tsan";

const TSAN: &[Step] = &[
    Step { environment: TSAN_FLAGS, arguments: &["+nightly test", TSAN_BUILD, TESTS] },
    Step { environment: TSAN_FLAGS, arguments: &["+nightly run", TSAN_BUILD, GUEST] },
    Step { environment: TSAN_FLAGS, arguments: &["+nightly run", TSAN_BUILD, SMALL_CACHE] },
    Step { environment: TSAN_FLAGS, arguments: &["+nightly run", TSAN_BUILD, LOCKSTEP] },
];

/// Runs a tool's steps until one fails.
pub fn run(tool: Tool) -> ExitCode {
    let steps = match tool {
        Tool::Model => MODEL,
        Tool::Miri => MIRI,
        Tool::Asan => ASAN,
        Tool::Tsan => TSAN,
    };
    if steps.iter().all(done) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs a step, which is printed as a shell would take it; whether it succeeded.
fn done(step: &Step) -> bool {
    let set: String = step.environment.iter().map(|(name, value)| format!("{name}='{value}' ")).collect();
    let arguments = step.arguments.join(" ");
    println!("== {set}cargo {arguments}");
    // By rustup's name, as the cargo that runs this one may be of another toolchain.
    let mut cargo = Command::new("cargo");
    cargo.env_remove("RUSTUP_TOOLCHAIN").env_remove("CARGO").envs(step.environment.iter().copied());
    cargo.args(arguments.split(' ')).current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    match cargo.status() {
        Ok(status) if status.success() => true,
        Ok(status) => {
            eprintln!("failed: {status}");
            false
        }
        Err(e) => {
            eprintln!("cannot run cargo: {e}");
            false
        }
    }
}
