//! Quick code: what blocks run as between being interpreted and being part of a region.
//!
//! A block that has run some times is turned into host code in one pass, on the vCPU's own thread. The code is small
//! rather than fast: what it has to do about memory is done by [routines](Routine) that all of it shares, so that a program
//! of which much is run but little often finds room in the host's caches. Of the times that quick code is entered from
//! elsewhere, or goes back or to other pages, one in many has the dispatch loop look where it is; where it is found often
//! enough, a region is made in the end.
//!
//! It is emitted by an assembler for each kind of host, with the same operations ([`asm`]).

pub mod asm;
pub mod cross;
mod emit;
pub mod site;
mod values;
#[cfg_attr(target_arch = "aarch64", path = "neon.rs")]
mod vector;

use std::mem::offset_of;

use crate::addr::PAGE_SIZE;
use crate::code::HostIsa;
use crate::insn::{Insn, Mode};
use crate::jit::access::MASK_AT;
use crate::jit::bridge::PATIENCE;
use crate::jit::compile::Compiled;
use crate::jit::emit::{Helper, at};
use crate::jit::frame::{HELPERS, reason};
use crate::jit::region::Options;
use crate::mmu::tlb::TlbEntry;
use asm::{ARG, Alu, Asm, CPU, Cc, Gpr, Jump, Mem, PAGE, Shift, T0, T1, T2};

/// Emits quick code for an instruction.
pub type QuickHandler = fn(&mut Emitter<'_>, &Insn) -> Result<(), crate::jit::Unsupported>;
pub use emit::QuickEmit as Emitter;

/// Code that all quick code shares. PAGE is the register that has the linear address of the page that runs
/// ([`asm::PAGE`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routine {
    /// Returns to the dispatch loop for it to interpret the instruction at PAGE + T0.
    Interpret,
    /// Returns to the dispatch loop, RIP being PAGE + T0.
    Leave,
    /// Returns to the dispatch loop for it to look where quick code is: at PAGE + T0.
    LookAt,
    /// The same, at RIP.
    Look,
    /// Goes on at PAGE + T0, where there was no code when the branch was linked.
    Onward,
    /// Goes on where RIP says, by the jump cache: the bridge named in T1 leads another way, and once in a while asks for
    /// this one.
    Missed,
    /// Goes on where RIP says, which the jump cache does not know.
    Way,
    /// Has the interpreter's evaluation of the instruction at ARG called for a block at T2; sets the condition E if the
    /// block may go on. Changes everything but PAGE.
    Evaluate,
    /// Goes where RIP says behind an evaluation that ended the block, if nothing else has to be done first.
    Behind,
    /// Turns flags that are deferred in the CPU state into words.
    Fold,
    /// Finds the host address, in T0, of 1 << `log2` bytes at the linear address in ARG that are to be read or written;
    /// sets the condition E if the interpreter has to do it. Changes T1 and T2.
    Find {
        /// log2 of the number of bytes, from 0 to 5.
        log2: u8,
        /// Whether they will be written.
        write: bool,
    },
}

/// Widths of accesses.
const WIDTHS: usize = 6;

impl Routine {
    /// All of them.
    fn all() -> impl Iterator<Item = Routine> {
        use Routine::*;
        let plain = [Interpret, Leave, LookAt, Look, Onward, Missed, Way, Evaluate, Behind, Fold];
        let find = |write| (0..WIDTHS as u8).map(move |log2| Find { log2, write });
        plain.into_iter().chain(find(false)).chain(find(true))
    }

    /// The one for an access of so many bytes.
    fn access(bytes: u64, write: bool) -> Routine {
        Routine::Find { log2: bytes.trailing_zeros() as u8, write }
    }
}

/// The routines' code.
pub struct Library {
    /// Host code.
    pub code: Vec<u8>,
    /// The sites of its direct branches to where code goes on by the jump cache.
    pub lookups: Vec<usize>,
    /// Where each routine begins.
    offsets: Vec<(Routine, usize)>,
}

impl Library {
    /// Makes it. Helpers are found by [`crate::jit::frame::JitFrame`].
    pub fn new() -> Library {
        let mut library = Library { code: Vec::new(), lookups: Vec::new(), offsets: Vec::new() };
        let mut a = Asm::default();
        for routine in Routine::all() {
            while !a.code.len().is_multiple_of(ROUTINE_ALIGNMENT) {
                a.nop();
            }
            library.offsets.push((routine, a.code.len()));
            library.lookups.extend(routine.emit(&mut a));
        }
        library.code = a.code;
        library
    }

    /// Where a routine begins; they are all there.
    pub fn offset(&self, routine: Routine) -> usize {
        self.offsets.iter().find(|(r, _)| *r == routine).map_or(0, |&(_, offset)| offset)
    }
}

impl Default for Library {
    fn default() -> Self {
        Library::new()
    }
}

/// Bytes of which the start of a routine is a multiple.
const ROUTINE_ALIGNMENT: usize = 16;

impl Routine {
    /// Emits it; the site of its branch to the jump cache if it has one.
    fn emit(self, a: &mut Asm) -> Option<usize> {
        let lookup = |a: &mut Asm| {
            let Jump(site) = a.link_to_lookup();
            Some(site)
        };
        match self {
            Routine::Interpret => {
                set_rip(a);
                a.store_imm(8, emit::cpu(at!(jit.exit_reason)), reason::INTERPRET as i32);
            }
            Routine::Leave => set_rip(a),
            Routine::LookAt | Routine::Look => {
                if self == Routine::LookAt {
                    set_rip(a);
                }
                a.store_imm(8, emit::cpu(at!(jit.exit_reason)), reason::LOOK as i32);
            }
            Routine::Onward => {
                set_rip(a);
                return lookup(a);
            }
            Routine::Missed if !Asm::KNOWS_WAYS => {
                // There the lookup asks.
                a.store(8, emit::cpu(at!(jit.missed)), cross::BRIDGE);
                return lookup(a);
            }
            Routine::Missed => {
                a.alu_imm(8, Alu::Sub, emit::cpu(at!(jit.until_ask)), 1);
                let ask = a.jcc(Cc::S);
                let site = lookup(a);
                a.here(ask);
                a.store_imm(8, emit::cpu(at!(jit.until_ask)), PATIENCE as i32 - 1);
                a.store(8, emit::cpu(at!(jit.asking)), cross::BRIDGE);
                a.go_back();
                return site;
            }
            Routine::Way => {
                a.go_by(emit::cpu(at!(jit.way)));
                return None;
            }
            Routine::Evaluate => {
                a.call_function(at!(jit.helpers) + 8 * Helper::Evaluate as i32);
                a.alu_imm(4, Alu::Cmp, emit::cpu(at!(jit.exit_reason)), reason::NEXT as i32);
                a.ret();
                return None;
            }
            Routine::Behind => {
                a.alu_imm(4, Alu::Cmp, emit::cpu(at!(jit.exit_reason)), reason::ONWARD as i32);
                let out = a.jcc(Cc::NE);
                let site = lookup(a);
                a.here(out);
                a.go_back();
                return site;
            }
            Routine::Fold => {
                a.alu_imm(4, Alu::Cmp, emit::cpu(at!(jit.lazy_kind)), 0);
                let deferred = a.jcc(Cc::NE);
                a.ret();
                a.here(deferred);
                a.call_thunk(emit::thunk(Helper::Fold));
                a.ret();
                return None;
            }
            Routine::Find { log2, write } => {
                find(a, 1 << log2, write);
                a.ret();
                return None;
            }
        }
        a.go_back();
        None
    }
}

/// Makes the page offset in T0 the address there, and stores it as RIP.
fn set_rip(a: &mut Asm) {
    a.alu(8, Alu::Add, T0, PAGE);
    a.store(8, emit::cpu(at!(s.rip)), T0);
}

/// A lookup in the soft TLB, by the registers that it uses: the entry is that of the first byte, if the last one lies in
/// the same page.
struct Lookup {
    /// Has the CPU.
    cpu: Gpr,
    /// Becomes the current table.
    table: Gpr,
    linear: Gpr,
    /// Becomes what the host's address is more than the linear one; only if the entry is the page's.
    found: Gpr,
    /// Becomes the linear address of the page.
    page: Gpr,
}

impl Lookup {
    /// Emits it for an access whose last byte is at `last`; the branch that is taken on a miss.
    fn emit(&self, a: &mut Asm, last: Mem, write: bool) -> Jump {
        let Lookup { cpu, table, linear, found, page } = *self;
        let shift = size_of::<TlbEntry>().trailing_zeros() as u8;
        let tag = if write { offset_of!(TlbEntry, write) } else { offset_of!(TlbEntry, read) };
        let entry = |field: usize| Mem::indexed(table, found, field as i32);
        a.load(8, table, Mem::at(cpu, at!(jit.tlb)));
        a.mov(8, found, linear);
        a.shift_imm(8, Shift::Shr, found, 12 - shift);
        a.alu(8, Alu::And, found, Mem::at(table, MASK_AT));
        a.lea(8, page, last);
        a.alu_imm(8, Alu::And, page, -(PAGE_SIZE as i32));
        a.alu(8, Alu::Cmp, page, entry(tag));
        let miss = a.jcc(Cc::NE);
        a.load(8, found, entry(offset_of!(TlbEntry, addend)));
        miss
    }
}

/// By the soft TLB, or else by helper.
fn find(a: &mut Asm, bytes: i32, write: bool) {
    let (found, linear) = (T0, ARG);
    let lookup = Lookup { cpu: CPU, table: T1, linear, found, page: T2 };
    let miss = lookup.emit(a, Mem::at(linear, bytes - 1), write);
    // No guest memory is at the host's address 0.
    a.alu(8, Alu::Add, found, linear);
    a.ret();
    a.here(miss);
    a.mov_imm(T2, bytes as u64);
    a.call_thunk(emit::thunk(if write { Helper::Modify } else { Helper::Load }));
    a.load(8, found, emit::cpu(at!(jit.slow_result)));
    a.test(8, found, found);
}

/// How often a block's code is likely to be entered from elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entered {
    /// So often that it is counted, and might be worth a region.
    Often,
    /// A region has it for when its own code of the block does not do, which counts as so many accesses that stray.
    Instead {
        /// See [`crate::jit::strays`]; 0 if nobody need know.
        strays: i32,
    },
}

/// What makes quick code.
#[derive(Clone, Copy, Debug)]
pub struct Quick {
    /// Whether the host counts bits by LZCNT, TZCNT and POPCNT.
    counts_bits: bool,
}

impl Quick {
    /// For this host.
    pub fn new(isa: HostIsa) -> Quick {
        let features = crate::jit::host::features();
        let counts_bits = match isa {
            HostIsa::X86_64 => ["has_lzcnt", "has_bmi1", "has_popcnt"].iter().all(|f| features.contains(f)),
            HostIsa::Aarch64 => true,
        };
        Quick { counts_bits }
    }

    /// The code of a block of instructions that lie in one page, from page offset `start`. Offsets of the instructions that
    /// helpers evaluate are from the start of the block.
    pub fn compile(&self, insns: &[Insn], mode: Mode, start: u64, options: Options, entered: Entered) -> Compiled {
        Emitter::new(self, mode, start, options).emit(insns, entered)
    }

    /// Appends the way from quick code into a region, entered at `tail`, whose entry is at a page offset: which of its
    /// entries is meant a region learns from RIP. Where it begins.
    pub fn append_way_into(region: &mut Vec<u8>, off: u64, tail: usize) -> usize {
        let start = region.len();
        let mut a = Asm::from(std::mem::take(region));
        a.mov_imm(T0, off);
        set_rip(&mut a);
        let jump = a.enter_region();
        a.lead(jump, tail);
        *region = a.code;
        start
    }

    /// Thunk number `thunk` ([`THUNKS`](crate::jit::frame::THUNKS)), if there is a shorter one than the compiler's.
    pub fn thunk(&self, thunk: usize) -> Option<Vec<u8>> {
        match thunk.checked_sub(HELPERS)? {
            0 => Some(site::thunk_for(Helper::Load)),
            2 => Some(site::thunk_for(Helper::Modify)),
            3 => Some(site::thunk_for(Helper::Find)),
            _ => None,
        }
    }

    /// `extern "C" fn(cpu, code)`: calls compiled code, which preserves none of the registers that C functions do.
    pub fn trampoline(&self) -> Vec<u8> {
        let mut a = Asm::default();
        a.trampoline();
        a.code
    }
}
