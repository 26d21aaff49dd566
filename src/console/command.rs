//! A command's own output and exit code, cut out of what a guest prints.
//!
//! The guest prints a marker before it starts the command and another behind it, followed by the exit code and the end
//! of the line. Markers hold a number made anew for each run, so that no output can be mistaken for them. What is
//! printed outside of them (the kernel, the guest's own start) is dropped.

use std::hash::{BuildHasher, Hasher, RandomState};

use super::matcher::Matcher;

/// Longest exit code text that is believed; the rest of the line is dropped.
const CODE_MAX: usize = 8;

/// The two markers of one run.
#[derive(Clone, Debug)]
pub struct Markers {
    /// Printed, with a line end, before the command's output.
    pub begin: String,
    /// Printed behind the command's output, before a blank, the exit code and a line end.
    pub end: String,
}

impl Markers {
    /// Markers nobody can know beforehand.
    pub fn new() -> Markers {
        let nonce = RandomState::new().build_hasher().finish();
        Markers { begin: format!("<diglot {nonce:016x} begin>"), end: format!("<diglot {nonce:016x} end>") }
    }
}

/// What a byte of the guest's output led to.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// The command starts.
    Begun,
    /// The command is over, with this exit code.
    Ended(u8),
}

#[derive(Debug)]
enum Phase {
    Before(Matcher),
    /// Behind the first marker, in the rest of its line.
    Line,
    Inside,
    Code(Vec<u8>),
    Over,
}

/// Cuts a command's output out of the guest's.
#[derive(Debug)]
pub struct CommandFilter {
    phase: Phase,
    end: Matcher,
}

impl CommandFilter {
    /// Expects `markers` in the output.
    pub fn new(markers: &Markers) -> CommandFilter {
        CommandFilter {
            phase: Phase::Before(Matcher::new(markers.begin.as_bytes())),
            end: Matcher::new(markers.end.as_bytes()),
        }
    }

    /// Takes the next byte and appends what is the command's to `out`.
    pub fn feed(&mut self, byte: u8, out: &mut Vec<u8>) -> Option<Progress> {
        match &mut self.phase {
            Phase::Before(begin) => {
                if begin.feed(byte) {
                    self.phase = Phase::Line;
                }
            }
            Phase::Line => {
                if byte == b'\n' {
                    self.phase = Phase::Inside;
                    return Some(Progress::Begun);
                }
            }
            Phase::Inside => {
                // Held back until now, and the new byte; what may still become a marker is held back again.
                let mut held = self.end.partial().to_vec();
                held.push(byte);
                if self.end.feed(byte) {
                    self.phase = Phase::Code(Vec::new());
                } else {
                    let certain = held.len() - self.end.partial().len();
                    out.extend_from_slice(&held[..certain]);
                }
            }
            Phase::Code(text) if byte == b'\n' => {
                let code = std::str::from_utf8(text).ok().and_then(|text| text.trim().parse().ok());
                self.phase = Phase::Over;
                // A code that can't be read means that something else wrote over the console.
                return Some(Progress::Ended(code.unwrap_or(crate::args::exit::CRASHED)));
            }
            Phase::Code(text) => {
                if text.len() < CODE_MAX {
                    text.push(byte);
                }
            }
            Phase::Over => {}
        }
        None
    }

    /// What is held back: the beginning of a marker, or the command's output if nothing more comes.
    pub fn held(&self) -> &[u8] {
        if matches!(self.phase, Phase::Inside) { self.end.partial() } else { &[] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(guest: &str) -> (String, Vec<Progress>) {
        let markers = Markers { begin: "<b>".into(), end: "<<e>".into() };
        let mut filter = CommandFilter::new(&markers);
        let mut out = Vec::new();
        let progress = guest.bytes().filter_map(|b| filter.feed(b, &mut out)).collect();
        out.extend_from_slice(filter.held());
        (String::from_utf8(out).expect("text"), progress)
    }

    #[test]
    fn only_the_commands_output_passes() {
        use Progress::{Begun, Ended};
        let cases = [
            ("boot\r\n<b>\r\nx86_64\n<<e> 0\r\nreboot: x", "x86_64\n", vec![Begun, Ended(0)]),
            ("<b>\n<<e> 255\n", "", vec![Begun, Ended(255)]),
            ("<b>\nno newline<<e> 3\n", "no newline", vec![Begun, Ended(3)]),
            ("<b>\n<b>\n<<<e> 1\n", "<b>\n<", vec![Begun, Ended(1)]),
            ("<b>\n<<<x<e><<e> 1\n", "<<<x<e>", vec![Begun, Ended(1)]),
            ("<b>\r\r\n\r\n<<e> 1\n", "\r\n", vec![Begun, Ended(1)]),
            ("<b>\ndied <<", "died <<", vec![Begun]),
            ("<b>\n<<e> 256\n", "", vec![Begun, Ended(255)]),
            ("<b>\n<<e> garbage that is long\n", "", vec![Begun, Ended(255)]),
            ("<<e> 0\n no start", "", vec![]),
        ];
        for (guest, output, progress) in cases {
            assert_eq!(filter(guest), (output.to_owned(), progress), "{guest:?}");
        }
    }

    #[test]
    fn markers_differ_from_run_to_run() {
        assert_ne!(Markers::new().begin, Markers::new().begin);
    }
}
