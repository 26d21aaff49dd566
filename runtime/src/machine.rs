//! The machine: built from its configuration, run until the guest or the user ends it.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use diglot_devices::chipset::{ApicBus, Chipset, ChipsetConfig, PowerEvent, Startup};
use diglot_devices::ioapic::Message;
use diglot_devices::lapic::Page;
use diglot_kvm_backend::KvmError;
use diglot_translator::cpuid::Level;
use diglot_translator::engine::{
    self, CpuState, EngineError, Exit, Kick, LapicState, LocalApics, Msi, Vcpu, VcpuSetup, Vm,
};
use diglot_translator::state::{Segment, Table, cr, gpr, seg};
use diglot_translator::trace::Trace;
use parking_lot::Mutex;
use vm_memory::{Bytes, GuestAddress};

use crate::acpi::{self, AcpiError};
use crate::boot::{self, BootError, InitrdSource, Registers};
use crate::embedded;
use crate::engine::Engines;
use crate::footprint::Footprint;
use crate::memory::{GuestRam, MemoryError, low_ram_end};
use crate::platform::{Shared, VcpuPlatform};
use crate::stats::Stats;

/// What to build and boot.
pub struct MachineConfig {
    /// Guest RAM in bytes.
    pub memory_bytes: u64,
    /// vCPUs, at least 1.
    pub cpus: u8,
    /// Instruction set of the guest's CPU.
    pub cpu_model: CpuModel,
    /// What runs guest code.
    pub backend: Backend,
    /// KVM will do even where it is emulated.
    pub slow_kvm: bool,
    /// Whether [`Controller::switch`] will be called.
    pub switches: bool,
    /// What takes over then; by default the compiler from KVM and from the interpreter, and KVM from the compiler.
    pub switch_to: Option<Backend>,
    /// What to boot.
    pub boot: Boot,
    /// What a reset by the guest does.
    pub reboot: RebootPolicy,
    /// Bound of the JIT's code memory in bytes.
    pub code_cache_bytes: u64,
    /// The port at which the guest ends the run with a code of its own.
    pub debug_exit: Option<u16>,
    /// Whether there is the device of hypervisor tests.
    pub test_device: bool,
    /// Repeat every run of compiled code interpreted, and stop at the first difference.
    pub lockstep: bool,
    /// Write every guest instruction that executes; the guest is interpreted.
    pub trace: Option<Trace>,
    /// Count the guest instructions that compiled code completes.
    pub counted: bool,
    /// Name compiled code for Linux perf.
    pub perf_map: bool,
}

/// Instruction-set levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuModel {
    /// x86-64-v2.
    V2,
    /// x86-64-v3.
    V3,
    /// Everything implemented; on KVM, everything of it that the host's processor has.
    Max,
    /// The host's processor, on KVM.
    Host,
}

impl CpuModel {
    /// How much of the instruction set the translator has for it.
    pub(crate) fn level(self) -> Level {
        match self {
            CpuModel::V2 => Level::V2,
            CpuModel::V3 => Level::V3,
            CpuModel::Max | CpuModel::Host => Level::Max,
        }
    }
}

/// Engines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// The best one that works here.
    Auto,
    /// Interpreter and compiler.
    Jit,
    /// The interpreter alone.
    Interp,
    /// The host's own CPU.
    Kvm,
}

/// What to boot.
pub enum Boot {
    /// The guest that needs no file.
    Embedded,
    /// A kernel with its initial RAM disk and command line.
    Linux {
        /// bzImage, Multiboot or PVH ELF.
        kernel: PathBuf,
        /// Initial RAM disk.
        initrd: Option<InitrdSource>,
        /// Kernel command line.
        cmdline: String,
    },
}

/// What a reset by the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RebootPolicy {
    /// The machine starts again.
    Reset,
    /// The run ends.
    Exit,
}

/// Where the guest's serial output goes.
pub struct Console {
    /// Receives COM1's bytes, on the vCPU's thread.
    pub output: Box<dyn Write + Send>,
}

/// Why the user stopped the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The escape key.
    Quit,
    /// The time limit.
    Timeout,
    /// The awaited text appeared.
    Until,
    /// A signal.
    Signal(i32),
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest switched the machine off.
    PoweredOff,
    /// The guest reset the machine under [`RebootPolicy::Exit`].
    Reset,
    /// The guest ended the run with this exit code, by the debug exit port.
    Exited(u8),
    /// The CPU shut down after a triple fault.
    TripleFault {
        /// Where, for the user.
        detail: String,
    },
    /// The engine found out that it is wrong, or cannot go on.
    Failed(String),
    /// The user ended it.
    Stopped(StopReason),
}

/// Why a machine could not be built or run.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel or its companions.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The ACPI tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The KVM engine.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The embedded guest could not be put into memory.
    #[error("cannot set up the embedded guest: {0}; give it more memory with --memory")]
    Embedded(String),
    /// A number of CPUs that an engine or an option cannot run.
    #[error("{0} runs one CPU only, for now; use --cpus 1{1}")]
    OneCpu(&'static str, &'static str),
    /// The host's processor has not what the CPU model says.
    #[error("this host's KVM lacks {0}; use --cpu max for what there is, or --backend jit")]
    Processor(String),
    /// The host's processor without KVM.
    #[error("only KVM runs a guest on the host's own processor; use --cpu max, or --backend kvm and no other")]
    HostProcessor,
    /// The host could not start a thread.
    #[error("cannot start the timer thread: {0}; free some host resources and try again")]
    Thread(std::io::Error),
    /// The same for a vCPU.
    #[error("cannot start a vCPU's thread: {0}; free some host resources, or use fewer --cpus")]
    VcpuThread(std::io::Error),
}

/// A handle to a machine for other threads.
#[derive(Clone)]
pub struct Controller {
    shared: Arc<Shared>,
}

impl Controller {
    /// Ends the run; the first reason counts.
    pub fn stop(&self, why: StopReason) {
        self.shared.stop(why);
    }

    /// Has the other engine take over.
    pub fn switch(&self) {
        self.shared.switch();
    }

    /// Sends bytes to COM1, waiting while the guest is far behind in reading them.
    pub fn input(&self, bytes: &[u8]) {
        self.shared.input(bytes);
    }
}

/// Serial output that survives a reset of the machine around it.
#[derive(Clone)]
struct SharedOutput(Arc<Mutex<Box<dyn Write + Send>>>);

impl Write for SharedOutput {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        self.0.lock().flush()
    }
}

/// A machine, ready to run.
pub struct Machine {
    config: MachineConfig,
    engines: Engines,
    shared: Arc<Shared>,
    output: SharedOutput,
    parts: Parts,
    stats: Stats,
}

/// What a reset builds anew.
struct Parts {
    ram: GuestRam,
    vm: Box<dyn Vm>,
    vcpus: Vec<Box<dyn Vcpu>>,
}

impl Machine {
    /// Builds the machine and loads what it boots.
    pub fn new(config: MachineConfig, console: Console) -> Result<Machine, RuntimeError> {
        let engines = Engines::new(&config)?;
        let output = SharedOutput(Arc::new(Mutex::new(console.output)));
        let ram = GuestRam::new(config.memory_bytes)?;
        let epoch = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let chipset = chipset_config(&config, &ram, epoch, engines.tsc_hz);
        let chipset = Chipset::new(&chipset, Box::new(output.clone()));
        let shared = Arc::new(Shared::new(chipset, config.cpus, engines.tsc_hz));
        let parts = build(&config, &engines, ram, &shared)?;
        Ok(Machine { config, engines, shared, output, parts, stats: Stats::default() })
    }

    /// One line that says which engine runs the guest, and why.
    pub fn backend_line(&self) -> String {
        self.engines.line()
    }

    /// A handle for other threads.
    pub fn controller(&self) -> Controller {
        Controller { shared: self.shared.clone() }
    }

    /// Runs the machine to its end.
    pub fn run(mut self) -> Result<(Outcome, Stats), RuntimeError> {
        let start = Instant::now();
        let timer = self.shared.clone();
        let timer = std::thread::Builder::new()
            .name("timer".into())
            .spawn(move || timer.run_timer())
            .map_err(RuntimeError::Thread)?;
        let outcome = self.run_to_end();
        self.shared.finish();
        let _ = timer.join();
        let outcome = outcome?;
        let _ = self.output.flush();
        let mut stats = self.stats;
        self.parts.vcpus.iter().for_each(|vcpu| stats.add(vcpu.counters()));
        stats.add(self.shared.exits.counters());
        stats.memory = Footprint::measure(self.parts.ram.mmap());
        stats.seconds = start.elapsed().as_secs_f64();
        Ok((outcome, stats))
    }

    fn run_to_end(&mut self) -> Result<Outcome, RuntimeError> {
        loop {
            match self.run_once()? {
                Outcome::Reset if self.config.reboot == RebootPolicy::Reset => {
                    let Machine { stats, parts, .. } = self;
                    parts.vcpus.iter().for_each(|vcpu| stats.add(vcpu.counters()));
                    self.reset()?;
                }
                outcome => return Ok(outcome),
            }
        }
    }

    fn run_once(&mut self) -> Result<Outcome, RuntimeError> {
        loop {
            self.shared.resume();
            let event = self.shared.power.lock().take();
            if let Some(event) = event {
                match event {
                    PowerEvent::PowerOff => return Ok(Outcome::PoweredOff),
                    PowerEvent::Reset => return Ok(Outcome::Reset),
                    PowerEvent::Exit(code) => return Ok(Outcome::Exited(code)),
                    PowerEvent::Suspend if self.shared.sleep_until_woken() => {
                        let Some(vector) = acpi::waking_vector(self.parts.ram.mmap()) else {
                            return Ok(Outcome::Reset);
                        };
                        self.wake(vector)?;
                    }
                    PowerEvent::Suspend => {}
                }
            }
            if let Some(why) = *self.shared.stop.lock() {
                return Ok(Outcome::Stopped(why));
            }
            if self.shared.take_switch() {
                self.switch()?;
            }
            if let Some(outcome) = self.run_vcpus()? {
                return Ok(outcome);
            }
        }
    }

    /// Runs all vCPUs, each on a thread of its own, the first on this one, until there is something to do that only the
    /// machine can, or one cannot go on.
    fn run_vcpus(&mut self) -> Result<Option<Outcome>, RuntimeError> {
        let shared = &*self.shared;
        let Some((first, others)) = self.parts.vcpus.split_first_mut() else { return Ok(None) };
        std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for (cpu, vcpu) in (1..).zip(others) {
                let thread = std::thread::Builder::new().name(format!("vcpu {cpu}"));
                match thread.spawn_scoped(scope, move || run_vcpu(shared, cpu, &mut **vcpu)) {
                    Ok(thread) => threads.push(thread),
                    Err(error) => {
                        shared.pause();
                        return Err(RuntimeError::VcpuThread(error));
                    }
                }
            }
            let mut outcome = run_vcpu(shared, 0, &mut **first);
            for thread in threads {
                let other = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                if matches!(outcome, Ok(None)) {
                    outcome = other;
                }
            }
            outcome
        })
    }

    /// Ends S3: the CPU begins anew, and so does its local APIC, wherever that is.
    fn wake(&mut self, vector: u32) -> Result<(), RuntimeError> {
        let vcpus = &mut self.parts.vcpus;
        vcpus[0].set_state(&woken_state(vector))?;
        let pages = self.shared.chipset.lock().lapic_pages(self.shared.now());
        for (vcpu, page) in vcpus.iter_mut().zip(pages) {
            vcpu.set_lapic(&lapic_state(&page))?;
        }
        Ok(())
    }

    /// Has the other engine go on with the guest where this one has stopped.
    fn switch(&mut self) -> Result<(), RuntimeError> {
        let parts = &mut self.parts;
        let (mut states, mut pages) = (Vec::new(), Vec::new());
        let now = self.shared.now();
        for vcpu in &mut parts.vcpus {
            // First, as it may make an interrupt of a timer that has run out.
            let lapic = vcpu.lapic()?;
            let state = vcpu.state()?;
            if let Some(LapicState { base, registers, tsc_deadline, nmi, startup }) = lapic {
                let tsc = self.shared.tsc(now).wrapping_add(state.tsc_offset);
                let startup = match startup {
                    engine::Startup::Runs => Startup::Runs,
                    engine::Startup::Waits => Startup::Waits,
                    engine::Startup::Begins(page) => Startup::Begins(page),
                };
                pages.push((Page { base, registers, tsc_deadline, nmi, startup }, tsc));
            }
            states.push(state);
            self.stats.add(vcpu.counters());
        }
        in_step(&mut states);
        if !pages.is_empty() {
            self.shared.chipset.lock().take_lapics(&pages, now);
        }
        self.stats.add([("engine_switches", 1)]);
        self.engines.switch();
        let Started { vm, vcpus } = start(&self.config, &self.engines, &parts.ram, states, &self.shared)?;
        (parts.vm, parts.vcpus) = (vm, vcpus);
        // What waits at the local APICs has been asked for of the engine that was.
        (0..parts.vcpus.len()).for_each(|cpu| self.shared.kick(cpu).request(Kick::ATTENTION));
        Ok(())
    }

    /// Power-on state again: fresh memory and devices, the kernel loaded anew.
    fn reset(&mut self) -> Result<(), RuntimeError> {
        let ram = GuestRam::new(self.config.memory_bytes)?;
        let epoch = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let epoch = epoch.saturating_sub(self.shared.now() / 1_000_000_000);
        let chipset = chipset_config(&self.config, &ram, epoch, self.engines.tsc_hz);
        *self.shared.chipset.lock() = Chipset::new(&chipset, Box::new(self.output.clone()));
        self.parts = build(&self.config, &self.engines, ram, &self.shared)?;
        Ok(())
    }
}

fn chipset_config(config: &MachineConfig, ram: &GuestRam, epoch: u64, tsc_hz: u64) -> ChipsetConfig {
    ChipsetConfig {
        cpus: config.cpus,
        memory_bytes: ram.size(),
        low_memory_bytes: low_ram_end(ram.mmap()),
        rtc_epoch_seconds: epoch,
        tsc_hz,
        debug_exit: config.debug_exit,
        test_device: config.test_device,
    }
}

/// Loads what is to be booted into `ram`, and gives that to an engine.
fn build(
    config: &MachineConfig,
    engines: &Engines,
    ram: GuestRam,
    shared: &Arc<Shared>,
) -> Result<Parts, RuntimeError> {
    let rsdp = acpi::write_tables(ram.mmap(), config.cpus)?;
    let state = match &config.boot {
        Boot::Embedded => {
            if ram.size() < embedded::MEMORY {
                return Err(RuntimeError::Embedded(format!("it needs {} MiB", embedded::MEMORY >> 20)));
            }
            let image = embedded::image().map_err(|e| RuntimeError::Embedded(e.to_string()))?;
            let at = GuestAddress(image.load_gpa);
            ram.mmap().write_slice(&image.bytes, at).map_err(|e| RuntimeError::Embedded(e.to_string()))?;
            embedded_state(image.entry)
        }
        Boot::Linux { kernel, initrd, cmdline } => {
            initial_state(&boot::load(ram.mmap(), kernel, initrd.clone(), cmdline, rsdp)?.entry.registers())
        }
    };
    let mut states = vec![CpuState::reset(); config.cpus.into()];
    states[0] = state;
    let Started { vm, vcpus } = start(config, engines, &ram, states, shared)?;
    Ok(Parts { ram, vm, vcpus })
}

/// An engine with a machine.
struct Started {
    vm: Box<dyn Vm>,
    vcpus: Vec<Box<dyn Vcpu>>,
}

/// Gives the machine to the engine that is to run it, from the vCPUs' `states` on.
fn start(
    config: &MachineConfig,
    engines: &Engines,
    ram: &GuestRam,
    states: Vec<CpuState>,
    shared: &Arc<Shared>,
) -> Result<Started, RuntimeError> {
    let mut vm = engines.open(config, ram.mmap().clone())?;
    let mut vcpus = Vec::new();
    for (cpu, state) in states.into_iter().enumerate() {
        vcpus.push(vm.create_vcpu(VcpuSetup {
            state,
            platform: Box::new(VcpuPlatform { shared: shared.clone(), cpu }),
            kick: shared.kick(cpu).clone(),
            index: cpu as u32,
            count: u32::from(config.cpus),
        })?);
    }
    if let Some(apics) = vm.local_apics() {
        let pages = shared.chipset.lock().give_lapics(Box::new(Bus(apics)), shared.now());
        for (vcpu, page) in vcpus.iter_mut().zip(pages) {
            vcpu.set_lapic(&lapic_state(&page))?;
        }
    }
    Ok(Started { vm, vcpus })
}

/// A vCPU's thread: runs it until all are to pause, or it cannot go on, which has the others pause.
fn run_vcpu(shared: &Shared, cpu: usize, vcpu: &mut dyn Vcpu) -> Result<Option<Outcome>, RuntimeError> {
    let outcome = run_until_paused(shared, cpu, vcpu);
    if !matches!(outcome, Ok(None)) {
        shared.pause();
    }
    outcome
}

fn run_until_paused(shared: &Shared, cpu: usize, vcpu: &mut dyn Vcpu) -> Result<Option<Outcome>, RuntimeError> {
    while !shared.paused() {
        match shared.startup(cpu) {
            Startup::Runs => {}
            Startup::Waits => continue,
            Startup::Begins(page) => {
                let before = vcpu.state()?;
                vcpu.set_state(&begun_state(&before, page))?;
                shared.chipset.lock().begun(cpu, page);
            }
        }
        match vcpu.run() {
            Exit::Halt => shared.sleep_until_event(cpu),
            Exit::Shutdown(detail) => return Ok(Some(Outcome::TripleFault { detail })),
            Exit::Failed(why) => return Ok(Some(Outcome::Failed(why))),
            Exit::Stopped => {}
        }
    }
    Ok(None)
}

/// The way from the chipset to local APICs of an engine's own.
struct Bus(Box<dyn LocalApics>);

impl ApicBus for Bus {
    fn send(&mut self, message: Message) {
        self.0.signal(msi(message));
    }

    fn watch(&mut self, inputs: &[(usize, Message)]) {
        let messages: Vec<(u32, Msi)> = inputs.iter().map(|(input, m)| (*input as u32, msi(*m))).collect();
        self.0.watch_levels(&messages);
    }
}

/// An I/O APIC message as address and data (SDM vol. 3 §11.11).
fn msi(m: Message) -> Msi {
    const LOCAL_APICS: u32 = 0xfee0_0000;
    const ASSERTED: u32 = 1 << 14;
    Msi {
        address: LOCAL_APICS | u32::from(m.destination) << 12 | u32::from(m.logical) << 2,
        data: u32::from(m.vector) | u32::from(m.mode) << 8 | ASSERTED | u32::from(m.level) << 15,
    }
}

fn lapic_state(page: &Page) -> LapicState {
    let &Page { base, registers, tsc_deadline, nmi, startup } = page;
    let startup = match startup {
        Startup::Runs => engine::Startup::Runs,
        Startup::Waits => engine::Startup::Waits,
        Startup::Begins(page) => engine::Startup::Begins(page),
    };
    LapicState { base, registers, tsc_deadline, nmi, startup }
}

/// The CPU state of a boot protocol's entry point.
fn initial_state(r: &Registers) -> CpuState {
    let segment =
        |s: &boot::Segment| Segment { base: s.base, limit: s.limit, attr: u32::from(s.attr), selector: s.selector };
    let mut state = CpuState::reset();
    state.gpr = [0; 16];
    state.gpr[usize::from(gpr::RSP)] = r.rsp;
    state.gpr[usize::from(gpr::RSI)] = r.rsi;
    state.gpr[usize::from(gpr::RAX)] = r.rax;
    state.gpr[usize::from(gpr::RBX)] = r.rbx;
    state.rip = r.rip;
    state.set_flags(r.rflags);
    state.seg = [segment(&r.data); 6];
    state.seg[usize::from(seg::CS)] = segment(&r.code);
    state.tr = segment(&r.task);
    state.ldtr = Segment::default();
    state.gdtr = Table { base: r.gdt_base, limit: r.gdt_limit };
    state.idtr = Table::default();
    (state.cr0, state.cr3, state.cr4, state.efer) = (r.cr0, r.cr3, r.cr4, r.efer);
    state
}

/// Has time-stamp counters that are in step, but for the moments between one being read and the next, be in step again.
fn in_step(states: &mut [CpuState]) {
    const APART: u64 = 10_000_000;
    let offsets = states.iter().map(|state| state.tsc_offset);
    let (Some(least), Some(most)) = (offsets.clone().min(), offsets.max()) else { return };
    if most - least < APART {
        states.iter_mut().for_each(|state| state.tsc_offset = most);
    }
}

/// The CPU after INIT and a start-up IPI for a page (SDM vol. 3 §9.4.4): in real mode, at the page's beginning.
fn begun_state(before: &CpuState, page: u8) -> CpuState {
    let mut state = before.after_init();
    state.rip = 0;
    let cs = &mut state.seg[usize::from(seg::CS)];
    (cs.selector, cs.base) = (u16::from(page) << 8, u64::from(page) << 12);
    state
}

/// The CPU after S3: real mode, at the guest's waking vector (ACPI 6.5 §5.2.10).
fn woken_state(vector: u32) -> CpuState {
    let mut state = CpuState::reset();
    state.rip = u64::from(vector & 15);
    let cs = &mut state.seg[usize::from(seg::CS)];
    (cs.selector, cs.base) = ((vector >> 4) as u16, u64::from(vector & !15));
    state
}

/// The embedded guest's entry: 32-bit protected mode, flat segments, paging off.
fn embedded_state(entry: embedded::Entry32) -> CpuState {
    let flat = |attr| Segment { base: 0, limit: u32::MAX, attr, selector: 8 };
    let mut state = CpuState::reset();
    state.gpr = [0; 16];
    state.rip = u64::from(entry.eip);
    state.cr0 = cr::CR0_PE | cr::CR0_ET;
    state.seg = [Segment { selector: 16, ..flat(0xc093) }; 6];
    state.seg[usize::from(seg::CS)] = flat(0xc09b);
    state
}
