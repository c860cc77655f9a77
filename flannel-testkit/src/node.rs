//! Nodes with an uplink, and pods as the CNI bridge plugin leaves them.

use crate::eventually::try_eventually;
use crate::family::{Families, Family, Prefix};
use crate::lab::{self, LabOptions, Offloads, WIRE, plug_in};
use crate::netns::Netns;
use crate::nics::{self, Nics};
use crate::subnet::Subnet;
use crate::traffic;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
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
    /// Address on `eth0`, in a /24: 192.168.77.(11 + index), or 192.168.79 for a far node. The lab gives it to nodes that have IPv4.
    pub ip: Ipv4Addr,
    /// Address on `eth0`, in a /64: fd77::11 and so on, or fd79:: for a far node. The lab gives it to nodes that have IPv6.
    pub ipv6: Ipv6Addr,
    /// Address on `eth1` if the lab has second uplinks: 192.168.78.(11 + index).
    pub second_ip: Option<Ipv4Addr>,
    /// The /24 of the pod network that the lab sets aside for the node.
    pub subnet: Subnet,
    /// The /64 of the pod network of IPv6.
    pub subnet_v6: Prefix,
    /// The other end of `eth0`, in the underlay: capture there to see the wire, inject there to make the node receive. Where uplinks
    /// are network cards all nodes have one wire.
    pub port: String,
    /// Directory of the node's files (subnet.env, logs); goes with the lab.
    pub run_dir: PathBuf,
    underlay: Netns,
    on_nic: bool,
    families: Families,
    /// The link of the underlay that `eth0` is on.
    link: u8,
    pods: AtomicU32,
}

/// A namespace behind `cni0` of a node. Goes with the lab, or by [`Pod::remove`].
#[derive(Clone, Debug)]
pub struct Pod {
    /// `n0p1`, …
    pub name: String,
    pub ns: Netns,
    /// 0.0.0.0 where it has none.
    pub ip: Ipv4Addr,
    pub mac: [u8; 6],
    /// Address of `cni0`, the pod's default gateway. 0.0.0.0 where it has none.
    pub gateway: Ipv4Addr,
    /// Address and gateway of IPv6.
    pub v6: Option<(Ipv6Addr, Ipv6Addr)>,
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
        let far = index >= options.nodes - options.far_nodes;
        let link = if far { 2 } else { 0 };
        let port = match nics {
            Some(_) => WIRE.to_owned(),
            None => format!("n{index}"),
        };
        let second_ip = options
            .second_uplink
            .then(|| Ipv4Addr::new(192, 168, 78, host));
        let node = Node {
            name: format!("n{index}"),
            ip: Ipv4Addr::new(192, 168, 77 + link, host),
            ipv6: match lab::underlay_address(Family::V6, link, host) {
                IpAddr::V6(address) => address,
                IpAddr::V4(_) => Ipv6Addr::UNSPECIFIED,
            },
            second_ip,
            subnet: Subnet::new(options.network.host((u32::from(index) + 1) << 8), 24),
            subnet_v6: options.network_v6.subnet(64, u32::from(index) + 1),
            port,
            run_dir,
            underlay: underlay.clone(),
            on_nic: nics.is_some(),
            families: options.families,
            link,
            pods: AtomicU32::new(0),
            ns,
        };
        let families = options.families;
        node.ns.set_sysctl("net/ipv4/ip_forward", "1")?;
        if families.has(Family::V6) {
            // Before it has a default route: a change of it would take that away.
            node.ns.prepare_ipv6(true)?;
        }
        match nics {
            Some(nics) => node.add_nic(nics, 1 + usize::from(index), options)?,
            None => node.add_uplink((link, host), &node.port, "eth0", options.offloads)?,
        }
        for family in families.list() {
            lab::add_default_route(&node.ns, node.gateway(family))?;
        }
        if second_ip.is_some() {
            let port = format!("n{index}b");
            node.add_uplink((1, host), &port, "eth1", options.offloads)?;
        }
        Ok(node)
    }

    /// The families that the node has addresses of.
    pub fn families(&self) -> Families {
        self.families
    }

    /// The node's address on `eth0`.
    pub fn address(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.ip.into(),
            Family::V6 => self.ipv6.into(),
        }
    }

    /// The subnet that the lab sets aside for the node's pods.
    pub fn subnet_of(&self, family: Family) -> Prefix {
        match family {
            Family::V4 => self.subnet.into(),
            Family::V6 => self.subnet_v6,
        }
    }

    /// The switch's address on the node's link, where its default route leads.
    pub fn gateway(&self, family: Family) -> IpAddr {
        lab::underlay_address(family, self.link, 1)
    }

    /// Whether the switch routes between this node and another, instead of being their link.
    pub fn is_far_from(&self, other: &Node) -> bool {
        self.link != other.link
    }

    fn add_uplink(
        &self,
        (link, host): (u8, u8),
        port: &str,
        ifname: &str,
        offloads: Offloads,
    ) -> anyhow::Result<()> {
        plug_in(&self.underlay, &format!("br{link}"), port, &self.ns, ifname)?;
        for family in self.families.list() {
            let address = lab::underlay_address(family, link, host);
            lab::add_address(&self.ns, ifname, address, family)?;
        }
        if offloads == Offloads::Off {
            set_features(&self.underlay, port, &NO_OFFLOADS, false)?;
            set_features(&self.ns, ifname, &NO_OFFLOADS, false)?;
        }
        Ok(())
    }

    fn add_nic(&self, nics: &Nics, number: usize, options: &LabOptions) -> anyhow::Result<()> {
        nics.take(number, &self.ns, "eth0", options.mtu)?;
        for family in self.families.list() {
            lab::add_address(&self.ns, "eth0", self.address(family), family)?;
        }
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
        subnet: impl Into<Prefix>,
        host_no: u32,
        mtu: u32,
    ) -> anyhow::Result<Pod> {
        self.add_pod_in(&[subnet.into()], host_no, mtu)
    }

    /// Like [`Node::add_pod`] with an address of each of these subnets, at most one of a family.
    pub fn add_pod_in(&self, subnets: &[Prefix], host_no: u32, mtu: u32) -> anyhow::Result<Pod> {
        let number = self.pods.fetch_add(1, Ordering::Relaxed) + 1;
        for subnet in subnets {
            self.ensure_cni0(*subnet, mtu)?;
        }
        let ns = Netns::add(&format!("{}p{number}", self.ns.name()))?;
        if self.ns.is_prepared() {
            ns.prepare_ipv6(false)?;
        }
        let mac = mac_for(&format!("{}/eth0", ns.name()));
        let [_, _, a, b, c, d] = mac_for(&format!("{}/host", ns.name()));
        let host_if = format!("veth{a:02x}{b:02x}{c:02x}{d:02x}");
        let addresses = subnets
            .iter()
            .map(|subnet| (subnet.host(host_no), subnet.gateway()));
        let pod = Pod::connected(
            &format!("{}p{number}", self.name),
            ns,
            &addresses.collect::<Vec<_>>(),
            mac,
            host_if.clone(),
            &self.ns,
        );
        self.ns.ip(&format!(
            "link add {host_if} address {} mtu {mtu} type veth peer name eth0 address {} mtu {mtu} netns {}",
            mac_text(mac_for(&host_if)),
            mac_text(mac),
            pod.ns.name()
        ))?;
        self.ns.ip(&format!("link set {host_if} master cni0 up"))?;
        pod.ns.ip("link set eth0 up")?;
        for subnet in subnets {
            let (address, len) = (subnet.host(host_no), subnet.prefix_len());
            let rest = with_address(subnet.family());
            pod.ns
                .ip(&format!("addr add {address}/{len} {rest} dev eth0"))?;
            lab::wait_for_address(&pod.ns, address)?;
            lab::add_default_route(&pod.ns, subnet.gateway())?;
        }
        for subnet in subnets {
            let what = format!("pod {} reaches its gateway", pod.name);
            try_eventually(Duration::from_secs(10), &what, || {
                traffic::ping_once(&pod.ns, subnet.gateway(), Duration::from_millis(500))
            })?;
        }
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

    fn ensure_cni0(&self, subnet: Prefix, mtu: u32) -> anyhow::Result<()> {
        if self.ns.ifindex("cni0").is_err() {
            // The plugin sets the bridge's own MAC, so that it does not follow the ports.
            let mac = mac_text(mac_for(&format!("{}/cni0", self.ns.name())));
            self.ns.ip(&format!(
                "link add cni0 address {mac} mtu {mtu} type bridge"
            ))?;
            self.ns.ip("link set cni0 up")?;
        }
        let address = format!("{}/{}", subnet.gateway(), subnet.prefix_len());
        let rest = with_address(subnet.family());
        self.ns
            .ip(&format!("addr replace {address} {rest} dev cni0"))
            .map(drop)
    }
}

/// What `ip addr add` is told besides.
fn with_address(family: Family) -> &'static str {
    match family {
        Family::V4 => "brd +",
        Family::V6 => "nodad",
    }
}

impl Pod {
    /// A pod that is connected: its name, addresses with the gateway of each, MAC, and the node's end.
    pub(crate) fn connected(
        name: &str,
        ns: Netns,
        addresses: &[(IpAddr, IpAddr)],
        mac: [u8; 6],
        host_if: String,
        node_ns: &Netns,
    ) -> Pod {
        let mut pod = Pod {
            name: name.to_owned(),
            ns,
            ip: Ipv4Addr::UNSPECIFIED,
            gateway: Ipv4Addr::UNSPECIFIED,
            v6: None,
            mac,
            host_if,
            node_ns: node_ns.clone(),
        };
        for pair in addresses {
            match *pair {
                (IpAddr::V4(ip), IpAddr::V4(gateway)) => (pod.ip, pod.gateway) = (ip, gateway),
                (IpAddr::V6(ip), IpAddr::V6(gateway)) => pod.v6 = Some((ip, gateway)),
                (ip, gateway) => panic!("{ip} with the gateway {gateway}"),
            }
        }
        pod
    }

    /// Its address in a family, which it must have.
    #[track_caller]
    pub fn address(&self, family: Family) -> IpAddr {
        self.addresses(family).0
    }

    /// Its gateway in a family, which it must have.
    #[track_caller]
    pub fn gateway_of(&self, family: Family) -> IpAddr {
        self.addresses(family).1
    }

    /// The families of its addresses.
    pub fn families(&self) -> Vec<Family> {
        let v4 = (!self.ip.is_unspecified()).then_some(Family::V4);
        v4.into_iter().chain(self.v6.map(|_| Family::V6)).collect()
    }

    #[track_caller]
    fn addresses(&self, family: Family) -> (IpAddr, IpAddr) {
        match (family, self.v6) {
            (Family::V4, _) if !self.ip.is_unspecified() => (self.ip.into(), self.gateway.into()),
            (Family::V6, Some((ip, gateway))) => (ip.into(), gateway.into()),
            _ => panic!("pod {} has no {family} address", self.name),
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
