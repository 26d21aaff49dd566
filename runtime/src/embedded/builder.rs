//! What the parts of the guest share while they are assembled: the assembler, its data, and the idioms of a check.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::layout;

/// The outcome of emitting a part.
pub(super) type Emit<T = ()> = Result<T, IcedError>;

/// Strings and variables, which are given their addresses as they are named.
pub(super) struct Data {
    base: u64,
    pub bytes: Vec<u8>,
}

impl Data {
    pub fn new(base: u64) -> Data {
        Data { base, bytes: Vec::new() }
    }

    /// Address of a zero-terminated string.
    pub fn text(&mut self, s: &str) -> u64 {
        let at = self.base + self.bytes.len() as u64;
        self.bytes.extend(s.as_bytes());
        self.bytes.push(0);
        at
    }

    /// Address of 64-bit variables that stand one after the other, aligned for SSE.
    pub fn words(&mut self, values: &[u64]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let at = self.base + self.bytes.len() as u64;
        values.iter().for_each(|v| self.bytes.extend(v.to_le_bytes()));
        at
    }
}

/// Addresses of the kernel's variables.
pub(super) struct Variables {
    /// Name of the check that runs, and how many have passed.
    pub check: u64,
    pub passed: u64,
    /// Timer interrupts taken.
    pub ticks: u64,
    /// Frequencies of the time-stamp counter and of the local APIC's timer, in hertz.
    pub tsc_hz: u64,
    pub apic_hz: u64,
    /// 1 when the local APIC is in x2APIC mode.
    pub x2apic: u64,
    /// Vector of the exception that a check is about to raise plus 1, else 0; and where to go on after it.
    pub expected: u64,
    pub resume: u64,
    /// Error code, address (CR2) and instruction pointer of the last expected exception.
    pub error: u64,
    pub address: u64,
    pub rip: u64,
    /// Pages mapped on demand.
    pub demanded: u64,
    /// The kernel's stack pointer while a user program runs.
    pub kernel_rsp: u64,
    /// The block that GS points to in a system call: the stack to use, and the user's stack pointer.
    pub per_cpu: u64,
}

/// Routines of the kernel that its parts call.
pub(super) struct Routines {
    /// Prints the string at RSI. Clobbers RAX, RCX, RDX, RSI.
    pub print: CodeLabel,
    /// Prints CL. Clobbers RAX, RDX.
    pub put: CodeLabel,
    /// Prints RAX in decimal, and in hexadecimal. Clobbers RAX, RCX, RDX, RSI.
    pub decimal: CodeLabel,
    pub hexadecimal: CodeLabel,
    /// Ends the guest in a crash: a check found RAX, not RCX.
    pub fail: CodeLabel,
    /// Ends the guest in a crash.
    pub crash: CodeLabel,
    /// Turns the machine off.
    pub power_off: CodeLabel,
    /// Local APIC register ECX: written from EAX, read to EAX. Clobber RCX, RDX.
    pub apic_write: CodeLabel,
    pub apic_read: CodeLabel,
}

pub(super) struct Builder {
    pub a: CodeAssembler,
    pub data: Data,
    pub call: Routines,
    pub var: Variables,
    checks: u64,
}

impl Builder {
    pub fn new() -> Emit<Builder> {
        let mut a = CodeAssembler::new(64)?;
        let mut data = Data::new(layout::DATA);
        let mut word = || data.words(&[0]);
        let var = Variables {
            check: word(),
            passed: word(),
            ticks: word(),
            tsc_hz: word(),
            apic_hz: word(),
            x2apic: word(),
            expected: word(),
            resume: word(),
            error: word(),
            address: word(),
            rip: word(),
            demanded: word(),
            kernel_rsp: word(),
            per_cpu: data.words(&[layout::SYSCALL_STACK, 0]),
        };
        let call = Routines {
            print: a.create_label(),
            put: a.create_label(),
            decimal: a.create_label(),
            hexadecimal: a.create_label(),
            fail: a.create_label(),
            crash: a.create_label(),
            power_off: a.create_label(),
            apic_write: a.create_label(),
            apic_read: a.create_label(),
        };
        Ok(Builder { a, data, call, var, checks: 0 })
    }

    /// How many checks have been emitted.
    pub fn checks(&self) -> u64 {
        self.checks
    }

    /// Prints a fixed text.
    pub fn say(&mut self, text: &str) -> Emit {
        let at = self.data.text(text);
        self.a.mov(rsi, at)?;
        self.a.call(self.call.print)
    }

    /// Prints the variable at `variable` in decimal.
    pub fn say_number(&mut self, variable: u64) -> Emit {
        self.a.mov(rax, qword_ptr(variable))?;
        self.a.call(self.call.decimal)
    }

    /// A named check: `body` jumps to `fail` if something is wrong, and reaches its end otherwise.
    pub fn check(&mut self, name: &str, body: impl FnOnce(&mut Builder) -> Emit) -> Emit {
        let at = self.data.text(name);
        self.a.mov(rax, at)?;
        self.a.mov(qword_ptr(self.var.check), rax)?;
        body(self)?;
        self.a.inc(qword_ptr(self.var.passed))?;
        self.checks += 1;
        self.say(&format!("[ ok ] {name}\r\n"))
    }

    /// Fails the check unless RAX is `expected`. Clobbers RCX.
    pub fn expect(&mut self, expected: u64) -> Emit {
        self.a.mov(rcx, expected)?;
        self.a.cmp(rax, rcx)?;
        self.a.jne(self.call.fail)
    }

    /// Fails the check unless the variable at `variable` is `expected`. Clobbers RAX and RCX.
    pub fn expect_variable(&mut self, variable: u64, expected: u64) -> Emit {
        self.a.mov(rax, qword_ptr(variable))?;
        self.expect(expected)
    }

    /// Writes a model-specific register. Clobbers RAX, RCX, RDX.
    pub fn write_msr(&mut self, msr: u32, value: u64) -> Emit {
        self.a.mov(ecx, msr)?;
        self.a.mov(eax, value as u32)?;
        self.a.mov(edx, (value >> 32) as u32)?;
        self.a.wrmsr()
    }

    /// Writes a local APIC register, named by its x2APIC number less 800h. Clobbers RAX, RCX, RDX.
    pub fn write_apic(&mut self, register: u32, value: u32) -> Emit {
        self.a.mov(ecx, register)?;
        self.a.mov(eax, value)?;
        self.a.call(self.call.apic_write)
    }

    /// RAX = time-stamp counter. Clobbers RDX.
    pub fn time(&mut self) -> Emit {
        self.a.rdtsc()?;
        self.a.shl(rdx, 32)?;
        self.a.or(rax, rdx)
    }

    /// Emits `body` `count` times over at run time, with the remaining count in `counter`.
    pub fn repeat(&mut self, counter: AsmRegister32, count: u32, body: impl FnOnce(&mut Builder) -> Emit) -> Emit {
        let mut again = self.a.create_label();
        self.a.mov(counter, count)?;
        self.a.set_label(&mut again)?;
        body(self)?;
        self.a.dec(counter)?;
        self.a.jne(again)
    }
}
