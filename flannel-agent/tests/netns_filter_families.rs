//! The packet filter of a node with both families: each overlay's gate follows the rules for its own family, and our rules come and
//! go with the family.

mod rig;

use flannel_testkit::{Families, LabOptions, Netns, eventually, privileged};
use rig::{PATIENCE, Rig};
use serde_json::Value;

const DUAL: &str = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/48","Backend":{"Type":"vxlan"}}"#;

/// A node with both families and its agent.
fn start(flags: &[&str]) -> Rig {
    let options = LabOptions {
        nodes: 1,
        families: Families::Dual,
        ..LabOptions::default()
    };
    let mut rig = Rig::with(options, DUAL);
    rig.start_agent(0, flags);
    rig.wait_ready(0);
    rig
}

/// The gates of IPv4 and IPv6.
fn gates(rig: &Rig) -> [Value; 2] {
    let status = rig.status(0);
    [
        status["fast_path"].clone(),
        status["ipv6"]["fast_path"].clone(),
    ]
}

/// Waits until the gates stand like this, the shut ones because of `words` and no longer because of `former`.
#[track_caller]
fn expect(rig: &Rig, modes: [&str; 2], words: &str, former: &str) {
    let what = format!("gates {modes:?} because of {words:?}");
    eventually(PATIENCE, &what, || {
        let gates = gates(rig);
        let right = gates.iter().zip(modes).all(|(gate, mode)| {
            let reason = gate["reason"].as_str().unwrap_or_default();
            let is_told = reason.contains(words) && (former == words || !reason.contains(former));
            gate["mode"] == mode && (mode != "off" || is_told)
        });
        right.then_some(()).ok_or_else(|| format!("{gates:?}"))
    });
}

/// A rule that needs to see every packet, as its author puts it there and takes it away. First those for IPv6, then those for IPv4, then for
/// both: a gate that is to open waits for a quiet while, and so opens once, not after every rule.
const RULES: [(&str, &str, &str, [&str; 2]); 7] = [
    (
        "ip6tables-legacy -t mangle -A FORWARD -j MARK --set-mark 7",
        "ip6tables-legacy -t mangle -F",
        "ip6tables-legacy table mangle: -A FORWARD -j MARK",
        ["established", "off"],
    ),
    (
        "ip6tables-nft -t mangle -A FORWARD -s fd00:10:244::/48 -j MARK --set-mark 7",
        "ip6tables-nft -t mangle -F",
        "ip6tables-nft table mangle: -A FORWARD -s fd00:10:244::/48 -j MARK",
        ["established", "off"],
    ),
    (
        "nft add table inet t; nft 'add chain inet t c { type filter hook forward priority 0; }'; \
         nft add rule inet t c ip6 daddr fd00:10:244::/48 meta mark set 7",
        "nft delete table inet t",
        "nft table inet t",
        ["established", "off"],
    ),
    (
        "nft add table ip6 t; nft 'add chain ip6 t c { type filter hook forward priority 0; }'; nft add rule ip6 t c meta mark set 7",
        "nft delete table ip6 t",
        "nft table ip6 t",
        ["established", "off"],
    ),
    (
        "iptables-legacy -t mangle -A FORWARD -j MARK --set-mark 7",
        "iptables-legacy -t mangle -F",
        " iptables-legacy table mangle",
        ["off", "established"],
    ),
    (
        "nft add table inet t; nft 'add chain inet t c { type filter hook forward priority 0; }'; \
         nft add rule inet t c icmp type echo-request meta mark set 7; nft add rule inet t c ip daddr 10.244.0.0/16 meta mark set 7",
        "nft delete table inet t",
        "nft table inet t",
        ["off", "established"],
    ),
    (
        "nft add table inet t; nft 'add chain inet t c { type filter hook forward priority 0; }'; \
         nft add rule inet t c tcp dport 80 meta mark set 7",
        "nft delete table inet t",
        "nft table inet t",
        ["off", "off"],
    ),
];

fn shell(ns: &Netns, script: &str) -> String {
    ns.exec(["sh", "-ec", script])
        .unwrap_or_else(|error| panic!("{script}: {error:#}"))
}

#[test]
fn each_gate_follows_the_rules_for_its_family() {
    if !privileged() {
        return;
    }
    let rig = start(&["--ip-masq"]);
    let open = ["established", "established"];
    expect(&rig, open, "", "");
    let (mut clear, mut former) = ("true", "nothing");
    for (put, take, words, modes) in RULES {
        shell(rig.ns(0), &format!("{clear}; {put}"));
        expect(&rig, modes, words, former);
        (clear, former) = (take, words);
    }
    shell(rig.ns(0), clear);
    expect(&rig, open, "", "");
}

/// What is ours in the packet filter, by family.
fn ours(ns: &Netns) -> [usize; 2] {
    ["iptables", "ip6tables"].map(|program| {
        let script = format!("{program}-legacy-save; {program}-nft-save");
        let lines = shell(ns, &script);
        lines
            .lines()
            .filter(|line| line.contains("FLANNEL"))
            .count()
    })
}

fn blackholes(ns: &Netns) -> [bool; 2] {
    ["-4", "-6"].map(|family| {
        let shown = shell(ns, &format!("ip {family} route show type blackhole"));
        !shown.trim().is_empty()
    })
}

#[test]
fn rules_and_routes_come_and_go_with_their_family() {
    if !privileged() {
        return;
    }
    let flags = ["--ip-masq", "--ip-blackhole-route"];
    let mut rig = start(&flags);
    let whole = ours(rig.ns(0));
    assert!(whole[0] > 10 && whole[0] == whole[1], "{whole:?}");
    assert_eq!(blackholes(rig.ns(0)), [true, true]);
    let subnet = rig.subnet_env(0, "FLANNEL_IPV6_SUBNET");
    let prefix = subnet.split("::").next().expect("a subnet").to_owned();
    let saved = shell(rig.ns(0), "ip6tables-save -t nat");
    assert!(
        saved.contains(&format!("-s {prefix}::/64 -d fd00:10:244::/48")),
        "{saved}"
    );
    // What the node has no longer loses its rules and its route; the other family keeps its own.
    rig.stop_agent(0);
    let alone = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
    std::fs::write(rig.lease_dir().join("config"), alone).expect("write the configuration");
    rig.start_agent(0, &flags);
    rig.wait_ready(0);
    assert_eq!(ours(rig.ns(0)), [whole[0], 0]);
    assert_eq!(blackholes(rig.ns(0)), [true, false]);
    rig.stop_agent(0);
    // And both go with everything else.
    std::fs::write(rig.lease_dir().join("config"), DUAL).expect("write the configuration");
    rig.start_agent(0, &flags);
    rig.wait_ready(0);
    assert_eq!(ours(rig.ns(0)), whole);
    rig.stop_agent(0);
    let done = rig.cli(0, &["cleanup"]);
    assert!(done.status.success(), "{done:?}");
    assert_eq!(ours(rig.ns(0)), [0, 0]);
    assert_eq!(blackholes(rig.ns(0)), [false, false]);
}
