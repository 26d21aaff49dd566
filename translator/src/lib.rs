//! The x86-64 CPU: one semantics, interpreted while cold and compiled by Cranelift when hot.

pub mod addr;
pub mod address_map;
pub mod block;
pub mod code;
pub mod cpu;
pub mod cpuid;
pub mod decode;
pub mod emit;
pub mod engine;
pub mod eval;
pub mod exception;
pub mod flags;
pub mod insn;
pub mod jit;
pub mod jump;
pub mod kick;
pub mod lockstep;
pub mod mapping;
pub mod marks;
pub mod mem;
pub mod mmu;
pub mod peers;
pub mod platform;
pub mod quick;
pub mod semantics;
pub mod simd;
pub mod state;
pub mod sync;
pub mod system;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod trace;
pub mod vcpu;
pub mod width;
pub mod x87;
pub mod xsave_area;
