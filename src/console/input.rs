//! Reads standard input for the guest, in a thread that lives as long as the process.

use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use diglot_runtime::Controller;

use super::escape::{Action, EscapeKeys, HELP};
use crate::terminal;

/// How often a process in the background looks whether it is in the foreground now.
const BACKGROUND_POLL: Duration = Duration::from_millis(200);
/// A pipe is fed to the guest in pieces this big, one each [`PIPE_PERIOD`]: about the speed of a real serial line. A
/// guest that doesn't read then can't make Diglot hold whatever the pipe delivers, and a guest's line discipline, which
/// drops what is too fast for it, can follow.
const PIPE_PIECE: usize = 256;
const PIPE_PERIOD: Duration = Duration::from_millis(20);
/// Keystrokes and pastes that wait for a guest which doesn't read; more are dropped, as the escape keys must work on.
const TERMINAL_QUEUE: usize = 4096;
/// What a terminal sends for "no more input".
const CTRL_D: u8 = 0x04;

/// Whether the guest is ready for input. Clones share the state.
#[derive(Clone, Debug)]
pub struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    /// A gate that is open or closed.
    pub fn new(open: bool) -> Gate {
        Gate(Arc::new((Mutex::new(open), Condvar::new())))
    }

    /// Lets input through from now on.
    pub fn open(&self) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.1.notify_all();
    }

    fn wait(&self) {
        let mut open = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        while !*open {
            open = self.0.1.wait(open).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// What kind of input this is, and how its end is told to the guest.
#[derive(Debug)]
pub enum Source {
    /// A terminal, with escape keys.
    Terminal,
    /// A pipe or file, passed on once the gate is open.
    Pipe {
        /// When to begin.
        gate: Gate,
        /// Whether the guest is sent Ctrl-D at the end.
        end_of_file: bool,
    },
}

impl Source {
    /// What standard input is; `gate` and `end_of_file` are for a pipe.
    pub fn of_stdin(gate: Gate, end_of_file: bool) -> Source {
        if io::stdin().is_terminal() { Source::Terminal } else { Source::Pipe { gate, end_of_file } }
    }
}

/// Starts the thread. `quit` is called when the user asks to end the run.
pub fn start(source: Source, controller: Controller, quit: impl Fn() + Send + 'static) -> io::Result<()> {
    // Unbuffered: what is in a buffer, `poll` would not see.
    let stdin = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let run = move || match source {
        Source::Terminal => read_terminal(stdin, controller, quit),
        Source::Pipe { gate, end_of_file } => {
            gate.wait();
            read_pipe(stdin, &controller);
            if end_of_file {
                // In the middle of a line the first only hands over what there is of it.
                controller.input(&[CTRL_D, CTRL_D]);
            }
        }
    };
    thread::Builder::new().name("serial input".into()).spawn(run).map(drop)
}

fn read_terminal(mut stdin: File, controller: Controller, quit: impl Fn()) {
    // The controller waits for the guest; this thread must not.
    let (queue, queued) = mpsc::sync_channel::<Vec<u8>>(TERMINAL_QUEUE);
    let feed = move || queued.iter().for_each(|input| controller.input(&input));
    if thread::Builder::new().name("serial feed".into()).spawn(feed).is_err() {
        return;
    }
    let mut keys = EscapeKeys::default();
    let mut buffer = [0; 256];
    loop {
        // In the background a read would stop the process.
        if !terminal::acquire() {
            thread::sleep(BACKGROUND_POLL);
            continue;
        }
        if !readable(&stdin, BACKGROUND_POLL) {
            continue;
        }
        if !terminal::acquire() {
            continue;
        }
        let Some(bytes) = read(&mut stdin, &mut buffer) else { return };
        let mut input = Vec::with_capacity(bytes.len());
        for &byte in bytes {
            match keys.feed(byte) {
                Action::Send(byte) => input.push(byte),
                Action::Quit => return quit(),
                Action::Help => HELP.lines().for_each(terminal::say),
                Action::Nothing => {}
            }
        }
        let _ = queue.try_send(input);
    }
}

fn read_pipe(mut stdin: File, controller: &Controller) {
    let mut buffer = [0; PIPE_PIECE];
    while let Some(bytes) = read(&mut stdin, &mut buffer) {
        controller.input(bytes);
        thread::sleep(PIPE_PERIOD);
    }
}

/// The next bytes; `None` at the end, of which an error is a form.
fn read<'a>(stdin: &mut File, buffer: &'a mut [u8]) -> Option<&'a [u8]> {
    loop {
        match stdin.read(buffer) {
            Ok(0) => return None,
            Ok(count) => return buffer.get(..count),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => thread::sleep(PIPE_PERIOD),
            Err(_) => return None,
        }
    }
}

/// Waits for input. Also true when the terminal is gone, which the read then tells.
fn readable(stdin: &File, timeout: Duration) -> bool {
    let mut poll = libc::pollfd { fd: stdin.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let timeout = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: one valid pollfd, as the count says.
    unsafe { libc::poll(&mut poll, 1, timeout) > 0 }
}
