//! A processor with three instructions, those of which the tests' code is made; anything else ends the test.

use crate::mapping::Executable;

/// `mov eax, imm32`: here, the number of the unit that runs.
pub const MOV: u8 = 0xb8;
/// `jmp rel32`.
pub const JMP: u8 = 0xe9;
/// `ret`.
pub const RET: u8 = 0xc3;
/// `nop`.
pub const NOP: u8 = 0x90;

/// Jumps after which a run ends, as one in real code would at the next poll of the kick word.
const JUMPS: usize = 3;

/// Code that says that unit `number` runs, then jumps; the displacement at the returned site is to be patched.
pub fn unit(number: u32) -> (Vec<u8>, usize) {
    let [a, b, c, d] = number.to_le_bytes();
    (vec![MOV, a, b, c, d, NOP, NOP, NOP, JMP, 0, 0, 0, 0], 9)
}

/// Code that says nothing and returns.
pub const RETURN: &[u8] = &[RET];

/// Runs code from `address` on, and tells `runs` of each unit.
pub fn run(memory: &Executable, mut address: usize, mut runs: impl FnMut(u32)) {
    let mut jumps = 0;
    let mut line = None;
    loop {
        // One fetch a quadword, until control goes elsewhere.
        let bytes = match line {
            Some((at, bytes)) if at == address & !7 => bytes,
            _ => memory.fetch(address).expect("control stays in the arena"),
        };
        line = Some((address & !7, bytes));
        let (opcode, rest) = bytes[address % 8..].split_first().expect("a byte at least");
        let operand = || *rest.first_chunk().expect("instructions of the tests do not cross quadwords");
        match *opcode {
            MOV => {
                runs(u32::from_le_bytes(operand()));
                address += 5;
            }
            JMP => {
                if jumps == JUMPS {
                    return;
                }
                jumps += 1;
                address = (address + 5).wrapping_add_signed(i32::from_le_bytes(operand()) as isize);
                line = None;
            }
            NOP => address += 1,
            RET => return,
            other => panic!("no unit's code at {address:#x}: {other:#x}"),
        }
    }
}
