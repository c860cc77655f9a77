//! The kernel's own objects: device, address, forwarding entries, neighbours, routes.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use flannel_common::{OVERHEAD_V4, OVERHEAD_V6};
use ipnet::IpNet;

use super::{Device, DeviceKind, Observed, ObservedKind, Op, Overlay, Peer, Plan, Route, Tunnel};
use crate::{
    addr::{Mtu, VtepMac},
    mark,
};

/// Plans the device itself. Returns it once it is fit to carry peers.
pub(super) fn plan_device<'a>(
    tunnel: &Tunnel,
    observed: &'a Observed,
    plan: &mut Plan,
) -> Option<&'a Device> {
    let Some(device) = &observed.device else {
        plan.ops.push(Op::CreateDevice(tunnel.clone()));
        return None;
    };
    match fit(tunnel, &device.kind) {
        Fit::Good => {}
        Fit::Replace(why) => {
            plan.ops.push(Op::DeleteDevice {
                index: device.index,
                name: tunnel.name.clone(),
                why,
            });
            return None;
        }
        Fit::NotOurs(what) => {
            plan.problems.push(format!(
                "device {} exists and is {what}, not a device of ours: rename or delete it, or use another VNI",
                tunnel.name
            ));
            return None;
        }
    }
    // A device that came back with another MAC (made by hand, or udev's policy) would be deaf to its peers.
    if let Some(mac) = new_mac(tunnel, device) {
        plan.ops.push(Op::SetMac {
            index: device.index,
            mac,
        });
    }
    if device.mtu != tunnel.mtu.get() {
        plan.ops.push(Op::SetMtu {
            index: device.index,
            mtu: tunnel.mtu,
        });
    }
    if let Some(address) = tunnel.address {
        if !device.addresses.contains(&address) {
            plan.ops.push(Op::PutAddress {
                index: device.index,
                address,
            });
        }
        // Upstream's rule: only what lies inside the network is an older lease's; the rest (dhcpcd, avahi) stays.
        for stale in &device.addresses {
            if *stale != address && tunnel.network.contains(&stale.addr()) {
                plan.ops.push(Op::DelAddress {
                    index: device.index,
                    address: *stale,
                });
            }
        }
    }
    if !device.up {
        plan.ops.push(Op::SetUp {
            index: device.index,
        });
        return None;
    }
    Some(device)
}

enum Fit {
    Good,
    Replace(String),
    NotOurs(String),
}

/// Upstream compares VNI, lower device, local address, port and GBP; MTU is applied in place, and so would be learning, but the
/// kernel has no way to change it.
fn fit(tunnel: &Tunnel, have: &ObservedKind) -> Fit {
    match (&tunnel.kind, have) {
        (
            DeviceKind::Vxlan {
                vni,
                port,
                lower,
                local,
                learning,
                gbp,
            },
            ObservedKind::Vxlan {
                vni: has_vni,
                port: has_port,
                lower: has_lower,
                local: has_local,
                learning: learns,
                gbp: has_gbp,
            },
        ) => {
            let why = if vni.get() != *has_vni {
                format!("VNI is {has_vni}, not {}", vni.get())
            } else if port != has_port {
                format!("port is {has_port}, not {port}")
            } else if has_lower.is_some_and(|has| has != *lower) {
                format!("it is bound to another interface than {}", lower.get())
            } else if has_local.is_some_and(|has| has != *local) {
                format!("its local address is not {local}")
            } else if gbp != has_gbp {
                format!("GBP is {has_gbp}, not {gbp}")
            } else if learning != learns {
                format!("learning is {learns}, not {learning}")
            } else {
                return Fit::Good;
            };
            Fit::Replace(why)
        }
        (DeviceKind::Veth { peer }, ObservedKind::Veth { peer: Some(has) }) if has == peer => {
            Fit::Good
        }
        // The way from the kernel's device to eBPF alone and back, where nothing can stand in meanwhile: both carry our name and nobody
        // else's.
        (DeviceKind::Veth { .. }, ObservedKind::Vxlan { .. }) => {
            Fit::Replace("it is a vxlan device, eBPF alone was asked for".into())
        }
        (DeviceKind::Vxlan { .. }, ObservedKind::Veth { peer: Some(has) })
            if mark::far_end(&tunnel.name).is_some_and(|ours| ours == *has) =>
        {
            Fit::Replace("it is a veth pair of ours, a vxlan device was asked for".into())
        }
        (_, ObservedKind::Veth { .. }) => Fit::NotOurs("one end of a veth pair".into()),
        (_, ObservedKind::Other(kind)) => Fit::NotOurs(format!("of kind {kind:?}")),
    }
}

/// The MAC address that the device must get, if it has another one.
fn new_mac(tunnel: &Tunnel, device: &Device) -> Option<VtepMac> {
    tunnel.mac.filter(|mac| *mac != device.mac)
}

/// Puts back the neighbours that a change of the device's MAC takes away, while nobody can say which of them are right.
///
/// The kernel drops all neighbours of a device whose MAC changes, permanent ones too (`neigh_changeaddr`, seen on 6.18); routes and
/// forwarding entries stay.
pub(super) fn restore_neighbours(overlay: &Overlay<'_>, puts: &mut Vec<Op>) {
    let Overlay { tunnel, device } = overlay;
    if new_mac(tunnel, device).is_none() {
        return;
    }
    for (address, mac) in &device.neighbours {
        puts.push(Op::PutNeighbour {
            address: *address,
            mac: *mac,
        });
    }
}

/// Plans forwarding entries, neighbours and routes of the peers that the device carries.
pub(super) fn plan_peers<'a>(
    overlay: &Overlay<'_>,
    observed: &Observed,
    peers: impl Iterator<Item = (&'a IpNet, &'a Peer)>,
    plan: &mut Plan,
    deletes: &mut Vec<Op>,
) {
    let Plan {
        ops: puts,
        problems,
    } = plan;
    let Overlay { tunnel, device } = overlay;
    let has_fdb = matches!(tunnel.kind, DeviceKind::Vxlan { .. });
    let own_mac = overlay.mac();
    // By the time these ops run, a change of the device's MAC has taken all neighbours away, see `restore_neighbours`.
    let none = BTreeMap::new();
    let neighbours = match new_mac(tunnel, device) {
        Some(_) => &none,
        None => &device.neighbours,
    };
    let mut macs: BTreeMap<VtepMac, IpAddr> = BTreeMap::new();
    let mut gateways = BTreeSet::new();
    let mut carried = BTreeSet::new();
    for (subnet, peer) in peers {
        let Some(mac) = peer.mac else {
            problems.push(format!(
                "peer {} with {subnet} has no VtepMAC, and is not on the link: give all nodes the same backend",
                peer.vtep
            ));
            continue;
        };
        carried.insert(*subnet);
        let gateway = subnet.network();
        gateways.insert(gateway);
        // Forwarding entry first: a neighbour with a MAC that nobody forwards would swallow packets.
        if has_fdb {
            if mac == own_mac {
                // `vxlan_rcv` drops frames that seem to come from the device itself.
                problems.push(format!(
                    "peer {} with {subnet} has the MAC address {own_mac} of this node's own device, which hears nothing from it: delete the lease if it is an older one of this node, else give one of the two nodes' devices another MAC address",
                    peer.vtep
                ));
            }
            match macs.get(&mac) {
                None => {
                    macs.insert(mac, peer.vtep);
                    if device.fdb.get(&mac) != Some(&peer.vtep) {
                        puts.push(Op::PutFdb {
                            mac,
                            vtep: peer.vtep,
                        });
                    }
                }
                Some(vtep) if *vtep != peer.vtep => problems.push(format!(
                    "peer {} with {subnet} has the MAC address {mac} of peer {vtep}, which gets its packets: delete the older lease if they are one node, else give one of the two nodes' devices another MAC address",
                    peer.vtep
                )),
                Some(_) => {}
            }
        }
        if neighbours.get(&gateway) != Some(&mac) {
            puts.push(Op::PutNeighbour {
                address: gateway,
                mac,
            });
        }
        let mtu = route_mtu(tunnel, observed, peer.vtep);
        if device.routes.get(subnet) != Some(&Route { gateway, mtu }) {
            puts.push(Op::PutRoute {
                subnet: *subnet,
                gateway,
                mtu,
            });
        }
    }
    for subnet in device
        .routes
        .keys()
        .filter(|subnet| !carried.contains(*subnet))
    {
        deletes.push(Op::DelRoute { subnet: *subnet });
    }
    for address in neighbours
        .keys()
        .filter(|address| !gateways.contains(address))
    {
        deletes.push(Op::DelNeighbour { address: *address });
    }
    for (mac, vtep) in device
        .fdb
        .iter()
        .filter(|(mac, _)| has_fdb && !macs.contains_key(mac))
    {
        deletes.push(Op::DelFdb {
            mac: *mac,
            vtep: *vtep,
        });
    }
}

/// The vxlan device measures the path itself. Without it the route must say that the path is narrow, so that the stack answers
/// with the right ICMP errors.
fn route_mtu(tunnel: &Tunnel, observed: &Observed, vtep: IpAddr) -> Option<u32> {
    if matches!(tunnel.kind, DeviceKind::Vxlan { .. }) {
        return None;
    }
    let path = observed
        .way(vtep)?
        .mtu
        .saturating_sub(if vtep.is_ipv4() {
            OVERHEAD_V4
        } else {
            OVERHEAD_V6
        })
        // A route whose MTU is zero has none, and would be set again and again.
        .max(Mtu::MIN);
    (path < tunnel.mtu.get()).then_some(path)
}
