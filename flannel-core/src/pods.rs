//! Which pods of this node packets may be handed to directly, and where each of them is.
//!
//! Nobody tells: it is learnt from the bridge that the pods hang on. The bridge's neighbours say which MAC address has an IP address,
//! its forwarding entries on which port that MAC address is; what CNI plugins left in their cache serves until a pod has sent its
//! first packet. In doubt an address is left out: its packets then go through the stack, which is never wrong.

pub mod announced;
pub mod cni;
pub mod report;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use flannel_common::PodRecord;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::addr::{IfIndex, VtepMac};
use cni::CniPod;

/// A pod of this node: what an entry of the map `pods` says, in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// The host's end of its veth pair.
    pub ifindex: IfIndex,
    /// Differs from that of every other record there ever was on this node since it booted.
    pub generation: u32,
    /// Bytes of IP packet that reach it.
    pub mtu: u32,
    /// Its MAC address.
    pub mac: VtepMac,
    /// MAC address of its gateway: the bridge.
    pub gateway_mac: VtepMac,
}

impl Pod {
    /// The map value.
    pub fn encode(&self) -> PodRecord {
        PodRecord {
            ifindex: self.ifindex.get(),
            generation: self.generation,
            mtu: self.mtu,
            mac: self.mac.octets(),
            gateway_mac: self.gateway_mac.octets(),
        }
    }

    /// Reads a map value back. `None` if it was not written by [`Pod::encode`].
    pub fn decode(record: &PodRecord) -> Option<Self> {
        Some(Self {
            ifindex: IfIndex::try_from(record.ifindex).ok()?,
            generation: record.generation,
            mtu: record.mtu,
            mac: record.mac.into(),
            gateway_mac: record.gateway_mac.into(),
        })
    }
}

impl fmt::Display for Pod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "lladdr {} dev {} mtu {} generation {}",
            self.mac,
            self.ifindex.get(),
            self.mtu,
            self.generation
        )
    }
}

/// The bridge that pods hang on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bridge {
    /// Interface index.
    pub index: IfIndex,
    /// Its MAC address: that of the pods' gateway.
    pub mac: VtepMac,
    /// MTU in bytes.
    pub mtu: u32,
}

/// A port of that bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Interface name.
    pub name: String,
    /// MTU in bytes.
    pub mtu: u32,
    /// Whether it is one end of a veth pair whose other end is in another network namespace.
    pub is_veth: bool,
    /// Whether it is up.
    pub up: bool,
}

/// What the node knows of its pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodSources {
    /// The bridge, if there is one: the one that has [`gateway`] as an address, whatever its name.
    pub bridge: Option<Bridge>,
    /// Its ports.
    pub ports: BTreeMap<IfIndex, Port>,
    /// Its neighbours with a MAC address that has not failed.
    pub neighbours: BTreeMap<IpAddr, VtepMac>,
    /// The port behind which it has heard a MAC address.
    pub fdb: BTreeMap<VtepMac, IfIndex>,
    /// What CNI plugins said when they made the pods. Entries of pods that are gone may be among it.
    pub cni: Vec<CniPod>,
    /// This node's subnet.
    pub own: IpNet,
}

/// The address of the bridge that serves a node's subnet: the first of a host, as CNI's bridge plugin takes it.
pub fn gateway(own: IpNet) -> Option<IpNet> {
    let first = match own.network() {
        IpAddr::V4(base) => IpAddr::V4(u32::from(base).checked_add(1)?.into()),
        IpAddr::V6(base) => IpAddr::V6(u128::from(base).checked_add(1)?.into()),
    };
    IpNet::new(first, own.prefix_len()).ok()
}

/// The pods known at present.
#[derive(Clone, Debug, Default)]
pub struct PodTable {
    known: BTreeMap<IpAddr, Pod>,
    /// The latest generation that was given.
    generation: u32,
}

/// Who says that an address is on a port.
type Claim = (IfIndex, VtepMac);

impl PodTable {
    /// Takes over the records of an earlier run. New generations start beyond theirs and beyond `floor`, which the caller chooses so
    /// that it exceeds every generation of earlier runs that has left no record.
    pub fn adopt(records: impl IntoIterator<Item = (IpAddr, Pod)>, floor: u32) -> Self {
        let known: BTreeMap<_, _> = records.into_iter().collect();
        let latest = known.values().map(|pod| pod.generation).max();
        Self {
            generation: floor.max(latest.unwrap_or(0)),
            known,
        }
    }

    /// The pods known at present.
    pub const fn pods(&self) -> &BTreeMap<IpAddr, Pod> {
        &self.known
    }

    /// Forgets the pods behind an interface that is gone, and returns their addresses.
    pub fn forget(&mut self, ifindex: IfIndex) -> Vec<IpAddr> {
        let gone: Vec<IpAddr> = self
            .known
            .iter()
            .filter(|(_, pod)| pod.ifindex == ifindex)
            .map(|(address, _)| *address)
            .collect();
        self.known.retain(|_, pod| pod.ifindex != ifindex);
        gone
    }

    /// Forgets every pod. Those that come back get new generations.
    pub fn clear(&mut self) {
        self.known.clear();
    }

    /// Learns from a complete look at the node. Pods behind `excluded` interfaces stay with the stack: they are left out.
    pub fn learn(
        &mut self,
        sources: &PodSources,
        excluded: &BTreeSet<IfIndex>,
    ) -> &BTreeMap<IpAddr, Pod> {
        let before = std::mem::take(&mut self.known);
        let Some(bridge) = sources.bridge else {
            return &self.known;
        };
        for (address, (ifindex, mac)) in claims(sources, &before) {
            let Some(port) = sources
                .ports
                .get(&ifindex)
                .filter(|port| port.is_veth && port.up && !excluded.contains(&ifindex))
            else {
                continue;
            };
            let was = before.get(&address).copied();
            let mut pod = Pod {
                ifindex,
                generation: was.map_or(0, |was| was.generation),
                mtu: port.mtu.min(bridge.mtu),
                mac,
                gateway_mac: bridge.mac,
            };
            if was != Some(pod) {
                self.generation = self.generation.wrapping_add(1);
                pod.generation = self.generation;
            }
            self.known.insert(address, pod);
        }
        &self.known
    }
}

/// The one claim to every address, where there is just one.
fn claims(sources: &PodSources, before: &BTreeMap<IpAddr, Pod>) -> BTreeMap<IpAddr, Claim> {
    let mut claims = heard(sources);
    let told = told(sources);
    let mut disputed = BTreeSet::new();
    for (address, said) in told {
        if claims.contains_key(&address) {
            continue;
        }
        match said.first() {
            Some(claim) if said.len() == 1 => {
                claims.insert(address, *claim);
            }
            _ => {
                disputed.insert(address);
            }
        }
    }
    for (address, pod) in before {
        // An idle pod's forwarding entry ages, and so does its neighbour.
        let elsewhere = sources
            .fdb
            .get(&pod.mac)
            .is_some_and(|port| *port != pod.ifindex);
        let renamed = sources
            .neighbours
            .get(address)
            .is_some_and(|mac| *mac != pod.mac);
        if is_pods(sources, *address)
            && sources.ports.contains_key(&pod.ifindex)
            && !elsewhere
            && !renamed
            && !disputed.contains(address)
        {
            claims.entry(*address).or_insert((pod.ifindex, pod.mac));
        }
    }
    // A MAC address on two ports at once: the bridge itself would send to either.
    let mut places: BTreeMap<VtepMac, BTreeSet<IfIndex>> = BTreeMap::new();
    for (ifindex, mac) in claims.values() {
        places.entry(*mac).or_default().insert(*ifindex);
    }
    claims.retain(|_, (_, mac)| places.get(mac).is_some_and(|ports| ports.len() == 1));
    claims
}

/// What the bridge has heard: IP address to MAC address to port.
fn heard(sources: &PodSources) -> BTreeMap<IpAddr, Claim> {
    sources
        .neighbours
        .iter()
        .filter(|(address, _)| is_pods(sources, **address))
        .filter_map(|(address, mac)| {
            let port = sources.fdb.get(mac)?;
            let known = sources.ports.contains_key(port);
            known.then_some((*address, (*port, *mac)))
        })
        .collect()
}

/// What CNI plugins said, of pods whose veth is there and whose MAC address the bridge has not heard elsewhere.
fn told(sources: &PodSources) -> BTreeMap<IpAddr, BTreeSet<Claim>> {
    let by_name: BTreeMap<&str, IfIndex> = sources
        .ports
        .iter()
        .map(|(index, port)| (port.name.as_str(), *index))
        .collect();
    let mut told: BTreeMap<IpAddr, BTreeSet<Claim>> = BTreeMap::new();
    for pod in &sources.cni {
        let ports = pod.host_interfaces.iter();
        let mut ports = ports.filter_map(|name| by_name.get(name.as_str()));
        let (Some(port), None) = (ports.next(), ports.next()) else {
            continue;
        };
        let elsewhere = sources.fdb.get(&pod.mac).is_some_and(|heard| heard != port);
        if is_pods(sources, pod.address) && !elsewhere {
            told.entry(pod.address)
                .or_default()
                .insert((*port, pod.mac));
        }
    }
    told
}

/// Whether an address can be a pod's: inside our subnet, and not the bridge's own, the subnet's base or its broadcast address.
fn is_pods(sources: &PodSources, address: IpAddr) -> bool {
    let own = sources.own;
    own.contains(&address)
        && address != own.network()
        && address != own.broadcast()
        && gateway(own).is_none_or(|gateway| gateway.addr() != address)
}

#[cfg(test)]
mod tests;
