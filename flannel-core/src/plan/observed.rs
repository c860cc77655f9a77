//! What the node looks like: only what is ours, or what ours depends on.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use flannel_common::NodeId;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{Hook, Node, Settings};
use crate::{
    addr::{IfIndex, VtepMac},
    pods::Pod,
};

/// A dump of the kernel objects that the planner decides about.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observed {
    /// The device that has the tunnel's name.
    pub device: Option<Device>,
    /// How the underlay reaches each peer's VTEP; a VTEP without a route is absent.
    #[serde(default)]
    pub underlay: BTreeMap<IpAddr, NextHop>,
    /// Routes without a tunnel to subnets of the network: of each subnet the one that a route of ours would replace.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub links: BTreeMap<IpNet, LinkRoute>,
    /// The eBPF maps and programs; `None` when eBPF is not in use.
    #[serde(default)]
    pub bpf: Option<BpfState>,
    /// The device that stands in for the tunnel device while that changes its kind, see [`crate::mark::stand_in`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stand_in: Option<Device>,
}

impl Observed {
    /// The way to a VTEP. One that leads through the tunnel itself is none: packets would be wrapped without end, and a route's
    /// MTU would shrink with every look.
    pub(super) fn way(&self, vtep: IpAddr) -> Option<&NextHop> {
        self.underlay
            .get(&vtep)
            .filter(|way| !self.is_tunnel(way.ifindex))
    }

    /// Tells whether a VTEP is reached through the tunnel itself.
    pub(super) fn loops(&self, vtep: IpAddr) -> bool {
        self.underlay
            .get(&vtep)
            .is_some_and(|way| self.is_tunnel(way.ifindex))
    }

    fn is_tunnel(&self, index: IfIndex) -> bool {
        self.device
            .as_ref()
            .is_some_and(|device| device.index == index)
    }
}

/// The device that has the tunnel's name, with everything that hangs on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Interface index.
    pub index: IfIndex,
    /// What it is.
    pub kind: ObservedKind,
    /// MTU in bytes.
    pub mtu: u32,
    /// MAC address.
    pub mac: VtepMac,
    /// Whether it is administratively up (for a veth: both ends).
    pub up: bool,
    /// Addresses of the tunnel's family; of IPv6 those that are not link-local.
    #[serde(default)]
    pub addresses: BTreeSet<IpNet>,
    /// Routes over the device that have the shape of ours, see [`crate::mark`].
    #[serde(default)]
    pub routes: BTreeMap<IpNet, Route>,
    /// Permanent neighbours on the device.
    #[serde(default)]
    pub neighbours: BTreeMap<IpAddr, VtepMac>,
    /// Permanent forwarding entries of the device, MAC to VTEP.
    #[serde(default)]
    pub fdb: BTreeMap<VtepMac, IpAddr>,
}

/// What a device is, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ObservedKind {
    /// A vxlan device.
    Vxlan {
        /// Network identifier.
        vni: u32,
        /// UDP destination port.
        port: u16,
        /// Lower device, if bound to one.
        lower: Option<IfIndex>,
        /// Source address, if set.
        local: Option<IpAddr>,
        /// Whether it learns.
        learning: bool,
        /// Whether it carries group policy bits.
        gbp: bool,
    },
    /// One end of a veth pair.
    Veth {
        /// Name of the other end, if it is in this namespace.
        peer: Option<String>,
    },
    /// Anything else; the kernel's word for it.
    Other(String),
}

/// A route over the tunnel device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Gateway: for ours the base address of the subnet.
    pub gateway: IpAddr,
    /// MTU metric in bytes, if set.
    #[serde(default)]
    pub mtu: Option<u32>,
}

/// A route over an interface that is not ours, in the main table and with the metric of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkRoute {
    /// Gateway: for ours the peer.
    pub gateway: IpAddr,
    /// Interface.
    pub ifindex: IfIndex,
    /// Whether it bears our mark, [`crate::mark::ROUTE_PROTOCOL`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ours: bool,
}

/// How the underlay reaches one VTEP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NextHop {
    /// Interface towards it.
    pub ifindex: IfIndex,
    /// MAC address of that interface.
    pub uplink_mac: VtepMac,
    /// MAC address of the gateway, or of the VTEP itself on the same link; `None` while unresolved or when several routes share the
    /// load.
    pub mac: Option<VtepMac>,
    /// MTU of the route, in bytes of outer packet.
    pub mtu: u32,
    /// Whether the VTEP is on the link itself: the route has no gateway, and is one only.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub on_link: bool,
}

/// The eBPF maps and programs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BpfState {
    /// The decoded entry of `config`; `None` when it is empty or not ours to read.
    pub settings: Option<Settings>,
    /// Non-zero entries of `subnets`.
    #[serde(default)]
    pub subnets: BTreeMap<u32, NodeId>,
    /// Non-empty entries of `nodes`; `None` for one that does not decode.
    #[serde(default)]
    pub nodes: BTreeMap<NodeId, Option<Node>>,
    /// Entries that `nodes` has room for, entry 0 included.
    pub node_capacity: u32,
    /// Attached programs, but for those on pod veths.
    #[serde(default)]
    pub attached: BTreeMap<Hook, Attachment>,
    /// The program that encapsulates, on the device that stands in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stand_in: Option<Attachment>,
    /// Our program at the native XDP hook of an interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub xdp: Option<Attachment>,
    /// Entries of `pods`; `None` for one that does not decode.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub pods: BTreeMap<IpAddr, Option<Pod>>,
    /// What is ours on pod veths, present or gone, and whether it is attached and current, see [`Attachment::current`].
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub pod_hooks: BTreeMap<IfIndex, BTreeMap<Hook, bool>>,
}

/// A program of ours on a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The interface.
    pub ifindex: IfIndex,
    /// Whether it is the program that this agent loaded, not an older one, and everything that it needs is pinned.
    pub current: bool,
}
