//! What `iptables-save` shows of the chains that matter, rule by rule, as it was written.

use std::collections::BTreeMap;
use std::fmt;

use ipnet::IpNet;

use crate::fastpath::iptables::split;

/// One rule, without the chain's name in front. Equal are rules that say the same, in whatever order: versions of iptables differ
/// in that.
#[derive(Clone, Debug)]
pub struct Rule {
    text: String,
    /// The options with their values, sorted, without `-m`.
    options: Vec<Vec<String>>,
}

impl Rule {
    /// Reads what follows `-A CHAIN `.
    pub fn new(text: &str) -> Self {
        let mut options: Vec<Vec<String>> = Vec::new();
        let mut negated = false;
        for word in split(text) {
            if word == "!" || (word.starts_with('-') && !negated) {
                negated = word == "!";
                options.push(vec![word]);
                continue;
            }
            negated = false;
            match options.last_mut() {
                Some(option) => option.push(word),
                None => options.push(vec![word]),
            }
        }
        options.retain(|option| option.first().is_none_or(|name| name != "-m"));
        options.sort();
        Self {
            text: text.to_owned(),
            options,
        }
    }

    /// Where the rule leads: `MASQUERADE`, the name of a chain, or nothing.
    pub fn target(&self) -> &str {
        ["-j", "-g"]
            .into_iter()
            .find_map(|name| self.value(name))
            .unwrap_or_default()
    }

    /// Its comment.
    pub fn comment(&self) -> Option<&str> {
        self.value("--comment")
    }

    /// Whether it is for every packet.
    pub fn is_for_all(&self) -> bool {
        let about = ["-j", "-g", "--comment", "--reject-with"];
        self.options
            .iter()
            .filter_map(|option| option.first())
            .all(|name| about.contains(&name.as_str()))
    }

    /// The networks that it names as source or destination, negated or not. `None` where one cannot be read.
    pub fn networks(&self) -> Option<Vec<IpNet>> {
        let mut networks = Vec::new();
        for option in &self.options {
            let words: Vec<&str> = option
                .iter()
                .map(String::as_str)
                .filter(|word| *word != "!")
                .collect();
            if let ["-s" | "-d", values @ ..] = words.as_slice() {
                for value in values {
                    networks.push(value.parse().ok()?);
                }
            }
        }
        Some(networks)
    }

    fn value(&self, name: &str) -> Option<&str> {
        let option = self
            .options
            .iter()
            .find(|option| option.first().is_some_and(|first| first == name))?;
        option.get(1).map(String::as_str)
    }
}

impl PartialEq for Rule {
    fn eq(&self, other: &Self) -> bool {
        self.options == other.options
    }
}

impl Eq for Rule {}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// One table: chains with their rules in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    chains: BTreeMap<String, Vec<Rule>>,
    policies: BTreeMap<String, String>,
}

impl Table {
    /// Whether the chain is there.
    pub fn has(&self, chain: &str) -> bool {
        self.chains.contains_key(chain)
    }

    /// The rules of a chain; none where there is no such chain.
    pub fn rules(&self, chain: &str) -> &[Rule] {
        self.chains.get(chain).map_or(&[], Vec::as_slice)
    }

    /// What happens at the end of a built-in chain.
    pub fn policy(&self, chain: &str) -> Option<&str> {
        self.policies.get(chain).map(String::as_str)
    }

    /// The rules of one chain that lead to another.
    pub(super) fn jumps<'a>(
        &'a self,
        base: &str,
        chain: &'a str,
    ) -> impl Iterator<Item = &'a Rule> {
        self.rules(base)
            .iter()
            .filter(move |rule| rule.target() == chain)
    }
}

/// All tables of one back end and one address family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dump {
    tables: BTreeMap<String, Table>,
    nothing: Table,
}

impl Dump {
    /// Reads the output of `iptables-save`, or several of them. A table that is not in it has nothing but its built-in chains.
    pub fn parse(text: &str) -> Self {
        let mut dump = Self::default();
        let mut outside = Table::default();
        let mut table = &mut outside;
        for line in text.lines().map(str::trim_end) {
            if let Some(name) = line.strip_prefix('*') {
                table = dump.tables.entry(name.to_owned()).or_default();
            } else if let Some(declaration) = line.strip_prefix(':') {
                let mut words = declaration.split_whitespace();
                if let (Some(name), Some(policy)) = (words.next(), words.next()) {
                    table.chains.entry(name.to_owned()).or_default();
                    if policy != "-" {
                        table.policies.insert(name.to_owned(), policy.to_owned());
                    }
                }
            } else if let Some(rule) = line.strip_prefix("-A ") {
                let (chain, rule) = rule.split_once(' ').unwrap_or((rule, ""));
                let rules = table.chains.entry(chain.to_owned()).or_default();
                rules.push(Rule::new(rule));
            }
        }
        dump
    }

    /// A table by its name.
    pub fn table(&self, name: &str) -> &Table {
        self.tables.get(name).unwrap_or(&self.nothing)
    }

    /// Number of rules that are not ours, for telling which back end a node uses.
    pub fn foreign_rules(&self) -> usize {
        self.tables
            .values()
            .flat_map(|table| table.chains.values().flatten())
            .filter(|rule| {
                !rule
                    .comment()
                    .is_some_and(|comment| super::stale::COMMENTS.contains(&comment))
            })
            .count()
    }

    /// Whether kubelet or kube-proxy have left word that this is the back end they use.
    pub fn has_hint(&self) -> bool {
        ["KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"]
            .iter()
            .any(|chain| self.table("mangle").has(chain))
    }
}
