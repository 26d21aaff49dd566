//! What a run cost, for `--stats`.

use std::fmt;

use diglot_translator::vcpu::Vcpu;
use serde::Serialize;

/// Figures of a run, summed over resets.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Stats {
    /// Wall time of the run in seconds.
    pub seconds: f64,
    /// Guest instructions interpreted.
    pub interpreted: u64,
    /// Guest instructions run as compiled code.
    pub compiled: u64,
    /// Regions compiled and installed.
    pub regions: u64,
    /// Guest blocks in them.
    pub region_blocks: u64,
    /// Guest bytes in them.
    pub region_guest_bytes: u64,
    /// Host code bytes of them.
    pub region_code_bytes: u64,
    /// Time that the compile threads took, in nanoseconds.
    pub compile_nanos: u64,
    /// Regions evicted because code memory was full.
    pub regions_evicted: u64,
    /// Entries into compiled code from the dispatch loop.
    pub entries: u64,
    /// Exits of compiled code that left an instruction to the interpreter.
    pub side_exits: u64,
    /// Instructions of compiled code evaluated by helper.
    pub helper_calls: u64,
    /// Memory accesses of compiled code that missed the TLB's fast path.
    pub slow_paths: u64,
    /// Blocks that the interpreter ran.
    pub blocks_run: u64,
    /// Blocks decoded.
    pub blocks_decoded: u64,
    /// Blocks dropped because their bytes changed.
    pub blocks_invalidated: u64,
    /// Jump-cache misses.
    pub jump_misses: u64,
    /// Data TLB misses.
    pub tlb_misses: u64,
    /// Code TLB misses.
    pub code_tlb_misses: u64,
    /// TLB flushes.
    pub tlb_flushes: u64,
    /// Single-page TLB flushes.
    pub page_flushes: u64,
    /// Stores that overwrote translated code.
    pub smc_stores: u64,
    /// Interrupts delivered.
    pub interrupts: u64,
    /// Exceptions by vector.
    pub exceptions: Vec<u64>,
    /// Undefined instructions that a guest tried.
    pub undefined: u64,
    /// Accesses to unknown MSRs.
    pub unknown_msr: u64,
    /// Port accesses.
    pub port_io: u64,
}

impl Stats {
    /// Adds a vCPU's counters.
    pub(crate) fn add(&mut self, v: &Vcpu) {
        self.interpreted += v.counts.interpreted;
        self.compiled += v.cpu.jit.count;
        if let Some(jit) = &v.jit {
            self.regions += jit.counts.regions;
            self.region_blocks += jit.counts.region_blocks;
            self.region_guest_bytes += jit.counts.guest_bytes;
            self.region_code_bytes += jit.counts.code_bytes;
            self.compile_nanos += jit.counts.compile_nanos;
            self.regions_evicted += jit.counts.evicted;
        }
        self.entries += v.counts.entries;
        self.side_exits += v.counts.side_exits;
        self.helper_calls += v.cpu.jit.helper_calls;
        self.slow_paths += v.cpu.jit.slow_paths;
        self.blocks_run += v.counts.blocks_run;
        self.blocks_decoded += v.blocks.decoded;
        self.blocks_invalidated += v.blocks.invalidated;
        self.jump_misses += v.counts.jump_misses;
        self.tlb_misses += v.cpu.mmu.counts.tlb_misses;
        self.code_tlb_misses += v.cpu.mmu.counts.code_tlb_misses;
        self.tlb_flushes += v.cpu.mmu.counts.flushes;
        self.page_flushes += v.cpu.mmu.counts.page_flushes;
        self.smc_stores += v.cpu.mmu.counts.smc_stores;
        self.interrupts += v.cpu.counts.interrupts;
        self.exceptions.resize(32, 0);
        for (sum, n) in self.exceptions.iter_mut().zip(v.cpu.counts.exceptions) {
            *sum += n;
        }
        self.undefined += v.cpu.counts.undefined;
        self.unknown_msr += v.cpu.counts.unknown_msr;
        self.port_io += v.cpu.counts.port_io;
    }

    /// Millions of guest instructions a second.
    pub fn mips(&self) -> f64 {
        (self.interpreted + self.compiled) as f64 / 1e6 / self.seconds.max(1e-9)
    }

    /// The figures as JSON.
    pub fn to_json(&self) -> serde_json::Value {
        let mut json = serde_json::to_value(self).unwrap_or_default();
        if let Some(map) = json.as_object_mut() {
            map.insert("mips".into(), self.mips().into());
        }
        json
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = [
            ("guest instructions interpreted", self.interpreted),
            ("guest instructions compiled", self.compiled),
            ("regions compiled", self.regions),
            ("guest blocks in them", self.region_blocks),
            ("guest bytes in them", self.region_guest_bytes),
            ("host code bytes of them", self.region_code_bytes),
            ("compile time in microseconds", self.compile_nanos / 1000),
            ("regions evicted", self.regions_evicted),
            ("entries into compiled code", self.entries),
            ("exits to the interpreter", self.side_exits),
            ("instructions by helper", self.helper_calls),
            ("memory slow paths", self.slow_paths),
            ("blocks run by the interpreter", self.blocks_run),
            ("blocks decoded", self.blocks_decoded),
            ("blocks invalidated", self.blocks_invalidated),
            ("jump-cache misses", self.jump_misses),
            ("data TLB misses", self.tlb_misses),
            ("code TLB misses", self.code_tlb_misses),
            ("TLB flushes", self.tlb_flushes),
            ("TLB page flushes", self.page_flushes),
            ("stores to translated code", self.smc_stores),
            ("interrupts", self.interrupts),
            ("page faults", self.exceptions.get(14).copied().unwrap_or(0)),
            ("other exceptions", self.exceptions.iter().sum::<u64>() - self.exceptions.get(14).copied().unwrap_or(0)),
            ("undefined instructions", self.undefined),
            ("unknown MSRs", self.unknown_msr),
            ("port accesses", self.port_io),
        ];
        for (name, n) in rows {
            writeln!(f, "{name:32} {n:>16}")?;
        }
        writeln!(f, "{:32} {:>16.3}", "seconds", self.seconds)?;
        write!(f, "{:32} {:>16.1}", "million guest instructions/s", self.mips())
    }
}
