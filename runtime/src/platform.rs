//! What a vCPU sees of the machine: the chipset behind a lock, the clock, and the wake-ups between threads.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use diglot_devices::bus::{Nanos, scale};
use diglot_devices::chipset::{Chipset, PowerEvent, Startup};
use diglot_translator::engine::{Kick, Platform};
use parking_lot::{Condvar, Mutex};

use crate::alarm::{Alarm, NEVER};
use crate::machine::StopReason;

/// Input that waits for the UART is bounded: a guest that does not read makes the sender wait, not memory grow.
const INPUT_LIMIT: usize = 64 * 1024;

/// What the machine's threads share.
pub(crate) struct Shared {
    pub chipset: Mutex<Chipset>,
    /// The vCPUs, by number.
    seats: Box<[Seat]>,
    /// Whether the vCPUs are to leave guest code, all of them, for something that only the machine can do.
    pause: AtomicBool,
    start: Nanos,
    /// Frequency of the time-stamp counter.
    tsc_hz: u64,
    /// Whether another engine is to take over.
    switch: AtomicBool,
    /// Bytes for COM1 that its FIFO had no room for yet.
    input: Mutex<VecDeque<u8>>,
    pub stop: Mutex<Option<StopReason>>,
    pub power: Mutex<Option<PowerEvent>>,
    /// When the timer thread will look again.
    alarm: Alarm,
    /// What left guest code for a device.
    pub exits: Exits,
}

/// How a vCPU's attention is got.
#[derive(Default)]
struct Seat {
    kick: Kick,
    /// It waits here while it has nothing to do.
    idle: Mutex<()>,
    wake: Condvar,
}

/// Accesses of guest code to devices, and halts, for statistics.
#[derive(Default)]
pub(crate) struct Exits {
    halts: AtomicU64,
    port_reads: AtomicU64,
    port_writes: AtomicU64,
    mmio_reads: AtomicU64,
    mmio_writes: AtomicU64,
    apic_accesses: AtomicU64,
}

impl Exits {
    /// The counters by name.
    pub fn counters(&self) -> [(&'static str, u64); 6] {
        [
            ("halts", &self.halts),
            ("port_reads", &self.port_reads),
            ("port_writes", &self.port_writes),
            ("mmio_reads", &self.mmio_reads),
            ("mmio_writes", &self.mmio_writes),
            ("apic_accesses", &self.apic_accesses),
        ]
        .map(|(name, count)| (name, count.load(Ordering::Relaxed)))
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// The host's monotonic clock: as [`std::time::Instant`], without the arithmetic of that, as guests read it with each
/// system call.
fn monotonic() -> Nanos {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: it writes to `now` alone. It has nothing to fail by: Linux has this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

impl Shared {
    pub fn new(chipset: Chipset, cpus: u8, tsc_hz: u64) -> Shared {
        Shared {
            chipset: Mutex::new(chipset),
            seats: (0..cpus).map(|_| Seat::default()).collect(),
            pause: AtomicBool::new(false),
            start: monotonic(),
            tsc_hz,
            switch: AtomicBool::new(false),
            input: Mutex::new(VecDeque::new()),
            stop: Mutex::new(None),
            power: Mutex::new(None),
            alarm: Alarm::default(),
            exits: Exits::default(),
        }
    }

    /// Virtual time.
    pub fn now(&self) -> Nanos {
        monotonic() - self.start
    }

    /// The time-stamp counter at a time.
    pub fn tsc(&self, now: Nanos) -> u64 {
        scale(now, self.tsc_hz, 1_000_000_000)
    }

    /// Asks for another engine.
    pub fn switch(&self) {
        self.switch.store(true, Ordering::Release);
        self.pause();
    }

    /// Whether another engine was asked for since this was last called.
    pub fn take_switch(&self) -> bool {
        self.switch.swap(false, Ordering::Acquire)
    }

    /// How a vCPU's attention is got.
    pub fn kick(&self, cpu: usize) -> &Kick {
        &self.seats[cpu].kick
    }

    /// Makes a vCPU look at the world, whether it runs or is halted.
    pub fn notify(&self, cpu: usize, bits: u32) {
        let seat = &self.seats[cpu];
        seat.kick.request(bits);
        // Taking the lock orders this with a vCPU that is about to sleep.
        drop(seat.idle.lock());
        seat.wake.notify_all();
    }

    /// Has all vCPUs leave guest code.
    pub fn pause(&self) {
        self.pause.store(true, Ordering::SeqCst);
        (0..self.seats.len()).for_each(|cpu| self.notify(cpu, Kick::STOP));
    }

    /// Whether they are to.
    pub fn paused(&self) -> bool {
        self.pause.load(Ordering::SeqCst)
    }

    /// Lets them run again. What has them pause is to be looked for behind this.
    pub fn resume(&self) {
        self.pause.store(false, Ordering::SeqCst);
    }

    /// Asks the machine to stop; the first reason counts.
    pub fn stop(&self, why: StopReason) {
        self.stop.lock().get_or_insert(why);
        self.pause();
    }

    /// Queues bytes for COM1, waiting while the queue is full and the machine runs.
    pub fn input(&self, bytes: &[u8]) {
        for chunk in bytes.chunks(INPUT_LIMIT) {
            while self.input.lock().len() + chunk.len() > INPUT_LIMIT {
                if self.stop.lock().is_some() || self.alarm.finished() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            self.input.lock().extend(chunk);
        }
        self.notify(0, Kick::ATTENTION);
    }

    /// Hands queued input to the UART as far as it has room.
    fn feed(&self, chipset: &mut Chipset) {
        let mut input = self.input.lock();
        if !input.is_empty() {
            let n = chipset.serial_input(input.make_contiguous());
            input.drain(..n);
        }
    }

    /// Puts a halted vCPU to sleep until a kick or, where it is the only one, until the next timer: else that is the timer
    /// thread's.
    pub fn sleep_until_event(&self, cpu: usize) {
        count(&self.exits.halts);
        let only = self.seats.len() == 1;
        let deadline = if only { self.chipset.lock().next_deadline() } else { None };
        let seat = &self.seats[cpu];
        let mut guard = seat.idle.lock();
        if seat.kick.pending() != 0 {
            return;
        }
        match deadline {
            Some(at) => {
                let now = self.now();
                if at > now {
                    seat.wake.wait_for(&mut guard, Duration::from_nanos(at - now));
                }
            }
            None => seat.wake.wait(&mut guard),
        }
        seat.kick.request(Kick::ATTENTION);
    }

    /// What a vCPU does, as far as other vCPUs' INIT and start-up IPIs say. Sleeps while it waits for one of these, unless
    /// all are to pause.
    pub fn startup(&self, cpu: usize) -> Startup {
        loop {
            let startup = self.chipset.lock().startup(cpu);
            if startup != Startup::Waits || self.paused() {
                return startup;
            }
            let seat = &self.seats[cpu];
            let mut guard = seat.idle.lock();
            if seat.kick.take(Kick::STOP | Kick::ATTENTION) == 0 {
                seat.wake.wait(&mut guard);
            }
        }
    }

    /// Sleeps in S3 until an event wakes the machine (true) or the user ends the run.
    pub fn sleep_until_woken(&self) -> bool {
        self.chipset.lock().suspend(self.now());
        loop {
            let mut chipset = self.chipset.lock();
            chipset.advance(self.now());
            if chipset.wake() {
                return true;
            }
            let deadline = chipset.next_deadline();
            drop(chipset);
            let seat = &self.seats[0];
            let mut guard = seat.idle.lock();
            if self.stop.lock().is_some() {
                return false;
            }
            let wait = deadline.map_or(Duration::MAX, |at| Duration::from_nanos(at.saturating_sub(self.now())));
            seat.wake.wait_for(&mut guard, wait.min(Duration::from_secs(3600)));
        }
    }

    /// The timer thread: has device timers do what they are due to, and kicks the vCPUs that this interrupts.
    pub fn run_timer(&self) {
        while !self.alarm.finished() {
            let now = self.now();
            let deadline = {
                let mut chipset = self.chipset.lock();
                if chipset.next_deadline().is_some_and(|at| at <= now) {
                    chipset.advance(now);
                    self.after_access(&mut chipset, None);
                }
                let deadline = chipset.next_deadline().unwrap_or(NEVER);
                self.alarm.arm(deadline);
                deadline
            };
            let away = (deadline != NEVER).then(|| Duration::from_nanos(deadline.saturating_sub(self.now())));
            self.alarm.sleep(deadline, away);
        }
    }

    /// Ends the timer thread.
    pub fn finish(&self) {
        self.alarm.finish();
    }

    /// After an access to devices, by a vCPU or by none: takes power events, tells vCPUs what waits for them, but for the
    /// one that looks itself, and the timer thread about an earlier deadline.
    fn after_access(&self, chipset: &mut Chipset, by: Option<usize>) {
        if let Some(event) = chipset.take_power_event() {
            self.power.lock().get_or_insert(event);
            self.pause();
        }
        chipset.tell(|cpu, startup| match startup {
            Startup::Runs if by == Some(cpu) => {}
            Startup::Runs => self.notify(cpu, Kick::ATTENTION),
            Startup::Waits | Startup::Begins(_) => self.notify(cpu, Kick::STOP),
        });
        self.alarm.earlier(chipset.next_deadline().unwrap_or(NEVER));
    }
}

/// One vCPU's door to the machine.
pub(crate) struct VcpuPlatform {
    pub shared: Arc<Shared>,
    pub cpu: usize,
}

impl VcpuPlatform {
    fn with<T>(&self, f: impl FnOnce(&mut Chipset, Nanos) -> T) -> T {
        let now = self.shared.now();
        let mut chipset = self.shared.chipset.lock();
        let result = f(&mut chipset, now);
        self.shared.after_access(&mut chipset, Some(self.cpu));
        result
    }
}

impl Platform for VcpuPlatform {
    fn port_in(&mut self, port: u16, size: u8) -> u32 {
        count(&self.shared.exits.port_reads);
        let shared = self.shared.clone();
        self.with(|c, now| {
            let v = c.port_read(port, size, now);
            shared.feed(c);
            v
        })
    }

    fn port_out(&mut self, port: u16, size: u8, value: u32) {
        count(&self.shared.exits.port_writes);
        self.with(|c, now| c.port_write(port, size, value, now));
    }

    fn mmio_read(&mut self, gpa: u64, size: u8) -> u64 {
        count(&self.shared.exits.mmio_reads);
        let cpu = self.cpu;
        self.with(|c, now| c.mmio_read(cpu, gpa, size, now))
    }

    fn mmio_write(&mut self, gpa: u64, size: u8, value: u64) {
        count(&self.shared.exits.mmio_writes);
        let cpu = self.cpu;
        self.with(|c, now| c.mmio_write(cpu, gpa, size, value, now));
    }

    fn tsc(&mut self) -> u64 {
        self.shared.tsc(self.shared.now())
    }

    fn apic_msr_read(&mut self, msr: u32, tsc: u64) -> Option<u64> {
        count(&self.shared.exits.apic_accesses);
        let cpu = self.cpu;
        self.with(|c, now| c.apic_msr_read(cpu, msr, tsc, now))
    }

    fn apic_msr_write(&mut self, msr: u32, value: u64, tsc: u64) -> Option<()> {
        count(&self.shared.exits.apic_accesses);
        let cpu = self.cpu;
        self.with(|c, now| c.apic_msr_write(cpu, msr, value, tsc, now))
    }

    fn apic_enabled(&mut self) -> bool {
        self.shared.chipset.lock().apic_enabled(self.cpu)
    }

    fn cr8(&mut self) -> u64 {
        self.shared.chipset.lock().cr8(self.cpu)
    }

    fn set_cr8(&mut self, value: u64) {
        self.shared.chipset.lock().set_cr8(self.cpu, value);
    }

    fn interrupt_pending(&mut self) -> bool {
        let (shared, cpu) = (self.shared.clone(), self.cpu);
        self.with(|c, now| {
            c.advance(now);
            shared.feed(c);
            c.interrupt_pending(cpu)
        })
    }

    fn acknowledge(&mut self) -> Option<u8> {
        self.shared.chipset.lock().acknowledge(self.cpu)
    }

    fn take_nmi(&mut self) -> bool {
        self.shared.chipset.lock().take_nmi(self.cpu)
    }

    fn end_of_interrupt(&mut self, vector: u8) {
        self.with(|c, _| c.end_of_interrupt(vector));
    }

    fn random(&mut self) -> Option<u64> {
        let mut bytes = [0u8; 8];
        // SAFETY: the buffer is valid for its length; getrandom writes no more than that.
        let n = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        (n == 8).then(|| u64::from_le_bytes(bytes))
    }
}
