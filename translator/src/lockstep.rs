//! Lock-step: every run of compiled code is repeated by the interpreter from the same state, and the first difference
//! stops the machine. Stores are journaled, so that they can be undone in between.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::cpu::Cpu;
use crate::exception::Trap;
use crate::jit::region::Options;
use crate::state::CpuState;
use crate::vcpu::Vcpu;

/// What a run of compiled code did beside changing the CPU's state.
#[derive(Default)]
pub struct Journal {
    /// The bytes that stores replaced, oldest first: host address, length, old bytes.
    stores: Vec<(usize, usize, [u8; 16])>,
    /// Whether it went to a device.
    device: bool,
}

impl Journal {
    /// Notes that a device was read or written.
    pub(crate) fn device_accessed(&mut self) {
        self.device = true;
    }
}

impl Cpu {
    /// Notes what a store of `len` (at most 16) bytes to guest RAM at `host` is about to replace.
    #[inline]
    pub(crate) fn journal_store(&mut self, host: *mut u8, len: usize) {
        let Some(journal) = &mut self.journal else { return };
        for at in (0..len).step_by(16) {
            let (host, len) = (host.wrapping_add(at), (len - at).min(16));
            let mut old = [0; 16];
            // SAFETY: the caller is about to store there; reading the same bytes of guest RAM is as valid.
            unsafe { std::ptr::copy_nonoverlapping(host, old.as_mut_ptr(), len) };
            journal.stores.push((host as usize, len, old));
        }
    }

    /// The bytes that journaled stores changed, as they are now. Those that are what they were do not count: code may
    /// find that it may store there, and leave the store to the interpreter.
    fn journaled(&self) -> BTreeMap<usize, u8> {
        let mut old = BTreeMap::new();
        for &(host, len, bytes) in self.journal.iter().flat_map(|j| &j.stores) {
            (host..host + len).zip(bytes).for_each(|(at, byte)| _ = old.entry(at).or_insert(byte));
        }
        // SAFETY: every journaled address is a byte of guest RAM.
        let now = old.into_iter().map(|(at, old)| (at, old, unsafe { (at as *const u8).read() }));
        now.filter(|(_, old, now)| old != now).map(|(at, _, now)| (at, now)).collect()
    }

    /// Takes journaled stores back, youngest first.
    fn undo(&mut self) {
        let entries = self.journal.as_mut().map(|j| std::mem::take(&mut j.stores)).unwrap_or_default();
        for (host, len, old) in entries.into_iter().rev() {
            // SAFETY: the address is `len` bytes of guest RAM that a store was allowed to change.
            unsafe { std::ptr::copy_nonoverlapping(old.as_ptr(), host as *mut u8, len) };
        }
    }
}

/// A state in which equal architectural flags are equal words.
fn normal(s: &CpuState) -> CpuState {
    let mut s = s.clone();
    s.set_flags(s.flags());
    s
}

impl Vcpu {
    /// Turns lock-step on. Compiled code then never reads clocks or devices: those instructions are interpreted.
    pub fn enable_lockstep(&mut self) {
        self.cpu.journal = Some(Journal::default());
        self.cpu.jit.repeated = true;
        if let Some(jit) = &mut self.jit {
            jit.options.counted = true;
        }
        self.cpu.flush_tlb_all();
    }

    /// Runs compiled code, repeats it interpreted, and describes the first difference. The machine goes on from the
    /// interpreter's result.
    pub(crate) fn run_compared(&mut self, code: u64) -> Result<(), String> {
        let Some(jit) = &self.jit else { return Ok(()) };
        let before = self.cpu.s.clone();
        let count = self.cpu.jit.count;
        if let Some(j) = &mut self.cpu.journal {
            j.stores.clear();
            j.device = false;
        }
        jit.enter(&mut self.cpu, code);
        self.cpu.fold_flags();
        if self.cpu.journal.as_ref().is_some_and(|j| j.device) {
            // An instruction that a helper evaluated went to a device, which must not happen twice. The compiled
            // result stands, unchecked.
            return Ok(());
        }
        let done = self.cpu.jit.count - count;
        let compiled = normal(&self.cpu.s);
        let stored = self.cpu.journaled();
        self.cpu.undo();
        self.cpu.s = before.clone();
        self.cpu.mode_changed();
        let mut left = done;
        while left > 0 {
            match self.interpret_some(left) {
                Ok(n) => left -= n,
                Err(Trap) => {
                    return Err(format!(
                        "the interpreter raises {:x?} at {:#x}, {} of {done} instructions after {:#x}",
                        self.cpu.raised,
                        self.cpu.s.rip,
                        done - left,
                        before.rip
                    ));
                }
            }
        }
        let interpreted = normal(&self.cpu.s);
        let same = interpreted == compiled && self.cpu.journaled() == stored;
        if same {
            return Ok(());
        }
        let mut text = format!("difference after {done} instructions from {:#x}:\n", before.rip);
        for (name, a, b) in differences(&interpreted, &compiled) {
            let _ = writeln!(text, "  {name}: interpreted {a:#x}, compiled {b:#x}");
        }
        let ours = self.cpu.journaled();
        for (at, byte) in stored.iter().filter(|&(at, b)| ours.get(at) != Some(b)).take(16) {
            let _ = writeln!(text, "  byte at host {at:#x}: interpreted {:x?}, compiled {byte:#x}", ours.get(at));
        }
        for (at, byte) in ours.iter().filter(|&(at, _)| !stored.contains_key(at)).take(16) {
            let _ = writeln!(text, "  byte at host {at:#x}: interpreted {byte:#x}, not stored by compiled code");
        }
        let _ = writeln!(text, "state before: {before:x?}");
        if let Ok(gpa) = {
            self.cpu.s = before;
            self.cpu.mode_changed();
            self.cpu.translate_code(self.cpu.s.rip)
        } && let Some(plan) = crate::jit::region::Plan::grow(
            &self.blocks,
            &self.cpu,
            gpa,
            self.cpu.mode,
            |b| b.heat,
            Options { counted: true, ..Options::default() },
        ) {
            for block in &plan.blocks {
                let _ = writeln!(text, "block at page offset {:#x}, ends {:x?}:", block.off, block.end);
                for i in &block.insns {
                    let _ = writeln!(text, "  {:#x} {:?} {:?} imm {:#x}", i.off, i.iced_code(), i.op, i.imm);
                }
            }
        }
        Err(text)
    }
}

/// The registers in which two states differ.
fn differences(a: &CpuState, b: &CpuState) -> Vec<(String, u64, u64)> {
    let mut out = Vec::new();
    let mut check = |name: String, x: u64, y: u64| {
        if x != y {
            out.push((name, x, y));
        }
    };
    for r in 0..16 {
        check(format!("gpr {r}"), a.gpr[r], b.gpr[r]);
        for w in 0..4 {
            check(format!("ymm {r} word {w}"), a.ymm[r][w], b.ymm[r][w]);
        }
    }
    check("rip".into(), a.rip, b.rip);
    check("flags".into(), a.flags(), b.flags());
    check("cpl".into(), a.cpl.into(), b.cpl.into());
    check("mxcsr".into(), a.mxcsr.into(), b.mxcsr.into());
    out
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::cpuid::{CpuModel, Level};
    use crate::jit::Jit;
    use crate::mem::GuestRam;
    use crate::platform::Platform;
    use crate::state::{Segment, cr, gpr};
    use crate::vcpu::Exit;

    /// A device that gives another value each time.
    struct Counter(u64);

    impl Platform for Counter {
        fn mmio_read(&mut self, _gpa: u64, _size: u8) -> u64 {
            self.0 += 1;
            self.0
        }
    }

    #[test]
    fn a_helper_s_access_to_a_device_happens_once() {
        let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap());
        // add eax, fs:[20000h], which only helpers evaluate; loop to it; hlt.
        memory.write_slice(&[0x64, 0x03, 0x05, 0, 0, 2, 0, 0xe2, 0xf7, 0xf4], GuestAddress(0x1000)).unwrap();
        let mut cpu = Cpu::new(Arc::new(GuestRam::new(memory)), Box::new(Counter(0)), CpuModel::new(Level::Max, 1, 0));
        let mut s = CpuState::reset();
        s.cr0 |= cr::CR0_PE;
        s.seg = [Segment { base: 0, limit: u32::MAX, attr: 0xc093, selector: 0x10 }; 6];
        s.seg[1].attr = 0xc09b;
        s.rip = 0x1000;
        s.gpr[usize::from(gpr::RCX)] = 10;
        cpu.set_state(s);
        let mut vcpu = Vcpu::new(cpu, Some(Jit::new(1 << 20, 1).unwrap()));
        vcpu.set_threshold(1);
        vcpu.enable_lockstep();
        let exit = loop {
            let exit = vcpu.turn();
            vcpu.jit.as_ref().unwrap().drain();
            if let Some(exit) = exit {
                break exit;
            }
        };
        assert_eq!((exit, vcpu.difference.as_deref()), (Exit::Halt, None));
        assert_eq!(vcpu.cpu.s.gpr[0], (1..=10).sum::<u64>());
        assert!(vcpu.counts.entries > 0);
    }
}
