//! Routes without a tunnel: `<subnet> via <peer> dev <uplink>`, for peers on the same link.
//!
//! A route of the same subnet takes the place of the one over the tunnel device, and the other way round: the kernel has one of a
//! destination and metric, and replaces it at once. So nothing is ever removed that something else does not stand in for already.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use super::{Desired, Direct, LinkRoute, Observed, Op, Peer, Plan};

/// The subnets of peers to which packets go without a tunnel.
pub(super) fn on_link(
    desired: &Desired,
    observed: &Observed,
    peers: &BTreeMap<IpNet, Peer>,
) -> BTreeSet<IpNet> {
    let Some(direct) = &desired.direct else {
        return BTreeSet::new();
    };
    peers
        .iter()
        .filter(|(subnet, peer)| is_on_link(direct, observed, subnet, peer.vtep))
        .map(|(subnet, _)| *subnet)
        .collect()
}

/// Whether a peer is on the uplink's link: reached by it, and by nobody's help. What is outside the network is nobody's to route.
fn is_on_link(direct: &Direct, observed: &Observed, subnet: &IpNet, vtep: IpAddr) -> bool {
    direct.network.contains(subnet)
        && observed
            .underlay
            .get(&vtep)
            .is_some_and(|way| way.on_link && way.ifindex == direct.uplink)
}

/// Plans the routes over the uplink. `on_link` are the subnets that [`on_link`] has found, `tunnelled` those whose route over the tunnel
/// device is set in this pass, and takes the place of one here.
pub(super) fn plan_routes(
    desired: &Desired,
    observed: &Observed,
    peers: &BTreeMap<IpNet, Peer>,
    on_link: &BTreeSet<IpNet>,
    tunnelled: &BTreeSet<IpNet>,
    plan: &mut Plan,
    deletes: &mut Vec<Op>,
) {
    let mut kept = BTreeSet::new();
    if let Some(direct) = &desired.direct {
        for (subnet, peer) in peers {
            if on_link.contains(subnet) {
                kept.insert(*subnet);
                put(observed, direct, *subnet, peer.vtep, plan);
            } else if desired.tunnel.is_none() {
                // A route to the right peer does no harm: there is no other way.
                kept.extend(observed.links.get(subnet).and_then(|there| {
                    (there.gateway == peer.vtep && there.ifindex == direct.uplink)
                        .then_some(*subnet)
                }));
                plan.problems.push(why_not(direct, observed, *subnet, peer));
            }
        }
    }
    let Some(network) = desired.network() else {
        return;
    };
    for (subnet, there) in &observed.links {
        let stale = there.ours && network.contains(subnet);
        if stale && !kept.contains(subnet) && !tunnelled.contains(subnet) {
            deletes.push(Op::DelLinkRoute {
                subnet: *subnet,
                gateway: there.gateway,
                ifindex: there.ifindex,
            });
        }
    }
}

fn put(observed: &Observed, direct: &Direct, subnet: IpNet, gateway: IpAddr, plan: &mut Plan) {
    let wanted = LinkRoute {
        gateway,
        ifindex: direct.uplink,
        ours: true,
    };
    let there = observed.links.get(&subnet);
    if there == Some(&wanted) {
        return;
    }
    // What upstream has left is the same but for the mark.
    let foreign = there.filter(|there| {
        !there.ours && (there.gateway != gateway || there.ifindex != direct.uplink)
    });
    plan.ops.push(Op::PutLinkRoute {
        subnet,
        gateway,
        ifindex: direct.uplink,
        replaces: foreign.map(|there| (there.gateway, there.ifindex)),
    });
}

/// Why a peer has no route, where there is no tunnel either.
fn why_not(direct: &Direct, observed: &Observed, subnet: IpNet, peer: &Peer) -> String {
    let vtep = peer.vtep;
    let what = format!("peer {vtep} with {subnet} cannot be routed to");
    if !direct.network.contains(&subnet) {
        let network = direct.network;
        return format!("{what}: its subnet is outside the network {network}, correct its lease");
    }
    match observed.underlay.get(&vtep) {
        None => format!(
            "{what}: there is no route to its PublicIP: bring up the link that it is on, or correct its PublicIP"
        ),
        Some(way) if way.ifindex != direct.uplink => format!(
            "{what}: its PublicIP is reached over interface {}, not over the uplink: let the nodes' PublicIPs be on one link (--iface), or use the backend vxlan with DirectRouting",
            way.ifindex.get()
        ),
        Some(_) => format!(
            "{what}: a router is between it and this node, and the backend host-gw needs all nodes on one link: use the backend vxlan with DirectRouting"
        ),
    }
}
