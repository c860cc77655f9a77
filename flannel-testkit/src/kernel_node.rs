//! A node as upstream flannel leaves it: the kernel's own VXLAN device, routes, neighbours and forwarding entries.

use crate::netns::Netns;
use crate::node::{Node, mac_for, mac_text};
use crate::subnet::Subnet;
use serde_json::{Value, json};
use std::net::Ipv4Addr;

/// What may differ between clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelOptions {
    pub vni: u32,
    pub port: u16,
    /// MTU in bytes of the device: that of the uplink minus 50.
    pub mtu: u32,
}

impl Default for KernelOptions {
    fn default() -> KernelOptions {
        KernelOptions {
            vni: 1,
            port: 8472,
            mtu: 1450,
        }
    }
}

/// `flannel.<vni>` of a node, and what a peer must know of it.
#[derive(Clone, Debug)]
pub struct KernelNode {
    pub ns: Netns,
    /// Name of the device.
    pub device: String,
    pub vni: u32,
    pub subnet: Subnet,
    pub public_ip: Ipv4Addr,
    pub vtep_mac: [u8; 6],
}

impl KernelNode {
    /// Sets up `flannel.1` for the node's own [`Node::subnet`], with upstream's defaults.
    pub fn set_up(node: &Node) -> anyhow::Result<KernelNode> {
        KernelNode::set_up_with(node, node.subnet, KernelOptions::default())
    }

    /// Sets up the device for `subnet`.
    pub fn set_up_with(
        node: &Node,
        subnet: impl Into<Subnet>,
        options: KernelOptions,
    ) -> anyhow::Result<KernelNode> {
        let subnet = subnet.into();
        let KernelOptions { vni, port, mtu } = options;
        let device = format!("flannel.{vni}");
        let vtep_mac = mac_for(&format!("{}/{device}", node.ns.name()));
        node.ns.ip(&format!(
            "link add {device} address {} mtu {mtu} type vxlan id {vni} local {} dev eth0 dstport {port} nolearning",
            mac_text(vtep_mac),
            node.ip
        ))?;
        node.ns
            .ip(&format!("addr add {}/32 dev {device}", subnet.base()))?;
        node.ns.ip(&format!("link set {device} up"))?;
        Ok(KernelNode {
            ns: node.ns.clone(),
            device,
            vni,
            subnet,
            public_ip: node.ip,
            vtep_mac,
        })
    }

    /// Connects two nodes both ways.
    pub fn connect(&self, other: &KernelNode) -> anyhow::Result<()> {
        self.add_peer(other.subnet, other.vtep_mac, other.public_ip)?;
        other.add_peer(self.subnet, self.vtep_mac, self.public_ip)
    }

    /// Adds or changes a peer: neighbour, forwarding entry, route, in upstream's order.
    pub fn add_peer(
        &self,
        subnet: impl Into<Subnet>,
        vtep_mac: [u8; 6],
        public_ip: Ipv4Addr,
    ) -> anyhow::Result<()> {
        let (subnet, mac, dev) = (subnet.into(), mac_text(vtep_mac), &self.device);
        let base = subnet.base();
        self.ns.ip(&format!(
            "neigh replace {base} lladdr {mac} dev {dev} nud permanent"
        ))?;
        self.bridge(&format!(
            "fdb replace {mac} dev {dev} dst {public_ip} self permanent"
        ))?;
        self.ns
            .ip(&format!(
                "route replace {subnet} via {base} dev {dev} onlink"
            ))
            .map(drop)
    }

    /// Removes a peer.
    pub fn remove_peer(
        &self,
        subnet: impl Into<Subnet>,
        vtep_mac: [u8; 6],
        public_ip: Ipv4Addr,
    ) -> anyhow::Result<()> {
        let (subnet, mac, dev) = (subnet.into(), mac_text(vtep_mac), &self.device);
        let base = subnet.base();
        self.ns.ip(&format!("neigh del {base} dev {dev}"))?;
        self.bridge(&format!("fdb del {mac} dev {dev} dst {public_ip} self"))?;
        self.ns
            .ip(&format!("route del {subnet} via {base} dev {dev}"))
            .map(drop)
    }

    /// Removes the device and with it all peers.
    pub fn remove(&self) -> anyhow::Result<()> {
        self.ns.ip(&format!("link del {}", self.device)).map(drop)
    }

    /// The node's lease as upstream writes it to etcd: the key below `<prefix>/subnets/`, and the value.
    pub fn lease(&self) -> (String, Value) {
        let data = json!({ "VNI": self.vni, "VtepMAC": mac_text(self.vtep_mac) });
        let value = json!({
            "PublicIP": self.public_ip.to_string(),
            "PublicIPv6": null,
            "BackendType": "vxlan",
            "BackendData": data,
        });
        (self.subnet.lease_key(), value)
    }

    fn bridge(&self, line: &str) -> anyhow::Result<String> {
        self.ns
            .exec(std::iter::once("bridge").chain(line.split_whitespace()))
    }
}
