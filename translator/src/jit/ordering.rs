//! What AArch64 hosts are told of the order of memory accesses: with one vCPU, nothing.
//!
//! A processor sees its own accesses in program order (Arm ARM §B2.3), and with one vCPU nobody else looks: no device
//! reads guest memory while guest code runs. So plain and locked instructions compile to plain accesses, and fences to
//! nothing. The one load that is ordered is that of the kick word, which other threads write. Several vCPUs will need
//! more; then this test has to change with what is emitted.

use iced_x86::code_asm::*;

use crate::insn::Mode;
use crate::jit::compile::Compiler;
use crate::jit::region::{Options, Plan};
use crate::testing::bare::{self, CODE};
use crate::vcpu::Vcpu;

/// The instructions of a host that order memory accesses, or exclude others from them: name, mask and value (Arm ARM
/// §C4.1.94 "Loads and Stores", §C4.1.93 "Barriers").
const ORDERING: [(&str, u32, u32); 6] = [
    ("barrier", 0xffff_f01f, 0xd503_301f),
    ("exclusive or ordered, 64 bits", 0xff00_0000, 0xc800_0000),
    ("exclusive or ordered, 16 bits", 0xff00_0000, 0x4800_0000),
    ("exclusive or ordered, 8 bits", 0xff00_0000, 0x0800_0000),
    ("atomic memory operation", 0x3f20_0c00, 0x3820_0000),
    ("pointer-authenticated load", 0x3f20_0400, 0x3820_0400),
];
/// LDAR of 32 bits, and its registers.
const KICK_POLL: (u32, u32) = (0xffff_fc00, 0x88df_fc00);
/// The others of 32 bits that are exclusive or ordered.
const WORDS: (u32, u32) = (0xff00_0000, 0x8800_0000);

#[test]
fn one_vcpu_needs_no_order() {
    let mut a = CodeAssembler::new(64).expect("an assembler");
    let mut again = a.create_label();
    let mut emit = || {
        a.mov(rcx, 100u64)?;
        a.mov(rsi, bare::DATA)?;
        a.set_label(&mut again)?;
        a.mov(rax, qword_ptr(rsi))?;
        a.mov(dword_ptr(rsi + 8), eax)?;
        a.mov(word_ptr(rsi + 13), ax)?;
        a.push(rax)?;
        a.pop(rbx)?;
        a.lock().add(qword_ptr(rsi + 64), rax)?;
        a.lock().xadd(dword_ptr(rsi + 72), ebx)?;
        a.xchg(qword_ptr(rsi + 80), rbx)?;
        a.lock().cmpxchg(qword_ptr(rsi + 88), rbx)?;
        a.mfence()?;
        a.lfence()?;
        a.sfence()?;
        a.movups(xmm0, xmmword_ptr(rsi + 128))?;
        a.movups(xmmword_ptr(rsi + 144), xmm0)?;
        a.dec(rcx)?;
        a.jne(again)?;
        a.out(0x80u32, al)
    };
    emit().expect("instructions that exist");
    let mut vcpu = Vcpu::new(bare::cpu(&a.assemble(CODE).expect("code")), None);
    vcpu.run();
    let mode = Mode(vcpu.cpu.mode.0);
    let plan = (CODE..CODE + 64)
        .filter(|&gpa| vcpu.blocks.find(gpa, mode).is_some())
        .filter_map(|gpa| Plan::grow(&vcpu.blocks, &vcpu.cpu, gpa, mode, |b| b.heat, Options::default()))
        .max_by_key(|plan| plan.blocks.len())
        .expect("a region");
    let compiled = Compiler::new().expect("a host").compile(&plan).expect("code");
    let words = compiled.code.as_chunks::<4>().0.iter().map(|&bytes| u32::from_le_bytes(bytes));
    let mut polls = 0;
    for (k, word) in words.enumerate() {
        if word & KICK_POLL.0 == KICK_POLL.1 {
            polls += 1;
            continue;
        }
        assert_ne!(word & WORDS.0, WORDS.1, "{word:08x} at {:#x} is exclusive or ordered, 32 bits", 4 * k);
        for (name, mask, value) in ORDERING {
            assert_ne!(word & mask, value, "{word:08x} at {:#x} is a {name}", 4 * k);
        }
    }
    assert!(polls >= 1, "the loop looks at the kick word");
}
