//! The local APIC in xAPIC and x2APIC mode (SDM vol. 3 chapter 11).

use serde::{Deserialize, Serialize};

use crate::bus::{Nanos, scale, scale_up};

/// Frequency of the timer's input clock.
pub const TIMER_HZ: u64 = 1_000_000_000;
/// Where a local APIC answers after RESET.
pub const DEFAULT_BASE: u64 = 0xfee0_0000;
const NANOS: u64 = 1_000_000_000;

/// IA32_APIC_BASE bits.
mod base {
    pub const BSP: u64 = 1 << 8;
    pub const X2APIC: u64 = 1 << 10;
    pub const ENABLE: u64 = 1 << 11;
    pub const ADDRESS: u64 = 0x3fff_ffff_f000;
}

/// Register numbers: MMIO offset divided by 16, which is also the x2APIC MSR number minus 800h.
mod reg {
    pub const ID: u32 = 0x02;
    pub const VERSION: u32 = 0x03;
    pub const TPR: u32 = 0x08;
    pub const PPR: u32 = 0x0a;
    pub const EOI: u32 = 0x0b;
    pub const LDR: u32 = 0x0d;
    pub const DFR: u32 = 0x0e;
    pub const SVR: u32 = 0x0f;
    pub const ISR: u32 = 0x10;
    pub const TMR: u32 = 0x18;
    pub const IRR: u32 = 0x20;
    pub const ESR: u32 = 0x28;
    pub const ICR_LOW: u32 = 0x30;
    pub const ICR_HIGH: u32 = 0x31;
    pub const LVT_TIMER: u32 = 0x32;
    pub const LVT_ERROR: u32 = 0x37;
    pub const TIMER_INITIAL: u32 = 0x38;
    pub const TIMER_CURRENT: u32 = 0x39;
    pub const TIMER_DIVIDE: u32 = 0x3e;
    pub const SELF_IPI: u32 = 0x3f;
}

/// LVT entries in register order from the timer: timer, thermal, performance, LINT0, LINT1, error.
const LVT_COUNT: usize = 6;
const LVT_LINT0: usize = 3;
const LVT_LINT1: usize = 4;
const LVT_ERROR: usize = 5;
const MASKED: u32 = 1 << 16;

/// An interprocessor interrupt on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipi {
    /// Vector.
    pub vector: u8,
    /// Delivery mode (0 fixed, 1 lowest priority, 4 NMI, 5 INIT, 6 start-up).
    pub mode: u8,
    /// Destination shorthand: 0 none, 1 self, 2 all, 3 all but self.
    pub shorthand: u8,
    /// Whether the destination is logical.
    pub logical: bool,
    /// Destination, 8 bits in xAPIC and 32 in x2APIC mode.
    pub destination: u32,
}

/// The time, and the guest's time-stamp counter then.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// The time.
    pub now: Nanos,
    /// The time-stamp counter.
    pub tsc: u64,
    /// Its frequency.
    pub tsc_hz: u64,
}

/// A local APIC's state as its register page, in the form that other implementations understand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// IA32_APIC_BASE.
    pub base: u64,
    /// Register n, which is at offset 16 n. The current count is as of now.
    pub registers: [u32; 64],
    /// IA32_TSC_DEADLINE.
    pub tsc_deadline: u64,
    /// Whether a non-maskable interrupt waits.
    pub nmi: bool,
    /// What the CPU does.
    pub startup: Startup,
}

/// What a CPU does, as far as INIT and start-up IPIs say (SDM vol. 3 §9.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Startup {
    /// It runs.
    Runs,
    /// It has been reset by INIT, and waits.
    Waits,
    /// It is to begin at this page in real mode: address 1000h times as much.
    Begins(u8),
}

/// What a register write asks of the chipset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// End of a level-triggered interrupt, for the I/O APICs.
    Eoi(u8),
    /// Send an interprocessor interrupt.
    Ipi(Ipi),
}

/// A 256-bit register as IRR, ISR and TMR are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Bits([u32; 8]);

impl Bits {
    fn set(&mut self, v: u8) {
        self.0[usize::from(v >> 5)] |= 1 << (v & 31);
    }
    fn clear(&mut self, v: u8) {
        self.0[usize::from(v >> 5)] &= !(1 << (v & 31));
    }
    fn has(&self, v: u8) -> bool {
        self.0[usize::from(v >> 5)] >> (v & 31) & 1 != 0
    }
    fn highest(&self) -> Option<u8> {
        (0..8u8)
            .rev()
            .find(|&k| self.0[usize::from(k)] != 0)
            .map(|k| k * 32 + 31 - self.0[usize::from(k)].leading_zeros() as u8)
    }
}

/// A local APIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lapic {
    id: u32,
    apic_base: u64,
    tpr: u8,
    svr: u32,
    ldr: u32,
    dfr: u32,
    isr: Bits,
    tmr: Bits,
    irr: Bits,
    esr: u32,
    /// Errors since ESR was last written.
    errors: u32,
    icr: u64,
    lvt: [u32; LVT_COUNT],
    divide: u32,
    initial: u32,
    /// When the timer fires next, and the count reaches 0.
    expiry: Option<Nanos>,
    tsc_deadline: u64,
    nmi: bool,
    startup: Startup,
}

impl Lapic {
    /// APIC number `id`, as firmware leaves it: enabled, LINT0 as ExtINT (on the boot CPU), LINT1 as NMI.
    pub fn new(id: u8) -> Lapic {
        let bsp = if id == 0 { base::BSP } else { 0 };
        let mut lvt = [MASKED; LVT_COUNT];
        lvt[LVT_LINT0] = if id == 0 { 0x700 } else { MASKED | 0x700 };
        lvt[LVT_LINT1] = 0x400;
        Lapic {
            id: u32::from(id),
            apic_base: DEFAULT_BASE | base::ENABLE | bsp,
            tpr: 0,
            svr: 0x1ff,
            ldr: 0,
            dfr: u32::MAX,
            isr: Bits::default(),
            tmr: Bits::default(),
            irr: Bits::default(),
            esr: 0,
            errors: 0,
            icr: 0,
            lvt,
            divide: 0,
            initial: 0,
            expiry: None,
            tsc_deadline: 0,
            nmi: false,
            startup: Startup::Runs,
        }
    }

    /// Whether IA32_APIC_BASE enables the APIC.
    pub fn enabled(&self) -> bool {
        self.apic_base & base::ENABLE != 0
    }

    fn x2apic(&self) -> bool {
        self.apic_base & base::X2APIC != 0
    }

    fn software_enabled(&self) -> bool {
        self.enabled() && self.svr & 0x100 != 0
    }

    /// The base of the register page while it is mapped.
    pub fn mmio_base(&self) -> Option<u64> {
        (self.enabled() && !self.x2apic()).then_some(self.apic_base & base::ADDRESS)
    }

    /// CR8: task priority bits 7:4.
    pub fn cr8(&self) -> u64 {
        u64::from(self.tpr >> 4)
    }

    /// Writes CR8.
    pub fn set_cr8(&mut self, v: u64) {
        self.tpr = (v as u8 & 15) << 4;
    }

    fn ppr(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0) & 0xf0;
        if self.tpr >> 4 >= in_service >> 4 { self.tpr } else { in_service }
    }

    /// The vector that would be delivered now.
    pub fn pending(&self) -> Option<u8> {
        self.irr.highest().filter(|v| self.software_enabled() && v >> 4 > self.ppr() >> 4)
    }

    /// Whether the 8259's INTR reaches the CPU: through LINT0 as ExtINT, or directly with the APIC disabled.
    pub fn accepts_extint(&self) -> bool {
        !self.enabled() || (self.lvt[LVT_LINT0] & (MASKED | 0x700) == 0x700)
    }

    /// Takes the pending vector into service.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let v = self.pending()?;
        self.irr.clear(v);
        self.isr.set(v);
        Some(v)
    }

    /// Accepts an interrupt message, if the APIC is enabled; `level` sets the trigger-mode bit.
    pub fn accept(&mut self, vector: u8, level: bool) -> bool {
        if vector < 16 {
            self.error(1 << 6);
            return true;
        }
        if !self.software_enabled() {
            return false;
        }
        self.irr.set(vector);
        if level {
            self.tmr.set(vector)
        } else {
            self.tmr.clear(vector)
        }
        true
    }

    /// Latches a non-maskable interrupt.
    pub fn accept_nmi(&mut self) {
        self.nmi = true;
    }

    /// Whether a non-maskable interrupt is latched.
    pub fn nmi_pending(&self) -> bool {
        self.nmi
    }

    /// Takes a latched non-maskable interrupt.
    pub fn take_nmi(&mut self) -> bool {
        std::mem::take(&mut self.nmi)
    }

    /// Whether a message with this destination is for this APIC (SDM vol. 3 §11.6.2).
    pub fn is_destination(&self, logical: bool, destination: u32) -> bool {
        if self.x2apic() {
            if !logical {
                return destination == self.id || destination == u32::MAX;
            }
            let ldr = self.x2apic_ldr();
            return destination == u32::MAX || (destination >> 16 == ldr >> 16 && destination & ldr & 0xffff != 0);
        }
        if !logical {
            return destination & 0xff == self.id || destination & 0xff == 0xff;
        }
        let (d, l) = (destination & 0xff, self.ldr >> 24);
        if self.dfr >> 28 == 0xf { d & l != 0 } else { d == 0xff || (d >> 4 == l >> 4 && d & l & 15 != 0) }
    }

    fn x2apic_ldr(&self) -> u32 {
        (self.id >> 4) << 16 | 1 << (self.id & 15)
    }

    fn error(&mut self, bit: u32) {
        self.errors |= bit;
        let lvt = self.lvt[LVT_ERROR];
        // An error about the error vector itself would never end.
        if lvt & MASKED == 0 && lvt as u8 >= 16 {
            self.accept(lvt as u8, false);
        }
    }

    // ---- timer ----

    fn divisor(&self) -> u64 {
        // Bits 3, 1:0 encode 2, 4, ..., 128, and 1 as the last.
        let code = self.divide & 3 | self.divide >> 1 & 4;
        1 << ((code + 1) & 7)
    }

    fn timer_mode(&self) -> u32 {
        self.lvt[0] >> 17 & 3
    }

    /// How long the timer takes to count `ticks`.
    fn duration(&self, ticks: u32) -> Nanos {
        scale_up(u64::from(ticks) * self.divisor(), NANOS, TIMER_HZ).max(1)
    }

    /// Counts down from `ticks`, of which 0 stop the timer.
    fn start(&mut self, ticks: u32, now: Nanos) {
        self.expiry = (ticks != 0).then(|| now.saturating_add(self.duration(ticks)));
    }

    fn current(&self, now: Nanos) -> u32 {
        let Some(at) = self.expiry.filter(|_| self.timer_mode() < 2) else { return 0 };
        scale(at.saturating_sub(now), TIMER_HZ, NANOS).div_ceil(self.divisor()) as u32
    }

    /// Fires the timer if it is due. Missed periods make one interrupt.
    pub fn advance(&mut self, now: Nanos) {
        let Some(at) = self.expiry.filter(|&at| at <= now) else { return };
        self.expiry = None;
        match self.timer_mode() {
            1 => {
                let period = self.duration(self.initial);
                let missed = (now - at) / period;
                self.expiry = Some((at + missed * period).saturating_add(period));
            }
            2 => self.tsc_deadline = 0,
            _ => {}
        }
        if self.lvt[0] & MASKED == 0 {
            self.accept(self.lvt[0] as u8, false);
        }
    }

    /// When the timer fires next.
    pub fn next_event(&self) -> Option<Nanos> {
        self.expiry
    }

    // ---- registers ----

    /// Reads the register page.
    pub fn mmio_read(&mut self, offset: u64, now: Nanos) -> u32 {
        if offset & 15 != 0 {
            return 0;
        }
        match (offset >> 4) as u32 {
            reg::ID => self.id << 24,
            n => self.read(n, now).unwrap_or_else(|| {
                self.error(1 << 7);
                0
            }),
        }
    }

    /// Writes the register page.
    pub fn mmio_write(&mut self, offset: u64, v: u32, now: Nanos) -> Effect {
        if offset & 15 != 0 {
            return Effect::None;
        }
        match (offset >> 4) as u32 {
            reg::ID => Effect::None,
            reg::LDR => {
                self.ldr = v & 0xff00_0000;
                Effect::None
            }
            reg::DFR => {
                self.dfr = v | 0x0fff_ffff;
                Effect::None
            }
            reg::ICR_HIGH => {
                self.icr = self.icr & 0xffff_ffff | u64::from(v) << 32;
                Effect::None
            }
            reg::ICR_LOW => {
                self.icr = self.icr & !0xffff_ffff | u64::from(v & !(1 << 12));
                self.send(v, (self.icr >> 56) as u32)
            }
            n => self.write(n, v, now).unwrap_or_else(|| {
                self.error(1 << 7);
                Effect::None
            }),
        }
    }

    fn read(&self, n: u32, now: Nanos) -> Option<u32> {
        Some(match n {
            // Version 14h, as KVM's, six LVT entries, EOI-broadcast suppression absent.
            reg::VERSION => 0x14 | (LVT_COUNT as u32 - 1) << 16,
            reg::TPR => u32::from(self.tpr),
            reg::PPR => u32::from(self.ppr()),
            reg::EOI => 0,
            reg::LDR => {
                if self.x2apic() {
                    self.x2apic_ldr()
                } else {
                    self.ldr
                }
            }
            reg::DFR if !self.x2apic() => self.dfr,
            reg::SVR => self.svr,
            reg::ISR..=0x17 => self.isr.0[(n - reg::ISR) as usize],
            reg::TMR..=0x1f => self.tmr.0[(n - reg::TMR) as usize],
            reg::IRR..=0x27 => self.irr.0[(n - reg::IRR) as usize],
            reg::ESR => self.esr,
            reg::ICR_LOW => self.icr as u32,
            reg::ICR_HIGH if !self.x2apic() => (self.icr >> 32) as u32,
            reg::LVT_TIMER..=reg::LVT_ERROR => self.lvt[(n - reg::LVT_TIMER) as usize],
            reg::TIMER_INITIAL => self.initial,
            reg::TIMER_CURRENT => self.current(now),
            reg::TIMER_DIVIDE => self.divide,
            _ => return None,
        })
    }

    fn write(&mut self, n: u32, v: u32, now: Nanos) -> Option<Effect> {
        match n {
            reg::TPR => self.tpr = v as u8,
            reg::EOI => return Some(self.end_of_interrupt()),
            reg::SVR => {
                self.svr = v & 0x1ff;
                if v & 0x100 == 0 {
                    self.lvt.iter_mut().for_each(|l| *l |= MASKED);
                }
            }
            reg::ESR => {
                self.esr = std::mem::take(&mut self.errors);
            }
            reg::LVT_TIMER..=reg::LVT_ERROR => self.write_lvt((n - reg::LVT_TIMER) as usize, v),
            reg::TIMER_INITIAL => {
                if self.timer_mode() != 2 {
                    self.initial = v;
                    self.start(v, now);
                }
            }
            reg::TIMER_DIVIDE => {
                let rest = self.current(now);
                self.divide = v & 0xb;
                if self.timer_mode() < 2 {
                    self.start(rest, now);
                }
            }
            _ => return None,
        }
        Some(Effect::None)
    }

    /// The bits of an LVT entry that can be written.
    fn lvt_mask(k: usize) -> u32 {
        match k {
            0 => 0x0006_00ff | MASKED,
            LVT_LINT0 | LVT_LINT1 => 0x0001_a7ff,
            LVT_ERROR => 0x0001_00ff,
            _ => 0x0001_07ff,
        }
    }

    fn write_lvt(&mut self, k: usize, v: u32) {
        let old_mode = self.timer_mode();
        self.lvt[k] = v & Lapic::lvt_mask(k) | if self.software_enabled() { 0 } else { MASKED };
        // Changing to or from deadline mode disarms the timer (SDM vol. 3 §11.5.4.1). Between the other two the count
        // goes on, and the mode decides what happens at its end.
        if (old_mode == 2) != (self.timer_mode() == 2) {
            self.expiry = None;
            self.tsc_deadline = 0;
            self.initial = 0;
        }
    }

    fn end_of_interrupt(&mut self) -> Effect {
        let Some(v) = self.isr.highest() else { return Effect::None };
        self.isr.clear(v);
        if self.tmr.has(v) { Effect::Eoi(v) } else { Effect::None }
    }

    fn send(&mut self, low: u32, destination: u32) -> Effect {
        const INIT: u32 = 5 << 8;
        let (asserts, level) = (low & 1 << 14 != 0, low & 1 << 15 != 0);
        // The end of an INIT, which today's processors have no use for (SDM vol. 3 §11.6.1).
        if low & 7 << 8 == INIT && level && !asserts {
            return Effect::None;
        }
        Effect::Ipi(Ipi {
            vector: low as u8,
            mode: (low >> 8 & 7) as u8,
            shorthand: (low >> 18 & 3) as u8,
            logical: low >> 11 & 1 != 0,
            destination,
        })
    }

    /// Reads an MSR of the APIC; `None` raises #GP.
    pub fn msr_read(&mut self, msr: u32, now: Nanos) -> Option<u64> {
        match msr {
            0x1b => Some(self.apic_base),
            0x6e0 => Some(if self.timer_mode() == 2 { self.tsc_deadline } else { 0 }),
            0x830 if self.x2apic() => Some(self.icr),
            0x802 if self.x2apic() => Some(u64::from(self.id)),
            0x800..=0x8ff if self.x2apic() => self.read(msr - 0x800, now).filter(|_| msr != 0x80b).map(u64::from),
            _ => None,
        }
    }

    /// Writes an MSR of the APIC; `None` raises #GP.
    pub fn msr_write(&mut self, msr: u32, v: u64, clock: Clock) -> Option<Effect> {
        let now = clock.now;
        match msr {
            0x1b => self.write_base(v)?,
            0x6e0 => {
                if self.timer_mode() == 2 {
                    self.set_deadline(v, clock);
                }
            }
            0x830 if self.x2apic() => {
                self.icr = v & !(1 << 12);
                return Some(self.send(v as u32, (v >> 32) as u32));
            }
            0x83f if self.x2apic() => _ = self.accept(u8::try_from(v).ok()?, false),
            0x800..=0x8ff if self.x2apic() => {
                let n = msr - 0x800;
                // Reserved bits, and read-only registers, raise #GP; EOI and ESR take only zero.
                if v >> 32 != 0 || ((n == reg::EOI || n == reg::ESR) && v != 0) || n == reg::SELF_IPI {
                    return None;
                }
                return self.write(n, v as u32, now);
            }
            _ => return None,
        }
        Some(Effect::None)
    }

    /// Sets the time-stamp at which the timer fires; 0 stops it.
    fn set_deadline(&mut self, deadline: u64, clock: Clock) {
        self.tsc_deadline = deadline;
        let wait = scale_up(deadline.saturating_sub(clock.tsc), NANOS, clock.tsc_hz);
        self.expiry = (deadline != 0).then(|| clock.now.saturating_add(wait));
    }

    /// The register page, for a local APIC elsewhere to go on with.
    pub fn page(&self, now: Nanos) -> Page {
        let mut registers = [0; 64];
        for (n, register) in (0..).zip(&mut registers) {
            *register = self.read(n, now).unwrap_or(0);
        }
        registers[reg::ID as usize] = if self.x2apic() { self.id } else { self.id << 24 };
        registers[reg::ICR_HIGH as usize] = (self.icr >> 32) as u32;
        Page { base: self.apic_base, registers, tsc_deadline: self.tsc_deadline, nmi: self.nmi, startup: self.startup }
    }

    /// APIC number `id` with the registers of another. Bits that this one does not have read as zero afterwards.
    pub fn from_page(id: u8, page: &Page, clock: Clock) -> Lapic {
        let r = |n: u32| page.registers[n as usize];
        let bits = |first: u32| Bits(std::array::from_fn(|k| r(first + k as u32)));
        let mut lapic = Lapic {
            apic_base: page.base,
            tpr: r(reg::TPR) as u8,
            svr: r(reg::SVR) & 0x1ff,
            ldr: r(reg::LDR) & 0xff00_0000,
            dfr: r(reg::DFR) | 0x0fff_ffff,
            isr: bits(reg::ISR),
            tmr: bits(reg::TMR),
            irr: bits(reg::IRR),
            esr: r(reg::ESR),
            icr: u64::from(r(reg::ICR_HIGH)) << 32 | u64::from(r(reg::ICR_LOW) & !(1 << 12)),
            lvt: std::array::from_fn(|k| r(reg::LVT_TIMER + k as u32) & Lapic::lvt_mask(k)),
            divide: r(reg::TIMER_DIVIDE) & 0xb,
            initial: r(reg::TIMER_INITIAL),
            nmi: page.nmi,
            startup: page.startup,
            ..Lapic::new(id)
        };
        match lapic.timer_mode() {
            2 => lapic.set_deadline(page.tsc_deadline, clock),
            // A periodic one that stands at 0 is about to fire, and has not begun anew.
            1 if lapic.initial != 0 => lapic.start(r(reg::TIMER_CURRENT).max(1), clock.now),
            _ => lapic.start(r(reg::TIMER_CURRENT), clock.now),
        }
        lapic
    }

    /// Mode changes of IA32_APIC_BASE (SDM vol. 3 §11.12.5): x2APIC is entered from xAPIC and left by disabling.
    fn write_base(&mut self, v: u64) -> Option<()> {
        let known = base::ADDRESS | base::BSP | base::X2APIC | base::ENABLE;
        let (enable, x2) = (v & base::ENABLE != 0, v & base::X2APIC != 0);
        let legal = match (self.enabled(), self.x2apic()) {
            (true, true) => enable == x2,
            (true, false) => enable || !x2,
            _ => !x2,
        };
        if v & !known != 0 || !legal {
            return None;
        }
        let was_enabled = self.enabled();
        self.apic_base = v & !base::BSP | self.apic_base & base::BSP;
        if was_enabled && !enable {
            let fresh = Lapic::new(self.id as u8);
            let (apic_base, startup) = (self.apic_base, self.startup);
            *self = Lapic { apic_base, svr: 0xff, lvt: [MASKED; LVT_COUNT], startup, ..fresh };
        }
        Some(())
    }

    /// INIT: everything but the identity and the base register is reset, and the CPU waits.
    pub fn init(&mut self) {
        let fresh = Lapic::new(self.id as u8);
        let (apic_base, startup) = (self.apic_base, Startup::Waits);
        *self = Lapic { apic_base, svr: 0xff, lvt: [MASKED; LVT_COUNT], startup, ..fresh };
    }

    /// What the CPU does.
    pub fn startup(&self) -> Startup {
        self.startup
    }

    /// A start-up IPI, which a CPU that runs ignores; says whether it does not.
    pub fn start_up(&mut self, page: u8) -> bool {
        let waits = self.startup == Startup::Waits;
        if waits {
            self.startup = Startup::Begins(page);
        }
        waits
    }

    /// The CPU begins at a page, unless it is to do something else by now: an INIT that came between is not lost.
    pub fn begun(&mut self, page: u8) {
        if self.startup == Startup::Begins(page) {
            self.startup = Startup::Runs;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(tsc: u64, now: Nanos) -> Clock {
        Clock { now, tsc, tsc_hz: 1_000_000_000 }
    }

    /// What has been through a page goes on as before, in each mode of the timer and of the APIC.
    #[test]
    fn a_page_holds_the_state() {
        let mut a = Lapic::new(0);
        a.mmio_write(0x3e0, 3, 0);
        a.mmio_write(0x80, 0x20, 0);
        a.mmio_write(0xd0, 1 << 24, 0);
        a.accept(0x51, true);
        a.accept(0x62, false);
        assert_eq!(a.acknowledge(), Some(0x62));
        a.accept_nmi();
        for mode in [0, 1 << 17, 2 << 17] {
            a.mmio_write(0x320, 0x30 | mode, 1000);
            a.mmio_write(0x380, 500, 1000);
            a.msr_write(0x6e0, 9000, at(1000, 1000));
            let b = Lapic::from_page(0, &a.page(1320), at(1320, 1320));
            assert_eq!(b, a, "mode {mode:#x}");
        }
        assert!(a.msr_write(0x1b, a.apic_base | base::X2APIC, at(0, 0)).is_some());
        let page = a.page(2000);
        assert_eq!((page.registers[2], page.registers[0xd]), (0, 1));
        assert_eq!(Lapic::from_page(0, &page, at(2000, 2000)).page(2000), page);
    }

    /// Deadlines are in ticks of the guest's own clock.
    #[test]
    fn a_deadline_is_in_ticks_of_the_time_stamp_counter() {
        let mut a = Lapic::new(0);
        a.mmio_write(0x320, 0x30 | 2 << 17, 0);
        a.msr_write(0x6e0, 5000, Clock { now: 100, tsc: 2000, tsc_hz: 3_000_000_000 });
        assert_eq!(a.next_event(), Some(1100));
    }

    #[test]
    fn priority_and_eoi() {
        let mut a = Lapic::new(0);
        a.accept(0x41, false);
        a.accept(0x52, true);
        assert_eq!(a.acknowledge(), Some(0x52));
        assert_eq!(a.acknowledge(), None, "41h is of lower class than what is in service");
        assert_eq!(a.mmio_write(0xb0, 0, 0), Effect::Eoi(0x52));
        a.set_cr8(4);
        assert_eq!(a.pending(), None);
        a.set_cr8(3);
        assert_eq!(a.acknowledge(), Some(0x41));
        assert_eq!(a.mmio_write(0xb0, 0, 0), Effect::None);
    }

    #[test]
    fn timer_modes() {
        let mut a = Lapic::new(0);
        a.mmio_write(0x3e0, 0xb, 0); // divide by 1
        a.mmio_write(0x320, 0x30, 0); // one-shot
        a.mmio_write(0x380, 1000, 0);
        assert_eq!(a.mmio_read(0x390, 400), 600);
        assert_eq!(a.next_event(), Some(1000));
        a.advance(1000);
        assert_eq!((a.acknowledge(), a.next_event()), (Some(0x30), None));
        a.mmio_write(0xb0, 0, 0);
        a.mmio_write(0x320, 0x30 | 1 << 17, 1000);
        a.mmio_write(0x380, 100, 1000);
        a.advance(1_000_000);
        assert_eq!((a.acknowledge(), a.next_event()), (Some(0x30), Some(1_000_100)));
        a.mmio_write(0xb0, 0, 0);
        a.mmio_write(0x320, 0x30 | 2 << 17, 0);
        assert!(a.msr_write(0x6e0, 5000, at(4000, 100)).is_some());
        assert_eq!(a.next_event(), Some(1100));
        a.advance(1100);
        assert_eq!((a.acknowledge(), a.msr_read(0x6e0, 0)), (Some(0x30), Some(0)));
    }

    /// The count neither restarts nor stops when one-shot becomes periodic or the other way round; a finished one stays
    /// finished. A new divisor changes its rate, not its value.
    #[test]
    fn the_count_outlives_changes_of_mode_and_rate() {
        let (one_shot, periodic) = (0x30, 0x30 | 1 << 17);
        let mut a = Lapic::new(0);
        a.mmio_write(0x3e0, 0xb, 0); // divide by 1
        a.mmio_write(0x320, one_shot, 0);
        a.mmio_write(0x380, 1000, 0);
        a.mmio_write(0x320, periodic, 700);
        assert_eq!((a.mmio_read(0x390, 700), a.next_event()), (300, Some(1000)));
        a.advance(1000);
        assert_eq!((a.mmio_read(0x390, 1000), a.next_event()), (1000, Some(2000)));
        a.mmio_write(0x3e0, 0, 1500); // divide by 2
        assert_eq!((a.mmio_read(0x390, 1500), a.mmio_read(0x390, 1700), a.next_event()), (500, 400, Some(2500)));
        a.mmio_write(0x320, one_shot, 1800);
        a.advance(2500);
        assert_eq!((a.mmio_read(0x390, 2500), a.next_event()), (0, None));
        a.mmio_write(0x320, periodic, 2600);
        assert_eq!((a.mmio_read(0x390, 2600), a.mmio_read(0x380, 2600), a.next_event()), (0, 1000, None));
    }

    #[test]
    fn mode_changes() {
        let mut a = Lapic::new(0);
        assert_eq!(a.msr_read(0x802, 0), None, "x2APIC registers need x2APIC mode");
        let b = a.msr_read(0x1b, 0).unwrap_or_default();
        assert!(a.msr_write(0x1b, b | 1 << 10, at(0, 0)).is_some());
        assert_eq!((a.msr_read(0x802, 0), a.mmio_base()), (Some(0), None));
        assert!(a.msr_write(0x1b, b, at(0, 0)).is_none(), "back to xAPIC only through disabled");
        assert!(a.msr_write(0x80b, 1, at(0, 0)).is_none());
        assert!(a.msr_write(0x83f, 0x141, at(0, 0)).is_none(), "reserved bits of the self-IPI register");
        assert!(a.msr_write(0x83f, 0x41, at(0, 0)).is_some());
        assert_eq!(a.acknowledge(), Some(0x41));
    }
}
