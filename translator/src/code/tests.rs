//! Code memory as its users see it: real code is written, published, run, changed and run again.

use super::*;
use std::sync::atomic::{AtomicBool, Ordering};

/// A function that returns `value`.
fn returns(isa: HostIsa, value: u16) -> Vec<u8> {
    let [low, high] = value.to_le_bytes();
    match isa {
        HostIsa::X86_64 => vec![0xb8, low, high, 0, 0, 0xc3], // mov eax, value; ret
        HostIsa::Aarch64 => {
            let movz = 0x5280_0000_u32 | u32::from(value) << 5; // movz w0, #value; ret
            [movz.to_le_bytes(), 0xd65f_03c0_u32.to_le_bytes()].concat()
        }
    }
}

fn install(arena: &CodeArena, code: &[u8]) -> Slot {
    let mut slot = arena.alloc(code.len()).unwrap();
    arena.write(&mut slot, code).unwrap();
    arena.publish(&slot);
    slot
}

fn call(arena: &CodeArena, offset: usize) -> u32 {
    // SAFETY: the tests call only offsets at which they published a function of this type.
    let function: extern "C" fn() -> u32 = unsafe { std::mem::transmute(arena.exec_ptr(offset)) };
    function()
}

/// The lines of `/proc/self/maps` whose range holds `address`.
fn mapping_of(address: *const u8) -> Option<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let holds = |line: &&str| {
        let (start, rest) = line.split_once('-').unwrap();
        let end = rest.split(' ').next().unwrap();
        let parse = |hex| usize::from_str_radix(hex, 16).unwrap();
        (parse(start)..parse(end)).contains(&(address as usize))
    };
    maps.lines().find(holds).map(str::to_owned)
}

#[test]
fn published_code_runs_and_rewritten_code_runs_anew() {
    let arena = CodeArena::new(4096).unwrap();
    let mut slot = install(&arena, &returns(arena.isa(), 7));
    assert_eq!(call(&arena, slot.offset()), 7);
    for value in 0..2000 {
        arena.write(&mut slot, &returns(arena.isa(), value)).unwrap();
        arena.publish(&slot);
        assert_eq!(call(&arena, slot.offset()), u32::from(value));
    }
}

#[test]
fn sizes_are_whole_pages_and_bounded_by_branch_reach() {
    let arena = CodeArena::new(1).unwrap();
    assert!(arena.capacity() >= 4096 && arena.capacity().is_power_of_two());
    assert!(CodeArena::new(0).is_ok());
    let limit = arena.isa().branch_reach();
    assert!(matches!(CodeArena::new(limit + 1), Err(ArenaError::TooLarge { limit: l, .. }) if l == limit));
    assert!(matches!(CodeArena::new(usize::MAX), Err(ArenaError::TooLarge { .. })));
    let largest = CodeArena::new(limit).unwrap();
    assert_eq!(largest.capacity(), limit);
}

#[test]
fn a_full_arena_says_so_and_recovers() {
    let arena = CodeArena::new(4096).unwrap();
    let slots: Vec<_> = std::iter::from_fn(|| arena.alloc(100)).collect();
    assert_eq!(slots.len(), arena.capacity() / 112);
    assert_eq!(arena.used(), slots.len() * 112);
    for slot in slots {
        arena.free(slot);
    }
    assert_eq!(arena.used(), 0);
    assert_eq!(arena.alloc(arena.capacity()).unwrap().len(), arena.capacity());
}

#[test]
fn a_slot_takes_no_more_than_it_holds() {
    let arena = CodeArena::new(4096).unwrap();
    let mut slot = arena.alloc(20).unwrap();
    assert!(arena.write(&mut slot, &[0x90; 32]).is_ok());
    assert!(matches!(arena.write(&mut slot, &[0x90; 33]), Err(ArenaError::SlotOverflow { len: 33, capacity: 32 })));
    // Of another, larger arena.
    let other = CodeArena::new(1 << 20).unwrap();
    let mut foreign = other.alloc(1 << 20).unwrap();
    assert!(arena.write(&mut foreign, &[0; 1 << 17]).is_err());
    arena.publish(&foreign);
}

#[test]
fn the_rest_of_a_slot_traps() {
    let arena = CodeArena::new(4096).unwrap();
    let mut slot = arena.alloc(32).unwrap();
    arena.write(&mut slot, &[0x90; 32]).unwrap();
    arena.write(&mut slot, &[0x11; 5]).unwrap();
    // SAFETY: a readable mapping, and nobody writes meanwhile.
    let bytes = unsafe { std::slice::from_raw_parts(arena.exec_ptr(slot.offset()), 32) };
    assert_eq!(bytes[..5], [0x11; 5]);
    assert!(bytes[5..].iter().all(|&byte| byte == arena.isa().filler()));
}

#[test]
fn no_page_is_writable_and_executable_and_drop_unmaps() {
    let arena = CodeArena::new(1 << 16).unwrap();
    let code = arena.exec_ptr(0);
    let line = mapping_of(code).unwrap();
    assert!(line.contains(" r-xs ") && line.contains("diglot-code"), "{line}");
    let inode = line.split_whitespace().nth(4).unwrap().to_owned();
    let views_of = |inode: &str| {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let ours = |line: &&str| line.contains("diglot-code") && line.split_whitespace().nth(4) == Some(inode);
        maps.lines().filter(ours).map(|line| line.split(' ').nth(1).unwrap().to_owned()).collect::<Vec<_>>()
    };
    let mut views = views_of(&inode);
    views.sort();
    assert_eq!(views, ["r-xs", "rw-s"]);
    assert_eq!(arena.offset_of(code as usize + 5), Some(5));
    assert_eq!(arena.offset_of(code as usize + arena.capacity()), None);
    assert_eq!(arena.offset_of(code as usize - 1), None);
    drop(arena);
    assert!(views_of(&inode).is_empty());
}

/// A jump whose site lies at `phase` in a quadword (x86-64), to be patched.
fn jump_unit(isa: HostIsa, phase: usize) -> (Vec<u8>, usize) {
    let pad = match isa {
        HostIsa::X86_64 => (phase + 7) % 8,
        HostIsa::Aarch64 => 0,
    };
    let mut code = vec![0x90; pad];
    let jump = encode_jump(isa, pad, pad).unwrap();
    code.extend_from_slice(jump.as_bytes());
    (code, pad + jump.site())
}

#[test]
fn branches_are_retargeted_at_every_phase() {
    let arena = CodeArena::new(1 << 16).unwrap();
    let isa = arena.isa();
    let one = install(&arena, &returns(isa, 1));
    let two = install(&arena, &returns(isa, 2));
    for phase in 0..8 {
        let (mut code, site) = jump_unit(isa, phase);
        let before = code.clone();
        let links = add_link_cells(isa, &mut code, &[site]).unwrap();
        assert_eq!(code == before, is_patchable(isa, site));
        let slot = install(&arena, &code);
        let link = slot.offset() + links[0];
        for (target, value) in [(&one, 1), (&two, 2), (&one, 1)] {
            assert!(arena.patch_branch(link, target.offset()), "phase {phase}");
            assert_eq!(call(&arena, slot.offset()), value, "phase {phase}");
        }
        arena.free(slot);
    }
}

#[test]
fn what_is_no_patchable_branch_is_left_alone() {
    let arena = CodeArena::new(4096).unwrap();
    let isa = arena.isa();
    let target = install(&arena, &returns(isa, 3));
    let (code, site) = jump_unit(isa, 6);
    let unit = install(&arena, &code);
    let site = unit.offset() + site;
    let refused: &[(usize, usize)] = &[
        (target.offset() + 4, 0),    // no branch
        (0, 0),                      // no byte before it
        (arena.capacity() - 3, 0),   // ends outside
        (arena.capacity(), 0),       // outside
        (usize::MAX, 0),             // no offset at all
        (site, arena.capacity()),    // leads outside
        (site, usize::MAX),          // leads nowhere
        (site | 3, target.offset()), // across a boundary, or unaligned
    ];
    for &(site, to) in refused {
        assert!(!arena.patch_branch(site, to), "{site:#x} -> {to:#x}");
    }
    if isa == HostIsa::X86_64 {
        assert!(!arena.patch_branch(site, target.offset()), "displacement across a quadword");
    }
    assert_eq!(call(&arena, target.offset()), 3);
}

/// Code is moved into huge pages once two megabytes are full, and what it says stays, in either view.
#[test]
fn code_runs_on_while_memory_is_gathered() {
    const FILLER: usize = 1 << 19;
    let arena = CodeArena::new(8 << 20).unwrap();
    let isa = arena.isa();
    let mut functions = Vec::new();
    for value in 0..12 {
        functions.push((value, install(&arena, &returns(isa, value))));
        let filler = vec![isa.filler(); FILLER];
        let _filler = install(&arena, &filler);
        for (value, slot) in &functions {
            assert_eq!(call(&arena, slot.offset()), u32::from(*value));
        }
    }
    for (value, slot) in &mut functions {
        arena.write(slot, &returns(isa, *value + 100)).unwrap();
        arena.publish(slot);
        assert_eq!(call(&arena, slot.offset()), u32::from(*value) + 100);
    }
}

/// A conditional jump of x86-64 is retargeted like any other.
#[test]
fn conditional_branches_are_patched_on_x86() {
    let arena = CodeArena::new(4096).unwrap();
    let isa = arena.isa();
    if isa != HostIsa::X86_64 {
        println!("skipped: code for {isa:?} has no conditional branches that are patched");
        return;
    }
    // xor eax, eax; je +0; mov eax, 1; ret, behind four NOPs that put the displacement into a quadword.
    let code = [0x90, 0x90, 0x90, 0x90, 0x31, 0xc0, 0x0f, 0x84, 0, 0, 0, 0, 0xb8, 1, 0, 0, 0, 0xc3];
    let unit = install(&arena, &code);
    let target = install(&arena, &returns(isa, 2));
    let site = unit.offset() + 8;
    assert_eq!(call(&arena, unit.offset()), 1);
    assert!(arena.patch_branch(site, target.offset()));
    assert_eq!(call(&arena, unit.offset()), 2);
    assert!(!arena.patch_branch(site - 4, target.offset()), "no branch ends there");
}

/// One thread runs a jump that another retargets all the while: it always arrives at one of the two targets.
#[test]
fn a_running_branch_is_retargeted_safely() {
    const PATCHES: usize = 100_000;
    let arena = CodeArena::new(1 << 20).unwrap();
    let isa = arena.isa();
    let one = install(&arena, &returns(isa, 0x1111));
    // Far enough for all four displacement bytes to differ from those of the near target.
    let gap = arena.alloc(0x9_8770).unwrap();
    let two = install(&arena, &returns(isa, 0x2222));
    for phase in [0, 1, 3, 4] {
        let (code, site) = jump_unit(isa, phase);
        let unit = install(&arena, &code);
        let site = unit.offset() + site;
        assert!(arena.patch_branch(site, one.offset()));
        let stop = AtomicBool::new(false);
        let (seen_one, seen_two) = std::thread::scope(|scope| {
            let runner = scope.spawn(|| {
                let mut seen = (0_u64, 0_u64);
                // At least once, however late this thread gets a core.
                loop {
                    match call(&arena, unit.offset()) {
                        0x1111 => seen.0 += 1,
                        0x2222 => seen.1 += 1,
                        other => panic!("arrived at neither target: {other:#x}"),
                    }
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
                seen
            });
            for i in 0..PATCHES / 4 {
                let target = if i % 2 == 0 { &two } else { &one };
                assert!(arena.patch_branch(site, target.offset()));
            }
            stop.store(true, Ordering::Relaxed);
            runner.join().unwrap()
        });
        assert!(seen_one + seen_two > 0);
        arena.free(unit);
    }
    arena.free(gap);
}

/// After `sync_cores` no thread arrives at the old target any more.
#[test]
fn synchronised_cores_take_the_new_target_only() {
    let arena = CodeArena::new(1 << 16).unwrap();
    if !arena.sync_cores() {
        eprintln!("skipped: membarrier(PRIVATE_EXPEDITED_SYNC_CORE)");
        return;
    }
    let isa = arena.isa();
    let targets = [install(&arena, &returns(isa, 0)), install(&arena, &returns(isa, 1))];
    let (code, site) = jump_unit(isa, 0);
    let unit = install(&arena, &code);
    assert!(arena.patch_branch(unit.offset() + site, targets[0].offset()));
    let round = std::sync::atomic::AtomicUsize::new(0);
    const ROUNDS: usize = 500;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while round.load(Ordering::Acquire) < ROUNDS {
                let before = round.load(Ordering::Acquire);
                let value = call(&arena, unit.offset()) as usize;
                // Rounds go up only after the cores are synchronised: in an unchanged round the value is settled,
                // unless the next patch, not yet announced, is already seen.
                let after = round.load(Ordering::Acquire);
                if before == after {
                    assert!(value == before % 2 || value == (before + 1) % 2);
                }
            }
        });
        for next in 1..=ROUNDS {
            assert!(arena.patch_branch(unit.offset() + site, targets[next % 2].offset()));
            assert!(arena.sync_cores());
            round.store(next, Ordering::Release);
        }
    });
    assert_eq!(call(&arena, unit.offset()) as usize, ROUNDS % 2);
}

#[test]
fn many_threads_share_one_arena() {
    let arena = CodeArena::new(1 << 16).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4_u16 {
            let arena = &arena;
            scope.spawn(move || {
                let mut slots = Vec::new();
                for i in 0..2000_u16 {
                    let value = thread << 12 | i;
                    slots.push((install(arena, &returns(arena.isa(), value)), value));
                    if slots.len() == 50 {
                        for (slot, value) in slots.drain(..) {
                            assert_eq!(call(arena, slot.offset()), u32::from(value));
                            arena.free(slot);
                        }
                    }
                }
            });
        }
    });
    assert_eq!(arena.used(), 0);
}
