//! Pairs of wanted and present state. Names and numbers come from small pools, so that they meet: by chance most of an arbitrary pair
//! would be unrelated. Half of the pairs start from a node that was as somebody wanted it, with a few things broken since.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
};

mod family;

use crate::{PASSES, model::apply};
use flannel_core::{
    addr::{IfIndex, Mtu, Vni, VtepMac},
    mark,
    plan::{
        Attachment, BpfState, Desired, Device, DeviceKind, Direct, Gate, GateMode, Hook, LinkRoute,
        NextHop, Node, Observed, ObservedKind, Peer, Route, Settings, Tunnel, plan,
    },
    pods::Pod,
};
use ipnet::{IpNet, Ipv4Net};
use proptest::{collection, option, prelude::*, sample::select, strategy::Union};

/// Entries of the map `subnets`: `10.5.0.0/20` in subnets of 24 bits.
pub(crate) const SUBNET_COUNT: u32 = 16;

/// What is wanted, and what is there.
#[derive(Clone, Debug)]
pub(crate) struct Situation {
    pub want: Desired,
    pub have: Observed,
}

/// Any situation, with that much room in the map `nodes`.
pub(crate) fn situation(capacity: u32) -> BoxedStrategy<Situation> {
    let garbage = desired().prop_flat_map(move |want| {
        observed(&want, capacity).prop_map(move |have| Situation {
            want: want.clone(),
            have,
        })
    });
    let changed = desired()
        .prop_flat_map(|before| (Just(before.clone()), successor(before)))
        .prop_flat_map(move |(before, want)| {
            let have = was(before, capacity);
            (Just(want), have).prop_map(|(want, have)| Situation { want, have })
        });
    let ipv4 = prop_oneof![garbage, changed].boxed();
    let ipv6 = ipv4
        .clone()
        .prop_map(|situation| family::to_ipv6(&situation));
    prop_oneof![ipv4, ipv6].boxed()
}

fn network() -> IpNet {
    "10.5.0.0/20".parse().unwrap()
}

fn index() -> impl Strategy<Value = IfIndex> {
    select(vec![2u32, 3, 7]).prop_map(|index| IfIndex::try_from(index).unwrap())
}

fn uplink() -> impl Strategy<Value = IfIndex> {
    select(vec![2u32, 3]).prop_map(|index| IfIndex::try_from(index).unwrap())
}

fn local() -> impl Strategy<Value = IpAddr> {
    select(vec![
        IpAddr::from([192, 0, 2, 1]),
        IpAddr::from([198, 51, 100, 1]),
    ])
}

fn mac() -> impl Strategy<Value = VtepMac> {
    (1u8..9).prop_map(|n| VtepMac::new([2, 0, 0, 0, 10, n]))
}

fn hardware_mac() -> impl Strategy<Value = VtepMac> {
    (1u8..4).prop_map(|n| VtepMac::new([0x52, 0x54, 0, 0, 0, n]))
}

fn vtep() -> impl Strategy<Value = IpAddr> {
    (2u8..9).prop_map(|n| IpAddr::V4(Ipv4Addr::new(192, 0, 2, n)))
}

/// Mostly one of the network's subnets; else wider, narrower, or outside.
fn subnet() -> impl Strategy<Value = IpNet> {
    let ours = (0..SUBNET_COUNT).prop_map(|n| net(n << 8, 24));
    let wide = (0..SUBNET_COUNT / 2).prop_map(|n| net(n << 9, 23));
    let narrow = (0..SUBNET_COUNT * 2).prop_map(|n| net(n << 7, 25));
    let outside = (0..3u32).prop_map(|n| net(0x10_0000 + (n << 8), 24));
    prop_oneof![12 => ours, 1 => wide, 1 => narrow, 1 => outside]
}

fn net(offset: u32, length: u8) -> IpNet {
    let address = Ipv4Addr::from(base() + offset);
    IpNet::V4(Ipv4Net::new(address, length).unwrap())
}

/// The network's first address as a number.
fn base() -> u32 {
    u32::from_be_bytes([10, 5, 0, 0])
}

fn own_address() -> impl Strategy<Value = IpNet> {
    (0..3u32).prop_map(|n| net(n << 8, 32))
}

fn peers() -> impl Strategy<Value = BTreeMap<IpNet, Peer>> {
    let peer = (mac(), vtep()).prop_map(|(mac, vtep)| Peer {
        mac: Some(mac),
        vtep,
    });
    collection::btree_map(subnet(), peer, 0..8)
}

fn kind() -> impl Strategy<Value = (Vni, DeviceKind)> {
    let vni = (1u32..3).prop_map(|vni| Vni::try_from(vni).unwrap());
    let port = select(vec![8472u16, 4789]);
    (
        vni,
        port,
        uplink(),
        local(),
        any_bool(9),
        any_bool(9),
        any_bool(3),
    )
        .prop_map(|(vni, port, lower, local, learning, gbp, veth)| {
            let kind = if veth {
                DeviceKind::Veth {
                    peer: mark::peer_device_name(vni).unwrap(),
                }
            } else {
                DeviceKind::Vxlan {
                    vni,
                    port,
                    lower,
                    local,
                    learning,
                    gbp,
                }
            };
            (vni, kind)
        })
}

/// True once in so many.
fn any_bool(once_in: u32) -> impl Strategy<Value = bool> {
    (0..once_in).prop_map(|n| n == 0)
}

fn settings() -> impl Strategy<Value = Settings> {
    (
        uplink(),
        local(),
        select(vec![8472u16, 4789]),
        1u32..3,
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
        gate(),
    )
        .prop_map(
            |(uplink, local, port, vni, alone, decap_gso, xdp, gate)| Settings {
                network: network(),
                subnet_len: 24,
                vni,
                port,
                local,
                uplink,
                source_port_min: 32_768,
                source_port_span: 28_231,
                encap_flags: 0x0e00_0073,
                decap_flags: 0x21,
                alone,
                decap_gso,
                xdp,
                gate,
                ring_shift: 8,
                routed: false,
                own_index: None,
                tunnel: None,
            },
        )
}

fn gate() -> impl Strategy<Value = Gate> {
    let mode = select(vec![GateMode::Off, GateMode::Established, GateMode::Syn]);
    (mode, 0u32..3).prop_map(|(mode, epoch)| Gate {
        mode,
        epoch,
        lease_ms: 5_000,
    })
}

fn veth() -> impl Strategy<Value = IfIndex> {
    (20u32..24).prop_map(|index| IfIndex::try_from(index).unwrap())
}

fn pod() -> impl Strategy<Value = (IpAddr, Pod)> {
    let address = (2u8..6).prop_map(|host| IpAddr::from([10, 5, 1, host]));
    (address, veth(), 1u32..3, mac()).prop_map(|(address, ifindex, generation, mac)| {
        let pod = Pod {
            ifindex,
            generation,
            mtu: 1450,
            mac,
            gateway_mac: VtepMac::new([2, 0, 0, 0, 5, 1]),
        };
        (address, pod)
    })
}

fn desired() -> impl Strategy<Value = Desired> {
    let mtu = select(vec![1450u32, 1400]).prop_map(|mtu| Mtu::try_from(mtu).unwrap());
    let tunnel = (
        kind(),
        mtu,
        option::weighted(0.8, mac()),
        option::weighted(0.9, own_address()),
    )
        .prop_map(|((vni, kind), mtu, mac, address)| Tunnel {
            name: mark::device_name(vni),
            kind,
            mtu,
            mac,
            address,
            network: network(),
        });
    (
        tunnel,
        option::weighted(0.9, peers()),
        option::weighted(0.8, settings()),
        option::weighted(0.9, collection::vec(pod(), 0..5)),
        (0u8..5, uplink()),
    )
        .prop_map(|(tunnel, mut peers, mut bpf, pods, (backend, uplink))| {
            let own = tunnel
                .address
                .map(|address| IpNet::new(address.addr(), 24).unwrap());
            let direct = Direct {
                uplink: bpf.as_ref().map_or(uplink, |bpf| bpf.uplink),
                network: network(),
            };
            let (tunnel, direct) = match backend {
                0 => (None, Some(direct)),
                1 | 2 => (Some(tunnel), Some(direct)),
                _ => (Some(tunnel), None),
            };
            if tunnel.is_none() {
                let peers = peers.iter_mut().flat_map(BTreeMap::values_mut);
                peers.for_each(|peer| peer.mac = None);
                if let Some(bpf) = &mut bpf {
                    (bpf.alone, bpf.xdp) = (false, false);
                }
            }
            Desired {
                tunnel,
                direct,
                own: own.into_iter().collect(),
                peers,
                bpf,
                pods: pods.map(|pods| pods.into_iter().collect()),
            }
        })
}

/// Another state of the same network: some peers as before, some changed, some gone, some new; the rest mostly as before.
fn successor(before: Desired) -> impl Strategy<Value = Desired> {
    (desired(), any_bool(6), collection::vec(0u8..3, 8)).prop_map(move |(other, all, fates)| {
        if all {
            return other;
        }
        let mut peers = other.peers;
        // Of the same backend.
        if let Some(peers) = &mut peers {
            for (peer, number) in peers.values_mut().zip(1..) {
                let mac = peer.mac.unwrap_or(VtepMac::new([2, 0, 0, 0, 10, number]));
                peer.mac = before.tunnel.is_some().then_some(mac);
            }
        }
        if let (Some(peers), Some(was)) = (&mut peers, &before.peers) {
            for ((subnet, peer), fate) in was.iter().zip(fates) {
                match fate {
                    0 => {}
                    1 => {
                        peers.insert(*subnet, *peer);
                    }
                    _ => {
                        peers.entry(*subnet).or_insert(*peer);
                    }
                }
            }
        }
        let mut bpf = before.bpf.clone();
        if let (Some(bpf), Some(other)) = (&mut bpf, other.bpf) {
            bpf.gate = other.gate;
            bpf.xdp = other.xdp && before.tunnel.is_some();
        }
        Desired {
            peers,
            bpf,
            pods: other.pods,
            ..before.clone()
        }
    })
}

/// A node as `before` wanted it, but for what broke since.
fn was(before: Desired, capacity: u32) -> impl Strategy<Value = Observed> {
    (observed(&before, capacity), 0u8..10).prop_map(move |(garbage, broken)| {
        let mut kernel = garbage.clone();
        let foreign = matches!(
            kernel.device.as_ref().map(|device| &device.kind),
            Some(ObservedKind::Veth { .. } | ObservedKind::Other(_))
        );
        if foreign {
            kernel.device = None;
        }
        for _ in 0..PASSES + 2 {
            let planned = plan(&before, &kernel);
            if planned.ops.is_empty() {
                break;
            }
            for op in &planned.ops {
                apply(&mut kernel, op, &before);
            }
        }
        match (broken, &mut kernel.device, &mut kernel.bpf) {
            (0, Some(device), _) => {
                device.up = false;
                device.routes.clear();
                device.neighbours.clear();
            }
            (1, Some(device), _) => device.mac = VtepMac::new([0x66, 0, 0, 0, 0, 1]),
            (2, Some(device), _) => device.mtu = 1500,
            (3, _, Some(bpf)) => bpf.subnets.clear(),
            (4, _, Some(bpf)) => {
                bpf.attached.clear();
                bpf.pod_hooks.clear();
                bpf.xdp = None;
            }
            (5, _, Some(bpf)) => bpf.nodes.values_mut().take(1).for_each(|node| *node = None),
            (6, ..) => kernel.underlay = garbage.underlay.into_iter().take(1).collect(),
            // Routers come and go.
            (7, ..) => {
                let others = garbage.underlay.values().map(|way| way.on_link);
                for (way, on_link) in kernel.underlay.values_mut().zip(others) {
                    way.on_link = on_link;
                }
            }
            (8, ..) => kernel.links.clear(),
            _ => {}
        }
        kernel
    })
}

fn observed(want: &Desired, capacity: u32) -> BoxedStrategy<Observed> {
    let hop = (
        index(),
        hardware_mac(),
        option::of(hardware_mac()),
        select(vec![0u32, 68, 1400, 1500, 9000]),
        any::<bool>(),
    )
        .prop_map(|(ifindex, uplink_mac, mac, mtu, on_link)| NextHop {
            ifindex,
            uplink_mac,
            mac,
            mtu,
            on_link,
        });
    let link = (vtep(), index(), any::<bool>()).prop_map(|(gateway, ifindex, ours)| LinkRoute {
        gateway,
        ifindex,
        ours,
    });
    let bpf = match &want.bpf {
        Some(settings) => bpf_state(settings.uplink, capacity).prop_map(Some).boxed(),
        None => Just(None).boxed(),
    };
    let device = match &want.tunnel {
        Some(tunnel) => option::weighted(0.9, device(tunnel)).boxed(),
        None => Just(None).boxed(),
    };
    (
        device,
        collection::btree_map(vtep(), hop, 0..6),
        collection::btree_map(subnet(), link, 0..5),
        bpf,
    )
        .prop_map(|(device, underlay, mut links, bpf)| {
            // Of a destination and metric there is one.
            let routes = device.as_ref().map(|device| &device.routes);
            links.retain(|subnet, _| routes.is_none_or(|routes| !routes.contains_key(subnet)));
            Observed {
                device,
                underlay,
                links,
                bpf,
                stand_in: None,
            }
        })
        .boxed()
}

fn device(want: &Tunnel) -> impl Strategy<Value = Device> + use<> {
    let addresses = select(vec![
        "169.254.17.4/16",
        "10.5.0.0/32",
        "10.5.1.0/32",
        "10.5.1.0/20",
        "10.5.2.0/24",
        "172.16.0.1/24",
    ])
    .prop_map(|address| address.parse::<IpNet>().unwrap());
    let routes =
        (subnet(), option::weighted(0.2, select(vec![1350u32, 1500]))).prop_map(|(subnet, mtu)| {
            let gateway = subnet.network();
            (subnet, Route { gateway, mtu })
        });
    let neighbours = (subnet().prop_map(|subnet| subnet.network()), mac());
    (
        observed_kind(want),
        select(vec![1450u32, 1400, 1500]),
        mac(),
        any_bool(5),
        collection::btree_set(addresses, 0..4),
        collection::vec(routes, 0..8),
        collection::vec(neighbours, 0..8),
        collection::btree_map(mac(), vtep(), 0..8),
    )
        .prop_map(
            |(kind, mtu, mac, down, addresses, routes, neighbours, fdb)| {
                let vxlan = matches!(kind, ObservedKind::Vxlan { .. });
                Device {
                    index: IfIndex::try_from(7).unwrap(),
                    kind,
                    mtu,
                    mac,
                    up: !down,
                    // A device that is down, or has no address, has neither.
                    routes: if down || addresses.is_empty() {
                        BTreeMap::new()
                    } else {
                        routes.into_iter().collect()
                    },
                    neighbours: if down || addresses.is_empty() {
                        BTreeMap::new()
                    } else {
                        neighbours.into_iter().collect()
                    },
                    fdb: if vxlan { fdb } else { BTreeMap::new() },
                    addresses,
                }
            },
        )
}

fn observed_kind(want: &Tunnel) -> Union<BoxedStrategy<ObservedKind>> {
    let right = match want.kind.clone() {
        DeviceKind::Vxlan {
            vni,
            port,
            lower,
            local,
            learning,
            gbp,
        } => ObservedKind::Vxlan {
            vni: vni.get(),
            port,
            lower: Some(lower),
            local: Some(local),
            learning,
            gbp,
        },
        DeviceKind::Veth { peer } => ObservedKind::Veth { peer: Some(peer) },
    };
    let vxlan = (
        1u32..3,
        select(vec![8472u16, 4789]),
        option::of(uplink()),
        option::of(local()),
        any_bool(3),
        any_bool(3),
    )
        .prop_map(
            |(vni, port, lower, local, learning, gbp)| ObservedKind::Vxlan {
                vni,
                port,
                lower,
                local,
                learning,
                gbp,
            },
        );
    let veth = option::of(select(vec!["flannelp.1", "flannelp.2", "eth0"])).prop_map(|peer| {
        ObservedKind::Veth {
            peer: peer.map(str::to_owned),
        }
    });
    let other = select(vec!["bridge", "wireguard", "plain"])
        .prop_map(|kind| ObservedKind::Other(kind.to_owned()));
    Union::new_weighted(vec![
        (12, Just(right).boxed()),
        (2, vxlan.boxed()),
        (1, veth.boxed()),
        (1, other.boxed()),
    ])
}

fn bpf_state(uplink: IfIndex, capacity: u32) -> impl Strategy<Value = BpfState> {
    let node = (
        (vtep(), local(), mac(), mac(), 1u32..3),
        select(vec![8472u16, 4789]),
        index(),
        option::of((hardware_mac(), hardware_mac())),
        select(vec![0u32, 1400, 1500]),
        any_bool(3),
    )
        .prop_map(
            |((remote, local, peer_mac, own_mac, vni), port, ifindex, hop, path_mtu, routed)| {
                Node {
                    remote,
                    local,
                    peer_mac,
                    own_mac,
                    vni,
                    port,
                    ifindex,
                    hop,
                    path_mtu,
                    routed,
                }
            },
        );
    let tunnel = option::of((index(), select(vec![1400u32, 1450]), mac()));
    let attachment =
        || (index(), any::<bool>()).prop_map(|(ifindex, current)| Attachment { ifindex, current });
    // Never written in full, so not all of it is in use.
    let top = capacity.min(12);
    (
        option::of((settings(), tunnel, any::<bool>())),
        collection::btree_map(0..SUBNET_COUNT, 1..top.max(2), 0..10),
        collection::btree_map(1..top.max(2), option::weighted(0.8, node), 0..10),
        collection::btree_map(
            select(vec![
                Hook::ToOverlay,
                Hook::FromWire,
                Hook::FromOverlay,
                Hook::ToLink,
            ]),
            attachment(),
            0..=4,
        ),
        (
            option::of(attachment()),
            option::of(0..SUBNET_COUNT),
            collection::vec((pod(), any_bool(6)), 0..5),
            collection::btree_map(veth(), pod_hooks(), 0..4),
        ),
    )
        .prop_map(
            move |(settings, subnets, nodes, attached, (xdp, own_index, pods, pod_hooks))| {
                BpfState {
                    stand_in: None,
                    // Reading them back cannot tell the uplink.
                    settings: settings.map(|(settings, tunnel, routed)| Settings {
                        uplink,
                        routed,
                        tunnel,
                        own_index,
                        ..settings
                    }),
                    subnets,
                    nodes,
                    node_capacity: capacity,
                    attached,
                    xdp,
                    pods: pods
                        .into_iter()
                        .map(|((address, pod), unreadable)| (address, (!unreadable).then_some(pod)))
                        .collect(),
                    pod_hooks,
                }
            },
        )
}

fn pod_hooks() -> impl Strategy<Value = BTreeMap<Hook, bool>> {
    collection::btree_map(select(Hook::POD.to_vec()), any::<bool>(), 1..=2)
}
