//! What the node should look like.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, Ipv4Addr},
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::Settings;
use crate::{
    addr::{Family, IfIndex, Mtu, Vni, VtepMac},
    config::BackendKind,
    lease::{LeaseAttrs, SubnetKey},
    pods::Pod,
};

/// Everything that this node should have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Desired {
    /// The tunnel device; `None` where all peers are routed to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tunnel: Option<Tunnel>,
    /// Peers on the same link are routed to; `None` where all go through the tunnel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direct: Option<Direct>,
    /// This node's own subnets: never programmed as a peer's.
    pub own: BTreeSet<IpNet>,
    /// Every other node, by subnet; `None` until the lease store has finished its first complete list.
    pub peers: Option<BTreeMap<IpNet, Peer>>,
    /// The eBPF half; `None` when the kernel's device does all the work.
    pub bpf: Option<Settings>,
    /// The pods of this node to which packets may be handed directly; `None` until they were read. Of no matter while the gate is off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pods: Option<BTreeMap<IpAddr, Pod>>,
}

impl Desired {
    /// The cluster network: routes inside it are ours to judge.
    pub fn network(&self) -> Option<IpNet> {
        let tunnel = self.tunnel.as_ref().map(|tunnel| tunnel.network);
        tunnel.or(self.direct.as_ref().map(|direct| direct.network))
    }
}

/// Routes to peers on the same link, without a tunnel (upstream: host-gw, and `DirectRouting` of vxlan).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Direct {
    /// The interface on whose link such peers are.
    pub uplink: IfIndex,
    /// The cluster network: no route outside it is touched.
    pub network: IpNet,
}

/// The tunnel device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tunnel {
    /// Interface name, see [`crate::mark`].
    pub name: String,
    /// What it is made of.
    pub kind: DeviceKind,
    /// MTU of the device, in bytes of inner packet.
    pub mtu: Mtu,
    /// The MAC address to give a new device; an existing device keeps its own until the lease says otherwise.
    pub mac: Option<VtepMac>,
    /// Its one address, `<subnet base>/32` or `/128`; `None` before there is a lease.
    pub address: Option<IpNet>,
    /// The cluster network: other addresses inside it are leftovers of an older lease.
    pub network: IpNet,
}

/// What the tunnel device is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    /// A kernel vxlan device, with the attributes upstream gives it.
    Vxlan {
        /// Network identifier.
        vni: Vni,
        /// UDP destination port.
        port: u16,
        /// The uplink.
        lower: IfIndex,
        /// Our address on the uplink.
        local: IpAddr,
        /// Whether it learns MAC addresses like a bridge.
        learning: bool,
        /// Whether it carries group policy bits.
        gbp: bool,
    },
    /// A veth pair that only carries the name: the kernel has no vxlan, eBPF does all the work.
    Veth {
        /// Name of the other end.
        peer: String,
    },
}

/// Another node of the overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// MAC address of its tunnel device, the inner destination; `None` for one that is always reached without a tunnel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<VtepMac>,
    /// Its address on the underlay: the outer destination, or the next hop.
    pub vtep: IpAddr,
}

/// Why a lease is not a peer of ours.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PeerProblem {
    /// The lease.
    pub key: SubnetKey,
    /// What is wrong with it.
    pub reason: String,
}

impl fmt::Display for PeerProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lease {} is not usable: {}", self.key, self.reason)
    }
}

/// Turns leases into the peers of one overlay, leaving out `own`. A lease that cannot be used is reported, never fatal; one without a
/// subnet of that family is none of this overlay.
pub fn peers_of<'a>(
    leases: impl IntoIterator<Item = (&'a SubnetKey, &'a LeaseAttrs)>,
    own: &SubnetKey,
    family: Family,
    kind: BackendKind,
) -> (BTreeMap<IpNet, Peer>, Vec<PeerProblem>) {
    let mut peers = BTreeMap::new();
    let mut problems = Vec::new();
    for (key, attrs) in leases {
        let Some(subnet) = key.subnet(family) else {
            continue;
        };
        if Some(subnet) == own.subnet(family) {
            continue;
        }
        if let Some(problem) = of_another_backend(key, attrs, kind) {
            // Once for a lease, not once for each of its families.
            let told = family == Family::V6 && own.v4.is_some() && key.v4.is_some();
            problems.extend((!told).then_some(problem));
            continue;
        }
        match peer_of(attrs, family, kind) {
            Ok(peer) => {
                peers.insert(subnet, peer);
            }
            Err(reason) => problems.push(PeerProblem { key: *key, reason }),
        }
    }
    if let Some(own) = own.subnet(family) {
        leave_out_irregular(&mut peers, own.prefix_len(), &mut problems);
    }
    (peers, problems)
}

/// Leaves out every subnet of another length than `regular` that overlaps a regular one: a lease such as 10.244.0.0/16, written by
/// mistake, must not cost the nodes inside it their place.
fn leave_out_irregular(
    peers: &mut BTreeMap<IpNet, Peer>,
    regular: u8,
    problems: &mut Vec<PeerProblem>,
) {
    let irregular: Vec<IpNet> = peers
        .keys()
        .filter(|subnet| subnet.prefix_len() != regular)
        .copied()
        .collect();
    for subnet in irregular {
        let other = peers
            .keys()
            .find(|other| other.prefix_len() == regular && overlap(other, &subnet));
        if let Some(other) = other {
            problems.push(PeerProblem {
                key: subnet.into(),
                reason: format!(
                    "it overlaps {other}, a node's subnet of the usual length: delete the wrong lease"
                ),
            });
            peers.remove(&subnet);
        }
    }
}

/// What is to be said about a lease of another backend than `kind`, in the words of upstream's vxlan backend. Nodes of different
/// backends never reach each other.
pub fn of_another_backend(
    key: &SubnetKey,
    attrs: &LeaseAttrs,
    kind: BackendKind,
) -> Option<PeerProblem> {
    if attrs.backend_type == kind.lease_type() {
        return None;
    }
    let (v4, v6) = (key.v4.unwrap_or_default(), key.v6.unwrap_or_default());
    let theirs = if attrs.backend_type.is_empty() {
        "none"
    } else {
        &attrs.backend_type
    };
    let reason = format!("ignoring non-{kind} v4Subnet({v4}) v6Subnet({v6}): type={theirs}");
    Some(PeerProblem { key: *key, reason })
}

fn peer_of(attrs: &LeaseAttrs, family: Family, kind: BackendKind) -> Result<Peer, String> {
    let (ip, data) = match family {
        Family::V4 => ("PublicIP", "BackendData"),
        Family::V6 => ("PublicIPv6", "BackendV6Data"),
    };
    let vtep = attrs.address(family).ok_or(format!("it has no {ip}"))?;
    let broadcast = vtep == IpAddr::V4(Ipv4Addr::BROADCAST);
    if vtep.is_unspecified() || vtep.is_multicast() || broadcast || vtep.is_loopback() {
        return Err(format!("its {ip} {vtep} is not the address of a host"));
    }
    if kind != BackendKind::Vxlan {
        return Ok(Peer { mac: None, vtep });
    }
    let vxlan = attrs.vxlan(family);
    let mac = vxlan.ok_or(format!("it has no {data} with a VtepMAC"))?.mac;
    if mac.octets() == [0; 6] || mac.is_multicast() {
        return Err(format!("its VtepMAC {mac} is not the address of a device"));
    }
    Ok(Peer {
        mac: Some(mac),
        vtep,
    })
}

/// The peers that can be programmed; of two whose subnets overlap the narrower one is left out, as is any that overlaps ours.
pub(super) fn usable(
    desired: &Desired,
    peers: &BTreeMap<IpNet, Peer>,
    problems: &mut Vec<String>,
) -> BTreeMap<IpNet, Peer> {
    let mut kept: BTreeMap<IpNet, Peer> = BTreeMap::new();
    for (subnet, peer) in peers {
        if let Some(own) = desired.own.iter().find(|own| overlap(own, subnet)) {
            problems.push(format!(
                "peer {} claims {subnet}, which overlaps this node's {own}: delete the wrong lease",
                peer.vtep
            ));
            continue;
        }
        // Sorted by address, then length: only the last one kept can overlap the next.
        if let Some((other, _)) = kept
            .last_key_value()
            .filter(|(other, _)| overlap(other, subnet))
        {
            problems.push(format!(
                "peer {} claims {subnet}, which overlaps {other}: delete the wrong lease",
                peer.vtep
            ));
            continue;
        }
        kept.insert(*subnet, *peer);
    }
    kept
}

/// Whether two subnets have an address in common.
pub(crate) fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(&b.network()) || b.contains(&a.network())
}

#[cfg(test)]
mod tests;
