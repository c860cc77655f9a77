//! What a rule of nftables matches.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

use super::Table;
use crate::addr::Family;
use crate::fastpath::firewall::{Conditions, DeviceMatch, NetworkMatch, Rule};
use crate::masquerade::nft::word;

/// What a rule says about the state of the connection.
#[derive(Debug, Default)]
pub(super) struct States {
    /// Never an established one.
    pub(super) new_only: bool,
    /// An established one is accepted by a verdict map.
    pub(super) accepted: bool,
}

/// Takes one `match` into the rule.
pub(super) fn read<'a>(value: &'a Value, rule: &mut Rule, states: &mut States, table: &Table<'a>) {
    let (Some(left), Some(right)) = (value.get("left"), value.get("right")) else {
        rule.conditions.and(Conditions::Other);
        return;
    };
    let op = value.get("op").and_then(Value::as_str);
    let negated = op == Some("!=");
    if !matches!(op, Some("==" | "!=" | "in")) {
        rule.conditions.and(Conditions::Other);
        return;
    }
    if is_ct(left, "state") {
        if let Some(names) = strings(right) {
            states.new_only |= names.contains(&"established") == negated;
        }
        rule.conditions.and(if negated || strings(right).is_none() {
            Conditions::Other
        } else {
            Conditions::State
        });
        return;
    }
    let addressed = rule.scope.networks.len();
    if is_device(left)
        && let Some(names) = strings(right)
    {
        let names = names.into_iter().map(str::to_owned).collect();
        rule.scope.devices.push(DeviceMatch { names, negated });
    }
    if is_protocol(left) && !negated {
        rule.scope.elsewhere |= names_other(right, table.judged);
    }
    rule.scope.elsewhere |= is_of_other(left, table.judged);
    if let Some(fib) = left.get("fib") {
        let of_destination = fib
            .get("flags")
            .is_some_and(|flags| strings(flags).is_some_and(|flags| flags == ["daddr"]));
        let local = strings(right).is_some_and(|kinds| kinds == ["local"]);
        rule.scope.elsewhere |= of_destination && !negated && local;
    }
    if is_address(left, table.judged)
        && let Some(networks) = networks(right, table)
    {
        rule.scope.networks.push(NetworkMatch { networks, negated });
    }
    rule.conditions
        .and(if rule.scope.networks.len() > addressed {
            Conditions::Address
        } else {
            Conditions::Other
        });
}

fn is_device(key: &Value) -> bool {
    let key = key.get("meta").and_then(|meta| meta.get("key")?.as_str());
    matches!(key, Some("iifname" | "oifname" | "iif" | "oif"))
}

/// Whether a key is the protocol of the network layer.
pub(super) fn is_protocol(key: &Value) -> bool {
    let meta = key.get("meta").and_then(|meta| meta.get("key")?.as_str());
    matches!(meta, Some("nfproto" | "protocol"))
        || header(key).is_some_and(|(protocol, field)| protocol == "ether" && field == "type")
}

/// Whether only other protocols than the family's are among these.
pub(super) fn names_other(value: &Value, judged: Family) -> bool {
    let is_other = |name: &&str| match judged {
        Family::V4 => matches!(*name, "ipv6" | "ip6" | "arp"),
        Family::V6 => matches!(*name, "ipv4" | "ip" | "arp"),
    };
    strings(value).is_some_and(|names| names.iter().all(is_other))
}

/// Whether a key is in headers that no packet of the family has: nft asks for the protocol by itself where it reads them.
pub(super) fn is_of_other(key: &Value, judged: Family) -> bool {
    let is_one = |part: &Value| {
        header(part).is_some_and(|(protocol, _)| match judged {
            Family::V4 => matches!(protocol, "ip6" | "icmpv6" | "arp"),
            Family::V6 => matches!(protocol, "ip" | "icmp" | "igmp" | "arp"),
        })
    };
    parts(key).iter().any(is_one)
}

/// The header and the field that a key reads of a packet itself, not of one that it carries in a tunnel.
fn header(key: &Value) -> Option<(&str, &str)> {
    let payload = key
        .get("payload")
        .filter(|payload| payload.get("tunnel").is_none())?;
    let part = |name| payload.get(name).and_then(Value::as_str);
    Some((part("protocol")?, part("field")?))
}

/// The parts of a key that is put together of several, or the one that it is.
fn parts(key: &Value) -> &[Value] {
    match key.get("concat").and_then(Value::as_array) {
        Some(parts) => parts,
        None => std::slice::from_ref(key),
    }
}

pub(super) fn is_ct(key: &Value, name: &str) -> bool {
    key.get("ct")
        .and_then(|ct| ct.get("key"))
        .is_some_and(|key| key == name)
}

fn is_address(key: &Value, judged: Family) -> bool {
    header(key).is_some_and(|(protocol, field)| {
        protocol == word(judged) && matches!(field, "saddr" | "daddr")
    })
}

/// At which place of a map's key an address of the family is.
pub(super) fn address_position(key: &Value, judged: Family) -> Option<usize> {
    parts(key).iter().position(|part| is_address(part, judged))
}

/// The address at that place of an element's key.
pub(super) fn address_of(element: &Value, position: usize) -> Option<IpNet> {
    let element = plain(element);
    match element.get("concat").and_then(Value::as_array) {
        Some(parts) => network(parts.get(position)?),
        None => network(element),
    }
}

/// The networks of an address, a list or a set; `None` where one of them cannot be told.
fn networks<'a>(value: &'a Value, table: &Table<'a>) -> Option<Vec<IpNet>> {
    if let Some(one) = network(value) {
        return Some(vec![one]);
    }
    let listed = table.elements(value)?;
    listed.iter().map(|one| network(plain(one))).collect()
}

/// An element without the counter, comment or time-out it may come with.
fn plain(element: &Value) -> &Value {
    element
        .get("elem")
        .and_then(|elem| elem.get("val"))
        .unwrap_or(element)
}

fn network(value: &Value) -> Option<IpNet> {
    if let Some(text) = value.as_str() {
        return Some(text.parse::<IpAddr>().ok()?.into());
    }
    let prefix = value.get("prefix")?;
    let address: IpAddr = prefix.get("addr")?.as_str()?.parse().ok()?;
    let length = u8::try_from(prefix.get("len")?.as_u64()?).ok()?;
    IpNet::new(address, length).ok()
}

/// One word or several; `None` where they are not words alone, or are in a set with a name.
fn strings(value: &Value) -> Option<Vec<&str>> {
    let listed = match value {
        Value::Object(object) => object.get("set")?,
        other => other,
    };
    let words: Option<Vec<&str>> = match listed {
        Value::Array(list) => list.iter().map(Value::as_str).collect(),
        one => one.as_str().map(|word| vec![word]),
    };
    words.filter(|words| !words.is_empty() && !words.iter().any(|word| word.starts_with('@')))
}

/// An expression for people and for the digest: nothing in it that counts.
pub(super) fn render(kind: &str, value: &Value) -> String {
    if kind == "match"
        && let (Some(left), Some(right)) = (value.get("left"), value.get("right"))
    {
        let op = value.get("op").and_then(Value::as_str).unwrap_or("?");
        return format!("{} {op} {}", render_key(left), words(right));
    }
    match (kind, value) {
        (kind, Value::Null) => kind.to_owned(),
        ("counter", Value::Object(_)) => "counter".to_owned(),
        ("jump" | "goto", value) => {
            let target = value.get("target").map(words).unwrap_or_default();
            format!("{kind} {target}")
        }
        ("quota", Value::Object(quota)) => {
            let mut quota = quota.clone();
            quota.remove("used");
            quota.remove("used_unit");
            format!("{kind} {}", Value::Object(quota))
        }
        (kind, value) => format!("{kind} {}", words(value)),
    }
}

fn render_key(key: &Value) -> String {
    if let Some(payload) = key.get("payload") {
        let part = |name| payload.get(name).map(words).unwrap_or_default();
        return format!("{} {}", part("protocol"), part("field"));
    }
    for kind in ["meta", "ct"] {
        if let Some(name) = key.get(kind).and_then(|inner| inner.get("key")) {
            return format!("{kind} {}", words(name));
        }
    }
    words(key)
}

fn words(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
