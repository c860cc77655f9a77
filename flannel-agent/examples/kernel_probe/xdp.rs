//! Two agents whose uplinks are network cards: native XDP is attached without being asked for, runs, and what it strips is merged.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use flannel_testkit::{
    AgentProcess, Lab, LabOptions, Node, Pod,
    traffic::{Amount, ping_once, tcp_transfer},
    try_eventually,
};
use serde_json::Value;

use crate::overlay::{MTU, NET_CONF, PATIENCE, PING, STREAM, subnet_file, subnet_of};

/// Name of a node's card.
const CARD: &str = "hw0";
/// Frames that a stream takes at least.
const FRAMES: u64 = STREAM / 1500;

/// Builds it and sends a stream.
pub(crate) fn run(binary: &Path) -> anyhow::Result<String> {
    let lab = Lab::new(LabOptions {
        nodes: 2,
        ..LabOptions::default()
    })
    .context("make the lab")?;
    hand_out_cards(&lab)?;
    let leases = lab.node(0).run_dir.join("leases");
    fs::create_dir_all(leases.join("subnets"))?;
    fs::write(leases.join("config"), NET_CONF)?;
    let mut agents = Vec::new();
    for node in lab.nodes() {
        agents.push(spawn(node, binary, &leases)?);
    }
    let mut pods: Vec<Pod> = Vec::new();
    for (node, agent) in lab.nodes().iter().zip(&mut agents) {
        agent.wait_ready(PATIENCE)?;
        pods.push(node.add_pod(subnet_of(node)?, 2, MTU)?);
    }
    let outcome = carry(&lab, binary, &pods);
    outcome.with_context(|| {
        let logs = agents.iter().map(AgentProcess::log);
        logs.collect::<Vec<_>>().join("\n--\n")
    })
}

fn carry(lab: &Lab, binary: &Path, pods: &[Pod]) -> anyhow::Result<String> {
    let [client, server] = pods else {
        anyhow::bail!("{} pods", pods.len());
    };
    try_eventually(PATIENCE, "a ping", || {
        ping_once(&client.ns, server.ip, PING)
    })?;
    // The next hops are known: from here on eBPF has every packet.
    let before = counters(&status(lab.node(1), binary)?)?;
    let stats = tcp_transfer(&server.ns, server.ip, &client.ns, Amount::Bytes(STREAM))?;
    let status = try_eventually(PATIENCE, "status says that it runs", || {
        let status = status(lab.node(1), binary)?;
        let xdp = &status["datapath"]["xdp"];
        let reason = xdp["reason"].as_str().unwrap_or_default();
        ensure!(
            xdp["wanted"] == "auto" && xdp["attached"] == true && reason.contains("strips"),
            "{xdp}"
        );
        Ok(status)
    })?;
    let now = counters(&status)?;
    let (stripped, received) = (now.0 - before.0, now.1 - before.1);
    ensure!(
        stripped > FRAMES,
        "native XDP has stripped {stripped} packets of a stream of {FRAMES} at least"
    );
    ensure!(
        received < stripped,
        "nothing was merged: {stripped} packets stripped, {received} received"
    );
    Ok(format!(
        "{stripped} packets stripped, {received} after merging, {} TCP segments sent twice",
        stats.retransmits
    ))
}

/// Packets stripped, and packets received.
fn counters(status: &Value) -> anyhow::Result<(u64, u64)> {
    let counters = &status["counters"];
    let packets = |what: &str| {
        let count = counters[what]["packets"].as_u64();
        count.with_context(|| format!("no {what} in {counters}"))
    };
    Ok((packets("xdp")?, packets("decap")?))
}

fn status(node: &Node, binary: &Path) -> anyhow::Result<Value> {
    let mut command = node.ns.command(binary);
    command.args(["status", "-o", "json", "--subnet-file"]);
    let output = command.arg(subnet_file(node)).output();
    let output = output.context("run the agent")?;
    serde_json::from_slice(&output.stdout)
        .with_context(|| format!("status: {}", String::from_utf8_lossy(&output.stderr)))
}

fn spawn(node: &Node, binary: &Path, leases: &Path) -> anyhow::Result<AgentProcess> {
    let args = [
        "--lease-dir",
        &leases.display().to_string(),
        "--subnet-file",
        &subnet_file(node).display().to_string(),
        "--datapath=bpf",
        &format!("--iface={CARD}"),
    ];
    AgentProcess::spawn(node, binary, &args, &[])
}

/// Gives each node a card of this machine, with an address.
fn hand_out_cards(lab: &Lab) -> anyhow::Result<()> {
    let cards = cards()?;
    ensure!(
        cards.len() == lab.nodes().len(),
        "{} network cards: {cards:?}",
        cards.len()
    );
    for (host, (node, card)) in (1..).zip(lab.nodes().iter().zip(&cards)) {
        // Every node has an eth0 of its own.
        for line in [
            format!("link set {card} down"),
            format!("link set {card} name {CARD}"),
            format!("link set {CARD} netns {}", node.ns.name()),
        ] {
            ip(&line)?;
        }
        let host: u8 = host;
        for line in [
            format!("addr add 192.168.79.{host}/24 dev {CARD}"),
            format!("link set {CARD} up"),
        ] {
            node.ns.ip(&line)?;
        }
    }
    let far = [192, 168, 79, 2].into();
    try_eventually(PATIENCE, "the cards are connected", || {
        ping_once(&lab.node(0).ns, far, Duration::from_secs(1))
    })?;
    Ok(())
}

/// Names of the interfaces that have a device behind them.
fn cards() -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/class/net")? {
        let path: PathBuf = entry?.path();
        if path.join("device").exists() {
            let name = path.file_name().and_then(|name| name.to_str());
            found.push(name.context("the name of a card")?.to_owned());
        }
    }
    found.sort();
    Ok(found)
}

fn ip(line: &str) -> anyhow::Result<()> {
    let status = std::process::Command::new("ip")
        .args(line.split(' '))
        .status()
        .context("run ip")?;
    ensure!(status.success(), "ip {line}: {status}");
    Ok(())
}
