//! Whole machines, on every engine: what a guest can do to itself, and how each end looks from outside.

mod support;

use std::process::Stdio;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use support::*;

#[test]
fn the_embedded_guest_passes_its_checks_on_every_engine() {
    on_every_engine(Asks::Much, &["--memory", "16M"], |engine, code, stdout, stderr| {
        assert_eq!(code, Some(0), "{engine}: {stderr}");
        for part in ["] long mode", "timer interrupts taken", "hello from ring 3", "million instructions per second"] {
            assert!(stdout.contains(part), "{engine}: no '{part}' in {stdout}");
        }
        assert!(stdout.ends_with("checks passed.\r\n") && !stdout.contains("FAIL"), "{engine}: {stdout}");
    });
}

/// One expected result in the embedded guest is changed: the guest says so, and the exit code does.
#[test]
fn a_failed_check_of_the_embedded_guest_is_a_crash() {
    const PRIMES_BELOW_A_MILLION: u32 = 78_498;
    let directory = tempfile::tempdir().expect("directory");
    let mut image = diglot_runtime::embedded::image().expect("an image");
    let expected = PRIMES_BELOW_A_MILLION.to_le_bytes();
    let places: Vec<usize> = (0..image.bytes.len()).filter(|&at| image.bytes[at..].starts_with(&expected)).collect();
    assert!(!places.is_empty());
    for at in places {
        image.bytes[at] ^= 1;
    }
    let kernel = write(directory.path(), "kernel", &pvh(&image.bytes, image.load_gpa, image.entry.eip));
    on_every_engine(Asks::Much, &["--kernel", text(&kernel)], |engine, code, stdout, stderr| {
        assert_eq!(code, Some(255), "{engine}: {stderr}");
        let wanted = "FAIL sieve of Eratosthenes: primes below 1000000: found 132a2, not 132a3\r\n";
        assert!(stdout.ends_with(wanted), "{engine}: {stdout}");
        assert!(stderr.contains("the guest crashed: triple fault"), "{engine}: {stderr}");
    });
}

#[test]
fn ends_of_a_guest_have_their_codes_on_every_engine() {
    type Code = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    /// Name, code, options, exit code, serial output, and what Diglot tells of the end.
    type Guest<'a> = (&'a str, Code, &'a [&'a str], i32, &'a str, &'a str);
    let guests: [Guest; 8] = [
        ("powers off", |a| say(a, "bye\n").and_then(|()| power_off(a)), &[], 0, "bye\n", ""),
        ("triple fault", |a| a.ud2(), &[], 255, "", "triple fault"),
        (
            "reset by CF9h",
            |a| {
                a.mov(edx, 0xcf9)?;
                a.mov(eax, 6)?;
                a.out(dx, al)?;
                spin(a)
            },
            &["--no-reboot"],
            255,
            "",
            "asked for a reset",
        ),
        (
            "reset by the keyboard controller",
            |a| {
                a.mov(eax, 0xfe)?;
                a.out(0x64, al)?;
                spin(a)
            },
            &["--no-reboot"],
            255,
            "",
            "asked for a reset",
        ),
        (
            "reboots until it has said so often enough",
            |a| {
                say(a, "up")?;
                a.mov(eax, 0xfe)?;
                a.out(0x64, al)?;
                spin(a)
            },
            &["--until", "upupup"],
            0,
            "upupup",
            "",
        ),
        ("loops for ever", spin, &["--timeout", "0.4"], 124, "", "--timeout"),
        ("halts for ever", |a| a.hlt().and_then(|()| spin(a)), &["--timeout", "0.4"], 124, "", "--timeout"),
        // Zeroes are ADD [EAX], AL: through all memory, and into what is none and reads as ones.
        ("runs into zeroed memory", |a| a.jmp(0x20_0000), &["--timeout", "60"], 255, "", "triple fault"),
    ];
    let directory = tempfile::tempdir().expect("directory");
    for (name, code, options, exit, printed, told) in guests {
        let kernel = guest(directory.path(), "kernel", code);
        let args = [&["--memory", "4M", "--kernel", text(&kernel)], options].concat();
        on_every_engine(Asks::Little, &args, |engine, code, stdout, stderr| {
            if engine == KVM.0 && code == Some(125) {
                // The one thing that KVM does not do, and says so.
                assert!(stderr.contains("KVM_EXIT_INTERNAL_ERROR"), "{name}: {stderr}");
                assert_eq!(name, "runs into zeroed memory", "{stderr}");
                return;
            }
            assert_eq!((code, stdout), (Some(exit), printed), "{name}, {engine}: {stderr}");
            // The first line is about the engine.
            let line = stderr.lines().nth(1).unwrap_or_default();
            assert!(line.contains(told) && line.is_empty() == told.is_empty(), "{name}, {engine}: {stderr}");
            assert!(stderr.lines().count() <= 2, "{name}, {engine}: {stderr}");
        });
    }
}

/// Random bytes as a kernel: whatever they do is the guest's affair, and Diglot ends by itself.
#[test]
fn random_bytes_as_code_end_in_a_code_of_the_guests() {
    let directory = tempfile::tempdir().expect("directory");
    let mut x = 0x9e37_79b9_7f4a_7c15u64;
    for round in 0..16 {
        let image: Vec<u8> = std::iter::repeat_with(|| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 32) as u8
        })
        .take(4096)
        .collect();
        let kernel = write(directory.path(), "kernel", &pvh(&image, LOAD, LOAD as u32));
        let args = ["--memory", "4M", "--serial", "null", "--timeout", "1", "--no-reboot", "--kernel", text(&kernel)];
        on_every_engine(Asks::Little, &args, |engine, code, stdout, stderr| {
            let stuck = engine == KVM.0 && code == Some(125) && stderr.contains("KVM_EXIT_INTERNAL_ERROR");
            assert!(stuck || matches!(code, Some(0 | 124 | 255)), "{round}, {engine}: {code:?} {stderr}");
            assert_eq!(stdout, "", "{round}, {engine}");
        });
    }
}

#[test]
fn a_trace_holds_what_the_guest_executed() {
    let directory = tempfile::tempdir().expect("directory");
    let kernel = guest(directory.path(), "kernel", |a| {
        let mut again = a.create_label();
        a.mov(ecx, 3)?;
        a.set_label(&mut again)?;
        a.dec(ecx)?;
        a.jne(again)?;
        power_off(a)
    });
    let file = directory.path().join("trace");
    let trace = |filter: &str, more: &[&str]| {
        let filter = format!("--trace={filter}");
        let args = [&["run", "--kernel", text(&kernel), &filter, "--trace-file", text(&file)], more].concat();
        let (code, _, stderr) = output(&mut diglot(&args));
        assert_eq!(code, Some(0), "{stderr}");
        std::fs::read_to_string(&file).expect("the trace")
    };
    let all = trace("", &[]);
    let lines: Vec<&str> = all.lines().collect();
    assert_eq!(lines.len(), 1 + 3 * 2 + 3, "{all}");
    assert_eq!(lines[0], "0 0x0000000000100000 b9 03 00 00 00                 mov ecx,3");
    assert_eq!(trace("dec", &[]).lines().count(), 3);
    assert_eq!(trace("0x100000-0x100006", &[]).lines().count(), 4);
    assert_eq!(trace("user", &[]), "");
    let registers = trace("dec", &["--trace-registers"]);
    let counts: Vec<bool> = registers
        .lines()
        .step_by(2)
        .zip(["3", "2", "1"])
        .map(|(line, n)| line.contains(&format!("rcx={n:0>16}")))
        .collect();
    assert_eq!(counts, [true; 3], "{registers}");
}

/// The kernel's own counter of guest instructions would be a lie if engines disagreed about it.
#[test]
fn engines_agree_about_how_much_a_guest_did() {
    let directory = tempfile::tempdir().expect("directory");
    let kernel = guest(directory.path(), "kernel", |a| {
        let mut again = a.create_label();
        a.mov(ecx, 1_000_000)?;
        a.set_label(&mut again)?;
        a.dec(ecx)?;
        a.jne(again)?;
        say(a, "x")?;
        power_off(a)
    });
    let stats = directory.path().join("stats.json");
    on_every_engine(
        Asks::Little,
        &["--kernel", text(&kernel), "--stats-json", text(&stats)],
        |engine, code, _, stderr| {
            assert_eq!(code, Some(0), "{engine}: {stderr}");
            let json: serde_json::Value =
                serde_json::from_str(&std::fs::read_to_string(&stats).expect("statistics")).expect("JSON");
            let count = |name: &str| json[name].as_u64().unwrap_or_else(|| panic!("{engine}: no {name} in {json}"));
            assert_eq!((count("port_writes"), count("port_reads"), count("halts")), (2, 0, 0), "{engine}");
            if engine == KVM.0 {
                // Nobody counts instructions there.
                assert!(count("kvm_runs") >= 2 && json["mips"] == 0.0, "{json}");
                return;
            }
            // Up to the OUT that turns the machine off.
            assert_eq!(count("interpreted") + count("compiled"), 1 + 2 * 1_000_000 + 3 + 3, "{engine}");
            if json["resident_bytes"].is_null() {
                println!("skipped: this host does not say what is resident");
            } else {
                let parts = count("guest_resident_bytes") + count("beyond_guest_bytes");
                assert!(count("resident_bytes") >= parts, "{engine}");
            }
            assert!(json["mips"].as_f64().is_some_and(|mips| mips > 0.0), "{engine}: {json}");
        },
    );
}

/// Code that Linux perf can name: every line has an address, a length and the guest's address.
#[test]
fn the_map_for_perf_names_guest_code() {
    let directory = tempfile::tempdir().expect("directory");
    let kernel = guest(directory.path(), "kernel", |a| {
        let mut again = a.create_label();
        a.mov(ecx, 100_000_000)?;
        a.set_label(&mut again)?;
        a.dec(ecx)?;
        a.jne(again)?;
        power_off(a)
    });
    let mut child = diglot(&["run", "--backend", "jit", "--perf-map", "--kernel", text(&kernel)])
        .stderr(Stdio::null())
        .spawn()
        .expect("diglot starts");
    let path = format!("/tmp/perf-{}.map", child.id());
    assert_eq!(child.wait().expect("ends").code(), Some(0));
    let map = std::fs::read_to_string(&path).expect("the map stays for perf to read");
    std::fs::remove_file(&path).expect("it is ours");
    assert!(map.lines().any(|line| line.ends_with("guest 0x100005 (physical 0x100005, 32 bit)")), "{map}");
    for line in map.lines() {
        let mut words = line.split(' ');
        let number = |word: Option<&str>| u64::from_str_radix(word.unwrap_or_default(), 16).expect("hexadecimal");
        assert!(number(words.next()) != 0 && number(words.next()) != 0, "{line}");
    }
}

/// Signals that mean nothing, as fast as they go: a guest that counts loses nothing, on any engine.
#[test]
fn a_storm_of_signals_is_weathered() {
    let directory = tempfile::tempdir().expect("directory");
    let kernel = guest(directory.path(), "kernel", |a| {
        let mut again = a.create_label();
        a.xor(ebx, ebx)?;
        a.set_label(&mut again)?;
        put(a, b'.')?;
        a.mov(edx, 0x608)?;
        a.in_(eax, dx)?;
        a.inc(ebx)?;
        a.cmp(ebx, 20_000)?;
        a.jne(again)?;
        power_off(a)
    });
    for (engine, options) in engines(Asks::Little) {
        let args = [&["run", "--memory", "4M", "--kernel", text(&kernel)], options].concat();
        let child = diglot(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("diglot starts");
        let id = child.id() as libc::pid_t;
        let (done, is_done) = std::sync::mpsc::channel::<()>();
        let storm = std::thread::spawn(move || {
            // Not before it has handlers.
            std::thread::sleep(std::time::Duration::from_millis(100));
            while is_done.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
                // SAFETY: sending a signal has no conditions. Until it is waited for the child's id is its own.
                unsafe { libc::kill(id, libc::SIGCONT) };
                std::thread::yield_now();
            }
        });
        let output = child.wait_with_output().expect("ends");
        drop(done);
        storm.join().expect("no panic");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(0), 20_000), "{engine}: {stderr}");
    }
}
