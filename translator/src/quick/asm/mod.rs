//! The host instructions that quick code is made of: an assembler for each host, which have the same operations.
//!
//! Operations are named and sized as x86-64's: `bytes` is the operand size, results of 4 bytes are zero-extended to 8, those of
//! fewer leave anything above, and flags are what [`Cc`] asks of the last comparison, test, sum, difference, AND, OR or XOR.
//! Beside the registers that hold values, four are every operation's to use: [`T0`], [`T1`], [`T2`] and [`ARG`].

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(not(target_arch = "aarch64"))]
mod x86_64;

#[cfg(target_arch = "aarch64")]
pub use aarch64::{ARG, Asm, CPU, ENTERED, PAGE, POOL, T0, T1, T2, THUNK_CPU, THUNK_SPARE, THUNK_WHICH};
#[cfg(not(target_arch = "aarch64"))]
pub use x86_64::{ARG, Asm, CPU, ENTERED, PAGE, POOL, T0, T1, T2, THUNK_CPU, THUNK_SPARE, THUNK_WHICH};

/// How many registers a host may have.
pub const REGISTERS: usize = 32;

/// A general-purpose register, in the host's encoding order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gpr(pub u8);

/// A vector register, of 16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Xmm(pub u8);

/// A memory operand: `[base + index << scale + disp]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mem {
    /// Base; `None` only with an index.
    pub base: Option<Gpr>,
    /// Index, not RSP, and log2 of its scale.
    pub index: Option<(Gpr, u8)>,
    /// Displacement.
    pub disp: i32,
}

impl Mem {
    /// `[base + disp]`.
    pub fn at(base: Gpr, disp: i32) -> Mem {
        Mem { base: Some(base), index: None, disp }
    }

    /// `[base + index + disp]`.
    pub fn indexed(base: Gpr, index: Gpr, disp: i32) -> Mem {
        Mem { base: Some(base), index: Some((index, 0)), disp }
    }
}

/// A register or memory operand.
#[derive(Clone, Copy, Debug)]
pub enum Rm {
    /// A register's number.
    Reg(u8),
    /// Memory.
    Mem(Mem),
}

impl From<Gpr> for Rm {
    fn from(r: Gpr) -> Rm {
        Rm::Reg(r.0)
    }
}

impl From<Xmm> for Rm {
    fn from(x: Xmm) -> Rm {
        Rm::Reg(x.0)
    }
}

impl From<Mem> for Rm {
    fn from(m: Mem) -> Rm {
        Rm::Mem(m)
    }
}

/// The arithmetic of opcodes 00h to 3Fh, by its place there.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Alu {
    Add = 0,
    Or = 1,
    And = 4,
    Sub = 5,
    Xor = 6,
    Cmp = 7,
}

/// Shifts and rotates, by their place in opcode group 2.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Shift {
    Rol = 0,
    Ror = 1,
    Shl = 4,
    Shr = 5,
    Sar = 7,
}

/// Operations on one operand, by their place in opcode group 3.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Unary {
    Not = 2,
    Neg = 3,
}

/// Condition codes, in x86-64's encoding order.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cc(pub u8);

#[allow(missing_docs)]
impl Cc {
    pub const B: Cc = Cc(2);
    pub const AE: Cc = Cc(3);
    pub const E: Cc = Cc(4);
    pub const NE: Cc = Cc(5);
    pub const BE: Cc = Cc(6);
    pub const A: Cc = Cc(7);
    pub const S: Cc = Cc(8);
    pub const NS: Cc = Cc(9);
    pub const L: Cc = Cc(12);
    pub const GE: Cc = Cc(13);
    pub const LE: Cc = Cc(14);
    pub const G: Cc = Cc(15);

    /// The opposite.
    pub fn opposite(self) -> Cc {
        Cc(self.0 ^ 1)
    }

    /// What holds of `b, a` when this holds of `a, b`.
    pub fn swapped(self) -> Cc {
        match self {
            Cc::B => Cc::A,
            Cc::A => Cc::B,
            Cc::AE => Cc::BE,
            Cc::BE => Cc::AE,
            Cc::L => Cc::G,
            Cc::G => Cc::L,
            Cc::GE => Cc::LE,
            Cc::LE => Cc::GE,
            same => same,
        }
    }
}

/// Where the displacement of a jump is that has no target yet.
#[derive(Clone, Copy, Debug)]
#[must_use = "a jump needs a target"]
pub struct Jump(pub usize);
