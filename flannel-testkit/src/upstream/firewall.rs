//! Upstream's rules, and how a start of upstream puts them there.

use super::{Release, Upstream};

/// `EnableNFTables`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Firewall {
    Iptables,
    Nftables,
}

/// A built-in chain, the chain of upstream's that it leads to, and the table and comment of both.
struct Chain {
    table: &'static str,
    hook: &'static str,
    name: &'static str,
    comment: &'static str,
}

const MASQUERADE: Chain = Chain {
    table: "nat",
    hook: "POSTROUTING",
    name: "FLANNEL-POSTRTG",
    comment: "flanneld masq",
};
const FORWARD: Chain = Chain {
    table: "filter",
    hook: "FORWARD",
    name: "FLANNEL-FWD",
    comment: "flanneld forward",
};

impl Firewall {
    /// The firewall's part of a start: the other manager's rules go, as far as upstream gets them away, and these come.
    pub(super) fn start(self, node: &Upstream) -> anyhow::Result<()> {
        match (self, node.conf.release) {
            (Firewall::Nftables, _) => {
                let saved = node.ns.exec(["iptables-save"])?;
                if saved.contains(MASQUERADE.name) {
                    // The jump is still there, so that the chain cannot be deleted: only its rules go.
                    iptables(node, &["-t", "nat", "-F", MASQUERADE.name])?;
                }
                let file = node.scratch("upstream.nft", &ruleset(node))?;
                node.ns.exec(["nft", "-f", &file]).map(drop)
            }
            (Firewall::Iptables, release) => {
                for table in [["ip", "flannel-ipv4"], ["ip6", "flannel-ipv6"]] {
                    // Upstream does not mind either if there is none.
                    drop(
                        node.ns
                            .exec(["nft", "delete", "table"].iter().chain(&table)),
                    );
                }
                match release {
                    Release::Current => chains(node),
                    Release::V0_12 => plain(node),
                }
            }
        }
    }
}

fn iptables(node: &Upstream, words: &[&str]) -> anyhow::Result<String> {
    node.ns.exec(["iptables", "--wait"].iter().chain(words))
}

/// Rules in chains of upstream's own: the chain is made or flushed, then one restore without flushing moves the jump to the end and
/// adds the rules.
fn chains(node: &Upstream) -> anyhow::Result<()> {
    if node.conf.ip_masq {
        bootstrap(node, &MASQUERADE, &masquerade(node))?;
    }
    bootstrap(node, &FORWARD, &forward(node))
}

fn bootstrap(node: &Upstream, chain: &Chain, rules: &[String]) -> anyhow::Result<()> {
    let Chain {
        table,
        hook,
        name,
        comment,
    } = chain;
    if iptables(node, &["-t", table, "-N", name]).is_err() {
        iptables(node, &["-t", table, "-F", name])?;
    }
    let jump = format!("{hook} -m comment --comment \"{comment}\" -j {name}");
    let check = [
        "-t",
        table,
        "-C",
        hook,
        "-m",
        "comment",
        "--comment",
        comment,
        "-j",
        name,
    ];
    let mut lines = vec![format!("*{table}")];
    if iptables(node, &check).is_ok() {
        lines.push(format!("-D {jump}"));
    }
    lines.push(format!("-A {jump}"));
    lines.extend(rules.iter().map(|rule| {
        let (matches, target) = rule.split_once(" -j ").unwrap_or((rule, "ACCEPT"));
        format!("-A {name} {matches} -m comment --comment \"{comment}\" -j {target}")
    }));
    lines.push("COMMIT\n".to_owned());
    let file = node.scratch("upstream.rules", &lines.join("\n"))?;
    node.ns
        .exec(["iptables-restore", "--wait", "--noflush", &file])
        .map(drop)
}

fn masquerade(node: &Upstream) -> [String; 6] {
    let (net, own) = (node.conf.network, node.subnet);
    [
        "-m mark --mark 0x4000/0x4000 -j RETURN".to_owned(),
        format!("-s {own} -d {net} -j RETURN"),
        format!("-s {net} -d {own} -j RETURN"),
        format!("! -s {net} -d {own} -j RETURN"),
        format!("-s {net} ! -d 224.0.0.0/4 -j MASQUERADE --random-fully"),
        format!("! -s {net} -d {net} -j MASQUERADE --random-fully"),
    ]
}

fn forward(node: &Upstream) -> [String; 2] {
    let net = node.conf.network;
    [format!("-s {net} -j ACCEPT"), format!("-d {net} -j ACCEPT")]
}

/// v0.12.0 has no chains and no comments; what is there is taken out and added anew.
fn plain(node: &Upstream) -> anyhow::Result<()> {
    let (net, own) = (node.conf.network, node.subnet);
    let masquerade = [
        format!("-s {net} -d {net} -j RETURN"),
        format!("-s {net} ! -d 224.0.0.0/4 -j MASQUERADE --random-fully"),
        format!("! -s {net} -d {own} -j RETURN"),
        format!("! -s {net} -d {net} -j MASQUERADE --random-fully"),
    ];
    let forward = forward(node);
    let sets = [
        ("nat", "POSTROUTING", &masquerade[..]),
        ("filter", "FORWARD", &forward[..]),
    ];
    for (table, hook, rules) in sets {
        if table == "nat" && !node.conf.ip_masq {
            continue;
        }
        for action in ["-D", "-A"] {
            for rule in rules {
                let words: Vec<&str> = ["-t", table, action, hook]
                    .into_iter()
                    .chain(rule.split(' '))
                    .collect();
                let done = iptables(node, &words);
                if action == "-A" {
                    done?;
                }
            }
        }
    }
    Ok(())
}

/// One transaction that makes the chains, flushes them and fills them. The IPv6 table is made too, and stays empty.
fn ruleset(node: &Upstream) -> String {
    let (net, own) = (node.conf.network, node.subnet);
    let table = "ip flannel-ipv4";
    let mut lines = vec![
        format!("add table {table} {{ comment \"rules for flannel-ipv4\"; }}"),
        "add table ip6 flannel-ipv6 { comment \"rules for flannel-ipv6\"; }".to_owned(),
    ];
    let mut chain = |name: &str, comment: &str, hook: &str, rules: &[String]| {
        lines.push(format!(
            "add chain {table} {name} {{ comment \"{comment}\"; type {hook}; policy accept; }}"
        ));
        lines.push(format!("flush chain {table} {name}"));
        let rules = rules.iter();
        lines.extend(rules.map(|rule| format!("add rule {table} {name} {rule}")));
    };
    if node.conf.ip_masq {
        let rules = [
            "meta mark 0x00004000 return".to_owned(),
            format!("ip saddr {own} ip daddr {net} return"),
            format!("ip saddr {net} ip daddr {own} return"),
            format!("ip saddr != {own} ip daddr {net} return"),
            format!("ip saddr {net} ip daddr != 224.0.0.0/4 masquerade fully-random"),
            format!("ip saddr != {net} ip daddr {net} masquerade fully-random"),
        ];
        let comment = "chain to manage traffic masquerading by flannel";
        chain(
            "postrtg",
            comment,
            "nat hook postrouting priority srcnat",
            &rules,
        );
    }
    let rules = [
        format!("ip saddr {net} accept"),
        format!("ip daddr {net} accept"),
    ];
    let comment = "chain to accept flannel traffic";
    chain(
        "forward",
        comment,
        "filter hook forward priority filter",
        &rules,
    );
    lines.join("\n") + "\n"
}
