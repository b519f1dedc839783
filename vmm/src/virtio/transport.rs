//! A virtio device on the PCI bus (virtio 1.2 §4.1): two BARs of a page each, MSI-X, and what connects the guest's
//! notifications and our interrupts to the device's thread without passing through this module.
//!
//! | BAR | holds | the guest |
//! |---|---|---|
//! | 0 | common and device configuration, MSI-X table | reads it from memory, each write exits |
//! | 1 | notifications, interrupt status | writes it: KVM signals the queue's eventfd |
//!
//! There is no VIRTIO_PCI_CAP_PCI_CFG (§4.1.4.9): it serves firmware that cannot map a BAR, and no firmware runs here.

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

use std::borrow::Cow;
use std::io;
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch};
use thiserror::Error;
use virtio_queue::QueueT;
use vm_memory::{GuestMemoryMmap, MmapRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{Active, ActiveQueue, Backend, DeviceConfig, DeviceInfo};
use super::registers::{self, Action, NO_VECTOR, Registers};
use super::worker::Worker;
use crate::notes::{Note, Notifier};
use crate::pci::config::{ConfigSpace, Identity};
use crate::pci::irq::Irqs;
use crate::pci::msix::{self, Message, Msix};
use crate::pci::{PAGE, PciError, Place};

const VENDOR: u16 = 0x1af4;
/// Device IDs of virtio 1.0 and later begin here (§4.1.2).
const FIRST_DEVICE: u16 = 0x1040;
/// A device that only speaks virtio 1.0 and later (§4.1.2.1).
const REVISION: u8 = 1;

const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;

const REGISTER_BAR: u8 = 0;
const DOORBELL_BAR: u8 = 1;
// Offsets in the register BAR.
const COMMON: u32 = 0;
const DEVICE: u32 = 0x100;
const MSIX_TABLE: u32 = 0x800;
const MSIX_PENDING: u32 = 0xc00;
// Offsets in the doorbell BAR.
const NOTIFY: u32 = 0;
const ISR: u32 = 0x800;
/// Bytes from one queue's doorbell to the next.
const NOTIFY_MULTIPLIER: u32 = 4;

/// Failures after which a device stays as it is until the VM ends: each leaves an event on the host, and a driver that breaks its
/// rings again and again shall not fill the host's memory with them.
const MOST_FAILURES: u16 = 64;

// Types of structure (§4.1.4).
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;

/// Why a device cannot be made.
#[derive(Debug, Error)]
pub enum TransportError {
    /// The bus is full.
    #[error(transparent)]
    Bus(#[from] PciError),
    /// No thread, no eventfd.
    #[error("cannot start the device's thread")]
    Thread(#[from] io::Error),
}

/// What connects a running device to KVM.
#[derive(Debug)]
struct Wires {
    vectors: Vec<Wire>,
    kicks: Vec<(EventFd, u64)>,
}

/// One vector's way out.
#[derive(Debug)]
struct Wire {
    vector: u16,
    event: EventFd,
    connected: Option<Message>,
}

/// A device on the bus.
#[derive(Debug)]
pub struct VirtioPci {
    name: String,
    slot: usize,
    config: ConfigSpace,
    device_config: DeviceConfig,
    registers: Registers,
    msix: Msix,
    msix_control: usize,
    first_gsi: u32,
    wires: Option<Wires>,
    worker: Worker,
    /// The driver waits for a reset, which waits for the thread.
    resetting: bool,
    /// How often it needed a reset.
    failures: u16,
    /// The main thread knows that it has been started.
    announced: bool,
    memory: Arc<GuestMemoryMmap>,
    notifier: Notifier,
}

impl VirtioPci {
    /// Puts a device into its place and starts its thread.
    pub fn new(
        info: DeviceInfo,
        backend: Box<dyn Backend>,
        place: Place,
        irqs: &mut Irqs,
        memory: Arc<GuestMemoryMmap>,
        notifier: Notifier,
    ) -> Result<Self, TransportError> {
        let (config, msix_control) = config_space(&info, place);
        let vectors = info.vector_count();
        Ok(Self {
            slot: place.slot,
            config,
            registers: Registers::new(info.features, &info.queue_sizes, vectors),
            device_config: info.config,
            msix: Msix::new(vectors),
            msix_control,
            first_gsi: irqs.allot(vectors.into()),
            wires: None,
            worker: Worker::spawn(place.slot, &info.name, backend, notifier.clone())?,
            resetting: false,
            failures: 0,
            announced: false,
            name: info.name,
            memory,
            notifier,
        })
    }

    /// The configuration space as the guest reads it.
    pub fn config(&self) -> &[u8] {
        self.config.image()
    }

    /// Where the register BAR lies, if the device answers to memory accesses at all.
    pub fn registers_at(&self) -> Option<u64> {
        self.config.bar(REGISTER_BAR.into())
    }

    /// The register BAR as the guest reads it: offsets and bytes.
    pub fn registers(&self) -> [(u64, Cow<'_, [u8]>); 3] {
        [
            (u64::from(COMMON), Cow::Owned(self.registers.image().to_vec())),
            (u64::from(DEVICE), self.device_config.bytes()),
            (u64::from(MSIX_TABLE), Cow::Borrowed(self.msix.image())),
        ]
    }

    /// Says at which offset of which memory the guest reads the register BAR, if it does not exit.
    pub fn place_registers(&self, place: Option<(&Arc<MmapRegion>, u64)>) {
        if let DeviceConfig::Live(config) = &self.device_config {
            let at = |offset: u64| usize::try_from(offset.saturating_add(DEVICE.into())).unwrap_or(usize::MAX);
            config.place(place.map(|(window, offset)| (Arc::clone(window), at(offset))));
        }
    }

    /// The guest reads where KVM has no memory to answer, which is where it moved a BAR to, or the interrupt status
    /// (always 0: there is MSI-X). Leaves `data` alone if the address is not this device's.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        if self.offset_in(DOORBELL_BAR, address).is_some() {
            data.fill(0);
        }
        let Some(offset) = self.offset_in(REGISTER_BAR, address) else { return };
        data.fill(0);
        for (start, bytes) in self.registers() {
            let Some(from) = offset.checked_sub(start).and_then(|from| usize::try_from(from).ok()) else { continue };
            for (byte, value) in data.iter_mut().zip(bytes.iter().skip(from)) {
                *byte = *value;
            }
        }
    }

    /// The guest writes; false if the address is not this device's.
    pub fn write(&mut self, address: u64, data: &[u8], irqs: &mut Irqs) -> bool {
        if let Some(offset) = self.offset_in(REGISTER_BAR, address) {
            let offset = usize::try_from(offset).unwrap_or(usize::MAX);
            self.write_register(offset, data, irqs);
            return true;
        }
        // A doorbell that KVM did not take belongs to a queue that is not served.
        self.offset_in(DOORBELL_BAR, address).is_some()
    }

    /// The guest writes configuration space.
    pub fn write_config(&mut self, register: usize, data: &[u8], irqs: &mut Irqs) {
        self.config.write(register, data);
        self.msix.set_control(self.config.word(self.msix_control));
        self.connect_vectors(irqs);
    }

    /// The thread has given the queues back: a reset that the driver waits for is done (§2.4.2).
    pub fn finish_reset(&mut self, irqs: &mut Irqs) {
        if self.resetting && self.worker.take_back() {
            self.disconnect(irqs);
            self.registers.reset();
            self.resetting = false;
        }
    }

    /// The device cannot go on: tells the driver (§2.1.1). False if it has done so too often for anybody else to be told.
    pub fn needs_reset(&mut self) -> bool {
        self.registers.set_needs_reset();
        self.interrupt_config();
        self.failures = self.failures.saturating_add(1);
        self.failures <= MOST_FAILURES
    }

    /// The host has changed the configuration: tells the driver (§2.5).
    pub fn config_changed(&mut self) {
        self.registers.next_generation();
        self.interrupt_config();
    }

    fn interrupt_config(&self) {
        let vector = self.registers.config_vector();
        if let Some(wire) = self.wires.iter().flat_map(|wires| &wires.vectors).find(|wire| wire.vector == vector) {
            // An interrupt that cannot be signalled is one that the driver polls for.
            let _ = wire.event.write(1);
        }
    }

    /// Asks the thread to finish what is in flight.
    pub fn ask_to_stop(&mut self) {
        if self.worker.lent {
            let _ = self.worker.stop();
        }
    }

    /// Waits until it has.
    pub fn wait_stopped(&mut self) {
        self.worker.wait();
    }

    fn offset_in(&self, bar: u8, address: u64) -> Option<u64> {
        address.checked_sub(self.config.bar(bar.into())?).filter(|offset| *offset < PAGE)
    }

    fn write_register(&mut self, offset: usize, data: &[u8], irqs: &mut Irqs) {
        let table = usize::try_from(MSIX_TABLE).unwrap_or(usize::MAX);
        if let Some(at) = offset.checked_sub(table) {
            self.msix.write(at, data);
            return self.connect_vectors(irqs);
        }
        match self.registers.write(offset, data) {
            Action::None => {}
            Action::Start if self.failures >= MOST_FAILURES => self.registers.set_needs_reset(),
            Action::Start => {
                if let Err(error) = self.start(irqs) {
                    self.fail(&error);
                }
            }
            // The status register reads as before until the thread has stopped.
            Action::Reset => {
                self.resetting = true;
                self.ask_to_stop();
                self.finish_reset(irqs);
            }
        }
    }

    fn fail(&mut self, error: &dyn std::error::Error) {
        if self.failures >= MOST_FAILURES {
            return self.registers.set_needs_reset();
        }
        let (slot, device, reason) = (self.slot, self.name.clone(), crate::describe(error));
        self.notifier.tell(Note::DeviceFailed { slot, device, reason });
    }

    /// Connects queues and vectors to KVM and lends the queues to the thread.
    fn start(&mut self, irqs: &mut Irqs) -> io::Result<()> {
        let invalid = || io::Error::new(io::ErrorKind::InvalidInput, "a queue lies outside guest memory");
        let setups = self.registers.queues(&self.memory).ok_or_else(invalid)?;
        let doorbells = self.config.bar(DOORBELL_BAR.into()).unwrap_or_default();
        let mut wires = Wires { vectors: Vec::new(), kicks: Vec::new() };
        wires.open(self.registers.config_vector())?;
        let mut queues = Vec::with_capacity(setups.len());
        for (index, setup) in (0_u64..).zip(setups) {
            let kick = EventFd::new(EFD_NONBLOCK)?;
            if setup.queue.ready() {
                let address = doorbells.saturating_add(u64::from(NOTIFY_MULTIPLIER).saturating_mul(index));
                irqs.vm().register_ioevent(&kick, &IoEventAddress::Mmio(address), NoDatamatch)?;
                wires.kicks.push((kick.try_clone()?, address));
            }
            let interrupt = wires.open(setup.vector)?;
            queues.push(ActiveQueue { queue: setup.queue, kick, vector: setup.vector, interrupt });
        }
        self.wires = Some(wires);
        self.connect_vectors(irqs);
        let active = Active { memory: Arc::clone(&self.memory), features: self.registers.features(), queues };
        self.worker.start(active)?;
        if !std::mem::replace(&mut self.announced, true) {
            self.notifier.tell(Note::DeviceStarted);
        }
        Ok(())
    }

    /// Brings KVM's routes and irqfds to what the MSI-X table says now.
    fn connect_vectors(&mut self, irqs: &mut Irqs) {
        let Some(wires) = &mut self.wires else { return };
        let mut opened = Vec::new();
        for wire in &mut wires.vectors {
            let gsi = self.first_gsi.saturating_add(wire.vector.into());
            let message = self.msix.message(wire.vector.into());
            match (wire.connected, message) {
                (None, Some(message)) => {
                    irqs.route(gsi, message);
                    opened.push((&wire.event, gsi));
                }
                (Some(_), Some(message)) => irqs.route(gsi, message),
                (Some(_), None) => drop(irqs.disconnect(&wire.event, gsi)),
                (None, None) => {}
            }
            wire.connected = message;
        }
        let connected =
            irqs.commit().and_then(|()| opened.into_iter().try_for_each(|(event, gsi)| irqs.connect(event, gsi)));
        if let Err(error) = connected {
            self.fail(&error);
        }
    }

    fn disconnect(&mut self, irqs: &mut Irqs) {
        let Some(wires) = self.wires.take() else { return };
        let gsi = |wire: &Wire| self.first_gsi.saturating_add(wire.vector.into());
        let mut wired = wires.vectors.iter().filter(|wire| wire.connected.is_some());
        let mut result = wired.try_for_each(|wire| irqs.disconnect(&wire.event, gsi(wire)));
        for (kick, address) in &wires.kicks {
            result = result.and(irqs.vm().unregister_ioevent(kick, &IoEventAddress::Mmio(*address), NoDatamatch));
        }
        if let Err(error) = result {
            self.fail(&error);
        }
    }
}

impl Wires {
    /// An eventfd for a vector; queues may share one.
    fn open(&mut self, vector: u16) -> io::Result<Option<EventFd>> {
        if vector == NO_VECTOR {
            return Ok(None);
        }
        if let Some(wire) = self.vectors.iter().find(|wire| wire.vector == vector) {
            return wire.event.try_clone().map(Some);
        }
        let event = EventFd::new(EFD_NONBLOCK)?;
        let ours = event.try_clone()?;
        self.vectors.push(Wire { vector, event: ours, connected: None });
        Ok(Some(event))
    }
}

/// Identity, BARs and capabilities; returns where MSI-X's message control lies as well.
fn config_space(info: &DeviceInfo, place: Place) -> (ConfigSpace, usize) {
    let device = FIRST_DEVICE.saturating_add(info.id);
    let mut config = ConfigSpace::new(Identity { vendor: VENDOR, device, class: info.class, revision: REVISION });
    let page = u32::try_from(PAGE).unwrap_or(0);
    config.add_bar(REGISTER_BAR.into(), place.registers, page);
    config.add_bar(DOORBELL_BAR.into(), place.doorbells, page);
    let length = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
    let structures = [
        (COMMON_CFG, REGISTER_BAR, COMMON, length(registers::BYTES)),
        (ISR_CFG, DOORBELL_BAR, ISR, 1),
        (DEVICE_CFG, REGISTER_BAR, DEVICE, length(info.config.bytes().len())),
    ];
    for (kind, bar, offset, length) in structures.into_iter().filter(|(_, _, _, length)| *length > 0) {
        config.add_capability(CAPABILITY_VENDOR, &structure(kind, bar, offset, length, None));
    }
    let doorbells = NOTIFY_MULTIPLIER.saturating_mul(length(info.queue_sizes.len()));
    let notify = structure(NOTIFY_CFG, DOORBELL_BAR, NOTIFY, doorbells, Some(NOTIFY_MULTIPLIER));
    config.add_capability(CAPABILITY_VENDOR, &notify);
    let mut body = info.vector_count().saturating_sub(1).to_le_bytes().to_vec();
    body.extend((MSIX_TABLE | u32::from(REGISTER_BAR)).to_le_bytes());
    body.extend((MSIX_PENDING | u32::from(REGISTER_BAR)).to_le_bytes());
    let control = config.add_capability(CAPABILITY_MSIX, &body).saturating_add(2);
    config.allow(control, &msix::CONTROL_MASK.to_le_bytes());
    (config, control)
}

/// The body of a `struct virtio_pci_cap` (§4.1.4).
fn structure(kind: u8, bar: u8, offset: u32, length: u32, tail: Option<u32>) -> Vec<u8> {
    let capability_length = if tail.is_some() { 20 } else { 16 };
    let mut body = vec![capability_length, kind, bar, 0, 0, 0];
    for field in [Some(offset), Some(length), tail].into_iter().flatten() {
        body.extend(field.to_le_bytes());
    }
    body
}
