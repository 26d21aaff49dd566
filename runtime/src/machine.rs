//! The machine: built from its configuration, run until the guest or the user ends it.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use diglot_devices::chipset::{Chipset, ChipsetConfig, PowerEvent};
use diglot_kvm_backend::KvmError;
use diglot_translator::cpuid::Level;
use diglot_translator::engine::{CpuState, EngineError, Exit, Vcpu, VcpuSetup, Vm};
use diglot_translator::state::{Segment, Table, cr, gpr, seg};
use diglot_translator::trace::Trace;
use parking_lot::Mutex;
use vm_memory::{Bytes, GuestAddress};

use crate::acpi::{self, AcpiError};
use crate::boot::{self, BootError, InitrdSource, Registers};
use crate::footprint::Footprint;
use crate::memory::{GuestRam, MemoryError, low_ram_end};
use crate::platform::{Shared, VcpuPlatform};
use crate::stats::Stats;
use crate::{embedded, engine};

/// What to build and boot.
pub struct MachineConfig {
    /// Guest RAM in bytes.
    pub memory_bytes: u64,
    /// vCPUs; 1 for now.
    pub cpus: u8,
    /// Instruction set of the guest's CPU.
    pub cpu_model: CpuModel,
    /// What runs guest code.
    pub backend: Backend,
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
    /// Everything implemented.
    Max,
}

impl From<CpuModel> for Level {
    fn from(model: CpuModel) -> Level {
        match model {
            CpuModel::V2 => Level::V2,
            CpuModel::V3 => Level::V3,
            CpuModel::Max => Level::Max,
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
    /// A number of CPUs that this version cannot run.
    #[error("{0} CPUs are not supported yet; use --cpus 1")]
    Cpus(u8),
    /// The host could not start a thread.
    #[error("cannot start the timer thread: {0}; free some host resources and try again")]
    Thread(std::io::Error),
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
    shared: Arc<Shared>,
    output: SharedOutput,
    parts: Parts,
}

/// What a reset builds anew.
struct Parts {
    ram: GuestRam,
    vm: Box<dyn Vm>,
    vcpu: Box<dyn Vcpu>,
}

impl Machine {
    /// Builds the machine and loads what it boots.
    pub fn new(config: MachineConfig, console: Console) -> Result<Machine, RuntimeError> {
        if config.cpus != 1 {
            return Err(RuntimeError::Cpus(config.cpus));
        }
        let output = SharedOutput(Arc::new(Mutex::new(console.output)));
        let ram = GuestRam::new(config.memory_bytes)?;
        let epoch = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let chipset = Chipset::new(&chipset_config(&config, &ram, epoch), Box::new(output.clone()));
        let shared = Arc::new(Shared::new(chipset));
        let parts = build(&config, ram, &shared)?;
        Ok(Machine { config, shared, output, parts })
    }

    /// One line that says which engine runs the guest, and why.
    pub fn backend_line(&self) -> String {
        engine::choice(&self.config, &*self.parts.vm)
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
        let mut stats = Stats::default();
        let outcome = loop {
            match self.run_once() {
                Outcome::Reset if self.config.reboot == RebootPolicy::Reset => {
                    stats.add(self.parts.vcpu.counters());
                    if let Err(e) = self.reset() {
                        self.shared.finish();
                        let _ = timer.join();
                        return Err(e);
                    }
                }
                outcome => break outcome,
            }
        };
        self.shared.finish();
        let _ = timer.join();
        let _ = self.output.flush();
        stats.add(self.parts.vcpu.counters());
        stats.add(self.shared.exits.counters());
        stats.memory = Footprint::measure(self.parts.ram.mmap());
        stats.seconds = start.elapsed().as_secs_f64();
        Ok((outcome, stats))
    }

    fn run_once(&mut self) -> Outcome {
        loop {
            match self.parts.vcpu.run() {
                Exit::Halt => self.shared.sleep_until_event(),
                Exit::Shutdown(detail) => return Outcome::TripleFault { detail },
                Exit::Failed(why) => return Outcome::Failed(why),
                Exit::Stopped => {
                    if let Some(event) = self.shared.power.lock().take() {
                        match event {
                            PowerEvent::PowerOff => return Outcome::PoweredOff,
                            PowerEvent::Reset => return Outcome::Reset,
                            PowerEvent::Exit(code) => return Outcome::Exited(code),
                            PowerEvent::Suspend if self.shared.sleep_until_woken() => {
                                let Some(vector) = acpi::waking_vector(self.parts.ram.mmap()) else {
                                    return Outcome::Reset;
                                };
                                self.parts.vcpu.set_state(&woken_state(vector));
                            }
                            PowerEvent::Suspend => {}
                        }
                    }
                    if let Some(why) = *self.shared.stop.lock() {
                        return Outcome::Stopped(why);
                    }
                }
            }
        }
    }

    /// Power-on state again: fresh memory and devices, the kernel loaded anew.
    fn reset(&mut self) -> Result<(), RuntimeError> {
        let ram = GuestRam::new(self.config.memory_bytes)?;
        let epoch = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let epoch = epoch.saturating_sub(self.shared.now() / 1_000_000_000);
        let chipset = Chipset::new(&chipset_config(&self.config, &ram, epoch), Box::new(self.output.clone()));
        *self.shared.chipset.lock() = chipset;
        self.parts = build(&self.config, ram, &self.shared)?;
        Ok(())
    }
}

fn chipset_config(config: &MachineConfig, ram: &GuestRam, epoch: u64) -> ChipsetConfig {
    ChipsetConfig {
        cpus: config.cpus,
        memory_bytes: ram.size(),
        low_memory_bytes: low_ram_end(ram.mmap()),
        rtc_epoch_seconds: epoch,
        debug_exit: config.debug_exit,
        test_device: config.test_device,
    }
}

/// Loads what is to be booted into `ram`, and gives that to an engine.
fn build(config: &MachineConfig, ram: GuestRam, shared: &Arc<Shared>) -> Result<Parts, RuntimeError> {
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
    let mut vm = engine::open(config, ram.mmap().clone())?;
    let vcpu = vm.create_vcpu(VcpuSetup {
        state,
        platform: Box::new(VcpuPlatform { shared: shared.clone(), cpu: 0 }),
        kick: shared.kick.clone(),
        index: 0,
        count: u32::from(config.cpus),
    })?;
    Ok(Parts { ram, vm, vcpu })
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
