//! Delivery of exceptions and interrupts through the IDT or the real-mode vector table (SDM vol. 3 chapter 6).

use crate::addr::is_canonical;
use crate::cpu::Cpu;
use crate::exception::{Exception, Trap, vector};
use crate::state::{Segment, flag, gpr, seg};
use crate::system::descriptor::{Descriptor, is_null, kind, null_segment, selector_error};
use crate::vcpu::{Event, TripleFault};
use crate::width::{W16, W32, W64, Width};

/// What delivery needs to know of an event.
#[derive(Clone, Copy)]
struct Delivery {
    vector: u8,
    error: Option<u32>,
    /// INT n, INT3 and INTO check the gate's DPL; the error codes of their own faults have EXT=0.
    software: bool,
    /// RF in the pushed flags.
    resume: bool,
}

impl Delivery {
    fn ext(&self) -> bool {
        !self.software
    }
}

/// The classes of SDM vol. 3 table 6-4 that make a double fault.
#[derive(PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
}

fn class(v: u8) -> Class {
    match v {
        vector::DE | vector::TS | vector::NP | vector::SS | vector::GP => Class::Contributory,
        vector::PF => Class::PageFault,
        _ => Class::Benign,
    }
}

impl Cpu {
    /// Delivers an event; faults met on the way are delivered in its place, escalating to a double and triple fault
    /// (SDM vol. 3 §6.15, interrupt 8).
    pub fn deliver(&mut self, event: Event) -> Result<(), TripleFault> {
        let mut d = match event {
            Event::Fault(e) => {
                // Faults push RF=1, except those of instruction breakpoints (SDM vol. 3 §17.3.1.1).
                let breakpoint = e.vector == vector::DB && e.payload & 15 != 0;
                Delivery { vector: e.vector, error: e.error, software: false, resume: !breakpoint }
            }
            Event::Trap(e) => Delivery { vector: e.vector, error: e.error, software: false, resume: false },
            Event::Interrupt(vector) => Delivery { vector, error: None, software: false, resume: false },
            Event::Nmi => Delivery { vector: vector::NMI, error: None, software: false, resume: false },
        };
        let mut double = false;
        // What the first event was decides whether a fault during its delivery is serial or doubles.
        let mut first = match event {
            Event::Fault(e) | Event::Trap(e) => {
                self.note_payload(&e);
                class(e.vector)
            }
            _ => Class::Benign,
        };
        loop {
            self.mode_changed();
            let Err(Trap) = self.deliver_once(d) else { return Ok(()) };
            // The exception is delivered where the failed delivery has left the CPU, be it in another task.
            self.late_fault = false;
            let e = self.raised;
            if e.vector == vector::PF {
                // CR2 follows even a page fault that is not delivered as one (SDM vol. 3 §6.15, interrupt 14).
                self.s.cr2 = e.payload;
            }
            if double {
                return Err(TripleFault);
            }
            let second = class(e.vector);
            let doubled = match first {
                Class::Benign => false,
                Class::Contributory => second == Class::Contributory,
                Class::PageFault => second != Class::Benign,
            };
            if doubled {
                double = true;
                d = Delivery { vector: vector::DF, error: Some(0), software: false, resume: false };
            } else {
                self.note_payload(&e);
                d = Delivery { vector: e.vector, error: e.error, software: false, resume: true };
                first = second;
            }
        }
    }

    /// Delivers INT n, INT3 and INTO, or INT1 if `privileged`. RIP is behind the instruction. A fault on the way is a
    /// fault of the instruction, which may be restarted.
    pub fn deliver_software(&mut self, vector: u8, privileged: bool) -> Result<(), Trap> {
        let result = self.deliver_once(Delivery { vector, error: None, software: !privileged, resume: false });
        self.stop_block = true;
        if privileged && result.is_ok() {
            self.debug_handler_entered();
        }
        self.late(result)
    }

    /// DR7.GD and IA32_DEBUGCTL's LBR and BTF do not apply to the handler of #DB (SDM vol. 3 §17.2.4, §17.4.1).
    fn debug_handler_entered(&mut self) {
        self.s.dr[7] &= !(1 << 13);
        self.s.msr.debugctl &= !3;
    }

    /// DR6: B0–B3 report this exception only; BD, BS, BT are sticky (SDM vol. 3 §17.2.3).
    pub(super) fn report_debug_conditions(&mut self, conditions: u64) {
        self.s.dr[6] = (self.s.dr[6] & !15) | conditions;
    }

    /// CR2 and DR6 as the exception says.
    fn note_payload(&mut self, e: &Exception) {
        match e.vector {
            vector::PF => self.s.cr2 = e.payload,
            vector::DB => {
                self.report_debug_conditions(e.payload);
                self.debug_handler_entered();
            }
            _ => {}
        }
    }

    fn deliver_once(&mut self, d: Delivery) -> Result<(), Trap> {
        if !self.s.protected() {
            self.deliver_real(d)
        } else if self.s.long_mode() {
            self.deliver_long(d)
        } else {
            self.deliver_protected(d)
        }
    }

    fn deliver_real(&mut self, d: Delivery) -> Result<(), Trap> {
        let entry = u64::from(d.vector) * 4;
        if entry + 3 > u64::from(self.s.idtr.limit) {
            return Err(self.gp(0));
        }
        let target = self.load_system::<W32>(self.s.idtr.base.wrapping_add(entry) & 0xffff_ffff)?;
        let flags = self.s.flags();
        let cs = self.s.seg[usize::from(seg::CS)].selector;
        let mut stack = Stack::current(self);
        stack.check::<W16>(self, 3, 0)?;
        stack.push::<W16>(self, flags)?;
        stack.push::<W16>(self, u64::from(cs))?;
        stack.push::<W16>(self, self.s.rip)?;
        stack.commit(self);
        self.s.rflags &= !(flag::IF | flag::TF | flag::RF | flag::AC);
        self.load_real_segment(seg::CS, (target >> 16) as u16);
        self.s.rip = target & 0xffff;
        Ok(())
    }

    /// Reads and checks the gate of a vector (protected and long mode).
    fn gate(&mut self, d: Delivery) -> Result<Descriptor, Trap> {
        let size = if self.s.long_mode() { 16 } else { 8 };
        let offset = u64::from(d.vector) * size;
        // Error code: vector, IDT bit, EXT.
        let error = u32::from(d.vector) << 3 | 2 | u32::from(d.ext());
        if offset + size - 1 > u64::from(self.s.idtr.limit) {
            return Err(self.gp(error));
        }
        let at = self.wrap_linear(self.s.idtr.base.wrapping_add(offset));
        let raw = self.load_system::<W64>(at)?;
        let high = if size == 16 { self.load_system::<W64>(self.wrap_linear(at.wrapping_add(8)))? } else { 0 };
        let gate = Descriptor { selector: 0, raw, high, at };
        let valid = match gate.kind() {
            kind::INT_GATE | kind::TRAP_GATE => true,
            kind::INT_GATE16 | kind::TRAP_GATE16 | kind::TASK_GATE => size == 8,
            _ => false,
        };
        if gate.is_segment() || !valid || (d.software && gate.dpl() < self.s.cpl) {
            return Err(self.gp(error));
        }
        if !gate.present() {
            return Err(self.raise(Exception::with_error(vector::NP, error)));
        }
        Ok(gate)
    }

    /// The code segment that a gate leads to, checked, and the privilege level it runs at.
    fn gate_target(&mut self, gate: &Descriptor, ext: bool) -> Result<(Descriptor, u8), Trap> {
        let selector = gate.gate_selector();
        let cs = self.descriptor(selector, vector::GP, ext)?;
        if !cs.is_code() || cs.dpl() > self.s.cpl {
            return Err(self.selector_fault(vector::GP, selector, ext));
        }
        if self.s.long_mode() && cs.attr() & (Segment::L | Segment::DB) != Segment::L {
            return Err(self.selector_fault(vector::GP, selector, ext));
        }
        if !cs.present() {
            return Err(self.selector_fault(vector::NP, selector, ext));
        }
        let cpl = if cs.is_conforming() { self.s.cpl } else { cs.dpl() };
        Ok((cs, cpl))
    }

    fn flags_for_push(&self, d: Delivery) -> u64 {
        let flags = self.s.flags();
        if d.resume { flags | flag::RF } else { flags }
    }

    fn deliver_long(&mut self, d: Delivery) -> Result<(), Trap> {
        let gate = self.gate(d)?;
        let (mut cs, cpl) = self.gate_target(&gate, d.ext())?;
        let ist = gate.raw >> 32 & 7;
        let old_cpl = self.s.cpl;
        let old_ss = self.s.seg[usize::from(seg::SS)];
        let old_rsp = self.s.gpr[usize::from(gpr::RSP)];
        let rsp = if ist != 0 {
            self.tss64_stack(0x24 + 8 * (ist - 1), d.ext())?
        } else if cpl != old_cpl {
            self.tss64_stack(4 + 8 * u64::from(cpl), d.ext())?
        } else {
            old_rsp
        } & !15;
        if !is_canonical(gate.gate_offset()) {
            return Err(self.gp(u32::from(d.ext())));
        }
        let flags = self.flags_for_push(d);
        let old_cs = self.s.seg[usize::from(seg::CS)].selector;
        let error = u64::from(d.error.unwrap_or(0));
        let words = [error, self.s.rip, u64::from(old_cs), flags, old_rsp, u64::from(old_ss.selector)];
        let mut bytes = [0; 48];
        bytes.chunks_exact_mut(8).zip(words).for_each(|(to, w)| to.copy_from_slice(&w.to_le_bytes()));
        let frame = if d.error.is_some() { &bytes[..] } else { &bytes[8..] };
        let bottom = rsp.wrapping_sub(frame.len() as u64);
        // The frame is written at the new level before anything changes: a fault here leaves the old state.
        let saved = (self.s.cpl, self.class);
        self.s.cpl = cpl;
        self.class = self.access_class();
        self.through_ss = true;
        let mut result = if is_canonical(bottom) && is_canonical(rsp.wrapping_sub(1)) {
            self.mark_accessed(&mut cs)
        } else {
            Err(self.raise(Exception::with_error(vector::SS, u32::from(d.ext()))))
        };
        if result.is_ok() {
            self.through_ss = true;
            result = self.store_bytes(bottom, frame);
        }
        (self.s.cpl, self.class) = saved;
        result?;
        if cpl != old_cpl {
            self.s.seg[usize::from(seg::SS)] = null_segment(u16::from(cpl), cpl);
        }
        self.s.gpr[usize::from(gpr::RSP)] = bottom;
        self.s.rip = gate.gate_offset();
        self.enter_handler(&gate, cs, cpl);
        Ok(())
    }

    /// Flags, CS and CPL on entry to a handler.
    fn enter_handler(&mut self, gate: &Descriptor, mut cs: Descriptor, cpl: u8) {
        if matches!(gate.kind(), kind::INT_GATE | kind::INT_GATE16) {
            self.s.rflags &= !flag::IF;
        }
        self.s.rflags &= !(flag::TF | flag::NT | flag::RF | flag::VM);
        cs.selector = gate.gate_selector();
        self.set_cs(cs.segment(), cpl);
    }

    /// A stack pointer from the 64-bit TSS; #TS if it lies beyond the limit.
    fn tss64_stack(&mut self, offset: u64, ext: bool) -> Result<u64, Trap> {
        let tr = self.s.tr;
        if offset + 7 > u64::from(tr.limit) {
            return Err(self.selector_fault(vector::TS, tr.selector, ext));
        }
        let rsp = self.load_system::<W64>(tr.base.wrapping_add(offset))?;
        if !is_canonical(rsp) {
            return Err(self.raise(Exception::with_error(vector::SS, u32::from(ext))));
        }
        Ok(rsp)
    }

    /// SS:ESP for privilege level `cpl` from a 16- or 32-bit TSS, checked (SDM vol. 2, INT n).
    pub fn tss_stack(&mut self, cpl: u8, ext: bool) -> Result<(Descriptor, u64), Trap> {
        let tr = self.s.tr;
        let wide = tr.kind() & 8 != 0;
        let (at, bytes) = if wide { (4 + 8 * u64::from(cpl), 8) } else { (2 + 4 * u64::from(cpl), 4) };
        if at + bytes - 1 > u64::from(tr.limit) {
            return Err(self.selector_fault(vector::TS, tr.selector, ext));
        }
        let at = tr.base.wrapping_add(at);
        let (sp, ss) = if wide {
            (self.load_system::<W32>(self.wrap_linear(at))?, self.load_system::<W16>(self.wrap_linear(at + 4))?)
        } else {
            (self.load_system::<W16>(self.wrap_linear(at))?, self.load_system::<W16>(self.wrap_linear(at + 2))?)
        };
        let selector = ss as u16;
        if is_null(selector) {
            return Err(self.raise(Exception::with_error(vector::TS, u32::from(ext))));
        }
        let mut d = self.descriptor(selector, vector::TS, ext)?;
        if (selector & 3) as u8 != cpl || d.dpl() != cpl || !d.is_segment() || d.is_code() || !d.rw() {
            return Err(self.selector_fault(vector::TS, selector, ext));
        }
        if !d.present() {
            return Err(self.selector_fault(vector::SS, selector, ext));
        }
        self.mark_accessed(&mut d)?;
        Ok((d, sp))
    }

    fn deliver_protected(&mut self, d: Delivery) -> Result<(), Trap> {
        let gate = self.gate(d)?;
        if gate.kind() == kind::TASK_GATE {
            return self.deliver_task(&gate, d);
        }
        let (mut cs, cpl) = self.gate_target(&gate, d.ext())?;
        let wide = gate.kind() & 8 != 0;
        let vm86 = self.s.vm86();
        if vm86 && (cpl != 0 || cs.is_conforming()) {
            return Err(self.raise(Exception::with_error(vector::GP, selector_error(cs.selector, d.ext()))));
        }
        let old = self.s.seg;
        let old_esp = self.s.gpr[usize::from(gpr::RSP)];
        let flags = self.flags_for_push(d);
        let mut words = Vec::with_capacity(10);
        let inner = cpl != self.s.cpl;
        let mut new_ss = None;
        let mut stack = if inner {
            let (ss, sp) = self.tss_stack(cpl, d.ext())?;
            if vm86 {
                for r in [seg::GS, seg::FS, seg::DS, seg::ES] {
                    words.push(u64::from(old[usize::from(r)].selector));
                }
            }
            words.push(u64::from(old[usize::from(seg::SS)].selector));
            words.push(old_esp);
            new_ss = Some(ss);
            Stack::new(ss.segment(), sp, cpl)
        } else {
            Stack::current(self)
        };
        words.extend([flags, u64::from(old[usize::from(seg::CS)].selector), self.s.rip]);
        words.extend(d.error.map(u64::from));
        let error = if inner { cs_ss_error(&new_ss, d) } else { u32::from(d.ext()) };
        if wide {
            stack.check::<W32>(self, words.len(), error)?;
        } else {
            stack.check::<W16>(self, words.len(), error)?;
        }
        if gate.gate_offset_legacy(wide) > u64::from(cs.limit()) {
            return Err(self.gp(u32::from(d.ext())));
        }
        for w in words {
            if wide { stack.push::<W32>(self, w)? } else { stack.push::<W16>(self, w)? }
        }
        self.mark_accessed(&mut cs)?;
        if let Some(ss) = new_ss {
            let mut s = ss.segment();
            s.selector = s.selector & 0xfffc | u16::from(cpl);
            self.s.seg[usize::from(seg::SS)] = s;
        }
        if vm86 {
            for r in [seg::GS, seg::FS, seg::DS, seg::ES] {
                self.s.seg[usize::from(r)] = Segment::default();
            }
        }
        self.s.cpl = cpl;
        stack.commit(self);
        self.s.rip = gate.gate_offset_legacy(wide);
        self.enter_handler(&gate, cs, cpl);
        Ok(())
    }

    /// An event through a task gate.
    fn deliver_task(&mut self, gate: &Descriptor, d: Delivery) -> Result<(), Trap> {
        let selector = gate.gate_selector();
        let resume = if d.resume { flag::RF } else { 0 };
        self.s.rflags |= resume;
        self.task_switch(selector, crate::system::task::Cause::Event, self.s.rip, d.ext())?;
        if let Some(error) = d.error {
            let mut stack = Stack::current(self);
            if self.s.tr.kind() & 8 != 0 {
                stack.check::<W32>(self, 1, u32::from(d.ext()))?;
                stack.push::<W32>(self, u64::from(error))?;
            } else {
                stack.check::<W16>(self, 1, u32::from(d.ext()))?;
                stack.push::<W16>(self, u64::from(error))?;
            }
            stack.commit(self);
        }
        Ok(())
    }
}

impl Descriptor {
    /// Offset of a 16- or 32-bit gate.
    pub fn gate_offset_legacy(&self, wide: bool) -> u64 {
        if wide { self.gate_offset() & 0xffff_ffff } else { self.gate_offset() & 0xffff }
    }
}

fn cs_ss_error(ss: &Option<Descriptor>, d: Delivery) -> u32 {
    ss.map_or(0, |s| s.error(d.ext()))
}

/// A stack being pushed to before it becomes the current one: nothing architectural changes until
/// [`Stack::commit`].
pub struct Stack {
    segment: Segment,
    sp: u64,
    mask: u64,
    cpl: u8,
}

impl Stack {
    /// The running code's own stack (not in 64-bit mode).
    pub fn current(cpu: &Cpu) -> Stack {
        Stack::new(cpu.s.seg[usize::from(seg::SS)], cpu.s.gpr[usize::from(gpr::RSP)], cpu.s.cpl)
    }

    /// A stack in `segment`, accessed at privilege level `cpl`.
    pub fn new(segment: Segment, sp: u64, cpl: u8) -> Stack {
        let mask = if segment.attr & Segment::DB != 0 { 0xffff_ffff } else { 0xffff };
        Stack { segment, sp, mask, cpl }
    }

    /// Whether `bytes` at `low` lie inside the segment. In real and virtual-8086 mode there are no types.
    fn holds(&self, cpu: &Cpu, low: u64, bytes: u64) -> bool {
        let high = low + bytes - 1;
        let typed = cpu.s.protected() && !cpu.s.vm86() || cpu.s.cpl != self.cpl;
        if typed && self.segment.attr & Segment::EXPAND_DOWN != 0 {
            low > u64::from(self.segment.limit) && high <= self.mask
        } else {
            high <= u64::from(self.segment.limit)
        }
    }

    /// Checks that `n` pushes of `W` bits fit, with #SS(`error`) if they don't. The pointer may wrap between two.
    pub fn check<W: Width>(&self, cpu: &mut Cpu, n: usize, error: u32) -> Result<(), Trap> {
        for k in 1..=n as u64 {
            let low = self.sp.wrapping_sub(k * W::BYTES) & self.mask;
            if !self.holds(cpu, low, W::BYTES) {
                return Err(cpu.raise(Exception::with_error(vector::SS, error)));
            }
        }
        Ok(())
    }

    /// Pushes `W` bits.
    pub fn push<W: Width>(&mut self, cpu: &mut Cpu, v: u64) -> Result<(), Trap> {
        let sp = self.sp.wrapping_sub(W::BYTES) & self.mask;
        let linear = self.segment.base.wrapping_add(sp) & 0xffff_ffff;
        self.at_level(cpu, |cpu| cpu.store_linear::<W>(linear, v))?;
        self.sp = self.sp & !self.mask | sp;
        Ok(())
    }

    /// Pops `W` bits.
    pub fn pop<W: Width>(&mut self, cpu: &mut Cpu) -> Result<u64, Trap> {
        let sp = self.sp & self.mask;
        if !self.holds(cpu, sp, W::BYTES) {
            return Err(cpu.raise(Exception::with_error(vector::SS, 0)));
        }
        let linear = self.segment.base.wrapping_add(sp) & 0xffff_ffff;
        let v = self.at_level(cpu, |cpu| cpu.load_linear::<W>(linear))?;
        self.skip(W::BYTES);
        Ok(v)
    }

    /// Moves the pointer up.
    pub fn skip(&mut self, bytes: u64) {
        self.sp = self.sp & !self.mask | self.sp.wrapping_add(bytes) & self.mask;
    }

    fn at_level<T>(&self, cpu: &mut Cpu, f: impl FnOnce(&mut Cpu) -> Result<T, Trap>) -> Result<T, Trap> {
        let saved = (cpu.s.cpl, cpu.class);
        cpu.s.cpl = self.cpl;
        cpu.class = cpu.access_class();
        cpu.through_ss = true;
        let result = f(cpu);
        (cpu.s.cpl, cpu.class) = saved;
        result
    }

    /// Makes the pointer current; SS is the caller's.
    pub fn commit(&self, cpu: &mut Cpu) {
        let rsp = &mut cpu.s.gpr[usize::from(gpr::RSP)];
        *rsp = *rsp & !self.mask | self.sp & self.mask;
        if self.mask == 0xffff_ffff {
            *rsp &= 0xffff_ffff;
        }
    }
}
