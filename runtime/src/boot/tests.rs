//! Kernels made up by the byte, good and bad, put into memories of many sizes.

mod multiboot;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::GuestRam;

const KIB: usize = 1024;
const RSDP: u64 = 0xe_0000;
const START: u64 = 16 * MIB;

fn ram(mib: u64) -> GuestRam {
    GuestRam::new(mib * MIB).expect("guest memory")
}

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A bzImage of protocol 2.15 with 64 KiB of code that wants 16–24 MiB.
fn bzimage() -> Vec<u8> {
    let mut file = vec![0x90; 5 * 512 + 64 * KIB];
    file[..0x268].fill(0);
    for (at, bytes) in [
        (0x1f1, &[4][..]),
        (0x1f4, &(64 * KIB as u32 / 16).to_le_bytes()),
        (0x1fe, &[0x55, 0xaa, 0xeb, 0x66]),
        (0x202, b"HdrS"),
        (0x206, &0x20fu16.to_le_bytes()),
        (0x211, &[1]),
        (0x22c, &0x7fff_ffffu32.to_le_bytes()),
        (0x230, &0x20_0000u32.to_le_bytes()),
        (0x234, &[1, 21]),
        (0x236, &0x3fu16.to_le_bytes()),
        (0x238, &2047u32.to_le_bytes()),
        (0x258, &START.to_le_bytes()),
        (0x260, &(8u32 << 20).to_le_bytes()),
    ] {
        put(&mut file, at, bytes);
    }
    file
}

/// A PVH kernel: a note, and one segment at 16 MiB of 64 bytes in the file and 8 KiB in memory.
fn pvh() -> Vec<u8> {
    let mut file = vec![0; 0x240];
    put(&mut file, 0, &[0x7f, b'E', b'L', b'F', 2, 1, 1]);
    put(&mut file, 16, &[2, 0, 62, 0, 1]);
    put(&mut file, 32, &64u64.to_le_bytes());
    put(&mut file, 54, &[56, 0, 2, 0]);
    let header = |kind: u32, offset: u64, start: u64, file_len: u64, len: u64| {
        let flags_and_kind = u64::from(kind) | 7 << 32;
        [flags_and_kind, offset, start, start, file_len, len, 4].map(u64::to_le_bytes).concat()
    };
    put(&mut file, 64, &header(1, 0x200, START, 64, 8192));
    put(&mut file, 120, &header(4, 0x100, START, 0x30, 0x30));
    // Another owner's note with a name that needs padding comes first.
    put(&mut file, 0x100, &[3, 0, 0, 0, 2, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', 0, 0, 1, 2, 0, 0]);
    put(&mut file, 0x114, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', b'n', 0]);
    put(&mut file, 0x124, &(START as u32 + 0x40).to_le_bytes());
    file[0x200..].fill(0xf4);
    file
}

fn start(ram: &GuestRam, kernel: &[u8], initrd: Option<usize>, cmdline: &str) -> Result<Registers, BootError> {
    let kernel = Image::from_bytes("kernel", "k", kernel.to_vec())?;
    let initrd = match initrd {
        None => None,
        Some(len) => Some(Image::from_bytes("initrd", "i", vec![0x5a; len])?),
    };
    let request = Request { ram: ram.mmap(), initrd: initrd.as_ref(), cmdline, rsdp: RSDP };
    load_image(&kernel, &request).map(|state| state.entry.registers())
}

fn read(ram: &GuestRam, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.mmap().read_slice(&mut bytes, GuestAddress(at)).expect("in RAM");
    bytes
}

fn u32_at(ram: &GuestRam, at: u64) -> u64 {
    ram.mmap().read_obj::<u32>(GuestAddress(at)).expect("in RAM").into()
}

fn u64_at(ram: &GuestRam, at: u64) -> u64 {
    ram.mmap().read_obj(GuestAddress(at)).expect("in RAM")
}

#[test]
fn memory_maps_are_sorted_and_complete() {
    for mib in [2, 16, 64, 512, 2815, 2816, 2817, 3072, 4096, 8192] {
        let bytes = mib * MIB;
        let ranges = [(GuestAddress(0), bytes.min(0xb000_0000) as usize)];
        let high = (GuestAddress(1 << 32), bytes.saturating_sub(0xb000_0000) as usize);
        let ranges: Vec<_> = ranges.into_iter().chain((high.1 != 0).then_some(high)).collect();
        let map = e820::map(&GuestMemoryMmap::from_ranges(&ranges).expect("guest memory"));
        for pair in map.windows(2) {
            assert!(pair[0].start + pair[0].len <= pair[1].start, "{mib} MiB: {pair:x?}");
        }
        let of = |kind| map.iter().filter(|e| e.kind == kind).map(|e| e.len).sum::<u64>();
        assert_eq!(of(E820Kind::Ram), bytes - MIB + 0x9_fc00, "{mib} MiB");
        assert_eq!(of(E820Kind::Reserved), 0x400 + 0x2_0000 + 0x1000_0000, "{mib} MiB");
        assert_eq!(map[0], E820Entry { start: 0, len: 0x9_fc00, kind: E820Kind::Ram });
    }
}

#[test]
fn a_bzimage_is_entered_in_long_mode() {
    let ram = ram(64);
    let kernel = bzimage();
    let regs = start(&ram, &kernel, Some(5000), " console=ttyS0 ").expect("boots");
    assert_eq!((regs.rip, regs.rsi, regs.rbx), (START + 0x200, 0x7000, 0));
    assert_eq!((regs.cr0, regs.cr4, regs.efer, regs.rflags), (0x8000_0011, 0x20, 0x500, 2));
    assert_eq!((regs.code.selector, regs.code.attr, regs.code.limit), (0x10, 0xa09b, u32::MAX));
    assert_eq!((regs.data.selector, regs.data.attr, regs.data.limit), (0x18, 0xc093, u32::MAX));
    assert_eq!((regs.task.selector, regs.task.attr, regs.task.limit), (0x20, 0x8b, 0x67));
    let gdt = |selector: u16| u64_at(&ram, regs.gdt_base + u64::from(selector));
    assert_eq!((gdt(0x10), gdt(0x18), regs.gdt_limit), (0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x2f));
    assert_eq!(read(&ram, START, 64 * KIB), kernel[5 * 512..]);

    // Every address below 4 GiB is mapped to itself.
    for address in [0, 0x7000, START, 0x7fff_f123, 0xb000_0000, 0xffff_ffff] {
        let entry = |table: u64, shift: u32| u64_at(&ram, (table & !0xfff) + ((address >> shift) & 511) * 8);
        let level2 = entry(entry(entry(regs.cr3, 39), 30), 21);
        assert_eq!(level2, (address & !0x1f_ffff) | 0x83, "{address:#x}");
    }

    let params = regs.rsi;
    assert_eq!(read(&ram, params + 0x1f1, 9), kernel[0x1f1..0x1fa]);
    assert_eq!(read(&ram, params + 0x238, 0x30), kernel[0x238..0x268]);
    assert_eq!(read(&ram, params + 0x1ef, 1), [0], "the sentinel");
    assert_eq!((read(&ram, params + 0x210, 1), u32_at(&ram, params + 0x214)), (vec![0xff], START));
    assert_eq!(u64_at(&ram, params + 0x70), RSDP);
    assert_eq!(read(&ram, u32_at(&ram, params + 0x228), 14), b"console=ttyS0\0");
    let (initrd, len) = (u32_at(&ram, params + 0x218), u32_at(&ram, params + 0x21c));
    assert_eq!((initrd, len), (64 * MIB - 8192, 5000));
    assert_eq!(read(&ram, initrd, 5001), [vec![0x5a; 5000], vec![0]].concat());
    assert_eq!(read(&ram, params + 0x1e8, 1), [5]);
    assert_eq!(
        (u64_at(&ram, params + 0x2d0), u64_at(&ram, params + 0x2d8), u32_at(&ram, params + 0x2e0)),
        (0, 0x9_fc00, 1)
    );
    assert_eq!(read(&ram, 0x40e, 2), [0xc0, 0x9f]);
    assert_eq!(read(&ram, 0x413, 2), [0x7f, 0x02]);
}

#[test]
fn a_pvh_kernel_is_entered_in_protected_mode() {
    let ram = ram(64);
    // Left over from an earlier run: what the file doesn't hold must read 0.
    ram.mmap().write_slice(&[0xee; 8192], GuestAddress(START)).expect("in RAM");
    let regs = start(&ram, &pvh(), Some(5000), "quiet").expect("boots");
    assert_eq!((regs.rip, regs.rsi, regs.rbx, regs.rflags), (START + 0x40, 0, 0x5000, 2));
    assert_eq!((regs.cr0, regs.cr3, regs.cr4, regs.efer), (0x11, 0, 0, 0));
    assert_eq!((regs.code.attr, regs.data.attr), (0xc09b, 0xc093));
    assert_eq!(u64_at(&ram, regs.gdt_base + 0x10), 0x00cf_9b00_0000_ffff);
    assert_eq!(read(&ram, START, 8192), [vec![0xf4; 64], vec![0; 8128]].concat());

    let info = regs.rbx;
    assert_eq!([0, 4, 8, 12].map(|at| u32_at(&ram, info + at)), [0x336e_c578, 1, 0, 1]);
    assert_eq!(u64_at(&ram, info + 32), RSDP);
    assert_eq!(read(&ram, u64_at(&ram, info + 24), 6), b"quiet\0");
    let module = u64_at(&ram, info + 16);
    assert_eq!((u64_at(&ram, module), u64_at(&ram, module + 8)), (64 * MIB - 8192, 5000));
    let map = u64_at(&ram, info + 40);
    assert_eq!((u32_at(&ram, info + 48), u64_at(&ram, map + 8), u32_at(&ram, map + 16)), (5, 0x9_fc00, 1));

    start(&ram, &pvh(), None, "").expect("boots without an initrd");
    assert_eq!((u32_at(&ram, info + 12), u64_at(&ram, info + 16)), (0, 0));
}

#[test]
fn initrds_are_placed_high() {
    let cases = [
        // length, floor, ceiling, place
        (1, 0x100_0000, 0x200_0000, Some(0x1ff_f000)),
        (0x1000, 0x100_0000, 0x200_0000, Some(0x1ff_f000)),
        (0x1001, 0x100_0000, 0x200_0000, Some(0x1ff_e000)),
        (0x100_0000, 0x100_0000, 0x200_0000, Some(0x100_0000)),
        (0x100_0001, 0x100_0000, 0x200_0000, None),
        (0xff_f001, 0x100_0001, 0x200_0000, None),
        (0x1000, 0x100_0000, 0x1ff_ffff, Some(0x1ff_e000)),
        (0x300_0000, 0, 0x200_0000, None),
        (u64::MAX, 0, 0x200_0000, None),
    ];
    for (len, floor, ceiling, place) in cases {
        assert_eq!(initrd::place(len, floor, ceiling), place, "{len:#x} in {floor:#x}..{ceiling:#x}");
    }
    // The header's own limit binds when RAM is larger.
    let ram = ram(64);
    let mut kernel = bzimage();
    put(&mut kernel, 0x22c, &0x1ff_ffffu32.to_le_bytes());
    start(&ram, &kernel, Some(4096), "").expect("boots");
    assert_eq!(u32_at(&ram, 0x7218), 0x1ff_f000);
}

#[test]
fn command_lines_are_limited() {
    let ram = ram(64);
    let line = |len| "x".repeat(len);
    start(&ram, &bzimage(), None, &line(2047)).expect("the limit itself");
    assert_eq!(read(&ram, 0x2_07fe, 2), [b'x', 0]);
    let message = start(&ram, &bzimage(), None, &line(2048)).expect_err("too long").to_string();
    assert_eq!(message, "kernel command line of 2048 bytes is longer than the 2047 this kernel takes; shorten it");
    start(&ram, &pvh(), None, &line(65535)).expect("the area itself");
    assert!(matches!(start(&ram, &pvh(), None, &line(65536)), Err(BootError::CmdlineTooLong { limit: 65535, .. })));
    assert!(matches!(start(&ram, &bzimage(), None, "a\0b"), Err(BootError::CmdlineInvalid(_))));
    start(&ram, &bzimage(), None, "root=/dev/vda -- single").expect("init arguments");
    assert_eq!(read(&ram, 0x2_0000, 24), b"root=/dev/vda -- single\0");
}

/// A good file, a change that spoils it, and what the message must say.
type Case = (fn() -> Vec<u8>, Change, &'static str);

/// One change to a good file.
enum Change {
    Put(usize, &'static [u8]),
    Cut(usize),
    All(&'static [u8]),
}
use Change::{All, Cut, Put};

fn changed(mut file: Vec<u8>, change: &Change) -> Vec<u8> {
    match change {
        Put(at, bytes) => put(&mut file, *at, bytes),
        Cut(len) => file.truncate(*len),
        All(bytes) => file = bytes.to_vec(),
    }
    file
}

#[test]
fn bad_kernels_are_told_apart() {
    let arm64 = Put(0x38, b"ARM\x64");
    let cases: [Case; 39] = [
        (bzimage, Cut(0), "k is empty; was it fully written?"),
        (bzimage, Cut(0x1ff), "is too short to be a kernel"),
        (bzimage, Cut(0x20f), "is truncated: the setup header ends at byte 616, the file at byte 527"),
        (bzimage, Cut(0x240), "is truncated: the setup header ends at byte 616, the file at byte 576"),
        (bzimage, Cut(0x300), "is truncated: the protected-mode code ends at byte"),
        (bzimage, Cut(5 * 512 + 64 * KIB - 16), "is truncated: the protected-mode code ends at byte"),
        (bzimage, Put(0x202, b"Hdrs"), "is a disk image or boot sector"),
        (bzimage, Put(0x1fe, &[0, 0]), "is of no known kernel format"),
        (bzimage, Put(0x206, &[0x0b, 2]), "has no 64-bit entry point (boot protocol 2.11)"),
        (bzimage, Put(0x206, &[0, 0]), "has no 64-bit entry point (boot protocol 0.00)"),
        (bzimage, Put(0x236, &[0x3e, 0]), "has no 64-bit entry point (boot protocol 2.15)"),
        (bzimage, Put(0x211, &[0]), "its loadflags are those of a zImage"),
        (bzimage, Put(0x1f4, &[0; 4]), "its protected-mode code is only 0 bytes long"),
        (bzimage, Put(0x1f4, &[0xff; 4]), "is truncated: the protected-mode code ends at byte"),
        (bzimage, Put(0x1f1, &[255]), "is truncated: the protected-mode code ends at byte"),
        (bzimage, Put(0x230, &[0; 4]), "its alignment 0x0 is not a power of two"),
        (bzimage, Put(0x230, &[1, 1, 0, 0]), "its alignment 0x101 is not a power of two"),
        (bzimage, Put(0x258, &[0; 8]), "its preferred address 0x0 is outside the memory of a PC"),
        (bzimage, Put(0x258, &[0xff; 8]), "its preferred address 0xffffffffffffffff is outside"),
        (bzimage, Put(0x260, &[0, 0, 0, 4]), "needs RAM up to 80 MiB and the guest has 64 MiB there"),
        (bzimage, Put(0x260, &[0xff; 4]), "needs RAM up to 4112 MiB and the guest has 64 MiB there"),
        (bzimage, All(&[0x1f, 0x8b, 8, 0]), "is a gzip file; decompress it first (gunzip)"),
        (bzimage, All(b"\x28\xb5\x2f\xfd...."), "is a zstd file; decompress it first (unzstd)"),
        (bzimage, All(b"070701000000"), "is a cpio archive, which would do as an initrd"),
        (bzimage, All(b"hello"), "is too short to be a kernel"),
        (pvh, Put(0, b"MZ\0\0"), "is an EFI or Windows program without a Linux boot header"),
        (|| vec![0; 4096], arm64, "is for 64-bit ARM, and this machine is x86-64"),
        (pvh, Put(18, &[183, 0]), "is for 64-bit ARM, and this machine is x86-64"),
        (pvh, Put(4, &[1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 3, 0]), "is for 32-bit x86"),
        (pvh, Put(5, &[2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 22]), "is for IBM Z"),
        (pvh, Put(4, &[1]), "is for the x32 ABI"),
        (pvh, Cut(10), "is truncated: the ELF header ends at byte 20, the file at byte 10"),
        (pvh, Cut(0x80), "is truncated: the program header table ends at byte 176"),
        (pvh, Cut(0x220), "is truncated: a program segment ends at byte 576"),
        (pvh, Put(0x11c, &[17]), "is an ELF file with neither a PVH entry note nor a Multiboot header"),
        (pvh, Put(0x124, &[0; 4]), "its PVH entry point 0x0 is in none of its segments"),
        (pvh, Put(64 + 24, &[0; 8]), "its segment at 0x0 is outside the memory a kernel may use"),
        (pvh, Put(64 + 32, &[0xff; 8]), "its segment at 0x1000000 is longer in the file than in memory"),
        (pvh, Put(64 + 24, &[0, 0, 0, 4, 0, 0, 0, 0]), "needs RAM up to 65 MiB and the guest has 64 MiB there"),
    ];
    let ram = ram(64);
    for (good, change, message) in cases {
        let error = start(&ram, &changed(good(), &change), None, "").expect_err(message).to_string();
        assert!(error.contains(message) && !error.contains('\n'), "wanted: {message}\ngot: {error}");
    }
}

#[test]
fn bad_initrds_are_told_apart() {
    let ram = ram(64);
    for kernel in [bzimage(), pvh()] {
        let error = start(&ram, &kernel, Some(48 << 20), "").expect_err("too large").to_string();
        assert!(error.contains("initrd i of 49152 KiB does not fit between 0x1"), "{error}");
        assert!(matches!(start(&ram, &kernel, Some(0), ""), Err(BootError::Empty { role: "initrd", .. })));
    }
}

#[test]
fn files_are_opened_by_path() {
    let ram = ram(64);
    let dir = std::env::temp_dir();
    let file = dir.join(format!("diglot-boot-test-{}", std::process::id()));
    std::fs::write(&file, bzimage()).expect("a temporary file");
    let boot = |kernel: &Path, initrd: Option<&Path>| {
        load(ram.mmap(), kernel, initrd.map(|path| InitrdSource::Path(path.into())), "", RSDP)
    };
    let missing = dir.join("diglot-no-such-file");
    let state = boot(&file, Some(&file)).expect("boots");
    assert_eq!(state.entry.registers().rip, START + 0x200);
    assert_eq!(read(&ram, u32_at(&ram, 0x7218), bzimage().len()), bzimage());
    let errors = [
        (boot(&missing, None), "cannot open kernel "),
        (boot(&file, Some(&missing)), "cannot open initrd "),
        (boot(&dir, None), "cannot read kernel "),
        (boot(Path::new("/dev/null"), None), "kernel /dev/null is empty"),
    ];
    for (result, message) in errors {
        let error = result.expect_err(message).to_string();
        assert!(error.starts_with(message), "{error}");
    }
    std::fs::remove_file(&file).expect("removable");
}

#[test]
fn memory_too_small_for_the_tables_is_no_panic() {
    for mib in [2, 4, 16, 17, 23] {
        let ram = ram(mib);
        assert!(matches!(start(&ram, &bzimage(), None, ""), Err(BootError::KernelDoesNotFit { .. })), "{mib} MiB");
    }
    start(&ram(24), &bzimage(), None, "").expect("exactly fits");
}

#[test]
fn no_file_panics() {
    let ram = ram(32);
    // A xorshift generator: the same files every time.
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for good in [bzimage(), pvh(), multiboot::elf(false), multiboot::elf(true), multiboot::flat()] {
        let headers = good.len().min(0x268);
        for len in 0..headers + 64 {
            let _ = start(&ram, &good[..len.min(good.len())], None, "");
        }
        for _ in 0..3000 {
            let mut file = good.clone();
            for _ in 0..=random() % 6 {
                let at = random() as usize % headers;
                let value = random().to_le_bytes();
                // Whole fields of extreme values find more than single bytes do.
                let value = if random() % 2 == 0 { [0xff; 8] } else { value };
                let len = (1 + random() as usize % 8).min(headers - at);
                put(&mut file, at, &value[..len]);
            }
            if let Err(error) = start(&ram, &file, Some(4096), "x") {
                assert!(!error.to_string().contains('\n'), "{error}");
            }
        }
    }
    for _ in 0..1000 {
        let noise: Vec<u8> = (0..random() % 4096).map(|_| random() as u8).collect();
        assert!(start(&ram, &noise, None, "").is_err());
    }
}
