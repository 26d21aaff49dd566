//! What kernels execute on every way in and out, each of which has a compiled form: what it does, and that a fault finds
//! the registers that were set just before it.

use diglot_translator::state::{cr, flag, gpr, seg};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::machine::*;

type Body = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Each fault comes at the instruction, with everything before it done.
#[test]
fn faults_are_precise() {
    let user: fn() -> Machine = || Machine::long().user();
    let kernel: fn() -> Machine = Machine::long;
    let keys: fn() -> Machine = || {
        let mut m = Machine::long();
        m.s.cr4 |= cr::CR4_PKE;
        m
    };
    let bases: fn() -> Machine = || {
        let mut m = Machine::long();
        m.s.cr4 |= cr::CR4_FSGSBASE;
        m
    };
    type Case = (fn() -> Machine, Body, u8);
    let cases: [Case; 20] = [
        (user, |a| a.cli(), 13),
        (user, |a| a.sti(), 13),
        (user, |a| a.swapgs(), 13),
        (user, |a| a.stac(), 6),
        (user, |a| a.clac(), 6),
        (user, |a| a.mov(rdx, cr0), 13),
        (user, |a| a.mov(rdx, cr2), 13),
        (user, |a| a.mov(rdx, cr3), 13),
        (user, |a| a.mov(rdx, cr4), 13),
        (user, |a| a.mov(rdx, cr8), 13),
        (kernel, |a| a.rdpkru(), 6),
        (keys, |a| a.rdpkru(), 13),
        (kernel, |a| a.rdfsbase(rdx), 6),
        (kernel, |a| a.rdgsbase(edx), 6),
        (kernel, |a| a.wrfsbase(rax), 6),
        (kernel, |a| a.wrgsbase(eax), 6),
        (bases, |a| a.wrfsbase(rcx), 13),
        (bases, |a| a.wrgsbase(rcx), 13),
        (kernel, |a| a.mov(word_ptr(rcx), ds), 13),
        (kernel, |a| a.mov(word_ptr(r8), ds), 14),
    ];
    for (n, (machine, body, vector)) in cases.into_iter().enumerate() {
        check(
            || {
                machine().code64(|a| {
                    a.add(rbx, 5)?;
                    a.mov(rcx, 1u64 << 47 | 1)?;
                    a.mov(r8, UNMAPPED)?;
                    a.cmp(ebx, 5)?;
                    body(a)?;
                    a.hlt()
                })
            },
            |o| {
                let f = o.exception(vector);
                assert_eq!(f.ip & 0xfff, 27, "case {n}, {}: {f:x?}", o.engine);
                assert_eq!(
                    (o.gpr(gpr::RBX), o.gpr(gpr::RCX), o.gpr(gpr::RDX)),
                    (5, 1 << 47 | 1, 0),
                    "case {n}, {}",
                    o.engine
                );
                assert_ne!(f.flags & flag::ZF, 0, "case {n}, {}", o.engine);
            },
        );
    }
}

/// With IOPL 3, CLI and STI work at CPL 3, and PUSHF shows it.
#[test]
fn interrupt_flag_at_level_3() {
    check(
        || {
            let mut m = Machine::long().user().flags(flag::IOPL | flag::IF).code64(|a| {
                a.cli()?;
                a.pushfq()?;
                a.sti()?;
                a.pushfq()?;
                a.pop(rax)?;
                a.pop(rbx)?;
                a.int(0x40)
            });
            m.gate_dpl(0x40, 3);
            m
        },
        |o| {
            assert_eq!(o.vector(), Some(0x40));
            assert_eq!(o.gpr(gpr::RAX), flag::IOPL | flag::IF | 2, "{}", o.engine);
            assert_eq!(o.gpr(gpr::RBX), flag::IOPL | 2, "{}", o.engine);
        },
    );
}

/// An interrupt that waits is taken behind the instruction that follows STI, in a loop as well; CLI holds it back.
#[test]
fn sti_lets_one_instruction_pass() {
    check(
        || {
            let mut m = Machine::long().code64(|a| {
                let mut again = a.create_label();
                a.mov(ebp, 3)?;
                a.set_label(&mut again)?;
                a.cli()?;
                a.mov(eax, 0x60)?;
                a.out(PORT_IRQ as i32, al)?;
                a.inc(ecx)?;
                a.sti()?;
                a.inc(esi)?;
                a.inc(edi)?;
                a.dec(ebp)?;
                a.jne(again)?;
                a.hlt()
            });
            m.patience = 2;
            m.handler(0x60, |a| {
                // One ahead of EDI each time.
                a.sub(esi, edi)?;
                a.add(edx, esi)?;
                a.add(esi, edi)?;
                a.iretq()
            });
            m
        },
        |o| {
            o.halted();
            let regs = [gpr::RCX, gpr::RDX, gpr::RSI, gpr::RDI].map(|r| o.gpr(r));
            assert_eq!(regs, [3; 4], "{}", o.engine);
        },
    );
}

/// PUSHF of every combination of arithmetic flags, and of DF, AC and ID, as POPF and as arithmetic has set them.
#[test]
fn pushf_shows_every_flag() {
    let status = [flag::CF, flag::PF, flag::AF, flag::ZF, flag::SF, flag::OF, flag::DF, flag::AC | flag::ID];
    for n in 0..1u32 << status.len() {
        let flags = (0..).zip(status).filter(|(bit, _)| n >> bit & 1 != 0).fold(0, |all, (_, f)| all | f);
        check(
            || {
                Machine::long().code64(|a| {
                    a.push(flags as i32)?;
                    a.popfq()?;
                    a.pushfq()?;
                    a.pop(rax)?;
                    a.hlt()
                })
            },
            |o| assert_eq!(o.gpr(gpr::RAX), flags | 2, "{}", o.engine),
        );
    }
    for (a0, b0, flags) in [
        (5u64, 5u64, flag::ZF | flag::PF),
        (0, 1, flag::CF | flag::PF | flag::AF | flag::SF),
        (1 << 63, 1, flag::OF | flag::PF | flag::AF),
        (0x7fff_ffff_ffff_ffff, u64::MAX, flag::CF | flag::OF | flag::SF | flag::PF),
    ] {
        check(
            || {
                let mut m = Machine::long().code64(|a| {
                    a.std()?;
                    a.cmp(rax, rbx)?;
                    a.pushfq()?;
                    a.cld()?;
                    a.pushfq()?;
                    a.pop(rcx)?;
                    a.pop(rdx)?;
                    a.hlt()
                });
                (m.s.gpr[0], m.s.gpr[3]) = (a0, b0);
                m
            },
            |o| {
                assert_eq!(o.gpr(gpr::RDX), flags | flag::DF | 2, "{a0:#x} {b0:#x}, {}", o.engine);
                assert_eq!(o.gpr(gpr::RCX), flags | 2, "{a0:#x} {b0:#x}, {}", o.engine);
            },
        );
    }
    // A stack that is not there: nothing has changed.
    check(
        || {
            let mut m = Machine::long().code64(|a| {
                a.cmp(eax, eax)?;
                a.pushfq()
            });
            m.s.gpr[usize::from(gpr::RSP)] = UNMAPPED + 0x1000;
            m.gate64(14, HANDLERS + 16 * 14, 14, 0, 1);
            m
        },
        |o| {
            let f = o.fault(14, 2, CODE + 2);
            assert_eq!((f.sp, o.s.cr2), (UNMAPPED + 0x1000, UNMAPPED + 0xff8));
        },
    );
}

/// STAC and CLAC in a loop, whose accesses remember where they were last, with SMAP and without.
#[test]
fn stac_clac_in_loops() {
    for smap in [true, false] {
        check(
            || {
                let mut m = Machine::long().code64(|a| {
                    let mut again = a.create_label();
                    a.mov(rbx, UDATA)?;
                    a.mov(rsi, DATA)?;
                    a.mov(ebp, 4)?;
                    a.set_label(&mut again)?;
                    a.stac()?;
                    a.inc(dword_ptr(rbx))?;
                    a.mov(eax, dword_ptr(rbx))?;
                    a.clac()?;
                    a.mov(dword_ptr(rsi), eax)?;
                    a.dec(ebp)?;
                    a.jne(again)?;
                    a.mov(ecx, dword_ptr(rbx))?;
                    a.hlt()
                });
                m.patience = 2;
                if smap {
                    m.s.cr4 |= cr::CR4_SMAP;
                }
                m.w32(UDATA, 70);
                m
            },
            |o| {
                assert_eq!((o.r32(UDATA), o.r32(DATA), o.gpr(gpr::RAX)), (74, 74, 74), "{}", o.engine);
                if smap {
                    assert_eq!((o.exception(14).error, o.gpr(gpr::RCX)), (Some(1), 0));
                } else {
                    o.halted();
                    assert_eq!(o.gpr(gpr::RCX), 74);
                }
                assert_eq!(o.s.rflags & flag::AC, 0);
            },
        );
    }
}

/// The bases of FS and GS, SWAPGS between them, and accesses through them.
#[test]
fn bases() {
    check(
        || {
            let mut m = Machine::long().code64(|a| {
                a.mov(rax, DATA)?;
                a.wrgsbase(rax)?;
                a.swapgs()?;
                a.rdgsbase(rbx)?;
                a.mov(rcx, qword_ptr(0).gs())?;
                a.swapgs()?;
                a.mov(rdx, qword_ptr(0).gs())?;
                a.mov(rax, -1i64 as u64)?;
                a.wrfsbase(eax)?;
                a.rdfsbase(rsi)?;
                a.wrfsbase(rax)?;
                a.rdfsbase(rdi)?;
                a.rdfsbase(r8d)?;
                a.hlt()
            });
            m.s.cr4 |= cr::CR4_FSGSBASE;
            m.s.msr.kernel_gs_base = DATA + 8;
            m.w64(DATA, 11);
            m.w64(DATA + 8, 22);
            m
        },
        |o| {
            o.halted();
            let regs = [gpr::RBX, gpr::RCX, gpr::RDX, gpr::RSI, gpr::RDI, 8].map(|r| o.gpr(r));
            assert_eq!(regs, [DATA + 8, 22, 11, 0xffff_ffff, u64::MAX, 0xffff_ffff], "{}", o.engine);
            assert_eq!((o.s.seg[usize::from(seg::GS)].base, o.s.msr.kernel_gs_base), (DATA, DATA + 8));
        },
    );
}

/// MOV from control and segment registers, and RDPKRU, into registers of every width and memory.
#[test]
fn reads_of_system_registers() {
    check(
        || {
            let mut m = Machine::long().code64(|a| {
                a.mov(rax, -1i64 as u64)?;
                a.mov(rbx, rax)?;
                a.mov(rdi, rax)?;
                a.mov(qword_ptr(DATA), rax)?;
                a.mov(ax, ds)?;
                a.mov(ebx, cs)?;
                a.mov(rdi, ss)?;
                a.mov(word_ptr(DATA), cs)?;
                a.mov(r8, rax)?;
                a.xor(ecx, ecx)?;
                a.rdpkru()?;
                a.mov(r9, cr0)?;
                a.mov(r10, cr2)?;
                a.mov(r11, cr3)?;
                a.mov(r12, cr4)?;
                a.hlt()
            });
            m.s.cr4 |= cr::CR4_PKE;
            m.s.pkru = 0xc000_0000;
            m.s.cr2 = 0x8000_1234_5678_9abc;
            m
        },
        |o| {
            o.halted();
            assert_eq!(o.gpr(8), !0xffff | u64::from(DATA0), "{}", o.engine);
            assert_eq!((o.gpr(gpr::RBX), o.gpr(gpr::RDI)), (u64::from(CODE64), u64::from(DATA0)));
            assert_eq!(o.r64(DATA), !0xffff | u64::from(CODE64), "{}", o.engine);
            assert_eq!((o.gpr(gpr::RAX), o.gpr(gpr::RDX)), (0xc000_0000, 0));
            assert_eq!((o.gpr(9), o.gpr(10)), (o.s.cr0, 0x8000_1234_5678_9abc));
            assert_eq!((o.gpr(11), o.gpr(12)), (PML4, o.s.cr4));
        },
    );
}

/// RF from IRET's frame is gone once the next instruction has begun, and faults set it in theirs.
#[test]
fn rf_lasts_one_instruction() {
    for faults in [false, true] {
        check(
            || {
                let mut m = Machine::long().code64(|a| {
                    a.push(i32::from(DATA0))?;
                    a.push(STACK as i32)?;
                    a.push((flag::RF | 2) as i32)?;
                    a.push(i32::from(CODE64))?;
                    a.push(CODE as i32 + 0x800)?;
                    a.iretq()
                });
                m.asm(64, CODE + 0x800, |a| if faults { a.ud2() } else { a.int(0x40) });
                m
            },
            |o| {
                let f = o.exception(if faults { 6 } else { 0x40 });
                assert_eq!(f.flags, if faults { flag::RF | 2 } else { 2 }, "{}", o.engine);
            },
        );
    }
}

/// Operands of many bytes that go on in the next page: in either direction, and not at all if that is not there.
#[test]
fn wide_operands_across_pages() {
    let run = |present: bool, store: bool| {
        let at = DATA + 0x1000 - 0x90;
        check(
            || {
                let mut m = Machine::long().code64(|a| {
                    a.mov(rbx, at)?;
                    if store {
                        a.fxsave(ptr(rbx))?
                    } else {
                        a.fxrstor(ptr(rbx))?
                    }
                    a.hlt()
                });
                for n in 0..64 {
                    m.w64(at + 8 * n, if store { u64::MAX } else { 0 });
                }
                m.w16(at, 0x37f);
                m.w32(at + 24, 0x1f80);
                // XMM15, in the second page.
                m.w64(at + 160 + 15 * 16, 0x1234);
                m.s.ymm[15][0] = 0x5678;
                if !present {
                    m.pte(DATA + 0x1000, 0);
                }
                m
            },
            |o| {
                if present {
                    o.halted();
                    let wanted = if store { 0x5678 } else { 0x1234 };
                    assert_eq!((o.s.ymm[15][0], o.r64(at + 160 + 15 * 16)), (wanted, wanted), "{}", o.engine);
                } else {
                    o.exception(14);
                    assert_eq!(o.s.cr2, DATA + 0x1000);
                    assert_eq!(o.s.ymm[15][0], 0x5678);
                    assert_eq!(o.r64(at + 32), if store { u64::MAX } else { 0 }, "{}", o.engine);
                }
            },
        );
    };
    for present in [true, false] {
        run(present, true);
        run(present, false);
    }
}
