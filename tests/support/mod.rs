//! What the whole-machine tests share: how Diglot is started, the engines, and small guests of their own.
#![allow(dead_code, reason = "each test program uses its part")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use iced_x86::IcedError;
use iced_x86::code_asm::*;

pub mod smp;

/// A way to run guest code: its name, and its options.
pub type Engine = (&'static str, &'static [&'static str]);

/// Those that every host has.
pub const ENGINES: [Engine; 4] = [
    ("interpreter", &["--backend", "interp"]),
    ("compiler", &["--backend", "jit"]),
    ("compiler with 1 MiB of code memory", &["--backend", "jit", "--code-cache", "1M"]),
    ("lock-step", &["--lockstep"]),
];
/// The one that a host may have.
pub const KVM: Engine = ("KVM", &["--backend", "kvm", "--slow-kvm"]);

/// What a guest asks of KVM.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Asks {
    /// A few kinds of instructions, which an emulated KVM has too.
    Little,
    /// Any instructions.
    Much,
}

/// Whether this host's KVM runs guests that ask for so much; if not, it is said why.
pub fn has_kvm(asks: Asks) -> bool {
    let (code, stdout, stderr) = output(&mut diglot(&["doctor", "--json"]));
    assert_eq!(code, Some(0), "{stderr}");
    let report: serde_json::Value = serde_json::from_str(&stdout).expect("JSON");
    let kvm = &report["kvm"];
    let works = kvm["usable"] == true || (kvm["emulated"] == true && asks == Asks::Little);
    if !works {
        println!("skipped: KVM: {}", kvm["problem"].as_str().unwrap_or_default());
    }
    works
}

/// Every engine that can run a guest which asks for so much.
pub fn engines(asks: Asks) -> Vec<Engine> {
    let kvm = has_kvm(asks).then_some(KVM);
    ENGINES.into_iter().filter(|_| !only_kvm()).chain(kvm).collect()
}

/// Whether the environment asks for KVM alone, as where the other engines have been tested before.
pub fn only_kvm() -> bool {
    std::env::var("DIGLOT_TEST_ENGINES").is_ok_and(|only| only == "kvm")
}

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_diglot");

/// Whether there can be KVM on hosts of this kind; if not, it is said.
pub fn kvm_is_for_this_host() -> bool {
    let works = std::env::consts::ARCH == "x86_64";
    if !works {
        println!("skipped: KVM runs guests of the host's own kind, and this host is {}", std::env::consts::ARCH);
    }
    works
}

/// The words that start a program of the kind that this one is: itself, behind what `DIGLOT_TEST_RUNNER` names on hosts
/// of another kind, such as `qemu-aarch64 -L /usr/aarch64-linux-gnu`.
pub fn words(program: &str) -> Vec<String> {
    let runner = std::env::var("DIGLOT_TEST_RUNNER").unwrap_or_default();
    runner.split_whitespace().chain([program]).map(str::to_owned).collect()
}

/// A program of the kind that this one is.
pub fn start(program: &str) -> Command {
    let words = words(program);
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]);
    command
}

/// The program under test with arguments, nothing to read, and no environment of the tester's.
pub fn diglot(args: &[&str]) -> Command {
    let mut command = start(PROGRAM);
    command.args(args).stdin(Stdio::null()).env_remove("DIGLOT_LOG");
    command
}

/// Exit code, standard output and standard error.
pub fn output(command: &mut Command) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = command.output().expect("diglot starts");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (status.code(), text(stdout), text(stderr))
}

/// Runs a guest on every engine, and hands the engine's name and what came of it to `check`.
pub fn on_every_engine(asks: Asks, args: &[&str], check: impl Fn(&str, Option<i32>, &str, &str)) {
    for (engine, options) in engines(asks) {
        let (code, stdout, stderr) = output(&mut diglot(&[&["run"], options, args].concat()));
        assert!(!stderr.contains("panicked"), "{engine}: {stderr}");
        check(engine, code, &stdout, &stderr);
    }
}

/// Where the small guests lie and start.
pub const LOAD: u64 = 0x10_0000;

/// A kernel file that is entered as PVH guests are: 32-bit protected mode, flat segments, no paging, no interrupts.
pub fn pvh(image: &[u8], load: u64, entry: u32) -> Vec<u8> {
    const HEADERS: u64 = 64 + 2 * 56;
    let mut note = Vec::new();
    // The owner's name, the content and the type XEN_ELFNOTE_PHYS32_ENTRY.
    note.extend([4u32, 4, 18].iter().flat_map(|n| n.to_le_bytes()));
    note.extend(b"Xen\0");
    note.extend(entry.to_le_bytes());
    let image_at = HEADERS + note.len() as u64;

    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    // An executable for x86-64, version 1, with no entry of its own.
    file.extend([2u16, 62].iter().flat_map(|n| n.to_le_bytes()));
    file.extend(1u32.to_le_bytes());
    file.extend([0u64, 64, 0].iter().flat_map(|n| n.to_le_bytes()));
    file.extend(0u32.to_le_bytes());
    file.extend([64u16, 56, 2, 64, 0, 0].iter().flat_map(|n| n.to_le_bytes()));
    for (kind, offset, at, len) in [(4u32, HEADERS, 0, note.len() as u64), (1, image_at, load, image.len() as u64)] {
        file.extend([kind, 7].iter().flat_map(|n| n.to_le_bytes()));
        file.extend([offset, at, at, len, len, 4].iter().flat_map(|n| n.to_le_bytes()));
    }
    [file, note, image.to_vec()].concat()
}

/// Writes a small guest of 32-bit code to `directory` and gives its path.
pub fn guest(directory: &Path, name: &str, code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> PathBuf {
    let mut a = CodeAssembler::new(32).expect("a 32-bit assembler");
    code(&mut a).expect("instructions that exist");
    let image = a.assemble(LOAD).expect("code that can be encoded");
    write(directory, name, &pvh(&image, LOAD, LOAD as u32))
}

/// Writes a file to `directory` and gives its path.
pub fn write(directory: &Path, name: &str, content: &[u8]) -> PathBuf {
    let path = directory.join(name);
    std::fs::write(&path, content).expect("a test directory that can be written");
    path
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("a path that is text")
}

/// Prints one character on the serial port, whose transmitter is never busy for long.
pub fn put(a: &mut CodeAssembler, character: u8) -> Result<(), IcedError> {
    a.mov(edx, 0x3f8)?;
    a.mov(eax, u32::from(character))?;
    a.out(dx, al)
}

/// Prints a text.
pub fn say(a: &mut CodeAssembler, text: &str) -> Result<(), IcedError> {
    text.bytes().try_for_each(|byte| put(a, byte))
}

/// Turns the machine off: S5 in PM1a control.
pub fn power_off(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(edx, 0x604)?;
    a.mov(eax, 5 << 10 | 1 << 13)?;
    a.out(dx, ax)?;
    spin(a)
}

/// Goes round for ever, in the shortest of loops.
pub fn spin(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut here = a.create_label();
    a.set_label(&mut here)?;
    a.jmp(here)
}

/// Waits for so many ticks of the power-management timer, 3,579,545 of which are a second.
pub fn wait(a: &mut CodeAssembler, ticks: u32) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.mov(edx, 0x608)?;
    a.in_(eax, dx)?;
    a.mov(ebp, eax)?;
    a.set_label(&mut again)?;
    a.in_(eax, dx)?;
    a.sub(eax, ebp)?;
    a.and(eax, 0xff_ffff)?;
    a.cmp(eax, ticks)?;
    a.jb(again)
}
