//! The x87 instruction set, by opcode (SDM vol. 2 appendix A.5), the aliases that silicon accepts included.

use super::Operation;

/// Arithmetic in the order of its opcode field: the first operand is ST(0), the second the memory operand or ST(i).
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arith {
    Add,
    Mul,
    /// Compare, setting the condition codes only.
    Com,
    /// The same and pop.
    Comp,
    Sub,
    SubR,
    Div,
    DivR,
}

impl Arith {
    fn from_field(reg: u8) -> Arith {
        use Arith::*;
        [Add, Mul, Com, Comp, Sub, SubR, Div, DivR][usize::from(reg & 7)]
    }

    /// The operation, unless it is a comparison.
    pub(super) fn operation(self) -> Option<Operation> {
        Some(match self {
            Arith::Add => Operation::Add,
            Arith::Mul => Operation::Mul,
            Arith::Sub => Operation::Sub,
            Arith::SubR => Operation::SubR,
            Arith::Div => Operation::Div,
            Arith::DivR => Operation::DivR,
            Arith::Com | Arith::Comp => return None,
        })
    }
}

/// A number's format in memory.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    F32,
    F64,
    F80,
    I16,
    I32,
    I64,
    Bcd,
}

impl Format {
    /// Size in bytes.
    pub fn size(self) -> u8 {
        match self {
            Format::I16 => 2,
            Format::F32 | Format::I32 => 4,
            Format::F64 | Format::I64 => 8,
            Format::F80 | Format::Bcd => 10,
        }
    }
}

/// A constant that FLD1 and its kin load.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Constant {
    One,
    /// log₂ 10.
    L2t,
    /// log₂ e.
    L2e,
    Pi,
    /// log₁₀ 2.
    Lg2,
    /// ln 2.
    Ln2,
    Zero,
}

/// A decoded x87 instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// FADD and the like, FIADD and the like, with a memory operand.
    ArithMemory(Arith, Format),
    /// FLD, FILD, FBLD from memory.
    Load(Format),
    /// FST, FIST and the like to memory.
    Store {
        /// Format in memory.
        format: Format,
        /// Whether ST(0) is popped.
        pop: bool,
        /// FISTTP: round toward zero.
        truncate: bool,
    },
    /// FLDCW.
    LoadControl,
    /// FNSTCW.
    StoreControl,
    /// FNSTSW to memory.
    StoreStatus,
    /// FNSTSW AX: the caller takes [`super::X87::fsw`].
    StatusToAx,
    /// FLDENV.
    LoadEnvironment,
    /// FNSTENV.
    StoreEnvironment,
    /// FRSTOR.
    Restore,
    /// FNSAVE.
    Save,
    /// Arithmetic between ST(0) and ST(i).
    Arith {
        /// The operation; never a comparison.
        arith: Arith,
        /// The register beside ST(0).
        i: u8,
        /// Whether ST(i) takes the result.
        to_i: bool,
        /// Whether ST(0) is popped.
        pop: bool,
    },
    /// FCOM, FUCOM, FCOMPP and the like.
    Compare {
        /// The register ST(0) is compared with.
        i: u8,
        /// Quiet NaNs are not invalid.
        quiet: bool,
        /// How many registers are popped.
        pops: u8,
    },
    /// FCOMI, FUCOMI, FCOMIP, FUCOMIP.
    CompareFlags {
        /// The register ST(0) is compared with.
        i: u8,
        /// Quiet NaNs are not invalid.
        quiet: bool,
        /// Whether ST(0) is popped.
        pop: bool,
    },
    /// FLD ST(i).
    LoadRegister(u8),
    /// FST ST(i), FSTP ST(i).
    StoreRegister {
        /// Destination.
        i: u8,
        /// Whether ST(0) is popped.
        pop: bool,
    },
    /// The undocumented FSTPNCE ST(i): FSTP that pops an empty register without complaint.
    StoreUnchecked(u8),
    /// FXCH.
    Exchange(u8),
    /// FFREE and the undocumented FFREEP.
    Free {
        /// The register freed.
        i: u8,
        /// Whether the stack is popped after.
        pop: bool,
    },
    /// FCMOVcc.
    Move {
        /// The register moved from.
        i: u8,
        /// 0 below, 1 equal, 2 below or equal, 3 unordered.
        condition: u8,
        /// Whether the condition is inverted.
        not: bool,
    },
    /// FLD1, FLDPI and the like.
    Constant(Constant),
    /// ST(0) replaced by a function of itself and perhaps ST(1).
    Replace(Operation),
    /// FYL2X, FYL2XP1, FPATAN: ST(1) replaced by a function of both, then pop.
    Fold(Operation),
    /// FSINCOS, FPTAN, FXTRACT: ST(0) replaced, then a second result pushed.
    Split(Operation),
    /// FCHS.
    ChangeSign,
    /// FABS.
    Abs,
    /// FTST.
    Test,
    /// FXAM.
    Examine,
    /// FINCSTP.
    IncrementTop,
    /// FDECSTP.
    DecrementTop,
    /// FNCLEX.
    ClearExceptions,
    /// FNINIT.
    Init,
    /// FNOP.
    Nop,
    /// FNENI, FNDISI, FNSETPM: of use to older units only.
    LegacyNop,
}

/// What an instruction moves to or from memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// Nothing.
    None,
    /// Reads this many bytes (at most 10) for [`super::X87::load`].
    Read(u8),
    /// Writes this many bytes (at most 10) from [`super::X87::store`].
    Write(u8),
    /// Reads an environment for [`super::X87::load_environment`].
    ReadEnvironment,
    /// Writes [`super::X87::environment`].
    WriteEnvironment,
    /// Reads a state for [`super::X87::restore`].
    ReadState,
    /// Writes [`super::X87::save`].
    WriteState,
}

impl Op {
    /// Decodes `fop`: the low three bits of the first opcode byte (D8–DF) in bits 10:8, the ModR/M byte below. Nothing
    /// if the opcode is undefined (#UD).
    pub fn decode(fop: u16) -> Option<Op> {
        let (escape, modrm) = ((fop >> 8 & 7) as u8, fop as u8);
        let (reg, i) = (modrm >> 3 & 7, modrm & 7);
        if modrm >> 6 != 3 { Op::decode_memory(escape, reg) } else { Op::decode_register(escape, reg, i) }
    }

    fn decode_memory(escape: u8, reg: u8) -> Option<Op> {
        let formats = [Format::F32, Format::I32, Format::F64, Format::I16];
        let format = formats[usize::from(escape >> 1 & 3)];
        let store = |format, pop, truncate| Op::Store { format, pop, truncate };
        if escape & 1 == 0 {
            return Some(Op::ArithMemory(Arith::from_field(reg), format));
        }
        Some(match (escape, reg) {
            (_, 0) => Op::Load(format),
            (1, 1) => return None,
            (5, 1) => store(Format::I64, true, true),
            (_, 1) => store(format, true, true),
            (_, 2) => store(format, false, false),
            (_, 3) => store(format, true, false),
            (1, 4) => Op::LoadEnvironment,
            (1, 5) => Op::LoadControl,
            (1, 6) => Op::StoreEnvironment,
            (1, _) => Op::StoreControl,
            (3, 5) => Op::Load(Format::F80),
            (3, 7) => store(Format::F80, true, false),
            (5, 4) => Op::Restore,
            (5, 6) => Op::Save,
            (5, 7) => Op::StoreStatus,
            (7, 4) => Op::Load(Format::Bcd),
            (7, 5) => Op::Load(Format::I64),
            (7, 6) => store(Format::Bcd, true, false),
            (7, 7) => store(Format::I64, true, false),
            _ => return None,
        })
    }

    fn decode_register(escape: u8, reg: u8, i: u8) -> Option<Op> {
        use Operation::*;
        let compare = |quiet, pops| Op::Compare { i, quiet, pops };
        Some(match (escape, reg, i) {
            (0 | 4, 2, _) => compare(false, 0),
            (0 | 4, 3, _) | (6, 2, _) => compare(false, 1),
            (6, 3, 1) => compare(false, 2),
            (6, 3, _) => return None,
            (0 | 4 | 6, ..) => Op::Arith { arith: Arith::from_field(reg), i, to_i: escape != 0, pop: escape == 6 },
            (1, 0, _) => Op::LoadRegister(i),
            (1 | 5 | 7, 1, _) => Op::Exchange(i),
            (1, 2, 0) => Op::Nop,
            (1, 3, _) => Op::StoreUnchecked(i),
            (5, 3, _) | (7, 2 | 3, _) => Op::StoreRegister { i, pop: true },
            (1, 4, 0) => Op::ChangeSign,
            (1, 4, 1) => Op::Abs,
            (1, 4, 4) => Op::Test,
            (1, 4, 5) => Op::Examine,
            (1, 5, 0..=6) => {
                use Constant::*;
                Op::Constant([One, L2t, L2e, Pi, Lg2, Ln2, Zero, Zero][usize::from(i & 7)])
            }
            (1, 6, 0) => Op::Replace(F2xm1),
            (1, 6, 1) => Op::Fold(Yl2x),
            (1, 6, 2) => Op::Split(Ptan),
            (1, 6, 3) => Op::Fold(Patan),
            (1, 6, 4) => Op::Split(Xtract),
            (1, 6, 5) => Op::Replace(Prem1),
            (1, 6, 6) => Op::DecrementTop,
            (1, 6, _) => Op::IncrementTop,
            (1, 7, 0) => Op::Replace(Prem),
            (1, 7, 1) => Op::Fold(Yl2xp1),
            (1, 7, 2) => Op::Replace(Sqrt),
            (1, 7, 3) => Op::Split(SinCos),
            (1, 7, 4) => Op::Replace(RoundInt),
            (1, 7, 5) => Op::Replace(Scale),
            (1, 7, 6) => Op::Replace(Sin),
            (1, 7, _) => Op::Replace(Cos),
            (2, 5, 1) => compare(true, 2),
            (2 | 3, 0..=3, _) => Op::Move { i, condition: reg, not: escape == 3 },
            (3, 4, 0 | 1 | 4) => Op::LegacyNop,
            (3, 4, 2) => Op::ClearExceptions,
            (3, 4, 3) => Op::Init,
            (3 | 7, 5, _) => Op::CompareFlags { i, quiet: true, pop: escape == 7 },
            (3 | 7, 6, _) => Op::CompareFlags { i, quiet: false, pop: escape == 7 },
            (5 | 7, 0, _) => Op::Free { i, pop: escape == 7 },
            (5, 2, _) => Op::StoreRegister { i, pop: false },
            (5, 4, _) => compare(true, 0),
            (5, 5, _) => compare(true, 1),
            (7, 4, 0) => Op::StatusToAx,
            _ => return None,
        })
    }

    /// What the instruction moves.
    pub fn memory(self) -> Memory {
        match self {
            Op::ArithMemory(_, format) | Op::Load(format) => Memory::Read(format.size()),
            Op::Store { format, .. } => Memory::Write(format.size()),
            Op::LoadControl => Memory::Read(2),
            Op::StoreControl | Op::StoreStatus => Memory::Write(2),
            Op::LoadEnvironment => Memory::ReadEnvironment,
            Op::StoreEnvironment => Memory::WriteEnvironment,
            Op::Restore => Memory::ReadState,
            Op::Save => Memory::WriteState,
            _ => Memory::None,
        }
    }

    /// Whether a pending exception is raised before the instruction (SDM vol. 1 §8.6). FWAIT, which is no instruction
    /// of this unit's opcodes, waits too.
    pub fn waits(self) -> bool {
        !matches!(
            self,
            Op::StoreControl
                | Op::StoreStatus
                | Op::StatusToAx
                | Op::StoreEnvironment
                | Op::Save
                | Op::ClearExceptions
                | Op::Init
                | Op::LegacyNop
        )
    }

    /// Whether the instruction leaves the last-instruction pointers alone (SDM vol. 1 §8.1.8).
    pub fn is_control(self) -> bool {
        !self.waits() || matches!(self, Op::LoadControl | Op::LoadEnvironment | Op::Restore)
    }
}
