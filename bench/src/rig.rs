//! One mode, standing: two nodes joined by one cable, a pod on each, and what carries the packets between.

use std::{
    net::IpAddr,
    path::{Path as FilePath, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use aya::programs::{SchedClassifier, TcAttachType};
use flannel_testkit::{
    AgentProcess, Etcd, Family, KernelNode, Lab, LabOptions, Netns, Node, Pod, Prefix, mac_for,
    mac_text, traffic, try_eventually,
};

use crate::{
    check_stop,
    cluster::{self, Backend, Cluster, Strangers},
    guard,
    mode::{MANY_SERVICES, Mode, Path, Rules, V6_SUFFIX},
    netfilter,
    no_overlay::{self, Programs},
};

const UPLINK_MTU: u32 = 1500;
const FLANNEL_PREFIX: &str = "/coreos.com/network";
const READY: Duration = Duration::from_secs(30);
/// Where the servers listen for TCP.
pub const TCP_PORT: u16 = 7000;

/// What a network card that cuts no packets lacks.
const SEGMENTATION: [&str; 5] = [
    "tso",
    "gso",
    "tx-udp_tnl-segmentation",
    "tx-udp_tnl-csum-segmentation",
    "tx-udp-segmentation",
];

/// How packets cross the cable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// As veth has it: up to 64 KiB in one piece, never cut.
    SuperPackets,
    /// Cut to the MTU by the sender and merged by the receiver, as by a network card without tunnel offloads.
    MtuFrames,
}

/// One end of the traffic.
#[derive(Clone, Debug)]
pub struct End {
    /// The pod.
    pub ns: Netns,
    /// Its address.
    pub ip: IpAddr,
}

/// What is needed to build a rig.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The agent to compare with, for modes that say so.
    pub base_agent: Option<PathBuf>,
    /// The program of mode `flanneld`.
    pub flanneld: Option<PathBuf>,
    /// Family of everything.
    pub family: Family,
    /// What the agents' network configuration says.
    pub backend: Backend,
    /// Services that kube-proxy's rules are made for.
    pub service_rules: u32,
    /// Network of the agents' pods.
    pub network: String,
    /// Leases of nodes that do not exist.
    pub strangers: Strangers,
}

impl Plan {
    /// Everything in a family.
    pub fn of(family: Family) -> Self {
        let [v4, v6] = cluster::NETWORKS;
        Self {
            family,
            network: match family {
                Family::V4 => v4.into(),
                Family::V6 => v6.into(),
            },
            ..Self::default()
        }
    }
}

impl Plan {
    /// The plan of a mode: one that is named so is over IPv6.
    #[must_use]
    pub fn for_mode(&self, mode: &Mode) -> Self {
        if !mode.name.ends_with(V6_SUFFIX) {
            return self.clone();
        }
        Self {
            family: Family::V6,
            network: cluster::NETWORKS[1].into(),
            ..self.clone()
        }
    }
}

/// MTU of the pods in every mode, so that all carry the same packets.
const fn pod_mtu(family: Family) -> u32 {
    match family {
        Family::V4 => 1450,
        Family::V6 => 1430,
    }
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            base_agent: None,
            flanneld: None,
            family: Family::V4,
            backend: Backend::Vxlan,
            service_rules: 20,
            network: cluster::NETWORKS[0].into(),
            strangers: Strangers::default(),
        }
    }
}

/// A mode, ready for traffic.
#[derive(Debug)]
pub struct Rig {
    /// The mode.
    pub mode: Mode,
    /// Its family.
    pub family: Family,
    /// Who asks.
    pub client: End,
    /// Who answers.
    pub server: End,
    /// Both ends of the cable.
    cable: [(Netns, &'static str); 2],
    // Before the namespaces that they live in: fields are dropped in order.
    _held: Held,
    body: Body,
}

/// What must live as long as the rig, and is never looked at.
#[derive(Debug, Default)]
struct Held {
    _programs: Option<[Programs; 2]>,
    _daemons: Option<([AgentProcess; 2], Etcd)>,
}

/// The namespaces, and the agents in them.
#[derive(Debug)]
enum Body {
    Lab(Lab),
    Agents(Box<Cluster>),
}

impl Rig {
    /// Builds a mode, and returns when the pods reach each other.
    pub fn build(mode: Mode, plan: &Plan) -> anyhow::Result<Self> {
        check_stop()?;
        let rig = match mode.path {
            Path::Direct => direct(mode, plan.family),
            Path::NoOverlay => without_overlay(mode, plan.family),
            Path::HostGw => host_gw(mode, plan.family),
            Path::KernelVxlan => kernel_vxlan(mode, plan.family),
            Path::Agent {
                datapath,
                fast_path,
                base,
            } => agents(mode, plan, datapath, fast_path, base),
            Path::Flanneld => flanneld(mode, plan),
        };
        let rig = rig.with_context(|| format!("build {}", mode.name))?;
        if mode.path != Path::Direct {
            rig.set_rules(plan)
                .with_context(|| format!("rules of {}", mode.name))?;
        }
        let what = format!("the pods of {} reach each other", mode.name);
        try_eventually(READY, &what, || {
            traffic::ping_once(&rig.client.ns, rig.server.ip, Duration::from_millis(500))
        })?;
        Ok(rig)
    }

    /// Sets how packets cross the cable from now on.
    pub fn set_wire(&self, wire: Wire) -> anyhow::Result<()> {
        let (cut, merge) = match wire {
            Wire::SuperPackets => ("on", "off"),
            Wire::MtuFrames => ("off", "on"),
        };
        for (ns, device) in &self.cable {
            let mut argv = vec!["ethtool", "-K", device];
            for feature in SEGMENTATION {
                argv.extend([feature, cut]);
            }
            argv.extend(["gro", merge]);
            ns.exec(argv)?;
        }
        Ok(())
    }

    /// Empties the nodes' connection tracking. All namespaces share one hash table: what one mode leaves would slow the next one down.
    pub fn forget_connections(&self) -> anyhow::Result<()> {
        if self.mode.has_services() {
            for node in self.nodes() {
                node.ns.exec(["conntrack", "-F"])?;
            }
        }
        Ok(())
    }

    /// The two nodes; none where the pods are joined directly.
    pub fn nodes(&self) -> &[Node] {
        self.lab().nodes()
    }

    fn lab(&self) -> &Lab {
        match &self.body {
            Body::Lab(lab) => lab,
            Body::Agents(cluster) => &cluster.lab,
        }
    }

    fn set_rules(&self, plan: &Plan) -> anyhow::Result<()> {
        let services = match self.mode.rules {
            Rules::None => 0,
            Rules::Usual => plan.service_rules,
            Rules::Many => MANY_SERVICES,
        };
        for (node, end) in self.lab().nodes().iter().zip([&self.client, &self.server]) {
            if services == 0 {
                netfilter::clear(&node.ns)?;
                continue;
            }
            let len = match self.family {
                Family::V4 => 24,
                Family::V6 => 64,
            };
            let subnet = Prefix::new(end.ip, len).to_string();
            let place = netfilter::Place {
                network: &plan.network,
                subnet: &subnet,
                backend: (self.server.ip, TCP_PORT).into(),
            };
            netfilter::apply(&node.ns, &node.run_dir, place, services)?;
        }
        Ok(())
    }
}

fn end(pod: &Pod, family: Family) -> End {
    End {
        ns: pod.ns.clone(),
        ip: pod.address(family),
    }
}

fn of_nodes((mode, family): (Mode, Family), pods: [&Pod; 2], held: Held, body: Body) -> Rig {
    let lab = match &body {
        Body::Lab(lab) => lab,
        Body::Agents(cluster) => &cluster.lab,
    };
    let cable = [lab.node(0).ns.clone(), lab.node(1).ns.clone()];
    Rig {
        mode,
        family,
        client: end(pods[0], family),
        server: end(pods[1], family),
        cable: cable.map(|ns| (ns, "eth0")),
        _held: held,
        body,
    }
}

fn direct(mode: Mode, family: Family) -> anyhow::Result<Rig> {
    let lab = Lab::new(LabOptions {
        nodes: 0,
        families: family.into(),
        ..LabOptions::default()
    })?;
    let (a, b) = (lab.extra("a")?, lab.extra("b")?);
    cable(&a, &b, pod_mtu(family))?;
    let subnet: Prefix = match family {
        Family::V4 => "10.244.1.0/24".parse()?,
        Family::V6 => "fd00:10:244:1::/64".parse()?,
    };
    let ips = [subnet.host(2), subnet.host(3)];
    for (ns, ip) in [&a, &b].into_iter().zip(ips) {
        ns.ip(&format!("addr add {ip}/{} dev eth0", subnet.prefix_len()))?;
    }
    Ok(Rig {
        mode,
        family,
        client: End {
            ns: a.clone(),
            ip: ips[0],
        },
        server: End {
            ns: b.clone(),
            ip: ips[1],
        },
        cable: [(a, "eth0"), (b, "eth0")],
        _held: Held::default(),
        body: Body::Lab(lab),
    })
}

/// Joins `eth0` of two namespaces.
fn cable(a: &Netns, b: &Netns, mtu: u32) -> anyhow::Result<()> {
    let mac = |ns: &Netns| mac_text(mac_for(&format!("{}/eth0", ns.name())));
    a.ip(&format!(
        "link add eth0 address {} mtu {mtu} type veth peer name eth0 address {} mtu {mtu} netns {}",
        mac(a),
        mac(b),
        b.name()
    ))?;
    a.ip("link set eth0 up")?;
    b.ip("link set eth0 up").map(drop)
}

/// Two nodes with one cable between them instead of the lab's switch.
fn two_nodes(family: Family) -> anyhow::Result<Lab> {
    let lab = Lab::new(LabOptions {
        families: family.into(),
        ..LabOptions::default()
    })?;
    let (a, b) = (lab.node(0), lab.node(1));
    for node in [a, b] {
        node.ns.ip("link del eth0")?;
    }
    cable(&a.ns, &b.ns, UPLINK_MTU)?;
    for (node, other) in [(a, b), (b, a)] {
        let (address, other) = (node.address(family), other.address(family));
        let (len, rest) = match family {
            Family::V4 => (24, "brd +"),
            Family::V6 => (64, "nodad"),
        };
        node.ns
            .ip(&format!("addr add {address}/{len} {rest} dev eth0"))?;
        let flag = family.flag();
        node.ns
            .ip(&format!("{flag} route add default via {other}"))?;
    }
    Ok(lab)
}

fn two_pods(lab: &Lab, family: Family) -> anyhow::Result<[Pod; 2]> {
    let pod = |node: usize| {
        let node = lab.node(node);
        node.add_pod(node.subnet_of(family), 2, pod_mtu(family))
    };
    Ok([pod(0)?, pod(1)?])
}

fn host_gw(mode: Mode, family: Family) -> anyhow::Result<Rig> {
    let lab = two_nodes(family)?;
    let pods = two_pods(&lab, family)?;
    for (from, to) in [(0, 1), (1, 0)] {
        let (from, to) = (lab.node(from), lab.node(to));
        from.ns.ip(&format!(
            "{} route add {} via {} dev eth0",
            family.flag(),
            to.subnet_of(family),
            to.address(family)
        ))?;
    }
    Ok(of_nodes(
        (mode, family),
        [&pods[0], &pods[1]],
        Held::default(),
        Body::Lab(lab),
    ))
}

fn kernel_vxlan(mode: Mode, family: Family) -> anyhow::Result<Rig> {
    let lab = two_nodes(family)?;
    let pods = two_pods(&lab, family)?;
    let (a, b) = (
        KernelNode::set_up_family(lab.node(0), family)?,
        KernelNode::set_up_family(lab.node(1), family)?,
    );
    a.connect(&b)?;
    Ok(of_nodes(
        (mode, family),
        [&pods[0], &pods[1]],
        Held::default(),
        Body::Lab(lab),
    ))
}

fn without_overlay(mode: Mode, family: Family) -> anyhow::Result<Rig> {
    let lab = two_nodes(family)?;
    let pods = two_pods(&lab, family)?;
    let attach = |own: usize, other: usize| {
        Programs::attach(&no_overlay::Node {
            ns: &lab.node(own).ns,
            host_if: &pods[own].host_if,
            pod_ip: pods[own].address(family),
            pod_mac: pods[own].mac,
            remote_ip: pods[other].address(family),
            remote_mac: no_overlay::mac_of(&lab.node(other).ns, "eth0")?,
        })
    };
    let programs = [attach(0, 1)?, attach(1, 0)?];
    let held = Held {
        _programs: Some(programs),
        ..Held::default()
    };
    Ok(of_nodes(
        (mode, family),
        [&pods[0], &pods[1]],
        held,
        Body::Lab(lab),
    ))
}

fn agents(
    mode: Mode,
    plan: &Plan,
    datapath: &str,
    fast_path: Option<&str>,
    base: bool,
) -> anyhow::Result<Rig> {
    let (family, backend) = (plan.family, plan.backend);
    let binary = if base {
        let given = plan.base_agent.clone();
        Some(given.context("this mode needs --guard BASE_AGENT")?)
    } else {
        None
    };
    // Only a base may be so old that it does not know the flag.
    let fast_path = match &binary {
        Some(base) if !guard::has_fast_path(base)? => None,
        _ => fast_path,
    };
    let options = cluster::Options {
        binary,
        flags: fast_path
            .map(|choice| format!("--bpf-fast-path={choice}"))
            .into_iter()
            .collect(),
        net_conf: cluster::net_conf(family.into(), [plan.network.as_str(); 2], backend, false),
        families: family.into(),
        backend,
        pod_mtu: Some(pod_mtu(family)),
        strangers: plan.strangers.clone(),
        datapath: datapath.into(),
        ..cluster::Options::default()
    };
    let cluster = Cluster::start_in(two_nodes(family)?, &options, &|_| {})?;
    let [a, b] = cluster.pods.as_slice() else {
        bail!("{} pods instead of two", cluster.pods.len());
    };
    let (a, b) = (a.pod.clone(), b.pod.clone());
    if fast_path.is_some_and(|choice| choice != "off") {
        let nodes = cluster.lab.nodes();
        for (index, (node, pod)) in nodes.iter().zip([&a, &b]).enumerate() {
            let what = format!("the agent attaches its programs to {}", pod.host_if);
            try_eventually(READY, &what, || has_programs(&node.ns, &pod.host_if))
                .with_context(|| format!("its last words: {}", cluster.last_words(index)))?;
        }
    }
    Ok(of_nodes(
        (mode, family),
        [&a, &b],
        Held::default(),
        Body::Agents(Box::new(cluster)),
    ))
}

/// Fails until some eBPF program is attached to `device`, as tcx link or as filter.
fn has_programs(ns: &Netns, device: &str) -> anyhow::Result<()> {
    let links = ns.try_run(|| SchedClassifier::query_tcx(device, TcAttachType::Ingress))?;
    if links.is_ok_and(|(_, programs)| !programs.is_empty()) {
        return Ok(());
    }
    let filters = ns.exec(["tc", "filter", "show", "dev", device, "ingress"])?;
    ensure!(filters.contains("bpf"), "none is");
    Ok(())
}

fn flanneld(mode: Mode, plan: &Plan) -> anyhow::Result<Rig> {
    let program = plan.flanneld.as_deref().context("no --flanneld")?;
    let family = plan.family;
    let lab = two_nodes(family)?;
    let etcd = Etcd::start(Some(&lab.node(0).ns), lab.node(0).ip)?;
    etcd.put(
        &format!("{FLANNEL_PREFIX}/config"),
        &cluster::net_conf(family.into(), cluster::NETWORKS, Backend::Vxlan, false),
    )?;
    let start = |node: usize| start_flanneld(&lab, node, program, &etcd.endpoint());
    let (mut first, mut second) = (start(0)?, start(1)?);
    first.wait_ready(READY)?;
    second.wait_ready(READY)?;
    let pod = |node: usize| -> anyhow::Result<Pod> {
        let node = lab.node(node);
        let env = cluster::read_env(&node.run_dir.join("subnet.env"))?;
        node.add_pod_in(&env.subnets, 2, env.mtu)
    };
    let pods = [pod(0)?, pod(1)?];
    let what = "flanneld connects the pods";
    try_eventually(READY, what, || {
        traffic::ping_once(&pods[0].ns, pods[1].ip, Duration::from_millis(500))
    })?;
    // Its timers would run while others are measured; what it has programmed stays.
    etcd.pause()?;
    let held = Held {
        _daemons: Some(([first, second], etcd)),
        ..Held::default()
    };
    Ok(of_nodes(
        (mode, family),
        [&pods[0], &pods[1]],
        held,
        Body::Lab(lab),
    ))
}

fn start_flanneld(
    lab: &Lab,
    node: usize,
    program: &FilePath,
    endpoint: &str,
) -> anyhow::Result<AgentProcess> {
    let node = lab.node(node);
    let subnet_file = node.run_dir.join("subnet.env").display().to_string();
    let argv = [
        "--etcd-endpoints",
        endpoint,
        "--etcd-prefix",
        FLANNEL_PREFIX,
        "--iface",
        "eth0",
        "--subnet-file",
        &subnet_file,
    ];
    AgentProcess::spawn(node, program, &argv, &[])
}
