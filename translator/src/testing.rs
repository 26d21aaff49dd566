//! Test support: a CPU with a little memory, and the host's processor as the judge of user-mode instructions.
//!
//! One window of linear addresses means the same to both: on the host it is mapped where the guest's page tables map
//! it, so that addresses in registers are valid for either.

pub(crate) mod forms;
#[cfg(target_arch = "x86_64")]
mod integer;

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::cpu::Cpu;
use crate::cpuid::{CpuModel, Level};
use crate::decode::decode;
use crate::exception::Exception;
use crate::insn::Rep;
use crate::mem::GuestRam;
use crate::platform::Platform;
use crate::state::{CpuState, Segment, cr};

/// Where the window starts, for guest and host: below 2 GiB, so that absolute displacements reach it.
pub(crate) const WINDOW: u64 = 0x5000_0000;
/// Where the instruction under test stands.
pub(crate) const INSN: u64 = WINDOW + 0x800;
/// Where a branch under test goes.
pub(crate) const TAKEN: u64 = WINDOW + 0x840;
/// The memory that instructions work on: it straddles page boundaries.
pub(crate) const DATA: u64 = WINDOW + 0x2f00;
/// Bytes of it.
pub(crate) const DATA_LEN: usize = 0x200;

const RAM: usize = 2 << 20;
const TABLES: u64 = 0x10_0000;

/// A machine with nothing in it.
pub(crate) struct Empty;

impl Platform for Empty {
    fn port_in(&mut self, _: u16, _: u8) -> u32 {
        u32::MAX
    }
    fn port_out(&mut self, _: u16, _: u8, _: u32) {}
    fn mmio_read(&mut self, _: u64, _: u8) -> u64 {
        u64::MAX
    }
    fn mmio_write(&mut self, _: u64, _: u8, _: u64) {}
    fn tsc(&mut self) -> u64 {
        0
    }
    fn apic_msr_read(&mut self, _: u32, _: u64) -> Option<u64> {
        None
    }
    fn apic_msr_write(&mut self, _: u32, _: u64, _: u64) -> Option<()> {
        None
    }
    fn cr8(&mut self) -> u64 {
        0
    }
    fn set_cr8(&mut self, _: u64) {}
    fn interrupt_pending(&mut self) -> bool {
        false
    }
    fn acknowledge(&mut self) -> Option<u8> {
        None
    }
    fn take_nmi(&mut self) -> bool {
        false
    }
    fn random(&mut self) -> Option<u64> {
        None
    }
}

/// A small generator of random numbers (xorshift64*), so that failures repeat.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn u64(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A value below `n`.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        (self.u64() >> 11) % n
    }

    /// A boundary value of some width, or random bits of some length.
    pub(crate) fn nasty(&mut self) -> u64 {
        let edge = 1u64 << [0, 3, 7, 8, 15, 16, 31, 32, 63][self.below(9) as usize];
        match self.below(8) {
            0 => 0,
            1 => edge,
            2 => edge - 1,
            3 => edge.wrapping_neg(),
            4 => edge + 1,
            5 => self.u64() >> self.below(64),
            _ => self.u64(),
        }
    }
}

/// What an instruction can change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Machine {
    pub gpr: [u64; 16],
    pub flags: u64,
    /// Where execution goes on.
    pub rip: u64,
    /// The bytes at [`DATA`].
    pub data: Vec<u8>,
}

/// A guest in one of the modes, with RAM at 0 that 64-bit mode maps at [`WINDOW`].
pub(crate) struct Guest {
    pub cpu: Cpu,
    memory: Arc<GuestMemoryMmap>,
}

impl Guest {
    fn new(state: CpuState) -> Guest {
        let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), RAM)]).unwrap());
        let pdpte = TABLES + 0x1000 + (WINDOW >> 30) * 8;
        let pde = TABLES + 0x2000 + (WINDOW >> 21 & 511) * 8;
        // The window is one 2 MiB page, user and writable.
        for (at, entry) in [(TABLES, TABLES + 0x1007), (pdpte, TABLES + 0x2007), (pde, 0x87)] {
            memory.write_obj(entry, GuestAddress(at)).unwrap();
        }
        let ram = Arc::new(GuestRam::new(memory.clone()));
        let mut cpu = Cpu::new(ram, Box::new(Empty), CpuModel::new(Level::Max, 1, 0));
        cpu.set_state(state);
        Guest { cpu, memory }
    }

    /// 64-bit mode.
    pub(crate) fn code64() -> Guest {
        let mut s = flat(0xa09b);
        s.cr0 |= cr::CR0_PE | cr::CR0_PG;
        s.cr4 = cr::CR4_PAE | cr::CR4_OSFXSR | cr::CR4_OSXMMEXCPT;
        s.efer = cr::EFER_LME | cr::EFER_LMA | cr::EFER_NXE | cr::EFER_SCE;
        s.cr3 = TABLES;
        Guest::new(s)
    }

    /// 32-bit protected mode without paging; RAM is at 0.
    pub(crate) fn code32() -> Guest {
        let mut s = flat(0xc09b);
        s.cr0 |= cr::CR0_PE;
        Guest::new(s)
    }

    /// Real-address mode with all segments at 0.
    pub(crate) fn real() -> Guest {
        let mut s = CpuState::reset();
        s.seg[1].base = 0;
        Guest::new(s)
    }

    /// The guest physical address that `at` of the window is.
    fn physical(&self, at: u64) -> GuestAddress {
        GuestAddress(if self.cpu.s.code64() { at.wrapping_sub(WINDOW) } else { at })
    }

    pub(crate) fn read(&self, at: u64, out: &mut [u8]) {
        self.memory.read_slice(out, self.physical(at)).unwrap();
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, self.physical(at)).unwrap();
    }

    /// Interprets one instruction at `rip`, as often as it asks to be gone on with (repeated string instructions).
    pub(crate) fn step(&mut self, code: &[u8], rip: u64) -> Result<(), Exception> {
        let insn = decode(code, self.cpu.mode, &self.cpu.model).expect("whole instructions");
        loop {
            self.cpu.ip_base = rip;
            self.cpu.stop_block = false;
            self.cpu.s.rip = self.cpu.next_ip_value(&insn);
            (insn.run)(&mut self.cpu, &insn).map_err(|_| self.cpu.raised)?;
            if insn.rep == Rep::None || self.cpu.s.rip != rip {
                return Ok(());
            }
        }
    }

    /// Interprets one instruction at [`INSN`] from the given state.
    pub(crate) fn run(&mut self, code: &[u8], before: &Machine) -> Result<Machine, Exception> {
        self.cpu.s.gpr = before.gpr;
        self.cpu.s.set_flags(before.flags);
        self.write(DATA, &before.data);
        self.step(code, INSN)?;
        let mut data = vec![0; before.data.len()];
        self.read(DATA, &mut data);
        Ok(Machine { gpr: self.cpu.s.gpr, flags: self.cpu.s.flags(), rip: self.cpu.s.rip, data })
    }
}

/// A reset state with flat segments; CS has attributes `code`.
fn flat(code: u32) -> CpuState {
    let mut s = CpuState::reset();
    s.seg = [Segment { base: 0, limit: u32::MAX, attr: 0xc093, selector: 0x10 }; 6];
    s.seg[1] = Segment { attr: code, selector: 8, ..s.seg[0] };
    s
}

/// The host's processor, running instructions at [`INSN`] of the window.
#[cfg(target_arch = "x86_64")]
pub(crate) mod native {
    use std::sync::{Mutex, MutexGuard};

    use iced_x86::code_asm::*;

    use super::{DATA, INSN, Machine, TAKEN, WINDOW};

    const LEN: usize = 0x10000;
    /// Where an instruction that does not branch ends up.
    const FALL: u64 = WINDOW + 0x900;
    /// Registers, flags, the way out and the host's stack pointer, in quadwords.
    const CONTEXT: u64 = WINDOW + 0x1000;
    const FLAGS: u64 = CONTEXT + 16 * 8;
    const WAY: u64 = CONTEXT + 17 * 8;
    const HOST_SP: u64 = CONTEXT + 18 * 8;

    static WINDOW_IN_USE: Mutex<bool> = Mutex::new(false);

    /// Exclusive use of the window.
    pub(crate) struct Native(#[expect(dead_code, reason = "held for its lock")] MutexGuard<'static, bool>);

    fn registers() -> [AsmRegister64; 16] {
        [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15]
    }

    fn slot(at: u64) -> AsmMemoryOperand {
        qword_ptr(at)
    }

    /// The code that loads the registers and jumps to [`INSN`].
    fn prologue() -> Result<Vec<u8>, IcedError> {
        let mut a = CodeAssembler::new(64)?;
        for r in [rbx, rbp, r12, r13, r14, r15] {
            a.push(r)?;
        }
        a.pushfq()?;
        a.mov(slot(HOST_SP), rsp)?;
        a.push(slot(FLAGS))?;
        a.popfq()?;
        for (n, r) in registers().into_iter().enumerate() {
            a.mov(r, slot(CONTEXT + n as u64 * 8))?;
        }
        a.jmp(INSN)?;
        a.assemble(WINDOW)
    }

    /// The code behind the instruction: notes the way it took, stores the registers, returns.
    fn epilogue(way: u64, at: u64) -> Result<Vec<u8>, IcedError> {
        let mut a = CodeAssembler::new(64)?;
        a.mov(dword_ptr(WAY), way as i32)?;
        for (n, r) in registers().into_iter().enumerate() {
            a.mov(slot(CONTEXT + n as u64 * 8), r)?;
        }
        a.mov(rsp, slot(HOST_SP))?;
        a.pushfq()?;
        a.pop(slot(FLAGS))?;
        a.popfq()?;
        for r in [r15, r14, r13, r12, rbp, rbx] {
            a.pop(r)?;
        }
        a.ret()?;
        a.assemble(at)
    }

    impl Native {
        /// Takes the window; `None` where the host has something else at its addresses.
        pub(crate) fn take() -> Option<Native> {
            let mut mapped = WINDOW_IN_USE.lock().unwrap_or_else(|e| e.into_inner());
            if !*mapped {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
                // SAFETY: a new mapping that replaces none.
                let at = unsafe { libc::mmap(WINDOW as *mut _, LEN, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
                if at as u64 != WINDOW {
                    eprintln!("skipped: the window at {WINDOW:#x} is not free on this host");
                    return None;
                }
                put(WINDOW, &prologue().unwrap());
                // A jump, as there is no room for it all in front of FALL.
                put(TAKEN, &jump(TAKEN, FALL + 0x200));
                put(FALL, &epilogue(0, FALL).unwrap());
                put(FALL + 0x200, &epilogue(1, FALL + 0x200).unwrap());
                *mapped = true;
            }
            Some(Native(mapped))
        }

        /// Puts an instruction in place.
        pub(crate) fn load(&mut self, code: &[u8]) {
            assert!(code.len() <= 15);
            protect(libc::PROT_READ | libc::PROT_WRITE);
            put(INSN, code);
            let next = INSN + code.len() as u64;
            put(next, &jump(next, FALL));
            protect(libc::PROT_READ | libc::PROT_EXEC);
        }

        /// Runs the instruction in place, which must not fault.
        pub(crate) fn run(&mut self, len: usize, before: &Machine) -> Machine {
            put(DATA, &before.data);
            for (n, v) in before.gpr.iter().chain([&before.flags]).enumerate() {
                put(CONTEXT + n as u64 * 8, &v.to_le_bytes());
            }
            // SAFETY: the prologue is a function without arguments that keeps the registers it must; the instruction
            // touches the window only, as the caller says.
            unsafe { std::mem::transmute::<*const (), extern "sysv64" fn()>(WINDOW as *const ())() };
            let mut data = vec![0; before.data.len()];
            get(DATA, &mut data);
            let word = |at| {
                let mut bytes = [0; 8];
                get(at, &mut bytes);
                u64::from_le_bytes(bytes)
            };
            Machine {
                gpr: std::array::from_fn(|n| word(CONTEXT + n as u64 * 8)),
                flags: word(FLAGS),
                rip: if word(WAY) as u32 == 0 { INSN + len as u64 } else { TAKEN },
                data,
            }
        }
    }

    fn jump(from: u64, to: u64) -> [u8; 5] {
        let mut code = [0xe9; 5];
        code[1..].copy_from_slice(&(to.wrapping_sub(from + 5) as u32).to_le_bytes());
        code
    }

    fn put(at: u64, bytes: &[u8]) {
        // SAFETY: all callers, who hold the lock, stay inside the window's mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, bytes.len()) };
    }

    fn get(at: u64, out: &mut [u8]) {
        // SAFETY: as in `put`.
        unsafe { std::ptr::copy_nonoverlapping(at as *const u8, out.as_mut_ptr(), out.len()) };
    }

    /// Sets the protection of the code page.
    fn protect(protection: libc::c_int) {
        // SAFETY: the page is ours.
        let rc = unsafe { libc::mprotect(WINDOW as *mut _, 0x1000, protection) };
        assert_eq!(rc, 0);
    }
}
