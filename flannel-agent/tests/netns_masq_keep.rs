//! Masquerade and forward rules come back, and instances of flannel that share them let each other live.

mod masq_rig;

use std::thread::sleep;

use flannel_agent::masquerade::Wanted;
use flannel_testkit::{eventually, privileged};
use masq_rig::{
    Kept, LISTED, NFT, PATIENCE, RESYNC, SAVED_V4, SAVED_V6, VARIANTS, another, flannels, handles,
    in_nftables, lab, tables_of, wanted,
};

#[test]
fn two_instances_share_the_chains_and_rest() {
    if !privileged() {
        return;
    }
    let lab = lab();
    for variant in VARIANTS {
        let ns = lab.extra(&format!("two{}", variant.backend)).unwrap();
        variant.make_preferred(&ns);
        let first = Kept::start(&ns, wanted());
        let second = Kept::start(&ns, another());
        // What upstream's second instance does to the first.
        for family in [4, 6] {
            variant.run(&ns, family, "-t nat -F FLANNEL-POSTRTG");
            eventually(PATIENCE, "both are back", || {
                let saved = variant.save(&ns, family);
                let rules = saved
                    .lines()
                    .filter(|line| line.starts_with("-A FLANNEL-POSTRTG"));
                let count = rules.count();
                (count == 11).then_some(()).ok_or(saved)
            });
        }
        let counted = |family: u8| {
            // Counters: a rule that is made anew has none.
            let six = if family == 6 { "6" } else { "" };
            ns.exec([
                "sh",
                "-c",
                &format!("ip{six}tables-{}-save -c | grep -v ^#", variant.backend),
            ])
            .unwrap()
        };
        let everything = || (counted(4), counted(6), handles(&ns));
        let before = everything();
        sleep(4 * RESYNC);
        assert_eq!(everything(), before, "{variant:?}");
        // Upstream asks for each of its rules like this.
        for rule in SAVED_V4
            .lines()
            .filter(|line| line.starts_with("-A FLANNEL-POSTRTG"))
        {
            let check = rule.replacen("-A", "-C", 1);
            let program = format!("iptables-{} -t nat {check}", variant.backend);
            ns.exec(["sh", "-c", &program]).unwrap();
        }
        // The end of one leaves the other alone, and one can go for good.
        second.stop();
        let gone = Wanted {
            masq: false,
            forward: false,
            ..another()
        };
        Kept::start(&ns, gone).stop();
        assert_eq!(
            tables_of(&variant.save(&ns, 4)),
            tables_of(SAVED_V4),
            "{variant:?}"
        );
        first.stop();
    }
}

#[test]
fn two_instances_do_not_fight_for_the_nftables_tables() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let ns = lab.extra("two").unwrap();
    let first = Kept::start(&ns, in_nftables());
    let second = Kept::start(
        &ns,
        Wanted {
            nftables: true,
            ..another()
        },
    );
    let before = handles(&ns);
    eventually(PATIENCE, "the first says so", || {
        let lacking = first.lacking().unwrap_or_default();
        lacking
            .contains(
                "table flannel-ipv4 has rules of another instance of flannel, for 10.12.0.0/16",
            )
            .then_some(())
            .ok_or(lacking)
    });
    sleep(2 * RESYNC);
    assert_eq!(handles(&ns), before);
    assert_eq!(second.lacking(), None);
}

#[test]
fn what_is_lost_comes_back() {
    if !privileged() {
        return;
    }
    let lab = lab();
    for variant in VARIANTS {
        let ns = lab.extra(variant.backend).unwrap();
        variant.make_preferred(&ns);
        let kept = Kept::start(&ns, wanted());
        for damage in [
            "-t nat -F FLANNEL-POSTRTG",
            "-t nat -D FLANNEL-POSTRTG 1",
            "-t nat -D FLANNEL-POSTRTG 5",
            "-t nat -D POSTROUTING 1",
            "-t nat -A POSTROUTING -m comment --comment x -j FLANNEL-POSTRTG",
            "-D FORWARD 1",
            "-F FLANNEL-FWD",
            "-F",
            "-t nat -F",
        ] {
            for (family, whole) in [(4, SAVED_V4), (6, SAVED_V6)] {
                variant.run(&ns, family, damage);
                eventually(PATIENCE, damage, || {
                    let saved = variant.save(&ns, family);
                    (tables_of(&saved) == tables_of(whole))
                        .then_some(())
                        .ok_or(saved)
                });
            }
        }
        kept.stop();
    }
    let ns = lab.extra("flushed").unwrap();
    let kept = Kept::start(&ns, wanted());
    ns.exec(["nft", "flush", "ruleset"]).unwrap();
    eventually(PATIENCE, "iptables after nft flush ruleset", || {
        let saved = NFT.save(&ns, 4);
        (tables_of(&saved) == tables_of(SAVED_V4))
            .then_some(())
            .ok_or(saved)
    });
    kept.stop();
    ns.exec(["nft", "flush", "ruleset"]).unwrap();
    let kept = Kept::start(&ns, in_nftables());
    for damage in [
        "flush ruleset",
        "flush chain ip flannel-ipv4 postrtg",
        "delete table ip6 flannel-ipv6",
        "insert rule ip flannel-ipv4 forward drop",
        "add chain ip flannel-ipv4 forward { policy drop; }",
        "flush chain ip6 flannel-ipv6 forward; delete chain ip6 flannel-ipv6 forward",
    ] {
        ns.exec(["nft", damage]).unwrap();
        eventually(PATIENCE, damage, || {
            let listed = flannels(&ns);
            (listed == LISTED).then_some(()).ok_or(listed)
        });
    }
    kept.stop();
}
