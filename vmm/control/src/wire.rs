//! Packets of the control socket: one JSON document per `SOCK_SEQPACKET` packet, descriptors beside it.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::{Serialize, de::DeserializeOwned};

/// Longest packet in bytes.
pub const PACKET_BYTES: usize = 128 << 10;

/// Most descriptors beside one packet.
pub const PACKET_FDS: usize = 4;

/// Sends one packet.
pub fn send<T: Serialize>(socket: BorrowedFd<'_>, message: &T, fds: &[RawFd]) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > PACKET_BYTES || fds.len() > PACKET_FDS {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "control packet is too long"));
    }
    let rights = [ControlMessage::ScmRights(fds)];
    let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&bytes)], control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Receives one packet; `None` when the peer has closed.
pub fn recv<T: DeserializeOwned>(socket: BorrowedFd<'_>) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; PACKET_BYTES];
    let mut space = cmsg_space!([RawFd; PACKET_FDS]);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let packet = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let mut fds = Vec::new();
    for message in packet.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = message {
            fds.extend(received.into_iter().map(own));
        }
    }
    let (length, truncated) = (packet.bytes, packet.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC));
    if truncated {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "control packet is too long"));
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
