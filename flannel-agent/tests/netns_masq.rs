//! Masquerade and forward rules as upstream leaves them, read with the real tools.

mod masq_rig;

use std::thread::sleep;

use flannel_agent::masquerade::Wanted;
use flannel_testkit::{Netns, eventually, privileged};
use masq_rig::{
    Kept, LEGACY, LISTED, NFT, PATIENCE, RESYNC, SAVED_V4, SAVED_V6, VARIANTS, another, flannels,
    handles, in_nftables, lab, tables_of, wanted,
};

#[test]
fn iptables_rules_are_upstreams_to_the_byte() {
    if !privileged() {
        return;
    }
    let lab = lab();
    for variant in VARIANTS {
        let ns = lab.extra(variant.backend).unwrap();
        variant.make_preferred(&ns);
        let kept = Kept::start(&ns, wanted());
        assert_eq!(kept.lacking(), None);
        assert_eq!(
            tables_of(&variant.save(&ns, 4)),
            tables_of(SAVED_V4),
            "{variant:?}"
        );
        assert_eq!(
            tables_of(&variant.save(&ns, 6)),
            tables_of(SAVED_V6),
            "{variant:?}"
        );
        // Nothing is taken away at the end.
        kept.stop();
        assert_eq!(
            tables_of(&variant.save(&ns, 4)),
            tables_of(SAVED_V4),
            "{variant:?}"
        );
    }
}

/// kube-proxy's jumps, which are there before flannel's.
const KUBE: [&str; 4] = [
    "-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL",
    "-A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD",
    "-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES",
    "-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES",
];

#[test]
fn listings_are_as_upstreams_own_tests_want_them() {
    if !privileged() {
        return;
    }
    let lab = lab();
    for variant in VARIANTS {
        let ns = lab.extra(&format!("e2e{}", variant.backend)).unwrap();
        let chains = ["PROXY-FIREWALL", "FORWARD", "SERVICES", "EXTERNAL-SERVICES"];
        let chains = chains
            .map(|name| format!(":KUBE-{name} - [0:0]\n"))
            .concat();
        variant.restore(
            &ns,
            4,
            &format!("*filter\n{chains}{}\nCOMMIT\n", KUBE.join("\n")),
        );
        let kept = Kept::start(&ns, wanted());
        let ours = |prefix: &str| -> Vec<String> {
            let lines = SAVED_V4.lines().filter(|line| line.starts_with(prefix));
            lines.map(str::to_owned).collect()
        };
        let listed = |line: &str| -> Vec<String> {
            variant
                .run(&ns, 4, line)
                .lines()
                .map(str::to_owned)
                .collect()
        };
        let mut forward = vec!["-P FORWARD ACCEPT".to_owned()];
        forward.extend(KUBE.map(str::to_owned));
        forward.extend(ours("-A FORWARD"));
        assert_eq!(listed("-S FORWARD"), forward, "{variant:?}");
        let with_chain =
            |chain: &str| [vec![format!("-N {chain}")], ours(&format!("-A {chain}"))].concat();
        assert_eq!(
            listed("-S FLANNEL-FWD"),
            with_chain("FLANNEL-FWD"),
            "{variant:?}"
        );
        assert_eq!(
            listed("-t nat -S FLANNEL-POSTRTG"),
            with_chain("FLANNEL-POSTRTG"),
            "{variant:?}"
        );
        let jump = listed("-t nat -S POSTROUTING")
            .into_iter()
            .filter(|line| line.contains("FLANNEL"));
        assert_eq!(
            jump.collect::<Vec<_>>(),
            ours("-A POSTROUTING"),
            "{variant:?}"
        );
        kept.stop();
    }
}

#[test]
fn nftables_rules_are_upstreams_to_the_byte() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let ns = lab.extra("nft").unwrap();
    let kept = Kept::start(&ns, in_nftables());
    assert_eq!(kept.lacking(), None);
    let listed = ns.exec(["nft", "list", "ruleset"]).unwrap();
    assert_eq!(listed, LISTED);
    // One family alone: the other's table is there and empty.
    kept.stop();
    let alone = Wanted {
        v6: None,
        ..in_nftables()
    };
    let kept = Kept::start(&ns, alone);
    let listed = ns
        .exec(["nft", "list", "table", "ip6", "flannel-ipv6"])
        .unwrap();
    assert_eq!(
        listed,
        "table ip6 flannel-ipv6 {\n\tcomment \"rules for flannel-ipv6\"\n}\n"
    );
    kept.stop();
}

#[test]
fn a_node_with_one_family_has_no_rules_of_the_other() {
    if !privileged() {
        return;
    }
    let lab = lab();
    for variant in VARIANTS {
        let ns = lab.extra(&format!("six{}", variant.backend)).unwrap();
        variant.make_preferred(&ns);
        let alone = Wanted {
            v4: None,
            ..wanted()
        };
        let kept = Kept::start(&ns, alone.clone());
        assert_eq!(kept.lacking(), None);
        let four = variant.save(&ns, 4);
        assert!(!four.contains("FLANNEL"), "{variant:?}: {four}");
        assert_eq!(
            tables_of(&variant.save(&ns, 6)),
            tables_of(SAVED_V6),
            "{variant:?}"
        );
        kept.stop();
        let kept = Kept::start(
            &ns,
            Wanted {
                nftables: true,
                ..alone
            },
        );
        let listed = ns
            .exec(["nft", "list", "table", "ip", "flannel-ipv4"])
            .unwrap();
        assert_eq!(
            listed,
            "table ip flannel-ipv4 {\n\tcomment \"rules for flannel-ipv4\"\n}\n"
        );
        assert!(LISTED.ends_with(&flannels(&ns)[listed.len()..]));
        kept.stop();
    }
}

#[test]
fn a_family_that_the_node_has_no_longer_loses_its_rules() {
    if !privileged() {
        return;
    }
    let lab = lab();
    for variant in VARIANTS {
        let ns = lab.extra(&format!("gone{}", variant.backend)).unwrap();
        variant.make_preferred(&ns);
        let before = Wanted {
            blackhole: true,
            ..wanted()
        };
        Kept::start(&ns, before.clone()).stop();
        let v6 = before.v6.expect("both families");
        let kept = Kept::start(
            &ns,
            Wanted {
                v6: None,
                given_up: Some((v6.network.into(), v6.subnet.into())),
                ..before
            },
        );
        assert_eq!(kept.lacking(), None);
        assert_eq!(
            tables_of(&variant.save(&ns, 4)),
            tables_of(SAVED_V4),
            "{variant:?}"
        );
        let six = variant.save(&ns, 6);
        assert!(!six.contains("FLANNEL"), "{variant:?}: {six}");
        assert_eq!(ns.ip("-6 route show type blackhole").unwrap(), "");
        assert_ne!(ns.ip("route show type blackhole").unwrap(), "");
        kept.stop();
    }
}

#[test]
fn the_correct_nftables_rules_are_what_the_kernel_takes() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let ns = lab.extra("nft").unwrap();
    let correct = Wanted {
        ruleset: flannel_core::masquerade::nft::Ruleset::Correct,
        ..in_nftables()
    };
    let kept = Kept::start(&ns, correct.clone());
    let expected = LISTED
        .replace(
            "meta mark 0x00004000 return",
            "meta mark & 0x00004000 == 0x00004000 return",
        )
        .replace(
            "ip saddr != 10.5.6.0/24 ip daddr 10.5.0.0/16 return",
            "ip saddr != 10.5.0.0/16 ip daddr 10.5.6.0/24 return",
        )
        .replace(
            "ip6 saddr != fd05:0:0:13::/64 ip6 daddr fd05::/48 return",
            "ip6 saddr != fd05::/48 ip6 daddr fd05:0:0:13::/64 return",
        );
    assert_eq!(ns.exec(["nft", "list", "ruleset"]).unwrap(), expected);
    let before = handles(&ns);
    kept.stop();
    let kept = Kept::start(&ns, correct);
    assert_eq!(handles(&ns), before);
    kept.stop();
}

#[test]
fn what_is_in_place_is_not_touched_by_a_restart() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let ns = lab.extra("still").unwrap();
    for nftables in [false, true] {
        let wanted = Wanted {
            nftables,
            ..wanted()
        };
        Kept::start(&ns, wanted.clone()).stop();
        let before = handles(&ns);
        let kept = Kept::start(&ns, wanted);
        let passes = 3 * RESYNC;
        sleep(passes);
        kept.stop();
        assert_eq!(handles(&ns), before);
    }
}

/// Rules of kube-proxy, Docker and others, also such as look like ours.
const FOREIGN: &str = "*nat
:KUBE-POSTROUTING - [0:0]
:DOCKER - [0:0]
-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A POSTROUTING -s 10.5.0.0/16 ! -o lo -j MASQUERADE
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
COMMIT
*filter
:KUBE-FORWARD - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j KUBE-FORWARD
-A FORWARD -s 10.5.0.0/16 -j ACCEPT
-A FORWARD -d 10.5.0.0/16 -j ACCEPT
-A FORWARD -j DOCKER-USER
-A DOCKER-USER -j RETURN
COMMIT
*mangle
-A FORWARD -p tcp -j TCPMSS --clamp-mss-to-pmtu
COMMIT
";

#[test]
fn rules_of_others_are_left_byte_for_byte() {
    if !privileged() {
        return;
    }
    let lab = lab();
    for variant in VARIANTS {
        let ns = lab.extra(variant.backend).unwrap();
        let foreign = FOREIGN.replace("-p tcp", "-p tcp --tcp-flags SYN,RST SYN");
        variant.restore(&ns, 4, &foreign);
        ns.exec(["nft", "add table inet fw; add chain inet fw in { type filter hook input priority 0; }; add rule inet fw in counter"])
            .unwrap();
        let foreign_nft = || {
            ns.exec(["nft", "-a", "list", "table", "inet", "fw"])
                .unwrap()
        };
        let (saved, listed) = (variant.save(&ns, 4), foreign_nft());
        let not_ours = |text: String| -> Vec<String> {
            let others = text.lines().filter(|line| !line.contains("FLANNEL"));
            others.map(str::to_owned).collect()
        };
        let kept = Kept::start(&ns, wanted());
        assert_eq!(kept.lacking(), None);
        let with = variant.save(&ns, 4);
        assert!(with.contains("FLANNEL-POSTRTG"), "{variant:?}: {with}");
        assert_eq!(not_ours(with), not_ours(saved.clone()), "{variant:?}");
        kept.stop();
        // And there and back again: not even empty chains stay.
        Kept::start(&ns, in_nftables()).stop();
        assert_eq!(variant.save(&ns, 4), saved, "{variant:?}");
        assert_eq!(foreign_nft(), listed);
    }
}

#[test]
fn switching_managers_leaves_nothing_of_the_other() {
    if !privileged() {
        return;
    }
    let lab = lab();
    for variant in VARIANTS {
        let ns = lab.extra(variant.backend).unwrap();
        variant.make_preferred(&ns);
        Kept::start(&ns, wanted()).stop();
        let kept = Kept::start(&ns, in_nftables());
        assert_eq!(kept.lacking(), None);
        assert!(!variant.save(&ns, 4).contains("FLANNEL"), "{variant:?}");
        assert!(!variant.save(&ns, 6).contains("FLANNEL"), "{variant:?}");
        assert_eq!(flannels(&ns), LISTED);
        kept.stop();
        let kept = Kept::start(&ns, wanted());
        assert_eq!(
            tables_of(&variant.save(&ns, 4)),
            tables_of(SAVED_V4),
            "{variant:?}"
        );
        assert_eq!(
            tables_of(&variant.save(&ns, 6)),
            tables_of(SAVED_V6),
            "{variant:?}"
        );
        assert_eq!(flannels(&ns), "");
        kept.stop();
    }
}

#[test]
fn rules_left_in_the_variant_that_is_no_longer_used_go() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let ns = lab.extra("moved").unwrap();
    Kept::start(&ns, wanted()).stop();
    assert!(NFT.save(&ns, 4).contains("FLANNEL"));
    let legacy = LEGACY;
    legacy.make_preferred(&ns);
    let kept = Kept::start(&ns, wanted());
    assert_eq!(tables_of(&legacy.save(&ns, 4)), tables_of(SAVED_V4));
    assert!(!NFT.save(&ns, 4).contains("FLANNEL"));
    assert!(!NFT.save(&ns, 6).contains("FLANNEL"));
    kept.stop();
}

#[test]
fn rules_of_an_earlier_network_and_of_old_releases_go() {
    if !privileged() {
        return;
    }
    let lab = lab();
    for variant in VARIANTS {
        let ns = lab.extra(variant.backend).unwrap();
        variant.make_preferred(&ns);
        // Release 0.15, and a later one with another network.
        variant.restore(
            &ns,
            4,
            "*nat\n-A POSTROUTING -s 10.5.0.0/16 -d 10.5.0.0/16 -j RETURN\n\
             -A POSTROUTING -s 10.5.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE --random-fully\n\
             -A POSTROUTING ! -s 10.5.0.0/16 -d 10.5.6.0/24 -j RETURN\n\
             -A POSTROUTING ! -s 10.5.0.0/16 -d 10.5.0.0/16 -j MASQUERADE --random-fully\nCOMMIT\n\
             *filter\n-A FORWARD -s 10.5.0.0/16 -j ACCEPT\n-A FORWARD -d 10.5.0.0/16 -j ACCEPT\nCOMMIT\n",
        );
        Kept::start(&ns, another()).stop();
        let mut moved = wanted();
        let before = another();
        if let (Some(v4), Some(old)) = (&mut moved.v4, before.v4) {
            v4.previous = Some((old.network, old.subnet));
        }
        if let (Some(v6), Some(old)) = (&mut moved.v6, before.v6) {
            v6.previous = Some((old.network, old.subnet));
        }
        let kept = Kept::start(&ns, moved);
        assert_eq!(
            tables_of(&variant.save(&ns, 4)),
            tables_of(SAVED_V4),
            "{variant:?}"
        );
        assert_eq!(
            tables_of(&variant.save(&ns, 6)),
            tables_of(SAVED_V6),
            "{variant:?}"
        );
        kept.stop();
    }
}

#[test]
fn the_blackhole_route_has_upstreams_shape_and_comes_back() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let ns = lab.extra("hole").unwrap();
    let kept = Kept::start(
        &ns,
        Wanted {
            blackhole: true,
            ..wanted()
        },
    );
    let shown = |ns: &Netns| {
        let four = ns.ip("-d route show 10.5.6.0/24").unwrap();
        let six = ns.ip("-6 -d route show fd05:0:0:13::/64").unwrap();
        let words = |text: String| {
            text.split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
                .join(" ")
        };
        (words(four), words(six))
    };
    let whole = shown(&ns);
    assert_eq!(whole.0, "blackhole 10.5.6.0/24 proto boot scope global");
    assert!(
        whole
            .1
            .starts_with("blackhole fd05:0:0:13::/64 dev lo proto boot scope global metric 1024"),
        "{whole:?}"
    );
    ns.ip("route del blackhole 10.5.6.0/24").unwrap();
    ns.ip("-6 route del blackhole fd05:0:0:13::/64").unwrap();
    eventually(PATIENCE, "the routes are back", || {
        let now = shown(&ns);
        (now == whole).then_some(()).ok_or(format!("{now:?}"))
    });
    kept.stop();
}
