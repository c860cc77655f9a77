//! The planner: what must change in the kernel so that the node looks as it should.
//!
//! [`plan`] is a pure function of two different types, [`Desired`] and [`Observed`]. Its contracts, each a test:
//! it *converges* (applying the ops brings the node closer, and a node as desired yields none), it is *minimal*, it leaves *no
//! gap* (puts come before deletes, a subnet that moves is overwritten), it names *only our own* objects, and it never
//! deletes on *half a list* ([`Desired::peers`] is `None` until the lease store has listed everything once, [`Desired::pods`] until
//! the kernel has).
//!
//! It must never do I/O, read a clock, or depend on the order of a hash map.

mod bpf;
mod desired;
mod gate;
mod kernel;
mod observed;
mod op;
mod pods;
mod xdp;

pub use bpf::{Node, Settings};
pub(crate) use desired::overlap;
pub use desired::{Desired, DeviceKind, Peer, PeerProblem, Tunnel, peers_of};
pub use gate::{Gate, GateMode, Hook};
pub use observed::{Attachment, BpfState, Device, NextHop, Observed, ObservedKind, Route};
pub use op::Op;

use serde::{Deserialize, Serialize};

/// What [`plan`] found: the changes, and what no change of ours can mend.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Changes in the order in which they must be applied.
    pub ops: Vec<Op>,
    /// What stands in the way and needs a person; each says what and how to mend it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
}

/// Lists the changes that turn `observed` into `desired`.
///
/// One pass need not suffice: while the device is missing or down only that is mended, and the next pass, on a fresh
/// observation, does the rest. The caller repeats until the ops are empty.
pub fn plan(desired: &Desired, observed: &Observed) -> Plan {
    let mut plan = Plan::default();
    let mut deletes = Vec::new();
    let settings = pods::retire(desired, observed, &mut plan, &mut deletes);
    xdp::retire(desired, observed, &mut plan);
    if let Some(device) = kernel::plan_device(desired, observed, &mut plan) {
        plan_overlay(
            desired,
            observed,
            device,
            settings.as_ref(),
            &mut plan,
            &mut deletes,
        );
    }
    plan.ops.append(&mut deletes);
    plan
}

/// Plans what hangs on a device that is fit for it.
fn plan_overlay(
    desired: &Desired,
    observed: &Observed,
    device: &Device,
    settings: Option<&Settings>,
    plan: &mut Plan,
    deletes: &mut Vec<Op>,
) {
    let peers = desired
        .peers
        .as_ref()
        .map(|peers| desired::usable(desired, peers, &mut plan.problems));
    match &peers {
        Some(peers) => kernel::plan_peers(desired, observed, device, peers, plan, deletes),
        None => kernel::restore_neighbours(desired, device, &mut plan.ops),
    }
    if let (Some(want), Some(have)) = (&desired.bpf, &observed.bpf) {
        bpf::plan(
            &bpf::Input {
                desired,
                observed,
                want,
                have,
                device,
                peers: peers.as_ref(),
                settings,
            },
            plan,
            deletes,
        );
    }
}
