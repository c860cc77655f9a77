//! From findings to the rung, and for every rung out of reach one sentence why.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

use super::{Feature, Findings};
use crate::{check::Wants, fastpath, plan::GateMode, xdp};

/// The ways to carry a packet, from the plainest to the fastest. Each stands on those below it, but for the kernel's, which eBPF can do
/// without.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Rung {
    /// L0: the kernel's device alone.
    #[serde(rename = "L0")]
    Kernel,
    /// L1: eBPF around the host's stack.
    #[serde(rename = "L1")]
    Stack,
    /// L2: past the stack for flows that it has passed untouched.
    #[serde(rename = "L2")]
    Established,
    /// L3: past the stack from the first SYN.
    #[serde(rename = "L3")]
    Syn,
    /// L4: outer headers off in native XDP.
    #[serde(rename = "L4")]
    Xdp,
}

impl Rung {
    /// All of them, lowest first.
    pub const ALL: [Self; 5] = [
        Self::Kernel,
        Self::Stack,
        Self::Established,
        Self::Syn,
        Self::Xdp,
    ];

    /// Its short name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Kernel => "L0",
            Self::Stack => "L1",
            Self::Established => "L2",
            Self::Syn => "L3",
            Self::Xdp => "L4",
        }
    }

    /// What runs there.
    pub const fn title(self) -> &'static str {
        match self {
            Self::Kernel => "the kernel's device",
            Self::Stack => "eBPF around the host's stack",
            Self::Established => "eBPF past the stack for flows that it has passed",
            Self::Syn => "eBPF past the stack from the first SYN",
            Self::Xdp => "outer headers off in native XDP",
        }
    }
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How programs are to be attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Attach {
    /// The best that there is.
    #[default]
    Auto,
    /// As tcx links.
    Tcx,
    /// As filters.
    Clsact,
}

/// What the flags ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wishes {
    /// `--datapath`.
    pub datapath: Wants,
    /// `--bpf-attach`.
    pub attach: Attach,
    /// `--bpf-fast-path`, or what the network configuration has.
    pub fast_path: fastpath::Choice,
    /// `--bpf-xdp`.
    pub xdp: xdp::Choice,
}

impl Default for Wishes {
    fn default() -> Self {
        Self {
            datapath: Wants::Auto,
            attach: Attach::Auto,
            fast_path: fastpath::Choice::Auto,
            xdp: xdp::Choice::Auto,
        }
    }
}

/// What came of it on this node, as far as that is known yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Course {
    /// Why the kernel's device is not there, though it could be.
    pub no_kernel: Option<String>,
    /// Why the agent does without eBPF, though the findings allow it: a setting, a program that the verifier refuses.
    pub no_bpf: Option<String>,
    /// The fast path's mode, and why it is this one.
    pub gate: Option<(GateMode, String)>,
    /// Whether native XDP strips packets, or why not.
    pub xdp: Option<Result<(), String>>,
}

/// Which rung is in reach, and why no other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ladder {
    /// The highest one; `None` where a node cannot carry the overlay at all.
    pub rung: Option<Rung>,
    /// One sentence for every rung that is out of reach, or not wanted. Below the highest one that is L0 alone: the kernel's
    /// device, which eBPF can do without.
    pub why_not: BTreeMap<Rung, String>,
}

/// What every program needs. The object is loaded whole, so this has the maps of the fast path too.
const FOR_STACK: [Feature; 19] = [
    Feature::Bpf,
    Feature::Memlock,
    Feature::Bpffs,
    Feature::SchedCls,
    Feature::Array,
    Feature::PerCpuArray,
    Feature::Hash,
    Feature::LruHash,
    Feature::LoadBytes,
    Feature::StoreBytes,
    Feature::PullData,
    Feature::HashRecalc,
    Feature::Random,
    Feature::Clock,
    Feature::CsumLevel,
    Feature::RoomEncap,
    Feature::RoomDecap,
    Feature::Redirect,
    Feature::RedirectNeigh,
];
/// What the fast path needs beyond that.
const FOR_ESTABLISHED: [Feature; 3] = [
    Feature::Processor,
    Feature::ChangeType,
    Feature::RedirectPeer,
];
/// What admission by the SYN needs beyond that.
const FOR_SYN: [Feature; 1] = [Feature::CheckMtu];
/// What native XDP needs beyond eBPF itself.
const FOR_XDP: [Feature; 4] = [
    Feature::Xdp,
    Feature::AdjustHead,
    Feature::AdjustMeta,
    Feature::NativeXdp,
];

/// Finds the rung. What was not tried counts as there: only use will tell, and falling back from there costs no packet.
pub fn climb(findings: &Findings, wishes: &Wishes, course: &Course) -> Ladder {
    let needs = |rung: Rung| Some(format!("needs {rung}"));
    let stack = no_stack(findings, wishes, course);
    let fast = match &stack {
        Some(_) => needs(Rung::Stack),
        None => no_fast_path(findings, wishes, course),
    };
    let above = |own: fn(&Findings, &Wishes, &Course) -> Option<String>| match (&stack, &fast) {
        (Some(_), _) => needs(Rung::Stack),
        (None, Some(_)) => needs(Rung::Established),
        (None, None) => own(findings, wishes, course),
    };
    let (syn, xdp) = (above(no_syn), above(no_xdp));
    let why_not: BTreeMap<Rung, String> = [
        (Rung::Kernel, no_kernel(findings, course)),
        (Rung::Stack, stack),
        (Rung::Established, fast),
        (Rung::Syn, syn),
        (Rung::Xdp, xdp),
    ]
    .into_iter()
    .filter_map(|(rung, why)| Some((rung, why?)))
    .collect();
    let rung = Rung::ALL
        .into_iter()
        .rev()
        .find(|rung| !why_not.contains_key(rung));
    Ladder { rung, why_not }
}

/// The first feature of a list that is known not to be there.
fn lacking(findings: &Findings, needed: &[Feature]) -> Option<String> {
    needed
        .iter()
        .find_map(|feature| Some(format!("{feature}: {}", findings.lacks(*feature)?)))
}

fn no_kernel(findings: &Findings, course: &Course) -> Option<String> {
    lacking(findings, &[Feature::Vxlan]).or_else(|| course.no_kernel.clone())
}

fn no_stack(findings: &Findings, wishes: &Wishes, course: &Course) -> Option<String> {
    if wishes.datapath == Wants::Kernel {
        return Some("--datapath=kernel".into());
    }
    if let Some(reason) = lacking(findings, &FOR_STACK) {
        return Some(reason);
    }
    let (tcx, clsact) = (
        lacking(findings, &[Feature::Tcx]),
        lacking(findings, &[Feature::Clsact]),
    );
    let unattachable = match wishes.attach {
        Attach::Auto => tcx
            .zip(clsact)
            .map(|(tcx, clsact)| format!("{tcx}; {clsact}")),
        Attach::Tcx => tcx.map(|tcx| format!("{tcx}, and --bpf-attach=tcx")),
        Attach::Clsact => clsact.map(|clsact| format!("{clsact}, and --bpf-attach=clsact")),
    };
    unattachable
        .or_else(|| {
            // A pair stands in for the device where there is none.
            let alone = findings.lacks(Feature::Vxlan).is_some();
            alone.then(|| lacking(findings, &[Feature::Veth])).flatten()
        })
        .or_else(|| course.no_bpf.clone())
}

fn no_fast_path(findings: &Findings, wishes: &Wishes, course: &Course) -> Option<String> {
    if wishes.fast_path == fastpath::Choice::Off {
        return Some("switched off".into());
    }
    lacking(findings, &FOR_ESTABLISHED).or_else(|| match &course.gate {
        Some((GateMode::Off, reason)) => Some(reason.clone()),
        _ => None,
    })
}

fn no_syn(findings: &Findings, wishes: &Wishes, course: &Course) -> Option<String> {
    if wishes.fast_path != fastpath::Choice::Syn {
        return Some("only with --bpf-fast-path=syn".into());
    }
    lacking(findings, &FOR_SYN).or_else(|| match &course.gate {
        Some((GateMode::Off | GateMode::Established, reason)) => Some(reason.clone()),
        _ => None,
    })
}

fn no_xdp(findings: &Findings, wishes: &Wishes, course: &Course) -> Option<String> {
    if wishes.xdp == xdp::Choice::Off {
        return Some("switched off".into());
    }
    lacking(findings, &FOR_XDP).or_else(|| match &course.xdp {
        Some(Ok(())) => None,
        Some(Err(reason)) => Some(reason.clone()),
        None => Some("the agent tries it once everything else is in place".into()),
    })
}
