//! Where an access of the guest that KVM does not answer itself goes: I/O ports and device memory.
//!
//! It owns the devices' lock and holds it for one access. What nobody answers reads as all ones.

#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::as_conversions,
        clippy::arithmetic_side_effects,
        clippy::panic
    )
)]

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::acpi::{IOAPIC, POWER_OFF, RESET, RESET_VALUE, SERIAL_PORT, SERIAL_PORTS, SLEEP_CONTROL, SLEEP_STATUS};
use crate::ioapic::IoApic;
use crate::memory::PAGE;
use crate::notes::End;
use crate::serial::Port;
use crate::slots::Slots;

/// Command port of the 8042, through which kernels without ACPI reset a PC.
const KEYBOARD_COMMAND: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;

/// The machine's ports and device memory.
pub struct Bus {
    pci: Mutex<Slots>,
    serial: Option<(Port, Mutex<IoApic>)>,
}

impl Bus {
    /// A machine's bus.
    pub fn new(pci: Slots, serial: Option<Port>) -> Self {
        Self { pci: Mutex::new(pci), serial: serial.map(|port| (port, Mutex::default())) }
    }

    /// The PCI bus. Hold it for one change.
    pub fn pci(&self) -> MutexGuard<'_, Slots> {
        self.pci.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `in`.
    pub fn port_in(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let (Some((serial, register)), [value]) = (self.serial_register(port), &mut *data) {
            *value = serial.read(register);
        } else if port == SLEEP_STATUS {
            data.fill(0);
        }
    }

    /// `out`; the guest may end by it.
    pub fn port_out(&self, port: u16, data: &[u8]) -> Option<End> {
        let &[value] = data else { return None };
        if let Some((serial, register)) = self.serial_register(port) {
            serial.write(register, value);
        }
        match (port, value) {
            (SLEEP_CONTROL, POWER_OFF) => Some(End::PowerOff),
            (RESET, RESET_VALUE) | (KEYBOARD_COMMAND, KEYBOARD_RESET) => Some(End::Reset),
            _ => None,
        }
    }

    /// A read of device memory.
    pub fn memory_read(&self, address: u64, data: &mut [u8]) {
        match self.ioapic(address) {
            Some((ioapic, offset)) => ioapic.read(offset, data),
            None => self.pci().read(address, data),
        }
    }

    /// A write to device memory.
    pub fn memory_write(&self, address: u64, data: &[u8]) {
        match self.ioapic(address) {
            Some((mut ioapic, offset)) => ioapic.write(offset, data, self.pci().irqs()),
            None => self.pci().write(address, data),
        }
    }

    fn serial_register(&self, port: u16) -> Option<(&Port, u8)> {
        let register = port.checked_sub(SERIAL_PORT).filter(|register| *register < SERIAL_PORTS)?;
        Some((&self.serial.as_ref()?.0, u8::try_from(register).ok()?))
    }

    /// The I/O APIC that the serial port interrupts by, if the access is to it, and where in it.
    fn ioapic(&self, address: u64) -> Option<(MutexGuard<'_, IoApic>, u64)> {
        let offset = address.checked_sub(IOAPIC).filter(|offset| *offset < PAGE)?;
        let (_, ioapic) = self.serial.as_ref()?;
        Some((ioapic.lock().unwrap_or_else(PoisonError::into_inner), offset))
    }
}
