//! What traffic control does on the devices of pods, and on those that their packets pass.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::addr::IfIndex;

/// What a device is to packets between pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Role {
    /// The host's end of a pod's veth pair.
    Pod,
    /// Every pod's packets pass it: the tunnel device, a bridge.
    Shared,
}

/// Traffic control of others on one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// What it is.
    pub role: Role,
    /// Kinds of its queueing disciplines, `clsact` and `ingress` among them.
    pub qdiscs: Vec<String>,
    /// Filters that are not ours: `ingress bpf`, `egress u32`, and so on.
    pub filters: Vec<Filter>,
    /// Programs on tcx that are not ours: side and name.
    pub programs: Vec<String>,
    /// What of it could not be read.
    pub unreadable: Option<String>,
}

/// One filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// `ingress` or `egress`.
    pub side: &'static str,
    /// `bpf`, `u32`, `flower`, `matchall`, and so on.
    pub kind: String,
    /// Whether its program alone decides (`direct-action`), without actions such as police or mirred.
    pub direct: bool,
}

/// What it all means.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// Pods that the fast path would take something from.
    pub(super) excluded: BTreeMap<IfIndex, String>,
    /// The same on a device that all pods share.
    pub(super) doubts: Vec<String>,
    /// Programs of others, which may filter.
    pub(super) programs: Vec<String>,
}

/// Queueing disciplines that neither shape nor divide: a packet that does not pass them loses nothing.
const GENTLE: [&str; 10] = [
    "noqueue",
    "pfifo_fast",
    "pfifo",
    "bfifo",
    "fq",
    "fq_codel",
    "codel",
    "mq",
    "clsact",
    "ingress",
];

impl Device {
    /// What passes here and would not see a packet that goes around the stack.
    fn shaper(&self) -> Option<String> {
        let name = &self.name;
        if let Some(error) = &self.unreadable {
            return Some(format!("traffic control of {name} cannot be read: {error}"));
        }
        if let Some(kind) = self
            .qdiscs
            .iter()
            .find(|kind| !GENTLE.contains(&kind.as_str()))
        {
            return Some(format!("qdisc {kind} on {name}"));
        }
        let filter = self
            .filters
            .iter()
            .find(|filter| filter.kind != "bpf" || !filter.direct)?;
        Some(format!(
            "{} filter {} on {name}, which may police or redirect",
            filter.side, filter.kind
        ))
    }

    /// Programs of others that run here.
    pub fn foreign_programs(&self) -> impl Iterator<Item = String> {
        let filters = self
            .filters
            .iter()
            .filter(|filter| filter.kind == "bpf" && filter.direct)
            .map(|filter| format!("clsact program at {} of {}", filter.side, self.name));
        let tcx = self
            .programs
            .iter()
            .map(|program| format!("tcx program {program} of {}", self.name));
        filters.chain(tcx)
    }
}

pub(super) fn judge(devices: &BTreeMap<IfIndex, Device>) -> Found {
    let mut found = Found::default();
    for (index, device) in devices {
        match (device.shaper(), device.role) {
            (Some(shaper), Role::Pod) => {
                found.excluded.insert(*index, shaper);
            }
            (Some(shaper), Role::Shared) => found.doubts.push(shaper),
            (None, _) => {}
        }
        found.programs.extend(device.foreign_programs());
    }
    found
}
