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

/// Contenders of which the page says how they scale, and the columns' titles.
const SCALING: [(&str, &str); 3] = [("jit", "scaling"), ("QEMU TCG", "QEMU's"), ("native", "native")];

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
    let present: Vec<&str> =
        CONTENDERS.into_iter().filter(|name| programs().any(|row| milliseconds(row, name).is_some())).collect();
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
    let several = |row: &Value| row["cpus"].as_u64().is_some_and(|cpus| cpus > 1);
    table(&mut out, &present, programs().filter(|row| !several(row)), &[]);
    if programs().any(several) {
        out.push_str(
            "\nWith two CPUs (QEMU: `thread=multi`). Scaling is how much more work two threads do than one in the same \
             time.\n\n",
        );
        table(&mut out, &present, programs().filter(|row| several(row)), &SCALING);
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

/// A table of programs; the contenders of `scaling` have a column that says how they scale.
fn table<'a>(out: &mut String, present: &[&str], rows: impl Iterator<Item = &'a Value>, scaling: &[(&str, &str)]) {
    let titles: String = scaling.iter().map(|(_, title)| format!(" {title} |")).collect();
    let _ = writeln!(out, "| program | {} | QEMU / jit | of native |{titles}", present.join(" | "));
    let _ = writeln!(out, "|---|{}--:|--:|{}", "--:|".repeat(present.len()), "--:|".repeat(scaling.len()));
    for row in rows {
        let time = |name: &&str| milliseconds(row, name).map_or("-".into(), |ms| format!("{ms:.1}"));
        let times: Vec<String> = present.iter().map(time).collect();
        let ratio = row["qemu_to_jit"].as_f64().map_or("-".into(), |r| format!("{r:.2}"));
        let share = row["native_to_jit"].as_f64().map_or("-".into(), |r| format!("{:.0} %", r * 100.0));
        let scales = |(name, _): &(&str, &str)| match row["scaling"][name].as_f64() {
            Some(times) => format!(" {times:.2} |"),
            None => " - |".into(),
        };
        let scales: String = scaling.iter().map(scales).collect();
        let name = row["program"].as_str().unwrap_or("?");
        let _ = writeln!(out, "| {name} | {} | {ratio} | {share} |{scales}", times.join(" | "));
    }
}

/// A contender's median.
fn milliseconds(row: &Value, name: &str) -> Option<f64> {
    row["seconds"][name]["median"].as_f64().map(|seconds| seconds * 1e3)
}
