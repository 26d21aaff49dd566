//! The compiler: hot blocks grown into regions and compiled by Cranelift.

pub mod frame;
