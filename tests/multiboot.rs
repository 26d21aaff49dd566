//! Multiboot kernels and the debug exit port, on every engine.

mod support;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use support::*;

const HEADER: u64 = 12;
const ADDRESSED_HEADER: u64 = 32;

/// Prints what the text at the address in ESI holds, up to its NUL.
fn print(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut next, mut done) = (a.create_label(), a.create_label());
    a.mov(edx, 0x3f8)?;
    a.set_label(&mut next)?;
    a.mov(al, byte_ptr(esi))?;
    a.test(al, al)?;
    a.je(done)?;
    a.out(dx, al)?;
    a.inc(esi)?;
    a.jmp(next)?;
    a.set_label(&mut done)?;
    a.nop()
}

/// Prints loader name, command line, module and its name; ends with code 33, or 1 where something is not as it must be.
fn kernel(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut wrong = a.create_label();
    let want = |a: &mut CodeAssembler| a.jne(wrong);
    a.cmp(eax, 0x2bad_b002u32 as i32)?;
    want(a)?;
    // 639 KiB below 640 KiB, and 15 MiB from 1 MiB on.
    a.cmp(dword_ptr(ebx + 4), 639)?;
    want(a)?;
    a.cmp(dword_ptr(ebx + 8), 15 << 10)?;
    want(a)?;
    // The map's first range is usable and starts at 0.
    a.mov(edi, dword_ptr(ebx + 48))?;
    a.cmp(dword_ptr(edi), 20)?;
    want(a)?;
    a.cmp(dword_ptr(edi + 12), 0x9_fc00)?;
    want(a)?;
    a.cmp(dword_ptr(edi + 20), 1)?;
    want(a)?;
    a.cmp(dword_ptr(ebx + 20), 1)?;
    want(a)?;
    for field in [64, 16] {
        a.mov(esi, dword_ptr(ebx + field))?;
        print(a)?;
        say(a, "|")?;
    }
    // Module content, which here ends with a NUL, and its name.
    a.mov(edi, dword_ptr(ebx + 24))?;
    for field in [0, 8] {
        a.mov(esi, dword_ptr(edi + field))?;
        print(a)?;
        say(a, "|")?;
    }
    a.mov(eax, 16)?;
    a.out(0xf4, eax)?;
    spin(a)?;
    a.set_label(&mut wrong)?;
    a.mov(eax, 0)?;
    a.out(0xf4, al)?;
    spin(a)
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn header(flags: u32, addresses: &[u32]) -> Vec<u8> {
    let sum = 0u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags);
    words(&[&[0x1bad_b002, flags, sum], addresses].concat())
}

fn code_at(address: u64) -> Vec<u8> {
    let mut a = CodeAssembler::new(32).expect("a 32-bit assembler");
    kernel(&mut a).expect("instructions that exist");
    a.assemble(address).expect("code that can be encoded")
}

fn flat() -> Vec<u8> {
    let load = LOAD as u32;
    let header = header(3 | 1 << 16, &[load, load, 0, 0, load + ADDRESSED_HEADER as u32]);
    [header, code_at(LOAD + ADDRESSED_HEADER)].concat()
}

fn elf32() -> Vec<u8> {
    let image = [header(3, &[]), code_at(LOAD + HEADER)].concat();
    let (load, len) = (LOAD as u32, image.len() as u32);
    let mut file = b"\x7fELF\x01\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend(words(&[3 << 16 | 2, 1, load + HEADER as u32, 52, 0, 0, 32 << 16 | 52, 1, 0]));
    file.extend(words(&[1, 84, load, load, len, len, 7, 4]));
    [file, image].concat()
}

#[test]
fn multiboot_kernels_find_what_they_are_given() {
    let directory = tempfile::tempdir().expect("directory");
    let module = write(directory.path(), "module", b"content\0");
    for (name, file) in [("flat", flat()), ("elf32", elf32())] {
        let kernel = write(directory.path(), name, &file);
        let printed = format!("Diglot|{} one two|content|{}|", text(&kernel), text(&module));
        let files = ["--kernel", text(&kernel), "--initrd", text(&module), "--append", "one two"];
        let args = [&files[..], &["--memory", "16M", "--debug-exit", "0xf4", "--timeout", "60"]].concat();
        on_every_engine(&args, |engine, code, stdout, stderr| {
            assert_eq!((code, stdout), (Some(33), printed.as_str()), "{name}, {engine}: {stderr}");
        });
    }
}
