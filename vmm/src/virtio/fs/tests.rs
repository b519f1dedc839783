//! The device between a fake guest and a server that is a socket's other end.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};

use super::message::{ANSWER_HEADER, MESSAGE_BYTES, REQUEST_HEADER, failure, number, set_number};
use super::{Counters, Fs, device};
use crate::virtio::device::DeviceError;
use crate::virtio::testing::{DriverQueue, Guest, HANG, Part, Running, readable};

const REQUEST: u64 = 0x20_0000;
const ANSWER: u64 = 0x40_0000;
const ROOM: u32 = 4096;

struct Machine {
    guest: Guest,
    hiprio: DriverQueue,
    requests: DriverQueue,
    server: OwnedFd,
    handle: Arc<Counters>,
    running: Running<Fs>,
}

fn pair() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
}

fn machine() -> Machine {
    let (ours, server) = pair();
    let (_, backend, handle) = device("fs0".into(), "shared", ours).unwrap();
    start(backend, handle, server)
}

fn start(backend: Fs, handle: Arc<Counters>, server: OwnedFd) -> Machine {
    let guest = Guest::new();
    let (hiprio, first) = guest.queue(128);
    let (requests, second) = guest.queue(128);
    let running = Running::start(backend, &guest, 0, vec![first, second]);
    Machine { guest, hiprio, requests, server, handle, running }
}

/// A request of `length` bytes that says so, with a body of its number.
fn request(number: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![u8::try_from(number).unwrap(); length];
    bytes[..4].copy_from_slice(&u32::try_from(length).unwrap().to_le_bytes());
    set_number(&mut bytes, number);
    bytes
}

impl Machine {
    fn post(&mut self, message: &[u8], at: u64) {
        self.guest.write(REQUEST + at, message);
        let length = u32::try_from(message.len()).unwrap();
        let parts = [Part::readable(REQUEST + at, length), Part::writable(ANSWER + at, ROOM)];
        self.requests.post(&parts);
        self.requests.kick();
    }

    fn receive(&self) -> Vec<u8> {
        assert!(readable(&self.server, HANG), "the server hears nothing");
        let mut bytes = vec![0; 2 * MESSAGE_BYTES];
        let length = recv(self.server.as_raw_fd(), &mut bytes, MsgFlags::empty()).unwrap();
        bytes.truncate(length);
        bytes
    }

    fn send(&self, bytes: &[u8]) {
        send(self.server.as_raw_fd(), bytes, MsgFlags::empty()).unwrap();
    }

    /// What the guest finds in the next answer.
    fn answer(&mut self, at: u64) -> Vec<u8> {
        let (_, length) = self.requests.wait_used();
        self.guest.read(ANSWER + at, usize::try_from(length).unwrap())
    }
}

#[test]
fn a_request_and_its_answer_are_carried_whole_under_a_number_of_ours() {
    let mut machine = machine();
    let asked = request(77, 5000);
    machine.post(&asked, 0);
    let heard = machine.receive();
    assert_eq!(heard[16..], asked[16..]);
    assert_ne!(number(&heard), 77);
    let mut answer = request(number(&heard), 600);
    machine.send(&answer);
    set_number(&mut answer, 77);
    assert_eq!(machine.answer(0), answer);
    let counters = machine.handle.snapshot();
    assert!(counters.contains(&("requests", 1)) && counters.contains(&("to_guest_bytes", 600)), "{counters:?}");
    machine.running.stop();
}

#[test]
fn what_nobody_answers_is_complete_once_it_is_sent() {
    let mut machine = machine();
    machine.guest.write(REQUEST, &request(5, REQUEST_HEADER + 8));
    machine.hiprio.post(&[Part::readable(REQUEST, 48)]);
    machine.hiprio.kick();
    assert_eq!(machine.hiprio.wait_used().1, 0);
    assert_eq!(machine.receive().len(), 48);
    machine.running.stop();
}

#[test]
fn a_request_that_lies_about_its_length_never_reaches_the_server() {
    let mut machine = machine();
    let mut lie = request(3, 100);
    lie[0] = 99;
    let (short, long) = (request(2, REQUEST_HEADER - 1), request(4, MESSAGE_BYTES + 1));
    for bad in [short, lie, long] {
        machine.post(&bad, 0);
        let errno = machine.answer(0)[4..8].to_vec();
        assert_eq!(errno, (-libc::EINVAL).to_le_bytes());
    }
    machine.post(&request(9, REQUEST_HEADER), 0);
    assert_eq!(machine.receive().len(), REQUEST_HEADER, "only the good one");
    assert!(machine.handle.snapshot().contains(&("refused", 3)));
    machine.running.stop();
}

#[test]
fn with_the_server_ends_every_request_but_not_the_device() {
    let mut machine = machine();
    machine.post(&request(1, 64), 0);
    machine.receive();
    machine.post(&request(2, 64), 0x1_0000);
    machine.receive();
    let (server, _) = pair();
    drop(std::mem::replace(&mut machine.server, server));
    assert_eq!(machine.answer(0), failure(1, libc::EIO));
    assert_eq!(machine.answer(0x1_0000), failure(2, libc::EIO));
    machine.post(&request(3, 64), 0);
    assert_eq!(machine.answer(0), failure(3, libc::EIO));
    machine.running.stop();
}

#[test]
fn a_server_that_breaks_the_rules_is_one_that_has_ended() {
    for lie in [vec![0; ANSWER_HEADER - 1], vec![0; 100], request(0, MESSAGE_BYTES + 1)] {
        let mut machine = machine();
        machine.post(&request(1, 64), 0);
        machine.receive();
        machine.send(&lie);
        assert_eq!(machine.answer(0), failure(1, libc::EIO));
        machine.running.stop();
    }
}

#[test]
fn an_answer_nobody_waits_for_is_dropped_and_one_too_long_is_an_error() {
    let mut machine = machine();
    machine.post(&request(1, 64), 0);
    let number = number(&machine.receive());
    machine.send(&request(number + 1, 64));
    machine.send(&request(number, usize::try_from(ROOM).unwrap() + 1));
    assert_eq!(machine.answer(0), failure(1, libc::EIO));
    machine.send(&request(number, 64));
    machine.post(&request(2, 64), 0);
    machine.receive();
    machine.running.stop();
}

#[test]
fn a_server_that_does_not_read_holds_requests_back_and_loses_none() {
    let mut machine = machine();
    for count in 0..20_u64 {
        machine.post(&request(count, 60_000), count * 0x1_0000);
    }
    for count in 0..20_u64 {
        let heard = machine.receive();
        assert_eq!(heard[60..70], [u8::try_from(count).unwrap(); 10], "in order");
        machine.send(&request(number(&heard), 32));
    }
    for count in 0..20 {
        assert_eq!(number(&machine.answer(count * 0x1_0000)), count);
    }
    machine.running.stop();
}

#[test]
fn the_next_driver_hears_no_answer_of_the_last() {
    let mut machine = machine();
    machine.post(&request(1, 64), 0);
    let old = number(&machine.receive());
    let Machine { server, handle, running, .. } = machine;
    let (backend, _) = running.stop();
    let mut machine = start(backend, handle, server);
    machine.post(&request(2, 64), 0);
    let new = number(&machine.receive());
    machine.send(&request(old, 64));
    machine.send(&request(new, 80));
    assert_eq!(machine.answer(0).len(), 80);
    machine.running.stop();
}

#[test]
fn broken_rings_and_chains_end_the_device() {
    let mut broken = machine();
    broken.requests.corrupt_index();
    broken.requests.kick();
    assert!(matches!(broken.running.fail(), DeviceError::Ring(_)));
    let mut outside = machine();
    let end = outside.guest.end();
    outside.requests.post(&[Part::readable(end - 8, 64), Part::writable(ANSWER, ROOM)]);
    outside.requests.kick();
    assert!(matches!(outside.running.fail(), DeviceError::Memory(_)));
    let mut mixed = machine();
    mixed.requests.post(&[Part::writable(ANSWER, ROOM), Part::readable(REQUEST, 64)]);
    mixed.requests.kick();
    assert!(matches!(mixed.running.fail(), DeviceError::Driver(_)));
    let mut circle = machine();
    circle.hiprio.post_circle();
    circle.hiprio.kick();
    assert!(matches!(circle.running.fail(), DeviceError::Driver(_)));
}

#[test]
fn tags_that_no_guest_could_name_are_refused() {
    for tag in ["", "a\0b", &"x".repeat(37)] {
        assert!(device("fs0".into(), tag, pair().0).is_err(), "{tag:?}");
    }
    let (info, ..) = device("fs0".into(), &"x".repeat(36), pair().0).unwrap();
    assert_eq!((info.id, info.config.bytes().len(), info.config.bytes()[36]), (26, 40, 1));
}
