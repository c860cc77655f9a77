//! Masquerade and forward rules as upstream leaves them, read with the real tools.

mod masq_rig;

use flannel_testkit::{Netns, eventually, privileged};
use masq_rig::{Kept, PATIENCE, VARIANTS, Variant, handles, lab, nets, wanted};

/// `iptables-save` of upstream's node a (sample 1d, with the subnet of sample 8).
const SAVED_V4: &str = r#"*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:FLANNEL-FWD - [0:0]
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FLANNEL-FWD -s 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:FLANNEL-POSTRTG - [0:0]
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.6.0/24 -d 10.5.0.0/16 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 -d 10.5.6.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.6.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.0.0/16 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
COMMIT
"#;

/// `ip6tables-save` of the same (sample 8).
const SAVED_V6: &str = r#"*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:FLANNEL-FWD - [0:0]
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FLANNEL-FWD -s fd05::/48 -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d fd05::/48 -m comment --comment "flanneld forward" -j ACCEPT
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:FLANNEL-POSTRTG - [0:0]
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s fd05:0:0:13::/64 -d fd05::/48 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s fd05::/48 -d fd05:0:0:13::/64 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG ! -s fd05::/48 -d fd05:0:0:13::/64 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s fd05::/48 ! -d ff00::/8 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s fd05::/48 -d fd05::/48 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
COMMIT
"#;

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

/// The tables of a dump in the order of their names: the two variants have them in different orders.
fn tables_of(text: &str) -> Vec<String> {
    let mut tables: Vec<String> = text
        .split_inclusive("COMMIT\n")
        .map(str::to_owned)
        .filter(|table| {
            table
                .lines()
                .any(|line| line.starts_with("-A") || line.contains(" - ["))
        })
        .collect();
    tables.sort();
    tables
}
