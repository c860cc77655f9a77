//! Rules that keep the overlay's packets out, or pods' packets from being forwarded.

use flannel_testkit::{Netns, privileged};

use crate::{assert_fails, assert_healthy, assert_warns, check, check_with, rig::Rig};

#[track_caller]
fn nft(ns: &Netns, words: &str) {
    let mut argv = vec!["nft"];
    argv.push(words);
    ns.exec(argv).unwrap();
}

#[track_caller]
fn iptables(ns: &Netns, tool: &str, words: &str) {
    ns.exec(std::iter::once(tool).chain(words.split(' ')))
        .unwrap();
}

/// What every firewall lets in.
const ESTABLISHED: &str = "-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT";

#[test]
fn an_input_policy_without_our_port_is_found_in_every_dialect() {
    if !privileged() {
        return;
    }
    for tool in ["iptables-legacy", "iptables-nft"] {
        let rig = Rig::start(2, &[]);
        let ns = rig.ns(0);
        iptables(ns, tool, ESTABLISHED);
        iptables(ns, tool, "-A INPUT -p icmp -j ACCEPT");
        iptables(ns, tool, "-P INPUT DROP");
        let answer = check(&rig, 0);
        assert_fails(
            &answer,
            "firewall-input",
            "INPUT: policy DROP",
            "iptables -I INPUT -p udp --dport 8472 -j ACCEPT",
        );
        iptables(ns, tool, "-I INPUT -p udp --dport 8472 -j ACCEPT");
        assert_healthy(&check(&rig, 0), &[]);
        // A rule in front of it, in a chain of its own.
        iptables(ns, tool, "-N mine");
        iptables(
            ns,
            tool,
            "-A mine -p udp -m multiport --dports 53,8000:9000 -j DROP",
        );
        iptables(ns, tool, "-I INPUT -j mine");
        let answer = check_with(&rig, 0, &["--no-peers"]);
        assert_fails(&answer, "firewall-input", "8000:9000", "iptables -I INPUT");
    }
}

#[test]
fn an_input_chain_of_nftables_is_followed() {
    if !privileged() {
        return;
    }
    let rig = Rig::start(2, &[]);
    let ns = rig.ns(0);
    nft(ns, "add table inet t");
    nft(
        ns,
        "add chain inet t input { type filter hook input priority 0 ; policy drop ; }",
    );
    nft(
        ns,
        "add rule inet t input ct state vmap { established : accept, related : accept, invalid : drop }",
    );
    nft(ns, "add rule inet t input meta l4proto icmp accept");
    nft(ns, "add rule inet t input iifname lo accept");
    let answer = check(&rig, 0);
    assert_fails(
        &answer,
        "firewall-input",
        "nft inet t input: policy DROP",
        "nft insert rule inet t input udp dport 8472 accept",
    );
    nft(ns, "add rule inet t input udp dport { 53, 8472 } accept");
    assert_healthy(&check(&rig, 0), &[]);
    nft(
        ns,
        "insert rule inet t input udp dport 8000-9000 limit rate 1/second drop",
    );
    assert_healthy(&check(&rig, 0), &[]);
    nft(
        ns,
        "insert rule inet t input ip saddr 192.168.77.0/24 udp dport 8472 reject",
    );
    let answer = check_with(&rig, 0, &["--no-peers"]);
    assert_fails(&answer, "firewall-input", "reject", "nft insert rule");
}

#[test]
fn dockers_forward_policy_is_found() {
    if !privileged() {
        return;
    }
    let rig = Rig::start(2, &["--iptables-forward-rules=false"]);
    let ns = rig.ns(0);
    iptables(ns, "iptables-nft", "-N DOCKER-USER");
    iptables(ns, "iptables-nft", "-A DOCKER-USER -j RETURN");
    iptables(ns, "iptables-nft", "-A FORWARD -j DOCKER-USER");
    iptables(ns, "iptables-nft", "-P FORWARD DROP");
    let answer = check_with(&rig, 0, &["--no-peers"]);
    assert_fails(
        &answer,
        "firewall-forward",
        "FORWARD: policy DROP",
        "iptables -I DOCKER-USER -d 10.244.0.0/16 -j ACCEPT",
    );
    iptables(
        ns,
        "iptables-nft",
        "-I DOCKER-USER -d 10.244.0.0/16 -j ACCEPT",
    );
    iptables(
        ns,
        "iptables-nft",
        "-I DOCKER-USER -s 10.244.0.0/16 -j ACCEPT",
    );
    assert_healthy(&check_with(&rig, 0, &["--no-peers"]), &[]);
    // An accepting rule of ours behind a drop of somebody else's.
    iptables(ns, "iptables-nft", "-I DOCKER-USER -i flannel.1 -j DROP");
    let answer = check_with(&rig, 0, &["--no-peers"]);
    assert_fails(
        &answer,
        "firewall-forward",
        "-i flannel.1 -j DROP",
        "iptables -I DOCKER-USER",
    );
}

#[test]
fn before_the_first_start_a_policy_is_left_to_the_agents_own_rules() {
    if !privileged() {
        return;
    }
    let rig = Rig::new(1);
    iptables(rig.ns(0), "iptables-nft", "-P FORWARD DROP");
    let dir = format!("--lease-dir={}", rig.lease_dir().display());
    let answer = check_with(&rig, 0, &[&dir]);
    assert_warns(
        &answer,
        "firewall-forward",
        "policy DROP",
        "--iptables-forward-rules",
        &[],
    );
}

#[test]
fn kube_proxy_without_br_netfilter_is_a_warning() {
    if !privileged() {
        return;
    }
    let rig = Rig::start(2, &[]);
    rig.ns(0)
        .set_sysctl("net/bridge/bridge-nf-call-iptables", "0")
        .unwrap();
    assert_healthy(&check_with(&rig, 0, &["--no-peers"]), &[]);
    iptables(rig.ns(0), "iptables-nft", "-t nat -N KUBE-SERVICES");
    let answer = check_with(&rig, 0, &["--no-peers"]);
    assert_warns(
        &answer,
        "br-netfilter",
        "kube-proxy",
        "modprobe br_netfilter",
        &[],
    );
}
