//! COM1: a 16550 by vm-superio, with its interrupt as a level and its state in our own form.

use std::convert::Infallible;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState as SuperioState};
use vm_superio::{Serial as Superio, Trigger};

use crate::bus::StateError;

/// First port of COM1.
pub const COM1: u16 = 0x3f8;
/// What the receive FIFO of a 16550A could hold is 16; vm-superio queues more.
const FIFO: usize = 64;

/// Remembers that the UART raised its interrupt.
#[derive(Clone, Default)]
struct Raised(Arc<AtomicBool>);

impl Trigger for Raised {
    type E = Infallible;
    fn trigger(&self) -> Result<(), Infallible> {
        self.0.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// The UART.
pub struct Serial {
    uart: Superio<Raised, NoEvents, Box<dyn Write + Send>>,
    raised: Raised,
}

/// Saved registers of the UART.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    registers: [u8; 9],
    received: Vec<u8>,
}

impl Serial {
    /// A UART that writes what the guest sends to `out`.
    pub fn new(out: Box<dyn Write + Send>) -> Serial {
        let raised = Raised::default();
        Serial { uart: Superio::new(raised.clone(), out), raised }
    }

    /// Reads register `offset` (0–7).
    pub fn read(&mut self, offset: u8) -> u8 {
        self.uart.read(offset & 7)
    }

    /// Writes register `offset`. A host that cannot take the output loses it; the guest is not stopped for that.
    pub fn write(&mut self, offset: u8, v: u8) {
        if let Err(e) = self.uart.write(offset & 7, v) {
            tracing::debug!("serial output lost: {e:?}");
        }
    }

    /// Puts received bytes into the FIFO; says how many fitted.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        let room = self.uart.fifo_capacity().min(FIFO);
        let n = bytes.len().min(room);
        self.uart.enqueue_raw_bytes(&bytes[..n]).unwrap_or(0)
    }

    /// Whether an interrupt was raised since the last call: IRQ 4 is edge-triggered.
    pub fn take_edge(&mut self) -> bool {
        self.raised.0.swap(false, Ordering::Relaxed)
    }

    /// The registers.
    pub fn save(&self) -> SerialState {
        let s = self.uart.state();
        SerialState {
            registers: [
                s.baud_divisor_low,
                s.baud_divisor_high,
                s.interrupt_enable,
                s.interrupt_identification,
                s.line_control,
                s.line_status,
                s.modem_control,
                s.modem_status,
                s.scratch,
            ],
            received: s.in_buffer,
        }
    }

    /// Restores the registers, keeping the output.
    pub fn restore(&mut self, state: &SerialState) -> Result<(), StateError> {
        let r = state.registers;
        let superio = SuperioState {
            baud_divisor_low: r[0],
            baud_divisor_high: r[1],
            interrupt_enable: r[2],
            interrupt_identification: r[3],
            line_control: r[4],
            line_status: r[5],
            modem_control: r[6],
            modem_status: r[7],
            scratch: r[8],
            in_buffer: state.received.clone(),
        };
        let sink: Box<dyn Write + Send> = Box::new(std::io::sink());
        let fresh = Superio::from_state(&superio, self.raised.clone(), NoEvents, sink)
            .map_err(|_| StateError::Invalid("serial port"))?;
        let old = std::mem::replace(&mut self.uart, fresh);
        *self.uart.writer_mut() = old.into_writer();
        // A UART with a pending interrupt raises it again as it is made; the interrupt controllers' states have it.
        self.take_edge();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, b: &[u8]) -> std::io::Result<usize> {
            self.0.lock().map(|mut v| v.extend(b)).ok();
            Ok(b.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn sends_receives_and_restores() {
        let sink = Sink::default();
        let mut s = Serial::new(Box::new(sink.clone()));
        s.write(1, 1);
        s.write(0, b'x');
        assert_eq!(s.input(b"hello"), 5);
        assert!(s.take_edge());
        assert_eq!(s.read(0), b'h');
        s.write(1, 3);
        assert!(s.take_edge());
        let saved = s.save();
        let mut t = Serial::new(Box::new(sink.clone()));
        assert_eq!(t.restore(&saved), Ok(()));
        assert!(!t.take_edge());
        assert_eq!((t.read(0), t.save().received.len()), (b'e', 3));
        t.write(0, b'y');
        assert_eq!(sink.0.lock().map(|v| v.clone()).unwrap_or_default(), b"xy");
    }
}
