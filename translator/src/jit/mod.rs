//! The compiler: hot blocks grown into regions and compiled by Cranelift on background threads.
//!
//! The vCPU thread plans a region from its predecoded blocks, queues it and goes on interpreting; a worker compiles;
//! the vCPU thread picks the code up between two blocks, copies it into the arena and publishes it.

mod access;
pub mod compile;
pub mod emit;
pub mod frame;
pub mod helpers;
pub mod host;
mod liveness;
pub mod region;
pub mod usage;
mod values;
pub mod vector;

use std::collections::VecDeque;
use std::hash::BuildHasherDefault;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use dashmap::DashMap;
use parking_lot::{Condvar, Mutex};

use crate::addr::PAGE_MASK;
use crate::block::{AddressHasher, AddressMap};
use crate::code::{ArenaError, CodeArena, HostIsa, PerfMap, Slot, add_link_cells, elide_frame};
use crate::cpu::Cpu;
use crate::insn::{Insn, Mode};
use crate::mem::GuestRam;
use compile::{Branch, Compiled, Compiler};
use frame::HELPERS;
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

/// Where guest code is: physical address and mode.
pub type Key = (u64, u8);

type RegionId = u64;

/// A compiled region in the arena.
struct Region {
    slot: Slot,
    /// Pages that its bytes lie in, and which granules of each.
    extents: Vec<(u64, u64)>,
    /// Where it may be entered, as far as no later region has taken its place there.
    entries: Vec<Key>,
    /// Its blocks.
    blocks: Vec<Key>,
    /// Its direct branches to other regions: what they lead to, and their sites in the arena.
    branches: Vec<(Key, usize)>,
    /// Instructions that helpers evaluate: the code has their addresses.
    _insns: Box<[Insn]>,
}

/// The way into a region.
#[derive(Clone, Copy)]
struct Entry {
    region: RegionId,
    /// Address of its code in the executable view, for calls and computed jumps.
    code: u64,
    /// Offset in the arena that direct branches of other regions lead to.
    tail: usize,
    /// The page into which the region's one instruction crosses. Only the jump cache, which knows that the page is
    /// mapped behind the first one, leads there.
    second_page: Option<u64>,
}

/// What the vCPU has to bring up to date after regions came or went.
#[derive(Debug)]
pub enum Change {
    /// The block at the key has this code now; 0 for none.
    Code(Key, u64),
    /// The block at the key may become hot again.
    Cool(Key),
    /// No code is at these addresses any more.
    Freed(Range<u64>),
    /// These granules of the page hold translated code.
    Mark(u64, u64),
}

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

/// Work and results shared with the workers.
struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
    done: Mutex<Vec<Done>>,
    any_done: AtomicBool,
}

/// A job's number, its plan, and what came of it.
type Done = (u64, Plan, Result<Compiled, String>);

#[derive(Default)]
struct Queue {
    jobs: VecDeque<(u64, Plan)>,
    finished: bool,
}

/// A queued region: dropped on arrival when its bytes changed meanwhile.
struct Pending {
    extents: Vec<(u64, u64)>,
    cancelled: bool,
}

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
    arena: CodeArena,
    entries: DashMap<Key, Entry, BuildHasherDefault<AddressHasher>>,
    regions: AddressMap<RegionId, Region>,
    by_page: AddressMap<u64, Vec<RegionId>>,
    /// Sites of direct branches to a key, whether it has code now or not.
    incoming: AddressMap<Key, Vec<usize>>,
    /// Regions by age, for eviction.
    order: VecDeque<RegionId>,
    pending: AddressMap<RegionId, Pending>,
    /// How often compiled code of a page was overwritten, or would have been before it was ready.
    rewrites: AddressMap<u64, u32>,
    next_id: RegionId,
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    enter: Stub,
    stub: Stub,
    lookup: Stub,
    thunks: Vec<Stub>,
    /// What the vCPU has not been told yet.
    pub changes: Vec<Change>,
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
        let thunks = (0..HELPERS).map(|n| install(compiler.thunk(n))).collect::<Result<_, _>>()?;
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            work: Condvar::new(),
            done: Mutex::default(),
            any_done: AtomicBool::new(false),
        });
        let mut jit = Jit {
            arena,
            entries: DashMap::default(),
            regions: AddressMap::default(),
            by_page: AddressMap::default(),
            incoming: AddressMap::default(),
            order: VecDeque::new(),
            pending: AddressMap::default(),
            rewrites: AddressMap::default(),
            next_id: 0,
            shared,
            workers: Vec::new(),
            enter,
            stub,
            lookup,
            thunks,
            changes: Vec::new(),
            counted: false,
            perf: None,
            counts: JitCounts::default(),
        };
        for _ in 0..workers.max(1) {
            let shared = jit.shared.clone();
            let worker = std::thread::Builder::new().name(WORKER.into()).spawn(move || work(&shared));
            jit.workers.push(worker.map_err(JitError::Thread)?);
        }
        Ok(jit)
    }

    /// Code that returns to the dispatch loop at once: where jump-cache entries without a region lead.
    pub fn stub(&self) -> u64 {
        self.stub.code
    }

    /// Addresses of the code through which regions call helpers.
    pub fn thunks(&self) -> [u64; HELPERS] {
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
        let mut queue = self.shared.queue.lock();
        if queue.jobs.len() >= QUEUE {
            return false;
        }
        let id = self.next_id;
        self.next_id += 1;
        let pending = Pending { extents: plan.extents.clone(), cancelled: false };
        self.pending.insert(id, pending);
        queue.jobs.push_back((id, plan));
        self.shared.work.notify_one();
        true
    }

    /// Whether compiled regions wait to be installed.
    #[inline(always)]
    pub fn has_done(&self) -> bool {
        self.shared.any_done.load(Ordering::Relaxed)
    }

    /// Waits until every queued region is compiled: for tests and lock-step runs.
    pub fn drain(&self) {
        while self.pending.len() > self.shared.done.lock().len() {
            std::thread::sleep(std::time::Duration::from_micros(50));
        }
    }

    /// Installs what the workers have finished; [`Self::changes`] says what that changed. No vCPU may be in compiled
    /// code.
    pub fn install(&mut self) {
        self.shared.any_done.store(false, Ordering::Relaxed);
        let done = std::mem::take(&mut *self.shared.done.lock());
        for (id, plan, result) in done {
            let cancelled = self.pending.remove(&id).is_none_or(|p| p.cancelled);
            match result {
                _ if cancelled => {
                    self.counts.dropped += 1;
                    self.changes.extend(plan.keys().map(Change::Cool));
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

    /// Drops what is queued or being compiled: to be called when the marks of its code have been cleared, so that
    /// stores to it would not be noticed.
    pub fn cancel_pending(&mut self) {
        self.pending.values_mut().for_each(|p| p.cancelled = true);
        self.rewrites.clear();
    }

    /// Puts a region into the arena and links it with the others.
    fn place(&mut self, id: RegionId, plan: &Plan, compiled: Compiled) -> Option<()> {
        let Compiled { mut code, branches, insns, addresses, nanos } = compiled;
        let insns = insns.into_boxed_slice();
        for (at, n) in addresses {
            let address = std::ptr::from_ref(insns.get(n)?) as u64;
            code.get_mut(at..at + 8)?.copy_from_slice(&address.to_le_bytes());
        }
        let sites: Vec<usize> = branches.iter().map(|b| b.site).collect();
        let skip = match self.arena.isa() {
            HostIsa::X86_64 => elide_frame(&mut code, &sites)?,
            HostIsa::Aarch64 => 0,
        };
        let sites = add_link_cells(self.arena.isa(), &mut code, &sites)?;
        let mut slot = loop {
            match self.arena.alloc(code.len()) {
                Some(slot) => break slot,
                None => {
                    // Oldest first; what is still hot is compiled again.
                    let oldest = self.order.front().copied()?;
                    self.remove(oldest);
                    self.counts.evicted += 1;
                }
            }
        };
        self.arena.write(&mut slot, &code).ok()?;
        let start = slot.offset();
        let page = plan.gpa & !PAGE_MASK;
        let mut region = Region {
            slot,
            extents: plan.extents.clone(),
            entries: plan.entries().map(|off| (page | off, plan.mode.0)).collect(),
            blocks: plan.keys().collect(),
            branches: Vec::new(),
            _insns: insns,
        };
        for (Branch { to, .. }, site) in branches.into_iter().zip(sites) {
            let site = start + site;
            let mut target = self.lookup.tail;
            if let Some(off) = to {
                let key = (page | off, plan.mode.0);
                target = self.entries.get(&key).map_or(target, |e| self.branch_target(Some(*e)));
                self.incoming.entry(key).or_default().push(site);
                region.branches.push((key, site));
            }
            self.arena.patch_branch(site, target);
        }
        self.arena.publish(&region.slot);
        if let Some(perf) = &self.perf
            && let Err(e) = perf.record(self.arena.exec_ptr(start), code.len(), &plan.name())
        {
            tracing::warn!("the map for perf ends here, at the region of {:#x}: {e}", plan.gpa);
            self.perf = None;
        }
        self.count(plan, code.len(), nanos);
        let code = self.arena.exec_ptr(start) as u64;
        let entry = Entry { region: id, code, tail: start + skip, second_page: plan.second_page() };
        self.changes.extend(region.blocks.iter().copied().map(Change::Cool));
        for &(page, granules) in &plan.extents {
            self.changes.push(Change::Mark(page, granules));
            self.by_page.entry(page).or_default().push(id);
        }
        self.order.push_back(id);
        let entries = region.entries.clone();
        self.regions.insert(id, region);
        for key in entries {
            self.link(key, Some(entry));
        }
        Some(())
    }

    fn count(&mut self, plan: &Plan, bytes: usize, nanos: u64) {
        self.counts.regions += 1;
        self.counts.region_blocks += plan.blocks.len() as u64;
        self.counts.guest_bytes += plan.guest_bytes();
        self.counts.code_bytes += bytes as u64;
        self.counts.compile_nanos += nanos;
    }

    /// Makes `entry` what runs at a key, for the dispatch loop and for the direct branches that lead there. A region
    /// that thereby loses its last entry goes.
    fn link(&mut self, key: Key, entry: Option<Entry>) {
        let old = match entry {
            Some(entry) => self.entries.insert(key, entry),
            None => self.entries.remove(&key).map(|(_, e)| e),
        };
        self.changes.push(Change::Code(key, entry.map_or(0, |e| e.code)));
        let target = self.branch_target(entry);
        for &site in self.incoming.get(&key).into_iter().flatten() {
            self.arena.patch_branch(site, target);
        }
        if let Some(old) = old.filter(|_| entry.is_some())
            && let Some(region) = self.regions.get_mut(&old.region)
        {
            region.entries.retain(|&k| k != key);
            if region.entries.is_empty() {
                self.remove(old.region);
            }
        }
    }

    /// Where direct branches to an entry lead.
    fn branch_target(&self, entry: Option<Entry>) -> usize {
        entry.filter(|e| e.second_page.is_none()).map_or(self.lookup.tail, |e| e.tail)
    }

    /// The code of the region that may be entered at a key, if there is one; `second_page` as the block there has it.
    pub fn find(&self, key: Key, second_page: Option<u64>) -> Option<u64> {
        self.entries.get(&key).filter(|e| e.second_page == second_page).map(|e| e.code)
    }

    fn remove(&mut self, id: RegionId) {
        let Some(region) = self.regions.remove(&id) else { return };
        for key in region.entries {
            self.link(key, None);
        }
        for (key, site) in region.branches {
            if let Some(sites) = self.incoming.get_mut(&key) {
                sites.retain(|&s| s != site);
                if sites.is_empty() {
                    self.incoming.remove(&key);
                }
            }
        }
        self.changes.extend(region.blocks.into_iter().map(Change::Cool));
        self.order.retain(|&r| r != id);
        for (page, _) in region.extents {
            if let Some(list) = self.by_page.get_mut(&page) {
                list.retain(|&r| r != id);
                if list.is_empty() {
                    self.by_page.remove(&page);
                }
            }
        }
        let start = self.arena.exec_ptr(region.slot.offset()) as u64;
        self.changes.push(Change::Freed(start..start + region.slot.len() as u64));
        self.arena.free(region.slot);
    }

    /// How often compiled code in the page of `gpa` was overwritten.
    pub fn rewrites(&self, gpa: u64) -> u32 {
        self.rewrites.get(&(gpa & !PAGE_MASK)).copied().unwrap_or(0)
    }

    /// Drops the regions, compiled or queued, that touch `granules` of a page. No vCPU may be in compiled code.
    pub fn invalidate(&mut self, page: u64, granules: u64) {
        let touched = |extents: &[(u64, u64)]| extents.iter().any(|&(p, g)| p == page && g & granules != 0);
        let mut rewrites = 0;
        for p in self.pending.values_mut().filter(|p| !p.cancelled && touched(&p.extents)) {
            p.cancelled = true;
            rewrites += 1;
        }
        let here = self.by_page.get(&page).into_iter().flatten();
        let gone: Vec<RegionId> =
            here.copied().filter(|id| self.regions.get(id).is_some_and(|r| touched(&r.extents))).collect();
        for id in gone {
            self.remove(id);
            self.counts.invalidated += 1;
            rewrites += 1;
        }
        if rewrites != 0 {
            *self.rewrites.entry(page).or_default() += rewrites;
        }
    }

    /// Marks the granules of every region of `page` (of all pages if `None`) as holding code again.
    pub fn mark(&self, page: Option<u64>, ram: &GuestRam) {
        let pages: Vec<u64> = page.map_or_else(|| self.by_page.keys().copied().collect(), |p| vec![p]);
        for page in pages {
            for id in self.by_page.get(&page).into_iter().flatten() {
                if let Some(r) = self.regions.get(id) {
                    r.extents.iter().filter(|e| e.0 == page).for_each(|&(page, granules)| {
                        ram.mark_code(page, granules);
                    });
                }
            }
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
        cpu.unload_fp();
    }
}

impl Drop for Jit {
    fn drop(&mut self) {
        self.shared.queue.lock().finished = true;
        self.shared.work.notify_all();
        for w in self.workers.drain(..) {
            let _ = w.join();
        }
    }
}

/// A compile thread.
fn work(shared: &Shared) {
    let Ok(mut compiler) = Compiler::new() else { return };
    loop {
        let (id, plan) = {
            let mut queue = shared.queue.lock();
            loop {
                if queue.finished {
                    return;
                }
                match queue.jobs.pop_front() {
                    Some(job) => break job,
                    None => shared.work.wait(&mut queue),
                }
            }
        };
        // Should Cranelift meet something it does not expect, the region stays interpreted and the thread goes on.
        let attempt = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| compiler.compile(&plan)));
        let result = attempt.unwrap_or_else(|_| {
            if let Ok(fresh) = Compiler::new() {
                compiler = fresh;
            }
            Err("the compiler panicked".into())
        });
        shared.done.lock().push((id, plan, result));
        shared.any_done.store(true, Ordering::Release);
    }
}
