//! The kernel's notifications. They only say "look again"; what changed is read anew.

use std::net::IpAddr;

use flannel_core::addr::{Family, VtepMac};
use futures_util::StreamExt as _;
use rtnetlink::{
    MulticastGroup, new_multicast_connection,
    packet_core::NetlinkPayload,
    packet_route::{
        RouteNetlinkMessage,
        link::{LinkAttribute, LinkMessage},
    },
};
use tokio::sync::mpsc::{self, error::TrySendError};

use super::{
    NetlinkError,
    device::name_of,
    pods::{forwarding, neighbour},
};

/// Something changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A link.
    Link(LinkChange),
    /// An address on an interface.
    Address(u32),
    /// A neighbour or forwarding entry.
    Neighbour(NeighbourChange),
    /// A route or a routing rule.
    Route,
    /// The kernel dropped notifications: anything may have changed.
    Missed,
}

/// A link that was made, changed, or is no more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkChange {
    /// Interface index.
    pub index: u32,
    /// Its name, if the message had it.
    pub name: Option<String>,
    /// The bridge that it is a port of.
    pub bridge: Option<u32>,
    /// Whether it is gone, or at least no port any more.
    pub gone: bool,
}

/// A neighbour or forwarding entry that was made, changed, or is no more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NeighbourChange {
    /// Interface index.
    pub index: u32,
    /// A neighbour that has a MAC address now.
    pub neighbour: Option<(IpAddr, VtepMac)>,
    /// A forwarding entry of a bridge: the MAC address that is behind this port now.
    pub heard: Option<VtepMac>,
}

/// Sends every change, of addresses and routes those of a family, to `out` until the receiver is gone. Ends with an error if the socket dies; the caller opens another.
pub async fn watch(out: mpsc::Sender<Change>, family: Family) -> Result<(), NetlinkError> {
    let [addresses, routes, rules] = match family {
        Family::V4 => [
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv4Rule,
        ],
        Family::V6 => [
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv6Rule,
        ],
    };
    let (link, neighbour) = (MulticastGroup::Link, MulticastGroup::Neigh);
    let groups = [link, neighbour, addresses, routes, rules];
    let (connection, _handle, mut messages) =
        new_multicast_connection(&groups).map_err(NetlinkError::Open)?;
    let driver = tokio::spawn(connection);
    while let Some((message, _)) = messages.next().await {
        let change = match message.payload {
            NetlinkPayload::InnerMessage(message) => change_of(&message),
            NetlinkPayload::Overrun(_) => Some(Change::Missed),
            _ => None,
        };
        if let Some(change) = change {
            match out.try_send(change) {
                Ok(()) => {}
                // What is in the queue may be none of our business, and this one may not.
                Err(TrySendError::Full(_)) if out.send(Change::Missed).await.is_ok() => {}
                Err(_) => {
                    driver.abort();
                    return Ok(());
                }
            }
        }
    }
    Err(NetlinkError::Unexpected {
        what: "watch for changes".into(),
        reason: "the netlink socket closed".into(),
    })
}

fn change_of(message: &RouteNetlinkMessage) -> Option<Change> {
    match message {
        RouteNetlinkMessage::NewLink(link) => Some(Change::Link(link_change(link, false))),
        RouteNetlinkMessage::DelLink(link) => Some(Change::Link(link_change(link, true))),
        RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address) => {
            Some(Change::Address(address.header.index))
        }
        RouteNetlinkMessage::NewNeighbour(message) => Some(Change::Neighbour(NeighbourChange {
            index: message.header.ifindex,
            neighbour: neighbour(message),
            heard: forwarding(message).map(|(mac, _)| mac),
        })),
        RouteNetlinkMessage::DelNeighbour(message) => Some(Change::Neighbour(NeighbourChange {
            index: message.header.ifindex,
            neighbour: None,
            heard: None,
        })),
        RouteNetlinkMessage::NewRoute(_)
        | RouteNetlinkMessage::DelRoute(_)
        | RouteNetlinkMessage::NewRule(_)
        | RouteNetlinkMessage::DelRule(_) => Some(Change::Route),
        _ => None,
    }
}

fn link_change(link: &LinkMessage, gone: bool) -> LinkChange {
    let bridge = link
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Controller(index) => Some(*index),
            _ => None,
        });
    LinkChange {
        index: link.header.index,
        name: name_of(link),
        bridge,
        gone,
    }
}
