//! The caller's end of a control socket. Blocking, one command at a time.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt};
use nix::sys::time::TimeVal;
use thiserror::Error;

use crate::{Command, Event, Reply, wire};

/// Why a command had no answer.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The VMM refused the command; the text says why.
    #[error("the VMM refused: {0}")]
    Refused(String),
    /// The VMM is gone or does not answer in time.
    #[error("the VMM does not answer on its control socket")]
    Io(#[from] io::Error),
    /// The VMM closed the connection.
    #[error("the VMM has ended")]
    Closed,
    /// Something else than an event came to a subscriber.
    #[error("the VMM gave an answer that was not asked for")]
    Unexpected,
}

/// A connection to a VMM's control socket.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
}

impl Client {
    /// Connects; every later send and receive has `timeout` to finish.
    pub fn connect(path: &Path, timeout: Duration) -> io::Result<Self> {
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        let limit = TimeVal::new(i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX), timeout.subsec_micros().into());
        setsockopt(&socket, sockopt::ReceiveTimeout, &limit)?;
        setsockopt(&socket, sockopt::SendTimeout, &limit)?;
        connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(Self { socket })
    }

    /// Carries out one command and returns its answer, a refusal as an error.
    pub fn ask(&self, command: &Command, fds: &[RawFd]) -> Result<Reply, ClientError> {
        wire::send(self.socket.as_fd(), wire::CONTROL, command, fds)?;
        match self.receive()? {
            Reply::Refused { reason } => Err(ClientError::Refused(reason)),
            reply => Ok(reply),
        }
    }

    /// Subscribes and returns the events, those of the past first; ends when the VMM does or a receive times out.
    pub fn events(self) -> Result<impl Iterator<Item = Result<Event, ClientError>>, ClientError> {
        self.ask(&Command::Subscribe, &[])?;
        Ok(std::iter::from_fn(move || match self.receive() {
            Ok(Reply::Event(event)) => Some(Ok(event)),
            Ok(_) => Some(Err(ClientError::Unexpected)),
            Err(ClientError::Closed) => None,
            Err(error) => Some(Err(error)),
        }))
    }

    fn receive(&self) -> Result<Reply, ClientError> {
        let (reply, _) = wire::recv(self.socket.as_fd(), wire::CONTROL)?.ok_or(ClientError::Closed)?;
        Ok(reply)
    }
}
