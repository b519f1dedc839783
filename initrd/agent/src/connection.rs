//! A connection from the host: whole messages in and out of a stream that never blocks.
//!
//! It knows frames and nothing of what they mean.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::as_conversions, clippy::arithmetic_side_effects)]

use std::io;
use std::os::fd::OwnedFd;

use agent_protocol::FrameError;
use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use prost::Message;

use crate::poll::{Poll, Token, Watched};

/// Bytes asked for in one read.
const READ_BYTES: usize = 64 << 10;

/// Unsent bytes above which nothing more should be produced for this connection.
const BACKLOG_BYTES: usize = 512 << 10;

/// Unsent bytes at which a peer that does not read is given up.
const MOST_UNSENT: usize = 8 << 20;

/// A connection and what is on its way through it.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: Watched<OwnedFd>,
    received: Vec<u8>,
    unsent: Vec<u8>,
    paused: bool,
}

impl Connection {
    /// `stream` does not block.
    pub(crate) fn new(poll: &Poll, stream: OwnedFd, token: Token) -> io::Result<Self> {
        let mut connection =
            Self { stream: Watched::new(stream, token), received: Vec::new(), unsent: Vec::new(), paused: false };
        connection.update(poll)?;
        Ok(connection)
    }

    /// Takes in what has come. `false` if the peer has closed.
    pub(crate) fn receive(&mut self) -> io::Result<bool> {
        let mut chunk = [0; READ_BYTES];
        match nix::unistd::read(self.stream.get(), &mut chunk) {
            Ok(0) => Ok(false),
            Ok(count) => {
                self.received.extend_from_slice(chunk.get(..count).unwrap_or_default());
                Ok(true)
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    /// The next whole message, if there is one.
    pub(crate) fn next<M: Message + Default>(&mut self) -> Result<Option<M>, FrameError> {
        let Some((&word, rest)) = self.received.split_first_chunk() else {
            return Ok(None);
        };
        let length = agent_protocol::frame_length(word)?;
        let Some(body) = rest.get(..length) else {
            return Ok(None);
        };
        let message = M::decode(body)?;
        self.received.drain(..length.saturating_add(word.len()).min(self.received.len()));
        Ok(Some(message))
    }

    /// Queues a message.
    pub(crate) fn send(&mut self, message: &impl Message) -> Result<(), FrameError> {
        let frame = agent_protocol::encode(message)?;
        if self.unsent.len().saturating_add(frame.len()) > MOST_UNSENT {
            return Err(io::Error::from_raw_os_error(libc::ENOBUFS).into());
        }
        self.unsent.extend_from_slice(&frame);
        Ok(())
    }

    /// Whether more may be produced for the peer.
    pub(crate) fn has_room(&self) -> bool {
        self.unsent.len() < BACKLOG_BYTES
    }

    /// Whether everything queued has left.
    pub(crate) fn is_flushed(&self) -> bool {
        self.unsent.is_empty()
    }

    /// Takes nothing more in for a while; a close is still noticed.
    pub(crate) fn pause(&mut self, paused: bool) {
        self.paused = paused;
    }

    /// Whether nothing more is taken in.
    pub(crate) fn is_paused(&self) -> bool {
        self.paused
    }

    /// Sends what the peer takes, and waits for what is to come.
    pub(crate) fn flush(&mut self, poll: &Poll) -> io::Result<()> {
        while !self.unsent.is_empty() {
            match nix::unistd::write(self.stream.get(), &self.unsent) {
                Ok(sent) => drop(self.unsent.drain(..sent.min(self.unsent.len()))),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        self.update(poll)
    }

    fn update(&mut self, poll: &Poll) -> io::Result<()> {
        let mut wanted = EpollFlags::EPOLLRDHUP;
        wanted.set(EpollFlags::EPOLLIN, !self.paused);
        wanted.set(EpollFlags::EPOLLOUT, !self.unsent.is_empty());
        self.stream.want(poll, wanted)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use agent_protocol::v1::{Done, Hello};

    use super::*;

    fn pair() -> (Poll, Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("socket pair");
        ours.set_nonblocking(true).expect("non-blocking");
        let poll = Poll::new().expect("epoll");
        let connection = Connection::new(&poll, ours.into(), Token::Control(1)).expect("connection");
        (poll, connection, theirs)
    }

    #[test]
    fn messages_come_out_whole_however_they_arrive() {
        let (_poll, mut connection, mut theirs) = pair();
        let hello = Hello { version: 2, kernel: "k".repeat(300) };
        let frame = agent_protocol::encode(&hello).expect("encodes");
        for byte in frame.iter().chain(&frame) {
            assert_eq!(connection.next::<Hello>().expect("valid").map(|_| ()), None.filter(|()| false));
            theirs.write_all(&[*byte]).expect("writes");
            assert!(connection.receive().expect("receives"));
            if connection.received.len() == frame.len() {
                assert_eq!(connection.next::<Hello>().expect("valid"), Some(hello.clone()));
            }
        }
        drop(theirs);
        assert!(!connection.receive().expect("receives"));
    }

    #[test]
    fn a_peer_that_never_reads_is_given_up() {
        let (poll, mut connection, _theirs) = pair();
        let big = Hello { version: 2, kernel: "x".repeat(1 << 20) };
        let refused = (0..64).find(|_| connection.send(&big).is_err());
        assert!(refused.is_some_and(|sent| sent >= 7), "after {refused:?} MiB");
        assert!(connection.flush(&poll).is_ok() && !connection.is_flushed() && !connection.has_room());
    }

    #[test]
    fn garbage_is_an_error() {
        let (_poll, mut connection, mut theirs) = pair();
        theirs.write_all(&[0xff; 64]).expect("writes");
        connection.receive().expect("receives");
        assert!(connection.next::<Done>().is_err());
    }
}
