//! The seam between a virtio transport and a device.
//!
//! A device is two things: facts ([`DeviceInfo`]), which the transport shows to the guest from any vCPU thread, and
//! a [`Backend`], which one thread owns. They share nothing: at DRIVER_OK the transport sends the queues to the
//! thread, at reset it takes them back.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::poller::{Poller, Wait};

/// What the guest can read of a device; fixed for its life.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// Its name in logs, events and counters, such as `net0`.
    pub name: String,
    /// Virtio device ID (virtio 1.2 §5).
    pub id: u16,
    /// PCI class code: base class, subclass, interface.
    pub class: [u8; 3],
    /// Feature bits offered beside those of the transport (VERSION_1, RING_EVENT_IDX).
    pub features: u64,
    /// Largest size of each queue.
    pub queue_sizes: Vec<u16>,
    /// The device-specific configuration; read-only.
    pub config: Vec<u8>,
}

/// A device between DRIVER_OK and reset.
#[derive(Debug)]
pub struct Active {
    /// All of guest memory.
    pub memory: Arc<GuestMemoryMmap>,
    /// Feature bits that the driver accepted.
    pub features: u64,
    /// The queues, in the order of [`DeviceInfo::queue_sizes`]; one that the driver left off is not ready.
    pub queues: Vec<ActiveQueue>,
}

/// One virtqueue, and how each side wakes the other.
#[derive(Debug)]
pub struct ActiveQueue {
    /// The rings.
    pub queue: Queue,
    /// Signalled when the driver notifies the queue.
    pub kick: EventFd,
    /// The queue's MSI-X vector as an irqfd; `None` if the driver gave it none.
    pub interrupt: Option<EventFd>,
}

impl ActiveQueue {
    /// Takes the next chain that the driver made available; an available index out of range is an error, while
    /// [`QueueT::pop_descriptor_chain`] would call the queue empty for ever.
    pub fn pop<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
    ) -> Result<Option<DescriptorChain<&'m GuestMemoryMmap>>, DeviceError> {
        Ok(self.queue.iter(memory)?.next())
    }

    /// Gives a chain back to the driver, `written` bytes of it filled (virtio 1.2 §2.7.8).
    pub fn complete(&mut self, memory: &GuestMemoryMmap, head: u16, written: usize) -> Result<(), DeviceError> {
        Ok(self.queue.add_used(memory, head, u32::try_from(written).unwrap_or(u32::MAX))?)
    }

    /// Gives several chains back, each with its count of bytes written, so that the driver sees all of them or none.
    /// Afterwards the queue's own count of news is off: signal with [`ActiveQueue::signal_used_since`].
    pub fn complete_together(&mut self, memory: &GuestMemoryMmap, used: &[(u16, usize)]) -> Result<(), DeviceError> {
        let Some(((last, last_written), first)) = used.split_last() else { return Ok(()) };
        let mut next = self.queue.next_used();
        for (head, written) in first {
            // `struct virtq_used_elem` at its place in the used ring (virtio 1.2 §2.7.8), not published yet.
            let slot = u64::from(next.checked_rem(self.queue.size()).unwrap_or(0));
            let address = self.queue.used_ring().saturating_add(4).saturating_add(slot.saturating_mul(8));
            let written = u64::from(u32::try_from(*written).unwrap_or(u32::MAX));
            memory.write_obj(u64::from(*head) | written << 32, GuestAddress(address))?;
            next = next.wrapping_add(1);
        }
        self.queue.set_next_used(next);
        // Publishes its own element and, with the index, all before it.
        self.complete(memory, *last, *last_written)
    }

    /// Interrupts the driver if it asks to hear of any chain given back since the used index was `old`.
    pub fn signal_used_since(&mut self, memory: &GuestMemoryMmap, old: u16) -> Result<(), DeviceError> {
        // The index is written before the driver's wish is read (virtio 1.2 §2.7.7.2).
        fence(Ordering::SeqCst);
        let new = self.queue.next_used();
        let wanted = if self.queue.event_idx_enabled() {
            // `used_event` follows the available ring's entries (virtio 1.2 §2.7.6).
            let size = u64::from(self.queue.size());
            let address = self.queue.avail_ring().saturating_add(4).saturating_add(size.saturating_mul(2));
            let event: u16 = memory.load(GuestAddress(address), Ordering::Relaxed)?;
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            true
        };
        if wanted && let Some(interrupt) = &self.interrupt {
            interrupt.write(1)?;
        }
        Ok(())
    }

    /// Interrupts the driver if it asks for that (virtio 1.2 §2.7.7); call once after a batch of used buffers.
    pub fn signal_used(&mut self, memory: &GuestMemoryMmap) -> Result<(), DeviceError> {
        if self.queue.needs_notification(memory)?
            && let Some(interrupt) = &self.interrupt
        {
            interrupt.write(1)?;
        }
        Ok(())
    }
}

/// Why a device stopped serving its queues; the guest sees DEVICE_NEEDS_RESET (virtio 1.2 §2.1.1).
#[derive(Debug, Error)]
pub enum DeviceError {
    /// The rings themselves are broken.
    #[error("the guest broke the rules of the ring")]
    Ring(#[from] virtio_queue::Error),
    /// A descriptor points outside guest memory.
    #[error("a descriptor points outside guest memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// The driver broke a rule of this kind of device.
    #[error("{0}")]
    Driver(&'static str),
    /// The host side failed.
    #[error("the device's host side failed")]
    Host(#[from] io::Error),
}

/// The part of a device that serves its queues; it lives in one thread, which calls [`Backend::idle`] and
/// [`Backend::run`] in turn, `idle` first.
pub trait Backend: Send {
    /// Waits until `wake` is readable, which it leaves so; meanwhile answers requests from the control thread, if
    /// this kind of device takes any. The transport signals `wake` when the driver is ready or the VM ends.
    fn idle(&mut self, wake: &EventFd) -> Result<(), DeviceError> {
        let mut poller = Poller::new()?;
        poller.add(wake, EventSet::IN, 0)?;
        let _woken = poller.wait(Wait::Block)?;
        Ok(())
    }

    /// Serves the queues until `stop` is readable, which it leaves so. Returns with nothing in flight.
    ///
    /// A bad request is answered in the request's own terms; an error ends the device until the driver resets it.
    fn run(&mut self, active: &mut Active, stop: &EventFd) -> Result<(), DeviceError>;
}
