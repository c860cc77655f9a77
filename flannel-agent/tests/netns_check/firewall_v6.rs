//! The same of IPv6: on nodes with IPv6 alone, and beside IPv4.

use flannel_testkit::{Families, Netns, eventually, privileged};

use crate::{
    assert_fails, assert_healthy, assert_warns, check, check_with, ended,
    rig::{PATIENCE, Rig},
};

#[track_caller]
fn nft(ns: &Netns, words: &str) {
    ns.exec(["nft", words]).unwrap();
}

#[track_caller]
fn ip6tables(ns: &Netns, tool: &str, words: &str) {
    ns.exec(std::iter::once(tool).chain(words.split(' ')))
        .unwrap();
}

/// What the check of a node with these families is called.
fn named(families: Families, name: &str) -> String {
    match families {
        Families::Dual => format!("{name}-v6"),
        Families::V4 | Families::V6 => name.to_owned(),
    }
}

/// Nodes of these families of which nothing is wrong yet.
fn start(families: Families, flags: &[&str]) -> Rig {
    let rig = Rig::start_of(families, 2, flags);
    eventually(PATIENCE, "nothing is wrong", || {
        let (findings, code) = check(&rig, 0);
        let warned = ended(&findings, "WARN");
        if code == 0 && warned.is_empty() {
            return Ok(());
        }
        Err(format!("{findings:#?}"))
    });
    rig
}

#[test]
fn an_input_policy_without_port_or_neighbours_is_found_in_every_dialect() {
    if !privileged() {
        return;
    }
    for (families, tool, table) in [
        (Families::V6, "ip6tables-legacy", "ip6tables-legacy filter"),
        (Families::Dual, "ip6tables-nft", "ip6tables filter"),
    ] {
        let rig = start(families, &[]);
        let (ns, name) = (rig.ns(0), named(families, "firewall-input"));
        let tracked = "-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT";
        ip6tables(ns, tool, tracked);
        ip6tables(ns, tool, "-A INPUT -p ipv6-icmp -j ACCEPT");
        ip6tables(ns, tool, "-P INPUT DROP");
        let policy = format!("keeps UDP port 8472 out over IPv6: {table} INPUT: policy DROP");
        let fix = "ip6tables -I INPUT -p udp --dport 8472 -j ACCEPT";
        let answer = check(&rig, 0);
        assert_fails(&answer, &name, &policy, fix);
        if families == Families::Dual {
            let (_, said, _) = &answer.0["firewall-input"];
            assert_eq!(said, "no rule keeps UDP port 8472 out over IPv4");
        }
        ip6tables(ns, tool, "-I INPUT -p udp --dport 8472 -j ACCEPT");
        assert_healthy(&check(&rig, 0), &[]);
        // A rule in front of it, in a chain of its own.
        ip6tables(ns, tool, "-N mine");
        let ports = "-A mine -p udp -m multiport --dports 53,8000:9000 -j REJECT";
        ip6tables(ns, tool, ports);
        ip6tables(ns, tool, "-I INPUT -j mine");
        let answer = check_with(&rig, 0, &["--no-peers"]);
        assert_fails(&answer, &name, "8000:9000", fix);
        ip6tables(ns, tool, "-F mine");
        // Only what connection tracking knows: neighbours are not among that.
        ip6tables(ns, tool, "-D INPUT -p ipv6-icmp -j ACCEPT");
        let answer = check_with(&rig, 0, &["--no-peers"]);
        let fix = "ip6tables -I INPUT -p ipv6-icmp -j ACCEPT";
        assert_fails(&answer, &name, "keeps neighbour discovery", fix);
        for kind in [
            "neighbour-solicitation -m hl --hl-eq 255",
            "neighbour-advertisement",
        ] {
            let rule = format!("-A INPUT -p icmpv6 --icmpv6-type {kind} -j ACCEPT");
            ip6tables(ns, tool, &rule);
        }
        assert_healthy(&check_with(&rig, 0, &["--no-peers"]), &[]);
    }
}

#[test]
fn chains_of_nftables_are_followed_and_the_fix_is_one() {
    if !privileged() {
        return;
    }
    for (families, table) in [(Families::Dual, "inet t"), (Families::V6, "ip6 t")] {
        // What the rules drop is missed where nothing goes past them.
        let rig = start(families, &["--datapath=kernel"]);
        let (ns, name) = (rig.ns(0), named(families, "firewall-input"));
        nft(ns, &format!("add table {table}"));
        nft(
            ns,
            &format!(
                "add chain {table} input {{ type filter hook input priority 0 ; policy drop ; }}"
            ),
        );
        for rule in [
            "ct state vmap { established : accept, related : accept, invalid : drop }",
            "iifname lo accept",
            "icmpv6 type { nd-router-advert, echo-request } accept",
        ] {
            nft(ns, &format!("add rule {table} input {rule}"));
        }
        if families == Families::Dual {
            nft(ns, "add rule inet t input meta nfproto ipv4 accept");
        }
        let (findings, _) = check(&rig, 0);
        let (status, found, fix) = &findings[&name];
        assert_eq!(status, "FAIL", "{findings:#?}");
        let policy = format!("out over IPv6: nft {table} input: policy DROP");
        assert!(found.contains(&policy), "{found}");
        let lost = named(families, "overlay");
        assert_ne!(findings[&lost].0, "OK", "{findings:#?}");
        ns.exec(["sh", "-c", fix]).unwrap();
        eventually(PATIENCE, "nothing is wrong any more", || {
            let (findings, code) = check(&rig, 0);
            (code == 0).then_some(()).ok_or(format!("{findings:#?}"))
        });
        nft(
            ns,
            &format!("insert rule {table} input ip6 saddr ::/0 udp dport 8472 reject"),
        );
        let answer = check_with(&rig, 0, &["--no-peers"]);
        assert_fails(&answer, &name, "reject", "nft insert rule");
    }
}

#[test]
fn a_forward_policy_of_ip6tables_is_found() {
    if !privileged() {
        return;
    }
    for (families, tool) in [
        (Families::V6, "ip6tables-nft"),
        (Families::Dual, "ip6tables-legacy"),
    ] {
        let rig = start(families, &["--iptables-forward-rules=false"]);
        let (ns, name) = (rig.ns(0), named(families, "firewall-forward"));
        ip6tables(ns, tool, "-P FORWARD DROP");
        let answer = check_with(&rig, 0, &["--no-peers"]);
        let fix = "ip6tables -I FORWARD -d fd00:10:244::/48 -j ACCEPT && ip6tables -I FORWARD -s";
        assert_fails(&answer, &name, "drops IPv6 packets to pods: ip6tables", fix);
        for way in ["-d", "-s"] {
            let rule = format!("-I FORWARD {way} fd00:10:244::/48 -j ACCEPT");
            ip6tables(ns, tool, &rule);
        }
        assert_healthy(&check_with(&rig, 0, &["--no-peers"]), &[]);
        let device = rig.device();
        let device = match families {
            Families::Dual => device.replace("flannel", "flannel-v6"),
            Families::V4 | Families::V6 => device,
        };
        let rule = format!("-i {device} -j DROP");
        ip6tables(ns, tool, &format!("-I FORWARD {rule}"));
        let answer = check_with(&rig, 0, &["--no-peers"]);
        assert_fails(&answer, &name, &rule, "ip6tables -I FORWARD");
    }
}

/// What concerns IPv4 is neither looked at nor named.
#[test]
fn kube_proxy_without_br_netfilter_is_a_warning_with_ipv6_alone() {
    if !privileged() {
        return;
    }
    let rig = start(Families::V6, &[]);
    let (ns, setting) = (rig.ns(0), "net/bridge/bridge-nf-call-ip6tables");
    ns.set_sysctl("net/bridge/bridge-nf-call-iptables", "0")
        .unwrap();
    ip6tables(ns, "ip6tables-nft", "-t nat -N KUBE-SERVICES");
    ns.set_sysctl(setting, "1").unwrap();
    assert_healthy(&check_with(&rig, 0, &["--no-peers"]), &[]);
    ns.set_sysctl(setting, "0").unwrap();
    assert_warns(
        &check_with(&rig, 0, &["--no-peers"]),
        "br-netfilter",
        "bridge-nf-call-ip6tables = 0, and kube-proxy uses ip6tables",
        "sysctl -w net.bridge.bridge-nf-call-ip6tables=1",
        &[],
    );
}

#[test]
fn rules_of_ipv6_are_nothing_to_nodes_of_ipv4() {
    if !privileged() {
        return;
    }
    let rig = Rig::start(2, &[]);
    for tool in ["ip6tables-legacy", "ip6tables-nft"] {
        for chain in ["INPUT", "FORWARD"] {
            ip6tables(rig.ns(0), tool, &format!("-P {chain} DROP"));
        }
    }
    let answer = check(&rig, 0);
    assert_healthy(&answer, &[]);
    let (findings, _) = answer;
    let said = &findings["firewall-input"].1;
    assert_eq!(said, "no rule keeps UDP port 8472 out");
    assert!(!findings.keys().any(|name| name.ends_with("-v6")));
}
