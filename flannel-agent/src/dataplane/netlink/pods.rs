//! Reading the bridge that pods hang on: its ports, neighbours and forwarding entries.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use flannel_core::{
    addr::{Family, IfIndex, VtepMac},
    pods::{Bridge, PodSources, Port, gateway},
};
use futures_util::TryStreamExt as _;
use ipnet::IpNet;
use rtnetlink::packet_route::{
    AddressFamily,
    address::AddressAttribute,
    link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
    neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState},
};

use super::{
    Netlink, NetlinkError,
    device::{destination, lladdr, mac_of, mtu_of, name_of},
    family::address_family,
};

impl Netlink {
    /// Everything but what CNI plugins have left. `own` is this node's subnet.
    pub async fn pod_sources(&self, own: IpNet) -> Result<PodSources, NetlinkError> {
        let mut sources = PodSources {
            bridge: self.bridge_of(own).await?,
            ports: BTreeMap::new(),
            neighbours: BTreeMap::new(),
            fdb: BTreeMap::new(),
            cni: Vec::new(),
            own,
        };
        let Some(bridge) = sources.bridge else {
            return Ok(sources);
        };
        sources.ports = self.ports(bridge.index).await?;
        let neighbours = self
            .neighbours_on(bridge.index, Family::of_net(&own))
            .await?;
        sources.neighbours = neighbours.iter().filter_map(neighbour).collect();
        let entries = self
            .neighbour_dump(AddressFamily::Bridge, "list forwarding entries")
            .await?;
        let mut places: BTreeMap<VtepMac, BTreeSet<IfIndex>> = BTreeMap::new();
        for (mac, port) in entries.iter().filter_map(forwarding) {
            if sources.ports.contains_key(&port) {
                places.entry(mac).or_default().insert(port);
            }
        }
        // On several ports, in several VLANs: the bridge alone can tell.
        sources.fdb = places
            .into_iter()
            .filter_map(|(mac, ports)| {
                let mut ports = ports.into_iter();
                let port = ports.next()?;
                ports.next().is_none().then_some((mac, port))
            })
            .collect();
        Ok(sources)
    }

    /// The bridge that has the gateway's address.
    async fn bridge_of(&self, own: IpNet) -> Result<Option<Bridge>, NetlinkError> {
        let Some(gateway) = gateway(own) else {
            return Ok(None);
        };
        let mut request = self.handle.address().get();
        let family = Family::of_net(&own);
        request.message_mut().header.family = address_family(family);
        let turn = self.turn().await;
        let addresses: Vec<_> = request
            .execute()
            .try_collect()
            .await
            .map_err(|e| NetlinkError::new("list addresses", &e))?;
        drop(turn);
        let wanted = match family {
            Family::V4 => AddressAttribute::Local(gateway.addr()),
            // Of IPv6 the kernel names the address alone.
            Family::V6 => AddressAttribute::Address(gateway.addr()),
        };
        let holders = addresses.iter().filter(|message| {
            message.header.prefix_len == gateway.prefix_len()
                && message.attributes.contains(&wanted)
        });
        for holder in holders {
            if let Some(link) = self.link_by_index(holder.header.index).await?
                && is_kind(&link, &InfoKind::Bridge)
                && let (Ok(index), Some(mac)) =
                    (IfIndex::try_from(link.header.index), mac_of(&link))
            {
                let mtu = mtu_of(&link);
                return Ok(Some(Bridge { index, mac, mtu }));
            }
        }
        Ok(None)
    }

    async fn ports(&self, bridge: IfIndex) -> Result<BTreeMap<IfIndex, Port>, NetlinkError> {
        let mut request = self.handle.link().get();
        // The kernel filters by it (`link_master_filtered`).
        let of_bridge = LinkAttribute::Controller(bridge.get());
        request.message_mut().attributes.push(of_bridge.clone());
        let _turn = self.turn().await;
        let links: Vec<_> = request.execute().try_collect().await.map_err(|e| {
            NetlinkError::new(format!("list ports of interface {}", bridge.get()), &e)
        })?;
        Ok(links
            .iter()
            .filter(|link| link.attributes.contains(&of_bridge))
            .filter_map(port)
            .collect())
    }
}

fn port(link: &LinkMessage) -> Option<(IfIndex, Port)> {
    // Packets are handed to the other end: in the same namespace nobody would get them.
    let elsewhere = link
        .attributes
        .iter()
        .any(|attribute| matches!(attribute, LinkAttribute::LinkNetNsId(_)));
    let port = Port {
        name: name_of(link)?,
        mtu: mtu_of(link),
        is_veth: elsewhere && is_kind(link, &InfoKind::Veth),
        up: link.header.flags.contains(LinkFlags::Up),
    };
    Some((IfIndex::try_from(link.header.index).ok()?, port))
}

fn is_kind(link: &LinkMessage, kind: &InfoKind) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos
            .iter()
            .any(|info| matches!(info, LinkInfo::Kind(is) if is == kind)),
        _ => false,
    })
}

/// A neighbour with a MAC address that has not failed.
pub(super) fn neighbour(message: &NeighbourMessage) -> Option<(IpAddr, VtepMac)> {
    let address = destination(message)?;
    if matches!(
        message.header.state,
        NeighbourState::Failed | NeighbourState::Incomplete
    ) {
        return None;
    }
    Some((address, lladdr(message)?))
}

/// A forwarding entry of a bridge that is not about an address of the bridge or its ports themselves.
pub(super) fn forwarding(message: &NeighbourMessage) -> Option<(VtepMac, IfIndex)> {
    let header = &message.header;
    // The entries that a device itself has, such as those of vxlan, name no bridge.
    let of_bridge = message
        .attributes
        .iter()
        .any(|attribute| matches!(attribute, NeighbourAttribute::Controller(_)));
    if !of_bridge || header.state == NeighbourState::Permanent {
        return None;
    }
    Some((lladdr(message)?, IfIndex::try_from(header.ifindex).ok()?))
}
