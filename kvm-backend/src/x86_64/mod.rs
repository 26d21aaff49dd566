//! KVM on x86-64 hosts: what the host offers, and a machine on it.

mod describe;
mod lapic;
mod msr;
mod probe;
mod state;
#[cfg(test)]
mod tests;
mod vcpu;

use std::sync::{Arc, OnceLock};

use diglot_translator::engine::{CpuidEntry, EngineError, LocalApics, Msi, VcpuSetup, Vm};
use kvm_bindings::{
    CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_CAP_X86_USER_SPACE_MSR, KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
    KVM_IRQ_ROUTING_MSI, KVM_MAX_CPUID_ENTRIES, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS,
    KvmIrqRouting, kvm_cpuid_entry2, kvm_enable_cap, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi, kvm_irq_routing_msi__bindgen_ty_1, kvm_msi,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};

use crate::kick::undisturbed;
use crate::memory::{Slots, Written};
use crate::{API_VERSION, KvmError, Offer, VmOptions, device};

/// Inputs of the I/O APIC, whose ends of interrupt KVM reports by their routes.
const IOAPIC_INPUTS: u64 = 24;
/// Three pages and one below them that processors without "unrestricted guest" run real mode with: where a machine has
/// neither RAM nor devices.
const TSS: usize = 0xfffb_d000;
const IDENTITY_MAP: u64 = 0xfffb_c000;

/// What a machine needs: the capability, and what to call it.
const NEEDED: [(Cap, &str); 11] = [
    (Cap::UserMemory, "guest memory from user space"),
    (Cap::SplitIrqchip, "local APICs without an I/O APIC (KVM_CAP_SPLIT_IRQCHIP)"),
    (Cap::SignalMsi, "interrupt messages (KVM_CAP_SIGNAL_MSI)"),
    (Cap::TscDeadlineTimer, "the APIC's TSC-deadline timer"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::ExtCpuid, "KVM_SET_CPUID2"),
    (Cap::MpState, "KVM_GET_MP_STATE"),
    (Cap::VcpuEvents, "KVM_GET_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_GET_DEBUGREGS"),
    (Cap::Xsave, "KVM_GET_XSAVE"),
    (Cap::Xcrs, "KVM_GET_XCRS"),
];

/// KVM, open and of the right version.
pub struct Kvm {
    system: kvm_ioctls::Kvm,
    cpuid: Vec<CpuidEntry>,
    offer: Offer,
}

fn call(what: &'static str, error: kvm_ioctls::Error) -> KvmError {
    let advice = match error.errno() {
        libc::EBUSY => "another hypervisor has the processor: end it, or use --backend jit",
        libc::ENOMEM | libc::EMFILE | libc::ENFILE => "the host is short of something: free some, or use --backend jit",
        _ => "use --backend jit",
    };
    KvmError::Call { what, why: error.to_string(), advice }
}

fn create_vm(system: &kvm_ioctls::Kvm) -> Result<VmFd, KvmError> {
    undisturbed(|| system.create_vm()).map_err(|e| call("create a machine", e))
}

fn create_vcpu(vm: &VmFd, index: u32) -> Result<VcpuFd, KvmError> {
    undisturbed(|| vm.create_vcpu(index.into())).map_err(|e| call("create a vCPU", e))
}

impl Kvm {
    /// Opens KVM, makes sure that it has what machines need, and runs a guest of a few instructions to its end.
    pub fn open() -> Result<Kvm, KvmError> {
        let device = device();
        let path = std::ffi::CString::new(device.as_os_str().as_encoded_bytes())
            .map_err(|e| KvmError::Open { device: device.clone(), why: e.to_string() })?;
        let system = kvm_ioctls::Kvm::new_with_path(&*path).map_err(|e| match e.errno() {
            libc::ENOENT | libc::ENXIO | libc::ENODEV => {
                KvmError::Missing { device: device.clone(), advice: probe::advice() }
            }
            libc::EACCES | libc::EPERM => KvmError::Permission { device: device.clone() },
            _ => KvmError::Open { device: device.clone(), why: e.to_string() },
        })?;
        let found = system.get_api_version();
        if found != API_VERSION {
            return Err(KvmError::Version { device, found });
        }
        let lacks: Vec<&str> =
            NEEDED.iter().filter(|(cap, _)| !system.check_extension(*cap)).map(|(_, name)| *name).collect();
        let msr = system.check_extension_int(Cap::X86UserSpaceMsr) > 0;
        let lacks: Vec<&str> = lacks.into_iter().chain((!msr).then_some("KVM_CAP_X86_USER_SPACE_MSR")).collect();
        if !lacks.is_empty() {
            return Err(KvmError::Capability(lacks.join(", ")));
        }
        let supported = system.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(|e| call("tell its CPUID", e))?;
        let (mips, khz) = probe::measure(&system, &supported)?;
        let offer = Offer {
            mips,
            tsc_hz: u64::from(khz) * 1000,
            tsc_scaling: system.check_extension(Cap::TscControl),
            vcpus: system.get_nr_vcpus(),
        };
        Ok(Kvm { system, cpuid: supported.as_slice().iter().map(entry).collect(), offer })
    }

    /// What it offers, as measured when it was opened.
    pub fn offer(&self) -> &Offer {
        &self.offer
    }

    /// What CPUID reports on the host's processor, as far as KVM lets guests use it.
    pub fn cpuid(&self) -> &[CpuidEntry] {
        &self.cpuid
    }

    /// The frequency that a guest's time-stamp counter has if `wanted` is asked for: without scaling, the host's.
    pub fn tsc_hz(&self, wanted: u64) -> u64 {
        if self.offer.tsc_scaling { wanted } else { self.offer.tsc_hz }
    }

    /// Gives a machine's memory to KVM.
    pub fn create_vm(&self, options: VmOptions) -> Result<Box<dyn Vm>, KvmError> {
        Ok(Box::new(KvmVm::new(self, options)?))
    }
}

fn entry(e: &kvm_cpuid_entry2) -> CpuidEntry {
    CpuidEntry {
        leaf: e.function,
        subleaf: e.index,
        indexed: e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0,
        registers: [e.eax, e.ebx, e.ecx, e.edx],
    }
}

fn entry2(e: &CpuidEntry) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = e.registers;
    let flags = if e.indexed { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
    kvm_cpuid_entry2 { function: e.leaf, index: e.subleaf, flags, eax, ebx, ecx, edx, ..Default::default() }
}

/// What vCPUs, and messages on their way to local APICs, keep alive.
struct Machine {
    // Before the memory, so that it is dropped before.
    fd: VmFd,
    slots: Slots,
    /// The offset that KVM has the guest's time-stamp counter at where that is the machine's. All vCPUs have the same, so
    /// that their counters are in step.
    tsc_base: OnceLock<u64>,
}

/// A machine on KVM: local APICs in the kernel, everything else in the chipset.
pub struct KvmVm {
    machine: Arc<Machine>,
    tsc_scaling: bool,
    cpuid: crate::CpuidTable,
    tsc_hz: u64,
}

impl KvmVm {
    /// A machine with memory and no vCPU.
    pub fn new(kvm: &Kvm, options: VmOptions) -> Result<KvmVm, KvmError> {
        let fd = create_vm(&kvm.system)?;
        let enable = |cap: u32, argument: u64| {
            let mut cap = kvm_enable_cap { cap, ..Default::default() };
            cap.args[0] = argument;
            fd.enable_cap(&cap).map_err(|e| call("set the machine up", e))
        };
        fd.set_identity_map_address(IDENTITY_MAP).map_err(|e| call("set the machine up", e))?;
        fd.set_tss_address(TSS).map_err(|e| call("set the machine up", e))?;
        enable(KVM_CAP_SPLIT_IRQCHIP, IOAPIC_INPUTS)?;
        enable(KVM_CAP_X2APIC_API, u64::from(KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK))?;
        enable(KVM_CAP_X86_USER_SPACE_MSR, u64::from(msr::TO_US))?;
        let slots = Slots::new(&fd, options.ram)?;
        let (cpuid, tsc_hz) = (options.cpuid, options.tsc_hz);
        Ok(KvmVm {
            machine: Arc::new(Machine { fd, slots, tsc_base: OnceLock::new() }),
            tsc_scaling: kvm.offer.tsc_scaling,
            cpuid,
            tsc_hz,
        })
    }

    /// Begins to log which pages the guest writes, or ends that.
    pub fn log_writes(&self, on: bool) -> Result<(), KvmError> {
        self.machine.slots.log(&self.machine.fd, on)
    }

    /// Which pages the guest has written since the log began, or since this was last asked.
    pub fn written(&self) -> Result<Vec<Written>, KvmError> {
        self.machine.slots.written(&self.machine.fd)
    }

    /// CPUID for KVM_SET_CPUID2.
    fn cpuid_of(&self, index: u32, count: u32) -> Result<CpuId, KvmError> {
        let entries: Vec<kvm_cpuid_entry2> = (self.cpuid)(index, count).iter().map(entry2).collect();
        CpuId::from_entries(&entries).map_err(|e| KvmError::Broken(format!("its CPUID has no room: {e:?}")))
    }
}

impl Vm for KvmVm {
    fn name(&self) -> &'static str {
        "KVM"
    }

    fn create_vcpu(&mut self, setup: VcpuSetup) -> Result<Box<dyn diglot_translator::engine::Vcpu>, EngineError> {
        Ok(Box::new(vcpu::Vcpu::new(self, setup)?))
    }

    fn local_apics(&self) -> Option<Box<dyn LocalApics>> {
        Some(Box::new(Apics(self.machine.clone())))
    }
}

/// The way to the machine's local APICs.
struct Apics(Arc<Machine>);

impl LocalApics for Apics {
    fn signal(&mut self, message: Msi) {
        let msi = kvm_msi { address_lo: message.address, data: message.data, ..Default::default() };
        // Nobody may be the destination, which is the guest's affair.
        if let Err(e) = self.0.fd.signal_msi(msi) {
            tracing::debug!("message {message:x?}: {e}");
        }
    }

    fn watch_levels(&mut self, messages: &[(u32, Msi)]) {
        let entries: Vec<kvm_irq_routing_entry> = messages.iter().map(|(input, m)| route(*input, *m)).collect();
        let set = KvmIrqRouting::from_entries(&entries)
            .map_err(|e| format!("{e:?}"))
            .and_then(|routes| self.0.fd.set_gsi_routing(&routes).map_err(|e| e.to_string()));
        if let Err(why) = set {
            tracing::warn!("ends of level-triggered interrupts are not reported: {why}");
        }
    }
}

fn route(input: u32, m: Msi) -> kvm_irq_routing_entry {
    let msi = kvm_irq_routing_msi {
        address_lo: m.address,
        address_hi: 0,
        data: m.data,
        __bindgen_anon_1: kvm_irq_routing_msi__bindgen_ty_1 { pad: 0 },
    };
    kvm_irq_routing_entry {
        gsi: input,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..Default::default()
    }
}
