//! A network interface (virtio 1.2 §5.1) in front of a tap.
//!
//! Packets go straight between guest memory and the tap, header and all: the tap speaks the guest's header, so this
//! device looks at none of it but the count of buffers. A packet that the tap refuses is dropped and counted, as a
//! network does; it never holds a packet back.

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

mod receive;
mod tap;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
};
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use self::receive::Receiver;
pub use self::tap::TapError;
use super::buffers::{Buffers, gather};
use super::counters::counters;
use super::device::{Active, ActiveQueue, Backend, DeviceConfig, DeviceError, DeviceInfo};
use super::poller::{Poller, Wait};

/// Bytes of `struct virtio_net_hdr_v1`.
const HEADER_BYTES: usize = 12;

/// Longest packet with its header: 64 KiB of IP behind an Ethernet header with a VLAN tag (virtio 1.2 §5.1.6.3.1).
const PACKET_BYTES: usize = HEADER_BYTES + 18 + 65_535;

/// Entries of the receive and the transmit queue.
const QUEUE_SIZES: [u16; 2] = [256, 256];

/// Most packets in one direction before the other has its turn.
const BATCH: usize = 64;

const STOP: u64 = 0;
const TAP: u64 = 1;
const RX_KICK: u64 = 2;
const TX_KICK: u64 = 3;

counters! {
    received_packets,
    received_bytes,
    sent_packets,
    sent_bytes,
    dropped_packets,
}

/// The interface's thread.
pub struct Net {
    tap: File,
    counters: Arc<Counters>,
    /// [`tap::set_offloads`], but in tests without a tap.
    set_offloads: fn(&File, u64) -> io::Result<()>,
}

/// Makes an interface that announces `mac`.
pub fn device(name: String, tap: File, mac: [u8; 6]) -> Result<(DeviceInfo, Net, Arc<Counters>), TapError> {
    tap::prepare(&tap)?;
    let counters = Arc::<Counters>::default();
    let ours = Arc::clone(&counters);
    Ok((info(name, mac), Net { tap, counters, set_offloads: tap::set_offloads }, ours))
}

/// An interface in front of a socket that keeps packets apart, for tests and fuzz targets.
#[cfg(any(test, feature = "testing"))]
pub fn on_socket(socket: File) -> (DeviceInfo, Net, Arc<Counters>) {
    let counters = Arc::<Counters>::default();
    let ours = Arc::clone(&counters);
    (info("net0".into(), [2; 6]), Net { tap: socket, counters, set_offloads: |_, _| Ok(()) }, ours)
}

fn info(name: String, mac: [u8; 6]) -> DeviceInfo {
    let features = [
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_GUEST_CSUM,
        VIRTIO_NET_F_MAC,
        VIRTIO_NET_F_GUEST_TSO4,
        VIRTIO_NET_F_GUEST_TSO6,
        VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_HOST_TSO6,
        VIRTIO_NET_F_MRG_RXBUF,
    ];
    DeviceInfo {
        name,
        id: u16::try_from(VIRTIO_ID_NET).unwrap_or_default(),
        // Network controller, Ethernet.
        class: [0x02, 0x00, 0x00],
        features: features.iter().fold(0, |bits, bit| bits | 1 << bit),
        queue_sizes: QUEUE_SIZES.to_vec(),
        config: DeviceConfig::Fixed(mac.to_vec()),
    }
}

impl Backend for Net {
    fn run(&mut self, active: &mut Active, stop: &EventFd) -> Result<(), DeviceError> {
        (self.set_offloads)(&self.tap, active.features)?;
        let memory = &*active.memory;
        let [rx, tx, ..] = active.queues.as_mut_slice() else {
            return Err(DeviceError::Driver("a network interface needs its two queues"));
        };
        let merge = active.features & (1 << VIRTIO_NET_F_MRG_RXBUF) != 0;
        let mut receiver = Receiver::new(memory, rx, merge);
        let outcome = self.serve(&mut receiver, tx, memory, stop);
        receiver.give_back();
        outcome
    }
}

impl Net {
    fn serve(
        &self,
        receiver: &mut Receiver<'_>,
        tx: &mut ActiveQueue,
        memory: &GuestMemoryMmap,
        stop: &EventFd,
    ) -> Result<(), DeviceError> {
        let (mut readable, mut writable) = (Buffers::new(memory), Buffers::new(memory));
        let mut poller = Poller::new()?;
        poller.add(stop, EventSet::IN, STOP)?;
        poller.add(receiver.kick(), EventSet::IN, RX_KICK)?;
        poller.add(&tx.kick, EventSet::IN, TX_KICK)?;
        // Edge by edge: the receiver remembers that there is something, also while the guest has no room for it.
        poller.add(&self.tap, EventSet::IN | EventSet::EDGE_TRIGGERED, TAP)?;
        let mut sending = true;
        loop {
            receiver.serve(&self.tap, &self.counters)?;
            if sending {
                sending = self.send(tx, memory, &mut readable, &mut writable)?;
            }
            let wait = if sending || receiver.has_work() { Wait::Poll } else { Wait::Block };
            for (token, events) in poller.wait(wait)? {
                match token {
                    STOP => return Ok(()),
                    TAP => receiver.tap_is_ready(events),
                    RX_KICK => receiver.kicked(),
                    _ => {
                        let _count = tx.kick.read();
                        sending = true;
                    }
                }
            }
        }
    }

    /// Sends a batch of the guest's packets; tells whether there are more.
    fn send<'m>(
        &self,
        tx: &mut ActiveQueue,
        memory: &'m GuestMemoryMmap,
        readable: &mut Buffers<'m>,
        writable: &mut Buffers<'m>,
    ) -> Result<bool, DeviceError> {
        let mut turns = 0..BATCH;
        let (mut used, mut more) = (false, true);
        while more && turns.next().is_some() {
            let Some(chain) = tx.pop(memory)? else {
                more = tx.queue.enable_notification(memory)?;
                continue;
            };
            let head = chain.head_index();
            readable.clear();
            writable.clear();
            gather(chain, readable, writable)?;
            self.transmit(readable);
            tx.complete(memory, head, 0)?;
            used = true;
        }
        if used {
            tx.signal_used(memory)?;
        }
        Ok(more)
    }

    /// Gives one packet to the tap. One that is malformed, or that the tap refuses, is dropped.
    fn transmit(&self, packet: &mut Buffers<'_>) {
        let len = packet.len();
        let sent = (HEADER_BYTES..=PACKET_BYTES).contains(&len) && packet.send(0..len, &self.tap).is_ok();
        if sent {
            self.counters.sent_packets.add(1);
            self.counters.sent_bytes.add(payload(len));
        } else {
            self.counters.dropped_packets.add(1);
        }
    }
}

/// Bytes of a packet without its header.
fn payload(len: usize) -> u64 {
    u64::try_from(len.saturating_sub(HEADER_BYTES)).unwrap_or(u64::MAX)
}
