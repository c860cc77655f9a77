//! The planner's contracts around pods: a packet never gets past the stack to a pod whose programs are not all there, nor to one that
//! has gone.

use flannel_core::plan::{BpfState, GateMode, Hook, Observed, Op, Plan, plan};
use proptest::prelude::*;

mod model;
mod situations;
use model::apply;
use situations::Situation;

/// As many as the contracts of the rest need.
const PASSES: usize = 6;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// An entry is written when the programs that guard the pod are attached, and none is detached while an entry leads past it.
    #[test]
    fn an_entry_is_guarded(situation in situations::situation(514)) {
        let Situation { want, have } = situation;
        let mut kernel = have;
        for _ in 0..PASSES {
            for op in &plan(&want, &kernel).ops {
                apply(&mut kernel, op, &want);
                let Some(bpf) = &kernel.bpf else { continue };
                match op {
                    Op::PutPod { pod, .. } => {
                        let device = kernel.device.as_ref().map(|device| device.index);
                        let overlay = bpf.attached.get(&Hook::FromOverlay);
                        // While a pair stands in nothing tags what comes out of it: such flows are forgotten, which only makes them slower.
                        if kernel.stand_in.is_none() && want.tunnel.is_some() {
                            prop_assert_eq!(overlay.map(|there| there.ifindex), device, "{}", op);
                        }
                        // An older entry may go a moment later.
                        let routed = bpf.settings.as_ref().is_some_and(|settings| settings.routed);
                        if want.peers.is_some() && routed {
                            prop_assert!(bpf.attached.contains_key(&Hook::ToLink), "{}", op);
                        }
                        let hooks = &bpf.pod_hooks[&pod.ifindex];
                        prop_assert!(Hook::POD.iter().all(|hook| hooks.get(hook) == Some(&true)), "{}", op);
                        prop_assert!(bpf.settings.as_ref().is_some_and(|settings| settings.gate.mode != GateMode::Off));
                    }
                    Op::Detach { hook, ifindex } if hook.is_per_pod() => {
                        prop_assert!(!bpf.pods.values().flatten().any(|pod| pod.ifindex == *ifindex), "{}", op);
                    }
                    // What it would see goes through the tunnel by then.
                    Op::Detach { hook: Hook::ToLink, .. } => {
                        let routed = want.peers.is_some() && is_routed(bpf);
                        prop_assert!(!routed || bpf.pods.is_empty(), "{}", op);
                    }
                    // Of a backend before this one, nothing goes over a tunnel any more.
                    Op::Detach { .. } => prop_assert!(bpf.pods.is_empty() || want.tunnel.is_none(), "{}", op),
                    _ => {}
                }
            }
        }
    }

    /// What is gone goes before anything else happens; only the gate may be shut before.
    #[test]
    fn entries_go_first(situation in situations::situation(514)) {
        let Situation { want, have } = situation;
        let mut kernel = have;
        for _ in 0..PASSES {
            let Plan { ops, .. } = plan(&want, &kernel);
            let shuts = |op: &Op| matches!(op, Op::PutSettings(settings) if settings.gate.mode == GateMode::Off);
            let first = ops.iter().position(|op| !shuts(op) && !matches!(op, Op::DelPod { .. })).unwrap_or(ops.len());
            prop_assert!(!ops.iter().skip(first).any(|op| matches!(op, Op::DelPod { .. })), "{:?}", ops);
            let detached = ops.iter().position(|op| matches!(op, Op::Detach { .. })).unwrap_or(ops.len());
            let makes = |op: &Op| matches!(op, Op::PutPod { .. } | Op::PutSettings(_) | Op::Attach { .. });
            prop_assert!(!ops.iter().skip(detached).any(makes), "{:?}", ops);
            for op in &ops {
                apply(&mut kernel, op, &want);
            }
            // After the first of them no entry leads to where another pod is wanted, or none.
            let on = want.bpf.as_ref().is_some_and(|bpf| bpf.gate.mode != GateMode::Off);
            if let (Some(bpf), Some(pods), true) = (&kernel.bpf, &want.pods, on) {
                for (address, there) in &bpf.pods {
                    prop_assert_eq!(pods.get(address).map(|pod| pod.ifindex), there.map(|pod| pod.ifindex));
                }
            }
        }
    }

    /// While the pods are not known, none comes and none goes, unless the gate is shut.
    #[test]
    fn half_a_list_changes_no_pod(situation in situations::situation(514)) {
        let Situation { mut want, have } = situation;
        want.pods = None;
        let on = want.bpf.as_ref().is_some_and(|bpf| bpf.gate.mode != GateMode::Off);
        let mut kernel = have.clone();
        for _ in 0..PASSES {
            for op in &plan(&want, &kernel).ops {
                prop_assert!(!on || !op.is_about_pods(), "{}", op);
                apply(&mut kernel, op, &want);
            }
        }
        let pods = |kernel: Observed| kernel.bpf.map(|bpf| (bpf.pods, bpf.pod_hooks));
        if on {
            prop_assert_eq!(pods(kernel), pods(have));
        } else if let (Some(bpf), Some(_)) = (kernel.bpf, want.bpf) {
            prop_assert!(bpf.pods.is_empty() && bpf.pod_hooks.is_empty());
        }
    }
}

/// Whether packets to some subnet go without a tunnel.
fn is_routed(bpf: &BpfState) -> bool {
    let nodes = bpf.subnets.values().filter_map(|id| bpf.nodes.get(id));
    nodes.flatten().any(|node| node.routed)
}
