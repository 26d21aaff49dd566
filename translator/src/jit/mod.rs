//! The compiler: hot blocks grown into regions and compiled by Cranelift on background threads.
//!
//! The vCPU thread plans a region from its predecoded blocks, queues it and goes on interpreting; a worker compiles;
//! the vCPU thread picks the code up between two blocks, copies it into the arena and publishes it. What the threads
//! share is in `handover.rs`, what becomes of the code in `cache.rs`.

mod access;
pub mod cache;
pub mod compile;
pub mod emit;
pub mod frame;
pub mod handover;
pub mod helpers;
pub mod host;
mod liveness;
pub mod region;
pub mod usage;
mod values;
pub mod vector;
pub mod x87;

use std::sync::Arc;
use std::thread::JoinHandle;

use crate::addr::PAGE_MASK;
use crate::code::{ArenaError, CodeArena, HostIsa, PerfMap, Slot, add_link_cells, elide_frame};
use crate::cpu::Cpu;
use crate::insn::{Insn, Mode};
use crate::mem::GuestRam;
use cache::{Cache, Change, Key, Placed, RegionId, Unit};
use compile::{Branch, Compiled, Compiler};
use frame::THUNKS;
use handover::Handover;
use region::Plan;

/// The compiler has no form of an instruction; the interpreter's evaluation is called instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unsupported;

/// Runs of a block before its region is compiled.
pub const THRESHOLD: u32 = 400;
/// Name of the compile threads, whose panics are survived.
pub const WORKER: &str = "compile";
/// Regions that may wait for a worker.
const QUEUE: usize = 256;

/// What the compiler did, for statistics.
#[allow(missing_docs)]
#[derive(Clone, Debug, Default)]
pub struct JitCounts {
    pub regions: u64,
    pub region_blocks: u64,
    pub guest_bytes: u64,
    pub code_bytes: u64,
    pub compile_nanos: u64,
    pub dropped: u64,
    pub evicted: u64,
    pub invalidated: u64,
    pub failed: u64,
}

/// A region's number and its plan; then what came of it, too.
type Job = (RegionId, Plan);
type Done = (RegionId, Plan, Result<Compiled, String>);

/// A piece of code made once at the start.
struct Stub {
    _slot: Slot,
    code: u64,
    tail: usize,
}

/// Why there is no compiler.
#[derive(Debug, thiserror::Error)]
pub enum JitError {
    /// No code memory.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// The host's instruction set is not one that Cranelift compiles for, or lacks what compiled code needs.
    #[error("Cranelift cannot compile for this host: {0}; use --backend interp")]
    Host(String),
    /// No worker thread.
    #[error("cannot start a compile thread: {0}; free some host resources or use --backend interp")]
    Thread(std::io::Error),
}

/// The compiler and the code cache.
pub struct Jit {
    /// The regions; of their predecoded instructions the code has the addresses.
    cache: Cache<Box<[Insn]>>,
    workers: Workers,
    enter: Stub,
    stub: Stub,
    _lookup: Stub,
    thunks: Vec<Stub>,
    /// Whether regions count the guest instructions they complete, for statistics and lock-step; it costs a few percent.
    pub counted: bool,
    /// Names regions for Linux perf.
    perf: Option<PerfMap>,
    /// Statistics.
    pub counts: JitCounts,
}

impl Jit {
    /// Starts `workers` compile threads over a code memory of `bytes`.
    pub fn new(bytes: usize, workers: usize) -> Result<Jit, JitError> {
        let arena = CodeArena::new(bytes)?;
        let mut compiler = Compiler::new().map_err(JitError::Host)?;
        let install = |code: Result<Vec<u8>, String>| -> Result<Stub, JitError> {
            let code = code.map_err(JitError::Host)?;
            let mut slot = arena.alloc(code.len()).ok_or_else(|| JitError::Host("code memory is too small".into()))?;
            arena.write(&mut slot, &code)?;
            arena.publish(&slot);
            let tail = slot.offset() + elide_frame(&mut code.clone(), &[]).unwrap_or(0);
            Ok(Stub { code: arena.exec_ptr(slot.offset()) as u64, tail, _slot: slot })
        };
        let enter = install(compiler.trampoline())?;
        let stub = install(compiler.stub())?;
        let lookup = install(compiler.lookup())?;
        let thunks = (0..THUNKS).map(|n| install(compiler.thunk(n))).collect::<Result<_, _>>()?;
        Ok(Jit {
            cache: Cache::new(arena, lookup.tail),
            workers: Workers::start(workers)?,
            enter,
            stub,
            _lookup: lookup,
            thunks,
            counted: false,
            perf: None,
            counts: JitCounts::default(),
        })
    }

    /// Code that returns to the dispatch loop at once: where jump-cache entries without a region lead.
    pub fn stub(&self) -> u64 {
        self.stub.code
    }

    /// Addresses of the code through which regions call helpers.
    pub fn thunks(&self) -> [u64; THUNKS] {
        std::array::from_fn(|n| self.thunks[n].code)
    }

    /// Writes the names of all regions from now on to the file in which Linux perf looks for them.
    pub fn write_perf_map(&mut self) -> std::io::Result<()> {
        self.perf = Some(PerfMap::create()?);
        Ok(())
    }

    /// Whether code of this mode can be compiled.
    pub fn compiles(mode: Mode) -> bool {
        let flat32 = Mode::CODE32 | Mode::STACK32 | Mode::FLAT;
        mode.has(Mode::CODE64) || mode.0 & flat32 == flat32
    }

    /// Queues a region; false if the queue is full.
    pub fn request(&mut self, plan: Plan) -> bool {
        let id = self.cache.expect(plan.extents.clone());
        let queued = self.workers.way.request((id, plan));
        if !queued {
            self.cache.arrive(id);
        }
        queued
    }

    /// Whether compiled regions wait to be installed.
    #[inline(always)]
    pub fn has_done(&self) -> bool {
        self.workers.way.has_done()
    }

    /// Waits until every queued region is compiled: for tests and lock-step runs.
    pub fn drain(&self) {
        self.workers.way.wait_for(self.cache.expected());
    }

    /// Installs what the workers have finished; [`Self::changes`] says what that changed. No vCPU may be in compiled
    /// code.
    pub fn install(&mut self) {
        for (id, plan, result) in self.workers.way.take_done() {
            let wanted = self.cache.arrive(id);
            match result {
                _ if !wanted => {
                    self.counts.dropped += 1;
                    self.cache.changes.extend(plan.keys().map(Change::Cool));
                }
                Err(why) => {
                    tracing::warn!("region at {:#x} not compiled: {why}", plan.gpa);
                    self.counts.failed += 1;
                }
                Ok(compiled) => {
                    if self.place(id, &plan, compiled).is_none() {
                        tracing::warn!("region at {:#x} could not be linked", plan.gpa);
                        self.counts.failed += 1;
                    }
                }
            }
        }
    }

    /// What the vCPU has not been told yet.
    pub fn changes(&mut self) -> std::vec::Drain<'_, Change> {
        self.cache.changes.drain(..)
    }

    /// Drops what is queued or being compiled: to be called when the marks of its code have been cleared, so that
    /// stores to it would not be noticed.
    pub fn cancel_pending(&mut self) {
        self.cache.cancel_expected();
    }

    /// Drops every region, compiled, queued or being compiled, and what is known of the guest: another one begins. No
    /// vCPU may be in compiled code.
    pub fn clear(&mut self) {
        self.cancel_pending();
        self.drain();
        self.install();
        self.cache.clear();
        self.counts = JitCounts::default();
    }

    /// Completes a region's code and puts it into the cache.
    fn place(&mut self, id: RegionId, plan: &Plan, compiled: Compiled) -> Option<()> {
        let Compiled { mut code, branches, insns, addresses, nanos } = compiled;
        let insns = insns.into_boxed_slice();
        for (at, n) in addresses {
            let address = std::ptr::from_ref(insns.get(n)?) as u64;
            code.get_mut(at..at + 8)?.copy_from_slice(&address.to_le_bytes());
        }
        let isa = self.cache.arena().isa();
        let sites: Vec<usize> = branches.iter().map(|b| b.site).collect();
        let tail = match isa {
            HostIsa::X86_64 => elide_frame(&mut code, &sites)?,
            HostIsa::Aarch64 => 0,
        };
        let sites = add_link_cells(isa, &mut code, &sites)?;
        let bytes = code.len();
        let page = plan.gpa & !PAGE_MASK;
        let key = |Branch { to, .. }: Branch| to.map(|off| (page | off, plan.mode.0));
        let unit = Unit {
            code,
            tail,
            branches: sites.into_iter().zip(branches.into_iter().map(key)).collect(),
            extents: plan.extents.clone(),
            entries: plan.entries().map(|off| (page | off, plan.mode.0)).collect(),
            blocks: plan.keys().collect(),
            second_page: plan.second_page(),
            kept: insns,
        };
        let Placed { code, evicted } = self.cache.place(id, unit)?;
        self.counts.evicted += evicted;
        if let Some(perf) = &self.perf
            && let Err(e) = perf.record(code as *const u8, bytes, &plan.name())
        {
            tracing::warn!("the map for perf ends here, at the region of {:#x}: {e}", plan.gpa);
            self.perf = None;
        }
        self.count(plan, bytes, nanos);
        Some(())
    }

    fn count(&mut self, plan: &Plan, bytes: usize, nanos: u64) {
        self.counts.regions += 1;
        self.counts.region_blocks += plan.blocks.len() as u64;
        self.counts.guest_bytes += plan.guest_bytes();
        self.counts.code_bytes += bytes as u64;
        self.counts.compile_nanos += nanos;
    }

    /// The code of the region that may be entered at a key, if there is one; `second_page` as the block there has it.
    pub fn find(&self, key: Key, second_page: Option<u64>) -> Option<u64> {
        self.cache.find(key, second_page)
    }

    /// How often compiled code in the page of `gpa` was overwritten.
    pub fn rewrites(&self, gpa: u64) -> u32 {
        self.cache.rewrites(gpa)
    }

    /// Drops the regions, compiled or queued, that touch `granules` of a page. No vCPU may be in compiled code.
    pub fn invalidate(&mut self, page: u64, granules: u64) {
        self.counts.invalidated += self.cache.invalidate(page, granules);
    }

    /// Marks the granules of every region of `page` (of all pages if `None`) as holding code again.
    pub fn mark(&self, page: Option<u64>, ram: &GuestRam) {
        for (page, granules) in self.cache.extents(page) {
            ram.mark_code(page, granules);
        }
    }

    /// Runs compiled code until it returns to the dispatch loop.
    #[inline]
    pub fn enter(&self, cpu: &mut Cpu, code: u64) {
        // SAFETY: `enter` is the trampoline that this compiler built and published, with this signature; `code` is
        // the entry of a live region or the stub. Both only touch the CPU state behind the pointer, guest RAM through
        // soft-TLB entries, and the helpers.
        let enter: extern "C" fn(*mut Cpu, u64) = unsafe { std::mem::transmute(self.enter.code as usize) };
        enter(cpu, code);
        cpu.unload_units();
    }
}

/// The compile threads; they end with it.
struct Workers {
    way: Arc<Handover<Job, Done>>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Starts `count` threads, one at least.
    fn start(count: usize) -> Result<Workers, JitError> {
        let mut workers = Workers { way: Arc::new(Handover::new(QUEUE)), threads: Vec::new() };
        for _ in 0..count.max(1) {
            let way = workers.way.clone();
            let thread = std::thread::Builder::new().name(WORKER.into()).spawn(move || work(&way));
            workers.threads.push(thread.map_err(JitError::Thread)?);
        }
        Ok(workers)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.way.close();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// A compile thread.
fn work(way: &Handover<Job, Done>) {
    let Ok(mut compiler) = Compiler::new() else { return };
    way.serve(|(id, plan)| {
        // Should Cranelift meet something it does not expect, the region stays interpreted and the thread goes on.
        let attempt = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| compiler.compile(&plan)));
        let result = attempt.unwrap_or_else(|_| {
            if let Ok(fresh) = Compiler::new() {
                compiler = fresh;
            }
            Err("the compiler panicked".into())
        });
        (id, plan, result)
    });
}
