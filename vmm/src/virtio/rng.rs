//! The entropy device (virtio 1.2 §5.4): fills the guest's buffers from the kernel's random generator.

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

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::QueueT;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::buffers::{Buffers, gather};
use super::counters::counters;
use super::device::{Active, ActiveQueue, Backend, DeviceConfig, DeviceError, DeviceInfo, SHARED_VECTORS};
use super::poller::{Poller, Wait};
use vm_memory::GuestMemoryMmap;

/// Entries of the request queue; Linux keeps one request in it.
const QUEUE_SIZE: u16 = 16;

/// Most bytes for one request; the driver asks again for more.
const REQUEST_BYTES: usize = 4096;

/// Most requests before stop is looked at again.
const BATCH: usize = 16;

const STOP: u64 = 0;
const KICK: u64 = 1;

counters! {
    bytes,
}

/// The device's thread.
pub struct Rng {
    counters: Arc<Counters>,
}

/// Makes the device.
pub fn device() -> (DeviceInfo, Rng, Arc<Counters>) {
    let info = DeviceInfo {
        name: "rng".into(),
        id: u16::try_from(VIRTIO_ID_RNG).unwrap_or_default(),
        // Unclassified device.
        class: [0x00, 0xff, 0x00],
        features: 0,
        queue_sizes: vec![QUEUE_SIZE],
        vectors: SHARED_VECTORS,
        config: DeviceConfig::Fixed(Vec::new()),
    };
    let counters = Arc::<Counters>::default();
    (info, Rng { counters: Arc::clone(&counters) }, counters)
}

impl Backend for Rng {
    fn run(&mut self, active: &mut Active, stop: &EventFd) -> Result<(), DeviceError> {
        let memory = &*active.memory;
        let queue = active.queues.first_mut().ok_or(DeviceError::Driver("the entropy device has no queue"))?;
        let mut poller = Poller::new()?;
        poller.add(stop, EventSet::IN, STOP)?;
        poller.add(&queue.kick, EventSet::IN, KICK)?;
        loop {
            // First of all, for requests may have come before this thread watched for them.
            let wait = self.serve(queue, memory)?;
            for (token, _) in poller.wait(wait)? {
                if token == STOP {
                    return Ok(());
                }
                let _count = queue.kick.read();
            }
        }
    }
}

impl Rng {
    /// Answers a batch of requests; tells whether there are more.
    fn serve(&self, queue: &mut ActiveQueue, memory: &GuestMemoryMmap) -> Result<Wait, DeviceError> {
        let (mut readable, mut writable) = (Buffers::empty(memory), Buffers::empty(memory));
        let mut turns = 0..BATCH;
        let mut used = false;
        let mut wait = Wait::Poll;
        while wait == Wait::Poll && turns.next().is_some() {
            let Some(chain) = queue.pop(memory)? else {
                let more = queue.queue.enable_notification(memory)?;
                wait = if more { Wait::Poll } else { Wait::Block };
                continue;
            };
            let head = chain.head_index();
            readable.clear();
            writable.clear();
            gather(chain, &mut readable, &mut writable)?;
            if !readable.is_empty() || writable.is_empty() {
                // virtio 1.2 §5.4.6.1: the driver gives buffers to write to, and no others.
                return Err(DeviceError::Driver("an entropy request has nothing to fill"));
            }
            let len = writable.len().min(REQUEST_BYTES);
            writable.randomize(0..len)?;
            self.counters.bytes.add(u64::try_from(len).unwrap_or(u64::MAX));
            queue.complete(memory, head, len)?;
            used = true;
        }
        if used {
            queue.signal_used(memory)?;
        }
        Ok(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{DriverQueue, Guest, Part, Running};

    const DATA: u64 = 0x20_0000;

    fn rig() -> (Guest, DriverQueue, Running<Rng>, Arc<Counters>) {
        let (info, backend, handle) = device();
        let guest = Guest::new();
        let (driver, active) = guest.queue(info.queue_sizes[0]);
        let running = Running::start(backend, &guest, 0, vec![active]);
        (guest, driver, running, handle)
    }

    #[test]
    fn buffers_are_filled_with_random_bytes() {
        let (guest, mut driver, running, handle) = rig();
        driver.post(&[Part::writable(DATA, 32), Part::writable(DATA + 0x1000, 32)]);
        driver.post(&[Part::writable(DATA + 0x2000, 64)]);
        driver.kick();
        assert_eq!(driver.wait_used().1, 64);
        assert_eq!(driver.wait_used().1, 64);
        let first = [guest.read(DATA, 32), guest.read(DATA + 0x1000, 32)].concat();
        let second = guest.read(DATA + 0x2000, 64);
        assert_ne!(first, second);
        assert_ne!(second, [0; 64]);
        assert_eq!(guest.read(DATA + 32, 32), [0; 32]);
        assert_eq!(handle.snapshot(), [("bytes", 128)]);
        running.stop();
    }

    #[test]
    fn one_request_gets_no_more_than_its_share() {
        let (guest, mut driver, running, _) = rig();
        driver.post(&[Part::writable(DATA, 100_000)]);
        driver.kick();
        assert_eq!(driver.wait_used().1, 4096);
        assert_eq!(guest.read(DATA + 4096, 4096), [0; 4096]);
        running.stop();
    }

    #[test]
    fn requests_that_cannot_be_filled_end_the_device() {
        for part in [Part::readable(DATA, 10), Part::writable(DATA, 0)] {
            let (_guest, mut driver, running, _) = rig();
            driver.post(&[part]);
            driver.kick();
            assert!(matches!(running.fail(), DeviceError::Driver(_)));
        }
    }
}
