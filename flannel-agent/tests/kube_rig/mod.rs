//! Agents in a lab that keep their leases in the Kubernetes API, which is a host of its own on the underlay. What they did is read
//! with `ip`, `bridge` and `bpftool`, and from what the API has stored.

#![allow(dead_code, reason = "every test binary uses a part of it")]

mod traffic;

use std::{
    collections::BTreeMap,
    fs,
    net::Ipv4Addr,
    path::PathBuf,
    time::{Duration, Instant},
};

use flannel_testkit::{
    AgentProcess, ApiServer, Cluster, Lab, LabOptions, Netns, Pod, Subnet, eventually, json,
    process,
};
use serde_json::Value;

pub(crate) use traffic::Traffic;

use crate::rig::{
    DEVICE, PATIENCE, Peer, agent_binary,
    agents::{Agents, with_agents},
    kernel_peers, list,
};

/// The prefix of flannel's annotations.
pub(crate) const PREFIX: &str = "flannel.alpha.coreos.com";
/// The network of the tests, as in what upstream printed.
pub(crate) const NET_CONF: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;
/// Host number of the API server on the underlay; its port on the switch is `h200`.
const API_HOST: u8 = 200;

/// Nodes, their agents and an API. Everything is ended and removed when it is dropped.
pub(crate) struct KubeRig {
    pub(crate) agents: Agents,
    pods: BTreeMap<usize, Pod>,
    pub(crate) cluster: Cluster,
    pub(crate) lab: Lab,
    net_conf: PathBuf,
    /// Environment of the agents besides `NODE_NAME`.
    pub(crate) env: Vec<(String, String)>,
}

impl KubeRig {
    /// Machines, an API, and no Node object yet.
    pub(crate) fn new(nodes: u8, net_conf: &str) -> KubeRig {
        let options = LabOptions {
            nodes,
            network: Subnet::new(Ipv4Addr::new(10, 5, 0, 0), 16),
            ..LabOptions::default()
        };
        let lab = Lab::new(options).expect("a lab");
        let host = lab.host("kube", API_HOST).expect("a host for the API");
        let ip = Ipv4Addr::new(192, 168, 77, API_HOST);
        let cluster = Cluster::start(&host, ip).expect("a Kubernetes API");
        let file = lab.node(0).run_dir.join("net-conf.json");
        fs::write(&file, net_conf).expect("write net-conf.json");
        KubeRig {
            agents: Agents::default(),
            pods: BTreeMap::new(),
            cluster,
            lab,
            net_conf: file,
            env: Vec::new(),
        }
    }

    /// Nodes whose agents know each other, and a pod on each.
    pub(crate) fn start(nodes: u8, flags: &[&str]) -> KubeRig {
        let mut rig = KubeRig::new(nodes, NET_CONF);
        for node in 0..usize::from(nodes) {
            rig.create_node(node);
            rig.start_agent(node, flags);
        }
        for node in 0..usize::from(nodes) {
            rig.wait_ready(node);
            rig.add_pod(node);
        }
        rig.wait_converged();
        rig
    }

    #[track_caller]
    pub(crate) fn ns(&self, node: usize) -> &Netns {
        &self.lab.node(node).ns
    }

    /// The lab's own server, with its faults.
    #[track_caller]
    pub(crate) fn api(&self) -> &ApiServer {
        self.cluster.fake()
    }

    /// The name of a node's Node object.
    pub(crate) fn name(&self, node: usize) -> String {
        format!("{}n{node}", self.lab.prefix())
    }

    /// What the cluster assigns to a node at first.
    pub(crate) fn subnet(&self, node: usize) -> Subnet {
        self.lab.node(node).subnet
    }

    /// Makes the Node object of a node.
    #[track_caller]
    pub(crate) fn create_node(&self, node: usize) {
        self.create_node_with(node, self.subnet(node));
    }

    /// Makes the Node object of a node with another subnet than its usual one.
    #[track_caller]
    pub(crate) fn create_node_with(&self, node: usize, subnet: Subnet) {
        let made = self
            .cluster
            .create_node(&self.name(node), &subnet.to_string());
        made.expect("a Node object");
    }

    #[track_caller]
    pub(crate) fn delete_node(&self, node: usize) {
        let gone = self.cluster.delete_node(&self.name(node));
        gone.expect("a Node object to delete");
    }

    /// Makes the Node object of a node that does not exist, as upstream's agent leaves it.
    #[track_caller]
    pub(crate) fn create_stranger(&self, name: &str, subnet: &str, public_ip: &str, mac: &str) {
        self.cluster
            .create_node(name, subnet)
            .expect("a Node object");
        self.publish(name, public_ip, mac);
    }

    /// Writes the annotations that upstream's agent writes.
    #[track_caller]
    pub(crate) fn publish(&self, name: &str, public_ip: &str, mac: &str) {
        let data = format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#);
        let annotations = [
            ("backend-data", data.as_str()),
            ("backend-type", "vxlan"),
            ("kube-subnet-manager", "true"),
            ("public-ip", public_ip),
        ]
        .map(|(key, value)| (format!("{PREFIX}/{key}"), value));
        let annotations: Vec<(&str, Option<&str>)> = annotations
            .iter()
            .map(|(key, value)| (key.as_str(), Some(*value)))
            .collect();
        let written = self.cluster.annotate(name, &annotations);
        written.expect("annotations");
    }

    pub(crate) fn start_agent(&mut self, node: usize, flags: &[&str]) {
        let place = self.lab.node(node);
        let kubeconfig = place.run_dir.join("kubeconfig");
        fs::write(&kubeconfig, self.cluster.kubeconfig()).expect("write a kubeconfig");
        let common = [
            "--kube-subnet-mgr".to_owned(),
            "--ip-masq".to_owned(),
            format!("--kubeconfig-file={}", kubeconfig.display()),
            format!("--net-config-path={}", self.net_conf.display()),
            format!("--subnet-file={}", self.subnet_file(node).display()),
        ];
        let flags: Vec<&str> = common
            .iter()
            .map(String::as_str)
            .chain(flags.iter().copied())
            .collect();
        let name = self.name(node);
        let mut env = vec![("NODE_NAME", name.as_str())];
        env.extend(
            self.env
                .iter()
                .map(|(name, value)| (name.as_str(), value.as_str())),
        );
        let agent = AgentProcess::spawn(place, agent_binary(), &flags, &env).expect("an agent");
        self.agents.insert(node, agent);
    }

    pub(crate) fn subnet_file(&self, node: usize) -> PathBuf {
        self.lab.node(node).run_dir.join("subnet.env")
    }

    #[track_caller]
    pub(crate) fn subnet_env(&self, node: usize) -> String {
        fs::read_to_string(self.subnet_file(node)).expect("read subnet.env")
    }

    #[track_caller]
    pub(crate) fn add_pod(&mut self, node: usize) {
        let pod = self.lab.node(node).add_pod(self.subnet(node), 2, 1450);
        self.pods.insert(node, pod.expect("a pod"));
    }

    pub(crate) fn pod(&self, node: usize) -> &Pod {
        &self.pods[&node]
    }

    /// Asks an agent to stop; it must end well.
    #[track_caller]
    pub(crate) fn stop_agent(&mut self, node: usize) {
        assert_eq!(self.agents.end(node, libc::SIGTERM, PATIENCE), 0);
    }

    /// Takes the API's host off the wire, or puts it back: packets to it go nowhere.
    pub(crate) fn connect_api(&self, connected: bool) {
        let state = if connected { "up" } else { "down" };
        let line = format!("link set h{API_HOST} {state}");
        let done = self.lab.underlay().ip(&line);
        done.expect("set the port of the API's host");
    }

    /// The annotations of a node's Node object.
    #[track_caller]
    pub(crate) fn annotations(&self, node: usize) -> BTreeMap<String, String> {
        self.cluster
            .annotations(&self.name(node))
            .expect("annotations")
    }

    /// The leases that the Node objects are.
    #[track_caller]
    pub(crate) fn leases(&self) -> BTreeMap<Subnet, Peer> {
        let nodes = self.cluster.nodes().expect("the list of nodes");
        nodes.iter().filter_map(lease_of).collect()
    }

    /// The MAC address of a node's tunnel device.
    #[track_caller]
    pub(crate) fn device_mac(&self, node: usize) -> String {
        let link = json::link(self.ns(node), DEVICE).expect("the tunnel device");
        link["address"].as_str().expect("a MAC address").to_owned()
    }

    /// What the kernel of a node has of the others.
    pub(crate) fn kernel_peers(&self, node: usize) -> anyhow::Result<BTreeMap<Subnet, Peer>> {
        kernel_peers(self.ns(node)).map(|(_, peers)| peers)
    }

    /// `status -o json`.
    #[track_caller]
    pub(crate) fn status(&self, node: usize) -> Value {
        let mut command = self.ns(node).command(agent_binary());
        command.args(["status", "-o", "json", "--subnet-file"]);
        let done = process::finish(command.arg(self.subnet_file(node)), PATIENCE).expect("status");
        serde_json::from_str(&done.stdout).expect("JSON")
    }

    /// Waits until an agent does, or does not, see the API.
    #[track_caller]
    pub(crate) fn wait_store(&self, node: usize, connected: bool) {
        eventually(PATIENCE, "the state of the store", || {
            let status = self.status(node);
            let seen = &status["lease"]["store_connected"];
            (*seen == connected).then_some(()).ok_or(status.to_string())
        });
    }

    /// Waits until every node with an agent has exactly the peers that the API has.
    #[track_caller]
    pub(crate) fn wait_converged(&self) {
        for node in self.agents.nodes() {
            eventually(PATIENCE, &format!("node {node} has its peers"), || {
                self.converged(node, &self.leases())
            });
        }
    }

    /// Whether a node has all of `leases` but its own, and nothing else, in the kernel and in the eBPF maps.
    pub(crate) fn converged(
        &self,
        node: usize,
        leases: &BTreeMap<Subnet, Peer>,
    ) -> Result<(), String> {
        let mut want = leases.clone();
        let own = self.subnet_env(node);
        let own = own
            .lines()
            .find_map(|line| line.strip_prefix("FLANNEL_SUBNET="))
            .and_then(|subnet| subnet.parse().ok())
            .ok_or(own.clone())?;
        want.remove(&own);
        let have = self
            .kernel_peers(node)
            .map_err(|error| format!("{error:#}"))?;
        if have != want {
            return Err(format!("it has {have:?}, wanted {want:?}"));
        }
        let Some(nodes) = self.map_text(node, "nodes") else {
            return Ok(());
        };
        for peer in want.values() {
            if !nodes.contains(&bytes_text(&peer.mac)) {
                return Err(format!("{peer:?} is not in the map"));
            }
        }
        Ok(())
    }

    /// What `bpftool` prints of a map as bytes, or nothing where eBPF carries no traffic.
    pub(crate) fn map_text(&self, node: usize, map: &str) -> Option<String> {
        let cookie = self.ns(node).cookie().expect("cookie");
        let vni = 1.try_into().expect("a VNI");
        let pin = format!(
            "{}/maps-v{}/{map}",
            flannel_core::mark::instance_path(cookie, vni),
            flannel_common::LAYOUT_VERSION
        );
        if !std::path::Path::new(&pin).exists() {
            return None;
        }
        let dump = json::bpftool_json(self.ns(node), &["map", "dump", "pinned", &pin]).ok()?;
        let values: Vec<String> = list(&dump)
            .iter()
            .map(|entry| entry["value"].to_string())
            .collect();
        Some(values.join("\n"))
    }

    /// Waits until the last known state of a node's agent on disk is that of now: it is written a moment after it was seen.
    #[track_caller]
    pub(crate) fn wait_remembered(&self, node: usize) {
        let file = self.subnet_file(node).with_extension("env.kube.json");
        eventually(PATIENCE, "the last known state is on disk", || {
            let text = fs::read_to_string(&file).unwrap_or_default();
            let leases = self.leases();
            let known = leases.values().all(|peer| text.contains(&peer.mac));
            known.then_some(()).ok_or(text)
        });
    }

    /// Whether anything of a node still names a peer, in the kernel or in the maps.
    pub(crate) fn traces(&self, node: usize, subnet: Subnet, peer: &Peer) -> Vec<String> {
        let mut all = Vec::new();
        for command in [
            "ip -j route show table all",
            "ip -j neigh show",
            "bridge -j fdb show",
        ] {
            let text = self.ns(node).exec(command.split(' ')).expect("a list");
            let base = format!("\"{}\"", subnet.base());
            for name in [base, format!("\"{subnet}\""), peer.mac.clone()] {
                if text.contains(&name) {
                    all.push(format!("{command}: {name}"));
                }
            }
        }
        let nodes = self.map_text(node, "nodes").unwrap_or_default();
        if nodes.contains(&bytes_text(&peer.mac)) {
            all.push("map nodes".into());
        }
        all
    }

    /// Waits until nothing of a node names a peer any more.
    #[track_caller]
    pub(crate) fn wait_no_trace(&self, node: usize, subnet: Subnet, peer: &Peer) {
        eventually(PATIENCE, &format!("node {node} forgets {subnet}"), || {
            let left = self.traces(node, subnet, peer);
            left.is_empty().then_some(()).ok_or(left.join("; "))
        });
    }

    /// Probes each millisecond, both ways, and a paced stream between the pods of two nodes.
    #[track_caller]
    pub(crate) fn traffic(&self, a: usize, b: usize) -> Traffic {
        let (a, b) = (self.pod(a), self.pod(b));
        Traffic::start(a, b)
    }

    /// Traffic for a moment.
    #[track_caller]
    pub(crate) fn exchange(&self, a: usize, b: usize) {
        let traffic = self.traffic(a, b);
        hold(Duration::from_millis(300), || {});
        traffic.lossless();
    }
}

with_agents!(KubeRig);

/// What a Node object says to upstream's agent, if it does.
fn lease_of(node: &Value) -> Option<(Subnet, Peer)> {
    let annotation = |name: &str| {
        let annotations = &node["metadata"]["annotations"];
        annotations[format!("{PREFIX}/{name}")].as_str()
    };
    if annotation("kube-subnet-manager") != Some("true") {
        return None;
    }
    let data: Value = serde_json::from_str(annotation("backend-data")?).ok()?;
    let peer = Peer {
        public_ip: annotation("public-ip")?.to_owned(),
        mac: data["VtepMAC"].as_str()?.to_owned(),
    };
    Some((node["spec"]["podCIDR"].as_str()?.parse().ok()?, peer))
}

/// A MAC address as it is in a dump of a map.
fn bytes_text(mac: &str) -> String {
    let bytes: Vec<String> = mac.split(':').map(|byte| format!("\"0x{byte}\"")).collect();
    bytes.join(",")
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
