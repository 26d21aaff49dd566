//! The vector instructions on numbers: SSE to SSE4.2, AVX, AVX2, FMA, F16C, AES, PCLMULQDQ, SHA, and the CRC32 and BMI2
//! leaf operations.
//!
//! Everything here is a function of register-sized values: a 128-bit lane is a `u128` whose bit 0 is bit 0 of the
//! register, a 256-bit operand is `[u128; 2]`, low lane first. Nothing knows of memory, registers or faults.
//! Nearly every 256-bit instruction is its 128-bit form applied to both lanes; the few that cross lanes are in
//! [`wide`].
//!
//! Integer operations are plain Rust and the same on each host. Floating point ([`fp`]) is the host's own where the
//! host is an x86-64, and an exact software implementation elsewhere.

mod crypto;
pub mod flags;
pub mod fp;
pub mod imm;
mod lanes;
pub mod op;
pub mod scalar;
pub mod strings;
pub mod ternary;
#[cfg(test)]
mod testing;
pub mod unary;
pub mod wide;

pub use imm::{VecImmOp, eval_imm};
pub use op::{VecOp, eval};
pub use ternary::{VecTerOp, eval_ternary};
pub use unary::{VecUnOp, eval_unary};
