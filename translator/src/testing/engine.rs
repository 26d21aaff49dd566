//! A guest in user mode that runs the window's code on the interpreter or compiled, and an operating system of empty
//! exception handlers around it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{
    ABSENT, CODE, DATA, DATA_LEN, EDGE, EDGE_LEN, FALL, Fault, Fpu, Guest, INSN, Machine, READ_ONLY, SYSTEM, Segments,
    TAKEN, WINDOW, WINDOW_LEN,
};
use crate::addr::{PAGE_MASK, PAGE_SIZE};
use crate::exception::vector;
use crate::insn::Mode;
use crate::jit::compile::Compiler;
use crate::jit::region::{Options, Plan};
use crate::jit::{Jit, THRESHOLD};
use crate::state::{CpuState, Segment, Table, cr, seg};
use crate::vcpu::Vcpu;

/// Page table of the window, and the physical pages that code is put in, one after the other: the host's window has
/// one page for it all, the guest's maps another one each time.
const PAGE_TABLE: u64 = 0x10_3000;
const CODE_PAGES: std::ops::Range<u64> = 0x4_0000..0x10_0000;
/// Interrupt descriptors, the task state and the global descriptors.
const IDT: u64 = SYSTEM;
const TSS: u64 = SYSTEM + 0x400;
const GDT: u64 = SYSTEM + 0x600;
const STACK_TOP: u64 = SYSTEM + 0x1000;
/// Where exceptions are delivered to: 16 bytes each, and nothing there, as execution stops before.
const HANDLERS: u64 = SYSTEM + 0x2000;
/// Linux's global descriptor table, as instructions that name selectors meet it on the host, up to the thread-local
/// segments, which are absent there.
const DESCRIPTORS: [(u16, u64); 8] = [
    (0x08, 0x00cf_9b00_0000_ffff),
    (KERNEL_CODE, 0x00af_9b00_0000_ffff),
    (0x18, 0x00cf_9300_0000_ffff),
    (0x20, 0x00cf_fb00_0000_ffff),
    (0x28, 0x00cf_f300_0000_ffff),
    (0x30, 0x00af_fb00_0000_ffff),
    // The task state; level 3 sees no more than that it may not use it.
    (0x40, 0x0000_8b00_0000_0067),
    // Its limit is the number of the processor.
    (0x78, 0x0040_f500_0000_0000),
];
const GDT_LIMIT: u16 = 0x7f;
const KERNEL_CODE: u16 = 0x10;
const USER_CODE32: u16 = 0x23;
const USER_CODE64: u16 = 0x33;
const USER_DATA: u16 = 0x2b;

/// One engine with the code that it runs.
pub(crate) struct Engine {
    kind: Kind,
    bits: u32,
    vcpu: Vcpu,
    memory: Arc<GuestMemoryMmap>,
    start: CpuState,
    mode: Mode,
    page: u64,
    len: u64,
}

/// Which page of memory a page of the window is: two that [`DATA`] lies in have changed places, so that what begins in
/// one does not go on behind it.
fn frame(n: u64) -> u64 {
    match n * PAGE_SIZE + WINDOW {
        at if at == DATA & !PAGE_MASK => n + 1,
        at if at == (DATA & !PAGE_MASK) + PAGE_SIZE => n - 1,
        _ => n,
    }
}

/// Where in memory the parts of [`Machine::data`] are, none of which crosses a page.
fn data_pieces() -> impl Iterator<Item = (std::ops::Range<usize>, GuestAddress)> {
    let part = |(at, bytes): (u64, std::ops::Range<usize>)| {
        let room = (PAGE_SIZE - (at & PAGE_MASK)) as usize;
        let middle = bytes.end.min(bytes.start + room);
        let gpa = |at: u64| GuestAddress(frame((at - WINDOW) / PAGE_SIZE) * PAGE_SIZE | at & PAGE_MASK);
        let first = (bytes.start..middle, gpa(at));
        let second = (middle..bytes.end, gpa(at + (middle - bytes.start) as u64));
        [first, second].into_iter().filter(|(range, _)| !range.is_empty())
    };
    [(DATA, 0..DATA_LEN), (EDGE, DATA_LEN..DATA_LEN + EDGE_LEN)].into_iter().flat_map(part)
}

/// Runs of quick code before a region is asked for: more than there will be.
const FOR_EVER: u32 = 1 << 30;

/// What evaluates the code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Interpreter,
    /// The interpreter the first time, quick code after that, where the host has it.
    Quick,
    /// Regions, once they have been compiled.
    Regions,
}

impl Kind {
    pub(crate) const ALL: [Kind; 3] = [Kind::Interpreter, Kind::Quick, Kind::Regions];
}

impl Engine {
    /// For code of 32 (in compatibility mode) or 64 bits.
    pub(crate) fn new(kind: Kind, bits: u32) -> Engine {
        let Guest { mut cpu, memory } = Guest::code64();
        for n in 0..512 {
            let entry = match WINDOW + n * PAGE_SIZE {
                ABSENT => 0,
                at if at >= WINDOW + WINDOW_LEN => 0,
                READ_ONLY => frame(n) * PAGE_SIZE | 5,
                _ => frame(n) * PAGE_SIZE | 7,
            };
            memory.write_obj(entry, GuestAddress(PAGE_TABLE + n * 8)).unwrap();
        }
        let pde = 0x10_2000 + (WINDOW >> 21 & 511) * 8;
        memory.write_obj(PAGE_TABLE | 7, GuestAddress(pde)).unwrap();
        let put = |at: u64, v: u64| memory.write_obj(v, GuestAddress(at - WINDOW)).unwrap();
        for n in 0..32 {
            // A 64-bit interrupt gate to the first stack of the interrupt stack table. INT3 and INTO are what user mode
            // may raise.
            let handler = HANDLERS + 16 * n;
            let kind = if matches!(n as u8, vector::BP | vector::OF) { 0xee01 } else { 0x8e01 };
            put(IDT + 16 * n, handler & 0xffff | u64::from(KERNEL_CODE) << 16 | kind << 32 | (handler >> 16) << 48);
            put(IDT + 16 * n + 8, handler >> 32);
        }
        put(TSS + 0x24, STACK_TOP);
        // No I/O permission map.
        put(TSS + 0x60, 0x68 << 48);
        for (selector, descriptor) in DESCRIPTORS {
            put(GDT + u64::from(selector), descriptor);
        }
        let mut s = cpu.s.clone();
        s.idtr = Table { base: IDT, limit: 511 };
        s.gdtr = Table { base: GDT, limit: GDT_LIMIT };
        s.ldtr = Segment::default();
        s.tr = Segment { base: TSS, limit: 0x67, attr: 0x8b, selector: 0x40 };
        s.seg = [Segment { base: 0, limit: u32::MAX, attr: 0xc0f3, selector: USER_DATA }; 6];
        let (attr, selector) = if bits == 32 { (0xc0fb, USER_CODE32) } else { (0xa0fb, USER_CODE64) };
        s.seg[usize::from(seg::CS)] = Segment { attr, selector, ..s.seg[0] };
        let null: &[u8] = if bits == 32 { &[seg::FS, seg::GS] } else { &[seg::DS, seg::ES, seg::FS, seg::GS] };
        for &r in null {
            s.seg[usize::from(r)] = Segment::default();
        }
        s.cpl = 3;
        s.cr0 |= cr::CR0_WP | cr::CR0_AM | cr::CR0_NE | cr::CR0_MP;
        s.cr4 |= cr::CR4_OSXSAVE | cr::CR4_FSGSBASE;
        s.xcr0 = 7;
        s.rip = INSN;
        cpu.set_state(s.clone());
        let mode = cpu.mode;
        let jit = (kind != Kind::Interpreter).then(|| Jit::new(8 << 20, 1).unwrap());
        let mut vcpu = Vcpu::new(cpu, jit);
        match kind {
            Kind::Quick => vcpu.set_quick(1, FOR_EVER),
            _ => vcpu.set_threshold(THRESHOLD),
        }
        // Quick code, which regions carry with them, is to ask for none: that of where the code under test ends would run
        // on through what is there.
        vcpu.cpu.jit.until_look = i64::MAX;
        Engine { kind, bits, vcpu, memory, start: s, mode, page: CODE_PAGES.start, len: 0 }
    }

    /// Puts code in place. Compiled, it is so from now on, or says why not; `warm` are states that reach the parts that
    /// matter.
    pub(crate) fn load(&mut self, code: &[u8], warm: &[Machine]) -> Result<(), String> {
        if self.page + PAGE_SIZE >= CODE_PAGES.end {
            *self = Engine::new(self.kind, self.bits);
        }
        self.page += PAGE_SIZE;
        if let Some(jit) = &mut self.vcpu.jit {
            jit.options.strayed = (self.page / PAGE_SIZE % 3) as u8;
        }
        self.len = code.len() as u64;
        let next = INSN + self.len;
        let mut all = code.to_vec();
        all.push(0xe9);
        all.extend((FALL.wrapping_sub(next + 5) as u32).to_le_bytes());
        let entry = PAGE_TABLE + (CODE - WINDOW) / PAGE_SIZE * 8;
        self.memory.write_slice(&all, GuestAddress(self.gpa())).unwrap();
        self.memory.write_obj(self.page | 7, GuestAddress(entry)).unwrap();
        self.vcpu.cpu.flush_tlb_page(CODE);
        self.vcpu.flush_jump_cache();
        match self.kind {
            Kind::Interpreter => Ok(()),
            Kind::Quick => warm.iter().try_for_each(|state| self.run(state).map(drop)),
            Kind::Regions => self.warm(warm),
        }
    }

    fn gpa(&self) -> u64 {
        self.page + INSN - CODE
    }

    /// Interprets the code from some states, then has it compiled.
    fn warm(&mut self, warm: &[Machine]) -> Result<(), String> {
        for state in warm {
            self.run(state)?;
        }
        let (entry, mode) = (self.gpa(), self.mode);
        for at in entry..entry + self.len {
            if let Some(id) = self.vcpu.blocks.find(at, mode) {
                // The entry asks for a region the next time it is interpreted, and the others belong to it.
                self.vcpu.blocks.get_mut(id).heat = if at == entry { THRESHOLD - 1 } else { THRESHOLD / 2 };
            }
        }
        let (entries, deadline) = (self.vcpu.counts.entries, Instant::now() + Duration::from_secs(60));
        let failed = |vcpu: &Vcpu| vcpu.jit.as_ref().map_or(0, |j| j.counts.failed);
        let failures = failed(&self.vcpu);
        loop {
            self.run(&warm[0])?;
            if self.vcpu.counts.entries > entries {
                return Ok(());
            }
            if failed(&self.vcpu) > failures || Instant::now() > deadline {
                return Err(self.why_not());
            }
            std::thread::sleep(Duration::from_micros(20));
        }
    }

    /// Why the code in place does not compile.
    fn why_not(&self) -> String {
        let Some(plan) =
            Plan::grow(&self.vcpu.blocks, &self.vcpu.cpu, self.gpa(), self.mode, |b| b.heat, Options::default())
        else {
            return "there is nothing to compile".into();
        };
        match Compiler::new().and_then(|mut c| c.compile(&plan)) {
            Ok(_) => "it was not compiled in time".into(),
            Err(why) => format!("not compiled: {why}"),
        }
    }

    /// Runs the code from a state until it ends or faults, or says how it went astray.
    pub(crate) fn run(&mut self, before: &Machine) -> Result<Machine, String> {
        let cpu = &mut self.vcpu.cpu;
        cpu.s = self.start.clone();
        cpu.s.gpr = before.gpr;
        cpu.s.set_flags(before.flags);
        cpu.s.ymm = before.ymm;
        cpu.s.mxcsr = before.mxcsr;
        cpu.s.seg[usize::from(seg::FS)].base = before.segments.fs_base;
        cpu.s.seg[usize::from(seg::GS)].base = before.segments.gs_base;
        cpu.s.x87.fxrstor(&before.fpu.image(before.mxcsr), true);
        cpu.mode_changed();
        assert!(cpu.mode.has(Mode::AVX));
        for (range, gpa) in data_pieces() {
            self.memory.write_slice(&before.data[range], gpa).unwrap();
        }
        let mut turns = 0;
        let fault = loop {
            let exit = self.vcpu.turn();
            let rip = self.vcpu.cpu.s.rip;
            if let Some(exit) = exit {
                return Err(format!("{exit:?} at {rip:#x}"));
            }
            if rip == FALL || rip == TAKEN {
                break None;
            }
            if let Some(vector) = rip.checked_sub(HANDLERS).filter(|v| v % 16 == 0 && *v < 512) {
                break Some((vector / 16) as u8);
            }
            turns += 1;
            if turns == 100_000 {
                return Err(format!("does not end: at {rip:#x}"));
            }
        };
        let s = &self.vcpu.cpu.s;
        let mut image = [0; 512];
        s.x87.fxsave(&mut image, true);
        let mut data = vec![0; before.data.len()];
        for (range, gpa) in data_pieces() {
            self.memory.read_slice(&mut data[range], gpa).unwrap();
        }
        let rip = if s.rip == FALL { INSN + self.len } else { s.rip };
        let mut after = Machine {
            gpr: s.gpr,
            flags: s.flags(),
            rip,
            fault: None,
            ymm: s.ymm,
            mxcsr: s.mxcsr,
            fpu: Fpu::from_image(&image),
            segments: Segments {
                selectors: [seg::DS, seg::ES, seg::FS, seg::GS].map(|r| s.seg[usize::from(r)].selector),
                fs_base: s.seg[usize::from(seg::FS)].base,
                gs_base: s.seg[usize::from(seg::GS)].base,
            },
            data,
        };
        if let Some(v) = fault {
            let mut frame = s.gpr[4] - WINDOW;
            let mut pop = || {
                frame += 8;
                self.memory.read_obj::<u64>(GuestAddress(frame - 8)).unwrap()
            };
            let has_error =
                matches!(v, vector::DF | vector::TS | vector::NP | vector::SS | vector::GP | vector::PF | vector::AC);
            let error = if has_error { pop() as u32 } else { 0 };
            (after.rip, _, after.flags, after.gpr[4]) = (pop(), pop(), pop(), pop());
            let address = if v == vector::PF { s.cr2 } else { 0 };
            after.fault = Some(Fault { vector: v, error, address });
        }
        Ok(after)
    }
}
