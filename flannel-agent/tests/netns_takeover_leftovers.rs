//! What upstream, an older configuration or other programs have left on a node: what of it is kept, mended, replaced or removed.

mod rig;
mod takeover_rig;

use std::collections::BTreeSet;

use flannel_testkit::{eventually, json, mac_text, privileged, upstream::UpstreamConf};
use rig::{PATIENCE, list, text};
use takeover_rig::{Cluster, StoreKind, Traffic, conf, traces};

/// Key and value of a node with both families, and of one with IPv6 alone, as upstream writes them.
const DUAL: [&str; 2] = [
    "/coreos.com/network/subnets/10.5.74.0-24&fd05:0:0:4d::-64",
    r#"{"PublicIP":"192.168.77.74","PublicIPv6":"fd77::12","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"b2:dd:fe:4d:6e:7c"},"BackendV6Data":{"VNI":1,"VtepMAC":"96:d7:e0:3f:25:b6"}}"#,
];
const V6: [&str; 2] = [
    "/coreos.com/network/subnets/0.0.0.0-0&fd00:12:0:43::-64",
    r#"{"PublicIP":"0.0.0.0","PublicIPv6":"fd77::13","BackendType":"vxlan","BackendV6Data":{"VNI":1,"VtepMAC":"96:d7:e0:3f:25:b7"}}"#,
];

/// A peer that left while nobody ran on the node.
const GONE: [&str; 3] = ["10.5.77.0", "192.168.77.77", "0a:00:00:00:00:77"];

/// Upstream never removes what it finds at a start, and would keep these for ever.
#[test]
fn peers_that_left_meanwhile_are_removed_and_nothing_else() {
    if !privileged() {
        return;
    }
    let mut cluster = Cluster::start(StoreKind::Etcd, 2, conf());
    let before = cluster.kernel(0);
    let [base, public_ip, mac] = GONE;
    let lease = serde_json::json!({"PublicIP": public_ip, "BackendType": "vxlan", "BackendData": {"VtepMAC": mac}});
    let subnet = format!("{base}/24").parse().unwrap();
    cluster.nodes[0].add_peer(subnet, &lease).unwrap();
    let named = traces(cluster.ns(0), &[base, &format!("{base}/24"), mac]);
    assert_eq!(named.len(), 3, "{named:?}");
    // Upstream's own start leaves them.
    cluster.start_upstream(0);
    assert_eq!(
        traces(cluster.ns(0), &[base, &format!("{base}/24"), mac]),
        named
    );

    let traffic = Traffic::start(&cluster);
    cluster.take_over(0, &[]);
    eventually(PATIENCE, "what was left is gone", || {
        let left = traces(cluster.ns(0), &[base, &format!("{base}/24"), mac]);
        left.is_empty().then_some(()).ok_or(left.join("\n"))
    });
    before.assert_same(&cluster.kernel(0), "without the peer that left");
    traffic.assert_untouched();
}

/// What others have put on our device or into our network stays.
#[test]
fn what_is_not_flannels_stays() {
    if !privileged() {
        return;
    }
    let mut cluster = Cluster::start(StoreKind::Dir, 2, conf());
    let ns = cluster.ns(0).clone();
    for line in [
        // dhcpcd or avahi, and the address of an earlier Network.
        "addr add 169.254.7.7/16 dev flannel.1",
        "addr add 10.9.4.0/32 dev flannel.1",
        // An operator's routes: inside the network by another device, and over ours in another shape.
        "route add 10.5.200.0/24 via 192.168.77.1 dev eth0",
        "route add 10.8.0.0/16 dev flannel.1",
        "route add blackhole 10.5.201.0/24",
    ] {
        ns.ip(line).unwrap();
    }
    let before = cluster.kernel(0);
    let traffic = Traffic::start(&cluster);
    cluster.take_over(0, &[]);
    before.assert_same(&cluster.kernel(0), "taken over");
    traffic.assert_untouched();
}

/// An older lease's address would be chosen as a source now and then.
#[test]
fn older_addresses_of_the_network_go_and_the_mtu_is_mended_in_place() {
    if !privileged() {
        return;
    }
    let mut cluster = Cluster::start(StoreKind::Etcd, 2, conf());
    let (before, identity) = (cluster.kernel(0), cluster.identity(0));
    let ns = cluster.ns(0).clone();
    ns.ip("addr add 10.5.240.0/32 dev flannel.1").unwrap();
    // Upstream does not apply a changed MTU to a device that exists.
    ns.ip("link set flannel.1 mtu 1400").unwrap();
    cluster.start_upstream(0);
    assert_eq!(json::link(&ns, "flannel.1").unwrap()["mtu"], 1400);
    ns.ip("addr add 10.5.240.0/32 dev flannel.1").unwrap();
    let traffic = Traffic::start(&cluster);
    cluster.take_over(0, &[]);
    before.assert_same(&cluster.kernel(0), "mended");
    assert_eq!(cluster.identity(0), identity);
    traffic.assert_untouched();
}

/// A device that cannot be what the configuration asks for is made anew, with the MAC address that all peers know.
#[test]
fn a_device_with_other_attributes_is_replaced_and_keeps_its_mac() {
    if !privileged() {
        return;
    }
    let cases = [
        (
            "id 1 local 192.168.77.11 dev eth0 dstport 4789 nolearning",
            "port is 4789",
        ),
        (
            "id 1 local 192.168.77.11 dev eth0 dstport 8472 nolearning gbp",
            "GBP is true",
        ),
        (
            "id 1 local 192.168.77.11 dev eth0 dstport 8472 learning",
            "learning is true",
        ),
        (
            "id 1 local 192.168.77.200 dev eth0 dstport 8472 nolearning",
            "local address",
        ),
        (
            "id 1 local 192.168.77.11 dev other dstport 8472 nolearning",
            "another interface",
        ),
        (
            "id 9 local 192.168.77.11 dev eth0 dstport 8472 nolearning",
            "VNI is 9",
        ),
    ];
    for flags in [&["--datapath=kernel"][..], &[]] {
        let mut cluster = Cluster::start(StoreKind::Dir, 2, conf());
        let ns = cluster.ns(0).clone();
        ns.ip("link add other type veth peer name rehto").unwrap();
        let (_, mac, leases, env) = cluster.identity(0);
        let healthy = json::link(&ns, "flannel.1").unwrap()["linkinfo"].clone();
        for (attributes, why) in cases {
            ns.ip("link del flannel.1").unwrap();
            let mac_of_it = mac_text(cluster.nodes[0].mac);
            ns.ip(&format!(
                "link add flannel.1 address {mac_of_it} mtu 1450 type vxlan {attributes}"
            ))
            .unwrap();
            ns.ip("link set flannel.1 up").unwrap();
            cluster.take_over(0, flags);
            cluster.wait_log(0, why);
            cluster.wait_all_pairs();
            let now = cluster.identity(0);
            assert_eq!(
                (now.1, now.2, now.3),
                (mac.clone(), leases.clone(), env.clone()),
                "{why}"
            );
            assert_eq!(
                json::link(&ns, "flannel.1").unwrap()["linkinfo"],
                healthy,
                "{why}"
            );
            cluster.stop_agent(0);
            assert_eq!(
                cluster.start_upstream(0),
                None,
                "upstream accepts the new device"
            );
            cluster.wait_all_pairs();
        }
    }
}

/// A device of another kind with our name is somebody's, and says so.
#[test]
fn a_device_that_is_no_vxlan_device_is_left_alone() {
    if !privileged() {
        return;
    }
    let mut cluster = Cluster::start(StoreKind::Dir, 2, conf());
    let ns = cluster.ns(0).clone();
    ns.ip("link del flannel.1").unwrap();
    ns.ip("link add flannel.1 type bridge").unwrap();
    let index = ns.ifindex("flannel.1").unwrap();
    cluster.start_agent(0, &["--datapath=kernel"]);
    cluster.wait_log(0, "not a device of ours: rename or delete it");
    assert_eq!(ns.ifindex("flannel.1").unwrap(), index);
    ns.ip("link del flannel.1").unwrap();
    cluster.wait_log(0, "flannel is ready");
}

/// Upstream reaches peers on the same link by plain routes if asked to, and so do we: the route is replaced by ours in one step, the peer
/// goes on as it is, and handing back is as hitless.
#[test]
fn direct_routes_are_taken_over_without_loss() {
    if !privileged() {
        return;
    }
    let direct = UpstreamConf {
        vni: 7,
        port: 4789,
        direct_routing: true,
        ..conf()
    };
    for flags in [&["--datapath=kernel"][..], &[]] {
        let mut cluster = Cluster::start(StoreKind::Etcd, 2, direct);
        let (peer, ns) = (cluster.nodes[1].clone(), cluster.ns(0).clone());
        let route = |what: &str| {
            let routes = json::ip_json(&ns, &["route", "show", what]).unwrap();
            let of = |route| (text(route, "gateway").unwrap(), text(route, "dev").unwrap());
            list(&routes).iter().map(of).collect::<BTreeSet<_>>()
        };
        let subnet = peer.subnet.to_string();
        let plain = BTreeSet::from([(peer.public_ip.to_string(), "eth0".to_owned())]);
        assert_eq!(route(&subnet), plain);
        // The route of a peer that left cannot be told from an operator's.
        ns.ip("route add 10.5.77.0/24 via 192.168.77.77").unwrap();

        let traffic = Traffic::start(&cluster);
        for _ in 0..2 {
            cluster.take_over(0, flags);
            assert_eq!(route(&subnet), plain);
            let routes = json::ip_json(&ns, &["route", "show", &subnet]).unwrap();
            assert_eq!(text(&list(&routes)[0], "protocol").unwrap(), "241");
            cluster.stop_agent(0);
            assert_eq!(cluster.start_upstream(0), None);
            assert_eq!(route(&subnet), plain);
        }
        traffic.assert_untouched();
        let kept = BTreeSet::from([("192.168.77.77".to_owned(), "eth0".to_owned())]);
        assert_eq!(route("10.5.77.0/24"), kept);
    }
}

/// Nodes with both families, and with IPv6 alone, are in the store as upstream wrote them.
#[test]
fn leases_of_dual_stack_nodes_are_peers_and_those_of_ipv6_alone_are_none() {
    if !privileged() {
        return;
    }
    let mut cluster = Cluster::start(StoreKind::Etcd35, 2, conf());
    let before = cluster.kernel(0);
    let (dual, v6) = (DUAL, V6);
    let etcd = cluster.etcd();
    etcd.put(dual[0], dual[1]).unwrap();
    etcd.put(v6[0], v6[1]).unwrap();
    let traffic = Traffic::start(&cluster);
    cluster.take_over(0, &[]);
    let words = ["10.5.74.0", "10.5.74.0/24", "b2:dd:fe:4d:6e:7c"];
    eventually(PATIENCE, "the peer is there", || {
        let found = traces(cluster.ns(0), &words);
        (found.len() == 3).then_some(()).ok_or(found.join("\n"))
    });
    cluster.etcd().delete(dual[0]).unwrap();
    eventually(PATIENCE, "the peer is gone", || {
        let found = traces(cluster.ns(0), &words);
        found.is_empty().then_some(()).ok_or(found.join("\n"))
    });
    before.assert_same(&cluster.kernel(0), "without the peer");
    let log = cluster.agent(0).log();
    assert!(!log.contains("is not usable"), "{log}");
    traffic.assert_untouched();
}
