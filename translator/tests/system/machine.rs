//! A tiny machine to run guest code in: descriptor tables, page tables, handlers that halt, and a board whose ports
//! raise interrupts. The same guest runs on every engine.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use diglot_translator::cpu::Cpu;
use diglot_translator::cpuid::{CpuModel, Level};
use diglot_translator::jit::Jit;
use diglot_translator::mem::GuestRam;
use diglot_translator::platform::Platform;
use diglot_translator::state::{CpuState, Segment, Table, cr, gpr, seg};
use diglot_translator::vcpu::{Exit, Vcpu};
use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Bytes of RAM, all of it mapped one to one; what lies behind is MMIO.
pub const RAM: u64 = 8 << 20;
pub const GDT: u64 = 0x1000;
pub const IDT: u64 = 0x2000;
pub const TSS: u64 = 0x3000;
/// 16 bytes for each vector: a HLT, where the run ends.
pub const HANDLERS: u64 = 0x4000;
/// Initial stack pointer at CPL 0.
pub const STACK: u64 = 0x8000;
/// Stack pointer for level 0 in the TSS.
pub const STACK0: u64 = 0xa000;
/// The first entry of the interrupt stack table.
pub const IST1: u64 = 0xc000;
/// Page tables: PML4, PDPT, PD (for 32-bit paging its page directory stands at PML4), four PTs.
pub const PML4: u64 = 0x2_0000;
pub const PDPT: u64 = 0x2_1000;
pub const PD: u64 = 0x2_2000;
pub const PT: u64 = 0x2_3000;
/// The root of another address space, whose tables are the four pages from there on.
pub const OTHER: u64 = 0x4_0000;
/// Where code starts at CPL 0, and its data.
pub const CODE: u64 = 0x10_0000;
pub const DATA: u64 = 0x18_0000;
/// User pages: 200000h to 3FFFFFh.
pub const UCODE: u64 = 0x20_0000;
pub const UDATA: u64 = 0x28_0000;
pub const USTACK: u64 = 0x30_8000;
/// Linear addresses from here on have no page-table entries in the lower half.
pub const UNMAPPED: u64 = RAM;

/// Selectors.
pub const CODE64: u16 = 0x08;
pub const DATA0: u16 = 0x10;
pub const CODE32: u16 = 0x18;
pub const USER32: u16 = 0x23;
pub const USER_DATA: u16 = 0x2b;
pub const USER64: u16 = 0x33;
pub const TSS_SEL: u16 = 0x38;
pub const CODE16: u16 = 0x48;
pub const DATA16: u16 = 0x50;
/// From here on a case may place its own descriptors.
pub const FREE: u16 = 0x58;

/// Paging-structure entry bits.
pub const P: u64 = 1;
pub const W: u64 = 2;
pub const U: u64 = 4;
pub const A: u64 = 0x20;
pub const D: u64 = 0x40;
pub const PS: u64 = 0x80;
pub const G: u64 = 0x100;
pub const NX: u64 = 1 << 63;

/// Port whose output raises that interrupt vector.
pub const PORT_IRQ: u32 = 0x10;
/// Port whose output raises an NMI.
pub const PORT_NMI: u32 = 0x11;
/// A guest physical address outside RAM whose reads raise interrupt [`DEVICE_IRQ`].
pub const DEVICE: u64 = 0xfd00_0000;
pub const DEVICE_IRQ: u8 = 0x51;
/// A write to this port disables the local APIC.
pub const PORT_APIC_OFF: u32 = 0x12;

/// What the board was told.
#[derive(Default)]
pub struct BoardState {
    pub irqs: VecDeque<u8>,
    pub nmis: u32,
    pub tpr: u64,
    pub tsc: u64,
    pub apic_off: bool,
    /// Port accesses: port, size, value (reads have `None`).
    pub ports: Vec<(u16, u8, Option<u32>)>,
}

struct Board(Arc<Mutex<BoardState>>);

impl Platform for Board {
    fn port_in(&mut self, port: u16, size: u8) -> u32 {
        self.0.lock().unwrap().ports.push((port, size, None));
        0x1234_5678
    }
    fn port_out(&mut self, port: u16, size: u8, value: u32) {
        let mut b = self.0.lock().unwrap();
        match u32::from(port) {
            PORT_IRQ => b.irqs.push_back(value as u8),
            PORT_NMI => b.nmis += 1,
            PORT_APIC_OFF => b.apic_off = true,
            _ => b.ports.push((port, size, Some(value))),
        }
    }
    fn mmio_read(&mut self, gpa: u64, _size: u8) -> u64 {
        if gpa == DEVICE {
            self.0.lock().unwrap().irqs.push_back(DEVICE_IRQ);
        }
        u64::MAX
    }
    fn tsc(&mut self) -> u64 {
        let mut b = self.0.lock().unwrap();
        b.tsc += 1;
        b.tsc
    }
    fn apic_enabled(&mut self) -> bool {
        !self.0.lock().unwrap().apic_off
    }
    fn cr8(&mut self) -> u64 {
        self.0.lock().unwrap().tpr
    }
    fn set_cr8(&mut self, value: u64) {
        self.0.lock().unwrap().tpr = value;
    }
    fn interrupt_pending(&mut self) -> bool {
        let b = self.0.lock().unwrap();
        b.irqs.front().is_some_and(|&v| u64::from(v >> 4) > b.tpr)
    }
    fn acknowledge(&mut self) -> Option<u8> {
        self.0.lock().unwrap().irqs.pop_front()
    }
    fn take_nmi(&mut self) -> bool {
        let mut b = self.0.lock().unwrap();
        let any = b.nmis > 0;
        b.nmis -= u32::from(any);
        any
    }
}

/// Bytes of code memory.
const CODE_MEMORY: usize = 4 << 20;

/// A guest before it runs.
pub struct Machine {
    pub s: CpuState,
    memory: Arc<GuestMemoryMmap>,
    /// Whether compiled code can run in this case: the compiler's engine must have used it then.
    pub compiles: bool,
    /// Runs of a block before it is compiled; regions that shall have loops need several.
    pub patience: u32,
    /// How often every access is taken to have strayed.
    strayed: u8,
    /// Whether branches into other pages are hot: the compiler's engine must have led them there then.
    pub bridges: bool,
    /// Bytes of code memory; less than usual is meant to be too little.
    pub code_memory: usize,
    /// Where the next handler's code goes.
    next_code: u64,
}

/// What came of a run.
pub struct Outcome {
    pub engine: &'static str,
    pub exit: Exit,
    pub s: CpuState,
    pub board: Arc<Mutex<BoardState>>,
    memory: Arc<GuestMemoryMmap>,
}

/// An interrupt frame.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub struct Frame {
    pub error: Option<u64>,
    pub ip: u64,
    pub cs: u64,
    pub flags: u64,
    pub sp: u64,
    pub ss: u64,
}

/// Whether a vector pushes an error code.
pub fn has_error(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17)
}

/// A code or data descriptor.
pub fn descriptor(base: u32, limit: u32, attr: u64) -> u64 {
    let (base, limit) = (u64::from(base), u64::from(limit));
    limit & 0xffff | (base & 0xff_ffff) << 16 | (attr & 0xf0ff) << 40 | (limit >> 16 & 15) << 48 | (base >> 24) << 56
}

/// A gate with a 32-bit offset (the first half of a 64-bit one).
pub fn gate(selector: u16, offset: u64, kind: u64, dpl: u64) -> u64 {
    offset & 0xffff | u64::from(selector) << 16 | (kind | dpl << 5 | 0x80) << 40 | (offset >> 16 & 0xffff) << 48
}

impl Machine {
    fn bare() -> Machine {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
        let mut m = Machine {
            s: CpuState::reset(),
            memory: Arc::new(memory),
            compiles: false,
            patience: 1,
            strayed: 0,
            bridges: false,
            code_memory: CODE_MEMORY,
            next_code: 0x6_0000,
        };
        for (selector, raw) in [
            (CODE64, descriptor(0, 0xfffff, 0xa09b)),
            (DATA0, descriptor(0, 0xfffff, 0xc093)),
            (CODE32, descriptor(0, 0xfffff, 0xc09b)),
            (USER32, descriptor(0, 0xfffff, 0xc0fb)),
            (USER_DATA, descriptor(0, 0xfffff, 0xc0f3)),
            (USER64, descriptor(0, 0xfffff, 0xa0fb)),
            (TSS_SEL, descriptor(TSS as u32, 0x67, 0x8b)),
            (CODE16, descriptor(0, 0xffff, 0x9b)),
            (DATA16, descriptor(0, 0xffff, 0x93)),
        ] {
            m.gdt(selector, raw);
        }
        m.s.gdtr = Table { base: GDT, limit: 0xfff };
        for v in 0..256 {
            m.w8(HANDLERS + 16 * v, 0xf4);
        }
        m.w16(TSS + 0x66, 0x68);
        m.s.tr = Segment { base: TSS, limit: 0x67, attr: 0x8b, selector: TSS_SEL };
        m.s.ldtr = Segment::default();
        m.s.gpr = [0; 16];
        m.s.gpr[usize::from(gpr::RSP)] = STACK;
        m.s.rip = CODE;
        m.s.dr[7] = 0x400;
        m
    }

    /// 64-bit mode at CPL 0 with 4-level paging.
    pub fn long() -> Machine {
        let mut m = Machine::bare();
        m.compiles = true;
        m.s.cr0 = cr::CR0_PE | cr::CR0_PG | cr::CR0_WP | cr::CR0_ET | cr::CR0_NE;
        m.s.cr4 = cr::CR4_PAE | cr::CR4_OSFXSR | cr::CR4_OSXMMEXCPT;
        m.s.efer = cr::EFER_LME | cr::EFER_LMA | cr::EFER_NXE | cr::EFER_SCE;
        m.s.cr3 = PML4;
        m.w64(PML4, PDPT | P | W | U);
        m.w64(PDPT, PD | P | W | U);
        m.fill_tables8();
        m.s.idtr = Table { base: IDT, limit: 0xfff };
        for v in 0..=255u8 {
            m.gate64(v, HANDLERS + 16 * u64::from(v), 14, 0, 0);
        }
        m.w64(TSS + 4, STACK0);
        m.w64(TSS + 0x24, IST1);
        m.set_segments(CODE64, DATA0, 0);
        m
    }

    /// 32-bit protected mode at CPL 0 with flat segments and no paging.
    pub fn flat32() -> Machine {
        let mut m = Machine::bare();
        m.compiles = true;
        m.s.cr0 = cr::CR0_PE | cr::CR0_ET | cr::CR0_NE;
        m.s.idtr = Table { base: IDT, limit: 0x7ff };
        for v in 0..=255u8 {
            m.gate32(v, CODE32, HANDLERS + 16 * u64::from(v), 14, 0);
        }
        m.w32(TSS + 4, STACK0 as u32);
        m.w32(TSS + 8, u32::from(DATA0));
        m.set_segments(CODE32, DATA0, 0);
        m
    }

    /// 32-bit protected mode with PAE paging.
    pub fn pae() -> Machine {
        let mut m = Machine::flat32();
        m.s.cr0 |= cr::CR0_PG | cr::CR0_WP;
        m.s.cr4 = cr::CR4_PAE;
        m.s.efer = cr::EFER_NXE;
        m.s.cr3 = PDPT;
        m.w64(PDPT, PD | P);
        m.fill_tables8();
        m
    }

    /// 32-bit protected mode with 32-bit paging.
    pub fn paging32() -> Machine {
        let mut m = Machine::flat32();
        m.s.cr0 |= cr::CR0_PG | cr::CR0_WP;
        m.s.cr4 = cr::CR4_PSE;
        m.s.cr3 = PML4;
        for n in 0..2 {
            m.w32(PML4 + 4 * n, (PT + 0x1000 * n | P | W | U) as u32);
        }
        for n in 0..RAM >> 12 {
            let user = if (0x200..0x400).contains(&n) { U } else { 0 };
            m.w32(PT + 4 * n, (n << 12 | P | W | user) as u32);
        }
        m
    }

    /// Real-address mode with all segments at 0; code starts at 8000h, the stack below it.
    pub fn real() -> Machine {
        let mut m = Machine::bare();
        m.s.seg[usize::from(seg::CS)] = Segment { base: 0, limit: 0xffff, attr: 0x9b, selector: 0 };
        m.s.idtr = Table { base: 0, limit: 0x3ff };
        for v in 0..256 {
            m.w32(4 * v, (HANDLERS + 16 * v) as u32);
        }
        m.s.rip = 0x8000;
        m.s.gpr[usize::from(gpr::RSP)] = 0x7000;
        m
    }

    fn fill_tables8(&mut self) {
        for n in 0..4 {
            self.w64(PD + 8 * n, PT + 0x1000 * n | P | W | U);
        }
        for n in 0..RAM >> 12 {
            let user = if (0x200..0x400).contains(&n) { U } else { 0 };
            self.w64(PT + 8 * n, n << 12 | P | W | user);
        }
    }

    fn set_segments(&mut self, cs: u16, data: u16, cpl: u8) {
        for r in 0..6 {
            self.s.seg[r] = self.segment(data);
        }
        self.s.seg[usize::from(seg::CS)] = self.segment(cs);
        self.s.cpl = cpl;
    }

    /// The segment register that loading a selector gives.
    pub fn segment(&self, selector: u16) -> Segment {
        let raw = self.r64(GDT + u64::from(selector & 0xfff8));
        let attr = (raw >> 40) as u32 & 0xf0ff;
        let limit = (raw & 0xffff | raw >> 32 & 0xf_0000) as u32;
        Segment {
            base: raw >> 16 & 0xff_ffff | (raw >> 56) << 24,
            limit: if attr & Segment::G != 0 { limit << 12 | 0xfff } else { limit },
            attr,
            selector,
        }
    }

    /// Starts at CPL 3 instead, at [`UCODE`]; 64-bit or 32-bit code.
    pub fn user(mut self) -> Machine {
        let cs = if self.s.efer & cr::EFER_LMA != 0 { USER64 } else { USER32 };
        self.set_segments(cs, USER_DATA, 3);
        self.s.rip = UCODE;
        self.s.gpr[usize::from(gpr::RSP)] = USTACK;
        self
    }

    /// The case is about what only the interpreter does.
    pub fn interpreted(mut self) -> Machine {
        self.compiles = false;
        self
    }

    pub fn gdt(&mut self, selector: u16, raw: u64) {
        self.w64(GDT + u64::from(selector & 0xfff8), raw);
    }

    /// Sets a gate of the long-mode IDT.
    pub fn gate64(&mut self, v: u8, offset: u64, kind: u64, dpl: u64, ist: u64) {
        let at = IDT + 16 * u64::from(v);
        self.w64(at, gate(CODE64, offset, kind, dpl) | ist << 32);
        self.w64(at + 8, offset >> 32);
    }

    /// Sets a gate of the 32-bit IDT.
    pub fn gate32(&mut self, v: u8, selector: u16, offset: u64, kind: u64, dpl: u64) {
        self.w64(IDT + 8 * u64::from(v), gate(selector, offset, kind, dpl));
    }

    /// Changes the DPL of a gate.
    pub fn gate_dpl(&mut self, v: u8, dpl: u64) {
        let size = if self.s.efer & cr::EFER_LMA != 0 { 16 } else { 8 };
        let at = IDT + size * u64::from(v);
        let raw = self.r64(at);
        self.w64(at, raw & !(3 << 45) | dpl << 45);
    }

    /// Puts code at an address (linear and physical are the same).
    pub fn asm(&mut self, bits: u32, at: u64, f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> u64 {
        let mut a = CodeAssembler::new(bits).unwrap();
        f(&mut a).unwrap();
        let bytes = a.assemble(at).unwrap();
        self.bytes(at, &bytes);
        at + bytes.len() as u64
    }

    /// Puts 64-bit code where the machine starts.
    pub fn code64(mut self, f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Machine {
        let at = self.s.rip;
        self.asm(64, at, f);
        self
    }

    /// Puts 32-bit code where the machine starts.
    pub fn code32(mut self, f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Machine {
        let at = self.s.rip;
        self.asm(32, at, f);
        self
    }

    /// Puts 16-bit code where the machine starts.
    pub fn code16(mut self, f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Machine {
        let at = self.s.rip;
        self.asm(16, at, f);
        self
    }

    /// Gives a vector of its own a handler with code.
    pub fn handler(&mut self, v: u8, f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) {
        let long = self.s.efer & cr::EFER_LMA != 0;
        let at = self.next_code;
        self.next_code += 0x100;
        self.asm(if long { 64 } else { 32 }, at, f);
        if long { self.gate64(v, at, 14, 0, 0) } else { self.gate32(v, CODE32, at, 14, 0) }
    }

    pub fn bytes(&mut self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }
    pub fn w8(&mut self, at: u64, v: u8) {
        self.bytes(at, &[v]);
    }
    pub fn w16(&mut self, at: u64, v: u16) {
        self.bytes(at, &v.to_le_bytes());
    }
    pub fn w32(&mut self, at: u64, v: u32) {
        self.bytes(at, &v.to_le_bytes());
    }
    pub fn w64(&mut self, at: u64, v: u64) {
        self.bytes(at, &v.to_le_bytes());
    }
    pub fn r64(&self, at: u64) -> u64 {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    /// Sets flag bits.
    pub fn flags(mut self, bits: u64) -> Machine {
        self.s.rflags |= bits;
        self
    }

    /// Copies the page tables to [`OTHER`], where the page of `linear` has this entry.
    pub fn other_address_space(&mut self, linear: u64, entry: u64) {
        for (k, from) in [PML4, PDPT, PD, PT].into_iter().enumerate() {
            for n in 0..512 {
                let entry = self.r64(from + 8 * n);
                self.w64(OTHER + 0x1000 * k as u64 + 8 * n, entry);
            }
            if k > 0 {
                let table = OTHER + 0x1000 * k as u64;
                self.w64(table - 0x1000, table | P | W | U);
            }
        }
        self.w64(OTHER + 0x3000 + (linear >> 12) * 8, entry);
    }

    /// Where the leaf entry of a linear address stands (8-byte entries).
    pub fn pte_at(linear: u64) -> u64 {
        PT + 8 * (linear >> 12)
    }

    /// Replaces the leaf entry of a linear address (8-byte entries).
    pub fn pte(&mut self, linear: u64, entry: u64) {
        self.w64(Machine::pte_at(linear), entry);
    }

    fn ram(&self) -> Vec<u8> {
        let mut all = vec![0; RAM as usize];
        self.memory.read_slice(&mut all, GuestAddress(0)).unwrap();
        all
    }

    /// Runs once on the interpreter, or with the compiler, making quick code or regions; then once more, when everything
    /// that ran before is compiled.
    fn run(self, kind: Kind, check: &dyn Fn(&Outcome)) {
        let compiler = kind != Kind::Interpreter;
        let image = compiler.then(|| self.ram());
        let ram = Arc::new(GuestRam::new(self.memory.clone()));
        let board = Arc::new(Mutex::new(BoardState::default()));
        let mut cpu = Cpu::new(ram.clone(), Box::new(Board(board.clone())), CpuModel::new(Level::Max, 1, 0));
        cpu.set_state(self.s.clone());
        let mut jit = compiler.then(|| Jit::new(self.code_memory, 1).unwrap());
        jit.iter_mut().for_each(|jit| jit.options.strayed = self.strayed);
        let mut vcpu = Vcpu::new(cpu, jit);
        match kind {
            Kind::Quick => vcpu.set_quick(1, 1 << 30),
            _ => vcpu.set_threshold(self.patience),
        }
        let outcome = |engine, exit, vcpu: &Vcpu| Outcome {
            engine,
            exit,
            s: vcpu.cpu.s.clone(),
            board: board.clone(),
            memory: self.memory.clone(),
        };
        let exit = drive(&mut vcpu);
        let [first, second] = match kind {
            Kind::Interpreter => ["interpreter"; 2],
            Kind::Quick => ["quick code, first pass", "quick code, second pass"],
            Kind::Regions => ["compiler, first pass", "compiler, second pass"],
        };
        check(&outcome(first, exit, &vcpu));
        let Some(image) = image else { return };
        let mut rewritten = false;
        for page in (0..RAM).step_by(4096) {
            let at = page as usize;
            let old = &image[at..at + 4096];
            let mut now = [0; 4096];
            self.memory.read_slice(&mut now, GuestAddress(page)).unwrap();
            if old != now {
                rewritten |= ram.code_granules(page) != 0;
                self.memory.write_slice(old, GuestAddress(page)).unwrap();
            }
        }
        if !rewritten {
            *board.lock().unwrap() = BoardState::default();
            vcpu.cpu.set_state(self.s.clone());
            let exit = drive(&mut vcpu);
            check(&outcome(second, exit, &vcpu));
        }
        assert!(!self.compiles || vcpu.counts.entries > 0, "no compiled code ran");
        // What crosses pages itself has no quick code.
        let bridges = self.bridges && kind == Kind::Regions;
        assert!(!bridges || vcpu.counts.bridged > 0, "no branch was led into another page");
        let evicted = vcpu.jit.map_or(0, |jit| jit.counts.evicted);
        assert!(self.code_memory == CODE_MEMORY || evicted > 0, "there was room for everything");
    }
}

/// What evaluates the guest's code.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Interpreter,
    Quick,
    Regions,
}

fn drive(vcpu: &mut Vcpu) -> Exit {
    for _ in 0..20_000 {
        let exit = vcpu.turn();
        if let Some(jit) = &vcpu.jit {
            jit.drain();
        }
        if let Some(exit) = exit {
            return exit;
        }
    }
    panic!("the guest does not end: rip {:#x}", vcpu.cpu.s.rip);
}

/// Runs a guest on every engine and checks what came of it. (Miri executes no code but Rust's.)
pub fn check(build: impl Fn() -> Machine, expect: impl Fn(&Outcome)) {
    build().run(Kind::Interpreter, &expect);
    if !cfg!(miri) {
        build().run(Kind::Quick, &expect);
        // Loops look for what they access in another way once they have strayed.
        for strayed in 0..if build().patience > 1 { 3 } else { 1 } {
            let mut machine = build();
            machine.strayed = strayed;
            machine.run(Kind::Regions, &expect);
        }
    }
}

impl Outcome {
    /// The vector whose halting handler the run ended in.
    pub fn vector(&self) -> Option<u8> {
        let at = self.s.rip.wrapping_sub(HANDLERS);
        (self.exit == Exit::Halt && at < 0x1000 && at % 16 == 1).then_some((at / 16) as u8)
    }

    /// Asserts that the run ended with an exception and gives its frame.
    #[track_caller]
    pub fn exception(&self, vector: u8) -> Frame {
        assert_eq!(self.vector(), Some(vector), "{}: exit {:?} at {:#x}", self.engine, self.exit, self.s.rip);
        if self.s.efer & cr::EFER_LMA != 0 { self.frame64(has_error(vector)) } else { self.frame32(has_error(vector)) }
    }

    /// Asserts an exception with an error code at an instruction.
    #[track_caller]
    pub fn fault(&self, vector: u8, error: u64, ip: u64) -> Frame {
        let f = self.exception(vector);
        let wanted = has_error(vector).then_some(error);
        assert_eq!(f.error, wanted, "{}: error code ({:x?})", self.engine, f);
        assert_eq!(f.ip, ip, "{}: RIP {:#x}, expected {ip:#x}", self.engine, f.ip);
        f
    }

    /// Asserts that the run ended at a HLT of its own.
    #[track_caller]
    pub fn halted(&self) {
        let where_ = self.s.rip;
        assert_eq!(self.exit, Exit::Halt, "{}: at {where_:#x}", self.engine);
        if let Some(v) = self.vector() {
            panic!("{}: exception {v}, stack {:x?}, cr2 {:#x}", self.engine, self.exception(v), self.s.cr2);
        }
    }

    /// Asserts that the CPU shut down.
    #[track_caller]
    pub fn shutdown(&self) {
        assert_eq!(self.exit, Exit::Shutdown, "{}: at {:#x}", self.engine, self.s.rip);
    }

    pub fn frame64(&self, error: bool) -> Frame {
        let mut at = self.s.gpr[usize::from(gpr::RSP)];
        let e = error.then(|| self.r64(at));
        at += if error { 8 } else { 0 };
        let w = |n: u64| self.r64(at + 8 * n);
        Frame { error: e, ip: w(0), cs: w(1), flags: w(2), sp: w(3), ss: w(4) }
    }

    pub fn frame32(&self, error: bool) -> Frame {
        let mut at = self.s.gpr[usize::from(gpr::RSP)];
        let e = error.then(|| self.r32(at));
        at += if error { 4 } else { 0 };
        let w = |n: u64| self.r32(at + 4 * n);
        Frame { error: e, ip: w(0), cs: w(1) & 0xffff, flags: w(2), sp: w(3), ss: w(4) & 0xffff }
    }

    pub fn gpr(&self, r: u8) -> u64 {
        self.s.gpr[usize::from(r)]
    }
    pub fn r8(&self, at: u64) -> u8 {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }
    pub fn r16(&self, at: u64) -> u64 {
        u64::from(self.memory.read_obj::<u16>(GuestAddress(at)).unwrap())
    }
    pub fn r32(&self, at: u64) -> u64 {
        u64::from(self.memory.read_obj::<u32>(GuestAddress(at)).unwrap())
    }
    pub fn r64(&self, at: u64) -> u64 {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }
    /// The leaf entry of a linear address (8-byte entries).
    pub fn pte(&self, linear: u64) -> u64 {
        self.r64(Machine::pte_at(linear))
    }
}
