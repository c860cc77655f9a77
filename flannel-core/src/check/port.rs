//! Who has the UDP port of the overlay.

use super::{Finding, Observations, encrypted};
use crate::{config::BackendKind, plan::ObservedKind};

/// UDP sockets and vxlan devices of this network namespace.
#[derive(Clone, Debug, Default)]
pub struct Sockets {
    /// Sockets bound to a port.
    pub udp: Vec<UdpSocket>,
    /// vxlan devices other than ours.
    pub vxlan: Vec<OtherVxlan>,
}

/// A bound UDP socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UdpSocket {
    /// Whether it is one that IPv4 packets may go to: an IPv4 socket, or an IPv6 socket bound to no address.
    pub takes_v4: bool,
    /// Local port.
    pub port: u16,
    /// Whose it is.
    pub owner: Owner,
}

/// Whose a socket is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A process.
    Process {
        /// Its number.
        pid: u32,
        /// Its name.
        name: String,
    },
    /// No process that can be seen has it: the kernel's own, or a process in another container.
    Unknown,
}

/// A vxlan device that is none of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtherVxlan {
    /// Interface.
    pub name: String,
    /// Network identifier.
    pub vni: u32,
    /// UDP port.
    pub port: u16,
    /// Whether it takes packets of every identifier, as other overlays' devices do.
    pub external: bool,
}

pub(super) fn judge(seen: &Observations) -> Finding {
    const NAME: &str = "port";
    let port = seen.port();
    match seen.backend() {
        BackendKind::Vxlan => {}
        BackendKind::Wireguard => return encrypted::port(NAME, seen, port),
        BackendKind::HostGw | BackendKind::Alloc => {
            return Finding::skip(NAME, "the backend uses no UDP port");
        }
    }
    let conf = seen.store.conf();
    let vni = conf.as_ref().map_or(1, |conf| conf.backend.vxlan.vni.get());
    let sockets = &seen.sockets;
    let ours = &seen.overlay.name;
    if let Some(other) = sockets
        .vxlan
        .iter()
        .find(|other| other.vni == vni && other.port == port)
    {
        return Finding::fail(
            NAME,
            format!(
                "{} is a vxlan device with VNI {vni} on port {port}, as {ours} is to be: the kernel permits one",
                other.name
            ),
            format!(
                "ip link del {}, or set another VNI or Port in the network configuration",
                other.name
            ),
        );
    }
    let shares: Vec<&str> = sockets
        .vxlan
        .iter()
        .filter(|other| other.port == port)
        .map(|other| other.name.as_str())
        .collect();
    let is_vxlan_up = seen.overlay.device.as_ref().is_some_and(|device| {
        device.up && matches!(device.kind, ObservedKind::Vxlan { port: has, .. } if has == port)
    });
    if let Some(other) = sockets
        .vxlan
        .iter()
        .find(|other| other.external && other.port == port)
    {
        return Finding::fail(
            NAME,
            format!(
                "{} has UDP port {port} for all VNIs, as Cilium's device does: {ours} cannot be set up beside it",
                other.name
            ),
            format!(
                "remove what made {}, or set another Port in the network configuration of all nodes",
                other.name
            ),
        );
    }
    let at_port: Vec<&UdpSocket> = sockets
        .udp
        .iter()
        .filter(|socket| socket.port == port && socket.takes_v4)
        .collect();
    let foreign = at_port.iter().find(|socket| match &socket.owner {
        // eBPF alone has a socket of the agent's for fragments.
        Owner::Process { pid, .. } => seen.agent.pid != Some(*pid),
        Owner::Unknown => !is_vxlan_up && shares.is_empty(),
    });
    if let Some(socket) = foreign {
        let who = match &socket.owner {
            Owner::Process { pid, name } => format!("{name}, pid {pid}"),
            Owner::Unknown => "the kernel or a process that cannot be seen from here".into(),
        };
        return Finding::fail(
            NAME,
            format!("UDP port {port} belongs to {who}: {ours} hears nothing"),
            "stop that program, or set another Port in the network configuration of all nodes",
        );
    }
    match (is_vxlan_up, at_port.is_empty()) {
        (true, false) if shares.is_empty() => {
            Finding::ok(NAME, format!("UDP port {port} belongs to {ours}"))
        }
        (true, false) => Finding::ok(
            NAME,
            format!(
                "UDP port {port} belongs to {ours}, and to {} with another VNI",
                shares.join(", ")
            ),
        ),
        (true, true) => Finding::fail(
            NAME,
            format!("{ours} is up without a socket on UDP port {port}"),
            format!("ip link set {ours} down, then up, and see dmesg"),
        ),
        (false, false) if shares.is_empty() => Finding::ok(
            NAME,
            format!("UDP port {port} belongs to the agent, for packets in fragments"),
        ),
        (false, false) => Finding::ok(
            NAME,
            format!(
                "UDP port {port} is shared with {}, which has another VNI",
                shares.join(", ")
            ),
        ),
        (false, true) => Finding::ok(NAME, format!("UDP port {port} is free")),
    }
}
