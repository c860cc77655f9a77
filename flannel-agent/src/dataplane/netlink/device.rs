//! Reading the tunnel device and what hangs on it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use flannel_core::{
    addr::{Family, IfIndex, VtepMac},
    plan::{Device, ObservedKind, Route},
};
use futures_util::TryStreamExt as _;
use ipnet::IpNet;
use rtnetlink::{
    Error as RtError,
    packet_route::{
        AddressFamily,
        address::AddressAttribute,
        link::{InfoData, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
        neighbour::{
            NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
        },
        route::{RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric},
    },
};

use super::{
    Netlink, NetlinkError,
    family::{address_family, any_route, route_address},
};

impl Netlink {
    /// Reads the device of that name, with what hangs on it of one family; `None` if there is none.
    pub async fn device(&self, name: &str, family: Family) -> Result<Option<Device>, NetlinkError> {
        let Some(link) = self.link_by_name(name).await? else {
            return Ok(None);
        };
        let index = index_of(&link, name)?;
        let Some(mac) = mac_of(&link) else {
            return Err(NetlinkError::Unexpected {
                what: format!("read device {name}"),
                reason: "it has no MAC address".into(),
            });
        };
        let kind = self.kind(&link).await?;
        let up = link.header.flags.contains(LinkFlags::Up) && self.far_end_up(&kind).await?;
        Ok(Some(Device {
            index,
            mtu: mtu_of(&link),
            mac,
            up,
            kind,
            addresses: self.addresses(index, family).await?,
            routes: self.routes(index, family).await?,
            neighbours: self.neighbours(index, family).await?,
            fdb: self.fdb(index).await?,
        }))
    }

    /// The index of the interface of that name.
    pub async fn index(&self, name: &str) -> Result<Option<IfIndex>, NetlinkError> {
        self.link_by_name(name)
            .await?
            .map(|link| index_of(&link, name))
            .transpose()
    }

    pub(super) async fn link_by_name(
        &self,
        name: &str,
    ) -> Result<Option<LinkMessage>, NetlinkError> {
        found(
            self.handle
                .link()
                .get()
                .match_name(name)
                .execute()
                .try_next()
                .await,
            || format!("read device {name}"),
        )
    }

    pub(super) async fn link_by_index(
        &self,
        index: u32,
    ) -> Result<Option<LinkMessage>, NetlinkError> {
        found(
            self.handle
                .link()
                .get()
                .match_index(index)
                .execute()
                .try_next()
                .await,
            || format!("read interface {index}"),
        )
    }

    async fn kind(&self, link: &LinkMessage) -> Result<ObservedKind, NetlinkError> {
        let mut kind = String::from("plain");
        let mut vxlan = None;
        for attribute in &link.attributes {
            let LinkAttribute::LinkInfo(infos) = attribute else {
                continue;
            };
            for info in infos {
                match info {
                    LinkInfo::Kind(name) => kind = name.to_string(),
                    LinkInfo::Data(InfoData::Vxlan(data)) => vxlan = Some(vxlan_kind(data)),
                    _ => {}
                }
            }
        }
        match (kind.as_str(), vxlan) {
            ("vxlan", Some(vxlan)) => Ok(vxlan),
            ("veth", _) => Ok(ObservedKind::Veth {
                peer: self.veth_peer(link).await?,
            }),
            _ => Ok(ObservedKind::Other(kind)),
        }
    }

    async fn veth_peer(&self, link: &LinkMessage) -> Result<Option<String>, NetlinkError> {
        let elsewhere = link
            .attributes
            .iter()
            .any(|a| matches!(a, LinkAttribute::LinkNetNsId(_)));
        let peer = link.attributes.iter().find_map(|a| match a {
            LinkAttribute::Link(index) => Some(*index),
            _ => None,
        });
        match peer {
            Some(index) if !elsewhere => Ok(self
                .link_by_index(index)
                .await?
                .and_then(|peer| name_of(&peer))),
            _ => Ok(None),
        }
    }

    async fn far_end_up(&self, kind: &ObservedKind) -> Result<bool, NetlinkError> {
        match kind {
            ObservedKind::Veth { peer: Some(peer) } => Ok(self
                .link_by_name(peer)
                .await?
                .is_some_and(|link| link.header.flags.contains(LinkFlags::Up))),
            _ => Ok(true),
        }
    }

    /// The addresses of an interface, without those of IPv6 that the kernel gives to every one (`fe80::/10`).
    pub(super) async fn addresses(
        &self,
        index: IfIndex,
        family: Family,
    ) -> Result<BTreeSet<IpNet>, NetlinkError> {
        let mut request = self
            .handle
            .address()
            .get()
            .set_link_index_filter(index.get());
        request.message_mut().header.family = address_family(family);
        let _turn = self.turn().await;
        let messages: Vec<_> = request.execute().try_collect().await.map_err(|e| {
            NetlinkError::new(format!("list addresses of interface {}", index.get()), &e)
        })?;
        Ok(messages
            .iter()
            .filter(|message| message.header.index == index.get())
            .filter_map(|message| {
                // Of IPv6 the kernel names the address alone.
                let ip =
                    message
                        .attributes
                        .iter()
                        .find_map(|attribute| match (family, attribute) {
                            (Family::V4, AddressAttribute::Local(ip))
                            | (Family::V6, AddressAttribute::Address(ip)) => Some(*ip),
                            _ => None,
                        })?;
                let link_local = matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
                let address = IpNet::new(ip, message.header.prefix_len).ok()?;
                (!link_local && Family::of(ip) == family).then_some(address)
            })
            .collect())
    }

    /// Routes over the device that have the shape of ours: in the main table, via the base address of their own destination.
    async fn routes(
        &self,
        index: IfIndex,
        family: Family,
    ) -> Result<BTreeMap<IpNet, Route>, NetlinkError> {
        let request = any_route(family).output_interface(index.get()).build();
        let _turn = self.turn().await;
        let messages: Vec<_> = self
            .handle
            .route()
            .get(request)
            .execute()
            .try_collect()
            .await
            .map_err(|e| {
                NetlinkError::new(format!("list routes of interface {}", index.get()), &e)
            })?;
        Ok(messages
            .iter()
            .filter_map(|message| our_route(message, index))
            .collect())
    }

    async fn neighbours(
        &self,
        index: IfIndex,
        family: Family,
    ) -> Result<BTreeMap<IpAddr, VtepMac>, NetlinkError> {
        let messages = self.neighbours_on(index, family).await?;
        Ok(messages
            .iter()
            .filter(|m| m.header.state == NeighbourState::Permanent)
            .filter_map(|m| Some((destination(m)?, lladdr(m)?)))
            .collect())
    }

    async fn fdb(&self, index: IfIndex) -> Result<BTreeMap<VtepMac, IpAddr>, NetlinkError> {
        let messages = self
            .neighbour_dump(AddressFamily::Bridge, "list forwarding entries")
            .await?;
        Ok(messages
            .iter()
            .filter(|m| m.header.ifindex == index.get() && is_permanent(m.header.state))
            .filter(|m| m.header.flags.contains(NeighbourFlags::Own))
            .filter_map(|m| Some((lladdr(m)?, destination(m)?)))
            .collect())
    }

    /// The neighbours of a family on an interface. The kernel leaves those on others out (`neigh_valid_dump_req`, 4.5), of which a node with
    /// thousands of peers has thousands.
    pub(super) async fn neighbours_on(
        &self,
        index: IfIndex,
        family: Family,
    ) -> Result<Vec<NeighbourMessage>, NetlinkError> {
        let neighbours = self.handle.neighbours().get();
        let mut request = neighbours.set_address_family(address_family(family));
        let wanted = NeighbourAttribute::IfIndex(index.get());
        request.message_mut().attributes.push(wanted);
        let messages = request.execute().try_collect::<Vec<_>>().await;
        let mut messages = messages.map_err(|e| {
            NetlinkError::new(format!("list neighbours on interface {}", index.get()), &e)
        })?;
        messages.retain(|message| message.header.ifindex == index.get());
        Ok(messages)
    }

    pub(super) async fn neighbour_dump(
        &self,
        family: AddressFamily,
        what: &str,
    ) -> Result<Vec<NeighbourMessage>, NetlinkError> {
        let _turn = self.turn().await;
        let request = self.handle.neighbours().get().set_address_family(family);
        request
            .execute()
            .try_collect()
            .await
            .map_err(|e| NetlinkError::new(what, &e))
    }
}

fn vxlan_kind(data: &[InfoVxlan]) -> ObservedKind {
    let (mut vni, mut port, mut lower, mut local) = (0, 0, None, None);
    let (mut learning, mut gbp) = (false, false);
    for attribute in data {
        match attribute {
            InfoVxlan::Id(id) => vni = *id,
            InfoVxlan::Port(number) => port = *number,
            InfoVxlan::Link(index) => lower = IfIndex::try_from(*index).ok(),
            InfoVxlan::Local(ip) if !ip.is_unspecified() => local = Some(IpAddr::V4(*ip)),
            InfoVxlan::Local6(ip) if !ip.is_unspecified() => local = Some(IpAddr::V6(*ip)),
            InfoVxlan::Learning(on) => learning = *on,
            InfoVxlan::Gbp => gbp = true,
            _ => {}
        }
    }
    ObservedKind::Vxlan {
        vni,
        port,
        lower,
        local,
        learning,
        gbp,
    }
}

fn our_route(message: &RouteMessage, index: IfIndex) -> Option<(IpNet, Route)> {
    let (mut destination, mut gateway, mut oif, mut mtu) = (None, None, None, None);
    let mut table = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = route_address(address),
            RouteAttribute::Gateway(address) => gateway = route_address(address),
            RouteAttribute::Oif(oif_index) => oif = Some(*oif_index),
            RouteAttribute::Table(number) => table = Some(*number),
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    // The same route in a table of somebody's own would hide that ours is missing.
    if table.unwrap_or(u32::from(message.header.table)) != u32::from(RouteHeader::RT_TABLE_MAIN) {
        return None;
    }
    let (destination, gateway) = (destination?, gateway?);
    let onlink = message.header.flags.contains(RouteFlags::Onlink);
    if oif? != index.get() || gateway != destination || !onlink {
        return None;
    }
    let subnet = IpNet::new(destination, message.header.destination_prefix_length).ok()?;
    Some((subnet, Route { gateway, mtu }))
}

/// `bridge fdb add … permanent` sets another bit beside the one that flannel sets.
fn is_permanent(state: NeighbourState) -> bool {
    u16::from(state) & u16::from(NeighbourState::Permanent) != 0
}

/// "No such device" is an answer, not an error.
fn found<T>(
    answer: Result<Option<T>, RtError>,
    what: impl FnOnce() -> String,
) -> Result<Option<T>, NetlinkError> {
    match answer {
        Ok(found) => Ok(found),
        Err(RtError::NetlinkError(message)) if message.raw_code() == -libc::ENODEV => Ok(None),
        Err(error) => Err(NetlinkError::new(what(), &error)),
    }
}

pub(super) fn index_of(link: &LinkMessage, name: &str) -> Result<IfIndex, NetlinkError> {
    IfIndex::try_from(link.header.index).map_err(|e| NetlinkError::Unexpected {
        what: format!("read device {name}"),
        reason: e.to_string(),
    })
}

pub(super) fn name_of(link: &LinkMessage) -> Option<String> {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.clone()),
            _ => None,
        })
}

pub(super) fn mtu_of(link: &LinkMessage) -> u32 {
    let mtu = link
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Mtu(mtu) => Some(*mtu),
            _ => None,
        });
    mtu.unwrap_or(0)
}

pub(super) fn mac_of(link: &LinkMessage) -> Option<VtepMac> {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Address(bytes) => <[u8; 6]>::try_from(bytes.as_slice())
                .ok()
                .map(VtepMac::from),
            _ => None,
        })
}

pub(super) fn destination(message: &NeighbourMessage) -> Option<IpAddr> {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
            // In a dump of the bridge family the library cannot know which family the outer address has.
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
                let v4 = <[u8; 4]>::try_from(bytes.as_slice()).map(IpAddr::from);
                v4.or_else(|_| <[u8; 16]>::try_from(bytes.as_slice()).map(IpAddr::from))
                    .ok()
            }
            _ => None,
        })
}

pub(super) fn lladdr(message: &NeighbourMessage) -> Option<VtepMac> {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => <[u8; 6]>::try_from(bytes.as_slice())
                .ok()
                .map(VtepMac::from),
            _ => None,
        })
}
