//! What to tell the user of a vCPU that cannot go on.

use std::fmt::Write;

use diglot_translator::engine::{CpuState, seg};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

const NAMES: [&str; 16] =
    ["RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8 ", "R9 ", "R10", "R11", "R12", "R13", "R14", "R15"];

/// All registers that matter, and the bytes at RIP, on several lines.
pub fn registers(s: &CpuState, fd: &VcpuFd, ram: &impl GuestMemoryBackend) -> String {
    let mut text = String::new();
    for (k, (name, value)) in NAMES.iter().zip(s.gpr).enumerate() {
        let _ = write!(text, "{}{name} {value:016x}", if k % 4 == 0 { "\n  " } else { "  " });
    }
    let cs = &s.seg[usize::from(seg::CS)];
    let _ = write!(
        text,
        "\n  RIP {:016x}  RFLAGS {:08x}  CS {:04x} (base {:x}, attributes {:04x})  CPL {}\
         \n  CR0 {:x}  CR2 {:x}  CR3 {:x}  CR4 {:x}  EFER {:x}",
        s.rip,
        s.flags(),
        cs.selector,
        cs.base,
        cs.attr,
        s.cpl,
        s.cr0,
        s.cr2,
        s.cr3,
        s.cr4,
        s.efer
    );
    let base = if s.code64() { 0 } else { cs.base };
    let linear = base.wrapping_add(s.rip);
    let mut bytes = Vec::new();
    for at in (0..15).map(|k| linear.wrapping_add(k)) {
        let physical = match fd.translate_gva(at) {
            Ok(t) if t.valid != 0 => t.physical_address,
            _ => break,
        };
        match ram.read_obj::<u8>(GuestAddress(physical)) {
            Ok(byte) => bytes.push(format!("{byte:02x}")),
            Err(_) => break,
        }
    }
    let bytes = if bytes.is_empty() { "none that are RAM".into() } else { bytes.join(" ") };
    let _ = write!(text, "\n  bytes at RIP: {bytes}");
    text
}
