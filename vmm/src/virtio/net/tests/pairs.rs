//! Several pairs of queues, and the control queue by which a driver says how many it uses.

use std::os::fd::OwnedFd;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd;
use virtio_queue::QueueT;
use vmm_control::Limits;

use super::{MERGE, QUIET, RX, TX, packet, with_count};
use crate::virtio::device::DeviceError;
use crate::virtio::net::{Net, PAIR, on_sockets};
use crate::virtio::testing::{DriverQueue, Guest, Part, Running};

const MQ: u64 = 1 << 22;
const CONTROL_VQ: u64 = 1 << 17;
/// Where commands are, and their answers.
const COMMAND: u64 = 0xf0_0000;
const ANSWER: u64 = COMMAND + 64;
/// What an answer is before it is given.
const UNANSWERED: u8 = 0xee;
const CLASS_MQ: u8 = 4;

struct Rig {
    guest: Guest,
    /// Receive, transmit, receive and so on; the control queue is last.
    queues: Vec<DriverQueue>,
    /// The far end of each pair's tap.
    networks: Vec<OwnedFd>,
    running: Running<Net>,
}

impl Rig {
    fn new(pairs: usize, features: u64) -> Self {
        let flags = SockFlag::SOCK_NONBLOCK;
        let sockets = || socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        let (taps, networks): (Vec<_>, Vec<_>) = (0..pairs).map(|_| sockets()).unzip();
        let (_, backend, _) = on_sockets(taps.into_iter().map(Into::into).collect(), Limits::default());
        let guest = Guest::new();
        let (mut queues, active): (Vec<_>, Vec<_>) = (0..=pairs * PAIR).map(|_| guest.queue(16)).unzip();
        let used = if features & MQ != 0 { pairs } else { 1 };
        for (address, queue) in (RX..).step_by(0x1_0000).zip(queues.iter_mut().step_by(PAIR).take(used)) {
            for slot in 0..8 {
                queue.post(&[Part::writable(address + 2048 * slot, 2048)]);
            }
        }
        let running = Running::start(backend, &guest, features, active);
        Self { guest, queues, networks, running }
    }

    /// Gives a command, and returns the answer.
    fn command(&mut self, bytes: &[u8]) -> u8 {
        self.guest.write(COMMAND, bytes);
        self.guest.write(ANSWER, &[UNANSWERED]);
        let control = self.queues.last_mut().unwrap();
        let length = u32::try_from(bytes.len()).unwrap();
        control.post(&[Part::readable(COMMAND, length), Part::writable(ANSWER, 1)]);
        control.kick();
        assert_eq!(control.wait_used().1, 1);
        self.guest.read(ANSWER, 1)[0]
    }

    fn use_pairs(&mut self, pairs: u8) -> u8 {
        self.command(&[CLASS_MQ, 0, pairs, 0])
    }

    fn send(&mut self, pair: usize) {
        self.guest.write(TX, &packet(100));
        self.queues[pair * PAIR + 1].post(&[Part::readable(TX, 100)]);
        self.queues[pair * PAIR + 1].kick();
    }

    fn is_sent(&mut self, pair: usize) -> bool {
        let answered = self.queues[pair * PAIR + 1].try_wait_used(QUIET).is_some();
        let mut bytes = [0; 200];
        let left = unistd::read(&self.networks[pair], &mut bytes).is_ok_and(|length| bytes[..length] == packet(100));
        assert_eq!(answered, left);
        left
    }

    fn is_received(&mut self, pair: usize) -> bool {
        let bytes = packet(300);
        assert_eq!(unistd::write(&self.networks[pair], &bytes).unwrap(), bytes.len());
        let queue = &mut self.queues[pair * PAIR];
        queue.try_wait_used(QUIET).is_some_and(|(head, length)| {
            let got = self.guest.read(queue.first_address(head), usize::try_from(length).unwrap());
            got == with_count(bytes, 1)
        })
    }
}

#[test]
fn a_driver_uses_as_many_pairs_as_it_says() {
    let mut rig = Rig::new(3, MQ | CONTROL_VQ);
    assert!(rig.is_received(0));
    rig.send(0);
    rig.send(1);
    assert!(rig.is_sent(0) && !rig.is_sent(1), "one pair until the driver says more");
    assert_eq!(rig.use_pairs(3), 0);
    assert!(rig.is_sent(1), "what has waited");
    for pair in 0..3 {
        rig.send(pair);
        assert!(rig.is_sent(pair) && rig.is_received(pair), "pair {pair}");
    }
    assert_eq!(rig.use_pairs(2), 0);
    rig.send(2);
    assert!(!rig.is_sent(2));
    for pair in 0..2 {
        rig.send(pair);
        assert!(rig.is_sent(pair) && rig.is_received(pair), "pair {pair}");
    }
    rig.running.stop();
}

#[test]
fn what_was_taken_of_each_pair_goes_back() {
    let mut rig = Rig::new(2, MQ | CONTROL_VQ | MERGE);
    for queue in [0, 2] {
        let free = rig.queues[queue].room();
        for slot in 0..free {
            let address = RX + 0x8_0000 + 2048 * u64::try_from(slot + 16 * queue).unwrap();
            rig.queues[queue].post(&[Part::writable(address, 2048)]);
        }
    }
    assert_eq!(rig.use_pairs(2), 0);
    assert!(rig.is_received(0) && rig.is_received(1));
    let (_, active) = rig.running.stop();
    for queue in [0, 2] {
        assert_eq!(active.queues[queue].queue.next_avail(), active.queues[queue].queue.next_used());
    }
}

#[test]
fn commands_that_make_no_sense_are_refused() {
    let mut rig = Rig::new(2, MQ | CONTROL_VQ);
    let commands: [&[u8]; 6] = [
        &[CLASS_MQ, 0, 0, 0],
        &[CLASS_MQ, 0, 3, 0],
        &[CLASS_MQ, 0, 1, 1],
        &[CLASS_MQ, 1, 2, 0],
        &[0, 0, 1, 0],
        &[CLASS_MQ],
    ];
    for command in commands {
        assert_eq!(rig.command(command), 1, "{command:?}");
    }
    assert!(rig.is_received(0) && !rig.is_received(1));
    assert_eq!(rig.use_pairs(2), 0);
    rig.running.stop();

    let mut rig = Rig::new(2, MQ | CONTROL_VQ);
    let control = rig.queues.last_mut().unwrap();
    control.post(&[Part::readable(COMMAND, 4)]);
    control.kick();
    assert!(matches!(rig.running.fail(), DeviceError::Driver(_)), "no room for an answer");
}

#[test]
fn a_driver_of_one_pair_has_its_control_queue_behind_that() {
    // Without VIRTIO_NET_F_MQ the third queue is the control queue (virtio 1.2 §5.1.2).
    let mut rig = Rig::new(2, CONTROL_VQ);
    rig.queues.truncate(3);
    assert_eq!(rig.use_pairs(2), 1);
    assert_eq!(rig.use_pairs(1), 0);
    assert!(rig.is_received(0));
    rig.running.stop();
}

#[test]
fn a_broken_ring_of_any_pair_ends_the_device() {
    for queue in [0, 1, 2, 3] {
        let mut rig = Rig::new(2, MQ | CONTROL_VQ);
        assert_eq!(rig.use_pairs(2), 0);
        rig.queues[queue].corrupt_index();
        rig.queues[queue].kick();
        // A receive queue is looked at for the second packet, if not before.
        for _ in 0..2 {
            let _length = unistd::write(&rig.networks[queue / PAIR], &packet(100));
        }
        assert!(matches!(rig.running.fail(), DeviceError::Ring(_)), "queue {queue}");
    }
}
