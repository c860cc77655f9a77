//! How the underlay reaches each VTEP: the route, its MTU, and the next hop's MAC address.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use flannel_core::{
    addr::{Family, IfIndex, VtepMac},
    plan::NextHop,
};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use rtnetlink::{
    Error as RtError,
    packet_route::{
        link::{LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage},
        neighbour::{NeighbourFlags, NeighbourState},
        route::{RouteAttribute, RouteMessage, RouteMetric, RouteType},
    },
};

use super::{
    Netlink, NetlinkError,
    device::{destination, lladdr, mac_of, mtu_of},
    family::{as_route_address, route_address, route_to},
};

/// Routes that are looked up together. The kernel's buffer of a socket has room for the answers, of a page each, several times over.
const AT_A_TIME: usize = 16;

/// What a look at the underlay found.
#[derive(Debug, Default)]
pub struct Underlay {
    /// The way to each VTEP that has one.
    pub next_hops: BTreeMap<IpAddr, NextHop>,
    /// Next hops whose address the kernel should resolve or confirm: interface and address.
    pub unconfirmed: BTreeSet<(IfIndex, IpAddr)>,
}

impl Netlink {
    /// Looks up the way to each of `vteps`, which is sent from `local`.
    pub async fn underlay(
        &self,
        local: IpAddr,
        vteps: impl IntoIterator<Item = IpAddr>,
    ) -> Result<Underlay, NetlinkError> {
        let mut found = Underlay::default();
        let links = self.ethernet_links().await?;
        let family = Family::of(local);
        let vteps = vteps.into_iter().filter(|vtep| Family::of(*vtep) == family);
        // Several at a time: the answers to one socket fit into its buffer.
        let ways: Vec<Option<(IpAddr, Way)>> = stream::iter(vteps)
            .map(async |remote| {
                let route = self.route_to(local, remote).await?;
                let way = route.and_then(|route| Way::of(&route, remote));
                Ok(way.map(|way| (remote, way)))
            })
            .buffered(AT_A_TIME)
            .try_collect()
            .await?;
        let mut neighbours = BTreeMap::new();
        let towards: BTreeSet<IfIndex> =
            ways.iter().flatten().map(|(_, way)| way.ifindex).collect();
        for index in towards {
            for message in self.neighbours_on(index, family).await? {
                if let Some(ip) = destination(&message) {
                    neighbours.insert((index, ip), (message.header.state, lladdr(&message)));
                }
            }
        }
        for (remote, way) in ways.into_iter().flatten() {
            let Some((uplink_mac, device_mtu)) = links.get(&way.ifindex) else {
                continue;
            };
            let gateway = way.gateway;
            let (state, mac) = neighbours
                .get(&(way.ifindex, gateway))
                .copied()
                .unwrap_or((NeighbourState::None, None));
            if needs_confirmation(state) {
                found.unconfirmed.insert((way.ifindex, gateway));
            }
            let hop = NextHop {
                ifindex: way.ifindex,
                uplink_mac: *uplink_mac,
                mac: mac.filter(|_| is_usable(state)),
                mtu: way.mtu.map_or(*device_mtu, |mtu| mtu.min(*device_mtu)),
                on_link: way.on_link,
            };
            found.next_hops.insert(remote, hop);
        }
        Ok(found)
    }

    /// Asks the kernel to resolve or confirm a neighbour, as traffic through the stack would.
    pub async fn confirm(&self, index: IfIndex, address: IpAddr) -> Result<(), NetlinkError> {
        let request = self
            .handle
            .neighbours()
            .add(index.get(), address)
            .state(NeighbourState::None)
            .flags(NeighbourFlags::Use)
            .replace();
        request.execute().await.map_err(|e| {
            NetlinkError::new(
                format!("confirm neighbour {address} on interface {}", index.get()),
                &e,
            )
        })
    }

    /// Whether an interface speaks Ethernet and resolves neighbours.
    pub async fn is_ethernet(&self, index: IfIndex) -> Result<bool, NetlinkError> {
        Ok(self.ethernet_links().await?.contains_key(&index))
    }

    /// What an interface is to the kernel (`IFLA_INFO_KIND`); `None` for hardware, which has no word for it.
    pub async fn kind_of(&self, index: IfIndex) -> Result<Option<String>, NetlinkError> {
        let link = self.link_by_index(index.get()).await?;
        Ok(link.as_ref().and_then(kind_of))
    }

    async fn ethernet_links(&self) -> Result<BTreeMap<IfIndex, (VtepMac, u32)>, NetlinkError> {
        let links = self.list_links().await?;
        Ok(links
            .iter()
            .filter(|link| {
                link.header.link_layer_type == LinkLayerType::Ether
                    && !link.header.flags.contains(LinkFlags::Noarp)
            })
            .filter_map(|link| {
                Some((
                    IfIndex::try_from(link.header.index).ok()?,
                    (mac_of(link)?, mtu_of(link)),
                ))
            })
            .collect())
    }

    async fn route_to(
        &self,
        local: IpAddr,
        remote: IpAddr,
    ) -> Result<Option<RouteMessage>, NetlinkError> {
        let mut request = route_to(remote.into()).build();
        request.header.source_prefix_length = Family::of(local).bits();
        let source = RouteAttribute::Source(as_route_address(local));
        request.attributes.push(source);
        match self.handle.route().get(request).execute().try_next().await {
            Ok(route) => Ok(route),
            // No route, or one that refuses.
            Err(RtError::NetlinkError(message))
                if [
                    -libc::ENETUNREACH,
                    -libc::EHOSTUNREACH,
                    -libc::EACCES,
                    -libc::EINVAL,
                ]
                .contains(&message.raw_code()) =>
            {
                Ok(None)
            }
            Err(error) => Err(NetlinkError::new(
                format!("look up the route from {local} to {remote}"),
                &error,
            )),
        }
    }
}

struct Way {
    ifindex: IfIndex,
    gateway: IpAddr,
    mtu: Option<u32>,
    on_link: bool,
}

impl Way {
    fn of(route: &RouteMessage, remote: IpAddr) -> Option<Self> {
        let (mut oif, mut gateway, mut mtu) = (None, remote, None);
        let mut on_link = route.header.kind == RouteType::Unicast;
        for attribute in &route.attributes {
            match attribute {
                RouteAttribute::Oif(index) => oif = IfIndex::try_from(*index).ok(),
                RouteAttribute::Gateway(address) => {
                    gateway = route_address(address).unwrap_or(remote);
                    on_link = false;
                }
                // A gateway of another family; several ways at once.
                RouteAttribute::Via(_) | RouteAttribute::MultiPath(_) => on_link = false,
                RouteAttribute::Metrics(metrics) => {
                    mtu = metrics.iter().find_map(|metric| match metric {
                        RouteMetric::Mtu(mtu) if *mtu > 0 => Some(*mtu),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        Some(Self {
            ifindex: oif?,
            gateway,
            mtu,
            on_link,
        })
    }
}

/// What the kernel calls the kind of a device; `None` for hardware.
pub(super) fn kind_of(link: &LinkMessage) -> Option<String> {
    let infos = link
        .attributes
        .iter()
        .filter_map(|attribute| match attribute {
            LinkAttribute::LinkInfo(infos) => Some(infos),
            _ => None,
        });
    infos.flatten().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind.to_string()),
        _ => None,
    })
}

/// States in which the kernel itself sends to the address it has (`NUD_VALID`).
fn is_usable(state: NeighbourState) -> bool {
    matches!(
        state,
        NeighbourState::Reachable
            | NeighbourState::Stale
            | NeighbourState::Delay
            | NeighbourState::Probe
            | NeighbourState::Permanent
            | NeighbourState::Noarp
    )
}

/// States that only traffic through the stack would move on.
fn needs_confirmation(state: NeighbourState) -> bool {
    matches!(
        state,
        NeighbourState::None | NeighbourState::Stale | NeighbourState::Failed
    )
}
