//! A small guest in any mode: tables for all of them, a start state that a guest could have brought about, and a board
//! that answers everything and notes it.

use std::collections::VecDeque;
use std::sync::{Arc, LazyLock, Mutex};

use diglot_translator::cpu::Cpu;
use diglot_translator::cpuid::{CpuModel, Level};
use diglot_translator::platform::Platform;
use diglot_translator::state::{CpuState, Segment, Table, cr, flag, gpr, seg};

use crate::input::Input;
use crate::ram::{RANGES, Ram};

/// Interrupt vectors of real mode, descriptors, and a task state.
const IVT: u64 = 0;
const GDT: u64 = 0x1000;
const IDT64: u64 = 0x2000;
const TSS: u64 = 0x3000;
/// 16 bytes for each vector: a HLT, where a run ends.
const HANDLERS: u64 = 0x4000;
/// Stack tops at level 0, and in the interrupt stack table.
const STACK0: u64 = 0x6000;
const IST1: u64 = 0x7000;
/// Paging structures: 4-level, whose lower ones PAE paging has too, and 32-bit.
const PML4: u64 = 0x8000;
const PDPT: u64 = 0x9000;
const PD: u64 = 0xa000;
const PT: u64 = 0xb000;
const PDPT_PAE: u64 = 0xc000;
const PD32: u64 = 0xd000;
const PT32: u64 = 0xe000;
const IDT32: u64 = 0xf000;
/// Code, in two pages, and what it works on.
pub const CODE: u64 = 0x1_0000;
const DATA: u64 = 0x1_3000;
const STACK: u64 = 0x1_7800;
/// The pages from here on differ in what may be done with them.
const ODD_PAGES: u64 = 0x1_8000;
/// The most bytes of code.
pub const MOST_CODE: usize = 0x1800;

const CODE64: u16 = 0x08;
const DATA0: u16 = 0x10;
const CODE32: u16 = 0x18;
const USER32: u16 = 0x23;
const USER_DATA: u16 = 0x2b;
const USER64: u16 = 0x33;
const TSS_SELECTOR: u16 = 0x38;
const CODE16: u16 = 0x48;
const DATA16: u16 = 0x50;

/// Paging-structure entry bits.
mod pte {
    pub const P: u64 = 1;
    pub const W: u64 = 2;
    pub const U: u64 = 4;
    pub const PS: u64 = 0x80;
    pub const G: u64 = 0x100;
    pub const NX: u64 = 1 << 63;
}

/// The port whose output raises that interrupt, and the one whose output raises an NMI.
const PORT_IRQ: u16 = 0x10;
const PORT_NMI: u16 = 0x11;

/// A mode to start in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Real-address mode.
    Real,
    /// Virtual-8086 mode.
    Vm86,
    /// 16-bit protected mode.
    Protected16,
    /// 32-bit protected mode without paging.
    Flat32,
    /// With 32-bit paging.
    Paged32,
    /// With PAE paging.
    Pae,
    /// Compatibility mode.
    Compatible,
    /// 64-bit mode.
    Long,
}

impl Kind {
    /// Every mode.
    pub const ALL: [Kind; 8] = [
        Kind::Long,
        Kind::Flat32,
        Kind::Paged32,
        Kind::Pae,
        Kind::Compatible,
        Kind::Real,
        Kind::Vm86,
        Kind::Protected16,
    ];
    /// Those whose code is compiled.
    pub const COMPILED: [Kind; 5] = [Kind::Long, Kind::Flat32, Kind::Paged32, Kind::Pae, Kind::Compatible];

    /// Bits of the default operand size.
    pub fn bits(self) -> u32 {
        match self {
            Kind::Long => 64,
            Kind::Flat32 | Kind::Paged32 | Kind::Pae | Kind::Compatible => 32,
            Kind::Real | Kind::Vm86 | Kind::Protected16 => 16,
        }
    }

    fn is_long(self) -> bool {
        matches!(self, Kind::Long | Kind::Compatible)
    }

    /// Whether segment registers are what real-address mode makes them.
    fn is_8086(self) -> bool {
        matches!(self, Kind::Real | Kind::Vm86)
    }
}

fn put(ram: &mut [u8], at: u64, bytes: &[u8]) {
    ram[at as usize..][..bytes.len()].copy_from_slice(bytes);
}

fn descriptor(base: u64, limit: u64, attr: u64) -> u64 {
    limit & 0xffff | (base & 0xff_ffff) << 16 | (attr & 0xf0ff) << 40 | (limit >> 16 & 15) << 48 | (base >> 24) << 56
}

fn gate(selector: u16, offset: u64, kind: u64) -> u64 {
    offset & 0xffff | u64::from(selector) << 16 | (kind | 0xe0) << 40 | (offset >> 16 & 0xffff) << 48
}

/// What the first range of RAM holds before the code is put there.
static IMAGE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    use pte::{G, NX, P, PS, U, W};
    let mut ram = vec![0; RANGES[0].1];
    for v in 0..256 {
        let handler = HANDLERS + 16 * v;
        put(&mut ram, IVT + 4 * v, &(handler as u32).to_le_bytes());
        put(&mut ram, IDT64 + 16 * v, &gate(CODE64, handler, 14).to_le_bytes());
        put(&mut ram, IDT32 + 8 * v, &gate(CODE32, handler, 14).to_le_bytes());
        put(&mut ram, handler, &[0xf4]);
    }
    for (selector, raw) in [
        (CODE64, descriptor(0, 0xfffff, 0xa09b)),
        (DATA0, descriptor(0, 0xfffff, 0xc093)),
        (CODE32, descriptor(0, 0xfffff, 0xc09b)),
        (USER32, descriptor(0, 0xfffff, 0xc0fb)),
        (USER_DATA, descriptor(0, 0xfffff, 0xc0f3)),
        (USER64, descriptor(0, 0xfffff, 0xa0fb)),
        (TSS_SELECTOR, descriptor(TSS, 0x67, 0x8b)),
        (CODE16, descriptor(CODE, 0xffff, 0x9b)),
        (DATA16, descriptor(DATA, 0xffff, 0x93)),
    ] {
        put(&mut ram, GDT + u64::from(selector & !7), &raw.to_le_bytes());
    }
    // Level-0 stacks of both forms of the task state, and no I/O permission map.
    put(&mut ram, TSS + 4, &STACK0.to_le_bytes());
    put(&mut ram, TSS + 0x24, &IST1.to_le_bytes());
    put(&mut ram, TSS + 0x66, &0x68u16.to_le_bytes());
    // A run ends behind its code, too.
    ram[CODE as usize..DATA as usize].fill(0xf4);

    let page = |n: u64| match n << 12 {
        0..CODE => n << 12 | P | W | G,
        at if at < ODD_PAGES || at >= RANGES[1].0 => at | P | W | U,
        at => match at - ODD_PAGES >> 12 {
            0 => at | P | U,
            1 => at | P | W,
            2 => at | P | W | U | NX | 3 << 59,
            3 => 0,
            // With protection keys 3 and 1: no code, and an alias of the code; MMIO next to RAM and far from it, and a reserved bit.
            4 => CODE | P | W | U | 1 << 59,
            5 => 0x2_0000 | P | W | U,
            6 => 0xfee0_0000 | P | W | U,
            7 => at | 1 << 51 | P | W | U,
            // What follows RAM answers as a device.
            _ => at | P | W | U,
        },
    };
    // The page behind the last one of RAM is not there.
    for n in 0..RANGES[1].0 + RANGES[1].1 as u64 >> 12 {
        put(&mut ram, PT + 8 * n, &page(n).to_le_bytes());
        let low = (page(n) & 0xffff_ffff) as u32;
        put(&mut ram, PT32 + 4 * n, &low.to_le_bytes());
    }
    for (at, entry) in [
        (PML4, PDPT | P | W | U),
        // The last 2 GiB are the first.
        (PML4 + 511 * 8, PDPT | P | W | U),
        (PDPT, PD | P | W | U),
        (PDPT + 510 * 8, PD | P | W | U),
        (PD, PT | P | W | U),
        (PD + 8, P | W | U | PS),
        (PDPT_PAE, PD | P),
    ] {
        put(&mut ram, at, &entry.to_le_bytes());
    }
    for (at, entry) in [(PD32, PT32 | P | W | U), (PD32 + 4, P | W | U | PS)] {
        put(&mut ram, at, &(entry as u32).to_le_bytes());
    }
    ram
});

/// The segment register that loading a selector gives.
fn segment(selector: u16) -> Segment {
    let at = (GDT + u64::from(selector & !7)) as usize;
    let raw = IMAGE[at..].first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
    let attr = (raw >> 40) as u32 & 0xf0ff;
    let limit = (raw & 0xffff | raw >> 32 & 0xf_0000) as u32;
    Segment {
        base: raw >> 16 & 0xff_ffff | (raw >> 56) << 24,
        limit: if attr & Segment::G != 0 { limit << 12 | 0xfff } else { limit },
        attr,
        selector,
    }
}

/// What a guest starts with, taken from the input.
#[derive(Clone, Debug)]
pub struct Start {
    /// The mode.
    pub kind: Kind,
    /// Instructions that it has.
    pub level: Level,
    /// Where its code starts, from the start of the code's first page.
    pub offset: u64,
    /// Its registers.
    pub state: CpuState,
}

impl Start {
    /// Takes one of `kinds`, and the rest of the state.
    pub fn take(input: &mut Input, kinds: &[Kind]) -> Start {
        let [kind, level, offset, modes] = input.array();
        let kind = kinds[usize::from(kind) % kinds.len()];
        let level = [Level::Max, Level::V3, Level::V2][usize::from(level % 3)];
        let offset = u64::from(offset) * 16;
        let user = modes & 1 != 0 || kind == Kind::Vm86;
        let mut s = CpuState::reset();
        s.dr[7] = 0x400;
        s.rip = offset;
        segments(&mut s, kind, user);
        control(&mut s, kind, level, input.array());
        if modes & 2 != 0 {
            odd_segment(&mut s, kind, input);
        }
        let [pick, bits] = input.array();
        s.set_flags(flags(pick, bits) | if kind == Kind::Vm86 { flag::VM } else { 0 });
        if modes & 4 != 0 {
            // A breakpoint of any kind at one of the places where something happens.
            let [which, place] = input.array();
            s.dr[usize::from(place & 3)] = [CODE + s.rip, DATA, STACK - 8, 0x10][usize::from(place >> 2 & 3)];
            s.dr[7] |= 2 << (2 * (place & 3)) | u64::from(which & 15) << (16 + 4 * (place & 3));
        }
        let seed = input.u16();
        registers(&mut s, kind, seed, input.array());
        Start { kind, level, offset, state: s }
    }

    /// Fills RAM with fresh tables, and code at its place.
    pub fn fill(&self, ram: &Ram, code: &[u8]) {
        ram.write(RANGES[0].0, &IMAGE);
        ram.write(RANGES[1].0, &vec![0; RANGES[1].1]);
        if !self.kind.is_long() {
            // SS0 stands where the upper half of RSP0 is otherwise.
            ram.write(TSS + 8, &DATA0.to_le_bytes());
        }
        ram.write(CODE + self.offset, &code[..code.len().min(MOST_CODE)]);
    }

    /// A CPU that starts so.
    pub fn cpu(&self, ram: &Ram, board: Board) -> Cpu {
        let mut cpu = Cpu::new(ram.for_cpu(), Box::new(board), CpuModel::new(self.level, 1, 0));
        cpu.set_state(self.state.clone());
        cpu
    }
}

fn segments(s: &mut CpuState, kind: Kind, user: bool) {
    let (code, data) = match (kind, user) {
        (Kind::Long, false) => (CODE64, DATA0),
        (Kind::Long, true) => (USER64, USER_DATA),
        (Kind::Protected16, _) => (CODE16, DATA16),
        (_, false) => (CODE32, DATA0),
        (_, true) => (USER32, USER_DATA),
    };
    if kind.is_8086() {
        let attr = if kind == Kind::Vm86 { 0xf3 } else { 0x93 };
        let at = |base: u64| Segment { base, limit: 0xffff, attr, selector: (base >> 4) as u16 };
        s.seg = [at(DATA); 6];
        s.seg[usize::from(seg::CS)] = at(CODE);
        s.seg[usize::from(seg::SS)] = at(STACK & !0xfff);
    } else {
        s.seg = [segment(data); 6];
        s.seg[usize::from(seg::CS)] = segment(code);
        if kind != Kind::Protected16 {
            s.rip += CODE;
        }
    }
    s.cpl = if user && kind != Kind::Protected16 && kind != Kind::Real { 3 } else { 0 };
    s.gdtr = Table { base: GDT, limit: 0x5f };
    s.idtr = if kind.is_long() {
        Table { base: IDT64, limit: 0xfff }
    } else if kind == Kind::Real {
        Table { base: IVT, limit: 0x3ff }
    } else {
        Table { base: IDT32, limit: 0x7ff }
    };
    s.tr = segment(TSS_SELECTOR);
    s.ldtr = Segment::default();
}

/// Control registers: what the mode wants, and of the rest what the input says and the processor would allow.
fn control(s: &mut CpuState, kind: Kind, level: Level, bits: [u8; 5]) {
    let [cr0, low, high, xcr0, efer] = bits;
    let some = |from: u8, names: &[u64]| -> u64 {
        names.iter().enumerate().filter(|(n, _)| from >> n & 1 != 0).map(|(_, bit)| bit).sum()
    };
    s.cr0 |= some(cr0, &[cr::CR0_MP, cr::CR0_EM, cr::CR0_TS, cr::CR0_NE, cr::CR0_WP, cr::CR0_AM]);
    s.cr4 = some(
        // The inverse, so that zeros enable what most instructions need.
        !low,
        &[
            cr::CR4_OSFXSR,
            cr::CR4_OSXMMEXCPT,
            cr::CR4_OSXSAVE,
            cr::CR4_FSGSBASE,
            cr::CR4_PGE,
            cr::CR4_PSE,
            cr::CR4_PCE,
            cr::CR4_MCE,
        ],
    ) | some(
        high,
        &[cr::CR4_TSD, cr::CR4_DE, cr::CR4_UMIP, cr::CR4_SMEP, cr::CR4_SMAP, cr::CR4_PCIDE, cr::CR4_PKE, cr::CR4_PKS],
    );
    if kind != Kind::Real {
        s.cr0 |= cr::CR0_PE;
    }
    if !matches!(kind, Kind::Real | Kind::Flat32 | Kind::Protected16) {
        s.cr0 |= cr::CR0_PG;
    }
    s.efer = some(!efer, &[cr::EFER_NXE, cr::EFER_SCE]);
    s.cr3 = PD32;
    if kind == Kind::Pae {
        s.cr4 |= cr::CR4_PAE;
        s.cr3 = PDPT_PAE;
    }
    if kind.is_long() {
        s.cr4 |= cr::CR4_PAE;
        s.efer |= cr::EFER_LME | cr::EFER_LMA;
        s.cr3 = PML4;
    } else {
        s.cr4 &= !cr::CR4_PCIDE;
    }
    let model = CpuModel::new(level, 1, 0);
    for n in 0..64 {
        if !model.allows_cr4(s.cr4 & 1 << n) {
            s.cr4 &= !(1 << n);
        }
    }
    // The x87 state, then SSE's, then the others, which are not without the former.
    s.xcr0 = match xcr0 % 3 {
        _ if s.cr4 & cr::CR4_OSXSAVE == 0 => 1,
        0 => model.xcr0_mask(),
        1 => 3,
        _ => 1,
    };
}

/// One segment register that is neither flat nor what the rest have.
fn odd_segment(s: &mut CpuState, kind: Kind, input: &mut Input) {
    let [which, attr, scale] = input.array();
    let (base, limit) = (u64::from(input.u32()), input.u32());
    let which = usize::from(which % 6);
    let register = &mut s.seg[which];
    if kind.is_8086() {
        // A selector that leads to RAM, most times.
        register.selector = (base as u16) % if scale & 1 == 0 { 0x2000 } else { u16::MAX };
        register.base = u64::from(register.selector) << 4;
        return;
    }
    let code = which == usize::from(seg::CS);
    if kind == Kind::Long && which < 4 {
        // Without a meaning there.
        return;
    }
    let free = if code { Segment::RW } else { Segment::RW | Segment::EXPAND_DOWN | Segment::DB };
    register.attr ^= u32::from(attr) & 6 & free | if attr & 8 != 0 { free & Segment::DB } else { 0 };
    register.limit = limit >> (scale & 31);
    if !code {
        register.base = base >> (scale >> 5);
    }
}

fn flags(pick: u8, bits: u8) -> u64 {
    let status = u64::from(bits) & flag::STATUS | if bits & 2 != 0 { flag::OF } else { 0 };
    let rare = [0, flag::DF, flag::IF, flag::AC, flag::NT, flag::TF, flag::IOPL, flag::ID];
    status | flag::IF * u64::from(pick >> 3 & 1) | rare[usize::from(pick & 7)]
}

/// General registers as the input says, the others by a number.
fn registers(s: &mut CpuState, kind: Kind, seed: u16, picks: [u8; 16]) {
    let mut random = Random(u64::from(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    // In 16-bit modes the segments lead to the data.
    let origin = if kind.bits() == 16 { 0 } else { DATA };
    for (n, pick) in picks.into_iter().enumerate() {
        let low = u64::from(pick & 31);
        s.gpr[n] = match pick >> 5 {
            0 => origin + 0x100 + 8 * low,
            1 => low,
            2 => 1 << (2 * low) >> (low & 1),
            3 => CODE + 16 * low,
            4 => low.wrapping_neg(),
            // Up to the end of a page that is special.
            5 => ODD_PAGES + (low >> 2 << 12) - [0, 1, 5, 15][pick as usize & 3],
            6 => 0x2_0000 - low,
            _ => random.u64(),
        };
    }
    if picks[4] < 0xc0 {
        s.gpr[usize::from(gpr::RSP)] = if kind.bits() == 16 { 0x800 } else { STACK } - 8 * u64::from(picks[4] & 31);
    }
    for r in &mut s.ymm {
        *r = std::array::from_fn(|_| random.lane());
    }
    for r in &mut s.x87.st {
        r.mantissa = random.lane();
        r.sign_exp = random.u64() as u16;
    }
    s.x87.fcw = [0x37f, 0x27f, 0x40, 0xf7f][random.u64() as usize & 3];
    s.x87.ftw = random.u64() as u8;
    s.x87.fsw = (random.u64() as u16) & 0x3800;
    s.pkru = random.u64() as u32 & 0xcc;
    s.mxcsr = [0x1f80, 0x9fc0, 0x0000, 0x7f80][random.u64() as usize & 3];
}

/// xorshift64*.
pub struct Random(pub u64);

impl Random {
    /// Any number.
    pub fn u64(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Half a vector register: integers, floats, their extremes, small indices.
    fn lane(&mut self) -> u64 {
        let v = self.u64();
        match v & 7 {
            0 => 0,
            1 => (v as i64 as f64).to_bits(),
            2 => u64::from((v as f32).to_bits()) << 32 | 0x7f80_0000,
            3 => 0x7ff0_0000_0000_0000 | v >> 60,
            4 => v >> 3 & 0x1f_0000_001f,
            5 => 0x8000_0000_8000_0000,
            _ => v,
        }
    }
}

/// What a guest did to its board.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A read from a port or of memory: address, size.
    Read(u64, u8),
    /// A write: address, size, value.
    Write(u64, u8, u64),
    /// A model-specific register of the local APIC, and what was written.
    Msr(u32, Option<u64>),
    /// The time or a random number was asked for.
    Asked,
    /// An interrupt was taken.
    Taken(u8),
}

/// Events that are kept; the rest is counted.
const EVENTS: usize = 4096;

/// What the board knows.
#[derive(Default)]
pub struct BoardState {
    /// The first of what happened.
    pub events: Vec<Event>,
    /// How much happened.
    pub count: u64,
    interrupts: VecDeque<u8>,
    nmis: u32,
    cr8: u64,
}

impl BoardState {
    /// Notes an event, and gives a value that tells it from others.
    fn note(&mut self, event: Event) -> u64 {
        self.count += 1;
        if self.events.len() < EVENTS {
            self.events.push(event);
        }
        self.count.wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }
}

/// A machine whose every port and address answers, each time with another value.
#[derive(Clone, Default)]
pub struct Board(Arc<Mutex<BoardState>>);

impl Board {
    /// Looks at it.
    pub fn state<R>(&self, look: impl FnOnce(&mut BoardState) -> R) -> R {
        look(&mut self.0.lock().expect("nobody panics with it"))
    }
}

impl Platform for Board {
    fn port_in(&mut self, port: u16, size: u8) -> u32 {
        self.state(|b| b.note(Event::Read(port.into(), size))) as u32
    }
    fn port_out(&mut self, port: u16, size: u8, value: u32) {
        self.state(|b| {
            b.note(Event::Write(port.into(), size, value.into()));
            match port {
                PORT_IRQ if b.interrupts.len() < 16 => b.interrupts.push_back(value as u8),
                PORT_NMI => b.nmis = 1,
                _ => {}
            }
        });
    }
    fn mmio_read(&mut self, gpa: u64, size: u8) -> u64 {
        self.state(|b| b.note(Event::Read(gpa, size)))
    }
    fn mmio_write(&mut self, gpa: u64, size: u8, value: u64) {
        self.state(|b| b.note(Event::Write(gpa, size, value)));
    }
    fn tsc(&mut self) -> u64 {
        self.state(|b| b.note(Event::Asked))
    }
    fn apic_msr_read(&mut self, msr: u32, _tsc: u64) -> Option<u64> {
        let value = self.state(|b| b.note(Event::Msr(msr, None)));
        (msr & 1 == 0).then_some(value)
    }
    fn apic_msr_write(&mut self, msr: u32, value: u64, _tsc: u64) -> Option<()> {
        self.state(|b| b.note(Event::Msr(msr, Some(value))));
        (msr & 1 == 0).then_some(())
    }
    fn cr8(&mut self) -> u64 {
        self.state(|b| b.cr8)
    }
    fn set_cr8(&mut self, value: u64) {
        assert!(value <= 15, "CR8 has four bits");
        self.state(|b| b.cr8 = value);
    }
    fn interrupt_pending(&mut self) -> bool {
        self.state(|b| b.interrupts.front().is_some_and(|&v| u64::from(v >> 4) > b.cr8))
    }
    fn acknowledge(&mut self) -> Option<u8> {
        self.state(|b| {
            let vector = b.interrupts.pop_front()?;
            b.note(Event::Taken(vector));
            Some(vector)
        })
    }
    fn take_nmi(&mut self) -> bool {
        self.state(|b| std::mem::take(&mut b.nmis) != 0)
    }
    fn random(&mut self) -> Option<u64> {
        let value = self.state(|b| b.note(Event::Asked));
        (value & 7 != 0).then_some(value)
    }
}
