//! tcx and clsact, and the way from one to the other.

use std::time::Duration;

use flannel_testkit::{Confinement, privileged, traffic::FloodPing};

use crate::{
    add_clsact, exchange, filters, restart,
    rig::{Rig, hooks::hooks},
};

#[test]
fn clsact_carries_and_is_replaced_after_a_crash() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start(2, &["--bpf-attach=clsact"]);
    exchange(&rig, 0, 1);
    hooks(rig.ns(0)).are("clsact").expect("clsact alone");
    let first = filters(rig.ns(0));
    assert_eq!(first.len(), 2, "{first:?}");
    assert_eq!(rig.status(0)["datapath"]["attach"], "clsact");
    let flood =
        FloodPing::start(&rig.pod(0).ns, rig.pod(1).ip, Duration::from_millis(1)).expect("a flood");
    restart(&mut rig, 0, &["--bpf-attach=clsact"], &Confinement::FREE);
    let second = filters(rig.ns(0));
    let stats = flood.stop().expect("the account");
    assert_eq!(stats.lost, 0, "{stats:?}");
    assert_eq!(second.len(), 2, "{second:?}");
    for (old, new) in first.iter().zip(&second) {
        assert_eq!((&old.0, &old.1), (&new.0, &new.1));
        assert_ne!(old.2, new.2, "still the program of the agent before");
    }
    hooks(rig.ns(0)).are("clsact").expect("clsact alone");
    let before = rig.counters(0);
    exchange(&rig, 0, 1);
    let after = rig.counters(0);
    assert!(after.encap > before.encap && after.decap > before.decap);
}

#[test]
fn a_change_of_the_way_to_attach_leaves_one_program_a_hook() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start(2, &["--bpf-attach=tcx"]);
    add_clsact(&rig, 0);
    let flood =
        FloodPing::start(&rig.pod(0).ns, rig.pod(1).ip, Duration::from_millis(1)).expect("a flood");
    for mode in ["clsact", "tcx", "clsact", "tcx"] {
        restart(
            &mut rig,
            0,
            &[&format!("--bpf-attach={mode}")],
            &Confinement::FREE,
        );
        if let Err(error) = hooks(rig.ns(0)).are(mode) {
            panic!("after changing to {mode}: {error}");
        }
        let before = rig.counters(0);
        rig.ping(0, 1).expect("a ping");
        let after = rig.counters(0);
        assert!(after.encap > before.encap && after.decap > before.decap);
        let status = rig.status(0);
        assert_eq!(status["datapath"]["attach"], mode, "{status}");
        let names = status["datapath"]["attached"].as_array().map(Vec::len);
        assert_eq!(names, Some(2), "{status}");
    }
    let stats = flood.stop().expect("the account");
    assert_eq!(stats.lost, 0, "{stats:?}");
    assert_eq!(stats.duplicates, 0, "{stats:?}");
}

#[test]
fn a_strangers_filter_survives_every_change() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start(2, &["--bpf-attach=clsact"]);
    let ns = rig.ns(0).clone();
    // A classic program that matches nothing.
    let rule = "tc filter add dev eth0 ingress prio 7 bpf bytecode";
    ns.exec(rule.split(' ').chain(["1,6 0 0 0,"]))
        .expect("a filter of somebody's");
    let look = || {
        ns.exec([
            "tc", "filter", "show", "dev", "eth0", "ingress", "prio", "7",
        ])
        .expect("tc")
    };
    let theirs = look();
    assert!(theirs.contains("bytecode"), "{theirs}");
    for flags in [
        "--bpf-attach=tcx",
        "--bpf-attach=clsact",
        "--datapath=kernel",
    ] {
        restart(&mut rig, 0, &[flags], &Confinement::FREE);
        assert_eq!(look(), theirs, "after {flags}");
    }
    assert_eq!(filters(&ns), []);
    rig.ping(0, 1).expect("a ping");
}
