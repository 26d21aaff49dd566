//! Delivery of exceptions (SDM vol. 3 chapter 6): frames, return addresses, RF, nesting, stacks, DPL checks.

use diglot_translator::state::{cr, flag, gpr};
use iced_x86::code_asm::*;

use crate::machine::*;

type Body = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Where instruction `n` (counted from 0) of the machine's code starts.
fn offset_of(body: Body, bits: u32) -> u64 {
    let mut a = CodeAssembler::new(bits).unwrap();
    body(&mut a).unwrap();
    a.assemble(CODE).unwrap().len() as u64
}

/// Faults push the address of the instruction and RF=1; traps that of the next one and RF=0.
#[test]
fn fault_and_trap_frames() {
    let cases: [(u8, bool, Body); 7] = [
        (0, true, |a| a.div(ecx)),
        (6, true, |a| a.ud2()),
        (13, true, |a| a.mov(cr8, rbx)),
        (14, true, |a| a.mov(al, byte_ptr(UNMAPPED))),
        (3, false, |a| a.int3()),
        (0x80, false, |a| a.int(0x80)),
        (1, false, |a| a.db(&[0xf1])),
    ];
    for (vector, fault, body) in cases {
        check(
            || {
                let mut m = Machine::long().flags(flag::IF | flag::DF).code64(|a| {
                    a.mov(ebx, 16)?;
                    body(a)?;
                    a.hlt()
                });
                m.s.gpr[4] = STACK - 5;
                m
            },
            |o| {
                let f = o.exception(vector);
                let ip = CODE + 5 + if fault { 0 } else { offset_of(body, 64) };
                assert_eq!(f.ip, ip, "{}: vector {vector}", o.engine);
                assert_eq!(f.cs, u64::from(CODE64));
                // SDM vol. 3 §6.14.2: the frame is aligned, and SS:RSP pushed whatever the levels.
                assert_eq!((f.ss, f.sp), (u64::from(DATA0), STACK - 5));
                let top = o.gpr(gpr::RSP) + if has_error(vector) { 48 } else { 40 };
                assert_eq!(top, (STACK - 5) & !15);
                let rf = if fault { flag::RF } else { 0 };
                assert_eq!(f.flags & (flag::RF | flag::IF | flag::DF), rf | flag::IF | flag::DF);
                // Interrupt gates clear IF.
                assert_eq!(o.s.rflags & (flag::RF | flag::IF | flag::DF), flag::DF);
            },
        );
    }
}

/// The same frames at 32 bits, within one level.
#[test]
fn frames_32() {
    let cases: [(u8, bool, Body); 5] = [
        (0, true, |a| a.div(ecx)),
        (4, false, |a| a.into()),
        (5, true, |a| a.bound(ebx, qword_ptr(DATA as u32))),
        (3, false, |a| a.int3()),
        (0x21, false, |a| a.int(0x21)),
    ];
    for (vector, fault, body) in cases {
        check(
            || {
                let mut m = Machine::flat32().flags(flag::IF).code32(|a| {
                    a.mov(ebx, 16)?;
                    body(a)?;
                    a.hlt()
                });
                m.s.set_flags(flag::OF | flag::IF);
                m
            },
            |o| {
                let f = o.exception(vector);
                assert_eq!(f.ip, CODE + 5 + if fault { 0 } else { offset_of(body, 32) }, "{}: {vector}", o.engine);
                assert_eq!(f.cs, u64::from(CODE32));
                assert_eq!(o.gpr(gpr::RSP), STACK - 12);
                assert_eq!(f.flags & (flag::RF | flag::IF), flag::IF | if fault { flag::RF } else { 0 });
            },
        );
    }
}

/// SDM vol. 2, INT n: a software interrupt through a gate with DPL < CPL is #GP with the vector in the error code, at
/// the instruction itself; INT1 and exceptions do not check.
#[test]
fn software_interrupt_privilege() {
    let cases: [(u8, u64, bool, Body); 5] = [
        (0x30, 2, false, |a| a.int(0x30)),
        (3, 1, false, |a| a.int3()),
        (8, 2, false, |a| a.int(8)),
        (1, 1, true, |a| a.db(&[0xf1])),
        (6, 2, true, |a| a.ud2()),
    ];
    for (vector, len, allowed, body) in cases {
        for dpl in [0, 3] {
            check(
                || {
                    let mut m = Machine::long().user().code64(|a| {
                        a.nop()?;
                        body(a)
                    });
                    m.gate_dpl(vector, dpl);
                    m
                },
                |o| {
                    if dpl == 3 || allowed {
                        if vector == 8 {
                            // INT 8 pushes no error code.
                            assert_eq!(o.vector(), Some(8));
                            assert_eq!(o.frame64(false).ip, UCODE + 1 + len);
                            return;
                        }
                        let f = o.exception(vector);
                        assert_eq!(f.ip, UCODE + 1 + if vector == 6 { 0 } else { len });
                        assert_eq!((f.cs, f.ss, f.sp), (u64::from(USER64), u64::from(USER_DATA), USTACK));
                        assert_eq!(o.gpr(gpr::RSP), STACK0 - 40);
                        // SDM vol. 3 §6.14.4: SS is null with RPL = CPL after a change of level.
                        assert_eq!((o.s.seg[2].selector, o.s.cpl), (0, 0));
                    } else {
                        // Bit 1: the index is into the IDT; EXT is clear for software interrupts.
                        let f = o.fault(13, u64::from(vector) << 3 | 2, UCODE + 1);
                        assert_ne!(f.flags & flag::RF, 0);
                    }
                },
            );
        }
    }
}

/// Error codes of gates that cannot be used (SDM vol. 2, INT n; vol. 3 §6.13).
#[test]
fn bad_gates() {
    // The gate's low half, and the vector and error code that INT 40h and #UD then raise.
    let ud = 6u64 << 3 | 2;
    let int = 0x40u64 << 3 | 2;
    for (gate, vector, int_error, ud_error) in [
        (gate(CODE64, HANDLERS, 14, 0) & !(0x80 << 40), 11, int, ud | 1),
        (gate(CODE64, HANDLERS, 12, 0), 13, int, ud | 1),
        (gate(CODE64, HANDLERS, 5, 0), 13, int, ud | 1),
        (gate(0, HANDLERS, 14, 0), 13, 0, 1),
        (gate(0x100, HANDLERS, 14, 0), 13, 0x100, 0x101),
        (gate(DATA0, HANDLERS, 14, 0), 13, 0x10, 0x11),
        (gate(CODE32, HANDLERS, 14, 0), 13, 0x18, 0x19),
        (gate(USER64, HANDLERS, 14, 0), 13, 0x30, 0x31),
        (gate(FREE, HANDLERS, 14, 0), 11, 0x58, 0x59),
        (gate(FREE + 8, HANDLERS, 14, 0), 13, 0x60, 0x61),
    ] {
        for software in [true, false] {
            check(
                || {
                    let mut m = Machine::long().code64(|a| if software { a.int(0x40) } else { a.ud2() });
                    m.w64(IDT + 16 * if software { 0x40 } else { 6 }, gate);
                    m.w64(IDT + 16 * if software { 0x40 } else { 6 } + 8, 0);
                    m.gdt(FREE, descriptor(0, 0xfffff, 0xa01b));
                    m.gdt(0x100, 0);
                    m.s.gdtr.limit = 0xff;
                    m
                },
                |o| {
                    o.fault(vector, if software { int_error } else { ud_error }, CODE);
                },
            );
        }
    }
    // Beyond the IDT's limit.
    check(
        || {
            let mut m = Machine::long().code64(|a| a.int(0x40));
            m.s.idtr.limit = 0x40e;
            m
        },
        |o| {
            o.fault(13, int, CODE);
        },
    );
}

/// SDM vol. 3 table 6-5: which faults during delivery make a double fault, and which are delivered in turn.
#[test]
fn double_faults() {
    // #GP whose gate is not present: #NP during #GP is a double fault.
    for (first, body, second, double) in [
        // Contributory, then contributory.
        (13u8, (|a| a.mov(cr8, rbx)) as Body, 0u64, true),
        (0, |a| a.div(ecx), 0, true),
        // Page fault, then contributory.
        (14, |a| a.mov(al, byte_ptr(UNMAPPED)), 0, true),
        // Benign, then contributory: serial.
        (6, |a| a.ud2(), 0, false),
        (3, |a| a.int3(), 0, false),
    ] {
        check(
            || {
                let mut m = Machine::long().code64(|a| {
                    a.mov(ebx, 16)?;
                    body(a)?;
                    a.hlt()
                });
                m.w64(IDT + 16 * u64::from(first), second);
                m
            },
            |o| {
                if double {
                    let f = o.exception(8);
                    assert_eq!((f.error, f.ip), (Some(0), CODE + 5), "after {first}");
                } else {
                    let ext = u64::from(first != 3);
                    o.fault(13, u64::from(first) << 3 | 2 | ext, CODE + 5);
                }
            },
        );
    }
    // A double fault that cannot be delivered: shutdown.
    check(
        || {
            let mut m = Machine::long().code64(|a| a.div(ecx));
            m.w64(IDT, 0);
            m.w64(IDT + 16 * 8, 0);
            m
        },
        Outcome::shutdown,
    );
    // An IDT that cannot be read: page fault, double fault, shutdown; CR2 follows each page fault.
    check(
        || {
            let mut m = Machine::long().code64(|a| a.ud2());
            m.s.idtr.base = UNMAPPED;
            m
        },
        |o| {
            o.shutdown();
            assert_eq!(o.s.cr2, UNMAPPED + 16 * 8);
        },
    );
    // A contributory exception, then a page fault: serial (the stack of the #GP frame is not there).
    check(
        || {
            let mut m = Machine::long().code64(|a| {
                a.mov(rsp, UNMAPPED + 0x800)?;
                a.mov(cr8, rsp)
            });
            m.gate64(14, HANDLERS + 16 * 14, 14, 0, 1);
            m
        },
        |o| {
            let f = o.exception(14);
            assert_eq!((f.error, f.ip & !15), (Some(2), CODE));
            assert_eq!(o.s.cr2 & !0xfff, UNMAPPED);
        },
    );
    // Page fault during a page fault: double fault, and CR2 has the second address (SDM vol. 3 §6.15, interrupt 14).
    check(
        || {
            let mut m = Machine::long().code64(|a| {
                a.mov(rsp, UNMAPPED + 0x800)?;
                a.mov(al, byte_ptr(UNMAPPED + 0x10_0000))
            });
            m.gate64(8, HANDLERS + 16 * 8, 14, 0, 1);
            m
        },
        |o| {
            assert_eq!(o.exception(8).error, Some(0));
            assert_eq!(o.s.cr2 & !0xfff, UNMAPPED);
        },
    );
}

/// A guest's own INT 8 that cannot be delivered is no double fault.
#[test]
fn int_8_is_not_a_double_fault() {
    check(
        || {
            let mut m = Machine::long().user().code64(|a| a.int(8));
            m.w64(IDT + 16 * 8, 0);
            m
        },
        |o| {
            o.fault(13, 8 << 3 | 2, UCODE);
        },
    );
}

/// Stacks: the IST is used at any level; a stack pointer in the TSS that is not canonical is #SS, one beyond the limit
/// #TS with TR's selector.
#[test]
fn interrupt_stacks() {
    check(
        || {
            let mut m = Machine::long().code64(|a| a.int(0x40));
            m.gate64(0x40, HANDLERS + 16 * 0x40, 15, 0, 1);
            m.flags(flag::IF)
        },
        |o| {
            let f = o.exception(0x40);
            assert_eq!((f.sp, o.gpr(gpr::RSP)), (STACK, IST1 - 40));
            // A trap gate leaves IF.
            assert_ne!(o.s.rflags & flag::IF, 0);
        },
    );
    for (rsp0, limit, vector, error) in [(1u64 << 47, 0x67u32, 12, 0), (STACK0, 0xa, 10, 0x38)] {
        check(
            || {
                let mut m = Machine::long().user().code64(|a| a.int(0x40));
                m.gate_dpl(0x40, 3);
                m.w64(TSS + 4, rsp0);
                m.s.tr.limit = limit;
                // Without a stack the second exception cannot be delivered either, except by the IST.
                m.gate64(12, HANDLERS + 16 * 12, 14, 0, 1);
                m
            },
            |o| {
                if vector == 12 {
                    o.fault(12, error, UCODE);
                } else {
                    // #TS needs the same stack, and so does the double fault.
                    o.shutdown();
                }
            },
        );
    }
}

/// Exceptions from CPL 3 at 32 bits: SS0:ESP0, and every field of the frame.
#[test]
fn inner_stack_32() {
    check(
        || {
            let mut m = Machine::flat32().user().code32(|a| a.int(0x40));
            m.gate_dpl(0x40, 3);
            m
        },
        |o| {
            let f = o.exception(0x40);
            assert_eq!((f.ip, f.cs, f.sp, f.ss), (UCODE + 2, u64::from(USER32), USTACK, u64::from(USER_DATA)));
            assert_eq!(o.gpr(gpr::RSP), STACK0 - 20);
            assert_eq!((o.s.cpl, o.s.seg[2].selector, o.s.seg[1].selector), (0, DATA0, CODE32));
        },
    );
    // SS0 null, of the wrong level, of the wrong type, not present (SDM vol. 2, INT n: #TS, #SS with the selector).
    for (ss0, vector, error) in
        [(0u16, 10u8, 0u64), (USER_DATA, 10, 0x28), (CODE32, 10, 0x18), (FREE, 12, 0x58), (0x200, 10, 0x200)]
    {
        check(
            || {
                let mut m = Machine::flat32().user().code32(|a| a.int(0x40));
                m.gate_dpl(0x40, 3);
                m.w16(TSS + 8, ss0);
                m.gdt(FREE, descriptor(0, 0xfffff, 0xc013));
                m.s.gdtr.limit = 0x1ff;
                // The handlers of both run at CPL 3, in conforming code, and need no other stack.
                m.gdt(0x60, descriptor(0, 0xfffff, 0xc09f));
                for v in [10, 12] {
                    m.asm(32, UCODE + 0x100 + 0x10 * v, |a| {
                        a.pop(edi)?;
                        a.mov(dword_ptr(UDATA as u32), edi)?;
                        a.int(0x41)
                    });
                    m.gate32(v as u8, 0x60, UCODE + 0x100 + 0x10 * v, 14, 0);
                }
                m.w16(TSS + 8, ss0);
                m
            },
            |o| {
                // INT 41h is #GP there, whose delivery fails for the same reason: what counts is what was pushed.
                assert_eq!(o.r32(UDATA), error, "{}: ss0 {ss0:#x} vector {vector}", o.engine);
            },
        );
    }
}

/// A handler in conforming code runs at the level it interrupted, on that level's stack.
#[test]
fn conforming_handler() {
    for long in [true, false] {
        check(
            || {
                let m = if long { Machine::long() } else { Machine::flat32() };
                let mut m = m.user();
                m.asm(if long { 64 } else { 32 }, UCODE, |a| a.int(0x41));
                m.gdt(FREE, descriptor(0, 0xfffff, if long { 0xa09f } else { 0xc09f }));
                let at = UCODE + 0x100;
                if long {
                    m.w64(IDT + 16 * 0x41, gate(FREE, at, 14, 3));
                } else {
                    m.gate32(0x41, FREE, at, 14, 3);
                }
                m.asm(if long { 64 } else { 32 }, at, |a| {
                    a.mov(ebx, cs)?;
                    a.int(0x40)
                });
                m.gate_dpl(0x40, 3);
                m
            },
            |o| {
                assert_eq!(o.vector(), Some(0x40), "{}", o.engine);
                assert_eq!(o.gpr(3), u64::from(FREE | 3));
                let f = if long { o.frame64(false) } else { o.frame32(false) };
                assert_eq!((f.cs, f.sp), (u64::from(FREE | 3), USTACK - if long { 40 } else { 12 }));
            },
        );
    }
}

/// The frame is pushed at the new level: a fault on it is a supervisor write, and the old state is what it interrupts.
#[test]
fn kernel_stack_not_present() {
    check(
        || {
            let mut m = Machine::long().user().code64(|a| {
                a.nop()?;
                a.int(0x41)
            });
            m.gate_dpl(0x41, 3);
            m.w64(TSS + 4, DATA + 0x1000);
            m.pte(DATA, 0);
            m.gate64(14, HANDLERS + 16 * 14, 14, 0, 1);
            m
        },
        |o| {
            let f = o.fault(14, 2, UCODE + 1);
            assert_eq!((f.cs, f.ss, f.sp), (u64::from(USER64), u64::from(USER_DATA), USTACK));
            assert_eq!(o.s.cr2, DATA + 0x1000 - 40);
        },
    );
}

/// #AC: alignment checks at CPL 3 with CR0.AM and RFLAGS.AC (SDM vol. 3 §6.15, interrupt 17).
#[test]
fn alignment_check() {
    let cases: [(u64, Body, bool); 12] = [
        (1, |a| a.mov(al, byte_ptr(rbx)), false),
        (1, |a| a.mov(ax, word_ptr(rbx)), true),
        (2, |a| a.mov(ax, word_ptr(rbx)), false),
        (2, |a| a.mov(eax, dword_ptr(rbx)), true),
        (4, |a| a.mov(dword_ptr(rbx), eax), false),
        (4, |a| a.mov(qword_ptr(rbx), rax), true),
        (6, |a| a.add(dword_ptr(rbx), eax), true),
        (8, |a| a.add(qword_ptr(rbx), rax), false),
        (4, |a| a.lea(rax, rbx + 1), false),
        (3, |a| a.lock().inc(byte_ptr(rbx)), false),
        (1, |a| a.movsw(), true),
        (0, |a| a.movsq(), false),
    ];
    for (offset, body, faults) in cases {
        for (user, am, ac) in [(true, true, true), (true, false, true), (true, true, false), (false, true, true)] {
            check(
                || {
                    let m = Machine::long();
                    let m = if user { m.user() } else { m };
                    let mut m = m.flags(if ac { flag::AC } else { 0 }).code64(|a| {
                        body(a)?;
                        body(a)?;
                        a.int(0x40)
                    });
                    m.s.cr0 |= if am { cr::CR0_AM } else { 0 };
                    m.s.gpr[3] = UDATA + offset;
                    m.s.gpr[6] = UDATA + offset;
                    m.s.gpr[7] = UDATA + 0x100;
                    m.gate_dpl(0x40, 3);
                    m
                },
                |o| {
                    if faults && user && am && ac {
                        o.fault(17, 0, UCODE);
                    } else {
                        assert_eq!(o.vector(), Some(0x40), "{}: {offset}", o.engine);
                    }
                },
            );
        }
    }
    // AC set by POPF counts for the very next access, and the handler of level 0 is not checked.
    check(
        || {
            let mut m = Machine::long().user().code64(|a| {
                a.mov(eax, dword_ptr(rbx))?;
                a.push(0x4_0002)?;
                a.popfq()?;
                a.mov(eax, dword_ptr(rbx))?;
                a.hlt()
            });
            m.s.cr0 |= cr::CR0_AM;
            m.s.gpr[3] = UDATA + 1;
            m
        },
        |o| {
            o.fault(17, 0, UCODE + 2 + 5 + 1);
        },
    );
}
