//! Paging (SDM vol. 3 chapter 4): walks, error codes, accessed and dirty bits, protection, invalidation.

use diglot_translator::state::{cr, flag, gpr};
use iced_x86::code_asm::*;

use crate::machine::*;

const PF: u8 = 14;

/// What a case does with the page at [`UDATA`] or [`DATA`].
#[derive(Clone, Copy, Debug, PartialEq)]
enum Do {
    Read,
    Write,
    Rmw,
    Fetch,
}

/// A guest that accesses `at` once, by CPL 0 or 3.
fn access(user: bool, what: Do, at: u64) -> Machine {
    let m = Machine::long();
    let m = if user { m.user() } else { m };
    m.code64(|a| {
        a.mov(rbx, at)?;
        a.nop()?;
        match what {
            Do::Read => a.mov(eax, dword_ptr(rbx))?,
            Do::Write => a.mov(dword_ptr(rbx), eax)?,
            Do::Rmw => a.lock().add(dword_ptr(rbx), 1)?,
            Do::Fetch => a.jmp(rbx)?,
        }
        a.hlt()
    })
}

/// The linear address of the access in such a guest.
fn site(user: bool, what: Do, at: u64) -> u64 {
    let start = if user { UCODE } else { CODE };
    // MOV r64, imm: 5, 7 or 10 bytes as the assembler chooses.
    let mut a = CodeAssembler::new(64).unwrap();
    a.mov(rbx, at).unwrap();
    let len = a.assemble(start).unwrap().len() as u64;
    if what == Do::Fetch { at } else { start + len + 1 }
}

/// Runs an access to a page with entry `pte` and control bits; `Some(error)` is the page fault's error code.
fn case(user: bool, what: Do, pte: u64, setup: impl Fn(&mut Machine), error: Option<u64>) {
    let at = if pte & U != 0 || user { UDATA } else { DATA };
    check(
        || {
            let mut m = access(user, what, at);
            m.w8(at, 0xf4);
            m.pte(at, at | pte);
            setup(&mut m);
            m
        },
        |o| match error {
            None => {
                if user && what != Do::Fetch {
                    // HLT at CPL 3.
                    assert_eq!(o.exception(13).error, Some(0));
                } else if user {
                    assert_eq!(o.exception(13).ip, at);
                } else {
                    o.halted();
                }
                let dirty = if matches!(what, Do::Write | Do::Rmw) { D } else { 0 };
                assert_eq!(o.pte(at) & (A | D), A | dirty, "{}: {what:?} {pte:#x}", o.engine);
            }
            Some(error) => {
                o.fault(PF, error, site(user, what, at));
                assert_eq!(o.s.cr2, at);
                // SDM vol. 3 §4.8: the flags say that a translation was used; none was.
                assert_eq!(o.pte(at) & (A | D), 0, "{}: {what:?} {pte:#x}", o.engine);
            }
        },
    );
}

/// SDM vol. 3 §4.7: every bit of the error code, for each kind of access.
#[test]
fn error_codes() {
    let plain = |_: &mut Machine| {};
    let nx_off = |m: &mut Machine| m.s.efer &= !cr::EFER_NXE;
    let smep = |m: &mut Machine| m.s.cr4 |= cr::CR4_SMEP;
    let wp_off = |m: &mut Machine| m.s.cr0 &= !cr::CR0_WP;
    // Not present.
    for (user, what, error) in [
        (false, Do::Read, 0),
        (false, Do::Write, 2),
        (false, Do::Rmw, 2),
        (false, Do::Fetch, 0x10),
        (true, Do::Read, 4),
        (true, Do::Write, 6),
        (true, Do::Rmw, 6),
        (true, Do::Fetch, 0x14),
    ] {
        case(user, what, 0, plain, Some(error));
        // Everything else in the entry is ignored then.
        case(user, what, NX | W | G | 1 << 46, plain, Some(error));
    }
    // I/D is reported only when fetches can be forbidden.
    case(false, Do::Fetch, 0, nx_off, Some(0));
    case(false, Do::Fetch, 0, |m| (nx_off(m), smep(m)).1, Some(0x10));
    // Reserved bits: 51:46, and NX while EFER.NXE=0.
    for bit in 46..52 {
        case(false, Do::Read, P | W | 1 << bit, plain, Some(9));
    }
    case(true, Do::Write, P | W | U | 1 << 46, plain, Some(15));
    case(true, Do::Fetch, P | W | U | 1 << 51, plain, Some(0x1d));
    case(false, Do::Read, P | NX, nx_off, Some(9));
    // Rights.
    case(true, Do::Read, P | W, plain, Some(5));
    case(true, Do::Write, P | W, plain, Some(7));
    case(true, Do::Write, P | U, plain, Some(7));
    case(true, Do::Rmw, P | U, plain, Some(7));
    case(false, Do::Write, P, plain, Some(3));
    case(false, Do::Rmw, P, plain, Some(3));
    case(false, Do::Write, P, wp_off, None);
    case(false, Do::Rmw, P, wp_off, None);
    case(true, Do::Write, P | U, wp_off, Some(7));
    case(true, Do::Fetch, P | W, plain, Some(0x15));
    case(true, Do::Fetch, P | W | U | NX, plain, Some(0x15));
    case(false, Do::Fetch, P | W | NX, plain, Some(0x11));
    case(false, Do::Fetch, P | W | U, plain, None);
    case(false, Do::Fetch, P | W | U, smep, Some(0x11));
    case(true, Do::Fetch, P | W | U, smep, None);
    // Permitted.
    for user in [false, true] {
        for what in [Do::Read, Do::Write, Do::Rmw, Do::Fetch] {
            case(user, what, P | W | U, plain, None);
        }
    }
    case(false, Do::Read, P | NX, plain, None);
    case(true, Do::Read, P | U | NX, plain, None);
}

/// SDM vol. 3 §4.6.1: supervisor accesses to user pages under SMAP, with and without RFLAGS.AC.
#[test]
fn smap() {
    let smap = |m: &mut Machine| m.s.cr4 |= cr::CR4_SMAP;
    let ac = |m: &mut Machine| (m.s.cr4 |= cr::CR4_SMAP, m.s.rflags |= flag::AC).1;
    case(false, Do::Read, P | W | U, smap, Some(1));
    case(false, Do::Write, P | W | U, smap, Some(3));
    case(false, Do::Rmw, P | W | U, smap, Some(3));
    case(false, Do::Fetch, P | W | U, smap, None);
    case(false, Do::Read, P | W | U, ac, None);
    case(false, Do::Write, P | W | U, ac, None);
    case(true, Do::Write, P | W | U, smap, None);
    case(false, Do::Write, P | W, smap, None);
}

/// Protection keys (SDM vol. 3 §4.6.2): PKRU governs data accesses to user pages, IA32_PKRS those to supervisor pages.
#[test]
fn protection_keys() {
    const KEY: u64 = 5;
    const AD: u32 = 1 << (2 * KEY);
    const WD: u32 = 2 << (2 * KEY);
    let user_page = P | W | U | KEY << 59;
    let supervisor_page = P | W | KEY << 59;
    let pkru = |rights: u32| move |m: &mut Machine| (m.s.cr4 |= cr::CR4_PKE, m.s.pkru = rights).1;
    let pkrs = |rights: u32| move |m: &mut Machine| (m.s.cr4 |= cr::CR4_PKS, m.s.msr.pkrs = rights).1;
    for (user, what, rights, error) in [
        (true, Do::Read, AD, Some(0x25)),
        (true, Do::Write, AD, Some(0x27)),
        (true, Do::Rmw, WD, Some(0x27)),
        (true, Do::Write, WD, Some(0x27)),
        (true, Do::Read, WD, None),
        (true, Do::Fetch, AD | WD, None),
        (true, Do::Write, !(AD | WD | 3), None),
        (false, Do::Read, AD, Some(0x21)),
        (false, Do::Write, WD, Some(0x23)),
        (false, Do::Fetch, AD | WD, None),
    ] {
        case(user, what, user_page, pkru(rights), error);
        // Only with CR4.PKE, and not by the rights of supervisor pages.
        case(user, what, user_page, |m| m.s.pkru = rights, None);
        case(user, what, user_page, pkrs(rights), None);
    }
    let wp_off = |m: &mut Machine| m.s.cr0 &= !cr::CR0_WP;
    case(false, Do::Write, user_page, |m| (pkru(WD)(m), wp_off(m)).1, None);
    case(false, Do::Write, user_page, |m| (pkru(AD)(m), wp_off(m)).1, Some(0x23));
    case(true, Do::Write, user_page, |m| (pkru(WD)(m), wp_off(m)).1, Some(0x27));
    // The bit is set whatever else forbids the access.
    case(true, Do::Write, user_page & !W, pkru(WD), Some(0x27));
    case(true, Do::Write, user_page & !W, pkru(0), Some(7));
    for (what, rights, error) in [
        (Do::Read, AD, Some(0x21)),
        (Do::Rmw, WD, Some(0x23)),
        (Do::Read, WD, None),
        (Do::Fetch, AD | WD, None),
        (Do::Write, !(AD | WD | 3), None),
    ] {
        case(false, what, supervisor_page, pkrs(rights), error);
        case(false, what, supervisor_page, |m| m.s.msr.pkrs = rights, None);
        case(false, what, supervisor_page, pkru(rights), None);
    }
    case(false, Do::Write, supervisor_page, |m| (pkrs(WD)(m), wp_off(m)).1, None);
}

/// WRPKRU, XRSTOR and WRMSR change the rights of pages that have been used.
#[test]
fn protection_keys_with_a_warm_tlb() {
    type Body = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let bodies: [(u64, Body); 3] = [
        (UDATA, |a| {
            a.mov(eax, 4)?;
            a.xor(ecx, ecx)?;
            a.xor(edx, edx)?;
            a.wrpkru()
        }),
        (UDATA, |a| {
            a.mov(eax, 0x200)?;
            a.xor(edx, edx)?;
            a.xrstor64(ptr(DATA + 0x1000))
        }),
        (DATA, |a| {
            a.mov(ecx, 0x6e1)?;
            a.mov(eax, 4)?;
            a.xor(edx, edx)?;
            a.wrmsr()
        }),
    ];
    for (at, body) in bodies {
        check(
            || {
                let mut m = Machine::long().code64(|a| {
                    let mut again = a.create_label();
                    a.mov(esi, 3)?;
                    a.set_label(&mut again)?;
                    a.mov(ebx, dword_ptr(at))?;
                    a.mov(dword_ptr(at), ebx)?;
                    a.inc(edi)?;
                    a.dec(esi)?;
                    a.jne(again)?;
                    body(a)?;
                    a.mov(ebx, dword_ptr(at))?;
                    a.hlt()
                });
                m.pte(at, at | P | W | A | D | if at == UDATA { U } else { 0 } | 1 << 59);
                m.s.cr4 |= cr::CR4_PKE | cr::CR4_PKS | cr::CR4_OSXSAVE;
                m.s.xcr0 = 0x207;
                m.w64(DATA + 0x1000 + 512, 0x200);
                m.w64(DATA + 0x1000 + 2688, 4);
                m
            },
            |o| {
                assert_eq!((o.exception(PF).error, o.s.cr2), (Some(0x21), at), "{}", o.engine);
                assert_eq!(o.gpr(7), 3);
            },
        );
    }
}

/// Rights are those of all levels together (SDM vol. 3 §4.6.1).
#[test]
fn rights_of_all_levels() {
    const AT: u64 = 0x68_0000;
    for (entry, write, error) in [
        (P | W, false, Some(5)),
        (P | U, true, Some(7)),
        (P | U, false, None),
        (P | W | U | 1 << 46, false, Some(13)),
        (P | W | U | PS | 1 << 13, false, Some(13)),
        (0, true, Some(6)),
    ] {
        check(
            || {
                let mut m = Machine::long().user().code64(|a| {
                    if write {
                        a.mov(byte_ptr(AT), al)?
                    } else {
                        a.mov(al, byte_ptr(AT))?
                    }
                    a.int(0x40)
                });
                m.gate_dpl(0x40, 3);
                m.pte(AT, AT | P | W | U);
                m.w64(PD + 24, (PT + 0x3000) | entry);
                m
            },
            |o| match error {
                None => assert_eq!(o.vector(), Some(0x40)),
                Some(e) => {
                    o.fault(PF, e, UCODE);
                    assert_eq!(o.s.cr2, AT);
                }
            },
        );
    }
}

/// STAC and CLAC act on the very next access.
#[test]
fn stac_clac_change_the_next_access() {
    check(
        || {
            let mut m = Machine::long().code64(|a| {
                a.mov(rbx, UDATA)?;
                a.stac()?;
                a.mov(eax, dword_ptr(rbx))?;
                a.clac()?;
                a.mov(ecx, dword_ptr(rbx))?;
                a.hlt()
            });
            m.s.cr4 |= cr::CR4_SMAP;
            m.w32(UDATA, 77);
            m
        },
        |o| {
            assert_eq!(o.exception(PF).error, Some(1));
            assert_eq!(o.gpr(gpr::RAX), 77);
        },
    );
}

/// SDM vol. 3 §4.6.1: descriptor-table accesses are implicit supervisor accesses whatever CPL is, and AC does not
/// permit them to user pages.
#[test]
fn implicit_accesses() {
    // At CPL 3 a segment load reads a GDT in a supervisor page.
    check(
        || {
            Machine::long().user().code64(|a| {
                a.mov(eax, i32::from(USER_DATA))?;
                a.mov(es, eax)?;
                a.mov(ecx, 0x58)?;
                a.mov(es, ecx)?;
                a.hlt()
            })
        },
        |o| assert_eq!(o.exception(13).error, Some(0x58)),
    );
    // At CPL 0 with AC set, a GDT in a user page under SMAP faults all the same.
    check(
        || {
            let mut m = Machine::long().flags(flag::AC).code64(|a| {
                a.mov(eax, i32::from(DATA0))?;
                a.mov(es, eax)?;
                a.hlt()
            });
            let entry = m.r64(GDT + u64::from(DATA0));
            m.w64(UDATA + u64::from(DATA0), entry);
            for selector in [CODE64, DATA0] {
                let raw = m.r64(GDT + u64::from(selector));
                m.w64(UDATA + u64::from(selector), raw);
            }
            m.s.gdtr.base = UDATA;
            m.s.cr4 |= cr::CR4_SMAP;
            m
        },
        // The handler's own CS is read from the same table: page fault, then double fault, then shutdown.
        |o| {
            o.shutdown();
            assert_eq!(o.s.cr2, UDATA + u64::from(CODE64));
        },
    );
}

/// 4-level paging with 2 MiB and 1 GiB pages: translation, reserved bits, PS where it is reserved.
#[test]
fn large_pages() {
    const AT: u64 = 0x8000_0000;
    let run = |setup: &dyn Fn(&mut Machine), expect: &dyn Fn(&Outcome)| {
        check(
            || {
                let mut m = Machine::long().code64(|a| {
                    a.mov(rbx, AT + 0x18_0008)?;
                    a.mov(eax, dword_ptr(rbx))?;
                    a.mov(dword_ptr(rbx + 4), eax)?;
                    a.hlt()
                });
                m.w32(0x38_0008, 0xabcd);
                m.w32(DATA + 8, 0x1234);
                setup(&mut m);
                m
            },
            expect,
        );
    };
    // 1 GiB page at 0.
    run(&|m| m.w64(PDPT + 16, P | W | PS), &|o| {
        o.halted();
        assert_eq!(o.r32(DATA + 12), 0x1234);
        assert_eq!(o.r64(PDPT + 16), P | W | PS | A | D);
    });
    // 2 MiB page at 200000h.
    run(&|m| (m.w64(PDPT + 16, 0x3_0000 | P | W), m.w64(0x3_0000, 0x20_0000 | P | W | PS)).1, &|o| {
        o.halted();
        assert_eq!(o.r32(0x38_000c), 0xabcd);
        assert_eq!(o.r64(0x3_0000), 0x20_0000 | P | W | PS | A | D);
        assert_eq!(o.r64(PDPT + 16) & (A | D), A);
    });
    // Bits between PAT and the frame are reserved, bit 12 (PAT) is not.
    run(&|m| m.w64(PDPT + 16, P | W | PS | 1 << 12), &|o| o.halted());
    run(&|m| m.w64(PDPT + 16, P | W | PS | 1 << 13), &|o| assert_eq!(o.exception(PF).error, Some(9)));
    run(&|m| m.w64(PDPT + 16, P | W | PS | 1 << 29), &|o| assert_eq!(o.exception(PF).error, Some(9)));
    for bit in [13, 20] {
        run(&|m| (m.w64(PDPT + 16, 0x3_0000 | P | W), m.w64(0x3_0000, P | W | PS | 1 << bit)).1, &|o| {
            assert_eq!(o.exception(PF).error, Some(9));
        });
    }
    // PS is reserved in a PML4 entry.
    run(
        &|m| {
            m.w64(PML4 + 8, PDPT | P | W | PS);
            m.s.rip = CODE + 0x1000;
            m.asm(64, CODE + 0x1000, |a| {
                a.mov(rbx, 1u64 << 39)?;
                a.mov(eax, dword_ptr(rbx))?;
                a.hlt()
            });
        },
        &|o| assert_eq!(o.exception(PF).error, Some(9)),
    );
}

/// 32-bit paging: 4 KiB, 4 MiB and PSE-36 pages (SDM vol. 3 §4.3).
#[test]
fn paging_32() {
    let run = |setup: &dyn Fn(&mut Machine), expect: &dyn Fn(&Outcome)| {
        check(
            || {
                let mut m = Machine::paging32().code32(|a| {
                    a.mov(ebx, 0xc018_0008u32)?;
                    a.mov(eax, dword_ptr(ebx))?;
                    a.mov(dword_ptr(ebx + 4), eax)?;
                    a.hlt()
                });
                m.w32(DATA + 8, 0x1234);
                setup(&mut m);
                m
            },
            expect,
        );
    };
    run(&|_| (), &|o| {
        o.fault(PF, 0, CODE + 5);
        assert_eq!(o.s.cr2, 0xc018_0008);
    });
    run(&|m| m.w32(PML4 + 0xc00, (P | W | PS) as u32), &|o| {
        o.halted();
        assert_eq!(o.r32(DATA + 12), 0x1234);
        assert_eq!(o.r32(PML4 + 0xc00), P | W | PS | A | D);
    });
    run(&|m| m.w32(PML4 + 0xc00, (PT | P | W) as u32), &|o| {
        o.halted();
        assert_eq!(o.r32(DATA + 12), 0x1234);
        assert_eq!(o.r32(PT + 4 * 0x180), DATA | P | W | A | D);
        assert_eq!(o.r32(PML4 + 0xc00), PT | P | W | A);
    });
    // With CR4.PSE=0 the PS bit is ignored.
    run(&|m| (m.w32(PML4 + 0xc00, (PT | P | W | PS) as u32), m.s.cr4 = 0).1, &|o| o.halted());
    // Bit 21 is reserved, bits 20:13 are address bits 39:32: nothing is there, the bus reads ones.
    run(&|m| m.w32(PML4 + 0xc00, (P | W | PS | 1 << 21) as u32), &|o| assert_eq!(o.exception(PF).error, Some(9)));
    run(&|m| m.w32(PML4 + 0xc00, (P | W | PS | 1 << 13) as u32), &|o| {
        o.halted();
        assert_eq!(o.gpr(gpr::RAX), 0xffff_ffff);
        assert_eq!(o.r32(DATA + 12), 0);
    });
    // Write protection.
    run(&|m| m.w32(PML4 + 0xc00, (P | PS) as u32), &|o| assert_eq!(o.exception(PF).error, Some(3)));
    // No NX, no SMEP: I/D stays clear for fetches.
    check(
        || Machine::paging32().code32(|a| a.jmp(0xc000_0000u64)),
        |o| {
            o.fault(PF, 0, 0xc000_0000);
        },
    );
}

/// PAE paging: PDPTE registers are loaded by MOV CR3 and not re-read (SDM vol. 3 §4.4.1).
#[test]
fn pae_pdpte_registers() {
    check(
        || {
            Machine::pae().code32(|a| {
                // A PDPTE written without a load of CR3 is not seen.
                a.mov(dword_ptr(PDPT + 24), (PD | P) as i32)?;
                a.mov(eax, cr3)?;
                a.mov(cr3, eax)?;
                a.mov(ecx, dword_ptr(0xc018_0000u64 as u32))?;
                a.mov(dword_ptr(PDPT + 24), 0)?;
                a.invlpg(dword_ptr(0xc018_0000u64 as u32))?;
                a.mov(edx, dword_ptr(0xc018_0000u64 as u32))?;
                // Reserved bit in a present entry: #GP from the load.
                a.mov(dword_ptr(PDPT + 24), (PD | P | W) as i32)?;
                a.mov(cr3, eax)?;
                a.hlt()
            })
        },
        |o| {
            assert_eq!(o.exception(13).error, Some(0));
            assert_eq!(o.gpr(gpr::RCX), o.gpr(gpr::RDX));
        },
    );
    check(
        || {
            Machine::pae().code32(|a| {
                a.mov(dword_ptr(PDPT + 24), (PD | P) as i32)?;
                a.mov(ecx, dword_ptr(0xc018_0000u64 as u32))?;
                a.hlt()
            })
        },
        |o| {
            assert_eq!(o.exception(PF).error, Some(0));
            assert_eq!(o.s.cr2, 0xc018_0000);
        },
    );
    // NX and the reserved bits 62:46 of a PTE.
    for (entry, error) in [(P | NX, None), (P | 1 << 62, Some(9)), (P | 1 << 46, Some(9)), (0, Some(0))] {
        check(
            || {
                let mut m = Machine::pae().code32(|a| {
                    a.mov(eax, dword_ptr(DATA as u32))?;
                    a.hlt()
                });
                m.pte(DATA, DATA | entry);
                m
            },
            |o| match error {
                None => o.halted(),
                Some(e) => assert_eq!(o.exception(PF).error, Some(e), "{entry:#x}"),
            },
        );
    }
}

/// An access across two pages of which the second faults: CR2 is in the second, nothing is written.
#[test]
fn second_page_faults() {
    const EDGE: u64 = DATA + 0x1000;
    for (entry, error) in [(0, 2), (EDGE | P, 3)] {
        for len in [2u64, 4, 8, 16] {
            check(
                || {
                    let mut m = Machine::long().code64(|a| {
                        a.mov(rbx, EDGE - 1)?;
                        a.mov(rax, 0x1122_3344_5566_7788u64)?;
                        a.movq(xmm0, rax)?;
                        match len {
                            2 => a.mov(word_ptr(rbx), ax)?,
                            4 => a.xchg(dword_ptr(rbx), eax)?,
                            8 => a.add(qword_ptr(rbx), rax)?,
                            _ => a.movups(xmmword_ptr(rbx), xmm0)?,
                        }
                        a.hlt()
                    });
                    m.w8(EDGE - 1, 0x5a);
                    m.pte(EDGE, entry);
                    m
                },
                |o| {
                    assert_eq!(o.exception(PF).error, Some(error), "{len}");
                    assert_eq!(o.s.cr2, EDGE);
                    assert_eq!(o.r8(EDGE - 1), 0x5a);
                    assert_eq!(o.gpr(gpr::RAX), 0x1122_3344_5566_7788);
                },
            );
        }
    }
    // The same through PUSH and CALL: RSP stays.
    for call in [false, true] {
        check(
            || {
                let mut m = Machine::long().code64(|a| {
                    a.mov(rsp, EDGE + 4)?;
                    if call {
                        a.call(CODE)?
                    } else {
                        a.push(rax)?
                    }
                    a.hlt()
                });
                m.gate64(PF, HANDLERS + 16 * 14, 14, 0, 1);
                m.pte(DATA, DATA | P);
                m
            },
            |o| {
                let f = o.exception(PF);
                assert_eq!((f.error, f.sp), (Some(3), EDGE + 4));
                assert_eq!(o.s.cr2, EDGE - 4);
            },
        );
    }
}

/// A handler that maps the page and returns: the access is done as if nothing had been.
#[test]
fn faulting_access_is_restarted() {
    check(
        || {
            let mut m = Machine::long().code64(|a| {
                let mut again = a.create_label();
                a.mov(rbx, DATA + 0xffd)?;
                a.mov(ecx, 4)?;
                a.set_label(&mut again)?;
                a.add(dword_ptr(rbx), 0x0101_0101)?;
                a.mov(rdx, qword_ptr(rbx))?;
                a.dec(ecx)?;
                a.jne(again)?;
                a.hlt()
            });
            m.pte(DATA + 0x1000, 0);
            m.handler(PF, |a| {
                a.push(rax)?;
                a.mov(rax, (DATA + 0x1000) | P | W)?;
                a.mov(qword_ptr(Machine::pte_at(DATA + 0x1000)), rax)?;
                a.inc(r8)?;
                a.pop(rax)?;
                a.add(rsp, 8)?;
                a.iretq()
            });
            m
        },
        |o| {
            o.halted();
            assert_eq!((o.gpr(8), o.gpr(gpr::RDX)), (1, 0x0404_0404));
        },
    );
}

/// Canonical addresses: #GP(0), or #SS(0) through SS (SDM vol. 1 §3.3.7.1).
#[test]
fn non_canonical() {
    const BAD: u64 = 1 << 47;
    type Body = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let cases: [(u8, Body); 8] = [
        (13, |a| a.mov(al, byte_ptr(rbx))),
        (13, |a| a.mov(byte_ptr(rbx), al)),
        (12, |a| a.mov(al, byte_ptr(rbp))),
        (12, |a| a.push(rax)),
        (13, |a| a.mov(eax, dword_ptr(rbx - 2))),
        (12, |a| a.lock().add(dword_ptr(rbp - 2), 1)),
        (13, |a| a.jmp(rbx)),
        (13, |a| a.lgdt(ptr(rbx))),
    ];
    for (vector, body) in cases {
        check(
            || {
                let mut m = Machine::long().code64(|a| {
                    body(a)?;
                    a.hlt()
                });
                m.s.gpr[3] = BAD;
                m.s.gpr[5] = BAD;
                m.s.gpr[4] = BAD + 8;
                // The last page below the hole is mapped.
                m.w64(PML4 + 8 * 255, PDPT | P | W);
                m.w64(PDPT + 8 * 511, 0x3_0000 | P | W);
                m.w64(0x3_0000 + 8 * 511, 0x3_1000 | P | W);
                m.w64(0x3_1000 + 8 * 511, DATA | P | W);
                m.gate64(12, HANDLERS + 16 * 12, 14, 0, 1);
                m.gate64(13, HANDLERS + 16 * 13, 14, 0, 1);
                m
            },
            |o| {
                o.fault(vector, 0, CODE);
            },
        );
    }
}

/// INVLPG makes a changed entry seen, for data and for code; so do MOV CR3 and a change of CR4.PGE, which differ in
/// global translations (SDM vol. 3 §4.10.4.1).
#[test]
fn invalidation() {
    const X: u64 = DATA;
    const Y: u64 = DATA + 0x1000;
    type Body = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let flushes: [(bool, Body); 6] = [
        (true, |a| a.invlpg(byte_ptr(X + 0x123))),
        (false, |a| {
            a.mov(rax, cr3)?;
            a.mov(cr3, rax)
        }),
        (true, |a| {
            a.mov(rax, cr4)?;
            a.xor(rax, 1 << 7)?;
            a.mov(cr4, rax)?;
            a.xor(rax, 1 << 7)?;
            a.mov(cr4, rax)
        }),
        (true, |a| {
            a.mov(eax, 2)?;
            a.invpcid(rax, xmmword_ptr(DATA + 0x3000))
        }),
        (false, |a| {
            a.mov(eax, 3)?;
            a.invpcid(rax, xmmword_ptr(DATA + 0x3000))
        }),
        (false, |a| {
            a.mov(eax, 1)?;
            a.invpcid(rax, xmmword_ptr(DATA + 0x3000))
        }),
    ];
    for (n, (globals_too, flush)) in flushes.into_iter().enumerate() {
        for (global, smap) in [(false, false), (true, false), (false, true), (true, true)] {
            check(
                || {
                    let mut m = Machine::long().code64(|a| {
                        a.call(X)?;
                        a.mov(esi, eax)?;
                        a.mov(rax, Y | P | W)?;
                        a.mov(qword_ptr(Machine::pte_at(X)), rax)?;
                        flush(a)?;
                        a.call(X)?;
                        a.mov(edi, eax)?;
                        a.mov(ecx, dword_ptr(X + 0x800))?;
                        a.hlt()
                    });
                    m.s.cr4 |= cr::CR4_PGE | if smap { cr::CR4_SMAP } else { 0 };
                    m.pte(X, X | P | W | if global { G } else { 0 });
                    for (at, v) in [(X, 1), (Y, 2)] {
                        m.asm(64, at, |a| {
                            a.mov(eax, v)?;
                            a.mov(edx, dword_ptr(X + 0x800))?;
                            a.ret()
                        });
                        m.w32(at + 0x800, v as u32);
                    }
                    m
                },
                |o| {
                    o.halted();
                    assert_eq!(o.gpr(gpr::RSI), 1);
                    if !global || globals_too {
                        assert_eq!((o.gpr(gpr::RDI), o.gpr(gpr::RCX)), (2, 2), "{}: flush {n}", o.engine);
                    }
                },
            );
        }
    }
}

/// A supervisor page that is not global is each address space's own, however often they take turns.
#[test]
fn supervisor_pages_of_two_address_spaces() {
    const TURNS: u64 = 200;
    const X: u64 = DATA;
    for (pcide, smap) in [(false, false), (false, true), (true, false), (true, true)] {
        let build = || {
            let mut m = Machine::long().code64(|a| {
                let mut again = a.create_label();
                a.mov(ebp, 2 * TURNS as i32)?;
                a.mov(rdx, u64::from(pcide) << 63)?;
                a.set_label(&mut again)?;
                a.add(rsi, qword_ptr(X))?;
                a.inc(qword_ptr(X + 0x800))?;
                a.add(rdi, qword_ptr(X + 0x1000))?;
                a.mov(rax, cr3)?;
                a.xor(rax, (PML4 ^ OTHER) as i32 | i32::from(pcide))?;
                a.or(rax, rdx)?;
                a.mov(cr3, rax)?;
                a.dec(ebp)?;
                a.jne(again)?;
                a.mov(rax, qword_ptr(DATA + 0x2800))?;
                a.mov(rbx, qword_ptr(DATA + 0x3800))?;
                a.hlt()
            });
            m.s.cr4 |= cr::CR4_PGE;
            m.s.cr4 |= if pcide { cr::CR4_PCIDE } else { 0 } | if smap { cr::CR4_SMAP } else { 0 };
            m.pte(X + 0x1000, (X + 0x1000) | P | W | G);
            m.pte(X, (DATA + 0x2000) | P | W);
            m.other_address_space(X, (DATA + 0x3000) | P | W);
            for (at, v) in [(DATA + 0x1000, 5), (DATA + 0x2000, 1), (DATA + 0x3000, 100)] {
                m.w64(at, v);
            }
            m
        };
        check(build, |o| {
            o.halted();
            let found = [gpr::RSI, gpr::RDI, gpr::RAX, gpr::RBX].map(|r| o.gpr(r));
            assert_eq!(found, [101 * TURNS, 10 * TURNS, TURNS, TURNS], "{}: {pcide} {smap}", o.engine);
        });
    }
}

/// INVLPG of any address in a large page removes the translation of all of it, fetches included.
#[test]
fn invlpg_of_a_large_page() {
    const AT: u64 = 0x4000_0000;
    check(
        || {
            let mut m = Machine::long().code64(|a| {
                a.call(AT + 0x18_2000)?;
                a.mov(esi, eax)?;
                a.mov(ebx, dword_ptr(AT + 0x18_3000))?;
                a.mov(qword_ptr(0x3_0000u64), (0x20_0000 | P | W | PS) as i32)?;
                a.invlpg(byte_ptr(AT + 0x5010))?;
                a.mov(ecx, dword_ptr(AT + 0x18_3000))?;
                a.call(AT + 0x18_2000)?;
                a.mov(edi, eax)?;
                a.hlt()
            });
            m.w64(PDPT + 8, 0x3_0000 | P | W);
            m.w64(0x3_0000, P | W | PS);
            for (at, v) in [(0x18_0000u64, 1), (0x38_0000, 2)] {
                m.asm(64, at + 0x2000, |a| {
                    a.mov(eax, v)?;
                    a.ret()
                });
                m.w32(at + 0x3000, v as u32);
            }
            m
        },
        |o| {
            o.halted();
            assert_eq!((o.gpr(gpr::RSI), o.gpr(gpr::RBX)), (1, 1));
            assert_eq!((o.gpr(gpr::RCX), o.gpr(gpr::RDI)), (2, 2), "{}", o.engine);
        },
    );
}

/// A cleared dirty flag is set again by the next store after INVLPG, and a page made read-only faults.
#[test]
fn dirty_again_after_invlpg() {
    check(
        || {
            Machine::long().code64(|a| {
                a.mov(dword_ptr(DATA), 1)?;
                a.mov(rax, DATA | P | W)?;
                a.mov(qword_ptr(Machine::pte_at(DATA)), rax)?;
                a.invlpg(byte_ptr(DATA))?;
                a.mov(ebx, dword_ptr(DATA))?;
                a.mov(rsi, qword_ptr(Machine::pte_at(DATA)))?;
                a.mov(dword_ptr(DATA), 2)?;
                a.mov(rdi, qword_ptr(Machine::pte_at(DATA)))?;
                a.mov(rax, DATA | P)?;
                a.mov(qword_ptr(Machine::pte_at(DATA)), rax)?;
                a.invlpg(byte_ptr(DATA))?;
                a.mov(dword_ptr(DATA), 3)?;
                a.hlt()
            })
        },
        |o| {
            assert_eq!(o.exception(PF).error, Some(3));
            assert_eq!(o.gpr(gpr::RSI) & (A | D), A);
            assert_eq!(o.gpr(gpr::RDI) & (A | D), A | D);
            assert_eq!(o.r32(DATA), 2);
        },
    );
}

/// PCIDs: translations of one are not used with another; CR3 bit 63 keeps them, its absence drops them
/// (SDM vol. 3 §4.10.1, §4.10.4.1).
#[test]
fn pcid() {
    const X: u64 = DATA;
    const Y: u64 = DATA + 0x1000;
    check(
        || {
            let mut m = Machine::long().code64(|a| {
                // PCID 1 uses the tables at 40000h, in which X leads to Y.
                a.mov(rsi, 0x4_0001u64)?;
                a.mov(rdi, cr3)?;
                a.mov(eax, dword_ptr(X))?;
                a.mov(cr3, rsi)?;
                a.mov(ebx, dword_ptr(X))?;
                a.mov(rdx, 1u64 << 63)?;
                a.lea(rcx, rdi + rdx)?;
                a.mov(cr3, rcx)?;
                a.mov(r8d, dword_ptr(X))?;
                // PCID 1's own X leads to X now; a load of CR3 without bit 63 must see it.
                a.mov(r10, X | P | W)?;
                a.mov(qword_ptr(0x4_3000 + (X >> 12) * 8), r10)?;
                a.mov(cr3, rsi)?;
                a.mov(r9d, dword_ptr(X))?;
                // INVPCID type 0 for PCID 1, from PCID 0.
                a.mov(cr3, rdi)?;
                a.mov(r10, Y | P | W)?;
                a.mov(qword_ptr(0x4_3000 + (X >> 12) * 8), r10)?;
                a.mov(r11d, 0)?;
                a.invpcid(r11, xmmword_ptr(DATA + 0x3000))?;
                a.lea(rcx, rsi + rdx)?;
                a.mov(cr3, rcx)?;
                a.mov(r12d, dword_ptr(X))?;
                // INVPCID type 1.
                a.mov(r10, X | P | W)?;
                a.mov(qword_ptr(0x4_3000 + (X >> 12) * 8), r10)?;
                a.mov(r11d, 1)?;
                a.invpcid(r11, xmmword_ptr(DATA + 0x3000))?;
                a.mov(r13d, dword_ptr(X))?;
                a.mov(r14, cr3)?;
                a.hlt()
            });
            m.s.cr4 |= cr::CR4_PCIDE | cr::CR4_PGE;
            for (k, from) in [PML4, PDPT, PD, PT].into_iter().enumerate() {
                for n in 0..512 {
                    let entry = m.r64(from + 8 * n);
                    m.w64(0x4_0000 + 0x1000 * k as u64 + 8 * n, entry);
                }
            }
            for (at, to) in [(0x4_0000, 0x4_1000), (0x4_1000, 0x4_2000), (0x4_2000, 0x4_3000u64)] {
                m.w64(at, to | P | W | U);
            }
            m.w64(0x4_3000 + (X >> 12) * 8, Y | P | W);
            m.w32(X, 1);
            m.w32(Y, 2);
            m.w64(DATA + 0x3000, 1);
            m.w64(DATA + 0x3008, X);
            m
        },
        |o| {
            o.halted();
            assert_eq!((o.gpr(0), o.gpr(3), o.gpr(8), o.gpr(9)), (1, 2, 1, 1), "{}", o.engine);
            assert_eq!((o.gpr(12), o.gpr(13)), (2, 1), "{}", o.engine);
            // Bit 63 is never read back.
            assert_eq!(o.gpr(14), 0x4_0001);
        },
    );
}

/// INVPCID's #GP conditions (SDM vol. 2, INVPCID).
#[test]
fn invpcid_checks() {
    for (how, pcid, linear, pcide, ok) in [
        (4u64, 0u64, 0u64, true, false),
        (0, 1 << 12, 0, true, false),
        (0, 1, 1 << 47, true, false),
        (1, 1, 1 << 47, true, true),
        (2, 1 << 12, 0, true, false),
        (0, 1, 0, false, false),
        (1, 1, 0, false, false),
        (1, 0, 0, false, true),
        (3, 0, 0, true, true),
    ] {
        check(
            || {
                let mut m = Machine::long().code64(|a| {
                    a.mov(rax, how)?;
                    a.invpcid(rax, xmmword_ptr(DATA))?;
                    a.hlt()
                });
                if pcide {
                    m.s.cr4 |= cr::CR4_PCIDE;
                }
                m.w64(DATA, pcid);
                m.w64(DATA + 8, linear);
                m
            },
            |o| {
                if ok {
                    o.halted();
                } else {
                    assert_eq!(o.exception(13).error, Some(0), "type {how} pcid {pcid:#x}");
                }
            },
        );
    }
}

/// An instruction across a page edge: either page may fault, and CR2 says which.
#[test]
fn fetch_across_pages() {
    const EDGE: u64 = DATA + 0x1000;
    for (missing, at) in [(DATA, EDGE - 3), (EDGE, EDGE)] {
        check(
            || {
                let mut m = Machine::long().code64(|a| {
                    a.mov(rbx, EDGE - 3)?;
                    a.jmp(rbx)
                });
                m.asm(64, EDGE - 3, |a| {
                    a.mov(eax, 0x1234_5678)?;
                    a.hlt()
                });
                m.pte(missing, 0);
                m
            },
            |o| {
                o.fault(PF, 0x10, EDGE - 3);
                assert_eq!(o.s.cr2, at);
            },
        );
    }
    // It runs once with both pages there, then the second goes.
    check(
        || {
            let mut m = Machine::long().code64(|a| {
                a.call(EDGE - 3)?;
                a.call(EDGE - 3)?;
                a.mov(qword_ptr(Machine::pte_at(EDGE)), 0)?;
                a.invlpg(byte_ptr(EDGE))?;
                a.call(EDGE - 3)?;
                a.hlt()
            });
            m.asm(64, EDGE - 3, |a| {
                a.mov(eax, 0x1234_5678)?;
                a.ret()
            });
            m
        },
        |o| {
            o.fault(PF, 0x10, EDGE - 3);
            assert_eq!(o.s.cr2, EDGE);
            assert_eq!(o.gpr(0), 0x1234_5678);
        },
    );
}

/// A repeated store that faults in its second page has done the first: the registers say how far it got.
#[test]
fn string_fault_is_restartable() {
    for backwards in [false, true] {
        check(
            || {
                let mut m = Machine::long().code64(|a| {
                    if backwards {
                        a.std()?
                    } else {
                        a.cld()?
                    }
                    a.rep().stosd()?;
                    a.hlt()
                });
                m.s.gpr[0] = 0xffff_ffff;
                m.s.gpr[1] = 8;
                m.s.gpr[7] = if backwards { DATA + 0x100c } else { DATA + 0xff0 };
                m.pte(if backwards { DATA } else { DATA + 0x1000 }, 0);
                m
            },
            |o| {
                o.fault(PF, 2, CODE + 1);
                assert_eq!((o.gpr(1), o.gpr(7)), (4, if backwards { DATA + 0xffc } else { DATA + 0x1000 }));
                assert_eq!(o.s.cr2, o.gpr(7));
                let at = if backwards { DATA + 0x1000 } else { DATA + 0xff0 };
                assert_eq!((o.r64(at), o.r64(at + 8)), (u64::MAX, u64::MAX));
            },
        );
    }
}

/// A copy over pages that lie one behind the other in memory, too, and have been accessed before, up to one that lies
/// elsewhere, and one that is not there.
#[test]
fn copies_over_several_pages() {
    const FROM: u64 = DATA;
    const TO: u64 = DATA + 0x10_0000;
    const ELSEWHERE: u64 = DATA + 0x18_0000;
    check(
        || {
            let mut m = Machine::long().code64(|a| {
                let mut touch = a.create_label();
                a.mov(rbx, TO)?;
                a.mov(edx, 5)?;
                a.set_label(&mut touch)?;
                a.mov(byte_ptr(rbx), al)?;
                a.mov(al, byte_ptr(rbx - (TO - FROM) as i32))?;
                a.add(rbx, 0x1000)?;
                a.dec(edx)?;
                a.jne(touch)?;
                a.mov(rsi, FROM + 8)?;
                a.mov(rdi, TO + 16)?;
                a.mov(ecx, 0x7000)?;
                a.rep().movsb()?;
                a.hlt()
            });
            for page in 0..5 {
                m.w64(FROM + 0x1000 * page + 8, page + 1);
                m.w64(FROM + 0x1000 * page + 0xff8, page + 11);
            }
            m.pte(TO + 0x3000, ELSEWHERE | P | W);
            m.pte(TO + 0x5000, 0);
            m
        },
        |o| {
            assert_eq!((o.gpr(gpr::RDI), o.gpr(gpr::RSI)), (TO + 0x5000, FROM + 0x4ff8), "{}", o.engine);
            assert_eq!((o.gpr(gpr::RCX), o.s.cr2), (0x7000 - 0x4ff0, TO + 0x5000));
            for (page, at) in [TO, TO + 0x1000, TO + 0x2000, ELSEWHERE, TO + 0x4000].into_iter().enumerate() {
                assert_eq!(o.r64(at + 16), page as u64 + 1, "{}", o.engine);
                assert_eq!(o.r64(at), if page == 0 { 0 } else { page as u64 + 10 });
            }
            assert_eq!(o.r64(TO + 0x3000), 0, "nothing was stored behind the third page");
        },
    );
}

/// Code in the upper half that two address spaces map differently, with and without PCIDs.
#[test]
fn upper_half_in_two_address_spaces() {
    const UP: u64 = 0xffff_8000_0000_0000;
    for pcide in [false, true] {
        check(
            || {
                let mut m = Machine::long().code64(|a| {
                    let mut again = a.create_label();
                    a.mov(r15d, 4)?;
                    a.mov(r14, UP + 0x100)?;
                    a.mov(r13, cr3)?;
                    a.mov(r12, if pcide { 1u64 << 63 } else { 0 })?;
                    a.set_label(&mut again)?;
                    a.call(r14)?;
                    a.lea(rax, r13 + r12)?;
                    a.add(eax, if pcide { 0x2_0001 } else { 0x2_0000 })?;
                    a.mov(cr3, rax)?;
                    a.call(r14)?;
                    a.lea(rax, r13 + r12)?;
                    a.mov(cr3, rax)?;
                    a.dec(r15d)?;
                    a.jne(again)?;
                    a.hlt()
                });
                m.s.cr4 |= cr::CR4_PGE | if pcide { cr::CR4_PCIDE } else { 0 };
                // Both have the lower half; the upper one is a page at DATA or at DATA + 1000h.
                m.w64(0x4_0000, PDPT | P | W | U);
                for (root, tables, page) in [(PML4, 0x5_0000, DATA), (0x4_0000, 0x5_4000, DATA + 0x1000)] {
                    m.w64(root + 8 * 256, tables | P | W);
                    m.w64(tables, (tables + 0x1000) | P | W);
                    m.w64(tables + 0x1000, (tables + 0x2000) | P | W);
                    m.w64(tables + 0x2000, page | P | W);
                }
                m.asm(64, DATA + 0x100, |a| {
                    a.inc(ebx)?;
                    a.ret()
                });
                m.asm(64, DATA + 0x1100, |a| {
                    a.inc(ebp)?;
                    a.ret()
                });
                m
            },
            |o| {
                o.halted();
                assert_eq!((o.gpr(3), o.gpr(5)), (4, 4), "{}", o.engine);
            },
        );
    }
}

/// What a cached translation permits depends on who asks, and on control bits as they are now.
#[test]
fn rights_with_a_warm_tlb() {
    // A supervisor page used at CPL 0, for data and for code, is not open to CPL 3 afterwards.
    for fetch in [false, true] {
        check(
            || {
                let mut m = Machine::long().code64(|a| {
                    let mut again = a.create_label();
                    a.mov(ecx, 3)?;
                    a.set_label(&mut again)?;
                    a.mov(eax, dword_ptr(DATA))?;
                    a.mov(dword_ptr(DATA), eax)?;
                    a.call(DATA + 0x100)?;
                    a.dec(ecx)?;
                    a.jne(again)?;
                    a.push(i32::from(USER_DATA))?;
                    a.push(USTACK as i32)?;
                    a.push(2)?;
                    a.push(i32::from(USER64))?;
                    a.push(UCODE as i32)?;
                    a.iretq()
                });
                m.asm(64, DATA + 0x100, |a| a.ret());
                m.asm(64, UCODE, |a| if fetch { a.jmp(DATA + 0x100) } else { a.mov(eax, dword_ptr(DATA)) });
                m
            },
            |o| {
                o.fault(PF, if fetch { 0x15 } else { 5 }, if fetch { DATA + 0x100 } else { UCODE });
            },
        );
    }
    // CR0.WP, CR4.SMAP, CR4.SMEP and EFER.NXE set after the page was used.
    type Body = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let bits: [(u64, Body, Body, u64); 4] = [
        (
            P | U,
            |a| a.mov(dword_ptr(UDATA), ebx),
            |a| {
                a.mov(rax, cr0)?;
                a.or(rax, cr::CR0_WP as i32)?;
                a.mov(cr0, rax)
            },
            3,
        ),
        (
            P | W | U,
            |a| a.mov(dword_ptr(UDATA), ebx),
            |a| {
                a.mov(rax, cr4)?;
                a.or(rax, cr::CR4_SMAP as i32)?;
                a.mov(cr4, rax)
            },
            3,
        ),
        (
            P | W | U,
            |a| a.call(UDATA + 0x100),
            |a| {
                a.mov(rax, cr4)?;
                a.or(rax, cr::CR4_SMEP as i32)?;
                a.mov(cr4, rax)
            },
            0x11,
        ),
        (
            P | W | U | NX,
            |a| a.mov(ebx, dword_ptr(UDATA)),
            |a| {
                a.mov(ecx, 0xc000_0080u32)?;
                a.rdmsr()?;
                a.and(eax, !(cr::EFER_NXE as i32))?;
                a.wrmsr()
            },
            9,
        ),
    ];
    for (entry, access, set, error) in bits {
        check(
            || {
                let mut m = Machine::long().code64(|a| {
                    for _ in 0..2 {
                        access(a)?;
                    }
                    set(a)?;
                    a.inc(ebp)?;
                    access(a)?;
                    a.hlt()
                });
                m.s.cr0 &= !cr::CR0_WP;
                m.asm(64, UDATA + 0x100, |a| a.ret());
                m.pte(UDATA, UDATA | entry);
                m
            },
            |o| {
                assert_eq!(o.exception(PF).error, Some(error), "{}", o.engine);
                assert_eq!(o.gpr(5), 1, "{}", o.engine);
            },
        );
    }
}

#[test]
fn a_fault_in_the_first_of_two_pages_leaves_the_second_not_accessed() {
    for what in [Do::Read, Do::Write] {
        let build = || {
            let mut m = access(true, what, UDATA + 0xffe);
            m.pte(UDATA, 0);
            m
        };
        check(build, |o| {
            assert!(o.exception(PF).error.is_some(), "{}", o.engine);
            assert_eq!(o.pte(UDATA + 0x1000) & (A | D), 0, "{} {what:?}", o.engine);
        });
    }
}

/// What a loop's own accesses remember of a page goes when the page's translation does, however it went.
#[test]
fn loops_see_changed_translations() {
    const X: u64 = DATA;
    const Y: u64 = DATA + 0x1000;
    const ENTRY: i64 = (PT + (X >> 12) * 8) as i64;
    type Body = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let flushes: [Body; 3] = [
        |a| a.invlpg(byte_ptr(X + 0x123)),
        |a| {
            a.mov(rax, cr3)?;
            a.mov(cr3, rax)
        },
        |a| {
            a.mov(eax, 2)?;
            a.invpcid(rax, xmmword_ptr(DATA + 0x3000))
        },
    ];
    for flush in flushes {
        check(
            || {
                let mut m = Machine::long().code64(|a| {
                    let (mut again, mut access) = (a.create_label(), a.create_label());
                    a.mov(rbx, X)?;
                    a.mov(rbp, DATA + 0x2000)?;
                    a.mov(qword_ptr(rbp), rbx)?;
                    a.mov(r8, X | P | W)?;
                    a.mov(r9, Y | P | W)?;
                    a.mov(ecx, 1000)?;
                    a.set_label(&mut again)?;
                    a.mov(edx, 3)?;
                    a.set_label(&mut access)?;
                    // By what may be anything, as far as the loop knows.
                    a.add(rbp, 0)?;
                    a.mov(rdi, qword_ptr(rbp))?;
                    a.add(rsi, qword_ptr(rdi))?;
                    a.mov(qword_ptr(rbx + 8), rcx)?;
                    a.add(qword_ptr(rbx + 16), 1)?;
                    a.dec(edx)?;
                    a.jne(access)?;
                    a.xchg(r8, r9)?;
                    a.mov(qword_ptr(ENTRY as u64), r8)?;
                    flush(a)?;
                    a.dec(ecx)?;
                    a.jne(again)?;
                    a.hlt()
                });
                m.w64(X, 1);
                m.w64(Y, 1 << 16);
                m.patience = 20;
                m
            },
            |o| {
                o.halted();
                assert_eq!(o.gpr(gpr::RSI), 1500 + (1500 << 16), "{}", o.engine);
                assert_eq!((o.r64(X + 8), o.r64(Y + 8)), (2, 1), "{}", o.engine);
                assert_eq!((o.r64(X + 16), o.r64(Y + 16)), (1500, 1500), "{}", o.engine);
            },
        );
    }
}

/// A page fault invalidates what is cached of its address (SDM vol. 3 §4.10.4.1): a handler that maps another page there
/// need not.
#[test]
fn loops_see_repairs_by_fault_handlers() {
    const X: u64 = DATA;
    const Y: u64 = DATA + 0x1000;
    const ENTRY: u64 = PT + (X >> 12) * 8;
    check(
        || {
            let mut m = Machine::long().code64(|a| {
                let (mut again, mut quiet) = (a.create_label(), a.create_label());
                a.mov(rbx, X)?;
                a.mov(r9, Y | P | W)?;
                a.mov(ecx, 1000)?;
                a.set_label(&mut again)?;
                a.add(rsi, qword_ptr(rbx))?;
                a.cmp(ecx, 300)?;
                a.jne(quiet)?;
                // Read-only so far.
                a.mov(qword_ptr(rbx + 8), rcx)?;
                a.set_label(&mut quiet)?;
                a.dec(ecx)?;
                a.jne(again)?;
                a.hlt()
            });
            m.handler(PF, |a| {
                a.mov(qword_ptr(ENTRY), r9)?;
                a.add(rsp, 8)?;
                a.iretq()
            });
            m.pte(X, X | P);
            m.w64(X, 1);
            m.w64(Y, 1 << 16);
            m.patience = 20;
            m
        },
        |o| {
            o.halted();
            assert_eq!(o.gpr(gpr::RSI), 701 + (299 << 16), "{}", o.engine);
            assert_eq!(o.r64(Y + 8), 300);
        },
    );
}

/// The same of one access: what a load had found there before is not used any more.
#[test]
fn what_has_faulted_is_looked_up_anew() {
    const X: u64 = DATA;
    const Y: u64 = DATA + 0x1000;
    check(
        || {
            let mut m = Machine::long().code64(|a| {
                a.mov(rbx, X)?;
                a.mov(r9, Y | P)?;
                a.mov(rsi, qword_ptr(rbx))?;
                // Of three bytes.
                a.mov(qword_ptr(rbx), rcx)?;
                a.mov(rdi, qword_ptr(rbx))?;
                a.hlt()
            });
            m.handler(PF, |a| {
                a.mov(qword_ptr(PT + (X >> 12) * 8), r9)?;
                a.add(rsp, 8)?;
                a.add(qword_ptr(rsp), 3)?;
                a.iretq()
            });
            m.pte(X, X | P);
            m.w64(X, 1);
            m.w64(Y, 2);
            m
        },
        |o| {
            o.halted();
            assert_eq!((o.gpr(gpr::RSI), o.gpr(gpr::RDI)), (1, 2), "{}", o.engine);
        },
    );
}

/// Stores of a loop to a page in which code begins to run are seen by that code.
#[test]
fn loops_store_to_what_became_code() {
    const F: u64 = DATA + 0x800;
    check(
        || {
            let mut m = Machine::long().code64(|a| {
                let (mut again, mut store, mut quiet) = (a.create_label(), a.create_label(), a.create_label());
                a.mov(rbx, F)?;
                a.mov(ecx, 500)?;
                a.set_label(&mut again)?;
                a.mov(edx, 3)?;
                a.set_label(&mut store)?;
                // MOV EAX, imm32, whose constant is the counter.
                a.mov(dword_ptr(rbx + 1), ecx)?;
                a.dec(edx)?;
                a.jne(store)?;
                a.cmp(ecx, 300)?;
                a.ja(quiet)?;
                a.call(F)?;
                a.add(rsi, rax)?;
                a.set_label(&mut quiet)?;
                a.dec(ecx)?;
                a.jne(again)?;
                a.hlt()
            });
            m.bytes(F, &[0xb8, 0, 0, 0, 0, 0xc3]);
            m.patience = 20;
            m
        },
        |o| {
            o.halted();
            assert_eq!(o.gpr(gpr::RSI), 300 * 301 / 2, "{}", o.engine);
        },
    );
}

/// An address space that uses more pages than a table has entries at first gets a larger table; nothing is mixed up then.
#[test]
fn more_pages_than_the_first_table_has() {
    check(
        || {
            let mut m = Machine::long().code64(|a| {
                let (mut again, mut page) = (a.create_label(), a.create_label());
                a.mov(edi, 2)?;
                a.set_label(&mut again)?;
                a.mov(rbx, 0x4000_0000u64)?;
                a.mov(ecx, 4096)?;
                a.set_label(&mut page)?;
                a.add(qword_ptr(rbx + 0x10), rcx)?;
                a.add(rbx, 0x1000)?;
                a.dec(ecx)?;
                a.jne(page)?;
                a.dec(edi)?;
                a.jne(again)?;
                a.hlt()
            });
            m.patience = 20;
            // 16 MiB of linear addresses over 32 pages.
            m.w64(PDPT + 8, 0x5_0000 | P | W);
            for table in 0..8u64 {
                m.w64(0x5_0000 + 8 * table, (0x40_0000 + 0x1000 * table) | P | W);
                for n in 0..512 {
                    m.w64(0x40_0000 + 0x1000 * table + 8 * n, (0x50_0000 + 0x1000 * (n % 32)) | P | W);
                }
            }
            m
        },
        |o| {
            o.halted();
            for page in 0..32u64 {
                let sum: u64 = (0..4096).filter(|k| k % 32 == page).map(|k| 4096 - k).sum();
                assert_eq!(o.r64(0x50_0010 + 0x1000 * page), 2 * sum, "{}: page {page}", o.engine);
            }
        },
    );
}
