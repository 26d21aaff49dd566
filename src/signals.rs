//! Signals from outside: each ends the run in an orderly way, whatever Diglot is doing.
//!
//! A handler writes the signal's number to a socket and a thread does the rest, so that what follows is ordinary code.
//! Signals that are being ignored when Diglot starts (`nohup`, background jobs of a plain shell) stay ignored.

use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::IntoRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;

use crate::args::exit;
use crate::terminal;

/// Signals that ask Diglot to end.
const STOP: [libc::c_int; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];
/// Signals that kill a process on the spot; the terminal is restored first.
const FATAL: [libc::c_int; 5] = [libc::SIGABRT, libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE];

/// The handler's end of the socket.
static NOTIFY: AtomicI32 = AtomicI32::new(-1);
/// The signal that asked Diglot to end, or 0.
static RECEIVED: AtomicI32 = AtomicI32::new(0);
/// What a fatal signal did before us, in the order of [`FATAL`].
static PREVIOUS: OnceLock<Vec<libc::sigaction>> = OnceLock::new();

type StopAction = Box<dyn FnMut(i32) + Send>;
/// How to end what Diglot is doing now.
static ON_STOP: Mutex<Option<StopAction>> = Mutex::new(None);

/// Installs the handlers. Call once, before the machine exists: handlers the engine installs for its own faults come
/// after these and hand on what they don't know.
pub fn install() -> io::Result<()> {
    let (reader, writer) = UnixStream::pair()?;
    writer.set_nonblocking(true)?;
    NOTIFY.store(writer.into_raw_fd(), Ordering::SeqCst);
    thread::Builder::new().name("signals".into()).spawn(move || watch(reader))?;

    let previous = FATAL.iter().map(|&signal| current(signal)).collect::<io::Result<Vec<_>>>()?;
    PREVIOUS.get_or_init(|| previous);
    for signal in FATAL {
        set(signal, on_fatal as *const () as usize, libc::SA_SIGINFO | libc::SA_ONSTACK)?;
    }
    for signal in STOP.into_iter().chain([libc::SIGTSTP]) {
        if current(signal)?.sa_sigaction != libc::SIG_IGN {
            set(signal, on_signal as *const () as usize, libc::SA_RESTART | libc::SA_ONSTACK)?;
        }
    }
    set(libc::SIGCONT, on_signal as *const () as usize, libc::SA_RESTART | libc::SA_ONSTACK)
}

/// Says how to end what Diglot does from now on. If a signal has come already, `action` is called at once.
pub fn on_stop(mut action: impl FnMut(i32) + Send + 'static) {
    let mut slot = ON_STOP.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(signal) = received() {
        action(signal);
    }
    *slot = Some(Box::new(action));
}

/// The signal that asked Diglot to end, if one has come.
pub fn received() -> Option<i32> {
    Some(RECEIVED.load(Ordering::SeqCst)).filter(|&signal| signal != 0)
}

/// Exit code of a run ended by `signal`.
pub fn exit_code(signal: i32) -> u8 {
    u8::try_from(signal).map_or(exit::FAILED, |signal| exit::SIGNAL_BASE.saturating_add(signal))
}

/// The signal's name.
pub fn name(signal: i32) -> String {
    match signal {
        libc::SIGINT => "SIGINT".into(),
        libc::SIGTERM => "SIGTERM".into(),
        libc::SIGHUP => "SIGHUP".into(),
        libc::SIGQUIT => "SIGQUIT".into(),
        libc::SIGPIPE => "SIGPIPE".into(),
        other => format!("signal {other}"),
    }
}

fn watch(mut reader: UnixStream) {
    let mut number = [0];
    while reader.read_exact(&mut number).is_ok() {
        match i32::from(number[0]) {
            libc::SIGTSTP => {
                terminal::suspend();
                // SAFETY: stops this process; nothing of Rust's is involved.
                unsafe { libc::kill(libc::getpid(), libc::SIGSTOP) };
            }
            libc::SIGCONT => terminal::resumed(),
            signal => stop(signal),
        }
    }
}

fn stop(signal: i32) {
    // Whoever asks twice has waited long enough for the orderly way.
    if RECEIVED.swap(signal, Ordering::SeqCst) != 0 {
        terminal::restore();
        std::process::exit(exit_code(signal).into());
    }
    let mut action = ON_STOP.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(action) = action.as_mut() {
        action(signal);
    } else {
        terminal::restore();
        std::process::exit(exit_code(signal).into());
    }
}

extern "C" fn on_signal(signal: libc::c_int) {
    let number = signal as u8;
    // SAFETY: `write` is async-signal-safe, reads one byte of a live local, and errno is put back as the interrupted
    // code may be about to look at it. A full socket loses a signal that was sent many times already.
    unsafe {
        let errno = libc::__errno_location();
        let saved = *errno;
        libc::write(NOTIFY.load(Ordering::SeqCst), (&raw const number).cast(), 1);
        *errno = saved;
    }
}

extern "C" fn on_fatal(signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    terminal::restore();
    let previous = FATAL.iter().position(|&s| s == signal).and_then(|at| PREVIOUS.get()?.get(at));
    // SAFETY: async-signal-safe calls only; `info` is the kernel's, valid for the time of the handler, and `previous`
    // was filled by sigaction. A fault happens again when we return, now under the previous action. A signal that
    // somebody sent does not, so it is raised again: it is blocked until we return.
    unsafe {
        let sent = (*info).si_code <= 0;
        match previous {
            Some(action) if !sent => {
                libc::sigaction(signal, action, std::ptr::null_mut());
            }
            _ => {
                libc::signal(signal, libc::SIG_DFL);
                libc::raise(signal);
            }
        }
    }
}

fn current(signal: libc::c_int) -> io::Result<libc::sigaction> {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: with no new action the call only fills `action`, which is read only when it succeeded.
    unsafe {
        match libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) {
            0 => Ok(action.assume_init()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn set(signal: libc::c_int, handler: usize, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: all zeroes is a valid sigaction (an empty mask); `handler` is one of the two functions above, whose
    // signature fits the flags, and both call nothing but async-signal-safe functions.
    unsafe {
        let mut action = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
        action.sa_sigaction = handler;
        action.sa_flags = flags;
        match libc::sigaction(signal, &action, std::ptr::null_mut()) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}
