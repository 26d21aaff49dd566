//! Engines: which one runs the guest, and the translator behind the trait that all of them share.
//!
//! The machine drives guests through [`Vm`] and [`Vcpu`] only; this is the one file that knows what stands behind them.

use std::sync::Arc;

use diglot_translator::cpu::Cpu;
use diglot_translator::cpuid::{CpuModel, Level};
use diglot_translator::engine::{CpuState, EngineError, Exit, Vcpu, VcpuSetup, Vm};
use diglot_translator::jit::Jit;
use diglot_translator::jit::frame::reason;
use diglot_translator::mem::GuestRam as CpuRam;
use diglot_translator::state::gpr;
use diglot_translator::trace::Trace;
use diglot_translator::vcpu;
use vm_memory::GuestMemoryMmap;

use crate::machine::{Backend, MachineConfig, RuntimeError};

/// Gives a machine's memory to the engine that its configuration asks for.
pub(crate) fn open(config: &MachineConfig, ram: Arc<GuestMemoryMmap>) -> Result<Box<dyn Vm>, RuntimeError> {
    let compiler = match config.backend {
        Backend::Kvm => return Ok(diglot_kvm_backend::open(ram)?),
        Backend::Interp => None,
        // A trace is of instructions one by one, which only the interpreter runs.
        Backend::Auto if config.trace.is_some() => None,
        Backend::Auto | Backend::Jit => Some(CompilerOptions {
            code_bytes: config.code_cache_bytes as usize,
            perf_map: config.perf_map,
            counted: config.counted,
        }),
    };
    Ok(Box::new(Translator {
        ram,
        level: config.cpu_model.into(),
        compiler,
        lockstep: config.lockstep,
        trace: config.trace.clone(),
    }))
}

/// One line that says which engine runs the guest, and why.
pub(crate) fn choice(config: &MachineConfig, vm: &dyn Vm) -> String {
    let why = match (config.backend, diglot_kvm_backend::probe()) {
        (Backend::Auto, _) if config.trace.is_some() => "for --trace",
        (Backend::Auto, Err(diglot_kvm_backend::KvmError::NotBuilt)) => "KVM is not built yet",
        _ => "as asked",
    };
    format!("backend: {} ({why}), x86_64 guest on {} host", vm.name(), std::env::consts::ARCH)
}

struct CompilerOptions {
    code_bytes: usize,
    perf_map: bool,
    counted: bool,
}

/// The interpreter, with the compiler or without.
struct Translator {
    ram: Arc<GuestMemoryMmap>,
    level: Level,
    compiler: Option<CompilerOptions>,
    lockstep: bool,
    trace: Option<Trace>,
}

impl Vm for Translator {
    fn name(&self) -> &'static str {
        if self.compiler.is_some() { "interpreter and compiler" } else { "interpreter" }
    }

    fn create_vcpu(&mut self, setup: VcpuSetup) -> Result<Box<dyn Vcpu>, EngineError> {
        let model = CpuModel::new(self.level, setup.count, setup.index);
        let mut cpu = Cpu::new(Arc::new(CpuRam::new(self.ram.clone())), setup.platform, model);
        cpu.kick = setup.kick;
        cpu.set_state(setup.state);
        let jit = match &self.compiler {
            None => None,
            Some(options) => {
                let mut jit = Jit::new(options.code_bytes, 1).map_err(|e| EngineError(e.to_string()))?;
                jit.counted = options.counted;
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

    fn state(&self) -> CpuState {
        let mut state = self.vcpu.cpu.s.clone();
        // Equal flags have one form.
        state.set_flags(state.flags());
        state
    }

    fn set_state(&mut self, state: &CpuState) {
        self.vcpu.cpu.set_state(state.clone());
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
            ]);
        }
        all
    }
}

/// Where a CPU that shut down was.
fn describe(cpu: &Cpu) -> String {
    let s = &cpu.s;
    format!(
        "last exception {} (error code {:#x}) at RIP {:#x}, RSP {:#x}, CR0 {:#x}, CR2 {:#x}, CR3 {:#x}, CR4 {:#x}",
        cpu.raised.vector,
        cpu.raised.error.unwrap_or(0),
        s.rip,
        s.gpr[usize::from(gpr::RSP)],
        s.cr0,
        s.cr2,
        s.cr3,
        s.cr4
    )
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

    fn vcpu(config: &MachineConfig, ram: &GuestRam, state: CpuState) -> Box<dyn Vcpu> {
        let chipset = ChipsetConfig {
            cpus: 1,
            memory_bytes: ram.size(),
            low_memory_bytes: ram.size(),
            rtc_epoch_seconds: 0,
            debug_exit: None,
            test_device: false,
        };
        let shared = Arc::new(Shared::new(Chipset::new(&chipset, Box::new(std::io::sink()))));
        let kick = shared.kick.clone();
        let platform = Box::new(VcpuPlatform { shared, cpu: 0 });
        let mut vm = open(config, ram.mmap().clone()).expect("an engine");
        vm.create_vcpu(VcpuSetup { state, platform, kick, index: 0, count: 1 }).expect("a vCPU")
    }

    /// A guest that changes engines at every HLT ends in the state of one that stays.
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

        let run = |engines: &[&MachineConfig]| {
            let mut state = start.clone();
            for turn in 0..TURNS as usize {
                state.halted = false;
                let mut vcpu = vcpu(engines[turn % engines.len()], &ram, CpuState::reset());
                vcpu.set_state(&state);
                assert_eq!(vcpu.state(), state, "a state comes out as it went in");
                assert_eq!(vcpu.run(), Exit::Halt);
                state = vcpu.state();
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

    #[test]
    fn kvm_says_that_it_is_not_built() {
        let ram = GuestRam::new(4 << 20).expect("memory");
        let refusal = open(&config(Backend::Kvm, false), ram.mmap().clone()).err().expect("no engine");
        assert!(matches!(refusal, RuntimeError::Kvm(_)), "{refusal}");
    }
}
