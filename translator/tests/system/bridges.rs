//! Direct branches into other pages, when they are hot: they lead where the mapping says, whatever they led to before.

use diglot_translator::state::{cr, gpr};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::machine::*;

/// Where the function is that is called, in a page that may be mapped elsewhere.
const F: u64 = DATA + 0x2_0100;
/// Calls in a row: more than a branch needs to be led anew after a change.
const CALLS: u32 = 40;

/// A function `MOV EAX, imm; RET` at `at`.
fn function(m: &mut Machine, at: u64, v: u32) {
    m.asm(64, at, |a| {
        a.mov(eax, v)?;
        a.ret()
    });
}

/// [`CALLS`] calls of `f`, whose results are summed up in the low 16 bits of RSI.
fn calls(a: &mut CodeAssembler, f: u64) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.shl(rsi, 16)?;
    a.mov(ebx, CALLS)?;
    a.set_label(&mut again)?;
    a.call(f)?;
    a.add(rsi, rax)?;
    a.dec(ebx)?;
    a.jne(again)
}

/// Calls, three times over, with a change behind each.
fn changing(f: u64, change: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>) -> Machine {
    let mut m = Machine::long().code64(|a| {
        let mut outer = a.create_label();
        a.mov(ebp, 3)?;
        a.set_label(&mut outer)?;
        calls(a, f)?;
        change(a)?;
        a.dec(ebp)?;
        a.jne(outer)?;
        a.hlt()
    });
    m.bridges = true;
    m
}

/// What each of the three rounds should have called.
fn expect(o: &Outcome, values: [u64; 3]) {
    o.halted();
    let sum = values.iter().fold(0, |sum, v| sum << 16 | v * u64::from(CALLS));
    assert_eq!(o.gpr(gpr::RSI), sum, "{}: {:#x} instead of {sum:#x}", o.engine, o.gpr(gpr::RSI));
}

#[test]
fn remapped() {
    let build = || {
        let mut m = changing(F, |a| {
            a.add(qword_ptr(Machine::pte_at(F)), 0x1000)?;
            a.invlpg(byte_ptr(F))
        });
        for n in 0..4 {
            function(&mut m, DATA + 0x1000 * n + 0x100, n as u32 + 1);
        }
        m.pte(F, DATA | P | W);
        m
    };
    check(build, |o| expect(o, [1, 2, 3]));
}

/// The second page of the function's first instruction is.
#[test]
fn remapped_behind_the_edge() {
    const EDGE: u64 = F | 0xfff;
    const NEXT: u64 = F + 0x1000;
    let build = || {
        let mut m = changing(EDGE, |a| {
            a.add(qword_ptr(Machine::pte_at(NEXT)), 0x1000)?;
            a.invlpg(byte_ptr(NEXT))
        });
        for n in (0..4).rev() {
            function(&mut m, DATA + 0x1000 * n + 0xfff, n as u32 + 1);
        }
        // Every second page is that of one of them, and the first page the same.
        m.pte(F, DATA | P | W);
        m.pte(NEXT, (DATA + 0x1000) | P | W);
        m
    };
    check(build, |o| expect(o, [1, 2, 3]));
}

#[test]
fn overwritten() {
    for through in [F, DATA + 0x3_0100] {
        let build = || {
            let mut m = changing(F, |a| a.inc(byte_ptr(through + 1)));
            function(&mut m, F, 1);
            m.pte(through, F & !0xfff | P | W);
            m
        };
        check(build, |o| expect(o, [1, 2, 3]));
    }
}

/// Two address spaces take turns, one of them with the same code as the other or not; with PCIDs or without, and
/// whether those keep translations or not.
#[test]
fn in_two_address_spaces() {
    for (pcide, keep, global) in
        [(false, false, 0), (true, false, 0), (true, true, 0), (false, false, G), (true, true, G)]
    {
        for page in [DATA, DATA + 0x1000] {
            let build = || {
                let mut m = changing(F, |a| {
                    a.mov(rax, cr3)?;
                    a.xor(rax, (PML4 ^ OTHER) as i32 | i32::from(pcide))?;
                    a.mov(rdx, u64::from(keep) << 63)?;
                    a.or(rax, rdx)?;
                    a.mov(cr3, rax)
                });
                m.s.cr4 |= cr::CR4_PGE | if pcide { cr::CR4_PCIDE } else { 0 };
                function(&mut m, DATA + 0x100, 1);
                function(&mut m, DATA + 0x1100, 2);
                m.pte(CODE, CODE | P | W | global);
                m.pte(F, DATA | P | W);
                m.other_address_space(F, page | P | W);
                m
            };
            check(build, |o| expect(o, if page == DATA { [1, 1, 1] } else { [1, 2, 1] }));
        }
    }
}

/// The same in the upper half, where one tag serves all address spaces.
#[test]
fn in_two_upper_halves() {
    const UP: u64 = 0xffff_8000_0000_0000;
    for (pcide, keep) in [(false, false), (true, false), (true, true)] {
        let build = || {
            let mut m = Machine::long().code64(|a| {
                let mut again = a.create_label();
                a.mov(ebp, 3)?;
                a.set_label(&mut again)?;
                a.mov(rax, UP + 0x100)?;
                a.call(rax)?;
                a.mov(rax, cr3)?;
                a.xor(rax, (PML4 ^ OTHER) as i32 | i32::from(pcide))?;
                a.mov(rdx, u64::from(keep) << 63)?;
                a.or(rax, rdx)?;
                a.mov(cr3, rax)?;
                a.dec(ebp)?;
                a.jne(again)?;
                a.hlt()
            });
            m.bridges = true;
            m.s.cr4 |= cr::CR4_PGE | if pcide { cr::CR4_PCIDE } else { 0 };
            m.w64(OTHER, PDPT | P | W | U);
            for (root, tables, page) in [(PML4, 0x5_0000, DATA), (OTHER, 0x5_4000, DATA + 0x1000)] {
                m.w64(root + 8 * 256, tables | P | W);
                m.w64(tables, (tables + 0x1000) | P | W);
                m.w64(tables + 0x1000, (tables + 0x2000) | P | W);
                // The caller is the same page in both, and global.
                m.w64(tables + 0x2000, (DATA + 0x2000) | P | W | G);
                m.w64(tables + 0x2008, page | P | W);
            }
            // Assembled for where it runs.
            let mut a = CodeAssembler::new(64).unwrap();
            calls(&mut a, UP + 0x1100).and_then(|()| a.ret()).unwrap();
            m.bytes(DATA + 0x2100, &a.assemble(UP + 0x100).unwrap());
            function(&mut m, DATA + 0x100, 1);
            function(&mut m, DATA + 0x1100, 2);
            m
        };
        check(build, |o| expect(o, [1, 2, 1]));
    }
}

/// The page may not be executed any more.
#[test]
fn forbidden() {
    let build = || {
        let mut m = changing(F, |a| {
            a.mov(rax, NX)?;
            a.or(qword_ptr(Machine::pte_at(F)), rax)?;
            a.invlpg(byte_ptr(F))
        });
        function(&mut m, F, 1);
        m
    };
    check(build, |o| {
        o.fault(14, 0x11, F);
        assert_eq!(o.s.cr2, F);
    });
}

/// The page is the user's no more.
#[test]
fn taken_from_the_user() {
    const UF: u64 = UCODE + 0x1_0100;
    let build = || {
        let mut m = Machine::long().user().code64(|a| {
            calls(a, UF)?;
            a.int(0x80)?;
            a.call(UF)
        });
        m.bridges = true;
        m.handler(0x80, |a| {
            a.and(qword_ptr(Machine::pte_at(UF)), !U as i32)?;
            a.invlpg(byte_ptr(UF))?;
            a.iretq()
        });
        m.gate_dpl(0x80, 3);
        function(&mut m, UF, 1);
        m
    };
    check(build, |o| {
        o.fault(14, 0x15, UF);
    });
}

/// The caller is open to the user, the function is not; the supervisor calls it first.
#[test]
fn by_the_supervisor_first() {
    let build = || {
        let mut m = Machine::long().code64(|a| {
            a.call(UCODE)?;
            a.push(i32::from(USER_DATA))?;
            a.push(USTACK as i32)?;
            a.push(0x202)?;
            a.push(i32::from(USER64))?;
            a.push(UCODE as i32)?;
            a.iretq()
        });
        m.bridges = true;
        m.asm(64, UCODE, |a| {
            calls(a, F)?;
            a.ret()
        });
        function(&mut m, F, 1);
        m
    };
    check(build, |o| {
        o.fault(14, 0x15, F);
    });
}

/// So many changes that keys come again which were in use before.
#[test]
fn as_often_as_there_are_generations() {
    const GENERATIONS: u32 = 4096;
    let build = || {
        let mut m = Machine::long().code64(|a| {
            let mut again = a.create_label();
            calls(a, F)?;
            a.xor(qword_ptr(Machine::pte_at(F)), 0x1000)?;
            a.invlpg(byte_ptr(F))?;
            a.mov(ecx, GENERATIONS - 1)?;
            a.set_label(&mut again)?;
            a.invlpg(byte_ptr(CODE))?;
            a.dec(ecx)?;
            a.jne(again)?;
            calls(a, F)?;
            a.hlt()
        });
        m.bridges = true;
        function(&mut m, DATA + 0x100, 1);
        function(&mut m, DATA + 0x1100, 2);
        m.pte(F, DATA | P | W);
        m
    };
    check(build, |o| expect(o, [0, 1, 2]));
}

/// A walk from page to page, in each of which a function of another page is called, twice over; the regions do not all
/// fit into the code memory.
#[test]
fn evicted() {
    const PAGES: u64 = 80;
    const TIMES: u64 = 20;
    let caller = |n: u64| DATA + 0x1_0000 + 0x2010 * n;
    let callee = |n: u64| caller(n) + 0x1000;
    let build = || {
        let mut m = Machine::long().code64(|a| {
            a.mov(ebp, 2)?;
            a.jmp(caller(0))
        });
        for n in 0..PAGES {
            m.asm(64, caller(n), |a| {
                let (mut again, mut out) = (a.create_label(), a.create_label());
                a.mov(ebx, TIMES as u32)?;
                a.set_label(&mut again)?;
                a.call(callee(n))?;
                a.dec(ebx)?;
                a.jne(again)?;
                if n + 1 < PAGES {
                    return a.jmp(caller(n + 1));
                }
                a.dec(ebp)?;
                a.je(out)?;
                a.jmp(caller(0))?;
                a.set_label(&mut out)?;
                a.hlt()
            });
            m.asm(64, callee(n), |a| {
                a.imul_3(rsi, rsi, 31)?;
                a.add(rsi, n as i32)?;
                a.ret()
            });
        }
        m.bridges = true;
        m.code_memory = 16 << 10;
        m
    };
    check(build, |o| {
        o.halted();
        let calls = (0..2 * PAGES * TIMES).map(|k| k / TIMES % PAGES);
        let sum = calls.fold(0u64, |sum, n| sum.wrapping_mul(31).wrapping_add(n));
        assert_eq!(o.gpr(gpr::RSI), sum, "{}", o.engine);
    });
}
