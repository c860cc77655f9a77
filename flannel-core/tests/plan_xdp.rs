//! The planner's contracts around native XDP: a frame that it has stripped always meets `from_wire`, which knows what it is.

use flannel_core::plan::{BpfState, Hook, Observed, Op, plan};
use proptest::prelude::*;

mod model;
mod situations;
use model::apply;
use situations::Situation;

/// As many as the contracts of the rest need.
const PASSES: usize = 6;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// It comes when everything is there, and goes before anything does.
    #[test]
    fn nothing_is_stripped_that_nobody_takes(situation in situations::situation(514)) {
        let Situation { want, have } = situation;
        let mut kernel = have;
        for _ in 0..PASSES {
            for op in &plan(&want, &kernel).ops {
                let stripped_before = bpf(&kernel).is_some_and(is_taken);
                apply(&mut kernel, op, &want);
                let Some(bpf) = bpf(&kernel) else { continue };
                if matches!(op, Op::AttachXdp { .. }) {
                    prop_assert!(is_taken(bpf), "{}: {:?}", op, bpf);
                    prop_assert!(bpf.attached[&Hook::FromWire].current);
                }
                // What was right never becomes wrong on the way.
                if stripped_before && bpf.xdp.is_some() {
                    prop_assert!(is_taken(bpf), "{}: {:?}", op, bpf);
                }
            }
        }
    }

    /// In the end it is where it is wanted, and nowhere else.
    #[test]
    fn it_is_where_it_is_wanted(situation in situations::situation(514)) {
        let Situation { want, have } = situation;
        let mut kernel = have;
        let mut done = false;
        for _ in 0..PASSES {
            let ops = plan(&want, &kernel).ops;
            done = ops.is_empty();
            for op in &ops {
                apply(&mut kernel, op, &want);
            }
        }
        let (Some(settings), Some(bpf)) = (&want.bpf, bpf(&kernel)) else { return Ok(()) };
        if let Some(there) = bpf.xdp {
            prop_assert!(settings.xdp);
            prop_assert_eq!(there.ifindex, settings.uplink);
        }
        let stands = kernel.device.as_ref().is_some_and(|device| device.up) && done;
        let from_wire = bpf.attached.get(&Hook::FromWire);
        let current = from_wire.is_some_and(|there| there.current && there.ifindex == settings.uplink);
        let fits = bpf.settings.as_ref().is_some_and(|there| there.xdp == settings.xdp);
        // Nothing is planned around a device that is somebody else's.
        let stands = stands && plan(&want, &kernel).problems.is_empty();
        if stands && settings.xdp && current && fits && want.peers.is_some() {
            prop_assert!(bpf.xdp.is_some_and(|there| there.current), "{:?}", bpf);
        }
    }
}

fn bpf(kernel: &Observed) -> Option<&BpfState> {
    kernel.bpf.as_ref()
}

/// Whether a stripped frame meets a program that looks for such: the one on the same interface, told so by the configuration.
fn is_taken(bpf: &BpfState) -> bool {
    let from_wire = bpf.attached.get(&Hook::FromWire);
    let there = bpf.xdp.map(|xdp| xdp.ifindex);
    let told = bpf.settings.as_ref().is_some_and(|settings| settings.xdp);
    told && there.is_some() && from_wire.map(|from_wire| from_wire.ifindex) == there
}
