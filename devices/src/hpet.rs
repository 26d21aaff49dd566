//! The high-precision event timer (IA-PC HPET specification 1.0a): a 64-bit counter at 100 MHz and three comparators.

use serde::{Deserialize, Serialize};

use crate::bus::{Nanos, scale_up};

/// Period of the main counter in femtoseconds.
pub const PERIOD_FS: u64 = 10_000_000;
const TICK: Nanos = PERIOD_FS / 1_000_000;
const TIMERS: usize = 3;

/// General capabilities: revision 1, three timers, 64-bit, legacy replacement, vendor 8086h.
const CAPABILITIES: u64 = PERIOD_FS << 32 | 0x8086 << 16 | 1 << 15 | 1 << 13 | (TIMERS as u64 - 1) << 8 | 1;

mod config {
    pub const LEVEL: u64 = 1 << 1;
    pub const ENABLE: u64 = 1 << 2;
    pub const PERIODIC: u64 = 1 << 3;
    pub const VALUE_SET: u64 = 1 << 6;
    pub const MODE_32: u64 = 1 << 8;
    pub const ROUTE: u64 = 31 << 9;
    pub const WRITABLE: u64 = LEVEL | ENABLE | PERIODIC | VALUE_SET | MODE_32 | ROUTE;
    /// Periodic capable, 64-bit capable, routable to I/O APIC inputs 16–23 and 8, 11.
    pub const FIXED: u64 = 1 << 4 | 1 << 5 | 0x00ff_0900 << 32;
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Timer {
    config: u64,
    comparator: u64,
    period: u64,
    /// When it fires next.
    due: Option<Nanos>,
}

/// An interrupt line that a timer drives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// Replaces the 8254's IRQ 0.
    LegacyTimer,
    /// Replaces the clock's IRQ 8.
    LegacyClock,
    /// An I/O APIC input.
    Pin(u8),
}

/// The timer block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hpet {
    config: u64,
    status: u64,
    /// Counter value at `since`; it moves only while enabled.
    counter: u64,
    since: Nanos,
    timers: [Timer; TIMERS],
}

impl Hpet {
    /// After reset: stopped.
    pub fn new() -> Hpet {
        let timer = Timer { comparator: u64::MAX, ..Timer::default() };
        Hpet { config: 0, status: 0, counter: 0, since: 0, timers: [timer.clone(), timer.clone(), timer] }
    }

    fn running(&self) -> bool {
        self.config & 1 != 0
    }

    /// Whether timers 0 and 1 replace the 8254 and the clock on IRQs 0 and 8.
    pub fn legacy(&self) -> bool {
        self.config & 2 != 0
    }

    fn count(&self, now: Nanos) -> u64 {
        let elapsed = if self.running() { now.saturating_sub(self.since) / TICK } else { 0 };
        self.counter.wrapping_add(elapsed)
    }

    fn line(&self, n: usize) -> Line {
        match n {
            0 if self.legacy() => Line::LegacyTimer,
            1 if self.legacy() => Line::LegacyClock,
            _ => Line::Pin((self.timers[n].config >> 9 & 31) as u8),
        }
    }

    fn arm(&mut self, n: usize, now: Nanos) {
        let count = self.count(now);
        let running = self.running();
        let t = &mut self.timers[n];
        let width = if t.config & config::MODE_32 != 0 { u64::from(u32::MAX) } else { u64::MAX };
        let ahead = t.comparator.wrapping_sub(count) & width;
        // A comparator equal to the counter matches after a full turn.
        let ahead = if ahead == 0 { width } else { ahead };
        t.due = running.then(|| now.saturating_add(scale_up(ahead, PERIOD_FS, 1_000_000)));
    }

    fn arm_all(&mut self, now: Nanos) {
        (0..TIMERS).for_each(|n| self.arm(n, now));
    }

    /// Reads `size` bytes at an offset.
    pub fn read(&self, offset: u64, size: u8, now: Nanos) -> u64 {
        let word = match offset & !7 {
            0 => CAPABILITIES,
            0x10 => self.config,
            0x20 => self.status,
            0xf0 => self.count(now),
            at @ 0x100..0x160 => {
                let t = &self.timers[((at - 0x100) / 0x20) as usize];
                match at & 0x18 {
                    0 => t.config | config::FIXED,
                    8 => t.comparator,
                    _ => 0,
                }
            }
            _ => 0,
        };
        let shifted = word >> (8 * (offset & 7));
        if size >= 8 { shifted } else { shifted & ((1 << (8 * u32::from(size))) - 1) }
    }

    /// Writes `size` (4 or 8) bytes at an offset; other sizes are ignored.
    pub fn write(&mut self, offset: u64, size: u8, v: u64, now: Nanos) {
        let (shift, mask) = match (size, offset & 7) {
            (8, 0) => (0, u64::MAX),
            (4, 0) => (0, 0xffff_ffff),
            (4, 4) => (32, 0xffff_ffff << 32),
            _ => return,
        };
        let merge = |old: u64| old & !mask | v << shift & mask;
        match offset & !7 {
            0x10 => {
                let new = merge(self.config) & 3;
                let count = self.count(now);
                (self.counter, self.since, self.config) = (count, now, new);
                self.arm_all(now);
            }
            0x20 => self.status &= !(v << shift & mask),
            0xf0 if !self.running() => self.counter = merge(self.counter),
            at @ 0x100..0x160 => self.write_timer(((at - 0x100) / 0x20) as usize, at & 0x18, &merge, mask, now),
            _ => {}
        }
    }

    fn write_timer(&mut self, n: usize, register: u64, merge: &dyn Fn(u64) -> u64, mask: u64, now: Nanos) {
        let t = &mut self.timers[n];
        match register {
            0 => {
                t.config = merge(t.config) & config::WRITABLE;
                if t.config & (config::LEVEL | config::ENABLE) != config::LEVEL | config::ENABLE {
                    self.status &= !(1 << n);
                }
                self.arm(n, now);
            }
            8 => {
                let v = merge(t.comparator);
                if t.config & config::PERIODIC == 0 {
                    t.comparator = v;
                } else {
                    if t.config & config::VALUE_SET != 0 {
                        t.comparator = v;
                    }
                    t.period = merge(t.period);
                }
                if mask >> 63 != 0 || t.config & config::MODE_32 != 0 {
                    t.config &= !config::VALUE_SET;
                }
                self.arm(n, now);
            }
            _ => {}
        }
    }

    /// Fires the timers that are due; calls `pulse` for each edge-triggered interrupt.
    pub fn advance(&mut self, now: Nanos, pulse: &mut dyn FnMut(Line)) {
        for n in 0..TIMERS {
            if self.timers[n].due.is_none_or(|at| at > now) {
                continue;
            }
            let count = self.count(now);
            let t = &mut self.timers[n];
            if t.config & config::PERIODIC != 0 && t.period != 0 {
                let behind = count.wrapping_sub(t.comparator) / t.period;
                t.comparator = t.comparator.wrapping_add((behind + 1).wrapping_mul(t.period));
            }
            let (level, enabled) = (t.config & config::LEVEL != 0, t.config & config::ENABLE != 0);
            self.arm(n, now);
            if level {
                self.status |= 1 << n;
            } else if enabled {
                pulse(self.line(n));
            }
        }
    }

    /// The level-triggered lines that are asserted.
    pub fn levels(&self) -> impl Iterator<Item = (Line, bool)> + '_ {
        (0..TIMERS)
            .filter(|&n| self.timers[n].config & config::LEVEL != 0)
            .map(|n| (self.line(n), self.status >> n & 1 != 0 && self.timers[n].config & config::ENABLE != 0))
    }

    /// When a timer whose interrupt is enabled fires next.
    pub fn next_event(&self) -> Option<Nanos> {
        self.timers.iter().filter(|t| t.config & config::ENABLE != 0).filter_map(|t| t.due).min()
    }
}

impl Default for Hpet {
    fn default() -> Self {
        Hpet::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_fires() {
        let mut h = Hpet::new();
        h.write(0x100, 4, config::ENABLE, 0);
        h.write(0x108, 8, 50, 0);
        h.write(0x10, 4, 3, 1000);
        assert_eq!(h.read(0xf0, 8, 1100), 10);
        assert_eq!(h.next_event(), Some(1500));
        let mut lines = Vec::new();
        h.advance(1500, &mut |l| lines.push(l));
        assert_eq!(lines, [Line::LegacyTimer]);
    }

    #[test]
    fn periodic_timer_catches_up_with_one_interrupt() {
        let mut h = Hpet::new();
        h.write(0x10, 4, 1, 0);
        h.write(0x120, 4, config::ENABLE | config::PERIODIC | config::VALUE_SET | 16 << 9, 0);
        h.write(0x128, 4, 100, 0);
        h.write(0x128 + 4, 4, 0, 0);
        h.write(0x120, 4, config::ENABLE | config::PERIODIC | config::VALUE_SET | 16 << 9, 0);
        h.write(0x128, 8, 100, 0);
        let mut n = 0;
        h.advance(1_000_000, &mut |l| {
            assert_eq!(l, Line::Pin(16));
            n += 1;
        });
        assert_eq!(n, 1);
        assert_eq!(h.next_event(), Some(1_001_000));
    }
}
