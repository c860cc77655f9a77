//! What the contracts are checked with: what is wanted of a kernel, what is ours in it, and where its tables lead.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
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
use ipnet::{IpNet, Ipv4Net};
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
    let device = kernel.device.as_ref().expect("a device");
    prop_assert!(device.up);
    prop_assert_eq!(device.mtu, want.tunnel.mtu.get());
    if let Some(mac) = want.tunnel.mac {
        prop_assert_eq!(device.mac, mac);
    }
    if let Some(address) = want.tunnel.address {
        prop_assert!(device.addresses.contains(&address));
        prop_assert!(
            device
                .addresses
                .iter()
                .all(|other| *other == address || !want.tunnel.network.contains(&other.addr()))
        );
    }
    if let Some(settings) = &want.bpf
        && let Some(bpf) = &kernel.bpf
    {
        let tunnel = (
            device.index,
            device.mtu,
            want.tunnel.mac.unwrap_or(device.mac),
        );
        let own = want.tunnel.address.map(|own| u32::from(own.addr()));
        let written = Settings {
            tunnel: Some(tunnel),
            own_index: own.map(|own| (own - u32::from(settings.network.network())) >> 8),
            ..settings.clone()
        };
        prop_assert_eq!(bpf.settings.as_ref(), Some(&written));
        pods_as_wanted(want, settings, bpf, device)?;
        for (hook, ifindex) in [
            (Hook::ToOverlay, device.index),
            (Hook::FromWire, settings.uplink),
        ] {
            // A predecessor's program stays until the peers are known.
            let current =
                want.peers.is_some() || bpf.attached.get(&hook).is_none_or(|there| there.current);
            let attachment = Attachment { ifindex, current };
            prop_assert_eq!(bpf.attached.get(&hook), Some(&attachment));
        }
    }
    let Some(peers) = usable(want) else {
        return Ok(());
    };
    prop_assert!(
        device.routes.keys().eq(peers.keys()),
        "{:?} for {:?}",
        device.routes,
        peers
    );
    prop_assert_eq!(device.neighbours.len(), peers.len());
    let macs: BTreeSet<VtepMac> = peers.values().map(|peer| peer.mac).collect();
    if has_fdb(want) {
        prop_assert!(device.fdb.keys().eq(&macs));
    }
    let problems = plan(want, kernel).problems;
    for (subnet, peer) in &peers {
        prop_assert_eq!(
            device.routes.get(subnet).map(|route| route.gateway),
            Some(subnet.network())
        );
        prop_assert_eq!(device.neighbours.get(&subnet.network()), Some(&peer.mac));
        // Either it is reached over the kernel's device, or somebody is told why not.
        let told = problems
            .iter()
            .any(|problem| problem.contains(&format!("{} with {subnet}", peer.vtep)));
        if has_fdb(want) {
            prop_assert!(
                told || device.fdb.get(&peer.mac) == Some(&peer.vtep) && peer.mac != device.mac,
                "{} of {:?} is not reached",
                subnet,
                peer
            );
        }
    }
    if let (Some(settings), Some(bpf)) = (&want.bpf, &kernel.bpf) {
        let wanted = indexes(settings, &peers);
        prop_assert!(bpf.subnets.keys().eq(wanted.keys()));
        let used: BTreeSet<u32> = bpf.subnets.values().copied().collect();
        prop_assert!(bpf.nodes.keys().eq(&used));
        for (index, peer) in wanted {
            let node = target(bpf, index).expect("a node that decodes");
            let way = kernel
                .underlay
                .get(&peer.vtep)
                .filter(|way| way.ifindex != device.index);
            let wrote = Node {
                remote: ipv4(peer.vtep),
                local: settings.local,
                peer_mac: peer.mac,
                own_mac: want.tunnel.mac.unwrap_or(device.mac),
                vni: settings.vni,
                port: settings.port,
                ifindex: way.map_or(settings.uplink, |way| way.ifindex),
                hop: way.and_then(|way| Some((way.uplink_mac, way.mac?))),
                path_mtu: way.map_or(0, |way| way.mtu),
            };
            prop_assert_eq!(node, wrote);
            prop_assert_ne!(
                node.ifindex,
                device.index,
                "packets would be wrapped without end"
            );
        }
    }
    Ok(())
}

pub(crate) fn pods_as_wanted(
    want: &Desired,
    settings: &Settings,
    bpf: &BpfState,
    device: &Device,
) -> Result<(), TestCaseError> {
    let on = settings.gate.mode != GateMode::Off;
    let overlay = bpf.attached.get(&Hook::FromOverlay);
    prop_assert_eq!(
        overlay.is_some_and(|there| there.ifindex == device.index),
        on
    );
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
    match device.map(|device| &device.kind) {
        None | Some(ObservedKind::Vxlan { .. }) => false,
        Some(ObservedKind::Veth { peer }) => match &want.tunnel.kind {
            DeviceKind::Veth { peer: ours } => peer.as_ref() != Some(ours),
            DeviceKind::Vxlan { vni, .. } => *peer != mark::peer_device_name(*vni).ok(),
        },
        Some(ObservedKind::Other(_)) => true,
    }
}

/// A change of kind under eBPF waits for the first complete list.
pub(crate) fn waits(want: &Desired, have: &Observed) -> bool {
    let kinds = (
        &want.tunnel.kind,
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

/// Whether packets to a subnet have a way out: over the device, or over what stands in for it.
pub(crate) fn routed(kernel: &Observed, subnet: &IpNet) -> bool {
    let devices = kernel.device.iter().chain(&kernel.stand_in);
    devices
        .into_iter()
        .any(|device| device.routes.contains_key(subnet))
}

/// What an op on the pair that stands in is about: the pair as the device.
fn pair(want: &Desired, have: &Observed) -> (Desired, Observed) {
    let (name, peer) = mark::stand_in(&want.tunnel.name).expect("a name");
    let mut want = want.clone();
    want.tunnel.name = name;
    want.tunnel.kind = DeviceKind::Veth { peer };
    let mut have = have.clone();
    have.device = have.stand_in.take();
    (want, have)
}

pub(crate) fn is_ours(op: &Op, want: &Desired, have: &Observed) -> bool {
    if let Op::StandIn(op) = op {
        let (want, have) = pair(want, have);
        return match op.as_ref() {
            Op::CreateDevice(tunnel) => {
                have.device.is_none()
                    && tunnel.name == want.tunnel.name
                    && tunnel.kind == want.tunnel.kind
            }
            op => is_ours(op, &want, &have),
        };
    }
    let device = have.device.as_ref();
    let on_device = |index: &IfIndex| device.is_some_and(|device| device.index == *index);
    let bpf = have.bpf.as_ref();
    match op {
        Op::CreateDevice(tunnel) => device.is_none() && *tunnel == want.tunnel,
        Op::DeleteDevice { index, name, .. } => on_device(index) && *name == want.tunnel.name,
        Op::SetMtu { index, .. }
        | Op::SetMac { index, .. }
        | Op::SetUp { index }
        | Op::PutAddress { index, .. } => on_device(index),
        Op::DelAddress { index, address } => {
            on_device(index)
                && device.is_some_and(|device| device.addresses.contains(address))
                && want.tunnel.network.contains(&address.addr())
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
            Hook::FromWire => want
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
    let base = u32::from(settings.network.network());
    let size = 1u32 << (32 - u32::from(settings.subnet_len));
    (0..settings.subnet_count())
        .filter_map(|index| {
            let subnet = Ipv4Net::new(Ipv4Addr::from(base + index * size), settings.subnet_len);
            let subnet = IpNet::V4(subnet.expect("a prefix length"));
            let (_, peer) = peers.iter().find(|(wide, _)| {
                wide.contains(&subnet) && IpNet::V4(settings.network).contains(*wide)
            })?;
            Some((index, *peer))
        })
        .collect()
}

pub(crate) fn has_fdb(want: &Desired) -> bool {
    matches!(want.tunnel.kind, DeviceKind::Vxlan { .. })
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

pub(crate) fn ipv4(address: IpAddr) -> Ipv4Addr {
    match address {
        IpAddr::V4(address) => address,
        IpAddr::V6(address) => panic!("{address}: no such peers here"),
    }
}
