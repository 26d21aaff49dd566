//! The guest's end of the output: what its bytes mean to Diglot before they are passed on.

use std::fmt;
use std::io::{self, Write};

use super::command::{CommandFilter, Markers, Progress};
use super::matcher::Matcher;
use super::output::Output;
use super::panic::{Panic, PanicWatch};

/// Something the output said.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// The text of `--until` was printed.
    Until,
    /// The kernel panics, for this reason.
    PanicBegun(String),
    /// The kernel has panicked and stopped.
    PanicEnded,
    /// The command starts.
    CommandBegun,
    /// The command is over, with this exit code.
    CommandEnded(u8),
}

/// Receives the serial port's bytes on the vCPU's thread.
pub struct SerialOut {
    output: Option<Output>,
    until: Option<Matcher>,
    command: Option<CommandFilter>,
    panic: PanicWatch,
    on_event: Box<dyn FnMut(Event) + Send>,
    /// What ends the run has been seen: the bytes behind it are accidental.
    over: bool,
}

impl fmt::Debug for SerialOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialOut").field("over", &self.over).finish_non_exhaustive()
    }
}

impl SerialOut {
    /// Passes output on to `output`, if there is one, and calls `on_event` for what it finds: `until`, and the output
    /// and end of a command between `markers`.
    pub fn new(
        output: Option<Output>,
        until: Option<&str>,
        markers: Option<&Markers>,
        on_event: impl FnMut(Event) + Send + 'static,
    ) -> SerialOut {
        SerialOut {
            output,
            until: until.map(|text| Matcher::new(text.as_bytes())),
            command: markers.map(CommandFilter::new),
            panic: PanicWatch::default(),
            on_event: Box::new(on_event),
            over: false,
        }
    }

    fn feed(&mut self, byte: u8, out: &mut Vec<u8>) {
        let progress = match &mut self.command {
            Some(filter) => filter.feed(byte, out),
            None => {
                out.push(byte);
                None
            }
        };
        match progress {
            Some(Progress::Begun) => (self.on_event)(Event::CommandBegun),
            Some(Progress::Ended(code)) => self.end(Event::CommandEnded(code)),
            None => {}
        }
        match self.panic.feed(byte) {
            Some(Panic::Begun(reason)) => (self.on_event)(Event::PanicBegun(reason)),
            Some(Panic::Ended) => self.end(Event::PanicEnded),
            None => {}
        }
        if self.until.as_mut().is_some_and(|until| until.feed(byte)) {
            self.end(Event::Until);
        }
    }

    fn end(&mut self, event: Event) {
        if !std::mem::replace(&mut self.over, true) {
            (self.on_event)(event);
        }
    }

    fn pass_on(&self, bytes: &[u8]) {
        let Some(output) = &self.output else { return };
        output.push(bytes);
        if let Some(filter) = &self.command {
            output.hold(filter.held());
        }
    }
}

impl Write for SerialOut {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut out = Vec::with_capacity(bytes.len());
        for &byte in bytes {
            if self.over {
                break;
            }
            self.feed(byte, &mut out);
        }
        self.pass_on(&out);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn events(until: Option<&str>, markers: Option<&Markers>, pieces: &[&str]) -> Vec<Event> {
        let (sender, receiver) = mpsc::channel();
        let mut serial = SerialOut::new(None, until, markers, move |event| sender.send(event).expect("receiver"));
        for piece in pieces {
            serial.write_all(piece.as_bytes()).expect("infallible");
        }
        drop(serial);
        receiver.iter().collect()
    }

    #[test]
    fn until_is_found_across_pieces_and_once() {
        assert_eq!(events(Some("login: "), None, &["deb", "ian log", "in", ": login: "]), [Event::Until]);
        assert_eq!(events(Some("login: "), None, &["log", "out"]), []);
    }

    #[test]
    fn panics_and_commands_are_reported() {
        let panic = "Kernel panic - not syncing: x";
        let expected = [Event::PanicBegun(panic.into()), Event::PanicEnded];
        assert_eq!(events(None, None, &[panic, "\r\n---[ end ", panic, " ]---\r\n", "more"]), expected);
        let markers = Markers::new();
        let guest = format!("boot\n{}\nhello\n{} 7\n", markers.begin, markers.end);
        assert_eq!(events(None, Some(&markers), &[&guest]), [Event::CommandBegun, Event::CommandEnded(7)]);
    }
}
