//! Agents in a lab that keep their leases in a real etcd, which is a host of its own on the underlay. What they did is read with
//! `etcdctl`, `ip`, `bridge` and `bpftool`.

#![allow(dead_code, reason = "every test binary uses a part of it")]

use std::{
    collections::BTreeMap,
    fs,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use flannel_testkit::{
    AgentProcess, Etcd, Lab, LabOptions, Netns, Pod, Subnet, eventually, json, process,
    traffic::FloodPing,
};
use serde_json::Value;

use crate::rig::{
    DEVICE, PATIENCE, Peer, agent_binary,
    agents::{Agents, with_agents},
    kernel_peers, list,
};

/// Where flannel's keys are.
pub(crate) const PREFIX: &str = "/coreos.com/network";
/// The network configuration unless a test says otherwise.
pub(crate) const NET_CONF: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
/// Host number of etcd on the underlay; its port on the switch is `h200`.
const ETCD_HOST: u8 = 200;

/// Nodes, their agents and an etcd. Everything is ended and removed when it is dropped.
pub(crate) struct EtcdRig {
    pub(crate) agents: Agents,
    pods: BTreeMap<usize, Pod>,
    pub(crate) etcd: Etcd,
    pub(crate) lab: Lab,
}

impl EtcdRig {
    /// Nodes without agents, and an etcd that has the network configuration.
    pub(crate) fn new(nodes: u8, net_conf: &str) -> EtcdRig {
        let options = LabOptions {
            nodes,
            ..LabOptions::default()
        };
        let lab = Lab::new(options).expect("a lab");
        let host = lab.host("etcd", ETCD_HOST).expect("a host for etcd");
        let ip = Ipv4Addr::new(192, 168, 77, ETCD_HOST);
        let etcd = Etcd::start(Some(&host), ip).expect("etcd");
        let rig = EtcdRig {
            agents: Agents::default(),
            pods: BTreeMap::new(),
            etcd,
            lab,
        };
        rig.put("config", net_conf);
        rig
    }

    /// Nodes whose agents hold their [`flannel_testkit::Node::subnet`] and know each other, and a pod on each.
    pub(crate) fn start(nodes: u8, flags: &[&str]) -> EtcdRig {
        let mut rig = EtcdRig::new(nodes, NET_CONF);
        for node in 0..usize::from(nodes) {
            rig.prefer(node, rig.lab.node(node).subnet);
            rig.start_agent(node, flags);
        }
        for node in 0..usize::from(nodes) {
            rig.wait_ready(node);
            let pod = rig.lab.node(node).add_pod(rig.subnet(node), 2, 1450);
            rig.pods.insert(node, pod.expect("a pod"));
        }
        rig.wait_converged();
        rig
    }

    #[track_caller]
    pub(crate) fn ns(&self, node: usize) -> &Netns {
        &self.lab.node(node).ns
    }

    /// Makes the agent of a node prefer a subnet, as the `subnet.env` of an earlier run does.
    pub(crate) fn prefer(&self, node: usize, subnet: Subnet) {
        let text = format!(
            "FLANNEL_SUBNET={}/{}\n",
            subnet.gateway(),
            subnet.prefix_len()
        );
        fs::write(self.lab.node(node).run_dir.join("subnet.env"), text).expect("write subnet.env");
    }

    pub(crate) fn start_agent(&mut self, node: usize, flags: &[&str]) {
        let place = self.lab.node(node);
        let common = [
            format!("--etcd-endpoints={}", self.etcd.endpoint()),
            format!(
                "--subnet-file={}",
                place.run_dir.join("subnet.env").display()
            ),
        ];
        let flags: Vec<&str> = common
            .iter()
            .map(String::as_str)
            .chain(flags.iter().copied())
            .collect();
        let agent = AgentProcess::spawn(place, agent_binary(), &flags, &[]).expect("an agent");
        self.agents.insert(node, agent);
    }

    /// Ends an agent with a signal, and gives its exit code, which must come within the two seconds that it has.
    #[track_caller]
    pub(crate) fn stop_agent(&mut self, node: usize, signal: i32) -> i32 {
        self.agents.end(node, signal, Duration::from_secs(2))
    }

    /// Takes etcd's host off the wire, or puts it back. `etcdctl` reaches it all the same.
    pub(crate) fn connect_etcd(&self, connected: bool) {
        let state = if connected { "up" } else { "down" };
        let line = format!("link set h{ETCD_HOST} {state}");
        self.lab
            .underlay()
            .ip(&line)
            .expect("set the port of etcd's host");
    }

    /// Writes `<prefix>/<name>`.
    #[track_caller]
    pub(crate) fn put(&self, name: &str, value: &str) {
        self.etcd
            .put(&format!("{PREFIX}/{name}"), value)
            .expect("put a key");
    }

    /// Writes the lease of a node that does not exist.
    #[track_caller]
    pub(crate) fn put_lease(&self, subnet: &str, public_ip: &str, mac: &str) {
        self.put(&format!("subnets/{subnet}"), &value(public_ip, 1, mac));
    }

    /// Names and values below `<prefix>/subnets/`.
    #[track_caller]
    pub(crate) fn stored(&self) -> BTreeMap<String, String> {
        let prefix = format!("{PREFIX}/subnets/");
        let text = self
            .etcd
            .etcdctl(&["get", "--prefix", "--", &prefix])
            .expect("list the leases");
        let lines: Vec<&str> = text.lines().collect();
        lines
            .chunks(2)
            .map(|pair| (pair[0].replace(&prefix, ""), pair[1].to_owned()))
            .collect()
    }

    /// The leases in etcd.
    #[track_caller]
    pub(crate) fn leases(&self) -> BTreeMap<Subnet, Peer> {
        self.stored()
            .iter()
            .map(|(name, text)| {
                let value: Value = serde_json::from_str(text).expect("a lease");
                let field = |value: &Value| value.as_str().expect("a string").to_owned();
                let peer = Peer {
                    public_ip: field(&value["PublicIP"]),
                    mac: field(&value["BackendData"]["VtepMAC"]),
                };
                (name.replace('-', "/").parse().expect("a subnet"), peer)
            })
            .collect()
    }

    /// The revision of the last write of a lease and the etcd lease it is bound to.
    #[track_caller]
    pub(crate) fn revision_and_lease(&self, subnet: Subnet) -> Option<(i64, i64)> {
        let key = format!("{PREFIX}/subnets/{}", subnet.lease_key());
        let text = self.etcd.etcdctl(&["get", "-w", "json", "--", &key]);
        let answer: Value = serde_json::from_str(&text.expect("get a key")).expect("JSON");
        let kv = list(&answer["kvs"]).first()?;
        Some((
            kv["mod_revision"].as_i64()?,
            kv["lease"].as_i64().unwrap_or(0),
        ))
    }

    /// The subnet in a node's `subnet.env`.
    #[track_caller]
    pub(crate) fn subnet(&self, node: usize) -> Subnet {
        self.subnet_env(node)
            .lines()
            .find_map(|line| line.strip_prefix("FLANNEL_SUBNET="))
            .and_then(|subnet| subnet.parse().ok())
            .expect("FLANNEL_SUBNET")
    }

    #[track_caller]
    pub(crate) fn subnet_env(&self, node: usize) -> String {
        let file = self.lab.node(node).run_dir.join("subnet.env");
        fs::read_to_string(file).expect("read subnet.env")
    }

    /// The MAC address of a node's tunnel device.
    pub(crate) fn device_mac(&self, node: usize) -> anyhow::Result<String> {
        let link = json::link(self.ns(node), DEVICE)?;
        Ok(link["address"].as_str().unwrap_or_default().to_owned())
    }

    /// What the kernel of a node has of the others.
    pub(crate) fn kernel_peers(&self, node: usize) -> anyhow::Result<BTreeMap<Subnet, Peer>> {
        kernel_peers(self.ns(node)).map(|(_, peers)| peers)
    }

    /// What `status -o json` says of the lease store.
    #[track_caller]
    pub(crate) fn store_connected(&self, node: usize) -> bool {
        let place = self.lab.node(node);
        let file = place.run_dir.join("subnet.env");
        let mut command = place.ns.command(agent_binary());
        command.args(["status", "-o", "json", "--subnet-file"]);
        let done = process::finish(command.arg(file), PATIENCE).expect("status");
        let status: Value = serde_json::from_str(&done.stdout).expect("JSON");
        status["lease"]["store_connected"]
            .as_bool()
            .expect("store_connected")
    }

    /// Fails if a node has no route to a peer, or one that leads elsewhere.
    #[track_caller]
    pub(crate) fn assert_peer(&self, node: usize, subnet: Subnet, peer: &Peer, when: &str) {
        let ns = self.ns(node);
        let entries = [
            (
                json::ip_json(ns, &["route", "show", "dev", DEVICE]),
                [
                    ("dst", subnet.to_string()),
                    ("gateway", subnet.base().to_string()),
                ],
            ),
            (
                json::ip_json(ns, &["neigh", "show", "dev", DEVICE]),
                [
                    ("dst", subnet.base().to_string()),
                    ("lladdr", peer.mac.clone()),
                ],
            ),
            (
                json::bridge_json(ns, &["fdb", "show", "dev", DEVICE]),
                [("mac", peer.mac.clone()), ("dst", peer.public_ip.clone())],
            ),
        ];
        for (have, want) in entries {
            let have = have.expect("what the kernel has");
            assert!(
                list(&have)
                    .iter()
                    .any(|entry| want.iter().all(|(field, value)| entry[*field] == **value)),
                "node {node} lost {want:?} after {when}: {have}"
            );
        }
    }

    /// Waits until every node with an agent has exactly the peers that etcd has.
    #[track_caller]
    pub(crate) fn wait_converged(&self) {
        self.wait_peers(&self.leases());
    }

    /// Waits until every node with an agent has all of `leases` but its own, and nothing else.
    #[track_caller]
    pub(crate) fn wait_peers(&self, leases: &BTreeMap<Subnet, Peer>) {
        for node in self.agents.nodes() {
            let mut want = leases.clone();
            want.remove(&self.subnet(node));
            eventually(PATIENCE, &format!("node {node} has its peers"), || {
                let have = self
                    .kernel_peers(node)
                    .map_err(|error| format!("{error:#}"))?;
                if have == want {
                    return Ok(());
                }
                Err(format!("it has {have:?}, wanted {want:?}"))
            });
        }
    }

    /// Waits until the record of a peer's MAC address is (or is not any more) in the eBPF maps of a node.
    #[track_caller]
    pub(crate) fn wait_map(&self, node: usize, mac: &str, wanted: bool) {
        let cookie = self.ns(node).cookie().expect("cookie");
        let vni = 1.try_into().expect("a VNI");
        let pin = format!(
            "{}/maps-v{}/nodes",
            flannel_core::mark::instance_path(cookie, vni),
            flannel_common::LAYOUT_VERSION
        );
        let bytes: Vec<String> = mac.split(':').map(|byte| format!("0x{byte}")).collect();
        eventually(PATIENCE, "the map of nodes follows", || {
            let dump = json::bpftool_json(self.ns(node), &["map", "dump", "pinned", &pin])
                .map_err(|error| format!("{error:#}"))?;
            let found = list(&dump).iter().any(|entry| {
                let value: Vec<&str> = list(&entry["value"])
                    .iter()
                    .filter_map(Value::as_str)
                    .collect();
                value.windows(bytes.len()).any(|window| *window == *bytes)
            });
            if found == wanted {
                return Ok(());
            }
            Err(format!("{mac} in {pin}: {found}"))
        });
    }

    /// A probe each millisecond from the pod of one node to that of another.
    #[track_caller]
    pub(crate) fn flood(&self, from: usize, to: usize) -> FloodPing {
        FloodPing::start(
            &self.pods[&from].ns,
            self.pods[&to].ip,
            Duration::from_millis(1),
        )
        .expect("a flood of probes")
    }
}

with_agents!(EtcdRig);

/// A lease as upstream writes it.
pub(crate) fn value(public_ip: &str, vni: u32, mac: &str) -> String {
    format!(
        r#"{{"PublicIP":"{public_ip}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":{vni},"VtepMAC":"{mac}"}}}}"#
    )
}

/// Ends a flood, of which nothing may have been lost.
#[track_caller]
pub(crate) fn lossless(flood: FloodPing) {
    let stats = flood.stop().expect("the account of a flood");
    assert!(stats.sent > 0 && stats.lost == 0, "{stats:?}");
}

/// Looks again and again for `time`; `look` panics when something is wrong.
#[track_caller]
pub(crate) fn hold(time: Duration, mut look: impl FnMut()) {
    let start = Instant::now();
    eventually(time + PATIENCE, "time passes", || {
        look();
        (start.elapsed() >= time).then_some(()).ok_or("too early")
    });
}
