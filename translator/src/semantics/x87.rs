//! x87 instructions (SDM vol. 1 §5.2): checks, memory operands and flags around [`crate::x87`]. `aux` holds the
//! 11-bit x87 opcode, as the unit's own opcode register does.

use iced_x86::{CpuidFeature, Mnemonic};

use crate::cpu::Cpu;
use crate::emit::Emit;
use crate::exception::{Exception, Trap, vector};
use crate::insn::{Handler, Insn, Mode};
use crate::semantics::{Form, Sem, no_aux};
use crate::state::{cr, gpr, seg};
use crate::width::W16;
use crate::x87::{Layout, Memory, Op, StateImage};

/// Semantics of which compiled code does several instructions at once ([`crate::jit::x87`]).
macro_rules! by_run {
    ($f:ident) => {
        const { &Sem { run: $f, jit: None, quick: None, usage: Some(crate::jit::x87::usage), ends: false, aux: no_aux } }
    };
}

/// What an instruction of this group does; FWAIT is one that does nothing.
pub fn operation(i: &Insn) -> Option<Op> {
    let is = |f: Handler| std::ptr::fn_addr_eq(i.run, f);
    if is(wait) {
        return Some(Op::LegacyNop);
    }
    if is(x87) { Op::decode(i.aux) } else { None }
}

/// The group's semantics.
pub fn lookup(form: &Form<'_>) -> Option<&'static Sem> {
    if form.instr.mnemonic() == Mnemonic::Wait {
        return Some(by_run!(wait));
    }
    let classes = [CpuidFeature::FPU, CpuidFeature::FPU287, CpuidFeature::FPU387, CpuidFeature::SSE3];
    (form.fop.is_some() && form.instr.cpuid_features().iter().any(|f| classes.contains(f))).then_some(by_run!(x87))
}

fn not_available(cpu: &mut Cpu) -> Result<(), Trap> {
    if cpu.s.cr0 & (cr::CR0_EM | cr::CR0_TS) != 0 {
        return Err(cpu.raise(Exception::plain(vector::NM)));
    }
    Ok(())
}

/// #MF for a pending unmasked exception. With CR0.NE clear a PC reports it as IRQ 13 through the chipset; no operating
/// system of this machine's kind uses that, so it is #MF too.
fn pending(cpu: &mut Cpu) -> Result<(), Trap> {
    if cpu.s.x87.pending_exception() { Err(cpu.raise(Exception::plain(vector::MF))) } else { Ok(()) }
}

fn wait(cpu: &mut Cpu, _: &Insn) -> Result<(), Trap> {
    let both = cr::CR0_MP | cr::CR0_TS;
    if cpu.s.cr0 & both == both {
        return Err(cpu.raise(Exception::plain(vector::NM)));
    }
    pending(cpu)
}

fn layout(cpu: &Cpu, i: &Insn) -> Layout {
    // The 28- and 108-byte images are those of 32-bit operands.
    let wide = matches!(i.mem_bytes, 28 | 108);
    Layout { wide, protected: cpu.s.protected() && !cpu.s.vm86() }
}

fn operand(cpu: &mut Cpu, i: &Insn, bytes: usize, write: bool) -> Result<u64, Trap> {
    let ea = cpu.ea(i);
    let linear = cpu.linearize(i.seg, ea, bytes as u64, write)?;
    cpu.through_ss = i.seg == seg::SS;
    Ok(linear)
}

/// The alignment of an operand of `bytes` (SDM vol. 3 table 6-7): images have that of their fields.
fn alignment(bytes: usize) -> u64 {
    match bytes {
        10 => 8,
        14 | 94 => 2,
        28 | 108 => 4,
        n => n as u64,
    }
}

fn load_image(cpu: &mut Cpu, i: &Insn, bytes: usize) -> Result<StateImage, Trap> {
    let linear = operand(cpu, i, bytes, false)?;
    cpu.check_alignment(linear, alignment(bytes))?;
    let mut image: StateImage = [0; 108];
    cpu.load_bytes(linear, &mut image[..bytes])?;
    Ok(image)
}

fn store_image(cpu: &mut Cpu, i: &Insn, image: &StateImage, bytes: usize) -> Result<(), Trap> {
    let linear = operand(cpu, i, bytes, true)?;
    cpu.check_alignment(linear, alignment(bytes))?;
    cpu.store_bytes(linear, &image[..bytes])
}

fn x87(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let Some(op) = Op::decode(i.aux) else { return Err(cpu.ud()) };
    not_available(cpu)?;
    if op.waits() {
        pending(cpu)?;
    }
    let l = layout(cpu, i);
    match op.memory() {
        Memory::None if matches!(op, Op::StatusToAx) => {
            let status = cpu.s.x87.fsw;
            cpu.set_gpr::<W16>(gpr::RAX, u64::from(status));
        }
        Memory::None => {
            let flags = cpu.s.flags();
            if let Some(status) = cpu.s.x87.execute(op, flags) {
                cpu.s.set_status(status);
            }
        }
        Memory::Read(n) => {
            let linear = operand(cpu, i, usize::from(n), false)?;
            cpu.check_alignment(linear, alignment(usize::from(n)))?;
            let mut bytes = [0; 16];
            cpu.load_bytes(linear, &mut bytes[..usize::from(n)])?;
            cpu.s.x87.load(op, u128::from_le_bytes(bytes));
        }
        Memory::Write(n) => {
            // An unmasked exception may leave nothing to store, but the operand's faults come first.
            let linear = operand(cpu, i, usize::from(n), true)?;
            cpu.check_alignment(linear, alignment(usize::from(n)))?;
            cpu.probe_write(linear, u64::from(n))?;
            let store = cpu.s.x87.store(op);
            let n = usize::from(store.size);
            if n != 0 {
                cpu.store_bytes(linear, &store.value.to_le_bytes()[..n])?;
            }
            cpu.s.x87.commit(&store);
        }
        Memory::ReadEnvironment => {
            let image = load_image(cpu, i, l.environment_size())?;
            cpu.s.x87.load_environment(&image, l);
        }
        Memory::WriteEnvironment => {
            let image = cpu.s.x87.environment(l);
            store_image(cpu, i, &image, l.environment_size())?;
            cpu.s.x87.after_environment();
        }
        Memory::ReadState => {
            let image = load_image(cpu, i, l.state_size())?;
            cpu.s.x87.restore(&image, l);
        }
        Memory::WriteState => {
            let image = cpu.s.x87.save(l);
            store_image(cpu, i, &image, l.state_size())?;
            cpu.s.x87.init();
        }
    }
    if !op.is_control() {
        let long = cpu.mode.has(Mode::CODE64);
        let selector = |cpu: &Cpu, s: u8| if long { 0 } else { cpu.s.seg[usize::from(s)].selector };
        let ip = cpu.cut_ip(cpu.ip_base.wrapping_add(u64::from(i.off)));
        let cs = selector(cpu, seg::CS);
        cpu.s.x87.set_last(i.aux, ip, cs);
        if op.memory() != Memory::None {
            let (ea, ds) = (cpu.ea(i), selector(cpu, i.seg));
            cpu.s.x87.set_last_operand(ea, ds);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
