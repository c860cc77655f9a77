//! Packets to other nodes: what became of them.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use super::{Finding, Observations, few, mtu, overlay::NOBODY};
use crate::{
    config::BackendKind,
    lease::{LeaseAttrs, SubnetKey},
    plan::peers_of,
};

/// What became of packets to other nodes.
#[derive(Clone, Debug, Default)]
pub struct Probes {
    /// By public address.
    pub peers: BTreeMap<IpAddr, PeerProbe>,
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
pub fn targets(seen: &Observations) -> BTreeMap<IpAddr, IpAddr> {
    let own = seen.store.own(seen).map_or(NOBODY, |(key, _)| *key);
    let Some(leases) = seen.store.list() else {
        return programmed(seen);
    };
    let (kind, family) = (seen.backend(), seen.overlay.family);
    if kind == BackendKind::Wireguard {
        // Which way the kernel goes is its business: all that is asked for is the node itself.
        let others = leases
            .iter()
            .filter(|(key, attrs)| **key != own && attrs.backend_type == kind.lease_type());
        let peer = |(key, attrs): (&SubnetKey, &LeaseAttrs)| {
            Some((attrs.public(family)?, key.subnet(family)?.network()))
        };
        return others.filter_map(peer).collect();
    }
    let peers = peers_of(leases, &own, family, kind).0.into_iter();
    peers
        .map(|(subnet, peer)| (peer.vtep, subnet.network()))
        .collect()
}

/// The peers that the tunnel device knows, for when the store does not answer.
fn programmed(seen: &Observations) -> BTreeMap<IpAddr, IpAddr> {
    let Some(device) = &seen.overlay.device else {
        return BTreeMap::new();
    };
    let peer = |base: &IpAddr| {
        let vtep = device.fdb.get(device.neighbours.get(base)?)?;
        Some((*vtep, *base))
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

/// Why nothing is asked for through the overlay.
fn no_device(seen: &Observations) -> String {
    match seen.tunnelled() {
        Ok(()) => format!("there is no {}", seen.overlay.name),
        Err(why) => format!("{why} that would answer at the other end"),
    }
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
    let dead: Vec<&IpAddr> = probes
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
    if seen.device_mtu().is_none() {
        return Finding::skip(NAME, no_device(seen));
    }
    let alive: Vec<(&IpAddr, &PeerProbe)> = probes
        .peers
        .iter()
        .filter(|(_, peer)| peer.underlay.is_some() || peer.overlay.is_some())
        .collect();
    if alive.is_empty() {
        return Finding::skip(NAME, "no peer answers at the underlay");
    }
    let deaf: Vec<&IpAddr> = alive
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
    let Some(mtu) = seen.device_mtu() else {
        return Finding::skip(NAME, no_device(seen));
    };
    let measured: Vec<(&IpAddr, u32)> = probes
        .peers
        .iter()
        .filter_map(|(ip, peer)| Some((ip, peer.passes?)))
        .collect();
    if measured.is_empty() {
        return Finding::skip(NAME, "no peer answers through the overlay");
    }
    let narrow: Vec<String> = measured
        .iter()
        .filter(|(_, size)| *size < mtu)
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
            format!("packets of {mtu} bytes pass to {} peers", measured.len()),
        );
    };
    let underlay = least.saturating_add(mtu::overhead(seen));
    Finding::fail(
        NAME,
        format!(
            "packets of {mtu} bytes do not pass to {} of {} peers; the largest that do: {}",
            narrow.len(),
            measured.len(),
            few(&narrow)
        ),
        format!(
            "the path carries {underlay} bytes: mend it, or set \"Backend\":{{\"MTU\":{underlay}}} in the network configuration and restart agents and pods"
        ),
    )
}
