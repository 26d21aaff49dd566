//! Multiboot kernels made up by the byte.

use super::*;

/// Where the kernels are loaded.
const AT: u32 = 0x20_0000;

/// A header with the checksum that belongs to `flags`, and the fields behind it.
fn header(flags: u32, fields: &[u32]) -> Vec<u8> {
    let sum = 0u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags);
    [&[0x1bad_b002, flags, sum], fields].concat().iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// The flags of a good kernel: modules on page boundaries, and memory information.
const FLAGS: u32 = 3;

/// An ELF file of 0x200 bytes of headers, Multiboot's at 0x100, and one segment of 64 bytes in the file and 8 KiB in
/// memory. It is linked 3 GiB above where it is loaded, and entered in its middle.
pub(super) fn elf(wide: bool) -> Vec<u8> {
    elf_with(wide, FLAGS, &[(AT, 64, 8192)])
}

fn elf_with(wide: bool, flags: u32, segments: &[(u32, u32, u32)]) -> Vec<u8> {
    const ABOVE: u32 = 0xc000_0000;
    let word = |value: u32| if wide { u64::from(value).to_le_bytes().to_vec() } else { value.to_le_bytes().to_vec() };
    let half = |value: u16| value.to_le_bytes().to_vec();
    let (header_len, program_len) = if wide { (64, 56) } else { (52, 32) };
    let mut file = vec![0x7f, b'E', b'L', b'F', 1 + u8::from(wide), 1, 1];
    file.resize(16, 0);
    file.extend([half(2), half(if wide { 62 } else { 3 }), vec![1, 0, 0, 0]].concat());
    file.extend([word(AT + ABOVE + 0x20), word(header_len), word(0), vec![0; 4]].concat());
    file.extend([header_len as u16, program_len, segments.len() as u16, 0, 0, 0].map(half).concat());
    for &(start, file_len, len) in segments {
        let addresses = [word(0x200), word(start.wrapping_add(ABOVE)), word(start), word(file_len), word(len)].concat();
        let (kind, flags) = (vec![1, 0, 0, 0], vec![7, 0, 0, 0]);
        let fields = if wide { [kind, flags, addresses] } else { [kind, addresses, flags] };
        file.extend([fields.concat(), word(4)].concat());
    }
    file.resize(0x100, 0);
    file.extend(header(flags, &[]));
    file.resize(0x200, 0);
    file.resize(0x240, 0xf4);
    file
}

/// A file of no known format with 0x40 bytes that are not loaded, then the header, and code to byte 0x240.
pub(super) fn flat() -> Vec<u8> {
    flat_with([AT, AT, AT + 0x200, AT + 0x2000, AT + 0x100])
}

/// Header, load, load end, bss end and entry address.
fn flat_with(addresses: [u32; 5]) -> Vec<u8> {
    let mut file = vec![0x11; 0x40];
    file.extend(header(FLAGS | 1 << 16, &addresses));
    file.resize(0x240, 0xf4);
    file
}

fn text(ram: &GuestRam, at: u64) -> String {
    let bytes = read(ram, at, 256);
    String::from_utf8_lossy(bytes.split(|b| *b == 0).next().unwrap_or_default()).into_owned()
}

#[test]
fn kernels_are_entered_with_the_information_in_ebx() {
    for (kernel, entry, file_at) in [(elf(false), 0x20, 0x200), (elf(true), 0x20, 0x200), (flat(), 0x100, 0x40)] {
        let ram = ram(64);
        // What the file doesn't hold must read 0.
        ram.mmap().write_slice(&[0xee; 8192], GuestAddress(AT.into())).expect("in RAM");
        let regs = start(&ram, &kernel, Some(5000), " a=1 -- b ").expect("boots");
        assert_eq!((regs.rip, regs.rax), (u64::from(AT) + entry, 0x2bad_b002));
        assert_eq!((regs.rflags, regs.cr0, regs.cr3, regs.cr4, regs.efer), (2, 0x11, 0, 0, 0));
        assert_eq!((regs.code.attr, regs.code.limit, regs.code.base), (0xc09b, u32::MAX, 0));
        assert_eq!((regs.data.attr, regs.data.limit, regs.data.base), (0xc093, u32::MAX, 0));
        assert_eq!(u64_at(&ram, regs.gdt_base + 0x10), 0x00cf_9b00_0000_ffff);
        let mut loaded = kernel[file_at..].to_vec();
        loaded.resize(8192, 0);
        assert_eq!(read(&ram, AT.into(), 8192), loaded);

        let info = regs.rbx;
        let field = |at: u64| u32_at(&ram, info + at);
        assert_eq!((field(0), field(4), field(8)), (0x24d, 639, 63 * 1024));
        assert_eq!(text(&ram, field(16)), "k a=1 -- b");
        assert_eq!(text(&ram, field(64)), "Diglot");
        let (count, module) = (field(20), field(24));
        assert_eq!(count, 1);
        let (from, to) = (u32_at(&ram, module), u32_at(&ram, module + 4));
        assert_eq!((from, to), (u64::from(AT) + 0x2000, u64::from(AT) + 0x2000 + 5000));
        assert_eq!(read(&ram, from, 5001), [vec![0x5a; 5000], vec![0]].concat());
        assert_eq!((text(&ram, u32_at(&ram, module + 8)), u32_at(&ram, module + 12)), ("i".into(), 0));
        let (len, map) = (field(44), field(48));
        let ranges: Vec<(u64, u64, u64, u64)> = (0..len / 24)
            .map(|n| map + n * 24)
            .map(|at| (u32_at(&ram, at), u64_at(&ram, at + 4), u64_at(&ram, at + 12), u32_at(&ram, at + 20)))
            .collect();
        let expected: Vec<_> = e820::map(ram.mmap()).iter().map(|e| (20, e.start, e.len, e.kind as u64)).collect();
        assert_eq!(ranges, expected);
        // All of it, and the stack, lies in conventional memory.
        for at in [regs.gdt_base, info, field(16), module, map, field(64), regs.rsp - 1, regs.rsp - 0x1000] {
            assert!((0x500..0x9_fc00).contains(&at), "{at:#x}");
        }

        let regs = start(&ram, &kernel, None, "").expect("boots without a module");
        assert_eq!((u32_at(&ram, regs.rbx + 20), u32_at(&ram, regs.rbx + 24)), (0, 0));
        assert_eq!(text(&ram, u32_at(&ram, regs.rbx + 16)), "k");
    }
}

#[test]
fn headers_are_found_where_they_may_be() {
    let ram = ram(64);
    let at = |at: usize| {
        let mut file = vec![0; at + 0x300];
        let place = AT + at as u32;
        put(&mut file, at, &header(1 << 16, &[place, AT, 0, 0, place + 0x20]));
        file
    };
    for offset in [0, 4, 0x40, 8192 - 12] {
        start(&ram, &at(offset), None, "").unwrap_or_else(|error| panic!("{offset}: {error}"));
    }
    for offset in [1, 2, 8192 - 8, 8192] {
        let error = start(&ram, &at(offset), None, "").expect_err("no header").to_string();
        assert!(error.contains("is of no known kernel format"), "{offset}: {error}");
    }
    // The magic number by chance, then the header.
    let mut file = at(0x40);
    put(&mut file, 8, &0x1bad_b002u32.to_le_bytes());
    start(&ram, &file, None, "").expect("boots");
    // A bzImage and a PVH kernel with these bytes by chance, the checksum wrong, are what they were.
    for mut other in [bzimage(), pvh()] {
        put(&mut other, 0x1d0, &0x1bad_b002u32.to_le_bytes());
        assert_eq!(start(&ram, &other, None, "").expect("boots").rax, 0);
    }
}

#[test]
fn lengths_of_0_and_entries_by_physical_address() {
    let ram = ram(64);
    // Load end 0 is the end of the file, bss end 0 the load end.
    start(&ram, &flat_with([AT, AT, 0, 0, AT + 0x1ff]), None, "").expect("the last byte");
    let error = start(&ram, &flat_with([AT, AT, 0, 0, AT + 0x200]), None, "").expect_err("behind it").to_string();
    assert!(error.contains("its entry point 0x200200 is in no memory that it fills"), "{error}");
    let mut kernel = elf(false);
    put(&mut kernel, 24, &(AT + 8).to_le_bytes());
    assert_eq!(start(&ram, &kernel, None, "").expect("boots").rip, u64::from(AT) + 8);
    // A flat image inside an ELF file: the header's addresses count.
    let mut kernel = elf(false);
    put(&mut kernel, 0x100, &header(1 << 16, &[AT + 0x300, AT + 0x200, 0, 0, AT + 0x340]));
    assert_eq!(start(&ram, &kernel, None, "").expect("boots").rip, u64::from(AT) + 0x340);
}

#[test]
fn the_boot_information_goes_where_the_kernel_is_not() {
    let ram = ram(64);
    let top = 0x9_fc00;
    // Segments in conventional memory, beside the one that is entered.
    for low in [vec![(top - 0x1000, 0x1000)], vec![(0x500, 0x100), (0x8_0000, top - 0x8_0000)], vec![(0x500, 0x9_d000)]]
    {
        let segments: Vec<_> = low.iter().map(|&(start, len)| (start, 64, len)).chain([(AT, 64, 8192)]).collect();
        let regs = start(&ram, &elf_with(false, FLAGS, &segments), Some(100), "x").expect("boots");
        for (start, len) in low {
            let range = u64::from(start)..u64::from(start + len);
            for at in [regs.rbx, regs.rbx + 115, regs.rsp - 1, regs.rsp - 0x1000, regs.gdt_base] {
                assert!(!range.contains(&at) && at < u64::from(top), "{at:#x} in {range:x?}");
            }
            let mut filled = vec![0xf4; 64];
            filled.resize(len as usize, 0);
            assert_eq!(read(&ram, start.into(), len as usize), filled);
        }
    }
    let full = elf_with(false, FLAGS, &[(0x500, 64, top - 0x500), (AT, 64, 8192)]);
    let error = start(&ram, &full, None, "").expect_err("no room").to_string();
    assert!(error.contains("it leaves no room for the boot information below 640 KiB"), "{error}");
}

fn overlapping() -> Vec<u8> {
    elf_with(false, FLAGS, &[(AT + 0x1000, 64, 64), (AT, 64, 0x1001)])
}

/// A kernel with a header of its own, and the addresses of a flat one: header, load, load end, bss end and entry.
fn odd(addresses: [u32; 5]) -> impl Fn() -> Vec<u8> {
    move || flat_with(addresses)
}

/// A kernel, what is done to it, and what the error says.
type Case<'a> = (&'a dyn Fn() -> Vec<u8>, Change, &'a str);

#[test]
fn bad_kernels_are_told_apart() {
    let ram = ram(64);
    let elf32 = || elf(false);
    let elf64 = || elf(true);
    let flagged = |flags: u32| move || elf_with(false, flags, &[(AT, 64, 8192)]);
    let segment = |start, file_len, len| move || elf_with(false, FLAGS, &[(start, file_len, len)]);
    let cases: [Case; 37] = [
        (&elf32, Put(0x108, &[0; 4]), "the checksum of its Multiboot header at byte 0x100 is wrong"),
        (&elf64, Put(0x108, &[0; 4]), "the checksum of its Multiboot header at byte 0x100 is wrong"),
        (&flat, Put(0x48, &[0; 4]), "the checksum of its Multiboot header at byte 0x40 is wrong"),
        (&flat, Put(0x44, &[0; 4]), "the checksum of its Multiboot header at byte 0x40 is wrong"),
        (&flat, Cut(0x50), "is truncated: the Multiboot header ends at byte 96, the file at byte 80"),
        (&flat, Cut(0x23f), "is truncated: the image that its Multiboot header tells of ends at byte 576"),
        (&flat, Cut(0x4a), "is too short to be a kernel"),
        (&flagged(7), Put(0, &[]), "asks in its Multiboot header for a video mode (flag bit 2)"),
        (&flagged(1 << 3), Put(0, &[]), "for features that Diglot does not know (flag bits 0x8)"),
        (&flagged(0x8004), Put(0, &[]), "for features that Diglot does not know (flag bits 0x8004)"),
        (&elf32, Put(0, b"\x7fELL"), "has a Multiboot header without addresses (flag bit 16) and is no ELF file"),
        (
            &odd([AT, AT + 1, 0, 0, AT]),
            Put(0, &[]),
            "does not go with header address 0x200000 and load address 0x200001",
        ),
        (&odd([AT + 0x44, AT, 0, 0, AT]), Put(0, &[]), "does not go with header address 0x200044 and load address"),
        (&odd([u32::MAX, 0, 0, 0, AT]), Put(0, &[]), "does not go with header address 0xffffffff"),
        (&odd([AT, AT, AT - 1, 0, AT]), Put(0, &[]), "its load address 0x200000 is not below its load end 0x1fffff"),
        (&odd([AT, AT, AT, 0, AT]), Put(0, &[]), "its load address 0x200000 is not below its load end 0x200000"),
        (&odd([AT, AT, 0, AT + 1, AT]), Put(0, &[]), "its bss end 0x200001 is below its load end 0x200200"),
        (&odd([AT, AT, u32::MAX, 0, AT]), Put(0, &[]), "is truncated: the image that its Multiboot header tells of"),
        (&odd([AT, AT, 0, u32::MAX, AT]), Put(0, &[]), "needs RAM up to 4096 MiB and the guest has 64 MiB there"),
        (&odd([AT, AT, 0, 0, 0]), Put(0, &[]), "its entry point 0x0 is in no memory that it fills"),
        (&odd([0, 0, 0, 0, 0]), Put(0, &[]), "its segment at 0x0 is outside the memory a kernel may use"),
        (&odd([0xb_8000, 0xb_8000, 0, 0, 0xb_8000]), Put(0, &[]), "its segment at 0xb8000 is outside the memory"),
        (&odd([u32::MAX, u32::MAX, 0, 0, u32::MAX]), Put(0, &[]), "needs RAM up to 4097 MiB"),
        (&elf32, Put(18, &[8, 0]), "is for MIPS, and this machine is x86-64"),
        (&elf64, Put(18, &[3, 0]), "is for 32-bit x86, and this machine is x86-64"),
        (&elf32, Put(5, &[2]), "is for ELF machine 768"),
        (&elf32, Put(4, &[3]), "is for 32-bit x86"),
        (&elf64, Put(4, &[3]), "its ELF class is neither 32 nor 64 bits"),
        (&elf32, Put(42, &[56]), "its program headers are not of the 32-bit size"),
        (&elf32, Put(44, &[0, 0]), "it has no program headers"),
        (&elf32, Put(28, &[0xff; 4]), "is truncated: the program header table ends at byte"),
        (&elf32, Cut(0x23f), "is truncated: a program segment ends at byte 576, the file at byte 575"),
        (&elf64, Put(24, &[0; 8]), "its entry point 0x0 is in no memory that it fills"),
        (&segment(AT, 64, 63), Put(0, &[]), "its segment at 0x200000 is longer in the file than in memory"),
        (&segment(AT, 64, 64 << 20), Put(0, &[]), "needs RAM up to 66 MiB and the guest has 64 MiB there"),
        (&segment(AT - 0x16_0000, 64, 0x16_0100), Put(0, &[]), "its segment at 0xa0000 is outside the memory"),
        (&overlapping, Put(0, &[]), "its segments at 0x200000 and 0x201000 overlap"),
    ];
    for (good, change, message) in cases {
        let error = start(&ram, &changed(good(), &change), None, "").expect_err(message).to_string();
        assert!(error.starts_with("kernel k ") && error.contains(message), "wanted: {message}\ngot: {error}");
        assert!(!error.contains('\n'), "{error}");
    }
    // An address of 64 bits that wraps round.
    let mut kernel = elf(true);
    put(&mut kernel, 64 + 24, &u64::MAX.to_le_bytes());
    let error = start(&ram, &kernel, None, "").expect_err("wraps").to_string();
    assert!(error.contains("its segment at 0xffffffffffffffff is outside"), "{error}");
}

#[test]
fn modules_and_command_lines_are_limited() {
    let ram = ram(64);
    for kernel in [elf(false), flat()] {
        let room = (64 * MIB) as usize - AT as usize - 0x2000;
        start(&ram, &kernel, Some(room), "").expect("exactly fits");
        let error = start(&ram, &kernel, Some(room + 1), "").expect_err("too large").to_string();
        assert!(error.contains("does not fit between 0x202000 (end of the kernel) and 0x4000000"), "{error}");
        // Two bytes are the kernel's name and a blank.
        start(&ram, &kernel, None, &"x".repeat(65533)).expect("the longest");
        let error = start(&ram, &kernel, None, &"x".repeat(65534)).expect_err("too long").to_string();
        assert!(error.contains("of 65536 bytes is longer than the 65535 this kernel takes"), "{error}");
        assert!(matches!(start(&ram, &kernel, None, "a\0b"), Err(BootError::CmdlineInvalid(_))));
    }
}
