//! Direct branches: their encodings on each host, and which of them can be replaced while they run.
//!
//! **x86-64.** A store reaches instruction fetch whole when it lies inside one naturally aligned quadword
//! (AMD APM vol. 2 §7.3.2 and §7.6.1; SDM vol. 3 §9.1.1 promises as much for aligned stores). So a displacement at
//! an offset of 0 to 4 in its quadword can be patched: by a 32-bit store at 0 and 4, else by a 64-bit store of the
//! whole quadword. Cranelift does not align its jumps, and three in eight lie across a boundary: [`add_link_cells`]
//! gives each of these an aligned jump of its own to go through.
//!
//! **AArch64.** Every instruction is an aligned word, and `B` is one of the few that may be changed into another `B`
//! while other cores execute it (Arm ARM B2.2.5).

use super::HostIsa;

/// Opcode of `jmp rel32` (SDM vol. 2 `JMP`).
pub(super) const X86_JMP_REL32: u8 = 0xe9;
const AARCH64_B: u32 = 0x1400_0000;
const AARCH64_B_MASK: u32 = 0xfc00_0000;
/// What makes a `B` a `BL`.
const AARCH64_BL: u32 = 1 << 31;

/// A direct jump, encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Jump {
    bytes: [u8; 5],
    len: u8,
    site: u8,
}

impl Jump {
    /// The instruction.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    /// Offset of its branch site from its first byte.
    pub fn site(&self) -> usize {
        usize::from(self.site)
    }
}

/// The jump that stands at offset `from` and leads to offset `to`; `None` when it can't reach, or when either is not
/// aligned as instructions are.
pub fn encode_jump(isa: HostIsa, from: usize, to: usize) -> Option<Jump> {
    match isa {
        HostIsa::X86_64 => {
            let [a, b, c, d] = branch_word(isa, from.checked_add(1)?, to)?.to_le_bytes();
            Some(Jump { bytes: [X86_JMP_REL32, a, b, c, d], len: 5, site: 1 })
        }
        HostIsa::Aarch64 => {
            let [a, b, c, d] = branch_word(isa, from, to)?.to_le_bytes();
            Some(Jump { bytes: [a, b, c, d, 0], len: 4, site: 0 })
        }
    }
}

/// The 32 bits to store at `site` so that the branch there leads to `target`: a displacement on x86-64, the whole
/// instruction on AArch64.
pub(super) fn branch_word(isa: HostIsa, site: usize, target: usize) -> Option<u32> {
    let distance = i64::try_from(target).ok()?.checked_sub(i64::try_from(site).ok()?)?;
    match isa {
        // Counted from the end of the instruction.
        HostIsa::X86_64 => i32::try_from(distance.checked_sub(4)?).ok().map(i32::cast_unsigned),
        HostIsa::Aarch64 => {
            let reach = HostIsa::Aarch64.branch_reach() as i64;
            let aligned = site.is_multiple_of(4) && target.is_multiple_of(4);
            let words = (aligned && (-reach..reach).contains(&distance)).then_some(distance / 4)?;
            Some(AARCH64_B | (words as u32 & !AARCH64_B_MASK))
        }
    }
}

/// Has the branch or call at `site` of `code`, not yet written, lead to `target`: an offset in what has `code` at `base`. On
/// x86-64 the site is its displacement, on AArch64 the `B` or `BL` itself.
pub fn lead(isa: HostIsa, code: &mut [u8], site: usize, base: usize, target: usize) -> Option<()> {
    let mut word = branch_word(isa, base.checked_add(site)?, target)?;
    let at = code.get_mut(site..site.checked_add(4)?)?.first_chunk_mut::<4>()?;
    if isa == HostIsa::Aarch64 {
        word |= u32::from_le_bytes(*at) & AARCH64_BL;
    }
    *at = word.to_le_bytes();
    Some(())
}

/// Whether a displacement of 32 bits is that of a direct x86-64 branch, by the two bytes before it: `jmp rel32` or
/// `jcc rel32`.
pub(super) fn is_x86_branch([first, second]: [u8; 2]) -> bool {
    second == X86_JMP_REL32 || (first == 0x0f && second & 0xf0 == 0x80)
}

pub(super) fn is_aarch64_b(word: u32) -> bool {
    word & AARCH64_B_MASK == AARCH64_B
}

/// Whether the branch at `site` can be replaced by one atomic store. Slots are aligned, so an offset in the unit
/// serves as well as one in the arena.
pub fn is_patchable(isa: HostIsa, site: usize) -> bool {
    match isa {
        HostIsa::X86_64 => site % 8 <= 4,
        HostIsa::Aarch64 => site.is_multiple_of(4),
    }
}

/// Gives every site of a unit that is not [patchable](is_patchable) a *link cell*: an aligned jump after the code,
/// which the site leads to from now on. Returns the sites to patch, in the order of `sites`: those that were good,
/// and the cells of the others. A cell leads nowhere until it is patched.
///
/// `code` is a unit not yet written to its slot, `sites` are offsets in it. `None`, and `code` unchanged, when a site
/// is no direct jump.
pub fn add_link_cells(isa: HostIsa, code: &mut Vec<u8>, sites: &[usize]) -> Option<Vec<usize>> {
    let is_jump = |&site: &usize| match isa {
        HostIsa::X86_64 => {
            site.checked_add(4).is_some_and(|end| end <= code.len())
                && site.checked_sub(1).is_some_and(|opcode| code[opcode] == X86_JMP_REL32)
        }
        HostIsa::Aarch64 => {
            let word = code.get(site..).and_then(|rest| rest.first_chunk::<4>());
            site.is_multiple_of(4) && word.is_some_and(|word| is_aarch64_b(u32::from_le_bytes(*word)))
        }
    };
    if !sites.iter().all(is_jump) {
        return None;
    }
    let links = sites.iter().map(|&site| {
        if is_patchable(isa, site) {
            return Some(site);
        }
        // Only x86-64 comes here: the displacement of the cell falls on a multiple of 4.
        let cell = code.len().next_multiple_of(4) + 3;
        code.resize(cell, isa.filler());
        let to_itself = encode_jump(isa, cell, cell)?;
        code.extend_from_slice(to_itself.as_bytes());
        lead(isa, code, site, 0, cell)?;
        Some(cell + to_itself.site())
    });
    links.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encodes_jumps_of_both_hosts() {
        use HostIsa::{Aarch64, X86_64};
        let b = |word: u32| Some(word.to_le_bytes().to_vec());
        let cases: &[(HostIsa, usize, usize, Option<Vec<u8>>)] = &[
            (X86_64, 0, 5, Some(vec![0xe9, 0, 0, 0, 0])),
            (X86_64, 0x100, 0x100, Some(vec![0xe9, 0xfb, 0xff, 0xff, 0xff])),
            (X86_64, 0, 0x1234_5678, Some(vec![0xe9, 0x73, 0x56, 0x34, 0x12])),
            (X86_64, 0, (1 << 31) + 4, Some(vec![0xe9, 0xff, 0xff, 0xff, 0x7f])),
            (X86_64, 0, (1 << 31) + 5, None),
            (X86_64, (1 << 31) - 5, 0, Some(vec![0xe9, 0, 0, 0, 0x80])),
            (X86_64, (1 << 31) - 4, 0, None),
            (X86_64, usize::MAX, 0, None),
            (Aarch64, 0, 0, b(0x1400_0000)),
            (Aarch64, 8, 12, b(0x1400_0001)),
            (Aarch64, 12, 8, b(0x17ff_ffff)),
            (Aarch64, 0, (1 << 27) - 4, b(0x15ff_ffff)),
            (Aarch64, 0, 1 << 27, None),
            (Aarch64, 1 << 27, 0, b(0x1600_0000)),
            (Aarch64, (1 << 27) + 4, 0, None),
            (Aarch64, 2, 8, None),
            (Aarch64, 0, 6, None),
        ];
        for (isa, from, to, expected) in cases {
            let jump = encode_jump(*isa, *from, *to);
            assert_eq!(jump.as_ref().map(|j| j.as_bytes().to_vec()), *expected, "{isa:?} {from:#x} -> {to:#x}");
        }
    }

    #[test]
    fn only_sites_inside_a_quadword_are_patchable() {
        let patchable = |isa| (0..12).filter(|&site| is_patchable(isa, site)).collect::<Vec<_>>();
        assert_eq!(patchable(HostIsa::X86_64), [0, 1, 2, 3, 4, 8, 9, 10, 11]);
        assert_eq!(patchable(HostIsa::Aarch64), [0, 4, 8]);
    }

    #[test]
    fn link_cells_make_every_site_patchable() {
        for pad in 0..32 {
            let mut code = vec![0x90; pad];
            code.extend([0xe9, 0, 0, 0, 0, 0x90, 0xe9, 0, 0, 0, 0]);
            let sites = [pad + 1, pad + 7];
            let links = add_link_cells(HostIsa::X86_64, &mut code, &sites).unwrap();
            for (&site, &link) in sites.iter().zip(&links) {
                assert!(is_patchable(HostIsa::X86_64, link));
                assert_eq!(is_patchable(HostIsa::X86_64, site), link == site);
                if link != site {
                    let jump = encode_jump(HostIsa::X86_64, site - 1, link - 1).unwrap();
                    assert_eq!(code[site - 1..site + 4], *jump.as_bytes());
                    assert_eq!(code[link - 1..link + 4], *encode_jump(HostIsa::X86_64, 0, 0).unwrap().as_bytes());
                }
            }
        }
    }

    #[test]
    fn link_cells_refuse_what_is_no_jump() {
        for (code, site) in [(vec![0x90; 8], 1), (vec![0xe9, 0, 0, 0], 1), (vec![0xe9; 8], 0), (vec![], usize::MAX)] {
            let mut after = code.clone();
            assert_eq!(add_link_cells(HostIsa::X86_64, &mut after, &[site]), None);
            assert_eq!(after, code);
        }
        let mut b = 0x1400_0000_u32.to_le_bytes().to_vec();
        assert_eq!(add_link_cells(HostIsa::Aarch64, &mut b, &[0]), Some(vec![0]));
        assert_eq!(add_link_cells(HostIsa::Aarch64, &mut b, &[4]), None);
    }
}
