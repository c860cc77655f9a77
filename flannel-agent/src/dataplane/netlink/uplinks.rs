//! The interfaces and default routes among which the uplink is chosen (`flannel_core::iface` chooses).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use flannel_core::{
    addr::IfIndex,
    iface::{Link, LinkAddr, Routes},
};
use futures_util::TryStreamExt as _;
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::{
        address::{AddressAttribute, AddressHeaderFlags, AddressMessage},
        link::LinkFlags,
        route::{RouteAttribute, RouteHeader, RouteMessage},
    },
};

use super::{
    Netlink, NetlinkError,
    device::{mtu_of, name_of},
};

/// Everything that the choice of an uplink depends on.
#[derive(Clone, Debug)]
pub struct Uplinks {
    /// All interfaces with their addresses, in index order.
    pub links: Vec<Link>,
    /// Where the default routes point.
    pub routes: Routes,
}

impl Netlink {
    /// Reads interfaces, addresses and default routes.
    pub async fn uplinks(&self) -> Result<Uplinks, NetlinkError> {
        let messages: Vec<_> = self
            .handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|e| NetlinkError::new("list links", &e))?;
        let addresses: Vec<_> = self
            .handle
            .address()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|e| NetlinkError::new("list addresses", &e))?;
        let mut links: Vec<Link> = messages
            .iter()
            .filter_map(|message| {
                Some(Link {
                    index: IfIndex::try_from(message.header.index).ok()?,
                    name: name_of(message)?,
                    mtu: mtu_of(message),
                    up: message.header.flags.contains(LinkFlags::Up),
                    addrs: addresses
                        .iter()
                        .filter(|address| address.header.index == message.header.index)
                        .filter_map(address_of)
                        .collect(),
                })
            })
            .collect();
        links.sort_by_key(|link| link.index);
        let routes = Routes {
            default_v4: self
                .default_route(RouteMessageBuilder::<Ipv4Addr>::new().build())
                .await?,
            default_v6: self
                .default_route(RouteMessageBuilder::<Ipv6Addr>::new().build())
                .await?,
        };
        Ok(Uplinks { links, routes })
    }

    /// The interface of the default route with the lowest metric in the main table.
    async fn default_route(&self, request: RouteMessage) -> Result<Option<IfIndex>, NetlinkError> {
        let routes: Vec<_> = self
            .handle
            .route()
            .get(request)
            .execute()
            .try_collect()
            .await
            .map_err(|e| NetlinkError::new("list routes", &e))?;
        Ok(routes
            .iter()
            .filter(|route| {
                route.header.destination_prefix_length == 0
                    && route.header.table == RouteHeader::RT_TABLE_MAIN
            })
            .filter_map(|route| {
                let mut oif = None;
                let mut metric = 0;
                for attribute in &route.attributes {
                    match attribute {
                        RouteAttribute::Oif(index) => oif = IfIndex::try_from(*index).ok(),
                        RouteAttribute::Priority(priority) => metric = *priority,
                        _ => {}
                    }
                }
                Some((metric, oif?))
            })
            .min()
            .map(|(_, index)| index))
    }
}

fn address_of(message: &AddressMessage) -> Option<LinkAddr> {
    let (mut address, mut local) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(ip) => address = Some(*ip),
            AddressAttribute::Local(ip) => local = Some(*ip),
            _ => {}
        }
    }
    let flags = message.header.flags;
    let ip = local.or(address)?;
    Some(LinkAddr {
        ip,
        prefix_len: message.header.prefix_len,
        permanent: flags.contains(AddressHeaderFlags::Permanent),
        // The same bit is "secondary" for IPv4 and "temporary" for IPv6.
        temporary: ip.is_ipv6() && flags.contains(AddressHeaderFlags::Secondary),
        deprecated: flags.contains(AddressHeaderFlags::Deprecated),
        link_local: match ip {
            IpAddr::V4(ip) => ip.is_link_local(),
            IpAddr::V6(ip) => ip.is_unicast_link_local(),
        },
    })
}
