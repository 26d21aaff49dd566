//! The chipset: every device of the machine, the ports and addresses they answer at, and how their interrupt lines
//! reach the CPUs.

use std::io::Write;

use serde::{Deserialize, Serialize};

use crate::acpi_pm::{self, AcpiPm, Sleep};
use crate::bus::{Nanos, StateError};
use crate::debug_exit::DebugExit;
use crate::hpet::{Hpet, Line};
use crate::i8042::I8042;
use crate::ioapic::{IoApic, Message};
pub use crate::lapic::Startup;
use crate::lapic::{Clock, Effect, Ipi, Lapic, Page};
use crate::pci::{ECAM_BASE, ECAM_SIZE, Pci};
use crate::pic::Pic;
use crate::pit::Pit;
use crate::rtc::Rtc;
use crate::serial::{COM1, Serial, SerialState};
use crate::system_control::{self, SystemControl};
use crate::test_device::TestDevice;

/// Where the I/O APIC answers.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Where the HPET answers.
pub const HPET_BASE: u64 = 0xfed0_0000;
const PAGE: u64 = 0x1000;
/// Version of [`ChipsetState`].
const STATE_VERSION: u32 = 2;

/// What a chipset is built for.
#[derive(Clone, Debug)]
pub struct ChipsetConfig {
    /// Number of CPUs, at least 1.
    pub cpus: u8,
    /// Guest RAM in bytes.
    pub memory_bytes: u64,
    /// Guest RAM below 4 GiB in bytes.
    pub low_memory_bytes: u64,
    /// Wall-clock time at power-on, seconds since 1970.
    pub rtc_epoch_seconds: u64,
    /// Frequency of the guest's time-stamp counter.
    pub tsc_hz: u64,
    /// The port at which a guest ends the run with a code, if there is one.
    pub debug_exit: Option<u16>,
    /// Whether there is the device of hypervisor tests.
    pub test_device: bool,
}

/// The machine asks to be switched off or reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// ACPI S5.
    PowerOff,
    /// ACPI S3: devices have lost their state already.
    Suspend,
    /// Any of the reset registers.
    Reset,
    /// The end of the run with this exit code, by the debug exit port.
    Exit(u8),
}

/// Local APICs that are not the chipset's: those of an engine that has its own.
pub trait ApicBus: Send {
    /// A message of the I/O APIC.
    fn send(&mut self, message: Message);
    /// What the I/O APIC's level-triggered inputs send from now on, by input. The end of such an interrupt is to be told
    /// to [`Chipset::end_of_interrupt`].
    fn watch(&mut self, inputs: &[(usize, Message)]);
}

/// All devices.
pub struct Chipset {
    apics: Apics,
    /// What was last told of level-triggered inputs.
    watched: Vec<(usize, Message)>,
    tsc_hz: u64,
    ioapic: IoApic,
    pic: Pic,
    pit: Pit,
    rtc: Rtc,
    hpet: Hpet,
    pm: AcpiPm,
    pci: Pci,
    keyboard: I8042,
    control: SystemControl,
    serial: Serial,
    debug_exit: Option<DebugExit>,
    test_device: Option<TestDevice>,
    power: Option<PowerEvent>,
    /// What each CPU has been told that waits for it ([`Self::waiting`]).
    told: Vec<u8>,
}

/// The whole chipset's state, host-independent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChipsetState {
    version: u32,
    lapics: Vec<Lapic>,
    ioapic: IoApic,
    pic: Pic,
    pit: Pit,
    rtc: Rtc,
    hpet: Hpet,
    pm: AcpiPm,
    pci: Pci,
    keyboard: I8042,
    control: SystemControl,
    serial: SerialState,
    test_device: Option<TestDevice>,
}

impl Chipset {
    /// The chipset after power-on; COM1 writes to `serial_out`.
    pub fn new(config: &ChipsetConfig, serial_out: Box<dyn Write + Send>) -> Chipset {
        Chipset {
            apics: Apics::new(config.cpus.max(1)),
            watched: Vec::new(),
            tsc_hz: config.tsc_hz,
            ioapic: IoApic::new(),
            pic: Pic::new(),
            pit: Pit::new(0),
            rtc: Rtc::new(config.rtc_epoch_seconds, config.low_memory_bytes, config.memory_bytes),
            hpet: Hpet::new(),
            pm: AcpiPm::default(),
            pci: Pci::default(),
            keyboard: I8042::new(),
            control: SystemControl::new(),
            serial: Serial::new(serial_out),
            debug_exit: config.debug_exit.map(DebugExit::new),
            test_device: config.test_device.then(TestDevice::default),
            power: None,
            told: vec![0; config.cpus.max(1).into()],
        }
    }

    // ---- interrupts ----

    /// Sets the level of ISA interrupt `irq` on the 8259s and the I/O APIC, where the timer is input 2.
    fn set_irq(&mut self, irq: u8, level: bool) {
        self.pic.set_line(irq, level);
        self.set_pin(if irq == 0 { 2 } else { usize::from(irq) }, level);
    }

    /// A rising edge; the line stays high, as an 8259 forgets a request whose line drops again.
    fn pulse_irq(&mut self, irq: u8) {
        self.set_irq(irq, false);
        self.set_irq(irq, true);
    }

    fn set_pin(&mut self, pin: usize, level: bool) {
        let apics = &mut self.apics;
        self.ioapic.set_line(pin, level, &mut |m| apics.deliver(m));
    }

    /// Sets an input of the I/O APIC, of which the first 16 are ISA interrupts.
    fn drive_gsi(&mut self, n: u8, level: bool) {
        if n < 16 { self.set_irq(n, level) } else { self.set_pin(n.into(), level) }
    }

    fn drive(&mut self, line: Line, level: bool) {
        match line {
            Line::LegacyTimer => self.set_irq(0, level),
            Line::LegacyClock => self.set_irq(8, level),
            Line::Pin(pin) => self.set_pin(usize::from(pin), level),
        }
    }

    /// Brings the lines of level-driven devices up to date.
    fn update_lines(&mut self) {
        self.set_irq(1, self.keyboard.irq());
        if !self.hpet.legacy() {
            self.set_irq(8, self.rtc.irq());
        }
        if self.serial.take_edge() {
            self.pulse_irq(4);
        }
        let levels: Vec<(Line, bool)> = self.hpet.levels().collect();
        for (line, level) in levels {
            self.drive(line, level);
        }
        if self.rtc.alarm() {
            self.pm.alarm();
        }
        self.set_irq(acpi_pm::SCI, self.pm.event());
        if let Some(sleep) = self.pm.take_sleep() {
            self.power.get_or_insert(match sleep {
                Sleep::Suspend => PowerEvent::Suspend,
                Sleep::Off => PowerEvent::PowerOff,
            });
        }
        if self.keyboard.take_reset() | self.control.take_reset() {
            self.power.get_or_insert(PowerEvent::Reset);
        }
    }

    /// Runs every timer up to `now`.
    pub fn advance(&mut self, now: Nanos) {
        if self.pit.advance(now) && !self.hpet.legacy() {
            self.pulse_irq(0);
        }
        self.rtc.advance(now);
        let mut pulses = Vec::new();
        self.hpet.advance(now, &mut |line| pulses.push(line));
        for line in pulses {
            self.drive(line, false);
            self.drive(line, true);
        }
        if self.apics.outside.is_none() {
            self.apics.here.iter_mut().for_each(|lapic| lapic.advance(now));
        }
        self.update_lines();
    }

    /// When a timer has something to do next.
    pub fn next_deadline(&self) -> Option<Nanos> {
        let lapics = self.apics.here.iter().filter(|_| self.apics.outside.is_none()).filter_map(Lapic::next_event);
        [self.pit.next_event(), self.rtc.next_event(), self.hpet.next_event()].into_iter().flatten().chain(lapics).min()
    }

    // ---- local APICs elsewhere ----

    /// Gives the local APICs away, each as its register page. From now on only the 8259s' interrupts are to be had here,
    /// and whether a local APIC lets these through is for it to say.
    pub fn give_lapics(&mut self, to: Box<dyn ApicBus>, now: Nanos) -> Vec<Page> {
        // A timer that is due has to have fired: what is left of its count does not say so.
        self.advance(now);
        self.apics.outside = Some(to);
        self.watched.clear();
        self.watch();
        self.lapic_pages(now)
    }

    /// The local APICs' register pages.
    pub fn lapic_pages(&self, now: Nanos) -> Vec<Page> {
        self.apics.here.iter().map(|lapic| lapic.page(now)).collect()
    }

    /// Takes local APICs back, each with its CPU's time-stamp counter.
    pub fn take_lapics(&mut self, pages: &[(Page, u64)], now: Nanos) {
        let tsc_hz = self.tsc_hz;
        let taken =
            (0..).zip(pages).map(|(id, (page, tsc))| Lapic::from_page(id, page, Clock { now, tsc: *tsc, tsc_hz }));
        self.apics.here = taken.collect();
        self.apics.outside = None;
    }

    /// The end of a level-triggered interrupt at a local APIC that is elsewhere.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        let apics = &mut self.apics;
        self.ioapic.end_of_interrupt(vector, &mut |m| apics.deliver(m));
    }

    /// Tells local APICs elsewhere about level-triggered inputs if these have changed.
    fn watch(&mut self) {
        let Some(outside) = &mut self.apics.outside else { return };
        let inputs = self.ioapic.level_messages();
        if inputs != self.watched {
            outside.watch(&inputs);
            self.watched = inputs;
        }
    }

    /// What `cpu` does. Where local APICs are elsewhere, that is for them to say.
    pub fn startup(&self, cpu: usize) -> Startup {
        let here = self.apics.here.get(cpu).filter(|_| self.apics.outside.is_none());
        here.map_or(Startup::Runs, Lapic::startup)
    }

    /// `cpu` is about to run from a page on, as [`Self::startup`] said, unless it has been told otherwise since.
    pub fn begun(&mut self, cpu: usize, page: u8) {
        if let Some(lapic) = self.apics.here.get_mut(cpu) {
            lapic.begun(page);
        }
        self.has_taken(cpu);
    }

    /// What waits for `cpu`, a bit each: a maskable interrupt, a non-maskable one, that it is not to run.
    fn waiting(&self, cpu: usize) -> u8 {
        let nmi = self.apics.outside.is_none() && self.apics.here.get(cpu).is_some_and(Lapic::nmi_pending);
        let halt = self.startup(cpu) != Startup::Runs;
        u8::from(self.interrupt_pending(cpu)) | u8::from(nmi) << 1 | u8::from(halt) << 2
    }

    /// Tells which CPUs something waits for that did not when this was last called, and what they do.
    pub fn tell(&mut self, mut tell: impl FnMut(usize, Startup)) {
        for cpu in 0..self.told.len() {
            let waiting = self.waiting(cpu);
            if waiting & !self.told[cpu] != 0 {
                tell(cpu, self.startup(cpu));
            }
            self.told[cpu] = waiting;
        }
    }

    /// Notes that less may wait for `cpu` than it was told.
    fn has_taken(&mut self, cpu: usize) {
        let waiting = self.waiting(cpu);
        if let Some(told) = self.told.get_mut(cpu) {
            *told &= waiting;
        }
    }

    /// Whether `cpu` has a maskable interrupt to take.
    pub fn interrupt_pending(&self, cpu: usize) -> bool {
        if self.apics.outside.is_some() {
            return cpu == 0 && self.pic.pending();
        }
        self.apics.here.get(cpu).is_some_and(|l| l.pending().is_some() || self.extint(l))
    }

    fn extint(&self, lapic: &Lapic) -> bool {
        self.pic.pending() && lapic.accepts_extint()
    }

    /// Takes `cpu`'s highest interrupt: the vector.
    pub fn acknowledge(&mut self, cpu: usize) -> Option<u8> {
        let vector = self.acknowledged(cpu);
        self.has_taken(cpu);
        vector
    }

    fn acknowledged(&mut self, cpu: usize) -> Option<u8> {
        if self.apics.outside.is_some() {
            return self.pic.pending().then(|| self.pic.acknowledge());
        }
        let lapic = self.apics.here.get_mut(cpu)?;
        if let Some(vector) = lapic.acknowledge() {
            return Some(vector);
        }
        (self.pic.pending() && lapic.accepts_extint()).then(|| self.pic.acknowledge())
    }

    /// Takes `cpu`'s pending non-maskable interrupt.
    pub fn take_nmi(&mut self, cpu: usize) -> bool {
        let taken = self.apics.here.get_mut(cpu).is_some_and(Lapic::take_nmi);
        self.has_taken(cpu);
        taken
    }

    /// Whether `cpu`'s APIC is enabled by IA32_APIC_BASE.
    pub fn apic_enabled(&self, cpu: usize) -> bool {
        self.apics.here.get(cpu).is_some_and(Lapic::enabled)
    }

    /// `cpu`'s CR8.
    pub fn cr8(&self, cpu: usize) -> u64 {
        self.apics.here.get(cpu).map_or(0, Lapic::cr8)
    }

    /// Writes `cpu`'s CR8.
    pub fn set_cr8(&mut self, cpu: usize, value: u64) {
        if let Some(l) = self.apics.here.get_mut(cpu) {
            l.set_cr8(value);
        }
        self.has_taken(cpu);
    }

    /// Reads an MSR of `cpu`'s APIC at guest time-stamp `tsc`; `None` raises #GP.
    pub fn apic_msr_read(&mut self, cpu: usize, msr: u32, _tsc: u64, now: Nanos) -> Option<u64> {
        self.apics.here.get_mut(cpu)?.msr_read(msr, now)
    }

    /// Writes an MSR of `cpu`'s APIC; `None` raises #GP.
    pub fn apic_msr_write(&mut self, cpu: usize, msr: u32, value: u64, tsc: u64, now: Nanos) -> Option<()> {
        let clock = Clock { now, tsc, tsc_hz: self.tsc_hz };
        let effect = self.apics.here.get_mut(cpu)?.msr_write(msr, value, clock)?;
        self.apply(cpu, effect);
        Some(())
    }

    fn apply(&mut self, cpu: usize, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Eoi(vector) => self.end_of_interrupt(vector),
            Effect::Ipi(ipi) => self.send_ipi(cpu, ipi),
        }
    }

    fn send_ipi(&mut self, from: usize, ipi: Ipi) {
        for (k, lapic) in self.apics.here.iter_mut().enumerate() {
            let target = match ipi.shorthand {
                0 => lapic.is_destination(ipi.logical, ipi.destination),
                1 => k == from,
                2 => true,
                _ => k != from,
            };
            if !target {
                continue;
            }
            match ipi.mode {
                0 => _ = lapic.accept(ipi.vector, false),
                // One of them is enough.
                1 if lapic.accept(ipi.vector, false) => break,
                4 => lapic.accept_nmi(),
                5 if k != from => {
                    lapic.init();
                    self.told[k] = 0;
                }
                6 if lapic.start_up(ipi.vector) => self.told[k] = 0,
                _ => {}
            }
        }
    }

    // ---- sleep ----

    /// S3: every device but the real-time clock, the UART and the power management itself comes to its state after
    /// power-on.
    pub fn suspend(&mut self, now: Nanos) {
        let cpus = self.apics.here.len() as u8;
        self.apics = Apics { outside: self.apics.outside.take(), ..Apics::new(cpus) };
        self.ioapic = IoApic::new();
        self.watch();
        self.pic = Pic::new();
        self.pit = Pit::new(now);
        self.hpet = Hpet::new();
        self.pci = Pci::default();
        self.keyboard = I8042::new();
        self.control = SystemControl::new();
    }

    /// Ends S3 if an event that the guest enabled has occurred.
    pub fn wake(&mut self) -> bool {
        let wakes = self.pm.event();
        if wakes {
            self.pm.woken();
        }
        wakes
    }

    // ---- ports ----

    /// Reads `size` (1, 2 or 4) bytes at a port; all ones where nothing answers.
    pub fn port_read(&mut self, port: u16, size: u8, now: Nanos) -> u32 {
        let mask = if size >= 4 { u32::MAX } else { (1 << (8 * u32::from(size))) - 1 };
        let inside = port & 3 <= 4 - u16::from(size.clamp(1, 4));
        if inside && AcpiPm::claims(port) {
            return self.pm.read(port, now) & mask;
        }
        if inside && (0xcf8..0xd00).contains(&port) && !(port == system_control::RESET && size == 1) {
            return self.pci.port_read(port) & mask;
        }
        let v = (0..u16::from(size.min(4)))
            .fold(0, |v, k| v | u32::from(self.read_byte(port.wrapping_add(k), now)) << (8 * k));
        self.update_lines();
        v
    }

    /// Writes `size` (1, 2 or 4) bytes at a port.
    pub fn port_write(&mut self, port: u16, size: u8, value: u32, now: Nanos) {
        if self.debug_exit.is_some_and(|device| device.claims(port)) {
            self.power.get_or_insert(PowerEvent::Exit(DebugExit::exit_code(value)));
            return;
        }
        if self.test_device.is_some()
            && let Some(line) = TestDevice::line(port)
        {
            return self.drive_gsi(line, value != 0);
        }
        if (0xcf8..0xd00).contains(&port) && !(port == system_control::RESET && size == 1) {
            self.pci.port_write(port, size, value);
        } else {
            for k in 0..u16::from(size.min(4)) {
                self.write_byte(port.wrapping_add(k), (value >> (8 * k)) as u8, now);
            }
        }
        self.update_lines();
    }

    fn read_byte(&mut self, port: u16, now: Nanos) -> u8 {
        match port {
            0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => self.pic.read(port),
            0x40..=0x43 => self.pit.read(port - 0x40, now),
            0x60 | 0x64 => self.keyboard.read(port),
            0x61 | 0x80 | 0x92 | system_control::RESET => {
                let timer2 = self.pit.output2(now);
                self.control.read(port, timer2, now)
            }
            0x70 | 0x71 => self.rtc.read(port - 0x70, now),
            COM1..0x400 => self.serial.read((port - COM1) as u8),
            _ if AcpiPm::claims(port) => self.pm.read(port, now) as u8,
            _ => self.test_device.as_mut().and_then(|d| d.port(port)).map_or(0xff, |byte| *byte),
        }
    }

    fn write_byte(&mut self, port: u16, v: u8, now: Nanos) {
        match port {
            0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => self.pic.write(port, v),
            0x40..=0x43 => self.pit.write(port - 0x40, v, now),
            0x60 | 0x64 => self.keyboard.write(port, v),
            0x61 | 0x80 | 0x92 | system_control::RESET => {
                self.control.write(port, v);
                self.pit.set_gate2(self.control.gate2(), now);
            }
            0x70 | 0x71 => self.rtc.write(port - 0x70, v, now),
            COM1..0x400 => self.serial.write((port - COM1) as u8, v),
            _ if AcpiPm::claims(port) => self.pm.write(port, v),
            _ => {
                if let Some(byte) = self.test_device.as_mut().and_then(|d| d.port(port)) {
                    *byte = v;
                }
            }
        }
    }

    // ---- memory-mapped registers ----

    /// Reads `size` (1, 2, 4 or 8) bytes at a guest physical address outside RAM, for `cpu`; all ones where nothing answers.
    pub fn mmio_read(&mut self, cpu: usize, gpa: u64, size: u8, now: Nanos) -> u64 {
        if let Some((lapic, offset)) = self.lapic_at(cpu, gpa) {
            return u64::from(lapic.mmio_read(offset, now));
        }
        if let Some(offset) = inside(gpa, IOAPIC_BASE, PAGE) {
            return u64::from(self.ioapic.read(offset));
        }
        if let Some(offset) = inside(gpa, HPET_BASE, PAGE) {
            return self.hpet.read(offset, size, now);
        }
        if let Some(memory) = self.test_device.as_mut().and_then(|d| d.memory(gpa)) {
            return memory.iter().take(size.into()).rev().fold(0, |v, &byte| v << 8 | u64::from(byte));
        }
        match inside(gpa, ECAM_BASE, ECAM_SIZE) {
            Some(offset) => self.pci.mmio_read(offset),
            None => u64::MAX,
        }
    }

    /// Writes `size` (1, 2, 4 or 8) bytes at a guest physical address outside RAM, for `cpu`.
    pub fn mmio_write(&mut self, cpu: usize, gpa: u64, size: u8, value: u64, now: Nanos) {
        if let Some((lapic, offset)) = self.lapic_at(cpu, gpa) {
            let effect = lapic.mmio_write(offset, value as u32, now);
            self.apply(cpu, effect);
        } else if let Some(offset) = inside(gpa, IOAPIC_BASE, PAGE) {
            let apics = &mut self.apics;
            self.ioapic.write(offset, value as u32, &mut |m| apics.deliver(m));
            self.watch();
        } else if let Some(offset) = inside(gpa, HPET_BASE, PAGE) {
            self.hpet.write(offset, size, value, now);
        } else if let Some(memory) = self.test_device.as_mut().and_then(|d| d.memory(gpa)) {
            memory.iter_mut().zip(value.to_le_bytes()).take(size.into()).for_each(|(byte, v)| *byte = v);
        } else if let Some(offset) = inside(gpa, ECAM_BASE, ECAM_SIZE) {
            self.pci.mmio_write(offset, size, value);
        }
        self.update_lines();
    }

    /// `cpu`'s local APIC, if its registers are at an address, and which.
    fn lapic_at(&mut self, cpu: usize, gpa: u64) -> Option<(&mut Lapic, u64)> {
        let lapic = self.apics.here.get_mut(cpu).filter(|_| self.apics.outside.is_none())?;
        let offset = inside(gpa, lapic.mmio_base()?, PAGE)?;
        Some((lapic, offset))
    }

    // ---- the world outside ----

    /// Hands received bytes to COM1; says how many it took.
    pub fn serial_input(&mut self, bytes: &[u8]) -> usize {
        let n = self.serial.input(bytes);
        self.update_lines();
        n
    }

    /// Takes the request to switch off or reset.
    pub fn take_power_event(&mut self) -> Option<PowerEvent> {
        self.power.take()
    }

    /// The last POST code written to port 80h.
    pub fn post_code(&self) -> u8 {
        self.control.post_code()
    }

    /// The state of every device. Local APICs that are elsewhere are to be taken back before.
    pub fn save(&self) -> ChipsetState {
        ChipsetState {
            version: STATE_VERSION,
            lapics: self.apics.here.clone(),
            ioapic: self.ioapic.clone(),
            pic: self.pic.clone(),
            pit: self.pit.clone(),
            rtc: self.rtc.clone(),
            hpet: self.hpet.clone(),
            pm: self.pm.clone(),
            pci: self.pci.clone(),
            keyboard: self.keyboard.clone(),
            control: self.control.clone(),
            serial: self.serial.save(),
            test_device: self.test_device.clone(),
        }
    }

    /// Restores every device; on an error nothing has changed.
    pub fn restore(&mut self, state: &ChipsetState) -> Result<(), StateError> {
        if state.version != STATE_VERSION {
            return Err(StateError::Version { found: state.version, expected: STATE_VERSION });
        }
        if state.lapics.len() != self.apics.here.len() {
            return Err(StateError::Invalid("number of CPUs"));
        }
        if state.test_device.is_some() != self.test_device.is_some() {
            return Err(StateError::Invalid("presence of the test device"));
        }
        state.test_device.as_ref().map_or(Ok(()), TestDevice::validate)?;
        state.rtc.validate()?;
        state.keyboard.validate()?;
        self.serial.restore(&state.serial)?;
        let s = state.clone();
        self.apics.here = s.lapics;
        self.ioapic = s.ioapic;
        self.pic = s.pic;
        self.pit = s.pit;
        self.rtc = s.rtc;
        self.hpet = s.hpet;
        self.pm = s.pm;
        self.pci = s.pci;
        self.keyboard = s.keyboard;
        self.control = s.control;
        self.test_device = s.test_device;
        Ok(())
    }
}

/// The local APICs, here or elsewhere.
struct Apics {
    here: Vec<Lapic>,
    /// Where they are while they are not here; what is here then is of no account.
    outside: Option<Box<dyn ApicBus>>,
}

impl Apics {
    /// As they are after power-on: all CPUs but the first wait, as firmware leaves them.
    fn new(cpus: u8) -> Apics {
        let mut here: Vec<Lapic> = (0..cpus).map(Lapic::new).collect();
        here.iter_mut().skip(1).for_each(Lapic::init);
        Apics { here, outside: None }
    }

    /// Hands a message to the local APICs that it is for.
    fn deliver(&mut self, m: Message) {
        // SMI, INIT and ExtINT through the I/O APIC are not wired.
        if !matches!(m.mode, 0 | 1 | 4) {
            return;
        }
        if let Some(outside) = &mut self.outside {
            return outside.send(m);
        }
        for lapic in self.here.iter_mut().filter(|l| l.is_destination(m.logical, u32::from(m.destination))) {
            if m.mode == 4 {
                lapic.accept_nmi();
            } else if lapic.accept(m.vector, m.level) && m.mode == 1 {
                // One of them is enough.
                return;
            }
        }
    }
}

/// The offset of an address inside a range.
fn inside(address: u64, base: u64, len: u64) -> Option<u64> {
    Some(address.wrapping_sub(base)).filter(|&o| o < len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn chipset() -> Chipset {
        chipset_of(1)
    }

    fn chipset_of(cpus: u8) -> Chipset {
        let config = ChipsetConfig {
            cpus,
            memory_bytes: 64 << 20,
            low_memory_bytes: 64 << 20,
            rtc_epoch_seconds: 1 << 30,
            tsc_hz: 1_000_000_000,
            debug_exit: Some(0xf4),
            test_device: true,
        };
        Chipset::new(&config, Box::new(std::io::sink()))
    }

    /// One guest access.
    #[derive(Clone, Debug)]
    enum Op {
        In(u16, u8),
        Out(u16, u8, u32),
        Read(u64, u8),
        Write(u64, u8, u64),
        MsrRead(u32),
        MsrWrite(u32, u64),
        Wait(u64),
        Take,
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let size = prop_oneof![Just(1u8), Just(2), Just(4)];
        let wide = prop_oneof![Just(1u8), Just(2), Just(4), Just(8)];
        let port = prop_oneof![
            0u16..0x100,
            Just(0x4d0),
            0x3f8u16..0x400,
            0x600u16..0x630,
            0xcf0u16..0xd00,
            0x2000u16..0x2018,
            any::<u16>()
        ];
        let gpa = prop_oneof![
            (0u64..0x1000).prop_map(|o| 0xfee0_0000 + o),
            (0u64..0x100).prop_map(|o| 0xfec0_0000 + o),
            (0u64..0x200).prop_map(|o| 0xfed0_0000 + o),
            (0u64..0x1_0000).prop_map(|o| 0xff00_0000 + o),
            (0u64..1 << 28).prop_map(|o| ECAM_BASE + o),
            any::<u64>()
        ];
        let msr = prop_oneof![Just(0x1bu32), Just(0x6e0), 0x800u32..0x840];
        let op = prop_oneof![
            (port.clone(), size.clone()).prop_map(|(p, s)| Op::In(p, s)),
            (port, size, any::<u32>()).prop_map(|(p, s, v)| Op::Out(p, s, v)),
            (gpa.clone(), wide.clone()).prop_map(|(a, s)| Op::Read(a, s)),
            (gpa, wide, any::<u64>()).prop_map(|(a, s, v)| Op::Write(a, s, v)),
            msr.clone().prop_map(Op::MsrRead),
            (msr, any::<u64>()).prop_map(|(m, v)| Op::MsrWrite(m, v)),
            prop_oneof![0u64..1000, 0u64..10_000_000_000].prop_map(Op::Wait),
            Just(Op::Take),
        ];
        proptest::collection::vec(op, 0..200)
    }

    fn apply(c: &mut Chipset, op: &Op, now: &mut u64) -> u64 {
        match *op {
            Op::In(p, s) => u64::from(c.port_read(p, s, *now)),
            Op::Out(p, s, v) => {
                c.port_write(p, s, v, *now);
                0
            }
            Op::Read(a, s) => c.mmio_read(0, a, s, *now),
            Op::Write(a, s, v) => {
                c.mmio_write(0, a, s, v, *now);
                0
            }
            Op::MsrRead(m) => c.apic_msr_read(0, m, *now, *now).unwrap_or(7),
            Op::MsrWrite(m, v) => c.apic_msr_write(0, m, v, *now, *now).is_some().into(),
            Op::Wait(n) => {
                *now += n;
                c.advance(*now);
                c.next_deadline().unwrap_or(0)
            }
            Op::Take => u64::from(c.acknowledge(0).unwrap_or(0)),
        }
    }

    proptest! {
        /// No access sequence panics, and a chipset restored halfway from its serialised state goes on as the original.
        #[test]
        fn any_accesses_and_restore(before in ops(), after in ops()) {
            let (mut a, mut now) = (chipset(), 0);
            for op in &before {
                apply(&mut a, op, &mut now);
            }
            let text = serde_json::to_string(&a.save()).unwrap();
            let state: ChipsetState = serde_json::from_str(&text).unwrap();
            let mut b = chipset();
            prop_assert_eq!(b.restore(&state), Ok(()));
            let mut then = now;
            for op in &after {
                prop_assert_eq!(apply(&mut a, op, &mut now), apply(&mut b, op, &mut then), "{:?}", op);
            }
            prop_assert_eq!(a.save(), b.save());
        }
    }

    #[test]
    fn damaged_states_are_refused() {
        let mut c = chipset();
        let mut s = c.save();
        s.version = 99;
        assert_eq!(c.restore(&s), Err(StateError::Version { found: 99, expected: STATE_VERSION }));
    }

    #[test]
    fn timer_interrupt_reaches_the_cpu_through_both_controllers() {
        let mut c = chipset();
        for (port, v) in
            [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xfe), (0x43, 0x34), (0x40, 0), (0x40, 16)]
        {
            c.port_write(port, 1, v, 0);
        }
        let at = c.next_deadline().unwrap();
        c.advance(at);
        assert!(c.interrupt_pending(0));
        assert_eq!(c.acknowledge(0), Some(0x20));
        // Through the I/O APIC's input 2.
        c.port_write(0x21, 1, 0xff, at);
        c.mmio_write(0, IOAPIC_BASE, 4, 0x14, at);
        c.mmio_write(0, IOAPIC_BASE + 0x10, 4, 0x55, at);
        let at = c.next_deadline().unwrap();
        c.advance(at);
        assert_eq!(c.acknowledge(0), Some(0x55));
    }

    #[test]
    fn test_device() {
        let mut c = chipset();
        c.port_write(0xe0, 4, 0x1122_3344, 0);
        c.port_write(0xe1, 1, 0x55, 0);
        assert_eq!((c.port_read(0xe0, 4, 0), c.port_read(0xe2, 2, 0)), (0x1122_5544, 0x1122));
        c.mmio_write(0, 0xff00_0ffc, 8, 0x8877_6655_4433_2211, 0);
        assert_eq!((c.mmio_read(0, 0xff00_0ffe, 4, 0), c.mmio_read(0, 0xff00_1004, 8, 0)), (0x6655_4433, 0));
        // Input 20 of the I/O APIC, edge-triggered, vector 44h.
        c.mmio_write(0, IOAPIC_BASE, 4, 0x10 + 2 * 20, 0);
        c.mmio_write(0, IOAPIC_BASE + 0x10, 4, 0x44, 0);
        c.port_write(0x2000 + 20, 4, 1, 0);
        assert_eq!(c.acknowledge(0), Some(0x44));
    }

    /// The alarm ends S3 if the guest enabled that, and the clock is what it was.
    #[test]
    fn the_alarm_wakes() {
        let mut c = chipset();
        for (n, v) in [(1, 0xc0), (3, 0xc0), (5, 0xc0), (0x0b, 0x22)] {
            c.port_write(0x70, 1, n, 0);
            c.port_write(0x71, 1, v, 0);
        }
        c.port_write(0x21, 1, 0, 0);
        c.suspend(0);
        let second = 1_000_000_000;
        c.advance(second);
        assert!(!c.wake());
        c.port_write(0x602, 2, 1 << 10, second);
        assert!(c.wake());
        assert_eq!(c.port_read(0x600, 2, second), 1 << 15 | 1 << 10);
        assert_eq!((c.port_read(0x21, 1, second), c.port_read(0x71, 1, second)), (0xf8, 0x22));
    }

    #[test]
    fn power_events() {
        for (port, size, v, event) in [
            (0x604, 2, 5 << 10 | 1 << 13, PowerEvent::PowerOff),
            (0x604, 2, 1 << 10 | 1 << 13, PowerEvent::Suspend),
            (0xcf9, 1, 6, PowerEvent::Reset),
            (0x64, 1, 0xfe, PowerEvent::Reset),
            (0xf4, 1, 0x10, PowerEvent::Exit(33)),
            (0xf4, 4, 0, PowerEvent::Exit(1)),
        ] {
            let mut c = chipset();
            c.port_write(port, size, v, 0);
            assert_eq!(c.take_power_event(), Some(event));
        }
    }

    const LAPIC: u64 = 0xfee0_0000;
    const OTHERS: u64 = 3 << 18;

    /// Sends an IPI from CPU 0; who is told of what then.
    fn send(c: &mut Chipset, destination: u64, command: u64) -> Vec<(usize, Startup)> {
        c.mmio_write(0, LAPIC + 0x310, 4, destination << 24, 0);
        c.mmio_write(0, LAPIC + 0x300, 4, command, 0);
        told(c)
    }

    fn told(c: &mut Chipset) -> Vec<(usize, Startup)> {
        let mut told = Vec::new();
        c.tell(|cpu, startup| told.push((cpu, startup)));
        told
    }

    /// CPUs that run, with their local APICs enabled.
    fn running(cpus: u8) -> Chipset {
        let mut c = chipset_of(cpus);
        send(&mut c, 0, OTHERS | 0x4608);
        for cpu in 0..cpus.into() {
            c.begun(cpu, 8);
            c.mmio_write(cpu, LAPIC + 0xf0, 4, 0x1ff, 0);
        }
        assert_eq!(told(&mut c), []);
        c
    }

    #[test]
    fn cpus_wait_begin_and_run() {
        let mut c = chipset_of(3);
        assert_eq!([0, 1, 2].map(|cpu| c.startup(cpu)), [Startup::Runs, Startup::Waits, Startup::Waits]);
        told(&mut c);
        // One starts; the other waits on.
        assert_eq!(send(&mut c, 2, 0x4699), [(2, Startup::Begins(0x99))]);
        assert_eq!(c.startup(1), Startup::Waits);
        // What comes before it has begun does not count.
        assert_eq!(send(&mut c, 2, 0x4608), []);
        c.begun(2, 0x99);
        assert_eq!(c.startup(2), Startup::Runs);
        assert_eq!(send(&mut c, 2, 0x4608), []);
        // All but the sender, whether they run or wait.
        assert_eq!(send(&mut c, 0, OTHERS | 0x4500), [(1, Startup::Waits), (2, Startup::Waits)]);
        assert_eq!(c.startup(0), Startup::Runs);
        assert_eq!(send(&mut c, 0, OTHERS | 0x4607), [(1, Startup::Begins(7)), (2, Startup::Begins(7))]);
    }

    /// Between what a CPU is told and its beginning it may be told otherwise.
    #[test]
    fn an_init_before_the_beginning_counts() {
        let mut c = chipset_of(2);
        send(&mut c, 1, 0x4608);
        assert_eq!(send(&mut c, 1, 0x4500), [(1, Startup::Waits)]);
        c.begun(1, 8);
        assert_eq!(c.startup(1), Startup::Waits);
        assert_eq!(send(&mut c, 1, 0x4609), [(1, Startup::Begins(9))]);
        c.begun(1, 9);
        assert_eq!(c.startup(1), Startup::Runs);
    }

    #[test]
    fn a_cpu_is_told_once_of_what_it_has_to_take() {
        let mut c = running(2);
        assert_eq!(send(&mut c, 1, 0x4040), [(1, Startup::Runs)]);
        // It has not looked yet.
        assert_eq!(send(&mut c, 1, 0x4041), []);
        assert_eq!(c.acknowledge(1), Some(0x41));
        assert_eq!(c.acknowledge(1), None);
        // The end of the one in service lets the other through, which is this CPU's own doing.
        assert_eq!(told(&mut c), []);
        c.mmio_write(1, LAPIC + 0xb0, 4, 0, 0);
        assert_eq!(told(&mut c), [(1, Startup::Runs)]);
        assert_eq!(c.acknowledge(1), Some(0x40));
        // Behind that it is told of a higher one, not of a lower one.
        assert_eq!(send(&mut c, 1, 0x4030), []);
        assert_eq!(send(&mut c, 1, 0x4050), [(1, Startup::Runs)]);
        assert_eq!(c.acknowledge(1), Some(0x50));
    }

    #[test]
    fn the_task_priority_holds_back_who_would_be_told() {
        let mut c = running(2);
        c.mmio_write(1, LAPIC + 0x80, 4, 0x50, 0);
        assert_eq!(send(&mut c, 1, 0x4040), []);
        assert_eq!(send(&mut c, 1, 0x4060), [(1, Startup::Runs)]);
        assert_eq!(c.acknowledge(1), Some(0x60));
        c.mmio_write(1, LAPIC + 0xb0, 4, 0, 0);
        assert_eq!(told(&mut c), []);
        c.mmio_write(1, LAPIC + 0x80, 4, 0, 0);
        assert_eq!(told(&mut c), [(1, Startup::Runs)]);
        assert_eq!(c.acknowledge(1), Some(0x40));
    }

    /// Who does not take interrupts now is told of an NMI, and of an INIT.
    #[test]
    fn an_nmi_is_told_beside_an_interrupt() {
        let mut c = running(2);
        assert_eq!(send(&mut c, 1, 0x4040), [(1, Startup::Runs)]);
        assert!(!c.take_nmi(1));
        assert_eq!(send(&mut c, 1, 0x4400), [(1, Startup::Runs)]);
        assert!(c.take_nmi(1));
        assert_eq!(send(&mut c, 1, 0x4400), [(1, Startup::Runs)]);
        assert_eq!(send(&mut c, 1, 0x4500), [(1, Startup::Waits)]);
    }

    #[test]
    fn interrupts_reach_whom_they_are_for() {
        let mut c = running(4);
        for cpu in 0..4 {
            c.mmio_write(cpu, LAPIC + 0xd0, 4, 1 << (24 + cpu), 0);
        }
        let logical = 1 << 11;
        for (destination, command, expected) in [
            (2, 0x4040, 0b0100),
            (0xff, 0x4040, 0b1111),
            (9, 0x4040, 0),
            (0b1010, logical | 0x4040, 0b1010),
            (0xff, logical | 0x4040, 0b1111),
            (0, 1 << 18 | 0x4040, 0b0001),
            (0, 2 << 18 | 0x4040, 0b1111),
            (0, 3 << 18 | 0x4040, 0b1110),
            (0b1100, logical | 0x4140, 0b0100),
        ] {
            send(&mut c, destination, command);
            let reached = (0..4).filter(|&cpu| c.acknowledge(cpu) == Some(0x40)).fold(0, |all, cpu| all | 1 << cpu);
            (0..4).for_each(|cpu| c.mmio_write(cpu, LAPIC + 0xb0, 4, 0, 0));
            assert_eq!(reached, expected, "{destination:x} {command:x}");
        }
    }
}
