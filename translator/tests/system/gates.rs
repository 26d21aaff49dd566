//! Far transfers (SDM vol. 3 §5.8; vol. 2 CALL, JMP, RET, IRET): code segments, call gates, returns between levels.

use diglot_translator::state::{flag, gpr, seg};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::machine::*;

/// A far pointer operand's bytes: JMP or CALL ptr16:32.
fn far(a: &mut CodeAssembler, call: bool, selector: u16, offset: u64) -> Result<(), IcedError> {
    let mut bytes = vec![if call { 0x9a } else { 0xea }];
    bytes.extend((offset as u32).to_le_bytes());
    bytes.extend(selector.to_le_bytes());
    a.db(&bytes)
}

/// Direct far JMP and CALL: which segments may be entered, at which level they run.
#[test]
fn direct() {
    for (user, attr, rpl, expect) in [
        (false, 0xc09bu64, 0u16, Ok(0u64)),
        (false, 0xc09b, 3, Err((13u8, 0x58u64))),
        (false, 0xc0fb, 3, Err((13, 0x58))),
        (true, 0xc0fb, 3, Ok(3)),
        (true, 0xc0fb, 0, Ok(3)),
        (true, 0xc09b, 0, Err((13, 0x58))),
        // Conforming: at CPL or inner levels; CPL stays.
        (true, 0xc09f, 3, Ok(3)),
        (false, 0xc09f, 3, Ok(0)),
        (false, 0xc0ff, 0, Err((13, 0x58))),
        (false, 0xc01b, 0, Err((11, 0x58))),
        (false, 0xc093, 0, Err((13, 0x58))),
    ] {
        for call in [false, true] {
            check(
                || {
                    let m = Machine::flat32();
                    let m = if user { m.user() } else { m };
                    let mut m = m.code32(|a| far(a, call, FREE | rpl, UCODE + 0x100));
                    m.gdt(FREE, descriptor(0, 0xfffff, attr));
                    m.gate_dpl(0x40, 3);
                    m.asm(32, UCODE + 0x100, |a| {
                        a.mov(esi, cs)?;
                        a.int(0x40)
                    });
                    m
                },
                |o| match expect {
                    Err((v, e)) => {
                        o.fault(v, e, if user { UCODE } else { CODE });
                    }
                    Ok(cpl) => {
                        assert_eq!(o.vector(), Some(0x40), "{attr:#x}");
                        assert_eq!(o.gpr(6), u64::from(FREE) | cpl);
                        let f = o.frame32(false);
                        assert_eq!(f.cs, u64::from(FREE) | cpl);
                        if call {
                            let top = if user { f.sp } else { o.gpr(gpr::RSP) + 12 };
                            let start = if user { UCODE } else { CODE };
                            let old = if user { USER32 } else { CODE32 };
                            assert_eq!((o.r32(top), o.r32(top + 4)), (start + 7, u64::from(old)));
                        }
                    }
                },
            );
        }
    }
    // Beyond the limit: #GP(0); the limit is the target's.
    check(
        || {
            let mut m = Machine::flat32().code32(|a| far(a, false, FREE, UCODE));
            m.gdt(FREE, descriptor(0, 0xffff, 0x409b));
            m
        },
        |o| {
            o.fault(13, 0, CODE);
        },
    );
}

/// A call gate to level 0 with two parameters, and RET imm16 back.
#[test]
fn call_gate_with_parameters() {
    for wide in [true, false] {
        let n: u64 = if wide { 4 } else { 2 };
        check(
            || {
                let mut m = Machine::flat32().user().code32(|a| {
                    if wide {
                        a.push(0x1111_1111)?;
                        a.push(0x2222_2222)?;
                    } else {
                        a.db(&[0x66, 0x68, 0x11, 0x11, 0x66, 0x68, 0x22, 0x22])?;
                    }
                    far(a, true, FREE | 3, 0xdead)?;
                    a.mov(edi, esp)?;
                    a.mov(ecx, ds)?;
                    a.int(0x40)
                });
                let at = if wide { CODE } else { 0x5000 };
                m.gdt(FREE, gate(CODE32, at, if wide { 12 } else { 4 }, 3) | 2 << 32);
                m.gate_dpl(0x40, 3);
                m.asm(32, at, |a| {
                    a.mov(esi, esp)?;
                    a.mov(ebx, ss)?;
                    a.mov(edx, DATA0 as i32)?;
                    a.mov(ds, edx)?;
                    a.mov(dword_ptr(TSS as u32 + 4), 0x9000)?;
                    // A 16-bit gate has pushed half of the return address only.
                    if wide { a.retf_1(8) } else { a.int(0x40) }
                });
                m
            },
            |o| {
                assert_eq!(o.vector(), Some(0x40), "{}", o.engine);
                let top = o.gpr(6);
                assert_eq!(top, STACK0 - 6 * n);
                let w = |k: u64| if wide { o.r32(top + 4 * k) } else { o.r16(top + 2 * k) };
                let params = if wide { (0x2222_2222, 0x1111_1111) } else { (0x2222, 0x1111) };
                assert_eq!((w(2), w(3)), params);
                assert_eq!((w(1) & 0xffff, w(5) & 0xffff), (u64::from(USER32), u64::from(USER_DATA)));
                assert_eq!(w(4), (USTACK - 2 * n) & if wide { 0xffff_ffff } else { 0xffff });
                assert_eq!(o.gpr(3), u64::from(DATA0));
                if wide {
                    // Both stacks are released, and DS of level 0 has become null.
                    assert_eq!((o.gpr(7), o.gpr(1)), (USTACK, 0));
                }
            },
        );
    }
}

/// What a gate checks (SDM vol. 2, CALL).
#[test]
fn call_gate_checks() {
    // Gate, call or jump, what happens from CPL 3.
    for (raw, call, rpl, expect) in [
        (gate(CODE32, CODE, 12, 0), true, 3u16, Err((13u8, 0x58u64))),
        (gate(CODE32, CODE, 12, 2), true, 0, Err((13, 0x58))),
        (gate(CODE32, CODE, 12, 3) & !(0x80 << 40), true, 3, Err((11, 0x58))),
        (gate(CODE32, CODE, 12, 3), false, 3, Err((13, 0x18))),
        (gate(DATA0, CODE, 12, 3), true, 3, Err((13, 0x10))),
        (gate(0, CODE, 12, 3), true, 3, Err((13, 0))),
        (gate(0x60, CODE, 12, 3), true, 3, Err((11, 0x60))),
        (gate(CODE32, CODE, 12, 3), true, 3, Ok(0)),
        (gate(CODE32, CODE, 12, 3), true, 0, Ok(0)),
        // Conforming code through a gate stays at CPL 3, also by JMP.
        (gate(0x68, UCODE + 0x100, 12, 3), true, 3, Ok(3)),
        (gate(0x68, UCODE + 0x100, 12, 3), false, 3, Ok(3)),
        // Interrupt gates are no call gates.
        (gate(CODE32, CODE, 14, 3), true, 3, Err((13, 0x58))),
    ] {
        check(
            || {
                let mut m = Machine::flat32().user().code32(|a| far(a, call, FREE | rpl, 0));
                m.gdt(FREE, raw);
                m.gdt(0x60, descriptor(0, 0xfffff, 0xc01b));
                m.gdt(0x68, descriptor(0, 0xfffff, 0xc09f));
                m.gate_dpl(0x40, 3);
                for at in [CODE, UCODE + 0x100] {
                    m.asm(32, at, |a| a.int(0x40));
                }
                m
            },
            |o| match expect {
                Err((v, e)) => {
                    o.fault(v, e, UCODE);
                }
                Ok(cpl) => {
                    assert_eq!(o.vector(), Some(0x40), "{raw:#x}");
                    assert_eq!(o.frame32(false).cs & 3, cpl);
                }
            },
        );
    }
}

/// A 64-bit call gate: the frame has no parameters and a null SS (SDM vol. 3 §5.8.3.1).
#[test]
fn call_gate_64() {
    check(
        || {
            let mut m = Machine::long().user().code64(|a| {
                a.call(fword_ptr(UDATA))?;
                a.mov(edi, 5)?;
                a.int(0x40)
            });
            m.w32(UDATA, 0);
            m.w16(UDATA + 4, FREE | 3);
            m.gdt(FREE, gate(CODE64, CODE, 12, 3));
            m.gdt(0x60, 0);
            m.gate_dpl(0x40, 3);
            m.asm(64, CODE, |a| {
                a.mov(rsi, rsp)?;
                a.mov(ebx, ss)?;
                // The interrupt that ends the run gets another stack.
                a.mov(dword_ptr(TSS + 4), 0x9000)?;
                a.db(&[0x48, 0xcb])
            });
            m
        },
        |o| {
            assert_eq!(o.vector(), Some(0x40), "{}", o.engine);
            assert_eq!((o.gpr(6), o.gpr(3), o.gpr(7)), (STACK0 - 32, 0, 5));
            let top = o.gpr(6);
            let words = [0, 8, 16, 24].map(|k| o.r64(top + k));
            assert_eq!(words[1..], [u64::from(USER64), USTACK, u64::from(USER_DATA)]);
            assert_eq!(o.frame64(false).sp, USTACK);
        },
    );
}

/// RET far and IRET to an outer level: checks on CS and SS, and segments that become null.
#[test]
fn returns_to_an_outer_level() {
    for iret in [false, true] {
        for (code, stack, expect) in [
            (USER32, USER_DATA, Ok(())),
            (USER32, DATA0, Err((13u8, 0x10u64))),
            (USER32, 0, Err((13, 0))),
            (USER32, USER32, Err((13, 0x20))),
            (USER32, FREE | 3, Err((12, 0x58))),
            (0, USER_DATA, Err((13, 0))),
            (CODE32 | 3, USER_DATA, Err((13, 0x18))),
            (0x63, USER_DATA, Err((11, 0x60))),
            (USER_DATA, USER_DATA, Err((13, 0x28))),
            (0x203, USER_DATA, Err((13, 0x200))),
        ] {
            check(
                || {
                    let mut m = Machine::flat32().code32(|a| {
                        a.push(i32::from(stack))?;
                        a.push(USTACK as i32)?;
                        if iret {
                            a.push(0x3202)?;
                        }
                        a.push(i32::from(code))?;
                        a.push(UCODE as i32)?;
                        a.nop()?;
                        if iret { a.iretd() } else { a.retf() }
                    });
                    m.gdt(FREE, descriptor(0, 0xfffff, 0xc073));
                    m.gdt(0x60, descriptor(0, 0xfffff, 0xc07b));
                    m.gdt(0x70, descriptor(0, 0xfffff, 0xc09f));
                    m.s.gdtr.limit = 0x1ff;
                    m.s.seg[usize::from(seg::ES)] = m.segment(USER_DATA);
                    m.s.seg[usize::from(seg::FS)] = m.segment(0x70);
                    m.asm(32, UCODE, |a| {
                        a.mov(eax, ds)?;
                        a.mov(ebx, es)?;
                        a.mov(ecx, fs)?;
                        a.int(0x40)
                    });
                    m.gate_dpl(0x40, 3);
                    m
                },
                |o| match expect {
                    Err((v, e)) => {
                        let f = o.exception(v);
                        assert_eq!(f.error, Some(e), "{code:#x} {stack:#x}");
                        assert_eq!(f.cs, u64::from(CODE32));
                    }
                    Ok(()) => {
                        assert_eq!(o.vector(), Some(0x40));
                        // Data of level 0 is not for level 3; conforming code is.
                        assert_eq!((o.gpr(0), o.gpr(3), o.gpr(1)), (0, u64::from(USER_DATA), 0x70));
                        let f = o.frame32(false);
                        assert_eq!((f.cs, f.sp, f.ss), (u64::from(USER32), USTACK, u64::from(USER_DATA)));
                        if iret {
                            assert_eq!(f.flags & (flag::IF | flag::IOPL), flag::IF | flag::IOPL);
                        }
                    }
                },
            );
        }
    }
    // Not to an inner level.
    check(
        || {
            Machine::flat32().user().code32(|a| {
                a.push(i32::from(CODE32))?;
                a.push(CODE as i32)?;
                a.retf()
            })
        },
        |o| assert_eq!(o.exception(13).error, Some(0x18)),
    );
}

/// IRETQ in 64-bit mode always pops SS:RSP; null SS only for 64-bit code below level 3; NT is #GP; RF is loaded.
#[test]
fn iretq() {
    for (code, stack, flags, expect) in [
        (CODE64, DATA0, 2u64, Ok(())),
        (CODE64, 0, 2, Ok(())),
        (USER64, 3, 2, Err((13u8, 0u64))),
        (CODE64, 3, 2, Err((13, 0))),
        (CODE64, USER_DATA, 2, Err((13, 0x28))),
        (FREE, DATA0, 2, Err((13, 0x58))),
        (CODE64, DATA0, flag::NT | 2, Ok(())),
    ] {
        check(
            || {
                let mut m = Machine::long().code64(|a| {
                    a.push(i32::from(stack))?;
                    a.push(STACK as i32 - 0x1000)?;
                    a.push(flags as i32)?;
                    a.push(i32::from(code))?;
                    a.push(CODE as i32 + 0x100)?;
                    a.iretq()
                });
                m.gdt(FREE, descriptor(0, 0xfffff, 0xe09b));
                m.asm(64, CODE + 0x100, |a| a.int(0x40));
                m
            },
            |o| match expect {
                Err((v, e)) => assert_eq!(o.exception(v).error, Some(e), "{code:#x} {stack:#x}"),
                Ok(()) => {
                    assert_eq!(o.vector(), Some(0x40));
                    let f = o.frame64(false);
                    assert_eq!((f.sp, f.ss), (STACK - 0x1000, u64::from(stack)));
                }
            },
        );
    }
    // How much of RSP the new stack segment lets in, as seen on a processor.
    const ASKED: u64 = 0x1234_5678_0000_8000 - 0x1000;
    for (code, db, new) in [
        (CODE64, true, ASKED),
        (CODE64, false, ASKED),
        (CODE32, true, ASKED & 0xffff_ffff),
        (CODE32, false, 0x9_0000 | ASKED & 0xffff),
    ] {
        check(
            || {
                let mut m = Machine::long().code64(|a| {
                    a.mov(esp, 0x9_8000)?;
                    a.push(i32::from(FREE))?;
                    a.mov(rax, ASKED)?;
                    a.push(rax)?;
                    a.push(2)?;
                    a.push(i32::from(code))?;
                    a.push(CODE as i32 + 0x100)?;
                    a.iretq()
                });
                m.gdt(FREE, descriptor(0, 0xfffff, if db { 0xc093 } else { 0x8093 }));
                // HLT is the same in both modes.
                m.bytes(CODE + 0x100, &[0xf4]);
                m
            },
            |o| {
                o.halted();
                assert_eq!(o.gpr(gpr::RSP), new, "{}: {code:#x} {db}", o.engine);
            },
        );
    }
    check(
        || {
            Machine::long().flags(flag::NT).code64(|a| {
                a.sub(rsp, 40)?;
                a.iretq()
            })
        },
        |o| assert_eq!(o.exception(13).error, Some(0)),
    );
    // Non-canonical RIP: #GP(0) before anything changes.
    check(
        || {
            Machine::long().code64(|a| {
                a.push(i32::from(DATA0))?;
                a.push(STACK as i32)?;
                a.push(2)?;
                a.push(i32::from(CODE64))?;
                a.mov(rax, 1u64 << 47)?;
                a.push(rax)?;
                a.iretq()
            })
        },
        |o| {
            let f = o.exception(13);
            assert_eq!((f.error, f.sp), (Some(0), STACK - 40));
        },
    );
}

/// From 64-bit mode to compatibility mode and back by far returns.
#[test]
fn compatibility_mode() {
    check(
        || {
            let mut m = Machine::long().code64(|a| {
                a.mov(rax, 0x1_0000_0000u64)?;
                a.push(i32::from(CODE32))?;
                a.push(CODE as i32 + 0x100)?;
                a.db(&[0x48, 0xcb])
            });
            m.asm(32, CODE + 0x100, |a| {
                // DEC EAX is a REX prefix in 64-bit mode.
                a.dec(eax)?;
                a.mov(ebx, cs)?;
                a.push(i32::from(CODE64))?;
                a.push(CODE as i32 + 0x200)?;
                a.retf()
            });
            m.asm(64, CODE + 0x200, |a| {
                a.mov(rcx, 0x1122_3344_5566_7788u64)?;
                a.int(0x40)
            });
            m
        },
        |o| {
            assert_eq!(o.vector(), Some(0x40), "{}", o.engine);
            assert_eq!((o.gpr(0), o.gpr(3), o.gpr(1)), (0xffff_ffff, u64::from(CODE32), 0x1122_3344_5566_7788));
            assert_eq!(o.frame64(false).sp, STACK);
        },
    );
    // An interrupt from compatibility mode pushes a 64-bit frame.
    check(
        || {
            let mut m = Machine::long().user();
            m.s.seg[usize::from(seg::CS)] = m.segment(USER32);
            let mut m = m.code32(|a| {
                a.dec(eax)?;
                a.int(0x40)
            });
            m.gate_dpl(0x40, 3);
            m
        },
        |o| {
            let f = o.exception(0x40);
            assert_eq!((f.ip, f.cs, f.sp, f.ss), (UCODE + 3, u64::from(USER32), USTACK, u64::from(USER_DATA)));
            assert_eq!(o.gpr(gpr::RSP), STACK0 - 40);
        },
    );
}

/// IRET with a 16-bit operand, an interrupt through a 16-bit gate, and returns to a 16-bit stack.
#[test]
fn sixteen_bit_frames() {
    check(
        || {
            let mut m = Machine::flat32().interpreted().flags(flag::IF);
            m.s.rip = 0x5000;
            m.s.gpr[4] = 0xabcd_0800;
            m.s.seg[usize::from(seg::SS)] = m.segment(DATA16);
            m.gate32(0x41, CODE32, 0x5100, 6, 0);
            let mut m = m.code32(|a| {
                a.int(0x41)?;
                a.mov(edi, esp)?;
                a.pushfd()?;
                a.pop(esi)?;
                a.cli()?;
                a.hlt()
            });
            m.asm(32, 0x5100, |a| {
                a.mov(ebx, esp)?;
                a.mov(ebp, dword_ptr(0x7fc))?;
                a.db(&[0x66, 0xcf])
            });
            m
        },
        |o| {
            o.halted();
            // Three words, on a stack of which only SP counts.
            assert_eq!((o.gpr(3), o.gpr(7)), (0xabcd_07fa, 0xabcd_0800), "{}", o.engine);
            assert_eq!((o.r16(0x7fa), o.gpr(5) & 0xffff, o.gpr(5) >> 16 & flag::IF), (0x5002, CODE32.into(), flag::IF));
            assert_ne!(o.gpr(6) & flag::IF, 0);
        },
    );
    // To level 3 with a 16-bit stack: the upper half of ESP is not loaded.
    check(
        || {
            let mut m = Machine::flat32().code32(|a| {
                a.push(i32::from(FREE | 3))?;
                a.push(0x1234_0800)?;
                a.push(2)?;
                a.push(i32::from(USER32))?;
                a.push(UCODE as i32)?;
                a.iretd()
            });
            m.gdt(FREE, descriptor(UDATA as u32, 0xffff, 0xf3));
            m.gate_dpl(0x40, 3);
            m.asm(32, UCODE, |a| {
                a.push(0x77)?;
                a.int(0x40)
            });
            m
        },
        |o| {
            assert_eq!(o.vector(), Some(0x40));
            assert_eq!((o.frame32(false).sp & 0xffff, o.r32(UDATA + 0x7fc)), (0x7fc, 0x77));
        },
    );
}

/// An expand-down stack segment. #SS cannot be pushed below its limit either, so the CPU shuts down.
#[test]
fn expand_down_stack() {
    for (sp_value, ok) in [(0x2004u64, true), (0x2003, false), (0x2002, false)] {
        check(
            || {
                let mut m = Machine::flat32().interpreted().code32(|a| {
                    a.mov(eax, i32::from(FREE))?;
                    a.mov(ss, eax)?;
                    a.mov(esp, ebx)?;
                    a.push(0x55)?;
                    a.hlt()
                });
                // Valid from 2000h on.
                m.gdt(FREE, descriptor(DATA as u32, 0x1, 0xc097));
                m.s.gpr[3] = sp_value;
                m
            },
            |o| {
                if ok {
                    o.halted();
                    assert_eq!(o.r32(DATA + 0x2000), 0x55);
                } else {
                    o.shutdown();
                }
            },
        );
    }
}
