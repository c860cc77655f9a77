//! The encrypted overlay, on kernels that have WireGuard: `cargo xtask test --kernel` runs it in its machines. What is asserted is what
//! `wg`, `ip` and `tcpdump` show.

#[path = "guest_wireguard/change.rs"]
mod change;
#[path = "guest_wireguard/cloud.rs"]
mod cloud;
mod rig;

use std::{collections::BTreeMap, fs, os::unix::fs::PermissionsExt as _, time::Duration};

use cloud::{Cloud, DUAL, NODES, V4, peers_of};
use flannel_testkit::{
    Capture, Families, Family, eventually,
    json::{ip_json, link},
    traffic::{TcpFlow, ping_once},
};
use rig::PATIENCE;
use serde_json::json;

/// Bytes a second of a stream that loses nothing by itself.
const PACE: u32 = 1 << 20;
const SOON: Duration = Duration::from_secs(2);

/// Every pod reaches every pod of other nodes, in every family, and nothing of it can be read on the wire.
fn every_pair(families: Families, backend: &str) -> Cloud {
    let cloud = Cloud::start(families, backend);
    let wires: Vec<Capture> = (0..NODES).map(|node| cloud.capture(node, "")).collect();
    for family in families.list() {
        for (from, to) in Cloud::pairs() {
            eventually(
                PATIENCE,
                &format!("{family}: pod {from} reaches pod {to}"),
                || ping_once(&cloud.pod(from).ns, cloud.pod(to).address(family), SOON),
            );
        }
    }
    let mut encrypted = 0;
    for wire in wires {
        let wire = wire.stop().expect("the wire");
        for packet in &wire.packets {
            assert!(!cloud.is_plain(&packet.data), "{:02x?}", packet.data);
            encrypted += usize::from(cloud::is_wireguard(&packet.data));
        }
    }
    // Each way, on both nodes' wires.
    let pings = Cloud::pairs().len() * families.list().len();
    assert!(
        encrypted >= pings * 4,
        "{encrypted} encrypted packets for {pings} pings"
    );
    cloud
}

#[test]
fn ipv4() {
    let cloud = every_pair(Families::V4, r#"{"Type":"wireguard"}"#);
    for node in 0..NODES {
        let ns = cloud.ns(node);
        let device = link(ns, "flannel-wg").expect("the device");
        assert_eq!(device["linkinfo"]["info_kind"], "wireguard");
        assert_eq!(device["mtu"], 1420);
        let routes = ip_json(ns, &["-4", "route", "show", "dev", "flannel-wg"]).expect("routes");
        assert_eq!(
            routes,
            json!([{"dst": "10.244.0.0/16", "scope": "link", "flags": []}])
        );
        assert_eq!(cloud.subnet_env(node, "FLANNEL_MTU"), "1420");
        // The third opinion about the key, and upstream's bytes of the lease.
        let public = cloud.public_key(node);
        assert_eq!(cloud.wg(node, "show flannel-wg public-key"), public);
        assert_eq!(
            cloud.lease(node),
            format!(
                r#"{{"PublicIP":"192.168.77.{}","PublicIPv6":null,"BackendType":"wireguard","BackendData":{{"PublicKey":"{public}","Port":51820}}}}"#,
                11 + node
            )
        );
        let mode = fs::metadata(cloud.key_file(node))
            .expect("the key")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}

#[test]
fn ipv6() {
    let cloud = every_pair(
        Families::V6,
        r#"{"Type":"wireguard","PersistentKeepaliveInterval":25}"#,
    );
    let ns = cloud.ns(0);
    assert!(link(ns, "flannel-wg").is_err());
    assert_eq!(link(ns, "flannel-wg-v6").expect("the device")["mtu"], 1420);
    assert_eq!(cloud.wg(0, "show flannel-wg-v6 listen-port"), "51821");
    for (_, seconds) in peers_of(&cloud.wg(0, "show flannel-wg-v6 persistent-keepalive")) {
        assert_eq!(seconds, "25");
    }
}

#[test]
fn both_families_over_a_device_each() {
    let cloud = every_pair(Families::Dual, r#"{"Type":"wireguard","MTU":1480}"#);
    for node in 0..NODES {
        for (device, port) in [("flannel-wg", "51820"), ("flannel-wg-v6", "51821")] {
            assert_eq!(
                link(cloud.ns(node), device).expect("the device")["mtu"],
                1400
            );
            assert_eq!(cloud.wg(node, &format!("show {device} listen-port")), port);
        }
        let public = cloud.public_key(node);
        let data = |port| format!(r#"{{"PublicKey":"{public}","Port":{port}}}"#);
        let lease = cloud.lease(node);
        assert!(
            lease.contains(&format!(r#""BackendData":{}"#, data(51_820))),
            "{lease}"
        );
        assert!(
            lease.contains(&format!(r#""BackendV6Data":{}"#, data(51_821))),
            "{lease}"
        );
    }
}

#[test]
fn both_families_over_one_device() {
    let cloud = every_pair(Families::Dual, r#"{"Type":"wireguard","Mode":"auto"}"#);
    for node in 0..NODES {
        assert!(link(cloud.ns(node), "flannel-wg-v6").is_err());
        let allowed = peers_of(&cloud.wg(node, "show flannel-wg allowed-ips"));
        let endpoints = peers_of(&cloud.wg(node, "show flannel-wg endpoints"));
        for other in (0..NODES).filter(|other| *other != node) {
            let key = cloud.public_key(other);
            assert_eq!(allowed[&key].split(' ').count(), 2, "{allowed:?}");
            // Private addresses of both families: IPv4, as upstream has it.
            assert_eq!(endpoints[&key], format!("192.168.77.{}:51820", 11 + other));
        }
    }
}

#[test]
fn a_key_that_only_some_share_carries_nothing() {
    let one = r#"{"Type":"wireguard","PSK":"AwoRGB8mLTQ7QklQV15lbHN6gYiPlp2kq7K5wMfO1dw="}"#;
    let other = r#"{"Type":"wireguard","PSK":"//////////////////////////////////////////8="}"#;
    let mut cloud = Cloud::start(Families::V4, one);
    let reaches = |cloud: &Cloud, to: usize| {
        ping_once(&cloud.pod(0).ns, cloud.pod(to).address(Family::V4), SOON)
    };
    eventually(PATIENCE, "pods reach each other", || reaches(&cloud, 1));
    cloud.stop_agent(2);
    cloud.set_conf(V4, other);
    cloud.start_agent(2);
    cloud.wait_ready(2);
    eventually(PATIENCE, "the new key is set", || {
        let keys = peers_of(&cloud.wg(2, "show flannel-wg preshared-keys"));
        let new = "//////////////////////////////////////////8=";
        if keys.values().all(|key| key == new) {
            Ok(())
        } else {
            Err(format!("{keys:?}"))
        }
    });
    // A session that was there before does not outlast its device's peer; a new one does not come about.
    for node in 0..NODES {
        cloud
            .ns(node)
            .ip("link set flannel-wg down")
            .expect("end all sessions");
    }
    eventually(PATIENCE, "the others reach each other again", || {
        reaches(&cloud, 1)
    });
    assert!(reaches(&cloud, 2).is_err(), "a packet has come through");
}

#[test]
fn a_restart_keeps_the_key_and_loses_nothing() {
    let mut cloud = Cloud::start(Families::V4, r#"{"Type":"wireguard"}"#);
    let (server, client) = (cloud.pod(0).clone(), cloud.pod(1).clone());
    eventually(PATIENCE, "pods reach each other", || {
        ping_once(&client.ns, server.ip, SOON)
    });
    let before: Vec<(String, u32)> = (0..2).map(|node| cloud.identity(node)).collect();
    let flow = TcpFlow::start_paced(&server.ns, server.ip, &client.ns, PACE).expect("a stream");
    for node in 0..2 {
        assert_eq!(cloud.stop_agent(node), 0);
        std::thread::sleep(Duration::from_millis(500));
        cloud.start_agent(node);
        cloud.wait_ready(node);
        cloud.kill_agent(node);
        cloud.start_agent(node);
        cloud.wait_ready(node);
    }
    let stats = flow.stop().expect("the stream goes on");
    assert_eq!(stats.lost, 0, "{stats:?}");
    let after: Vec<(String, u32)> = (0..2).map(|node| cloud.identity(node)).collect();
    assert_eq!(after, before);
}

#[test]
fn peers_come_move_and_leave() {
    let cloud = Cloud::start(Families::V4, r#"{"Type":"wireguard"}"#);
    let stranger = "AwoRGB8mLTQ7QklQV15lbHN6gYiPlp2kq7K5wMfO1dw=";
    let peer = |cloud: &Cloud| {
        let of = |what: &str| {
            let all: BTreeMap<String, String> =
                peers_of(&cloud.wg(0, &format!("show flannel-wg {what}")));
            all.get(stranger).cloned()
        };
        of("endpoints").zip(of("allowed-ips"))
    };
    // As releases before 0.26 write it: no port.
    for (lease, wanted) in [
        (
            r#""PublicIP":"192.168.77.99","PublicIPv6":null,"BackendType":"wireguard","BackendData":{"PublicKey":"KEY"}"#,
            Some("192.168.77.99:51820"),
        ),
        (
            r#""PublicIP":"192.168.77.98","PublicIPv6":null,"BackendType":"wireguard","BackendData":{"PublicKey":"KEY","Port":7000}"#,
            Some("192.168.77.98:7000"),
        ),
        (
            r#""PublicIP":"192.168.77.98","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"3a:00:b6:07:bf:a4"}"#,
            None,
        ),
    ] {
        cloud.put_lease(
            "10.244.99.0-24",
            &format!("{{{}}}", lease.replace("KEY", stranger)),
        );
        let wanted = wanted.map(|at| (at.to_owned(), "10.244.99.0/24".to_owned()));
        eventually(PATIENCE, lease, || {
            let seen = peer(&cloud);
            if seen == wanted {
                Ok(())
            } else {
                Err(format!("{seen:?}"))
            }
        });
    }
    // One that was added by hand to our device is nobody's node.
    let add = [
        "wg",
        "set",
        "flannel-wg",
        "peer",
        stranger,
        "allowed-ips",
        "10.244.77.0/24",
    ];
    cloud.ns(0).exec(add).expect("add a peer");
    cloud.remove_lease(2);
    let gone = cloud.public_key(2);
    let left = cloud.public_key(1);
    eventually(PATIENCE, "the node and the stranger are gone", || {
        let peers = peers_of(&cloud.wg(0, "show flannel-wg allowed-ips"));
        if peers.keys().eq([&left]) {
            Ok(())
        } else {
            Err(format!("{peers:?}, {gone} left"))
        }
    });
}

#[test]
fn a_device_that_is_removed_comes_back_with_its_peers() {
    let cloud = Cloud::start(Families::Dual, r#"{"Type":"wireguard"}"#);
    for device in ["flannel-wg", "flannel-wg-v6"] {
        cloud
            .ns(0)
            .ip(&format!("link del {device}"))
            .expect("remove the device");
    }
    for family in Families::Dual.list() {
        eventually(PATIENCE, &format!("{family} is back"), || {
            ping_once(&cloud.pod(0).ns, cloud.pod(1).address(family), SOON)
        });
    }
}

#[test]
fn modes_change_both_ways_and_cleanup_leaves_nothing() {
    let mut cloud = Cloud::start(Families::Dual, r#"{"Type":"wireguard"}"#);
    for node in 0..NODES {
        assert_eq!(cloud.stop_agent(node), 0);
        // Nothing is taken away at the end.
        for device in ["flannel-wg", "flannel-wg-v6"] {
            assert_eq!(
                link(cloud.ns(node), device).expect("it stays")["operstate"],
                "UNKNOWN"
            );
        }
    }
    for (mode, devices) in [("auto", 1), ("separate", 2)] {
        for node in 0..NODES {
            if cloud.is_running(node) {
                assert_eq!(cloud.stop_agent(node), 0);
            }
        }
        let backend = format!(r#"{{"Type":"wireguard","Mode":"{mode}"}}"#);
        cloud.set_conf(DUAL, &backend);
        for node in 0..NODES {
            cloud.start_agent(node);
            cloud.wait_ready(node);
            let there =
                ["flannel-wg", "flannel-wg-v6"].map(|name| link(cloud.ns(node), name).is_ok());
            assert_eq!(there, [true, devices == 2], "{mode}");
        }
        for family in Families::Dual.list() {
            eventually(PATIENCE, &format!("{family} in mode {mode}"), || {
                ping_once(&cloud.pod(0).ns, cloud.pod(1).address(family), SOON)
            });
        }
    }
    assert_eq!(cloud.stop_agent(0), 0);
    let done = cloud.cleanup(0);
    assert!(done.status.success(), "{done:?}");
    assert!(link(cloud.ns(0), "flannel-wg").is_err());
    let left = ip_json(cloud.ns(0), &["route"])
        .expect("routes")
        .to_string();
    assert!(!left.contains("flannel-wg"), "{left}");
    assert!(cloud.key_file(0).exists());
}

#[test]
fn a_device_of_another_kind_is_left_alone() {
    let mut cloud = Cloud::new(Families::V4, V4, r#"{"Type":"wireguard"}"#);
    cloud
        .ns(0)
        .ip("link add flannel-wg type dummy")
        .expect("a dummy");
    let before = ip_json(cloud.ns(0), &["-d", "link"]).expect("links");
    let (code, said) = cloud.run_to_end(0);
    assert_eq!(code, 4, "{said}");
    assert!(said.contains("device flannel-wg is in the way"), "{said}");
    assert_eq!(
        ip_json(cloud.ns(0), &["-d", "link"]).expect("links"),
        before
    );
}
