//! The replay, on every engine of this host.

use super::{Replay, parse, print, replay};

fn check(bits: u32, least: usize) {
    let Replay { codes, forms, cases, mismatches } = replay(bits).unwrap();
    assert!(mismatches.is_empty(), "{} mismatches:\n{}", mismatches.len(), mismatches.join("\n"));
    assert!(codes > least && forms > codes && cases > 8 * forms, "{codes} codes, {forms} forms, {cases} cases");
}

#[test]
fn as_recorded() {
    check(64, 1800);
}

#[test]
fn as_recorded_in_32_bits() {
    check(32, 1600);
}

#[test]
fn what_is_printed_is_read() {
    let body = "Aaa - - 0123abcd 00000001*\nNop 89abcdef? 00000002 00000003 -\n";
    assert_eq!(print(&parse(body).unwrap()), body);
    for wrong in ["Nop", "Nop 1", "Nop 1 2 3", "Nop x - - -", "Nop 1 2 3 4 5"] {
        assert!(parse(wrong).is_err(), "{wrong}");
    }
}
