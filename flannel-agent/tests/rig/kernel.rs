//! What the kernel has of a node, read with `ip` and `bridge`.

use std::collections::BTreeMap;

use flannel_testkit::{
    Family, Netns, Prefix, Subnet,
    json::{bridge_json, ip_json},
};
use serde_json::Value;

use super::VNI;

/// A node as others know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) public_ip: String,
    pub(crate) mac: String,
}

/// [`peers_of`] for IPv4.
pub(crate) fn kernel_peers(ns: &Netns) -> anyhow::Result<(String, BTreeMap<Subnet, Peer>)> {
    let (kind, peers) = peers_of(ns, Family::V4)?;
    let peers = peers.into_iter();
    let peers = peers.filter_map(|(prefix, peer)| Some((prefix.as_subnet()?, peer)));
    Ok((kind, peers.collect()))
}

/// The peers for which the tunnel device of a family has a route, a neighbour and a forwarding entry that agree. Anything left
/// over, such as a neighbour without a route, is an error. First comes the kind of the device.
pub(crate) fn peers_of(
    ns: &Netns,
    family: Family,
) -> anyhow::Result<(String, BTreeMap<Prefix, Peer>)> {
    let device = family.device(VNI);
    let device = device.as_str();
    let flag = family.flag();
    let routes = ip_json(ns, &[flag, "route", "show", "dev", device])?;
    let permanent = [flag, "neigh", "show", "dev", device, "nud", "permanent"];
    let neighbours = ip_json(ns, &permanent)?;
    let fdb = bridge_json(ns, &["fdb", "show", "dev", device])?;
    let mut macs: BTreeMap<String, String> = list(&neighbours)
        .iter()
        .filter_map(|entry| Some((text(entry, "dst")?, text(entry, "lladdr")?)))
        .collect();
    let mut vteps: BTreeMap<String, String> = list(&fdb)
        .iter()
        .filter_map(|entry| Some((text(entry, "mac")?, text(entry, "dst")?)))
        .collect();
    let link = flannel_testkit::json::link(ns, device)?;
    let kind = text(&link["linkinfo"], "info_kind").unwrap_or_default();
    let mut peers = BTreeMap::new();
    for route in list(&routes) {
        let (Some(dst), Some(gateway)) = (text(route, "dst"), text(route, "gateway")) else {
            continue;
        };
        let mac = macs
            .remove(&gateway)
            .ok_or_else(|| anyhow::anyhow!("no neighbour {gateway} for the route to {dst}"))?;
        let public_ip = match vteps.remove(&mac) {
            Some(vtep) => vtep,
            None if kind == "vxlan" => anyhow::bail!("no forwarding entry for {mac} of {dst}"),
            None => String::new(),
        };
        peers.insert(dst.parse()?, Peer { public_ip, mac });
    }
    anyhow::ensure!(macs.is_empty(), "neighbours without a route: {macs:?}");
    anyhow::ensure!(
        vteps.is_empty(),
        "forwarding entries without a neighbour: {vteps:?}"
    );
    Ok((kind, peers))
}

/// The entries of a list; `ip` says nothing at all for an empty one.
pub(crate) fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// A string field.
pub(crate) fn text(value: &Value, field: &str) -> Option<String> {
    Some(value[field].as_str()?.to_owned())
}

/// The first eight bytes of a per-CPU entry as a number, summed over all CPUs.
pub(crate) fn per_cpu(entry: &Value) -> u64 {
    list(&entry["values"])
        .iter()
        .map(|value| {
            let mut bytes = [0; 8];
            for (byte, text) in bytes.iter_mut().zip(list(&value["value"])) {
                let digits = text.as_str().expect("a byte").trim_start_matches("0x");
                *byte = u8::from_str_radix(digits, 16).expect("a byte in hex");
            }
            u64::from_ne_bytes(bytes)
        })
        .sum()
}
