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

mod control;
mod late;
mod pair;
mod receive;
mod tap;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::thread;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
};
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;
use vmm_control::MOST_QUEUES;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::control::{Change, Control};
use self::pair::Pair;
pub use self::tap::TapError;
use super::counters::counters;
use super::device::{Active, ActiveQueue, Backend, DeviceConfig, DeviceError, DeviceInfo, Vectors};
use super::limit::SharedLimit;
use crate::config::NetSetup;

/// Bytes of `struct virtio_net_hdr_v1`.
const HEADER_BYTES: usize = 12;

/// Longest packet with its header: 64 KiB of IP behind an Ethernet header with a VLAN tag (virtio 1.2 §5.1.6.3.1).
const PACKET_BYTES: usize = HEADER_BYTES + 18 + 65_535;

/// Entries of a receive and of a transmit queue.
const QUEUE_SIZE: u16 = 256;

/// Entries of the control queue, on which a driver waits for each answer.
const CONTROL_SIZE: u16 = 16;

/// Queues of a pair.
const PAIR: usize = 2;

/// Most packets in one direction before the other has its turn.
const BATCH: usize = 64;

counters! {
    received_packets,
    received_bytes,
    sent_packets,
    sent_bytes,
    dropped_packets,
}

/// The interface's first thread; each further pair of queues that the driver uses has one of its own as long as it does.
pub struct Net {
    name: String,
    /// One for each pair of queues: the same interface of the host's.
    taps: Vec<File>,
    /// Those of the taps that packets are given to: the first ones.
    attached: usize,
    /// Of what is received, and of what is sent.
    limits: [SharedLimit; 2],
    counters: Arc<Counters>,
    switches: Switches,
}

/// What a tap is told; in tests without a tap, nothing.
#[derive(Clone, Copy)]
struct Switches {
    set_offloads: fn(&File, u64) -> io::Result<()>,
    attach: fn(&File, bool) -> io::Result<()>,
}

/// Makes an interface with a pair of queues for each of its taps.
pub fn device(name: String, setup: NetSetup) -> Result<(DeviceInfo, Net, Arc<Counters>), TapError> {
    let taps = &setup.taps;
    if !(1..=usize::from(MOST_QUEUES)).contains(&taps.len()) {
        return Err(TapError::Count(taps.len()));
    }
    taps.iter().try_for_each(|tap| tap::prepare(tap, taps.len() > 1))?;
    Ok(parts(name, setup, Switches { set_offloads: tap::set_offloads, attach: tap::attach }))
}

/// An interface in front of sockets that keep packets apart, for tests and fuzz targets.
#[cfg(any(test, feature = "testing"))]
pub fn on_sockets(sockets: Vec<File>, limits: vmm_control::Limits) -> (DeviceInfo, Net, Arc<Counters>) {
    let setup = NetSetup { taps: sockets, mac: [2; 6], limits };
    parts("net0".into(), setup, Switches { set_offloads: |_, _| Ok(()), attach: |_, _| Ok(()) })
}

fn parts(name: String, setup: NetSetup, switches: Switches) -> (DeviceInfo, Net, Arc<Counters>) {
    let NetSetup { taps, mac, limits } = setup;
    let limits = [(); 2].map(|()| SharedLimit::new(limits));
    let counters = Arc::<Counters>::default();
    let (info, attached) = (info(name.clone(), taps.len(), mac), taps.len());
    (info, Net { name, taps, attached, limits, counters: Arc::clone(&counters), switches }, counters)
}

fn info(name: String, pairs: usize, mac: [u8; 6]) -> DeviceInfo {
    let mut features = vec![
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_GUEST_CSUM,
        VIRTIO_NET_F_MAC,
        VIRTIO_NET_F_GUEST_TSO4,
        VIRTIO_NET_F_GUEST_TSO6,
        VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_HOST_TSO6,
        VIRTIO_NET_F_MRG_RXBUF,
    ];
    let mut queue_sizes = vec![QUEUE_SIZE; pairs.saturating_mul(PAIR)];
    // `struct virtio_net_config` (virtio 1.2 §5.1.4), as far as what is offered needs it.
    let mut config = mac.to_vec();
    if pairs > 1 {
        features.extend([VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ]);
        queue_sizes.push(CONTROL_SIZE);
        config.extend([0; 2]); // status, not offered
        config.extend(u16::try_from(pairs).unwrap_or(u16::MAX).to_le_bytes());
    }
    DeviceInfo {
        name,
        id: u16::try_from(VIRTIO_ID_NET).unwrap_or_default(),
        // Network controller, Ethernet.
        class: [0x02, 0x00, 0x00],
        features: features.iter().fold(0, |bits, bit| bits | 1 << bit),
        queue_sizes,
        vectors: if pairs > 1 { Vectors::EachQueue } else { Vectors::Shared },
        config: DeviceConfig::Fixed(config),
    }
}

impl Backend for Net {
    fn run(&mut self, active: &mut Active, stop: &EventFd) -> Result<(), DeviceError> {
        let has = |bit: u32| active.features & (1 << bit) != 0;
        let (merge, most) = (has(VIRTIO_NET_F_MRG_RXBUF), if has(VIRTIO_NET_F_MQ) { self.taps.len() } else { 1 });
        let memory = &*active.memory;
        // The control queue is behind the pairs that the driver may use (virtio 1.2 §5.1.2).
        let queues = active.queues.as_mut_slice();
        let (queues, rest) = queues.split_at_mut_checked(most.saturating_mul(PAIR)).unwrap_or_default();
        let control = rest.first_mut().filter(|queue| queue.queue.ready());
        let mut control = control.map(|queue| Control::new(memory, queue, most));
        if let Some(tap) = self.taps.first() {
            (self.switches.set_offloads)(tap, active.features)?;
        }
        self.attach(1)?;
        while let Some(change) = self.serve(queues, memory, merge, stop, control.as_mut())? {
            self.attach(change.pairs)?;
            control.as_mut().map_or(Ok(()), |control| control.done(change))?;
        }
        Ok(())
    }
}

impl Net {
    /// Has the host give packets to so many of the taps.
    fn attach(&mut self, wanted: usize) -> io::Result<()> {
        for (number, tap) in self.taps.iter().enumerate() {
            let (is, shall_be) = (number < self.attached, number < wanted);
            if is != shall_be {
                (self.switches.attach)(tap, shall_be)?;
            }
        }
        self.attached = wanted;
        Ok(())
    }

    /// Serves the pairs that are attached, each in a thread but for the first, until one of them ends and so all do.
    fn serve<'c>(
        &self,
        queues: &mut [ActiveQueue],
        memory: &GuestMemoryMmap,
        merge: bool,
        stop: &EventFd,
        control: Option<&mut Control<'c>>,
    ) -> Result<Option<Change<'c>>, DeviceError> {
        let mut pairs = queues.chunks_mut(PAIR).zip(&self.taps).take(self.attached);
        let (first, tap) = pairs.next().ok_or(DeviceError::Driver("a network interface needs its two queues"))?;
        let pair = |queues, tap| Pair::new(memory, queues, tap, &self.limits, &self.counters, merge);
        if self.attached == 1 {
            return pair(first, tap)?.serve(&[stop], control);
        }
        let halt = EventFd::new(EFD_NONBLOCK)?;
        thread::scope(|scope| {
            let spawn = |(number, (queues, tap)): (usize, (_, _))| {
                let (halt, pair) = (&halt, &pair);
                let work = move || {
                    let outcome = pair(queues, tap).and_then(|pair| pair.serve(&[stop, halt], None));
                    halt.write(1)?;
                    outcome.map(drop)
                };
                thread::Builder::new().name(format!("{}.{number}", self.name)).spawn_scoped(scope, work)
            };
            let threads = (1..).zip(pairs).map(spawn).collect::<io::Result<Vec<_>>>();
            let outcome = match &threads {
                Ok(_) => pair(first, tap).and_then(|pair| pair.serve(&[stop, &halt], control)),
                Err(_) => Ok(None),
            };
            halt.write(1)?;
            // A thread that panicked has taken the process with it.
            threads?.into_iter().try_for_each(|thread| thread.join().unwrap_or(Ok(())))?;
            outcome
        })
    }
}

/// Bytes of a packet without its header.
fn frame(len: usize) -> usize {
    len.saturating_sub(HEADER_BYTES)
}
