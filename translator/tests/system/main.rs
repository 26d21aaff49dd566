//! System behaviour, by the manual: each case is a small guest that runs on every engine.

mod branches;
mod bridges;
mod control;
mod debug;
mod entry;
mod exceptions;
mod gates;
mod machine;
mod paging;
mod real;
mod segments;
mod smc;
mod tasks;
mod vm86;
