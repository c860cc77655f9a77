//! The output of `iptables-save` or `ip6tables-save`, legacy or nft, into chains.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use super::firewall::{
    Base, Chain, Conditions, DeviceMatch, Jump, NetworkMatch, Rule, Scope, Statement,
    owner_of_chain,
};
use crate::addr::Family;

/// The chains of a dump of the family's tables. `variant` tells dumps apart that are of one node: `legacy` or `nft`.
///
/// Reads what it understands: a line that is none of a dump's is none of a rule either.
pub fn parse(dump: &str, variant: &str, family: Family) -> Vec<Chain> {
    let mut chains = Vec::new();
    let mut table = Table::default();
    for line in dump.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('*') {
            chains.append(&mut table.finish());
            table = Table::new(name, variant, family);
        } else if let Some(declaration) = line.strip_prefix(':') {
            table.declare(declaration);
        } else if line.starts_with("-A ") {
            table.rules.push(line.to_owned());
        }
    }
    chains.append(&mut table.finish());
    chains
}

/// The tables of a dump, by name.
pub fn tables(dump: &str) -> BTreeSet<String> {
    dump.lines()
        .filter_map(|line| line.trim().strip_prefix('*'))
        .map(str::to_owned)
        .collect()
}

#[derive(Debug, Default)]
struct Table {
    name: String,
    label: String,
    chains: BTreeMap<String, Chain>,
    rules: Vec<String>,
}

impl Table {
    fn new(name: &str, variant: &str, family: Family) -> Self {
        let program = match family {
            Family::V4 => "iptables",
            Family::V6 => "ip6tables",
        };
        Self {
            name: name.to_owned(),
            label: format!("{program}-{variant} table {name}"),
            ..Self::default()
        }
    }

    /// `FORWARD DROP [0:0]`, or `NAME - [0:0]`. The counters are left out.
    fn declare(&mut self, declaration: &str) {
        let mut words = declaration.split_whitespace();
        let (Some(name), Some(policy)) = (words.next(), words.next()) else {
            return;
        };
        let base = (policy != "-").then(|| Base {
            in_path: matches!(name, "PREROUTING" | "FORWARD" | "POSTROUTING"),
            device: None,
            nat: self.name == "nat",
            drops: policy == "DROP",
        });
        let chain = Chain {
            table: self.label.clone(),
            name: name.to_owned(),
            base,
            owner: owner_of_chain(name),
            rules: Vec::new(),
        };
        self.chains.insert(name.to_owned(), chain);
    }

    fn finish(&mut self) -> Vec<Chain> {
        for line in std::mem::take(&mut self.rules) {
            if let Some((chain, rule)) = self.rule(&line)
                && let Some(chain) = self.chains.get_mut(&chain)
            {
                chain.rules.push(rule);
            }
        }
        std::mem::take(&mut self.chains).into_values().collect()
    }

    fn rule(&self, line: &str) -> Option<(String, Rule)> {
        let words = split(line);
        let mut words = words.iter().map(String::as_str);
        let mut read = Reading::default();
        let mut chain = None;
        let mut negated = false;
        while let Some(word) = words.next() {
            let not = std::mem::replace(&mut negated, word == "!");
            match word {
                "-A" => chain = words.next(),
                "-s" | "--source" | "-d" | "--destination" => read.network(words.next(), not),
                "-i" | "--in-interface" | "-o" | "--out-interface" => {
                    read.device(words.next(), not);
                }
                "-p" | "--protocol" => {
                    words.next();
                    read.conditions.and(Conditions::Other);
                }
                "-m" | "--match" => read.matches.extend(words.next()),
                "-j" | "--jump" | "-g" | "--goto" => read.target = words.next(),
                "--ctstate" | "--state" => read.state(words.next(), not),
                "--dst-type" => {
                    let local = words.next() == Some("LOCAL");
                    read.scope.elsewhere |= local && !not;
                    read.conditions.and(Conditions::Other);
                }
                "--comment" | "--log-prefix" | "--nflog-prefix" | "--string" | "--hex-string" => {
                    words.next();
                }
                _ => {}
            }
        }
        let rule = read.finish(line, &self.name, &self.chains);
        Some((chain?.to_owned(), rule))
    }
}

/// What was read of a rule so far.
#[derive(Debug, Default)]
struct Reading<'a> {
    scope: Scope,
    matches: Vec<&'a str>,
    target: Option<&'a str>,
    conditions: Conditions,
    new_only: bool,
}

impl Reading<'_> {
    fn network(&mut self, value: Option<&str>, negated: bool) {
        self.conditions.and(Conditions::Address);
        // One that cannot be read may be any.
        let networks: Option<Vec<IpNet>> =
            value.and_then(|value| value.split(',').map(network).collect());
        if let Some(networks) = networks {
            self.scope.networks.push(NetworkMatch { networks, negated });
        }
    }

    fn device(&mut self, value: Option<&str>, negated: bool) {
        self.conditions.and(Conditions::Other);
        if let Some(name) = value {
            let name = match name.strip_suffix('+') {
                Some(prefix) => format!("{prefix}*"),
                None => name.to_owned(),
            };
            let names = vec![name];
            self.scope.devices.push(DeviceMatch { names, negated });
        }
    }

    fn state(&mut self, value: Option<&str>, negated: bool) {
        let established = value.is_some_and(|value| {
            value
                .split(',')
                .any(|state| state == "ESTABLISHED" || state == "SNAT" || state == "DNAT")
        });
        self.conditions.and(Conditions::State);
        self.new_only |= established == negated;
    }

    fn finish(mut self, line: &str, table: &str, chains: &BTreeMap<String, Chain>) -> Rule {
        let target = self.target.unwrap_or_default();
        let jump = chains.contains_key(target);
        for name in &self.matches {
            match *name {
                "comment" => {}
                "conntrack" | "state" => self.conditions.and(Conditions::State),
                _ => self.conditions.and(Conditions::Other),
            }
        }
        let statements = if jump { None } else { of_target(target) };
        let logs = matches!(target, "LOG" | "NFLOG" | "ULOG");
        let mut statements: Vec<Statement> = statements.into_iter().collect();
        statements.extend(
            self.matches
                .iter()
                .filter_map(|name| of_match(name, table, logs)),
        );
        let accepts_established =
            self.conditions.only_state() && !self.new_only && target == "ACCEPT";
        Rule {
            text: line.to_owned(),
            scope: self.scope,
            statements,
            jumps: if jump {
                vec![Jump::to(target.to_owned())]
            } else {
                Vec::new()
            },
            conditions: self.conditions,
            new_only: self.new_only,
            accepts_established,
        }
    }
}

fn network(text: &str) -> Option<IpNet> {
    if let Ok(net) = text.parse() {
        return Some(net);
    }
    match text.split_once('/') {
        None => Some(text.parse::<std::net::IpAddr>().ok()?.into()),
        Some((address, mask)) => {
            IpNet::with_netmask(address.parse().ok()?, mask.parse().ok()?).ok()
        }
    }
}

fn of_target(name: &str) -> Option<Statement> {
    Some(match name {
        // Neither stops nor alters a packet, or, TCPMSS, only the first of a connection.
        "" | "RETURN" | "LOG" | "NFLOG" | "ULOG" | "TRACE" | "AUDIT" | "TCPMSS" => return None,
        "ACCEPT" => Statement::Accept,
        "DROP" | "REJECT" | "TARPIT" | "STEAL" => Statement::Drop,
        "DNAT" | "REDIRECT" | "NETMAP" => Statement::TranslateDestination,
        "SNAT" | "MASQUERADE" | "SAME" => Statement::TranslateSource,
        "MARK" | "CONNMARK" | "SECMARK" | "CONNSECMARK" => Statement::Mark(name.to_owned()),
        "NFQUEUE" | "QUEUE" => Statement::Queue,
        "CT" | "NOTRACK" | "SET" | "SYNPROXY" => Statement::Other(name.to_owned()),
        "ACCT" | "NFACCT" => Statement::Account(name.to_owned()),
        // DSCP, TOS, TTL, HL, ECN, SNPT, CLASSIFY, TPROXY, TEE, RATEEST, HMARK and whatever else there may be.
        _ => Statement::PerPacket(name.to_owned()),
    })
}

fn of_match(name: &str, table: &str, logs: bool) -> Option<Statement> {
    match name {
        "nfacct" => Some(Statement::Account(name.to_owned())),
        "limit" | "hashlimit" if logs => None,
        // In table nat it divides connections.
        "statistic" if table == "nat" => None,
        "quota" | "quota2" | "limit" | "hashlimit" | "connbytes" | "rateest" | "statistic"
        | "string" | "u32" | "bpf" | "length" | "length2" | "account" => {
            Some(Statement::PerPacket(name.to_owned()))
        }
        _ => None,
    }
}

/// Splits a line as a shell would: quotes keep blanks, a backslash keeps the next character.
pub(crate) fn split(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quoted = false;
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        match character {
            '"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            '\\' => word.get_or_insert_default().extend(characters.next()),
            blank if blank.is_whitespace() && !quoted => words.extend(word.take()),
            other => word.get_or_insert_default().push(other),
        }
    }
    words.extend(word);
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_split_as_in_a_shell() {
        assert_eq!(
            split(r#"-A X -m comment --comment "a \"b\" -j DROP" -j Y"#),
            [
                "-A",
                "X",
                "-m",
                "comment",
                "--comment",
                "a \"b\" -j DROP",
                "-j",
                "Y"
            ]
        );
        assert_eq!(split(r#"a "" b"#), ["a", "", "b"]);
    }

    #[test]
    fn counters_do_not_show() {
        let dump =
            |count| format!("*filter\n:FORWARD DROP [{count}:99]\n-A FORWARD -j ACCEPT\nCOMMIT\n");
        assert_eq!(
            parse(&dump(1), "legacy", Family::V4),
            parse(&dump(2), "legacy", Family::V4)
        );
        assert_eq!(tables(&dump(1)), BTreeSet::from(["filter".to_owned()]));
    }

    #[test]
    fn masks_are_prefixes() {
        assert_eq!(network("10.0.0.0/255.0.0.0"), "10.0.0.0/8".parse().ok());
        assert_eq!(network("10.1.2.3"), "10.1.2.3/32".parse().ok());
        assert_eq!(network("10.0.0.1/255.0.255.0"), None);
        assert_eq!(network("fd05::/ffff::"), "fd05::/16".parse().ok());
        assert_eq!(network("fd05::1"), "fd05::1/128".parse().ok());
        assert_eq!(network("::1/::ffff"), None);
    }
}
