//! The rules against upstream's text, and the plans against a model of the tables.

mod model;
mod nft;
mod obstacles;
mod properties;

use model::Model;

use super::iptables::{Dump, Moment, clear, forward, listing, masquerade, plan};
use super::{Request, backend};

pub(super) fn request(network: &str, subnet: &str) -> Request {
    Request {
        network: network.parse().unwrap(),
        subnet: subnet.parse().unwrap(),
        previous: None,
        masq: true,
        forward: true,
        random_fully: true,
    }
}

pub(super) fn ours() -> Request {
    request("10.5.0.0/16", "10.5.65.0/24")
}

/// What upstream's live sample shows of node a, but for the built-in chains.
const SAMPLE: &str = r#"-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FLANNEL-FWD -s 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.65.0/24 -d 10.5.0.0/16 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 -d 10.5.65.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.65.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.0.0/16 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully"#;

#[test]
fn rules_are_upstreams() {
    let mut lines = listing(&forward(&ours()));
    lines.extend(listing(&masquerade(&ours())));
    assert_eq!(lines.join("\n"), SAMPLE);
    let plain = Request {
        random_fully: false,
        ..ours()
    };
    let lines = listing(&masquerade(&plain));
    assert_eq!(lines.len(), 7);
    assert!(
        lines.iter().all(|line| !line.contains("random")),
        "{lines:?}"
    );
}

#[test]
fn an_empty_node_gets_everything_in_one_transaction_per_table() {
    let plan = plan(&Dump::default(), &ours(), Moment::Start);
    assert_eq!(
        plan.payload,
        r#"*nat
-N FLANNEL-POSTRTG
-I FLANNEL-POSTRTG 1 -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.65.0/24 -d 10.5.0.0/16 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 -d 10.5.65.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.65.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.0.0/16 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
COMMIT
*filter
-N FLANNEL-FWD
-A FLANNEL-FWD -s 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
COMMIT
"#
    );
    assert!(plan.lacking && plan.stale.is_empty());
}

/// A node that is as it should be.
fn in_place(request: &Request) -> Model {
    let mut model = Model::default();
    model
        .apply(&plan(&model.dump(), request, Moment::Start).payload)
        .unwrap();
    model
}

#[test]
fn nothing_is_planned_for_what_is_in_place() {
    let model = in_place(&ours());
    for moment in [Moment::Start, Moment::Resync] {
        assert_eq!(plan(&model.dump(), &ours(), moment).payload, "");
    }
    // However a version of iptables orders the words of a rule.
    let text = model.render().replace(
        r#"-m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq""#,
        r#"-m comment --comment "flanneld masq" -m mark --mark 0x4000/0x4000"#,
    );
    assert_ne!(text, model.render());
    assert!(plan(&Dump::parse(&text), &ours(), Moment::Resync).is_empty());
}

#[test]
fn the_jump_moves_to_the_end_at_a_start_only() {
    let mut model = in_place(&ours());
    model.append("nat", "POSTROUTING", "-o eth9 -j MASQUERADE");
    assert!(plan(&model.dump(), &ours(), Moment::Resync).is_empty());
    let plan = plan(&model.dump(), &ours(), Moment::Start);
    assert_eq!(
        plan.payload,
        "*nat\n\
         -D POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG\n\
         -A POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG\n\
         COMMIT\n"
    );
}

#[test]
fn doubled_missing_and_disordered_rules_are_noticed() {
    let whole = in_place(&ours());
    let count = whole.rules("nat", "FLANNEL-POSTRTG").len();
    let mut broken = Vec::new();
    for at in 0..count {
        let mut model = whole.clone();
        model.remove_at("nat", "FLANNEL-POSTRTG", at);
        broken.push(model);
        let mut model = whole.clone();
        let rule = whole.rules("nat", "FLANNEL-POSTRTG")[at].clone();
        model.append("nat", "FLANNEL-POSTRTG", &rule);
        broken.push(model);
        let mut model = whole.clone();
        model.remove_at("nat", "FLANNEL-POSTRTG", at);
        model.append("nat", "FLANNEL-POSTRTG", &rule);
        // The last one at the end is where it belongs.
        if at + 1 < count {
            broken.push(model);
        }
    }
    for mut model in broken {
        let before = model.render();
        let plan = plan(&model.dump(), &ours(), Moment::Resync);
        assert!(plan.lacking, "{before}");
        assert!(!plan.payload.contains("*filter"), "{}", plan.payload);
        model.apply(&plan.payload).unwrap();
        assert_eq!(model.render(), whole.render());
    }
}

#[test]
fn rules_of_an_earlier_network_go_with_the_same_transaction() {
    let before = request("10.9.0.0/16", "10.9.3.0/24");
    let now = Request {
        previous: Some((before.network, before.subnet)),
        ..ours()
    };
    let mut model = in_place(&before);
    let plan = plan(&model.dump(), &now, Moment::Start);
    assert_eq!(plan.stale.len(), 7);
    model.apply(&plan.payload).unwrap();
    assert_eq!(model.render(), in_place(&ours()).render());
}

#[test]
fn rules_of_an_earlier_subnet_go_without_a_subnet_file() {
    for before in [
        request("10.5.0.0/16", "10.5.7.0/24"),
        Request {
            random_fully: false,
            ..ours()
        },
    ] {
        let mut model = in_place(&before);
        model
            .apply(&plan(&model.dump(), &ours(), Moment::Start).payload)
            .unwrap();
        assert_eq!(model.render(), in_place(&ours()).render());
    }
}

#[test]
fn rules_of_another_instance_stay_even_if_its_network_is_within_ours() {
    for other in ["10.12.0.0/16", "10.0.0.0/8", "10.5.128.0/17"] {
        let theirs = request(other, "10.5.129.0/24");
        let mut model = in_place(&theirs);
        let before = model.rules("nat", "FLANNEL-POSTRTG").to_vec();
        let plan = plan(&model.dump(), &ours(), Moment::Start);
        assert_eq!(plan.stale, Vec::<String>::new());
        model.apply(&plan.payload).unwrap();
        let after = model.rules("nat", "FLANNEL-POSTRTG");
        assert_eq!(after[..before.len()], before[..], "{other}");
        assert_eq!(after.len(), before.len() + 5, "{other}");
    }
}

/// What releases up to 0.19 leave.
fn old_release(model: &mut Model, comment: bool, random: &str) {
    let (masq, forward) = if comment {
        (
            "-m comment --comment \"flanneld masq\" ",
            "-m comment --comment \"flanneld forward\" ",
        )
    } else {
        ("", "")
    };
    for rule in [
        format!("-s 10.5.0.0/16 -d 10.5.0.0/16 {masq}-j RETURN"),
        format!("-s 10.5.0.0/16 ! -d 224.0.0.0/4 {masq}-j MASQUERADE{random}"),
        format!("! -s 10.5.0.0/16 -d 10.5.65.0/24 {masq}-j RETURN"),
        format!("! -s 10.5.0.0/16 -d 10.5.0.0/16 {masq}-j MASQUERADE{random}"),
    ] {
        model.append("nat", "POSTROUTING", &rule);
    }
    for rule in [
        format!("-s 10.5.0.0/16 {forward}-j ACCEPT"),
        format!("-d 10.5.0.0/16 {forward}-j ACCEPT"),
    ] {
        model.append("filter", "FORWARD", &rule);
    }
}

#[test]
fn rules_of_old_releases_are_taken_over() {
    for (comment, random) in [
        (true, " --random-fully"),
        (false, " --random-fully"),
        (false, ""),
    ] {
        let mut model = Model::default();
        model.append("nat", "POSTROUTING", "-o eth9 -j MASQUERADE");
        old_release(&mut model, comment, random);
        let plan = plan(&model.dump(), &ours(), Moment::Start);
        assert_eq!(plan.stale.len(), 6, "{plan:?}");
        model.apply(&plan.payload).unwrap();
        let mut expected = Model::default();
        expected.append("nat", "POSTROUTING", "-o eth9 -j MASQUERADE");
        expected
            .apply(&super::iptables::plan(&expected.dump(), &ours(), Moment::Start).payload)
            .unwrap();
        assert_eq!(model.render(), expected.render());
    }
}

#[test]
fn similar_rules_of_a_person_stay() {
    let mut model = in_place(&ours());
    for (table, chain, rule) in [
        ("filter", "FORWARD", "-s 10.5.0.0/16 -j ACCEPT"),
        ("filter", "FORWARD", "-d 10.5.0.0/16 -j ACCEPT"),
        (
            "nat",
            "POSTROUTING",
            "-s 10.5.0.0/16 -d 10.5.0.0/16 -j RETURN",
        ),
        (
            "nat",
            "POSTROUTING",
            "-s 10.5.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE",
        ),
        ("nat", "FLANNEL-POSTRTG", "-s 10.99.0.0/16 -j MASQUERADE"),
        ("nat", "FLANNEL-POSTRTG", "-s 10.5.0.0/16 -j LOG"),
    ] {
        model.append(table, chain, rule);
    }
    assert_eq!(plan(&model.dump(), &ours(), Moment::Resync).payload, "");
}

#[test]
fn withdrawing_removes_ours_and_leaves_the_other_instance() {
    let mut alone = in_place(&ours());
    alone
        .apply(&plan(&alone.dump(), &ours().withdrawn(), Moment::Start).payload)
        .unwrap();
    assert_eq!(alone.render(), Model::default().render());

    let theirs = request("10.12.0.0/16", "10.12.1.0/24");
    let mut both = in_place(&theirs);
    both.apply(&plan(&both.dump(), &ours(), Moment::Start).payload)
        .unwrap();
    both.apply(&plan(&both.dump(), &ours().withdrawn(), Moment::Start).payload)
        .unwrap();
    assert_eq!(both.render(), in_place(&theirs).render());
}

#[test]
fn a_chain_that_another_instance_is_filling_is_left_to_it() {
    let mut model = in_place(&request("10.12.0.0/16", "10.12.1.0/24"));
    while !model.rules("nat", "FLANNEL-POSTRTG").is_empty() {
        model.remove_at("nat", "FLANNEL-POSTRTG", 0);
    }
    let forwarding = Request {
        masq: false,
        ..ours()
    };
    let plan = plan(&model.dump(), &forwarding, Moment::Resync);
    assert!(!plan.payload.contains("*nat"), "{}", plan.payload);
}

#[test]
fn clearing_removes_all_there_is() {
    let mut model = in_place(&ours());
    model.append("filter", "FORWARD", "-i eth9 -j DROP");
    model
        .apply(
            &plan(
                &model.dump(),
                &request("10.12.0.0/16", "10.12.1.0/24"),
                Moment::Start,
            )
            .payload,
        )
        .unwrap();
    model.apply(&clear(&model.dump()).payload).unwrap();
    let mut expected = Model::default();
    expected.append("filter", "FORWARD", "-i eth9 -j DROP");
    assert_eq!(model.render(), expected.render());
    assert!(clear(&model.dump()).is_empty());
}

#[test]
fn versions_and_back_ends() {
    use backend::{Backend, Found, Version, choose};
    for (text, number, backend, random) in [
        (
            "iptables v1.8.9 (nf_tables)\n",
            (1, 8, 9),
            Backend::Nft,
            true,
        ),
        (
            "ip6tables v1.8.7 (legacy)",
            (1, 8, 7),
            Backend::Legacy,
            true,
        ),
        ("iptables v1.6.1", (1, 6, 1), Backend::Legacy, false),
        ("iptables v1.6.2", (1, 6, 2), Backend::Legacy, true),
        ("iptables v2.0", (2, 0, 0), Backend::Legacy, true),
    ] {
        let version = Version::parse(text).unwrap();
        assert_eq!(
            (version.number, version.backend),
            (number, backend),
            "{text}"
        );
        assert_eq!(version.knows_random_fully(), random, "{text}");
    }
    assert_eq!(Version::parse("no iptables here"), None);

    let found = |text: &str| Found {
        dump: Dump::parse(text),
        installed: true,
    };
    let (none, one) = (found(""), found("*filter\n-A INPUT -j ACCEPT\nCOMMIT\n"));
    let hint = found("*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n");
    let leftover = found(
        "*filter\n-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD\nCOMMIT\n",
    );
    let chosen = |default, legacy, nft| choose(default, legacy, nft).0;
    assert_eq!(chosen(Backend::Nft, &none, &none), Backend::Nft);
    assert_eq!(chosen(Backend::Nft, &one, &none), Backend::Legacy);
    assert_eq!(chosen(Backend::Nft, &one, &one), Backend::Nft);
    assert_eq!(chosen(Backend::Nft, &one, &hint), Backend::Nft);
    assert_eq!(chosen(Backend::Legacy, &one, &hint), Backend::Nft);
    assert_eq!(chosen(Backend::Nft, &leftover, &none), Backend::Nft);
    let missing = Found {
        installed: false,
        ..one.clone()
    };
    assert_eq!(chosen(Backend::Nft, &missing, &none), Backend::Nft);
    assert!(choose(Backend::Nft, &one, &none).1.is_some());
}
