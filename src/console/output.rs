//! Writes the guest's output from a thread of its own, so that a slow reader delays the guest, and one that never
//! reads can't keep Diglot from ending.

use std::fmt;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// The guest waits while more than this is unwritten.
const LIMIT: usize = 1 << 20;
/// How long bytes may wait for more: serial ports deliver one at a time, and a write for each would cost more than the
/// guest's own work.
const GATHER: Duration = Duration::from_millis(2);
/// How long a reader is given to take what is left when the run is cut short.
const LINGER: Duration = Duration::from_secs(2);

/// A queue in front of a writer. Clones share it.
#[derive(Clone)]
pub struct Output {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// Something in [`State`] changed.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    pending: Vec<u8>,
    /// To be written at the end, unless it is taken back before.
    held: Vec<u8>,
    /// The last byte ever queued.
    last: Option<u8>,
    /// The guest is not to be kept waiting any more; what doesn't fit is dropped.
    released: bool,
    closing: bool,
    done: bool,
    error: Option<io::Error>,
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Output").finish_non_exhaustive()
    }
}

impl Output {
    /// Starts a thread that writes to `sink`. `on_error` is called there, once, when a write fails.
    pub fn new(
        mut sink: impl Write + Send + 'static,
        on_error: impl FnOnce(&io::Error) + Send + 'static,
    ) -> io::Result<Output> {
        let shared = Arc::new(Shared { state: Mutex::new(State::default()), changed: Condvar::new() });
        let thread_shared = Arc::clone(&shared);
        thread::Builder::new().name("serial output".into()).spawn(move || {
            let result = thread_shared.drain(&mut sink);
            if let Err(error) = &result {
                on_error(error);
            }
            let mut state = thread_shared.lock();
            state.error = result.err();
            state.done = true;
            thread_shared.changed.notify_all();
        })?;
        Ok(Output { shared })
    }

    /// Queues `bytes`. Waits while too much is queued, unless [`Output::release`] was called.
    pub fn push(&self, bytes: &[u8]) {
        let mut state = self.shared.lock();
        while state.pending.len() >= LIMIT {
            if state.released || state.done {
                return;
            }
            state = self.shared.wait(state);
        }
        let idle = state.pending.is_empty();
        state.pending.extend_from_slice(bytes);
        state.last = bytes.last().copied().or(state.last);
        if idle && !bytes.is_empty() {
            self.shared.changed.notify_all();
        }
    }

    /// Sets what is written behind all else if nothing more comes. It replaces what was held before.
    pub fn hold(&self, bytes: &[u8]) {
        let held = &mut self.shared.lock().held;
        held.clear();
        held.extend_from_slice(bytes);
    }

    /// Lets the guest go on without waiting for the reader from now on, because it is to be stopped.
    pub fn release(&self) {
        self.shared.lock().released = true;
        self.shared.changed.notify_all();
    }

    /// True if the output ends within a line.
    pub fn mid_line(&self) -> bool {
        self.shared.lock().last.is_some_and(|byte| byte != b'\n')
    }

    /// Writes what is left, and says what went wrong over all. After [`Output::release`], a reader that doesn't take
    /// it within 2 seconds is left.
    pub fn close(&self) -> io::Result<()> {
        let mut deadline = None;
        let mut state = self.shared.lock();
        let held = std::mem::take(&mut state.held);
        state.pending.extend(held);
        state.closing = true;
        self.shared.changed.notify_all();
        while !state.done {
            if !state.released {
                state = self.shared.wait(state);
                continue;
            }
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + LINGER);
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.error.take().map_or(Ok(()), Err)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    fn drain(&self, sink: &mut impl Write) -> io::Result<()> {
        loop {
            let mut state = self.lock();
            while state.pending.is_empty() {
                if state.closing {
                    return Ok(());
                }
                state = self.wait(state);
            }
            if !state.closing {
                drop(state);
                thread::sleep(GATHER);
                state = self.lock();
            }
            let bytes = std::mem::take(&mut state.pending);
            self.changed.notify_all();
            drop(state);
            write_all(sink, &bytes)?;
        }
    }
}

/// Like `write_all`, but a terminal that another program left in non-blocking mode is waited for.
fn write_all(sink: &mut impl Write, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match sink.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => thread::sleep(GATHER),
            Err(e) => return Err(e),
        }
    }
    sink.flush()
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Sends what is written to a channel; fails when nobody listens.
    struct Sink(mpsc::SyncSender<Vec<u8>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.send(bytes.to_vec()).map_err(|_| io::ErrorKind::BrokenPipe)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn everything_arrives_in_order() {
        let (sender, receiver) = mpsc::sync_channel(10_000);
        let output = Output::new(Sink(sender), |_| panic!("no error")).expect("thread");
        let sent: Vec<u8> = (0..50_000u32).map(|n| n as u8).collect();
        output.hold(b"lost");
        sent.chunks(7).for_each(|chunk| output.push(chunk));
        output.hold(b"held");
        output.close().expect("closed");
        drop(output);
        assert_eq!(receiver.iter().flatten().collect::<Vec<u8>>(), [&sent[..], b"held"].concat());
    }

    #[test]
    fn a_lost_reader_is_reported_once_and_stops_nobody() {
        let (sender, receiver) = mpsc::sync_channel(1);
        drop(receiver);
        let (error_sender, errors) = mpsc::channel();
        let output =
            Output::new(Sink(sender), move |e| error_sender.send(e.kind()).expect("receiver")).expect("thread");
        output.push(b"x");
        assert_eq!(errors.recv(), Ok(io::ErrorKind::BrokenPipe));
        (0..3).for_each(|_| output.push(&vec![0; LIMIT]));
        assert_eq!(output.close().expect_err("error").kind(), io::ErrorKind::BrokenPipe);
        assert!(errors.recv().is_err());
    }

    #[test]
    fn a_reader_that_does_not_read_holds_the_guest_until_release() {
        let (sender, _receiver) = mpsc::sync_channel(0);
        let output = Output::new(Sink(sender), |_| ()).expect("thread");
        let guest = output.clone();
        let (ended_sender, ended) = mpsc::channel();
        thread::spawn(move || {
            (0..4).for_each(|_| guest.push(&vec![0; LIMIT]));
            ended_sender.send(()).expect("receiver");
        });
        assert_eq!(ended.recv_timeout(Duration::from_millis(100)), Err(mpsc::RecvTimeoutError::Timeout));
        output.release();
        assert_eq!(ended.recv_timeout(Duration::from_secs(5)), Ok(()));
    }
}
