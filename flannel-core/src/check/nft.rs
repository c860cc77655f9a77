//! The output of `nft -j list ruleset` into chains that can be followed.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Map, Value};

use crate::{addr::Family, fastpath::nft::text_of};

use super::filter::{Action, Chain, Hook, Of, Rule, Test};

/// Tables that iptables-nft makes, and lists better itself.
const COMPAT: [&str; 5] = ["filter", "nat", "mangle", "raw", "security"];

/// The chains that filter packets of a family. `without_compat` leaves out the tables of iptables-nft.
pub(super) fn parse(dump: &str, family: Family, without_compat: bool) -> Vec<Chain> {
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
    let own = protocol(family);
    let of_kind = |kind: &'static str| {
        objects
            .iter()
            .filter_map(move |object| object.get(kind)?.as_object())
            .filter(|object| {
                let of = text(object, "family");
                of == own || of == "inet"
            })
            .filter(|object| {
                !(without_compat
                    && text(object, "family") == own
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
            chain.rules.extend(read(expressions, family));
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
fn read(expressions: &[Value], family: Family) -> Vec<Rule> {
    let mut tests = Vec::new();
    let mut rules = Vec::new();
    let shown = text_of(expressions);
    for expression in expressions.iter().filter_map(Value::as_object) {
        for (kind, value) in expression {
            match kind.as_str() {
                "match" => tests.extend(test(value, family)),
                "counter" | "log" | "comment" | "mangle" | "notrack" | "set" | "last" => {}
                "vmap" => {
                    for (of, verdict) in elements(value) {
                        let mut tests: Vec<Test> = tests.clone();
                        let key = value.get("key").unwrap_or(&Value::Null);
                        tests.extend(about(key, of, false, family));
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

/// As rules and tables name the family.
pub(super) const fn protocol(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

fn test(value: &Value, family: Family) -> Vec<Test> {
    let op = value.get("op").and_then(Value::as_str).unwrap_or_default();
    match (value.get("left"), value.get("right")) {
        (Some(left), Some(right)) if matches!(op, "==" | "!=" | "in") => {
            about(left, right, op == "!=", family)
        }
        _ => vec![Test {
            negated: false,
            of: Of::Unknown,
        }],
    }
}

/// What a rule asks that looks at `left`. Who looks at a header asks for its protocol first, whatever it wants to be in it.
fn about(left: &Value, right: &Value, negated: bool, family: Family) -> Vec<Test> {
    let of = subject(left, right, family);
    let header = left
        .get("payload")
        .and_then(|payload| payload.get("protocol"));
    let asks = |of| Some(Test { negated: false, of });
    let header = match header.and_then(Value::as_str) {
        Some(name @ ("udp" | "tcp" | "icmp" | "icmpv6" | "sctp" | "dccp")) => {
            asks(Of::Protocol(vec![name.to_owned()]))
        }
        Some("ip" | "arp") if family == Family::V6 => asks(Of::Always(false)),
        _ => None,
    };
    header.into_iter().chain([Test { negated, of }]).collect()
}

fn subject(left: &Value, right: &Value, family: Family) -> Of {
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
        (.., Some("icmpv6"), Some("type")) => types(right).map(Of::Icmp),
        (.., Some(name), Some("saddr")) if name == protocol(family) => {
            networks(right).map(Of::Source)
        }
        (.., Some(name), Some("daddr")) if name == protocol(family) => {
            networks(right).map(Of::Destination)
        }
        (meta, ..) if family == Family::V6 => match (meta, part("protocol"), part("field")) {
            (Some("nfproto"), ..) => words(right).map(|all| Of::Always(contains(&all, "ipv6"))),
            (Some("protocol"), ..) => words(right).map(|all| Of::Always(contains(&all, "ip6"))),
            (_, Some("ip6"), Some("nexthdr")) => words(right).map(Of::Protocol),
            (_, Some("ip6"), Some("hoplimit")) => right
                .as_u64()
                .and_then(|limit| u8::try_from(limit).ok())
                .map(Of::HopLimit),
            _ => None,
        },
        _ => None,
    };
    of.unwrap_or(Of::Unknown)
}

fn contains(words: &[String], wanted: &str) -> bool {
    words.iter().any(|word| word == wanted)
}

/// Types of ICMPv6 messages, as nft names them. What it has no name for is a number.
fn types(value: &Value) -> Option<Vec<u8>> {
    const NAMES: [(&str, u8); 17] = [
        ("destination-unreachable", 1),
        ("packet-too-big", 2),
        ("time-exceeded", 3),
        ("parameter-problem", 4),
        ("echo-request", 128),
        ("echo-reply", 129),
        ("mld-listener-query", 130),
        ("mld-listener-report", 131),
        ("mld-listener-done", 132),
        ("mld-listener-reduction", 132),
        ("nd-router-solicit", 133),
        ("nd-router-advert", 134),
        ("nd-neighbor-solicit", 135),
        ("nd-neighbor-advert", 136),
        ("nd-redirect", 137),
        ("router-renumbering", 138),
        ("mld2-listener-report", 143),
    ];
    let number = |value: &Value| match value {
        Value::String(name) => NAMES
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, number)| *number),
        value => u8::try_from(value.as_u64()?).ok(),
    };
    let mut found = Vec::new();
    for one in each(value) {
        match one.get("range").and_then(Value::as_array) {
            Some(range) => found.extend(number(range.first()?)?..=number(range.get(1)?)?),
            None => found.push(number(one)?),
        }
    }
    Some(found)
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

fn networks(value: &Value) -> Option<Vec<IpNet>> {
    each(value)
        .iter()
        .map(|one| match one.get("prefix") {
            Some(prefix) => {
                let address: IpAddr = prefix.get("addr")?.as_str()?.parse().ok()?;
                IpNet::new(address, u8::try_from(prefix.get("len")?.as_u64()?).ok()?).ok()
            }
            None => one.as_str()?.parse::<IpAddr>().ok().map(IpNet::from),
        })
        .collect()
}
