//! libFuzzer's way into `diglot_fuzz::translate`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| diglot_fuzz::translate::run(data));
