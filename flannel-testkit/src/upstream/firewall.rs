//! Upstream's rules, and how a start of upstream puts them there.

use super::{Release, Upstream};
use crate::family::Family;

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
                // Of both families, whichever are on.
                for family in Family::ALL {
                    let saved = node.ns.exec([format!("{}-save", program(family))])?;
                    if saved.contains(MASQUERADE.name) {
                        // The jump is still there, so that the chain cannot be deleted: only its rules go.
                        iptables(node, family, &["-t", "nat", "-F", MASQUERADE.name])?;
                    }
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

/// What sets a family's rules.
fn program(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    }
}

fn multicast(family: Family) -> &'static str {
    match family {
        Family::V4 => "224.0.0.0/4",
        Family::V6 => "ff00::/8",
    }
}

fn iptables(node: &Upstream, family: Family, words: &[&str]) -> anyhow::Result<String> {
    node.ns
        .exec([program(family), "--wait"].iter().chain(words))
}

/// Rules in chains of upstream's own: the chain is made or flushed, then one restore without flushing moves the jump to the end and
/// adds the rules.
fn chains(node: &Upstream) -> anyhow::Result<()> {
    let families = node.conf.families.list();
    if node.conf.ip_masq {
        for family in &families {
            bootstrap(node, *family, &MASQUERADE, &masquerade(node, *family))?;
        }
    }
    for family in families {
        bootstrap(node, family, &FORWARD, &forward(node, family))?;
    }
    Ok(())
}

fn bootstrap(
    node: &Upstream,
    family: Family,
    chain: &Chain,
    rules: &[String],
) -> anyhow::Result<()> {
    let Chain {
        table,
        hook,
        name,
        comment,
    } = chain;
    if iptables(node, family, &["-t", table, "-N", name]).is_err() {
        iptables(node, family, &["-t", table, "-F", name])?;
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
    if iptables(node, family, &check).is_ok() {
        lines.push(format!("-D {jump}"));
    }
    lines.push(format!("-A {jump}"));
    lines.extend(rules.iter().map(|rule| {
        let (matches, target) = rule.split_once(" -j ").unwrap_or((rule, "ACCEPT"));
        format!("-A {name} {matches} -m comment --comment \"{comment}\" -j {target}")
    }));
    lines.push("COMMIT\n".to_owned());
    let file = node.scratch("upstream.rules", &lines.join("\n"))?;
    let restore = format!("{}-restore", program(family));
    node.ns
        .exec([&restore, "--wait", "--noflush", &file])
        .map(drop)
}

fn masquerade(node: &Upstream, family: Family) -> [String; 6] {
    let (net, own) = (node.conf.network_of(family), node.subnet_of(family));
    let multicast = multicast(family);
    [
        "-m mark --mark 0x4000/0x4000 -j RETURN".to_owned(),
        format!("-s {own} -d {net} -j RETURN"),
        format!("-s {net} -d {own} -j RETURN"),
        format!("! -s {net} -d {own} -j RETURN"),
        format!("-s {net} ! -d {multicast} -j MASQUERADE --random-fully"),
        format!("! -s {net} -d {net} -j MASQUERADE --random-fully"),
    ]
}

fn forward(node: &Upstream, family: Family) -> [String; 2] {
    let net = node.conf.network_of(family);
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
    let forward = forward(node, Family::V4);
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
                let done = iptables(node, Family::V4, &words);
                if action == "-A" {
                    done?;
                }
            }
        }
    }
    Ok(())
}

/// One transaction a family that makes the chains, flushes them and fills them. Both tables are made; that of a family that is off
/// stays empty.
fn ruleset(node: &Upstream) -> String {
    let mut lines = Vec::new();
    for family in Family::ALL {
        let (table, comment) = match family {
            Family::V4 => ("ip flannel-ipv4", "rules for flannel-ipv4"),
            Family::V6 => ("ip6 flannel-ipv6", "rules for flannel-ipv6"),
        };
        lines.push(format!("add table {table} {{ comment \"{comment}\"; }}"));
        if node.conf.families.has(family) {
            lines.extend(table_rules(node, family, table));
        }
    }
    lines.join("\n") + "\n"
}

fn table_rules(node: &Upstream, family: Family, table: &str) -> Vec<String> {
    let (net, own) = (node.conf.network_of(family), node.subnet_of(family));
    let (ip, multicast) = match family {
        Family::V4 => ("ip", multicast(family)),
        Family::V6 => ("ip6", multicast(family)),
    };
    let mut lines = Vec::new();
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
            format!("{ip} saddr {own} {ip} daddr {net} return"),
            format!("{ip} saddr {net} {ip} daddr {own} return"),
            format!("{ip} saddr != {own} {ip} daddr {net} return"),
            format!("{ip} saddr {net} {ip} daddr != {multicast} masquerade fully-random"),
            format!("{ip} saddr != {net} {ip} daddr {net} masquerade fully-random"),
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
        format!("{ip} saddr {net} accept"),
        format!("{ip} daddr {net} accept"),
    ];
    let comment = "chain to accept flannel traffic";
    chain(
        "forward",
        comment,
        "filter hook forward priority filter",
        &rules,
    );
    lines
}
