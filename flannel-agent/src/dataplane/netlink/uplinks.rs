//! The interfaces and default routes among which the uplink is chosen (`flannel_core::iface` chooses).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use flannel_core::{
    addr::IfIndex,
    iface::{DefaultRoute, Link, LinkAddr, Reach, Routes, Wanted},
};
use futures_util::TryStreamExt as _;
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::{
        address::{AddressHeaderFlags, AddressMessage},
        link::LinkFlags,
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType},
    },
};

use super::{
    Netlink, NetlinkError,
    device::{mtu_of, name_of},
    family::own_address,
    underlay::kind_of,
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
    /// Reads interfaces, addresses and default routes, and the way to the address that must be reachable.
    pub async fn uplinks(&self, wanted: &Wanted) -> Result<Uplinks, NetlinkError> {
        let messages = self.list_links().await?;
        let turn = self.turn().await;
        let addresses: Vec<_> = self
            .handle
            .address()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|e| NetlinkError::new("list addresses", &e))?;
        drop(turn);
        let mut links: Vec<Link> = messages
            .iter()
            .filter_map(|message| {
                Some(Link {
                    index: IfIndex::try_from(message.header.index).ok()?,
                    name: name_of(message)?,
                    mtu: mtu_of(message),
                    up: message.header.flags.contains(LinkFlags::Up),
                    kind: kind_of(message),
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
            reach: match wanted.can_reach {
                Some(ip) => self.way_to(ip).await?,
                None => None,
            },
        };
        Ok(Uplinks { links, routes })
    }

    /// The default route with the lowest metric in the main table.
    async fn default_route(&self, request: RouteMessage) -> Result<DefaultRoute, NetlinkError> {
        let routes = self.list_routes(request).await?;
        Ok(routes
            .iter()
            .filter(|route| {
                route.header.destination_prefix_length == 0
                    && route.header.table == RouteHeader::RT_TABLE_MAIN
                    && route.header.kind == RouteType::Unicast
            })
            .map(|route| {
                let mut way = DefaultRoute::None;
                let mut metric = 0;
                for attribute in &route.attributes {
                    match attribute {
                        RouteAttribute::Oif(index) => {
                            way = IfIndex::try_from(*index)
                                .map_or(DefaultRoute::None, DefaultRoute::Over);
                        }
                        RouteAttribute::MultiPath(hops) => {
                            let hops = hops
                                .iter()
                                .map(|hop| IfIndex::try_from(hop.interface_index));
                            way = DefaultRoute::Multipath(hops.filter_map(Result::ok).collect());
                        }
                        RouteAttribute::Priority(priority) => metric = *priority,
                        _ => {}
                    }
                }
                (metric, way)
            })
            .min_by_key(|(metric, _)| *metric)
            .map(|(_, way)| way)
            .unwrap_or_default())
    }

    /// The way the kernel would take to an address; `None` if it has none.
    async fn way_to(&self, ip: IpAddr) -> Result<Option<Reach>, NetlinkError> {
        let request = match ip {
            IpAddr::V4(ip) => RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(ip, 32)
                .build(),
            IpAddr::V6(ip) => RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(ip, 128)
                .build(),
        };
        let route = match self.handle.route().get(request).execute().try_next().await {
            Ok(Some(route)) => route,
            Ok(None) => return Ok(None),
            Err(error) => {
                let error = NetlinkError::new(format!("look up the route to {ip}"), &error);
                let no_way = [
                    libc::ENETUNREACH,
                    libc::EHOSTUNREACH,
                    libc::EACCES,
                    libc::EINVAL,
                ];
                return match error.errno() {
                    Some(errno) if no_way.contains(&errno) => Ok(None),
                    _ => Err(error),
                };
            }
        };
        let (mut index, mut source) = (None, None);
        for attribute in &route.attributes {
            match attribute {
                RouteAttribute::Oif(oif) => index = IfIndex::try_from(*oif).ok(),
                RouteAttribute::PrefSource(RouteAddress::Inet(ip)) => {
                    source = Some(IpAddr::V4(*ip));
                }
                RouteAttribute::PrefSource(RouteAddress::Inet6(ip)) => {
                    source = Some(IpAddr::V6(*ip));
                }
                _ => {}
            }
        }
        Ok(index.map(|index| Reach { index, source }))
    }
}

fn address_of(message: &AddressMessage) -> Option<LinkAddr> {
    let flags = message.header.flags;
    let ip = own_address(message)?;
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
