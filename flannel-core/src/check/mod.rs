//! `flannel-agent check`: what is wrong with a node, judged from what was seen of it.
//!
//! Every check is a function from [`Observations`] to a [`Finding`]. Nothing here looks at anything by itself, and a check whose
//! question cannot be answered says why instead of staying silent.

mod agent;
mod cert;
mod encrypted;
mod filter;
mod firewall;
mod iptables;
mod mtu;
mod network;
mod nft;
mod node;
mod overlay;
mod peers;
mod port;
mod store;
mod subnet_file;

use serde::Serialize;

use crate::{
    addr::Family,
    config::{BackendKind, DEFAULT_PORT, WireguardMode},
    plan::ObservedKind,
};

pub use agent::Agent;
pub use cert::{Certificate, validity};
pub use encrypted::Encrypted;
pub use firewall::Rules;
pub use network::{Network, UplinkSeen};
pub use node::{Bpffs, Capabilities, Clock, Manager, Node, Reverse, ReverseFilter, Vxlan, Wants};
pub use overlay::{Attached, Bridge, Offload, Overlay};
pub use peers::{PeerProbe, Probes, targets};
pub use port::{OtherVxlan, Owner, Sockets, UdpSocket};
pub use store::{StoreSeen, StoreTrouble};
pub use subnet_file::SubnetFile;

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Works, and somebody should look.
    Warn,
    /// Pods of this node cannot talk, or will not be able to.
    Fail,
    /// The question does not arise.
    Skip,
}

impl Status {
    /// As printed.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::Warn => "WARN",
            Self::Fail => "FAIL",
            Self::Skip => "SKIP",
        }
    }
}

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Name of the check.
    pub name: &'static str,
    /// How it ended.
    pub status: Status,
    /// What was found, with the value, on one line.
    pub found: String,
    /// What to do about it; there for WARN and FAIL.
    pub fix: Option<String>,
}

impl Finding {
    pub(crate) fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self::new(name, Status::Ok, found.into(), None)
    }

    pub(crate) fn skip(name: &'static str, why: impl Into<String>) -> Self {
        Self::new(name, Status::Skip, why.into(), None)
    }

    pub(crate) fn warn(
        name: &'static str,
        found: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self::new(name, Status::Warn, found.into(), Some(fix.into()))
    }

    pub(crate) fn fail(
        name: &'static str,
        found: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self::new(name, Status::Fail, found.into(), Some(fix.into()))
    }

    fn new(name: &'static str, status: Status, found: String, fix: Option<String>) -> Self {
        Self {
            name,
            status,
            found,
            fix,
        }
    }
}

/// How many checks ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// As they should be.
    pub ok: usize,
    /// To look at.
    pub warn: usize,
    /// Broken.
    pub fail: usize,
    /// Not to be answered.
    pub skip: usize,
}

/// All findings, in a fixed order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// One per check.
    pub checks: Vec<Finding>,
    /// Their count.
    pub summary: Summary,
}

impl Report {
    /// Counts the findings.
    pub fn new(checks: Vec<Finding>) -> Self {
        let count = |status| checks.iter().filter(|one| one.status == status).count();
        let summary = Summary {
            ok: count(Status::Ok),
            warn: count(Status::Warn),
            fail: count(Status::Fail),
            skip: count(Status::Skip),
        };
        Self { checks, summary }
    }
}

/// Everything that was seen of a node.
#[derive(Clone, Debug)]
pub struct Observations {
    /// Kernel, privileges and settings.
    pub node: Node,
    /// The daemon.
    pub agent: Agent,
    /// Interfaces and routes.
    pub network: Network,
    /// The lease store.
    pub store: StoreSeen,
    /// The tunnel device, and what belongs to it.
    pub overlay: Overlay,
    /// UDP sockets and vxlan devices.
    pub sockets: Sockets,
    /// The packet filter's rules for the family of the overlay.
    pub rules: Rules,
    /// The same for IPv6 of a node that has both families.
    pub rules_v6: Option<Rules>,
    /// What became of packets to other nodes; `None` when none were to be sent.
    pub probes: Option<Probes>,
    /// The overlay of IPv6 of a node that has one of IPv4 too.
    pub second: Option<Second>,
}

/// A node's second overlay.
#[derive(Clone, Debug)]
pub struct Second {
    /// What the agent says of it: mode, reason, problems.
    pub agent: Agent,
    /// The tunnel device, and what belongs to it.
    pub overlay: Overlay,
    /// What became of packets to other nodes.
    pub probes: Option<Probes>,
}

impl Observations {
    /// How packets travel between nodes: as configured, else as the agent has it, else the usual way.
    fn backend(&self) -> BackendKind {
        let configured = self.store.conf().map(|conf| conf.backend.kind);
        let kind = configured.or(self.agent.backend);
        kind.unwrap_or(BackendKind::Vxlan)
    }

    /// Whether there is a tunnel device of the kernel's or ours that VXLAN uses; else why not.
    fn tunnelled(&self) -> Result<(), String> {
        match self.backend() {
            BackendKind::Vxlan => Ok(()),
            kind => Err(format!("backend {kind}: there is no VXLAN device")),
        }
    }

    /// MTU of the device that packets to other nodes go through, in bytes.
    pub fn device_mtu(&self) -> Option<u32> {
        let encrypted = self.overlay.encrypted.iter();
        let encrypted = encrypted.filter(|device| device.up.is_ok());
        let encrypted = encrypted.map(|device| device.mtu);
        let device = self.overlay.device.as_ref().map(|device| device.mtu);
        device.or_else(|| encrypted.min())
    }

    /// The node as its second overlay alone has it.
    fn of_second(&self) -> Option<Self> {
        let second = self.second.as_ref()?;
        Some(Self {
            agent: second.agent.clone(),
            overlay: second.overlay.clone(),
            probes: second.probes.clone(),
            second: None,
            ..self.clone()
        })
    }

    /// The node as the rules for its second family concern it.
    fn of_rules_v6(&self) -> Option<Self> {
        let rules = self.rules_v6.clone()?;
        // With wireguard and alloc there is no second overlay.
        let mut other = self.of_second().unwrap_or_else(|| self.clone());
        other.overlay.family = Family::V6;
        other.rules = rules;
        other.rules_v6 = None;
        Some(other)
    }

    /// The UDP port of the overlay: as configured, else as the device has it, else the usual one.
    fn port(&self) -> u16 {
        let configured = self.store.conf().map(|conf| match conf.backend.kind {
            BackendKind::Wireguard => {
                let wireguard = &conf.backend.wireguard;
                match (wireguard.mode, self.overlay.family) {
                    (WireguardMode::Separate, Family::V6) => wireguard.port_v6,
                    _ => wireguard.port,
                }
            }
            BackendKind::Vxlan | BackendKind::HostGw | BackendKind::Alloc => {
                conf.backend.vxlan.port
            }
        });
        let device = self.overlay.device.as_ref();
        configured
            .or(match device.map(|device| &device.kind) {
                Some(ObservedKind::Vxlan { port, .. }) => Some(*port),
                _ => None,
            })
            .unwrap_or(DEFAULT_PORT)
    }
}

/// Judges everything.
pub fn judge(seen: &Observations) -> Report {
    let mut findings = node::judge(seen);
    findings.extend(network::judge(seen));
    findings.extend(store::judge(seen));
    findings.extend(overlay::judge(seen));
    findings.push(port::judge(seen));
    findings.extend(firewall::judge(seen));
    findings.extend(peers::judge(seen));
    let (second, rules) = (seen.of_second(), seen.of_rules_v6());
    let mut both = second.as_ref().map_or_else(Vec::new, overlay::judge);
    both.extend(rules.as_ref().map_or_else(Vec::new, firewall::judge));
    both.extend(second.as_ref().map_or_else(Vec::new, peers::judge));
    findings.extend(both.into_iter().filter_map(|finding| {
        let name = second_name(finding.name)?;
        Some(Finding { name, ..finding })
    }));
    Report::new(findings)
}

/// The name of a check of the second overlay; `None` for what is the node's.
fn second_name(name: &str) -> Option<&'static str> {
    Some(match name {
        "subnet-file" => "subnet-file-v6",
        "device" => "device-v6",
        "peer-entries" => "peer-entries-v6",
        "datapath" => "datapath-v6",
        "bridge" => "bridge-v6",
        "mtu" => "mtu-v6",
        "firewall-input" => "firewall-input-v6",
        "firewall-forward" => "firewall-forward-v6",
        "underlay" => "underlay-v6",
        "overlay" => "overlay-v6",
        "path-mtu" => "path-mtu-v6",
        _ => return None,
    })
}

/// The first few of a list, and how many more there are.
pub(crate) fn few<T: std::fmt::Display>(items: impl IntoIterator<Item = T>) -> String {
    const SHOWN: usize = 5;
    let all: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    let shown = all.iter().take(SHOWN).cloned().collect::<Vec<_>>();
    match all.len().checked_sub(SHOWN) {
        None | Some(0) => shown.join(", "),
        Some(more) => format!("{} and {more} more", shown.join(", ")),
    }
}

#[cfg(test)]
mod tests;
