//! Bit and byte instructions (SDM vol. 1 §5.1.6) and the bit-manipulation extensions: BT family, scans and counts,
//! BMI1/2, CRC32, ADCX and ADOX.

use iced_x86::Mnemonic;

use crate::cpu::Cpu;
use crate::emit::{Bin, Cmp, Cond, Emit, Flags, Un};
use crate::exception::Trap;
use crate::insn::{Insn, Opnd};
use crate::semantics::{Form, Sem, interp, sized};
use crate::simd::scalar;
use crate::width::{W8, W16, W32, W64, Width};

/// The group's semantics.
pub fn lookup(form: &Form<'_>) -> Option<&'static Sem> {
    Some(match form.instr.mnemonic() {
        Mnemonic::Bt => sized!(form.bytes, bt),
        Mnemonic::Bts => sized!(form.bytes, bts),
        Mnemonic::Btr => sized!(form.bytes, btr),
        Mnemonic::Btc => sized!(form.bytes, btc),
        Mnemonic::Bsf => sized!(form.bytes, bsf),
        Mnemonic::Bsr => sized!(form.bytes, bsr),
        Mnemonic::Lzcnt => sized!(form.bytes, lzcnt),
        Mnemonic::Tzcnt => sized!(form.bytes, tzcnt),
        Mnemonic::Popcnt => sized!(form.bytes, popcnt),
        Mnemonic::Blsr => sized!(form.bytes, blsr),
        Mnemonic::Blsi => sized!(form.bytes, blsi),
        Mnemonic::Blsmsk => sized!(form.bytes, blsmsk),
        Mnemonic::Bextr => sized!(form.bytes, bextr),
        Mnemonic::Bzhi => sized!(form.bytes, bzhi),
        Mnemonic::Pdep => interp!(pdep),
        Mnemonic::Pext => interp!(pext),
        Mnemonic::Crc32 => interp!(crc32),
        Mnemonic::Adcx => sized!(form.bytes, adcx),
        Mnemonic::Adox => sized!(form.bytes, adox),
        _ => return None,
    })
}

/// What the BT family does to the selected bit.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    Keep,
    Set,
    Clear,
    Flip,
}

#[inline(always)]
fn bit_test<E: Emit, W: Width>(e: &mut E, i: &Insn, change: Change) -> Result<(), E::Trap> {
    let n = e.read::<W>(i, 1)?;
    let apply = |e: &mut E, a: E::V| {
        let selected = e.bin::<W>(Bin::Shr, a, n);
        let cf = e.bit::<W>(selected, 0);
        let one = e.imm::<W>(1);
        let mask = e.bin::<W>(Bin::Shl, one, n);
        let r = match change {
            Change::Keep => a,
            Change::Set => e.or::<W>(a, mask),
            Change::Clear => {
                let others = e.un::<W>(Un::Not, mask);
                e.and::<W>(a, others)
            }
            Change::Flip => e.xor::<W>(a, mask),
        };
        (r, Flags::Cf { cf })
    };
    if i.op[0] != Opnd::Mem {
        let a = e.read::<W>(i, 0)?;
        let (r, flags) = apply(e, a);
        if change != Change::Keep {
            e.write::<W>(i, 0, r)?;
        }
        e.set_flags::<W>(flags);
        return Ok(());
    }
    // A register offset reaches outside the operand: the address moves by whole operands (SDM vol. 2, BT).
    let mut ea = e.ea(i);
    if i.op[1] != Opnd::Imm {
        let offset = e.sext::<W, W64>(n);
        let units = e.bin_imm::<W64>(Bin::Sar, offset, u64::from(W::BITS.trailing_zeros()));
        let bytes = e.bin_imm::<W64>(Bin::Shl, units, u64::from(W::BYTES.trailing_zeros()));
        ea = e.add::<W64>(ea, bytes);
        ea = e.cut_address(i, ea);
    }
    if change == Change::Keep {
        let a = e.load::<W>(i, i.seg, ea)?;
        let (_, flags) = apply(e, a);
        e.set_flags::<W>(flags);
        return Ok(());
    }
    let a = e.load_rmw::<W>(i, i.seg, ea)?;
    let (r, flags) = apply(e, a);
    e.store::<W>(i, i.seg, ea, r)?;
    e.set_flags::<W>(flags);
    Ok(())
}

fn bt<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    bit_test::<E, W>(e, i, Change::Keep)
}

fn bts<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    bit_test::<E, W>(e, i, Change::Set)
}

fn btr<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    bit_test::<E, W>(e, i, Change::Clear)
}

fn btc<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    bit_test::<E, W>(e, i, Change::Flip)
}

/// BSF and BSR of zero set ZF and leave the destination as it was.
#[inline(always)]
fn scan<E: Emit, W: Width>(e: &mut E, i: &Insn, f: impl Fn(&mut E, E::V) -> E::V) -> Result<(), E::Trap> {
    let a = e.read::<W>(i, 1)?;
    let Opnd::Gpr(d) = i.op[0] else { return Err(e.unsupported()) };
    let n = f(e, a);
    let zero = e.is_zero::<W>(a);
    let whole = e.gpr::<W64>(d);
    let found = if W::BITS >= 32 {
        e.zext::<W, W64>(n)
    } else {
        let kept = e.bin_imm::<W64>(Bin::And, whole, !W::MASK);
        let low = e.zext::<W, W64>(n);
        e.or::<W64>(kept, low)
    };
    let v = e.select::<W64>(zero, whole, found);
    e.set_gpr::<W64>(d, v);
    e.set_flags::<W>(Flags::Zf { zf: zero });
    Ok(())
}

fn bsf<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    scan::<E, W>(e, i, |e, a| e.un::<W>(Un::Ctz, a))
}

fn bsr<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    scan::<E, W>(e, i, |e, a| {
        let n = e.un::<W>(Un::Clz, a);
        let top = e.imm::<W>(u64::from(W::BITS - 1));
        e.sub::<W>(top, n)
    })
}

/// LZCNT and TZCNT: CF for a zero source, ZF for a zero result.
#[inline(always)]
fn count<E: Emit, W: Width>(e: &mut E, i: &Insn, op: Un) -> Result<(), E::Trap> {
    let a = e.read::<W>(i, 1)?;
    let r = e.un::<W>(op, a);
    e.write::<W>(i, 0, r)?;
    let cf = e.is_zero::<W>(a);
    let of = e.imm::<W8>(0);
    e.set_flags::<W>(Flags::Result { r, cf, of });
    Ok(())
}

fn lzcnt<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    count::<E, W>(e, i, Un::Clz)
}

fn tzcnt<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    count::<E, W>(e, i, Un::Ctz)
}

/// POPCNT clears every flag but ZF, which tells a zero source.
fn popcnt<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let a = e.read::<W>(i, 1)?;
    let r = e.un::<W>(Un::Popcnt, a);
    e.write::<W>(i, 0, r)?;
    let zero = e.is_zero::<W>(a);
    let z = e.bin_imm::<W8>(Bin::Xor, zero, 1);
    let z = e.zext::<W8, W64>(z);
    let (sp, co) = (e.imm::<W64>(1), e.imm::<W64>(0));
    e.set_flags::<W>(Flags::Raw { z, sp, co });
    Ok(())
}

#[inline(always)]
fn lowest_bit<E: Emit, W: Width>(
    e: &mut E,
    i: &Insn,
    carry_if_zero: bool,
    f: impl Fn(&mut E, E::V) -> E::V,
) -> Result<(), E::Trap> {
    let a = e.read::<W>(i, 1)?;
    let r = f(e, a);
    e.write::<W>(i, 0, r)?;
    let zero = e.is_zero::<W>(a);
    let cf = if carry_if_zero { zero } else { e.bin_imm::<W8>(Bin::Xor, zero, 1) };
    let of = e.imm::<W8>(0);
    e.set_flags::<W>(Flags::Result { r, cf, of });
    Ok(())
}

fn blsr<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    lowest_bit::<E, W>(e, i, true, |e, a| {
        let below = e.bin_imm::<W>(Bin::Sub, a, 1);
        e.and::<W>(a, below)
    })
}

fn blsi<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    lowest_bit::<E, W>(e, i, false, |e, a| {
        let negated = e.un::<W>(Un::Neg, a);
        e.and::<W>(a, negated)
    })
}

fn blsmsk<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    lowest_bit::<E, W>(e, i, true, |e, a| {
        let below = e.bin_imm::<W>(Bin::Sub, a, 1);
        e.xor::<W>(a, below)
    })
}

/// `a` with only the bits below `n` (a value of 0 to 255, 64-bit) kept.
#[inline(always)]
fn low_bits<E: Emit, W: Width>(e: &mut E, a: E::V, n: E::V) -> E::V {
    let size = e.imm::<W64>(u64::from(W::BITS));
    let short = e.cmp::<W64>(Cmp::Ltu, n, size);
    let one = e.imm::<W64>(1);
    let bit = e.bin::<W64>(Bin::Shl, one, n);
    let mask = e.bin_imm::<W64>(Bin::Sub, bit, 1);
    let mask = e.zext::<W64, W>(mask);
    let cut = e.and::<W>(a, mask);
    e.select::<W>(short, cut, a)
}

fn bextr<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let a = e.read::<W>(i, 1)?;
    let control = e.read::<W>(i, 2)?;
    let control = e.zext::<W, W64>(control);
    let start = e.bin_imm::<W64>(Bin::And, control, 0xff);
    let shifted = e.bin_imm::<W64>(Bin::Shr, control, 8);
    let len = e.bin_imm::<W64>(Bin::And, shifted, 0xff);
    let size = e.imm::<W64>(u64::from(W::BITS));
    let inside = e.cmp::<W64>(Cmp::Ltu, start, size);
    let n = e.zext::<W64, W>(start);
    let moved = e.bin::<W>(Bin::Shr, a, n);
    let zero = e.imm::<W>(0);
    let moved = e.select::<W>(inside, moved, zero);
    let r = low_bits::<E, W>(e, moved, len);
    e.write::<W>(i, 0, r)?;
    e.set_flags::<W>(Flags::Logic { r });
    Ok(())
}

fn bzhi<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let a = e.read::<W>(i, 1)?;
    let n = e.read::<W>(i, 2)?;
    let n = e.zext::<W, W64>(n);
    let n = e.bin_imm::<W64>(Bin::And, n, 0xff);
    let r = low_bits::<E, W>(e, a, n);
    e.write::<W>(i, 0, r)?;
    let size = e.imm::<W64>(u64::from(W::BITS));
    let inside = e.cmp::<W64>(Cmp::Ltu, n, size);
    let cf = e.bin_imm::<W8>(Bin::Xor, inside, 1);
    let of = e.imm::<W8>(0);
    e.set_flags::<W>(Flags::Result { r, cf, of });
    Ok(())
}

fn deposit(cpu: &mut Cpu, i: &Insn, f: fn(u64, u64) -> u64) -> Result<(), Trap> {
    if i.osize == 8 {
        let (a, b) = (cpu.read::<W64>(i, 1)?, cpu.read::<W64>(i, 2)?);
        return cpu.write::<W64>(i, 0, f(a, b));
    }
    let (a, b) = (cpu.read::<W32>(i, 1)?, cpu.read::<W32>(i, 2)?);
    cpu.write::<W32>(i, 0, f(a, b))
}

fn pdep(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    deposit(cpu, i, scalar::pdep)
}

fn pext(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    deposit(cpu, i, scalar::pext)
}

fn crc32(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let bytes = source_bytes(i);
    let data = match bytes {
        1 => cpu.read::<W8>(i, 1)?,
        2 => cpu.read::<W16>(i, 1)?,
        4 => cpu.read::<W32>(i, 1)?,
        _ => cpu.read::<W64>(i, 1)?,
    };
    let crc = cpu.read::<W32>(i, 0)?;
    // A 64-bit destination is zero-extended like a 32-bit one.
    let r = scalar::crc32(crc as u32, data, u32::from(bytes));
    cpu.write::<W32>(i, 0, u64::from(r))
}

fn source_bytes(i: &Insn) -> u8 {
    use iced_x86::Code::*;
    match i.iced_code() {
        Crc32_r32_rm8 | Crc32_r64_rm8 => 1,
        Crc32_r32_rm16 => 2,
        Crc32_r32_rm32 => 4,
        _ => 8,
    }
}

/// ADCX adds with CF and writes only CF; ADOX the same with OF.
#[inline(always)]
fn add_flag<E: Emit, W: Width>(e: &mut E, i: &Insn, flag: Cond) -> Result<(), E::Trap> {
    let b = e.read::<W>(i, 1)?;
    let a = e.read::<W>(i, 0)?;
    let carry = e.cond(flag);
    let other = e.cond(if flag == Cond::B { Cond::O } else { Cond::B });
    let sum = e.add::<W>(a, b);
    let first = e.cmp::<W>(Cmp::Ltu, sum, a);
    let carry_in = e.zext::<W8, W>(carry);
    let r = e.add::<W>(sum, carry_in);
    let second = e.cmp::<W>(Cmp::Ltu, r, sum);
    let out = e.or::<W8>(first, second);
    e.write::<W>(i, 0, r)?;
    let flags = if flag == Cond::B { Flags::CfOf { cf: out, of: other } } else { Flags::CfOf { cf: other, of: out } };
    e.set_flags::<W>(flags);
    Ok(())
}

fn adcx<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    add_flag::<E, W>(e, i, Cond::B)
}

fn adox<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    add_flag::<E, W>(e, i, Cond::O)
}
