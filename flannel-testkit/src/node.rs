//! Nodes with an uplink, and pods as the CNI bridge plugin leaves them.

use crate::eventually::try_eventually;
use crate::lab::{LabOptions, Offloads, WIRE, plug_in};
use crate::netns::Netns;
use crate::nics::{self, Nics};
use crate::subnet::Subnet;
use crate::traffic;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// The features that a NIC without offloads lacks.
const NO_OFFLOADS: [&str; 9] = [
    "rx",
    "tx",
    "sg",
    "tso",
    "gso",
    "gro",
    "tx-udp_tnl-segmentation",
    "tx-udp_tnl-csum-segmentation",
    "tx-udp-segmentation",
];

/// A namespace with an uplink `eth0` on the underlay, forwarding on, and a default route to the switch.
#[derive(Debug)]
pub struct Node {
    /// `n0`, `n1`, …
    pub name: String,
    pub ns: Netns,
    /// Address on `eth0`, in a /24: 192.168.77.(11 + index).
    pub ip: Ipv4Addr,
    /// Address on `eth1` if the lab has second uplinks: 192.168.78.(11 + index).
    pub second_ip: Option<Ipv4Addr>,
    /// The /24 of the pod network that the lab sets aside for the node.
    pub subnet: Subnet,
    /// The other end of `eth0`, in the underlay: capture there to see the wire, inject there to make the node receive. Where uplinks
    /// are network cards all nodes have one wire.
    pub port: String,
    /// Directory of the node's files (subnet.env, logs); goes with the lab.
    pub run_dir: PathBuf,
    underlay: Netns,
    on_nic: bool,
    pods: AtomicU32,
}

/// A namespace behind `cni0` of a node. Goes with the lab, or by [`Pod::remove`].
#[derive(Clone, Debug)]
pub struct Pod {
    /// `n0p1`, …
    pub name: String,
    pub ns: Netns,
    pub ip: Ipv4Addr,
    pub mac: [u8; 6],
    /// Address of `cni0`, the pod's default gateway.
    pub gateway: Ipv4Addr,
    /// The node's end of the pod's `eth0`, a port of `cni0`.
    pub host_if: String,
    node_ns: Netns,
}

impl Node {
    pub(crate) fn set_up(
        (index, ns): (u8, Netns),
        run_dir: PathBuf,
        (underlay, nics): (&Netns, Option<&Nics>),
        options: &LabOptions,
    ) -> anyhow::Result<Node> {
        let host = 11 + index;
        let port = match nics {
            Some(_) => WIRE.to_owned(),
            None => format!("n{index}"),
        };
        let second_ip = options
            .second_uplink
            .then(|| Ipv4Addr::new(192, 168, 78, host));
        let node = Node {
            name: format!("n{index}"),
            ip: Ipv4Addr::new(192, 168, 77, host),
            second_ip,
            subnet: Subnet::new(options.network.host((u32::from(index) + 1) << 8), 24),
            port,
            run_dir,
            underlay: underlay.clone(),
            on_nic: nics.is_some(),
            pods: AtomicU32::new(0),
            ns,
        };
        match nics {
            Some(nics) => node.add_nic(nics, 1 + usize::from(index), options)?,
            None => node.add_uplink("br0", &node.port, "eth0", node.ip, options.offloads)?,
        }
        let gateway = crate::Lab::GATEWAY;
        node.ns.ip(&format!("route add default via {gateway}"))?;
        if let Some(ip) = second_ip {
            let port = format!("n{index}b");
            node.add_uplink("br1", &port, "eth1", ip, options.offloads)?;
        }
        node.ns.set_sysctl("net/ipv4/ip_forward", "1")?;
        Ok(node)
    }

    fn add_uplink(
        &self,
        bridge: &str,
        port: &str,
        ifname: &str,
        ip: Ipv4Addr,
        offloads: Offloads,
    ) -> anyhow::Result<()> {
        plug_in(&self.underlay, bridge, port, &self.ns, ifname)?;
        self.ns
            .ip(&format!("addr add {ip}/24 brd + dev {ifname}"))?;
        if offloads == Offloads::Off {
            set_features(&self.underlay, port, &NO_OFFLOADS, false)?;
            set_features(&self.ns, ifname, &NO_OFFLOADS, false)?;
        }
        Ok(())
    }

    fn add_nic(&self, nics: &Nics, number: usize, options: &LabOptions) -> anyhow::Result<()> {
        nics.take(number, &self.ns, "eth0", options.mtu)?;
        self.ns
            .ip(&format!("addr add {}/24 brd + dev eth0", self.ip))?;
        if options.offloads == Offloads::Off {
            nics::switch_off(&self.underlay, &self.port, &NO_OFFLOADS)?;
            nics::switch_off(&self.ns, "eth0", &NO_OFFLOADS)?;
        }
        Ok(())
    }

    /// Adds a pod with address `subnet.host(host_no)` and the given MTU, and returns when it reaches its gateway.
    ///
    /// As the bridge plugin does for flannel: `cni0` with the first host address and the pods' MTU is made for
    /// the first pod; the pod's `eth0` has the address with the subnet's length and a default route.
    pub fn add_pod(
        &self,
        subnet: impl Into<Subnet>,
        host_no: u32,
        mtu: u32,
    ) -> anyhow::Result<Pod> {
        let subnet = subnet.into();
        let number = self.pods.fetch_add(1, Ordering::Relaxed) + 1;
        self.ensure_cni0(subnet, mtu)?;
        let ns = Netns::add(&format!("{}p{number}", self.ns.name()))?;
        let mac = mac_for(&format!("{}/eth0", ns.name()));
        let [_, _, a, b, c, d] = mac_for(&format!("{}/host", ns.name()));
        let host_if = format!("veth{a:02x}{b:02x}{c:02x}{d:02x}");
        let pod = Pod {
            name: format!("{}p{number}", self.name),
            ip: subnet.host(host_no),
            mac,
            gateway: subnet.gateway(),
            host_if: host_if.clone(),
            node_ns: self.ns.clone(),
            ns,
        };
        self.ns.ip(&format!(
            "link add {host_if} address {} mtu {mtu} type veth peer name eth0 address {} mtu {mtu} netns {}",
            mac_text(mac_for(&host_if)),
            mac_text(mac),
            pod.ns.name()
        ))?;
        self.ns.ip(&format!("link set {host_if} master cni0 up"))?;
        pod.ns.ip("link set eth0 up")?;
        pod.ns.ip(&format!(
            "addr add {}/{} brd + dev eth0",
            pod.ip,
            subnet.prefix_len()
        ))?;
        pod.ns
            .ip(&format!("route add default via {}", pod.gateway))?;
        let what = format!("pod {} reaches its gateway", pod.name);
        try_eventually(Duration::from_secs(10), &what, || {
            traffic::ping_once(&pod.ns, pod.gateway, Duration::from_millis(500))
        })?;
        Ok(pod)
    }

    /// Turns features of a device of the node on or off, by the names that `ethtool -K` takes.
    pub fn set_features(&self, ifname: &str, features: &[&str], on: bool) -> anyhow::Result<()> {
        set_features(&self.ns, ifname, features, on)
    }

    /// Pulls the cable of `eth0`, or puts it back. That of a network card is out of reach.
    pub fn set_carrier(&self, on: bool) -> anyhow::Result<()> {
        anyhow::ensure!(!self.on_nic, "the cable of a network card is out of reach");
        let state = if on { "up" } else { "down" };
        self.underlay
            .ip(&format!("link set {} {state}", self.port))
            .map(drop)
    }

    fn ensure_cni0(&self, subnet: Subnet, mtu: u32) -> anyhow::Result<()> {
        if self.ns.ifindex("cni0").is_err() {
            // The plugin sets the bridge's own MAC, so that it does not follow the ports.
            let mac = mac_text(mac_for(&format!("{}/cni0", self.ns.name())));
            self.ns.ip(&format!(
                "link add cni0 address {mac} mtu {mtu} type bridge"
            ))?;
            self.ns.ip("link set cni0 up")?;
        }
        let address = format!("{}/{}", subnet.gateway(), subnet.prefix_len());
        self.ns
            .ip(&format!("addr replace {address} brd + dev cni0"))
            .map(drop)
    }
}

impl Pod {
    /// A pod that somebody else has connected: its name, address, MAC and gateway, and the node's end.
    pub(crate) fn connected(
        name: &str,
        ns: Netns,
        (ip, mac, gateway): (Ipv4Addr, [u8; 6], Ipv4Addr),
        host_if: String,
        node_ns: &Netns,
    ) -> Pod {
        Pod {
            name: name.to_owned(),
            ns,
            ip,
            mac,
            gateway,
            host_if,
            node_ns: node_ns.clone(),
        }
    }

    /// Removes the pod as the plugin does: its `eth0` first, then the namespace. `cni0` stays.
    pub fn remove(self) -> anyhow::Result<()> {
        self.ns.ip("link del eth0")?;
        self.ns.delete()
    }

    /// Sets `hairpinMode`, which kube-flannel's CNI configuration turns on (off here unless asked for).
    pub fn set_hairpin(&self, on: bool) -> anyhow::Result<()> {
        let state = if on { "on" } else { "off" };
        self.node_ns
            .exec([
                "bridge",
                "link",
                "set",
                "dev",
                &self.host_if,
                "hairpin",
                state,
            ])
            .map(drop)
    }
}

/// A locally administered unicast MAC that depends on `seed` alone.
pub fn mac_for(seed: &str) -> [u8; 6] {
    // FNV-1a, folded by a multiplication so that the last letter reaches every byte.
    let hash = seed.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let mut mac = [0; 6];
    mac.copy_from_slice(&hash.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()[..6]);
    mac[0] = (mac[0] & 0xfc) | 0x02;
    mac
}

/// The usual text of a MAC: lower-case hex, colons.
pub fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn set_features(ns: &Netns, ifname: &str, features: &[&str], on: bool) -> anyhow::Result<()> {
    let state = if on { "on" } else { "off" };
    let words = features.iter().flat_map(|feature| [*feature, state]);
    ns.exec(["ethtool", "-K", ifname].into_iter().chain(words))
        .map(drop)
}
