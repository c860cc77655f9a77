//! A node as upstream flannel leaves it: the kernel's own VXLAN device, routes, neighbours and forwarding entries.

use crate::family::{Family, Prefix};
use crate::netns::Netns;
use crate::node::{Node, mac_for, mac_text};
use serde_json::{Value, json};
use std::net::{IpAddr, Ipv4Addr};

/// What may differ between clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelOptions {
    pub vni: u32,
    pub port: u16,
    /// MTU in bytes of the device: that of the uplink minus 50, also over IPv6, where the kernel makes it 20 less.
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

/// `flannel.<vni>` or `flannel-v6.<vni>` of a node, and what a peer must know of it.
#[derive(Clone, Debug)]
pub struct KernelNode {
    pub ns: Netns,
    /// Name of the device.
    pub device: String,
    pub vni: u32,
    pub subnet: Prefix,
    pub public_ip: IpAddr,
    pub vtep_mac: [u8; 6],
}

impl KernelNode {
    /// Sets up `flannel.1` for the node's own [`Node::subnet`], with upstream's defaults.
    pub fn set_up(node: &Node) -> anyhow::Result<KernelNode> {
        KernelNode::set_up_family(node, Family::V4)
    }

    /// Sets up the family's device for the node's own subnet, with upstream's defaults.
    pub fn set_up_family(node: &Node, family: Family) -> anyhow::Result<KernelNode> {
        KernelNode::set_up_with(node, node.subnet_of(family), KernelOptions::default())
    }

    /// Sets up the device for `subnet`, in its family.
    pub fn set_up_with(
        node: &Node,
        subnet: impl Into<Prefix>,
        options: KernelOptions,
    ) -> anyhow::Result<KernelNode> {
        let subnet = subnet.into();
        let family = subnet.family();
        let KernelOptions { vni, port, mtu } = options;
        let device = family.device(vni);
        let public_ip = node.address(family);
        let vtep_mac = mac_for(&format!("{}/{device}", node.ns.name()));
        node.ns.ip(&format!(
            "link add {device} address {} mtu {mtu} type vxlan id {vni} local {} dev eth0 dstport {port} nolearning {}",
            mac_text(vtep_mac),
            public_ip,
            match family {
                Family::V4 => "",
                Family::V6 => "noudp6zerocsumtx noudp6zerocsumrx",
            }
        ))?;
        let base = subnet.base();
        node.ns.ip(&match family {
            Family::V4 => format!("addr add {base}/32 dev {device}"),
            Family::V6 => format!("addr add {base}/128 dev {device} nodad"),
        })?;
        node.ns.ip(&format!("link set {device} up"))?;
        Ok(KernelNode {
            ns: node.ns.clone(),
            device,
            vni,
            subnet,
            public_ip,
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
        subnet: impl Into<Prefix>,
        vtep_mac: [u8; 6],
        public_ip: impl Into<IpAddr>,
    ) -> anyhow::Result<()> {
        let (subnet, mac, dev) = (subnet.into(), mac_text(vtep_mac), &self.device);
        let public_ip = public_ip.into();
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
        subnet: impl Into<Prefix>,
        vtep_mac: [u8; 6],
        public_ip: impl Into<IpAddr>,
    ) -> anyhow::Result<()> {
        let (subnet, mac, dev) = (subnet.into(), mac_text(vtep_mac), &self.device);
        let public_ip = public_ip.into();
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
        lease(&[self])
    }

    fn bridge(&self, line: &str) -> anyhow::Result<String> {
        self.ns
            .exec(std::iter::once("bridge").chain(line.split_whitespace()))
    }
}

/// The lease of a node with these devices, at most one of a family, as upstream writes it to etcd.
pub fn lease(devices: &[&KernelNode]) -> (String, Value) {
    let of = |family: Family| {
        let mut all = devices.iter();
        all.find(|device| device.subnet.family() == family)
    };
    let data =
        |device: &KernelNode| json!({ "VNI": device.vni, "VtepMAC": mac_text(device.vtep_mac) });
    let (v4, v6) = (of(Family::V4), of(Family::V6));
    let mut key = v4.map_or("0.0.0.0-0".to_owned(), |device| device.subnet.lease_key());
    let mut value = json!({
        "PublicIP": v4.map_or(Ipv4Addr::UNSPECIFIED.into(), |device| device.public_ip),
        "PublicIPv6": v6.map(|device| device.public_ip),
        "BackendType": "vxlan",
    });
    if let Some(device) = v4 {
        value["BackendData"] = data(device);
    }
    if let Some(device) = v6 {
        key = format!("{key}&{}", device.subnet.lease_key());
        value["BackendV6Data"] = data(device);
    }
    (key, value)
}
