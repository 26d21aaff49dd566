//! Recognizes a Linux kernel's panic in its console output.
//!
//! The kernel prints a line that begins with `Kernel panic - not syncing`, and once it has given up for good one that
//! begins with `---[ end Kernel panic - not syncing`. With `panic=` on its command line it resets the machine instead
//! of printing the second. Both come after an optional time stamp in brackets. A program's output that merely contains
//! the words is not taken for a panic.

const PANIC: &[u8] = b"Kernel panic - not syncing";
const END: &[u8] = b"---[ end Kernel panic - not syncing";
/// Longer lines are looked at up to here.
const LINE_MAX: usize = 256;

/// Watches console output line by line.
#[derive(Debug, Default)]
pub struct PanicWatch {
    line: Vec<u8>,
}

/// What a line said.
#[derive(Debug, PartialEq, Eq)]
pub enum Panic {
    /// The kernel panics, for this reason.
    Begun(String),
    /// It has stopped for good.
    Ended,
}

impl PanicWatch {
    /// Takes the next byte of output.
    pub fn feed(&mut self, byte: u8) -> Option<Panic> {
        if byte != b'\n' {
            if self.line.len() < LINE_MAX {
                self.line.push(byte);
            }
            return None;
        }
        let line = std::mem::take(&mut self.line);
        let text = without_time(&line);
        if text.starts_with(END) {
            Some(Panic::Ended)
        } else if text.starts_with(PANIC) {
            // The reason ends up on the user's terminal, the guest's control characters do not.
            Some(Panic::Begun(String::from_utf8_lossy(text).chars().filter(|c| !c.is_control()).collect()))
        } else {
            None
        }
    }
}

/// The line behind `[    1.234567] `, if it begins so.
fn without_time(line: &[u8]) -> &[u8] {
    let behind = || {
        let rest = line.strip_prefix(b"[")?;
        let end = rest.iter().position(|b| !matches!(b, b'0'..=b'9' | b'.' | b' '))?;
        rest.get(end..)?.strip_prefix(b"] ")
    };
    behind().unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_are_told_from_talk_about_them() {
        let begun = |reason: &str| vec![Panic::Begun(reason.into())];
        let cases = [
            ("Kernel panic - not syncing: VFS\r\n", begun("Kernel panic - not syncing: VFS")),
            ("x\n[    1.250000] Kernel panic - not syncing: a\x1b[2J\n", begun("Kernel panic - not syncing: a[2J")),
            ("[    2.5] ---[ end Kernel panic - not syncing: VFS ]---\r\n", vec![Panic::Ended]),
            ("echo Kernel panic - not syncing\n", vec![]),
            ("[x] Kernel panic - not syncing\n", vec![]),
            ("Kernel panic - not syncing: the line goes on", vec![]),
            ("[\n[ \n[1\n[1]\n\n", vec![]),
        ];
        for (output, expected) in cases {
            let mut watch = PanicWatch::default();
            let seen: Vec<Panic> = output.bytes().filter_map(|b| watch.feed(b)).collect();
            assert_eq!(seen, expected, "{output:?}");
        }
    }
}
