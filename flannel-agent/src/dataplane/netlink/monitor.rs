//! The kernel's notifications. They only say "look again"; what changed is read anew.

use futures_util::StreamExt as _;
use rtnetlink::{
    MulticastGroup, new_multicast_connection, packet_core::NetlinkPayload,
    packet_route::RouteNetlinkMessage,
};
use tokio::sync::mpsc::{self, error::TrySendError};

use super::{NetlinkError, device::name_of};

/// Something changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A link: its name, if the message had it, and its index.
    Link(Option<String>, u32),
    /// An address on an interface.
    Address(u32),
    /// A neighbour or forwarding entry on an interface.
    Neighbour(u32),
    /// A route or a routing rule.
    Route,
    /// The kernel dropped notifications: anything may have changed.
    Missed,
}

/// Sends every change to `out` until the receiver is gone. Ends with an error if the socket dies; the caller opens another.
pub async fn watch(out: mpsc::Sender<Change>) -> Result<(), NetlinkError> {
    let groups = [
        MulticastGroup::Link,
        MulticastGroup::Neigh,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv4Rule,
    ];
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
        RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link) => {
            Some(Change::Link(name_of(link), link.header.index))
        }
        RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address) => {
            Some(Change::Address(address.header.index))
        }
        RouteNetlinkMessage::NewNeighbour(neighbour)
        | RouteNetlinkMessage::DelNeighbour(neighbour) => {
            Some(Change::Neighbour(neighbour.header.ifindex))
        }
        RouteNetlinkMessage::NewRoute(_)
        | RouteNetlinkMessage::DelRoute(_)
        | RouteNetlinkMessage::NewRule(_)
        | RouteNetlinkMessage::DelRule(_) => Some(Change::Route),
        _ => None,
    }
}
