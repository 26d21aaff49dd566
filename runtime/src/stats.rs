//! What a run cost, for `--stats`.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::footprint::Footprint;

/// A row of the report: its heading or what is counted.
enum Row {
    Heading(&'static str),
    Count(&'static str, &'static str),
}

use Row::{Count, Heading};

/// Every counter, by the name that an engine or the machine gives it, and what the report says instead of the name.
const ROWS: [Row; 58] = [
    Heading("guest instructions"),
    Count("interpreted", "interpreted"),
    Count("stepped", "of these, one by one"),
    Count("compiled", "compiled"),
    Heading("blocks of the interpreter"),
    Count("blocks_decoded", "decoded"),
    Count("blocks_run", "run"),
    Count("blocks_invalidated", "invalidated"),
    Count("block_cache_flushes", "block cache emptied for size"),
    Heading("compiler"),
    Count("quick_blocks", "blocks with quick code"),
    Count("quick_bytes", "host code bytes of it"),
    Count("quick_nanos", "time to make it in nanoseconds"),
    Count("regions", "regions compiled"),
    Count("region_blocks", "guest blocks in them"),
    Count("region_guest_bytes", "guest bytes in them"),
    Count("region_code_bytes", "host code bytes of them"),
    Count("compile_nanos", "compile time in nanoseconds"),
    Count("regions_dropped", "overwritten before they were ready"),
    Count("regions_invalidated", "overwritten afterwards"),
    Count("regions_evicted", "evicted for size"),
    Count("regions_failed", "not compiled"),
    Count("accesses_straying", "accesses that look elsewhere now"),
    Heading("exits of guest code"),
    Count("halts", "halts"),
    Count("port_reads", "port reads"),
    Count("port_writes", "port writes"),
    Count("mmio_reads", "MMIO reads"),
    Count("mmio_writes", "MMIO writes"),
    Count("apic_accesses", "local APIC registers by MSR"),
    Count("interrupts", "interrupts delivered"),
    Count("page_faults", "page faults"),
    Count("other_exceptions", "other exceptions"),
    Count("undefined", "undefined instructions"),
    Count("unknown_msr", "unknown MSRs"),
    Heading("KVM"),
    Count("kvm_runs", "times that it was entered"),
    Count("kvm_interrupted", "exits by a signal"),
    Count("kvm_msrs", "exits by MSRs that it does not have"),
    Count("engine_switches", "engines that took over"),
    Heading("compiled code"),
    Count("entries", "entries"),
    Count("exits_next", "exits to code not yet compiled"),
    Count("side_exits", "exits to interpret an instruction"),
    Count("exits_fault", "exits by a helper's exception"),
    Count("exits_stop", "exits by a helper that stops"),
    Count("exits_look", "exits for a look at where it is"),
    Count("helper_calls", "instructions by helper"),
    Count("slow_paths", "memory slow paths"),
    Heading("caches"),
    Count("ways", "ways found behind the jump cache"),
    Count("jump_misses", "jump-cache misses"),
    Count("bridged", "branches led to another page"),
    Count("tlb_misses", "data TLB misses"),
    Count("code_tlb_misses", "code TLB misses"),
    Count("tlb_flushes", "TLB flushes"),
    Count("page_flushes", "TLB page flushes"),
    Count("smc_stores", "stores to translated code"),
];

/// Figures of a run. Counts are summed over resets.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Stats {
    /// Wall time of the run in seconds.
    pub seconds: f64,
    /// Memory at the end of the run, where the host says.
    #[serde(flatten)]
    pub memory: Option<Footprint>,
    /// Counts by name.
    #[serde(flatten)]
    counts: BTreeMap<&'static str, u64>,
}

impl Stats {
    /// Adds counters.
    pub(crate) fn add(&mut self, counters: impl IntoIterator<Item = (&'static str, u64)>) {
        for (name, n) in counters {
            debug_assert!(ROWS.iter().any(|row| matches!(row, Count(known, _) if *known == name)), "{name}");
            *self.counts.entry(name).or_default() += n;
        }
    }

    /// A counter by name; 0 if nothing counted it.
    pub fn count(&self, name: &str) -> u64 {
        self.counts.get(name).copied().unwrap_or(0)
    }

    /// Millions of guest instructions a second.
    pub fn mips(&self) -> f64 {
        (self.count("interpreted") + self.count("compiled")) as f64 / 1e6 / self.seconds.max(1e-9)
    }

    /// Bytes of host code for each byte of guest code; `None` if nothing was compiled.
    pub fn expansion(&self) -> Option<f64> {
        let guest = self.count("region_guest_bytes");
        (guest != 0).then(|| self.count("region_code_bytes") as f64 / guest as f64)
    }

    /// The figures as JSON: one object, its numbers by name.
    pub fn to_json(&self) -> serde_json::Value {
        let mut json = serde_json::to_value(self).unwrap_or_default();
        if let Some(map) = json.as_object_mut() {
            map.insert("mips".into(), self.mips().into());
            map.insert("code_bytes_per_guest_byte".into(), self.expansion().into());
        }
        json
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A heading of nothing is left out.
        let mut heading = None;
        for row in &ROWS {
            match row {
                Heading(text) => heading = Some(text),
                Count(name, text) => {
                    if let Some(n) = self.counts.get(name) {
                        if let Some(heading) = heading.take() {
                            writeln!(f, "{heading}")?;
                        }
                        writeln!(f, "  {text:36} {n:>16}")?;
                    }
                }
            }
        }
        if let Some(ratio) = self.expansion() {
            writeln!(f, "{:38} {ratio:>16.1}", "host code bytes per guest byte")?;
        }
        if let Some(m) = &self.memory {
            writeln!(f, "memory at the end in KiB")?;
            writeln!(f, "  {:36} {:>16}", "resident", m.resident_bytes / 1024)?;
            writeln!(f, "  {:36} {:>16}", "of it touched guest RAM", m.guest_resident_bytes / 1024)?;
            writeln!(f, "  {:36} {:>16}", "beyond it", m.beyond_guest_bytes / 1024)?;
            writeln!(f, "  {:36} {:>16}", "most that was resident", m.peak_resident_bytes / 1024)?;
        }
        write!(f, "{:38} {:>16.3}", "seconds", self.seconds)?;
        // KVM counts none.
        if self.mips() != 0.0 {
            write!(f, "\n{:38} {:>16.1}", "million guest instructions/s", self.mips())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_add_up_and_each_has_its_row() {
        let mut stats = Stats { seconds: 2.0, ..Stats::default() };
        for _ in 0..2 {
            stats.add([("interpreted", 3_000_000), ("compiled", 1_000_000), ("region_guest_bytes", 10)]);
        }
        stats.add([("region_code_bytes", 100)]);
        assert_eq!((stats.mips(), stats.expansion()), (4.0, Some(5.0)));
        let text = stats.to_string();
        assert!(text.contains("  interpreted                                   6000000\n"), "{text}");
        assert!(!text.contains("halts"), "what nothing counted has no row: {text}");
        let json = stats.to_json();
        assert_eq!((&json["compiled"], &json["code_bytes_per_guest_byte"]), (&2_000_000.into(), &5.0.into()));
        assert_eq!(json["mips"], 4.0);
    }

    #[test]
    fn names_are_used_once() {
        let mut names: Vec<&str> =
            ROWS.iter().filter_map(|r| if let Count(n, _) = r { Some(*n) } else { None }).collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
    }
}
