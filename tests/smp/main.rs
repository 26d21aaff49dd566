//! Machines with several CPUs: small guests that check themselves, on every engine that runs several.

mod code;
mod counters;
mod ends;
mod litmus;
mod paging;
mod startup;
#[path = "../support/mod.rs"]
mod support;
