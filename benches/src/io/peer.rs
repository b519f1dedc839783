//! The other end of a job's streams and packets: a thread of this process, on the host.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};

use super::jobs::Side;

/// Bytes of one read or write of a stream.
const PIECE: usize = 64 << 10;

const MIB: usize = 1 << 20;

/// Bytes of a small packet, and packets of a burst, as the load counts them.
const PACKET: usize = 64;
const BURST: u32 = 64;

/// Longest wait for the load.
const PATIENCE: Duration = Duration::from_secs(60);

/// Between two attempts to reach a guest's vsock port.
const PAUSE: Duration = Duration::from_millis(20);

/// The port in the guest that is dialled.
const VSOCK_PORT: u16 = 7000;

/// How to reach a machine's vsock.
#[derive(Clone, Debug)]
pub(super) enum Way {
    /// By a VMM's socket.
    Unix(PathBuf),
    /// By the host's kernel.
    Cid(u32),
    /// Not at all.
    None,
}

/// A peer that listens, and does nothing yet.
pub(super) struct Peer {
    side: Side,
    count: u32,
    socket: Socket,
}

enum Socket {
    None,
    Tcp(TcpListener),
    Udp(UdpSocket),
    Vsock,
}

impl Peer {
    /// Opens what the load is to reach.
    pub(super) fn listen(side: Side, count: u32) -> Result<Self> {
        let socket = match side {
            Side::None => Socket::None,
            Side::Sink | Side::Source | Side::Echo => Socket::Tcp(TcpListener::bind("0.0.0.0:0")?),
            Side::BurstSink | Side::BurstSource => Socket::Udp(UdpSocket::bind("0.0.0.0:0")?),
            Side::VsockSink | Side::VsockSource => Socket::Vsock,
        };
        Ok(Self { side, count, socket })
    }

    /// The port for the load's job.
    pub(super) fn port(&self) -> Result<u16> {
        Ok(match &self.socket {
            Socket::None => 0,
            Socket::Tcp(listener) => listener.local_addr()?.port(),
            Socket::Udp(socket) => socket.local_addr()?.port(),
            Socket::Vsock => VSOCK_PORT,
        })
    }

    /// Does its part in a thread of its own.
    pub(super) fn serve(self, way: Way) -> Result<JoinHandle<Result<()>>> {
        let Self { side, count, socket } = self;
        Ok(thread::Builder::new().name("peer".into()).spawn(move || match socket {
            Socket::None => Ok(()),
            Socket::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                of_stream(side, stream, count)
            }
            Socket::Udp(socket) => {
                socket.set_read_timeout(Some(PATIENCE))?;
                of_packets(side, &socket, count)
            }
            Socket::Vsock => of_stream(side, dial(&way)?, count),
        })?)
    }
}

fn of_stream(side: Side, mut stream: impl Read + Write, count: u32) -> Result<()> {
    let mut piece = vec![0x5a; PIECE];
    let bytes = usize::try_from(count)? * MIB;
    match side {
        Side::Sink | Side::VsockSink => {
            let mut left = bytes;
            while left > 0 {
                let taken = stream.read(&mut piece)?;
                ensure!(taken > 0, "the load has left");
                left = left.saturating_sub(taken);
            }
            stream.write_all(b"x")?;
        }
        Side::Source | Side::VsockSource => {
            stream.read_exact(&mut [0])?;
            for _ in 0..bytes / PIECE {
                stream.write_all(&piece)?;
            }
        }
        Side::Echo => {
            let mut byte = [0];
            for _ in 0..count {
                stream.read_exact(&mut byte)?;
                stream.write_all(&byte)?;
            }
        }
        Side::None | Side::BurstSink | Side::BurstSource => bail!("not a stream's"),
    }
    // Until the load has closed its end.
    match stream.read(&mut piece) {
        Err(error) if error.kind() != ErrorKind::ConnectionReset => Err(error.into()),
        _ => Ok(()),
    }
}

fn of_packets(side: Side, socket: &UdpSocket, count: u32) -> Result<()> {
    let mut packet = [0x5a; PACKET];
    let (_, load) = socket.recv_from(&mut packet)?;
    socket.connect(load)?;
    for _ in 0..count / BURST {
        let (taken, given) = if side == Side::BurstSink { (BURST, 1) } else { (1, BURST) };
        for _ in 0..taken {
            socket.recv(&mut packet)?;
        }
        for _ in 0..given {
            socket.send(&packet)?;
        }
    }
    Ok(())
}

/// Connects to the load's port in the guest, which may not listen yet.
fn dial(way: &Way) -> Result<File> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match try_dial(way) {
            Ok(stream) => return Ok(stream.into()),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => thread::sleep(PAUSE),
        }
    }
}

fn try_dial(way: &Way) -> Result<OwnedFd> {
    match way {
        Way::Unix(path) => {
            let mut stream = UnixStream::connect(path)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            writeln!(stream, "CONNECT {VSOCK_PORT}")?;
            // `OK`, a port and a line feed; what follows is the load's.
            let mut byte = [0];
            while byte != *b"\n" {
                stream.read_exact(&mut byte).context("the guest refuses")?;
            }
            Ok(stream.into())
        }
        Way::Cid(cid) => {
            let stream = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
            connect(stream.as_raw_fd(), &VsockAddr::new(*cid, VSOCK_PORT.into())).map_err(io::Error::from)?;
            Ok(stream)
        }
        Way::None => bail!("there is no vsock"),
    }
}
