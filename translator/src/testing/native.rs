//! The host's processor, running code at [`INSN`] of the window in user mode; what it raises is caught.

use std::sync::{Mutex, MutexGuard, Once};

use iced_x86::CpuidFeature;
use iced_x86::code_asm::*;

use super::{
    ABSENT, CODE, DATA, DATA_LEN, EDGE, FALL, Fault, Fpu, INSN, Machine, READ_ONLY, Segments, TAKEN, WINDOW, WINDOW_LEN,
};

const PAGE: usize = 0x1000;
/// Where a taken branch and a fault go on.
const BRANCHED: u64 = FALL + 0x200;
const FAULTED: u64 = FALL + 0x400;
/// The prologue of 32-bit code.
const START32: u64 = WINDOW + 0x200;
/// 32-bit code goes on here, and from here to the 64-bit code at [`FALL`].
const FALL32: u64 = FALL + 0x600;
/// Registers, flags, the way out, the host's stack pointer and MXCSR, and what the signal handler notes.
const CONTEXT: u64 = WINDOW + 0xc000;
const FLAGS: u64 = CONTEXT + 16 * 8;
const WAY: u64 = CONTEXT + 17 * 8;
const HOST_SP: u64 = CONTEXT + 18 * 8;
const HOST_MXCSR: u64 = CONTEXT + 19 * 8;
const VECTOR: u64 = CONTEXT + 20 * 8;
const ERROR: u64 = CONTEXT + 21 * 8;
const ADDRESS: u64 = CONTEXT + 22 * 8;
const FAULT_IP: u64 = CONTEXT + 23 * 8;
/// Whether the code under test runs: a fault may be where it has led.
const RUNNING: u64 = CONTEXT + 30 * 8;
/// A far pointer to 32-bit code.
const FAR32: u64 = CONTEXT + 24 * 8;
/// The bases of FS and GS, the host's own, and the selectors that the code leaves.
const FS_BASE: u64 = CONTEXT + 25 * 8;
const GS_BASE: u64 = CONTEXT + 26 * 8;
const HOST_FS: u64 = CONTEXT + 27 * 8;
const HOST_GS: u64 = CONTEXT + 28 * 8;
const SELECTORS: u64 = CONTEXT + 29 * 8;
/// Linux's selectors of user mode's code, and of data that 32-bit code can use.
const CS32: u16 = 0x23;
const CS64: u16 = 0x33;
const DS: u32 = 0x2b;
/// An XSAVE area of x87, SSE and AVX state.
const AREA: u64 = CONTEXT + 0x400;
const AREA_HEADER: u64 = AREA + 512;
const AREA_HIGH: u64 = AREA + 576;
const COMPONENTS: i32 = 7;
/// The end of user mode's addresses on Linux: the last page has none.
const USER_END: u64 = 0x7fff_ffff_f000;
/// Linux's bit of AT_HWCAP2 for user mode's use of RDFSBASE and its kin.
const HWCAP2_FSGSBASE: u64 = 2;

static WINDOW_IN_USE: Mutex<bool> = Mutex::new(false);

/// Exclusive use of the window.
pub(crate) struct Native {
    _lock: MutexGuard<'static, bool>,
    bits: u32,
    len: usize,
}

fn registers() -> [AsmRegister64; 16] {
    [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15]
}

fn slot(at: u64) -> AsmMemoryOperand {
    qword_ptr(at)
}

/// The code that loads the registers and jumps to [`INSN`], the code there being 32- or 64-bit. All data segment
/// registers are null before, but DS and ES of 32-bit code.
fn prologue(bits: u32) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    for r in [rbx, rbp, r12, r13, r14, r15] {
        a.push(r)?;
    }
    a.pushfq()?;
    a.mov(slot(HOST_SP), rsp)?;
    a.stmxcsr(dword_ptr(HOST_MXCSR))?;
    a.mov(eax, COMPONENTS)?;
    a.mov(edx, 0)?;
    a.xrstor64(ptr(AREA))?;
    a.rdfsbase(rax)?;
    a.mov(slot(HOST_FS), rax)?;
    a.rdgsbase(rax)?;
    a.mov(slot(HOST_GS), rax)?;
    a.mov(rax, slot(FS_BASE))?;
    a.wrfsbase(rax)?;
    a.mov(rax, slot(GS_BASE))?;
    a.wrgsbase(rax)?;
    if bits == 32 {
        a.mov(eax, DS as i32)?;
        a.mov(ds, eax)?;
        a.mov(es, eax)?;
    }
    a.push(slot(FLAGS))?;
    a.popfq()?;
    for (n, r) in registers().into_iter().enumerate() {
        a.mov(r, slot(CONTEXT + n as u64 * 8))?;
    }
    if bits == 32 {
        // JMP FAR [FAR32]
        a.db(&[0xff, 0x2c, 0x25])?;
        a.db(&(FAR32 as u32).to_le_bytes())?;
    } else {
        a.jmp(INSN)?;
    }
    a.assemble(if bits == 32 { START32 } else { WINDOW })
}

/// The code behind the instruction: notes the way it took, stores the registers, returns.
fn epilogue(way: u64, at: u64) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    a.mov(dword_ptr(WAY), way as i32)?;
    for (n, r) in registers().into_iter().enumerate() {
        a.mov(slot(CONTEXT + n as u64 * 8), r)?;
    }
    a.mov(rsp, slot(HOST_SP))?;
    a.pushfq()?;
    a.pop(slot(FLAGS))?;
    for (at, r) in (0..).zip([ds, es, fs, gs]) {
        a.mov(eax, r)?;
        a.mov(word_ptr(SELECTORS + 2 * at), ax)?;
    }
    a.rdfsbase(rax)?;
    a.mov(slot(FS_BASE), rax)?;
    a.rdgsbase(rax)?;
    a.mov(slot(GS_BASE), rax)?;
    // What 64-bit code expects in them.
    a.mov(eax, 0)?;
    for r in [ds, es, fs, gs] {
        a.mov(r, eax)?;
    }
    a.mov(rax, slot(HOST_FS))?;
    a.wrfsbase(rax)?;
    a.mov(rax, slot(HOST_GS))?;
    a.wrgsbase(rax)?;
    a.mov(eax, COMPONENTS)?;
    a.mov(edx, 0)?;
    a.xsave64(ptr(AREA))?;
    a.fninit()?;
    a.ldmxcsr(dword_ptr(HOST_MXCSR))?;
    a.vzeroupper()?;
    a.popfq()?;
    for r in [r15, r14, r13, r12, rbp, rbx] {
        a.pop(r)?;
    }
    a.ret()?;
    a.assemble(at)
}

/// Whether this host's processor may judge what is its maker's to decide: undefined flags, what a failing operand leaves
/// behind, the last bit of a transcendental. Says so if not.
pub(crate) fn is_of_the_model_s_maker() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0);
    let same = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat() == b"AuthenticAMD";
    if !same {
        eprintln!("skipped: this processor is not AMD's, whom the model follows where makers differ");
    }
    same
}

/// Whether the host's processor has an optional instruction class.
pub(crate) fn host_has(f: CpuidFeature) -> bool {
    match f {
        CpuidFeature::BMI1 => is_x86_feature_detected!("bmi1"),
        CpuidFeature::BMI2 => is_x86_feature_detected!("bmi2"),
        CpuidFeature::ADX => is_x86_feature_detected!("adx"),
        CpuidFeature::LZCNT => is_x86_feature_detected!("lzcnt"),
        CpuidFeature::POPCNT => is_x86_feature_detected!("popcnt"),
        CpuidFeature::MOVBE => is_x86_feature_detected!("movbe"),
        CpuidFeature::SSE4_2 => is_x86_feature_detected!("sse4.2"),
        CpuidFeature::CMPXCHG16B => is_x86_feature_detected!("cmpxchg16b"),
        CpuidFeature::FMA => is_x86_feature_detected!("fma"),
        CpuidFeature::F16C => is_x86_feature_detected!("f16c"),
        CpuidFeature::AES => is_x86_feature_detected!("aes"),
        CpuidFeature::PCLMULQDQ => is_x86_feature_detected!("pclmulqdq"),
        CpuidFeature::SHA => is_x86_feature_detected!("sha"),
        // CPUID leaf 7, EBX bits 23 and 24.
        CpuidFeature::CLFLUSHOPT => std::arch::x86_64::__cpuid_count(7, 0).ebx & 1 << 23 != 0,
        CpuidFeature::CLWB => std::arch::x86_64::__cpuid_count(7, 0).ebx & 1 << 24 != 0,
        // CPUID leaf 7, ECX bit 4: the operating system has them enabled.
        CpuidFeature::PKU => std::arch::x86_64::__cpuid_count(7, 0).ecx & 1 << 4 != 0,
        _ => true,
    }
}

impl Native {
    /// Takes the window; `None`, with the reason printed, where this host cannot serve as a judge.
    pub(crate) fn take() -> Option<Native> {
        if !is_of_the_model_s_maker() {
            return None;
        }
        Native::of_any_maker()
    }

    /// Takes the window, for whoever knows where makers differ.
    pub(crate) fn of_any_maker() -> Option<Native> {
        if !is_x86_feature_detected!("avx2") {
            eprintln!("skipped: this processor has no AVX2");
            return None;
        }
        // SAFETY: reads what the kernel gave the process.
        if unsafe { libc::getauxval(libc::AT_HWCAP2) } & HWCAP2_FSGSBASE == 0 {
            eprintln!("skipped: this host's user mode has no RDFSBASE");
            return None;
        }
        let mut mapped = WINDOW_IN_USE.lock().unwrap_or_else(|e| e.into_inner());
        if !*mapped {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
            // SAFETY: a new mapping that replaces none.
            let at = unsafe {
                libc::mmap(WINDOW as *mut _, WINDOW_LEN as usize, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
            };
            if at as u64 != WINDOW {
                eprintln!("skipped: the window at {WINDOW:#x} is not free on this host");
                return None;
            }
            let code = [(WINDOW, prologue(64)), (START32, prologue(32)), (FALL, epilogue(0, FALL))];
            for (at, code) in code.into_iter().chain([(1, BRANCHED), (2, FAULTED)].map(|(w, at)| (at, epilogue(w, at))))
            {
                let code = code.unwrap();
                assert!(code.len() <= 0x200);
                put(at, &code);
            }
            put(FALL32, &far_jump(FALL));
            put(FAR32, &[&(INSN as u32).to_le_bytes()[..], &CS32.to_le_bytes()].concat());
            // Touched, so that a store finds a page and no permission.
            put(READ_ONLY, &[0]);
            protect(WINDOW, libc::PROT_READ | libc::PROT_EXEC);
            protect(ABSENT, libc::PROT_NONE);
            protect(READ_ONLY, libc::PROT_READ);
            *mapped = true;
        }
        catch_signals();
        Some(Native { _lock: mapped, bits: 64, len: 0 })
    }

    /// Puts code of 32 or 64 bits in place; what it falls through to is the end.
    pub(crate) fn load(&mut self, bits: u32, code: &[u8]) {
        self.bits = bits;
        self.len = code.len();
        let next = INSN + code.len() as u64;
        assert!(next + 5 < CODE + PAGE as u64);
        protect(CODE, libc::PROT_READ | libc::PROT_WRITE);
        put(INSN, code);
        put(next, &jump(next, if bits == 32 { FALL32 } else { FALL }));
        put(TAKEN, &if bits == 32 { far_jump(BRANCHED) } else { jump(TAKEN, BRANCHED).to_vec() });
        protect(CODE, libc::PROT_READ | libc::PROT_EXEC);
    }

    /// Runs the code in place, which must end and use no memory but the window's.
    pub(crate) fn run(&mut self, before: &Machine) -> Machine {
        put(DATA, &before.data[..DATA_LEN]);
        put(EDGE, &before.data[DATA_LEN..]);
        for (n, v) in before.gpr.iter().chain([&before.flags]).enumerate() {
            put(CONTEXT + n as u64 * 8, &v.to_le_bytes());
        }
        put(FS_BASE, &before.segments.fs_base.to_le_bytes());
        put(GS_BASE, &before.segments.gs_base.to_le_bytes());
        put(AREA, &before.fpu.image(before.mxcsr));
        put(AREA_HEADER, &[0; 64]);
        put(AREA_HEADER, &[COMPONENTS as u8]);
        for (n, y) in (0..).zip(&before.ymm) {
            put(AREA + 160 + 16 * n, &[y[0].to_le_bytes(), y[1].to_le_bytes()].concat());
            put(AREA_HIGH + 16 * n, &[y[2].to_le_bytes(), y[3].to_le_bytes()].concat());
        }
        let start = if self.bits == 32 { START32 } else { WINDOW };
        put(RUNNING, &[1]);
        // SAFETY: the prologue is a function without arguments that keeps the registers it must; the code in between
        // touches the window only, as the caller says, and what it raises is caught.
        unsafe { std::mem::transmute::<*const (), extern "sysv64" fn()>(start as *const ())() };
        put(RUNNING, &[0]);
        let mut data = vec![0; before.data.len()];
        get(DATA, &mut data[..DATA_LEN]);
        get(EDGE, &mut data[DATA_LEN..]);
        let mut image = [0; 512];
        get(AREA, &mut image);
        let vector = word(VECTOR) as u8;
        let way = word(WAY) as u32;
        Machine {
            gpr: std::array::from_fn(|n| word(CONTEXT + n as u64 * 8)),
            flags: word(FLAGS),
            rip: match way {
                0 => INSN + self.len as u64,
                1 => TAKEN,
                _ => word(FAULT_IP),
            },
            fault: (way == 2).then(|| Fault {
                vector,
                error: word(ERROR) as u32,
                address: if vector == crate::exception::vector::PF { word(ADDRESS) } else { 0 },
            }),
            ymm: std::array::from_fn(|n| {
                let n = n as u64 * 16;
                [word(AREA + 160 + n), word(AREA + 168 + n), word(AREA_HIGH + n), word(AREA_HIGH + 8 + n)]
            }),
            mxcsr: word(AREA + 24) as u32,
            fpu: Fpu::from_image(&image),
            segments: Segments {
                selectors: std::array::from_fn(|n| (word(SELECTORS) >> (16 * n)) as u16),
                fs_base: word(FS_BASE),
                gs_base: word(GS_BASE),
            },
            data,
        }
    }
}

/// Lets [`on_signal`] have the signals of the window's faults, on a stack of its own: the code under test may have
/// none. The alternate stack is the thread's, the handler the process's.
fn catch_signals() {
    const STACK: usize = 128 << 10;
    let stack: &'static mut [u8] = Box::leak(vec![0; STACK].into_boxed_slice());
    let stack = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: STACK };
    // SAFETY: the stack lives for ever.
    assert_eq!(unsafe { libc::sigaltstack(&stack, std::ptr::null_mut()) }, 0);
    static HANDLER: Once = Once::new();
    HANDLER.call_once(|| {
        for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP] {
            // SAFETY: an all-zero `sigaction` is a valid one.
            let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
            action.sa_sigaction = on_signal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            // SAFETY: the handler is async-signal-safe: it writes to the window only.
            assert_eq!(unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) }, 0);
        }
    });
}

extern "C" fn on_signal(signal: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a `ucontext_t` to a handler with SA_SIGINFO.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let ip = registers[libc::REG_RIP as usize] as u64;
    if word(RUNNING) == 0 {
        // Not ours: the instruction runs again and takes the process down.
        // SAFETY: restores the default action.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        return;
    }
    // Linux hides the layout of its own part: it says of each page there that it is present.
    if registers[libc::REG_CR2 as usize] as u64 >= USER_END && registers[libc::REG_TRAPNO as usize] == 14 {
        registers[libc::REG_ERR as usize] &= !1;
    }
    for (at, r) in [(VECTOR, libc::REG_TRAPNO), (ERROR, libc::REG_ERR), (ADDRESS, libc::REG_CR2)] {
        put(at, &registers[r as usize].to_le_bytes());
    }
    put(FAULT_IP, &ip.to_le_bytes());
    registers[libc::REG_RIP as usize] = FAULTED as i64;
    // CS is the lowest word of its quadword.
    let selectors = &mut registers[libc::REG_CSGSFS as usize];
    *selectors = *selectors & !0xffff | i64::from(CS64);
}

fn jump(from: u64, to: u64) -> [u8; 5] {
    let mut code = [0xe9; 5];
    code[1..].copy_from_slice(&(to.wrapping_sub(from + 5) as u32).to_le_bytes());
    code
}

/// From 32-bit code to 64-bit code.
fn far_jump(to: u64) -> Vec<u8> {
    [&[0xea][..], &(to as u32).to_le_bytes(), &CS64.to_le_bytes()].concat()
}

fn put(at: u64, bytes: &[u8]) {
    // SAFETY: all callers, who hold the lock, stay inside the window's mapping.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, bytes.len()) };
}

fn get(at: u64, out: &mut [u8]) {
    // SAFETY: as in `put`.
    unsafe { std::ptr::copy_nonoverlapping(at as *const u8, out.as_mut_ptr(), out.len()) };
}

fn word(at: u64) -> u64 {
    let mut bytes = [0; 8];
    get(at, &mut bytes);
    u64::from_le_bytes(bytes)
}

/// Sets the protection of a page of the window.
fn protect(page: u64, protection: libc::c_int) {
    // SAFETY: the page is ours.
    let rc = unsafe { libc::mprotect(page as *mut _, PAGE, protection) };
    assert_eq!(rc, 0);
}
