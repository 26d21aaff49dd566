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

/// Where the kernel that sleeps goes on, and what it leaves in memory for then.
const RESUME: u32 = 0x1000;
const LEFT: u32 = 0x2000;

/// Sleeps (ACPI S3) until the real-time clock's alarm a second later, and goes on in real mode: waits there for the
/// timer, whose handler is firmware's, and ends with the code that it left in memory.
fn sleeper(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut next, mut found) = (a.create_label(), a.create_label());
    a.mov(edi, 0xe_0000)?;
    a.set_label(&mut next)?;
    a.cmp(dword_ptr(edi), u32::from_le_bytes(*b"FACS") as i32)?;
    a.je(found)?;
    a.add(edi, 16)?;
    a.jmp(next)?;
    a.set_label(&mut found)?;
    a.mov(dword_ptr(edi + 12), RESUME)?;
    let mut resume = CodeAssembler::new(16)?;
    resume.sti()?;
    resume.hlt()?;
    resume.cli()?;
    resume.mov(al, byte_ptr(LEFT))?;
    resume.out(0xf4, al)?;
    for (at, byte) in (RESUME..).zip(resume.assemble(RESUME.into())?) {
        a.mov(byte_ptr(at), u32::from(byte))?;
    }
    a.mov(byte_ptr(LEFT), 16)?;
    // An alarm at any second, minute and hour; then its interrupt in register B.
    for (register, value) in [(1, 0xc0), (3, 0xc0), (5, 0xc0), (0x0b, 0x22)] {
        for (port, v) in [(0x70, register), (0x71, value)] {
            a.mov(eax, v)?;
            a.out(port, al)?;
        }
    }
    // The alarm may wake; SLP_TYP 1 and SLP_EN.
    for (port, v) in [(0x602, 1 << 10), (0x604, 1 << 13 | 1 << 10)] {
        a.mov(edx, port)?;
        a.mov(eax, v)?;
        a.out(dx, ax)?;
    }
    spin(a)
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn header(flags: u32, addresses: &[u32]) -> Vec<u8> {
    let sum = 0u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags);
    words(&[&[0x1bad_b002, flags, sum], addresses].concat())
}

type Body = fn(&mut CodeAssembler) -> Result<(), IcedError>;

fn code_at(address: u64, body: Body) -> Vec<u8> {
    let mut a = CodeAssembler::new(32).expect("a 32-bit assembler");
    body(&mut a).expect("instructions that exist");
    a.assemble(address).expect("code that can be encoded")
}

fn flat(body: Body) -> Vec<u8> {
    let load = LOAD as u32;
    let header = header(3 | 1 << 16, &[load, load, 0, 0, load + ADDRESSED_HEADER as u32]);
    [header, code_at(LOAD + ADDRESSED_HEADER, body)].concat()
}

fn elf32() -> Vec<u8> {
    let image = [header(3, &[]), code_at(LOAD + HEADER, kernel)].concat();
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
    for (name, file) in [("flat", flat(kernel)), ("elf32", elf32())] {
        let kernel = write(directory.path(), name, &file);
        let printed = format!("Diglot|{} one two|content|{}|", text(&kernel), text(&module));
        let files = ["--kernel", text(&kernel), "--initrd", text(&module), "--append", "one two"];
        let args = [&files[..], &["--memory", "16M", "--debug-exit", "0xf4", "--timeout", "60"]].concat();
        on_every_engine(Asks::Little, &args, |engine, code, stdout, stderr| {
            assert_eq!((code, stdout), (Some(33), printed.as_str()), "{name}, {engine}: {stderr}");
        });
    }
}

#[test]
fn a_kernel_sleeps_until_the_alarm() {
    let directory = tempfile::tempdir().expect("directory");
    let kernel = write(directory.path(), "sleeper", &flat(sleeper));
    let args = ["--kernel", text(&kernel), "--memory", "16M", "--debug-exit", "0xf4", "--timeout", "60"];
    on_every_engine(Asks::Little, &args, |engine, code, stdout, stderr| {
        assert_eq!((code, stdout), (Some(33), ""), "{engine}: {stderr}");
    });
    // Asleep, it can be ended all the same.
    let kernel = write(
        directory.path(),
        "sleeps-on",
        &flat(|a| {
            a.mov(edx, 0x604)?;
            a.mov(eax, 1 << 13 | 1 << 10)?;
            a.out(dx, ax)?;
            spin(a)
        }),
    );
    let args = ["--kernel", text(&kernel), "--memory", "16M", "--timeout", "1"];
    on_every_engine(Asks::Little, &args, |engine, code, _, stderr| assert_eq!(code, Some(124), "{engine}: {stderr}"));
}
