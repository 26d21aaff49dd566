//! Which encodings are undefined: the decoder against the host's processor, over whole opcode maps and with prefixes
//! that must not be there.

use iced_x86::{Decoder, DecoderOptions, EncodingKind, Mnemonic, OpCodeOperandKind};

use super::native::Native;
use super::{DATA, DATA_LEN, INSN, Machine, Random, every};
use crate::cpuid::{CpuModel, Level};
use crate::decode::decode;
use crate::exception::vector;
use crate::insn::Mode;
use crate::semantics::is_undefined;

struct Judge {
    host: Native,
    model: CpuModel,
    state: Machine,
    compared: usize,
    failures: Vec<String>,
}

impl Judge {
    fn new() -> Option<Judge> {
        let mut state = Machine::new([0; 16], 0x202, vec![0; DATA_LEN]);
        state.gpr = [DATA + 0x80; 16];
        Some(Judge {
            host: Native::take()?,
            model: CpuModel::new(Level::Max, 1, 0),
            state,
            compared: 0,
            failures: Vec::new(),
        })
    }

    /// Compares what an encoding is here with what it is there, unless it belongs to a feature that no model has.
    fn check(&mut self, code: &[u8]) {
        let i = Decoder::new(64, code, DecoderOptions::NONE).decode();
        if !i.is_invalid() && !self.model.executes(i.code()) {
            return;
        }
        let mode = Mode(Mode::CODE64 | Mode::FLAT | Mode::SSE | Mode::AVX);
        let Ok(insn) = decode(code, mode, &self.model) else { panic!("{code:02x?} is not whole") };
        let ours = is_undefined(&insn);
        self.host.load(64, code);
        let after = self.host.run(&self.state);
        // What follows a shorter instruction may be undefined, too.
        let theirs = after.rip == INSN && after.fault.is_some_and(|f| f.vector == vector::UD);
        self.compared += 1;
        if ours != theirs {
            self.failures.push(format!("{code:02x?} {i}: undefined is {ours}, for the processor {theirs}"));
        }
    }

    fn finish(self, least: usize) {
        let n = self.failures.len();
        assert!(n == 0, "{n} encodings differ:\n{}", self.failures.join("\n"));
        assert!(self.compared > least, "{}", self.compared);
    }
}

/// ModRM bytes of every digit, with a register and with `[rsi]`.
fn modrm() -> impl Iterator<Item = u8> {
    (0..8).flat_map(|digit| [0xc1 | digit << 3, 0x06 | digit << 3])
}

#[test]
fn vex_maps() {
    let Some(mut judge) = Judge::new() else { return };
    for map in 1..=3u8 {
        for last in 0..=0xff {
            // W, vvvv, L and pp: every combination of the bits that some instruction has an opinion about.
            let [w, l, pp] = [last >> 7, last >> 2 & 1, last & 3];
            let vvvv = last >> 3 & 15;
            if vvvv != 15 && vvvv != 13 {
                continue;
            }
            for opcode in 0..=0xffu8 {
                // VPERMQ and VPERMPD without W: undefined by the manual, not to AMD's processors.
                if map == 3 && opcode < 2 && w == 0 {
                    continue;
                }
                for modrm in [0xc1, 0x06] {
                    // A NOP in place of the immediate, for those that have none.
                    judge.check(&[0xc4, 0xe0 | map, w << 7 | vvvv << 3 | l << 2 | pp, opcode, modrm, 0x90]);
                }
            }
        }
    }
    judge.finish(30_000);
}

#[test]
fn legacy_maps() {
    let Some(mut judge) = Judge::new() else { return };
    for prefix in [&[][..], &[0x66], &[0xf3], &[0xf2]] {
        for map in [0x38, 0x3a] {
            for opcode in 0..=0xff {
                for modrm in modrm() {
                    judge.check(&[prefix, &[0x0f, map, opcode, modrm, 0x90]].concat());
                }
            }
        }
    }
    judge.finish(10_000);
}

#[test]
fn prefixes_that_must_not_be_there() {
    let Some(mut judge) = Judge::new() else { return };
    let mut r = Random::new(3);
    every::each(&mut r, 64, |_, code, i| {
        let o = i.code().op_code();
        let prefixes: &[u8] = match o.encoding() {
            EncodingKind::VEX => &[0xf0, 0xf2, 0xf3, 0x66, 0x48],
            // A LOCK prefix changes what MOV to and from CR0 is on AMD's processors.
            _ if o.op_kinds().contains(&OpCodeOperandKind::cr_reg) => &[],
            // AMD's processors do not mind it before VERW, which clears their buffers.
            _ if i.mnemonic() == Mnemonic::Verw => &[],
            _ => &[0xf0],
        };
        for &p in prefixes {
            judge.check(&[&[p], code].concat());
        }
    });
    judge.finish(3000);
}
