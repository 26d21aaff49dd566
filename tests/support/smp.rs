//! Small guests of several CPUs: how the others are started, where each has its stack, and how they wait for each other.
//!
//! A guest is an image at [`LOAD`], most of which is data made here: descriptor tables, page tables that map the first
//! 4 GiB to themselves, and what each CPU runs until it is in the mode of the test. Then each is at [`BODY`], with its
//! number in EBP, which stays there, its local APIC enabled, and interrupts disabled.

use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};

use iced_x86::code_asm::*;
use iced_x86::{BlockEncoderOptions, Code, IcedError, Instruction};

use super::{ENGINES, Engine, LOAD, diglot, only_kvm, output, power_off, pvh, text, write};

/// The page that the others begin at, and its number, which is the vector of the start-up IPI.
pub const TRAMPOLINE: u32 = 0x8000;
pub const TRAMPOLINE_VECTOR: u32 = TRAMPOLINE >> 12;
/// Where the code of the test is.
pub const BODY: u64 = LOAD + 0x1_0000;
/// One stack a CPU.
const STACKS: u32 = 0x18_0000;
const STACK_SIZE: u32 = 0x2000;
/// How many have come to barriers since the start, all barriers together.
const ARRIVED: u32 = 0x1f_0000;
/// For each CPU, 64 bytes apart: how many will have come when it may leave the barrier that it is at.
const AWAITED: u32 = 0x1f_1000;
/// From here on memory is the test's.
pub const FREE: u32 = 0x20_0000;
/// What [`PAGE_TABLE`] maps: two megabytes of linear addresses, in pages of 4 KiB, to themselves.
pub const SMALL_PAGES: u32 = 0x60_0000;
/// The page table of [`SMALL_PAGES`].
pub const PAGE_TABLE: u32 = LOAD as u32 + PAGE_TABLE_AT as u32;
/// The local APIC's registers.
pub const LAPIC: u32 = 0xfee0_0000;
pub const LAPIC_ID: u32 = 0x20;
pub const LAPIC_EOI: u32 = 0xb0;
pub const LAPIC_LDR: u32 = 0xd0;
pub const LAPIC_SVR: u32 = 0xf0;
/// All but self.
pub const OTHERS: u32 = 0b11 << 18;
/// Self.
pub const SELF: u32 = 0b01 << 18;
/// All, self too.
pub const ALL: u32 = 0b10 << 18;
/// The asserted level, which all IPIs have.
pub const ASSERT: u32 = 1 << 14;
pub const INIT: u32 = ASSERT | 5 << 8;
pub const STARTUP: u32 = ASSERT | 6 << 8 | TRAMPOLINE_VECTOR;
pub const NMI: u32 = ASSERT | 4 << 8;

// Parts of the image.
const TRAMPOLINE_AT: usize = 0x800;
const GDT_AT: usize = 0xc00;
const GDTR_AT: usize = 0xd00;
const IDTR_AT: usize = 0xd10;
const IDT_AT: usize = 0x1000;
const PML4_AT: usize = 0x2000;
const PDPT_AT: usize = 0x3000;
const PD_AT: usize = 0x4000;
const PAGE_TABLE_AT: usize = 0x8000;
const BODY_AT: usize = (BODY - LOAD) as usize;

/// Flat 32-bit code, data, and 64-bit code.
const GDT: [u64; 4] = [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00af_9b00_0000_ffff];
const CODE32: u16 = 8;
const DATA: u32 = 16;
const CODE64: u16 = 24;

/// The mode that a test's code runs in, by the bits of its addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bits {
    /// Protected mode, flat, without paging.
    B32,
    /// 64-bit mode, all addresses mapped to themselves.
    B64,
}

/// The engines that run several CPUs and are the project's own. KVM's CPUs are the host's processor.
pub fn engines() -> Vec<Engine> {
    ENGINES.into_iter().filter(|&(name, _)| name != "lock-step" && !only_kvm()).collect()
}

/// Runs a guest on each of them, and hands the engine's name and what came of it to `check`.
pub fn on_engines(kernel: &Path, cpus: u32, args: &[&str], check: impl Fn(&str, Option<i32>, &str, &str)) {
    let cpus = cpus.to_string();
    for (engine, options) in engines() {
        let common = ["run", "--memory", "32M", "--cpus", &cpus, "--kernel", text(kernel)];
        let limit: &[&str] = if args.contains(&"--timeout") { &[] } else { &["--timeout", "100"] };
        let (code, stdout, stderr) = output(&mut diglot(&[&common, options, args, limit].concat()));
        assert!(!stderr.contains("panicked"), "{engine}: {stderr}");
        check(engine, code, &stdout, &stderr);
    }
}

/// Runs a guest that checks itself, and says of each wrong result a line and in the end "done".
pub fn passes(name: &str, kernel: &Path, cpus: u32) {
    on_engines(kernel, cpus, &[], |engine, code, stdout, stderr| {
        assert_eq!((code, stdout), (Some(0), "done\n"), "{name}, {cpus} CPUs, {engine}: {stderr}");
    });
}

/// A guest that is being written.
pub struct Smp {
    a: CodeAssembler,
    pub bits: Bits,
    pub cpus: u32,
    barrier: CodeLabel,
    puts: CodeLabel,
    hex: CodeLabel,
    /// Interrupt handlers by vector.
    handlers: Vec<(u8, CodeLabel)>,
}

impl Deref for Smp {
    type Target = CodeAssembler;
    fn deref(&self) -> &CodeAssembler {
        &self.a
    }
}

impl DerefMut for Smp {
    fn deref_mut(&mut self) -> &mut CodeAssembler {
        &mut self.a
    }
}

/// What emitting code gives.
pub type Done = Result<(), IcedError>;

/// Writes a guest to `directory` and gives its path. `code` begins on the first CPU, the others wait for
/// [`Smp::start_others`].
pub fn guest(
    directory: &Path,
    name: &str,
    bits: Bits,
    cpus: u32,
    code: impl FnOnce(&mut Smp) -> Result<(), IcedError>,
) -> PathBuf {
    let image = image(bits, cpus, code).expect("code that can be encoded");
    write(directory, name, &pvh(&image, LOAD, LOAD as u32))
}

fn image(bits: Bits, cpus: u32, code: impl FnOnce(&mut Smp) -> Done) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(if bits == Bits::B64 { 64 } else { 32 })?;
    let (barrier, puts, hex) = (a.create_label(), a.create_label(), a.create_label());
    let mut g = Smp { a, bits, cpus, barrier, puts, hex, handlers: Vec::new() };
    code(&mut g)?;
    g.routines()?;
    let body = g.a.assemble_options(BODY, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
    let mut image = vec![0; BODY_AT];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);

    let (entry, common) = entry(bits)?;
    put(0, &entry);
    put(TRAMPOLINE_AT, &trampoline(common)?);
    put(GDT_AT, &GDT.map(u64::to_le_bytes).concat());
    let limits = [(GDTR_AT, 31u16, GDT_AT), (IDTR_AT, 0xfff, IDT_AT)];
    for (at, limit, table) in limits {
        put(at, &limit.to_le_bytes());
        put(at + 2, &(LOAD as u32 + table as u32).to_le_bytes());
    }
    for &(vector, label) in &g.handlers {
        let at = body.label_ip(&label)?;
        let selector = if bits == Bits::B64 { CODE64 } else { CODE32 };
        let gate = at & 0xffff | u64::from(selector) << 16 | 0x8e00 << 32 | at >> 16 << 48;
        let size = if bits == Bits::B64 { 16 } else { 8 };
        put(IDT_AT + usize::from(vector) * size, &gate.to_le_bytes());
    }
    let entry_of = |table: usize| (LOAD + table as u64 | 7).to_le_bytes();
    put(PML4_AT, &entry_of(PDPT_AT));
    for gib in 0..4 {
        put(PDPT_AT + 8 * gib, &entry_of(PD_AT + 0x1000 * gib));
    }
    for large in 0..2048 {
        // Present, writable, accessed, dirty, large.
        put(PD_AT + 8 * large, &((large as u64) << 21 | 0xe7).to_le_bytes());
    }
    put(PD_AT + 8 * (SMALL_PAGES as usize >> 21), &entry_of(PAGE_TABLE_AT));
    for page in 0..512 {
        put(PAGE_TABLE_AT + 8 * page, &(u64::from(SMALL_PAGES) + ((page as u64) << 12) | 0x67).to_le_bytes());
    }
    image.extend(body.inner.code_buffer);
    assert!(LOAD + image.len() as u64 <= u64::from(STACKS), "a body of {} bytes", image.len());
    Ok(image)
}

/// What a CPU that has been started runs in real mode, at any page.
fn trampoline(common: u32) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(16)?;
    a.cli()?;
    // What the code needs is in its page, wherever that is.
    a.mov(ax, cs)?;
    a.mov(ds, ax)?;
    a.lock().inc(word_ptr(STARTED_HERE))?;
    a.add_instruction(Instruction::with1(
        Code::Lgdt_m1632,
        iced_x86::MemoryOperand::with_displ(u64::from(GDTR_IN_TRAMPOLINE), 2),
    )?)?;
    a.mov(eax, cr0)?;
    a.or(al, 1)?;
    a.mov(cr0, eax)?;
    a.add_instruction(Instruction::with_far_branch(Code::Jmp_ptr1632, CODE32, common)?)?;
    let mut code = a.assemble(0)?;
    code.resize(usize::from(GDTR_IN_TRAMPOLINE), 0x90);
    code.extend(31u16.to_le_bytes());
    code.extend((LOAD as u32 + GDT_AT as u32).to_le_bytes());
    code.resize(TRAMPOLINE_LEN as usize, 0);
    Ok(code)
}

/// Where the trampoline has the operand of LGDT.
const GDTR_IN_TRAMPOLINE: u16 = 0x40;
/// Where it counts, in a word, how many have begun there.
pub const STARTED_HERE: u32 = 0x48;
pub const TRAMPOLINE_LEN: u32 = 0x50;

/// 32-bit code from the machine's entry, and from the trampoline, to the body; where the trampoline enters it.
fn entry(bits: Bits) -> Result<(Vec<u8>, u32), IcedError> {
    let mut a = CodeAssembler::new(32)?;
    a.mov(esi, LOAD as u32 + TRAMPOLINE_AT as u32)?;
    a.mov(edi, TRAMPOLINE)?;
    a.mov(ecx, TRAMPOLINE_LEN)?;
    a.rep().movsb()?;
    // No interrupts of the 8259s, such as the 8254's.
    a.mov(al, 0xff)?;
    a.out(0x21, al)?;
    a.out(0xa1, al)?;
    a.lgdt(dword_ptr(LOAD as u32 + GDTR_AT as u32))?;
    let reload = a.assemble(LOAD)?.len() as u32 + 7;
    a.add_instruction(Instruction::with_far_branch(Code::Jmp_ptr1632, CODE32, LOAD as u32 + reload)?)?;
    a.mov(eax, DATA)?;
    a.mov(ds, ax)?;
    a.mov(es, ax)?;
    a.mov(ss, ax)?;
    a.mov(ebp, dword_ptr(LAPIC + LAPIC_ID))?;
    a.shr(ebp, 24)?;
    a.mov(dword_ptr(LAPIC + LAPIC_SVR), 0x1ff)?;
    a.lea(eax, dword_ptr(ebp + 1))?;
    a.imul_3(esp, eax, STACK_SIZE)?;
    a.add(esp, STACKS)?;
    a.lidt(dword_ptr(LOAD as u32 + IDTR_AT as u32))?;
    if bits == Bits::B64 {
        a.mov(eax, cr4)?;
        a.or(eax, 1 << 5)?;
        a.mov(cr4, eax)?;
        a.mov(eax, LOAD as u32 + PML4_AT as u32)?;
        a.mov(cr3, eax)?;
        a.mov(ecx, 0xc000_0080u32)?;
        a.rdmsr()?;
        a.or(eax, 1 << 8)?;
        a.wrmsr()?;
        a.mov(eax, cr0)?;
        a.or(eax, 0x8000_0000u32)?;
        a.mov(cr0, eax)?;
    }
    let selector = if bits == Bits::B64 { CODE64 } else { CODE32 };
    a.add_instruction(Instruction::with_far_branch(Code::Jmp_ptr1632, selector, BODY as u32)?)?;
    let code = a.assemble(LOAD)?;
    assert!(code.len() <= TRAMPOLINE_AT);
    Ok((code, LOAD as u32 + reload))
}

impl Smp {
    /// A memory operand at EBX or RBX.
    pub fn bx(&self) -> AsmMemoryOperand {
        if self.bits == Bits::B64 { rbx + 0 } else { ebx + 0 }
    }

    /// A memory operand at ESI or RSI.
    pub fn si(&self) -> AsmMemoryOperand {
        if self.bits == Bits::B64 { rsi + 0 } else { esi + 0 }
    }

    /// A memory operand at EDI or RDI.
    pub fn di(&self) -> AsmMemoryOperand {
        if self.bits == Bits::B64 { rdi + 0 } else { edi + 0 }
    }

    /// A memory operand at the stack pointer.
    pub fn sp(&self) -> AsmMemoryOperand {
        if self.bits == Bits::B64 { rsp + 0 } else { esp + 0 }
    }

    pub fn push_ax(&mut self) -> Done {
        if self.bits == Bits::B64 { self.a.push(rax) } else { self.a.push(eax) }
    }

    pub fn pop_ax(&mut self) -> Done {
        if self.bits == Bits::B64 { self.a.pop(rax) } else { self.a.pop(eax) }
    }

    pub fn push_bx(&mut self) -> Done {
        if self.bits == Bits::B64 { self.a.push(rbx) } else { self.a.push(ebx) }
    }

    pub fn pop_bx(&mut self) -> Done {
        if self.bits == Bits::B64 { self.a.pop(rbx) } else { self.a.pop(ebx) }
    }

    /// Returns from an interrupt.
    pub fn iret_here(&mut self) -> Done {
        if self.bits == Bits::B64 { self.a.iretq() } else { self.a.iretd() }
    }

    /// Serialises by IRET, which leads to what is emitted next. Changes EAX.
    pub fn iret_to_next(&mut self) -> Done {
        let (mut iret, mut next) = (self.a.create_label(), self.a.create_label());
        if self.bits == Bits::B64 {
            self.a.mov(rax, rsp)?;
            self.a.push(DATA as i32)?;
            self.a.push(rax)?;
            self.a.pushfq()?;
            self.a.push(i32::from(CODE64))?;
        } else {
            self.a.pushfd()?;
            self.a.push(i32::from(CODE32))?;
        }
        self.a.call(iret)?;
        self.a.jmp(next)?;
        self.place(&mut iret)?;
        self.iret_here()?;
        self.place(&mut next)
    }

    /// A label, here.
    pub fn here(&mut self) -> Result<CodeLabel, IcedError> {
        let mut label = self.a.create_label();
        self.place(&mut label)?;
        Ok(label)
    }

    /// Puts a label here, even behind another.
    pub fn place(&mut self, label: &mut CodeLabel) -> Done {
        self.a.set_label(label)?;
        self.a.zero_bytes()
    }

    /// Names what is emitted here as the handler of an interrupt vector.
    pub fn handler(&mut self, vector: u8) -> Done {
        let label = self.here()?;
        self.handlers.push((vector, label));
        Ok(())
    }

    /// What only one CPU runs.
    pub fn on(&mut self, cpu: u32, code: impl FnOnce(&mut Smp) -> Done) -> Done {
        let mut others = self.a.create_label();
        self.a.cmp(ebp, cpu as i32)?;
        self.a.jne(others)?;
        code(self)?;
        self.place(&mut others)
    }

    /// What all but one CPU run.
    pub fn not_on(&mut self, cpu: u32, code: impl FnOnce(&mut Smp) -> Done) -> Done {
        let mut that = self.a.create_label();
        self.a.cmp(ebp, cpu as i32)?;
        self.a.je(that)?;
        code(self)?;
        self.place(&mut that)
    }

    /// Repeats what is emitted by `code` so many times, counted in `counter`.
    pub fn times(&mut self, counter: AsmRegister32, times: u32, code: impl FnOnce(&mut Smp) -> Done) -> Done {
        self.a.mov(counter, times)?;
        let again = self.here()?;
        code(self)?;
        self.a.dec(counter)?;
        self.a.jne(again)
    }

    /// Waits until a doubleword of memory is a register's value. Changes no register.
    pub fn wait_for(&mut self, at: u32, value: AsmRegister32) -> Done {
        let again = self.here()?;
        self.a.pause()?;
        self.a.cmp(dword_ptr(at), value)?;
        self.a.jne(again)
    }

    /// Waits until a doubleword of memory is `value`, but not for ever. Changes ECX.
    pub fn expect(&mut self, at: u32, value: u32) -> Done {
        let mut there = self.a.create_label();
        self.times(ecx, 20_000_000, |g| {
            g.a.pause()?;
            g.a.cmp(dword_ptr(at), value as i32)?;
            g.a.je(there)
        })?;
        self.place(&mut there)
    }

    /// A memory operand: the doubleword of this CPU in a table of one for each.
    pub fn own(&self, table: u32) -> AsmMemoryOperand {
        dword_ptr(if self.bits == Bits::B64 { rbp * 4 + table as i32 } else { ebp * 4 + table as i32 })
    }

    /// Lets time pass, by counting EAX down.
    pub fn delay(&mut self, turns: u32) -> Done {
        self.times(eax, turns, |g| g.a.pause())
    }

    /// Sends an IPI; changes EDI.
    pub fn ipi(&mut self, destination: u32, command: u32) -> Done {
        self.a.mov(edi, LAPIC)?;
        let registers = self.di();
        self.a.mov(dword_ptr(registers + 0x310), destination)?;
        self.a.mov(dword_ptr(registers + 0x300), command)
    }

    /// Ends the interrupt that is in service; changes EAX.
    pub fn eoi(&mut self) -> Done {
        self.a.mov(eax, LAPIC + LAPIC_EOI)?;
        self.a.mov(if self.bits == Bits::B64 { dword_ptr(rax) } else { dword_ptr(eax) }, 0)
    }

    /// Has the first CPU start the others, which begin with the body too, and waits for all.
    pub fn start_others(&mut self) -> Done {
        self.on(0, |g| {
            g.ipi(0, OTHERS | INIT)?;
            g.ipi(0, OTHERS | STARTUP)
        })?;
        self.barrier()
    }

    /// Waits for all CPUs. Changes EAX.
    pub fn barrier(&mut self) -> Done {
        let barrier = self.barrier;
        self.a.call(barrier)
    }

    /// Prints a text. Changes EAX, EDX and ESI.
    pub fn say(&mut self, text: &str) -> Done {
        let puts = self.puts;
        self.a.call(puts)?;
        for chunk in text.as_bytes().chunks(16) {
            self.a.db(chunk)?;
        }
        self.a.db(&[0])
    }

    /// Prints EAX in hexadecimal. Changes EAX, EBX, ECX and EDX.
    pub fn say_eax(&mut self) -> Done {
        let hex = self.hex;
        self.a.call(hex)
    }

    /// Says so if EAX is not what it is to be. Changes all registers but EBP.
    pub fn check(&mut self, what: &str, expected: u32) -> Done {
        let mut good = self.a.create_label();
        self.a.cmp(eax, expected as i32)?;
        self.a.je(good)?;
        self.push_ax()?;
        self.say(&format!("FAIL {what}: found "))?;
        self.pop_ax()?;
        self.say_eax()?;
        self.say(", not ")?;
        self.a.mov(eax, expected)?;
        self.say_eax()?;
        self.say("\n")?;
        self.place(&mut good)
    }

    /// As [`Smp::check`], of a doubleword of memory.
    pub fn check_at(&mut self, what: &str, at: u32, expected: u32) -> Done {
        self.a.mov(eax, dword_ptr(at))?;
        self.check(what, expected)
    }

    /// The end of the test: the first CPU says "done" and turns the machine off.
    pub fn finish(&mut self) -> Done {
        self.barrier()?;
        self.on(0, |g| {
            g.say("done\n")?;
            power_off(&mut g.a)
        })?;
        self.halt()
    }

    /// Halts for ever, but for interrupts.
    pub fn halt(&mut self) -> Done {
        let again = self.here()?;
        self.a.hlt()?;
        self.a.jmp(again)
    }

    fn routines(&mut self) -> Done {
        let own = self.bx() + AWAITED as i32;
        let (mut barrier, mut puts, mut hex) = (self.barrier, self.puts, self.hex);

        self.place(&mut barrier)?;
        self.push_bx()?;
        self.a.mov(ebx, ebp)?;
        self.a.shl(ebx, 6)?;
        self.a.mov(eax, dword_ptr(own))?;
        self.a.add(eax, self.cpus as i32)?;
        self.a.mov(dword_ptr(own), eax)?;
        self.a.lock().inc(dword_ptr(ARRIVED))?;
        let again = self.here()?;
        self.a.pause()?;
        self.a.mov(ebx, dword_ptr(ARRIVED))?;
        self.a.sub(ebx, eax)?;
        self.a.js(again)?;
        self.pop_bx()?;
        self.a.ret()?;

        self.place(&mut puts)?;
        if self.bits == Bits::B64 {
            self.a.pop(rsi)?
        } else {
            self.a.pop(esi)?
        }
        self.a.mov(edx, 0x3f8)?;
        let mut end = self.a.create_label();
        let again = self.here()?;
        self.a.lodsb()?;
        self.a.test(al, al)?;
        self.a.je(end)?;
        self.a.out(dx, al)?;
        self.a.jmp(again)?;
        self.place(&mut end)?;
        if self.bits == Bits::B64 {
            self.a.jmp(rsi)?
        } else {
            self.a.jmp(esi)?
        }

        self.place(&mut hex)?;
        self.a.mov(ebx, eax)?;
        self.a.mov(edx, 0x3f8)?;
        self.a.mov(ecx, 28)?;
        let again = self.here()?;
        self.a.mov(eax, ebx)?;
        self.a.shr(eax, cl)?;
        self.a.and(eax, 15)?;
        let mut digit = self.a.create_label();
        self.a.cmp(eax, 10)?;
        self.a.jb(digit)?;
        self.a.add(eax, i32::from(b'a' - b'0') - 10)?;
        self.place(&mut digit)?;
        self.a.add(eax, i32::from(b'0'))?;
        self.a.out(dx, al)?;
        self.a.sub(ecx, 4)?;
        self.a.jns(again)?;
        self.a.ret()
    }
}
