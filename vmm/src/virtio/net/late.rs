//! News that can wait: what a driver sent is on its way, and there was only little of it.
//!
//! The driver learns of it to free memory, no more; most often something for it comes soon, an answer above all, and it looks at
//! all its queues then. So a lone small packet costs it no interrupt of its own, but for one that nothing follows within a
//! millisecond. Two packets, or a long one, may be what it holds others back for (Linux's byte queue limits and TCP small
//! queues), so they are told of at once.

use vm_memory::GuestMemoryMmap;

use crate::virtio::device::{ActiveQueue, DeviceError};
use crate::virtio::poller::Wait;

/// Most bytes that the driver may have to keep in memory a little longer.
const SMALL: usize = 1024;

/// Longest wait in milliseconds.
const PATIENCE: u16 = 1;

/// Whether there is news of a queue that waits.
#[derive(Debug, Default)]
pub(super) struct Late {
    waits: bool,
}

impl Late {
    /// So many packets were given back to the queue's driver, with so many bytes in all, which it has not been told yet.
    pub(super) fn tell(
        &mut self,
        queue: &mut ActiveQueue,
        memory: &GuestMemoryMmap,
        packets: usize,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        match packets {
            0 => Ok(()),
            1 if bytes <= SMALL && !self.waits => {
                self.waits = true;
                Ok(())
            }
            _ => {
                self.waits = false;
                queue.signal_used(memory)
            }
        }
    }

    /// The wait is over; `told` says that the driver was interrupted meanwhile by what made it look at this queue as well.
    pub(super) fn end(
        &mut self,
        queue: &mut ActiveQueue,
        memory: &GuestMemoryMmap,
        told: bool,
    ) -> Result<(), DeviceError> {
        if std::mem::take(&mut self.waits) && !told { queue.signal_used(memory) } else { Ok(()) }
    }

    /// How long its thread may sleep.
    pub(super) fn patience(&self) -> Wait {
        if self.waits { Wait::Millis(PATIENCE) } else { Wait::Block }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::virtio::testing::{DriverQueue, Guest, Part};

    const NOW: Duration = Duration::ZERO;

    /// A queue to whose driver so many chains were given back.
    fn given_back(guest: &Guest, chains: usize) -> (DriverQueue, ActiveQueue) {
        let (mut driver, mut queue) = guest.queue(16);
        (0..chains).for_each(|_| {
            driver.post(&[Part::readable(0, 1)]);
        });
        while let Some(chain) = queue.pop(&guest.memory).unwrap() {
            queue.complete(&guest.memory, chain.head_index(), 0).unwrap();
        }
        (driver, queue)
    }

    #[test]
    fn a_lone_small_packet_waits_until_something_else_interrupts_or_nothing_does() {
        for told in [true, false] {
            let (guest, mut late) = (Guest::new(), Late::default());
            let (driver, mut queue) = given_back(&guest, 1);
            late.tell(&mut queue, &guest.memory, 1, SMALL).unwrap();
            assert!(!driver.is_interrupted(NOW));
            assert_eq!(late.patience(), Wait::Millis(PATIENCE));
            late.end(&mut queue, &guest.memory, told).unwrap();
            assert_eq!(driver.is_interrupted(NOW), !told);
            assert_eq!(late.patience(), Wait::Block);
        }
    }

    #[test]
    fn more_than_that_does_not_wait() {
        for (packets, bytes) in [(1, SMALL + 1), (2, 2)] {
            let (guest, mut late) = (Guest::new(), Late::default());
            let (driver, mut queue) = given_back(&guest, packets);
            late.tell(&mut queue, &guest.memory, packets, bytes).unwrap();
            assert!(driver.is_interrupted(NOW));
            assert_eq!(late.patience(), Wait::Block);
        }
        let (guest, mut late) = (Guest::new(), Late::default());
        let (driver, mut queue) = given_back(&guest, 2);
        late.tell(&mut queue, &guest.memory, 1, 1).unwrap();
        late.tell(&mut queue, &guest.memory, 1, 1).unwrap();
        assert!(driver.is_interrupted(NOW), "the second one of two");
    }
}
