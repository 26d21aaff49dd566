//! The images of the unit in memory: environment, FSAVE state, and the legacy region of FXSAVE and XSAVE (SDM vol. 1
//! §8.1.10, §10.5.1, §13.5.1).

use super::{Class, F80, X87, status};

/// The layout of an environment image (SDM vol. 1 figures 8-9 to 8-12).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The operand size is 32 (28 bytes) rather than 16 bits (14 bytes); 64-bit code counts as 32.
    pub wide: bool,
    /// Protected mode, with selectors, rather than real or virtual-8086 mode, with linear addresses.
    pub protected: bool,
}

impl Layout {
    /// Bytes in an environment: the FLDENV and FNSTENV operand.
    pub fn environment_size(self) -> usize {
        if self.wide { 28 } else { 14 }
    }

    /// Bytes in a state: the FRSTOR and FNSAVE operand.
    pub fn state_size(self) -> usize {
        self.environment_size() + 80
    }
}

/// An FSAVE image, of which [`Layout::state_size`] or [`Layout::environment_size`] bytes count.
pub type StateImage = [u8; 108];

impl X87 {
    /// The full tag word: 0 valid, 1 zero, 2 special, 3 empty for each physical register (SDM vol. 1 §8.1.7).
    pub fn full_tags(&self) -> u16 {
        let tag = |r: usize| match self.st[r & 7].class() {
            _ if self.ftw >> r & 1 == 0 => 3,
            Class::Normal => 0,
            Class::Zero => 1,
            _ => 2,
        };
        (0..8).fold(0, |tags, r| tags | tag(r) << (2 * r))
    }

    /// Loads a full tag word, of which only whether each register is empty matters.
    pub fn set_full_tags(&mut self, tags: u16) {
        self.ftw = (0..8).fold(0, |ftw, r| ftw | u8::from(tags >> (2 * r) & 3 != 3) << r);
    }

    /// What FNSTENV writes: the first [`Layout::environment_size`] bytes. Call [`X87::after_environment`] when they
    /// have reached memory.
    pub fn environment(&self, layout: Layout) -> StateImage {
        let (fip, fdp) = (self.fip as u32, self.fdp as u32);
        // In the real-mode layouts the pointers are linear: bits 15:0, then bits 31:16 (19:16 when narrow) above.
        let linear = |selector: u16, offset: u32| (u32::from(selector) << 4).wrapping_add(offset);
        let (lip, ldp) = (linear(self.fcs, fip), linear(self.fds, fdp));
        let fop = u32::from(self.fop & 0x7ff);
        let mut image = [0; 108];
        let words = [self.fcw, self.fsw, self.full_tags()];
        if layout.wide {
            let pointers = if layout.protected {
                [fip, u32::from(self.fcs) | fop << 16, fdp, 0xffff_0000 | u32::from(self.fds)]
            } else {
                [lip & 0xffff, lip >> 16 << 12 | fop, ldp & 0xffff, ldp >> 16 << 12]
            };
            let all = words.into_iter().map(|w| 0xffff_0000 | u32::from(w)).chain(pointers);
            for (slot, value) in image.chunks_exact_mut(4).zip(all) {
                slot.copy_from_slice(&value.to_le_bytes());
            }
        } else {
            let pointers = if layout.protected {
                [fip as u16, self.fcs, fdp as u16, self.fds]
            } else {
                [lip as u16, (lip >> 16 << 12) as u16 | fop as u16, ldp as u16, (ldp >> 16 << 12) as u16]
            };
            for (slot, value) in image.chunks_exact_mut(2).zip(words.into_iter().chain(pointers)) {
                slot.copy_from_slice(&value.to_le_bytes());
            }
        }
        image
    }

    /// FNSTENV masks all exceptions once it has stored them.
    pub fn after_environment(&mut self) {
        self.set_control(self.fcw | status::EXCEPTIONS);
    }

    /// FLDENV, of the first [`Layout::environment_size`] bytes of `image`.
    pub fn load_environment(&mut self, image: &StateImage, layout: Layout) {
        let field = |i: usize| -> u32 {
            if layout.wide {
                image.chunks_exact(4).nth(i).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            } else {
                image.chunks_exact(2).nth(i).map_or(0, |b| u32::from(u16::from_le_bytes([b[0], b[1]])))
            }
        };
        self.set_control(field(0) as u16);
        self.set_status(field(1) as u16);
        self.set_full_tags(field(2) as u16);
        if layout.protected {
            self.fip = u64::from(field(3));
            self.fcs = field(4) as u16;
            self.fdp = u64::from(field(5));
            self.fds = field(6) as u16;
            if layout.wide {
                self.fop = (field(4) >> 16) as u16 & 0x7ff;
            }
        } else {
            let linear = |low: u32, high: u32| u64::from(low & 0xffff | high >> 12 << 16);
            (self.fip, self.fcs) = (linear(field(3), field(4)), 0);
            (self.fdp, self.fds) = (linear(field(5), field(6)), 0);
            self.fop = field(4) as u16 & 0x7ff;
        }
    }

    /// What FNSAVE writes: the first [`Layout::state_size`] bytes. When they have reached memory, FNSAVE continues with
    /// [`X87::init`].
    pub fn save(&self, layout: Layout) -> StateImage {
        let mut image = self.environment(layout);
        let registers = image.iter_mut().skip(layout.environment_size());
        let bytes = (0..8u8).flat_map(|i| self.st(i).to_bits().to_le_bytes().into_iter().take(10));
        registers.zip(bytes).for_each(|(slot, byte)| *slot = byte);
        image
    }

    /// FRSTOR, of the first [`Layout::state_size`] bytes of `image`.
    pub fn restore(&mut self, image: &StateImage, layout: Layout) {
        self.load_environment(image, layout);
        let registers = image.get(layout.environment_size()..).unwrap_or_default();
        for (i, bytes) in (0..8).zip(registers.chunks_exact(10)) {
            let r = self.physical(i);
            self.st[r] = from_bytes(bytes);
        }
    }

    /// Writes the unit's part of an FXSAVE image: bytes 0–23 and 32–159. `rex_w` selects 64-bit pointers.
    pub fn fxsave(&self, image: &mut [u8; 512], rex_w: bool) {
        let head = [self.fcw, self.fsw, u16::from(self.ftw), self.fop & 0x7ff];
        for (slot, word) in image.chunks_exact_mut(2).zip(head) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
        let pointer = |offset: u64, selector: u16| {
            if rex_w { offset } else { offset & 0xffff_ffff | u64::from(selector) << 32 }
        };
        let pointers = [pointer(self.fip, self.fcs), pointer(self.fdp, self.fds)];
        for (slot, value) in image.chunks_exact_mut(8).skip(1).zip(pointers) {
            slot.copy_from_slice(&value.to_le_bytes());
        }
        for (i, slot) in (0..8).zip(image.chunks_exact_mut(16).skip(2)) {
            slot.copy_from_slice(&self.st(i).to_bits().to_le_bytes());
        }
    }

    /// Reads the unit's part of an FXSAVE image, as FXRSTOR and XRSTOR do.
    pub fn fxrstor(&mut self, image: &[u8; 512], rex_w: bool) {
        let word = |i: usize| u16::from_le_bytes([image[i & 31], image[(i & 31) + 1]]);
        let offset = |i: usize| u32::from(word(i)) | u32::from(word(i + 2)) << 16;
        self.set_control(word(0));
        self.set_status(word(2));
        self.ftw = image[4];
        self.fop = word(6) & 0x7ff;
        let pointer = |i: usize| match rex_w {
            true => (u64::from(offset(i)) | u64::from(offset(i + 4)) << 32, 0),
            false => (u64::from(offset(i)), word(i + 4)),
        };
        (self.fip, self.fcs) = pointer(8);
        (self.fdp, self.fds) = pointer(16);
        for (i, bytes) in (0..8).zip(image.chunks_exact(16).skip(2)) {
            let r = self.physical(i);
            self.st[r] = from_bytes(bytes);
        }
    }

    /// Whether the unit is in the initial configuration that XSAVE's header can leave out (SDM vol. 1 §13.6).
    pub fn is_initial(&self) -> bool {
        *self == X87::initialized()
    }
}

/// A register from the first ten of at least ten bytes.
fn from_bytes(bytes: &[u8]) -> F80 {
    F80::from_bits(bytes.iter().take(10).rev().fold(0, |bits, &b| bits << 8 | u128::from(b)))
}
