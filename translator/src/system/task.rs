//! Task switches (SDM vol. 3 chapter 7): 16- and 32-bit task-state segments, outside IA-32e mode.

use crate::cpu::Cpu;
use crate::exception::{Exception, Trap, vector};
use crate::mmu::walk::load_pdptes;
use crate::state::{Segment, cr, flag, seg};
use crate::system::descriptor::{Descriptor, is_null, kind};
use crate::width::{W8, W16, W32};

/// DR6.BT: the new task's T flag.
const DR6_BT: u64 = 1 << 15;

/// What starts a task switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// JMP: the old task is no longer busy.
    Jump,
    /// CALL: the new task links back to the old one.
    Call,
    /// An exception or interrupt through a task gate: links back too.
    Event,
    /// IRET with NT set: returns to the linked task.
    Return,
}

/// The dynamic part of a task-state segment.
struct Image {
    ip: u64,
    flags: u64,
    gpr: [u64; 8],
    seg: [u16; 6],
    ldt: u16,
    cr3: Option<u64>,
    trap: bool,
}

impl Cpu {
    /// Switches to the task of `selector`. `return_ip` is what the old task resumes at. Faults after the switch is
    /// committed are raised in the new task.
    pub fn task_switch(&mut self, selector: u16, cause: Cause, return_ip: u64, ext: bool) -> Result<(), Trap> {
        let v = if cause == Cause::Return { vector::TS } else { vector::GP };
        if selector & 4 != 0 {
            return Err(self.selector_fault(v, selector, ext));
        }
        let d = self.descriptor(selector, v, ext)?;
        let busy = matches!(d.kind(), kind::TSS16_BUSY | kind::TSS_BUSY);
        let available = matches!(d.kind(), kind::TSS16 | kind::TSS);
        let right_kind = if cause == Cause::Return { busy } else { available };
        if d.is_segment() || !right_kind {
            return Err(self.selector_fault(v, selector, ext));
        }
        if !d.present() {
            return Err(self.selector_fault(vector::NP, selector, ext));
        }
        let wide = d.kind() & 8 != 0;
        if d.limit() < if wide { 0x67 } else { 0x2b } {
            return Err(self.selector_fault(vector::TS, selector, ext));
        }
        let image = self.read_tss(d.base(), wide)?;
        let old_tr = self.s.tr;
        self.save_to_tss(return_ip, cause)?;
        if matches!(cause, Cause::Jump | Cause::Return)
            && let Some(old) = self.try_descriptor(old_tr.selector)?
        {
            self.set_busy(&old, false)?;
        }
        if matches!(cause, Cause::Call | Cause::Event) {
            self.store_system::<W16>(d.base(), u64::from(old_tr.selector))?;
        }
        if cause != Cause::Return {
            self.set_busy(&d, true)?;
        }
        // From here on the switch is committed.
        let mut tr = d.segment();
        tr.attr |= 2;
        self.s.tr = tr;
        self.s.cr0 |= cr::CR0_TS;
        self.load_image(&image, matches!(cause, Cause::Call | Cause::Event), wide);
        let result = self.enter_task(&image, ext);
        self.mode_changed();
        self.late_fault = result.is_err();
        result
    }

    fn enter_task(&mut self, image: &Image, ext: bool) -> Result<(), Trap> {
        self.load_task_segments(image, ext)?;
        if image.trap {
            self.pending_debug |= DR6_BT;
        }
        if self.s.rip > u64::from(self.s.seg[usize::from(seg::CS)].limit) {
            return Err(self.gp(u32::from(ext)));
        }
        Ok(())
    }

    /// Makes a fault of an instruction that has already switched tasks one that follows it.
    pub fn late(&mut self, result: Result<(), Trap>) -> Result<(), Trap> {
        if self.late_fault { Ok(()) } else { result }
    }

    fn read_tss(&mut self, base: u64, wide: bool) -> Result<Image, Trap> {
        let at = |cpu: &mut Cpu, offset32: u64, offset16: u64, word: bool| {
            let linear = cpu.wrap_linear(base.wrapping_add(if wide { offset32 } else { offset16 }));
            if wide && !word { cpu.load_system::<W32>(linear) } else { cpu.load_system::<W16>(linear) }
        };
        let mut image = Image {
            ip: at(self, 0x20, 0x0e, false)?,
            flags: at(self, 0x24, 0x10, false)?,
            gpr: [0; 8],
            seg: [0; 6],
            ldt: at(self, 0x60, 0x2a, true)? as u16,
            cr3: None,
            trap: false,
        };
        for r in 0..8 {
            image.gpr[r as usize] = at(self, 0x28 + 4 * r, 0x12 + 2 * r, false)?;
        }
        for r in 0..if wide { 6 } else { 4 } {
            image.seg[r as usize] = at(self, 0x48 + 4 * r, 0x22 + 2 * r, true)? as u16;
        }
        if wide {
            if self.s.cr0 & cr::CR0_PG != 0 {
                image.cr3 = Some(at(self, 0x1c, 0x1c, false)?);
            }
            image.trap = at(self, 0x64, 0x64, true)? & 1 != 0;
        }
        Ok(image)
    }

    fn save_to_tss(&mut self, return_ip: u64, cause: Cause) -> Result<(), Trap> {
        let tr = self.s.tr;
        let wide = tr.kind() & 8 != 0;
        let (first, len) = if wide { (0x20u64, 0x40u64) } else { (0x0e, 0x1c) };
        self.probe_write_system(self.wrap_linear(tr.base.wrapping_add(first)), len)?;
        let mut flags = self.s.flags();
        if cause == Cause::Return {
            flags &= !flag::NT;
        }
        let put = |cpu: &mut Cpu, offset32: u64, offset16: u64, word: bool, v: u64| {
            let linear = cpu.wrap_linear(tr.base.wrapping_add(if wide { offset32 } else { offset16 }));
            if wide && !word { cpu.store_system::<W32>(linear, v) } else { cpu.store_system::<W16>(linear, v) }
        };
        put(self, 0x20, 0x0e, false, return_ip)?;
        put(self, 0x24, 0x10, false, flags)?;
        for r in 0..8 {
            let v = self.s.gpr[r as usize];
            put(self, 0x28 + 4 * r, 0x12 + 2 * r, false, v)?;
        }
        for r in 0..if wide { 6 } else { 4 } {
            let v = u64::from(self.s.seg[r as usize].selector);
            put(self, 0x48 + 4 * r, 0x22 + 2 * r, true, v)?;
        }
        Ok(())
    }

    fn load_image(&mut self, image: &Image, nested: bool, wide: bool) {
        if let Some(cr3) = image.cr3
            && cr3 != self.s.cr3
        {
            self.s.cr3 = cr3;
            if self.s.cr4 & cr::CR4_PAE != 0 {
                self.mmu.pdpte = load_pdptes(&self.ram, cr3).unwrap_or_default();
            }
            self.switch_address_space(false);
        }
        let upper = if wide { 0 } else { 0xffff_0000 };
        for (r, &v) in image.gpr.iter().enumerate() {
            self.s.gpr[r] = if wide { v } else { v | upper };
        }
        let nt = if nested { flag::NT } else { 0 };
        self.s.set_flags(image.flags | nt);
        self.s.rip = image.ip;
        self.s.dr[7] &= !0x155;
        self.watch_changed();
        for (r, &selector) in image.seg.iter().enumerate() {
            self.s.seg[r] = Segment { selector, ..Segment::default() };
        }
        self.s.ldtr = Segment { selector: image.ldt, ..Segment::default() };
        self.mode_changed();
    }

    fn load_task_segments(&mut self, image: &Image, ext: bool) -> Result<(), Trap> {
        if !is_null(image.ldt) {
            let d = match self.try_global(image.ldt)? {
                Some(d) if !d.is_segment() && d.kind() == kind::LDT && d.present() => d,
                _ => return Err(self.selector_fault(vector::TS, image.ldt, ext)),
            };
            self.s.ldtr = d.segment();
        }
        if self.s.vm86() {
            self.s.cpl = 3;
            for (r, &selector) in image.seg.iter().enumerate() {
                self.load_real_segment(r as u8, selector);
            }
            return Ok(());
        }
        let cs_selector = image.seg[usize::from(seg::CS)];
        let cpl = (cs_selector & 3) as u8;
        self.s.cpl = cpl;
        let ss = self.task_segment(
            image.seg[usize::from(seg::SS)],
            |d| !d.is_code() && d.rw() && d.dpl() == cpl && (d.selector & 3) as u8 == cpl,
            vector::SS,
            ext,
        )?;
        self.s.seg[usize::from(seg::SS)] = ss;
        let cs = self.task_segment(
            cs_selector,
            |d| d.is_code() && if d.is_conforming() { d.dpl() <= cpl } else { d.dpl() == cpl },
            vector::NP,
            ext,
        )?;
        self.s.seg[usize::from(seg::CS)] = cs;
        for r in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let selector = image.seg[usize::from(r)];
            if is_null(selector) {
                continue;
            }
            let rpl = (selector & 3) as u8;
            let s = self.task_segment(
                selector,
                |d| (!d.is_code() || d.rw()) && ((d.is_code() && d.is_conforming()) || d.dpl() >= rpl.max(cpl)),
                vector::NP,
                ext,
            )?;
            self.s.seg[usize::from(r)] = s;
        }
        self.mode_changed();
        Ok(())
    }

    fn try_global(&mut self, selector: u16) -> Result<Option<Descriptor>, Trap> {
        if selector & 4 != 0 { Ok(None) } else { self.try_descriptor(selector) }
    }

    fn task_segment(
        &mut self,
        selector: u16,
        allowed: impl FnOnce(&Descriptor) -> bool,
        absent: u8,
        ext: bool,
    ) -> Result<Segment, Trap> {
        let mut d = self.descriptor(selector, vector::TS, ext)?;
        if !d.is_segment() || !allowed(&d) {
            return Err(self.selector_fault(vector::TS, selector, ext));
        }
        if !d.present() {
            return Err(self.selector_fault(absent, selector, ext));
        }
        self.mark_accessed(&mut d)?;
        Ok(d.segment())
    }

    /// The I/O permission of a port range for CPL > IOPL or virtual-8086 mode: the TSS bitmap (SDM vol. 1 §19.5.2).
    pub fn check_io_bitmap(&mut self, port: u16, size: u8) -> Result<(), Trap> {
        let tr = self.s.tr;
        let denied = Exception::with_error(vector::GP, 0);
        if tr.kind() & 8 == 0 || !tr.present() || tr.limit < 0x67 {
            return Err(self.raise(denied));
        }
        let base = self.load_system::<W16>(self.wrap_linear(tr.base.wrapping_add(0x66)))?;
        let at = base + u64::from(port / 8);
        // Two bytes are read always, so the bitmap ends with a byte of ones inside the limit.
        if at + 1 > u64::from(tr.limit) {
            return Err(self.raise(denied));
        }
        let low = self.load_system::<W8>(self.wrap_linear(tr.base.wrapping_add(at)))?;
        let high = self.load_system::<W8>(self.wrap_linear(tr.base.wrapping_add(at + 1)))?;
        let bits = (low | high << 8) >> (port % 8);
        if bits & ((1 << size) - 1) != 0 { Err(self.raise(denied)) } else { Ok(()) }
    }
}
