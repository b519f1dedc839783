//! ACPI tables: as few as Linux needs to find its CPUs, its PCI bus and the way to end.
//!
//! The machine is hardware-reduced (ACPI 6.5 §4.1): no PM timer, no SCI, no fixed events. Powering off and resetting
//! are one write each to an I/O port.

use acpi_tables::aml::{AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name};
use acpi_tables::aml::{Package, Path, ResourceTemplate, Scope};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::memory::{ACPI_TABLES, DOORBELL_BARS, ECAM, ECAM_BYTES, PCI_WINDOW, PCI_WINDOW_BYTES, REGISTER_BARS};

/// I/O port of the sleep control register (ACPI 6.5 §4.8.3.7).
pub const SLEEP_CONTROL: u16 = 0x600;
/// I/O port of the sleep status register; reads as zero.
pub const SLEEP_STATUS: u16 = 0x601;
/// I/O port of the reset register.
pub const RESET: u16 = 0x602;
/// What the guest writes to [`RESET`].
pub const RESET_VALUE: u8 = 1;
/// Sleep type of S5 in \_S5 and in the sleep control register.
const S5: u8 = 5;
/// What the guest writes to [`SLEEP_CONTROL`] to power off: SLP_TYP in bits 2 to 4, SLP_EN in bit 5.
pub const POWER_OFF: u8 = S5 << 2 | 1 << 5;

/// The 8250 of a machine that has one.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Its interrupt, which is the first and last pin of an I/O APIC, and the ISA's.
pub const SERIAL_GSI: u32 = 4;
/// Registers of an 8250.
pub const SERIAL_PORTS: u16 = 8;

/// Where the I/O APIC of a machine with an 8250 is.
pub const IOAPIC: u64 = 0xfec0_0000;
/// Where every local APIC is.
pub const LOCAL_APIC: u32 = 0xfee0_0000;

const OEM: [u8; 6] = *b"PCARP ";
const TABLE: [u8; 8] = *b"PERICARP";
const REVISION: u32 = 1;
/// Tables begin on multiples of this.
const ALIGN: u64 = 16;

/// Writes the tables and returns the address of the root pointer.
pub fn write(memory: &GuestMemoryMmap, cpus: u8, serial: bool) -> Result<u64, GuestMemoryError> {
    let mut place = Place { memory, next: ACPI_TABLES + ALIGN * (Rsdp::len() as u64).div_ceil(ALIGN) };
    let dsdt = place.put(&dsdt(serial))?;
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(place.put(&fadt(dsdt))?);
    xsdt.add_entry(place.put(&madt(cpus, serial))?);
    let mut mcfg = MCFG::new(OEM, TABLE, REVISION);
    mcfg.add_ecam(ECAM, 0, 0, 0);
    xsdt.add_entry(place.put(&mcfg)?);
    let xsdt = place.put(&xsdt)?;
    let mut root = Vec::with_capacity(Rsdp::len());
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut root);
    memory.write_slice(&root, GuestAddress(ACPI_TABLES))?;
    Ok(ACPI_TABLES)
}

struct Place<'m> {
    memory: &'m GuestMemoryMmap,
    next: u64,
}

impl Place<'_> {
    fn put(&mut self, table: &dyn Aml) -> Result<u64, GuestMemoryError> {
        let mut bytes = Vec::with_capacity(512);
        table.to_aml_bytes(&mut bytes);
        let at = self.next;
        self.memory.write_slice(&bytes, GuestAddress(at))?;
        self.next = (at + bytes.len() as u64).next_multiple_of(ALIGN);
        Ok(at)
    }
}

fn fadt(dsdt: u64) -> impl Aml {
    let port = |port: u16| GAS::new(GasSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port));
    let mut fadt =
        FADTBuilder::new(OEM, TABLE, REVISION).dsdt_64(dsdt).flag(Flags::HwReducedAcpi).flag(Flags::ResetRegSup);
    // No VGA, no CMOS clock, no 8042 (ACPI 6.5 §5.2.9.3).
    fadt.iapc_boot_arch = (1 << 2 | 1 << 5).into();
    fadt.sleep_control_reg = port(SLEEP_CONTROL);
    fadt.sleep_status_reg = port(SLEEP_STATUS);
    fadt.reset_reg = port(RESET);
    fadt.reset_value = RESET_VALUE;
    fadt.finalize()
}

fn madt(cpus: u8, serial: bool) -> MADT {
    let mut madt = MADT::new(OEM, TABLE, REVISION, LocalInterruptController::Address(LOCAL_APIC));
    for id in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    if serial {
        madt.add_structure(IoApic::new(0, IOAPIC as u32, SERIAL_GSI));
    }
    madt
}

/// The DSDT holds names only, no method: nothing in it needs an interpreter to run.
fn dsdt(serial: bool) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, REVISION);
    let bars_end = PCI_WINDOW + PCI_WINDOW_BYTES - 1;
    let buses = AddressSpace::<u16>::new_bus_number(0, 0);
    let window = AddressSpace::<u32>::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        REGISTER_BARS as u32,
        bars_end as u32,
        None,
    );
    let resources = ResourceTemplate::new(vec![&buses, &window]);
    let root = EISAName::new("PNP0A08");
    let compatible = EISAName::new("PNP0A03");
    let host_bridge = [
        Name::new(Path::new("_HID"), &root),
        Name::new(Path::new("_CID"), &compatible),
        Name::new(Path::new("_SEG"), &0_u8),
        Name::new(Path::new("_UID"), &0_u8),
        Name::new(Path::new("_CRS"), &resources),
    ];
    let host_bridge = Device::new(Path::new("PCI0"), host_bridge.iter().map(|name| name as &dyn Aml).collect());

    // The configuration space belongs to nobody else (PCI Firmware 3.3 §4.1.2).
    let ecam = Memory32Fixed::new(true, ECAM as u32, ECAM_BYTES as u32);
    let ecam = ResourceTemplate::new(vec![&ecam]);
    let board = EISAName::new("PNP0C02");
    let board = [Name::new(Path::new("_HID"), &board), Name::new(Path::new("_CRS"), &ecam)];
    let board = Device::new(Path::new("MB00"), board.iter().map(|name| name as &dyn Aml).collect());

    let ports = IO::new(SERIAL_PORT, SERIAL_PORT, 1, SERIAL_PORTS as u8);
    let interrupt = Interrupt::new(true, true, false, false, SERIAL_GSI);
    let resources = ResourceTemplate::new(vec![&ports, &interrupt]);
    let uart = EISAName::new("PNP0501");
    let uart = [
        Name::new(Path::new("_HID"), &uart),
        Name::new(Path::new("_UID"), &0_u8),
        Name::new(Path::new("_CRS"), &resources),
    ];
    let uart = Device::new(Path::new("COM1"), uart.iter().map(|name| name as &dyn Aml).collect());

    let mut devices: Vec<&dyn Aml> = vec![&host_bridge, &board];
    if serial {
        devices.push(&uart);
    }
    Scope::new(Path::new("_SB_"), devices).to_aml_bytes(&mut dsdt);
    let s5 = Package::new(vec![&S5, &S5, &0_u8, &0_u8]);
    Name::new(Path::new("_S5_"), &s5).to_aml_bytes(&mut dsdt as &mut dyn AmlSink);
    dsdt
}

const _: () = assert!(DOORBELL_BARS + 32 * 4096 <= PCI_WINDOW + PCI_WINDOW_BYTES, "every BAR lies in the window");

#[cfg(test)]
mod tests {
    use super::*;

    fn table(memory: &GuestMemoryMmap, at: u64) -> Vec<u8> {
        let length: u32 = memory.read_obj(GuestAddress(at + 4)).unwrap();
        let mut bytes = vec![0; length as usize];
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        assert_eq!(bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0, "checksum of the table at {at:#x}");
        bytes
    }

    #[test]
    fn the_root_pointer_leads_to_every_table() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let root = write(&memory, 4, false).unwrap();
        let xsdt: u64 = memory.read_obj(GuestAddress(root + 24)).unwrap();
        let xsdt = table(&memory, xsdt);
        let signatures: Vec<_> = xsdt[36..]
            .chunks_exact(8)
            .map(|entry| table(&memory, u64::from_le_bytes(entry.try_into().unwrap()))[..4].to_vec())
            .collect();
        assert_eq!(signatures, [b"FACP", b"APIC", b"MCFG"]);
        let fadt = table(&memory, u64::from_le_bytes(xsdt[36..44].try_into().unwrap()));
        let dsdt = u64::from_le_bytes(fadt[140..148].try_into().unwrap());
        assert_eq!(&table(&memory, dsdt)[..4], b"DSDT");
    }

    #[test]
    fn one_local_apic_per_cpu_and_an_ioapic_only_with_a_serial_port() {
        let mut quiet = Vec::new();
        madt(3, false).to_aml_bytes(&mut quiet);
        assert_eq!(quiet.len(), 44 + 3 * 8);
        let mut serial = Vec::new();
        madt(3, true).to_aml_bytes(&mut serial);
        assert_eq!(serial.len(), quiet.len() + 12);
    }
}
