//! An I/O APIC with one pin (Intel 82093AA), for the serial port of a machine that has one.
//!
//! A kernel reads and writes each pin's entry many times while it boots, and each time is an exit: the 24 pins of a PC would be a
//! quarter of all exits. The pin is edge-triggered, so nobody need hear of an interrupt's end, and its entry is a message to a
//! local APIC as any device sends one.

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

use crate::acpi::SERIAL_GSI;
use crate::pci::irq::Irqs;
use crate::pci::msix::Message;

/// Which register the window shows, and the window (82093AA §3.1).
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;

/// Registers (82093AA §3.2): version 0x11 with no entry beyond the first, and the halves of that.
const VERSION_REGISTER: u8 = 0x01;
const VERSION: u32 = 0x11;
const LOW: u8 = 0x10;
const HIGH: u8 = 0x11;

/// Bits of an entry (82093AA §3.2.4). Delivery status and remote IRR are not written.
const MASKED: u64 = 1 << 16;
const READ_ONLY: u64 = 1 << 12 | 1 << 14;
/// Vector and delivery mode, which are the same in a message's data.
const DATA: u64 = 0x7ff;
const LOGICAL: u64 = 1 << 11;

/// Where messages go, and where in the address the destination and its mode are (Intel SDM vol. 3, 11.11).
const MESSAGES: u64 = 0xfee0_0000;
const MESSAGE_LOGICAL: u64 = 1 << 2;

/// The controller.
#[derive(Debug)]
pub struct IoApic {
    selected: u8,
    entry: u64,
}

impl IoApic {
    /// As after a reset: the pin is masked.
    pub fn new() -> Self {
        Self { selected: 0, entry: MASKED }
    }

    /// The guest reads so far from the controller's address.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match (offset, self.selected) {
            (SELECT, selected) => selected.into(),
            (WINDOW, VERSION_REGISTER) => VERSION,
            (WINDOW, LOW) => u32::try_from(self.entry & u64::from(u32::MAX)).unwrap_or(0),
            (WINDOW, HIGH) => u32::try_from(self.entry >> 32).unwrap_or(0),
            _ => 0,
        };
        data.fill(0);
        data.iter_mut().zip(value.to_le_bytes()).for_each(|(byte, value)| *byte = value);
    }

    /// The guest writes there.
    pub fn write(&mut self, offset: u64, data: &[u8], irqs: &mut Irqs) {
        let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else { return };
        match (offset, self.selected) {
            (SELECT, _) => self.selected = value.to_le_bytes()[0],
            (WINDOW, LOW) => self.set((self.entry >> 32 << 32) | u64::from(value), irqs),
            (WINDOW, HIGH) => self.set((self.entry & u64::from(u32::MAX)) | u64::from(value) << 32, irqs),
            _ => {}
        }
    }

    fn set(&mut self, entry: u64, irqs: &mut Irqs) {
        self.entry = entry & !READ_ONLY;
        irqs.set_route(SERIAL_GSI, self.message());
        // A host that refuses leaves the guest without this interrupt: the port is then as one that nobody listens to.
        let _ = irqs.commit();
    }

    /// What a signal on the pin sends.
    fn message(&self) -> Option<Message> {
        let mode = if self.entry & LOGICAL == 0 { 0 } else { MESSAGE_LOGICAL };
        let address = MESSAGES | self.entry >> 56 << 12 | mode;
        let data = u32::try_from(self.entry & DATA).ok()?;
        (self.entry & MASKED == 0).then_some(Message { address, data })
    }
}

impl Default for IoApic {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_a_message_unless_it_is_masked() {
        let mut apic = IoApic::new();
        assert_eq!(apic.message(), None);
        // Vector 0x31, lowest priority, logical, to the CPUs 3.
        apic.entry = 0x31 | 1 << 8 | LOGICAL | 3 << 56;
        assert_eq!(apic.message(), Some(Message { address: 0xfee0_3004, data: 0x131 }));
        apic.entry |= MASKED;
        assert_eq!(apic.message(), None);
    }

    #[test]
    fn there_is_one_pin() {
        let mut apic = IoApic::new();
        let mut read = |selected| {
            apic.selected = selected;
            let mut data = [0xff; 4];
            apic.read(WINDOW, &mut data);
            u32::from_le_bytes(data)
        };
        assert_eq!((read(VERSION_REGISTER) >> 16, read(LOW), read(HIGH), read(0x12)), (0, 1 << 16, 0, 0));
    }
}
