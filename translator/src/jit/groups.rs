//! Groups of accesses: those of a block whose addresses are what a register has had and a constant, as of what a function
//! keeps on its stack and of an object's fields. One look at the soft TLB serves all of them, at the start of the block or
//! where the register has got its value: none can fault then, none leaves the block, and registers are stored once
//! behind them.
//!
//! Where memory is not as hoped for, in the middle of a page that may be accessed so, control goes to the *slow version* of
//! the block from there on, which is quick code ([`crate::quick`]) that the region has with it.
//!
//! What is found here need not be so: it says what to look up. Whether an access lies in what has been looked up is
//! decided where it is emitted, by its address ([`Pages::covers`](super::pages::Pages::covers)).

use iced_x86::Mnemonic;

use crate::insn::{Insn, Mode, NO_REG, Opnd};
use crate::jit::region::Plan;
use crate::jit::usage::Usage;
use crate::state::{gpr, seg};

/// Bytes of memory that a group may extend over: the larger, the more often the end of a page is among them.
const MOST_BYTES: i64 = 256;
/// Displacements are below this, so that none of their sums wraps round.
const FAR: u64 = 1 << 31;
/// Accesses that make a group: of what a register has at the start of the block, and of what it gets there, for which there
/// may be another slow version.
const FEWEST: usize = 2;
const FEWEST_LATER: usize = 3;
/// Lookups that must be saved for a block to have groups at all.
const WORTH: usize = 2;
/// Bytes of the stack that 64-bit code pushes and pops.
const SLOT: i64 = 8;

/// Accesses by one value of a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// The value.
    pub base: Base,
    /// Where they begin, relative to it.
    pub from: i64,
    /// Where they end.
    pub to: i64,
    /// Whether there are stores among them.
    pub write: bool,
    /// How many they are.
    pub count: usize,
}

/// What a register has from an instruction on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// Which register.
    pub register: u8,
    /// Index of the instruction in its block.
    pub since: usize,
}

impl Group {
    /// With another's accesses, if they are not too far apart.
    fn with(self, other: Group) -> Option<Group> {
        let (from, to) = (self.from.min(other.from), self.to.max(other.to));
        let (write, count) = (self.write || other.write, self.count + other.count);
        (to - from <= MOST_BYTES).then_some(Group { from, to, write, count, ..self })
    }
}

/// The groups of each block of a region: none where there is no slow version of it.
pub fn of_all(plan: &Plan) -> Vec<Vec<Group>> {
    let some = plan.mode.has(Mode::CODE64);
    // Where what was hoped for has failed much the slow version begins at the instruction.
    let failed = |i: &Insn| plan.strays.iter().any(|&(off, _)| off == i.off);
    let of = |insns: &[Insn]| {
        let mut groups = if some { of(insns) } else { Vec::new() };
        groups.retain(|g| !insns.get(g.base.since).is_some_and(failed));
        groups
    };
    plan.blocks.iter().map(|block| of(&block.insns)).collect()
}

/// The groups of a block of 64-bit code, if it is worth a slow version.
fn of(insns: &[Insn]) -> Vec<Group> {
    let first = |register| (Base { register, since: 0 }, 0);
    let mut walk = Walk { has: std::array::from_fn(|r| first(r as u8)), groups: Vec::new() };
    for (n, i) in insns.iter().enumerate() {
        let mut usage = Usage::default();
        // What a helper evaluates may change which pages there are, and STAC which of them may be accessed.
        let changes_class = matches!(i.iced_code().mnemonic(), Mnemonic::Stac | Mnemonic::Clac);
        if changes_class || i.sem.usage.is_none_or(|f| f(&mut usage, i).is_err()) {
            break;
        }
        walk.instruction(n, i, usage.written.gpr);
    }
    let mut groups = walk.groups;
    groups.retain(|g| g.count >= if g.base.since == 0 { FEWEST } else { FEWEST_LATER });
    let saved: usize = groups.iter().map(|g| g.count - 1).sum();
    if saved < WORTH { Vec::new() } else { groups }
}

/// What a register has: what a register has had, and a constant.
type Sum = (Base, i64);

/// What is known on the way through a block.
struct Walk {
    has: [Sum; 16],
    groups: Vec<Group>,
}

impl Walk {
    fn sum(&self, r: u8, plus: i64) -> Option<Sum> {
        let (base, at) = self.has[usize::from(r & 15)];
        let at = at.checked_add(plus).filter(|at| at.unsigned_abs() < FAR)?;
        Some((base, at))
    }

    /// Adds an access to its group.
    fn access(&mut self, at: Option<Sum>, bytes: i64, write: bool) {
        let Some((base, from)) = at else { return };
        let new = Group { base, from, to: from + bytes, write, count: 1 };
        match self.groups.iter_mut().find(|g| g.base == base) {
            Some(group) => *group = group.with(new).unwrap_or(*group),
            None => self.groups.push(new),
        }
    }

    /// Goes over instruction number `n`, which writes the registers in `written`.
    fn instruction(&mut self, n: usize, i: &Insn, written: u16) {
        use Mnemonic::{Add, Call, Lea, Leave, Mov, Pop, Push, Ret, Sub};
        let mnemonic = i.iced_code().mnemonic();
        let by_base = i.base < 16 && i.index == NO_REG && !i.rip_relative && i.addr_bytes == 8;
        if by_base && i.op.contains(&Opnd::Mem) && i.seg < seg::FS && i.mem_bytes != 0 && mnemonic != Lea {
            self.access(self.sum(i.base, i.disp), i.mem_bytes.into(), stores(i, mnemonic));
        }
        let whole = i.osize == 8;
        let (to, value) = match (mnemonic, i.op) {
            (Push | Call, _) => {
                let top = self.sum(gpr::RSP, -SLOT);
                self.access(top, SLOT, true);
                (gpr::RSP, top)
            }
            (Pop | Ret, _) => {
                self.access(self.sum(gpr::RSP, 0), SLOT, false);
                (gpr::RSP, self.sum(gpr::RSP, SLOT))
            }
            (Leave, _) => {
                self.access(self.sum(gpr::RBP, 0), SLOT, false);
                (gpr::RSP, self.sum(gpr::RBP, SLOT))
            }
            (Mov, [Opnd::Gpr(to), Opnd::Gpr(from), ..]) if whole => (to, self.sum(from, 0)),
            (Add, [Opnd::Gpr(r), Opnd::Imm, ..]) if whole => (r, self.sum(r, i.imm as i64)),
            (Sub, [Opnd::Gpr(r), Opnd::Imm, ..]) if whole => (r, self.sum(r, (i.imm as i64).wrapping_neg())),
            (Lea, [Opnd::Gpr(to), ..]) if whole && by_base => (to, self.sum(i.base, i.disp)),
            _ => (NO_REG, None),
        };
        for (r, has) in self.has.iter_mut().enumerate().filter(|(r, _)| written >> r & 1 != 0) {
            *has = (Base { register: r as u8, since: n + 1 }, 0);
        }
        if let Some((has, value)) = self.has.get_mut(usize::from(to)).zip(value) {
            *has = value;
        }
    }
}

/// Whether an instruction stores to its memory operand, as far as the mnemonic says.
fn stores(i: &Insn, mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    let reads = [Cmp, Test, Push, Call, Jmp, Bt, Mul, Imul, Div, Idiv, Fld, Fild, Fldcw, Ldmxcsr];
    i.op[0] == Opnd::Mem && !reads.contains(&mnemonic)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpuid::{CpuModel, Level};
    use crate::decode;

    fn groups(code: &[u8]) -> Vec<Group> {
        let mut insns = Vec::new();
        let bytes =
            decode::straight(code, Mode(Mode::CODE64 | Mode::FLAT), &CpuModel::new(Level::V3, 1, 0), &mut insns);
        assert_eq!(bytes, code.len());
        of(&insns)
    }

    #[test]
    fn the_stack_of_a_function_is_one_group() {
        let code = [
            &[0x55][..],               // push rbp
            &[0x48, 0x89, 0xe5],       // mov rbp, rsp
            &[0x53],                   // push rbx
            &[0x48, 0x83, 0xec, 0x18], // sub rsp, 18h
            &[0x8b, 0x45, 0xf0],       // mov eax, [rbp - 10h]
            &[0x48, 0x89, 0x04, 0x24], // mov [rsp], rax
        ];
        assert_eq!(
            groups(&code.concat()),
            [Group { base: Base { register: gpr::RSP, since: 0 }, from: -40, to: 0, write: true, count: 4 }]
        );
    }

    #[test]
    fn what_is_far_away_or_of_another_value_is_left_out() {
        let code = [
            &[0x48, 0x8b, 0x06][..],                           // mov rax, [rsi]
            &[0x48, 0x3b, 0x46, 0x08],                         // cmp rax, [rsi + 8]
            &[0x48, 0x8b, 0x86, 0x00, 0x10, 0x00, 0x00],       // mov rax, [rsi + 1000h]
            &[0x48, 0x39, 0x46, 0x10],                         // cmp [rsi + 10h], rax
            &[0x48, 0x8b, 0x76, 0x18],                         // mov rsi, [rsi + 18h]
            &[0x48, 0x89, 0x46, 0x40],                         // mov [rsi + 40h], rax
            &[0x64, 0x48, 0x89, 0x47, 0x08, 0x48, 0x89, 0x07], // mov fs:[rdi + 8], rax; mov [rdi], rax
        ];
        assert_eq!(
            groups(&code.concat()),
            [Group { base: Base { register: gpr::RSI, since: 0 }, from: 0, to: 32, write: false, count: 4 }]
        );
    }

    #[test]
    fn a_pointer_that_the_block_loads_has_a_group() {
        let code = [
            &[0x48, 0x8b, 0x77, 0x28][..], // mov rsi, [rdi + 28h]
            &[0x8b, 0x46, 0x04],           // mov eax, [rsi + 4]
            &[0xff, 0x46, 0x08],           // inc [rsi + 8]
            &[0x48, 0x89, 0x06],           // mov [rsi], rax
        ];
        let base = Base { register: gpr::RSI, since: 1 };
        assert_eq!(groups(&code.concat()), [Group { base, from: 0, to: 12, write: true, count: 3 }]);
        assert_eq!(groups(&code[..3].concat()), []);
    }

    #[test]
    fn stac_is_in_the_way() {
        let stores = [0x48, 0x89, 0x07, 0x48, 0x89, 0x47, 0x08, 0x48, 0x89, 0x47, 0x10]; // mov [rdi], rax and so on
        assert_eq!(groups(&[&[0x0f, 0x01, 0xcb][..], &stores].concat()), [], "stac");
        assert_eq!(groups(&stores).len(), 1);
    }

    #[test]
    fn few_accesses_are_no_group() {
        assert_eq!(groups(&[0x53, 0x5b]), [], "push rbx; pop rbx");
    }
}
