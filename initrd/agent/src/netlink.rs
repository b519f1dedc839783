//! rtnetlink(7), as much of it as a pod's network needs: requests are gathered, sent at once, and answered one by one.
//!
//! It knows the wire format and nothing of pods.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::as_conversions, clippy::arithmetic_side_effects)]

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket};

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;
/// Bytes of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Bytes taken for an answer: an acknowledgement repeats at most the request.
const ANSWER_BYTES: usize = 64 << 10;

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const RTM_NEWNEIGH: u16 = 28;

/// An address and how much of it names the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Prefix {
    pub(crate) address: IpAddr,
    pub(crate) length: u8,
}

impl Prefix {
    /// From CIDR notation.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (address, length) = text.split_once('/')?;
        let address: IpAddr = address.parse().ok()?;
        let length = length.parse().ok()?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        (length <= most).then_some(Self { address, length })
    }
}

/// Where packets go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Route {
    pub(crate) interface: u32,
    /// `None` is the default route of `gateway`'s family.
    pub(crate) destination: Option<Prefix>,
    pub(crate) gateway: Option<IpAddr>,
    pub(crate) source: Option<IpAddr>,
    pub(crate) mtu: u32,
    pub(crate) priority: u32,
    pub(crate) on_link: bool,
}

/// Requests to be sent.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    bytes: Vec<u8>,
    names: Vec<String>,
}

/// The kernel refused a request.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}: {source}")]
pub(crate) struct Refused {
    what: String,
    source: io::Error,
}

fn family(address: &IpAddr) -> u8 {
    // AF_INET and AF_INET6.
    if address.is_ipv4() { 2 } else { 10 }
}

fn octets(address: &IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

/// `struct rtattr` and its padded value.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len().saturating_add(4)).unwrap_or(u16::MAX);
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend_from_slice(value);
    bytes.resize(aligned(bytes.len()), 0);
    bytes
}

impl Batch {
    fn request(&mut self, what: String, kind: u16, flags: u16, body: &[&[u8]]) {
        let body = body.concat();
        let length = u32::try_from(HEADER.saturating_add(body.len())).unwrap_or(u32::MAX);
        let number = u32::try_from(self.names.len()).unwrap_or(u32::MAX);
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&(flags | NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        self.bytes.extend_from_slice(&number.to_ne_bytes());
        self.bytes.extend_from_slice(&0u32.to_ne_bytes());
        self.bytes.extend_from_slice(&body);
        self.names.push(what);
    }

    /// Takes an interface up, with the name, MAC address and MTU given (empty and 0 change nothing).
    pub(crate) fn set_link(&mut self, interface: u32, name: &str, mac: &[u8], mtu: u32) {
        const UP: u32 = 1;
        // struct ifinfomsg: family, padding, type, index, flags, change.
        let head = [[0; 4], interface.to_ne_bytes(), UP.to_ne_bytes(), UP.to_ne_bytes()].concat();
        let mut attributes = Vec::new();
        if !mac.is_empty() {
            attributes.extend(attribute(1, mac));
        }
        if !name.is_empty() {
            attributes.extend(attribute(3, &[name.as_bytes(), &[0]].concat()));
        }
        if mtu > 0 {
            attributes.extend(attribute(4, &mtu.to_ne_bytes()));
        }
        self.request(format!("set up interface {name}"), RTM_NEWLINK, 0, &[&head, &attributes]);
    }

    /// Gives an interface an address, without a search for others that have it.
    pub(crate) fn add_address(&mut self, interface: u32, prefix: Prefix) {
        const NODAD: u8 = 2;
        // struct ifaddrmsg: family, prefix length, flags, scope, index.
        let flags = if prefix.address.is_ipv6() { NODAD } else { 0 };
        let head = [[family(&prefix.address), prefix.length, flags, 0], interface.to_ne_bytes()].concat();
        let address = octets(&prefix.address);
        let mut attributes = [attribute(2, &address), attribute(1, &address)].concat();
        if let IpAddr::V4(v4) = prefix.address
            && prefix.length < 31
        {
            let host_bits = u32::MAX.checked_shr(u32::from(prefix.length)).unwrap_or(0);
            attributes.extend(attribute(4, &(u32::from(v4) | host_bits).to_be_bytes()));
        }
        let what = format!("add address {}/{}", prefix.address, prefix.length);
        self.request(what, RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &[&head, &attributes]);
    }

    /// Adds a route to the main table.
    pub(crate) fn add_route(&mut self, route: &Route) {
        const TABLE_MAIN: u8 = 254;
        const PROTOCOL_BOOT: u8 = 3;
        const SCOPE_LINK: u8 = 253;
        const UNICAST: u8 = 1;
        const ONLINK: u32 = 4;
        let known = route.destination.map(|prefix| prefix.address).or(route.gateway).or(route.source);
        let family = known.as_ref().map_or(2, family);
        let length = route.destination.map_or(0, |prefix| prefix.length);
        let scope = if route.gateway.is_none() && family == 2 { SCOPE_LINK } else { 0 };
        // struct rtmsg: family, destination length, source length, tos, table, protocol, scope, type, flags.
        let flags = if route.on_link { ONLINK } else { 0 };
        let head = [[family, length, 0, 0], [TABLE_MAIN, PROTOCOL_BOOT, scope, UNICAST], flags.to_ne_bytes()].concat();
        let mut attributes = attribute(4, &route.interface.to_ne_bytes());
        if let Some(prefix) = route.destination.filter(|prefix| prefix.length > 0) {
            attributes.extend(attribute(1, &octets(&prefix.address)));
        }
        if let Some(gateway) = &route.gateway {
            attributes.extend(attribute(5, &octets(gateway)));
        }
        if route.priority > 0 {
            attributes.extend(attribute(6, &route.priority.to_ne_bytes()));
        }
        if let Some(source) = &route.source {
            attributes.extend(attribute(7, &octets(source)));
        }
        if route.mtu > 0 {
            attributes.extend(attribute(8, &attribute(2, &route.mtu.to_ne_bytes())));
        }
        let to = route.destination.map_or("default".to_owned(), |to| format!("{}/{}", to.address, to.length));
        self.request(format!("add the route to {to}"), RTM_NEWROUTE, NLM_F_CREATE, &[&head, &attributes]);
    }

    /// States for good which MAC address an address has.
    pub(crate) fn add_neighbour(&mut self, interface: u32, address: IpAddr, mac: &[u8]) {
        const PERMANENT: u16 = 0x80;
        // struct ndmsg: family, padding, index, state, flags, type.
        let state = PERMANENT.to_ne_bytes();
        let head = [[family(&address), 0, 0, 0], interface.to_ne_bytes(), [state[0], state[1], 0, 0]].concat();
        let attributes = [attribute(1, &octets(&address)), attribute(2, mac)].concat();
        let what = format!("add neighbour {address}");
        self.request(what, RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, &[&head, &attributes]);
    }

    /// Sends all requests and waits for their answers. The first refusal is told; what is there already is none.
    pub(crate) fn send(self) -> Result<(), Refused> {
        let failed =
            |source: nix::Error| Refused { what: "talk to the kernel's network".into(), source: source.into() };
        if self.names.is_empty() {
            return Ok(());
        }
        let socket: OwnedFd =
            socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)
                .map_err(failed)?;
        let kernel = NetlinkAddr::new(0, 0);
        sendto(socket.as_raw_fd(), &self.bytes, &kernel, MsgFlags::empty()).map_err(failed)?;
        let mut answered: usize = 0;
        let mut buffer = vec![0; ANSWER_BYTES];
        while answered < self.names.len() {
            let count = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()).map_err(failed)?;
            for (number, code) in answers(buffer.get(..count).unwrap_or_default()) {
                answered = answered.saturating_add(1);
                let source = io::Error::from_raw_os_error(code.saturating_neg());
                if code != 0 && source.kind() != io::ErrorKind::AlreadyExists {
                    let what = usize::try_from(number).ok().and_then(|number| self.names.get(number)).cloned();
                    return Err(Refused { what: what.unwrap_or_default(), source });
                }
            }
        }
        Ok(())
    }
}

/// Request numbers and (negative) error codes of the answers in `bytes`.
fn answers(mut bytes: &[u8]) -> Vec<(u32, i32)> {
    let mut found = Vec::new();
    while let Some((&[l0, l1, l2, l3, k0, k1, _, _, n0, n1, n2, n3, _, _, _, _], body)) =
        bytes.split_first_chunk::<HEADER>()
    {
        if u16::from_ne_bytes([k0, k1]) == NLMSG_ERROR
            && let Some((&code, _)) = body.split_first_chunk()
        {
            found.push((u32::from_ne_bytes([n0, n1, n2, n3]), i32::from_ne_bytes(code)));
        }
        let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX).max(HEADER);
        bytes = bytes.get(length.checked_next_multiple_of(4).unwrap_or(usize::MAX)..).unwrap_or_default();
    }
    found
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::as_conversions, clippy::arithmetic_side_effects, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_checked() {
        let parsed = Prefix::parse("10.1.2.3/24").expect("valid");
        assert_eq!((parsed.address.to_string().as_str(), parsed.length), ("10.1.2.3", 24));
        assert!(Prefix::parse("fd00::1/128").is_some());
        for text in ["10.1.2.3", "10.1.2.3/33", "fd00::/129", "x/1", "1.2.3.4/", ""] {
            assert!(Prefix::parse(text).is_none(), "{text}");
        }
    }

    #[test]
    fn attributes_are_padded_to_four_bytes() {
        assert_eq!(attribute(3, b"eth0\0"), [9, 0, 3, 0, b'e', b't', b'h', b'0', 0, 0, 0, 0]);
        assert_eq!(attribute(4, &1500u32.to_ne_bytes()).len(), 8);
    }

    #[test]
    fn requests_lie_one_behind_the_other() {
        let mut batch = Batch::default();
        batch.set_link(2, "eth0", &[2, 0, 0, 0, 0, 1], 1450);
        batch.add_address(2, Prefix::parse("fd00::2/64").expect("valid"));
        let (mut at, mut count) = (0, 0);
        while at < batch.bytes.len() {
            let word: [u8; 4] = batch.bytes[at..at + 4].try_into().expect("four bytes");
            assert_eq!(batch.bytes[at + 8], count, "sequence number");
            at += u32::from_ne_bytes(word) as usize;
            count += 1;
        }
        assert_eq!((at, count), (batch.bytes.len(), 2));
    }

    #[test]
    fn answers_of_any_shape_end() {
        let mut one = [36u32.to_ne_bytes(), [2, 0, 0, 0], 7u32.to_ne_bytes(), [0; 4], (-17i32).to_ne_bytes()].concat();
        one.resize(36, 0);
        assert_eq!(answers(&[one.clone(), one.clone()].concat()), [(7, -17), (7, -17)]);
        for length in 0..one.len() {
            assert!(answers(&one[..length]).len() <= 1);
        }
        assert!(answers(&[0; 64]).is_empty() && answers(&[0xff; 64]).is_empty());
    }
}
