//! The pods of this node: their entries in the map `pods`, and the programs on their veths.
//!
//! Packets reach a pod past the stack only while it has an entry. So an entry is written last, when every program that guards it is
//! attached, and taken away before anything else happens, because its address may be given to another pod at any moment.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::{BpfState, Desired, Gate, Hook, Observed, Op, Plan, Settings};
use crate::{addr::IfIndex, pods::Pod};

/// The pods that should have entries: none while the gate is off; `None` while they are not known.
fn wanted<'a>(desired: &'a Desired, gate: &Gate) -> Option<BTreeMap<IpAddr, &'a Pod>> {
    if gate.is_off() {
        return Some(BTreeMap::new());
    }
    let pods = desired.pods.as_ref()?;
    Some(pods.iter().map(|(address, pod)| (*address, pod)).collect())
}

/// Shuts the gate and takes entries away, first of all; detaches what is not needed, last of all. Returns the settings as they are then.
pub(super) fn retire(
    desired: &Desired,
    observed: &Observed,
    plan: &mut Plan,
    deletes: &mut Vec<Op>,
) -> Option<Settings> {
    let (Some(want), Some(have)) = (&desired.bpf, &observed.bpf) else {
        return None;
    };
    let mut settings = have.settings.clone();
    if want.gate.is_off()
        && let Some(settings) = &mut settings
        && !settings.gate.is_off()
    {
        settings.gate = want.gate;
        plan.ops.push(Op::PutSettings(settings.clone()));
    }
    let Some(wanted) = wanted(desired, &want.gate) else {
        return settings;
    };
    for (address, there) in &have.pods {
        let stays = match (wanted.get(address), there) {
            (Some(pod), Some(there)) => pod.ifindex == there.ifindex,
            _ => false,
        };
        if !stays {
            plan.ops.push(Op::DelPod { address: *address });
        }
    }
    let ports = ports(&wanted);
    for (ifindex, hooks) in &have.pod_hooks {
        if ports.contains(ifindex) {
            continue;
        }
        for hook in hooks.keys() {
            deletes.push(Op::Detach {
                hook: *hook,
                ifindex: *ifindex,
            });
        }
    }
    settings
}

/// Attaches the programs of pods, then writes their entries.
pub(super) fn admit(desired: &Desired, gate: &Gate, have: &BpfState, plan: &mut Plan) {
    let Some(wanted) = wanted(desired, gate) else {
        return;
    };
    for ifindex in ports(&wanted) {
        for hook in Hook::POD {
            let hooks = have.pod_hooks.get(&ifindex);
            if hooks.and_then(|hooks| hooks.get(&hook)) != Some(&true) {
                plan.ops.push(Op::Attach { hook, ifindex });
            }
        }
    }
    for (address, pod) in wanted {
        if have.pods.get(&address).copied().flatten() != Some(*pod) {
            plan.ops.push(Op::PutPod { address, pod: *pod });
        }
    }
}

fn ports(wanted: &BTreeMap<IpAddr, &Pod>) -> BTreeSet<IfIndex> {
    wanted.values().map(|pod| pod.ifindex).collect()
}
