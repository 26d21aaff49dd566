//! What is left of a PC's firmware in low memory: interrupt vectors for a kernel that goes on in real mode, or goes
//! back to it, so that the timer that firmware leaves running (`diglot_devices::pit`) finds a handler.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

const VECTORS: u64 = 0;
/// Where the handlers are: the segment F000h, in whose last bytes BIOSes have the entry points that programs rely on.
const SEGMENT: u16 = 0xf000;
/// The handler of every vector that is not an interrupt line's; it has been an IRET at this offset since the first PC.
const IGNORE: u16 = 0xff53;
/// The handlers of lines 0–7 (vectors 08h–0Fh) and 8–15 (70h–77h).
const FIRST_CHIP: u16 = 0xff00;
const SECOND_CHIP: u16 = 0xff10;

/// PUSH AX; MOV AL, 20h; OUT 20h, AL; POP AX; IRET: the end of interrupt.
const END_OF_INTERRUPT: [u8; 7] = [0x50, 0xb0, 0x20, 0xe6, 0x20, 0x58, 0xcf];
/// The same for both chips.
const END_OF_SECOND: [u8; 9] = [0x50, 0xb0, 0x20, 0xe6, 0xa0, 0xe6, 0x20, 0x58, 0xcf];
const IRET: [u8; 1] = [0xcf];

/// Writes the vector table and its handlers.
pub(super) fn write(ram: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    for (offset, code) in [(FIRST_CHIP, &END_OF_INTERRUPT[..]), (SECOND_CHIP, &END_OF_SECOND), (IGNORE, &IRET)] {
        ram.write_slice(code, GuestAddress((u64::from(SEGMENT) << 4) + u64::from(offset)))?;
    }
    for vector in 0..=255u64 {
        let offset = match vector {
            0x08..=0x0f => FIRST_CHIP,
            0x70..=0x77 => SECOND_CHIP,
            _ => IGNORE,
        };
        let pointer = u32::from(SEGMENT) << 16 | u32::from(offset);
        ram.write_obj(pointer.to_le(), GuestAddress(VECTORS + 4 * vector))?;
    }
    Ok(())
}
