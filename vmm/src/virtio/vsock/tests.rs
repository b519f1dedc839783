//! The whole device between unix sockets and a fake guest that keeps the rules, or breaks them.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use proptest::prelude::*;
use tempfile::TempDir;
use vmm_control::READY_PORT;

use super::packet::{HOST_CID, Header, Op, Ports, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, STREAM};
use super::*;
use crate::virtio::testing::{DriverQueue, Guest, HANG, Idling, Part, Running};

const RX: u64 = 0x20_0000;
const RX_BYTES: u32 = 4096;
const TX: u64 = 0x40_0000;
const SINK: u32 = 2000;
const GUEST_PORT: u32 = 1025;
const ROOM: u32 = 1 << 20;
/// Long enough for a device to do what it should not do.
const QUIET: Duration = Duration::from_millis(50);

struct Rig {
    guest: Guest,
    rx: DriverQueue,
    tx: DriverQueue,
    running: Running<Vsock>,
    handle: Handle,
    ready: Receiver<()>,
    dir: TempDir,
    /// Guest's side of credit for the connection under test.
    buf_alloc: u32,
    fwd_cnt: u32,
}

/// A packet as the guest got it.
struct Packet {
    ports: Ports,
    op: u16,
    flags: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
    data: Vec<u8>,
}

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

impl Rig {
    fn new() -> Self {
        let (rig, backend) = StoppedRig::new();
        let mut rig = rig.run(backend);
        rig.provide_buffers(64);
        rig
    }

    /// A rig after the agent has dialled.
    fn ready() -> Self {
        let mut rig = Self::new();
        rig.dial_ready();
        rig
    }

    fn dial_ready(&mut self) {
        let ports = Ports { host: READY_PORT, guest: 700 };
        self.send(Header::new(ports, Op::Request), &[]);
        self.ready.recv_timeout(HANG).unwrap();
        let reset = self.receive();
        assert_eq!((reset.ports, reset.op), (ports, RESET));
    }

    fn provide_buffers(&mut self, count: usize) {
        for n in 0..count {
            self.rx.post(&[Part::writable(RX + u64::try_from(n).unwrap() * u64::from(RX_BYTES), RX_BYTES)]);
        }
        self.rx.kick();
    }

    /// Sends a packet with the guest's credit in it.
    fn send(&mut self, mut header: Header, data: &[u8]) {
        header.len = u32::try_from(data.len()).unwrap();
        (header.buf_alloc, header.fwd_cnt) = (self.buf_alloc, self.fwd_cnt);
        self.send_as_is(&header, data);
    }

    fn send_as_is(&mut self, header: &Header, data: &[u8]) {
        self.send_raw(&wire(header), data);
    }

    /// Sends any bytes, and waits until the device has taken them.
    fn send_raw(&mut self, header: &[u8], data: &[u8]) {
        self.post_raw(header, data);
        let _used = self.tx.wait_used();
    }

    fn post_raw(&mut self, header: &[u8], data: &[u8]) {
        self.guest.write(TX, header);
        self.guest.write(TX + 0x1000, data);
        let mut parts = vec![Part::readable(TX, u32::try_from(header.len()).unwrap())];
        if !data.is_empty() {
            parts.push(Part::readable(TX + 0x1000, u32::try_from(data.len()).unwrap()));
        }
        self.tx.post(&parts);
        self.tx.kick();
    }

    fn op(&mut self, ports: Ports, op: Op) {
        self.send(Header::new(ports, op), &[]);
    }

    fn data(&mut self, ports: Ports, data: &[u8]) {
        self.send(Header::new(ports, Op::Data), data);
    }

    fn shut_down(&mut self, ports: Ports, flags: u32) {
        let mut header = Header::new(ports, Op::Shutdown);
        header.flags = flags;
        self.send(header, &[]);
    }

    fn receive(&mut self) -> Packet {
        self.try_receive(HANG).expect("the device is silent")
    }

    fn try_receive(&mut self, patience: Duration) -> Option<Packet> {
        let (head, len) = self.rx.try_wait_used(patience)?;
        let address = self.rx.first_address(head);
        let bytes = self.guest.read(address, usize::try_from(len).unwrap());
        self.rx.post(&[Part::writable(address, RX_BYTES)]);
        self.rx.kick();
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(bytes[..8], HOST_CID.to_le_bytes());
        assert_eq!(bytes[8..16], GUEST_CID.to_le_bytes());
        assert_eq!(bytes[28..30], STREAM.to_le_bytes());
        assert_eq!(usize::try_from(u32_at(24)).unwrap() + 44, bytes.len());
        Some(Packet {
            ports: Ports { host: u32_at(16), guest: u32_at(20) },
            op: u16::from_le_bytes(bytes[30..32].try_into().unwrap()),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
            data: bytes[44..].to_vec(),
        })
    }

    fn expect(&mut self, op: u16) -> Packet {
        let packet = self.receive();
        assert_eq!(packet.op, op);
        packet
    }

    fn expect_silence(&mut self) {
        if let Some(packet) = self.try_receive(QUIET) {
            panic!("op {} out of turn", packet.op);
        }
    }

    fn client(&self) -> UnixStream {
        let stream = UnixStream::connect(self.dir.path().join("vsock")).unwrap();
        stream.set_read_timeout(Some(HANG)).unwrap();
        stream.set_write_timeout(Some(HANG)).unwrap();
        stream
    }

    /// An open connection: the client's end and the ports.
    fn connect(&mut self) -> (UnixStream, Ports) {
        let mut client = self.client();
        writeln!(client, "CONNECT {GUEST_PORT}").unwrap();
        let request = self.expect(REQUEST);
        assert_eq!(request.ports.guest, GUEST_PORT);
        self.fwd_cnt = 0;
        self.op(request.ports, Op::Response);
        assert_eq!(line(&mut client), format!("OK {}\n", request.ports.host));
        (client, request.ports)
    }

    /// A file for a sink, and how to read it.
    fn log(&self, name: &str) -> (File, impl Fn() -> String + use<>) {
        let path = self.dir.path().join(name);
        let file = File::options().append(true).create(true).open(&path).unwrap();
        (file, move || std::fs::read_to_string(&path).unwrap())
    }

    /// A connection from the guest to a sink.
    fn dial_sink(&mut self, guest: u32) -> Ports {
        let ports = Ports { host: SINK, guest };
        self.fwd_cnt = 0;
        self.op(ports, Op::Request);
        assert_eq!(self.expect(RESPONSE).ports, ports);
        ports
    }
}

/// What is there before a driver comes.
struct StoppedRig {
    handle: Handle,
    ready: Receiver<()>,
    dir: TempDir,
}

impl StoppedRig {
    fn new() -> (Self, Vsock) {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("vsock")).unwrap();
        let (dialled, ready) = channel();
        let (_, backend, handle) = device(listener, move || dialled.send(()).unwrap()).unwrap();
        (Self { handle, ready, dir }, backend)
    }

    fn run(self, backend: Vsock) -> Rig {
        let guest = Guest::new();
        let (rx, active_rx) = guest.queue(128);
        let (tx, active_tx) = guest.queue(128);
        let (_, events) = guest.queue(8);
        let running = Running::start(backend, &guest, 0, vec![active_rx, active_tx, events]);
        let Self { handle, ready, dir } = self;
        Rig { guest, rx, tx, running, handle, ready, dir, buf_alloc: ROOM, fwd_cnt: 0 }
    }
}

/// The header as the guest writes it: from the guest to the host.
fn wire(header: &Header) -> [u8; 44] {
    let mut bytes = header.encode();
    bytes[0..16].rotate_left(8);
    bytes[16..24].rotate_left(4);
    bytes
}

fn line(stream: &mut UnixStream) -> String {
    let mut line = String::new();
    let mut byte = [0];
    while !line.ends_with('\n') && stream.read(&mut byte).unwrap() == 1 {
        line.push(char::from(byte[0]));
    }
    line
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| u8::try_from(n * 7 % 251).unwrap()).collect()
}

fn rest(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn clients_wait_for_the_agent() {
    let mut rig = Rig::new();
    let mut early = rig.client();
    writeln!(early, "CONNECT 5").unwrap();
    rig.expect_silence();
    rig.dial_ready();
    let request = rig.expect(REQUEST);
    assert_eq!(request.ports.guest, 5);
    assert!(request.ports.host >= FIRST_CLIENT_PORT);
    assert_eq!((request.buf_alloc, request.fwd_cnt), (128 << 10, 0));
    rig.op(request.ports, Op::Response);
    assert_eq!(line(&mut early), format!("OK {}\n", request.ports.host));
    // Dialling again is answered the same way and reported no more.
    rig.op(Ports { host: READY_PORT, guest: 701 }, Op::Request);
    rig.expect(RESET);
    assert!(rig.ready.try_recv().is_err());
    rig.running.stop();
}

#[test]
fn a_refused_connection_is_closed_without_a_word() {
    let mut rig = Rig::ready();
    let mut client = rig.client();
    writeln!(client, "CONNECT 5").unwrap();
    let request = rig.expect(REQUEST);
    rig.op(request.ports, Op::Reset);
    assert_eq!(rest(&mut client), b"");
    let mut client = rig.client();
    writeln!(client, "GET / HTTP/1.1").unwrap();
    assert_eq!(rest(&mut client), b"");
    rig.expect_silence();
    rig.running.stop();
}

#[test]
fn bytes_flow_both_ways_bit_for_bit() {
    let mut rig = Rig::ready();
    let (client, ports) = rig.connect();
    let bytes = pattern(1 << 20);
    let (mut to_guest, mut to_client) = (client.try_clone().unwrap(), client);
    let sent = bytes.clone();
    let writer = thread::spawn(move || to_guest.write_all(&sent).unwrap());
    let mut received = Vec::new();
    while received.len() < bytes.len() {
        let packet = rig.receive();
        assert_eq!((packet.op, packet.ports), (DATA, ports));
        received.extend(packet.data);
        rig.fwd_cnt = u32::try_from(received.len()).unwrap();
        if received.len() % (64 << 10) < 4096 {
            rig.op(ports, Op::CreditUpdate);
        }
    }
    writer.join().unwrap();
    assert_eq!(received, bytes);

    let expected = bytes.len();
    let reader = thread::spawn(move || {
        let mut bytes = vec![0; expected];
        to_client.read_exact(&mut bytes).unwrap();
        (bytes, to_client)
    });
    let (mut sent, mut taken) = (0_usize, 0_usize);
    while sent < bytes.len() {
        let free = (128 << 10) - (sent - taken);
        let len = free.min(bytes.len() - sent).min(60_000);
        if len > 0 {
            rig.data(ports, &bytes[sent..sent + len]);
            sent += len;
        }
        while let Some(packet) = rig.try_receive(if free < 60_000 { HANG } else { Duration::ZERO }) {
            assert_eq!(packet.op, CREDIT_UPDATE);
            taken = usize::try_from(packet.fwd_cnt).unwrap();
            if sent - taken < 60_000 {
                break;
            }
        }
    }
    let (received, _client) = reader.join().unwrap();
    assert_eq!(received, bytes);
    rig.running.stop();
}

#[test]
fn a_client_may_speak_before_it_is_answered() {
    let mut rig = Rig::ready();
    let mut client = rig.client();
    write!(client, "CONNECT 9\nhello").unwrap();
    let request = rig.expect(REQUEST);
    rig.expect_silence();
    rig.op(request.ports, Op::Response);
    assert_eq!(rig.expect(DATA).data, b"hello");
    rig.running.stop();
}

#[test]
fn unknown_connections_are_reset() {
    let mut rig = Rig::ready();
    for port in [0, 1, READY_PORT - 1, READY_PORT + 1, SINK, FIRST_CLIENT_PORT, u32::MAX] {
        let ports = Ports { host: port, guest: 800 };
        rig.op(ports, Op::Request);
        let reset = rig.expect(RESET);
        assert_eq!(reset.ports, ports);
    }
    for op in [Op::Response, Op::Shutdown, Op::Data, Op::CreditUpdate, Op::CreditRequest] {
        rig.op(Ports { host: 3000, guest: 800 }, op);
        rig.expect(RESET);
    }
    // A reset is not answered by one, or two sides would never stop.
    rig.op(Ports { host: 3000, guest: 800 }, Op::Reset);
    rig.expect_silence();
    rig.running.stop();
}

#[test]
fn packets_of_other_kinds_or_for_others_are_not_taken() {
    let mut rig = Rig::ready();
    let mut bytes = wire(&Header::new(Ports { host: 3000, guest: 800 }, Op::Request));
    bytes[28] = 2; // SEQPACKET was not offered
    rig.send_raw(&bytes, &[]);
    rig.expect(RESET);
    bytes[0] = 99; // another guest's address
    rig.send_raw(&bytes, &[]);
    rig.expect_silence();
    rig.running.stop();
}

#[test]
fn a_client_that_ends_its_stream_still_receives() {
    let mut rig = Rig::ready();
    let (mut client, ports) = rig.connect();
    client.write_all(b"last words").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(rig.expect(DATA).data, b"last words");
    assert_eq!(rig.expect(SHUTDOWN).flags, SHUTDOWN_SEND);
    rig.data(ports, b"an answer");
    rig.shut_down(ports, SHUTDOWN_BOTH);
    rig.expect(RESET);
    assert_eq!(rest(&mut client), b"an answer");
    rig.running.stop();
}

#[test]
fn a_guest_that_ends_its_stream_still_receives() {
    let mut rig = Rig::ready();
    let (mut client, ports) = rig.connect();
    rig.data(ports, b"last words");
    rig.shut_down(ports, SHUTDOWN_SEND);
    assert_eq!(rest(&mut client), b"last words");
    client.write_all(b"an answer").unwrap();
    assert_eq!(rig.expect(DATA).data, b"an answer");
    drop(client);
    let shutdown = rig.expect(SHUTDOWN);
    assert_eq!(shutdown.flags, SHUTDOWN_BOTH);
    rig.op(ports, Op::Reset);
    rig.expect_silence();
    rig.running.stop();
}

#[test]
fn a_guest_that_does_not_want_to_receive_is_spared() {
    let mut rig = Rig::ready();
    let (mut client, ports) = rig.connect();
    rig.shut_down(ports, SHUTDOWN_RECEIVE);
    assert_eq!(client.write_all(b"unwanted").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    rig.data(ports, b"still here");
    let mut bytes = [0; 10];
    client.read_exact(&mut bytes).unwrap();
    drop(client);
    assert_eq!(rig.expect(SHUTDOWN).flags, SHUTDOWN_BOTH);
    rig.running.stop();
}

#[test]
fn what_a_client_sent_before_it_left_arrives() {
    let mut rig = Rig::ready();
    rig.buf_alloc = 1000;
    let (mut client, ports) = rig.connect();
    let bytes = pattern(5000);
    client.write_all(&bytes).unwrap();
    drop(client);
    let (mut received, mut flags) = (Vec::new(), 0);
    while flags != SHUTDOWN_BOTH {
        let packet = rig.receive();
        match packet.op {
            DATA => {
                received.extend(packet.data);
                rig.fwd_cnt = u32::try_from(received.len()).unwrap();
            }
            CREDIT_REQUEST => rig.op(ports, Op::CreditUpdate),
            SHUTDOWN => flags |= packet.flags,
            other => panic!("op {other}"),
        }
    }
    assert_eq!(received, bytes);
    rig.running.stop();
}

#[test]
fn what_the_guest_sent_before_it_left_arrives() {
    let mut rig = Rig::ready();
    let (mut client, ports) = rig.connect();
    // More than the socket takes, so the rest is kept; then the guest is through, and says so twice.
    let bytes = fill(&mut rig, ports, &client);
    rig.shut_down(ports, SHUTDOWN_BOTH);
    rig.expect(RESET);
    rig.op(ports, Op::Reset);
    assert_eq!(rest(&mut client), bytes);
    rig.running.stop();
}

/// Sends to a client that does not read, until the guest has no credit left; returns what was sent.
fn fill(rig: &mut Rig, ports: Ports, client: &UnixStream) -> Vec<u8> {
    nix::sys::socket::setsockopt(client, nix::sys::socket::sockopt::RcvBuf, &4096).unwrap();
    let (mut sent, mut taken) = (Vec::new(), 0_usize);
    loop {
        let len = ((128 << 10) - (sent.len() - taken)).min(32 << 10);
        if len == 0 {
            rig.op(ports, Op::CreditRequest);
            let update = rig.expect(CREDIT_UPDATE);
            if usize::try_from(update.fwd_cnt).unwrap() == taken {
                return sent;
            }
            taken = usize::try_from(update.fwd_cnt).unwrap();
        } else {
            let bytes = pattern(sent.len() + len).split_off(sent.len());
            rig.data(ports, &bytes);
            sent.extend(bytes);
        }
        while let Some(packet) = rig.try_receive(Duration::ZERO) {
            assert_eq!(packet.op, CREDIT_UPDATE);
            taken = usize::try_from(packet.fwd_cnt).unwrap();
        }
    }
}

#[test]
fn a_slow_client_holds_the_guest_back_and_then_lets_it_go_on() {
    let mut rig = Rig::ready();
    let (mut client, ports) = rig.connect();
    let sent = fill(&mut rig, ports, &client);
    assert!(sent.len() < 1 << 20, "{} bytes are somewhere", sent.len());
    let mut bytes = vec![0; sent.len()];
    client.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, sent);
    let update = rig.expect(CREDIT_UPDATE);
    assert!(usize::try_from(update.fwd_cnt).unwrap() > sent.len() - (128 << 10));
    rig.running.stop();
}

#[test]
fn a_guest_that_overruns_its_credit_is_reset() {
    let mut rig = Rig::ready();
    let (mut client, ports) = rig.connect();
    let (mut other, other_ports) = rig.connect();
    let sent = fill(&mut rig, ports, &client);
    rig.data(ports, b"x");
    let reset = rig.expect(RESET);
    assert_eq!(reset.ports, ports);
    let received = rest(&mut client);
    assert_eq!(sent[..received.len()], received);
    // Nobody else suffers.
    rig.data(other_ports, b"fine");
    let mut bytes = [0; 4];
    other.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"fine");
    rig.running.stop();
}

#[test]
fn a_guest_that_lies_about_its_credit_is_reset() {
    for fwd_cnt in [1, 1 << 31, u32::MAX] {
        let mut rig = Rig::ready();
        let (mut client, ports) = rig.connect();
        rig.fwd_cnt = fwd_cnt;
        rig.op(ports, Op::CreditUpdate);
        rig.expect(RESET);
        assert_eq!(rest(&mut client), b"");
        rig.running.stop();
    }
}

#[test]
fn a_guest_that_never_reads_gets_no_more_than_its_room() {
    let mut rig = Rig::ready();
    rig.buf_alloc = 10_000;
    let (client, ports) = rig.connect();
    client.set_nonblocking(true).unwrap();
    let mut written = 0;
    while let Ok(count) = (&client).write(&[7; 65536]) {
        written += count;
    }
    assert!(written > 10_000);
    let mut received = 0;
    while received < 10_000 {
        received += rig.expect(DATA).data.len();
    }
    assert_eq!(received, 10_000);
    rig.expect(CREDIT_REQUEST);
    rig.expect_silence();
    // Asked once per drought, and answered with no news it does not ask again.
    rig.op(ports, Op::CreditUpdate);
    rig.expect_silence();
    rig.fwd_cnt = 500;
    rig.op(ports, Op::CreditUpdate);
    assert_eq!(rig.expect(DATA).data.len(), 500);
    rig.expect(CREDIT_REQUEST);
    rig.running.stop();
}

#[test]
fn a_guest_that_breaks_the_order_is_reset() {
    let breaches: [fn(&mut Rig, Ports); 4] = [
        |rig, ports| rig.op(ports, Op::Request),
        |rig, ports| rig.op(ports, Op::Response),
        |rig, ports| {
            rig.shut_down(ports, SHUTDOWN_SEND);
            rig.data(ports, b"more");
        },
        |rig, ports| {
            // A payload that is not there.
            let mut header = Header::new(ports, Op::Data);
            (header.len, header.buf_alloc) = (5, ROOM);
            rig.send_as_is(&header, b"four");
        },
    ];
    for breach in breaches {
        let mut rig = Rig::ready();
        let (mut client, ports) = rig.connect();
        breach(&mut rig, ports);
        assert_eq!(rig.expect(RESET).ports, ports);
        assert_eq!(rest(&mut client), b"");
        rig.running.stop();
    }
    let mut rig = Rig::ready();
    let mut client = rig.client();
    writeln!(client, "CONNECT 5").unwrap();
    let request = rig.expect(REQUEST);
    rig.data(request.ports, b"too early");
    rig.expect(RESET);
    assert_eq!(rest(&mut client), b"");
    rig.running.stop();
}

#[test]
fn a_flood_without_room_for_answers_waits_in_its_queue() {
    let (rig, backend) = StoppedRig::new();
    let mut rig = rig.run(backend);
    let header = wire(&Header::new(Ports { host: 5000, guest: 1 }, Op::Request));
    let mut taken = 0;
    loop {
        while rig.tx.room() > 0 {
            rig.post_raw(&header, &[]);
        }
        match rig.tx.try_wait_used(QUIET) {
            Some(_) => taken += 1,
            None => break,
        }
    }
    assert_eq!(taken, 256);
    // With room for answers the device goes on by itself.
    rig.provide_buffers(64);
    for _ in 0..300 {
        rig.expect(RESET);
    }
    rig.running.stop();
}

#[test]
fn connections_are_limited() {
    let mut rig = Rig::ready();
    let (file, _) = rig.log("log");
    rig.handle.set_sink(SINK, file).unwrap();
    for guest in 0..u32::try_from(CONNECTIONS).unwrap() {
        rig.dial_sink(guest);
    }
    rig.op(Ports { host: SINK, guest: 5000 }, Op::Request);
    rig.expect(RESET);
    // A client waits its turn at the door.
    let mut client = rig.client();
    writeln!(client, "CONNECT 5").unwrap();
    rig.expect_silence();
    rig.shut_down(Ports { host: SINK, guest: 7 }, SHUTDOWN_BOTH);
    rig.expect(RESET);
    rig.expect(REQUEST);
    assert_eq!(rig.handle.counters()[0], ("connections", u64::try_from(CONNECTIONS).unwrap() + 1));
    rig.running.stop();
}

#[test]
fn patience_has_an_end() {
    let (rig, mut backend) = StoppedRig::new();
    backend.patience = Duration::from_millis(100);
    let mut rig = rig.run(backend);
    rig.provide_buffers(64);
    rig.dial_ready();
    // A client that never names its port.
    let mut mute = rig.client();
    assert_eq!(rest(&mut mute), b"");
    // A guest that never answers a request.
    let mut client = rig.client();
    writeln!(client, "CONNECT 5").unwrap();
    let request = rig.expect(REQUEST);
    assert_eq!(rig.expect(RESET).ports, request.ports);
    assert_eq!(rest(&mut client), b"");
    // A guest that never confirms the end.
    let (client, ports) = rig.connect();
    drop(client);
    rig.expect(SHUTDOWN);
    assert_eq!(rig.expect(RESET).ports, ports);
    // A connection in use has no deadline.
    let (mut client, ports) = rig.connect();
    thread::sleep(Duration::from_millis(300));
    rig.data(ports, b"on time");
    assert_eq!(client.read(&mut [0; 100]).unwrap(), 7);
    rig.running.stop();
}

#[test]
fn a_sink_takes_lines_and_changes_files_between_them() {
    let mut rig = Rig::ready();
    let (first, read_first) = rig.log("first");
    let (second, read_second) = rig.log("second");
    rig.handle.set_sink(SINK, first).unwrap();
    let ports = rig.dial_sink(900);
    rig.data(ports, b"one\ntw");
    rig.handle.set_sink(SINK, second).unwrap();
    assert_eq!(read_first(), "one\ntw");
    rig.data(ports, b"o, still two");
    rig.data(ports, b"\nthree\n");
    rig.data(ports, b"four\n");
    assert_eq!(read_first(), "one\ntwo, still two\n");
    assert_eq!(read_second(), "three\nfour\n");
    // Between lines the change is at once.
    let (third, read_third) = rig.log("third");
    rig.handle.set_sink(SINK, third).unwrap();
    rig.data(ports, b"five\n");
    assert_eq!(read_third(), "five\n");
    rig.running.stop();
}

#[test]
fn a_line_that_nobody_finishes_does_not_hold_up_the_change() {
    let mut rig = Rig::ready();
    let (first, read_first) = rig.log("first");
    let (second, read_second) = rig.log("second");
    rig.handle.set_sink(SINK, first).unwrap();
    let ports = rig.dial_sink(900);
    rig.data(ports, b"half");
    rig.handle.set_sink(SINK, second).unwrap();
    rig.shut_down(ports, SHUTDOWN_BOTH);
    rig.expect(RESET);
    let ports = rig.dial_sink(901);
    rig.data(ports, b"whole\n");
    assert_eq!((read_first(), read_second()), ("half".into(), "whole\n".into()));
    rig.running.stop();
}

#[test]
fn a_sink_gives_its_credit_back() {
    let mut rig = Rig::ready();
    let (file, read) = rig.log("log");
    rig.handle.set_sink(SINK, file).unwrap();
    let ports = rig.dial_sink(900);
    let line = [&[b'x'; 16_383][..], b"\n"].concat();
    let (mut sent, mut taken) = (0_u32, 0_u32);
    while sent < 1 << 20 {
        assert!(sent - taken <= 112 << 10, "the guest is stuck");
        rig.data(ports, &line);
        sent += 16 << 10;
        while let Some(packet) = rig.try_receive(Duration::ZERO) {
            assert_eq!(packet.op, CREDIT_UPDATE);
            taken = packet.fwd_cnt;
        }
    }
    assert_eq!(read().len(), 1 << 20);
    rig.running.stop();
}

#[test]
fn a_removed_sink_resets_its_connections() {
    let mut rig = Rig::ready();
    let (file, read) = rig.log("log");
    rig.handle.set_sink(SINK, file).unwrap();
    let ports = rig.dial_sink(900);
    rig.data(ports, b"line\n");
    rig.handle.remove_sink(SINK).unwrap();
    assert_eq!(rig.expect(RESET).ports, ports);
    assert_eq!(read(), "line\n");
    rig.op(Ports { host: SINK, guest: 901 }, Op::Request);
    rig.expect(RESET);
    assert!(rig.handle.remove_sink(SINK).unwrap_err().to_string().contains("no sink on port 2000"));
    rig.running.stop();
}

#[test]
fn a_full_disk_costs_lines_and_nothing_else() {
    let mut rig = Rig::ready();
    let full = File::options().append(true).open("/dev/full").unwrap();
    rig.handle.set_sink(SINK, full).unwrap();
    let ports = rig.dial_sink(900);
    rig.data(ports, b"lost\nlost too, and not yet en");
    let (file, read) = rig.log("log");
    rig.handle.set_sink(SINK, file).unwrap();
    rig.data(ports, b"ded\nkept\n");
    assert_eq!(read(), "kept\n");
    assert_eq!(rig.handle.counters()[5], ("sink_dropped_bytes", 33));
    rig.running.stop();
}

#[test]
fn sinks_are_set_while_there_is_no_driver_and_stay() {
    let (rig, backend) = StoppedRig::new();
    let idling = Idling::start(backend);
    let path = rig.dir.path().join("log");
    rig.handle.set_sink(SINK, File::options().append(true).create(true).open(&path).unwrap()).unwrap();
    let mut rig = rig.run(idling.stop());
    rig.provide_buffers(8);
    let ports = rig.dial_sink(900);
    rig.data(ports, b"half a li");
    // The driver starts anew; its connections are gone, the sink is not.
    let (backend, _) = rig.running.stop();
    let Rig { handle, ready, dir, .. } = rig;
    let mut rig = StoppedRig { handle, ready, dir }.run(backend);
    rig.provide_buffers(8);
    let ports = rig.dial_sink(900);
    rig.data(ports, b"line\n");
    assert_eq!(std::fs::read_to_string(path).unwrap(), "half a li\nline\n");
    rig.running.stop();
}

#[test]
fn bad_sinks_are_refused_with_a_reason() {
    let rig = Rig::new();
    let good = || rig.log("log").0;
    for port in [0, READY_PORT, FIRST_CLIENT_PORT, u32::MAX] {
        let refusal = rig.handle.set_sink(port, good()).unwrap_err().to_string();
        assert!(refusal.contains("cannot be a sink"), "{refusal}");
    }
    let reader = File::open("/dev/null").unwrap();
    assert!(rig.handle.set_sink(SINK, reader).unwrap_err().to_string().contains("for appending"));
    let writer = tempfile::tempfile().unwrap();
    assert!(rig.handle.set_sink(SINK, writer).unwrap_err().to_string().contains("for appending"));
    let (_reader, pipe) = io::pipe().unwrap();
    let pipe = File::from(std::os::fd::OwnedFd::from(pipe));
    assert!(rig.handle.set_sink(SINK, pipe).unwrap_err().to_string().contains("not a pipe"));
    rig.running.stop();
}

#[test]
fn a_ring_that_lies_ends_the_device() {
    let mut rig = Rig::new();
    rig.tx.corrupt_index();
    rig.tx.kick();
    assert!(matches!(rig.running.fail(), DeviceError::Ring(_)));

    let mut rig = Rig::new();
    rig.post_raw(&[0; 43], &[]);
    assert!(matches!(rig.running.fail(), DeviceError::Driver(_)), "no room for a header");

    let (rig, backend) = StoppedRig::new();
    let mut rig = rig.run(backend);
    rig.rx.post(&[Part::writable(RX, 44)]);
    rig.post_raw(&wire(&Header::new(Ports { host: 1, guest: 1 }, Op::Request)), &[]);
    assert!(matches!(rig.running.fail(), DeviceError::Driver(_)), "no room for data");
}

#[test]
fn a_driver_that_leaves_takes_its_connections_along() {
    let mut rig = Rig::ready();
    let (mut client, _) = rig.connect();
    let (backend, _) = rig.running.stop();
    assert_eq!(rest(&mut client), b"");
    let Rig { handle, ready, dir, .. } = rig;
    let mut rig = StoppedRig { handle, ready, dir }.run(backend);
    rig.provide_buffers(8);
    rig.dial_ready();
    let (_client, _) = rig.connect();
    rig.running.stop();
}

#[derive(Clone, Debug)]
struct Noise {
    host: u8,
    guest: u8,
    op: u16,
    flags: u32,
    len: Option<u32>,
    buf_alloc: u32,
    fwd_cnt: u32,
    data: Vec<u8>,
}

fn noise() -> impl Strategy<Value = Noise> {
    let data = prop::collection::vec(any::<u8>(), 0..200);
    let credit = prop_oneof![Just(0_u32), 0_u32..300, any::<u32>()];
    (0_u8..5, 0_u8..3, 0_u16..9, 0_u32..5, prop::option::weighted(0.1, any::<u32>()), (any::<u32>(), credit), data)
        .prop_map(|(host, guest, op, flags, len, (buf_alloc, fwd_cnt), data)| Noise {
            host,
            guest,
            op,
            flags,
            len,
            buf_alloc,
            fwd_cnt,
            data,
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Any packets at all, about any connection, are survived; the device still serves an honest one afterwards.
    #[test]
    fn any_packets_are_survived(packets in prop::collection::vec(noise(), 1..60)) {
        let mut rig = Rig::ready();
        let (file, _) = rig.log("log");
        rig.handle.set_sink(SINK, file).unwrap();
        let (client, ports) = rig.connect();
        client.set_nonblocking(true).unwrap();
        let _count = (&client).write(&[1; 3000]).unwrap();
        for noise in packets {
            let host = [SINK, READY_PORT, ports.host, 77, ports.host + 1][usize::from(noise.host)];
            let guest = [ports.guest, 900, 901][usize::from(noise.guest)];
            let mut bytes = wire(&Header {
                ports: Ports { host, guest },
                op: Some(Op::Data),
                len: noise.len.unwrap_or(u32::try_from(noise.data.len()).unwrap()),
                flags: noise.flags,
                buf_alloc: noise.buf_alloc,
                fwd_cnt: noise.fwd_cnt,
            });
            bytes[30..32].copy_from_slice(&noise.op.to_le_bytes());
            rig.send_raw(&bytes, &noise.data);
            while rig.try_receive(Duration::ZERO).is_some() {}
        }
        while rig.try_receive(QUIET).is_some() {}
        rig.buf_alloc = ROOM;
        let (mut client, ports) = rig.connect();
        rig.data(ports, b"fine");
        let mut bytes = [0; 4];
        client.read_exact(&mut bytes).unwrap();
        prop_assert_eq!(&bytes, b"fine");
        rig.running.stop();
    }
}
