//! The PCI bus: one segment, one bus, up to 32 functions, each a virtio device.
//!
//! What a guest reads most, configuration space and device registers, it reads from memory that KVM maps read-only:
//! no exit. Each write exits, changes the state here and renews that memory before the guest goes on.

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

use std::sync::Arc;

use vm_memory::{Bytes, MmapRegion, VolatileMemory};

use crate::memory::{DOORBELL_BARS, ECAM, ECAM_BYTES, REGISTER_BARS};
use crate::pci::irq::Irqs;
use crate::pci::{PAGE, PciError, Place, SLOTS};
use crate::virtio::transport::VirtioPci;

/// A device's 8 functions in the configuration space.
const SLOT_BYTES: u64 = PAGE * 8;

/// The bus and the devices on it.
#[derive(Debug)]
pub struct Slots {
    window: Arc<MmapRegion>,
    devices: [Option<Box<VirtioPci>>; SLOTS],
    irqs: Irqs,
}

impl Slots {
    /// An empty bus whose configuration space is `window`.
    pub fn new(window: MmapRegion, irqs: Irqs) -> Self {
        let bus = Self { window: Arc::new(window), devices: [const { None }; SLOTS], irqs };
        for slot in 0..SLOTS {
            // A slot without a device reads as all ones (PCI Local Bus 3.0 §6.1).
            bus.show(page(slot, SLOT_BYTES), &[0xff; 4]);
        }
        bus
    }

    /// Makes a device for the first free slot and plugs it in.
    pub fn plug<E: From<PciError>>(
        &mut self,
        make: impl FnOnce(Place, &mut Irqs) -> Result<VirtioPci, E>,
    ) -> Result<usize, E> {
        let slot = self.devices.iter().position(Option::is_none).ok_or(PciError::Full)?;
        let registers = REGISTER_BARS.saturating_add(page(slot, PAGE));
        let doorbells = DOORBELL_BARS.saturating_add(page(slot, PAGE));
        let device = make(Place { slot, registers, doorbells }, &mut self.irqs)?;
        if let Some(free) = self.devices.get_mut(slot) {
            *free = Some(Box::new(device));
        }
        self.show_device(slot);
        Ok(slot)
    }

    /// The guest reads where no memory answers.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        for device in self.devices.iter().flatten() {
            device.read(address, data);
        }
    }

    /// The guest writes.
    pub fn write(&mut self, address: u64, data: &[u8]) {
        let offset = address.wrapping_sub(ECAM);
        let slot = if offset < ECAM_BYTES {
            self.write_config(offset, data)
        } else {
            let irqs = &mut self.irqs;
            self.devices
                .iter_mut()
                .position(|device| device.as_mut().is_some_and(|device| device.write(address, data, irqs)))
        };
        if let Some(slot) = slot {
            self.show_device(slot);
        }
    }

    /// The interrupts, also of what is not on the bus.
    pub fn irqs(&mut self) -> &mut Irqs {
        &mut self.irqs
    }

    /// Changes one device from outside the guest.
    pub fn with(&mut self, slot: usize, change: impl FnOnce(&mut VirtioPci, &mut Irqs)) {
        if let Some(Some(device)) = self.devices.get_mut(slot) {
            change(device, &mut self.irqs);
            self.show_device(slot);
        }
    }

    /// Stops every device; each has given its queues back at the end, or has not done so in time.
    pub fn stop(&mut self) {
        for device in self.devices.iter_mut().flatten() {
            device.ask_to_stop();
        }
        for device in self.devices.iter_mut().flatten() {
            device.wait_stopped();
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) -> Option<usize> {
        let slot = usize::try_from(offset / SLOT_BYTES).ok()?;
        let register = usize::try_from(offset % SLOT_BYTES).ok()?;
        let device = self.devices.get_mut(slot)?.as_mut()?;
        device.write_config(register, data, &mut self.irqs);
        Some(slot)
    }

    /// Renews what the guest reads of a device. A guest leaves the registers of a device that it boots with where they
    /// are, but gives one that is plugged in later a place of its own choice, which may be any page of the window.
    fn show_device(&self, slot: usize) {
        let Some(Some(device)) = self.devices.get(slot) else { return };
        self.show(page(slot, SLOT_BYTES), device.config());
        let registers = device.registers_at().and_then(|at| at.checked_sub(ECAM)).filter(|at| *at >= ECAM_BYTES);
        device.place_registers(registers.map(|registers| (&self.window, registers)));
        let Some(registers) = registers else { return };
        for (offset, bytes) in device.registers() {
            self.show(registers.saturating_add(offset), bytes.as_ref());
        }
    }

    fn show(&self, offset: u64, bytes: &[u8]) {
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        // What lies outside of the window the guest reads by an exit.
        let _ = self.window.get_slice(0, self.window.size()).map(|window| window.write_slice(bytes, at));
    }
}

fn page(slot: usize, bytes: u64) -> u64 {
    u64::try_from(slot).unwrap_or(0).saturating_mul(bytes)
}
