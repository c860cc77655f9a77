//! Which mode of the flow gate this node can keep correct, and why.
//!
//! Signals in, a [`Decision`] out. Whoever reads the signals lives in the agent; nothing here asks the kernel, and nothing here
//! ever guesses in favour of speed: what cannot be known counts against the fast path.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::addr::IfIndex;
use crate::plan::GateMode;

pub mod devices;
mod digest;
pub mod firewall;
pub mod iptables;
pub mod learning;
pub mod nft;
mod settle;

pub use devices::Device;
use digest::Digest;
pub use firewall::{Firewall, Place};
pub use settle::{QUIET, Settled};

/// What `--bpf-fast-path` and the key `BpfFastPath` ask for.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Choice {
    /// The witness gate where it can be kept correct, else none.
    #[default]
    Auto,
    /// Every packet through the stack.
    Off,
    /// The witness gate, also where something per packet in the stack would see less than it does now.
    Established,
    /// Admission at the first SYN, where nothing on the node filters pod traffic.
    Syn,
}

impl Choice {
    /// Every choice.
    pub const ALL: [Self; 4] = [Self::Auto, Self::Off, Self::Established, Self::Syn];

    /// The word on the command line and in the network configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Off => "off",
            Self::Established => "established",
            Self::Syn => "syn",
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Choice {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|choice| choice.as_str() == text)
            .ok_or("write auto, off, established or syn")
    }
}

/// How the gate is to stand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The mode of the whole node.
    pub mode: GateMode,
    /// Why this mode, in words.
    pub reason: String,
    /// Pod veths that stay with the stack whatever the mode, and why.
    pub excluded: BTreeMap<IfIndex, String>,
    /// The devices that were looked at: a pod veth that is not among them waits. `None` if none could be, and that does not matter.
    pub judged: Option<BTreeSet<IfIndex>>,
    /// Digest of everything on the node that filters or translates; another value means that flows must prove themselves again.
    pub fingerprint: u64,
}

impl Decision {
    /// Whether a pod veth stays with the stack: for good, or until it was looked at.
    pub fn holds_back(&self, veth: IfIndex) -> bool {
        let judged = self.judged.as_ref();
        self.excluded.contains_key(&veth) || judged.is_some_and(|judged| !judged.contains(&veth))
    }
}

/// A kernel setting of connection tracking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sysctl {
    /// Its name below `net.netfilter`.
    pub name: &'static str,
    /// What was read back; `None` where it could not be read.
    pub value: Option<u32>,
    /// Why it could not be read or written.
    pub error: Option<String>,
}

/// The settings that the gate depends on, all of this network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sysctls {
    /// Whether connections are tracked at all; without that the settings do not exist, and are not needed.
    pub tracking: bool,
    /// `nf_conntrack_tcp_be_liberal`, wanted at 1: bytes that went around the stack are no reason to call a packet invalid.
    pub be_liberal: Sysctl,
    /// `nf_conntrack_tcp_ignore_invalid_rst`, wanted at 1: the same for a reset after two gigabytes.
    pub ignore_invalid_rst: Sysctl,
    /// `nf_conntrack_tcp_loose`, only read: at 0 a connection that tracking does not know is not picked up.
    pub loose: Sysctl,
}

impl Sysctls {
    /// In the order in which they are shown.
    pub const fn all(&self) -> [&Sysctl; 3] {
        [&self.be_liberal, &self.ignore_invalid_rst, &self.loose]
    }

    /// The first that must be 1 and is not.
    fn obstacle(&self) -> Option<String> {
        if !self.tracking {
            return None;
        }
        let wanted = [&self.be_liberal, &self.ignore_invalid_rst];
        let sysctl = wanted.into_iter().find(|sysctl| sysctl.value != Some(1))?;
        let value = match sysctl.value {
            Some(value) => format!("is {value}"),
            None => "is not readable".to_owned(),
        };
        let why = match &sysctl.error {
            Some(error) => format!(" and cannot be set: {error}"),
            None => String::new(),
        };
        Some(format!(
            "net.netfilter.{} {value}{why}; it must be 1",
            sysctl.name
        ))
    }

    fn is_strict(&self) -> bool {
        self.tracking && self.loose.value != Some(1)
    }
}

/// Everything that the decision is made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signals {
    /// Why the programs of the fast path cannot run here at all.
    pub unsupported: Option<String>,
    /// Where pods are.
    pub place: Place,
    /// The kernel's settings, after an attempt to set them.
    pub sysctls: Sysctls,
    /// The packet filter's rules.
    pub firewall: Firewall,
    /// Traffic control on the devices of pods, the tunnel device and bridges.
    pub devices: BTreeMap<IfIndex, Device>,
    /// What there is and could not be looked at, one line each.
    pub unreadable: Vec<String>,
}

/// Decides how the gate is to stand.
///
/// What makes wrong packets, settings above all, beats every choice. What would merely see fewer packets than it does now
/// (quotas, accounting, shaping on a device that all pods share), or cannot be looked at, stops `auto` and `syn`, and not an
/// explicit `established`.
pub fn decide(choice: Choice, signals: &Signals) -> Decision {
    let judged = signals.firewall.judge(&signals.place);
    let found = devices::judge(&signals.devices);
    let mut digest = Digest::default();
    digest.text(&judged.digest.to_string());
    let others = signals.unreadable.iter().chain(&found.doubts);
    others
        .chain(&found.programs)
        .for_each(|line| digest.text(line));
    let fingerprint = digest.value();
    let off = |reason: String| Decision {
        mode: GateMode::Off,
        reason,
        excluded: BTreeMap::new(),
        judged: None,
        fingerprint,
    };
    if choice == Choice::Off {
        return off("switched off".to_owned());
    }
    if let Some(reason) = &signals.unsupported {
        return off(reason.clone());
    }
    if let Some(reason) = signals.sysctls.obstacle() {
        return off(reason);
    }
    let doubts: Vec<&String> = judged
        .per_packet
        .iter()
        .chain(&found.doubts)
        .chain(&signals.unreadable)
        .collect();
    if !doubts.is_empty() && choice != Choice::Established {
        let asked = match choice {
            Choice::Syn => "syn was asked for, but ",
            Choice::Auto | Choice::Off | Choice::Established => "",
        };
        return off(format!("{asked}{}", summary(&doubts)));
    }
    let on = |mode, reason| Decision {
        mode,
        reason,
        excluded: found.excluded.clone(),
        judged: signals
            .unreadable
            .is_empty()
            .then(|| signals.devices.keys().copied().collect()),
        fingerprint,
    };
    let mut reason = if doubts.is_empty() {
        match choice {
            Choice::Auto => "nothing on this node needs to see every packet".to_owned(),
            Choice::Off | Choice::Established | Choice::Syn => "asked for".to_owned(),
        }
    } else {
        format!("asked for, although {}", summary(&doubts))
    };
    let strict = "net.netfilter.nf_conntrack_tcp_loose is not 1".to_owned();
    if choice == Choice::Syn {
        let filters = judged.filters.iter().chain(&found.programs);
        let strict = signals.sysctls.is_strict().then_some(&strict);
        let refusals: Vec<&String> = filters.chain(strict).collect();
        if refusals.is_empty() {
            return on(GateMode::Syn, reason);
        }
        reason = format!("syn was asked for, but {}", summary(&refusals));
    } else if signals.sysctls.is_strict() {
        reason = format!(
            "{reason}; {strict}: connections that tracking forgets are lost, with or without the fast path"
        );
    }
    on(GateMode::Established, reason)
}

/// The first of the findings, and how many there are beside it.
fn summary(findings: &[&String]) -> String {
    match findings {
        [] => String::new(),
        [one] => (*one).clone(),
        [first, rest @ ..] => format!("{first} (and {} more)", rest.len()),
    }
}

#[cfg(test)]
mod tests;
