//! A guest made of nothing but memory and the driver's side of virtqueues, for tests and fuzz targets of devices.
//! No part of a VMM: it is there with feature `testing` alone.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{Active, ActiveQueue, Backend, DeviceError};
use super::poller::{Poller, Wait};

/// Where two regions of guest memory meet.
pub const SEAM: u64 = 8 << 20;

/// Rings are laid out from here up to [`RINGS_END`]; tests use addresses outside of that.
const RINGS: u64 = 0x1000;
const RINGS_END: u64 = 0x10_0000;

/// A test that waits longer than this has hung.
pub const HANG: Duration = Duration::from_secs(20);

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const DESCRIPTOR_BYTES: u64 = 16;

/// Memory of a guest: 16 MiB in two regions.
pub struct Guest {
    /// All of it.
    pub memory: Arc<GuestMemoryMmap>,
    rings: std::cell::Cell<u64>,
    vectors: std::cell::Cell<u16>,
}

impl Default for Guest {
    fn default() -> Self {
        Self::new()
    }
}

impl Guest {
    /// Zeros everywhere.
    pub fn new() -> Self {
        let half = usize::try_from(SEAM).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), half), (GuestAddress(SEAM), half)]).unwrap();
        Self { memory: Arc::new(memory), rings: RINGS.into(), vectors: 0.into() }
    }

    /// First address past its memory.
    pub fn end(&self) -> u64 {
        2 * SEAM
    }

    /// Writes to its memory.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    /// Reads its memory.
    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn allocate(&self, len: u64) -> u64 {
        let start = self.rings.get();
        let end = (start + len).next_multiple_of(64);
        assert!(end <= RINGS_END, "the test uses too many rings");
        self.rings.set(end);
        start
    }

    /// Both sides of a new virtqueue with a vector of its own.
    pub fn queue(&self, size: u16) -> (DriverQueue, ActiveQueue) {
        let entries = u64::from(size);
        let table = self.allocate(DESCRIPTOR_BYTES * entries);
        let avail = self.allocate(6 + 2 * entries);
        let used = self.allocate(6 + 8 * entries);
        let indirect = self.allocate(DESCRIPTOR_BYTES * 2048);
        let mut queue = Queue::new(size).unwrap();
        queue.set_size(size);
        queue.set_desc_table_address(Some(u32::try_from(table).unwrap()), Some(0));
        queue.set_avail_ring_address(Some(u32::try_from(avail).unwrap()), Some(0));
        queue.set_used_ring_address(Some(u32::try_from(used).unwrap()), Some(0));
        queue.set_event_idx(true);
        queue.set_ready(true);
        assert!(queue.is_valid(&*self.memory));
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let driver = DriverQueue {
            memory: Arc::clone(&self.memory),
            size,
            table,
            avail,
            used,
            indirect,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); usize::from(size)],
            addresses: vec![0; usize::from(size)],
            next_avail: 0,
            next_used: 0,
            kick: kick.try_clone().unwrap(),
            interrupt: interrupt.try_clone().unwrap(),
        };
        let vector = self.vectors.get();
        self.vectors.set(vector + 1);
        (driver, ActiveQueue { queue, kick, vector, interrupt: Some(interrupt) })
    }
}

/// One buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// Where it is in guest memory.
    pub address: u64,
    /// How long it is, in bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

impl Part {
    /// One that the device reads.
    pub fn readable(address: u64, len: u32) -> Self {
        Self { address, len, writable: false }
    }

    /// One that the device writes.
    pub fn writable(address: u64, len: u32) -> Self {
        Self { address, len, writable: true }
    }
}

/// The driver's side of a split virtqueue with event indexes (virtio 1.2 §2.7).
pub struct DriverQueue {
    memory: Arc<GuestMemoryMmap>,
    size: u16,
    table: u64,
    avail: u64,
    used: u64,
    indirect: u64,
    free: Vec<u16>,
    /// Descriptors of the chain that starts at each index.
    chains: Vec<Vec<u16>>,
    /// Where the first buffer of the chain that starts at each index is.
    addresses: Vec<u64>,
    next_avail: u16,
    next_used: u16,
    kick: EventFd,
    interrupt: EventFd,
}

impl DriverQueue {
    fn store(&self, table: u64, index: u16, part: Part, flags: u16, next: u16) {
        let mut bytes = Vec::new();
        bytes.extend(part.address.to_le_bytes());
        bytes.extend(part.len.to_le_bytes());
        bytes.extend((flags | if part.writable { WRITE } else { 0 }).to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(table + DESCRIPTOR_BYTES * u64::from(index))).unwrap();
    }

    fn publish(&mut self, head: u16) {
        let slot = u64::from(self.next_avail % self.size);
        self.memory.write_obj(head, GuestAddress(self.avail + 4 + 2 * slot)).unwrap();
        self.next_avail = self.next_avail.wrapping_add(1);
        self.memory.store(self.next_avail, GuestAddress(self.avail + 2), Ordering::Release).unwrap();
    }

    /// Room for so many more descriptors.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Makes a chain available; returns its head.
    pub fn post(&mut self, parts: &[Part]) -> u16 {
        let indexes: Vec<u16> = parts.iter().map(|_| self.free.pop().expect("room in the queue")).collect();
        for (position, part) in parts.iter().enumerate() {
            let next = indexes.get(position + 1).copied();
            self.store(self.table, indexes[position], *part, next.map_or(0, |_| NEXT), next.unwrap_or(0));
        }
        let head = indexes[0];
        self.chains[usize::from(head)] = indexes;
        self.addresses[usize::from(head)] = parts[0].address;
        self.publish(head);
        head
    }

    /// Where the first buffer of a chain, posted before, is.
    pub fn first_address(&self, head: u16) -> u64 {
        self.addresses[usize::from(head)]
    }

    /// Makes a chain available through one indirect table; only one such chain at a time.
    pub fn post_indirect(&mut self, parts: &[Part]) -> u16 {
        for (index, part) in (0..).zip(parts) {
            let last = usize::from(index) + 1 == parts.len();
            self.store(self.indirect, index, *part, if last { 0 } else { NEXT }, if last { 0 } else { index + 1 });
        }
        let head = self.free.pop().expect("room in the queue");
        let len = u32::try_from(DESCRIPTOR_BYTES).unwrap() * u32::try_from(parts.len()).unwrap();
        self.store(self.table, head, Part::readable(self.indirect, len), INDIRECT, 0);
        self.chains[usize::from(head)] = vec![head];
        self.publish(head);
        head
    }

    /// Makes a chain available that never ends.
    pub fn post_circle(&mut self) {
        self.store(self.table, 0, Part::readable(0, 1), NEXT, 1);
        self.store(self.table, 1, Part::readable(0, 1), NEXT, 0);
        self.publish(0);
    }

    /// Makes whatever this table holds available.
    pub fn post_raw(&mut self, table: &[u8], head: u16) {
        self.memory.write_slice(table, GuestAddress(self.table)).unwrap();
        self.publish(head);
    }

    /// Moves the available index far out of range.
    pub fn corrupt_index(&mut self) {
        let index = self.next_avail.wrapping_add(self.size).wrapping_add(1);
        self.memory.store(index, GuestAddress(self.avail + 2), Ordering::Release).unwrap();
    }

    /// Notifies the device.
    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Takes one used chain if there is one: its head and how many bytes the device wrote.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self.memory.load(GuestAddress(self.used + 2), Ordering::Acquire).unwrap();
        if index == self.next_used {
            return None;
        }
        let slot = u64::from(self.next_used % self.size);
        let id: u32 = self.memory.read_obj(GuestAddress(self.used + 4 + 8 * slot)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(self.used + 8 + 8 * slot)).unwrap();
        self.next_used = self.next_used.wrapping_add(1);
        // used_event: interrupt at the very next used chain (virtio 1.2 §2.7.7).
        let event = GuestAddress(self.avail + 4 + 2 * u64::from(self.size));
        self.memory.store(self.next_used, event, Ordering::SeqCst).unwrap();
        let head = u16::try_from(id).unwrap();
        self.free.append(&mut self.chains[usize::from(head)]);
        Some((head, len))
    }

    /// Whether there is an interrupt, or comes one in time.
    pub fn is_interrupted(&self, patience: Duration) -> bool {
        readable(&self.interrupt, patience)
    }

    /// Takes one used chain, waiting for the interrupt; `None` if the device is silent for `patience`.
    pub fn try_wait_used(&mut self, patience: Duration) -> Option<(u16, u32)> {
        loop {
            if let Some(used) = self.take_used() {
                return Some(used);
            }
            if !self.is_interrupted(patience) {
                return None;
            }
            let _count = self.interrupt.read();
        }
    }

    /// Takes one used chain; the test fails if the device hangs.
    pub fn wait_used(&mut self) -> (u16, u32) {
        self.try_wait_used(HANG).expect("the device is silent")
    }
}

/// Waits until a descriptor is readable.
pub fn readable(fd: &impl AsRawFd, patience: Duration) -> bool {
    let mut poller = Poller::new().unwrap();
    poller.add(fd, EventSet::IN, 0).unwrap();
    poller.wait(Wait::Millis(u16::try_from(patience.as_millis()).unwrap())).unwrap().count() > 0
}

/// A backend on a thread of its own, as the transport would run it.
pub struct Running<B> {
    thread: JoinHandle<(B, Active, Result<(), DeviceError>)>,
    stop: EventFd,
}

impl<B: Backend + 'static> Running<B> {
    /// Hands the queues to the backend.
    pub fn start(mut backend: B, guest: &Guest, features: u64, queues: Vec<ActiveQueue>) -> Self {
        let stop = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut active = Active { memory: Arc::clone(&guest.memory), features, queues };
        let theirs = stop.try_clone().unwrap();
        let thread = thread::spawn(move || {
            let result = backend.run(&mut active, &theirs);
            (backend, active, result)
        });
        Self { thread, stop }
    }

    /// Stops the device and returns what it was made of.
    pub fn stop(self) -> (B, Active) {
        self.stop.write(1).unwrap();
        let (backend, active, result) = self.thread.join().unwrap();
        result.expect("the device ran until it was stopped");
        (backend, active)
    }

    /// Stops the device, if it has not given up by then.
    pub fn end(self) -> Result<(), DeviceError> {
        self.stop.write(1).unwrap();
        self.thread.join().unwrap().2
    }

    /// Waits for the device to give up on its guest.
    pub fn fail(self) -> DeviceError {
        let (_, _, result) = self.thread.join().unwrap();
        result.expect_err("the device gave up")
    }
}

/// Lets a backend serve what is in its queues, one batch of each, and no more.
pub fn run_once(
    backend: &mut impl Backend,
    guest: &Guest,
    features: u64,
    queues: Vec<ActiveQueue>,
) -> Result<(), DeviceError> {
    let stop = EventFd::new(EFD_NONBLOCK).unwrap();
    stop.write(1).unwrap();
    backend.run(&mut Active { memory: Arc::clone(&guest.memory), features, queues }, &stop)
}

/// A backend that is idle on a thread of its own.
pub struct Idling<B> {
    thread: JoinHandle<B>,
    wake: EventFd,
}

impl<B: Backend + 'static> Idling<B> {
    /// Lets the backend wait for a driver.
    pub fn start(mut backend: B) -> Self {
        let wake = EventFd::new(EFD_NONBLOCK).unwrap();
        let theirs = wake.try_clone().unwrap();
        let thread = thread::spawn(move || {
            backend.idle(&theirs).unwrap();
            backend
        });
        Self { thread, wake }
    }

    /// Takes the backend back.
    pub fn stop(self) -> B {
        self.wake.write(1).unwrap();
        self.thread.join().unwrap()
    }
}
