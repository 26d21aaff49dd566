//! The command line as a user meets it: every mistake gives one line, its exit code, and leaves nothing behind.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Stdio;

use support::{diglot, guest, output, power_off, text, write};

/// Runs diglot with arguments that are wrong, and checks its exit code and that its one line contains `part`.
#[track_caller]
fn refused(args: &[&str], code: i32, part: &str) {
    let (status, stdout, stderr) = output(&mut diglot(args));
    assert_eq!(status, Some(code), "{args:?}: {stderr}");
    assert_eq!(stdout, "", "{args:?}");
    assert!(stderr.starts_with("diglot: ") && stderr.contains(part), "{args:?}: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "{args:?}: {stderr}");
}

#[test]
fn wrong_usage_is_code_2() {
    let cases: [(&[&str], &str); 16] = [
        (&["--frob"], "--frob"),
        (&["frob"], "frob"),
        (&["run", "--frob"], "--frob"),
        (&["run", "fedora"], "fedora"),
        (&["run", "--memory", "0"], "at least 2M"),
        (&["run", "--memory", "1M"], "at least 2M"),
        (&["run", "--memory", "much"], "not understood"),
        (&["run", "--cpus", "0"], "--cpus"),
        (&["run", "--cpus", "65"], "--cpus"),
        (&["run", "--cpu", "i386"], "x86-64-v2"),
        (&["run", "--backend", "tcg"], "auto, jit, interp and kvm"),
        (&["run", "--trace=frob"], "frob"),
        (&["run", "--serial", "tcp:1"], "file:PATH"),
        (&["run", "--timeout", "0"], "above 0"),
        (&["run", "--initrd", "x"], "--kernel"),
        (&["run", "--", "uname"], "GUEST"),
    ];
    for (args, part) in cases {
        refused(args, 2, part);
    }
}

#[test]
fn a_kernel_that_cannot_be_booted_is_code_125() {
    let directory = tempfile::tempdir().expect("directory");
    let file = |name: &str, content: &[u8]| {
        let path = directory.path().join(name);
        fs::write(&path, content).expect("write");
        path.to_str().expect("text").to_owned()
    };
    let random: Vec<u8> = (0..100_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    // An ELF header of AArch64 (machine 183).
    let mut foreign = vec![0; 64];
    foreign[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    foreign[16..20].copy_from_slice(&[2, 0, 183, 0]);
    for (kernel, part) in [
        (directory.path().join("missing").to_str().expect("text").to_owned(), "missing"),
        (directory.path().to_str().expect("text").to_owned(), "kernel"),
        (file("empty", b""), "empty"),
        (file("short", b"\x7fELF"), "short"),
        (file("random", &random), "random"),
        (file("foreign", &foreign), "foreign"),
    ] {
        refused(&["run", "--kernel", &kernel], 125, part);
    }
}

/// A file that ends in the middle of what its headers promise, and initial RAM disks that are none or too large.
#[test]
fn files_that_do_not_fit_are_code_125() {
    let directory = tempfile::tempdir().expect("directory");
    let kernel = guest(directory.path(), "kernel", power_off);
    let whole = fs::read(&kernel).expect("the kernel");
    for (len, part) in [(60, "truncated"), (170, "truncated"), (whole.len() - 1, "truncated")] {
        let cut = write(directory.path(), "cut", &whole[..len]);
        refused(&["run", "--kernel", text(&cut)], 125, part);
    }
    let large = write(directory.path(), "large", &vec![1; 4 << 20]);
    let empty = write(directory.path(), "empty", b"");
    for (initrd, part) in
        [(text(&large), "does not fit"), (text(&empty), "is empty"), ("/no/such/initrd", "cannot open")]
    {
        refused(&["run", "--memory", "4M", "--kernel", text(&kernel), "--initrd", initrd], 125, part);
    }
    // Where it fits, it is taken.
    let args = ["run", "--memory", "16M", "--kernel", text(&kernel), "--initrd", text(&large)];
    assert_eq!(output(&mut diglot(&args)).0, Some(0));
}

#[test]
fn what_cannot_be_written_is_told_before_the_guest_starts() {
    refused(&["run", "--stats-json", "/no/such/directory/stats.json"], 125, "/no/such/directory/stats.json");
    refused(&["run", "--serial", "file:/no/such/directory/log"], 125, "/no/such/directory/log");
    refused(&["run", "--trace", "--trace-file", "/no/such/directory/trace"], 125, "/no/such/directory/trace");
    let directory = tempfile::tempdir().expect("directory");
    let stats = directory.path().join("stats.json");
    refused(
        &["run", "--stats-json", stats.to_str().expect("text"), "--kernel", "/no/such/kernel"],
        125,
        "/no/such/kernel",
    );
    assert_eq!(files(directory.path()), Vec::<String>::new());
}

/// KVM that was asked for and is not to be had: what is wrong and what to do about it, and never another engine.
#[test]
fn kvm_that_is_not_there_is_code_125() {
    let directory = tempfile::tempdir().expect("directory");
    let file = write(directory.path(), "kvm", b"");
    for (device, part) in [
        ("/no/such/kvm", "/no/such/kvm does not exist: "),
        ("/dev/null", "/dev/null answers with API version -1 where KVM has 12"),
        (text(&file), "it is not KVM"),
        (text(directory.path()), "cannot open"),
    ] {
        for args in [&["run", "--backend", "kvm"][..], &["run", "--cpu", "host"], &["run", "--switch-after", "1"]] {
            if support::kvm_is_for_this_host() {
                // From the interpreter and compiler, which `auto` stands for then, a guest is moved to KVM.
                refused_with(args, &[("DIGLOT_KVM", device)], part);
            }
        }
        let (code, stdout, stderr) = output(diglot(&["run", "--memory", "16M"]).env("DIGLOT_KVM", device));
        assert_eq!(code, Some(0), "{stderr}");
        assert!(stdout.ends_with("checks passed.\r\n"), "{stdout}");
        assert!(stderr.starts_with("diglot: backend: interpreter and compiler ("), "{stderr}");
    }
}

/// As another user, unless the test has no means to become one.
#[test]
fn kvm_without_permission_is_code_125() {
    use std::os::unix::process::CommandExt;
    if !support::kvm_is_for_this_host() {
        return;
    }
    let directory = tempfile::tempdir().expect("directory");
    let file = write(directory.path(), "kvm", b"");
    let set_mode = |path: &Path, mode| {
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)).expect("our file");
    };
    set_mode(directory.path(), 0o755);
    set_mode(&file, 0);
    // The program may lie where only its owner may go.
    let program = write(directory.path(), "diglot", &fs::read(support::PROGRAM).expect("the program"));
    set_mode(&program, 0o755);
    let mut command = support::start(text(&program));
    command.args(["run", "--backend", "kvm"]).env("DIGLOT_KVM", &file).stdin(Stdio::null());
    // SAFETY: asking for one's own id has no conditions.
    if unsafe { libc::geteuid() } == 0 {
        command.uid(65_534).gid(65_534);
    }
    let (code, _, stderr) = output(&mut command);
    assert_eq!(code, Some(125), "{stderr}");
    assert!(stderr.contains("no permission to open") && stderr.contains("usermod"), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
}

/// The host has no file left to open when the machine is to be created.
#[test]
fn a_host_that_is_short_of_something_is_code_125() {
    if !support::has_kvm(support::Asks::Little) {
        return;
    }
    let program = support::words(support::PROGRAM).join("' '");
    let script = format!("ulimit -n 8; exec '{program}' run --backend kvm --slow-kvm --memory 16M");
    let (code, stdout, stderr) = output(std::process::Command::new("sh").args(["-c", &script]).stdin(Stdio::null()));
    assert_eq!((code, stdout.as_str()), (Some(125), ""), "{stderr}");
    assert!(stderr.lines().count() == 1 && stderr.contains("Too many open files"), "{stderr}");
}

#[test]
fn the_doctor_tells_what_auto_does() {
    for device in ["/dev/kvm", "/no/such/kvm"] {
        let (code, stdout, stderr) = output(diglot(&["doctor", "--json"]).env("DIGLOT_KVM", device));
        assert_eq!((code, stderr.as_str()), (Some(0), ""));
        let report: serde_json::Value = serde_json::from_str(&stdout).expect("JSON");
        assert_eq!(report["kvm"]["device"], device);
        assert_eq!(report["kvm"]["usable"], report["kvm"]["problem"].is_null(), "{report}");
        let kvm = report["auto"]["engine"] == "kvm";
        assert_eq!(report["kvm"]["usable"], kvm, "{report}");
        assert!(report["memory"]["page_bytes"].as_u64().is_some_and(|n| n >= 4096), "{report}");
        let (code, text, _) = output(diglot(&["doctor"]).env("DIGLOT_KVM", device));
        assert_eq!(code, Some(0));
        for part in ["host\n", "KVM\n", "memory\n", "terminal\n", "QEMU", "--backend auto\n"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let (_, _, stderr) = output(diglot(&["run", "--memory", "16M"]).env("DIGLOT_KVM", device));
        assert_eq!(stderr.starts_with("diglot: backend: KVM ("), kvm, "{stderr}");
    }
}

/// What follows one CPU's instructions one by one.
#[test]
fn several_cpus_where_only_one_runs_are_code_125() {
    for option in ["--lockstep", "--trace"] {
        refused(&["run", "--cpus", "2", option], 125, option);
    }
}

#[test]
fn more_memory_than_the_host_has_is_code_125() {
    refused(&["run", "--memory", "1000T"], 125, "more than the host");
}

#[test]
fn too_little_memory_for_the_embedded_guest_is_code_125() {
    refused(&["run", "--memory", "2M"], 125, "needs 4 MiB; give it more memory");
}

#[test]
fn a_debian_guest_without_a_cache_or_apt_is_code_125() {
    refused_with(&["run", "debian"], &[("XDG_CACHE_HOME", "relative"), ("HOME", "")], "set HOME");
    let home = tempfile::tempdir().expect("directory");
    let home = home.path().to_str().expect("text");
    // A search path with no programs is a host with no apt.
    refused_with(&["run", "debian"], &[("XDG_CACHE_HOME", home), ("PATH", "/no/such/directory")], "--kernel");
}

#[track_caller]
fn refused_with(args: &[&str], environment: &[(&str, &str)], part: &str) {
    let (status, stdout, stderr) = output(diglot(args).envs(environment.iter().copied()));
    assert_eq!((status, stdout.as_str()), (Some(125), ""), "{stderr}");
    assert!(stderr.contains(part) && stderr.lines().count() == 1, "{stderr}");
}

#[test]
fn help_and_version() {
    let (status, help, _) = output(&mut diglot(&["--help"]));
    assert_eq!(status, Some(0));
    for part in ["Exit codes:", "124", "125", "255", "Ctrl-A x", "debian"] {
        assert!(help.contains(part), "{part}");
    }
    let (status, version, _) = output(&mut diglot(&["--version"]));
    assert_eq!((status, version), (Some(0), format!("diglot {}\n", env!("CARGO_PKG_VERSION"))));
}

#[test]
fn the_embedded_guest_runs_and_powers_off() {
    for args in [&[][..], &["run"], &["run", "--memory", "16M", "--serial", "stdio"]] {
        let (status, stdout, stderr) = output(&mut diglot(args));
        assert_eq!(status, Some(0), "{args:?}: {stderr}");
        assert!(!stdout.is_empty(), "{args:?}");
        assert_eq!(stderr.lines().count(), 1, "the line about the engine: {stderr}");
    }
}

#[test]
fn serial_output_and_statistics_go_where_they_are_sent() {
    let directory = tempfile::tempdir().expect("directory");
    let path = |name: &str| directory.path().join(name).to_str().expect("text").to_owned();
    let (_, expected, _) = output(&mut diglot(&["run"]));
    let serial = format!("file:{}", path("log"));
    let (status, stdout, stderr) =
        output(&mut diglot(&["run", "--stats", "--stats-json", &path("stats.json"), "--serial", &serial]));
    assert_eq!((status, stdout.as_str()), (Some(0), ""), "{stderr}");
    assert!(stderr.lines().count() > 1, "statistics: {stderr}");
    assert_eq!(fs::read_to_string(path("log")).expect("log").lines().count(), expected.lines().count());
    let stats = fs::read_to_string(path("stats.json")).expect("statistics");
    assert!(serde_json::from_str::<serde_json::Value>(&stats).expect("JSON").is_object());
    assert_eq!(files(directory.path()), ["log", "stats.json"]);
}

#[test]
fn a_reader_that_goes_away_ends_the_run_cleanly() {
    let mut child = diglot(&["run"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("diglot starts");
    drop(child.stdout.take());
    let mut stderr = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut stderr).expect("text");
    let code = child.wait().expect("ends").code();
    // The guest may have powered off before its last line met the closed pipe.
    assert!(matches!(code, Some(0 | 141)), "{code:?}: {stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
}

#[test]
fn input_to_a_guest_that_takes_none_is_harmless() {
    let mut child =
        diglot(&["run"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("starts");
    let _ = child.stdin.take().expect("piped").write_all(b"\x01x\x04 nobody reads this");
    assert_eq!(child.wait().expect("ends").code(), Some(0));
}

fn files(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("directory");
    let mut names: Vec<String> = entries.map(|e| e.expect("entry").file_name().into_string().expect("text")).collect();
    names.sort();
    names
}
