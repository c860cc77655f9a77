//! What the rules of iptables and of others mean to the gate, in either family.

use super::*;

#[test]
fn what_kubernetes_and_docker_make_leaves_everything_possible() {
    both(|at| {
        for (name, dump) in [
            ("kube-proxy", KUBE_PROXY),
            ("docker", DOCKER),
            ("portmap", PORTMAP),
            ("node-local DNS", NODE_LOCAL_DNS),
        ] {
            let judged = at.judge(&at.iptables(dump));
            assert_eq!(judged.per_packet, [""; 0], "{name}");
            assert_eq!(judged.filters, [""; 0], "{name}");
            assert_eq!(
                at.mode(Choice::Syn, at.iptables(dump)),
                GateMode::Syn,
                "{name}"
            );
            assert_eq!(
                at.mode(Choice::Auto, at.iptables(dump)),
                GateMode::Established,
                "{name}"
            );
        }
        let judged = at.judge(&at.nft(KUBE_PROXY_NFT));
        assert_eq!(judged.per_packet, [""; 0]);
        assert_eq!(judged.filters, [""; 0]);
    });
}

#[test]
fn policies_leave_established_and_refuse_syn() {
    both(|at| {
        for (who, firewall) in [
            ("Calico", at.iptables(CALICO)),
            ("kube-router", at.iptables(KUBE_ROUTER)),
            ("ufw", at.iptables(UFW)),
            ("filter_FORWARD", at.nft(FIREWALLD)),
            ("kube-network-policies", at.nft(POLICIES)),
        ] {
            let auto = decide(Choice::Auto, &at.signals(firewall.clone()));
            assert_eq!(auto.mode, GateMode::Established, "{who}: {}", auto.reason);
            let syn = decide(Choice::Syn, &at.signals(firewall));
            assert_eq!(syn.mode, GateMode::Established, "{who}");
            assert!(
                syn.reason.starts_with("syn was asked for, but "),
                "{}",
                syn.reason
            );
            assert!(syn.reason.contains(who) || who == "ufw", "{}", syn.reason);
        }
    });
}

#[test]
fn rules_for_every_packet_stop_auto() {
    both(|at| {
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
            let rule = at.turned(rule);
            let rule = rule.as_str();
            let judged = at.judge(&at.forward(&[rule]));
            assert_eq!(judged.per_packet.len(), 1, "{rule}");
            assert!(judged.per_packet[0].contains(rule), "{judged:?}");
            let auto = decide(Choice::Auto, &at.signals(at.forward(&[rule])));
            assert_eq!(auto.mode, GateMode::Off, "{rule}");
            assert!(auto.reason.contains(rule), "{}", auto.reason);
            assert_eq!(
                at.mode(Choice::Syn, at.forward(&[rule])),
                GateMode::Off,
                "{rule}"
            );
            let asked = decide(Choice::Established, &at.signals(at.forward(&[rule])));
            assert_eq!(asked.mode, GateMode::Established);
            assert!(asked.reason.starts_with("asked for, although "));
            assert!(asked.reason.contains(rule), "{}", asked.reason);
        }
    });
}

#[test]
fn rules_that_need_not_see_every_packet_do_not() {
    both(|at| {
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
            assert_eq!(
                at.judge(&at.forward(rules)).per_packet,
                [""; 0],
                "{rules:?}"
            );
        }
        // An acceptance with conditions leaves some packets to the next rule.
        let judged = at.judge(&at.forward(&[
            "-A FORWARD -p tcp -m conntrack --ctstate ESTABLISHED -j ACCEPT",
            "-A FORWARD -j NFQUEUE --queue-num 3",
        ]));
        assert_eq!(judged.per_packet.len(), 1);
    });
}

#[test]
fn anything_that_filters_or_translates_pods_refuses_syn_by_name() {
    both(|at| {
        for rule in [
            "-A FORWARD -s 10.244.1.7/32 -p tcp -m tcp --dport 80 -j DROP",
            "-A FORWARD -j REJECT --reject-with icmp-port-unreachable",
            "-A PREROUTING -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.244.1.9:8080",
            "-A PREROUTING -d 10.244.0.0/16 -p tcp -j REDIRECT --to-ports 15001",
            "-A POSTROUTING -s 10.244.0.0/16 -j MASQUERADE",
        ] {
            let rule = at.turned(rule);
            let rule = rule.as_str();
            let dump = if rule.contains("FORWARD") {
                at.forward(&[rule])
            } else {
                at.table(
                    "nat",
                    &[
                        ":PREROUTING ACCEPT [0:0]",
                        ":POSTROUTING ACCEPT [0:0]",
                        rule,
                    ],
                )
            };
            let decision = decide(Choice::Syn, &at.signals(dump.clone()));
            assert_eq!(decision.mode, GateMode::Established, "{rule}");
            assert!(decision.reason.contains(rule), "{}", decision.reason);
            assert_eq!(at.mode(Choice::Auto, dump), GateMode::Established, "{rule}");
        }
    });
}

#[test]
fn a_policy_of_drop_refuses_syn_unless_pods_are_let_through() {
    both(|at| {
        let drops = ":FORWARD DROP [0:0]";
        let accept = "-A FORWARD -s 10.244.0.0/16 -j ACCEPT";
        assert_eq!(
            at.mode(Choice::Syn, at.table("filter", &[drops])),
            GateMode::Established
        );
        assert_eq!(
            at.mode(Choice::Syn, at.table("filter", &[drops, accept])),
            GateMode::Syn
        );
        let narrow = "-A FORWARD -s 10.244.1.0/24 -j ACCEPT";
        assert_eq!(
            at.mode(Choice::Syn, at.table("filter", &[drops, narrow])),
            GateMode::Established
        );
    });
}

#[test]
fn the_fingerprint_follows_what_filters_and_nothing_else() {
    both(|at| {
        let of = |firewall: Firewall| decide(Choice::Auto, &at.signals(firewall)).fingerprint;
        let before = of(at.iptables(KUBE_PROXY));
        assert_eq!(
            of(at.iptables(&KUBE_PROXY.replace("9301:", "9999:"))),
            before
        );
        // Another Service is nothing to connections between pods.
        let service = KUBE_PROXY.replace("10.96.0.80", "10.96.0.81");
        assert_eq!(of(at.iptables(&service)), before);
        let rule = "-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD";
        let dropped = KUBE_PROXY.replace(
            rule,
            &format!("{rule}\n-A FORWARD -d 10.244.1.9/32 -j DROP"),
        );
        assert_ne!(of(at.iptables(&dropped)), before);
        let other = dropped.replace("1.9/32", "1.8/32");
        assert_ne!(of(at.iptables(&dropped)), of(at.iptables(&other)));
    });
}
