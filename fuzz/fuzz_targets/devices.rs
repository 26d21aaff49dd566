//! libFuzzer's way into `diglot_fuzz::devices`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| diglot_fuzz::devices::run(data));
