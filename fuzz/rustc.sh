#!/bin/sh
# Diglot's own crates as the fuzzer wants them: libFuzzer's counters on each edge and its hooks in each comparison, and
# every check that release builds leave out. `cargo xtask fuzz` has cargo call this for them (RUSTC_WORKSPACE_WRAPPER).
exec "$@" --cfg fuzzing -Cdebug-assertions=on -Coverflow-checks=on -Cpasses=sancov-module \
  -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
  -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares
