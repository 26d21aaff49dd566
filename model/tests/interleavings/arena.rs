//! Code memory while another thread executes in it.

use diglot_model::code::{CodeArena, Slot};
use diglot_model::processor::{RETURN, run, unit};
use diglot_model::sync::Mutex;
use loom::sync::Arc;
use loom::thread;

use crate::Others::One;
use crate::explore;

/// Room for a unit.
const UNIT: usize = 16;

struct Machine {
    arena: CodeArena,
    /// Held by the thread that executes while it is in compiled code.
    inside: Mutex<()>,
}

impl Machine {
    /// An arena of three slots, of which the first returns and the second is unit 1, which jumps there.
    fn new() -> (Arc<Machine>, Units) {
        let machine = Machine { arena: CodeArena::new(3 * UNIT).expect("an arena"), inside: Mutex::new(()) };
        let out = machine.install(RETURN);
        let (code, site) = unit(1);
        let first = machine.install(&code);
        let site = first.offset() + site;
        assert!(machine.arena.patch_branch(site, out.offset()));
        (Arc::new(machine), Units { out: out.offset(), first: first.offset(), site })
    }

    fn install(&self, code: &[u8]) -> Slot {
        let mut slot = self.arena.alloc(code.len()).expect("room");
        self.arena.write(&mut slot, code).expect("a slot as large");
        self.arena.publish(&slot);
        slot
    }

    /// A unit that jumps to `out`.
    fn install_unit(&self, number: u32, out: usize) -> Slot {
        let (code, site) = unit(number);
        let slot = self.install(&code);
        assert!(self.arena.patch_branch(slot.offset() + site, out));
        slot
    }

    /// Runs unit 1 and what follows it.
    fn run(&self, units: &Units) -> Vec<u32> {
        let _inside = self.inside.lock();
        let mut seen = Vec::new();
        run(self.arena.executable(), self.arena.exec_ptr(units.first).addr(), |n| seen.push(n));
        seen
    }

    /// Returns once whoever executes has left compiled code.
    fn rendezvous(&self) {
        drop(self.inside.lock());
    }
}

#[derive(Clone, Copy)]
struct Units {
    out: usize,
    first: usize,
    /// Where unit 1 jumps.
    site: usize,
}

/// Another thread executes twice what `change` changes meanwhile; what it saw.
fn beside(units: Units, machine: &Arc<Machine>, change: impl FnOnce(&Machine)) -> [Vec<u32>; 2] {
    let there = Arc::clone(machine);
    let thread = thread::spawn(move || [there.run(&units), there.run(&units)]);
    change(machine);
    thread.join().expect("a thread that ends")
}

/// A branch leads to its old target or to the whole of its new one.
#[test]
fn a_unit_is_published_under_a_running_thread() {
    explore("a unit is published", One, 4, || {
        let (machine, units) = Machine::new();
        let seen = beside(units, &machine, |machine| {
            let second = machine.install_unit(2, units.out);
            assert!(machine.arena.patch_branch(units.site, second.offset()));
        });
        let stages = seen.map(|s| [vec![1], vec![1, 2]].iter().position(|t| *t == s).expect("a stage"));
        assert!(stages.is_sorted(), "{stages:?}");
        assert_eq!(machine.run(&units), [1, 2]);
    });
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_branch_led_to_a_unit_before_it_is_written_is_found() {
    explore("led there too early", One, 1, || {
        let (machine, units) = Machine::new();
        beside(units, &machine, |machine| {
            let (code, site) = unit(2);
            let mut slot = machine.arena.alloc(code.len()).expect("room");
            assert!(machine.arena.patch_branch(units.site, slot.offset()));
            machine.arena.write(&mut slot, &code).expect("a slot as large");
            machine.arena.publish(&slot);
            assert!(machine.arena.patch_branch(slot.offset() + site, units.out));
        });
    });
}

/// Retires unit 2 and puts unit 3 in its place.
fn replace(machine: &Machine, units: Units, second: Slot, rendezvous: bool) {
    assert!(machine.arena.patch_branch(units.site, units.out));
    machine.arena.sync_cores();
    if rendezvous {
        machine.rendezvous();
    }
    let place = second.offset();
    machine.arena.free(second);
    let third = machine.install_unit(3, units.out);
    assert_eq!(third.offset(), place, "the slot is used again");
    assert!(machine.arena.patch_branch(units.site, third.offset()));
}

fn slot_is_reused(rendezvous: bool) {
    explore("a slot is reused", One, 4, move || {
        let (machine, units) = Machine::new();
        let second = machine.install_unit(2, units.out);
        assert!(machine.arena.patch_branch(units.site, second.offset()));
        let seen = beside(units, &machine, |machine| replace(machine, units, second, rendezvous));
        // Nobody goes back to a unit that has gone.
        let stages = seen.map(|s| [vec![1, 2], vec![1], vec![1, 3]].iter().position(|t| *t == s).expect("a stage"));
        assert!(stages.is_sorted(), "{stages:?}");
        assert_eq!(machine.run(&units), [1, 3]);
    });
}

#[test]
fn a_slot_is_reused_once_no_thread_is_inside() {
    slot_is_reused(true);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_slot_reused_under_a_running_thread_is_found() {
    slot_is_reused(false);
}
