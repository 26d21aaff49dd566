//! libFuzzer's way into `diglot_fuzz::kernels`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| diglot_fuzz::kernels::run(data));
