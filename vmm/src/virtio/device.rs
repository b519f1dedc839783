//! The seam between a virtio transport and a device.
//!
//! A device is two things: facts ([`DeviceInfo`]), which the transport shows to the guest from any vCPU thread, and
//! a [`Backend`], which one thread owns. They share nothing: at DRIVER_OK the transport sends the queues to the
//! thread, at reset it takes them back.

use std::borrow::Cow;
use std::io;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, MmapRegion, VolatileMemory};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::poller::{Poller, Wait};

/// The MSI-X vectors of a device beside the one for its configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vectors {
    /// One for all queues, which suits a device whose queues one CPU at a time has answers of: every vector costs the guest a dozen
    /// exits to set up.
    Shared,
    /// One for each queue, so that each CPU is interrupted by its own.
    EachQueue,
}

/// What the guest can read of a device.
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
    /// Its MSI-X vectors.
    pub vectors: Vectors,
    /// The device-specific configuration; read-only.
    pub config: DeviceConfig,
}

impl DeviceInfo {
    /// How many MSI-X vectors it has in all.
    pub fn vector_count(&self) -> u16 {
        let queues = match self.vectors {
            Vectors::Shared => 1,
            Vectors::EachQueue => self.queue_sizes.len(),
        };
        u16::try_from(queues).unwrap_or(u16::MAX).saturating_add(1)
    }
}

/// The device-specific configuration.
#[derive(Clone, Debug)]
pub enum DeviceConfig {
    /// The same for the device's life.
    Fixed(Vec<u8>),
    /// The device's thread changes it, but not its length.
    Live(LiveConfig),
}

impl DeviceConfig {
    /// Its bytes as they are now.
    pub fn bytes(&self) -> Cow<'_, [u8]> {
        match self {
            Self::Fixed(bytes) => Cow::Borrowed(bytes),
            Self::Live(config) => Cow::Owned(config.lock().bytes.clone()),
        }
    }
}

/// A configuration that changes while the guest reads it, from memory like any other: whoever changes it writes it there.
/// The lock is held for one copy.
#[derive(Clone, Debug)]
pub struct LiveConfig(Arc<Mutex<Shown>>);

#[derive(Debug)]
struct Shown {
    bytes: Vec<u8>,
    /// Where the guest reads it, if that is memory.
    place: Option<(Arc<MmapRegion>, usize)>,
}

impl Shown {
    fn show(&self) {
        if let Some((window, at)) = &self.place {
            // A place outside of the window is one that the guest reads by an exit.
            let _ = window.get_slice(0, window.size()).map(|window| window.write_slice(&self.bytes, *at));
        }
    }
}

impl LiveConfig {
    /// A configuration that nobody sees yet.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(Shown { bytes, place: None })))
    }

    /// Changes it.
    pub fn set(&self, bytes: Vec<u8>) {
        let mut shown = self.lock();
        shown.bytes = bytes;
        shown.show();
    }

    /// Says where in `window` the guest reads it from now on.
    pub fn place(&self, place: Option<(Arc<MmapRegion>, usize)>) {
        let mut shown = self.lock();
        shown.place = place;
        shown.show();
    }

    /// What is behind the lock is whole at every moment.
    fn lock(&self) -> MutexGuard<'_, Shown> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
    /// The queue's MSI-X vector; queues may share one.
    pub vector: u16,
    /// That vector as an irqfd; `None` if the driver gave the queue none.
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

    /// Interrupts the driver if it asks to hear of any chain given back since the used index was `old`; says whether it did.
    pub fn signal_used_since(&mut self, memory: &GuestMemoryMmap, old: u16) -> Result<bool, DeviceError> {
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
        let interrupt = self.interrupt.as_ref().filter(|_| wanted);
        interrupt.map_or(Ok(()), |interrupt| interrupt.write(1))?;
        Ok(interrupt.is_some())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_live_configuration_is_where_the_guest_reads_it() {
        let window = Arc::new(MmapRegion::new(4096).unwrap());
        let at = |offset| {
            let mut bytes = [0_u8; 3];
            window.get_slice(offset, 3).unwrap().copy_to(&mut bytes);
            bytes
        };
        let config = LiveConfig::new(vec![1, 2, 3]);
        config.place(Some((Arc::clone(&window), 256)));
        assert_eq!(at(256), [1, 2, 3], "from the moment on at which it is placed");
        config.clone().set(vec![4, 5, 6]);
        assert_eq!((at(256), DeviceConfig::Live(config.clone()).bytes().as_ref()), ([4, 5, 6], &[4, 5, 6][..]));
        config.place(None);
        config.set(vec![7, 8, 9]);
        assert_eq!(at(256), [4, 5, 6], "the guest has moved it away");
        for outside in [4096, usize::MAX] {
            config.place(Some((Arc::clone(&window), outside)));
        }
    }
}
