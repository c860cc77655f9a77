//! Three nodes with an agent and a pod each, over WireGuard.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
};

use flannel_testkit::{Capture, Families, LabOptions, Netns, Pod, privileged, process::Finished};
use serde_json::Value;

use crate::rig::{PATIENCE, Rig, agent_binary};

pub(crate) const NODES: usize = 3;

/// The networks of a configuration.
pub(crate) const V4: &str = r#""Network":"10.244.0.0/16""#;
pub(crate) const V6: &str =
    r#""EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:10:244::/48""#;
pub(crate) const DUAL: &str =
    r#""Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/48""#;

pub(crate) struct Cloud {
    rig: Rig,
    families: Families,
    pods: Vec<Pod>,
}

fn conf(networks: &str, backend: &str) -> String {
    format!(r#"{{{networks},"Backend":{backend}}}"#)
}

impl Cloud {
    /// Nodes without agents.
    pub(crate) fn new(families: Families, networks: &str, backend: &str) -> Cloud {
        assert!(privileged());
        let options = LabOptions {
            nodes: u8::try_from(NODES).expect("few nodes"),
            families,
            ..LabOptions::default()
        };
        Cloud {
            rig: Rig::with(options, &conf(networks, backend)),
            families,
            pods: Vec::new(),
        }
    }

    /// Nodes with agents that know each other, and a pod each.
    pub(crate) fn start(families: Families, backend: &str) -> Cloud {
        let networks = match families {
            Families::V4 => V4,
            Families::V6 => V6,
            Families::Dual => DUAL,
        };
        let mut cloud = Cloud::new(families, networks, backend);
        for node in 0..NODES {
            cloud.start_agent(node);
        }
        for node in 0..NODES {
            cloud.wait_ready(node);
            let mtu = cloud
                .subnet_env(node, "FLANNEL_MTU")
                .parse()
                .expect("an MTU");
            let subnets: Vec<_> = families
                .list()
                .into_iter()
                .map(|family| cloud.rig.node(node).subnet_of(family))
                .collect();
            let pod = cloud.rig.node(node).add_pod_in(&subnets, 2, mtu);
            cloud.pods.push(pod.expect("a pod"));
        }
        cloud
    }

    pub(crate) fn ns(&self, node: usize) -> &Netns {
        self.rig.ns(node)
    }

    pub(crate) fn pod(&self, node: usize) -> &Pod {
        &self.pods[node]
    }

    /// Two nodes each, in both orders.
    pub(crate) fn pairs() -> Vec<(usize, usize)> {
        let all = (0..NODES).flat_map(|from| (0..NODES).map(move |to| (from, to)));
        all.filter(|(from, to)| from != to).collect()
    }

    /// Starts the agent of a node with a key file of its own. It asks for the subnets that the lab has set aside.
    pub(crate) fn start_agent(&mut self, node: usize) {
        self.start_agent_with(node, &[]);
    }

    /// Like [`Cloud::start_agent`] with flags of the caller's.
    pub(crate) fn start_agent_with(&mut self, node: usize, flags: &[&str]) {
        self.reserve(node);
        let key_file = self.key_file(node);
        let key_file = key_file.to_str().expect("a path");
        let env = [("WIREGUARD_KEY_FILE", key_file)];
        self.rig.start_binary(node, agent_binary(), flags, &env);
    }

    /// Runs an agent that is expected to end by itself.
    pub(crate) fn run_to_end(&mut self, node: usize) -> (i32, String) {
        self.start_agent(node);
        let agent = self.rig.agent(node);
        let code = agent.wait(PATIENCE).expect("the agent ends");
        (code, agent.log())
    }

    fn reserve(&self, node: usize) {
        let file = self.rig.subnet_file(node);
        if file.exists() {
            return;
        }
        let mut text = String::new();
        for family in self.families.list() {
            let subnet = self.rig.node(node).subnet_of(family);
            let name = match subnet.gateway() {
                IpAddr::V4(_) => "FLANNEL_SUBNET",
                IpAddr::V6(_) => "FLANNEL_IPV6_SUBNET",
            };
            writeln!(text, "{name}={}/{}", subnet.gateway(), subnet.prefix_len())
                .expect("a string takes it");
        }
        fs::write(&file, text).expect("write the subnet file");
    }

    #[track_caller]
    pub(crate) fn wait_ready(&mut self, node: usize) {
        self.rig.wait_ready(node);
    }

    pub(crate) fn is_running(&self, node: usize) -> bool {
        self.rig.agents.contains_key(&node)
    }

    pub(crate) fn stop_agent(&mut self, node: usize) -> i32 {
        self.rig.stop_agent(node)
    }

    pub(crate) fn kill_agent(&mut self, node: usize) {
        self.rig.kill_agent(node);
    }

    pub(crate) fn subnet_env(&self, node: usize, name: &str) -> String {
        self.rig.subnet_env(node, name)
    }

    pub(crate) fn cleanup(&self, node: usize) -> Finished {
        self.rig.cli(node, &["cleanup"])
    }

    /// What a command of the agent says as JSON, and all its text.
    pub(crate) fn ask(&self, node: usize, command: &str) -> (Value, String) {
        self.ask_and_see(node, command, true)
    }

    /// The same, of a node that is not as it should be.
    pub(crate) fn ask_broken(&self, node: usize, command: &str) -> (Value, String) {
        self.ask_and_see(node, command, false)
    }

    fn ask_and_see(&self, node: usize, command: &str, good: bool) -> (Value, String) {
        let done = self.rig.cli(node, &[command, "-o", "json"]);
        assert_eq!(done.status.success(), good, "{command}: {done:?}");
        let value = serde_json::from_str(&done.stdout).expect("JSON");
        let table = self.rig.cli(node, &[command]).stdout;
        (value, done.stdout + &table)
    }

    /// Whether programs or maps of the overlay in VXLAN are pinned.
    pub(crate) fn has_pins(&self, node: usize) -> bool {
        self.rig.instance(node).exists()
    }

    /// Whether there is this file beside `subnet.env`.
    pub(crate) fn has_file(&self, node: usize, name: &str) -> bool {
        self.rig.subnet_file(node).with_file_name(name).exists()
    }

    pub(crate) fn key_file(&self, node: usize) -> PathBuf {
        self.rig.node(node).run_dir.join("wgkey")
    }

    pub(crate) fn set_conf(&self, networks: &str, backend: &str) {
        let path = self.rig.lease_dir().join("config");
        fs::write(path, conf(networks, backend)).expect("write the configuration");
    }

    /// What `wg` says in a node.
    pub(crate) fn wg(&self, node: usize, words: &str) -> String {
        let argv = std::iter::once("wg").chain(words.split(' '));
        self.ns(node).exec(argv).expect("wg").trim_end().to_owned()
    }

    /// What `wg pubkey` makes of the key file.
    pub(crate) fn public_key(&self, node: usize) -> String {
        let script = format!("wg pubkey < {}", self.key_file(node).display());
        let said = self
            .ns(node)
            .exec(["sh", "-c", &script])
            .expect("wg pubkey");
        said.trim_end().to_owned()
    }

    /// The device's key and index.
    pub(crate) fn identity(&self, node: usize) -> (String, u32) {
        let key = self.wg(node, "show flannel-wg public-key");
        (
            key,
            self.ns(node).ifindex("flannel-wg").expect("the device"),
        )
    }

    fn lease_path(&self, node: usize) -> PathBuf {
        let subnets = self.rig.lease_dir().join("subnets");
        let entries = fs::read_dir(&subnets).expect("list the leases");
        let own = self.rig.node(node).ip.to_string();
        let mut paths = entries.map(|entry| entry.expect("a lease").path());
        let is_own = |path: &PathBuf| {
            let text = fs::read_to_string(path).unwrap_or_default();
            text.contains(&format!("\"{own}\""))
        };
        paths.find(is_own).expect("the node's lease")
    }

    /// The lease of a node, as stored.
    pub(crate) fn lease(&self, node: usize) -> String {
        let text = fs::read_to_string(self.lease_path(node)).expect("read the lease");
        text.trim_end().to_owned()
    }

    pub(crate) fn put_lease(&self, key: &str, value: &str) {
        let subnets = self.rig.lease_dir().join("subnets");
        fs::write(subnets.join(".other"), value).expect("write a lease");
        fs::rename(subnets.join(".other"), subnets.join(key)).expect("put it in place");
    }

    /// Ends a node for good: its agent, then its lease.
    pub(crate) fn remove_lease(&self, node: usize) {
        let agent = self.rig.agents.get(&node).expect("an agent");
        agent.signal(libc::SIGSTOP).expect("stop it");
        fs::remove_file(self.lease_path(node)).expect("remove the lease");
    }

    /// Records what a node has on the wire.
    pub(crate) fn capture(&self, node: usize, filter: &str) -> Capture {
        let port = &self.rig.node(node).port;
        Capture::start(self.rig.lab().underlay(), port, filter).expect("a capture")
    }

    /// Whether a frame has a pod's address in its IP header.
    pub(crate) fn is_plain(&self, frame: &[u8]) -> bool {
        let addresses: Vec<IpAddr> = match frame.get(12..14) {
            Some([0x08, 0x00]) => [26, 30]
                .into_iter()
                .filter_map(|at| <[u8; 4]>::try_from(frame.get(at..at + 4)?).ok())
                .map(|bytes| Ipv4Addr::from(bytes).into())
                .collect(),
            Some([0x86, 0xdd]) => [22, 38]
                .into_iter()
                .filter_map(|at| <[u8; 16]>::try_from(frame.get(at..at + 16)?).ok())
                .map(|bytes| Ipv6Addr::from(bytes).into())
                .collect(),
            _ => Vec::new(),
        };
        let families = self.families.list();
        self.pods.iter().any(|pod| {
            families
                .iter()
                .any(|family| addresses.contains(&pod.address(*family)))
        })
    }
}

/// Whether a frame is a datagram to or from a WireGuard port.
pub(crate) fn is_wireguard(frame: &[u8]) -> bool {
    let (protocol, ports) = match frame.get(12..14) {
        Some([0x08, 0x00]) => (frame.get(23), 34),
        Some([0x86, 0xdd]) => (frame.get(20), 54),
        _ => return false,
    };
    let port = |at: usize| Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?));
    protocol == Some(&17)
        && [port(ports), port(ports + 2)]
            .iter()
            .flatten()
            .any(|port| matches!(port, 51_820 | 51_821))
}

/// What `wg show <device> <what>` says of each peer.
pub(crate) fn peers_of(text: &str) -> BTreeMap<String, String> {
    let lines = text.lines().filter_map(|line| line.split_once('\t'));
    lines
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}
