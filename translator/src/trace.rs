//! `--trace`: every instruction that the guest executes, or those that a filter lets through, as lines of text.
//!
//! A traced guest is interpreted one instruction at a time, but for blocks that the filter leaves out as a whole. An instruction is written when it is about to execute; one
//! that faults is written as well, and its handler's follow. A repeated string instruction is one line, unless an
//! interrupt or a fault comes in between. The format is for people and for `examples/qemu-diff.rs`:
//!
//! ```text
//! 0 0xffffffff81000000 48 8d 25 51 3f 60 01           lea rsp,[rip+1603F51h]
//! ```
//!
//! with the privilege level first. With registers, a line that begins with a blank stands before it.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::ops::Range;
use std::sync::Arc;

use iced_x86::{Decoder, DecoderError, DecoderOptions, Formatter, Instruction, IntelFormatter, Mnemonic};
use parking_lot::Mutex;

use crate::addr::PAGE_SIZE;
use crate::decode::MAX_LEN;
use crate::state::CpuState;
use crate::vcpu::{Exit, Vcpu};

/// What a traced instruction must be. An empty list of any kind asks for nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    addresses: Vec<Range<u64>>,
    users: Option<bool>,
    mnemonics: Vec<Mnemonic>,
}

/// What is wrong with a filter.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is neither an address (0x1000), a range (0x1000-0x2000), 'user', 'kernel' nor an instruction's name")]
pub struct FilterError(String);

impl Filter {
    /// Reads terms separated by commas: addresses and ranges of addresses (RIP, in hexadecimal, the end excluded),
    /// `user` or `kernel`, and mnemonics. Terms of one kind add to each other; those of different kinds all hold.
    pub fn parse(text: &str) -> Result<Filter, FilterError> {
        let mut filter = Filter::default();
        for term in text.split(',').map(str::trim).filter(|t| !t.is_empty()) {
            let error = || FilterError(term.into());
            match term {
                "user" => filter.users = Some(true),
                "kernel" => filter.users = Some(false),
                _ if term.starts_with("0x") => filter.addresses.push(addresses(term).ok_or_else(error)?),
                _ => filter.mnemonics.push(mnemonic(term).ok_or_else(error)?),
            }
        }
        Ok(filter)
    }

    fn admits(&self, rip: u64, user: bool) -> bool {
        self.users.is_none_or(|users| users == user)
            && (self.addresses.is_empty() || self.addresses.iter().any(|range| range.contains(&rip)))
    }

    /// Whether no instruction of a block that starts at `rip` can be admitted. A block changes no privilege before its
    /// end, and is no longer than a page.
    fn admits_none(&self, rip: u64, user: bool) -> bool {
        let end = rip.saturating_add(PAGE_SIZE);
        self.users.is_some_and(|users| users != user)
            || !self.addresses.is_empty() && self.addresses.iter().all(|range| range.end <= rip || end <= range.start)
    }

    fn admits_mnemonic(&self, mnemonic: Mnemonic) -> bool {
        self.mnemonics.is_empty() || self.mnemonics.contains(&mnemonic)
    }
}

fn addresses(term: &str) -> Option<Range<u64>> {
    let number = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    let (start, end) = match term.split_once('-') {
        Some((start, end)) => (number(start)?, number(end)?),
        None => (number(term)?, number(term)?.saturating_add(1)),
    };
    (start < end).then_some(start..end)
}

fn mnemonic(name: &str) -> Option<Mnemonic> {
    Mnemonic::values().find(|m| *m != Mnemonic::INVALID && format!("{m:?}").eq_ignore_ascii_case(name))
}

/// Where traced instructions go; clones write to the same place.
#[derive(Clone)]
pub struct Trace {
    filter: Filter,
    registers: bool,
    output: Arc<Mutex<Box<dyn Write + Send>>>,
}

impl Trace {
    /// A trace to `output`, which should be buffered, with the registers before each instruction if wanted.
    pub fn new(filter: Filter, registers: bool, output: Box<dyn Write + Send>) -> Trace {
        Trace { filter, registers, output: Arc::new(Mutex::new(output)) }
    }

    fn write(&self, state: &CpuState, rip: u64, bytes: &[u8], instruction: &Instruction) -> io::Result<()> {
        let mut line = String::new();
        if self.registers {
            write_registers(&mut line, state, rip);
        }
        let hex: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
        let _ = write!(line, "{} {rip:#018x} {:30} ", state.cpl, hex.join(" "));
        IntelFormatter::new().format(instruction, &mut line);
        line.push('\n');
        self.output.lock().write_all(line.as_bytes())
    }
}

/// General registers in the order of their names in the manuals, as QEMU's logs have them.
fn write_registers(line: &mut String, state: &CpuState, rip: u64) {
    const NAMES: [(&str, usize); 8] =
        [("rax", 0), ("rbx", 3), ("rcx", 1), ("rdx", 2), ("rsi", 6), ("rdi", 7), ("rbp", 5), ("rsp", 4)];
    for (name, r) in NAMES {
        let _ = write!(line, " {name}={:016x}", state.gpr[r]);
    }
    for r in 8..16 {
        let _ = write!(line, " r{r}={:016x}", state.gpr[r]);
    }
    let _ = writeln!(line, " rip={rip:016x} rfl={:08x}", state.flags());
}

impl Vcpu {
    /// As [`Vcpu::run`], one instruction at a time, each written to `trace`. A trace that cannot be written ends the
    /// run: [`Vcpu::difference`] then says why.
    pub fn run_traced(&mut self, trace: &Trace) -> Exit {
        let exit = loop {
            if let Some(exit) = self.prepare() {
                break exit;
            }
            let passed_over = trace.filter.admits_none(self.cpu.s.rip, self.cpu.s.cpl == 3) && !self.cpu.must_step();
            if !passed_over && let Err(e) = self.trace_next(trace) {
                self.difference = Some(format!("cannot write the trace: {e}"));
                return Exit::Stopped;
            }
            let result = if passed_over { self.run_block() } else { self.step() };
            if result.is_err() {
                break Exit::Shutdown;
            }
        };
        if let Err(e) = trace.output.lock().flush() {
            self.difference = Some(format!("cannot write the trace: {e}"));
            return Exit::Stopped;
        }
        exit
    }

    /// Writes the instruction at RIP if the filter admits it. One that cannot be fetched is about to fault, and is none.
    fn trace_next(&mut self, trace: &Trace) -> io::Result<()> {
        let rip = self.cpu.s.rip;
        if !trace.filter.admits(rip, self.cpu.s.cpl == 3) {
            return Ok(());
        }
        let mut bytes = [0; MAX_LEN];
        let mut have = 0;
        let instruction = loop {
            match self.fetch(have, &mut bytes) {
                Ok(more) => have += more,
                Err(_) => return Ok(()),
            }
            let mut decoder = Decoder::with_ip(self.cpu.mode.bits(), &bytes[..have], rip, DecoderOptions::NONE);
            let instruction = decoder.decode();
            if decoder.last_error() != DecoderError::NoMoreBytes || have == MAX_LEN {
                break instruction;
            }
        };
        if !trace.filter.admits_mnemonic(instruction.mnemonic()) {
            return Ok(());
        }
        trace.write(&self.cpu.s, rip, &bytes[..instruction.len().clamp(1, have)], &instruction)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_read() {
        let filter = Filter::parse("0x1000-0x2000, 0xffffffff81000000,user,RDMSR,wrmsr").expect("a filter");
        assert_eq!(filter.addresses, [0x1000..0x2000, 0xffff_ffff_8100_0000..0xffff_ffff_8100_0001]);
        assert_eq!(filter.mnemonics, [Mnemonic::Rdmsr, Mnemonic::Wrmsr]);
        assert_eq!(Filter::parse(""), Ok(Filter::default()));
        for text in ["1000", "0x", "0x2000-0x1000", "0x1-2", "ring0", "frob", "invalid", "mov,frob"] {
            assert!(Filter::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn kinds_of_terms_all_hold_and_terms_of_a_kind_add() {
        let filter = Filter::parse("0x10-0x20,0x30,kernel").expect("a filter");
        for (rip, user, admitted) in
            [(0x10, false, true), (0x30, false, true), (0x20, false, false), (0x10, true, false)]
        {
            assert_eq!(filter.admits(rip, user), admitted, "{rip:#x} {user}");
        }
        // A block may run into the range from a page before it.
        let range = Filter::parse("0x2000-0x8000").expect("a filter");
        for (rip, none) in
            [(0, true), (0x1000, true), (0x1001, false), (0x7fff, false), (0x8000, true), (u64::MAX, true)]
        {
            assert_eq!(range.admits_none(rip, false), none, "{rip:#x}");
        }
        assert!(filter.admits_none(0x10, true) && !Filter::default().admits_none(0x10, true));
        assert!(Filter::default().admits(7, true) && Filter::default().admits_mnemonic(Mnemonic::Nop));
    }

    #[test]
    fn lines_have_level_address_bytes_text_and_registers() {
        #[derive(Clone, Default)]
        struct Sink(Arc<Mutex<Vec<u8>>>);
        impl Write for Sink {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.lock().write(bytes)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let sink = Sink::default();
        let mut state = CpuState::reset();
        state.gpr[3] = 0xb;
        let bytes = [0x48, 0x89, 0xd8];
        let instruction = Decoder::with_ip(64, &bytes, 0x1000, DecoderOptions::NONE).decode();
        for registers in [false, true] {
            let trace = Trace::new(Filter::default(), registers, Box::new(sink.clone()));
            trace.write(&state, 0x1000, &bytes, &instruction).expect("a vector");
        }
        let text = String::from_utf8(sink.0.lock().clone()).expect("text");
        let line = "0 0x0000000000001000 48 89 d8                       mov rax,rbx";
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!((lines[0], lines[2]), (line, line));
        assert!(lines[1].starts_with(" rax=0000000000000000 rbx=000000000000000b rcx="), "{}", lines[1]);
        assert!(lines[1].ends_with(" r15=0000000000000000 rip=0000000000001000 rfl=00000002"), "{}", lines[1]);
    }
}
