//! `flannel-agent check`: what is wrong with a node, judged from what was seen of it.
//!
//! Every check is a function from [`Observations`] to a [`Finding`]. Nothing here looks at anything by itself, and a check whose
//! question cannot be answered says why instead of staying silent.

mod agent;
mod cert;
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

use serde::Serialize;

use crate::{config::DEFAULT_PORT, plan::ObservedKind};

pub use agent::Agent;
pub use cert::{Certificate, validity};
pub use firewall::Rules;
pub use network::{Network, UplinkSeen};
pub use node::{Bpffs, Capabilities, Clock, Manager, Node, Reverse, ReverseFilter, Vxlan, Wants};
pub use overlay::{Attached, Bridge, Offload, Overlay, SubnetFile};
pub use peers::{PeerProbe, Probes, targets};
pub use port::{OtherVxlan, Owner, Sockets, UdpSocket};
pub use store::{StoreSeen, StoreTrouble};

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
    /// The packet filter's rules.
    pub rules: Rules,
    /// What became of packets to other nodes; `None` when none were to be sent.
    pub probes: Option<Probes>,
}

impl Observations {
    /// The UDP port of the overlay: as configured, else as the device has it, else the usual one.
    fn port(&self) -> u16 {
        let configured = self.store.conf().map(|conf| conf.backend.vxlan.port);
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
    Report::new(findings)
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
