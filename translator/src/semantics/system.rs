//! System instructions (SDM vol. 1 §5.20) and far control transfers: which function of [`crate::system`] does each, and
//! those that kernels execute on every way in and out, which have a compiled form.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use crate::emit::{Bin, Cmp, Emit, Word};
use crate::exception::{Exception, vector};
use crate::insn::{Insn, Opnd};
use crate::semantics::{Form, Sem, both, interp};
use crate::state::{cr, flag, gpr, seg};
use crate::system::{control, debug, far, fast_call, msr};
use crate::width::{W8, W16, W32, W64};

const GP0: Exception = Exception::with_error(vector::GP, 0);
const UD: Exception = Exception::plain(vector::UD);

/// The group's semantics.
pub fn lookup(form: &Form<'_>) -> Option<&'static Sem> {
    use Mnemonic::*;
    let i = form.instr;
    Some(match i.mnemonic() {
        Mov => return moves(i),
        Pop if i.op0_kind() == OpKind::Register && i.op0_register().is_segment_register() => {
            interp!(control::pop_seg, ends)
        }
        Lds | Les | Lfs | Lgs | Lss => interp!(control::load_far, ends; aux = far_segment),
        Clts => interp!(control::clts, ends),
        Lmsw => interp!(control::lmsw, ends),
        Smsw => interp!(control::smsw),
        Lgdt => interp!(control::lgdt, ends),
        Lidt => interp!(control::lidt, ends),
        Sgdt => interp!(control::sgdt),
        Sidt => interp!(control::sidt),
        Lldt => interp!(control::lldt, ends),
        Ltr => interp!(control::ltr, ends),
        Sldt => interp!(control::sldt),
        Str => interp!(control::str_),
        Invlpg => interp!(control::invlpg, ends),
        Invpcid => interp!(control::invpcid, ends),
        Wbinvd | Invd => interp!(control::wbinvd, ends),
        Hlt => interp!(control::hlt, ends),
        Cli => both!(cli),
        Sti => both!(sti),
        Popf | Popfd | Popfq => interp!(control::popf),
        Clac => both!(clac),
        Stac => both!(stac),
        Verr => interp!(control::verify),
        Verw => interp!(control::verify; aux = one),
        Lar => interp!(control::lar_lsl),
        Lsl => interp!(control::lar_lsl; aux = one),
        Arpl => interp!(control::arpl),
        Swapgs => both!(swapgs),
        Rdfsbase | Rdgsbase | Wrfsbase | Wrgsbase => both!(fs_gs_base; aux = fs_gs),
        Int => interp!(control::int_n, ends),
        Int3 => interp!(control::int3, ends),
        Into => interp!(control::into, ends),
        Int1 => interp!(control::int1, ends),
        Bound => interp!(control::bound),
        Rdtsc => interp!(control::rdtsc),
        Rdtscp => interp!(control::rdtscp),
        Rdpid => interp!(control::rdpid),
        Rdpkru => both!(rdpkru),
        Wrpkru => interp!(control::wrpkru, ends),
        Rdpmc => interp!(control::rdpmc),
        Rdrand | Rdseed => interp!(control::rdrand),
        Xgetbv => interp!(control::xgetbv),
        Xsetbv => interp!(control::xsetbv, ends),
        Cpuid => interp!(control::cpuid, ends),
        Monitor => interp!(control::monitor),
        Mwait => interp!(control::monitor; aux = one),
        Rdmsr => interp!(msr::rdmsr, ends),
        Wrmsr => interp!(msr::wrmsr, ends),
        Syscall => interp!(fast_call::syscall, ends),
        Sysret | Sysretq => interp!(fast_call::sysret, ends),
        Sysenter => interp!(fast_call::sysenter, ends),
        Sysexit | Sysexitq => interp!(fast_call::sysexit, ends),
        Iret | Iretd | Iretq => interp!(far::iret, ends),
        Retf => interp!(far::ret_far, ends),
        Jmp if i.is_jmp_far() || i.is_jmp_far_indirect() => interp!(far::jmp_far, ends),
        Call if i.is_call_far() || i.is_call_far_indirect() => interp!(far::call_far, ends),
        _ => return None,
    })
}

fn moves(i: &Instruction) -> Option<&'static Sem> {
    let register = |n| if i.op_kind(n) == OpKind::Register { i.op_register(n) } else { Register::None };
    let (to, from) = (register(0), register(1));
    if to.is_segment_register() {
        Some(interp!(control::mov_to_seg, ends))
    } else if from.is_segment_register() {
        Some(both!(mov_from_seg))
    } else if to.is_cr() {
        Some(interp!(control::mov_to_cr, ends))
    } else if matches!(from, Register::CR0 | Register::CR2 | Register::CR3 | Register::CR4) {
        Some(both!(mov_from_cr))
    } else if from.is_cr() {
        Some(interp!(control::mov_from_cr))
    } else if to.is_dr() {
        Some(interp!(debug::mov_to_dr, ends))
    } else if from.is_dr() {
        Some(interp!(debug::mov_from_dr))
    } else {
        None
    }
}

fn one(_: &Instruction) -> u16 {
    1
}

fn far_segment(i: &Instruction) -> u16 {
    u16::from(match i.mnemonic() {
        Mnemonic::Lds => seg::DS,
        Mnemonic::Les => seg::ES,
        Mnemonic::Lfs => seg::FS,
        Mnemonic::Lgs => seg::GS,
        _ => seg::SS,
    })
}

fn fs_gs(i: &Instruction) -> u16 {
    match i.code() {
        Code::Rdfsbase_r32 | Code::Rdfsbase_r64 => u16::from(seg::FS),
        Code::Rdgsbase_r32 | Code::Rdgsbase_r64 => u16::from(seg::GS),
        Code::Wrfsbase_r32 | Code::Wrfsbase_r64 => u16::from(seg::FS) | 8,
        _ => u16::from(seg::GS) | 8,
    }
}

/// Fails unless CPL is 0.
fn require_cpl0<E: Emit>(e: &mut E, or: Exception) -> Result<(), E::Trap> {
    let cpl = e.word(Word::Cpl);
    let cpl = e.zext::<W64, W8>(cpl);
    e.fault_if(cpl, or)
}

/// Fails unless IOPL is at least CPL, which is 0 in real mode.
fn require_iopl<E: Emit>(e: &mut E) -> Result<(), E::Trap> {
    let flags = e.word(Word::Flags);
    let iopl = e.bin_imm::<W64>(Bin::Shr, flags, flag::IOPL.trailing_zeros().into());
    let iopl = e.bin_imm::<W64>(Bin::And, iopl, 3);
    let cpl = e.word(Word::Cpl);
    let outside = e.cmp::<W64>(Cmp::Ltu, iopl, cpl);
    e.fault_if(outside, GP0)
}

/// Fails with #UD unless a bit of CR4 is set.
fn require_cr4<E: Emit>(e: &mut E, bit: u64) -> Result<(), E::Trap> {
    let cr4 = e.word(Word::Cr4);
    let set = e.has_bits(cr4, bit);
    let clear = e.bin_imm::<W8>(Bin::Xor, set, 1);
    e.fault_if(clear, UD)
}

/// There are no virtual interrupts: CR4.VME and CR4.PVI are reserved.
fn cli<E: Emit>(e: &mut E, _: &Insn) -> Result<(), E::Trap> {
    require_iopl(e)?;
    let flags = e.word(Word::Flags);
    let flags = e.bin_imm::<W64>(Bin::And, flags, !flag::IF);
    e.set_word(Word::Flags, flags);
    Ok(())
}

fn sti<E: Emit>(e: &mut E, _: &Insn) -> Result<(), E::Trap> {
    require_iopl(e)?;
    e.enable_interrupts()
}

fn clac<E: Emit>(e: &mut E, _: &Insn) -> Result<(), E::Trap> {
    require_cpl0(e, UD)?;
    e.set_ac(false);
    Ok(())
}

fn stac<E: Emit>(e: &mut E, _: &Insn) -> Result<(), E::Trap> {
    require_cpl0(e, UD)?;
    e.set_ac(true);
    Ok(())
}

fn swapgs<E: Emit>(e: &mut E, _: &Insn) -> Result<(), E::Trap> {
    require_cpl0(e, GP0)?;
    let user = e.word(Word::Base(seg::GS));
    let kernel = e.word(Word::KernelGsBase);
    e.set_word(Word::Base(seg::GS), kernel);
    e.set_word(Word::KernelGsBase, user);
    Ok(())
}

/// RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE; `aux` is the segment register, plus 8 for writes.
fn fs_gs_base<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let Opnd::Gpr(r) = i.op[0] else { return Err(e.unsupported()) };
    require_cr4(e, cr::CR4_FSGSBASE)?;
    let base = Word::Base(i.aux as u8 & 7);
    match (i.aux & 8 != 0, i.osize) {
        (false, 8) => {
            let v = e.word(base);
            e.set_gpr::<W64>(r, v);
        }
        (false, _) => {
            let v = e.word(base);
            let v = e.zext::<W64, W32>(v);
            e.set_gpr::<W32>(r, v);
        }
        (true, 8) => {
            let v = e.gpr::<W64>(r);
            let bad = e.is_not_canonical(v);
            e.fault_if(bad, GP0)?;
            e.set_word(base, v);
        }
        (true, _) => {
            let v = e.gpr::<W32>(r);
            let v = e.zext::<W32, W64>(v);
            e.set_word(base, v);
        }
    }
    Ok(())
}

fn rdpkru<E: Emit>(e: &mut E, _: &Insn) -> Result<(), E::Trap> {
    require_cr4(e, cr::CR4_PKE)?;
    let ecx = e.gpr::<W32>(gpr::RCX);
    let zero = e.imm::<W32>(0);
    let bad = e.cmp::<W32>(Cmp::Ne, ecx, zero);
    e.fault_if(bad, GP0)?;
    let pkru = e.word(Word::Pkru);
    e.set_gpr::<W64>(gpr::RAX, pkru);
    let zero = e.imm::<W64>(0);
    e.set_gpr::<W64>(gpr::RDX, zero);
    Ok(())
}

/// MOV from CR0, CR2, CR3 and CR4: 64 bits in 64-bit mode, else 32.
fn mov_from_cr<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let word = match i.op[1] {
        Opnd::Cr(0) => Word::Cr0,
        Opnd::Cr(2) => Word::Cr2,
        Opnd::Cr(3) => Word::Cr3,
        Opnd::Cr(4) => Word::Cr4,
        _ => return Err(e.unsupported()),
    };
    let Opnd::Gpr(r) = i.op[0] else { return Err(e.unsupported()) };
    require_cpl0(e, GP0)?;
    let v = e.word(word);
    if i.stack_bytes == 8 {
        e.set_gpr::<W64>(r, v);
    } else {
        let v = e.zext::<W64, W32>(v);
        e.set_gpr::<W32>(r, v);
    }
    Ok(())
}

/// MOV from a segment register: a register takes the operand size, memory 16 bits.
fn mov_from_seg<E: Emit>(e: &mut E, i: &Insn) -> Result<(), E::Trap> {
    let Opnd::Seg(s) = i.op[1] else { return Err(e.unsupported()) };
    let v = e.word(Word::Selector(s));
    match (i.op[0], i.osize) {
        (Opnd::Gpr(r), 8) => e.set_gpr::<W64>(r, v),
        (Opnd::Gpr(r), 4) => {
            let v = e.zext::<W64, W32>(v);
            e.set_gpr::<W32>(r, v);
        }
        _ => {
            let v = e.zext::<W64, W16>(v);
            e.write::<W16>(i, 0, v)?;
        }
    }
    Ok(())
}
