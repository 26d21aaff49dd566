//! The host terminal: raw while a guest owns it, and as it was on every way out.
//!
//! Only the terminal on standard input is ever touched, and only while Diglot is in its foreground process group: a
//! process in the background that changed the modes would be stopped by the system, or pull them away from under the
//! shell.

use std::io::{self, IsTerminal, Write};
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Modes found at the start. Written once and read without a lock, so that a signal handler may read them.
static SAVED: OnceLock<libc::termios> = OnceLock::new();
/// The terminal is in raw mode now, by us.
static RAW: AtomicBool = AtomicBool::new(false);
/// Between [`RawMode::new`] and its drop.
static WANTED: AtomicBool = AtomicBool::new(false);
/// Serializes the threads that change modes. Signal handlers and the panic hook do without.
static CHANGE: Mutex<()> = Mutex::new(());

/// A guest owns the terminal until this is dropped.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Gives the terminal on standard input to the guest; `None` if there is none. In the background the modes are
    /// changed later, by the first [`acquire`] in the foreground.
    pub fn new() -> Option<RawMode> {
        if !io::stdin().is_terminal() {
            return None;
        }
        let saved = modes()?;
        SAVED.get_or_init(|| saved);
        WANTED.store(true, Ordering::SeqCst);
        acquire();
        Some(RawMode(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        let _change = CHANGE.lock().unwrap_or_else(PoisonError::into_inner);
        restore();
    }
}

/// Makes the terminal raw if the guest owns it and Diglot is in the foreground. True if input may be read.
pub fn acquire() -> bool {
    let _change = CHANGE.lock().unwrap_or_else(PoisonError::into_inner);
    if !foreground() {
        return false;
    }
    if WANTED.load(Ordering::SeqCst)
        && !RAW.load(Ordering::SeqCst)
        && let Some(saved) = SAVED.get()
    {
        let mut raw = *saved;
        // SAFETY: `raw` is a valid termios, which the call changes in place.
        unsafe { libc::cfmakeraw(&mut raw) };
        // Set first: a signal between the two lines then restores once too often, not once too seldom.
        RAW.store(true, Ordering::SeqCst);
        set_modes(&raw);
    }
    true
}

/// Puts the modes back before Diglot is stopped; [`acquire`] makes the terminal raw again when it runs on.
pub fn suspend() {
    let _change = CHANGE.lock().unwrap_or_else(PoisonError::into_inner);
    put_back();
}

/// Takes note that someone else may have set the modes while Diglot was stopped.
pub fn resumed() {
    let change = CHANGE.lock().unwrap_or_else(PoisonError::into_inner);
    RAW.store(false, Ordering::SeqCst);
    drop(change);
    acquire();
}

/// Puts the modes back for good. Async-signal-safe: atomics, `tcgetpgrp`, `getpgrp` and `tcsetattr`.
pub fn restore() {
    WANTED.store(false, Ordering::SeqCst);
    put_back();
}

/// Restores the terminal before a panic's message is printed, unless the run goes on after it.
pub fn restore_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !diglot_runtime::survives_panics(std::thread::current().name()) {
            restore();
        }
        print(info);
    }));
}

/// Rows and columns, if standard input is a terminal that knows them.
pub fn size() -> Option<(u16, u16)> {
    let mut size = MaybeUninit::<libc::winsize>::zeroed();
    // SAFETY: TIOCGWINSZ writes one winsize, for which all zeroes is a valid value too.
    let size = unsafe {
        (libc::ioctl(libc::STDIN_FILENO, libc::TIOCGWINSZ, size.as_mut_ptr()) == 0).then(|| size.assume_init())
    }?;
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

/// Prints one line of Diglot's own to standard error, whatever mode the terminal is in.
pub fn say(text: &str) {
    let _ = writeln!(Stderr, "diglot: {text}");
}

/// Standard error, with line ends a raw terminal understands. A reader that went away is no error.
#[derive(Clone, Copy, Debug)]
pub struct Stderr;

impl Write for Stderr {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        let mut stderr = io::stderr().lock();
        if RAW.load(Ordering::SeqCst) {
            let mut lines = text.split(|&b| b == b'\n');
            let first = lines.next().unwrap_or_default();
            let raw = lines.fold(first.to_vec(), |mut raw, line| {
                raw.extend_from_slice(b"\r\n");
                raw.extend_from_slice(line);
                raw
            });
            let _ = stderr.write_all(&raw);
        } else {
            let _ = stderr.write_all(text);
        }
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn put_back() {
    if RAW.swap(false, Ordering::SeqCst)
        && foreground()
        && let Some(saved) = SAVED.get()
    {
        set_modes(saved);
    }
}

/// True if standard input is our controlling terminal and we are in its foreground, or it is a terminal of nobody's.
fn foreground() -> bool {
    // SAFETY: both calls only read kernel state.
    unsafe {
        let group = libc::tcgetpgrp(libc::STDIN_FILENO);
        group == -1 || group == libc::getpgrp()
    }
}

fn modes() -> Option<libc::termios> {
    let mut modes = MaybeUninit::<libc::termios>::uninit();
    // SAFETY: tcgetattr fills the whole structure when it returns 0, and only then is it read.
    unsafe { (libc::tcgetattr(libc::STDIN_FILENO, modes.as_mut_ptr()) == 0).then(|| modes.assume_init()) }
}

/// Now, not when output has drained: a terminal held by Ctrl-S would keep us for ever.
fn set_modes(modes: &libc::termios) {
    // SAFETY: `modes` is a valid termios that outlives the call.
    unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, modes) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};

    fn local_modes(terminal: &OwnedFd) -> libc::tcflag_t {
        let mut modes = MaybeUninit::<libc::termios>::zeroed();
        // SAFETY: tcgetattr fills the structure, for which all zeroes is a valid value too.
        unsafe {
            assert_eq!(libc::tcgetattr(terminal.as_raw_fd(), modes.as_mut_ptr()), 0);
            modes.assume_init().c_lflag
        }
    }

    /// Panics with the terminal raw and nothing but the hook to put it back.
    #[test]
    #[ignore = "started by the test below, in a process with a terminal"]
    fn panics_with_a_raw_terminal() {
        restore_on_panic();
        std::mem::forget(RawMode::new());
        let raw = modes().is_some_and(|m| m.c_lflag & (libc::ICANON | libc::ECHO) == 0);
        println!("raw: {raw}");
        panic!("as the test wants");
    }

    #[test]
    fn a_panic_puts_the_terminal_back() {
        let (mut master, mut terminal) = (0, 0);
        let (name, modes, size) = (std::ptr::null_mut(), std::ptr::null(), std::ptr::null());
        // SAFETY: the two descriptors are written on success only, and are nobody else's.
        let (_master, terminal) = unsafe {
            assert_eq!(libc::openpty(&mut master, &mut terminal, name, modes, size), 0);
            (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(terminal))
        };
        let before = local_modes(&terminal);
        assert_ne!(before & libc::ECHO, 0);
        // Where this program is of another kind than the host, the same runner starts it (`tests/support/`).
        let runner = std::env::var("DIGLOT_TEST_RUNNER").unwrap_or_default();
        let program = std::env::current_exe().expect("this program").into_os_string();
        let mut words = runner.split_whitespace().map(OsString::from).chain([program]);
        let mut command = Command::new(words.next().expect("the program at least"));
        command.args(words);
        command.args(["--exact", "terminal::tests::panics_with_a_raw_terminal", "--ignored", "--nocapture"]);
        command.stdin(Stdio::from(terminal.try_clone().expect("a descriptor")));
        // SAFETY: the two calls are async-signal-safe, as everything between fork and exec has to be.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                libc::ioctl(libc::STDIN_FILENO, libc::TIOCSCTTY, 0);
                Ok(())
            })
        };
        let output = command.output().expect("the test program");
        let stdout = String::from_utf8_lossy(&output.stdout);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(stdout.contains("raw: true"), "{stdout} {stderr}");
        assert!(stderr.contains("as the test wants") && !output.status.success(), "{stderr}");
        assert_eq!(local_modes(&terminal), before);
    }
}
