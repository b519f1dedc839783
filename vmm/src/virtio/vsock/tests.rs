//! The whole device between unix sockets and a fake guest that keeps the rules, or breaks them.

mod breaches;
mod sinks;
mod streams;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::thread;

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
/// What the guest is promised for each of the first connections.
const PROMISED: usize = 256 << 10;
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

/// Sends to a client that does not read, until the guest has no credit left; returns what was sent.
fn fill(rig: &mut Rig, ports: Ports, client: &UnixStream) -> Vec<u8> {
    nix::sys::socket::setsockopt(client, nix::sys::socket::sockopt::RcvBuf, &4096).unwrap();
    let (mut sent, mut taken) = (Vec::new(), 0_usize);
    loop {
        let len = (PROMISED - (sent.len() - taken)).min(32 << 10);
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
