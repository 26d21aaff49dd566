//! libFuzzer's way into `diglot_fuzz::engines`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| diglot_fuzz::engines::run(data));
