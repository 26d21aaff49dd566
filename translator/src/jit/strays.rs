//! Accesses of loops that stray: that are not where they were last ([`crate::mmu::tlb::Sites`]), time and again.
//!
//! The thunks that find such accesses count them. Every so often one of them leaves to the dispatch loop, as a sample. What
//! has strayed much for a while looks elsewhere from then on ([`super::access`]): the regions that have it are compiled
//! anew. A loop's way through memory changes with its data, so a while is not short.
//!
//! Slow versions of blocks ([`super::groups`]) count, too, if they have instructions evaluated by helper, as floating point
//! in quick code is: what is looked up together may lie across the end of a page for as long as a guest runs. Blocks that
//! have run so for much of the time have no such group any more.

use std::time::{Duration, Instant};

use crate::addr::PAGE_MASK;
use crate::address_map::AddressMap;
use crate::jit::cache::Key;
use crate::jit::region::Plan;

/// Accesses that stray for one that is looked at.
pub const STRAYS: u32 = 4096;
/// As how many accesses an instruction counts that a slow version has evaluated by helper.
pub const DEAR: i32 = 16;
/// How long an access is watched before it is judged.
const WHILE: Duration = Duration::from_millis(100);
/// Time for each that strays, up to which they are many: another way to look costs less then.
const MANY: Duration = Duration::from_nanos(60);
/// How many other ways to look there are.
const WAYS: u8 = 2;
/// What is less than this part of a page's is few.
const SHARE: u32 = 8;
/// Accesses that are remembered.
const MOST: usize = 4096;

/// Those that there have been.
#[derive(Default)]
pub struct Strays {
    pages: AddressMap<Key, Page>,
    /// How many accesses are remembered.
    count: usize,
}

/// A page's accesses, in one mode.
struct Page {
    accesses: Vec<Access>,
    /// Since when samples are counted.
    since: Instant,
}

struct Access {
    /// Page offset of its instruction.
    off: u16,
    /// How often it was found to stray much.
    times: u8,
    samples: u32,
}

impl Page {
    /// Judges the accesses after a while; which of them are to look elsewhere.
    fn judge(&mut self, now: Instant) -> Vec<u16> {
        let watched = now - self.since;
        if watched < WHILE {
            return Vec::new();
        }
        self.since = now;
        let all: u32 = self.accesses.iter().map(|access| access.samples).sum();
        let many = watched < MANY * STRAYS * all;
        let mut stray = Vec::new();
        for access in &mut self.accesses {
            let samples = std::mem::take(&mut access.samples);
            if many && samples > all / SHARE && access.times < WAYS {
                access.times += 1;
                stray.push(access.off);
            }
        }
        stray
    }
}

impl Strays {
    /// Notes that the access of the instruction at a key has strayed, as of `now`; page offsets of those in its page that
    /// are to look elsewhere.
    pub fn note(&mut self, (gpa, mode): Key, now: Instant) -> Vec<u16> {
        if self.count >= MOST {
            self.clear();
        }
        let new = || Page { accesses: Vec::new(), since: now };
        let page = self.pages.entry((gpa & !PAGE_MASK, mode)).or_insert_with(new);
        let off = (gpa & PAGE_MASK) as u16;
        match page.accesses.iter_mut().find(|access| access.off == off) {
            Some(access) => access.samples += 1,
            None => {
                page.accesses.push(Access { off, times: 0, samples: 1 });
                self.count += 1;
            }
        }
        page.judge(now)
    }

    /// Page offsets of the instructions in the page of a region that have strayed much, and how often.
    pub fn of(&self, plan: &Plan) -> Vec<(u16, u8)> {
        let page = self.pages.get(&(plan.gpa & !PAGE_MASK, plan.mode.0));
        let accesses = page.into_iter().flat_map(|page| &page.accesses);
        accesses.filter(|access| access.times > 0).map(|access| (access.off, access.times)).collect()
    }

    /// Forgets them all.
    pub fn clear(&mut self) {
        self.pages.clear();
        self.count = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jit::Jit;
    use crate::testing::bare;
    use crate::vcpu::Vcpu;

    const KEY: Key = (0x1234, 1);
    const OFF: u16 = 0x234;

    /// The last of samples that come one in so long.
    fn note(strays: &mut Strays, start: Instant, each: Duration) -> Vec<u16> {
        let times = 1..=(WHILE.as_nanos() / each.as_nanos()) as u32 + 1;
        times.fold(Vec::new(), |_, n| strays.note(KEY, start + n * each))
    }

    #[test]
    fn few_are_none() {
        let mut strays = Strays::default();
        let start = Instant::now();
        strays.note(KEY, start);
        assert!(note(&mut strays, start, MANY * STRAYS * 2).is_empty());
    }

    #[test]
    fn many_look_elsewhere_as_often_as_there_is_another_way() {
        let mut strays = Strays::default();
        let mut now = Instant::now();
        strays.note(KEY, now);
        for _ in 0..WAYS {
            assert_eq!(note(&mut strays, now, MANY * STRAYS / 2), [OFF]);
            now += 3 * WHILE;
            // What was between is past.
            strays.note(KEY, now);
        }
        assert!(note(&mut strays, now, MANY * STRAYS / 2).is_empty());
    }

    #[test]
    fn what_is_beside_them_does_not() {
        let mut strays = Strays::default();
        let now = Instant::now();
        strays.note((KEY.0 + 8, KEY.1), now);
        assert_eq!(note(&mut strays, now, MANY * STRAYS / 2), [OFF]);
    }

    /// What is looked up together lies across the end of a page, and floating point is evaluated by helper then.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn a_block_whose_slow_version_is_dear_has_no_group_any_more() {
        const BLOCK: u64 = bare::CODE + 10;
        let code = [
            &[0xbe, 0xf0, 0x0f, 0x20, 0][..],      // mov esi, 200ff0h
            &[0xb9, 0, 0, 1, 0],                   // mov ecx, 65536
            &[0xf2, 0x0f, 0x10, 0x06],             // movsd xmm0, [rsi]
            &[0xf2, 0x0f, 0x58, 0x46, 0x08],       // addsd xmm0, [rsi + 8]
            &[0xf2, 0x0f, 0x11, 0x46, 0x10],       // movsd [rsi + 10h], xmm0
            &[0xff, 0xc9, 0x75, 0xee, 0xe6, 0x80], // dec ecx; jnz the first movsd; out 80h, al
        ];
        let mut vcpu = Vcpu::new(bare::cpu(&code.concat()), Some(Jit::new(4 << 20, 1).unwrap()));
        vcpu.set_threshold(50);
        vcpu.cpu.s.cr4 |= crate::state::cr::CR4_OSFXSR;
        vcpu.cpu.mode_changed();
        for (at, v) in [(0xff0, 1.5f64), (0xff8, 2.0)] {
            let word = vcpu.cpu.ram.atomic(bare::DATA + at).unwrap();
            word.store(v.to_bits(), std::sync::atomic::Ordering::Relaxed);
        }
        let run = |vcpu: &mut Vcpu| {
            vcpu.cpu.s.rip = bare::CODE;
            let before = vcpu.cpu.jit.helper_calls;
            while vcpu.turn().is_none() {
                vcpu.jit.as_ref().unwrap().drain();
            }
            let stored = vcpu.cpu.ram.atomic(bare::DATA + 0x1000).unwrap();
            assert_eq!(f64::from_bits(stored.load(std::sync::atomic::Ordering::Relaxed)), 3.5);
            vcpu.cpu.jit.helper_calls - before
        };
        assert!(run(&mut vcpu) > 60_000, "the slow version runs");
        // As if that had been so for a while.
        let (key, past) = ((BLOCK, vcpu.cpu.mode.0), Instant::now() - 2 * WHILE);
        let strays = &mut vcpu.jit.as_mut().unwrap().strays;
        strays.clear();
        (0..1 << 20).for_each(|_| _ = strays.note(key, past));
        run(&mut vcpu);
        assert_eq!(run(&mut vcpu), 0);
        let counts = &vcpu.jit.as_ref().unwrap().counts;
        assert_eq!((counts.strays, counts.regions), (1, 2));
    }

    /// The loop goes on at the access that is looked at, and on in the region that takes the place of its own.
    #[test]
    fn a_region_is_compiled_anew() {
        const ACCESS: u64 = bare::CODE + 14;
        let code = [
            &[0xbe, 0, 0, 0x20, 0][..],            // mov esi, 200000h
            &[0x31, 0xc0],                         // xor eax, eax
            &[0xb9, 0, 0, 1, 0],                   // mov ecx, 65536
            &[0x31, 0xdb],                         // xor ebx, ebx
            &[0x48, 0x03, 0x04, 0x1e],             // add rax, [rsi + rbx]
            &[0x48, 0x81, 0xc3, 0, 0x10, 0, 0],    // add rbx, 1000h
            &[0x48, 0x81, 0xe3, 0, 0xf0, 0, 0],    // and rbx, 0f000h
            &[0xff, 0xc9, 0x75, 0xea, 0xe6, 0x80], // dec ecx; jnz the access; out 80h, al
        ];
        let mut vcpu = Vcpu::new(bare::cpu(&code.concat()), Some(Jit::new(4 << 20, 1).unwrap()));
        vcpu.set_threshold(50);
        for page in 0..16u64 {
            let word = vcpu.cpu.ram.atomic(bare::DATA + page * 0x1000).unwrap();
            word.store(1 << page, std::sync::atomic::Ordering::Relaxed);
        }
        let run = |vcpu: &mut Vcpu| {
            vcpu.cpu.s.rip = bare::CODE;
            while vcpu.turn().is_none() {
                vcpu.jit.as_ref().unwrap().drain();
            }
            assert_eq!(vcpu.cpu.s.gpr[0], 0xffff << 12);
        };
        // As if much had been seen of it already.
        let (key, past) = ((ACCESS, vcpu.cpu.mode.0), Instant::now() - 2 * WHILE);
        (0..1 << 20).for_each(|_| _ = vcpu.jit.as_mut().unwrap().strays.note(key, past));
        run(&mut vcpu);
        run(&mut vcpu);
        let counts = &vcpu.jit.as_ref().unwrap().counts;
        assert_eq!((counts.strays, counts.regions), (1, 2));
    }
}
