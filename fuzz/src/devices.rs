//! The chipset under any accesses of the guest, with time passing in between.
//!
//! Beyond panics, it is checked that a timer's deadline lies ahead once time has come up to it (the machine's timer
//! thread would spin otherwise), that the chipset never takes more serial input than its queue holds, and that the
//! state in the end, written as JSON and read again, makes an equal chipset which goes on equally.

use diglot_devices::acpi_pm::{GPE0, PM1A_EVENT};
use diglot_devices::chipset::{Chipset, ChipsetConfig, HPET_BASE, IOAPIC_BASE, PowerEvent, Startup};
use diglot_devices::lapic::DEFAULT_BASE;
use diglot_devices::pci::ECAM_BASE;
use diglot_devices::serial::COM1;

use crate::input::Input;

const SIZES: [u8; 4] = [1, 2, 4, 8];
/// Where devices answer: first port, and how many there are.
const PORTS: [(u16, u16); 14] = [
    (0x20, 2),
    (0x40, 4),
    (0x60, 5),
    (0x70, 2),
    (0x80, 0x20),
    (0xa0, 2),
    (0xf4, 1),
    (COM1, 8),
    (0x4d0, 2),
    (PM1A_EVENT, 16),
    (GPE0, 4),
    (0xcf8, 8),
    (0xe0, 4),
    (0x2000, 24),
];
/// Where they answer in memory: base, and how much is looked at.
const WINDOWS: [(u64, u64); 5] =
    [(DEFAULT_BASE, 0x400), (IOAPIC_BASE, 0x50), (HPET_BASE, 0x160), (ECAM_BASE, 256 << 20), (0xff00_0000, 0x1_0008)];
/// Accesses of one input.
const MOST: usize = 4096;
/// Beyond this the accesses are more of the same: the longest uptime, in nanoseconds, some 36 years.
const LATEST: u64 = 1 << 60;

/// One of a guest's accesses, or of what happens meanwhile.
#[derive(Clone, Copy, Debug)]
enum Op {
    In(u16, u8),
    Out(u16, u8, u32),
    Read(u64, u8),
    Write(u64, u8, u64),
    MsrRead(u32),
    MsrWrite(u32, u64),
    Cr8(u64),
    Wait(u64),
    Acknowledge,
    Receive(u8),
}

impl Op {
    fn take(input: &mut Input) -> Op {
        let [what, place] = input.array();
        let size = SIZES[usize::from(what >> 4 & 3)];
        let port = |input: &mut Input| match PORTS.get(usize::from(place) % (PORTS.len() + 1)) {
            Some((first, count)) => first + u16::from(input.u8()) % count,
            None => input.u16(),
        };
        let address = |input: &mut Input| match WINDOWS.get(usize::from(place) % (WINDOWS.len() + 1)) {
            // Most registers stand at multiples of 16 or 4.
            Some((base, len)) => {
                let at = u64::from(input.u32());
                base + if place & 0x80 != 0 { at } else { at << 2 } % len
            }
            None => input.u64(),
        };
        let msr = match place % 4 {
            0 => 0x1b,
            1 => 0x6e0,
            _ => 0x800 + u32::from(place >> 2),
        };
        match what & 15 {
            0..=1 => Op::In(port(input), size.min(4)),
            2..=5 => Op::Out(port(input), size.min(4), input.u32()),
            6 => Op::Read(address(input), size),
            7..=9 => Op::Write(address(input), size, input.u64()),
            10 => Op::MsrRead(msr),
            11 => Op::MsrWrite(msr, input.u64()),
            12 => Op::Cr8(u64::from(place & 15)),
            13 => Op::Wait(u64::from(input.u16()) << (place % 40)),
            14 => Op::Acknowledge,
            _ => Op::Receive(place),
        }
    }
}

/// A chipset and its time.
struct Machine {
    chipset: Chipset,
    now: u64,
    /// How many CPUs it has, and whether there is the device of hypervisor tests.
    kind: (u8, bool),
    /// Which CPUs know that something waits for them.
    told: Vec<bool>,
}

impl Machine {
    fn new(kind: (u8, bool)) -> Machine {
        let (cpus, test_device) = kind;
        let config = ChipsetConfig {
            cpus,
            memory_bytes: 6 << 30,
            low_memory_bytes: 64 << 20,
            rtc_epoch_seconds: 1 << 30,
            tsc_hz: 1_000_000_000,
            debug_exit: Some(0xf4),
            test_device,
        };
        Machine {
            chipset: Chipset::new(&config, Box::new(std::io::sink())),
            now: 0,
            kind,
            told: vec![false; cpus.into()],
        }
    }

    /// Does it, and gives what came of it. A machine that asks to be suspended is, and wakes when time passes.
    fn apply(&mut self, op: Op) -> u64 {
        let came = self.access(op);
        self.tell();
        if self.chipset.take_power_event() == Some(PowerEvent::Suspend) {
            self.chipset.suspend(self.now);
        }
        came
    }

    /// Every CPU that is wanted has been told, and one that begins has been told so.
    fn tell(&mut self) {
        let (told, c) = (&mut self.told, &mut self.chipset);
        c.tell(|cpu, _| told[cpu] = true);
        for (cpu, told) in told.iter_mut().enumerate() {
            let wanted = c.interrupt_pending(cpu) || c.startup(cpu) != Startup::Runs;
            assert!(*told || !wanted, "CPU {cpu} does not know what waits for it");
            *told &= wanted;
            if let Startup::Begins(page) = c.startup(cpu) {
                c.begun(cpu, page);
            }
        }
    }

    fn access(&mut self, op: Op) -> u64 {
        let (c, now) = (&mut self.chipset, self.now);
        // Which CPU makes an access is the address's or the value's affair.
        let one_of = |n: u64| (n >> 3) as usize % usize::from(self.kind.0);
        match op {
            Op::In(port, size) => u64::from(c.port_read(port, size, now)),
            Op::Out(port, size, v) => {
                c.port_write(port, size, v, now);
                0
            }
            Op::Read(gpa, size) => c.mmio_read(one_of(gpa), gpa, size, now),
            Op::Write(gpa, size, v) => {
                c.mmio_write(one_of(v), gpa, size, v, now);
                0
            }
            Op::MsrRead(msr) => c.apic_msr_read(0, msr, now, now).unwrap_or(7),
            Op::MsrWrite(msr, v) => u64::from(c.apic_msr_write(one_of(v), msr, v, now, now).is_some()),
            Op::Cr8(v) => {
                c.set_cr8(0, v);
                c.cr8(0)
            }
            Op::Wait(time) => {
                self.now = now.saturating_add(time).min(LATEST);
                c.advance(self.now);
                let deadline = c.next_deadline();
                assert!(deadline.is_none_or(|at| at > self.now), "{deadline:?} is due at {} and stays so", self.now);
                deadline.unwrap_or(0) << 1 | u64::from(c.wake())
            }
            // What waits for a CPU has been told since it last did not.
            Op::Acknowledge => (0..usize::from(self.kind.0)).fold(0, |all, cpu| {
                let nmi = c.take_nmi(cpu);
                let pending = c.interrupt_pending(cpu);
                let vector = c.acknowledge(cpu);
                assert_eq!(pending, vector.is_some(), "an interrupt that waits can be taken");
                all << 9 | u64::from(nmi) << 8 | u64::from(vector.unwrap_or(0))
            }),
            Op::Receive(n) => {
                let bytes = [n; 64];
                c.serial_input(&bytes[..usize::from(n & 63)]) as u64
            }
        }
    }
}

/// Any accesses.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let kind = input.u8();
    // Where the state is taken and given to a second machine.
    let halfway = usize::from(input.u8());
    let mut machine = Machine::new((1 + kind % 3, kind & 0x80 != 0));
    let mut second = None;
    for n in 0..MOST {
        if n == halfway {
            second = Some(restored(&machine));
        }
        if input.is_empty() {
            break;
        }
        let op = Op::take(&mut input);
        let came = machine.apply(op);
        if let Some(second) = &mut second {
            assert_eq!(came, second.apply(op), "{op:x?} on a restored chipset");
        }
    }
    let state = machine.chipset.save();
    let second = second.unwrap_or_else(|| restored(&machine));
    assert_eq!(state, second.chipset.save());
}

/// Another machine with the state of this one, which was written and read meanwhile. (The device of hypervisor tests has
/// 64 KiB of memory, and would take most of the time that there is.)
fn restored(machine: &Machine) -> Machine {
    let mut state = machine.chipset.save();
    if !machine.kind.1 {
        let text = serde_json::to_string(&state).expect("a state is plain data");
        state = serde_json::from_str(&text).expect("what was written can be read");
    }
    let mut second = Machine::new(machine.kind);
    second.now = machine.now;
    second.told.clone_from(&machine.told);
    assert_eq!(second.chipset.restore(&state), Ok(()));
    second
}
