//! The tap that backs a guest's NIC.
#![expect(unsafe_code, reason = "ioctls of /dev/net/tun")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::{NetworkError, TAP};

/// Length of `struct virtio_net_hdr_v1`, which precedes each frame (virtio 1.2 §5.1.6).
const VNET_HEADER_BYTES: libc::c_int = 12;

/// What the guest may be left to do: checksums and segmentation. The guest kernel is ours and negotiates all of it.
const OFFLOADS: libc::c_uint = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;

/// Makes the tap in the calling thread's network namespace, with so many pairs of queues.
pub(super) fn create(pairs: u8) -> Result<Vec<OwnedFd>, NetworkError> {
    let describe = |e| NetworkError::io("create a tap: check that the tun module is loaded", e);
    let open = |_| {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
        let file = options.open("/dev/net/tun")?;
        configure(&file, pairs > 1)?;
        Ok(file.into())
    };
    let files = (0..pairs).map(open).collect::<io::Result<_>>().map_err(describe)?;
    // The host's IPv6 stack would announce itself on the tap, that is, to the guest. No such file: no IPv6.
    match std::fs::write(format!("/proc/sys/net/ipv6/conf/{TAP}/disable_ipv6"), "1") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(describe(error)),
        _ => Ok(files),
    }
}

/// The first descriptor makes the tap; the others, of a tap of several, are added to it.
fn configure(file: &File, several: bool) -> io::Result<()> {
    let several = if several { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several;
    // SAFETY: all zeroes is a valid ifreq, which holds integers, byte arrays and a pointer that is not used.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(TAP.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open, and the argument is an ifreq whose name is terminated.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw const request) })?;
    // SAFETY: the descriptor is open, and the argument points to an int.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, std::ptr::from_ref(&VNET_HEADER_BYTES)) })?;
    // SAFETY: the descriptor is open, and the argument is a number.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, OFFLOADS) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
