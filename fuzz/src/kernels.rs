//! Kernel files of any content with any initial RAM disk and command line, put into guests of some sizes.
//!
//! Beyond panics, it is checked that an error is one line, that a kernel which is accepted starts inside guest RAM with
//! its descriptor table and stack there, and that loading it again, as a reset does, comes to the same.

use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::PathBuf;

use diglot_runtime::acpi;
use diglot_runtime::boot::{self, BootError, BootState, InitrdSource};
use diglot_runtime::memory::{GuestRam, low_ram_end};

use crate::input::Input;

/// Guest RAM of a run, in MiB: the least there is, and more than the kernels of the seeds need.
const SIZES: [u64; 3] = [2, 20, 36];

thread_local! {
    static RAMS: [GuestRam; 3] = SIZES.map(|mib| GuestRam::new(mib << 20).expect("guest RAM"));
    static FILE: File = memory_file();
}

/// Any kernel.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let [size, cpus, cmdline] = input.array();
    let initrd = input.u16();
    let cmdline = String::from_utf8_lossy(input.bytes(cmdline.into())).repeat(if cpus & 0x80 != 0 { 300 } else { 1 });
    let kernel = input.rest();
    RAMS.with(|rams| {
        let ram = &rams[usize::from(size) % SIZES.len()];
        let rsdp = acpi::write_tables(ram.mmap(), 1 + cpus % 4).expect("the tables fit");
        let first = load(ram, kernel, initrd, &cmdline, rsdp);
        match &first {
            Ok(state) => check(state, ram),
            Err(error) => {
                let text = error.to_string();
                assert!(!text.contains('\n') && !text.is_empty(), "{text:?}");
            }
        }
        let again = load(ram, kernel, initrd, &cmdline, rsdp);
        assert_eq!(first.ok(), again.ok(), "the first time and after a reset");
    });
}

fn load(ram: &GuestRam, kernel: &[u8], initrd: u16, cmdline: &str, rsdp: u64) -> Result<BootState, BootError> {
    // None at all, an empty one, and up to 2 MiB.
    let initrd = initrd.checked_sub(1).map(|len| InitrdSource::Bytes(vec![0x5a; usize::from(len) << 5]));
    FILE.with(|mut file| {
        file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(kernel)).expect("room in memory");
        // Another name of the same open file, so that the loader opens one as it always does.
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        boot::load(ram.mmap(), &path, initrd, cmdline, rsdp)
    })
}

fn check(state: &BootState, ram: &GuestRam) {
    let registers = state.entry.registers();
    let end = low_ram_end(ram.mmap());
    assert!(registers.rip < end, "starts at {:#x}, RAM ends at {end:#x}", registers.rip);
    assert!((1..=end).contains(&registers.rsp), "its stack is below {:#x}", registers.rsp);
    let table = registers.gdt_base + u64::from(registers.gdt_limit);
    assert!(table < end, "its descriptor table is up to {table:#x}");
}

/// A file without a name.
fn memory_file() -> File {
    // SAFETY: the name is a string that ends with NUL; the descriptor is nobody else's.
    unsafe {
        let fd = libc::memfd_create(c"kernel".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0, "no file in memory: {}", std::io::Error::last_os_error());
        File::from_raw_fd(fd)
    }
}
