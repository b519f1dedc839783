//! Packets between processes: one JSON document per `SOCK_SEQPACKET` packet, descriptors beside it.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::{Serialize, de::DeserializeOwned};

/// What one packet may hold.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Longest document in bytes.
    pub bytes: usize,
    /// Most descriptors beside it.
    pub fds: usize,
}

/// Most descriptors that the kernel passes beside a packet (SCM_MAX_FD of unix(7)); room for all of them, so that
/// each has an owner and is closed, however many there are.
const KERNEL_FDS: usize = 253;

/// Of a VMM's control socket.
pub const CONTROL: Limits = Limits { bytes: 128 << 10, fds: 1 };

/// Sends one packet.
pub fn send<T: Serialize>(socket: BorrowedFd<'_>, limits: Limits, message: &T, fds: &[RawFd]) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > limits.bytes || fds.len() > limits.fds {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "packet is too long"));
    }
    let rights = [ControlMessage::ScmRights(fds)];
    let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&bytes)], control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Receives one packet; `None` when the peer has closed.
pub fn recv<T: DeserializeOwned>(socket: BorrowedFd<'_>, limits: Limits) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; limits.bytes];
    let mut space = cmsg_space!([RawFd; KERNEL_FDS]);
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
    if truncated || fds.len() > limits.fds {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "packet is too long"));
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

    const LIMITS: Limits = Limits { bytes: 64, fds: 2 };

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).expect("socketpair")
    }

    #[test]
    fn a_packet_brings_its_descriptors_and_the_end_is_told() {
        let (a, b) = pair();
        send(a.as_fd(), LIMITS, &7, &[a.as_raw_fd(), b.as_raw_fd()]).expect("sends");
        let (received, fds) = recv::<u32>(b.as_fd(), LIMITS).expect("receives").expect("a packet");
        assert_eq!((received, fds.len()), (7, 2));
        drop((a, fds));
        assert!(recv::<u32>(b.as_fd(), LIMITS).expect("receives").is_none());
    }

    #[test]
    fn more_than_the_limits_is_refused_at_both_ends() {
        let (a, b) = pair();
        let wide = Limits { bytes: 1024, fds: 3 };
        let (long, three) = ("x".repeat(64), [a.as_raw_fd(); 3]);
        assert!(send(a.as_fd(), LIMITS, &long, &[]).is_err() && send(a.as_fd(), LIMITS, &7, &three).is_err());
        send(a.as_fd(), wide, &long, &[]).expect("sends");
        send(a.as_fd(), wide, &7, &three).expect("sends");
        assert!(recv::<String>(b.as_fd(), LIMITS).is_err());
        assert!(recv::<u32>(b.as_fd(), LIMITS).is_err());
    }
}
