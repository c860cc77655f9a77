//! Kernels as they have been seen, and the rungs that follow.

use super::*;
use crate::{check::Wants, fastpath::Choice, plan::GateMode, xdp};

/// Everything there.
fn full() -> Findings {
    let all = Feature::ALL.iter();
    all.map(|feature| (*feature, Finding::Present)).collect()
}

fn but(mut findings: Findings, lacking: &[(Feature, i32, &str)]) -> Findings {
    for (feature, errno, reason) in lacking {
        findings.put(
            *feature,
            Finding::Absent {
                errno: (*errno != 0).then_some(*errno),
                reason: (*reason).into(),
            },
        );
    }
    findings.put(Feature::NativeXdp, Finding::untried("needs the uplink"));
    findings
}

const NO_DECAP_L4_UDP: (Feature, i32, &str) = (
    Feature::DecapL4Udp,
    22,
    "the helper answers EINVAL to a packet",
);
const NO_TCX: (Feature, i32, &str) = (Feature::Tcx, 22, "EINVAL: kernels before 6.6 have none");

/// Debian's kernels, as probed in QEMU.
fn linux_5_10() -> Findings {
    but(
        full(),
        &[
            NO_DECAP_L4_UDP,
            NO_TCX,
            (
                Feature::EncapL2Eth,
                22,
                "the helper answers EINVAL to a packet",
            ),
            (
                Feature::CoarseClock,
                22,
                "unknown func bpf_ktime_get_coarse_ns#160",
            ),
            (Feature::CheckMtu, 22, "invalid func unknown#163"),
            (Feature::XdpFrags, 22, "EINVAL"),
        ],
    )
}

fn linux_6_1() -> Findings {
    but(full(), &[NO_DECAP_L4_UDP, NO_TCX])
}

fn linux_6_12() -> Findings {
    but(full(), &[NO_DECAP_L4_UDP])
}

fn no_bpf(errno: i32, reason: &str) -> Findings {
    let mut findings: Findings = Feature::ALL
        .iter()
        .map(|feature| (*feature, Finding::untried("needs bpf")))
        .collect();
    for feature in [Feature::Vxlan, Feature::Veth] {
        findings.put(feature, Finding::Present);
    }
    but(findings, &[(Feature::Bpf, errno, reason)])
}

/// The agent is up, and the fast path is on.
fn running() -> Course {
    Course {
        gate: Some((GateMode::Established, "nothing is in the way".into())),
        ..Course::default()
    }
}

#[track_caller]
fn rung(findings: &Findings, wishes: &Wishes, course: &Course) -> Option<Rung> {
    climb(findings, wishes, course).rung
}

#[track_caller]
fn why_not(findings: &Findings, wishes: &Wishes, course: &Course, rung: Rung) -> String {
    let ladder = climb(findings, wishes, course);
    ladder.why_not.get(&rung).cloned().unwrap_or_default()
}

#[test]
fn names_are_unique_and_in_order() {
    let names: std::collections::BTreeSet<_> = Feature::ALL.iter().map(|f| f.as_str()).collect();
    assert_eq!(names.len(), Feature::ALL.len());
    assert!(Feature::ALL.is_sorted());
    for feature in Feature::ALL {
        let json = serde_json::to_string(feature).unwrap();
        assert_eq!(json, format!("\"{feature}\""));
    }
}

#[test]
fn kernels_as_seen() {
    let wishes = Wishes::default();
    for (name, findings) in [
        ("5.10", linux_5_10()),
        ("6.1", linux_6_1()),
        ("6.12", linux_6_12()),
        ("7.2", linux_6_12()),
    ] {
        let found = rung(&findings, &wishes, &running());
        assert_eq!(found, Some(Rung::Established), "{name}");
        // The agent says of native XDP what it has seen of it.
        let stripping = Course {
            xdp: Some(Ok(())),
            ..running()
        };
        let found = rung(&findings, &wishes, &stripping);
        assert_eq!(found, Some(Rung::Xdp), "{name}");
    }
}

#[test]
fn what_an_old_kernel_lacks_for_the_first_syn_is_named() {
    let wishes = Wishes {
        fast_path: Choice::Syn,
        ..Wishes::default()
    };
    let reason = why_not(&linux_5_10(), &wishes, &running(), Rung::Syn);
    assert_eq!(reason, "check_mtu: invalid func unknown#163");
    let syn = Course {
        gate: Some((GateMode::Syn, "asked for".into())),
        ..Course::default()
    };
    assert_eq!(rung(&linux_6_1(), &wishes, &syn), Some(Rung::Syn));
    let reason = why_not(&linux_6_1(), &Wishes::default(), &syn, Rung::Syn);
    assert_eq!(reason, "only with --bpf-fast-path=syn");
}

#[test]
fn hooks_are_tcx_or_clsact_or_none() {
    let (auto, tcx, clsact) = (
        Wishes::default(),
        Wishes {
            attach: Attach::Tcx,
            ..Wishes::default()
        },
        Wishes {
            attach: Attach::Clsact,
            ..Wishes::default()
        },
    );
    let withheld = but(linux_6_1(), &[(Feature::Clsact, 2, "add a filter: ENOENT")]);
    let only_tcx = but(
        linux_6_12(),
        &[(Feature::Clsact, 2, "add a filter: ENOENT")],
    );
    for (findings, wishes, expected) in [
        (linux_6_1(), &auto, Rung::Established),
        (linux_6_1(), &clsact, Rung::Established),
        (linux_6_1(), &tcx, Rung::Kernel),
        (withheld.clone(), &auto, Rung::Kernel),
        (only_tcx.clone(), &auto, Rung::Established),
        (only_tcx, &clsact, Rung::Kernel),
    ] {
        assert_eq!(rung(&findings, wishes, &running()), Some(expected));
    }
    let reason = why_not(&withheld, &auto, &running(), Rung::Stack);
    assert!(
        reason.contains("tcx: EINVAL") && reason.contains("clsact: add a filter"),
        "{reason}"
    );
    assert_eq!(
        why_not(&withheld, &auto, &running(), Rung::Established),
        "needs L1"
    );
}

#[test]
fn without_bpf_the_kernel_carries_it() {
    for (errno, reason) in [
        (38, "this kernel was built without eBPF"),
        (1, "CAP_BPF is missing"),
    ] {
        let findings = no_bpf(errno, reason);
        let ladder = climb(&findings, &Wishes::default(), &Course::default());
        assert_eq!(ladder.rung, Some(Rung::Kernel));
        assert_eq!(ladder.why_not[&Rung::Stack], format!("bpf: {reason}"));
        assert_eq!(ladder.why_not[&Rung::Xdp], "needs L1");
    }
    // A lockdown that keeps kernel memory from programs has nothing against ours.
    assert_eq!(
        rung(&linux_6_1(), &Wishes::default(), &running()),
        Some(Rung::Established)
    );
}

#[test]
fn without_vxlan_bpf_carries_it_alone() {
    let refused = (Feature::Vxlan, 95, "the kernel has no such device");
    let findings = but(linux_6_12(), &[refused]);
    let ladder = climb(&findings, &Wishes::default(), &running());
    assert_eq!(ladder.rung, Some(Rung::Established));
    assert_eq!(
        ladder.why_not[&Rung::Kernel],
        "vxlan: the kernel has no such device"
    );
    let no_pair = but(findings, &[(Feature::Veth, 95, "no veth either")]);
    let ladder = climb(&no_pair, &Wishes::default(), &running());
    assert_eq!(ladder.rung, None);
    assert_eq!(ladder.why_not[&Rung::Stack], "veth: no veth either");
    // Veth pairs are needed nowhere else.
    let no_pair = but(linux_6_12(), &[(Feature::Veth, 95, "no veth")]);
    assert_eq!(
        rung(&no_pair, &Wishes::default(), &running()),
        Some(Rung::Established)
    );
    let neither = but(no_bpf(38, "built without"), &[refused]);
    assert_eq!(rung(&neither, &Wishes::default(), &Course::default()), None);
}

#[test]
fn each_feature_costs_its_rung_and_no_other() {
    let wishes = Wishes {
        fast_path: Choice::Syn,
        ..Wishes::default()
    };
    let course = Course {
        gate: Some((GateMode::Syn, "asked for".into())),
        xdp: Some(Ok(())),
        ..Course::default()
    };
    for feature in Feature::ALL {
        let findings = but(linux_6_12(), &[(*feature, 22, "refused")]);
        let found = rung(&findings, &wishes, &course);
        let without = feature.without();
        let expected = match without {
            "no eBPF" => Rung::Kernel,
            "no fast path" => Rung::Stack,
            "no native XDP" => Rung::Syn,
            // All that is left is as fast, or nearly.
            _ => Rung::Xdp,
        };
        assert_eq!(found, Some(expected), "{feature}: {without}");
    }
}

#[test]
fn what_was_not_tried_is_not_held_against_a_kernel() {
    let untried: Findings = Feature::ALL
        .iter()
        .map(|feature| (*feature, Finding::untried("needs CAP_SYS_ADMIN")))
        .collect();
    for findings in [untried, Findings::default()] {
        assert_eq!(
            rung(&findings, &Wishes::default(), &running()),
            Some(Rung::Established)
        );
    }
}

#[test]
fn flags_and_what_came_of_it_count() {
    let kernel = Wishes {
        datapath: Wants::Kernel,
        ..Wishes::default()
    };
    assert_eq!(
        why_not(&full(), &kernel, &running(), Rung::Stack),
        "--datapath=kernel"
    );
    let off = Wishes {
        fast_path: Choice::Off,
        xdp: xdp::Choice::Off,
        ..Wishes::default()
    };
    let course = Course {
        xdp: Some(Err("switched off".into())),
        ..running()
    };
    assert_eq!(rung(&full(), &off, &course), Some(Rung::Stack));
    assert_eq!(
        why_not(&full(), &off, &course, Rung::Established),
        "switched off"
    );
    assert_eq!(why_not(&full(), &off, &course, Rung::Xdp), "needs L2");
    let refused = Course {
        no_bpf: Some("the verifier refuses to_overlay: R1 invalid mem access".into()),
        ..Course::default()
    };
    let ladder = climb(&full(), &Wishes::default(), &refused);
    assert_eq!(ladder.rung, Some(Rung::Kernel));
    assert!(ladder.why_not[&Rung::Stack].contains("refuses to_overlay"));
    let shut = Course {
        gate: Some((GateMode::Off, "the verifier refuses from_pod".into())),
        ..Course::default()
    };
    let ladder = climb(&full(), &Wishes::default(), &shut);
    assert_eq!(ladder.rung, Some(Rung::Stack));
    assert!(ladder.why_not[&Rung::Established].contains("from_pod"));
}

fn key() -> Key {
    Key {
        boot: "8c5f".into(),
        kernel: "6.1.0-50 #1".into(),
        agent: "0.1.0".into(),
        capabilities: "000001ffffffffff".into(),
        label: "unconfined".into(),
        lockdown: String::new(),
        user_namespace: "user:[1]".into(),
    }
}

fn cached() -> Cached {
    Cached {
        key: Some(key()),
        findings: but(linux_5_10(), &[(Feature::Vxlan, 95, "no module")]),
    }
}

#[test]
fn a_cache_round_trips_and_damage_is_nothing() {
    let text = cached().to_text();
    assert_eq!(Cached::parse(&text), Some(cached()));
    assert_eq!(Cached::parse(&text[..text.len() / 2]), None);
    assert_eq!(Cached::parse(&text.replace("check_mtu", "check_mtv")), None);
    assert_eq!(Cached::parse(&text.replace("present", "prevent")), None);
    assert_eq!(Cached::parse(""), None);
}

#[test]
fn no_part_of_the_key_may_differ() {
    let changes: [fn(&mut Key); 7] = [
        |key| key.boot.push('x'),
        |key| key.kernel.push('x'),
        |key| key.agent.push('x'),
        |key| key.capabilities.push('x'),
        |key| key.label.push('x'),
        |key| key.lockdown.push('x'),
        |key| key.user_namespace.push('x'),
    ];
    for change in changes {
        let mut other = key();
        change(&mut other);
        assert_eq!(cached().believed(&other), Findings::default(), "{other:?}");
    }
}

#[test]
fn findings_of_nobody_knows_whom_are_not_believed() {
    let of_nobody = Cached {
        key: None,
        ..cached()
    };
    assert_eq!(of_nobody.clone().believed(&key()), Findings::default());
    assert_eq!(Cached::parse(&of_nobody.to_text()), Some(of_nobody));
}

#[test]
fn what_may_change_is_tried_again() {
    let believed = cached().believed(&key());
    // In the kernel's own code.
    for feature in [Feature::Hash, Feature::RedirectPeer] {
        assert_eq!(believed.get(feature), Some(&Finding::Present));
    }
    for feature in [Feature::EncapL2Eth, Feature::Tcx, Feature::CheckMtu] {
        assert!(believed.lacks(feature).is_some(), "{feature}");
    }
    // A module may be there by now, and a permission gone.
    for feature in [
        Feature::Vxlan,
        Feature::Bpf,
        Feature::Bpffs,
        Feature::NativeXdp,
    ] {
        assert_eq!(believed.get(feature), None, "{feature}");
    }
    let passing = Cached {
        key: Some(key()),
        findings: but(
            full(),
            &[
                (Feature::Hash, 12, "ENOMEM"),
                (Feature::LruHash, 1, "EPERM"),
            ],
        ),
    };
    let believed = passing.believed(&key());
    assert_eq!(believed.get(Feature::Hash), None);
    assert_eq!(believed.get(Feature::LruHash), None);
    assert_eq!(believed.get(Feature::Array), Some(&Finding::Present));
}
