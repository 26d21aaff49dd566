//! Far transfers: JMP, CALL, RET between segments and levels, and IRET (SDM vol. 2; vol. 3 §5.8).

use crate::addr::is_canonical;
use crate::cpu::Cpu;
use crate::emit::Emit;
use crate::exception::{Exception, Trap, vector};
use crate::insn::{Insn, Mode, Opnd};
use crate::state::{Segment, flag, gpr, seg};
use crate::system::descriptor::{Descriptor, is_null, kind, null_segment};
use crate::system::interrupt::Stack;
use crate::system::task::Cause;
use crate::width::{W16, W32, W64, Width};

/// The selector and offset of a far transfer's operand.
fn far_pointer(cpu: &mut Cpu, i: &Insn) -> Result<(u16, u64), Trap> {
    if i.op[0] != Opnd::Mem {
        return Ok((i.imm2, i.imm));
    }
    let ea = cpu.ea(i);
    let offset = match i.osize {
        2 => cpu.load::<W16>(i, i.seg, ea)?,
        4 => cpu.load::<W32>(i, i.seg, ea)?,
        _ => cpu.load::<W64>(i, i.seg, ea)?,
    };
    let at = cpu.further(i, ea, u64::from(i.osize));
    Ok((cpu.load::<W16>(i, i.seg, at)? as u16, offset))
}

/// Cuts an instruction pointer to the operand size.
fn cut(bytes: u8, ip: u64) -> u64 {
    match bytes {
        2 => W16::zext(ip),
        4 => W32::zext(ip),
        _ => ip,
    }
}

/// JMP far.
pub fn jmp_far(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let (selector, offset) = far_pointer(cpu, i)?;
    let offset = cut(i.osize, offset);
    if !cpu.s.protected() || cpu.s.vm86() {
        return real_target(cpu, selector, offset);
    }
    let d = cpu.descriptor(selector, vector::GP, false)?;
    if d.is_code() {
        let cpl = cpu.s.cpl;
        let (cs, offset) = code_target(cpu, d, offset, selector)?;
        cpu.set_cs(cs, cpl);
        cpu.s.rip = offset;
        return Ok(());
    }
    match gate_kind(cpu, &d, selector)? {
        Gate::Call => {
            let (mut cs, offset, _) = call_gate(cpu, &d)?;
            // A jump never changes the level: only conforming code or code at CPL.
            if !cs.is_conforming() && cs.dpl() != cpu.s.cpl {
                return Err(cpu.selector_fault(vector::GP, cs.selector, false));
            }
            check_limit(cpu, &cs, offset)?;
            cpu.mark_accessed(&mut cs)?;
            let cpl = cpu.s.cpl;
            cpu.set_cs(cs.segment(), cpl);
            cpu.s.rip = offset;
            Ok(())
        }
        Gate::Task => switch(cpu, d.gate_selector(), Cause::Jump, cpu.next_ip_value(i)),
        Gate::Tss => switch(cpu, selector, Cause::Jump, cpu.next_ip_value(i)),
    }
}

/// CALL far.
pub fn call_far(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let (selector, offset) = far_pointer(cpu, i)?;
    let offset = cut(i.osize, offset);
    let ret = cpu.next_ip_value(i);
    let old_cs = u64::from(cpu.s.seg[usize::from(seg::CS)].selector);
    if !cpu.s.protected() || cpu.s.vm86() {
        let mut stack = Stack::current(cpu);
        check_pushes(cpu, &stack, i.osize, 2, 0)?;
        push(cpu, &mut stack, i.osize, old_cs)?;
        push(cpu, &mut stack, i.osize, ret)?;
        real_target(cpu, selector, offset)?;
        stack.commit(cpu);
        return Ok(());
    }
    let d = cpu.descriptor(selector, vector::GP, false)?;
    if d.is_code() {
        let cpl = cpu.s.cpl;
        let (cs, offset) = code_target(cpu, d, offset, selector)?;
        let sp = push_frame(cpu, i.stack_bytes, i.osize, &[old_cs, ret])?;
        sp.commit(cpu);
        cpu.set_cs(cs, cpl);
        cpu.s.rip = offset;
        return Ok(());
    }
    match gate_kind(cpu, &d, selector)? {
        Gate::Call => call_through_gate(cpu, i, &d, old_cs, ret),
        Gate::Task => switch(cpu, d.gate_selector(), Cause::Call, ret),
        Gate::Tss => switch(cpu, selector, Cause::Call, ret),
    }
}

/// RET far, with or without a count of bytes to release.
pub fn ret_far(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let release = if i.op[0] == Opnd::Imm { i.imm & 0xffff } else { 0 };
    let mut stack = PopStack::new(cpu, i);
    let ip = stack.pop(cpu, i.osize)?;
    let selector = stack.pop(cpu, i.osize)? as u16;
    if !cpu.s.protected() || cpu.s.vm86() {
        real_target(cpu, selector, ip)?;
        stack.skip(release);
        stack.commit(cpu);
        return Ok(());
    }
    let cs = return_code_segment(cpu, selector)?;
    let rpl = (selector & 3) as u8;
    if rpl == cpu.s.cpl {
        check_return_ip(cpu, &cs, ip)?;
        stack.skip(release);
        stack.commit(cpu);
        cpu.set_cs(cs.segment(), rpl);
        cpu.s.rip = ip;
        return Ok(());
    }
    stack.skip(release);
    let sp = stack.pop(cpu, i.osize)?;
    let ss_selector = stack.pop(cpu, i.osize)? as u16;
    let ss = return_stack_segment(cpu, ss_selector, rpl, &cs)?;
    check_return_ip(cpu, &cs, ip)?;
    enter_outer(cpu, cs.segment(), ss, ip, rpl, i.osize, sp);
    if release != 0 {
        // The parameters are released from the outer stack as well.
        add_to_stack(cpu, release);
    }
    Ok(())
}

/// IRET, IRETD, IRETQ.
pub fn iret(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    if !cpu.s.protected() {
        return iret_real(cpu, i);
    }
    if cpu.s.vm86() {
        if cpu.s.rflags & flag::IOPL != flag::IOPL {
            return Err(cpu.gp(0));
        }
        return iret_real(cpu, i);
    }
    // NMIs are no longer blocked, even if the rest of the instruction faults (SDM vol. 3 §6.7.1, §25.3).
    cpu.s.nmi_blocked = false;
    if cpu.s.rflags & flag::NT != 0 {
        if cpu.s.long_mode() {
            return Err(cpu.gp(0));
        }
        return iret_task(cpu, i);
    }
    let mut stack = PopStack::new(cpu, i);
    let ip = stack.pop(cpu, i.osize)?;
    let selector = stack.pop(cpu, i.osize)? as u16;
    let flags = stack.pop(cpu, i.osize)?;
    if flags & flag::VM != 0 && i.osize == 4 && cpu.s.cpl == 0 && !cpu.s.long_mode() {
        return iret_to_vm86(cpu, stack, ip, selector, flags);
    }
    let cs = return_code_segment(cpu, selector)?;
    let rpl = (selector & 3) as u8;
    let outer = rpl != cpu.s.cpl || cpu.mode.has(Mode::CODE64);
    let old_cpl = cpu.s.cpl;
    if outer {
        let sp = stack.pop(cpu, i.osize)?;
        let ss_selector = stack.pop(cpu, i.osize)? as u16;
        let ss = return_stack_segment(cpu, ss_selector, rpl, &cs)?;
        check_return_ip(cpu, &cs, ip)?;
        load_flags(cpu, flags, i.osize, old_cpl);
        enter_outer(cpu, cs.segment(), ss, ip, rpl, i.osize, sp);
    } else {
        check_return_ip(cpu, &cs, ip)?;
        stack.commit(cpu);
        load_flags(cpu, flags, i.osize, old_cpl);
        cpu.set_cs(cs.segment(), rpl);
        cpu.s.rip = ip;
    }
    Ok(())
}

/// The flags that an IRET at `cpl` may change (SDM vol. 2, IRET). Loading CS recomputes what is derived from them.
fn load_flags(cpu: &mut Cpu, flags: u64, bytes: u8, cpl: u8) {
    let mut mask = flag::STATUS | flag::TF | flag::DF | flag::NT;
    if bytes != 2 {
        mask |= flag::RF | flag::AC | flag::ID;
    }
    let iopl = (cpu.s.rflags & flag::IOPL) >> 12;
    if u64::from(cpl) <= iopl {
        mask |= flag::IF;
    }
    if cpl == 0 {
        mask |= flag::IOPL;
        if bytes != 2 {
            mask |= flag::VIF | flag::VIP;
        }
    }
    let merged = cpu.s.flags() & !mask | flags & mask;
    cpu.s.set_flags(merged);
}

fn iret_real(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let mut stack = PopStack::new(cpu, i);
    let ip = stack.pop(cpu, i.osize)?;
    let selector = stack.pop(cpu, i.osize)? as u16;
    let flags = stack.pop(cpu, i.osize)?;
    real_target(cpu, selector, ip)?;
    stack.commit(cpu);
    let vm = cpu.s.rflags & flag::VM;
    // In virtual-8086 mode IOPL stays; elsewhere this is CPL 0.
    let keep = if vm != 0 { flag::IOPL | flag::VM | flag::VIF | flag::VIP } else { flag::VM | flag::VIF | flag::VIP };
    let high = if i.osize == 2 { !0xffff } else { 0 };
    let mask = !(keep | high) & flag::DEFINED;
    let merged = cpu.s.flags() & !mask | flags & mask;
    cpu.s.set_flags(merged);
    cpu.s.nmi_blocked = false;
    cpu.mode_changed();
    Ok(())
}

fn iret_task(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let link = cpu.load_system::<W16>(cpu.s.tr.base)? as u16;
    switch(cpu, link, Cause::Return, cpu.next_ip_value(i))
}

fn iret_to_vm86(cpu: &mut Cpu, mut stack: PopStack, ip: u64, cs: u16, flags: u64) -> Result<(), Trap> {
    let esp = stack.pop(cpu, 4)?;
    let ss = stack.pop(cpu, 4)? as u16;
    let mut data = [0u16; 4];
    for s in &mut data {
        *s = stack.pop(cpu, 4)? as u16;
    }
    if ip > 0xffff {
        return Err(cpu.gp(0));
    }
    cpu.s.set_flags(flags);
    cpu.s.cpl = 3;
    cpu.mode_changed();
    for (r, selector) in
        [(seg::CS, cs), (seg::SS, ss), (seg::ES, data[0]), (seg::DS, data[1]), (seg::FS, data[2]), (seg::GS, data[3])]
    {
        cpu.load_real_segment(r, selector);
    }
    cpu.s.gpr[usize::from(gpr::RSP)] = esp;
    cpu.s.rip = ip;
    cpu.mode_changed();
    Ok(())
}

/// CS:IP as real and virtual-8086 mode load it.
fn real_target(cpu: &mut Cpu, selector: u16, ip: u64) -> Result<(), Trap> {
    if ip > u64::from(cpu.s.seg[usize::from(seg::CS)].limit) {
        return Err(cpu.gp(0));
    }
    cpu.load_real_segment(seg::CS, selector);
    cpu.s.rip = ip;
    Ok(())
}

/// What a system descriptor leads to in a far JMP or CALL.
enum Gate {
    Call,
    Task,
    Tss,
}

fn gate_kind(cpu: &mut Cpu, d: &Descriptor, selector: u16) -> Result<Gate, Trap> {
    let long = cpu.s.long_mode();
    let rpl = (selector & 3) as u8;
    let gate = match d.kind() {
        _ if d.is_segment() => None,
        kind::CALL_GATE => Some(Gate::Call),
        kind::CALL_GATE16 if !long => Some(Gate::Call),
        kind::TASK_GATE if !long => Some(Gate::Task),
        kind::TSS16 | kind::TSS if !long => Some(Gate::Tss),
        _ => None,
    };
    match gate {
        Some(gate) if d.dpl() >= cpu.s.cpl.max(rpl) => {
            if d.present() {
                Ok(gate)
            } else {
                Err(cpu.selector_fault(vector::NP, selector, false))
            }
        }
        _ => Err(cpu.selector_fault(vector::GP, selector, false)),
    }
}

/// Checks a code segment named directly by a far JMP or CALL.
fn code_target(cpu: &mut Cpu, mut d: Descriptor, offset: u64, selector: u16) -> Result<(Segment, u64), Trap> {
    let rpl = (selector & 3) as u8;
    let allowed = if d.is_conforming() { d.dpl() <= cpu.s.cpl } else { rpl <= cpu.s.cpl && d.dpl() == cpu.s.cpl };
    let both = Segment::L | Segment::DB;
    if !allowed || (cpu.s.long_mode() && d.attr() & both == both) {
        return Err(cpu.selector_fault(vector::GP, selector, false));
    }
    if !d.present() {
        return Err(cpu.selector_fault(vector::NP, selector, false));
    }
    check_limit(cpu, &d, offset)?;
    cpu.mark_accessed(&mut d)?;
    Ok((d.segment(), offset))
}

/// Whether a segment runs 64-bit code here.
fn is_code64(cpu: &Cpu, cs: &Descriptor) -> bool {
    cpu.s.long_mode() && cs.attr() & Segment::L != 0
}

fn check_limit(cpu: &mut Cpu, cs: &Descriptor, offset: u64) -> Result<(), Trap> {
    let ok = if is_code64(cpu, cs) { is_canonical(offset) } else { offset <= u64::from(cs.limit()) };
    if ok { Ok(()) } else { Err(cpu.gp(0)) }
}

fn check_return_ip(cpu: &mut Cpu, cs: &Descriptor, ip: u64) -> Result<(), Trap> {
    check_limit(cpu, cs, ip)
}

/// The code segment and offset behind a call gate, and its parameter count.
fn call_gate(cpu: &mut Cpu, gate: &Descriptor) -> Result<(Descriptor, u64, u32), Trap> {
    let selector = gate.gate_selector();
    let cs = cpu.descriptor(selector, vector::GP, false)?;
    let long = cpu.s.long_mode();
    if !cs.is_code() || cs.dpl() > cpu.s.cpl || (long && cs.attr() & (Segment::L | Segment::DB) != Segment::L) {
        return Err(cpu.selector_fault(vector::GP, selector, false));
    }
    if !cs.present() {
        return Err(cpu.selector_fault(vector::NP, selector, false));
    }
    let offset = if long { gate.gate_offset() } else { gate.gate_offset_legacy(gate.kind() == kind::CALL_GATE) };
    Ok((cs, offset, (gate.raw >> 32 & 31) as u32))
}

fn call_through_gate(cpu: &mut Cpu, i: &Insn, gate: &Descriptor, old_cs: u64, ret: u64) -> Result<(), Trap> {
    let (mut cs, offset, parameters) = call_gate(cpu, gate)?;
    let long = cpu.s.long_mode();
    let bytes = if long {
        8
    } else if gate.kind() == kind::CALL_GATE {
        4
    } else {
        2
    };
    let cpl = if cs.is_conforming() { cpu.s.cpl } else { cs.dpl() };
    if cpl == cpu.s.cpl {
        check_limit(cpu, &cs, offset)?;
        let sp = push_frame(cpu, i.stack_bytes, bytes, &[old_cs, ret])?;
        cpu.mark_accessed(&mut cs)?;
        sp.commit(cpu);
        cpu.set_cs(cs.segment(), cpl);
        cpu.s.rip = offset;
        return Ok(());
    }
    let old_ss = cpu.s.seg[usize::from(seg::SS)];
    let old_sp = cpu.s.gpr[usize::from(gpr::RSP)];
    if long {
        check_limit(cpu, &cs, offset)?;
        let tr = cpu.s.tr;
        let at = 4 + 8 * u64::from(cpl);
        if at + 7 > u64::from(tr.limit) {
            return Err(cpu.selector_fault(vector::TS, tr.selector, false));
        }
        let rsp = cpu.load_system::<W64>(tr.base.wrapping_add(at))?;
        let bottom = rsp.wrapping_sub(32);
        if !is_canonical(bottom) || !is_canonical(rsp) {
            return Err(cpu.raise(Exception::with_error(vector::SS, 0)));
        }
        let frame: Vec<u8> =
            [ret, old_cs, old_sp, u64::from(old_ss.selector)].iter().flat_map(|w| w.to_le_bytes()).collect();
        let saved = (cpu.s.cpl, cpu.class);
        cpu.s.cpl = cpl;
        cpu.class = cpu.access_class();
        let result = cpu.store_bytes(bottom, &frame);
        (cpu.s.cpl, cpu.class) = saved;
        result?;
        cpu.mark_accessed(&mut cs)?;
        cpu.s.gpr[usize::from(gpr::RSP)] = bottom;
        cpu.s.seg[usize::from(seg::SS)] = null_segment(u16::from(cpl), cpl);
        cpu.set_cs(cs.segment(), cpl);
        cpu.s.rip = offset;
        return Ok(());
    }
    let (ss, sp) = cpu.tss_stack(cpl, false)?;
    let mut words = vec![u64::from(old_ss.selector), old_sp];
    let mut source = Stack::current(cpu);
    let mut copied = Vec::new();
    for _ in 0..parameters {
        copied.push(if bytes == 4 { source.pop::<W32>(cpu)? } else { source.pop::<W16>(cpu)? });
    }
    words.extend(copied.into_iter().rev());
    words.extend([old_cs, ret]);
    let mut stack = Stack::new(ss.segment(), sp, cpl);
    check_pushes(cpu, &stack, bytes, words.len(), ss.error(false))?;
    check_limit(cpu, &cs, offset)?;
    for w in words {
        push(cpu, &mut stack, bytes, w)?;
    }
    cpu.mark_accessed(&mut cs)?;
    let mut segment = ss.segment();
    segment.selector = segment.selector & 0xfffc | u16::from(cpl);
    cpu.s.seg[usize::from(seg::SS)] = segment;
    stack.commit(cpu);
    cpu.set_cs(cs.segment(), cpl);
    cpu.s.rip = offset;
    Ok(())
}

/// A task switch by an instruction; a fault in the new task comes after the instruction.
fn switch(cpu: &mut Cpu, selector: u16, cause: Cause, return_ip: u64) -> Result<(), Trap> {
    let result = cpu.task_switch(selector, cause, return_ip, false);
    cpu.late(result)
}

fn check_pushes(cpu: &mut Cpu, stack: &Stack, bytes: u8, n: usize, error: u32) -> Result<(), Trap> {
    if bytes == 2 { stack.check::<W16>(cpu, n, error) } else { stack.check::<W32>(cpu, n, error) }
}

fn push(cpu: &mut Cpu, stack: &mut Stack, bytes: u8, v: u64) -> Result<(), Trap> {
    if bytes == 2 { stack.push::<W16>(cpu, v) } else { stack.push::<W32>(cpu, v) }
}

/// A frame pushed on the running code's stack, whose pointer is not yet moved.
struct Pushed {
    rsp: u64,
    bytes: u8,
}

impl Pushed {
    fn commit(&self, cpu: &mut Cpu) {
        let g = gpr::RSP;
        match self.bytes {
            8 => cpu.set_gpr::<W64>(g, self.rsp),
            4 => cpu.set_gpr::<W32>(g, self.rsp),
            _ => cpu.set_gpr::<W16>(g, self.rsp),
        }
    }
}

fn push_frame(cpu: &mut Cpu, stack_bytes: u8, bytes: u8, words: &[u64]) -> Result<Pushed, Trap> {
    let total = words.len() as u64 * u64::from(bytes);
    let rsp = cut(stack_bytes, cpu.s.gpr[usize::from(gpr::RSP)].wrapping_sub(total));
    let frame: Vec<u8> = words.iter().rev().flat_map(|w| w.to_le_bytes()[..usize::from(bytes)].to_vec()).collect();
    let linear = cpu.linearize(seg::SS, rsp, total, true)?;
    cpu.check_alignment(linear, u64::from(bytes))?;
    cpu.store_bytes(linear, &frame)?;
    Ok(Pushed { rsp, bytes: stack_bytes })
}

/// The running code's stack while a return pops from it.
struct PopStack {
    sp: u64,
    bytes: u8,
}

impl PopStack {
    fn new(cpu: &Cpu, i: &Insn) -> PopStack {
        PopStack { sp: cut(i.stack_bytes, cpu.s.gpr[usize::from(gpr::RSP)]), bytes: i.stack_bytes }
    }

    fn pop(&mut self, cpu: &mut Cpu, bytes: u8) -> Result<u64, Trap> {
        let linear = cpu.linearize(seg::SS, self.sp, u64::from(bytes), false)?;
        let v = match bytes {
            2 => cpu.load_linear::<W16>(linear)?,
            4 => cpu.load_linear::<W32>(linear)?,
            _ => cpu.load_linear::<W64>(linear)?,
        };
        self.skip(u64::from(bytes));
        Ok(v)
    }

    fn skip(&mut self, bytes: u64) {
        self.sp = cut(self.bytes, self.sp.wrapping_add(bytes));
    }

    fn commit(&self, cpu: &mut Cpu) {
        Pushed { rsp: self.sp, bytes: self.bytes }.commit(cpu)
    }
}

/// The code segment that a far return or IRET goes to, checked.
fn return_code_segment(cpu: &mut Cpu, selector: u16) -> Result<Descriptor, Trap> {
    let mut d = cpu.descriptor(selector, vector::GP, false)?;
    let rpl = (selector & 3) as u8;
    let level = if d.is_conforming() { d.dpl() <= rpl } else { d.dpl() == rpl };
    let both = Segment::L | Segment::DB;
    if !d.is_code() || rpl < cpu.s.cpl || !level || (cpu.s.long_mode() && d.attr() & both == both) {
        return Err(cpu.selector_fault(vector::GP, selector, false));
    }
    if !d.present() {
        return Err(cpu.selector_fault(vector::NP, selector, false));
    }
    cpu.mark_accessed(&mut d)?;
    Ok(d)
}

/// The stack segment that a return to level `rpl` loads, checked.
fn return_stack_segment(cpu: &mut Cpu, selector: u16, rpl: u8, cs: &Descriptor) -> Result<Segment, Trap> {
    if is_null(selector) {
        if is_code64(cpu, cs) && rpl != 3 && (selector & 3) as u8 == rpl {
            return Ok(null_segment(selector, rpl));
        }
        return Err(cpu.gp(0));
    }
    let mut d = cpu.descriptor(selector, vector::GP, false)?;
    if (selector & 3) as u8 != rpl || !d.is_segment() || d.is_code() || !d.rw() || d.dpl() != rpl {
        return Err(cpu.selector_fault(vector::GP, selector, false));
    }
    if !d.present() {
        return Err(cpu.selector_fault(vector::SS, selector, false));
    }
    cpu.mark_accessed(&mut d)?;
    Ok(d.segment())
}

/// Takes CS, SS, RIP, RSP and the level of a return that loads SS.
fn enter_outer(cpu: &mut Cpu, cs: Segment, ss: Segment, ip: u64, rpl: u8, bytes: u8, sp: u64) {
    let outer = rpl != cpu.s.cpl;
    cpu.s.seg[usize::from(seg::SS)] = ss;
    cpu.set_cs(cs, rpl);
    cpu.s.rip = ip;
    let rsp = &mut cpu.s.gpr[usize::from(gpr::RSP)];
    // Outside 64-bit mode the new stack's size says how much of RSP is loaded, whatever was popped: processors leave
    // the rest as it was under a 16-bit stack, and clear the upper half under a 32-bit one.
    *rsp = if cpu.mode.has(Mode::CODE64) {
        cut(bytes, sp)
    } else if ss.attr & Segment::DB != 0 {
        cut(bytes.min(4), sp)
    } else {
        *rsp & !0xffff | sp & 0xffff
    };
    if outer {
        cpu.null_inaccessible_segments();
        cpu.mode_changed();
    }
}

fn add_to_stack(cpu: &mut Cpu, bytes: u64) {
    let stack_bytes = cpu.mode.stack_bytes();
    let rsp = cut(stack_bytes, cpu.s.gpr[usize::from(gpr::RSP)].wrapping_add(bytes));
    Pushed { rsp, bytes: stack_bytes }.commit(cpu);
}
