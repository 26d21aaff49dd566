//! The ACPI tables by which the guest finds processors, interrupt controllers, timers and power management
//! (ACPI Specification 6.5; section numbers below are its own).
//!
//! Ports and addresses are those of the devices crate; sizes and what has no constant there are said here.

use std::mem::offset_of;

use acpi_tables::Aml;
use acpi_tables::aml::{self, AddressSpaceCacheable};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use diglot_devices::{acpi_pm, chipset, lapic, serial, system_control};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::memory::{ECAM_BASE, ECAM_SIZE, PCI_HOLE_BASE, PCI_HOLE_END};

const LOCAL_APIC: u32 = lapic::DEFAULT_BASE as u32;
const IOAPIC: u32 = chipset::IOAPIC_BASE as u32;
const HPET: u32 = chipset::HPET_BASE as u32;
/// The low half of the HPET's capability register: 8086h, legacy routing, 64 bits wide, three timers, revision 1.
const HPET_ID: u32 = 0x8086_a201;

/// The root pointer is found in 0xe0000–0xfffff on a 16-byte boundary (§5.2.5.1), and the other tables follow it.
const RSDP: u64 = 0xe_0000;
/// Firmware control structure, on a 64-byte boundary (§5.2.10).
const FACS_AT: u64 = RSDP + 64;
const TABLES: u64 = FACS_AT + 64;
const TABLES_END: u64 = 0x10_0000;
const TABLE_ALIGN: u64 = 16;

const OEM: [u8; 6] = *b"DIGLOT";
const OEM_TABLE: [u8; 8] = *b"DIGLOTPC";
const OEM_REVISION: u32 = 1;
const HEADER_LEN: u32 = 36;

/// Why the tables can't be made.
#[derive(Debug, Error)]
pub enum AcpiError {
    /// A machine without processors.
    #[error("ACPI tables for no processor; give the machine at least one")]
    NoCpus,
    /// The tables are longer than the BIOS area.
    #[error("ACPI tables of {0} bytes do not fit the BIOS area; give the machine fewer processors")]
    TooLarge(u64),
    /// Guest RAM is missing.
    #[error("guest memory lacks RAM for the ACPI tables: {0}; give the guest more memory")]
    Ram(#[from] GuestMemoryError),
}

/// Puts tables one behind the other into the BIOS area.
struct Writer<'a> {
    ram: &'a GuestMemoryMmap,
    next: u64,
}

impl Writer<'_> {
    fn add(&mut self, table: &dyn Aml) -> Result<u64, AcpiError> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let at = self.next;
        let end = at + bytes.len() as u64;
        if end > TABLES_END {
            return Err(AcpiError::TooLarge(end - RSDP));
        }
        self.ram.write_slice(&bytes, GuestAddress(at))?;
        self.next = end.next_multiple_of(TABLE_ALIGN);
        Ok(at)
    }
}

/// Where the guest wants to go on in real mode after S3, if it said so (§5.2.10).
pub fn waking_vector(ram: &GuestMemoryMmap) -> Option<u32> {
    /// Beyond these nothing is within the reach of real mode.
    const END: u32 = 0x10_0000;
    let at = GuestAddress(FACS_AT + offset_of!(FACS, waking) as u64);
    ram.read_obj::<u32>(at).ok().filter(|v| *v != 0 && *v < END)
}

/// Writes the tables of a machine with `cpus` processors, whose APIC ids count from 0. Gives the guest physical
/// address of the root pointer.
pub fn write_tables(ram: &GuestMemoryMmap, cpus: u8) -> Result<u64, AcpiError> {
    if cpus == 0 {
        return Err(AcpiError::NoCpus);
    }
    let mut facs = Vec::new();
    FACS::new().to_aml_bytes(&mut facs);
    ram.write_slice(&facs, GuestAddress(FACS_AT))?;

    let mut writer = Writer { ram, next: TABLES };
    let dsdt = writer.add(&dsdt(cpus))?;
    let fadt = writer.add(&fadt(dsdt))?;
    let madt = writer.add(&madt(cpus))?;
    let hpet = writer.add(&hpet())?;
    let mcfg = writer.add(&mcfg())?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    for table in [fadt, madt, hpet, mcfg] {
        xsdt.add_entry(table);
    }
    let xsdt = writer.add(&xsdt)?;

    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    ram.write_slice(&rsdp, GuestAddress(RSDP))?;
    Ok(RSDP)
}

fn io(port: u16, bytes: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bytes * 8, 0, access, port.into())
}

/// Fixed ACPI Description Table (§5.2.9). There is no SMI command port: the machine is always in ACPI mode.
fn fadt(dsdt: u64) -> impl Aml {
    const LEGACY_DEVICES: u16 = 1 << 0;
    const KEYBOARD_8042: u16 = 1 << 1;
    /// The index in CMOS RAM that holds the century, where every PC BIOS keeps it.
    const CENTURY: u8 = 0x32;
    /// Longer than C2 and C3 may take, which says that there are none.
    const NO_C2: u16 = 101;
    const NO_C3: u16 = 1001;

    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .preferred_pm_profile(PmProfile::Desktop)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    // All tables lie below 1 MiB. FACS and DSDT have a 32-bit field for old systems and a 64-bit one; the first
    // serves for the FACS, whose two fields exclude each other.
    fadt.firmware_ctrl = (FACS_AT as u32).into();
    fadt.dsdt = (dsdt as u32).into();
    fadt.x_dsdt = dsdt.into();
    fadt.sci_int = u16::from(acpi_pm::SCI).into();
    fadt.pm1a_evt_blk = u32::from(acpi_pm::PM1A_EVENT).into();
    fadt.pm1_evt_len = 4;
    fadt.x_pm1a_evt_blk = io(acpi_pm::PM1A_EVENT, 4, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(acpi_pm::PM1A_CONTROL).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_cnt_blk = io(acpi_pm::PM1A_CONTROL, 2, AccessSize::WordAccess);
    fadt.pm_tmr_blk = u32::from(acpi_pm::PM_TIMER).into();
    fadt.pm_tmr_len = 4;
    fadt.x_pm_tmr_blk = io(acpi_pm::PM_TIMER, 4, AccessSize::DwordAccess);
    fadt.gpe0_blk = u32::from(acpi_pm::GPE0).into();
    fadt.gpe0_blk_len = 4;
    fadt.x_gpe0_blk = io(acpi_pm::GPE0, 4, AccessSize::ByteAccess);
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    fadt.century = CENTURY;
    fadt.iapc_boot_arch = (LEGACY_DEVICES | KEYBOARD_8042).into();
    fadt.reset_reg = io(system_control::RESET, 1, AccessSize::ByteAccess);
    fadt.reset_value = system_control::RESET_VALUE;
    fadt.finalize()
}

/// Multiple APIC Description Table (§5.2.12).
fn madt(cpus: u8) -> Sdt {
    const REVISION: u8 = 5;
    /// There are two 8259s as well.
    const PCAT_COMPAT: u32 = 1;
    const SOURCE_OVERRIDE: u8 = 2;
    const LOCAL_APIC_NMI: u8 = 4;
    const ISA: u8 = 0;
    /// Polarity and trigger mode: as the bus has it (ISA: edge, high), or level and high.
    const CONFORMS: u16 = 0;
    const LEVEL_HIGH: u16 = 0b1101;
    const ALL_CPUS: u8 = 0xff;
    const LINT1: u8 = 1;

    let mut entries = Vec::new();
    entries.extend(LOCAL_APIC.to_le_bytes());
    entries.extend(PCAT_COMPAT.to_le_bytes());
    for cpu in 0..cpus {
        ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled).to_aml_bytes(&mut entries);
    }
    // The IOAPIC's id need not differ from the local APICs' since they left the common bus, and 0 is what it resets to.
    IoApic::new(0, IOAPIC, 0).to_aml_bytes(&mut entries);
    // The timer is wired to pin 2; the SCI is not what an ISA interrupt is.
    for (irq, gsi, flags) in [(0, 2, CONFORMS), (acpi_pm::SCI, acpi_pm::SCI.into(), LEVEL_HIGH)] {
        entries.extend([SOURCE_OVERRIDE, 10, ISA, irq]);
        entries.extend(u32::to_le_bytes(gsi));
        entries.extend(u16::to_le_bytes(flags));
    }
    entries.extend([LOCAL_APIC_NMI, 6, ALL_CPUS]);
    entries.extend(CONFORMS.to_le_bytes());
    entries.push(LINT1);

    let mut madt = Sdt::new(*b"APIC", HEADER_LEN, REVISION, OEM, OEM_TABLE, OEM_REVISION);
    madt.append_slice(&entries);
    madt
}

/// High Precision Event Timer table (IA-PC HPET Specification 1.0a §3.2.4).
fn hpet() -> Sdt {
    /// The shortest period, in ticks, that loses no interrupt.
    const MINIMUM_TICK: u16 = 128;

    let mut fields = Vec::new();
    fields.extend(HPET_ID.to_le_bytes());
    GAS::new(AddressSpace::SystemMemory, 64, 0, AccessSize::Undefined, HPET.into()).to_aml_bytes(&mut fields);
    fields.push(0);
    fields.extend(MINIMUM_TICK.to_le_bytes());
    fields.push(0);

    let mut hpet = Sdt::new(*b"HPET", HEADER_LEN, 1, OEM, OEM_TABLE, OEM_REVISION);
    hpet.append_slice(&fields);
    hpet
}

/// PCI Express configuration window (PCI Firmware Specification 3.3 §4.1.2).
fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(ECAM_BASE, 0, 0, 0xff);
    mcfg
}

/// Differentiated System Description Table (§5.2.11.1): what can't be found by looking.
fn dsdt(cpus: u8) -> Sdt {
    let mut code = Vec::new();
    pci_root(&mut code);
    board(&mut code);
    // Each processor is declared, by the same number as in the MADT (§8.4).
    for cpu in 0..cpus {
        device(&mut code, &format!("C{cpu:03X}"), &"ACPI0007", cpu, &[]);
    }
    legacy_devices(&mut code);

    let mut dsdt = Sdt::new(*b"DSDT", HEADER_LEN, 2, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&aml::Scope::raw("\\_SB_".into(), code));
    // Sleeping states (§7.4.2); the second value is for a PM1b register, which there is not.
    let mut states = Vec::new();
    for (name, sleep_type) in [("\\_S3_", acpi_pm::SLEEP_TYPE_S3), ("\\_S5_", acpi_pm::SLEEP_TYPE_S5)] {
        let package = aml::Package::new(vec![&sleep_type, &sleep_type]);
        aml::Name::new(name.into(), &package).to_aml_bytes(&mut states);
    }
    dsdt.append_slice(&states);
    dsdt
}

/// A device with its hardware id, number and current resources.
fn device(code: &mut Vec<u8>, name: &str, hid: &dyn Aml, uid: u8, resources: &[&dyn Aml]) {
    let hid = aml::Name::new("_HID".into(), hid);
    let uid = aml::Name::new("_UID".into(), &uid);
    let crs = aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(resources.to_vec()));
    let mut children: Vec<&dyn Aml> = vec![&hid, &uid];
    if !resources.is_empty() {
        children.push(&crs);
    }
    aml::Device::new(name.into(), children).to_aml_bytes(code);
}

/// The PCI Express root bridge, and the windows it decodes.
fn pci_root(code: &mut Vec<u8>) {
    let memory = |start: u64, end: u64| {
        let last = (end - 1) as u32;
        aml::AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, start as u32, last, None)
    };
    let hid = aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0A08"));
    let cid = aml::Name::new("_CID".into(), &aml::EISAName::new("PNP0A03"));
    let uid = aml::Name::new("_UID".into(), &0u8);
    let bbn = aml::Name::new("_BBN".into(), &0u8);
    let crs = aml::Name::new(
        "_CRS".into(),
        &aml::ResourceTemplate::new(vec![
            &aml::AddressSpace::new_bus_number(0u16, 0xff),
            &aml::AddressSpace::new_io(0u16, 0xcf7, None),
            &aml::IO::new(0xcf8, 0xcf8, 1, 8),
            &aml::AddressSpace::new_io(0xd00u16, 0xffff, None),
            &memory(0xa_0000, 0xc_0000),
            &memory(PCI_HOLE_BASE, PCI_HOLE_END),
        ]),
    );
    aml::Device::new("PCI0".into(), vec![&hid, &cid, &uid, &bbn, &crs]).to_aml_bytes(code);
}

/// What belongs to the board and to no driver: the configuration window, as the PCI Firmware Specification §4.1.2
/// wants it, and the power management ports.
fn board(code: &mut Vec<u8>) {
    device(
        code,
        "MBRD",
        &aml::EISAName::new("PNP0C02"),
        0,
        &[
            &aml::Memory32Fixed::new(true, ECAM_BASE as u32, ECAM_SIZE as u32),
            &aml::IO::new(acpi_pm::PM1A_EVENT, acpi_pm::PM1A_EVENT, 1, 12),
            &aml::IO::new(acpi_pm::GPE0, acpi_pm::GPE0, 1, 4),
        ],
    );
}

/// The devices of the ISA bus.
fn legacy_devices(code: &mut Vec<u8>) {
    let port = |base: u16, len: u8| aml::IO::new(base, base, 1, len);
    let irq = |number: u32| aml::Interrupt::new(true, true, false, false, number);
    device(code, "COM1", &aml::EISAName::new("PNP0501"), 1, &[&port(serial::COM1, 8), &irq(4)]);
    device(code, "RTC_", &aml::EISAName::new("PNP0B00"), 0, &[&port(0x70, 2), &irq(8)]);
    device(code, "KBD_", &aml::EISAName::new("PNP0303"), 0, &[&port(0x60, 1), &port(0x64, 1), &irq(1)]);
    let registers = aml::Memory32Fixed::new(true, HPET, 0x400);
    device(code, "HPET", &aml::EISAName::new("PNP0103"), 0, &[&registers]);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn ram() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).expect("2 MiB")
    }

    fn read(ram: &GuestMemoryMmap, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        ram.read_slice(&mut bytes, GuestAddress(at)).expect("in RAM");
        bytes
    }

    fn word(bytes: &[u8], at: usize) -> u64 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes")).into()
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, b| sum.wrapping_add(*b))
    }

    /// All tables that the root pointer leads to, with their checksums verified.
    fn tables(ram: &GuestMemoryMmap, rsdp: u64) -> BTreeMap<String, Vec<u8>> {
        let table = |at: u64| {
            let bytes = read(ram, at, word(&read(ram, at, 36), 4) as usize);
            assert_eq!(at % TABLE_ALIGN, 0);
            assert_eq!(sum(&bytes), 0, "checksum of {:?}", &bytes[..4]);
            bytes
        };
        let root = read(ram, rsdp, 36);
        assert_eq!((&root[..8], sum(&root[..20]), sum(&root)), (&b"RSD PTR "[..], 0, 0));
        let xsdt = table(word(&root, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        let mut all: Vec<Vec<u8>> = xsdt[36..].chunks(8).map(|entry| table(word(entry, 0))).collect();
        all.push(table(word(&all[0], 40)));
        all.into_iter().map(|t| (String::from_utf8_lossy(&t[..4]).into_owned(), t)).collect()
    }

    #[test]
    fn every_table_is_found_and_sums_to_zero() {
        for cpus in [1, 2, 64, 255] {
            let ram = ram();
            let rsdp = write_tables(&ram, cpus).expect("tables");
            assert!((0xe_0000..0x10_0000).contains(&rsdp) && rsdp.is_multiple_of(16));
            let tables = tables(&ram, rsdp);
            assert_eq!(tables.keys().collect::<Vec<_>>(), ["APIC", "DSDT", "FACP", "HPET", "MCFG"]);
        }
        assert!(matches!(write_tables(&ram(), 0), Err(AcpiError::NoCpus)));
    }

    #[test]
    fn fields_are_where_the_specification_puts_them() {
        let ram = ram();
        let rsdp = write_tables(&ram, 3).expect("tables");
        let tables = tables(&ram, rsdp);
        let fadt = &tables["FACP"];
        assert_eq!((fadt.len(), fadt[8]), (276, 6));
        assert_eq!(word(fadt, 36) % 64, 0);
        assert_eq!(read(&ram, word(fadt, 36), 4), b"FACS");
        assert_eq!(word(fadt, 40), word(fadt, 140));
        assert_eq!((fadt[46], word(fadt, 48)), (9, 0), "SCI, no SMI command");
        let blocks: Vec<u64> = [56, 64, 76, 80].map(|at| word(fadt, at)).to_vec();
        assert_eq!(blocks, [0x600, 0x604, 0x608, 0x620]);
        assert_eq!([fadt[88], fadt[89], fadt[91], fadt[92]], [4, 2, 4, 4]);
        assert_eq!(fadt[109], 3, "legacy devices and 8042");
        assert_eq!(word(fadt, 112), 0b101_0111_0101);
        assert_eq!(fadt[116..129], [1, 8, 0, 1, 0xf9, 0xc, 0, 0, 0, 0, 0, 0, 6]);

        let madt = &tables["APIC"];
        assert_eq!((word(madt, 36), word(madt, 40)), (0xfee0_0000, 1));
        assert_eq!(madt[44..52], [0, 8, 0, 0, 1, 0, 0, 0]);
        assert_eq!(madt[60..68], [0, 8, 2, 2, 1, 0, 0, 0]);
        assert_eq!(madt[68..80], [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
        assert_eq!(madt[80..90], [2, 10, 0, 0, 2, 0, 0, 0, 0, 0]);
        assert_eq!(madt[90..100], [2, 10, 0, 9, 9, 0, 0, 0, 0xd, 0]);
        assert_eq!(madt[100..], [4, 6, 0xff, 0, 0, 1]);

        let hpet = &tables["HPET"];
        assert_eq!((hpet.len(), word(hpet, 36), word(hpet, 44)), (56, 0x8086_a201, 0xfed0_0000));
        let mcfg = &tables["MCFG"];
        assert_eq!((mcfg.len(), word(mcfg, 44), mcfg[54], mcfg[55]), (60, ECAM_BASE, 0, 255));

        let s5 = [&b"\x08\\_S5_\x12"[..], &[6, 2, 0x0a, 5, 0x0a, 5]].concat();
        assert!(tables["DSDT"].ends_with(&s5));
    }

    #[test]
    fn tables_need_ram() {
        let small = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x8_0000)]).expect("512 KiB");
        assert!(matches!(write_tables(&small, 1), Err(AcpiError::Ram(_))));
    }
}
