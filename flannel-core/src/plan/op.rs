//! One change to the kernel.

use std::{fmt, net::IpAddr};

use flannel_common::NodeId;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{Hook, Node, Settings, Tunnel};
use crate::{
    addr::{IfIndex, Mtu, VtepMac},
    pods::Pod,
};

/// One change. Applying it twice is success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    /// Create the tunnel device, down and without addresses.
    CreateDevice(Tunnel),
    /// Delete a device of ours that cannot be changed into what it should be.
    DeleteDevice {
        /// Interface index.
        index: IfIndex,
        /// Interface name.
        name: String,
        /// What cannot be changed.
        why: String,
    },
    /// The same change to the device that stands in while the tunnel device changes its kind.
    StandIn(Box<Op>),
    /// Set the device's MTU.
    SetMtu {
        /// Interface index.
        index: IfIndex,
        /// Bytes.
        mtu: Mtu,
    },
    /// Give the device the MAC address that peers know.
    SetMac {
        /// Interface index.
        index: IfIndex,
        /// The published address.
        mac: VtepMac,
    },
    /// Set the device up (for a veth: both ends).
    SetUp {
        /// Interface index.
        index: IfIndex,
    },
    /// Give the device an address.
    PutAddress {
        /// Interface index.
        index: IfIndex,
        /// Address with prefix length.
        address: IpNet,
    },
    /// Take an older lease's address off the device.
    DelAddress {
        /// Interface index.
        index: IfIndex,
        /// Address with prefix length.
        address: IpNet,
    },
    /// Create or replace a forwarding entry.
    PutFdb {
        /// Inner destination.
        mac: VtepMac,
        /// Outer destination.
        vtep: IpAddr,
    },
    /// Create or replace a permanent neighbour.
    PutNeighbour {
        /// Base address of the peer's subnet.
        address: IpAddr,
        /// The peer's VTEP MAC.
        mac: VtepMac,
    },
    /// Create or replace a route.
    PutRoute {
        /// The peer's subnet.
        subnet: IpNet,
        /// Its base address.
        gateway: IpAddr,
        /// MTU metric.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mtu: Option<u32>,
    },
    /// Delete a route.
    DelRoute {
        /// The subnet no peer has.
        subnet: IpNet,
    },
    /// Create or replace a route without a tunnel.
    PutLinkRoute {
        /// The peer's subnet.
        subnet: IpNet,
        /// The peer.
        gateway: IpAddr,
        /// The uplink.
        ifindex: IfIndex,
        /// Somebody's route that it takes the place of: gateway and interface.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        replaces: Option<(IpAddr, IfIndex)>,
    },
    /// Delete a route without a tunnel that bears our mark.
    DelLinkRoute {
        /// The subnet to which no packets go that way.
        subnet: IpNet,
        /// Its gateway.
        gateway: IpAddr,
        /// Its interface.
        ifindex: IfIndex,
    },
    /// Delete a permanent neighbour.
    DelNeighbour {
        /// Its address.
        address: IpAddr,
    },
    /// Delete a forwarding entry.
    DelFdb {
        /// Inner destination.
        mac: VtepMac,
        /// Outer destination.
        vtep: IpAddr,
    },
    /// Write an entry of `nodes`.
    PutNode {
        /// Index.
        id: NodeId,
        /// Content.
        node: Node,
    },
    /// Point a subnet at a node.
    PutSubnet {
        /// Index of the subnet.
        index: u32,
        /// Index of the node.
        id: NodeId,
    },
    /// Write `config`.
    PutSettings(Settings),
    /// Attach a program, or replace the one that is there.
    Attach {
        /// Which.
        hook: Hook,
        /// Where.
        ifindex: IfIndex,
    },
    /// Detach a program of ours, wherever its interface may be by now.
    Detach {
        /// Which.
        hook: Hook,
        /// Where.
        ifindex: IfIndex,
    },
    /// Attach the program of native XDP, or replace the one that is there.
    AttachXdp {
        /// Where.
        ifindex: IfIndex,
    },
    /// Detach our program of native XDP, wherever its interface may be by now.
    DetachXdp {
        /// Where.
        ifindex: IfIndex,
    },
    /// Write an entry of `pods`.
    PutPod {
        /// The pod's address.
        address: IpAddr,
        /// Content.
        pod: Pod,
    },
    /// Remove an entry of `pods`.
    DelPod {
        /// The address that no pod has, or another one.
        address: IpAddr,
    },
    /// Point a subnet at no node.
    ClearSubnet {
        /// Index of the subnet.
        index: u32,
    },
    /// Empty an entry of `nodes` that no subnet points at.
    ClearNode {
        /// Index.
        id: NodeId,
    },
}

impl Op {
    /// Whether it concerns pods of this node alone: nothing else depends on it.
    pub const fn is_about_pods(&self) -> bool {
        match self {
            Self::PutPod { .. } | Self::DelPod { .. } => true,
            Self::Attach { hook, .. } | Self::Detach { hook, .. } => hook.is_per_pod(),
            _ => false,
        }
    }

    /// A short name for counting.
    pub fn verb(&self) -> &'static str {
        match self {
            Self::CreateDevice(_) => "create_device",
            Self::StandIn(op) => op.verb(),
            Self::DeleteDevice { .. } => "delete_device",
            Self::SetMtu { .. } => "set_mtu",
            Self::SetMac { .. } => "set_mac",
            Self::SetUp { .. } => "set_up",
            Self::PutAddress { .. } => "put_address",
            Self::DelAddress { .. } => "del_address",
            Self::PutFdb { .. } => "put_fdb",
            Self::PutNeighbour { .. } => "put_neighbour",
            Self::PutRoute { .. } => "put_route",
            Self::DelRoute { .. } => "del_route",
            Self::PutLinkRoute { .. } => "put_link_route",
            Self::DelLinkRoute { .. } => "del_link_route",
            Self::DelNeighbour { .. } => "del_neighbour",
            Self::DelFdb { .. } => "del_fdb",
            Self::PutNode { .. } => "put_node",
            Self::PutSubnet { .. } => "put_subnet",
            Self::PutSettings(_) => "put_settings",
            Self::Attach { .. } => "attach",
            Self::Detach { .. } => "detach",
            Self::AttachXdp { .. } => "attach_xdp",
            Self::DetachXdp { .. } => "detach_xdp",
            Self::PutPod { .. } => "put_pod",
            Self::DelPod { .. } => "del_pod",
            Self::ClearSubnet { .. } => "clear_subnet",
            Self::ClearNode { .. } => "clear_node",
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CreateDevice(tunnel) => write!(f, "create device {}", tunnel.name),
            Self::DeleteDevice { name, why, .. } => write!(f, "delete device {name}: {why}"),
            Self::StandIn(op) => match op.as_ref() {
                Self::CreateDevice(_) | Self::DeleteDevice { .. } | Self::Attach { .. } => {
                    op.fmt(f)
                }
                op => write!(f, "{op}, on the device that stands in"),
            },
            Self::SetMtu { mtu, .. } => write!(f, "set MTU of the tunnel device to {}", mtu.get()),
            Self::SetMac { mac, .. } => write!(f, "set MAC of the tunnel device to {mac}"),
            Self::SetUp { .. } => write!(f, "set the tunnel device up"),
            Self::PutAddress { address, .. } => {
                write!(f, "add address {address} to the tunnel device")
            }
            Self::DelAddress { address, .. } => {
                write!(f, "remove address {address} from the tunnel device")
            }
            Self::PutFdb { mac, vtep } => write!(f, "set forwarding entry {mac} dst {vtep}"),
            Self::PutNeighbour { address, mac } => {
                write!(f, "set neighbour {address} lladdr {mac}")
            }
            Self::PutRoute {
                subnet,
                gateway,
                mtu: None,
            } => write!(f, "set route {subnet} via {gateway}"),
            Self::PutRoute {
                subnet,
                gateway,
                mtu: Some(mtu),
            } => {
                write!(f, "set route {subnet} via {gateway} mtu {mtu}")
            }
            Self::DelRoute { subnet } => write!(f, "delete route {subnet}"),
            Self::PutLinkRoute {
                subnet,
                gateway,
                ifindex,
                replaces,
            } => {
                let ifindex = ifindex.get();
                write!(f, "set route {subnet} via {gateway} dev {ifindex}")?;
                match replaces {
                    Some((gateway, ifindex)) => {
                        let ifindex = ifindex.get();
                        write!(f, ", in place of one via {gateway} dev {ifindex}")
                    }
                    None => Ok(()),
                }
            }
            Self::DelLinkRoute {
                subnet,
                gateway,
                ifindex,
            } => {
                let ifindex = ifindex.get();
                write!(f, "delete route {subnet} via {gateway} dev {ifindex}")
            }
            Self::DelNeighbour { address } => write!(f, "delete neighbour {address}"),
            Self::DelFdb { mac, vtep } => write!(f, "delete forwarding entry {mac} dst {vtep}"),
            Self::PutNode { id, node } => write!(f, "write node {id}: {node}"),
            Self::PutSubnet { index, id } => write!(f, "point subnet {index} at node {id}"),
            Self::PutSettings(_) => write!(f, "write the eBPF configuration"),
            Self::Attach { hook, ifindex } => {
                write!(f, "attach {hook} to interface {}", ifindex.get())
            }
            Self::Detach { hook, ifindex } => {
                write!(f, "detach {hook} from interface {}", ifindex.get())
            }
            Self::AttachXdp { ifindex } => {
                write!(f, "attach native XDP to interface {}", ifindex.get())
            }
            Self::DetachXdp { ifindex } => {
                write!(f, "detach native XDP from interface {}", ifindex.get())
            }
            Self::PutPod { address, pod } => write!(f, "write pod {address}: {pod}"),
            Self::DelPod { address } => write!(f, "delete pod {address}"),
            Self::ClearSubnet { index } => write!(f, "point subnet {index} at no node"),
            Self::ClearNode { id } => write!(f, "clear node {id}"),
        }
    }
}
