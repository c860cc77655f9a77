use std::time::Duration;

use super::devices::{Filter, Role};
use super::firewall::Judgement;
use super::learning::{Tally, cannot_learn};
use super::*;

mod never_panics;
mod nft_rules;

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
fn what_kubernetes_and_docker_make_leaves_everything_possible() {
    for (name, dump) in [
        ("kube-proxy", KUBE_PROXY),
        ("docker", DOCKER),
        ("portmap", PORTMAP),
        ("node-local DNS", NODE_LOCAL_DNS),
    ] {
        let judged = judge(&iptables(dump));
        assert_eq!(judged.per_packet, [""; 0], "{name}");
        assert_eq!(judged.filters, [""; 0], "{name}");
        assert_eq!(mode(Choice::Syn, iptables(dump)), GateMode::Syn, "{name}");
        assert_eq!(
            mode(Choice::Auto, iptables(dump)),
            GateMode::Established,
            "{name}"
        );
    }
    let judged = judge(&nft(KUBE_PROXY_NFT));
    assert_eq!(judged.per_packet, [""; 0]);
    assert_eq!(judged.filters, [""; 0]);
}

#[test]
fn policies_leave_established_and_refuse_syn() {
    for (who, firewall) in [
        ("Calico", iptables(CALICO)),
        ("kube-router", iptables(KUBE_ROUTER)),
        ("ufw", iptables(UFW)),
        ("filter_FORWARD", nft(FIREWALLD)),
        ("kube-network-policies", nft(POLICIES)),
    ] {
        let auto = decide(Choice::Auto, &signals(firewall.clone()));
        assert_eq!(auto.mode, GateMode::Established, "{who}: {}", auto.reason);
        let syn = decide(Choice::Syn, &signals(firewall));
        assert_eq!(syn.mode, GateMode::Established, "{who}");
        assert!(
            syn.reason.starts_with("syn was asked for, but "),
            "{}",
            syn.reason
        );
        assert!(syn.reason.contains(who) || who == "ufw", "{}", syn.reason);
    }
}

#[test]
fn rules_for_every_packet_stop_auto() {
    for rule in [
        "-A FORWARD -m quota --quota 1000000 -j ACCEPT",
        "-A FORWARD -m limit --limit 1000/sec -j ACCEPT",
        "-A FORWARD -s 10.244.1.7/32 -m hashlimit --hashlimit-above 1/sec --hashlimit-name x -j DROP",
        "-A FORWARD -m connbytes --connbytes 1000000: --connbytes-dir both --connbytes-mode bytes -j DROP",
        "-A FORWARD -m nfacct --nfacct-name pods",
        "-A FORWARD -m statistic --mode random --probability 0.1 -j DROP",
        "-A FORWARD -j DSCP --set-dscp 0x2e",
        "-A FORWARD -j TTL --ttl-set 64",
        "-A FORWARD -j MARK --set-xmark 0x1/0xffffffff",
        "-A FORWARD -j CLASSIFY --set-class 1:10",
        "-A FORWARD -j TEE --gateway 192.0.2.1",
        "-A FORWARD -j NFQUEUE --queue-num 3 --queue-bypass",
        "-A FORWARD -i cni0 -j TOS --set-tos 0x10/0x3f",
        "-A FORWARD -j SOMETHING-NEW",
    ] {
        let judged = judge(&forward(&[rule]));
        assert_eq!(judged.per_packet.len(), 1, "{rule}");
        assert!(judged.per_packet[0].contains(rule), "{judged:?}");
        let auto = decide(Choice::Auto, &signals(forward(&[rule])));
        assert_eq!(auto.mode, GateMode::Off, "{rule}");
        assert!(auto.reason.contains(rule), "{}", auto.reason);
        assert_eq!(mode(Choice::Syn, forward(&[rule])), GateMode::Off, "{rule}");
        let asked = decide(Choice::Established, &signals(forward(&[rule])));
        assert_eq!(asked.mode, GateMode::Established);
        assert!(asked.reason.starts_with("asked for, although "));
        assert!(asked.reason.contains(rule), "{}", asked.reason);
    }
}

#[test]
fn rules_that_need_not_see_every_packet_do_not() {
    for rules in [
        &["-A FORWARD -p tcp -m tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu"][..],
        &["-A FORWARD -m conntrack --ctstate NEW -m limit --limit 3/sec -j ACCEPT"],
        &[
            "-A FORWARD -m conntrack ! --ctstate RELATED,ESTABLISHED -m limit --limit 3/sec -j ACCEPT",
        ],
        &["-A FORWARD -m limit --limit 3/min -j LOG --log-prefix \"x -j DSCP \""],
        &["-A FORWARD -m state --state NEW -j NFQUEUE --queue-num 3"],
        &[
            "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            "-A FORWARD -m quota --quota 1 -j ACCEPT",
            "-A FORWARD -j NFQUEUE --queue-num 3",
        ],
        &["-A FORWARD -i docker0 -m quota --quota 1 -j ACCEPT"],
        &["-A FORWARD -o eth0 -j DSCP --set-dscp 0x2e"],
        &["-A FORWARD -s 172.20.0.0/16 -j TTL --ttl-set 3"],
        &["-A FORWARD ! -d 10.0.0.0/8 -j MARK --set-xmark 0x1/0x1"],
    ] {
        assert_eq!(judge(&forward(rules)).per_packet, [""; 0], "{rules:?}");
    }
    // An acceptance with conditions leaves some packets to the next rule.
    let judged = judge(&forward(&[
        "-A FORWARD -p tcp -m conntrack --ctstate ESTABLISHED -j ACCEPT",
        "-A FORWARD -j NFQUEUE --queue-num 3",
    ]));
    assert_eq!(judged.per_packet.len(), 1);
}

#[test]
fn anything_that_filters_or_translates_pods_refuses_syn_by_name() {
    for rule in [
        "-A FORWARD -s 10.244.1.7/32 -p tcp -m tcp --dport 80 -j DROP",
        "-A FORWARD -j REJECT --reject-with icmp-port-unreachable",
        "-A PREROUTING -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.244.1.9:8080",
        "-A PREROUTING -d 10.244.0.0/16 -p tcp -j REDIRECT --to-ports 15001",
        "-A POSTROUTING -s 10.244.0.0/16 -j MASQUERADE",
    ] {
        let dump = if rule.contains("FORWARD") {
            forward(&[rule])
        } else {
            table(
                "nat",
                &[
                    ":PREROUTING ACCEPT [0:0]",
                    ":POSTROUTING ACCEPT [0:0]",
                    rule,
                ],
            )
        };
        let decision = decide(Choice::Syn, &signals(dump.clone()));
        assert_eq!(decision.mode, GateMode::Established, "{rule}");
        assert!(decision.reason.contains(rule), "{}", decision.reason);
        assert_eq!(mode(Choice::Auto, dump), GateMode::Established, "{rule}");
    }
}

#[test]
fn a_policy_of_drop_refuses_syn_unless_pods_are_let_through() {
    let drops = ":FORWARD DROP [0:0]";
    let accept = "-A FORWARD -s 10.244.0.0/16 -j ACCEPT";
    assert_eq!(
        mode(Choice::Syn, table("filter", &[drops])),
        GateMode::Established
    );
    assert_eq!(
        mode(Choice::Syn, table("filter", &[drops, accept])),
        GateMode::Syn
    );
    let narrow = "-A FORWARD -s 10.244.1.0/24 -j ACCEPT";
    assert_eq!(
        mode(Choice::Syn, table("filter", &[drops, narrow])),
        GateMode::Established
    );
}

#[test]
fn sysctls_stop_every_choice() {
    let closed = |change: fn(&mut Sysctls)| {
        let mut signals = signals(Firewall::default());
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
    let mut signals = signals(Firewall::default());
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
    let mut signals = signals(Firewall::default());
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
    let mut signals = signals(Firewall::default());
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
    let mut signals = signals(Firewall::default());
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
    let mut signals = signals(Firewall::default());
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
fn the_fingerprint_follows_what_filters_and_nothing_else() {
    let of = |firewall: Firewall| decide(Choice::Auto, &signals(firewall)).fingerprint;
    let before = of(iptables(KUBE_PROXY));
    assert_eq!(of(iptables(&KUBE_PROXY.replace("9301:", "9999:"))), before);
    // Another Service is nothing to connections between pods.
    let service = KUBE_PROXY.replace("10.96.0.80", "10.96.0.81");
    assert_eq!(of(iptables(&service)), before);
    let rule = "-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD";
    let dropped = KUBE_PROXY.replace(
        rule,
        &format!("{rule}\n-A FORWARD -d 10.244.1.9/32 -j DROP"),
    );
    assert_ne!(of(iptables(&dropped)), before);
    let other = dropped.replace("1.9/32", "1.8/32");
    assert_ne!(of(iptables(&dropped)), of(iptables(&other)));
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
    let plain = decide(Choice::Auto, &signals(Firewall::default()));
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

fn place() -> Place {
    Place {
        network: "10.244.0.0/16".parse().expect("network"),
        devices: ["cni0", "flannel.1", "veth1"].map(str::to_owned).into(),
        own: [std::net::Ipv4Addr::new(10, 244, 1, 1)].into(),
        uplink: "eth0".to_owned(),
    }
}

fn iptables(dump: &str) -> Firewall {
    Firewall {
        chains: iptables::parse(dump, "legacy"),
    }
}

fn nft(dump: &str) -> Firewall {
    let none = std::collections::BTreeSet::new();
    Firewall {
        chains: nft::parse(dump, &none).expect("a dump of nft"),
    }
}

fn table(name: &str, lines: &[&str]) -> Firewall {
    iptables(&format!("*{name}\n{}\nCOMMIT\n", lines.join("\n")))
}

fn forward(rules: &[&str]) -> Firewall {
    let lines: Vec<&str> = std::iter::once(":FORWARD ACCEPT [1:2]")
        .chain(rules.iter().copied())
        .collect();
    table("mangle", &lines)
}

fn nft_rule(family: &str, hook: &str, expressions: &str) -> Firewall {
    nft(&format!(
        r#"{{"nftables": [{{"chain": {{"family": "{family}", "table": "t", "name": "c", "type": "filter", "hook": "{hook}", "prio": 0, "policy": "accept"}}}},
        {{"rule": {{"family": "{family}", "table": "t", "chain": "c", "expr": [{expressions}]}}}}]}}"#
    ))
}

fn judge(firewall: &Firewall) -> Judgement {
    firewall.judge(&place())
}

fn mode(choice: Choice, firewall: Firewall) -> GateMode {
    decide(choice, &signals(firewall)).mode
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

fn signals(firewall: Firewall) -> Signals {
    let sysctl = |name| Sysctl {
        name,
        value: Some(1),
        error: None,
    };
    Signals {
        unsupported: None,
        place: place(),
        sysctls: Sysctls {
            tracking: true,
            be_liberal: sysctl("nf_conntrack_tcp_be_liberal"),
            ignore_invalid_rst: sysctl("nf_conntrack_tcp_ignore_invalid_rst"),
            loose: sysctl("nf_conntrack_tcp_loose"),
        },
        firewall,
        devices: BTreeMap::new(),
        unreadable: Vec::new(),
    }
}
