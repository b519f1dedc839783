//! How the host is reached: vsock in a pod, unix sockets where the agent runs as an ordinary process for a test.
//!
//! Both give stream sockets; nothing past this module knows which.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, VsockAddr, accept4, bind, connect, listen, socket,
};

/// The host's address on vsock.
const HOST_CID: u32 = libc::VMADDR_CID_HOST;

/// The port dialled once when the agent is ready.
pub(crate) const READY_PORT: u32 = 1024;

/// Where ports are.
#[derive(Debug)]
pub(crate) enum Transport {
    Vsock,
    /// Sockets in a directory: `port-N` for ours, `host-N` for the host's.
    Unix(PathBuf),
}

impl Transport {
    /// Whether the kernel is the pod's alone.
    pub(crate) fn in_guest(&self) -> bool {
        matches!(self, Self::Vsock)
    }

    fn socket(&self, flags: SockFlag) -> io::Result<OwnedFd> {
        let family = match self {
            Self::Vsock => AddressFamily::Vsock,
            Self::Unix(_) => AddressFamily::Unix,
        };
        Ok(socket(family, SockType::Stream, flags | SockFlag::SOCK_CLOEXEC, None)?)
    }

    /// Starts to listen on one of our ports.
    pub(crate) fn listen(&self, port: u32) -> io::Result<OwnedFd> {
        use std::os::fd::AsRawFd;
        let listener = self.socket(SockFlag::SOCK_NONBLOCK)?;
        match self {
            Self::Vsock => bind(listener.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, port))?,
            Self::Unix(directory) => {
                bind(listener.as_raw_fd(), &UnixAddr::new(&directory.join(format!("port-{port}")))?)?;
            }
        }
        listen(&listener, Backlog::MAXALLOWABLE)?;
        Ok(listener)
    }

    /// Dials one of the host's ports and waits for its answer.
    pub(crate) fn dial(&self, port: u32) -> io::Result<OwnedFd> {
        let stream = self.socket(SockFlag::empty())?;
        self.connect(&stream, port)?;
        Ok(stream)
    }

    /// Tells the host that the agent answers. What the host says to it does not matter: a refusal is as good.
    pub(crate) fn say_ready(&self) -> io::Result<()> {
        let stream = self.socket(SockFlag::SOCK_NONBLOCK)?;
        match self.connect(&stream, READY_PORT) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Err(error),
            _ => Ok(()),
        }
    }

    fn connect(&self, stream: &OwnedFd, port: u32) -> io::Result<()> {
        use std::os::fd::AsRawFd;
        match self {
            Self::Vsock => connect(stream.as_raw_fd(), &VsockAddr::new(HOST_CID, port))?,
            Self::Unix(directory) => {
                connect(stream.as_raw_fd(), &UnixAddr::new(&directory.join(format!("host-{port}")))?)?;
            }
        }
        Ok(())
    }
}

/// The next caller, if one waits.
pub(crate) fn accept(listener: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    use std::os::fd::AsRawFd;
    match accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK) {
        // accept4 has just made it, so `adopt` is its only owner.
        Ok(fd) => Ok(Some(crate::sys::adopt(fd))),
        Err(nix::Error::EAGAIN | nix::Error::ECONNABORTED | nix::Error::EINTR) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
