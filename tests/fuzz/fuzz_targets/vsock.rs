//! Any packets about connections that clients have open.
#![no_main]

use std::fs::File;
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::OnceLock;
use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use nix::sys::signal::{SigHandler, Signal, signal};
use pericarp_vmm::virtio::testing::{DriverQueue, Guest, Part, Running};
use pericarp_vmm::virtio::vsock;

const RX: u64 = 0x20_0000;
const TX: u64 = 0x40_0000;
const SINK: u32 = 2000;
const READY: u32 = 1024;
const CLIENT: u32 = 1 << 31;

#[derive(Arbitrary, Debug)]
struct Packet {
    host: u8,
    guest: u8,
    op: u8,
    flags: u8,
    len: Option<u32>,
    buf_alloc: u32,
    fwd_cnt: u16,
    data: Vec<u8>,
    client: Client,
}

/// What the client does after the packet.
#[derive(Arbitrary, Debug)]
enum Client {
    Nothing,
    Write(u16),
    ShutDown,
    Leave,
}

fn listener() -> &'static (tempfile::TempDir, UnixListener) {
    static LISTENER: OnceLock<(tempfile::TempDir, UnixListener)> = OnceLock::new();
    LISTENER.get_or_init(|| {
        // As the VMM does when it starts: a client that has left is an error of a write.
        // SAFETY: no handler is installed.
        unsafe { signal(Signal::SIGPIPE, SigHandler::SigIgn) }.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("vsock")).unwrap();
        (dir, listener)
    })
}

fn header(packet: &Packet, guest: u32, host: u32, op: u16) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(3_u64.to_le_bytes());
    bytes.extend(2_u64.to_le_bytes());
    bytes.extend(guest.to_le_bytes());
    bytes.extend(host.to_le_bytes());
    bytes.extend(packet.len.unwrap_or(packet.data.len() as u32).to_le_bytes());
    bytes.extend(1_u16.to_le_bytes());
    bytes.extend(op.to_le_bytes());
    bytes.extend(u32::from(packet.flags).to_le_bytes());
    bytes.extend(packet.buf_alloc.to_le_bytes());
    bytes.extend(u32::from(packet.fwd_cnt).to_le_bytes());
    bytes
}

fn send(guest: &Guest, tx: &mut DriverQueue, header: &[u8], data: &[u8]) {
    guest.write(TX, header);
    guest.write(TX + 64, data);
    let mut parts = vec![Part::readable(TX, header.len() as u32)];
    if !data.is_empty() {
        parts.push(Part::readable(TX + 64, data.len() as u32));
    }
    tx.post(&parts);
    tx.kick();
    let _used = tx.wait_used();
}

fn take(rx: &mut DriverQueue, patience: Duration) -> bool {
    let Some((head, _)) = rx.try_wait_used(patience) else { return false };
    let address = rx.first_address(head);
    rx.post(&[Part::writable(address, 4096)]);
    rx.kick();
    true
}

fuzz_target!(|packets: Vec<Packet>| {
    let (dir, socket) = listener();
    let (_, backend, handle) = vsock::device(socket.try_clone().unwrap(), || ()).unwrap();
    let guest = Guest::new();
    let ((mut rx, active_rx), (mut tx, active_tx), (_, events)) = (guest.queue(64), guest.queue(64), guest.queue(8));
    let running = Running::start(backend, &guest, 0, vec![active_rx, active_tx, events]);
    for n in 0..32 {
        rx.post(&[Part::writable(RX + 4096 * n, 4096)]);
    }
    rx.kick();
    handle.set_sink(SINK, File::options().append(true).open("/dev/null").unwrap()).unwrap();
    let hello = Packet {
        host: 0,
        guest: 0,
        op: 0,
        flags: 0,
        len: None,
        buf_alloc: 1 << 16,
        fwd_cnt: 0,
        data: vec![],
        client: Client::Nothing,
    };
    send(&guest, &mut tx, &header(&hello, 700, READY, 1), &[]);
    assert!(take(&mut rx, Duration::from_secs(10)));
    let mut client = UnixStream::connect(dir.path().join("vsock")).ok();
    if let Some(stream) = &mut client {
        stream.write_all(b"CONNECT 5\nhello").unwrap();
        stream.set_nonblocking(true).unwrap();
        assert!(take(&mut rx, Duration::from_secs(10)), "the request is due");
    }
    for packet in packets.iter().take(32) {
        let host = [CLIENT, CLIENT, SINK, READY, 77][usize::from(packet.host % 5)];
        let port = [5, 5, 900, 901][usize::from(packet.guest % 4)];
        let data = &packet.data[..packet.data.len().min(60_000)];
        send(&guest, &mut tx, &header(packet, port, host, u16::from(packet.op % 9)), data);
        match (&packet.client, &mut client) {
            (Client::Write(len), Some(stream)) => drop(stream.write(&vec![7; usize::from(*len)])),
            (Client::ShutDown, Some(stream)) => drop(stream.shutdown(std::net::Shutdown::Write)),
            (Client::Leave, _) => client = None,
            _ => {}
        }
        while take(&mut rx, Duration::ZERO) {}
    }
    running.stop();
});
