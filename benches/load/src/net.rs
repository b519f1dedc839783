//! Streams and packets to and from the peer, which is a thread of the benchmark.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept, bind, connect as dial, listen, socket,
};
use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};

/// Bytes of one read or write of a stream.
const PIECE: usize = 64 << 10;

const MIB: usize = 1 << 20;

/// Bytes of a small packet.
const PACKET: usize = 64;

/// Packets of a burst; the peer counts alike. They fit any socket's buffer, so that none is lost.
const BURST: u32 = 64;

/// What a VMM waits for before it lets clients in, and where.
const READY_PORT: u32 = 1024;

/// The other end of a stream.
pub(super) trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

fn peer() -> Result<IpAddr> {
    Ok(std::env::var("LOAD_PEER").context("LOAD_PEER names no peer")?.parse()?)
}

/// A stream to the peer.
pub(super) fn connect(port: &str) -> Result<TcpStream> {
    let stream = TcpStream::connect((peer()?, port.parse()?))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A socket for packets to the peer alone; it says its address by one packet.
pub(super) fn datagrams(port: &str) -> Result<UdpSocket> {
    let peer = peer()?;
    let any = if peer.is_loopback() { "127.0.0.1:0" } else { "0.0.0.0:0" };
    let socket = UdpSocket::bind(any)?;
    socket.connect((peer, port.parse()?))?;
    socket.send(b"x")?;
    Ok(socket)
}

/// A stream from a peer that dials `port`.
pub(super) fn vsock(port: u32) -> Result<File> {
    let listener = vsock_socket()?;
    bind(listener.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, port))?;
    listen(&listener, Backlog::new(1)?)?;
    // Refused by a VMM that is no agent's: all it needs is to hear of it.
    let _ = dial(vsock_socket()?.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_HOST, READY_PORT));
    Ok(File::from(own(accept(listener.as_raw_fd())?)))
}

fn vsock_socket() -> Result<OwnedFd> {
    Ok(socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?)
}

#[expect(unsafe_code, reason = "accept(2) gives a number")]
fn own(fd: i32) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor, and nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Sends, and waits until the peer has it all.
pub(super) fn send(mut stream: impl Stream, mib: usize) -> Result<()> {
    let piece = vec![0x5a; PIECE];
    for _ in 0..mib * MIB / PIECE {
        stream.write_all(&piece)?;
    }
    Ok(stream.read_exact(&mut [0])?)
}

/// Says that it may begin, and receives.
pub(super) fn receive(mut stream: impl Stream, mib: usize) -> Result<()> {
    stream.write_all(b"x")?;
    let mut piece = vec![0; PIECE];
    let mut left = mib * MIB;
    while left > 0 {
        let count = stream.read(&mut piece)?;
        ensure!(count > 0, "the peer has left");
        left = left.saturating_sub(count);
    }
    Ok(())
}

/// Sends bursts of packets, each of which the peer answers by one.
pub(super) fn burst_send(socket: &UdpSocket, count: u32) -> Result<()> {
    for _ in 0..count / BURST {
        for _ in 0..BURST {
            socket.send(&[0x5a; PACKET])?;
        }
        socket.recv(&mut [0; PACKET])?;
    }
    Ok(())
}

/// Asks for bursts of packets, by one for each.
pub(super) fn burst_receive(socket: &UdpSocket, count: u32) -> Result<()> {
    for _ in 0..count / BURST {
        socket.send(b"x")?;
        for _ in 0..BURST {
            socket.recv(&mut [0; PACKET])?;
        }
    }
    Ok(())
}

/// Sends a byte and waits for it, again and again.
pub(super) fn echo(mut stream: TcpStream, count: u32) -> Result<()> {
    let mut byte = [0x5a];
    for _ in 0..count {
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
    }
    Ok(())
}
