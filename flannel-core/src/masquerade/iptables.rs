//! The rules in iptables, and the transactions that bring a node to them.

use std::fmt::Write as _;

use super::{KUBE_PROXY_MARK, Request, multicast};
use crate::mark;

mod dump;
mod stale;

pub use dump::{Dump, Rule, Table};

/// Table of the masquerade rules.
pub const NAT: &str = "nat";
/// Table of the accepting rules.
pub const FILTER: &str = "filter";

/// When a plan is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// At a start, when the jump to our chain goes to the end of its chain, as upstream's does.
    Start,
    /// Later, when a jump stays where it is: others add rules behind it, and would be in a race with us.
    Resync,
}

/// What brings a node to its rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// For the standard input of `iptables-restore --noflush`; empty when all is in place. Each table is one transaction, and one
    /// that fails as a whole when somebody else has changed what it is about.
    pub payload: String,
    /// Whether rules are missing, doubled or out of order. Else the plan only removes.
    pub lacking: bool,
    /// Rules of earlier networks, subnets and releases that go, as `iptables-save` shows them.
    pub stale: Vec<String>,
}

impl Plan {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.payload.is_empty()
    }
}

/// The rules of one table: a jump out of a built-in chain to a chain of ours, and that chain's rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// The table.
    pub table: &'static str,
    /// The built-in chain.
    pub base: &'static str,
    /// Our chain.
    pub chain: &'static str,
    /// The rule in the built-in chain.
    pub jump: Rule,
    /// Rules of our chain that every instance has in common. They come before the others.
    pub shared: Vec<Rule>,
    /// Rules of our chain that name this instance's networks, in order. Without any, there is nothing to jump for.
    pub own: Vec<Rule>,
}

/// The masquerade rules (upstream: `masqRules`). None to have if it is not asked for.
pub fn masquerade(request: &Request) -> Rules {
    let Request {
        network, subnet, ..
    } = request;
    let comment = format!("-m comment --comment \"{}\"", mark::COMMENT_MASQ);
    let random = if request.random_fully {
        " --random-fully"
    } else {
        ""
    };
    let multicast = multicast(network);
    let marked = format!("{KUBE_PROXY_MARK:#x}/{KUBE_PROXY_MARK:#x}");
    let own = [
        format!("-s {subnet} -d {network} {comment} -j RETURN"),
        format!("-s {network} -d {subnet} {comment} -j RETURN"),
        format!("! -s {network} -d {subnet} {comment} -j RETURN"),
        format!("-s {network} ! -d {multicast} {comment} -j MASQUERADE{random}"),
        format!("! -s {network} -d {network} {comment} -j MASQUERADE{random}"),
    ];
    Rules {
        table: NAT,
        base: "POSTROUTING",
        chain: mark::CHAIN_MASQ,
        jump: Rule::new(&format!("{comment} -j {}", mark::CHAIN_MASQ)),
        shared: vec![Rule::new(&format!(
            "-m mark --mark {marked} {comment} -j RETURN"
        ))],
        own: rules_if(request.masq, &own),
    }
}

/// The accepting rules (upstream: `forwardRules`). None to have if it is not asked for.
pub fn forward(request: &Request) -> Rules {
    let network = request.network;
    let comment = format!("-m comment --comment \"{}\"", mark::COMMENT_FORWARD);
    let own = [
        format!("-s {network} {comment} -j ACCEPT"),
        format!("-d {network} {comment} -j ACCEPT"),
    ];
    Rules {
        table: FILTER,
        base: "FORWARD",
        chain: mark::CHAIN_FORWARD,
        jump: Rule::new(&format!("{comment} -j {}", mark::CHAIN_FORWARD)),
        shared: Vec::new(),
        own: rules_if(request.forward, &own),
    }
}

fn rules_if(wanted: bool, texts: &[String]) -> Vec<Rule> {
    let texts = if wanted { texts } else { &[] };
    texts.iter().map(|text| Rule::new(text)).collect()
}

/// Plans the way from what `iptables-save` shows to what is wanted.
pub fn plan(dump: &Dump, request: &Request, moment: Moment) -> Plan {
    let mut plan = Plan::default();
    let old = stale::in_built_in_chains(dump, request);
    for (rules, old) in [
        (masquerade(request), &old.nat),
        (forward(request), &old.filter),
    ] {
        plan_table(
            &mut plan,
            dump.table(rules.table),
            &rules,
            old,
            request,
            moment,
        );
    }
    plan
}

/// Plans the removal of everything that is ours in a dump, whatever networks it names.
pub fn clear(dump: &Dump) -> Plan {
    let mut plan = Plan::default();
    for (table, base, chain) in [
        (NAT, "POSTROUTING", mark::CHAIN_MASQ),
        (FILTER, "FORWARD", mark::CHAIN_FORWARD),
    ] {
        let found = dump.table(table);
        if !found.has(chain) {
            continue;
        }
        let mut lines = Lines::default();
        for rule in found.jumps(base, chain) {
            lines.delete(base, rule);
            plan.stale.push(format!("-A {base} {rule}"));
        }
        for rule in found.rules(chain) {
            plan.stale.push(format!("-A {chain} {rule}"));
        }
        lines.remove_chain(chain);
        plan.payload.push_str(&lines.transaction(table));
    }
    plan
}

fn plan_table(
    plan: &mut Plan,
    table: &Table,
    rules: &Rules,
    old: &[Rule],
    request: &Request,
    moment: Moment,
) {
    let mut lines = Lines::default();
    let there = table.rules(rules.chain);
    let stale: Vec<&Rule> = there
        .iter()
        .filter(|rule| stale::in_our_chain(rule, rules, request))
        .collect();
    for rule in &stale {
        lines.delete(rules.chain, rule);
        plan.stale.push(format!("-A {} {rule}", rules.chain));
    }
    for rule in old {
        lines.delete(rules.base, rule);
        plan.stale.push(format!("-A {} {rule}", rules.base));
    }
    if rules.own.is_empty() {
        let nothing_left = there
            .iter()
            .all(|rule| stale.contains(&rule) || rules.shared.contains(rule));
        // Upstream's other instance may be between emptying the chain and filling it.
        let due = moment == Moment::Start || !stale.is_empty();
        if table.has(rules.chain) && nothing_left && due {
            for jump in table.jumps(rules.base, rules.chain) {
                lines.delete(rules.base, jump);
                plan.stale.push(format!("-A {} {jump}", rules.base));
            }
            lines.remove_chain(rules.chain);
        }
    } else {
        let before = lines.0.len();
        if !table.has(rules.chain) {
            lines.add(format!("-N {}", rules.chain));
        }
        put_own(&mut lines, there, rules);
        put_jump(&mut lines, table, rules, old, moment);
        plan.lacking |= lines.0.len() > before;
    }
    plan.payload.push_str(&lines.transaction(rules.table));
}

/// The rules of our chain: the shared ones before our own, our own in order, each once.
fn put_own(lines: &mut Lines, there: &[Rule], rules: &Rules) {
    let places = |rule: &Rule| -> Vec<usize> {
        let same = there.iter().enumerate().filter(|(_, other)| *other == rule);
        same.map(|(at, _)| at).collect()
    };
    let own: Vec<Vec<usize>> = rules.own.iter().map(places).collect();
    let once: Vec<usize> = own
        .iter()
        .filter_map(|places| <[usize; 1]>::try_from(places.as_slice()).ok())
        .flatten()
        .collect();
    let in_order = once.len() == own.len() && once.is_sorted();
    let first = own.iter().flatten().min().copied();
    // In reverse, because each goes to the front.
    for rule in rules.shared.iter().rev() {
        let right = match *places(rule).as_slice() {
            // Our own rules go to the end if they move at all.
            [at] => !in_order || first.is_none_or(|first| at < first),
            _ => false,
        };
        if !right {
            lines.delete_all(rules.chain, there, rule);
            lines.add(format!("-I {} 1 {rule}", rules.chain));
        }
    }
    if in_order {
        return;
    }
    for rule in &rules.own {
        lines.delete_all(rules.chain, there, rule);
    }
    for rule in &rules.own {
        lines.add(format!("-A {} {rule}", rules.chain));
    }
}

/// The one jump to our chain.
fn put_jump(lines: &mut Lines, table: &Table, rules: &Rules, old: &[Rule], moment: Moment) {
    let jumps: Vec<&Rule> = table.jumps(rules.base, rules.chain).collect();
    let last = table
        .rules(rules.base)
        .iter()
        .rev()
        .find(|rule| !old.contains(rule));
    let in_place = jumps == [&rules.jump];
    if in_place && (moment == Moment::Resync || last == Some(&rules.jump)) {
        return;
    }
    for jump in jumps {
        lines.delete(rules.base, jump);
    }
    lines.add(format!("-A {} {}", rules.base, rules.jump));
}

/// Lines of one table's transaction.
#[derive(Debug, Default)]
struct Lines(Vec<String>);

impl Lines {
    fn add(&mut self, line: String) {
        self.0.push(line);
    }

    fn delete(&mut self, chain: &str, rule: &Rule) {
        self.add(format!("-D {chain} {rule}"));
    }

    fn delete_all(&mut self, chain: &str, there: &[Rule], rule: &Rule) {
        for same in there.iter().filter(|other| *other == rule) {
            self.delete(chain, same);
        }
    }

    fn remove_chain(&mut self, chain: &str) {
        self.add(format!("-F {chain}"));
        self.add(format!("-X {chain}"));
    }

    fn transaction(&self, table: &str) -> String {
        if self.0.is_empty() {
            return String::new();
        }
        let mut text = format!("*{table}\n");
        for line in &self.0 {
            // Writing to a string cannot fail.
            let _ok = writeln!(text, "{line}");
        }
        text.push_str("COMMIT\n");
        text
    }
}

/// The listing that upstream leaves in a table where nothing else is: what goldens are made of.
pub fn listing(rules: &Rules) -> Vec<String> {
    if rules.own.is_empty() {
        return Vec::new();
    }
    std::iter::once(format!("-A {} {}", rules.base, rules.jump))
        .chain(
            rules
                .shared
                .iter()
                .chain(&rules.own)
                .map(|rule| format!("-A {} {rule}", rules.chain)),
        )
        .collect()
}
