//! Packets to other nodes: what became of them.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use super::{Finding, Observations, few, overlay::NOBODY};
use crate::{config::OVERHEAD_V4, plan::peers_of};

/// What became of packets to other nodes.
#[derive(Clone, Debug, Default)]
pub struct Probes {
    /// By public address.
    pub peers: BTreeMap<Ipv4Addr, PeerProbe>,
    /// Peers for which there was no time.
    pub unfinished: usize,
    /// Why none could be sent.
    pub refused: Option<String>,
}

/// What one peer answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerProbe {
    /// Round trip to its public address.
    pub underlay: Option<Duration>,
    /// Round trip through the overlay to its tunnel device.
    pub overlay: Option<Duration>,
    /// The largest packet that passes the overlay whole, in bytes; `None` while that is unknown.
    pub passes: Option<u32>,
}

/// The peers to send to: public address and base address of the subnet.
pub fn targets(seen: &Observations) -> BTreeMap<Ipv4Addr, Ipv4Addr> {
    let own = seen.store.own(seen).map_or(NOBODY, |(key, _)| *key);
    let Some(leases) = seen.store.list() else {
        return programmed(seen);
    };
    peers_of(leases, &own)
        .0
        .into_iter()
        .filter_map(|(subnet, peer)| match (subnet.network(), peer.vtep) {
            (IpAddr::V4(base), IpAddr::V4(vtep)) => Some((vtep, base)),
            _ => None,
        })
        .collect()
}

/// The peers that the tunnel device knows, for when the store does not answer.
fn programmed(seen: &Observations) -> BTreeMap<Ipv4Addr, Ipv4Addr> {
    let Some(device) = &seen.overlay.device else {
        return BTreeMap::new();
    };
    let peer = |base: &IpAddr| {
        let vtep = device.fdb.get(device.neighbours.get(base)?)?;
        match (vtep, base) {
            (IpAddr::V4(vtep), IpAddr::V4(base)) => Some((*vtep, *base)),
            _ => None,
        }
    };
    device
        .routes
        .values()
        .filter_map(|route| peer(&route.gateway))
        .collect()
}

pub(super) fn judge(seen: &Observations) -> Vec<Finding> {
    vec![underlay(seen), through(seen), path_mtu(seen)]
}

/// The probes, or why there are none.
fn probes(seen: &Observations) -> Result<&Probes, String> {
    let Some(probes) = &seen.probes else {
        return Err("--no-peers was given".into());
    };
    if let Some(error) = &probes.refused {
        return Err(format!("no packets could be sent: {error}"));
    }
    if probes.peers.is_empty() {
        return Err(match seen.store.list() {
            None => "the store does not say who the peers are".into(),
            Some(_) => "there are no other nodes".into(),
        });
    }
    Ok(probes)
}

fn unfinished(probes: &Probes) -> String {
    match probes.unfinished {
        0 => String::new(),
        count => format!("; no time for {count} more (--timeout)"),
    }
}

fn slowest(times: impl Iterator<Item = Duration>) -> String {
    times.max().map_or_else(String::new, |time| {
        format!(", slowest {:.1} ms", time.as_secs_f64() * 1000.0)
    })
}

fn underlay(seen: &Observations) -> Finding {
    const NAME: &str = "underlay";
    let probes = match probes(seen) {
        Ok(probes) => probes,
        Err(why) => return Finding::skip(NAME, why),
    };
    let total = probes.peers.len();
    let answered = probes.peers.values().filter_map(|peer| peer.underlay);
    let count = answered.clone().count();
    let slow = slowest(answered);
    let more = unfinished(probes);
    // Who answers through the overlay is there: something only eats pings.
    let dead: Vec<&Ipv4Addr> = probes
        .peers
        .iter()
        .filter(|(_, peer)| peer.underlay.is_none() && peer.overlay.is_none())
        .map(|(ip, _)| ip)
        .collect();
    let silent = total - count - dead.len();
    if !dead.is_empty() {
        return Finding::fail(
            NAME,
            format!(
                "{} of {total} peers do not answer: {}{more}",
                dead.len(),
                few(&dead)
            ),
            "is the node up, and is its PublicIP reachable from here (ip route get, security groups)? If it left for good, delete its lease",
        );
    }
    let silent = match silent {
        0 => String::new(),
        silent => format!("; {silent} answer only through the overlay"),
    };
    Finding::ok(
        NAME,
        format!("{count} of {total} peers answer{slow}{silent}{more}"),
    )
}

fn through(seen: &Observations) -> Finding {
    const NAME: &str = "overlay";
    let probes = match probes(seen) {
        Ok(probes) => probes,
        Err(why) => return Finding::skip(NAME, why),
    };
    if seen.overlay.device.is_none() {
        return Finding::skip(NAME, format!("there is no {}", seen.overlay.name));
    }
    let alive: Vec<(&Ipv4Addr, &PeerProbe)> = probes
        .peers
        .iter()
        .filter(|(_, peer)| peer.underlay.is_some() || peer.overlay.is_some())
        .collect();
    if alive.is_empty() {
        return Finding::skip(NAME, "no peer answers at the underlay");
    }
    let deaf: Vec<&Ipv4Addr> = alive
        .iter()
        .filter(|(_, peer)| peer.overlay.is_none())
        .map(|(ip, _)| *ip)
        .collect();
    let slow = slowest(alive.iter().filter_map(|(_, peer)| peer.overlay));
    if deaf.is_empty() {
        return Finding::ok(
            NAME,
            format!(
                "{0} of {0} reachable peers answer{slow}{1}",
                alive.len(),
                unfinished(probes)
            ),
        );
    }
    let port = seen.port();
    Finding::fail(
        NAME,
        format!(
            "{} of {} reachable peers do not answer through the overlay: {}",
            deaf.len(),
            alive.len(),
            few(&deaf)
        ),
        format!(
            "let UDP port {port} pass between the nodes in both directions (firewalls, security groups; VMware NSX takes 8472 for itself: set another Port), and run flannel-agent check there"
        ),
    )
}

fn path_mtu(seen: &Observations) -> Finding {
    const NAME: &str = "path-mtu";
    let probes = match probes(seen) {
        Ok(probes) => probes,
        Err(why) => return Finding::skip(NAME, why),
    };
    let Some(device) = &seen.overlay.device else {
        return Finding::skip(NAME, format!("there is no {}", seen.overlay.name));
    };
    let measured: Vec<(&Ipv4Addr, u32)> = probes
        .peers
        .iter()
        .filter_map(|(ip, peer)| Some((ip, peer.passes?)))
        .collect();
    if measured.is_empty() {
        return Finding::skip(NAME, "no peer answers through the overlay");
    }
    let narrow: Vec<String> = measured
        .iter()
        .filter(|(_, size)| *size < device.mtu)
        .map(|(ip, size)| format!("{ip} {size}"))
        .collect();
    let Some(least) = measured
        .iter()
        .map(|(_, size)| *size)
        .min()
        .filter(|_| !narrow.is_empty())
    else {
        return Finding::ok(
            NAME,
            format!(
                "packets of {} bytes pass to {} peers",
                device.mtu,
                measured.len()
            ),
        );
    };
    let underlay = least.saturating_add(OVERHEAD_V4);
    Finding::fail(
        NAME,
        format!(
            "packets of {} bytes do not pass to {} of {} peers; the largest that do: {}",
            device.mtu,
            narrow.len(),
            measured.len(),
            few(&narrow)
        ),
        format!(
            "the path carries {underlay} bytes: mend it, or set \"Backend\":{{\"MTU\":{underlay}}} in the network configuration and restart agents and pods"
        ),
    )
}
