//! The kernel's wireguard devices.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::{Finding, Observations, Overlay, Owner, few};
use crate::{addr::Family, config::BackendKind, lease::SubnetKey};

/// A wireguard device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encrypted {
    /// Its name.
    pub name: String,
    /// MTU in bytes; 0 where there is no such device.
    pub mtu: u32,
    /// Whether it is there, of the right kind, and up; else what is wrong.
    pub up: Result<(), String>,
    /// What its peers may send; the error says why that is not known.
    pub allowed: Result<BTreeSet<IpNet>, String>,
}

/// That they are there.
pub(super) fn device(name: &'static str, overlay: &Overlay) -> Finding {
    const FIX: &str = "start the agent, which makes and sets up its wireguard devices";
    let wrong = overlay.encrypted.iter().filter_map(|device| {
        let error = device.up.as_ref().err()?;
        Some(format!("{} {error}", device.name))
    });
    let wrong: Vec<String> = wrong.collect();
    if overlay.encrypted.is_empty() {
        return Finding::skip(name, "no agent has made wireguard devices here");
    }
    if !wrong.is_empty() {
        return Finding::fail(name, few(&wrong), FIX);
    }
    let there = overlay.encrypted.iter();
    let there: Vec<String> = there
        .map(|device| format!("{} is up, MTU {}", device.name, device.mtu))
        .collect();
    Finding::ok(name, few(&there))
}

/// Their peers, held against the list of leases.
pub(super) fn entries(name: &'static str, seen: &Observations, own: &SubnetKey) -> Finding {
    let mut allowed = BTreeSet::new();
    for device in &seen.overlay.encrypted {
        match &device.allowed {
            Ok(nets) => allowed.extend(nets),
            Err(error) => {
                return Finding::skip(name, format!("read the peers of {}: {error}", device.name));
            }
        }
    }
    let leases = seen.store.list().into_iter().flatten();
    let peers = leases.filter(|(key, attrs)| {
        *key != own && attrs.backend_type == BackendKind::Wireguard.lease_type()
    });
    let conf = seen.store.conf();
    let used = |net: &IpNet| {
        let conf = conf.as_ref();
        conf.is_none_or(|conf| conf.families().contains(&Family::of_net(net)))
    };
    let wanted: BTreeSet<IpNet> = peers
        .flat_map(|(key, _)| Family::ALL.into_iter().filter_map(|of| key.subnet(of)))
        .filter(used)
        .collect();
    let missing: Vec<&IpNet> = wanted.difference(&allowed).collect();
    if missing.is_empty() {
        return Finding::ok(
            name,
            format!(
                "the wireguard devices have peers for {} subnets",
                wanted.len()
            ),
        );
    }
    Finding::fail(
        name,
        format!("the wireguard devices have no peer for {}", few(&missing)),
        if seen.agent.pid.is_some() {
            "the agent adds it within seconds; if it does not, its log says why"
        } else {
            "start the agent, which adds it"
        },
    )
}

/// Whether they have the port to themselves: a socket of the kernel's has no process.
pub(super) fn port(name: &'static str, seen: &Observations, port: u16) -> Finding {
    let found = seen
        .sockets
        .udp
        .iter()
        .find_map(|socket| match &socket.owner {
            Owner::Process { pid, name } if socket.port == port => Some((pid, name)),
            Owner::Process { .. } | Owner::Unknown => None,
        });
    match found {
        Some((pid, program)) => Finding::fail(
            name,
            format!("UDP port {port} belongs to {program}, pid {pid}: WireGuard hears nothing"),
            "stop that program, or set another ListenPort in the network configuration of all nodes",
        ),
        None => Finding::ok(name, format!("UDP port {port} is WireGuard's")),
    }
}
