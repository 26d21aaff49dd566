//! Virtual-8086 mode (SDM vol. 3 chapter 20), without VME.

use diglot_translator::state::{flag, gpr};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::machine::*;

type Body = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Where VM86 code runs: segment 2000h of a user page is 20000h; the tables are elsewhere here.
const SEG: u64 = 0x5000;
const AT: u64 = SEG << 4;

/// A monitor that enters VM86 mode at `SEG:0` with the given IOPL; `code` runs there.
fn machine(iopl: u64, code: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>) -> Machine {
    let mut m = Machine::flat32().interpreted().code32(|a| {
        for v in [0x5003, 0x5002, 0x5001, SEG as i32 + 4, 0x5004, 0x800] {
            a.push(v)?;
        }
        a.push((flag::VM | iopl << 12 | 2) as i32)?;
        a.push(SEG as i32)?;
        a.push(0)?;
        a.iretd()
    });
    m.asm(16, AT, |a| code(a));
    m
}

/// The words of a frame pushed from VM86 mode: EIP, CS, EFLAGS, ESP, SS, ES, DS, FS, GS.
fn frame(o: &Outcome, error: bool) -> [u64; 9] {
    let top = o.gpr(gpr::RSP) + if error { 4 } else { 0 };
    std::array::from_fn(|k| o.r32(top + 4 * k as u64))
}

/// IRETD with VM set loads nine words; an exception saves them all and nulls the data segments.
#[test]
fn enter_and_leave() {
    check(
        || {
            machine(0, |a| {
                a.mov(word_ptr(0x10), 0x1234)?;
                a.push(0x77)?;
                a.ud2()
            })
        },
        |o| {
            assert_eq!(o.vector(), Some(6), "{}", o.engine);
            let f = frame(o, false);
            let ip = f[0];
            assert_eq!(ip, 6 + 2);
            assert_eq!([f[1], f[3], f[4]], [SEG, 0x7fe, 0x5004]);
            assert_eq!(f[5..], [SEG + 4, 0x5001, 0x5002, 0x5003]);
            assert_eq!(f[2] & (flag::VM | flag::RF), flag::VM | flag::RF);
            assert_eq!(o.r16(0x5_0010 + 0x10), 0x1234);
            assert_eq!(o.r16(0x5_0040 + 0x7fe), 0x77);
            assert_eq!(o.gpr(gpr::RSP), STACK0 - 36);
            assert_eq!((o.s.cpl, o.s.rflags & flag::VM), (0, 0));
            assert!([0, 3, 4, 5].iter().all(|&r| o.s.seg[r].selector == 0));
        },
    );
}

/// IOPL-sensitive instructions, and those that are not (SDM vol. 3 §20.2.7, §20.3.3).
#[test]
fn iopl() {
    let cases: [(Body, bool); 8] = [
        (|a| a.cli(), true),
        (|a| a.sti(), true),
        (|a| a.pushf(), true),
        (|a| a.popf(), true),
        (|a| a.iret(), true),
        (|a| a.int(0x41), true),
        (|a| a.int3(), false),
        (|a| a.db(&[0xf1]), false),
    ];
    for (body, sensitive) in cases {
        for iopl in [0, 2, 3] {
            check(
                || {
                    let mut m = machine(iopl, |a| {
                        body(a)?;
                        a.db(&[0xcc])
                    });
                    for v in [3, 0x41] {
                        m.gate_dpl(v, 3);
                    }
                    // What IRET and POPF find.
                    m.w16(0x5_0040 + 0x800, 1);
                    m.w16(0x5_0040 + 0x802, SEG as u16);
                    m
                },
                |o| {
                    if sensitive && iopl < 3 {
                        assert_eq!(o.vector(), Some(13), "{}", o.engine);
                        assert_eq!((o.r32(o.gpr(gpr::RSP)), frame(o, true)[0]), (0, 0));
                    } else {
                        assert_ne!(o.vector(), Some(13), "{}", o.engine);
                        assert!(o.vector().is_some());
                    }
                },
            );
        }
    }
}

/// INT n with IOPL=3 goes through the IDT; INT3 needs a gate of DPL 3.
#[test]
fn interrupts() {
    check(
        || {
            let mut m = machine(3, |a| a.int(0x41));
            m.gate_dpl(0x41, 3);
            m
        },
        |o| {
            assert_eq!(o.vector(), Some(0x41));
            assert_eq!(frame(o, false)[0], 2);
        },
    );
    check(
        || machine(3, |a| a.int(0x41)),
        |o| {
            assert_eq!(o.vector(), Some(13));
            assert_eq!((o.r32(o.gpr(gpr::RSP)), frame(o, true)[0]), (0x41 << 3 | 2, 0));
        },
    );
    check(
        || machine(0, |a| a.int3()),
        |o| {
            assert_eq!(o.vector(), Some(13));
            assert_eq!(o.r32(o.gpr(gpr::RSP)), 3 << 3 | 2);
        },
    );
    // A handler at another level than 0: #GP with its CS.
    check(
        || {
            let mut m = machine(3, |a| a.int(0x41));
            m.gate32(0x41, USER32, UCODE, 14, 3);
            m
        },
        |o| {
            assert_eq!(o.vector(), Some(13));
            assert_eq!(o.r32(o.gpr(gpr::RSP)), u64::from(USER32 & !3));
        },
    );
}

/// Ports go by the bitmap whatever IOPL is; privileged and protected-mode instructions fault.
#[test]
fn restricted() {
    let cases: [(Body, u8); 7] = [
        (|a| a.in_(al, 0x20), 13),
        (|a| a.hlt(), 13),
        (|a| a.mov(eax, cr0), 13),
        (|a| a.lgdt(ptr(bx)), 13),
        (|a| a.sldt(ax), 6),
        (|a| a.lar(ax, bx), 6),
        (|a| a.verr(ax), 6),
    ];
    for (body, vector) in cases {
        check(|| machine(3, body), |o| assert_eq!((o.vector(), frame(o, vector == 13)[0]), (Some(vector), 0)));
    }
    check(
        || {
            let mut m = machine(0, |a| {
                a.in_(al, 0x20)?;
                a.ud2()
            });
            m.s.tr.limit = 0x67 + 0x40;
            m
        },
        |o| assert_eq!(o.vector(), Some(6)),
    );
    // Offsets are limited to 64 KiB.
    check(
        || {
            machine(0, |a| {
                a.mov(ebx, 0x1_0000)?;
                a.mov(al, byte_ptr(ebx))
            })
        },
        |o| assert_eq!((o.vector(), frame(o, true)[0]), (Some(13), 6)),
    );
}

/// Loads of segment registers make base = selector × 16; far JMP too; IRET with IOPL 3 keeps IOPL and VM.
#[test]
fn segments() {
    check(
        || {
            let mut m = machine(3, |a| {
                a.mov(ax, 0x1800)?;
                a.mov(es, eax)?;
                a.mov(bx, word_ptr(0x20).es())?;
                a.db(&[0x9c, 0x0e, 0x68, 0x40, 0, 0xcf]) // PUSHF; PUSH CS; PUSH 40h; IRET
            });
            m.w16(0x1_8020, 0xbeef);
            m.asm(16, AT + 0x40, |a| a.db(&[0xea, 0, 0, 0x08, 0x50])); // JMP 5008:0
            m.asm(16, 0x5_0080, |a| a.ud2());
            m
        },
        |o| {
            assert_eq!(o.vector(), Some(6), "{}", o.engine);
            let f = frame(o, false);
            assert_eq!((f[0], f[1], o.gpr(3)), (0, 0x5008, 0xbeef));
            assert_eq!(f[2] & (flag::VM | flag::IOPL), flag::VM | flag::IOPL);
        },
    );
}
