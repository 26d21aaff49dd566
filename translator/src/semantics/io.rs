//! Port input and output (SDM vol. 1 §5.1.9, §19): IN, OUT, INS, OUTS.

use iced_x86::Mnemonic;

use crate::cpu::Cpu;
use crate::emit::Emit;
use crate::exception::Trap;
use crate::insn::{Insn, Opnd, Rep};
use crate::semantics::string::{advance, index, set_index};
use crate::semantics::{Form, Sem, interp};
use crate::state::{flag, gpr, seg};
use crate::width::{W8, W16, W32, W64, Width};

/// The group's semantics.
pub fn lookup(form: &Form<'_>) -> Option<&'static Sem> {
    Some(match form.instr.mnemonic() {
        Mnemonic::In => interp!(input, ends),
        Mnemonic::Out => interp!(output, ends),
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => interp!(ins, ends),
        Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => interp!(outs, ends),
        _ => return None,
    })
}

/// IOPL and the I/O permission bitmap.
fn check(cpu: &mut Cpu, port: u16, size: u8) -> Result<(), Trap> {
    let iopl = (cpu.s.rflags & flag::IOPL) >> 12;
    if cpu.s.protected() && (u64::from(cpu.s.cpl) > iopl || cpu.s.vm86()) {
        cpu.check_io_bitmap(port, size)?;
    }
    Ok(())
}

fn port(cpu: &mut Cpu, i: &Insn, n: usize) -> u16 {
    if i.op[n] == Opnd::Imm { i.imm as u8 as u16 } else { cpu.gpr::<W16>(gpr::RDX) as u16 }
}

fn read_port(cpu: &mut Cpu, port: u16, size: u8) -> u64 {
    cpu.counts.port_io += 1;
    let v = cpu.platform.port_in(port, size);
    cpu.check_io_watch(port, size);
    cpu.device_accessed();
    u64::from(v)
}

fn write_port(cpu: &mut Cpu, port: u16, size: u8, v: u64) {
    cpu.counts.port_io += 1;
    cpu.platform.port_out(port, size, v as u32);
    cpu.check_io_watch(port, size);
    cpu.device_accessed();
}

fn input(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let port = port(cpu, i, 1);
    check(cpu, port, i.osize)?;
    let v = read_port(cpu, port, i.osize);
    match i.osize {
        1 => cpu.set_gpr::<W8>(gpr::RAX, v),
        2 => cpu.set_gpr::<W16>(gpr::RAX, v),
        _ => cpu.set_gpr::<W32>(gpr::RAX, v),
    }
    Ok(())
}

fn output(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    let port = port(cpu, i, 0);
    check(cpu, port, i.osize)?;
    let v = match i.osize {
        1 => cpu.gpr::<W8>(gpr::RAX),
        2 => cpu.gpr::<W16>(gpr::RAX),
        _ => cpu.gpr::<W32>(gpr::RAX),
    };
    write_port(cpu, port, i.osize, v);
    Ok(())
}

/// One element of a string transfer; repeats by going back to the instruction, so that interrupts are taken between.
fn element(
    cpu: &mut Cpu,
    i: &Insn,
    pointer: u8,
    transfer: impl FnOnce(&mut Cpu, u16, u64) -> Result<(), Trap>,
) -> Result<(), Trap> {
    let repeated = i.rep != Rep::None;
    let count = index(cpu, i, gpr::RCX);
    let port = cpu.gpr::<W16>(gpr::RDX) as u16;
    // Processors look at the permission even where there is nothing to transfer.
    check(cpu, port, i.osize)?;
    if repeated && count == 0 {
        return Ok(());
    }
    let at = index(cpu, i, pointer);
    transfer(cpu, port, at)?;
    advance(cpu, i, pointer, u64::from(i.osize));
    if repeated {
        set_index(cpu, i, gpr::RCX, count.wrapping_sub(1));
        if W64::zext(count) != 1 {
            // As for the other string instructions.
            cpu.s.rflags |= flag::RF;
            cpu.s.rip = cpu.cut_ip(cpu.ip_base.wrapping_add(u64::from(i.off)));
        }
    }
    Ok(())
}

fn ins(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    element(cpu, i, gpr::RDI, |cpu, port, at| {
        let linear = cpu.linearize(seg::ES, at, u64::from(i.osize), true)?;
        cpu.probe_write(linear, u64::from(i.osize))?;
        let v = read_port(cpu, port, i.osize);
        match i.osize {
            1 => cpu.store_linear::<W8>(linear, v),
            2 => cpu.store_linear::<W16>(linear, v),
            _ => cpu.store_linear::<W32>(linear, v),
        }
    })
}

fn outs(cpu: &mut Cpu, i: &Insn) -> Result<(), Trap> {
    element(cpu, i, gpr::RSI, |cpu, port, at| {
        let linear = cpu.linearize(i.seg, at, u64::from(i.osize), false)?;
        let v = match i.osize {
            1 => cpu.load_linear::<W8>(linear)?,
            2 => cpu.load_linear::<W16>(linear)?,
            _ => cpu.load_linear::<W32>(linear)?,
        };
        write_port(cpu, port, i.osize, v);
        Ok(())
    })
}
