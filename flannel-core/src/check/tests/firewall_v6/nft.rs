//! Tables of nftables.

use super::*;

/// As `nft -j list ruleset` prints a chain and its rules.
pub(super) fn ruleset(family: &str, hook: &str, rules: &[&str]) -> String {
    let rules: Vec<String> = rules
        .iter()
        .map(|expr| {
            format!(
                r#",{{"rule":{{"family":"{family}","table":"t","chain":"c","handle":3,"expr":[{expr}]}}}}"#
            )
        })
        .collect();
    let rules = rules.concat();
    format!(
        r#"{{"nftables":[{{"metainfo":{{"version":"1.0.6","release_name":"Lester Gooch #5","json_schema_version":1}}}},{{"table":{{"family":"{family}","name":"t","handle":1}}}},{{"chain":{{"family":"{family}","table":"t","name":"c","handle":1,"type":"filter","hook":"{hook}","prio":0,"policy":"drop"}}}}{rules}]}}"#
    )
}

const NFT_PORT: &str = r#"{"match": {"op": "==", "left": {"meta": {"key": "nfproto"}}, "right": "ipv6"}}, {"match": {"op": "==", "left": {"payload": {"protocol": "udp", "field": "dport"}}, "right": 8472}}, {"accept": null}"#;
const NFT_ICMP: &str = r#"{"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": {"set": ["icmp", "ipv6-icmp"]}}}, {"accept": null}"#;
const NFT_TRACKED: &str = r#"{"vmap": {"key": {"ct": {"key": "state"}}, "data": {"set": [["invalid", {"drop": null}], ["established", {"accept": null}], ["related", {"accept": null}]]}}}"#;

#[test]
fn nftables_must_let_the_port_and_neighbours_in() {
    for (rules, status, words) in [
        (
            &[][..],
            Fail,
            &[
                "keeps UDP port 8472, neighbour",
                "over IPv6: nft FAMILY t c: policy DROP",
                "nft insert rule FAMILY t c udp dport 8472 accept",
                "nft insert rule FAMILY t c meta l4proto ipv6-icmp accept",
            ][..],
        ),
        (&[NFT_PORT, NFT_ICMP], Ok, &[]),
        (&[NFT_ICMP], Fail, &["keeps UDP port 8472 out"]),
        (
            &[NFT_TRACKED, NFT_PORT],
            Fail,
            &["keeps neighbour discovery and pods'"],
        ),
        (
            &[
                NFT_PORT,
                r#"{"match": {"op": "==", "left": {"payload": {"protocol": "icmpv6", "field": "type"}}, "right": {"set": ["packet-too-big", "nd-neighbor-solicit", "nd-neighbor-advert"]}}}, {"accept": null}"#,
            ],
            Ok,
            &[],
        ),
        (
            &[
                NFT_PORT,
                NFT_TRACKED,
                r#"{"match": {"op": "==", "left": {"payload": {"protocol": "icmpv6", "field": "type"}}, "right": {"range": ["nd-router-solicit", "nd-redirect"]}}}, {"accept": null}"#,
            ],
            Ok,
            &[],
        ),
        (
            &[
                NFT_PORT,
                NFT_TRACKED,
                r#"{"vmap": {"key": {"payload": {"protocol": "icmpv6", "field": "type"}}, "data": {"set": [["echo-request", {"drop": null}], ["nd-neighbor-solicit", {"accept": null}]]}}}"#,
            ],
            Fail,
            &["keeps neighbour discovery"],
        ),
        (
            &[
                NFT_PORT,
                NFT_TRACKED,
                r#"{"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": "untracked"}}, {"accept": null}"#,
            ],
            Ok,
            &[],
        ),
        (
            &[
                NFT_PORT,
                NFT_TRACKED,
                r#"{"match": {"op": "==", "left": {"payload": {"protocol": "ip6", "field": "nexthdr"}}, "right": "ipv6-icmp"}}, {"accept": null}"#,
            ],
            Ok,
            &[],
        ),
        // What is asked of all ICMPv6, nobody asks of UDP.
        (
            &[
                r#"{"match": {"op": "!=", "left": {"payload": {"protocol": "icmpv6", "field": "type"}}, "right": "echo-request"}}, {"accept": null}"#,
            ],
            Fail,
            &["keeps UDP port 8472 out over IPv6"],
        ),
        (
            &[
                r#"{"match": {"op": "!=", "left": {"payload": {"protocol": "udp", "field": "dport"}}, "right": 53}}, {"accept": null}"#,
                NFT_TRACKED,
            ],
            Fail,
            &["keeps neighbour discovery"],
        ),
        (
            &[
                r#"{"match": {"op": "!=", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": 22}}, {"drop": null}"#,
                NFT_PORT,
                NFT_ICMP,
            ],
            Ok,
            &[],
        ),
        (
            &[
                r#"{"match": {"op": "!=", "left": {"payload": {"protocol": "ip6", "field": "hoplimit"}}, "right": 255}}, {"drop": null}"#,
                NFT_ICMP,
                NFT_PORT,
            ],
            Ok,
            &[],
        ),
        (
            &[
                r#"{"match": {"op": "==", "left": {"payload": {"protocol": "ip6", "field": "saddr"}}, "right": {"set": [{"prefix": {"addr": "fd77::", "len": 64}}, {"prefix": {"addr": "fe80::", "len": 10}}]}}}, {"accept": null}"#,
                NFT_ICMP,
            ],
            Ok,
            &[],
        ),
        (
            &[
                r#"{"match": {"op": "==", "left": {"meta": {"key": "pkttype"}}, "right": "multicast"}}, {"accept": null}"#,
                NFT_PORT,
                NFT_TRACKED,
            ],
            Warn,
            &["may keep neighbour discovery"],
        ),
    ] {
        for family in ["inet", "ip6"] {
            let mut seen = v6_only();
            seen.rules.nft = Some(ruleset(family, "input", rules));
            let words: Vec<String> = words
                .iter()
                .map(|word| word.replace("FAMILY", family))
                .collect();
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            assert_said(
                &seen,
                "firewall-input",
                status,
                &words,
                &format!("{family} {rules:?}"),
            );
        }
    }
}

#[test]
fn rules_of_the_other_family_are_not_of_this_one() {
    let closed = ruleset("ip", "input", &[]);
    let mut seen = v6_only();
    seen.rules.nft = Some(closed.clone());
    assert_said(&seen, "firewall-input", Ok, &[], "a table of IPv4");
    let mut seen = dual();
    seen.rules.nft = Some(closed.clone());
    seen.rules_v6.as_mut().expect("rules").nft = Some(closed);
    assert_said(
        &seen,
        "firewall-input",
        Fail,
        &["keeps UDP port 8472 out over IPv4: nft ip t c"],
        "IPv4",
    );
    assert_said(&seen, "firewall-input-v6", Ok, &[], "IPv6 beside it");
    // Conditions of IPv4 in a table of both never hold, whichever way they are asked.
    for rule in [
        r#"{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": {"prefix": {"addr": "10.0.0.0", "len": 8}}}}, {"accept": null}"#,
        r#"{"match": {"op": "!=", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": {"prefix": {"addr": "10.0.0.0", "len": 8}}}}, {"accept": null}"#,
        r#"{"match": {"op": "!=", "left": {"payload": {"protocol": "ip", "field": "protocol"}}, "right": "tcp"}}, {"accept": null}"#,
        r#"{"match": {"op": "==", "left": {"meta": {"key": "nfproto"}}, "right": "ipv4"}}, {"accept": null}"#,
        r#"{"vmap": {"key": {"meta": {"key": "nfproto"}}, "data": {"set": [["ipv4", {"accept": null}], ["ipv6", {"drop": null}]]}}}"#,
    ] {
        let mut seen = v6_only();
        seen.rules.nft = Some(ruleset("inet", "input", &[rule]));
        assert_said(
            &seen,
            "firewall-input",
            Fail,
            &["keeps UDP port 8472"],
            rule,
        );
    }
    let v6 = r#"{"match": {"op": "==", "left": {"meta": {"key": "protocol"}}, "right": "ip6"}}, {"accept": null}"#;
    let mut seen = v6_only();
    seen.rules.nft = Some(ruleset("inet", "input", &[v6]));
    assert_said(&seen, "firewall-input", Ok, &[], v6);
    // Tables that ip6tables lists better are not followed twice.
    let listed = ruleset(
        "ip6",
        "input",
        &[r#"{"xt": {"type": "match", "name": "icmp6"}}, {"accept": null}"#],
    );
    seen.rules.nft = Some(listed.replace(r#""t""#, r#""filter""#));
    seen.rules.compat = Some(saved(CLOSED, &[PORT, ICMP]));
    assert_said(&seen, "firewall-input", Ok, &[], "ip6 filter");
}
