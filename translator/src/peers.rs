//! What the vCPUs of a machine ask of each other.
//!
//! Each runs guest code on a thread of its own, with translations, TLB and code of its own. Guest memory they share, and
//! so three things need the others:
//!
//! - a store to code that others have translated: they are told which ([`Peers::overwritten`]), before any later store of
//!   the same vCPU is seen, and drop it before the next instruction that the architecture has serialize them;
//! - a page that begins to hold code: where others' stores to it take the fast path, which looks at nothing, they are made
//!   to take the slow one, and have done so before the page is read ([`Peers::protected`]);
//! - a locked instruction that the host's processor has no atomic operation for, being misaligned: it is done while nobody
//!   else runs ([`Peers::begin_alone`]).
//!
//! A vCPU looks after what it is asked between two blocks. While it does not run guest code it is *away*: nobody waits for
//! it, as it looks before it runs any again.

use std::sync::OnceLock;

use crate::address_map::AddressMap;
use crate::kick::Kick;
use crate::sync::{AtomicBool, Condvar, Mutex, Ordering, rest};

/// The vCPUs of a machine.
pub struct Peers {
    seats: Box<[Seat]>,
    floor: Mutex<Floor>,
    /// The floor has changed.
    moved: Condvar,
}

/// What belongs to one vCPU.
struct Seat {
    kick: OnceLock<Kick>,
    mail: Mutex<Mail>,
    away: AtomicBool,
}

/// What a vCPU has been asked. As it is kept by pages it grows no larger than the guest has memory.
#[derive(Default)]
pub struct Mail {
    /// Granules by page of code that others have overwritten.
    pub overwritten: AddressMap<u64, u64>,
    /// Pages to which stores may no longer take the fast path.
    pub protect: AddressMap<u64, ()>,
}

/// Who runs guest code.
struct Floor {
    running: usize,
    /// Whether one of them is to be the only one.
    alone: bool,
}

impl Peers {
    /// So many vCPUs, all of them away.
    pub fn new(vcpus: usize) -> Peers {
        let seat = |_| Seat { kick: OnceLock::new(), mail: Mutex::new(Mail::default()), away: AtomicBool::new(true) };
        Peers {
            seats: (0..vcpus).map(seat).collect(),
            floor: Mutex::new(Floor { running: 0, alone: false }),
            moved: Condvar::new(),
        }
    }

    /// How a vCPU's attention is got.
    pub fn join(&self, vcpu: usize, kick: Kick) {
        _ = self.seats[vcpu].kick.set(kick);
    }

    fn kick(&self, vcpu: usize) {
        if let Some(kick) = self.seats[vcpu].kick.get() {
            kick.request(Kick::PEERS);
        }
    }

    fn kick_others(&self, vcpu: usize) {
        (0..self.seats.len()).filter(|&other| other != vcpu).for_each(|other| self.kick(other));
    }

    /// Tells a vCPU that code which it has translated was overwritten.
    pub fn overwritten(&self, vcpu: usize, page: u64, granules: u64) {
        *self.seats[vcpu].mail.lock().overwritten.entry(page).or_default() |= granules;
        self.kick(vcpu);
    }

    /// Waits until each of `vcpus` has no stores to a page take the fast path, which `is_fast` says, or is away; `meanwhile`
    /// does what this vCPU is asked itself.
    pub fn protected(&self, vcpus: &[usize], page: u64, is_fast: impl Fn(usize) -> bool, mut meanwhile: impl FnMut()) {
        for &vcpu in vcpus {
            self.seats[vcpu].mail.lock().protect.insert(page, ());
            self.kick(vcpu);
        }
        let mut turns = 0;
        while vcpus.iter().any(|&vcpu| is_fast(vcpu) && !self.seats[vcpu].away.load(Ordering::SeqCst)) {
            meanwhile();
            turns += 1;
            rest(turns);
        }
    }

    /// What a vCPU has been asked since it last looked.
    pub fn take(&self, vcpu: usize) -> Mail {
        std::mem::take(&mut *self.seats[vcpu].mail.lock())
    }

    /// Of that, only the pages to protect.
    pub fn take_protect(&self, vcpu: usize) -> AddressMap<u64, ()> {
        std::mem::take(&mut self.seats[vcpu].mail.lock().protect)
    }

    /// A vCPU is about to run guest code, which it must not before it has looked what it is asked. Waits while another one is
    /// to be alone.
    pub fn come(&self, vcpu: usize) {
        let mut floor = self.floor.lock();
        while floor.alone {
            self.moved.wait(&mut floor);
        }
        floor.running += 1;
        self.seats[vcpu].away.store(false, Ordering::SeqCst);
    }

    /// A vCPU runs no guest code for now.
    pub fn go(&self, vcpu: usize) {
        self.seats[vcpu].away.store(true, Ordering::SeqCst);
        self.floor.lock().running -= 1;
        self.moved.notify_all();
    }

    /// Waits until no other vCPU runs guest code, and keeps it so. What this one is asked meanwhile it has to look at
    /// afterwards.
    pub fn begin_alone(&self, vcpu: usize) {
        self.go(vcpu);
        let mut floor = self.floor.lock();
        while floor.alone {
            self.moved.wait(&mut floor);
        }
        floor.alone = true;
        self.kick_others(vcpu);
        while floor.running != 0 {
            self.moved.wait(&mut floor);
        }
        floor.running += 1;
        self.seats[vcpu].away.store(false, Ordering::SeqCst);
    }

    /// Lets the others run again.
    pub fn end_alone(&self) {
        self.floor.lock().alone = false;
        self.moved.notify_all();
    }

    /// Lets another vCPU be alone that wants to.
    pub fn make_way(&self, vcpu: usize) {
        if self.floor.lock().alone {
            self.go(vcpu);
            self.come(vcpu);
        }
    }
}
