//! The parts that the speed of a guest is made of, each by itself: `cargo bench --bench parts`.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use diglot_translator::cpu::Cpu;
use diglot_translator::cpuid::{CpuModel, Level};
use diglot_translator::decode::{self, MAX_LEN};
use diglot_translator::engine::Kick;
use diglot_translator::insn::Mode;
use diglot_translator::jit::compile::Compiler;
use diglot_translator::jit::region::Plan;
use diglot_translator::mem::GuestRam;
use diglot_translator::platform::Platform;
use diglot_translator::state::{CpuState, Segment, cr};
use diglot_translator::vcpu::Vcpu;
use diglot_translator::width::W64;
use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// No devices; a write to any port stops the CPU.
struct Bare(Kick);

impl Platform for Bare {
    fn port_out(&mut self, _: u16, _: u8, _: u32) {
        self.0.request(Kick::STOP);
    }
}

const CODE: u64 = 0x2000;
const DATA: u64 = 0x20_0000;
/// Page tables: one of each level, the last of which maps large pages one to one.
const TABLES: u64 = 0x1_0000;
const LARGE_PAGES: u64 = 64;
const ROUNDS: u32 = 10_000;
/// Instructions in a round of [`program`].
const ROUND: u64 = 10;

/// A loop of what programs do most: arithmetic, loads, stores, and branches that are taken now and then.
fn program() -> Vec<u8> {
    let mut a = CodeAssembler::new(64).expect("an assembler");
    let (mut again, mut skip) = (a.create_label(), a.create_label());
    let mut emit = || {
        a.mov(ecx, ROUNDS)?;
        a.mov(rsi, DATA)?;
        a.set_label(&mut again)?;
        a.mov(rax, qword_ptr(rsi + 8))?;
        a.add(rax, rcx)?;
        a.mov(edx, eax)?;
        a.shr(rdx, 3)?;
        a.mov(qword_ptr(rsi + 16), rdx)?;
        a.test(eax, 0x10)?;
        a.je(skip)?;
        a.xor(rax, rdx)?;
        a.set_label(&mut skip)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.out(0x80, al)
    };
    emit().expect("instructions that exist");
    a.assemble(CODE).expect("code that can be encoded")
}

/// A CPU in 64-bit mode, at the program.
fn cpu() -> Cpu {
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), (LARGE_PAGES as usize) << 21)]).expect("memory");
    let put = |at: u64, value: u64| ram.write_obj(value, GuestAddress(at)).expect("inside");
    put(TABLES, TABLES + 0x1000 | 3);
    put(TABLES + 0x1000, TABLES + 0x2000 | 3);
    (0..LARGE_PAGES).for_each(|n| put(TABLES + 0x2000 + 8 * n, n << 21 | 0x83));
    ram.write_slice(&program(), GuestAddress(CODE)).expect("inside");
    let kick = Kick::default();
    let platform = Box::new(Bare(kick.clone()));
    let mut cpu = Cpu::new(Arc::new(GuestRam::new(Arc::new(ram))), platform, CpuModel::new(Level::Max, 1, 0));
    cpu.kick = kick;
    let flat = |attr| Segment { base: 0, limit: u32::MAX, attr, selector: 8 };
    let mut state = CpuState::reset();
    state.rip = CODE;
    state.cr0 |= cr::CR0_PE | cr::CR0_PG;
    state.cr4 = cr::CR4_PAE | cr::CR4_OSFXSR | cr::CR4_PGE;
    state.efer = cr::EFER_LME | cr::EFER_LMA | cr::EFER_NXE;
    state.cr3 = TABLES;
    state.seg = [flat(0xc093); 6];
    state.seg[1] = flat(0xa09b);
    cpu.set_state(state);
    cpu
}

fn decoding(c: &mut Criterion) {
    let cpu = cpu();
    let code = program();
    let mut offsets = Vec::new();
    let mut at = 0;
    while at < code.len() {
        offsets.push(at);
        at += usize::from(decode::decode(&code[at..], cpu.mode, &cpu.model).expect("whole instructions").len);
    }
    let mut group = c.benchmark_group("decode");
    group.throughput(Throughput::Elements(offsets.len() as u64));
    group.bench_function("instructions of a loop", |b| {
        b.iter(|| {
            for &at in &offsets {
                let end = code.len().min(at + MAX_LEN);
                let _ = black_box(decode::decode(black_box(&code[at..end]), cpu.mode, &cpu.model));
            }
        });
    });
    group.finish();
}

fn interpreting(c: &mut Criterion) {
    let mut vcpu = Vcpu::new(cpu(), None);
    let mut group = c.benchmark_group("interpret");
    group.throughput(Throughput::Elements(u64::from(ROUNDS) * ROUND));
    group.bench_function("a loop of arithmetic, memory and branches", |b| {
        b.iter(|| {
            vcpu.cpu.s.rip = CODE;
            vcpu.run()
        });
    });
    group.finish();
}

fn compiling(c: &mut Criterion) {
    let mut vcpu = Vcpu::new(cpu(), None);
    vcpu.run();
    let head = Mode(vcpu.cpu.mode.0);
    // The loop is the block behind the two instructions that set it up.
    let seed = (CODE..CODE + 64).filter(|&gpa| vcpu.blocks.find(gpa, head).is_some()).nth(1).expect("the loop");
    let plan = Plan::grow(&vcpu.blocks, seed, head, true).expect("a region");
    let mut compiler = Compiler::new().expect("a host that Cranelift knows");
    let mut group = c.benchmark_group("compile");
    group.throughput(Throughput::Elements(plan.blocks.len() as u64));
    group.bench_function(format!("a region of {} blocks", plan.blocks.len()), |b| {
        b.iter(|| black_box(compiler.compile(&plan)).map(|_| ()).expect("code"));
    });
    group.finish();
}

fn translating_addresses(c: &mut Criterion) {
    let mut cpu = cpu();
    let mut group = c.benchmark_group("soft TLB");
    group.bench_function("hit", |b| b.iter(|| cpu.load_linear::<W64>(black_box(DATA)).is_ok()));
    // Addresses that far apart share an entry, so that each access walks the page tables.
    let mut linear = DATA;
    group.bench_function("miss and page walk", |b| {
        b.iter(|| {
            linear ^= 1 << 25;
            cpu.load_linear::<W64>(black_box(linear)).is_ok()
        });
    });
    group.finish();
}

criterion_group!(parts, decoding, interpreting, compiling, translating_addresses);
criterion_main!(parts);
