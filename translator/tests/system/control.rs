//! Control registers, MSRs, fast calls and the instructions that privilege or CR4 restricts.

use diglot_translator::state::{cr, flag, gpr, seg};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::machine::*;

type Body = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Runs one instruction (RAX and RBX given) and expects it to pass, or an exception at it.
fn one(m: impl Fn() -> Machine, a0: u64, b0: u64, body: Body, error: Option<(u8, u64)>) {
    check(
        || {
            let mut m = m().code64(|a| {
                body(a)?;
                a.int(0x40)
            });
            m.gate_dpl(0x40, 3);
            m.s.gpr[0] = a0;
            m.s.gpr[3] = b0;
            m
        },
        |o| match error {
            Some((v, e)) => {
                assert_eq!(o.vector(), Some(v), "{a0:#x} {b0:#x}: rip {:#x}", o.s.rip);
                let f = o.exception(v);
                let start = if f.cs & 3 == 3 { UCODE } else { CODE };
                o.fault(v, e, start);
            }
            None => assert_eq!(o.vector(), Some(0x40), "{a0:#x} {b0:#x}: rip {:#x}", o.s.rip),
        },
    );
}

const GP: Option<(u8, u64)> = Some((13, 0));
const UD: Option<(u8, u64)> = Some((6, 0));

/// SDM vol. 2, MOV to control register; vol. 3 §2.5.
#[test]
fn control_register_checks() {
    let old0 = cr::CR0_PE | cr::CR0_PG | cr::CR0_WP | cr::CR0_ET | cr::CR0_NE;
    let old4 = cr::CR4_PAE | cr::CR4_OSFXSR | cr::CR4_OSXMMEXCPT;
    let to_cr0: Body = |a| a.mov(cr0, rax);
    let to_cr3: Body = |a| a.mov(cr3, rax);
    let to_cr4: Body = |a| a.mov(cr4, rax);
    let to_cr8: Body = |a| a.mov(cr8, rax);
    for (v, body, error) in [
        (old0, to_cr0, None),
        (old0 | 1 << 32, to_cr0, GP),
        (old0 & !cr::CR0_PE, to_cr0, GP),
        (old0 | cr::CR0_NW, to_cr0, GP),
        (old0 | cr::CR0_CD, to_cr0, None),
        (old0 | cr::CR0_CD | cr::CR0_NW, to_cr0, None),
        // Leaving paging in 64-bit mode.
        (old0 & !cr::CR0_PG, to_cr0, GP),
        // Reserved low bits are ignored.
        (old0 | 0x1f00, to_cr0, None),
        (PML4, to_cr3, None),
        (PML4 | 0x18, to_cr3, None),
        (PML4 | 1 << 46, to_cr3, GP),
        (PML4 | 1 << 63, to_cr3, GP),
        (old4, to_cr4, None),
        (old4 & !cr::CR4_PAE, to_cr4, GP),
        // VME, PVI, LA57, VMXE, CET: not there.
        (old4 | 1, to_cr4, GP),
        (old4 | 2, to_cr4, GP),
        (old4 | 1 << 12, to_cr4, GP),
        (old4 | 1 << 13, to_cr4, GP),
        (old4 | cr::CR4_PKE | cr::CR4_PKS, to_cr4, None),
        (old4 | 1 << 23, to_cr4, GP),
        (old4 | 1 << 32, to_cr4, GP),
        (old4 | cr::CR4_SMEP | cr::CR4_SMAP | cr::CR4_UMIP | cr::CR4_FSGSBASE, to_cr4, None),
        (old4 | cr::CR4_PCIDE, to_cr4, None),
        (15, to_cr8, None),
        (16, to_cr8, GP),
    ] {
        one(Machine::long, v, 0, body, error);
        one(|| Machine::long().user(), v, 0, body, GP);
    }
    // PCIDs can be switched on only with PCID 0; with them on, paging cannot be left and CR3 takes bit 63.
    let with_pcid = || {
        let mut m = Machine::long();
        m.s.cr3 |= 8;
        m
    };
    one(with_pcid, old4 | cr::CR4_PCIDE, 0, to_cr4, GP);
    let pcide = || {
        let mut m = Machine::long();
        m.s.cr4 |= cr::CR4_PCIDE;
        m
    };
    one(pcide, PML4 | 1 << 63, 0, to_cr3, None);
    one(pcide, PML4 | 1 << 62, 0, to_cr3, GP);
    // Registers that do not exist.
    one(Machine::long, 0, 0, |a| a.db(&[0x0f, 0x22, 0xc8]), UD);
    one(Machine::long, 0, 0, |a| a.db(&[0x0f, 0x20, 0xe8]), UD);
}

/// Outside long mode: PG needs PE, LME needs PAE, PCIDE needs long mode (SDM vol. 3 §9.8.5).
#[test]
fn control_register_checks_32() {
    for (efer, cr4_value, write_cr4, v, ok) in [
        (0u64, 0u64, false, cr::CR0_PE | cr::CR0_PG, true),
        (0, 0, false, cr::CR0_PG, false),
        (cr::EFER_LME, 0, false, cr::CR0_PE | cr::CR0_PG, false),
        (0, 0, true, cr::CR4_PCIDE, false),
        (0, 0, true, cr::CR4_PAE, true),
    ] {
        check(
            || {
                let mut m = Machine::paging32().code32(|a| {
                    a.mov(eax, v as u32)?;
                    if write_cr4 {
                        a.mov(cr4, eax)?
                    } else {
                        a.mov(cr0, eax)?
                    }
                    a.hlt()
                });
                m.s.cr0 &= !cr::CR0_PG;
                m.s.efer = efer;
                m.s.cr4 = cr4_value;
                m
            },
            |o| {
                if ok {
                    o.halted();
                } else {
                    o.fault(13, 0, CODE + 5);
                }
            },
        );
    }
}

/// WRMSR and RDMSR: privilege, unknown registers, reserved bits, canonical values (SDM vol. 2, vol. 4).
#[test]
fn msrs() {
    let bad = 1u64 << 47;
    for (n, v, ok) in [
        (0xc000_0080u32, cr::EFER_LME | cr::EFER_LMA | cr::EFER_NXE, true),
        (0xc000_0080, cr::EFER_LMA | cr::EFER_NXE, false),
        (0xc000_0080, cr::EFER_LME | 1 << 1, false),
        (0xc000_0081, u64::MAX, true),
        (0xc000_0082, bad, false),
        (0xc000_0082, !0 << 47, true),
        (0xc000_0083, bad, false),
        (0xc000_0084, 0x4_7700, true),
        (0xc000_0084, 1 << 32, false),
        (0xc000_0100, bad, false),
        (0xc000_0101, bad, false),
        (0xc000_0102, bad, false),
        (0xc000_0102, bad - 1, true),
        (0xc000_0103, 1 << 32, false),
        (0x175, bad, false),
        (0x176, bad, false),
        (0x277, 0x0007_0406_0007_0406, true),
        (0x277, 2, false),
        (0x277, 8 << 56, false),
        (0x2ff, 0xc06, true),
        (0x2ff, 0x002, false),
        (0x2ff, 0x1006, false),
        (0x200, 6, true),
        (0x200, 1 << 46, false),
        (0x200, 3, false),
        (0x201, 0x800, true),
        (0x201, 1, false),
        (0x250, 0x0606_0606_0606_0606, true),
        (0x250, 7, false),
        (0xfe, 0, false),
        (0x400, 0, true),
        (0x400, u64::MAX, true),
        (0x400, 1, false),
        (0x401, 0, true),
        (0x401, 1, false),
        (0x402, u64::MAX, true),
        (0x40f, u64::MAX, true),
        (0x410, 0, false),
        (0x6e1, 0xffff_ffff, true),
        (0x17a, 7, true),
        (0x17a, 8, false),
        (0x1d9, 3, true),
        (0x1d9, 1 << 6, false),
        (0x6e1, 1 << 32, false),
        (0x1234_5678, 0, false),
    ] {
        check(
            || {
                let mut m = Machine::long().code64(|a| {
                    a.wrmsr()?;
                    a.hlt()
                });
                m.s.gpr[0] = v & 0xffff_ffff;
                m.s.gpr[2] = v >> 32;
                m.s.gpr[1] = u64::from(n);
                m
            },
            |o| {
                if ok {
                    o.halted();
                } else {
                    assert_eq!(o.vector(), Some(13), "{}: MSR {n:#x} {v:#x}", o.engine);
                    o.fault(13, 0, CODE);
                }
            },
        );
    }
    one(|| Machine::long().user(), 0, 0, |a| a.rdmsr(), GP);
    one(|| Machine::long().user(), 0, 0, |a| a.wrmsr(), GP);
    // Commands have nothing to read.
    for n in [0x49, 0x10b] {
        let command = || {
            let mut m = Machine::long();
            m.s.gpr[1] = n;
            m
        };
        one(command, 0, 0, |a| a.rdmsr(), GP);
        one(command, 0, 0, |a| a.wrmsr(), None);
    }
    let tsc: Body = |a| {
        a.mov(ecx, 0x10)?;
        a.rdmsr()
    };
    one(Machine::long, 0, 0, tsc, None);
}

/// Instructions that CPL, CR4 or a mode forbids.
#[test]
fn privileged_instructions() {
    let user = || Machine::long().user();
    let cases: [(Body, Option<(u8, u64)>); 18] = [
        (|a| a.hlt(), GP),
        (|a| a.cli(), GP),
        (|a| a.sti(), GP),
        (|a| a.clts(), GP),
        (|a| a.lmsw(ax), GP),
        (|a| a.invlpg(byte_ptr(rsp)), GP),
        (|a| a.wbinvd(), GP),
        (|a| a.lgdt(ptr(rsp)), GP),
        (|a| a.lidt(ptr(rsp)), GP),
        (|a| a.lldt(bx), GP),
        (|a| a.ltr(bx), GP),
        (|a| a.swapgs(), GP),
        (|a| a.monitor(), UD),
        (|a| a.mwait(), UD),
        (|a| a.stac(), UD),
        (|a| a.invpcid(rax, xmmword_ptr(rsp)), GP),
        (|a| a.rdpmc(), GP),
        (|a| a.in_(al, dx), GP),
    ];
    for (body, error) in cases {
        one(user, 0, 0, body, error);
    }
    // MONITOR has no extensions, MWAIT the one of ECX bit 0.
    let with_ecx = |ecx_value: u64| {
        move || {
            let mut m = Machine::long();
            m.s.gpr[1] = ecx_value;
            m
        }
    };
    one(with_ecx(0), DATA, 0, |a| a.monitor(), None);
    one(with_ecx(1), DATA, 0, |a| a.monitor(), GP);
    one(with_ecx(1), 0, 0, |a| a.mwait(), None);
    one(with_ecx(2), 0, 0, |a| a.mwait(), GP);
    // UMIP.
    let umip = || {
        let mut m = Machine::long().user();
        m.s.cr4 |= cr::CR4_UMIP;
        m
    };
    let five: [Body; 5] =
        [|a| a.sgdt(ptr(rsp - 16)), |a| a.sidt(ptr(rsp - 16)), |a| a.sldt(eax), |a| a.str(eax), |a| a.smsw(eax)];
    for body in five {
        one(user, 0, 0, body, None);
        one(umip, 0, 0, body, GP);
    }
    // TSD.
    let tsd = || {
        let mut m = Machine::long().user();
        m.s.cr4 |= cr::CR4_TSD;
        m
    };
    one(tsd, 0, 0, |a| a.rdtsc(), GP);
    one(tsd, 0, 0, |a| a.rdtscp(), GP);
    one(user, 0, 0, |a| a.rdtsc(), None);
    // FSGSBASE.
    let on = || {
        let mut m = Machine::long().user();
        m.s.cr4 |= cr::CR4_FSGSBASE;
        m
    };
    one(user, 0, 0, |a| a.rdfsbase(rax), UD);
    one(on, 0, 0, |a| a.rdfsbase(rax), None);
    one(on, 1 << 47, 0, |a| a.wrgsbase(rax), GP);
    // XSETBV.
    let xsave = || {
        let mut m = Machine::long();
        m.s.cr4 |= cr::CR4_OSXSAVE;
        m
    };
    one(Machine::long, 1, 0, |a| a.xsetbv(), UD);
    one(xsave, 1, 0, |a| a.xsetbv(), None);
    one(xsave, 0, 0, |a| a.xsetbv(), GP);
    one(xsave, 3, 0, |a| a.xsetbv(), None);
    one(xsave, 5, 0, |a| a.xsetbv(), GP);
    one(xsave, 1 << 31 | 1, 0, |a| a.xsetbv(), GP);
}

/// POPF and CLI/STI by IOPL (SDM vol. 2, POPF).
#[test]
fn flags_by_privilege() {
    for (user, iopl, changes_if, changes_iopl) in
        [(false, 0u64, true, true), (true, 0, false, false), (true, 3, true, false)]
    {
        check(
            || {
                let m = Machine::long();
                let m = if user { m.user() } else { m };
                let mut m = m.flags(iopl << 12).code64(|a| {
                    a.pushfq()?;
                    a.xor(qword_ptr(rsp), 0x3200)?;
                    a.or(qword_ptr(rsp), (flag::VM | flag::RF | flag::VIF | flag::VIP) as i32)?;
                    a.popfq()?;
                    a.cld()?;
                    a.pushfq()?;
                    a.pop(rax)?;
                    a.int(0x40)
                });
                m.gate_dpl(0x40, 3);
                m
            },
            |o| {
                let now = o.gpr(gpr::RAX);
                assert_eq!(o.vector(), Some(0x40));
                assert_eq!(now & flag::IF != 0, changes_if);
                assert_eq!(now & flag::IOPL != iopl << 12, changes_iopl);
                assert_eq!(now & (flag::VM | flag::RF | flag::VIF | flag::VIP), 0);
            },
        );
    }
}

/// RDPKRU and WRPKRU (SDM vol. 2), and CPUID's OSPKE.
#[test]
fn pkru() {
    let on = || {
        let mut m = Machine::long();
        m.s.cr4 |= cr::CR4_PKE;
        m
    };
    for body in [(|a| a.rdpkru()) as Body, |a| a.wrpkru()] {
        for user in [false, true] {
            let of = |m: Machine, c: u64, d: u64| {
                let mut m = if user { m.user() } else { m };
                (m.s.gpr[1], m.s.gpr[2]) = (c, d);
                m
            };
            one(|| of(on(), 0, 0), 0, 0, body, None);
            one(|| of(on(), 1 << 32, 1 << 32), 0, 0, body, None);
            one(|| of(on(), 1, 0), 0, 0, body, GP);
            one(|| of(Machine::long(), 0, 0), 0, 0, body, UD);
        }
    }
    let dirty = || {
        let mut m = on();
        m.s.gpr[2] = 1;
        m
    };
    one(dirty, 0, 0, |a| a.rdpkru(), None);
    one(dirty, 0, 0, |a| a.wrpkru(), GP);
    check(
        || {
            let mut m = on().code64(|a| {
                a.xor(ecx, ecx)?;
                a.xor(edx, edx)?;
                a.mov(rax, 0xffff_ffff_1234_5670u64)?;
                a.wrpkru()?;
                a.mov(rax, -1i64)?;
                a.mov(edx, 1)?;
                a.rdpkru()?;
                a.mov(rsi, rax)?;
                a.mov(rdi, rdx)?;
                a.mov(eax, 7)?;
                a.cpuid()?;
                a.hlt()
            });
            m.s.pkru = 7;
            m
        },
        |o| {
            o.halted();
            assert_eq!((o.gpr(gpr::RSI), o.gpr(gpr::RDI), o.s.pkru), (0x1234_5670, 0, 0x1234_5670));
            assert_eq!(o.gpr(gpr::RCX) & 0x18, 0x18);
        },
    );
}

/// The APIC's bit in CPUID is that of IA32_APIC_BASE.
#[test]
fn cpuid_shows_whether_the_apic_is_enabled() {
    check(
        || {
            Machine::long().code64(|a| {
                a.mov(eax, 1)?;
                a.cpuid()?;
                a.mov(esi, edx)?;
                a.out(PORT_APIC_OFF, al)?;
                a.mov(eax, 1)?;
                a.cpuid()?;
                a.hlt()
            })
        },
        |o| {
            o.halted();
            assert_eq!([gpr::RSI, gpr::RDX].map(|r| o.gpr(r) >> 9 & 1), [1, 0]);
        },
    );
}

/// SYSCALL and SYSRET (SDM vol. 2).
#[test]
fn syscall() {
    let setup = |mut m: Machine| {
        m.s.msr.star = 0x20_u64 << 48 | 8 << 32;
        m.s.msr.lstar = CODE + 0x100;
        m.s.msr.fmask = flag::IF | flag::DF | flag::AC;
        m
    };
    check(
        || {
            let mut m = setup(Machine::long().user().flags(flag::IF | flag::AC)).code64(|a| {
                a.stc()?;
                a.syscall()?;
                a.mov(edi, 9)?;
                a.int(0x40)
            });
            m.gate_dpl(0x40, 3);
            m.asm(64, CODE + 0x100, |a| {
                a.mov(esi, ss)?;
                a.mov(ebx, cs)?;
                a.pushfq()?;
                a.pop(rbp)?;
                a.sysretq()
            });
            m
        },
        |o| {
            let f = o.exception(0x40);
            assert_eq!((f.ip, f.cs, f.ss), (UCODE + 1 + 2 + 5 + 2, u64::from(USER64), u64::from(USER_DATA)));
            assert_eq!((o.gpr(6), o.gpr(3), o.gpr(7)), (u64::from(DATA0), u64::from(CODE64), 9));
            assert_eq!(o.gpr(1), UCODE + 3);
            assert_eq!(o.gpr(11) & (flag::IF | flag::AC | flag::CF), flag::IF | flag::AC | flag::CF);
            assert_eq!(o.gpr(5) & (flag::IF | flag::AC | flag::CF), flag::CF);
            assert_eq!(f.flags & (flag::IF | flag::AC | flag::CF), flag::IF | flag::AC | flag::CF);
        },
    );
    // SYSRET to a non-canonical address: #GP(0) at CPL 0, on the kernel's view of RSP.
    check(
        || {
            setup(Machine::long()).code64(|a| {
                a.mov(rcx, 1u64 << 47)?;
                a.sysretq()
            })
        },
        |o| {
            let f = o.exception(13);
            assert_eq!((f.error, f.cs, f.sp), (Some(0), u64::from(CODE64), STACK));
        },
    );
    // To 32-bit code.
    check(
        || {
            let mut m = setup(Machine::long()).code64(|a| {
                a.mov(rcx, 1u64 << 32 | UCODE)?;
                a.mov(r11d, 0x202)?;
                a.sysret()
            });
            m.asm(32, UCODE, |a| {
                // DEC EAX in 32-bit code, a REX prefix in 64-bit code.
                a.dec(eax)?;
                a.int(0x40)
            });
            m.gate_dpl(0x40, 3);
            m
        },
        |o| {
            let f = o.exception(0x40);
            assert_eq!((f.cs, f.ip, o.gpr(0)), (u64::from(USER32), UCODE + 3, 0xffff_ffff));
        },
    );
    let off = || {
        let mut m = Machine::long().user();
        m.s.efer &= !cr::EFER_SCE;
        m
    };
    one(off, 0, 0, |a| a.syscall(), UD);
    one(|| Machine::long().user(), 0, 0, |a| a.sysretq(), GP);
}

/// SYSENTER and SYSEXIT (SDM vol. 2).
#[test]
fn sysenter() {
    check(
        || {
            let mut m = Machine::long().user().flags(flag::IF).code64(|a| a.sysenter());
            // SYSEXIT goes to CS+32 and CS+40 in 64-bit mode: 30h is 10h + 20h.
            m.s.msr.sysenter_cs = 0x10;
            m.s.msr.sysenter_esp = STACK;
            m.s.msr.sysenter_eip = CODE;
            m.asm(64, CODE, |a| {
                a.pushfq()?;
                a.pop(rbx)?;
                a.mov(esi, cs)?;
                a.mov(edi, ss)?;
                a.mov(ecx, USTACK as i32)?;
                a.mov(edx, UCODE as i32 + 0x100)?;
                a.sysexitq()
            });
            m.asm(64, UCODE + 0x100, |a| {
                a.mov(r8d, cs)?;
                a.mov(r9d, ss)?;
                a.int(0x40)
            });
            m.gate_dpl(0x40, 3);
            m
        },
        |o| {
            assert_eq!(o.vector(), Some(0x40));
            assert_eq!((o.gpr(6), o.gpr(7), o.gpr(3) & flag::IF), (0x10, 0x18, 0));
            assert_eq!((o.gpr(8), o.gpr(9), o.frame64(false).sp), (0x33, 0x3b, USTACK));
        },
    );
    one(|| Machine::long().user(), 0, 0, |a| a.sysenter(), GP);
    one(Machine::long, 0, 0, |a| a.sysexit(), GP);
}

/// SWAPGS and the bases of FS and GS.
#[test]
fn fs_and_gs() {
    check(
        || {
            let mut m = Machine::long().code64(|a| {
                a.mov(eax, dword_ptr(8).gs())?;
                a.swapgs()?;
                a.mov(ebx, dword_ptr(8).gs())?;
                // A null selector clears the base on Intel processors.
                a.xor(ecx, ecx)?;
                a.mov(fs, ecx)?;
                a.mov(edx, dword_ptr(DATA).fs())?;
                a.hlt()
            });
            m.s.seg[usize::from(seg::GS)].base = DATA;
            m.s.seg[usize::from(seg::FS)].base = DATA + 0x3000;
            m.s.msr.kernel_gs_base = DATA + 0x1000;
            m.w32(DATA, 7);
            m.w32(DATA + 8, 1);
            m.w32(DATA + 0x1008, 2);
            m
        },
        |o| {
            o.halted();
            assert_eq!((o.gpr(0), o.gpr(3), o.gpr(2)), (1, 2, 7));
            assert_eq!(o.s.msr.kernel_gs_base, DATA);
        },
    );
}

/// MOV CR0 that sets TS makes the next x87 or SSE instruction #NM.
#[test]
fn task_switched() {
    let cases: [(Body, Option<(u8, u64)>); 2] =
        [(|a| a.fnop(), Some((7, 0))), (|a| a.movaps(xmm0, xmm1), Some((7, 0)))];
    for (body, error) in cases {
        let ts = || {
            let mut m = Machine::long();
            m.s.cr0 |= cr::CR0_TS;
            m
        };
        one(ts, 0, 0, body, error);
        one(Machine::long, 0, 0, body, None);
    }
}

/// SYSENTER and SYSEXIT at 32 bits, and SYSEXIT from 64-bit mode to 32-bit code.
#[test]
fn sysenter_32() {
    check(
        || {
            let mut m = Machine::flat32().user().flags(flag::IF).code32(|a| a.sysenter());
            m.s.msr.sysenter_cs = u64::from(CODE32);
            m.s.msr.sysenter_esp = STACK;
            m.s.msr.sysenter_eip = CODE;
            m.asm(32, CODE, |a| {
                a.pushfd()?;
                a.pop(ebx)?;
                a.mov(esi, cs)?;
                a.mov(edi, ss)?;
                a.mov(ecx, USTACK as u32)?;
                a.mov(edx, UCODE as u32 + 0x100)?;
                a.sysexit()
            });
            m.asm(32, UCODE + 0x100, |a| {
                a.mov(eax, cs)?;
                a.mov(ebp, ss)?;
                a.int(0x40)
            });
            m.gate_dpl(0x40, 3);
            m
        },
        |o| {
            assert_eq!(o.vector(), Some(0x40), "{}", o.engine);
            assert_eq!((o.gpr(6), o.gpr(7), o.gpr(3) & flag::IF), (0x18, 0x20, 0));
            assert_eq!((o.gpr(0), o.gpr(5), o.frame32(false).sp), (0x2b, 0x33, USTACK));
        },
    );
    check(
        || {
            let mut m = Machine::long().code64(|a| {
                a.mov(rcx, 1u64 << 32 | USTACK)?;
                a.mov(rdx, 1u64 << 32 | UCODE)?;
                a.sysexit()
            });
            m.s.msr.sysenter_cs = 0x10;
            m.asm(32, UCODE, |a| {
                a.dec(eax)?;
                a.int(0x40)
            });
            m.gate_dpl(0x40, 3);
            m
        },
        |o| {
            let f = o.exception(0x40);
            assert_eq!((f.cs, f.ss, f.ip, f.sp, o.gpr(0)), (0x23, 0x2b, UCODE + 3, USTACK, 0xffff_ffff));
        },
    );
    // From compatibility mode: SYSENTER enters 64-bit code, SYSCALL is #UD on Intel processors.
    let compat = || {
        let mut m = Machine::long().user();
        m.s.seg[usize::from(seg::CS)] = m.segment(USER32);
        m
    };
    check(
        || {
            let mut m = compat().code32(|a| a.sysenter());
            m.s.msr.sysenter_cs = 8;
            m.s.msr.sysenter_esp = STACK;
            m.s.msr.sysenter_eip = CODE;
            m.asm(64, CODE, |a| {
                a.mov(rax, 0x1122_3344_5566_7788u64)?;
                a.hlt()
            });
            m
        },
        |o| {
            o.halted();
            assert_eq!((o.gpr(0), o.s.cpl), (0x1122_3344_5566_7788, 0));
        },
    );
    check(
        || compat().code32(|a| a.syscall()),
        |o| {
            o.fault(6, 0, UCODE);
        },
    );
}
