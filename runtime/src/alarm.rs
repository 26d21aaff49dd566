//! The timer thread's alarm: it sleeps until the earliest deadline of the devices, and whoever sets an earlier one wakes
//! it.
//!
//! Deadlines change under the chipset's lock. [`Alarm::arm`] and [`Alarm::earlier`] are called under it too, so that
//! the two agree on which came first; [`Alarm::sleep`] is not. `model` runs this file in every interleaving.

use std::time::Duration;

use crate::sync::{AtomicU64, Condvar, Mutex, Ordering};

/// A time that never comes.
pub const NEVER: u64 = u64::MAX;

/// When the timer thread looks again.
pub struct Alarm {
    /// In nanoseconds of virtual time.
    armed: AtomicU64,
    finished: Mutex<bool>,
    /// An earlier deadline, or the end.
    changed: Condvar,
}

impl Default for Alarm {
    /// One that is not set.
    fn default() -> Alarm {
        Alarm { armed: AtomicU64::new(NEVER), finished: Mutex::new(false), changed: Condvar::new() }
    }
}

impl Alarm {
    /// Sets the alarm to the earliest deadline: for the timer thread, before it sleeps.
    pub fn arm(&self, deadline: u64) {
        self.armed.store(deadline, Ordering::Release);
    }

    /// Wakes the timer thread if the earliest deadline is now before what it is armed for.
    pub fn earlier(&self, deadline: u64) {
        if deadline < self.armed.load(Ordering::Acquire) {
            self.armed.store(deadline, Ordering::Release);
            // Once it is free the timer thread sleeps, or is about to see what has just been stored.
            drop(self.finished.lock());
            self.changed.notify_one();
        }
    }

    /// Sleeps until the deadline that the alarm was set to is `away`, for ever if that is `None`, or until there is
    /// an earlier one, or the end.
    pub fn sleep(&self, deadline: u64, away: Option<Duration>) {
        let mut finished = self.finished.lock();
        // An earlier one that came after `arm` has notified nobody.
        if *finished || self.armed.load(Ordering::Acquire) != deadline {
            return;
        }
        match away {
            Some(away) => {
                self.changed.wait_for(&mut finished, away);
            }
            None => self.changed.wait(&mut finished),
        }
    }

    /// Whether the timer thread shall end.
    pub fn finished(&self) -> bool {
        *self.finished.lock()
    }

    /// Ends the timer thread.
    pub fn finish(&self) {
        *self.finished.lock() = true;
        self.changed.notify_all();
    }
}
