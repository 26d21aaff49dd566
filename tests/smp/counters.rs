//! Locked instructions of several CPUs on the same operands: nothing is lost.

use iced_x86::code_asm::*;

use crate::support::smp::*;

/// The operations that count: by how much the operand is more, or less, when each of `cpus` CPUs has done it once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Count {
    Add,
    Inc,
    Dec,
    Xadd,
    Cmpxchg,
    /// A lock that is a bit, around a plain increment.
    Bts,
    /// A lock that is taken by XCHG.
    Xchg,
    Cmpxchg8b,
    Cmpxchg16b,
}

const COUNTS: [Count; 9] = [
    Count::Add,
    Count::Inc,
    Count::Dec,
    Count::Xadd,
    Count::Cmpxchg,
    Count::Bts,
    Count::Xchg,
    Count::Cmpxchg8b,
    Count::Cmpxchg16b,
];

/// Where an operand of `width` bytes is, in relation to what hosts access at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Aligned,
    InLine,
    AcrossLines,
    AcrossPages,
}

const PLACES: [Place; 4] = [Place::Aligned, Place::InLine, Place::AcrossLines, Place::AcrossPages];

impl Place {
    /// The offset from the start of a page.
    fn offset(self, width: u32) -> u32 {
        match self {
            Place::Aligned => 0x40,
            Place::InLine => 0x41,
            Place::AcrossLines => 0x80 - width / 2,
            Place::AcrossPages => 0x1000 - width / 2,
        }
    }

    /// A host has no atomic access to those that are not aligned, and stops all CPUs for each.
    fn rounds(self) -> u32 {
        if self == Place::Aligned { 50_000 } else { 500 }
    }
}

/// The counters, one a page, or two where they cross pages.
const COUNTERS: u32 = FREE;
/// Behind a counter: the lock that some are guarded by, at the same place of a page.
const LOCK: i32 = 0x2000;

/// Emits one operation on the operand at EBX. Changes EAX, ECX, EDX and ESI.
fn count(g: &mut Smp, how: Count, width: u32) -> Done {
    let at = g.bx();
    let lock = g.bx() + LOCK;
    /// One instruction by the operand's width, with RAX and RDX cut to that.
    macro_rules! by_width {
        (|$ptr:ident, $a:ident, $d:ident| $code:expr) => {
            match width {
                1 => by_width!($ptr = byte_ptr, $a = al, $d = dl, $code),
                2 => by_width!($ptr = word_ptr, $a = ax, $d = dx, $code),
                4 => by_width!($ptr = dword_ptr, $a = eax, $d = edx, $code),
                _ => by_width!($ptr = qword_ptr, $a = rax, $d = rdx, $code),
            }
        };
        ($ptr:ident = $ptr_of:ident, $a:ident = $a_of:ident, $d:ident = $d_of:ident, $code:expr) => {{
            let ($ptr, $a, $d) = ($ptr_of, $a_of, $d_of);
            _ = ($a, $d);
            $code
        }};
    }
    match how {
        Count::Add => by_width!(|ptr, a, d| g.lock().add(ptr(at), 1)),
        Count::Inc => by_width!(|ptr, a, d| g.lock().inc(ptr(at))),
        Count::Dec => by_width!(|ptr, a, d| g.lock().dec(ptr(at))),
        Count::Xadd => {
            g.mov(eax, 1)?;
            by_width!(|ptr, a, d| g.lock().xadd(ptr(at), a))
        }
        Count::Cmpxchg => {
            by_width!(|ptr, a, d| g.mov(a, ptr(at)))?;
            let again = g.here()?;
            by_width!(|ptr, a, d| {
                g.mov(d, a)?;
                g.inc(d)?;
                g.lock().cmpxchg(ptr(at), d)
            })?;
            g.jne(again)
        }
        Count::Bts | Count::Xchg => {
            let again = g.here()?;
            g.pause()?;
            if how == Count::Bts {
                // Bit strings have no bytes.
                match width {
                    1 | 2 => g.lock().bts(word_ptr(lock), 3)?,
                    4 => g.lock().bts(dword_ptr(lock), 3)?,
                    _ => g.lock().bts(qword_ptr(lock), 3)?,
                }
                g.jc(again)?;
            } else {
                g.mov(edx, 1)?;
                by_width!(|ptr, a, d| g.xchg(ptr(lock), d))?;
                g.test(edx, edx)?;
                g.jne(again)?;
            }
            by_width!(|ptr, a, d| g.inc(ptr(at)))?;
            by_width!(|ptr, a, d| g.mov(ptr(lock), 0))
        }
        Count::Cmpxchg8b => {
            g.mov(eax, dword_ptr(at))?;
            g.mov(edx, dword_ptr(at + 4))?;
            let again = g.here()?;
            g.push_bx()?;
            if g.bits == Bits::B64 {
                g.mov(rsi, rbx)?
            } else {
                g.mov(esi, ebx)?
            }
            g.mov(ebx, eax)?;
            g.mov(ecx, edx)?;
            g.add(ebx, 1)?;
            g.adc(ecx, 0)?;
            let operand = g.si();
            g.lock().cmpxchg8b(qword_ptr(operand))?;
            g.pop_bx()?;
            g.jne(again)
        }
        Count::Cmpxchg16b => {
            g.mov(rax, qword_ptr(at))?;
            g.mov(rdx, qword_ptr(at + 8))?;
            let again = g.here()?;
            g.push(rbx)?;
            g.mov(rsi, rbx)?;
            g.mov(rbx, rax)?;
            g.mov(rcx, rdx)?;
            g.add(rbx, 1)?;
            g.adc(rcx, 1)?;
            g.lock().cmpxchg16b(xmmword_ptr(rsi))?;
            g.pop(rbx)?;
            g.jne(again)
        }
    }
}

/// Every operation at every width and place that it has: the totals are exact.
fn counters(g: &mut Smp) -> Done {
    g.start_others()?;
    let mut cases = Vec::new();
    for how in COUNTS {
        let widths: &[u32] = match how {
            Count::Cmpxchg8b => &[8],
            Count::Cmpxchg16b if g.bits == Bits::B64 => &[16],
            Count::Cmpxchg16b => &[],
            _ if g.bits == Bits::B64 => &[1, 2, 4, 8],
            _ => &[1, 2, 4],
        };
        for &width in widths {
            // One that is not aligned raises #GP.
            let places = if how == Count::Cmpxchg16b || width == 1 { &PLACES[..1] } else { &PLACES };
            cases.extend(places.iter().map(|&place| (how, width, place)));
        }
    }
    for (k, &(how, width, place)) in (0..).zip(&cases) {
        let at = COUNTERS + k * 0x4000 + place.offset(width);
        g.mov(ebx, at)?;
        g.barrier()?;
        g.mov(edi, place.rounds())?;
        let again = g.here()?;
        count(g, how, width)?;
        g.dec(edi)?;
        g.jne(again)?;
        g.barrier()?;
        let total = place.rounds() * g.cpus;
        let total = if how == Count::Dec { total.wrapping_neg() } else { total };
        let mask = if width < 4 { (1 << (8 * width)) - 1 } else { u32::MAX };
        g.on(0, |g| {
            let what = format!("{how:?} of {width} bytes, {place:?}");
            g.mov(eax, dword_ptr(at))?;
            g.and(eax, mask as i32)?;
            g.check(&what, total & mask)?;
            if how == Count::Cmpxchg16b {
                g.check_at(&what, at + 8, total)?;
            }
            // What is around it is as it was.
            g.mov(al, byte_ptr(at - 1))?;
            g.mov(ah, byte_ptr(at + width))?;
            g.movzx(eax, ax)?;
            g.check(&format!("beside {what}"), 0)
        })?;
    }
    g.finish()
}

#[test]
fn locked_counters_are_exact() {
    let directory = tempfile::tempdir().expect("directory");
    for (bits, cpus) in [(Bits::B64, 2), (Bits::B32, 3), (Bits::B64, 4)] {
        let kernel = guest(directory.path(), "kernel", bits, cpus, counters);
        passes(&format!("{bits:?}"), &kernel, cpus);
    }
}

/// One CPU counts in a doubleword that is not aligned, others store to what lies directly before and behind it: a
/// locked access that were made wider would put old values there.
fn neighbours(g: &mut Smp) -> Done {
    const ERRORS: u32 = FREE;
    const ROUNDS: u32 = 2_000;
    g.start_others()?;
    for (k, offset) in (1..).zip([0x42u32, 0x45, 0x7e, 0x7f, 0xffe, 0xfff]) {
        let at = FREE + k * 0x4000 + offset;
        g.barrier()?;
        g.on(0, |g| g.times(ecx, ROUNDS, |g| g.lock().inc(dword_ptr(at))))?;
        for (cpu, neighbour) in [(1, at + 4), (2, at - 4)] {
            g.on(cpu, |g| {
                g.times(ecx, 20 * ROUNDS, |g| {
                    let mut good = g.create_label();
                    g.mov(dword_ptr(neighbour), ecx)?;
                    g.mov(eax, ecx)?;
                    g.imul_2(eax, eax)?;
                    g.cmp(dword_ptr(neighbour), ecx)?;
                    g.je(good)?;
                    g.lock().inc(dword_ptr(ERRORS))?;
                    g.place(&mut good)
                })
            })?;
        }
        g.barrier()?;
        g.on(0, |g| {
            g.check_at(&format!("the counter at {offset:x}"), at, ROUNDS)?;
            g.check_at(&format!("behind {offset:x}"), at + 4, 1)?;
            g.check_at(&format!("before {offset:x}"), at - 4, 1)
        })?;
    }
    g.on(0, |g| g.check_at("stores that were lost", ERRORS, 0))?;
    g.finish()
}

#[test]
fn locked_operands_leave_their_neighbours_alone() {
    let directory = tempfile::tempdir().expect("directory");
    for bits in [Bits::B32, Bits::B64] {
        let kernel = guest(directory.path(), "kernel", bits, 3, neighbours);
        passes(&format!("{bits:?}"), &kernel, 3);
    }
}
