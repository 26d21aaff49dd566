//! Diglot: the command line.
fn main() {}
