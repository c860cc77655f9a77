//! The eBPF half: maps and attached programs.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use flannel_common::NodeId;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{BpfState, Desired, Gate, Hook, Observed, Op, Overlay, Peer, Plan, pods, xdp};
use crate::addr::{IfIndex, VtepMac};

/// What the programs need to know about this node, apart from the tunnel device (whose index, MTU and MAC are observed).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a flag of the map, and any combination is possible"
)]
pub struct Settings {
    /// The cluster network.
    pub network: IpNet,
    /// Prefix length of a node's subnet.
    pub subnet_len: u8,
    /// Network identifier.
    pub vni: u32,
    /// UDP destination port.
    pub port: u16,
    /// Our address on the underlay.
    pub local: IpAddr,
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
    /// Some peers are routed to without a tunnel. Filled in by the planner.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub routed: bool,
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

    /// The subnet of that index; `None` if the network does not reach so far.
    pub fn subnet(&self, index: u32) -> Option<IpNet> {
        if index >= self.subnet_count() {
            return None;
        }
        let of = |bits: u8| bits.checked_sub(self.subnet_len).map(u32::from);
        let base: IpAddr = match self.network.network() {
            IpAddr::V4(base) => {
                let offset = index.checked_shl(of(32)?).unwrap_or(0);
                Ipv4Addr::from(u32::from(base) | offset).into()
            }
            IpAddr::V6(base) => {
                let offset = u128::from(index).checked_shl(of(128)?).unwrap_or(0);
                Ipv6Addr::from(u128::from(base) | offset).into()
            }
        };
        IpNet::new(base, self.subnet_len).ok()
    }
}

/// One entry of the map `nodes`, in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// The peer's VTEP address.
    pub remote: IpAddr,
    /// Our VTEP address.
    pub local: IpAddr,
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
    /// Packets go to the peer without outer headers: it is the next hop.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub routed: bool,
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} lladdr {} dev {} mtu {}{}",
            self.remote,
            self.peer_mac,
            self.ifindex.get(),
            self.path_mtu,
            if self.routed { ", routed," } else { "" }
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
    pub overlay: Option<Overlay<'a>>,
    pub peers: Option<&'a BTreeMap<IpNet, Peer>>,
    /// The subnets of peers that are routed to.
    pub on_link: &'a BTreeSet<IpNet>,
    /// The settings as they will be when the first of this pass's ops are done.
    pub settings: Option<&'a Settings>,
}

pub(super) fn plan(input: &Input<'_>, plan: &mut Plan, deletes: &mut Vec<Op>) {
    // Known before anything is created, the MAC to expect is the one that peers know.
    let own_mac = input.overlay.map(|overlay| overlay.mac());
    if let Some(peers) = input.peers {
        plan_nodes(input, peers, own_mac, plan, deletes);
    }
    // The pair that stands in has nobody to leave packets to, as long as any come its way.
    let stand_in = input.observed.stand_in.as_ref();
    let stands_in = stand_in.is_some_and(|device| !device.routes.is_empty());
    // Until the peers are known, as it is.
    let routed = match input.peers {
        Some(_) => !input.on_link.is_empty(),
        None => input
            .have
            .settings
            .as_ref()
            .is_some_and(|there| there.routed),
    };
    let settings = Settings {
        alone: input.want.alone || stands_in,
        decap_gso: input.want.decap_gso || stands_in,
        routed,
        tunnel: input
            .overlay
            .map(|overlay| (overlay.device.index, overlay.device.mtu, overlay.mac())),
        own_index: own_index(input.desired, input.want),
        ..input.want.clone()
    };
    if input.settings != Some(&settings) {
        plan.ops.push(Op::PutSettings(settings));
    }
    let hooks = hooks(input, routed);
    let mut takes_stripped = false;
    for (hook, ifindex) in &hooks {
        let (hook, ifindex) = (*hook, *ifindex);
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
    if takes_stripped && input.overlay.is_some() {
        xdp::admit(input.want, input.have, plan);
    }
    for (hook, there) in &input.have.attached {
        if !hooks.contains_key(hook) {
            deletes.push(Op::Detach {
                hook: *hook,
                ifindex: there.ifindex,
            });
        }
    }
    pods::admit(input.desired, &input.want.gate, input.have, plan);
}

/// Which programs there are, but for those on pod veths, and where.
fn hooks(input: &Input<'_>, routed: bool) -> BTreeMap<Hook, IfIndex> {
    let mut hooks = BTreeMap::new();
    let gated = !input.want.gate.is_off();
    if let Some(overlay) = input.overlay {
        hooks.insert(Hook::ToOverlay, overlay.device.index);
        if gated {
            hooks.insert(Hook::FromOverlay, overlay.device.index);
        }
    }
    if gated || input.overlay.is_some() {
        hooks.insert(Hook::FromWire, input.want.uplink);
    }
    // What passes it learns nothing from those that are not routed to, and every hook costs something.
    if gated && routed {
        hooks.insert(Hook::ToLink, input.want.uplink);
    }
    hooks
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
    own_mac: Option<VtepMac>,
    plan: &mut Plan,
    deletes: &mut Vec<Op>,
) {
    let have = input.have;
    let mut wanted: BTreeMap<u32, Node> = BTreeMap::new();
    for (subnet, peer) in peers {
        let routed = input.on_link.contains(subnet);
        if let Some(overlay) = input.overlay
            && input.observed.loops(peer.vtep)
        {
            plan.problems.push(format!(
                "peer {} with {subnet} is reached through {} itself: its PublicIP must not be inside the overlay",
                peer.vtep, overlay.tunnel.name
            ));
        }
        match (indexes(input.want, subnet), node(input, peer, own_mac, routed)) {
            (Some(range), Some(node)) => wanted.extend(range.map(|index| (index, node))),
            _ if input.want.alone && !routed => plan.problems.push(format!(
                "peer {} has subnet {subnet}, which eBPF cannot carry (network {}, subnet length {}): install the vxlan module",
                peer.vtep, input.want.network, input.want.subnet_len
            )),
            // The kernel's device or route carries it.
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
    if !want.network.contains(subnet) || subnet.prefix_len() > want.subnet_len {
        return None;
    }
    let (base, width) = number(want.network.network());
    let (first, _) = number(subnet.network());
    let shift = width.checked_sub(u32::from(want.subnet_len))?;
    let offset = first.checked_sub(base)?;
    let first = u32::try_from(offset.checked_shr(shift).unwrap_or(0)).ok()?;
    let count = 1u32.checked_shl(u32::from(want.subnet_len.checked_sub(subnet.prefix_len())?))?;
    Some(first..first.checked_add(count)?)
}

/// An address as a number, and how many bits it has.
fn number(address: IpAddr) -> (u128, u32) {
    match address {
        IpAddr::V4(address) => (u32::from(address).into(), 32),
        IpAddr::V6(address) => (address.into(), 128),
    }
}

/// The entry for a peer; `None` if eBPF has no way to it.
fn node(input: &Input<'_>, peer: &Peer, own_mac: Option<VtepMac>, routed: bool) -> Option<Node> {
    /// What nobody looks at where there is no tunnel.
    const NO_MAC: VtepMac = VtepMac::new([0; 6]);
    if peer.vtep.is_ipv4() != input.want.local.is_ipv4() {
        return None;
    }
    if !routed && (own_mac.is_none() || peer.mac.is_none()) {
        return None;
    }
    let way = input.observed.way(peer.vtep);
    Some(Node {
        remote: peer.vtep,
        local: input.want.local,
        peer_mac: peer.mac.unwrap_or(NO_MAC),
        own_mac: own_mac.unwrap_or(NO_MAC),
        vni: input.want.vni,
        port: input.want.port,
        ifindex: way.map_or(input.want.uplink, |way| way.ifindex),
        hop: way.and_then(|way| way.mac.map(|mac| (way.uplink_mac, mac))),
        path_mtu: way.map_or(0, |way| way.mtu),
        routed,
    })
}
