//! The planner's contracts, on a model of the kernel: whatever the node looks like and whatever is wanted, applying plans converges,
//! leaves no gap, touches only what is ours and deletes nothing on half a list.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
};

use flannel_core::{
    addr::{IfIndex, Vni, VtepMac},
    mark,
    plan::{
        Attachment, BpfState, Desired, Device, DeviceKind, GateMode, Hook, Node, Observed,
        ObservedKind, Op, Peer, Plan, Settings, plan,
    },
    pods::Pod,
};
use ipnet::{IpNet, Ipv4Net};
use proptest::prelude::*;

mod model;
mod situations;
use model::apply;
use situations::{SUBNET_COUNT, Situation};

/// Passes from any state to one that needs none: delete, create, set up, clear or fill, fill what had no room, settings after an MTU.
/// Twice, where a device stands in for another, which then goes.
const PASSES: usize = 12;

proptest! {
    #![proptest_config(config())]

    /// Contracts 1 and 3: it converges to what is wanted, and what is as wanted yields nothing.
    #[test]
    fn converges_to_what_is_wanted(situation in situations::situation(514)) {
        let Situation { want, have } = situation;
        let mut kernel = have.clone();
        converge(&want, &mut kernel, PASSES)?;
        prop_assert_eq!(&plan(&want, &kernel).ops, &[]);
        if is_foreign(&want, have.device.as_ref()) {
            // All that ends does so without the device.
            prop_assert_eq!(&kernel.device, &have.device);
            prop_assert!(kernel.bpf.is_none_or(|bpf| bpf.nodes == have.bpf.unwrap_or_default().nodes));
        } else if waits(&want, &kernel) {
            prop_assert_eq!(&kernel.device, &have.device);
        } else {
            prop_assert_eq!(&kernel.stand_in, &None);
            as_wanted(&want, &kernel)?;
        }
    }

    /// As above where `nodes` is too small to write every change beside the old entry, or for all peers at all.
    #[test]
    fn converges_in_a_map_too_small(situation in (2u32..7).prop_flat_map(situations::situation)) {
        let Situation { want, have } = situation;
        let mut kernel = have;
        let last = converge(&want, &mut kernel, PASSES + 2)?;
        let (Some(settings), Some(bpf), Some(peers)) = (&want.bpf, &kernel.bpf, usable(&want)) else { return Ok(()) };
        if is_foreign(&want, kernel.device.as_ref()) {
            return Ok(());
        }
        let wanted = indexes(settings, &peers);
        let missing = wanted.keys().filter(|index| !bpf.subnets.contains_key(index)).count();
        prop_assert_eq!(last.problems.iter().filter(|problem| problem.contains("no free entry")).count(), missing);
        for (index, id) in &bpf.subnets {
            let node = bpf.nodes.get(id).copied().flatten();
            prop_assert_eq!(node.map(|node| IpAddr::V4(node.remote)), wanted.get(index).map(|peer| peer.vtep));
        }
    }

    /// Contract 2: applying an op twice is the same as applying it once.
    #[test]
    fn applying_twice_is_applying_once(situation in situations::situation(514)) {
        let Situation { want, have } = situation;
        let mut once = have;
        for _ in 0..PASSES {
            for op in &plan(&want, &once).ops {
                apply(&mut once, op, &want);
                let mut twice = once.clone();
                apply(&mut twice, op, &want);
                prop_assert_eq!(&twice, &once, "{}", op);
            }
        }
    }

    /// Contract 3: every op changes something.
    #[test]
    fn no_op_without_effect(situation in situations::situation(514)) {
        let Situation { want, have } = situation;
        let mut kernel = have;
        for _ in 0..PASSES {
            for op in &plan(&want, &kernel).ops {
                let before = kernel.clone();
                apply(&mut kernel, op, &want);
                prop_assert_ne!(&kernel, &before, "{}", op);
            }
        }
    }

    /// Contract 4 for the kernel's objects.
    #[test]
    fn no_gap_in_the_kernel_path(situation in situations::situation(514)) {
        let Situation { want, have } = situation;
        let mut kernel = have;
        for _ in 0..PASSES {
            let planned = plan(&want, &kernel);
            // A device that must go takes everything with it.
            let stays = !planned.ops.iter().any(|op| matches!(op, Op::DeleteDevice { .. }));
            let first = kernel.clone();
            let mut flushed = false;
            for op in &planned.ops {
                let before = kernel.clone();
                apply(&mut kernel, op, &want);
                let (Some(then), Some(now)) = (&before.device, &kernel.device) else { continue };
                // Nothing the planner does could keep the neighbours of a device whose MAC changes; at the end of the pass they are back.
                flushed |= matches!(op, Op::SetMac { .. });
                for (subnet, _) in kept(&want, then) {
                    if then.routes.contains_key(&subnet) {
                        prop_assert!(routed(&kernel, &subnet), "{} took the route of {}", op, subnet);
                    }
                    if then.neighbours.contains_key(&subnet.network()) && !flushed {
                        prop_assert!(now.neighbours.contains_key(&subnet.network()), "{} took the neighbour of {}", op, subnet);
                    }
                }
                if !has_fdb(&want) {
                    continue;
                }
                let known: BTreeSet<_> = first.device.iter().flat_map(mute).chain(mute(then)).collect();
                prop_assert!(mute(now).is_subset(&known), "{} left a neighbour without forwarding entry", op);
            }
            if let (true, Some(then), Some(now)) = (stays, &first.device, &kernel.device) {
                for (subnet, _) in kept(&want, then) {
                    prop_assert!(!then.neighbours.contains_key(&subnet.network()) || now.neighbours.contains_key(&subnet.network()));
                }
            }
        }
    }

    /// Contract 4 where the device changes its kind under eBPF: every peer has a route at every moment, and on a veth pair the program that
    /// it needs. An end at any moment is mended by a plan that starts from there.
    #[test]
    fn a_change_of_kind_leaves_every_peer_a_way(situation in situations::situation(514), end in 0usize..60) {
        let Situation { want, have } = situation;
        let Some(peers) = usable(&want) else { return Ok(()) };
        if want.bpf.is_none() || have.bpf.is_none() || is_foreign(&want, have.device.as_ref()) {
            return Ok(());
        }
        // As it was wanted before, but for the kind.
        let mut before = want.clone();
        let vni = want.tunnel.name.strip_prefix("flannel.").and_then(|vni| Vni::try_from(vni.parse::<u32>().ok()?).ok());
        let vni = vni.expect("a number");
        before.tunnel.kind = match &want.tunnel.kind {
            DeviceKind::Vxlan { vni, .. } => DeviceKind::Veth { peer: mark::peer_device_name(*vni).expect("a name") },
            DeviceKind::Veth { .. } => DeviceKind::Vxlan {
                vni, port: 8472, lower: IfIndex::try_from(2).expect("an index"), local: Ipv4Addr::LOCALHOST, learning: false, gbp: false,
            },
        };
        let mut kernel = have;
        converge(&before, &mut kernel, PASSES)?;
        let mut count = 0;
        for target in [&want, &before] {
            'passes: for _ in 0..PASSES {
                for op in &plan(target, &kernel).ops {
                    apply(&mut kernel, op, target);
                    for subnet in peers.keys() {
                        prop_assert!(routed(&kernel, subnet), "{} took the route of {}: {:?}", op, subnet, kernel.stand_in);
                    }
                    for (device, program) in [
                        (&kernel.device, kernel.bpf.as_ref().and_then(|bpf| bpf.attached.get(&Hook::ToOverlay))),
                        (&kernel.stand_in, kernel.bpf.as_ref().and_then(|bpf| bpf.stand_in.as_ref())),
                    ] {
                        let Some(device) = device else { continue };
                        let mute = matches!(device.kind, ObservedKind::Veth { .. })
                            && program.is_none_or(|there| there.ifindex != device.index);
                        prop_assert!(!mute || device.routes.is_empty(), "{} routes into a pair without a program", op);
                    }
                    count += 1;
                    if count == end {
                        break 'passes;
                    }
                }
            }
        }
        converge(&before, &mut kernel, PASSES)?;
        as_wanted(&before, &kernel)?;
        prop_assert_eq!(&kernel.stand_in, &None);
    }

    /// Contract 4 for the maps: a subnet that leads somewhere never leads nowhere, nor to anybody but its old or its new node.
    #[test]
    fn no_gap_in_the_maps(situation in situations::situation(514)) {
        let Situation { want, have } = situation;
        let Some(settings) = want.bpf.clone() else { return Ok(()) };
        let wanted = usable(&want).map(|peers| indexes(&settings, &peers));
        let mut kernel = have.clone();
        for pass in 0..PASSES {
            for op in &plan(&want, &kernel).ops {
                let before = kernel.clone();
                apply(&mut kernel, op, &want);
                let (Some(then), Some(now)) = (&before.bpf, &kernel.bpf) else { continue };
                if let Op::PutNode { id, .. } | Op::ClearNode { id } = op {
                    // Entries are not written atomically.
                    prop_assert!(!then.subnets.values().any(|used| used == id), "{} while in use", op);
                }
                for index in 0..SUBNET_COUNT {
                    let stays = wanted.as_ref().is_none_or(|wanted| wanted.contains_key(&index));
                    let (old, new) = (target(then, index), target(now, index));
                    if stays && old.is_some() {
                        prop_assert!(new.is_some(), "pass {}: {} cut subnet {} off", pass, op, index);
                    }
                    prop_assert!(!dangles(now, index) || dangles(then, index), "pass {}: {} left subnet {} dangling", pass, op, index);
                    if let Some(new) = new {
                        let was = have.bpf.as_ref().and_then(|bpf| target(bpf, index));
                        let peer = wanted.as_ref().and_then(|wanted| wanted.get(&index));
                        prop_assert!(
                            Some(new) == was || peer.is_some_and(|peer| peer.vtep == new.remote && peer.mac == new.peer_mac),
                            "pass {}: {} sent subnet {} astray", pass, op, index
                        );
                    }
                }
            }
        }
    }

    /// A map without room may cost a subnet its entry for a while, but never lets it point at what is gone.
    #[test]
    fn no_dangling_in_a_map_too_small(situation in (2u32..7).prop_flat_map(situations::situation)) {
        let Situation { want, have } = situation;
        let mut kernel = have;
        for _ in 0..PASSES + 2 {
            for op in &plan(&want, &kernel).ops {
                let before = kernel.clone();
                apply(&mut kernel, op, &want);
                let (Some(then), Some(now)) = (&before.bpf, &kernel.bpf) else { continue };
                for index in 0..SUBNET_COUNT {
                    prop_assert!(!dangles(now, index) || dangles(then, index), "{} left subnet {} dangling", op, index);
                }
            }
        }
    }

    /// Contract 5: an op names the tunnel device, the uplink's hook, or what was seen on ours.
    #[test]
    fn names_only_what_is_ours(situation in situations::situation(514)) {
        let Situation { want, have } = situation;
        let mut kernel = have;
        for _ in 0..PASSES {
            let Plan { ops, problems } = plan(&want, &kernel);
            if is_foreign(&want, kernel.device.as_ref()) {
                prop_assert!(ops.iter().all(ends_something), "{:?}", ops);
                prop_assert_eq!(problems.len(), 1);
            }
            for op in &ops {
                prop_assert!(is_ours(op, &want, &kernel), "{}", op);
            }
            for op in &ops {
                apply(&mut kernel, op, &want);
            }
        }
    }

    /// Contract 6: before the first list is complete no peer is added, changed or taken away. The device and this node's own address do
    /// not depend on the list.
    #[test]
    fn half_a_list_changes_no_peer(situation in situations::situation(514)) {
        let Situation { mut want, have } = situation;
        want.peers = None;
        let mut kernel = have.clone();
        let mut replaced = false;
        for _ in 0..PASSES {
            for op in &plan(&want, &kernel).ops {
                replaced |= matches!(op, Op::DeleteDevice { .. });
                let restored = matches!(op, Op::PutNeighbour { address, mac }
                    if have.device.as_ref().and_then(|device| device.neighbours.get(address)) == Some(mac));
                prop_assert!(!is_about_a_peer(op) || restored, "{}", op);
                apply(&mut kernel, op, &want);
            }
        }
        prop_assert_eq!(kernel.bpf.map(|bpf| (bpf.subnets, bpf.nodes)), have.bpf.map(|bpf| (bpf.subnets, bpf.nodes)));
        if let (false, Some(then), Some(now)) = (replaced, &have.device, &kernel.device) {
            prop_assert_eq!((&then.routes, &then.neighbours, &then.fdb), (&now.routes, &now.neighbours, &now.fdb));
        }
    }

    /// A plan is a function of what it is given, and survives being written down.
    #[test]
    fn plans_are_plain_data(situation in situations::situation(514)) {
        let Situation { want, have } = situation;
        let planned = plan(&want, &have);
        prop_assert_eq!(&plan(&want, &have), &planned);
        let text = serde_json::to_string(&(&want, &have, &planned)).unwrap();
        let read: (Desired, Observed, Plan) = serde_json::from_str(&text).unwrap();
        prop_assert_eq!(read, (want, have, planned));
    }
}

/// A case that fails is printed in full, and becomes a golden triple if it is worth keeping.
fn config() -> ProptestConfig {
    ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// Applies plans until one is empty, and returns it.
fn converge(want: &Desired, kernel: &mut Observed, passes: usize) -> Result<Plan, TestCaseError> {
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
fn as_wanted(want: &Desired, kernel: &Observed) -> Result<(), TestCaseError> {
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

fn pods_as_wanted(
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
fn ends_something(op: &Op) -> bool {
    match op {
        Op::DelPod { .. } | Op::Detach { .. } | Op::DetachXdp { .. } => true,
        Op::PutSettings(settings) => settings.gate.mode == GateMode::Off,
        _ => false,
    }
}

/// A device of the tunnel's name that nobody may touch.
fn is_foreign(want: &Desired, device: Option<&Device>) -> bool {
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
fn waits(want: &Desired, have: &Observed) -> bool {
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
fn routed(kernel: &Observed, subnet: &IpNet) -> bool {
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

fn is_ours(op: &Op, want: &Desired, have: &Observed) -> bool {
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

fn wanted_pods(want: &Desired) -> impl Iterator<Item = &Pod> {
    want.pods.iter().flat_map(BTreeMap::values)
}

fn is_about_a_peer(op: &Op) -> bool {
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
fn usable(want: &Desired) -> Option<BTreeMap<IpNet, Peer>> {
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
fn kept(want: &Desired, device: &Device) -> Vec<(IpNet, Option<Peer>)> {
    match usable(want) {
        Some(peers) => peers
            .into_iter()
            .map(|(subnet, peer)| (subnet, Some(peer)))
            .collect(),
        None => device.routes.keys().map(|subnet| (*subnet, None)).collect(),
    }
}

/// The peer of each entry of `subnets`.
fn indexes(settings: &Settings, peers: &BTreeMap<IpNet, Peer>) -> BTreeMap<u32, Peer> {
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

fn has_fdb(want: &Desired) -> bool {
    matches!(want.tunnel.kind, DeviceKind::Vxlan { .. })
}

/// The neighbours whose packets the device would not know where to send.
fn mute(device: &Device) -> BTreeSet<(IpAddr, VtepMac)> {
    device
        .neighbours
        .iter()
        .filter(|(_, mac)| !device.fdb.contains_key(mac))
        .map(|(address, mac)| (*address, *mac))
        .collect()
}

/// The node that a subnet leads to.
fn target(bpf: &BpfState, index: u32) -> Option<Node> {
    bpf.nodes.get(bpf.subnets.get(&index)?).copied().flatten()
}

/// A subnet that points at an empty or unreadable entry.
fn dangles(bpf: &BpfState, index: u32) -> bool {
    bpf.subnets.contains_key(&index) && target(bpf, index).is_none()
}

fn ipv4(address: IpAddr) -> Ipv4Addr {
    match address {
        IpAddr::V4(address) => address,
        IpAddr::V6(address) => panic!("{address}: no such peers here"),
    }
}
