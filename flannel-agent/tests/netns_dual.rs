//! IPv6 and both families: what the node has, and what pods can do with it.

use std::{collections::BTreeSet, fs, path::Path, time::Duration};

use flannel_testkit::{
    AgentProcess, Families, Family, Lab, LabOptions, Pod, eventually,
    json::{bpftool_json, ip_json},
    privileged,
    traffic::{self, Amount},
};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(30);

struct Place {
    lab: Lab,
    agents: Vec<AgentProcess>,
    pods: Vec<Pod>,
}

fn net_conf(families: Families) -> &'static str {
    match families {
        Families::V4 => r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#,
        Families::V6 => {
            r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd44::/48","Backend":{"Type":"vxlan"}}"#
        }
        Families::Dual => {
            r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd44::/48","Backend":{"Type":"vxlan"}}"#
        }
    }
}

impl Place {
    fn start(families: Families, nodes: u8, flags: &[&str]) -> Place {
        let options = LabOptions {
            nodes,
            families,
            ..LabOptions::default()
        };
        let mut place = Place::of(options);
        place.start_agents(flags);
        for node in 0..usize::from(nodes) {
            place.add_pod(node);
        }
        place
    }

    fn of(options: LabOptions) -> Place {
        let lab = Lab::new(options).expect("a lab");
        let leases = lab.node(0).run_dir.join("leases");
        fs::create_dir_all(leases.join("subnets")).expect("a lease directory");
        fs::write(leases.join("config"), net_conf(options.families)).expect("a configuration");
        Place {
            lab,
            agents: Vec::new(),
            pods: Vec::new(),
        }
    }

    fn start_agents(&mut self, flags: &[&str]) {
        let leases = self.lab.node(0).run_dir.join("leases");
        self.agents = (0..self.lab.nodes().len())
            .map(|node| self.spawn(node, &leases, flags))
            .collect();
        for (node, agent) in self.agents.iter_mut().enumerate() {
            agent
                .wait_log("flannel is ready", PATIENCE)
                .unwrap_or_else(|error| panic!("node {node}: {error:#}"));
        }
    }

    /// Stops all agents, and starts them again with another configuration.
    fn change(&mut self, net_conf: &str, flags: &[&str]) {
        for agent in &mut self.agents {
            agent.sigterm().expect("send SIGTERM");
            assert_eq!(agent.wait(PATIENCE).expect("the agent ends"), 0);
        }
        let leases = self.lab.node(0).run_dir.join("leases");
        fs::write(leases.join("config"), net_conf).expect("a configuration");
        self.start_agents(flags);
    }

    /// How many overlays' filters take packets from other nodes.
    fn receivers(&self, node: usize) -> usize {
        let net = bpftool_json(&self.lab.node(node).ns, &["net"]).expect("bpftool net");
        let hooks = net[0]["tc"].as_array().expect("programs").iter();
        let filters = hooks.filter(|hook| hook["kind"] == "clsact/ingress");
        let names = filters.filter_map(|hook| hook["name"].as_str());
        names.filter(|name| name.ends_with("from_wire")).count()
    }

    /// Devices of ours by name, and what leads to pods of other nodes: `<device> <protocol>`, which is null for `boot`.
    fn ours(&self, node: usize) -> (BTreeSet<String>, BTreeSet<String>) {
        let ns = &self.lab.node(node).ns;
        let links = ip_json(ns, &["link"]).expect("ip link");
        let names = links.as_array().expect("links").iter();
        let names = names.filter_map(|link| link["ifname"].as_str());
        let devices = names.filter(|name| name.starts_with("flannel"));
        let devices = devices.filter(|name| !name.starts_with("flannel-hr"));
        let mut routes = BTreeSet::new();
        for (flag, prefix) in [("-4", "10.244."), ("-6", "fd44:")] {
            let found = ip_json(ns, &[flag, "route"]).expect("ip route");
            for route in found.as_array().expect("routes") {
                let (to, device) = (&route["dst"], &route["dev"]);
                let (Some(to), Some(device)) = (to.as_str(), device.as_str()) else {
                    continue;
                };
                if to.starts_with(prefix) && !route["gateway"].is_null() {
                    routes.insert(format!("{device} {}", route["protocol"]));
                }
            }
        }
        (devices.map(str::to_owned).collect(), routes)
    }

    fn spawn(&self, node: usize, leases: &Path, flags: &[&str]) -> AgentProcess {
        let node = self.lab.node(node);
        let mut words = vec![
            format!("--lease-dir={}", leases.display()),
            format!(
                "--subnet-file={}",
                node.run_dir.join("subnet.env").display()
            ),
        ];
        words.extend(flags.iter().map(ToString::to_string));
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let binary = Path::new(env!("CARGO_BIN_EXE_flannel-agent"));
        AgentProcess::spawn(node, binary, &words, &[]).expect("an agent")
    }

    fn env(&self, node: usize, name: &str) -> Option<String> {
        let file = self.lab.node(node).run_dir.join("subnet.env");
        let text = fs::read_to_string(file).expect("subnet.env");
        let value = |line: &str| Some(line.strip_prefix(name)?.strip_prefix('=')?.to_owned());
        text.lines().find_map(value)
    }

    fn add_pod(&mut self, node: usize) {
        let subnets: Vec<_> = ["FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET"]
            .into_iter()
            .filter_map(|name| self.env(node, name))
            .map(|subnet| subnet.parse().expect("a subnet"))
            .collect();
        let mtu = self.env(node, "FLANNEL_MTU").expect("an MTU");
        let pod = self
            .lab
            .node(node)
            .add_pod_in(&subnets, 2, mtu.parse().expect("an MTU"))
            .unwrap_or_else(|error| panic!("a pod on node {node}: {error:#}"));
        self.pods.push(pod);
    }

    fn reaches(&self, from: usize, to: usize, family: Family) -> Result<(), String> {
        let address = self.pods[to].address(family).to_string();
        let said = self.pods[from]
            .ns
            .exec(["ping", "-c", "3", "-i", "0.01", "-W", "1", &address]);
        said.map(|_| ()).map_err(|error| format!("{error:#}"))
    }

    fn everybody_reaches_everybody(&self) {
        for family in self.lab.families().list() {
            for from in 0..self.pods.len() {
                for to in (0..self.pods.len()).filter(|to| *to != from) {
                    let what = format!("pod {from} reaches pod {to} over {family}");
                    eventually(PATIENCE, &what, || self.reaches(from, to, family));
                }
            }
        }
    }

    fn status(&self, node: usize) -> Value {
        let log = self.agents[node].log();
        let node = self.lab.node(node);
        let file = format!(
            "--subnet-file={}",
            node.run_dir.join("subnet.env").display()
        );
        let mut command = node.ns.command(env!("CARGO_BIN_EXE_flannel-agent"));
        let done = command
            .args(["status", "-o", "json", &file])
            .output()
            .expect("status");
        serde_json::from_slice(&done.stdout).unwrap_or_else(|error| {
            panic!("{error}: {}\n{log}", String::from_utf8_lossy(&done.stderr))
        })
    }
}

#[test]
fn ipv6_alone_carries_in_ebpf() {
    if !privileged() {
        return;
    }
    let place = Place::start(Families::V6, 2, &[]);
    place.everybody_reaches_everybody();
    assert_fast(&place, |status| status);
    assert_eq!(place.env(0, "FLANNEL_MTU").as_deref(), Some("1430"));
    assert_eq!(place.env(0, "FLANNEL_NETWORK"), None);
    let links = ip_json(&place.lab.node(0).ns, &["-d", "link"]).expect("ip link");
    let names: Vec<&str> = links
        .as_array()
        .expect("links")
        .iter()
        .filter_map(|link| link["ifname"].as_str())
        .collect();
    assert!(names.contains(&"flannel-v6.1"), "{names:?}");
    assert!(!names.contains(&"flannel.1"), "{names:?}");
}

#[test]
fn both_families_carry_side_by_side() {
    if !privileged() {
        return;
    }
    let place = Place::start(Families::Dual, 3, &[]);
    place.everybody_reaches_everybody();
    assert_fast(&place, |status| status);
    assert_fast(&place, |status| &status["ipv6"]);
    assert_eq!(place.env(0, "FLANNEL_MTU").as_deref(), Some("1430"));
}

#[test]
fn ipv6_is_carried_without_a_vxlan_device() {
    if !privileged() {
        return;
    }
    let place = Place::start(Families::V6, 2, &["--bpf-device=veth"]);
    place.everybody_reaches_everybody();
    assert_fast(&place, |status| status);
    assert_eq!(place.env(0, "FLANNEL_MTU").as_deref(), Some("1430"));
    let (devices, _) = place.ours(0);
    let wanted = ["flannel-v6.1", "flannelp6.1"].map(str::to_owned);
    assert_eq!(devices, BTreeSet::from(wanted));
    // Inner fragments, of which no header says what is in them, and super-packets.
    for (from, to) in [(0, 1), (1, 0)] {
        let (client, server) = (&place.pods[from], &place.pods[to]);
        let ip = server.address(Family::V6);
        let sizes = [1, 1382, 1383, 9_001];
        traffic::udp_echo(&server.ns, ip, &client.ns, &sizes).expect("datagrams");
        let amount = Amount::Bytes(2 << 20);
        traffic::tcp_transfer(&server.ns, ip, &client.ns, amount).expect("a stream");
    }
}

/// Pings of both ways go past the stack on both nodes.
#[track_caller]
fn assert_fast(place: &Place, overlay: impl Fn(&Value) -> &Value) {
    let carried = |node| {
        let status = place.status(node);
        let fast = &overlay(&status)["fast_path"];
        let counters = &fast["counters"];
        let count = |way: &str| counters[way]["packets"].as_u64().unwrap_or(0);
        (count("encap").min(count("decap")), fast.clone())
    };
    eventually(PATIENCE, "pods' packets go past the stack", || {
        place.everybody_reaches_everybody();
        let (packets, fast) = carried(0);
        (packets > 10).then_some(()).ok_or(format!("{fast}"))
    });
}

#[test]
fn another_backend_or_family_leaves_nothing_of_the_former() {
    backends_and_families_change(&[]);
}

#[test]
fn another_backend_or_family_leaves_no_filter_of_the_former() {
    backends_and_families_change(&["--bpf-attach=clsact"]);
}

fn backends_and_families_change(flags: &[&str]) {
    if !privileged() {
        return;
    }
    let mut place = Place::start(Families::Dual, 2, flags);
    place.everybody_reaches_everybody();
    let host_gw = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd44::/48","Backend":{"Type":"host-gw"}}"#;
    let direct = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd44::/48","Backend":{"Type":"vxlan","DirectRouting":true}}"#;
    let both: &[Family] = &[Family::V4, Family::V6];
    let names =
        |names: &[&str]| -> BTreeSet<String> { names.iter().map(ToString::to_string).collect() };
    let (on_link, all) = (["eth0 \"241\""], ["flannel-v6.1", "flannel.1"]);
    let tunnelled = ["flannel-v6.1 null", "flannel.1 null"];
    for (conf, devices, routes, families) in [
        (host_gw, &[][..], &on_link[..], both),
        (net_conf(Families::Dual), &all, &tunnelled, both),
        (direct, &all, &on_link, both),
        (host_gw, &[], &on_link, both),
        (
            net_conf(Families::V4),
            &all[1..],
            &tunnelled[1..],
            &both[..1],
        ),
    ] {
        place.change(conf, flags);
        for node in 0..2 {
            eventually(PATIENCE, "what the former overlay has left goes", || {
                let links = flags.is_empty();
                let receivers = if links { 0 } else { place.receivers(node) };
                let wanted = if links { 0 } else { families.len() };
                let seen = (place.ours(node), receivers);
                let wanted = ((names(devices), names(routes)), wanted);
                (seen == wanted)
                    .then_some(())
                    .ok_or(format!("{seen:?} with {conf}"))
            });
        }
        for family in families {
            for (from, to) in [(0, 1), (1, 0)] {
                eventually(PATIENCE, &format!("{family} with {conf}"), || {
                    place.reaches(from, to, *family)
                });
            }
        }
    }
}
