//! Each form, one instruction at a time.

use iced_x86::{Code, Decoder, DecoderOptions};

use super::{case, each, exception, worth};
use crate::cpuid::{CpuModel, Level};
use crate::testing::Random;
use crate::testing::bench::Bench;
use crate::testing::forms;
use crate::testing::native::host_has;

#[test]
fn as_the_processor_does() {
    compare(64);
}

#[test]
fn as_the_processor_does_in_32_bits() {
    compare(32);
}

fn compare(bits: u32) {
    let mut bench = Bench::new();
    let mut r = Random::new(2);
    let mut failures = Vec::new();
    let mut skipped = std::collections::BTreeSet::new();
    let mut compared = 0;
    each(&mut r, bits, |r, bytes, i| {
        if let Some(&f) = i.cpuid_features().iter().find(|&&f| !host_has(f)) {
            skipped.insert(format!("{f:?}"));
            return;
        }
        let cases: Vec<_> = (0..worth(i, bits)).filter_map(|_| case(r, i, bits)).collect();
        compared += 1;
        if let Err(e) = bench.check(bits, bytes, &cases) {
            failures.push(format!("{:?}: {i} ({bytes:02x?})\n{e}", i.code()));
        }
    });
    if !skipped.is_empty() {
        eprintln!("skipped: this processor has no {skipped:?}");
    }
    assert!(failures.is_empty(), "{} forms differ:\n{}", failures.len(), failures.join("\n"));
    assert!(compared > if bits == 64 { 3000 } else { 2000 }, "{compared}");
}

/// An instruction that the model advertises and the oracle does not run is one that [`EXCEPTIONS`] names.
#[test]
fn every_advertised_code_is_walked_or_excepted() {
    let model = CpuModel::new(Level::Max, 1, 0);
    for bits in [64, 32] {
        let mut walked = std::collections::HashSet::new();
        each(&mut Random::new(1), bits, |_, bytes, _| {
            // What WAIT precedes are two instructions.
            let wait = usize::from(bytes[0] == 0x9b && bytes.len() > 1);
            walked.insert(Decoder::new(bits, &bytes[wait..], DecoderOptions::NONE).decode().code());
        });
        let advertised = forms::codes(bits).filter(|&c| model.executes(c));
        let (mut excepted, mut forgotten) = (0, Vec::new());
        for code in advertised {
            let seen = walked.contains(&code) || same_bytes(code).is_some_and(|c| walked.contains(&c));
            match exception(code, bits) {
                Some(why) => {
                    assert!(!seen, "{code:?} runs, although: {why}");
                    excepted += 1;
                }
                None if seen => {}
                None => forgotten.push(code),
            }
        }
        assert!(forgotten.is_empty(), "{bits}: {forgotten:?}");
        assert!(excepted < 110, "{bits}: {excepted} are left out");
    }
}

/// The instruction behind the WAIT of a code that is two instructions.
fn same_bytes(code: Code) -> Option<Code> {
    let name = format!("{code:?}");
    let bare = code.op_code().fwait().then(|| name.replacen('F', "Fn", 1))?;
    Code::values().find(|c| format!("{c:?}") == bare)
}
