//! Guests that are moved from one engine to another while they run.

mod support;

use std::path::Path;

use iced_x86::code_asm::*;
use support::*;

const HOW_OFTEN: &str = "0.05,0.1,0.15,0.2,0.25,0.3,0.35,0.4,0.45,0.5";

/// From where to where: the engines' names and the options.
fn moves(asks: Asks) -> Vec<(&'static str, Vec<&'static str>)> {
    let switch = ["--switch-after", HOW_OFTEN];
    let mut all = vec![
        ("interpreter to compiler", vec!["--backend", "interp"]),
        ("compiler to interpreter", vec!["--backend", "jit", "--switch-to", "interp"]),
    ];
    if has_kvm(asks) {
        all.push(("KVM to compiler", vec!["--backend", "kvm", "--slow-kvm"]));
        all.push(("compiler to KVM", vec!["--backend", "jit", "--slow-kvm"]));
        all.push(("interpreter to KVM", vec!["--backend", "interp", "--switch-to", "kvm", "--slow-kvm"]));
    }
    if only_kvm() {
        all.retain(|(name, _)| name.contains(KVM.0));
    }
    all.into_iter().map(|(name, options)| (name, [&options[..], &switch].concat())).collect()
}

fn switches(stats: &Path) -> u64 {
    let text = std::fs::read_to_string(stats).expect("statistics");
    let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    json["engine_switches"].as_u64().unwrap_or(0)
}

/// A guest that counts, a number each few milliseconds, and keeps a sum in every register that it has.
#[test]
fn a_counting_guest_counts_on() {
    const NUMBERS: u32 = 200;
    const TICKS: u32 = 10_740; // three milliseconds of the power-management timer
    let directory = tempfile::tempdir().expect("directory");
    let kernel = guest(directory.path(), "kernel", |a| {
        let mut next = a.create_label();
        let mut digit = a.create_label();
        let mut wrong = a.create_label();
        a.mov(esp, 0x9000)?;
        a.xor(ebx, ebx)?;
        a.xor(esi, esi)?;
        a.xor(edi, edi)?;
        a.set_label(&mut next)?;
        a.inc(ebx)?;
        a.add(esi, ebx)?;
        a.sub(edi, ebx)?;
        // The two sums are each other's negative for as long as nothing is lost.
        a.mov(eax, esi)?;
        a.add(eax, edi)?;
        a.jne(wrong)?;
        wait(a, TICKS)?;
        // Four hexadecimal digits, from the highest, as letters from A to P.
        a.mov(edx, 0x3f8)?;
        a.mov(ecx, 12)?;
        a.set_label(&mut digit)?;
        a.mov(eax, ebx)?;
        a.shr(eax, cl)?;
        a.and(eax, 15)?;
        a.add(eax, 0x41)?;
        a.out(dx, al)?;
        a.sub(ecx, 4)?;
        a.jns(digit)?;
        a.cmp(ebx, NUMBERS)?;
        a.jne(next)?;
        power_off(a)?;
        a.set_label(&mut wrong)?;
        say(a, "lost")?;
        power_off(a)
    });
    let letter = |n: u32, shift: u32| char::from(b'A' + (n >> shift & 15) as u8);
    let expected: String = (1..=NUMBERS).flat_map(|n| [12, 8, 4, 0].map(|shift| letter(n, shift))).collect();
    let stats = directory.path().join("stats.json");
    for (name, options) in moves(Asks::Little) {
        let args = ["run", "--memory", "4M", "--kernel", text(&kernel), "--stats-json", text(&stats)];
        let (code, stdout, stderr) = output(&mut diglot(&[&args[..], &options].concat()));
        assert_eq!((code, stdout.as_str()), (Some(0), expected.as_str()), "{name}: {stderr}");
        // A host that is slow to begin finds several of the times past, and moves it once for these.
        assert!(switches(&stats) >= 1, "{name}");
    }
}

/// Halts, timer interrupts, exceptions, user code and its own checks: the embedded guest does not notice.
#[test]
fn the_embedded_guest_does_not_notice() {
    let directory = tempfile::tempdir().expect("directory");
    let stats = directory.path().join("stats.json");
    for (name, options) in moves(Asks::Much) {
        let args = ["run", "--memory", "16M", "--stats-json", text(&stats)];
        let (code, stdout, stderr) = output(&mut diglot(&[&args[..], &options].concat()));
        assert_eq!(code, Some(0), "{name}: {stderr}");
        assert!(stdout.ends_with("checks passed.\r\n") && !stdout.contains("FAIL"), "{name}: {stdout}");
        assert!(switches(&stats) >= 1, "{name}");
    }
}

/// A reset comes to the engine that runs then, and the times that are still to come are kept.
#[test]
fn a_moved_guest_resets_and_halts_as_any() {
    let directory = tempfile::tempdir().expect("directory");
    let kernel = guest(directory.path(), "kernel", |a| {
        wait(a, 250_000)?; // 70 milliseconds
        say(a, "up")?;
        a.mov(eax, 0xfe)?;
        a.out(0x64, al)?;
        spin(a)
    });
    let halts = guest(directory.path(), "halts", |a| a.hlt().and_then(|()| spin(a)));
    for (name, options) in moves(Asks::Little) {
        let args = ["run", "--memory", "4M", "--kernel", text(&kernel), "--until", "upupupup"];
        let (code, stdout, stderr) = output(&mut diglot(&[&args[..], &options].concat()));
        assert_eq!((code, stdout.as_str()), (Some(0), "upupupup"), "{name}: {stderr}");
        let args = ["run", "--memory", "4M", "--kernel", text(&halts), "--timeout", "0.4"];
        let (code, _, stderr) = output(&mut diglot(&[&args[..], &options].concat()));
        assert_eq!(code, Some(124), "{name}: {stderr}");
    }
}
