//! The output of `iptables-save` and `ip6tables-save` into chains that can be followed.

use std::net::IpAddr;

use ipnet::IpNet;

use super::filter::{Action, Chain, Hook, Of, Rule, Test};

/// The chains that filter.
pub(super) fn parse(dump: &str, tool: &str) -> Vec<Chain> {
    let mut chains: Vec<Chain> = Vec::new();
    let mut table = String::new();
    let mut filters = false;
    for line in dump.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('*') {
            filters = name != "nat";
            table = format!("{tool} {name}");
        } else if !filters {
        } else if let Some(declaration) = line.strip_prefix(':') {
            let mut words = declaration.split_whitespace();
            let (Some(name), Some(policy)) = (words.next(), words.next()) else {
                continue;
            };
            let hook = match name {
                "PREROUTING" => Some(Hook::Prerouting),
                "INPUT" => Some(Hook::Input),
                "FORWARD" => Some(Hook::Forward),
                _ => None,
            };
            chains.push(Chain {
                table: table.clone(),
                name: name.to_owned(),
                base: hook.map(|hook| (hook, policy == "DROP")),
                rules: Vec::new(),
            });
        } else if let Some(rest) = line.strip_prefix("-A ")
            && let Some((name, rule)) = rest.split_once(' ')
            && let Some(chain) = chains
                .iter_mut()
                .find(|chain| chain.table == table && chain.name == name)
        {
            chain.rules.push(read(rule));
        }
    }
    chains
}

fn read(text: &str) -> Rule {
    let words = words(text);
    let mut rule = Rule {
        tests: Vec::new(),
        action: Action::Nothing,
        text: text.to_owned(),
    };
    let mut negated = false;
    let mut words = words.iter().map(String::as_str).peekable();
    while let Some(word) = words.next() {
        if word == "!" {
            negated = true;
            continue;
        }
        if matches!(word, "-j" | "--jump") {
            rule.action = action(words.next().unwrap_or_default());
            // What follows belongs to the target.
            break;
        }
        if matches!(word, "-g" | "--goto") {
            rule.action = Action::Goto(words.next().unwrap_or_default().to_owned());
            break;
        }
        let value = words.next_if(|next| !next.starts_with('-') && *next != "!");
        let of = match (word, value) {
            ("-m" | "--match" | "--comment", _) => continue,
            ("-p" | "--protocol", Some(value)) => Of::Protocol(vec![value.to_owned()]),
            ("--dport" | "--destination-port" | "--dports", Some(value)) => {
                ports(value).map_or(Of::Unknown, Of::Port)
            }
            ("-i" | "--in-interface", Some(value)) => Of::In(vec![value.to_owned()]),
            ("-o" | "--out-interface", Some(value)) => Of::Out(vec![value.to_owned()]),
            ("-s" | "--source", Some(value)) => networks(value).map_or(Of::Unknown, Of::Source),
            ("-d" | "--destination", Some(value)) => {
                networks(value).map_or(Of::Unknown, Of::Destination)
            }
            ("--ctstate" | "--state", Some(value)) => {
                Of::State(value.split(',').map(str::to_owned).collect())
            }
            ("--dst-type", Some(value)) => Of::DestinationType(value.to_owned()),
            ("--icmpv6-type", Some(value)) => value
                .parse()
                .map_or(Of::Unknown, |kind| Of::Icmp(vec![kind])),
            ("--hl-eq", Some(value)) => value.parse().map_or(Of::Unknown, Of::HopLimit),
            _ => Of::Unknown,
        };
        rule.tests.push(Test { negated, of });
        negated = false;
    }
    rule
}

fn action(target: &str) -> Action {
    match target {
        "ACCEPT" => Action::Accept,
        "DROP" | "REJECT" => Action::Drop,
        "RETURN" => Action::Return,
        // Targets that let the packet go on. Chains of users are not written so by convention, and need not exist.
        "LOG" | "NFLOG" | "MARK" | "CONNMARK" | "TCPMSS" | "TRACE" | "CT" | "NOTRACK"
        | "CHECKSUM" | "ULOG" | "AUDIT" | "SET" | "TOS" | "DSCP" | "CLASSIFY" | "TTL" | "HL" => {
            Action::Nothing
        }
        chain => Action::Jump(chain.to_owned()),
    }
}

fn ports(value: &str) -> Option<Vec<(u16, u16)>> {
    value
        .split(',')
        .map(|part| match part.split_once(':') {
            Some((from, to)) => Some((
                if from.is_empty() {
                    0
                } else {
                    from.parse().ok()?
                },
                if to.is_empty() {
                    u16::MAX
                } else {
                    to.parse().ok()?
                },
            )),
            None => part.parse().ok().map(|port| (port, port)),
        })
        .collect()
}

fn networks(value: &str) -> Option<Vec<IpNet>> {
    value
        .split(',')
        .map(|part| {
            part.parse()
                .or_else(|_| part.parse::<IpAddr>().map(IpNet::from))
                .ok()
        })
        .collect()
}

/// Splits at spaces outside of double quotes, as `iptables-save` writes them.
fn words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let (mut quoted, mut escaped) = (false, false);
    for c in text.chars() {
        match c {
            _ if escaped => {
                word.push(c);
                escaped = false;
            }
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            ' ' if !quoted => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
            }
            _ => word.push(c),
        }
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}
