use std::time::Duration;

use super::devices::{Filter, Role};
use super::learning::{Tally, cannot_learn};
use super::*;

mod family;
mod never_panics;
mod nft_rules;
mod other_family;
mod rules;

use family::{At, V4, V6, both};

const KUBE_PROXY: &str = include_str!("fixtures/kube-proxy.iptables");
const KUBE_PROXY_NFT: &str = include_str!("fixtures/kube-proxy.nft.json");
const DOCKER: &str = include_str!("fixtures/docker.iptables");
const PORTMAP: &str = include_str!("fixtures/portmap.iptables");
const NODE_LOCAL_DNS: &str = include_str!("fixtures/nodelocaldns.iptables");
const CALICO: &str = include_str!("fixtures/calico.iptables");
const KUBE_ROUTER: &str = include_str!("fixtures/kube-router.iptables");
const UFW: &str = include_str!("fixtures/ufw.iptables");
const FIREWALLD: &str = include_str!("fixtures/firewalld.nft.json");
const POLICIES: &str = include_str!("fixtures/kube-network-policies.nft.json");
const QUEUE_FIRST: &str = include_str!("fixtures/queue-first.nft.json");

#[test]
fn sysctls_stop_every_choice() {
    let closed = |change: fn(&mut Sysctls)| {
        let mut signals = V4.signals(Firewall::default());
        change(&mut signals.sysctls);
        signals
    };
    for choice in [Choice::Auto, Choice::Established, Choice::Syn] {
        let signals = closed(|sysctls| {
            sysctls.be_liberal.value = Some(0);
            sysctls.be_liberal.error = Some("Read-only file system (os error 30)".to_owned());
        });
        let decision = decide(choice, &signals);
        assert_eq!(decision.mode, GateMode::Off);
        assert_eq!(
            decision.reason,
            "net.netfilter.nf_conntrack_tcp_be_liberal is 0 and cannot be set: Read-only file system (os error 30); it must be 1"
        );
        let signals = closed(|sysctls| sysctls.ignore_invalid_rst.value = None);
        assert_eq!(decide(choice, &signals).mode, GateMode::Off);
    }
    // Without connection tracking nothing can be called invalid.
    let untracked = closed(|sysctls| {
        sysctls.tracking = false;
        sysctls.be_liberal.value = None;
        sysctls.ignore_invalid_rst.value = None;
        sysctls.loose.value = None;
    });
    assert_eq!(decide(Choice::Auto, &untracked).mode, GateMode::Established);
    assert_eq!(decide(Choice::Syn, &untracked).mode, GateMode::Syn);
}

#[test]
fn strict_tracking_refuses_syn() {
    let mut signals = V4.signals(Firewall::default());
    signals.sysctls.loose.value = Some(0);
    let decision = decide(Choice::Syn, &signals);
    assert_eq!(decision.mode, GateMode::Established);
    assert!(decision.reason.contains("nf_conntrack_tcp_loose"));
    let auto = decide(Choice::Auto, &signals);
    assert_eq!(auto.mode, GateMode::Established);
    assert!(auto.reason.contains("nf_conntrack_tcp_loose"));
}

#[test]
fn off_and_missing_support_are_said() {
    let mut signals = V4.signals(Firewall::default());
    assert_eq!(decide(Choice::Off, &signals).reason, "switched off");
    signals.unsupported = Some("no eBPF".to_owned());
    for choice in [Choice::Auto, Choice::Established, Choice::Syn] {
        let decision = decide(choice, &signals);
        assert_eq!(
            (decision.mode, decision.reason.as_str()),
            (GateMode::Off, "no eBPF")
        );
    }
}

#[test]
fn what_cannot_be_listed_stops_auto() {
    let mut signals = V4.signals(Firewall::default());
    signals.unreadable = vec!["nftables rules cannot be listed: install nft".to_owned()];
    let decision = decide(Choice::Auto, &signals);
    assert_eq!(decision.mode, GateMode::Off);
    assert!(decision.reason.contains("install nft"));
    assert_eq!(
        decide(Choice::Established, &signals).mode,
        GateMode::Established
    );
}

#[test]
fn shaping_costs_one_pod_or_all() {
    let mut signals = V4.signals(Firewall::default());
    let pod = IfIndex::try_from(7).expect("index");
    let shaped = |role, qdisc: &str| Device {
        qdiscs: vec![qdisc.to_owned()],
        ..device("veth1", role)
    };
    for qdisc in ["tbf", "htb", "netem", "cake", "hfsc"] {
        signals.devices = BTreeMap::from([(pod, shaped(Role::Pod, qdisc))]);
        let decision = decide(Choice::Auto, &signals);
        assert_eq!(decision.mode, GateMode::Established);
        assert_eq!(decision.excluded[&pod], format!("qdisc {qdisc} on veth1"));
        assert!(decision.holds_back(pod));
        signals.devices = BTreeMap::from([(pod, shaped(Role::Shared, qdisc))]);
        let decision = decide(Choice::Auto, &signals);
        assert_eq!(decision.mode, GateMode::Off);
        assert_eq!(decision.reason, format!("qdisc {qdisc} on veth1"));
    }
    for qdisc in ["noqueue", "fq_codel", "clsact", "ingress"] {
        signals.devices = BTreeMap::from([(pod, shaped(Role::Pod, qdisc))]);
        let decision = decide(Choice::Auto, &signals);
        assert_eq!(decision.excluded, BTreeMap::new());
        assert!(!decision.holds_back(pod));
        let unseen = IfIndex::try_from(8).expect("index");
        assert!(decision.holds_back(unseen), "nobody has looked at it");
    }
    // Where nothing can be looked at and that does not matter, nobody waits for it.
    signals.unreadable = vec!["traffic control".to_owned()];
    assert!(
        !decide(Choice::Established, &signals).holds_back(IfIndex::try_from(8).expect("index"))
    );
}

#[test]
fn filters_that_may_police_cost_the_pod_and_programs_cost_syn() {
    let mut signals = V4.signals(Firewall::default());
    let pod = IfIndex::try_from(7).expect("index");
    let filtered = |kind: &str, direct| Device {
        filters: vec![Filter {
            side: "ingress",
            kind: kind.to_owned(),
            direct,
        }],
        ..device("veth1", Role::Pod)
    };
    for (kind, direct) in [("u32", false), ("flower", false), ("bpf", false)] {
        signals.devices = BTreeMap::from([(pod, filtered(kind, direct))]);
        let decision = decide(Choice::Auto, &signals);
        assert!(decision.excluded[&pod].contains(kind));
    }
    signals.devices = BTreeMap::from([(pod, filtered("bpf", true))]);
    let decision = decide(Choice::Syn, &signals);
    assert_eq!(decision.mode, GateMode::Established);
    assert_eq!(decision.excluded, BTreeMap::new());
    assert!(
        decision
            .reason
            .contains("clsact program at ingress of veth1")
    );
    signals.devices = BTreeMap::from([(
        pod,
        Device {
            programs: vec!["spy at egress".to_owned()],
            ..device("veth1", Role::Pod)
        },
    )]);
    assert!(
        decide(Choice::Syn, &signals)
            .reason
            .contains("tcx program spy at egress of veth1")
    );
}

#[test]
fn learning_is_missed_only_where_somebody_is_in_the_way() {
    let index = IfIndex::try_from(7).expect("index");
    let innocent = BTreeMap::from([(index, device("veth1", Role::Pod))]);
    let mut guilty = innocent.clone();
    guilty.get_mut(&index).expect("device").filters = vec![Filter {
        side: "egress",
        kind: "bpf".to_owned(),
        direct: true,
    }];
    let tally = |tagged, confirmed| Tally { tagged, confirmed };
    let none = tally(0, 0);
    assert_eq!(
        cannot_learn(none, tally(1001, 0), &guilty).as_deref(),
        Some("flow gate cannot learn on veth1: a clsact program there returns OK")
    );
    assert_eq!(cannot_learn(none, tally(1001, 0), &innocent), None);
    assert_eq!(cannot_learn(none, tally(1000, 0), &guilty), None);
    assert_eq!(cannot_learn(none, tally(1001, 1), &guilty), None);
    // Maps made anew count from zero.
    assert_eq!(cannot_learn(tally(5000, 3), tally(10, 0), &guilty), None);
}

#[test]
fn it_goes_down_at_once_and_up_after_a_while() {
    let at = Duration::from_secs;
    let decision = |mode: GateMode, fingerprint| Decision {
        mode,
        reason: mode.to_string(),
        excluded: BTreeMap::new(),
        judged: None,
        fingerprint,
    };
    let mut settled = Settled::new(decision(GateMode::Syn, 1));
    let down = settled.offer(at(1), decision(GateMode::Off, 2)).clone();
    assert_eq!(down, decision(GateMode::Off, 2));
    let held = settled
        .offer(at(2), decision(GateMode::Established, 1))
        .clone();
    assert_eq!((held.mode, held.reason.as_str()), (GateMode::Off, "off"));
    // A change meanwhile begins the wait anew.
    let mode = settled
        .offer(at(11), decision(GateMode::Established, 3))
        .mode;
    assert_eq!(mode, GateMode::Off);
    let mode = settled
        .offer(at(20), decision(GateMode::Established, 3))
        .mode;
    assert_eq!(mode, GateMode::Off);
    let up = settled
        .offer(at(21), decision(GateMode::Established, 3))
        .clone();
    assert_eq!(up, decision(GateMode::Established, 3));
}

#[test]
fn a_pod_is_excluded_at_once_and_let_back_after_a_while() {
    let at = Duration::from_secs;
    let pod = IfIndex::try_from(7).expect("index");
    let plain = decide(Choice::Auto, &V4.signals(Firewall::default()));
    let mut shaped = plain.clone();
    shaped.excluded.insert(pod, "qdisc tbf on veth1".to_owned());
    let mut settled = Settled::new(plain.clone());
    assert_eq!(settled.offer(at(1), shaped.clone()), &shaped);
    assert_eq!(settled.offer(at(2), plain.clone()), &shaped);
    assert_eq!(settled.offer(at(12), plain.clone()), &plain);
}

#[test]
fn choices_are_the_words_of_the_flag() {
    for choice in Choice::ALL {
        assert_eq!(choice.as_str().parse(), Ok(choice));
        let json = serde_json::to_string(&choice).expect("serialize");
        assert_eq!(json, format!("\"{choice}\""));
    }
    assert!("Auto".parse::<Choice>().is_err());
}

fn device(name: &str, role: Role) -> Device {
    Device {
        name: name.to_owned(),
        role,
        qdiscs: Vec::new(),
        filters: Vec::new(),
        programs: Vec::new(),
        unreadable: None,
    }
}
