//! `flannel-agent peers`: the other nodes as the data path knows them, joined from the kernel's objects and the pinned maps.

mod wireguard;

use std::collections::BTreeMap;

use anyhow::Context as _;
use flannel_core::{
    addr::VtepMac,
    mark::Overlay,
    plan::{Device, LinkRoute, Node, ObservedKind},
};
use ipnet::IpNet;
use serde::Serialize;

use super::{Args, Output, table};
use crate::{
    dataplane::{
        bpf::{self, Instance},
        netlink::Netlink,
    },
    state::{Bare, Mode, State},
};

#[derive(Debug, Serialize)]
struct PeerRow {
    subnet: String,
    vtep: Option<String>,
    mac: Option<String>,
    /// `bpf` when the maps carry it with a next hop, or there is no kernel device to leave it to; else `kernel`.
    path: &'static str,
    /// `tunnel`, or `direct` where packets go to it as they are.
    way: &'static str,
    next_hop: Option<String>,
    path_mtu: Option<u32>,
    /// Whether route, neighbour and forwarding entry of the kernel's device are there; a veth pair has no forwarding entries, and
    /// where packets go to it as they are, the route alone is needed.
    kernel_complete: bool,
}

/// Prints the peers. False when nothing can be known.
pub(super) async fn run(args: &Args, output: Output) -> anyhow::Result<bool> {
    let read = || format!("read {}", State::path(&args.subnet_file).display());
    let first = State::read(&args.subnet_file).with_context(read)?;
    if let Some(bare) = Bare::instead_of(first.as_ref(), &args.subnet_file).with_context(read)? {
        return wireguard::run(&bare, output).await;
    }
    let second = State::read_second(&args.subnet_file).with_context(read)?;
    let instances = if bpf::mounted() {
        Instance::all()?
    } else {
        Vec::new()
    };
    let states: Vec<&State> = first.iter().chain(&second).collect();
    let mut overlays: Vec<Overlay> = states.iter().map(|state| state.overlay()).collect();
    if overlays.is_empty() {
        overlays.extend(instances.first().map(Instance::overlay));
    }
    if overlays.is_empty() {
        table::complaint("no agent has run here: start flannel-agent, or give --subnet-file");
        return Ok(false);
    }
    let net = Netlink::open()?;
    let mut rows = Vec::new();
    for overlay in overlays {
        let mut nodes: BTreeMap<IpNet, Option<Node>> = BTreeMap::new();
        let state = states.iter().find(|state| state.overlay() == overlay);
        let instance = instances
            .iter()
            .find(|instance| instance.overlay() == overlay);
        if let Some(instance) = instance {
            match instance.peers() {
                Ok(peers) => nodes.extend(peers),
                // An overlay without eBPF has no maps.
                Err(_) if state.is_some_and(|state| state.datapath.mode == Mode::Kernel) => {}
                Err(error) => return Err(error).context("read the maps"),
            }
        }
        let tunnelled = state.is_none_or(|state| state.is_tunnelled());
        let device = if tunnelled {
            net.device(&overlay.device(), overlay.family).await?
        } else {
            None
        };
        let links = match state {
            Some(state) => net.link_routes(state.network, None).await?,
            None => BTreeMap::new(),
        };
        rows.extend(join(&nodes, device.as_ref(), &links));
    }
    match output {
        Output::Json => table::line(&serde_json::to_string_pretty(&rows)?),
        Output::Table => table::rows(
            &[
                "SUBNET", "VTEP", "MAC", "PATH", "WAY", "NEXT HOP", "PATH MTU", "KERNEL",
            ],
            rows.iter().map(|row| {
                let or_none = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".into());
                vec![
                    row.subnet.clone(),
                    or_none(&row.vtep),
                    or_none(&row.mac),
                    row.path.into(),
                    row.way.into(),
                    or_none(&row.next_hop),
                    row.path_mtu
                        .map_or_else(|| "-".into(), |mtu| mtu.to_string()),
                    if row.kernel_complete {
                        "complete".into()
                    } else {
                        "incomplete".into()
                    },
                ]
            }),
        ),
    }
    Ok(true)
}

fn join(
    nodes: &BTreeMap<IpNet, Option<Node>>,
    device: Option<&Device>,
    links: &BTreeMap<IpNet, LinkRoute>,
) -> Vec<PeerRow> {
    let mut subnets: Vec<IpNet> = nodes.keys().copied().collect();
    subnets.extend(device.iter().flat_map(|device| device.routes.keys()));
    let ours = links.iter().filter(|(_, link)| link.ours);
    subnets.extend(ours.map(|(subnet, _)| subnet));
    subnets.sort();
    subnets.dedup();
    let alone = device.is_some_and(|device| matches!(device.kind, ObservedKind::Veth { .. }));
    subnets
        .into_iter()
        .map(|subnet| {
            let node = nodes.get(&subnet).and_then(Option::as_ref);
            let gateway = subnet.network();
            let route = device.is_some_and(|device| device.routes.contains_key(&subnet));
            let neighbour = device.and_then(|device| device.neighbours.get(&gateway));
            let forwarding = device
                .zip(neighbour)
                .and_then(|(device, mac)| device.fdb.get(mac));
            let hop = node.and_then(|node| node.hop);
            let link = links.get(&subnet).filter(|link| link.ours);
            let direct = node.map_or(link.is_some(), |node| node.routed);
            let vtep = link.map(|link| &link.gateway).filter(|_| direct);
            PeerRow {
                subnet: subnet.to_string(),
                vtep: node
                    .map(|node| node.remote.to_string())
                    .or_else(|| vtep.or(forwarding).map(ToString::to_string)),
                mac: node
                    .map(|node| node.peer_mac)
                    .or_else(|| neighbour.copied())
                    // Without a tunnel there is nothing that would have one.
                    .filter(|mac| *mac != VtepMac::new([0; 6]))
                    .map(|mac| mac.to_string()),
                path: if hop.is_some() || (alone && node.is_some()) {
                    "bpf"
                } else {
                    "kernel"
                },
                way: if direct { "direct" } else { "tunnel" },
                next_hop: hop.map(|(_, mac)| mac.to_string()),
                path_mtu: node.map(|node| node.path_mtu),
                kernel_complete: if direct {
                    link.is_some()
                } else {
                    route && neighbour.is_some() && (alone || forwarding.is_some())
                },
            }
        })
        .collect()
}
