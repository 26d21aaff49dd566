//! The order of memory accesses, as a guest's other vCPUs see them.
//!
//! An x86-64 processor lets others see a later load before an earlier store to another place, and nothing else out of
//! program order; locked instructions and MFENCE not even that (SDM vol. 3 §9.2.2; Sewell et al., "x86-TSO", CACM 53(7),
//! 2010). Compiled code keeps that:
//!
//! | guest | x86-64 host | AArch64 host |
//! |---|---|---|
//! | load | load | load; `dmb ish` |
//! | store | store | `dmb ish`; store |
//! | locked instruction | load; `lock cmpxchg` | load; `dmb ish`; compare and exchange; `dmb ish` |
//! | MFENCE | `mfence` | `dmb ish` |
//! | LFENCE, SFENCE | nothing | nothing |
//!
//! On an x86-64 host accesses are emitted in program order, and Cranelift does not move a load over another access. On
//! AArch64 a load is ordered before all that follows by the barrier behind it, and a store behind all that comes before by
//! the one in front of it, so that only a store and a later load may change places. This is the map that Risotto (Gouicem et
//! al., ASPLOS 2023) and Lasagne (Rocha et al., PLDI 2022) prove right, with barriers that are stronger than theirs (`dmb
//! ishld` and `dmb ishst`), as Cranelift has one only. Guest memory has no release or acquire accesses, as those fault where
//! they are misaligned, on processors without FEAT_LSE2.
//!
//! The interpreter and helpers do the same by `Cpu::loaded` and `Cpu::storing`. What a string instruction copies has no order
//! of its own, as fast strings have none (SDM vol. 3 §9.2.4); what comes before and behind it does. An operand of a vector
//! instruction is read or written in parts of up to 16 bytes, none of which the architecture calls atomic.
//!
//! With one vCPU nobody else looks, no device reads guest memory while guest code runs, and there are no fences at all.

#[cfg(all(test, target_arch = "aarch64"))]
mod tests {
    use iced_x86::IcedError;
    use iced_x86::code_asm::*;

    use crate::addr::PAGE_MASK;
    use crate::code::HostIsa;
    use crate::insn::Mode;
    use crate::jit::compile::Compiler;
    use crate::jit::region::{Options, Plan};
    use crate::quick::{Entered, Quick};
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

    /// DMB ISH.
    const DMB_ISH: u32 = 0xd503_3bbf;

    /// A vCPU that has interpreted what `emit` emits, which an access to a device ends, and the addresses of its blocks.
    fn interpreted(emit: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> (Vcpu, Vec<u64>) {
        let mut a = CodeAssembler::new(64).expect("an assembler");
        a.mov(rsi, bare::DATA)
            .and_then(|()| emit(&mut a))
            .and_then(|()| a.out(0x80u32, al))
            .expect("instructions that exist");
        let mut vcpu = Vcpu::new(bare::cpu(&a.assemble(CODE).expect("code")), None);
        vcpu.run();
        let mode = Mode(vcpu.cpu.mode.0);
        let blocks = (CODE..CODE + 64).filter(|&gpa| vcpu.blocks.find(gpa, mode).is_some()).collect();
        (vcpu, blocks)
    }

    fn words(code: &[u8]) -> Vec<u32> {
        code.as_chunks::<4>().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect()
    }

    /// Host code of a region of `emit`'s.
    fn region(options: Options, emit: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u32> {
        let (vcpu, blocks) = interpreted(emit);
        let mode = Mode(vcpu.cpu.mode.0);
        let plans = blocks.iter();
        let plan = plans
            .filter_map(|&gpa| Plan::grow(&vcpu.blocks, &vcpu.cpu, gpa, mode, |b| b.heat, options))
            .max_by_key(|plan| plan.blocks.len())
            .expect("a region");
        words(&Compiler::new().expect("a host").compile(&plan).expect("code").code)
    }

    /// Quick code of all blocks of `emit`'s.
    fn quick(options: Options, emit: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u32> {
        let (vcpu, blocks) = interpreted(emit);
        let mode = Mode(vcpu.cpu.mode.0);
        let code = blocks.into_iter().flat_map(|gpa| {
            let id = vcpu.blocks.find(gpa, mode).expect("a block");
            let insns = vcpu.blocks.get(id).insns(&vcpu.cpu);
            Quick::new(HostIsa::Aarch64).compile(&insns, mode, gpa & PAGE_MASK, options, Entered::Often).code
        });
        words(&code.collect::<Vec<u8>>())
    }

    /// Each access has the barriers that the table says, and no other.
    #[test]
    fn several_vcpus_have_their_accesses_in_order() {
        type Emit = fn(&mut CodeAssembler) -> Result<(), IcedError>;
        // In regions, and in quick code, where helpers evaluate what is locked.
        let cases: [(&str, [usize; 2], Emit); 11] = [
            ("nothing", [0, 0], |a| a.mov(rax, rbx)),
            ("load", [1, 1], |a| a.mov(rax, qword_ptr(rsi))),
            ("narrow load", [1, 1], |a| a.movzx(eax, byte_ptr(rsi + 3))),
            ("vector load", [1, 1], |a| a.movups(xmm0, xmmword_ptr(rsi + 128))),
            ("store", [1, 1], |a| a.mov(qword_ptr(rsi), rax)),
            ("vector store", [1, 1], |a| a.movups(xmmword_ptr(rsi + 144), xmm0)),
            ("read and write", [2, 2], |a| a.add(qword_ptr(rsi), rax)),
            ("locked", [3, 0], |a| a.lock().add(qword_ptr(rsi + 64), rax)),
            ("exchange", [3, 0], |a| a.xchg(dword_ptr(rsi + 80), ebx)),
            ("full fence", [1, 1], |a| a.mfence()),
            ("fences of loads, and of stores", [0, 0], |a| a.lfence().and_then(|()| a.sfence())),
        ];
        for (name, barriers, emit) in cases {
            let options = Options { shared: true, ..Options::default() };
            for (words, barriers) in [region(options, emit), quick(options, emit)].into_iter().zip(barriers) {
                assert_eq!(words.iter().filter(|&&word| word == DMB_ISH).count(), barriers, "{name}: {words:08x?}");
            }
        }
    }

    #[test]
    fn one_vcpu_needs_no_order() {
        let emit = |a: &mut CodeAssembler| {
            let mut again = a.create_label();
            a.mov(rcx, 100u64)?;
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
            a.jne(again)
        };
        let (region, quick) = (region(Options::default(), emit), quick(Options::default(), emit));
        let mut polls = 0;
        for (k, word) in region.into_iter().chain(quick).enumerate() {
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
}
