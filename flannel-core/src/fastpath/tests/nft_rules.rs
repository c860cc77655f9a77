//! Rules of nftables itself, in either family.

use super::*;
use crate::addr::Family;

#[test]
fn a_queue_before_established_connections_are_let_go_stops_auto() {
    both(|at| {
        let decision = decide(Choice::Auto, &at.signals(at.nft(QUEUE_FIRST)));
        assert_eq!(decision.mode, GateMode::Off);
        assert!(decision.reason.starts_with("queue in chain postrouting"));
    });
}

#[test]
fn nft_statements_are_told_apart() {
    both(|at| {
        let one = |expression: &str| at.judge(&at.nft_rule("ip", "forward", expression));
        for (expression, what) in [
            (r#"{"counter": "pods"}"#, "counter"),
            (
                r#"{"quota": {"val": 3, "val_unit": "mbytes", "used": 9}}, {"drop": null}"#,
                "quota",
            ),
            (r#"{"quota": "q"}, {"drop": null}"#, "quota"),
            (
                r#"{"limit": {"rate": 10, "per": "second"}}, {"accept": null}"#,
                "limit",
            ),
            (
                r#"{"mangle": {"key": {"payload": {"protocol": "ip", "field": "dscp"}}, "value": "cs1"}}"#,
                "dscp",
            ),
            (
                r#"{"mangle": {"key": {"meta": {"key": "priority"}}, "value": "1:2"}}"#,
                "priority",
            ),
            (
                r#"{"mangle": {"key": {"meta": {"key": "mark"}}, "value": 1}}"#,
                "mark",
            ),
            (r#"{"dup": {"addr": "192.0.2.1"}}"#, "dup"),
            (r#"{"tproxy": {"port": 1}}"#, "tproxy"),
            (r#"{"xt": {"type": "match", "name": "quota"}}"#, "xtables"),
            (
                r#"{"set": {"op": "add", "elem": 1, "set": "@s", "stmt": [{"limit": {"rate": 1}}]}}"#,
                "meter",
            ),
        ] {
            let judged = one(expression);
            assert_eq!(judged.per_packet.len(), 1, "{expression}");
            assert!(
                judged.per_packet[0].starts_with(what) || judged.per_packet[0].contains(what),
                "{judged:?}"
            );
        }
        for expression in [
            r#"{"counter": {"packets": 1, "bytes": 2}}"#,
            r#"{"log": {"prefix": "x"}}, {"limit": {"rate": 1, "per": "second"}}"#,
            r#"{"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": "new"}}, {"limit": {"rate": 1}}, {"drop": null}"#,
            r#"{"match": {"op": "==", "left": {"meta": {"key": "nfproto"}}, "right": "ipv6"}}, {"quota": "q"}"#,
            r#"{"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": {"set": ["docker0", "br-*"]}}}, {"quota": "q"}"#,
            r#"{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "daddr"}}, "right": {"prefix": {"addr": "10.96.0.0", "len": 12}}}}, {"quota": "q"}"#,
            r#"{"match": {"op": "==", "left": {"fib": {"result": "type", "flags": ["daddr"]}}, "right": "local"}}, {"quota": "q"}"#,
            r#"{"mangle": {"key": {"tcp option": {"name": "maxseg", "field": "size"}}, "value": {"rt": {"key": "mtu"}}}}"#,
        ] {
            assert_eq!(one(expression).per_packet, [""; 0], "{expression}");
        }
        for family in ["ip6", "arp"] {
            let judged = at.judge(&at.nft_rule(family, "forward", r#"{"quota": "q"}"#));
            assert_eq!(judged, at.judge(&Firewall::default()), "{family}");
        }
        for (family, hook) in [
            ("bridge", "forward"),
            ("inet", "prerouting"),
            ("inet", "postrouting"),
        ] {
            let judged = at.judge(&at.nft_rule(family, hook, r#"{"quota": "q"}"#));
            assert_eq!(judged.per_packet.len(), 1, "{family} {hook}");
        }
        assert_eq!(
            at.judge(&at.nft_rule("inet", "input", r#"{"quota": "q"}"#))
                .per_packet,
            [""; 0]
        );
    });
}

#[test]
fn netdev_chains_count_on_devices_of_pods_and_the_uplink() {
    both(|at| {
        for (device, counts) in [
            ("eth0", true),
            ("veth1", true),
            ("cni0", true),
            ("eth7", false),
        ] {
            let dump = at.nft_rule("netdev", "ingress", r#"{"quota": "q"}"#);
            let mut firewall = dump;
            for chain in &mut firewall.chains {
                if let Some(base) = &mut chain.base {
                    base.device = Some(device.to_owned());
                }
            }
            assert_eq!(
                !at.judge(&firewall).per_packet.is_empty(),
                counts,
                "{device}"
            );
        }
    });
}

#[test]
fn tables_of_iptables_nft_are_read_once() {
    both(|at| {
        let dump = r#"{"nftables": [{"table": {"family": "ip", "name": "filter"}},
        {"chain": {"family": "ip", "table": "filter", "name": "FORWARD", "type": "filter", "hook": "forward", "prio": 0, "policy": "accept"}},
        {"rule": {"family": "ip", "table": "filter", "chain": "FORWARD", "expr": [{"xt": {"type": "match", "name": "quota"}}, {"accept": null}]}}]}"#;
        let written = dump;
        let dump = at.turned_json(written);
        assert_eq!(nft::tables(&dump, at.0), Ok(vec!["filter".to_owned()]));
        let other = if at.0 == Family::V4 {
            Family::V6
        } else {
            Family::V4
        };
        assert_eq!(nft::tables(&dump, other), Ok(Vec::new()));
        let there = std::collections::BTreeSet::from(["filter".to_owned()]);
        assert_eq!(nft::parse(&dump, at.0, &there), Ok(Vec::new()));
        assert_eq!(at.nft(written).chains.len(), 1);
        assert!(nft::parse("{}", at.0, &there).is_err());
        assert!(nft::parse("nonsense", at.0, &there).is_err());
    });
}
