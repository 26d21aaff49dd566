//! Near branches where they are more than an addition (SDM vol. 2, JMP and Jcc).

use diglot_translator::state::flag;

use crate::machine::{CODE, Machine, check};

#[test]
fn a_16_bit_operand_size_cuts_eip() {
    // In 32-bit code, behind an operand-size prefix: JMP rel8, JMP rel16, JC, LOOP, CALL rel16, each to 40h bytes on.
    let branches: [&[u8]; 5] =
        [&[0x66, 0xeb, 0x40], &[0x66, 0xe9, 0x40, 0], &[0x66, 0x72, 0x40], &[0x66, 0xe2, 0x40], &[0x66, 0xe8, 0x40, 0]];
    for branch in branches {
        let build = || {
            let mut m = Machine::flat32().flags(0);
            m.s.set_flags(flag::CF);
            m.s.gpr[1] = 5;
            m.s.rip = CODE + 0x300;
            m.bytes(m.s.rip, branch);
            // HLT where EIP would be uncut, and where it goes.
            for at in [CODE, 0] {
                m.w8(at + 0x340 + branch.len() as u64, 0xf4);
            }
            m
        };
        check(build, |o| assert_eq!(o.s.rip, 0x341 + branch.len() as u64, "{}: {branch:02x?}", o.engine));
    }
}
