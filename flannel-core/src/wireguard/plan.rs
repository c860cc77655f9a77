//! From what is there to what should be.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use super::{Desired, Device, Inner, Observed, Op, Peer, SeenPeer, Tunnel, clamped};
use crate::{
    key::{PublicKey, SecretKey},
    mark,
};

/// Changes in the order in which to make them, and what no change can mend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The changes.
    pub ops: Vec<Op>,
    /// What is wrong and needs a person, one line each.
    pub problems: Vec<String>,
}

/// Compares. On a device additions come before removals, so that nothing is missing in between.
pub fn plan(desired: &Desired, observed: &Observed) -> Plan {
    let mut plan = Plan::default();
    let mut removals = Vec::new();
    // First of all: a network is led to one device at a time, and this one may be in the way.
    for (name, device) in &observed.devices {
        if !desired.tunnels.contains_key(name) && mark::is_our_wireguard(name, &device.kind) {
            let device = name.clone();
            plan.ops.push(Op::DeleteDevice { device });
        }
    }
    for (name, tunnel) in &desired.tunnels {
        let there = observed.devices.get(name);
        let there = there.filter(|device| mark::is_our_wireguard(name, &device.kind));
        let others = desired.tunnels.iter().filter(|(other, _)| *other != name);
        let others: BTreeSet<&IpNet> = others.flat_map(|(_, other)| &other.networks).collect();
        let routes = there.into_iter().flat_map(|device| &device.routes);
        let moved = routes.filter(|net| others.contains(net) && !tunnel.networks.contains(net));
        plan.ops.extend(moved.map(|network| Op::DelRoute {
            device: name.clone(),
            network: *network,
        }));
    }
    for (name, tunnel) in &desired.tunnels {
        let there = observed.devices.get(name);
        if let Some(device) = there
            && !mark::is_our_wireguard(name, &device.kind)
        {
            let kind = &device.kind;
            plan.problems.push(format!(
                "device {name} is in the way: it is no wireguard device ({kind}), remove or rename it"
            ));
            continue;
        }
        link(&mut plan.ops, &mut removals, name, tunnel, there, desired);
        if let (Some(wanted), seen) = (
            &tunnel.peers,
            there.and_then(|device| device.inner.as_ref()),
        ) {
            peers(&mut removals, name, wanted, seen);
        }
    }
    plan.ops.extend(removals);
    plan
}

fn link(
    ops: &mut Vec<Op>,
    removals: &mut Vec<Op>,
    name: &str,
    tunnel: &Tunnel,
    there: Option<&Device>,
    desired: &Desired,
) {
    let device = || name.to_owned();
    if there.is_none() {
        ops.push(Op::CreateDevice {
            device: device(),
            mtu: tunnel.mtu,
        });
    }
    let inner = there.and_then(|device| device.inner.as_ref());
    if !has_key(inner, &tunnel.private) || inner.is_none_or(|inner| inner.port != tunnel.port) {
        ops.push(Op::SetDevice {
            device: device(),
            private: clamped(&tunnel.private),
            port: tunnel.port,
        });
    }
    if let Some(wanted) = &tunnel.peers {
        put_peers(ops, name, wanted, inner);
    }
    if there.is_some_and(|device| device.mtu != tunnel.mtu.get()) {
        ops.push(Op::SetMtu {
            device: device(),
            mtu: tunnel.mtu,
        });
    }
    let missing = |network: &&IpNet| there.is_none_or(|there| !there.addresses.contains(network));
    ops.extend(
        tunnel
            .addresses
            .iter()
            .filter(missing)
            .map(|address| Op::PutAddress {
                device: device(),
                address: *address,
            }),
    );
    let up = there.is_some_and(|device| device.up);
    if !up {
        ops.push(Op::SetUp { device: device() });
    }
    // A device that is down has none, whatever was read before.
    let missing =
        |network: &&IpNet| !up || there.is_none_or(|there| !there.routes.contains(network));
    ops.extend(
        tunnel
            .networks
            .iter()
            .filter(missing)
            .map(|network| Op::PutRoute {
                device: device(),
                network: *network,
            }),
    );
    let Some(there) = there else { return };
    let stale = there.routes.intersection(&desired.former);
    let stale = stale.filter(|network| !tunnel.networks.contains(network));
    removals.extend(stale.map(|network| Op::DelRoute {
        device: device(),
        network: *network,
    }));
    let inside = |address: &&IpNet| {
        let networks = desired.tunnels.values().flat_map(|tunnel| &tunnel.networks);
        let mut networks = networks.chain(&desired.former);
        networks.any(|network| network.contains(&address.addr()))
    };
    // Before there is a lease nobody knows which one stays.
    if !tunnel.addresses.is_empty() {
        let stale = there.addresses.difference(&tunnel.addresses).filter(inside);
        removals.extend(stale.map(|address| Op::DelAddress {
            device: device(),
            address: *address,
        }));
    }
}

fn has_key(inner: Option<&Inner>, wanted: &SecretKey) -> bool {
    let seen = inner.and_then(|inner| inner.private.as_ref());
    seen.is_some_and(|seen| *seen == clamped(wanted))
}

fn put_peers(
    ops: &mut Vec<Op>,
    name: &str,
    wanted: &BTreeMap<PublicKey, Peer>,
    inner: Option<&Inner>,
) {
    for (key, peer) in wanted {
        let seen = inner.and_then(|inner| inner.peers.get(key));
        let endpoint = seen.is_none_or(|seen| endpoint_is_due(peer, seen));
        let same = seen.is_some_and(|seen| {
            seen.allowed == peer.allowed && seen.psk == peer.psk && seen.keepalive == peer.keepalive
        });
        if endpoint || !same {
            ops.push(Op::PutPeer {
                device: name.to_owned(),
                key: *key,
                peer: peer.clone(),
                endpoint,
            });
        }
    }
}

/// A peer behind a translated address is reached where it is heard from, not where its lease says: as long as its session lives, and
/// the lease says what it said before, the kernel knows best.
fn endpoint_is_due(peer: &Peer, seen: &SeenPeer) -> bool {
    let moved = seen.given.is_some_and(|given| given != peer.endpoint);
    seen.endpoint != Some(peer.endpoint) && (moved || !seen.alive)
}

fn peers(
    removals: &mut Vec<Op>,
    name: &str,
    wanted: &BTreeMap<PublicKey, Peer>,
    inner: Option<&Inner>,
) {
    let seen = inner.into_iter().flat_map(|inner| inner.peers.keys());
    removals.extend(
        seen.filter(|key| !wanted.contains_key(key))
            .map(|key| Op::RemovePeer {
                device: name.to_owned(),
                key: *key,
            }),
    );
}
