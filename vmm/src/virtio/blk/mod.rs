//! Disks: virtio-blk devices (virtio 1.2 §5.2) whose extents are host files.
//!
//! A request takes five steps: `run → pop → Request::parse → Disk::submit → complete`. A bad request is answered with
//! a status byte; a corrupt ring ends the device. Extents come and go through the [`Handle`], with no interrupt to
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
mod pace;
mod request;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::sync::Arc;

use thiserror::Error;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;
use vmm_control::{Extent, SECTOR_BYTES};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use self::disk::Disk;
pub use self::disk::DiskError;
use self::pace::Pace;
use self::request::{RANGES, Request, status_offset, status_ok};
use super::buffers::{Buffers, gather};
use super::counters::{Counter, Snapshot};
use super::device::{Active, ActiveQueue, Backend, DeviceConfig, DeviceError, DeviceInfo};
use super::inbox::{AskError, Asker, Inbox};
use super::poller::{Poller, Wait};

/// Entries of the request queue.
const QUEUE_SIZE: u16 = 256;

/// Most data buffers in a request: with header and status it just fits the queue.
const SEG_MAX: u32 = 254;

/// Most sectors in one range of a DISCARD or WRITE_ZEROES: 1 GiB, so that one request cannot hold up the queue.
const RANGE_SECTORS: u32 = 1 << 21;

/// Sectors in a page of the host, which is what a hole is made of.
const PAGE_SECTORS: u32 = 8;

/// Most requests answered before the driver hears of it and stop and questions are looked at again.
const BATCH: usize = 32;

const STOP: u64 = 0;
const INBOX: u64 = 1;
const KICK: u64 = 2;

enum Question {
    Add(Extent, File),
    Remove(u64),
}

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

#[derive(Debug, Default)]
struct Counters {
    requests: Counter,
    errors: Counter,
    read_bytes: Counter,
    written_bytes: Counter,
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
        let counters = &self.counters;
        vec![
            ("requests", counters.requests.get()),
            ("errors", counters.errors.get()),
            ("read_bytes", counters.read_bytes.get()),
            ("written_bytes", counters.written_bytes.get()),
        ]
    }
}

/// The disk's thread.
pub struct Blk {
    disk: Disk,
    inbox: Inbox<Question, Result<(), DiskError>>,
    counters: Arc<Counters>,
}

/// Makes a disk with its first extents.
pub fn device(
    name: String,
    capacity_bytes: u64,
    extents: Vec<(Extent, File)>,
) -> Result<(DeviceInfo, Blk, Handle), DiskError> {
    let mut disk = Disk::new(capacity_bytes)?;
    for (extent, file) in extents {
        disk.add(&extent, file)?;
    }
    let (asker, inbox) = Inbox::new()?;
    let counters = Arc::<Counters>::default();
    let handle = Handle { asker, counters: Arc::clone(&counters) };
    Ok((info(name, capacity_bytes), Blk { disk, inbox, counters }, handle))
}

fn info(name: String, capacity: u64) -> DeviceInfo {
    let features = [
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_DISCARD,
        VIRTIO_BLK_F_WRITE_ZEROES,
        VIRTIO_RING_F_INDIRECT_DESC,
    ];
    DeviceInfo {
        name,
        id: u16::try_from(VIRTIO_ID_BLOCK).unwrap_or_default(),
        // Mass storage, "other".
        class: [0x01, 0x80, 0x00],
        features: features.iter().fold(0, |bits, bit| bits | 1 << bit),
        queue_sizes: vec![QUEUE_SIZE],
        config: DeviceConfig::Fixed(config(capacity)),
    }
}

/// `struct virtio_blk_config` (virtio 1.2 §5.2.4).
fn config(capacity: u64) -> Vec<u8> {
    let ranges = u32::try_from(RANGES).unwrap_or_default();
    let mut config = Vec::new();
    config.extend((capacity / SECTOR_BYTES).to_le_bytes());
    config.extend(0_u32.to_le_bytes()); // size_max, not offered
    config.extend(SEG_MAX.to_le_bytes());
    config.extend([0; 20]); // geometry, blk_size, topology, writeback, num_queues: not offered
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
                    _ => self.answer(),
                }
            }
        }
    }

    fn run(&mut self, active: &mut Active, stop: &EventFd) -> Result<(), DeviceError> {
        let memory = &*active.memory;
        let queue = active.queues.first_mut().ok_or(DeviceError::Driver("the disk has no queue"))?;
        let (mut readable, mut writable) = (Buffers::new(memory), Buffers::new(memory));
        let mut pace = Pace::new();
        let mut poller = Poller::new()?;
        poller.add(stop, EventSet::IN, STOP)?;
        poller.add(&self.inbox, EventSet::IN, INBOX)?;
        poller.add(&queue.kick, EventSet::IN, KICK)?;
        loop {
            // First of all, for requests may have come before this thread watched for them.
            let wait = self.serve(queue, memory, &mut readable, &mut writable, &mut pace)?;
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

impl Blk {
    fn answer(&mut self) {
        let disk = &mut self.disk;
        self.inbox.answer_all(|question| match question {
            Question::Add(extent, file) => disk.add(&extent, file),
            Question::Remove(first_sector) => disk.remove(first_sector),
        });
    }

    /// Answers a batch of requests; tells whether there are more.
    fn serve<'m>(
        &mut self,
        queue: &mut ActiveQueue,
        memory: &'m GuestMemoryMmap,
        readable: &mut Buffers<'m>,
        writable: &mut Buffers<'m>,
        pace: &mut Pace,
    ) -> Result<Wait, DeviceError> {
        let mut turns = 0..BATCH;
        let (mut used, mut lingers) = (false, false);
        let mut wait = Wait::Poll;
        while wait == Wait::Poll && turns.next().is_some() {
            let Some(chain) = queue.pop(memory)? else {
                if pace.lingers() {
                    lingers = true;
                    break;
                }
                // Looks again after asking for a notification: a request may have slipped in between (§2.7.10).
                let more = queue.queue.enable_notification(memory)?;
                wait = if more { Wait::Poll } else { Wait::Block };
                continue;
            };
            let head = chain.head_index();
            readable.clear();
            writable.clear();
            gather(chain, readable, writable)?;
            let written = self.execute(readable, writable)?;
            queue.complete(memory, head, written)?;
            pace.take();
            used = true;
        }
        if used {
            queue.signal_used(memory)?;
        }
        if lingers {
            Pace::pause();
        }
        Ok(wait)
    }

    /// Carries out the request in a chain and writes its status; returns how many bytes of the chain were written.
    fn execute(&mut self, readable: &mut Buffers<'_>, writable: &mut Buffers<'_>) -> Result<usize, DeviceError> {
        let status_at = status_offset(writable)?;
        let outcome = Request::parse(readable, writable, self.disk.capacity())
            .and_then(|request| self.disk.submit(&request, readable, writable).inspect(|_| self.count(&request)));
        self.counters.requests.add(1);
        let (status, written) = match &outcome {
            Ok(written) => (status_ok(), *written),
            Err(error) => {
                self.counters.errors.add(1);
                (error.status(), 0)
            }
        };
        writable.write_at(status_at, &[status]);
        // Only what was written from the first byte on counts (virtio 1.2 §2.7.8.2).
        Ok(if written == status_at { written.saturating_add(1) } else { written })
    }

    fn count(&self, request: &Request) {
        let bytes = |len: usize| u64::try_from(len).unwrap_or(u64::MAX);
        match request {
            Request::Read(span) => self.counters.read_bytes.add(bytes(span.data.len())),
            Request::Write(span) => self.counters.written_bytes.add(bytes(span.data.len())),
            Request::Flush | Request::Discard(_) | Request::WriteZeroes(_) | Request::GetId => {}
        }
    }
}
