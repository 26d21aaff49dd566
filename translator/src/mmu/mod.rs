//! Linear memory as the guest sees it: translation through the soft TLB, with every fault exact.
//!
//! The fast path is one compare and one add; everything else (misses, page crossings, MMIO, stores to pages that
//! hold translated code) is in the slow path here.

mod fetched;
pub mod tlb;
pub mod walk;

use std::sync::atomic::{Ordering, fence};

use crate::addr::{PAGE_MASK, PAGE_SIZE, is_canonical};
use crate::cpu::{Again, Cpu, HOST_REORDERS, Locked};
use crate::exception::{Exception, Trap, vector};
use crate::mem::granule_mask;
use crate::state::{cr, flag, seg};
use crate::width::{W8, W16, W32, W64, Width};
use fetched::Fetched;
use tlb::{CHECKED, Class, EMPTY, GLOBAL, JumpFlush, KEY_SHIFT, SLOW, TlbEntry, WATCHED};
use walk::{Access, Paging, Walk, walk};

/// Of so many stores to pages that held code once, one makes those to its page fast again: to make them slow all tables are
/// searched.
const RELUCTANCE: u32 = 16;
/// Bytes that string instructions copy at once: nothing else is looked at meanwhile.
const MOST_DIRECT: u64 = 1 << 16;
/// Entries of the code TLB.
const CODE_ENTRIES: usize = 1024;

/// One translation for instruction fetch.
#[derive(Clone, Copy)]
struct CodeEntry {
    /// Page address combined with the address-space salt ([`Cpu::code_key`]).
    key: u64,
    gpa_page: u64,
}

/// The MMU state of a vCPU.
pub struct Mmu {
    /// Data translations.
    pub tlb: tlb::Tlb,
    code: Box<[CodeEntry; CODE_ENTRIES]>,
    /// PDPTE registers.
    pub pdpte: [u64; 4],
    /// Linear pages that instructions were fetched from since the jump cache was last emptied.
    fetched: Fetched,
    /// Whether instructions were fetched in the upper half through a translation that is not global: what is keyed by
    /// such an address holds in this address space only.
    private_upper: bool,
    /// Slow stores to pages that hold no code any more.
    stores_behind_code: u32,
    /// Counters for statistics.
    pub counts: MmuCounts,
}

/// What the MMU counted.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, Default)]
pub struct MmuCounts {
    pub tlb_misses: u64,
    pub code_tlb_misses: u64,
    pub flushes: u64,
    pub page_flushes: u64,
    pub smc_stores: u64,
}

impl Default for Mmu {
    /// An MMU with nothing cached.
    fn default() -> Mmu {
        Mmu {
            tlb: tlb::Tlb::new(),
            code: Box::new([CodeEntry { key: EMPTY, gpa_page: 0 }; CODE_ENTRIES]),
            pdpte: [0; 4],
            fetched: Fetched::default(),
            private_upper: false,
            stores_behind_code: 0,
            counts: MmuCounts::default(),
        }
    }
}

/// A linear range of at most two pages, translated.
#[derive(Clone, Copy)]
struct Translated {
    gpa: u64,
    /// Host address of the byte, if it is RAM.
    host: Option<*mut u8>,
}

impl Cpu {
    fn paging(&self) -> Paging {
        let s = &self.s;
        let counts = |bit| s.long_mode() && s.cr4 & bit != 0;
        Paging {
            cr0: s.cr0,
            cr3: s.cr3,
            cr4: s.cr4,
            efer: s.efer,
            pdpte: self.mmu.pdpte,
            user_keys: if counts(cr::CR4_PKE) { s.pkru } else { 0 },
            supervisor_keys: if counts(cr::CR4_PKS) { s.msr.pkrs } else { 0 },
        }
    }

    /// The class of data accesses by the running code.
    pub fn access_class(&self) -> Class {
        if self.s.cpl == 3 {
            let aligned = self.s.cr0 & cr::CR0_AM != 0 && self.s.rflags & flag::AC != 0;
            if aligned { Class::UserAligned } else { Class::User }
        } else if self.s.cr4 & cr::CR4_SMAP == 0 || self.s.rflags & flag::AC != 0 {
            Class::Supervisor
        } else {
            Class::SupervisorSmap
        }
    }

    /// The class of implicit supervisor accesses to descriptor tables and task-state segments (SDM vol. 3 §4.6.1).
    fn system_class(&self) -> Class {
        if self.s.cr4 & cr::CR4_SMAP == 0 { Class::Supervisor } else { Class::SupervisorSmap }
    }

    /// Loads `W` from a linear address as the running code.
    #[inline(always)]
    pub fn load_linear<W: Width>(&mut self, linear: u64) -> Result<u64, Trap> {
        let e = self.tlb_entry(linear);
        if e.read == linear & !PAGE_MASK && linear & PAGE_MASK <= PAGE_SIZE - W::BYTES {
            // SAFETY: a read tag that equals the page says that `addend + linear` is the host address of this byte in
            // guest RAM, and the access stays inside the page.
            let value = unsafe { read_host::<W>(e.addend.wrapping_add(linear) as *const u8) };
            self.loaded();
            return Ok(value);
        }
        self.check_alignment(linear, W::BYTES)?;
        self.load_slow(linear, W::BYTES as usize, self.class)
    }

    /// Raises #AC for a misaligned operand of `len` bytes, a power of two, if alignment is checked (SDM vol. 3 §6.15).
    /// Processors find it before they translate the address, which they have found to be canonical before.
    #[inline]
    pub fn check_alignment(&mut self, linear: u64, len: u64) -> Result<(), Trap> {
        if self.class == Class::UserAligned && linear & (len - 1) != 0 {
            self.check_canonical(linear, len)?;
            return Err(self.raise(Exception::with_error(vector::AC, 0)));
        }
        Ok(())
    }

    /// Raises #GP, or #SS for an access through SS, if the first or the last of `len` bytes has no canonical address.
    #[inline]
    pub fn check_canonical(&mut self, linear: u64, len: u64) -> Result<(), Trap> {
        let last = linear.wrapping_add(len - 1);
        if self.s.long_mode() && !(is_canonical(linear) && is_canonical(last)) {
            // The caller knows whether the access went through SS; #GP is the rule for everything else.
            let v = if self.through_ss { vector::SS } else { vector::GP };
            return Err(self.raise(Exception::with_error(v, 0)));
        }
        Ok(())
    }

    /// Loads `W` that the same instruction stores back: a page that may not be written faults as a write first.
    #[inline(always)]
    pub fn load_linear_rmw<W: Width>(&mut self, linear: u64) -> Result<u64, Trap> {
        let e = self.tlb_entry(linear);
        let known = e.write != EMPTY && e.write & !PAGE_MASK == linear & !PAGE_MASK;
        if !known || linear & PAGE_MASK > PAGE_SIZE - W::BYTES {
            self.check_alignment(linear, W::BYTES)?;
            self.probe_write(linear, W::BYTES)?;
        }
        self.load_linear::<W>(linear)
    }

    /// Stores `W` to a linear address as the running code.
    #[inline(always)]
    pub fn store_linear<W: Width>(&mut self, linear: u64, value: u64) -> Result<(), Trap> {
        self.storing();
        let e = self.tlb_entry(linear);
        if e.write == linear & !PAGE_MASK && linear & PAGE_MASK <= PAGE_SIZE - W::BYTES {
            // SAFETY: as in `load_linear`, for the write tag.
            unsafe { write_host::<W>(e.addend.wrapping_add(linear) as *mut u8, value) };
            return Ok(());
        }
        self.check_alignment(linear, W::BYTES)?;
        self.store_slow(linear, W::BYTES as usize, value, self.class)
    }

    /// As [`Cpu::load_linear`], for elements of masked moves and gathers, which are not checked for alignment.
    #[inline]
    pub fn load_element<W: Width>(&mut self, linear: u64) -> Result<u64, Trap> {
        if self.class == Class::UserAligned {
            return self.load_slow(linear, W::BYTES as usize, self.class);
        }
        self.load_linear::<W>(linear)
    }

    /// As [`Cpu::store_linear`], for elements of masked moves.
    #[inline]
    pub fn store_element<W: Width>(&mut self, linear: u64, value: u64) -> Result<(), Trap> {
        if self.class == Class::UserAligned {
            return self.store_slow(linear, W::BYTES as usize, value, self.class);
        }
        self.store_linear::<W>(linear, value)
    }

    /// Loads `W` as an implicit supervisor access (descriptor tables, TSS).
    pub fn load_system<W: Width>(&mut self, linear: u64) -> Result<u64, Trap> {
        self.through_ss = false;
        self.load_slow(linear, W::BYTES as usize, self.system_class())
    }

    /// Stores `W` as an implicit supervisor access.
    pub fn store_system<W: Width>(&mut self, linear: u64, value: u64) -> Result<(), Trap> {
        self.through_ss = false;
        self.store_slow(linear, W::BYTES as usize, value, self.system_class())
    }

    /// Checks that `len` (at most a page) bytes at `linear` may be written by the running code, without writing.
    pub fn probe_write(&mut self, linear: u64, len: u64) -> Result<(), Trap> {
        self.probe(linear, len, Access::Write, self.class)
    }

    /// Checks that `len` (at most a page) bytes at `linear` may be read by the running code.
    pub fn probe_read(&mut self, linear: u64, len: u64) -> Result<(), Trap> {
        self.probe(linear, len, Access::Read, self.class)
    }

    /// Checks that `len` bytes at `linear` may be written by an implicit supervisor access.
    pub fn probe_write_system(&mut self, linear: u64, len: u64) -> Result<(), Trap> {
        self.probe(linear, len, Access::Write, self.system_class())
    }

    fn probe(&mut self, linear: u64, len: u64, access: Access, class: Class) -> Result<(), Trap> {
        self.check_canonical(linear, len.max(1))?;
        self.translate(linear, access, class)?;
        let last = self.wrap_linear(linear.wrapping_add(len.max(1) - 1));
        if (linear ^ last) & !PAGE_MASK != 0 {
            // A fault there has the address of the page's first byte.
            self.translate(last & !PAGE_MASK, access, class)?;
        }
        Ok(())
    }

    /// Reads bytes (at most two pages' worth of one instruction's operand) into `out`.
    pub fn load_bytes(&mut self, linear: u64, out: &mut [u8]) -> Result<(), Trap> {
        let e = self.tlb_entry(linear);
        if e.read == linear & !PAGE_MASK && (linear & PAGE_MASK) + out.len() as u64 <= PAGE_SIZE {
            let host = e.addend.wrapping_add(linear) as *const u8;
            // SAFETY: as in `load_linear`, for `out.len()` bytes inside the page; `out` is not guest RAM.
            unsafe { std::ptr::copy_nonoverlapping(host, out.as_mut_ptr(), out.len()) };
            self.loaded();
            return Ok(());
        }
        self.probe(linear, out.len() as u64, Access::Read, self.class)?;
        let room = (PAGE_SIZE - (linear & PAGE_MASK)) as usize;
        if room < out.len() {
            let (first, second) = out.split_at_mut(room);
            self.load_bytes(linear, first)?;
            return self.load_bytes(self.wrap_linear(linear.wrapping_add(room as u64)), second);
        }
        let mut done = 0;
        while done < out.len() {
            let n = (out.len() - done).min(8);
            let at = self.wrap_linear(linear.wrapping_add(done as u64));
            let v = self.load_slow(at, n, self.class)?;
            out[done..done + n].copy_from_slice(&v.to_le_bytes()[..n]);
            done += n;
        }
        Ok(())
    }

    /// Writes bytes of one instruction's operand; nothing is written when any of them may not be.
    pub fn store_bytes(&mut self, linear: u64, bytes: &[u8]) -> Result<(), Trap> {
        self.storing();
        let e = self.tlb_entry(linear);
        if e.write == linear & !PAGE_MASK && (linear & PAGE_MASK) + bytes.len() as u64 <= PAGE_SIZE {
            let host = e.addend.wrapping_add(linear) as *mut u8;
            // SAFETY: as in `store_linear`, for `bytes.len()` bytes inside the page; `bytes` is not guest RAM.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), host, bytes.len()) };
            return Ok(());
        }
        self.probe(linear, bytes.len() as u64, Access::Write, self.class)?;
        let room = (PAGE_SIZE - (linear & PAGE_MASK)) as usize;
        if room < bytes.len() {
            let (first, second) = bytes.split_at(room);
            self.store_bytes(linear, first)?;
            return self.store_bytes(self.wrap_linear(linear.wrapping_add(room as u64)), second);
        }
        for (k, chunk) in bytes.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            let at = self.wrap_linear(linear.wrapping_add(8 * k as u64));
            self.store_slow(at, chunk.len(), u64::from_le_bytes(word), self.class)?;
        }
        Ok(())
    }

    /// Loads 16 bytes.
    #[inline]
    pub fn load_linear_x(&mut self, linear: u64) -> Result<u128, Trap> {
        let e = self.tlb_entry(linear);
        if e.read == linear & !PAGE_MASK && linear & PAGE_MASK <= PAGE_SIZE - 16 {
            // SAFETY: as in `load_linear`, for 16 bytes inside the page.
            let value = unsafe { (e.addend.wrapping_add(linear) as *const u128).read_unaligned() };
            self.loaded();
            return Ok(value);
        }
        self.check_alignment(linear, 16)?;
        self.probe_read(linear, 16)?;
        let low = self.load_slow(linear, 8, self.class)?;
        let high = self.load_slow(self.wrap_linear(linear.wrapping_add(8)), 8, self.class)?;
        Ok(u128::from(low) | u128::from(high) << 64)
    }

    /// Stores 16 bytes.
    #[inline]
    pub fn store_linear_x(&mut self, linear: u64, v: u128) -> Result<(), Trap> {
        self.storing();
        let e = self.tlb_entry(linear);
        if e.write == linear & !PAGE_MASK && linear & PAGE_MASK <= PAGE_SIZE - 16 {
            // SAFETY: as in `store_linear`, for 16 bytes inside the page.
            unsafe { (e.addend.wrapping_add(linear) as *mut u128).write_unaligned(v) };
            return Ok(());
        }
        self.check_alignment(linear, 16)?;
        self.store_bytes(linear, &v.to_le_bytes())
    }

    /// The host address of `linear` and how many bytes from there on may be accessed directly, if the page is plain
    /// RAM for this access: what string instructions copy by. `len` bytes at least are accessed, and `wanted` at most: pages
    /// behind the first one count as far as the host has them behind it, too.
    pub fn direct(&mut self, linear: u64, len: u64, wanted: u64, write: bool) -> Result<Option<(*mut u8, u64)>, Trap> {
        if self.class == Class::UserAligned {
            return Ok(None);
        }
        let mut room = PAGE_SIZE - (linear & PAGE_MASK);
        let known = |e: TlbEntry, linear: u64| if write { e.write } else { e.read } == linear & !PAGE_MASK;
        let first = self.tlb_entry(linear);
        if known(first, linear) {
            while room < wanted.min(MOST_DIRECT) {
                let behind = linear.wrapping_add(room);
                let e = self.tlb_entry(behind);
                if !known(e, behind) || e.addend != first.addend {
                    break;
                }
                room += PAGE_SIZE;
            }
            return Ok(Some((first.addend.wrapping_add(linear) as *mut u8, room)));
        }
        self.check_canonical(linear, len)?;
        let access = if write { Access::Write } else { Access::Read };
        let t = self.translate(linear, access, self.class)?;
        let slow_store = || self.journal.is_some() || !self.ram.allow_fast(t.gpa);
        if (write && slow_store()) || self.is_watched_page(linear) {
            return Ok(None);
        }
        Ok(t.host.map(|h| (h, room)))
    }

    /// Cuts a linear address to 32 bits outside 64-bit mode.
    #[inline(always)]
    pub fn wrap_linear(&self, linear: u64) -> u64 {
        if self.s.long_mode() { linear } else { linear & 0xffff_ffff }
    }

    #[inline(always)]
    fn tlb_entry(&mut self, linear: u64) -> TlbEntry {
        *self.mmu.tlb.table(self.class).entry(linear)
    }

    #[cold]
    #[inline(never)]
    pub(crate) fn load_slow(&mut self, linear: u64, len: usize, class: Class) -> Result<u64, Trap> {
        let in_first = (PAGE_SIZE - (linear & PAGE_MASK)) as usize;
        self.check_canonical(linear, len as u64)?;
        let first = self.translate(linear, Access::Read, class)?;
        if self.watch {
            self.check_watch(linear, len as u64, false);
        }
        if len <= in_first {
            return Ok(self.read_translated(first, len));
        }
        let second = self.translate(self.wrap_linear(linear.wrapping_add(in_first as u64)), Access::Read, class)?;
        let low = self.read_translated(first, in_first);
        let high = self.read_translated(second, len - in_first);
        Ok(low | high << (8 * in_first))
    }

    #[cold]
    #[inline(never)]
    pub(crate) fn store_slow(&mut self, linear: u64, len: usize, value: u64, class: Class) -> Result<(), Trap> {
        let in_first = (PAGE_SIZE - (linear & PAGE_MASK)) as usize;
        self.check_canonical(linear, len as u64)?;
        let first = self.translate(linear, Access::Write, class)?;
        if self.watch {
            self.check_watch(linear, len as u64, true);
        }
        if len <= in_first {
            self.write_translated(first, len, value);
            return Ok(());
        }
        let second = self.translate(self.wrap_linear(linear.wrapping_add(in_first as u64)), Access::Write, class)?;
        self.write_translated(first, in_first, value);
        self.write_translated(second, len - in_first, value >> (8 * in_first));
        Ok(())
    }

    fn read_translated(&mut self, t: Translated, len: usize) -> u64 {
        let mut bytes = [0u8; 8];
        match t.host {
            Some(host) => {
                // SAFETY: `host` is inside a page of guest RAM and the caller keeps `len` (≤ 8) inside that page.
                let value = unsafe { read_some(host, len) };
                self.loaded();
                return value;
            }
            None => {
                for (at, n) in power_of_two_pieces(t.gpa, len) {
                    let v = self.platform.mmio_read(at, n);
                    let k = (at - t.gpa) as usize;
                    bytes[k..k + usize::from(n)].copy_from_slice(&v.to_le_bytes()[..usize::from(n)]);
                }
                self.device_accessed();
            }
        }
        u64::from_le_bytes(bytes)
    }

    fn write_translated(&mut self, t: Translated, len: usize, value: u64) {
        match t.host {
            Some(host) => {
                self.journal_store(host, len);
                self.storing();
                // SAFETY: as in `read_translated`.
                unsafe { write_some(host, len, value) };
                self.note_code_store(t.gpa, len as u64);
            }
            None => {
                for (at, n) in power_of_two_pieces(t.gpa, len) {
                    self.platform.mmio_write(at, n, value >> (8 * (at - t.gpa)));
                }
                self.device_accessed();
            }
        }
    }

    /// Queues the invalidation of translated code that a store to RAM has overwritten, here and where other vCPUs have it.
    pub(crate) fn note_code_store(&mut self, gpa: u64, len: u64) {
        let (page, granules) = (gpa & !PAGE_MASK, granule_mask(gpa & PAGE_MASK, len));
        if let Some(peers) = &self.peers {
            // Whoever has just marked the page reads it behind that, and who has not been seen to will read what was stored.
            fence(Ordering::SeqCst);
            for (vcpu, hit) in self.ram.others_with_code(gpa, granules) {
                peers.overwritten(vcpu, page, hit);
            }
        }
        let hit = self.ram.own_granules(gpa) & granules;
        if hit != 0 {
            self.mmu.counts.smc_stores += 1;
            self.smc.push((page, hit));
            self.stop_block = true;
        }
    }

    /// Loads what a locked instruction is about to store back ([`Self::store_locked`]), in memory that other vCPUs have too.
    #[cold]
    #[inline(never)]
    pub(crate) fn load_locked<W: Width>(&mut self, linear: u64) -> Result<u64, Trap> {
        self.locked = None;
        if self.alone {
            return self.load_linear_rmw::<W>(linear);
        }
        // What the host's processor has no atomic access to is done while no other vCPU runs.
        if linear & (W::BYTES - 1) != 0 {
            return Err(self.try_again(Again::Alone));
        }
        let Some((host, gpa)) = self.locked_operand(linear, W::BYTES)? else {
            return self.load_linear_rmw::<W>(linear);
        };
        // SAFETY: the host address of an aligned operand in guest RAM.
        let value = unsafe { read_host::<W>(host) };
        self.loaded();
        self.locked = Some(Locked { host, gpa, value });
        Ok(value)
    }

    /// Stores what a locked instruction has made of what it loaded, if that is still there; else the instruction is to be
    /// done again.
    #[cold]
    #[inline(never)]
    pub(crate) fn store_locked<W: Width>(&mut self, linear: u64, value: u64) -> Result<(), Trap> {
        let Some(Locked { host, gpa, value: old }) = self.locked.take() else {
            return self.store_linear::<W>(linear, value);
        };
        // A locked instruction is a fence in both directions, which an exchange alone is not everywhere.
        if HOST_REORDERS {
            fence(Ordering::SeqCst);
        }
        // SAFETY: from `load_locked`.
        if unsafe { compare_exchange::<W>(host, old, value) } {
            // Which ends in a fence.
            self.note_code_store(gpa, W::BYTES);
            Ok(())
        } else {
            Err(self.try_again(Again::Now))
        }
    }

    /// Puts `new` where 16 aligned bytes are `expected`, at once; what was there.
    pub(crate) fn exchange_locked_x(&mut self, linear: u64, expected: u128, new: u128) -> Result<u128, Trap> {
        let Some(exchange) = host_exchange() else { return Err(self.try_again(Again::Alone)) };
        let Some((host, gpa)) = self.locked_operand(linear, 16)? else { return Err(self.try_again(Again::Alone)) };
        // SAFETY: the host address of 16 aligned bytes of guest RAM.
        let old = unsafe { exchange(host.cast(), expected, new) };
        if old == expected {
            self.note_code_store(gpa, 16);
        }
        Ok(old)
    }

    /// The host address and the physical one of an aligned operand that is read and written; `None` outside RAM.
    pub(crate) fn locked_operand(&mut self, linear: u64, len: u64) -> Result<Option<(*mut u8, u64)>, Trap> {
        self.check_canonical(linear, len)?;
        let t = self.translate(linear, Access::Write, self.class)?;
        if self.watch {
            self.check_watch(linear, len, true);
        }
        Ok(t.host.map(|host| (host, t.gpa)))
    }

    /// Translates one linear address, through the TLB, raising the fault if there is one.
    fn translate(&mut self, linear: u64, access: Access, class: Class) -> Result<Translated, Trap> {
        let page = linear & !PAGE_MASK;
        let e = *self.mmu.tlb.table(class).entry(linear);
        let tag = if access == Access::Write { e.write } else { e.read };
        if tag & !PAGE_MASK == page && tag & PAGE_MASK <= SLOW | WATCHED | CHECKED {
            let gpa = e.phys & !PAGE_MASK | linear & PAGE_MASK;
            if tag & SLOW != 0 && e.read & SLOW == 0 && self.journal.is_none() && self.ram.code_granules(gpa) == 0 {
                // The code that made stores slow has gone. It may be back soon.
                self.mmu.stores_behind_code = self.mmu.stores_behind_code.wrapping_add(1);
                if self.mmu.stores_behind_code.is_multiple_of(RELUCTANCE) && self.ram.allow_fast(gpa) {
                    self.mmu.tlb.table(class).entry(linear).write = page | e.read & (WATCHED | CHECKED);
                }
            }
            // Every present page has a read tag, and only MMIO has it slow.
            let host = (e.read & SLOW == 0).then(|| e.addend.wrapping_add(linear) as *mut u8);
            return Ok(Translated { gpa, host });
        }
        self.mmu.counts.tlb_misses += 1;
        self.check_canonical(linear, 1)?;
        let found = walk(&self.ram, &self.paging(), linear, access, class.is_user(), class == Class::SupervisorSmap);
        let w = found.map_err(|e| {
            self.mmu.tlb.page_fault(linear);
            self.raise(e)
        })?;
        Ok(self.fill(linear, w, class))
    }

    /// Makes this vCPU's stores to a physical page that now holds translated code take the slow path, if any does not.
    pub fn protect_code(&mut self, gpa: u64) {
        if self.ram.is_fast(gpa) {
            self.mmu.tlb.protect(gpa & !PAGE_MASK);
            self.ram.forbid_fast(gpa);
        }
    }

    fn fill(&mut self, linear: u64, w: Walk, class: Class) -> Translated {
        let page = linear & !PAGE_MASK;
        let host_page = self.ram.host_page(w.gpa);
        let mmio = if host_page.is_some() { 0 } else { SLOW };
        let checked = if class == Class::UserAligned { CHECKED } else { 0 };
        let watched = if self.is_watched_page(linear) { WATCHED } else { 0 } | checked;
        let fast = w.writable && self.journal.is_none() && self.ram.allow_fast(w.gpa);
        let code = if fast { 0 } else { SLOW };
        let entry = TlbEntry {
            read: page | mmio | watched,
            write: if w.writable { page | mmio | code | watched } else { EMPTY },
            addend: host_page.map_or(0, |h| (h as u64).wrapping_sub(page)),
            phys: w.gpa & !PAGE_MASK | if w.global { GLOBAL } else { 0 } | u64::from(w.key) << KEY_SHIFT,
        };
        self.mmu.tlb.insert(class, linear, entry, w.page_bits);
        Translated { gpa: w.gpa, host: host_page.map(|h| h.wrapping_add((linear & PAGE_MASK) as usize)) }
    }

    /// Fills the TLB for compiled code. `Some(host)` when the whole access then is plain RAM in one page.
    pub(crate) fn resolve(&mut self, linear: u64, len: u64, write: bool) -> Option<*mut u8> {
        if linear & PAGE_MASK > PAGE_SIZE - len || self.class == Class::UserAligned {
            return None;
        }
        let access = if write { Access::Write } else { Access::Read };
        let saved = self.raised;
        let Ok(t) = self.translate(linear, access, self.class) else {
            self.raised = saved;
            return None;
        };
        if self.is_watched_page(linear) {
            return None;
        }
        // Where others may begin to have code in the page, what is stored has to be looked at afterwards.
        let may_write = || match self.ram.is_shared() {
            true => self.ram.allow_fast(t.gpa),
            false => self.ram.code_granules(t.gpa) & granule_mask(t.gpa & PAGE_MASK, len) == 0,
        };
        t.host.filter(|_| !write || may_write())
    }

    /// The physical address of an instruction byte, or the fault that fetching it raises.
    #[inline]
    pub fn translate_code(&mut self, linear: u64) -> Result<u64, Trap> {
        let key = self.code_key(linear & !PAGE_MASK);
        let e = self.mmu.code[code_index(key)];
        if e.key == key {
            return Ok(e.gpa_page | linear & PAGE_MASK);
        }
        self.translate_code_slow(linear)
    }

    #[cold]
    fn translate_code_slow(&mut self, linear: u64) -> Result<u64, Trap> {
        self.mmu.counts.code_tlb_misses += 1;
        if self.s.long_mode() && !is_canonical(linear) {
            return Err(self.raise(Exception::with_error(vector::GP, 0)));
        }
        let w = walk(&self.ram, &self.paging(), linear, Access::Execute, self.s.cpl == 3, false)
            .map_err(|e| self.raise(e))?;
        self.mmu.fetched.note(linear, w.page_bits);
        let key = self.code_key(linear & !PAGE_MASK);
        self.mmu.code[code_index(key)] = CodeEntry { key, gpa_page: w.gpa & !PAGE_MASK };
        self.mmu.private_upper |= linear >> 63 != 0 && !w.global;
        Ok(w.gpa)
    }

    /// Forgets fetch translations and asks for the jump cache to be emptied.
    pub(crate) fn flush_code_translations(&mut self) {
        self.mmu.code.fill(CodeEntry { key: EMPTY, gpa_page: 0 });
        self.mmu.fetched.clear();
        self.mmu.private_upper = false;
        self.flush_jump_cache = true;
        self.stop_block = true;
    }

    /// Writes PKRU.
    pub fn set_pkru(&mut self, v: u32) {
        let changed = self.s.pkru ^ v;
        self.s.pkru = v;
        self.key_rights_changed(changed);
    }

    /// Writes IA32_PKRS.
    pub fn set_pkrs(&mut self, v: u32) {
        let changed = self.s.msr.pkrs ^ v;
        self.s.msr.pkrs = v;
        self.key_rights_changed(changed);
    }

    /// Data translations hold the rights of their page's key, two bits of PKRU or IA32_PKRS.
    fn key_rights_changed(&mut self, bits: u32) {
        if bits != 0 && self.s.cr4 & (cr::CR4_PKE | cr::CR4_PKS) != 0 {
            let keys = (0..16).filter(|key| bits >> (2 * key) & 3 != 0).fold(0, |keys, key| keys | 1 << key);
            self.mmu.tlb.flush_keys(keys);
        }
    }

    /// Removes every cached translation, global ones included.
    pub fn flush_tlb_all(&mut self) {
        self.mmu.counts.flushes += 1;
        let flush = self.mmu.tlb.flush_all();
        self.after_tag_change(flush);
    }

    /// INVLPG: removes the translations of one page.
    pub fn flush_tlb_page(&mut self, linear: u64) {
        self.mmu.counts.page_flushes += 1;
        self.mmu.tlb.flush_page(linear);
        if self.mmu.fetched.covers(linear) || self.s.cr0 & cr::CR0_PG == 0 {
            self.flush_code_translations();
        }
    }

    /// INVPCID type 1: removes the non-global translations of a PCID.
    pub fn flush_tlb_pcid(&mut self, pcid: u16) {
        self.mmu.counts.flushes += 1;
        let flush = self.mmu.tlb.flush_pcid(pcid);
        self.after_tag_change(flush);
    }

    /// INVPCID type 3: removes all non-global translations.
    pub fn flush_tlb_non_global(&mut self) {
        self.mmu.counts.flushes += 1;
        let _: JumpFlush = self.mmu.tlb.flush_all_non_global();
        self.flush_code_translations();
    }

    /// Takes the new CR3 in use: `keep` is bit 63 of the operand with CR4.PCIDE set.
    pub fn switch_address_space(&mut self, keep: bool) {
        self.mmu.counts.flushes += u64::from(!keep);
        let pcid = if self.s.cr4 & cr::CR4_PCIDE != 0 { (self.s.cr3 & 0xfff) as u16 } else { 0 };
        let flush = self.mmu.tlb.switch(pcid, keep);
        self.after_tag_change(flush);
    }

    fn after_tag_change(&mut self, flush: JumpFlush) {
        if flush == JumpFlush::All || self.mmu.private_upper {
            self.flush_code_translations();
        }
        self.jit.tables = self.mmu.tlb.addresses();
        self.mode_changed();
    }

    /// Linear address of `offset` in segment `s`, checked (SDM vol. 3 §5.3–5.4): limit, type and presence outside
    /// 64-bit mode; only FS and GS have a base inside it.
    pub fn linearize(&mut self, s: u8, offset: u64, len: u64, write: bool) -> Result<u64, Trap> {
        self.through_ss = s == seg::SS;
        let d = self.s.seg[usize::from(s)];
        if self.s.code64() {
            return Ok(if s >= seg::FS { d.base.wrapping_add(offset) } else { offset });
        }
        let v = if s == seg::SS { vector::SS } else { vector::GP };
        if self.s.protected() && !self.s.vm86() && !data_access_allowed(&d, write) {
            return Err(self.raise(Exception::with_error(v, 0)));
        }
        let last = offset.wrapping_add(len.max(1) - 1);
        let code = d.attr & crate::state::Segment::CODE != 0;
        let inside = if !code && d.attr & crate::state::Segment::EXPAND_DOWN != 0 {
            let top = if d.attr & crate::state::Segment::DB != 0 { 0xffff_ffff } else { 0xffff };
            offset > u64::from(d.limit) && last <= top
        } else {
            last <= u64::from(d.limit)
        };
        if !inside {
            return Err(self.raise(Exception::with_error(v, 0)));
        }
        Ok(d.base.wrapping_add(offset) & 0xffff_ffff)
    }
}

/// What lies at one address in several address spaces has several places.
fn code_index(key: u64) -> usize {
    (key >> 12 ^ key >> 55) as usize & (CODE_ENTRIES - 1)
}

/// Whether a protected-mode data access through `d` is permitted by its type.
fn data_access_allowed(d: &crate::state::Segment, write: bool) -> bool {
    use crate::state::Segment;
    let code = d.attr & Segment::CODE != 0;
    let rw = d.attr & Segment::RW != 0;
    d.present() && if write { !code && rw } else { !code || rw }
}

/// Cuts an MMIO access that is not a power of two wide, or not aligned to its width, into ones that are.
fn power_of_two_pieces(gpa: u64, len: usize) -> impl Iterator<Item = (u64, u8)> {
    let mut at = gpa;
    let end = gpa + len as u64;
    std::iter::from_fn(move || {
        let left = end - at;
        let n = [8u64, 4, 2, 1].into_iter().find(|&n| n <= left && at.is_multiple_of(n))?;
        let piece = (at, n as u8);
        at += n;
        Some(piece)
    })
}

/// # Safety
/// `p` must be the host address of `W::BYTES` bytes of guest RAM.
#[inline(always)]
unsafe fn read_host<W: Width>(p: *const u8) -> u64 {
    // SAFETY: given by the caller.
    unsafe {
        match W::BYTES {
            1 => u64::from(p.read()),
            2 => u64::from(p.cast::<u16>().read_unaligned()),
            4 => u64::from(p.cast::<u32>().read_unaligned()),
            _ => p.cast::<u64>().read_unaligned(),
        }
    }
}

/// Reads up to 8 bytes, those of an operand of a power of two at once.
///
/// # Safety
/// `p` must be the host address of `len` bytes of guest RAM.
unsafe fn read_some(p: *const u8, len: usize) -> u64 {
    // SAFETY: given by the caller.
    unsafe {
        match len {
            1 => read_host::<W8>(p),
            2 => read_host::<W16>(p),
            4 => read_host::<W32>(p),
            8 => read_host::<W64>(p),
            _ => {
                let mut bytes = [0; 8];
                std::ptr::copy_nonoverlapping(p, bytes.as_mut_ptr(), len.min(8));
                u64::from_le_bytes(bytes)
            }
        }
    }
}

/// Writes up to 8 bytes, those of an operand of a power of two at once, as others may see them.
///
/// # Safety
/// `p` must be the host address of `len` bytes of guest RAM.
pub(crate) unsafe fn write_some(p: *mut u8, len: usize, v: u64) {
    // SAFETY: given by the caller.
    unsafe {
        match len {
            1 => write_host::<W8>(p, v),
            2 => write_host::<W16>(p, v),
            4 => write_host::<W32>(p, v),
            8 => write_host::<W64>(p, v),
            _ => std::ptr::copy_nonoverlapping(v.to_le_bytes().as_ptr(), p, len.min(8)),
        }
    }
}

type Exchange = unsafe fn(*mut u128, u128, u128) -> u128;

/// The host's instruction that compares and exchanges 16 bytes, if it has one.
#[cfg(target_arch = "x86_64")]
fn host_exchange() -> Option<Exchange> {
    #[target_feature(enable = "cmpxchg16b")]
    unsafe fn exchange(p: *mut u128, old: u128, new: u128) -> u128 {
        // SAFETY: given by the caller.
        unsafe { std::arch::x86_64::cmpxchg16b(p, old, new, Ordering::SeqCst, Ordering::SeqCst) }
    }
    std::arch::is_x86_feature_detected!("cmpxchg16b").then_some(exchange as Exchange)
}

#[cfg(not(target_arch = "x86_64"))]
fn host_exchange() -> Option<Exchange> {
    None
}

/// Puts `new` where `old` is, unless something else is there.
///
/// # Safety
/// `p` must be the host address of `W::BYTES` bytes of guest RAM, and a multiple of that.
unsafe fn compare_exchange<W: Width>(p: *mut u8, old: u64, new: u64) -> bool {
    use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};
    let order = Ordering::SeqCst;
    // SAFETY: given by the caller.
    unsafe {
        match W::BYTES {
            1 => AtomicU8::from_ptr(p).compare_exchange(old as u8, new as u8, order, order).is_ok(),
            2 => AtomicU16::from_ptr(p.cast()).compare_exchange(old as u16, new as u16, order, order).is_ok(),
            4 => AtomicU32::from_ptr(p.cast()).compare_exchange(old as u32, new as u32, order, order).is_ok(),
            _ => AtomicU64::from_ptr(p.cast()).compare_exchange(old, new, order, order).is_ok(),
        }
    }
}

/// # Safety
/// `p` must be the host address of `W::BYTES` bytes of guest RAM.
#[inline(always)]
unsafe fn write_host<W: Width>(p: *mut u8, v: u64) {
    // SAFETY: given by the caller.
    unsafe {
        match W::BYTES {
            1 => p.write(v as u8),
            2 => p.cast::<u16>().write_unaligned(v as u16),
            4 => p.cast::<u32>().write_unaligned(v as u32),
            _ => p.cast::<u64>().write_unaligned(v),
        }
    }
}
