//! The arithmetic of node subnets: which of them the configuration allows, and which of those are free.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};

use crate::config::{Address, FamilyConf};

/// How many free subnets are collected for a random choice among them, as upstream does. Nodes that start at the same
/// time then seldom try for the same one.
pub const CANDIDATES: usize = 100;

/// Lists the first `limit` subnets of the range, in ascending order, that overlap nothing in `taken`.
///
/// Overlap is what counts, not equality: leases from before a change of `SubnetLen` have other lengths.
pub fn candidate_subnets(
    conf: &FamilyConf<Ipv4Net, Ipv4Addr>,
    taken: &BTreeSet<Ipv4Net>,
    limit: usize,
) -> Vec<Ipv4Net> {
    let taken = taken.iter().map(|net| span(net.network(), net.broadcast()));
    free(conf.min, conf.max, conf.subnet_len, taken.collect())
        .take(limit)
        .filter_map(|base| Ipv4Net::new(base, conf.subnet_len).ok())
        .collect()
}

/// Lists the first `limit` IPv6 subnets of the range, in ascending order, that overlap nothing in `taken`.
pub fn candidate_subnets_v6(
    conf: &FamilyConf<Ipv6Net, Ipv6Addr>,
    taken: &BTreeSet<Ipv6Net>,
    limit: usize,
) -> Vec<Ipv6Net> {
    let taken = taken.iter().map(|net| span(net.network(), net.broadcast()));
    free(conf.min, conf.max, conf.subnet_len, taken.collect())
        .take(limit)
        .filter_map(|base| Ipv6Net::new(base, conf.subnet_len).ok())
        .collect()
}

/// Tells whether the configuration allows a node to hold `subnet`: right length, inside the range, no host bits.
pub fn fits(conf: &FamilyConf<Ipv4Net, Ipv4Addr>, subnet: Ipv4Net) -> bool {
    subnet.prefix_len() == conf.subnet_len
        && subnet.network() == subnet.addr()
        && (conf.min..=conf.max).contains(&subnet.addr())
}

/// Tells whether the configuration allows a node to hold the IPv6 `subnet`.
pub fn fits_v6(conf: &FamilyConf<Ipv6Net, Ipv6Addr>, subnet: Ipv6Net) -> bool {
    subnet.prefix_len() == conf.subnet_len
        && subnet.network() == subnet.addr()
        && (conf.min..=conf.max).contains(&subnet.addr())
}

/// Tells whether two IPv4 prefixes have an address in common.
pub fn overlap(a: Ipv4Net, b: Ipv4Net) -> bool {
    a.contains(&b) || b.contains(&a)
}

/// Tells whether two IPv6 prefixes have an address in common.
pub fn overlap_v6(a: Ipv6Net, b: Ipv6Net) -> bool {
    a.contains(&b) || b.contains(&a)
}

fn span<A: Address>(first: A, last: A) -> (u128, u128) {
    (first.to_number(), last.to_number())
}

/// Walks the bases of the subnets from `min` to `max`, jumping over whole taken spans.
fn free<A: Address>(
    min: A,
    max: A,
    subnet_len: u8,
    mut taken: Vec<(u128, u128)>,
) -> impl Iterator<Item = A> {
    taken.sort_unstable();
    let size = 1u128.checked_shl(u32::from(A::BITS.saturating_sub(subnet_len)));
    let size = size.unwrap_or(u128::MAX);
    let max = max.to_number();
    let mut next = Some(min.to_number());
    let mut spans = taken.into_iter().peekable();
    std::iter::from_fn(move || {
        loop {
            let base = next.filter(|base| *base <= max)?;
            // In order of their starts, so once one ends before this subnet it is behind for good.
            while spans.next_if(|(_, last)| *last < base).is_some() {}
            match spans.peek() {
                Some((first, last)) if *first <= base.saturating_add(size - 1) => {
                    let steps = (last - base) / size + 1;
                    next = steps
                        .checked_mul(size)
                        .and_then(|jump| base.checked_add(jump));
                }
                _ => {
                    next = base.checked_add(size);
                    return Some(A::from_number(base));
                }
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::NetConf;

    fn conf(extra: &str) -> FamilyConf<Ipv4Net, Ipv4Addr> {
        let json = format!(r#"{{"Network":"10.3.0.0/16","Backend":{{"Type":"vxlan"}}{extra}}}"#);
        NetConf::parse(&json).unwrap().ipv4.unwrap()
    }

    fn nets(list: &[&str]) -> BTreeSet<Ipv4Net> {
        list.iter().map(|net| net.parse().unwrap()).collect()
    }

    fn listed(conf: &FamilyConf<Ipv4Net, Ipv4Addr>, taken: &[&str], limit: usize) -> Vec<String> {
        let found = candidate_subnets(conf, &nets(taken), limit);
        found.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_first_hundred_and_never_the_first_subnet() {
        let found = candidate_subnets(&conf(""), &BTreeSet::new(), CANDIDATES);
        assert_eq!(found.len(), 100);
        assert_eq!(found[0].to_string(), "10.3.1.0/24");
        assert_eq!(found[99].to_string(), "10.3.100.0/24");
        let all = candidate_subnets(&conf(""), &BTreeSet::new(), usize::MAX);
        assert_eq!(all.len(), 255);
        assert_eq!(all[254].to_string(), "10.3.255.0/24");
    }

    #[test]
    fn taken_ones_are_passed_over_by_overlap() {
        let small = conf(r#","SubnetMin":"10.3.1.0","SubnetMax":"10.3.6.0""#);
        let cases: [(&[&str], &[&str]); 6] = [
            (
                &["10.3.2.0/24"],
                &[
                    "10.3.1.0/24",
                    "10.3.3.0/24",
                    "10.3.4.0/24",
                    "10.3.5.0/24",
                    "10.3.6.0/24",
                ],
            ),
            // Longer and shorter than ours, nested, with host bits, and outside the range.
            (
                &["10.3.2.128/25", "10.3.4.0/23"],
                &["10.3.1.0/24", "10.3.3.0/24", "10.3.6.0/24"],
            ),
            (&["10.3.0.0/21"], &[]),
            (
                &["10.3.0.0/22", "10.3.2.0/28", "10.3.5.255/32"],
                &["10.3.4.0/24", "10.3.6.0/24"],
            ),
            (
                &["10.3.4.77/23", "10.4.0.0/16", "9.0.0.0/8"],
                &["10.3.1.0/24", "10.3.2.0/24", "10.3.3.0/24", "10.3.6.0/24"],
            ),
            (&["0.0.0.0/0"], &[]),
        ];
        for (taken, free) in cases {
            assert_eq!(listed(&small, taken, 100), free, "{taken:?}");
        }
        assert_eq!(
            listed(&small, &["10.3.1.0/24"], 2),
            ["10.3.2.0/24", "10.3.3.0/24"]
        );
        assert!(listed(&small, &[], 0).is_empty());
    }

    #[test]
    fn the_end_of_the_address_space() {
        let json = r#"{"Network":"255.255.255.0/24","EnableIPv6":true,"IPv6Network":"ffff:ffff:ffff::/48","Backend":{"Type":"vxlan"}}"#;
        let conf = NetConf::parse(json).unwrap();
        let v4 = conf.ipv4.unwrap();
        assert_eq!(
            listed(&v4, &[], 100),
            [
                "255.255.255.64/26",
                "255.255.255.128/26",
                "255.255.255.192/26"
            ]
        );
        assert_eq!(
            listed(&v4, &["255.255.255.128/25"], 100),
            ["255.255.255.64/26"]
        );
        let v6 = candidate_subnets_v6(&conf.ipv6.unwrap(), &BTreeSet::new(), usize::MAX);
        assert_eq!(v6.len(), 65_535);
        assert_eq!(v6[65_534].to_string(), "ffff:ffff:ffff:ffff::/64");
    }

    #[test]
    fn fitting() {
        let conf = conf(r#","SubnetMin":"10.3.5.0","SubnetMax":"10.3.8.0""#);
        for (subnet, expected) in [
            ("10.3.5.0/24", true),
            ("10.3.8.0/24", true),
            ("10.3.4.0/24", false),
            ("10.3.9.0/24", false),
            ("10.3.5.0/25", false),
            ("10.3.5.1/24", false),
            ("10.4.5.0/24", false),
        ] {
            assert_eq!(fits(&conf, subnet.parse().unwrap()), expected, "{subnet}");
        }
    }

    proptest! {
        #[test]
        fn candidates_fit_and_never_overlap(
            len in 18u8..=30,
            taken in proptest::collection::btree_set((any::<u16>(), 14u8..=32), 0..40),
            limit in 0usize..200,
        ) {
            let conf = conf(&format!(r#","SubnetLen":{len}"#));
            let taken: BTreeSet<Ipv4Net> = taken
                .into_iter()
                .map(|(low, len)| Ipv4Net::new(Ipv4Addr::from(0x0a03_0000 | u32::from(low)), len).unwrap())
                .collect();
            let found = candidate_subnets(&conf, &taken, limit);
            prop_assert!(found.len() <= limit);
            prop_assert!(found.is_sorted());
            for subnet in &found {
                prop_assert!(fits(&conf, *subnet));
                prop_assert!(taken.iter().all(|other| !overlap(*subnet, *other)));
            }
            // Nothing free is left out: the naive scan finds the same.
            let naive: Vec<Ipv4Net> = conf
                .network
                .subnets(len)
                .unwrap()
                .filter(|subnet| fits(&conf, *subnet))
                .filter(|subnet| taken.iter().all(|other| !overlap(*subnet, *other)))
                .take(limit)
                .collect();
            prop_assert_eq!(found, naive);
        }
    }
}
