//! The code cache: a vCPU that stores to code, runs it, and has it compiled by workers of any speed.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use diglot_model::code::CodeArena;
use diglot_model::jit::cache::{Cache, Change, Extent, Key, Link, RegionId, Runs, Unit};
use diglot_model::jit::handover::Handover;
use diglot_model::processor::{RETURN, run, unit};
use loom::sync::Arc;
use loom::thread::{self, JoinHandle};

use crate::Others::{self, One, Two};
use crate::explore;

/// Room for a unit.
const UNIT: usize = 16;
const PAGE: u64 = 0x4000;

/// Guest code: a block of one granule, by the granule's number.
type Block = usize;

fn key(block: Block) -> Key {
    (PAGE | block as u64 * 64, 0)
}

fn extent(block: Block) -> Extent {
    (PAGE, 1 << block)
}

/// What is to be compiled: these blocks, whose bytes were those of the version; the last jumps to `next`.
#[derive(Clone)]
struct Plan {
    blocks: Vec<(Block, u32)>,
    next: Block,
    number: u32,
}

type Job = (RegionId, Plan);
type Done = (RegionId, Plan, (Vec<u8>, usize));

/// What code refers to by address: there, or an error.
struct Kept(u32, Rc<RefCell<BTreeSet<u32>>>);

impl Drop for Kept {
    fn drop(&mut self) {
        self.1.borrow_mut().remove(&self.0);
    }
}

/// What the vCPU's thread owns. Guest memory is a version for each block.
struct Vcpu {
    cache: Cache<Kept>,
    way: Arc<Handover<Job, Done>>,
    workers: Vec<JoinHandle<()>>,
    memory: Vec<u32>,
    /// What each number given to a unit stands for.
    plans: Vec<Plan>,
    /// Numbers of the units whose instructions are kept.
    alive: Rc<RefCell<BTreeSet<u32>>>,
    /// Code by block, as predecoded blocks have it.
    blocks: BTreeMap<Key, u64>,
    /// Code by block, as the jump cache has it: found once, used until it is freed.
    jump: BTreeMap<Key, u64>,
    dropped: u64,
    evicted: u64,
}

impl Vcpu {
    /// A vCPU whose code memory has room for `units`.
    fn new(blocks: usize, workers: Others, units: usize) -> Vcpu {
        let arena = CodeArena::new((units + 1) * UNIT).expect("an arena");
        let mut lookup = arena.alloc(RETURN.len()).expect("room");
        arena.write(&mut lookup, RETURN).expect("a slot as large");
        arena.publish(&lookup);
        let way = Arc::new(Handover::new(4));
        let worker = |_| {
            let way: Arc<Handover<Job, Done>> = Arc::clone(&way);
            thread::spawn(move || {
                way.serve(|(id, plan): Job| {
                    let code = unit(plan.number);
                    (id, plan, code)
                });
            })
        };
        Vcpu {
            cache: Cache::new(arena, lookup.offset()),
            workers: (0..workers.count()).map(worker).collect(),
            way,
            memory: vec![0; blocks],
            plans: Vec::new(),
            alive: Rc::default(),
            blocks: BTreeMap::new(),
            jump: BTreeMap::new(),
            dropped: 0,
            evicted: 0,
        }
    }

    /// Has a region compiled that may be entered at each of `blocks`.
    fn request(&mut self, blocks: &[Block], next: Block) {
        let number = self.plans.len() as u32;
        let blocks: Vec<_> = blocks.iter().map(|&b| (b, self.memory[b])).collect();
        let plan = Plan { blocks, next, number };
        self.plans.push(plan.clone());
        let id = self.cache.expect(plan.blocks.iter().map(|&(b, _)| extent(b)).collect());
        assert!(self.way.request((id, plan)));
    }

    /// A store to a block's bytes.
    fn store(&mut self, block: Block) {
        self.memory[block] += 1;
        let (page, granules) = extent(block);
        self.cache.invalidate(page, granules);
        self.follow();
    }

    /// Installs what has come, if anything has, and runs every block that has code.
    fn turn(&mut self) {
        if self.way.has_done() {
            for (id, plan, code) in self.way.take_done() {
                if self.cache.arrive(id) {
                    self.place(id, &plan, code);
                } else {
                    self.dropped += 1;
                }
            }
            self.follow();
        }
        for block in 0..self.memory.len() {
            self.run(block);
        }
    }

    fn place(&mut self, id: RegionId, plan: &Plan, (code, site): (Vec<u8>, usize)) {
        self.alive.borrow_mut().insert(plan.number);
        let keys: Vec<Key> = plan.blocks.iter().map(|&(b, _)| key(b)).collect();
        let unit = Unit {
            code,
            tail: 0,
            branches: vec![Link { site, to: Some(key(plan.next)), otherwise: None, quick: false }],
            calls: Vec::new(),
            extents: plan.blocks.iter().map(|&(b, _)| extent(b)).collect(),
            entries: keys.iter().map(|&k| (k, 0)).collect(),
            blocks: keys,
            second_page: None,
            quick: false,
            bridges: Box::default(),
            quick_bridges: 0,
            crossings: Vec::new(),
            kept: Kept(plan.number, self.alive.clone()),
        };
        self.evicted += self.cache.place(id, unit).expect("room for one").evicted;
    }

    fn follow(&mut self) {
        for change in self.cache.changes.drain(..) {
            match change {
                Change::Code(key, Runs { code: 0, .. }) => {
                    self.blocks.remove(&key);
                    self.jump.remove(&key);
                }
                Change::Code(key, Runs { code, .. }) => {
                    self.blocks.insert(key, code);
                    self.jump.entry(key).and_modify(|old| *old = code);
                }
                Change::Cool(_) | Change::Evicted(_) | Change::Mark(..) => {}
            }
        }
    }

    /// Runs the code at a block and what it leads to: each unit is of the bytes that are there now.
    fn run(&mut self, block: Block) {
        let key = key(block);
        assert_eq!(self.cache.find(key, None).code, self.blocks.get(&key).copied().unwrap_or(0));
        if let Some(&code) = self.blocks.get(&key) {
            self.jump.entry(key).or_insert(code);
        }
        let Some(&code) = self.jump.get(&key) else { return };
        let mut at = block;
        run(self.cache.arena().executable(), code as usize, |number| {
            let plan = &self.plans[number as usize];
            assert!(plan.blocks.iter().any(|&(b, _)| b == at), "unit {number} is not of block {at}");
            assert!(plan.blocks.iter().all(|&(b, version)| self.memory[b] == version), "unit {number} is outdated");
            assert!(self.alive.borrow().contains(&number), "unit {number} has gone");
            at = plan.next;
        });
    }

    /// Installs everything that is on its way.
    fn settle(&mut self) {
        self.way.wait_for(self.cache.expected());
        self.turn();
        assert_eq!(self.cache.expected(), 0);
    }

    /// Which units are reached from a block, of which only the first few are looked at.
    fn reached(&self, block: Block) -> Vec<u32> {
        let mut reached = Vec::new();
        let code = self.cache.find(key(block), None).code;
        if code != 0 {
            run(self.cache.arena().executable(), code as usize, |number| reached.push(number));
        }
        reached
    }

    fn finish(mut self) {
        self.way.close();
        self.workers.drain(..).for_each(|t| t.join().expect("a worker that ends"));
    }
}

#[test]
fn regions_are_published_and_linked() {
    explore("published and linked", One, 100, || {
        let mut vcpu = Vcpu::new(2, One, 2);
        vcpu.request(&[0], 1);
        vcpu.turn();
        vcpu.request(&[1], 0);
        vcpu.turn();
        vcpu.settle();
        assert_eq!(vcpu.reached(0), [0, 1, 0, 1]);
        vcpu.finish();
    });
}

/// The bytes change before, while and after they are compiled, and are compiled anew at once.
#[test]
fn no_region_outlives_its_bytes() {
    for workers in [One, Two] {
        explore("stores while compiling", workers, 100, move || {
            let mut vcpu = Vcpu::new(1, workers, 2);
            vcpu.request(&[0], 0);
            vcpu.turn();
            vcpu.store(0);
            vcpu.request(&[0], 0);
            vcpu.turn();
            vcpu.settle();
            assert_eq!(vcpu.reached(0), [1; 4]);
            vcpu.finish();
        });
    }
}

/// A store to one block of a region drops it, links of others to it included; those of other blocks stay.
#[test]
fn links_to_what_was_overwritten_lead_away() {
    explore("links to what was overwritten", One, 100, || {
        let mut vcpu = Vcpu::new(3, One, 2);
        vcpu.request(&[0, 1], 2);
        vcpu.request(&[2], 0);
        vcpu.turn();
        vcpu.store(1);
        vcpu.turn();
        vcpu.settle();
        assert_eq!(vcpu.reached(0), []);
        assert_eq!(vcpu.reached(2), [1]);
        vcpu.finish();
    });
}

/// Three regions in a ring, with room for two: whichever comes last takes the place of the oldest.
#[test]
fn what_is_evicted_is_led_to_no_more() {
    for workers in [One, Two] {
        explore("evicted", workers, 100, move || {
            let mut vcpu = Vcpu::new(3, workers, 2);
            for block in 0..3 {
                vcpu.request(&[block], (block + 1) % 3);
            }
            vcpu.turn();
            vcpu.settle();
            assert_eq!(vcpu.evicted, 1);
            let present = (0..3).filter(|&b| !vcpu.reached(b).is_empty()).count();
            assert_eq!(present, 2);
            vcpu.finish();
        });
    }
}

/// Two regions with an entry in common: the later to come takes it, and the other goes if that was its only one.
#[test]
fn a_region_without_entries_goes() {
    explore("without entries", Two, 100, || {
        let mut vcpu = Vcpu::new(2, Two, 2);
        vcpu.request(&[0], 1);
        vcpu.request(&[0, 1], 0);
        vcpu.settle();
        let kept = if vcpu.reached(0)[0] == 0 { vec![0, 1] } else { vec![1] };
        assert!(vcpu.alive.borrow().iter().eq(&kept), "{:?} instead of {kept:?}", vcpu.alive.borrow());
        assert_eq!(vcpu.cache.arena().used(), UNIT * (1 + kept.len()));
        vcpu.finish();
    });
}

/// The marks of all code are cleared while it is compiled: a store is not noticed, so the code is not used.
#[test]
fn what_was_expected_without_marks_is_dropped() {
    explore("marks cleared", One, 10, || {
        let mut vcpu = Vcpu::new(1, One, 1);
        vcpu.request(&[0], 0);
        vcpu.turn();
        if vcpu.cache.expected() != 0 {
            vcpu.cache.cancel_expected();
            vcpu.memory[0] += 1;
        }
        vcpu.settle();
        assert_eq!(vcpu.dropped == 0, vcpu.alive.borrow().len() == 1);
        vcpu.finish();
    });
}
