//! Requests that have to wait for the host's disk: io_uring(7) carries them out while the disk's thread answers others.
//!
//! It owns the ring, and the buffers of what is under way. What needs no waiting never comes here. The ring can read from and
//! flush files that this process has open, and nothing else: its operations are restricted when it is made.
#![expect(unsafe_code, reason = "the kernel is given the addresses of guest memory")]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::opcode::{Fsync, Readv};
use io_uring::register::Restriction;
use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, squeue};
use vm_memory::GuestMemoryMmap;

use super::disk::{Job, Operation};
use crate::virtio::buffers::Buffers;

/// A way to have the host's kernel carry out operations meanwhile.
pub struct Ring {
    ring: IoUring,
    /// How many operations it was given; the name of the next one.
    given: u64,
}

impl Ring {
    /// Makes one for as many operations as so many queues have entries, before the filter forbids it. A host that has no such rings (Linux before 5.19, or
    /// `kernel.io_uring_disabled`) has its disks waited for, one request after the other.
    pub fn new(queues: u8) -> Option<Self> {
        // Completions wait until this process enters its kernel anyway: no interrupt for each.
        let ring = IoUring::builder()
            .setup_r_disabled()
            .setup_coop_taskrun()
            .build(u32::from(super::QUEUE_SIZE).saturating_mul(queues.into()))
            .ok()?;
        // The kernel copies the addresses of buffers when it is given an operation (Linux 5.5).
        ring.params().is_feature_submit_stable().then_some(())?;
        let mut only = [Restriction::sqe_op(Readv::CODE), Restriction::sqe_op(Fsync::CODE)];
        ring.submitter().register_restrictions(&mut only).ok()?;
        ring.submitter().register_enable_rings().ok()?;
        Some(Self { ring, given: 0 })
    }

    fn give(&mut self, operation: &squeue::Entry) -> io::Result<u64> {
        let name = self.given;
        self.given = name.wrapping_add(1);
        let entry = operation.clone().user_data(name);
        // SAFETY: the operation names an open file, and guest memory that stays mapped as long as this process lives.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.ring.submit()?;
            // SAFETY: as above.
            unsafe { self.ring.submission().push(&entry) }.map_err(io::Error::other)?;
        }
        Ok(name)
    }
}

/// A request under way.
pub(super) struct Flight<'m> {
    /// The number of its queue.
    pub(super) queue: usize,
    /// Its chain.
    pub(super) head: u16,
    pub(super) job: Job,
    /// How many bytes of the chain it fills, and how many go to the disk.
    pub(super) moves: (usize, usize),
    pub(super) writable: Buffers<'m>,
}

/// All that is under way between two resets of the device.
pub(super) struct Flights<'m> {
    memory: &'m GuestMemoryMmap,
    ring: Option<Ring>,
    under_way: BTreeMap<u64, Flight<'m>>,
    /// Buffers of those that have landed, for the next ones.
    spare: Vec<Buffers<'m>>,
}

impl<'m> Flights<'m> {
    /// None yet.
    pub(super) fn new(memory: &'m GuestMemoryMmap, ring: Option<Ring>) -> Self {
        Self { memory, ring, under_way: BTreeMap::new(), spare: Vec::new() }
    }

    /// Readable when something may have landed.
    pub(super) fn watched(&self) -> Option<RawFd> {
        self.ring.as_ref().map(|ring| ring.ring.as_raw_fd())
    }

    /// Whether a request can be set aside.
    pub(super) fn can_take(&self) -> bool {
        self.ring.is_some()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.under_way.is_empty()
    }

    /// Buffers for one more.
    pub(super) fn buffers(&mut self) -> Buffers<'m> {
        self.spare.pop().unwrap_or_else(|| Buffers::new(self.memory))
    }

    /// Sets a request aside until its next operation has been carried out; [`Flights::submit`] gives it to the kernel.
    pub(super) fn launch(&mut self, mut flight: Flight<'m>, operation: Operation) -> io::Result<()> {
        let Some(ring) = &mut self.ring else { return Err(io::ErrorKind::Unsupported.into()) };
        let entry = match operation {
            Operation::Read { file, position, data } => {
                let pieces = flight.writable.window(data);
                let count = u32::try_from(pieces.len()).map_err(io::Error::other)?;
                Readv::new(Fd(file), pieces.as_ptr(), count).offset(position).build()
            }
            Operation::Flush { file } => Fsync::new(Fd(file)).flags(FsyncFlags::DATASYNC).build(),
        };
        let name = ring.give(&entry)?;
        self.under_way.insert(name, flight);
        Ok(())
    }

    /// Gives the kernel what was launched.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        self.enter(0)
    }

    /// One that has landed, and how its operation ended.
    pub(super) fn landed(&mut self) -> Option<(Flight<'m>, io::Result<usize>)> {
        loop {
            let entry = self.ring.as_mut()?.ring.completion().next()?;
            let result = usize::try_from(entry.result())
                .map_err(|_| io::Error::from_raw_os_error(entry.result().saturating_neg()));
            // What a ring that failed left behind belongs to nobody.
            if let Some(flight) = self.under_way.remove(&entry.user_data()) {
                return Some((flight, result));
            }
        }
    }

    /// Takes back the buffers of one that is done.
    pub(super) fn done(&mut self, mut buffers: Buffers<'m>) {
        buffers.clear();
        self.spare.push(buffers);
    }

    /// Waits until one has landed.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        self.enter(1)
    }

    /// Waits for what is under way, so that guest memory is written to no more, and returns the ring. What the host has not carried
    /// out even then writes to memory that stays mapped.
    pub(super) fn into_ring(mut self) -> Option<Ring> {
        while !self.is_empty() && self.wait().is_ok() {
            while self.landed().is_some() {}
        }
        self.ring
    }

    fn enter(&mut self, landings: usize) -> io::Result<()> {
        let Some(ring) = &mut self.ring else { return Ok(()) };
        if landings == 0 && ring.ring.submission().is_empty() {
            return Ok(());
        }
        loop {
            match ring.ring.submit_and_wait(landings) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result.map(drop),
            }
        }
    }
}
