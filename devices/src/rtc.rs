//! The MC146818 real-time clock and CMOS RAM (Motorola MC146818A data sheet), ports 70h and 71h.

use serde::{Deserialize, Serialize};

use crate::bus::{Nanos, StateError};

const SECOND: Nanos = 1_000_000_000;
/// Update-in-progress is seen this long before the second changes.
const UPDATE: Nanos = 244_000;

const REG_A: usize = 0x0a;
const REG_B: usize = 0x0b;
const REG_C: usize = 0x0c;
const REG_D: usize = 0x0d;
const CENTURY: usize = 0x32;

const B_SET: u8 = 0x80;
const B_BINARY: u8 = 0x04;
const B_24H: u8 = 0x02;
const C_PERIODIC: u8 = 0x40;
const C_ALARM: u8 = 0x20;
const C_UPDATE: u8 = 0x10;

/// The clock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rtc {
    index: u8,
    cmos: Vec<u8>,
    /// Wall-clock seconds since 1970 at virtual time 0, moved when the guest sets the clock.
    offset: i64,
    /// Second at which update and alarm were last looked at.
    seen: i64,
    next_periodic: Option<Nanos>,
    last: Nanos,
}

impl Rtc {
    /// A clock that shows `epoch` seconds since 1970 at virtual time 0, with the memory sizes that firmware leaves.
    pub fn new(epoch: u64, low_memory: u64, memory: u64) -> Rtc {
        let mut cmos = vec![0; 128];
        cmos[REG_A] = 0x26;
        cmos[REG_B] = B_24H;
        cmos[REG_D] = 0x80;
        let mut word = |at: usize, v: u64| {
            cmos[at] = v as u8;
            cmos[at + 1] = (v >> 8) as u8;
        };
        word(0x15, 640);
        let extended = (low_memory.saturating_sub(1 << 20) >> 10).min(0xffff);
        word(0x17, extended);
        word(0x30, extended);
        word(0x34, (low_memory.saturating_sub(16 << 20) >> 16).min(0xffff));
        let high = memory.saturating_sub(low_memory) >> 16;
        word(0x5b, high);
        word(0x5c, high >> 8);
        let offset = epoch.min(i64::MAX as u64 / 4) as i64;
        Rtc { index: 0, cmos, offset, seen: offset, next_periodic: None, last: 0 }
    }

    fn seconds(&self, now: Nanos) -> i64 {
        self.offset + (now / SECOND) as i64
    }

    /// Reads port 70h (`offset` 0) or 71h.
    pub fn read(&mut self, offset: u16, now: Nanos) -> u8 {
        if offset & 1 == 0 {
            return 0xff;
        }
        self.advance(now);
        let n = usize::from(self.index & 0x7f);
        match n {
            0..=9 if n & 1 == 0 || n > 5 => self.time_register(n, now),
            CENTURY => self.time_register(n, now),
            REG_A => {
                let uip = self.cmos[REG_B] & B_SET == 0 && now % SECOND >= SECOND - UPDATE;
                self.cmos[REG_A] & 0x7f | u8::from(uip) << 7
            }
            REG_C => std::mem::take(&mut self.cmos[REG_C]),
            _ => self.cmos[n],
        }
    }

    /// Writes port 70h or 71h.
    pub fn write(&mut self, offset: u16, v: u8, now: Nanos) {
        if offset & 1 == 0 {
            self.index = v;
            return;
        }
        self.advance(now);
        let n = usize::from(self.index & 0x7f);
        match n {
            0..=9 if n & 1 == 0 || n > 5 => self.set_time_register(n, v, now),
            CENTURY => self.set_time_register(n, v, now),
            REG_A => {
                self.cmos[REG_A] = v & 0x7f;
                self.start_periodic(now);
            }
            REG_B => {
                if v & B_SET != 0 && self.cmos[REG_B] & B_SET == 0 {
                    self.freeze(now);
                }
                let release = v & B_SET == 0 && self.cmos[REG_B] & B_SET != 0;
                self.cmos[REG_B] = v;
                if release {
                    self.thaw(now);
                }
                self.start_periodic(now);
            }
            REG_C | REG_D => {}
            _ => self.cmos[n] = v,
        }
    }

    fn period(&self) -> Option<Nanos> {
        let rate = u32::from(self.cmos[REG_A] & 15);
        // Rates 1 and 2 are those of 8 and 9; the others are 32768 Hz / 2^(rate-1).
        let rate = match rate {
            0 => return None,
            1 | 2 => rate + 7,
            n => n,
        };
        Some(SECOND * (1 << (rate - 1)) / 32768)
    }

    fn start_periodic(&mut self, now: Nanos) {
        self.next_periodic = self.period().filter(|_| self.cmos[REG_B] & C_PERIODIC != 0).map(|p| now + p);
    }

    /// Runs the clock up to `now`.
    pub fn advance(&mut self, now: Nanos) {
        self.last = now;
        if let (Some(at), Some(period)) = (self.next_periodic, self.period())
            && at <= now
        {
            self.raise(C_PERIODIC);
            self.next_periodic = Some(at + ((now - at) / period + 1) * period);
        }
        let s = self.seconds(now);
        if self.cmos[REG_B] & B_SET == 0 && s != self.seen {
            self.raise(C_UPDATE);
            // An alarm with wildcards may lie anywhere in the time that passed; a day holds every time of day.
            let from = self.seen.max(s - 86_400);
            let first = if self.cmos[REG_B] & C_ALARM != 0 { from + 1 } else { s };
            if (first..=s).any(|t| self.alarm_at(t)) {
                self.raise(C_ALARM);
            }
        }
        self.seen = s;
    }

    fn raise(&mut self, bit: u8) {
        self.cmos[REG_C] |= bit;
        if self.cmos[REG_C] & self.cmos[REG_B] & 0x70 != 0 {
            self.cmos[REG_C] |= 0x80;
        }
    }

    fn alarm_at(&self, t: i64) -> bool {
        let day = t.rem_euclid(86_400);
        let fields = [(1, day % 60), (3, day / 60 % 60), (5, day / 3600)];
        fields.iter().all(|&(at, v)| {
            let a = self.cmos[at];
            a & 0xc0 == 0xc0 || a == if at == 5 { self.encode_hour(v as u8) } else { self.encode(v as u8) }
        })
    }

    /// Whether IRQ 8 is asserted.
    pub fn irq(&self) -> bool {
        self.cmos[REG_C] & 0x80 != 0
    }

    /// Whether the alarm has gone off and its interrupt is enabled.
    pub fn alarm(&self) -> bool {
        self.cmos[REG_C] & self.cmos[REG_B] & C_ALARM != 0
    }

    /// When the clock has something to signal next.
    pub fn next_event(&self) -> Option<Nanos> {
        let update = (self.cmos[REG_B] & (C_UPDATE | C_ALARM) != 0 && self.cmos[REG_B] & B_SET == 0)
            .then(|| (self.last / SECOND + 1) * SECOND);
        [self.next_periodic, update].into_iter().flatten().min()
    }

    fn encode(&self, v: u8) -> u8 {
        if self.cmos[REG_B] & B_BINARY != 0 { v } else { v / 10 << 4 | v % 10 }
    }

    fn decode(&self, v: u8) -> u8 {
        if self.cmos[REG_B] & B_BINARY != 0 { v } else { (v >> 4).min(9) * 10 + (v & 15).min(9) }
    }

    fn encode_hour(&self, h: u8) -> u8 {
        if self.cmos[REG_B] & B_24H != 0 {
            return self.encode(h);
        }
        let twelve = if h.is_multiple_of(12) { 12 } else { h % 12 };
        self.encode(twelve) | if h >= 12 { 0x80 } else { 0 }
    }

    fn decode_hour(&self, v: u8) -> u8 {
        if self.cmos[REG_B] & B_24H != 0 {
            return self.decode(v);
        }
        self.decode(v & 0x7f) % 12 + if v & 0x80 != 0 { 12 } else { 0 }
    }

    fn time_register(&self, n: usize, now: Nanos) -> u8 {
        if self.cmos[REG_B] & B_SET != 0 {
            return self.cmos[n];
        }
        self.time_at(n, self.seconds(now))
    }

    fn time_at(&self, n: usize, t: i64) -> u8 {
        let day = t.rem_euclid(86_400);
        let days = t.div_euclid(86_400);
        let (y, m, d) = civil(days);
        match n {
            0 => self.encode((day % 60) as u8),
            2 => self.encode((day / 60 % 60) as u8),
            4 => self.encode_hour((day / 3600) as u8),
            // 1970-01-01 was a Thursday; Sunday is 1.
            6 => self.encode(((days + 4).rem_euclid(7) + 1) as u8),
            7 => self.encode(d as u8),
            8 => self.encode(m as u8),
            9 => self.encode(y.rem_euclid(100) as u8),
            _ => self.encode((y / 100).rem_euclid(100) as u8),
        }
    }

    fn set_time_register(&mut self, n: usize, v: u8, now: Nanos) {
        let running = self.cmos[REG_B] & B_SET == 0;
        if running {
            self.freeze(now);
        }
        self.cmos[n] = v;
        if running {
            self.thaw(now);
        }
    }

    /// Copies the running time into the registers.
    fn freeze(&mut self, now: Nanos) {
        let t = self.seconds(now);
        for n in [0, 2, 4, 6, 7, 8, 9, CENTURY] {
            self.cmos[n] = self.time_at(n, t);
        }
    }

    /// Sets the time to what the registers say.
    fn thaw(&mut self, now: Nanos) {
        let f = |n: usize| i64::from(self.decode(self.cmos[n]));
        let year = f(CENTURY) * 100 + f(9);
        let days = days_from_civil(year, f(8).clamp(1, 12), f(7).clamp(1, 31));
        let t = days * 86_400 + i64::from(self.decode_hour(self.cmos[4])) * 3600 + f(2) * 60 + f(0);
        self.offset = t - (now / SECOND) as i64;
        self.seen = t;
    }

    /// Checks a restored state.
    pub fn validate(&self) -> Result<(), StateError> {
        if self.cmos.len() == 128 { Ok(()) } else { Err(StateError::Invalid("real-time clock")) }
    }
}

/// Year, month and day of a day number since 1970 in the Gregorian calendar.
fn civil(days: i64) -> (i64, i64, i64) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let m = if mp < 10 { mp + 3 } else { mp - 9 };
    (yoe + era * 400 + i64::from(m <= 2), m, doy - (153 * mp + 2) / 5 + 1)
}

fn days_from_civil(y: i64, m: i64, d: i64) -> i64 {
    let y = if m <= 2 { y - 1 } else { y };
    let era = y.div_euclid(400);
    let yoe = y.rem_euclid(400);
    let doy = (153 * (m + if m > 2 { -3 } else { 9 }) + 2) / 5 + d - 1;
    era * 146_097 + yoe * 365 + yoe / 4 - yoe / 100 + doy - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(r: &mut Rtc, n: u8, now: Nanos) -> u8 {
        r.write(0, n, now);
        r.read(1, now)
    }

    fn write(r: &mut Rtc, n: u8, v: u8, now: Nanos) {
        r.write(0, n, now);
        r.write(1, v, now);
    }

    #[test]
    fn shows_and_keeps_time() {
        // 2026-11-23 18:47:05 UTC, a Monday.
        let mut r = Rtc::new(1_795_459_625, 512 << 20, 512 << 20);
        let now = 3 * SECOND;
        for (n, v) in [(0, 0x08), (2, 0x47), (4, 0x18), (6, 2), (7, 0x23), (8, 0x11), (9, 0x26), (0x32, 0x20)] {
            assert_eq!(read(&mut r, n, now), v, "register {n:#x}");
        }
        write(&mut r, 4, 0x05, now);
        assert_eq!((read(&mut r, 4, now), read(&mut r, 2, now)), (0x05, 0x47));
        write(&mut r, 0x0b, 0x04, now);
        assert_eq!(read(&mut r, 2, now), 47, "binary");
    }

    #[test]
    fn periodic_interrupt_until_status_is_read() {
        let mut r = Rtc::new(0, 1 << 20, 1 << 20);
        write(&mut r, 0x0b, C_PERIODIC | B_24H, 0);
        let at = r.next_event().unwrap_or_default();
        assert_eq!(at, SECOND / 1024);
        r.advance(at);
        assert!(r.irq());
        assert_eq!(read(&mut r, 0x0c, at), 0x80 | C_PERIODIC);
        assert!(!r.irq());
    }
}
