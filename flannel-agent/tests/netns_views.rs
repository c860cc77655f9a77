//! What an agent tells of a node whatever the backend and the families, and that `cleanup` leaves nothing of it.

mod rig;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
};

use flannel_testkit::{
    Families, Family, LabOptions, eventually, http, json::ip_json, privileged, process::Finished,
};
use rig::{PATIENCE, Rig, dump::Dump, hooks, variant};
use serde_json::{Value, json};

/// The same networks as the lab's.
fn conf(families: Families, backend: &str) -> String {
    let whole: Value = serde_json::from_str(rig::net_conf(families)).expect("JSON");
    let mut conf = whole;
    conf["Backend"] = json!({"Type": backend});
    conf.to_string()
}

fn lab(families: Families, nodes: u8, backend: &str) -> Rig {
    let options = LabOptions {
        nodes,
        families,
        ..LabOptions::default()
    };
    Rig::with(options, &conf(families, backend))
}

fn start(rig: &mut Rig, flags: &[&str]) {
    for node in 0..rig.lab().nodes().len() {
        rig.start_agent(node, flags);
    }
    for node in 0..rig.lab().nodes().len() {
        rig.wait_ready(node);
        rig.add_pod(node);
    }
}

#[track_caller]
fn reach(rig: &Rig, families: Families) {
    for family in families.list() {
        for (from, to) in [(0, 1), (1, 0)] {
            let to = rig.pod(to).address(family).to_string();
            // Of one flow: only the first packets of it go through the stack.
            let pings = ["ping", "-q", "-c", "10", "-i", "0.01", "-W", "1", &to];
            eventually(PATIENCE, &format!("{to} answers"), || {
                rig.pod(from).ns.exec(pings)
            });
        }
    }
}

/// What a command of the agent says.
fn said(rig: &Rig, words: &[&str]) -> String {
    let done: Finished = rig.cli(0, words);
    done.stdout + &done.stderr
}

/// What is left of an agent: links, routes, rules, neighbours, programs, and what bears flannel's name in the firewall.
fn kernel(rig: &Rig, node: usize) -> Dump {
    Dump::of(rig.ns(node)).only(&[
        "ip -j -d link show",
        "ip -j -d route show table all",
        "ip -j -6 route show table all",
        "ip -j rule show",
        "ip -j -6 rule show",
        "ip -j neigh show nud permanent",
        "bpftool -j net",
    ])
}

#[track_caller]
fn assert_clean(rig: &mut Rig, node: usize, before: &Dump) {
    assert_eq!(rig.stop_agent(node), 0);
    let done = rig.cli(node, &["cleanup"]);
    assert!(done.status.success(), "{done:?}");
    before.assert_same(&kernel(rig, node), "after cleanup");
    for command in ["iptables-save", "ip6tables-save", "nft list ruleset"] {
        let rules = rig.ns(node).exec(command.split(' ')).expect(command);
        assert!(!rules.to_lowercase().contains("flannel"), "{rules}");
    }
    assert!(!rig.instance(node).exists(), "pins on the node");
    let dir = rig.subnet_file(node);
    let left = fs::read_dir(dir.parent().expect("a directory")).expect("list it");
    let left: Vec<String> = left
        .map(|entry| entry.expect("a file").file_name())
        .filter_map(|name| name.into_string().ok())
        .filter(|name| name.starts_with("flannel") || name.starts_with("subnet.env"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    let again = said(rig, &["cleanup"]);
    assert!(again.contains("nothing of ours found"), "{again}");
}

/// The programs for IPv6 are refused, those for IPv4 are not: nothing is set up anew as long as that stays so.
#[test]
fn a_family_whose_programs_are_refused_costs_the_other_nothing() {
    if !privileged() {
        return;
    }
    let mut rig = lab(Families::Dual, 2, "vxlan");
    let binary = variant::broken_agent_v6(&rig.node(0).run_dir, &["from_wire"]);
    rig.start_binary(0, &binary, &["-v=1"], &[]);
    rig.start_agent(1, &[]);
    for node in 0..2 {
        rig.wait_ready(node);
        rig.add_pod(node);
    }
    reach(&rig, Families::Dual);
    let status = rig.status_is_ok(0);
    assert_eq!(status["datapath"]["mode"], "bpf", "{status}");
    assert!(status["counters"].is_object(), "{status}");
    let other = &status["ipv6"];
    assert_eq!(other["datapath"]["mode"], "kernel", "{status}");
    let why = other["datapath"]["reason"].as_str().expect("a reason");
    assert!(
        why.contains("the verifier refuses program from_wire"),
        "{why}"
    );
    assert_eq!(other["standing"]["rung"], "L0", "{other}");
    assert!(other["counters"].is_null(), "{other}");
    let table = said(&rig, &["status"]);
    assert!(
        table.contains("bpf, ") && table.contains("kernel (eBPF cannot be used"),
        "{table}"
    );
    let mut paths: Vec<(String, String)> = rig
        .peers(0)
        .as_array()
        .expect("peers")
        .iter()
        .map(|peer| {
            let word = |name: &str| peer[name].as_str().unwrap_or_default().to_owned();
            (word("subnet"), word("path"))
        })
        .collect();
    paths.sort();
    let subnets = [Family::V4, Family::V6].map(|of| rig.node(1).subnet_of(of).to_string());
    let wanted = [(&subnets[0], "bpf"), (&subnets[1], "kernel")];
    let wanted = wanted.map(|(subnet, path)| (subnet.clone(), path.to_owned()));
    assert_eq!(paths, wanted);
    let agent = rig.agent(0);
    agent
        .wait_log("eBPF cannot be used yet", PATIENCE)
        .expect("the family without is tried again");
    let log = agent.log();
    assert!(!log.contains("setting the node up anew"), "{log}");
    assert_eq!(
        log.matches("the kernel's vxlan device carries the overlay")
            .count(),
        1,
        "{log}"
    );
}

#[test]
fn host_gw_is_told_as_it_is() {
    if !privileged() {
        return;
    }
    let families = Families::Dual;
    let mut rig = lab(families, 2, "host-gw");
    let before = kernel(&rig, 0);
    start(&mut rig, &["--ip-masq"]);
    reach(&rig, families);
    let routed = |status: &Value, way: &str| {
        status["fast_path"]["counters"][way]["packets"]
            .as_u64()
            .unwrap_or(0)
    };
    for of in [&[][..], &["ipv6"]] {
        let status = eventually(PATIENCE, "packets are routed past the stack", || {
            reach(&rig, families);
            let whole = rig.status_is_ok(0);
            let status = of.iter().fold(&whole, |status, name| &status[*name]);
            let enough = routed(status, "routed_out") > 3 && routed(status, "routed_in") > 3;
            enough
                .then(|| status.clone())
                .ok_or(status["fast_path"]["counters"].to_string())
        });
        assert_eq!(status["backend"], "host-gw", "{status}");
        assert!(status["device"].is_null(), "{status}");
        assert_eq!(status["routes"], json!({"interface": "eth0", "peers": 1}));
        assert_eq!(status["problems"], json!([]), "{status}");
        assert_eq!(routed(&status, "encap"), 0, "nothing is wrapped: {status}");
        let attached = status["datapath"]["attached"].to_string();
        assert_eq!(attached, r#"["from_wire","to_link"]"#, "{status}");
    }
    let table = said(&rig, &["status"]);
    assert!(
        table.contains("no tunnel") && table.contains("1 peers over eth0"),
        "{table}"
    );
    let peers = rig.peers(0);
    let peers = peers.as_array().expect("peers");
    assert_eq!(peers.len(), 2, "{peers:?}");
    for (family, peer) in families.list().into_iter().zip(peers) {
        assert_eq!(peer["subnet"], rig.node(1).subnet_of(family).to_string());
        assert_eq!(
            (&peer["way"], &peer["path"]),
            (&json!("direct"), &json!("bpf")),
            "{peer}"
        );
        assert_eq!(peer["kernel_complete"], true, "{peer}");
        assert!(peer["mac"].is_null(), "{peer}");
    }
    rig.pod(0).clone().remove().expect("remove the pod");
    rig.ns(0).ip("link del cni0").expect("remove the bridge");
    assert_clean(&mut rig, 0, &before);
    let routes = ip_json(rig.ns(0), &["-6", "route"])
        .expect("routes")
        .to_string();
    let peer = rig.node(1).subnet_of(Family::V6).to_string();
    assert!(!routes.contains(&peer), "{routes}");
    assert_eq!(hooks::hooks(rig.ns(0)), hooks::Hooks::default());
}

#[test]
fn both_overlays_are_cleaned_up() {
    if !privileged() {
        return;
    }
    let mut rig = lab(Families::Dual, 2, "vxlan");
    let before = kernel(&rig, 0);
    for node in 0..2 {
        rig.start_agent(node, &["--ip-masq"]);
    }
    for node in 0..2 {
        rig.wait_ready(node);
    }
    assert_clean(&mut rig, 0, &before);
}

#[test]
fn alloc_is_told_as_it_is() {
    if !privileged() {
        return;
    }
    let mut rig = lab(Families::V4, 1, "alloc");
    let before = kernel(&rig, 0);
    rig.start_agent(0, &["--ip-masq"]);
    rig.wait_ready(0);
    let status = rig.status_is_ok(0);
    assert_eq!(status["backend"], "alloc", "{status}");
    assert!(
        status["datapath"].is_null() && status["device"].is_null(),
        "{status}"
    );
    assert_eq!(status["lease"]["subnet"], rig.node(0).subnet.to_string());
    assert_eq!(status["lease"]["store_connected"], true, "{status}");
    assert_eq!(status["agent"]["running"], true);
    assert_eq!(status["problems"], json!([]), "{status}");
    assert_eq!(rig.peers(0), json!([]));
    let table = said(&rig, &["status"]);
    assert!(table.contains("alloc: no data path"), "{table}");
    assert_clean(&mut rig, 0, &before);
    let after = said(&rig, &["status"]);
    assert!(after.contains("no agent has run here"), "{after}");
}

const METRICS: &str = "--metrics-addr=127.0.0.1:9476";

/// The series of `/metrics`, with their values.
fn scrape(rig: &Rig) -> BTreeMap<String, f64> {
    let address = SocketAddr::from(([127, 0, 0, 1], 9476));
    let answer = http::get(rig.ns(0), address, "/metrics", PATIENCE).expect("an answer");
    let lines = answer.body.lines().filter(|line| !line.starts_with('#'));
    let mut found = BTreeMap::new();
    for line in lines {
        let (series, value) = line.rsplit_once(' ').expect("a value");
        let before = found.insert(series.to_owned(), value.parse().expect("a number"));
        assert_eq!(before, None, "{series} twice");
    }
    let described = answer
        .body
        .lines()
        .filter(|line| line.starts_with("# HELP"));
    let described: Vec<&str> = described.collect();
    let unique: BTreeSet<&&str> = described.iter().collect();
    assert_eq!(described.len(), unique.len(), "{described:?}");
    found
}

#[test]
fn metrics_are_of_both_overlays() {
    if !privileged() {
        return;
    }
    let mut rig = lab(Families::Dual, 2, "vxlan");
    start(&mut rig, &[METRICS]);
    let name = |family: &str| {
        format!(
            "flannel_datapath_packets_total{{family=\"{family}\",direction=\"encap\",path=\"fast\"}}"
        )
    };
    let found = eventually(PATIENCE, "both are fast", || {
        reach(&rig, Families::Dual);
        let found = scrape(&rig);
        let fast = ["ipv4", "ipv6"].map(|family| found.get(&name(family)).copied());
        let enough = fast.iter().all(|count| *count > Some(5.0));
        enough.then_some(found).ok_or(format!("{fast:?}"))
    });
    for family in ["ipv4", "ipv6"] {
        for (series, wanted) in [
            ("flannel_peers{family=\"F\"}", 1.0),
            ("flannel_problems{family=\"F\"}", 0.0),
            ("flannel_datapath_mode{family=\"F\",mode=\"bpf\"}", 1.0),
            ("flannel_datapath_rung{family=\"F\",rung=\"L2\"}", 1.0),
            (
                "flannel_fast_path_mode{family=\"F\",mode=\"established\"}",
                1.0,
            ),
            ("flannel_bpf_map_entries{family=\"F\",map=\"pods\"}", 1.0),
            (
                "flannel_bpf_program_attached{family=\"F\",interface=\"eth0\",hook=\"from_wire\"}",
                1.0,
            ),
        ] {
            let series = series.replace('F', family);
            assert_eq!(found.get(&series), Some(&wanted), "{series}: {found:#?}");
        }
        let status = rig.status(0);
        let of = if family == "ipv6" {
            &status["ipv6"]
        } else {
            &status
        };
        let told = of["fast_path"]["counters"]["encap"]["packets"].as_f64();
        assert!(told >= found.get(&name(family)).copied(), "{told:?}");
    }
    assert_eq!(found.get("flannel_store_connected"), Some(&1.0));
    assert!(
        found.contains_key("flannel_readiness_pending{part=\"datapath-v6\"}"),
        "{found:#?}"
    );
}

#[test]
fn metrics_of_a_node_without_ebpf_are_told() {
    if !privileged() {
        return;
    }
    let mut rig = lab(Families::V4, 1, "alloc");
    rig.start_agent(0, &[METRICS]);
    rig.wait_ready(0);
    let wanted = [
        ("flannel_ready", 1.0),
        ("flannel_peers", 0.0),
        ("flannel_store_connected", 1.0),
        ("flannel_problems", 0.0),
        ("flannel_datapath_mode{mode=\"kernel\"}", 0.0),
    ];
    eventually(PATIENCE, "the figures", || {
        let found = scrape(&rig);
        let right = |(series, value): &(&str, f64)| found.get(*series) == Some(value);
        wanted
            .iter()
            .all(right)
            .then_some(())
            .ok_or(format!("{found:#?}"))
    });
}
