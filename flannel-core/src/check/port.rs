//! Who has the UDP port of the overlay.

use std::net::Ipv4Addr;

use super::{Finding, Observations};
use crate::{config::DEFAULT_PORT, plan::ObservedKind};

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
    /// Local address; `None` for an IPv6 socket.
    pub local: Option<Ipv4Addr>,
    /// Local port.
    pub port: u16,
    /// Whose it is.
    pub owner: Owner,
}

/// Whose a socket is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The kernel's, for a tunnel device.
    Kernel,
    /// A process.
    Process {
        /// Its number.
        pid: u32,
        /// Its name.
        name: String,
    },
    /// A process that this one may not see.
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
}

pub(super) fn judge(seen: &Observations) -> Finding {
    const NAME: &str = "port";
    let conf = seen.store.conf();
    let port = conf
        .as_ref()
        .map_or(DEFAULT_PORT, |conf| conf.backend.vxlan.port);
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
    let at_port = |socket: &&UdpSocket| socket.port == port && socket.local.is_some();
    let foreign = sockets
        .udp
        .iter()
        .filter(at_port)
        .find(|socket| match &socket.owner {
            Owner::Kernel => false,
            // eBPF alone has a socket of the agent's for fragments.
            Owner::Process { pid, .. } => seen.agent.pid != Some(*pid),
            Owner::Unknown => true,
        });
    if let Some(socket) = foreign {
        let who = match &socket.owner {
            Owner::Process { pid, name } => format!("{name}, pid {pid}"),
            Owner::Kernel | Owner::Unknown => "a process that cannot be seen from here".into(),
        };
        return Finding::fail(
            NAME,
            format!("UDP port {port} belongs to {who}: {ours} hears nothing"),
            "stop that program, or set another Port in the network configuration of all nodes",
        );
    }
    let has_kernel = sockets
        .udp
        .iter()
        .filter(at_port)
        .any(|socket| socket.owner == Owner::Kernel);
    let shares: Vec<&str> = sockets
        .vxlan
        .iter()
        .filter(|other| other.port == port)
        .map(|other| other.name.as_str())
        .collect();
    let is_vxlan_up = seen.overlay.device.as_ref().is_some_and(|device| {
        device.up && matches!(device.kind, ObservedKind::Vxlan { port: has, .. } if has == port)
    });
    match (is_vxlan_up, has_kernel) {
        (true, true) if shares.is_empty() => {
            Finding::ok(NAME, format!("UDP port {port} belongs to {ours}"))
        }
        (true, true) => Finding::ok(
            NAME,
            format!(
                "UDP port {port} belongs to {ours}, and to {} with another VNI",
                shares.join(", ")
            ),
        ),
        (true, false) => Finding::fail(
            NAME,
            format!("{ours} is up without its socket on UDP port {port}"),
            format!("ip link set {ours} down, then up, and see dmesg"),
        ),
        (false, true) if shares.is_empty() => Finding::ok(
            NAME,
            format!("UDP port {port} belongs to a tunnel device of the kernel"),
        ),
        (false, true) => Finding::ok(
            NAME,
            format!(
                "UDP port {port} is shared with {}, which has another VNI",
                shares.join(", ")
            ),
        ),
        (false, false) => Finding::ok(NAME, format!("UDP port {port} is free")),
    }
}
