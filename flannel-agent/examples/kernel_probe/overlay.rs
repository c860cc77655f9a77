//! Two agents and a plain kernel node, with pods: everybody reaches everybody, through eBPF, and still does while an agent is
//! replaced.

use std::{
    collections::BTreeSet,
    fmt, fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use aya::programs::{SchedClassifier, TcAttachType};
use flannel_agent::dataplane::{bpf::AttachMode, netlink::Netlink};
use flannel_core::{
    addr::IfIndex,
    lease::{LeaseAttrs, SubnetKey},
    plan::Hook,
};
use flannel_testkit::{
    AgentProcess, KernelNode, Lab, LabOptions, Node, Offloads, Pod, Subnet,
    traffic::{Amount, FloodPing, ping_once, tcp_transfer},
    try_eventually,
};
use serde_json::Value;

/// An emulated machine is slow, and on a busy host slower.
pub(crate) const PATIENCE: Duration = Duration::from_secs(40);
pub(crate) const PING: Duration = Duration::from_secs(2);
pub(crate) const MTU: u32 = 1450;
pub(crate) const NET_CONF: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
/// Bytes of a transfer. Enough for super-packets, which must be segmented after the encapsulation.
pub(crate) const STREAM: u64 = 2 << 20;
/// Part of it that eBPF must have carried: before it knows the next hop, the kernel does.
const MOST: u64 = STREAM / 4 * 3;
/// The node that has the kernel's device and no agent.
const KERNEL: usize = 2;

/// What the agents are told to use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Way {
    pub(crate) attach: AttachMode,
    /// `vxlan` or `veth`.
    pub(crate) device: &'static str,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} with a {} device", self.attach.as_str(), self.device)
    }
}

struct Overlay {
    // Dropped in order: agents before the namespaces they live in.
    agents: Vec<AgentProcess>,
    pods: Vec<Pod>,
    lab: Lab,
    leases: PathBuf,
    binary: PathBuf,
    way: Way,
}

/// Builds it, tries it, restarts an agent under traffic.
pub(crate) fn run(binary: &Path, way: Way) -> anyhow::Result<String> {
    let mut overlay = Overlay::start(binary, way)?;
    for (from, to) in [(0, 1), (1, 0), (0, KERNEL), (KERNEL, 1)] {
        overlay.ping(from, to)?;
    }
    let mut retransmits = 0;
    for (from, to) in [(0, 1), (1, KERNEL), (KERNEL, 0)] {
        let dropped = overlay.dropped(from)?;
        let (client, server) = (&overlay.pods[from], &overlay.pods[to]);
        let stats = tcp_transfer(&server.ns, server.ip, &client.ns, Amount::Bytes(STREAM))
            .with_context(|| format!("TCP from pod {} to pod {}", client.name, server.name))?;
        retransmits += stats.retransmits;
        let lost = overlay.dropped(from)? - dropped;
        ensure!(
            lost == 0,
            "the uplink of {} dropped {lost} packets of a TCP stream to {}",
            client.name,
            server.name
        );
    }
    let (sent, _) = overlay.check_path(0)?;
    let (passed_on, received) = overlay.check_path(1)?;
    ensure!(
        sent > MOST && received > MOST && passed_on > MOST,
        "a stream of {STREAM} bytes did not go through eBPF: {sent} sent, {received} received, {passed_on} sent to the kernel node"
    );
    let probes = overlay.restart()?;
    Ok(format!(
        "{retransmits} TCP segments sent twice, no loss in {probes} pings around a restart"
    ))
}

impl Overlay {
    fn start(binary: &Path, way: Way) -> anyhow::Result<Self> {
        let lab = Lab::new(LabOptions {
            nodes: 3,
            offloads: Offloads::Off,
            ..LabOptions::default()
        })
        .context("make the lab")?;
        let leases = lab.node(0).run_dir.join("leases");
        fs::create_dir_all(leases.join("subnets"))?;
        fs::write(leases.join("config"), NET_CONF)?;
        let kernel = KernelNode::set_up(lab.node(KERNEL))?;
        let (key, lease) = kernel.lease();
        fs::write(leases.join("subnets").join(key), lease.to_string())?;
        let mut overlay = Self {
            agents: Vec::new(),
            pods: Vec::new(),
            lab,
            leases,
            binary: binary.to_owned(),
            way,
        };
        for node in 0..KERNEL {
            let agent = overlay.spawn(node)?;
            overlay.agents.push(agent);
        }
        for agent in &mut overlay.agents {
            agent.wait_ready(PATIENCE)?;
        }
        overlay.introduce(&kernel)?;
        for node in overlay.lab.nodes() {
            let subnet = if node.name == overlay.lab.node(KERNEL).name {
                kernel.subnet
            } else {
                subnet_of(node)?
            };
            overlay.pods.push(node.add_pod(subnet, 2, MTU)?);
        }
        Ok(overlay)
    }

    fn spawn(&self, node: usize) -> anyhow::Result<AgentProcess> {
        let node = self.lab.node(node);
        let args = [
            "--lease-dir",
            &self.leases.display().to_string(),
            "--subnet-file",
            &subnet_file(node).display().to_string(),
            "--datapath=bpf",
            "--bpf-fast-path=established",
            &format!("--bpf-attach={}", self.way.attach.as_str()),
            &format!("--bpf-device={}", self.way.device),
        ];
        AgentProcess::spawn(node, &self.binary, &args, &[])
    }

    /// Tells the kernel node of the agents' leases, as upstream's daemon would.
    fn introduce(&self, kernel: &KernelNode) -> anyhow::Result<()> {
        let dir = self.leases.join("subnets");
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            let key = path.file_name().and_then(|name| name.to_str());
            let key = key.with_context(|| format!("name of {}", path.display()))?;
            if key.starts_with('.') || key == kernel.subnet.lease_key() {
                continue;
            }
            let subnet = key.parse::<SubnetKey>()?.v4;
            let subnet = subnet.with_context(|| format!("no IPv4 subnet in {key}"))?;
            let lease = LeaseAttrs::from_json(&fs::read_to_string(&path)?)?;
            let (Some(address), Some(data)) = (lease.public_ip, lease.v4) else {
                anyhow::bail!("incomplete lease {key}");
            };
            kernel.add_peer(
                (subnet.network(), subnet.prefix_len()),
                data.mac.octets(),
                address,
            )?;
        }
        Ok(())
    }

    fn ping(&self, from: usize, to: usize) -> anyhow::Result<()> {
        let (from, to) = (&self.pods[from], &self.pods[to]);
        let what = format!("ping from pod {} to pod {}", from.name, to.name);
        let outcome = try_eventually(PATIENCE, &what, || ping_once(&from.ns, to.ip, PING));
        outcome.map(drop).with_context(|| self.logs())
    }

    fn logs(&self) -> String {
        let logs = self.agents.iter().map(AgentProcess::log);
        logs.collect::<Vec<_>>().join("\n--\n")
    }

    /// Packets that the uplink of a node has not sent.
    fn dropped(&self, node: usize) -> anyhow::Result<u64> {
        let link = self.lab.node(node).ns.ip("-j -s link show dev eth0")?;
        let link: Value = serde_json::from_str(&link)?;
        link[0]["stats64"]["tx"]["dropped"]
            .as_u64()
            .with_context(|| format!("no count of dropped packets in {link}"))
    }

    /// What carries the traffic of a node is attached the wanted way, and has carried the streams that agents exchange. Gives the
    /// bytes that left and entered.
    fn check_path(&self, node: usize) -> anyhow::Result<(u64, u64)> {
        let node = self.lab.node(node);
        let mut command = node.ns.command(&self.binary);
        command.args(["status", "-o", "json", "--subnet-file"]);
        let output = command.arg(subnet_file(node)).output();
        let output = output.context("run the agent")?;
        let status: Value = serde_json::from_slice(&output.stdout)
            .with_context(|| format!("status: {}", String::from_utf8_lossy(&output.stderr)))?;
        let path = &status["datapath"];
        let attached: Vec<&str> = Hook::BASE.iter().map(|hook| hook.as_str()).collect();
        ensure!(
            path["attach"] == self.way.attach.as_str()
                && path["attached"] == serde_json::json!(attached)
                && status["device"]["kind"] == self.way.device,
            "expected {}: {path}, {}",
            self.way,
            status["device"]
        );
        println!("{}: {}", node.name, status["counters"]);
        let fast = &status["fast_path"];
        let past = |way: &str| fast["counters"][way]["bytes"].as_u64().unwrap_or(0);
        println!("{}: {fast}", node.name);
        ensure!(
            fast["mode"] == "established" && past("encap") > 0 && past("decap") > 0,
            "nothing went past the stack: {fast}"
        );
        let count = |way: &str| status["counters"][way]["bytes"].as_u64().unwrap_or(0);
        Ok((count("encap"), count("decap")))
    }

    /// Kills an agent and starts another, while a pod of its node pings. The programs are replaced in place.
    fn restart(&mut self) -> anyhow::Result<u64> {
        let before = self.programs()?;
        let flood = FloodPing::start(&self.pods[0].ns, self.pods[1].ip, Duration::from_millis(20))?;
        self.agents[0].sigkill();
        self.agents[0] = self.spawn(0)?;
        let replaced = try_eventually(PATIENCE, "the new agent replaces the programs", || {
            let now = self.programs()?;
            ensure!(
                now.len() == Hook::BASE.len() && now.is_disjoint(&before),
                "programs {now:?}, before {before:?}"
            );
            Ok(())
        });
        let stats = flood.stop()?;
        replaced.with_context(|| self.agents[0].log())?;
        ensure!(
            stats.lost == 0 && stats.duplicates == 0,
            "a restart cost packets: {stats:?}"
        );
        Ok(stats.sent)
    }

    /// The ids of the programs at the two hooks of the first node.
    fn programs(&self) -> anyhow::Result<BTreeSet<u32>> {
        let ns = &self.lab.node(0).ns;
        let mut ids = BTreeSet::new();
        for (hook, name, side) in [
            (Hook::ToOverlay, "flannel.1", TcAttachType::Egress),
            (Hook::FromWire, "eth0", TcAttachType::Ingress),
        ] {
            if self.way.attach == AttachMode::Tcx {
                let (_, found) = ns.try_run(|| SchedClassifier::query_tcx(name, side))??;
                ids.extend(found.iter().map(aya::programs::ProgramInfo::id));
            } else {
                let index = IfIndex::try_from(ns.ifindex(name)?)?;
                ids.extend(ns.try_run(|| filter(hook, index))??);
            }
        }
        Ok(ids)
    }
}

fn filter(hook: Hook, index: IfIndex) -> anyhow::Result<Option<u32>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async { Ok(Netlink::open()?.filter_program(hook, index).await?) })
}

pub(crate) fn subnet_file(node: &Node) -> PathBuf {
    node.run_dir.join("subnet.env")
}

pub(crate) fn subnet_of(node: &Node) -> anyhow::Result<Subnet> {
    let file = subnet_file(node);
    let text = fs::read_to_string(&file)?;
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix("FLANNEL_SUBNET="))
        .with_context(|| format!("no subnet in {}", file.display()))?;
    let subnet: Subnet = value.parse()?;
    ensure!(
        subnet.base() != Ipv4Addr::UNSPECIFIED,
        "no subnet in {}",
        file.display()
    );
    Ok(subnet)
}
