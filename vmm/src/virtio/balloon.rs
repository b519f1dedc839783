//! What the guest does not use goes back to the host: a balloon (virtio 1.3 §5.5) that is never inflated, for the sake of
//! free page reporting (§5.5.6.7).
//!
//! The guest reports pages that it has free; they leave the host, and come back as zeroes when the guest touches them. How
//! much memory a guest has is not said here but by [`super::mem`], which takes whole blocks and gives them back.

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

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::buffers::{Buffers, gather};
use super::counters::counters;
use super::device::{Active, ActiveQueue, Backend, DeviceConfig, DeviceError, DeviceInfo, Vectors};
use super::poller::{Poller, Wait};

/// Entries of each queue: Linux reports 32 runs of pages at a time.
const QUEUE_SIZE: u16 = 32;

/// Inflate and deflate, then those that come with a feature each. Reports arrive in the fifth by the specification; a
/// driver that counts only the queues which it uses, as Linux did, puts them into the third.
const QUEUES: usize = 5;

/// The first queue in which reports may arrive.
const FIRST_REPORTING: usize = 2;

/// VIRTIO_BALLOON_F_REPORTING (§5.5.3).
const REPORTING: u64 = 1 << 5;

/// Length of `struct virtio_balloon_config` (§5.5.4) without the fields of features not offered: num_pages, how large
/// the balloon is to be, and actual, how large it is. Both stay 0.
const CONFIG_BYTES: usize = 8;

/// Most requests before stop is looked at again.
const BATCH: usize = 16;

const STOP: u64 = 0;
const FIRST_KICK: u64 = 1;

counters! {
    reports,
    returned_bytes,
}

/// The device's thread.
pub struct Balloon {
    counters: Arc<Counters>,
}

/// Makes the device.
pub fn device() -> (DeviceInfo, Balloon, Arc<Counters>) {
    let counters = Arc::<Counters>::default();
    let info = DeviceInfo {
        name: "balloon".into(),
        id: u16::try_from(VIRTIO_ID_BALLOON).unwrap_or_default(),
        // Memory controller, RAM.
        class: [0x05, 0x00, 0x00],
        features: REPORTING | 1 << VIRTIO_RING_F_INDIRECT_DESC,
        queue_sizes: vec![QUEUE_SIZE; QUEUES],
        vectors: Vectors::Shared,
        config: DeviceConfig::Fixed(vec![0; CONFIG_BYTES]),
    };
    (info, Balloon { counters: Arc::clone(&counters) }, counters)
}

impl Backend for Balloon {
    fn run(&mut self, active: &mut Active, stop: &EventFd) -> Result<(), DeviceError> {
        let memory = &*active.memory;
        let mut poller = Poller::new()?;
        poller.add(stop, EventSet::IN, STOP)?;
        for (queue, token) in active.queues.iter().zip(FIRST_KICK..) {
            poller.add(&queue.kick, EventSet::IN, token)?;
        }
        loop {
            // First of all, for requests may have come before this thread watched for them.
            let mut wait = Wait::Block;
            for (number, queue) in active.queues.iter_mut().enumerate().filter(|(_, queue)| queue.queue.ready()) {
                if self.serve(queue, memory, number >= FIRST_REPORTING)? == Wait::Poll {
                    wait = Wait::Poll;
                }
            }
            for (token, _) in poller.wait(wait)? {
                let Some(number) = token.checked_sub(FIRST_KICK) else { return Ok(()) };
                let queue = usize::try_from(number).ok().and_then(|number| active.queues.get(number));
                let _count = queue.map(|queue| queue.kick.read());
            }
        }
    }
}

impl Balloon {
    /// Answers a batch of requests; tells whether there are more.
    fn serve(&self, queue: &mut ActiveQueue, memory: &GuestMemoryMmap, reporting: bool) -> Result<Wait, DeviceError> {
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
            // A guest that puts pages into a balloon that nobody asked it to fill keeps them from itself.
            if reporting {
                let bytes = writable.discard()?;
                self.counters.reports.add(1);
                self.counters.returned_bytes.add(u64::try_from(bytes).unwrap_or(u64::MAX));
            }
            queue.complete(memory, head, 0)?;
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

    const PAGE: u32 = 4096;
    const DATA: u64 = 0x20_0000;

    /// A driver that uses inflate, deflate and the queue numbered `reporting`.
    fn rig(reporting: usize) -> (Guest, Vec<DriverQueue>, Running<Balloon>, Arc<Counters>) {
        let (info, backend, handle) = device();
        let guest = Guest::new();
        let (mut drivers, mut queues) = (Vec::new(), Vec::new());
        for (number, size) in info.queue_sizes.iter().enumerate() {
            let (driver, mut active) = guest.queue(*size);
            active.queue.set_ready(number < FIRST_REPORTING || number == reporting);
            drivers.push(driver);
            queues.push(active);
        }
        let running = Running::start(backend, &guest, info.features, queues);
        (guest, drivers, running, handle)
    }

    #[test]
    fn reported_pages_are_empty_and_their_neighbours_are_not() {
        for queue in [2, 4] {
            let (guest, mut drivers, running, handle) = rig(queue);
            guest.write(DATA - 4096, &[7; 4 * 4096]);
            drivers[queue].post(&[Part::writable(DATA, PAGE), Part::writable(DATA + 4096, PAGE)]);
            drivers[queue].kick();
            assert_eq!(drivers[queue].wait_used().1, 0);
            assert_eq!(guest.read(DATA, 8192), [0; 8192]);
            assert_eq!(guest.read(DATA - 4096, 4096), [7; 4096]);
            assert_eq!(guest.read(DATA + 8192, 4096), [7; 4096]);
            assert_eq!(handle.snapshot(), [("reports", 1), ("returned_bytes", 8192)]);
            running.stop();
        }
    }

    #[test]
    fn only_whole_pages_go_back() {
        let (guest, mut drivers, running, handle) = rig(4);
        guest.write(DATA, &[7; 3 * 4096]);
        drivers[4].post(&[Part::writable(DATA + 1, 2 * PAGE)]);
        drivers[4].kick();
        drivers[4].wait_used();
        assert_eq!(guest.read(DATA, 4096), [7; 4096]);
        assert_eq!(guest.read(DATA + 4096, 4096), [0; 4096]);
        assert_eq!(guest.read(DATA + 8192, 4096), [7; 4096]);
        assert_eq!(handle.snapshot()[1].1, 4096);
        running.stop();
    }

    #[test]
    fn what_is_put_into_the_balloon_stays_as_it_is() {
        let (guest, mut drivers, running, handle) = rig(4);
        guest.write(DATA, &[7; 4096]);
        for driver in &mut drivers[..2] {
            driver.post(&[Part::readable(DATA, PAGE)]);
            driver.kick();
            driver.wait_used();
        }
        assert_eq!(guest.read(DATA, 4096), [7; 4096]);
        assert_eq!(handle.snapshot(), [("reports", 0), ("returned_bytes", 0)]);
        running.stop();
    }
}
