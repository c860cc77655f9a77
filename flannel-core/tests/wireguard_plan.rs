//! The house's contracts for the encrypted overlay, on nodes of every kind: it converges, what is done twice is done, nothing is done
//! that is right already, nothing of others is touched, and nothing is taken away on half a list.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use flannel_core::{
    addr::{IfIndex, Mtu},
    key::{PublicKey, SecretKey},
    mark,
    wireguard::{Desired, Device, Inner, Observed, Op, Peer, SeenPeer, Tunnel, plan},
};
use ipnet::IpNet;
use proptest::{collection, option, prelude::*, sample};

const NAMES: [&str; 2] = [mark::WIREGUARD_DEVICE, mark::WIREGUARD_DEVICE_V6];

/// The kernel, as far as these changes go.
fn apply(node: &mut Observed, op: &Op) {
    match op {
        Op::CreateDevice { device, mtu } => {
            node.devices.entry(device.clone()).or_insert(Device {
                index: IfIndex::try_from(7).expect("an index"),
                kind: mark::KIND_WIREGUARD.into(),
                mtu: mtu.get(),
                up: false,
                addresses: BTreeSet::new(),
                routes: BTreeSet::new(),
                inner: Some(Inner::default()),
            });
        }
        Op::DeleteDevice { device } => drop(node.devices.remove(device)),
        Op::SetDevice {
            device,
            private,
            port,
        } => {
            let inner = inner(node, device);
            (inner.private, inner.port) = (Some(private.clone()), *port);
        }
        Op::PutPeer {
            device,
            key,
            peer,
            endpoint,
        } => {
            let peers = &mut inner(node, device).peers;
            for (other, seen) in &mut *peers {
                if other != key {
                    // A network is one peer's: it goes over to whoever gets it last.
                    seen.allowed.retain(|net| !peer.allowed.contains(net));
                }
            }
            let seen = peers.entry(*key).or_default();
            seen.allowed.clone_from(&peer.allowed);
            seen.psk.clone_from(&peer.psk);
            seen.keepalive = peer.keepalive;
            if *endpoint {
                seen.endpoint = Some(peer.endpoint);
                seen.given = Some(peer.endpoint);
            }
        }
        Op::RemovePeer { device, key } => drop(inner(node, device).peers.remove(key)),
        Op::SetMtu { device, mtu } => link(node, device).mtu = mtu.get(),
        Op::PutAddress { device, address } => drop(link(node, device).addresses.insert(*address)),
        Op::DelAddress { device, address } => drop(link(node, device).addresses.remove(address)),
        Op::SetUp { device } => link(node, device).up = true,
        Op::PutRoute { device, network } => {
            let elsewhere = |(name, other): (&String, &Device)| {
                name != device
                    && other.kind == mark::KIND_WIREGUARD
                    && other.routes.contains(network)
            };
            assert!(
                !node.devices.iter().any(elsewhere),
                "the kernel has {network} elsewhere"
            );
            let link = link(node, device);
            assert!(
                link.up,
                "the kernel takes no route over a device that is down"
            );
            link.routes.insert(*network);
        }
        Op::DelRoute { device, network } => drop(link(node, device).routes.remove(network)),
    }
}

fn link<'a>(node: &'a mut Observed, device: &str) -> &'a mut Device {
    node.devices
        .get_mut(device)
        .expect("a device that is there")
}

fn inner<'a>(node: &'a mut Observed, device: &str) -> &'a mut Inner {
    link(node, device)
        .inner
        .as_mut()
        .expect("a wireguard device")
}

fn key() -> impl Strategy<Value = PublicKey> {
    (1u8..6).prop_map(|byte| PublicKey::new([byte; 32]))
}

fn secret() -> impl Strategy<Value = SecretKey> {
    (1u8..3).prop_map(|byte| SecretKey::new([byte; 32]))
}

fn endpoint() -> impl Strategy<Value = SocketAddr> {
    (1u8..4, 1u16..3).prop_map(|(host, port)| (IpAddr::from([192, 0, 2, host]), port).into())
}

fn net() -> impl Strategy<Value = IpNet> {
    sample::select(vec![
        "10.244.1.0/24",
        "10.244.2.0/24",
        "10.244.3.0/24",
        "fd00:1::/64",
        "fd00:2::/64",
    ])
    .prop_map(|text| text.parse().expect("a network"))
}

fn nets(of: &'static [&'static str]) -> impl Strategy<Value = BTreeSet<IpNet>> {
    sample::subsequence(of, 0..=of.len()).prop_map(|texts| {
        texts
            .iter()
            .map(|text| text.parse().expect("a network"))
            .collect()
    })
}

fn networks() -> impl Strategy<Value = BTreeSet<IpNet>> {
    nets(&["10.244.0.0/16", "10.5.0.0/16", "fd00::/48"])
}

fn addresses() -> impl Strategy<Value = BTreeSet<IpNet>> {
    nets(&[
        "10.244.9.0/32",
        "10.5.9.0/32",
        "fd00:9::/128",
        "192.0.2.7/32",
    ])
}

/// Peers with networks of their own, as leases have them.
fn peers() -> impl Strategy<Value = BTreeMap<PublicKey, Peer>> {
    let one = (endpoint(), net(), option::of(secret()), 0u16..2);
    collection::btree_map(key(), one, 0..5).prop_map(|peers| {
        let mut taken = BTreeSet::new();
        let peers = peers
            .into_iter()
            .map(|(key, (endpoint, net, psk, keepalive))| {
                let allowed = taken.insert(net).then_some(net).into_iter().collect();
                let peer = Peer {
                    endpoint,
                    allowed,
                    psk,
                    keepalive,
                };
                (key, peer)
            });
        peers.collect()
    })
}

fn tunnel() -> impl Strategy<Value = Tunnel> {
    let mtu = sample::select(vec![1420, 1420, 1400]);
    (
        secret(),
        1u16..3,
        mtu,
        addresses(),
        networks(),
        option::of(peers()),
    )
        .prop_map(|(private, port, mtu, addresses, networks, peers)| Tunnel {
            private,
            port,
            mtu: Mtu::try_from(mtu).expect("an MTU"),
            addresses,
            networks,
            peers,
        })
}

/// A network is led to one device.
fn desired() -> impl Strategy<Value = Desired> {
    let tunnels = collection::btree_map(sample::select(NAMES.to_vec()), tunnel(), 0..3);
    (tunnels, networks()).prop_map(|(tunnels, mut former)| {
        let mut taken = BTreeSet::new();
        let tunnels = tunnels.into_iter().map(|(name, mut tunnel)| {
            tunnel.networks.retain(|network| taken.insert(*network));
            (name.to_owned(), tunnel)
        });
        let tunnels = tunnels.collect();
        former.retain(|network| !taken.contains(network));
        Desired { tunnels, former }
    })
}

fn seen_peer() -> impl Strategy<Value = SeenPeer> {
    (
        option::of(endpoint()),
        net(),
        option::of(secret()),
        0u16..2,
        any::<bool>(),
        option::of(endpoint()),
    )
        .prop_map(|(endpoint, net, psk, keepalive, alive, given)| SeenPeer {
            endpoint,
            allowed: [net].into(),
            psk,
            keepalive,
            alive,
            given,
            ..SeenPeer::default()
        })
}

fn device() -> impl Strategy<Value = Device> {
    let inner = (
        option::of(secret()),
        0u16..3,
        collection::btree_map(key(), seen_peer(), 0..5),
    );
    let kind = sample::select(vec![mark::KIND_WIREGUARD, mark::KIND_WIREGUARD, "dummy"]);
    let mtu = sample::select(vec![1420, 1400]);
    (kind, mtu, any::<bool>(), addresses(), networks(), inner).prop_map(
        |(kind, mtu, up, addresses, routes, (private, port, peers))| Device {
            index: IfIndex::try_from(7).expect("an index"),
            kind: kind.into(),
            mtu,
            up,
            addresses,
            routes: if up { routes } else { BTreeSet::new() },
            inner: (kind == mark::KIND_WIREGUARD).then_some(Inner {
                private,
                public: None,
                port,
                peers,
            }),
        },
    )
}

fn observed() -> impl Strategy<Value = Observed> {
    let devices = collection::btree_map(sample::select(NAMES.to_vec()), device(), 0..3);
    devices.prop_map(|devices| {
        let mut taken = BTreeSet::new();
        let devices = devices.into_iter().map(|(name, mut device)| {
            device.routes.retain(|network| taken.insert(*network));
            (name.to_owned(), device)
        });
        Observed {
            devices: devices.collect(),
        }
    })
}

fn carried_out(desired: &Desired, node: &Observed) -> Observed {
    let mut after = node.clone();
    for op in &plan(desired, node).ops {
        apply(&mut after, op);
        let once = after.clone();
        apply(&mut after, op);
        assert_eq!(after, once, "{op} is not the same twice");
    }
    after
}

proptest! {
    #[test]
    fn it_converges_and_rests(desired in desired(), node in observed()) {
        let after = carried_out(&desired, &node);
        let rest = plan(&desired, &after);
        prop_assert_eq!(rest.ops, vec![], "{:#?}", after);
        for (name, tunnel) in &desired.tunnels {
            let Some(inner) = &after.devices[name].inner else { continue };
            let device = &after.devices[name];
            prop_assert!(device.up);
            prop_assert_eq!(device.mtu, tunnel.mtu.get());
            prop_assert!(tunnel.networks.is_subset(&device.routes));
            prop_assert!(tunnel.addresses.is_subset(&device.addresses));
            prop_assert_eq!(inner.port, tunnel.port);
            let Some(peers) = &tunnel.peers else { continue };
            prop_assert_eq!(inner.peers.keys().collect::<Vec<_>>(), peers.keys().collect::<Vec<_>>());
            for (key, peer) in peers {
                let seen = &inner.peers[key];
                prop_assert_eq!(&seen.allowed, &peer.allowed);
                prop_assert_eq!(&seen.psk, &peer.psk);
                prop_assert!(seen.endpoint == Some(peer.endpoint) || seen.alive);
            }
        }
    }

    #[test]
    fn only_what_is_wrong_is_changed(desired in desired(), node in observed()) {
        let mut after = node.clone();
        for op in &plan(&desired, &node).ops {
            let before = after.clone();
            apply(&mut after, op);
            // What a peer has too much, another may have taken from it already.
            let is_peer = matches!(op, Op::PutPeer { .. });
            prop_assert!(is_peer || before != after, "{} changes nothing", op);
        }
    }

    #[test]
    fn devices_of_others_are_left_alone(desired in desired(), node in observed()) {
        let after = carried_out(&desired, &node);
        for (name, device) in &node.devices {
            if device.kind != mark::KIND_WIREGUARD {
                prop_assert_eq!(&after.devices[name], device);
                let problems = plan(&desired, &node).problems;
                let told = problems.iter().any(|problem| problem.starts_with(&format!("device {name} ")));
                prop_assert_eq!(told, desired.tunnels.contains_key(name));
            }
        }
    }

    #[test]
    fn half_a_list_removes_nobody(mut desired in desired(), node in observed()) {
        for tunnel in desired.tunnels.values_mut() {
            tunnel.peers = None;
        }
        for op in plan(&desired, &node).ops {
            prop_assert!(!matches!(op, Op::RemovePeer { .. } | Op::PutPeer { .. }), "{}", op);
        }
    }

    #[test]
    fn addresses_and_routes_elsewhere_stay(desired in desired(), node in observed()) {
        let after = carried_out(&desired, &node);
        for (name, device) in &node.devices {
            let Some(tunnel) = desired.tunnels.get(name) else { continue };
            let strange: IpNet = "192.0.2.7/32".parse().expect("an address");
            if device.addresses.contains(&strange) {
                prop_assert!(after.devices[name].addresses.contains(&strange));
            }
            for route in &device.routes {
                let others = desired.tunnels.values().any(|other| other.networks.contains(route));
                let may_go = (desired.former.contains(route) || others) && !tunnel.networks.contains(route);
                prop_assert!(may_go || after.devices[name].routes.contains(route));
            }
        }
    }
}

fn one_peer(endpoint: &str) -> Desired {
    let peer = Peer {
        endpoint: endpoint.parse().expect("an endpoint"),
        allowed: ["10.244.2.0/24".parse().expect("a network")].into(),
        psk: None,
        keepalive: 0,
    };
    let tunnel = Tunnel {
        private: SecretKey::new([1; 32]),
        port: 51_820,
        mtu: Mtu::try_from(1420).expect("an MTU"),
        addresses: ["10.244.1.0/32".parse().expect("an address")].into(),
        networks: ["10.244.0.0/16".parse().expect("a network")].into(),
        peers: Some([(PublicKey::new([2; 32]), peer)].into()),
    };
    Desired {
        tunnels: [(mark::WIREGUARD_DEVICE.to_owned(), tunnel)].into(),
        former: BTreeSet::new(),
    }
}

fn ops(desired: &Desired, node: &Observed) -> Vec<String> {
    plan(desired, node)
        .ops
        .iter()
        .map(ToString::to_string)
        .collect()
}

#[test]
fn a_new_node_gets_everything_in_upstreams_shape() {
    let key = PublicKey::new([2; 32]);
    assert_eq!(
        ops(&one_peer("192.0.2.2:51820"), &Observed::default()),
        [
            "create wireguard device flannel-wg (MTU 1420)".to_owned(),
            "set private key and port 51820 of flannel-wg".to_owned(),
            format!("set peer {key} of flannel-wg: 10.244.2.0/24 via 192.0.2.2:51820"),
            "add address 10.244.1.0/32 to flannel-wg".to_owned(),
            "set flannel-wg up".to_owned(),
            "set route 10.244.0.0/16 dev flannel-wg".to_owned(),
        ]
    );
}

#[test]
fn a_peer_that_roams_is_followed_until_its_lease_moves() {
    let desired = one_peer("192.0.2.2:51820");
    let mut node = carried_out(&desired, &Observed::default());
    let key = PublicKey::new([2; 32]);
    let roamed: SocketAddr = "198.51.100.9:40000".parse().expect("an endpoint");
    let peer = |node: &mut Observed, alive| {
        let peers = &mut inner(node, mark::WIREGUARD_DEVICE).peers;
        let seen = peers.get_mut(&key).expect("the peer");
        (seen.endpoint, seen.alive) = (Some(roamed), alive);
    };
    peer(&mut node, true);
    assert_eq!(ops(&desired, &node), [""; 0]);
    // Another process has set it: what the kernel has learnt counts all the same.
    let mut after_restart = node.clone();
    let peers = &mut inner(&mut after_restart, mark::WIREGUARD_DEVICE).peers;
    peers.get_mut(&key).expect("the peer").given = None;
    assert_eq!(ops(&desired, &after_restart), [""; 0]);
    let set = |to| format!("set peer {key} of flannel-wg: 10.244.2.0/24 via {to}");
    let moved = one_peer("192.0.2.3:51820");
    assert_eq!(ops(&moved, &node), [set("192.0.2.3:51820")]);
    peer(&mut node, false);
    assert_eq!(ops(&desired, &node), [set("192.0.2.2:51820")]);
}

#[test]
fn the_second_device_goes_when_one_is_enough() {
    let desired = one_peer("192.0.2.2:51820");
    let mut node = carried_out(&desired, &Observed::default());
    let other = node.devices[mark::WIREGUARD_DEVICE].clone();
    node.devices
        .insert(mark::WIREGUARD_DEVICE_V6.to_owned(), other);
    assert_eq!(
        ops(&desired, &node),
        ["delete wireguard device flannel-wg-v6"]
    );
}

#[test]
fn secrets_are_in_no_line() {
    let mut desired = one_peer("192.0.2.2:51820");
    for tunnel in desired.tunnels.values_mut() {
        tunnel.private = SecretKey::new([0x48; 32]);
        for peer in tunnel.peers.iter_mut().flat_map(BTreeMap::values_mut) {
            peer.psk = Some(SecretKey::new([0x49; 32]));
        }
    }
    let plan = plan(&desired, &Observed::default());
    for op in plan.ops {
        let text = format!("{op} {op:?}");
        assert!(
            !text.contains("SEhI") && !text.contains("SUlJ") && !text.contains("72, 72"),
            "{text}"
        );
    }
}
