//! Frame elision: x86-64 units that jump to one another keep one frame between them.
//!
//! Cranelift begins every x86-64 function with `push rbp; mov rbp, rsp` and ends a direct tail call with
//! `mov rsp, rbp; pop rbp; jmp rel32`. From one unit to the next the frame is popped and pushed again, and that
//! store-to-load round trip, not the jump, is most of what a transfer costs (measured: 4.3 cycles with it, 1.2 to 1.75
//! without). With the `pop` made a `nop`, and the jump led past the two instructions of the next unit's set-up, `rsp`
//! and `rbp` arrive as the set-up would have left them, and the frame of the first unit is the frame of all.
//!
//! In the same way it saves the registers that C functions preserve, and restores them before each exit, though whoever
//! calls compiled code on x86-64 has saved them all. Elided units are entered behind that, and leave without it.
//!
//! AArch64 units that make no call have no frame; there is nothing to elide.

use std::ops::Range;

use super::HostIsa;
use super::patch::{X86_JMP_REL32, is_patchable};

/// Length of `push rbp` alone: how far past its start code that has changed `rbp` since enters an elided unit.
pub const PUSH_LEN: usize = 1;

const FRAME_SETUP: [u8; 4] = [0x55, 0x48, 0x89, 0xe5];
/// `mov rsp, rbp; pop rbp`.
const FRAME_END: [u8; 4] = [0x48, 0x89, 0xec, 0x5d];
/// How much of it elided units keep.
const KEPT: usize = 3;
const NOP: u8 = 0x90;
/// The registers that C functions preserve, besides RBP: RBX and R12 to R15.
const PRESERVED: u16 = 1 << 3 | 0xf000;

/// An x86-64 unit without what surrounds each.
#[derive(Debug, PartialEq, Eq)]
pub struct Elided {
    /// The offset at which tail jumps enter it.
    pub entry: usize,
    /// Where the displacements of its direct tail jumps are now, in the order in which they were given.
    pub sites: Vec<usize>,
}

/// Elides the frame hand-over of an x86-64 unit, and that it saves and restores registers. `tail_jump_sites` are all its
/// direct tail calls, as the offsets of their relocations, before [`add_link_cells`](super::add_link_cells);
/// `tail_jumps` are its computed ones, each from where it begins to restore registers.
///
/// `None`, and `code` unchanged, when it does not have the expected form: such a unit is entered at its start and must
/// not be linked with elided ones.
///
/// The target of every direct tail jump of an elided unit must then be entered at its own [`Elided::entry`]; calls and
/// computed tail jumps enter any unit at its start.
pub fn elide_frame(code: &mut [u8], tail_jump_sites: &[usize], tail_jumps: &[Range<usize>]) -> Option<Elided> {
    let is_tail_jump = |&site: &usize| {
        code.get(..site)
            .and_then(|before| before.strip_suffix(&[X86_JMP_REL32]))
            .is_some_and(|b| b.ends_with(&FRAME_END))
            && code.len() - site >= size_of::<i32>()
    };
    if !code.starts_with(&FRAME_SETUP) || !tail_jump_sites.iter().all(is_tail_jump) {
        return None;
    }
    let storage = Storage::of(&code[FRAME_SETUP.len()..]);
    let give_back = storage.give_back.as_slice();
    let sites = tail_jump_sites.iter().map(|&site| {
        let end = site - 1 - FRAME_END.len();
        if !code[..end].ends_with(give_back) {
            code[site - 2] = NOP;
            return site;
        }
        let start = end - give_back.len();
        code[start..site - 1].fill(NOP);
        code[start..start + KEPT].copy_from_slice(&FRAME_END[..KEPT]);
        let earlier = (start + KEPT + 1..=site).find(|&at| is_patchable(HostIsa::X86_64, at)).unwrap_or(site);
        // What is behind it is the displacement of before, or nothing that control comes to.
        code[earlier - 1] = X86_JMP_REL32;
        code[earlier..earlier + size_of::<i32>()].fill(0);
        earlier
    });
    let sites = sites.collect();
    for jump in tail_jumps {
        let Some(bytes) = code.get_mut(jump.clone()) else { continue };
        if bytes.strip_prefix(give_back).is_some_and(|rest| rest.starts_with(&FRAME_END)) {
            bytes.copy_within(give_back.len().., 0);
        }
    }
    let take = &mut code[FRAME_SETUP.len()..][..storage.allocate + storage.save];
    take.copy_within(..storage.allocate, storage.save);
    fill(&mut take[..storage.save]);
    Some(Elided { entry: FRAME_SETUP.len() + storage.save, sites })
}

/// How a unit makes room on the stack and saves registers there.
struct Storage {
    /// Bytes of the instruction that makes room, first of all, and of those that save.
    allocate: usize,
    save: usize,
    /// The instructions that undo both, in the order in which each exit does.
    give_back: Vec<u8>,
}

impl Storage {
    /// By what stands behind the set-up of the frame.
    fn of(code: &[u8]) -> Storage {
        let mut storage = Storage { allocate: 0, save: 0, give_back: Vec::new() };
        // sub rsp, imm8 or imm32
        storage.allocate = match code {
            [0x48, 0x83, 0xec, _, ..] => 4,
            [0x48, 0x81, 0xec, _, _, _, _, ..] => 7,
            _ => return storage,
        };
        let (allocate, mut rest) = code.split_at(storage.allocate);
        let mut saved = 0;
        // mov [rsp + disp], r64
        while let [rex @ (0x48 | 0x4c), 0x89, modrm, 0x24, ..] = *rest
            && modrm & 7 == 4
            && let Some(&bytes) = [4, 5, 8].get(usize::from(modrm >> 6)).filter(|&&n| n <= rest.len())
        {
            let register = 1 << (modrm >> 3 & 7 | (rex & 4) << 1);
            if register & PRESERVED & !saved == 0 {
                break;
            }
            saved |= register;
            storage.give_back.extend([rex, 0x8b]);
            storage.give_back.extend(&rest[2..bytes]);
            storage.save += bytes;
            rest = &rest[bytes..];
        }
        // add rsp, of the same form
        storage.give_back.extend([allocate[0], allocate[1], 0xc4]);
        storage.give_back.extend(&allocate[3..]);
        storage
    }
}

/// Fills code with as few instructions without effect as there may be (SDM vol. 2, `NOP`).
fn fill(code: &mut [u8]) {
    const LONG: [&[u8]; 9] = [
        &[0x90],
        &[0x66, 0x90],
        &[0x0f, 0x1f, 0x00],
        &[0x0f, 0x1f, 0x40, 0x00],
        &[0x0f, 0x1f, 0x44, 0x00, 0x00],
        &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
        &[0x0f, 0x1f, 0x80, 0x00, 0x00, 0x00, 0x00],
        &[0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
        &[0x66, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
    ];
    for part in code.chunks_mut(LONG.len()) {
        part.copy_from_slice(LONG[part.len() - 1]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: [u8; 22] = [
        0x55, 0x48, 0x89, 0xe5, // push rbp; mov rbp, rsp
        0x48, 0x89, 0xec, 0x5d, 0xe9, 0x5d, 0xe9, 0, 0, // mov rsp, rbp; pop rbp; jmp
        0x48, 0x89, 0xec, 0x5d, 0xe9, 0, 0, 0, 0, // the same
    ];

    fn elided(entry: usize, sites: &[usize]) -> Option<Elided> {
        Some(Elided { entry, sites: sites.to_vec() })
    }

    #[test]
    fn nothing_is_popped_before_the_given_jumps() {
        let mut code = UNIT;
        assert_eq!(elide_frame(&mut code, &[9, 18], &[]), elided(4, &[8, 17]));
        let mut expected = UNIT;
        expected[7..12].copy_from_slice(&[0xe9, 0, 0, 0, 0]);
        expected[16..21].copy_from_slice(&[0xe9, 0, 0, 0, 0]);
        assert_eq!(code, expected);
    }

    #[test]
    fn a_unit_without_tail_jumps_is_only_entered_later() {
        let mut code = UNIT;
        assert_eq!(elide_frame(&mut code, &[], &[]), elided(4, &[]));
        assert_eq!(code, UNIT);
    }

    /// A unit with room of its own, which saves RBX and R12.
    const SAVING: [u8; 59] = [
        0x55, 0x48, 0x89, 0xe5, // push rbp; mov rbp, rsp
        0x48, 0x83, 0xec, 0x20, // sub rsp, 20h
        0x48, 0x89, 0x5c, 0x24, 0x10, // mov [rsp + 10h], rbx
        0x4c, 0x89, 0x24, 0x24, // mov [rsp], r12
        0x4c, 0x89, 0x44, 0x24, 0x08, // mov [rsp + 8], r8: the unit's own
        0x48, 0x8b, 0x5c, 0x24, 0x10, 0x4c, 0x8b, 0x24, 0x24, 0x48, 0x83, 0xc4, 0x20, // all back
        0x48, 0x89, 0xec, 0x5d, 0xe9, 0, 0, 0, 0, // mov rsp, rbp; pop rbp; jmp
        0x48, 0x8b, 0x5c, 0x24, 0x10, 0x4c, 0x8b, 0x24, 0x24, 0x48, 0x83, 0xc4, 0x20, // all back
        0x48, 0x89, // mov rsp, rbp; pop rbp; jmp rax: added where it is needed
    ];

    #[test]
    fn registers_are_neither_saved_nor_restored() {
        let mut code = [&SAVING[..], &[0xec, 0x5d, 0xff, 0xe0]].concat();
        let computed = 44..63;
        let Some(Elided { entry, sites }) = elide_frame(&mut code, &[40], std::slice::from_ref(&computed)) else {
            panic!("it has the form");
        };
        // Nine bytes of no effect, and then the room is made.
        assert_eq!(code[4..17], [0x66, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0, 0x48, 0x83, 0xec, 0x20]);
        assert_eq!((entry, &code[17..22]), (13, &SAVING[17..22]));
        let [site] = sites[..] else { panic!("one site") };
        assert!(is_patchable(HostIsa::X86_64, site) && site < 40);
        assert_eq!(code[22..25], [0x48, 0x89, 0xec]);
        assert!(code[25..site - 1].iter().all(|&b| b == NOP));
        assert_eq!(code[site - 1..site + 4], [0xe9, 0, 0, 0, 0]);
        assert_eq!(code[computed.start..][..6], [0x48, 0x89, 0xec, 0x5d, 0xff, 0xe0]);
    }

    #[test]
    fn what_restores_something_else_does_so_still() {
        let mut code = SAVING;
        code[26] = 0x18;
        let before = code;
        assert_eq!(elide_frame(&mut code, &[40], std::slice::from_ref(&(44..59))), elided(13, &[40]));
        assert_eq!((&code[17..38], code[38]), (&before[17..38], NOP));
        assert_eq!(code[39..], before[39..], "this one ends before it jumps");
    }

    #[test]
    fn any_unexpected_byte_leaves_the_unit_alone() {
        // A site that is none, one that ends outside, one before the start.
        for sites in [&[9, 17][..], &[9, 11], &[22], &[usize::MAX], &[0], &[9, 1]] {
            let mut code = UNIT;
            assert_eq!(elide_frame(&mut code, sites, &[]), None, "{sites:?}");
            assert_eq!(code, UNIT);
        }
        for changed in [0, 1, 2, 3, 4, 5, 6, 7, 8] {
            let mut code = UNIT;
            code[changed] ^= 1;
            let before = code;
            assert_eq!(elide_frame(&mut code, &[9, 18], &[]), None, "byte {changed}");
            assert_eq!(code, before);
        }
        assert_eq!(elide_frame(&mut UNIT[..20].to_vec(), &[18], &[]), None);
        assert_eq!(elide_frame(&mut [], &[], &[]), None);
    }
}
