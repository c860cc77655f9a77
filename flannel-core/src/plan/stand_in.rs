//! A change of the device's kind without a gap.
//!
//! A veth pair and a vxlan device cannot both bear the tunnel's name, and before Linux 6.2 an interface that is up cannot be renamed. So
//! another pair of veths, of a name of its own, takes everything over first: address, neighbours, the program that encapsulates, the
//! packets of `from_wire`, and the routes, which the kernel turns from one device to the other one by one. Then the old device goes,
//! the new one is made complete under the tunnel's name and takes over in the same manner, and last of all the pair goes.
//!
//! What is left of that by an end at any moment is a situation like any other: the next plan goes on from there. Only eBPF can carry
//! traffic meanwhile; without it the device is replaced at once.

use super::{
    Desired, Device, DeviceKind, Hook, Observed, ObservedKind, Op, Plan, Settings, Tunnel, pods,
    xdp,
};
use crate::mark;

/// What [`plan`] says.
pub(super) enum Step {
    /// The device need not change its kind, or nothing can stand in.
    NotNeeded,
    /// This comes first.
    First(Plan),
    /// The pair carries everything: the old device may go, for this reason.
    Ready(String),
}

/// Plans what has to be done before a device of another kind may go.
pub(super) fn plan(desired: &Desired, tunnel: &Tunnel, observed: &Observed) -> Step {
    let (Some(device), Some(bpf), Some(have)) = (&observed.device, &desired.bpf, &observed.bpf)
    else {
        return Step::NotNeeded;
    };
    let Some(why) = changes_kind(tunnel, device) else {
        return Step::NotNeeded;
    };
    let Some((name, peer)) = mark::stand_in(&tunnel.name) else {
        return Step::NotNeeded;
    };
    if observed
        .stand_in
        .as_ref()
        .is_some_and(|there| !is_ours(there, &peer))
    {
        return Step::NotNeeded;
    }
    if desired.peers.is_none() {
        // What is there knows the peers, whatever would take its place does not yet. Only what ends does so in any case.
        let (mut plan, mut deletes) = (Plan::default(), Vec::new());
        pods::retire(desired, observed, &mut plan, &mut deletes);
        xdp::retire(desired, observed, &mut plan);
        plan.ops.append(&mut deletes);
        return Step::First(plan);
    }
    let mut have = have.clone();
    // The programs of the device that is to go are of no matter; the one of the pair is pinned elsewhere.
    have.attached.remove(&Hook::FromOverlay);
    match have.stand_in.take() {
        Some(attachment) => have.attached.insert(Hook::ToOverlay, attachment),
        None => have.attached.remove(&Hook::ToOverlay),
    };
    let pair = Tunnel {
        name,
        kind: DeviceKind::Veth { peer },
        mac: Some(tunnel.mac.unwrap_or(device.mac)),
        ..tunnel.clone()
    };
    let stand_in = Desired {
        bpf: Some(Settings {
            alone: true,
            decap_gso: true,
            ..bpf.clone()
        }),
        ..desired.clone()
    };
    let seen = Observed {
        device: observed.stand_in.clone(),
        underlay: observed.underlay.clone(),
        links: observed.links.clone(),
        bpf: Some(have),
        stand_in: None,
    };
    let Plan { ops, problems } = super::plan_node(&stand_in, Some(&pair), &seen);
    let ops: Vec<Op> = ops.into_iter().filter_map(on_stand_in).collect();
    if ops.is_empty() {
        Step::Ready(why)
    } else {
        Step::First(Plan { ops, problems })
    }
}

/// Removes the pair when it is not needed any more.
pub(super) fn retire(desired: &Desired, tunnel: &Tunnel, observed: &Observed, plan: &mut Plan) {
    let (Some((name, peer)), Some(there)) = (mark::stand_in(&tunnel.name), &observed.stand_in)
    else {
        return;
    };
    let complete = plan.ops.is_empty()
        && desired.peers.is_some()
        && observed
            .device
            .as_ref()
            .is_some_and(|device| device.up && changes_kind(tunnel, device).is_none());
    if complete && is_ours(there, &peer) {
        plan.ops.push(Op::StandIn(Box::new(Op::DeleteDevice {
            index: there.index,
            name,
            why: format!("{} carries everything again", tunnel.name),
        })));
    }
}

/// Whether the device has to become one of another kind: why.
fn changes_kind(tunnel: &Tunnel, device: &Device) -> Option<String> {
    match (&tunnel.kind, &device.kind) {
        (DeviceKind::Veth { .. }, ObservedKind::Vxlan { .. }) => {
            Some("it is a vxlan device, eBPF alone was asked for".into())
        }
        (DeviceKind::Vxlan { .. }, ObservedKind::Veth { peer: Some(has) })
            if mark::far_end(&tunnel.name).is_some_and(|ours| ours == *has) =>
        {
            Some("it is a veth pair of ours, a vxlan device was asked for".into())
        }
        _ => None,
    }
}

fn is_ours(device: &Device, peer: &str) -> bool {
    matches!(&device.kind, ObservedKind::Veth { peer: Some(has) } if has == peer)
}

/// Turns an op of the plan for the pair into one that is applied to it. Maps, pods and the uplink are the same ones.
fn on_stand_in(op: Op) -> Option<Op> {
    match &op {
        // Flows are not learnt there: they are learnt anew a moment later.
        Op::Attach {
            hook: Hook::FromOverlay,
            ..
        }
        | Op::Detach {
            hook: Hook::FromOverlay,
            ..
        } => None,
        Op::Attach {
            hook: Hook::ToOverlay,
            ..
        }
        | Op::CreateDevice(_)
        | Op::DeleteDevice { .. }
        | Op::SetMtu { .. }
        | Op::SetMac { .. }
        | Op::SetUp { .. }
        | Op::PutAddress { .. }
        | Op::DelAddress { .. }
        | Op::PutFdb { .. }
        | Op::DelFdb { .. }
        | Op::PutNeighbour { .. }
        | Op::DelNeighbour { .. }
        | Op::PutRoute { .. }
        | Op::DelRoute { .. } => Some(Op::StandIn(Box::new(op))),
        Op::StandIn(_)
        | Op::Attach { .. }
        | Op::Detach { .. }
        | Op::PutLinkRoute { .. }
        | Op::DelLinkRoute { .. }
        | Op::AttachXdp { .. }
        | Op::DetachXdp { .. }
        | Op::PutNode { .. }
        | Op::ClearNode { .. }
        | Op::PutSubnet { .. }
        | Op::ClearSubnet { .. }
        | Op::PutSettings(_)
        | Op::PutPod { .. }
        | Op::DelPod { .. } => Some(op),
    }
}
