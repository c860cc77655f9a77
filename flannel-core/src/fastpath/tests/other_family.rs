//! Rules of the one family are none to packets of the other, and what cannot be told keeps the gate shut.

use super::*;
use crate::addr::Family;

/// A rule that would stop the gate, with this condition in front.
fn stops(at: At, family: &str, condition: &str) -> bool {
    let dump = format!(
        r#"{{"nftables": [{{"chain": {{"family": "{family}", "table": "t", "name": "c", "type": "filter", "hook": "forward", "prio": 0, "policy": "accept"}}}},
        {{"rule": {{"family": "{family}", "table": "t", "chain": "c", "expr": [{condition}, {{"quota": "q"}}]}}}}]}}"#
    );
    let chains = nft::parse(&dump, at.0, &std::collections::BTreeSet::new()).expect("a dump");
    !at.judge(&Firewall { chains }).per_packet.is_empty()
}

fn matching(left: &str, op: &str, right: &str) -> String {
    format!(r#"{{"match": {{"op": "{op}", "left": {left}, "right": {right}}}}}"#)
}

fn meta(key: &str) -> String {
    format!(r#"{{"meta": {{"key": "{key}"}}}}"#)
}

fn payload(protocol: &str, field: &str) -> String {
    format!(r#"{{"payload": {{"protocol": "{protocol}", "field": "{field}"}}}}"#)
}

#[test]
fn a_rule_for_one_family_is_none_for_the_other() {
    let cases = [
        // Condition, whether it can hold for IPv4, and for IPv6.
        (matching(&meta("nfproto"), "==", "\"ipv4\""), true, false),
        (matching(&meta("nfproto"), "==", "\"ipv6\""), false, true),
        (matching(&meta("protocol"), "==", "\"ip\""), true, false),
        (matching(&meta("protocol"), "==", "\"ip6\""), false, true),
        (
            matching(&meta("protocol"), "==", r#"{"set": ["arp", "ip6"]}"#),
            false,
            true,
        ),
        (
            matching(&meta("protocol"), "==", r#"{"set": ["ip", "ip6"]}"#),
            true,
            true,
        ),
        (
            matching(&payload("ether", "type"), "==", "\"ip\""),
            true,
            false,
        ),
        (
            matching(&payload("ether", "type"), "==", "\"arp\""),
            false,
            false,
        ),
        (
            matching(&payload("icmp", "type"), "==", "\"echo-request\""),
            true,
            false,
        ),
        (
            matching(&payload("icmpv6", "type"), "==", "\"echo-request\""),
            false,
            true,
        ),
        (matching(&payload("ip", "ttl"), "!=", "1"), true, false),
        (
            matching(&payload("ip6", "hoplimit"), "!=", "1"),
            false,
            true,
        ),
        (
            matching(&payload("ip6", "saddr"), "!=", "\"2001:db8::1\""),
            false,
            true,
        ),
        (
            matching(&payload("ip", "saddr"), "!=", "\"192.0.2.1\""),
            true,
            false,
        ),
        (matching(&payload("tcp", "dport"), "==", "80"), true, true),
        (
            matching(
                &format!(
                    r#"{{"concat": [{}, {}]}}"#,
                    payload("ip6", "daddr"),
                    payload("tcp", "dport")
                ),
                "==",
                "\"@s\"",
            ),
            false,
            true,
        ),
    ];
    for (condition, four, six) in &cases {
        for family in ["inet", "bridge", "netdev"] {
            assert_eq!(
                stops(V4, family, condition),
                *four,
                "IPv4 {family}: {condition}"
            );
            assert_eq!(
                stops(V6, family, condition),
                *six,
                "IPv6 {family}: {condition}"
            );
        }
    }
    for (family, four, six) in [
        ("ip", true, false),
        ("ip6", false, true),
        ("arp", false, false),
    ] {
        let everything = matching(&meta("l4proto"), "==", "\"tcp\"");
        assert_eq!(stops(V4, family, &everything), four, "{family}");
        assert_eq!(stops(V6, family, &everything), six, "{family}");
    }
}

#[test]
fn what_cannot_be_read_may_be_any_packet() {
    both(|at| {
        let address = match at.0 {
            Family::V4 => payload("ip", "saddr"),
            Family::V6 => payload("ip6", "saddr"),
        };
        let (low, prefix) = match at.0 {
            Family::V4 => (
                "\"192.0.2.1\"",
                r#"{"prefix": {"addr": "192.0.2.0", "len": 33}}"#,
            ),
            Family::V6 => (
                "\"2001:db8::1\"",
                r#"{"prefix": {"addr": "2001:db8::", "len": 129}}"#,
            ),
        };
        let inner = address.replace("\"protocol\"", "\"tunnel\": \"vxlan\", \"protocol\"");
        for condition in [
            // A word of a protocol among such as are no words.
            matching(&meta("nfproto"), "==", "99"),
            matching(&meta("protocol"), "==", r#"{"set": ["arp", 2048]}"#),
            matching(&meta("protocol"), "==", r#"{"set": []}"#),
            matching(&meta("nfproto"), "!=", "\"ipv4\""),
            matching(&meta("nfproto"), "!=", "\"ipv6\""),
            matching(&meta("nfproto"), "==", "\"@protocols\""),
            // Not an address: a comparison, a range, a length that is none, what a tunnel carries.
            matching(&address, "<", low),
            matching(&address, "==", &format!(r#"{{"range": [{low}, {low}]}}"#)),
            matching(&address, "==", prefix),
            matching(&inner, "==", low),
            // Devices that are not all named.
            matching(&meta("iifname"), "==", r#"{"set": ["docker0", 7]}"#),
            matching(&meta("iif"), "==", "7"),
            // States in the words of older versions.
            matching(
                r#"{"ct": {"key": "state"}}"#,
                "in",
                r#"{"|": ["new", "established"]}"#,
            ),
            matching(r#"{"ct": {"key": "state"}}"#, "==", "\"@states\""),
        ] {
            assert!(stops(at, "inet", &condition), "{at:?}: {condition}");
        }
    });
    // A part of a tunnel's packet is none of the packet's own.
    let inner = r#"{"payload": {"tunnel": "vxlan", "protocol": "ip", "field": "ttl"}}"#;
    assert!(stops(V6, "inet", &matching(inner, "==", "1")));
}

#[test]
fn verdict_maps_lead_each_family_where_it_goes() {
    let six = r#"{"vmap": {"key": {"meta": {"key": "nfproto"}}, "data": "@m"}}"#;
    for (at, chain) in [(V4, "four"), (V6, "six")] {
        for (target, stopped) in [("four", chain == "four"), ("six", chain == "six")] {
            let dump = format!(
                r#"{{"nftables": [{{"chain": {{"family": "inet", "table": "t", "name": "c", "type": "filter", "hook": "forward", "prio": 0, "policy": "accept"}}}},
                {{"chain": {{"family": "inet", "table": "t", "name": "{target}"}}}},
                {{"map": {{"family": "inet", "table": "t", "name": "m", "elem": [["ipv4", {{"jump": {{"target": "four"}}}}], ["ipv6", {{"jump": {{"target": "six"}}}}]]}}}},
                {{"rule": {{"family": "inet", "table": "t", "chain": "c", "expr": [{six}]}}}},
                {{"rule": {{"family": "inet", "table": "t", "chain": "{target}", "expr": [{{"quota": "q"}}]}}}}]}}"#
            );
            let none = std::collections::BTreeSet::new();
            let chains = nft::parse(&dump, at.0, &none).expect("a dump");
            let judged = at.judge(&Firewall { chains });
            assert_eq!(!judged.per_packet.is_empty(), stopped, "{at:?} {target}");
        }
    }
}

#[test]
fn tables_of_ip6tables_go_by_their_own_name() {
    let judged = V6.judge(&V6.forward(&["-A FORWARD -j NFQUEUE --queue-num 3"]));
    assert_eq!(
        judged.per_packet,
        [
            "queue in chain FORWARD of ip6tables-legacy table mangle: -A FORWARD -j NFQUEUE --queue-num 3"
        ]
    );
}

#[test]
fn rules_that_only_ipv6_has() {
    for rule in [
        // A prefix translated without state is another packet for each.
        "-A FORWARD -s 10.244.0.0/16 -j SNPT --src-pfx fd00::/64 --dst-pfx 2001:db8::/64",
        "-A FORWARD -j HL --hl-dec 1",
        // A mask that is no prefix may be any address.
        "-A FORWARD -s ::1/::ffff -m quota --quota 1 -j DROP",
        "-A FORWARD -m ipv6header --header hop --soft -j TOS --set-tos 0x10",
    ] {
        let judged = V6.judge(&V6.forward(&[rule]));
        assert_eq!(judged.per_packet.len(), 1, "{rule}");
    }
    for rules in [
        // Neighbour discovery and multicast are not between pods of two nodes.
        &["-A FORWARD -s fe80::/10 -m quota --quota 1 -j DROP"][..],
        &["-A FORWARD -d ff00::/8 -m limit --limit 1/sec -j ACCEPT"],
        &["-A FORWARD -m rt --rt-type 0 -j DROP"],
        &["-A FORWARD -p ipv6-icmp -m icmp6 --icmpv6-type 134 -j DROP"],
    ] {
        let judged = V6.judge(&V6.forward(rules));
        assert_eq!(judged.per_packet, [""; 0], "{rules:?}");
    }
}
