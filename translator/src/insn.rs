//! Predecoded guest instructions: what both evaluators read.

use crate::cpu::Cpu;
use crate::exception::Trap;

/// Evaluates one instruction on the interpreter.
///
/// Before the call `cpu.ip_base` is the linear instruction pointer of the block's first byte, so that
/// [`Cpu::next_ip`] works; `rip` already points behind the instruction if it is the last of its block. On `Err` the
/// caller restores `rip` to the instruction's start: a handler that fails must not have changed state.
pub type Handler = fn(&mut Cpu, &Insn) -> Result<(), Trap>;

/// An operand, in Intel order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opnd {
    /// No operand.
    None,
    /// A general-purpose register, at the operand's width.
    Gpr(u8),
    /// AH, CH, DH or BH: bits 15:8 of registers 0–3.
    GprHigh(u8),
    /// The memory operand described by the instruction's address fields.
    Mem,
    /// The immediate.
    Imm,
    /// An XMM register.
    Xmm(u8),
    /// A YMM register.
    Ymm(u8),
    /// An MMX register.
    Mmx(u8),
    /// A segment register.
    Seg(u8),
    /// A control register.
    Cr(u8),
    /// A debug register.
    Dr(u8),
    /// An x87 stack register.
    St(u8),
}

/// A register that an address does not have.
pub const NO_REG: u8 = 0xff;

/// The mode that decoding and semantics depend on; part of every code-cache key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, PartialOrd, Ord)]
pub struct Mode(pub u8);

impl Mode {
    /// 64-bit code.
    pub const CODE64: u8 = 1;
    /// CS.D: 32-bit default operand and address size.
    pub const CODE32: u8 = 2;
    /// SS.B: 32-bit stack pointer.
    pub const STACK32: u8 = 4;
    /// Outside 64-bit mode: ES, CS, SS and DS have base 0, limit 4 GiB, and are readable and writable as needed.
    pub const FLAT: u8 = 8;
    /// SSE instructions run (CR0.EM=0, CR0.TS=0, CR4.OSFXSR=1).
    pub const SSE: u8 = 16;
    /// AVX instructions run (protected mode, CR0.TS=0, CR4.OSXSAVE=1, XCR0 has SSE and AVX).
    pub const AVX: u8 = 32;

    /// Whether a bit of the constants above is set.
    #[inline(always)]
    pub fn has(self, bit: u8) -> bool {
        self.0 & bit != 0
    }

    /// Code size in bits: 16, 32 or 64.
    pub fn bits(self) -> u32 {
        if self.has(Self::CODE64) {
            64
        } else if self.has(Self::CODE32) {
            32
        } else {
            16
        }
    }

    /// Bytes of the stack pointer in use: 2, 4 or 8.
    pub fn stack_bytes(self) -> u8 {
        if self.has(Self::CODE64) {
            8
        } else if self.has(Self::STACK32) {
            4
        } else {
            2
        }
    }
}

/// Repeat prefixes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rep {
    /// None.
    None,
    /// REP or REPE (F3).
    Rep,
    /// REPNE (F2).
    Repne,
}

/// One decoded instruction.
#[derive(Clone, Copy, Debug)]
pub struct Insn {
    /// The interpreter's evaluation.
    pub run: Handler,
    /// Both evaluations and what else is known of the instruction's semantics.
    pub sem: &'static crate::semantics::Sem,
    /// Immediate, sign- or zero-extended as the instruction says; for relative branches the displacement.
    pub imm: u64,
    /// Second immediate (ENTER, EXTRQ-like) or the selector of a far pointer.
    pub imm2: u16,
    /// iced's `Code`, which names mnemonic and form exactly.
    pub code: u16,
    /// Address displacement, sign-extended; RIP-relative displacement when `rip_relative`.
    pub disp: i64,
    /// Operands in Intel order.
    pub op: [Opnd; 4],
    /// Base register or [`NO_REG`].
    pub base: u8,
    /// Index register or [`NO_REG`]; for VSIB a vector register.
    pub index: u8,
    /// log2 of the index scale.
    pub scale: u8,
    /// Segment register of the memory operand.
    pub seg: u8,
    /// Bytes of an effective address: 2, 4 or 8.
    pub addr_bytes: u8,
    /// Whether `disp` is relative to the next instruction.
    pub rip_relative: bool,
    /// Whether an access through `seg` needs no base and no limit check.
    pub flat: bool,
    /// What the semantics want to know besides the operands; each group says what it keeps here.
    pub aux: u16,
    /// Operand size in bytes (1, 2, 4, 8; vector widths for vector instructions), 0 where there is none.
    pub osize: u8,
    /// Size in bytes of the memory operand, 0 if none or unknown.
    pub mem_bytes: u8,
    /// Bytes of the stack pointer in use.
    pub stack_bytes: u8,
    /// LOCK prefix.
    pub lock: bool,
    /// Repeat prefix.
    pub rep: Rep,
    /// Length in bytes, 1–15.
    pub len: u8,
    /// Offset of the first byte from the start of the block.
    pub off: u16,
    /// Whether the block ends here.
    pub ends_block: bool,
}

impl Insn {
    /// Offset, from the start of the block, of the byte behind the instruction.
    #[inline(always)]
    pub fn next_off(&self) -> u64 {
        u64::from(self.off) + u64::from(self.len)
    }

    /// The iced code.
    pub fn iced_code(&self) -> iced_x86::Code {
        iced_x86::Code::try_from(usize::from(self.code)).unwrap_or(iced_x86::Code::INVALID)
    }
}
