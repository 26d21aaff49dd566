//! The code cache: which regions there are, where they may be entered, and how they lead to one another.
//!
//! A region is *expected* from when its bytes are copied into a plan, *placed* when its code has come, and *removed*
//! when its bytes change, when its room is needed, or when later regions have taken all its entries.
//!
//! - **Publish.** [`Cache::place`] writes the code into a slot, links its direct branches, makes it fetchable, and only
//!   then lets others lead to it.
//! - **Invalidate.** A store to the bytes of a region removes it, or, while it is still expected, has it dropped when it
//!   comes ([`Cache::arrive`]).
//! - **Evict.** [`Cache::place`] removes the oldest regions until there is room.
//!
//! **Invariant:** a slot is freed after every direct branch and bridge that led to it has been led elsewhere, and while
//! no vCPU is in compiled code: whoever calls [`Cache::place`] or [`Cache::invalidate`] sees to that. What holds addresses
//! of code by other means learns from [`Change::Code`] which of them mean nothing any more, before it may use one again.
//!
//! Nothing here knows instructions or the compiler; `model` runs this file against every interleaving of
//! vCPU and workers.

use std::collections::VecDeque;
use std::hash::BuildHasherDefault;

use dashmap::DashMap;
use smallvec::SmallVec;

use crate::addr::PAGE_MASK;
use crate::address_map::{AddressHasher, AddressMap};
use crate::code::{CodeArena, Slot, lead};
use crate::jit::bridge::{Bridge, NO_KEY};

/// Where guest code is: physical address and mode.
pub type Key = (u64, u8);

/// A page, and which granules of it.
pub type Extent = (u64, u64);

/// The number of a region, from 1, never given twice.
pub type RegionId = u64;

/// Regions that are gone and that the order by age may have besides as many as there are.
const ORDER_SLACK: usize = 1024;

/// A direct branch of a region.
pub struct Link {
    /// Its site in the code, which is patchable.
    pub site: usize,
    /// What it leads to: the region at a key, or wherever RIP says.
    pub to: Option<Key>,
    /// Where in the code it leads while there is no region; `None` for wherever RIP says.
    pub otherwise: Option<usize>,
    /// Whether it is quick code's, which regions have for some of their blocks.
    pub quick: bool,
}

/// A compiled region, to be placed.
pub struct Unit<K> {
    /// Host code, complete but for its direct branches.
    pub code: Vec<u8>,
    /// Where in `code` direct branches of other regions enter it; computed jumps and calls do at its start.
    pub tail: usize,
    /// Its direct branches.
    pub branches: Vec<Link>,
    /// Sites of branches and calls in `code`, and the offsets in the arena that they lead to.
    pub calls: Vec<(usize, usize)>,
    /// Pages that its bytes lie in, and which granules of each.
    pub extents: Vec<Extent>,
    /// Where it may be entered, and where in `code` direct branches of quick code enter it there: these count for
    /// themselves, and do not keep RIP.
    pub entries: Vec<(Key, usize)>,
    /// Its blocks; those that are entries need not be among them.
    pub blocks: Vec<Key>,
    /// The page into which the region's one instruction crosses. Only the jump cache and bridges, which know that
    /// the page is mapped behind the first one, lead there.
    pub second_page: Option<u64>,
    /// Whether it is quick code of one block, which a region may replace.
    pub quick: bool,
    /// Its direct branches into other pages ([`crate::jit::bridge`]).
    pub bridges: Box<[Bridge]>,
    /// From which on they are quick code's.
    pub quick_bridges: usize,
    /// Of each bridge, if its code holds what they lead to itself, where in `code` the key stands, 8 bytes at a multiple
    /// of 8, and where the branch for it is.
    pub crossings: Vec<(usize, usize)>,
    /// What the code refers to by address besides, kept for as long as it.
    pub kept: K,
}

/// A region in the arena.
struct Region<K> {
    slot: Slot,
    extents: SmallVec<[Extent; 1]>,
    /// Where it may be entered, as far as no later region has taken its place there.
    entries: SmallVec<[Key; 1]>,
    blocks: Box<[Key]>,
    /// Its direct branches to keys, and their sites in the arena.
    branches: Box<[(Key, u32)]>,
    quick: bool,
    bridges: Box<[Bridge]>,
    quick_bridges: u32,
    /// As in [`Unit`], in the arena.
    crossings: Box<[(u32, u32)]>,
    /// Those of its bridges that lead somewhere, by index, and where.
    bridged: SmallVec<[(u32, Key); 1]>,
    _kept: K,
}

impl<K> Region<K> {
    /// Has a bridge lead nowhere.
    fn part(&self, index: u32, arena: &CodeArena) {
        match self.crossings.get(index as usize) {
            Some(&(constant, _)) => _ = arena.patch_constant(constant as usize, NO_KEY),
            None => self.bridges[index as usize].part(),
        }
    }
}

/// A direct branch.
#[derive(Clone, Copy)]
struct Site {
    /// Its site in the arena.
    at: u32,
    /// Where in the arena it leads without a region.
    otherwise: u32,
    /// Whether it is quick code's.
    quick: bool,
}

impl Site {
    /// Where it is to lead, for what may be entered there.
    fn target(&self, entry: Option<&Entry>) -> usize {
        let tail = |e: &Entry| if self.quick { e.inner } else { e.tail };
        entry.filter(|e| e.is_for(None)).map_or(self.otherwise, tail) as usize
    }
}

/// The way into a region. Offsets in the arena, which is not larger than a branch reaches, have 32 bits: there is an entry
/// for most blocks.
#[derive(Clone, Copy)]
struct Entry {
    region: RegionId,
    /// [`NO_PAGE`] if there is none.
    second_page: u64,
    /// Where its code begins, for calls and computed jumps.
    start: u32,
    /// Where direct branches of regions lead.
    tail: u32,
    /// Where those of quick code do.
    inner: u32,
    quick: bool,
}

/// No page's address.
const NO_PAGE: u64 = u64::MAX;

impl Entry {
    fn is_for(&self, second_page: Option<u64>) -> bool {
        self.second_page == second_page.unwrap_or(NO_PAGE)
    }

    fn runs(&self, arena: &CodeArena) -> Runs {
        Runs { code: arena.exec_ptr(self.start as usize) as u64, quick: self.quick }
    }
}

/// A region whose code has not come yet.
struct Expected {
    extents: Vec<Extent>,
    /// Whether its bytes have changed meanwhile.
    cancelled: bool,
}

/// What the vCPU has to bring up to date after regions came or went.
#[derive(Debug)]
pub enum Change {
    /// What runs at the key now.
    Code(Key, Runs),
    /// The block at the key may become hot again.
    Cool(Key),
    /// Its code has gone for other code to have room.
    Evicted(Key),
    /// These granules of the page hold translated code.
    Mark(u64, u64),
}

/// Whether bytes that lie in `extents` are among `granules` of a page.
fn touch(extents: &[Extent], page: u64, granules: u64) -> bool {
    extents.iter().any(|&(p, g)| p == page && g & granules != 0)
}

/// How the block at a key runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Runs {
    /// Address of its code; 0 if it is interpreted. What is known of an older address means nothing any more.
    pub code: u64,
    /// Whether that is quick code.
    pub quick: bool,
}

impl Runs {
    /// Whether it is part of a region.
    pub fn in_region(self) -> bool {
        self.code != 0 && !self.quick
    }
}

/// Where a region was placed.
#[derive(Clone, Copy, Debug)]
pub struct Placed {
    /// Address of its code.
    pub code: u64,
    /// How many regions went for it to have room.
    pub evicted: u64,
}

/// The regions, compiled and expected, and the code memory that they are in.
pub struct Cache<K> {
    arena: CodeArena,
    /// Offset in the arena to which direct branches lead that have no region to lead to.
    lookup: usize,
    /// What runs at a key: the one thing here that a vCPU looks up by itself.
    entries: DashMap<Key, Entry, BuildHasherDefault<AddressHasher>>,
    regions: AddressMap<RegionId, Box<Region<K>>>,
    by_page: AddressMap<u64, Vec<RegionId>>,
    /// Sites of direct branches to a key, whether it has code now or not.
    incoming: AddressMap<Key, SmallVec<[Site; 1]>>,
    /// Bridges that lead to the code at a key.
    bridged: AddressMap<Key, SmallVec<[(RegionId, u32); 1]>>,
    /// Regions by age, for eviction, and some that are gone.
    order: VecDeque<RegionId>,
    expected: AddressMap<RegionId, Expected>,
    /// How often compiled code of a page was overwritten, or would have been before it was ready.
    rewrites: AddressMap<u64, u32>,
    next_id: RegionId,
    /// What the vCPU has not been told yet.
    pub changes: Vec<Change>,
}

impl<K> Cache<K> {
    /// An empty cache in `arena`; `lookup` is where code begins there that goes wherever RIP says.
    pub fn new(arena: CodeArena, lookup: usize) -> Cache<K> {
        Cache {
            arena,
            lookup,
            entries: DashMap::default(),
            regions: AddressMap::default(),
            by_page: AddressMap::default(),
            incoming: AddressMap::default(),
            bridged: AddressMap::default(),
            order: VecDeque::new(),
            expected: AddressMap::default(),
            rewrites: AddressMap::default(),
            next_id: 1,
            changes: Vec::new(),
        }
    }

    /// The code memory.
    pub fn arena(&self) -> &CodeArena {
        &self.arena
    }

    /// Expects a region of bytes that were read just now and are marked as code: stores to them are noticed from here
    /// on.
    pub fn expect(&mut self, extents: Vec<Extent>) -> RegionId {
        let id = self.number();
        self.expected.insert(id, Expected { extents, cancelled: false });
        id
    }

    /// A number for a region that is placed at once.
    pub fn number(&mut self) -> RegionId {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    /// How many regions there are.
    #[expect(clippy::len_without_is_empty, reason = "nobody asks")]
    pub fn len(&self) -> usize {
        self.regions.len()
    }

    /// How many regions are expected.
    pub fn expected(&self) -> usize {
        self.expected.len()
    }

    /// Expects a region no longer. Whether its code is still that of its bytes, so that it may be placed now.
    pub fn arrive(&mut self, id: RegionId) -> bool {
        self.expected.remove(&id).is_some_and(|e| !e.cancelled)
    }

    /// Drops what is expected when it comes: for when the marks of its code have been cleared, so that stores to it
    /// would not be noticed.
    pub fn cancel_expected(&mut self) {
        self.expected.values_mut().for_each(|e| e.cancelled = true);
        self.rewrites.clear();
    }

    /// Puts a region that has [arrived](Self::arrive) into the arena and links it with the others; `None` if it does
    /// not fit there. No vCPU may be in compiled code.
    pub fn place(&mut self, id: RegionId, mut unit: Unit<K>) -> Option<Placed> {
        let mut evicted = 0;
        let mut slot = loop {
            match self.arena.alloc(unit.code.len()) {
                Some(slot) => break slot,
                None if self.evict() => evicted += 1,
                None => return None,
            }
        };
        let start = slot.offset();
        for (at, to) in unit.calls {
            lead(self.arena.isa(), &mut unit.code, at, start, to)?;
        }
        self.arena.write(&mut slot, &unit.code).ok()?;
        let mut branches = Vec::with_capacity(unit.branches.len());
        for Link { site, to, otherwise, quick } in unit.branches {
            let otherwise = otherwise.map_or(self.lookup, |at| start + at);
            let site = Site { at: (start + site) as u32, otherwise: otherwise as u32, quick };
            if let Some(key) = to {
                self.incoming.entry(key).or_default().push(site);
                branches.push((key, site.at));
            }
            let entry = to.and_then(|key| self.entries.get(&key));
            self.arena.patch_branch(site.at as usize, site.target(entry.as_deref()));
        }
        self.arena.publish(&slot);
        let code = self.arena.exec_ptr(start) as u64;
        let Unit { quick, second_page, .. } = unit;
        let entries: SmallVec<[Key; 1]> = unit.entries.iter().map(|e| e.0).collect();
        self.changes.extend(entries.iter().chain(&unit.blocks).copied().map(Change::Cool));
        for &(page, granules) in &unit.extents {
            self.changes.push(Change::Mark(page, granules));
            self.by_page.entry(page).or_default().push(id);
        }
        if self.order.len() > 2 * self.regions.len() + ORDER_SLACK {
            self.order.retain(|id| self.regions.contains_key(id));
        }
        self.order.push_back(id);
        let region = Region {
            slot,
            extents: SmallVec::from_slice(&unit.extents),
            entries,
            blocks: unit.blocks.into(),
            branches: branches.into(),
            quick,
            bridges: unit.bridges,
            quick_bridges: unit.quick_bridges as u32,
            crossings: unit
                .crossings
                .iter()
                .map(|&(key, site)| ((start + key) as u32, (start + site) as u32))
                .collect(),
            bridged: SmallVec::new(),
            _kept: unit.kept,
        };
        self.regions.insert(id, Box::new(region));
        for (key, inner) in unit.entries {
            let [start, tail, inner] = [0, unit.tail, inner].map(|off| (start + off) as u32);
            let second_page = second_page.unwrap_or(NO_PAGE);
            self.link(key, Some(Entry { region: id, second_page, start, tail, inner, quick }));
        }
        Some(Placed { code, evicted })
    }

    /// Makes `entry` what runs at a key, for the dispatch loop and for the direct branches that lead there. A region
    /// that thereby loses its last entry goes.
    fn link(&mut self, key: Key, entry: Option<Entry>) {
        let old = match entry {
            Some(entry) => self.entries.insert(key, entry),
            None => self.entries.remove(&key).map(|(_, entry)| entry),
        };
        let runs = entry.map_or(Runs::default(), |e| e.runs(&self.arena));
        self.changes.push(Change::Code(key, runs));
        for site in self.incoming.get(&key).into_iter().flatten() {
            self.arena.patch_branch(site.at as usize, site.target(entry.as_ref()));
        }
        for (id, index) in self.bridged.remove(&key).into_iter().flatten() {
            if let Some(from) = self.regions.get_mut(&id) {
                from.part(index, &self.arena);
                from.bridged.retain(|(i, _)| *i != index);
            }
        }
        if let Some(old) = old.filter(|_| entry.is_some())
            && let Some(region) = self.regions.get_mut(&old.region)
        {
            region.entries.retain(|k| *k != key);
            if region.entries.is_empty() {
                self.remove(old.region);
            }
        }
    }

    /// How what may be entered at a key runs; `second_page` as the block there has it.
    pub fn find(&self, key: Key, second_page: Option<u64>) -> Runs {
        let entry = self.entries.get(&key).filter(|e| e.is_for(second_page));
        entry.map_or(Runs::default(), |e| e.runs(&self.arena))
    }

    /// Removes the region that was placed first; what is still hot is compiled again. False if there is none. No vCPU
    /// may be in compiled code.
    pub fn evict(&mut self) -> bool {
        let Some(oldest) = self.oldest() else { return false };
        if let Some(region) = self.regions.get(&oldest) {
            self.changes.extend(region.entries.iter().copied().map(Change::Evicted));
        }
        self.remove(oldest);
        true
    }

    /// The region that was placed first.
    fn oldest(&mut self) -> Option<RegionId> {
        while let Some(id) = self.order.pop_front() {
            if self.regions.contains_key(&id) {
                return Some(id);
            }
        }
        None
    }

    /// Leads the bridge with a name to the region at a key, for branches with the jump-cache key `branch`; false, and it
    /// asks again, without a region there. The key comes with the second page, as the block there has it.
    pub fn lead(&mut self, name: u64, branch: u64, to: Option<(Key, Option<u64>)>) -> bool {
        let (id, index) = Bridge::place(name);
        let to = to.and_then(|(key, second_page)| {
            let entry = self.entries.get(&key).filter(|e| e.is_for(second_page))?;
            Some((key, *entry))
        });
        let Some(region) = self.regions.get_mut(&id) else { return false };
        let Some((key, to)) = to else { return false };
        let at = index as usize;
        let led = region.bridged.iter_mut().find(|(i, _)| *i == index);
        let elsewhere = led.as_ref().is_none_or(|(_, old)| *old != key);
        let quick = index >= region.quick_bridges;
        match region.crossings.get(at) {
            None => {
                let target = if quick { to.inner } else { to.start };
                region.bridges[at].lead(branch, self.arena.exec_ptr(target as usize) as u64);
            }
            Some(&(constant, site)) => {
                let (constant, site) = (constant as usize, site as usize);
                if elsewhere {
                    self.arena.patch_constant(constant, NO_KEY);
                    let target = if quick { to.inner } else { to.tail };
                    self.arena.patch_branch(site, target as usize);
                }
                self.arena.patch_constant(constant, branch);
            }
        }
        if elsewhere {
            let old = led.map(|led| std::mem::replace(&mut led.1, key));
            match old {
                Some(old) => self.forget_bridge((id, index), old),
                None => region.bridged.push((index, key)),
            }
            self.bridged.entry(key).or_default().push((id, index));
        }
        true
    }

    /// Notes that a bridge leads to a key no more.
    fn forget_bridge(&mut self, bridge: (RegionId, u32), key: Key) {
        if let Some(list) = self.bridged.get_mut(&key) {
            list.retain(|b| *b != bridge);
            if list.is_empty() {
                self.bridged.remove(&key);
            }
        }
    }

    /// Has no bridge lead anywhere.
    pub fn part_bridges(&mut self) {
        for region in self.regions.values_mut() {
            for (index, _) in std::mem::take(&mut region.bridged) {
                region.part(index, &self.arena);
            }
        }
        self.bridged.clear();
    }

    fn remove(&mut self, id: RegionId) {
        let Some(region) = self.regions.remove(&id) else { return };
        for key in region.entries {
            self.link(key, None);
            self.changes.push(Change::Cool(key));
        }
        for (key, site) in region.branches {
            if let Some(sites) = self.incoming.get_mut(&key) {
                sites.retain(|s| s.at != site);
                if sites.is_empty() {
                    self.incoming.remove(&key);
                }
            }
        }
        for (index, key) in region.bridged {
            self.forget_bridge((id, index), key);
        }
        self.changes.extend(region.blocks.into_iter().map(Change::Cool));
        for (page, _) in region.extents {
            if let Some(list) = self.by_page.get_mut(&page) {
                list.retain(|&r| r != id);
                if list.is_empty() {
                    self.by_page.remove(&page);
                }
            }
        }
        self.arena.free(region.slot);
    }

    /// Drops every region, when none is expected. No vCPU may be in compiled code, nor go on with what it knows.
    pub fn clear(&mut self) {
        while let Some(oldest) = self.oldest() {
            self.remove(oldest);
        }
        self.changes.clear();
        self.rewrites.clear();
        debug_assert!(self.regions.is_empty() && self.entries.is_empty() && self.by_page.is_empty());
        debug_assert!(self.incoming.is_empty() && self.bridged.is_empty() && self.expected.is_empty());
    }

    /// How often compiled code in the page of `gpa` was overwritten.
    pub fn rewrites(&self, gpa: u64) -> u32 {
        self.rewrites.get(&(gpa & !PAGE_MASK)).copied().unwrap_or(0)
    }

    /// Drops the regions that touch `granules` of a page, those that are expected when they come; returns how many of
    /// the others there were. No vCPU may be in compiled code.
    pub fn invalidate(&mut self, page: u64, granules: u64) -> u64 {
        let mut rewrites = 0;
        for e in self.expected.values_mut().filter(|e| !e.cancelled && touch(&e.extents, page, granules)) {
            e.cancelled = true;
            rewrites += 1;
        }
        let gone = self.touching(page, granules);
        for &id in &gone {
            // Quick code costs little to make again.
            rewrites += u32::from(self.regions.get(&id).is_some_and(|r| !r.quick));
            self.remove(id);
        }
        if rewrites != 0 {
            *self.rewrites.entry(page).or_default() += rewrites;
        }
        gone.len() as u64
    }

    /// Drops the regions that touch `granules` of a page, but no quick code: they are to be compiled in another way. No
    /// vCPU may be in compiled code.
    pub fn renew(&mut self, page: u64, granules: u64) {
        let mut gone = self.touching(page, granules);
        gone.retain(|id| self.regions.get(id).is_some_and(|r| !r.quick));
        gone.into_iter().for_each(|id| self.remove(id));
    }

    /// The regions that touch `granules` of a page.
    fn touching(&self, page: u64, granules: u64) -> Vec<RegionId> {
        let here = self.by_page.get(&page).into_iter().flatten().copied();
        here.filter(|id| self.regions.get(id).is_some_and(|r| touch(&r.extents, page, granules))).collect()
    }

    /// The granules of a page that regions lie in.
    pub fn granules(&self, page: u64) -> u64 {
        let regions = self.by_page.get(&page).into_iter().flatten().filter_map(|id| self.regions.get(id));
        regions.flat_map(|r| &r.extents).filter(|e| e.0 == page).fold(0, |all, e| all | e.1)
    }
}
