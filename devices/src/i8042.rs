//! The i8042 keyboard controller with a keyboard that answers, and no auxiliary device: what firmware and kernels
//! probe, and the reset line (ports 60h and 64h).

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::bus::StateError;

const STATUS_OUTPUT_FULL: u8 = 1;
const STATUS_SYSTEM: u8 = 4;
const STATUS_COMMAND: u8 = 8;
const CONFIG_IRQ1: u8 = 1;
const CONFIG_DISABLED: u8 = 0x10;
/// Bytes that the output buffer queues; a real controller holds fewer.
const BUFFER: usize = 16;
const ACK: u8 = 0xfa;

/// The controller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042 {
    config: u8,
    output: VecDeque<u8>,
    /// Controller command that waits for its data byte.
    command: Option<u8>,
    /// Keyboard command that waits for its parameter.
    keyboard: Option<u8>,
    last_was_command: bool,
    output_port: u8,
    reset: bool,
}

impl I8042 {
    /// After power-on and the firmware's self test.
    pub fn new() -> I8042 {
        I8042 {
            config: CONFIG_IRQ1 | STATUS_SYSTEM | 0x40,
            output: VecDeque::new(),
            command: None,
            keyboard: None,
            last_was_command: false,
            output_port: 0xcf,
            reset: false,
        }
    }

    fn put(&mut self, v: u8) {
        if self.output.len() < BUFFER {
            self.output.push_back(v);
        }
    }

    /// Reads port 60h or 64h.
    pub fn read(&mut self, port: u16) -> u8 {
        if port & 4 != 0 {
            let full = if self.output.is_empty() { 0 } else { STATUS_OUTPUT_FULL };
            let command = if self.last_was_command { STATUS_COMMAND } else { 0 };
            // The keyboard is not locked.
            return full | command | STATUS_SYSTEM | 0x10;
        }
        self.output.pop_front().unwrap_or(0)
    }

    /// Writes port 60h or 64h.
    pub fn write(&mut self, port: u16, v: u8) {
        self.last_was_command = port & 4 != 0;
        if self.last_was_command { self.controller(v) } else { self.data(v) }
    }

    fn controller(&mut self, v: u8) {
        self.command = None;
        match v {
            0x20 => self.put(self.config),
            0xaa => self.put(0x55),
            0xab => self.put(0),
            0xad => self.config |= CONFIG_DISABLED,
            0xae => self.config &= !CONFIG_DISABLED,
            0xd0 => self.put(self.output_port),
            0x60 | 0xd1 | 0xd2 | 0xd3 | 0xd4 => self.command = Some(v),
            // Pulsing bit 0 of the output port low resets the CPU.
            0xf0..=0xff => self.reset |= v & 1 == 0,
            // A7h–A9h: there is no auxiliary port; the test is not answered.
            _ => {}
        }
    }

    fn data(&mut self, v: u8) {
        match self.command.take() {
            Some(0x60) => self.config = v,
            Some(0xd1) => {
                self.output_port = v;
                self.reset |= v & 1 == 0;
            }
            Some(0xd2) => self.put(v),
            Some(_) => {}
            None => self.keyboard_byte(v),
        }
    }

    fn keyboard_byte(&mut self, v: u8) {
        if self.keyboard.take().is_some() {
            self.put(ACK);
            return;
        }
        match v {
            0xed | 0xf0 | 0xf3 => {
                self.keyboard = Some(v);
                self.put(ACK);
            }
            0xee => self.put(0xee),
            0xf2 => [ACK, 0xab, 0x83].into_iter().for_each(|b| self.put(b)),
            0xf4..=0xf6 => self.put(ACK),
            0xff => [ACK, 0xaa].into_iter().for_each(|b| self.put(b)),
            // Resend: the keyboard does not know the command.
            _ => self.put(0xfe),
        }
    }

    /// Whether IRQ 1 is asserted.
    pub fn irq(&self) -> bool {
        !self.output.is_empty() && self.config & CONFIG_IRQ1 != 0
    }

    /// Takes the request to reset the machine.
    pub fn take_reset(&mut self) -> bool {
        std::mem::take(&mut self.reset)
    }

    /// Checks a restored state.
    pub fn validate(&self) -> Result<(), StateError> {
        if self.output.len() <= BUFFER { Ok(()) } else { Err(StateError::Invalid("keyboard controller")) }
    }
}

impl Default for I8042 {
    fn default() -> Self {
        I8042::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_are_answered() {
        let mut k = I8042::new();
        k.write(0x64, 0xaa);
        assert_eq!((k.read(0x64) & 1, k.read(0x60), k.read(0x64) & 1), (1, 0x55, 0));
        k.write(0x60, 0xf2);
        assert!(k.irq());
        assert_eq!([k.read(0x60), k.read(0x60), k.read(0x60)], [0xfa, 0xab, 0x83]);
        for (command, reset) in [(0xfe, true), (0xff, false), (0xad, false)] {
            k.write(0x64, command);
            assert_eq!(k.take_reset(), reset, "{command:#x}");
        }
    }
}
