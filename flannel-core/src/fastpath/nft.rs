//! The output of `nft -j list ruleset` into chains.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::firewall::{
    Base, Chain, Conditions, Jump, NetworkMatch, Rule, Scope, Statement, owner_of_table,
};
use crate::addr::Family;
use crate::masquerade::nft::word;

mod condition;

/// Names of a set or a map: family, table, name.
type Name<'a> = (&'a str, &'a str, &'a str);

/// The chains of a dump that see packets of a family, but for tables of that family alone that are in `elsewhere`: those are of
/// iptables-nft, whose own dump tells more. `Err` says what is wrong with a dump that is none.
pub fn parse(
    dump: &str,
    judged: Family,
    elsewhere: &std::collections::BTreeSet<String>,
) -> Result<Vec<Chain>, String> {
    let value: Value = serde_json::from_str(dump).map_err(|error| error.to_string())?;
    let objects = value
        .get("nftables")
        .and_then(Value::as_array)
        .ok_or("no array \"nftables\" in it")?;
    let of_kind = |kind: &'static str| {
        objects
            .iter()
            .filter_map(move |object| object.get(kind)?.as_object())
    };
    let mut elements: BTreeMap<Name<'_>, &[Value]> = BTreeMap::new();
    for set in of_kind("set").chain(of_kind("map")) {
        let listed = set.get("elem").and_then(Value::as_array);
        elements.insert(
            (text(set, "family"), text(set, "table"), text(set, "name")),
            listed.map(Vec::as_slice).unwrap_or_default(),
        );
    }
    let mut chains: BTreeMap<Name<'_>, Chain> = BTreeMap::new();
    for chain in of_kind("chain") {
        let (family, table) = (text(chain, "family"), text(chain, "table"));
        let alone = family == word(judged);
        let shared = matches!(family, "inet" | "bridge" | "netdev");
        if !(alone || shared) || (alone && elsewhere.contains(table)) {
            continue;
        }
        let name = text(chain, "name");
        let made = Chain {
            table: format!("nft table {family} {table}"),
            name: name.to_owned(),
            base: base(chain, family),
            owner: owner_of_table(table),
            rules: Vec::new(),
        };
        chains.insert((family, table, name), made);
    }
    for rule in of_kind("rule") {
        let (family, table) = (text(rule, "family"), text(rule, "table"));
        let Some(chain) = chains.get_mut(&(family, table, text(rule, "chain"))) else {
            continue;
        };
        let expressions = rule.get("expr").and_then(Value::as_array);
        let within = Table {
            judged,
            family,
            name: table,
            elements: &elements,
        };
        chain
            .rules
            .push(read(expressions.map_or(&[], Vec::as_slice), &within));
    }
    Ok(chains.into_values().collect())
}

/// Names of the tables in a dump that are of this family alone.
pub fn tables(dump: &str, family: Family) -> Result<Vec<String>, String> {
    let value: Value = serde_json::from_str(dump).map_err(|error| error.to_string())?;
    let objects = value.get("nftables").and_then(Value::as_array);
    Ok(objects
        .into_iter()
        .flatten()
        .filter_map(|object| object.get("table")?.as_object())
        .filter(|table| text(table, "family") == word(family))
        .map(|table| text(table, "name").to_owned())
        .collect())
}

/// A rule's expressions on one line, for people.
pub(crate) fn text_of(expressions: &[Value]) -> String {
    let words: Vec<String> = expressions
        .iter()
        .filter_map(Value::as_object)
        .flatten()
        .map(|(kind, value)| condition::render(kind, value))
        .collect();
    words.join(" ")
}

fn text<'a>(object: &'a Map<String, Value>, key: &str) -> &'a str {
    object.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn base(chain: &Map<String, Value>, family: &str) -> Option<Base> {
    let hook = chain.get("hook")?.as_str()?;
    let in_path = match family {
        // What a bridge hands up to the host, and what the host sends out of a bridge, is a pod's packet too.
        "bridge" | "netdev" => true,
        _ => matches!(hook, "prerouting" | "forward" | "postrouting" | "ingress"),
    };
    let device = match chain.get("dev") {
        Some(Value::String(name)) => Some(name.clone()),
        _ => None,
    };
    Some(Base {
        in_path,
        device,
        nat: text(chain, "type") == "nat",
        drops: text(chain, "policy") == "drop",
    })
}

/// The table that a rule is of, with the named sets and maps that it can refer to.
#[derive(Debug)]
struct Table<'a> {
    /// The family whose packets count.
    judged: Family,
    /// nft's word for the table's own.
    family: &'a str,
    name: &'a str,
    elements: &'a BTreeMap<Name<'a>, &'a [Value]>,
}

impl<'a> Table<'a> {
    /// The elements of a set as a rule names it: spelled out, or `@name`. `None` where they cannot be told.
    fn elements(&self, value: &'a Value) -> Option<&'a [Value]> {
        match value {
            Value::String(name) => {
                let name = name.strip_prefix('@')?;
                self.elements.get(&(self.family, self.name, name)).copied()
            }
            other => Some(other.get("set")?.as_array()?.as_slice()),
        }
    }
}

fn read<'a>(expressions: &'a [Value], table: &Table<'a>) -> Rule {
    let mut rule = Rule::default();
    let mut states = condition::States::default();
    let logs = expressions.iter().any(|one| one.get("log").is_some());
    let decides = expressions.iter().any(|one| {
        ["accept", "drop", "reject", "jump", "goto", "queue"]
            .iter()
            .any(|verdict| one.get(verdict).is_some())
    });
    let mut words = Vec::new();
    for expression in expressions {
        let Some((kind, value)) = expression
            .as_object()
            .and_then(|object| object.iter().next())
        else {
            continue;
        };
        words.push(condition::render(kind, value));
        match kind.as_str() {
            "match" => condition::read(value, &mut rule, &mut states, table),
            "jump" | "goto" => rule.jumps.extend(target(value).map(Jump::to)),
            "vmap" => vmap(value, &mut rule, &mut states, table),
            "limit" if logs && !decides => {}
            kind => rule.statements.extend(of_statement(kind, value)),
        }
    }
    rule.text = words.join(" ");
    rule.new_only = states.new_only;
    rule.accepts_established = rule.conditions.only_state()
        && !rule.new_only
        && (states.accepted || rule.statements.contains(&Statement::Accept));
    rule
}

fn target(value: &Value) -> Option<String> {
    Some(value.get("target")?.as_str()?.to_owned())
}

/// A verdict map: where each of its elements leads, with what the element says about the address.
fn vmap<'a>(value: &'a Value, rule: &mut Rule, states: &mut condition::States, table: &Table<'a>) {
    let key = value.get("key");
    let by_state = key.is_some_and(|key| condition::is_ct(key, "state"));
    rule.conditions.and(if by_state {
        Conditions::State
    } else {
        Conditions::Other
    });
    let elements = value.get("data").and_then(|data| table.elements(data));
    let Some(elements) = elements else {
        let what = "a verdict map that cannot be read".to_owned();
        rule.statements.push(Statement::PerPacket(what));
        return;
    };
    rule.scope.elsewhere |= key.is_some_and(|key| condition::is_of_other(key, table.judged));
    let address = key.and_then(|key| condition::address_position(key, table.judged));
    let by_protocol = key.is_some_and(condition::is_protocol);
    for element in elements {
        let Some([of, verdict]) = element.as_array().map(Vec::as_slice) else {
            continue;
        };
        let networks = address.and_then(|position| condition::address_of(of, position));
        let scope = Scope {
            networks: networks
                .map(|network| NetworkMatch {
                    networks: vec![network],
                    negated: false,
                })
                .into_iter()
                .collect(),
            elsewhere: by_protocol && condition::names_other(of, table.judged),
            ..Scope::default()
        };
        for (kind, value) in verdict.as_object().into_iter().flatten() {
            match kind.as_str() {
                "jump" | "goto" => rule.jumps.extend(target(value).map(|target| Jump {
                    target,
                    scope: scope.clone(),
                })),
                "accept" if by_state && of.as_str() == Some("established") => {
                    states.accepted = true;
                }
                "accept" => {}
                kind => rule.statements.extend(of_statement(kind, value)),
            }
        }
    }
}

fn of_statement(kind: &str, value: &Value) -> Option<Statement> {
    let named = |what: &str| format!("{what} {value}");
    Some(match kind {
        // The counter that every rule may have is for people; one with a name is for somebody's program.
        "counter" if value.is_string() => Statement::Account(named("counter")),
        // Nothing that a packet would miss.
        "counter" | "return" | "continue" | "log" | "comment" | "last" => return None,
        "accept" => Statement::Accept,
        "drop" | "reject" => Statement::Drop,
        "queue" => Statement::Queue,
        "dnat" | "redirect" => Statement::TranslateDestination,
        "snat" | "masquerade" => Statement::TranslateSource,
        "mangle" => return of_mangle(value.get("key")?),
        "secmark" => Statement::Mark(kind.to_owned()),
        "set" if value.get("stmt").is_some() => Statement::PerPacket("meter".to_owned()),
        "set" | "map" | "notrack" | "flow" | "synproxy" | "ct helper" | "ct timeout"
        | "ct expectation" | "ct count" => Statement::Other(kind.to_owned()),
        "xt" => Statement::PerPacket("an xtables extension".to_owned()),
        // quota, limit, meter, tproxy, dup, fwd and whatever else there may be.
        kind => Statement::PerPacket(kind.to_owned()),
    })
}

fn of_mangle(key: &Value) -> Option<Statement> {
    let of = |kind: &str, name: &str| {
        key.get(kind)
            .and_then(|key| key.get("key"))
            .is_some_and(|key| key == name)
    };
    if of("meta", "mark") || of("ct", "mark") {
        return Some(Statement::Mark("mark".to_owned()));
    }
    // What clamps the segment size acts on the first packet of a connection.
    if key.get("tcp option").is_some() || of("meta", "nftrace") {
        return None;
    }
    let what = match key.get("payload") {
        Some(payload) => {
            let part = |name| payload.get(name).and_then(Value::as_str).unwrap_or("?");
            format!("set {} {}", part("protocol"), part("field"))
        }
        None => format!("set {key}"),
    };
    Some(Statement::PerPacket(what))
}
