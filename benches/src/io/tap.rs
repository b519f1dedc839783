//! A tap of the host's for each machine's network.

#![expect(unsafe_code, reason = "ioctls of /dev/net/tun")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Length of `struct virtio_net_hdr_v1`, which precedes each frame (virtio 1.2 §5.1.6).
const VNET_HEADER_BYTES: libc::c_int = 12;

/// Makes a tap with an address; it stays until its network namespace ends.
pub(super) fn create(name: &str, address: &str) -> Result<()> {
    let commands = [
        vec!["tuntap", "add", "dev", name, "mode", "tap", "vnet_hdr"],
        vec!["address", "add", address, "dev", name],
        vec!["link", "set", name, "up"],
    ];
    for arguments in commands {
        let status = Command::new("ip").args(&arguments).status().context("running ip")?;
        ensure!(status.success(), "ip {} failed", arguments.join(" "));
    }
    Ok(())
}

/// Removes it.
pub(super) fn remove(name: &str) -> Result<()> {
    let status = Command::new("ip").args(["tuntap", "del", "dev", name, "mode", "tap"]).status()?;
    ensure!(status.success(), "the tap {name} cannot be removed");
    Ok(())
}

/// Opens it as the VMM wants it: with the whole header before each frame.
pub(super) fn open(name: &str) -> Result<OwnedFd> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").context("opening /dev/net/tun")?;
    attach(&file, name).with_context(|| format!("attaching to {name}"))?;
    Ok(file.into())
}

fn attach(file: &File, name: &str) -> io::Result<()> {
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    // SAFETY: all zeros is a valid ifreq, which holds integers, byte arrays and a pointer that is not used.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open, and the argument is an ifreq whose name is terminated.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw const request) })?;
    // SAFETY: the descriptor is open, and the argument points to an int.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, std::ptr::from_ref(&VNET_HEADER_BYTES)) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
