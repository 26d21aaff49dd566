//! Which accesses of loops are scattered: by what was loaded a moment ago from where the loop goes along, as in tables and
//! hash tables, or by a pointer that leads to the next. The host cannot tell where the next will be.
//!
//! What is found here need not be so: an access is right either way.

use iced_x86::Mnemonic;

use crate::insn::{Insn, NO_REG, Opnd};
use crate::jit::region::{Plan, RegionBlock};
use crate::jit::usage::Usage;
use crate::state::gpr;

/// What registers have: sets of them, without the stack pointer, which moves, but not away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Has {
    /// Something that changes as a loop goes on.
    steps: u16,
    /// Something that was loaded from where such a register leads.
    any: u16,
}

impl Has {
    fn or(self, other: Has) -> Has {
        Has { steps: self.steps | other.steps, any: self.any | other.any }
    }

    /// Goes over an instruction; whether it makes a scattered access.
    fn instruction(&mut self, i: &Insn) -> bool {
        let address = address(i);
        let scattered = address & self.any != 0;
        let mut usage = Usage::default();
        if i.sem.usage.is_none_or(|f| f(&mut usage, i).is_err()) {
            return scattered;
        }
        let written = usage.written.gpr & !(1 << gpr::RSP);
        let mut read = usage.read.gpr & !(1 << gpr::RSP);
        let mut any = false;
        if i.op.contains(&Opnd::Mem) && i.iced_code().mnemonic() != Mnemonic::Lea {
            // What a register that leads to the next gets is anything, too.
            any = address & (self.steps | self.any | written) != 0;
            read &= !address | operands(i);
        }
        any |= read & self.any != 0;
        let steps = any || read & (self.steps | written) != 0;
        for (set, now) in [(&mut self.steps, steps), (&mut self.any, any)] {
            *set = *set & !written | if now { written } else { 0 };
        }
        scattered
    }
}

/// The registers that an operand in memory is addressed by.
fn address(i: &Insn) -> u16 {
    let registers = [i.base, i.index].into_iter().filter(|r| *r != NO_REG);
    registers.fold(0, |set, r| set | 1 << (r & 15)) & !(1 << gpr::RSP)
}

/// The registers that are operands, rather than parts of an address.
fn operands(i: &Insn) -> u16 {
    i.op.iter().fold(0, |set, op| match op {
        Opnd::Gpr(r) => set | 1 << (r & 15),
        Opnd::GprHigh(r) => set | 1 << (r & 3),
        _ => set,
    })
}

/// For each block of a region, whether each of its instructions makes such an access; nothing where there is no loop.
pub fn of_all(plan: &Plan, in_loops: &[bool]) -> Vec<Vec<bool>> {
    if !in_loops.contains(&true) {
        return vec![Vec::new(); plan.blocks.len()];
    }
    let walk = |block: &RegionBlock, mut has: Has| -> (Vec<bool>, Has) {
        (block.insns.iter().map(|i| has.instruction(i)).collect(), has)
    };
    let mut entry = vec![Has::default(); plan.blocks.len()];
    loop {
        let before = entry.clone();
        for (k, block) in plan.blocks.iter().enumerate() {
            let (_, has) = walk(block, entry[k]);
            for s in block.successors().filter_map(|s| plan.find(s)) {
                entry[s] = entry[s].or(has);
            }
        }
        if entry == before {
            break;
        }
    }
    plan.blocks.iter().zip(entry).map(|(block, has)| walk(block, has).0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpuid::{CpuModel, Level};
    use crate::decode;
    use crate::insn::Mode;

    /// Which instructions of a loop of one block make scattered accesses.
    fn scattered(code: &[&[u8]]) -> Vec<bool> {
        let mode = Mode(Mode::CODE64 | Mode::FLAT);
        let mut insns = Vec::new();
        decode::straight(&code.concat(), mode, &CpuModel::new(Level::V3, 1, 0), &mut insns);
        assert_eq!(insns.len(), code.len());
        let mut has = Has::default();
        // Twice round.
        insns.iter().for_each(|i| _ = has.instruction(i));
        insns.iter().map(|i| has.instruction(i)).collect()
    }

    #[test]
    fn a_table_by_what_an_array_holds() {
        let code: [&[u8]; 5] = [
            &[0x0f, 0xb6, 0x06],                   // movzx eax, byte [rsi]
            &[0x30, 0xd0],                         // xor al, dl
            &[0x33, 0x54, 0x84, 0x10],             // xor edx, [rsp + 4 * rax + 10h]
            &[0x8b, 0x84, 0x8b, 0x00, 0x01, 0, 0], // mov eax, [rbx + 4 * rcx + 100h]
            &[0x48, 0xff, 0xc6],                   // inc rsi
        ];
        assert_eq!(scattered(&code), [false, false, true, false, false]);
    }

    #[test]
    fn a_list() {
        let code: [&[u8]; 3] = [
            &[0x48, 0x03, 0x57, 0x08], // add rdx, [rdi + 8]
            &[0x48, 0x8b, 0x3f],       // mov rdi, [rdi]
            &[0x48, 0x85, 0xff],       // test rdi, rdi
        ];
        assert_eq!(scattered(&code), [true, true, false]);
    }

    #[test]
    fn an_array_whose_address_is_kept_in_memory() {
        let code: [&[u8]; 4] = [
            &[0x48, 0x8b, 0x47, 0x08], // mov rax, [rdi + 8]
            &[0x48, 0x03, 0x14, 0xc8], // add rdx, [rax + 8 * rcx]
            &[0x48, 0xff, 0xc1],       // inc rcx
            &[0x50],                   // push rax
        ];
        assert_eq!(scattered(&code), [false; 4]);
    }
}
