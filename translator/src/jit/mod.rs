//! The compiler: hot blocks grown into regions and compiled by Cranelift on background threads.
//!
//! The vCPU thread plans a region from its predecoded blocks, queues it and goes on interpreting; a worker compiles;
//! the vCPU thread picks the code up between two blocks, copies it into the arena and publishes it. What the threads
//! share is in `handover.rs`, what becomes of the code in `cache.rs`.

pub(crate) mod access;
pub mod bridge;
pub mod cache;
pub mod compile;
pub mod emit;
pub mod frame;
pub mod groups;
mod guard;
mod handover;
pub mod helpers;
pub mod host;
mod leave;
mod liveness;
pub mod ordering;
pub mod pages;
pub mod region;
mod scattered;
pub mod strays;
pub mod usage;
pub(crate) mod values;
pub mod vector;
pub mod x87;

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use crate::addr::PAGE_MASK;
use crate::block::Block;
use crate::code::{ArenaError, CodeArena, PerfMap, Slot, add_link_cells, elide_frame};
use crate::cpu::Cpu;
use crate::insn::{Insn, Mode};
use crate::mem::granule_mask;
use crate::quick::asm::ENTERED;
use crate::quick::{Entered, Library, Quick};
use bridge::Bridge;
use cache::{Cache, Change, Extent, Key, Link, Placed, RegionId, Runs, Unit};
use compile::{Branch, Compiled, Compiler, Referent};
use frame::THUNKS;
use handover::Handover;
use region::{Options, Plan};
use strays::Strays;

/// The compiler has no form of an instruction; the interpreter's evaluation is called instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unsupported;

/// Runs of a block before its region is compiled.
pub const THRESHOLD: u32 = 400;
/// Name of the compile threads, whose panics are survived.
pub const WORKER: &str = "compile";
/// How nice the compile threads are: each has about a third of what a vCPU's thread has of a processor they share.
const NICE: i32 = 5;
/// Regions and blocks with quick code beyond which quick code takes the place of the oldest: what is known of each takes
/// about 400 bytes besides its code.
const UNITS: usize = 192 * 1024;
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
    pub strays: u64,
    pub failed: u64,
    pub quick_blocks: u64,
    pub quick_bytes: u64,
    pub quick_nanos: u64,
}

/// A region's number and its plan; then what came of it, too.
type Job = (RegionId, Plan);
type Done = (RegionId, Plan, Result<Compiled, String>);

/// A piece of code made once at the start.
struct Stub {
    slot: Slot,
    code: u64,
}

impl Stub {
    /// Where it begins in the arena.
    fn start(&self) -> usize {
        self.slot.offset()
    }
}

/// What a unit of code is of ([`Unit`]).
struct Place {
    extents: Vec<Extent>,
    entries: Vec<Key>,
    blocks: Vec<Key>,
    second_page: Option<u64>,
    quick: bool,
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
    way: Stub,
    thunks: Vec<Stub>,
    /// What code does besides.
    pub options: Options,
    /// Makes quick code.
    quick: Quick,
    /// What that shares, and where in the arena.
    library: Library,
    shared: Stub,
    /// Accesses that are not where they were last.
    pub strays: Strays,
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
            Ok(Stub { code: arena.exec_ptr(slot.offset()) as u64, slot })
        };
        let quick = Quick::new(arena.isa());
        let enter = install(Ok(quick.trampoline()))?;
        let stub = install(compiler.stub())?;
        let mut code = compiler.lookup().map_err(JitError::Host)?;
        // Where regions enter it.
        let entry = elide_frame(&mut code, &[], &[]).map_or(0, |e| e.entry);
        let lookup = install(Ok(code))?;
        let way = install(compiler.way())?;
        let library = Library::new();
        let shared = install(Ok(library.code.clone()))?;
        for site in &library.lookups {
            arena.patch_branch(shared.start() + site, lookup.start() + ENTERED);
        }
        let mut thunk = |n| quick.thunk(n).map_or_else(|| compiler.thunk(n), Ok);
        let thunks = (0..THUNKS).map(|n| install(thunk(n))).collect::<Result<_, _>>()?;
        Ok(Jit {
            cache: Cache::new(arena, lookup.start() + entry),
            workers: Workers::start(workers)?,
            enter,
            stub,
            _lookup: lookup,
            way,
            thunks,
            options: Options::default(),
            quick,
            library,
            shared,
            strays: Strays::default(),
            perf: None,
            counts: JitCounts::default(),
        })
    }

    /// Code that returns to the dispatch loop at once: where jump-cache entries without a region lead.
    pub fn stub(&self) -> u64 {
        self.stub.code
    }

    /// Code that goes on at RIP when the jump cache does not know the way there.
    pub fn way(&self) -> u64 {
        self.way.code
    }

    /// Addresses of the code through which regions call helpers.
    pub fn thunks(&self) -> [u64; THUNKS] {
        std::array::from_fn(|n| self.thunks[n].code)
    }

    /// Gives a block quick code; [`Self::changes`] says what that changed. No vCPU may be in compiled code.
    pub fn quicken(&mut self, block: &Block, cpu: &Cpu) {
        if block.next_page.is_some() {
            return;
        }
        while self.cache.len() >= UNITS && self.cache.evict() {
            self.counts.evicted += 1;
        }
        let start = Instant::now();
        let insns = block.insns(cpu);
        // Another vCPU may be about to say that it has overwritten them.
        if insns.is_empty() {
            return;
        }
        let made = self.quick.compile(&insns, block.mode, block.gpa & PAGE_MASK, self.options, Entered::Often);
        let extents = block.extent().collect();
        let key = (block.gpa, block.mode.0);
        let id = self.cache.number();
        let bytes = made.code.len() as u64;
        let place = Place { extents, entries: vec![key], blocks: Vec::new(), second_page: None, quick: true };
        if self.put(id, place, made).is_some() {
            self.counts.quick_blocks += 1;
            self.counts.quick_bytes += bytes;
            self.counts.quick_nanos += start.elapsed().as_nanos() as u64;
        }
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
    pub fn request(&mut self, mut plan: Plan) -> bool {
        plan.strays = self.strays.of(&plan);
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

    /// Notes that the access of the instruction at a key has strayed. If that comes time and again, the regions that have it
    /// go, to be compiled with another look for it; [`Self::changes`] says so. No vCPU may be in compiled code.
    pub fn stray(&mut self, key: Key) {
        for off in self.strays.note(key, Instant::now()) {
            self.counts.strays += 1;
            self.cache.renew(key.0 & !PAGE_MASK, granule_mask(off.into(), 1));
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
        self.strays.clear();
        self.counts = JitCounts::default();
    }

    /// Puts a region into the cache.
    fn place(&mut self, id: RegionId, plan: &Plan, compiled: Compiled) -> Option<()> {
        let page = plan.gpa & !PAGE_MASK;
        let place = Place {
            extents: plan.extents.clone(),
            entries: plan.entries().map(|off| (page | off, plan.mode.0)).collect(),
            blocks: plan.keys().collect(),
            second_page: plan.second_page(),
            quick: false,
        };
        let nanos = compiled.nanos;
        let (code, bytes) = self.put(id, place, compiled)?;
        if let Some(perf) = &self.perf
            && let Err(e) = perf.record(code as *const u8, bytes, &plan.name())
        {
            tracing::warn!("the map for perf ends here, at the region of {:#x}: {e}", plan.gpa);
            self.perf = None;
        }
        self.count(plan, bytes, nanos);
        Some(())
    }

    /// Completes code and puts it into the cache: where it is then, and how long.
    fn put(&mut self, id: RegionId, place: Place, compiled: Compiled) -> Option<(u64, usize)> {
        let Compiled { tail, inner, branches, insns, bridges, quick_bridges, addresses, crossings, calls, .. } =
            compiled;
        let mut code = compiled.code;
        let insns = insns.into_boxed_slice();
        // Where they are in the code, that has all there is of them.
        let bridges = Bridge::row(id, if crossings.is_empty() { bridges } else { 0 });
        for (at, referent) in addresses {
            let address = match referent {
                Referent::Insn(n) => std::ptr::from_ref(insns.get(n)?) as u64,
                Referent::Bridge(n) => std::ptr::from_ref(bridges.get(n)?) as u64,
                Referent::Name(n) => Bridge::name(id, n),
            };
            code.get_mut(at..at + 8)?.copy_from_slice(&address.to_le_bytes());
        }
        let isa = self.cache.arena().isa();
        // Those of quick code are patchable already.
        let sites: Vec<usize> = branches.iter().filter(|b| !b.quick).map(|b| b.site).collect();
        let mut cells = add_link_cells(isa, &mut code, &sites)?.into_iter();
        let Place { extents, entries, blocks, second_page, quick } = place;
        let &(first, mode) = entries.first()?;
        let mut enter = |key: Key| match quick {
            false => Quick::append_way_into(&mut code, key.0 & PAGE_MASK, tail),
            true => inner,
        };
        let entries = entries.into_iter().map(|key| (key, enter(key))).collect();
        let bytes = code.len();
        let link = |Branch { site, to, otherwise, quick }| {
            let site = if quick { Some(site) } else { cells.next() };
            let to = to.map(|off| (first & !PAGE_MASK | off, mode));
            Some(Link { site: site?, to, otherwise, quick })
        };
        let branches = branches.into_iter().map(link).collect::<Option<_>>()?;
        let calls = calls.into_iter().map(|(at, r)| (at, self.shared.start() + self.library.offset(r))).collect();
        let unit = Unit {
            code,
            tail,
            branches,
            calls,
            extents,
            entries,
            blocks,
            second_page,
            quick,
            bridges,
            quick_bridges,
            crossings,
            kept: insns,
        };
        let Placed { code, evicted } = self.cache.place(id, unit)?;
        self.counts.evicted += evicted;
        Some((code, bytes))
    }

    fn count(&mut self, plan: &Plan, bytes: usize, nanos: u64) {
        self.counts.regions += 1;
        self.counts.region_blocks += plan.blocks.len() as u64;
        self.counts.guest_bytes += plan.guest_bytes();
        self.counts.code_bytes += bytes as u64;
        self.counts.compile_nanos += nanos;
    }

    /// How what may be entered at a key runs; `second_page` as the block there has it.
    pub fn find(&self, key: Key, second_page: Option<u64>) -> Runs {
        self.cache.find(key, second_page)
    }

    /// Leads a bridge that asks to the region at a key, for branches with the jump-cache key `branch`; false, and it asks
    /// again, without a region there. The key comes with the second page, as the block there has it.
    pub fn lead(&mut self, bridge: u64, branch: u64, to: Option<(Key, Option<u64>)>) -> bool {
        self.cache.lead(bridge, branch, to)
    }

    /// Has no bridge lead anywhere: their keys come anew.
    pub fn part_bridges(&mut self) {
        self.cache.part_bridges();
    }

    /// How often compiled code in the page of `gpa` was overwritten.
    pub fn rewrites(&self, gpa: u64) -> u32 {
        self.cache.rewrites(gpa)
    }

    /// Drops the regions, compiled or queued, that touch `granules` of a page. No vCPU may be in compiled code.
    pub fn invalidate(&mut self, page: u64, granules: u64) {
        self.counts.invalidated += self.cache.invalidate(page, granules);
    }

    /// The granules of a page that regions lie in.
    pub fn granules(&self, page: u64) -> u64 {
        self.cache.granules(page)
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
    // Guest code, which goes on without, comes first where there are more threads than processors.
    // SAFETY: it only changes how this thread is scheduled.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
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
