//! `flannel-agent peers`: the other nodes as the data path knows them, joined from the kernel's objects and the pinned maps.

use std::collections::BTreeMap;

use anyhow::Context as _;
use flannel_core::{
    mark,
    plan::{Node, ObservedKind},
};
use ipnet::{IpNet, Ipv4Net};
use serde::Serialize;

use super::{Args, Output, table};
use crate::{
    dataplane::{
        bpf::{self, Instance},
        netlink::Netlink,
    },
    state::State,
};

#[derive(Debug, Serialize)]
struct PeerRow {
    subnet: String,
    vtep: Option<String>,
    mac: Option<String>,
    /// `bpf` when the maps carry it with a next hop, or there is no kernel device to leave it to; else `kernel`.
    path: &'static str,
    next_hop: Option<String>,
    path_mtu: Option<u32>,
    /// Whether route, neighbour and forwarding entry of the kernel's device are there; a veth pair has no forwarding entries.
    kernel_complete: bool,
}

/// Prints the peers. False when nothing can be known.
pub(super) async fn run(args: &Args, output: Output) -> anyhow::Result<bool> {
    let state = State::read(&args.subnet_file)
        .with_context(|| format!("read {}", State::path(&args.subnet_file).display()))?;
    let instances = if bpf::mounted() {
        Instance::all()?
    } else {
        Vec::new()
    };
    let wanted = state.as_ref().map(|state| state.vni);
    let instance = instances
        .iter()
        .find(|(vni, _)| wanted.is_none_or(|wanted| wanted == *vni));
    let Some(vni) = wanted.or_else(|| instance.map(|(vni, _)| *vni)) else {
        table::complaint("no agent has run here: start flannel-agent, or give --subnet-file");
        return Ok(false);
    };
    let mut nodes: BTreeMap<Ipv4Net, Option<Node>> = BTreeMap::new();
    if let Some((_, instance)) = instance {
        nodes = instance
            .peers()
            .context("read the maps")?
            .into_iter()
            .collect();
    }
    let device = Netlink::open()?.device(&mark::device_name(vni)).await?;
    let rows = join(&nodes, device.as_ref());
    match output {
        Output::Json => table::line(&serde_json::to_string_pretty(&rows)?),
        Output::Table => table::rows(
            &[
                "SUBNET", "VTEP", "MAC", "PATH", "NEXT HOP", "PATH MTU", "KERNEL",
            ],
            rows.iter().map(|row| {
                let or_none = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".into());
                vec![
                    row.subnet.clone(),
                    or_none(&row.vtep),
                    or_none(&row.mac),
                    row.path.into(),
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
    nodes: &BTreeMap<Ipv4Net, Option<Node>>,
    device: Option<&flannel_core::plan::Device>,
) -> Vec<PeerRow> {
    let mut subnets: Vec<Ipv4Net> = nodes.keys().copied().collect();
    for subnet in device.iter().flat_map(|device| device.routes.keys()) {
        if let IpNet::V4(subnet) = subnet {
            subnets.push(*subnet);
        }
    }
    subnets.sort();
    subnets.dedup();
    let alone = device.is_some_and(|device| matches!(device.kind, ObservedKind::Veth { .. }));
    subnets
        .into_iter()
        .map(|subnet| {
            let node = nodes.get(&subnet).and_then(Option::as_ref);
            let gateway = std::net::IpAddr::V4(subnet.network());
            let route = device.is_some_and(|device| device.routes.contains_key(&IpNet::V4(subnet)));
            let neighbour = device.and_then(|device| device.neighbours.get(&gateway));
            let forwarding = device
                .zip(neighbour)
                .and_then(|(device, mac)| device.fdb.get(mac));
            let hop = node.and_then(|node| node.hop);
            PeerRow {
                subnet: subnet.to_string(),
                vtep: node
                    .map(|node| node.remote.to_string())
                    .or_else(|| forwarding.map(ToString::to_string)),
                mac: node
                    .map(|node| node.peer_mac.to_string())
                    .or_else(|| neighbour.map(ToString::to_string)),
                path: if hop.is_some() || (alone && node.is_some()) {
                    "bpf"
                } else {
                    "kernel"
                },
                next_hop: hop.map(|(_, mac)| mac.to_string()),
                path_mtu: node.map(|node| node.path_mtu),
                kernel_complete: route && neighbour.is_some() && (alone || forwarding.is_some()),
            }
        })
        .collect()
}
