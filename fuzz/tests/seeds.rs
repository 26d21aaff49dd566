//! The targets on their seeds, and on each seed cut short: what needs no fuzzer.

use std::fs;
use std::path::Path;

fn replay(target: &str, run: fn(&[u8])) {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target);
    let mut count = 0;
    for seed in fs::read_dir(&seeds).expect("seeds") {
        let path = seed.expect("an entry").path();
        let data = fs::read(&path).expect("a file");
        println!("{}", path.display());
        run(&data);
        run(&data[..data.len() / 2]);
        count += 1;
    }
    assert!(count >= 5, "{target} has only {count} seeds");
}

#[test]
fn translate() {
    replay("translate", diglot_fuzz::translate::run);
}

#[test]
fn engines() {
    replay("engines", diglot_fuzz::engines::run);
}

#[test]
fn kernels() {
    replay("kernels", diglot_fuzz::kernels::run);
}

#[test]
fn devices() {
    replay("devices", diglot_fuzz::devices::run);
}
