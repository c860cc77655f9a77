//! Which rules are ours and no longer wanted. Rules of another instance's network never are.

use ipnet::IpNet;

use super::{Dump, FILTER, NAT, Request, Rule, Rules, multicast};
use crate::mark;

/// Comments of upstream's rules.
pub(super) const COMMENTS: [&str; 2] = [mark::COMMENT_MASQ, mark::COMMENT_FORWARD];
/// Where rules of flannel lead that lead to no chain.
const TARGETS: [&str; 3] = ["RETURN", "MASQUERADE", "ACCEPT"];

/// Rules directly in built-in chains, as releases up to 0.19 had them.
#[derive(Debug, Default)]
pub(super) struct Old {
    pub(super) nat: Vec<Rule>,
    pub(super) filter: Vec<Rule>,
}

/// Whether a rule of our chain is of an earlier subnet, network or release of this instance.
pub(super) fn in_our_chain(rule: &Rule, rules: &Rules, request: &Request) -> bool {
    !rules.own.contains(rule)
        && !rules.shared.contains(rule)
        && TARGETS.contains(&rule.target())
        && request.networks().any(|network| is_about(rule, &network))
}

/// Whether a rule names this network, and beside it only parts of it and multicast: no other instance's rule does.
fn is_about(rule: &Rule, network: &IpNet) -> bool {
    let Some(networks) = rule.networks() else {
        return false;
    };
    let multicast: Option<IpNet> = multicast(network).parse().ok();
    networks.contains(network)
        && networks
            .iter()
            .all(|one| network.contains(one) || Some(*one) == multicast)
}

pub(super) fn in_built_in_chains(dump: &Dump, request: &Request) -> Old {
    let mut old = Old::default();
    let masq = dump.table(NAT).rules("POSTROUTING");
    let forward = dump.table(FILTER).rules("FORWARD");
    for network in request.networks() {
        let commented = |rules: &[Rule], comment: &str| -> Vec<Rule> {
            let ours = |rule: &&Rule| {
                rule.comment() == Some(comment)
                    && TARGETS.contains(&rule.target())
                    && is_about(rule, &network)
            };
            rules.iter().filter(ours).cloned().collect()
        };
        old.nat.extend(commented(masq, mark::COMMENT_MASQ));
        old.filter.extend(commented(forward, mark::COMMENT_FORWARD));
        // Rules without a comment may be anybody's: only all four in a row, as no person writes them, are flannel's.
        let first = Rule::new(&format!("-s {network} -d {network} -j RETURN"));
        let run = masq
            .windows(4)
            .filter(|run| run.first() == Some(&first))
            .find(|run| is_old_masquerade(run, &network));
        let Some(run) = run else { continue };
        old.nat.extend(run.iter().cloned());
        let accepting = [
            format!("-s {network} -j ACCEPT"),
            format!("-d {network} -j ACCEPT"),
        ];
        let accepting = accepting.map(|text| Rule::new(&text));
        if let Some(run) = forward.windows(2).find(|run| **run == accepting) {
            old.filter.extend(run.iter().cloned());
        }
    }
    old
}

/// The four rules of releases before 0.16.2, which had no comments.
fn is_old_masquerade(run: &[Rule], network: &IpNet) -> bool {
    let multicast = multicast(network);
    let [_within, out, to_own, into] = run else {
        return false;
    };
    let is = |rule: &Rule, text: &str| {
        *rule == Rule::new(text) || *rule == Rule::new(&format!("{text} --random-fully"))
    };
    let names_a_subnet = to_own.networks().is_some_and(|networks| {
        networks.iter().any(|subnet| {
            network.contains(subnet)
                && *to_own == Rule::new(&format!("! -s {network} -d {subnet} -j RETURN"))
        })
    });
    names_a_subnet
        && is(out, &format!("-s {network} ! -d {multicast} -j MASQUERADE"))
        && is(into, &format!("! -s {network} -d {network} -j MASQUERADE"))
}
