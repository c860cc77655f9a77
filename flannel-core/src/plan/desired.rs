//! What the node should look like.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, Ipv4Addr},
};

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};

use super::Settings;
use crate::{
    addr::{IfIndex, Mtu, Vni, VtepMac},
    lease::{LeaseAttrs, SubnetKey},
    pods::Pod,
};

/// Everything that this node should have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Desired {
    /// The tunnel device.
    pub tunnel: Tunnel,
    /// This node's own subnets: never programmed as a peer's.
    pub own: BTreeSet<IpNet>,
    /// Every other node, by subnet; `None` until the lease store has finished its first complete list.
    pub peers: Option<BTreeMap<IpNet, Peer>>,
    /// The eBPF half; `None` when the kernel's device does all the work.
    pub bpf: Option<Settings>,
    /// The pods of this node to which packets may be handed directly; `None` until they were read. Of no matter while the gate is off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pods: Option<BTreeMap<Ipv4Addr, Pod>>,
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
    /// Its one address, `<subnet base>/32`; `None` before there is a lease.
    pub address: Option<Ipv4Net>,
    /// The cluster network: other addresses inside it are leftovers of an older lease.
    pub network: Ipv4Net,
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
        local: Ipv4Addr,
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
    /// MAC address of its tunnel device: the inner destination.
    pub mac: VtepMac,
    /// Its address on the underlay: the outer destination.
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

/// Turns leases into peers (IPv4 only so far), leaving out `own`. A lease that cannot be used is reported, never fatal.
pub fn peers_of<'a>(
    leases: impl IntoIterator<Item = (&'a SubnetKey, &'a LeaseAttrs)>,
    own: &SubnetKey,
) -> (BTreeMap<IpNet, Peer>, Vec<PeerProblem>) {
    let mut peers = BTreeMap::new();
    let mut problems = Vec::new();
    for (key, attrs) in leases {
        let Some(subnet) = key.v4 else {
            problems.push(PeerProblem {
                key: *key,
                reason: "it has no IPv4 subnet, and IPv6 is not supported yet".into(),
            });
            continue;
        };
        if Some(subnet) == own.v4 {
            continue;
        }
        match peer_of(attrs) {
            Ok(peer) => {
                peers.insert(IpNet::V4(subnet), peer);
            }
            Err(reason) => problems.push(PeerProblem { key: *key, reason }),
        }
    }
    if let Some(own) = own.v4 {
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
    let irregular: Vec<Ipv4Net> = peers
        .keys()
        .filter_map(|subnet| match subnet {
            IpNet::V4(subnet) if subnet.prefix_len() != regular => Some(*subnet),
            _ => None,
        })
        .collect();
    for subnet in irregular {
        let of = IpNet::V4(subnet);
        let other = peers
            .keys()
            .find(|other| other.prefix_len() == regular && overlap(other, &of));
        if let Some(other) = other {
            problems.push(PeerProblem {
                key: SubnetKey::from_v4(subnet),
                reason: format!(
                    "it overlaps {other}, a node's subnet of the usual length: delete the wrong lease"
                ),
            });
            peers.remove(&of);
        }
    }
}

fn peer_of(attrs: &LeaseAttrs) -> Result<Peer, String> {
    if attrs.backend_type != "vxlan" {
        return Err(format!(
            "its backend is {:?}, this node speaks \"vxlan\"",
            attrs.backend_type
        ));
    }
    let vtep = attrs.public_ip.ok_or("it has no PublicIP")?;
    let data = attrs
        .v4
        .as_ref()
        .ok_or("it has no BackendData with a VtepMAC")?;
    if vtep.is_unspecified() || vtep.is_multicast() || vtep.is_broadcast() || vtep.is_loopback() {
        return Err(format!("its PublicIP {vtep} is not the address of a host"));
    }
    if data.mac.octets() == [0; 6] || data.mac.is_multicast() {
        return Err(format!(
            "its VtepMAC {} is not the address of a device",
            data.mac
        ));
    }
    Ok(Peer {
        mac: data.mac,
        vtep: IpAddr::V4(vtep),
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
mod tests {
    use super::*;

    #[test]
    fn a_subnet_of_another_length_costs_nobody_its_place() {
        let attrs = |host| {
            let mac = VtepMac::from_random([2, 0, 0, 0, 0, host]);
            LeaseAttrs::vxlan_v4(Ipv4Addr::new(192, 0, 2, host), 1, mac)
        };
        let key = |text: &str| -> SubnetKey { text.parse().unwrap() };
        let leases = [
            "10.5.0.0-16",
            "10.5.2.0-23",
            "10.5.2.0-24",
            "10.5.3.0-24",
            "10.5.3.128-25",
            "10.5.8.0-23",
        ];
        let leases: BTreeMap<SubnetKey, LeaseAttrs> = leases
            .iter()
            .zip(1..)
            .map(|(text, host)| (key(text), attrs(host)))
            .collect();
        let (peers, problems) = peers_of(&leases, &key("10.5.1.0-24"));
        let kept: Vec<String> = peers.keys().map(ToString::to_string).collect();
        assert_eq!(kept, ["10.5.2.0/24", "10.5.3.0/24", "10.5.8.0/23"]);
        let left_out: Vec<String> = problems
            .iter()
            .map(|problem| problem.key.to_string())
            .collect();
        assert_eq!(left_out, ["10.5.0.0-16", "10.5.2.0-23", "10.5.3.128-25"]);
    }
}
