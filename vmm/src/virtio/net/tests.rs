//! The whole interface between a fake guest and a socket that keeps packets apart, as a tap does.

mod pairs;

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use nix::unistd;
use proptest::prelude::*;
use vmm_control::Limits;

use super::*;
use crate::virtio::testing::{DriverQueue, Guest, Part, Running, readable};

const RX: u64 = 0x20_0000;
const TX: u64 = 0x80_0000;
const MERGE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const QUIET: Duration = Duration::from_millis(50);

struct Rig {
    guest: Guest,
    rx: DriverQueue,
    tx: DriverQueue,
    running: Running<Net>,
    handle: Arc<Counters>,
    network: OwnedFd,
    /// Where the next receive buffer goes.
    next: u64,
}

impl Rig {
    fn new(features: u64, size: u16) -> Self {
        Self::limited(features, size, Limits::default())
    }

    fn limited(features: u64, size: u16, limits: Limits) -> Self {
        let flags = SockFlag::SOCK_NONBLOCK;
        let (tap, network) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        for socket in [&tap, &network] {
            setsockopt(socket, sockopt::SndBuf, &(1 << 20)).unwrap();
        }
        let (_, backend, handle) = on_sockets(vec![tap.into()], limits);
        let guest = Guest::new();
        let (rx, active_rx) = guest.queue(size);
        let (tx, active_tx) = guest.queue(size);
        let running = Running::start(backend, &guest, features, vec![active_rx, active_tx]);
        Self { guest, rx, tx, running, handle, network, next: RX }
    }

    /// Gives the device `count` receive buffers of `len` bytes.
    fn provide(&mut self, count: usize, len: u32) {
        for _ in 0..count {
            self.rx.post(&[Part::writable(self.next, len)]);
            self.next += u64::from(len);
        }
        self.rx.kick();
    }

    fn arrive(&self, packet: &[u8]) {
        assert_eq!(unistd::write(&self.network, packet).unwrap(), packet.len());
    }

    /// A packet as the guest gets it, and how many buffers it is in.
    fn receive(&mut self) -> (Vec<u8>, u16) {
        let mut used = vec![self.rx.wait_used()];
        let first = self.rx.first_address(used[0].0);
        let count = u16::from_le_bytes(self.guest.read(first + 10, 2).try_into().unwrap());
        // The rest is there at once: nothing is waited for.
        used.extend((1..count).map(|_| self.rx.take_used().expect("the packet is whole")));
        let bytes = used
            .into_iter()
            .flat_map(|(head, len)| self.guest.read(self.rx.first_address(head), usize::try_from(len).unwrap()));
        (bytes.collect(), count)
    }

    fn send(&mut self, parts: &[&[u8]]) {
        let mut address = TX;
        let mut chain = Vec::new();
        for part in parts {
            self.guest.write(address, part);
            chain.push(Part::readable(address, u32::try_from(part.len()).unwrap()));
            address += 0x2_0000;
        }
        self.tx.post(&chain);
        self.tx.kick();
        let _used = self.tx.wait_used();
    }

    fn departed(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 1 << 17];
        if !readable(&self.network, QUIET) {
            return None;
        }
        let len = unistd::read(&self.network, &mut bytes).unwrap();
        bytes.truncate(len);
        Some(bytes)
    }
}

/// A packet with a header in front, as a tap gives it; `num_buffers` is the device's to fill in.
fn packet(len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len).map(|n| u8::try_from(n * 3 % 251).unwrap()).collect();
    bytes[10..12].fill(0);
    bytes
}

fn with_count(mut packet: Vec<u8>, count: u16) -> Vec<u8> {
    packet[10..12].copy_from_slice(&count.to_le_bytes());
    packet
}

#[test]
fn packets_leave_as_the_guest_wrote_them() {
    let mut rig = Rig::new(0, 64);
    let bytes = packet(1526);
    rig.send(&[&bytes[..12], &bytes[12..100], &bytes[100..]]);
    assert_eq!(rig.departed().unwrap(), bytes);
    rig.send(&[&bytes]);
    assert_eq!(rig.departed().unwrap(), bytes);
    let counters = rig.handle.snapshot();
    assert_eq!(counters[2..], [("sent_packets", 2), ("sent_bytes", 2 * 1514), ("dropped_packets", 0)]);
    rig.running.stop();
}

#[test]
fn malformed_packets_are_dropped_and_the_next_one_is_not() {
    let mut rig = Rig::new(0, 64);
    rig.send(&[&packet(12)[..11]]);
    let long = packet(PACKET_BYTES + 1);
    rig.send(&[&long[..60_000], &long[60_000..]]);
    assert!(rig.departed().is_none());
    assert_eq!(rig.handle.snapshot()[4], ("dropped_packets", 2));
    rig.send(&[&long[..60_000], &long[60_000..PACKET_BYTES]]);
    assert_eq!(rig.departed().unwrap().len(), PACKET_BYTES);
    rig.running.stop();
}

#[test]
fn a_packet_arrives_in_one_buffer_without_merging() {
    let mut rig = Rig::new(0, 64);
    rig.provide(4, 1526);
    for len in [12, 60, 1526] {
        rig.arrive(&packet(len));
        assert_eq!(rig.receive(), (with_count(packet(len), 1), 1));
    }
    rig.running.stop();
}

#[test]
fn a_large_packet_arrives_in_as_many_buffers_as_it_needs() {
    let mut rig = Rig::new(MERGE, 256);
    rig.provide(256, 1536);
    for (len, count) in [(60, 1), (1536, 1), (1537, 2), (65_562, 43), (100, 1), (65_562, 43), (60, 1)] {
        rig.arrive(&packet(len));
        assert_eq!(rig.receive(), (with_count(packet(len), count), count));
    }
    let counters = rig.handle.snapshot();
    assert_eq!(counters[0], ("received_packets", 7));
    rig.running.stop();
}

#[test]
fn packets_wait_until_the_guest_has_room_for_any() {
    let mut rig = Rig::new(MERGE, 256);
    rig.provide(42, 1536);
    rig.arrive(&packet(5000));
    assert!(rig.rx.try_wait_used(QUIET).is_none(), "a packet could have been cut off");
    rig.provide(1, 1536);
    assert_eq!(rig.receive().0, with_count(packet(5000), 4));
    rig.running.stop();
}

#[test]
fn a_driver_that_has_given_all_it_has_is_served() {
    let mut rig = Rig::new(MERGE, 4);
    rig.provide(4, 2048);
    rig.arrive(&packet(3000));
    assert_eq!(rig.receive(), (with_count(packet(3000), 2), 2));
    rig.running.stop();
}

#[test]
fn buffers_left_over_go_back_when_the_device_stops() {
    let mut rig = Rig::new(MERGE, 64);
    rig.provide(60, 1536);
    rig.arrive(&packet(2000));
    assert_eq!(rig.receive().1, 2);
    let (_, active) = rig.running.stop();
    let queue = &active.queues[0].queue;
    assert_eq!((queue.next_avail(), queue.next_used()), (2, 2));
}

#[test]
fn both_directions_go_on_when_one_is_flooded() {
    let mut rig = Rig::new(MERGE, 64);
    rig.provide(64, 1536);
    let bytes = packet(100);
    // The guest's packets have nowhere to go after a while; what arrives still arrives.
    for _ in 0..2000 {
        rig.send(&[&bytes]);
    }
    rig.arrive(&packet(200));
    assert_eq!(rig.receive().0, with_count(packet(200), 1));
    rig.running.stop();
}

#[test]
fn a_tap_that_is_gone_leaves_the_guest_alone() {
    let mut rig = Rig::new(MERGE, 64);
    rig.provide(64, 1536);
    let Rig { network, .. } = rig;
    drop(network);
    rig.guest.write(TX, &packet(100));
    for _ in 0..10 {
        rig.tx.post(&[Part::readable(TX, 100)]);
        rig.tx.kick();
        let _used = rig.tx.wait_used();
    }
    assert_eq!(rig.handle.snapshot()[4], ("dropped_packets", 10));
    rig.running.stop();
}

#[test]
fn a_driver_that_breaks_the_rules_ends_the_device() {
    let mut rig = Rig::new(MERGE, 64);
    rig.provide(1, 11);
    assert!(matches!(rig.running.fail(), DeviceError::Driver(_)), "no room for a header");

    let mut rig = Rig::new(0, 64);
    rig.rx.post(&[Part::readable(RX, 2000)]);
    rig.rx.kick();
    assert!(matches!(rig.running.fail(), DeviceError::Driver(_)), "nothing to write to");

    let mut rig = Rig::new(0, 64);
    rig.tx.corrupt_index();
    rig.tx.kick();
    assert!(matches!(rig.running.fail(), DeviceError::Ring(_)));
}

#[test]
fn a_limited_interface_is_no_faster_than_that_either_way() {
    let mut rig = Rig::limited(MERGE, 256, Limits { operations_per_s: 100, bytes_per_s: 0 });
    rig.provide(256, 1536);
    // A tenth of a second's worth, and the first one, come at once.
    let count = 10 + 1 + 20;
    let began = Instant::now();
    (0..count).for_each(|_| rig.arrive(&packet(60)));
    (0..count).for_each(|_| assert_eq!(rig.receive().0.len(), 60));
    assert!(began.elapsed() >= Duration::from_millis(200), "received in {:?}", began.elapsed());
    let began = Instant::now();
    (0..count).for_each(|_| rig.send(&[&packet(60)]));
    assert!(began.elapsed() >= Duration::from_millis(200), "sent in {:?}", began.elapsed());
    assert_eq!((0..count).filter(|_| rig.departed().is_some()).count(), count, "none is lost");
    rig.running.stop();
}

#[test]
fn the_guest_is_interrupted_when_it_asks_for_it() {
    // The fake driver asks for an interrupt at the very next used buffer, and waits for nothing else: with merged
    // buffers that one is in the middle of a batch.
    let mut rig = Rig::new(MERGE, 256);
    rig.provide(256, 1536);
    for round in 0..20 {
        let len = 2000 + 700 * round;
        rig.arrive(&packet(len));
        rig.arrive(&packet(60));
        assert_eq!(rig.receive().0.len(), len);
        assert_eq!(rig.receive().0.len(), 60);
        let free = rig.rx.room();
        rig.next = RX;
        rig.provide(free, 1536);
    }
    rig.running.stop();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Packets of any length arrive whole and in order, whatever the buffers.
    #[test]
    fn packets_arrive_whole(lens in prop::collection::vec(12_usize..20_000, 1..20), size in 1536_u32..5000) {
        let mut rig = Rig::new(MERGE, 256);
        rig.provide(256, size);
        for len in lens {
            rig.arrive(&packet(len));
            let (bytes, count) = rig.receive();
            prop_assert_eq!(usize::from(count), len.div_ceil(usize::try_from(size).unwrap()));
            prop_assert_eq!(bytes, with_count(packet(len), count));
            let free = rig.rx.room();
            if rig.next + u64::from(size) * 256 > TX {
                rig.next = RX;
            }
            rig.provide(free, size);
        }
        rig.running.stop();
    }

    /// Chains of any shape in either queue are survived.
    #[test]
    fn any_chain_is_survived(chains in prop::collection::vec(
        (any::<bool>(), prop::collection::vec((RX..RX + 64, 0_u32..3000, any::<bool>()), 1..5)), 1..20)) {
        let mut rig = Rig::new(MERGE, 256);
        for (receive, parts) in chains {
            let parts: Vec<_> =
                parts.into_iter().map(|(address, len, writable)| Part { address, len, writable }).collect();
            if receive { rig.rx.post(&parts) } else { rig.tx.post(&parts) };
        }
        rig.arrive(&packet(500));
        rig.rx.kick();
        rig.tx.kick();
        let _used = rig.tx.try_wait_used(Duration::from_millis(20));
        match rig.running.end() {
            Ok(()) | Err(DeviceError::Driver(_)) => {}
            Err(error) => prop_assert!(false, "{error}"),
        }
    }
}
