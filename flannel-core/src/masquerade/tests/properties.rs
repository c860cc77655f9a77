//! What holds of every plan, whatever is on the node.

use proptest::{collection::vec, prelude::*, sample::select};

use super::super::Request;
use super::super::iptables::{Moment, Rule, forward, masquerade, plan};
use super::model::Model;
use super::{ours, request};

fn theirs() -> Request {
    request("10.12.0.0/16", "10.12.1.0/24")
}

fn before() -> Request {
    request("10.9.0.0/16", "10.9.3.0/24")
}

fn now() -> Request {
    Request {
        previous: Some((before().network, before().subnet)),
        ..ours()
    }
}

/// Rules that may be in any chain, with what they are.
fn pool() -> Vec<(&'static str, &'static str, String)> {
    let mut pool = Vec::new();
    let older = request("10.5.0.0/16", "10.5.7.0/24");
    for request in [ours(), ours(), ours(), theirs(), before(), older] {
        for rules in [masquerade(&request), forward(&request)] {
            let inner = rules.shared.iter().chain(&rules.own);
            pool.extend(inner.map(|rule| (rules.table, rules.chain, rule.to_string())));
            pool.push((rules.table, rules.base, rules.jump.to_string()));
        }
    }
    for (table, chain, rule) in [
        ("nat", "POSTROUTING", "-o eth9 -j MASQUERADE"),
        ("nat", "POSTROUTING", "-j KUBE-POSTROUTING"),
        (
            "nat",
            "POSTROUTING",
            "-s 10.5.0.0/16 -d 10.5.0.0/16 -j RETURN",
        ),
        (
            "nat",
            "POSTROUTING",
            "-s 10.5.0.0/16 -d 10.5.0.0/16 -m comment --comment \"flanneld masq\" -j RETURN",
        ),
        ("filter", "FORWARD", "-s 10.5.0.0/16 -j ACCEPT"),
        ("filter", "FORWARD", "-j KUBE-FORWARD"),
        (
            "nat",
            "FLANNEL-POSTRTG",
            "-s 10.99.0.0/16 -j SNAT --to-source 192.0.2.1",
        ),
    ] {
        pool.push((table, chain, rule.to_owned()));
    }
    pool
}

fn nodes() -> impl Strategy<Value = Model> {
    vec(select(pool()), 0..40).prop_map(|rules| {
        let mut model = Model::default();
        for (table, chain, rule) in rules {
            model.append(table, chain, &rule);
            // A jump needs where to go.
            for (table, chain) in [("nat", "FLANNEL-POSTRTG"), ("filter", "FLANNEL-FWD")] {
                if Rule::new(&rule).target() == chain {
                    model.append(table, chain, "-j MARKER");
                    let last = model.rules(table, chain).len() - 1;
                    model.remove_at(table, chain, last);
                }
            }
        }
        model
    })
}

/// What is not ours in a model, in order.
fn foreign(model: &Model) -> Vec<String> {
    let not_ours = |line: &&str| {
        let networks = ["10.5.0.0/16", "10.9.0.0/16"];
        let named = networks.iter().any(|network| line.contains(network));
        let jump = line.contains("-j FLANNEL-");
        let shared = line.contains("0x4000/0x4000");
        let commented = line.contains("flanneld") || line.starts_with("-A FLANNEL");
        line.starts_with("-A") && !(jump || shared || named && commented)
    };
    let text = model.render();
    text.lines().filter(not_ours).map(str::to_owned).collect()
}

/// Whether a pod's packet to the outside is masqueraded: rules are looked at as the kernel does.
fn masquerades(model: &Model, request: &Request) -> bool {
    let wanted = masquerade(request);
    let masquerading = wanted.own[3].to_string();
    let jump = wanted.jump.to_string();
    let jumps = model.rules("nat", "POSTROUTING").contains(&jump);
    jumps
        && model
            .rules("nat", "FLANNEL-POSTRTG")
            .contains(&masquerading)
}

fn moments() -> impl Strategy<Value = Moment> {
    select(vec![Moment::Start, Moment::Resync])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn one_pass_is_enough_and_the_next_does_nothing(mut model in nodes(), moment in moments()) {
        let first = plan(&model.dump(), &now(), moment);
        prop_assert!(first.payload.matches("COMMIT").count() <= 2);
        let applied = model.apply(&first.payload);
        prop_assert!(applied.is_ok(), "{:?}\n{}", applied, first.payload);
        let second = plan(&model.dump(), &now(), moment);
        prop_assert_eq!(second.payload, "");
        for rules in [masquerade(&now()), forward(&now())] {
            let inner = model.rules(rules.table, rules.chain);
            let own: Vec<String> = rules.own.iter().map(ToString::to_string).collect();
            let there: Vec<String> = inner.iter().filter(|rule| own.contains(rule)).cloned().collect();
            prop_assert_eq!(there, own);
            let jump = rules.jump.to_string();
            let base = model.rules(rules.table, rules.base);
            prop_assert_eq!(base.iter().filter(|rule| **rule == jump).count(), 1);
            if moment == Moment::Start {
                prop_assert_eq!(base.last(), Some(&jump));
            }
        }
    }

    #[test]
    fn what_is_not_ours_stays_and_keeps_its_order(mut model in nodes(), moment in moments()) {
        let before = foreign(&model);
        model.apply(&plan(&model.dump(), &now(), moment).payload).unwrap();
        prop_assert_eq!(foreign(&model), before);
    }

    #[test]
    fn no_packet_passes_without_masquerade(mut model in nodes(), moment in moments()) {
        let was = masquerades(&model, &now());
        let seen = model.apply(&plan(&model.dump(), &now(), moment).payload).unwrap();
        for state in seen {
            prop_assert!(!was || masquerades(&state, &now()));
        }
        prop_assert!(masquerades(&model, &now()));
    }

    #[test]
    fn two_instances_come_to_rest(mut model in nodes(), turns in vec(any::<bool>(), 2..6)) {
        for mine in turns {
            let request = if mine { ours() } else { theirs() };
            model.apply(&plan(&model.dump(), &request, Moment::Start).payload).unwrap();
        }
        for request in [ours(), theirs()] {
            model.apply(&plan(&model.dump(), &request, Moment::Resync).payload).unwrap();
        }
        for request in [ours(), theirs()] {
            prop_assert_eq!(plan(&model.dump(), &request, Moment::Resync).payload, "");
            // Nor would upstream, which only asks whether each rule is there.
            for rules in [masquerade(&request), forward(&request)] {
                for rule in rules.shared.iter().chain(&rules.own) {
                    prop_assert!(model.rules(rules.table, rules.chain).contains(&rule.to_string()));
                }
            }
        }
    }

    #[test]
    fn withdrawing_leaves_nothing_of_ours(mut model in nodes()) {
        let before = foreign(&model);
        model.apply(&plan(&model.dump(), &now().withdrawn(), Moment::Start).payload).unwrap();
        prop_assert_eq!(foreign(&model), before);
        prop_assert!(!model.render().contains("10.9.0.0/16"));
        prop_assert_eq!(plan(&model.dump(), &now().withdrawn(), Moment::Start).payload, "");
    }

    #[test]
    fn no_text_is_too_strange(text in ".*", rule in "(-A|:|\\*)?[ -~]*") {
        let text = format!("*nat\n{rule}\n{text}\n{rule}\nCOMMIT\n");
        let _plan = plan(&super::Dump::parse(&text), &now(), Moment::Start);
    }
}
