//! Whether KVM runs guests here, and how fast: an `open` alone may succeed where nothing else does.

use std::sync::Arc;
use std::time::Instant;

use diglot_translator::engine::{CpuState, Segment, cr, gpr, seg};
use kvm_bindings::CpuId;
use kvm_ioctls::VcpuExit;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{call, create_vcpu, create_vm, state};
use crate::KvmError;
use crate::memory::Slots;

/// Where the guest's parts are. One large page maps them all.
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const CODE: u64 = 0x4000;
const RAM: usize = 0x1_0000;

/// `again: dec rcx; jnz again; out 80h, al`.
const PROGRAM: [u8; 7] = [0x48, 0xff, 0xc9, 0x75, 0xfb, 0xe6, 0x80];
const ROUNDS: u64 = 20_000;
/// How often it is run where it is slow: it may have been interrupted, on a host that has much to do.
const TRIES: u32 = 4;
/// What a round has of instructions.
const INSTRUCTIONS: f64 = 2.0;
/// From here on it is not an emulation that would take long, and a second, longer run measures better.
const WORTH_MORE: f64 = 20.0;
const MORE_ROUNDS: u64 = 1_000_000;

/// Runs a loop in 64-bit mode to its end. Gives millions of instructions a second, and the time-stamp counter's frequency
/// in kHz.
pub fn measure(system: &kvm_ioctls::Kvm, cpuid: &CpuId) -> Result<(f64, u32), KvmError> {
    let broken = |e: &dyn std::fmt::Display| KvmError::Broken(e.to_string());
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).map_err(|e| broken(&e))?;
    let present_writable = 3u64;
    let large = 1 << 7;
    for (at, entry) in [(PML4, PDPT | present_writable), (PDPT, PD | present_writable), (PD, large | present_writable)]
    {
        ram.write_obj(entry, GuestAddress(at)).map_err(|e| broken(&e))?;
    }
    ram.write_slice(&PROGRAM, GuestAddress(CODE)).map_err(|e| broken(&e))?;

    let vm = create_vm(system)?;
    let _slots = Slots::new(&vm, Arc::new(ram))?;
    let mut vcpu = create_vcpu(&vm, 0)?;
    vcpu.set_cpuid2(cpuid).map_err(|e| call("set CPUID", e))?;
    let khz = vcpu.get_tsc_khz().map_err(|e| call("tell the frequency of the time-stamp counter", e))?;
    let mut run = |rounds: u64| {
        let mut start = long_mode();
        start.gpr[usize::from(gpr::RCX)] = rounds;
        state::store(&vcpu, &start, state::Layout { pkru: None })?;
        let begun = Instant::now();
        loop {
            match vcpu.run() {
                Ok(VcpuExit::IoOut(0x80, _)) => break,
                Ok(VcpuExit::Intr) => {}
                Ok(exit) => return Err(broken(&format!("a loop in 64-bit mode ended in {exit:?}"))),
                Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {}
                Err(e) => return Err(call("run a guest", e)),
            }
        }
        let seconds = begun.elapsed().as_secs_f64();
        let left = vcpu.get_regs().map_err(|e| call("tell a vCPU's state", e))?.rcx;
        if left != 0 {
            return Err(broken(&format!("a loop ended with {left} rounds to go")));
        }
        Ok(rounds as f64 * INSTRUCTIONS / 1e6 / seconds.max(1e-9))
    };
    // What comes with the first entry is not what is to be measured.
    run(1)?;
    let mut first = 0.0f64;
    for _ in 0..TRIES {
        first = first.max(run(ROUNDS)?);
        if first >= WORTH_MORE {
            break;
        }
    }
    let mips = if first < WORTH_MORE { first } else { first.max(run(MORE_ROUNDS)?) };
    Ok((mips, khz))
}

fn long_mode() -> CpuState {
    let segment = |attr| Segment { base: 0, limit: u32::MAX, attr, selector: 8 };
    let mut s = CpuState::reset();
    s.rip = CODE;
    s.set_flags(0);
    s.cr0 = cr::CR0_PE | cr::CR0_ET | cr::CR0_NE | cr::CR0_PG;
    (s.cr3, s.cr4, s.efer) = (PML4, cr::CR4_PAE, cr::EFER_LME | cr::EFER_LMA);
    s.seg = [segment(0xc093); 6];
    s.seg[usize::from(seg::CS)] = segment(0xa09b);
    s.ldtr = Segment::default();
    s
}

/// What to do where there is no KVM.
pub fn advice() -> &'static str {
    // VMX is CPUID.1:ECX[5] (SDM vol. 3 §24.6), SVM is CPUID.8000_0001H:ECX[2] (AMD APM vol. 2 §15.4).
    let [vmx, svm] = [std::arch::x86_64::__cpuid(1).ecx >> 5, std::arch::x86_64::__cpuid(0x8000_0001).ecx >> 2];
    match (vmx & 1, svm & 1) {
        (1, _) => "load the module kvm_intel (sudo modprobe kvm_intel)",
        (_, 1) => "load the module kvm_amd (sudo modprobe kvm_amd)",
        _ => {
            "this processor shows neither VMX nor SVM: switch virtualisation on in the firmware, or, in a virtual \
             machine, have nested virtualisation enabled"
        }
    }
}
