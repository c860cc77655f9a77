//! The nodes, their agents and pods.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail};
use clap::ValueEnum;
use flannel_testkit::{
    AgentProcess, ApiServer, Etcd, Families, Family, Lab, LabOptions, Node, Offloads, Pod, Prefix,
    apiserver::{self, Kind},
    cni, json, traffic, try_eventually,
};
use serde::Serialize;
use serde_json::{Value, json};

use crate::{check_stop, progress};

/// The networks of the pods, by family.
pub const NETWORKS: [&str; 2] = ["10.244.0.0/16", "fd00:10:244::/48"];
const PREFIX: &str = "/coreos.com/network";
const READY: Duration = Duration::from_secs(20);
const STEP: Duration = Duration::from_secs(1);

/// Where the agents keep their leases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StoreChoice {
    /// A directory of files.
    Dir,
    /// A real etcd, started and stopped.
    Etcd,
    /// A server that behaves as the Kubernetes API does, with a Node object for each node.
    Kube,
}

/// What carries packets between nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// VXLAN, by eBPF or the kernel's device.
    #[default]
    Vxlan,
    /// Routes: all nodes are on one link.
    HostGw,
    /// The kernel's `WireGuard` device.
    Wireguard,
}

impl Backend {
    /// As the network configuration names it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Vxlan => "vxlan",
            Self::HostGw => "host-gw",
            Self::Wireguard => "wireguard",
        }
    }
}

/// The network configuration of these families, networks first.
pub fn net_conf(
    families: Families,
    networks: [&str; 2],
    backend: Backend,
    direct_routing: bool,
) -> String {
    let mut conf = json!({ "Backend": { "Type": backend.as_str() } });
    for (family, network) in Family::ALL.into_iter().zip(networks) {
        let (enable, key) = match family {
            Family::V4 => ("EnableIPv4", "Network"),
            Family::V6 => ("EnableIPv6", "IPv6Network"),
        };
        conf[enable] = families.has(family).into();
        if families.has(family) {
            conf[key] = network.into();
        }
    }
    if direct_routing {
        conf["Backend"]["DirectRouting"] = true.into();
    }
    conf.to_string()
}

/// The flannel CNI plugin that was built with this program.
pub fn plugin_binary() -> anyhow::Result<PathBuf> {
    beside("FLANNEL_CNI", "flannel")
}

/// What to build.
#[derive(Clone, Debug)]
pub struct Options {
    /// The agent; the one that was built for this program if there is none.
    pub binary: Option<PathBuf>,
    /// The flannel CNI plugin that makes the pods, with the system's bridge and host-local; without one the lab makes them itself.
    pub plugin: Option<PathBuf>,
    /// Further flags of the agents.
    pub flags: Vec<String>,
    /// What the store says about the network.
    pub net_conf: String,
    /// Leases of nodes that do not exist, in a store of files.
    pub strangers: Strangers,
    /// The families of nodes and pods; [`Options::net_conf`] must say the same.
    pub families: Families,
    /// What [`Options::net_conf`] says of it.
    pub backend: Backend,
    /// MTU of pods that the lab makes, if not that of the agent.
    pub pod_mtu: Option<u32>,
    /// How many of the nodes are behind a router.
    pub far_nodes: u8,
    /// Number of nodes.
    pub nodes: u8,
    /// Pods on each node.
    pub pods: u8,
    /// Where the agents keep their leases.
    pub store: StoreChoice,
    /// The agents' `--datapath`.
    pub datapath: String,
    /// Segmentation and checksum offload of the uplinks.
    pub offloads: Offloads,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            binary: None,
            plugin: None,
            flags: Vec::new(),
            net_conf: net_conf(Families::V4, NETWORKS, Backend::Vxlan, false),
            families: Families::V4,
            backend: Backend::Vxlan,
            pod_mtu: None,
            far_nodes: 0,
            strangers: Strangers::default(),
            nodes: 2,
            pods: 1,
            store: StoreChoice::Dir,
            datapath: "auto".into(),
            offloads: Offloads::Default,
        }
    }
}

/// Leases by name and content, and how long the agents may take to know them.
#[derive(Clone, Debug, Default)]
pub struct Strangers {
    /// File names and contents.
    pub leases: Vec<(String, String)>,
    /// Beyond what a small cluster takes.
    pub patience: Duration,
}

/// A pod with its place.
#[derive(Debug)]
pub struct Place {
    /// Node and address, for people.
    pub label: String,
    /// Index of the node.
    pub node: usize,
    /// The pod.
    pub pod: Pod,
}

impl Place {
    /// Node and address of a family, for people.
    pub fn label_in(&self, family: Family) -> String {
        let (node, _) = self.label.split_once('/').unwrap_or((&self.label, ""));
        format!("{node}/{}", self.pod.address(family))
    }
}

/// Packets that eBPF has carried on a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Encapsulated.
    pub encap: u64,
    /// Decapsulated.
    pub decap: u64,
    /// Encapsulated past the host's stack; they are among [`Counts::encap`].
    pub fast_encap: u64,
    /// Decapsulated past the host's stack; they are among [`Counts::decap`].
    pub fast_decap: u64,
    /// Past the host's stack to a node on the same link, as they are.
    pub routed_out: u64,
    /// The same from such a node.
    pub routed_in: u64,
}

/// A running overlay. Fields are dropped in order: agents before the namespaces they live in.
#[derive(Debug)]
pub struct Cluster {
    agents: Vec<AgentProcess>,
    /// All pods, node by node.
    pub pods: Vec<Place>,
    etcd: Option<Etcd>,
    kube: Option<ApiServer>,
    binary: PathBuf,
    /// The lab.
    pub lab: Lab,
}

impl Cluster {
    /// Starts everything and waits until every node has programmed every other.
    pub fn start(args: &Options) -> anyhow::Result<Self> {
        progress(&format!("making {} nodes", args.nodes));
        let lab = Lab::new(LabOptions {
            nodes: args.nodes,
            families: args.families,
            far_nodes: args.far_nodes,
            offloads: args.offloads,
            ..LabOptions::default()
        })
        .context("make the lab")?;
        Self::start_in(lab, args, &progress)
    }

    /// Like [`Cluster::start`] in a lab that is there already, which decides about nodes and offloads.
    pub fn start_in(lab: Lab, args: &Options, say: &dyn Fn(&str)) -> anyhow::Result<Self> {
        let binary = match &args.binary {
            Some(binary) => binary.clone(),
            None => agent_binary()?,
        };
        let mut cluster = Self {
            agents: Vec::new(),
            pods: Vec::new(),
            etcd: None,
            kube: None,
            binary,
            lab,
        };
        let flags = cluster.start_store(args, say)?;
        say(&format!("starting {} agents", cluster.lab.nodes().len()));
        cluster.start_agents(args, &flags)?;
        say(&format!("adding {} pods to each node", args.pods));
        cluster.add_pods(args)?;
        say("waiting until every node knows every other");
        cluster.wait_for_peers(args)?;
        Ok(cluster)
    }

    /// Starts the store and returns the flags that lead to it.
    fn start_store(&mut self, args: &Options, say: &dyn Fn(&str)) -> anyhow::Result<Vec<String>> {
        check_stop()?;
        match args.store {
            StoreChoice::Dir => {
                let run_dir = &self.lab.node(0).run_dir;
                let dir = run_dir.parent().unwrap_or(run_dir).join("leases");
                fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
                let config = dir.join("config");
                fs::write(&config, &args.net_conf)
                    .with_context(|| format!("write {}", config.display()))?;
                let leases = dir.join("subnets");
                fs::create_dir_all(&leases)
                    .with_context(|| format!("create {}", leases.display()))?;
                for (name, lease) in &args.strangers.leases {
                    fs::write(leases.join(name), lease).with_context(|| format!("write {name}"))?;
                }
                Ok(vec!["--lease-dir".into(), dir.display().to_string()])
            }
            StoreChoice::Etcd => {
                say("starting etcd");
                let etcd =
                    Etcd::start(Some(self.lab.underlay()), Lab::GATEWAY).context("start etcd")?;
                etcd.put(&format!("{PREFIX}/config"), &args.net_conf)?;
                let flags = vec![
                    "--etcd-endpoints".into(),
                    etcd.endpoint(),
                    "--etcd-prefix".into(),
                    PREFIX.into(),
                ];
                self.etcd = Some(etcd);
                Ok(flags)
            }
            StoreChoice::Kube => {
                say("starting the Kubernetes API");
                let kube = ApiServer::start(Some(self.lab.underlay()), Lab::GATEWAY)
                    .context("start the Kubernetes API")?;
                for node in self.lab.nodes() {
                    let families = args.families.list().into_iter();
                    let cidrs = families.map(|family| node.subnet_of(family).to_string());
                    let cidrs: Vec<String> = cidrs.collect();
                    let cidrs: Vec<&str> = cidrs.iter().map(String::as_str).collect();
                    kube.create(Kind::Node, apiserver::node(&node.name, &cidrs))?;
                }
                let run_dir = &self.lab.node(0).run_dir;
                let dir = run_dir.parent().unwrap_or(run_dir);
                let file = |name: &str, text: &str| {
                    let path = dir.join(name);
                    fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
                    anyhow::Ok(path.display().to_string())
                };
                let flags = vec![
                    "--kube-subnet-mgr".into(),
                    "--kubeconfig-file".into(),
                    file("kubeconfig", &kube.kubeconfig())?,
                    "--net-config-path".into(),
                    file("net-conf.json", &args.net_conf)?,
                ];
                self.kube = Some(kube);
                Ok(flags)
            }
        }
    }

    fn start_agents(&mut self, args: &Options, flags: &[String]) -> anyhow::Result<()> {
        for node in self.lab.nodes() {
            check_stop()?;
            let subnet_file = node.run_dir.join("subnet.env").display().to_string();
            let cache = cni::cache_dir(node).display().to_string();
            let mut argv = vec!["--subnet-file", &subnet_file, "--datapath", &args.datapath];
            if args.plugin.is_some() {
                // Or else the bridge plugin masquerades, also between nodes.
                argv.extend(["--ip-masq", "--cni-cache-dir", &cache]);
            }
            argv.extend(flags.iter().chain(&args.flags).map(String::as_str));
            // Only Kubernetes has a name for a node.
            let env = [("NODE_NAME", node.name.as_str())];
            let agent = AgentProcess::spawn(node, &self.binary, &argv, &env)
                .with_context(|| format!("start the agent of {}", node.name))?;
            self.agents.push(agent);
        }
        for (node, agent) in self.lab.nodes().iter().zip(&mut self.agents) {
            let what = format!("the agent of {}", node.name);
            wait(&what, READY + args.strangers.patience, || {
                if agent.subnet_file.exists() {
                    return Ok(());
                }
                if !agent.is_running() {
                    bail!("it ended: {}", last_line(&agent.log()));
                }
                bail!("no subnet yet: {}", last_line(&agent.log()))
            })?;
        }
        Ok(())
    }

    fn add_pods(&mut self, args: &Options) -> anyhow::Result<()> {
        for (index, node) in self.lab.nodes().iter().enumerate() {
            let env = read_env(&node.run_dir.join("subnet.env"))?;
            let plugin = args.plugin.as_ref();
            let runtime = plugin
                .map(|flannel| cni::Runtime::new(node, flannel))
                .transpose()?;
            for number in 0..args.pods {
                check_stop()?;
                let pod = if let Some(runtime) = &runtime {
                    let name = format!("{}p{}", node.name, number + 1);
                    let added = runtime.add_pod(&name);
                    added
                        .with_context(|| format!("make a pod on {}", node.name))?
                        .1
                } else {
                    let mtu = args.pod_mtu.unwrap_or(env.mtu);
                    node.add_pod_in(&env.subnets, u32::from(number) + 2, mtu)?
                };
                let family = args.families.list()[0];
                self.pods.push(Place {
                    label: format!("{}/{}", node.name, pod.address(family)),
                    node: index,
                    pod,
                });
            }
        }
        Ok(())
    }

    /// Until every agent has programmed every other node.
    fn wait_for_peers(&self, args: &Options) -> anyhow::Result<()> {
        if args.backend != Backend::Vxlan || args.far_nodes > 0 {
            return self.wait_for_pings(args);
        }
        let strangers = &args.strangers;
        let others = self.lab.nodes().len().saturating_sub(1) + strangers.leases.len();
        let others = others * args.families.list().len();
        let bpf_alone = args.datapath == "bpf";
        for node in self.lab.nodes() {
            let what = format!("{} to know its peers", node.name);
            wait(&what, READY + strangers.patience, || {
                let peers = self.ask(node, "peers")?;
                let complete = |peer: &&Value| {
                    peer["path"] == "bpf" || (!bpf_alone && peer["kernel_complete"] == true)
                };
                let peers = peers.as_array().map_or(&[][..], Vec::as_slice);
                let known = peers.iter().filter(complete).count();
                if known < others {
                    let lacking = peers.iter().find(|peer| !complete(peer));
                    let lacking = lacking.map_or_else(String::new, |peer| format!(", not {peer}"));
                    bail!("{known} of {others}{lacking}");
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Until every node's pods reach every other's; what does not work after a time is for the caller to find.
    fn wait_for_pings(&self, args: &Options) -> anyhow::Result<()> {
        let mut left = READY;
        let firsts: Vec<&Place> = (0..self.lab.nodes().len())
            .filter_map(|node| self.pods.iter().find(|place| place.node == node))
            .collect();
        for (from, to) in firsts
            .iter()
            .flat_map(|a| firsts.iter().map(move |b| (a, b)))
        {
            for family in args.families.list() {
                let reach = || traffic::ping_once(&from.pod.ns, to.pod.address(family), STEP);
                while reach().is_err() && !left.is_zero() {
                    check_stop()?;
                    left = left.saturating_sub(STEP);
                }
            }
        }
        Ok(())
    }

    /// The device by which a node's stack sends packets to an address.
    pub fn device_to(&self, node: usize, address: std::net::IpAddr) -> anyhow::Result<String> {
        let ns = &self.lab.node(node).ns;
        let argv = [
            Family::of(address).flag(),
            "route",
            "get",
            &address.to_string(),
        ];
        let route = json::ip_json(ns, &argv)?;
        Ok(route[0]["dev"].as_str().unwrap_or_default().to_owned())
    }

    /// What eBPF has carried on a node so far.
    pub fn counters(&self, node: usize, family: Family) -> anyhow::Result<Counts> {
        let mut status = self.ask(self.lab.node(node), "status")?;
        if family == Family::V6 && self.lab.families() == Families::Dual {
            // A node with one family has it on top.
            status = status["ipv6"].take();
        }
        let count = |counters: &Value, direction: &str| {
            counters[direction]["packets"].as_u64().unwrap_or(0)
        };
        let (all, fast) = (&status["counters"], &status["fast_path"]["counters"]);
        Ok(Counts {
            encap: count(all, "encap"),
            decap: count(all, "decap"),
            fast_encap: count(fast, "encap"),
            fast_decap: count(fast, "decap"),
            routed_out: count(fast, "routed_out"),
            routed_in: count(fast, "routed_in"),
        })
    }

    /// The last line that a node's agent has logged.
    pub(crate) fn last_words(&self, node: usize) -> String {
        self.agents
            .get(node)
            .map_or_else(String::new, |agent| last_line(&agent.log()))
    }

    /// Runs a read-only command of the agent and parses its answer.
    fn ask(&self, node: &Node, command: &str) -> anyhow::Result<Value> {
        let output = node
            .ns
            .command(self.binary.display().to_string())
            .args([command, "-o", "json", "--subnet-file"])
            .arg(node.run_dir.join("subnet.env"))
            .output()
            .with_context(|| format!("run flannel-agent {command}"))?;
        serde_json::from_slice(&output.stdout).with_context(|| {
            format!(
                "flannel-agent {command} on {}: {}",
                node.name,
                String::from_utf8_lossy(&output.stderr).trim()
            )
        })
    }

    /// How to look around in the lab.
    pub fn how_to_enter(&self) -> String {
        let mut text =
            String::from("\nThe lab stays until Ctrl-C. To enter a node or a pod and look:\n");
        for node in self.lab.nodes() {
            let _ok = writeln!(
                text,
                "  {:8} nsenter --net={} bash",
                node.name,
                node.ns.path().display()
            );
        }
        for place in &self.pods {
            let _ok = writeln!(
                text,
                "  {:8} nsenter --net={} bash",
                place.label,
                place.pod.ns.path().display()
            );
        }
        let node = self.lab.node(0);
        let _ok = writeln!(
            text,
            "For example:\n  nsenter --net={} {} status --subnet-file {}",
            node.ns.path().display(),
            self.binary.display(),
            node.run_dir.join("subnet.env").display()
        );
        text
    }

    /// Stops the agents and the store; the namespaces go with the lab.
    pub fn stop(&mut self) {
        for agent in &self.agents {
            // Gone already is as good.
            let _gone = agent.sigterm();
        }
        self.agents.clear();
        self.etcd = None;
        self.kube = None;
    }
}

/// What the agent tells the CNI plugin.
pub(crate) struct Env {
    /// One of each family.
    pub(crate) subnets: Vec<Prefix>,
    pub(crate) mtu: u32,
}

pub(crate) fn read_env(path: &Path) -> anyhow::Result<Env> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let value = |key: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
            .with_context(|| format!("{} has no {key}", path.display()))
    };
    let keys = ["FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET"];
    let subnets = keys.into_iter().filter_map(|key| value(key).ok());
    let subnets: Vec<Prefix> = subnets.map(str::parse).collect::<anyhow::Result<_>>()?;
    anyhow::ensure!(!subnets.is_empty(), "{} has no subnet", path.display());
    Ok(Env {
        subnets,
        mtu: value("FLANNEL_MTU")?.parse()?,
    })
}

/// Waits in short steps, so that Ctrl-C is heard.
fn wait(
    what: &str,
    patience: Duration,
    mut ready: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut left = patience;
    loop {
        check_stop()?;
        match try_eventually(STEP, what, || ready().map_err(|error| format!("{error:#}"))) {
            Ok(()) => return Ok(()),
            Err(error) if left.is_zero() => bail!("waiting for {what}: {error}"),
            Err(_) => left = left.saturating_sub(STEP),
        }
    }
}

fn last_line(log: &str) -> String {
    log.lines().last().unwrap_or("no output").to_owned()
}

/// The agent to run: the one that was built for this program.
pub(crate) fn agent_binary() -> anyhow::Result<PathBuf> {
    beside("FLANNEL_AGENT", "flannel-agent")
}

/// The program that a variable names, or that lies beside this one.
fn beside(variable: &str, name: &str) -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        return Ok(path.into());
    }
    let own = std::env::current_exe().context("find this program")?;
    let beside = own.with_file_name(name);
    if !beside.exists() {
        bail!(
            "no program at {}: run it through `cargo xtask`, or set {variable}",
            beside.display()
        );
    }
    Ok(beside)
}
