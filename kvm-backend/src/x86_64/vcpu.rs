//! One vCPU: the loop around KVM_RUN.

use std::sync::Arc;
use std::time::Duration;

use diglot_translator::engine::{self, CpuState, EngineError, Exit, Kick, LapicState, Platform, Startup, VcpuSetup};
use kvm_bindings::{
    KVM_EXIT_IO_IN, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED,
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVMIO,
    kvm_device_attr, kvm_mp_state,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::ioctl_iow_nr;

use super::{KvmVm, Machine, call, create_vcpu, describe, lapic, msr, state};
use crate::KvmError;
use crate::kick::{Door, Inside, interrupted};

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
ioctl_iow_nr!(KVM_X86_SETUP_MCE, KVMIO, 0x9c, u64);

/// What the suberrors of KVM_EXIT_INTERNAL_ERROR mean.
const SUBERRORS: [(u32, &str); 4] = [
    (1, "it cannot emulate the instruction"),
    (2, "an exception or interrupt came while another was being delivered"),
    (3, "delivering an event ended in a page that is no memory"),
    (4, "the processor left the guest for an unexpected reason"),
];

/// What KVM_RUN came back for, with nothing borrowed from the run page.
enum Why {
    /// A signal, or nothing.
    Again,
    Port,
    Halted,
    Shutdown,
    /// What it was, for the user.
    Failed(String),
}

/// What the loop counted.
#[derive(Default)]
struct Counts {
    runs: u64,
    interrupted: u64,
    msrs: u64,
    unknown_msrs: u64,
    injected: u64,
}

pub struct Vcpu {
    fd: VcpuFd,
    machine: Arc<Machine>,
    platform: Box<dyn Platform>,
    kick: Kick,
    door: Door,
    layout: state::Layout,
    /// What KVM has no place for.
    rest: CpuState,
    /// The last exit is completed by the next KVM_RUN only.
    unfinished: bool,
    /// Whether an interrupt of the 8259s may wait.
    irq_maybe: bool,
    counts: Counts,
}

impl Vcpu {
    /// A vCPU with its first state.
    pub fn new(vm: &KvmVm, setup: VcpuSetup) -> Result<Vcpu, KvmError> {
        let fd = create_vcpu(&vm.machine.fd, setup.index)?;
        let cpuid = vm.cpuid_of(setup.index, setup.count)?;
        let has_pku = cpuid.as_slice().iter().any(|e| e.function == 7 && e.index == 0 && e.ecx >> 3 & 1 != 0);
        let pkru = cpuid.as_slice().iter().find(|e| e.function == 0xd && e.index == 9).map(|e| e.ebx as usize);
        fd.set_cpuid2(&cpuid).map_err(|e| call("set CPUID", e))?;
        if vm.tsc_scaling {
            let khz = u32::try_from(vm.tsc_hz / 1000).unwrap_or(u32::MAX);
            fd.set_tsc_khz(khz).map_err(|e| call("scale the time-stamp counter", e))?;
        }
        let mut banks = msr::MC_BANKS;
        // SAFETY: the call reads a u64. A KVM that has no such call has another number of banks, which is no harm.
        unsafe { ioctl_with_mut_ref(&fd, KVM_X86_SETUP_MCE(), &mut banks) };
        for (index, value) in msr::constants(vm.tsc_hz) {
            state::set_msr(&fd, index, value);
        }
        let mut vcpu = Vcpu {
            fd,
            machine: vm.machine.clone(),
            platform: setup.platform,
            kick: setup.kick,
            door: Door::default(),
            layout: state::Layout { pkru: pkru.filter(|_| has_pku) },
            rest: setup.state.clone(),
            unfinished: false,
            irq_maybe: true,
            counts: Counts::default(),
        };
        vcpu.door.open_to(&vcpu.kick);
        vcpu.store(&setup.state)?;
        Ok(vcpu)
    }

    fn load(&mut self) -> Result<CpuState, KvmError> {
        let mut s = self.rest.clone();
        state::load(&self.fd, &mut s, self.layout)?;
        let (platform, guest) = self.clocks()?;
        s.tsc_offset = guest.wrapping_sub(platform);
        Ok(s)
    }

    fn store(&mut self, s: &CpuState) -> Result<(), KvmError> {
        state::store(&self.fd, s, self.layout)?;
        self.rest = s.clone();
        self.place_tsc(s.tsc_offset)
    }

    /// The machine's time-stamp counter, and the guest's at the same time.
    fn clocks(&mut self) -> Result<(u64, u64), KvmError> {
        let guest = state::get_msr(&self.fd, msr::TSC);
        let guest = guest.ok_or_else(|| KvmError::Broken("it does not tell the time-stamp counter".into()))?;
        Ok((self.platform.tsc(), guest))
    }

    /// Has the guest's time-stamp counter be `beyond` the machine's. Writing the MSR would have KVM guess whether several
    /// vCPUs' are to be alike; the offset is taken as it is.
    fn place_tsc(&mut self, beyond: u64) -> Result<(), KvmError> {
        let (platform, guest) = self.clocks()?;
        let attribute = |value: &mut u64| kvm_device_attr {
            group: KVM_VCPU_TSC_CTRL,
            attr: u64::from(KVM_VCPU_TSC_OFFSET),
            addr: std::ptr::from_mut(value) as u64,
            flags: 0,
        };
        let failed = || call("move the time-stamp counter", kvm_ioctls::Error::last());
        let mut offset = 0;
        // SAFETY: the call writes a u64 to `addr`, which is that of one.
        if unsafe { ioctl_with_ref(&self.fd, KVM_GET_DEVICE_ATTR(), &attribute(&mut offset)) } != 0 {
            return Err(failed());
        }
        let base = *self.machine.tsc_base.get_or_init(|| offset.wrapping_add(platform).wrapping_sub(guest));
        let mut moved = base.wrapping_add(beyond);
        // SAFETY: the call reads a u64 from `addr`, which is that of one.
        if unsafe { ioctl_with_ref(&self.fd, KVM_SET_DEVICE_ATTR(), &attribute(&mut moved)) } != 0 {
            return Err(failed());
        }
        Ok(())
    }

    /// Runs until something needs the machine's attention.
    fn run_inside(&mut self, inside: &Inside) -> Result<Exit, KvmError> {
        loop {
            inside.clear();
            if self.kick.pending() != 0 {
                if self.kick.take(Kick::STOP) != 0 {
                    self.finish(inside)?;
                    return Ok(Exit::Stopped);
                }
                self.kick.take(Kick::ATTENTION);
                self.irq_maybe = true;
            }
            if self.irq_maybe {
                self.offer_interrupt()?;
            }
            match self.enter() {
                Why::Again => {}
                Why::Port => self.access_port(),
                Why::Halted => return Ok(Exit::Halt),
                Why::Shutdown => return Ok(Exit::Shutdown(self.load()?.place())),
                Why::Failed(why) => {
                    let registers = self.load().map(|s| describe::registers(&s, &self.fd, self.machine.slots.ram()));
                    return Ok(Exit::Failed(format!("{why}{}", registers.unwrap_or_default())));
                }
            }
        }
    }

    /// Completes the access that the guest is in the middle of.
    fn finish(&mut self, inside: &Inside) -> Result<(), KvmError> {
        while self.unfinished {
            inside.finish_only();
            match self.enter() {
                Why::Port => self.access_port(),
                Why::Failed(why) => return Err(KvmError::Broken(why)),
                // Guest code has not run on.
                Why::Again | Why::Halted | Why::Shutdown => {}
            }
        }
        Ok(())
    }

    /// Brings the machine's timers up to date and delivers what waits at the 8259s, or has KVM come back once it can be
    /// delivered.
    fn offer_interrupt(&mut self) -> Result<(), KvmError> {
        let waits = self.platform.interrupt_pending();
        let run = self.fd.get_kvm_run();
        run.request_interrupt_window = u8::from(waits);
        self.irq_maybe = waits;
        if waits
            && run.ready_for_interrupt_injection != 0
            && !self.unfinished
            && let Some(events) = state::quiet(&self.fd)?
            && let Some(vector) = self.platform.acknowledge()
        {
            state::inject(&self.fd, events, vector)?;
            self.counts.injected += 1;
            // The next has to wait until KVM says anew that it can take one.
            self.fd.get_kvm_run().ready_for_interrupt_injection = 0;
        }
        Ok(())
    }

    /// KVM_RUN, and what can be done about its exit at once.
    fn enter(&mut self) -> Why {
        self.counts.runs += 1;
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {
                self.unfinished = false;
                self.counts.interrupted += 1;
                return Why::Again;
            }
            Err(e) => return Why::Failed(format!("KVM refused to run the guest: {e}")),
        };
        self.unfinished = false;
        match exit {
            VcpuExit::IoIn(..) | VcpuExit::IoOut(..) => return Why::Port,
            VcpuExit::MmioRead(gpa, data) => {
                let value = self.platform.mmio_read(gpa, data.len() as u8).to_le_bytes();
                data.iter_mut().zip(value).for_each(|(byte, v)| *byte = v);
            }
            VcpuExit::MmioWrite(gpa, data) => {
                let mut value = [0; 8];
                value.iter_mut().zip(data).for_each(|(v, byte)| *v = *byte);
                self.platform.mmio_write(gpa, data.len() as u8, u64::from_le_bytes(value));
            }
            VcpuExit::IoapicEoi(vector) => {
                self.platform.end_of_interrupt(vector);
                return Why::Again;
            }
            VcpuExit::X86Rdmsr(access) => {
                self.counts.msrs += 1;
                let value = msr::read(access.index);
                self.counts.unknown_msrs += u64::from(value.is_none());
                (*access.data, *access.error) = (value.unwrap_or(0), u8::from(value.is_none()));
            }
            VcpuExit::X86Wrmsr(access) => {
                self.counts.msrs += 1;
                let known = msr::write(access.index);
                self.counts.unknown_msrs += u64::from(!known);
                *access.error = u8::from(!known);
            }
            VcpuExit::Hlt => return Why::Halted,
            VcpuExit::Shutdown => return Why::Shutdown,
            // The window is open, or there is nothing to tell.
            VcpuExit::IrqWindowOpen => {
                self.irq_maybe = true;
                return Why::Again;
            }
            VcpuExit::Intr => return Why::Again,
            VcpuExit::InternalError => return Why::Failed(self.internal_error()),
            VcpuExit::FailEntry(reason, cpu) => {
                return Why::Failed(format!(
                    "the processor refused to enter the guest: hardware reason {reason:#x}, on host CPU {cpu}"
                ));
            }
            other => return Why::Failed(format!("KVM stopped for a reason that machines have not: {other:?}")),
        }
        self.unfinished = true;
        // An access to a device may have raised an interrupt or lowered one.
        self.irq_maybe = true;
        Why::Again
    }

    fn internal_error(&mut self) -> String {
        // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, whose part of the union this is.
        let error = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        let what = SUBERRORS.iter().find(|(n, _)| *n == error.suberror).map_or("it does not say why", |(_, what)| what);
        format!("KVM cannot go on with the guest: {what} (KVM_EXIT_INTERNAL_ERROR, suberror {})", error.suberror)
    }

    /// An access to a port, of which string instructions make several.
    fn access_port(&mut self) {
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason is KVM_EXIT_IO, whose part of the union this is.
        let io = unsafe { run.__bindgen_anon_1.io };
        let size = usize::from(io.size);
        let base = (&raw mut *run).cast::<u8>();
        for k in 0..io.count as usize {
            // SAFETY: KVM has `count` units of `size` bytes, 1, 2 or 4, at `data_offset`, on the page behind the run
            // page, which is mapped with it.
            let unit = unsafe { std::slice::from_raw_parts_mut(base.add(io.data_offset as usize + k * size), size) };
            if u32::from(io.direction) == KVM_EXIT_IO_IN {
                let value = self.platform.port_in(io.port, io.size).to_le_bytes();
                unit.iter_mut().zip(value).for_each(|(byte, v)| *byte = v);
            } else {
                let mut value = [0; 4];
                value.iter_mut().zip(&*unit).for_each(|(v, byte)| *v = *byte);
                self.platform.port_out(io.port, io.size, u32::from_le_bytes(value));
            }
        }
        self.unfinished = true;
        self.irq_maybe = true;
    }

    /// Has what the kernel's APIC timer has run out to become a waiting interrupt, without running guest code. KVM keeps a
    /// timer that has run out apart until the vCPU is about to run, and does not tell of it.
    fn settle_timer(&mut self) -> Result<(), KvmError> {
        self.fd.set_kvm_immediate_exit(0);
        match interrupted(&mut self.fd, |fd| fd.run().map(|_| ())) {
            Err(e) if !matches!(e.errno(), libc::EINTR | libc::EAGAIN) => Err(call("settle a local APIC's timer", e)),
            _ => Ok(()),
        }
    }

    fn load_lapic(&mut self) -> Result<LapicState, KvmError> {
        let failed = |e| call("tell a local APIC's state", e);
        const INITIAL: usize = 0x38;
        const CURRENT: usize = 0x39;
        let mut page = self.fd.get_lapic().map_err(failed)?;
        let registers = lapic::registers(&page);
        if registers[INITIAL] != 0 && registers[CURRENT] == 0 {
            // Kernels without precise timers are late by up to a tick.
            std::thread::sleep(Duration::from_millis(5));
            self.settle_timer()?;
            page = self.fd.get_lapic().map_err(failed)?;
        }
        // INIT and start-up IPIs that wait become states when this is asked.
        let mp_state = self.fd.get_mp_state().map_err(failed)?.mp_state;
        let events = self.fd.get_vcpu_events().map_err(failed)?;
        let startup = match mp_state {
            KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => Startup::Waits,
            KVM_MP_STATE_SIPI_RECEIVED => Startup::Begins(events.sipi_vector as u8),
            _ => Startup::Runs,
        };
        Ok(LapicState {
            base: self.fd.get_sregs().map_err(failed)?.apic_base,
            registers: lapic::registers(&page),
            tsc_deadline: state::get_msr(&self.fd, msr::TSC_DEADLINE).unwrap_or(0),
            nmi: events.nmi.pending != 0,
            startup,
        })
    }

    fn store_lapic(&mut self, s: &LapicState) -> Result<(), KvmError> {
        let failed = |e| call("take a local APIC's state", e);
        let mut sregs = self.fd.get_sregs().map_err(failed)?;
        sregs.apic_base = s.base;
        // KVM has the task priority in both places.
        sregs.cr8 = u64::from(s.registers[8] >> 4 & 15);
        self.fd.set_sregs(&sregs).map_err(failed)?;
        self.fd.set_lapic(&lapic::page(s)).map_err(failed)?;
        state::set_msr(&self.fd, msr::TSC_DEADLINE, s.tsc_deadline);
        let mut events = self.fd.get_vcpu_events().map_err(failed)?;
        events.flags |= KVM_VCPUEVENT_VALID_NMI_PENDING;
        events.nmi.pending = u8::from(s.nmi);
        let mp_state = match s.startup {
            Startup::Runs => None,
            Startup::Waits => Some(KVM_MP_STATE_INIT_RECEIVED),
            Startup::Begins(page) => {
                events.flags |= KVM_VCPUEVENT_VALID_SIPI_VECTOR;
                events.sipi_vector = page.into();
                Some(KVM_MP_STATE_SIPI_RECEIVED)
            }
        };
        self.fd.set_vcpu_events(&events).map_err(failed)?;
        // Else it is what the vCPU's state has said: running or halted.
        mp_state.map_or(Ok(()), |mp_state| self.fd.set_mp_state(kvm_mp_state { mp_state }).map_err(failed))
    }
}

#[cfg(test)]
impl std::os::fd::AsRawFd for Vcpu {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.fd.as_raw_fd()
    }
}

impl engine::Vcpu for Vcpu {
    fn run(&mut self) -> Exit {
        let inside = self.door.enter(&mut self.fd);
        self.run_inside(&inside).unwrap_or_else(|e| Exit::Failed(e.to_string()))
    }

    fn state(&mut self) -> Result<CpuState, EngineError> {
        Ok(self.load()?)
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        Ok(self.store(state)?)
    }

    fn lapic(&mut self) -> Result<Option<LapicState>, EngineError> {
        Ok(Some(self.load_lapic()?))
    }

    fn set_lapic(&mut self, state: &LapicState) -> Result<(), EngineError> {
        Ok(self.store_lapic(state)?)
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let c = &self.counts;
        vec![
            ("kvm_runs", c.runs),
            ("kvm_interrupted", c.interrupted),
            ("kvm_msrs", c.msrs),
            ("unknown_msr", c.unknown_msrs),
            ("interrupts", c.injected),
        ]
    }
}
