//! What the fuzzer runs: functions that take any bytes and must neither panic nor hang.
//!
//! Each module is a target; `fuzz_targets/` hands them to libFuzzer, `tests/seeds.rs` replays their seeds without it.
//! docs/fuzzing.md says what each checks.

pub mod devices;
pub mod engines;
mod guest;
mod input;
pub mod kernels;
mod ram;
pub mod translate;
