//! Chains of the receive queue that one connection fills together: a stream is read into all of them by one system call.
//!
//! Linux provides buffers of 4 KiB, so a stream that has more to say would take a system call for every 4 KiB.

use virtio_queue::{DescriptorChain, QueueOwnedT};
use vm_memory::GuestMemoryMmap;

use super::packet::{HEADER_BYTES, Header};
use crate::virtio::buffers::{Buffers, gather};
use crate::virtio::device::{ActiveQueue, DeviceError};

/// Most payload in one burst, and so in one packet for the guest: what Linux takes at most.
pub(super) const BURST_BYTES: usize = 64 << 10;

/// Most chains in one burst: [`BURST_BYTES`] of what Linux provides.
const CHAINS: usize = 16;

/// Chains taken from the queue, each with room for a header and at least a byte more.
pub(super) struct Burst<'m> {
    /// Heads, and how much payload each has room for.
    chains: Vec<(u16, usize)>,
    /// The first [`HEADER_BYTES`] of all of them, one after the other.
    headers: Buffers<'m>,
    /// What follows in each, one after the other.
    payload: Buffers<'m>,
    /// Heads of those that have become packets, and how long these are.
    packets: Vec<(u16, usize)>,
    /// The packets' headers.
    encoded: Vec<u8>,
    /// One chain, before it is divided.
    chain: Buffers<'m>,
    /// What the device may read of one, which is nothing.
    readable: Buffers<'m>,
}

impl<'m> Burst<'m> {
    pub(super) fn new(memory: &'m GuestMemoryMmap) -> Self {
        Self {
            chains: Vec::with_capacity(CHAINS),
            headers: Buffers::empty(memory),
            payload: Buffers::empty(memory),
            packets: Vec::with_capacity(CHAINS),
            encoded: Vec::with_capacity(CHAINS.saturating_mul(HEADER_BYTES)),
            chain: Buffers::empty(memory),
            readable: Buffers::empty(memory),
        }
    }

    /// Takes one chain, or as many as there are for a stream that fills them; `false` if there was none.
    pub(super) fn take(
        &mut self,
        rx: &mut ActiveQueue,
        memory: &'m GuestMemoryMmap,
        stream: bool,
    ) -> Result<bool, DeviceError> {
        self.chains.clear();
        self.headers.clear();
        self.payload.clear();
        self.packets.clear();
        self.encoded.clear();
        let most = if stream { CHAINS } else { 1 };
        let mut chains = rx.queue.iter(memory)?;
        while self.chains.len() < most && self.payload.len() < BURST_BYTES {
            let Some(chain) = chains.next() else { break };
            if !self.add(chain)? {
                chains.go_to_previous_position();
                break;
            }
        }
        Ok(!self.chains.is_empty())
    }

    /// Adds a chain; `false` if it is of more pieces than go with the others'.
    fn add(&mut self, chain: DescriptorChain<&'m GuestMemoryMmap>) -> Result<bool, DeviceError> {
        let head = chain.head_index();
        self.readable.clear();
        self.chain.clear();
        gather(chain, &mut self.readable, &mut self.chain)?;
        let room = self.chain.len().saturating_sub(HEADER_BYTES);
        if !self.readable.is_empty() || room == 0 {
            return Err(DeviceError::Driver("a vsock receive buffer has no room for a packet"));
        }
        if !self.chain.split(HEADER_BYTES, &mut self.headers, &mut self.payload) {
            return Ok(false);
        }
        self.chains.push((head, room));
        Ok(true)
    }

    /// Where payload goes.
    pub(super) fn payload(&mut self) -> &mut Buffers<'m> {
        &mut self.payload
    }

    /// How much payload the next chain has room for; `None` if there is no chain left.
    pub(super) fn room(&self) -> Option<usize> {
        self.chains.get(self.packets.len()).map(|(_, room)| *room)
    }

    /// Makes the next chain a packet, whose payload is there already.
    pub(super) fn write(&mut self, header: &Header) {
        if let Some((head, room)) = self.chains.get(self.packets.len()) {
            self.encoded.extend_from_slice(&header.encode());
            let payload = usize::try_from(header.len).unwrap_or(usize::MAX).min(*room);
            self.packets.push((*head, HEADER_BYTES.saturating_add(payload)));
        }
    }

    /// Gives packets to the guest and all other chains back to the queue; returns how much payload that was, `None` if
    /// there was no packet. The guest is not told yet.
    pub(super) fn give(
        &mut self,
        rx: &mut ActiveQueue,
        memory: &GuestMemoryMmap,
    ) -> Result<Option<usize>, DeviceError> {
        for _unused in self.packets.len()..self.chains.len() {
            rx.queue.go_to_previous_position();
        }
        self.headers.write_at(0, &self.encoded);
        rx.complete_together(memory, &self.packets)?;
        let payload = self.packets.iter().map(|(_, len)| len.saturating_sub(HEADER_BYTES)).sum();
        Ok((!self.packets.is_empty()).then_some(payload))
    }
}
