//! Keys that are Diglot's own on a terminal the guest owns: Ctrl-A and what follows it.

const CTRL_A: u8 = 0x01;

/// What the keys do, for the user.
pub const HELP: &str = "Ctrl-A x  quit\nCtrl-A h  this help\nCtrl-A Ctrl-A  send Ctrl-A to the guest";

/// What to do with a byte from the terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It is the guest's.
    Send(u8),
    /// End the run.
    Quit,
    /// Show [`HELP`].
    Help,
    /// Nothing: it began an escape, or continued one to no known key.
    Nothing,
}

/// The state between two bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct EscapeKeys {
    escaped: bool,
}

impl EscapeKeys {
    /// Takes the next byte.
    pub fn feed(&mut self, byte: u8) -> Action {
        if !std::mem::take(&mut self.escaped) {
            if byte != CTRL_A {
                return Action::Send(byte);
            }
            self.escaped = true;
            return Action::Nothing;
        }
        match byte {
            CTRL_A => Action::Send(CTRL_A),
            b'x' | b'X' => Action::Quit,
            b'h' | b'H' | b'?' => Action::Help,
            _ => Action::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys() {
        use Action::{Help, Nothing, Quit, Send};
        let cases: [(&[u8], &[Action]); 7] = [
            (b"ls\r", &[Send(b'l'), Send(b's'), Send(b'\r')]),
            (b"\x01x", &[Nothing, Quit]),
            (b"\x01h", &[Nothing, Help]),
            (b"\x01\x01x", &[Nothing, Send(1), Send(b'x')]),
            (b"\x01qx", &[Nothing, Nothing, Send(b'x')]),
            (b"\x01\x01\x01x", &[Nothing, Send(1), Nothing, Quit]),
            (b"\x03\xff\0", &[Send(3), Send(0xff), Send(0)]),
        ];
        for (bytes, actions) in cases {
            let mut keys = EscapeKeys::default();
            assert_eq!(bytes.iter().map(|&b| keys.feed(b)).collect::<Vec<_>>(), actions, "{bytes:?}");
        }
    }
}
