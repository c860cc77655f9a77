//! The alloc backend: a lease and `subnet.env`, no device and no programs, and none that an earlier backend has left.

mod rig;

use std::fs;

use flannel_testkit::{
    LabOptions, eventually,
    json::{ip_json, link},
    privileged,
};
use rig::{DEVICE, PATIENCE, Rig, dump::Dump, hooks};

const ALLOC: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"alloc"}}"#;

fn value(rig: &Rig, node: usize) -> String {
    fs::read_to_string(rig.lease_file(rig.node(node).subnet)).expect("the lease")
}

/// As upstream stores it: no backend type, no data.
fn stored(rig: &Rig, node: usize) -> String {
    let ip = rig.node(node).ip;
    format!(r#"{{"PublicIP":"{ip}","PublicIPv6":null}}"#)
}

fn env(rig: &Rig, node: usize) -> String {
    fs::read_to_string(rig.subnet_file(node)).expect("subnet.env")
}

fn written(rig: &Rig, node: usize, mtu: u32) -> String {
    let subnet = rig.node(node).subnet;
    format!(
        "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET={}/{}\nFLANNEL_MTU={mtu}\nFLANNEL_IPMASQ=false\n",
        subnet.gateway(),
        subnet.prefix_len()
    )
}

#[test]
fn nothing_on_the_node_is_touched() {
    if !privileged() {
        return;
    }
    let options = LabOptions {
        nodes: 1,
        ..LabOptions::default()
    };
    let mut rig = Rig::with(options, ALLOC);
    let before = Dump::of(rig.ns(0));
    rig.start_agent(0, &["--iptables-forward-rules=false"]);
    rig.wait_ready(0);
    before.assert_same(&Dump::of(rig.ns(0)), "while the agent runs");
    assert_eq!(value(&rig, 0), stored(&rig, 0));
    assert_eq!(env(&rig, 0), written(&rig, 0, 1500));
    // Pods cannot be started without the file: it comes back.
    fs::remove_file(rig.subnet_file(0)).expect("remove subnet.env");
    eventually(PATIENCE, "subnet.env is back", || {
        let text = fs::read_to_string(rig.subnet_file(0)).map_err(|error| error.to_string())?;
        (text == written(&rig, 0, 1500)).then_some(()).ok_or(text)
    });
    // The MTU is the uplink's, also when that changes.
    rig.ns(0).ip("link set eth0 mtu 1400").expect("another MTU");
    eventually(PATIENCE, "the MTU is the uplink's", || {
        let text = env(&rig, 0);
        (text == written(&rig, 0, 1400)).then_some(()).ok_or(text)
    });
    rig.ns(0)
        .ip("link set eth0 mtu 1500")
        .expect("the MTU of before");
    assert_eq!(rig.stop_agent(0), 0);
    before.assert_same(&Dump::of(rig.ns(0)), "after the agent");
    assert_eq!(value(&rig, 0), stored(&rig, 0), "the lease stays");
}

#[test]
fn what_vxlan_has_left_takes_no_packets_any_more() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start(2, &[]);
    rig.ping(0, 1).expect("over vxlan");
    hooks::hooks(rig.ns(0)).one_each().expect("both programs");
    for node in [0, 1] {
        assert_eq!(rig.stop_agent(node), 0);
    }
    assert!(
        link(rig.ns(0), DEVICE).is_ok(),
        "the device stays at the end"
    );
    fs::write(rig.lease_dir().join("config"), ALLOC).expect("the configuration");
    // One by one, as a cluster is restarted: the other backend's lease is another backend's.
    rig.start_agent(0, &[]);
    rig.wait_ready(0);
    let links = ip_json(rig.ns(0), &["link", "show"]).expect("links");
    let names: Vec<&str> = links
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|link| link["ifname"].as_str())
        .filter(|name| name.starts_with("flannel"))
        .collect();
    assert!(names.is_empty(), "{names:?}");
    let routes = ip_json(rig.ns(0), &["route", "show", "root", "10.244.0.0/16"]).expect("routes");
    let peer = rig.node(1).subnet.to_string();
    let text = routes.to_string();
    assert!(!text.contains(&peer), "{text}");
    assert_eq!(hooks::hooks(rig.ns(0)), hooks::Hooks::default());
    assert!(!rig.instance(0).exists(), "pins are left");
    assert!(!rig.state_file(0).exists(), "the state is left");
    assert_eq!(value(&rig, 0), stored(&rig, 0));
    assert_eq!(env(&rig, 0), written(&rig, 0, 1500));
    assert_eq!(
        rig.agent(0)
            .log()
            .matches("removed device flannel.1")
            .count(),
        1
    );

    rig.start_agent(1, &[]);
    rig.wait_ready(1);
    // What the cloud's controller does.
    for (node, other) in [(0, 1), (1, 0)] {
        let (subnet, via) = (rig.node(other).subnet, rig.node(other).ip);
        rig.ns(node)
            .ip(&format!("route add {subnet} via {via}"))
            .expect("a route");
    }
    eventually(PATIENCE, "the pods reach each other by routes", || {
        rig.ping(0, 1)
            .and_then(|_| rig.ping(1, 0))
            .map_err(|error| format!("{error:#}"))
    });
}

/// A node of another backend is no peer, and that is said once.
#[test]
fn a_node_of_alloc_is_no_peer_of_vxlan() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::new(2);
    rig.start_agent(0, &[]);
    rig.wait_ready(0);
    fs::write(rig.lease_file(rig.node(1).subnet), stored(&rig, 1)).expect("the other's lease");
    let subnet = rig.node(1).subnet;
    let line = format!("ignoring non-vxlan v4Subnet({subnet}) v6Subnet(::/0): type=none");
    rig.agent(0).wait_log(&line, PATIENCE).expect("the warning");
    rig.put_lease(
        "10.244.9.0/24".parse().unwrap(),
        [192, 168, 77, 99].into(),
        "0a:00:00:00:00:09",
    );
    eventually(PATIENCE, "a peer of vxlan", || {
        let text = ip_json(rig.ns(0), &["route", "show", "dev", DEVICE])
            .expect("routes")
            .to_string();
        text.contains("10.244.9.0/24").then_some(()).ok_or(text)
    });
    let text = ip_json(rig.ns(0), &["route"]).expect("routes").to_string();
    assert!(!text.contains(&subnet.to_string()), "{text}");
    assert_eq!(rig.agent(0).log().matches(&line).count(), 1);
}

#[test]
fn backends_that_do_not_exist_here_are_refused_in_upstreams_words() {
    if !privileged() {
        return;
    }
    for kind in [
        "udp",
        "IPIP",
        "ipsec",
        "extension",
        "tencent-vpc",
        "nonsense",
        "",
    ] {
        let conf = format!(r#"{{"Network":"10.244.0.0/16","Backend":{{"Type":"{kind}"}}}}"#);
        let options = LabOptions {
            nodes: 1,
            ..LabOptions::default()
        };
        let mut rig = Rig::with(options, &conf);
        rig.start_agent(0, &[]);
        let code = rig.agent(0).wait(PATIENCE).expect("the agent ends");
        assert_ne!(code, 0, "{kind}");
        let log = rig.agent(0).log();
        let last = log.trim_end().lines().last().unwrap_or_default();
        let words = format!(
            "Error fetching backend: unknown backend type: {}",
            kind.to_lowercase()
        );
        assert!(last.contains(&words), "{log}");
        assert!(
            last.contains(r#"supported: "vxlan", "host-gw", "wireguard", "alloc""#),
            "{log}"
        );
    }
}
