//! The page walk (SDM vol. 3 chapter 4): 32-bit, PAE and 4-level paging, permissions, accessed and dirty bits.

use std::sync::atomic::Ordering;

use crate::exception::Exception;
use crate::mem::GuestRam;
use crate::state::cr;

/// Physical address bits that the CPU reports in CPUID 80000008h.
pub const PHYSICAL_BITS: u32 = 46;

/// Bits of a paging-structure entry (SDM vol. 3 §4.3–4.5).
mod pte {
    pub const P: u64 = 1 << 0;
    pub const W: u64 = 1 << 1;
    pub const U: u64 = 1 << 2;
    pub const A: u64 = 1 << 5;
    pub const D: u64 = 1 << 6;
    pub const PS: u64 = 1 << 7;
    pub const G: u64 = 1 << 8;
    pub const KEY_SHIFT: u32 = 59;
    pub const NX: u64 = 1 << 63;
}

/// Page-fault error code bits (SDM vol. 3 figure 4-12).
mod pf {
    pub const P: u32 = 1;
    pub const W: u32 = 2;
    pub const U: u32 = 4;
    pub const RSVD: u32 = 8;
    pub const I: u32 = 16;
    pub const PK: u32 = 32;
}

/// The two bits of a protection key in PKRU and IA32_PKRS (SDM vol. 3 §4.6.2).
mod rights {
    pub const ACCESS_DISABLE: u32 = 1;
    pub const WRITE_DISABLE: u32 = 2;
}

/// What an access wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A data read.
    Read,
    /// A data write.
    Write,
    /// An instruction fetch.
    Execute,
}

/// The control-register state that a walk depends on.
#[derive(Clone, Copy, Debug)]
pub struct Paging {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// PDPTE registers, for PAE paging (SDM vol. 3 §4.4.1).
    pub pdpte: [u64; 4],
    /// Rights of the protection keys of user pages: PKRU where CR4.PKE lets it count, else 0.
    pub user_keys: u32,
    /// Rights of the protection keys of supervisor pages: IA32_PKRS where CR4.PKS lets it count, else 0.
    pub supervisor_keys: u32,
}

/// A completed walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walk {
    /// Guest physical address of the accessed byte.
    pub gpa: u64,
    /// Whether writes are permitted now without a further walk (permission, and the dirty bit is set).
    pub writable: bool,
    /// Whether the translation is global.
    pub global: bool,
    /// The page's protection key, 0–15; 0 where there are none.
    pub key: u8,
    /// Address bits inside the page: 12, 21, 22 or 30; 32 without paging.
    pub page_bits: u32,
}

/// Where the entries of one level are and what they may hold.
struct Level {
    shift: u32,
    /// Whether PS may be set here.
    large: bool,
    index_bits: u32,
}

const LONG: [Level; 4] = [
    Level { shift: 39, large: false, index_bits: 9 },
    Level { shift: 30, large: true, index_bits: 9 },
    Level { shift: 21, large: true, index_bits: 9 },
    Level { shift: 12, large: false, index_bits: 9 },
];
const LEGACY: [Level; 2] =
    [Level { shift: 22, large: true, index_bits: 10 }, Level { shift: 12, large: false, index_bits: 10 }];

/// Why a walk came to no end.
enum Stop {
    /// The page fault to raise.
    Fault(Exception),
    /// Another vCPU has changed an entry since it was read.
    Changed,
}

/// Translates `linear` for an access by `user` (CPL 3) or supervisor code; `smap` forbids data accesses to user
/// pages. Sets accessed and dirty bits, each in an entry that is still what the walk has read. The error is the page fault to
/// raise.
pub fn walk(
    ram: &GuestRam,
    p: &Paging,
    linear: u64,
    access: Access,
    user: bool,
    smap: bool,
) -> Result<Walk, Exception> {
    loop {
        match walk_once(ram, p, linear, access, user, smap) {
            Ok(found) => return Ok(found),
            Err(Stop::Fault(e)) => return Err(e),
            Err(Stop::Changed) => {}
        }
    }
}

fn walk_once(ram: &GuestRam, p: &Paging, linear: u64, access: Access, user: bool, smap: bool) -> Result<Walk, Stop> {
    if p.cr0 & cr::CR0_PG == 0 {
        return Ok(Walk { gpa: linear & 0xffff_ffff, writable: true, global: false, key: 0, page_bits: 32 });
    }
    let nxe = p.efer & cr::EFER_NXE != 0;
    let long = p.efer & cr::EFER_LMA != 0;
    let pae = p.cr4 & cr::CR4_PAE != 0;
    let mut code = if user { pf::U } else { 0 };
    match access {
        Access::Read => {}
        Access::Write => code |= pf::W,
        // I/D is reported only when fetches can fault as such (SDM vol. 3 §4.7).
        Access::Execute if (nxe && (pae || long)) || p.cr4 & cr::CR4_SMEP != 0 => code |= pf::I,
        Access::Execute => {}
    }
    let fault = |bits: u32| Stop::Fault(Exception::page_fault(code | bits, linear));
    let address_mask = ((1u64 << PHYSICAL_BITS) - 1) & !0xfff;
    let (levels, entry_bytes, mut table, mut reserved): (&[Level], u64, u64, u64) = if long {
        (&LONG, 8, p.cr3 & address_mask, (1 << 52) - (1 << PHYSICAL_BITS))
    } else if pae {
        let pdpte = p.pdpte[(linear >> 30 & 3) as usize];
        if pdpte & pte::P == 0 {
            return Err(fault(0));
        }
        // Bits 62:52 are reserved too in PAE paging (SDM vol. 3 table 4-10).
        (&LONG[2..], 8, pdpte & address_mask, ((1 << 63) - 1) & !((1u64 << PHYSICAL_BITS) - 1))
    } else {
        (&LEGACY, 4, p.cr3 & 0xffff_f000, 0)
    };
    if !nxe {
        reserved |= pte::NX;
    }
    let (mut writable, mut user_page, mut no_execute) = (true, true, false);
    for level in levels {
        let index = linear >> level.shift & ((1 << level.index_bits) - 1);
        let at = table + index * entry_bytes;
        // A paging structure outside RAM reads as not present.
        let Some(mut entry) = read_entry(ram, at, entry_bytes) else { return Err(fault(0)) };
        if entry & pte::P == 0 {
            return Err(fault(0));
        }
        let legacy = entry_bytes == 4;
        let is_large = entry & pte::PS != 0 && level.large && (!legacy || p.cr4 & cr::CR4_PSE != 0);
        let mut bad = if legacy { 0 } else { reserved };
        if is_large {
            // Bits between PAT (12) and the page frame are reserved; PSE-36 has bits 20:13 as address, bit 21 reserved.
            bad |= if legacy { 1 << 21 } else { (1u64 << level.shift) - (1 << 13) };
        } else if !legacy && level.shift != 12 && !level.large {
            bad |= pte::PS;
        }
        if entry & bad != 0 {
            return Err(fault(pf::P | pf::RSVD));
        }
        writable &= entry & pte::W != 0;
        user_page &= entry & pte::U != 0;
        no_execute |= !legacy && entry & pte::NX != 0;
        let leaf = is_large || level.shift == 12;
        if !leaf {
            set_bits(ram, at, &mut entry, pte::A, entry_bytes)?;
            table = if legacy { entry & 0xffff_f000 } else { entry & address_mask };
            continue;
        }
        let wp = p.cr0 & cr::CR0_WP != 0;
        let allowed = match access {
            Access::Read => user_page || !user,
            Access::Write => (user_page || !user) && (writable || (!user && !wp)),
            Access::Execute => {
                !no_execute && (if user { user_page } else { !(user_page && p.cr4 & cr::CR4_SMEP != 0) })
            }
        };
        let key = if long { (entry >> pte::KEY_SHIFT & 15) as u8 } else { 0 };
        let rights = if user_page { p.user_keys } else { p.supervisor_keys } >> (2 * key);
        let write_disabled = rights & rights::WRITE_DISABLE != 0 && (user || wp);
        let disabled = rights & rights::ACCESS_DISABLE != 0 || (access == Access::Write && write_disabled);
        // Keys do not govern fetches. Their bit of the error code is set whatever else forbids the access.
        if access != Access::Execute && disabled {
            return Err(fault(pf::P | pf::PK));
        }
        let smap_violation = smap && !user && user_page && access != Access::Execute;
        if !allowed || smap_violation {
            return Err(fault(pf::P));
        }
        let dirty = if access == Access::Write { pte::D } else { 0 };
        set_bits(ram, at, &mut entry, pte::A | dirty, entry_bytes)?;
        let offset_mask = (1u64 << level.shift) - 1;
        let frame = match (legacy, is_large) {
            (true, true) => (entry & 0xffc0_0000) | (entry >> 13 & 0xff) << 32,
            (true, false) => entry & 0xffff_f000,
            (false, _) => entry & address_mask & !offset_mask,
        };
        return Ok(Walk {
            gpa: frame | (linear & offset_mask),
            writable: (writable || (!user && !wp)) && !write_disabled && entry & pte::D != 0,
            global: entry & pte::G != 0 && p.cr4 & cr::CR4_PGE != 0,
            key,
            page_bits: level.shift,
        });
    }
    Err(fault(0))
}

/// Checks and loads the four PDPTE registers from CR3; `None` when a reserved bit is set (#GP).
pub fn load_pdptes(ram: &GuestRam, cr3: u64) -> Option<[u64; 4]> {
    let base = cr3 & 0xffff_ffe0;
    let mut out = [0; 4];
    let reserved = 0x1e6 | !((1u64 << PHYSICAL_BITS) - 1);
    for (i, e) in out.iter_mut().enumerate() {
        *e = ram.read_u64(base + 8 * i as u64).unwrap_or(0);
        if *e & pte::P != 0 && *e & reserved != 0 {
            return None;
        }
    }
    Some(out)
}

fn read_entry(ram: &GuestRam, at: u64, bytes: u64) -> Option<u64> {
    let word = ram.read_u64(at & !7)?;
    Some(if bytes == 8 { word } else { word >> (8 * (at & 4)) & 0xffff_ffff })
}

/// Sets bits in an entry that is still as it was read, atomically, as the hardware does.
fn set_bits(ram: &GuestRam, at: u64, entry: &mut u64, bits: u64, bytes: u64) -> Result<(), Stop> {
    if *entry & bits == bits {
        return Ok(());
    }
    let Some(word) = ram.atomic(at & !7) else { return Ok(()) };
    let (shift, mask) = if bytes == 8 { (0, u64::MAX) } else { (8 * (at & 4), 0xffff_ffff) };
    let set = |word: u64| (word >> shift & mask == *entry).then_some(word | bits << shift);
    word.fetch_update(Ordering::AcqRel, Ordering::Acquire, set).map_err(|_| Stop::Changed)?;
    *entry |= bits;
    Ok(())
}
