//! Joins the plugins' interface and the tap: each frame that one receives leaves by the other.
//!
//! An ingress qdisc on either side holds one u32 filter that matches everything and redirects it (tc-u32(8),
//! tc-mirred(8)). The redirect steals frames before the namespace's own stack sees them, so the kernel never answers
//! ARP or anything else in the guest's stead, although the addresses stay on the interface: plugins look for them
//! there when they take an interface back (the bridge plugin finds its masquerading rules by them).

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkAttribute;
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption, TcActionType, TcAttribute,
    TcFilterU32, TcFilterU32Option, TcHandle, TcMessage, TcMirror, TcMirrorActionType, TcOption, TcU32Key,
    TcU32Selector, TcU32SelectorFlags,
};

use super::addresses::{Link, find_link};
use super::netlink::{Netlink, NetlinkError, link_up};
use super::{NetworkError, TAP};

/// `ffff:`, the handle of every ingress qdisc.
const INGRESS: TcHandle = TcHandle { major: u16::MAX, minor: 0 };

/// Of the filter, which is alone.
const PRIORITY: u32 = 1;

/// `ETH_P_ALL`: frames of every kind.
const ALL_PROTOCOLS: u16 = 3;

pub(super) fn join(netlink: &mut Netlink, link: &Link) -> Result<(), NetworkError> {
    let tap = find_link(netlink, TAP)?
        .ok_or_else(|| NetworkError::io(format!("find the tap {TAP}"), std::io::ErrorKind::NotFound.into()))?;
    let failed = |action| move |cause| NetworkError::Netlink { action, cause };

    let mut up = link_up(tap.index);
    up.attributes.push(LinkAttribute::Mtu(link.mtu));
    netlink.change(RouteNetlinkMessage::SetLink(up), 0).map_err(failed("bring the tap up"))?;
    for (from, to) in [(tap.index, link.index), (link.index, tap.index)] {
        make_ingress(netlink, from).map_err(failed("add an ingress qdisc: check that the sch_ingress module loads"))?;
        netlink
            .change(RouteNetlinkMessage::NewTrafficFilter(redirect(from, to)), NLM_F_CREATE | NLM_F_EXCL)
            .map_err(failed("redirect traffic: check that the cls_u32 and act_mirred modules load"))?;
    }
    Ok(())
}

/// Whatever an earlier attempt left is replaced.
fn make_ingress(netlink: &mut Netlink, index: u32) -> Result<(), NetlinkError> {
    let qdisc = || {
        let mut message = TcMessage::with_index(index.cast_signed());
        message.header.parent = TcHandle::INGRESS;
        message.header.handle = INGRESS;
        message.attributes.push(TcAttribute::Kind("ingress".to_owned()));
        message
    };
    let mut create = || netlink.change(RouteNetlinkMessage::NewQueueDiscipline(qdisc()), NLM_F_CREATE | NLM_F_EXCL);
    match create() {
        Err(error) if error.already_exists() => {
            netlink.change(RouteNetlinkMessage::DelQueueDiscipline(qdisc()), 0)?;
            netlink.change(RouteNetlinkMessage::NewQueueDiscipline(qdisc()), NLM_F_CREATE | NLM_F_EXCL)
        }
        done => done,
    }
}

/// `tc filter add dev FROM parent ffff: protocol all u32 match u8 0 0 action mirred egress redirect dev TO`
fn redirect(from: u32, to: u32) -> TcMessage {
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = 1;
    selector.keys = vec![TcU32Key::default()];

    let mut mirror = TcMirror::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]),
    ];

    let mut message = TcMessage::with_index(from.cast_signed());
    message.header.parent = INGRESS;
    // Priority above, protocol below in network byte order (rtnetlink(7), tcm_info).
    message.header.info = PRIORITY << 16 | u32::from(ALL_PROTOCOLS.to_be());
    message.attributes = vec![
        TcAttribute::Kind(TcFilterU32::KIND.to_owned()),
        TcAttribute::Options(vec![
            TcOption::U32(TcFilterU32Option::Selector(selector)),
            TcOption::U32(TcFilterU32Option::Action(vec![action])),
        ]),
    ];
    message
}
