//! What an init has to do before there is a disk and a network.

#![expect(unsafe_code, reason = "an interface is set up by ioctls")]

use std::io;
use std::mem;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};

/// A network of 256 addresses.
const NETMASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);

/// Mounts what shows devices, gives the interface its address, and has the console echo nothing: each byte is an exit.
pub(super) fn set_up() -> Result<()> {
    mount(Some("dev"), "/dev", Some("devtmpfs"), MsFlags::empty(), None::<&str>).context("mounting /dev")?;
    let mut terminal = tcgetattr(io::stdin())?;
    terminal.local_flags.remove(LocalFlags::ECHO | LocalFlags::ECHONL);
    tcsetattr(io::stdin(), SetArg::TCSANOW, &terminal)?;
    match std::env::var("LOAD_ADDRESS") {
        Ok(address) => bring_up(address.parse()?).context("bringing up eth0"),
        Err(_) => Ok(()),
    }
}

fn bring_up(address: Ipv4Addr) -> Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    for (request, value) in [(libc::SIOCSIFADDR, address), (libc::SIOCSIFNETMASK, NETMASK)] {
        let mut interface = eth0();
        // SAFETY: an IPv4 address fits the union's generic one, and both are plain data.
        unsafe { (&raw mut interface.ifr_ifru).cast::<libc::sockaddr_in>().write_unaligned(ipv4(value)) };
        control(&socket, request, &mut interface)?;
    }
    let mut interface = eth0();
    interface.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP)?;
    control(&socket, libc::SIOCSIFFLAGS, &mut interface)?;
    Ok(())
}

fn eth0() -> libc::ifreq {
    // SAFETY: all zeros is a valid ifreq: integers, byte arrays and a pointer that is not used.
    let mut interface: libc::ifreq = unsafe { mem::zeroed() };
    for (to, from) in interface.ifr_name.iter_mut().zip(b"eth0") {
        *to = from.cast_signed();
    }
    interface
}

fn ipv4(address: Ipv4Addr) -> libc::sockaddr_in {
    // SAFETY: all zeros is a valid sockaddr_in.
    let mut socket: libc::sockaddr_in = unsafe { mem::zeroed() };
    socket.sin_family = libc::AF_INET as libc::sa_family_t;
    socket.sin_addr.s_addr = u32::from(address).to_be();
    socket
}

fn control(socket: &UdpSocket, request: libc::Ioctl, interface: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: these requests read one ifreq.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), request, std::ptr::from_mut(interface)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
