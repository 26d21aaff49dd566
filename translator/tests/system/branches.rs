//! Near branches where they are more than an addition (SDM vol. 2, JMP and Jcc).

use diglot_translator::state::flag;

use iced_x86::code_asm::*;

use crate::machine::{CODE, DATA, Machine, check};

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

/// An interpreter's dispatch: one indirect jump to a dozen handlers, some of them rare, one in another page.
#[test]
fn jumps_to_many_places() {
    const TABLE: u64 = DATA;
    const FAR: u64 = CODE + 0x2000;
    const KINDS: u64 = 12;
    check(
        || {
            let mut m = Machine::long().code64(|a| {
                let mut again = a.create_label();
                a.mov(rbx, TABLE)?;
                a.mov(ecx, 2000)?;
                a.set_label(&mut again)?;
                a.mov(eax, ecx)?;
                a.imul_3(eax, eax, 0x9e37_79b1u32 as i32)?;
                a.shr(eax, 28)?;
                a.jmp(qword_ptr(rbx + rax * 8))
            });
            // Every handler adds its own power of 8 and goes on in the loop, whose head is behind two MOVs.
            let mut a = CodeAssembler::new(64).unwrap();
            a.mov(rbx, TABLE).unwrap();
            a.mov(ecx, 2000).unwrap();
            let head = CODE + a.assemble(CODE).unwrap().len() as u64;
            for n in 0..KINDS {
                let at = if n + 1 == KINDS { FAR } else { CODE + 0x100 + 0x40 * n };
                m.asm(64, at, |a| {
                    let mut out = a.create_label();
                    a.add(qword_ptr(TABLE + 0x200 + 8 * n), 1)?;
                    a.dec(ecx)?;
                    a.je(out)?;
                    a.jmp(head)?;
                    a.set_label(&mut out)?;
                    a.hlt()
                });
                m.w64(TABLE + 8 * n, at);
            }
            // The last entries of 16 lead to the first handler.
            for n in KINDS..16 {
                m.w64(TABLE + 8 * n, CODE + 0x100);
            }
            m.patience = 100;
            m
        },
        |o| {
            o.halted();
            let mut expected = [0u64; KINDS as usize];
            for k in 1..=2000u32 {
                let n = k.wrapping_mul(0x9e37_79b1) as usize >> 28;
                expected[if n < KINDS as usize { n } else { 0 }] += 1;
            }
            for (n, times) in (0..).zip(expected) {
                assert_eq!(o.r64(TABLE + 0x200 + 8 * n), times, "{}: handler {n}", o.engine);
            }
        },
    );
}
