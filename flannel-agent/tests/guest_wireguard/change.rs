//! Another backend on a running cluster, node by node, and what is told of the encrypted one.

use std::{collections::BTreeSet, fs};

use flannel_testkit::{Families, Family, eventually, json::ip_json, traffic::ping_once};

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
