//! Packets between daemon and spawner: one JSON document each, descriptors beside it.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Longest packet in bytes.
const PACKET_BYTES: usize = 16 << 10;

/// Most descriptors beside one packet.
const PACKET_FDS: usize = 32;

/// Asks for a process; beside it the binary, the cgroup, and a descriptor for each target.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Request {
    pub(super) id: u64,
    /// The numbers that the process will know its descriptors by.
    pub(super) targets: Vec<RawFd>,
}

/// What the spawner tells.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Report {
    /// A pidfd is beside it.
    Started { id: u64, pid: u32 },
    /// There is no process.
    Failed { id: u64, reason: String },
    /// A process started earlier has ended.
    Ended { pid: u32, ended: Ended },
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ended {
    /// By itself, with this status.
    Exited(i32),
    /// By this signal.
    Killed(i32),
}

pub(super) fn send<T: Serialize>(socket: BorrowedFd<'_>, message: &T, fds: &[RawFd]) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > PACKET_BYTES || fds.len() > PACKET_FDS {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "packet to or from the spawner is too long"));
    }
    let rights = [ControlMessage::ScmRights(fds)];
    let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&bytes)], control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// `None` when the peer has closed.
pub(super) fn recv<T: DeserializeOwned>(socket: BorrowedFd<'_>) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; PACKET_BYTES];
    let mut space = cmsg_space!([RawFd; PACKET_FDS]);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let packet = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for message in packet.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = message {
            fds.extend(received.into_iter().map(own));
        }
    }
    let (length, truncated) = (packet.bytes, packet.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC));
    if truncated {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "packet to or from the spawner is too long"));
    }
    if length == 0 {
        return Ok(None);
    }
    Ok(Some((serde_json::from_slice(bytes.get(..length).unwrap_or_default())?, fds)))
}

#[expect(unsafe_code, reason = "a descriptor received beside a packet has no owner yet")]
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us (unix(7), SCM_RIGHTS) and nobody else holds it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;

    #[test]
    fn a_packet_brings_its_descriptors_and_the_end_is_told() {
        let (a, b) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).expect("socketpair");
        let request = Request { id: 7, targets: vec![0, 3] };
        send(a.as_fd(), &request, &[a.as_raw_fd(), b.as_raw_fd()]).expect("sends");
        let (received, fds) = recv::<Request>(b.as_fd()).expect("receives").expect("a packet");
        assert_eq!((received, fds.len()), (request, 2));
        drop((a, fds));
        assert!(recv::<Request>(b.as_fd()).expect("receives").is_none());
    }
}
