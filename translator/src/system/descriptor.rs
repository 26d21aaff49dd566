//! Segment descriptors: reading them from the GDT and LDT, and loading segment registers (SDM vol. 3 chapters 3, 5).

use crate::cpu::Cpu;
use crate::exception::{Exception, Trap, vector};
use crate::insn::Mode;
use crate::state::{Segment, seg};
use crate::width::{W8, W64};

/// A descriptor as it stands in its table.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    /// The selector that named it.
    pub selector: u16,
    /// Its 8 bytes.
    pub raw: u64,
    /// The second 8 bytes of a 16-byte system descriptor in long mode, else 0.
    pub high: u64,
    /// Linear address of the entry.
    pub at: u64,
}

/// System-segment and gate types (SDM vol. 3 table 3-2).
#[allow(missing_docs)]
pub mod kind {
    pub const TSS16: u32 = 1;
    pub const LDT: u32 = 2;
    pub const TSS16_BUSY: u32 = 3;
    pub const CALL_GATE16: u32 = 4;
    pub const TASK_GATE: u32 = 5;
    pub const INT_GATE16: u32 = 6;
    pub const TRAP_GATE16: u32 = 7;
    pub const TSS: u32 = 9;
    pub const TSS_BUSY: u32 = 11;
    pub const CALL_GATE: u32 = 12;
    pub const INT_GATE: u32 = 14;
    pub const TRAP_GATE: u32 = 15;
}

impl Descriptor {
    /// Access rights in [`Segment::attr`] form.
    pub fn attr(&self) -> u32 {
        (self.raw >> 40) as u32 & 0xf0ff
    }
    /// The four type bits.
    pub fn kind(&self) -> u32 {
        self.attr() & 15
    }
    /// Whether it is a code or data segment rather than a system one.
    pub fn is_segment(&self) -> bool {
        self.attr() & Segment::S != 0
    }
    /// Whether it is a code segment.
    pub fn is_code(&self) -> bool {
        self.is_segment() && self.attr() & Segment::CODE != 0
    }
    /// Whether it is a conforming code segment.
    pub fn is_conforming(&self) -> bool {
        self.attr() & Segment::EXPAND_DOWN != 0
    }
    /// Whether it is a readable code segment or a writable data segment.
    pub fn rw(&self) -> bool {
        self.attr() & Segment::RW != 0
    }
    /// Present.
    pub fn present(&self) -> bool {
        self.attr() & Segment::PRESENT != 0
    }
    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        (self.attr() >> 5 & 3) as u8
    }
    /// Base address, 64 bits for 16-byte descriptors.
    pub fn base(&self) -> u64 {
        (self.raw >> 16 & 0xff_ffff) | (self.raw >> 56) << 24 | (self.high & 0xffff_ffff) << 32
    }
    /// Limit in bytes.
    pub fn limit(&self) -> u32 {
        let limit = (self.raw & 0xffff | self.raw >> 32 & 0xf_0000) as u32;
        if self.attr() & Segment::G != 0 { limit << 12 | 0xfff } else { limit }
    }
    /// Offset of a gate.
    pub fn gate_offset(&self) -> u64 {
        self.raw & 0xffff | self.raw >> 32 & 0xffff_0000 | (self.high & 0xffff_ffff) << 32
    }
    /// Selector of a gate.
    pub fn gate_selector(&self) -> u16 {
        (self.raw >> 16) as u16
    }
    /// The segment register that loading this descriptor gives.
    pub fn segment(&self) -> Segment {
        Segment { base: self.base(), limit: self.limit(), attr: self.attr(), selector: self.selector }
    }
    /// The selector as an error code: RPL bits replaced by EXT.
    pub fn error(&self, ext: bool) -> u32 {
        selector_error(self.selector, ext)
    }
}

/// A selector as an error code (SDM vol. 3 §6.13).
pub fn selector_error(selector: u16, ext: bool) -> u32 {
    u32::from(selector & 0xfffc) | u32::from(ext)
}

/// Whether a selector is null.
pub fn is_null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

impl Cpu {
    /// Fails with a vector and a selector as error code.
    pub fn selector_fault(&mut self, v: u8, selector: u16, ext: bool) -> Trap {
        self.raise(Exception::with_error(v, selector_error(selector, ext)))
    }

    /// Reads a descriptor; `v` with the selector as error code if it is null or beyond its table's limit.
    pub fn descriptor(&mut self, selector: u16, v: u8, ext: bool) -> Result<Descriptor, Trap> {
        if is_null(selector) {
            return Err(self.raise(Exception::with_error(v, u32::from(ext))));
        }
        match self.try_descriptor(selector)? {
            Some(d) => Ok(d),
            None => Err(self.selector_fault(v, selector, ext)),
        }
    }

    /// Reads a descriptor; `None` if the selector is null or beyond its table's limit.
    pub fn try_descriptor(&mut self, selector: u16) -> Result<Option<Descriptor>, Trap> {
        if is_null(selector) {
            return Ok(None);
        }
        let index = u64::from(selector & 0xfff8);
        let (base, limit) = if selector & 4 != 0 {
            if !self.s.ldtr.present() {
                return Ok(None);
            }
            (self.s.ldtr.base, u64::from(self.s.ldtr.limit))
        } else {
            (self.s.gdtr.base, u64::from(self.s.gdtr.limit))
        };
        if index + 7 > limit {
            return Ok(None);
        }
        let at = self.wrap_linear(base.wrapping_add(index));
        let raw = self.load_system::<W64>(at)?;
        let mut d = Descriptor { selector, raw, high: 0, at };
        // LDT, TSS and call-gate descriptors have 16 bytes in IA-32e mode (SDM vol. 3 §3.5.2).
        if self.s.long_mode()
            && !d.is_segment()
            && matches!(d.kind(), kind::LDT | kind::TSS | kind::TSS_BUSY | kind::CALL_GATE)
        {
            if index + 15 > limit {
                return Ok(None);
            }
            d.high = self.load_system::<W64>(self.wrap_linear(at.wrapping_add(8)))?;
        }
        Ok(Some(d))
    }

    /// Sets the accessed bit of a code or data descriptor in its table.
    pub fn mark_accessed(&mut self, d: &mut Descriptor) -> Result<(), Trap> {
        if d.attr() & Segment::ACCESSED == 0 {
            d.raw |= 1 << 40;
            self.store_system::<W8>(self.wrap_linear(d.at.wrapping_add(5)), d.raw >> 40 & 0xff)?;
        }
        Ok(())
    }

    /// Sets or clears the busy bit of a TSS descriptor in its table.
    pub fn set_busy(&mut self, d: &Descriptor, busy: bool) -> Result<(), Trap> {
        let bit = 1 << 41;
        let raw = if busy { d.raw | bit } else { d.raw & !bit };
        self.store_system::<W8>(self.wrap_linear(d.at.wrapping_add(5)), raw >> 40 & 0xff)
    }

    /// Loads ES, SS, DS, FS or GS by MOV, POP, LxS (SDM vol. 2, MOV; vol. 3 §5.6–5.7).
    pub fn load_data_segment(&mut self, r: u8, selector: u16) -> Result<(), Trap> {
        if !self.s.protected() || self.s.vm86() {
            self.load_real_segment(r, selector);
            return Ok(());
        }
        let segment = if r == seg::SS { self.stack_segment(selector)? } else { self.data_segment(selector)? };
        self.s.seg[usize::from(r)] = segment;
        self.mode_changed();
        Ok(())
    }

    /// Loads a segment register as real and virtual-8086 mode do; the limit stays (except in VM86, where it is 64 KiB).
    pub fn load_real_segment(&mut self, r: u8, selector: u16) {
        let vm86 = self.s.vm86();
        let s = &mut self.s.seg[usize::from(r)];
        s.selector = selector;
        s.base = u64::from(selector) << 4;
        if vm86 {
            s.limit = 0xffff;
            s.attr = 0xf3;
        } else if r != seg::CS {
            s.attr |= 0x93;
        }
        self.mode_changed();
    }

    fn stack_segment(&mut self, selector: u16) -> Result<Segment, Trap> {
        let cpl = self.s.cpl;
        if is_null(selector) {
            // A null SS is allowed in 64-bit mode below CPL 3, with RPL = CPL.
            if self.mode.has(Mode::CODE64) && cpl != 3 && (selector & 3) as u8 == cpl {
                return Ok(null_segment(selector, cpl));
            }
            return Err(self.gp(0));
        }
        let mut d = self.descriptor(selector, vector::GP, false)?;
        let rpl = (selector & 3) as u8;
        if rpl != cpl || !d.is_segment() || d.is_code() || !d.rw() || d.dpl() != cpl {
            return Err(self.selector_fault(vector::GP, selector, false));
        }
        if !d.present() {
            return Err(self.selector_fault(vector::SS, selector, false));
        }
        self.mark_accessed(&mut d)?;
        Ok(d.segment())
    }

    fn data_segment(&mut self, selector: u16) -> Result<Segment, Trap> {
        if is_null(selector) {
            return Ok(Segment { selector, ..Segment::default() });
        }
        let mut d = self.descriptor(selector, vector::GP, false)?;
        let rpl = (selector & 3) as u8;
        let readable = d.is_segment() && (!d.is_code() || d.rw());
        let privileged = (d.is_code() && d.is_conforming()) || d.dpl() >= rpl.max(self.s.cpl);
        if !readable || !privileged {
            return Err(self.selector_fault(vector::GP, selector, false));
        }
        if !d.present() {
            return Err(self.selector_fault(vector::NP, selector, false));
        }
        self.mark_accessed(&mut d)?;
        Ok(d.segment())
    }

    /// After a return to an outer level: data segments that the new level may not use become null
    /// (SDM vol. 2, RET, IRET).
    pub fn null_inaccessible_segments(&mut self) {
        for r in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let s = &mut self.s.seg[usize::from(r)];
            let conforming = s.attr & (Segment::CODE | Segment::EXPAND_DOWN) == Segment::CODE | Segment::EXPAND_DOWN;
            // A register that is null already keeps its base, which FS and GS use in 64-bit mode.
            if s.present() && s.dpl() < self.s.cpl && !conforming {
                s.selector = 0;
                s.attr = 0;
                s.limit = 0;
            }
        }
    }

    /// Makes `cs` the code segment and `cpl` the privilege level.
    pub fn set_cs(&mut self, mut cs: Segment, cpl: u8) {
        cs.selector = cs.selector & 0xfffc | u16::from(cpl);
        self.s.seg[usize::from(seg::CS)] = cs;
        self.s.cpl = cpl;
        self.mode_changed();
    }
}

/// A null segment register; SS keeps the privilege level as its DPL.
pub fn null_segment(selector: u16, dpl: u8) -> Segment {
    Segment { selector, attr: u32::from(dpl) << 5, base: 0, limit: 0 }
}
