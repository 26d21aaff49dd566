//! Frame elision: x86-64 units that jump to one another keep one frame between them.
//!
//! Cranelift begins every x86-64 function with `push rbp; mov rbp, rsp` and ends a direct tail call with
//! `mov rsp, rbp; pop rbp; jmp rel32`. From one unit to the next the frame is popped and pushed again, and that
//! store-to-load round trip, not the jump, is most of what a transfer costs (measured: 4.3 cycles with it, 1.2 to 1.75
//! without). With the `pop` made a `nop`, and the jump led past the two instructions of the next unit's set-up, `rsp`
//! and `rbp` arrive as the set-up would have left them, and the frame of the first unit is the frame of all.
//!
//! AArch64 units that make no call have no frame; there is nothing to elide.

/// Length of `push rbp; mov rbp, rsp`: how far past its start an elided unit is entered.
pub const FRAME_SETUP_LEN: usize = FRAME_SETUP.len();

/// Length of `push rbp` alone: how far past its start code that has changed `rbp` since enters an elided unit.
pub const PUSH_LEN: usize = 1;

const FRAME_SETUP: [u8; 4] = [0x55, 0x48, 0x89, 0xe5];
/// `mov rsp, rbp; pop rbp; jmp rel32`, up to the displacement.
const TAIL_JUMP: [u8; 5] = [0x48, 0x89, 0xec, 0x5d, 0xe9];
/// Where the `pop rbp` stands, counted back from the displacement.
const POP_BEFORE_SITE: usize = 2;
const NOP: u8 = 0x90;

/// Elides the frame hand-over of an x86-64 unit: replaces `pop rbp` before each direct tail jump. `tail_jump_sites`
/// are all its direct tail calls, as the offsets of their relocations, before
/// [`add_link_cells`](super::add_link_cells).
///
/// Returns the offset at which tail jumps enter the unit, [`FRAME_SETUP_LEN`]. `None`, and `code` unchanged, when it
/// does not have the expected form: such a unit is entered at its start and must not be linked with elided ones.
///
/// The target of every direct tail jump of an elided unit must then be entered past its own set-up, exit stubs too.
/// Calls, returns and indirect tail jumps are not changed and use the start of their targets.
pub fn elide_frame(code: &mut [u8], tail_jump_sites: &[usize]) -> Option<usize> {
    let is_tail_jump = |&site: &usize| {
        code.get(..site).is_some_and(|before| before.ends_with(&TAIL_JUMP)) && code.len() - site >= size_of::<i32>()
    };
    if !code.starts_with(&FRAME_SETUP) || !tail_jump_sites.iter().all(is_tail_jump) {
        return None;
    }
    for &site in tail_jump_sites {
        code[site - POP_BEFORE_SITE] = NOP;
    }
    Some(FRAME_SETUP_LEN)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: [u8; 22] = [
        0x55, 0x48, 0x89, 0xe5, // push rbp; mov rbp, rsp
        0x48, 0x89, 0xec, 0x5d, 0xe9, 0x5d, 0xe9, 0, 0, // mov rsp, rbp; pop rbp; jmp
        0x48, 0x89, 0xec, 0x5d, 0xe9, 0, 0, 0, 0, // the same
    ];

    #[test]
    fn pops_before_the_given_jumps_become_nops() {
        let mut code = UNIT;
        assert_eq!(elide_frame(&mut code, &[9, 18]), Some(4));
        let mut expected = UNIT;
        expected[7] = 0x90;
        expected[16] = 0x90;
        assert_eq!(code, expected);
    }

    #[test]
    fn a_unit_without_tail_jumps_is_only_entered_later() {
        let mut code = UNIT;
        assert_eq!(elide_frame(&mut code, &[]), Some(4));
        assert_eq!(code, UNIT);
    }

    #[test]
    fn any_unexpected_byte_leaves_the_unit_alone() {
        // A site that is none, one that ends outside, one before the start.
        for sites in [&[9, 17][..], &[9, 11], &[22], &[usize::MAX], &[0], &[9, 1]] {
            let mut code = UNIT;
            assert_eq!(elide_frame(&mut code, sites), None, "{sites:?}");
            assert_eq!(code, UNIT);
        }
        for changed in [0, 1, 2, 3, 4, 5, 6, 7, 8] {
            let mut code = UNIT;
            code[changed] ^= 1;
            let before = code;
            assert_eq!(elide_frame(&mut code, &[9, 18]), None, "byte {changed}");
            assert_eq!(code, before);
        }
        assert_eq!(elide_frame(&mut UNIT[..20].to_vec(), &[18]), None);
        assert_eq!(elide_frame(&mut [], &[]), None);
    }
}
