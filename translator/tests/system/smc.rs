//! Self-modifying code (SDM vol. 3 §11.6): a store is seen by the next instruction fetched, through whatever mapping.

use diglot_translator::state::gpr;
use iced_x86::code_asm::*;

use crate::machine::*;

/// A function `MOV EAX, imm; RET` at `at`.
fn function(m: &mut Machine, at: u64, v: u32) {
    m.asm(64, at, |a| {
        a.mov(eax, v)?;
        a.ret()
    });
}

/// Calls the function at F three times so that it is compiled, patches its immediate, calls again; sums in RSI.
fn patched(patch: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>, f: u64) -> Machine {
    let mut m = Machine::long().code64(|a| {
        let mut outer = a.create_label();
        let mut inner = a.create_label();
        a.mov(ebp, 3)?;
        a.set_label(&mut outer)?;
        a.mov(ebx, 4)?;
        a.set_label(&mut inner)?;
        a.call(f)?;
        a.add(rsi, rax)?;
        a.dec(ebx)?;
        a.jne(inner)?;
        a.shl(rsi, 8)?;
        patch(a)?;
        a.dec(ebp)?;
        a.jne(outer)?;
        a.call(f)?;
        a.add(rsi, rax)?;
        a.hlt()
    });
    function(&mut m, f, 1);
    m
}

/// Each patch adds one to the immediate.
fn expect(o: &Outcome) {
    o.halted();
    assert_eq!(o.gpr(gpr::RSI), (4 << 24 | 8 << 16 | 12 << 8) + 4, "{}", o.engine);
}

const F: u64 = DATA + 0x100;
/// An alias of the page of `F`.
const ALIAS: u64 = DATA + 0x2_0000;

#[test]
fn another_block() {
    check(|| patched(|a| a.inc(byte_ptr(F + 1)), F), expect);
    check(|| patched(|a| a.lock().add(dword_ptr(F + 1), 1), F), expect);
}

#[test]
fn through_another_mapping() {
    check(
        || {
            let mut m = patched(|a| a.inc(byte_ptr(ALIAS + 0x101)), F);
            m.pte(ALIAS, DATA | P | W);
            m
        },
        expect,
    );
}

#[test]
fn across_a_page_edge() {
    // The immediate lies in the second page; a store may cross as well.
    const G: u64 = DATA + 0xffe;
    check(|| patched(|a| a.inc(byte_ptr(G + 1)), G), expect);
    const H: u64 = DATA + 0xfff;
    check(|| patched(|a| a.inc(byte_ptr(H + 1)), H), expect);
    check(|| patched(|a| a.add(dword_ptr(G + 1), 1), G), expect);
    check(|| patched(|a| a.add(qword_ptr(H - 2), 0x100_0000), H), expect);
}

#[test]
fn by_string_instructions() {
    check(
        || {
            patched(
                |a| {
                    // STOS of the new immediate, which counts in R8.
                    a.inc(r8d)?;
                    a.lea(eax, r8 + 1)?;
                    a.mov(rdi, F + 1)?;
                    a.mov(ecx, 1)?;
                    a.rep().stosd()
                },
                F,
            )
        },
        expect,
    );
    check(
        || {
            let mut m = patched(
                |a| {
                    a.inc(dword_ptr(DATA + 0x1001))?;
                    a.mov(r9, rsi)?;
                    a.mov(rsi, DATA + 0x1000)?;
                    a.mov(rdi, F)?;
                    a.mov(ecx, 6)?;
                    a.rep().movsb()?;
                    a.mov(rsi, r9)
                },
                F,
            );
            function(&mut m, DATA + 0x1000, 1);
            m
        },
        expect,
    );
    // A whole page at once.
    check(
        || {
            let mut m = patched(
                |a| {
                    a.inc(dword_ptr(DATA + 0x1101))?;
                    a.mov(r9, rsi)?;
                    a.mov(rsi, DATA + 0x1000)?;
                    a.mov(rdi, DATA)?;
                    a.mov(ecx, 512)?;
                    a.rep().movsq()?;
                    a.mov(rsi, r9)
                },
                F,
            );
            function(&mut m, DATA + 0x1100, 1);
            m
        },
        expect,
    );
}

/// Remapping: the page-table entry is rewritten and invalidated.
#[test]
fn by_remapping() {
    check(
        || {
            let mut m = patched(
                |a| {
                    a.add(qword_ptr(Machine::pte_at(ALIAS)), 0x1000)?;
                    a.invlpg(byte_ptr(ALIAS))
                },
                ALIAS + 0x100,
            );
            m.pte(ALIAS, DATA | P | W);
            for n in 0..4 {
                function(&mut m, F + 0x1000 * n, n as u32 + 1);
            }
            m
        },
        expect,
    );
    // The second half of a straddling instruction is remapped: the opcode is in the first page, the immediate not.
    check(
        || {
            let mut m = patched(
                |a| {
                    a.add(qword_ptr(Machine::pte_at(ALIAS + 0x1000)), 0x1000)?;
                    a.invlpg(byte_ptr(ALIAS + 0x1000))
                },
                ALIAS + 0xfff,
            );
            for n in 0..4 {
                function(&mut m, DATA + 0x1_0000 + 0x1000 * n - 1, n as u32 + 1);
            }
            function(&mut m, DATA + 0xfff, 1);
            m.pte(ALIAS, DATA | P | W);
            m.pte(ALIAS + 0x1000, (DATA + 0x1_0000) | P | W);
            m
        },
        expect,
    );
    // The first half is: the immediate stays, the opcode becomes that of MOV EDI.
    check(
        || {
            let mut m = patched(
                |a| {
                    a.mov(edi, 7)?;
                    a.xor(qword_ptr(Machine::pte_at(ALIAS)), 0x1000)?;
                    a.invlpg(byte_ptr(ALIAS))
                },
                ALIAS + 0xfff,
            );
            function(&mut m, DATA + 0xfff, 1);
            m.w8(DATA + 0x1fff, 0xbf);
            m.pte(ALIAS, DATA | P | W);
            m.pte(ALIAS + 0x1000, (DATA + 0x1000) | P | W);
            m
        },
        |o| {
            o.halted();
            assert_eq!((o.gpr(gpr::RAX), o.gpr(gpr::RDI)), (1, 1), "{}", o.engine);
        },
    );
}

/// The store rewrites the very next instruction of its own block, in every iteration: code that is never compiled.
#[test]
fn own_block() {
    for bits in [64, 32] {
        check(
            || {
                let m = if bits == 64 { Machine::long() } else { Machine::flat32() };
                let mut m = m.interpreted();
                m.asm(bits, CODE, |a| {
                    let mut again = a.create_label();
                    a.mov(ecx, 5)?;
                    a.set_label(&mut again)?;
                    // RBX is the address of the immediate of the ADD that follows at once.
                    if bits == 64 {
                        a.inc(byte_ptr(rbx))?
                    } else {
                        a.inc(byte_ptr(ebx))?
                    }
                    a.add(esi, 1)?;
                    a.dec(ecx)?;
                    a.jne(again)?;
                    a.hlt()
                });
                m.s.gpr[3] = CODE + 5 + 2 + 2;
                m
            },
            |o| {
                o.halted();
                assert_eq!(o.gpr(gpr::RSI), 2 + 3 + 4 + 5 + 6, "{}", o.engine);
            },
        );
    }
}

/// A store to code that then faults in its second page changes nothing; the code stays.
#[test]
fn store_that_faults_leaves_code() {
    check(
        || {
            let mut m = Machine::long().code64(|a| {
                a.mov(rbx, DATA + 0xffc)?;
                a.call(rbx)?;
                a.call(rbx)?;
                a.mov(rdx, -1i64)?;
                a.mov(qword_ptr(rbx), rdx)?;
                a.hlt()
            });
            m.bytes(DATA + 0xffc, &[0xff, 0xc0, 0xc3, 0x90]); // INC EAX; RET; NOP
            m.pte(DATA + 0x1000, 0);
            m.handler(14, |a| {
                a.call(rbx)?;
                a.hlt()
            });
            m
        },
        |o| {
            o.halted();
            assert_eq!(o.gpr(gpr::RAX), 3, "{}", o.engine);
        },
    );
}

/// The function lies in the page, and even the granule, of the loop that patches it.
#[test]
fn in_the_page_of_the_patcher() {
    for f in [CODE + 0x800, CODE + 0x50, CODE + 0x3c] {
        check(|| patched(|a| a.inc(byte_ptr(f + 1)), f), expect);
        check(
            || {
                patched(
                    |a| {
                        a.inc(r8d)?;
                        a.lea(eax, r8 + 1)?;
                        a.mov(rdi, f + 1)?;
                        a.stosd()
                    },
                    f,
                )
            },
            expect,
        );
    }
}

/// Data beside code: stores to the rest of the page, and to the granule's other bytes, leave the code right.
#[test]
fn data_beside_code() {
    check(
        || {
            patched(
                |a| {
                    a.inc(byte_ptr(F + 1))?;
                    a.mov(ecx, 100)?;
                    let mut again = a.create_label();
                    a.set_label(&mut again)?;
                    a.inc(dword_ptr(F + 0x800))?;
                    a.inc(dword_ptr(F + 8))?;
                    a.dec(ecx)?;
                    a.jne(again)
                },
                F,
            )
        },
        |o| {
            expect(o);
            assert_eq!((o.r32(F + 0x800), o.r32(F + 8)), (300, 300), "{}", o.engine);
        },
    );
}

/// The same bytes as 64-bit and as 32-bit code, by turns: translations of one mode are not used in the other.
#[test]
fn two_modes() {
    check(
        || {
            let mut m = Machine::long().code64(|a| {
                let mut again = a.create_label();
                a.mov(ebp, 4)?;
                a.set_label(&mut again)?;
                a.call(F)?;
                a.add(esi, eax)?;
                a.push(i32::from(CODE32))?;
                a.push(CODE as i32 + 0x200)?;
                a.db(&[0x48, 0xcb])?;
                a.dec(ebp)?;
                a.jne(again)?;
                a.hlt()
            });
            // MOV EAX, 5; DEC EAX (a REX prefix at 64 bits); MOV EAX, EAX; RET.
            m.bytes(F, &[0xb8, 5, 0, 0, 0, 0x48, 0x89, 0xc0, 0xc3]);
            let mut a = CodeAssembler::new(64).unwrap();
            a.mov(ebp, 4).unwrap();
            a.call(F).unwrap();
            a.add(esi, eax).unwrap();
            a.push(i32::from(CODE32)).unwrap();
            a.push(CODE as i32 + 0x200).unwrap();
            a.db(&[0x48, 0xcb]).unwrap();
            let back = CODE + a.assemble(CODE).unwrap().len() as u64;
            m.asm(32, CODE + 0x200, |a| {
                a.call(F)?;
                a.add(edi, eax)?;
                a.push(i32::from(CODE64))?;
                a.push(back as i32)?;
                a.retf()
            });
            m
        },
        |o| {
            o.halted();
            assert_eq!((o.gpr(gpr::RSI), o.gpr(gpr::RDI)), (20, 16), "{}", o.engine);
        },
    );
}

#[test]
fn an_exception_frame_overwrites_its_handler() {
    check(
        || {
            let mut m = Machine::long();
            m.asm(64, CODE, |a| {
                a.ud2()?;
                a.mov(rsp, UDATA + 0x30)?;
                a.jmp(CODE + 0xf4)
            });
            // What is pushed as RIP here ends in F4h, a HLT.
            m.asm(64, CODE + 0xf4, |a| a.ud2());
            m.asm(64, UDATA, |a| {
                a.inc(ebx)?;
                a.jmp(UDATA + 8)
            });
            m.asm(64, UDATA + 8, |a| {
                a.add(qword_ptr(rsp), 2)?;
                a.iretq()
            });
            m.gate64(6, UDATA, 14, 0, 0);
            // The handler is overwritten by the time that it is compiled.
            m.interpreted()
        },
        |o| assert_eq!((o.s.rip, o.gpr(gpr::RBX)), (UDATA + 9, 2), "{}", o.engine),
    );
}
