//! Code memory: where compiled host code lives, how it becomes executable, and how its branches are linked.
//!
//! The life of a unit of code: [`elide_frame`] and [`add_link_cells`] prepare its bytes, [`CodeArena::alloc`] finds
//! room, [`CodeArena::write`] copies them in, [`CodeArena::publish`] makes them fetchable on every core, and
//! [`CodeArena::patch_branch`] links its exits to other units while they run. Code is named by its offset in the
//! arena, so that nothing here but [`CodeArena::exec_ptr`] speaks of addresses.
//!
//! The bytes of a unit are position independent apart from its *branch sites*. A site is the offset at which
//! Cranelift reports the relocation of a direct tail call: the four displacement bytes of `jmp rel32` on x86-64, the
//! `b` instruction itself on AArch64.
//!
//! **Invariant:** no address is ever both writable and executable. The host's instruction set is a value
//! ([`HostIsa`]); only `publish.rs` asks what it was compiled for.

mod arena;
mod frame;
mod free_list;
mod patch;
mod perf;
mod publish;
#[cfg(test)]
mod tests;

pub use arena::{ArenaError, CodeArena, Slot};
pub use frame::{Elided, PUSH_LEN, elide_frame};
pub use free_list::GRANULE;
pub use patch::{Jump, add_link_cells, encode_jump, is_patchable, lead};
pub use perf::PerfMap;

/// The instruction set of the machine that runs the emitted code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostIsa {
    /// AMD64 / Intel 64.
    X86_64,
    /// 64-bit Arm, little-endian.
    Aarch64,
}

impl HostIsa {
    /// The largest arena in which every direct branch reaches every other byte: ±2 GiB for `rel32`
    /// (SDM vol. 2 `JMP`), ±128 MiB for `imm26` (Arm ARM C6.2 `B`).
    pub const fn branch_reach(self) -> usize {
        match self {
            Self::X86_64 => 1 << 31,
            Self::Aarch64 => 1 << 27,
        }
    }

    /// Whether a processor may have others see loads and stores in other orders than an x86-64 one does.
    pub const fn reorders(self) -> bool {
        match self {
            Self::X86_64 => false,
            Self::Aarch64 => true,
        }
    }

    /// Whether loads and stores take any displacement of 32 bits.
    pub const fn reaches_far(self) -> bool {
        match self {
            Self::X86_64 => true,
            Self::Aarch64 => false,
        }
    }

    /// What fills the space between units: bytes that trap when executed.
    const fn filler(self) -> u8 {
        match self {
            Self::X86_64 => 0xcc, // int3
            Self::Aarch64 => 0,   // udf #0
        }
    }
}
