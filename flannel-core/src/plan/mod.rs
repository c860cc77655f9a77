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
mod direct;
mod gate;
mod kernel;
mod observed;
mod op;
mod pods;
mod record;
mod stand_in;
mod xdp;

pub use bpf::{Node, Settings};
pub(crate) use desired::overlap;
pub use desired::{
    Desired, DeviceKind, Direct, Peer, PeerProblem, Tunnel, of_another_backend, peers_of,
};
pub use gate::{Gate, GateMode, Hook};
pub use observed::{
    Attachment, BpfState, Device, LinkRoute, NextHop, Observed, ObservedKind, Route,
};
pub use op::Op;
pub use record::{Records, V4, V6};

use serde::{Deserialize, Serialize};

use crate::addr::VtepMac;

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
    let Some(tunnel) = &desired.tunnel else {
        return plan_node(desired, None, observed);
    };
    let mut plan = match stand_in::plan(desired, tunnel, observed) {
        stand_in::Step::First(plan) => return plan,
        stand_in::Step::Ready(why) => {
            let device = observed.device.iter();
            return Plan {
                ops: device
                    .map(|device| Op::DeleteDevice {
                        index: device.index,
                        name: tunnel.name.clone(),
                        why: why.clone(),
                    })
                    .collect(),
                problems: Vec::new(),
            };
        }
        stand_in::Step::NotNeeded => plan_node(desired, Some(tunnel), observed),
    };
    stand_in::retire(desired, tunnel, observed, &mut plan);
    plan
}

/// The tunnel device, fit to carry peers, and what it should be.
#[derive(Clone, Copy)]
struct Overlay<'a> {
    tunnel: &'a Tunnel,
    device: &'a Device,
}

impl Overlay<'_> {
    /// The MAC address that peers know, or will know.
    fn mac(&self) -> VtepMac {
        self.tunnel.mac.unwrap_or(self.device.mac)
    }
}

/// Plans without regard to what stands in.
fn plan_node(desired: &Desired, tunnel: Option<&Tunnel>, observed: &Observed) -> Plan {
    let mut plan = Plan::default();
    let mut deletes = Vec::new();
    let settings = pods::retire(desired, observed, &mut plan, &mut deletes);
    xdp::retire(desired, observed, &mut plan);
    let overlay = match tunnel {
        None => Some(None),
        Some(tunnel) => kernel::plan_device(tunnel, observed, &mut plan)
            .map(|device| Some(Overlay { tunnel, device })),
    };
    if let Some(overlay) = overlay {
        plan_overlay(
            desired,
            observed,
            overlay,
            settings.as_ref(),
            &mut plan,
            &mut deletes,
        );
    }
    plan.ops.append(&mut deletes);
    plan
}

/// Plans what hangs on a device that is fit for it, and what needs none.
fn plan_overlay(
    desired: &Desired,
    observed: &Observed,
    overlay: Option<Overlay<'_>>,
    settings: Option<&Settings>,
    plan: &mut Plan,
    deletes: &mut Vec<Op>,
) {
    let peers = desired
        .peers
        .as_ref()
        .map(|peers| desired::usable(desired, peers, &mut plan.problems));
    let on_link = peers
        .as_ref()
        .map(|peers| direct::on_link(desired, observed, peers))
        .unwrap_or_default();
    let mut kernel = Plan::default();
    match (&peers, overlay) {
        (Some(peers), overlay) => {
            let mut routes = Plan::default();
            let mut stale = Vec::new();
            if let Some(overlay) = overlay {
                let peers = peers.iter().filter(|(subnet, _)| !on_link.contains(subnet));
                kernel::plan_peers(&overlay, observed, peers, &mut kernel, &mut stale);
            }
            let tunnelled = kernel.ops.iter().filter_map(|op| match op {
                Op::PutRoute { subnet, .. } => Some(*subnet),
                _ => None,
            });
            let tunnelled = tunnelled.collect();
            direct::plan_routes(
                desired,
                observed,
                peers,
                &on_link,
                &tunnelled,
                &mut routes,
                &mut stale,
            );
            // One that takes the place of a route over the device leaves nothing there to delete.
            stale.retain(|op| {
                !matches!(op, Op::DelRoute { subnet } if routes.ops.iter().any(
                    |put| matches!(put, Op::PutLinkRoute { subnet: put, .. } if put == subnet)))
            });
            deletes.append(&mut stale);
            kernel.ops.append(&mut routes.ops);
            kernel.problems.append(&mut routes.problems);
        }
        (None, Some(overlay)) => kernel::restore_neighbours(&overlay, &mut kernel.ops),
        (None, None) => {}
    }
    plan.problems.append(&mut kernel.problems);
    // A vxlan device carries packets from its first route on; a veth pair only with its program. And where another device carries them
    // until then, none need be lost to a clsact qdisc: while a device gets one it sends nothing (`qdisc_graft`).
    let programs_first = overlay.is_some_and(|overlay| {
        matches!(overlay.tunnel.kind, DeviceKind::Veth { .. }) || observed.stand_in.is_some()
    });
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
                overlay,
                peers: peers.as_ref(),
                on_link: &on_link,
                settings,
            },
            plan,
            deletes,
        );
    }
    plan.ops.append(&mut kernel.ops);
}
