//! Another backend on a running cluster, node by node, and what is told of the encrypted one.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
};

use flannel_testkit::{Families, Family, eventually, http, json::ip_json, traffic::ping_once};

use crate::{
    SOON,
    cloud::{Cloud, NODES, V4, peers_of},
    rig::PATIENCE,
};

/// Names of the links and devices of the routes that are flannel's.
fn ours(cloud: &Cloud, node: usize) -> (BTreeSet<String>, BTreeSet<String>) {
    let links = ip_json(cloud.ns(node), &["link"]).expect("links");
    let routes = ip_json(cloud.ns(node), &["route"]).expect("routes");
    let names = |list: &serde_json::Value, field: &str| -> BTreeSet<String> {
        let all = list.as_array().expect("a list").iter();
        let names = all.filter_map(|one| one[field].as_str());
        let ours = names.filter(|name| name.starts_with("flannel"));
        ours.map(str::to_owned).collect()
    };
    (names(&links, "ifname"), names(&routes, "dev"))
}

fn reach(cloud: &Cloud) {
    for (from, to) in Cloud::pairs() {
        eventually(PATIENCE, &format!("pod {from} reaches pod {to}"), || {
            ping_once(&cloud.pod(from).ns, cloud.pod(to).address(Family::V4), SOON)
        });
    }
}

#[test]
fn from_vxlan_to_wireguard_and_back() {
    let mut cloud = Cloud::start(Families::V4, r#"{"Type":"vxlan"}"#);
    reach(&cloud);
    for (backend, device, is_file, gone) in [
        (
            "wireguard",
            "flannel-wg",
            "flannel-wireguard.json",
            "flannel-agent.json",
        ),
        (
            "vxlan",
            "flannel.1",
            "flannel-agent.json",
            "flannel-wireguard.json",
        ),
    ] {
        cloud.set_conf(V4, &format!(r#"{{"Type":"{backend}"}}"#));
        let wanted = BTreeSet::from([device.to_owned()]);
        for node in 0..NODES {
            assert_eq!(cloud.stop_agent(node), 0);
            cloud.start_agent(node);
            cloud.wait_ready(node);
            eventually(PATIENCE, "nothing of the former backend", || {
                let (mut links, routes) = ours(&cloud, node);
                // Room for headers, as long as eBPF carries packets in VXLAN.
                links.retain(|name| backend != "vxlan" || !name.starts_with("flannel-hr"));
                // Peers of this backend come one by one: the first has none yet.
                let right = links == wanted && routes.is_subset(&wanted);
                right
                    .then_some(())
                    .ok_or_else(|| format!("{backend}: {links:?} {routes:?}"))
            });
            assert!(!cloud.has_file(node, gone), "{gone} is left");
            assert!(cloud.has_file(node, is_file), "there is no {is_file}");
            assert_eq!(cloud.has_pins(node), backend == "vxlan");
            let programs = cloud
                .ns(node)
                .exec(["bpftool", "net"])
                .expect("bpftool net");
            let attached =
                ["to_overlay", "from_wire", "from_pod"].map(|name| programs.contains(name));
            assert_eq!(attached.contains(&true), backend == "vxlan", "{programs}");
        }
        reach(&cloud);
        let (status, _) = cloud.ask(0, "status");
        assert_eq!(status["backend"], backend, "{status}");
    }
}

#[test]
fn what_is_told_is_what_wg_shows() {
    let mut cloud = Cloud::start(Families::Dual, r#"{"Type":"wireguard"}"#);
    reach(&cloud);
    let (status, said) = cloud.ask(0, "status");
    assert_eq!(
        (&status["ok"], &status["backend"]),
        (&true.into(), &"wireguard".into())
    );
    assert_eq!(status["problems"], serde_json::json!([]), "{status}");
    let public = cloud.public_key(0);
    assert_eq!(status["wireguard"]["public_key"], public.as_str());
    let devices = status["wireguard"]["devices"].as_array().expect("devices");
    assert_eq!(devices.len(), 2, "{devices:?}");
    for device in devices {
        let name = device["name"].as_str().expect("a name");
        let port = cloud.wg(0, &format!("show {name} listen-port"));
        assert_eq!(device["port"].to_string(), port);
        assert_eq!((&device["up"], &device["peers"]), (&true.into(), &2.into()));
    }
    let (peers, more) = cloud.ask(0, "peers");
    let times = peers_of(&cloud.wg(0, "show flannel-wg latest-handshakes"));
    let endpoints = peers_of(&cloud.wg(0, "show flannel-wg endpoints"));
    let peers = peers.as_array().expect("peers").iter();
    let peers: Vec<_> = peers
        .filter(|peer| peer["device"] == "flannel-wg")
        .collect();
    assert_eq!(peers.len(), 2, "{peers:?}");
    for peer in peers {
        let key = peer["public_key"].as_str().expect("a key");
        assert_eq!(peer["last_handshake"].to_string(), times[key], "{peer}");
        assert_eq!(peer["endpoint"], endpoints[key].as_str());
        assert_eq!(peer["alive"], true);
        for way in ["received_bytes", "sent_bytes"] {
            assert!(peer[way].as_u64() > Some(100), "{peer}");
        }
    }
    // Neither what is written down nor what is told is a secret.
    let private = fs::read_to_string(cloud.key_file(0)).expect("the key");
    assert!(!(said + &more).contains(private.trim()), "the private key");
    // The line that is to be read, of a node that is not as it should be.
    assert_eq!(cloud.stop_agent(0), 0);
    cloud.ns(0).ip("link del flannel-wg").expect("remove it");
    let (broken, _) = cloud.ask_broken(0, "status");
    assert_eq!(broken["ok"], false);
    let problems = broken["problems"].to_string();
    assert!(
        problems.contains("there is no wireguard device flannel-wg\""),
        "{problems}"
    );
    let done = cloud.cleanup(0);
    assert!(done.status.success(), "{done:?}");
    assert_eq!(ours(&cloud, 0), (BTreeSet::new(), BTreeSet::new()));
    assert!(!cloud.has_file(0, "flannel-wireguard.json") && !cloud.has_file(0, "subnet.env"));
}

/// A series of `/metrics` and its value.
type Series = BTreeMap<String, u64>;

/// What `/metrics` of a node says of its peers.
fn scrape(cloud: &Cloud, node: usize) -> Series {
    let address = SocketAddr::from(([127, 0, 0, 1], 9476));
    let answer = http::get(cloud.ns(node), address, "/metrics", PATIENCE).expect("an answer");
    let lines = answer.body.lines();
    let lines = lines.filter(|line| line.starts_with("flannel_peer_"));
    lines
        .filter_map(|line| line.rsplit_once(' '))
        .map(|(series, value)| (series.to_owned(), value.parse().expect("a number")))
        .collect()
}

/// The same series, from `wg`.
fn shown(cloud: &Cloud, node: usize) -> Series {
    let mut found = Series::new();
    for device in ["flannel-wg", "flannel-wg-v6"] {
        let show = |what: &str| peers_of(&cloud.wg(node, &format!("show {device} {what}")));
        let (subnets, times) = (show("allowed-ips"), show("latest-handshakes"));
        for (key, bytes) in show("transfer") {
            let labels = format!(
                r#"device="{device}",peer="{}",public_key="{key}""#,
                subnets[&key]
            );
            let (received, sent) = bytes.split_once('\t').expect("two figures");
            for (direction, bytes) in [("received", received), ("sent", sent)] {
                let name =
                    format!(r#"flannel_peer_bytes_total{{{labels},direction="{direction}"}}"#);
                found.insert(name, bytes.parse().expect("bytes"));
            }
            let name = format!("flannel_peer_last_handshake_timestamp_seconds{{{labels}}}");
            found.insert(name, times[&key].parse().expect("a time"));
        }
    }
    found
}

#[test]
fn metrics_of_each_peer_are_what_wg_shows() {
    const FLAG: &str = "--metrics-addr=127.0.0.1:9476";
    let mut cloud = Cloud::start(Families::Dual, r#"{"Type":"wireguard"}"#);
    reach(&cloud);
    assert_eq!(cloud.stop_agent(0), 0);
    cloud.start_agent_with(0, &[FLAG, "--metrics-peers"]);
    cloud.wait_ready(0);
    // Between two looks of the same figures nothing has passed.
    eventually(PATIENCE, "the figures are the kernel's", || {
        let before = shown(&cloud, 0);
        let said = scrape(&cloud, 0);
        let after = shown(&cloud, 0);
        if before == after && said == before {
            Ok(())
        } else {
            Err(format!("{before:#?} {said:#?} {after:#?}"))
        }
    });
    let before = scrape(&cloud, 0);
    // Two peers on two devices, with three series each.
    assert_eq!(before.len(), 12, "{before:#?}");
    let target = cloud.pod(1).address(Family::V4).to_string();
    cloud
        .pod(0)
        .ns
        .exec([
            "ping", "-q", "-c", "10", "-i", "0.01", "-s", "1000", &target,
        ])
        .expect("pings");
    let after = scrape(&cloud, 0);
    let key = cloud.public_key(1);
    for (series, bytes) in &after {
        let more = bytes - before[series];
        let passed = series.contains("_bytes_") && series.contains("\"flannel-wg\"");
        if passed && series.contains(&key) {
            assert!((10_000..20_000).contains(&more), "{series}: {more}");
        } else {
            assert!(more < 5_000, "{series}: {more}");
        }
    }
    let handshake = after.iter().find(|(series, _)| {
        series.contains("handshake") && series.contains("\"flannel-wg\"") && series.contains(&key)
    });
    assert!(
        handshake.expect("the series").1 > &1_600_000_000,
        "{after:#?}"
    );
    // Without the flag the number of series does not grow with the cluster.
    assert_eq!(cloud.stop_agent(0), 0);
    cloud.start_agent_with(0, &[FLAG]);
    cloud.wait_ready(0);
    assert_eq!(scrape(&cloud, 0), Series::new());
}
