//! What upstream, an older configuration or other programs have left on a node: what of it is kept, mended, replaced or removed.

mod rig;
mod takeover_rig;

use std::collections::BTreeSet;

use flannel_testkit::{
    Families, Family, Prefix, eventually, json, privileged, upstream::UpstreamConf,
};
use rig::{PATIENCE, list, text};
use takeover_rig::{Cluster, StoreKind, Traffic, conf_of, traces};

/// Key and value of a node with both families, of one with IPv6 alone, and of one with IPv4 alone, as upstream writes them.
const DUAL: [&str; 2] = [
    "/coreos.com/network/subnets/10.5.74.0-24&fd05:0:0:4d::-64",
    r#"{"PublicIP":"192.168.77.74","PublicIPv6":"fd77::74","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"b2:dd:fe:4d:6e:7c"},"BackendV6Data":{"VNI":1,"VtepMAC":"96:d7:e0:3f:25:b6"}}"#,
];
const V6: [&str; 2] = [
    "/coreos.com/network/subnets/0.0.0.0-0&fd05:0:0:43::-64",
    r#"{"PublicIP":"0.0.0.0","PublicIPv6":"fd77::13","BackendType":"vxlan","BackendV6Data":{"VNI":1,"VtepMAC":"96:d7:e0:3f:25:b7"}}"#,
];

const V4: [&str; 2] = [
    "/coreos.com/network/subnets/10.5.75.0-24",
    r#"{"PublicIP":"192.168.77.75","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"96:d7:e0:3f:25:b8"}}"#,
];

/// Where the leases of a cluster are: nodes with IPv6 alone are one to upstream in etcd.
fn store(families: Families) -> StoreKind {
    match families {
        Families::V6 => StoreKind::Dir,
        _ => StoreKind::Etcd,
    }
}

/// A peer that left while nobody ran on the node: subnet, public address, MAC address.
fn gone(family: Family) -> [&'static str; 3] {
    match family {
        Family::V4 => ["10.5.77.0/24", "192.168.77.77", "0a:00:00:00:00:77"],
        Family::V6 => ["fd05:0:0:77::/64", "fd77::77", "0a:00:00:00:00:79"],
    }
}

#[test]
fn peers_that_left_meanwhile_are_removed_and_nothing_else() {
    left_meanwhile(Family::V4);
}

#[test]
fn peers_of_ipv6_that_left_meanwhile_are_removed_and_nothing_else() {
    left_meanwhile(Family::V6);
}

#[test]
fn peers_of_both_families_that_left_meanwhile_are_removed_and_nothing_else() {
    left_meanwhile(Families::Dual);
}

/// Upstream never removes what it finds at a start, and would keep these for ever.
fn left_meanwhile(families: impl Into<Families>) {
    if !privileged() {
        return;
    }
    let families = families.into();
    let mut cluster = Cluster::start(store(families), 2, conf_of(families));
    let before = cluster.kernel(0);
    let mut words = Vec::new();
    for family in families.list() {
        let [subnet, public_ip, mac] = gone(family);
        let subnet: Prefix = subnet.parse().unwrap();
        let data = serde_json::json!({ "VtepMAC": mac });
        let lease = serde_json::json!({
            "PublicIP": public_ip, "PublicIPv6": public_ip, "BackendType": "vxlan", "BackendData": data, "BackendV6Data": data,
        });
        cluster.nodes[0].add_peer(subnet, &lease).unwrap();
        let base = subnet.base().to_string();
        words.extend([base, subnet.to_string(), mac.to_owned()]);
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let named = traces(cluster.ns(0), &words);
    assert_eq!(named.len(), words.len(), "{named:?}");
    // Upstream's own start leaves them.
    cluster.start_upstream(0);
    assert_eq!(traces(cluster.ns(0), &words), named);

    let traffic = Traffic::start(&cluster);
    cluster.take_over(0, &[]);
    eventually(PATIENCE, "what was left is gone", || {
        let left = traces(cluster.ns(0), &words);
        left.is_empty().then_some(()).ok_or(left.join("\n"))
    });
    before.assert_same(&cluster.kernel(0), "without the peer that left");
    traffic.assert_untouched();
}

/// What others have put on our device or into our network stays.
#[test]
fn what_is_not_flannels_stays() {
    let lines = [
        // dhcpcd or avahi, and the address of an earlier Network.
        "addr add 169.254.7.7/16 dev flannel.1",
        "addr add 10.9.4.0/32 dev flannel.1",
        // An operator's routes: inside the network by another device, and over ours in another shape.
        "route add 10.5.200.0/24 via 192.168.77.1 dev eth0",
        "route add 10.8.0.0/16 dev flannel.1",
        "route add blackhole 10.5.201.0/24",
    ];
    stays(Family::V4.into(), &lines);
}

#[test]
fn what_is_not_flannels_stays_of_ipv6() {
    let lines = [
        "addr add fe80::7:7/64 dev flannel-v6.1 nodad",
        "addr add fd09:0:0:4::/128 dev flannel-v6.1 nodad",
        "route add fd05:0:0:200::/64 via fd77::1 dev eth0",
        "route add fd08::/48 dev flannel-v6.1",
        "route add blackhole fd05:0:0:201::/64",
    ];
    stays(Family::V6.into(), &lines);
    // Each family's by the other's device.
    let crossed = [
        "addr add fd09:0:0:5::/128 dev flannel.1 nodad",
        "addr add 10.9.4.0/32 dev flannel-v6.1",
        "route add fd07::/48 dev flannel.1",
        "route add 10.8.0.0/16 dev flannel-v6.1",
    ];
    stays(Families::Dual, &[&lines[..], &crossed].concat());
}

fn stays(families: Families, lines: &[&str]) {
    if !privileged() {
        return;
    }
    let mut cluster = Cluster::start(StoreKind::Dir, 2, conf_of(families));
    let ns = cluster.ns(0).clone();
    for line in lines {
        ns.ip(line).unwrap();
    }
    let before = cluster.kernel(0);
    let traffic = Traffic::start(&cluster);
    cluster.take_over(0, &[]);
    before.assert_same(&cluster.kernel(0), "taken over");
    traffic.assert_untouched();
}

#[test]
fn older_addresses_of_the_network_go_and_the_mtu_is_mended_in_place() {
    older_addresses(Family::V4);
}

#[test]
fn older_addresses_of_ipv6_go_and_the_mtu_is_mended_in_place() {
    older_addresses(Family::V6);
}

#[test]
fn older_addresses_of_both_families_go_and_the_mtu_is_mended_in_place() {
    older_addresses(Families::Dual);
}

/// An older lease's address would be chosen as a source now and then.
fn older_addresses(families: impl Into<Families>) {
    if !privileged() {
        return;
    }
    let families = families.into();
    let mut cluster = Cluster::start(store(families), 2, conf_of(families));
    let (before, identity) = (cluster.kernel(0), cluster.identity(0));
    let ns = cluster.ns(0).clone();
    let older: Vec<(String, &str)> = cluster
        .families()
        .into_iter()
        .map(|family| {
            let address = match family {
                Family::V4 => "10.5.240.0/32",
                Family::V6 => "fd05:0:0:240::/128",
            };
            (cluster.device(family), address)
        })
        .collect();
    let add = || {
        for (device, address) in &older {
            ns.ip(&format!("addr add {address} dev {device}")).unwrap();
        }
    };
    add();
    // Upstream does not apply a changed MTU to a device that exists.
    for (device, _) in &older {
        ns.ip(&format!("link set {device} mtu 1400")).unwrap();
    }
    cluster.start_upstream(0);
    for (device, _) in &older {
        assert_eq!(json::link(&ns, device).unwrap()["mtu"], 1400);
    }
    add();
    let traffic = Traffic::start(&cluster);
    cluster.take_over(0, &[]);
    before.assert_same(&cluster.kernel(0), "mended");
    assert_eq!(cluster.identity(0), identity);
    traffic.assert_untouched();
}

#[test]
fn a_device_with_other_attributes_is_replaced_and_keeps_its_mac() {
    for flags in [&["--datapath=kernel"][..], &[]] {
        other_attributes(Families::V4, Family::V4, flags);
    }
}

#[test]
fn a_device_of_ipv6_with_other_attributes_is_replaced_and_keeps_its_mac() {
    other_attributes(Families::V6, Family::V6, &["--datapath=kernel"]);
    // That of IPv4 stays as it is.
    other_attributes(Families::Dual, Family::V6, &[]);
}

/// A device that cannot be what the configuration asks for is made anew, with the MAC address that all peers know.
fn other_attributes(families: Families, family: Family, flags: &[&str]) {
    if !privileged() {
        return;
    }
    let cases = [
        (
            "id 1 local OWN dev eth0 dstport 4789 nolearning",
            "port is 4789",
        ),
        (
            "id 1 local OWN dev eth0 dstport 8472 nolearning gbp",
            "GBP is true",
        ),
        (
            "id 1 local OWN dev eth0 dstport 8472 learning",
            "learning is true",
        ),
        (
            "id 1 local OTHER dev eth0 dstport 8472 nolearning",
            "local address",
        ),
        (
            "id 1 local OWN dev other dstport 8472 nolearning",
            "another interface",
        ),
        (
            "id 9 local OWN dev eth0 dstport 8472 nolearning",
            "VNI is 9",
        ),
    ];
    let other = match family {
        Family::V4 => "192.168.77.200",
        Family::V6 => "fd77::200",
    };
    let mut cluster = Cluster::start(StoreKind::Dir, 2, conf_of(families));
    let (ns, device) = (cluster.ns(0).clone(), cluster.device(family));
    ns.ip("link add other type veth peer name rehto").unwrap();
    let healthy = json::link(&ns, &device).unwrap()["linkinfo"].clone();
    for (attributes, why) in cases {
        let own = cluster.nodes[0].address(family).to_string();
        let attributes = attributes.replace("OWN", &own).replace("OTHER", other);
        let mac = cluster.nodes[0].device_mac(family).unwrap();
        let before = cluster.identity(0);
        ns.ip(&format!("link del {device}")).unwrap();
        ns.ip(&format!(
            "link add {device} address {mac} mtu 1450 type vxlan {attributes}"
        ))
        .unwrap();
        ns.ip(&format!("link set {device} up")).unwrap();
        cluster.take_over(0, flags);
        cluster.wait_log(0, why);
        cluster.wait_all_pairs();
        let now = cluster.identity(0);
        assert_eq!(
            (&now.leases, &now.env),
            (&before.leases, &before.env),
            "{why}"
        );
        for (which, (now, before)) in families
            .list()
            .iter()
            .zip(now.devices.iter().zip(&before.devices))
        {
            assert_eq!(now.1, before.1, "{why}: the MAC address of {which}");
            assert_eq!(now.0 != before.0, *which == family, "{why}: {which}");
        }
        assert_eq!(
            json::link(&ns, &device).unwrap()["linkinfo"],
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

/// A device of another kind with our name is somebody's, and says so.
#[test]
fn a_device_that_is_no_vxlan_device_is_left_alone() {
    for families in [Families::V4, Families::V6, Families::Dual] {
        no_vxlan_device(families);
    }
}

fn no_vxlan_device(families: Families) {
    if !privileged() {
        return;
    }
    let mut cluster = Cluster::start(StoreKind::Dir, 2, conf_of(families));
    let ns = cluster.ns(0).clone();
    // With both families it is the second one's.
    let family = families.list().pop().unwrap();
    let device = cluster.device(family);
    ns.ip(&format!("link del {device}")).unwrap();
    ns.ip(&format!("link add {device} type bridge")).unwrap();
    let index = ns.ifindex(&device).unwrap();
    cluster.start_agent(0, &["--datapath=kernel"]);
    cluster.wait_log(0, "not a device of ours: rename or delete it");
    assert_eq!(ns.ifindex(&device).unwrap(), index);
    ns.ip(&format!("link del {device}")).unwrap();
    cluster.wait_log(0, "flannel is ready");
    cluster.wait_all_pairs();
}

#[test]
fn direct_routes_are_taken_over_without_loss() {
    for flags in [&["--datapath=kernel"][..], &[]] {
        direct_routes(Families::V4, flags);
    }
}

#[test]
fn direct_routes_of_ipv6_are_taken_over_without_loss() {
    direct_routes(Families::V6, &[]);
}

#[test]
fn direct_routes_of_both_families_are_taken_over_without_loss() {
    direct_routes(Families::Dual, &["--datapath=kernel"]);
}

/// Upstream reaches peers on the same link by plain routes if asked to, and so do we: the route is replaced by ours in one step, the peer
/// goes on as it is, and handing back is as hitless.
fn direct_routes(families: Families, flags: &[&str]) {
    if !privileged() {
        return;
    }
    let direct = UpstreamConf {
        vni: 7,
        port: 4789,
        direct_routing: true,
        ..conf_of(families)
    };
    let mut cluster = Cluster::start(store(families), 2, direct);
    let (peer, ns) = (cluster.nodes[1].clone(), cluster.ns(0).clone());
    let show = |what: &str| {
        let family = Family::of(what.parse::<Prefix>().unwrap().base());
        json::ip_json(&ns, &[family.flag(), "route", "show", what]).unwrap()
    };
    let route = |what: &str| {
        let routes = show(what);
        let of = |route| (text(route, "gateway").unwrap(), text(route, "dev").unwrap());
        list(&routes).iter().map(of).collect::<BTreeSet<_>>()
    };
    let plain = |family: Family| {
        let gateway = peer.address(family).to_string();
        BTreeSet::from([(gateway, "eth0".to_owned())])
    };
    for family in families.list() {
        assert_eq!(route(&peer.subnet_of(family).to_string()), plain(family));
        // The route of a peer that left cannot be told from an operator's.
        let [subnet, gateway, _] = gone(family);
        ns.ip(&format!("route add {subnet} via {gateway}")).unwrap();
    }

    let traffic = Traffic::start(&cluster);
    for _ in 0..2 {
        cluster.take_over(0, flags);
        for family in families.list() {
            let subnet = peer.subnet_of(family).to_string();
            assert_eq!(route(&subnet), plain(family));
            let protocol = text(&list(&show(&subnet))[0], "protocol");
            assert_eq!(protocol.as_deref(), Some("241"), "{subnet}");
        }
        cluster.stop_agent(0);
        assert_eq!(cluster.start_upstream(0), None);
        for family in families.list() {
            assert_eq!(route(&peer.subnet_of(family).to_string()), plain(family));
        }
    }
    traffic.assert_untouched();
    for family in families.list() {
        let [subnet, gateway, _] = gone(family);
        let kept = BTreeSet::from([(gateway.to_owned(), "eth0".to_owned())]);
        assert_eq!(route(subnet), kept);
    }
}

#[test]
fn leases_of_dual_stack_nodes_are_peers_and_those_of_ipv6_alone_are_none() {
    other_families(Families::V4, StoreKind::Etcd35);
}

#[test]
fn leases_of_nodes_with_other_families_are_peers_of_a_node_with_both() {
    other_families(Families::Dual, StoreKind::Etcd35);
}

/// Nodes with both families, with IPv6 alone and with IPv4 alone are in the store as upstream wrote them: each is a peer in the
/// families that it has in common with this one.
fn other_families(families: Families, store: StoreKind) {
    if !privileged() {
        return;
    }
    let mut cluster = Cluster::start(store, 2, conf_of(families));
    let before = cluster.kernel(0);
    for [key, value] in [DUAL, V6, V4] {
        cluster.etcd().put(key, value).unwrap();
    }
    let traffic = Traffic::start(&cluster);
    cluster.take_over(0, &[]);
    let words_v4 = [
        ["10.5.74.0", "10.5.74.0/24", "b2:dd:fe:4d:6e:7c"],
        ["10.5.75.0", "10.5.75.0/24", "96:d7:e0:3f:25:b8"],
    ];
    let words_v6 = [
        ["fd05:0:0:4d::", "fd05:0:0:4d::/64", "96:d7:e0:3f:25:b6"],
        ["fd05:0:0:43::", "fd05:0:0:43::/64", "96:d7:e0:3f:25:b7"],
    ];
    let words: Vec<&str> = [words_v4, words_v6].as_flattened().as_flattened().to_vec();
    let wanted = 6 * families.list().len();
    eventually(PATIENCE, "the peers are there", || {
        let found = traces(cluster.ns(0), &words);
        (found.len() == wanted)
            .then_some(())
            .ok_or(found.join("\n"))
    });
    for [key, _] in [DUAL, V6, V4] {
        cluster.etcd().delete(key).unwrap();
    }
    eventually(PATIENCE, "the peers are gone", || {
        let found = traces(cluster.ns(0), &words);
        found.is_empty().then_some(()).ok_or(found.join("\n"))
    });
    before.assert_same(&cluster.kernel(0), "without the peers");
    let log = cluster.agent(0).log();
    assert!(!log.contains("is not usable"), "{log}");
    traffic.assert_untouched();
}
