//! Real-address mode (SDM vol. 3 §20.1), and the way from it to 64-bit mode and back (SDM vol. 3 §9.8–9.9).

use diglot_translator::state::{Segment, cr, flag, gpr, seg};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::machine::*;

/// Where real-mode code starts.
const AT: u64 = 0x8000;

/// A three-word frame at SS:SP.
fn frame(o: &Outcome) -> (u64, u64, u64) {
    let top = o.s.seg[2].base + (o.gpr(gpr::RSP) & 0xffff);
    (o.r16(top), o.r16(top + 2), o.r16(top + 4))
}

/// Interrupts through the vector table: FLAGS, CS, IP; no error codes; IF and TF cleared; IRET.
#[test]
fn interrupts() {
    for (vector, code, ip) in [
        (0x21u8, (|a| a.int(0x21)) as fn(&mut CodeAssembler) -> Result<(), IcedError>, 2u64),
        (3, |a| a.int3(), 1),
        (0, |a| a.div(cl), 0),
        (6, |a| a.ud2(), 0),
        (13, |a| a.mov(ax, word_ptr(bx)), 0),
        (12, |a| a.mov(ax, word_ptr(bp)), 0),
        (13, |a| a.db(&[0x67, 0x8b, 0x03]), 0),
    ] {
        check(
            || {
                let mut m = Machine::real().flags(flag::IF).code16(code);
                // A word at FFFFh crosses the limit.
                m.s.gpr[3] = 0x1_ffff;
                m.s.gpr[5] = 0xffff;
                m
            },
            |o| {
                assert_eq!(o.vector(), Some(vector), "{}: rip {:#x}", o.engine, o.s.rip);
                let (at, code, flags) = frame(o);
                assert_eq!((at, code, flags & flag::IF), (AT + ip, 0, flag::IF));
                assert_eq!(o.s.rflags & flag::IF, 0);
                assert_eq!(o.gpr(gpr::RSP), 0x7000 - 6);
            },
        );
    }
    check(
        || {
            let mut m = Machine::real().code16(|a| {
                a.mov(ax, 0x1000)?;
                a.mov(ss, eax)?;
                a.mov(sp, 4)?;
                a.int(0x21)?;
                a.mov(cx, cs)?;
                a.cli()?;
                a.hlt()
            });
            m.w32(4 * 0x21, 0x0900_0010);
            m.asm(16, 0x9010, |a| {
                a.mov(bx, cs)?;
                a.mov(dx, sp)?;
                a.iret()
            });
            m.flags(flag::IF)
        },
        |o| {
            o.halted();
            // The stack pointer wraps from 0 to FFFEh between two pushes.
            assert_eq!((o.gpr(3), o.gpr(2), o.gpr(4) & 0xffff), (0x900, 0xfffe, 4), "{}", o.engine);
        },
    );
    // A vector beyond IDTR's limit, and a push that crosses the stack's limit, end in shutdown when nothing works.
    check(
        || {
            let mut m = Machine::real().code16(|a| a.int(0x21));
            m.s.idtr.limit = 3;
            m
        },
        Outcome::shutdown,
    );
    check(
        || {
            let mut m = Machine::real().code16(|a| a.int(0x21));
            m.s.gpr[4] = 1;
            m
        },
        Outcome::shutdown,
    );
}

/// 16-bit addressing wraps at 64 KiB; far transfers load CS:IP; the A20 line does not wrap FFFF:10.
#[test]
fn addressing() {
    check(
        || {
            let mut m = Machine::real().code16(|a| {
                a.mov(bx, 0xfff0)?;
                a.mov(si, 0x30)?;
                a.mov(ax, word_ptr(bx + si))?;
                a.mov(cx, 0xffff)?;
                a.mov(ds, ecx)?;
                a.mov(dx, word_ptr(0x20))?;
                a.db(&[0x9a, 0x10, 0, 0, 9])?; // CALL 900:10
                a.cli()?;
                a.hlt()
            });
            m.w16(0x20, 0x1234);
            m.w16(0x10_0010, 0x5678);
            m.asm(16, 0x9010, |a| {
                a.mov(di, cs)?;
                a.retf()
            });
            m
        },
        |o| {
            o.halted();
            assert_eq!((o.gpr(0), o.gpr(2), o.gpr(7)), (0x1234, 0x5678, 0x900), "{}", o.engine);
        },
    );
    // Conditional branches wrap IP at 16 bits; a string instruction wraps DI.
    check(
        || {
            Machine::real().code16(|a| {
                a.mov(di, 0xfffe)?;
                a.mov(ax, 0x4000)?;
                a.mov(es, eax)?;
                a.mov(ax, 0x2211)?;
                a.mov(cx, 2)?;
                a.rep().stosw()?;
                a.hlt()
            })
        },
        |o| {
            o.halted();
            assert_eq!((o.r16(0x4_fffe), o.r16(0x4_0000), o.gpr(7)), (0x2211, 0x2211, 2), "{}", o.engine);
        },
    );
}

/// Protected-mode instructions are #UD, privileged ones run.
#[test]
fn instructions() {
    for code in [
        (|a| a.sldt(ax)) as fn(&mut CodeAssembler) -> Result<(), IcedError>,
        |a| a.ltr(ax),
        |a| a.verr(ax),
        |a| a.arpl(ax, bx),
        // ANDN eax, ecx, edx: there is no VEX prefix.
        |a| a.db(&[0xc4, 0xe2, 0x70, 0xf2, 0xc2]),
    ] {
        check(|| Machine::real().code16(code), |o| assert_eq!((o.vector(), frame(o).0), (Some(6), AT)));
    }
    check(
        || {
            Machine::real().code16(|a| {
                a.smsw(eax)?;
                a.mov(ebx, cr0)?;
                a.clts()?;
                a.sgdt(ptr(0x600))?;
                a.in_(al, 0x20)?;
                a.cli()?;
                a.hlt()
            })
        },
        |o| {
            o.halted();
            assert_eq!(o.r16(0x600), 0xfff);
        },
    );
}

/// Unreal mode: a limit loaded in protected mode stays after PE is cleared and the selector reloaded.
#[test]
fn unreal() {
    check(
        || {
            let mut m = Machine::real().code16(|a| {
                a.mov(eax, cr0)?;
                a.or(al, 1)?;
                a.mov(cr0, eax)?;
                a.mov(bx, u32::from(DATA0))?;
                a.mov(ds, ebx)?;
                a.and(al, 0xfeu8 as i32)?;
                a.mov(cr0, eax)?;
                a.mov(bx, 0x10)?;
                a.mov(ds, ebx)?;
                a.mov(ebx, DATA as u32)?;
                a.mov(ecx, dword_ptr(ebx))?;
                a.hlt()
            });
            m.w32(DATA + 0x100, 0x1357_9bdf);
            m
        },
        |o| {
            o.halted();
            assert_eq!(o.gpr(1), 0x1357_9bdf, "{}", o.engine);
        },
    );
}

/// Real mode → 32-bit protected → long mode (with PAE) → 64-bit → compatibility → paging off → real mode again.
#[test]
fn there_and_back() {
    check(
        || {
            let mut m = Machine::real().code16(|a| {
                a.lgdt(ptr(0x600))?;
                a.mov(eax, cr0)?;
                a.or(al, 1)?;
                a.mov(cr0, eax)?;
                // JMP 18:00050000h with an operand-size prefix.
                a.db(&[0x66, 0xea, 0, 0, 5, 0, 0x18, 0])
            });
            m.w16(0x600, 0xfff);
            m.w32(0x602, GDT as u32);
            m.w64(PML4, PDPT | P | W);
            m.w64(PDPT, PS | P | W);
            m.asm(32, 0x5_0000, |a| {
                a.mov(eax, i32::from(DATA0))?;
                a.mov(ds, eax)?;
                a.mov(ss, eax)?;
                a.mov(esp, 0x7000)?;
                a.mov(dword_ptr(DATA as u32), 32)?;
                a.mov(eax, 0x20)?;
                a.mov(cr4, eax)?;
                a.mov(eax, PML4 as u32)?;
                a.mov(cr3, eax)?;
                a.mov(ecx, 0xc000_0080u32)?;
                a.rdmsr()?;
                a.or(eax, 0x100)?;
                a.wrmsr()?;
                a.mov(eax, cr0)?;
                a.or(eax, 0x8000_0000u32 as i32)?;
                a.mov(cr0, eax)?;
                a.rdmsr()?;
                a.mov(dword_ptr(DATA as u32 + 4), eax)?;
                a.db(&[0xea, 0, 0x10, 5, 0, 0x08, 0])
            });
            m.asm(64, 0x5_1000, |a| {
                a.mov(rax, 0x1122_3344_5566_7788u64)?;
                a.mov(rbx, DATA + 8)?;
                a.mov(qword_ptr(rbx), rax)?;
                a.push(i32::from(CODE32))?;
                a.push(0x5_2000)?;
                a.db(&[0x48, 0xcb])
            });
            m.asm(32, 0x5_2000, |a| {
                // Compatibility mode: paging off leaves long mode.
                a.mov(eax, cr0)?;
                a.and(eax, 0x7fff_ffff)?;
                a.mov(cr0, eax)?;
                a.rdmsr()?;
                a.mov(dword_ptr(DATA as u32 + 16), eax)?;
                a.and(eax, !0x100)?;
                a.wrmsr()?;
                a.mov(eax, i32::from(DATA16))?;
                a.mov(ds, eax)?;
                a.mov(ss, eax)?;
                a.db(&[0xea, 0, 0x58, 0, 0, 0x48, 0]) // JMP 48:5800h
            });
            // 16-bit protected code, then real mode.
            m.asm(16, 0x5800, |a| {
                a.mov(eax, cr0)?;
                a.and(al, 0xfeu8 as i32)?;
                a.mov(cr0, eax)?;
                a.db(&[0xea, 0, 0x59, 0, 0]) // JMP 0:5900h
            });
            m.asm(16, 0x5900, |a| {
                a.xor(ax, ax)?;
                a.mov(ds, eax)?;
                a.mov(ss, eax)?;
                a.mov(sp, 0x7000)?;
                a.int(0x21)
            });
            m
        },
        |o| {
            assert_eq!(o.vector(), Some(0x21), "{}: rip {:#x}", o.engine, o.s.rip);
            assert_eq!((o.r32(DATA), o.r64(DATA + 8)), (32, 0x1122_3344_5566_7788));
            assert_eq!(o.r32(DATA + 4) & (cr::EFER_LMA | cr::EFER_LME), cr::EFER_LMA | cr::EFER_LME);
            assert_eq!(o.r32(DATA + 16) & (cr::EFER_LMA | cr::EFER_LME), cr::EFER_LME);
            assert_eq!(o.s.cr0 & (cr::CR0_PE | cr::CR0_PG), 0);
            assert_eq!(frame(o).1, 0);
        },
    );
}

/// 16-bit protected mode: a 16-bit code and stack segment with a base of their own.
#[test]
fn protected_16() {
    check(
        || {
            let mut m = Machine::flat32().interpreted();
            m.gdt(FREE, descriptor(0x5_0000, 0xffff, 0x9b));
            m.gdt(0x60, descriptor(0x5_8000, 0xfff, 0x93));
            m.s.seg[usize::from(seg::CS)] = Segment { base: 0x5_0000, limit: 0xffff, attr: 0x9b, selector: FREE };
            m.s.seg[usize::from(seg::SS)] = Segment { base: 0x5_8000, limit: 0xfff, attr: 0x93, selector: 0x60 };
            m.s.rip = 0x10;
            m.s.gpr[4] = 0xabcd_0800;
            m.asm(16, 0x5_0010, |a| {
                a.push(0x1234)?;
                a.call(0x5_0040)?;
                a.hlt()
            });
            m.asm(16, 0x5_0040, |a| {
                a.mov(ebx, esp)?;
                a.pop(ax)?;
                a.push(ax)?;
                a.ret()
            });
            m
        },
        |o| {
            o.halted();
            // Only SP moves.
            assert_eq!((o.gpr(3), o.gpr(4)), (0xabcd_07fc, 0xabcd_07fe), "{}", o.engine);
            assert_eq!((o.gpr(0), o.r16(0x5_87fe)), (0x16, 0x1234));
        },
    );
}
