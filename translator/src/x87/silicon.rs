//! The unit against the host's own x87: every opcode on random register stacks, and the portable engine.

use std::collections::BTreeMap;

use super::*;
use crate::testing::is_of_the_model_s_maker;

/// xorshift64*: deterministic, so that a failure can be seen again.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 33) % n
    }

    fn mantissa(&mut self) -> u64 {
        let r = self.next();
        match self.below(16) {
            0 => 1 << 63,
            1 => 1 << 63 | 1,
            2 => u64::MAX,
            3 => 1 << 63 | 1 << self.below(64),
            4 => u64::MAX << self.below(64),
            5 => 1 << 63 | r >> 1 >> self.below(63) << self.below(63),
            6 => (r | 1 << 63) & u64::MAX << 40,
            7 => (r | 1 << 63) & u64::MAX << 11,
            8 => (r | 1 << 63) & u64::MAX << 39,
            9 => (r | 1 << 63) & u64::MAX << 10,
            10 => 1 << 63 | 1 << 62,
            11 => r,
            _ => r | 1 << 63,
        }
    }

    /// An operand of any class, often close to `near` in exponent.
    fn f80(&mut self, near: F80) -> F80 {
        let around = |r: &mut Random, e: u64| e.wrapping_add(r.below(9)).wrapping_sub(4) as u16;
        let exp = match self.below(12) {
            0 => 0,
            1 => 1 + self.below(70) as u16,
            2 => 0x7fff,
            3 => 0x7ffe - self.below(70) as u16,
            4 => around(self, 0x3fff),
            5 => around(self, 0x3fff + 63),
            6 => around(self, 0x3fff - 126 - 12),
            7 => around(self, 0x3fff - 1022 - 26),
            8 => 0x3fff + self.below(70) as u16,
            9 => self.next() as u16,
            _ => near.sign_exp.wrapping_add(self.below(140) as u16).wrapping_sub(70),
        } & 0x7fff;
        let mantissa = match (self.below(8), exp) {
            (0..6, 0) => self.mantissa() >> self.below(64),
            (6, 0) => 0,
            (0, 0x7fff) => 1 << 63,
            (1, 0x7fff) => 1 << 62,
            (1, _) => self.mantissa(),
            _ => self.mantissa() | 1 << 63,
        };
        F80 { mantissa, sign_exp: exp | (self.below(2) << 15) as u16 }
    }

    /// A control word; half of the time with everything masked.
    fn control(&mut self) -> u16 {
        let masks = if self.below(2) == 0 { 0x3f } else { self.next() as u16 & 0x3f };
        let pc = [0x300, 0x300, 0x200, 0][self.below(4) as usize];
        masks | pc | (self.below(4) << 10) as u16 | 0x40
    }

    fn x87(&mut self) -> X87 {
        let mut x = X87::initialized();
        x.fcw = self.control();
        for i in 0..8 {
            x.st[i] = self.f80(x.st[(i + 7) % 8]);
        }
        x.ftw = match self.below(4) {
            0 => self.next() as u8,
            _ => 0xff,
        };
        x.fsw = self.next() as u16 & (status::TOP | status::CODES | status::SF | status::EXCEPTIONS & x.fcw);
        if self.below(2) == 0 {
            x.ftw &= !(1 << ((x.top() + 7) & 7));
        }
        x
    }

    fn memory(&mut self, format: Option<Format>) -> u128 {
        let r = self.next();
        let wide = u128::from(self.next()) << 64 | u128::from(self.next());
        let exp = |r: &mut Random, max: u64, e: u64| match r.below(4) {
            0 => 0,
            1 => max,
            2 => 1,
            _ => e & max,
        };
        match format {
            Some(Format::F32) => u128::from((r >> self.below(32)) & 0x807f_ffff | exp(self, 255, r >> 40) << 23),
            Some(Format::F64) => {
                u128::from((r >> self.below(64)) & !(0x7ff << 52) | r << 63 | exp(self, 0x7ff, r >> 40) << 52)
            }
            Some(Format::F80) => self.f80(F80::ONE).to_bits(),
            Some(Format::Bcd) => {
                (0..18).fold(0, |n, i| n | u128::from(self.below(10)) << (4 * i)) | u128::from(r >> 63) << 79
            }
            Some(_) => u128::from((r as i64 >> self.below(64)) as u64),
            None => wide,
        }
    }
}

/// Runs single instructions on the host.
mod chip {
    use super::{Layout, StateImage, X87};

    pub const LAYOUT: Layout = Layout { wide: true, protected: true };

    /// A page of code: FRSTOR, POPFQ, the instruction, PUSHFQ, FNSAVE, FNINIT.
    pub struct Silicon(*mut u8);

    type Code = extern "sysv64" fn(*mut [u8; 128], *const StateImage, *mut StateImage, u64) -> u64;

    impl Silicon {
        pub fn new() -> Silicon {
            // SAFETY: an anonymous mapping of fresh memory.
            let page = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    4096,
                    libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                )
            };
            assert_ne!(page, libc::MAP_FAILED);
            Silicon(page.cast())
        }

        /// The state and arithmetic flags after `fop` on `state`, its memory operand being `memory`.
        pub fn run(&self, fop: u16, state: &X87, memory: &mut [u8; 128], flags: u64) -> (X87, u64) {
            let (escape, modrm) = (0xd8 | (fop >> 8) as u8, fop as u8);
            let code = [0xdd, 0x26, 0x51, 0x9d, escape, modrm, 0x9c, 0x58, 0xdd, 0x32, 0xdb, 0xe3, 0xc3];
            let mut after: StateImage = [0; 108];
            // SAFETY: the page is ours and holds that much; the code follows the declared calling convention, touches
            // only the three buffers and leaves the x87 stack empty.
            let flags = unsafe {
                std::ptr::copy_nonoverlapping(code.as_ptr(), self.0, code.len());
                let run = std::mem::transmute::<*mut u8, Code>(self.0);
                run(memory, &state.save(LAYOUT), &mut after, flags | 0x202)
            };
            let mut x = X87::initialized();
            x.restore(&after, LAYOUT);
            (x, flags & 0x8d5)
        }
    }

    impl Drop for Silicon {
        fn drop(&mut self) {
            // SAFETY: mapped in `new`, with that size.
            unsafe { libc::munmap(self.0.cast(), 4096) };
        }
    }
}

/// Runs one instruction on the module as a CPU would.
fn run(x: &mut X87, op: Op, memory: &mut [u8; 128], flags: u64) -> u64 {
    let layout = Layout { wide: true, protected: true };
    let mut image = [0; 108];
    match op.memory() {
        Memory::None => {
            if let Some(new) = x.execute(op, flags) {
                return new;
            }
        }
        Memory::Read(n) => {
            let mut bytes = [0; 16];
            bytes[..usize::from(n)].copy_from_slice(&memory[..usize::from(n)]);
            x.load(op, u128::from_le_bytes(bytes));
        }
        Memory::Write(_) => {
            let store = x.store(op);
            let n = usize::from(store.size);
            memory[..n].copy_from_slice(&store.value.to_le_bytes()[..n]);
            x.commit(&store);
        }
        Memory::ReadEnvironment => {
            image.copy_from_slice(&memory[..108]);
            x.load_environment(&image, layout);
        }
        Memory::ReadState => {
            image.copy_from_slice(&memory[..108]);
            x.restore(&image, layout);
        }
        Memory::WriteEnvironment => {
            memory[..28].copy_from_slice(&x.environment(layout)[..28]);
            x.after_environment();
        }
        Memory::WriteState => {
            memory[..108].copy_from_slice(&x.save(layout));
            x.init();
        }
    }
    flags
}

#[test]
fn every_instruction_agrees_with_silicon() {
    let silicon = chip::Silicon::new();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut wrong: BTreeMap<String, (u32, String)> = BTreeMap::new();
    // 20,000 rounds have been seen to pass; these are enough for a change that breaks something to show.
    let rounds = 400;
    for fop in 0..0x800u16 {
        // Memory forms are all tried with (RDI).
        if fop as u8 >> 6 != 3 && fop as u8 & 0xc7 != 7 {
            continue;
        }
        let Some(op) = Op::decode(fop) else { continue };
        let format = match op {
            Op::ArithMemory(_, format) | Op::Load(format) => Some(format),
            _ => None,
        };
        for _ in 0..rounds {
            let before = random.x87();
            let mut memory = [0u8; 128];
            if matches!(op, Op::LoadEnvironment | Op::Restore) {
                memory[..108].copy_from_slice(&random.x87().save(chip::LAYOUT));
                memory[4..6].copy_from_slice(&(random.next() as u16).to_le_bytes());
            } else {
                memory[..16].copy_from_slice(&random.memory(format).to_le_bytes());
            }
            let mut theirs_memory = memory;
            let flags = random.next() & 0x8d5;
            let (mut theirs, theirs_flags) = silicon.run(fop, &before, &mut theirs_memory, flags);
            let mut ours = before;
            let ours_flags = run(&mut ours, op, &mut memory, flags);
            for x in [&mut ours, &mut theirs] {
                (x.fop, x.fip, x.fdp, x.fcs, x.fds) = (0, 0, 0, 0, 0);
            }
            if matches!(op.memory(), Memory::WriteEnvironment | Memory::WriteState) {
                memory[12..28].fill(0);
                theirs_memory[12..28].fill(0);
            }
            if (ours, ours_flags, memory) != (theirs, theirs_flags, theirs_memory) {
                let what = format!("before {before:x?}\n  ours {ours:x?} {ours_flags:x} {:x?}", &memory[..10])
                    + &format!("\n  theirs {theirs:x?} {theirs_flags:x} {:x?}", &theirs_memory[..10]);
                let entry = wrong.entry(format!("{fop:03x} {op:?}")).or_default();
                entry.0 += 1;
                if entry.0 == 1 {
                    entry.1 = what;
                }
            }
        }
    }
    let report: String = wrong.iter().map(|(op, (n, what))| format!("{op}: {n} of {rounds}, as\n  {what}\n")).collect();
    assert!(wrong.is_empty(), "{report}");
}

/// The portable engine gives the bits, flags and C1 of the host's in every rounding and precision mode.
#[test]
fn engines_agree_on_exact_operations() {
    if !is_of_the_model_s_maker() {
        return;
    }
    use Operation::*;
    let mut random = Random(0x0dd0_15ea_5e5a_11ad);
    for operation in [Add, Mul, Sub, SubR, Div, DivR, Sqrt, RoundInt, Scale, Prem, Prem1, Xtract] {
        let codes = if matches!(operation, Prem | Prem1) { status::CODES } else { status::C1 };
        for _ in 0..5000 {
            let (a, cw) = (random.f80(F80::ONE), random.control());
            let b = random.f80(a);
            let (soft, host) = (Soft::run(operation, a, b, cw), Host::run(operation, a, b, cw));
            let done = host.status & !cw & status::BEFORE == 0;
            let seen = |o: Outcome| (o.status & (status::EXCEPTIONS | codes), done.then_some((o.value, o.second)));
            // A remainder of NaNs has no quotient; silicon reports bits of it nevertheless.
            if done && host.value.is_nan() {
                assert_eq!(soft.value, host.value, "{operation:?} {a:x?} {b:x?} {cw:x}");
            } else if done {
                assert_eq!(seen(soft), seen(host), "{operation:?} {a:x?} {b:x?} {cw:x}");
            } else {
                let flags = |o: Outcome| o.status & status::EXCEPTIONS;
                assert_eq!(flags(soft), flags(host), "{operation:?} {a:x?} {b:x?} {cw:x}");
            }
        }
    }
}

/// Distance in units of the last place; zero if the encodings are equal, huge if the signs differ.
fn ulps(a: F80, b: F80) -> u128 {
    let key = |x: F80| u128::from(x.sign_exp & 0x7fff) << 63 | u128::from(x.mantissa & (u64::MAX >> 1));
    if a.sign_exp >> 15 != b.sign_exp >> 15 { u128::MAX } else { key(a).abs_diff(key(b)) }
}

/// Special operands give what silicon gives; ordinary ones differ by a unit in the last place at most.
#[test]
fn portable_transcendentals_are_close_to_silicon() {
    if !is_of_the_model_s_maker() {
        return;
    }
    use Operation::*;
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut worst: BTreeMap<String, (u32, u128, String)> = BTreeMap::new();
    for operation in [F2xm1, Yl2x, Yl2xp1, Ptan, Patan, Sin, Cos, SinCos] {
        for _ in 0..3000 {
            let (mut a, b) = (random.f80(F80::ONE), random.f80(F80::ONE));
            if random.below(2) == 0 && a.class() == Class::Normal {
                a.sign_exp = a.sign_exp & 0x8000 | 0x3fff_u16.wrapping_add(random.below(16) as u16).wrapping_sub(12);
            }
            let cw = 0x37f | (random.below(4) << 10) as u16;
            // Outside their domains the exponential and FYL2XP1 are undefined.
            let exp = a.sign_exp & 0x7fff;
            if operation == F2xm1 && exp >= 0x3fff && exp != 0x7fff || operation == Yl2xp1 && exp >= 0x3ffd {
                continue;
            }
            let (soft, host) = (Soft::run(operation, a, b, cw), Host::run(operation, a, b, cw));
            let off = ulps(soft.value, host.value).max(ulps(soft.second, host.second));
            let flags = (soft.status ^ host.status) & !status::C1;
            if off > 1 || flags != 0 {
                let entry = worst.entry(format!("{operation:?}")).or_default();
                entry.0 += 1;
                entry.1 = entry.1.max(off);
                if entry.0 < 6 {
                    entry.2 += &format!("\n cw {cw:x} a {a:x?} b {b:x?}\n   soft {soft:x?}\n   host {host:x?}");
                }
            }
        }
    }
    let report: String = worst.iter().map(|(op, (n, off, what))| format!("{op}: {n}, {off} ulp{what}\n")).collect();
    assert!(worst.is_empty(), "{report}");
}
