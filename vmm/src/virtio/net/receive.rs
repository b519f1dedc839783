//! From the tap to the guest.
//!
//! A tap cuts off what does not fit, so a packet is read only when the guest has given room for the longest one. With
//! merged buffers (VIRTIO_NET_F_MRG_RXBUF) that room is made of many chains; those that a packet leaves over serve
//! the next one, and go back when the device stops.
//!
//! A system call into all of that room costs as much as the rest of a small packet's way, and one into two pieces still more than
//! a copy. So after a packet that fitted into the first chain the next one is read into memory of the host's, and copied.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};

use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::{BATCH, Counters, HEADER_BYTES, PACKET_BYTES, frame};
use crate::virtio::buffers::{Buffers, gather};
use crate::virtio::device::{ActiveQueue, DeviceError};
use crate::virtio::limit::SharedLimit;
use crate::virtio::pace::{Pace, Way};
use crate::virtio::poller::Wait;

/// Where `num_buffers` is in the header (virtio 1.2 §5.1.6).
const COUNT_OFFSET: usize = 10;

pub(super) struct Receiver<'m> {
    memory: &'m GuestMemoryMmap,
    queue: &'m mut ActiveQueue,
    limit: &'m SharedLimit,
    /// Milliseconds until the next packet may be received.
    limited: Option<u16>,
    /// The driver takes a packet in several chains.
    merge: bool,
    /// Room for packets: the bytes of every chain in `chains`, in order.
    room: Buffers<'m>,
    /// Chains taken from the queue and not used yet: head and length.
    chains: VecDeque<(u16, usize)>,
    /// Chains of the packet at hand: head and bytes written.
    used: Vec<(u16, usize)>,
    /// The last packet fitted into its first chain.
    small: bool,
    /// Where a packet goes that is likely to be small.
    copied: Vec<u8>,
    pace: Pace,
    /// The tap may have a packet.
    tap_ready: bool,
    /// The tap is gone for good.
    tap_gone: bool,
    /// The driver has to add room first, and will say when it has.
    starved: bool,
}

impl<'m> Receiver<'m> {
    pub(super) fn new(
        memory: &'m GuestMemoryMmap,
        queue: &'m mut ActiveQueue,
        limit: &'m SharedLimit,
        merge: bool,
    ) -> Self {
        let entries = usize::from(queue.queue.size());
        Self {
            memory,
            queue,
            limit,
            limited: None,
            merge,
            room: Buffers::new(memory),
            chains: VecDeque::with_capacity(entries),
            used: Vec::with_capacity(entries),
            small: false,
            copied: vec![0; PACKET_BYTES],
            pace: Pace::default(),
            tap_ready: true,
            tap_gone: false,
            starved: false,
        }
    }

    pub(super) fn kick(&self) -> &EventFd {
        &self.queue.kick
    }

    /// The queue's vector.
    pub(super) fn vector(&self) -> u16 {
        self.queue.vector
    }

    /// The driver has added room.
    pub(super) fn kicked(&mut self) {
        let _count = self.queue.kick.read();
        self.starved = false;
    }

    /// The tap's epoll tells of it.
    pub(super) fn tap_is_ready(&mut self, events: EventSet) {
        self.tap_ready = true;
        // Its interface was deleted, and the pod's network with it; the guest sees a network that is silent.
        self.tap_gone |= events.contains(EventSet::ERROR);
    }

    /// How long to wait for a packet and room for it, as far as is known.
    pub(super) fn wait(&self) -> Wait {
        match self.limited {
            _ if !self.tap_ready || self.starved || self.tap_gone => Wait::Block,
            Some(millis) => Wait::Millis(millis),
            None => Wait::Poll,
        }
    }

    /// Receives a batch of packets; says whether the driver was interrupted for them.
    pub(super) fn serve(&mut self, tap: &File, counters: &Counters) -> Result<bool, DeviceError> {
        let old = self.queue.queue.next_used();
        // Some turns bring no packet, but whatever the guest does, they come to an end.
        let (mut turns, mut packets, mut pauses) = (0..BATCH.saturating_mul(2), 0_usize, None);
        self.limited = None;
        while self.wait() == Wait::Poll && pauses.is_none() && packets < BATCH && turns.next().is_some() {
            self.limited = self.limit.delay();
            if self.limited.is_some() || !self.make_room()? {
                continue;
            }
            match self.read(tap) {
                Ok(len) if len < HEADER_BYTES => self.tap_gone = true,
                Ok(len) => {
                    self.deliver(len)?;
                    self.pace.take();
                    packets = packets.saturating_add(1);
                    counters.received_packets.add(1);
                    counters.received_bytes.add(u64::try_from(frame(len)).unwrap_or(u64::MAX));
                    self.limit.charge(frame(len));
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => match self.pace.lingers() {
                        way @ Some(Way::GiveWay) => self.pace.linger(way),
                        way @ Some(Way::Pause) => pauses = way,
                        None => self.tap_ready = false,
                    },
                    io::ErrorKind::Interrupted => {}
                    _ => self.tap_gone = true,
                },
            }
        }
        let told = self.queue.queue.next_used() != old && self.queue.signal_used_since(self.memory, old)?;
        // Told before a pause, the guest is at work meanwhile.
        self.pace.linger(pauses);
        Ok(told)
    }

    /// Takes chains from the queue until the longest packet fits; `false` if the driver has to add some first.
    fn make_room(&mut self) -> Result<bool, DeviceError> {
        while !self.is_roomy() {
            let Some(chain) = self.queue.pop(self.memory)? else {
                self.starved = !self.queue.queue.enable_notification(self.memory)?;
                return Ok(false);
            };
            let (head, before) = (chain.head_index(), self.room.len());
            let mut readable = Buffers::empty(self.memory);
            gather(chain, &mut readable, &mut self.room)?;
            let len = self.room.len().saturating_sub(before);
            if !readable.is_empty() || len < HEADER_BYTES {
                return Err(DeviceError::Driver("a network receive buffer has no room for a header"));
            }
            self.chains.push_back((head, len));
        }
        Ok(true)
    }

    fn is_roomy(&self) -> bool {
        if self.merge {
            // A driver that gave all its chains cannot add any.
            self.room.len() >= PACKET_BYTES || self.chains.len() >= usize::from(self.queue.queue.size())
        } else {
            !self.chains.is_empty()
        }
    }

    /// Reads one packet into the room.
    fn read(&mut self, mut tap: &File) -> io::Result<usize> {
        let limit = self.room_for_one();
        let len = if self.small {
            let packet = self.copied.get_mut(..limit).unwrap_or_default();
            let len = tap.read(packet)?;
            self.room.write_at(0, packet.get(..len).unwrap_or_default());
            len
        } else {
            self.room.receive(0..limit, tap)?
        };
        self.small = self.chains.front().is_some_and(|(_, first)| len <= *first);
        Ok(len)
    }

    fn room_for_one(&self) -> usize {
        let limit = if self.merge { self.room.len() } else { self.chains.front().map_or(0, |(_, len)| *len) };
        limit.min(PACKET_BYTES)
    }

    /// Hands the packet at the beginning of the room to the driver.
    fn deliver(&mut self, len: usize) -> Result<(), DeviceError> {
        self.used.clear();
        let (mut rest, mut taken) = (len, 0_usize);
        while rest > 0 {
            let Some((head, room)) = self.chains.pop_front() else { break };
            let part = rest.min(room);
            self.used.push((head, part));
            rest = rest.saturating_sub(part);
            taken = taken.saturating_add(room);
        }
        let count = u16::try_from(self.used.len()).unwrap_or(u16::MAX);
        self.room.write_at(COUNT_OFFSET, &count.to_le_bytes());
        self.room.discard_front(taken);
        self.queue.complete_together(self.memory, &self.used)
    }

    /// Puts back what was taken from the queue and not used, so that nothing is in flight.
    pub(super) fn give_back(self) {
        for _ in &self.chains {
            self.queue.queue.go_to_previous_position();
        }
    }
}
