//! Agents in what a container runtime makes of a manifest: its command line, variables, files, mounts, capabilities and rights, with
//! read-only /proc/sys and /sys, and without modules, where it is not privileged.

#[path = "manifests/container.rs"]
mod container;
mod manifest_rig;
mod rig;

use std::{fs, net::Ipv4Addr, time::Duration};

use anyhow::ensure;
use container::Container;
use flannel_testkit::{
    AgentProcess,
    apiserver::{ApiServer, Asked, Kind, Rule, WatchEnd, service_account},
    eventually, privileged,
    traffic::{self, FloodPing},
};
use manifest_rig::{Objects, UPSTREAM, agent, kustomize, object, objects, read, text_of};
use rig::{PATIENCE, Rig, agent_binary};
use serde_json::{Value, json};

/// Host number of the API server on the underlay.
const API_HOST: u8 = 200;

/// 1 kHz.
const EVERY: Duration = Duration::from_millis(1);

/// Two nodes with the DaemonSet of a manifest and a pod each, and the API that they ask.
struct Cluster {
    rig: Rig,
    api: ApiServer,
    objects: Objects,
}

impl Cluster {
    /// Nodes on which nothing runs yet.
    #[track_caller]
    fn new(manifest: &str) -> Self {
        let objects = objects(manifest);
        let rig = Rig::new(2);
        let host = rig.lab().host("api", API_HOST).expect("a host for the API");
        let ip = Ipv4Addr::new(192, 168, 77, API_HOST);
        let api = ApiServer::start(Some(&host), ip).expect("the API");
        let rules = Rule::of_role(object(&objects, "ClusterRole", "flannel")).expect("rules");
        api.set_rules(&service_account(), rules);
        Self { rig, api, objects }
    }

    /// Nodes that know each other.
    #[track_caller]
    fn start(manifest: &str) -> Self {
        let mut cluster = Self::new(manifest);
        for node in 0..2 {
            cluster.start_agent(node);
        }
        for node in 0..2 {
            cluster.rig.wait_ready(node);
            cluster.rig.add_pod(node);
        }
        for node in 0..2 {
            eventually(PATIENCE, &format!("node {node} knows the other"), || {
                let peers = cluster.rig.peers(node);
                ensure!(
                    peers.as_array().is_some_and(|all| all.len() == 1),
                    "{peers}"
                );
                Ok(())
            });
        }
        cluster
    }

    /// What the kubelet does for a node that joins, and the DaemonSet's controller.
    #[track_caller]
    fn start_agent(&mut self, node: usize) {
        let (name, pod) = (format!("n{node}"), format!("kube-flannel-ds-{node}"));
        let cidr = self.rig.node(node).subnet.to_string();
        self.api.create_node(&name, &cidr).expect("a node");
        let object = json!({
            "metadata": {"name": pod, "namespace": "kube-flannel"},
            "spec": {"nodeName": name, "containers": []},
        });
        self.api.create(Kind::Pod, object).expect("a pod");
        self.run(node);
    }

    /// What is applied replaces what was, on one node after the other. While a node has no pod, `meanwhile` is called.
    #[track_caller]
    fn apply(&mut self, manifest: &str, meanwhile: impl Fn(&Rig, usize)) {
        self.objects = objects(manifest);
        let role = object(&self.objects, "ClusterRole", "flannel");
        let rules = Rule::of_role(role).expect("rules");
        self.api.set_rules(&service_account(), rules);
        for node in 0..2 {
            assert_eq!(self.rig.stop_agent(node), 0, "an orderly end");
            meanwhile(&self.rig, node);
            self.run(node);
            self.rig.wait_ready(node);
            self.assert_in_service(node);
        }
    }

    /// What the container runtime does.
    #[track_caller]
    fn run(&mut self, node: usize) {
        let (name, pod) = (format!("n{node}"), format!("kube-flannel-ds-{node}"));
        let place = self.rig.node(node);
        let account = place.run_dir.join("account");
        self.api.write_service_account(&account).expect("a token");
        let container = Container {
            node: &name,
            pod: &pod,
            api: self.api.address(),
            run_dir: &place.run_dir,
            config: &object_data(&self.objects),
            spec: agent(&self.objects),
        };
        let program = container.program();
        let (args, env) = (container.args(), container.env());
        let env: Vec<(&str, &str)> = env
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect();
        let agent = AgentProcess::spawn(place, &program, &args, &env).expect("an agent");
        self.rig.agents.insert(node, agent);
    }

    /// Ping and datagrams of all sizes in both directions.
    #[track_caller]
    fn exchange(&self) {
        for (from, to) in [(0, 1), (1, 0)] {
            let (client, server) = (self.rig.pod(from), self.rig.pod(to));
            let stats = traffic::ping(&client.ns, server.ip, 20, Duration::from_millis(5))
                .unwrap_or_else(|error| panic!("ping from {from} to {to}: {error:#}"));
            assert_eq!(stats.lost, 0, "ping from {from} to {to}: {stats:?}");
            traffic::udp_echo(&server.ns, server.ip, &client.ns, &[1, 1422, 9000])
                .unwrap_or_else(|error| panic!("UDP from {from} to {to}: {error:#}"));
        }
    }

    /// Rules, annotations, the condition and the kubelet's view are as they should be.
    #[track_caller]
    fn assert_in_service(&self, node: usize) {
        let rules = self
            .rig
            .ns(node)
            .exec(["iptables-save"])
            .expect("the rules");
        for chain in ["-A FLANNEL-POSTRTG", "-A FLANNEL-FWD"] {
            assert!(rules.contains(chain), "{chain}: {rules}");
        }
        let name = format!("n{node}");
        let annotations = self.api.annotations(&name);
        let public_ip = &annotations["flannel.alpha.coreos.com/public-ip"];
        assert_eq!(*public_ip, self.rig.node(node).ip.to_string());
        eventually(PATIENCE, "the node's network is there", || {
            let node = self.api.node(&name).expect("the node");
            let conditions = node["status"]["conditions"].as_array().cloned();
            let conditions = conditions.unwrap_or_default();
            let is = |one: &Value| one["type"] == "NetworkUnavailable" && one["status"] == "False";
            ensure!(conditions.iter().any(is), "{conditions:?}");
            Ok(())
        });
        for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
            let probe = &agent(&self.objects)[probe]["httpGet"];
            if probe.is_null() {
                continue;
            }
            let said = self.ask(node, probe);
            assert!(said.contains("200 OK"), "{probe}: {said}");
        }
    }

    /// Asks as the kubelet does.
    #[track_caller]
    fn ask(&self, node: usize, probe: &Value) -> String {
        let address = probe["host"].as_str().unwrap_or("127.0.0.1");
        let ask = format!(
            "exec 3<>/dev/tcp/{address}/{}; printf 'GET {} HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3",
            probe["port"],
            text_of(probe, "/path")
        );
        let ns = self.rig.ns(node);
        ns.exec(["bash", "-c", &ask]).expect("an answer")
    }

    /// What the kubelet does when the tokens of pods grow old, here after the API refuses the old ones.
    #[track_caller]
    fn rotate_token(&mut self) {
        self.api.rotate_token(&service_account());
        for node in 0..2 {
            let account = self.rig.node(node).run_dir.join("account");
            self.api.write_service_account(&account).expect("a token");
        }
        self.api.end_watches(WatchEnd::Cut);
        let key = "flannel.alpha.coreos.com/public-ip";
        for node in 0..2 {
            let name = format!("n{node}");
            let before = self.api.annotations(&name)[key].clone();
            self.api.annotate(&name, &[(key, None)]).expect("annotate");
            eventually(PATIENCE, "the agent writes with the new token", || {
                let after = self.api.annotations(&name);
                ensure!(after.get(key) == Some(&before), "{after:?}");
                Ok(())
            });
        }
    }

    /// What the API has refused to the agents.
    fn refused(&self) -> Vec<Asked> {
        let asked = self.api.asked();
        asked.into_iter().filter(|one| one.status == 403).collect()
    }

    /// The lines of a node's log that a person should read.
    #[track_caller]
    fn complaints(&mut self, node: usize) -> Vec<String> {
        let log = self.rig.agent(node).log();
        let lines = log.lines().filter(|line| !line.contains(" INFO "));
        lines.map(str::to_owned).collect()
    }
}

/// The files of the ConfigMap.
#[track_caller]
fn object_data(objects: &Objects) -> Vec<(String, String)> {
    let data = &object(objects, "ConfigMap", "kube-flannel-cfg")["data"];
    let files = data.as_object().expect("files").iter();
    files
        .map(|(name, text)| (name.clone(), text.as_str().expect("text").to_owned()))
        .collect()
}

#[test]
fn upstreams_manifest_with_our_image_carries_traffic_on_the_kernels_device() {
    if !privileged() {
        return;
    }
    let mut cluster = Cluster::start(UPSTREAM);
    cluster.exchange();
    for node in 0..2 {
        cluster.assert_in_service(node);
        let status = cluster.rig.status(node);
        assert_eq!(status["ok"], true, "{status}");
        assert_eq!(status["datapath"]["mode"], "kernel", "{status}");
        let said = status["datapath"]["reason"].as_str().expect("a reason");
        assert!(said.contains("CAP_BPF"), "{said}");
        assert!(!cluster.rig.instance(node).exists(), "pins on the node");
        // Once, and nothing else: what upstream does without is no reason to complain.
        let said = cluster.complaints(node);
        assert_eq!(said.len(), 1, "{said:#?}");
        assert!(said[0].contains("CAP_BPF is missing"), "{said:?}");
    }
    // It grants no events.
    let refused = cluster.refused();
    assert!(
        refused.iter().all(|one| one.path.ends_with("/events")),
        "{refused:#?}"
    );
}

#[test]
fn our_manifest_carries_traffic_by_ebpf_and_has_all_rights_that_it_uses() {
    if !privileged() {
        return;
    }
    let mut cluster = Cluster::start(&read("deploy/kube-flannel.yml"));
    cluster.exchange();
    for node in 0..2 {
        cluster.assert_in_service(node);
        let status = cluster.rig.status_is_ok(node);
        assert_eq!(status["datapath"]["mode"], "bpf", "{status}");
        assert_eq!(status["fast_path"]["mode"], "established", "{status}");
        assert!(cluster.rig.instance(node).exists(), "no pins on the node");
        assert_eq!(cluster.complaints(node), Vec::<String>::new());
    }
    assert_eq!(cluster.refused(), []);
    cluster.rotate_token();
}

/// The steps of docs/migrate.md: the image alone, the manifest, a pod that replaces another, and back.
#[test]
fn pods_of_one_manifest_and_the_other_replace_each_other_without_a_loss() {
    if !privileged() {
        return;
    }
    let ours = read("deploy/kube-flannel.yml");
    let mut cluster = Cluster::start(UPSTREAM);
    let (a, b) = (cluster.rig.pod(0).clone(), cluster.rig.pod(1).clone());
    let pings = [(&a, &b), (&b, &a)]
        .map(|(from, to)| FloodPing::start(&from.ns, to.ip, EVERY).expect("a flood"));
    let mac = |cluster: &Cluster, node: usize| {
        let annotations = cluster.api.annotations(&format!("n{node}"));
        annotations["flannel.alpha.coreos.com/backend-data"].clone()
    };
    let before = [mac(&cluster, 0), mac(&cluster, 1)];
    cluster.apply(&ours, |_, _| {});
    // What is pinned outlives the container, and carries on.
    cluster.apply(&ours, |rig, node| {
        let before = rig.counters(node).encap;
        eventually(PATIENCE, "eBPF carries on without an agent", || {
            let now = rig.counters(node).encap;
            ensure!(now > before + 20, "{now}");
            Ok(())
        });
    });
    cluster.apply(UPSTREAM, |_, _| {});
    assert_eq!([mac(&cluster, 0), mac(&cluster, 1)], before);
    for ping in pings {
        let stats = ping.stop().expect("the flood ends");
        assert_eq!(stats.lost, 0, "{stats:?}");
        assert!(stats.sent > 1000, "{stats:?}");
    }
}

/// What an apply with somebody else's network comes to: the rolling update stops at the first node.
#[test]
fn with_another_network_than_the_clusters_a_node_is_not_ready_and_says_why() {
    if !privileged() {
        return;
    }
    let manifest = read("deploy/kube-flannel.yml").replace("10.244.0.0/16", "10.99.0.0/16");
    let mut cluster = Cluster::new(&manifest);
    cluster.start_agent(0);
    let said = r#"doesn't contain "10.244.1.0/24" PodCIDR of the "n0" node"#;
    cluster
        .rig
        .agent(0)
        .wait_log(said, PATIENCE)
        .expect("it says so");
    let probe = agent(&cluster.objects)["readinessProbe"]["httpGet"].clone();
    let answer = cluster.ask(0, &probe);
    assert!(answer.contains("503") && answer.contains(said), "{answer}");
    assert!(!cluster.rig.subnet_file(0).exists(), "subnet.env");
    let annotations = cluster.api.annotations("n0");
    assert!(
        !annotations.contains_key("flannel.alpha.coreos.com/public-ip"),
        "{annotations:?}"
    );
}

#[test]
fn a_right_that_is_missing_is_noticed() {
    if !privileged() {
        return;
    }
    let manifest = read("deploy/kube-flannel.yml");
    let less = manifest.replace("resources: [nodes/status]", "resources: [nodes/proxy]");
    assert_ne!(less, manifest);
    let mut cluster = Cluster::new(&less);
    cluster.start_agent(0);
    eventually(PATIENCE, "a patch is refused", || {
        let refused = cluster.refused();
        let patch = |one: &Asked| one.path.ends_with("/nodes/n0/status");
        ensure!(refused.iter().any(patch), "{refused:?}");
        Ok(())
    });
}

#[test]
fn the_capabilities_of_the_overlay_are_enough_for_ebpf_and_with_two_settings_for_the_fast_path() {
    if !privileged() {
        return;
    }
    let mut cluster = Cluster::start(&kustomize("capabilities"));
    cluster.exchange();
    for node in 0..2 {
        cluster.assert_in_service(node);
        let status = cluster.rig.status_is_ok(node);
        assert_eq!(status["datapath"]["mode"], "bpf", "{status}");
        assert!(cluster.rig.instance(node).exists(), "no pins on the node");
        // /proc/sys is read-only: the agent cannot change what the fast path needs, and says so.
        assert_eq!(status["fast_path"]["mode"], "off", "{status}");
        let said = status["fast_path"]["reason"].as_str().expect("a reason");
        assert!(
            said.contains("nf_conntrack_tcp_be_liberal is 0 and cannot be set"),
            "{said}"
        );
        // As docs/install.md has the node set it.
        for name in [
            "nf_conntrack_tcp_be_liberal",
            "nf_conntrack_tcp_ignore_invalid_rst",
        ] {
            let setting = format!("net.netfilter.{name}=1");
            assert!(read("docs/install.md").contains(&setting), "{setting}");
            cluster
                .rig
                .ns(node)
                .exec(["sysctl", "-w", &setting])
                .expect("set it");
        }
        eventually(PATIENCE, "the fast path is on", || {
            let status = cluster.rig.status(node);
            ensure!(status["fast_path"]["mode"] == "established", "{status}");
            Ok(())
        });
    }
    cluster.exchange();
    for node in 0..2 {
        let log = cluster.rig.agent(node).log();
        assert!(!log.contains(" ERROR "), "{log}");
    }
}

/// In the container of deploy/cleanup.yml the command has the number that the agent had in its own.
#[test]
fn cleaning_up_from_another_container_is_not_taken_for_the_agent() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::new(1);
    rig.start_agent(0, &[]);
    rig.wait_ready(0);
    rig.kill_agent(0);
    let mut state: Value =
        serde_json::from_slice(&fs::read(rig.state_file(0)).expect("the state")).expect("JSON");
    state["pid"] = 1.into();
    fs::write(rig.state_file(0), state.to_string()).expect("write the state");
    let subnet_file = rig.subnet_file(0).display().to_string();
    let agent = agent_binary().display().to_string();
    let done = rig.ns(0).exec([
        "unshare",
        "--fork",
        "--pid",
        "--mount-proc",
        &agent,
        "cleanup",
        "--keep-device",
        "--subnet-file",
        &subnet_file,
    ]);
    assert!(
        done.as_ref()
            .is_ok_and(|said| said.contains("eBPF programs and maps")),
        "{done:?}"
    );
    assert!(!rig.instance(0).exists(), "pins on the node");
    assert!(!rig.state_file(0).exists(), "the state is of the past");
    assert!(rig.subnet_file(0).exists(), "subnet.env");
}
