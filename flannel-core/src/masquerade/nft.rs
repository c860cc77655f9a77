//! The rules in nftables, and the transactions that bring a node to them.

use std::fmt::Write as _;

use ipnet::IpNet;

use super::{KUBE_PROXY_MARK, Request, multicast};
use crate::{addr::Family, mark};

/// Which rules nftables gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ruleset {
    /// Upstream's, to the letter. What a host or a NodePort sends to a pod of another node is not masqueraded there, and
    /// kube-proxy's mark only counts if it is the only one.
    #[default]
    Upstream,
    /// What upstream's iptables rules say.
    Correct,
}

/// nft's word for a family, also in front of addresses.
pub const fn word(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

/// Our table of a family. Upstream makes one for either, whatever the node has.
pub const fn table(family: Family) -> &'static str {
    match family {
        Family::V4 => mark::NFT_TABLE_V4,
        Family::V6 => mark::NFT_TABLE_V6,
    }
}

/// What to do about one table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// All is in place.
    None,
    /// For the standard input of `nft -f -`: one transaction.
    Apply(String),
    /// The rules in the table are another instance's, for this network: putting ours there would be undone by it, for ever.
    Contested(String),
}

#[derive(Debug)]
struct Chain {
    name: &'static str,
    comment: &'static str,
    hook: &'static str,
    rules: Vec<String>,
}

fn chains(family: Family, request: &Request, ruleset: Ruleset) -> Vec<Chain> {
    let ip = word(family);
    let Request {
        network: n,
        subnet: p,
        ..
    } = request;
    let mut chains = Vec::new();
    if request.masq {
        let random = if request.random_fully {
            " fully-random"
        } else {
            ""
        };
        let multicast = multicast(n);
        let (marked, foreign) = match ruleset {
            Ruleset::Upstream => (
                format!("meta mark {KUBE_PROXY_MARK:#010x} return"),
                format!("{ip} saddr != {p} {ip} daddr {n} return"),
            ),
            Ruleset::Correct => (
                format!("meta mark & {KUBE_PROXY_MARK:#010x} == {KUBE_PROXY_MARK:#010x} return"),
                format!("{ip} saddr != {n} {ip} daddr {p} return"),
            ),
        };
        chains.push(Chain {
            name: "postrtg",
            comment: "chain to manage traffic masquerading by flannel",
            hook: "type nat hook postrouting priority srcnat; policy accept;",
            rules: vec![
                marked,
                format!("{ip} saddr {p} {ip} daddr {n} return"),
                format!("{ip} saddr {n} {ip} daddr {p} return"),
                foreign,
                format!("{ip} saddr {n} {ip} daddr != {multicast} masquerade{random}"),
                format!("{ip} saddr != {n} {ip} daddr {n} masquerade{random}"),
            ],
        });
    }
    if request.forward {
        chains.push(Chain {
            name: "forward",
            comment: "chain to accept flannel traffic",
            hook: "type filter hook forward priority filter; policy accept;",
            rules: vec![
                format!("{ip} saddr {n} accept"),
                format!("{ip} daddr {n} accept"),
            ],
        });
    }
    chains
}

/// The table as `nft list table` shows it: upstream's text. Without a request it is empty.
pub fn listing(family: Family, request: Option<&Request>, ruleset: Ruleset) -> String {
    let name = table(family);
    let mut text = format!(
        "table {} {name} {{\n\tcomment \"rules for {name}\"\n",
        word(family)
    );
    let chains = request.map_or_else(Vec::new, |request| chains(family, request, ruleset));
    for (number, chain) in chains.iter().enumerate() {
        let gap = if number == 0 { "" } else { "\n" };
        // Writing to a string cannot fail.
        let _ok = write!(
            text,
            "{gap}\tchain {} {{\n\t\tcomment \"{}\"\n\t\t{}\n",
            chain.name, chain.comment, chain.hook
        );
        for rule in &chain.rules {
            let _ok = writeln!(text, "\t\t{rule}");
        }
        text.push_str("\t}\n");
    }
    text.push_str("}\n");
    text
}

/// Plans the way from what `nft list table` shows, nothing if there is no such table, to what is wanted.
///
/// `settled` is what it showed after the last change: versions of nft differ in how they print. A table of another instance is
/// only taken over while nothing is settled, at a start.
pub fn plan(
    family: Family,
    listed: Option<&str>,
    settled: Option<&str>,
    request: Option<&Request>,
    ruleset: Ruleset,
) -> Change {
    let wanted = listing(family, request, ruleset);
    let Some(listed) = listed else {
        return Change::Apply(replace(family, request, ruleset, false));
    };
    if listed == wanted || Some(listed) == settled {
        return Change::None;
    }
    if settled.is_some()
        && let Some(request) = request
        && let Some(other) = other_network(family, listed, request.networks())
    {
        return Change::Contested(other);
    }
    let same_frame = frame(listed) == frame(&wanted);
    Change::Apply(match request {
        Some(request) if same_frame => refill(family, request, ruleset),
        _ => replace(family, request, ruleset, true),
    })
}

/// Removes a table.
pub fn remove(family: Family) -> String {
    format!("delete table {} {}\n", word(family), table(family))
}

/// A listing without its rules.
fn frame(listed: &str) -> String {
    listed
        .lines()
        .filter(|line| {
            let inner = line.strip_prefix("\t\t");
            inner.is_none_or(|inner| inner.starts_with("type ") || inner.starts_with("comment "))
        })
        .fold(String::new(), |text, line| text + line + "\n")
}

/// The network of whoever else has filled a table of ours: the widest one that its rules are about, if none names one of `own`.
pub fn other_network(
    family: Family,
    listed: &str,
    own: impl IntoIterator<Item = IpNet>,
) -> Option<String> {
    let own: Vec<IpNet> = own.into_iter().collect();
    let mut other: Option<IpNet> = None;
    for line in listed.lines().map(str::trim) {
        let Some(rest) = line.strip_prefix(word(family)) else {
            continue;
        };
        let mut words = rest.split_whitespace().filter(|word| *word != "!=");
        while let Some(word) = words.next() {
            if word != "saddr" && word != "daddr" {
                continue;
            }
            let network: IpNet = words.next()?.parse().ok()?;
            if own.contains(&network) {
                return None;
            }
            let is_wider = other.is_none_or(|other| network.prefix_len() < other.prefix_len());
            if is_wider && network.to_string() != multicast(&network) {
                other = Some(network);
            }
        }
    }
    other.map(|network| network.to_string())
}

/// New rules in chains that are as they should be: no hook changes.
fn refill(family: Family, request: &Request, ruleset: Ruleset) -> String {
    let place = format!("{} {}", word(family), table(family));
    let mut text = String::new();
    for chain in chains(family, request, ruleset) {
        // Writing to a string cannot fail.
        let _ok = writeln!(text, "flush chain {place} {}", chain.name);
        for rule in &chain.rules {
            let _ok = writeln!(text, "add rule {place} {} {rule}", chain.name);
        }
    }
    text
}

fn replace(family: Family, request: Option<&Request>, ruleset: Ruleset, exists: bool) -> String {
    let removal = if exists {
        remove(family)
    } else {
        String::new()
    };
    removal + &listing(family, request, ruleset)
}
