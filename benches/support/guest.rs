//! The programs of `benches/guest`, as what they are run as.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Builds them as one static executable, below Cargo's target directory.
pub fn build(target: &Path) -> Result<PathBuf, String> {
    const TRIPLE: &str = "x86_64-unknown-linux-gnu";
    let target = target.join("versus-guest");
    let status = Command::new(env!("CARGO"))
        .args(["build", "--release", "--locked", "--quiet", "-p", "diglot-bench-guest", "--target", TRIPLE])
        .arg("--target-dir")
        .arg(&target)
        // Without frame-pointer or CPU options of the caller's: every contender gets what distributions build.
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .stdin(Stdio::null())
        .status()
        .map_err(|e| format!("cargo: {e}"))?;
    if !status.success() {
        return Err(format!("the guest's programs do not build; they need Rust's {TRIPLE} target and its C library"));
    }
    Ok(target.join(TRIPLE).join("release/diglot-bench-guest"))
}
