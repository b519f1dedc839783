//! Interrupt routes in KVM: which message each irqfd sends.
//!
//! KVM replaces the whole table at once and waits for every CPU to see it, so changes are collected and committed
//! together.

use std::collections::BTreeMap;
use std::sync::Arc;

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry};
use kvm_bindings::{kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_msi};
use kvm_ioctls::VmFd;
use vmm_sys_util::errno::Error as Errno;
use vmm_sys_util::eventfd::EventFd;

use super::msix::Message;

/// The first interrupt that no I/O APIC of a PC has.
const FIRST_GSI: u32 = 24;

/// The routes of one VM.
#[derive(Debug)]
pub struct Irqs {
    vm: Arc<VmFd>,
    messages: BTreeMap<u32, Message>,
    next: u32,
    changed: bool,
}

impl Irqs {
    /// No routes.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, messages: BTreeMap::new(), next: FIRST_GSI, changed: false }
    }

    /// The first of `count` interrupts that belong to the caller from now on.
    pub fn allot(&mut self, count: u32) -> u32 {
        let first = self.next;
        self.next = first.saturating_add(count);
        first
    }

    /// Says what an interrupt sends, from the next commit on.
    pub fn route(&mut self, gsi: u32, message: Message) {
        self.changed |= self.messages.insert(gsi, message) != Some(message);
    }

    /// The same, or that it sends nothing.
    pub fn set_route(&mut self, gsi: u32, message: Option<Message>) {
        match message {
            Some(message) => self.route(gsi, message),
            None => self.changed |= self.messages.remove(&gsi).is_some(),
        }
    }

    /// Hands the routes to KVM, if any has changed.
    pub fn commit(&mut self) -> Result<(), Errno> {
        if !self.changed {
            return Ok(());
        }
        let entries: Vec<_> = self.messages.iter().map(|(gsi, message)| message_route(*gsi, *message)).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| Errno::new(libc::ENOSPC))?;
        self.vm.set_gsi_routing(&table)?;
        self.changed = false;
        Ok(())
    }

    /// Makes a signal on `event` an interrupt; one that waits there already is sent at once.
    pub fn connect(&self, event: &EventFd, gsi: u32) -> Result<(), Errno> {
        self.vm.register_irqfd(event, gsi)
    }

    /// Lets signals on `event` wait there.
    pub fn disconnect(&self, event: &EventFd, gsi: u32) -> Result<(), Errno> {
        self.vm.unregister_irqfd(event, gsi)
    }

    /// The VM.
    pub fn vm(&self) -> &VmFd {
        &self.vm
    }
}

fn message_route(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    let [a, b, c, d, e, f, g, h] = message.address.to_le_bytes();
    let (low, high) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
    let msi = kvm_irq_routing_msi { address_lo: low, address_hi: high, data: message.data, ..Default::default() };
    let u = kvm_irq_routing_entry__bindgen_ty_1 { msi };
    kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, u, ..Default::default() }
}
