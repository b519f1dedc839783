//! A TCP connection to a port of the guest's loopback, for a session that forwards one.
//!
//! It dials and moves bytes without ever blocking; what the bytes mean and where they go is the session's business.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::as_conversions, clippy::arithmetic_side_effects)]

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{
    self, AddressFamily, SockFlag, SockType, SockaddrStorage, connect, getsockopt, shutdown, sockopt,
};

use crate::poll::{Poll, Token, Watched};
use crate::stdio::CHUNK_BYTES;

/// Bytes waiting for a server that does not read, above which their sender is made to wait.
const INPUT_BYTES: usize = 256 << 10;

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Not yet answered.
    Dialling,
    /// Answered, of which nobody has been told.
    Answered,
    /// In use.
    Open,
}

/// What may still go into a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Input {
    Open,
    /// What is pending and no more.
    Ending,
    /// Nothing: the server knows.
    Ended,
}

/// A connection, and what is on its way into it.
#[derive(Debug)]
pub(crate) struct Forward {
    number: u32,
    port: u16,
    pub(crate) phase: Phase,
    stream: Watched<OwnedFd>,
    /// Dialled if the first refuses.
    spare: Option<IpAddr>,
    pending: Vec<u8>,
    input: Input,
}

impl Forward {
    /// Dials a port, IPv4 first.
    pub(crate) fn dial(number: u32, port: u16) -> io::Result<Self> {
        let spare = IpAddr::V6(Ipv6Addr::LOCALHOST);
        let (phase, stream, spare) = match begin(number, IpAddr::V4(Ipv4Addr::LOCALHOST), port) {
            Ok((phase, stream)) => (phase, stream, Some(spare)),
            Err(error) => {
                let (phase, stream) = begin(number, spare, port).map_err(|_| error)?;
                (phase, stream, None)
            }
        };
        Ok(Self { number, port, phase, stream, spare, pending: Vec::new(), input: Input::Open })
    }

    /// Something has happened to a connection that is being dialled.
    pub(crate) fn answered(&mut self) -> io::Result<()> {
        let error = getsockopt(self.stream.get(), sockopt::SocketError)?;
        if error == 0 {
            self.phase = Phase::Answered;
            return Ok(());
        }
        let error = io::Error::from_raw_os_error(error);
        let Some(spare) = self.spare.take() else { return Err(error) };
        (self.phase, self.stream) = begin(self.number, spare, self.port).map_err(|_| error)?;
        Ok(())
    }

    /// Some output: `None` if there is none now, nothing in it if there will be no more.
    pub(crate) fn read(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut bytes = vec![0; CHUNK_BYTES];
        match nix::unistd::read(self.stream.get(), &mut bytes) {
            Ok(count) => {
                bytes.truncate(count);
                Ok(Some(bytes))
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes input; what the server does not read at once is kept.
    pub(crate) fn push_input(&mut self, bytes: &[u8]) {
        if self.input == Input::Open {
            self.pending.extend_from_slice(bytes);
        }
    }

    /// No input follows.
    pub(crate) fn close_input(&mut self) {
        if self.input == Input::Open {
            self.input = Input::Ending;
        }
    }

    /// Whether more input may be pushed.
    pub(crate) fn has_input_room(&self) -> bool {
        self.pending.len() < INPUT_BYTES
    }

    /// Hands input on.
    pub(crate) fn write_input(&mut self) {
        if self.phase == Phase::Dialling {
            return;
        }
        while !self.pending.is_empty() {
            match nix::unistd::write(self.stream.get(), &self.pending) {
                Ok(count) => drop(self.pending.drain(..count.min(self.pending.len()))),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                // Reading tells how the connection ended.
                Err(_) => self.pending.clear(),
            }
        }
        if self.input == Input::Ending {
            self.input = Input::Ended;
            // One that has broken needs no end.
            let _ = shutdown(self.stream.get().as_raw_fd(), socket::Shutdown::Write);
        }
    }

    /// Waits for output if it may flow, and for input to be taken if there is any.
    pub(crate) fn watch(&mut self, poll: &Poll, output: bool) -> io::Result<()> {
        let mut wanted = EpollFlags::empty();
        wanted.set(EpollFlags::EPOLLIN, output && self.phase == Phase::Open);
        wanted.set(EpollFlags::EPOLLOUT, self.phase == Phase::Dialling || !self.pending.is_empty());
        self.stream.want(poll, wanted)
    }
}

fn begin(number: u32, address: IpAddr, port: u16) -> io::Result<(Phase, Watched<OwnedFd>)> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let stream = socket::socket(family, SockType::Stream, flags, None)?;
    let phase = match connect(stream.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(address, port))) {
        Ok(()) => Phase::Answered,
        Err(Errno::EINPROGRESS) => Phase::Dialling,
        Err(error) => return Err(error.into()),
    };
    Ok((phase, Watched::new(stream, Token::Forward(number))))
}
