//! Single-stepping, breakpoints and the debug registers (SDM vol. 3 chapter 17).

use diglot_translator::state::{cr, flag, gpr, seg};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::machine::*;

/// Where the log of #DB handlers is: a count, then (RIP, DR6, pushed flags) each.
const LOG: u64 = DATA + 0x8000;
const BS: u64 = 1 << 14;
const BD: u64 = 1 << 13;
/// What DR6 reads when nothing is reported.
const DR6: u64 = 0xffff_0ff0;

/// A handler of #DB that logs, clears DR6 and returns with `set` flags set and `clear` ones clear; it leaves once RIP
/// reaches a HLT.
fn logging(m: &mut Machine, set: u64) {
    m.handler(1, |a| {
        let mut end = a.create_label();
        a.push(rax)?;
        a.push(rbx)?;
        a.push(rcx)?;
        a.mov(rbx, LOG)?;
        a.mov(eax, dword_ptr(rbx))?;
        a.inc(dword_ptr(rbx))?;
        a.imul_3(eax, eax, 24)?;
        a.lea(rbx, rbx + rax + 8)?;
        a.mov(rcx, qword_ptr(rsp + 24))?;
        a.mov(qword_ptr(rbx), rcx)?;
        a.mov(rax, dr6)?;
        a.mov(qword_ptr(rbx + 8), rax)?;
        a.mov(rax, qword_ptr(rsp + 40))?;
        a.mov(qword_ptr(rbx + 16), rax)?;
        a.mov(rax, DR6)?;
        a.mov(dr6, rax)?;
        a.or(qword_ptr(rsp + 40), set as i32)?;
        a.cmp(byte_ptr(rcx), 0xf4u8 as i8 as i32)?;
        a.jne(end)?;
        a.and(qword_ptr(rsp + 40), !(flag::TF as i32))?;
        a.set_label(&mut end)?;
        a.pop(rcx)?;
        a.pop(rbx)?;
        a.pop(rax)?;
        a.iretq()
    });
}

fn log(o: &Outcome) -> Vec<(u64, u64, u64)> {
    (0..o.r64(LOG)).map(|n| LOG + 8 + 24 * n).map(|at| (o.r64(at), o.r64(at + 8), o.r64(at + 16))).collect()
}

/// Runs code with TF set from its start; the offsets at which #DB is delivered.
fn stepped(code: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>, setup: impl Fn(&mut Machine), traps: &[u64]) {
    check(
        || {
            let mut m = Machine::long().interpreted().flags(flag::TF).code64(|a| code(a));
            logging(&mut m, 0);
            setup(&mut m);
            m
        },
        |o| {
            o.halted();
            let log = log(o);
            let at: Vec<u64> = log.iter().map(|l| l.0 - CODE).collect();
            assert_eq!(at, traps, "{}", o.engine);
            for l in log {
                assert_eq!(l.1, DR6 | BS);
            }
        },
    );
}

#[test]
fn single_step() {
    let plain = |_: &mut Machine| {};
    stepped(
        |a| {
            a.nop()?;
            a.nop()?;
            a.hlt()
        },
        plain,
        &[1, 2],
    );
    // Each iteration of a repeated string instruction.
    stepped(
        |a| {
            a.mov(edi, DATA as i32)?;
            a.mov(ecx, 3)?;
            a.rep().stosb()?;
            a.hlt()
        },
        plain,
        &[5, 10, 10, 10, 12],
    );
    // The trap behind MOV SS waits for the next instruction (SDM vol. 3 §6.8.3).
    stepped(
        |a| {
            a.mov(eax, i32::from(DATA0))?;
            a.mov(ss, eax)?;
            a.nop()?;
            a.nop()?;
            a.hlt()
        },
        plain,
        &[5, 8, 9],
    );
    // POPF that clears TF is still stepped; nothing after it is.
    stepped(
        |a| {
            a.push(2)?;
            a.popfq()?;
            a.nop()?;
            a.hlt()
        },
        plain,
        &[2, 3],
    );
    // INT n clears TF before it would trap; IRET brings it back, and the instruction after it is stepped.
    stepped(
        |a| {
            a.int(0x40)?;
            a.nop()?;
            a.hlt()
        },
        |m| m.handler(0x40, |a| a.iretq()),
        &[3],
    );
}

/// In the middle of a repeated string instruction RF is pushed as 1, after its end as 0 (SDM vol. 3 §17.3.1.1).
#[test]
fn resume_flag_of_repeated_strings() {
    check(
        || {
            let mut m = Machine::long().interpreted().flags(flag::TF).code64(|a| {
                a.mov(edi, DATA as i32)?;
                a.mov(ecx, 2)?;
                a.rep().stosb()?;
                a.hlt()
            });
            logging(&mut m, 0);
            m
        },
        |o| {
            let rf: Vec<bool> = log(o).iter().map(|l| l.2 & flag::RF != 0).collect();
            assert_eq!(rf, [false, false, true, false], "{}", o.engine);
        },
    );
}

/// TF set by POPF or IRET takes effect after the next instruction; by SYSRET at once.
#[test]
fn trap_flag_set_late() {
    for iret in [false, true] {
        check(
            || {
                let mut m = Machine::long().interpreted().code64(|a| {
                    if iret {
                        a.push(i32::from(DATA0))?;
                        a.push(STACK as i32)?;
                        a.push(0x102)?;
                        a.push(i32::from(CODE64))?;
                        a.push(CODE as i32 + 0x100)?;
                        a.iretq()
                    } else {
                        a.push(0x102)?;
                        a.popfq()?;
                        a.jmp(CODE + 0x100)
                    }
                });
                m.asm(64, CODE + 0x100, |a| {
                    a.nop()?;
                    a.hlt()
                });
                logging(&mut m, 0);
                m
            },
            |o| {
                let at: Vec<u64> = log(o).iter().map(|l| l.0 - CODE - 0x100).collect();
                assert_eq!(at, if iret { vec![1] } else { vec![0, 1] });
            },
        );
    }
    check(
        || {
            let mut m = Machine::long().interpreted().code64(|a| {
                a.mov(ecx, UCODE as i32)?;
                a.mov(r11d, 0x102)?;
                a.sysretq()
            });
            m.s.msr.star = 0x20_u64 << 48 | 8 << 32;
            m.asm(64, UCODE, |a| a.nop());
            m
        },
        |o| {
            let f = o.exception(1);
            assert_eq!((f.ip, f.cs), (UCODE, u64::from(USER64)));
            assert_eq!(o.s.dr[6], DR6 | BS);
        },
    );
}

/// SYSCALL with TF masked by FMASK does not trap in the kernel; unmasked it does, at the entry.
#[test]
fn syscall_with_trap_flag() {
    for masked in [false, true] {
        check(
            || {
                let mut m = Machine::long().user().interpreted().flags(flag::TF).code64(|a| a.syscall());
                m.s.msr.star = 0x20_u64 << 48 | 8 << 32;
                m.s.msr.lstar = CODE;
                m.s.msr.fmask = if masked { flag::TF } else { 0 };
                m.asm(64, CODE, |a| {
                    a.nop()?;
                    a.hlt()
                });
                m
            },
            |o| {
                if masked {
                    o.halted();
                    assert_eq!(o.gpr(gpr::R11) & flag::TF, flag::TF);
                } else {
                    assert_eq!(o.exception(1).ip, CODE);
                }
            },
        );
    }
}

/// A faulting instruction is not stepped: the fault comes alone.
#[test]
fn fault_before_step() {
    check(
        || Machine::long().interpreted().flags(flag::TF).code64(|a| a.ud2()),
        |o| {
            let f = o.fault(6, 0, CODE);
            assert_eq!(f.flags & (flag::TF | flag::RF), flag::TF | flag::RF);
            assert_eq!(o.s.dr[6], DR6);
        },
    );
    // HLT under TF traps instead of halting for good.
    check(
        || Machine::long().interpreted().flags(flag::TF).code64(|a| a.hlt()),
        |o| assert_eq!(o.exception(1).ip, CODE + 1),
    );
}

/// Sets a breakpoint: number, address, R/W field, length in bytes.
fn breakpoint(m: &mut Machine, n: u32, at: u64, rw: u64, len: u64) {
    let field = rw
        | match len {
            1 => 0,
            2 => 1,
            8 => 2,
            _ => 3,
        } << 2;
    m.s.dr[n as usize] = at;
    m.s.dr[7] |= 2 << (2 * n) | field << (16 + 4 * n);
}

/// Instruction breakpoints are faults that do not set RF themselves; with RF set by the handler the instruction runs.
#[test]
fn instruction_breakpoint() {
    check(
        || {
            let mut m = Machine::long().interpreted().code64(|a| {
                let mut again = a.create_label();
                a.mov(ecx, 3)?;
                a.set_label(&mut again)?;
                a.nop()?;
                a.dec(ecx)?;
                a.jne(again)?;
                a.hlt()
            });
            breakpoint(&mut m, 2, CODE + 6, 0, 1);
            logging(&mut m, flag::RF);
            m
        },
        |o| {
            o.halted();
            let log = log(o);
            assert_eq!(log.len(), 3, "{}", o.engine);
            for l in log {
                assert_eq!((l.0, l.1, l.2 & flag::RF), (CODE + 6, DR6 | 4, 0), "{}", o.engine);
            }
        },
    );
    // Right behind MOV SS it is not reported (SDM vol. 3 §17.3.1.1).
    check(
        || {
            let mut m = Machine::long().interpreted().code64(|a| {
                a.mov(eax, i32::from(DATA0))?;
                a.mov(ss, eax)?;
                a.nop()?;
                a.hlt()
            });
            breakpoint(&mut m, 0, CODE + 7, 0, 1);
            m
        },
        Outcome::halted,
    );
    // On a repeated string instruction it is met once.
    check(
        || {
            let mut m = Machine::long().interpreted().code64(|a| {
                a.mov(edi, DATA as i32)?;
                a.mov(ecx, 20_000)?;
                a.rep().stosb()?;
                a.hlt()
            });
            breakpoint(&mut m, 1, CODE + 10, 0, 1);
            logging(&mut m, flag::RF);
            m
        },
        |o| {
            o.halted();
            assert_eq!(log(o).len(), 1);
            assert_eq!(o.gpr(gpr::RDI), DATA + 20_000);
        },
    );
}

/// Data breakpoints are traps, by length and kind of access.
#[test]
fn data_breakpoints() {
    type Body = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let write: Body = |a| a.mov(dword_ptr(rbx), eax);
    let read: Body = |a| a.mov(eax, dword_ptr(rbx));
    for (at, rw, len, body, hit) in [
        (DATA + 8, 1u64, 4u64, write, true),
        (DATA + 8, 1, 4, read, false),
        (DATA + 8, 3, 4, read, true),
        (DATA + 8, 3, 4, write, true),
        (DATA + 11, 1, 1, write, true),
        (DATA + 12, 1, 1, write, false),
        (DATA + 7, 1, 1, write, false),
        // The address is aligned to the length.
        (DATA + 7, 1, 2, write, false),
        (DATA + 7, 1, 4, write, false),
        (DATA + 13, 1, 8, write, true),
        (DATA + 8, 0, 4, write, false),
        (DATA + 8, 2, 4, write, false),
    ] {
        check(
            || {
                let mut m = Machine::long().interpreted().code64(|a| {
                    body(a)?;
                    a.nop()?;
                    a.hlt()
                });
                m.s.gpr[3] = DATA + 8;
                breakpoint(&mut m, 3, at, rw, len);
                m
            },
            |o| {
                if hit {
                    let f = o.exception(1);
                    assert_eq!((f.ip, o.s.dr[6]), (CODE + 2, DR6 | 8), "{at:#x} {rw} {len}");
                    assert_eq!(f.flags & flag::RF, 0);
                } else {
                    o.halted();
                }
            },
        );
    }
    // Behind MOV SS from watched memory the trap waits for the next instruction, here INT 40h: it comes in the handler.
    check(
        || {
            let mut m = Machine::long().interpreted().code64(|a| {
                a.mov(ss, word_ptr(DATA))?;
                a.int(0x40)
            });
            m.w16(DATA, DATA0);
            breakpoint(&mut m, 0, DATA, 3, 2);
            m.handler(0x40, |a| {
                a.nop()?;
                a.hlt()
            });
            m
        },
        |o| assert_eq!((o.exception(1).ip, o.s.dr[6]), (0x6_0000, DR6 | 1)),
    );
    // REP MOVS stops after the iteration that met it, with RF set.
    check(
        || {
            let mut m = Machine::long().interpreted().code64(|a| {
                a.mov(esi, DATA as i32)?;
                a.mov(edi, DATA as i32 + 0x1000)?;
                a.mov(ecx, 8)?;
                a.rep().movsb()?;
                a.hlt()
            });
            breakpoint(&mut m, 1, DATA + 0x1002, 1, 1);
            m
        },
        |o| {
            let f = o.exception(1);
            assert_eq!((f.ip, o.gpr(gpr::RCX), f.flags & flag::RF), (CODE + 15, 5, flag::RF));
        },
    );
}

/// I/O breakpoints, with CR4.DE.
#[test]
fn io_breakpoints() {
    for (port, size, watched, len, hit) in [
        (0x60u32, 1, 0x60u64, 1u64, true),
        (0x60, 4, 0x62, 2, true),
        (0x60, 2, 0x62, 1, false),
        (0x61, 1, 0x60, 1, false),
    ] {
        check(
            || {
                let mut m = Machine::long().interpreted().code64(|a| {
                    a.mov(edx, port)?;
                    match size {
                        1 => a.out(dx, al)?,
                        2 => a.out(dx, ax)?,
                        _ => a.out(dx, eax)?,
                    }
                    a.hlt()
                });
                m.s.cr4 |= cr::CR4_DE;
                breakpoint(&mut m, 0, watched, 2, len);
                m
            },
            |o| {
                if hit {
                    assert_eq!(o.s.dr[6], DR6 | 1);
                    assert_eq!(o.exception(1).ip, CODE + 5 + if size == 2 { 2 } else { 1 });
                } else {
                    o.halted();
                }
            },
        );
    }
}

/// DR7.GD, DR4 and DR5, reserved bits, privilege (SDM vol. 3 §17.2).
#[test]
fn debug_registers() {
    check(
        || {
            let mut m = Machine::long().code64(|a| {
                a.mov(rax, dr0)?;
                a.hlt()
            });
            m.s.dr[7] |= 1 << 13;
            m
        },
        |o| {
            let f = o.exception(1);
            assert_eq!((f.ip, f.flags & flag::RF), (CODE, flag::RF));
            assert_eq!((o.s.dr[6], o.s.dr[7]), (DR6 | BD, 0x400));
        },
    );
    type Body = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    type Case = (Body, bool, Option<(u8, u64)>);
    let cases: [Case; 6] = [
        (|a| a.db(&[0x0f, 0x23, 0xe0]), true, Some((6, 0))),
        (|a| a.db(&[0x0f, 0x23, 0xe0]), false, None),
        (|a| a.db(&[0x0f, 0x21, 0xe8]), true, Some((6, 0))),
        (|a| a.mov(dr6, rbx), false, Some((13, 0))),
        (|a| a.mov(dr7, rbx), false, Some((13, 0))),
        (|a| a.mov(dr0, rbx), false, None),
    ];
    for (body, de, error) in cases {
        check(
            || {
                let mut m = Machine::long().code64(|a| {
                    body(a)?;
                    a.hlt()
                });
                m.s.gpr[3] = 1 << 32;
                m.s.cr4 |= if de { cr::CR4_DE } else { 0 };
                m
            },
            |o| match error {
                Some((v, e)) => {
                    o.fault(v, e, CODE);
                }
                None => o.halted(),
            },
        );
    }
    // What the fixed bits read.
    check(
        || {
            Machine::long().code64(|a| {
                a.mov(eax, -1)?;
                a.mov(dr6, rax)?;
                a.mov(rbx, dr6)?;
                a.mov(eax, 0xffff_dc00u32)?;
                a.mov(dr7, rax)?;
                a.mov(rcx, dr7)?;
                a.xor(eax, eax)?;
                a.mov(dr7, rax)?;
                a.mov(dr6, rax)?;
                a.mov(rdx, dr6)?;
                a.mov(rsi, dr7)?;
                a.hlt()
            })
        },
        |o| {
            o.halted();
            assert_eq!((o.gpr(3), o.gpr(1)), (0xffff_efff, 0xffff_0400));
            assert_eq!((o.gpr(2), o.gpr(6)), (DR6, 0x400));
        },
    );
    check(
        || Machine::long().user().code64(|a| a.mov(rax, dr0)),
        |o| {
            o.fault(13, 0, UCODE);
        },
    );
}

/// ICEBP: a trap through any gate, DR6 untouched.
#[test]
fn icebp() {
    check(
        || {
            let mut m = Machine::long().user().code64(|a| a.db(&[0xf1]));
            m.s.dr[7] |= 1 << 13;
            m
        },
        |o| {
            assert_eq!(o.exception(1).ip, UCODE + 1);
            assert_eq!((o.s.dr[6], o.s.dr[7]), (DR6, 0x400));
        },
    );
}

/// IA32_DEBUGCTL.BTF: only taken branches are stepped, and #DB clears it (SDM vol. 3 §17.4.3).
#[test]
fn branch_step() {
    check(
        || {
            let mut m = Machine::long().interpreted().flags(flag::TF).code64(|a| {
                let mut on = a.create_label();
                a.nop()?;
                a.nop()?;
                a.jmp(on)?;
                a.nop()?;
                a.set_label(&mut on)?;
                a.hlt()
            });
            m.s.msr.debugctl = 2;
            m
        },
        |o| {
            assert_eq!(o.exception(1).ip, CODE + 5);
            assert_eq!(o.s.msr.debugctl, 0);
        },
    );
}

/// The shadow of STI and MOV SS: an interrupt that waits is taken one instruction later; never between STI and HLT.
#[test]
fn interrupt_shadows() {
    let raise = |a: &mut CodeAssembler| {
        a.mov(eax, 0x51)?;
        a.out(PORT_IRQ, al)
    };
    check(
        || {
            Machine::long().code64(|a| {
                raise(a)?;
                a.nop()?;
                a.sti()?;
                a.nop()?;
                a.nop()?;
                a.hlt()
            })
        },
        |o| assert_eq!(o.exception(0x51).ip, CODE + 7 + 3, "{}", o.engine),
    );
    // STI with IF set already has no shadow of its own.
    check(
        || {
            Machine::long().flags(flag::IF).code64(|a| {
                a.mov(eax, 0x51)?;
                a.sti()?;
                a.out(PORT_IRQ, al)?;
                a.hlt()
            })
        },
        |o| assert_eq!(o.exception(0x51).ip, CODE + 5 + 1 + 2, "{}", o.engine),
    );
    check(
        || {
            Machine::long().code64(|a| {
                raise(a)?;
                a.sti()?;
                a.cli()?;
                a.hlt()
            })
        },
        Outcome::halted,
    );
    check(
        || {
            Machine::long().code64(|a| {
                raise(a)?;
                a.mov(ebx, i32::from(DATA0))?;
                a.push(0x202)?;
                a.mov(ecx, ss)?;
                a.popfq()?;
                a.nop()?;
                a.hlt()
            })
        },
        |o| assert_eq!(o.exception(0x51).ip, CODE + 7 + 5 + 5 + 2 + 1, "{}", o.engine),
    );
    // MOV SS behind STI holds it back once more.
    check(
        || {
            Machine::long().code64(|a| {
                raise(a)?;
                a.sti()?;
                a.mov(ss, ebx)?;
                a.mov(edx, 5)?;
                a.hlt()
            })
        },
        |o| {
            // SDM vol. 2, MOV: with EBX=0 at CPL 0 SS becomes null.
            assert_eq!(o.exception(0x51).ip, CODE + 7 + 1 + 2 + 5, "{}", o.engine);
            assert_eq!(o.s.seg[usize::from(seg::SS)].selector, 0);
        },
    );
    // HLT: woken by an interrupt that came before, and pushed RIP is behind it.
    check(
        || {
            Machine::long().code64(|a| {
                raise(a)?;
                a.sti()?;
                a.hlt()?;
                a.ud2()
            })
        },
        |o| assert_eq!(o.exception(0x51).ip, CODE + 7 + 2, "{}", o.engine),
    );
}

/// NMIs are blocked from delivery to IRET, whatever IF is; they wake HLT.
#[test]
fn nmi() {
    check(
        || {
            let mut m = Machine::long().code64(|a| {
                a.out(PORT_NMI, al)?;
                a.nop()?;
                a.hlt()
            });
            m.handler(2, |a| {
                let mut second = a.create_label();
                a.inc(ebx)?;
                a.cmp(ebx, 2)?;
                a.je(second)?;
                a.out(PORT_NMI, al)?;
                a.nop()?;
                a.mov(esi, ebx)?;
                a.iretq()?;
                a.set_label(&mut second)?;
                a.mov(rdi, qword_ptr(rsp))?;
                a.iretq()
            });
            m
        },
        |o| {
            o.halted();
            // The second came after the IRET, at the point the first had interrupted.
            assert_eq!((o.gpr(3), o.gpr(6), o.gpr(7)), (2, 1, CODE + 2), "{}", o.engine);
        },
    );
    // An IRET that faults unblocks them as well.
    check(
        || {
            let mut m = Machine::long().code64(|a| {
                a.out(PORT_NMI, al)?;
                a.hlt()
            });
            m.handler(2, |a| {
                let mut second = a.create_label();
                a.inc(ebx)?;
                a.cmp(ebx, 2)?;
                a.je(second)?;
                a.out(PORT_NMI, al)?;
                a.mov(qword_ptr(rsp + 8), 0)?;
                a.iretq()?;
                a.set_label(&mut second)?;
                a.hlt()
            });
            m.handler(13, |a| {
                a.nop()?;
                a.nop()?;
                a.hlt()
            });
            m
        },
        |o| {
            o.halted();
            assert_eq!(o.gpr(3), 2, "{}", o.engine);
        },
    );
}

/// CR8 holds interrupts of its class and below back.
#[test]
fn task_priority() {
    check(
        || {
            Machine::long().flags(flag::IF).code64(|a| {
                a.mov(eax, 5)?;
                a.mov(cr8, rax)?;
                a.mov(al, 0x51)?;
                a.out(PORT_IRQ, al)?;
                a.nop()?;
                a.mov(rbx, cr8)?;
                a.mov(eax, 4)?;
                a.mov(cr8, rax)?;
                a.nop()?;
                a.cli()?;
                a.hlt()
            })
        },
        |o| {
            assert_eq!(o.exception(0x51).ip, CODE + 5 + 4 + 2 + 2 + 1 + 4 + 5 + 4, "{}", o.engine);
            assert_eq!(o.gpr(3), 5);
        },
    );
}

/// An interrupt in the middle of a long REP STOS: RIP at the instruction, RF=1, and it goes on afterwards.
#[test]
fn interrupted_string() {
    check(
        || {
            let mut m = Machine::long().code64(|a| {
                a.mov(edi, DATA as i32)?;
                a.mov(ecx, 0x4_0000)?;
                a.mov(al, 0x51)?;
                a.out(PORT_IRQ, al)?;
                a.sti()?;
                a.rep().stosb()?;
                a.hlt()
            });
            m.handler(0x51, |a| {
                a.mov(rsi, qword_ptr(rsp))?;
                a.mov(rbx, qword_ptr(rsp + 16))?;
                a.iretq()
            });
            m
        },
        |o| {
            o.halted();
            assert_eq!((o.gpr(1), o.gpr(7)), (0, DATA + 0x4_0000));
            // Either the whole instruction ran in the shadow, or it was interrupted with RF set.
            let mid = o.gpr(6) == CODE + 15;
            assert_eq!(o.gpr(3) & flag::RF != 0, mid, "{}", o.engine);
        },
    );
}

/// POPF and IRET that set IF have no shadow; POP SS has; a compiled loop that opens interrupts is interrupted.
#[test]
fn opening_interrupts() {
    let raise = |a: &mut CodeAssembler| {
        a.mov(eax, 0x51)?;
        a.out(PORT_IRQ, al)
    };
    check(
        || {
            Machine::long().code64(|a| {
                raise(a)?;
                a.push(0x202)?;
                a.popfq()?;
                a.nop()?;
                a.hlt()
            })
        },
        |o| assert_eq!(o.exception(0x51).ip, CODE + 7 + 6, "{}", o.engine),
    );
    check(
        || {
            Machine::flat32().code32(|a| {
                raise(a)?;
                a.push(i32::from(DATA0))?;
                a.sti()?;
                a.pop(ss)?;
                a.nop()?;
                a.hlt()
            })
        },
        |o| assert_eq!(o.exception(0x51).ip, CODE + 7 + 2 + 3, "{}", o.engine),
    );
    check(
        || {
            Machine::long().code64(|a| {
                let mut again = a.create_label();
                a.mov(ecx, 500)?;
                a.set_label(&mut again)?;
                a.sti()?;
                a.nop()?;
                a.cli()?;
                a.mov(al, 0x51)?;
                a.out(PORT_IRQ, al)?;
                a.dec(ecx)?;
                a.jne(again)?;
                a.hlt()
            })
        },
        |o| {
            assert_eq!(o.exception(0x51).ip, CODE + 5 + 2, "{}", o.engine);
            assert_eq!(o.gpr(1), 499);
        },
    );
}

/// A data breakpoint that MOV SS has held back is reported by the #DB of INT1 behind it, and by one of its own where
/// the instruction is another.
#[test]
fn breakpoint_held_back_until_int1() {
    for int1 in [true, false] {
        check(
            || {
                let mut m = Machine::long().interpreted().code64(|a| {
                    a.mov(ss, word_ptr(DATA))?;
                    if int1 {
                        a.int1()?
                    } else {
                        a.nop()?
                    }
                    a.nop()?;
                    a.hlt()
                });
                m.w16(DATA, DATA0);
                logging(&mut m, 0);
                m.s.dr[0] = DATA;
                m.s.dr[7] = 0x400 | 2 | 0xf << 16;
                m
            },
            |o| {
                o.halted();
                let log: Vec<(u64, u64)> = log(o).iter().map(|l| (l.0 - CODE, l.1 & 15)).collect();
                assert_eq!(log, [(8, 1)], "{}", o.engine);
            },
        );
    }
}

/// A read of device memory may raise an interrupt, which is taken behind it.
#[test]
fn interrupt_behind_a_device_read() {
    check(
        || {
            let mut m = Machine::long().flags(flag::IF).code64(|a| {
                a.mov(ebx, DATA as u32)?;
                a.mov(eax, dword_ptr(rbx))?;
                a.nop()?;
                a.nop()?;
                a.hlt()
            });
            m.pte(DATA, DEVICE | P | W | A | D);
            m
        },
        |o| {
            // MOV RBX, imm32 and MOV EAX, [RBX].
            assert_eq!(o.exception(DEVICE_IRQ).ip, CODE + 5 + 2, "{}", o.engine);
            assert_eq!(o.gpr(0), 0xffff_ffff);
        },
    );
}

/// HLT with IF=0 is woken by an NMI, and not by an interrupt that waits.
#[test]
fn halt_without_interrupts() {
    check(
        || {
            Machine::long().code64(|a| {
                a.mov(al, 0x51)?;
                a.out(PORT_IRQ, al)?;
                a.hlt()
            })
        },
        |o| {
            o.halted();
            assert_eq!(o.s.rip, CODE + 5);
        },
    );
    check(
        || {
            let mut m = Machine::long().code64(|a| {
                a.out(PORT_NMI, al)?;
                a.hlt()
            });
            m.handler(2, |a| {
                a.mov(qword_ptr(rsp), CODE as i32 + 0x100)?;
                a.iretq()
            });
            m.asm(64, CODE + 0x100, |a| {
                a.mov(ebx, 1)?;
                a.hlt()
            });
            m
        },
        |o| {
            o.halted();
            assert_eq!(o.gpr(3), 1);
        },
    );
}
