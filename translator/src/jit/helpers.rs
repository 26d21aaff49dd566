//! What compiled code calls: TLB misses and page-crossing accesses, and the interpreter's evaluation of instructions
//! that have no compiled form.

use crate::addr::{PAGE_MASK, PAGE_SIZE};
use crate::block::BlockId;
use crate::cpu::Cpu;
use crate::insn::{Insn, Rep};
use crate::jit::Jit;
use crate::jit::frame::reason;
use crate::jit::strays::STRAYS;
use crate::jump::JumpCache;
use crate::mmu::write_some;
use crate::simd::fp::FpEnv;

impl Cpu {
    /// Points compiled code to the helpers and to what does not move.
    pub fn connect_jit(&mut self, jit: &Jit) {
        self.jump = JumpCache::new(jit.stub());
        self.jit.jump = self.jump.address();
        self.jit.thunks = jit.thunks();
        self.jit.way = jit.way();
        self.jit.find_way = find_way as *const () as u64;
        self.jit.kick = self.kick.as_ptr() as u64;
        self.jit.helpers = [
            load as *const () as u64,
            store as *const () as u64,
            modify as *const () as u64,
            find as *const () as u64,
            evaluate as *const () as u64,
            fold as *const () as u64,
            load_fp as *const () as u64,
            evaluate_run as *const () as u64,
            load_x87 as *const () as u64,
        ];
    }

    /// The block at RIP and its code, which the jump cache did not know, if it is known by the physical address: it is
    /// again.
    pub(crate) fn find_way(&mut self) -> Option<(BlockId, u64)> {
        if self.flush_jump_cache || self.journal.is_some() {
            return None;
        }
        // Compiled code is there for modes only in which this is the linear address.
        let linear = self.s.rip;
        let saved = self.raised;
        let Ok(gpa) = self.translate_code(linear) else {
            self.raised = saved;
            return None;
        };
        let found = self.enter_known(linear, gpa)?;
        self.counts.ways += 1;
        Some(found)
    }

    /// The block at a physical address and its code, if that is known: the jump cache has it for the linear address then.
    pub(crate) fn enter_known(&mut self, linear: u64, gpa: u64) -> Option<(BlockId, u64)> {
        let (id, code) = self.jump.known(gpa, self.mode)?;
        self.jump.insert(self.code_place(linear), id, code);
        Some((id, code))
    }

    /// The bytes of the first page that an access touches, if it goes on into the next.
    fn split(linear: u64, bytes: u64) -> Option<u64> {
        let room = PAGE_SIZE - (linear & PAGE_MASK);
        (bytes > room).then_some(room)
    }

    /// A load that the fast path missed: the host address of the bytes, or 0.
    fn slow_load(&mut self, linear: u64, bytes: u64) -> u64 {
        let Some(first) = Self::split(linear, bytes) else {
            return self.resolve(linear, bytes, false).map_or(0, |p| p as u64);
        };
        let next = self.wrap_linear(linear.wrapping_add(first));
        // The second page is not looked at, and so not marked as accessed, where the first one faults.
        let Some(a) = self.resolve(linear, first, false) else { return 0 };
        let Some(b) = self.resolve(next, bytes - first, false) else { return 0 };
        let out = self.jit.bounce.as_mut_ptr().cast::<u8>();
        // SAFETY: `a` and `b` are host addresses of `first` and `bytes - first` bytes of guest RAM, each inside its
        // page; together they are at most 32 bytes, the size of the bounce buffer.
        unsafe {
            std::ptr::copy_nonoverlapping(a, out, first as usize);
            std::ptr::copy_nonoverlapping(b, out.add(first as usize), (bytes - first) as usize);
        }
        out as u64
    }

    /// A store that the fast path missed: 1 when done, 0 when the interpreter has to do it.
    fn slow_store(&mut self, linear: u64, bytes: u64, value: u64) -> u64 {
        let value = if bytes >= 16 { self.jit.bounce } else { [value, 0, 0, 0] };
        let first = Self::split(linear, bytes).unwrap_or(bytes);
        let Some(a) = self.resolve(linear, first, true) else { return 0 };
        let next = self.wrap_linear(linear.wrapping_add(first));
        let b = if first == bytes { None } else { self.resolve(next, bytes - first, true) };
        if first != bytes && b.is_none() {
            return 0;
        }
        self.journal_store(a, first as usize);
        if let Some(b) = b {
            self.journal_store(b, (bytes - first) as usize);
        }
        let from = value.as_ptr().cast::<u8>();
        // SAFETY: as in `slow_load`, for writable guest RAM without translated code in these bytes.
        unsafe {
            if bytes <= 8 && b.is_none() {
                write_some(a, bytes as usize, value[0]);
                return 1;
            }
            std::ptr::copy_nonoverlapping(from, a, first as usize);
            if let Some(b) = b {
                std::ptr::copy_nonoverlapping(from.add(first as usize), b, (bytes - first) as usize);
            }
        }
        1
    }
}

impl Cpu {
    /// Whether the dispatch loop would do nothing between the last instruction and the next block.
    fn may_go_on(&self) -> bool {
        let asked = self.interrupt_possible() || self.late_fault || self.s.halted;
        let stale = self.flush_jump_cache || !self.smc.is_empty();
        !(self.must_step() || asked || stale)
    }
}

extern "C" fn load(cpu: &mut Cpu, linear: u64, bytes: u64, _: u64) {
    cpu.jit.slow_paths += 1;
    cpu.jit.slow_result = cpu.slow_load(linear, bytes);
}

extern "C" fn store(cpu: &mut Cpu, linear: u64, bytes: u64, value: u64) {
    cpu.jit.slow_paths += 1;
    cpu.jit.slow_result = cpu.slow_store(linear, bytes, value);
}

extern "C" fn find_way(cpu: &mut Cpu) -> u64 {
    cpu.find_way().map_or(cpu.jump.stub(), |(_, code)| code)
}

extern "C" fn fold(cpu: &mut Cpu, _: u64, _: u64, _: u64) {
    cpu.fold_flags();
}

/// Makes the guest's MXCSR the host's, if the guest masks every exception and the host's unit has such controls.
extern "C" fn load_fp(cpu: &mut Cpu, _: u64, _: u64, _: u64) {
    let env = FpEnv::new(cpu.s.mxcsr);
    cpu.jit.slow_result = env.loadable().into();
    if env.loadable() {
        env.load();
        cpu.jit.fp_loaded = 1;
    }
}

extern "C" fn modify(cpu: &mut Cpu, linear: u64, bytes: u64, _: u64) {
    cpu.jit.slow_paths += 1;
    let host = cpu.resolve(linear, bytes, true);
    if let Some(host) = host {
        cpu.journal_store(host, bytes as usize);
    }
    cpu.jit.slow_result = host.map_or(0, |p| p as u64);
}

/// As [`load`], but an access to two pages has no address.
extern "C" fn find(cpu: &mut Cpu, linear: u64, bytes: u64, _: u64) {
    cpu.jit.slow_paths += 1;
    cpu.jit.slow_result = cpu.resolve(linear, bytes, false).map_or(0, |p| p as u64);
}

extern "C" fn load_x87(cpu: &mut Cpu, _: u64, _: u64, _: u64) {
    cpu.load_x87();
}

/// Evaluates `count` instructions of the running region, up to one behind which the region may not go on.
extern "C" fn evaluate_run(cpu: &mut Cpu, first: *const Insn, page_ip: u64, count: u64) {
    if cpu.jit.until_stray < 0 {
        // That was why it came here; but the operands of runs are looked for as always.
        cpu.jit.until_stray = STRAYS.into();
    }
    for n in 0..count as usize {
        // SAFETY: compiled code gives the address of the first of so many instructions that its region keeps, one
        // behind the other.
        evaluate(cpu, unsafe { &*first.add(n) }, page_ip, 0);
        if cpu.jit.exit_reason != reason::NEXT {
            return;
        }
    }
}

/// Evaluates an instruction of the running region: `exit_reason` says whether the region may go on.
extern "C" fn evaluate(cpu: &mut Cpu, insn: &Insn, page_ip: u64, _: u64) {
    cpu.jit.helper_calls += 1;
    cpu.unload_units();
    if cpu.journal.is_some() && (insn.ends_block || reads_outside(insn)) {
        // In lock-step nothing may happen twice.
        cpu.s.rip = cpu.cut_ip(page_ip.wrapping_add(u64::from(insn.off)));
        cpu.jit.exit_reason = reason::INTERPRET;
        return;
    }
    cpu.fold_flags();
    cpu.ip_base = page_ip;
    cpu.stop_block = false;
    cpu.again = false;
    let start = cpu.cut_ip(page_ip.wrapping_add(u64::from(insn.off)));
    cpu.s.rip = cpu.next_ip_value(insn);
    cpu.jit.exit_reason = match (insn.run)(cpu, insn) {
        Ok(()) => {
            cpu.jit.count += 1;
            if insn.sem.ends {
                cpu.serialize();
            }
            match cpu.stop_block || insn.ends_block {
                false => reason::NEXT,
                true if cpu.may_go_on() => {
                    // As the dispatch loop does before the next instruction, which an IRET may have set it for.
                    cpu.begin_instruction();
                    reason::ONWARD
                }
                true => reason::STOP,
            }
        }
        Err(_) => {
            cpu.s.rip = start;
            reason::FAULT
        }
    };
}

/// Whether an instruction's result depends on more than the state: on clocks, or on requests to stop.
fn reads_outside(insn: &Insn) -> bool {
    use iced_x86::Mnemonic::*;
    insn.rep != Rep::None
        || matches!(insn.iced_code().mnemonic(), Rdtsc | Rdtscp | Rdrand | Rdseed | Popf | Popfd | Popfq)
}
