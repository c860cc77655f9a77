//! What the contracts are checked with: what is wanted of a kernel, what is ours in it, and where its tables lead.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use flannel_core::{
    addr::{IfIndex, VtepMac},
    mark,
    plan::{
        Attachment, BpfState, Desired, Device, DeviceKind, GateMode, Hook, Node, Observed,
        ObservedKind, Op, Peer, Plan, Settings, plan,
    },
    pods::Pod,
};
use ipnet::IpNet;
use proptest::prelude::*;

use crate::model::apply;

/// A case that fails is printed in full, and becomes a golden triple if it is worth keeping.
pub(crate) fn config() -> ProptestConfig {
    ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// Applies plans until one is empty, and returns it.
pub(crate) fn converge(
    want: &Desired,
    kernel: &mut Observed,
    passes: usize,
) -> Result<Plan, TestCaseError> {
    let mut planned = plan(want, kernel);
    for _ in 0..passes {
        if planned.ops.is_empty() {
            break;
        }
        for op in &planned.ops {
            apply(kernel, op, want);
        }
        planned = plan(want, kernel);
    }
    prop_assert!(
        planned.ops.is_empty(),
        "still {:#?} after {} passes on {:#?}",
        planned.ops,
        passes,
        kernel
    );
    Ok(planned)
}

/// What a node looks like whose peers can all be reached: an account of its own, not the planner's.
pub(crate) fn as_wanted(want: &Desired, kernel: &Observed) -> Result<(), TestCaseError> {
    let over = want.tunnel.as_ref().map(|tunnel| {
        let device = kernel.device.as_ref().expect("a device");
        (tunnel, device)
    });
    if let Some((tunnel, device)) = over {
        prop_assert!(device.up);
        prop_assert_eq!(device.mtu, tunnel.mtu.get());
        if let Some(mac) = tunnel.mac {
            prop_assert_eq!(device.mac, mac);
        }
        if let Some(address) = tunnel.address {
            prop_assert!(device.addresses.contains(&address));
            prop_assert!(
                device
                    .addresses
                    .iter()
                    .all(|other| *other == address || !tunnel.network.contains(&other.addr()))
            );
        }
    }
    let own_mac = over.map(|(tunnel, device)| tunnel.mac.unwrap_or(device.mac));
    let on_link = on_link(want, kernel);
    if let Some(settings) = &want.bpf
        && let Some(bpf) = &kernel.bpf
    {
        let own = want.own.first().map(|own| number(own.addr()));
        let routed = match want.peers {
            Some(_) => !on_link.is_empty(),
            // As it was.
            None => bpf.settings.as_ref().is_some_and(|there| there.routed),
        };
        let written = Settings {
            routed,
            tunnel: over
                .zip(own_mac)
                .map(|((_, device), mac)| (device.index, device.mtu, mac)),
            own_index: own.map(|own| (own - number(settings.network.network())) as u32 >> 8),
            ..settings.clone()
        };
        prop_assert_eq!(bpf.settings.as_ref(), Some(&written));
        pods_as_wanted(want, settings, bpf)?;
        let gated = settings.gate.mode != GateMode::Off;
        let overlay = over.map(|(_, device)| device.index);
        let places = [
            (Hook::ToOverlay, overlay),
            (Hook::FromOverlay, overlay.filter(|_| gated)),
            (
                Hook::FromWire,
                (gated || overlay.is_some()).then_some(settings.uplink),
            ),
            (Hook::ToLink, (gated && routed).then_some(settings.uplink)),
        ];
        for (hook, place) in places {
            // A predecessor's program stays until the peers are known.
            let current =
                want.peers.is_some() || bpf.attached.get(&hook).is_none_or(|there| there.current);
            let attachment = place.map(|ifindex| Attachment { ifindex, current });
            prop_assert_eq!(bpf.attached.get(&hook), attachment.as_ref());
        }
    }
    let Some(peers) = usable(want) else {
        return Ok(());
    };
    let problems = plan(want, kernel).problems;
    let told = |subnet: &IpNet, peer: &Peer| {
        problems
            .iter()
            .any(|problem| problem.contains(&format!("{} with {subnet}", peer.vtep)))
    };
    let network = "10.5.0.0/20".parse::<IpNet>().expect("a network");
    for (subnet, route) in &kernel.links {
        let peer = peers.get(subnet);
        let right = peer.is_some_and(|peer| route.gateway == peer.vtep)
            && want
                .direct
                .as_ref()
                .is_some_and(|direct| direct.uplink == route.ifindex);
        if on_link.contains(subnet) {
            prop_assert!(right && route.ours);
        } else if over.is_some() {
            prop_assert!(peer.is_none(), "{} is not routed over the tunnel", subnet);
        }
        let inside = network.contains(subnet)
            || matches!(subnet, IpNet::V6(_)) && *subnet.to_string() < *"fd00::a05:1000/120";
        if route.ours && inside {
            prop_assert!(
                right && (over.is_none() || on_link.contains(subnet)),
                "a stale route {:?}",
                route
            );
        }
    }
    prop_assert!(
        on_link
            .iter()
            .all(|subnet| kernel.links.contains_key(subnet))
    );
    if let Some((tunnel, device)) = over {
        let carried: BTreeMap<_, _> = peers
            .iter()
            .filter(|(subnet, _)| !on_link.contains(subnet))
            .collect();
        prop_assert!(
            device.routes.keys().eq(carried.keys().copied()),
            "{:?} for {:?}",
            device.routes,
            carried
        );
        prop_assert_eq!(device.neighbours.len(), carried.len());
        let macs: BTreeSet<VtepMac> = carried.values().filter_map(|peer| peer.mac).collect();
        let has_fdb = matches!(tunnel.kind, DeviceKind::Vxlan { .. });
        if has_fdb {
            prop_assert!(device.fdb.keys().eq(&macs));
        }
        for (subnet, peer) in &carried {
            prop_assert_eq!(
                device.routes.get(subnet).map(|route| route.gateway),
                Some(subnet.network())
            );
            prop_assert_eq!(device.neighbours.get(&subnet.network()), peer.mac.as_ref());
            // Either it is reached over the kernel's device, or somebody is told why not.
            let mac = peer.mac.expect("a MAC");
            if has_fdb {
                prop_assert!(
                    told(subnet, peer)
                        || device.fdb.get(&mac) == Some(&peer.vtep) && mac != device.mac,
                    "{} of {:?} is not reached",
                    subnet,
                    peer
                );
            }
        }
    } else {
        for (subnet, peer) in &peers {
            prop_assert_eq!(told(subnet, peer), !on_link.contains(subnet));
        }
    }
    if let (Some(settings), Some(bpf)) = (&want.bpf, &kernel.bpf) {
        let with_nodes = reachable(want, kernel).expect("peers");
        let wanted = indexes(settings, &with_nodes);
        prop_assert!(bpf.subnets.keys().eq(wanted.keys()));
        let used: BTreeSet<u32> = bpf.subnets.values().copied().collect();
        prop_assert!(bpf.nodes.keys().eq(&used));
        for (index, peer) in wanted {
            let node = target(bpf, index).expect("a node that decodes");
            let device = kernel.device.as_ref().map(|device| device.index);
            let way = kernel
                .underlay
                .get(&peer.vtep)
                .filter(|way| Some(way.ifindex) != device);
            let routed = on_link.iter().any(|subnet| {
                indexes(settings, &BTreeMap::from([(*subnet, peer)])).contains_key(&index)
            });
            let wrote = Node {
                remote: peer.vtep,
                local: settings.local,
                peer_mac: peer.mac.unwrap_or(VtepMac::new([0; 6])),
                own_mac: own_mac.unwrap_or(VtepMac::new([0; 6])),
                vni: settings.vni,
                port: settings.port,
                ifindex: way.map_or(settings.uplink, |way| way.ifindex),
                hop: way.and_then(|way| Some((way.uplink_mac, way.mac?))),
                path_mtu: way.map_or(0, |way| way.mtu),
                routed,
            };
            prop_assert_eq!(node, wrote);
            prop_assert_ne!(
                Some(node.ifindex),
                device,
                "packets would be wrapped without end"
            );
        }
    }
    Ok(())
}

/// The subnets of peers on the uplink's link, where such peers are routed to.
pub(crate) fn on_link(want: &Desired, kernel: &Observed) -> BTreeSet<IpNet> {
    let (Some(direct), Some(peers)) = (&want.direct, usable(want)) else {
        return BTreeSet::new();
    };
    let near = |peer: &Peer| match kernel.underlay.get(&peer.vtep) {
        Some(way) => way.on_link && way.ifindex == direct.uplink,
        None => false,
    };
    peers
        .iter()
        .filter(|(subnet, peer)| direct.network.contains(*subnet) && near(peer))
        .map(|(subnet, _)| *subnet)
        .collect()
}

/// The peers that packets can go to at all: without a tunnel only those on the link.
pub(crate) fn reachable(want: &Desired, kernel: &Observed) -> Option<BTreeMap<IpNet, Peer>> {
    let mut peers = usable(want)?;
    if want.tunnel.is_none() {
        let on_link = on_link(want, kernel);
        peers.retain(|subnet, _| on_link.contains(subnet));
    }
    Some(peers)
}

pub(crate) fn pods_as_wanted(
    want: &Desired,
    settings: &Settings,
    bpf: &BpfState,
) -> Result<(), TestCaseError> {
    let on = settings.gate.mode != GateMode::Off;
    let none = BTreeMap::new();
    let Some(pods) = (if on { want.pods.as_ref() } else { Some(&none) }) else {
        return Ok(());
    };
    let written: BTreeMap<_, _> = pods.iter().map(|(ip, pod)| (*ip, Some(*pod))).collect();
    prop_assert_eq!(&bpf.pods, &written);
    let both = BTreeMap::from([(Hook::FromPod, true), (Hook::ToPod, true)]);
    let hooks: BTreeMap<_, _> = pods
        .values()
        .map(|pod| (pod.ifindex, both.clone()))
        .collect();
    prop_assert_eq!(&bpf.pod_hooks, &hooks);
    Ok(())
}

/// An op that takes something of ours away around pods: it needs no device.
pub(crate) fn ends_something(op: &Op) -> bool {
    match op {
        Op::DelPod { .. } | Op::Detach { .. } | Op::DetachXdp { .. } => true,
        Op::PutSettings(settings) => settings.gate.mode == GateMode::Off,
        _ => false,
    }
}

/// A device of the tunnel's name that nobody may touch.
pub(crate) fn is_foreign(want: &Desired, device: Option<&Device>) -> bool {
    let Some(tunnel) = &want.tunnel else {
        return false;
    };
    match device.map(|device| &device.kind) {
        None | Some(ObservedKind::Vxlan { .. }) => false,
        Some(ObservedKind::Veth { peer }) => match &tunnel.kind {
            DeviceKind::Veth { peer: ours } => peer.as_ref() != Some(ours),
            DeviceKind::Vxlan { vni, .. } => *peer != mark::peer_device_name(*vni).ok(),
        },
        Some(ObservedKind::Other(_)) => true,
    }
}

/// A change of kind under eBPF waits for the first complete list.
pub(crate) fn waits(want: &Desired, have: &Observed) -> bool {
    let Some(tunnel) = &want.tunnel else {
        return false;
    };
    let kinds = (
        &tunnel.kind,
        have.device.as_ref().map(|device| &device.kind),
    );
    want.peers.is_none()
        && want.bpf.is_some()
        && matches!(
            kinds,
            (DeviceKind::Vxlan { .. }, Some(ObservedKind::Veth { .. }))
                | (DeviceKind::Veth { .. }, Some(ObservedKind::Vxlan { .. }))
        )
}

/// Whether packets to a subnet have a way out: over the device, over what stands in for it, or over the uplink.
pub(crate) fn routed(kernel: &Observed, subnet: &IpNet) -> bool {
    let mut devices = kernel.device.iter().chain(&kernel.stand_in);
    devices.any(|device| device.routes.contains_key(subnet)) || kernel.links.contains_key(subnet)
}

/// What an op on the pair that stands in is about: the pair as the device.
fn pair(want: &Desired, have: &Observed) -> (Desired, Observed) {
    let mut want = want.clone();
    let tunnel = want.tunnel.as_mut().expect("a tunnel");
    let (name, peer) = mark::stand_in(&tunnel.name).expect("a name");
    tunnel.name = name;
    tunnel.kind = DeviceKind::Veth { peer };
    let mut have = have.clone();
    have.device = have.stand_in.take();
    (want, have)
}

pub(crate) fn is_ours(op: &Op, want: &Desired, have: &Observed) -> bool {
    if let Op::StandIn(op) = op {
        let (want, have) = pair(want, have);
        return match op.as_ref() {
            Op::CreateDevice(tunnel) => {
                let wanted = want.tunnel.as_ref().expect("a tunnel");
                have.device.is_none() && tunnel.name == wanted.name && tunnel.kind == wanted.kind
            }
            op => is_ours(op, &want, &have),
        };
    }
    let device = have.device.as_ref();
    let on_device = |index: &IfIndex| device.is_some_and(|device| device.index == *index);
    let bpf = have.bpf.as_ref();
    match op {
        Op::CreateDevice(tunnel) => device.is_none() && Some(tunnel) == want.tunnel.as_ref(),
        Op::DeleteDevice { index, name, .. } => {
            on_device(index)
                && want
                    .tunnel
                    .as_ref()
                    .is_some_and(|tunnel| *name == tunnel.name)
        }
        Op::SetMtu { index, .. }
        | Op::SetMac { index, .. }
        | Op::SetUp { index }
        | Op::PutAddress { index, .. } => on_device(index),
        Op::DelAddress { index, address } => {
            on_device(index)
                && device.is_some_and(|device| device.addresses.contains(address))
                && want
                    .tunnel
                    .as_ref()
                    .is_some_and(|tunnel| tunnel.network.contains(&address.addr()))
        }
        Op::PutLinkRoute {
            subnet,
            gateway,
            ifindex,
            ..
        } => want.direct.as_ref().is_some_and(|direct| {
            direct.uplink == *ifindex
                && direct.network.contains(subnet)
                && usable(want).is_some_and(|peers| {
                    peers.get(subnet).is_some_and(|peer| peer.vtep == *gateway)
                })
        }),
        Op::DelLinkRoute { subnet, .. } => {
            want.network()
                .is_some_and(|network| network.contains(subnet))
                && have.links.get(subnet).is_some_and(|there| there.ours)
        }
        Op::PutFdb { .. } | Op::PutNeighbour { .. } | Op::PutRoute { .. } => {
            device.is_some_and(|device| device.up)
        }
        Op::DelRoute { subnet } => device.is_some_and(|device| device.routes.contains_key(subnet)),
        Op::DelNeighbour { address } => {
            device.is_some_and(|device| device.neighbours.contains_key(address))
        }
        Op::DelFdb { mac, vtep } => device.is_some_and(|device| device.fdb.get(mac) == Some(vtep)),
        Op::PutNode { .. } | Op::PutSubnet { .. } | Op::PutSettings(_) => bpf.is_some(),
        Op::Attach { hook, ifindex } => match hook {
            Hook::ToOverlay | Hook::FromOverlay => on_device(ifindex),
            Hook::FromWire | Hook::ToLink => want
                .bpf
                .as_ref()
                .is_some_and(|settings| settings.uplink == *ifindex),
            Hook::FromPod | Hook::ToPod => wanted_pods(want).any(|pod| pod.ifindex == *ifindex),
        },
        Op::Detach { hook, ifindex } => bpf.is_some_and(|bpf| {
            let hooks = bpf.pod_hooks.get(ifindex);
            let there = bpf.attached.get(hook).map(|there| there.ifindex);
            hooks.is_some_and(|hooks| hooks.contains_key(hook)) || there == Some(*ifindex)
        }),
        Op::AttachXdp { ifindex } => want
            .bpf
            .as_ref()
            .is_some_and(|settings| settings.xdp && settings.uplink == *ifindex),
        Op::DetachXdp { ifindex } => bpf
            .and_then(|bpf| bpf.xdp)
            .is_some_and(|there| there.ifindex == *ifindex),
        Op::PutPod { pod, .. } => wanted_pods(want).any(|wanted| wanted == pod),
        Op::DelPod { address } => bpf.is_some_and(|bpf| bpf.pods.contains_key(address)),
        Op::ClearSubnet { index } => bpf.is_some_and(|bpf| bpf.subnets.contains_key(index)),
        Op::ClearNode { id } => bpf.is_some_and(|bpf| bpf.nodes.contains_key(id)),
        Op::StandIn(_) => false,
    }
}

pub(crate) fn wanted_pods(want: &Desired) -> impl Iterator<Item = &Pod> {
    want.pods.iter().flat_map(BTreeMap::values)
}

pub(crate) fn is_about_a_peer(op: &Op) -> bool {
    match op {
        Op::PutFdb { .. }
        | Op::PutNeighbour { .. }
        | Op::PutRoute { .. }
        | Op::DelRoute { .. }
        | Op::PutLinkRoute { .. }
        | Op::DelLinkRoute { .. }
        | Op::DelNeighbour { .. }
        | Op::DelFdb { .. }
        | Op::PutNode { .. }
        | Op::PutSubnet { .. }
        | Op::ClearSubnet { .. }
        | Op::ClearNode { .. } => true,
        Op::StandIn(op) => is_about_a_peer(op),
        Op::CreateDevice(_)
        | Op::DeleteDevice { .. }
        | Op::SetMtu { .. }
        | Op::SetMac { .. }
        | Op::SetUp { .. }
        | Op::PutAddress { .. }
        | Op::DelAddress { .. }
        | Op::PutSettings(_)
        | Op::Attach { .. }
        | Op::Detach { .. }
        | Op::AttachXdp { .. }
        | Op::DetachXdp { .. }
        | Op::PutPod { .. }
        | Op::DelPod { .. } => false,
    }
}

/// The peers whose subnet overlaps neither ours nor one that sorts before it.
pub(crate) fn usable(want: &Desired) -> Option<BTreeMap<IpNet, Peer>> {
    let overlap = |a: &IpNet, b: &IpNet| a.contains(b) || b.contains(a);
    let mut usable: BTreeMap<IpNet, Peer> = BTreeMap::new();
    for (subnet, peer) in want.peers.as_ref()? {
        if !want
            .own
            .iter()
            .chain(usable.keys())
            .any(|other| overlap(other, subnet))
        {
            usable.insert(*subnet, *peer);
        }
    }
    Some(usable)
}

/// The subnets that must not lose anything: those of peers; before the first list all that are there.
pub(crate) fn kept(want: &Desired, device: &Device) -> Vec<(IpNet, Option<Peer>)> {
    match usable(want) {
        Some(peers) => peers
            .into_iter()
            .map(|(subnet, peer)| (subnet, Some(peer)))
            .collect(),
        None => device.routes.keys().map(|subnet| (*subnet, None)).collect(),
    }
}

/// The peer of each entry of `subnets`.
pub(crate) fn indexes(settings: &Settings, peers: &BTreeMap<IpNet, Peer>) -> BTreeMap<u32, Peer> {
    (0u32..)
        .zip(subnets(settings))
        .filter_map(|(index, subnet)| {
            let (_, peer) = peers
                .iter()
                .find(|(wide, _)| wide.contains(&subnet) && settings.network.contains(*wide))?;
            Some((index, *peer))
        })
        .collect()
}

pub(crate) fn has_fdb(want: &Desired) -> bool {
    want.tunnel
        .as_ref()
        .is_some_and(|tunnel| matches!(tunnel.kind, DeviceKind::Vxlan { .. }))
}

/// The neighbours whose packets the device would not know where to send.
pub(crate) fn mute(device: &Device) -> BTreeSet<(IpAddr, VtepMac)> {
    device
        .neighbours
        .iter()
        .filter(|(_, mac)| !device.fdb.contains_key(mac))
        .map(|(address, mac)| (*address, *mac))
        .collect()
}

/// The node that a subnet leads to.
pub(crate) fn target(bpf: &BpfState, index: u32) -> Option<Node> {
    bpf.nodes.get(bpf.subnets.get(&index)?).copied().flatten()
}

/// A subnet that points at an empty or unreadable entry.
pub(crate) fn dangles(bpf: &BpfState, index: u32) -> bool {
    bpf.subnets.contains_key(&index) && target(bpf, index).is_none()
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}

fn subnets(settings: &Settings) -> Vec<IpNet> {
    let subnets = settings.network.subnets(settings.subnet_len);
    subnets.expect("a prefix length").collect()
}
