//! The packet filter, and packets to other nodes.

use super::*;

/// A change to a node.
type Event = fn(&mut Observations);

/// `iptables-save` of a filter table.
fn filter(policies: &str, rules: &str) -> String {
    format!("*filter\n{policies}{rules}COMMIT\n")
}

#[test]
fn what_keeps_the_port_out() {
    use Status::{Fail, Ok, Warn};
    const ACCEPT: &str = ":INPUT ACCEPT [0:0]\n:mine - [0:0]\n";
    const DROP: &str = ":INPUT DROP [0:0]\n:FORWARD ACCEPT [0:0]\n";
    for (rules, status) in [
        ("", Fail),
        ("-A INPUT -p udp -m udp --dport 8472 -j ACCEPT\n", Ok),
        (
            "-A INPUT -p udp -m multiport --dports 53,8000:9000 -j ACCEPT\n",
            Ok,
        ),
        ("-A INPUT -p tcp -m tcp --dport 8472 -j ACCEPT\n", Fail),
        ("-A INPUT -p udp -m udp --dport 4789 -j ACCEPT\n", Fail),
        ("-A INPUT -s 192.168.77.0/24 -j ACCEPT\n", Ok),
        ("-A INPUT -s 10.0.0.0/8 -j ACCEPT\n", Fail),
        ("-A INPUT -d 192.168.77.11/32 -j ACCEPT\n", Ok),
        ("-A INPUT -i eth+ -j ACCEPT\n", Ok),
        ("-A INPUT ! -i lo -j ACCEPT\n", Ok),
        ("-A INPUT -i lo -j ACCEPT\n", Fail),
        (
            "-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n",
            Fail,
        ),
        ("-A INPUT -m comment --comment \"a b\" -j ACCEPT\n", Ok),
        ("-A INPUT -m mark --mark 0x1 -j ACCEPT\n", Warn),
        ("-A INPUT -m addrtype --dst-type LOCAL -j ACCEPT\n", Ok),
        (
            "-A INPUT -m addrtype --dst-type MULTICAST -j ACCEPT\n",
            Fail,
        ),
    ] {
        assert_only("firewall-input", status, &[], |seen| {
            seen.rules.compat = Some(filter(DROP, rules));
        });
    }
    for (rules, status) in [
        ("", Ok),
        ("-A INPUT -p udp -j DROP\n", Fail),
        (
            "-A INPUT -j REJECT --reject-with icmp-host-prohibited\n",
            Fail,
        ),
        ("-A INPUT -m mark --mark 0x8000/0x8000 -j DROP\n", Ok),
        ("-A INPUT -m conntrack --ctstate INVALID -j DROP\n", Ok),
        ("-A INPUT -j LOG --log-prefix \"-j DROP\"\n", Ok),
        ("-A INPUT -j mine\n-A mine -p udp -j DROP\n", Fail),
        (
            "-A INPUT -j mine\n-A mine -p udp -j RETURN\n-A mine -j DROP\n",
            Ok,
        ),
        ("-A INPUT -g mine\n-A INPUT -j DROP\n", Ok),
        (
            "-A INPUT -j mine\n-A mine -m mark --mark 1 -j RETURN\n-A mine -j DROP\n",
            Warn,
        ),
        // A chain that leads to itself is no chain for a kernel.
        ("-A INPUT -j mine\n-A mine -j mine\n", Ok),
    ] {
        assert_only("firewall-input", status, &[], |seen| {
            seen.rules.legacy = Some(filter(ACCEPT, rules));
        });
    }
    for (manager, fix) in [
        ("ufw", "ufw allow 8472/udp"),
        ("firewalld", "firewall-cmd --permanent --add-port=8472/udp"),
    ] {
        assert_only("firewall-input", Fail, &[fix, manager], |seen| {
            seen.rules.compat = Some(filter(DROP, ""));
            seen.rules.managers = vec![manager];
        });
    }
    // Without the rules nobody can say that all is well.
    let mut seen = healthy();
    seen.rules.unreadable = vec!["nftables rules cannot be listed: install nft".into()];
    let report = judge(&seen);
    assert_eq!(statuses(&report)["firewall-input"], Warn);
    assert_eq!(statuses(&report)["firewall-forward"], Warn);
}

#[test]
fn rules_of_nftables() {
    use Status::{Fail, Ok};
    let ruleset = |expr: &str| {
        Some(format!(
            r#"{{"nftables":[{{"chain":{{"family":"inet","table":"t","name":"in","type":"filter","hook":"input","prio":0,"policy":"drop"}}}},{{"rule":{{"family":"inet","table":"t","chain":"in","expr":{expr}}}}}]}}"#
        ))
    };
    let matching = |left: &str, right: &str| {
        format!(r#"[{{"match":{{"op":"==","left":{left},"right":{right}}}}},{{"accept":null}}]"#)
    };
    let port = r#"{"payload":{"protocol":"udp","field":"dport"}}"#;
    for (expr, status) in [
        (matching(port, "8472"), Ok),
        (matching(port, r#"{"set":[53,8472]}"#), Ok),
        (matching(port, r#"{"set":[{"range":[8000,9000]}]}"#), Ok),
        (matching(port, "4789"), Fail),
        (matching(r#"{"payload":{"protocol":"tcp","field":"dport"}}"#, "8472"), Fail),
        (matching(r#"{"payload":{"protocol":"ip","field":"saddr"}}"#, r#"{"prefix":{"addr":"192.168.77.0","len":24}}"#), Ok),
        (matching(r#"{"meta":{"key":"iifname"}}"#, r#""lo""#), Fail),
        (matching(r#"{"ct":{"key":"state"}}"#, r#"["established","related"]"#), Fail),
        (
            r#"[{"vmap":{"key":{"meta":{"key":"l4proto"}},"data":{"set":[["tcp",{"drop":null}],["udp",{"accept":null}]]}}}]"#.to_owned(),
            Ok,
        ),
    ] {
        assert_only("firewall-input", status, &[], |seen| seen.rules.nft = ruleset(&expr));
    }
    assert_only(
        "firewall-input",
        Fail,
        &["nft insert rule inet t in udp dport 8472 accept"],
        |seen| {
            seen.rules.nft = ruleset("[]");
        },
    );
    assert_only("firewall-input", Ok, &[], |seen| {
        seen.rules.nft = Some("nonsense".into());
    });
}

#[test]
fn what_keeps_pods_from_being_forwarded() {
    use Status::{Fail, Ok, Skip, Warn};
    const DROP: &str =
        ":INPUT ACCEPT [0:0]\n:FORWARD DROP [0:0]\n:DOCKER-USER - [0:0]\n:FLANNEL-FWD - [0:0]\n";
    const OURS: &str = "-A FORWARD -j FLANNEL-FWD\n-A FLANNEL-FWD -s 10.244.0.0/16 -j ACCEPT\n-A FLANNEL-FWD -d 10.244.0.0/16 -j ACCEPT\n";
    assert_only(
        "firewall-forward",
        Fail,
        &["policy DROP", "iptables -I DOCKER-USER"],
        |seen| {
            seen.rules.compat = Some(filter(DROP, ""));
        },
    );
    assert_only("firewall-forward", Ok, &[], |seen| {
        seen.rules.compat = Some(filter(DROP, OURS));
    });
    let behind = format!("-A FORWARD -i flannel.1 -j DROP\n{OURS}");
    assert_only(
        "firewall-forward",
        Fail,
        &["-i flannel.1 -j DROP"],
        |seen| {
            seen.rules.compat = Some(filter(DROP, &behind));
        },
    );
    // Only what is sent.
    let one_way = "-A FORWARD -d 10.244.1.0/24 -j ACCEPT\n";
    assert_only("firewall-forward", Fail, &["packets from pods"], |seen| {
        seen.rules.compat = Some(filter(DROP, one_way));
    });
    assert_only(
        "firewall-forward",
        Warn,
        &["--iptables-forward-rules"],
        |seen| {
            seen.rules.compat = Some(filter(DROP, ""));
            seen.agent = Agent::default();
        },
    );
    // One table accepts, another one drops: the packet is gone.
    assert_only("firewall-forward", Fail, &["nft inet f forward"], |seen| {
        seen.rules.compat = Some(filter(":FORWARD ACCEPT [0:0]\n", ""));
        seen.rules.nft = Some(
            r#"{"nftables":[{"chain":{"family":"inet","table":"f","name":"forward","type":"filter","hook":"forward","policy":"drop"}}]}"#
                .into(),
        );
    });
    let mut seen = healthy();
    seen.store.net_conf = Err(StoreTrouble::Missing("none".into()));
    seen.overlay.subnet_file = None;
    assert_eq!(statuses(&judge(&seen))["firewall-forward"], Skip);
}

#[test]
fn packets_to_peers() {
    use Status::{Fail, Ok, Skip};
    assert_only(
        "underlay",
        Fail,
        &["1 of 1 peers do not answer: 192.168.77.12"],
        |seen| {
            *probe(seen) = PeerProbe::default();
        },
    );
    assert_only(
        "underlay",
        Ok,
        &["1 answer only through the overlay"],
        |seen| probe(seen).underlay = None,
    );
    assert_only(
        "overlay",
        Fail,
        &["192.168.77.12", "UDP port 8472", "NSX"],
        |seen| {
            probe(seen).overlay = None;
            probe(seen).passes = None;
        },
    );
    assert_only(
        "path-mtu",
        Fail,
        &["192.168.77.12 1350", "\"MTU\":1400"],
        |seen| probe(seen).passes = Some(1350),
    );
    assert_only("underlay", Ok, &["no time for 3 more"], |seen| {
        seen.probes.as_mut().expect("probes").unfinished = 3;
    });
    let not: [(&str, Event); 4] = [
        ("--no-peers", |seen| seen.probes = None),
        ("CAP_NET_RAW", |seen| {
            seen.probes.as_mut().expect("probes").refused = Some("CAP_NET_RAW is missing".into());
        }),
        ("no other nodes", |seen| {
            seen.probes.as_mut().expect("probes").peers.clear();
        }),
        ("does not say who", |seen| {
            seen.probes.as_mut().expect("probes").peers.clear();
            seen.store.leases = Err("x".into());
        }),
    ];
    for (word, change) in not {
        let mut seen = healthy();
        change(&mut seen);
        let report = judge(&seen);
        for name in ["underlay", "overlay", "path-mtu"] {
            let finding = report.checks.iter().find(|one| one.name == name);
            let finding = finding.expect("the check");
            assert_eq!(finding.status, Skip);
            assert!(finding.found.contains(word), "{finding:?}");
        }
    }
}

#[test]
fn without_the_store_the_device_says_who_the_peers_are() {
    let mut seen = healthy();
    let base = Ipv4Addr::new(10, 244, 2, 0);
    assert_eq!(targets(&seen), [(PEER, base.into())].into());
    seen.store.leases = Err("x".into());
    assert_eq!(targets(&seen), [(PEER, base.into())].into());
    device(&mut seen).fdb.clear();
    assert_eq!(targets(&seen), BTreeMap::new());
}
