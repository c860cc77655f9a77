//! Tables as `iptables-restore --noflush` changes them.

use std::collections::BTreeMap;

use super::super::iptables::{Dump, Rule};

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Model {
    tables: BTreeMap<String, BTreeMap<String, Vec<String>>>,
}

const BUILT_IN: [(&str, &[&str]); 2] = [
    ("filter", &["INPUT", "FORWARD", "OUTPUT"]),
    ("nat", &["PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"]),
];

impl Default for Model {
    fn default() -> Self {
        let chains = |names: &[&str]| {
            let chain = |name: &&str| ((*name).to_owned(), Vec::new());
            names.iter().map(chain).collect()
        };
        Self {
            tables: BUILT_IN
                .map(|(table, names)| (table.to_owned(), chains(names)))
                .into(),
        }
    }
}

impl Model {
    pub(super) fn rules(&self, table: &str, chain: &str) -> &[String] {
        self.tables[table].get(chain).map_or(&[], Vec::as_slice)
    }

    pub(super) fn append(&mut self, table: &str, chain: &str, rule: &str) {
        let chains = self.tables.get_mut(table).unwrap();
        chains
            .entry(chain.to_owned())
            .or_default()
            .push(rule.to_owned());
    }

    pub(super) fn remove_at(&mut self, table: &str, chain: &str, at: usize) {
        let chains = self.tables.get_mut(table).unwrap();
        chains.get_mut(chain).unwrap().remove(at);
    }

    pub(super) fn render(&self) -> String {
        let mut text = String::new();
        for (table, chains) in &self.tables {
            text.extend(["*", table, "\n"]);
            for name in chains.keys() {
                let policy = if is_built_in(table, name) {
                    "ACCEPT"
                } else {
                    "-"
                };
                text.extend([":", name, " ", policy, " [0:0]\n"]);
            }
            for (name, rules) in chains {
                for rule in rules {
                    text.extend(["-A ", name, " ", rule, "\n"]);
                }
            }
            text += "COMMIT\n";
        }
        text
    }

    pub(super) fn dump(&self) -> Dump {
        Dump::parse(&self.render())
    }

    /// Applies a payload, each table as a whole or not at all. The states that packets see are the returned ones.
    pub(super) fn apply(&mut self, payload: &str) -> Result<Vec<Model>, String> {
        let mut seen = Vec::new();
        let mut table: Option<(String, BTreeMap<String, Vec<String>>)> = None;
        for line in payload.lines() {
            if let Some(name) = line.strip_prefix('*') {
                table = Some((name.to_owned(), self.tables[name].clone()));
            } else if line == "COMMIT" {
                let (name, chains) = table.take().ok_or("COMMIT without a table")?;
                self.tables.insert(name, chains);
                seen.push(self.clone());
            } else {
                let (name, chains) = table.as_mut().ok_or("a line without a table")?;
                change(name, chains, line).map_err(|error| format!("{line}: {error}"))?;
            }
        }
        match table {
            Some(_) => Err("no COMMIT".to_owned()),
            None => Ok(seen),
        }
    }
}

fn is_built_in(table: &str, chain: &str) -> bool {
    BUILT_IN
        .iter()
        .any(|(name, chains)| *name == table && chains.contains(&chain))
}

fn change(
    table: &str,
    chains: &mut BTreeMap<String, Vec<String>>,
    line: &str,
) -> Result<(), String> {
    let mut words = line.splitn(3, ' ');
    let (command, name) = (words.next().unwrap(), words.next().unwrap());
    let rest = words.next().unwrap_or_default();
    let target = Rule::new(rest).target().to_owned();
    let leads_nowhere =
        target.starts_with("FLANNEL") && !chains.contains_key(&target) && command != "-I";
    if leads_nowhere {
        return Err(format!("no chain {target}"));
    }
    if command == "-N" {
        let doubled = chains.insert(name.to_owned(), Vec::new()).is_some();
        return (!doubled).then_some(()).ok_or("it is there".into());
    }
    if command == "-X" {
        let used = chains
            .values()
            .flatten()
            .any(|rule| Rule::new(rule).target() == name);
        if used || is_built_in(table, name) {
            return Err("it is in use".into());
        }
        let rules = chains.remove(name).ok_or("no such chain")?;
        return rules.is_empty().then_some(()).ok_or("not empty".into());
    }
    let chain = chains.get_mut(name).ok_or("no such chain")?;
    match command {
        "-F" => chain.clear(),
        "-A" => chain.push(rest.to_owned()),
        "-I" => chain.insert(0, rest.strip_prefix("1 ").ok_or("a place")?.to_owned()),
        "-D" => {
            let at = chain.iter().position(|rule| rule == rest);
            chain.remove(at.ok_or("no such rule")?);
        }
        other => return Err(format!("what is {other}?")),
    }
    Ok(())
}
