//! The 8254 programmable interval timer (Intel 8254 data sheet).

use serde::{Deserialize, Serialize};

use crate::bus::{Nanos, scale, scale_up};

/// Input clock.
pub const PIT_HZ: u64 = 1_193_182;
const NANOS: u64 = 1_000_000_000;

/// One counter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Counter {
    mode: u8,
    bcd: bool,
    /// 1 low byte, 2 high byte, 3 both.
    access: u8,
    /// Programmed count, 1 to 65536 (or 10000 in BCD).
    reload: u32,
    /// Low byte of a two-byte write that waits for its high byte.
    write_low: Option<u8>,
    /// Whether the next read of a two-byte count gives the high byte.
    read_high: bool,
    latched: Option<u16>,
    status: Option<u8>,
    gate: bool,
    /// When the count was loaded; `None` while no count is.
    started: Option<Nanos>,
}

impl Counter {
    fn ticks(&self, now: Nanos) -> Option<u64> {
        self.started.map(|s| scale(now.saturating_sub(s), PIT_HZ, NANOS))
    }

    fn modulus(&self) -> u64 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    fn count(&self, now: Nanos) -> u16 {
        let Some(t) = self.ticks(now) else { return 0 };
        let n = u64::from(self.reload.max(1));
        let value = match self.mode {
            2 => n - t % n,
            3 => n - (2 * t) % n,
            // The others go on counting down through zero.
            _ => (n + self.modulus() - t % self.modulus()) % self.modulus(),
        };
        if self.bcd { to_bcd((value % 10_000) as u16) } else { value as u16 }
    }

    fn output(&self, now: Nanos) -> bool {
        let Some(t) = self.ticks(now) else { return self.mode != 0 };
        let n = u64::from(self.reload.max(1));
        match self.mode {
            0 | 1 => t >= n,
            2 => t % n != n - 1 || t == 0,
            3 => t % n < n.div_ceil(2),
            _ => t != n,
        }
    }

    fn write(&mut self, v: u8, now: Nanos) {
        let raw = match (self.access, self.write_low) {
            (1, _) => u16::from(v),
            (2, _) => u16::from(v) << 8,
            (_, None) => {
                self.write_low = Some(v);
                return;
            }
            (_, Some(low)) => u16::from(v) << 8 | u16::from(low),
        };
        self.write_low = None;
        let n = if self.bcd { u32::from(from_bcd(raw)) } else { u32::from(raw) };
        self.reload = if n == 0 { self.modulus() as u32 } else { n };
        // Modes 1 and 5 wait for the gate.
        self.started = (!matches!(self.mode, 1 | 5)).then_some(now);
    }

    fn read(&mut self, now: Nanos) -> u8 {
        if let Some(s) = self.status.take() {
            return s;
        }
        let value = self.latched.unwrap_or_else(|| self.count(now));
        let high = match self.access {
            1 => false,
            2 => true,
            _ => {
                self.read_high = !self.read_high;
                !self.read_high
            }
        };
        if self.access != 3 || high {
            self.latched = None;
        }
        (if high { value >> 8 } else { value }) as u8
    }

    fn latch_status(&mut self, now: Nanos) {
        let null = u8::from(self.started.is_none());
        let status =
            u8::from(self.output(now)) << 7 | null << 6 | self.access << 4 | self.mode << 1 | u8::from(self.bcd);
        self.status.get_or_insert(status);
    }

    /// The next rising edge of the output after `now`.
    fn next_edge(&self, now: Nanos) -> Option<Nanos> {
        let s = self.started?;
        let n = u64::from(self.reload.max(1));
        let t = self.ticks(now)?;
        let at = match self.mode {
            2 | 3 => (t / n + 1) * n,
            4 | 5 => n + 1,
            _ => n,
        };
        (at > t || matches!(self.mode, 2 | 3)).then(|| s.saturating_add(scale_up(at, NANOS, PIT_HZ)))
    }
}

fn to_bcd(v: u16) -> u16 {
    v % 10 | v / 10 % 10 << 4 | v / 100 % 10 << 8 | v / 1000 % 10 << 12
}

fn from_bcd(v: u16) -> u16 {
    (0..4).rev().fold(0, |n, k| n * 10 + (v >> (4 * k) & 15).min(9))
}

/// The timer: counter 0 interrupts, counter 2 drives the speaker and is gated by port 61h.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pit {
    counters: [Counter; 3],
    /// When counter 0's next edge is due.
    due: Option<Nanos>,
}

impl Pit {
    /// As firmware leaves it at `now`: counter 0 is the clock of 18.2 Hz, the others do not run.
    pub fn new(now: Nanos) -> Pit {
        let c = Counter { access: 3, reload: 0x1_0000, gate: true, ..Counter::default() };
        let clock = Counter { mode: 2, started: Some(now), ..c.clone() };
        let due = clock.next_edge(now);
        Pit { counters: [clock, c.clone(), Counter { gate: false, ..c }], due }
    }

    /// Reads port 40h–43h (`offset` 0–3).
    pub fn read(&mut self, offset: u16, now: Nanos) -> u8 {
        match self.counters.get_mut(usize::from(offset)) {
            Some(c) => c.read(now),
            None => 0xff,
        }
    }

    /// Writes port 40h–43h.
    pub fn write(&mut self, offset: u16, v: u8, now: Nanos) {
        if let Some(c) = self.counters.get_mut(usize::from(offset)) {
            c.write(v, now);
        } else if v >> 6 == 3 {
            self.read_back(v, now);
        } else {
            let c = &mut self.counters[usize::from(v >> 6)];
            if v >> 4 & 3 == 0 {
                let count = c.count(now);
                c.latched.get_or_insert(count);
            } else {
                c.access = v >> 4 & 3;
                let mode = v >> 1 & 7;
                c.mode = if mode > 5 { mode & 3 } else { mode };
                c.bcd = v & 1 != 0;
                (c.started, c.write_low, c.read_high, c.latched, c.status) = (None, None, false, None, None);
            }
        }
        self.due = self.counters[0].next_edge(now);
    }

    fn read_back(&mut self, v: u8, now: Nanos) {
        for k in (0..3).filter(|k| v >> (k + 1) & 1 != 0) {
            let c = &mut self.counters[k];
            if v & 0x20 == 0 {
                let count = c.count(now);
                c.latched.get_or_insert(count);
            }
            if v & 0x10 == 0 {
                c.latch_status(now);
            }
        }
    }

    /// Sets counter 2's gate.
    pub fn set_gate2(&mut self, gate: bool, now: Nanos) {
        let c = &mut self.counters[2];
        // A rising gate (re)starts the modes that it triggers.
        if gate && !c.gate && matches!(c.mode, 1 | 2 | 3 | 5) {
            c.started = Some(now);
        }
        c.gate = gate;
    }

    /// Counter 2's output.
    pub fn output2(&self, now: Nanos) -> bool {
        self.counters[2].output(now)
    }

    /// Whether counter 0's output rose since the last call. Missed periods make one edge.
    pub fn advance(&mut self, now: Nanos) -> bool {
        let due = self.due.is_some_and(|at| at <= now);
        if due {
            self.due = self.counters[0].next_edge(now).filter(|&at| at > now);
        }
        due
    }

    /// When counter 0's output rises next.
    pub fn next_event(&self) -> Option<Nanos> {
        self.due
    }
}

impl Default for Pit {
    fn default() -> Self {
        Pit::new(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(p: &mut Pit, counter: u8, mode: u8, count: u16) {
        p.write(3, counter << 6 | 0x30 | mode << 1, 0);
        p.write(u16::from(counter), count as u8, 0);
        p.write(u16::from(counter), (count >> 8) as u8, 0);
    }

    #[test]
    fn rate_generator_interrupts_at_its_period() {
        let mut p = Pit::new(0);
        program(&mut p, 0, 2, 11932); // about 100 Hz
        let first = p.next_event().unwrap_or_default();
        assert!((9_999_000..10_001_000).contains(&first), "{first}");
        assert!(!p.advance(first - 1));
        assert!(p.advance(first));
        assert!(p.advance(first + 50_000_000) && !p.advance(first + 50_000_001), "missed periods are one edge");
    }

    #[test]
    fn one_shot_counts_down_and_raises_its_output() {
        let mut p = Pit::new(0);
        p.set_gate2(true, 0);
        program(&mut p, 2, 0, 0xffff);
        assert!(!p.output2(0));
        p.write(3, 0x80, 1_000_000); // latch
        let (low, high) = (p.read(2, 2_000_000), p.read(2, 3_000_000));
        let count = u32::from(low) | u32::from(high) << 8;
        assert_eq!(count, 0xffff - 1193);
        assert!(p.output2(60_000_000));
    }

    #[test]
    fn bcd_round_trip() {
        for v in [0u16, 9, 10, 1234, 9999] {
            assert_eq!(from_bcd(to_bcd(v)), v);
        }
    }
}
