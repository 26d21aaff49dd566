//! How runs of several CPUs end, and how that looks from outside.

use iced_x86::code_asm::*;

use crate::support;
use crate::support::smp::*;

/// Ends of the machine that are not the first CPU's doing, or find the others at something else.
#[test]
fn ends_of_a_guest_of_several_cpus_have_their_codes() {
    type Code = fn(&mut Smp) -> Done;
    /// Name, code, options, exit code, serial output, and what Diglot tells of the end.
    type Guest<'a> = (&'a str, Code, &'a [&'a str], i32, &'a str, &'a str);
    fn reset(g: &mut Smp) -> Done {
        g.mov(eax, 0xfe)?;
        g.out(0x64, al)?;
        support::spin(g)
    }
    let guests: [Guest; 13] = [
        ("the others are never started", |g| support::power_off(g), &[], 0, "", ""),
        ("halts, the others never started", Smp::halt, &["--timeout", "0.4"], 124, "", "--timeout"),
        ("crashes, the others never started", |g| g.ud2(), &[], 255, "", "triple fault"),
        (
            "another powers off",
            |g| {
                g.start_others()?;
                g.on(1, |g| g.say("bye\n").and_then(|()| support::power_off(g)))?;
                support::spin(g)
            },
            &[],
            0,
            "bye\n",
            "",
        ),
        (
            "another powers off while all halt",
            |g| {
                g.start_others()?;
                g.on(1, |g| g.delay(10_000).and_then(|()| support::power_off(g)))?;
                g.halt()
            },
            &[],
            0,
            "",
            "",
        ),
        (
            "another crashes",
            |g| {
                g.start_others()?;
                g.on(1, |g| g.ud2())?;
                g.halt()
            },
            &[],
            255,
            "",
            "triple fault",
        ),
        (
            "another crashes while all spin",
            |g| {
                g.start_others()?;
                g.on(2, |g| g.ud2())?;
                support::spin(g)
            },
            &["--no-reboot"],
            255,
            "",
            "triple fault",
        ),
        (
            "another resets",
            |g| {
                g.start_others()?;
                g.on(1, reset)?;
                support::spin(g)
            },
            &["--no-reboot"],
            255,
            "",
            "asked for a reset",
        ),
        (
            "another reboots until it has said so often enough",
            |g| {
                g.start_others()?;
                g.on(2, |g| g.say("up").and_then(|()| reset(g)))?;
                g.on(0, Smp::halt)?;
                support::spin(g)
            },
            &["--until", "upupupup"],
            0,
            "upupupup",
            "",
        ),
        ("all spin", |g| g.start_others().and_then(|()| support::spin(g)), &["--timeout", "0.4"], 124, "", "--timeout"),
        ("all halt", |g| g.start_others().and_then(|()| g.halt()), &["--timeout", "0.4"], 124, "", "--timeout"),
        (
            "all do locked accesses that are not aligned",
            |g| {
                g.start_others()?;
                let again = g.here()?;
                g.lock().inc(dword_ptr(FREE + 1))?;
                g.jmp(again)
            },
            &["--timeout", "0.4"],
            124,
            "",
            "--timeout",
        ),
        (
            "another ends with a code",
            |g| {
                g.start_others()?;
                g.not_on(1, |g| support::spin(g))?;
                g.mov(eax, 0x10)?;
                g.out(0xf4, al)?;
                support::spin(g)
            },
            &["--debug-exit", "0xf4"],
            33,
            "",
            "",
        ),
    ];
    let directory = tempfile::tempdir().expect("directory");
    for (name, code, options, exit, printed, told) in guests {
        for bits in [Bits::B32, Bits::B64] {
            let kernel = guest(directory.path(), "kernel", bits, 3, code);
            on_engines(&kernel, 3, options, |engine, code, stdout, stderr| {
                assert_eq!((code, stdout), (Some(exit), printed), "{name}, {engine}: {stderr}");
                // The first line is about the engine.
                let line = stderr.lines().nth(1).unwrap_or_default();
                assert!(line.contains(told) && line.is_empty() == told.is_empty(), "{name}, {engine}: {stderr}");
                assert!(stderr.lines().count() <= 2, "{name}, {engine}: {stderr}");
            });
        }
    }
}
