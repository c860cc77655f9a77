use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::lease::LeaseAttrs;

const US: Identity = Identity {
    public_ip: Some(Ipv4Addr::new(192, 168, 77, 11)),
    public_ipv6: None,
};

fn conf(extra: &str) -> NetConf {
    let json = format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":"vxlan"}}{extra}}}"#);
    NetConf::parse(&json).unwrap()
}

fn dual() -> NetConf {
    conf(r#","EnableIPv6":true,"IPv6Network":"fd05::/48""#)
}

fn us6() -> Identity {
    Identity {
        public_ipv6: Some("fd77::11".parse().unwrap()),
        ..US
    }
}

fn key(text: &str) -> SubnetKey {
    text.parse().unwrap()
}

/// A lease of `192.168.77.<host>`; the revision is the host number too.
fn stored(host: u8, subnet: &str) -> StoredLease {
    let ip = Ipv4Addr::new(192, 168, 77, host);
    StoredLease {
        lease: Lease {
            key: key(subnet),
            attrs: LeaseAttrs::vxlan_v4(ip, 1, [2, 0, 0, 0, 0, host].into()),
        },
        reserved: false,
        mod_revision: host.into(),
    }
}

fn reserved(host: u8, subnet: &str) -> StoredLease {
    StoredLease {
        reserved: true,
        ..stored(host, subnet)
    }
}

fn reuse(subnet: &str, reserved: bool) -> Choice {
    Choice::Reuse {
        key: key(subnet),
        reserved,
        mod_revision: 11,
    }
}

fn first_candidate(decision: &Decision) -> String {
    match &decision.choice {
        Choice::Pick { candidates } => candidates[0].to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn own_lease_is_reused_whatever_the_previous_subnet() {
    let list = [stored(12, "10.5.3.0-24"), stored(11, "10.5.65.0-24")];
    for previous in [None, Some(key("10.5.9.0-24")), Some(key("10.5.3.0-24"))] {
        let decision = choose(&conf(""), &US, previous, &list).unwrap();
        assert_eq!(decision.choice, reuse("10.5.65.0-24", false));
        assert_eq!(decision.drop_incompatible, None);
    }
}

#[test]
fn a_reservation_is_reused_as_one() {
    let list = [reserved(11, "10.5.65.0-24"), reserved(12, "10.5.3.0-24")];
    let decision = choose(&conf(""), &US, None, &list).unwrap();
    assert_eq!(decision.choice, reuse("10.5.65.0-24", true));
}

#[test]
fn of_several_own_leases_the_reservation_then_the_one_in_use_wins() {
    let list = [
        stored(11, "10.5.1.0-24"),
        stored(11, "10.5.2.0-24"),
        reserved(11, "10.5.3.0-24"),
    ];
    let chosen =
        |list: &[StoredLease], previous| choose(&conf(""), &US, previous, list).unwrap().choice;
    let previous = Some(key("10.5.2.0-24"));
    assert_eq!(chosen(&list, previous), reuse("10.5.3.0-24", true));
    assert_eq!(chosen(&list[..2], previous), reuse("10.5.2.0-24", false));
    assert_eq!(chosen(&list[..2], None), reuse("10.5.1.0-24", false));
}

#[test]
fn an_incompatible_own_lease_is_dropped() {
    let list = [stored(11, "10.5.65.0-24"), stored(12, "10.5.3.0-24")];
    let decision = choose(
        &conf(r#","SubnetLen":25"#),
        &US,
        Some(key("10.5.65.0-24")),
        &list,
    )
    .unwrap();
    assert_eq!(decision.drop_incompatible, Some((key("10.5.65.0-24"), 11)));
    assert_eq!(first_candidate(&decision), "10.5.0.128-25");
    assert_eq!(
        decision.warnings,
        [
            "previously leased subnet 10.5.65.0/24 is not compatible with the network config, ignoring it"
        ]
    );
}

#[test]
fn an_incompatible_reservation_is_neither_deleted_nor_given_out() {
    let list = [reserved(11, "10.5.1.0-24")];
    let decision = choose(
        &conf(r#","SubnetLen":25,"SubnetMin":"10.5.1.0""#),
        &US,
        None,
        &list,
    )
    .unwrap();
    assert_eq!(decision.drop_incompatible, None);
    assert_eq!(first_candidate(&decision), "10.5.2.0-25");
    assert_eq!(
        decision.warnings,
        [
            "reservation 10.5.1.0-24 for this node is not compatible with the network config, leaving it alone"
        ]
    );
}

#[test]
fn the_previous_subnet_is_taken_when_free() {
    let list = [stored(12, "10.5.3.0-24")];
    let decision = choose(&conf(""), &US, Some(key("10.5.9.0-24")), &list).unwrap();
    let expected = Choice::Previous {
        key: key("10.5.9.0-24"),
    };
    assert_eq!((decision.choice, decision.warnings.len()), (expected, 0));
}

#[test]
fn the_previous_subnet_is_passed_over_when_taken_or_out_of_range() {
    let cases = [
        (
            "10.5.3.0-24",
            "previously leased subnet 10.5.3.0/24 is taken by lease 10.5.3.128/25, ignoring it",
        ),
        (
            "10.5.9.0-25",
            "previously leased subnet 10.5.9.0/25 is not compatible with the network config, ignoring it",
        ),
        (
            "10.6.9.0-24",
            "previously leased subnet 10.6.9.0/24 is not compatible with the network config, ignoring it",
        ),
        (
            "10.5.0.0-24",
            "previously leased subnet 10.5.0.0/24 is not compatible with the network config, ignoring it",
        ),
    ];
    let list = [stored(12, "10.5.3.128-25")];
    for (previous, warning) in cases {
        let decision = choose(&conf(""), &US, Some(key(previous)), &list).unwrap();
        assert_eq!(first_candidate(&decision), "10.5.1.0-24", "{previous}");
        assert_eq!(decision.warnings, [warning]);
    }
}

#[test]
fn picks_are_the_first_hundred_free() {
    let list = [stored(12, "10.5.1.0-24"), stored(13, "10.5.4.0-22")];
    let Choice::Pick { candidates } = choose(&conf(""), &US, None, &list).unwrap().choice else {
        panic!("nothing to reuse");
    };
    let first: Vec<_> = candidates.iter().take(3).map(ToString::to_string).collect();
    assert_eq!(first, ["10.5.2.0-24", "10.5.3.0-24", "10.5.8.0-24"]);
    assert_eq!(candidates.len(), 100);
}

#[test]
fn out_of_subnets_says_of_what() {
    let conf = conf(r#","SubnetMin":"10.5.1.0","SubnetMax":"10.5.2.0""#);
    let list = [stored(12, "10.5.1.0-24"), stored(13, "10.5.2.0-24")];
    let error = choose(&conf, &US, Some(key("10.5.1.0-24")), &list).unwrap_err();
    assert_eq!(
        error.to_string(),
        "out of subnets: all /24 subnets of 10.5.0.0/16 from 10.5.1.0 to 10.5.2.0 are taken (2 leases): \
         enlarge the network, raise the subnet length, or delete leases of nodes that are gone"
    );
}

#[test]
fn a_node_needs_an_address() {
    for public_ip in [None, Some(Ipv4Addr::UNSPECIFIED)] {
        let us = Identity {
            public_ip,
            public_ipv6: None,
        };
        assert_eq!(
            choose(&conf(""), &us, None, &[]).unwrap_err().to_string(),
            "this node has no public IPv4 address to hold a lease under: set --public-ip or --iface"
        );
    }
    assert!(choose(&dual(), &US, None, &[]).is_err());
}

#[test]
fn switching_ipv6_keeps_the_ipv4_subnet() {
    let list = [stored(11, "10.5.65.0-24"), stored(12, "10.5.3.0-24")];
    let on = choose(&dual(), &us6(), None, &list).unwrap();
    assert_eq!(on.drop_incompatible, Some((key("10.5.65.0-24"), 11)));
    assert_eq!(first_candidate(&on), "10.5.65.0-24&fd05:0:0:1::-64");
    let Choice::Pick { candidates } = on.choice else {
        panic!("no IPv6 subnet yet");
    };
    assert_eq!(candidates.len(), 100);

    let list = [stored(11, "10.5.65.0-24&fd05:0:0:7::-64")];
    let off = choose(&conf(""), &US, None, &list).unwrap();
    assert_eq!(
        off.choice,
        Choice::Previous {
            key: key("10.5.65.0-24")
        }
    );
    assert!(off.drop_incompatible.is_some());
}

#[test]
fn dual_stack_takes_both_previous_subnets_or_pairs_of_free_ones() {
    let previous = Some(key("10.5.65.0-24&fd05:0:0:7::-64"));
    let decision = choose(&dual(), &us6(), previous, &[]).unwrap();
    assert_eq!(
        Some(decision.choice),
        previous.map(|key| Choice::Previous { key })
    );

    let list = [
        stored(12, "10.5.1.0-24&fd05:0:0:1::-64"),
        stored(13, "10.5.2.0-24"),
    ];
    let decision = choose(&dual(), &us6(), None, &list).unwrap();
    assert_eq!(first_candidate(&decision), "10.5.3.0-24&fd05:0:0:2::-64");
}

#[test]
fn ipv6_only_nodes_are_told_apart_by_their_ipv6_address() {
    let json = r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd05::/48","Backend":{"Type":"vxlan"}}"#;
    let conf = NetConf::parse(json).unwrap();
    let lease = |last: u16, subnet: &str| {
        let attrs = LeaseAttrs {
            public_ipv6: Some(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, last)),
            backend_type: "vxlan".to_owned(),
            ..LeaseAttrs::default()
        };
        let lease = Lease {
            key: key(subnet),
            attrs,
        };
        StoredLease {
            lease,
            reserved: false,
            mod_revision: 11,
        }
    };
    let list = [lease(0x12, "0.0.0.0-0&fd05:0:0:1::-64")];
    let us = Identity {
        public_ip: None,
        ..us6()
    };
    let decision = choose(&conf, &us, None, &list).unwrap();
    assert_eq!(first_candidate(&decision), "0.0.0.0-0&fd05:0:0:2::-64");
    let list = [
        lease(0x12, "0.0.0.0-0&fd05:0:0:1::-64"),
        lease(0x11, "0.0.0.0-0&fd05:0:0:5::-64"),
    ];
    let decision = choose(&conf, &us, None, &list).unwrap();
    assert_eq!(decision.choice, reuse("0.0.0.0-0&fd05:0:0:5::-64", false));
}

proptest! {
    /// Whatever is stored, the answer is a subnet we may hold and nobody else has.
    #[test]
    fn answers_are_compatible_and_free(
        len in 18u8..=30,
        list in proptest::collection::vec((10u8..30, any::<u16>(), 16u8..=31, any::<bool>()), 0..30),
        previous in proptest::option::of((any::<u16>(), 16u8..=31)),
    ) {
        let conf = conf(&format!(r#","SubnetLen":{len}"#));
        let subnet = |low: u16, len| {
            let ip = Ipv4Addr::from(0x0a05_0000 | u32::from(low));
            SubnetKey::from_v4(Ipv4Net::new(ip, len).unwrap())
        };
        // No store has a key twice.
        let list: BTreeMap<SubnetKey, StoredLease> = list
            .into_iter()
            .map(|(host, low, len, fixed)| {
                let key = subnet(low, len);
                let name = key.to_string();
                (key, if fixed { reserved(host, &name) } else { stored(host, &name) })
            })
            .collect();
        let list: Vec<StoredLease> = list.into_values().collect();
        let previous = previous.map(|(low, len)| subnet(low, len));
        if let Ok(decision) = choose(&conf, &US, previous, &list) {
            let dropped = decision.drop_incompatible.map(|(key, _)| key);
            let (keys, reused) = match decision.choice {
                Choice::Reuse { key, .. } => (vec![key], true),
                Choice::Previous { key } => (vec![key], false),
                Choice::Pick { candidates } => (candidates, false),
            };
            prop_assert!(!keys.is_empty());
            for key in keys {
                prop_assert!(compatible(&conf, &key));
                let theirs = list.iter().map(|stored| stored.lease.key).filter(|other| Some(*other) != dropped);
                for other in theirs.filter(|_| !reused) {
                    prop_assert!(!subnet::overlap(key.v4.unwrap(), other.v4.unwrap()));
                }
                if reused {
                    prop_assert!(list.iter().any(|s| s.lease.key == key && is_ours(&conf, &US, &s.lease)));
                }
            }
            if let Some((key, revision)) = decision.drop_incompatible {
                let found = list.iter().find(|s| s.lease.key == key && s.mod_revision == revision);
                prop_assert!(found.is_some_and(|s| !s.reserved && is_ours(&conf, &US, &s.lease)));
            }
        }
    }
}
