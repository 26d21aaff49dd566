//! The timer thread is up in time for every deadline.

use std::time::Duration;

use diglot_model::alarm::{Alarm, NEVER};
use diglot_model::sync::Mutex;
use loom::sync::Arc;
use loom::thread;

use crate::Others::One;
use crate::explore;

struct Machine {
    alarm: Alarm,
    /// The earliest deadline, as the chipset has it.
    deadline: Mutex<u64>,
}

impl Machine {
    /// A device access that sets the deadline.
    fn set(&self, at: u64) {
        let mut deadline = self.deadline.lock();
        *deadline = at;
        self.alarm.earlier(at);
    }

    /// The timer thread, until a deadline is not after `due`.
    fn await_deadline(&self, due: u64) -> bool {
        while !self.alarm.finished() {
            let deadline = {
                let deadline = self.deadline.lock();
                self.alarm.arm(*deadline);
                *deadline
            };
            if deadline <= due {
                return true;
            }
            let away = (deadline != NEVER).then_some(Duration::from_secs(1));
            self.alarm.sleep(deadline, away);
        }
        false
    }
}

fn start(due: u64) -> (Arc<Machine>, thread::JoinHandle<bool>) {
    let machine = Arc::new(Machine { alarm: Alarm::default(), deadline: Mutex::new(NEVER) });
    let there = Arc::clone(&machine);
    (machine, thread::spawn(move || there.await_deadline(due)))
}

/// Nobody accesses a device again: a deadline that the timer thread missed would be missed for good.
#[test]
fn no_deadline_is_slept_through() {
    explore("no deadline is slept through", One, 10, || {
        let (machine, timer) = start(10);
        machine.set(20);
        machine.set(10);
        assert!(timer.join().expect("a thread that ends"));
    });
}

#[test]
fn the_end_is_not_slept_through() {
    explore("the end is not slept through", One, 10, || {
        let (machine, timer) = start(10);
        machine.set(20);
        machine.alarm.finish();
        assert!(!timer.join().expect("a thread that ends"));
    });
}
