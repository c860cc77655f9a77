//! Every verdict of every check: a healthy node, and one thing changed at a time.

mod backends;
mod firewall_v6;
mod node;
mod overlay;
mod store;
mod traffic;

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use ipnet::{IpNet, Ipv4Net};

use super::*;
use crate::{
    addr::{Family, IfIndex},
    features::{Course, Findings, Wishes, climb},
    iface::{Link, LinkAddr, Uplink},
    lease::{LeaseAttrs, SubnetKey},
    plan::{Device, ObservedKind, Route},
};

const OWN_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PEER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const OWN: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 11);
const PEER: IpAddr = IpAddr::V4(PEER_V4);
const PEER_V4: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 12);

fn net(text: &str) -> Ipv4Net {
    text.parse().expect("a network")
}

fn index(number: u32) -> IfIndex {
    IfIndex::try_from(number).expect("an index")
}

fn link(number: u32, name: &str, address: &str) -> Link {
    let address = net(address);
    Link {
        index: index(number),
        name: name.into(),
        mtu: 1500,
        up: true,
        kind: None,
        addrs: vec![LinkAddr {
            ip: address.addr().into(),
            prefix_len: address.prefix_len(),
            permanent: true,
            temporary: false,
            deprecated: false,
            link_local: false,
        }],
    }
}

/// A node with an agent that runs, one peer and one pod.
fn healthy() -> Observations {
    let base = Ipv4Addr::new(10, 244, 2, 0);
    let device = Device {
        index: index(7),
        kind: ObservedKind::Vxlan {
            vni: 1,
            port: 8472,
            lower: Some(index(2)),
            local: Some(OWN.into()),
            learning: false,
            gbp: false,
        },
        mtu: 1450,
        mac: OWN_MAC.into(),
        up: true,
        addresses: [net("10.244.1.0/32").into()].into(),
        routes: [(
            IpNet::V4(net("10.244.2.0/24")),
            Route {
                gateway: base.into(),
                mtu: None,
            },
        )]
        .into(),
        neighbours: [(base.into(), PEER_MAC.into())].into(),
        fdb: [(PEER_MAC.into(), PEER)].into(),
    };
    let uplink = Uplink {
        index: index(2),
        name: "eth0".into(),
        mtu: 1500,
        address: Some(OWN),
        address_v6: None,
        public_ip: Some(OWN),
        public_ipv6: None,
        addrs: vec![OWN.into()],
        reason: "it has the default route".into(),
    };
    let leases = [
        ("10.244.1.0/24", OWN, OWN_MAC),
        ("10.244.2.0/24", PEER_V4, PEER_MAC),
    ];
    Observations {
        node: Node {
            kernel: "6.12.0".into(),
            host: crate::distribution::Host::default(),
            btf: true,
            capabilities: Capabilities {
                whose: "the agent",
                net_admin: true,
                net_raw: true,
                missing_for_bpf: None,
            },
            wants: Wants::Auto,
            bpf: Ok(()),
            bpffs: Bpffs::Mounted,
            hooks: "tcx",
            vxlan: Vxlan::Works,
            ip_forward: Some(true),
            forwarding_v6: None,
            bridge_nf: Some(true),
            reverse: Reverse {
                uplink: Some(ReverseFilter {
                    interface: "eth0".into(),
                    value: 1,
                }),
                tunnel: None,
                elsewhere: Vec::new(),
            },
            clock: Clock {
                now: 1_800_000_000,
                newest: Some((1_799_999_999, "/run/flannel/subnet.env".into())),
            },
            managers: Vec::new(),
            ladder: Some(climb(
                &Findings::default(),
                &Wishes::default(),
                &Course::default(),
            )),
        },
        agent: Agent {
            known: true,
            pid: Some(42),
            version: Some("0.1.0".into()),
            ours: "0.1.0",
            backend: Some(BackendKind::Vxlan),
            mode: Some("bpf"),
            reason: Some("eBPF is permitted and works".into()),
            problems: Vec::new(),
            file: "/run/flannel/flannel-agent.json".into(),
        },
        network: Network {
            uplink: Ok(UplinkSeen {
                chosen: uplink,
                asked_for: false,
            }),
            links: vec![link(2, "eth0", "192.168.77.11/24")],
            defaults: vec![("eth0".into(), 0)],
        },
        store: StoreSeen {
            name: "etcd http://127.0.0.1:2379 prefix /coreos.com/network".into(),
            origin: "flags",
            net_conf: Ok(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#.into()),
            leases: Ok(leases
                .map(|(subnet, ip, mac)| {
                    let attrs = LeaseAttrs::vxlan_v4(ip, 1, mac.into());
                    (SubnetKey::from_v4(net(subnet)), attrs)
                })
                .into()),
            kubernetes: None,
            older_api: None,
            certificates: vec![Certificate {
                file: "/etc/etcd/client.crt".into(),
                valid: Some((1_700_000_000, 1_900_000_000)),
            }],
        },
        second: None,
        overlay: Overlay {
            family: Family::V4,
            encrypted: Vec::new(),
            hops: BTreeMap::new(),
            links: BTreeMap::new(),
            name: "flannel.1".into(),
            device: Some(device),
            subnet_file: Some(SubnetFile::parse(
                "/run/flannel/subnet.env",
                "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n",
                Family::V4,
            )),
            subnet_path: "/run/flannel/subnet.env".into(),
            bridge: Some(Bridge {
                name: "cni0".into(),
                mtu: 1450,
                addresses: vec![net("10.244.1.1/24").into()],
                ports: [("veth1".into(), 1450)].into(),
            }),
            attached: Some(Attached {
                way: "tcx".into(),
                there: vec!["to_overlay".into(), "from_wire".into()],
                missing: Vec::new(),
            }),
            offload: Offload::On,
            paths: [(PEER, 1500)].into(),
            ways: [(PEER, index(2))].into(),
        },
        sockets: Sockets {
            udp: vec![UdpSocket {
                takes_v4: true,
                port: 8472,
                owner: Owner::Unknown,
            }],
            vxlan: Vec::new(),
        },
        rules: Rules::default(),
        rules_v6: None,
        probes: Some(Probes {
            peers: [(
                PEER,
                PeerProbe {
                    underlay: Some(Duration::from_micros(300)),
                    overlay: Some(Duration::from_micros(500)),
                    passes: Some(1450),
                },
            )]
            .into(),
            ..Probes::default()
        }),
    }
}

/// A change to a device.
type Change = fn(&mut Device);

fn statuses(report: &Report) -> BTreeMap<&'static str, Status> {
    let pairs = report.checks.iter().map(|one| (one.name, one.status));
    pairs.collect()
}

/// Changes a healthy node, and asserts that this one check ends so, that no other gets worse, and what its line says.
#[track_caller]
fn assert_only(name: &str, status: Status, words: &[&str], change: impl FnOnce(&mut Observations)) {
    let before = statuses(&judge(&healthy()));
    let mut seen = healthy();
    change(&mut seen);
    let report = judge(&seen);
    for (other, ended) in statuses(&report) {
        let is_worse = matches!(ended, Status::Warn | Status::Fail) && before[other] != ended;
        assert!(other == name || !is_worse, "{other}: {report:#?}");
    }
    let finding = report
        .checks
        .iter()
        .find(|one| one.name == name)
        .unwrap_or_else(|| panic!("no check {name}"));
    assert_eq!(finding.status, status, "{finding:#?}");
    let text = format!(
        "{} {}",
        finding.found,
        finding.fix.clone().unwrap_or_default()
    );
    for word in words {
        assert!(text.contains(word), "{word:?} is not in {text:?}");
    }
    let needs_fix = matches!(status, Status::Warn | Status::Fail);
    assert_eq!(finding.fix.is_some(), needs_fix, "{finding:#?}");
}

fn device(seen: &mut Observations) -> &mut Device {
    seen.overlay.device.as_mut().expect("a device")
}

fn probe(seen: &mut Observations) -> &mut PeerProbe {
    let probes = seen.probes.as_mut().expect("probes");
    probes.peers.get_mut(&PEER).expect("the peer")
}

fn uplink(seen: &mut Observations) -> &mut UplinkSeen {
    seen.network.uplink.as_mut().expect("an uplink")
}

fn conf(seen: &mut Observations, text: &str) {
    seen.store.net_conf = Ok(text.into());
}

#[test]
fn a_healthy_node_passes_every_check() {
    let report = judge(&healthy());
    let other: Vec<_> = report
        .checks
        .iter()
        .filter(|one| one.status != Status::Ok)
        .collect();
    assert!(other.is_empty(), "{other:#?}");
    assert_eq!(report.summary.ok, report.checks.len());
    let names: std::collections::BTreeSet<_> = report.checks.iter().map(|one| one.name).collect();
    assert_eq!(names.len(), report.checks.len(), "names are unique");
}

fn own_lease(seen: &mut Observations) -> &mut BTreeMap<SubnetKey, LeaseAttrs> {
    seen.store.leases.as_mut().expect("leases")
}

#[test]
fn the_documentation_lists_every_check_in_order() {
    let text = include_str!("../../../docs/check.md");
    let listed: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .collect();
    let names: Vec<&str> = judge(&healthy())
        .checks
        .iter()
        .map(|one| one.name)
        .collect();
    assert_eq!(listed, names);
}
