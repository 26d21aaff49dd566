//! Tiny guests on the KVM of this host, be it an emulated one. Without any they say so.

use std::os::fd::AsRawFd;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use diglot_translator::engine::Vcpu as _;
use diglot_translator::engine::{
    CpuState, CpuidEntry, Due, DueKind, Exit, Kick, LapicState, Platform, Segment, VcpuSetup, Vm, cr, flag, gpr, seg,
};
use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{Kvm, KvmVm};
use crate::{LEAST_MIPS, VmOptions};

const CODE: u64 = 0x1_0000;
const DATA: u64 = 0x8_0000;
const RAM: usize = 1 << 20;
/// Where no RAM is and no device of KVM's own.
const MMIO: u32 = 0xd000_0000;

/// Of time-stamp counters, roughly.
const SECOND: u64 = 1_000_000_000;

/// What the guest did to the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Access {
    In(u16, u8),
    Out(u16, u8, u32),
    Read(u64, u8),
    Write(u64, u8, u64),
    EndOfInterrupt(u8),
}

/// Notes accesses; port 80h stops the vCPU, and an 8259's interrupt waits where one is put.
#[derive(Clone)]
struct Board {
    start: Instant,
    tsc_hz: u64,
    seen: Arc<Mutex<Vec<Access>>>,
    waiting: Arc<Mutex<Option<u8>>>,
    kick: Kick,
}

impl Board {
    fn note(&self, access: Access) {
        self.seen.lock().expect("no panic").push(access);
    }
}

impl Platform for Board {
    fn tsc(&mut self) -> u64 {
        (self.start.elapsed().as_secs_f64() * self.tsc_hz as f64) as u64
    }
    fn port_in(&mut self, port: u16, size: u8) -> u32 {
        self.note(Access::In(port, size));
        0x1122_3344
    }
    fn port_out(&mut self, port: u16, size: u8, value: u32) {
        if port == 0x80 {
            self.kick.request(Kick::STOP);
        }
        self.note(Access::Out(port, size, value));
    }
    fn mmio_read(&mut self, gpa: u64, size: u8) -> u64 {
        self.note(Access::Read(gpa, size));
        0x1122_3344_5566_7788
    }
    fn mmio_write(&mut self, gpa: u64, size: u8, value: u64) {
        self.note(Access::Write(gpa, size, value));
    }
    fn interrupt_pending(&mut self) -> bool {
        self.waiting.lock().expect("no panic").is_some()
    }
    fn acknowledge(&mut self) -> Option<u8> {
        self.waiting.lock().expect("no panic").take()
    }
    fn end_of_interrupt(&mut self, vector: u8) {
        self.note(Access::EndOfInterrupt(vector));
    }
}

struct Machine {
    vm: KvmVm,
    ram: Arc<GuestMemoryMmap>,
    board: Board,
}

impl Machine {
    /// A machine with memory and nothing else; `None` where there is no KVM, having said so.
    fn new() -> Option<Machine> {
        let kvm = match Kvm::open() {
            Ok(kvm) => kvm,
            Err(why) => {
                println!("skipped: {why}");
                return None;
            }
        };
        let ram = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).expect("memory"));
        let host: Vec<CpuidEntry> = kvm.cpuid().to_vec();
        let tsc_hz = kvm.tsc_hz(1_000_000_000);
        let options = VmOptions { ram: ram.clone(), cpuid: Box::new(move |_, _| host.clone()), tsc_hz };
        let vm = KvmVm::new(&kvm, options).expect("a machine");
        let board = Board {
            start: Instant::now(),
            tsc_hz,
            seen: Arc::default(),
            waiting: Arc::default(),
            kick: Kick::default(),
        };
        Some(Machine { vm, ram, board })
    }

    fn vcpu(&mut self, state: CpuState) -> Box<dyn diglot_translator::engine::Vcpu> {
        let (board, kick) = (self.board.clone(), self.board.kick.clone());
        let setup = VcpuSetup { state, platform: Box::new(board), kick, index: 0, count: 1 };
        self.vm.create_vcpu(setup).expect("a vCPU")
    }

    fn program(&self, code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) {
        let mut a = CodeAssembler::new(32).expect("an assembler");
        code(&mut a).expect("instructions that exist");
        let bytes = a.assemble(CODE).expect("code that can be encoded");
        self.ram.write_slice(&bytes, GuestAddress(CODE)).expect("inside");
    }

    fn seen(&self) -> Vec<Access> {
        self.board.seen.lock().expect("no panic").clone()
    }
}

fn flat(attr: u32) -> Segment {
    Segment { base: 0, limit: u32::MAX, attr, selector: 8 }
}

/// 32-bit protected mode without paging.
fn protected() -> CpuState {
    let mut s = CpuState::reset();
    s.rip = CODE;
    s.cr0 = cr::CR0_PE | cr::CR0_ET | cr::CR0_NE;
    s.seg = [Segment { selector: 16, ..flat(0xc093) }; 6];
    s.seg[usize::from(seg::CS)] = flat(0xc09b);
    s.gpr[usize::from(gpr::RSP)] = DATA;
    s.ldtr = Segment::default();
    s
}

/// 64-bit mode at CPL 3, with something in every register.
fn crowded() -> CpuState {
    let mut s = protected();
    for (k, register) in s.gpr.iter_mut().enumerate() {
        *register = 0x0123_4567_89ab_cdef_u64.rotate_left(4 * k as u32);
    }
    s.rip = 0x7fff_1234_5678;
    s.set_flags(flag::CF | flag::OF | flag::IF | flag::DF | flag::AC | flag::ID);
    s.cr0 |= cr::CR0_PG | cr::CR0_WP | cr::CR0_MP;
    (s.cr2, s.cr3, s.cr4) = (0x0dea_dbee_f000, 0x3000, cr::CR4_PAE | cr::CR4_PGE | cr::CR4_OSFXSR);
    s.efer = cr::EFER_LME | cr::EFER_LMA | cr::EFER_SCE | cr::EFER_NXE;
    s.seg = [Segment { selector: 0x2b, ..flat(0xc0f3) }; 6];
    s.seg[usize::from(seg::CS)] = Segment { selector: 0x33, ..flat(0xa0fb) };
    s.seg[usize::from(seg::FS)].base = 0x7f00_0000_1000;
    s.seg[usize::from(seg::GS)].base = 0xffff_8000_0000_2000;
    s.cpl = 3;
    s.tr = Segment { base: 0xffff_8000_0000_3000, limit: 0x67, attr: 0x8b, selector: 0x40 };
    (s.gdtr.base, s.gdtr.limit) = (0xffff_8000_0000_4000, 0x7f);
    (s.idtr.base, s.idtr.limit) = (0xffff_8000_0000_5000, 0xfff);
    for r in 0..16 {
        s.set_xmm(r, 0x1234_5678_9abc_def0_u128 << r);
    }
    s.mxcsr = 0x9fc0;
    s.x87.fcw = 0x27f;
    s.x87.fsw = 3 << 11 | 1;
    s.x87.ftw = 0b0011_1000;
    for (k, register) in s.x87.st.iter_mut().enumerate() {
        (register.mantissa, register.sign_exp) = (1 << 63 | k as u64, 0x3fff + k as u16);
    }
    (s.x87.fip, s.x87.fdp, s.x87.fop) = (0x7fff_1111, 0x7fff_2222, 0x1c8);
    s.dr = [0x1000, 0x2000, 0x3000, 0x4000, 0, 0, 0xffff_0ff1, 0x401];
    s.msr.lstar = 0xffff_ffff_8100_0000;
    s.msr.star = 0x0023_0010_0000_0000;
    s.msr.fmask = 0x47700;
    s.msr.kernel_gs_base = 0x7f00_0000_9000;
    s.msr.sysenter_cs = 0x10;
    s.msr.mtrr_def_type = 0xc06;
    s.msr.mtrr_fixed[0] = 0x0606_0606_0606_0606;
    s.msr.mtrr_variable[1] = [0x8000_0006, 0xf_8000_0800];
    s
}

/// By how many ticks the guest's time-stamp counter has moved against the machine's.
fn drift(after: &CpuState, before: &CpuState) -> u64 {
    (after.tsc_offset.wrapping_sub(before.tsc_offset) as i64).unsigned_abs()
}

#[test]
fn a_state_comes_out_as_it_went_in() {
    let Some(mut machine) = Machine::new() else { return };
    let mut vcpu = machine.vcpu(CpuState::reset());
    let kernel = || {
        let mut s = crowded();
        s.cpl = 0;
        s.seg[usize::from(seg::CS)] = Segment { selector: 0x10, ..flat(0xa09b) };
        s.seg[usize::from(seg::SS)] = Segment { selector: 0x18, ..flat(0xc093) };
        s
    };
    let states = [
        ("reset", CpuState::reset()),
        ("protected mode", protected()),
        ("64-bit user code", crowded()),
        ("halted", CpuState { halted: true, ..kernel() }),
        ("behind STI", CpuState { shadow: 1, ..kernel() }),
        ("behind MOV SS", CpuState { shadow: 2, ..kernel() }),
        ("in an NMI's handler", CpuState { nmi_blocked: true, ..kernel() }),
        (
            "a page fault due",
            CpuState { due: Some(Due { vector: 14, kind: DueKind::Exception(Some(2)) }), ..crowded() },
        ),
        ("#UD due", CpuState { due: Some(Due { vector: 6, kind: DueKind::Exception(None) }), ..crowded() }),
        ("an interrupt due", CpuState { due: Some(Due { vector: 0x41, kind: DueKind::Interrupt }), ..kernel() }),
        ("an NMI due", CpuState { due: Some(Due { vector: 2, kind: DueKind::Nmi }), ..kernel() }),
        ("a clock set back", CpuState { tsc_offset: 5_000_000_000_u64.wrapping_neg(), ..kernel() }),
        ("a clock set forward", CpuState { tsc_offset: 1 << 50, ..kernel() }),
    ];
    // An emulated KVM may show the host's counter whatever it is told.
    let far = CpuState { tsc_offset: 1 << 40, ..protected() };
    vcpu.set_state(&far).expect("a state");
    let has_clock = drift(&vcpu.state().expect("a state"), &far) < SECOND;
    if !has_clock {
        println!("skipped: the time-stamp counter, which this KVM does not let guests have of their own");
    }
    for (name, state) in states {
        vcpu.set_state(&state).expect(name);
        let after = vcpu.state().expect(name);
        assert!(!has_clock || drift(&after, &state) < SECOND, "{name}");
        // SVM does not tell one shadow from the other.
        assert_eq!(after.shadow != 0, state.shadow != 0, "{name}");
        assert_eq!(CpuState { tsc_offset: state.tsc_offset, shadow: state.shadow, ..after }, state, "{name}");
    }
}

#[test]
fn a_local_apic_comes_out_as_it_went_in() {
    let Some(mut machine) = Machine::new() else { return };
    let mut vcpu = machine.vcpu(CpuState::reset());
    let mut state = vcpu.lapic().expect("a local APIC").expect("one of its own");
    // Task priority, destination, spurious vector, one vector in service and one waiting, the timer's mode, divider.
    for (n, value) in
        [(0x8, 0x20), (0xd, 1 << 24), (0xf, 0x1ff), (0x12, 1 << 5), (0x21, 1), (0x32, 0x4_0030), (0x3e, 0xb)]
    {
        state.registers[n] = value;
    }
    state.nmi = true;
    vcpu.set_lapic(&state).expect("a local APIC");
    let LapicState { base, registers, nmi, .. } = vcpu.lapic().expect("a local APIC").expect("one of its own");
    assert_eq!((base, nmi), (state.base, true));
    for n in [0x2, 0x8, 0xd, 0xf, 0x12, 0x21, 0x32, 0x3e] {
        assert_eq!(registers[n], state.registers[n], "register {n:#x}");
    }
}

#[test]
fn accesses_reach_the_machine() {
    let Some(mut machine) = Machine::new() else { return };
    machine.ram.write_slice(b"abcdef", GuestAddress(DATA)).expect("inside");
    machine.program(|a| {
        a.in_(eax, 0x60u32)?;
        a.mov(ptr(DATA as u32 + 0x100), eax)?;
        a.in_(al, 0x61u32)?;
        a.mov(esi, DATA as u32)?;
        a.mov(edx, 0x1f0)?;
        a.mov(ecx, 3)?;
        a.rep().outsw()?;
        a.mov(eax, ptr(MMIO + 8))?;
        a.mov(ptr(DATA as u32 + 0x104), eax)?;
        a.mov(word_ptr(MMIO + 2), 0x55aa)?;
        a.out(0x80u32, al)?;
        a.inc(ebx)?;
        a.out(0x80u32, al)
    });
    let mut vcpu = machine.vcpu(protected());
    assert_eq!(vcpu.run(), Exit::Stopped);
    let seen = machine.seen();
    let expected = [
        Access::In(0x60, 4),
        Access::In(0x61, 1),
        Access::Out(0x1f0, 2, 0x6261),
        Access::Out(0x1f0, 2, 0x6463),
        Access::Out(0x1f0, 2, 0x6665),
        Access::Read(u64::from(MMIO) + 8, 4),
        Access::Write(u64::from(MMIO) + 2, 2, 0x55aa),
        Access::Out(0x80, 1, 0x88),
    ];
    assert_eq!(seen, expected);
    let read = |at| machine.ram.read_obj::<u32>(GuestAddress(at)).expect("inside");
    assert_eq!([read(DATA + 0x100), read(DATA + 0x104)], [0x1122_3344, 0x5566_7788]);
    // The access that it stopped in is complete, and nothing behind it has been executed.
    let state = vcpu.state().expect("a state");
    assert_eq!(state.gpr[usize::from(gpr::RBX)], protected().gpr[usize::from(gpr::RBX)]);
    assert_eq!(machine.ram.read_obj::<u8>(GuestAddress(state.rip)).expect("inside"), 0x43, "at INC EBX");
}

/// An interrupt of the 8259s waits until the guest can take it, and wakes it from HLT.
#[test]
fn interrupts_of_the_8259s_are_delivered() {
    let Some(mut machine) = Machine::new() else { return };
    const IDT: u64 = 0x2000;
    const HANDLER: u32 = CODE as u32 + 0x100;
    const GDT: u64 = 0x3000;
    for (n, descriptor) in [(1, 0x00cf_9b00_0000_ffff_u64), (2, 0x00cf_9300_0000_ffff)] {
        machine.ram.write_obj(descriptor, GuestAddress(GDT + 8 * n)).expect("inside");
    }
    let gate = u64::from(HANDLER & 0xffff) | 8 << 16 | 0x8e00 << 32 | u64::from(HANDLER >> 16) << 48;
    machine.ram.write_obj(gate, GuestAddress(IDT + 8 * 0x41)).expect("inside");
    machine.program(|a| {
        let mut again = a.create_label();
        a.mov(ecx, 1000)?;
        a.set_label(&mut again)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.mov(al, 1)?;
        a.out(0x70u32, al)?;
        a.sti()?;
        a.hlt()
    });
    // out 71h, al; out 80h, al
    machine.ram.write_slice(&[0xe6, 0x71, 0xe6, 0x80], GuestAddress(HANDLER.into())).expect("inside");
    *machine.board.waiting.lock().expect("no panic") = Some(0x41);
    let mut s = protected();
    (s.idtr.base, s.idtr.limit) = (IDT, 0x7ff);
    (s.gdtr.base, s.gdtr.limit) = (GDT, 0x17);
    let mut vcpu = machine.vcpu(s);
    // The 8259's line to the local APIC lets it through, as firmware leaves it.
    let mut lapic = vcpu.lapic().expect("a local APIC").expect("one of its own");
    (lapic.registers[0xf], lapic.registers[0x35]) = (0x1ff, 0x700);
    vcpu.set_lapic(&lapic).expect("a local APIC");
    assert_eq!(vcpu.run(), Exit::Stopped);
    let ports: Vec<u16> =
        machine.seen().iter().filter_map(|a| if let Access::Out(port, ..) = a { Some(*port) } else { None }).collect();
    assert_eq!(ports, [0x70, 0x71, 0x80]);
}

/// Another thread stops a vCPU that loops, one that is halted in the kernel, and one that has not begun.
#[test]
fn a_kick_comes_through() {
    let Some(mut machine) = Machine::new() else { return };
    type Code = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let loops: Code = |a| {
        let mut here = a.create_label();
        a.set_label(&mut here)?;
        a.jmp(here)
    };
    let halts: Code = |a| a.hlt();
    let mut vcpu = machine.vcpu(protected());
    for (name, code, wait) in [("loop", loops, 20), ("halt", halts, 20), ("at once", loops, 0)] {
        machine.program(code);
        vcpu.set_state(&protected()).expect("a state");
        let kick = machine.board.kick.clone();
        let (done, is_done) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(wait));
            // Attention alone lets it go on.
            kick.request(Kick::ATTENTION);
            kick.request(Kick::STOP);
            is_done.recv_timeout(Duration::from_secs(20)).unwrap_or_else(|_| panic!("{name}: not stopped"));
        });
        assert_eq!(vcpu.run(), Exit::Stopped, "{name}");
        done.send(()).expect("the other thread waits");
        thread.join().expect(name);
    }
    assert!(vcpu.state().expect("a state").rip < CODE + 0x10);
}

#[test]
fn what_cannot_go_on_says_where_it_is() {
    let Some(mut machine) = Machine::new() else { return };
    // A jump to where there is no memory.
    machine.program(|a| {
        a.mov(eax, MMIO)?;
        a.jmp(eax)
    });
    let mut vcpu = machine.vcpu(protected());
    let Exit::Failed(why) = vcpu.run() else { panic!("it went on") };
    let first = why.lines().next().unwrap_or_default();
    assert!(first.contains("KVM_EXIT_INTERNAL_ERROR"), "{why}");
    assert!(why.contains("RIP 00000000d0000000") && why.contains("bytes at RIP: none that are RAM"), "{why}");
    // A third fault for want of any handler.
    machine.program(|a| a.ud2());
    vcpu.set_state(&CpuState { idtr: Default::default(), ..protected() }).expect("a state");
    assert!(matches!(vcpu.run(), Exit::Shutdown(place) if place.contains("CR0")));
}

#[test]
fn pages_that_the_guest_writes_are_logged() {
    let Some(mut machine) = Machine::new() else { return };
    machine.program(|a| {
        a.mov(dword_ptr(DATA as u32 + 0x3010), 1)?;
        a.mov(dword_ptr(DATA as u32 + 0x5ffc), 1)?;
        a.out(0x80u32, al)
    });
    let mut vcpu = machine.vcpu(protected());
    machine.vm.log_writes(true).expect("a log");
    assert_eq!(vcpu.run(), Exit::Stopped);
    let pages = |machine: &Machine| -> Vec<u64> {
        let written = machine.vm.written().expect("a log");
        assert_eq!((written.len(), written[0].start, written[0].pages.len()), (1, 0, RAM / 4096 / 64));
        (0..RAM as u64 / 4096).filter(|n| written[0].pages[(n / 64) as usize] >> (n % 64) & 1 != 0).collect()
    };
    // A page that was mapped to be written, though nothing was, may be among them: the code's.
    let written: Vec<u64> = pages(&machine).into_iter().filter(|&n| n != CODE / 4096).collect();
    assert_eq!(written, [DATA / 4096 + 3, DATA / 4096 + 5]);
    assert_eq!(pages(&machine), [0u64; 0], "what was told is forgotten");
    machine.vm.log_writes(false).expect("no log");
}

/// A code segment that is for 64 bits and for 32 at once: no processor enters that.
#[test]
fn what_cannot_be_entered_says_so() {
    let Some(mut machine) = Machine::new() else { return };
    if Kvm::open().is_ok_and(|kvm| kvm.offer().mips < LEAST_MIPS) {
        println!("skipped: this KVM is emulated, and enters anything");
        return;
    }
    let mut s = crowded();
    s.cpl = 0;
    s.seg[usize::from(seg::CS)] = Segment { selector: 0x10, ..flat(0xe09b) };
    s.seg[usize::from(seg::SS)] = Segment { selector: 0x18, ..flat(0xc093) };
    let Exit::Failed(why) = machine.vcpu(s).run() else { panic!("it was entered") };
    assert!(why.starts_with("the processor refused to enter the guest") && why.contains("RFLAGS"), "{why}");
}

/// Calls that fail in the middle of a run end it, with what failed.
#[test]
fn a_vcpu_that_fails_says_what() {
    let Some(machine) = Machine::new() else { return };
    machine.program(|a| a.hlt());
    let (board, kick) = (machine.board.clone(), machine.board.kick.clone());
    let setup = VcpuSetup { state: protected(), platform: Box::new(board), kick, index: 0, count: 1 };
    let mut vcpu = super::vcpu::Vcpu::new(&machine.vm, setup).expect("a vCPU");
    let null = std::fs::File::open("/dev/null").expect("a file");
    // SAFETY: the vCPU's file becomes another one, on which no call of KVM's does anything; its run page stays mapped.
    assert!(unsafe { libc::dup2(null.as_raw_fd(), vcpu.as_raw_fd()) } >= 0);
    let Exit::Failed(why) = vcpu.run() else { panic!("it ran") };
    assert!(why.starts_with("KVM refused to run the guest: Inappropriate ioctl"), "{why}");
    for error in [vcpu.state().err(), vcpu.set_state(&protected()).err(), vcpu.lapic().err()] {
        let text = error.map(|e| e.to_string()).unwrap_or_default();
        assert!(text.starts_with("KVM refused to ") && text.contains("Inappropriate ioctl"), "{text}");
    }
}

/// MSRs that KVM does not have come to us: what the machine has is there, another raises #GP.
#[test]
fn msrs_that_kvm_lacks_are_the_machines() {
    let Some(mut machine) = Machine::new() else { return };
    machine.program(|a| {
        a.mov(ecx, 0x17)?;
        a.rdmsr()?;
        a.out(0x70u32, eax)?;
        a.mov(ecx, 0x1234_5678)?;
        a.rdmsr()?;
        a.out(0x71u32, eax)
    });
    let mut vcpu = machine.vcpu(CpuState { idtr: Default::default(), ..protected() });
    assert!(matches!(vcpu.run(), Exit::Shutdown(_)), "#GP without a handler");
    assert_eq!(machine.seen(), [Access::Out(0x70, 4, 0)]);
    let counts = vcpu.counters();
    let count = |name| counts.iter().find(|(n, _)| *n == name).map(|(_, n)| *n);
    assert_eq!(count("unknown_msr"), Some(1));
}
