//! What instructions do, in the groups of the Intel manual; one function each, for both evaluators.
//!
//! Each group has a `lookup` that maps the instructions it knows to a [`Sem`]. Generic semantics
//! (`fn f<E: Emit, W: Width>(e: &mut E, i: &Insn) -> Result<(), E::Trap>`) serve interpreter and compiler; rare or
//! system instructions are plain functions on [`Cpu`], which compiled code calls with exact state.

pub mod arithmetic;
pub mod avx;
pub mod bits;
pub mod control;
pub mod data;
pub mod io;
pub mod logic;
pub mod mmx;
pub mod muldiv;
pub mod shift;
pub mod sse;
pub mod stack;
pub mod string;
pub mod system;
pub mod x87;
pub mod xsave;

use iced_x86::Instruction;

use crate::cpu::Cpu;
use crate::exception::Trap;
use crate::insn::{Handler, Insn, Mode};
use crate::jit::Unsupported;
use crate::jit::emit::JitEmit;
use crate::jit::host::Host;
use crate::jit::usage::Usage;
use crate::quick::QuickHandler;

/// An instruction to find semantics for.
pub struct Form<'a> {
    /// The instruction as iced decoded it.
    pub instr: &'a Instruction,
    /// Operand size in bytes, 0 where there is none.
    pub bytes: u8,
    /// Decode mode.
    pub mode: Mode,
    /// The 11-bit x87 opcode, if the opcode byte is D8h to DFh.
    pub fop: Option<u16>,
}

/// Emits host code for an instruction.
pub type JitHandler = fn(&mut JitEmit<'_>, &Insn) -> Result<(), Unsupported>;
/// Notes what an instruction does to registers and flags.
pub type UsageHandler = fn(&mut Usage, &Insn) -> Result<(), Unsupported>;

/// The semantics of an instruction form.
pub struct Sem {
    /// Evaluation on numbers.
    pub run: Handler,
    /// Emission of host code; `None` for what only the interpreter evaluates, and for x87 instructions, of which the
    /// compiler takes several at once ([`crate::jit::x87`]).
    pub jit: Option<JitHandler>,
    /// Emission of quick host code; `None` as for `jit`, and for what only regions have a form of.
    pub quick: Option<QuickHandler>,
    /// What the instruction reads, writes and may fault on; `None` for what only the interpreter evaluates.
    pub usage: Option<UsageHandler>,
    /// Whether the block must end here although control flow goes on: mode, mapping or interrupt state may change.
    pub ends: bool,
    /// What goes into [`Insn::aux`].
    pub aux: fn(&Instruction) -> u16,
}

impl std::fmt::Debug for Sem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sem")
    }
}

/// No auxiliary value.
pub const fn no_aux(_: &Instruction) -> u16 {
    0
}

/// Semantics generic over the evaluator: `both!(f)`, `both!(f, W32)`, `both!(f, W32, C)`, `both!(f; aux = g)`.
macro_rules! both {
    (@of [$($f:tt)+] $(, $g:ty)*) => { $crate::semantics::both!($($f)+ $(, $g)*) };
    (@aux) => { $crate::semantics::no_aux };
    (@aux $aux:expr) => { $aux };
    ($($f:ident)::+ $(, $g:ty)* $(; aux = $aux:expr)?) => {
        const {
            &$crate::semantics::Sem {
                run: $($f)::+::<$crate::cpu::Cpu $(, $g)*>,
                jit: Some(|e, i| $($f)::+::<$crate::jit::emit::JitEmit<'_> $(, $g)*>(e, i)),
                quick: Some(|e, i| $($f)::+::<$crate::quick::Emitter<'_> $(, $g)*>(e, i)),
                usage: Some($($f)::+::<$crate::jit::usage::Usage $(, $g)*>),
                ends: false,
                aux: $crate::semantics::both!(@aux $($aux)?),
            }
        }
    };
}
pub(crate) use both;

/// `both!` for the width that `bytes` says: `sized!(bytes, f)`, with more generics behind: `sized!(bytes, f, Op)`.
macro_rules! sized {
    (@ $f:tt $bytes:expr $(, $g:ty)*) => {
        match $bytes {
            1 => $crate::semantics::both!(@of $f, $crate::width::W8 $(, $g)*),
            2 => $crate::semantics::both!(@of $f, $crate::width::W16 $(, $g)*),
            4 => $crate::semantics::both!(@of $f, $crate::width::W32 $(, $g)*),
            _ => $crate::semantics::both!(@of $f, $crate::width::W64 $(, $g)*),
        }
    };
    ($bytes:expr, $($f:ident)::+ $(, $g:ty)*) => {
        $crate::semantics::sized!(@ [$($f)::+] $bytes $(, $g)*)
    };
}
pub(crate) use sized;

/// Semantics on the interpreter only, called from compiled code: `interp!(f)`; `interp!(f, ends)` if it ends a block;
/// `; aux = g` for an auxiliary value.
macro_rules! interp {
    ($f:expr $(; aux = $aux:expr)?) => {
        const { &$crate::semantics::Sem { run: $f, jit: None, quick: None, usage: None, ends: false, aux: $crate::semantics::both!(@aux $($aux)?) } }
    };
    ($f:expr, ends $(; aux = $aux:expr)?) => {
        const { &$crate::semantics::Sem { run: $f, jit: None, quick: None, usage: None, ends: true, aux: $crate::semantics::both!(@aux $($aux)?) } }
    };
}
pub(crate) use interp;

/// Finds the semantics of a valid instruction; #UD for one that has none.
pub fn lookup(form: &Form<'_>) -> &'static Sem {
    type Lookup = fn(&Form<'_>) -> Option<&'static Sem>;
    const GROUPS: &[Lookup] = &[
        system::lookup,
        io::lookup,
        arithmetic::lookup,
        data::lookup,
        logic::lookup,
        control::lookup,
        stack::lookup,
        shift::lookup,
        bits::lookup,
        muldiv::lookup,
        string::lookup,
        x87::lookup,
        xsave::lookup,
        mmx::lookup,
        sse::lookup,
        avx::lookup,
    ];
    GROUPS.iter().find_map(|f| f(form)).unwrap_or_else(undefined)
}

/// Evaluates an instruction that raises #UD in real and virtual-8086 mode.
pub fn protected_only(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    if !cpu.s.protected() || cpu.s.vm86() {
        return Err(cpu.ud());
    }
    (i.sem.run)(cpu, i)
}

/// What becomes of an instruction in compiled code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Treatment {
    /// It is host code.
    Compiled,
    /// A helper evaluates it, or the code is left for the interpreter.
    Helper,
    /// It raises #UD.
    Undefined,
}

/// What becomes of `i` where the compiler works for `host`: what it reads of the operands' kinds, immediate and
/// segment is as decoded.
pub fn treatment(i: &Insn, host: Host) -> Treatment {
    let mut usage = Usage { host, ..Usage::default() };
    if is_undefined(i) {
        Treatment::Undefined
    } else if i.sem.usage.is_some_and(|f| f(&mut usage, i).is_ok()) {
        Treatment::Compiled
    } else {
        Treatment::Helper
    }
}

/// Whether `i` does nothing but raise #UD.
pub fn is_undefined(i: &Insn) -> bool {
    std::ptr::fn_addr_eq(i.run, undefined().run)
}

/// #UD.
pub fn undefined() -> &'static Sem {
    interp!(raise_ud, ends)
}

/// #GP(0): an instruction longer than 15 bytes.
pub fn too_long() -> &'static Sem {
    interp!(raise_gp, ends)
}

fn raise_ud(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    tracing::debug!("undefined instruction {:?} at {:#x}", i.iced_code(), cpu.ip_base.wrapping_add(u64::from(i.off)));
    cpu.counts.undefined += 1;
    Err(cpu.ud())
}

fn raise_gp(cpu: &mut Cpu, _: &Insn) -> Result<(), Trap> {
    Err(cpu.gp(0))
}
