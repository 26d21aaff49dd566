//! The one interface that instruction semantics are written against.
//!
//! Semantics are functions generic over [`Emit`]. The interpreter implements it with numbers ([`crate::cpu::Cpu`],
//! `V = u64`), the compiler with Cranelift values. A function must do everything that can fault (loads, stores,
//! [`Emit::fault_if`], …) before it changes architectural state: both evaluators rely on that for precise faults.

use crate::exception::Exception;
use crate::insn::{Insn, Opnd};
use crate::simd::fp::{CvtOp, FmaKind, FpFmt, FpOp};
use crate::simd::{VecImmOp, VecOp, VecTerOp, VecUnOp};
use crate::width::{W8, W32, W64, Width};

/// Two-operand integer operations. Shift and rotate counts are taken modulo the width.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bin {
    Add,
    Sub,
    And,
    Or,
    Xor,
    /// Low half of the product.
    Mul,
    Shl,
    Shr,
    Sar,
    Rotl,
    Rotr,
}

/// One-operand integer operations.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Un {
    Not,
    Neg,
    /// Leading zeros; the width for 0.
    Clz,
    /// Trailing zeros; the width for 0.
    Ctz,
    Popcnt,
    Bswap,
}

/// Integer comparisons.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cmp {
    Eq,
    Ne,
    /// Unsigned less than.
    Ltu,
    /// Unsigned greater than or equal.
    Geu,
    /// Signed less than.
    Lts,
    /// Signed greater than or equal.
    Ges,
}

/// What an instruction did to the arithmetic flags. Operands and results are of width `W` of the call.
#[derive(Clone, Copy, Debug)]
pub enum Flags<V> {
    /// `r = a + b (+ carry)`.
    Add {
        /// First addend.
        a: V,
        /// Second addend.
        b: V,
        /// Sum.
        r: V,
    },
    /// `r = a - b (- borrow)`.
    Sub {
        /// Minuend.
        a: V,
        /// Subtrahend.
        b: V,
        /// Difference.
        r: V,
    },
    /// As `Sub` without a borrow in: `r = a - b` exactly, so conditions may compare `a` with `b`.
    Cmp {
        /// Minuend.
        a: V,
        /// Subtrahend.
        b: V,
        /// Difference.
        r: V,
    },
    /// CF = OF = AF = 0, the rest from `r`.
    Logic {
        /// Result.
        r: V,
    },
    /// `r = a + 1`, CF kept.
    Inc {
        /// Operand.
        a: V,
        /// Result.
        r: V,
    },
    /// `r = a - 1`, CF kept.
    Dec {
        /// Operand.
        a: V,
        /// Result.
        r: V,
    },
    /// `a` shifted by a constant from 1 to the width less 1.
    Shift {
        /// SHL, SHR or SAR.
        op: Bin,
        /// Operand.
        a: V,
        /// Count.
        n: u32,
        /// Result.
        r: V,
    },
    /// SF, ZF, PF from `r`; CF and OF given as 0/1 bytes (W8); AF = 0.
    Result {
        /// Result.
        r: V,
        /// Carry flag, 0 or 1.
        cf: V,
        /// Overflow flag, 0 or 1.
        of: V,
    },
    /// Only CF and OF change (rotates); 0/1 bytes (W8).
    CfOf {
        /// Carry flag, 0 or 1.
        cf: V,
        /// Overflow flag, 0 or 1.
        of: V,
    },
    /// Only CF changes (BT, CLC, STC, CMC); a 0/1 byte (W8).
    Cf {
        /// Carry flag, 0 or 1.
        cf: V,
    },
    /// Only ZF changes; a 0/1 byte.
    Zf {
        /// Zero flag, 0 or 1.
        zf: V,
    },
    /// A comparison of floating-point numbers, none of which is a NaN: CF = less, ZF = equal, the rest clear; 0/1
    /// bytes (W8).
    Ordered {
        /// Whether the first is less.
        less: V,
        /// Whether they are equal.
        equal: V,
    },
    /// The lazy words themselves ([`crate::state::CpuState`]), 64-bit.
    Raw {
        /// `cc_z`.
        z: V,
        /// `cc_sp`.
        sp: V,
        /// `cc_co`.
        co: V,
    },
}

/// Condition codes in encoding order (SDM vol. 1 appendix B).
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Cond {
    O,
    No,
    B,
    Ae,
    E,
    Ne,
    Be,
    A,
    S,
    Ns,
    P,
    Np,
    L,
    Ge,
    Le,
    G,
}

/// A word of the CPU's state besides registers and arithmetic flags, of at most 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// RFLAGS without the arithmetic flags; bit 1 is always set.
    Flags,
    /// The current privilege level.
    Cpl,
    /// CR0.
    Cr0,
    /// CR2.
    Cr2,
    /// CR3.
    Cr3,
    /// CR4.
    Cr4,
    /// PKRU.
    Pkru,
    /// The selector in a segment register.
    Selector(u8),
    /// The base of a segment register.
    Base(u8),
    /// IA32_KERNEL_GS_BASE.
    KernelGsBase,
}

/// An operation on 128-bit lanes that neither faults nor touches flags ([`crate::simd`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LaneOp {
    /// Of the first operand.
    One(VecUnOp),
    /// Of the first two operands.
    Two(VecOp),
    /// Of the first two operands and an immediate.
    Immediate(VecImmOp, u8),
    /// Of three operands.
    Three(VecTerOp),
}

/// A floating-point operation on 128-bit lanes, under MXCSR ([`crate::simd::fp`], where operands are named).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FpCall {
    /// Arithmetic on `a` and `b`.
    Arith(FpOp, FpFmt),
    /// A comparison of `a` and `b` by a predicate.
    Compare(FpFmt, u8),
    /// Rounding of `b` to integral values.
    Round(FpFmt, u8),
    /// Dot product of `a` and `b`.
    Dot(FpFmt, u8),
    /// Fused multiply-add of `a`, `b` and `c`; a scalar one keeps the rest of `dst`.
    Fused(FmaKind, FpFmt),
    /// Conversion of `b`.
    Convert(CvtOp),
    /// VCVTPS2PH of `b`.
    ToHalf(u8),
}

/// The operands of one lane of a floating-point operation.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug)]
pub struct FpArgs<X> {
    pub a: X,
    pub b: X,
    pub c: X,
    pub dst: X,
}

impl<X: Copy> FpArgs<X> {
    /// Operands of an operation on two.
    pub fn two(a: X, b: X) -> FpArgs<X> {
        FpArgs { a, b, c: b, dst: a }
    }
}

/// A low lane, and the high one where there is one.
pub type LowHigh<X> = (X, Option<X>);

/// An evaluator of instruction semantics.
///
/// Integer values carry the width of the operation that made them, upper bits clear; booleans are W8 values 0 or 1.
pub trait Emit: Sized {
    /// An integer value of at most 64 bits.
    type V: Copy;
    /// A 128-bit vector value.
    type X: Copy;
    /// Why evaluation of this instruction stopped.
    type Trap;

    // ---- pure operations ----

    /// A constant.
    fn imm<W: Width>(&mut self, k: u64) -> Self::V;
    /// A two-operand operation; both operands and the result are `W` wide.
    fn bin<W: Width>(&mut self, op: Bin, a: Self::V, b: Self::V) -> Self::V;
    /// A one-operand operation.
    fn un<W: Width>(&mut self, op: Un, a: Self::V) -> Self::V;
    /// A comparison of `W` values, giving a boolean.
    fn cmp<W: Width>(&mut self, op: Cmp, a: Self::V, b: Self::V) -> Self::V;
    /// `if c { a } else { b }`; `c` is a boolean.
    fn select<W: Width>(&mut self, c: Self::V, a: Self::V, b: Self::V) -> Self::V;
    /// Zero-extends or truncates `a` from width `F` to width `T`.
    fn zext<F: Width, T: Width>(&mut self, a: Self::V) -> Self::V;
    /// Sign-extends `a` from width `F` to the wider or equal `T`.
    fn sext<F: Width, T: Width>(&mut self, a: Self::V) -> Self::V;
    /// The full product as (low, high).
    fn mul_wide<W: Width>(&mut self, signed: bool, a: Self::V, b: Self::V) -> (Self::V, Self::V);
    /// Divides `hi:lo` by `d`: (quotient, remainder), or #DE for a zero divisor or a quotient that does not fit.
    fn div_wide<W: Width>(
        &mut self,
        signed: bool,
        hi: Self::V,
        lo: Self::V,
        d: Self::V,
    ) -> Result<(Self::V, Self::V), Self::Trap>;

    // ---- registers ----

    /// The low `W` bits of a general-purpose register.
    fn gpr<W: Width>(&mut self, r: u8) -> Self::V;
    /// Writes a general-purpose register: 8- and 16-bit writes keep the rest, 32-bit writes clear the upper half.
    fn set_gpr<W: Width>(&mut self, r: u8, v: Self::V);
    /// Bits 15:8 of register 0–3.
    fn gpr_high(&mut self, r: u8) -> Self::V;
    /// Writes bits 15:8 of register 0–3.
    fn set_gpr_high(&mut self, r: u8, v: Self::V);
    /// A word of the state, as a 64-bit value.
    fn word(&mut self, w: Word) -> Self::V;
    /// Writes a word of 64 bits that nothing else is derived from: a base, or RFLAGS but for TF, AC and setting IF.
    fn set_word(&mut self, w: Word, v: Self::V);
    /// Sets RFLAGS.IF: an interrupt that waits is held back for one instruction.
    fn enable_interrupts(&mut self) -> Result<(), Self::Trap>;
    /// Has other vCPUs see the stores before it before the loads behind it are done.
    fn fence(&mut self);
    /// Sets or clears RFLAGS.AC at CPL 0.
    fn set_ac(&mut self, on: bool);
    /// XMM register `r`.
    fn xmm(&mut self, r: u8) -> Self::X;
    /// Writes XMM register `r`, keeping bits 255:128 (legacy SSE).
    fn set_xmm(&mut self, r: u8, v: Self::X);
    /// Bits 255:128 of YMM register `r`.
    fn ymm_high(&mut self, r: u8) -> Self::X;
    /// Writes bits 255:128 of YMM register `r`.
    fn set_ymm_high(&mut self, r: u8, v: Self::X);
    /// A vector constant.
    fn x_imm(&mut self, k: u128) -> Self::X;
    /// Low 64 bits of a vector.
    fn x_low(&mut self, x: Self::X) -> Self::V;
    /// High 64 bits of a vector.
    fn x_high(&mut self, x: Self::X) -> Self::V;
    /// A vector from its 64-bit halves.
    fn x_make(&mut self, low: Self::V, high: Self::V) -> Self::X;

    /// A lane operation.
    fn lane(&mut self, op: LaneOp, a: Self::X, b: Self::X, c: Self::X) -> Result<Self::X, Self::Trap>;
    /// The sign bits of the lane's elements of `bytes` bytes each, lowest first (64-bit value).
    fn signs(&mut self, x: Self::X, bytes: u8) -> Self::V;

    // ---- floating point ----

    /// A floating-point operation on the low lane, and on the high one where it is given. Exceptions are recorded in
    /// MXCSR; an unmasked one raises #XM.
    fn fp(
        &mut self,
        op: FpCall,
        low: FpArgs<Self::X>,
        high: Option<FpArgs<Self::X>>,
    ) -> Result<LowHigh<Self::X>, Self::Trap>;
    /// Compares the low elements of `a` and `b` and sets the flags as (U)COMISS and (U)COMISD do.
    fn fp_comi(&mut self, fmt: FpFmt, quiet: bool, a: Self::X, b: Self::X) -> Result<(), Self::Trap>;
    /// An integer of 64 bits if `wide`, else 32, as the low element; the rest of `a` is kept.
    fn fp_from_int(&mut self, fmt: FpFmt, wide: bool, a: Self::X, v: Self::V) -> Result<Self::X, Self::Trap>;
    /// The low element of `b` as an integer of 64 bits if `wide`, else 32 zero-extended.
    fn fp_to_int(&mut self, fmt: FpFmt, wide: bool, truncate: bool, b: Self::X) -> Result<Self::V, Self::Trap>;

    // ---- flags ----

    /// Shifts by a count from 0 to the operand's mask, flags and all, if this evaluator does so by itself.
    #[inline(always)]
    fn shift_by<W: Width>(&mut self, _op: Bin, _a: Self::V, _count: Self::V) -> Option<Self::V> {
        None
    }
    /// Whether [`Emit::shift_by`] does.
    const SHIFTS: bool = false;

    /// Records what the instruction did to the flags.
    fn set_flags<W: Width>(&mut self, f: Flags<Self::V>);
    /// A condition code as a boolean.
    fn cond(&mut self, c: Cond) -> Self::V;
    /// The lazy words (`cc_z`, `cc_sp`, `cc_co`).
    fn flags_raw(&mut self) -> (Self::V, Self::V, Self::V);

    // ---- memory ----

    /// Loads `W` from segment `i.seg` at effective address `ea` (64-bit value, already cut to the address size).
    fn load<W: Width>(&mut self, i: &Insn, seg: u8, ea: Self::V) -> Result<Self::V, Self::Trap>;
    /// Stores `W`.
    fn store<W: Width>(&mut self, i: &Insn, seg: u8, ea: Self::V, v: Self::V) -> Result<(), Self::Trap>;
    /// Loads `W` that the same instruction will store back: write permission is checked first, so that a fault is
    /// reported as a write, and a locked access is atomic with its [`Emit::store`].
    fn load_rmw<W: Width>(&mut self, i: &Insn, seg: u8, ea: Self::V) -> Result<Self::V, Self::Trap>;
    /// Checks that `W` may be stored, without storing: before the stores of an instruction that has several.
    fn check_store<W: Width>(&mut self, i: &Insn, ea: Self::V) -> Result<(), Self::Trap>;
    /// Checks that `bytes` at `ea` of segment `i.seg` may be stored, before the first of several stores.
    #[inline(always)]
    fn probe_write(&mut self, i: &Insn, ea: Self::V, bytes: u64) -> Result<(), Self::Trap> {
        // Enough for an evaluator that leaves faults to the interpreter: the first store finds out about the rest.
        let last = self.further(i, ea, bytes - 1);
        self.check_store::<W8>(i, last)
    }
    /// Checks that no byte of an operand of several loads has a non-canonical address, before the first of them.
    #[inline(always)]
    fn check_extent(&mut self, _i: &Insn, _ea: Self::V, _bytes: u64) -> Result<(), Self::Trap> {
        // As for `probe_write`: the load that cannot be done finds out.
        Ok(())
    }
    /// Loads `W` into the low end of a vector, zeros above.
    fn load_x_low<W: Width>(&mut self, i: &Insn, ea: Self::V) -> Result<Self::X, Self::Trap>;
    /// Loads 16 bytes; `aligned` raises #GP for a misaligned address.
    fn load_x(&mut self, i: &Insn, ea: Self::V, aligned: bool) -> Result<Self::X, Self::Trap>;
    /// Stores 16 bytes; `aligned` raises #GP for a misaligned address.
    fn store_x(&mut self, i: &Insn, ea: Self::V, v: Self::X, aligned: bool) -> Result<(), Self::Trap>;
    /// Loads 32 bytes, low half first, whose alignment matters only to 16.
    #[inline(always)]
    fn load_pair(&mut self, i: &Insn, ea: Self::V, aligned: bool) -> Result<(Self::X, Self::X), Self::Trap> {
        let low = self.load_x(i, ea, aligned)?;
        let at = self.further(i, ea, 16);
        Ok((low, self.load_x(i, at, aligned)?))
    }
    /// Stores 32 bytes, low half first.
    #[inline(always)]
    fn store_pair(
        &mut self,
        i: &Insn,
        ea: Self::V,
        (low, high): (Self::X, Self::X),
        aligned: bool,
    ) -> Result<(), Self::Trap> {
        self.store_x(i, ea, low, aligned)?;
        let at = self.further(i, ea, 16);
        self.store_x(i, at, high, aligned)
    }

    // ---- control ----

    /// Address of the next instruction, as CS:RIP holds it (cut to the code size).
    fn next_ip(&mut self, i: &Insn) -> Self::V;
    /// Checks that a near branch may go to `target` (64-bit value): canonical, or inside CS's limit; else #GP(0).
    fn check_target(&mut self, i: &Insn, target: Self::V) -> Result<(), Self::Trap>;
    /// As [`Emit::check_target`], for the instruction's own relative target.
    fn check_relative(&mut self, i: &Insn) -> Result<(), Self::Trap>;
    /// Sets RIP to a computed, checked target.
    fn set_ip(&mut self, i: &Insn, target: Self::V);
    /// Sets RIP to the instruction's own relative target, checking it as [`Emit::check_target`] does.
    fn jump_rel(&mut self, i: &Insn) -> Result<(), Self::Trap>;
    /// Sets RIP to the relative target if `c`, else to the next instruction.
    fn branch_rel(&mut self, i: &Insn, c: Self::V) -> Result<(), Self::Trap>;
    /// Raises an exception if `c`, a W8 value, is not 0.
    fn fault_if(&mut self, c: Self::V, e: Exception) -> Result<(), Self::Trap>;
    /// Evaluation that this evaluator has no form for: the interpreter never gets here with a reachable
    /// instruction (it raises #UD), the compiler falls back to the interpreter's evaluation of the instruction.
    fn unsupported(&mut self) -> Self::Trap;

    // ---- derived ----

    /// `a + b`.
    #[inline(always)]
    fn add<W: Width>(&mut self, a: Self::V, b: Self::V) -> Self::V {
        self.bin::<W>(Bin::Add, a, b)
    }
    /// `a - b`.
    #[inline(always)]
    fn sub<W: Width>(&mut self, a: Self::V, b: Self::V) -> Self::V {
        self.bin::<W>(Bin::Sub, a, b)
    }
    /// `a & b`.
    #[inline(always)]
    fn and<W: Width>(&mut self, a: Self::V, b: Self::V) -> Self::V {
        self.bin::<W>(Bin::And, a, b)
    }
    /// `a | b`.
    #[inline(always)]
    fn or<W: Width>(&mut self, a: Self::V, b: Self::V) -> Self::V {
        self.bin::<W>(Bin::Or, a, b)
    }
    /// `a ^ b`.
    #[inline(always)]
    fn xor<W: Width>(&mut self, a: Self::V, b: Self::V) -> Self::V {
        self.bin::<W>(Bin::Xor, a, b)
    }
    /// `op(a, k)` with a constant.
    #[inline(always)]
    fn bin_imm<W: Width>(&mut self, op: Bin, a: Self::V, k: u64) -> Self::V {
        let k = self.imm::<W>(k);
        self.bin::<W>(op, a, k)
    }
    /// Bit `n` of `a` as a boolean.
    #[inline(always)]
    fn bit<W: Width>(&mut self, a: Self::V, n: u32) -> Self::V {
        let shifted = self.bin_imm::<W>(Bin::Shr, a, u64::from(n));
        let low = self.zext::<W, W8>(shifted);
        self.bin_imm::<W8>(Bin::And, low, 1)
    }
    /// Whether a 64-bit address is not canonical.
    #[inline(always)]
    fn is_not_canonical(&mut self, address: Self::V) -> Self::V {
        let up = self.bin_imm::<W64>(Bin::Shl, address, 16);
        let back = self.bin_imm::<W64>(Bin::Sar, up, 16);
        self.cmp::<W64>(Cmp::Ne, back, address)
    }
    /// Whether `a` has one of the bits `mask`.
    #[inline(always)]
    fn has_bits(&mut self, a: Self::V, mask: u64) -> Self::V {
        let bits = self.bin_imm::<W64>(Bin::And, a, mask);
        let zero = self.imm::<W64>(0);
        self.cmp::<W64>(Cmp::Ne, bits, zero)
    }
    /// Whether `a` is zero.
    #[inline(always)]
    fn is_zero<W: Width>(&mut self, a: Self::V) -> Self::V {
        let zero = self.imm::<W>(0);
        self.cmp::<W>(Cmp::Eq, a, zero)
    }

    /// The effective address of the instruction's memory operand, without the segment base (64-bit value).
    #[inline(always)]
    fn ea(&mut self, i: &Insn) -> Self::V {
        use crate::insn::NO_REG;
        let mut address = if i.rip_relative {
            let next = self.next_ip(i);
            if i.disp == 0 { next } else { self.bin_imm::<W64>(Bin::Add, next, i.disp as u64) }
        } else if i.base != NO_REG {
            let base = self.gpr::<W64>(i.base);
            if i.disp == 0 { base } else { self.bin_imm::<W64>(Bin::Add, base, i.disp as u64) }
        } else {
            self.imm::<W64>(i.disp as u64)
        };
        if i.index != NO_REG {
            let mut index = self.gpr::<W64>(i.index);
            if i.scale != 0 {
                index = self.bin_imm::<W64>(Bin::Shl, index, u64::from(i.scale));
            }
            address = self.add::<W64>(address, index);
        }
        self.cut_address(i, address)
    }

    /// Cuts a 64-bit value to the instruction's address size.
    #[inline(always)]
    fn cut_address(&mut self, i: &Insn, address: Self::V) -> Self::V {
        match i.addr_bytes {
            8 => address,
            4 => self.bin_imm::<W64>(Bin::And, address, 0xffff_ffff),
            _ => self.bin_imm::<W64>(Bin::And, address, 0xffff),
        }
    }

    /// The address `bytes` into an operand at `ea`. The address size cuts where an operand begins, not where it ends:
    /// in 64-bit mode one that a 32-bit address leads to may reach beyond 4 GiB. In other modes linear addresses do
    /// not.
    #[inline(always)]
    fn further(&mut self, i: &Insn, ea: Self::V, bytes: u64) -> Self::V {
        let at = self.bin_imm::<W64>(Bin::Add, ea, bytes);
        if i.stack_bytes == 8 { at } else { self.bin_imm::<W64>(Bin::And, at, 0xffff_ffff) }
    }

    /// Reads operand `n`, an integer of width `W`.
    #[inline(always)]
    fn read<W: Width>(&mut self, i: &Insn, n: usize) -> Result<Self::V, Self::Trap> {
        Ok(match i.op[n] {
            Opnd::Gpr(r) => self.gpr::<W>(r),
            Opnd::GprHigh(r) => self.gpr_high(r),
            Opnd::Imm => self.imm::<W>(i.imm),
            Opnd::Mem => {
                let ea = self.ea(i);
                self.load::<W>(i, i.seg, ea)?
            }
            _ => return Err(self.unsupported()),
        })
    }

    /// Writes operand `n`, an integer of width `W`.
    #[inline(always)]
    fn write<W: Width>(&mut self, i: &Insn, n: usize, v: Self::V) -> Result<(), Self::Trap> {
        match i.op[n] {
            Opnd::Gpr(r) => self.set_gpr::<W>(r, v),
            Opnd::GprHigh(r) => self.set_gpr_high(r, v),
            Opnd::Mem => {
                let ea = self.ea(i);
                self.store::<W>(i, i.seg, ea, v)?
            }
            _ => return Err(self.unsupported()),
        }
        Ok(())
    }

    /// Reads operand `n`, applies `f`, writes it back: the shape of every read-modify-write instruction. `f` must not
    /// change architectural state; it returns the new value and the flags to record once the store is done.
    #[inline(always)]
    fn modify<W: Width>(
        &mut self,
        i: &Insn,
        n: usize,
        f: impl FnOnce(&mut Self, Self::V) -> (Self::V, Option<Flags<Self::V>>),
    ) -> Result<(), Self::Trap> {
        let flags = match i.op[n] {
            Opnd::Gpr(r) => {
                let a = self.gpr::<W>(r);
                let (v, flags) = f(self, a);
                self.set_gpr::<W>(r, v);
                flags
            }
            Opnd::GprHigh(r) => {
                let a = self.gpr_high(r);
                let (v, flags) = f(self, a);
                self.set_gpr_high(r, v);
                flags
            }
            Opnd::Mem => {
                let ea = self.ea(i);
                let a = self.load_rmw::<W>(i, i.seg, ea)?;
                let (v, flags) = f(self, a);
                self.store::<W>(i, i.seg, ea, v)?;
                flags
            }
            _ => return Err(self.unsupported()),
        };
        if let Some(flags) = flags {
            self.set_flags::<W>(flags);
        }
        Ok(())
    }

    /// Pushes a `W` value: the store, then the stack pointer.
    #[inline(always)]
    fn push<W: Width>(&mut self, i: &Insn, v: Self::V) -> Result<(), Self::Trap> {
        let sp = self.stack_pointer(i);
        let new = self.bin_imm::<W64>(Bin::Sub, sp, W::BYTES);
        let new = self.cut_stack(i, new);
        self.store::<W>(i, crate::state::seg::SS, new, v)?;
        self.set_stack_pointer(i, new);
        Ok(())
    }

    /// The top of the stack, `W` wide, and the stack pointer behind it; the caller sets the pointer when nothing can
    /// fault any more.
    #[inline(always)]
    fn peek<W: Width>(&mut self, i: &Insn) -> Result<(Self::V, Self::V), Self::Trap> {
        let sp = self.stack_pointer(i);
        let v = self.load::<W>(i, crate::state::seg::SS, sp)?;
        let new = self.bin_imm::<W64>(Bin::Add, sp, W::BYTES);
        Ok((v, self.cut_stack(i, new)))
    }

    /// The stack pointer at the stack's address size, as a 64-bit value.
    #[inline(always)]
    fn stack_pointer(&mut self, i: &Insn) -> Self::V {
        let sp = self.gpr::<W64>(crate::state::gpr::RSP);
        self.cut_stack(i, sp)
    }

    /// Cuts a 64-bit value to the stack's address size.
    #[inline(always)]
    fn cut_stack(&mut self, i: &Insn, sp: Self::V) -> Self::V {
        match i.stack_bytes {
            8 => sp,
            4 => self.bin_imm::<W64>(Bin::And, sp, 0xffff_ffff),
            _ => self.bin_imm::<W64>(Bin::And, sp, 0xffff),
        }
    }

    /// Sets the stack pointer at the stack's address size.
    #[inline(always)]
    fn set_stack_pointer(&mut self, i: &Insn, sp: Self::V) {
        use crate::state::gpr::RSP;
        match i.stack_bytes {
            8 => self.set_gpr::<W64>(RSP, sp),
            4 => {
                let sp = self.zext::<W64, W32>(sp);
                self.set_gpr::<W32>(RSP, sp)
            }
            _ => {
                let sp = self.zext::<W64, crate::width::W16>(sp);
                self.set_gpr::<crate::width::W16>(RSP, sp)
            }
        }
    }
}
