//! System behaviour, by the manual: each case is a small guest that runs on every engine.

mod control;
mod debug;
mod exceptions;
mod machine;
mod paging;
mod smc;
