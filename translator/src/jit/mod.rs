//! The compiler: hot blocks grown into regions and compiled by Cranelift on background threads.
//!
//! The vCPU thread plans a region from its predecoded blocks, queues it and goes on interpreting; a worker compiles;
//! the vCPU thread picks the code up between two blocks, copies it into the arena and publishes it.

pub mod compile;
pub mod emit;
pub mod frame;
pub mod helpers;
pub mod host;
pub mod region;
pub mod usage;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use dashmap::DashMap;
use parking_lot::{Condvar, Mutex};

use crate::addr::PAGE_MASK;
use crate::code::{ArenaError, CodeArena, Slot};
use crate::cpu::Cpu;
use crate::insn::Mode;
use crate::mem::GuestRam;
use compile::{Compiled, Compiler};
use region::Plan;

/// The compiler has no form of an instruction; the interpreter's evaluation is called instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unsupported;

/// Runs of a block before its region is compiled.
pub const THRESHOLD: u32 = 400;
/// Regions that may wait for a worker.
const QUEUE: usize = 256;

/// Where a region is: physical address of its entry and mode.
pub type Key = (u64, u8);

/// A compiled region in the arena.
pub struct Region {
    slot: Slot,
    /// Address of its code in the executable view.
    pub code: u64,
    granules: u64,
    /// Instructions that helpers evaluate are pointed to by the code.
    _plan: Plan,
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
    page: u64,
    granules: u64,
    cancelled: bool,
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
    regions: DashMap<Key, Region>,
    by_page: HashMap<u64, Vec<Key>>,
    /// Regions by age, for eviction.
    order: VecDeque<Key>,
    pending: HashMap<u64, Pending>,
    next_id: u64,
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    enter: u64,
    /// Code that returns to the dispatch loop at once: where jump-cache entries without a region lead.
    pub stub: u64,
    /// Statistics.
    pub counts: JitCounts,
}

impl Jit {
    /// Starts `workers` compile threads over a code memory of `bytes`.
    pub fn new(bytes: usize, workers: usize) -> Result<Jit, JitError> {
        let arena = CodeArena::new(bytes)?;
        let mut compiler = Compiler::new().map_err(JitError::Host)?;
        let install = |code: &[u8]| -> Result<u64, JitError> {
            let mut slot = arena.alloc(code.len()).ok_or_else(|| JitError::Host("code memory is too small".into()))?;
            arena.write(&mut slot, code)?;
            arena.publish(&slot);
            Ok(arena.exec_ptr(slot.offset()) as u64)
        };
        let enter = install(&compiler.trampoline().map_err(JitError::Host)?)?;
        let stub = install(&compiler.stub().map_err(JitError::Host)?)?;
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            work: Condvar::new(),
            done: Mutex::default(),
            any_done: AtomicBool::new(false),
        });
        let mut jit = Jit {
            arena,
            regions: DashMap::new(),
            by_page: HashMap::new(),
            order: VecDeque::new(),
            pending: HashMap::new(),
            next_id: 0,
            shared,
            workers: Vec::new(),
            enter,
            stub,
            counts: JitCounts::default(),
        };
        for _ in 0..workers.max(1) {
            let shared = jit.shared.clone();
            let worker = std::thread::Builder::new().name("compile".into()).spawn(move || work(&shared));
            jit.workers.push(worker.map_err(JitError::Thread)?);
        }
        Ok(jit)
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
        let pending = Pending { page: plan.gpa & !PAGE_MASK, granules: plan.granules, cancelled: false };
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

    /// Installs what the workers have finished; calls `ready` with each region's key, code address and granules.
    pub fn install(&mut self, mut ready: impl FnMut(Key, u64, u64)) {
        self.shared.any_done.store(false, Ordering::Relaxed);
        let done = std::mem::take(&mut *self.shared.done.lock());
        for (id, plan, result) in done {
            let cancelled = self.pending.remove(&id).is_none_or(|p| p.cancelled);
            match result {
                _ if cancelled => self.counts.dropped += 1,
                Err(why) => {
                    tracing::warn!("region at {:#x} not compiled: {why}", plan.gpa);
                    self.counts.failed += 1;
                }
                Ok(compiled) => {
                    let key = (plan.gpa, plan.mode.0);
                    let granules = plan.granules;
                    if let Some(code) = self.place(plan, &compiled) {
                        ready(key, code, granules);
                    }
                }
            }
        }
    }

    fn place(&mut self, plan: Plan, compiled: &Compiled) -> Option<u64> {
        let key = (plan.gpa, plan.mode.0);
        self.remove(key);
        let mut slot = loop {
            match self.arena.alloc(compiled.code.len()) {
                Some(slot) => break slot,
                None => {
                    // Oldest first; what is still hot is compiled again.
                    let oldest = self.order.front().copied()?;
                    self.remove(oldest);
                    self.counts.evicted += 1;
                }
            }
        };
        self.arena.write(&mut slot, &compiled.code).ok()?;
        self.arena.publish(&slot);
        let code = self.arena.exec_ptr(slot.offset()) as u64;
        self.counts.regions += 1;
        self.counts.region_blocks += plan.blocks.len() as u64;
        self.counts.guest_bytes += plan.guest_bytes();
        self.counts.code_bytes += compiled.code.len() as u64;
        self.counts.compile_nanos += compiled.nanos;
        self.by_page.entry(plan.gpa & !PAGE_MASK).or_default().push(key);
        self.order.push_back(key);
        self.regions.insert(key, Region { slot, code, granules: plan.granules, _plan: plan });
        Some(code)
    }

    /// The code of a region, if it is compiled.
    pub fn find(&self, key: Key) -> Option<u64> {
        self.regions.get(&key).map(|r| r.code)
    }

    fn remove(&mut self, key: Key) {
        let Some((_, region)) = self.regions.remove(&key) else { return };
        self.arena.free(region.slot);
        self.order.retain(|&k| k != key);
        if let Some(list) = self.by_page.get_mut(&(key.0 & !PAGE_MASK)) {
            list.retain(|&k| k != key);
        }
    }

    /// Drops the regions, compiled or queued, that touch `granules` of a page. No vCPU may be in compiled code.
    pub fn invalidate(&mut self, page: u64, granules: u64) {
        for p in self.pending.values_mut().filter(|p| p.page == page && p.granules & granules != 0) {
            p.cancelled = true;
        }
        let Some(keys) = self.by_page.get(&page).cloned() else { return };
        for key in keys {
            if self.regions.get(&key).is_some_and(|r| r.granules & granules != 0) {
                self.remove(key);
                self.counts.invalidated += 1;
            }
        }
    }

    /// Marks the granules of every region of `page` (of all pages if `None`) as holding code again.
    pub fn mark(&self, page: Option<u64>, ram: &GuestRam) {
        let pages: Vec<u64> = page.map_or_else(|| self.by_page.keys().copied().collect(), |p| vec![p]);
        for page in pages {
            for key in self.by_page.get(&page).into_iter().flatten() {
                if let Some(r) = self.regions.get(key) {
                    ram.mark_code(page, r.granules);
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
        let enter: extern "C" fn(*mut Cpu, u64) = unsafe { std::mem::transmute(self.enter as usize) };
        enter(cpu, code);
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
        let result = compiler.compile(&plan);
        shared.done.lock().push((id, plan, result));
        shared.any_done.store(true, Ordering::Release);
    }
}
