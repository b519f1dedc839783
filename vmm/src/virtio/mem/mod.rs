//! Memory that comes and goes while the guest runs: a virtio-mem device (virtio 1.3 §5.15) over the room above the
//! memory that the guest booted with.
//!
//! The host says how much the guest is to have; the guest plugs and unplugs blocks until it has that. It never gets more
//! than the host asked for: a request for more is refused, and KVM maps only chunks in which a block is plugged. What is
//! unplugged leaves the host at once.

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

mod region;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use self::region::{REQUEST_BYTES, RESPONSE_BYTES, Region};
use super::buffers::{Buffers, gather};
use super::counters::{Snapshot, counters};
use super::device::{Active, ActiveQueue, Backend, DeviceConfig, DeviceError, DeviceInfo, LiveConfig, Vectors};
use super::inbox::{AskError, Asker, Inbox};
use super::poller::{Poller, Wait};
pub use region::Backing;

/// Entries of the request queue; Linux keeps one request in it.
const QUEUE_SIZE: u16 = 16;

/// Most requests before stop and questions are looked at again.
const BATCH: usize = 16;

/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE (§5.15.3): the driver never reads what is not plugged.
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

const STOP: u64 = 0;
const INBOX: u64 = 1;
const KICK: u64 = 2;

/// Why the size was not changed.
#[derive(Debug, Error)]
pub enum RequestError {
    /// More than the room, or not whole blocks.
    #[error("the VM has no room for so much more memory, or it is no multiple of 2 MiB")]
    Refused,
    /// See [`AskError`].
    #[error(transparent)]
    NoAnswer(#[from] AskError),
}

/// What there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plugged {
    /// Bytes that are plugged.
    pub bytes: u64,
    /// Whether these are as many as asked for.
    pub settled: bool,
}

enum Question {
    Request(u64),
    Look,
}

counters! {
    requests,
    refused,
}

/// Reaches the device from other threads.
#[derive(Clone)]
pub struct Handle {
    asker: Asker<Question, Option<Plugged>>,
    counters: Arc<Counters>,
}

impl Handle {
    /// Asks the guest to have so many bytes plugged. The driver is to be told that the configuration has changed.
    pub fn request(&self, bytes: u64) -> Result<Plugged, RequestError> {
        self.asker.ask(Question::Request(bytes))?.ok_or(RequestError::Refused)
    }

    /// How far the guest is.
    pub fn look(&self) -> Result<Plugged, RequestError> {
        self.asker.ask(Question::Look)?.ok_or(RequestError::Refused)
    }

    /// What the device has done so far.
    pub fn counters(&self) -> Snapshot {
        self.counters.snapshot()
    }
}

/// The device's thread.
pub struct Mem {
    region: Region,
    backing: Box<dyn Backing>,
    config: LiveConfig,
    inbox: Inbox<Question, Option<Plugged>>,
    /// Called when the guest has come to have what it was asked to have.
    settled: Box<dyn Fn() + Send>,
    counters: Arc<Counters>,
}

/// Makes a device over the guest addresses from `start` on.
pub fn device(
    (start, bytes): (u64, u64),
    backing: Box<dyn Backing>,
    settled: impl Fn() + Send + 'static,
) -> std::io::Result<(DeviceInfo, Mem, Handle)> {
    let region = Region::new(start, bytes);
    let config = LiveConfig::new(region.config());
    let (asker, inbox) = Inbox::new()?;
    let counters = Arc::<Counters>::default();
    let handle = Handle { asker, counters: Arc::clone(&counters) };
    let info = DeviceInfo {
        name: "mem".into(),
        id: u16::try_from(VIRTIO_ID_MEM).unwrap_or_default(),
        // Memory controller, RAM.
        class: [0x05, 0x00, 0x00],
        features: UNPLUGGED_INACCESSIBLE,
        queue_sizes: vec![QUEUE_SIZE],
        vectors: Vectors::Shared,
        config: DeviceConfig::Live(config.clone()),
    };
    Ok((info, Mem { region, backing, config, inbox, settled: Box::new(settled), counters }, handle))
}

impl Backend for Mem {
    fn idle(&mut self, wake: &EventFd) -> Result<(), DeviceError> {
        let mut poller = Poller::new()?;
        poller.add(wake, EventSet::IN, STOP)?;
        poller.add(&self.inbox, EventSet::IN, INBOX)?;
        loop {
            for (token, _) in poller.wait(Wait::Block)? {
                match token {
                    STOP => return Ok(()),
                    _ => self.answer(),
                }
            }
        }
    }

    fn run(&mut self, active: &mut Active, stop: &EventFd) -> Result<(), DeviceError> {
        let memory = &*active.memory;
        let queue = active.queues.first_mut().ok_or(DeviceError::Driver("the memory device has no queue"))?;
        let mut poller = Poller::new()?;
        poller.add(stop, EventSet::IN, STOP)?;
        poller.add(&self.inbox, EventSet::IN, INBOX)?;
        poller.add(&queue.kick, EventSet::IN, KICK)?;
        loop {
            // First of all, for requests may have come before this thread watched for them.
            let wait = self.serve(queue, memory)?;
            for (token, _) in poller.wait(wait)? {
                match token {
                    STOP => return Ok(()),
                    INBOX => self.answer(),
                    _ => drop(queue.kick.read()),
                }
            }
        }
    }
}

impl Mem {
    fn answer(&mut self) {
        let (region, config) = (&mut self.region, &self.config);
        self.inbox.answer_all(|question| {
            if let Question::Request(bytes) = question {
                if !region.request(bytes) {
                    return None;
                }
                config.set(region.config());
            }
            Some(Plugged { bytes: region.plugged_bytes(), settled: region.is_settled() })
        });
    }

    /// Answers a batch of requests; tells whether there are more.
    fn serve(&mut self, queue: &mut ActiveQueue, memory: &GuestMemoryMmap) -> Result<Wait, DeviceError> {
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
            self.execute(&readable, &mut writable)?;
            queue.complete(memory, head, RESPONSE_BYTES)?;
            used = true;
        }
        if used {
            queue.signal_used(memory)?;
        }
        Ok(wait)
    }

    /// Carries out one request and writes its response.
    fn execute(&mut self, readable: &Buffers<'_>, writable: &mut Buffers<'_>) -> Result<(), DeviceError> {
        let request = readable.read_object::<[u8; REQUEST_BYTES]>(0);
        let request = request.ok_or(DeviceError::Driver("a request for memory is too short"))?;
        if writable.len() < RESPONSE_BYTES {
            return Err(DeviceError::Driver("a request for memory has no room for its response"));
        }
        let before = self.region.is_settled();
        let answer = self.region.serve(&request, &mut *self.backing)?;
        // Before the driver hears of it, which may look at once.
        self.config.set(self.region.config());
        self.counters.requests.add(1);
        if matches!(answer, region::Answer::Nack | region::Answer::Busy | region::Answer::Error) {
            self.counters.refused.add(1);
        }
        writable.write_at(0, &answer.bytes());
        if self.region.is_settled() && !before {
            (self.settled)();
        }
        Ok(())
    }
}
