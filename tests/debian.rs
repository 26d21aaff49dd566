//! Debian's own kernel, from power-on to a command's exit code. Needs apt-get and, the first time, the network.

mod support;

use std::process::Command;

use support::*;

fn apt() -> bool {
    Command::new("apt-get").arg("--version").output().is_ok_and(|output| output.status.success())
}

#[test]
fn debian_boots_and_runs_a_command_on_every_engine() {
    if !apt() {
        println!("skipped: no apt-get to fetch Debian's kernel with");
        return;
    }
    // Lock-step takes minutes of a debug build; `.ci/boots` does it with a release build.
    for (engine, options) in engines(Asks::Much).iter().filter(|(engine, _)| *engine != "lock-step") {
        let command = ["--", "sh", "-c", "uname -m; sha256sum /bin/busybox | wc -c; exit 7"];
        let args = [&["run", "debian", "--timeout", "600"], *options, &command].concat();
        let (code, stdout, stderr) = output(&mut diglot(&args));
        assert_eq!((code, stdout.as_str()), (Some(7), "x86_64\n79\n"), "{engine}: {stderr}");
    }
}

#[test]
fn the_kernels_own_messages_are_seen_and_awaited() {
    if !apt() {
        println!("skipped: no apt-get to fetch Debian's kernel with");
        return;
    }
    let directory = tempfile::tempdir().expect("directory");
    let log = directory.path().join("log");
    let serial = format!("file:{}", text(&log));
    let mut args = vec!["run", "debian", "--serial", &serial, "--timeout", "600"];
    args.extend(["--append", "ignore_loglevel", "--until", "Freeing unused kernel image"]);
    let (code, stdout, stderr) = output(&mut diglot(&args));
    assert_eq!((code, stdout.as_str()), (Some(0), ""), "{stderr}");
    let log = std::fs::read_to_string(log).expect("the log");
    for part in ["Linux version 6.", "Memory: ", "clocksource: "] {
        assert!(log.contains(part), "{part}: {log}");
    }
}

/// A kernel that panics says why, and the exit code tells of the crash.
#[test]
fn a_kernel_panic_is_a_crash() {
    if !apt() {
        println!("skipped: no apt-get to fetch Debian's kernel with");
        return;
    }
    let (code, _, stderr) = output(&mut diglot(&[
        "run",
        "debian",
        "--timeout",
        "600",
        "--append",
        "init=/none rdinit=/none",
        "--",
        "true",
    ]));
    assert_eq!(code, Some(255), "{stderr}");
    assert!(stderr.contains("the guest crashed: Kernel panic"), "{stderr}");
}

/// What is exported boots by --kernel and --initrd, to the shell.
#[test]
fn an_exported_guest_boots_as_any_other() {
    if !apt() {
        println!("skipped: no apt-get to fetch Debian's kernel with");
        return;
    }
    let directory = tempfile::tempdir().expect("directory");
    let exported = directory.path().join("new/guest");
    let (code, stdout, stderr) = output(&mut diglot(&["run", "debian", "--export", text(&exported)]));
    assert_eq!((code, stdout.as_str()), (Some(0), ""), "{stderr}");
    let (kernel, initrd) = (exported.join("vmlinuz"), exported.join("initrd"));
    let mut args = vec!["run", "--kernel", text(&kernel), "--initrd", text(&initrd), "--append", "console=ttyS0 quiet"];
    args.extend(["--until", "'exit' powers off.", "--timeout", "600"]);
    let (code, stdout, stderr) = output(&mut diglot(&args));
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stdout.contains("Debian kernel 6."), "{stdout}");
}
