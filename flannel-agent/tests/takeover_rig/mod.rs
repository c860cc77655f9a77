//! Clusters of nodes in upstream's state, agents of ours that come and go on them, and traffic that must not notice.

#![allow(dead_code, reason = "every test binary uses a part of it")]

use std::{
    collections::BTreeMap,
    fs::{self, File},
    net::Ipv4Addr,
    path::PathBuf,
    process::{Child, Stdio},
    time::Duration,
};

use flannel_testkit::{
    AgentProcess, Etcd, EtcdVersion, Lab, LabOptions, Netns, Pod, Subnet, Upstream, eventually,
    json, process,
    traffic::{FloodPing, TcpFlow, UdpFlow},
    upstream::{LeaseStore, UpstreamConf},
};

use crate::rig::{PATIENCE, agent_binary, dump::Dump, hooks::hooks, list, per_cpu};

/// Host number of etcd on the underlay.
const ETCD_HOST: u8 = 200;
/// 1 kHz.
const EVERY: Duration = Duration::from_millis(1);
/// The longest time for which a TCP stream may stand still.
const STALL: Duration = Duration::from_secs(1);
/// What a stream sends, in bytes a second: less than overflows a queue on its way.
const RATE: u32 = 5_000_000;
/// Payload in bytes of a datagram that fills a packet.
const DATAGRAM: usize = 1300;

/// What a node must look like whoever runs on it. Programs, qdiscs and filters are what we add.
const KERNEL: [&str; 8] = [
    "ip -j -d link show",
    "ip -j -d addr show",
    "ip -j -d route show table all",
    "ip -j -6 route show table all",
    "ip -j rule show",
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

/// Index and MAC of the device, stored leases, `subnet.env`.
pub(crate) type Identity = (u32, String, BTreeMap<String, String>, String);

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
            network: confs[0].network,
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

    pub(crate) fn device(&self) -> String {
        self.nodes[0].conf.device()
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
        let subnet = self.nodes[node].subnet;
        let pod = self.lab.node(node).add_pod(subnet, 2, mtu).expect("a pod");
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
            format!("--iface={}", place.public_ip),
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
        // On a node that nobody ran on it has drawn one.
        self.nodes[node].subnet = self
            .subnet_env(node, "FLANNEL_SUBNET")
            .parse()
            .expect("FLANNEL_SUBNET");
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
        Kernel {
            dump: Dump::of(ns).only(&KERNEL).without(&[HEADROOM]),
            // Without counters, in their order.
            iptables: rules("iptables-save"),
            nftables: rules("nft --stateless list ruleset"),
        }
    }

    /// What peers and tools know a node by: index and MAC of the device, the stored leases byte for byte, `subnet.env`.
    pub(crate) fn identity(&self, node: usize) -> Identity {
        let upstream = &self.nodes[node];
        let env = fs::read_to_string(&upstream.subnet_file).expect("subnet.env");
        (
            upstream.ns.ifindex(&self.device()).expect("the device"),
            upstream.device_mac().expect("its MAC"),
            self.store().stored().expect("the leases"),
            env,
        )
    }

    /// Whether our two programs run on a node, one at each hook.
    pub(crate) fn programs(&self, node: usize) -> Result<(), String> {
        hooks(self.ns(node)).one_each().map(drop)
    }

    /// Packets that eBPF has carried both ways, through the stack or around it.
    pub(crate) fn carried(&self, node: usize) -> [u64; 2] {
        let cookie = self.ns(node).cookie().expect("cookie");
        let vni = self.nodes[node].conf.vni.try_into().expect("a VNI");
        let pin = format!(
            "{}/maps-v{}/counters",
            flannel_core::mark::instance_path(cookie, vni),
            flannel_common::LAYOUT_VERSION
        );
        let dump = json::bpftool_json(self.ns(node), &["map", "dump", "pinned", &pin])
            .expect("the counters");
        let packets = |index: usize| per_cpu(&dump[index]);
        [packets(0) + packets(2), packets(1) + packets(3)]
    }

    /// Packets that the kernel's device has sent and received.
    pub(crate) fn by_kernel(&self, node: usize) -> [u64; 2] {
        let link = json::link(self.ns(node), &self.device()).expect("the device");
        ["tx", "rx"].map(|way| link["stats64"][way]["packets"].as_u64().expect("packets"))
    }

    /// Waits until `counter` has grown by this many in both directions.
    #[track_caller]
    pub(crate) fn wait_grown(&self, what: &str, by: u64, counter: impl Fn(&Cluster) -> [u64; 2]) {
        let before = counter(self);
        eventually(PATIENCE, what, || {
            let now = counter(self);
            let grown = now[0] >= before[0] + by && now[1] >= before[1] + by;
            grown
                .then_some(())
                .ok_or_else(|| format!("{now:?}, it was {before:?}"))
        });
    }

    /// Waits until every pod reaches every other.
    #[track_caller]
    pub(crate) fn wait_all_pairs(&self) {
        for (from, to) in self.pairs() {
            let (from, to) = (&self.pods[from], &self.pods[to]);
            let what = format!("{} reaches {}", from.name, to.name);
            eventually(PATIENCE, &what, || {
                flannel_testkit::traffic::ping_once(&from.ns, to.ip, Duration::from_millis(500))
                    .map_err(|error| format!("{error:#}"))
            });
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
    iptables: Vec<String>,
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

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for (node, agent) in &self.agents {
                eprintln!("--- the agent of node {node} said:\n{}", agent.log());
            }
        }
    }
}

/// ICMP both ways, TCP and UDP between the pods of node 0 and node 1.
pub(crate) struct Traffic {
    pings: [FloodPing; 2],
    tcp: TcpFlow,
    udp: [UdpFlow; 2],
}

impl Traffic {
    pub(crate) fn start(cluster: &Cluster) -> Traffic {
        let (a, b) = (&cluster.pods[0], &cluster.pods[1]);
        let ping = |from: &Pod, to: &Pod| FloodPing::start(&from.ns, to.ip, EVERY).expect("ping");
        let udp = |from: &Pod, to: &Pod| {
            UdpFlow::start(&to.ns, to.ip, &from.ns, 2 * EVERY, DATAGRAM).expect("UDP")
        };
        Traffic {
            pings: [ping(a, b), ping(b, a)],
            tcp: TcpFlow::start_paced(&b.ns, b.ip, &a.ns, RATE).expect("TCP"),
            udp: [udp(a, b), udp(b, a)],
        }
    }

    /// Nothing was lost, nothing stood still.
    #[track_caller]
    pub(crate) fn assert_untouched(self) {
        let tcp = self.tcp.stop().expect("the TCP stream");
        for udp in self.udp {
            let udp = udp.stop().expect("the UDP stream");
            assert!(
                udp.sent > 100 && udp.lost.is_empty() && udp.refused == 0,
                "{udp:?}"
            );
        }
        for ping in self.pings {
            let ping = ping.stop().expect("the pings");
            assert!(ping.sent > 100 && ping.lost == 0, "{ping:?}");
        }
        assert!(tcp.longest_stall <= STALL, "{tcp:?}");
    }
}

/// What the kernel tells of the changes to a node: nothing of the overlay may go, not even to come back.
pub(crate) struct Monitor {
    child: Child,
    file: PathBuf,
}

impl Monitor {
    pub(crate) fn start(cluster: &Cluster, node: usize) -> Monitor {
        let file = cluster.lab.node(node).run_dir.join("monitor");
        let out = File::create(&file).expect("a file");
        let child = cluster
            .ns(node)
            .command("ip")
            .args(["monitor", "link", "address", "route"])
            .stdin(Stdio::null())
            .stdout(out)
            .spawn()
            .expect("ip monitor");
        // It listens as soon as it tells of a change.
        let ns = cluster.ns(node);
        eventually(PATIENCE, "ip monitor listens", || {
            ns.ip("link set lo alias probe")
                .map_err(|error| error.to_string())?;
            let len = fs::metadata(&file).map_or(0, |meta| meta.len());
            (len > 0).then_some(()).ok_or("nothing yet".to_owned())
        });
        ns.exec(["ip", "link", "set", "lo", "alias", ""])
            .expect("take the alias away");
        Monitor { child, file }
    }

    /// The lines that tell of something removed.
    pub(crate) fn stop(mut self) -> Vec<String> {
        process::kill_and_reap(&mut self.child);
        let text = fs::read_to_string(&self.file).expect("what ip monitor said");
        text.lines()
            .filter(|line| line.starts_with("Deleted"))
            .map(str::to_owned)
            .collect()
    }
}

/// The permanent entries of a node that name an address or MAC: routes, neighbours, forwarding entries.
pub(crate) fn traces(ns: &Netns, words: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for command in [
        "ip -j route show",
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
