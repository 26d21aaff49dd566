//! The soft TLB: direct-mapped tables of guest pages to host addresses, one set per address-space slot.
//!
//! A slot holds the translations of one PCID. It has a table per privilege class, so that a change of CPL or of
//! RFLAGS.AC is a change of pointer. Compiled code reads the current table in place ([`TlbEntry`] is `#[repr(C)]`).
//!
//! Under SMAP supervisors' own pages have a table of their own, and kernels have them global: so it is one for all address
//! spaces, and a new one need not find them anew. What is in it that is not global goes when the address space does.

use std::ops::{Deref, DerefMut};

use crate::addr::PAGE_MASK;

/// Entries in a table at first.
const FEWEST: usize = 256;
/// Entries in a table that its address space has found too small.
const MOST: usize = 16384;
/// Address-space slots, each for one PCID.
pub const SLOTS: usize = 8;

/// Who accesses memory: selects the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Class {
    /// CPL 3.
    User = 0,
    /// CPL 0–2; user pages are accessible (SMAP off, or RFLAGS.AC set).
    Supervisor = 1,
    /// CPL 0–2 under SMAP: data accesses to user pages fault. Also implicit supervisor accesses.
    SupervisorSmap = 2,
    /// CPL 3 with alignment checking (CR0.AM and RFLAGS.AC set): no access takes the fast path.
    UserAligned = 3,
}

/// Whose table address spaces share.
const SHARED: Class = Class::SupervisorSmap;

impl Class {
    /// Whether the accesses are user-mode accesses.
    pub fn is_user(self) -> bool {
        matches!(self, Class::User | Class::UserAligned)
    }
}

/// One translation. A tag equals the page's linear address exactly when the fast path may use the entry; the low
/// bits below mark pages that are known but take the slow path.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct TlbEntry {
    /// Tag for loads.
    pub read: u64,
    /// Tag for stores.
    pub write: u64,
    /// Host address minus linear address.
    pub addend: u64,
    /// Guest physical page; bit 0: global, bits 5:2: protection key.
    pub phys: u64,
}

/// Accesses of compiled loops that remember where they were last ([`Sites`]), of each kind. Regions share them.
pub const SITES: usize = 128;
/// Kinds of accesses: loads and stores, of 1, 2, 4, 8, 16, 32 and 10 bytes.
const SITE_KINDS: usize = 2 * 7;
const ALL_SITES: usize = SITES * SITE_KINDS;
/// Sites, from each multiple on, that are emptied together.
pub const SITE_GROUP: usize = 16;

/// The site that is number `n` of its kind. What one kind may do at an address, another may not.
pub fn site(n: usize, store: bool, bytes: u64) -> usize {
    let size = if bytes == 10 { 6 } else { bytes.trailing_zeros() as usize };
    let kind = 2 * size + usize::from(store);
    kind * SITES + n % SITES
}

/// Where accesses in loops were last, and before that: data may lie across the end of a page. What these hold was in the
/// table's entries once, and goes with them.
#[repr(C)]
pub struct Sites {
    /// Whether there may be a `limit` that is not 0, for each [`SITE_GROUP`] sites; compiled code says 1.
    pub used: [[u8; 8]; ALL_SITES / SITE_GROUP / 8],
    /// Where they were last.
    pub last: [Place; ALL_SITES],
    /// Where they were before.
    pub before: [Place; ALL_SITES],
}

/// A page for accesses of one width: an offset from `base` below `limit` is one into the page.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Place {
    /// Its linear address.
    pub base: u64,
    /// One more than the highest offset at which such an access stays inside the page; 0 for no page.
    pub limit: u64,
    /// Host address minus linear address.
    pub addend: u64,
    /// Nothing: compiled code finds a place by a shift.
    pub unused: u64,
}

/// What of a table compiled code sees. It has the address of the entries ([`TABLE_ANCHOR`]), so that those and the mask are a
/// short way from there.
#[repr(C)]
pub struct Translations {
    /// What accesses in loops look at first.
    pub sites: Sites,
    /// The bits of an offset into the entries in use that the linear address decides, from bit 12 on.
    pub mask: u64,
    /// Entries; those in use are valid, of the others nothing is.
    pub entries: Entries,
}

/// The entries, none of which lies in two of the host's cache lines.
#[repr(C, align(64))]
pub struct Entries([TlbEntry; MOST]);

/// Where in a table the address that compiled code has is.
pub const TABLE_ANCHOR: usize = std::mem::offset_of!(Translations, entries);

/// A table's memory. It begins as zeros, which the host gives to what is written first; asked for zeros so aligned, the
/// standard allocator would write all of them.
struct Memory {
    words: Box<[u64]>,
    /// How many words are before the table.
    at: usize,
}

impl Memory {
    fn new() -> Memory {
        let spare = align_of::<Translations>() / size_of::<u64>();
        let words: Box<[u64]> = vec![0; size_of::<Translations>() / size_of::<u64>() + spare].into();
        let at = words.as_ptr().align_offset(align_of::<Translations>());
        let mut new = Memory { words, at };
        new.resize(FEWEST);
        new
    }
}

impl Deref for Memory {
    type Target = Translations;

    fn deref(&self) -> &Translations {
        // SAFETY: so many words are there from `at` on, which is so aligned; all of a table are integers.
        unsafe { &*self.words[self.at..].as_ptr().cast() }
    }
}

impl DerefMut for Memory {
    fn deref_mut(&mut self) -> &mut Translations {
        // SAFETY: as in `deref`.
        unsafe { &mut *self.words[self.at..].as_mut_ptr().cast() }
    }
}

impl Translations {
    /// Entries in use.
    fn len(&self) -> usize {
        self.mask as usize / size_of::<TlbEntry>() + 1
    }

    /// The entries in use.
    fn used(&mut self) -> &mut [TlbEntry] {
        let len = self.len();
        &mut self.entries.0[..len]
    }

    /// Takes `len` entries into use, all empty.
    fn resize(&mut self, len: usize) {
        self.mask = ((len - 1) * size_of::<TlbEntry>()) as u64;
        self.used().fill(EMPTY_ENTRY);
    }
}

/// Tag of an empty entry; no page address equals it.
pub const EMPTY: u64 = u64::MAX;
/// Tag bit: permitted, but not plain RAM (MMIO, or a store to a page with translated code).
pub const SLOW: u64 = 1;
/// Tag bit: the page holds a data breakpoint.
pub const WATCHED: u64 = 2;
/// Tag bit: accesses are checked for alignment.
pub const CHECKED: u64 = 4;
/// `phys` bit: the translation is global.
pub const GLOBAL: u64 = 1;
/// Where the protection key is in `phys`.
pub const KEY_SHIFT: u32 = 2;

const EMPTY_ENTRY: TlbEntry = TlbEntry { read: EMPTY, write: EMPTY, addend: 0, phys: 0 };

/// The extent of nothing.
const NO_EXTENT: (u64, u64) = (u64::MAX, 0);

/// Which half of the linear addresses one is in.
fn half(linear: u64) -> usize {
    (linear >> 63) as usize
}

fn key(e: &TlbEntry) -> u32 {
    (e.phys >> KEY_SHIFT & 15) as u32
}

/// One table.
pub struct Table {
    known: Memory,
    /// Whether there have been entries, in either half of the linear addresses.
    used: [bool; 2],
    /// The extent of the large pages that entries are parts of, first and last address, in either half of the linear
    /// addresses.
    large: [(u64, u64); 2],
    /// Translations that came since the table was empty.
    inserted: usize,
    /// Those of them that displaced another.
    displaced: usize,
    /// The protection keys that entries have had, a bit each.
    keys: u16,
}

impl Table {
    fn new() -> Table {
        Table { known: Memory::new(), used: [false; 2], large: [NO_EXTENT; 2], inserted: 0, displaced: 0, keys: 0 }
    }

    /// The entry in which a linear address would be.
    #[inline(always)]
    pub fn entry(&mut self, linear: u64) -> &mut TlbEntry {
        let index = (linear >> 12) as usize & (self.known.len() - 1);
        &mut self.known.entries.0[index]
    }

    /// Where compiled code finds the table.
    pub fn address(&self) -> u64 {
        std::ptr::from_ref(&self.known.entries) as u64
    }

    /// Inserts a translation that comes from a page of 2^`page_bits` bytes.
    pub fn insert(&mut self, linear: u64, entry: TlbEntry, page_bits: u32) {
        self.used[half(linear)] = true;
        self.keys |= 1 << key(&entry);
        if page_bits > 12 {
            let offsets = (1 << page_bits) - 1;
            let (first, last) = &mut self.large[half(linear)];
            (*first, *last) = ((*first).min(linear & !offsets), (*last).max(linear | offsets));
        }
        self.inserted += 1;
        let old = *self.entry(linear);
        if old.read != EMPTY {
            if (old.read ^ linear) & !PAGE_MASK != 0 {
                self.displaced += 1;
            } else if old.addend != entry.addend {
                self.clear_sites();
            }
        }
        let len = self.known.len();
        if self.displaced > len && len < MOST {
            self.resize(2 * len);
        }
        *self.entry(linear) = entry;
    }

    /// Empties the table, which has `len` entries then.
    fn resize(&mut self, len: usize) {
        self.known.resize(len);
        self.clear_sites();
        (self.inserted, self.displaced) = (0, 0);
    }

    /// Empties the sites: to be called when a translation goes or permits less.
    fn clear_sites(&mut self) {
        let sites = &mut self.known.sites;
        // Seldom are there any, and there may be many faults.
        if sites.used.as_flattened().iter().fold(0, |any, used| any | used) == 0 {
            return;
        }
        let eights = sites.used.iter_mut().enumerate().filter(|(_, used)| **used != [0; 8]);
        for (eight, used) in eights {
            for (group, _) in std::mem::take(used).into_iter().enumerate().filter(|&(_, used)| used != 0) {
                let first = (8 * eight + group) * SITE_GROUP;
                sites.last[first..first + SITE_GROUP].iter_mut().for_each(|place| place.limit = 0);
                sites.before[first..first + SITE_GROUP].iter_mut().for_each(|place| place.limit = 0);
            }
        }
    }

    fn flush(&mut self) {
        if self.is_used() {
            self.resize(self.wanted());
            (self.used, self.large, self.keys) = ([false; 2], [NO_EXTENT; 2], 0);
        }
    }

    fn is_used(&self) -> bool {
        self.used != [false; 2]
    }

    /// How many entries there should be from the next flush on: emptying many for few is dear.
    fn wanted(&self) -> usize {
        let len = self.known.len();
        if self.inserted < len / 8 { (len / 2).max(FEWEST) } else { len }
    }

    fn flush_non_global(&mut self) {
        if self.is_used() {
            let wanted = self.wanted();
            if wanted < self.known.len() {
                return self.resize(wanted);
            }
            for e in self.known.used().iter_mut().filter(|e| e.phys & GLOBAL == 0) {
                *e = EMPTY_ENTRY;
            }
            self.clear_sites();
            (self.inserted, self.displaced) = (0, 0);
        }
    }

    fn flush_keys(&mut self, keys: u16) {
        if self.keys & keys != 0 {
            for e in self.known.used().iter_mut().filter(|e| keys >> key(e) & 1 != 0) {
                *e = EMPTY_ENTRY;
            }
            self.clear_sites();
            self.keys &= !keys;
        }
    }

    fn flush_page(&mut self, linear: u64) {
        // One INVLPG removes a whole large page (SDM vol. 3 §4.10.4.1); its 4 KiB parts are not linked to each other.
        let (first, last) = self.large[half(linear)];
        if (first..=last).contains(&linear) {
            return self.flush();
        }
        self.forget(linear);
    }

    /// Empties the entry of a page of 4 KiB.
    fn forget(&mut self, linear: u64) {
        if !self.used[half(linear)] {
            return;
        }
        self.clear_sites();
        let e = self.entry(linear);
        let page = linear & !PAGE_MASK;
        if e.read & !PAGE_MASK == page || e.write & !PAGE_MASK == page {
            *e = EMPTY_ENTRY;
        }
    }

    /// Makes stores to the physical page take the slow path from now on.
    fn protect(&mut self, gpa_page: u64) {
        if self.is_used() {
            for e in self.known.used() {
                if e.phys & !PAGE_MASK == gpa_page && e.write != EMPTY {
                    e.write |= SLOW;
                }
            }
            self.clear_sites();
        }
    }
}

/// The tables of one address space.
pub struct Slot {
    tables: [Table; 4],
    /// The PCID whose translations stand here.
    pcid: u16,
    /// Distinguishes this use of the slot in jump-cache tags.
    pub tag: u8,
    last_use: u64,
}

/// After so many changes of the address space with translations in the shared table that are not global slots have tables
/// of their own: a kernel that has its pages so is better off with them.
const TOLERATED: u32 = 64;
/// Changes of the address space without such translations that make up for one with them.
const FORGIVING: u32 = 4;

/// The table that address spaces share.
struct Shared {
    table: Table,
    /// Whether they do.
    on: bool,
    /// Whether there may be translations in it that are not global: those of the current address space.
    private: bool,
    /// [`FORGIVING`] for each change of the address space that found such, less one for each that did not.
    grudge: u32,
}

impl Shared {
    fn new() -> Shared {
        Shared { table: Table::new(), on: true, private: false, grudge: 0 }
    }

    /// The address space changes.
    fn part(&mut self) {
        if !self.on {
            return;
        }
        if !std::mem::take(&mut self.private) {
            self.grudge = self.grudge.saturating_sub(1);
            return;
        }
        self.table.flush_non_global();
        self.grudge += FORGIVING;
        self.on = self.grudge < FORGIVING * TOLERATED;
    }
}

/// All soft-TLB tables of a vCPU.
pub struct Tlb {
    slots: Vec<Slot>,
    shared: Shared,
    current: usize,
    clock: u64,
    next_tag: u8,
}

/// What a flush asks of the caches above: nothing, or that every jump-cache entry goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum JumpFlush {
    /// Jump-cache tags already tell stale entries apart.
    Keep,
    /// The tags have wrapped round.
    All,
}

impl Tlb {
    /// Empty tables; slot 0 stands for PCID 0.
    pub fn new() -> Tlb {
        let slots = (0..SLOTS)
            .map(|i| Slot { tables: [(); 4].map(|()| Table::new()), pcid: i as u16, tag: i as u8, last_use: 0 })
            .collect();
        Tlb { slots, shared: Shared::new(), current: 0, clock: 0, next_tag: SLOTS as u8 }
    }

    /// The table of `class` in the current address space.
    #[inline(always)]
    pub fn table(&mut self, class: Class) -> &mut Table {
        if class == SHARED && self.shared.on {
            return &mut self.shared.table;
        }
        &mut self.slots[self.current].tables[class as usize]
    }

    /// Inserts a translation that comes from a page of 2^`page_bits` bytes, for accesses of `class`.
    pub fn insert(&mut self, class: Class, linear: u64, entry: TlbEntry, page_bits: u32) {
        self.shared.private |= class == SHARED && entry.phys & GLOBAL == 0;
        self.table(class).insert(linear, entry, page_bits);
    }

    /// Where compiled code finds the tables of the current address space, by [`Class`].
    pub fn addresses(&self) -> [u64; 4] {
        let mut tables = self.slots[self.current].tables.each_ref().map(Table::address);
        if self.shared.on {
            tables[SHARED as usize] = self.shared.table.address();
        }
        tables
    }

    /// Every table.
    fn tables(&mut self) -> impl Iterator<Item = &mut Table> {
        self.slots.iter_mut().flat_map(|s| &mut s.tables).chain([&mut self.shared.table])
    }

    /// The jump-cache tag of the current address space.
    pub fn tag(&self) -> u8 {
        self.slots[self.current].tag
    }

    fn retag(&mut self, slot: usize) -> JumpFlush {
        self.slots[slot].tag = self.next_tag;
        self.next_tag = self.next_tag.wrapping_add(1) & 0x7f;
        if self.next_tag != 0 {
            return JumpFlush::Keep;
        }
        for (i, s) in self.slots.iter_mut().enumerate() {
            s.tag = i as u8;
        }
        self.next_tag = SLOTS as u8;
        JumpFlush::All
    }

    /// Switches to the address space of `pcid` (MOV to CR3); `keep` is bit 63 of the written value with PCIDs on.
    pub fn switch(&mut self, pcid: u16, keep: bool) -> JumpFlush {
        self.clock += 1;
        self.shared.part();
        if let Some(slot) = self.slots.iter().position(|s| s.pcid == pcid) {
            self.current = slot;
            self.slots[slot].last_use = self.clock;
            return if keep { JumpFlush::Keep } else { self.flush_current_non_global() };
        }
        let victim = (0..SLOTS).min_by_key(|&i| self.slots[i].last_use).unwrap_or(0);
        let s = &mut self.slots[victim];
        s.pcid = pcid;
        s.last_use = self.clock;
        // Global translations are those of every address space.
        s.tables.iter_mut().for_each(Table::flush_non_global);
        self.current = victim;
        self.retag(victim)
    }

    fn flush_current_non_global(&mut self) -> JumpFlush {
        self.slots[self.current].tables.iter_mut().for_each(Table::flush_non_global);
        self.retag(self.current)
    }

    /// Removes every translation, global ones too. Where the tables are ([`Self::addresses`]) may change, as by every change of
    /// the address space.
    pub fn flush_all(&mut self) -> JumpFlush {
        self.tables().for_each(Table::flush);
        (self.shared.on, self.shared.private, self.shared.grudge) = (true, false, 0);
        JumpFlush::All
    }

    /// Removes the non-global translations of every PCID (INVPCID type 3).
    pub fn flush_all_non_global(&mut self) -> JumpFlush {
        self.tables().for_each(Table::flush_non_global);
        JumpFlush::All
    }

    /// Removes the non-global translations of one PCID (INVPCID type 1).
    pub fn flush_pcid(&mut self, pcid: u16) -> JumpFlush {
        let Some(slot) = self.slots.iter().position(|s| s.pcid == pcid) else { return JumpFlush::Keep };
        if slot == self.current {
            self.shared.part();
        }
        self.slots[slot].tables.iter_mut().for_each(Table::flush_non_global);
        self.retag(slot)
    }

    /// Removes the translations of one page (INVLPG, INVPCID type 0). Global translations are removed whatever the
    /// PCID, and a page's being global is not known here, so every slot is searched.
    pub fn flush_page(&mut self, linear: u64) {
        self.tables().for_each(|t| t.flush_page(linear));
    }

    /// A page fault in the current address space: nothing is known of the page any more, since the guest may repair its
    /// tables and invalidate nothing (SDM vol. 3 §4.10.4.1).
    pub fn page_fault(&mut self, linear: u64) {
        self.slots[self.current].tables.iter_mut().for_each(|t| t.forget(linear));
        self.shared.table.forget(linear);
    }

    /// Removes the translations of pages with one of the protection keys in a mask.
    pub fn flush_keys(&mut self, keys: u16) {
        self.tables().for_each(|t| t.flush_keys(keys));
    }

    /// Makes stores to a physical page that now holds translated code take the slow path, in every table.
    pub fn protect(&mut self, gpa_page: u64) {
        self.tables().for_each(|t| t.protect(gpa_page));
    }
}

impl Default for Tlb {
    fn default() -> Self {
        Tlb::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GLOBAL_PAGE: u64 = 0xffff_8000_0000_1000;
    const OWN_PAGE: u64 = 0xffff_8000_0000_2000;

    fn insert(tlb: &mut Tlb, page: u64, phys: u64) {
        tlb.insert(SHARED, page, TlbEntry { read: page, write: page, addend: 0, phys }, 12);
    }

    fn finds(tlb: &mut Tlb, page: u64) -> bool {
        tlb.table(SHARED).entry(page).read == page
    }

    #[test]
    fn global_supervisor_pages_are_known_in_every_address_space() {
        let mut tlb = Tlb::new();
        for pcid in 0..2 * SLOTS as u16 {
            let _ = tlb.switch(pcid, true);
            assert_eq!(finds(&mut tlb, GLOBAL_PAGE), pcid > 0);
            assert!(!finds(&mut tlb, OWN_PAGE));
            insert(&mut tlb, GLOBAL_PAGE, GLOBAL);
            insert(&mut tlb, OWN_PAGE, 0);
            let table = tlb.table(SHARED).address();
            assert_eq!(tlb.addresses()[SHARED as usize], table);
        }
        tlb.flush_page(GLOBAL_PAGE);
        assert!(!finds(&mut tlb, GLOBAL_PAGE));
    }

    #[test]
    fn a_kernel_whose_pages_are_not_global_has_tables_for_each_address_space() {
        let mut tlb = Tlb::new();
        for turn in 0..4 * TOLERATED {
            let _ = tlb.switch(1 + (turn % 2) as u16, true);
            if turn >= 2 * TOLERATED {
                assert!(finds(&mut tlb, OWN_PAGE), "turn {turn}");
            }
            insert(&mut tlb, OWN_PAGE, 0);
        }
        let _ = tlb.flush_all();
        assert!(!finds(&mut tlb, OWN_PAGE));
        assert_eq!(tlb.addresses()[SHARED as usize], tlb.shared.table.address(), "it is shared again");
    }
}
