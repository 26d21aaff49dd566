//! The I/O APIC: 24 inputs to local APICs (Intel 82093AA data sheet, with the EOI register of version 20h).

use serde::{Deserialize, Serialize};

/// Number of inputs.
pub const PINS: usize = 24;

/// Redirection entry bits.
mod rte {
    pub const REMOTE_IRR: u64 = 1 << 14;
    pub const LEVEL: u64 = 1 << 15;
    pub const MASKED: u64 = 1 << 16;
    /// Delivery status and remote IRR are read-only.
    pub const READ_ONLY: u64 = 1 << 12 | REMOTE_IRR;
}

/// An interrupt message to local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Vector.
    pub vector: u8,
    /// Delivery mode (0 fixed, 1 lowest priority, 2 SMI, 4 NMI, 5 INIT, 7 ExtINT).
    pub mode: u8,
    /// Whether the destination is a logical one.
    pub logical: bool,
    /// Destination.
    pub destination: u8,
    /// Level-triggered.
    pub level: bool,
}

/// The I/O APIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApic {
    id: u32,
    select: u32,
    entries: [u64; PINS],
    /// Input levels as driven, before polarity.
    lines: u32,
    /// Edge-triggered inputs whose edge has not been sent, because they were masked.
    edges: u32,
}

impl IoApic {
    /// After reset: everything masked.
    pub fn new() -> IoApic {
        IoApic { id: 0, select: 0, entries: [rte::MASKED; PINS], lines: 0, edges: 0 }
    }

    /// Sets the active state of input `pin`.
    pub fn set_line(&mut self, pin: usize, active: bool, send: &mut dyn FnMut(Message)) {
        if pin >= PINS {
            return;
        }
        let bit = 1 << pin;
        let was = self.lines & bit != 0;
        self.lines = if active { self.lines | bit } else { self.lines & !bit };
        if active && !was {
            self.edges |= bit;
        }
        self.deliver(pin, send);
    }

    fn deliver(&mut self, pin: usize, send: &mut dyn FnMut(Message)) {
        let bit = 1u32 << pin;
        let e = self.entries[pin];
        if e & rte::MASKED != 0 {
            // An edge while masked is lost, as on the real part.
            self.edges &= !bit;
            return;
        }
        if e & rte::LEVEL != 0 {
            if self.lines & bit == 0 || e & rte::REMOTE_IRR != 0 {
                return;
            }
            self.entries[pin] |= rte::REMOTE_IRR;
        } else if self.edges & bit == 0 {
            return;
        }
        self.edges &= !bit;
        send(message(e));
    }

    /// An end of interrupt for a level-triggered vector, broadcast by a local APIC or written to the EOI register.
    pub fn end_of_interrupt(&mut self, vector: u8, send: &mut dyn FnMut(Message)) {
        for pin in 0..PINS {
            let e = self.entries[pin];
            if e as u8 == vector && e & rte::LEVEL != 0 {
                self.entries[pin] &= !rte::REMOTE_IRR;
                self.deliver(pin, send);
            }
        }
    }

    /// What level-triggered inputs that are not masked send.
    pub fn level_messages(&self) -> Vec<(usize, Message)> {
        let levels = self.entries.iter().enumerate().filter(|(_, e)| *e & (rte::MASKED | rte::LEVEL) == rte::LEVEL);
        levels.map(|(pin, &e)| (pin, message(e))).collect()
    }

    /// Reads the register at an offset of the 4 KiB window.
    pub fn read(&self, offset: u64) -> u32 {
        match offset & 0xff {
            0 => self.select,
            0x10 => match self.select {
                0 | 2 => self.id,
                1 => 0x20 | (PINS as u32 - 1) << 16,
                n => match self.entries.get((n.wrapping_sub(0x10) / 2) as usize) {
                    Some(e) if n >= 0x10 => (e >> (32 * (n & 1))) as u32,
                    _ => 0,
                },
            },
            _ => 0,
        }
    }

    /// Writes the register at an offset of the 4 KiB window.
    pub fn write(&mut self, offset: u64, v: u32, send: &mut dyn FnMut(Message)) {
        match offset & 0xff {
            0 => self.select = v & 0xff,
            0x10 => self.write_selected(v, send),
            0x40 => self.end_of_interrupt(v as u8, send),
            _ => {}
        }
    }

    fn write_selected(&mut self, v: u32, send: &mut dyn FnMut(Message)) {
        let n = self.select;
        if n == 0 {
            self.id = v & 0x0f00_0000;
            return;
        }
        let pin = (n.wrapping_sub(0x10) / 2) as usize;
        if n < 0x10 || pin >= PINS {
            return;
        }
        let old = self.entries[pin];
        let shift = 32 * (n & 1);
        let new = old & !(0xffff_ffff << shift) | u64::from(v) << shift;
        let mut new = new & !rte::READ_ONLY | old & rte::READ_ONLY;
        if new & rte::LEVEL == 0 {
            new &= !rte::REMOTE_IRR;
        }
        self.entries[pin] = new;
        self.deliver(pin, send);
    }
}

/// What a redirection entry sends.
fn message(e: u64) -> Message {
    Message {
        vector: e as u8,
        mode: (e >> 8 & 7) as u8,
        logical: e >> 11 & 1 != 0,
        destination: (e >> 56) as u8,
        level: e & rte::LEVEL != 0,
    }
}

impl Default for IoApic {
    fn default() -> Self {
        IoApic::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set_entry(a: &mut IoApic, pin: u32, e: u64, sent: &mut Vec<u8>) {
        for (k, half) in [e as u32, (e >> 32) as u32].into_iter().enumerate() {
            a.write(0, 0x10 + 2 * pin + k as u32, &mut |_| {});
            a.write(0x10, half, &mut |m| sent.push(m.vector));
        }
    }

    #[test]
    fn level_interrupt_repeats_until_the_line_drops() {
        let mut a = IoApic::new();
        let mut sent = Vec::new();
        set_entry(&mut a, 9, 0x41 | rte::LEVEL, &mut sent);
        a.set_line(9, true, &mut |m| sent.push(m.vector));
        a.set_line(9, true, &mut |m| sent.push(m.vector));
        assert_eq!(sent, [0x41], "remote IRR holds the second back");
        a.end_of_interrupt(0x41, &mut |m| sent.push(m.vector));
        assert_eq!(sent, [0x41, 0x41]);
        a.set_line(9, false, &mut |_| {});
        a.end_of_interrupt(0x41, &mut |m| sent.push(m.vector));
        assert_eq!(sent.len(), 2);
    }

    #[test]
    fn edge_interrupt_is_sent_once() {
        let mut a = IoApic::new();
        let mut sent = Vec::new();
        set_entry(&mut a, 2, 0x30, &mut sent);
        for level in [true, true, false, true] {
            a.set_line(2, level, &mut |m| sent.push(m.vector));
        }
        assert_eq!(sent, [0x30, 0x30]);
    }
}
