//! The nftables rules against upstream's listings.

use super::super::Request;
use super::super::nft::{Change, Ruleset, listing, plan, remove};
use super::{ours, request};
use crate::addr::Family;

const V4: &str = "table ip flannel-ipv4 {
\tcomment \"rules for flannel-ipv4\"
\tchain postrtg {
\t\tcomment \"chain to manage traffic masquerading by flannel\"
\t\ttype nat hook postrouting priority srcnat; policy accept;
\t\tmeta mark 0x00004000 return
\t\tip saddr 10.5.65.0/24 ip daddr 10.5.0.0/16 return
\t\tip saddr 10.5.0.0/16 ip daddr 10.5.65.0/24 return
\t\tip saddr != 10.5.65.0/24 ip daddr 10.5.0.0/16 return
\t\tip saddr 10.5.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random
\t\tip saddr != 10.5.0.0/16 ip daddr 10.5.0.0/16 masquerade fully-random
\t}

\tchain forward {
\t\tcomment \"chain to accept flannel traffic\"
\t\ttype filter hook forward priority filter; policy accept;
\t\tip saddr 10.5.0.0/16 accept
\t\tip daddr 10.5.0.0/16 accept
\t}
}
";
const NO_V6: &str = "table ip6 flannel-ipv6 {\n\tcomment \"rules for flannel-ipv6\"\n}\n";

fn planned(listed: Option<&str>, settled: Option<&str>, request: &Request) -> Change {
    plan(
        Family::V4,
        listed,
        settled,
        Some(request),
        Ruleset::Upstream,
    )
}

#[test]
fn listings_are_upstreams() {
    assert_eq!(listing(Family::V4, Some(&ours()), Ruleset::Upstream), V4);
    assert_eq!(listing(Family::V6, None, Ruleset::Upstream), NO_V6);
}

#[test]
fn the_correct_ruleset_differs_in_two_rules() {
    let correct = listing(Family::V4, Some(&ours()), Ruleset::Correct);
    let differing: Vec<(&str, &str)> = V4
        .lines()
        .zip(correct.lines())
        .filter(|(one, other)| one != other)
        .collect();
    assert_eq!(
        differing,
        [
            (
                "\t\tmeta mark 0x00004000 return",
                "\t\tmeta mark & 0x00004000 == 0x00004000 return"
            ),
            (
                "\t\tip saddr != 10.5.65.0/24 ip daddr 10.5.0.0/16 return",
                "\t\tip saddr != 10.5.0.0/16 ip daddr 10.5.65.0/24 return"
            ),
        ]
    );
}

#[test]
fn only_what_is_asked_for() {
    let without = |masq, forward| {
        let request = Request {
            masq,
            forward,
            ..ours()
        };
        listing(Family::V4, Some(&request), Ruleset::Upstream)
    };
    assert!(!without(false, true).contains("postrtg"));
    assert!(!without(true, false).contains("chain forward"));
    assert_eq!(without(false, false).lines().count(), 3);
}

#[test]
fn what_is_in_place_stays() {
    assert_eq!(planned(Some(V4), None, &ours()), Change::None);
    // As another version of nft prints it.
    let printed = V4.replace("fully-random", "random,fully-random");
    assert_eq!(
        planned(Some(&printed), Some(&printed), &ours()),
        Change::None
    );
    assert_ne!(planned(Some(&printed), None, &ours()), Change::None);
}

#[test]
fn rules_change_without_a_change_of_hooks_where_that_is_enough() {
    let altered = V4.replace("\t\tip saddr 10.5.0.0/16 accept\n", "");
    let Change::Apply(payload) = planned(Some(&altered), Some(V4), &ours()) else {
        panic!("nothing planned");
    };
    assert!(payload.starts_with("flush chain ip flannel-ipv4 postrtg\nadd rule ip flannel-ipv4 postrtg meta mark 0x00004000 return\n"));
    assert!(!payload.contains("delete"));
    let other_hook = V4.replace("priority srcnat", "priority 50");
    let Change::Apply(payload) = planned(Some(&other_hook), Some(V4), &ours()) else {
        panic!("nothing planned");
    };
    assert_eq!(payload, remove(Family::V4) + V4);
    assert_eq!(
        planned(None, Some(V4), &ours()),
        Change::Apply(V4.to_owned())
    );
}

#[test]
fn another_instances_table_is_taken_over_at_a_start_only() {
    let theirs = request("10.12.0.0/16", "10.12.1.0/24");
    let table = listing(Family::V4, Some(&theirs), Ruleset::Upstream);
    assert!(matches!(
        planned(Some(&table), None, &ours()),
        Change::Apply(_)
    ));
    assert_eq!(
        planned(Some(&table), Some(V4), &ours()),
        Change::Contested("10.12.0.0/16".into())
    );
    // What was ours before is nobody else's.
    let moved = Request {
        previous: Some((theirs.network, theirs.subnet)),
        ..ours()
    };
    assert!(matches!(
        planned(Some(&table), Some(V4), &moved),
        Change::Apply(_)
    ));
}
