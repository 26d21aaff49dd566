//! System instructions (SDM vol. 1 §5.20) and far control transfers: which function of [`crate::system`] does each.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use crate::semantics::{Form, Sem, interp};
use crate::state::seg;
use crate::system::{control, debug, far, fast_call, msr};

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
        Wbinvd | Invd => interp!(control::wbinvd),
        Hlt => interp!(control::hlt, ends),
        Cli => interp!(control::cli),
        Sti => interp!(control::sti),
        Popf | Popfd | Popfq => interp!(control::popf),
        Clac => interp!(control::clac),
        Stac => interp!(control::stac),
        Verr => interp!(control::verify),
        Verw => interp!(control::verify; aux = one),
        Lar => interp!(control::lar_lsl),
        Lsl => interp!(control::lar_lsl; aux = one),
        Arpl => interp!(control::arpl),
        Swapgs => interp!(control::swapgs),
        Rdfsbase | Rdgsbase | Wrfsbase | Wrgsbase => interp!(control::fs_gs_base; aux = fs_gs),
        Int => interp!(control::int_n, ends),
        Int3 => interp!(control::int3, ends),
        Into => interp!(control::into, ends),
        Int1 => interp!(control::int1, ends),
        Bound => interp!(control::bound),
        Rdtsc => interp!(control::rdtsc),
        Rdtscp => interp!(control::rdtscp),
        Rdpid => interp!(control::rdpid),
        Rdpkru => interp!(control::rdpkru),
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
        Some(interp!(control::mov_from_seg))
    } else if to.is_cr() {
        Some(interp!(control::mov_to_cr, ends))
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
