//! What a tap has to be, and what it may hand over unfinished.

#![expect(unsafe_code, reason = "a tap is set up by ioctls")]

use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::AsRawFd;

use libc::{
    IFF_ATTACH_QUEUE, IFF_DETACH_QUEUE, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, TUN_F_CSUM, TUN_F_TSO4,
    TUN_F_TSO6, c_int, c_short, ifreq,
};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use thiserror::Error;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6};
use vmm_control::MOST_QUEUES;

use super::HEADER_BYTES;

/// Why a tap cannot be used.
#[derive(Debug, Error)]
pub enum TapError {
    /// None, or more than there can be pairs of queues.
    #[error("a network interface takes 1 to {MOST_QUEUES} descriptors of its tap, not {0}")]
    Count(usize),
    /// Not a tap at all.
    #[error("the descriptor is not a tap's")]
    NotATap(#[source] io::Error),
    /// A tap of another kind.
    #[error(
        "the tap must be made with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR, and with IFF_MULTI_QUEUE if it has several descriptors \
         (its flags are {0:#x})"
    )]
    Flags(c_short),
    /// Headers of another length.
    #[error("the tap's packet headers must have {HEADER_BYTES} bytes (TUNSETVNETHDRSZ), not {0}")]
    Header(c_int),
}

/// Checks one descriptor of a tap, alone or one of several, and makes it non-blocking.
pub(super) fn prepare(tap: &File, several: bool) -> Result<(), TapError> {
    let fd = tap.as_raw_fd();
    // SAFETY: an ifreq is plain data, for which zeros are valid.
    let mut request: ifreq = unsafe { mem::zeroed() };
    // SAFETY: TUNGETIFF writes one ifreq.
    check(unsafe { libc::ioctl(fd, libc::TUNGETIFF, &raw mut request) }).map_err(TapError::NotATap)?;
    // SAFETY: TUNGETIFF fills this field of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    let needed = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | if several { IFF_MULTI_QUEUE } else { 0 };
    if c_int::from(flags) & needed != needed {
        return Err(TapError::Flags(flags));
    }
    let mut header: c_int = 0;
    // SAFETY: TUNGETVNETHDRSZ writes one int.
    check(unsafe { libc::ioctl(fd, libc::TUNGETVNETHDRSZ, &raw mut header) }).map_err(TapError::NotATap)?;
    if usize::try_from(header) != Ok(HEADER_BYTES) {
        return Err(TapError::Header(header));
    }
    let status = fcntl(tap, FcntlArg::F_GETFL).map_err(|error| TapError::NotATap(error.into()))?;
    let status = OFlag::from_bits_retain(status) | OFlag::O_NONBLOCK;
    fcntl(tap, FcntlArg::F_SETFL(status)).map_err(|error| TapError::NotATap(error.into()))?;
    Ok(())
}

/// Tells the tap which packets the guest finishes by itself: without checksum, or larger than a frame.
pub(super) fn set_offloads(tap: &File, features: u64) -> io::Result<()> {
    let offloads = offloads(features);
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)) })
}

/// Has the host give packets to a descriptor of the tap, or to the others alone.
pub(super) fn attach(tap: &File, attach: bool) -> io::Result<()> {
    // SAFETY: an ifreq is plain data, for which zeros are valid.
    let mut request: ifreq = unsafe { mem::zeroed() };
    let flag = if attach { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE };
    request.ifr_ifru.ifru_flags = c_short::try_from(flag).map_err(io::Error::other)?;
    // SAFETY: TUNSETQUEUE reads one ifreq.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) })
}

fn offloads(features: u64) -> u32 {
    let pairs = [
        (VIRTIO_NET_F_GUEST_CSUM, TUN_F_CSUM),
        (VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4),
        (VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6),
    ];
    let accepted = pairs.iter().filter(|(feature, _)| features & (1 << feature) != 0);
    let offloads = accepted.fold(0, |offloads, (_, offload)| offloads | offload);
    // Segmentation leaves checksums open as well (virtio 1.2 §5.1.3.1); the kernel refuses one without the other.
    if offloads & TUN_F_CSUM == 0 { 0 } else { offloads }
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_guest_accepts_is_left_to_it() {
        assert_eq!(offloads(0), 0);
        assert_eq!(offloads(1 << VIRTIO_NET_F_GUEST_CSUM), TUN_F_CSUM);
        assert_eq!(offloads(1 << VIRTIO_NET_F_GUEST_TSO4), 0);
        let all = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6;
        assert_eq!(offloads(all), TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6);
    }

    #[test]
    fn what_is_not_a_tap_is_refused() {
        assert!(matches!(prepare(&tempfile::tempfile().unwrap(), false), Err(TapError::NotATap(_))));
    }
}
