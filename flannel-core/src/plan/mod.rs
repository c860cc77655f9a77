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
mod stand_in;
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
    let mut plan = match stand_in::plan(desired, observed) {
        stand_in::Step::First(plan) => return plan,
        stand_in::Step::Ready(why) => {
            let device = observed.device.iter();
            return Plan {
                ops: device
                    .map(|device| Op::DeleteDevice {
                        index: device.index,
                        name: desired.tunnel.name.clone(),
                        why: why.clone(),
                    })
                    .collect(),
                problems: Vec::new(),
            };
        }
        stand_in::Step::NotNeeded => plan_node(desired, observed),
    };
    stand_in::retire(desired, observed, &mut plan);
    plan
}

/// Plans without regard to what stands in.
fn plan_node(desired: &Desired, observed: &Observed) -> Plan {
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
    let mut kernel = Plan::default();
    match &peers {
        Some(peers) => {
            kernel::plan_peers(desired, observed, device, peers, &mut kernel, deletes);
        }
        None => kernel::restore_neighbours(desired, device, &mut kernel.ops),
    }
    plan.problems.append(&mut kernel.problems);
    // A vxlan device carries packets from its first route on; a veth pair only with its program. And where another device carries them
    // until then, none need be lost to a clsact qdisc: while a device gets one it sends nothing (`qdisc_graft`).
    let programs_first =
        matches!(desired.tunnel.kind, DeviceKind::Veth { .. }) || observed.stand_in.is_some();
    if !programs_first {
        plan.ops.append(&mut kernel.ops);
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
    plan.ops.append(&mut kernel.ops);
}
