//! `cargo xtask benchmarks`: runs the comparison with QEMU and writes BENCHMARKS.md from what it measured.

use std::fmt::Write;
use std::path::Path;
use std::process::{Command, ExitCode};

use serde_json::Value;

const PAGE: &str = "BENCHMARKS.md";
const CHART: &str = "docs/versus.svg";
/// Where the comparison leaves its results.
const RESULTS: &str = "target/versus";
/// Columns, in the order of the page.
const CONTENDERS: [&str; 6] = ["native", "kvm", "jit", "QEMU TCG", "interp", "QEMU KVM"];

/// Measures for `rounds` rounds, or takes the last measurement's results, and writes the page.
pub fn run(rounds: Option<u32>) -> ExitCode {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    match write(&root, rounds) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("cannot write {PAGE}: {why}");
            ExitCode::FAILURE
        }
    }
}

fn write(root: &Path, rounds: Option<u32>) -> Result<(), String> {
    if let Some(rounds) = rounds {
        let mut bench = Command::new(env!("CARGO"));
        bench.current_dir(root).args(["bench", "--locked", "--bench", "versus", "--", "--rounds", &rounds.to_string()]);
        if !bench.status().is_ok_and(|status| status.success()) {
            return Err("the comparison has failed".into());
        }
    }
    let results = root.join(RESULTS);
    let text = std::fs::read_to_string(results.join("versus.json"))
        .map_err(|e| format!("{RESULTS}/versus.json: {e}; measure with --rounds 5"))?;
    let value = serde_json::from_str(&text).map_err(|e| format!("{RESULTS}/versus.json: {e}"))?;
    std::fs::write(root.join(PAGE), page(&value)).map_err(|e| e.to_string())?;
    std::fs::copy(results.join("versus.svg"), root.join(CHART)).map_err(|e| format!("{CHART}: {e}"))?;
    Ok(())
}

fn page(value: &Value) -> String {
    let text = |key: &str| value[key].as_str().unwrap_or("unknown").to_owned();
    let programs = || value["programs"].as_array().into_iter().flatten();
    let seconds = |row: &Value, name: &str| row["seconds"][name]["median"].as_f64();
    let present: Vec<&str> =
        CONTENDERS.into_iter().filter(|name| programs().any(|row| seconds(row, name).is_some())).collect();
    let mut out = format!(
        "# Benchmarks\n\nWritten by `cargo xtask benchmarks` from what `cargo bench --bench versus` measured; what the \
         programs do is in\n`benches/guest`. Times are medians in milliseconds. The column \"QEMU / jit\" is the median \
         over rounds of QEMU's time\nto that of Diglot's compiler in the same round: above 1, Diglot is faster.\n\n\
         - Machine: {}\n- Diglot: {}\n- QEMU: {}\n- Rounds: {}\n\n![QEMU's time to the compiler's]({CHART})\n\n",
        text("machine"),
        text("diglot"),
        text("qemu"),
        value["rounds"]
    );
    let _ = writeln!(out, "| program | {} | QEMU / jit | of native |", present.join(" | "));
    let _ = writeln!(out, "|---|{}--:|--:|", "--:|".repeat(present.len()));
    for row in programs() {
        let time = |name: &&str| seconds(row, name).map_or("-".into(), |s| format!("{:.1}", s * 1e3));
        let times: Vec<String> = present.iter().map(time).collect();
        let ratio = row["qemu_to_jit"].as_f64().map_or("-".into(), |r| format!("{r:.2}"));
        let share = row["native_to_jit"].as_f64().map_or("-".into(), |r| format!("{:.0} %", r * 100.0));
        let _ =
            writeln!(out, "| {} | {} | {ratio} | {share} |", row["program"].as_str().unwrap_or("?"), times.join(" | "));
    }
    let _ = writeln!(out, "\n| group (geometric mean) | QEMU / jit |\n|---|--:|");
    for (group, ratio) in value["groups"].as_object().into_iter().flatten() {
        let _ = writeln!(out, "| {group} | {:.2} |", ratio.as_f64().unwrap_or(0.0));
    }
    for (contender, why) in value["unavailable"].as_object().into_iter().flatten() {
        let _ = writeln!(out, "\n{contender} was not available: {}.", why.as_str().unwrap_or("unknown"));
    }
    out
}
