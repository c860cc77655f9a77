//! Nodes of other families and backends: each is healthy as it is, and what is wrong with it is told.

use super::*;
use crate::{
    config::BackendKind,
    lease::WireguardData,
    plan::{LinkRoute, NextHop},
};

const V6_OWN: &str = "fd77::11";
const V6_PEER: &str = "fd77::12";

pub(super) fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

pub(super) fn prefix(text: &str) -> IpNet {
    text.parse().expect("a network")
}

/// Every check passes, or does not arise.
#[track_caller]
fn assert_healthy(seen: &Observations, skipped: &[&str]) {
    let report = judge(seen);
    let wrong: Vec<_> = report
        .checks
        .iter()
        .filter(|one| matches!(one.status, Status::Warn | Status::Fail))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    let named: Vec<&str> = report
        .checks
        .iter()
        .filter(|one| one.status == Status::Skip)
        .map(|one| one.name)
        .collect();
    assert_eq!(named, skipped);
}

#[track_caller]
fn assert_fails(seen: &Observations, name: &str, words: &str) {
    let report = judge(seen);
    let failed: Vec<_> = report
        .checks
        .iter()
        .filter(|one| matches!(one.status, Status::Warn | Status::Fail))
        .collect();
    let names: Vec<&str> = failed.iter().map(|one| one.name).collect();
    assert_eq!(names, [name], "{failed:#?}");
    assert!(failed[0].found.contains(words), "{:?}", failed[0]);
}

/// The overlay of IPv6 of a node as [`healthy`] is one of IPv4.
fn overlay_v6(v4: &Overlay) -> Overlay {
    let base = ip("fd00:10:244:2::");
    let mut device = v4.device.clone().expect("a device");
    device.kind = ObservedKind::Vxlan {
        vni: 1,
        port: 8472,
        lower: Some(index(2)),
        local: Some(ip(V6_OWN)),
        learning: false,
        gbp: false,
    };
    device.mtu = 1430;
    device.addresses = [prefix("fd00:10:244:1::/128")].into();
    let gateway = Route {
        gateway: base,
        mtu: None,
    };
    device.routes = [(prefix("fd00:10:244:2::/64"), gateway)].into();
    device.neighbours = [(base, PEER_MAC.into())].into();
    device.fdb = [(PEER_MAC.into(), ip(V6_PEER))].into();
    let text = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_IPV6_NETWORK=fd00:10:244::/48\nFLANNEL_IPV6_SUBNET=fd00:10:244:1::1/64\nFLANNEL_MTU=1430\n";
    Overlay {
        family: Family::V6,
        name: "flannel-v6.1".into(),
        device: Some(device),
        subnet_file: Some(SubnetFile::parse(
            "/run/flannel/subnet.env",
            text,
            Family::V6,
        )),
        bridge: v4.bridge.clone().map(|bridge| Bridge {
            mtu: 1430,
            addresses: vec![prefix("10.244.1.1/24"), prefix("fd00:10:244:1::1/64")],
            ports: [("veth1".into(), 1430)].into(),
            ..bridge
        }),
        paths: [(ip(V6_PEER), 1500)].into(),
        ways: [(ip(V6_PEER), index(2))].into(),
        ..v4.clone()
    }
}

fn probes_v6() -> Probes {
    let answered = PeerProbe {
        underlay: Some(Duration::from_micros(300)),
        overlay: Some(Duration::from_micros(500)),
        passes: Some(1430),
    };
    Probes {
        peers: [(ip(V6_PEER), answered)].into(),
        ..Probes::default()
    }
}

pub(super) fn uplink_of_both(seen: &mut Observations) {
    let chosen = &mut uplink(seen).chosen;
    let own = V6_OWN.parse().expect("an address");
    chosen.address_v6 = Some(own);
    chosen.public_ipv6 = Some(own);
    chosen.addrs.push(own.into());
}

/// Turns the leases into those of nodes with these families.
pub(super) fn leases(seen: &mut Observations, v4: bool) {
    let all = own_lease(seen);
    let old = std::mem::take(all);
    for (number, (key, attrs)) in (1..).zip(old) {
        let key = SubnetKey {
            v4: key.v4.filter(|_| v4),
            v6: format!("fd00:10:244:{number}::/64").parse().ok(),
        };
        let attrs = LeaseAttrs {
            public_ip: attrs.public_ip.filter(|_| v4),
            public_ipv6: format!("fd77::1{number}").parse().ok(),
            v4: attrs.v4.filter(|_| v4),
            v6: attrs.v4,
            ..attrs
        };
        own_lease(seen).insert(key, attrs);
    }
}

pub(super) fn v6_only() -> Observations {
    let mut seen = healthy();
    uplink_of_both(&mut seen);
    uplink(&mut seen).chosen.public_ip = None;
    leases(&mut seen, false);
    seen.overlay = overlay_v6(&seen.overlay);
    seen.probes = Some(probes_v6());
    seen.node.ip_forward = Some(false);
    seen.node.forwarding_v6 = Some(true);
    conf(
        &mut seen,
        r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:10:244::/48","Backend":{"Type":"vxlan"}}"#,
    );
    seen
}

pub(super) fn dual() -> Observations {
    let mut seen = healthy();
    uplink_of_both(&mut seen);
    leases(&mut seen, true);
    let mut agent = seen.agent.clone();
    agent.reason = Some("eBPF is permitted and works".into());
    let overlay = overlay_v6(&seen.overlay);
    seen.overlay.bridge.clone_from(&overlay.bridge);
    seen.overlay.subnet_file.as_mut().expect("a file").mtu = Some(1430);
    seen.overlay.device.as_mut().expect("a device").mtu = 1430;
    let passed = probe(&mut seen);
    passed.passes = Some(1430);
    seen.second = Some(Second {
        agent,
        overlay,
        probes: Some(probes_v6()),
    });
    seen.rules_v6 = Some(Rules::default());
    seen.node.forwarding_v6 = Some(true);
    conf(
        &mut seen,
        r#"{"EnableIPv6":true,"Network":"10.244.0.0/16","IPv6Network":"fd00:10:244::/48","Backend":{"Type":"vxlan"}}"#,
    );
    seen
}

#[test]
fn ipv6_alone() {
    assert_healthy(&v6_only(), &[]);
    let mut seen = v6_only();
    seen.node.forwarding_v6 = Some(false);
    assert_fails(&seen, "ip-forward", "net.ipv6.conf.all.forwarding = 0");
    let mut seen = v6_only();
    device(&mut seen).routes.clear();
    assert_fails(&seen, "peer-entries", "fd00:10:244:2::/64");
    let mut seen = v6_only();
    let text = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_MTU=1430\n";
    seen.overlay.subnet_file = Some(SubnetFile::parse("/f", text, Family::V6));
    assert_fails(&seen, "subnet-file", "FLANNEL_IPV6_SUBNET");
}

#[test]
fn both_families() {
    assert_healthy(&dual(), &[]);
    let names: Vec<&str> = judge(&dual()).checks.iter().map(|one| one.name).collect();
    for name in [
        "device-v6",
        "peer-entries-v6",
        "datapath-v6",
        "mtu-v6",
        "firewall-input-v6",
        "firewall-forward-v6",
        "overlay-v6",
    ] {
        assert_eq!(
            names.iter().filter(|one| **one == name).count(),
            1,
            "{names:?}"
        );
    }
    let second = |change: fn(&mut Second)| {
        let mut seen = dual();
        change(seen.second.as_mut().expect("a second"));
        seen
    };
    let seen = second(|second| second.agent.mode = Some("kernel"));
    assert_fails(&seen, "datapath-v6", "not eBPF");
    let seen = second(|second| second.overlay.device.as_mut().expect("a device").up = false);
    assert_fails(&seen, "device-v6", "flannel-v6.1 is down");
    let seen = second(|second| {
        let device = second.overlay.device.as_mut().expect("a device");
        device.fdb.clear();
    });
    assert_fails(&seen, "peer-entries-v6", V6_PEER);
    let seen = second(|second| {
        let probes = second.probes.as_mut().expect("probes");
        let peer = probes.peers.get_mut(&ip(V6_PEER)).expect("the peer");
        peer.passes = Some(1300);
    });
    assert_fails(&seen, "path-mtu-v6", "1430 bytes do not pass");
}

const NO_TUNNEL: [&str; 7] = [
    "vxlan",
    "device",
    "offload",
    "port",
    "firewall-input",
    "overlay",
    "path-mtu",
];

/// A node without a tunnel whose pods have the uplink's MTU.
fn routed(kind: BackendKind) -> Observations {
    let mut seen = healthy();
    let text = format!(r#"{{"Network":"10.244.0.0/16","Backend":{{"Type":"{kind}"}}}}"#);
    conf(&mut seen, &text);
    seen.agent.backend = Some(kind);
    seen.overlay.device = None;
    seen.overlay.subnet_file.as_mut().expect("a file").mtu = Some(1500);
    seen.sockets = Sockets::default();
    for attrs in own_lease(&mut seen).values_mut() {
        kind.lease_type().clone_into(&mut attrs.backend_type);
        attrs.v4 = None;
    }
    *probe(&mut seen) = PeerProbe {
        underlay: Some(Duration::from_micros(300)),
        ..PeerProbe::default()
    };
    seen
}

pub(super) fn host_gw() -> Observations {
    let mut seen = routed(BackendKind::HostGw);
    let way = NextHop {
        ifindex: index(2),
        uplink_mac: OWN_MAC.into(),
        mac: None,
        mtu: u32::MAX,
        on_link: true,
    };
    let link = LinkRoute {
        gateway: PEER,
        ifindex: index(2),
        ours: true,
    };
    seen.overlay.hops = [(PEER, way)].into();
    seen.overlay.links = [(prefix("10.244.2.0/24"), link)].into();
    seen.overlay.attached = Some(Attached {
        way: "tcx".into(),
        there: vec!["from_wire".into()],
        missing: Vec::new(),
    });
    seen
}

#[test]
fn without_a_tunnel() {
    assert_healthy(&host_gw(), &NO_TUNNEL);
    let mut seen = host_gw();
    seen.overlay.links.clear();
    assert_fails(&seen, "peer-entries", "10.244.2.0/24 via 192.168.77.12");
    let mut seen = host_gw();
    seen.overlay.subnet_file.as_mut().expect("a file").mtu = Some(1450);
    assert_fails(&seen, "mtu", "FLANNEL_MTU");
    let mut seen = host_gw();
    probe(&mut seen).underlay = None;
    assert_fails(&seen, "underlay", "192.168.77.12");
}

#[test]
fn alloc_has_no_data_path() {
    let mut seen = routed(BackendKind::Alloc);
    seen.agent.mode = Some("kernel");
    // Nobody is asked for.
    seen.probes = None;
    let skipped = [
        "vxlan",
        "rung",
        "device",
        "peer-entries",
        "datapath",
        "offload",
        "port",
        "firewall-input",
        "underlay",
        "overlay",
        "path-mtu",
    ];
    assert_healthy(&seen, &skipped);
}

pub(super) fn wireguard() -> Observations {
    let mut seen = routed(BackendKind::Wireguard);
    seen.agent.mode = Some("kernel");
    seen.overlay.subnet_file.as_mut().expect("a file").mtu = Some(1420);
    let bridge = seen.overlay.bridge.as_mut().expect("a bridge");
    bridge.mtu = 1420;
    bridge.ports.clear();
    let public_key = crate::key::PublicKey::new([7; 32]);
    let data = WireguardData {
        public_key,
        port: 51_820,
    };
    for attrs in own_lease(&mut seen).values_mut() {
        attrs.v4 = Some(data.into());
    }
    seen.overlay.encrypted = vec![Encrypted {
        name: "flannel-wg".into(),
        mtu: 1420,
        up: Ok(()),
        allowed: Ok([prefix("10.244.2.0/24")].into()),
    }];
    let peer = probe(&mut seen);
    peer.overlay = Some(Duration::from_micros(500));
    peer.passes = Some(1420);
    seen
}

#[test]
fn encrypted() {
    assert_healthy(&wireguard(), &["vxlan", "rung", "offload"]);
    let mut seen = wireguard();
    seen.overlay.encrypted[0].allowed = Ok([].into());
    assert_fails(&seen, "peer-entries", "10.244.2.0/24");
    let mut seen = wireguard();
    seen.overlay.encrypted[0].mtu = 1400;
    let report = judge(&seen);
    let failed = report.checks.iter().find(|one| one.name == "mtu");
    assert_eq!(failed.map(|one| one.status), Some(Status::Fail));
    let mut seen = wireguard();
    seen.overlay.encrypted[0].up = Err("is down".into());
    assert_fails(&seen, "device", "flannel-wg is down");
    let mut seen = wireguard();
    seen.sockets.udp.push(UdpSocket {
        takes_v4: true,
        port: 51_820,
        owner: Owner::Process {
            pid: 9,
            name: "wireguard-go".into(),
        },
    });
    assert_fails(&seen, "port", "wireguard-go");
}
