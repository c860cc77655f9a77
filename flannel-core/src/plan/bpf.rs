//! The eBPF half: maps and attached programs.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, Ipv4Addr},
};

use flannel_common::{
    Config, LAYOUT_VERSION, NodeId, NodeRecord, OuterV4, config_flags, header, node_flags,
};
use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};

use super::{BpfState, Desired, Device, Gate, GateMode, Hook, Observed, Op, Peer, Plan, pods, xdp};
use crate::addr::{IfIndex, VtepMac};

/// [`Config::own_index`] while this node has no subnet.
const NO_SUBNET: u32 = u32::MAX;
const NANOS_PER_MILLI: u64 = 1_000_000;

/// What the programs need to know about this node, apart from the tunnel device (whose index, MTU and MAC are observed).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// The cluster network.
    pub network: Ipv4Net,
    /// Prefix length of a node's subnet.
    pub subnet_len: u8,
    /// Network identifier.
    pub vni: u32,
    /// UDP destination port.
    pub port: u16,
    /// Our address on the underlay.
    pub local: Ipv4Addr,
    /// Uplink whose ingress is ours to watch.
    pub uplink: IfIndex,
    /// Lowest UDP source port.
    pub source_port_min: u16,
    /// Highest minus lowest UDP source port.
    pub source_port_span: u16,
    /// `bpf_skb_adjust_room` flags for encapsulation, as probed.
    pub encap_flags: u32,
    /// `bpf_skb_adjust_room` flags for decapsulation, as probed.
    pub decap_flags: u32,
    /// No kernel vxlan device: eBPF does all the work.
    pub alone: bool,
    /// Super-packets may be decapsulated.
    pub decap_gso: bool,
    /// Native XDP strips the outer headers of what the uplink receives.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub xdp: bool,
    /// How the flow gate stands.
    #[serde(default, skip_serializing_if = "Gate::is_unset")]
    pub gate: Gate,
    /// Slots of the map `ring` for one CPU, as a power of two.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub ring_shift: u32,
    /// Index of this node's own subnet in `subnets`. Filled in by the planner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub own_index: Option<u32>,
    /// The tunnel device as the programs know it: index, MTU in bytes, MAC. Filled in by the planner.
    #[serde(default)]
    pub tunnel: Option<(IfIndex, u32, VtepMac)>,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

impl Settings {
    /// The number of subnets in the network.
    pub fn subnet_count(&self) -> u32 {
        let bits = self.subnet_len.saturating_sub(self.network.prefix_len());
        1u32.checked_shl(u32::from(bits)).unwrap_or(u32::MAX)
    }

    /// The value of the map `config`. The uplink is not part of it; whoever reads it back knows it from the attached program.
    pub fn encode(&self) -> Config {
        let mut flags = config_flags::ENCAP | config_flags::DECAP;
        if self.alone {
            flags |= config_flags::ALONE;
        }
        if self.decap_gso {
            flags |= config_flags::DECAP_GSO;
        }
        if self.xdp {
            flags |= config_flags::XDP;
        }
        let (tunnel_ifindex, tunnel_mtu, own_mac) =
            self.tunnel.map_or((0, 0, [0; 6]), |(index, mtu, mac)| {
                (index.get(), mtu, mac.octets())
            });
        Config {
            layout: LAYOUT_VERSION,
            flags,
            network: u32::from(self.network.network()),
            subnet_shift: u32::from(32u8.saturating_sub(self.subnet_len)),
            subnet_count: self.subnet_count(),
            tunnel_ifindex,
            tunnel_mtu,
            encap_flags: self.encap_flags,
            decap_flags: self.decap_flags,
            vni: header::vni_word(self.vni),
            local: self.local.octets(),
            port: self.port.to_be_bytes(),
            own_mac,
            source_port_min: self.source_port_min,
            source_port_span: self.source_port_span,
            mode: self.gate.mode.raw(),
            epoch: self.gate.epoch,
            own_index: self.own_index.unwrap_or(NO_SUBNET),
            ring_shift: self.ring_shift,
            lease: u64::from(self.gate.lease_ms) * NANOS_PER_MILLI,
        }
    }

    /// Reads a value of the map `config` back. `None` if it was not written by [`Settings::encode`].
    pub fn decode(config: &Config, uplink: IfIndex) -> Option<Self> {
        let subnet_len = 32u32.checked_sub(config.subnet_shift)?;
        let bits = config.subnet_count.checked_ilog2()?;
        let prefix = subnet_len.checked_sub(bits)?;
        let [a, b, c, _] = config.vni;
        let settings = Self {
            network: Ipv4Net::new(Ipv4Addr::from(config.network), u8::try_from(prefix).ok()?)
                .ok()?,
            subnet_len: u8::try_from(subnet_len).ok()?,
            vni: u32::from_be_bytes([0, a, b, c]),
            port: u16::from_be_bytes(config.port),
            local: Ipv4Addr::from(config.local),
            uplink,
            source_port_min: config.source_port_min,
            source_port_span: config.source_port_span,
            encap_flags: config.encap_flags,
            decap_flags: config.decap_flags,
            alone: config.flags & config_flags::ALONE != 0,
            decap_gso: config.flags & config_flags::DECAP_GSO != 0,
            xdp: config.flags & config_flags::XDP != 0,
            gate: Gate {
                mode: GateMode::from_raw(config.mode)?,
                epoch: config.epoch,
                lease_ms: u32::try_from(config.lease / NANOS_PER_MILLI).ok()?,
            },
            ring_shift: config.ring_shift,
            own_index: Some(config.own_index).filter(|index| *index != NO_SUBNET),
            tunnel: IfIndex::try_from(config.tunnel_ifindex)
                .ok()
                .map(|index| (index, config.tunnel_mtu, VtepMac::from(config.own_mac))),
        };
        (settings.encode() == *config).then_some(settings)
    }
}

/// One entry of the map `nodes`, in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// The peer's VTEP address.
    pub remote: Ipv4Addr,
    /// Our VTEP address.
    pub local: Ipv4Addr,
    /// The peer's VTEP MAC.
    pub peer_mac: VtepMac,
    /// Our VTEP MAC.
    pub own_mac: VtepMac,
    /// Network identifier.
    pub vni: u32,
    /// UDP destination port.
    pub port: u16,
    /// Interface towards the peer.
    pub ifindex: IfIndex,
    /// MAC addresses of that interface and of the next hop, once known.
    pub hop: Option<(VtepMac, VtepMac)>,
    /// Path MTU in bytes of outer packet.
    pub path_mtu: u32,
}

impl Node {
    /// The map value.
    pub fn encode(&self) -> NodeRecord {
        let (uplink_mac, next_hop_mac) = self.hop.map_or(([0; 6], [0; 6]), |(uplink, hop)| {
            (uplink.octets(), hop.octets())
        });
        let (header, ip_sum) = OuterV4 {
            next_hop_mac,
            uplink_mac,
            local: self.local.octets(),
            remote: self.remote.octets(),
            port: self.port,
            vni: self.vni,
            peer_mac: self.peer_mac.octets(),
            own_mac: self.own_mac.octets(),
        }
        .build();
        let hop = if self.hop.is_some() {
            node_flags::NEXT_HOP
        } else {
            0
        };
        NodeRecord {
            header,
            ifindex: self.ifindex.get(),
            flags: node_flags::VALID | hop,
            path_mtu: self.path_mtu,
            ip_sum,
        }
    }

    /// Reads a map value back. `None` if it was not written by [`Node::encode`].
    pub fn decode(record: &NodeRecord) -> Option<Self> {
        let bytes =
            |at: usize| -> Option<[u8; 6]> { record.header.get(at..at + 6)?.try_into().ok() };
        let word =
            |at: usize| -> Option<[u8; 4]> { record.header.get(at..at + 4)?.try_into().ok() };
        let [a, b, c, _] = word(header::VXLAN + 4)?;
        let [port_high, port_low, ..] = word(header::UDP + 2)?;
        let known = record.flags & node_flags::NEXT_HOP != 0;
        let node = Self {
            remote: word(header::IP + 16)?.into(),
            local: word(header::IP + 12)?.into(),
            peer_mac: bytes(header::INNER_ETH)?.into(),
            own_mac: bytes(header::INNER_ETH + 6)?.into(),
            vni: u32::from_be_bytes([0, a, b, c]),
            port: u16::from_be_bytes([port_high, port_low]),
            ifindex: IfIndex::try_from(record.ifindex).ok()?,
            hop: if known {
                Some((bytes(6)?.into(), bytes(0)?.into()))
            } else {
                None
            },
            path_mtu: record.path_mtu,
        };
        (node.encode() == *record).then_some(node)
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} lladdr {} dev {} mtu {}",
            self.remote,
            self.peer_mac,
            self.ifindex.get(),
            self.path_mtu
        )?;
        match self.hop {
            Some((_, hop)) => write!(f, " via {hop}"),
            None => write!(f, " next hop unresolved"),
        }
    }
}

/// What this half plans from.
pub(super) struct Input<'a> {
    pub desired: &'a Desired,
    pub observed: &'a Observed,
    pub want: &'a Settings,
    pub have: &'a BpfState,
    pub device: &'a Device,
    pub peers: Option<&'a BTreeMap<IpNet, Peer>>,
    /// The settings as they will be when the first of this pass's ops are done.
    pub settings: Option<&'a Settings>,
}

pub(super) fn plan(input: &Input<'_>, plan: &mut Plan, deletes: &mut Vec<Op>) {
    // Known before anything is created, the MAC to expect is the one that peers know.
    let own_mac = input.desired.tunnel.mac.unwrap_or(input.device.mac);
    if let Some(peers) = input.peers {
        plan_nodes(input, peers, own_mac, plan, deletes);
    }
    // The pair that stands in has nobody to leave packets to, as long as any come its way.
    let stand_in = input.observed.stand_in.as_ref();
    let stands_in = stand_in.is_some_and(|device| !device.routes.is_empty());
    let settings = Settings {
        alone: input.want.alone || stands_in,
        decap_gso: input.want.decap_gso || stands_in,
        tunnel: Some((input.device.index, input.device.mtu, own_mac)),
        own_index: own_index(input.desired, input.want),
        ..input.want.clone()
    };
    if input.settings != Some(&settings) {
        plan.ops.push(Op::PutSettings(settings));
    }
    let from_overlay = (!input.want.gate.is_off()).then_some(Hook::FromOverlay);
    let mut takes_stripped = false;
    for hook in Hook::BASE.into_iter().chain(from_overlay) {
        let ifindex = match hook {
            Hook::FromWire => input.want.uplink,
            _ => input.device.index,
        };
        let there = input.have.attached.get(&hook);
        let there = there.filter(|attached| attached.ifindex == ifindex);
        // A predecessor's program may run on maps of its own (another layout, another size), which know the peers while
        // ours do not yet.
        let waits = there.is_some() && input.peers.is_none();
        let is_current = there.is_some_and(|attached| attached.current);
        if !waits && !is_current {
            plan.ops.push(Op::Attach { hook, ifindex });
        }
        takes_stripped |= hook == Hook::FromWire && (is_current || !waits);
    }
    if takes_stripped {
        xdp::admit(input.want, input.have, plan);
    }
    if from_overlay.is_none()
        && let Some(there) = input.have.attached.get(&Hook::FromOverlay)
    {
        deletes.push(Op::Detach {
            hook: Hook::FromOverlay,
            ifindex: there.ifindex,
        });
    }
    pods::admit(input.desired, &input.want.gate, input.have, plan);
}

/// The entry of `subnets` that stands for this node's own subnet.
fn own_index(desired: &Desired, want: &Settings) -> Option<u32> {
    let mut own = desired.own.iter().filter_map(|own| indexes(want, own));
    own.next().map(|range| range.start)
}

/// A node that changes gets a new entry, and its subnet is then pointed at that: array entries are not written atomically, an
/// index of four bytes is. A subnet for which there is no free entry keeps its old one until this pass's deletions have made room.
fn plan_nodes(
    input: &Input<'_>,
    peers: &BTreeMap<IpNet, Peer>,
    own_mac: VtepMac,
    plan: &mut Plan,
    deletes: &mut Vec<Op>,
) {
    let have = input.have;
    let mut wanted: BTreeMap<u32, Node> = BTreeMap::new();
    for (subnet, peer) in peers {
        if input.observed.loops(peer.vtep) {
            plan.problems.push(format!(
                "peer {} with {subnet} is reached through {} itself: its PublicIP must not be inside the overlay",
                peer.vtep, input.desired.tunnel.name
            ));
        }
        match (indexes(input.want, subnet), node(input, peer, own_mac)) {
            (Some(range), Some(node)) => wanted.extend(range.map(|index| (index, node))),
            _ if input.want.alone => plan.problems.push(format!(
                "peer {} has subnet {subnet}, which eBPF cannot carry (network {}, subnet length {}): install the vxlan module",
                peer.vtep, input.want.network, input.want.subnet_len
            )),
            // The kernel device carries it.
            _ => {}
        }
    }
    let is_kept = |index: &u32, node: &Node| {
        have.subnets.get(index).filter(|id| {
            have.nodes
                .get(id)
                .is_some_and(|there| there.as_ref() == Some(node))
        })
    };
    let mut used: BTreeSet<NodeId> = wanted
        .iter()
        .filter_map(|(index, node)| is_kept(index, node))
        .copied()
        .collect();
    // An empty entry that something points at is not free: its subnet would go to whoever gets it.
    let pointed: BTreeSet<NodeId> = have.subnets.values().copied().collect();
    let mut free =
        (1..have.node_capacity).filter(|id| !have.nodes.contains_key(id) && !pointed.contains(id));
    let mut waiting = Vec::new();
    for (index, node) in &wanted {
        if is_kept(index, node).is_some() {
            continue;
        }
        let Some(id) = free.next() else {
            waiting.push((*index, node.remote));
            continue;
        };
        used.insert(id);
        plan.ops.push(Op::PutNode { id, node: *node });
        plan.ops.push(Op::PutSubnet { index: *index, id });
    }
    for index in have
        .subnets
        .keys()
        .filter(|index| !wanted.contains_key(index))
    {
        deletes.push(Op::ClearSubnet { index: *index });
    }
    let old = |index: &u32| have.subnets.get(index).copied();
    let kept: BTreeSet<NodeId> = waiting.iter().filter_map(|(index, _)| old(index)).collect();
    let room_comes = deletes
        .iter()
        .any(|op| matches!(op, Op::ClearSubnet { .. }))
        || have
            .nodes
            .keys()
            .any(|id| !used.contains(id) && !kept.contains(id));
    if room_comes {
        used.extend(kept);
    } else {
        // Only the waiting subnets themselves can make room. Better no entry for a moment than an old one for good.
        for (index, remote) in &waiting {
            if old(index).is_some() {
                deletes.push(Op::ClearSubnet { index: *index });
            } else {
                plan.problems.push(format!(
                    "no free entry among {} for {remote}: restart the agent to resize the map",
                    have.node_capacity
                ));
            }
        }
    }
    for id in have.nodes.keys().filter(|id| !used.contains(id)) {
        deletes.push(Op::ClearNode { id: *id });
    }
}

/// The entries of `subnets` that a peer's subnet fills; `None` if it is smaller than one, or outside the network.
fn indexes(want: &Settings, subnet: &IpNet) -> Option<std::ops::Range<u32>> {
    let IpNet::V4(subnet) = subnet else {
        return None;
    };
    if !want.network.contains(subnet) || subnet.prefix_len() > want.subnet_len {
        return None;
    }
    let shift = 32u32.checked_sub(u32::from(want.subnet_len))?;
    let offset = u32::from(subnet.network()).checked_sub(u32::from(want.network.network()))?;
    let first = offset.checked_shr(shift).unwrap_or(0);
    let count = 1u32.checked_shl(u32::from(want.subnet_len.checked_sub(subnet.prefix_len())?))?;
    Some(first..first.checked_add(count)?)
}

fn node(input: &Input<'_>, peer: &Peer, own_mac: VtepMac) -> Option<Node> {
    let IpAddr::V4(remote) = peer.vtep else {
        return None;
    };
    let way = input.observed.way(peer.vtep);
    Some(Node {
        remote,
        local: input.want.local,
        peer_mac: peer.mac,
        own_mac,
        vni: input.want.vni,
        port: input.want.port,
        ifindex: way.map_or(input.want.uplink, |way| way.ifindex),
        hop: way.and_then(|way| way.mac.map(|mac| (way.uplink_mac, mac))),
        path_mtu: way.map_or(0, |way| way.mtu),
    })
}
