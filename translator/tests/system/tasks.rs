//! Hardware task switches (SDM vol. 3 chapter 7).

use diglot_translator::state::{cr, flag, gpr, seg};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::machine::*;

/// A second task-state segment and its selector.
const TSS2: u64 = 0x3200;
const SEL2: u16 = FREE;
/// A task gate to it.
const TASK_GATE: u16 = FREE + 8;
const STACK2: u64 = 0xe000;
/// Where the second task starts.
const TASK2: u64 = CODE + 0x400;

fn far(a: &mut CodeAssembler, call: bool, selector: u16) -> Result<(), IcedError> {
    let s = selector.to_le_bytes();
    a.db(&[if call { 0x9a } else { 0xea }, 0, 0, 0, 0, s[0], s[1]])
}

/// Two 32-bit tasks at CPL 0; the first runs `first`, the second `second`.
fn two(
    first: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>,
    second: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Machine {
    let mut m = Machine::flat32().interpreted().code32(|a| first(a));
    m.gdt(SEL2, descriptor(TSS2 as u32, 0x67, 0x89));
    m.gdt(TASK_GATE, gate(SEL2, 0, 5, 3));
    for (at, v) in [
        (0x20u64, TASK2),
        (0x24, 2 | flag::ID),
        (0x28, 0x11),
        (0x2c, 0x22),
        (0x38, STACK2),
        (0x48, DATA0.into()),
        (0x4c, CODE32.into()),
        (0x50, DATA0.into()),
        (0x54, DATA0.into()),
        (0x58, USER_DATA.into()),
    ] {
        m.w32(TSS2 + at, v as u32);
    }
    m.asm(32, TASK2, |a| second(a));
    m
}

fn busy(o: &Outcome, selector: u16) -> bool {
    o.r64(GDT + u64::from(selector)) >> 41 & 1 != 0
}

/// JMP: everything is saved and loaded, the busy bits change places, no link, CR0.TS is set.
#[test]
fn jump() {
    for selector in [SEL2, TASK_GATE] {
        check(
            || {
                let mut m = two(
                    |a| {
                        a.mov(eax, 0x1234)?;
                        a.mov(ebp, 0x5678)?;
                        a.stc()?;
                        far(a, false, selector)
                    },
                    |a| {
                        a.str(edx)?;
                        a.hlt()
                    },
                );
                m.s.seg[usize::from(seg::FS)] = m.segment(USER_DATA);
                m
            },
            |o| {
                o.halted();
                let old = [0x20u64, 0x28, 0x3c, 0x38, 0x4c, 0x50, 0x58].map(|at| o.r32(TSS + at));
                assert_eq!(old, [CODE + 10 + 1 + 7, 0x1234, 0x5678, STACK, 0x18, 0x10, 0x2b]);
                assert_eq!(o.r32(TSS + 0x24) & (flag::CF | flag::NT), flag::CF);
                assert_eq!((o.gpr(0), o.gpr(1), o.gpr(4), o.gpr(2)), (0x11, 0x22, STACK2, SEL2.into()));
                assert_eq!(o.s.seg[usize::from(seg::FS)].selector, USER_DATA);
                assert_eq!((busy(o, TSS_SEL), busy(o, SEL2)), (false, true));
                assert_eq!(o.r32(TSS2), 0);
                assert_eq!((o.s.cr0 & cr::CR0_TS, o.s.rflags & (flag::NT | flag::ID)), (cr::CR0_TS, flag::ID));
            },
        );
    }
}

/// CALL links and sets NT; IRET goes back along the link.
#[test]
fn call_and_return() {
    for selector in [SEL2, TASK_GATE] {
        check(
            || {
                two(
                    |a| {
                        a.mov(ebx, 7)?;
                        far(a, true, selector)?;
                        a.str(edi)?;
                        a.hlt()
                    },
                    |a| {
                        a.pushfd()?;
                        a.pop(ebx)?;
                        a.iretd()?;
                        a.hlt()
                    },
                )
            },
            |o| {
                o.halted();
                assert_eq!((o.gpr(7), o.gpr(3)), (TSS_SEL.into(), 7), "{}", o.engine);
                assert_eq!((busy(o, TSS_SEL), busy(o, SEL2)), (true, false));
                // The second task's NT is cleared in its image; its EIP is behind the IRET.
                assert_eq!(o.r32(TSS2 + 0x24) & flag::NT, 0);
                assert_eq!((o.r32(TSS2 + 0x20), o.r32(TSS2)), (TASK2 + 3, TSS_SEL.into()));
                assert_eq!(o.r32(TSS2 + 0x34) & flag::NT, flag::NT);
                assert_eq!(o.s.rflags & flag::NT, 0);
            },
        );
    }
}

/// An exception through a task gate: the error code on the new task's stack, the fault's address in the old image.
#[test]
fn exception_through_a_task_gate() {
    for (vector, error) in [(13u8, Some(0x100u64)), (6, None)] {
        check(
            || {
                let mut m = two(
                    |a| {
                        a.mov(eax, 0x100)?;
                        if vector == 13 {
                            a.mov(es, eax)?
                        } else {
                            a.ud2()?
                        }
                        a.hlt()
                    },
                    |a| {
                        a.mov(eax, dword_ptr(esp))?;
                        a.hlt()
                    },
                );
                m.gate32(vector, SEL2, 0, 5, 0);
                m.s.gdtr.limit = 0xff;
                m
            },
            |o| {
                o.halted();
                let old_flags = o.r32(TSS + 0x24);
                assert_eq!((o.r32(TSS + 0x20), old_flags & flag::RF), (CODE + 5, flag::RF));
                assert_eq!(o.gpr(4), STACK2 - if error.is_some() { 4 } else { 0 });
                if let Some(e) = error {
                    assert_eq!(o.gpr(0), e);
                }
                assert_eq!((o.r32(TSS2), o.s.rflags & flag::NT), (TSS_SEL.into(), flag::NT));
                assert_eq!((busy(o, TSS_SEL), busy(o, SEL2)), (true, true));
            },
        );
    }
}

/// Refused before the switch: faults of the instruction in the old task.
#[test]
fn checks_before_the_switch() {
    for (raw, selector, expect) in [
        (descriptor(TSS2 as u32, 0x67, 0x8b), SEL2, (13u8, 0x58u64)),
        (descriptor(TSS2 as u32, 0x67, 0x09), SEL2, (11, 0x58)),
        (descriptor(TSS2 as u32, 0x66, 0x89), SEL2, (10, 0x58)),
        (descriptor(TSS2 as u32, 0x2a, 0x81), SEL2, (10, 0x58)),
        (descriptor(TSS2 as u32, 0x67, 0x8b), TASK_GATE, (13, 0x58)),
        (descriptor(TSS2 as u32, 0x67, 0x09), TASK_GATE, (11, 0x58)),
        (descriptor(0, 0xfffff, 0xc093), TASK_GATE, (13, 0x58)),
    ] {
        for call in [false, true] {
            check(
                || {
                    let mut m = two(|a| far(a, call, selector), |a| a.hlt());
                    m.gdt(SEL2, raw);
                    m
                },
                |o| {
                    o.fault(expect.0, expect.1, CODE);
                },
            );
        }
    }
    // IRET with NT to a task that is not busy: #TS.
    check(
        || {
            let mut m = two(|a| a.iretd(), |a| a.hlt());
            m.w16(TSS, SEL2);
            m.flags(flag::NT)
        },
        |o| {
            o.fault(10, 0x58, CODE);
        },
    );
    // DPL of the TSS and of the gate from CPL 3.
    for (selector, dpl, expect) in [(SEL2, 0, Some(0x58u64)), (TASK_GATE, 0, None)] {
        check(
            || {
                let mut m = two(|a| a.hlt(), |a| a.hlt()).user();
                m.gdt(SEL2, descriptor(TSS2 as u32, 0x67, 0x89 | dpl << 5));
                m.code32(|a| far(a, false, selector))
            },
            |o| match expect {
                Some(e) => {
                    o.fault(13, e, UCODE);
                }
                None => o.halted(),
            },
        );
    }
}

/// Faults in the new task: reported there, at its first instruction, on its stack (SDM vol. 3 table 7-1).
#[test]
fn faults_in_the_new_task() {
    for (at, v, vector, error) in [
        (0x4cu64, u64::from(DATA0), 10u8, 0x10u64),
        (0x4c, 0, 10, 0),
        (0x48, 0x200, 10, 0x200),
        (0x48, 0x60, 11, 0x60),
        (0x54, u64::from(CODE32) | 3, 10, 0x18),
        (0x60, 0x10, 10, 0x10),
    ] {
        for call in [false, true] {
            check(
                || {
                    let mut m = two(|a| far(a, call, SEL2), |a| a.hlt());
                    m.w32(TSS2 + at, v as u32);
                    m.gdt(0x60, descriptor(0, 0xfffff, 0xc013));
                    m.s.gdtr.limit = 0x1ff;
                    // The handler is a task of its own, as its CS may be what is wrong.
                    m.gdt(0x70, descriptor(0x3400, 0x67, 0x89));
                    for (at, v) in [
                        (0x20u64, CODE + 0x800),
                        (0x24, 2),
                        (0x38, STACK),
                        (0x4c, CODE32.into()),
                        (0x50, DATA0.into()),
                        (0x54, DATA0.into()),
                    ] {
                        m.w32(0x3400 + at, v as u32);
                    }
                    m.asm(32, CODE + 0x800, |a| {
                        a.pop(eax)?;
                        a.hlt()
                    });
                    m.gate32(vector, 0x70, 0, 5, 0);
                    m
                },
                |o| {
                    o.halted();
                    assert_eq!(o.s.rip, CODE + 0x802, "{}: {at:#x}={v:#x}", o.engine);
                    assert_eq!(o.gpr(0), error);
                    assert_eq!((o.r32(0x3400), o.r32(TSS2 + 0x20)), (SEL2.into(), TASK2));
                    // The old task had completed its instruction.
                    assert_eq!(o.r32(TSS + 0x20), CODE + 7);
                },
            );
        }
    }
    // EIP beyond the new CS's limit: #GP(0) in the new task.
    check(
        || {
            let mut m = two(|a| far(a, false, SEL2), |a| a.hlt());
            m.gdt(0x60, descriptor(0, 0xfffff, 0x409b));
            m.w32(TSS2 + 0x4c, 0x60);
            m.w32(TSS2 + 0x20, 0x10_0000);
            m
        },
        |o| {
            let f = o.fault(13, 0, 0x10_0000);
            assert_eq!((f.cs, o.gpr(gpr::RSP)), (0x60, STACK2 - 16));
        },
    );
}

/// A 16-bit TSS: words only, FS and GS null; into it and back.
#[test]
fn tss_16() {
    check(
        || {
            let mut m = two(
                |a| {
                    far(a, true, SEL2)?;
                    a.hlt()
                },
                |a| a.hlt(),
            );
            m.gdt(SEL2, descriptor(TSS2 as u32, 0x2b, 0x81));
            for (at, v) in [
                (0x0eu64, 0x5000u64),
                (0x10, 2),
                (0x12, 0x11),
                (0x14, 0x22),
                (0x1a, STACK2),
                (0x22, DATA0.into()),
                (0x24, CODE32.into()),
                (0x26, DATA0.into()),
                (0x28, DATA0.into()),
                (0x2a, 0),
            ] {
                m.w16(TSS2 + at, v as u16);
            }
            m.asm(32, 0x5000, |a| {
                a.mov(esi, fs)?;
                a.mov(dword_ptr(DATA as u32), esi)?;
                a.mov(dword_ptr(DATA as u32 + 4), eax)?;
                a.iretd()
            });
            m
        },
        |o| {
            o.halted();
            assert_eq!(o.s.rip, CODE + 8, "{}", o.engine);
            assert_eq!((o.r32(DATA), o.r16(DATA + 4)), (0, 0x11));
            assert_eq!((o.r16(TSS2 + 0x0e), o.r16(TSS2)), (0x500e, TSS_SEL.into()));
            assert_eq!((busy(o, TSS_SEL), busy(o, SEL2)), (true, false));
        },
    );
}

/// The T flag of the new task: #DB before its first instruction, DR6.BT set. DR7's local enables are cleared.
#[test]
fn debug_trap_flag() {
    check(
        || {
            let mut m = two(|a| far(a, false, SEL2), |a| a.hlt());
            m.w16(TSS2 + 0x64, 1);
            m.s.dr[7] = 0x401;
            m.s.dr[0] = TASK2;
            m
        },
        |o| {
            assert_eq!(o.exception(1).ip, TASK2, "{}", o.engine);
            assert_eq!((o.s.dr[6], o.s.dr[7]), (0xffff_8ff0, 0x400));
        },
    );
}

/// With paging the new task's CR3 is loaded.
#[test]
fn address_space() {
    check(
        || {
            let mut m = Machine::paging32().interpreted().code32(|a| {
                a.mov(eax, dword_ptr(DATA as u32))?;
                far(a, true, SEL2)?;
                a.mov(ebx, dword_ptr(DATA as u32))?;
                a.hlt()
            });
            m.gdt(SEL2, descriptor(TSS2 as u32, 0x67, 0x89));
            m.w32(TSS + 0x1c, PML4 as u32);
            for (at, v) in [
                (0x1cu64, 0x4_0000u64),
                (0x20, TASK2),
                (0x24, 2),
                (0x38, STACK2),
                (0x48, DATA0.into()),
                (0x4c, CODE32.into()),
                (0x50, DATA0.into()),
                (0x54, DATA0.into()),
            ] {
                m.w32(TSS2 + at, v as u32);
            }
            for n in 0..1024 {
                let entry = m.r64(PT + 8 * (n / 2)) >> (32 * (n % 2));
                m.w32(0x4_1000 + 4 * n, entry as u32);
            }
            m.w32(0x4_0000, 0x4_1007);
            m.w32(0x4_1000 + 4 * (DATA >> 12), (DATA + 0x1000 | P | W) as u32);
            m.asm(32, TASK2, |a| {
                a.mov(ecx, dword_ptr(DATA as u32))?;
                a.mov(dword_ptr(DATA as u32 + 8), ecx)?;
                a.iretd()
            });
            m.w32(DATA, 1);
            m.w32(DATA + 0x1000, 2);
            m
        },
        |o| {
            o.halted();
            assert_eq!((o.gpr(0), o.gpr(3), o.r32(DATA + 0x1008)), (1, 1, 2), "{}", o.engine);
        },
    );
}
