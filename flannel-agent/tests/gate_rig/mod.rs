//! Three nodes with Services as kube-proxy makes them, for the flow gate.
//!
//! | node | pods | |
//! |---|---|---|
//! | 0 | `A`, `A2` | the client and its neighbour |
//! | 1 | `B`, `B2` | the remote backend and its neighbour |
//! | 2 | `C` | a third node with a backend of its own |
//!
//! All pods have hairpin mode on; a host outside the cluster is on the underlay. Everything is of one family, IPv4 unless said otherwise.

#![allow(dead_code, reason = "every test binary uses a part of it")]

pub(crate) mod cases;
mod cast;
pub(crate) mod flows;

use std::{
    collections::BTreeMap,
    mem::offset_of,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use flannel_common::{Config, counter::CounterId, map::ConfigV6};
use flannel_testkit::{
    Family, LabOptions, Netns, Node, Pod, Prefix, eventually,
    services::{Flavour, HostPort, Policy, Service, Services, Transport},
    traffic::{TcpPair, TcpServer, UdpEnd},
};

pub(crate) use cast::{Mode, Vip, Who};

use crate::rig::{PATIENCE, Rig, list, net_conf, per_cpu};

/// Number of nodes.
const NODES: u8 = 3;
/// Number of the host outside.
const OUTSIDE: u8 = 200;
/// The port at which backends listen.
pub(crate) const BACKEND: u16 = 8080;
/// The port at which backends listen for datagrams.
pub(crate) const DNS: u16 = 5353;
/// The port of node 1 that is mapped to [`MAPPED`] of pod `B`.
pub(crate) const HOST_PORT: u16 = 8088;
/// See [`HOST_PORT`].
pub(crate) const MAPPED: u16 = 8090;
/// A port of every node, any backend answers.
pub(crate) const NODE_PORT: u16 = 30_080;
/// A port of every node, only a backend of the node answers.
pub(crate) const LOCAL_NODE_PORT: u16 = 30_081;

/// Packets by what became of them, see [`CounterId`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fast {
    /// To other nodes, in the tunnel or without.
    pub(crate) encap: u64,
    /// From other nodes, likewise.
    pub(crate) decap: u64,
    pub(crate) local: u64,
    pub(crate) tagged: u64,
    pub(crate) confirmed: u64,
    pub(crate) refuted: u64,
    pub(crate) admitted: u64,
}

impl Fast {
    /// Packets that bypassed the stack.
    pub(crate) fn all(&self) -> u64 {
        self.encap + self.decap + self.local
    }
}

/// What a lab differs in from the usual one.
#[derive(Clone, Copy, Default)]
pub(crate) struct Extra<'a> {
    /// More flags for every agent.
    pub(crate) flags: &'a [&'a str],
    /// Instead of the MTU of the subnet file.
    pub(crate) pod_mtu: Option<u32>,
    pub(crate) lab: LabOptions,
    pub(crate) family: Family,
    /// Nodes are routed to instead of tunnelled, by this network configuration's backend (`Backend`, as JSON).
    pub(crate) routed_by: Option<&'a str>,
    /// What every node gets before its agent.
    pub(crate) prepare: Option<&'a dyn Fn(&Node)>,
}

impl Extra<'_> {
    /// Nothing but the family.
    pub(crate) fn over(family: Family) -> Self {
        Self {
            family,
            ..Self::default()
        }
    }
}

/// Three nodes, their agents, pods and Services, and a host outside.
pub(crate) struct Gate {
    services: Vec<Services>,
    pods: BTreeMap<Who, Pod>,
    flags: Vec<String>,
    pub(crate) outside: Netns,
    pub(crate) modes: [Mode; NODES as usize],
    pub(crate) flavour: Flavour,
    pub(crate) rig: Rig,
}

impl Gate {
    /// All nodes in one mode.
    pub(crate) fn start(mode: Mode, flavour: Flavour) -> Gate {
        Gate::mixed([mode; NODES as usize], flavour)
    }

    /// Each node in a mode of its own.
    pub(crate) fn mixed(modes: [Mode; NODES as usize], flavour: Flavour) -> Gate {
        Gate::with(modes, flavour, Extra::default())
    }

    pub(crate) fn with(modes: [Mode; NODES as usize], flavour: Flavour, extra: Extra<'_>) -> Gate {
        let family = extra.family;
        let options = LabOptions {
            nodes: NODES,
            families: family.into(),
            ..extra.lab
        };
        let vxlan = r#"{"Type":"vxlan"}"#;
        let backend = extra.routed_by.unwrap_or(vxlan);
        let mut rig = Rig::with(options, &net_conf(family.into()).replace(vxlan, backend));
        let outside = rig.lab().host("outside", OUTSIDE).expect("a host outside");
        let all: Vec<Who> = Who::ALL.to_vec();
        let address = |who: Who, port: u16| -> SocketAddr {
            let subnet = rig.node(who.node()).subnet_of(family);
            let number = if matches!(who, Who::A2 | Who::B2) {
                3
            } else {
                2
            };
            SocketAddr::new(subnet.host(number), port)
        };
        let services = services(family, address);
        let network = match family {
            Family::V4 => options.network.into(),
            Family::V6 => options.network_v6,
        };
        let host_port = HostPort {
            transport: Transport::Tcp,
            port: HOST_PORT,
            backend: address(Who::B, MAPPED),
        };
        let installed = rig
            .lab()
            .nodes()
            .iter()
            .enumerate()
            .map(|(number, node)| {
                let host_ports = if number == 1 {
                    std::slice::from_ref(&host_port)
                } else {
                    &[]
                };
                Services::install(node, flavour, network, &services, host_ports)
                    .expect("the rules of kube-proxy")
            })
            .collect();
        if let Some(prepare) = extra.prepare {
            rig.lab().nodes().iter().for_each(prepare);
        }
        let flags: Vec<String> = extra.flags.iter().map(ToString::to_string).collect();
        for (node, mode) in modes.iter().enumerate() {
            start_agent(&mut rig, node, *mode, &flags);
        }
        for node in 0..modes.len() {
            rig.wait_ready(node);
        }
        let mut pods = BTreeMap::new();
        for who in all {
            let pod = match extra.pod_mtu {
                None => rig.add_pod(who.node()),
                Some(mtu) => rig.add_pod_with_mtu(who.node(), mtu),
            };
            pod.set_hairpin(true).expect("hairpin mode");
            pods.insert(who, pod);
        }
        if extra.routed_by.is_some() {
            rig.wait_routed();
        } else {
            rig.wait_converged();
        }
        let gate = Gate {
            services: installed,
            pods,
            flags,
            outside,
            modes,
            flavour,
            rig,
        };
        for node in 0..modes.len() {
            gate.wait_gate(node);
        }
        gate
    }

    /// Starts the agent of a node in its mode.
    pub(crate) fn start_agent(&mut self, node: usize) {
        start_agent(&mut self.rig, node, self.modes[node], &self.flags);
    }

    #[track_caller]
    pub(crate) fn pod(&self, who: Who) -> &Pod {
        &self.pods[&who]
    }

    pub(crate) fn ns(&self, who: Who) -> &Netns {
        &self.pods[&who].ns
    }

    pub(crate) fn family(&self) -> Family {
        self.rig.family()
    }

    pub(crate) fn ip(&self, who: Who) -> IpAddr {
        self.pods[&who].address(self.family())
    }

    /// Address and port of a Service.
    pub(crate) fn vip(&self, vip: Vip) -> SocketAddr {
        vip.address(self.family())
    }

    /// The address of the host outside.
    pub(crate) fn outside_ip(&self) -> IpAddr {
        match self.family() {
            Family::V4 => Ipv4Addr::new(192, 168, 77, OUTSIDE).into(),
            // The digits are the same.
            Family::V6 => Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0x200).into(),
        }
    }

    /// MTU of pods on an underlay with the usual one.
    pub(crate) fn pod_mtu(&self) -> u32 {
        1500 - self.family().overhead()
    }

    /// Makes another pod the one of this name.
    pub(crate) fn replace(&mut self, who: Who, pod: Pod) {
        self.pods.insert(who, pod);
    }

    /// The subnet of a node's pods.
    pub(crate) fn subnet(&self, node: usize) -> Prefix {
        self.rig.node(node).subnet_of(self.family())
    }

    /// The address of node `node`'s tunnel device.
    pub(crate) fn tunnel_ip(&self, node: usize) -> IpAddr {
        self.subnet(node).host(0)
    }

    /// The address of node `node` on the underlay.
    pub(crate) fn node_ip(&self, node: usize) -> IpAddr {
        self.rig.node(node).address(self.family())
    }

    /// Listens at [`BACKEND`].
    #[track_caller]
    pub(crate) fn serve(&self, who: Who) -> TcpServer {
        self.serve_at(who, BACKEND)
    }

    #[track_caller]
    pub(crate) fn serve_at(&self, who: Who, port: u16) -> TcpServer {
        TcpServer::listen(self.ns(who), self.ip(who), port).expect("listen")
    }

    #[track_caller]
    pub(crate) fn udp(&self, who: Who, port: u16) -> UdpEnd {
        UdpEnd::bind(self.ns(who), self.ip(who), port).expect("bind")
    }

    /// A socket that takes datagrams for any address of the pod, groups and broadcasts among them.
    #[track_caller]
    pub(crate) fn udp_anywhere(&self, who: Who, port: u16) -> UdpEnd {
        UdpEnd::bind(self.ns(who), self.family().unspecified(), port).expect("bind")
    }

    /// Connects pod to pod.
    #[track_caller]
    pub(crate) fn connect(&self, from: Who, server: &TcpServer) -> TcpPair {
        self.connect_to(from, server.address, &[server])
    }

    #[track_caller]
    pub(crate) fn connect_to(
        &self,
        from: Who,
        target: SocketAddr,
        servers: &[&TcpServer],
    ) -> TcpPair {
        TcpPair::connect(self.ns(from), target, servers)
            .unwrap_or_else(|error| panic!("{from:?} to {target}: {error:#}"))
    }

    /// The gate's counters of a node, as `bpftool` shows them.
    #[track_caller]
    pub(crate) fn fast(&self, node: usize) -> Fast {
        let dump = self.rig.map_dump(node, "counters");
        let packets = |id: CounterId| per_cpu(&dump[id as usize]);
        Fast {
            encap: packets(CounterId::FastEncap) + packets(CounterId::FastRoutedOut),
            decap: packets(CounterId::FastDecap) + packets(CounterId::FastRoutedIn),
            local: packets(CounterId::FastLocal),
            tagged: packets(CounterId::GateTagged),
            confirmed: packets(CounterId::GateConfirmed),
            refuted: packets(CounterId::GateRefuted),
            admitted: packets(CounterId::GateAdmitted),
        }
    }

    /// Packets that every node's rule against invalid ones has dropped.
    #[track_caller]
    pub(crate) fn invalid_drops(&self) -> Vec<u64> {
        let drops = self.services.iter().map(Services::invalid_drops);
        drops
            .map(|drops| drops.expect("the rule's counter"))
            .collect()
    }

    #[track_caller]
    pub(crate) fn assert_no_invalid(&self, after: &str) {
        let drops = self.invalid_drops();
        assert!(
            drops.iter().all(|drops| *drops == 0),
            "{after}: packets dropped as invalid, by node: {drops:?} ({:?}, {:?})",
            self.modes,
            self.flavour
        );
    }

    /// Waits until the maps of a node say the mode, and know its pods.
    #[track_caller]
    pub(crate) fn wait_gate(&self, node: usize) {
        if self.flags.iter().any(|flag| flag == "--datapath=kernel") {
            return;
        }
        let mode = self.modes[node];
        let what = format!("the gate of node {node} is in mode {mode:?}");
        eventually(PATIENCE, &what, || {
            self.has_mode(node, mode)?;
            if mode == Mode::Off {
                return Ok(());
            }
            let known = self.known_pods(node);
            let missing: Vec<&Pod> = self
                .pods
                .iter()
                .filter(|(who, pod)| {
                    who.node() == node && !known.contains(&pod.address(self.family()))
                })
                .map(|(_, pod)| pod)
                .collect();
            if missing.is_empty() {
                Ok(())
            } else {
                Err(format!("unknown pods: {missing:?}, known: {known:?}"))
            }
        });
    }

    /// Whether the maps of a node say this mode; else which one they say.
    pub(crate) fn has_mode(&self, node: usize, mode: Mode) -> Result<(), String> {
        match u32_at(&self.rig.config_bytes(node), self.layout().mode) {
            raw if raw == mode.raw() => Ok(()),
            raw => Err(format!("the mode is {raw}")),
        }
    }

    /// The addresses in the map `pods`.
    #[track_caller]
    pub(crate) fn known_pods(&self, node: usize) -> Vec<IpAddr> {
        let dump = self.rig.map_dump(node, "pods");
        list(&dump)
            .iter()
            .filter_map(|entry| {
                let key = flows::hex_bytes(&entry["key"]);
                match self.family() {
                    Family::V4 => Some(<[u8; 4]>::try_from(key).ok()?.into()),
                    Family::V6 => Some(<[u8; 16]>::try_from(key).ok()?.into()),
                }
            })
            .collect()
    }

    /// Forgets which pairs were seen translated: a case in [`Mode::Syn`] would use the witness gate for them.
    #[track_caller]
    pub(crate) fn clear_nattuples(&self) {
        for (node, mode) in self.modes.iter().enumerate() {
            if *mode != Mode::Off {
                self.clear_map(node, "nattuples");
            }
        }
    }

    /// Writes another mode into the maps of a node, whose agent must not run: it would put it right.
    #[track_caller]
    pub(crate) fn force_mode(&self, node: usize, raw: u32) {
        self.write_config(node, self.layout().mode, &raw.to_ne_bytes());
    }

    /// Makes every entry of `flows` of a node count for nothing. Its agent must not run.
    #[track_caller]
    pub(crate) fn bump_epoch(&self, node: usize) {
        let at = self.layout().epoch;
        let epoch = u32_at(&self.rig.config_bytes(node), at).wrapping_add(1);
        self.write_config(node, at, &epoch.to_ne_bytes());
    }

    /// Writes a part of the map `config`.
    #[track_caller]
    fn write_config(&self, node: usize, at: usize, value: &[u8]) {
        let mut config = self.rig.config_bytes(node);
        config[at..at + value.len()].copy_from_slice(value);
        self.rig.map_write(node, "config", 0, &config);
    }

    fn layout(&self) -> ConfigLayout {
        match self.family() {
            Family::V4 => ConfigLayout {
                mode: offset_of!(Config, mode),
                epoch: offset_of!(Config, epoch),
                lease: offset_of!(Config, lease),
            },
            Family::V6 => ConfigLayout {
                mode: offset_of!(ConfigV6, mode),
                epoch: offset_of!(ConfigV6, epoch),
                lease: offset_of!(ConfigV6, lease),
            },
        }
    }

    /// Deletes every entry of a hash map.
    #[track_caller]
    pub(crate) fn clear_map(&self, node: usize, map: &str) {
        let pin = self.rig.map_pin(node, map).display().to_string();
        flows::clear(self.rig.ns(node), &pin);
    }
}

/// Offsets in the map `config`.
struct ConfigLayout {
    mode: usize,
    epoch: usize,
    lease: usize,
}

/// The lease that the agent sets unless told otherwise.
pub(crate) const LEASE: Duration = Duration::from_secs(5);

fn start_agent(rig: &mut Rig, node: usize, mode: Mode, flags: &[String]) {
    let mut all = vec![mode.flag()];
    all.extend(flags.iter().map(String::as_str));
    rig.start_agent(node, &all);
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let bytes = bytes[at..at + 4].try_into().expect("four bytes");
    u32::from_ne_bytes(bytes)
}

fn services(family: Family, address: impl Fn(Who, u16) -> SocketAddr) -> Vec<Service> {
    let tcp = |name: &str, vip: Vip, backends: &[Who]| {
        let backends: Vec<SocketAddr> = backends.iter().map(|who| address(*who, BACKEND)).collect();
        Service::tcp(name, vip.address(family), &backends)
    };
    let udp = |name: &str, vip: Vip, backends: &[Who]| {
        let backends: Vec<SocketAddr> = backends.iter().map(|who| address(*who, DNS)).collect();
        Service::udp(name, vip.address(family), &backends)
    };
    vec![
        tcp("remote", Vip::Remote, &[Who::B]),
        tcp("local", Vip::Local, &[Who::A2]),
        tcp("own", Vip::Own, &[Who::A]),
        tcp("random", Vip::Random, &[Who::A2, Who::B, Who::C]),
        udp("dns", Vip::Dns, &[Who::B, Who::C]),
        udp("remote-udp", Vip::RemoteUdp, &[Who::B]),
        tcp("node-port", Vip::NodePort, &[Who::B]).with_node_port(NODE_PORT, Policy::Cluster),
        tcp("local-node-port", Vip::LocalNodePort, &[Who::B])
            .with_node_port(LOCAL_NODE_PORT, Policy::Local),
        tcp("sticky", Vip::Sticky, &[Who::A2, Who::B, Who::C]).with_affinity(),
    ]
}
