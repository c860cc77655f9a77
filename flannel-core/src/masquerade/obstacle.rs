//! Rules of others that drop what ours accept: found and explained, never altered.
//!
//! To accept a packet ends its way through one chain of the kernel's; another chain, of another back end or of nftables itself, may
//! still drop it, and so may a rule in front of ours.

use ipnet::IpNet;
use serde_json::Value;

use super::iptables::{FILTER, Rule, Table};
use super::nft;
use crate::addr::Family;

/// How deep chains are followed.
const DEPTH: u32 = 8;

/// What a packet from or to a pod meets.
#[derive(Debug, Default)]
struct Passed {
    from: bool,
    to: bool,
}

enum Met {
    /// The packet is dropped, by this rule of this chain.
    Dropped(String),
    /// Nothing is left to drop: packets from and to pods are accepted.
    Accepted,
    /// The chain ends.
    Nothing,
}

/// Why a back end of iptables drops forwarded packets of pods, and what helps. `command` is the program that changes it.
pub fn in_iptables(filter: &Table, network: &IpNet, command: &str) -> Option<String> {
    let mut passed = Passed::default();
    let cause = match walk(filter, "FORWARD", network, &mut passed, DEPTH) {
        Met::Dropped(rule) => format!("the rule `{rule}`"),
        Met::Nothing if filter.policy("FORWARD") == Some("DROP") => {
            "the policy DROP of chain FORWARD".to_owned()
        }
        Met::Accepted | Met::Nothing => return None,
    };
    let remedy = remedy(filter, network, command);
    Some(format!(
        "{command}: {cause} drops forwarded packets of pods before anything accepts them. {remedy}"
    ))
}

fn remedy(filter: &Table, network: &IpNet, command: &str) -> String {
    let insert = |chain: &str| {
        format!(
            "{command} -I {chain} -s {network} -j ACCEPT; {command} -I {chain} -d {network} -j ACCEPT"
        )
    };
    if filter.has("DOCKER-USER") {
        format!(
            "It is Docker's; to let them pass: {}",
            insert("DOCKER-USER")
        )
    } else if filter.has("ufw-before-forward") {
        format!(
            "It is ufw's; to let them pass: ufw route allow from {network}; ufw route allow to {network}"
        )
    } else if filter.has("FORWARD_direct") {
        trust(network)
    } else {
        format!("To let them pass: {}", insert("FORWARD"))
    }
}

fn trust(network: &IpNet) -> String {
    format!(
        "It is firewalld's; to let them pass: firewall-cmd --permanent --zone=trusted --add-source={network}; firewall-cmd --reload"
    )
}

fn walk(table: &Table, chain: &str, network: &IpNet, passed: &mut Passed, depth: u32) -> Met {
    if depth == 0 {
        return Met::Nothing;
    }
    for rule in table.rules(chain) {
        let target = rule.target();
        if target == "ACCEPT" {
            passed.from |= *rule == accepting("-s", network, rule);
            passed.to |= *rule == accepting("-d", network, rule);
            if rule.is_for_all() || (passed.from && passed.to) {
                return Met::Accepted;
            }
        }
        if !rule.is_for_all() {
            continue;
        }
        match target {
            "DROP" | "REJECT" => return Met::Dropped(format!("-A {chain} {rule}")),
            "RETURN" => return Met::Nothing,
            target if table.has(target) => match walk(table, target, network, passed, depth - 1) {
                Met::Nothing => {}
                met => return met,
            },
            _ => {}
        }
    }
    Met::Nothing
}

/// The rule that accepts all of a network on one side, with whatever comment.
fn accepting(side: &str, network: &IpNet, like: &Rule) -> Rule {
    let comment = like.comment().map_or_else(String::new, |comment| {
        format!(" --comment \"{}\"", comment.replace('"', "\\\""))
    });
    Rule::new(&format!("{side} {network}{comment} -j ACCEPT"))
}

/// Chains of nftables itself that drop what they do not accept, by the output of `nft -j list ruleset`. A table that names the
/// network, or a device of pods, is taken to know about it.
pub fn in_nftables(listed: &str, network: &IpNet) -> Vec<String> {
    let Ok(value) = serde_json::from_str::<Value>(listed) else {
        return Vec::new();
    };
    let objects = value.get("nftables").and_then(Value::as_array);
    let objects = objects.map_or(&[][..], Vec::as_slice);
    let text = |object: &Value, key: &str| -> String {
        let value = object.get(key).and_then(Value::as_str);
        value.unwrap_or_default().to_owned()
    };
    let own_family = nft::word(Family::of_net(network));
    let mut found = Vec::new();
    for chain in objects.iter().filter_map(|object| object.get("chain")) {
        let (family, table) = (text(chain, "family"), text(chain, "table"));
        // Those of iptables-nft are read with its own tools.
        let of_iptables = table == FILTER && text(chain, "name") == "FORWARD";
        if text(chain, "hook") != "forward"
            || text(chain, "policy") != "drop"
            || (family != "inet" && family != own_family)
            || of_iptables
        {
            continue;
        }
        let knows = objects
            .iter()
            .filter_map(|object| object.get("rule").or_else(|| object.get("set")))
            .filter(|rule| text(rule, "family") == family && text(rule, "table") == table)
            .map(Value::to_string)
            .any(|rule| {
                let address = format!("\"{}\"", network.addr());
                rule.contains(&address) || rule.contains("cni0") || rule.contains("flannel")
            });
        if knows {
            continue;
        }
        let place = format!("{family} {table} {}", text(chain, "name"));
        let ip = own_family;
        let remedy = if table == "firewalld" {
            trust(network)
        } else {
            format!(
                "To let them pass: nft insert rule {place} {ip} saddr {network} accept; nft insert rule {place} {ip} daddr {network} accept"
            )
        };
        found.push(format!(
            "nftables: the policy drop of chain {place} drops forwarded packets of pods. {remedy}"
        ));
    }
    found
}
