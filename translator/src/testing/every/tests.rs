//! Each form, one instruction at a time.

use super::{each, state};
use crate::testing::Random;
use crate::testing::bench::{Bench, Case, host_has};
use crate::testing::integer::undefined;

#[test]
fn as_the_processor_does() {
    compare(64);
}

#[test]
fn as_the_processor_does_in_32_bits() {
    compare(32);
}

fn compare(bits: u32) {
    let Some(mut bench) = Bench::new(bits) else { return };
    let mut r = Random::new(2);
    let mut failures = Vec::new();
    let mut skipped = std::collections::BTreeSet::new();
    let mut compared = 0;
    each(&mut r, bits, |r, bytes, i| {
        if let Some(&f) = i.cpuid_features().iter().find(|&&f| !host_has(f)) {
            skipped.insert(format!("{f:?}"));
            return;
        }
        let cases: Vec<_> = (0..32)
            .filter_map(|_| {
                let mut m = state(r, i);
                if bits == 32 {
                    m.gpr = m.gpr.map(|v| v & 0xffff_ffff);
                }
                let undefined = undefined(i, m.gpr[1])?;
                Some(Case::single(m, undefined))
            })
            .collect();
        compared += 1;
        if let Err(e) = bench.check(bytes, &cases) {
            failures.push(format!("{:?}: {i} ({bytes:02x?})\n{e}", i.code()));
        }
    });
    if !skipped.is_empty() {
        eprintln!("skipped: this processor has no {skipped:?}");
    }
    assert!(failures.is_empty(), "{} forms differ:\n{}", failures.len(), failures.join("\n"));
    assert!(compared > if bits == 64 { 3000 } else { 2000 }, "{compared}");
}
