//! The parts that the speed of a guest is made of, each by itself: `cargo bench --bench parts`.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use diglot_translator::cpu::Cpu;
use diglot_translator::decode::{self, MAX_LEN};
use diglot_translator::insn::Mode;
use diglot_translator::jit::Jit;
use diglot_translator::jit::compile::Compiler;
use diglot_translator::jit::region::{Options, Plan};
use diglot_translator::testing::bare::{self, CODE, DATA};
use diglot_translator::vcpu::Vcpu;
use diglot_translator::width::W64;
use iced_x86::code_asm::*;

const ROUNDS: u32 = 10_000;
/// Bytes of code memory.
const CODE_MEMORY: usize = 1 << 20;
/// More runs than there will be.
const FOR_EVER: u32 = 1 << 30;
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

/// A CPU at the program.
fn cpu() -> Cpu {
    bare::cpu(&program())
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
    let plan =
        Plan::grow(&vcpu.blocks, &vcpu.cpu, seed, head, |b| b.heat, Options { counted: true, ..Options::default() })
            .expect("a region");
    let mut compiler = Compiler::new().expect("a host that Cranelift knows");
    let mut group = c.benchmark_group("compile");
    group.throughput(Throughput::Elements(plan.blocks.len() as u64));
    group.bench_function(format!("a region of {} blocks", plan.blocks.len()), |b| {
        b.iter(|| black_box(compiler.compile(&plan)).map(|_| ()).expect("code"));
    });
    group.finish();
}

/// The program's loop as quick code and as a region: with the interpreter's, what a round costs in each tier.
fn running(c: &mut Criterion) {
    let mut group = c.benchmark_group("run");
    group.throughput(Throughput::Elements(u64::from(ROUNDS) * ROUND));
    for (name, quick) in [("the loop as quick code", true), ("the loop as a region", false)] {
        let mut vcpu = Vcpu::new(cpu(), Some(Jit::new(CODE_MEMORY, 1).expect("code memory")));
        if quick {
            vcpu.set_quick(1, FOR_EVER);
        } else {
            vcpu.set_threshold(2);
        }
        let mut run = || {
            vcpu.cpu.s.rip = CODE;
            vcpu.run();
            vcpu.jit.as_ref().map(Jit::drain)
        };
        run();
        run();
        group.bench_function(name, |b| b.iter(&mut run));
    }
    group.finish();
}

/// What the code cache does for a block: finds its code, takes code in and links it, drops it when its bytes change.
fn caching(c: &mut Criterion) {
    let mut vcpu = Vcpu::new(cpu(), None);
    vcpu.run();
    let mode = vcpu.cpu.mode;
    let id = vcpu.blocks.find(CODE, mode).expect("the program's first block");
    let block = vcpu.blocks.get(id);
    let (page, granules) = block.extent().next().expect("a place");
    let mut jit = Jit::new(CODE_MEMORY, 1).expect("code memory");
    let mut group = c.benchmark_group("code cache");
    group.bench_function("make, place and invalidate quick code", |b| {
        b.iter(|| {
            jit.quicken(block, &vcpu.cpu);
            jit.invalidate(page, granules);
            jit.changes().count()
        });
    });
    jit.quicken(block, &vcpu.cpu);
    group.bench_function("find", |b| b.iter(|| jit.find(black_box((CODE, mode.0)), None)));
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
            linear ^= 1 << 26;
            cpu.load_linear::<W64>(black_box(linear)).is_ok()
        });
    });
    group.finish();
}

criterion_group!(parts, decoding, interpreting, compiling, running, caching, translating_addresses);
criterion_main!(parts);
