//! Clusters of nodes in upstream's state, agents of ours that come and go on them, and traffic that must not notice.

#![allow(
    dead_code,
    unused_imports,
    reason = "every test binary uses a part of it"
)]

mod watch;

use std::{collections::BTreeMap, fs, net::Ipv4Addr, path::PathBuf, time::Duration};

use flannel_core::mark::Overlay;
use flannel_testkit::{
    AgentProcess, Etcd, EtcdVersion, Families, Family, Lab, LabOptions, Netns, Pod, Prefix, Subnet,
    Upstream, eventually, json,
    upstream::{LeaseStore, UpstreamConf},
};

use crate::rig::{
    PATIENCE, agent_binary,
    dump::Dump,
    hooks::{Hooks, hooks_of},
    list, per_cpu,
};

pub(crate) use watch::{Monitor, Traffic};

/// Host number of etcd on the underlay.
const ETCD_HOST: u8 = 200;
/// What a node must look like whoever runs on it. Programs, qdiscs and filters are what we add.
const KERNEL: [&str; 9] = [
    "ip -j -d link show",
    "ip -j -d addr show",
    "ip -j -d route show table all",
    "ip -j -6 route show table all",
    "ip -j rule show",
    "ip -j -6 rule show",
    "ip -j neigh show nud permanent",
    "bridge -j -d fdb show",
    "ip_forward",
];

/// The device that makes room for outer headers goes with the programs.
const HEADROOM: &str = "flannel-hr.";

/// Where the leases are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StoreKind {
    Etcd,
    /// etcd 3.5.
    Etcd35,
    Dir,
}

/// The network of the tests, 10.5.0.0/16 as in what upstream printed.
pub(crate) fn conf() -> UpstreamConf {
    UpstreamConf::new(Subnet::new(Ipv4Addr::new(10, 5, 0, 0), 16))
}

/// The same with fd05::/48, as there, besides or alone.
pub(crate) fn conf_of(families: impl Into<Families>) -> UpstreamConf {
    let families = families.into();
    UpstreamConf { families, ..conf() }
}

/// What peers and tools know a node by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// Index and MAC address of each family's device.
    pub(crate) devices: Vec<(u32, String)>,
    /// The stored leases byte for byte.
    pub(crate) leases: BTreeMap<String, String>,
    /// `subnet.env`; with IPv6 without the MTU, which upstream has otherwise.
    pub(crate) env: String,
}

/// Nodes that upstream runs on, with a pod each.
pub(crate) struct Cluster {
    agents: BTreeMap<usize, AgentProcess>,
    pub(crate) nodes: Vec<Upstream>,
    pub(crate) pods: Vec<Pod>,
    etcd: Option<Etcd>,
    lease_dir: PathBuf,
    pub(crate) lab: Lab,
}

impl Cluster {
    /// Starts upstream on every node and waits until every pod reaches every other.
    pub(crate) fn start(kind: StoreKind, nodes: u8, conf: UpstreamConf) -> Cluster {
        let confs = vec![conf; usize::from(nodes)];
        let mut cluster = Cluster::new(kind, &confs, 1500);
        for node in 0..cluster.nodes.len() {
            cluster.start_upstream(node);
            cluster.add_pod(node);
        }
        cluster.sync_upstream();
        cluster.wait_all_pairs();
        cluster
    }

    /// Nodes with nothing on them yet, and a store with the configuration of the first.
    pub(crate) fn new(kind: StoreKind, confs: &[UpstreamConf], mtu: u32) -> Cluster {
        let lab = Lab::new(LabOptions {
            nodes: u8::try_from(confs.len()).expect("few nodes"),
            families: confs[0].families,
            network: confs[0].network,
            network_v6: confs[0].network_v6,
            mtu,
            ..LabOptions::default()
        })
        .expect("a lab");
        let version = match kind {
            StoreKind::Etcd => Some(EtcdVersion::System),
            StoreKind::Etcd35 => Some(EtcdVersion::V3_5),
            StoreKind::Dir => None,
        };
        let etcd = version.map(|version| {
            let host = lab.host("etcd", ETCD_HOST).expect("a host for etcd");
            let ip = Ipv4Addr::new(192, 168, 77, ETCD_HOST);
            Etcd::start_version(Some(&host), ip, version).expect("etcd")
        });
        let lease_dir = lab.node(0).run_dir.join("leases");
        fs::create_dir_all(lease_dir.join("subnets")).expect("make the lease directory");
        let nodes = confs.iter().enumerate();
        let cluster = Cluster {
            agents: BTreeMap::new(),
            nodes: nodes
                .map(|(index, conf)| Upstream::new(lab.node(index), *conf))
                .collect(),
            pods: Vec::new(),
            etcd,
            lease_dir,
            lab,
        };
        let net_conf = confs[0].net_conf();
        cluster
            .store()
            .put_net_conf(&net_conf)
            .expect("write the network configuration");
        cluster
    }

    pub(crate) fn store(&self) -> LeaseStore<'_> {
        match &self.etcd {
            Some(etcd) => LeaseStore::Etcd(etcd),
            None => LeaseStore::Dir(&self.lease_dir),
        }
    }

    #[track_caller]
    pub(crate) fn etcd(&self) -> &Etcd {
        self.etcd.as_ref().expect("a cluster with etcd")
    }

    pub(crate) fn ns(&self, node: usize) -> &Netns {
        &self.nodes[node].ns
    }

    pub(crate) fn device(&self, family: Family) -> String {
        self.nodes[0].conf.device(family)
    }

    /// The families of the cluster, IPv4 first.
    pub(crate) fn families(&self) -> Vec<Family> {
        self.nodes[0].conf.families.list()
    }

    /// Starts upstream on a node: the first time, or again. Returns why it replaced the device, if it did.
    pub(crate) fn start_upstream(&mut self, node: usize) -> Option<String> {
        let mut upstream = self.nodes[node].clone();
        let started = upstream.start(&self.store()).expect("upstream starts");
        self.nodes[node] = upstream;
        started.recreated
    }

    /// Lets upstream see all leases on the nodes where no agent of ours runs.
    pub(crate) fn sync_upstream(&self) {
        for (index, node) in self.nodes.iter().enumerate() {
            if !self.agents.contains_key(&index) {
                node.add_peers(&self.store()).expect("follow the leases");
            }
        }
    }

    /// Adds a pod with the MTU of the node's `subnet.env`.
    pub(crate) fn add_pod(&mut self, node: usize) {
        let mtu = self
            .subnet_env(node, "FLANNEL_MTU")
            .parse()
            .expect("FLANNEL_MTU");
        let place = &self.nodes[node];
        let families = self.families().into_iter();
        let subnets: Vec<Prefix> = families.map(|family| place.subnet_of(family)).collect();
        let pod = self.lab.node(node).add_pod_in(&subnets, 2, mtu);
        let pod = pod.expect("a pod");
        assert_eq!(self.pods.len(), node, "one pod a node, in order");
        self.pods.push(pod);
    }

    /// Starts our agent with the flags that upstream had, and these.
    pub(crate) fn start_agent(&mut self, node: usize, flags: &[&str]) {
        let place = &self.nodes[node];
        let store = match &self.etcd {
            Some(etcd) => format!("--etcd-endpoints={}", etcd.endpoint()),
            None => format!("--lease-dir={}", self.lease_dir.display()),
        };
        let common = [
            store,
            format!("--iface={}", place.address(self.families()[0])),
            format!("--subnet-file={}", place.subnet_file.display()),
            format!("--ip-masq={}", place.conf.ip_masq),
        ];
        let flags: Vec<&str> = common
            .iter()
            .map(String::as_str)
            .chain(flags.iter().copied())
            .collect();
        let agent = AgentProcess::spawn(self.lab.node(node), agent_binary(), &flags, &[]);
        self.agents.insert(node, agent.expect("an agent"));
    }

    /// Starts our agent and waits until it is ready.
    #[track_caller]
    pub(crate) fn take_over(&mut self, node: usize, flags: &[&str]) {
        self.start_agent(node, flags);
        self.wait_log(node, "flannel is ready");
        // On a node that nobody ran on it has drawn them.
        for family in self.families() {
            let name = match family {
                Family::V4 => "FLANNEL_SUBNET",
                Family::V6 => "FLANNEL_IPV6_SUBNET",
            };
            let subnet = self.subnet_env(node, name).parse().expect(name);
            self.nodes[node].set_subnet(subnet);
        }
        let conf = self.nodes[node].conf;
        // Upstream takes 50 off whatever the family.
        if conf.mtu == 1500 && conf.families.has(Family::V6) {
            assert_eq!(self.subnet_env(node, "FLANNEL_MTU"), "1430");
        }
    }

    /// A value of the node's `subnet.env`.
    #[track_caller]
    fn subnet_env(&self, node: usize, name: &str) -> String {
        let text = fs::read_to_string(&self.nodes[node].subnet_file).expect("subnet.env");
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            .unwrap_or_else(|| panic!("no {name} in {text:?}"))
            .to_owned()
    }

    #[track_caller]
    pub(crate) fn wait_log(&mut self, node: usize, needle: &str) {
        if let Err(error) = self.agent(node).wait_log(needle, PATIENCE) {
            panic!("node {node}: {error:#}");
        }
    }

    #[track_caller]
    pub(crate) fn agent(&mut self, node: usize) -> &mut AgentProcess {
        self.agents.get_mut(&node).expect("an agent on the node")
    }

    /// Stops our agent with SIGTERM.
    #[track_caller]
    pub(crate) fn stop_agent(&mut self, node: usize) {
        let agent = self.agent(node);
        agent.sigterm().expect("send SIGTERM");
        let code = agent.wait(PATIENCE).expect("the agent ends");
        assert_eq!(code, 0, "{}", agent.log());
        self.agents.remove(&node);
    }

    /// Kills our agent as a crash would.
    pub(crate) fn kill_agent(&mut self, node: usize) {
        self.agent(node).sigkill();
        self.agents.remove(&node);
    }

    /// What a node has that is upstream's as well as ours.
    pub(crate) fn kernel(&self, node: usize) -> Kernel {
        let ns = self.ns(node);
        let rules = |command: &str| {
            let text = ns.exec(command.split(' ')).expect("the rules");
            let lines = text.lines().filter(|line| !line.starts_with('#'));
            lines
                .map(|line| line.split(" [").next().unwrap_or(line).to_owned())
                .collect()
        };
        let mut dump = Dump::of(ns).only(&KERNEL).without(&[HEADROOM]);
        if self.nodes[node].conf.families == Families::Dual {
            dump = dump.map(one_mtu);
        }
        Kernel {
            dump,
            // Without counters, in their order.
            iptables: [rules("iptables-save"), rules("ip6tables-save")],
            nftables: rules("nft --stateless list ruleset"),
        }
    }

    pub(crate) fn identity(&self, node: usize) -> Identity {
        let upstream = &self.nodes[node];
        let mut env = fs::read_to_string(&upstream.subnet_file).expect("subnet.env");
        if upstream.conf.families.has(Family::V6) {
            let lines = env.lines().filter(|line| !line.starts_with("FLANNEL_MTU="));
            env = lines.collect::<Vec<_>>().join("\n");
        }
        let devices = self.families().into_iter().map(|family| {
            let index = upstream.ns.ifindex(&self.device(family));
            let mac = upstream.device_mac(family);
            (index.expect("the device"), mac.expect("its MAC"))
        });
        Identity {
            devices: devices.collect(),
            leases: self.store().stored().expect("the leases"),
            env,
        }
    }

    /// Whether our two programs of each family run on a node, one at each hook.
    pub(crate) fn programs(&self, node: usize) -> Result<(), String> {
        let families = self.families();
        families
            .iter()
            .try_for_each(|family| hooks_of(self.ns(node), *family).of_overlays(families.len()))
    }

    /// Fails if a program runs at a hook of ours.
    #[track_caller]
    pub(crate) fn no_programs(&self, node: usize) {
        for family in self.families() {
            assert_eq!(hooks_of(self.ns(node), family), Hooks::default());
        }
    }

    /// Packets of a family that eBPF has carried both ways, through the stack or around it.
    pub(crate) fn carried(&self, node: usize, family: Family) -> [u64; 2] {
        let cookie = self.ns(node).cookie().expect("cookie");
        let vni = self.nodes[node].conf.vni.try_into().expect("a VNI");
        let overlay = match family {
            Family::V4 => Overlay::v4(vni),
            Family::V6 => Overlay::v6(vni),
        };
        let pin = format!(
            "{}/maps-v{}/counters",
            overlay.path(cookie),
            flannel_common::LAYOUT_VERSION
        );
        let dump = json::bpftool_json(self.ns(node), &["map", "dump", "pinned", &pin])
            .expect("the counters");
        let packets = |index: usize| per_cpu(&dump[index]);
        [packets(0) + packets(2), packets(1) + packets(3)]
    }

    /// Packets that the kernel's device of a family has sent and received.
    pub(crate) fn by_kernel(&self, node: usize, family: Family) -> [u64; 2] {
        let link = json::link(self.ns(node), &self.device(family)).expect("the device");
        ["tx", "rx"].map(|way| link["stats64"][way]["packets"].as_u64().expect("packets"))
    }

    /// Waits until `counter` has grown by this many in both directions, of every family.
    #[track_caller]
    pub(crate) fn wait_grown(
        &self,
        what: &str,
        by: u64,
        counter: impl Fn(&Cluster, Family) -> [u64; 2],
    ) {
        for family in self.families() {
            let before = counter(self, family);
            eventually(PATIENCE, &format!("{what}: {family}"), || {
                let now = counter(self, family);
                let grown = now[0] >= before[0] + by && now[1] >= before[1] + by;
                grown
                    .then_some(())
                    .ok_or_else(|| format!("{now:?}, it was {before:?}"))
            });
        }
    }

    /// Waits until every pod reaches every other, over every family.
    #[track_caller]
    pub(crate) fn wait_all_pairs(&self) {
        for (from, to) in self.pairs() {
            for family in self.families() {
                let (from, to) = (&self.pods[from], &self.pods[to]);
                let what = format!("{} reaches {} over {family}", from.name, to.name);
                let (ip, limit) = (to.address(family), Duration::from_millis(500));
                eventually(PATIENCE, &what, || {
                    flannel_testkit::traffic::ping_once(&from.ns, ip, limit)
                        .map_err(|error| format!("{error:#}"))
                });
            }
        }
    }

    /// All ordered pairs of nodes.
    pub(crate) fn pairs(&self) -> Vec<(usize, usize)> {
        let all = 0..self.pods.len();
        all.clone()
            .flat_map(|from| all.clone().map(move |to| (from, to)))
            .filter(|(from, to)| from != to)
            .collect()
    }
}

/// What upstream leaves in the kernel of a node.
pub(crate) struct Kernel {
    dump: Dump,
    /// Of IPv4 and of IPv6.
    iptables: [Vec<String>; 2],
    nftables: Vec<String>,
}

impl Kernel {
    /// Panics with the differences, if there are any.
    #[track_caller]
    pub(crate) fn assert_same(&self, now: &Kernel, when: &str) {
        self.dump.assert_same(&now.dump, when);
        assert_eq!(now.iptables, self.iptables, "{when}");
        assert_eq!(now.nftables, self.nftables, "{when}");
    }
}

/// With both families ours gives both devices the MTU that packets of IPv6 leave, and upstream does not: its IPv4 device has 20 more.
/// Started again, it keeps what it finds.
fn one_mtu(line: &str) -> String {
    if line.contains(r#""ifname":"flannel.1""#) {
        return line.replace(r#""mtu":1450"#, r#""mtu":1430"#);
    }
    line.to_owned()
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for (node, agent) in &self.agents {
                eprintln!("--- the agent of node {node} said:\n{}", agent.log());
            }
        }
    }
}

/// The permanent entries of a node that name an address or MAC: routes, neighbours, forwarding entries.
pub(crate) fn traces(ns: &Netns, words: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for command in [
        "ip -j route show",
        "ip -j -6 route show",
        "ip -j neigh show nud permanent",
        "bridge -j fdb show",
    ] {
        let text = ns.exec(command.split(' ')).expect("what the node has");
        let entries: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        let named = list(&entries)
            .iter()
            .map(ToString::to_string)
            .filter(|entry| {
                words
                    .iter()
                    .any(|word| entry.contains(&format!("\"{word}\"")))
            });
        found.extend(named);
    }
    found
}
