//! The planner's contracts, on a model of the kernel: whatever the node looks like and whatever is wanted, applying plans converges,
//! leaves no gap, touches only what is ours and deletes nothing on half a list.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use flannel_core::{
    addr::{IfIndex, Vni},
    mark,
    plan::{Desired, DeviceKind, Hook, Observed, ObservedKind, Op, Plan, plan},
};
use ipnet::IpNet;
use proptest::prelude::*;

mod contracts;
mod model;
mod situations;
use contracts::{
    as_wanted, config, converge, dangles, ends_something, has_fdb, indexes, is_about_a_peer,
    is_foreign, is_ours, kept, mute, on_link, reachable, routed, target, usable, waits,
};
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
        let (Some(settings), Some(bpf), Some(peers)) = (&want.bpf, &kernel.bpf, reachable(&want, &kernel)) else { return Ok(()) };
        if is_foreign(&want, kernel.device.as_ref()) {
            return Ok(());
        }
        let wanted = indexes(settings, &peers);
        let missing = wanted.keys().filter(|index| !bpf.subnets.contains_key(index)).count();
        prop_assert_eq!(last.problems.iter().filter(|problem| problem.contains("no free entry")).count(), missing);
        for (index, id) in &bpf.subnets {
            let node = bpf.nodes.get(id).copied().flatten();
            prop_assert_eq!(node.map(|node| node.remote), wanted.get(index).map(|peer| peer.vtep));
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
            let on_link = on_link(&want, &kernel);
            // Nobody asks the neighbours of the device any more.
            let is_near = |kernel: &Observed, subnet: &IpNet| on_link.contains(subnet) && kernel.links.contains_key(subnet);
            let stays = !planned.ops.iter().any(|op| matches!(op, Op::DeleteDevice { .. }));
            let first = kernel.clone();
            let mut flushed = false;
            for op in &planned.ops {
                let before = kernel.clone();
                apply(&mut kernel, op, &want);
                for subnet in reachable(&want, &kernel).iter().flat_map(BTreeMap::keys) {
                    prop_assert!(!stays || !routed(&before, subnet) || routed(&kernel, subnet), "{} took the route of {}", op, subnet);
                }
                let (Some(then), Some(now)) = (&before.device, &kernel.device) else { continue };
                // Nothing the planner does could keep the neighbours of a device whose MAC changes; at the end of the pass they are back.
                flushed |= matches!(op, Op::SetMac { .. });
                for (subnet, _) in kept(&want, then) {
                    if then.routes.contains_key(&subnet) {
                        prop_assert!(routed(&kernel, &subnet), "{} took the route of {}", op, subnet);
                    }
                    if then.neighbours.contains_key(&subnet.network()) && !flushed && !is_near(&kernel, &subnet) {
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
                    let gone = then.neighbours.contains_key(&subnet.network()) && !now.neighbours.contains_key(&subnet.network());
                    prop_assert!(!gone || is_near(&kernel, &subnet));
                }
            }
        }
    }

    /// Contract 4 where the device changes its kind under eBPF: every peer has a route at every moment, and on a veth pair the program that
    /// it needs. An end at any moment is mended by a plan that starts from there.
    #[test]
    fn a_change_of_kind_leaves_every_peer_a_way(situation in situations::situation(514), end in 0usize..60) {
        let Situation { want, have } = situation;
        let (Some(peers), Some(tunnel)) = (usable(&want), &want.tunnel) else { return Ok(()) };
        if want.bpf.is_none() || have.bpf.is_none() || is_foreign(&want, have.device.as_ref()) {
            return Ok(());
        }
        // As it was wanted before, but for the kind.
        let mut before = want.clone();
        let vni = tunnel.name.strip_prefix("flannel.").and_then(|vni| Vni::try_from(vni.parse::<u32>().ok()?).ok());
        let vni = vni.expect("a number");
        before.tunnel.as_mut().expect("a tunnel").kind = match &tunnel.kind {
            DeviceKind::Vxlan { vni, .. } => DeviceKind::Veth { peer: mark::peer_device_name(*vni).expect("a name") },
            DeviceKind::Veth { .. } => DeviceKind::Vxlan {
                vni, port: 8472, lower: IfIndex::try_from(2).expect("an index"), local: IpAddr::from([127, 0, 0, 1]), learning: false, gbp: false,
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
        let wanted = reachable(&want, &have).map(|peers| indexes(&settings, &peers));
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
                            Some(new) == was || peer.is_some_and(|peer| peer.vtep == new.remote && peer.mac.is_none_or(|mac| mac == new.peer_mac)),
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
