//! The embedded default guest: a small kernel, assembled at run time, that needs nothing but this program.
//!
//! It enters long mode, handles exceptions and timer interrupts, runs a program in ring 3, does integer and SSE2 work
//! whose results it checks, reports its own speed, and powers the machine off by ACPI. What it finds wrong it says in a
//! line that begins with `FAIL`, and then ends in a triple fault, so that the monitor's exit code tells. The expected results are computed here, in Rust, while the guest is assembled.

mod builder;
mod console;
mod entry;
mod float;
mod integer;
mod layout;
mod speed;
mod timer;
mod traps;
mod user;

use iced_x86::IcedError;

use builder::Builder;

/// Why the guest could not be assembled; each is a mistake in this module.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    /// An instruction that cannot be encoded.
    #[error("cannot assemble the embedded guest: {0}")]
    Assemble(#[from] IcedError),
    /// A part outgrew its place in the image.
    #[error("the embedded guest's part at {at:#x} has {bytes} bytes, and room for {room}")]
    Room {
        /// Guest physical address of the part.
        at: u64,
        /// Its length.
        bytes: usize,
        /// Bytes up to the next part.
        room: usize,
    },
}

/// An entry in 32-bit protected mode: paging off, interrupts off, CS 32-bit code, the other segments data, all flat
/// (base 0, limit 4 GiB). The guest loads its own descriptor table, and no other register matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry32 {
    /// Where it is entered, a guest physical address.
    pub eip: u32,
}

/// The guest, ready to be put into memory. It uses memory up to 4 MiB.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmbeddedImage {
    /// The image, less than 64 KiB.
    pub bytes: Vec<u8>,
    /// Guest physical address of its first byte.
    pub load_gpa: u64,
    /// How it is entered.
    pub entry: Entry32,
}

/// Bytes of RAM that the guest uses, from 0.
pub const MEMORY: u64 = 4 << 20;

/// Assembles the guest. The result is always the same.
///
/// # Errors
///
/// None, unless this module is changed: the guest depends on no input.
pub fn image() -> Result<EmbeddedImage, EmbeddedError> {
    let program = user::program()?;
    let Kernel { code, interrupt_table, data } = kernel(&program)?;
    let descriptors: Vec<u8> = layout::descriptors().into_iter().flat_map(u64::to_le_bytes).collect();
    let pointers = [
        layout::table_pointer(layout::GDT, descriptors.len() as u16),
        layout::table_pointer(layout::IDT, interrupt_table.len() as u16),
    ];
    let parts = [
        (layout::LOAD, entry::code()?),
        (layout::CODE, code),
        (layout::USER_CODE, program.code),
        (layout::USER_DATA, program.data),
        (layout::GDT, descriptors),
        (layout::TSS, layout::task_state().to_vec()),
        (layout::GDT_POINTER, pointers[0].to_vec()),
        (layout::IDT_POINTER, pointers[1].to_vec()),
        (layout::IDT, interrupt_table),
        (layout::DATA, data),
    ];
    let mut bytes = Vec::new();
    let ends: Vec<u64> = parts.iter().skip(1).map(|p| p.0).chain([layout::END]).collect();
    for ((at, part), end) in parts.into_iter().zip(ends) {
        let room = (end - at) as usize;
        if part.len() > room {
            return Err(EmbeddedError::Room { at, bytes: part.len(), room });
        }
        bytes.extend(part);
        bytes.resize((end - layout::LOAD) as usize, 0);
    }
    Ok(EmbeddedImage { bytes, load_gpa: layout::LOAD, entry: Entry32 { eip: layout::LOAD as u32 } })
}

struct Kernel {
    code: Vec<u8>,
    interrupt_table: Vec<u8>,
    data: Vec<u8>,
}

/// The kernel, in the order in which it runs; what is only called or jumped to stands after its end.
fn kernel(program: &user::Program) -> builder::Emit<Kernel> {
    let mut b = Builder::new()?;
    entry::start(&mut b)?;
    console::init(&mut b)?;
    b.say("\r\nDiglot's embedded guest: a small kernel that checks the machine it runs on\r\n\r\n")?;
    entry::processor(&mut b)?;
    entry::long_mode(&mut b)?;
    traps::exceptions(&mut b)?;
    timer::init(&mut b)?;
    timer::interrupts(&mut b)?;
    user::run(&mut b, program)?;
    integer::work(&mut b)?;
    float::work(&mut b)?;
    speed::report(&mut b)?;
    console::finish(&mut b)?;

    let handlers = traps::handlers(&mut b)?;
    console::routines(&mut b)?;
    timer::routines(&mut b)?;
    let (code, interrupt_table) = handlers.assemble(b.a)?;
    Ok(Kernel { code, interrupt_table, data: b.data.bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_is_small_and_always_the_same() {
        let (first, second) = (image().expect("an image"), image().expect("an image"));
        assert_eq!(first, second);
        assert!(first.bytes.len() < 64 * 1024);
        assert_eq!((first.load_gpa, first.entry.eip), (0x10_0000, 0x10_0000));
    }

    /// The algorithms that the guest is checked against, by values found in tables.
    #[test]
    fn expectations_are_those_of_the_literature() {
        assert_eq!(integer::primes(&integer::sieved()), 78_498);
        assert_eq!(integer::crc32(b"123456789"), 0xcbf4_3926);
        assert_eq!(integer::fibonacci(25), 75_025);
    }

    /// The set is its own mirror image in the real axis, which lies between two rows. Points that are next to its
    /// edge may differ, as the two halves are rounded differently.
    #[test]
    fn the_picture_is_symmetric() {
        let picture = float::drawn();
        let rows: Vec<&[u8]> = picture.chunks(float::WIDTH as usize).collect();
        let mirrored = rows.iter().rev().flat_map(|row| row.iter());
        let different = picture.iter().zip(mirrored).filter(|(a, b)| a != b).count();
        assert!(different < picture.len() / 50, "{different}");
        let inside = picture.iter().filter(|&&c| c == b'@').count();
        assert!((picture.len() / 10..picture.len() / 2).contains(&inside), "{inside}");
    }

    #[test]
    fn rights_cover_the_first_pages_in_order() {
        assert!(layout::RIGHTS.is_sorted_by_key(|r| r.0));
        assert!(layout::RIGHTS.iter().all(|r| r.0 % 0x1000 == 0));
    }
}
