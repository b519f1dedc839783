//! Disks: virtio-blk devices (virtio 1.2 §5.2) whose extents are host files.
//!
//! A request takes five steps: `serve → Request::parse → Disk::begin → Disk::advance → finish`; between the last two it may wait for the
//! host's disk while others are served. A bad request is answered with a status byte; a corrupt ring ends the device. Extents come and go through the [`Handle`], with no interrupt to
//! the guest: a disk's capacity is fixed, and sectors that no file is mapped to fail.

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

mod disk;
mod flight;
mod request;
mod service;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::sync::Arc;

use thiserror::Error;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use virtio_queue::QueueT;
use vmm_control::{Extent, MOST_QUEUES, SECTOR_BYTES};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use self::disk::Disk;
pub use self::disk::DiskError;
use self::flight::Flights;
pub use self::flight::Ring;
use self::request::RANGES;
use self::service::Service;
use super::counters::{Snapshot, counters};
use super::device::{Active, Backend, DeviceConfig, DeviceError, DeviceInfo, Vectors};
use super::inbox::{AskError, Asker, Inbox};
use super::limit::Limit;
use super::poller::{Poller, Wait};
use crate::config::DiskSetup;

/// Entries of a request queue.
const QUEUE_SIZE: u16 = 256;

/// Most data buffers in a request: with header and status it just fits the queue.
const SEG_MAX: u32 = 254;

/// Most sectors in one range of a DISCARD or WRITE_ZEROES: 1 GiB, so that one request cannot hold up the queue.
const RANGE_SECTORS: u32 = 1 << 21;

/// Sectors in a page of the host, which is what a hole is made of.
const PAGE_SECTORS: u32 = 8;

const STOP: u64 = 0;
const INBOX: u64 = 1;
const LANDED: u64 = 2;
/// Of the first queue; those of the others follow.
const KICK: u64 = 3;

enum Question {
    Add(Extent, File),
    Remove(u64),
}

type Questions = Inbox<Question, Result<(), DiskError>>;

/// Why a change of the disk was refused.
#[derive(Debug, Error)]
pub enum ChangeError {
    /// The disk refused it.
    #[error(transparent)]
    Refused(#[from] DiskError),
    /// The disk did not answer.
    #[error(transparent)]
    NoAnswer(#[from] AskError),
}

counters! {
    requests,
    errors,
    /// Those that others did not have to wait for.
    set_aside,
    read_bytes,
    written_bytes,
}

/// Reaches the disk from other threads.
#[derive(Clone)]
pub struct Handle {
    asker: Asker<Question, Result<(), DiskError>>,
    counters: Arc<Counters>,
}

impl Handle {
    /// Maps a file into the disk. [`Extent::file`] is not looked at.
    pub fn add(&self, extent: Extent, file: File) -> Result<(), ChangeError> {
        Ok(self.asker.ask(Question::Add(extent, file))??)
    }

    /// Takes the extent that begins at a sector out of the disk. Its file is closed when this returns.
    pub fn remove(&self, first_sector: u64) -> Result<(), ChangeError> {
        Ok(self.asker.ask(Question::Remove(first_sector))??)
    }

    /// What the disk has done so far.
    pub fn counters(&self) -> Snapshot {
        self.counters.snapshot()
    }
}

/// The disk's thread.
pub struct Blk {
    disk: Disk,
    inbox: Questions,
    counters: Arc<Counters>,
    limit: Limit,
    ring: Option<Ring>,
}

/// Makes a disk with its first extents. Without a `ring` each request is waited for before the next one is looked at.
pub fn device(name: String, setup: DiskSetup, ring: Option<Ring>) -> Result<(DeviceInfo, Blk, Handle), DiskError> {
    let DiskSetup { capacity_bytes, queues, extents, limits } = setup;
    if !(1..=MOST_QUEUES).contains(&queues) {
        return Err(DiskError::Queues(queues));
    }
    let mut disk = Disk::new(capacity_bytes)?;
    for (extent, file) in extents {
        disk.add(&extent, file)?;
    }
    let (asker, inbox) = Inbox::new()?;
    let counters = Arc::<Counters>::default();
    let handle = Handle { asker, counters: Arc::clone(&counters) };
    Ok((info(name, capacity_bytes, queues), Blk { disk, inbox, counters, limit: Limit::new(limits), ring }, handle))
}

fn info(name: String, capacity: u64, queues: u8) -> DeviceInfo {
    let mut features = vec![
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_DISCARD,
        VIRTIO_BLK_F_WRITE_ZEROES,
        VIRTIO_RING_F_INDIRECT_DESC,
    ];
    if queues > 1 {
        features.push(VIRTIO_BLK_F_MQ);
    }
    DeviceInfo {
        name,
        id: u16::try_from(VIRTIO_ID_BLOCK).unwrap_or_default(),
        // Mass storage, "other".
        class: [0x01, 0x80, 0x00],
        features: features.iter().fold(0, |bits, bit| bits | 1 << bit),
        queue_sizes: vec![QUEUE_SIZE; usize::from(queues)],
        vectors: if queues > 1 { Vectors::EachQueue } else { Vectors::Shared },
        config: DeviceConfig::Fixed(config(capacity, queues)),
    }
}

/// `struct virtio_blk_config` (virtio 1.2 §5.2.4).
fn config(capacity: u64, queues: u8) -> Vec<u8> {
    let ranges = u32::try_from(RANGES).unwrap_or_default();
    let mut config = Vec::new();
    config.extend((capacity / SECTOR_BYTES).to_le_bytes());
    config.extend(0_u32.to_le_bytes()); // size_max, not offered
    config.extend(SEG_MAX.to_le_bytes());
    config.extend([0; 18]); // geometry, blk_size, topology, writeback: not offered
    config.extend(u16::from(queues).to_le_bytes()); // num_queues
    config.extend(RANGE_SECTORS.to_le_bytes()); // max_discard_sectors
    config.extend(ranges.to_le_bytes()); // max_discard_seg
    config.extend(PAGE_SECTORS.to_le_bytes()); // discard_sector_alignment
    config.extend(RANGE_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
    config.extend(ranges.to_le_bytes()); // max_write_zeroes_seg
    config.extend([1, 0, 0, 0]); // write_zeroes_may_unmap
    config
}

impl Backend for Blk {
    fn idle(&mut self, wake: &EventFd) -> Result<(), DeviceError> {
        let mut poller = Poller::new()?;
        poller.add(wake, EventSet::IN, STOP)?;
        poller.add(&self.inbox, EventSet::IN, INBOX)?;
        loop {
            for (token, _) in poller.wait(Wait::Block)? {
                match token {
                    STOP => return Ok(()),
                    _ => answer(&self.inbox, &mut self.disk),
                }
            }
        }
    }

    fn run(&mut self, active: &mut Active, stop: &EventFd) -> Result<(), DeviceError> {
        let queues: Vec<_> = active.queues.iter_mut().filter(|queue| queue.queue.ready()).collect();
        if queues.is_empty() {
            return Err(DeviceError::Driver("the disk has no queue"));
        }
        let flights = Flights::new(&active.memory, self.ring.take());
        let mut service =
            Service::new(&mut self.disk, &self.counters, &mut self.limit, queues, &active.memory, flights);
        let result = serve(&mut service, &self.inbox, stop);
        self.ring = service.into_ring();
        result
    }
}

/// Answers requests and questions until it is to stop.
fn serve(service: &mut Service<'_, '_>, inbox: &Questions, stop: &EventFd) -> Result<(), DeviceError> {
    let mut poller = Poller::new()?;
    poller.add(stop, EventSet::IN, STOP)?;
    poller.add(inbox, EventSet::IN, INBOX)?;
    service.watch(&poller, LANDED, KICK)?;
    loop {
        // First of all, for requests may have come before this thread watched for them.
        let wait = service.serve()?;
        for (token, _) in poller.wait(wait)? {
            match token {
                STOP => return service.settle(),
                INBOX => {
                    // The files of what is under way stay, and what was added is not half there.
                    service.settle()?;
                    answer(inbox, service.disk);
                }
                LANDED => {}
                kick => service.kicked(kick.saturating_sub(KICK)),
            }
        }
    }
}

fn answer(inbox: &Questions, disk: &mut Disk) {
    inbox.answer_all(|question| match question {
        Question::Add(extent, file) => disk.add(&extent, file),
        Question::Remove(first_sector) => disk.remove(first_sector),
    });
}
