//! Code that changes: a program that writes code and runs it, and one that runs much code few times.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicU32;

use crate::{Numbers, Program, fold};

/// A program that needs more than this executable: [`COMPILER`].
const COMPILE: &str = "c-compile";
/// Where the C compiler proper is, in a guest; elsewhere the environment variable `CC1` says.
const COMPILER: &str = "/cc1";

/// The group's programs.
pub const PROGRAMS: &[Program] = &[
    Program { name: "jit-patch", run: patch, result: Some(0x7349_1d4f_96b2_b5fa) },
    Program { name: "jit-compile", run: || compiled(400, 60), result: Some(0x1e45_5067_3260_7fe9) },
    Program { name: "cold-code", run: || compiled(24_000, 1), result: Some(0x3943_2574_c6d5_bff6) },
    Program { name: COMPILE, run: compile, result: None },
];

/// Memory that may be written and executed, by several threads at once.
pub struct Writable {
    at: *mut u8,
    size: usize,
}

impl Writable {
    /// New memory of `size` bytes.
    pub fn new(size: usize) -> Option<Writable> {
        let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        // SAFETY: a new mapping.
        let p = unsafe {
            libc::mmap(std::ptr::null_mut(), size, protection, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
        };
        (p != libc::MAP_FAILED).then_some(Writable { at: p.cast(), size })
    }

    /// Puts a function at an offset.
    pub fn put(&self, offset: usize, code: &[u8]) {
        assert!(offset + code.len() <= self.size);
        // SAFETY: inside the mapping, which nothing borrows.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.at.add(offset), code.len()) }
    }

    /// The constant at an offset, inside a function, as other threads change it while it runs.
    pub fn constant(&self, offset: usize) -> &AtomicU32 {
        assert!(offset + 4 <= self.size && offset.is_multiple_of(4));
        // SAFETY: inside the mapping and aligned.
        unsafe { AtomicU32::from_ptr(self.at.add(offset).cast()) }
    }

    /// Calls the function at an offset.
    pub fn call(&self, offset: usize, argument: u64) -> u64 {
        // SAFETY: every caller has put a whole function with this signature there, which touches no memory.
        unsafe {
            let f: extern "sysv64" fn(u64) -> u64 = std::mem::transmute(self.at.add(offset));
            f(argument)
        }
    }
}

// SAFETY: what is in the memory is only reached by raw pointers, atomics and calls, of which each user of several threads
// says who does what when.
unsafe impl Sync for Writable {}

impl Drop for Writable {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own.
        unsafe { libc::munmap(self.at.cast(), self.size) };
    }
}

/// One function, whose constant is written anew before each call.
fn patch() -> Option<u64> {
    let memory = Writable::new(4096)?;
    let mut sum = 0;
    for n in 0..50_000u32 {
        // MOV EAX, n; RET.
        let [a, b, c, d] = n.wrapping_mul(0x9e37_79b1).to_le_bytes();
        memory.put(0, &[0xb8, a, b, c, d, 0xc3]);
        sum = fold(sum, memory.call(0, 0));
    }
    Some(sum)
}

/// `functions` functions of straight-line arithmetic are written and each called 8 times, all of it `rounds` times in the
/// same memory.
fn compiled(functions: usize, rounds: u64) -> Option<u64> {
    const ROOM: usize = 128;
    let memory = Writable::new(functions * ROOM)?;
    let mut numbers = Numbers(functions as u64);
    let mut sum = 0;
    for _ in 0..rounds {
        for f in 0..functions {
            memory.put(f * ROOM, &function(&mut numbers));
        }
        for f in 0..functions {
            sum = (0..8).fold(sum, |sum, _| memory.call(f * ROOM, sum));
        }
    }
    Some(sum)
}

/// A function of its argument, with a branch in the middle.
fn function(numbers: &mut Numbers) -> Vec<u8> {
    let mut code = vec![0x48, 0x89, 0xf8]; // MOV RAX, RDI
    for half in 0..2 {
        for _ in 0..6 {
            let n = numbers.next();
            let [a, b, c, d, ..] = n.to_le_bytes();
            match n >> 62 {
                0 => code.extend([0x48, 0x05, a, b, c, d]),       // ADD RAX, imm32
                1 => code.extend([0x48, 0x35, a, b, c, d]),       // XOR RAX, imm32
                2 => code.extend([0x48, 0xc1, 0xc0, a & 63]),     // ROL RAX, imm8
                _ => code.extend([0x48, 0x69, 0xc0, a, b, c, d]), // IMUL RAX, RAX, imm32
            }
        }
        if half == 0 {
            // TEST AL, 1; JZ over INC RAX.
            code.extend([0xa8, 1, 0x74, 3, 0x48, 0xff, 0xc0]);
        }
    }
    code.push(0xc3);
    code
}

/// The C compiler of GCC, optimizing a file of small functions: much code, most of it run few times.
fn compile() -> Option<u64> {
    let compiler = std::env::var_os("CC1").unwrap_or(COMPILER.into());
    let mut child = Command::new(compiler)
        .args(["-fpreprocessed", "-quiet", "-O2", "-", "-o", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    // It reads all before it writes.
    child.stdin.take()?.write_all(source().as_bytes()).ok()?;
    let output = child.wait_with_output().ok()?;
    let sum = output.stdout.iter().fold(output.stdout.len() as u64, |sum, &b| fold(sum, b.into()));
    Some(if output.status.success() { sum } else { 0 })
}

/// A C program.
fn source() -> String {
    let mut numbers = Numbers(11);
    let mut text = String::from("typedef struct node { struct node *next; long key; double weight; } node;\n");
    for n in 0..24 {
        let [a, b, c, d, ..] = numbers.next().to_le_bytes();
        let _ = write!(
            text,
            "long f{n}(node *list, const unsigned char *s, long n) {{\n\
               long sum = {a}, i; double w = {b};\n\
               for (i = 0; i < n; i++) {{\n\
                 switch (s[i] & 7) {{\n\
                   case 0: sum += s[i] * {c}; break;\n\
                   case 1: sum ^= sum << {}; break;\n\
                   case 2: if (sum % {} == 0) return sum; break;\n\
                   default: w = w * 0.5 + s[i];\n\
                 }}\n\
               }}\n\
               for (; list; list = list->next) {{\n\
                 if (list->key > sum) {{ list->weight += w; sum -= list->key; }}\n\
                 else sum += (long)list->weight;\n\
               }}\n\
               return sum;\n\
             }}\n",
            d & 15,
            u32::from(d) + 3,
        );
    }
    text
}
