//! What a rule of nftables matches.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use serde_json::Value;

use super::Sets;
use crate::fastpath::firewall::{Conditions, DeviceMatch, NetworkMatch, Rule};

/// What a rule says about the state of the connection.
#[derive(Debug, Default)]
pub(super) struct States {
    /// Never an established one.
    pub(super) new_only: bool,
    /// An established one is accepted by a verdict map.
    pub(super) accepted: bool,
}

/// Takes one `match` into the rule.
pub(super) fn read<'a>(value: &'a Value, rule: &mut Rule, states: &mut States, sets: &Sets<'a>) {
    let (Some(left), Some(right)) = (value.get("left"), value.get("right")) else {
        rule.conditions.and(Conditions::Other);
        return;
    };
    let negated = value.get("op").and_then(Value::as_str) == Some("!=");
    if is_ct(left, "state") {
        let established = strings(right).contains(&"established");
        states.new_only |= established == negated;
        rule.conditions.and(if negated {
            Conditions::Other
        } else {
            Conditions::State
        });
        return;
    }
    let addressed = rule.scope.networks.len();
    let meta = left.get("meta").and_then(|meta| meta.get("key")?.as_str());
    match meta {
        Some("iifname" | "oifname" | "iif" | "oif") => {
            let names: Vec<String> = strings(right).into_iter().map(str::to_owned).collect();
            if !names.is_empty() && !names.iter().any(|name| name.starts_with('@')) {
                rule.scope.devices.push(DeviceMatch { names, negated });
            }
        }
        Some("nfproto" | "protocol") => {
            let six = strings(right)
                .iter()
                .all(|name| *name == "ipv6" || *name == "ip6");
            rule.scope.elsewhere |= six && !negated;
        }
        _ => {}
    }
    if let Some(fib) = left.get("fib") {
        let of_destination = fib
            .get("flags")
            .is_some_and(|flags| strings(flags) == ["daddr"]);
        rule.scope.elsewhere |= of_destination && !negated && strings(right) == ["local"];
    }
    if let Some(payload) = left.get("payload") {
        match payload.get("protocol").and_then(Value::as_str) {
            Some("ip6" | "icmpv6" | "arp") => rule.scope.elsewhere = true,
            Some("ip") if is_address(payload) => {
                if let Some(networks) = networks(right, sets) {
                    let condition = NetworkMatch { networks, negated };
                    rule.scope.networks.push(condition);
                }
            }
            _ => {}
        }
    }
    rule.conditions
        .and(if rule.scope.networks.len() > addressed {
            Conditions::Address
        } else {
            Conditions::Other
        });
}

pub(super) fn is_ct(key: &Value, name: &str) -> bool {
    key.get("ct")
        .and_then(|ct| ct.get("key"))
        .is_some_and(|key| key == name)
}

fn is_address(payload: &Value) -> bool {
    payload
        .get("field")
        .is_some_and(|field| field == "saddr" || field == "daddr")
}

/// At which place of a map's key an IPv4 address is.
pub(super) fn address_position(key: &Value) -> Option<usize> {
    let is_one = |part: &Value| {
        part.get("payload").is_some_and(|payload| {
            payload.get("protocol").is_some_and(|name| name == "ip") && is_address(payload)
        })
    };
    match key.get("concat").and_then(Value::as_array) {
        Some(parts) => parts.iter().position(is_one),
        None => is_one(key).then_some(0),
    }
}

/// The address at that place of an element's key.
pub(super) fn address_of(element: &Value, position: usize) -> Option<Ipv4Net> {
    let element = plain(element);
    match element.get("concat").and_then(Value::as_array) {
        Some(parts) => network(parts.get(position)?),
        None => network(element),
    }
}

/// The networks of an address, a list or a set; `None` where one of them cannot be told.
fn networks<'a>(value: &'a Value, sets: &Sets<'a>) -> Option<Vec<Ipv4Net>> {
    if let Some(one) = network(value) {
        return Some(vec![one]);
    }
    let listed = sets.elements(value)?;
    listed.iter().map(|one| network(plain(one))).collect()
}

/// An element without the counter, comment or time-out it may come with.
fn plain(element: &Value) -> &Value {
    element
        .get("elem")
        .and_then(|elem| elem.get("val"))
        .unwrap_or(element)
}

fn network(value: &Value) -> Option<Ipv4Net> {
    if let Some(text) = value.as_str() {
        return Some(text.parse::<Ipv4Addr>().ok()?.into());
    }
    let prefix = value.get("prefix")?;
    let address: Ipv4Addr = prefix.get("addr")?.as_str()?.parse().ok()?;
    let length = u8::try_from(prefix.get("len")?.as_u64()?).ok()?;
    Ipv4Net::new(address, length).ok()
}

fn strings(value: &Value) -> Vec<&str> {
    match value {
        Value::String(text) => vec![text],
        Value::Array(list) => list.iter().filter_map(Value::as_str).collect(),
        other => other.get("set").map(strings).unwrap_or_default(),
    }
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
