//! The terminal, signals and standard streams around a running guest: whatever ends it, they are left as they were.

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use support::*;

/// A terminal that the test holds the other end of.
struct Pty {
    /// The test's end.
    master: File,
    /// The end that is a terminal.
    terminal: OwnedFd,
}

impl Pty {
    fn open() -> Pty {
        let (mut master, mut terminal) = (0, 0);
        let (name, modes, size) = (std::ptr::null_mut(), std::ptr::null(), std::ptr::null());
        // SAFETY: the two descriptors are written on success only, and are nobody else's.
        unsafe {
            assert_eq!(libc::openpty(&mut master, &mut terminal, name, modes, size), 0, "a pty");
            Pty { master: File::from_raw_fd(master), terminal: OwnedFd::from_raw_fd(terminal) }
        }
    }

    /// Its modes as bytes that can be compared, and whether it is raw: no line editing, no echo, no signals by key.
    fn modes(&self) -> (Vec<libc::tcflag_t>, bool) {
        let mut modes = MaybeUninit::<libc::termios>::zeroed();
        // SAFETY: tcgetattr fills the structure, for which all zeroes is a valid value too.
        let modes = unsafe {
            assert_eq!(libc::tcgetattr(self.terminal.as_raw_fd(), modes.as_mut_ptr()), 0);
            modes.assume_init()
        };
        let raw = modes.c_lflag & (libc::ICANON | libc::ECHO | libc::ISIG) == 0;
        (vec![modes.c_iflag, modes.c_oflag, modes.c_cflag, modes.c_lflag], raw)
    }

    /// Starts a program of which this is the controlling terminal, and standard input and output.
    fn start(&self, command: &mut Command) -> Child {
        let end = || Stdio::from(self.terminal.try_clone().expect("a descriptor"));
        // SAFETY: the two calls are async-signal-safe, as everything between fork and exec has to be.
        unsafe {
            command.stdin(end()).stdout(end()).stderr(end()).pre_exec(|| {
                libc::setsid();
                libc::ioctl(0, libc::TIOCSCTTY, 0);
                Ok(())
            })
        };
        command.spawn().expect("diglot starts")
    }

    /// Reads what is printed until it contains `text`.
    fn expect(&mut self, text: &str) -> String {
        let mut seen = Vec::new();
        let mut buffer = [0; 256];
        loop {
            let n = self.master.read(&mut buffer).expect("more output");
            seen.extend(&buffer[..n]);
            let so_far = String::from_utf8_lossy(&seen);
            if so_far.contains(text) {
                return so_far.into_owned();
            }
        }
    }
}

/// A guest that says it is there and then waits for a key: `o` powers off, `t` ends in a triple fault.
fn waiting_guest(directory: &Path) -> PathBuf {
    use iced_x86::code_asm::*;
    guest(directory, "kernel", |a| {
        let (mut wait, mut off, mut crash) = (a.create_label(), a.create_label(), a.create_label());
        say(a, "ready")?;
        a.set_label(&mut wait)?;
        a.mov(edx, 0x3fd)?;
        a.in_(al, dx)?;
        a.test(al, 1)?;
        a.je(wait)?;
        a.mov(edx, 0x3f8)?;
        a.in_(al, dx)?;
        a.cmp(al, i32::from(b'o'))?;
        a.je(off)?;
        a.cmp(al, i32::from(b't'))?;
        a.je(crash)?;
        // Anything else comes back.
        a.out(dx, al)?;
        a.jmp(wait)?;
        a.set_label(&mut crash)?;
        a.ud2()?;
        a.set_label(&mut off)?;
        power_off(a)
    })
}

fn send(child: &Child, signal: libc::c_int) {
    // SAFETY: sends a signal to a process of ours that has not been waited for.
    assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, signal) }, 0);
}

#[test]
fn the_terminal_is_raw_only_while_the_guest_runs() {
    enum End {
        Keys(&'static [u8]),
        Signal(libc::c_int),
    }
    let ends = [
        ("Ctrl-A x", End::Keys(b"\x01x"), 0),
        ("power-off", End::Keys(b"o"), 0),
        ("triple fault", End::Keys(b"t"), 255),
        ("SIGINT", End::Signal(libc::SIGINT), 130),
        ("SIGTERM", End::Signal(libc::SIGTERM), 143),
        ("SIGHUP", End::Signal(libc::SIGHUP), 129),
    ];
    let directory = tempfile::tempdir().expect("directory");
    let kernel = waiting_guest(directory.path());
    for (name, end, code) in ends {
        let mut pty = Pty::open();
        let (before, raw) = pty.modes();
        assert!(!raw);
        let mut child = pty.start(&mut diglot(&["run", "--kernel", text(&kernel)]));
        pty.expect("ready");
        assert!(pty.modes().1, "{name}: raw while the guest runs");
        match end {
            End::Keys(keys) => pty.master.write_all(keys).expect("keys"),
            End::Signal(signal) => send(&child, signal),
        }
        assert_eq!(child.wait().expect("ends").code(), Some(code), "{name}");
        assert_eq!(pty.modes(), (before, false), "{name}: as before");
    }
}

/// A crash of Diglot's own: the signal's default action ends it, but only after the terminal is put back.
#[test]
fn a_crash_of_diglots_own_puts_the_terminal_back() {
    let directory = tempfile::tempdir().expect("directory");
    let kernel = waiting_guest(directory.path());
    for signal in [libc::SIGABRT, libc::SIGSEGV] {
        let mut pty = Pty::open();
        let (before, _) = pty.modes();
        let mut child = pty.start(&mut diglot(&["run", "--kernel", text(&kernel)]));
        pty.expect("ready");
        assert!(pty.modes().1);
        send(&child, signal);
        let status = child.wait().expect("ends");
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(signal), "{status}");
        assert_eq!(pty.modes(), (before, false), "signal {signal}");
    }
}

#[test]
fn escape_keys_help_and_send_themselves() {
    let directory = tempfile::tempdir().expect("directory");
    let kernel = waiting_guest(directory.path());
    let mut pty = Pty::open();
    let mut child = pty.start(&mut diglot(&["run", "--kernel", text(&kernel)]));
    pty.expect("ready");
    pty.master.write_all(b"\x01h").expect("keys");
    pty.expect("Ctrl-A x");
    // The guest sends back what it gets: Ctrl-A itself, and a letter.
    pty.master.write_all(b"\x01\x01k").expect("keys");
    pty.expect("\x01k");
    pty.master.write_all(b"\x01x").expect("keys");
    assert_eq!(child.wait().expect("ends").code(), Some(0));
}

#[test]
fn signals_end_a_run_and_leave_its_files_complete() {
    let directory = tempfile::tempdir().expect("directory");
    let kernel = waiting_guest(directory.path());
    for (signal, code, name) in
        [(libc::SIGINT, 130, "SIGINT"), (libc::SIGTERM, 143, "SIGTERM"), (libc::SIGHUP, 129, "SIGHUP")]
    {
        let stats = directory.path().join("stats.json");
        let mut child = diglot(&["run", "--kernel", text(&kernel), "--stats-json", text(&stats)])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("diglot starts");
        let mut ready = [0; 5];
        child.stdout.as_mut().expect("piped").read_exact(&mut ready).expect("output");
        send(&child, signal);
        let output = child.wait_with_output().expect("ends");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{stderr}");
        assert!(stderr.lines().last().is_some_and(|line| line.contains(name)), "{stderr}");
        let json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&stats).expect("statistics")).expect("complete JSON");
        assert!(json["seconds"].is_number());
        std::fs::remove_file(stats).expect("it is there");
        let left: Vec<_> = std::fs::read_dir(directory.path()).expect("directory").collect();
        assert_eq!(left.len(), 1, "only the kernel: {left:?}");
    }
}

/// A guest that prints for ever, and a reader that has seen enough.
#[test]
fn nobody_who_reads_ends_the_run_by_sigpipe() {
    let directory = tempfile::tempdir().expect("directory");
    let kernel = guest(directory.path(), "kernel", |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        say(a, "more ")?;
        a.jmp(again)
    });
    on_every_engine_until_closed(&["--kernel", text(&kernel)]);
}

fn on_every_engine_until_closed(args: &[&str]) {
    for (engine, options) in engines(Asks::Little) {
        let mut child = diglot(&[&["run"], options, args].concat())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("diglot starts");
        let mut some = [0; 10];
        child.stdout.take().expect("piped").read_exact(&mut some).expect("output");
        let output = child.wait_with_output().expect("ends");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), &some), (Some(141), b"more more "), "{engine}: {stderr}");
        assert!(stderr.contains("nobody reads"), "{engine}: {stderr}");
    }
}

/// Standard streams that are closed, not merely empty.
#[test]
fn closed_standard_streams_are_no_obstacle() {
    let directory = tempfile::tempdir().expect("directory");
    let kernel = guest(directory.path(), "kernel", |a| say(a, "bye\n").and_then(|()| power_off(a)));
    let program = words(PROGRAM).join("' '");
    for closed in ["<&-", "2>&-", "<&- 2>&-", ">&-", "<&- >&- 2>&-"] {
        let script = format!("exec '{program}' run --kernel '{}' {closed}", text(&kernel));
        let (code, stdout, stderr) = output(Command::new("sh").args(["-c", &script]).stdin(Stdio::null()));
        assert!(!stderr.contains("panicked"), "{closed}: {stderr}");
        // A guest whose output has nowhere to go is told so, or ends as it would have.
        let lost = closed.contains(" >&-") || closed.starts_with(">&-");
        let expected = if lost { matches!(code, Some(0 | 125 | 141)) } else { code == Some(0) };
        assert!(expected, "{closed}: {code:?} {stderr}");
        assert!(lost || stdout == "bye\n", "{closed}: {stdout}");
    }
}
