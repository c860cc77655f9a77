//! The output of `nft -j list ruleset` into chains that can be followed.

use ipnet::Ipv4Net;
use serde_json::{Map, Value};

use crate::fastpath::nft::text_of;

use super::firewall::{Action, Chain, Hook, Of, Rule, Test};

/// Tables that iptables-nft makes, and lists better itself.
const COMPAT: [&str; 5] = ["filter", "nat", "mangle", "raw", "security"];

/// The chains that filter IPv4. `without_compat` leaves out the tables of iptables-nft.
pub(super) fn parse(dump: &str, without_compat: bool) -> Vec<Chain> {
    let Ok(value) = serde_json::from_str::<Value>(dump) else {
        return Vec::new();
    };
    let objects: Vec<&Map<String, Value>> = value
        .get("nftables")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_object)
        .collect();
    let of_kind = |kind: &'static str| {
        objects
            .iter()
            .filter_map(move |object| object.get(kind)?.as_object())
            .filter(|object| matches!(text(object, "family"), "ip" | "inet"))
            .filter(|object| {
                !(without_compat
                    && text(object, "family") == "ip"
                    && COMPAT.contains(&text(object, "table")))
            })
    };
    let table = |object: &Map<String, Value>| {
        format!("nft {} {}", text(object, "family"), text(object, "table"))
    };
    let mut chains: Vec<Chain> = of_kind("chain")
        .map(|chain| Chain {
            table: table(chain),
            name: text(chain, "name").to_owned(),
            base: base(chain),
            rules: Vec::new(),
        })
        .collect();
    for rule in of_kind("rule") {
        let (table, name) = (table(rule), text(rule, "chain"));
        let chain = chains
            .iter_mut()
            .find(|chain| chain.table == table && chain.name == name);
        if let (Some(chain), Some(expressions)) =
            (chain, rule.get("expr").and_then(Value::as_array))
        {
            chain.rules.extend(read(expressions));
        }
    }
    chains
}

fn text<'a>(object: &'a Map<String, Value>, key: &str) -> &'a str {
    object.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn base(chain: &Map<String, Value>) -> Option<(Hook, bool)> {
    if text(chain, "type") != "filter" {
        return None;
    }
    let hook = match text(chain, "hook") {
        "prerouting" => Hook::Prerouting,
        "input" => Hook::Input,
        "forward" => Hook::Forward,
        _ => return None,
    };
    Some((hook, text(chain, "policy") == "drop"))
}

/// A rule; several for one with a verdict map.
fn read(expressions: &[Value]) -> Vec<Rule> {
    let mut tests = Vec::new();
    let mut rules = Vec::new();
    let shown = text_of(expressions);
    for expression in expressions.iter().filter_map(Value::as_object) {
        for (kind, value) in expression {
            match kind.as_str() {
                "match" => tests.push(test(value)),
                "counter" | "log" | "comment" | "mangle" | "notrack" | "set" | "last" => {}
                "vmap" => {
                    for (of, verdict) in elements(value) {
                        let mut tests: Vec<Test> = tests.clone();
                        tests.push(Test {
                            negated: false,
                            of: subject(value.get("key").unwrap_or(&Value::Null), of),
                        });
                        rules.push(Rule {
                            tests,
                            action: verdict,
                            text: shown.clone(),
                        });
                    }
                }
                kind => match action(kind, value) {
                    Some(action) => rules.push(Rule {
                        tests: tests.clone(),
                        action,
                        text: shown.clone(),
                    }),
                    None => tests.push(Test {
                        negated: false,
                        of: Of::Unknown,
                    }),
                },
            }
        }
    }
    rules
}

fn action(kind: &str, value: &Value) -> Option<Action> {
    let target = || {
        value
            .get("target")
            .and_then(Value::as_str)
            .map(str::to_owned)
    };
    match kind {
        "accept" => Some(Action::Accept),
        "drop" | "reject" => Some(Action::Drop),
        "return" => Some(Action::Return),
        "continue" => Some(Action::Nothing),
        "jump" => target().map(Action::Jump),
        "goto" => target().map(Action::Goto),
        _ => None,
    }
}

/// The elements of a verdict map that is spelled out.
fn elements(vmap: &Value) -> Vec<(&Value, Action)> {
    let set = vmap.get("data").and_then(|data| data.get("set"));
    set.and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(|element| {
            let [of, verdict] = element.as_array()?.as_slice() else {
                return None;
            };
            let (kind, value) = verdict.as_object()?.iter().next()?;
            Some((of, action(kind, value)?))
        })
        .collect()
}

fn test(value: &Value) -> Test {
    let op = value.get("op").and_then(Value::as_str).unwrap_or_default();
    let (Some(left), Some(right)) = (value.get("left"), value.get("right")) else {
        return Test {
            negated: false,
            of: Of::Unknown,
        };
    };
    let of = match op {
        "==" | "!=" | "in" => subject(left, right),
        _ => Of::Unknown,
    };
    Test {
        negated: op == "!=",
        of,
    }
}

fn subject(left: &Value, right: &Value) -> Of {
    let key = |kind: &str| {
        left.get(kind)
            .and_then(|value| value.get("key"))
            .and_then(Value::as_str)
    };
    let payload = left.get("payload");
    let part = |name: &str| {
        payload
            .and_then(|payload| payload.get(name))
            .and_then(Value::as_str)
    };
    let of = match (key("meta"), key("ct"), part("protocol"), part("field")) {
        (Some("l4proto"), ..) | (.., Some("ip"), Some("protocol")) => {
            words(right).map(Of::Protocol)
        }
        (Some("iifname" | "iif"), ..) => words(right).map(Of::In),
        (Some("oifname" | "oif"), ..) => words(right).map(Of::Out),
        (_, Some("state"), ..) => words(right).map(Of::State),
        (.., Some("udp" | "th"), Some("dport")) => ports(right).map(Of::Port),
        // Another protocol's port: not of a UDP packet.
        (.., Some("tcp" | "icmp" | "icmpv6" | "sctp" | "dccp"), _) => Some(Of::Protocol(
            part("protocol").map(str::to_owned).into_iter().collect(),
        )),
        (.., Some("ip"), Some("saddr")) => networks(right).map(Of::Source),
        (.., Some("ip"), Some("daddr")) => networks(right).map(Of::Destination),
        _ => None,
    };
    of.unwrap_or(Of::Unknown)
}

/// One value, a list or a set of them.
fn each(value: &Value) -> &[Value] {
    match value {
        Value::Array(values) => values,
        Value::Object(object) => match object.get("set") {
            Some(Value::Array(values)) => values,
            _ => std::slice::from_ref(value),
        },
        _ => std::slice::from_ref(value),
    }
}

fn words(value: &Value) -> Option<Vec<String>> {
    each(value)
        .iter()
        .map(|one| match one {
            Value::String(word) if !word.starts_with('@') => Some(word.clone()),
            Value::Number(number) => Some(number.to_string()),
            _ => None,
        })
        .collect()
}

fn ports(value: &Value) -> Option<Vec<(u16, u16)>> {
    let number = |value: &Value| u16::try_from(value.as_u64()?).ok();
    each(value)
        .iter()
        .map(|one| match one.get("range").and_then(Value::as_array) {
            Some(range) => Some((number(range.first()?)?, number(range.get(1)?)?)),
            None => number(one).map(|port| (port, port)),
        })
        .collect()
}

fn networks(value: &Value) -> Option<Vec<Ipv4Net>> {
    each(value)
        .iter()
        .map(|one| match one.get("prefix") {
            Some(prefix) => {
                let address = prefix.get("addr")?.as_str()?.parse().ok()?;
                Ipv4Net::new(address, u8::try_from(prefix.get("len")?.as_u64()?).ok()?).ok()
            }
            None => one
                .as_str()?
                .parse()
                .ok()
                .map(|ip: std::net::Ipv4Addr| Ipv4Net::from(ip)),
        })
        .collect()
}
