//! What plugins configured on an interface, read back from the kernel: the namespace says what is, a result only
//! what a plugin meant.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::netlink::{Netlink, NetlinkError};
use super::{Attachment, Cidr, Interface, Neighbour, NetworkError, Route};
use crate::spec::Dns;

/// An interface of a network namespace.
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mtu: u32,
    mac: Vec<u8>,
}

pub(super) fn find_link(netlink: &mut Netlink, name: &str) -> Result<Option<Link>, NetworkError> {
    let links = netlink
        .dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))
        .map_err(|cause| NetworkError::Netlink { action: "list interfaces", cause })?;
    Ok(links.into_iter().filter_map(link).find(|link| link.name == name))
}

/// Reads everything the guest must be told to stand in for the namespace.
pub(super) fn collect(netlink: &mut Netlink, link: &Link) -> Result<Attachment, NetworkError> {
    let mut dump =
        |action, message| netlink.dump(message).map_err(|cause: NetlinkError| NetworkError::Netlink { action, cause });
    let addresses = dump("list addresses", RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
    let mut routes = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = RouteMessage::default();
        request.header.address_family = family;
        routes.extend(dump("list routes", RouteNetlinkMessage::GetRoute(request))?);
    }
    let neighbours = dump("list neighbours", RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()))?;

    let addresses: Vec<Cidr> = addresses.into_iter().filter_map(|m| address(m, link.index)).collect();
    let mut routes: Vec<Route> = routes.into_iter().filter_map(|m| route(m, link.index)).collect();
    // A gateway can be named only once it is reachable; narrower routes may be what reaches it.
    routes.sort_by_key(|r| (r.gateway.is_some(), std::cmp::Reverse(r.destination.prefix)));
    Ok(Attachment {
        ips: addresses.iter().map(|cidr| cidr.address).collect(),
        interface: Interface {
            name: link.name.clone(),
            mac: link.mac.as_slice().try_into().map_err(|_| NetworkError::NoEthernet)?,
            mtu: link.mtu,
            addresses,
        },
        routes,
        neighbours: neighbours.into_iter().filter_map(|m| neighbour(m, link.index)).collect(),
        dns: Dns::default(),
    })
}

fn link(message: RouteNetlinkMessage) -> Option<Link> {
    let RouteNetlinkMessage::NewLink(message) = message else { return None };
    let mut link = Link { index: message.header.index, name: String::new(), mtu: 0, mac: Vec::new() };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Address(mac) => link.mac = mac,
            _ => {}
        }
    }
    Some(link)
}

/// An address that the guest must take over. Its link-local IPv6 address it makes itself, from the same MAC.
fn address(message: RouteNetlinkMessage, index: u32) -> Option<Cidr> {
    let RouteNetlinkMessage::NewAddress(message) = message else { return None };
    if message.header.index != index || message.header.scope == AddressScope::Host {
        return None;
    }
    let mut own = None;
    for attribute in message.attributes {
        match attribute {
            // With a peer, `Address` is the peer's.
            AddressAttribute::Local(address) => own = Some(address),
            AddressAttribute::Address(address) => own = own.or(Some(address)),
            _ => {}
        }
    }
    let address = own?;
    if matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local()) {
        return None;
    }
    Some(Cidr { address, prefix: message.header.prefix_len })
}

/// A unicast route of the main table; what the guest learns by itself (router advertisements, link-local) is left out.
fn route(message: RouteNetlinkMessage, index: u32) -> Option<Route> {
    let RouteNetlinkMessage::NewRoute(RouteMessage { header, attributes, .. }) = message else { return None };
    let wanted = header.kind == RouteType::Unicast
        && header.table == RouteHeader::RT_TABLE_MAIN
        && header.protocol != RouteProtocol::Ra
        && !header.flags.contains(RouteFlags::Cloned);
    if !wanted {
        return None;
    }
    let any = match header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let mut out = None;
    let mut route = Route {
        destination: Cidr { address: any, prefix: header.destination_prefix_length },
        gateway: None,
        mtu: None,
        priority: 0,
        on_link: header.flags.contains(RouteFlags::Onlink),
        source: None,
    };
    for attribute in attributes {
        match attribute {
            RouteAttribute::Oif(index) => out = Some(index),
            RouteAttribute::Destination(address) => route.destination.address = ip(&address)?,
            RouteAttribute::Gateway(address) => route.gateway = ip(&address),
            RouteAttribute::PrefSource(address) => route.source = ip(&address),
            RouteAttribute::Priority(priority) => route.priority = priority,
            RouteAttribute::Metrics(metrics) => {
                route.mtu = metrics.iter().find_map(|m| if let RouteMetric::Mtu(mtu) = m { Some(*mtu) } else { None });
            }
            _ => {}
        }
    }
    let link_local = matches!(route.destination.address, IpAddr::V6(v6) if v6.is_unicast_link_local());
    (out == Some(index) && !link_local).then_some(route)
}

fn neighbour(message: RouteNetlinkMessage, index: u32) -> Option<Neighbour> {
    let RouteNetlinkMessage::NewNeighbour(message) = message else { return None };
    if message.header.ifindex != index || message.header.state != NeighbourState::Permanent {
        return None;
    }
    let (mut address, mut mac) = (None, None);
    for attribute in message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => address = Some(IpAddr::V4(v4)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => address = Some(IpAddr::V6(v6)),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.try_into().ok(),
            _ => {}
        }
    }
    Some(Neighbour { address: address?, mac: mac? })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}
