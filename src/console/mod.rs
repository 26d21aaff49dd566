//! The guest's console: its serial port on one side, the host's terminal, pipe or file on the other.
//!
//! Output runs through `serial.rs` (what the bytes mean to Diglot: `--until`, a kernel's panic, a command's result)
//! to `output.rs` (a thread that writes them). Input is read by a thread in `input.rs`, through the escape keys of
//! `escape.rs`.

mod command;
mod escape;
mod input;
mod matcher;
mod output;
mod panic;
mod serial;

pub use command::Markers;
pub use input::{Gate, Source, start as start_input};
pub use output::Output;
pub use serial::{Event, SerialOut};
