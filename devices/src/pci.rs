//! PCI configuration space (PCI 3.0 §3.2.2.3, PCI Express §7.2.2): mechanism 1 and the memory-mapped window, with a
//! host bridge as the only function.

use serde::{Deserialize, Serialize};

/// Base of the memory-mapped configuration window, 256 buses of 1 MiB.
pub const ECAM_BASE: u64 = 0xb000_0000;
/// Size of the window.
pub const ECAM_SIZE: u64 = 256 << 20;

/// Vendor 8086h, device 29C0h (Q35 host bridge); class 060000h.
const HOST_BRIDGE: [(u16, u32); 2] = [(0, 0x29c0_8086), (8, 0x0600_0000)];

/// Configuration space.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pci {
    address: u32,
    command: u16,
}

impl Pci {
    /// The doubleword of a function's register.
    fn register(&self, function: u32, register: u16) -> u32 {
        if function != 0 {
            return u32::MAX;
        }
        if register == 4 {
            return u32::from(self.command);
        }
        HOST_BRIDGE.iter().find(|r| r.0 == register).map_or(0, |r| r.1)
    }

    fn write_byte(&mut self, function: u32, register: u16, v: u8) {
        // Memory space, bus master and SERR enables can be written, nothing else.
        match (function, register) {
            (0, 4) => self.command = self.command & 0xff00 | u16::from(v & 6),
            (0, 5) => self.command = self.command & 0xff | u16::from(v & 1) << 8,
            _ => {}
        }
    }

    /// Bus, device and function, and register, of the address register; `None` while it is not enabled.
    fn selected(&self) -> Option<(u32, u16)> {
        (self.address >> 31 != 0).then_some((self.address >> 8 & 0xffff, (self.address & 0xfc) as u16))
    }

    /// Reads ports CF8h–CFFh.
    pub fn port_read(&self, port: u16) -> u32 {
        let word = if port < 0xcfc {
            self.address
        } else {
            self.selected().map_or(u32::MAX, |(function, register)| self.register(function, register))
        };
        word >> (8 * (port & 3))
    }

    /// Writes ports CF8h–CFFh.
    pub fn port_write(&mut self, port: u16, size: u8, v: u32) {
        if port == 0xcf8 && size == 4 {
            self.address = v & 0x80ff_fffc;
        } else if port >= 0xcfc
            && let Some((function, register)) = self.selected()
        {
            for k in 0..u16::from(size).min(4 - (port & 3)) {
                self.write_byte(function, register + (port & 3) + k, (v >> (8 * k)) as u8);
            }
        }
    }

    /// Reads the memory-mapped window.
    pub fn mmio_read(&self, offset: u64) -> u64 {
        let word = self.register((offset >> 12) as u32, (offset & 0xffc) as u16);
        u64::from(word) >> (8 * (offset & 3))
    }

    /// Writes the memory-mapped window.
    pub fn mmio_write(&mut self, offset: u64, size: u8, v: u64) {
        for k in 0..u64::from(size).min(8) {
            let at = offset + k;
            self.write_byte((at >> 12) as u32, (at & 0xfff) as u16, (v >> (8 * k)) as u8);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_mechanisms_see_the_host_bridge_alone() {
        let mut p = Pci::default();
        for (address, id) in [(0x8000_0000u32, 0x29c0_8086), (0x8000_0800, u32::MAX), (0, u32::MAX)] {
            p.port_write(0xcf8, 4, address);
            assert_eq!(p.port_read(0xcfc), id, "{address:#x}");
        }
        assert_eq!(p.mmio_read(2) & 0xffff, 0x29c0);
        assert_eq!(p.mmio_read(1 << 15) & 0xffff, 0xffff);
        p.mmio_write(4, 2, 0xffff);
        assert_eq!(p.mmio_read(4), 0x106);
    }
}
