//! Engines: which one runs the guest, and the translator behind the trait that all of them share.
//!
//! The machine drives guests through [`Vm`] and [`Vcpu`] only; this is the one file that knows what stands behind them.

use std::sync::Arc;

use diglot_kvm_backend::{Kvm, KvmError, LEAST_MIPS, Offer, VmOptions};
use diglot_translator::cpu::Cpu;
use diglot_translator::cpuid::CpuModel;
use diglot_translator::engine::{CpuState, CpuidEntry, EngineError, Exit, Vcpu, VcpuSetup, Vm};
use diglot_translator::jit::Jit;
use diglot_translator::jit::frame::reason;
use diglot_translator::jit::region::Options;
use diglot_translator::mem::GuestRam as CpuRam;
use diglot_translator::peers::Peers;
use diglot_translator::platform::TSC_HZ;
use diglot_translator::trace::Trace;
use diglot_translator::vcpu;
use vm_memory::GuestMemoryMmap;

use crate::machine::{self, Backend, MachineConfig, RuntimeError};

/// The engines of one machine: the one that runs it, another that may take over, and the CPU that both of them show.
pub(crate) struct Engines {
    /// What runs the guest now.
    pub current: Engine,
    /// What takes over at a switch.
    other: Engine,
    why: String,
    /// Open if one of the two is KVM.
    kvm: Option<Kvm>,
    model: CpuModel,
    /// The host's CPUID, if that is what the guest is to see.
    host: Option<Vec<CpuidEntry>>,
    /// Frequency of the guest's time-stamp counter.
    pub tsc_hz: u64,
}

/// An engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Engine {
    Interp,
    Jit,
    Kvm,
}

impl Engine {
    fn of(backend: Backend) -> Option<Engine> {
        match backend {
            Backend::Auto => None,
            Backend::Interp => Some(Engine::Interp),
            Backend::Jit => Some(Engine::Jit),
            Backend::Kvm => Some(Engine::Kvm),
        }
    }

    /// What `--backend` calls it.
    pub fn option(self) -> &'static str {
        match self {
            Engine::Interp => "interp",
            Engine::Jit => "jit",
            Engine::Kvm => "kvm",
        }
    }

    /// Its name, for the user.
    pub fn name(self) -> &'static str {
        match self {
            Engine::Interp => "interpreter",
            Engine::Jit => "interpreter and compiler",
            Engine::Kvm => "KVM",
        }
    }
}

/// Opens KVM, at a speed that is worth it unless any will do.
fn open_kvm(slow: bool) -> Result<Kvm, KvmError> {
    let kvm = Kvm::open()?;
    let mips = kvm.offer().mips;
    if mips < LEAST_MIPS && !slow { Err(KvmError::Slow { mips }) } else { Ok(kvm) }
}

/// What of the configuration only the translator can do, by the name of its option.
fn translator_only(config: &MachineConfig) -> Option<&'static str> {
    [(config.trace.is_some(), "--trace"), (config.lockstep, "--lockstep"), (config.perf_map, "--perf-map")]
        .into_iter()
        .find_map(|(asked, name)| asked.then_some(name))
}

/// Says what of the configuration runs one CPU only, if anything does. Of KVM nothing is to be had for these.
fn one_cpu_only(config: &MachineConfig) -> Result<(), RuntimeError> {
    if let Some(option) = translator_only(config) {
        return Err(RuntimeError::OneCpu(option, ", or leave the option out"));
    }
    Ok(())
}

/// Code memory that a vCPU gets at least, however many there are.
const MIN_CODE_BYTES: usize = 1 << 20;

/// Which engine `auto` stands for, and why.
fn choose(config: &MachineConfig) -> Result<(Engine, String, Option<Kvm>), RuntimeError> {
    if let Some(engine) = Engine::of(config.backend) {
        let kvm = if engine == Engine::Kvm { Some(open_kvm(config.slow_kvm)?) } else { None };
        return Ok((engine, "as asked".into(), kvm));
    }
    if let Some(option) = translator_only(config) {
        // A trace is of instructions one by one, which only the interpreter runs.
        let engine = if config.trace.is_some() { Engine::Interp } else { Engine::Jit };
        return Ok((engine, format!("for {option}"), None));
    }
    let wanted = config.cpu_model;
    match open_kvm(config.slow_kvm) {
        Ok(kvm) => match missing(wanted, &limited(wanted, &kvm)) {
            None => {
                let (engine, why) = chosen_kvm(kvm.offer().mips);
                Ok((engine, why, Some(kvm)))
            }
            Some(lacks) => Ok((Engine::Jit, format!("this host's processor lacks {lacks}"), None)),
        },
        Err(error) if wanted == machine::CpuModel::Host => Err(error.into()),
        Err(error) => {
            let (engine, why) = chosen_instead(&error);
            Ok((engine, why, None))
        }
    }
}

/// What `auto` stands for where KVM runs guests, and why.
pub(crate) fn chosen_kvm(mips: f64) -> (Engine, String) {
    (Engine::Kvm, format!("it runs {mips:.0} million guest instructions a second here"))
}

/// What `auto` stands for where it does not.
pub(crate) fn chosen_instead(error: &KvmError) -> (Engine, String) {
    (Engine::Jit, error.brief())
}

/// What KVM offers, and what of the most capable CPU model it lacks.
pub(crate) fn look_at_kvm() -> Result<(Offer, Vec<String>), KvmError> {
    let kvm = open_kvm(true)?;
    Ok((kvm.offer().clone(), limited(machine::CpuModel::Max, &kvm).lacks()))
}

/// What is left of a CPU model on the host's processor.
fn limited(model: machine::CpuModel, kvm: &Kvm) -> CpuModel {
    CpuModel::new(model.level(), 1, 0).limited_to(kvm.cpuid())
}

/// What a processor lacks of a model that says what it has.
fn missing(model: machine::CpuModel, limited: &CpuModel) -> Option<String> {
    let whole = matches!(model, machine::CpuModel::V2 | machine::CpuModel::V3);
    let lacks = if whole { limited.lacks() } else { Vec::new() };
    (!lacks.is_empty()).then(|| lacks.join(", "))
}

impl Engines {
    /// Decides, by the configuration and what the host has.
    pub fn new(config: &MachineConfig) -> Result<Engines, RuntimeError> {
        let (current, why, mut kvm) = choose(config)?;
        let other = config.switch_to.and_then(Engine::of).unwrap_or(match current {
            Engine::Interp | Engine::Kvm => Engine::Jit,
            Engine::Jit => Engine::Kvm,
        });
        if config.cpus > 1 {
            one_cpu_only(config)?;
        }
        if config.switches && other == Engine::Kvm && kvm.is_none() {
            kvm = Some(open_kvm(config.slow_kvm)?);
        }
        let mut model = CpuModel::new(config.cpu_model.level(), u32::from(config.cpus), 0);
        let mut tsc_hz = TSC_HZ;
        let mut host = None;
        if let Some(kvm) = &kvm {
            tsc_hz = kvm.tsc_hz(TSC_HZ);
            model = limited(config.cpu_model, kvm).with_tsc(tsc_hz);
            if let Some(lacks) = missing(config.cpu_model, &model) {
                return Err(RuntimeError::Processor(lacks));
            }
            if config.cpu_model == machine::CpuModel::Host {
                host = Some(kvm.cpuid().to_vec());
            }
        }
        if config.cpu_model == machine::CpuModel::Host && (current != Engine::Kvm || config.switches) {
            return Err(RuntimeError::HostProcessor);
        }
        Ok(Engines { current, other, why, kvm, model, host, tsc_hz })
    }

    /// Gives a machine's memory to the engine that runs it.
    pub fn open(&self, config: &MachineConfig, ram: Arc<GuestMemoryMmap>) -> Result<Box<dyn Vm>, RuntimeError> {
        let compiler = match self.current {
            Engine::Kvm => {
                let (model, host) = (self.model.clone(), self.host.clone());
                let cpuid = Box::new(move |index, count| {
                    let model = model.numbered(count, index);
                    host.as_ref().map_or_else(|| model.table(), |host| model.of_host(host))
                });
                let options = VmOptions { ram, cpuid, tsc_hz: self.tsc_hz };
                return Ok(match &self.kvm {
                    Some(kvm) => kvm.create_vm(options)?,
                    None => Kvm::open()?.create_vm(options)?,
                });
            }
            Engine::Interp => None,
            Engine::Jit => Some(CompilerOptions {
                code_bytes: config.code_cache_bytes as usize,
                perf_map: config.perf_map,
                counted: config.counted,
            }),
        };
        Ok(Box::new(Translator {
            rams: CpuRam::of_vcpus(ram, config.cpus.into()).into_iter().map(Some).collect(),
            peers: Arc::new(Peers::new(config.cpus.into())),
            model: self.model.clone(),
            compiler,
            lockstep: config.lockstep,
            trace: config.trace.clone(),
        }))
    }

    /// Has the other engine take over, from the next [`Self::open`] on.
    pub fn switch(&mut self) {
        std::mem::swap(&mut self.current, &mut self.other);
    }

    /// One line that says which engine runs the guest, and why.
    pub fn line(&self) -> String {
        let (name, why) = (self.current.name(), &self.why);
        format!("backend: {name} ({why}), x86_64 guest on {} host", std::env::consts::ARCH)
    }
}

struct CompilerOptions {
    code_bytes: usize,
    perf_map: bool,
    counted: bool,
}

/// The interpreter, with the compiler or without.
struct Translator {
    /// The guest's memory, for each vCPU that there is not yet.
    rams: Vec<Option<CpuRam>>,
    peers: Arc<Peers>,
    model: CpuModel,
    compiler: Option<CompilerOptions>,
    lockstep: bool,
    trace: Option<Trace>,
}

impl Vm for Translator {
    fn name(&self) -> &'static str {
        if self.compiler.is_some() { Engine::Jit.name() } else { Engine::Interp.name() }
    }

    fn create_vcpu(&mut self, setup: VcpuSetup) -> Result<Box<dyn Vcpu>, EngineError> {
        let model = self.model.numbered(setup.count, setup.index);
        let index = setup.index as usize;
        let Some(ram) = self.rams.get_mut(index).and_then(Option::take) else {
            return Err(EngineError(format!("there is no vCPU {index}")));
        };
        let mut cpu = Cpu::new(Arc::new(ram), setup.platform, model);
        if setup.count > 1 {
            self.peers.join(index, setup.kick.clone());
            cpu.peers = Some(self.peers.clone());
            cpu.index = index;
        }
        cpu.kick = setup.kick;
        cpu.set_state(setup.state);
        let jit = match &self.compiler {
            None => None,
            Some(options) => {
                let bytes = (options.code_bytes / setup.count as usize).max(MIN_CODE_BYTES);
                let mut jit = Jit::new(bytes, 1).map_err(|e| EngineError(e.to_string()))?;
                jit.options = Options { counted: options.counted, shared: setup.count > 1, ..Options::default() };
                if options.perf_map {
                    let error = |e| EngineError(format!("cannot write the map for perf: {e}; run without --perf-map"));
                    jit.write_perf_map().map_err(error)?;
                }
                Some(jit)
            }
        };
        let mut vcpu = vcpu::Vcpu::new(cpu, jit);
        if self.lockstep {
            vcpu.enable_lockstep();
        }
        Ok(Box::new(Translated { vcpu, trace: self.trace.clone() }))
    }
}

struct Translated {
    vcpu: vcpu::Vcpu,
    trace: Option<Trace>,
}

impl Vcpu for Translated {
    fn run(&mut self) -> Exit {
        if self.vcpu.deliver_due().is_err() {
            return Exit::Shutdown(describe(&self.vcpu.cpu));
        }
        let exit = match &mut self.trace {
            Some(trace) => self.vcpu.run_traced(trace),
            None => self.vcpu.run(),
        };
        match exit {
            vcpu::Exit::Halt => Exit::Halt,
            vcpu::Exit::Shutdown => Exit::Shutdown(describe(&self.vcpu.cpu)),
            vcpu::Exit::Stopped => match self.vcpu.difference.take() {
                None => Exit::Stopped,
                Some(why) if self.trace.is_some() => Exit::Failed(why),
                Some(difference) => Exit::Failed(format!("interpreter and compiler differ: {difference}")),
            },
        }
    }

    fn state(&mut self) -> Result<CpuState, EngineError> {
        Ok(self.vcpu.state())
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.vcpu.cpu.set_state(state.clone());
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let v = &self.vcpu;
        let (run, cpu, mmu) = (&v.counts, &v.cpu.counts, &v.cpu.mmu.counts);
        let mut all = vec![
            ("interpreted", run.interpreted),
            ("compiled", v.cpu.jit.count),
            ("stepped", run.stepped),
            ("blocks_run", run.blocks_run),
            ("blocks_decoded", v.blocks.decoded),
            ("blocks_invalidated", v.blocks.invalidated),
            ("block_cache_flushes", v.blocks.flushes),
            ("entries", run.entries),
            // Behind a miss ONWARD means what NEXT does.
            ("exits_next", run.exits[reason::NEXT as usize] + run.exits[reason::ONWARD as usize]),
            ("side_exits", run.exits[reason::INTERPRET as usize]),
            ("exits_fault", run.exits[reason::FAULT as usize]),
            ("exits_stop", run.exits[reason::STOP as usize]),
            ("exits_look", run.exits[reason::LOOK as usize]),
            ("helper_calls", v.cpu.jit.helper_calls),
            ("slow_paths", v.cpu.jit.slow_paths),
            ("jump_misses", run.jump_misses),
            ("ways", cpu.ways),
            ("bridged", run.bridged),
            ("tlb_misses", mmu.tlb_misses),
            ("code_tlb_misses", mmu.code_tlb_misses),
            ("tlb_flushes", mmu.flushes),
            ("page_flushes", mmu.page_flushes),
            ("smc_stores", mmu.smc_stores),
            ("interrupts", cpu.interrupts),
            ("page_faults", cpu.exceptions[14]),
            ("other_exceptions", cpu.exceptions.iter().sum::<u64>() - cpu.exceptions[14]),
            ("undefined", cpu.undefined),
            ("unknown_msr", cpu.unknown_msr),
        ];
        if let Some(jit) = &v.jit {
            all.extend([
                ("quick_blocks", jit.counts.quick_blocks),
                ("quick_bytes", jit.counts.quick_bytes),
                ("quick_nanos", jit.counts.quick_nanos),
                ("regions", jit.counts.regions),
                ("region_blocks", jit.counts.region_blocks),
                ("region_guest_bytes", jit.counts.guest_bytes),
                ("region_code_bytes", jit.counts.code_bytes),
                ("compile_nanos", jit.counts.compile_nanos),
                ("regions_dropped", jit.counts.dropped),
                ("regions_evicted", jit.counts.evicted),
                ("regions_invalidated", jit.counts.invalidated),
                ("regions_failed", jit.counts.failed),
                ("accesses_straying", jit.counts.strays),
            ]);
        }
        all
    }
}

/// Where a CPU that shut down was.
fn describe(cpu: &Cpu) -> String {
    let (vector, error) = (cpu.raised.vector, cpu.raised.error.unwrap_or(0));
    format!("last exception {vector} (error code {error:#x}) {}", cpu.s.place())
}

#[cfg(test)]
mod tests {
    use diglot_devices::chipset::{Chipset, ChipsetConfig};
    use diglot_translator::state::{Segment, cr, seg};
    use iced_x86::code_asm::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::machine::{Boot, CpuModel as Model, RebootPolicy};
    use crate::memory::GuestRam;
    use crate::platform::{Shared, VcpuPlatform};

    const CODE: u64 = 0x10_0000;
    const TURNS: u32 = 5;
    const ROUNDS: u32 = 3000;

    fn config(backend: Backend, lockstep: bool) -> MachineConfig {
        MachineConfig {
            memory_bytes: 4 << 20,
            cpus: 1,
            cpu_model: Model::Max,
            backend,
            slow_kvm: true,
            switches: false,
            switch_to: None,
            boot: Boot::Embedded,
            reboot: RebootPolicy::Exit,
            code_cache_bytes: 1 << 20,
            lockstep,
            debug_exit: None,
            test_device: false,
            trace: None,
            perf_map: false,
            counted: false,
        }
    }

    /// A sum in a loop, then HLT with interrupts off; over and over.
    fn program() -> Vec<u8> {
        let mut a = CodeAssembler::new(32).expect("an assembler");
        let (mut turn, mut round) = (a.create_label(), a.create_label());
        let mut emit = || {
            a.set_label(&mut turn)?;
            a.mov(ecx, ROUNDS)?;
            a.set_label(&mut round)?;
            a.imul_3(eax, eax, 7)?;
            a.add(eax, ecx)?;
            a.dec(ecx)?;
            a.jne(round)?;
            a.hlt()?;
            a.jmp(turn)
        };
        emit().expect("instructions that exist");
        a.assemble(CODE).expect("code that can be encoded")
    }

    /// A vCPU of an engine, with a chipset of its own.
    fn vcpu(engines: &Engines, config: &MachineConfig, ram: &GuestRam, state: CpuState) -> Box<dyn Vcpu> {
        let chipset = ChipsetConfig {
            cpus: 1,
            memory_bytes: ram.size(),
            low_memory_bytes: ram.size(),
            rtc_epoch_seconds: 0,
            tsc_hz: engines.tsc_hz,
            debug_exit: None,
            test_device: false,
        };
        let chipset = Chipset::new(&chipset, Box::new(std::io::sink()));
        let shared = Arc::new(Shared::new(chipset, 1, engines.tsc_hz));
        let kick = shared.kick(0).clone();
        let platform = Box::new(VcpuPlatform { shared, cpu: 0 });
        let mut vm = engines.open(config, ram.mmap().clone()).expect("an engine");
        vm.create_vcpu(VcpuSetup { state, platform, kick, index: 0, count: 1 }).expect("a vCPU")
    }

    /// A guest that changes engines over and over ends in the state of one that stays.
    #[test]
    fn a_state_from_one_engine_goes_on_in_another() {
        let flat = |attr| Segment { base: 0, limit: u32::MAX, attr, selector: 8 };
        let mut start = CpuState::reset();
        start.cr0 |= cr::CR0_PE;
        start.seg = [flat(0xc093); 6];
        start.seg[usize::from(seg::CS)] = flat(0xc09b);
        start.rip = CODE;
        let ram = GuestRam::new(4 << 20).expect("memory");
        ram.mmap().write_slice(&program(), GuestAddress(CODE)).expect("inside");
        let (interp, jit) = (config(Backend::Interp, false), config(Backend::Jit, false));
        let lockstep = config(Backend::Jit, true);

        let run = |configs: &[&MachineConfig]| {
            let mut state = start.clone();
            for turn in 0..TURNS as usize {
                state.halted = false;
                let config = configs[turn % configs.len()];
                let engines = Engines::new(config).expect("an engine");
                let mut vcpu = vcpu(&engines, config, &ram, CpuState::reset());
                vcpu.set_state(&state).expect("a state");
                assert_eq!(vcpu.state().expect("a state"), state, "a state comes out as it went in");
                assert_eq!(vcpu.run(), Exit::Halt);
                state = vcpu.state().expect("a state");
            }
            state
        };
        let expected = (0..TURNS).fold(start.gpr[0] as u32, |sum, _| {
            (1..=ROUNDS).rev().fold(sum, |sum, n| sum.wrapping_mul(7).wrapping_add(n))
        });
        let stays = run(&[&interp]);
        assert_eq!((stays.gpr[0], stays.halted), (u64::from(expected), true));
        assert_eq!(run(&[&jit]), stays);
        assert_eq!(run(&[&interp, &jit, &lockstep]), stays);
    }
}
