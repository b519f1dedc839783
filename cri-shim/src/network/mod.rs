//! Networks of pods: a namespace per pod, filled by CNI plugins, whose interface is handed to the guest.
//!
//! The guest never sees the namespace. It sees a NIC, backed by a tap beside the interface that the plugins made;
//! frames pass between the two by traffic control, so that whatever a plugin does on the host's end (bridges,
//! policy, port maps, shaping) works as for any other pod. What the plugins configured is read from the namespace
//! and given to the guest as an [`Attachment`].
//!
//! State on disk names everything before it exists, so that [`Network::detach`] and [`Network::remove_netns`]
//! finish the work of a daemon killed at any point. This module never configures an interface of the host itself.

mod addresses;
mod cni;
pub(crate) mod loopback;
mod netlink;
mod netns;
mod redirect;
mod tap;

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::spec::{Dns, PodSpec};

pub use cni::CniError;
pub use netlink::NetlinkError;
pub use netns::Netns;

/// Name of the interface that plugins make in a pod's namespace, and of the guest's NIC (the kubelet expects it).
pub const INTERFACE: &str = "eth0";

/// Name of the tap in a pod's namespace.
pub const TAP: &str = "pericarp0";

/// Where networks come from and where their state is kept.
#[derive(Clone, Debug)]
pub struct NetworkConfig {
    /// Directory of CNI network configurations; the lexically first valid one is used.
    pub conf_dir: PathBuf,
    /// Directories of CNI plugins, searched in order.
    pub bin_dirs: Vec<PathBuf>,
    /// Namespaces and the record of what plugins were asked; must not outlive a reboot of the host.
    pub state_dir: PathBuf,
}

/// What can go wrong with a pod's network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// No usable configuration, or a plugin failed.
    #[error(transparent)]
    Cni(#[from] CniError),
    /// The kernel refused an interface, address or traffic control request.
    #[error("cannot {action}: {cause}")]
    Netlink {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        cause: NetlinkError,
    },
    /// A system call on a namespace, tap or file failed.
    #[error("cannot {action}: {cause}")]
    Io {
        /// What was tried.
        action: String,
        /// Why it failed.
        cause: std::io::Error,
    },
    /// A pod's id would not be one name in a directory.
    #[error("pod id {0:?} is not a plain name")]
    BadId(String),
    /// The plugins reported success without making the interface.
    #[error(
        "the CNI plugins made no interface {INTERFACE} in the pod's network namespace: check the network configuration"
    )]
    NoInterface,
    /// The interface is no Ethernet.
    #[error(
        "{INTERFACE} has no Ethernet address, so it cannot be handed to a guest: use a plugin that makes a veth, macvlan or the like"
    )]
    NoEthernet,
}

impl NetworkError {
    fn io(action: impl Into<String>, cause: std::io::Error) -> Self {
        Self::Io { action: action.into(), cause }
    }
}

/// What a guest needs to be on its network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The guest's NIC.
    pub interface: Interface,
    /// Routes in the order in which they can be added; those of directly connected networks are among them.
    pub routes: Vec<Route>,
    /// Permanent neighbour entries.
    pub neighbours: Vec<Neighbour>,
    /// Name resolution, where the plugins gave any.
    pub dns: Dns,
    /// The pod's addresses in the plugins' order; the first is the pod's IP.
    pub ips: Vec<IpAddr>,
}

/// A guest's NIC.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Name in the guest.
    pub name: String,
    /// Ethernet address.
    pub mac: [u8; 6],
    /// Bytes.
    pub mtu: u32,
    /// Addresses with their prefix; link-local IPv6 ones are left to the guest.
    pub addresses: Vec<Cidr>,
}

/// A route out of [`Attachment::interface`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Prefix length 0 is the default route.
    pub destination: Cidr,
    /// `None` reaches the destination directly.
    pub gateway: Option<IpAddr>,
    /// Bytes; `None` means the interface's.
    pub mtu: Option<u32>,
    /// Metric; 0 leaves it to the kernel.
    pub priority: u32,
    /// The gateway is reachable although no route says so.
    pub on_link: bool,
    /// Preferred source address.
    pub source: Option<IpAddr>,
}

/// A permanent neighbour entry of [`Attachment::interface`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    /// Its address.
    pub address: IpAddr,
    /// Its Ethernet address.
    pub mac: [u8; 6],
}

/// An address with its prefix length, written `10.0.0.1/24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    /// The address, host bits included.
    pub address: IpAddr,
    /// At most 32 or 128.
    pub prefix: u8,
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> Self {
        cidr.to_string()
    }
}

impl TryFrom<String> for Cidr {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl FromStr for Cidr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not an address with a prefix length, such as 10.0.0.1/24");
        let (address, prefix) = text.split_once('/').ok_or_else(bad)?;
        let (address, prefix): (IpAddr, u8) = (address.parse().map_err(|_| bad())?, prefix.parse().map_err(|_| bad())?);
        let longest = if address.is_ipv4() { 32 } else { 128 };
        if prefix > longest { Err(bad()) } else { Ok(Self { address, prefix }) }
    }
}

/// The networks of a node's pods.
#[derive(Clone, Debug)]
pub struct Network {
    cni: cni::Cni,
    netns_dir: PathBuf,
}

impl Network {
    /// Nothing is read or made until it is needed.
    #[must_use]
    pub fn new(config: NetworkConfig) -> Self {
        let NetworkConfig { conf_dir, bin_dirs, state_dir } = config;
        let netns_dir = state_dir.join("netns");
        Self { cni: cni::Cni::new(conf_dir, bin_dirs, state_dir.join("cni")), netns_dir }
    }

    /// Whether a pod could be attached now: a configuration is there and so are the plugins it names.
    pub fn status(&self) -> Result<(), NetworkError> {
        Ok(self.cni.status()?)
    }

    /// The configuration that the next pod would get, for people to look at.
    pub fn configuration(&self) -> Result<serde_json::Value, NetworkError> {
        Ok(self.cni.configuration()?)
    }

    /// Makes a network namespace that lives until [`Network::remove_netns`], with its loopback up.
    pub fn create_netns(&self, pod_id: &str) -> Result<Netns, NetworkError> {
        Netns::create(&self.netns_dir, plain_name(pod_id)?)
    }

    /// The namespace made by [`Network::create_netns`], if it is still there.
    pub fn netns(&self, pod_id: &str) -> Result<Option<Netns>, NetworkError> {
        Ok(Netns::find(&self.netns_dir, plain_name(pod_id)?))
    }

    /// Makes the tap that a VMM is given, with a descriptor for each pair of queues; the kernel removes it when the last of them is
    /// closed.
    pub fn create_tap(&self, netns: &Netns, pairs: u8) -> Result<Vec<OwnedFd>, NetworkError> {
        netns.run(move || tap::create(pairs))?
    }

    /// Has the plugins make the pod's interface and joins it to the tap, which must be there.
    ///
    /// After a failure the caller undoes what was done so far with [`Network::detach`].
    pub async fn attach(&self, pod_id: &str, pod: &PodSpec, netns: &Netns) -> Result<Attachment, NetworkError> {
        let result = self.cni.add(plain_name(pod_id)?, pod, netns.path()).await?;
        let mut attachment = self.adopt(netns).await?;
        if !result.ips.is_empty() {
            attachment.ips = result.ips;
        }
        attachment.dns = result.dns;
        Ok(attachment)
    }

    /// Joins the interface of a namespace that somebody else filled to the tap, which must be there.
    pub async fn adopt(&self, netns: &Netns) -> Result<Attachment, NetworkError> {
        let netns = netns.clone();
        let join = tokio::task::spawn_blocking(move || {
            netns.run(|| {
                let mut netlink = netlink::Netlink::open().map_err(|e| NetworkError::io("open a netlink socket", e))?;
                let link = addresses::find_link(&mut netlink, INTERFACE)?.ok_or(NetworkError::NoInterface)?;
                let attachment = addresses::collect(&mut netlink, &link)?;
                redirect::join(&mut netlink, &link)?;
                Ok(attachment)
            })?
        });
        join.await.map_err(|e| NetworkError::io("read the pod's interface", std::io::Error::other(e)))?
    }

    /// Has the plugins take back what [`Network::attach`] made or began to make; nothing to do is no error.
    pub async fn detach(&self, pod_id: &str) -> Result<(), NetworkError> {
        Ok(self.cni.del(plain_name(pod_id)?).await?)
    }

    /// Removes a namespace and the interfaces still in it; nothing to remove is no error.
    pub fn remove_netns(&self, pod_id: &str) -> Result<(), NetworkError> {
        Netns::remove(&self.netns_dir, plain_name(pod_id)?)
    }

    /// Ids of all pods of which something may be left here.
    pub fn pods(&self) -> Result<BTreeSet<String>, NetworkError> {
        let mut found = BTreeSet::new();
        for dir in [&self.netns_dir, self.cni.state_dir()] {
            let entries = match std::fs::read_dir(dir) {
                Ok(entries) => entries,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                Err(e) => return Err(NetworkError::io(format!("list {}", dir.display()), e)),
            };
            for entry in entries {
                let entry = entry.map_err(|e| NetworkError::io(format!("list {}", dir.display()), e))?;
                found.extend(entry.file_name().into_string());
            }
        }
        Ok(found)
    }
}

/// Refuses an id that would leave the directory it names a file in.
fn plain_name(id: &str) -> Result<&str, NetworkError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_' || byte == b'.';
    if !id.is_empty() && !id.starts_with('.') && id.bytes().all(plain) {
        Ok(id)
    } else {
        Err(NetworkError::BadId(id.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cidr_is_read_back_as_written() {
        for text in ["10.0.0.1/24", "0.0.0.0/0", "fd00::1/128"] {
            assert_eq!(text.parse::<Cidr>().map(|c| c.to_string()).as_deref(), Ok(text));
        }
        for text in ["10.0.0.1", "10.0.0.1/33", "fd00::/129", "/8", "a/8", "10.0.0.1/-1"] {
            assert!(text.parse::<Cidr>().is_err(), "{text}");
        }
    }

    #[test]
    fn ids_stay_in_their_directory() {
        assert!(plain_name("a1b2-c_d.e").is_ok());
        for id in ["", "..", ".", "../x", "a/b", "a\0b"] {
            assert!(plain_name(id).is_err(), "{id:?}");
        }
    }
}
