//! The part of a vCPU that only compiled code and its helpers use, at fixed offsets.

use crate::cpu::Cpu;
use crate::emit::{Bin, Flags};
use crate::flags;
use crate::simd::fp::FpEnv;
use crate::state::cr;
use crate::width::{W8, W16, W32, W64, Width};
use crate::x87::{ambient, status};

/// Why compiled code returned to the dispatch loop.
#[allow(missing_docs)]
pub mod reason {
    /// RIP is at code that the jump cache did not know, or a kick is pending.
    pub const NEXT: u64 = 0;
    /// The instruction at RIP must be interpreted: it faults, touches a device, or overwrites code.
    pub const INTERPRET: u64 = 1;
    /// A helper's instruction raised an exception; RIP is at it.
    pub const FAULT: u64 = 2;
    /// A helper's instruction asked to stop; RIP is behind it.
    pub const STOP: u64 = 3;
    /// A helper's instruction ended the block, RIP is where it leads, and the dispatch loop has nothing to do: compiled
    /// code goes on by the jump cache. Behind a miss it means the same as [`NEXT`].
    pub const ONWARD: u64 = 4;
    /// Quick code has gone on so often that the dispatch loop is to note where it is: at RIP.
    pub const LOOK: u64 = 5;
    /// How many there are.
    pub const COUNT: usize = 6;
}

/// Which operation the lazy flag operands stand for; 0 means that the `cc_*` words are valid.
pub mod lazy {
    use crate::emit::{Bin, Flags};

    /// `Flags::Add`: a, b, r.
    pub const ADD: u64 = 1;
    /// `Flags::Sub`: a, b, r.
    pub const SUB: u64 = 2;
    /// `Flags::Cmp`: a, b.
    pub const CMP: u64 = 3;
    /// `Flags::Logic`: r.
    pub const LOGIC: u64 = 4;

    /// `Flags::Inc`: a, the carry from before as 0 or 1, r.
    pub const INC: u64 = 5;
    /// `Flags::Dec`: the same.
    pub const DEC: u64 = 6;
    /// `Flags::Shift` to the left: a, count, r.
    pub const SHL: u64 = 7;
    /// `Flags::Shift` to the right, with zeros.
    pub const SHR: u64 = 8;
    /// `Flags::Shift` to the right, with the sign.
    pub const SAR: u64 = 9;
    /// `Flags::Inc`, the carry of the `cc_co` word standing: a, -, r.
    pub const INC_ONLY: u64 = 0x80;
    /// `Flags::Dec`, the carry of the `cc_co` word standing: a, -, r.
    pub const DEC_ONLY: u64 = 0x81;
    /// Kind words from here on leave the carry in `cc_co`; so does 0.
    pub const CARRY_IN_WORDS: u64 = INC_ONLY << 8;

    /// What stands for the flags of an operation: which one, and a, b and r. Increments leave the carry that stands in
    /// its word; what has no deferred form is `None`.
    pub fn deferred<V>(f: Flags<V>, count: impl FnOnce(u32) -> V) -> Option<(u64, [Option<V>; 3])> {
        Some(match f {
            Flags::Add { a, b, r } => (ADD, [Some(a), Some(b), Some(r)]),
            Flags::Sub { a, b, r } => (SUB, [Some(a), Some(b), Some(r)]),
            Flags::Cmp { a, b, .. } => (CMP, [Some(a), Some(b), None]),
            Flags::Logic { r } => (LOGIC, [None, None, Some(r)]),
            Flags::Inc { a, r } => (INC_ONLY, [Some(a), None, Some(r)]),
            Flags::Dec { a, r } => (DEC_ONLY, [Some(a), None, Some(r)]),
            Flags::Shift { op, a, n, r } => {
                let op = match op {
                    Bin::Shl => SHL,
                    Bin::Shr => SHR,
                    _ => SAR,
                };
                (op, [Some(a), Some(count(n)), Some(r)])
            }
            _ => return None,
        })
    }

    /// The kind word for an operation on `bytes`-wide operands.
    pub const fn kind(op: u64, bytes: u64) -> u64 {
        op << 8 | bytes
    }
}

/// Fields of [`JitFrame::x87_state`].
pub mod x87 {
    /// Bit `i` is set when ST(i) is not empty.
    pub const TAGS: u64 = 0xff;
    /// The unit is loaded.
    pub const LOADED: u64 = 1 << 8;
    /// Where TOP is, so that 16 bits to the right of it is the offset of ST(0) in the registers' array.
    pub const TOP_AT: u32 = 20;
    /// TOP.
    pub const TOP: u64 = 7 << TOP_AT;
}

/// How many helpers there are ([`crate::jit::emit::Helper`]).
pub const HELPERS: usize = 9;
/// Thunks: one a helper, and one each for the accesses of sites ([`crate::mmu::tlb::Sites`]), in the order of the helpers
/// that they fall back on.
pub const THUNKS: usize = HELPERS + 4;

/// State shared with compiled code.
#[repr(C)]
#[derive(Debug, Default)]
pub struct JitFrame {
    /// Address of the current soft-TLB table.
    pub tlb: u64,
    /// Addresses of the soft-TLB tables of this address space, by [`Class`](crate::mmu::tlb::Class).
    pub tables: [u64; 4],
    /// Name of the bridge that asks the dispatch loop, on return, for the way to RIP; 0 for none.
    pub asking: u64,
    /// Address of the bridge ([`super::bridge`]), where these are data, whose branch is on its way to the jump cache, or 0.
    pub missed: u64,
    /// How many more branches that no bridge serves go by the jump cache before one asks.
    pub until_ask: u64,
    /// Guest instructions completed by compiled code.
    pub count: u64,
    /// What a slow path hands back: a host address, or 0 for "interpret this instruction"; for stores 1 when done.
    pub slow_result: u64,
    /// Operand of 16 or 32 bytes of a slow store, or the bytes of a load that crosses pages.
    pub bounce: [u64; 4],
    /// Whether the host's MXCSR has the guest's controls and collects its flags.
    pub fp_loaded: u64,
    /// Whether the host's x87 unit has the guest's control word and collects its flags, and TOP and the tags then
    /// ([`x87`]); 0 if it has not.
    pub x87_state: u64,
    /// The guest's status word then, but for TOP.
    pub x87_status: u16,
    /// A later status word, of whose C1 nothing is known.
    pub x87_late: u16,
    /// CF, ZF and PF as a comparison set them.
    pub x87_flags: [u8; 4],
    /// Whether compiled code is repeated by the interpreter, so that what depends on other threads is left to that.
    pub repeated: bool,
    /// Addresses of the helpers.
    pub helpers: [u64; HELPERS],
    /// Addresses of code that calls the helpers and preserves every register, which is what compiled code calls.
    pub thunks: [u64; THUNKS],
    /// Code that goes on at RIP when the jump cache does not know the way there.
    pub way: u64,
    /// Address of the function that it asks for the way.
    pub find_way: u64,
    /// Slow paths taken, for statistics.
    pub slow_paths: u64,
    /// How many accesses of loops may yet not be where they were last before the dispatch loop looks at one
    /// ([`crate::jit::strays`]): below 0 when it is to.
    pub until_stray: i64,
    /// Instructions evaluated by helper, for statistics.
    pub helper_calls: u64,
    /// One of [`reason`].
    pub exit_reason: u64,

    // From here to the general-purpose registers: what compiled code uses most ([`crate::cpu::ANCHOR`]).
    /// Address of the jump cache.
    pub jump: u64,
    /// Address of the kick word.
    pub kick: u64,
    /// Combined with linear addresses in jump-cache and code-TLB keys: mode, privilege and address space, in the bits
    /// that a canonical address leaves redundant, and the generation
    /// ([`Cpu::next_generation`](crate::cpu::Cpu::next_generation)). The second is for the upper half, which kernels map by
    /// global pages: it is the same in every address space ([`crate::mmu::Mmu`] sees to what is mapped there otherwise).
    pub salts: [u64; 2],
    /// How often quick code may go on yet, back or elsewhere, before it has the dispatch loop look where it is: below 0
    /// when it has.
    pub until_look: i64,
    /// Kind of the deferred flags ([`lazy`]).
    pub lazy_kind: u64,
    /// Deferred flags: first operand.
    pub lazy_a: u64,
    /// Deferred flags: second operand.
    pub lazy_b: u64,
    /// Deferred flags: result.
    pub lazy_r: u64,
}

impl Cpu {
    /// Gives Rust code the host's floating-point units back, and the CPU state what they have collected.
    #[inline]
    pub(crate) fn unload_units(&mut self) {
        self.unload_fp();
        self.unload_x87();
    }

    /// Makes the guest's x87 control and status words the host's, if the guest may use the unit and masks every
    /// exception.
    pub(crate) fn load_x87(&mut self) {
        let unit = &self.s.x87;
        let masked = unit.fcw & status::EXCEPTIONS == status::EXCEPTIONS && !unit.pending_exception();
        if self.jit.x87_state != 0 || !masked || self.s.cr0 & (cr::CR0_EM | cr::CR0_TS) != 0 {
            return;
        }
        ambient::load(unit.fcw, unit.fsw);
        let tags = unit.ftw.rotate_right(unit.top().into());
        self.jit.x87_status = unit.fsw;
        self.jit.x87_state = u64::from(tags) | x87::LOADED | u64::from(unit.top()) << x87::TOP_AT;
    }

    /// Takes TOP, the tags and the status word back.
    #[inline]
    fn unload_x87(&mut self) {
        let state = std::mem::take(&mut self.jit.x87_state);
        if state == 0 {
            return;
        }
        ambient::unload();
        let top = (state >> x87::TOP_AT & 7) as u16;
        self.s.x87.fsw = self.jit.x87_status & !status::TOP | top << 11;
        self.s.x87.ftw = (state as u8).rotate_left(top.into());
    }

    /// Takes the guest's floating-point flags back from the host, and the default controls into use.
    #[inline]
    fn unload_fp(&mut self) {
        if self.jit.fp_loaded != 0 {
            self.jit.fp_loaded = 0;
            let mut env = FpEnv::new(self.s.mxcsr);
            env.unload();
            self.s.mxcsr = env.mxcsr;
        }
    }

    /// Turns flags that compiled code deferred into their lazy words.
    #[inline]
    pub fn fold_flags(&mut self) {
        if self.jit.lazy_kind != 0 {
            self.fold_flags_slow();
        }
    }

    fn fold_flags_slow(&mut self) {
        match self.jit.lazy_kind & 0xff {
            1 => self.fold::<W8>(),
            2 => self.fold::<W16>(),
            4 => self.fold::<W32>(),
            _ => self.fold::<W64>(),
        }
        self.jit.lazy_kind = 0;
    }

    fn fold<W: Width>(&mut self) {
        let (a, b) = (W::zext(self.jit.lazy_a), W::zext(self.jit.lazy_b));
        let r = W::zext(self.jit.lazy_r);
        let shift = |op| Flags::Shift { op, a, n: self.jit.lazy_b as u32, r };
        let f = match self.jit.lazy_kind >> 8 {
            lazy::ADD => Flags::Add { a, b, r },
            lazy::SUB => Flags::Sub { a, b, r },
            lazy::CMP => Flags::Cmp { a, b, r: W::zext(a.wrapping_sub(b)) },
            lazy::SHL => shift(Bin::Shl),
            lazy::SHR => shift(Bin::Shr),
            lazy::SAR => shift(Bin::Sar),
            lazy::INC | lazy::INC_ONLY => Flags::Inc { a, r },
            lazy::DEC | lazy::DEC_ONLY => Flags::Dec { a, r },
            _ => Flags::Logic { r },
        };
        if matches!(self.jit.lazy_kind >> 8, lazy::INC | lazy::DEC) {
            self.s.cc_co = self.jit.lazy_b << 63;
        }
        let (z, sp, co) = flags::materialise::<Cpu, W>(self, f);
        self.s.cc_z = z;
        self.s.cc_sp = sp;
        self.s.cc_co = co;
    }
}
