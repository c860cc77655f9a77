//! The nodes, their agents and pods.

use std::{
    fmt::Write as _,
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail};
use clap::ValueEnum;
use flannel_testkit::{
    AgentProcess, Etcd, Lab, LabOptions, Node, Offloads, Pod, Subnet, try_eventually,
};
use serde_json::Value;

use crate::{check_stop, progress};

const NET_CONF: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
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
}

/// What to build.
#[derive(Clone, Debug)]
pub struct Options {
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

/// A running overlay. Fields are dropped in order: agents before the namespaces they live in.
#[derive(Debug)]
pub struct Cluster {
    agents: Vec<AgentProcess>,
    /// All pods, node by node.
    pub pods: Vec<Place>,
    etcd: Option<Etcd>,
    binary: PathBuf,
    /// The lab.
    pub lab: Lab,
}

impl Cluster {
    /// Starts everything and waits until every node has programmed every other.
    pub fn start(args: &Options) -> anyhow::Result<Self> {
        let binary = agent_binary()?;
        progress(&format!("making {} nodes", args.nodes));
        let lab = Lab::new(LabOptions {
            nodes: args.nodes,
            offloads: args.offloads,
            ..LabOptions::default()
        })
        .context("make the lab")?;
        let mut cluster = Self {
            agents: Vec::new(),
            pods: Vec::new(),
            etcd: None,
            binary,
            lab,
        };
        let flags = cluster.start_store(args.store)?;
        cluster.start_agents(args, &flags)?;
        cluster.add_pods(args.pods)?;
        cluster.wait_for_peers()?;
        Ok(cluster)
    }

    /// Starts the store and returns the flags that lead to it.
    fn start_store(&mut self, store: StoreChoice) -> anyhow::Result<Vec<String>> {
        check_stop()?;
        match store {
            StoreChoice::Dir => {
                let run_dir = &self.lab.node(0).run_dir;
                let dir = run_dir.parent().unwrap_or(run_dir).join("leases");
                fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
                let config = dir.join("config");
                fs::write(&config, NET_CONF)
                    .with_context(|| format!("write {}", config.display()))?;
                Ok(vec!["--lease-dir".into(), dir.display().to_string()])
            }
            StoreChoice::Etcd => {
                progress("starting etcd");
                let etcd =
                    Etcd::start(Some(self.lab.underlay()), Lab::GATEWAY).context("start etcd")?;
                etcd.put(&format!("{PREFIX}/config"), NET_CONF)?;
                let flags = vec![
                    "--etcd-endpoints".into(),
                    etcd.endpoint(),
                    "--etcd-prefix".into(),
                    PREFIX.into(),
                ];
                self.etcd = Some(etcd);
                Ok(flags)
            }
        }
    }

    fn start_agents(&mut self, args: &Options, flags: &[String]) -> anyhow::Result<()> {
        progress(&format!("starting {} agents", args.nodes));
        for node in self.lab.nodes() {
            check_stop()?;
            let subnet_file = node.run_dir.join("subnet.env").display().to_string();
            let mut argv = vec!["--subnet-file", &subnet_file, "--datapath", &args.datapath];
            argv.extend(flags.iter().map(String::as_str));
            let agent = AgentProcess::spawn(node, &self.binary, &argv, &[])
                .with_context(|| format!("start the agent of {}", node.name))?;
            self.agents.push(agent);
        }
        for (node, agent) in self.lab.nodes().iter().zip(&mut self.agents) {
            wait(&format!("the agent of {}", node.name), || {
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

    fn add_pods(&mut self, count: u8) -> anyhow::Result<()> {
        progress(&format!("adding {count} pods to each node"));
        for (index, node) in self.lab.nodes().iter().enumerate() {
            let env = read_env(&node.run_dir.join("subnet.env"))?;
            for number in 0..count {
                check_stop()?;
                let pod = node.add_pod(env.subnet, u32::from(number) + 2, env.mtu)?;
                self.pods.push(Place {
                    label: format!("{}/{}", node.name, pod.ip),
                    node: index,
                    pod,
                });
            }
        }
        Ok(())
    }

    /// Until every agent has programmed every other node.
    fn wait_for_peers(&self) -> anyhow::Result<()> {
        let others = self.lab.nodes().len().saturating_sub(1);
        progress("waiting until every node knows every other");
        for node in self.lab.nodes() {
            wait(&format!("{} to know its peers", node.name), || {
                let peers = self.ask(node, "peers")?;
                let complete =
                    |peer: &&Value| peer["kernel_complete"] == true || peer["path"] == "bpf";
                let known = peers
                    .as_array()
                    .map_or(0, |peers| peers.iter().filter(complete).count());
                if known < others {
                    bail!("{known} of {others}");
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Packets that eBPF encapsulated and decapsulated on a node so far.
    pub fn counters(&self, node: usize) -> anyhow::Result<(u64, u64)> {
        let status = self.ask(self.lab.node(node), "status")?;
        let count = |direction: &str| {
            status["counters"][direction]["packets"]
                .as_u64()
                .unwrap_or(0)
        };
        Ok((count("encap"), count("decap")))
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
    }
}

struct Env {
    subnet: Subnet,
    mtu: u32,
}

fn read_env(path: &Path) -> anyhow::Result<Env> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let value = |key: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
            .with_context(|| format!("{} has no {key}", path.display()))
    };
    let (ip, len) = value("FLANNEL_SUBNET")?
        .split_once('/')
        .context("FLANNEL_SUBNET has no length")?;
    Ok(Env {
        subnet: Subnet::new(ip.parse::<Ipv4Addr>()?, len.parse()?),
        mtu: value("FLANNEL_MTU")?.parse()?,
    })
}

/// Waits in short steps, so that Ctrl-C is heard.
fn wait(what: &str, mut ready: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let mut left = READY;
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
fn agent_binary() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("FLANNEL_AGENT") {
        return Ok(path.into());
    }
    let own = std::env::current_exe().context("find this program")?;
    let beside = own.with_file_name("flannel-agent");
    if !beside.exists() {
        bail!(
            "no agent at {}: run it through `cargo xtask`, or set FLANNEL_AGENT",
            beside.display()
        );
    }
    Ok(beside)
}
