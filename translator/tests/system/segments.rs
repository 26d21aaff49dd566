//! Segmentation in protected mode (SDM vol. 3 chapters 3 and 5): loads, limits, types, and the instructions that ask
//! about descriptors.

use diglot_translator::state::{flag, gpr, seg};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::machine::*;

type Body = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// A data segment at `DATA` of 4 KiB.
const SMALL: u64 = descriptor_const(DATA, 0xfff, 0x4093);

const fn descriptor_const(base: u64, limit: u64, attr: u64) -> u64 {
    limit & 0xffff | (base & 0xff_ffff) << 16 | attr << 40 | (limit >> 16 & 15) << 48 | (base >> 24) << 56
}

fn with_attr(attr: u64) -> u64 {
    descriptor_const(DATA, 0xfff, attr)
}

/// Loads of data segment registers: vectors and error codes (SDM vol. 2, MOV).
#[test]
fn loads() {
    let load: Body = |a| a.mov(es, eax);
    let load_ss: Body = |a| a.mov(ss, eax);
    let ok = None;
    let gp = |e| Some((13u8, e));
    for (user, raw, selector, body, error) in [
        (false, SMALL, 0u64, load, ok),
        (false, SMALL, 3, load, ok),
        (false, SMALL, 0x58, load, ok),
        (true, SMALL, 0x58, load, gp(0x58)),
        (false, SMALL, 0x5b, load, gp(0x58)),
        (true, with_attr(0x40f3), 0x58, load, ok),
        (true, with_attr(0x40f3), 0x5b, load, ok),
        (true, with_attr(0x40d3), 0x58, load, gp(0x58)),
        (false, with_attr(0x4091), 0x58, load, ok),
        // Code: readable, execute-only, conforming.
        (false, with_attr(0x409b), 0x58, load, ok),
        (false, with_attr(0x4099), 0x58, load, gp(0x58)),
        (true, with_attr(0x409b), 0x58, load, gp(0x58)),
        (true, with_attr(0x409f), 0x5b, load, ok),
        // System descriptors; not present.
        (false, with_attr(0x89), 0x58, load, gp(0x58)),
        (false, with_attr(0x4013), 0x58, load, Some((11, 0x58))),
        // Beyond the table; in an LDT that is not there.
        (false, SMALL, 0x200, load, gp(0x200)),
        (false, SMALL, 0x5c, load, gp(0x5c)),
        // SS.
        (false, SMALL, 0, load_ss, gp(0)),
        (false, SMALL, 0x58, load_ss, ok),
        (false, SMALL, 0x5b, load_ss, gp(0x58)),
        (false, with_attr(0x4091), 0x58, load_ss, gp(0x58)),
        (false, with_attr(0x409b), 0x58, load_ss, gp(0x58)),
        (false, with_attr(0x40f3), 0x58, load_ss, gp(0x58)),
        (false, with_attr(0x4013), 0x58, load_ss, Some((12, 0x58))),
        (true, with_attr(0x40f3), 0x5b, load_ss, ok),
        (true, with_attr(0x4073), 0x5b, load_ss, Some((12, 0x58))),
    ] {
        check(
            || {
                let m = Machine::flat32();
                let m = if user { m.user() } else { m };
                let mut m = m.code32(|a| {
                    body(a)?;
                    a.mov(ecx, ss)?;
                    a.mov(edx, es)?;
                    a.mov(eax, i32::from(if user { USER_DATA } else { DATA0 }))?;
                    a.mov(ss, eax)?;
                    a.int(0x40)
                });
                m.gate_dpl(0x40, 3);
                m.s.gdtr.limit = 0x1ff;
                m.gdt(FREE, raw & !(1 << 40));
                m.s.gpr[0] = selector;
                m
            },
            |o| match error {
                Some((v, e)) => {
                    o.fault(v, e, if user { UCODE } else { CODE });
                    // The accessed bit is set only by a load that succeeds.
                    assert_eq!(o.r64(GDT + u64::from(FREE)), raw & !(1 << 40));
                }
                None => {
                    assert_eq!(o.vector(), Some(0x40), "{raw:#x} {selector:#x}");
                    let used = selector & !3 == u64::from(FREE);
                    assert_eq!(o.r64(GDT + u64::from(FREE)) >> 40 & 1, u64::from(used));
                }
            },
        );
    }
}

/// Accesses against limit and type (SDM vol. 3 §5.3, §5.5).
#[test]
fn accesses() {
    let read: Body = |a| a.mov(ecx, dword_ptr(ebx).es());
    let write: Body = |a| a.mov(dword_ptr(ebx).es(), ecx);
    let rmw: Body = |a| a.add(dword_ptr(ebx).es(), 1);
    let string: Body = |a| a.stosd();
    let down32 = descriptor_const(0, 0x18_0fff >> 12, 0xc097);
    let down16 = descriptor_const(DATA, 0xfff, 0x97);
    for (raw, at, body, ok) in [
        (SMALL, 0xffcu64, read, true),
        (SMALL, 0xffd, read, false),
        (SMALL, 0xffc, write, true),
        (SMALL, 0x1000, write, false),
        (SMALL, 0xffff_ffff, read, false),
        (SMALL, 0xffd, string, false),
        (SMALL, 0xffc, string, true),
        (with_attr(0x4091), 0, read, true),
        (with_attr(0x4091), 0, write, false),
        (with_attr(0x4091), 0, rmw, false),
        (with_attr(0x4091), 0, string, false),
        (with_attr(0x409b), 0, read, true),
        (with_attr(0x409b), 0, write, false),
        // Expand-down, 32 bits: above the limit, to the top.
        (down32, DATA + 0xfff, read, false),
        (down32, DATA + 0x1000, read, true),
        (down32, DATA + 0xffe, write, false),
        // 16 bits: the top is FFFFh.
        (down16, 0xfff, read, false),
        (down16, 0x1000, read, true),
        (down16, 0xfffc, read, true),
        (down16, 0xfffd, read, false),
        (down16, 0x1_0000, read, false),
        (0, 0, read, false),
        (0, 0, write, false),
    ] {
        check(
            || {
                let mut m = Machine::flat32().interpreted().code32(|a| {
                    a.mov(es, eax)?;
                    body(a)?;
                    a.hlt()
                });
                m.gdt(FREE, raw);
                m.s.gpr[0] = if raw == 0 { 0 } else { u64::from(FREE) };
                m.s.gpr[3] = at;
                m.s.gpr[7] = at;
                m
            },
            |o| {
                if ok {
                    o.halted();
                } else {
                    o.fault(13, 0, CODE + 2);
                }
            },
        );
    }
}

/// Through SS it is #SS(0), and nothing of a PUSH or CALL is done.
#[test]
fn stack_limit() {
    let push: Body = |a| a.push(ecx);
    let pop: Body = |a| a.pop(ecx);
    let call: Body = |a| a.call(CODE);
    let ebp_based: Body = |a| a.mov(ecx, dword_ptr(ebp));
    let pusha: Body = |a| a.pushad();
    for (esp_, body) in
        [(0x1004u64, push), (0x1001, push), (0xffd, pop), (0x1004, call), (0, ebp_based), (0x101c, pusha)]
    {
        check(
            || {
                let mut m = Machine::flat32().interpreted().code32(|a| {
                    a.mov(ss, eax)?;
                    a.mov(esp, ebx)?;
                    body(a)?;
                    a.hlt()
                });
                m.gdt(FREE, SMALL);
                // #SS needs a stack that works: a task of its own has one.
                m.gdt(0x60, descriptor(TSS as u32 + 0x100, 0x67, 0x89));
                let t = TSS + 0x100;
                for (at, v) in
                    [(0x20, CODE + 0x200), (0x24, 2), (0x38, STACK), (0x4c, 0x18), (0x50, 0x10), (0x54, 0x10)]
                {
                    m.w32(t + at, v as u32);
                }
                m.asm(32, CODE + 0x200, |a| a.hlt());
                m.gate32(12, 0x60, 0, 5, 0);
                m.s.gpr[0] = u64::from(FREE);
                m.s.gpr[3] = esp_;
                m.s.gpr[5] = 0x2000;
                m
            },
            |o| {
                assert_eq!(o.s.rip, CODE + 0x201, "{}: {esp_:#x}", o.engine);
                assert_eq!(o.r32(o.gpr(gpr::RSP)), 0);
                assert_eq!((o.r32(TSS + 0x20), o.r32(TSS + 0x38)), (CODE + 4, esp_));
            },
        );
    }
}

/// CS: execute-only code cannot be read, and no code can be written, flat or not.
#[test]
fn code_segment_accesses() {
    for (attr, write, ok) in [(0xc09bu64, false, true), (0xc09b, true, false), (0xc099, false, false)] {
        check(
            || {
                let mut m = Machine::flat32().interpreted().code32(|a| {
                    if write {
                        a.mov(dword_ptr(ebx).cs(), eax)?
                    } else {
                        a.mov(eax, dword_ptr(ebx).cs())?
                    }
                    a.hlt()
                });
                m.s.seg[usize::from(seg::CS)].attr = attr as u32;
                m.s.gpr[3] = DATA;
                m
            },
            |o| {
                if ok {
                    o.halted();
                } else {
                    o.fault(13, 0, CODE);
                }
            },
        );
    }
    // Fetching and jumping beyond the limit.
    check(
        || {
            let mut m = Machine::flat32().interpreted().code32(|a| {
                a.nop()?;
                a.jmp(CODE + 0x1000)
            });
            m.s.seg[usize::from(seg::CS)].limit = CODE as u32 + 0xfff;
            m
        },
        |o| {
            o.fault(13, 0, CODE + 1);
        },
    );
    check(
        || {
            let mut m = Machine::flat32().interpreted().code32(|a| {
                a.nop()?;
                a.mov(eax, 5)
            });
            m.s.seg[usize::from(seg::CS)].limit = CODE as u32 + 3;
            m
        },
        |o| {
            o.fault(13, 0, CODE + 1);
        },
    );
}

/// LAR, LSL, VERR, VERW, ARPL (SDM vol. 2).
#[test]
fn descriptor_questions() {
    for (raw, selector, user, lar, lsl, verr, verw) in [
        (SMALL, 0x58u64, false, Some(0x40_9300u64), Some(0xfffu64), true, true),
        (SMALL, 0x5b, false, None, None, false, false),
        (SMALL, 0x58, true, None, None, false, false),
        (with_attr(0x4091), 0x58, false, Some(0x40_9100), Some(0xfff), true, false),
        (with_attr(0x4099), 0x58, false, Some(0x40_9900), Some(0xfff), false, false),
        (with_attr(0x409b), 0x58, false, Some(0x40_9b00), Some(0xfff), true, false),
        (with_attr(0x409f), 0x5b, true, Some(0x40_9f00), Some(0xfff), true, false),
        (descriptor_const(0, 0xfffff, 0xc093), 0x58, false, Some(0xc0_9300), Some(0xffff_ffff), true, true),
        (with_attr(0x89), 0x58, false, Some(0x8900), Some(0xfff), false, false),
        (with_attr(0x82), 0x58, false, Some(0x8200), Some(0xfff), false, false),
        (with_attr(0x8c), 0x58, false, Some(0x8c00), None, false, false),
        (with_attr(0x85), 0x58, false, Some(0x8500), None, false, false),
        (with_attr(0x8e), 0x58, false, None, None, false, false),
        (with_attr(0x80), 0x58, false, None, None, false, false),
        (SMALL, 0, false, None, None, false, false),
        (SMALL, 0x200, false, None, None, false, false),
    ] {
        check(
            || {
                let m = Machine::flat32();
                let m = if user { m.user() } else { m };
                let mut m = m.code32(|a| {
                    a.mov(ebx, -1)?;
                    a.mov(ecx, -1)?;
                    a.xor(edi, edi)?;
                    a.lar(ebx, eax)?;
                    a.setz(dl)?;
                    a.lsl(ecx, eax)?;
                    a.setz(dh)?;
                    a.verr(ax)?;
                    a.setz(byte_ptr(UDATA as u32))?;
                    a.verw(ax)?;
                    a.setz(byte_ptr(UDATA as u32 + 1))?;
                    a.int(0x40)
                });
                m.gate_dpl(0x40, 3);
                m.s.gdtr.limit = 0x1ff;
                m.gdt(FREE, raw);
                m.s.gpr[0] = selector;
                m
            },
            |o| {
                assert_eq!(o.vector(), Some(0x40));
                let rights = o.gpr(3) & !0xf_0000;
                let what = format!("{}: {raw:#x} {selector:#x}", o.engine);
                assert_eq!((o.gpr(2) & 1 == 1).then_some(rights), lar, "LAR {what}");
                assert_eq!((o.gpr(2) >> 8 & 1 == 1).then_some(o.gpr(1)), lsl, "LSL {what}");
                assert_eq!((o.r8(UDATA) == 1, o.r8(UDATA + 1) == 1), (verr, verw), "VERR, VERW {what}");
            },
        );
    }
    check(
        || {
            Machine::flat32().code32(|a| {
                a.mov(eax, 0x58)?;
                a.mov(ebx, 0x1b)?;
                a.arpl(ax, bx)?;
                a.setz(cl)?;
                a.arpl(ax, bx)?;
                a.setz(ch)?;
                a.hlt()
            })
        },
        |o| {
            o.halted();
            assert_eq!((o.gpr(0), o.gpr(1)), (0x5b, 1));
        },
    );
}

/// LLDT and LTR (SDM vol. 2).
#[test]
fn system_segments() {
    let lldt: Body = |a| a.lldt(ax);
    let ltr: Body = |a| a.ltr(ax);
    for (raw, selector, body, error) in [
        (with_attr(0x82), 0x58u64, lldt, None),
        (with_attr(0x02), 0x58, lldt, Some((11u8, 0x58u64))),
        (with_attr(0x89), 0x58, lldt, Some((13, 0x58))),
        (SMALL, 0x58, lldt, Some((13, 0x58))),
        (with_attr(0x82), 0x5c, lldt, Some((13, 0x5c))),
        (with_attr(0x82), 0, lldt, None),
        (with_attr(0x89), 0x58, ltr, None),
        (with_attr(0x81), 0x58, ltr, None),
        (with_attr(0x8b), 0x58, ltr, Some((13, 0x58))),
        (with_attr(0x09), 0x58, ltr, Some((11, 0x58))),
        (with_attr(0x89), 0, ltr, Some((13, 0))),
    ] {
        check(
            || {
                let mut m = Machine::flat32().code32(|a| {
                    body(a)?;
                    a.str(ebx)?;
                    a.sldt(ecx)?;
                    a.hlt()
                });
                m.gdt(FREE, raw);
                m.s.gpr[0] = selector;
                m
            },
            |o| match error {
                Some((v, e)) => {
                    o.fault(v, e, CODE);
                }
                None => {
                    o.halted();
                    let got = if raw >> 40 & 15 == 2 { o.gpr(1) } else { o.gpr(3) };
                    assert_eq!(got & 0xffff, selector);
                    if raw >> 40 & 15 != 2 {
                        // Busy now.
                        assert_eq!(o.r64(GDT + 0x58) >> 40 & 2, 2);
                    }
                }
            },
        );
    }
    // Selectors of the LDT.
    check(
        || {
            let mut m = Machine::flat32().code32(|a| {
                a.mov(eax, 0x58)?;
                a.lldt(ax)?;
                a.mov(eax, 0xc)?;
                a.mov(es, eax)?;
                a.mov(ebx, dword_ptr(0).es())?;
                a.mov(eax, 0x14)?;
                a.mov(es, eax)?;
                a.hlt()
            });
            m.gdt(FREE, descriptor(DATA as u32 + 0x1000, 0xf, 0x82));
            m.w64(DATA + 0x1008, SMALL);
            m.w32(DATA, 99);
            m
        },
        |o| {
            assert_eq!(o.exception(13).error, Some(0x14));
            assert_eq!(o.gpr(3), 99);
        },
    );
}

/// An IN or OUT with CPL > IOPL asks the I/O permission bitmap of the TSS (SDM vol. 1 §19.5.2).
#[test]
fn io_permission() {
    for (iopl, port, size, limit, ok) in [
        (3u64, 0x100u32, 1, 0x67u32, true),
        (2, 0x100, 1, 0x67, false),
        (0, 0x300, 1, 0x67 + 0x81, true),
        (0, 0x301, 1, 0x67 + 0x81, false),
        (0, 0x300, 2, 0x67 + 0x81, false),
        (0, 0x302, 4, 0x67 + 0x81, true),
        // A word that straddles two bytes of the bitmap.
        (0, 0x307, 2, 0x67 + 0x81, true),
        // The second byte must lie inside the limit.
        (0, 0x3f8, 1, 0x67 + 0x81, true),
        (0, 0x3f8, 1, 0x67 + 0x80, false),
    ] {
        check(
            || {
                let mut m = Machine::flat32().user().flags(iopl << 12).code32(|a| {
                    a.mov(edx, port)?;
                    match size {
                        1 => a.in_(al, dx)?,
                        2 => a.in_(ax, dx)?,
                        _ => a.in_(eax, dx)?,
                    }
                    a.int(0x40)
                });
                m.gate_dpl(0x40, 3);
                m.s.tr.limit = limit;
                m.w8(TSS + 0x68 + 0x60, 2);
                m.w8(TSS + 0x68 + 0x80, 0xff);
                m
            },
            |o| {
                if ok {
                    assert_eq!(o.vector(), Some(0x40), "{port:#x} {size}");
                } else {
                    o.fault(13, 0, UCODE + 5);
                }
                assert_eq!(o.board.lock().unwrap().ports.len(), usize::from(ok));
            },
        );
    }
}

/// CLI and STI by IOPL at 32 bits.
#[test]
fn interrupt_flag() {
    for (iopl, body, ok) in
        [(0u64, (|a| a.cli()) as Body, false), (3, |a| a.cli(), true), (2, |a| a.sti(), false), (3, |a| a.sti(), true)]
    {
        check(
            || {
                let mut m = Machine::flat32().user().flags(iopl << 12).code32(|a| {
                    body(a)?;
                    a.int(0x40)
                });
                m.gate_dpl(0x40, 3);
                m
            },
            |o| {
                if ok {
                    assert_eq!(o.vector(), Some(0x40));
                } else {
                    assert_eq!(o.fault(13, 0, UCODE).flags & flag::IOPL, iopl << 12);
                }
            },
        );
    }
}

/// One page of code through two segments of different limits: each has its own.
#[test]
fn code_limit_of_known_code() {
    check(
        || {
            let mut m = Machine::flat32().interpreted().code32(|a| {
                for selector in [0x58, 0x58, 0x60] {
                    a.db(&[0x9a, 0, 0, 0, 0, selector, 0])?;
                }
                a.hlt()
            });
            m.gdt(FREE, descriptor(DATA as u32, 0xfff, 0x409b));
            m.gdt(0x60, descriptor(DATA as u32, 3, 0x409b));
            // The RETF at 4 is outside the second segment.
            m.bytes(DATA, &[0x90, 0x90, 0x90, 0x90, 0xcb]);
            m
        },
        |o| {
            assert_eq!(o.fault(13, 0, 4).cs, 0x60);
        },
    );
}

/// 16-bit code runs on past offset FFFFh, to #GP beyond the limit or on in a larger segment; branches wrap. As seen on a
/// processor.
#[test]
fn past_64_kib_of_16_bit_code() {
    const END: u64 = CODE + 0x1_0000;
    let guest = |limit: u32, at: u64, code: &[u8]| {
        let mut m = Machine::flat32().interpreted();
        m.gdt(FREE, descriptor(CODE as u32, limit, 0x9b));
        m.s.seg[usize::from(seg::CS)] = m.segment(FREE);
        m.s.rip = at - CODE;
        // HLT wherever else it may come to.
        m.bytes(CODE, &[0xf4; 0x40]);
        m.bytes(END, &[0xf4; 0x40]);
        m.bytes(at, code);
        m
    };
    // INC AX; NOP up to the end.
    let runs_on: &[u8] = &[0x40, 0x90];
    check(
        || guest(0xffff, END - 2, runs_on),
        |o| {
            assert_eq!(o.gpr(0), 1);
            o.fault(13, 0, 0x1_0000);
        },
    );
    check(
        || guest(0x1_ffff, END - 2, runs_on),
        |o| {
            o.halted();
            assert_eq!((o.gpr(0), o.s.rip), (1, 0x1_0001));
        },
    );
    // MOV AX, 1234h across the end.
    let crossing: &[u8] = &[0xb8, 0x34, 0x12];
    check(|| guest(0xffff, END - 1, crossing), |o| _ = o.fault(13, 0, 0xffff));
    check(
        || guest(0x1_ffff, END - 1, crossing),
        |o| {
            o.halted();
            assert_eq!((o.gpr(0), o.s.rip), (0x1234, 0x1_0003));
        },
    );
    // JMP short +16; with a 32-bit operand size it goes beyond.
    for (code, ip) in [(&[0xeb, 0x10][..], 0x11), (&[0x66, 0xeb, 0x10], 0x1_0011)] {
        check(
            || guest(0x1_ffff, END - code.len() as u64, code),
            |o| {
                o.halted();
                assert_eq!(o.s.rip, ip);
            },
        );
    }
}
