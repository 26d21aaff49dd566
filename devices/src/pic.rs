//! Two cascaded 8259A interrupt controllers (Intel 8259A data sheet), with the edge/level registers of PC chipsets.

use serde::{Deserialize, Serialize};

/// One 8259A.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Chip {
    irr: u8,
    isr: u8,
    imr: u8,
    /// Input levels, for edge detection.
    lines: u8,
    elcr: u8,
    base: u8,
    /// Which initialisation word is expected next: 0 none, else 2–4.
    icw: u8,
    icw4_needed: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    special_nested: bool,
    read_isr: bool,
    poll: bool,
    /// The input with the lowest priority.
    lowest: u8,
}

impl Chip {
    fn set_line(&mut self, n: u8, level: bool) {
        let bit = 1 << n;
        if self.elcr & bit != 0 {
            self.irr = if level { self.irr | bit } else { self.irr & !bit };
        } else if level && self.lines & bit == 0 {
            self.irr |= bit;
        } else if !level {
            self.irr &= !bit;
        }
        self.lines = if level { self.lines | bit } else { self.lines & !bit };
    }

    /// Inputs from the highest priority down.
    fn by_priority(&self) -> impl Iterator<Item = u8> + use<> {
        let lowest = self.lowest;
        (1..=8).map(move |k| (lowest + k) & 7)
    }

    /// The input that would interrupt now; `cascade` is the input of the other chip, which special fully nested mode
    /// lets in again.
    fn pending(&self, cascade: Option<u8>) -> Option<u8> {
        let wanted = self.irr & !self.imr;
        for n in self.by_priority() {
            let bit = 1 << n;
            let in_service = self.isr & bit != 0 && !(self.special_mask && self.imr & bit != 0);
            if in_service && !(self.special_nested && cascade == Some(n)) {
                return None;
            }
            if wanted & bit != 0 {
                return Some(n);
            }
        }
        None
    }

    fn acknowledge(&mut self, cascade: Option<u8>) -> u8 {
        let Some(n) = self.pending(cascade) else {
            // The request has gone: the spurious interrupt of input 7.
            return 7;
        };
        let bit = 1 << n;
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
        if self.auto_eoi {
            if self.rotate_on_auto_eoi {
                self.lowest = n;
            }
        } else {
            self.isr |= bit;
        }
        n
    }

    fn write_command(&mut self, v: u8) {
        if v & 0x10 != 0 {
            *self = Chip {
                lines: self.lines,
                elcr: self.elcr,
                icw: 2,
                icw4_needed: v & 1 != 0,
                lowest: 7,
                ..Chip::default()
            };
        } else if v & 8 != 0 {
            match v & 3 {
                2 => self.read_isr = false,
                3 => self.read_isr = true,
                _ => {}
            }
            self.poll = v & 4 != 0;
            match v >> 5 & 3 {
                2 => self.special_mask = false,
                3 => self.special_mask = true,
                _ => {}
            }
        } else {
            self.write_ocw2(v);
        }
    }

    fn write_ocw2(&mut self, v: u8) {
        let specific = v & 7;
        let highest = self.by_priority().find(|&n| self.isr & 1 << n != 0);
        match v >> 5 {
            0 => self.rotate_on_auto_eoi = false,
            4 => self.rotate_on_auto_eoi = true,
            1 | 5 => {
                if let Some(n) = highest {
                    self.isr &= !(1 << n);
                    if v >> 5 == 5 {
                        self.lowest = n;
                    }
                }
            }
            3 => self.isr &= !(1 << specific),
            7 => {
                self.isr &= !(1 << specific);
                self.lowest = specific;
            }
            6 => self.lowest = specific,
            _ => {}
        }
    }

    fn write_data(&mut self, v: u8) {
        match self.icw {
            2 => {
                self.base = v & 0xf8;
                self.icw = 3;
            }
            3 => self.icw = if self.icw4_needed { 4 } else { 0 },
            4 => {
                self.special_nested = v & 0x10 != 0;
                self.auto_eoi = v & 2 != 0;
                self.icw = 0;
            }
            _ => self.imr = v,
        }
    }

    fn read_command(&mut self, cascade: Option<u8>) -> u8 {
        if std::mem::take(&mut self.poll) {
            return match self.pending(cascade) {
                Some(_) => self.acknowledge(cascade) | 0x80,
                None => 0,
            };
        }
        if self.read_isr { self.isr } else { self.irr }
    }
}

/// The pair: inputs 0–7 on the first, 8–15 on the second, which feeds input 2 of the first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pic {
    chips: [Chip; 2],
}

impl Pic {
    /// Both chips as firmware leaves them: vectors from 08h and 70h on, open to the timer, the keyboard, the clock and
    /// the mouse.
    pub fn new() -> Pic {
        let chip = |base, open: u8| Chip { base, imr: !open, lowest: 7, ..Chip::default() };
        Pic { chips: [chip(0x08, 0b111), chip(0x70, 0b1_0001)] }
    }

    /// Sets the level of input `irq` (0–15).
    pub fn set_line(&mut self, irq: u8, level: bool) {
        self.chips[usize::from(irq >> 3 & 1)].set_line(irq & 7, level);
        self.cascade();
    }

    fn cascade(&mut self) {
        let level = self.chips[1].pending(None).is_some();
        self.chips[0].set_line(2, level);
    }

    /// Whether INTR is asserted.
    pub fn pending(&self) -> bool {
        self.chips[0].pending(Some(2)).is_some()
    }

    /// The interrupt-acknowledge cycle: the vector.
    pub fn acknowledge(&mut self) -> u8 {
        let n = self.chips[0].acknowledge(Some(2));
        let vector = if n == 2 {
            let m = self.chips[1].acknowledge(None);
            self.chips[1].base + m
        } else {
            self.chips[0].base + n
        };
        self.cascade();
        vector
    }

    /// Reads port 20h, 21h, A0h, A1h, 4D0h or 4D1h.
    pub fn read(&mut self, port: u16) -> u8 {
        let v = match port {
            0x20 => self.chips[0].read_command(Some(2)),
            0x21 => self.chips[0].imr,
            0xa0 => self.chips[1].read_command(None),
            0xa1 => self.chips[1].imr,
            0x4d0 => self.chips[0].elcr,
            _ => self.chips[1].elcr,
        };
        self.cascade();
        v
    }

    /// Writes port 20h, 21h, A0h, A1h, 4D0h or 4D1h.
    pub fn write(&mut self, port: u16, v: u8) {
        match port {
            0x20 => self.chips[0].write_command(v),
            0x21 => self.chips[0].write_data(v),
            0xa0 => self.chips[1].write_command(v),
            0xa1 => self.chips[1].write_data(v),
            // The timer, keyboard, cascade, clock and FPU inputs are always edge-triggered.
            0x4d0 => self.chips[0].elcr = v & 0xf8,
            _ => self.chips[1].elcr = v & 0xde,
        }
        self.cascade();
    }
}

impl Default for Pic {
    fn default() -> Self {
        Pic::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn initialised() -> Pic {
        let mut p = Pic::new();
        for (port, v) in
            [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1), (0xa0, 0x11), (0xa1, 0x38), (0xa1, 2), (0xa1, 1)]
        {
            p.write(port, v);
        }
        p.write(0x21, 0);
        p.write(0xa1, 0);
        p
    }

    #[test]
    fn priorities_and_cascade() {
        let mut p = initialised();
        p.set_line(4, true);
        p.set_line(8, true);
        assert_eq!(p.acknowledge(), 0x38, "the cascade is input 2, above input 4");
        assert!(!p.pending(), "input 4 waits for the cascade's end of interrupt");
        p.write(0xa0, 0x20);
        p.write(0x20, 0x20);
        assert_eq!(p.acknowledge(), 0x34);
    }

    #[test]
    fn withdrawn_request_is_spurious() {
        let mut p = initialised();
        p.set_line(3, true);
        assert!(p.pending());
        p.set_line(3, false);
        assert!(!p.pending());
        assert_eq!(p.acknowledge(), 0x37);
        p.write(0x20, 0x0b);
        assert_eq!(p.read(0x20), 0, "a spurious interrupt is not in service");
    }

    #[test]
    fn rotation_moves_the_priority() {
        let mut p = initialised();
        p.set_line(0, true);
        p.set_line(1, true);
        assert_eq!(p.acknowledge(), 0x30);
        p.write(0x20, 0xa0);
        p.set_line(0, false);
        p.set_line(0, true);
        assert_eq!(p.acknowledge(), 0x31, "input 0 now has the lowest priority");
    }
}
