//! Makes this guest the pod it is to be: everything in one `Configure` message, applied once.
//!
//! Nothing of it is known before; a guest that has not been configured can become any pod.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use agent_protocol::v1;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use thiserror::Error;

use crate::disk::{Disk, DiskError};
use crate::mounts::{self, MountError};
use crate::netlink::{Batch, Prefix, Refused, Route};
use crate::sys;

/// The loopback interface's number in every network namespace.
const LOOPBACK: u32 = 1;

/// Why a guest cannot become the pod.
#[derive(Debug, Error)]
pub(crate) enum ConfigureError {
    /// The kernel refused a step.
    #[error("cannot set the {what}: {source}")]
    Step {
        /// Hostname, clock or random seed.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Unknown, or a value the kernel refuses.
    #[error("cannot set the sysctl {name} to {value:?}: {source}")]
    Sysctl {
        /// As given.
        name: String,
        /// As given.
        value: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Not an address, prefix or interface.
    #[error("{0:?} is no {1}")]
    Malformed(String, &'static str),
    /// Fewer NICs than the host says.
    #[error("the guest has no NIC number {0}")]
    NoInterface(u32),
    /// See [`Refused`].
    #[error(transparent)]
    Network(#[from] Refused),
    /// See [`DiskError`].
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// See [`MountError`].
    #[error(transparent)]
    Mount(#[from] MountError),
}

/// Applies `message`.
pub(crate) fn apply(message: &v1::Configure, disk: &mut Disk) -> Result<(), ConfigureError> {
    let step = |what| move |source| ConfigureError::Step { what, source };
    seed(&message.seed).map_err(step("random seed"))?;
    if message.realtime_ns > 0 {
        set_clock(message.realtime_ns).map_err(step("clock"))?;
    }
    if !message.hostname.is_empty() {
        nix::unistd::sethostname(&message.hostname).map_err(io::Error::from).map_err(step("hostname"))?;
    }
    network(message)?;
    // After the network: some sysctls are of an interface.
    set_sysctls(&message.sysctls)?;
    mounts::mount_shm(message.shm_bytes)?;
    if let Some(range) = &message.scratch {
        disk.mount_scratch(range)?;
    }
    if message.rescan {
        mounts::rescan().map_err(step("devices that have been plugged in"))?;
    }
    Ok(())
}

fn seed(bytes: &[u8]) -> io::Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    let random = File::options().write(true).open("/dev/random")?;
    bytes.chunks(sys::ENTROPY_BYTES).try_for_each(|chunk| sys::add_entropy(random.as_fd(), chunk))
}

fn set_clock(nanoseconds: u64) -> io::Result<()> {
    let (seconds, rest) = (nanoseconds / 1_000_000_000, nanoseconds % 1_000_000_000);
    let whole = |number: u64| i64::try_from(number).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL));
    Ok(clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::new(whole(seconds)?, whole(rest)?))?)
}

fn set_sysctls(sysctls: &HashMap<String, String>) -> Result<(), ConfigureError> {
    let ordered: BTreeMap<_, _> = sysctls.iter().collect();
    ordered.into_iter().try_for_each(|(name, value)| {
        let write = || fs::write(sysctl_path(name)?, value);
        write().map_err(|source| ConfigureError::Sysctl { name: name.clone(), value: value.clone(), source })
    })
}

/// As sysctl(8): the first separator in a name decides which of `.` and `/` separates; the other stands for it.
pub(crate) fn sysctl_path(name: &str) -> io::Result<PathBuf> {
    let dots = name.find(['.', '/']).is_none_or(|at| name.as_bytes().get(at) == Some(&b'.'));
    let swap = |letter| match letter {
        '.' => '/',
        '/' => '.',
        other => other,
    };
    let path: String = if dots { name.chars().map(swap).collect() } else { name.to_owned() };
    let path = Path::new(&path);
    let plain = path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
    if !plain || name.is_empty() {
        return Err(io::Error::from_raw_os_error(libc::ENOENT));
    }
    Ok(Path::new("/proc/sys").join(path))
}

fn network(message: &v1::Configure) -> Result<(), ConfigureError> {
    let mut batch = Batch::default();
    batch.set_link(LOOPBACK, "", &[], 0);
    let mut numbers = BTreeMap::from([("lo", LOOPBACK)]);
    let nics = if message.interfaces.is_empty() { Vec::new() } else { nics() };
    for interface in &message.interfaces {
        let position = usize::try_from(interface.index).unwrap_or(usize::MAX);
        let &number = nics.get(position).ok_or(ConfigureError::NoInterface(interface.index))?;
        numbers.insert(&interface.name, number);
        batch.set_link(number, &interface.name, &interface.mac, interface.mtu);
        for text in &interface.addresses {
            batch.add_address(number, prefix(text)?);
        }
    }
    let number = |name: &str| {
        numbers.get(name).copied().ok_or_else(|| ConfigureError::Malformed(name.to_owned(), "interface of this pod"))
    };
    // A gateway can be reached only once the route to it is there.
    let (direct, indirect): (Vec<_>, Vec<_>) = message.routes.iter().partition(|route| route.gateway.is_empty());
    for route in direct.into_iter().chain(indirect) {
        batch.add_route(&Route {
            interface: number(&route.interface)?,
            destination: optional(&route.destination, prefix)?,
            gateway: optional(&route.gateway, address)?,
            source: optional(&route.source, address)?,
            mtu: route.mtu,
            priority: route.priority,
            on_link: route.on_link,
        });
    }
    for neighbour in &message.neighbours {
        batch.add_neighbour(number(&neighbour.interface)?, address(&neighbour.address)?, &neighbour.mac);
    }
    Ok(batch.send()?)
}

fn prefix(text: &str) -> Result<Prefix, ConfigureError> {
    Prefix::parse(text).ok_or_else(|| ConfigureError::Malformed(text.to_owned(), "address with a prefix length"))
}

fn address(text: &str) -> Result<IpAddr, ConfigureError> {
    text.parse().map_err(|_| ConfigureError::Malformed(text.to_owned(), "IP address"))
}

fn optional<T>(text: &str, parse: fn(&str) -> Result<T, ConfigureError>) -> Result<Option<T>, ConfigureError> {
    if text.is_empty() { Ok(None) } else { parse(text).map(Some) }
}

/// Numbers of the NICs in order of PCI slot; what is not on PCI follows in order of number.
fn nics() -> Vec<u32> {
    let mut found: Vec<(bool, PathBuf, u32)> = fs::read_dir("/sys/class/net")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let number = fs::read_to_string(entry.path().join("ifindex")).ok()?.trim().parse().ok()?;
            let device = fs::canonicalize(entry.path().join("device")).ok();
            (number != LOOPBACK).then(|| (device.is_none(), device.unwrap_or_default(), number))
        })
        .collect();
    found.sort();
    found.into_iter().map(|(_, _, number)| number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctl_names_become_paths_as_sysctl_does_it() {
        for (name, path) in [
            ("net.ipv4.ip_forward", "/proc/sys/net/ipv4/ip_forward"),
            ("kernel/shmmax", "/proc/sys/kernel/shmmax"),
            ("net.ipv4.conf.eth0/100.forwarding", "/proc/sys/net/ipv4/conf/eth0.100/forwarding"),
            ("net/ipv4/conf/eth0.100/forwarding", "/proc/sys/net/ipv4/conf/eth0.100/forwarding"),
        ] {
            assert_eq!(sysctl_path(name).ok(), Some(PathBuf::from(path)));
        }
        for name in ["", "../etc/passwd", "kernel/../../x", "/etc/passwd"] {
            assert!(sysctl_path(name).is_err(), "{name}");
        }
    }
}
