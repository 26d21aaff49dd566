//! vCPUs that store to each other's code, and that have to be alone.

use diglot_model::kick::Kick;
use diglot_model::marks::{self, Marks};
use diglot_model::peers::Peers;
use diglot_model::sync::{AtomicU64, Ordering, fence};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

use crate::Others::{One, Two};
use crate::explore;

/// The page that there is.
const PAGE: usize = 0;
const GRANULE: u64 = 1;
const STORER: usize = 0;
const DECODER: usize = 1;

struct Machine {
    peers: Peers,
    marks: Vec<Marks>,
    kicks: Vec<Kick>,
    /// What the page has.
    code: AtomicU64,
}

fn machine(vcpus: usize) -> Arc<Machine> {
    let peers = Peers::new(vcpus);
    let kicks: Vec<Kick> = (0..vcpus).map(|_| Kick::default()).collect();
    kicks.iter().enumerate().for_each(|(vcpu, kick)| peers.join(vcpu, kick.clone()));
    let marks = (0..vcpus).map(|_| Marks::new(1)).collect();
    Arc::new(Machine { peers, marks, kicks, code: AtomicU64::new(0) })
}

impl Machine {
    /// A store, by the path that the soft TLB has for it.
    fn store(&self, fast: bool, value: u64) {
        self.code.store(value, Ordering::Relaxed);
        if !fast {
            fence(Ordering::SeqCst);
            for (vcpu, hit) in marks::others_with_code(&self.marks, STORER, PAGE, GRANULE) {
                self.peers.overwritten(vcpu, PAGE as u64, hit);
            }
        }
    }

    /// What is asked between two blocks; whether stores to the page have to take the slow path.
    fn answer(&self, vcpu: usize) -> bool {
        let mut protects = false;
        while self.kicks[vcpu].take(Kick::PEERS) != 0 {
            if !self.peers.take(vcpu).protect.is_empty() {
                self.marks[vcpu].forbid_fast(PAGE);
                protects = true;
            }
            self.peers.make_way(vcpu);
        }
        protects
    }

    /// A vCPU that stores twice, with a block's end between.
    fn run_storer(&self) {
        self.peers.come(STORER);
        self.answer(STORER);
        let mut fast = marks::allow_fast(&self.marks, STORER, PAGE);
        self.store(fast, 1);
        fast &= !self.answer(STORER);
        self.store(fast, 2);
        self.peers.go(STORER);
    }

    /// A vCPU that decodes the page: what it has read before the page was marked, and what afterwards.
    fn run_decoder(&self) -> (u64, u64) {
        self.peers.come(DECODER);
        let before = self.code.load(Ordering::Relaxed);
        self.marks[DECODER].mark_code(PAGE, GRANULE);
        let fast: Vec<usize> = marks::others_fast(&self.marks, DECODER, PAGE).collect();
        let is_fast = |vcpu: usize| self.marks[vcpu].is_fast(PAGE);
        self.peers.protected(&fast, PAGE as u64, is_fast, || _ = self.peers.take_protect(DECODER));
        let after = self.code.load(Ordering::Relaxed);
        self.peers.go(DECODER);
        (before, after)
    }

    /// Whether what was decoded is what is there, or it was said that it is not.
    fn is_known(&self, decoded: u64) -> bool {
        self.code.load(Ordering::Relaxed) == decoded || !self.peers.take(DECODER).overwritten.is_empty()
    }
}

/// Two vCPUs that have stored and decoded at a time, and what was decoded.
fn stored_and_decoded() -> (Arc<Machine>, (u64, u64)) {
    let machine = machine(2);
    let there = machine.clone();
    let storer = thread::spawn(move || there.run_storer());
    let decoded = machine.run_decoder();
    storer.join().expect("a thread that ends");
    (machine, decoded)
}

/// A block whose bytes were the same before its page was marked and afterwards is of the bytes that are there, or whoever has
/// stored others has said so.
#[test]
fn no_store_to_code_is_missed() {
    explore("no store to code is missed", Two, 50, || {
        let (machine, (before, after)) = stored_and_decoded();
        assert!(before != after || machine.is_known(after));
    });
}

/// What was read before the page was marked says nothing by itself.
#[test]
#[should_panic(expected = "is_known")]
fn bytes_have_to_be_read_again() {
    explore("bytes have to be read again", Two, 1, || {
        let (machine, (before, _)) = stored_and_decoded();
        assert!(machine.is_known(before), "is_known");
    });
}

/// Nobody runs beside a vCPU that is alone, and all of them come to an end.
#[test]
fn alone_is_alone() {
    explore("alone is alone", Two, 100, || {
        let machine = machine(2);
        let memory = Arc::new(UnsafeCell::new(0u64));
        let add = |machine: &Machine, memory: &UnsafeCell<u64>, vcpu: usize| {
            machine.peers.come(vcpu);
            machine.answer(vcpu);
            machine.peers.begin_alone(vcpu);
            // SAFETY: nobody else is in here; loom objects if somebody is.
            memory.with_mut(|p| unsafe { *p += 1 });
            machine.peers.end_alone();
            machine.answer(vcpu);
            machine.peers.go(vcpu);
        };
        let (there, cell) = (machine.clone(), memory.clone());
        let other = thread::spawn(move || add(&there, &cell, 1));
        add(&machine, &memory, 0);
        other.join().expect("a thread that ends");
        // SAFETY: the other one has ended.
        assert_eq!(memory.with(|p| unsafe { *p }), 2);
    });
}

/// A vCPU that runs on, looking between blocks, does not do so beside one that is alone.
#[test]
fn who_runs_makes_way() {
    explore("who runs makes way", One, 20, || {
        let machine = machine(2);
        let memory = Arc::new(UnsafeCell::new(0u64));
        let (there, cell) = (machine.clone(), memory.clone());
        let other = thread::spawn(move || {
            there.peers.come(1);
            for _ in 0..2 {
                there.answer(1);
                // SAFETY: as below.
                cell.with_mut(|p| unsafe { *p += 1 });
            }
            there.peers.go(1);
        });
        machine.peers.come(0);
        machine.peers.begin_alone(0);
        // SAFETY: the other one has made way; loom objects if it has not.
        memory.with_mut(|p| unsafe { *p += 1 });
        machine.peers.end_alone();
        machine.peers.go(0);
        other.join().expect("a thread that ends");
    });
}
