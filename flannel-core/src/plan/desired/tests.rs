use std::net::Ipv4Addr;

use super::*;
use crate::{
    key::PublicKey,
    lease::{BackendData, VxlanData, WireguardData},
};

fn key(text: &str) -> SubnetKey {
    text.parse().unwrap()
}

fn mac(host: u8) -> VtepMac {
    VtepMac::from_random([2, 0, 0, 0, 0, host])
}

/// What a node of both families publishes.
fn attrs(kind: BackendKind, host: u8) -> LeaseAttrs {
    let data = |last| match kind {
        BackendKind::Vxlan => {
            let mac = mac(last);
            Some(BackendData::from(VxlanData { vni: 1, mac }))
        }
        BackendKind::Wireguard => Some(BackendData::from(WireguardData {
            public_key: PublicKey::new([last; 32]),
            port: 51_820,
        })),
        BackendKind::HostGw | BackendKind::Alloc => None,
    };
    LeaseAttrs {
        public_ip: Some([192, 0, 2, host].into()),
        public_ipv6: Some([0x2001, 0xdb8, 0, 0, 0, 0, 0, host.into()].into()),
        backend_type: kind.lease_type().to_owned(),
        v4: data(host),
        v6: data(host + 100),
    }
}

fn listed(leases: &[(&str, LeaseAttrs)]) -> BTreeMap<SubnetKey, LeaseAttrs> {
    leases
        .iter()
        .map(|(text, attrs)| (key(text), attrs.clone()))
        .collect()
}

fn texts(problems: &[PeerProblem]) -> Vec<String> {
    problems.iter().map(ToString::to_string).collect()
}

#[test]
fn each_family_has_its_own_peers() {
    let leases = listed(&[
        ("10.5.1.0-24&fd00:0:0:1::-64", attrs(BackendKind::Vxlan, 1)),
        ("10.5.2.0-24&fd00:0:0:2::-64", attrs(BackendKind::Vxlan, 2)),
        ("10.5.3.0-24", attrs(BackendKind::Vxlan, 3)),
        ("0.0.0.0-0&fd00:0:0:4::-64", attrs(BackendKind::Vxlan, 4)),
    ]);
    let own = key("10.5.1.0-24&fd00:0:0:1::-64");
    let (peers, problems) = peers_of(&leases, &own, Family::V4, BackendKind::Vxlan);
    let peer = |host: u8, last| Peer {
        mac: Some(mac(last)),
        vtep: [192, 0, 2, host].into(),
    };
    let expected = [("10.5.2.0/24", peer(2, 2)), ("10.5.3.0/24", peer(3, 3))];
    let expected: BTreeMap<IpNet, Peer> = expected
        .map(|(net, peer)| (net.parse().unwrap(), peer))
        .into();
    assert_eq!((peers, problems), (expected, vec![]));
    let (peers, problems) = peers_of(&leases, &own, Family::V6, BackendKind::Vxlan);
    let peer = |host: u16, last| Peer {
        mac: Some(mac(last)),
        vtep: [0x2001, 0xdb8, 0, 0, 0, 0, 0, host].into(),
    };
    let expected = [
        ("fd00:0:0:2::/64", peer(2, 102)),
        ("fd00:0:0:4::/64", peer(4, 104)),
    ];
    let expected: BTreeMap<IpNet, Peer> = expected
        .map(|(net, peer)| (net.parse().unwrap(), peer))
        .into();
    assert_eq!((peers, problems), (expected, vec![]));
}

#[test]
fn a_peer_of_host_gw_has_an_address_only() {
    let leases = listed(&[("10.5.2.0-24&fd00:0:0:2::-64", attrs(BackendKind::HostGw, 2))]);
    let own = key("10.5.1.0-24&fd00:0:0:1::-64");
    for (family, net, vtep) in [
        (Family::V4, "10.5.2.0/24", "192.0.2.2"),
        (Family::V6, "fd00:0:0:2::/64", "2001:db8::2"),
    ] {
        let (peers, problems) = peers_of(&leases, &own, family, BackendKind::HostGw);
        let vtep = vtep.parse().unwrap();
        let peer = Peer { mac: None, vtep };
        assert_eq!(peers, [(net.parse().unwrap(), peer)].into());
        assert_eq!(problems, []);
    }
}

/// What one family lacks costs the other one nothing, and is told where it is wanted.
#[test]
fn what_a_lease_lacks_is_told_by_the_overlay_that_needs_it() {
    let without = |change: fn(&mut LeaseAttrs)| {
        let mut attrs = attrs(BackendKind::Vxlan, 2);
        change(&mut attrs);
        listed(&[("10.5.2.0-24&fd00:0:0:2::-64", attrs)])
    };
    let own = key("10.5.1.0-24&fd00:0:0:1::-64");
    let name = "lease 10.5.2.0-24&fd00:0:0:2::-64 is not usable: ";
    for (leases, family, reason) in [
        (
            without(|attrs| attrs.public_ip = None),
            Family::V4,
            "it has no PublicIP",
        ),
        (
            without(|attrs| attrs.public_ipv6 = None),
            Family::V6,
            "it has no PublicIPv6",
        ),
        (
            without(|attrs| attrs.v4 = None),
            Family::V4,
            "it has no BackendData with a VtepMAC",
        ),
        (
            without(|attrs| attrs.v6 = None),
            Family::V6,
            "it has no BackendV6Data with a VtepMAC",
        ),
        (
            without(|attrs| attrs.public_ip = Some(Ipv4Addr::BROADCAST)),
            Family::V4,
            "its PublicIP 255.255.255.255 is not the address of a host",
        ),
        (
            without(|attrs| attrs.public_ipv6 = Some([0xff02, 0, 0, 0, 0, 0, 0, 1].into())),
            Family::V6,
            "its PublicIPv6 ff02::1 is not the address of a host",
        ),
        (
            without(|attrs| {
                let mac = VtepMac::new([1, 0, 0, 0, 0, 1]);
                attrs.v6 = Some(VxlanData { vni: 1, mac }.into());
            }),
            Family::V6,
            "its VtepMAC 01:00:00:00:00:01 is not the address of a device",
        ),
    ] {
        for looked_at in Family::ALL {
            let (peers, problems) = peers_of(&leases, &own, looked_at, BackendKind::Vxlan);
            if looked_at == family {
                assert_eq!(texts(&problems), [format!("{name}{reason}")]);
                assert!(peers.is_empty());
            } else {
                assert_eq!((peers.len(), problems), (1, vec![]), "{reason}");
            }
        }
    }
}

#[test]
fn a_lease_of_another_backend_is_told_once() {
    let leases = listed(&[
        ("10.5.2.0-24&fd00:0:0:2::-64", attrs(BackendKind::HostGw, 2)),
        ("10.5.3.0-24", attrs(BackendKind::Wireguard, 3)),
        ("0.0.0.0-0&fd00:0:0:4::-64", attrs(BackendKind::Alloc, 4)),
    ]);
    let told = |own: &str, kind| {
        let of = |family| peers_of(&leases, &key(own), family, kind);
        let ((v4, mut lines), (v6, more)) = (of(Family::V4), of(Family::V6));
        lines.extend(more);
        (v4.len() + v6.len(), texts(&lines))
    };
    let dual = "10.5.1.0-24&fd00:0:0:1::-64";
    let name = "is not usable: ignoring non-";
    assert_eq!(
        told(dual, BackendKind::Vxlan),
        (
            0,
            vec![
                format!(
                    "lease 10.5.2.0-24&fd00:0:0:2::-64 {name}vxlan v4Subnet(10.5.2.0/24) v6Subnet(fd00:0:0:2::/64): type=host-gw"
                ),
                format!(
                    "lease 10.5.3.0-24 {name}vxlan v4Subnet(10.5.3.0/24) v6Subnet(::/0): type=wireguard"
                ),
                format!(
                    "lease 0.0.0.0-0&fd00:0:0:4::-64 {name}vxlan v4Subnet(0.0.0.0/0) v6Subnet(fd00:0:0:4::/64): type=none"
                ),
            ]
        )
    );
    let (peers, lines) = told(dual, BackendKind::HostGw);
    assert_eq!((peers, lines.len()), (2, 2), "{lines:?}");
    assert!(
        lines
            .iter()
            .all(|line| line.contains("ignoring non-host-gw "))
    );
    // On a node of one family, that one tells.
    let (_, lines) = told("0.0.0.0-0&fd00:0:0:1::-64", BackendKind::Vxlan);
    assert!(
        lines.iter().any(|line| line.contains("fd00:0:0:2::")),
        "{lines:?}"
    );
}

#[test]
fn a_subnet_of_another_length_costs_nobody_its_place() {
    let own = key("10.5.1.0-24&fd00:0:0:1::-64");
    for (family, leases, expected_kept, expected_out) in [
        (
            Family::V4,
            vec![
                "10.5.0.0-16",
                "10.5.2.0-23",
                "10.5.2.0-24",
                "10.5.3.0-24",
                "10.5.3.128-25",
                "10.5.8.0-23",
            ],
            vec!["10.5.2.0/24", "10.5.3.0/24", "10.5.8.0/23"],
            vec!["10.5.0.0-16", "10.5.2.0-23", "10.5.3.128-25"],
        ),
        (
            Family::V6,
            vec![
                "0.0.0.0-0&fd00::-48",
                "0.0.0.0-0&fd00:0:0:2::-64",
                "0.0.0.0-0&fd00:0:0:2:8000::-65",
                "0.0.0.0-0&fd00:0:0:8::-63",
            ],
            vec!["fd00:0:0:2::/64", "fd00:0:0:8::/63"],
            vec!["0.0.0.0-0&fd00::-48", "0.0.0.0-0&fd00:0:0:2:8000::-65"],
        ),
    ] {
        let leases: BTreeMap<SubnetKey, LeaseAttrs> = leases
            .iter()
            .zip(1..)
            .map(|(text, host)| (key(text), attrs(BackendKind::Vxlan, host)))
            .collect();
        let (peers, problems) = peers_of(&leases, &own, family, BackendKind::Vxlan);
        let kept: Vec<String> = peers.keys().map(ToString::to_string).collect();
        assert_eq!(kept, expected_kept);
        let left_out: Vec<String> = problems
            .iter()
            .map(|problem| problem.key.to_string())
            .collect();
        assert_eq!(left_out, expected_out);
    }
}
