//! What became of the uplink: addresses and MTU change while the overlay runs, and interfaces are replaced by bridges.

use std::net::IpAddr;

use super::{IfaceError, Link, Routes, Table, Uplink, Wanted, select};

/// Finds the uplink again. Its address is followed first, to whichever interface has it now; then the interface by its name,
/// whatever address it has now. The default route is not asked: a VPN that takes it must not take the overlay with it.
pub fn follow(
    links: &[Link],
    routes: &Routes,
    wanted: &Wanted,
    current: &Uplink,
) -> Result<Uplink, IfaceError> {
    let (need_v4, need_v6) = (current.address.is_some(), current.address_v6.is_some());
    let public = Wanted {
        public_ip: wanted.public_ip,
        public_ipv6: wanted.public_ipv6,
        ..Wanted::default()
    };
    let by = |iface: String| {
        let named = Wanted {
            ifaces: vec![iface],
            ..public.clone()
        };
        select(links, routes, &named, need_v4, need_v6)
    };
    let address = (current.address.map(IpAddr::V4)).or(current.address_v6.map(IpAddr::V6));
    let has_it = |link: &&Link| {
        link.index == current.index
            && link.up
            && link.addrs.iter().any(|addr| Some(addr.ip) == address)
    };
    let found = match links.iter().find(has_it) {
        Some(link) => Table::new(links, &public, need_v4, need_v6).uplink(
            link,
            current.address,
            current.address_v6,
            current.reason.clone(),
        ),
        None => address
            .and_then(|address| by(address.to_string()).ok())
            .map_or_else(|| by(current.name.clone()), Ok),
    };
    found.map(|uplink| Uplink {
        reason: if uplink.name == current.name {
            current.reason.clone()
        } else {
            format!("it has the address that {} had", current.name)
        },
        ..uplink
    })
}

/// Whether the tunnel runs over both in the same way.
pub fn is_same(one: &Uplink, other: &Uplink) -> bool {
    one.index == other.index
        && one.mtu == other.mtu
        && one.local_v4() == other.local_v4()
        && one.local_v6() == other.local_v6()
        && one.public_ip == other.public_ip
        && one.public_ipv6 == other.public_ipv6
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{addr::IfIndex, iface::LinkAddr};

    fn link(index: u32, name: &str, ips: &[&str]) -> Link {
        let addr = |ip: &&str| LinkAddr {
            ip: ip.parse().expect("an address"),
            prefix_len: 24,
            permanent: true,
            temporary: false,
            deprecated: false,
            link_local: false,
        };
        Link {
            index: IfIndex::try_from(index).expect("an index"),
            name: name.into(),
            mtu: 1500,
            up: true,
            kind: None,
            addrs: ips.iter().map(addr).collect(),
        }
    }

    fn chosen() -> Uplink {
        let links = [link(2, "eth0", &["10.0.0.2"])];
        let wanted = Wanted {
            ifaces: vec!["eth0".into()],
            ..Wanted::default()
        };
        select(&links, &Routes::default(), &wanted, true, false).expect("an uplink")
    }

    fn find(links: &[Link]) -> Result<Uplink, IfaceError> {
        follow(links, &Routes::default(), &Wanted::default(), &chosen())
    }

    #[test]
    fn nothing_happened() {
        let now = find(&[link(2, "eth0", &["10.0.0.2"])]).expect("an uplink");
        assert!(is_same(&now, &chosen()));
        assert_eq!(now, chosen());
    }

    #[test]
    fn another_address_beside_ours_changes_nothing() {
        let now = find(&[link(2, "eth0", &["10.0.0.1", "10.0.0.2"])]).expect("an uplink");
        assert!(is_same(&now, &chosen()));
    }

    #[test]
    fn another_address_instead_of_ours_is_taken() {
        let now = find(&[link(2, "eth0", &["10.0.0.3"])]).expect("an uplink");
        assert_eq!(now.public_ip, Some("10.0.0.3".parse().expect("an address")));
        assert!(!is_same(&now, &chosen()));
    }

    #[test]
    fn the_address_is_followed_into_a_bridge() {
        let links = [link(2, "eth0", &[]), link(7, "br0", &["10.0.0.2"])];
        let now = find(&links).expect("an uplink");
        assert_eq!(now.name, "br0");
        assert!(now.reason.contains("eth0"), "{}", now.reason);
    }

    #[test]
    fn an_interface_that_was_made_anew_is_ours_again() {
        let now = find(&[link(9, "eth0", &["10.0.0.2"])]).expect("an uplink");
        assert!(!is_same(&now, &chosen()));
        let now = find(&[link(9, "eth0", &["10.0.0.9"])]).expect("an uplink");
        assert_eq!((now.index.get(), now.name.as_str()), (9, "eth0"));
    }

    #[test]
    fn an_mtu_is_followed() {
        let mut wide = link(2, "eth0", &["10.0.0.2"]);
        wide.mtu = 9000;
        assert!(!is_same(&find(&[wide]).expect("an uplink"), &chosen()));
    }

    #[test]
    fn without_an_address_or_an_interface_there_is_none() {
        find(&[link(2, "eth0", &[])]).expect_err("no address");
        find(&[link(3, "eth1", &["10.0.0.9"])]).expect_err("no interface");
        let mut down = link(2, "eth0", &["10.0.0.2"]);
        down.up = false;
        find(&[down]).expect_err("down");
    }
}
