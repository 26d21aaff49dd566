//! What the comparisons with other monitors share.

use std::path::Path;
use std::process::{Child, Command, Stdio};

/// The program that is compared.
pub const DIGLOT: &str = env!("CARGO_BIN_EXE_diglot");

/// Ends with its run, whatever becomes of that.
pub struct Guard(pub Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Writes Debian's kernel and initial RAM disk (vmlinuz, initrd) to a directory; where that fails, Diglot says why.
pub fn export_debian(directory: &Path) -> bool {
    let mut command = Command::new(DIGLOT);
    command.args(["run", "debian", "--export"]).arg(directory).stdin(Stdio::null()).stdout(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// The median; `None` of nothing.
pub fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 0 => Some((values[middle - 1] + values[middle]) / 2.0),
        _ => Some(values[middle]),
    }
}
