//! Agents in a lab: nodes that share a lease directory, the pods behind them, and what the kernel has of them, read
//! with `ip`, `bridge` and `bpftool` instead of the agent's own code.

#![allow(
    dead_code,
    unused_imports,
    unused_macros,
    reason = "every test binary uses a part of it"
)]

pub(crate) mod agents;
pub(crate) mod dump;
pub(crate) mod hooks;
mod kernel;
mod leases;
pub(crate) mod maps;
pub(crate) mod stranger;
pub(crate) mod variant;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    time::Duration,
};

use flannel_common::counter::CounterId;
use flannel_core::mark::Overlay;
use flannel_testkit::{
    AgentProcess, Families, Family, Lab, LabOptions, Netns, Node, Pod, Prefix, Subnet, eventually,
    json::bpftool_json,
    process::{self, Finished},
    traffic,
};
use serde_json::{Value, json};

pub(crate) use kernel::{Peer, kernel_peers, list, peers_of, per_cpu, text};

/// How long anything may take that is expected to happen and has no bound of its own.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// The network configuration unless a test says otherwise.
pub(crate) const NET_CONF: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
/// The tunnel device of [`NET_CONF`].
pub(crate) const DEVICE: &str = "flannel.1";
/// The network identifier of [`NET_CONF`].
const VNI: u32 = 1;

/// The agent under test.
pub(crate) fn agent_binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_flannel-agent"))
}

/// The network configuration for nodes with these families.
pub(crate) fn net_conf(families: Families) -> &'static str {
    match families {
        Families::V4 => NET_CONF,
        Families::V6 => {
            r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:10:244::/48","Backend":{"Type":"vxlan"}}"#
        }
        Families::Dual => {
            r#"{"EnableIPv6":true,"Network":"10.244.0.0/16","IPv6Network":"fd00:10:244::/48","Backend":{"Type":"vxlan"}}"#
        }
    }
}

/// Nodes of a lab whose agents share one lease directory. Node `i` gets subnet 10.244.(i + 1).0/24. Agents are killed, and
/// everything is removed, when it is dropped.
pub(crate) struct Rig {
    pub(crate) agents: BTreeMap<usize, AgentProcess>,
    pods: BTreeMap<usize, Vec<Pod>>,
    lab: Lab,
    lease_dir: PathBuf,
    /// What all methods look at that are not about a family of the caller's.
    family: Family,
}

impl Rig {
    /// A lab of `nodes` nodes and a lease directory; no agent runs yet.
    pub(crate) fn new(nodes: u8) -> Rig {
        let options = LabOptions {
            nodes,
            ..LabOptions::default()
        };
        Rig::with(options, NET_CONF)
    }

    /// A lab and a network configuration of these families. Of two, the rig looks at IPv4 until [`Rig::look_at`] says otherwise.
    pub(crate) fn of(families: Families, options: LabOptions) -> Rig {
        let options = LabOptions {
            families,
            ..options
        };
        Rig::with(options, net_conf(families))
    }

    /// Looks at the overlay of this family from now on.
    pub(crate) fn look_at(&mut self, family: Family) {
        assert!(self.lab.families().has(family), "no {family} in the lab");
        self.family = family;
    }

    /// The family of the overlay that the rig looks at.
    pub(crate) fn family(&self) -> Family {
        self.family
    }

    /// The tunnel device of that overlay.
    pub(crate) fn device(&self) -> String {
        self.family.device(VNI)
    }

    /// Like [`Rig::new`], with a lab and a network configuration of the caller's.
    pub(crate) fn with(options: LabOptions, net_conf: &str) -> Rig {
        let lab = Lab::new(options).expect("a lab");
        let lease_dir = lab.node(0).run_dir.join("leases");
        fs::create_dir_all(lease_dir.join("subnets")).expect("make the lease directory");
        fs::write(lease_dir.join("config"), net_conf).expect("write the network configuration");
        Rig {
            agents: BTreeMap::new(),
            pods: BTreeMap::new(),
            family: options.families.list()[0],
            lab,
            lease_dir,
        }
    }

    /// A lab with an agent on every node, all with the same flags, which know each other, and one pod on each.
    pub(crate) fn start(nodes: u8, flags: &[&str]) -> Rig {
        let mut rig = Rig::new(nodes);
        rig.start_all(flags);
        rig
    }

    /// Like [`Rig::start`] with nodes of these families.
    pub(crate) fn start_of(families: Families, nodes: u8, flags: &[&str]) -> Rig {
        let options = LabOptions {
            nodes,
            ..LabOptions::default()
        };
        let mut rig = Rig::of(families, options);
        rig.start_all(flags);
        rig
    }

    /// Starts an agent and a pod on every node and waits until all know each other.
    pub(crate) fn start_all(&mut self, flags: &[&str]) {
        for node in 0..self.lab.nodes().len() {
            self.start_agent(node, flags);
        }
        for node in 0..self.lab.nodes().len() {
            self.wait_ready(node);
            self.add_pod(node);
        }
        self.wait_converged();
        self.wait_carried();
    }

    /// Waits until every pod is on the fast path, on nodes where that is on: it comes to a pod a moment after the pod.
    #[track_caller]
    pub(crate) fn wait_carried(&self) {
        for node in self.agents.keys() {
            let pods = self.pods.get(node).map_or(0, Vec::len) as u64;
            eventually(PATIENCE, &format!("node {node} carries its pods"), || {
                let fast = &self.status(*node)["fast_path"];
                let carried = fast["pods"].as_u64().unwrap_or(0);
                if fast.is_null() || fast["mode"] == "off" || carried >= pods {
                    return Ok(());
                }
                Err(format!("{carried} of {pods} pods: {fast}"))
            });
        }
    }

    pub(crate) fn lab(&self) -> &Lab {
        &self.lab
    }

    #[track_caller]
    pub(crate) fn node(&self, node: usize) -> &Node {
        self.lab.node(node)
    }

    #[track_caller]
    pub(crate) fn ns(&self, node: usize) -> &Netns {
        &self.lab.node(node).ns
    }

    /// Starts the agent of a node with these flags besides those for the store and the subnet file. It takes the node's
    /// [`Node::subnet`], unless its subnet file says otherwise already. [`Rig::wait_ready`] waits for it.
    pub(crate) fn start_agent(&mut self, node: usize, flags: &[&str]) {
        self.start_binary(node, agent_binary(), flags, &[]);
    }

    /// Like [`Rig::start_agent`] with another binary and environment variables.
    pub(crate) fn start_binary(
        &mut self,
        node: usize,
        binary: &Path,
        flags: &[&str],
        env: &[(&str, &str)],
    ) {
        self.reserve_subnet(node);
        let flags: Vec<String> = self
            .common_flags(node)
            .into_iter()
            .chain(flags.iter().map(ToString::to_string))
            .collect();
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let agent = AgentProcess::spawn(self.node(node), binary, &flags, env)
            .unwrap_or_else(|error| panic!("start the agent of node {node}: {error:#}"));
        self.agents.insert(node, agent);
    }

    /// The flags that every agent of the rig gets.
    pub(crate) fn common_flags(&self, node: usize) -> Vec<String> {
        vec![
            format!("--lease-dir={}", self.lease_dir.display()),
            format!("--subnet-file={}", self.subnet_file(node).display()),
        ]
    }

    /// Where the agent of a node writes its `subnet.env`.
    pub(crate) fn subnet_file(&self, node: usize) -> PathBuf {
        self.node(node).run_dir.join("subnet.env")
    }

    /// Where the agent of a node writes its state.
    pub(crate) fn state_file(&self, node: usize) -> PathBuf {
        self.node(node).run_dir.join("flannel-agent.json")
    }

    /// An agent prefers the subnet that its subnet file names.
    pub(crate) fn reserve_subnet(&self, node: usize) {
        let file = self.subnet_file(node);
        if file.exists() {
            return;
        }
        let mut text = String::new();
        for family in self.lab.families().list() {
            let subnet = self.node(node).subnet_of(family);
            let (infix, network) = match family {
                Family::V4 => ("", "10.244.0.0/16"),
                Family::V6 => ("IPV6_", "fd00:10:244::/48"),
            };
            let (gateway, length) = (subnet.gateway(), subnet.prefix_len());
            writeln!(text, "FLANNEL_{infix}NETWORK={network}").expect("a string takes it");
            writeln!(text, "FLANNEL_{infix}SUBNET={gateway}/{length}").expect("a string takes it");
        }
        text += "FLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n";
        fs::write(&file, text).expect("write the subnet file");
    }

    /// Waits until the agent has put everything in place and says that it is ready.
    #[track_caller]
    pub(crate) fn wait_ready(&mut self, node: usize) {
        let agent = self.agent(node);
        if let Err(error) = agent.wait_log("flannel is ready", PATIENCE) {
            panic!("node {node}: {error:#}");
        }
    }

    /// Waits until, without a vxlan device, somebody listens for what the stack puts together of outer fragments.
    #[track_caller]
    pub(crate) fn wait_fragments_heard(&self, node: usize) {
        eventually(PATIENCE, "a socket for outer fragments", || {
            let sockets = self.ns(node).exec(["ss", "-Huln", "sport", "=", "8472"]);
            let sockets = sockets.map_err(|error| format!("{error:#}"))?;
            (!sockets.trim().is_empty()).then_some(()).ok_or(sockets)
        });
    }

    #[track_caller]
    pub(crate) fn agent(&mut self, node: usize) -> &mut AgentProcess {
        self.agents
            .get_mut(&node)
            .unwrap_or_else(|| panic!("no agent runs on node {node}"))
    }

    /// Kills the agent as a crash would.
    #[track_caller]
    pub(crate) fn kill_agent(&mut self, node: usize) {
        self.agent(node).sigkill();
        self.agents.remove(&node);
    }

    /// Asks the agent to stop and gives its exit code.
    #[track_caller]
    pub(crate) fn stop_agent(&mut self, node: usize) -> i32 {
        let agent = self.agent(node);
        agent.sigterm().expect("send SIGTERM");
        let code = agent.wait(PATIENCE).expect("the agent ends");
        self.agents.remove(&node);
        code
    }

    /// Adds a pod with the MTU of the node's subnet file; the first of a node has the address that ends in 2.
    #[track_caller]
    pub(crate) fn add_pod(&mut self, node: usize) -> Pod {
        let mtu = self
            .subnet_env(node, "FLANNEL_MTU")
            .parse()
            .expect("FLANNEL_MTU");
        self.add_pod_with_mtu(node, mtu)
    }

    /// Like [`Rig::add_pod`] with another MTU.
    #[track_caller]
    pub(crate) fn add_pod_with_mtu(&mut self, node: usize, mtu: u32) -> Pod {
        let families = self.lab.families().list();
        let place = self.node(node);
        let subnets: Vec<Prefix> = families.iter().map(|of| place.subnet_of(*of)).collect();
        let number = u32::try_from(self.pods.get(&node).map_or(0, Vec::len)).expect("few pods") + 2;
        let pod = self
            .node(node)
            .add_pod_in(&subnets, number, mtu)
            .unwrap_or_else(|error| panic!("add a pod to node {node}: {error:#}"));
        self.pods.entry(node).or_default().push(pod.clone());
        pod
    }

    /// Makes a pod that was added to the node itself one of the rig's.
    pub(crate) fn adopt_pod(&mut self, node: usize, pod: Pod) {
        self.pods.entry(node).or_default().push(pod);
    }

    /// The first pod of a node.
    #[track_caller]
    pub(crate) fn pod(&self, node: usize) -> &Pod {
        self.pods
            .get(&node)
            .and_then(|pods| pods.first())
            .unwrap_or_else(|| panic!("node {node} has no pod"))
    }

    /// A value of the node's subnet file.
    #[track_caller]
    pub(crate) fn subnet_env(&self, node: usize, name: &str) -> String {
        let file = self.subnet_file(node);
        let text = fs::read_to_string(&file).expect("read the subnet file");
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            .unwrap_or_else(|| panic!("no {name} in {text:?}"))
            .to_owned()
    }

    /// Runs a subcommand of the agent in the node's namespace, such as `["status", "-o", "json"]`.
    #[track_caller]
    pub(crate) fn cli(&self, node: usize, words: &[&str]) -> Finished {
        let mut command = self.ns(node).command(agent_binary());
        command.args(words).arg(format!(
            "--subnet-file={}",
            self.subnet_file(node).display()
        ));
        process::finish(&mut command, PATIENCE).expect("run the agent")
    }

    /// `status -o json`, whatever its exit code.
    #[track_caller]
    pub(crate) fn status(&self, node: usize) -> Value {
        parse(&self.cli(node, &["status", "-o", "json"]))
    }

    /// `status -o json`, of a node that works.
    #[track_caller]
    pub(crate) fn status_is_ok(&self, node: usize) -> Value {
        let done = self.cli(node, &["status", "-o", "json"]);
        assert_eq!(done.status.code(), Some(0), "{done:?}");
        let status = parse(&done);
        assert_eq!(status["ok"], true, "{status}");
        status
    }

    /// `peers -o json`.
    #[track_caller]
    pub(crate) fn peers(&self, node: usize) -> Value {
        parse(&self.cli(node, &["peers", "-o", "json"]))
    }

    /// The state file of the node's agent.
    #[track_caller]
    pub(crate) fn state(&self, node: usize) -> Value {
        let text = fs::read_to_string(self.state_file(node)).expect("read the state file");
        serde_json::from_str(&text).expect("the state file")
    }

    /// The directory of the node's pins.
    #[track_caller]
    pub(crate) fn instance(&self, node: usize) -> PathBuf {
        let cookie = self.ns(node).cookie().expect("the namespace's cookie");
        let vni = VNI.try_into().expect("a VNI");
        let overlay = match self.family {
            Family::V4 => Overlay::v4(vni),
            Family::V6 => Overlay::v6(vni),
        };
        overlay.path(cookie).into()
    }

    /// Where a map of the node is pinned.
    #[track_caller]
    pub(crate) fn map_pin(&self, node: usize, map: &str) -> PathBuf {
        self.maps_dir(node).join(map)
    }

    /// The directory of the maps' pins.
    #[track_caller]
    pub(crate) fn maps_dir(&self, node: usize) -> PathBuf {
        let version = flannel_common::LAYOUT_VERSION;
        self.instance(node).join(format!("maps-v{version}"))
    }

    /// All entries of a map as `bpftool` prints them.
    #[track_caller]
    pub(crate) fn map_dump(&self, node: usize, map: &str) -> Value {
        let pin = self.map_pin(node, map).display().to_string();
        bpftool_json(self.ns(node), &["map", "dump", "pinned", &pin]).expect("dump a map")
    }

    /// What `bpftool` says of a map: id, sizes.
    #[track_caller]
    pub(crate) fn map_info(&self, node: usize, map: &str) -> Value {
        let pin = self.map_pin(node, map).display().to_string();
        bpftool_json(self.ns(node), &["map", "show", "pinned", &pin]).expect("show a map")
    }

    /// One of the programs' counters, in packets, from the map through `bpftool`.
    #[track_caller]
    pub(crate) fn packets(&self, node: usize, id: CounterId) -> u64 {
        per_cpu(&self.map_dump(node, "counters")[id as usize])
    }

    /// Packets that eBPF has carried, through the stack or around it, from the maps through `bpftool`.
    #[track_caller]
    pub(crate) fn counters(&self, node: usize) -> Counters {
        let dump = self.map_dump(node, "counters");
        let packets = |index: usize| per_cpu(&dump[index]);
        Counters {
            encap: packets(0) + packets(2),
            decap: packets(1) + packets(3),
        }
    }

    /// Packets that the kernel's tunnel device of the node has sent and received.
    #[track_caller]
    pub(crate) fn device_counters(&self, node: usize) -> Counters {
        let link =
            flannel_testkit::json::link(self.ns(node), &self.device()).expect("the tunnel device");
        let packets = |way: &str| link["stats64"][way]["packets"].as_u64().expect("packets");
        Counters {
            encap: packets("tx"),
            decap: packets("rx"),
        }
    }

    /// One ping from pod to pod.
    pub(crate) fn ping(&self, from: usize, to: usize) -> anyhow::Result<Duration> {
        traffic::ping_once(
            &self.pod(from).ns,
            self.pod(to).address(self.family),
            Duration::from_secs(1),
        )
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for (node, agent) in &self.agents {
                eprintln!("--- the agent of node {node} said:\n{}", agent.log());
            }
        }
    }
}

/// Packets by direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Counters {
    pub(crate) encap: u64,
    pub(crate) decap: u64,
}

#[track_caller]
fn parse(done: &Finished) -> Value {
    serde_json::from_str(&done.stdout)
        .unwrap_or_else(|error| panic!("{error}: {:?} {:?}", done.stdout, done.stderr))
}
